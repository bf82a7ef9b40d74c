//! Whether every disk that the guest can write to can be mirrored, and what the others need at the backup site.

use vmdr_hypervisor::domain_xml::{Disk, DiskDevice, DomainXml};

use super::{Finding, Severity};

/// Judges the disks of a live definition. `own_mirrors`: the domain is protected already, so that mirrors are vmdr's.
pub fn disks(domain: &DomainXml, own_mirrors: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for disk in &domain.disks {
        one(disk, own_mirrors, &mut findings);
        if let (Some(path), DiskDevice::Disk) = (shared_source(domain, disk), disk.device) {
            findings.push(Finding::refused(
                subject(disk),
                format!("another disk of the domain has the same source, {path}"),
                "give each disk a source of its own",
            ));
        }
    }
    if !domain.disks.iter().any(Disk::is_writable) {
        findings.push(Finding::ok("disks", "none that the guest can write to: memory alone is protected"));
    }
    findings
}

fn subject(disk: &Disk) -> String {
    format!("disk {}", disk.target)
}

fn shared_source<'a>(domain: &'a DomainXml, disk: &'a Disk) -> Option<&'a str> {
    let location = disk.source.as_ref()?.location.as_str();
    let first =
        domain.disks.iter().find(|d| d.is_writable() && d.source.as_ref().is_some_and(|s| s.location == location))?;
    (disk.is_writable() && first.target != disk.target).then_some(location)
}

fn one(disk: &Disk, own_mirrors: bool, findings: &mut Vec<Finding>) {
    let subject = subject(disk);
    let Some(source) = &disk.source else {
        findings.push(Finding::ok(subject, "an empty drive"));
        return;
    };
    let location = &source.location;
    if !disk.is_writable() {
        findings.push(Finding::warning(
            subject,
            format!("{location} is read-only and not mirrored"),
            "make sure that the same medium is at the same place at the backup site, or eject it",
        ));
        return;
    }
    let before = findings.len();
    let mut refuse = |fact: String, remedy: &str| findings.push(Finding::refused(subject.clone(), fact, remedy));
    if disk.device == DiskDevice::Floppy {
        refuse(format!("floppy disks are not mirrored, and {location} is writable"), "eject it, or make it read-only");
    }
    if !matches!(source.kind.as_str(), "file" | "block" | "network" | "volume") {
        refuse(
            format!("its source is of type {}, which libvirt cannot mirror", source.kind),
            "use a file, a block device, a network disk or a volume",
        );
    }
    if disk.shareable {
        refuse(
            "it is shareable: others may write to it, past the mirror".to_owned(),
            "remove <shareable/>, or do not protect a guest of a cluster on a shared disk",
        );
    }
    if disk.transient {
        refuse(
            "it is transient: what the guest writes is in a temporary file".to_owned(),
            "remove <transient/>, or make the disk read-only",
        );
    }
    if let Some(job) = disk.mirror.as_ref().filter(|_| !own_mirrors) {
        refuse(
            format!("a block job ({job}) runs on it; QEMU allows one at a time"),
            "wait for it, or end it: virsh blockjob DOMAIN DISK --abort",
        );
    }
    if matches!(disk.bus.as_str(), "ide" | "sata") && !disk.trim_off {
        let fact = format!(
            "on bus {}, where the guest can TRIM: QEMU (10.0.2 at least) can hang for ever, or crash, when it waits for such a disk in \
             the middle of that, as every cut and every mirror makes it do",
            disk.bus
        );
        let remedy = "put it on virtio or scsi, or have <qemu:override> give its device discard_granularity 0 from the guest's next \
                      start on (docs/design.md, Traps)";
        // One that is protected already goes on: to stop watching it now would be no help to it.
        findings.push(match own_mirrors {
            true => Finding::warning(subject.clone(), fact, remedy),
            false => Finding::refused(subject.clone(), fact, remedy),
        });
    }
    if findings[before..].iter().any(|finding| finding.severity == Severity::Refused) {
        return;
    }
    if disk.error_policy.as_deref() == Some("ignore") {
        findings.push(Finding::warning(
            subject.clone(),
            "write errors are ignored (error_policy='ignore'): this disk and its mirror may then differ",
            "use error_policy='stop' or 'report'",
        ));
    }
    let mut fact = format!("{location} ({}", disk.driver_type.as_deref().unwrap_or("raw"));
    if !disk.backing.is_empty() {
        fact = format!("{fact}, with {} images below it, mirrored as one", disk.backing.len());
    }
    findings.push(Finding::ok(subject, format!("{fact}) can be mirrored")));
}
