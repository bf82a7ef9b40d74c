//! Tries the kernel's dirty log on a few pages of our own, with the very code that the shim uses on QEMU.
//!
//! A version number says nothing about a kernel that somebody patched or configured; a page that was written, reported,
//! protected and written again does.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use vmdr_proto::PAGE_BYTES;
use vmdr_shim::uffd::{Pagemap, Pages, USERFAULTFD_FLAGS, Uffd};

/// Pages of the area that is tried.
const PAGES: usize = 8;

/// What the area is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// As QEMU's memory is without further configuration.
    Anonymous,
    /// As with `<memoryBacking>` source memfd and shared access.
    Shared,
}

/// Writes, protects and writes again; an error says at which step the kernel did something else.
pub(super) fn dirty_log(memory: Memory) -> Result<(), String> {
    let step = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    // SAFETY: the system call takes one integer and returns a descriptor or an error.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, USERFAULTFD_FLAGS) };
    let raw = i32::try_from(raw).unwrap_or(-1);
    if raw < 0 {
        return Err(step("userfaultfd")(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just given this descriptor out, to nobody else.
    let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
    let uffd = Uffd::handshake(descriptor).map_err(step("UFFDIO_API with asynchronous write protection"))?;
    let area = Area::new(memory).map_err(step("map memory"))?;
    let mut pagemap = Pagemap::new(File::open("/proc/self/pagemap").map_err(step("open /proc/self/pagemap"))?.into());
    let mut written = |what: &'static str| -> Result<Vec<usize>, String> {
        let mut pages = Vec::new();
        let found = |start: u64, length: u64| {
            let first = (start - area.start()) as usize / PAGE_BYTES;
            pages.extend(first..first + length as usize / PAGE_BYTES);
        };
        pagemap.scan(area.start(), area.bytes(), Pages::Written, found).map_err(step(what))?;
        Ok(pages)
    };
    area.write(1);
    uffd.register(area.start(), area.bytes()).map_err(step("UFFDIO_REGISTER"))?;
    uffd.protect(area.start(), area.bytes()).map_err(step("UFFDIO_WRITEPROTECT"))?;
    // Page 1 was there when protection came, page 5 was not.
    for pages in [vec![], vec![1], vec![1, 5]] {
        if let Some(&last) = pages.last() {
            area.write(last);
        }
        let reported = written("PAGEMAP_SCAN")?;
        if reported != pages {
            return Err(format!("pages {pages:?} were written, PAGEMAP_SCAN reported {reported:?}"));
        }
    }
    uffd.protect(area.start(), area.bytes()).map_err(step("UFFDIO_WRITEPROTECT again"))?;
    let reported = written("PAGEMAP_SCAN")?;
    if !reported.is_empty() {
        return Err(format!("no page was written since it was protected, PAGEMAP_SCAN reported {reported:?}"));
    }
    uffd.unregister(area.start(), area.bytes()).map_err(step("UFFDIO_UNREGISTER"))
}

/// A mapping of [`PAGES`] pages that nothing else uses.
struct Area {
    address: *mut u8,
}

impl Area {
    fn new(memory: Memory) -> io::Result<Self> {
        let bytes = PAGES * PAGE_BYTES;
        let shared = match memory {
            Memory::Anonymous => None,
            Memory::Shared => {
                let file = rustix::fs::memfd_create("vmdr-probe", rustix::fs::MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&file, bytes as u64)?;
                Some(file)
            }
        };
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing.
        let address = unsafe {
            match &shared {
                None => {
                    let flags = rustix::mm::MapFlags::PRIVATE;
                    rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags)?
                }
                Some(file) => {
                    let flags = rustix::mm::MapFlags::SHARED;
                    rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0)?
                }
            }
        };
        Ok(Area { address: address.cast() })
    }

    fn start(&self) -> u64 {
        self.address as u64
    }

    fn bytes(&self) -> u64 {
        (PAGES * PAGE_BYTES) as u64
    }

    fn write(&self, page: usize) {
        assert!(page < PAGES, "page {page} of an area of {PAGES}");
        // SAFETY: the page is within the mapping, which is writable and lives as long as `self`. Volatile: that the kernel
        // sees the write is its purpose.
        unsafe { self.address.add(page * PAGE_BYTES).write_volatile(1) };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers into it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.address.cast(), PAGES * PAGE_BYTES) };
        debug_assert!(unmapped.is_ok(), "unmap what was mapped: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn works_on_this_kernel() {
        assert_eq!(dirty_log(Memory::Anonymous), Ok(()));
        assert_eq!(dirty_log(Memory::Shared), Ok(()));
    }
}
