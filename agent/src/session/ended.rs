//! The last epoch of a guest that has shut down: of its disks alone, so that the standby has them as the guest left them.
//!
//! The shim keeps it until the receiver has it, however long the link is away, and an agent that was restarted meanwhile
//! takes it up again. It is given up when the guest is started anew: a resync follows then anyhow.

use std::time::Instant;

use anyhow::anyhow;

use super::active::{Active, LOOK};
use super::{Phase, Stop};
use crate::shim_client::ShimError;

/// Where the last epoch stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ended {
    /// It was made, and is on its way.
    pub(super) epoch: Option<u64>,
}

impl Active<'_> {
    /// QEMU is gone. Nothing more can happen to the guest.
    pub(super) fn guest_gone(&mut self, message: &str) -> Result<(), Stop> {
        let state = self.attached.shim.state()?;
        if !state.gone {
            return Err(anyhow!("{message}").into());
        }
        tracing::info!(domain = self.worker.protection.name, reason = state.gone_reason, "the guest has ended");
        if let Some(hold) = self.hold.take() {
            let _ = hold.answer.send(Err("the guest has ended".to_owned()));
        }
        self.ended = Some(Ended::default());
        self.next_cut = Instant::now();
        Ok(())
    }

    /// One step towards the last epoch being durable.
    pub(super) fn end_step(&mut self, ended: Ended) -> Result<(), Stop> {
        self.next_cut = Instant::now() + LOOK;
        if self.attached.domain.qemu_pid().is_ok_and(|pid| pid != self.attached.qemu_pid) {
            return Err(anyhow!("domain {} was started again", self.attached.domain.name()).into());
        }
        if self.sender.is_none() {
            // Whether there will be one is not known yet; that the guest does not run is.
            self.worker.set_phase(Phase::ShutOff);
            self.worker.set_error("what the guest wrote last waits for the receiver".to_owned());
            return Ok(());
        }
        if let Some(epoch) = ended.epoch {
            let durable = self.worker.shared.status().durable_epoch >= epoch;
            return if durable { Err(Stop::Off(None)) } else { Ok(()) };
        }
        let part = match self.attached.shim.finish() {
            Ok(Ok(part)) => part,
            Ok(Err(no)) => return Err(Stop::Off(Some(no.message))),
            Err(ShimError::Failed(message)) => {
                let state = self.attached.shim.state()?;
                // An agent before this one has had it made: it is among what was sent again.
                let Some(last) = state.unreleased.iter().rfind(|part| part.last) else {
                    return Err(Stop::Off(Some(message)));
                };
                self.ended = Some(Ended { epoch: Some(last.epoch) });
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let epoch = part.epoch;
        self.ended = Some(Ended { epoch: Some(epoch) });
        self.ship(part)?;
        self.worker.shared.status().epoch = epoch;
        Ok(())
    }
}
