//! KVM's dirty rings: each vCPU names the pages that it writes.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_EXIT_DIRTY_RING_FULL,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmdr_bitmap::Bitmap;

use crate::PAGE_BYTES;
use crate::log::{DirtyLog, LogError, Slot, check_sets, switch_off, switch_on};
use crate::sys::{self, ENTRY_DIRTY, ENTRY_RESET};

/// The exit of a vCPU whose ring is full, as `VcpuExit::Unsupported` has it: [`RingLog::drain`], then run on.
pub const EXIT_RING_FULL: u32 = KVM_EXIT_DIRTY_RING_FULL;

/// The least entries: KVM keeps 64 in reserve, and up to 512 for what the processor buffers.
const ENTRIES_MIN: u32 = 1024;

/// The dirty rings of all vCPUs of a guest (KVM_CAP_DIRTY_LOG_RING).
///
/// Reading costs by what was written, whatever the size of the slots. A ring that is full ends the vCPU's `KVM_RUN` with
/// [`EXIT_RING_FULL`] until somebody calls [`drain`](Self::drain) or [`collect`](DirtyLog::collect). A page can be
/// named several times; the log counts it once.
#[derive(Debug)]
pub struct RingLog {
    vm: Arc<VmFd>,
    entries: u32,
    rings: Vec<Ring>,
    slots: Vec<Slot>,
    /// Taken out of the rings and not reported yet.
    pending: Vec<Bitmap>,
}

impl RingLog {
    /// Gives the guest rings of `entries` each. Before the first vCPU is made; afterwards the guest can have no bitmap.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> Result<Self, LogError> {
        // The second is for processors with weaker order than x86's; where it is there it is the one to take.
        let offered = |cap: u32| (cap, vm.check_extension_raw(cap.into()));
        let (cap, bytes_max) = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .map(offered)
            .into_iter()
            .find(|(_, bytes)| *bytes > 0)
            .ok_or(LogError::Unsupported("dirty ring (KVM_CAP_DIRTY_LOG_RING)"))?;
        let max = bytes_max as u32 / size_of::<kvm_dirty_gfn>() as u32;
        if !entries.is_power_of_two() || !(ENTRIES_MIN..=max).contains(&entries) {
            return Err(LogError::RingEntries { entries, min: ENTRIES_MIN, max });
        }
        let mut capability = kvm_enable_cap { cap, ..Default::default() };
        capability.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        vm.enable_cap(&capability).map_err(LogError::kvm("enable KVM_CAP_DIRTY_LOG_RING"))?;
        Ok(Self { vm, entries, rings: Vec::new(), slots: Vec::new(), pending: Vec::new() })
    }

    /// Maps the ring of a vCPU of this guest. Of each vCPU, before it runs: what a vCPU writes is in its own ring only.
    pub fn add_vcpu(&mut self, vcpu: &VcpuFd) -> Result<(), LogError> {
        self.rings.push(Ring::map(vcpu, self.entries)?);
        Ok(())
    }

    /// Begins to log what is written to these slots. They are set with logging on (and made, if KVM does not have them).
    ///
    /// # Safety
    /// Each slot's memory is mapped in this process, writable, for as long as the guest has the slot.
    pub unsafe fn begin(&mut self, slots: Vec<Slot>) -> Result<(), LogError> {
        if self.rings.is_empty() {
            return Err(LogError::NoVcpu);
        }
        // SAFETY: the caller's promise.
        unsafe { switch_on(&self.vm, &slots)? };
        self.slots = slots;
        self.pending = self.sets();
        Ok(())
    }

    /// Makes room in the rings: what is in them is remembered here until the next [`collect`](DirtyLog::collect). vCPUs may run.
    pub fn drain(&mut self) -> Result<(), LogError> {
        let mut stray = None;
        for ring in &mut self.rings {
            let (slots, pending) = (&self.slots, &mut self.pending);
            ring.take(|number, page| {
                let index = slots.iter().position(|slot| slot.number == number && page < slot.pages());
                match index {
                    Some(index) => pending[index].insert(page, 1),
                    None => stray = Some(LogError::Stray { slot: number, page }),
                }
            });
        }
        sys::reset_dirty_rings(&self.vm)?;
        stray.map_or(Ok(()), Err)
    }

    /// Ends the log; the slots stay. What is still in the rings is given back to KVM.
    pub fn end(mut self) -> Result<(), LogError> {
        // SAFETY: the promise of `begin`.
        unsafe { switch_off(&self.vm, &self.slots) };
        self.drain()
    }
}

impl DirtyLog for RingLog {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn collect(&mut self, into: &mut [Bitmap]) -> Result<(), LogError> {
        check_sets(&self.slots, into)?;
        self.drain()?;
        for (pending, set) in self.pending.iter_mut().zip(into) {
            for (first, count) in pending.runs() {
                set.insert(first, count);
            }
            pending.clear();
        }
        Ok(())
    }
}

/// The ring of one vCPU, shared with KVM.
#[derive(Debug)]
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    length: u32,
    /// Number of the next entry to read, modulo 2^32.
    next: u32,
}

// SAFETY: the mapping belongs to the value alone, on whichever thread that is; KVM's side is met with atomic accesses.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, length: u32) -> Result<Self, LogError> {
        let bytes = length as usize * size_of::<kvm_dirty_gfn>();
        let address = sys::map(vcpu, u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES, bytes)?;
        let entries = NonNull::new(address.cast()).ok_or(LogError::Unsupported("address for a ring"))?;
        Ok(Self { entries, length, next: 0 })
    }

    /// Calls `found(slot, page)` for each entry that KVM has filled, in order, and marks it as read. At most the ring's
    /// length: KVM uses an entry again only after a reset.
    fn take(&mut self, mut found: impl FnMut(u32, u64)) {
        for _ in 0..self.length {
            // SAFETY: the index is below the ring's length, and the mapping lives as long as `self`.
            let entry = unsafe { self.entries.add((self.next & (self.length - 1)) as usize) }.as_ptr();
            // SAFETY: an aligned word of the mapping, which KVM and we access atomically only.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & ENTRY_DIRTY == 0 {
                return;
            }
            // SAFETY: KVM filled these fields before it set the flag, and leaves them until the reset.
            let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
            found(slot, page);
            flags.store(ENTRY_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and nothing refers into it any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.length as usize * size_of::<kvm_dirty_gfn>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring over ordinary memory, of which the test is KVM's side.
    fn ring(entries: &mut Vec<kvm_dirty_gfn>) -> std::mem::ManuallyDrop<Ring> {
        let length = entries.len() as u32;
        // Its memory is the vector's.
        std::mem::ManuallyDrop::new(Ring { entries: NonNull::new(entries.as_mut_ptr()).unwrap(), length, next: 0 })
    }

    #[test]
    fn entries_are_taken_once_and_in_order_around_the_end() {
        let mut entries = vec![kvm_dirty_gfn::default(); 8];
        let mut ring = ring(&mut entries);
        let mut filled = 0;
        for round in 0u64..20 {
            let count = round % 9;
            for page in filled..filled + count {
                // SAFETY: an entry of the vector, which outlives the ring.
                unsafe {
                    let entry = ring.entries.add(page as usize % 8).as_mut();
                    assert_ne!(entry.flags & ENTRY_DIRTY, ENTRY_DIRTY, "an entry is filled before it was read");
                    *entry = kvm_dirty_gfn { flags: ENTRY_DIRTY, slot: 7, offset: page };
                }
            }
            let mut taken = Vec::new();
            ring.take(|slot, page| taken.push((slot, page)));
            assert_eq!(taken, (filled..filled + count).map(|page| (7, page)).collect::<Vec<_>>());
            for page in filled..filled + count {
                // SAFETY: as above.
                let flags = unsafe { ring.entries.add(page as usize % 8).as_ref().flags };
                assert_eq!(flags, ENTRY_RESET, "what was read is marked for the reset");
            }
            filled += count;
        }
    }
}
