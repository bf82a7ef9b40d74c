//! Against a real libvirtd and QEMU, started for this test alone in namespaces of their own (`support/namespaces.rs`).
#![allow(clippy::unwrap_used, clippy::panic)]

use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use vmdr_hypervisor::block::BlockJobKind;
use vmdr_hypervisor::domain_xml::{DomainXml, add_own_qmp_socket, own_qmp_socket, remove_own_qmp_socket};
use vmdr_hypervisor::events::{BlockJobStatus, Disconnect, DomainEvent, Event, EventStream, Lifecycle};
use vmdr_hypervisor::libvirt::{
    Connection, CpuComparison, Domain, DomainFilter, DomainState, RestoreState, SYSTEM_URI,
};
use vmdr_hypervisor::xml::Element;

#[path = "support/namespaces.rs"]
mod namespaces;
use namespaces::{LIMIT, wait_for};

const UUID: &str = "41111111-1111-4111-8111-1111111111aa";
const NAME: &str = "vmdr-hypervisor-test";
const DISK_BYTES: u64 = 16 << 20;

#[test]
fn everything_on_a_real_libvirt() {
    namespaces::run("everything_on_a_real_libvirt", inside);
}

fn inside() {
    let connection = wait_for("libvirtd", || Connection::open(SYSTEM_URI).ok());
    let events_connection = Connection::open(SYSTEM_URI).unwrap();
    let events = events_connection.events().unwrap();
    host(&connection);
    not_found(&connection);
    let domain = start(&connection, &events);
    definitions(&connection, &domain);
    monitor(&domain);
    pause_and_resume(&domain, &events);
    mirror(&domain, &events);
    save_and_restore(&connection, &domain);
    prepare(&connection, &domain, &events);
    domain.undefine().unwrap();
    assert!(connection.domain(NAME).unwrap_err().is_no_such_domain());
    assert_eq!(events.lost(), 0);
    disconnect(&connection, &events);
}

fn host(connection: &Connection) {
    assert!(connection.is_alive());
    assert!(connection.libvirt_version().unwrap().major >= 6);
    assert!(connection.qemu_version().unwrap().major >= 8);
    assert!(!connection.host_name().unwrap().is_empty());
    let memory = connection.node_memory().unwrap();
    assert!(memory.free_bytes > 0 && memory.free_bytes < memory.total_bytes);
    let capabilities = connection.capabilities().unwrap();
    let cpu = capabilities.find("host/cpu").unwrap();
    assert_eq!(connection.compare_cpu(cpu).unwrap(), CpuComparison::Identical);
    let of_domains = connection.domain_capabilities(None, "x86_64", Some("q35"), "qemu").unwrap();
    assert!(of_domains.text_at("machine").unwrap().starts_with("pc-q35-"));
    let error = connection.domain_capabilities(None, "x86_64", Some("pc-q35-99.9"), "qemu").unwrap_err();
    assert!(error.to_string().contains("pc-q35-99.9"), "{error}");
}

fn not_found(connection: &Connection) {
    for wanted in [NAME, UUID, "", "a/b"] {
        let error = connection.domain(wanted).unwrap_err();
        assert!(error.is_no_such_domain(), "{wanted:?}: {error}");
        assert!(error.to_string().contains("virsh"), "{error}");
    }
    assert!(!connection.domain("a\0b").unwrap_err().is_no_such_domain());
    let error = Connection::open("qemu:///nonsense").unwrap_err();
    assert!(error.is_connection(), "{error}");
}

fn start(connection: &Connection, events: &EventStream) -> Domain {
    std::fs::File::create("/var/lib/libvirt/images/a.raw").unwrap().set_len(DISK_BYTES).unwrap();
    let definition = format!(
        "<domain type='qemu'><name>{NAME}</name><uuid>{UUID}</uuid><memory unit='MiB'>64</memory>
           <os><type arch='x86_64' machine='q35'>hvm</type></os>
           <devices><disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>
             <source file='/var/lib/libvirt/images/a.raw'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    );
    let domain = connection.define(&Element::parse(&definition).unwrap()).unwrap();
    assert_eq!(domain.state().unwrap().0, DomainState::ShutOff);
    assert_eq!(domain.id().unwrap(), None);
    assert!(domain.is_persistent().unwrap());
    let error = domain.qemu_pid().unwrap_err();
    assert!(error.to_string().contains("not running"), "{error}");
    assert!(domain.suspend().unwrap_err().is_wrong_state());
    domain.set_autostart(true).unwrap();
    assert!(domain.autostart().unwrap());
    domain.set_autostart(false).unwrap();
    assert!(!domain.autostart().unwrap());
    domain.start(true).unwrap();
    assert_eq!(domain.state().unwrap().0, DomainState::Paused);
    domain.resume().unwrap();
    expect(events, |e| matches!(e, DomainEvent::Lifecycle { change: Lifecycle::Started, .. }));
    expect(events, |e| matches!(e, DomainEvent::Lifecycle { change: Lifecycle::Resumed, .. }));
    assert_eq!(connection.domains(DomainFilter::Active).unwrap().len(), 1);
    assert_eq!(connection.domain(UUID).unwrap().name(), NAME);
    assert!(domain.id().unwrap().is_some());
    assert_eq!(domain.disk_bytes("vda").unwrap(), DISK_BYTES);
    domain
}

fn definitions(connection: &Connection, domain: &Domain) {
    for xml in [domain.live_xml(), domain.migratable_xml(), domain.inactive_xml()] {
        let xml = xml.unwrap();
        assert_eq!(Element::parse(&xml.to_string()).unwrap(), xml);
        let domain = DomainXml::from_element(&xml).unwrap();
        assert_eq!((domain.memory_bytes, domain.uuid.to_string().as_str()), (64 << 20, UUID));
        assert_eq!(domain.disks.len(), 1);
    }
    assert!(DomainXml::from_element(&domain.live_xml().unwrap()).unwrap().id.is_some());
    // What is written is what was read: defining it again changes nothing.
    let before = domain.inactive_xml().unwrap();
    connection.define(&before).unwrap();
    assert_eq!(domain.inactive_xml().unwrap(), before);
}

fn monitor(domain: &Domain) {
    let version = domain.qmp("query-version", Value::Null).unwrap();
    assert!(version["qemu"]["major"].as_u64().unwrap() >= 8);
    assert!(domain.hmp("info ramblock").unwrap().contains("pc.ram"));
    let error = domain.qmp("no-such-command", json!({})).unwrap_err();
    assert!(error.to_string().contains("CommandNotFound"), "{error}");
    // The process, and a descriptor that QEMU can write to.
    let pid = domain.qemu_pid().unwrap();
    assert!(std::fs::read_link(format!("/proc/{pid}/exe")).unwrap().to_string_lossy().contains("qemu"));
    let file = tempfile::NamedTempFile::new_in("/run").unwrap();
    let write_only = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
    let reply = domain.qmp_with_files("add-fd", json!({ "fdset-id": 7 }), &[write_only.as_fd()]).unwrap();
    assert_eq!(reply["fdset-id"], 7);
    domain.qmp("stop", Value::Null).unwrap();
    domain.qmp("xen-save-devices-state", json!({ "filename": "/dev/fdset/7", "live": false })).unwrap();
    domain.qmp("cont", Value::Null).unwrap();
    domain.qmp("remove-fd", json!({ "fdset-id": 7 })).unwrap();
    let state = std::fs::read(file.path()).unwrap();
    assert_eq!(&state[..4], b"QEVM");
}

fn pause_and_resume(domain: &Domain, events: &EventStream) {
    domain.suspend().unwrap();
    expect(events, |e| matches!(e, DomainEvent::Lifecycle { change: Lifecycle::Suspended, detail: 0 }));
    assert_eq!(domain.state().unwrap().0, DomainState::Paused);
    domain.resume().unwrap();
    expect(events, |e| matches!(e, DomainEvent::Lifecycle { change: Lifecycle::Resumed, .. }));
    assert_eq!(domain.state().unwrap().0, DomainState::Running);
    domain.qmp("system_reset", Value::Null).unwrap();
    expect(events, |e| *e == DomainEvent::Rebooted);
}

fn mirror(domain: &Domain, events: &EventStream) {
    let socket = Path::new("/run/vmdr-test.nbd");
    std::fs::File::create("/run/mirror.raw").unwrap().set_len(DISK_BYTES).unwrap();
    let error = domain.block_copy_to_nbd("vda", socket, "vda", 0).unwrap_err();
    assert!(error.to_string().contains("vda"), "{error}");
    let mut server = Command::new("qemu-nbd")
        .args(["-k", "/run/vmdr-test.nbd", "-x", "vda", "-f", "raw", "-t", "-e", "4", "/run/mirror.raw"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the NBD server", || socket.exists().then_some(()));
    let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(socket, everyone).unwrap();
    assert_eq!(domain.block_job("vda").unwrap(), None);
    domain.block_copy_to_nbd("vda", socket, "vda", 1 << 30).unwrap();
    expect(events, |e| *e == DomainEvent::BlockJob { disk: "vda".into(), status: BlockJobStatus::Ready });
    let job = domain.block_job("vda").unwrap().unwrap();
    assert_eq!((job.kind, job.current, job.bandwidth_bytes), (BlockJobKind::Copy, job.end, 1 << 30));
    let jobs = domain.qmp("query-block-jobs", Value::Null).unwrap();
    assert_eq!(jobs[0]["ready"], true);
    let live = DomainXml::from_element(&domain.live_xml().unwrap()).unwrap();
    assert_eq!(live.disks[0].mirror.as_deref(), Some("copy"));
    let error = domain.block_copy_to_nbd("vda", socket, "vda", 0).unwrap_err();
    assert!(error.to_string().contains("block"), "{error}");
    domain.block_job_abort("vda", true).unwrap();
    assert_eq!(domain.block_job("vda").unwrap(), None);
    domain.block_job_abort("vda", true).unwrap();
    assert!(domain.block_job_abort("vdz", true).is_err());
    server.kill().unwrap();
    server.wait().unwrap();
}

fn save_and_restore(connection: &Connection, domain: &Domain) {
    let image = Path::new("/var/lib/libvirt/images/a.save");
    let status = Command::new("virsh").args(["-q", "-c", SYSTEM_URI, "save", NAME]).arg(image).status().unwrap();
    assert!(status.success());
    let error = connection.restore(Path::new("/nonsense"), None, RestoreState::Running).unwrap_err();
    assert!(error.to_string().contains("/nonsense"), "{error}");
    connection.restore(image, None, RestoreState::Paused).unwrap();
    assert_eq!(domain.state().unwrap().0, DomainState::Paused);
    domain.destroy().unwrap();
    let xml = domain.migratable_xml().unwrap();
    connection.restore(image, Some(&xml), RestoreState::Running).unwrap();
    assert_eq!(domain.state().unwrap().0, DomainState::Running);
}

fn prepare(connection: &Connection, domain: &Domain, events: &EventStream) {
    let mut xml = domain.inactive_xml().unwrap();
    let before = xml.clone();
    assert_eq!(own_qmp_socket(&xml), None);
    assert!(add_own_qmp_socket(&mut xml).unwrap());
    connection.define(&xml).unwrap();
    let mut xml = domain.inactive_xml().unwrap();
    let socket = own_qmp_socket(&xml).unwrap();
    assert!(!add_own_qmp_socket(&mut xml).unwrap());
    assert_eq!(own_qmp_socket(&domain.live_xml().unwrap()), None);
    domain.destroy().unwrap();
    expect(events, |e| matches!(e, DomainEvent::Lifecycle { change: Lifecycle::Stopped, .. }));
    domain.start(false).unwrap();
    assert_eq!(own_qmp_socket(&domain.live_xml().unwrap()), Some(socket.clone()));
    std::os::unix::net::UnixStream::connect(&socket).unwrap();
    assert!(remove_own_qmp_socket(&mut xml));
    connection.define(&xml).unwrap();
    assert_eq!(domain.inactive_xml().unwrap(), before);
    domain.destroy().unwrap();
}

/// A libvirtd that hangs is noticed by its silence: a call does not wait forever, and the stream of events ends.
fn disconnect(connection: &Connection, events: &EventStream) {
    let pid: i32 = std::fs::read_to_string("/run/libvirtd.pid").unwrap().trim().parse().unwrap();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
    signal("-STOP");
    let error = connection.libvirt_version().unwrap_err();
    assert!(error.is_connection(), "{error}");
    assert!(!connection.is_alive());
    let started = Instant::now();
    loop {
        let left = LIMIT.saturating_sub(started.elapsed());
        if let Event::Disconnected(reason) = events.next_timeout(left).unwrap() {
            assert_eq!(reason, Disconnect::KeepAlive);
            break;
        }
    }
    signal("-CONT");
    Connection::open(SYSTEM_URI).unwrap().libvirt_version().unwrap();
}

/// Takes events until one is as wanted.
fn expect(events: &EventStream, wanted: impl Fn(&DomainEvent) -> bool) {
    let started = Instant::now();
    let mut seen = Vec::new();
    while let Ok(event) = events.next_timeout(LIMIT.saturating_sub(started.elapsed())) {
        if let Event::Domain { uuid, name, event } = &event {
            assert_eq!((uuid.to_string().as_str(), name.as_str()), (UUID, NAME));
            if wanted(event) {
                return;
            }
        }
        seen.push(event);
    }
    panic!("the event did not come; seen: {seen:#?}");
}
