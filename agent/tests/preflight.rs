//! Preflight and `prepare` on a real libvirtd and QEMU, in namespaces of their own.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::process::{Command, Stdio};

use vmdr_agent::preflight::{self, DomainOptions, Finding, HostFacts, Severity, refusals};
use vmdr_hypervisor::domain_xml::add_qemu_arguments;
use vmdr_hypervisor::libvirt::{Connection, Domain, SYSTEM_URI};
use vmdr_hypervisor::xml::Element;

#[path = "../hypervisor/tests/support/namespaces.rs"]
mod namespaces;
use namespaces::wait_for;

const NAME: &str = "vmdr-preflight-test";
const DISK_BYTES: u64 = 16 << 20;
const OPTIONS: DomainOptions = DomainOptions { arena_bytes: 1 << 20, protected: false };

#[test]
fn doctor_and_prepare_on_a_real_libvirt() {
    namespaces::run("doctor_and_prepare_on_a_real_libvirt", inside);
}

fn inside() {
    let connection = wait_for("libvirtd", || Connection::open(SYSTEM_URI).ok());
    let facts = HostFacts::gather();
    let host = preflight::host::findings(&facts, Ok(&connection), OPTIONS.arena_bytes);
    assert_eq!(refusals(&host).collect::<Vec<_>>(), Vec::<&Finding>::new());
    for subject in ["libvirt", "QEMU", "memory", "permission to trace QEMU", "lock manager"] {
        assert!(host.iter().any(|f| f.subject == subject), "{subject} is not in {host:#?}");
    }
    let domain = define(&connection);
    let doctor = |domain: &Domain| preflight::domain::findings(domain, &facts, &OPTIONS);
    only_refusal(&doctor(&domain), "domain vmdr-preflight-test", "shut off");
    domain.start(false).unwrap();
    let before = (domain.live_xml().unwrap(), domain.inactive_xml().unwrap());
    let findings = doctor(&domain);
    assert_eq!(refusals(&findings).collect::<Vec<_>>(), Vec::<&Finding>::new());
    let monitor = findings.iter().find(|f| f.subject == "QMP socket").unwrap();
    assert_eq!(monitor.severity, Severity::Warning);
    assert!(monitor.remedy.contains("vmdr prepare vmdr-preflight-test"), "{monitor}");
    assert!(findings.contains(&Finding::ok("disk vda", "16 MiB")));
    // A doctor leaves the guest as it was.
    assert_eq!((domain.live_xml().unwrap(), domain.inactive_xml().unwrap()), before);
    probe(&domain);
    domain.suspend().unwrap();
    only_refusal(&doctor(&domain), "domain vmdr-preflight-test", "paused");
    domain.resume().unwrap();
    block_job(&domain, &doctor);
    prepare(&connection, &domain, &doctor);
    unknown_to_libvirt(&connection, &domain, &doctor);
    transient(&connection, &domain);
}

fn define(connection: &Connection) -> Domain {
    std::fs::File::create("/var/lib/libvirt/images/a.raw").unwrap().set_len(DISK_BYTES).unwrap();
    let definition = format!(
        "<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>64</memory>
           <os><type arch='x86_64' machine='q35'>hvm</type></os>
           <devices><disk type='file' device='disk'><driver name='qemu' type='raw'/>
             <source file='/var/lib/libvirt/images/a.raw'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    );
    connection.define(&Element::parse(&definition).unwrap()).unwrap()
}

fn only_refusal(findings: &[Finding], subject: &str, fact: &str) {
    let refusals: Vec<_> = refusals(findings).collect();
    assert_eq!(refusals.len(), 1, "{refusals:#?}");
    assert_eq!(refusals[0].subject, subject);
    assert!(refusals[0].fact.contains(fact), "{}", refusals[0]);
}

fn probe(domain: &Domain) {
    let request = preflight::probe_request(domain).unwrap();
    assert_eq!((request.memory_bytes, request.disk_bytes), (64 << 20, DISK_BYTES));
    assert_eq!((request.domain_name.as_str(), request.domain_uuid), (NAME, domain.uuid().to_string()));
    assert!(request.domain_xml.starts_with("<domain"));
}

fn block_job(domain: &Domain, doctor: &dyn Fn(&Domain) -> Vec<Finding>) {
    std::fs::File::create("/run/mirror.raw").unwrap().set_len(DISK_BYTES).unwrap();
    let socket = std::path::Path::new("/run/preflight.nbd");
    let mut server = Command::new("qemu-nbd")
        .args(["-k", "/run/preflight.nbd", "-x", "vda", "-f", "raw", "-t", "/run/mirror.raw"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the NBD server", || socket.exists().then_some(()));
    std::fs::set_permissions(socket, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    domain.block_copy_to_nbd("vda", socket, "vda", 0).unwrap();
    only_refusal(&doctor(domain), "disk vda", "block job (copy)");
    let protected = DomainOptions { protected: true, ..OPTIONS };
    let findings = preflight::domain::findings(domain, &HostFacts::gather(), &protected);
    assert_eq!(refusals(&findings).collect::<Vec<_>>(), Vec::<&Finding>::new());
    domain.block_job_abort("vda", true).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
}

fn prepare(connection: &Connection, domain: &Domain, doctor: &dyn Fn(&Domain) -> Vec<Finding>) {
    let first = preflight::prepare(connection, domain).unwrap();
    assert!(first.changed && first.restart_needed);
    assert_eq!(first.socket.to_str().unwrap(), format!("/var/lib/libvirt/qemu/vmdr-{}.qmp", domain.uuid()));
    let prepared = domain.inactive_xml().unwrap();
    let second = preflight::prepare(connection, domain).unwrap();
    assert!(!second.changed && second.restart_needed);
    assert_eq!(domain.inactive_xml().unwrap(), prepared);
    let findings = doctor(domain);
    let monitor = findings.iter().find(|f| f.subject == "QMP socket").unwrap();
    assert!(monitor.remedy.contains("shut the guest down and start it"), "{monitor}");
    domain.destroy().unwrap();
    assert!(!preflight::prepare(connection, domain).unwrap().restart_needed);
    domain.start(false).unwrap();
    let third = preflight::prepare(connection, domain).unwrap();
    assert!(!third.changed && !third.restart_needed);
    let findings = doctor(domain);
    let monitor = findings.iter().find(|f| f.subject == "QMP socket").unwrap();
    assert_eq!(monitor.severity, Severity::Ok, "{monitor}");
    assert_eq!(refusals(&findings).count(), 0);
    // Looking has not used the socket up: it still greets.
    let mut socket = std::os::unix::net::UnixStream::connect(&third.socket).unwrap();
    socket.set_read_timeout(Some(namespaces::LIMIT)).unwrap();
    let mut greeting = [0; 7];
    std::io::Read::read_exact(&mut socket, &mut greeting).unwrap();
    assert_eq!(&greeting, b"{\"QMP\":");
}

/// Devices that libvirt's definition does not show are found in QEMU: one that QEMU refuses to save, and one of which it
/// forgets the state without a word, which is why there is a list.
fn unknown_to_libvirt(connection: &Connection, domain: &Domain, doctor: &dyn Fn(&Domain) -> Vec<Finding>) {
    let plain = domain.inactive_xml().unwrap();
    for (arguments, model, blocks) in [
        (&["-device", "edu,bus=pcie.0,addr=0x1d"][..], "edu", false),
        (
            &[
                "-object",
                "memory-backend-ram,id=m1,size=1M,share=on",
                "-device",
                "ivshmem-plain,memdev=m1,master=off,bus=pcie.0,addr=0x1d",
            ],
            "ivshmem-plain",
            true,
        ),
    ] {
        domain.destroy().unwrap();
        let mut definition = plain.clone();
        add_qemu_arguments(&mut definition, arguments);
        connection.define(&definition).unwrap();
        domain.start(false).unwrap();
        let findings = doctor(domain);
        let has = |subject: &str| refusals(&findings).any(|f| f.subject.contains(subject));
        assert!(has(&format!("QEMU device {model}")), "{findings:#?}");
        assert_eq!(has("saving the guest's state"), blocks, "{findings:#?}");
    }
    domain.destroy().unwrap();
}

fn transient(connection: &Connection, domain: &Domain) {
    let definition = domain.inactive_xml().unwrap();
    domain.undefine().unwrap();
    let domain = connection.create(&definition, false).unwrap();
    let error = preflight::prepare(connection, &domain).unwrap_err();
    assert!(error.to_string().contains("transient"), "{error}");
    domain.destroy().unwrap();
}
