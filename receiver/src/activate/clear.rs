//! Guests that are encrypted at rest and run here: where they are in the clear.
//!
//! QEMU cannot read what the store encrypts. So the recovery point is decrypted, once, into a directory that the configuration
//! names (`clear_dir`), and the guest runs on that as on any standby's files: with memory mapped from there, and overlays,
//! which have what it writes, beside it. The state directory has a link there ([`LINK`]), and nothing else of it.
//!
//! ```text
//! CLEAR_DIR/UUID-RANDOM/point-G-E/     the recovery point, whole when it has this name
//! CLEAR_DIR/UUID-RANDOM/attempt-N/     what an activation has otherwise in the state directory
//! CLEAR_DIR/UUID-drill-ID/             the copy that a drill runs on, and its overlays
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmdr_daemon::durable;

use super::ActivateError;
use super::files::{FileError, remove_tree};
use super::record::ActiveDirectory;
use crate::drill::copy;
use crate::store::{DiskImage, RamImage, RecoveryPoint};

/// The link in the directory of the activation's record to where its files are.
pub const LINK: &str = "files";
/// What names of directories of decrypted points begin with.
const POINT: &str = "point-";
/// Between UUID and identity in the name of a drill's directory.
const DRILL: &str = "-drill-";

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ActivateError {
    let path = path.to_owned();
    move |source| FileError::Io { what, path, source }.into()
}

/// Where the files of an activation are, if not beside its record.
pub fn linked(active: &Path) -> Option<PathBuf> {
    fs::read_link(active.join(LINK)).ok()
}

/// Sees to it that the files of this activation lie below `clear`. Those of an earlier attempt stay where they are. Returns the directory
/// that they lie below.
pub fn begin(active: &ActiveDirectory, clear: &Path, uuid: Uuid) -> Result<PathBuf, ActivateError> {
    let link = active.path().join(LINK);
    if let Some(there) = linked(active.path()) {
        if there.starts_with(clear) || !active.attempts()?.is_empty() {
            return Ok(there.parent().unwrap_or(clear).to_owned());
        }
        // The configuration names another place by now, and nothing has run where it was to be.
        remove_tree(&there).map_err(failed("remove", &there))?;
        fs::remove_file(&link).map_err(failed("remove", &link))?;
    }
    let files = clear.join(format!("{uuid}-{}", Uuid::new_v4().simple()));
    // `clear` itself is not made: nothing is written where something should have been mounted.
    create(&files).map_err(failed("create", &files))?;
    durable::sync_directory(clear).map_err(failed("sync", clear))?;
    durable::create_directory(active.path()).map_err(failed("create", active.path()))?;
    symlink(&files, &link).map_err(failed("create", &link))?;
    durable::sync_directory(active.path()).map_err(failed("sync", active.path()))?;
    Ok(clear.to_owned())
}

/// The name of the directory of a decrypted point.
fn point_name(generation: u64, epoch: u64) -> String {
    format!("{POINT}{generation}-{epoch}")
}

/// The directory of a decrypted point, where the files of an activation are ([`ActiveDirectory::files`]).
pub fn directory(files: &Path, point: &RecoveryPoint) -> PathBuf {
    files.join(point_name(point.generation, point.epoch))
}

/// The point as it is when it was decrypted into `directory`.
pub fn placed(point: &RecoveryPoint, directory: &Path) -> RecoveryPoint {
    let numbers = point.layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0).map(|(n, _)| n);
    let ram: Vec<RamImage> = (point.ram.iter().zip(numbers))
        .map(|(block, n)| RamImage { path: copy::ram_path(directory, n), ..block.clone() })
        .collect();
    let disks = point.disks.iter().enumerate();
    let disks = disks.map(|(n, disk)| DiskImage { path: copy::disk_path(directory, ram.len() + n), ..disk.clone() });
    RecoveryPoint {
        disks: disks.collect(),
        ram,
        device_state: copy::device_path(directory),
        older: None,
        checked: None,
        sealed: false,
        ..point.clone()
    }
}

/// What it took to decrypt a point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decrypted {
    /// Bytes that were written: all that is not zero.
    pub bytes: u64,
    /// How long that took, until it was durable.
    pub time: Duration,
}

/// Whether something is mounted at a directory itself. Then it is there as well while nothing is mounted, and what is meant for what
/// is to be mounted there would lie on what is below.
pub fn is_mount_point(directory: &Path) -> io::Result<bool> {
    let above = directory.parent().unwrap_or(directory);
    Ok(fs::metadata(directory)?.dev() != fs::metadata(above)?.dev())
}

/// Removes decrypted points but this one, which a guest runs on.
pub fn keep_only(active: &ActiveDirectory, generation: u64, epoch: u64) -> io::Result<()> {
    let Some(files) = linked(active.path()) else { return Ok(()) };
    let kept = point_name(generation, epoch);
    for entry in fs::read_dir(&files)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(POINT) && name != kept) {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// How much of a point there is to be decrypted, in bytes, more or less: what is zero is a hole, and not read. Of an older one what
/// differs counts once more.
pub fn estimate(point: &RecoveryPoint) -> u64 {
    if let Some((_, copied)) = point.older.as_ref().and_then(|reader| copy::estimate(reader, point).ok()) {
        return copied;
    }
    let ram = point.ram.iter().map(|block| (&block.path, block.used_bytes));
    let images = ram.chain(point.disks.iter().map(|disk| (&disk.path, disk.size_bytes)));
    // Both sides of a block count as stored; an image has few that are there twice.
    images.map(|(path, length)| fs::metadata(path).map_or(0, |of| of.blocks() * 512).min(length)).sum()
}

/// Where the files of a drill are.
pub fn drill(clear: &Path, uuid: Uuid, id: &str) -> PathBuf {
    clear.join(format!("{uuid}{DRILL}{id}"))
}

/// Removes what drills of a domain have left here, for example because this was not mounted when they were removed.
pub fn sweep_drills(clear: &Path, uuid: Uuid) -> io::Result<()> {
    let entries = match fs::read_dir(clear) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let prefix = format!("{uuid}{DRILL}");
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// Makes a directory that only this user can enter; `clear_dir` itself is not made.
pub fn create(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(directory)
}

/// Decrypts a point, all of it compared with its checksums, unless that was done before; then nothing is said of what it took.
pub fn decrypt(
    point: &RecoveryPoint,
    active: &ActiveDirectory,
) -> Result<(RecoveryPoint, Option<Decrypted>), ActivateError> {
    let whole = directory(&active.files(), point);
    let mut decrypted = None;
    if !whole.is_dir() {
        let begun = Instant::now();
        let reader = point.older.as_ref().or(point.checked.as_ref());
        let reader = reader.ok_or_else(|| ActivateError::Decrypt("nothing reads it".to_owned()))?;
        let new = whole.with_extension("new");
        super::files::remove_directory(&new)?;
        create(&new).map_err(failed("create", &new))?;
        let made = copy::copy(&Arc::clone(reader), &new, None, copy::FIRST, &mut |_| Ok(()));
        let synced = made.and_then(|(_, cost)| copy::sync(&new).map(|()| cost));
        let cost = match synced {
            Ok(cost) => cost,
            Err(error) => {
                super::files::remove_directory(&new)?;
                return Err(ActivateError::Decrypt(error.to_string()));
            }
        };
        fs::rename(&new, &whole).map_err(failed("rename", &new))?;
        durable::sync_directory(&active.files()).map_err(failed("sync", &whole))?;
        let took = Decrypted { bytes: cost.copied_bytes, time: begun.elapsed() };
        tracing::info!(domain = %point.uuid, bytes = took.bytes, time = ?took.time, "decrypted");
        decrypted = Some(took);
    }
    Ok((placed(point, &whole), decrypted))
}

/// Removes what lies in the clear of the activation in `active`; the record stays.
pub fn remove(active: &Path) -> io::Result<()> {
    linked(active).map_or(Ok(()), |files| remove_tree(&files))
}
