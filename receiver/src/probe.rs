//! Whether a guest could be stored and run here: what an agent asks at `protect`, before anything is changed.
//!
//! The answers come from the same checks as an activation's ([`crate::activate::checks`], [`crate::activate::xml`]), so that
//! what would fail on the day of the disaster is refused now.

use std::path::{Path, PathBuf};

use tonic::Status;
use uuid::Uuid;
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::xml::Element;
use vmdr_proto::REPLICATION_VERSION;
use vmdr_proto::control::Finding;
use vmdr_proto::replication::{ProbeReply, ProbeRequest, Refusal};

use crate::activate::findings::{refusals, refused};
use crate::activate::host::{CpuFit, Host, LocalHost};
use crate::activate::mapping::Mapping;
use crate::activate::record::Step;
use crate::activate::xml::{PlacedDisk, Placement, transform};
use crate::activate::{checks, files, record::RecordError};
use crate::daemon::Receiver;
use crate::recovery;
use crate::store::Position;
use crate::takeover;

/// Answers a probe. Blocks while libvirt and the disk answer. One without a domain asks for versions only.
pub fn probe(receiver: &Receiver, request: &ProbeRequest) -> Result<ProbeReply, Status> {
    let uuid = match request.domain_uuid.as_str() {
        "" if request.domain_xml.is_empty() => None,
        uuid => Some(takeover::parse(uuid)?),
    };
    let host = LocalHost::connect(&receiver.config.libvirt_uri).map_err(|e| Status::unavailable(e.to_string()))?;
    let mut found = Vec::new();
    if request.protocol_version != REPLICATION_VERSION {
        found.push(refused(
            "protocol",
            &format!("version {} is not spoken here, {REPLICATION_VERSION} is", request.protocol_version),
            "upgrade the older side",
        ));
    }
    let position = match uuid {
        None => Position::default(),
        Some(uuid) => check_domain(receiver, request, uuid, &host, &mut found)?,
    };
    let connection = host.connection();
    let reply = ProbeReply {
        protocol_version: REPLICATION_VERSION,
        receiver_version: env!("CARGO_PKG_VERSION").to_owned(),
        qemu_version: connection.qemu_version().map_err(unavailable)?.to_string(),
        libvirt_version: connection.libvirt_version().map_err(unavailable)?.to_string(),
        refusals: refusals(&found)
            .map(|f| Refusal { subject: f.subject.clone(), fact: f.fact.clone(), remedy: f.remedy.clone() })
            .collect(),
        position: Some(position.into()),
    };
    let (domain, uuid) = (&request.domain_name, &request.domain_uuid);
    tracing::info!(%domain, %uuid, refusals = reply.refusals.len(), "probed");
    Ok(reply)
}

fn unavailable(error: vmdr_hypervisor::Error) -> Status {
    Status::unavailable(format!("the receiver's libvirt: {error}"))
}

fn check_domain(
    receiver: &Receiver,
    request: &ProbeRequest,
    uuid: Uuid,
    host: &dyn Host,
    found: &mut Vec<Finding>,
) -> Result<Position, Status> {
    let position = match receiver.store.position(&uuid.to_string()) {
        Ok(position) => position,
        Err(error) => {
            let remedy = "repair it, or remove it with `vmdr forget` at the backup site";
            found.push(refused("stored state", &error.to_string(), remedy));
            Position::default()
        }
    };
    check_space(receiver, request, uuid, position, found)?;
    match files::closed_above(&receiver.config.state_dir) {
        Ok(None) => {}
        Ok(Some(closed)) => {
            let closed = closed.display();
            let fact = format!("QEMU's user cannot enter {closed} at the backup site, which the state directory is in");
            found.push(refused("state directory", &fact, &format!("`chmod o+x {closed}`, or move state_dir")));
        }
        Err(error) => return Err(Status::internal(error.to_string())),
    }
    let step = receiver.active_directory(uuid).read(uuid).map(|r| r.map(|r| r.step));
    check_activation(step, found);
    let mapping = recovery::mapping(&receiver.config, &request.domain_name, &uuid.to_string());
    check_guest(request, uuid, &mapping, host, found).map_err(unavailable)?;
    Ok(position)
}

/// A new seed grows beside the standby that there is: both must fit.
fn check_space(
    receiver: &Receiver,
    request: &ProbeRequest,
    uuid: Uuid,
    position: Position,
    found: &mut Vec<Finding>,
) -> Result<(), Status> {
    let free = receiver.free_bytes().map_err(|e| Status::internal(format!("measure the state directory: {e}")))?;
    let stored = match position.epoch {
        0 => 0,
        _ => receiver.store.points(&uuid.to_string()).ok().and_then(|p| p.first().map(|p| p.bytes)).unwrap_or(0),
    };
    let copies = if position.epoch > 0 { 2 } else { 1 };
    let needed = request.memory_bytes.saturating_add(request.disk_bytes).saturating_mul(copies);
    let room = free.saturating_sub(receiver.config.space_reserve_bytes).saturating_add(stored);
    if needed > room {
        let times = if copies == 2 { ", twice, because a new copy grows beside the one there is" } else { "" };
        let fact = format!(
            "memory and disks take up to {} MiB{times}; {} has {} MiB for it",
            needed >> 20,
            receiver.config.state_dir.display(),
            room >> 20
        );
        found.push(refused("space", &fact, "free space there, or move state_dir to a larger file system"));
    }
    Ok(())
}

/// What a guest with its host's own CPU uses is not in its definition; what its host has is the most that it can be.
fn check_host_cpu(
    request: &ProbeRequest,
    domain: &DomainXml,
    host: &dyn Host,
    found: &mut Vec<Finding>,
) -> Result<(), vmdr_hypervisor::Error> {
    let mode = domain.cpu.as_ref().and_then(|cpu| cpu.attribute("mode")).unwrap_or_default();
    if domain.virt_type != "kvm" || !matches!(mode, "host-passthrough" | "maximum") || request.host_cpu_xml.is_empty() {
        return Ok(());
    }
    let Ok(cpu) = Element::parse(&request.host_cpu_xml) else { return Ok(()) };
    if let CpuFit::Lacks(what) = host.host_cpu_fits(&cpu)? {
        let remedy = "give the guest a CPU model that both hosts have (`virsh cpu-baseline`), and restart it";
        found.push(refused("CPU", &format!("the guest has mode='{mode}', and {what}"), remedy));
    }
    Ok(())
}

fn check_activation(step: Result<Option<Step>, RecordError>, found: &mut Vec<Finding>) {
    let remedy = "end it there and `vmdr forget` it at that site, if what it has done since is not needed";
    match step {
        Ok(None | Some(Step::Planned { .. })) => {}
        Ok(Some(Step::Running { .. } | Step::Restoring { .. })) => {
            found.push(refused("domain", "it was activated at the backup site, which owns it now", remedy));
        }
        Ok(Some(Step::Fenced { .. })) => {
            found.push(refused("domain", "an activation was begun at the backup site: this host is fenced", remedy));
        }
        Err(error) => found.push(refused("activation record", &error.to_string(), remedy)),
    }
}

fn check_guest(
    request: &ProbeRequest,
    uuid: Uuid,
    mapping: &Mapping,
    host: &dyn Host,
    found: &mut Vec<Finding>,
) -> Result<(), vmdr_hypervisor::Error> {
    let parsed = Element::parse(&request.domain_xml).map_err(|e| e.to_string()).and_then(|element| {
        let domain = DomainXml::from_element(&element).map_err(|e| e.to_string())?;
        Ok((element, domain))
    });
    let (element, domain) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            found.push(refused("domain XML", &error, "report this: libvirt at the protected host has written it"));
            return Ok(());
        }
    };
    if domain.uuid != uuid {
        let fact = format!("the XML is of {}, the request is about {uuid}", domain.uuid);
        found.push(refused("domain XML", &fact, "report this: the agent has mixed up two domains"));
    }
    if host.guest(uuid)?.is_some_and(|g| g.state.is_active()) {
        found.push(refused(
            "domain",
            "a guest of this UUID runs at the backup site",
            "stop one of the two: two guests with the same identity must not run",
        ));
    }
    found.extend(checks::check(&element, &domain, mapping, host)?);
    check_host_cpu(request, &domain, host, found)?;
    // Every disk that can be written will be in the standby; where exactly does not matter for the question.
    let disks: Vec<PlacedDisk> = domain
        .disks
        .iter()
        .filter(|d| d.is_writable())
        .map(|d| PlacedDisk {
            target: d.target.clone(),
            overlay: PathBuf::from("/overlay"),
            base: PathBuf::from("/base"),
        })
        .collect();
    let variables = domain.firmware.nvram.is_some().then_some(Path::new("/variables"));
    let placement = Placement { ram: None, disks: &disks, variables, nics: mapping };
    match transform(&request.domain_xml, &placement, host) {
        Ok(made) => found.extend(made.findings),
        Err(error) => found.push(refused("domain XML", &error.to_string(), "report this")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activate::host::Guest;
    use crate::activate::host::fake::FakeHost;
    use crate::activate::record::PointId;
    use vmdr_hypervisor::libvirt::DomainState;

    const Q35: &str = include_str!("activate/testdata/q35.xml");
    const UUID: &str = "22222222-1111-4111-8111-111111111111";

    fn host() -> FakeHost {
        let files = [
            "/usr/bin/qemu-system-x86_64",
            "/var/lib/libvirt/images/vmlinuz",
            "/var/lib/libvirt/images/initrd.gz",
            "/var/log/libvirt/qemu",
        ];
        let interfaces = ["vmbr0".to_owned()].into();
        FakeHost { files: files.iter().map(PathBuf::from).collect(), interfaces, ..FakeHost::default() }
    }

    fn ask(xml: &str, host: &FakeHost) -> Vec<String> {
        let uuid = Uuid::parse_str(UUID).unwrap();
        let request =
            ProbeRequest { domain_uuid: UUID.to_owned(), domain_xml: xml.to_owned(), ..ProbeRequest::default() };
        let mut found = Vec::new();
        check_guest(&request, uuid, &Mapping::default(), host, &mut found).unwrap();
        refusals(&found).map(|f| format!("{}: {}", f.subject, f.fact)).collect()
    }

    #[test]
    fn a_guest_that_fits_is_not_refused() {
        assert_eq!(ask(Q35, &host()), [] as [&str; 0]);
    }

    #[test]
    fn what_would_fail_later_is_refused_now() {
        let no_bridge = FakeHost { interfaces: [].into(), ..host() };
        assert!(ask(Q35, &no_bridge)[0].contains("vmbr0"));
        let another = Q35.replace(UUID, "32222222-1111-4111-8111-111111111111");
        assert!(ask(&another, &host())[0].starts_with("domain XML: the XML is of 32222222"));
        assert!(ask("<domain", &host())[0].starts_with("domain XML: "));
        let read_only = Q35.replace("<serial>LUN0001</serial>", "<readonly/>");
        assert!(ask(&read_only, &host())[0].starts_with("disk vda: its read-only image"));
        let running = host();
        let guest = Guest { state: DomainState::Running, persistent: true, disk_files: Vec::new() };
        running.libvirt.lock().unwrap().guest = Some(guest);
        assert!(ask(Q35, &running)[0].contains("runs at the backup site"));
    }

    #[test]
    fn a_guest_with_its_hosts_own_cpu_needs_all_of_it() {
        let rich = include_str!("activate/testdata/rich.xml");
        let domain = DomainXml::parse(rich).unwrap();
        let asked = |host: &FakeHost, xml: &str| {
            let request = ProbeRequest { host_cpu_xml: xml.to_owned(), ..ProbeRequest::default() };
            let mut found = Vec::new();
            check_host_cpu(&request, &domain, host, &mut found).unwrap();
            found.len()
        };
        let poor = FakeHost { host_cpu: CpuFit::Lacks("avx512f".to_owned()), ..host() };
        assert_eq!((asked(&poor, "<cpu/>"), asked(&host(), "<cpu/>"), asked(&poor, "")), (1, 0, 0));
    }

    #[test]
    fn a_domain_that_was_activated_here_is_not_taken_over() {
        let refused = |step| {
            let mut found = Vec::new();
            check_activation(step, &mut found);
            found.len()
        };
        let point = PointId { generation: 1, epoch: 1, cut_unix_ns: 1 };
        assert_eq!(refused(Ok(None)), 0);
        assert_eq!(refused(Ok(Some(Step::Planned { generation: 2 }))), 0);
        assert_eq!(refused(Ok(Some(Step::Fenced { generation: 2, point, attempt: 1 }))), 1);
        let step = Step::Restoring { generation: 2, point, attempt: 1, overlays: Vec::new() };
        assert_eq!(refused(Ok(Some(step))), 1);
        let why = "it is torn".to_owned();
        assert_eq!(refused(Err(RecordError::Damaged { path: PathBuf::from("/x"), why })), 1);
    }
}
