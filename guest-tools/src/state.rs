//! What the tick loop tells the servers, and what they ask of it.

use crate::cli::Workload;
use anyhow::Result;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most pages a tick may be told to write, and the longest a tick may be told to take (ms).
const SETTING_MAX: u32 = 10_000_000;

/// The result of the newest self-check.
#[derive(Clone, Debug)]
pub struct Check {
    /// The tick after which it was made.
    pub tick: u64,
    /// Why it failed. A failure stays: what was lost once does not come back.
    pub failure: Option<String>,
}

/// Shared between the tick loop and the servers.
#[derive(Debug)]
pub struct State {
    /// Ticks done.
    pub tick: AtomicU64,
    /// The newest record on the disk.
    pub acknowledged: AtomicU64,
    /// RAM pages written since the beginning.
    pub writes: AtomicU64,
    /// RAM pages per tick.
    pub pages: AtomicU32,
    /// Milliseconds per tick.
    pub interval_ms: AtomicU32,
    /// Whether records are written.
    pub records: AtomicBool,
    /// MiB of memory taken and given back in each round.
    pub churn_mib: AtomicU32,
    /// Tells one boot of the guest from another.
    pub boot: String,
    started: Instant,
    check_wanted: AtomicBool,
    check: Mutex<(u64, Option<Check>)>,
    checked: Condvar,
}

impl State {
    /// The state before the first tick.
    pub fn new(options: &Workload) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            tick: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            pages: AtomicU32::new(options.pages),
            interval_ms: AtomicU32::new(options.interval_ms),
            records: AtomicBool::new(options.disk.is_some()),
            churn_mib: AtomicU32::new(options.churn_mib),
            boot: boot.chars().take(8).collect(),
            started: Instant::now(),
            check_wanted: AtomicBool::new(false),
            check: Mutex::new((0, None)),
            checked: Condvar::new(),
        }
    }

    /// Whether someone asked for a check since the last call.
    pub fn take_check_request(&self) -> bool {
        self.check_wanted.swap(false, SeqCst)
    }

    fn checks(&self) -> MutexGuard<'_, (u64, Option<Check>)> {
        self.check.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the result of a check, keeping an earlier failure, and returns what holds now.
    pub fn finish_check(&self, result: Result<()>) -> Check {
        let mut checks = self.checks();
        let earlier = checks.1.take().and_then(|check| check.failure);
        let failure = earlier.or_else(|| result.err().map(|error| format!("{error:#}")));
        let check = Check { tick: self.tick.load(SeqCst), failure };
        *checks = (checks.0 + 1, Some(check.clone()));
        self.checked.notify_all();
        check
    }

    /// Asks the tick loop for a check that begins after this call, and waits for it.
    pub fn request_check(&self, limit: Duration) -> Option<Check> {
        let checks = self.checks();
        let before = checks.0;
        self.check_wanted.store(true, SeqCst);
        let done = self.checked.wait_timeout_while(checks, limit, |checks| checks.0 == before);
        let (checks, timeout) = done.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() { None } else { checks.1.clone() }
    }

    /// Changes one setting.
    pub fn set(&self, key: &str, value: &str) -> Result<(), String> {
        let value: u32 = value.parse().map_err(|_| format!("{value} is no number"))?;
        if value > SETTING_MAX {
            return Err(format!("{value} is more than {SETTING_MAX}"));
        }
        match key {
            "pages" => self.pages.store(value, SeqCst),
            "interval" => self.interval_ms.store(value, SeqCst),
            "records" => self.records.store(value != 0, SeqCst),
            "churn" => self.churn_mib.store(value, SeqCst),
            _ => return Err(format!("{key} cannot be set: pages, interval, records, churn can")),
        }
        Ok(())
    }

    /// One line of key=value pairs.
    pub fn line(&self) -> String {
        let (check, reason) = match &self.checks().1 {
            None => ("none".to_owned(), String::new()),
            Some(Check { tick, failure: None }) => (format!("ok@{tick}"), String::new()),
            Some(Check { tick, failure: Some(reason) }) => (format!("failed@{tick}"), format!(" reason={reason}")),
        };
        format!(
            "tick={} acknowledged={} writes={} pages={} interval={} uptime_ms={} boot={} check={check}{reason}",
            self.tick.load(SeqCst),
            self.acknowledged.load(SeqCst),
            self.writes.load(SeqCst),
            self.pages.load(SeqCst),
            self.interval_ms.load(SeqCst),
            self.started.elapsed().as_millis(),
            self.boot,
        )
    }
}
