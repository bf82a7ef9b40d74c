//! The disk under journal and standby: a narrow seam, and its implementation on a file system.
//!
//! Contract, which a crash-simulating implementation may exploit: written bytes and lengths are durable after
//! [`File::sync`] of that file; created, renamed and removed names after [`Disk::sync_dir`] of their directory. Anything
//! not synced may after a crash be there, in part, or not.

use std::fmt::Debug;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// An existing one, for reading.
    Read,
    /// An existing one, for reading and writing.
    Write,
    /// A new one, for reading and writing; one that exists is emptied.
    Create,
}

/// Kept as long as a lock shall be held.
pub trait LockGuard: Send + Sync + Debug {}

/// Names and directories.
pub trait Disk: Send + Sync + Debug {
    /// Opens a file.
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Box<dyn File>>;
    /// Makes a directory and those above it. One that exists is no error.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, in no order. A missing directory is `NotFound`.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Renames a file or directory; a file that has the new name is replaced in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. A missing one is `NotFound`.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with all in it. A missing one is no error.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Bytes free to this process where `path` is.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Bytes that a file, or all below a directory, take up; holes do not count. A missing one takes none.
    fn used_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Takes the exclusive lock that `path` stands for, without waiting; `WouldBlock` if another has it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>>;
}

/// An open file. Offsets and lengths in bytes.
pub trait File: Send + Sync + Debug {
    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all the slices, one after another.
    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// Everything from `offset` up to what this returns reads as zeroes: where data begins, or the end of the file where no
    /// more comes. `offset` itself where there is data or nothing is known.
    fn data_from(&self, offset: u64) -> io::Result<u64>;
    /// Makes a range within the file read as zeroes, giving back its space where possible.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The file's length.
    fn length(&self) -> io::Result<u64>;
    /// Cuts the file, or extends it with a hole.
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Makes what was written, and the length, durable.
    fn sync(&self) -> io::Result<()>;
}

/// Writes one slice.
pub fn write_all(file: &dyn File, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_at(&mut [IoSlice::new(bytes)], offset)
}

/// A file system of the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct FsDisk;

#[derive(Debug)]
struct FsFile(fs::File);

#[derive(Debug)]
struct FsLock(#[allow(dead_code)] fs::File); // Held by being open.

impl LockGuard for FsLock {}

/// Slices that one `pwritev` takes; Linux's own limit is 1024.
const SLICES_MAX: usize = 512;
/// Bytes written at once where a hole cannot be punched.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

impl Disk for FsDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Box<dyn File>> {
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            Mode::Read => {}
            Mode::Write => {
                options.write(true);
            }
            Mode::Create => {
                options.write(true).create(true).truncate(true);
            }
        }
        Ok(Box::new(FsFile(options.open(path)?)))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn used_bytes(&self, path: &Path) -> io::Result<u64> {
        const BLOCK_BYTES: u64 = 512; // The unit of st_blocks.
        let meta = match fs::symlink_metadata(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
            other => other?,
        };
        let mut bytes = meta.blocks() * BLOCK_BYTES;
        if meta.is_dir() {
            let names = match self.list(path) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
                other => other?,
            };
            for name in names {
                bytes += self.used_bytes(&path.join(name))?;
            }
        }
        Ok(bytes)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Box::new(FsLock(file)))
    }
}

impl File for FsFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_at(&self, mut slices: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0); // Empty slices at the front would look like a full disk.
        while !slices.is_empty() {
            let now = slices.len().min(SLICES_MAX);
            match rustix::io::pwritev(&self.0, &slices[..now], offset) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    IoSlice::advance_slices(&mut slices, n);
                    offset += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn data_from(&self, offset: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.0, SeekFrom::Data(offset)) {
            Ok(at) => Ok(at),
            Err(rustix::io::Errno::NXIO) => Ok(self.length()?.max(offset)),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(offset),
            Err(e) => Err(e.into()),
        }
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.0, punch, offset, length) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => break,
                other => return Ok(other?),
            }
        }
        let mut done = 0;
        while done < length {
            let now = (length - done).min(ZEROES.len() as u64);
            write_all(self, &ZEROES[..now as usize], offset + done)?;
            done += now;
        }
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
