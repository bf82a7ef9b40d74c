//! Turns the protected guest's domain XML into the one that is activated here.
//!
//! The guest must find exactly the devices it had: nothing that it can see is changed. What changes is behind the
//! devices: disks become overlays over the standby's images, UEFI variables a file of the activation's own, main memory
//! becomes a private mapping of the RAM image, NICs go where they are here, and what belonged to the old host (labels,
//! CPU pinning, memory placement, huge pages) goes.
//!
//! Two definitions come out. The one to restore from has the RAM image on QEMU's command line; the persistent one does
//! not, so that a guest that shuts down starts again as an ordinary guest, on the disks it left.
//!
//! The same input gives the same output; the host is asked through [`Host`] only.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use vmdr_hypervisor::domain_xml::{self, DomainXmlError};
use vmdr_hypervisor::xml::Element;
use vmdr_proto::control::Finding;

use super::findings;
use super::host::Host;
use super::mapping::{Mapping, source_of};

/// Name of the memory backend that maps the RAM image, and of the RAM block that QEMU makes of it.
pub const RAM_BACKEND: &str = "vmdr-ram";

const COMMAND_LINE: &str = "qemu:commandline";

/// Where the parts of the guest are here.
pub struct Placement<'a> {
    /// The RAM image and the bytes of the guest's main memory; `None`: all memory comes through the stream.
    pub ram: Option<(&'a Path, u64)>,
    /// One for each disk of the standby.
    pub disks: &'a [PlacedDisk],
    /// The file with the UEFI variables, for a guest that has any.
    pub variables: Option<&'a Path>,
    /// Where its NICs are here.
    pub nics: &'a Mapping,
}

/// Where a disk is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedDisk {
    /// Its name at the guest, `vda`.
    pub target: String,
    /// The qcow2 file that takes what the guest writes.
    pub overlay: PathBuf,
    /// The standby's raw image below it, which nobody writes.
    pub base: PathBuf,
}

/// The two definitions, and what was changed that the operator should know of.
#[derive(Debug)]
pub struct Transformed {
    /// To restore from: with the RAM image.
    pub restore: Element,
    /// To define: without it.
    pub persistent: Element,
    /// What was changed beyond names of files; what cannot be done is refused here.
    pub findings: Vec<Finding>,
}

/// Why a domain XML cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum TransformError {
    /// It cannot be read.
    #[error("the stored domain XML cannot be read: {0}")]
    Read(#[from] DomainXmlError),
    /// A path that cannot be written in an XML attribute.
    #[error("the path {0:?} is not UTF-8, which libvirt needs: move the state directory")]
    Path(PathBuf),
}

/// Makes both definitions out of the protected guest's.
pub fn transform(source: &str, placement: &Placement<'_>, host: &dyn Host) -> Result<Transformed, TransformError> {
    let mut root = Element::parse(source).map_err(DomainXmlError::from)?;
    domain_xml::DomainXml::from_element(&root)?;
    let mut findings = Vec::new();
    root.remove_attribute("id");
    remove_host_bindings(&mut root, &mut findings);
    // Without one, libvirt takes the QEMU that it has.
    for devices in root.find_all_mut("devices") {
        devices.remove_where(|e| e.name == "emulator" && !host.exists(Path::new(&e.text())));
    }
    if let Some(file) = placement.variables {
        place_variables(&mut root, file)?;
    }
    for device in root.find_all_mut("devices").into_iter().flat_map(Element::elements_mut) {
        match device.name.as_str() {
            "disk" => place_disk(device, placement, host, &mut findings)?,
            "interface" => place_nic(device, placement.nics, host),
            "graphics" => listen_here(device, host, &mut findings),
            _ => {}
        }
        device.remove_where(|e| e.name == "seclabel");
        if let Some(source) = device.find_mut("source") {
            source.remove_where(|e| e.name == "seclabel");
        }
    }
    remove_ram_arguments(&mut root);
    let persistent = root.clone();
    // Carried memory needs no huge pages either, and whether there are enough of them here on the day of the disaster
    // nobody knows.
    let huge = root.find("memoryBacking/hugepages").is_some() || root.find("devices/memory/source/pagesize").is_some();
    if (placement.ram.is_some() || huge) && remove_memory_backing(&mut root) {
        findings.push(findings::warning(
            "memory",
            "the guest's memory backing (hugepages, file, memfd, locked or allocated at once) is left out until the \
             guest is started anew, because its memory comes from the standby's RAM image",
            "shut the guest down and start it when there is time for it, if it needs that backing",
        ));
    }
    if let Some((image, bytes)) = placement.ram {
        if root.attribute_at("devices/memballoon", "freePageReporting") == Some("on") {
            findings.push(findings::warning(
                "memory balloon",
                "memory that the guest reports as free stays with it until it is started anew: the RAM image must not change \
                 (QEMU's log says \"Discarding RAM with readonly files is not supported\" each time)",
                "",
            ));
        }
        // QEMU opens the image read-only, so that nothing the guest does can change it: not even a discard (a balloon, free
        // page reporting), which on a writable private mapping would punch a hole into the file itself.
        let object = format!(
            "memory-backend-file,id={RAM_BACKEND},size={bytes},mem-path={},share=off,readonly=on,rom=off,\
             x-use-canonical-path-for-ramblock-id=off",
            utf8(image)?.replace(',', ",,")
        );
        let machine = format!("memory-backend={RAM_BACKEND}");
        domain_xml::add_qemu_arguments(&mut root, &["-object", &object, "-machine", &machine]);
    }
    Ok(Transformed { restore: root, persistent, findings })
}

/// Whether a QEMU argument is one that an earlier activation added.
fn is_ram_argument(option: &str, value: &str) -> bool {
    match option {
        "-machine" => value == format!("memory-backend={RAM_BACKEND}"),
        "-object" => value.starts_with(&format!("memory-backend-file,id={RAM_BACKEND},")),
        _ => false,
    }
}

/// A guest that was activated before has the arguments of that activation.
fn remove_ram_arguments(root: &mut Element) {
    let arguments = domain_xml::qemu_arguments(root);
    let Some(line) = root.find_mut(COMMAND_LINE) else { return };
    let mut at = 0;
    let mut gone = vec![false; arguments.len()];
    while at + 1 < arguments.len() {
        if is_ram_argument(&arguments[at], &arguments[at + 1]) {
            gone[at..at + 2].fill(true);
            at += 1;
        }
        at += 1;
    }
    let mut index = 0;
    line.remove_where(|e| {
        if e.name != "qemu:arg" || e.attribute("value").is_none() {
            return false;
        }
        index += 1;
        gone[index - 1]
    });
    if root.find(COMMAND_LINE).is_some_and(|line| line.elements().next().is_none()) {
        root.remove_all(COMMAND_LINE);
    }
}

/// What says on which CPUs and nodes of the old host the guest ran, and under which labels.
fn remove_host_bindings(root: &mut Element, findings: &mut Vec<Finding>) {
    root.remove_where(|e| e.name == "seclabel" && e.attribute("type") == Some("dynamic"));
    let mut pinned = root.remove_all("numatune");
    for vcpu in root.find_all_mut("vcpu") {
        pinned += usize::from(vcpu.remove_attribute("cpuset").is_some());
    }
    if let Some(tune) = root.find_mut("cputune") {
        pinned += tune.remove_where(|e| {
            matches!(
                e.name.as_str(),
                "vcpupin" | "emulatorpin" | "iothreadpin" | "vcpusched" | "iothreadsched" | "emulatorsched"
            ) || matches!(e.name.as_str(), "cachetune" | "memorytune")
        });
        if tune.elements().next().is_none() {
            root.remove_all("cputune");
        }
    }
    if pinned > 0 {
        findings.push(findings::warning(
            "CPU pinning",
            "the guest was bound to CPUs or memory nodes of the old host; that is left out",
            "bind it to this host's CPUs afterwards with `virsh vcpupin`, if it needs that",
        ));
    }
}

/// Keeps only whether KSM may merge the guest's pages, which says nothing about where they come from.
fn remove_memory_backing(root: &mut Element) -> bool {
    let mut changed = false;
    for source in root.find_all_mut("devices/memory/source") {
        changed |= source.remove_all("pagesize") > 0;
    }
    let Some(backing) = root.find_mut("memoryBacking") else { return changed };
    changed |= backing.remove_where(|e| !matches!(e.name.as_str(), "nosharepages" | "discard")) > 0;
    if backing.elements().next().is_none() {
        root.remove_all("memoryBacking");
    }
    changed
}

/// Where QEMU keeps the UEFI variables. The template stays: it is for resetting them.
fn place_variables(root: &mut Element, file: &Path) -> Result<(), TransformError> {
    let Some(nvram) = root.find_mut("os/nvram") else { return Ok(()) };
    nvram.remove_attribute("type");
    nvram.set_text(utf8(file)?);
    Ok(())
}

/// Model, address and MAC stay: the guest sees the NIC it had. Where the plan has placed it, it says all about the port.
fn place_nic(interface: &mut Element, mapping: &Mapping, host: &dyn Host) {
    let kind = interface.attribute("type").unwrap_or_default().to_owned();
    let mac = interface.attribute_at("mac", "address").map(str::to_owned);
    let placed = mapping.place(&kind, mac.as_deref(), source_of(interface).unwrap_or_default());
    if placed.said.is_none() {
        if kind == "bridge" && !placed.source.is_empty() {
            interface.find_all_mut("source").into_iter().for_each(|s| s.set_attribute("bridge", placed.source.clone()));
        }
        return;
    }
    if placed.kind != kind {
        // Of another kind of port: the profile of a switch, the device of a macvtap, who sets up a tap.
        interface.remove_where(|e| matches!(e.name.as_str(), "virtualport" | "target" | "script" | "backend"));
        interface.set_attribute("type", placed.kind.clone());
    }
    if host.exists(&Path::new("/sys/class/net").join(&placed.source).join("bridge")) {
        // A bridge of the kernel's takes no profile of another switch.
        interface.remove_where(|e| e.name == "virtualport");
    }
    interface.remove_where(|e| matches!(e.name.as_str(), "source" | "vlan"));
    interface.push(Element::new("source").with_attribute(&placed.kind, placed.source.clone()));
    if let Some(vlan) = placed.vlan {
        let tag = Element::new("tag").with_attribute("id", vlan.to_string());
        interface.push(Element::new("vlan").with_child(tag));
    }
}

/// A console that listened on an address of the old host is reachable from this host alone.
fn listen_here(graphics: &mut Element, host: &dyn Host, findings: &mut Vec<Finding>) {
    const LOOPBACK: &str = "127.0.0.1";
    let is_foreign = |address: &str| address.parse().is_ok_and(|a: IpAddr| !host.is_local_address(a));
    let mut foreign = None;
    if let Some(address) = graphics.attribute("listen").filter(|a| is_foreign(a)).map(str::to_owned) {
        graphics.set_attribute("listen", LOOPBACK);
        foreign = Some(address);
    }
    for listen in graphics.find_all_mut("listen") {
        if let Some(address) = listen.attribute("address").filter(|a| is_foreign(a)).map(str::to_owned) {
            listen.set_attribute("address", LOOPBACK);
            foreign = Some(address);
        }
    }
    if let Some(address) = foreign {
        findings.push(findings::warning(
            "graphics",
            &format!(
                "the console listened on {address}, which is no address of this host; it will listen on {LOOPBACK}"
            ),
            "",
        ));
    }
}

fn place_disk(
    disk: &mut Element,
    placement: &Placement<'_>,
    host: &dyn Host,
    findings: &mut Vec<Finding>,
) -> Result<(), TransformError> {
    let target = disk.attribute_at("target", "dev").unwrap_or_default().to_owned();
    let device = disk.attribute("device").unwrap_or("disk").to_owned();
    let removable = matches!(device.as_str(), "cdrom" | "floppy");
    disk.remove_where(|e| matches!(e.name.as_str(), "mirror" | "backingStore"));
    if let Some(placed) = placement.disks.iter().find(|d| d.target == target) {
        return point_at_overlay(disk, placed);
    }
    let Some(path) = medium(disk) else {
        if !removable && disk.find("source").is_some() {
            findings.push(not_in_standby(&target, "is not a local file"));
        }
        return Ok(());
    };
    if host.exists(Path::new(&path)) {
        if !removable && disk.find("readonly").is_none() {
            findings.push(not_in_standby(&target, "can be written"));
        }
        return Ok(());
    }
    if removable {
        disk.remove_all("source");
        findings.push(findings::warning(
            &format!("drive {target}"),
            &format!("its medium {path} is not on this host: the drive will be empty"),
            "put the file there before, or insert it afterwards with `virsh change-media`",
        ));
    } else {
        findings.push(findings::refused(
            &format!("disk {target}"),
            &format!("its read-only image {path} is not replicated and not on this host"),
            "copy the file to the same place on this host",
        ));
    }
    Ok(())
}

fn not_in_standby(target: &str, how: &str) -> Finding {
    findings::refused(
        &format!("disk {target}"),
        &format!("the standby has no image of it, but it {how}"),
        "protect the guest again, so that all its disks are replicated",
    )
}

/// The path of what is in a drive, or of a disk.
fn medium(disk: &Element) -> Option<String> {
    let source = disk.find("source")?;
    match disk.attribute("type").unwrap_or("file") {
        "file" => source.attribute("file"),
        "block" => source.attribute("dev"),
        _ => None,
    }
    .filter(|p| !p.is_empty())
    .map(str::to_owned)
}

/// Model, serial number, WWN, address and boot order stay: the guest sees the disk it had.
fn point_at_overlay(disk: &mut Element, placed: &PlacedDisk) -> Result<(), TransformError> {
    disk.set_attribute("type", "file");
    for host_only in ["rawio", "sgio", "snapshot"] {
        disk.remove_attribute(host_only);
    }
    disk.remove_where(|e| matches!(e.name.as_str(), "source" | "encryption" | "auth" | "transient"));
    let driver = disk.ensure("driver");
    driver.set_attribute("name", "qemu");
    driver.set_attribute("type", "qcow2");
    let base = Element::new("backingStore")
        .with_attribute("type", "file")
        .with_child(Element::new("format").with_attribute("type", "raw"))
        .with_child(Element::new("source").with_attribute("file", utf8(&placed.base)?))
        // Empty: the chain ends here, libvirt need not look into a guest's disk to find out.
        .with_child(Element::new("backingStore"));
    disk.push(Element::new("source").with_attribute("file", utf8(&placed.overlay)?));
    disk.push(base);
    Ok(())
}

fn utf8(path: &Path) -> Result<&str, TransformError> {
    path.to_str().ok_or_else(|| TransformError::Path(path.to_owned()))
}

#[cfg(test)]
mod tests;
