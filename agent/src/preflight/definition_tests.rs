//! Findings over definitions that libvirt dumped, and over one device more in such a definition for each refused kind.

use serde_json::json;
use vmdr_hypervisor::domain_xml::{add_own_qmp_socket, add_qemu_arguments};
use vmdr_hypervisor::xml::Element;

use super::domain::definition;
use super::{DomainOptions, Finding, HostFacts, Severity, qemu_devices, refusals};

const Q35_TCG: &str = include_str!("../../hypervisor/tests/fixtures/q35-tcg.live.xml");
const Q35_KVM: &str = include_str!("../../hypervisor/tests/fixtures/q35-kvm.live.xml");
const PC_TCG: &str = include_str!("../../hypervisor/tests/fixtures/pc-tcg.live.xml");
const NUMA_MEMFD: &str = include_str!("../../hypervisor/tests/fixtures/numa-memfd.live.xml");
const DISKS: &str = include_str!("../../hypervisor/tests/fixtures/disks.live.xml");
const REFUSED_DEVICES: &str = include_str!("../../hypervisor/tests/fixtures/refused-devices.inactive.xml");
const UEFI: &str = include_str!("../../hypervisor/tests/fixtures/uefi.inactive.xml");

fn facts() -> HostFacts {
    HostFacts {
        kernel_release: "6.12.0".into(),
        dirty_log: Ok(()),
        dirty_log_shared: Ok(()),
        may_trace: true,
        ptrace_scope: None,
        kvm: Ok(12),
        memory_available_bytes: 4 << 30,
        vhost_net: true,
        lock_manager: None,
        lock_daemons: vec![],
        apparmor_rules: true,
    }
}

fn judge(root: &Element) -> Vec<Finding> {
    let findings = definition(root, &facts(), &DomainOptions::default());
    for finding in &findings {
        assert!(!finding.subject.is_empty() && !finding.fact.is_empty(), "{finding:?}");
        assert_eq!(finding.severity == Severity::Ok, finding.remedy.is_empty(), "{finding:?}");
    }
    findings
}

fn parse(text: &str) -> Element {
    Element::parse(text).unwrap()
}

fn with_device(device: &str) -> Element {
    let mut root = parse(Q35_TCG);
    root.find_mut("devices").unwrap().push(parse(device));
    root
}

/// The subjects of the refusals.
fn refused(root: &Element) -> Vec<String> {
    refusals(&judge(root)).map(|f| f.subject.clone()).collect()
}

#[test]
fn ordinary_guests_are_taken() {
    for fixture in [Q35_TCG, Q35_KVM] {
        assert_eq!(refused(&parse(fixture)), Vec::<String>::new());
    }
    let mut prepared = parse(Q35_TCG);
    add_own_qmp_socket(&mut prepared).unwrap();
    assert_eq!(judge(&prepared), judge(&parse(Q35_TCG)));
    // All is well with this one but for its floppy disk.
    assert_eq!(refused(&parse(PC_TCG)), ["disk fda"]);
}

#[test]
fn every_refused_device_is_named() {
    let refused = refused(&parse(REFUSED_DEVICES));
    for wanted in [
        "disk virtio (vda)",
        "disk virtio (vdb)",
        "disk scsi (sda)",
        "controller vmpvscsi",
        "hostdev",
        "interface virtio",
        "interface vmxnet3",
        "filesystem",
        "shmem",
        "memory nvdimm",
        "vsock virtio",
        "iommu intel",
        "lease",
        "sound usb",
        "input",
        "serial usb-serial",
        "pstore",
    ] {
        assert!(refused.iter().any(|r| r.starts_with(wanted)), "{wanted} is not among {refused:#?}");
    }
    // Three of PCI, USB and mdev; two file systems; vhost-user, vdpa and hostdev of network interfaces.
    assert_eq!(refused.iter().filter(|r| r.starts_with("hostdev")).count(), 3);
    assert_eq!(refused.iter().filter(|r| r.starts_with("filesystem")).count(), 2);
    assert_eq!(refused.iter().filter(|r| r.starts_with("interface")).count(), 4);
    // Its memory is shared, and there is a balloon that reports free pages.
    assert!(refused.contains(&"memory".to_owned()));
}

#[test]
fn one_device_more_is_refused() {
    for (device, subject, fact) in [
        ("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>", "tpm tpm-crb", "state"),
        ("<video><model type='qxl' ram='65536'/></video>", "video qxl", "qxl"),
        ("<video><model type='virtio'><acceleration accel3d='yes'/></model></video>", "video virtio", "3D"),
        ("<video><model type='virtio' blob='on'/></video>", "video virtio", "blob"),
        ("<video><driver name='vhostuser'/><model type='virtio'/></video>", "video virtio", "vhostuser"),
        ("<memory model='virtio-mem'/>", "memory virtio-mem", "virtio-mem"),
        ("<memory model='virtio-pmem'/>", "memory virtio-pmem", "virtio-pmem"),
        ("<memory model='sgx-epc'/>", "memory sgx-epc", "sgx-epc"),
        ("<graphics type='egl-headless'/>", "graphics egl-headless", "GPU"),
        ("<redirdev bus='usb' type='spicevmc'/>", "redirdev spicevmc", "USB"),
        ("<smartcard mode='host'/>", "smartcard", "smart card"),
        ("<crypto model='virtio' type='qemu'/>", "crypto virtio", "crypto"),
        ("<channel type='qemu-vdagent'><target type='virtio'/></channel>", "channel virtio", "qemu-vdagent"),
        ("<channel type='unix'><target type='guestfwd'/></channel>", "channel guestfwd", "guestfwd"),
        ("<input type='evdev'><source dev='/dev/input/event1'/></input>", "input evdev", "passed through"),
        ("<controller type='ccid' index='0'/>", "controller ccid", "ccid"),
        ("<controller type='usb' model='qusb2'/>", "controller qusb2", "qusb2"),
        ("<controller type='pci' model='pcie-expander-bus'/>", "controller pcie-expander-bus", "not on the list"),
        (
            "<interface type='bridge'><model type='virtio'/><teaming type='persistent'/></interface>",
            "interface virtio",
            "failover",
        ),
        ("<interface type='bridge'/>", "interface bridge", "not on the list"),
        ("<rng model='other'/>", "rng other", "not on the list"),
        ("<watchdog model='diag288'/>", "watchdog diag288", "not on the list"),
        ("<hologram model='x'/>", "hologram x", "does not know"),
        ("<nvram/>", "nvram", "does not know"),
        (
            "<disk type='file' device='disk'><source file='/a'/><target dev='sdz' bus='sata'/></disk>",
            "disk sdz",
            "TRIM",
        ),
        (
            "<disk type='file' device='disk'><source file='/a'/><target dev='xvda' bus='xen'/></disk>",
            "disk xen (xvda)",
            "not on the list",
        ),
    ] {
        let findings = judge(&with_device(device));
        let refusals: Vec<_> = refusals(&findings).collect();
        assert_eq!(refusals.len(), 1, "{device}: {refusals:#?}");
        assert_eq!(refusals[0].subject, subject, "{device}");
        assert!(refusals[0].fact.contains(fact), "{device}: {}", refusals[0]);
    }
}

#[test]
fn a_sata_disk_is_taken_without_trim() {
    let disk = "<disk type='file' device='disk'><source file='/a'/><target dev='sdz' bus='sata'/><alias name='sata0-0-5'/></disk>";
    for (alias, granularity, refused) in [("sata0-0-5", "0", 0), ("sata0-0-5", "512", 1), ("sata0-0-1", "0", 1)] {
        let mut root = with_device(disk);
        let text = format!(
            "<qemu:override><qemu:device alias='{alias}'><qemu:frontend>\
             <qemu:property name='discard_granularity' type='unsigned' value='{granularity}'/>\
             </qemu:frontend></qemu:device></qemu:override>"
        );
        root.push(Element::parse(&text).unwrap());
        let findings = judge(&root);
        assert_eq!(refusals(&findings).count(), refused, "{alias} {granularity}: {findings:#?}");
    }
}

#[test]
fn one_device_more_is_taken_with_a_word() {
    for (device, fact) in [
        ("<graphics type='spice'/>", "SPICE"),
        ("<interface type='user'><model type='e1000'/></interface>", "user-mode"),
        ("<audio type='alsa' id='2'/>", "alsa"),
        ("<serial type='dev'><source path='/dev/ttyS0'/><target type='isa-serial'/></serial>", "device of this host"),
        (
            "<disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='sdb' bus='sata'/><readonly/></disk>",
            "/cd.iso is read-only",
        ),
    ] {
        let findings = judge(&with_device(device));
        assert_eq!(refusals(&findings).count(), 0, "{device}: {findings:#?}");
        let warned = findings.iter().any(|f| f.severity == Severity::Warning && f.fact.contains(fact));
        assert!(warned, "{device}: {findings:#?}");
    }
}

#[test]
fn machines() {
    let refused_by = |change: &dyn Fn(&mut Element)| {
        let mut root = parse(Q35_TCG);
        change(&mut root);
        refused(&root)
    };
    let os_type = |name: &'static str, value: &'static str| {
        refused_by(&move |r: &mut Element| r.find_mut("os/type").unwrap().set_attribute(name, value))
    };
    assert_eq!(os_type("arch", "aarch64"), ["architecture"]);
    assert_eq!(os_type("machine", "microvm"), ["machine type"]);
    assert_eq!(os_type("machine", "pc-i440fx-6.2"), Vec::<String>::new());
    assert_eq!(refused_by(&|r| r.set_attribute("type", "xen")), ["type"]);
    for kind in ["sev", "sev-snp", "tdx"] {
        let secret = || Element::new("launchSecurity").with_attribute("type", kind);
        assert_eq!(refused_by(&|r| r.push(secret())), ["launchSecurity"]);
    }
    assert_eq!(refused(&parse(UEFI)), Vec::<String>::new());
    for (path, name, value) in [("os/loader", "readonly", "no"), ("os/nvram", "format", "qcow2")] {
        let mut root = parse(UEFI);
        root.find_mut(path).unwrap().set_attribute(name, value);
        assert_eq!(refused(&root), ["UEFI variables"], "{path}");
    }
    let without_kvm = HostFacts { kvm: Err("ENOENT".into()), ..facts() };
    let findings = definition(&parse(Q35_KVM), &without_kvm, &DomainOptions::default());
    assert_eq!(refusals(&findings).map(|f| f.subject.as_str()).collect::<Vec<_>>(), ["type"]);
    let small = DomainOptions { arena_bytes: 8 << 30, protected: false };
    let findings = definition(&parse(Q35_TCG), &facts(), &small);
    assert_eq!(refusals(&findings).map(|f| f.subject.as_str()).collect::<Vec<_>>(), ["memory for checkpoints"]);
    assert_eq!(refused(&parse("<domain/>")), ["definition"]);
}

#[test]
fn memory_and_balloon() {
    assert_eq!(refused(&parse(NUMA_MEMFD)), ["memory"]);
    let without_balloon = |text: &str| {
        let mut root = parse(text);
        root.find_mut("devices/memballoon").unwrap().set_attribute("model", "none");
        root
    };
    assert_eq!(refused(&without_balloon(NUMA_MEMFD)), Vec::<String>::new());
    let huge = |mut root: Element| {
        root.push(Element::new("memoryBacking").with_child(Element::new("hugepages")));
        root
    };
    assert_eq!(refused(&huge(parse(Q35_TCG))), ["memory"]);
    assert_eq!(refused(&huge(without_balloon(Q35_TCG))), Vec::<String>::new());
    let dimm = |source: &str, access: &str| {
        let mut root = parse(Q35_TCG);
        let dimm =
            format!("<memory model='dimm' access='{access}'>{source}<target><size>65536</size></target></memory>");
        root.find_mut("devices").unwrap().push(parse(&dimm));
        refused(&root)
    };
    assert_eq!(dimm("", "private"), Vec::<String>::new());
    assert_eq!(dimm("", "shared"), ["memory"]);
    assert_eq!(dimm("<source><pagesize>2048</pagesize></source>", "private"), ["memory"]);
    // Reported free pages of anonymous memory are seen.
    let mut reporting = parse(Q35_TCG);
    reporting.find_mut("devices/memballoon").unwrap().set_attribute("freePageReporting", "on");
    assert_eq!(refused(&reporting), Vec::<String>::new());
    let old_kernel = HostFacts { dirty_log_shared: Err("EINVAL".into()), ..facts() };
    let findings = definition(&without_balloon(NUMA_MEMFD), &old_kernel, &DomainOptions::default());
    assert!(refusals(&findings).any(|f| f.subject == "memory" && f.fact.contains("EINVAL")));
}

#[test]
fn disks() {
    let findings = judge(&parse(DISKS));
    let of = |target: &str| findings.iter().filter(|f| f.subject == format!("disk {target}")).collect::<Vec<_>>();
    let severities = |target: &str| of(target).iter().map(|f| f.severity).collect::<Vec<_>>();
    assert_eq!(severities("vda"), [Severity::Warning, Severity::Ok]);
    assert!(of("vda")[1].fact.contains("2 images below"));
    for (target, fact) in [("vdb", "shareable"), ("vdc", "transient"), ("vdf", "block job (copy)"), ("fda", "floppy")] {
        assert_eq!(severities(target), [Severity::Refused], "{target}");
        assert!(of(target)[0].fact.contains(fact), "{}", of(target)[0]);
    }
    assert_eq!((severities("vdd"), severities("hda")), (vec![Severity::Warning], vec![Severity::Warning]));
    assert_eq!((severities("vde"), severities("hdb")), (vec![Severity::Ok], vec![Severity::Ok]));
    // Mirrors of a protected domain are vmdr's own.
    let protected = DomainOptions { arena_bytes: 0, protected: true };
    let findings = definition(&parse(DISKS), &facts(), &protected);
    assert!(!refusals(&findings).any(|f| f.subject == "disk vdf"));
    let twice = "<disk type='file' device='disk'><source file='/var/lib/libvirt/images/a.raw'/><target dev='vdz' bus='virtio'/></disk>";
    assert_eq!(refused(&with_device(twice)), ["disk vdz"]);
    let directory = "<disk type='dir' device='disk'><source dir='/srv'/><target dev='vdz' bus='virtio'/></disk>";
    assert_eq!(refused(&with_device(directory)), ["disk vdz"]);
}

#[test]
fn arguments_and_confinement_are_told() {
    let mut root = parse(Q35_TCG);
    add_own_qmp_socket(&mut root).unwrap();
    add_qemu_arguments(&mut root, &["-set", "a.b=c"]);
    let label = |driver| Element::new("seclabel").with_attribute("type", "dynamic").with_attribute("model", driver);
    root.push(label("apparmor"));
    root.push(label("selinux"));
    let findings = judge(&root);
    let warned =
        |subject: &str| findings.iter().filter(|f| f.severity == Severity::Warning && f.subject == subject).count();
    assert_eq!((warned("qemu:commandline"), warned("confinement")), (2, 1));
    assert_eq!(refusals(&findings).count(), 0);
    let without_rules = HostFacts { apparmor_rules: false, ..facts() };
    let findings = definition(&root, &without_rules, &DomainOptions::default());
    assert_eq!(refusals(&findings).map(|f| f.subject.as_str()).collect::<Vec<_>>(), ["confinement"]);
}

#[test]
fn files_of_this_host_are_told() {
    for (path, element, file) in [
        ("os", "<kernel>/boot/k</kernel>", "/boot/k"),
        ("os", "<initrd>/boot/i</initrd>", "/boot/i"),
        ("os", "<acpi><table type='slic'>/srv/slic</table></acpi>", "/srv/slic"),
        ("os", "<loader type='rom'>/srv/OVMF.fd</loader>", "/srv/OVMF.fd"),
        (
            "",
            "<sysinfo type='fwcfg'><entry name='opt/a' file='/srv/a'/><entry name='opt/b'>b</entry></sysinfo>",
            "/srv/a",
        ),
    ] {
        let mut root = parse(Q35_TCG);
        root.find_mut(path).unwrap().push(parse(element));
        let findings = judge(&root);
        let warned: Vec<_> = findings.iter().filter(|f| f.severity == Severity::Warning).collect();
        assert_eq!(warned.len(), 1, "{warned:#?}");
        assert!(warned[0].fact.ends_with(&format!("reads {file} of this host")), "{}", warned[0]);
    }
}

#[test]
fn what_qemu_says_it_has() {
    let child = |name: &str, model: &str| json!({ "name": name, "type": format!("child<{model}>") });
    let listing = json!([
        { "name": "type", "type": "string" },
        child("net0", "virtio-net-pci"),
        child("disk0", "virtio-blk-pci-non-transitional"),
        child("vcpu1", "Skylake-Server-x86_64-cpu"),
        child("io[0]", "memory-region"),
        child("device[3]", "kvm-i8259"),
    ]);
    assert_eq!(qemu_devices::devices("/machine/peripheral", &listing), []);
    for model in ["vfio-pci", "vhost-user-fs-pci", "nvme", "usb-audio", "ivshmem-plain", "tpm-tis", "virtio-net-pci-x"]
    {
        let findings = qemu_devices::devices("/machine/peripheral-anon", &json!([child("device[0]", model)]));
        assert_eq!(refusals(&findings).count(), 1, "{model}");
        assert!(findings[0].subject.contains(model));
    }
    let findings = qemu_devices::devices("/machine/peripheral", &json!({}));
    assert_eq!(refusals(&findings).count(), 1);
}
