//! What a domain definition says, as values instead of paths into a tree.
//!
//! The tree stays the truth: [`DomainXml`] is read from an [`Element`] and drops what vmdr has no use for, so whoever
//! changes a definition changes the tree. Every device is listed ([`Device`]), known or not: an unknown one is what
//! preflight refuses.
//!
//! Element names and meanings: <https://libvirt.org/formatdomain.html>.

use std::path::PathBuf;
use std::str::FromStr;

use uuid::Uuid;

use crate::xml::{Element, XmlError};

/// The namespace in which libvirt takes arguments for QEMU's command line.
pub const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// The directory of a domain's own QMP socket: libvirt makes it, the user that QEMU runs as may write there.
pub const QMP_SOCKET_DIRECTORY: &str = "/var/lib/libvirt/qemu";
/// The channel of the QEMU guest agent.
pub const GUEST_AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

const COMMAND_LINE: &str = "qemu:commandline";
const ARGUMENT: &str = "qemu:arg";

/// Why a definition makes no sense to vmdr. libvirt itself never gives such a one out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DomainXmlError {
    /// Not XML.
    #[error(transparent)]
    Xml(#[from] XmlError),
    /// The root is something else.
    #[error("the document is a <{0}>, not a <domain>")]
    NotADomain(String),
    /// Something that every domain has is not there.
    #[error("the domain definition has no {0}")]
    Missing(&'static str),
    /// A value that cannot be read.
    #[error("the domain definition says {what} = {value:?}, which is not {expected}")]
    Value {
        /// Path of the element.
        what: String,
        /// What stands there.
        value: String,
        /// What should.
        expected: &'static str,
    },
}

/// A domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainXml {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its number, if it is running and this is its live definition.
    pub id: Option<u32>,
    /// `kvm` or `qemu` (TCG).
    pub virt_type: String,
    /// Architecture, `x86_64`.
    pub arch: String,
    /// Machine type, as `pc-q35-10.0`.
    pub machine: String,
    /// QEMU's binary.
    pub emulator: Option<PathBuf>,
    /// Bytes of memory the guest starts with, memory devices not counted.
    pub memory_bytes: u64,
    /// `<maxMemory>`: slots for hotplug exist.
    pub max_memory: bool,
    /// How memory is allocated.
    pub memory_backing: MemoryBacking,
    /// NUMA cells of the guest, empty if it has none.
    pub numa_cells: Vec<NumaCell>,
    /// The largest number of virtual CPUs.
    pub vcpus: u32,
    /// `<cpu>`, if there is one.
    pub cpu: Option<Element>,
    /// Firmware.
    pub firmware: Firmware,
    /// `<launchSecurity type=...>`: sev, sev-snp, tdx.
    pub launch_security: Option<String>,
    /// Disks, CD-ROM and floppy drives.
    pub disks: Vec<Disk>,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
    /// Every device, those above too, in order of the definition.
    pub devices: Vec<Device>,
    /// The security drivers that confine the domain (`apparmor`, `selinux`), `dac` and `none` left out.
    pub confined_by: Vec<String>,
    /// Arguments of `<qemu:commandline>`.
    pub qemu_arguments: Vec<String>,
    /// The domain's own QMP socket, if the definition asks for one.
    pub qmp_socket: Option<PathBuf>,
}

/// `<memoryBacking>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryBacking {
    /// `<source type=...>`: anonymous, file or memfd.
    pub source: Option<String>,
    /// `<access mode='shared'>`.
    pub shared: bool,
    /// `<hugepages>`.
    pub hugepages: bool,
    /// `<discard/>`.
    pub discard: bool,
    /// `<locked/>`.
    pub locked: bool,
    /// `<allocation mode='immediate'>`: all of it is there from the start.
    pub allocation_immediate: bool,
}

/// A NUMA cell of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaCell {
    /// Its number.
    pub id: u32,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// `memAccess`: shared or private, if it says so.
    pub access: Option<String>,
}

/// Where the firmware is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Firmware {
    /// `<loader type='pflash'>`: UEFI in flash.
    pub pflash: bool,
    /// `<loader>` is not read-only.
    pub loader_writable: bool,
    /// `<nvram>`: the file with the UEFI variables.
    pub nvram: Option<String>,
    /// The format of that file, where it is named; libvirt takes the firmware's otherwise, which is raw.
    pub nvram_format: Option<String>,
}

/// What a disk is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskDevice {
    /// A disk.
    Disk,
    /// A SCSI LUN that passes commands through.
    Lun,
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
}

/// A disk, a CD-ROM or a floppy drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Name at the target, `vda`: what libvirt's block functions take.
    pub target: String,
    /// `virtio`, `scsi`, `sata`, `ide`, `usb`, `fdc`...
    pub bus: String,
    /// What it is to the guest.
    pub device: DiskDevice,
    /// Where its content is; `None`: an empty drive.
    pub source: Option<DiskSource>,
    /// Format, `raw` or `qcow2`.
    pub driver_type: Option<String>,
    /// Cache mode.
    pub cache: Option<String>,
    /// The guest is told that it knows no TRIM: `discard_granularity` of its device is 0 in `<qemu:override>`. (libvirt drops a 0 in
    /// `<blockio>`.)
    pub trim_off: bool,
    /// What QEMU does on a write error.
    pub error_policy: Option<String>,
    /// `<readonly/>`.
    pub readonly: bool,
    /// `<shareable/>`.
    pub shareable: bool,
    /// `<transient/>`: writes vanish with the guest.
    pub transient: bool,
    /// `<serial>`.
    pub serial: Option<String>,
    /// `<wwn>`.
    pub wwn: Option<String>,
    /// Images below this one, in order; live definitions only.
    pub backing: Vec<DiskSource>,
    /// `<mirror>`: the kind of a block job that runs (`copy`, `active-commit`).
    pub mirror: Option<String>,
    /// `type=` of the disk: file, block, network, volume, dir, nvme, vhostuser, vhostvdpa.
    pub kind: String,
}

impl Disk {
    /// Whether the guest can change it, so that it must be mirrored.
    pub fn is_writable(&self) -> bool {
        !self.readonly && self.device != DiskDevice::Cdrom && self.source.is_some()
    }
}

/// Where the content of an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSource {
    /// file, block, network, volume, dir, nvme, vhostuser, vhostvdpa.
    pub kind: String,
    /// A path, `POOL/VOLUME`, or `PROTOCOL:NAME`; for messages.
    pub location: String,
    /// Format.
    pub format: Option<String>,
}

impl DiskSource {
    /// The path, if it is a file or a block device.
    pub fn path(&self) -> Option<PathBuf> {
        matches!(self.kind.as_str(), "file" | "block").then(|| PathBuf::from(&self.location))
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// bridge, network, direct, user, ethernet, hostdev, vhostuser, vdpa...
    pub kind: String,
    /// Bridge, network, device or socket.
    pub source: Option<String>,
    /// MAC address.
    pub mac: Option<String>,
    /// virtio, e1000...
    pub model: Option<String>,
    /// The tap device on the host.
    pub target: Option<String>,
    /// `<driver name=...>`: vhost or qemu.
    pub driver: Option<String>,
}

/// Any device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name of the element: disk, controller, hostdev...
    pub kind: String,
    /// What tells devices of a kind apart: the model, or else the type. Empty: neither.
    pub model: String,
    /// libvirt's alias in a live definition.
    pub alias: Option<String>,
    /// The whole element.
    pub element: Element,
}

impl DomainXml {
    /// Reads a definition.
    pub fn parse(document: &str) -> Result<Self, DomainXmlError> {
        Self::from_element(&Element::parse(document)?)
    }

    /// Reads a definition that is a tree already.
    pub fn from_element(root: &Element) -> Result<Self, DomainXmlError> {
        if root.name != "domain" {
            return Err(DomainXmlError::NotADomain(root.name.clone()));
        }
        let name = root.text_at("name").filter(|n| !n.is_empty()).ok_or(DomainXmlError::Missing("name"))?;
        let uuid = root.text_at("uuid").ok_or(DomainXmlError::Missing("uuid"))?;
        let uuid = Uuid::parse_str(&uuid).map_err(|_| value("uuid", &uuid, "a UUID"))?;
        let os_type = root.find("os/type").ok_or(DomainXmlError::Missing("os/type"))?;
        let memory = root.find("memory").ok_or(DomainXmlError::Missing("memory"))?;
        let nodes = || root.find("devices").into_iter().flat_map(Element::elements);
        let disks =
            nodes().filter(|e| e.name == "disk").map(|element| disk(root, element)).collect::<Result<_, _>>()?;
        Ok(DomainXml {
            name,
            uuid,
            id: root.attribute("id").map(|id| number("domain/@id", id)).transpose()?,
            virt_type: root.attribute("type").unwrap_or_default().to_owned(),
            arch: os_type.attribute("arch").unwrap_or_default().to_owned(),
            machine: os_type.attribute("machine").unwrap_or_default().to_owned(),
            emulator: root.text_at("devices/emulator").map(PathBuf::from),
            memory_bytes: bytes("memory", memory)?,
            max_memory: root.find("maxMemory").is_some(),
            memory_backing: memory_backing(root),
            numa_cells: numa_cells(root)?,
            vcpus: root.text_at("vcpu").map_or(Ok(1), |n| number("vcpu", &n))?,
            cpu: root.find("cpu").cloned(),
            firmware: firmware(root),
            launch_security: root.find("launchSecurity").map(|e| e.attribute("type").unwrap_or("unknown").to_owned()),
            disks,
            interfaces: nodes().filter(|e| e.name == "interface").map(interface).collect(),
            devices: nodes().filter(|e| e.name != "emulator").map(device).collect(),
            confined_by: root
                .find_all("seclabel")
                .into_iter()
                .filter(|e| e.attribute("type") != Some("none"))
                .filter_map(|e| e.attribute("model"))
                .filter(|m| !matches!(*m, "dac" | "none"))
                .map(str::to_owned)
                .collect(),
            qemu_arguments: qemu_arguments(root),
            qmp_socket: own_qmp_socket(root),
        })
    }

    /// The domain's devices of this kind.
    pub fn devices_of(&self, kind: &str) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(move |d| d.kind == kind)
    }
}

/// The virtio channel of this name in a domain's definition.
pub fn channel<'a>(root: &'a Element, name: &str) -> Option<&'a Element> {
    let mut channels = root.find("devices")?.elements().filter(|device| device.name == "channel");
    channels.find(|channel| channel.attribute_at("target", "name") == Some(name))
}

/// The unix socket at which QEMU listens for the other end of a running domain's channel of this name, if it has one.
pub fn channel_socket(live: &Element, name: &str) -> Option<PathBuf> {
    let channel = channel(live, name).filter(|channel| channel.attribute("type") == Some("unix"))?;
    channel.attribute_at("source", "path").map(PathBuf::from)
}

/// The path that [`add_own_qmp_socket`] uses for a domain.
pub fn qmp_socket_path(uuid: &Uuid) -> PathBuf {
    PathBuf::from(format!("{QMP_SOCKET_DIRECTORY}/vmdr-{uuid}.qmp"))
}

/// The QMP socket that a definition gives vmdr alone: `-qmp unix:PATH,...` where PATH is [`qmp_socket_path`]. Other QMP
/// sockets, of which somebody else is the only client, are left alone.
pub fn own_qmp_socket(root: &Element) -> Option<PathBuf> {
    let uuid = Uuid::parse_str(&root.text_at("uuid")?).ok()?;
    let wanted = qmp_socket_path(&uuid);
    let arguments = qemu_arguments(root);
    let found = arguments.windows(2).any(|pair| {
        let path = pair[1].strip_prefix("unix:").map(|rest| rest.split(',').next().unwrap_or_default());
        pair[0] == "-qmp" && path.map(PathBuf::from).as_ref() == Some(&wanted)
    });
    found.then_some(wanted)
}

/// Gives a definition a QMP socket of vmdr's own; says whether it had none. An error: the definition has no UUID.
pub fn add_own_qmp_socket(root: &mut Element) -> Result<bool, DomainXmlError> {
    if own_qmp_socket(root).is_some() {
        return Ok(false);
    }
    let uuid = root.text_at("uuid").ok_or(DomainXmlError::Missing("uuid"))?;
    let uuid = Uuid::parse_str(&uuid).map_err(|_| value("uuid", &uuid, "a UUID"))?;
    let socket = qmp_socket_path(&uuid);
    add_qemu_arguments(root, &["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    Ok(true)
}

/// Takes vmdr's own QMP socket out of a definition; says whether it had one.
pub fn remove_own_qmp_socket(root: &mut Element) -> bool {
    let Some(socket) = own_qmp_socket(root) else { return false };
    let prefix = format!("unix:{}", socket.display());
    let Some(line) = root.find_mut(COMMAND_LINE) else { return false };
    let values: Vec<Option<String>> = line.elements().map(|e| e.attribute("value").map(str::to_owned)).collect();
    let mut index = 0;
    line.remove_where(|_| {
        let at = index;
        index += 1;
        let is = |i: usize, what: &str| values.get(i).and_then(Option::as_deref) == Some(what);
        let ours = |i: usize| {
            let value = values.get(i).and_then(Option::as_deref).unwrap_or_default();
            value.strip_prefix(&prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(','))
        };
        (is(at, "-qmp") && ours(at + 1)) || (at > 0 && is(at - 1, "-qmp") && ours(at))
    });
    if root.find(COMMAND_LINE).is_some_and(|line| line.elements().next().is_none()) {
        root.remove_all(COMMAND_LINE);
    }
    true
}

/// Adds arguments to QEMU's command line, with the namespace they need.
pub fn add_qemu_arguments(root: &mut Element, arguments: &[&str]) {
    root.set_attribute("xmlns:qemu", QEMU_NAMESPACE);
    let line = root.ensure(COMMAND_LINE);
    for argument in arguments {
        line.push(Element::new(ARGUMENT).with_attribute("value", *argument));
    }
}

/// The arguments that a definition adds to QEMU's command line.
pub fn qemu_arguments(root: &Element) -> Vec<String> {
    let path = format!("{COMMAND_LINE}/{ARGUMENT}");
    root.find_all(&path).into_iter().filter_map(|e| e.attribute("value")).map(str::to_owned).collect()
}

fn value(what: &str, value: &str, expected: &'static str) -> DomainXmlError {
    DomainXmlError::Value { what: what.to_owned(), value: value.to_owned(), expected }
}

fn number<T: FromStr>(what: &str, text: &str) -> Result<T, DomainXmlError> {
    text.trim().parse().map_err(|_| value(what, text, "a number in range"))
}

/// A size with `unit=` (KiB where there is none), in bytes. Units as in libvirt's virScaleInteger: `KB` is a thousand,
/// `K` and `KiB` are 1,024.
fn bytes(what: &str, element: &Element) -> Result<u64, DomainXmlError> {
    scaled(what, &element.text(), element.attribute("unit"))
}

fn scaled(what: &str, text: &str, unit: Option<&str>) -> Result<u64, DomainXmlError> {
    let unit = unit.unwrap_or("KiB");
    let (prefix, base) = match unit.to_ascii_lowercase().as_str() {
        "b" | "byte" | "bytes" => (None, 1024u64),
        u if u.len() == 1 => (u.chars().next(), 1024),
        u if u.ends_with("ib") => (u.chars().next(), 1024),
        u if u.ends_with('b') => (u.chars().next(), 1000),
        _ => return Err(value(what, unit, "a unit of memory")),
    };
    let power = match prefix {
        None => 0,
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some('p') => 5,
        Some('e') => 6,
        Some(_) => return Err(value(what, unit, "a unit of memory")),
    };
    let count: u64 = number(what, text)?;
    base.checked_pow(power).and_then(|b| b.checked_mul(count)).ok_or_else(|| value(what, text, "a size below 16 EiB"))
}

fn memory_backing(root: &Element) -> MemoryBacking {
    let Some(backing) = root.find("memoryBacking") else { return MemoryBacking::default() };
    MemoryBacking {
        source: backing.attribute_at("source", "type").map(str::to_owned),
        shared: backing.attribute_at("access", "mode") == Some("shared"),
        hugepages: backing.find("hugepages").is_some(),
        discard: backing.find("discard").is_some(),
        locked: backing.find("locked").is_some(),
        allocation_immediate: backing.attribute_at("allocation", "mode") == Some("immediate"),
    }
}

fn numa_cells(root: &Element) -> Result<Vec<NumaCell>, DomainXmlError> {
    let mut cells = Vec::new();
    for (position, cell) in root.find_all("cpu/numa/cell").into_iter().enumerate() {
        let memory = cell.attribute("memory").unwrap_or("0");
        cells.push(NumaCell {
            id: match cell.attribute("id") {
                Some(id) => number("cpu/numa/cell/@id", id)?,
                None => u32::try_from(position).map_err(|_| value("cpu/numa/cell", "", "a number in range"))?,
            },
            memory_bytes: scaled("cpu/numa/cell/@memory", memory, cell.attribute("unit"))?,
            access: cell.attribute("memAccess").map(str::to_owned),
        });
    }
    Ok(cells)
}

fn firmware(root: &Element) -> Firmware {
    let loader = root.find("os/loader");
    let pflash = loader.is_some_and(|l| l.attribute("type") == Some("pflash"));
    Firmware {
        pflash: pflash || root.attribute_at("os", "firmware") == Some("efi"),
        loader_writable: pflash && loader.is_some_and(|l| l.attribute("readonly") != Some("yes")),
        nvram: root.find("os/nvram").map(|n| {
            let path = n.text();
            if path.is_empty() { n.find("source").map(location).unwrap_or_default() } else { path }
        }),
        nvram_format: root.attribute_at("os/nvram", "format").map(str::to_owned),
    }
}

fn disk(root: &Element, element: &Element) -> Result<Disk, DomainXmlError> {
    let target = element.attribute_at("target", "dev").ok_or(DomainXmlError::Missing("disk/target/@dev"))?;
    let driver = element.find("driver");
    let driver_value = |name: &str| driver.and_then(|d| d.attribute(name)).map(str::to_owned);
    let kind = element.attribute("type").unwrap_or("file");
    let mut backing = Vec::new();
    let mut store = element.find("backingStore");
    while let Some(layer) = store {
        backing.extend(source(layer, layer.attribute("type").unwrap_or("file")));
        store = layer.find("backingStore");
    }
    Ok(Disk {
        target: target.to_owned(),
        bus: element.attribute_at("target", "bus").unwrap_or_default().to_owned(),
        device: match element.attribute("device").unwrap_or("disk") {
            "disk" => DiskDevice::Disk,
            "lun" => DiskDevice::Lun,
            "cdrom" => DiskDevice::Cdrom,
            "floppy" => DiskDevice::Floppy,
            other => return Err(value("disk/@device", other, "disk, lun, cdrom or floppy")),
        },
        source: source(element, kind),
        driver_type: driver_value("type"),
        cache: driver_value("cache"),
        trim_off: trim_off(root, element),
        error_policy: driver_value("error_policy"),
        readonly: element.find("readonly").is_some(),
        shareable: element.find("shareable").is_some(),
        transient: element.find("transient").is_some(),
        serial: element.text_at("serial"),
        wwn: element.text_at("wwn"),
        backing,
        mirror: element.find("mirror").map(|m| m.attribute("job").unwrap_or("copy").to_owned()),
        kind: kind.to_owned(),
    })
}

fn trim_off(root: &Element, disk: &Element) -> bool {
    let Some(alias) = disk.attribute_at("alias", "name") else { return false };
    let devices = root.find_all("qemu:override/qemu:device");
    let own = devices.into_iter().filter(|device| device.attribute("alias") == Some(alias));
    own.flat_map(|device| device.find_all("qemu:frontend/qemu:property")).any(|property| {
        property.attribute("name") == Some("discard_granularity") && property.attribute("value") == Some("0")
    })
}

/// The source of a disk or of a layer of its backing chain. A drive without a medium has none, or an empty one.
fn source(element: &Element, kind: &str) -> Option<DiskSource> {
    let location = location(element.find("source")?);
    let format = element.attribute_at("format", "type").or_else(|| element.attribute_at("driver", "type"));
    (!location.is_empty()).then(|| DiskSource { kind: kind.to_owned(), location, format: format.map(str::to_owned) })
}

fn location(source: &Element) -> String {
    let get = |name| source.attribute(name).unwrap_or_default();
    if let Some(path) = ["file", "dev", "dir", "path"].into_iter().find_map(|n| source.attribute(n)) {
        return path.to_owned();
    }
    match (source.attribute("protocol"), source.attribute("pool")) {
        (Some(protocol), _) => format!("{protocol}:{}", get("name")),
        (None, Some(pool)) => format!("{pool}/{}", get("volume")),
        // Of NVMe devices and anything newer: enough to name them.
        (None, None) => source.attributes().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(" "),
    }
}

fn interface(element: &Element) -> Interface {
    let at = |path: &str, name: &str| element.attribute_at(path, name).map(str::to_owned);
    let source = element.find("source");
    let kind = element.attribute("type").unwrap_or_default();
    // One that runs in a network has its bridge, too.
    let names = [if kind == "network" { "network" } else { "bridge" }, "network", "dev", "path", "name"];
    let name = source.and_then(|s| names.into_iter().find_map(|n| s.attribute(n)));
    Interface {
        kind: kind.to_owned(),
        source: name.map(str::to_owned),
        mac: at("mac", "address"),
        model: at("model", "type"),
        target: at("target", "dev"),
        driver: at("driver", "name"),
    }
}

fn device(element: &Element) -> Device {
    let nested = |path: &str, name: &str| element.attribute_at(path, name).map(str::to_owned);
    let own = |name: &str| element.attribute(name).map(str::to_owned);
    let model = match element.name.as_str() {
        // What the guest has is in <model>; where it is missing libvirt chooses by bus or type.
        "interface" | "video" | "audio" | "iommu" => {
            nested("model", "type").or_else(|| own("model")).or_else(|| own("type"))
        }
        "disk" => own("model").or_else(|| nested("target", "bus")),
        "controller" => own("model").or_else(|| own("type")),
        "serial" | "console" | "channel" | "parallel" => {
            nested("target/model", "name").or_else(|| nested("target", "type"))
        }
        "rng" | "memballoon" | "watchdog" | "sound" | "panic" | "tpm" | "memory" | "vsock" | "shmem" => own("model"),
        _ => own("model").or_else(|| own("type")),
    };
    Device {
        kind: element.name.clone(),
        model: model.or_else(|| nested("model", "name")).or_else(|| nested("model", "type")).unwrap_or_default(),
        alias: nested("alias", "name"),
        element: element.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channels_socket_is_found_by_its_name() {
        let domain = |name: &str| {
            let text = format!(
                "<domain><devices><channel type='unix'><source mode='bind' path='/run/other'/>\
                 <target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
                 <channel type='unix'><source mode='bind' path='/run/port'/><target type='virtio' name='{name}'/></channel>\
                 </devices></domain>"
            );
            Element::parse(&text).unwrap()
        };
        assert_eq!(channel_socket(&domain("one"), "one"), Some(PathBuf::from("/run/port")));
        assert_eq!(channel_socket(&domain("another"), "one"), None);
    }
}
