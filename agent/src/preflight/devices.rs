//! The allowlist of devices, over the domain definition.
//!
//! An allowlist, not a blocklist. Devices that write guest memory through another mapping than QEMU's (VFIO, vhost-user,
//! virtiofs, vdpa) are invisible to the dirty log, devices with state outside of QEMU (TPM, passed-through USB) would be
//! lost, and what has a setup phase is silently left out of the device state. Nothing of that fails by itself: the guest
//! would just be wrong on the day it is needed. So what is not listed here is refused, by name.

use vmdr_hypervisor::domain_xml::{Device, DomainXml};

use super::{Finding, HostFacts};

/// Remedy where a device has to go.
const REMOVE: &str = "remove the device from the domain, or do not protect it";

/// What is thought of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// Known to be carried.
    Fine,
    /// Known to be carried, and the operator should know something.
    Note { fact: String, remedy: String },
    /// Not carried.
    Refused { fact: String, remedy: String },
}

use Verdict::Fine;

fn refuse(fact: impl Into<String>, remedy: impl Into<String>) -> Verdict {
    Verdict::Refused { fact: fact.into(), remedy: remedy.into() }
}

fn note(fact: impl Into<String>, remedy: impl Into<String>) -> Verdict {
    Verdict::Note { fact: fact.into(), remedy: remedy.into() }
}

/// Judges every device of a definition. Disks' contents are judged elsewhere ([`super::disks`]).
pub fn devices(domain: &DomainXml, host: &HostFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for device in &domain.devices {
        match judge(device, host) {
            Fine => {}
            Verdict::Note { fact, remedy } => findings.push(Finding::warning(subject(device), fact, remedy)),
            Verdict::Refused { fact, remedy } => findings.push(Finding::refused(subject(device), fact, remedy)),
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("devices", format!("all {} are of models that vmdr carries", domain.devices.len())));
    }
    findings
}

/// `interface e1000 (net0)`.
fn subject(device: &Device) -> String {
    let mut subject = device.kind.clone();
    if !device.model.is_empty() {
        subject = format!("{subject} {}", device.model);
    }
    let name = match device.kind.as_str() {
        "disk" => device.element.attribute_at("target", "dev"),
        _ => device.alias.as_deref(),
    };
    name.map_or(subject.clone(), |name| format!("{subject} ({name})"))
}

fn judge(device: &Device, host: &HostFacts) -> Verdict {
    let kind = device.element.attribute("type").unwrap_or_default();
    match device.kind.as_str() {
        "disk" => disk(device, kind),
        "controller" => controller(device, kind),
        "interface" => interface(device, kind, host),
        "video" => video(device),
        "graphics" => graphics(kind),
        "audio" => audio(kind),
        "input" => input(device, kind),
        "serial" | "parallel" | "console" | "channel" => character(device, kind),
        "sound" => listed(device, &["ich6", "ich9", "ac97", "es1370", "sb16", "pcspk"]),
        "rng" => listed(device, &["virtio", "virtio-transitional", "virtio-non-transitional"]),
        "memballoon" => listed(device, &["virtio", "virtio-transitional", "virtio-non-transitional", "none"]),
        "watchdog" => listed(device, &["i6300esb", "itco", "ib700"]),
        "panic" => listed(device, &["isa", "pvpanic", "hyperv"]),
        "hub" => listed(device, &["usb"]),
        "hostdev" => refuse(
            format!("a device of the host is passed through ({kind}): it writes guest memory past the dirty log"),
            "detach it (virsh detach-device) and use an emulated or virtio device",
        ),
        "tpm" => refuse(
            "the TPM's state is kept outside of QEMU and would not reach the backup site",
            "remove the TPM from the domain if the guest can do without",
        ),
        "filesystem" => refuse(
            "a directory of the host is shared with the guest; its files and open handles would not reach the backup site",
            "give the guest a disk, or mount the directory over the network",
        ),
        "shmem" => refuse(
            "memory is shared with other processes, which write it past the dirty log",
            "remove the shmem device from the domain",
        ),
        // DIMMs are RAM blocks like any other. The others change behind the dirty log's back, or are files.
        "memory" if device.model == "dimm" => Fine,
        "memory" => refuse(
            format!("memory devices of model {} are not carried", device.model),
            "give the guest its memory with <memory>, or with devices of model dimm",
        ),
        "redirdev" | "redirfilter" => refuse(
            "a USB device of the client's is redirected: its state would not reach the backup site",
            "remove the redirdev devices from the domain",
        ),
        "smartcard" => refuse("a smart card is passed through or redirected", REMOVE),
        "iommu" => refuse(format!("a virtual IOMMU ({}) is not on the list", device.model), REMOVE),
        "vsock" => refuse("vhost-vsock keeps its connections in this host's kernel", REMOVE),
        "lease" => refuse(
            "a lock manager keeps a lease, which libvirt gives up at every pause",
            "remove the lease from the domain, and the lock manager from qemu.conf",
        ),
        "pstore" => refuse("its content is a file on this host that is not mirrored", REMOVE),
        "crypto" => refuse("QEMU cannot save the state of a virtio crypto device", REMOVE),
        other => refuse(format!("<{other}> is a device that vmdr does not know"), REMOVE),
    }
}

/// Fine if its model is on the list. A live definition always names the model.
fn listed(device: &Device, models: &[&str]) -> Verdict {
    if models.contains(&device.model.as_str()) {
        return Fine;
    }
    let model = if device.model.is_empty() { "without a model" } else { device.model.as_str() };
    refuse(
        format!("a {} {model} is not on the list of devices that vmdr carries", device.kind),
        format!("use one of {}", models.join(", ")),
    )
}

fn disk(device: &Device, kind: &str) -> Verdict {
    if let "vhostuser" | "vhostvdpa" = kind {
        return refuse(
            format!("its data path is outside of QEMU ({kind}): guest memory is written past the dirty log"),
            "use virtio with a file, block or network source",
        );
    }
    if kind == "nvme" {
        return refuse("it is an NVMe controller taken over by QEMU through VFIO", "use the block device instead");
    }
    if device.element.attribute("device") == Some("lun") {
        return refuse("it passes SCSI commands to the host's device, past the mirror", "use device='disk'");
    }
    let bus = device.element.attribute_at("target", "bus").unwrap_or_default();
    let models = ["", "virtio", "virtio-transitional", "virtio-non-transitional"];
    let model = device.element.attribute("model").unwrap_or_default();
    if !matches!(bus, "virtio" | "scsi" | "sata" | "ide" | "usb" | "fdc") || !models.contains(&model) {
        return refuse(format!("bus {bus} {model} is not on the list"), "use virtio, scsi, sata, ide or usb");
    }
    Fine
}

fn controller(device: &Device, kind: &str) -> Verdict {
    let model = device.element.attribute("model").unwrap_or_default();
    let models: &[&str] = match kind {
        "pci" => &[
            "pci-root",
            "pcie-root",
            "pci-bridge",
            "pcie-to-pci-bridge",
            "dmi-to-pci-bridge",
            "pcie-root-port",
            "pcie-switch-upstream-port",
            "pcie-switch-downstream-port",
        ],
        "ide" => &["", "piix3", "piix4"],
        "sata" | "fdc" | "isa" => &[""],
        "scsi" => &["virtio-scsi", "virtio-transitional", "virtio-non-transitional", "lsilogic"],
        "virtio-serial" => &["", "virtio", "virtio-transitional", "virtio-non-transitional"],
        "usb" => &[
            "none",
            "qemu-xhci",
            "nec-xhci",
            "piix3-uhci",
            "piix4-uhci",
            "ehci",
            "ich9-ehci1",
            "ich9-uhci1",
            "ich9-uhci2",
            "ich9-uhci3",
            "ich9-uhci4",
            "ich9-uhci5",
            "ich9-uhci6",
            "pci-ohci",
        ],
        other => return refuse(format!("a controller of type {other} is not on the list"), REMOVE),
    };
    if models.contains(&model) {
        return Fine;
    }
    let named: Vec<&str> = models.iter().copied().filter(|m| !m.is_empty()).collect();
    let remedy = if named.is_empty() { REMOVE.to_owned() } else { format!("use one of {}", named.join(", ")) };
    refuse(format!("a {kind} controller of model {model:?} is not on the list"), remedy)
}

fn interface(device: &Device, kind: &str, host: &HostFacts) -> Verdict {
    match kind {
        "hostdev" => {
            return refuse(
                "a network device of the host is passed through: it writes guest memory past the dirty log",
                "use an interface of type bridge or network with model virtio",
            );
        }
        "vhostuser" | "vdpa" => {
            return refuse(
                format!("its data path is outside of QEMU ({kind}): guest memory is written past the dirty log"),
                "use an interface of type bridge or network with model virtio",
            );
        }
        "bridge" | "network" | "direct" | "ethernet" | "user" | "udp" | "client" | "server" | "mcast" | "null" => {}
        other => {
            return refuse(format!("an interface of type {other} is not on the list"), "use type bridge or network");
        }
    }
    if device.element.find("teaming").is_some() {
        return refuse("it is half of a failover pair whose other half is passed through", "remove <teaming>");
    }
    let virtio = matches!(device.model.as_str(), "virtio" | "virtio-transitional" | "virtio-non-transitional");
    let driver = device.element.attribute_at("driver", "name");
    let tap = matches!(kind, "bridge" | "network" | "direct" | "ethernet");
    // vhost writes guest memory through QEMU's own page tables (its worker shares QEMU's address space), so that the dirty
    // log sees it, and it stops before `stop` returns. Whoever asks for it by name should know what else it means.
    if virtio && tap && driver == Some("vhost") && !host.vhost_net {
        return note(
            "asks for vhost, but this host has no /dev/vhost-net",
            "load vhost_net, or remove <driver name='vhost'/>",
        );
    }
    match listed(device, &["virtio", "virtio-transitional", "virtio-non-transitional", "e1000", "e1000e", "rtl8139"]) {
        Fine if kind == "user" => note(
            "connections of a user-mode network end with QEMU: they do not survive an activation",
            "use type bridge or network where connections should survive",
        ),
        verdict => verdict,
    }
}

fn video(device: &Device) -> Verdict {
    let model = device.element.find("model");
    if device.element.attribute_at("model/acceleration", "accel3d") == Some("yes") {
        return refuse("3D acceleration keeps its state in the host's graphics driver", "set accel3d='no'");
    }
    if model.and_then(|m| m.attribute("blob")) == Some("on") {
        return refuse("blob resources of virtio-gpu cannot be saved", "set blob='off'");
    }
    if device.element.attribute_at("driver", "name") == Some("vhostuser") {
        return refuse("its data path is outside of QEMU (vhostuser)", "remove <driver name='vhostuser'/>");
    }
    listed(device, &["vga", "cirrus", "bochs", "virtio", "ramfb", "none"])
}

fn graphics(kind: &str) -> Verdict {
    match kind {
        "vnc" => Fine,
        "spice" => note("SPICE clients are cut off by an activation", "connect them again"),
        "sdl" | "egl-headless" | "dbus" | "desktop" | "rdp" => {
            refuse(format!("graphics of type {kind} need a display or a GPU of this host"), "use VNC")
        }
        other => refuse(format!("graphics of type {other} are not on the list"), "use VNC"),
    }
}

fn audio(kind: &str) -> Verdict {
    match kind {
        "none" | "spice" | "dbus" | "file" => Fine,
        other => note(
            format!("sound goes to {other} on this host"),
            "make sure that the backup site has it too, or use <audio type='none'/>: without it QEMU does not start there",
        ),
    }
}

fn input(device: &Device, kind: &str) -> Verdict {
    let bus = device.element.attribute("bus").unwrap_or_default();
    match (kind, bus) {
        ("tablet" | "mouse" | "keyboard", "usb" | "ps2" | "virtio") => Fine,
        ("passthrough" | "evdev", _) => {
            refuse(format!("an input device of the host is passed through ({kind})"), REMOVE)
        }
        _ => {
            refuse(format!("an input device {kind} on bus {bus} is not on the list"), "use a tablet, mouse or keyboard")
        }
    }
}

/// Serial and parallel ports, consoles, channels: what the guest has, and where it leads.
fn character(device: &Device, backend: &str) -> Verdict {
    let target = device.element.attribute_at("target", "type").unwrap_or_default();
    let model = device.element.attribute_at("target/model", "name").unwrap_or(target);
    let fine = match device.kind.as_str() {
        "serial" => matches!(model, "isa-serial" | "pci-serial"),
        "parallel" => true,
        "console" => matches!(target, "serial" | "virtio"),
        _ => target == "virtio",
    };
    if !fine {
        return refuse(
            format!("a {} of type {model:?} is not on the list", device.kind),
            "use isa-serial, pci-serial, or virtio for consoles and channels",
        );
    }
    match backend {
        "pty" | "file" | "unix" | "tcp" | "udp" | "null" | "pipe" | "vc" | "stdio" | "spicevmc" | "spiceport" => Fine,
        "dev" => note(
            "it is connected to a device of this host",
            "make sure that the backup site has a device of the same path: without it QEMU does not start there",
        ),
        other => refuse(
            format!("{other} behind a {} keeps state that is not carried", device.kind),
            "use pty, file, unix or tcp",
        ),
    }
}
