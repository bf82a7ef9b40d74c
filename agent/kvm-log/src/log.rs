//! What a dirty log is, whoever keeps it.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vmdr_bitmap::Bitmap;

use crate::PAGE_BYTES;

/// A memory slot of the guest, as `KVM_SET_USER_MEMORY_REGION` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// KVM's number of it; the address space (SMM) in the upper 16 bits.
    pub number: u32,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Its length, a multiple of [`PAGE_BYTES`].
    pub bytes: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
    /// The guest cannot write it (KVM_MEM_READONLY).
    pub read_only: bool,
}

impl Slot {
    /// Its length in pages.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }
}

/// Why a log could not be begun or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// This KVM has no such log.
    #[error("this kernel's KVM has no {0}")]
    Unsupported(&'static str),
    /// The number of a ring's entries is not one that this KVM takes.
    #[error("a dirty ring of {entries} entries: allowed are powers of two from {min} to {max}")]
    RingEntries {
        /// What was asked for.
        entries: u32,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// A slot is empty or not made of whole pages, or its number is there twice.
    #[error("memory slot {0} is empty, not made of whole pages, or there twice")]
    Slot(u32),
    /// There are no rings: no vCPU was added before the log began.
    #[error("no vCPU was added to the ring log before it began")]
    NoVcpu,
    /// The sets to collect into are not those of the log's slots.
    #[error("the sets of pages to collect into do not fit the log's slots")]
    Shape,
    /// KVM reports a page of a slot that the log was not told of. Some other code logs into the same rings.
    #[error("KVM reports page {page} of slot {slot}, which is not logged here")]
    Stray {
        /// KVM's number of the slot.
        slot: u32,
        /// The page in it.
        page: u64,
    },
    /// KVM refused a call.
    #[error("{call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A log that is not KVM's failed.
    #[error("{0}")]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl LogError {
    pub(crate) fn kvm(call: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> Self {
        move |error| Self::Kvm { call, source: io::Error::from_raw_os_error(error.errno()) }
    }
}

/// Tells which pages of a guest's memory were written.
///
/// The contract:
/// - A page written after the log began, or after it was last reported, is reported by a later [`collect`](Self::collect).
///   What was there before the log began is not reported: a first copy is of everything.
/// - A report may be consumed by `collect`, which is why it *adds* to the caller's sets: they are what remembers it. Also when it
///   fails, nothing that was consumed is missing in the sets and in what the log still reports.
/// - vCPUs may run meanwhile, if the page is copied *after* `collect` returned: what is written later is reported again. A
///   copy of an instant takes a `collect` with all vCPUs out of `KVM_RUN`, since processors hold back some reports until then.
/// - KVM's logs report what vCPUs write, and KVM for them. What the VMM itself writes (device emulation), and devices that
///   write memory past KVM, is for the VMM to add.
pub trait DirtyLog {
    /// What is logged. The sets given to [`collect`](Self::collect) are in the same order.
    fn slots(&self) -> &[Slot];

    /// Adds the pages written since they were last reported to `into`, a set for each slot, and logs them anew.
    fn collect(&mut self, into: &mut [Bitmap]) -> Result<(), LogError>;

    /// Empty sets of the right sizes.
    fn sets(&self) -> Vec<Bitmap> {
        self.slots().iter().map(|slot| Bitmap::new(slot.pages())).collect()
    }
}

/// An error unless `into` has a set of the right size for each slot.
pub(crate) fn check_sets(slots: &[Slot], into: &[Bitmap]) -> Result<(), LogError> {
    let fits = slots.len() == into.len() && slots.iter().zip(into).all(|(slot, set)| slot.pages() == set.len());
    if fits { Ok(()) } else { Err(LogError::Shape) }
}

pub(crate) fn check_slots(slots: &[Slot]) -> Result<(), LogError> {
    for (index, slot) in slots.iter().enumerate() {
        let whole = slot.bytes > 0
            && [slot.bytes, slot.guest_address, slot.host_address].iter().all(|n| n.is_multiple_of(PAGE_BYTES));
        // A slot of KVM's has less than 2^31 pages, which CLEAR_DIRTY_LOG's numbers rely on.
        let fits = slot.pages() < 1 << 31;
        if !whole || !fits || slots[..index].iter().any(|other| other.number == slot.number) {
            return Err(LogError::Slot(slot.number));
        }
    }
    Ok(())
}

/// Sets the slots with logging on. When one fails, it is switched off again for those before it.
///
/// # Safety
/// As for the `begin` of both logs.
#[allow(unsafe_code)]
pub(crate) unsafe fn switch_on(vm: &Arc<VmFd>, slots: &[Slot]) -> Result<(), LogError> {
    check_slots(slots)?;
    for (index, slot) in slots.iter().enumerate() {
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { set_region(vm, slot, true) } {
            // SAFETY: the same.
            unsafe { switch_off(vm, &slots[..index]) };
            return Err(error);
        }
    }
    Ok(())
}

/// Switches logging off; a slot that is gone needs no end.
///
/// # Safety
/// As for the `begin` of both logs.
#[allow(unsafe_code)]
pub(crate) unsafe fn switch_off(vm: &Arc<VmFd>, slots: &[Slot]) {
    for slot in slots {
        // SAFETY: the caller's promise.
        let _ = unsafe { set_region(vm, slot, false) };
    }
}

/// # Safety
/// The slot's memory is mapped here for as long as the guest has it.
#[allow(unsafe_code)]
unsafe fn set_region(vm: &VmFd, slot: &Slot, log: bool) -> Result<(), LogError> {
    let mut flags = if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    if slot.read_only {
        flags |= KVM_MEM_READONLY;
    }
    let region = kvm_userspace_memory_region {
        slot: slot.number,
        flags,
        guest_phys_addr: slot.guest_address,
        memory_size: slot.bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the caller's promise.
    unsafe { vm.set_user_memory_region(region) }.map_err(LogError::kvm("KVM_SET_USER_MEMORY_REGION"))
}
