//! A disk whose files are encrypted, over another disk.
//!
//! What lies on the other disk is sealed with AES-256-GCM in blocks of 4 KiB, each writing of each block under a key of its own
//! ([`vmdr_keys::BlockKey`]). What is above it works as if it were the other disk, with the same contract
//! ([`vmdr_journal::Disk`]) down to the byte, also across crashes:
//!
//! - Each block has two *sides*. What is written goes to the side that the last synced version is not on, so that a write
//!   that a crash tears, or that is made into a block of which some bytes are durable already, costs nothing that was
//!   synced. The side with the higher number that opens counts.
//! - Whole blocks of *images* (`.img`, `.raw`) are written in place instead: whoever writes those keeps what they replace,
//!   and writes it back after a crash. So an image is not twice as large. Blocks that are written in part take the other side
//!   there too.
//! - A block that was never written is a hole, here and there, and costs nothing. One that is cleared gets a version without
//!   content, so that a crash leaves what it was or zeroes, and nothing between.
//! - A block that does not open reads, of an image, as an error (`EBADMSG`), as a bad sector would; of all other files as
//!   zeroes, as what a crash has torn may: these are full of checksums, or are some, and whoever reads them knows what that means.
//!
//! Names, lengths and times of files are not hidden. `docs/encryption.md` has the bytes.

mod clear;
mod file;
mod layout;
mod parallel;

use std::io;
use std::path::Path;
use std::sync::{Arc, RwLock};

use vmdr_journal::{Disk, File, LockGuard, Mode};
use vmdr_keys::BlockKey;

use file::SealedFile;
use layout::Kind;

/// See the crate's documentation.
#[derive(Debug, Clone)]
pub struct SealedDisk {
    inner: Arc<dyn Disk>,
    key: BlockKey,
    /// Of the files of the journal, which acknowledgements wait for, and of all others.
    gates: [Arc<RwLock<()>>; 2],
}

impl SealedDisk {
    /// Over `inner`: all files that are opened through this are sealed under `key`.
    pub fn new(inner: Arc<dyn Disk>, key: BlockKey) -> Self {
        Self { inner, key, gates: Default::default() }
    }
}

impl Disk for SealedDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Box<dyn File>> {
        let inner = self.inner.open(path, mode)?;
        // By the directory, out of which nothing of it is renamed.
        let journal = path.parent().is_some_and(|dir| dir.ends_with("journal"));
        let gate = Arc::clone(&self.gates[usize::from(journal)]);
        Ok(Box::new(SealedFile::new(inner, self.key.clone(), gate, Kind::of(path), mode)))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.inner.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_dir(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.inner.free_bytes(path)
    }

    fn used_bytes(&self, path: &Path) -> io::Result<u64> {
        self.inner.used_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        self.inner.lock(path)
    }
}
