//! A suspended protection: mirrors, watch and shim are off, for what libvirt and QEMU refuse meanwhile (live migration,
//! snapshots, resizing disks). The registry says so, so that it stays suspended when the agent is restarted. The recovery
//! point at the receiver stays and grows older; what changed is found by a resync afterwards.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::attach;
use super::moving::BEING_MOVED;
use super::{Input, Phase, SUSPENDED, Stop, Worker};
use crate::registry::Suspended;

/// How often the age of the recovery point is looked at.
const LOOK: Duration = Duration::from_secs(1);

impl Worker {
    /// Why the protection cannot be suspended now, if there is a reason.
    pub(super) fn suspend_refused(&self) -> Option<String> {
        let status = self.shared.status();
        match status.phase {
            Phase::Held => Some("the domain is held: release it first".to_owned()),
            Phase::Fenced => Some("another site owns the domain".to_owned()),
            _ if self.protection.moving.is_some() => Some(BEING_MOVED.to_owned()),
            _ if status.durable_epoch == 0 => Some(
                "there is no recovery point yet that could stay: wait for the first copy, or end it with `vmdr unprotect`"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// Says durably that the protection is suspended. Its recovery point.
    pub(super) fn record_suspended(&mut self) -> anyhow::Result<u64> {
        let (epoch, cut_unix_ns) = {
            let status = self.shared.status();
            (status.durable_epoch, status.figures.durable_cut_unix_ns())
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.protection.suspended = Some(Suspended { since_unix_ns: since.as_nanos() as u64, epoch, cut_unix_ns });
        if let Err(error) = self.registry.save(&self.protection) {
            self.protection.suspended = None;
            return Err(error);
        }
        Ok(epoch)
    }

    /// Waits until it is resumed (nothing is returned), or the session ends.
    pub(super) fn stay_suspended(&mut self, suspended: Suspended) -> Option<Stop> {
        if attach::directory(&self.config, &self.uuid).exists() {
            // An agent has ended before it was done with this.
            self.remove(true);
        }
        {
            let mut status = self.shared.status();
            status.durable_epoch = suspended.epoch;
            status.epoch = status.epoch.max(suspended.epoch);
            status.last_error.clear();
            status.waiting_since = None;
            if suspended.cut_unix_ns > 0 {
                status.figures.durable(suspended.cut_unix_ns);
            }
        }
        self.set_phase(Phase::Suspended);
        if self.resting.is_none() {
            self.rests(SUSPENDED.to_owned());
        }
        self.shared.status().since_unix_ns = suspended.since_unix_ns;
        loop {
            match self.received.recv_timeout(LOOK) {
                Ok(Input::Resume(answer)) => {
                    self.protection.suspended = None;
                    let saved = self.registry.save(&self.protection);
                    let failed = saved.as_ref().err().map(|error| format!("{error:#}"));
                    let _ = answer.send(saved.map_err(|error| format!("{error:#}")));
                    if failed.is_none() {
                        self.set_phase(Phase::Starting);
                        return None;
                    }
                    self.protection.suspended = Some(suspended);
                }
                Ok(Input::Unprotect) => return Some(Stop::Unprotect),
                Ok(Input::Shutdown) | Err(RecvTimeoutError::Disconnected) => return Some(Stop::Shutdown),
                Ok(Input::Suspend(answer)) => {
                    let _ = answer.send(Err("it is suspended already".to_owned()));
                }
                Ok(Input::Release(answer)) => {
                    let _ = answer.send(Err("the domain is not held".to_owned()));
                }
                Ok(
                    waiting @ (Input::Hold(_)
                    | Input::HoldToMove(_)
                    | Input::HandOver(..)
                    | Input::Application(_)
                    | Input::Frozen(_)),
                ) => waiting.refuse("the domain is suspended, not protected"),
                Ok(Input::Link(_) | Input::DevicesChanged | Input::IoError(_) | Input::Outdated(_)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    // Suspended or not: a host that was started anew asks before the guest runs, and then starts it.
                    if let Err(error) = self.confirm() {
                        tracing::debug!(domain = self.protection.name, "{error:#}");
                    }
                    if self.protection.fenced {
                        self.protection.suspended = None;
                        if let Err(error) = self.registry.save(&self.protection) {
                            self.set_error(format!("{error:#}"));
                        }
                        self.set_phase(Phase::Fenced);
                        return None;
                    }
                }
            }
            self.shared.status().figures.observe_rpo();
        }
    }
}
