//! What a former owner's disks had when another site went on: listed, dropped, and removed when it is old.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tonic::Status;
use uuid::Uuid;
use vmdr_daemon::durable;
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::libvirt::Connection;
use vmdr_proto::control::{Divergence, DivergenceReply, DivergentFile};

use super::{DIVERGED, NOTE, Note, OldDisk};
use crate::activate::clear;
use crate::activate::run::unix_ns;
use crate::daemon::Receiver;
use crate::store::KEPT;

/// The longest chain of images that is followed.
const CHAIN_MAX: usize = 256;

/// The sets of a domain, newest first, with their directories.
fn sets(receiver: &Receiver, uuid: Uuid) -> Vec<(PathBuf, Note)> {
    let Ok(entries) = fs::read_dir(receiver.domain_directory(uuid)) else { return Vec::new() };
    let directories = entries.flatten().map(|entry| entry.path());
    let ours = directories.filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(DIVERGED)));
    let mut sets: Vec<(PathBuf, Note)> = ours
        .filter_map(|path| match durable::read(&path.join(NOTE)).map(|bytes| serde_json::from_slice(&bytes?).ok()) {
            Ok(Some(note)) => Some((path, note)),
            _ => {
                tracing::warn!(path = %path.display(), "this is kept aside, and its note cannot be read");
                None
            }
        })
        .collect();
    sets.sort_by_key(|(_, note)| std::cmp::Reverse(note.generation));
    sets
}

fn kept_for(receiver: &Receiver) -> Duration {
    Duration::from_secs(receiver.config.divergence_days.saturating_mul(86_400))
}

fn shown(receiver: &Receiver, uuid: Uuid, note: &Note) -> Divergence {
    let own = receiver.domain_directory(uuid);
    let file = |disk: &OldDisk| DivergentFile {
        target: disk.target.clone(),
        path: disk.path.display().to_string(),
        bytes: fs::metadata(&disk.path).map(|m| m.blocks() * 512).unwrap_or(0),
        format: disk.format.clone(),
        own: disk.path.starts_with(&own),
        differing_bytes: if disk.format == "qcow2" { allocated(&disk.path) } else { 0 },
    };
    Divergence {
        generation: note.generation,
        since_unix_ns: note.since_unix_ns,
        until_unix_ns: note.since_unix_ns.saturating_add(kept_for(receiver).as_nanos() as u64),
        files: note.disks.iter().map(file).collect(),
    }
}

/// Bytes that an image has itself, and not from the one below it.
fn allocated(path: &Path) -> u64 {
    let map = || -> Option<u64> {
        let output = Command::new("qemu-img").args(["map", "-U", "--output=json"]).arg(path).output().ok()?;
        let map: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let own = map.as_array()?.iter().filter(|extent| extent["depth"] == 0 && extent["data"] == true);
        Some(own.filter_map(|extent| extent["length"].as_u64()).sum())
    };
    map().unwrap_or(0)
}

/// An image and those below it, as far as they can be read.
pub fn chain(path: &Path) -> Vec<PathBuf> {
    let read = || -> Option<Vec<PathBuf>> {
        let mut command = Command::new("qemu-img");
        let output = command.args(["info", "-U", "--backing-chain", "--output=json"]).arg(path).output().ok()?;
        let images: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let names = images.as_array()?.iter().take(CHAIN_MAX);
        Some(names.filter_map(|image| image["filename"].as_str().map(PathBuf::from)).collect())
    };
    read().filter(|files| !files.is_empty()).unwrap_or_else(|| vec![path.to_owned()])
}

/// Lists what is kept aside of a domain; with `drop` it is gone afterwards.
pub fn divergence(receiver: &Receiver, uuid: Uuid, drop: bool) -> Result<DivergenceReply, Status> {
    let sets = sets(receiver, uuid);
    let mut reply =
        DivergenceReply { sets: sets.iter().map(|(_, note)| shown(receiver, uuid, note)).collect(), freed_bytes: 0 };
    if drop {
        let in_use = in_use(receiver, uuid)?;
        for (directory, note) in sets {
            let foreign: Vec<&OldDisk> = note.disks.iter().filter(|d| !d.path.starts_with(&directory)).collect();
            if let Some(used) = foreign.iter().find(|disk| in_use.contains(&disk.path)) {
                return Err(Status::failed_precondition(format!(
                    "{} is a disk of the domain as it is defined here: `virsh undefine` it, or let it come home first",
                    used.path.display()
                )));
            }
            for disk in foreign {
                reply.freed_bytes += fs::metadata(&disk.path).map(|m| m.blocks() * 512).unwrap_or(0);
                durable::remove(&disk.path)
                    .map_err(|error| Status::internal(format!("remove {}: {error}", disk.path.display())))?;
            }
            reply.freed_bytes +=
                remove_own(receiver, uuid, &directory, &note).map_err(|e| Status::internal(format!("{e:#}")))?;
        }
    }
    Ok(reply)
}

/// Files that the domain has as it is defined here, or runs.
fn in_use(receiver: &Receiver, uuid: Uuid) -> Result<Vec<PathBuf>, Status> {
    let unavailable = |error: vmdr_hypervisor::Error| Status::unavailable(error.to_string());
    let connection = Connection::open(&receiver.config.libvirt_uri).map_err(unavailable)?;
    let domain = match connection.domain_by_uuid(&uuid) {
        Ok(domain) => domain,
        Err(error) if error.is_no_such_domain() => return Ok(Vec::new()),
        Err(error) => return Err(unavailable(error)),
    };
    let mut files = Vec::new();
    for xml in [domain.inactive_xml(), domain.live_xml()] {
        let xml = DomainXml::from_element(&xml.map_err(unavailable)?).map_err(|e| Status::internal(e.to_string()))?;
        for path in xml.disks.iter().filter_map(|disk| disk.source.as_ref()?.path()) {
            files.extend(chain(&path));
        }
    }
    Ok(files)
}

/// Removes what lies in the receiver's own directory.
fn remove_own(receiver: &Receiver, uuid: Uuid, directory: &Path, note: &Note) -> anyhow::Result<u64> {
    let mut freed = 0;
    if let Some(number) = note.standby {
        let standby = receiver.domain_directory(uuid).join(format!("standby.{number}"));
        let id = uuid.to_string();
        durable::remove(&standby.join(KEPT)).context("let go of the old standby")?;
        freed += receiver.store.remove_unused_standby(&id, number)?;
    }
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    freed += files.filter_map(|entry| entry.metadata().ok()).map(|m| m.blocks() * 512).sum::<u64>();
    clear::remove(directory).with_context(|| format!("remove what lies in the clear of {}", directory.display()))?;
    fs::remove_dir_all(directory).with_context(|| format!("remove {}", directory.display()))?;
    tracing::info!(domain = %uuid, directory = %directory.display(), freed, "no longer kept aside");
    Ok(freed)
}

/// Removes what has been kept for long enough. The files of the operator's stay, and are no longer listed.
pub fn expire(receiver: &Receiver) {
    let (now, kept) = (unix_ns(SystemTime::now()), kept_for(receiver).as_nanos() as u64);
    for domain in receiver.store.domains() {
        let Ok(uuid) = Uuid::parse_str(&domain.uuid) else { continue };
        for (directory, note) in sets(receiver, uuid) {
            let old = now.saturating_sub(note.since_unix_ns) > kept;
            // A definition that still names them needs them, however old they are.
            let ours = |file: &PathBuf| file.starts_with(&directory);
            // While libvirt cannot be asked nothing goes.
            let unused = || in_use(receiver, uuid).is_ok_and(|files| !files.iter().any(ours));
            if old
                && unused()
                && let Err(error) = remove_own(receiver, uuid, &directory, &note)
            {
                tracing::warn!(%uuid, "what was kept aside for long enough: {error:#}");
            }
        }
    }
}
