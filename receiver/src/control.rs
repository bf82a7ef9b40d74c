//! What the `vmdr` command asks of the receiver.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;
use vmdr_daemon::ownership::{Event, Ownerships};
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::xml::Element;
use vmdr_proto::control::receiver_server::Receiver as Service;
use vmdr_proto::control::{
    ActivateRequest, ActivationPlan, ActivationReport, CheckPlanReply, CheckPlanRequest, ColdListReply,
    ColdListRequest, DivergenceReply, DivergenceRequest, DomainRequest, DomainStatus, DrillReport, DrillRequest,
    ExportRequest, ForgetReply, GivenUp, GrantReply, GrantRequest, GroupPlan, GroupReport, GroupRequest, GroupsReply,
    GroupsRequest, HookRun, ImportRequest, Point, PointRequest, PointsReply, Progress, RetentionReply,
    RetentionRequest, StatusReply, StatusRequest, VerifyReport, VerifyRequest, VerifyStatus,
};
use vmdr_proto::replication::RefusedCode;

use crate::access;
use crate::activate::clear;
use crate::activate::files::remove_tree;
use crate::activate::host::{Host, LocalHost};
use crate::activate::memory::{self, Memory};
use crate::activate::record::ActiveDirectory;
use crate::activate::record::{PointId, RecordError, Step};
use crate::activate::run::{Activated, Activation, Standby, age_seconds, unix_ns};
use crate::activate::thaw;
use crate::activate::{ActivateError, Settings, findings, plan};
use crate::cold;
use crate::daemon::Receiver;
use crate::drill;
use crate::failover;
use crate::group;
use crate::history;
use crate::recovery::applied::{Applied, Outcome};
use crate::recovery::guest;
use crate::recovery::site;
use crate::reverse::divergence;
use crate::store::{DomainSummary, PointId as StoredPoint, RecoveryPoint, Store, StoreError};

/// Messages to a client that does not read; an activation does not wait for it.
const PROGRESS_MAX: usize = 64;

/// The service.
pub struct ControlService {
    receiver: Arc<Receiver>,
}

impl ControlService {
    /// For this receiver.
    pub fn new(receiver: Arc<Receiver>) -> Self {
        ControlService { receiver }
    }

    /// Runs something that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Receiver>) -> Result<T, Status> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let receiver = Arc::clone(&self.receiver);
        let done = tokio::task::spawn_blocking(move || work(&receiver)).await;
        done.map_err(|e| Status::internal(format!("the request ended by itself: {e}")))?.map(Response::new)
    }
}

pub(crate) fn store_status(error: &StoreError) -> Status {
    let message = error.to_string();
    match error {
        StoreError::Unknown(_) | StoreError::NoPoint(_) | StoreError::NoSuchPoint { .. } => Status::not_found(message),
        StoreError::BadUuid(_) => Status::invalid_argument(message),
        StoreError::Flawed { .. } | StoreError::Sealed { .. } => Status::failed_precondition(message),
        StoreError::Busy { .. } | StoreError::Frozen(_) | StoreError::Fenced { .. } | StoreError::Refused { .. } => {
            Status::failed_precondition(message)
        }
        _ if error.code() == RefusedCode::Full => Status::resource_exhausted(message),
        _ => Status::internal(message),
    }
}

pub(crate) fn activate_status(error: &ActivateError) -> Status {
    let message = error.to_string();
    match error {
        ActivateError::Store(error) => store_status(error),
        ActivateError::Refused { .. } | ActivateError::HasRun { .. } => Status::failed_precondition(message),
        ActivateError::Hypervisor(error) if error.is_connection() => Status::unavailable(message),
        _ => Status::internal(message),
    }
}

/// The stored domain of this name or UUID.
pub(crate) fn find(receiver: &Receiver, wanted: &str) -> Result<(Uuid, DomainSummary), Status> {
    if wanted.is_empty() {
        return Err(Status::invalid_argument("no domain is named: give a name or a UUID"));
    }
    let domains = receiver.store.domains();
    let by_uuid = Uuid::parse_str(wanted).ok().map(|u| u.to_string());
    let mut found: Vec<_> =
        domains.into_iter().filter(|d| Some(&d.uuid) == by_uuid.as_ref() || d.name == wanted).collect();
    // Names are the peers' own: none can stand in the way of another's UUID.
    if found.iter().any(|d| Some(&d.uuid) == by_uuid.as_ref()) {
        found.retain(|d| Some(&d.uuid) == by_uuid.as_ref());
    }
    if found.len() > 1 {
        let uuids = found.iter().map(|d| d.uuid.as_str()).collect::<Vec<_>>().join(", ");
        return Err(Status::failed_precondition(format!("several domains are named {wanted:?}: give one of {uuids}")));
    }
    let summary = found.pop().ok_or_else(|| {
        Status::not_found(format!("nothing is stored here of {wanted:?}; `vmdr status` lists what is"))
    })?;
    let uuid = Uuid::parse_str(&summary.uuid).map_err(|e| Status::internal(format!("{}: {e}", summary.uuid)))?;
    Ok((uuid, summary))
}

/// The same, with the name that it has for sure: a domain that is busy when it is looked for, or could not be opened, is listed
/// without one, and the recovery plan goes by names.
pub(crate) fn find_named(receiver: &Receiver, wanted: &str) -> Result<(Uuid, String), Status> {
    let (uuid, summary) = find(receiver, wanted)?;
    if !summary.name.is_empty() {
        return Ok((uuid, summary.name));
    }
    let point = receiver.store.recovery_point(&summary.uuid).map_err(|e| store_status(&e))?;
    Ok((uuid, point.name))
}

fn domain_status(receiver: &Receiver, domain: DomainSummary) -> DomainStatus {
    let uuid = Uuid::parse_str(&domain.uuid).unwrap_or_default();
    let now = receiver.seconds();
    let exported = cold::export::record(&receiver.domain_directory(uuid)).filter(|r| r.exported_unix_ns > 0);
    let age = (domain.position.epoch > 0).then(|| age_seconds(domain.cut_unix_ns, unix_ns(SystemTime::now())));
    let record = receiver.active_directory(uuid).read(uuid);
    let active = matches!(&record, Ok(Some(r)) if matches!(r.step, Step::Running { .. }));
    // The stream of an active domain is history.
    let (figures, peer, mut last_error) = receiver.session(uuid, |session| {
        if let Some(age) = age.filter(|_| !domain.frozen) {
            session.stats.age(now, age);
        }
        (session.stats.figures(now), session.peer.clone(), session.last_error.clone())
    });
    if active {
        last_error.clear();
    }
    if let Some(trouble) = &domain.trouble {
        last_error.clone_from(trouble);
    } else if let Err(error) = &record {
        last_error = error.to_string();
    } else if let Some(damage) = &domain.damage {
        last_error = format!("the standby is damaged: {damage}");
    }
    let name = if domain.name.is_empty() { &domain.uuid } else { &domain.name };
    let (state, advice) = if active {
        (
            "active",
            format!("it runs here; `vmdr reprotect {name}` protects it to where it ran before, if it is not yet"),
        )
    } else if domain.trouble.is_some() && domain.position.epoch == 0 {
        ("failed", "see the receiver's log".to_owned())
    } else if domain.frozen {
        ("fenced", format!("an activation was begun and has not ended: `vmdr activate {name}` goes on with it"))
    } else if domain.position.epoch == 0 {
        let wait =
            if domain.receiving { "wait for the first copy to end" } else { "no agent is connected: look there" };
        ("seeding", wait.to_owned())
    } else if domain.receiving && domain.damage.is_some() {
        ("ready", "the agent sends what is damaged again; older points may be sound: see `vmdr points`".to_owned())
    } else if domain.receiving {
        ("ready", String::new())
    } else if domain.damage.is_some() {
        let advice =
            "the newest point is damaged: see `vmdr points` for older ones, or connect the agent, which mends it";
        ("ready", advice.to_owned())
    } else {
        ("ready", format!("no agent is connected; if its host is lost: `vmdr activate {name}`"))
    };
    let silent = receiver.silence.alarm(&domain, &last_error);
    let hindered = receiver.failover.troubles().contains_key(&uuid);
    let rest = receiver.silence.rest(uuid).filter(|_| state == "ready" && !domain.receiving);
    let advice = match (&silent, rest) {
        _ if hindered => {
            format!("put right what keeps it from being taken, or `vmdr activate {name}`, which does not wait for it")
        }
        (Some(_), _) => format!(
            "find out whether its host is lost; if it is: `vmdr activate {name}`. If its protection was ended on purpose: \
             `vmdr forget {name}`"
        ),
        (None, Some(why)) => format!("its agent does not send: {why}"),
        (None, None) => advice,
    };
    let file = receiver.config.plan.as_deref();
    let unfit = if active { String::new() } else { receiver.watched.advice(file, &domain.name, &domain.uuid) };
    let advice = [unfit, advice].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
    let summing = domain.unsummed.map(|(done, all)| {
        let percent = done.saturating_mul(100).checked_div(all).unwrap_or(0);
        format!("checksums of the standby are being made: {percent} %")
    });
    let verify = VerifyStatus {
        doing: receiver.verifier.doing(&domain.uuid).or(summing).unwrap_or_default(),
        verified_unix_ns: domain.verified_unix_ns.unwrap_or(0),
        damaged_points: domain.damaged_points,
        damage: domain.damage.clone().unwrap_or_default(),
    };
    // A domain whose control record is damaged has its name from the activation, if there was one.
    let recorded = record.ok().flatten().map(|r| r.name);
    let name = if domain.name.is_empty() { recorded.unwrap_or_default() } else { domain.name };
    let last_drill = drill::wire::newest(receiver, uuid, &name);
    let owner = receiver.ownerships.get(&domain.uuid).ok().flatten();
    let access = receiver.store.access(&domain.uuid).unwrap_or_default();
    DomainStatus {
        owner: owner.map(|owner| owner.describe()).unwrap_or_default(),
        name,
        uuid: domain.uuid,
        role: if active { "active" } else { "standby" }.to_owned(),
        state: state.to_owned(),
        generation: domain.position.generation,
        epoch: domain.position.epoch,
        durable_epoch: domain.position.epoch,
        rpo_seconds: age.unwrap_or(0.0),
        rpo_worst_hour_seconds: figures.rpo_worst_hour_seconds.max(age.unwrap_or(0.0)),
        dirty_pages_per_epoch: figures.dirty_pages_per_epoch,
        bytes_per_epoch: figures.bytes_per_epoch,
        link_bytes_per_second: figures.link_bytes_per_second,
        last_error,
        peer,
        advice,
        stored_bytes: domain.stored_bytes,
        history_bytes: domain.history_bytes,
        history_budget_bytes: domain.history_budget_bytes,
        points: domain.points,
        alarm: domain.alarm.unwrap_or_default(),
        verify: Some(verify),
        drill: last_drill,
        belongs_to: access.owner.map(|id| receiver.peer_shown(&id)).unwrap_or_default(),
        granted: access.granted.iter().map(|id| receiver.peer_shown(id)).collect(),
        exported_unix_ns: exported.as_ref().map_or(0, |record| record.exported_unix_ns),
        exported_point: exported.map(|record| record.point).unwrap_or_default(),
        silent: silent.as_ref().map(|silent| silent.sentence.clone()).unwrap_or_default(),
        silent_seconds: silent.map_or(0.0, |silent| silent.seconds),
        export_error: receiver.cold.exported(uuid).error,
        failover: receiver.failover.status(receiver, uuid),
        ..DomainStatus::default()
    }
}

/// Why a guest is activated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Somebody has asked for it.
    Asked,
    /// It was handed over, and this generation is in force because of that.
    HandedOver {
        /// See above.
        generation: u64,
    },
    /// Its host, which owned it in this generation, is silent.
    Silence {
        /// See above.
        generation: u64,
    },
}

/// The store, seen from an activation.
struct StoredStandby<'a> {
    store: &'a Store,
    uuid: Uuid,
    ownerships: &'a Ownerships,
    name: &'a str,
    /// Who is told that it is this site's.
    told: Option<&'a Receiver>,
    /// Also a point that is known to be damaged.
    damaged: bool,
}

impl Standby for StoredStandby<'_> {
    fn generation(&self) -> Result<u64, ActivateError> {
        Ok(self.store.position(&self.uuid.to_string())?.generation)
    }

    fn fence(&self, to: u64) -> Result<(), ActivateError> {
        let uuid = self.uuid.to_string();
        self.store.raise_generation(&uuid, to)?;
        self.store.set_frozen(&uuid, true)?;
        // Before libvirt is asked to start anything: its hook looks there.
        self.ownerships.transition(&uuid, self.name, &Event::Activating(to), "activated here")?;
        if let Some(receiver) = self.told {
            failover::owned(receiver, self.uuid, to);
        }
        Ok(())
    }

    fn recovery_point(&self, point: Option<StoredPoint>) -> Result<RecoveryPoint, ActivateError> {
        Ok(self.store.recovery_point_at(&self.uuid.to_string(), point, self.damaged)?)
    }

    fn directory(&self) -> std::path::PathBuf {
        self.store.dir().join(self.uuid.to_string())
    }
}

pub(crate) fn connect(receiver: &Receiver) -> Result<LocalHost, Status> {
    LocalHost::connect(&receiver.config.libvirt_uri).map_err(|e| Status::unavailable(e.to_string()))
}

pub(crate) fn hypervisor_status(error: vmdr_hypervisor::Error) -> Status {
    activate_status(&ActivateError::Hypervisor(error))
}

pub(crate) fn make_plan(receiver: &Receiver, request: &ActivateRequest) -> Result<ActivationPlan, Status> {
    let (uuid, name) = find_named(receiver, &request.domain)?;
    let chosen = history::choose(&receiver.store, &uuid.to_string(), request)?;
    let settings = receiver.settings(&name, uuid);
    plan_with(receiver, (uuid, &name), (chosen, request.damaged), (&settings, &connect(receiver)?))
}

/// The plan for one of a domain's points; `damaged`: also for one that is known to be.
fn plan_with(
    receiver: &Receiver,
    (uuid, name): (Uuid, &str),
    (chosen, damaged): (Option<StoredPoint>, bool),
    (settings, host): (&Settings, &LocalHost),
) -> Result<ActivationPlan, Status> {
    let (store, id) = (&receiver.store, uuid.to_string());
    let standby = StoredStandby { store, uuid, ownerships: &receiver.ownerships, name, told: None, damaged };
    let active = receiver.active_directory(uuid);
    let record = active.read(uuid).map_err(|e| Status::internal(e.to_string()))?;
    let runs = host.guest(uuid).map_err(hypervisor_status)?.is_some_and(|g| g.state.is_active());
    if let Some(Step::Running { point, .. }) = record.as_ref().map(|r| &r.step)
        && !runs
    {
        let error = ActivateError::HasRun {
            name: name.to_owned(),
            point: format!("{}-{}", point.generation, point.epoch),
            directory: active.path().to_owned(),
        };
        return Err(activate_status(&error));
    }
    let point = standby.recovery_point(chosen).map_err(|e| activate_status(&e))?;
    let next = record.as_ref().map_or(1, |r| r.step.last_attempt() + 1);
    let stored = standby.generation().map_err(|e| activate_status(&e))?;
    let raised = record.map(|r| r.step.generation());
    let plan = plan::make(&point, &active.attempt(next), settings, host).map_err(|e| activate_status(&e))?;
    let mut steps = plan::steps(&plan, &point, stored, raised);
    if let Some(recovery) = &settings.mapping.plan {
        let run = |hook: &vmdr_plan::Hook| format!("run {}", hook.argv.value.join(" "));
        steps.splice(0..0, recovery.before.iter().map(run));
        if let Ok(original) = Element::parse(&point.domain_xml) {
            steps.extend(guest::steps(&guest::wanted(&original, recovery)));
        }
        if let (Some(dns), [_, ..]) = (&settings.mapping.dns, recovery.dns_names.as_slice()) {
            let names: Vec<&str> = recovery.dns_names.iter().map(|name| name.value.as_str()).collect();
            steps.push(format!("tell {} that {} is there", dns.server, names.join(", ")));
        }
        steps.extend(recovery.after.iter().map(run));
    }
    Ok(ActivationPlan {
        name: name.to_owned(),
        uuid: uuid.to_string(),
        point: Some(history::find(store, &id, StoredPoint { generation: point.generation, epoch: point.epoch })?),
        given_up: chosen.and_then(|chosen| given_up(store, &id, chosen)),
        lost_seconds: age_seconds(point.cut_unix_ns, unix_ns(SystemTime::now())),
        steps,
        mapping: settings.mapping.list(&plan.domain),
        findings: if runs { Vec::new() } else { plan.findings },
        already_active: runs,
    })
}

pub(crate) fn activate(
    receiver: &Arc<Receiver>,
    request: &ActivateRequest,
    requested: (Instant, u64),
    progress: &mut dyn FnMut(&str),
) -> Result<ActivationReport, Status> {
    activate_in(receiver, request, Cause::Asked, requested, progress)
}

/// The same for this cause, unless the domain has another generation by now than it had, or was to have.
pub(crate) fn activate_in(
    receiver: &Arc<Receiver>,
    request: &ActivateRequest,
    cause: Cause,
    requested: (Instant, u64),
    progress: &mut dyn FnMut(&str),
) -> Result<ActivationReport, Status> {
    let (uuid, name) = find_named(receiver, &request.domain)?;
    let (store, id) = (&receiver.store, uuid.to_string());
    let lock = receiver.activation_lock(uuid);
    let _one_at_a_time = match lock.try_lock() {
        Ok(guard) => guard,
        Err(_) => {
            progress("wait for another activation of it");
            lock.blocking_lock()
        }
    };
    still(receiver, uuid, &name, cause)?;
    let handed_over = matches!(cause, Cause::HandedOver { .. });
    drill::run::make_way(receiver, uuid, drill::run::MAKE_WAY_MAX, progress);
    let chosen = history::choose(store, &id, request)?;
    let host = connect(receiver)?;
    let standby = StoredStandby {
        store,
        uuid,
        ownerships: &receiver.ownerships,
        name: &name,
        told: (cause == Cause::Asked).then_some(&**receiver),
        damaged: request.damaged,
    };
    let settings = receiver.settings(&name, uuid);
    if let (true, Some(wrong)) = (handed_over, settings.mapping.trouble.first()) {
        // It has been handed over, and waits for this host: until the plan is in order again.
        return Err(Status::unavailable(format!("{}: {}", wrong.subject, wrong.fact)));
    }
    let (applied, ran_before) =
        apply_before(receiver, request, handed_over, (&settings, &host), (uuid, &name), chosen, progress)?;
    let activation = Activation {
        uuid,
        name: &name,
        standby: &standby,
        host: &host,
        settings: &settings,
        point: chosen,
        requested: requested.0,
        requested_unix_ns: requested.1,
    };
    let done = activation.run(progress);
    if let (Err(_), Some(applied)) = (&done, &applied) {
        applied.failed();
    }
    let done = done.map_err(|e| activate_status(&e))?;
    let Activated { name, point, generation, rto, lost_seconds, was_active, decrypted } = done;
    if let Some(rto) = rto {
        receiver.metrics.activations.fetch_add(1, Ordering::Relaxed);
        receiver.metrics.activation.observe(rto);
    }
    tracing::info!(domain = %name, %uuid, generation, ?rto, lost_seconds, was_active, "activated");
    // Not one that came here in another way.
    let mut outcome = Outcome::default();
    if let Some(point) = &point {
        thaw::begin(&receiver.config.libvirt_uri, uuid, &name);
        if let Some(applied) = applied.as_ref().filter(|applied| applied.is_noted()) {
            let id = stored_point(point).to_string();
            outcome = applied.after(&receiver.config.libvirt_uri, &host, &id, generation, progress);
        } else if !was_active {
            guest::tell_time(&receiver.config.libvirt_uri, uuid, &name);
        }
    }
    Ok(ActivationReport {
        name,
        mapping: applied.map(|applied| applied.list()).unwrap_or_default(),
        hooks: ran_before.into_iter().chain(outcome.hooks).collect(),
        announced: outcome.announced,
        network: outcome.network,
        dns: outcome.dns,
        warnings: outcome.warnings,
        failed: outcome.failed.unwrap_or_default(),
        uuid: uuid.to_string(),
        given_up: point
            .filter(|_| chosen.is_some() && !was_active)
            .and_then(|point| given_up(store, &id, stored_point(&point))),
        // One that is not kept any more has run here long ago.
        point: point.map(|point| {
            let PointId { generation, epoch, cut_unix_ns } = point;
            let found = history::find(store, &id, stored_point(&point)).ok();
            found.unwrap_or_else(|| Point {
                id: stored_point(&point).to_string(),
                generation,
                epoch,
                cut_unix_ns,
                consistency: "crash".to_owned(),
                ..Point::default()
            })
        }),
        rto_seconds: rto.map_or(0.0, |r| r.as_secs_f64()),
        lost_seconds,
        was_active,
        generation,
        decrypt_seconds: decrypted.map_or(0.0, |took| took.time.as_secs_f64()),
        decrypted_bytes: decrypted.map_or(0, |took| took.bytes),
    })
}

/// Whether a domain is where this cause has found it. One that is taken from a silent host comes into the very generation that the
/// witness has given to this site: that is recorded here, before anything is done.
fn still(receiver: &Receiver, uuid: Uuid, name: &str, cause: Cause) -> Result<(), Status> {
    let stored = receiver.store.position(&uuid.to_string()).map_err(|e| store_status(&e))?.generation;
    let aborted = || {
        let message = format!("domain {name} is in generation {stored} by now, and not activated because of {cause:?}");
        Err(Status::aborted(message))
    };
    let generation = match cause {
        Cause::Asked => return Ok(()),
        Cause::HandedOver { generation } if generation == stored => return Ok(()),
        Cause::HandedOver { .. } => return aborted(),
        Cause::Silence { generation } => generation + 1,
    };
    let internal = |error: RecordError| Status::internal(error.to_string());
    let active = receiver.active_directory(uuid);
    match active.read(uuid).map_err(internal)?.map(|record| record.step) {
        None | Some(Step::Planned { .. }) if stored + 1 == generation => {
            active.write(uuid, name, &Step::Planned { generation }).map_err(internal)
        }
        Some(step) if stored == generation && step.generation() == generation => Ok(()),
        _ => aborted(),
    }
}

/// The recovery plan, and what it has run before: once it is clear that nothing refuses the activation, and only if there will be
/// one.
fn apply_before<'a>(
    receiver: &Receiver,
    request: &ActivateRequest,
    handed_over: bool,
    (settings, host): (&'a Settings, &LocalHost),
    (uuid, name): (Uuid, &'a str),
    chosen: Option<StoredPoint>,
    progress: &mut dyn FnMut(&str),
) -> Result<(Option<Applied<'a>>, Vec<HookRun>), Status> {
    let Some(recovery) = &settings.mapping.plan else { return Ok((None, Vec::new())) };
    let point = receiver.store.recovery_point_at(&uuid.to_string(), chosen, request.damaged);
    let point = point.map_err(|e| store_status(&e))?;
    let original = Element::parse(&point.domain_xml);
    let original = original.map_err(|e| activate_status(&ActivateError::DomainXml(e.to_string())))?;
    let active = receiver.active_directory(uuid);
    let xml =
        DomainXml::from_element(&original).map_err(|e| activate_status(&ActivateError::DomainXml(e.to_string())))?;
    let boots = matches!(memory::choose(&xml, &point.ram), Ok(Memory::Off));
    let applied = Applied { uuid, name, mapping: &settings.mapping, original, active, boots };
    let runs = host.guest(uuid).map_err(hypervisor_status)?.is_some_and(|guest| guest.state.is_active());
    if runs {
        return Ok((Some(applied), Vec::new()));
    }
    // One that was handed over stands still already: it is better off with the addresses that it has.
    if !handed_over && let Some(why) = guest::refusal(&applied.original, recovery) {
        return Err(Status::failed_precondition(format!("{name} was not activated, nothing was changed: {why}")));
    }
    let mut ran = Vec::new();
    if !recovery.before.is_empty() {
        let wanted = plan_with(receiver, (uuid, name), (chosen, request.damaged), (settings, host))?;
        let reasons: Vec<String> = findings::refusals(&wanted.findings).map(|found| found.fact.clone()).collect();
        if !reasons.is_empty() {
            // Not left to the activation, which looks again: what has gone away by then must not leave the plan out.
            let refused = ActivateError::Refused { name: name.to_owned(), reasons: reasons.join(" | ") };
            return Err(activate_status(&refused));
        }
        let id = StoredPoint { generation: point.generation, epoch: point.epoch };
        let outcome = applied.before(&id.to_string(), progress);
        if let (Some(failed), true) = (&outcome.failed, handed_over) {
            // The guest is this host's already and stands still: it runs nowhere else.
            tracing::error!(%uuid, "{failed}; it was handed over, and is activated all the same");
        } else if let Some(failed) = outcome.failed {
            return Err(Status::failed_precondition(format!(
                "{name} was not activated, nothing was changed: {failed}"
            )));
        }
        ran = outcome.hooks;
    }
    if !applied.has_come_up() {
        applied.note().map_err(|e| Status::internal(format!("note what is to be done after: {e}")))?;
    }
    Ok((Some(applied), ran))
}

/// What going back to a point gives up; nothing where it is the newest.
fn given_up(store: &Store, id: &str, point: StoredPoint) -> Option<GivenUp> {
    store.given_up(id, point).ok().filter(|given| given.epochs > 0).map(Into::into)
}

fn stored_point(point: &PointId) -> StoredPoint {
    StoredPoint { generation: point.generation, epoch: point.epoch }
}

fn forget(receiver: &Arc<Receiver>, wanted: &str) -> Result<ForgetReply, Status> {
    let (uuid, summary) = find(receiver, wanted)?;
    let lock = receiver.activation_lock(uuid);
    let _one_at_a_time = lock.blocking_lock();
    let id = uuid.to_string();
    failover::may_forget(receiver, uuid, &summary.name)?;
    // What a drill has made lies beside what is deleted.
    drill::run::end(receiver, uuid, "the domain is forgotten").map_err(|error| {
        let name = &summary.name;
        Status::failed_precondition(format!(
            "a drill of {name} cannot be ended ({error}), and its files lie with what would be deleted: `vmdr drill {name} --end` first"
        ))
    })?;
    // A domain that cannot be opened may have been activated all the same.
    let activated = ActiveDirectory::of(&receiver.store.dir().join(&id)).path().exists();
    if summary.frozen || activated {
        // What is stored may be the disks of a guest that libvirt knows, whether it runs now or not.
        let host = connect(receiver)?;
        if host.guest(uuid).map_err(hypervisor_status)?.is_some() {
            let name = &summary.name;
            return Err(Status::failed_precondition(format!(
                "{name} was activated here and its disks are what would be deleted: end it and `virsh undefine {name}` first"
            )));
        }
        if summary.frozen {
            receiver.store.set_frozen(&id, false).map_err(|e| store_status(&e))?;
        }
    }
    // First: with the domain goes what leads there.
    forget_clear(receiver, uuid)?;
    let freed_bytes = receiver.store.forget(&id).map_err(|e| store_status(&e))?;
    receiver.forget_session(uuid);
    tracing::info!(domain = %summary.name, %uuid, freed_bytes, "forgotten");
    Ok(ForgetReply { freed_bytes })
}

/// Removes what lies in the clear of a domain that is encrypted at rest.
fn forget_clear(receiver: &Receiver, uuid: Uuid) -> Result<(), Status> {
    let remains = |what: &Path, error: &std::io::Error| {
        Status::failed_precondition(format!(
            "what of it lies in the clear in {} cannot be removed, and nothing is forgotten: {error}",
            what.display()
        ))
    };
    if let Some(files) = clear::linked(ActiveDirectory::of(&receiver.domain_directory(uuid)).path()) {
        // Where nothing is mounted nothing is found.
        let above = files.parent().unwrap_or(&files);
        std::fs::metadata(above).map_err(|error| remains(above, &error))?;
        remove_tree(&files).map_err(|error| remains(&files, &error))?;
    }
    match &receiver.config.encryption.clear_dir {
        Some(dir) => clear::sweep_drills(dir, uuid).map_err(|error| remains(dir, &error)),
        None => Ok(()),
    }
}

#[tonic::async_trait]
impl Service for ControlService {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let wanted = request.into_inner().domain;
        self.blocking(move |receiver| {
            let domains = if wanted.is_empty() { receiver.store.domains() } else { vec![find(receiver, &wanted)?.1] };
            let mut notices = receiver.troubles.clone();
            notices.extend(receiver.trust.notices());
            notices.extend(access::notices(receiver, &domains));
            let domains = domains.into_iter().map(|d| domain_status(receiver, d)).collect();
            let groups = if wanted.is_empty() { group::wire::all(receiver) } else { Vec::new() };
            Ok(StatusReply { domains, notices, groups })
        })
        .await
    }

    async fn points(&self, request: Request<DomainRequest>) -> Result<Response<PointsReply>, Status> {
        let wanted = request.into_inner().domain;
        self.blocking(move |receiver| {
            let (uuid, _) = find(receiver, &wanted)?;
            history::points(&receiver.store, &uuid.to_string())
        })
        .await
    }

    async fn plan_activation(&self, request: Request<ActivateRequest>) -> Result<Response<ActivationPlan>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| make_plan(receiver, &request)).await
    }

    async fn check_plan(&self, request: Request<CheckPlanRequest>) -> Result<Response<CheckPlanReply>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| site::answer(receiver, &request)).await
    }

    async fn create_point(&self, request: Request<PointRequest>) -> Result<Response<Point>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| {
            let (uuid, _) = find(receiver, &request.domain)?;
            history::create(&receiver.store, &uuid.to_string(), &request)
        })
        .await
    }

    async fn release_point(&self, request: Request<PointRequest>) -> Result<Response<Point>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| {
            let (uuid, _) = find(receiver, &request.domain)?;
            history::release(&receiver.store, &uuid.to_string(), &request.name)
        })
        .await
    }

    async fn retention(&self, request: Request<RetentionRequest>) -> Result<Response<RetentionReply>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| {
            let (uuid, _) = find(receiver, &request.domain)?;
            history::change_retention(&receiver.store, &uuid.to_string(), &request)
        })
        .await
    }

    type VerifyStream = ReceiverStream<Result<Progress, Status>>;

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let request = request.into_inner();
        let (messages, stream) = mpsc::channel(PROGRESS_MAX);
        self.blocking(move |receiver| {
            let (uuid, summary) = find(receiver, &request.domain)?;
            let uuid = uuid.to_string();
            if summary.frozen {
                let name = &summary.name;
                return Err(Status::failed_precondition(format!(
                    "{name} was activated here: its points stay as they are"
                )));
            }
            let scope = history::scope(&receiver.store, &uuid, &request)?;
            let waiter = request.wait.then(|| messages.clone());
            receiver.verifier.ask(&uuid, scope, waiter)?;
            if !request.wait {
                let verification = Some(VerifyReport::default());
                let begun = Progress { step: "verify".to_owned(), verification, ..Progress::default() };
                // The channel is new and has room.
                let _ = messages.try_send(Ok(begun));
            }
            Ok(())
        })
        .await?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ActivateStream = ReceiverStream<Result<Progress, Status>>;

    async fn activate(&self, request: Request<ActivateRequest>) -> Result<Response<Self::ActivateStream>, Status> {
        let requested = (Instant::now(), unix_ns(SystemTime::now()));
        let request = request.into_inner();
        let domain = request.domain.clone();
        if request.dry_run {
            return Err(Status::invalid_argument("a dry run is PlanActivation"));
        }
        let (messages, stream) = mpsc::channel(PROGRESS_MAX);
        let receiver = Arc::clone(&self.receiver);
        // Not ended with the client's interest: half an activation is worth nothing.
        tokio::task::spawn_blocking(move || {
            let mut progress = |step: &str| {
                tracing::info!(%domain, step, "activation");
                let _ = messages.try_send(Ok(Progress { step: step.to_owned(), ..Progress::default() }));
            };
            let last = match activate(&receiver, &request, requested, &mut progress) {
                Ok(report) => Ok(Progress { step: "run".to_owned(), activation: Some(report), ..Progress::default() }),
                Err(status) => {
                    receiver.metrics.activation_failures.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(%domain, "activation: {}", status.message());
                    Err(status)
                }
            };
            let _ = messages.blocking_send(last);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn divergence(&self, request: Request<DivergenceRequest>) -> Result<Response<DivergenceReply>, Status> {
        let DivergenceRequest { domain, drop } = request.into_inner();
        self.blocking(move |receiver| {
            let (uuid, _) = find(receiver, &domain)?;
            let lock = receiver.activation_lock(uuid);
            let _one_at_a_time = lock.blocking_lock();
            divergence::divergence(receiver, uuid, drop)
        })
        .await
    }

    type DrillStream = ReceiverStream<Result<Progress, Status>>;

    async fn drill(&self, request: Request<DrillRequest>) -> Result<Response<Self::DrillStream>, Status> {
        let request = request.into_inner();
        let (messages, stream) = mpsc::channel(PROGRESS_MAX);
        self.blocking(move |receiver| drill::wire::begin(receiver, &request, messages)).await?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn end_drill(&self, request: Request<DomainRequest>) -> Result<Response<DrillReport>, Status> {
        let wanted = request.into_inner().domain;
        self.blocking(move |receiver| drill::wire::end(receiver, &wanted)).await
    }

    async fn grant(&self, request: Request<GrantRequest>) -> Result<Response<GrantReply>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| access::grant(receiver, &request)).await
    }

    async fn forget(&self, request: Request<DomainRequest>) -> Result<Response<ForgetReply>, Status> {
        let wanted = request.into_inner().domain;
        self.blocking(move |receiver| forget(receiver, &wanted)).await
    }

    type ExportStream = ReceiverStream<Result<Progress, Status>>;

    async fn export(&self, request: Request<ExportRequest>) -> Result<Response<Self::ExportStream>, Status> {
        let ExportRequest { domain, point, prune } = request.into_inner();
        let found = self.blocking(move |receiver| {
            let (uuid, summary) = find(receiver, &domain)?;
            let asked = ActivateRequest { point, ..ActivateRequest::default() };
            let point = if prune { None } else { history::choose(&receiver.store, &uuid.to_string(), &asked)? };
            Ok((uuid, summary.name, point))
        });
        let (uuid, name, point) = found.await?.into_inner();
        let wanted = cold::export::Wanted { point, export: !prune, prune };
        let (messages, stream) = mpsc::channel(PROGRESS_MAX);
        // Not ended with the client's interest: whoever wants it ended ends the receiver.
        tokio::spawn(cold::requests::export(Arc::clone(&self.receiver), (uuid, name), wanted, messages));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn cold_list(&self, request: Request<ColdListRequest>) -> Result<Response<ColdListReply>, Status> {
        cold::requests::list(&self.receiver, request.into_inner()).await.map(Response::new)
    }

    type ImportStream = ReceiverStream<Result<Progress, Status>>;

    async fn import(&self, request: Request<ImportRequest>) -> Result<Response<Self::ImportStream>, Status> {
        let (messages, stream) = mpsc::channel(PROGRESS_MAX);
        tokio::spawn(cold::requests::import(Arc::clone(&self.receiver), request.into_inner(), messages));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn plan_group(&self, request: Request<GroupRequest>) -> Result<Response<GroupPlan>, Status> {
        let request = request.into_inner();
        self.blocking(move |receiver| group::wire::plan(receiver, &request)).await
    }

    type ActivateGroupStream = ReceiverStream<Result<Progress, Status>>;

    async fn activate_group(
        &self,
        request: Request<GroupRequest>,
    ) -> Result<Response<Self::ActivateGroupStream>, Status> {
        let request = request.into_inner();
        let (messages, stream) = mpsc::channel(PROGRESS_MAX);
        self.blocking(move |receiver| group::run::begin(receiver, &request, Some(&messages), false)).await?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn stop_group(&self, request: Request<GroupsRequest>) -> Result<Response<GroupReport>, Status> {
        let group = request.into_inner().group;
        self.blocking(move |receiver| group::run::stop(receiver, &group)).await
    }

    async fn groups(&self, request: Request<GroupsRequest>) -> Result<Response<GroupsReply>, Status> {
        let wanted = request.into_inner().group;
        self.blocking(move |receiver| group::wire::reports(receiver, &wanted)).await
    }
}
