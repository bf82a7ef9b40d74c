//! The two kernel interfaces of the dirty log: userfaultfd's asynchronous write protection and PAGEMAP_SCAN.
//!
//! Structures and numbers are those of `linux/userfaultfd.h` and `linux/fs.h` of kernel 6.7 and later (Debian 12's
//! headers lack them). The userfaultfd belongs to *another* process's address space: its ioctls act there, and
//! addresses are that process's. Nothing here touches memory of this process except the region vector.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// Flags of the `userfaultfd` system call that is injected: close on exec, never block, user mode only (which is
/// enough, because asynchronous write protection delivers no fault, and needs no privilege).
pub const USERFAULTFD_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

/// Category: written since it was last protected.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Category: in memory.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Regions that one PAGEMAP_SCAN call can return; a longer answer takes more calls.
const REGIONS_PER_CALL: usize = 16 << 10;

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

use numbers::{PAGEMAP_SCAN, UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WRITEPROTECT};

#[allow(missing_docs)]
mod numbers {
    use super::{PmScanArg, UffdioApi, UffdioRange, UffdioRegister, UffdioWriteprotect};
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

    ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, UffdioApi);
    ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, UffdioRegister);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, 0xaa, 0x01, UffdioRange);
    ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, 0xaa, 0x06, UffdioWriteprotect);
    ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as std::ffi::c_uint, 16, PmScanArg);
}

/// A userfaultfd of some process's address space, in the mode that reports writes and never stops a thread.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Takes a fresh descriptor and performs the API handshake.
    pub fn handshake(fd: OwnedFd) -> io::Result<Self> {
        let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `UffdioApi`, which `api` is.
        if unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd })
    }

    /// Whether a descriptor with these features reports writes and never stops a thread.
    pub fn suffices(features: u64) -> bool {
        let needed = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED;
        features & needed == needed
    }

    /// Takes a descriptor on which the handshake was done before: the dirty log that it holds is still valid.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Registers `length` bytes from `start` for write protection. Multiples of the mapping's page size.
    pub fn register(&self, start: u64, length: u64) -> io::Result<()> {
        let mut register =
            UffdioRegister { range: UffdioRange { start, len: length }, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `UffdioRegister`, which `register` is.
        if unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_REGISTER(), &mut register) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Ends the watch over a range; its pages become ordinary again.
    pub fn unregister(&self, start: u64, length: u64) -> io::Result<()> {
        let range = UffdioRange { start, len: length };
        // SAFETY: the kernel reads one `UffdioRange`, which `range` is.
        if unsafe { ioctl_with_ref(&self.fd, UFFDIO_UNREGISTER(), &range) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Protects a registered range: from now on its written pages are those written after this call.
    pub fn protect(&self, start: u64, length: u64) -> io::Result<()> {
        let mut protect =
            UffdioWriteprotect { range: UffdioRange { start, len: length }, mode: UFFDIO_WRITEPROTECT_MODE_WP };
        loop {
            // SAFETY: the kernel reads one `UffdioWriteprotect`, which `protect` is.
            if unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_WRITEPROTECT(), &mut protect) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // EAGAIN: the address space was changing (mmap_changing); the call had no effect.
            if error.raw_os_error() != Some(libc::EAGAIN) {
                return Err(error);
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads page categories of another process through its `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
    regions: Vec<PageRegion>,
}

/// Which pages a scan reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Written since they were protected. Fails with EPERM where the range is not watched (any more).
    Written,
    /// The same, and protected again in the same step: what is reported is consumed, and nothing else is.
    WrittenAndProtect,
    /// In memory. (What is swapped out looks like what was never touched, once it is protected.)
    Populated,
}

impl Pagemap {
    /// Wraps an open `/proc/PID/pagemap`.
    pub fn new(file: OwnedFd) -> Self {
        Self { file, regions: vec![PageRegion::default(); REGIONS_PER_CALL] }
    }

    /// Calls `found(start, length)` for each region of matching pages in `start..start+length`, in ascending order.
    /// But for [`Pages::WrittenAndProtect`], changes nothing: what is reported as written stays so until it is protected
    /// again.
    pub fn scan(&mut self, start: u64, length: u64, pages: Pages, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let end = start + length;
        let mut from = start;
        while from < end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start: from,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                ..Default::default()
            };
            match pages {
                Pages::Written | Pages::WrittenAndProtect => {
                    arg.flags = PM_SCAN_CHECK_WPASYNC;
                    if pages == Pages::WrittenAndProtect {
                        arg.flags |= PM_SCAN_WP_MATCHING;
                    }
                    arg.category_mask = PAGE_IS_WRITTEN;
                    arg.return_mask = PAGE_IS_WRITTEN;
                }
                Pages::Populated => {
                    arg.category_mask = PAGE_IS_PRESENT;
                    arg.return_mask = PAGE_IS_PRESENT;
                }
            }
            // SAFETY: `arg` is the structure the kernel expects, and its vector is `regions`, with its true length,
            // which nobody else touches during the call.
            let n = unsafe { ioctl_with_mut_ref(&self.file, PAGEMAP_SCAN(), &mut arg) };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EINTR) {
                    continue;
                }
                return Err(error);
            }
            for region in &self.regions[..n as usize] {
                found(region.start, region.end - region.start);
            }
            // The kernel works through some hundred regions at a time and may leave `walk_end` at the end of one of those
            // rounds: only a full vector means that there is more.
            if (n as usize) < self.regions.len() || arg.walk_end <= from {
                break;
            }
            from = arg.walk_end;
        }
        Ok(())
    }
}

/// The target of a `/proc/PID/fd` link of a userfaultfd.
pub const UFFD_LINK: &str = "anon_inode:[userfaultfd]";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(size_of::<UffdioApi>(), 24);
        assert_eq!(size_of::<UffdioRegister>(), 32);
        assert_eq!(size_of::<UffdioWriteprotect>(), 24);
        assert_eq!(size_of::<PmScanArg>(), 96);
        assert_eq!(size_of::<PageRegion>(), 24);
        assert_eq!(std::mem::offset_of!(PmScanArg, walk_end), 32);
        assert_eq!(std::mem::offset_of!(PmScanArg, category_inverted), 64);
        assert_eq!(std::mem::offset_of!(PmScanArg, return_mask), 88);
        assert_eq!(UFFDIO_API(), 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER(), 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER(), 0x8010_aa01);
        assert_eq!(UFFDIO_WRITEPROTECT(), 0xc018_aa06);
        assert_eq!(PAGEMAP_SCAN(), 0xc060_6610);
    }

    /// Watches memory of this very process: the interface is the same as from outside.
    #[test]
    fn every_written_page_is_reported_once() {
        const PAGE: usize = 4096;
        const PAGES: usize = 64;
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, USERFAULTFD_FLAGS) };
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: the descriptor was just made and is nobody else's.
        let fd = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd as i32) };
        let uffd = Uffd::handshake(fd).unwrap();
        // SAFETY: an anonymous mapping of our own at an address of the kernel's choosing.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(memory, libc::MAP_FAILED);
        let start = memory as u64;
        let length = (PAGES * PAGE) as u64;
        uffd.register(start, length).unwrap();
        uffd.protect(start, length).unwrap();
        let file = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut pagemap = Pagemap::new(file.into());
        let mut written = |expected: &[(usize, usize)]| {
            let mut found = Vec::new();
            pagemap
                .scan(start, length, Pages::Written, |s, l| {
                    found.push(((s - start) as usize / PAGE, l as usize / PAGE));
                })
                .unwrap();
            assert_eq!(found, expected);
        };
        written(&[]);
        for page in [3, 4, 5, 63] {
            // SAFETY: within the mapping made above.
            unsafe { memory.cast::<u8>().add(page * PAGE + 7).write_volatile(1) };
        }
        written(&[(3, 3), (63, 1)]);
        uffd.protect(start + 3 * PAGE as u64, 3 * PAGE as u64).unwrap();
        written(&[(63, 1)]);
        let mut consumed = Vec::new();
        pagemap.scan(start, length, Pages::WrittenAndProtect, |s, l| consumed.push((s - start, l))).unwrap();
        assert_eq!(consumed, [(63 * PAGE as u64, PAGE as u64)]);
        let mut again = 0;
        pagemap.scan(start, length, Pages::Written, |_, _| again += 1).unwrap();
        assert_eq!(again, 0, "what was reported is protected");
        uffd.unregister(start, length).unwrap();
        let error = pagemap.scan(start, length, Pages::Written, |_, _| {}).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        // SAFETY: the mapping is ours and no longer used.
        unsafe { libc::munmap(memory, PAGES * PAGE) };
    }
}
