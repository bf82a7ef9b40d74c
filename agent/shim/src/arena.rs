//! Shared memory in which checkpoints wait for the agent: a memfd of fixed size, handed out in chunks.
//!
//! The arena bounds everything that is captured and not yet durable. A chunk belongs to exactly one owner at a time
//! ([`Chunk`] frees itself when dropped); only its owner writes it, and only before it is announced to the agent,
//! which maps the arena read-only.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// Bytes of a chunk: large enough that copying pages needs few system calls, small enough to waste little.
pub const CHUNK_BYTES: usize = 1 << 20;

/// The arena; clones share it.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    base: NonNull<u8>,
    chunks: usize,
    free: Mutex<BTreeSet<u32>>,
}

// SAFETY: `base` is a mapping that lives as long as `Shared`; access to its bytes is through `Chunk`s, which are
// disjoint by construction.
unsafe impl Send for Shared {}
// SAFETY: as above; the free list is behind a mutex.
unsafe impl Sync for Shared {}

/// One or more neighbouring chunks with a single owner.
#[derive(Debug)]
pub struct Chunk {
    shared: Arc<Shared>,
    first: u32,
    count: u32,
}

impl Arena {
    /// An arena of `bytes`, rounded up to whole chunks. Memory is taken as it is touched.
    pub fn new(bytes: u64) -> rustix::io::Result<Self> {
        let chunks = (bytes as usize).div_ceil(CHUNK_BYTES).max(1);
        let fd = memfd_create("vmdr-arena", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, (chunks * CHUNK_BYTES) as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choosing.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                chunks * CHUNK_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        let free = Mutex::new((0..chunks as u32).collect());
        Ok(Self { shared: Arc::new(Shared { fd, base, chunks, free }) })
    }

    /// The number of the memfd in this process.
    pub fn fd_number(&self) -> i32 {
        self.shared.fd.as_raw_fd()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        (self.shared.chunks * CHUNK_BYTES) as u64
    }

    /// Bytes that nobody owns.
    pub fn free_bytes(&self) -> u64 {
        (self.shared.free().len() * CHUNK_BYTES) as u64
    }

    /// Takes a chunk, the lowest free one: those are used most and their pages are there already.
    pub fn take(&self) -> Option<Chunk> {
        let first = self.shared.free().pop_first()?;
        Some(Chunk { shared: self.shared.clone(), first, count: 1 })
    }

    /// Takes neighbouring chunks that hold `bytes` together.
    pub fn take_contiguous(&self, bytes: usize) -> Option<Chunk> {
        let count = bytes.div_ceil(CHUNK_BYTES).max(1) as u32;
        let mut free = self.shared.free();
        let mut run = 0;
        let mut previous = None;
        let end = free.iter().copied().find(|&index| {
            run = if previous == index.checked_sub(1) && previous.is_some() { run + 1 } else { 1 };
            previous = Some(index);
            run == count
        })?;
        let first = end + 1 - count;
        for index in first..=end {
            free.remove(&index);
        }
        Some(Chunk { shared: self.shared.clone(), first, count })
    }

    /// Makes the next `bytes` to be taken present in memory, so that a cut does not pay for page faults.
    pub fn prefault(&self, bytes: usize) {
        let want: Vec<u32> = self.shared.free().iter().copied().take(bytes.div_ceil(CHUNK_BYTES)).collect();
        for index in want {
            // SAFETY: the range lies within the mapping; populating does not change its contents. A failure only
            // means that the page faults are paid later.
            let _ = unsafe {
                madvise(
                    self.shared.base.as_ptr().add(index as usize * CHUNK_BYTES).cast(),
                    CHUNK_BYTES,
                    Advice::LinuxPopulateWrite,
                )
            };
        }
    }
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        // The set is valid after every single operation on it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Chunk {
    /// Where in the arena it begins.
    pub fn offset(&self) -> u64 {
        u64::from(self.first) * CHUNK_BYTES as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.count as usize * CHUNK_BYTES
    }

    /// Never: a chunk has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Its bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the chunk's range lies in the mapping, which lives as long as `shared`, and belongs to this
        // `Chunk` alone, which is borrowed exclusively. The agent only reads.
        unsafe { std::slice::from_raw_parts_mut(self.shared.base.as_ptr().add(self.offset() as usize), self.len()) }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as in `bytes_mut`, shared with other readers.
        unsafe { std::slice::from_raw_parts(self.shared.base.as_ptr().add(self.offset() as usize), self.len()) }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let mut free = self.shared.free();
        for index in self.first..self.first + self.count {
            free.insert(index);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no `Chunk` is left, since each holds an `Arc` of this.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.chunks * CHUNK_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_disjoint_and_come_back() {
        let arena = Arena::new(4 * CHUNK_BYTES as u64).unwrap();
        let mut a = arena.take().unwrap();
        let mut b = arena.take().unwrap();
        a.bytes_mut().fill(1);
        b.bytes_mut().fill(2);
        assert!(a.bytes().iter().all(|&x| x == 1) && b.bytes().iter().all(|&x| x == 2));
        assert_eq!((a.offset(), b.offset()), (0, CHUNK_BYTES as u64));
        drop(a);
        assert_eq!(arena.free_bytes(), 3 * CHUNK_BYTES as u64);
        // 0, 2 and 3 are free: two neighbours are 2 and 3.
        let pair = arena.take_contiguous(CHUNK_BYTES + 1).unwrap();
        assert_eq!((pair.offset(), pair.len()), (2 * CHUNK_BYTES as u64, 2 * CHUNK_BYTES));
        assert!(arena.take_contiguous(CHUNK_BYTES + 1).is_none());
        assert_eq!(arena.take().unwrap().offset(), 0);
        drop(pair);
        assert_eq!(arena.free_bytes(), 3 * CHUNK_BYTES as u64);
    }
}
