//! Whether a host and a domain can be protected, before anything is touched.
//!
//! `vmdr doctor` shows the findings, `protect` ends at the first refusal. A refusal is for what would lose data or make
//! an activation fail without anybody noticing until then: everything that is not known to work is refused, by name. Each
//! finding says a fact; each refusal and warning also what to do about it.
//!
//! - [`host`]: the kernel's two interfaces (tried, on memory of our own), permissions, libvirt, memory.
//! - [`domain`]: a running domain, through libvirt and its monitor.
//! - [`devices`], [`disks`], [`memory`], [`confinement`], [`locks`]: the parts of it that need no libvirt: definitions in, findings out.
//! - [`qemu_devices`]: the same question to QEMU, which knows of devices that libvirt does not.
//! - [`prepare`]: gives a domain a QMP socket of its own for its next start.

pub mod confinement;
pub mod devices;
pub mod disks;
pub mod domain;
pub mod host;
pub mod locks;
pub mod memory;
pub mod prepare;
pub mod qemu_devices;

#[cfg(test)]
mod definition_tests;
mod kernel_probe;

pub use domain::DomainOptions;
pub use host::HostFacts;
pub use prepare::{Prepared, prepare};

use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{Disk, DomainXml};
use vmdr_hypervisor::libvirt::Domain;
use vmdr_proto::{REPLICATION_VERSION, control, replication};

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, with less than there could be.
    Warning,
    /// Not protected like this.
    Refused,
}

/// One thing that preflight found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What is meant: `kernel`, `disk vda`.
    pub subject: String,
    /// What is so.
    pub fact: String,
    /// What to do about it; empty when all is well.
    pub remedy: String,
}

impl Finding {
    /// Something that is as it should be.
    pub fn ok(subject: impl Into<String>, fact: impl Into<String>) -> Self {
        Finding { severity: Severity::Ok, subject: subject.into(), fact: fact.into(), remedy: String::new() }
    }

    /// Something that works less well than it could.
    pub fn warning(subject: impl Into<String>, fact: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { severity: Severity::Warning, subject: subject.into(), fact: fact.into(), remedy: remedy.into() }
    }

    /// Something with which vmdr does not protect.
    pub fn refused(subject: impl Into<String>, fact: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { severity: Severity::Refused, subject: subject.into(), fact: fact.into(), remedy: remedy.into() }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.subject, self.fact)?;
        if !self.remedy.is_empty() {
            write!(f, ": {}", self.remedy)?;
        }
        Ok(())
    }
}

impl From<Finding> for control::Finding {
    fn from(finding: Finding) -> Self {
        let severity = match finding.severity {
            Severity::Ok => control::Severity::Ok,
            Severity::Warning => control::Severity::Warning,
            Severity::Refused => control::Severity::Refused,
        };
        control::Finding {
            severity: severity.into(),
            subject: finding.subject,
            fact: finding.fact,
            remedy: finding.remedy,
        }
    }
}

/// The refusals among findings.
pub fn refusals(findings: &[Finding]) -> impl Iterator<Item = &Finding> {
    findings.iter().filter(|f| f.severity == Severity::Refused)
}

/// What a receiver is asked about a running domain: whether it could store and run it.
pub fn probe_request(domain: &Domain) -> Result<replication::ProbeRequest, Error> {
    let migratable = domain.migratable_xml()?;
    let definition = DomainXml::from_element(&migratable)?;
    let mut disk_bytes: u64 = 0;
    for disk in definition.disks.iter().filter(|d| Disk::is_writable(d)) {
        disk_bytes = disk_bytes.saturating_add(domain.disk_bytes(&disk.target)?);
    }
    Ok(replication::ProbeRequest {
        protocol_version: REPLICATION_VERSION,
        domain_uuid: definition.uuid.to_string(),
        domain_name: definition.name,
        domain_xml: migratable.to_string(),
        memory_bytes: definition.memory_bytes,
        disk_bytes,
        host_cpu_xml: domain.connection().capabilities()?.find("host/cpu").map(ToString::to_string).unwrap_or_default(),
    })
}

/// What a receiver said about a domain, as findings.
pub fn receiver(peer: &str, reply: &replication::ProbeReply) -> Vec<Finding> {
    let subject = format!("receiver {peer}");
    if reply.refusals.is_empty() {
        let fact = format!("can store and run it (QEMU {}, libvirt {})", reply.qemu_version, reply.libvirt_version);
        return vec![Finding::ok(subject, fact)];
    }
    let one = |r: &replication::Refusal| Finding::refused(format!("{subject}: {}", r.subject), &r.fact, &r.remedy);
    reply.refusals.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_of_the_receiver_is_one() {
        let refusal = |subject: &str| replication::Refusal {
            subject: subject.into(),
            fact: "is not there".into(),
            remedy: "install it".into(),
        };
        let mut reply =
            replication::ProbeReply { refusals: vec![refusal("machine"), refusal("cpu")], ..Default::default() };
        let findings = receiver("b:7420", &reply);
        assert_eq!(refusals(&findings).count(), 2);
        assert_eq!(findings[1].to_string(), "receiver b:7420: cpu: is not there: install it");
        reply.refusals.clear();
        assert_eq!(receiver("b:7420", &reply)[0].severity, Severity::Ok);
    }

    #[test]
    fn severities_map() {
        for (finding, severity) in [
            (Finding::ok("a", "b"), control::Severity::Ok),
            (Finding::warning("a", "b", "c"), control::Severity::Warning),
            (Finding::refused("a", "b", "c"), control::Severity::Refused),
        ] {
            assert_eq!(control::Finding::from(finding).severity(), severity);
        }
    }
}
