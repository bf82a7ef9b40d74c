//! Groups of domains: activated together, in the order that the recovery plan says.
//!
//! What it guarantees:
//! - A member is not begun before all that it needs are ready, and not at all when one of them will not be ([`order`]).
//! - Each member is activated as [`crate::control`] activates a single one: never twice, and never taken back.
//! - How far each has come is on disk before the next step ([`record`]), so that whoever finds it after a crash goes on from there.
//!   What a record says of a member is believed only as far as the activation's own record agrees.
//! - It does not depend on who asked: a command line that ends changes nothing, another one sees what goes on.
//!
//! [`begin`] is what it begins with, [`run`] an activation of a group from its beginning to its end, [`checks`] whether a member is ready, [`wire`] what the
//! `vmdr` command is told.

pub mod begin;
pub mod checks;
pub mod order;
pub mod record;
pub mod run;
pub mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tonic::Status;
use vmdr_proto::control::{GroupReport, Progress};

/// Who follows an activation of a group.
pub type Watcher = mpsc::Sender<Result<Progress, Status>>;

/// Who follow one at the same time, at most.
const WATCHERS_MAX: usize = 64;
/// Between two looks whether one has ended.
const LOOK: Duration = Duration::from_millis(20);
/// How long a watcher that does not read may take for the last message.
const LAST_MAX: Duration = Duration::from_secs(30);

/// The groups that are being activated.
#[derive(Debug, Default)]
pub struct Groups {
    under_way: Mutex<HashMap<String, Arc<Live>>>,
}

/// An activation of a group that is under way, as others see it.
#[derive(Debug, Default)]
pub struct Live {
    state: Mutex<LiveState>,
    stopped: AtomicBool,
}

#[derive(Debug, Default)]
struct LiveState {
    report: GroupReport,
    watchers: Vec<Watcher>,
    ended: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Groups {
    /// The activation of a group that is under way.
    pub fn of(&self, group: &str) -> Option<Arc<Live>> {
        locked(&self.under_way).get(group).cloned()
    }

    /// Waits until none is under way, no longer than that.
    pub async fn ended(&self, limit: Duration) {
        let end = Instant::now() + limit;
        while !locked(&self.under_way).is_empty() && Instant::now() < end {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Takes the group's place, if it is free; else who has it.
    fn claim(self: &Arc<Self>, group: &str) -> Result<Claim, Arc<Live>> {
        let mut under_way = locked(&self.under_way);
        if let Some(live) = under_way.get(group) {
            return Err(Arc::clone(live));
        }
        let live = Arc::new(Live::default());
        under_way.insert(group.to_owned(), Arc::clone(&live));
        Ok(Claim { groups: Arc::clone(self), group: group.to_owned(), live })
    }
}

/// The place of a group: whoever has it activates it. Given back when this is dropped.
#[derive(Debug)]
struct Claim {
    groups: Arc<Groups>,
    group: String,
    live: Arc<Live>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        locked(&self.groups.under_way).remove(&self.group);
        // Who has come in between finds that nothing more is said here.
        let mut state = locked(&self.live.state);
        state.ended = true;
        state.watchers.clear();
    }
}

impl Live {
    /// How far it is.
    pub fn report(&self) -> GroupReport {
        locked(&self.state).report.clone()
    }

    /// Tells somebody more of what goes on. Not taken any more: it has just ended. An error: there are too many.
    fn attach(&self, watcher: &Watcher) -> Result<bool, Status> {
        let mut state = locked(&self.state);
        state.watchers.retain(|watcher| !watcher.is_closed());
        if state.ended {
            return Ok(false);
        }
        if state.watchers.len() >= WATCHERS_MAX {
            return Err(Status::resource_exhausted(format!("{WATCHERS_MAX} commands follow it already")));
        }
        state.watchers.push(watcher.clone());
        Ok(true)
    }

    /// No further member is begun.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn set(&self, report: &GroupReport) {
        locked(&self.state).report.clone_from(report);
    }

    /// Says something to all who follow; whoever does not read misses it.
    fn say(&self, step: String, message: String) {
        let state = locked(&self.state);
        let ready = |member: &&vmdr_proto::control::GroupMember| member.state == order::State::Ready.word();
        let done = state.report.members.iter().filter(ready).count() as u64;
        let total = state.report.members.len() as u64;
        for watcher in &state.watchers {
            let (step, message) = (step.clone(), message.clone());
            let progress = Progress { step, message, done, total, unit: "ready".to_owned(), ..Progress::default() };
            let _ = watcher.try_send(Ok(progress));
        }
    }

    /// The last word to all who follow.
    fn end(&self, handle: &tokio::runtime::Handle, report: &GroupReport) {
        let watchers = {
            let mut state = locked(&self.state);
            state.report.clone_from(report);
            state.ended = true;
            std::mem::take(&mut state.watchers)
        };
        for watcher in watchers {
            let last = Progress { step: "done".to_owned(), group: Some(report.clone()), ..Progress::default() };
            handle.spawn(async move {
                // Nobody waits for one that does not read.
                let _ = watcher.send_timeout(Ok(last), LAST_MAX).await;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_activated_by_one_and_followed_by_many() {
        let groups = Arc::new(Groups::default());
        let claim = groups.claim("shop").unwrap();
        assert!(groups.claim("mail").is_ok(), "another group has a place of its own");
        let live = groups.claim("shop").unwrap_err();
        let (watcher, mut seen) = mpsc::channel(4);
        assert!(live.attach(&watcher).unwrap());
        claim.live.say("db1: restore".to_owned(), String::new());
        assert_eq!(seen.try_recv().unwrap().unwrap().step, "db1: restore");
        for _ in 1..WATCHERS_MAX {
            assert!(live.attach(&watcher).unwrap());
        }
        assert!(live.attach(&watcher).is_err(), "not without a limit");
        drop(claim);
        assert!(!live.attach(&watcher).unwrap(), "nothing more is said there");
        assert!(groups.of("shop").is_none() && groups.claim("shop").is_ok());
    }

    #[test]
    fn who_follows_is_told_the_end() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let live = Live::default();
        let (watcher, mut seen) = mpsc::channel(1);
        live.attach(&watcher).unwrap();
        drop(watcher);
        // The queue is full of what nobody has read yet.
        live.say("one".to_owned(), String::new());
        live.say("lost".to_owned(), String::new());
        live.end(runtime.handle(), &GroupReport { state: "ready".to_owned(), ..GroupReport::default() });
        runtime.block_on(async {
            assert_eq!(seen.recv().await.unwrap().unwrap().step, "one");
            assert_eq!(seen.recv().await.unwrap().unwrap().group.unwrap().state, "ready");
            assert!(seen.recv().await.is_none());
        });
    }
}
