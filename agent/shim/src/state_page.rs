//! A small file, mapped by the shim and by whoever watches it, that survives either: does the shim live, and has it
//! paused the guest?
//!
//! The shim writes "paused by me" *before* it sends `stop` and clears it after `cont` was answered. Whoever finds it
//! set and the shim dead or hanging may resume the guest; whoever finds it clear must not, because then somebody
//! else stopped it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const MAGIC: u64 = u64::from_le_bytes(*b"vmdrshim");
const BYTES: usize = 4096;

#[repr(C)]
struct Page {
    magic: AtomicU64,
    pid: AtomicU64,
    heartbeat: AtomicU64,
    paused: AtomicU64,
    standing: AtomicU64,
}

/// The mapping. Every field is one word that is read and written whole.
#[derive(Debug)]
pub struct StatePage {
    page: NonNull<Page>,
}

// SAFETY: all access is through atomics.
unsafe impl Send for StatePage {}
// SAFETY: as above.
unsafe impl Sync for StatePage {}

impl StatePage {
    /// Makes a fresh page for this process.
    pub fn create(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(BYTES as u64)?;
        let this = Self::map(&file)?;
        this.get().pid.store(u64::from(std::process::id()), Ordering::Relaxed);
        this.get().magic.store(MAGIC, Ordering::Release);
        Ok(this)
    }

    /// Opens the page of another process.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() < BYTES as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "state page is too short"));
        }
        let this = Self::map(&file)?;
        if this.get().magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a shim's state page"));
        }
        Ok(this)
    }

    /// The shim's pid.
    pub fn pid(&self) -> i32 {
        self.get().pid.load(Ordering::Relaxed) as i32
    }

    /// A number that rises while the shim lives and is scheduled.
    pub fn heartbeat(&self) -> u64 {
        self.get().heartbeat.load(Ordering::Relaxed)
    }

    /// Shows that the shim lives.
    pub fn beat(&self) {
        self.get().heartbeat.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the shim has stopped the guest and not resumed it.
    pub fn paused(&self) -> bool {
        self.get().paused.load(Ordering::Acquire) != 0
    }

    /// Says so, before `stop` and after `cont`.
    pub fn set_paused(&self, paused: bool) {
        self.get().paused.store(u64::from(paused), Ordering::Release);
    }

    /// Whether QEMU has answered a `stop` of the shim's, and no `cont` was sent since.
    pub fn standing(&self) -> bool {
        self.get().standing.load(Ordering::SeqCst) != 0
    }

    /// Says so, after `stop` was answered and before `cont` is sent.
    pub fn set_standing(&self, standing: bool) {
        self.get().standing.store(u64::from(standing), Ordering::SeqCst);
    }

    fn map(file: &File) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choosing, of a file of at least that length.
        let page = unsafe {
            mmap(std::ptr::null_mut(), BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)?
        };
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { page })
    }

    fn get(&self) -> &Page {
        // SAFETY: the mapping lives as long as `self`, is aligned to a page and larger than `Page`, whose fields are
        // atomics, for which any bytes are a value.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for StatePage {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, which nobody references any more.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_seen_by_another_mapping_and_survives() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let shim = StatePage::create(&path).unwrap();
        let agent = StatePage::open(&path).unwrap();
        assert_eq!(agent.pid(), std::process::id() as i32);
        shim.beat();
        assert_eq!(agent.heartbeat(), 1);
        shim.set_paused(true);
        drop(shim);
        assert!(StatePage::open(&path).unwrap().paused());
        std::fs::write(&path, [0; BYTES]).unwrap();
        assert!(StatePage::open(&path).is_err());
    }
}
