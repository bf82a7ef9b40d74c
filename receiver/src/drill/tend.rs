//! Looks after drills: removes what an earlier receiver has left of them, watches those that are kept, begins those that are due.
//!
//! One thread for all domains. One drill at a time is begun on schedule.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use uuid::Uuid;

use super::record::{self, Book, Outcome, Report};
use super::run::{self, Asked, Drill};
use super::{DrillError, checks};
use crate::activate::host::{Host, LocalHost};
use crate::activate::run::unix_ns;
use crate::daemon::Receiver;
use crate::store::DomainSummary;

/// How often it looks.
const LOOK: Duration = Duration::from_secs(2);
/// How long a domain is left alone of which something could not be done.
const REST: Duration = Duration::from_secs(30);

/// After one that was ended the next drill on schedule comes so soon, or at its turn, if that is sooner.
const AGAIN: Duration = Duration::from_secs(3600);

/// Starts the thread. It ends with the receiver.
pub fn start(receiver: &Arc<Receiver>) -> std::io::Result<()> {
    let of = Arc::downgrade(receiver);
    std::thread::Builder::new().name("vmdr-drill".to_owned()).spawn(move || watch(&of)).map(|_| ())
}

fn watch(of: &Weak<Receiver>) {
    let mut rest: HashMap<Uuid, Instant> = HashMap::new();
    let mut scheduled: Option<JoinHandle<()>> = None;
    while let Some(receiver) = of.upgrade() {
        if receiver.is_ending() {
            return;
        }
        let now = Instant::now();
        rest.retain(|_, until| *until > now);
        for uuid in receiver.store.uuids().iter().filter_map(|uuid| Uuid::parse_str(uuid).ok()) {
            // Where there is no room, what is kept goes in any case.
            let rests = rest.contains_key(&uuid) && run::room(&receiver).is_ok();
            if rests || receiver.drills.of(uuid).is_some() {
                continue;
            }
            if let Err(error) = look(&receiver, uuid, &mut scheduled) {
                tracing::warn!(domain = %uuid, %error, "a drill");
                rest.insert(uuid, now + REST);
            }
        }
        drop(receiver);
        std::thread::sleep(LOOK);
    }
}

/// Does what is due for a domain. After an error it is left alone for a while.
fn look(receiver: &Arc<Receiver>, uuid: Uuid, scheduled: &mut Option<JoinHandle<()>>) -> Result<(), DrillError> {
    let book = Book::read(&receiver.domain_directory(uuid))?;
    match &book.current {
        Some(current) if !current.kept => {
            run::end(receiver, uuid, "it was left over")?;
        }
        Some(kept) => {
            if let Err(error) = run::room(receiver) {
                if !receiver.is_ending() {
                    tracing::warn!(domain = %uuid, drill = kept.id, %error, "a drill that was kept is ended");
                    run::end(receiver, uuid, &error.to_string())?;
                }
                return Ok(());
            }
            let host = LocalHost::connect(&receiver.config.libvirt_uri)?;
            if host.guest(kept.copy_uuid)?.is_none() {
                run::end(receiver, uuid, "its copy has ended")?;
            }
        }
        None => {
            if receiver.drills.is_paused() || scheduled.as_ref().is_some_and(|drill| !drill.is_finished()) {
                return Ok(());
            }
            let id = uuid.to_string();
            let every = receiver.store.name(&id).and_then(|name| receiver.config.drill.of(&name, &id).every());
            if !every.is_some_and(|every| is_over(every, &book, unix_ns(SystemTime::now()))) {
                return Ok(());
            }
            let summary = receiver.store.domains().into_iter().find(|domain| domain.uuid == id);
            if let Some(summary) = summary.filter(is_usable) {
                match begin(receiver, &summary) {
                    Ok(thread) => *scheduled = Some(thread),
                    // Something else goes first.
                    Err(DrillError::Stopped(_)) => {}
                    Err(error) => {
                        could_not(receiver, uuid, &error)?;
                        return Err(error);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Whether there is something to be drilled.
fn is_usable(summary: &DomainSummary) -> bool {
    !summary.frozen && summary.position.epoch > 0 && summary.trouble.is_none()
}

/// Whether the last drill began so long ago; also where there was none. One that was ended shows nothing: the next is due soon.
fn is_over(every: Duration, book: &Book, now_unix_ns: u64) -> bool {
    let is_old = |counts: fn(&Report) -> bool, time: Duration| {
        let last = book.reports.iter().filter(|report| counts(report)).map(|report| report.started_unix_ns).max();
        last.is_none_or(|last| u128::from(now_unix_ns.saturating_sub(last)) >= time.as_nanos())
    };
    is_old(|report| report.outcome != Outcome::Ended, every) && is_old(|_| true, every.min(AGAIN))
}

/// A drill on schedule could not begin: that is not to look like one that passed. Its next turn is the next try.
fn could_not(receiver: &Receiver, uuid: Uuid, error: &DrillError) -> Result<(), DrillError> {
    let Some(_claim) = receiver.drills.claim(uuid) else { return Ok(()) };
    let directory = receiver.domain_directory(uuid);
    let mut book = Book::read(&directory)?;
    if book.current.is_some() {
        return Ok(());
    }
    let now = unix_ns(SystemTime::now());
    let report = Report::begun(record::new_id(), true, now);
    book.close(Report { outcome: Outcome::Failed, error: error.to_string(), ended_unix_ns: now, ..report });
    book.write(&directory)?;
    receiver.metrics.drills.fetch_add(1, Ordering::Relaxed);
    receiver.metrics.drill_failures.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn begin(receiver: &Arc<Receiver>, summary: &DomainSummary) -> Result<JoinHandle<()>, DrillError> {
    let config = receiver.config.drill.of(&summary.name, &summary.uuid);
    let asked = Asked {
        point: None,
        checks: checks::parse(&config.checks).map_err(DrillError::Refused)?,
        run: config.run(),
        limit: config.limit(),
        keep: false,
        scheduled: true,
    };
    let drill = Drill::begin(receiver, summary, asked)?;
    let name = summary.name.clone();
    let thread = std::thread::Builder::new().name("drill".to_owned()).spawn(move || {
        drill.run(&mut |step| tracing::debug!(domain = name, step, "drill"));
    });
    thread.map_err(DrillError::io("start a thread in", &receiver.config.state_dir))
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::report;
    use super::*;

    #[test]
    fn a_domain_is_due_once_its_last_drill_is_old_enough() {
        let hour = Duration::from_secs(3600);
        let mut book = Book::default();
        assert!(is_over(hour, &book, 5), "never drilled");
        book.close(Report { started_unix_ns: 7_000_000_000_000, ..report("a") });
        assert!(!is_over(hour, &book, 7_000_000_000_001));
        assert!(!is_over(hour, &book, 5), "the clock was set back");
        assert!(is_over(hour, &book, 7_000_000_000_000 + 3_600_000_000_000));
        let day = 24 * hour;
        book.close(Report { started_unix_ns: 7_000_000_000_000, outcome: Outcome::Ended, ..report("a") });
        assert!(!is_over(day, &book, 7_000_000_000_001), "not again at once");
        assert!(is_over(day, &book, 7_000_000_000_000 + 3_600_000_000_000), "it showed nothing");
    }
}
