//! A guest that does not run: how it ended, and what is said of it.
//!
//! | how | state | what can be activated |
//! | --- | --- | --- |
//! | it shut itself down | `shut off` | its disks as it left them, if they could still be sent; it boots from them |
//! | somebody ended it (`virsh destroy`, saved, migrated away) | `shut off` | the recovery point from before, memory included |
//! | QEMU crashed or was killed | `crashed` | the recovery point from before, memory included |
//!
//! In each case protection goes on by itself when the guest runs again.

use std::fmt;
use std::time::Duration;

use uuid::Uuid;
use vmdr_hypervisor::libvirt::{Connection, DomainState};

use super::{Phase, Worker};

/// How long libvirt may take to notice that a QEMU is gone.
const NOTICE_LIMIT: Duration = Duration::from_secs(5);
const NOTICE_LOOK: Duration = Duration::from_millis(100);

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Off {
    /// It shut itself down.
    ShutDown,
    /// Somebody ended it at once.
    Destroyed,
    /// QEMU ended by itself, or was killed.
    Crashed,
    /// It runs on another host.
    Migrated,
    /// Its memory was saved to a file.
    Saved,
    /// libvirt does not know it any more: it was transient, or was undefined.
    Undefined,
    /// libvirt does not say.
    Unknown,
}

impl Off {
    /// From libvirt's state and reason (`virDomainShutoffReason`); nothing: it runs.
    pub fn of(state: DomainState, reason: i32) -> Option<Self> {
        match (state, reason) {
            (DomainState::Crashed, _) | (DomainState::ShutOff, 3 | 6) => Some(Self::Crashed),
            (DomainState::ShutOff, 1) => Some(Self::ShutDown),
            (DomainState::ShutOff, 2) => Some(Self::Destroyed),
            (DomainState::ShutOff, 4) => Some(Self::Migrated),
            (DomainState::ShutOff, 5) => Some(Self::Saved),
            (state, _) if state.is_active() => None,
            _ => Some(Self::Unknown),
        }
    }

    /// Whether somebody has wanted it, the guest itself included: nobody is to be called because of it.
    pub fn is_meant(self) -> bool {
        !matches!(self, Self::Crashed | Self::Unknown)
    }

    /// What `status` calls it.
    pub fn phase(self) -> Phase {
        if self == Self::Crashed { Phase::Crashed } else { Phase::ShutOff }
    }
}

impl fmt::Display for Off {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ShutDown => "it shut down",
            Self::Destroyed => "it was destroyed",
            Self::Crashed => "its QEMU crashed or was killed",
            Self::Migrated => "it was migrated to another host",
            Self::Saved => "it was saved to a file",
            Self::Undefined => "libvirt does not know it any more",
            Self::Unknown => "libvirt does not say why",
        })
    }
}

/// The domain does not run.
#[derive(Debug, thiserror::Error)]
#[error("domain {name} does not run: {off}")]
pub struct NotRunning {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub off: Off,
}

impl Worker {
    /// What libvirt says of a guest whose QEMU is gone.
    pub(super) fn how_it_ended(&self) -> Off {
        let mut off = None;
        for _ in 0..(NOTICE_LIMIT.as_millis() / NOTICE_LOOK.as_millis()) {
            off = match ask(&self.config.libvirt_uri, &self.uuid) {
                Ok(off) => off,
                Err(error) if error.is_no_such_domain() => return Off::Undefined,
                Err(_) => None,
            };
            if off.is_some() {
                break;
            }
            std::thread::sleep(NOTICE_LOOK);
        }
        off.unwrap_or(Off::Unknown)
    }

    /// Says that the guest does not run. `note`: why what can be activated is not what it left on its disks; nothing: it is.
    pub(super) fn set_off(&mut self, off: Off, note: Option<String>) {
        let (mut message, epoch) = (String::new(), self.shared.status().durable_epoch);
        let point = if epoch == 0 {
            "there is no recovery point".to_owned()
        } else {
            format!("the recovery point of epoch {epoch} stays, from before that")
        };
        if off == Off::Crashed {
            message = format!("the guest is gone, {off}; {point}");
        } else if let Some(note) = note {
            message = format!("the guest does not run, {off}; no last epoch of its disks: {note}; {point}");
        }
        tracing::info!(domain = self.protection.name, %off, message, "the guest does not run");
        if self.protection.fenced {
            return self.set_phase(Phase::Fenced);
        }
        self.set_error(message);
        self.set_phase(off.phase());
        self.rests_off(off);
    }

    /// The guest was found not to run, when it was to be protected. Said once.
    pub(super) fn found_off(&mut self, off: Off) {
        if self.protection.fenced {
            return self.set_phase(Phase::Fenced);
        }
        if matches!(self.shared.status().phase, Phase::ShutOff | Phase::Crashed) {
            return;
        }
        tracing::info!(domain = self.protection.name, %off, "the guest does not run");
        self.set_error(format!("the guest does not run, {off}"));
        self.set_phase(off.phase());
        self.rests_off(off);
    }

    fn rests_off(&mut self, off: Off) {
        if off.is_meant() {
            self.rests(format!("the guest does not run, {off}"));
        }
    }
}

fn ask(uri: &str, uuid: &Uuid) -> Result<Option<Off>, vmdr_hypervisor::Error> {
    let (state, reason) = Connection::open(uri)?.domain_by_uuid(uuid)?.state()?;
    Ok(Off::of(state, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_crash_is_one() {
        assert_eq!(Off::of(DomainState::ShutOff, 1).map(Off::phase), Some(Phase::ShutOff));
        assert_eq!(Off::of(DomainState::ShutOff, 2), Some(Off::Destroyed));
        assert_eq!(Off::of(DomainState::ShutOff, 3).map(Off::phase), Some(Phase::Crashed));
        assert_eq!(Off::of(DomainState::Crashed, 0), Some(Off::Crashed));
        assert_eq!(Off::of(DomainState::ShutOff, 8), Some(Off::Unknown));
        assert!(
            Off::ShutDown.is_meant() && Off::Saved.is_meant() && !Off::Crashed.is_meant() && !Off::Unknown.is_meant()
        );
        for runs in [DomainState::Running, DomainState::Paused, DomainState::ShuttingDown, DomainState::PmSuspended] {
            assert_eq!(Off::of(runs, 3), None);
        }
    }
}
