//! Whether the guest may run here: a small file, mapped by the agent, which writes it, by the shim, which heeds it, and read
//! by libvirt's hook before a start.
//!
//! It is not a part of the [state page](crate::state_page), because it outlives shims: whoever comes next finds what was
//! in force. It is lost with the host's memory, so that a host that was started anew has none. A domain that nobody takes
//! by himself (manual failover) may always run.
//!
//! What is written is in force at once, whatever the shim is doing: there is no request that could wait behind a cut.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::time::{ClockId, clock_gettime};
pub use vmdr_witness::{May, Time};

const MAGIC: u64 = u64::from_le_bytes(*b"vmdrmay1");
const BYTES: usize = 4096;
/// As a shell can compare it: the hook does.
const ALWAYS: u64 = i64::MAX as u64;

#[repr(C)]
struct Words {
    magic: AtomicU64,
    /// 0: never; [`ALWAYS`]; else up to this moment of `CLOCK_BOOTTIME`, in nanoseconds. The hook reads it.
    may: AtomicU64,
    /// The guest was stopped because of it, and nobody else has stopped it.
    stopped: AtomicU64,
}

/// The mapping. Every field is one word that is read and written whole.
#[derive(Debug)]
pub struct Permission {
    words: NonNull<Words>,
}

// SAFETY: all access is through atomics.
unsafe impl Send for Permission {}
// SAFETY: as above.
unsafe impl Sync for Permission {}

/// The clock that deadlines are of: it goes on while the host is suspended.
pub fn now() -> Time {
    let now = clock_gettime(ClockId::Boottime);
    Time::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Permission {
    /// Opens the file of a domain, which has to be there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() < BYTES as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too short for a guest's permission"));
        }
        // SAFETY: a new shared mapping at an address of the kernel's choosing, of a file of at least that length.
        let words = unsafe {
            mmap(std::ptr::null_mut(), BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        let words = NonNull::new(words.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let this = Self { words };
        if this.get().magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a guest's permission"));
        }
        Ok(this)
    }

    /// The same, or makes it, with `absent` in force. Whether it was there.
    pub fn open_or_create(path: &Path, absent: May) -> io::Result<(Self, bool)> {
        match Self::open(path) {
            Ok(this) => return Ok((this, true)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // Whole or not at all: whoever finds it heeds it.
        let fresh = path.with_extension("new");
        let file = File::create(&fresh)?;
        file.set_len(BYTES as u64)?;
        file.write_all_at(&MAGIC.to_ne_bytes(), 0)?;
        file.write_all_at(&encode(absent).to_ne_bytes(), 8)?;
        std::fs::rename(&fresh, path)?;
        Ok((Self::open(path)?, false))
    }

    /// Whether the guest may run.
    pub fn may(&self) -> May {
        decode(self.get().may.load(Ordering::SeqCst))
    }

    /// Whether it may at this moment.
    pub fn allows(&self) -> bool {
        self.may().at(now())
    }

    /// Puts it in force. The agent alone does.
    pub fn set(&self, may: May) {
        self.get().may.store(encode(may), Ordering::SeqCst);
    }

    /// Whether the guest was stopped because it may not run, and by nobody else.
    pub fn stopped(&self) -> bool {
        self.get().stopped.load(Ordering::SeqCst) != 0
    }

    /// Says so, before `stop` and after `cont`.
    pub fn set_stopped(&self, stopped: bool) {
        self.get().stopped.store(u64::from(stopped), Ordering::SeqCst);
    }

    fn get(&self) -> &Words {
        // SAFETY: the mapping lives as long as `self`, is aligned to a page and larger than `Words`, whose fields are
        // atomics, for which any bytes are a value.
        unsafe { self.words.as_ref() }
    }
}

impl Drop for Permission {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `open`, which nobody references any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), BYTES) };
    }
}

/// As a word, which [`State`](vmdr_proto::shim::State) has too.
pub fn encode(may: May) -> u64 {
    match may {
        May::Never => 0,
        May::Always => ALWAYS,
        May::Until(end) => u64::try_from(end.as_nanos()).unwrap_or(ALWAYS).min(ALWAYS - 1),
    }
}

fn decode(word: u64) -> May {
    match word {
        0 => May::Never,
        ALWAYS.. => May::Always,
        end => May::Until(Time::from_nanos(end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_writes_the_others_have_and_it_outlives_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("one.may");
        assert_eq!(Permission::open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let (agent, there) = Permission::open_or_create(&path, May::Never).unwrap();
        assert!(!there && !agent.allows() && !agent.stopped());
        let shim = Permission::open(&path).unwrap();
        agent.set(May::Until(now() + Time::from_secs(60)));
        assert!(shim.allows());
        agent.set(May::Until(now()));
        assert!(!shim.allows());
        shim.set_stopped(true);
        drop((shim, agent));
        // It is not made anew where it is.
        let (agent, there) = Permission::open_or_create(&path, May::Always).unwrap();
        assert!(there && agent.stopped() && !agent.allows() && matches!(agent.may(), May::Until(_)));
        for may in [May::Never, May::Always, May::Until(Time::from_nanos(7))] {
            agent.set(may);
            assert_eq!(agent.may(), may);
        }
        std::fs::write(&path, [0; BYTES]).unwrap();
        assert!(Permission::open_or_create(&path, May::Always).is_err(), "what is not understood is no permission");
    }
}
