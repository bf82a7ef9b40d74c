//! KVM's bitmap of written pages, with manual protection.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap};
use kvm_ioctls::VmFd;
use vmdr_bitmap::Bitmap;

use crate::log::{DirtyLog, LogError, Slot, check_sets, switch_off, switch_on};
use crate::sys;

/// Pages that one KVM_CLEAR_DIRTY_LOG looks at, during which KVM's lock on the guest's mappings is held. A multiple of 64.
const WINDOW_PAGES: u64 = 256 << 10;

/// KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.
///
/// With manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) reading the bitmap consumes nothing, and only the pages found
/// are protected again, not the whole slot. Reading costs by the size of the slots, clearing by what was found.
#[derive(Debug)]
pub struct BitmapLog {
    vm: Arc<VmFd>,
    slots: Vec<Slot>,
    /// As KVM fills it; of the largest slot.
    words: Vec<u64>,
}

impl BitmapLog {
    /// Begins to log what is written to these slots. They are set with logging on (and made, if KVM does not have them).
    ///
    /// A guest that has a ring has no bitmap: KVM then refuses.
    ///
    /// # Safety
    /// Each slot's memory is mapped in this process, writable, for as long as the guest has the slot, and nobody makes the slot
    /// another size while this log lives.
    #[allow(unsafe_code)]
    pub unsafe fn begin(vm: Arc<VmFd>, slots: Vec<Slot>) -> Result<Self, LogError> {
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as i32 == 0 {
            return Err(LogError::Unsupported(
                "manual protection of the dirty log (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)",
            ));
        }
        let mut capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        capability.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
        vm.enable_cap(&capability).map_err(LogError::kvm("enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        // SAFETY: the caller's promise.
        unsafe { switch_on(&vm, &slots)? };
        let most = slots.iter().map(Slot::pages).max().unwrap_or(0);
        Ok(Self { vm, slots, words: vec![0; most.div_ceil(64) as usize] })
    }

    /// Ends the log; the slots stay.
    pub fn end(self) {
        // SAFETY: the promise of `begin`.
        #[allow(unsafe_code)]
        unsafe {
            switch_off(&self.vm, &self.slots)
        };
    }
}

impl DirtyLog for BitmapLog {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn collect(&mut self, into: &mut [Bitmap]) -> Result<(), LogError> {
        check_sets(&self.slots, into)?;
        for (slot, set) in self.slots.iter().zip(into) {
            let pages = slot.pages();
            let words = &mut self.words[..pages.div_ceil(64) as usize];
            // SAFETY: there is a bit for each page that the slot had in `begin`, and its size stays (the caller's promise).
            #[allow(unsafe_code)]
            unsafe {
                sys::get_dirty_log(&self.vm, slot.number, words)?
            };
            let windows = words.chunks_mut((WINDOW_PAGES / 64) as usize);
            for (window, first) in windows.zip((0..pages).step_by(WINDOW_PAGES as usize)) {
                let mut any = false;
                for (index, &word) in window.iter().enumerate().filter(|(_, word)| **word != 0) {
                    set.insert_word(first / 64 + index as u64, word);
                    any = true;
                }
                // Noted first, then forgotten by KVM: a failure reports a page twice, not never.
                if any {
                    let count = (pages - first).min(WINDOW_PAGES) as u32;
                    sys::clear_dirty_log(&self.vm, slot.number, first, count, window)?;
                }
            }
        }
        Ok(())
    }
}
