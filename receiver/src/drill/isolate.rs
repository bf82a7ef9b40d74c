//! Cuts a definition off from everything outside: what an activation would start becomes what a drill may start.
//!
//! The guest finds the devices that it had, network cards and their addresses included; behind them there is nothing that
//! leads out of the drill. This is an **allowlist** too: a device of which it is not known that it stays inside refuses the drill, by
//! name.

use uuid::Uuid;
use vmdr_hypervisor::domain_xml;
use vmdr_hypervisor::xml::Element;

use super::net::{BRIDGES_MAX, bridge_names};
use crate::activate::xml::RAM_BACKEND;

/// Devices that consist of nothing but QEMU.
const INSIDE: [&str; 12] = [
    "emulator",
    "controller",
    "input",
    "video",
    "memballoon",
    "watchdog",
    "panic",
    "sound",
    "iommu",
    "hub",
    "crypto",
    "redirfilter",
];
/// What a definition has beside devices, and the copy too: what the machine is, and what it gets of this host.
const MACHINE: [&str; 32] = [
    "name",
    "uuid",
    "genid",
    "maxMemory",
    "memory",
    "currentMemory",
    "memoryBacking",
    "memtune",
    "blkiotune",
    "numatune",
    "vcpu",
    "vcpus",
    "iothreads",
    "iothreadids",
    "defaultiothread",
    "cputune",
    "throttlegroups",
    "sysinfo",
    "os",
    "features",
    "cpu",
    "clock",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_lockfailure",
    "pm",
    "perf",
    "devices",
    "qemu:commandline",
    "qemu:capabilities",
    "qemu:deprecation",
];
/// What is said of the domain, or ties it to others on this host: the copy goes without it.
const LEFT_OUT: [&str; 5] = ["title", "description", "metadata", "resource", "seclabel"];
/// QEMU's own options that reach nothing.
const OPTIONS: [&str; 7] = ["-cpu", "-global", "-machine", "-smbios", "-rtc", "-accel", "-icount"];
/// What a network card is to the guest; the rest is where its frames go.
const CARD: [&str; 10] = ["mac", "model", "driver", "address", "alias", "boot", "mtu", "link", "rom", "acpi"];

/// Who the copy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The drill's.
    pub id: String,
    /// Name of its domain.
    pub name: String,
    /// The same.
    pub uuid: Uuid,
}

/// What the copy has to do with the outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Isolated {
    /// The bridges that it needs, one for each network that the guest is in.
    pub bridges: Vec<String>,
    /// The MAC addresses of its cards.
    pub macs: Vec<String>,
}

/// Changes the definition that an activation would restore from. An error: what of it cannot be cut off.
pub fn isolate(root: &mut Element, identity: &Identity) -> Result<Isolated, Vec<String>> {
    let mut refused = Vec::new();
    domain_xml::remove_own_qmp_socket(root);
    arguments(root, &mut refused);
    rename(root, identity);
    root.remove_where(|e| LEFT_OUT.contains(&e.name.as_str()));
    for element in root.elements().filter(|e| !MACHINE.contains(&e.name.as_str())) {
        refused.push(format!("<{}>", element.name));
    }
    if !root.find_all("qemu:commandline/qemu:env").is_empty() {
        refused.push("an environment variable of QEMU's".to_owned());
    }
    // A copy that resets has not come up.
    for event in ["on_crash", "on_reboot"] {
        root.ensure(event).set_text("destroy");
    }
    if let Some(element) = root.find_mut("on_lockfailure") {
        element.set_text("poweroff");
    }
    let mut isolated = Isolated::default();
    let mut networks: Vec<(String, String)> = Vec::new();
    for devices in root.find_all_mut("devices") {
        devices.remove_where(|e| e.name == "graphics" && !matches!(e.attribute("type"), Some("vnc" | "spice")));
        for device in devices.elements_mut() {
            match device.name.clone().as_str() {
                "interface" => card(device, identity, &mut networks, &mut isolated, &mut refused),
                "disk" => drive(device, &mut refused),
                "serial" | "parallel" | "console" | "channel" => line(device, &mut refused),
                "graphics" => screen(device),
                "rng" => allow(device, "backend", "model", &["random", "builtin"], &mut refused),
                "memory" => allow(device, "", "model", &["dimm"], &mut refused),
                "redirdev" | "smartcard" => allow(device, "", "type", &["spicevmc"], &mut refused),
                "audio" => mute(device),
                other if INSIDE.contains(&other) => {
                    if other == "watchdog" && device.attribute("action") == Some("dump") {
                        // Into a file of this host's, as large as the guest's RAM.
                        device.set_attribute("action", "poweroff");
                    }
                    if matches!(device.attribute("type"), Some("passthrough" | "evdev")) {
                        refused.push(format!("a device of the host ({other})"));
                    }
                }
                other => refused.push(format!("a device <{other}>")),
            }
        }
    }
    isolated.bridges = bridge_names(&identity.id, networks.len());
    if networks.len() > BRIDGES_MAX {
        refused.push(format!("{} networks: a drill has at most {BRIDGES_MAX}", networks.len()));
    }
    if refused.is_empty() { Ok(isolated) } else { Err(refused) }
}

/// Another domain to libvirt, the same machine to the guest.
fn rename(root: &mut Element, identity: &Identity) {
    let was = root.text_at("uuid");
    let is_pc = root.attribute_at("os/type", "arch").is_some_and(|arch| arch.contains("86"));
    if let Some(name) = root.find_mut("name") {
        name.set_text(identity.name.clone());
    }
    root.ensure("uuid").set_text(identity.uuid.to_string());
    for system in root.find_all_mut("sysinfo/system") {
        // libvirt wants it to be the domain's.
        system.remove_where(|e| e.name == "entry" && e.attribute("name") == Some("uuid"));
    }
    // What the guest has read is in its memory; this is for when it boots anew.
    if let Some(was) = was.filter(|was| is_pc && Uuid::parse_str(was).is_ok()) {
        domain_xml::add_qemu_arguments(root, &["-smbios", &format!("type=1,uuid={}", was.trim())]);
    }
}

/// What else is on QEMU's command line.
fn arguments(root: &Element, refused: &mut Vec<String>) {
    let arguments = domain_xml::qemu_arguments(root);
    let mut words = arguments.iter();
    while let Some(option) = words.next() {
        let option = option.replacen("--", "-", 1);
        let value = words.next().map(String::as_str).unwrap_or_default();
        let ram = value.starts_with(&format!("memory-backend-file,id={RAM_BACKEND},"));
        let inside = match option.as_str() {
            "-object" => ram,
            "-set" => value.starts_with("device."),
            option => OPTIONS.contains(&option),
        };
        if !inside {
            refused.push(format!("QEMU's argument {option} {value}"));
        }
    }
}

fn card(
    card: &mut Element,
    identity: &Identity,
    networks: &mut Vec<(String, String)>,
    isolated: &mut Isolated,
    refused: &mut Vec<String>,
) {
    let kind = card.attribute("type").unwrap_or_default().to_owned();
    if !matches!(kind.as_str(), "bridge" | "network" | "direct" | "user" | "ethernet" | "internal") {
        refused.push(format!("a network card of type {kind}"));
        return;
    }
    let source = card.find("source").and_then(|source| {
        ["bridge", "network", "dev", "name"].iter().find_map(|name| source.attribute(name)).map(str::to_owned)
    });
    let network = (kind, source.unwrap_or_default());
    let number = networks.iter().position(|known| *known == network).unwrap_or_else(|| {
        networks.push(network);
        networks.len() - 1
    });
    isolated.macs.extend(card.attribute_at("mac", "address").map(str::to_owned));
    card.remove_where(|e| !CARD.contains(&e.name.as_str()));
    card.remove_attribute("managed");
    card.remove_attribute("trustGuestRxFilters");
    card.set_attribute("type", "bridge");
    let bridge = bridge_names(&identity.id, number + 1).pop().unwrap_or_default();
    card.push(Element::new("source").with_attribute("bridge", bridge));
}

/// Disks are overlays over the copy already; what else a drive has in it is a file that is only read, or nothing.
fn drive(disk: &mut Element, refused: &mut Vec<String>) {
    let device = disk.attribute("device").unwrap_or("disk").to_owned();
    let target = disk.attribute_at("target", "dev").unwrap_or_default().to_owned();
    let is_file = disk.attribute("type").unwrap_or("file") == "file";
    let read_only = device == "cdrom" || disk.find("readonly").is_some();
    match device.as_str() {
        "cdrom" | "floppy" if !(is_file && read_only) => {
            disk.set_attribute("type", "file");
            disk.remove_all("source");
        }
        "cdrom" | "floppy" => {}
        "disk" if is_file => {}
        _ => refused.push(format!("drive {target}, which is no file")),
    }
}

/// A serial line or a channel ends at this host, at nobody.
fn line(line: &mut Element, refused: &mut Vec<String>) {
    let to_tools = line.name == "channel" && line.attribute_at("target", "type") == Some("virtio");
    if line.attribute_at("target", "type") == Some("guestfwd") {
        refused.push("a channel of type guestfwd".to_owned());
    }
    let kind = match line.attribute("type").unwrap_or_default() {
        kind @ ("spicevmc" | "qemu-vdagent" | "null") => kind.to_owned(),
        // libvirt makes up a path of the copy's own.
        "unix" if to_tools => "unix".to_owned(),
        _ => "pty".to_owned(),
    };
    line.set_attribute("type", kind);
    line.remove_attribute("tty");
    line.remove_where(|e| matches!(e.name.as_str(), "source" | "log" | "protocol" | "reconnect"));
}

fn screen(graphics: &mut Element) {
    for name in ["port", "tlsPort", "websocket", "socket", "sharePolicy", "defaultMode", "autoport", "listen"] {
        graphics.remove_attribute(name);
    }
    graphics.remove_where(|e| matches!(e.name.as_str(), "listen" | "channel" | "gl"));
    // libvirt makes up a path; a port could be one that the guest of an activation needs.
    graphics.push(Element::new("listen").with_attribute("type", "socket"));
}

fn mute(audio: &mut Element) {
    if audio.attribute("type") != Some("spice") {
        audio.set_attribute("type", "none");
        audio.remove_where(|_| true);
    }
}

/// `path` empty: the device itself.
fn allow(device: &Element, path: &str, attribute: &str, words: &[&str], refused: &mut Vec<String>) {
    let found = if path.is_empty() { device.attribute(attribute) } else { device.attribute_at(path, attribute) };
    if !found.is_some_and(|found| words.contains(&found)) {
        refused.push(format!("a device <{}> with {attribute} {:?}", device.name, found.unwrap_or_default()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "4558469e-4501-400c-b892-00faab0db21d";

    fn identity() -> Identity {
        Identity { id: "0a0b0c".to_owned(), name: "web1-drill-0a0b0c".to_owned(), uuid: Uuid::from_u128(9) }
    }

    fn domain(devices: &str) -> String {
        format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web1</name><uuid>{OLD}</uuid>\
             <sysinfo type='smbios'><system><entry name='uuid'>{OLD}</entry><entry name='serial'>S</entry></system></sysinfo>\
             <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os><on_crash>restart</on_crash>\
             <devices>{devices}</devices><qemu:commandline><qemu:arg value='-qmp'/>\
             <qemu:arg value='unix:/var/lib/libvirt/qemu/vmdr-{OLD}.qmp,server=on,wait=off'/></qemu:commandline></domain>"
        )
    }

    fn made(devices: &str) -> (Element, Isolated) {
        let mut root = Element::parse(&domain(devices)).unwrap();
        let isolated = isolate(&mut root, &identity()).unwrap();
        (root, isolated)
    }

    #[test]
    fn it_is_another_domain_and_the_same_machine() {
        let (root, _) = made("");
        assert_eq!(root.text_at("name").as_deref(), Some("web1-drill-0a0b0c"));
        assert_eq!(root.text_at("uuid"), Some(Uuid::from_u128(9).to_string()));
        assert_eq!(root.text_at("on_crash").as_deref(), Some("destroy"));
        assert_eq!(root.text_at("on_reboot").as_deref(), Some("destroy"));
        assert_eq!(root.find_all("sysinfo/system/entry").len(), 1, "its serial number stays");
        assert_eq!(domain_xml::qemu_arguments(&root), ["-smbios".to_owned(), format!("type=1,uuid={OLD}")]);
    }

    #[test]
    fn nothing_ties_it_to_this_host() {
        let ties = "<metadata><x/></metadata><title>t</title><resource><partition>/p</partition></resource>\
                    <seclabel type='static'/></domain>";
        let text = domain("<watchdog model='itco' action='dump'/>").replace("</domain>", ties);
        let mut root = Element::parse(&text).unwrap();
        isolate(&mut root, &identity()).unwrap();
        assert!(LEFT_OUT.iter().all(|name| root.find(name).is_none()));
        assert_eq!(root.attribute_at("devices/watchdog", "action"), Some("poweroff"));
    }

    #[test]
    fn cards_keep_what_the_guest_sees_and_end_at_bridges_of_the_drill() {
        let card = |kind: &str, source: &str, mac: u8| {
            format!(
                "<interface type='{kind}'><mac address='52:54:00:00:00:0{mac}'/><source {source}/><model type='virtio'/>\
                 <target dev='web'/><virtualport type='openvswitch'/><vlan><tag id='7'/></vlan><filterref filter='x'/>\
                 <script path='/etc/up'/><address type='pci' slot='0x0{mac}'/></interface>"
            )
        };
        let cards = [
            card("bridge", "bridge='br0'", 1),
            card("network", "network='default'", 2),
            card("bridge", "bridge='br0'", 3),
            card("direct", "dev='eth0' mode='bridge'", 4),
            card("user", "x='y'", 5),
        ];
        let (root, isolated) = made(&cards.concat());
        assert_eq!(isolated.bridges, ["vmdr-d0a0b0c0", "vmdr-d0a0b0c1", "vmdr-d0a0b0c2", "vmdr-d0a0b0c3"]);
        assert_eq!(isolated.macs.len(), 5);
        let cards = root.find_all("devices/interface");
        let bridges: Vec<_> = cards.iter().filter_map(|card| card.attribute_at("source", "bridge")).collect();
        assert_eq!(bridges, ["vmdr-d0a0b0c0", "vmdr-d0a0b0c1", "vmdr-d0a0b0c0", "vmdr-d0a0b0c2", "vmdr-d0a0b0c3"]);
        for card in cards {
            let names: Vec<_> = card.elements().map(|e| e.name.as_str()).collect();
            assert_eq!(names, ["mac", "model", "address", "source"]);
            assert_eq!(card.attribute("type"), Some("bridge"));
        }
    }

    #[test]
    fn lines_and_drives_lead_nowhere() {
        let (root, _) = made(
            "<serial type='file'><source path='/var/log/x.log'/><log file='/var/log/y'/></serial>\
             <serial type='tcp'><source mode='connect' host='10.0.0.1' service='99'/><protocol type='raw'/></serial>\
             <channel type='unix'><source mode='bind' path='/run/x'/><target type='virtio' name='org.vmdr.guest.0'/></channel>\
             <disk type='network' device='cdrom'><source protocol='http' name='x'><host name='h'/></source><target dev='sda'/></disk>\
             <disk type='file' device='cdrom'><source file='/iso'/><target dev='sdb'/><readonly/></disk>\
             <disk type='file' device='floppy'><source file='/fd'/><target dev='fda'/></disk>\
             <graphics type='vnc' port='5900' listen='0.0.0.0'><listen type='address' address='0.0.0.0'/></graphics>\
             <graphics type='sdl'/>",
        );
        for serial in root.find_all("devices/serial") {
            assert_eq!((serial.attribute("type"), serial.elements().count()), (Some("pty"), 0));
        }
        let channel = root.find("devices/channel").unwrap();
        assert_eq!((channel.attribute("type"), channel.find("source")), (Some("unix"), None));
        let sources: Vec<_> = root.find_all("devices/disk/source");
        assert_eq!((sources.len(), sources[0].attribute("file")), (1, Some("/iso")));
        let screens = root.find_all("devices/graphics");
        assert_eq!((screens.len(), screens[0].attribute("port")), (1, None));
        assert_eq!((screens[0].attribute("listen"), screens[0].attribute("autoport")), (None, None));
        assert_eq!((screens[0].elements().count(), screens[0].attribute_at("listen", "type")), (1, Some("socket")));
    }

    #[test]
    fn what_is_not_known_to_stay_inside_refuses_the_drill() {
        for (devices, what) in [
            ("<hostdev mode='subsystem' type='pci'/>", "<hostdev>"),
            ("<filesystem type='mount'/>", "<filesystem>"),
            ("<vsock model='virtio'/>", "<vsock>"),
            ("<shmem name='x'/>", "<shmem>"),
            ("<tpm model='tpm-tis'/>", "<tpm>"),
            ("<lease/>", "<lease>"),
            ("<interface type='vhostuser'/>", "type vhostuser"),
            ("<interface type='vdpa'/>", "type vdpa"),
            ("<disk type='block' device='lun'><target dev='sda'/></disk>", "drive sda"),
            ("<disk type='network'><target dev='vdb'/></disk>", "drive vdb"),
            ("<rng><backend model='egd'/></rng>", "egd"),
            ("<memory model='nvdimm'/>", "nvdimm"),
            ("<input type='evdev'/>", "of the host"),
            ("<redirdev type='tcp'/>", "tcp"),
            ("<channel type='unix'><target type='guestfwd'/></channel>", "guestfwd"),
        ] {
            let mut root = Element::parse(&domain(devices)).unwrap();
            let refused = isolate(&mut root, &identity()).unwrap_err();
            assert!(refused.len() == 1 && refused[0].contains(what), "{devices}: {refused:?}");
        }
        for (element, what) in [
            ("<qemu:override/>", "<qemu:override>"),
            ("<qemu:env name='A' value='b'/>", "environment"),
            ("<launchSecurity type='sev'/>", "<launchSecurity>"),
        ] {
            let place = if what == "environment" { "<qemu:commandline>" } else { "</devices>" };
            let text = domain("").replace(place, &format!("{place}{element}"));
            let refused = isolate(&mut Element::parse(&text).unwrap(), &identity()).unwrap_err();
            assert!(refused.len() == 1 && refused[0].contains(what), "{element}: {refused:?}");
        }
        let mut root = Element::parse(&domain("")).unwrap();
        domain_xml::add_qemu_arguments(&mut root, &["-cpu", "max", "-netdev", "user,id=n", "-object", "rng-egd,id=r"]);
        let refused = isolate(&mut root, &identity()).unwrap_err();
        assert_eq!(refused.len(), 2, "{refused:?}");
    }
}
