//! A guest is taken: lease and generation are this site's. The fence command first, where there is one, then an activation like
//! the operator's.
//!
//! On a thread of its own for each. It can be killed at any moment: the book says "taking" until the guest runs here, and whoever
//! finds that goes on, with the fence command again.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tonic::Code;
use vmdr_audit::{Entry, Outcome};
use vmdr_plan::{At, Hook, OnFailure, Place};
use vmdr_proto::control::{ActivateRequest, ActivationReport};
use vmdr_witness::{Owner, Stance, Time};

use super::book::Book;
use super::{Core, Domain, drive, unwritten};
use crate::activate::run::{age_seconds, unix_ns};
use crate::control::{self, Cause};
use crate::daemon::Receiver;
use crate::recovery::hooks;

/// Rest before a fence command that failed is run again, or libvirt asked.
const RETRY: Duration = Duration::from_secs(2);
/// Between two looks whether it is still to go on.
const LOOK: Duration = Duration::from_millis(50);
/// How often the lease is renewed meanwhile.
const RENEW_EVERY: Duration = Duration::from_secs(20);

/// An activation that is due, or under way.
#[derive(Debug)]
pub(super) struct Taking {
    pub from: Owner,
    started: bool,
    renewed: Option<Time>,
    /// Why it does not get on, or has failed; empty: nothing is known against it.
    pub trouble: String,
    /// It is not tried again by itself.
    pub failed: bool,
    /// Somebody owns the guest in this generation, newer than this site's.
    pub outdated: Option<u64>,
}

impl Taking {
    pub fn new(from: Owner) -> Self {
        Taking { from, started: false, renewed: None, trouble: String::new(), failed: false, outdated: None }
    }

    /// The one in which the guest is this site's.
    pub fn generation(&self) -> u64 {
        self.from.generation + 1
    }
}

/// Starts what is due, and keeps its lease.
pub(super) fn tend(receiver: &Arc<Receiver>, domain: &Arc<Domain>, core: &mut Core) {
    let now = receiver.failover.clock.now();
    let asking = core.asking;
    let Some(taking) = &mut core.taking else { return };
    if !taking.started {
        let (of, at) = (Arc::clone(receiver), Arc::clone(domain));
        let from = taking.from.clone();
        let thread = std::thread::Builder::new().name("vmdr-take".to_owned());
        let runtime = tokio::runtime::Handle::current();
        let started = thread.spawn(move || {
            let _entered = runtime.enter();
            run(&of, &at, &from);
        });
        match started {
            Ok(_) => taking.started = true,
            Err(error) => taking.trouble = format!("start a thread for it: {error}; tried again"),
        }
    }
    let due = taking.renewed.is_none_or(|at| now >= at + RENEW_EVERY);
    if due && !asking && !taking.failed {
        taking.renewed = Some(now);
        drive::renew(receiver, domain, core);
    }
}

/// The witness knows whose the guest is, or it runs here: nothing is kept any more.
pub(super) fn settled(receiver: &Receiver, domain: &Domain, core: &mut Core) -> Result<(), String> {
    Book::remove(&domain.directory).map_err(|error| unwritten(domain, &error))?;
    (core.over, core.taking, core.standby, core.book) = (true, None, None, Book::default());
    receiver.failover.forget(domain.uuid);
    Ok(())
}

/// Why it does not go on.
enum Why {
    /// By what else has happened to the domain, or because the receiver ends: nobody has to be told.
    Over,
    /// It has failed, with this sentence.
    Failed(String),
}

fn run(receiver: &Arc<Receiver>, domain: &Arc<Domain>, from: &Owner) {
    let requested = (Instant::now(), unix_ns(SystemTime::now()));
    let generation = from.generation + 1;
    let host = receiver.peer_shown(&from.holder);
    let entry = Entry::new("Activate", "receiver", &domain.uuid.to_string(), Outcome::Begun);
    let cause = format!("automatic failover: {host} is silent and has no lease; generation {generation}");
    let entry = entry.because(cause.clone());
    receiver.audit.record(entry.clone());
    tracing::warn!(domain = %domain.uuid, "{cause}");
    match fence(receiver, domain, from).and_then(|()| activate(receiver, domain, from, requested)) {
        Ok(report) => {
            let detail = if report.failed.is_empty() { cause } else { format!("{cause}; {}", report.failed) };
            receiver.audit.record(entry.with(Outcome::Done).because(detail));
            let mut core = domain.core();
            if let Err(error) = settled(receiver, domain, &mut core) {
                // It runs, and whoever reads the book finds that; here it is over.
                tracing::error!(domain = %domain.uuid, "automatic failover: {error}");
                (core.over, core.taking, core.standby) = (true, None, None);
            }
        }
        Err(Why::Over) => {}
        Err(Why::Failed(why)) => {
            drive::count_failure(receiver);
            tracing::error!(domain = %domain.uuid, "automatic failover: {why}");
            receiver.audit.record(entry.with(Outcome::Failed).because(format!("{cause}: {why}")));
            trouble(domain, why, true);
        }
    }
}

fn trouble(domain: &Domain, why: String, failed: bool) {
    if let Some(taking) = &mut domain.core().taking {
        (taking.trouble, taking.failed) = (why, failed);
    }
}

/// Whether it is still to go on.
fn go_on(receiver: &Receiver, domain: &Domain, from: &Owner) -> Result<(), Why> {
    if receiver.is_ending() {
        return Err(Why::Over);
    }
    let mut core = domain.core();
    let Some(taking) = core.taking.as_ref().filter(|taking| taking.from == *from) else { return Err(Why::Over) };
    let Some(generation) = taking.outdated else { return Ok(()) };
    // Nothing of it was begun here: whoever has the newer generation may have it.
    let with = Book { stance: Stance::Disarmed, ..core.book.clone() };
    if let Err(error) = core.book.replace(&domain.directory, with) {
        return Err(Why::Failed(unwritten(domain, &error)));
    }
    (core.taking, core.standby) = (None, None);
    core.contradiction = format!(
        "the witness has an owner of it in generation {generation}, newer than this site's: find out where it runs"
    );
    tracing::error!(domain = %domain.uuid, "automatic failover: not activated: {}", core.contradiction);
    Err(Why::Over)
}

fn rest(receiver: &Receiver, domain: &Domain, from: &Owner) -> Result<(), Why> {
    let end = Instant::now() + RETRY;
    while Instant::now() < end {
        go_on(receiver, domain, from)?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Until the fence command says that the host does not run the guest any more.
fn fence(receiver: &Arc<Receiver>, domain: &Domain, from: &Owner) -> Result<(), Why> {
    let config = &receiver.failover.config;
    if config.fence_command.is_empty() {
        return go_on(receiver, domain, from);
    }
    let hook = Hook {
        argv: At { value: config.fence_command.clone(), place: Place::default() },
        timeout_seconds: config.fence_timeout_seconds,
        on_failure: OnFailure::Abort,
    };
    for attempt in 1u64.. {
        go_on(receiver, domain, from)?;
        if receiver.store.is_frozen(&domain.uuid.to_string()).unwrap_or(false) {
            // The operator did not wait for it, or it was successful before this receiver was started.
            return Ok(());
        }
        match hooks::run_one("fence", &hook, &environment(receiver, domain, from, attempt)) {
            Ok(()) => {
                super::note(receiver, domain.uuid, "the fence command was successful");
                trouble(domain, String::new(), false);
                return Ok(());
            }
            Err(error) => {
                let what = format!("the fence command {} failed: {error}", config.fence_command.join(" "));
                tracing::error!(domain = %domain.uuid, attempt, "automatic failover: {what}; tried again");
                trouble(
                    domain,
                    format!("{what}; it is run again until it succeeds, and the guest waits for that"),
                    false,
                );
                rest(receiver, domain, from)?;
            }
        }
    }
    Ok(())
}

fn environment(receiver: &Receiver, domain: &Domain, from: &Owner, attempt: u64) -> Vec<(&'static str, String)> {
    let id = domain.uuid.to_string();
    let stored = receiver.store.domains().into_iter().find(|summary| summary.uuid == id);
    let (name, point, cut) = stored.map_or_else(Default::default, |summary| {
        let point = format!("{}-{}", summary.point_generation, summary.position.epoch);
        (summary.name, point, summary.cut_unix_ns)
    });
    vec![
        ("VMDR_DOMAIN", name),
        ("VMDR_UUID", id),
        ("VMDR_PEER", receiver.peer_shown(&from.holder)),
        ("VMDR_PEER_ID", from.holder.clone()),
        ("VMDR_GENERATION", (from.generation + 1).to_string()),
        ("VMDR_POINT", point),
        ("VMDR_POINT_AGE_SECONDS", format!("{:.0}", age_seconds(cut, unix_ns(SystemTime::now())))),
        ("VMDR_ATTEMPT", attempt.to_string()),
    ]
}

/// Until the guest runs here, or it is known that it will not.
fn activate(
    receiver: &Arc<Receiver>,
    domain: &Domain,
    from: &Owner,
    requested: (Instant, u64),
) -> Result<ActivationReport, Why> {
    let uuid = domain.uuid;
    let request = ActivateRequest { domain: uuid.to_string(), ..ActivateRequest::default() };
    let mut progress = |step: &str| tracing::info!(domain = %uuid, step, "automatic failover");
    loop {
        go_on(receiver, domain, from)?;
        let cause = Cause::Silence { generation: from.generation };
        match control::activate_in(receiver, &request, cause, requested, &mut progress) {
            Ok(report) if report.was_active && report.point.is_none() => {
                let what = format!(
                    "a guest of this UUID runs here that was not activated from what is stored: see `virsh dominfo {uuid}`"
                );
                return Err(Why::Failed(what));
            }
            Ok(report) => return Ok(report),
            // It is somebody else's by now.
            Err(status) if status.code() == Code::Aborted => {
                tracing::error!(domain = %uuid, "automatic failover: {}", status.message());
                return Err(Why::Failed(status.message().to_owned()));
            }
            Err(status) if status.code() == Code::Unavailable => {
                tracing::warn!(domain = %uuid, "automatic failover: {}; tried again", status.message());
                trouble(domain, format!("{}; tried again", status.message()), false);
                rest(receiver, domain, from)?;
            }
            Err(status) => return Err(Why::Failed(status.message().to_owned())),
        }
    }
}
