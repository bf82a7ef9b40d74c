//! The end of the guest: QEMU is gone, and what the guest wrote to its disks last is here.
//!
//! Mirrors copy synchronously, so that the logs of the disks have every write that the guest saw done, up to its last. A
//! guest that has shut down cleanly needs no more than its disks: what is logged becomes the last part of the open epoch,
//! without memory and device state. That holds only if no mirror was lost before the guest's end; QEMU's events tell.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vmdr_proto::shim::{NoPartReason, Part};

use super::cut::NoCut;
use super::{Capture, CaptureError, Copied};
use crate::qmp::Event;

/// How long a QEMU whose monitor has closed may take to be gone: it writes out what its images still hold.
const EXIT_LIMIT: Duration = Duration::from_secs(10);
/// The reason in QEMU's SHUTDOWN event of a guest that has turned itself off.
const GUEST_SHUTDOWN: &str = "guest-shutdown";

/// Names of RAM blocks that outlive the guest's power: the flash with its firmware and UEFI variables, as of the last cut.
const FLASH: &str = "system.flash";

/// Whether a guest that does not run still has this RAM block.
pub(super) fn outlasts_power(name: &str) -> bool {
    name.starts_with(FLASH)
}

/// What is known of the guest's end.
#[derive(Debug, Default)]
pub(super) struct Ending {
    /// QEMU's process is gone.
    pub(super) gone: bool,
    /// The reason of the first SHUTDOWN event since the guest last ran.
    pub(super) reason: String,
    at_us: u64,
    /// A mirror has ended while the guest could still write.
    pub(super) mirror_lost: bool,
    /// Logs of disks were taken for a part that is not held yet.
    pub(super) taking: bool,
    /// The last epoch was made.
    pub(super) off: bool,
}

impl Ending {
    pub(super) fn note(&mut self, event: &Event) {
        match event.name.as_str() {
            // Others may follow, such as that of the signal by which libvirt then ends QEMU.
            "SHUTDOWN" if self.reason.is_empty() => {
                self.reason = event.data["reason"].as_str().unwrap_or("unknown").to_owned();
                self.at_us = event.at_us;
            }
            // libvirt turns a shutdown into a reboot like this (on_poweroff=restart).
            "RESET" | "RESUME" => self.reason.clear(),
            "BLOCK_JOB_ERROR" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_COMPLETED" if self.reason.is_empty() => {
                self.mirror_lost = true;
            }
            _ => {}
        }
    }

    /// Why there can be no last epoch, apart from the disks themselves.
    fn refuses(&self, mirrors_ready: bool) -> Option<NoCut> {
        let no = |reason, message: &str| Some(NoCut::new(reason, message));
        match self.reason.as_str() {
            GUEST_SHUTDOWN if self.taking => no(NoPartReason::Mirror, "QEMU ended in the middle of a cut"),
            GUEST_SHUTDOWN if self.mirror_lost || !mirrors_ready => {
                no(NoPartReason::Mirror, "a mirror was not in order when the guest shut down")
            }
            GUEST_SHUTDOWN => None,
            "" => no(NoPartReason::NotRunning, "QEMU ended without saying why"),
            other => no(NoPartReason::NotRunning, &format!("QEMU was ended ({other}), the guest did not shut down")),
        }
    }
}

impl Capture {
    /// The monitor is lost. Whether that is because QEMU is gone, so that nothing more can happen to the guest.
    pub fn guest_gone(&mut self) -> bool {
        if self.ending.gone {
            return true;
        }
        let events = self.qmp.read_events();
        self.note(events);
        if !has_ended(self.config.qemu_pid, EXIT_LIMIT) {
            return false;
        }
        self.ending.gone = true;
        self.held = false;
        self.page.set_paused(false);
        tracing::info!(domain = self.config.domain_name, reason = self.ending.reason, "QEMU is gone");
        true
    }

    /// Whether QEMU is known to be gone.
    pub fn is_gone(&self) -> bool {
        self.ending.gone
    }

    /// The last epoch of a guest that has shut down, of its disks alone; or why there is none.
    pub fn last_epoch(&mut self) -> Result<Result<Part, NoCut>, CaptureError> {
        if !self.ending.gone {
            return Err(CaptureError::Refused("the guest's QEMU is there".to_owned()));
        }
        if self.fenced {
            return Err(CaptureError::Refused("fenced: another site owns this guest".to_owned()));
        }
        if self.log.is_none() {
            return Err(CaptureError::Refused("nothing is captured".to_owned()));
        }
        if self.ending.off {
            return Err(CaptureError::Refused("the last epoch was made".to_owned()));
        }
        if let Some(no) = self.ending.refuses(self.mirrors_ready) {
            return Ok(Err(no));
        }
        let mut disks = self.disks.iter().zip(&self.catch_up);
        if let Some((disk, _)) = disks.find(|(disk, reading)| disk.remembered_bytes() + reading.bytes() > 0) {
            let message = format!("disk {} was behind when the guest shut down", disk.target());
            return Ok(Err(NoCut::new(NoPartReason::Pending, message)));
        }
        let mut copied = Copied::default();
        for (index, disk) in self.disks.iter().enumerate() {
            copied.add_log(index, disk.take());
        }
        copied.part.cut_unix_ns = self.ending.at_us * 1000;
        self.ending.off = true;
        self.pending.clear();
        Ok(Ok(self.hold(copied, true)))
    }
}

/// Whether a process has ended, waiting for it.
fn has_ended(pid: i32, limit: Duration) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return true };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(error) => return error == Errno::SRCH,
    };
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&limit)), Ok(ready) if ready > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn after(events: &[(&str, &str)]) -> Ending {
        let mut ending = Ending::default();
        for (name, reason) in events {
            let data = json!({ "guest": true, "reason": reason });
            ending.note(&Event { name: (*name).to_owned(), at_us: 7, data });
        }
        ending
    }

    #[test]
    fn a_clean_shutdown_is_told_from_every_other_end() {
        let off = ("SHUTDOWN", GUEST_SHUTDOWN);
        // libvirt ends QEMU with a signal, and QEMU its jobs, after the guest's own shutdown.
        let clean = after(&[off, ("STOP", ""), ("SHUTDOWN", "host-signal"), ("BLOCK_JOB_CANCELLED", "")]);
        assert!(clean.refuses(true).is_none());
        assert_eq!(clean.at_us, 7);
        // The last cut did not find the mirrors in order.
        assert!(clean.refuses(false).is_some());
        for events in [
            &[][..],
            &[("SHUTDOWN", "host-signal")],
            &[("SHUTDOWN", "guest-panic")],
            // A reboot, or a shutdown that became one: the guest ran on.
            &[("RESET", "")],
            &[off, ("RESET", ""), ("RESUME", "")],
            // A mirror was lost while the guest could write.
            &[("BLOCK_JOB_ERROR", ""), off],
            &[("BLOCK_JOB_COMPLETED", ""), off],
        ] {
            assert!(after(events).refuses(true).is_some(), "{events:?}");
        }
        assert!(Ending { taking: true, ..after(&[off]) }.refuses(true).is_some());
    }

    #[test]
    fn a_process_that_has_ended_is_known_to() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        // Ended, whether anybody has waited for it or not.
        assert!(has_ended(pid, EXIT_LIMIT));
        child.wait().unwrap();
        assert!(has_ended(pid, EXIT_LIMIT));
        assert!(!has_ended(std::process::id() as i32, Duration::ZERO));
    }
}
