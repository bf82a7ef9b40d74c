//! Watches a shim from outside: one that hangs is killed, and a guest that it left paused is resumed.
//!
//! A shim that stops answering with a disk write in flight makes QEMU's `stop` drain forever under its global lock;
//! killing it closes the connection and frees QEMU. Whether the guest's pause was the shim's is told by the state
//! page, which survives it: a guest that somebody else stopped stays stopped.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmdr_shim::monitor::Address;
use vmdr_shim::permission::Permission;
use vmdr_shim::rescue;
use vmdr_shim::state_page::StatePage;

/// How often the heartbeat is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// A stopped shim (SIGSTOP, a debugger) is killed when its heart has not beaten for this many looks.
const STOPPED_LOOKS: u32 = 3;
/// A shim that is not stopped, but does not beat: the machine may just be overloaded.
const SILENT_LOOKS: u32 = 30;
/// How long resuming a guest is tried.
const RESUME_LIMIT: Duration = Duration::from_secs(30);
const RESUME_RETRY: Duration = Duration::from_millis(100);
/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// A running watch; dropping it ends it.
#[derive(Debug)]
pub struct Guard {
    stop: Arc<AtomicBool>,
}

impl Guard {
    /// Watches the shim whose state page is at `page`, beside the guest with this monitor and `permission`.
    pub fn watch(domain: String, page: PathBuf, permission: PathBuf, monitor: Address) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let state = StatePage::open(&page)?;
        std::thread::Builder::new().name(format!("guard {domain}")).spawn(move || {
            let mut beat = state.heartbeat();
            // Looks without a beat, not time: a host that stood still as a whole is no shim that hangs.
            let mut silent = 0;
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let now = state.heartbeat();
                if now != beat {
                    (beat, silent) = (now, 0);
                    continue;
                }
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                silent += 1;
                let Some(process) = process_state(state.pid()) else {
                    tracing::error!(domain, pid = state.pid(), "the shim died");
                    resume_if_left_paused(&domain, &page, &permission, &monitor);
                    return;
                };
                let limit = if process == 'T' || process == 't' { STOPPED_LOOKS } else { SILENT_LOOKS };
                if silent > limit {
                    tracing::error!(domain, pid = state.pid(), silent, %process, "the shim hangs: killing it");
                    kill(state.pid());
                    resume_if_left_paused(&domain, &page, &permission, &monitor);
                    return;
                }
            }
        })?;
        Ok(Self { stop })
    }
}

impl Guard {
    /// The shim is about to be told to end: that is no alarm.
    pub fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

/// Resumes the guest if the state page says that a shim that is gone has paused it; tried for [`RESUME_LIMIT`].
/// Whether it is known not to be left paused: one that may not run now is stopped, and goes on when it may.
pub fn resume_if_left_paused(domain: &str, page: &Path, permission: &Path, monitor: &Address) -> bool {
    // Without a page there was no shim, or it ended as it should.
    let Ok(state) = StatePage::open(page) else { return true };
    let permission = match Permission::open(permission) {
        Ok(permission) => Some(permission),
        // A shim of an older version.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::error!(domain, "whether the guest may run is not known, so it is not resumed: {error}");
            return false;
        }
    };
    let until = Instant::now() + RESUME_LIMIT;
    loop {
        match rescue::resume_if_left_paused(&state, permission.as_ref(), monitor) {
            Ok(false) => return true,
            Ok(true) => {
                tracing::warn!(domain, "the guest had been left paused and runs again");
                return true;
            }
            Err(error) if Instant::now() >= until => {
                tracing::error!(domain, "the guest was left paused and could not be resumed: {error}");
                return false;
            }
            Err(_) => std::thread::sleep(RESUME_RETRY),
        }
    }
}

/// Whether the process of a state page lives.
pub fn alive(page: &Path) -> bool {
    StatePage::open(page).is_ok_and(|state| process_state(state.pid()).is_some())
}

/// Whether a guest's shim has QEMU's word that the guest stands still, and has not resumed it since.
pub fn stands_still(page: &Path) -> bool {
    StatePage::open(page).is_ok_and(|state| process_state(state.pid()).is_some() && state.standing())
}

/// The letter of `/proc/PID/stat`; nothing: the process is gone (or a zombie).
fn process_state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit(')').next()?.trim_start().chars().next()?;
    (state != 'Z' && state != 'X').then_some(state)
}

/// Ends a process for sure and waits until it is gone, for a moment.
pub fn kill(pid: i32) {
    let Some(process) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return };
    let _ = pidfd_send_signal(&process, Signal::KILL);
    has_ended(&process, KILL_LIMIT);
}

/// Waits for a process that ends by itself; whether it has.
pub fn wait_end(pid: i32, limit: Duration) -> bool {
    let process = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    process.is_none_or(|process| has_ended(&process, limit))
}

fn has_ended(process: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&limit)), Ok(ready) if ready > 0)
}
