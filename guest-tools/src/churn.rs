//! Takes memory from the kernel, fills it, looks at it and gives it back, again and again: free pages for a balloon or for
//! reporting to the host, and fresh ones that the host gave away before.

use crate::aligned::{Aligned, PAGE_BYTES};
use crate::stamp::{self, Area};
use crate::state::State;
use crate::workers::Worker;
use anyhow::{Result, bail};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

/// Noise in a page: enough to tell pages apart.
const FILL_BYTES: usize = 64;
/// Memory is kept, and then kept free, this long: the guest's kernel reports free pages after two seconds at most.
const REST: Duration = Duration::from_millis(400);

/// See the module.
pub struct Churn {
    state: Arc<State>,
    round: u64,
}

impl Churn {
    /// As much as the state says, which can change.
    pub fn new(state: &Arc<State>) -> Self {
        Self { state: Arc::clone(state), round: 0 }
    }
}

impl Worker for Churn {
    fn step(&mut self) -> Result<()> {
        let pages = (self.state.churn_mib.load(SeqCst) as usize * (1 << 20)) / PAGE_BYTES;
        self.round += 1;
        let mut memory = Aligned::new(pages * PAGE_BYTES);
        for page in 0..pages {
            stamp::write(memory.page_mut(page), Area::Churn, page as u64, self.round, FILL_BYTES);
        }
        thread::sleep(REST);
        for page in 0..pages {
            if let Err(bad) = stamp::check(memory.page(page), Area::Churn, page as u64, self.round, FILL_BYTES) {
                bail!("page {page} of fresh memory {bad}");
            }
        }
        drop(memory);
        thread::sleep(REST);
        Ok(())
    }

    /// Every step checks itself.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }
}
