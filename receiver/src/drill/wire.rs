//! What the `vmdr` command asks about drills, and is told.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tonic::Status;
use uuid::Uuid;
use vmdr_proto::control::{ActivateRequest, DrillReport, DrillRequest, Progress};

use super::record::{Book, Current, Report};
use super::run::{self, Asked, Drill};
use super::{DrillError, checks};
use crate::activate::run::{age_seconds, unix_ns};
use crate::control::{activate_status, find, store_status};
use crate::daemon::Receiver;
use crate::history;

/// The longest that a copy can be asked to run: a drill is no second site.
const RUN_SECONDS_MAX: u32 = 24 * 3600;

/// Where messages for somebody who waits go.
pub type Waiter = mpsc::Sender<Result<Progress, Status>>;

/// An error as it is told.
pub fn status_of(error: &DrillError) -> Status {
    match error {
        DrillError::Store(error) => store_status(error),
        DrillError::Activate(error) => activate_status(error),
        DrillError::Space { .. } => Status::resource_exhausted(error.to_string()),
        DrillError::Refused(what) | DrillError::Stopped(what) => Status::failed_precondition(what.clone()),
        DrillError::Hypervisor(inner) if inner.is_connection() => Status::unavailable(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}

/// Begins a drill; it goes on whoever listens.
pub fn begin(receiver: &Arc<Receiver>, request: &DrillRequest, messages: Waiter) -> Result<(), Status> {
    let (uuid, summary) = find(receiver, &request.domain)?;
    let which = ActivateRequest {
        domain: request.domain.clone(),
        point: request.point.clone(),
        at_unix_ns: request.at_unix_ns,
        ..ActivateRequest::default()
    };
    let config = receiver.config.drill.of(&summary.name, &summary.uuid);
    let checks = if request.checks.is_empty() { &config.checks } else { &request.checks };
    if request.run_seconds > RUN_SECONDS_MAX {
        return Err(Status::invalid_argument(format!(
            "the copy would run for {} s before it is said to run: at most {RUN_SECONDS_MAX} s are possible",
            request.run_seconds
        )));
    }
    let run = match request.run_seconds {
        0 => config.run(),
        seconds => Duration::from_secs(seconds.into()),
    };
    let asked = Asked {
        checks: checks::parse(checks).map_err(Status::invalid_argument)?,
        point: history::choose(&receiver.store, &summary.uuid, &which)?,
        run,
        limit: config.limit(),
        keep: request.keep,
        scheduled: false,
    };
    let drill = Drill::begin(receiver, &summary, asked).map_err(|e| status_of(&e))?;
    let last = |current: &Current| Progress {
        step: "drill".to_owned(),
        drill: Some(message(&current.report, Some(current), &summary.name, uuid)),
        ..Progress::default()
    };
    let messages = if request.wait {
        Some(messages)
    } else {
        // The channel is new and has room.
        let _ = messages.try_send(Ok(last(drill.current())));
        None
    };
    let name = summary.name.clone();
    let work = move || {
        let mut progress = |step: &str| {
            tracing::debug!(domain = name, step, "drill");
            if let Some(messages) = &messages {
                // Somebody who does not read misses it.
                let _ = messages.try_send(Ok(Progress { step: step.to_owned(), ..Progress::default() }));
            }
        };
        let current = drill.run(&mut progress);
        if let Some(messages) = &messages {
            let drill = Some(message(&current.report, Some(&current), &name, uuid));
            let _ = messages.blocking_send(Ok(Progress { step: "drill".to_owned(), drill, ..Progress::default() }));
        }
    };
    let spawned = std::thread::Builder::new().name("drill".to_owned()).spawn(work);
    spawned.map(drop).map_err(|e| Status::internal(format!("start a thread: {e}")))
}

/// Ends the drill of a domain.
pub fn end(receiver: &Arc<Receiver>, wanted: &str) -> Result<DrillReport, Status> {
    let (uuid, summary) = find(receiver, wanted)?;
    let ended = run::end(receiver, uuid, "it was ended by `vmdr drill --end`").map_err(|e| status_of(&e))?;
    let report =
        ended.ok_or_else(|| Status::not_found(format!("no drill of {} is under way or kept", summary.name)))?;
    Ok(message(&report, None, &summary.name, uuid))
}

/// The drill of a domain that is under way or kept, or else the last one.
pub fn newest(receiver: &Receiver, uuid: Uuid, name: &str) -> Option<DrillReport> {
    // A book that cannot be read is told of by who looks after drills.
    let book = Book::read(&receiver.domain_directory(uuid)).ok()?;
    Some(message(book.newest()?, book.current.as_ref(), name, uuid))
}

fn message(report: &Report, current: Option<&Current>, name: &str, uuid: Uuid) -> DrillReport {
    let since = if report.ended_unix_ns > 0 { report.ended_unix_ns } else { report.started_unix_ns };
    let there = current.filter(|current| current.kept || report.ended_unix_ns == 0);
    DrillReport {
        id: report.id.clone(),
        name: name.to_owned(),
        uuid: uuid.to_string(),
        point: report.point.clone(),
        cut_unix_ns: report.cut_unix_ns,
        result: report.outcome.word().to_owned(),
        error: report.error.clone(),
        kept: current.is_some_and(|current| current.kept),
        scheduled: report.scheduled,
        started_unix_ns: report.started_unix_ns,
        ended_unix_ns: report.ended_unix_ns,
        age_seconds: age_seconds(since, unix_ns(SystemTime::now())),
        copy_seconds: report.copy_seconds,
        rto_seconds: report.rto_seconds.unwrap_or(0.0),
        copied_bytes: report.copied_bytes,
        shared_bytes: report.shared_bytes,
        checks: report.checks.iter().map(Into::into).collect(),
        copy_name: there.map(|current| current.copy_name.clone()).unwrap_or_default(),
        copy_uuid: there.map(|current| current.copy_uuid.to_string()).unwrap_or_default(),
        bridges: there.map(|current| current.bridges.clone()).unwrap_or_default(),
    }
}
