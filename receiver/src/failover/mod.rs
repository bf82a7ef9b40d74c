//! Automatic failover: a guest whose host is silent, and has no lease any more, is taken without anybody being asked.
//!
//! The rule is `docs/failover.md`, what is decided is `vmdr_witness::Standby`'s. Here it is driven: for each domain a core, and
//! a [`book`] that is durable before a host is answered, or anything is done.
//!
//! ```text
//!  stream: opened, Arm, Disarm --> core <-- heard            thread (drive): several times a second
//!                                   |  ^                       |
//!                                   |  +------ witness: look, claim
//!                                   v
//!                                 take: fence command, activation
//! ```
//! A domain whose book cannot be read or written has no core: nothing is promised, and nothing is taken, until it can.

mod book;
mod drive;
mod status;
mod take;
mod witness;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tonic::Status;
use uuid::Uuid;
use vmdr_audit::{Entry, Outcome};
use vmdr_proto::replication;
use vmdr_trust::PeerInfo;
use vmdr_witness::{Owner, Stance, Standby, Time};

use crate::activate::record::Step;
use crate::daemon::Receiver;
use crate::running::RunningClock;
use crate::store::Ingest;
use crate::takeover;
use book::Book;
use take::Taking;
use witness::Witness;

pub use drive::start;

/// `[failover]`: when a silent host's guest is taken, and what is done before.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FailoverConfig {
    /// Seconds of silence after which the witness is asked whether the host still has its lease.
    pub after_seconds: u64,
    /// A program and its arguments that makes sure that the host does not run the guest any more; empty: none.
    pub fence_command: Vec<String>,
    /// How long it may take.
    pub fence_timeout_seconds: u64,
}

impl Default for FailoverConfig {
    fn default() -> Self {
        FailoverConfig { after_seconds: 10, fence_command: Vec::new(), fence_timeout_seconds: 60 }
    }
}

impl FailoverConfig {
    /// What of it makes no sense. `witness`: there is one.
    pub fn nonsense(&self, witness: bool) -> Option<String> {
        if !witness && *self != Self::default() {
            return Some("no guest is taken without a witness: [witness] is missing".to_owned());
        }
        if !(3..=86_400).contains(&self.after_seconds) {
            return Some(format!("after_seconds = {}: it is from 3 to 86400", self.after_seconds));
        }
        if !(1..=3600).contains(&self.fence_timeout_seconds) {
            return Some(format!("fence_timeout_seconds = {}: it is from 1 to 3600", self.fence_timeout_seconds));
        }
        let relative = self.fence_command.first().filter(|program| !Path::new(program).is_absolute());
        relative.map(|program| format!("fence_command = [{program:?}, ...]: the program is named by an absolute path"))
    }
}

/// All domains.
#[derive(Debug)]
pub struct Failover {
    /// Nothing: no guest is taken by itself.
    witness: Option<Witness>,
    config: FailoverConfig,
    clock: RunningClock,
    domains: Mutex<HashMap<Uuid, Arc<Domain>>>,
}

/// One domain.
#[derive(Debug)]
struct Domain {
    uuid: Uuid,
    directory: PathBuf,
    core: Mutex<Core>,
    /// The newest stream that was heard, and when. Apart from the core, whose lock is held while its book is written.
    heard: Mutex<(u64, Time)>,
}

/// What is decided about a domain.
#[derive(Debug, Default)]
struct Core {
    /// Nothing: see `unknown`.
    standby: Option<Standby>,
    book: Book,
    /// Why there is no core, a sentence.
    unknown: String,
    /// The newest stream.
    stream: u64,
    /// How many cores there have been: answers to what an earlier one has asked mean nothing.
    life: u64,
    /// The witness is being asked something beside the core's claims.
    asking: bool,
    /// When it is asked again whether it knows of what was activated by hand.
    publish_next: Time,
    /// Why the witness did not answer when it was asked last; empty: it did.
    silent_witness: String,
    /// What the witness has that does not go with what is here, a sentence.
    contradiction: String,
    /// Since when another has held the lease of what was activated here.
    held_since: Option<Time>,
    /// The activation, once lease and generation are this site's.
    taking: Option<Taking>,
    /// It was activated here, or handed over: nothing is taken any more.
    over: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Failover {
    /// Of this configuration.
    pub fn new(witness: &vmdr_etcd::Config, config: &FailoverConfig) -> Self {
        Failover {
            witness: witness.is_set().then(|| Witness::new(witness.clone())),
            config: config.clone(),
            clock: RunningClock::default(),
            domains: Mutex::default(),
        }
    }

    /// Something came in on a stream, or nothing was read from it.
    pub fn heard(&self, uuid: Uuid, stream: u64) {
        if self.witness.is_none() {
            return;
        }
        let Some(domain) = self.of(uuid) else { return };
        let mut heard = locked(&domain.heard);
        if stream >= heard.0 {
            *heard = (stream, self.clock.now());
        }
    }

    fn of(&self, uuid: Uuid) -> Option<Arc<Domain>> {
        locked(&self.domains).get(&uuid).cloned()
    }

    fn entry(&self, receiver: &Receiver, uuid: Uuid) -> Arc<Domain> {
        let fresh = || {
            let directory = receiver.domain_directory(uuid);
            Arc::new(Domain { uuid, directory, core: Mutex::default(), heard: Mutex::default() })
        };
        Arc::clone(locked(&self.domains).entry(uuid).or_insert_with(fresh))
    }

    fn forget(&self, uuid: Uuid) {
        locked(&self.domains).remove(&uuid);
    }
}

impl Domain {
    /// Its core, which knows of everything that was heard.
    fn core(&self) -> MutexGuard<'_, Core> {
        let mut core = locked(&self.core);
        let (stream, at) = *locked(&self.heard);
        if let Some(standby) = &mut core.standby {
            standby.heard(stream, at);
        }
        core
    }
}

/// From what the book has: with a core, or without one if it cannot be read, or says what it cannot be left at.
fn begin(receiver: &Receiver, domain: &Domain, core: &mut Core) -> Result<(), String> {
    let id = domain.uuid.to_string();
    core.book = Book::read(&domain.directory)?;
    let stored = receiver.store.position(&id).map_err(|error| error.to_string())?.generation;
    let frozen = receiver.store.is_frozen(&id).map_err(|error| error.to_string())?;
    let record = || receiver.active_directory(domain.uuid).read(domain.uuid).map_err(|error| error.to_string());
    let planned = match &core.book.stance {
        // Ended between that its generation was raised and that it was frozen.
        Stance::Taking { from } if stored == from.generation + 1 => {
            matches!(record()?, Some(record) if matches!(record.step, Step::Planned { generation } if generation == stored))
        }
        _ => false,
    };
    if frozen || planned || takeover::has_taken(receiver, domain.uuid, stored).map_err(|error| format!("{error:#}"))? {
        let here = match &core.book.stance {
            Stance::Taking { from } if stored == from.generation + 1 => Some(from.clone()),
            _ => None,
        };
        core.over = true;
        return match here {
            None => publish(domain, core, stored),
            Some(from) => {
                if record()?.is_some_and(|record| matches!(record.step, Step::Running { .. })) {
                    return take::settled(receiver, domain, core);
                }
                // An earlier receiver was ended while it activated.
                core.taking = Some(Taking::new(from));
                Ok(())
            }
        };
    }
    let from = match &core.book.stance {
        Stance::Armed { from } | Stance::Taking { from } => from.generation,
        Stance::Disarmed => stored,
    };
    let stance = core.book.stance.clone();
    revive(receiver, core, stance)?;
    if from < stored { stand_down(receiver, domain, core) } else { Ok(()) }
}

/// A core of this stance, which is what the book has.
fn revive(receiver: &Receiver, core: &mut Core, stance: Stance) -> Result<(), String> {
    let failover = &receiver.failover;
    let me = receiver.trust.id().map_err(|error| error.to_string())?;
    let bound = Duration::from_secs(failover.config.after_seconds);
    let mut standby = Standby::new(&me, stance, bound, true, failover.clock.now());
    standby.opened(core.stream, failover.clock.now());
    core.standby = Some(standby);
    core.life += 1;
    core.unknown.clear();
    (core.taking, core.over) = (None, false);
    Ok(())
}

/// Somebody owns the guest in a newer generation than the one in which this site was armed: nothing is to be taken any more.
fn stand_down(receiver: &Receiver, domain: &Domain, core: &mut Core) -> Result<(), String> {
    let with = Book { stance: Stance::Disarmed, publish: None, ..core.book.clone() };
    core.standby = None;
    core.book.replace(&domain.directory, with).map_err(|error| unwritten(domain, &error))?;
    note(receiver, domain.uuid, "disarmed: somebody owns it in a newer generation than the one in which it was armed");
    revive(receiver, core, Stance::Disarmed)
}

/// It was activated here by hand, or handed over: nothing is taken, and the witness is to know of it.
fn publish(domain: &Domain, core: &mut Core, generation: u64) -> Result<(), String> {
    core.over = true;
    if let Some(standby) = &mut core.standby {
        standby.activated();
    }
    if core.book.automatic && core.book.publish != Some(generation) {
        let with = Book { stance: Stance::Disarmed, publish: Some(generation), ..core.book.clone() };
        core.standby = None;
        core.book.replace(&domain.directory, with).map_err(|error| unwritten(domain, &error))?;
    }
    Ok(())
}

fn unwritten(domain: &Domain, error: &std::io::Error) -> String {
    format!("what was agreed on with its host cannot be written to {}: {error}", domain.directory.display())
}

/// Whether there is a core; if not, it is tried to have one.
fn ready(receiver: &Receiver, domain: &Domain, core: &mut Core) -> bool {
    if core.standby.is_none() && !core.over {
        if let Err(error) = begin(receiver, domain, core) {
            if core.unknown != error {
                tracing::error!(domain = %domain.uuid, "automatic failover: {error}");
            }
            (core.unknown, core.standby, core.over) = (error, None, false);
        } else {
            core.unknown.clear();
        }
    }
    core.standby.is_some()
}

fn note(receiver: &Receiver, uuid: Uuid, what: &str) {
    tracing::info!(domain = %uuid, "automatic failover: {what}");
    let entry = Entry::new("Failover", "receiver", &uuid.to_string(), Outcome::Noted);
    receiver.audit.record(entry.because(what));
}

/// Whether this host is the one that is talked to about the domain. What a host was told of a stance it goes by until it hears
/// otherwise: so nobody else changes it, in the same generation, as long as that host is let in at all.
fn is_host(receiver: &Receiver, book: &Book, uuid: Uuid, peer: &str, generation: u64) -> bool {
    let Some(host) = &book.host else { return true };
    let gone = || receiver.store.access(&uuid.to_string()).is_ok_and(|access| !access.is_of(&host.holder));
    host.holder == peer || generation > host.generation || gone()
}

/// A stream was opened, the `stream`th of the domain. What its Welcome says; nothing: no guest is taken here. Blocks.
pub fn opened(
    receiver: &Receiver,
    uuid: Uuid,
    stream: u64,
    peer: &PeerInfo,
    generation: u64,
) -> Option<replication::Failover> {
    let failover = &receiver.failover;
    failover.witness.as_ref()?;
    let domain = failover.entry(receiver, uuid);
    let mut core = domain.core();
    core.stream = core.stream.max(stream);
    if core.over {
        // It was this site's, and is a standby again.
        (core.over, core.standby, core.taking) = (false, None, None);
    }
    core.contradiction.clear();
    if !ready(receiver, &domain, &mut core) {
        return Some(replication::Failover { disarmed: false });
    }
    let host = Owner { generation, holder: peer.id.clone() };
    let mut allowed = is_host(receiver, &core.book, uuid, &peer.id, generation);
    if allowed && core.book.host.as_ref() != Some(&host) {
        let with = Book { host: Some(host), publish: None, ..core.book.clone() };
        if let Err(error) = core.book.replace(&domain.directory, with) {
            tracing::error!(domain = %uuid, "automatic failover: {}", unwritten(&domain, &error));
            allowed = false;
        }
    }
    let older = match &core.book.stance {
        Stance::Armed { from } | Stance::Taking { from } => from.generation < generation,
        Stance::Disarmed => false,
    };
    if older && let Err(error) = stand_down(receiver, &domain, &mut core) {
        tracing::error!(domain = %uuid, "automatic failover: {error}");
        core.unknown = error;
    }
    let now = failover.clock.now();
    let disarmed = core.standby.as_mut().is_some_and(|standby| standby.opened(stream, now));
    Some(replication::Failover { disarmed: disarmed && allowed })
}

/// What a host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// It holds its lease: the guest may be taken when that has ended.
    Arm,
    /// The guest is not to be taken.
    Disarm,
}

/// The host asks for something on a stream that is the newest. Whether it was done, durably. Blocks.
pub fn asked(receiver: &Receiver, uuid: Uuid, stream: u64, peer: &PeerInfo, ingest: &Ingest, word: Word) -> bool {
    let failover = &receiver.failover;
    let (Some(_), generation) = (&failover.witness, ingest.generation()) else { return false };
    let domain = failover.entry(receiver, uuid);
    let mut core = domain.core();
    if core.over || !ready(receiver, &domain, &mut core) {
        return false;
    }
    if !is_host(receiver, &core.book, uuid, &peer.id, generation) {
        tracing::warn!(domain = %uuid, peer = %peer.shown(), "automatic failover: another host has this site's word: not done");
        return false;
    }
    // Without a recovery point of this generation there is nothing to go on from.
    if word == Word::Arm && !ingest.has_point() {
        return false;
    }
    let newer = stream > core.stream;
    core.stream = core.stream.max(stream);
    let Core { standby: Some(standby), book, .. } = &mut *core else { return false };
    if newer {
        // The core was made anew since it was opened.
        standby.opened(stream, failover.clock.now());
    }
    let before = book.stance.clone();
    let keep = |stance: &Stance| book.keep(&domain.directory, stance);
    let done = match word {
        Word::Arm => standby.arm(stream, &Owner { generation, holder: peer.id.clone() }, keep),
        Word::Disarm => standby.disarm(stream, keep),
    };
    if core.book.stance != before {
        let what = if word == Word::Arm { "armed" } else { "disarmed" };
        note(receiver, uuid, &format!("{what} by {}, in generation {generation}", peer.shown()));
    }
    done.unwrap_or_else(|error| {
        tracing::error!(domain = %uuid, "automatic failover: {}", unwritten(&domain, &error));
        false
    })
}

/// The domain is this site's in this generation, durably, other than by automatic failover: the operator has activated it, or
/// its host has handed it over. Blocks.
pub fn owned(receiver: &Receiver, uuid: Uuid, generation: u64) {
    let failover = &receiver.failover;
    if failover.witness.is_none() || !Book::exists(&receiver.domain_directory(uuid)) {
        return;
    }
    let domain = failover.entry(receiver, uuid);
    let mut core = domain.core();
    // Where there is no core, the next look finds whose the domain is.
    if ready(receiver, &domain, &mut core)
        && let Err(error) = publish(&domain, &mut core, generation)
    {
        tracing::error!(domain = %uuid, "automatic failover: {error}");
        (core.unknown, core.over) = (error, false);
    }
}

/// Whether a domain may be forgotten: not while its guest is being taken, since the witness has given it to this site, or may have. Blocks.
pub fn may_forget(receiver: &Receiver, uuid: Uuid, name: &str) -> Result<(), Status> {
    let Some(domain) = receiver.failover.of(uuid) else { return Ok(()) };
    let core = domain.core();
    if core.taking.is_none() && (core.over || !matches!(core.book.stance, Stance::Taking { .. })) {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "{name} is being taken, because its host is silent; its host would not run it any more, and nobody else could: \
         `vmdr activate {name}` first, or see with `vmdr status {name}` what it waits for"
    )))
}

/// A domain is not stored here any more.
pub fn forgotten(receiver: &Receiver, uuid: Uuid) {
    receiver.failover.forget(uuid);
}

/// The domain is given back to its host, and was never run here. Before that is durable. Blocks.
pub fn given_back(receiver: &Receiver, uuid: Uuid) -> Result<(), Status> {
    let domain = receiver.failover.of(uuid);
    let mut core = domain.as_ref().map(|domain| domain.core());
    Book::remove(&receiver.domain_directory(uuid)).map_err(|error| Status::internal(error.to_string()))?;
    if let Some(core) = &mut core {
        // Whoever still works at it finds that it is over.
        (core.over, core.standby, core.taking, core.book) = (true, None, None, Book::default());
    }
    drop(core);
    receiver.failover.forget(uuid);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_make_no_sense_are_named() {
        assert_eq!((FailoverConfig::default().nonsense(false), FailoverConfig::default().nonsense(true)), (None, None));
        let with = |after_seconds, program: &str, fence_timeout_seconds| FailoverConfig {
            after_seconds,
            fence_command: vec![program.to_owned()],
            fence_timeout_seconds,
        };
        assert_eq!(with(5, "/x", 5).nonsense(true), None);
        for (config, witness, word) in [
            (with(5, "/x", 5), false, "[witness]"),
            (with(1, "/x", 5), true, "after_seconds"),
            (with(5, "x", 5), true, "absolute"),
            (with(5, "/x", 0), true, "fence_timeout_seconds"),
        ] {
            let what = config.nonsense(witness).unwrap_or_default();
            assert!(what.contains(word), "{word}: {what}");
        }
    }
}
