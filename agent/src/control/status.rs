//! What `status` says of a domain, and what the operator can do next.

use vmdr_daemon::guest_channel::GuestChannel;
use vmdr_proto::control::DomainStatus;

use crate::failover::Failover;
use crate::session::{Phase, Session};

/// What `status` tells of a session.
pub(super) fn of(session: &Session) -> DomainStatus {
    let tools = session.shared.tools().as_ref().and_then(GuestChannel::tools);
    let status = session.shared.status();
    let figures = &status.figures;
    DomainStatus {
        name: session.protection.name.clone(),
        uuid: session.protection.uuid.clone(),
        role: "protected".to_owned(),
        state: status.shown_phase().name().to_owned(),
        generation: status.generation,
        epoch: status.epoch,
        durable_epoch: status.durable_epoch,
        rpo_seconds: figures.rpo_seconds().unwrap_or(0.0),
        rpo_worst_hour_seconds: figures.rpo_worst_seconds(),
        pause_p50_seconds: figures.pause_seconds(0.5),
        pause_p99_seconds: figures.pause_seconds(0.99),
        dirty_pages_per_epoch: figures.pages_per_epoch(),
        bytes_per_epoch: figures.bytes_per_epoch(),
        link_bytes_per_second: figures.link_bytes_per_second(),
        last_error: status.last_error.clone(),
        peer: session.protection.receiver.clone(),
        interval_ms: session.protection.interval_ms,
        paused_ratio: figures.paused_ratio(),
        advice: advice(status.shown_phase()).to_owned(),
        stored_bytes: 0,
        monitor: status.monitor.to_owned(),
        since_unix_ns: status.since_unix_ns,
        limited_by: session.shared.limits.limited_by(),
        guest_clock_offset_seconds: tools.as_ref().and_then(|tools| tools.clock_offset_seconds),
        guest_tools: tools.map(|tools| tools.software).unwrap_or_default(),
        application_every_seconds: session.protection.application_every_seconds,
        application_cut_unix_ns: status.application.cut_unix_ns,
        application_frozen_seconds: status.application.frozen.as_secs_f64(),
        application_error: status.application.error.clone(),
        failover: session.failover.as_ref().map(Failover::status),
        // What only a receiver knows.
        ..DomainStatus::default()
    }
}

fn advice(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "wait: the guest is being put under protection",
        Phase::Disconnected => "check the receiver and the network: the guest runs on unprotected until they are back",
        Phase::Seeding => "wait for the first copy; until then only an older recovery point, if any, can be activated",
        Phase::Resync => {
            "wait: the standby is being brought level; the older recovery point can be activated meanwhile"
        }
        Phase::Protected => {
            "nothing to do; `vmdr activate` at the backup site brings the guest up there, `vmdr move` here takes it there"
        }
        Phase::Behind => "nothing is lost yet: more is written than the link takes, the recovery point grows older",
        Phase::Stalled => "see to the guest's storage: no recovery point is made until it answers again",
        Phase::Held => "the guest is paused and its standby level with it; `vmdr release` lets it go on",
        Phase::Paused => "somebody stopped the guest: resume it (`virsh resume`), epochs then go on",
        Phase::Stopped => {
            "the guest goes on by itself when the witness or the backup site can be reached; see `vmdr status` at the backup site \
             whether it runs there"
        }
        Phase::Suspended => "when you are done: `vmdr resume`; until then the recovery point stays and grows older",
        Phase::ShutOff => "nothing is wrong: protection goes on when the guest is started",
        Phase::Crashed => {
            "start the guest (`virsh start`), which gives up the recovery point with its memory, or `vmdr activate` it at \
             the backup site"
        }
        Phase::Failed => "see the last error; `vmdr unprotect` and `vmdr protect` begin anew",
        Phase::Fenced => {
            "another site owns this guest: `vmdr reprotect` there protects it to here, `vmdr failback` there brings it home; if that site is gone for good: `vmdr own --force` here"
        }
        Phase::Moving => {
            "the guest is paused until it is known whether the other site has taken it: see to the link and the receiver; if that site is gone for good: `vmdr own --force`"
        }
        Phase::Over => "the guest is owned by this host again: `vmdr reprotect` protects it",
    }
}
