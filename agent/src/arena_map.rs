//! A shim's arena, mapped read-only: checkpoints are encoded straight from it.
#![allow(unsafe_code)]

use std::fs::File;
use std::ptr::NonNull;

use anyhow::Context;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The mapping. The shim writes a range before it announces it, and not again before it is released.
#[derive(Debug)]
pub struct ArenaMap {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory that is only read through `get`, whose lifetime is bound to the mapping's.
unsafe impl Send for ArenaMap {}

impl ArenaMap {
    /// Maps descriptor `fd` of process `pid`.
    pub fn open(pid: u32, fd: i32, bytes: u64) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let file = File::open(&path).with_context(|| format!("open the shim's arena {path}"))?;
        let length = file.metadata().context("size of the shim's arena")?.len();
        anyhow::ensure!(length >= bytes && bytes > 0, "{path} has {length} bytes, not {bytes}: not an arena");
        let bytes = bytes as usize;
        // SAFETY: a new shared mapping at an address of the kernel's choosing, of a memfd that never shrinks.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, &file, 0) }
            .context("map the shim's arena")?;
        Ok(Self { base: NonNull::new(base.cast()).context("mapped at address 0")?, bytes })
    }

    /// A range of it, if it lies inside.
    pub fn get(&self, offset: u64, length: u64) -> Option<&[u8]> {
        let end = offset.checked_add(length)?;
        if end > self.bytes as u64 {
            return None;
        }
        // SAFETY: inside the mapping; the shim does not write ranges that it has announced and that are not released.
        Some(unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset as usize), length as usize) })
    }
}

impl Drop for ArenaMap {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `open`; slices of it do not outlive `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
