//! What is decided is asked for several times a second, and done; the witness is asked without anybody waiting for it.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use uuid::Uuid;
use vmdr_witness::standby::Act;
use vmdr_witness::{Allowed, Claim, Over, Stance, View};

use super::book::Book;
use super::{Core, Domain, note, ready, take};
use crate::daemon::Receiver;

/// How often it is looked at.
const TICK: Duration = Duration::from_millis(200);
/// How often the witness is asked whether it takes what was activated by hand.
const PUBLISH_EVERY: Duration = Duration::from_secs(2);

/// Starts the thread that looks. It ends with the receiver.
pub fn start(receiver: &Arc<Receiver>) -> io::Result<()> {
    if receiver.failover.witness.is_none() {
        return Ok(());
    }
    for domain in receiver.store.domains() {
        if let Ok(uuid) = Uuid::parse_str(&domain.uuid)
            && Book::exists(&receiver.domain_directory(uuid))
        {
            receiver.failover.entry(receiver, uuid);
        }
    }
    let (of, runtime) = (Arc::downgrade(receiver), Handle::current());
    std::thread::Builder::new().name("vmdr-failover".to_owned()).spawn(move || look_for_ever(&of, &runtime)).map(drop)
}

fn look_for_ever(of: &Weak<Receiver>, runtime: &Handle) {
    let _entered = runtime.enter();
    while let Some(receiver) = of.upgrade() {
        if receiver.is_ending() || !receiver.failover.clock.step(runtime) {
            return;
        }
        let domains: Vec<_> = super::locked(&receiver.failover.domains).values().cloned().collect();
        for domain in domains {
            tick(&receiver, &domain);
        }
        drop(receiver);
        std::thread::sleep(TICK);
    }
}

fn tick(receiver: &Arc<Receiver>, domain: &Arc<Domain>) {
    let now = receiver.failover.clock.now();
    let mut core = domain.core();
    ready(receiver, domain, &mut core);
    take::tend(receiver, domain, &mut core);
    publish(receiver, domain, &mut core);
    if core.over || core.taking.is_some() || !core.book.automatic {
        return;
    }
    let rests = receiver.silence.rest(domain.uuid).is_some();
    let Core { standby: Some(standby), book, stream, .. } = &mut *core else { return };
    if rests && matches!(book.stance, Stance::Armed { .. }) {
        // It does not send on purpose: the guest was shut off there, or its protection ended or suspended.
        standby.heard(*stream, now);
    }
    match standby.tick(now, |stance| book.keep(&domain.directory, stance)) {
        Ok(act) => perform(receiver, domain, &mut core, act),
        Err(error) => {
            tracing::error!(domain = %domain.uuid, %error, "automatic failover: its stance cannot be written")
        }
    }
}

fn perform(receiver: &Arc<Receiver>, domain: &Arc<Domain>, core: &mut Core, act: Option<Act>) {
    match act {
        None => {}
        // One look at a time: a witness that is slow is not asked twice a second.
        Some(Act::Look) if core.asking => {}
        Some(Act::Look) => {
            core.asking = true;
            let (receiver, domain, life) = (Arc::clone(receiver), Arc::clone(domain), core.life);
            tokio::spawn(async move {
                let Some(witness) = &receiver.failover.witness else { return };
                let view = witness.look(domain.uuid).await;
                let of = Arc::clone(&receiver);
                let _ = tokio::task::spawn_blocking(move || seen(&of, &domain, life, view)).await;
            });
        }
        Some(Act::Claim { number, claim }) => {
            let (receiver, domain, life) = (Arc::clone(receiver), Arc::clone(domain), core.life);
            tokio::spawn(async move {
                let Some(witness) = &receiver.failover.witness else { return };
                let answer = witness.claim(domain.uuid, &claim).await;
                let of = Arc::clone(&receiver);
                let _ = tokio::task::spawn_blocking(move || claimed(&of, &domain, life, number, answer)).await;
            });
        }
        Some(Act::Activate { .. }) => {
            if let Stance::Taking { from } = core.book.stance.clone() {
                core.taking = Some(take::Taking::new(from));
                take::tend(receiver, domain, core);
            }
        }
    }
}

fn seen(receiver: &Arc<Receiver>, domain: &Arc<Domain>, life: u64, view: Result<View, String>) {
    let now = receiver.failover.clock.now();
    let rests = receiver.silence.rest(domain.uuid).is_some();
    let mut core = domain.core();
    core.asking = false;
    let view = match view {
        Ok(view) => view,
        Err(error) => return unanswered(domain, &mut core, error),
    };
    core.silent_witness.clear();
    if core.over || rests || core.life != life {
        return;
    }
    let Core { standby: Some(standby), book, .. } = &mut *core else { return };
    let act = standby.seen(&view, now, |stance| book.keep(&domain.directory, stance));
    match act {
        Ok(None) => {}
        Ok(act) => {
            let host = receiver.peer_shown(from(&core));
            let silent = receiver.failover.config.after_seconds;
            note(
                receiver,
                domain.uuid,
                &format!("taking: {host} was not heard of for {silent} s and more, and has no lease any more"),
            );
            perform(receiver, domain, &mut core, act);
        }
        Err(error) => {
            tracing::error!(domain = %domain.uuid, %error, "automatic failover: its stance cannot be written")
        }
    }
}

/// The host that it is taken from, or could be.
pub(super) fn from(core: &Core) -> &str {
    match &core.book.stance {
        Stance::Armed { from } | Stance::Taking { from } => &from.holder,
        Stance::Disarmed => "",
    }
}

fn claimed(receiver: &Arc<Receiver>, domain: &Arc<Domain>, life: u64, number: u64, answer: Result<Allowed, String>) {
    let stored = receiver.store.position(&domain.uuid.to_string());
    let now = receiver.failover.clock.now();
    let mut core = domain.core();
    if core.over || core.life != life {
        return;
    }
    let Core { standby: Some(standby), book, silent_witness, .. } = &mut *core else { return };
    let act = match (answer, stored) {
        (Ok(Allowed::Yes), Ok(stored)) => {
            silent_witness.clear();
            standby.granted(number, stored.generation)
        }
        (Ok(Allowed::Yes), Err(error)) => {
            // Granted again when the domain can be read.
            tracing::error!(domain = %domain.uuid, %error, "automatic failover");
            standby.unanswered(number, now);
            None
        }
        (Ok(why), _) => {
            silent_witness.clear();
            tracing::warn!(domain = %domain.uuid, ?why, "automatic failover: the claim was refused");
            if let Err(error) = standby.refused(number, why, |stance| book.keep(&domain.directory, stance)) {
                tracing::error!(domain = %domain.uuid, %error, "automatic failover: its stance cannot be written");
            }
            None
        }
        (Err(error), _) => {
            standby.unanswered(number, now);
            unanswered(domain, &mut core, error);
            None
        }
    };
    perform(receiver, domain, &mut core, act);
}

/// Tells the witness of what was activated here by hand, or handed over, so that the host that had it learns of it from there.
fn publish(receiver: &Arc<Receiver>, domain: &Arc<Domain>, core: &mut Core) {
    let now = receiver.failover.clock.now();
    let Some(generation) = core.book.publish.filter(|_| core.over && !core.asking && now >= core.publish_next) else {
        return;
    };
    let Ok(holder) = receiver.trust.id() else { return };
    (core.asking, core.publish_next) = (true, now + PUBLISH_EVERY);
    let (receiver, domain) = (Arc::clone(receiver), Arc::clone(domain));
    tokio::spawn(async move {
        let Some(witness) = &receiver.failover.witness else { return };
        // It goes by what the operator knows, or its host has said: that nobody else runs it.
        let claim = Claim { holder, generation, over: Over::Anything };
        let answer = witness.claim(domain.uuid, &claim).await;
        let of = Arc::clone(&receiver);
        let _ = tokio::task::spawn_blocking(move || published(&of, &domain, generation, answer)).await;
    });
}

fn published(receiver: &Arc<Receiver>, domain: &Arc<Domain>, generation: u64, answer: Result<Allowed, String>) {
    let mut core = domain.core();
    core.asking = false;
    if !core.over || core.book.publish != Some(generation) {
        return;
    }
    match answer {
        Ok(Allowed::Held(holder)) => {
            let host = receiver.peer_shown(&holder);
            let what = format!(
                "it is this site's in generation {generation}, and {host} holds a lease of it at the witness: it may run there as well"
            );
            if core.contradiction != what {
                tracing::warn!(domain = %domain.uuid, "automatic failover: {what}, unless that ends by itself");
            }
            core.contradiction = what;
            core.held_since.get_or_insert(receiver.failover.clock.now());
        }
        // Somebody owns it in a newer generation: then there is nothing to tell.
        Ok(Allowed::Yes | Allowed::Outdated(_) | Allowed::Missing) => {
            (core.contradiction, core.held_since) = (String::new(), None);
            if let Err(error) = take::settled(receiver, domain, &mut core) {
                tracing::error!(domain = %domain.uuid, "automatic failover: {error}");
            } else {
                note(
                    receiver,
                    domain.uuid,
                    &format!("the witness knows that it is this site's in generation {generation}"),
                );
            }
        }
        Err(error) => unanswered(domain, &mut core, error),
    }
}

/// The witness does not answer: said once.
fn unanswered(domain: &Domain, core: &mut Core, error: String) {
    if core.silent_witness != error {
        tracing::warn!(domain = %domain.uuid, "automatic failover: {error}");
    }
    core.silent_witness = error;
}

/// Renews the claim of a guest that is being activated, and finds out whether it is this site's still.
pub(super) fn renew(receiver: &Arc<Receiver>, domain: &Arc<Domain>, core: &mut Core) {
    let (Ok(holder), Some(taking)) = (receiver.trust.id(), &core.taking) else { return };
    let claim = Claim { holder, generation: taking.generation(), over: Over::Own };
    core.asking = true;
    let (receiver, domain) = (Arc::clone(receiver), Arc::clone(domain));
    tokio::spawn(async move {
        let Some(witness) = &receiver.failover.witness else { return };
        let answer = witness.claim(domain.uuid, &claim).await;
        let mut core = domain.core();
        core.asking = false;
        if let (Some(taking), Ok(Allowed::Outdated(generation))) = (&mut core.taking, &answer) {
            taking.outdated = Some(*generation);
        }
        if let Err(error) = answer {
            tracing::warn!(domain = %domain.uuid, "automatic failover: {error}");
        }
    });
}

/// Counts an activation that has failed.
pub(super) fn count_failure(receiver: &Receiver) {
    receiver.metrics.activation_failures.fetch_add(1, Ordering::Relaxed);
}
