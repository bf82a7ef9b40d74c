//! Definitions as libvirt 11.3 with QEMU 10.0 dumped them (`virsh dumpxml`), read.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use vmdr_hypervisor::domain_xml::{
    DiskDevice, DomainXml, DomainXmlError, GUEST_AGENT_CHANNEL, add_own_qmp_socket, add_qemu_arguments, channel,
    own_qmp_socket, qemu_arguments, qmp_socket_path, remove_own_qmp_socket,
};
use vmdr_hypervisor::xml::Element;

fn fixture(name: &str) -> Element {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    Element::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn all() -> Vec<(PathBuf, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let paths = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path());
    paths.map(|p| (p.clone(), std::fs::read_to_string(p).unwrap())).collect()
}

#[test]
fn every_definition_is_read_and_written_back_alike() {
    let all = all();
    assert!(all.len() >= 7);
    for (path, text) in all {
        let root = Element::parse(&text).unwrap();
        assert_eq!(Element::parse(&root.to_string()).unwrap(), root, "{}", path.display());
        // libvirt quotes with apostrophes; nothing else differs.
        assert_eq!(root.to_string().replace('"', "'"), text.trim_end(), "{}", path.display());
        let domain = DomainXml::from_element(&root).unwrap();
        assert_eq!(domain.arch, "x86_64");
        assert!(domain.memory_bytes >= 64 << 20);
        assert_eq!(domain.disks.len(), domain.devices_of("disk").count());
    }
}

#[test]
fn an_ordinary_guest() {
    let domain = DomainXml::from_element(&fixture("q35-tcg.live.xml")).unwrap();
    assert_eq!(domain.name, "a");
    assert_eq!(domain.id, Some(1));
    assert_eq!((domain.virt_type.as_str(), domain.machine.as_str()), ("qemu", "pc-q35-10.0"));
    assert_eq!(domain.memory_bytes, 128 << 20);
    assert_eq!(domain.vcpus, 1);
    assert_eq!(domain.emulator.as_deref(), Some(Path::new("/usr/bin/qemu-system-x86_64")));
    assert_eq!(domain.cpu.unwrap().text_at("model").unwrap(), "qemu64");
    assert!(domain.confined_by.is_empty());
    assert_eq!(domain.qmp_socket, None);
    let vda = &domain.disks[0];
    assert_eq!((vda.target.as_str(), vda.bus.as_str(), vda.device), ("vda", "virtio", DiskDevice::Disk));
    assert_eq!(vda.serial.as_deref(), Some("LUN0001"));
    assert_eq!(vda.source.as_ref().unwrap().path().unwrap(), Path::new("/var/lib/libvirt/images/a.raw"));
    assert!(vda.is_writable());
    assert_eq!((domain.disks[1].device, domain.disks[1].source.as_ref()), (DiskDevice::Cdrom, None));
    let nic = &domain.interfaces[0];
    assert_eq!((nic.kind.as_str(), nic.source.as_deref()), ("bridge", Some("vmbr0")));
    assert_eq!((nic.mac.as_deref(), nic.target.as_deref()), (Some("52:54:00:aa:bb:01"), Some("vnet0")));
    assert_eq!(nic.model.as_deref(), Some("virtio"));
    let model = |kind: &str| domain.devices.iter().find(|d| d.kind == kind).unwrap().model.clone();
    for (kind, wanted) in [
        ("video", "vga"),
        ("watchdog", "itco"),
        ("panic", "isa"),
        ("memballoon", "virtio"),
        ("rng", "virtio"),
        ("serial", "isa-serial"),
        ("console", "serial"),
        ("channel", "virtio"),
        ("graphics", "vnc"),
        ("audio", "none"),
    ] {
        assert_eq!(model(kind), wanted, "{kind}");
    }
}

#[test]
fn disks_of_all_kinds() {
    let domain = DomainXml::from_element(&fixture("disks.live.xml")).unwrap();
    let disk = |target: &str| domain.disks.iter().find(|d| d.target == target).unwrap();
    let backing: Vec<_> = disk("vda").backing.iter().map(|s| s.location.as_str()).collect();
    assert_eq!(backing, ["/var/lib/libvirt/images/mid.qcow2", "/var/lib/libvirt/images/base.qcow2"]);
    assert_eq!(disk("vda").backing[0].format.as_deref(), Some("qcow2"));
    assert_eq!(disk("vda").error_policy.as_deref(), Some("ignore"));
    assert!(disk("vdb").shareable);
    assert!(disk("vdc").transient);
    assert!(disk("vdd").readonly && !disk("vdd").is_writable());
    assert_eq!(disk("vde").source.as_ref().unwrap().location, "nbd:exp");
    assert_eq!(disk("vde").source.as_ref().unwrap().path(), None);
    assert_eq!(disk("vdf").mirror.as_deref(), Some("copy"));
    assert!(disk("hda").source.is_some() && !disk("hda").is_writable());
    assert_eq!(disk("fda").device, DiskDevice::Floppy);
}

#[test]
fn memory_and_machine() {
    let numa = DomainXml::from_element(&fixture("numa-memfd.live.xml")).unwrap();
    assert_eq!(numa.memory_backing.source.as_deref(), Some("memfd"));
    assert!(numa.memory_backing.shared && !numa.memory_backing.hugepages);
    let cells: Vec<_> = numa.numa_cells.iter().map(|c| (c.id, c.memory_bytes)).collect();
    assert_eq!(cells, [(0, 64 << 20), (1, 64 << 20)]);
    let uefi = DomainXml::from_element(&fixture("uefi.inactive.xml")).unwrap();
    assert!(uefi.firmware.pflash && !uefi.firmware.loader_writable);
    assert_eq!(uefi.firmware.nvram.as_deref(), Some("/var/lib/libvirt/qemu/nvram/refused_VARS.fd"));
    assert_eq!(uefi.firmware.nvram_format.as_deref(), Some("raw"));
    assert_eq!((uefi.id, uefi.virt_type.as_str()), (None, "kvm"));
    assert!(DomainXml::from_element(&fixture("refused-devices.inactive.xml")).unwrap().max_memory);
}

#[test]
fn own_qmp_socket_comes_and_goes() {
    let before = fixture("q35-tcg.live.xml");
    let mut root = before.clone();
    assert!(add_own_qmp_socket(&mut root).unwrap());
    let uuid = DomainXml::from_element(&root).unwrap().uuid;
    assert_eq!(own_qmp_socket(&root), Some(qmp_socket_path(&uuid)));
    let path = format!("/var/lib/libvirt/qemu/vmdr-{uuid}.qmp");
    assert_eq!(qemu_arguments(&root), ["-qmp".to_owned(), format!("unix:{path},server=on,wait=off")]);
    assert_eq!(root.attribute("xmlns:qemu"), Some("http://libvirt.org/schemas/domain/qemu/1.0"));
    let once = root.clone();
    assert!(!add_own_qmp_socket(&mut root).unwrap());
    assert_eq!(root, once);
    assert!(remove_own_qmp_socket(&mut root));
    assert!(!remove_own_qmp_socket(&mut root));
    root.remove_attribute("xmlns:qemu");
    assert_eq!(root, before);
}

#[test]
fn other_arguments_are_left_alone() {
    let mut root = fixture("q35-tcg.live.xml");
    let others = ["-qmp", "unix:/run/other.qmp,server=on,wait=off", "-set", "device.x=y"];
    add_qemu_arguments(&mut root, &others);
    assert_eq!(own_qmp_socket(&root), None);
    assert!(!remove_own_qmp_socket(&mut root));
    assert!(add_own_qmp_socket(&mut root).unwrap());
    assert_eq!(qemu_arguments(&root).len(), 6);
    assert!(remove_own_qmp_socket(&mut root));
    assert_eq!(qemu_arguments(&root), others);
    // A socket of the same name for another guest, as after cloning the definition, is not this guest's.
    assert!(add_own_qmp_socket(&mut root).unwrap());
    root.find_mut("uuid").unwrap().set_text("41111111-1111-4111-8111-1111111111ff");
    assert_eq!(own_qmp_socket(&root), None);
}

#[test]
fn nonsense_is_an_error() {
    let with = |path: &str, text: &str| {
        let mut root = fixture("q35-tcg.live.xml");
        root.find_mut(path).unwrap().set_text(text);
        DomainXml::from_element(&root).unwrap_err()
    };
    assert_eq!(with("name", ""), DomainXmlError::Missing("name"));
    for (path, text) in [("uuid", "x"), ("memory", "-1"), ("memory", "99999999999999999999"), ("vcpu", "many")] {
        let error = with(path, text);
        assert!(error.to_string().contains(text), "{error}");
    }
    let mut root = fixture("q35-tcg.live.xml");
    root.find_mut("memory").unwrap().set_attribute("unit", "EiB");
    assert!(DomainXml::from_element(&root).unwrap_err().to_string().contains("16 EiB"));
    root.find_mut("memory").unwrap().set_attribute("unit", "furlong");
    assert!(DomainXml::from_element(&root).unwrap_err().to_string().contains("furlong"));
    assert_eq!(DomainXml::parse("<pool/>"), Err(DomainXmlError::NotADomain("pool".into())));
    assert!(matches!(DomainXml::parse("<domain>"), Err(DomainXmlError::Xml(_))));
    let units = [("b", 1), ("bytes", 1), ("KB", 1000), ("k", 1024), ("KiB", 1024), ("MB", 1_000_000), ("G", 1 << 30)];
    for (unit, bytes) in units {
        let mut root = fixture("q35-tcg.live.xml");
        root.find_mut("memory").unwrap().set_attribute("unit", unit);
        root.find_mut("memory").unwrap().set_text("3");
        assert_eq!(DomainXml::from_element(&root).unwrap().memory_bytes, 3 * bytes, "{unit}");
    }
}

#[test]
fn a_channel_is_found_by_its_name() {
    let domain = |name: &str| {
        let text =
            format!("<domain><devices><channel type='unix'><target name='{name}'/></channel></devices></domain>");
        Element::parse(&text).unwrap()
    };
    assert!(channel(&domain(GUEST_AGENT_CHANNEL), GUEST_AGENT_CHANNEL).is_some());
    assert!(channel(&domain("org.vmdr.guest.0"), GUEST_AGENT_CHANNEL).is_none());
}
