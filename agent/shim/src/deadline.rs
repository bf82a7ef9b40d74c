//! Sees that the guest runs only while it may, whatever the thread that serves the agent is doing.
//!
//! ```text
//!   may it?  yes --> it was stopped for that alone: it goes on
//!            no ---> does QEMU say that it stands still?   no, for LIMIT: QEMU is killed
//! ```
//! A QMP socket takes one client. Between two requests that connection is used. While a request is under way, a pause of its own
//! is enough: it is not ended while the guest may not run ([`StatePage::standing`]). Else the connection is broken off, which ends the
//! request and with it this shim, and another one is made.

use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::capture::{Capture, CaptureError};
use crate::monitor::{Address, Breaker, Monitor};
use crate::permission::Permission;
use crate::qmp::QmpError;
use crate::rescue;
use crate::state_page::StatePage;

/// How often it is looked whether the guest may run.
pub const LOOK: Duration = Duration::from_millis(40);
/// How long QEMU may take to say that the guest stands still. Then it is killed.
pub const LIMIT: Duration = Duration::from_millis(300);
/// How much of that a request that is under way may take.
const BUSY_LIMIT: Duration = Duration::from_millis(100);
/// A guest that stands still is asked for again so often: somebody may have resumed it.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long one that may run again is left, when it could not be resumed.
const RETRY: Duration = Duration::from_millis(200);

/// The capture, between requests.
pub fn lock(capture: &Mutex<Capture>) -> MutexGuard<'_, Capture> {
    // After a panic nothing of it is sure but that the guest must not run on unasked: that is in QEMU.
    capture.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What looks.
pub struct Watch {
    /// The domain's name.
    pub domain: String,
    /// Whether the guest may run.
    pub permission: Arc<Permission>,
    /// This shim's.
    pub page: Arc<StatePage>,
    /// This shim's.
    pub capture: Arc<Mutex<Capture>>,
    /// Where the guest's monitor is.
    pub monitor: Address,
    /// Ends the capture's own connection.
    pub breaker: Option<Breaker>,
    /// QEMU's process.
    pub qemu: OwnedFd,
}

/// QEMU's process, to be watched and killed.
pub fn process(pid: i32) -> std::io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(std::io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// How a look at a guest that may not run came out.
enum Look {
    /// QEMU says that it stands still.
    Still,
    /// A request has paused it, and does not let it go on.
    Paused,
    /// QEMU does not answer in time.
    Silent(String),
    /// It is not known.
    Unknown(String),
}

impl Watch {
    /// Looks in a thread of its own until QEMU is gone.
    pub fn start(self) -> std::io::Result<()> {
        std::thread::Builder::new().name("deadline".to_owned()).spawn(move || self.run()).map(drop)
    }

    fn run(self) {
        let this = Arc::new(self);
        let mut ask_at = Instant::now();
        loop {
            std::thread::sleep(LOOK);
            if this.is_gone() {
                return;
            }
            if this.permission.allows() {
                if this.permission.stopped() && Instant::now() >= ask_at {
                    this.go_on();
                    ask_at = Instant::now() + if this.permission.stopped() { RETRY } else { Duration::ZERO };
                }
                continue;
            }
            if this.page.standing() && Instant::now() < ask_at {
                continue;
            }
            match this.look() {
                Look::Still => ask_at = Instant::now() + ASK_AGAIN,
                Look::Paused => {}
                Look::Silent(_) | Look::Unknown(_) if this.permission.allows() => {}
                // It had said so, and nothing has resumed it since that it told of. Whatever holds its main loop up now (storage that
                // hangs, a busy host) holds up a resumption as well.
                Look::Silent(why) if this.page.standing() => {
                    tracing::warn!(
                        domain = this.domain,
                        "the guest stands still, and QEMU is slow to say so again: {why}"
                    );
                    ask_at = Instant::now() + ASK_AGAIN;
                }
                Look::Silent(why) | Look::Unknown(why) => {
                    tracing::error!(
                        domain = this.domain,
                        "the guest may not run, and it is not known that it stands still: {why}. Its QEMU is killed"
                    );
                    // Its end is seen by whoever serves the agent.
                    let _ = pidfd_send_signal(&this.qemu, Signal::KILL);
                }
            }
        }
    }

    fn go_on(self: &Arc<Self>) {
        let _ = self.within_limit(|this| {
            // A request that is under way: it is looked at again.
            let Ok(mut capture) = this.capture.try_lock() else { return };
            if let Err(error) = capture.go_on() {
                tracing::warn!(domain = this.domain, "let the guest go on: {error}");
            }
        });
    }

    fn look(self: &Arc<Self>) -> Look {
        self.within_limit(|this| this.stop()).unwrap_or_else(Look::Silent)
    }

    /// Does something that may hang; an error if it is not done within [`LIMIT`].
    fn within_limit<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, String> {
        let (sender, answer) = channel();
        let this = self.clone();
        let spawned = std::thread::Builder::new().name("monitor".to_owned()).spawn(move || sender.send(work(&this)));
        spawned.map_err(|error| error.to_string())?;
        answer.recv_timeout(LIMIT).map_err(|_| format!("no answer within {LIMIT:?}"))
    }

    fn stop(&self) -> Look {
        let until = Instant::now() + LIMIT;
        let busy_until = Instant::now() + BUSY_LIMIT;
        loop {
            match self.capture.try_lock() {
                Ok(mut capture) => return self.stop_through(&mut capture, until),
                Err(TryLockError::Poisoned(poisoned)) => return self.stop_through(&mut poisoned.into_inner(), until),
                Err(TryLockError::WouldBlock) if Instant::now() < busy_until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TryLockError::WouldBlock) => break,
            }
        }
        if self.page.standing() {
            return Look::Paused;
        }
        tracing::warn!(domain = self.domain, "the guest may not run, and a request is under way: it is broken off");
        if let Some(breaker) = &self.breaker {
            breaker.break_off();
        }
        let left = || until.saturating_duration_since(Instant::now());
        let stopped = Monitor::connect(&self.monitor, left())
            .and_then(|mut monitor| rescue::stop(&self.permission, &mut monitor, left()));
        stopped.map_or_else(|error| Look::Unknown(error.to_string()), |()| Look::Still)
    }

    fn stop_through(&self, capture: &mut Capture, until: Instant) -> Look {
        let stopped = capture.stand_still(until.saturating_duration_since(Instant::now()));
        match stopped {
            Ok(()) => Look::Still,
            Err(error @ CaptureError::MonitorLost(QmpError::Timeout { .. })) => Look::Silent(error.to_string()),
            Err(error) => Look::Unknown(error.to_string()),
        }
    }

    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.qemu, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(ready) if ready > 0)
    }
}
