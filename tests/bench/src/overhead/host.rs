//! What a guest's processor was doing, by the host kernel's own count.

use std::fs;

use anyhow::{Context, Result};
use vmdr_shim::qmp::Qmp;

/// The thread of a guest's first processor.
pub struct Vcpu {
    directory: String,
}

/// Counts since the thread began.
#[derive(Clone, Copy, Default)]
pub struct Spent {
    /// On a processor.
    pub running_seconds: f64,
    /// Ready to run, and no processor free.
    pub waiting_seconds: f64,
    /// Page faults that needed no disk; the first write to a protected page is one.
    pub faults: u64,
}

impl Spent {
    /// What has come to these since.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            running_seconds: self.running_seconds - before.running_seconds,
            waiting_seconds: self.waiting_seconds - before.waiting_seconds,
            faults: self.faults.saturating_sub(before.faults),
        }
    }
}

impl Vcpu {
    /// Asks QEMU for it.
    pub fn find(monitor: &mut Qmp, pid: i32) -> Result<Self> {
        let cpus = monitor.execute("query-cpus-fast", None)?;
        let thread = cpus[0]["thread-id"].as_u64().context("QEMU names no thread of its first processor")?;
        Ok(Self { directory: format!("/proc/{pid}/task/{thread}") })
    }

    /// The counts now.
    pub fn spent(&self) -> Result<Spent> {
        let read = |name: &str| {
            let path = format!("{}/{name}", self.directory);
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        // sched-stats: ns on a processor, ns waiting for one, time slices.
        let schedstat = read("schedstat")?;
        let mut numbers = schedstat.split_whitespace().map(|word| word.parse::<f64>().unwrap_or(0.0) / 1e9);
        let (running, waiting) = (numbers.next().unwrap_or(0.0), numbers.next().unwrap_or(0.0));
        // proc_pid_stat(5): minflt is the tenth field, the state the third.
        let stat = read("stat")?;
        let faults = stat.rsplit(") ").next().and_then(|rest| rest.split_whitespace().nth(7)?.parse().ok());
        Ok(Spent { running_seconds: running, waiting_seconds: waiting, faults: faults.unwrap_or(0) })
    }
}
