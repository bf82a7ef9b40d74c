//! The JSON documents that `-o json` writes: one per command, described in `docs/cli.md`.
//!
//! [`VERSION`] rises when a field goes away or changes its meaning; fields may be added without that. `null` means
//! "not known, or does not apply". Units are last in names; times are UTC.

pub mod cold;
pub mod group;

use serde::Serialize;
use vmdr_proto::control;

use crate::client::Daemon;
use crate::failure::Failure;
use crate::text;

/// Version of all documents.
pub const VERSION: u32 = 1;

#[derive(Serialize)]
struct Document<'a, T> {
    version: u32,
    kind: &'a str,
    #[serde(flatten)]
    body: T,
}

/// A document as text, its last line ended.
pub fn document(kind: &str, body: impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(&Document { version: VERSION, kind, body })
        .map(|text| text + "\n")
        .map_err(|e| Failure::Failed(format!("cannot write JSON: {e}")))
}

/// One finding of a check.
#[derive(Serialize)]
pub struct Finding {
    severity: &'static str,
    subject: String,
    fact: String,
    remedy: Option<String>,
}

impl From<&control::Finding> for Finding {
    fn from(finding: &control::Finding) -> Finding {
        Finding {
            severity: severity(finding),
            subject: finding.subject.clone(),
            fact: finding.fact.clone(),
            remedy: (!finding.remedy.is_empty()).then(|| finding.remedy.clone()),
        }
    }
}

/// The word for a severity. One that this version does not know is a refusal: better too careful.
pub fn severity(finding: &control::Finding) -> &'static str {
    match control::Severity::try_from(finding.severity) {
        Ok(control::Severity::Ok) => "ok",
        Ok(control::Severity::Warning) => "warning",
        Ok(control::Severity::Refused) | Err(_) => "refused",
    }
}

/// `doctor`.
#[derive(Serialize)]
pub struct Doctor {
    /// None: the host alone.
    pub domain: Option<String>,
    /// Whether nothing is refused.
    pub ok: bool,
    /// As the agent ordered them.
    pub findings: Vec<Finding>,
}

/// `audit`.
#[derive(Serialize)]
pub struct Audit {
    /// As they stand in the logs.
    pub records: Vec<serde_json::Value>,
}

/// `audit verify`.
#[derive(Serialize)]
pub struct AuditVerify<'a> {
    /// Whether all are whole.
    pub ok: bool,
    /// One for each daemon.
    pub logs: &'a [AuditVerdict],
}

/// A daemon's log.
#[derive(Serialize)]
pub struct AuditVerdict {
    /// `agent` or `receiver`.
    pub daemon: String,
    /// Good ones, up to the first fault.
    pub records: u64,
    /// Number of the last good one.
    pub last: u64,
    /// Its hash.
    pub hash: String,
    /// The first line that is wrong, and why.
    pub fault: Option<String>,
}

/// `pair`, on the host that shows the token.
#[derive(Serialize)]
pub struct Token {
    /// To be typed on the other.
    pub token: String,
    /// UTC.
    pub expires_at: String,
}

/// A peer, of `pair`, `peers` and `peers revoke`.
#[derive(Serialize)]
pub struct Peer {
    id: String,
    name: String,
    trusted: bool,
    paired_unix: u64,
    revoked_unix: Option<u64>,
    authority_until_unix: u64,
    addresses: Vec<String>,
    connections: u32,
}

impl From<&vmdr_proto::host::Peer> for Peer {
    fn from(peer: &vmdr_proto::host::Peer) -> Peer {
        Peer {
            id: peer.id.clone(),
            name: peer.name.clone(),
            trusted: peer.revoked_unix == 0,
            paired_unix: peer.paired_unix,
            revoked_unix: (peer.revoked_unix > 0).then_some(peer.revoked_unix),
            authority_until_unix: peer.expires_unix,
            addresses: peer.addresses.clone(),
            connections: peer.connections,
        }
    }
}

/// `peers`.
#[derive(Serialize)]
pub struct Peers {
    /// This host's own.
    pub id: String,
    /// UTC.
    pub certificate_until: String,
    /// UTC.
    pub authority_until: String,
    /// By name.
    pub peers: Vec<Peer>,
    /// What ends soon.
    pub notices: Vec<String>,
}

/// `peers rotate`.
#[derive(Serialize)]
pub struct Rotated {
    /// UTC.
    pub certificate_until: String,
}

/// `peers grant`.
#[derive(Serialize)]
pub struct Grant {
    /// As typed.
    pub domain: String,
    /// Name and id; empty: nobody.
    pub owner: String,
    /// Others.
    pub granted: Vec<String>,
}

/// `prepare`.
#[derive(Serialize)]
pub struct Prepare {
    /// As typed.
    pub domain: String,
    /// Whether the persistent XML was changed.
    pub changed: bool,
    /// Whether the running guest has no socket yet.
    pub restart_needed: bool,
    /// Path.
    pub qmp_socket: String,
}

/// `protect`.
#[derive(Serialize)]
pub struct Protect {
    /// As typed.
    pub domain: String,
    /// Always true: otherwise there is no document.
    pub protected: bool,
    /// What the agent said on the way.
    pub messages: Vec<String>,
}

/// `hold`.
#[derive(Serialize)]
pub struct Hold {
    /// As typed.
    pub domain: String,
    /// Always true: otherwise there is no document.
    pub held: bool,
    /// What the receiver has: the guest stands where this epoch was cut.
    pub epoch: u64,
}

/// `release`.
#[derive(Serialize)]
pub struct Release {
    /// As typed.
    pub domain: String,
    /// Always false: otherwise there is no document.
    pub held: bool,
}

/// `suspend`.
#[derive(Serialize)]
pub struct Suspend {
    /// As typed.
    pub domain: String,
    /// Always true: otherwise there is no document.
    pub suspended: bool,
    /// The recovery point that stays at the receiver.
    pub epoch: u64,
}

/// `resume`.
#[derive(Serialize)]
pub struct Resume {
    /// As typed.
    pub domain: String,
    /// Always false: otherwise there is no document.
    pub suspended: bool,
}

/// `unprotect`.
#[derive(Serialize)]
pub struct Unprotect {
    /// Its name.
    pub domain: String,
    /// Always false: otherwise there is no document.
    pub protected: bool,
}

/// `status`.
#[derive(Serialize)]
pub struct Status {
    /// Sorted by name, the agent's before the receiver's.
    pub domains: Vec<DomainStatus>,
    /// Daemons that are configured here and did not answer.
    pub unreachable: Vec<String>,
    /// About this host: certificates that end soon, an audit log that cannot be written.
    pub notices: Vec<String>,
    /// Of the recovery plan, and those that were activated here.
    pub groups: Vec<group::Group>,
}

/// One domain as one daemon sees it.
#[derive(Serialize)]
pub struct DomainStatus {
    pub(crate) daemon: &'static str,
    pub(crate) name: String,
    uuid: String,
    role: String,
    state: String,
    since: Option<String>,
    owner: Option<String>,
    generation: u64,
    epoch: u64,
    durable_epoch: u64,
    rpo_seconds: Option<f64>,
    rpo_worst_hour_seconds: Option<f64>,
    pause_p50_seconds: Option<f64>,
    pause_p99_seconds: Option<f64>,
    paused_ratio: Option<f64>,
    dirty_pages_per_epoch: Option<f64>,
    bytes_per_epoch: Option<f64>,
    link_bytes_per_second: Option<f64>,
    interval_ms: Option<u32>,
    monitor: Option<String>,
    limited_by: Option<String>,
    guest_tools: Option<String>,
    guest_clock_offset_seconds: Option<f64>,
    application: Option<Application>,
    peer: Option<String>,
    belongs_to: Option<String>,
    granted: Vec<String>,
    stored_bytes: Option<u64>,
    points: Option<u64>,
    history_bytes: Option<u64>,
    history_budget_bytes: Option<u64>,
    verifying: Option<String>,
    verified: Option<String>,
    damaged_points: Option<u64>,
    damage: Option<String>,
    drill: Option<Drill>,
    alarm: Option<String>,
    silent: Option<String>,
    silent_seconds: Option<f64>,
    failover: Option<Failover>,
    exported: Option<cold::Exported>,
    last_error: Option<String>,
    advice: Option<String>,
}

/// Of a domain that its backup site takes by itself.
#[derive(Serialize)]
pub struct Failover {
    stance: String,
    lease_seconds: Option<f64>,
    message: String,
}

impl From<&control::FailoverStatus> for Failover {
    fn from(status: &control::FailoverStatus) -> Self {
        Self {
            stance: status.stance.clone(),
            lease_seconds: (status.lease_seconds > 0.0).then_some(status.lease_seconds),
            message: text::one_line(&status.message),
        }
    }
}

/// Application-consistent points of a domain.
#[derive(Serialize)]
pub struct Application {
    every_seconds: Option<u64>,
    cut: Option<String>,
    frozen_seconds: Option<f64>,
    error: Option<String>,
}

impl Application {
    /// Nothing where none was ever asked for.
    fn new(status: &control::DomainStatus) -> Option<Application> {
        let made = status.application_cut_unix_ns > 0;
        let error = (!status.application_error.is_empty()).then(|| status.application_error.clone());
        (made || error.is_some() || status.application_every_seconds > 0).then(|| Application {
            every_seconds: (status.application_every_seconds > 0).then_some(status.application_every_seconds),
            cut: text::instant(status.application_cut_unix_ns),
            frozen_seconds: made.then_some(status.application_frozen_seconds),
            error,
        })
    }
}

/// Whether an RPO can be told: there is a recovery point, and the guest does not run here from it.
pub fn has_rpo(status: &control::DomainStatus) -> bool {
    let point = status.durable_epoch > 0 || (status.role != "protected" && status.epoch > 0);
    point && status.role != "active"
}

impl DomainStatus {
    /// What a daemon says, with "does not apply" told apart from 0.
    pub fn new(daemon: Daemon, status: &control::DomainStatus) -> DomainStatus {
        let word = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let rpo = |seconds: f64| has_rpo(status).then_some(seconds).filter(|s| s.is_finite());
        // Only the protected side pauses a guest, and only after its first cut is there a figure.
        let cutting = |value: f64| (status.pause_p50_seconds > 0.0).then_some(value).filter(|v| v.is_finite());
        let verify = status.verify.clone().unwrap_or_default();
        DomainStatus {
            daemon: match daemon {
                Daemon::Agent => "agent",
                Daemon::Receiver => "receiver",
            },
            name: status.name.clone(),
            uuid: status.uuid.clone(),
            role: status.role.clone(),
            state: status.state.clone(),
            since: text::instant(status.since_unix_ns),
            owner: word(&status.owner),
            generation: status.generation,
            epoch: status.epoch,
            durable_epoch: status.durable_epoch,
            rpo_seconds: rpo(status.rpo_seconds),
            rpo_worst_hour_seconds: rpo(status.rpo_worst_hour_seconds),
            pause_p50_seconds: cutting(status.pause_p50_seconds),
            pause_p99_seconds: cutting(status.pause_p99_seconds),
            paused_ratio: cutting(status.paused_ratio),
            dirty_pages_per_epoch: (status.role != "active").then_some(status.dirty_pages_per_epoch),
            bytes_per_epoch: (status.role != "active").then_some(status.bytes_per_epoch),
            link_bytes_per_second: (status.role != "active").then_some(status.link_bytes_per_second),
            interval_ms: (status.interval_ms > 0).then_some(status.interval_ms),
            monitor: word(&status.monitor),
            limited_by: word(&status.limited_by),
            guest_tools: word(&status.guest_tools),
            guest_clock_offset_seconds: status.guest_clock_offset_seconds,
            application: Application::new(status),
            peer: word(&status.peer),
            belongs_to: word(&status.belongs_to),
            granted: status.granted.iter().map(|peer| text::one_line(peer)).collect(),
            stored_bytes: (daemon == Daemon::Receiver).then_some(status.stored_bytes),
            points: (daemon == Daemon::Receiver).then_some(status.points),
            history_bytes: (daemon == Daemon::Receiver).then_some(status.history_bytes),
            history_budget_bytes: (daemon == Daemon::Receiver).then_some(status.history_budget_bytes),
            verifying: word(&verify.doing),
            verified: text::instant(verify.verified_unix_ns),
            damaged_points: (daemon == Daemon::Receiver).then_some(verify.damaged_points),
            damage: word(&verify.damage),
            drill: status.drill.as_ref().map(Drill::from),
            alarm: word(&status.alarm),
            silent: word(&status.silent),
            silent_seconds: (!status.silent.is_empty()).then_some(status.silent_seconds),
            failover: status.failover.as_ref().map(Failover::from),
            exported: cold::Exported::new(status),
            last_error: word(&status.last_error),
            advice: word(&status.advice),
        }
    }
}

/// `points`.
#[derive(Serialize)]
pub struct Points {
    domain: String,
    /// As the receiver ordered them.
    points: Vec<Point>,
    retention: Option<RetentionPolicy>,
}

impl Points {
    /// What the receiver said.
    pub fn new(domain: &str, reply: &control::PointsReply) -> Points {
        Points {
            domain: domain.to_owned(),
            points: reply.points.iter().map(Point::from).collect(),
            retention: reply.retention.as_ref().map(|retention| RetentionPolicy::new(domain, retention)),
        }
    }
}

/// A recovery point.
#[derive(Serialize)]
pub struct Point {
    id: String,
    generation: u64,
    epoch: u64,
    cut: Option<String>,
    cut_unix_ms: Option<u64>,
    consistency: String,
    bytes: u64,
    pinned: bool,
    newest: bool,
    names: Vec<String>,
    verified: Option<String>,
    damaged: bool,
}

impl From<&control::Point> for Point {
    fn from(point: &control::Point) -> Point {
        Point {
            id: point.id.clone(),
            generation: point.generation,
            epoch: point.epoch,
            cut: text::instant(point.cut_unix_ns),
            cut_unix_ms: (point.cut_unix_ns > 0).then_some(point.cut_unix_ns / 1_000_000),
            consistency: point.consistency.clone(),
            bytes: point.bytes,
            pinned: point.pinned,
            newest: point.newest,
            names: point.names.clone(),
            verified: text::instant(point.verified_unix_ns),
            damaged: point.damaged,
        }
    }
}

/// `verify`.
#[derive(Serialize)]
pub struct Verification {
    domain: String,
    /// Else it has only begun.
    ended: bool,
    sound: Vec<String>,
    damaged: Vec<String>,
    damage: Vec<String>,
    bytes: Option<u64>,
}

impl Verification {
    /// What the receiver said.
    pub fn new(domain: &str, report: &control::VerifyReport) -> Verification {
        Verification {
            domain: domain.to_owned(),
            ended: report.ended,
            sound: report.sound.clone(),
            damaged: report.damaged.clone(),
            damage: report.damage.clone(),
            bytes: report.ended.then_some(report.bytes),
        }
    }
}

/// `point create`, `point release`.
#[derive(Serialize)]
pub struct NamedPoint {
    domain: String,
    name: String,
    /// Whether it has the name now.
    pinned: bool,
    point: Point,
    /// How it was made, with `--application`.
    application: Option<Made>,
}

/// How an application-consistent point was made.
#[derive(Serialize)]
pub struct Made {
    frozen_seconds: f64,
    file_systems: u32,
    way: String,
    note: Option<String>,
}

impl NamedPoint {
    /// What the agent said of one that it has made.
    pub fn made(domain: &str, name: &str, point: &control::Point, made: &control::ApplicationPoint) -> NamedPoint {
        let made = Made {
            frozen_seconds: made.frozen_seconds,
            file_systems: made.file_systems,
            way: made.way.clone(),
            note: (!made.note.is_empty()).then(|| made.note.clone()),
        };
        NamedPoint { application: Some(made), ..NamedPoint::new(domain, name, true, point) }
    }

    /// What the receiver said of a point.
    pub fn new(domain: &str, name: &str, pinned: bool, point: &control::Point) -> NamedPoint {
        let (domain, name) = (domain.to_owned(), name.to_owned());
        NamedPoint { domain, name, pinned, point: Point::from(point), application: None }
    }
}

/// `retention`.
#[derive(Serialize)]
pub struct RetentionPolicy {
    domain: String,
    budget_bytes: u64,
    history_bytes: u64,
    alarm: Option<String>,
    tiers: Vec<Tier>,
}

#[derive(Serialize)]
struct Tier {
    every_seconds: u64,
    for_seconds: u64,
}

impl RetentionPolicy {
    /// What the receiver said.
    pub fn new(domain: &str, reply: &control::RetentionReply) -> RetentionPolicy {
        let policy = reply.retention.clone().unwrap_or_default();
        let tier = |t: &control::RetentionTier| Tier { every_seconds: t.every_seconds, for_seconds: t.for_seconds };
        RetentionPolicy {
            domain: domain.to_owned(),
            budget_bytes: policy.budget_bytes,
            history_bytes: reply.history_bytes,
            alarm: (!reply.alarm.is_empty()).then(|| reply.alarm.clone()),
            tiers: policy.tiers.iter().map(tier).collect(),
        }
    }
}

/// What going back to an older point gives up.
#[derive(Serialize)]
pub struct GivenUp {
    epochs: u64,
    disk_bytes: u64,
    seconds: f64,
}

impl From<&control::GivenUp> for GivenUp {
    fn from(given: &control::GivenUp) -> GivenUp {
        GivenUp { epochs: given.epochs, disk_bytes: given.disk_bytes, seconds: given.seconds }
    }
}

/// What an activation would do: `activate --dry-run`, and part of `activate`.
#[derive(Serialize)]
pub struct Plan {
    name: String,
    uuid: String,
    /// Whether nothing is refused.
    ok: bool,
    already_active: bool,
    point: Option<Point>,
    lost_seconds: f64,
    given_up: Option<GivenUp>,
    steps: Vec<String>,
    mapping: Vec<Mapped>,
    findings: Vec<Finding>,
}

impl From<&control::ActivationPlan> for Plan {
    fn from(plan: &control::ActivationPlan) -> Plan {
        Plan {
            name: plan.name.clone(),
            uuid: plan.uuid.clone(),
            ok: plan.findings.iter().all(|finding| severity(finding) != "refused"),
            already_active: plan.already_active,
            point: plan.point.as_ref().map(Point::from),
            lost_seconds: plan.lost_seconds,
            given_up: plan.given_up.as_ref().map(GivenUp::from),
            steps: plan.steps.clone(),
            mapping: mapping(&plan.mapping),
            findings: plan.findings.iter().map(Finding::from).collect(),
        }
    }
}

/// `activate --dry-run`.
#[derive(Serialize)]
pub struct DryRun {
    /// What would happen.
    pub plan: Plan,
}

/// `activate`.
#[derive(Serialize)]
pub struct Activation {
    /// What was to happen.
    pub plan: Plan,
    /// What happened.
    pub report: Report,
}

/// What an activation did.
#[derive(Serialize)]
pub struct Report {
    name: String,
    uuid: String,
    generation: u64,
    was_active: bool,
    point: Option<Point>,
    rto_seconds: Option<f64>,
    lost_seconds: f64,
    given_up: Option<GivenUp>,
    mapping: Vec<Mapped>,
    hooks: Vec<HookRun>,
    announced: Vec<String>,
    network: Vec<Change>,
    dns: Vec<Change>,
    warnings: Vec<String>,
    failed: Option<String>,
    /// Of what is encrypted at rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    decrypted: Option<Decrypted>,
}

/// What it took to decrypt a point, within the RTO.
#[derive(Serialize)]
struct Decrypted {
    bytes: u64,
    seconds: f64,
}

impl From<&control::ActivationReport> for Report {
    fn from(report: &control::ActivationReport) -> Report {
        Report {
            name: report.name.clone(),
            uuid: report.uuid.clone(),
            generation: report.generation,
            was_active: report.was_active,
            point: report.point.as_ref().map(Point::from),
            rto_seconds: (!report.was_active).then_some(report.rto_seconds),
            lost_seconds: report.lost_seconds,
            given_up: report.given_up.as_ref().map(GivenUp::from),
            mapping: mapping(&report.mapping),
            hooks: report.hooks.iter().map(HookRun::from).collect(),
            announced: report.announced.clone(),
            network: report.network.iter().map(Change::from).collect(),
            dns: report.dns.iter().map(Change::from).collect(),
            warnings: report.warnings.clone(),
            failed: (!report.failed.is_empty()).then(|| report.failed.clone()),
            decrypted: (report.decrypted_bytes > 0)
                .then_some(Decrypted { bytes: report.decrypted_bytes, seconds: report.decrypt_seconds }),
        }
    }
}

/// `plan check`.
#[derive(Serialize)]
pub struct PlanCheck {
    /// As typed.
    pub file: String,
    /// Whether nothing is refused.
    pub ok: bool,
    /// Whether the receiver was asked: not with `--offline`, and not of a plan that makes no sense by itself.
    pub site_checked: bool,
    /// That the plan names.
    pub domains: Vec<String>,
    /// In the order of the text.
    pub findings: Vec<PlanFinding>,
}

/// Something found in a plan.
#[derive(Serialize)]
pub struct PlanFinding {
    severity: &'static str,
    line: Option<u32>,
    column: Option<u32>,
    message: String,
}

impl PlanFinding {
    /// With its severity as a word.
    pub fn new(severity: &'static str, finding: &control::PlanFinding) -> PlanFinding {
        let placed = finding.line > 0;
        PlanFinding {
            severity,
            line: placed.then_some(finding.line),
            column: placed.then_some(finding.column),
            message: finding.message.clone(),
        }
    }
}

/// A device that is somewhere else at this site.
#[derive(Serialize)]
pub struct Mapped {
    device: String,
    from: String,
    to: String,
}

fn mapping(mapped: &[control::Mapped]) -> Vec<Mapped> {
    let mapped = mapped.iter().cloned();
    mapped.map(|control::Mapped { device, from, to }| Mapped { device, from, to }).collect()
}

/// Something that a recovery plan changes, and what came of it.
#[derive(Serialize)]
pub struct Change {
    subject: String,
    done: Option<String>,
    error: Option<String>,
}

impl From<&control::Change> for Change {
    fn from(change: &control::Change) -> Change {
        let some = |text: &String| (!text.is_empty()).then(|| text.clone());
        Change { subject: change.subject.clone(), done: some(&change.done), error: some(&change.error) }
    }
}

/// A hook that was run.
#[derive(Serialize)]
pub struct HookRun {
    stage: String,
    command: String,
    seconds: f64,
    error: Option<String>,
}

impl From<&control::HookRun> for HookRun {
    fn from(ran: &control::HookRun) -> HookRun {
        HookRun {
            stage: ran.stage.clone(),
            command: ran.command.clone(),
            seconds: ran.seconds,
            error: (!ran.error.is_empty()).then(|| ran.error.clone()),
        }
    }
}

/// `drill`.
#[derive(Serialize)]
pub struct DrillDocument {
    name: String,
    uuid: String,
    /// How it went.
    drill: Drill,
}

impl DrillDocument {
    /// What the receiver said.
    pub fn new(report: &control::DrillReport) -> DrillDocument {
        DrillDocument { name: report.name.clone(), uuid: report.uuid.clone(), drill: Drill::from(report) }
    }
}

/// How a drill went, or goes.
#[derive(Serialize)]
pub struct Drill {
    id: String,
    /// `under way`, `passed`, `failed` or `ended` (before its time, for no fault of the copy).
    result: String,
    error: Option<String>,
    point: Option<String>,
    cut: Option<String>,
    started: Option<String>,
    ended: Option<String>,
    age_seconds: f64,
    scheduled: bool,
    kept: bool,
    copy_seconds: f64,
    rto_seconds: Option<f64>,
    copied_bytes: u64,
    shared_bytes: u64,
    checks: Vec<Check>,
    /// The copy, as long as it is there.
    copy_name: Option<String>,
    copy_uuid: Option<String>,
    bridges: Vec<String>,
}

/// What came of a check.
#[derive(Serialize)]
pub struct Check {
    check: String,
    passed: bool,
    said: String,
    seconds: f64,
}

impl From<&control::DrillReport> for Drill {
    fn from(report: &control::DrillReport) -> Drill {
        let word = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let check = |check: &control::DrillCheck| Check {
            check: check.check.clone(),
            passed: check.passed,
            said: check.said.clone(),
            seconds: check.seconds,
        };
        Drill {
            id: report.id.clone(),
            result: report.result.clone(),
            error: word(&report.error),
            point: word(&report.point),
            cut: text::instant(report.cut_unix_ns),
            started: text::instant(report.started_unix_ns),
            ended: text::instant(report.ended_unix_ns),
            age_seconds: report.age_seconds,
            scheduled: report.scheduled,
            kept: report.kept,
            copy_seconds: report.copy_seconds,
            rto_seconds: (report.rto_seconds > 0.0).then_some(report.rto_seconds),
            copied_bytes: report.copied_bytes,
            shared_bytes: report.shared_bytes,
            checks: report.checks.iter().map(check).collect(),
            copy_name: word(&report.copy_name),
            copy_uuid: word(&report.copy_uuid),
            bridges: report.bridges.clone(),
        }
    }
}

/// `forget`.
#[derive(Serialize)]
pub struct Forget {
    /// As typed.
    pub domain: String,
    /// Space that is free again.
    pub freed_bytes: u64,
}
