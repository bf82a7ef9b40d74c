use std::collections::BTreeMap;

use super::super::findings::refusals;
use super::super::host::fake::FakeHost;
use super::*;

const Q35: &str = include_str!("../testdata/q35.xml");
const RICH: &str = include_str!("../testdata/rich.xml");
const NUMA: &str = include_str!("../testdata/numa.xml");

fn placed(targets: &[&str]) -> Vec<PlacedDisk> {
    let disk = |t: &&str| PlacedDisk {
        target: (*t).to_owned(),
        overlay: format!("/s/active/attempt-1/{t}.qcow2").into(),
        base: format!("/s/standby.1/disk/{t}.raw").into(),
    };
    targets.iter().map(disk).collect()
}

fn host(files: &[&str]) -> FakeHost {
    FakeHost { files: files.iter().map(PathBuf::from).collect(), ..FakeHost::default() }
}

fn make(xml: &str, targets: &[&str], ram: Option<(&str, u64)>, host: &FakeHost) -> Transformed {
    let disks = placed(targets);
    let nics = Mapping::from(BTreeMap::from([("br0".to_owned(), "br-dr".to_owned())]));
    let ram = ram.map(|(path, bytes)| (Path::new(path), bytes));
    transform(xml, &Placement { ram, disks: &disks, variables: None, nics: &nics }, host).unwrap()
}

fn disk<'a>(root: &'a Element, target: &str) -> &'a Element {
    let disks = root.find_all("devices/disk");
    disks.into_iter().find(|d| d.attribute_at("target", "dev") == Some(target)).unwrap()
}

/// Every element and attribute below `root`, one a line, so that two definitions can be compared.
fn flat(root: &Element, path: &str, out: &mut Vec<String>) {
    let path = format!("{path}/{}", root.name);
    out.push(format!("{path} {:?} {}", root.attributes().collect::<Vec<_>>(), root.text()));
    root.elements().for_each(|e| flat(e, &path, out));
}

fn difference(before: &Element, after: &Element) -> (Vec<String>, Vec<String>) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    flat(before, "", &mut a);
    flat(after, "", &mut b);
    let gone = a.iter().filter(|l| !b.contains(l)).cloned().collect();
    let new = b.iter().filter(|l| !a.contains(l)).cloned().collect();
    (gone, new)
}

#[test]
fn an_ordinary_guest_changes_behind_its_devices_only() {
    let host = host(&["/usr/bin/qemu-system-x86_64"]);
    let made = make(Q35, &["vda"], Some(("/s/ram/0.img", 512 << 20)), &host);
    assert_eq!(made.findings, []);
    let (gone, new) = difference(&Element::parse(Q35).unwrap(), &made.persistent);
    let d = "/domain/devices/disk";
    assert_eq!(
        gone,
        [
            format!("{d}/driver [(\"name\", \"qemu\"), (\"type\", \"raw\"), (\"cache\", \"none\")] "),
            format!("{d}/source [(\"file\", \"/var/lib/libvirt/images/proof.raw\")] "),
        ]
    );
    assert_eq!(
        new,
        [
            format!("{d}/driver [(\"name\", \"qemu\"), (\"type\", \"qcow2\"), (\"cache\", \"none\")] "),
            format!("{d}/source [(\"file\", \"/s/active/attempt-1/vda.qcow2\")] "),
            format!("{d}/backingStore [(\"type\", \"file\")] "),
            format!("{d}/backingStore/format [(\"type\", \"raw\")] "),
            format!("{d}/backingStore/source [(\"file\", \"/s/standby.1/disk/vda.raw\")] "),
            format!("{d}/backingStore/backingStore [] "),
        ]
    );
    let (gone, new) = difference(&made.persistent, &made.restore);
    assert_eq!(gone.len(), 1, "the root gets a namespace: {gone:?}");
    assert_eq!(new.len(), 6, "{new:?}");
    assert_eq!(
        domain_xml::qemu_arguments(&made.restore),
        [
            "-object",
            "memory-backend-file,id=vmdr-ram,size=536870912,mem-path=/s/ram/0.img,share=off,readonly=on,rom=off,\
             x-use-canonical-path-for-ramblock-id=off",
            "-machine",
            "memory-backend=vmdr-ram"
        ]
    );
}

#[test]
fn what_is_of_the_old_host_goes_and_what_the_guest_sees_stays() {
    let host = host(&["/usr/bin/qemu-system-x86_64", "/srv/iso/debian.iso"]);
    let made = make(RICH, &["vda", "sdb"], Some(("/s/a,b.img", 2 << 30)), &host);
    let root = &made.restore;
    for gone in ["numatune", "seclabel", "cputune/vcpupin", "cputune/emulatorpin", "memoryBacking/hugepages"] {
        assert!(root.find(gone).is_none(), "{gone}");
    }
    assert!(root.find("memoryBacking/locked").is_none() && root.find("memoryBacking/allocation").is_none());
    assert!(root.find("memoryBacking/nosharepages").is_some(), "KSM stays off");
    assert!(made.persistent.find("memoryBacking/hugepages").is_some(), "the next start has them again");
    assert_eq!(root.text_at("cputune/shares").as_deref(), Some("2048"));
    assert_eq!(root.attribute_at("vcpu", "cpuset"), None);

    let vda = disk(root, "vda");
    assert_eq!(vda.attribute("type"), Some("file"));
    assert!(vda.find("mirror").is_none() && vda.find("source/seclabel").is_none());
    assert_eq!(vda.text_at("serial").as_deref(), Some("LUN-7"));
    assert_eq!(vda.attribute_at("boot", "order"), Some("1"));
    assert_eq!(vda.attribute_at("driver", "error_policy"), Some("stop"));
    assert_eq!(vda.find_all("source").len(), 1);
    let sdb = disk(root, "sdb");
    assert_eq!((sdb.attribute("type"), sdb.text_at("wwn").as_deref()), (Some("file"), Some("5000c50015ea71aa")));
    assert_eq!(sdb.attribute_at("source", "protocol"), None);
    assert_eq!(disk(root, "sdc").attribute_at("source", "file"), Some("/srv/iso/debian.iso"));
    assert!(disk(root, "sdd").find("source").is_none());

    let bridges: Vec<_> =
        root.find_all("devices/interface/source").iter().filter_map(|s| s.attribute("bridge")).collect();
    assert_eq!(bridges, ["br-dr"]);
    assert_eq!(root.attribute_at("devices/graphics", "listen"), Some("127.0.0.1"));
    let subjects: Vec<_> = made.findings.iter().map(|f| f.subject.as_str()).collect();
    assert_eq!(subjects, ["CPU pinning", "graphics", "memory"]);
}

#[test]
fn free_page_reporting_is_said_to_do_nothing() {
    let balloon = "<memballoon model='virtio'";
    let reporting = Q35.replace(balloon, &format!("{balloon} freePageReporting='on'"));
    let host = host(&["/usr/bin/qemu-system-x86_64"]);
    let made = make(&reporting, &["vda"], Some(("/s/ram/0.img", 512 << 20)), &host);
    assert_eq!(made.findings.len(), 1);
    assert_eq!(made.findings[0].subject, "memory balloon");
    assert_eq!(made.restore.attribute_at("devices/memballoon", "freePageReporting"), Some("on"), "the guest sees it");
    assert_eq!(make(&reporting, &["vda"], None, &host).findings, []);
}

#[test]
fn arguments_of_an_earlier_activation_are_replaced_and_others_kept() {
    let made = make(RICH, &["vda", "sdb"], Some(("/s/a,b.img", 2 << 30)), &host(&["/srv/iso/debian.iso"]));
    let arguments = domain_xml::qemu_arguments(&made.restore);
    let (own, kept): (Vec<_>, Vec<_>) = arguments.iter().partition(|a| a.contains("vmdr-ram"));
    assert_eq!(own.len(), 2, "{own:?}");
    assert!(own[0].contains("mem-path=/s/a,,b.img,"), "{own:?}");
    assert!(kept.contains(&&"virtio-net-pci.x=1".to_owned()), "{kept:?}");
    assert!(domain_xml::own_qmp_socket(&made.restore).is_some());
    let arguments = domain_xml::qemu_arguments(&made.persistent);
    assert_eq!(arguments.len(), 4, "{arguments:?}");
    assert!(arguments.iter().all(|a| !a.contains("vmdr-ram")));
    assert!(domain_xml::own_qmp_socket(&made.persistent).is_some());
    // Again, from what was made: as a guest that fails back.
    let again = make(&made.restore.to_string(), &["vda", "sdb"], Some(("/t/0.img", 2 << 30)), &host(&[]));
    let arguments = domain_xml::qemu_arguments(&again.restore);
    assert_eq!(arguments.iter().filter(|a| a.contains("vmdr-ram")).count(), 2, "{arguments:?}");
    assert_eq!(domain_xml::qemu_arguments(&again.persistent).len(), 4);
}

#[test]
fn media_that_are_not_here() {
    let made = make(RICH, &["vda", "sdb"], None, &host(&[]));
    assert!(disk(&made.restore, "sdc").find("source").is_none());
    assert!(made.findings.iter().any(|f| f.subject == "drive sdc" && f.fact.contains("/srv/iso/debian.iso")));
    assert_eq!(refusals(&made.findings).count(), 0);
    assert!(made.restore.find("devices/emulator").is_none(), "libvirt takes its own");

    let made = make(NUMA, &["hda"], None, &host(&[]));
    let refused: Vec<_> = refusals(&made.findings).collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].subject == "disk hdb" && refused[0].fact.contains("/images/shared-tools.raw"));
    let made = make(NUMA, &["hda"], None, &host(&["/images/shared-tools.raw"]));
    assert_eq!(refusals(&made.findings).count(), 0);
    assert_eq!(disk(&made.restore, "hdb").attribute_at("source", "file"), Some("/images/shared-tools.raw"));
    assert_eq!(
        disk(&made.restore, "hda").attribute_at("backingStore/source", "file"),
        Some("/s/standby.1/disk/hda.raw")
    );
}

#[test]
fn a_disk_that_the_standby_lacks_is_refused_even_if_its_file_is_here() {
    for (xml, host, subject) in [
        (Q35, host(&["/var/lib/libvirt/images/proof.raw"]), "disk vda"),
        (RICH, host(&["/dev/vg0/rich"]), "disk vda"),
        (RICH, host(&["/dev/vg0/rich"]), "disk sdb"),
    ] {
        let made = make(xml, &[], None, &host);
        assert!(refusals(&made.findings).any(|f| f.subject == subject), "{subject}: {:?}", made.findings);
    }
}

#[test]
fn memory_that_is_carried_needs_no_huge_pages_until_the_guest_is_started_anew() {
    let made = make(NUMA, &["hda"], None, &host(&["/images/shared-tools.raw"]));
    assert!(made.restore.find("memoryBacking/hugepages").is_none());
    assert!(made.persistent.find("memoryBacking/hugepages").is_some());
    assert!(made.restore.find("numatune").is_none());
    assert_eq!(made.findings.iter().filter(|f| f.subject == "memory").count(), 1);
    let memfd = NUMA.replace("<hugepages/>", "<source type='memfd'/>");
    let made = make(&memfd, &["hda"], None, &host(&["/images/shared-tools.raw"]));
    assert!(made.restore.find("memoryBacking/source").is_some());
    assert_eq!(made.restore, made.persistent);
}

#[test]
fn uefi_variables_are_a_file_of_the_activation() {
    let nics = Mapping::default();
    let variables = Some(Path::new("/s/active/attempt-1/variables.fd"));
    let disks = placed(&["vda", "sdb"]);
    let in_source =
        RICH.replace("format='raw'>/var/lib/libvirt/qemu/nvram/rich_VARS.fd<", "type='file'><source file='/v'/><");
    for xml in [RICH, &in_source] {
        let placement = Placement { ram: None, disks: &disks, variables, nics: &nics };
        let made = transform(xml, &placement, &host(&[])).unwrap();
        for root in [&made.restore, &made.persistent] {
            assert_eq!(root.text_at("os/nvram").as_deref(), Some("/s/active/attempt-1/variables.fd"));
            let nvram = root.find("os/nvram").unwrap();
            assert!(nvram.elements().next().is_none() && nvram.attribute("type").is_none());
            assert_eq!(nvram.attribute("template"), Some("/usr/share/OVMF/OVMF_VARS_4M.ms.fd"));
        }
    }
}

#[test]
fn what_is_no_definition_is_refused() {
    let placement = Placement { ram: None, disks: &[], variables: None, nics: &Mapping::default() };
    for xml in ["", "<domain", "<network/>", "<domain type='kvm'><name>x</name></domain>"] {
        assert!(matches!(transform(xml, &placement, &host(&[])), Err(TransformError::Read(_))), "{xml:?}");
    }
}

#[test]
fn a_nic_goes_where_the_recovery_plan_says_and_stays_what_it_is() {
    let plan = "[[domain.proof.nic]]\nmac = \"52:54:00:aa:bb:01\"\nbridge = \"br-dmz\"\nvlan = 120\n\
                [[domain.proof.nic]]\nsource = \"lan\"\nnetwork = \"dr\"\n[[domain.proof.nic]]\nsource = \"eth0\"\nbridge = \"br-dr\"\n";
    let plan = vmdr_plan::Plan::parse(plan).unwrap().domain("proof", "").clone();
    let bridges = BTreeMap::from([("vmbr0".to_owned(), "br-old".to_owned())]);
    let nics = Mapping { plan: Some(plan), ..Mapping::from(bridges) };
    let more = "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan' portgroup='a' bridge='virbr0'/>\
                <vlan><tag id='5'/></vlan><model type='virtio'/></interface>\
                <interface type='direct'><mac address='52:54:00:00:00:02'/><source dev='eth0' mode='bridge'/><target dev='macvtap0'/>\
                <virtualport type='802.1Qbg'/><model type='e1000'/></interface>\
                <interface type='bridge'><mac address='52:54:00:00:00:03'/><source bridge='vmbr0'/><vlan><tag id='6'/></vlan></interface>\
                <interface type='user'><mac address='52:54:00:00:00:04'/></interface><controller type='virtio-serial'";
    let xml = Q35.replacen("<controller type='virtio-serial'", more, 1);
    let disks = placed(&["vda"]);
    let made =
        transform(&xml, &Placement { ram: None, disks: &disks, variables: None, nics: &nics }, &host(&[])).unwrap();
    let (gone, new) = difference(&Element::parse(&xml).unwrap(), &made.persistent);
    let of_nics = |lines: Vec<String>| -> Vec<String> {
        lines
            .into_iter()
            .filter_map(|l| Some(l.strip_prefix("/domain/devices/interface")?.trim_end().to_owned()))
            .collect()
    };
    let same = |mut a: Vec<String>, mut b: Vec<String>| {
        a.sort();
        b.sort();
        assert_eq!(a, b);
    };
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    same(
        of_nics(gone),
        lines(&[
            r#" [("type", "direct")]"#,
            r#"/source [("network", "lan"), ("portgroup", "a"), ("bridge", "virbr0")]"#,
            r#"/source [("dev", "eth0"), ("mode", "bridge")]"#,
            r#"/source [("bridge", "vmbr0")]"#,
            r#"/source [("bridge", "vmbr0")]"#,
            r#"/target [("dev", "macvtap0")]"#,
            r#"/virtualport [("type", "802.1Qbg")]"#,
            r#"/vlan/tag [("id", "5")]"#,
        ]),
    );
    same(
        of_nics(new),
        lines(&[
            r#"/source [("bridge", "br-dmz")]"#,
            r#"/source [("network", "dr")]"#,
            r#"/source [("bridge", "br-dr")]"#,
            r#"/source [("bridge", "br-old")]"#,
            r#"/vlan/tag [("id", "120")]"#,
        ]),
    );
}
