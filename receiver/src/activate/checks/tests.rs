use std::collections::BTreeMap;

use vmdr_proto::control::Severity;

use super::super::findings::refusals;
use super::super::host::fake::{CAPABILITIES, FakeHost};
use super::*;

const Q35: &str = include_str!("../testdata/q35.xml");
const RICH: &str = include_str!("../testdata/rich.xml");

fn run(xml: &str, host: &FakeHost) -> Vec<Finding> {
    let element = Element::parse(xml).unwrap();
    let domain = DomainXml::from_element(&element).unwrap();
    let mapping = Mapping::from(BTreeMap::from([("vmbr0".to_owned(), "br-dr".to_owned())]));
    check(&element, &domain, &mapping, host).unwrap()
}

fn host_for_q35() -> FakeHost {
    let files = [
        "/usr/bin/qemu-system-x86_64",
        "/var/lib/libvirt/images/vmlinuz",
        "/var/lib/libvirt/images/initrd.gz",
        "/var/log/libvirt/qemu",
    ];
    FakeHost {
        files: files.iter().map(Into::into).collect(),
        interfaces: ["br-dr".to_owned()].into(),
        ..FakeHost::default()
    }
}

#[test]
fn a_host_that_has_everything_is_fine() {
    assert_eq!(run(Q35, &host_for_q35()), []);
}

#[test]
fn a_limit_of_the_plan_is_looked_at_when_the_guest_is_activated() {
    let element = Element::parse(Q35).unwrap();
    let domain = DomainXml::from_element(&element).unwrap();
    let plan = vmdr_plan::Plan::parse("[domain.proof]\nmemory_limit = \"64MiB\"\n").unwrap();
    let plan = Some(plan.domain("proof", "").clone());
    let bridges = BTreeMap::from([("vmbr0".to_owned(), "br-dr".to_owned())]);
    let mapping = Mapping { bridges, plan, file: "plan.toml".to_owned(), ..Mapping::default() };
    let found = check(&element, &domain, &mapping, &host_for_q35()).unwrap();
    // How bad it is depends on the swap that this machine has.
    let limit: Vec<_> = found.iter().filter(|f| f.subject == "recovery plan").collect();
    let says = |f: &Finding| f.fact.starts_with("plan.toml:2:16: proof has 512 MiB of memory, the limit is 64 MiB");
    assert!(limit.iter().all(|f| f.severity() == Severity::Warning), "it refuses nothing: {found:?}");
    assert!(!limit.is_empty() && limit.iter().any(|f| says(f)), "{found:?}");
}

#[test]
fn each_thing_that_is_missing_is_named_with_a_remedy() {
    let other = Uuid::from_u128(9);
    type Change = Box<dyn Fn(&mut FakeHost)>;
    fn gone(file: &'static str) -> Change {
        Box::new(move |h| h.files.retain(|f| f != Path::new(file)))
    }
    let cases: Vec<(Change, &str, &str)> = vec![
        (Box::new(|h| h.machines.clear()), "machine type", "pc-q35-10.0"),
        (Box::new(|h| h.memory_available_bytes = Some(511 << 20)), "memory", "511 MiB left"),
        (Box::new(|h| h.interfaces.clear()), "interface 52:54:00:aa:bb:01", "bridge vmbr0 (here called br-dr)"),
        (gone("/var/lib/libvirt/images/vmlinuz"), "kernel", "vmlinuz"),
        (gone("/var/log/libvirt/qemu"), "serial", "proof-serial.log"),
        (Box::new(move |h| h.names = BTreeMap::from([("proof".to_owned(), other)])), "domain name", "another domain"),
    ];
    for (change, subject, fact) in cases {
        let mut host = host_for_q35();
        change(&mut host);
        let found = run(Q35, &host);
        let refused: Vec<_> = refusals(&found).collect();
        assert!(
            refused.iter().any(|f| f.subject == subject && f.fact.contains(fact) && !f.remedy.is_empty()),
            "{subject}, {fact}: {found:?}"
        );
    }
}

#[test]
fn cpu_features_are_refused_unless_libvirt_does_not_insist() {
    let mut host = host_for_q35();
    host.cpu = CpuFit::Lacks("Host CPU does not provide required features: avx2".to_owned());
    let found = run(Q35, &host);
    assert_eq!(refusals(&found).count(), 0);
    assert!(found.iter().any(|f| f.subject == "CPU" && f.fact.contains("avx2")), "{found:?}");
    let strict = Q35.replace("check='none'", "check='full'");
    assert!(refusals(&run(&strict, &host)).any(|f| f.subject == "CPU" && f.fact.contains("avx2")));
}

#[test]
fn networks_devices_and_firmware() {
    let mut host = FakeHost::default();
    let subjects = |host: &FakeHost| {
        let found = run(RICH, host);
        refusals(&found).map(|f| format!("{}: {}", f.subject, f.fact)).collect::<Vec<_>>()
    };
    let all = subjects(&host).join("\n");
    for part in [
        "interface 52:54:00:00:00:01: its bridge br0 is not",
        "interface 52:54:00:00:00:02: its libvirt network default is not on this host",
        "interface 52:54:00:00:00:03: its network device eno1",
        "firmware: /usr/share/OVMF/OVMF_CODE_4M.ms.fd",
        "serial: the directory of /var/log/guests/rich.log",
        "rng: /dev/urandom",
    ] {
        assert!(all.contains(part), "{part} is not in\n{all}");
    }
    host.networks.insert("default".to_owned(), NetworkState::Inactive);
    assert!(subjects(&host).join("\n").contains("default is not started"));
    host.networks.insert("default".to_owned(), NetworkState::Active);
    assert!(!subjects(&host).join("\n").contains("default"));
}

#[test]
fn confinement_is_a_warning() {
    let mut host = host_for_q35();
    host.capabilities = CAPABILITIES.replace("none", "apparmor");
    let found = run(Q35, &host);
    assert_eq!(refusals(&found).count(), 0);
    assert!(found.iter().any(|f| f.subject == "confinement" && f.remedy.contains("libvirt-qemu")), "{found:?}");
}

#[test]
fn owner_of_qemu() {
    let capabilities = Element::parse(CAPABILITIES).unwrap();
    assert_eq!(qemu_owner(&capabilities, "kvm"), Some((64055, 993)));
    assert_eq!(qemu_owner(&capabilities, "qemu"), Some((64056, 994)));
    assert_eq!(qemu_owner(&Element::new("capabilities"), "kvm"), None);
    let label = |l: &str| format!("<domain><seclabel type='static' model='dac'><label>{l}</label></seclabel></domain>");
    assert_eq!(demanded_owner(&Element::parse(&label("0:+7")).unwrap()), Some((0, 7)));
    assert_eq!(demanded_owner(&Element::parse(&label("qemu:kvm")).unwrap()), None);
    assert_eq!(demanded_owner(&Element::parse(RICH).unwrap()), None);
}

#[test]
fn what_the_recovery_plan_names_is_refused_by_its_place() {
    let check_plan = |text: &str, host: &FakeHost| {
        let element = Element::parse(Q35).unwrap();
        let domain = DomainXml::from_element(&element).unwrap();
        let plan = vmdr_plan::Plan::parse(text).unwrap().domain("proof", "").clone();
        let mapping = Mapping { plan: Some(plan), file: "plan.toml".to_owned(), ..Mapping::default() };
        let found = check(&element, &domain, &mapping, host).unwrap();
        refusals(&found).map(|f| f.fact.clone()).collect::<Vec<_>>()
    };
    let to = |target: &str| format!("[[domain.proof.nic]]\nsource = \"vmbr0\"\n{target}\n");
    let host = host_for_q35();
    assert_eq!(check_plan(&to("bridge = \"br-dr\"\nvlan = 7"), &host), [] as [&str; 0]);
    let gone = check_plan(&to("bridge = \"br-gone\""), &host);
    assert!(gone.len() == 1 && gone[0].contains("br-gone") && gone[0].contains("(plan.toml:3:10)"), "{gone:?}");
    let gone = check_plan(&to("network = \"dr\""), &host);
    assert!(gone.len() == 1 && gone[0].contains("network dr is not on this host (plan.toml:3:11)"), "{gone:?}");
    let flat = FakeHost { vlans: false, ..host_for_q35() };
    assert!(check_plan(&to("bridge = \"br-dr\"\nvlan = 7"), &flat)[0].contains("VLANs"));
}
