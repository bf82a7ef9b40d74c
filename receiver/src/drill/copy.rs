//! The copy of a recovery point that a drill runs on, beside the standby, which goes on meanwhile.
//!
//! Where the file system can (XFS, btrfs), each image is *cloned*: the clone shares the standby's blocks until either is
//! written. The standby may be written while that happens; so afterwards everything in which the point is other than the
//! standby *by then* is written over the clone, out of the history. Elsewhere the point is read and written, without its
//! zeroes, at a limited rate. The point cannot go while it is copied ([`PointReader`]); applying waits for one read at a time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use rustix::io::Errno;

use super::DrillError;
use crate::store::{Array, DiskImage, PointReader, RamImage, RecoveryPoint};

/// How a copy goes about it.
#[derive(Debug, Clone, Copy)]
pub struct Pieces {
    /// Read at once: so long a batch of the same domain waits.
    bytes: usize,
    /// Written between two syncs, so that what waits in the page cache does not hold up the journal's own.
    sync_bytes: u64,
}

/// Beside replication of the same domain.
pub const BESIDE: Pieces = Pieces { bytes: 1 << 20, sync_bytes: 16 << 20 };
/// While a guest waits for it, and nothing is applied: what is encrypted is decrypted by all processors.
pub const FIRST: Pieces = Pieces { bytes: 8 << 20, sync_bytes: 64 << 20 };
/// Pieces that have been read and wait to be written, beside the one that is written and the one that is read.
const WAITING_MAX: usize = 1;
/// Zeroes are left out in pieces of this size.
const GRAIN_BYTES: usize = 4 << 10;

/// What a copy cost.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes written.
    pub copied_bytes: u64,
    /// Bytes shared with the standby.
    pub shared_bytes: u64,
}

/// Asked before so many bytes are written: waits for its turn, or says why not.
pub type Pace<'a> = dyn FnMut(u64) -> Result<(), DrillError> + 'a;

/// Makes a new file share all blocks of another; false: the file system cannot.
pub type Clone = fn(&File, &File) -> io::Result<bool>;

/// The bytes that copying would write, at most, with and without clones.
pub fn estimate(reader: &PointReader, standby: &RecoveryPoint) -> Result<(u64, u64), DrillError> {
    let (mut cloned, mut copied) = (0, 0);
    for (array, path) in images(reader, standby) {
        let changed: u64 = reader.differences(array)?.iter().map(|change| change.bytes).sum();
        let stored = fs::metadata(&path).map_or(0, |of| of.blocks() * 512);
        cloned += changed;
        copied += (stored + changed).min(reader.length(array));
    }
    Ok((cloned, copied))
}

/// Whether files in `directory` can share blocks with `image`.
pub fn can_clone(image: &Path, directory: &Path) -> Result<Option<Clone>, DrillError> {
    let trial = directory.join("clone");
    let (to, from) = (
        create(&trial)?,
        match File::open(image) {
            Ok(from) => from,
            // Nothing there, nothing to be shared.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(DrillError::io("open", image)(e)),
        },
    );
    let cloned = reflink(&to, &from).map_err(DrillError::io("clone", image));
    fs::remove_file(&trial).map_err(DrillError::io("remove", &trial))?;
    Ok(cloned?.then_some(reflink))
}

fn reflink(to: &File, from: &File) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

fn create(path: &Path) -> Result<File, DrillError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    made.map_err(DrillError::io("create", path))
}

/// The arrays that have images, in the order of `point.ram` and then `point.disks`, with the standby's files.
fn images(reader: &PointReader, point: &RecoveryPoint) -> Vec<(Array, PathBuf)> {
    let paths = point.ram.iter().map(|block| &block.path).chain(point.disks.iter().map(|disk| &disk.path));
    reader.arrays().zip(paths.cloned()).collect()
}

/// The file of a RAM block, by its number in the layout.
pub fn ram_path(directory: &Path, number: usize) -> PathBuf {
    directory.join("ram").join(format!("{number}.img"))
}

/// The file of a disk, by its number among the images. (Targets come from outside.)
pub fn disk_path(directory: &Path, number: usize) -> PathBuf {
    directory.join("disk").join(format!("{number}.raw"))
}

/// The file with the device state.
pub fn device_path(directory: &Path) -> PathBuf {
    directory.join("device.state")
}

/// Makes a copy durable.
pub fn sync(directory: &Path) -> Result<(), DrillError> {
    for entry in fs::read_dir(directory).map_err(DrillError::io("list", directory))? {
        let path = entry.map_err(DrillError::io("list", directory))?.path();
        if path.is_dir() {
            sync(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(DrillError::io("sync", &path))?;
        }
    }
    File::open(directory).and_then(|own| own.sync_all()).map_err(DrillError::io("sync", directory))
}

/// Copies the point into `directory`, which is there and empty.
pub fn copy(
    reader: &Arc<PointReader>,
    directory: &Path,
    clone: Option<Clone>,
    pieces: Pieces,
    pace: &mut Pace<'_>,
) -> Result<(RecoveryPoint, Cost), DrillError> {
    let standby = Arc::clone(reader).recovery_point();
    // What shares blocks with what is encrypted is so, too.
    let clone = clone.filter(|_| !standby.sealed);
    let mut cost = Cost::default();
    for part in ["ram", "disk"] {
        let part = directory.join(part);
        fs::create_dir(&part).map_err(DrillError::io("create", &part))?;
    }
    let mut paths = Vec::new();
    for (array, from) in images(reader, &standby) {
        let path = match array {
            Array::Ram(n) => ram_path(directory, usize::from(n)),
            _ => disk_path(directory, paths.len()),
        };
        image(reader, array, (&from, &path), clone, pieces, pace, &mut cost)?;
        paths.push(path);
    }
    let mut paths = paths.into_iter();
    let mut next = |old: &PathBuf| paths.next().unwrap_or_else(|| old.clone());
    let ram = standby.ram.iter().map(|block| RamImage { path: next(&block.path), ..block.clone() }).collect();
    let disks = standby.disks.iter().map(|disk| DiskImage { path: next(&disk.path), ..disk.clone() }).collect();
    let device_state = device_path(directory);
    fs::write(&device_state, reader.device_state()).map_err(DrillError::io("write", &device_state))?;
    let copy = RecoveryPoint {
        ram,
        disks,
        device_state,
        dir: directory.to_owned(),
        older: None,
        checked: None,
        sealed: false,
        ..standby
    };
    Ok((copy, cost))
}

fn image(
    reader: &PointReader,
    array: Array,
    (from, path): (&Path, &Path),
    clone: Option<Clone>,
    pieces: Pieces,
    pace: &mut Pace<'_>,
    cost: &mut Cost,
) -> Result<(), DrillError> {
    let to = create(path)?;
    let length = reader.length(array);
    let cloned = match (clone, File::open(from)) {
        (Some(clone), Ok(from_file)) => clone(&to, &from_file).map_err(DrillError::io("clone", from))?,
        // A block that is gone is read like any other.
        _ => false,
    };
    if cloned {
        cost.shared_bytes += to.metadata().map_or(0, |of| of.blocks() * 512);
    }
    to.set_len(length).map_err(DrillError::io("size", path))?;
    // Only now: what was written while it was cloned is among them.
    let ranges: Vec<(u64, u64)> = match cloned {
        true => reader.differences(array)?.iter().map(|change| (change.offset, change.bytes)).collect(),
        false => vec![(0, length)],
    };
    let copier = Copier { reader, array, to: &to, path, length, pieces, over: cloned };
    cost.copied_bytes += copier.ranges(&ranges, pace)?;
    Ok(())
}

/// What was read, and where it is from.
type Piece = (u64, Vec<u8>);

struct Copier<'a> {
    reader: &'a PointReader,
    array: Array,
    to: &'a File,
    path: &'a Path,
    length: u64,
    pieces: Pieces,
    /// There is something, which zeroes have to replace.
    over: bool,
}

impl Copier<'_> {
    /// One reads while another writes. Returns the bytes written.
    fn ranges(&self, ranges: &[(u64, u64)], pace: &mut Pace<'_>) -> Result<u64, DrillError> {
        if ranges.is_empty() {
            return Ok(0);
        }
        std::thread::scope(|scope| {
            let (full, to_write) = sync_channel::<Piece>(WAITING_MAX);
            let (empty, to_fill) = channel::<Vec<u8>>();
            let writer = std::thread::Builder::new().name("copy".to_owned());
            let writer = writer.spawn_scoped(scope, move || self.write_all(&to_write, &empty));
            let writer = writer.map_err(DrillError::io("start a thread for", self.path))?;
            let read = ranges.iter().try_for_each(|range| self.read(*range, &full, &to_fill, pace));
            drop(full);
            let written = writer.join().map_err(|_| DrillError::Stopped("the copy's writer has ended".to_owned()));
            // Where the writer fails the reader only finds it gone.
            let written = written??;
            read.map(|()| written)
        })
    }

    fn read(
        &self,
        (offset, bytes): (u64, u64),
        full: &SyncSender<Piece>,
        to_fill: &Receiver<Vec<u8>>,
        pace: &mut Pace<'_>,
    ) -> Result<(), DrillError> {
        let end = offset.saturating_add(bytes).min(self.length);
        let mut at = offset;
        while at < end {
            if !self.over {
                at = self.reader.data_from(self.array, at)?;
                if at >= end {
                    break;
                }
            }
            let now = (end - at).min(self.pieces.bytes as u64);
            pace(now)?;
            let mut piece = to_fill.try_recv().unwrap_or_default();
            piece.resize(now as usize, 0);
            self.reader.read(self.array, at, &mut piece)?;
            if full.send((at, piece)).is_err() {
                return Ok(());
            }
            at += now;
        }
        Ok(())
    }

    fn write_all(&self, to_write: &Receiver<Piece>, empty: &Sender<Vec<u8>>) -> Result<u64, DrillError> {
        let (mut written, mut unsynced) = (0, 0);
        for (at, piece) in to_write {
            let mut from = 0;
            while from < piece.len() {
                let (end, zero) = self.run(&piece, from);
                if !zero {
                    let to = at + from as u64;
                    self.to.write_all_at(&piece[from..end], to).map_err(DrillError::io("write", self.path))?;
                    written += (end - from) as u64;
                    unsynced += (end - from) as u64;
                }
                from = end;
            }
            if unsynced >= self.pieces.sync_bytes {
                unsynced = 0;
                self.to.sync_data().map_err(DrillError::io("sync", self.path))?;
            }
            // Nobody needs it any more at the end.
            let _ = empty.send(piece);
        }
        Ok(written)
    }

    /// Where the grains end that are zero like the one at `from`, or are not; all are to be written over what there is.
    fn run(&self, piece: &[u8], from: usize) -> (usize, bool) {
        if self.over {
            return (piece.len(), false);
        }
        let is_zero = |grain: &[u8]| grain.iter().all(|byte| *byte == 0);
        let mut grains = piece[from..].chunks(GRAIN_BYTES);
        let zero = grains.next().is_some_and(is_zero);
        let more = grains.take_while(|grain| is_zero(grain) == zero).map(<[u8]>::len).sum::<usize>();
        ((from + GRAIN_BYTES.min(piece.len() - from)) + more, zero)
    }
}
