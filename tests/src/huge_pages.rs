//! Lets guests have huge pages: raises the kernel's limit of those that it makes on demand, for as long as somebody needs it.
//!
//! Nothing is reserved. Each user holds a shared lock on one file, which has the limit from before; the last one restores it.
//! After a SIGKILL the raised limit stays until the next user has ended: a limit that nobody uses takes no memory.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::Path;

/// Of 2 MiB, which is what guests get here.
const LIMIT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
const LOCK: &str = "/run/lock/vmdr-test-huge-pages";
/// What several small guests take: 4 GiB.
const PAGES_MAX: u64 = 2048;

/// The raised limit. Dropping the last one of all processes restores the old one.
pub struct HugePages {
    lock: File,
}

impl HugePages {
    /// Raises the limit, unless it is high enough.
    pub fn allow() -> Result<Self> {
        let lock = File::options().create(true).read(true).write(true).truncate(false).open(LOCK);
        let lock = lock.with_context(|| format!("open {LOCK}"))?;
        lock.lock().context("lock the limit of huge pages")?;
        let now: u64 = fs::read_to_string(LIMIT).with_context(|| format!("read {LIMIT}"))?.trim().parse()?;
        if now < PAGES_MAX {
            fs::write(LOCK, now.to_string()).context("note the limit of huge pages")?;
            fs::write(LIMIT, PAGES_MAX.to_string()).with_context(|| format!("write {LIMIT}"))?;
        }
        lock.lock_shared().context("share the limit of huge pages")?;
        Ok(Self { lock })
    }

    /// Fails unless a process has memory in huge pages.
    pub fn expect_used(pid: u32) -> Result<()> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(Path::new(&path)).with_context(|| format!("read {path}"))?;
        let kib = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        let used: u64 = text.lines().filter(|line| line.contains("_Hugetlb:")).filter_map(kib).sum();
        if used == 0 {
            bail!("process {pid} uses no huge pages: {text}");
        }
        Ok(())
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.lock.unlock().is_err() || self.lock.try_lock().is_err() {
            return;
        }
        // Nobody else needs it.
        if let Ok(before) = fs::read_to_string(LOCK)
            && let Ok(before) = before.trim().parse::<u64>()
            && fs::write(LIMIT, before.to_string()).is_ok()
        {
            let _ = fs::write(LOCK, "");
        }
    }
}
