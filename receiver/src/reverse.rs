//! The way back: a site where a guest ran becomes the one that it is protected to.
//!
//! What is still here of the guest's disks, raw files or chains of qcow2, is copied beside (with reflinks where the file
//! system has them) and becomes the standby's disks, so that the owner's resync finds most of it here and only what differs
//! crosses the wire. A site that has nothing gets everything.
//!
//! **The old disks stay as they are**: they have what was written here and never became durable elsewhere. What belongs to
//! vmdr among them (overlays of an activation, and the standby below) is moved to `diverged.G`, or kept where it is, for a
//! configured time; the files of the operator's are never removed but when he says so ([`divergence`]).
//!
//! Order, such that a crash between any two steps is made good by the next question:
//! 1. this host is recorded as not owning the guest (the hook then refuses to start it), and the guest must be off;
//! 2. what will be kept aside is noted, and the old standby marked as not to be removed;
//! 3. the copy becomes the standby, in one step;
//! 4. the directory of the old activation becomes `diverged.G`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use tonic::Status;
use uuid::Uuid;
use vmdr_codec::{Disk, Layout};
use vmdr_daemon::durable;
use vmdr_daemon::ownership::{Event, Role};
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::libvirt::{Connection, DomainState};
use vmdr_proto::replication::{ReverseReply, ReverseRequest, ReverseState};
use vmdr_trust::PeerInfo;

use crate::activate::record::DIRECTORY as ACTIVE;
use crate::activate::run::unix_ns;
use crate::control::store_status;
use crate::daemon::Receiver;
use crate::store::{Base, KEPT, NUMBER_MAX};
use crate::takeover::parse;

pub mod divergence;

/// Note of what is kept aside: in the domain's directory until the copy is the standby, then in `diverged.G`.
const NOTE: &str = "divergence.json";
/// Prefix of the directories of what is kept aside.
const DIVERGED: &str = "diverged.";
/// How often it is looked for what has been kept for long enough.
const EXPIRY_LOOK: Duration = Duration::from_secs(3600);

/// What is kept aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The generation in which another site went on.
    generation: u64,
    since_unix_ns: u64,
    disks: Vec<OldDisk>,
    /// The standby (the N of `standby.N`) that overlays among them lie over.
    standby: Option<u64>,
}

/// A disk as the guest had it here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OldDisk {
    target: String,
    path: PathBuf,
    format: String,
    /// Virtual size.
    size_bytes: u64,
}

/// A copy under way, or how it ended.
#[derive(Debug, Clone)]
pub struct Reversal {
    generation: u64,
    done: Arc<AtomicU64>,
    total_bytes: u64,
    /// Why it failed.
    failed: Option<String>,
}

fn reply(state: ReverseState, message: impl Into<String>) -> ReverseReply {
    ReverseReply { state: state.into(), message: message.into(), ..ReverseReply::default() }
}

/// Answers one question: ready, or how far it is.
pub fn reverse(receiver: &Arc<Receiver>, peer: &PeerInfo, request: &ReverseRequest) -> Result<ReverseReply, Status> {
    let uuid = parse(&request.domain_uuid)?;
    let layout = Layout::from_bytes(&request.layout).map_err(|e| Status::invalid_argument(e.to_string()))?;
    let mut all = receiver.reversals.lock().unwrap_or_else(PoisonError::into_inner);
    match all.get(&uuid) {
        Some(Reversal { failed: None, done, total_bytes, .. }) => {
            return Ok(ReverseReply {
                done_bytes: done.load(Ordering::Relaxed),
                total_bytes: *total_bytes,
                ..reply(ReverseState::Working, "copy the old disks")
            });
        }
        // Said once; asked again, it is tried again.
        Some(Reversal { failed: Some(why), generation, .. }) => {
            let (why, same) = (why.clone(), *generation == request.generation);
            all.remove(&uuid);
            if same {
                return Ok(reply(ReverseState::Refused, why));
            }
        }
        None => {}
    }
    drop(all);
    begin(receiver, peer, uuid, layout, request).map_err(|error| match error.downcast::<Status>() {
        Ok(status) => status,
        Err(error) => Status::internal(format!("{error:#}")),
    })
}

fn begin(
    receiver: &Arc<Receiver>,
    peer: &PeerInfo,
    uuid: Uuid,
    layout: Layout,
    request: &ReverseRequest,
) -> anyhow::Result<ReverseReply> {
    let id = uuid.to_string();
    let name: String = request.domain_name.chars().take(256).collect();
    let generation = request.generation;
    if generation == 0 || generation > NUMBER_MAX {
        return Err(Status::invalid_argument(format!("{generation} is no generation")).into());
    }
    let position = receiver.store.position(&id).map_err(|e| store_status(&e))?;
    if position.generation > generation {
        let message =
            format!("generation {} is in force here, not {generation}: this site owns it", position.generation);
        return Ok(reply(ReverseState::Refused, message));
    }
    let ours = receiver.ownerships.get(&id)?;
    match ours.as_ref().map(|ours| (ours.role, ours.generation)) {
        Some((Role::Owner, g)) if g >= generation => {
            return Ok(reply(ReverseState::Refused, format!("this site owns it, in generation {g}")));
        }
        Some((Role::HandingOver, _)) => {
            return Ok(reply(
                ReverseState::Waiting,
                "the hand-over is not settled here yet: is vmdr-agent running here?",
            ));
        }
        _ => {}
    }
    let connection = Connection::open(&receiver.config.libvirt_uri)
        .map_err(|error| Status::unavailable(format!("libvirt at the old site: {error}")))?;
    let domain = match connection.domain_by_uuid(&uuid) {
        Ok(domain) => Some(domain),
        Err(error) if error.is_no_such_domain() => None,
        Err(error) => return Err(error.into()),
    };
    if let (None, Some(domain)) = (&ours, &domain)
        && domain.state()?.0.is_active()
    {
        // Nothing was ever agreed on it with another site: nobody but the operator ends it.
        let message = format!(
            "a domain of this UUID runs there, which vmdr never protected or activated: `virsh destroy {name}` there"
        );
        return Ok(reply(ReverseState::Refused, message));
    }
    if ours.is_some() || domain.is_some() {
        // First of all: it is not started here any more.
        receiver.ownerships.transition(&id, &name, &Event::Outdated(generation), "another site protects it to here")?;
    }
    if let Some(domain) = &domain {
        let (state, _) = domain.state()?;
        if state == DomainState::Running {
            tracing::error!(domain = name, "it runs here and is owned by another site: pausing it");
            domain.suspend()?;
        }
        if state.is_active() {
            let message = format!(
                "the old guest is still there, paused, on the host that the protection shall go to. Its disks are kept aside \
                 in any case; its memory is not: end it there with `virsh destroy {name}`, or `virsh save {name} FILE` first"
            );
            return Ok(reply(ReverseState::Waiting, message));
        }
    }
    let stored = receiver.store.domains().into_iter().find(|domain| domain.uuid == id);
    let frozen = stored.as_ref().is_some_and(|domain| domain.frozen);
    // There is a recovery point of this generation.
    if stored.is_some_and(|domain| domain.point_generation == generation) {
        if receiver.domain_directory(uuid).join(NOTE).exists() {
            // A predecessor got as far as the copy.
            put_aside(receiver, uuid)?;
        }
        if !frozen {
            return Ok(reply(ReverseState::Ready, "it is received already"));
        }
    }
    let disks = match &domain {
        Some(domain) => old_disks(&DomainXml::from_element(&domain.inactive_xml()?)?, &layout),
        None => Vec::new(),
    };
    if disks.is_empty() {
        let active = receiver.domain_directory(uuid).join(ACTIVE);
        if domain.is_none() && active.exists() {
            let message = format!(
                "a guest ran there whose definition is gone: what it wrote lies in {}, over the standby, and nothing else has it. \
                 Move it away there, or `vmdr forget {name}` there",
                active.display()
            );
            return Ok(reply(ReverseState::Refused, message));
        }
        if frozen {
            receiver.store.set_frozen(&id, false).map_err(|e| store_status(&e))?;
        }
        return Ok(reply(ReverseState::Ready, "nothing of its disks is here: everything is sent"));
    }
    start_copy(receiver, peer, uuid, name, layout, request, disks)
}

/// What is here of the disks, as the definition has them: those that can be read.
fn old_disks(domain: &DomainXml, layout: &Layout) -> Vec<OldDisk> {
    let found = layout.disks.iter().filter_map(|wanted| {
        let disk = domain.disks.iter().find(|disk| disk.target == wanted.target && disk.is_writable())?;
        let (path, format) =
            (disk.source.as_ref()?.path()?, disk.driver_type.clone().unwrap_or_else(|| "raw".to_owned()));
        match virtual_size(&path, &format) {
            Ok(size_bytes) => Some(OldDisk { target: wanted.target.clone(), path, format, size_bytes }),
            Err(error) => {
                tracing::warn!(path = %path.display(), "an old disk cannot be read, all of it will be sent: {error:#}");
                None
            }
        }
    });
    found.collect()
}

fn virtual_size(path: &Path, format: &str) -> anyhow::Result<u64> {
    let output = Command::new("qemu-img").args(["info", "-U", "--output=json", "-f", format]).arg(path).output();
    let output = output.context("run qemu-img (package qemu-utils)")?;
    ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).context("read what qemu-img says")?;
    info["virtual-size"].as_u64().context("qemu-img says no virtual size")
}

fn start_copy(
    receiver: &Arc<Receiver>,
    peer: &PeerInfo,
    uuid: Uuid,
    name: String,
    mut layout: Layout,
    request: &ReverseRequest,
    disks: Vec<OldDisk>,
) -> anyhow::Result<ReverseReply> {
    layout.ram.clear();
    for disk in &mut layout.disks {
        let old = disks.iter().find(|old| old.target == disk.target);
        *disk = Disk { target: disk.target.clone(), size_bytes: old.map_or(disk.size_bytes, |old| old.size_bytes) };
    }
    let free = receiver.free_bytes().context("measure the state directory")?;
    let taken: u64 = disks.iter().map(|disk| used_bytes(&disk.path)).sum();
    let room = free.saturating_sub(receiver.config.space_reserve_bytes);
    if taken > room {
        let message = format!("a copy of the old disks takes up to {} MiB; {} MiB are free", taken >> 20, room >> 20);
        return Ok(reply(ReverseState::Refused, message));
    }
    let total_bytes = disks.iter().map(|disk| disk.size_bytes).sum();
    let done = Arc::new(AtomicU64::new(0));
    let reversal = Reversal { generation: request.generation, done: done.clone(), total_bytes, failed: None };
    {
        let mut all = receiver.reversals.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(&uuid).is_some_and(|other| other.failed.is_none()) {
            return Ok(reply(ReverseState::Working, "copy the old disks"));
        }
        all.insert(uuid, reversal);
    }
    let (receiver, generation, xml) = (Arc::clone(receiver), request.generation, request.domain_xml.clone());
    let peer = peer.id.clone();
    std::thread::Builder::new().name(format!("reverse {name}")).spawn(move || {
        let copied = copy(&receiver, &peer, uuid, &name, generation, &layout, &xml, &disks, &done);
        let mut all = receiver.reversals.lock().unwrap_or_else(PoisonError::into_inner);
        match copied {
            Ok(()) => {
                tracing::info!(domain = name, generation, "the old disks are the base of the standby");
                all.remove(&uuid);
            }
            Err(error) => {
                tracing::error!(domain = name, "make a standby of the old disks: {error:#}");
                if let Some(reversal) = all.get_mut(&uuid) {
                    reversal.failed = Some(format!("{error:#}"));
                }
            }
        }
    })?;
    Ok(ReverseReply { total_bytes, ..reply(ReverseState::Working, "copy the old disks") })
}

#[allow(clippy::too_many_arguments)] // One call, of a thread's own.
fn copy(
    receiver: &Receiver,
    peer: &str,
    uuid: Uuid,
    name: &str,
    generation: u64,
    layout: &Layout,
    xml: &str,
    disks: &[OldDisk],
    done: &AtomicU64,
) -> anyhow::Result<()> {
    let id = uuid.to_string();
    let lock = receiver.activation_lock(uuid);
    let _one_at_a_time = lock.blocking_lock();
    let directory = receiver.domain_directory(uuid);
    let standby = receiver.store.recovery_point(&id).ok().map(|point| point.dir);
    let over = standby.filter(|standby| uses(disks, standby));
    if let Some(standby) = &over {
        durable::write(&standby.join(KEPT), b"").context("mark the old standby as kept")?;
    }
    let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("standby.")?.parse().ok();
    let note = Note {
        generation,
        since_unix_ns: unix_ns(SystemTime::now()),
        disks: disks.to_vec(),
        standby: over.as_ref().and_then(number),
    };
    durable::write(&directory.join(NOTE), &serde_json::to_vec_pretty(&note)?).context("note what is kept aside")?;
    let written = disks.iter().filter_map(|disk| fs::metadata(&disk.path).and_then(|m| m.modified()).ok()).max();
    let base = Base { peer, name, generation, layout, xml, cut_unix_ns: written.map_or(0, unix_ns) };
    let mut fill = |index: usize, image: &Path| -> io::Result<()> {
        let target = &layout.disks[index].target;
        let Some(old) = disks.iter().find(|old| old.target == *target) else { return Ok(()) };
        fill(old, image)?;
        done.fetch_add(old.size_bytes, Ordering::Relaxed);
        Ok(())
    };
    receiver.store.seed_from_files(&id, &base, &mut fill)?;
    put_aside(receiver, uuid)
}

/// Whether any of these disks lies over something in this directory.
fn uses(disks: &[OldDisk], standby: &Path) -> bool {
    disks.iter().any(|disk| divergence::chain(&disk.path).iter().any(|file| file.starts_with(standby)))
}

/// Gives an image the content of an old disk.
fn fill(old: &OldDisk, image: &Path) -> io::Result<()> {
    let mut command = if old.format == "raw" && old.path.is_file() {
        let mut cp = Command::new("cp");
        cp.args(["--reflink=auto", "--sparse=always", "--"]).arg(&old.path).arg(image);
        cp
    } else {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-q", "-f", &old.format, "-O", "raw"]).arg(&old.path).arg(image);
        convert
    };
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let kind = if said.contains("No space left") { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
        return Err(io::Error::new(kind, format!("copy {}: {}", old.path.display(), said.trim())));
    }
    let file = File::options().write(true).open(image)?;
    if file.metadata()?.len() != old.size_bytes {
        file.set_len(old.size_bytes)?;
    }
    file.sync_all()
}

/// The copy is the standby: what the old guest had is moved out of the way of the next activation.
fn put_aside(receiver: &Receiver, uuid: Uuid) -> anyhow::Result<()> {
    let directory = receiver.domain_directory(uuid);
    let note = directory.join(NOTE);
    let Some(bytes) = durable::read(&note).context("read what is kept aside")? else { return Ok(()) };
    let mut noted: Note = serde_json::from_slice(&bytes).context("parse what is kept aside")?;
    let aside = directory.join(format!("{DIVERGED}{}", noted.generation));
    let active = directory.join(ACTIVE);
    if active.is_dir() && !aside.exists() {
        fs::rename(&active, &aside).with_context(|| format!("move {} aside", active.display()))?;
        durable::sync_directory(&directory)?;
    }
    for disk in &mut noted.disks {
        if let Ok(rest) = disk.path.strip_prefix(&active) {
            disk.path = aside.join(rest);
        }
    }
    durable::write(&aside.join(NOTE), &serde_json::to_vec_pretty(&noted)?).context("note what is kept aside")?;
    durable::remove(&note).context("note what is kept aside")
}

fn used_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    divergence::chain(path).iter().filter_map(|file| fs::metadata(file).ok()).map(|m| m.blocks() * 512).sum()
}

/// Looks now and then for what has been kept for long enough.
pub async fn expire_for_ever(receiver: Arc<Receiver>) {
    let mut ending = receiver.ending();
    loop {
        let of = Arc::clone(&receiver);
        let expired = tokio::task::spawn_blocking(move || divergence::expire(&of)).await;
        if let Err(error) = expired {
            tracing::error!(%error, "what is kept aside");
        }
        tokio::select! {
            () = tokio::time::sleep(EXPIRY_LOOK) => {}
            _ = ending.wait_for(|ending| *ending) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(program: &str, words: &[&str]) {
        let output = Command::new(program).args(words).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    fn an_image_gets_what_a_disk_has_whatever_it_lies_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (raw, top) = (path("a.raw"), path("b.qcow2"));
        fs::write(&raw, vec![7; 1 << 20]).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &raw, &top, "2M"]);
        run("qemu-io", &["-c", "write -P 9 64k 64k", &top]);
        let before = fs::read(&top).unwrap();
        for (file, format, bytes) in [(&raw, "raw", 1 << 20), (&top, "qcow2", 2 << 20)] {
            assert_eq!(virtual_size(Path::new(file), format).unwrap(), bytes);
            let image = directory.path().join("image");
            File::create(&image).unwrap().set_len(bytes).unwrap();
            let old =
                OldDisk { target: "vda".to_owned(), path: file.into(), format: format.to_owned(), size_bytes: bytes };
            fill(&old, &image).unwrap();
            let mut expected = vec![7; 1 << 20];
            expected.resize(bytes as usize, 0);
            if format == "qcow2" {
                expected[64 << 10..128 << 10].fill(9);
            }
            assert!(fs::read(&image).unwrap() == expected, "{format}");
        }
        assert_eq!(fs::read(&top).unwrap(), before);
        assert_eq!(divergence::chain(Path::new(&top)), [PathBuf::from(&top), PathBuf::from(&raw)]);
    }
}
