//! Whether a running domain can be protected.
//!
//! Only reads: libvirt's definition of it, and questions to QEMU through libvirt's monitor passthrough (for which libvirt
//! marks the domain as tainted).

use std::fs::File;
use std::path::Path;

use serde_json::Value;
use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{DomainXml, own_qmp_socket};
use vmdr_hypervisor::libvirt::{Domain, DomainState};
use vmdr_hypervisor::xml::Element;

use super::host::{QEMU_MIN, mib};
use super::{Finding, HostFacts, confinement, devices, disks, memory, qemu_devices, refusals};

/// The shortest interval between cuts through libvirt's monitor passthrough, in milliseconds: other API calls may come
/// between its commands, and it costs some milliseconds more.
pub const PASSTHROUGH_INTERVAL_MS_MIN: u32 = 1000;

/// What matters besides the domain itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DomainOptions {
    /// Memory for its checkpoints, in bytes.
    pub arena_bytes: u64,
    /// vmdr protects it already: the block jobs on its disks, and the client of its socket, are vmdr's.
    pub protected: bool,
}

/// Everything about a domain. `host`: as gathered a moment ago.
pub fn findings(domain: &Domain, host: &HostFacts, options: &DomainOptions) -> Vec<Finding> {
    let subject = format!("domain {}", domain.name());
    let (state, root) = match domain.state().and_then(|(state, _)| Ok((state, domain.live_xml()?))) {
        Ok(found) => found,
        Err(e) => return vec![unreadable(&subject, &e)],
    };
    let mut findings = vec![running(&subject, state)];
    findings.extend(definition(&root, host, options));
    if state.is_active() {
        findings.push(monitor(domain, &root, options));
        findings.push(process(domain));
        findings.extend(qemu(domain));
        findings.extend(disk_sizes(domain, &root));
    }
    findings
}

/// What a live definition alone tells. (A lock manager is the host's finding: [`super::locks`].)
pub fn definition(root: &Element, host: &HostFacts, options: &DomainOptions) -> Vec<Finding> {
    let domain = match DomainXml::from_element(root) {
        Ok(domain) => domain,
        Err(e) => return vec![unreadable("definition", &e.into())],
    };
    let mut findings = memory::machine(&domain, root, host);
    findings.extend(memory::memory(&domain, host, options.arena_bytes));
    findings.extend(devices::devices(&domain, host));
    findings.extend(disks::disks(&domain, options.protected));
    findings.extend(memory::arguments(&domain));
    findings.extend(confinement::findings(&domain.confined_by, host.apparmor_rules));
    findings
}

fn unreadable(subject: &str, error: &Error) -> Finding {
    Finding::refused(subject, error.to_string(), "see libvirt's log; restart libvirtd if it does not answer")
}

fn running(subject: &str, state: DomainState) -> Finding {
    match state {
        DomainState::Running => Finding::ok(subject, "running"),
        DomainState::ShutOff => Finding::refused(
            subject,
            "it is shut off: only a running guest has memory to protect",
            "start it: virsh start",
        ),
        DomainState::Paused => Finding::refused(
            subject,
            "it is paused, and vmdr never resumes a guest that somebody else paused",
            "resume it: virsh resume",
        ),
        other => Finding::refused(subject, format!("it is {other}"), "wait until it runs, or start it anew"),
    }
}

/// By which way vmdr can talk to QEMU.
fn monitor(domain: &Domain, live: &Element, options: &DomainOptions) -> Finding {
    let subject = "QMP socket";
    let Some(socket) = own_qmp_socket(live) else {
        let prepared = domain.inactive_xml().ok().and_then(|x| own_qmp_socket(&x)).is_some();
        let remedy = if prepared {
            "it is in the definition for the next start: shut the guest down and start it".to_owned()
        } else {
            format!("run `vmdr prepare {}`, then shut the guest down and start it", domain.name())
        };
        let fact = format!(
            "none of its own: intervals of {PASSTHROUGH_INTERVAL_MS_MIN} ms and more only, through libvirt's monitor"
        );
        return Finding::warning(subject, fact, remedy);
    };
    let path = socket.display();
    if options.protected {
        return Finding::ok(subject, format!("{path}, in use by vmdr"));
    }
    // Not connected to: the socket serves one client, and a greeting that nobody reads would be in the way of the next.
    if std::fs::symlink_metadata(&socket).is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type())) {
        return Finding::ok(subject, path.to_string());
    }
    Finding::refused(
        subject,
        format!("{path} is in the definition, but there is no such socket"),
        "shut the guest down and start it",
    )
}

/// Whether the process can be found and looked into, as the dirty log needs it.
fn process(domain: &Domain) -> Finding {
    let subject = "QEMU process";
    let pid = match domain.qemu_pid() {
        Ok(pid) => pid,
        Err(e) => {
            let remedy = "run vmdr-agent in the same mount and PID namespace as libvirtd";
            return Finding::refused(subject, e.to_string(), remedy);
        }
    };
    // Opening another process's memory asks for the same permission as tracing it does.
    for name in ["mem", "pagemap"] {
        let path = format!("/proc/{pid}/{name}");
        if let Err(e) = File::open(Path::new(&path)) {
            return Finding::refused(
                subject,
                format!("open {path}: {e}"),
                "run vmdr-agent as root with CAP_SYS_PTRACE",
            );
        }
    }
    Finding::ok(subject, format!("{pid}, may be traced"))
}

/// What QEMU itself says: its version, what it has, what keeps it from being saved.
fn qemu(domain: &Domain) -> Vec<Finding> {
    let mut findings = Vec::new();
    match ask(domain, "query-version", Value::Null) {
        Ok(version) => findings.push(running_version(&version)),
        Err(finding) => return vec![finding],
    }
    match ask(domain, "query-migrate", Value::Null) {
        Ok(reply) => findings.extend(blocked(&reply)),
        Err(finding) => findings.push(finding),
    }
    for path in qemu_devices::PATHS {
        match ask(domain, "qom-list", serde_json::json!({ "path": path })) {
            Ok(listing) => findings.extend(qemu_devices::devices(path, &listing)),
            Err(finding) => findings.push(finding),
        }
    }
    findings.push(match domain.hmp("info ramblock").map(|text| vmdr_shim::ramblock::parse(&text)) {
        Ok(Ok(blocks)) => Finding::ok("guest memory", format!("QEMU tells where its {} RAM blocks are", blocks.len())),
        Ok(Err(e)) => Finding::refused("guest memory", e.to_string(), "use QEMU >= 8.2 and start the guest anew"),
        Err(e) => unreadable("guest memory", &e),
    });
    if refusals(&findings).next().is_none() {
        findings.push(Finding::ok("QEMU's devices", "all on the list"));
    }
    findings
}

fn ask(domain: &Domain, command: &str, arguments: Value) -> Result<Value, Finding> {
    domain.qmp(command, arguments).map_err(|e| unreadable("QEMU's monitor", &e))
}

fn running_version(reply: &Value) -> Finding {
    let number = |name: &str| reply.get("qemu").and_then(|q| q.get(name)).and_then(Value::as_u64);
    let (Some(major), Some(minor), Some(micro)) = (number("major"), number("minor"), number("micro")) else {
        let remedy = "report this as a defect of vmdr";
        return Finding::refused("QEMU", format!("query-version answered {reply}"), remedy);
    };
    let version = format!("{major}.{minor}.{micro}");
    if (major, minor) < (u64::from(QEMU_MIN.0), u64::from(QEMU_MIN.1)) {
        return Finding::refused(
            "QEMU",
            format!(
                "the guest runs in QEMU {version}, which does not say where guest memory is or whether a mirror is synced"
            ),
            "install QEMU >= 8.2, then shut the guest down and start it",
        );
    }
    Finding::ok("QEMU", format!("the guest runs in version {version}"))
}

/// Reasons for which QEMU refuses to migrate, and a migration that is under way.
fn blocked(reply: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let reasons = reply.get("blocked-reasons").and_then(Value::as_array);
    for reason in reasons.into_iter().flatten() {
        let reason = reason.as_str().map_or_else(|| reason.to_string(), str::to_owned);
        findings.push(Finding::refused(
            "saving the guest's state",
            format!("QEMU says that it cannot: {reason}"),
            "remove the device or feature that it names",
        ));
    }
    if let Some(status @ ("setup" | "active" | "postcopy-active" | "device" | "pre-switchover")) =
        reply.get("status").and_then(Value::as_str)
    {
        findings.push(Finding::refused(
            "migration",
            format!("one is under way ({status})"),
            "wait until it has ended, or end it: virsh domjobabort",
        ));
    }
    findings
}

/// Sizes of the disks that would be mirrored, and jobs that run on them and that the definition does not show.
fn disk_sizes(domain: &Domain, root: &Element) -> Vec<Finding> {
    let Ok(definition) = DomainXml::from_element(root) else { return Vec::new() };
    let mut findings = Vec::new();
    for disk in definition.disks.iter().filter(|d| d.is_writable()) {
        let subject = format!("disk {}", disk.target);
        match domain.disk_bytes(&disk.target) {
            Ok(bytes) => findings.push(Finding::ok(subject.clone(), mib(bytes))),
            Err(e) => {
                let remedy = "make sure that the host can read the disk's source";
                findings.push(Finding::refused(subject.clone(), e.to_string(), remedy));
            }
        }
        // The definition shows mirrors only; pulls, commits and backups are jobs too.
        match domain.block_job(&disk.target) {
            Ok(Some(job)) if disk.mirror.is_none() => findings.push(Finding::refused(
                subject,
                format!("a block job ({}) runs on it; QEMU allows one at a time", job.kind),
                "wait for it, or end it: virsh blockjob DOMAIN DISK --abort",
            )),
            Ok(_) => {}
            Err(e) => findings.push(unreadable(&subject, &e)),
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use serde_json::json;

    #[test]
    fn states() {
        assert_eq!(running("domain a", DomainState::Running).severity, Severity::Ok);
        for state in [DomainState::ShutOff, DomainState::Paused, DomainState::Crashed, DomainState::PmSuspended] {
            let finding = running("domain a", state);
            assert_eq!(finding.severity, Severity::Refused, "{finding}");
            assert!(!finding.remedy.is_empty());
        }
    }

    #[test]
    fn versions() {
        let version = |major, minor| json!({ "qemu": { "major": major, "minor": minor, "micro": 0 }, "package": "" });
        assert_eq!(running_version(&version(8, 2)).severity, Severity::Ok);
        assert_eq!(running_version(&version(10, 0)).severity, Severity::Ok);
        assert_eq!(running_version(&version(8, 1)).severity, Severity::Refused);
        assert_eq!(running_version(&version(7, 9)).severity, Severity::Refused);
        assert_eq!(running_version(&json!({})).severity, Severity::Refused);
    }

    #[test]
    fn migration_blockers() {
        assert!(blocked(&json!({})).is_empty());
        assert!(blocked(&json!({ "status": "completed" })).is_empty());
        let findings = blocked(&json!({ "blocked-reasons": ["one", "two"], "status": "active" }));
        assert_eq!(refusals(&findings).count(), 3);
        assert!(findings[1].fact.contains("two"));
    }
}
