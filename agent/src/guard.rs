//! Watches a shim from outside: one that hangs is killed, and a guest that it left paused is resumed.
//!
//! A shim that stops answering with a disk write in flight makes QEMU's `stop` drain forever under its global lock;
//! killing it closes the connection and frees QEMU. Whether the guest's pause was the shim's is told by the state
//! page, which survives it: a guest that somebody else stopped stays stopped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmdr_shim::monitor::{Address, Monitor};
use vmdr_shim::state_page::StatePage;

/// How often the heartbeat is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// A stopped shim (SIGSTOP, a debugger) is killed when its heart has not beaten for this long.
const STOPPED_LIMIT: Duration = Duration::from_millis(300);
/// A shim that is not stopped, but does not beat: the machine may just be overloaded.
const SILENT_LIMIT: Duration = Duration::from_secs(3);
const MONITOR_LIMIT: Duration = Duration::from_secs(5);

/// A running watch; dropping it ends it.
#[derive(Debug)]
pub struct Guard {
    stop: Arc<AtomicBool>,
}

impl Guard {
    /// Watches the shim whose state page is at `page`, beside the guest with this monitor.
    pub fn watch(domain: String, page: PathBuf, monitor: Address) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let state = StatePage::open(&page)?;
        std::thread::Builder::new().name(format!("guard {domain}")).spawn(move || {
            let mut last = (state.heartbeat(), Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let beat = state.heartbeat();
                if beat != last.0 {
                    last = (beat, Instant::now());
                    continue;
                }
                let silent = last.1.elapsed();
                let Some(process) = process_state(state.pid()) else {
                    tracing::error!(domain, pid = state.pid(), "the shim died");
                    resume_if_left_paused(&domain, &page, &monitor);
                    return;
                };
                let limit = if process == 'T' || process == 't' { STOPPED_LIMIT } else { SILENT_LIMIT };
                if silent > limit {
                    tracing::error!(domain, pid = state.pid(), ?silent, %process, "the shim hangs: killing it");
                    kill(state.pid());
                    resume_if_left_paused(&domain, &page, &monitor);
                    return;
                }
            }
        })?;
        Ok(Self { stop })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Resumes the guest if the state page says that a shim that is gone has paused it.
pub fn resume_if_left_paused(domain: &str, page: &Path, monitor: &Address) {
    let Ok(state) = StatePage::open(page) else { return };
    if !state.paused() {
        return;
    }
    match resume(monitor) {
        Ok(()) => {
            state.set_paused(false);
            tracing::warn!(domain, "the guest had been left paused and runs again");
        }
        Err(error) => tracing::error!(domain, "the guest was left paused and could not be resumed: {error:#}"),
    }
}

fn resume(monitor: &Address) -> anyhow::Result<()> {
    let mut monitor = Monitor::connect(monitor, MONITOR_LIMIT)?;
    let status = monitor.execute("query-status", None)?;
    // Any other state than "paused" has another cause than our `stop`.
    if status["status"] == "paused" {
        monitor.execute("cont", None)?;
    }
    Ok(())
}

/// The letter of `/proc/PID/stat`; nothing: the process is gone (or a zombie).
fn process_state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit(')').next()?.trim_start().chars().next()?;
    (state != 'Z' && state != 'X').then_some(state)
}

/// Ends a process for sure and waits until it is gone, for a moment.
pub fn kill(pid: i32) {
    let Some(pid) = Pid::from_raw(pid) else { return };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let _ = pidfd_send_signal(&process, Signal::KILL);
    let limit = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    let mut fds = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    let _ = rustix::event::poll(&mut fds, Some(&limit));
}
