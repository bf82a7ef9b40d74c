//! The calls of `linux/kvm.h` that kvm-ioctls does not have.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};

use crate::log::LogError;

use numbers::{KVM_CLEAR_DIRTY_LOG, KVM_GET_DIRTY_LOG, KVM_RESET_DIRTY_RINGS};

/// Bits of a ring's entry (`KVM_DIRTY_GFN_F_*`): KVM has filled it; we have read it.
pub const ENTRY_DIRTY: u32 = 1;
pub const ENTRY_RESET: u32 = 2;

#[allow(missing_docs)]
mod numbers {
    use super::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log};
    use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

/// Fills `words` with the bitmap of a slot of `pages` pages; changes nothing, given manual protection.
///
/// # Safety
/// The slot has at most `64 * words.len()` pages.
pub unsafe fn get_dirty_log(vm: &VmFd, slot: u32, words: &mut [u64]) -> Result<(), LogError> {
    let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() };
    let argument = kvm_dirty_log { slot, padding1: 0, __bindgen_anon_1: bitmap };
    // SAFETY: the kernel reads one `kvm_dirty_log` and writes a bit for each page of the slot to where it points; there are
    // enough words, says the caller.
    checked("KVM_GET_DIRTY_LOG", || unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &argument) })
}

/// Forgets the pages whose bits are set in `words`, of `pages` pages from `first`, and protects them again.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first: u64, pages: u32, words: &mut [u64]) -> Result<(), LogError> {
    assert!(pages as usize <= words.len() * 64, "{pages} pages in {} words", words.len());
    let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() };
    let mut argument = kvm_clear_dirty_log { slot, num_pages: pages, first_page: first, __bindgen_anon_1: bitmap };
    // SAFETY: the kernel reads one `kvm_clear_dirty_log` and `pages` bits from where it points, which are there.
    checked("KVM_CLEAR_DIRTY_LOG", || unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut argument) })
}

/// Gives the entries that were read back to KVM, which protects their pages again.
pub fn reset_dirty_rings(vm: &VmFd) -> Result<(), LogError> {
    // SAFETY: the call takes no argument.
    checked("KVM_RESET_DIRTY_RINGS", || unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

fn checked(call: &'static str, mut run: impl FnMut() -> libc::c_int) -> Result<(), LogError> {
    loop {
        if run() >= 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        // A signal may interrupt a long one; what it did until then stays done.
        if source.raw_os_error() != Some(libc::EINTR) {
            return Err(LogError::Kvm { call, source });
        }
    }
}

/// Maps `bytes` of a vCPU's descriptor from `offset`, shared.
pub fn map(descriptor: &impl AsRawFd, offset: u64, bytes: usize) -> Result<*mut libc::c_void, LogError> {
    // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            descriptor.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(LogError::Kvm { call: "map a vCPU's dirty ring", source: io::Error::last_os_error() });
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(KVM_GET_DIRTY_LOG(), 0x4010_ae42);
        assert_eq!(KVM_CLEAR_DIRTY_LOG(), 0xc018_aec0);
        assert_eq!(KVM_RESET_DIRTY_RINGS(), 0xaec7);
    }
}
