//! What an activation would do, what it would lose, and what stands in its way. Changes nothing.

use std::path::{Path, PathBuf};

use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::xml::Element;
use vmdr_proto::control::{Finding, Severity};

use super::checks;
use super::clear;
use super::files;
use super::findings;
use super::host::Host;
use super::memory::{self, Memory};
use super::xml::{self, PlacedDisk, Placement, RAM_BACKEND, Transformed};
use super::{ActivateError, Settings};
use crate::store::{IMPORTED_FILE, RecoveryPoint};

/// By so much the generation of a standby is raised that was imported. The bucket does not say which one the guest has elsewhere by
/// now: after one step more both would have the same, and neither would refuse the other.
const IMPORTED_LEAD: u64 = 1000;

/// The file with the UEFI variables.
const VARIABLES: &str = "variables.fd";

/// Everything that was decided about an activation.
#[derive(Debug)]
pub struct Plan {
    /// The stored definition.
    pub domain: DomainXml,
    /// How memory comes into the guest.
    pub memory: Memory,
    /// The definitions for this host.
    pub transformed: Transformed,
    /// Disks and their overlays in the attempt's directory.
    pub disks: Vec<PlacedDisk>,
    /// The RAM block (an index) with the UEFI variables, and the file in the attempt's directory that they go to.
    pub variables: Option<(usize, PathBuf)>,
    /// What this host lacks and what will be different.
    pub findings: Vec<Finding>,
    /// User and group that QEMU runs as here.
    pub qemu_owner: Option<(u32, u32)>,
}

/// Makes the plan for restoring `point` with its overlays in `attempt_directory`.
pub fn make(
    point: &RecoveryPoint,
    attempt_directory: &Path,
    settings: &Settings,
    host: &dyn Host,
) -> Result<Plan, ActivateError> {
    let mut encrypted = Vec::new();
    let placed = match point.sealed {
        true => Some(in_the_clear(point, attempt_directory, settings, &mut encrypted)?),
        false => None,
    };
    let point = placed.as_ref().unwrap_or(point);
    let element = Element::parse(&point.domain_xml).map_err(|e| ActivateError::DomainXml(e.to_string()))?;
    let domain = DomainXml::from_element(&element).map_err(|e| ActivateError::DomainXml(e.to_string()))?;
    if !point.uuid.eq_ignore_ascii_case(&domain.uuid.to_string()) {
        let what = format!("it is of {}, and the recovery point is of {}", domain.uuid, point.uuid);
        return Err(ActivateError::DomainXml(what));
    }
    let memory = match memory::choose(&domain, &point.ram)? {
        // The standby's image has another block's memory, or less.
        Memory::Mapped(index) if !mappable(point, index) => {
            let reason = "it had other memory than the newest recovery point".to_owned();
            Memory::Carried { reason }
        }
        memory => memory,
    };
    let disks: Vec<PlacedDisk> = point
        .disks
        .iter()
        .map(|d| PlacedDisk {
            target: d.target.clone(),
            overlay: attempt_directory.join(overlay_name(&d.target)),
            base: d.path.clone(),
        })
        .collect();
    let ram = match memory {
        Memory::Mapped(index) => Some((point.ram[index].path.as_path(), point.ram[index].used_bytes)),
        Memory::Carried { .. } | Memory::Off => None,
    };
    let variables = memory::variables(&domain, &point.ram)?.map(|index| (index, attempt_directory.join(VARIABLES)));
    let placement = Placement {
        ram,
        disks: &disks,
        variables: variables.as_ref().map(|(_, file)| file.as_path()),
        nics: &settings.mapping,
    };
    let mut transformed = xml::transform(&point.domain_xml, &placement, host)?;
    let mut found = checks::check(&element, &domain, &settings.mapping, host)?;
    found.append(&mut transformed.findings);
    found.append(&mut encrypted);
    if let Some(closed) = files::closed_above(&settings.state_directory)? {
        let closed = closed.display();
        found.push(findings::refused(
            "state directory",
            &format!("QEMU's user cannot enter {closed}, which the state directory is in"),
            &format!("`chmod o+x {closed}`, or move state_dir"),
        ));
    }
    if let Memory::Mapped(_) = memory {
        // Pages come in as the guest touches them: too little memory is for the operator to judge, on such a day.
        for finding in found.iter_mut().filter(|f| f.subject == checks::MEMORY) {
            finding.set_severity(Severity::Warning);
        }
    }
    if let Memory::Carried { reason } = &memory {
        found.push(findings::warning(
            "memory",
            &format!("all {} MiB go through the save image, because {reason}", domain.memory_bytes >> 20),
            "expect about a second per GiB until the guest runs",
        ));
    }
    if is_imported(&settings.state_directory.join(&point.uuid)) {
        found.push(findings::warning(
            "ownership",
            "the standby was imported: object storage does not know who owns the guest, or where it runs",
            "see to it that it runs nowhere else",
        ));
    }
    if memory == Memory::Off {
        found.push(findings::warning(
            "memory",
            "the guest was shut down when this recovery point was made: it boots from its disks",
            "",
        ));
    }
    let qemu_owner = match checks::demanded_owner(&element) {
        Some(owner) => Some(owner),
        None => checks::qemu_owner(&host.capabilities()?, &domain.virt_type),
    };
    Ok(Plan { domain, memory, transformed, disks, variables, findings: found, qemu_owner })
}

/// A point that is encrypted as it will be once it is decrypted, and what that means or lacks.
fn in_the_clear(
    point: &RecoveryPoint,
    attempt_directory: &Path,
    settings: &Settings,
    found: &mut Vec<Finding>,
) -> Result<RecoveryPoint, ActivateError> {
    let subject = "encryption";
    let files = attempt_directory.parent().unwrap_or(attempt_directory);
    let placed = clear::directory(files, point);
    match &settings.clear_directory {
        None => found.push(findings::refused(
            subject,
            "it is encrypted at rest, and nothing says where it may lie in the clear while it runs",
            "name a directory as clear_dir in [encryption] of receiver.toml",
        )),
        Some(clear) if !clear.is_dir() => found.push(findings::refused(
            subject,
            &format!("{}, where it is to lie in the clear, is no directory", clear.display()),
            "make or mount it",
        )),
        Some(clear) if clear::is_mount_point(clear).unwrap_or(true) => found.push(findings::refused(
            subject,
            &format!(
                "{}, where it is to lie in the clear, is a mount point: it is there too while nothing is mounted",
                clear.display()
            ),
            "make a directory in what is mounted there, and name that as clear_dir",
        )),
        Some(clear) => {
            if let Some(closed) = files::closed_above(clear)? {
                let closed = closed.display();
                let fact = format!("QEMU's user cannot enter {closed}, which clear_dir is in");
                found.push(findings::refused(
                    subject,
                    &fact,
                    &format!("`chmod o+x {closed}`, or name another clear_dir"),
                ));
            }
            let bytes = clear::estimate(point);
            let free = rustix::fs::statvfs(clear).map(|of| of.f_bavail.saturating_mul(of.f_frsize));
            if let Ok(free) = free
                && free < bytes
                && !placed.is_dir()
            {
                let clear = clear.display();
                let fact =
                    format!("{} MiB are decrypted to {clear} first, where {} MiB are free", bytes >> 20, free >> 20);
                found.push(findings::refused(subject, &fact, "free some, or name another clear_dir"));
            }
            let fact = format!(
                "it is encrypted at rest and is decrypted to {} first: about {} MiB; what it writes lies there in the clear",
                clear.display(),
                bytes >> 20
            );
            found.push(findings::warning(subject, &fact, "its RTO is longer by what it takes to write as much there"));
        }
    }
    Ok(clear::placed(point, &placed))
}

/// Whether the standby of this domain's directory was imported. If that cannot be told it counts as imported.
fn is_imported(domain_directory: &Path) -> bool {
    domain_directory.join(IMPORTED_FILE).try_exists().unwrap_or(true)
}

/// The generation that an activation raises to, where `stored` is in force.
pub fn next_generation(domain_directory: &Path, stored: u64) -> u64 {
    stored.saturating_add(if is_imported(domain_directory) { IMPORTED_LEAD } else { 1 })
}

/// Whether an older point's main memory can be mapped from the standby's image.
fn mappable(point: &RecoveryPoint, index: usize) -> bool {
    let block = &point.ram[index];
    point.older.is_none() || std::fs::metadata(&block.path).is_ok_and(|image| image.len() == block.used_bytes)
}

/// The targets of disks come from outside: only letters and digits, which libvirt's are, become part of a file name.
fn overlay_name(target: &str) -> PathBuf {
    let safe: String = target.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    PathBuf::from(format!("{safe}.qcow2"))
}

/// The steps, in words. `raised`: the generation that an earlier attempt has raised it to; `stored`: the one that is stored.
pub fn steps(plan: &Plan, point: &RecoveryPoint, stored: u64, raised: Option<u64>) -> Vec<String> {
    let name = &plan.domain.name;
    let mut steps = vec![match raised.filter(|r| *r <= stored) {
        Some(raised) => format!("keep the generation of {name} at {raised}: its old host is refused (fenced) already"),
        None => {
            // A standby's directory is in its domain's.
            let next = next_generation(point.dir.parent().unwrap_or(&point.dir), stored);
            format!("raise the generation of {name} to {next}: from then on its old host is refused (fenced)")
        }
    }];
    for (disk, image) in plan.disks.iter().zip(&point.disks) {
        steps.push(format!(
            "create the overlay {} over {} ({} MiB), so that the recovery point stays as it is",
            disk.overlay.display(),
            disk.base.display(),
            image.size_bytes >> 20
        ));
    }
    if let Some((index, file)) = &plan.variables {
        let block = &point.ram[*index].name;
        steps.push(format!("write the UEFI variables ({block}) to {}", file.display()));
    }
    match &plan.memory {
        Memory::Mapped(index) => {
            let block = &point.ram[*index];
            steps.push(format!(
                "map {} MiB of memory ({} as {RAM_BACKEND}) privately from {}",
                block.used_bytes >> 20,
                block.name,
                block.path.display()
            ));
        }
        Memory::Off => {}
        Memory::Carried { reason } => {
            let bytes: u64 = point.ram.iter().map(|b| b.used_bytes).sum();
            steps.push(format!("write {} MiB of memory into the save image ({reason})", bytes >> 20));
        }
    }
    steps.push(match &plan.memory {
        Memory::Off => format!("boot {name} from its disks, as it was shut down, and see it running"),
        _ => format!("restore {name} through libvirt and see it running"),
    });
    steps.push(format!("define {name} persistently on its overlays, without autostart"));
    steps
}
