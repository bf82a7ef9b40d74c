//! Drills: an activation rehearsed on a copy, while replication goes on.
//!
//! What it guarantees:
//! - **Nothing gets out.** The copy's network cards end at bridges without an uplink ([`net`]), its disks are overlays over a copy
//!   of the point ([`copy`]), its serial lines and channels end at nobody ([`isolate`]). It is another domain, with another UUID.
//! - **Nothing of the domain changes**: not its generation, owner or standby; no address is announced. Epochs are received and
//!   applied meanwhile.
//! - **Nothing stays**, unless it is asked for: what a drill makes is in its book ([`record`]) before it is made, and is removed by
//!   it, by the activation that comes in between, or after a restart of the receiver.
//! - **An activation goes first**: it ends all drills, of its domain and of others, and does not fail because of them.
//! - It fits: the file system keeps what the configuration reserves, and replication never has less because of a drill.
//!
//! [`run`] is a drill from its beginning to its end, [`checks`] what has to be true of the copy, [`tend`] looks after what is due
//! or left over.

pub mod checks;
pub mod copy;
pub mod isolate;
mod namespace;
pub mod net;
pub mod process;
pub mod record;
pub mod run;
pub mod tend;
pub mod wire;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::activate::ActivateError;
use crate::store::StoreError;

/// Why there was no drill, or why it did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// It cannot begin.
    #[error("{0}")]
    Refused(String),
    /// It was ended from outside.
    #[error("{0}")]
    Stopped(String),
    /// There is no room for it.
    #[error(
        "a drill of it needs {needed_bytes} bytes and {free_bytes} are free where its copy would lie, of which {reserve_bytes} \
         are kept for replication: free some, or put the state directory on a file system with reflinks (XFS), on which a drill \
         shares the blocks of a standby that is not encrypted"
    )]
    Space {
        /// Bytes that it would write, or more.
        needed_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
        /// Bytes that it must leave.
        reserve_bytes: u64,
    },
    /// A file.
    #[error("{what} {path:?}: {source}")]
    Io {
        /// A verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// What an activation would have met as well.
    #[error(transparent)]
    Activate(#[from] ActivateError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// libvirt failed.
    #[error(transparent)]
    Hypervisor(#[from] vmdr_hypervisor::Error),
    /// The network of the drill.
    #[error(transparent)]
    Net(#[from] net::NetError),
    /// The book.
    #[error(transparent)]
    Record(#[from] record::RecordError),
}

impl DrillError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// A drill that is under way, as others see it.
#[derive(Debug, Default)]
pub struct Control {
    state: Mutex<ControlState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ControlState {
    /// Why it shall end.
    why: Option<String>,
    ended: bool,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it end.
    pub fn end(&self, why: &str) {
        self.state().why.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }

    /// An error, once it shall end.
    pub fn go_on(&self) -> Result<(), DrillError> {
        self.state().why.clone().map_or(Ok(()), |why| Err(DrillError::Stopped(why)))
    }

    /// Rests, unless it shall end.
    pub fn rest(&self, time: Duration) -> Result<(), DrillError> {
        let until = Instant::now() + time;
        let mut state = self.state();
        while state.why.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.go_on()
    }

    /// Waits until nothing of it is left; whether that came true.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.state();
        while !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// How long after an activation or a hand-over no drill begins by itself: there is other work to be done here.
const PAUSE: Duration = Duration::from_secs(3600);

/// The drills that are under way: at most one of each domain.
#[derive(Debug, Default)]
pub struct Drills {
    under_way: Mutex<HashMap<Uuid, Arc<Control>>>,
    paused_until: Mutex<Option<Instant>>,
}

impl Drills {
    fn under_way(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Control>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The drill of a domain, if one is under way, or is being removed.
    pub fn of(&self, uuid: Uuid) -> Option<Arc<Control>> {
        self.under_way().get(&uuid).cloned()
    }

    /// Has all of them end.
    pub fn end_all(&self, why: &str) {
        for control in self.under_way().values() {
            control.end(why);
        }
    }

    /// For an hour no drill begins by itself.
    pub fn pause(&self) {
        *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + PAUSE);
    }

    /// Whether drills do not begin by themselves now.
    pub fn is_paused(&self) -> bool {
        let until = *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Takes the domain's place, if it is free.
    pub fn claim(self: &Arc<Self>, uuid: Uuid) -> Option<Claim> {
        let mut under_way = self.under_way();
        if under_way.contains_key(&uuid) {
            return None;
        }
        let control = Arc::new(Control::default());
        under_way.insert(uuid, Arc::clone(&control));
        Some(Claim { drills: Arc::clone(self), uuid, control })
    }
}

/// A domain's place: whoever has it makes or removes a drill of it. Given back when this is dropped.
#[derive(Debug)]
pub struct Claim {
    drills: Arc<Drills>,
    uuid: Uuid,
    /// For others.
    pub control: Arc<Control>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.drills.under_way().remove(&self.uuid);
        self.control.state().ended = true;
        self.control.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_at_a_time_and_it_can_be_ended_and_waited_for() {
        let drills = Arc::new(Drills::default());
        let uuid = Uuid::from_u128(1);
        let claim = drills.claim(uuid).unwrap();
        assert!(drills.claim(uuid).is_none());
        assert!(drills.claim(Uuid::from_u128(2)).is_some());
        let seen = drills.of(uuid).unwrap();
        assert!(!seen.wait(Duration::from_millis(10)));
        claim.control.rest(Duration::from_millis(1)).unwrap();
        let begun = Instant::now();
        let worker = std::thread::spawn(move || {
            let stopped = claim.control.rest(Duration::from_secs(60)).unwrap_err();
            drop(claim);
            stopped.to_string()
        });
        assert!(!drills.is_paused());
        drills.pause();
        assert!(drills.is_paused());
        drills.end_all("the domain is activated");
        seen.end("something else");
        assert!(seen.wait(Duration::from_secs(30)));
        assert_eq!(worker.join().unwrap(), "the domain is activated");
        assert!(begun.elapsed() < Duration::from_secs(30) && drills.claim(uuid).is_some());
    }
}
