//! The allowlist of devices, over what QEMU itself says it has.
//!
//! libvirt knows nothing of devices that came by `qemu:commandline` or its monitor, and a device that libvirt calls by one
//! name may be another one in QEMU. The object tree has all of them: what was plugged in is in `peripheral` and
//! `peripheral-anon`, what belongs to the machine is in `unattached`. Unlike `info qtree`, `qom-list` is an interface.

use serde_json::Value;

use super::Finding;

/// The places of the object tree where devices are.
pub const PATHS: [&str; 3] = ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"];

/// Devices that can be plugged in. A suffix of virtio's own may follow.
const DEVICES: &[&str] = &[
    "AC97",
    "ES1370",
    "VGA",
    "ahci",
    "bochs-display",
    "cirrus-vga",
    "e1000",
    "e1000e",
    "floppy",
    "hda-duplex",
    "hda-micro",
    "hda-output",
    "i6300esb",
    "i82801b11-bridge",
    "ib700",
    "ich9-ahci",
    "ich9-intel-hda",
    "ich9-usb-ehci1",
    "ich9-usb-ehci2",
    "ich9-usb-uhci1",
    "ich9-usb-uhci2",
    "ich9-usb-uhci3",
    "ich9-usb-uhci4",
    "ich9-usb-uhci5",
    "ich9-usb-uhci6",
    "ide-cd",
    "ide-hd",
    "intel-hda",
    "ioh3420",
    "isa-fdc",
    "isa-parallel",
    "isa-serial",
    "lsi53c895a",
    "nec-usb-xhci",
    "pc-dimm",
    "pci-bridge",
    "pci-ohci",
    "pci-serial",
    "pcie-pci-bridge",
    "pcie-root-port",
    "piix3-ide",
    "piix3-usb-uhci",
    "piix4-ide",
    "piix4-usb-uhci",
    "pvpanic",
    "pvpanic-pci",
    "qemu-xhci",
    "ramfb",
    "rtl8139",
    "sb16",
    "scsi-cd",
    "scsi-hd",
    "secondary-vga",
    "usb-ehci",
    "usb-hub",
    "usb-kbd",
    "usb-mouse",
    "usb-storage",
    "usb-tablet",
    "virtconsole",
    "virtio-balloon-pci",
    "virtio-blk-pci",
    "virtio-gpu-pci",
    "virtio-keyboard-pci",
    "virtio-mouse-pci",
    "virtio-net-pci",
    "virtio-rng-pci",
    "virtio-scsi-pci",
    "virtio-serial-pci",
    "virtio-tablet-pci",
    "virtio-vga",
    "virtserialport",
    "vmcoreinfo",
    "vmgenid",
    "x3130-upstream",
    "xio3130-downstream",
];

/// What machines of types pc and q35 are made of, under TCG and KVM.
const BUILT_IN: &[&str] = &[
    "ICH9-LPC",
    "ICH9-SMB",
    "PIIX3",
    "PIIX3-xen",
    "PIIX4_PM",
    "System",
    "apic",
    "cfi.pflash01",
    "fw_cfg_io",
    "hpet",
    "i440FX",
    "i8042",
    "i8257",
    "ioapic",
    "isa-i8259",
    "isa-pcspk",
    "isa-pit",
    "kvm-apic",
    "kvm-i8259",
    "kvm-ioapic",
    "kvm-pit",
    "kvmclock",
    "kvmvapic",
    "mc146818rtc",
    "mch",
    "piix4-isa",
    "port92",
    "ps2-kbd",
    "ps2-mouse",
    "smbus-eeprom",
    "vmmouse",
    "vmport",
];

/// Objects in the tree that are not devices.
const NOT_DEVICES: &[&str] = &["container", "irq", "memory-region", "qemu:memory-region", "qemu:iommu-memory-region"];

/// Judges what `qom-list` answered for one of [`PATHS`].
pub fn devices(path: &str, listing: &Value) -> Vec<Finding> {
    let Some(entries) = listing.as_array() else {
        return vec![Finding::refused(
            "QEMU's devices",
            format!("qom-list {path} answered {listing}, which is no list"),
            "report this as a defect of vmdr, with the version of QEMU",
        )];
    };
    let mut findings = Vec::new();
    for entry in entries {
        let word = |name: &str| entry.get(name).and_then(Value::as_str).unwrap_or_default();
        // Properties have other types: a child of type T is `child<T>`.
        let Some(model) = word("type").strip_prefix("child<").and_then(|t| t.strip_suffix('>')) else { continue };
        if known(model) {
            continue;
        }
        findings.push(Finding::refused(
            format!("QEMU device {model} ({})", word("name")),
            "QEMU has it, and it is not on the list of devices that vmdr carries".to_owned(),
            "remove it from the domain (libvirt may not know of it: look for it in <qemu:commandline>)",
        ));
    }
    findings
}

fn known(model: &str) -> bool {
    let plain =
        model.strip_suffix("-non-transitional").or_else(|| model.strip_suffix("-transitional")).unwrap_or(model);
    DEVICES.contains(&plain)
        || BUILT_IN.contains(&model)
        || NOT_DEVICES.contains(&model)
        || model.ends_with("-x86_64-cpu")
}
