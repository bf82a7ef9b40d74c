//! Commands that change who owns a guest: `move`, `failback`, `reprotect`, `own`.

use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Status;
use vmdr_codec::Layout;
use vmdr_daemon::ownership::{Event, Ownership, Role};
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_hypervisor::libvirt::{Connection, DomainState};
use vmdr_proto::control::{MoveReport, MoveRequest, OwnReply, OwnRequest, Progress, ProtectRequest};
use vmdr_proto::replication::{GiveBackRequest, OwnerReply, OwnerRequest, ReverseRequest, ReverseState};
use vmdr_shim::permission::May;
use vmdr_trust::Trust;

use super::{ANSWER_LIMIT, Control, blocking, failover, internal, refusals};
use crate::daemon::Agent;
use crate::link::Questions;
use crate::registry::{Mode, Protection};
use crate::session::{Input, Phase, attach};

/// Between two questions how far the other site is.
const LOOK: Duration = Duration::from_millis(200);
/// How long a guest may be behind before a move of it is refused.
const BEHIND_LIMIT: Duration = Duration::from_secs(10);
/// How long the other site may take to end what is left of the guest there.
const WAITING_LIMIT: Duration = Duration::from_secs(30);
/// How long a receiver may be silent while it is asked again and again.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// How long a held guest may take to be released when its move is refused.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked whether a session has begun to hand its guest over.
const HAND_OVER_LOOK: Duration = Duration::from_millis(5);

type Reports = mpsc::Sender<Result<Progress, Status>>;

fn step(step: &str, message: String) -> Progress {
    Progress { step: step.to_owned(), message, ..Progress::default() }
}

/// Reports without waiting for a command that does not read.
fn tell(reports: &Reports, progress: Progress) {
    let _ = reports.try_send(Ok(progress));
}

/// Moves a guest, and says how it went.
pub(super) async fn move_away(
    control: &Control,
    request: MoveRequest,
    reports: &Reports,
) -> Result<MoveReport, Status> {
    let agent = &control.agent;
    let protection = protection_of(agent, &request.domain)?;
    // A moment in which the receiver does not keep up is no reason.
    let begun = std::time::Instant::now();
    let phase = loop {
        let phase = phase_of(agent, &protection.uuid);
        if phase != Some(Phase::Behind) || begun.elapsed() > BEHIND_LIMIT {
            break phase;
        }
        tokio::time::sleep(LOOK).await;
    };
    if phase != Some(Phase::Protected) {
        let name = phase.map_or("not protected", Phase::name);
        return Err(Status::failed_precondition(format!(
            "domain {} is {name}: only a protected one is moved, so that nothing is lost",
            protection.name
        )));
    }
    tell(reports, step("check the other site", String::new()));
    let plan = ask_owner(&agent.trust, &protection, true).await?;
    let reasons: Vec<String> =
        plan.refusals.iter().map(|r| format!("{}: {} ({})", r.subject, r.fact, r.remedy)).collect();
    if !reasons.is_empty() {
        let reasons = reasons.join("; ");
        return Err(Status::failed_precondition(format!(
            "domain {} stays here, the other site could not run it: {reasons}",
            protection.name
        )));
    }
    tell(reports, step("pause the guest with its last epoch", String::new()));
    // Whoever comes next finds it moving, or as it was.
    let one_at_a_time = agent.administration.lock().await;
    failover::stand_down(agent, &protection.uuid, &protection.name).await?;
    if let Err(refused) = control.ask(&protection.name, ANSWER_LIMIT, Input::HoldToMove).await {
        release(control, &protection).await;
        failover::stand_up(agent, &protection.uuid);
        return Err(refused);
    }
    tell(reports, step("hand it over", String::new()));
    let (sender, mut answer) = tokio::sync::oneshot::channel();
    match agent.sessions().get(&protection.uuid) {
        Some(session) => session.tell(Input::HandOver(request.protect_back, sender)),
        None => return Err(Status::cancelled("the protection was ended meanwhile")),
    }
    let answered = loop {
        match tokio::time::timeout(HAND_OVER_LOOK, &mut answer).await {
            Ok(answered) => break Some(answered),
            Err(_) if phase_of(agent, &protection.uuid) != Some(Phase::Held) => break None,
            Err(_) => {}
        }
    };
    drop(one_at_a_time);
    let answered = match answered {
        Some(answered) => answered,
        None => answer.await,
    };
    let moved = match answered {
        Ok(Ok(moved)) => moved,
        Ok(Err(why)) => {
            if phase_of(agent, &protection.uuid) == Some(Phase::Held) {
                release(control, &protection).await;
                failover::stand_up(agent, &protection.uuid);
            }
            return Err(Status::failed_precondition(format!("domain {}: {why}", protection.name)));
        }
        Err(_) => {
            return Err(Status::unavailable(format!(
                "the move of {} goes on, but nobody waits for it here any more: see `vmdr status`",
                protection.name
            )));
        }
    };
    let mut report = MoveReport {
        name: protection.name.clone(),
        uuid: protection.uuid.clone(),
        generation: moved.generation,
        epoch: moved.epoch,
        downtime_seconds: moved.downtime.as_secs_f64(),
        protected_back: false,
    };
    let runs = format!("it runs there, after {:.2} s", report.downtime_seconds);
    tell(reports, step("run", runs.clone()));
    if request.protect_back {
        tell(reports, step("protect it from there", String::new()));
        wait_protected_back(&agent.trust, &protection, &runs).await?;
        report.protected_back = true;
    }
    Ok(report)
}

/// Until the other site says that it protects the guest to here.
async fn wait_protected_back(trust: &Trust, protection: &Protection, runs: &str) -> Result<(), Status> {
    let mut silent = Duration::ZERO;
    loop {
        match ask_owner(trust, protection, false).await {
            Ok(OwnerReply { protection_back, .. }) => {
                silent = Duration::ZERO;
                match protection_back.as_str() {
                    "" => {}
                    "protected" => return Ok(()),
                    why => {
                        let name = &protection.name;
                        return Err(Status::failed_precondition(format!(
                            "{runs}, but is not protected from there: {why}. `vmdr reprotect {name}` there"
                        )));
                    }
                }
            }
            Err(error) if silent > SILENCE_LIMIT => return Err(error),
            Err(_) => silent += LOOK,
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn release(control: &Control, protection: &Protection) {
    let released =
        tokio::time::timeout(RELEASE_LIMIT, control.ask(&protection.name, ANSWER_LIMIT, Input::Release)).await;
    tracing::info!(domain = protection.name, ?released, "the move was refused: the guest goes on here");
}

fn protection_of(agent: &Agent, name: &str) -> Result<Protection, Status> {
    let uuid = agent.find(name);
    let sessions = agent.sessions();
    let session = uuid.as_ref().and_then(|uuid| sessions.get(uuid));
    let session = session.ok_or_else(|| Status::not_found(format!("domain {name} is not protected")))?;
    Ok(session.protection.clone())
}

fn phase_of(agent: &Agent, uuid: &str) -> Option<Phase> {
    agent.sessions().get(uuid).map(|session| session.shared.status().shown_phase())
}

async fn ask_owner(trust: &Trust, protection: &Protection, plan: bool) -> Result<OwnerReply, Status> {
    let request = OwnerRequest { domain_uuid: protection.uuid.clone(), plan };
    let mut questions = Questions::connect(trust, &protection.receiver).await.map_err(Status::unavailable)?;
    questions.owner(request).await.map_err(Status::unavailable)
}

/// What the other site has to know to make ready.
struct Described {
    name: String,
    uuid: String,
    xml: String,
    layout: Vec<u8>,
}

/// Protects a guest that came here from another site, back to there. Ends when the session has begun; reports go on.
pub(super) async fn reprotect(control: &Control, request: ProtectRequest, reports: Reports) -> Result<(), Status> {
    let agent = control.agent.clone();
    let mode = failover::mode(&request)?.unwrap_or_default();
    let interval = control.interval(request.interval_ms)?;
    let receiver = if request.receiver.is_empty() { agent.config.receiver.clone() } else { Some(request.receiver) };
    let receiver = receiver.ok_or_else(|| {
        Status::failed_precondition(
            "the other site's receiver is not known: set `receiver = \"HOST:PORT\"` in agent.toml or give --receiver",
        )
    })?;
    let _one_at_a_time = agent.administration.lock().await;
    let described = describe(&agent, &request.domain).await?;
    let ours = record(&agent, &described.uuid)?;
    let Some(Ownership { role: Role::Owner, generation, .. }) = ours else {
        let what = ours.map_or_else(|| "not recorded as owned by this host".to_owned(), |ours| ours.describe());
        return Err(Status::failed_precondition(format!(
            "domain {} is {what}: `reprotect` is for a guest that was activated here or moved here, `protect` for any other",
            described.name
        )));
    };
    // What is wrong here is found before anything is done there.
    if let Some(error) = refusals(&control.examine(&described.name, None).await?) {
        return Err(error);
    }
    let before = make_room(&agent, &described.uuid).await?;
    let every = match (&before, request.application_every_seconds) {
        (Some(before), 0) => before.application_every_seconds,
        (_, every) => every,
    };
    let begun = async {
        reverse(&agent.trust, &receiver, &described, generation, &reports).await?;
        let examined = control.examine(&described.name, Some(&receiver)).await?;
        control.begin(examined, receiver, interval, every, generation, mode, reports)
    };
    let begun = begun.await;
    if let (Err(_), Some(before)) = (&begun, before) {
        // Nothing has come of it: what was protected, or tried to be, is so again.
        let name = before.name.clone();
        if let Err(error) = agent.registry.save(&before).and_then(|()| agent.start(before, false)) {
            tracing::error!(domain = name, "what was protected before cannot be taken up again: {error:#}");
        }
    }
    begun
}

async fn describe(agent: &Agent, domain: &str) -> Result<Described, Status> {
    let (config, name) = (agent.config.clone(), domain.to_owned());
    blocking(move || {
        let domain = Connection::open(&config.libvirt_uri)?.domain(&name)?;
        let live = domain.live_xml()?;
        let xml = DomainXml::from_element(&live)?;
        let active = domain.state()?.0.is_active();
        let disks = if active { attach::mirrored_disks(&domain, &xml)? } else { Vec::new() };
        let layout = Layout { machine: xml.machine, ram: Vec::new(), disks };
        Ok(Described {
            name: domain.name().to_owned(),
            uuid: domain.uuid().to_string(),
            xml: if active { domain.migratable_xml()?.to_string() } else { String::new() },
            layout: layout.to_bytes()?,
        })
    })
    .await
}

fn record(agent: &Agent, uuid: &str) -> Result<Option<Ownership>, Status> {
    agent.config.ownerships().get(uuid).map_err(|error| Status::internal(error.to_string()))
}

/// One that does not get on, as after `own --force`, is begun anew too: what its shim has is compared again.
fn gives_way(phase: Phase) -> bool {
    matches!(phase, Phase::Fenced | Phase::Over | Phase::Starting | Phase::Disconnected | Phase::Failed)
}

/// A protection from before the guest went away is over; one that goes on stands in the way. What it was, unless it is over:
/// its entry in the registry stays until another takes its place.
async fn make_room(agent: &Agent, uuid: &str) -> Result<Option<Protection>, Status> {
    let session = {
        let mut sessions = agent.sessions();
        match sessions.get(uuid) {
            // Its backup may be armed, and be the only one who knows whether it takes the guest.
            Some(session) if session.protection.is_automatic() && session.failover.is_some() && !session.is_over() => {
                let name = session.protection.name.clone();
                return Err(Status::failed_precondition(format!(
                    "failover of domain {name} is automatic: first `vmdr protect {name} --failover manual`"
                )));
            }
            Some(session) if gives_way(session.shared.status().phase) => sessions.remove(uuid),
            Some(session) => {
                let name = session.protection.name.clone();
                return Err(Status::already_exists(format!("domain {name} is already protected")));
            }
            None => None,
        }
    };
    let Some(mut session) = session else { return Ok(None) };
    let agent = agent.clone();
    blocking(move || {
        let over = session.is_over();
        // Its shim, if there is one, was of the guest that went away.
        session.end(Input::Shutdown);
        if over {
            agent.registry.remove(&session.protection.uuid)?;
            return Ok(None);
        }
        // As it was last written, which a session does by itself.
        let entries = agent.registry.load()?.into_iter().flatten();
        Ok(entries.into_iter().find(|entry| entry.uuid == session.protection.uuid))
    })
    .await
}

/// Has the other site make ready, for as long as that takes.
async fn reverse(
    trust: &Trust,
    receiver: &str,
    described: &Described,
    generation: u64,
    reports: &Reports,
) -> Result<(), Status> {
    let mut questions = Questions::connect(trust, receiver).await.map_err(Status::unavailable)?;
    let mut waited = Duration::ZERO;
    loop {
        let request = ReverseRequest {
            domain_uuid: described.uuid.clone(),
            domain_name: described.name.clone(),
            generation,
            layout: described.layout.clone(),
            domain_xml: described.xml.clone(),
            host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        };
        let reply = questions.reverse(request).await.map_err(Status::unavailable)?;
        let refused =
            |why: &str| Status::failed_precondition(format!("domain {}: the other site: {why}", described.name));
        match reply.state() {
            ReverseState::Ready => return Ok(()),
            ReverseState::Refused | ReverseState::Unspecified => return Err(refused(&reply.message)),
            ReverseState::Waiting if waited >= WAITING_LIMIT => return Err(refused(&reply.message)),
            ReverseState::Waiting => waited += LOOK,
            ReverseState::Working => {}
        }
        tell(
            reports,
            Progress {
                done: reply.done_bytes,
                total: reply.total_bytes,
                unit: "bytes".to_owned(),
                ..step("make the other site ready", reply.message)
            },
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// Makes this host the owner: the other site gives it back, or the operator says so.
pub(super) async fn own(control: &Control, request: OwnRequest) -> Result<OwnReply, Status> {
    let agent = control.agent.clone();
    let _one_at_a_time = agent.administration.lock().await;
    if request.force && request.reason.trim().is_empty() {
        return Err(Status::invalid_argument("--force needs --reason: what is known of the other site"));
    }
    let found = agent.find(&request.domain);
    let ours = agent.config.ownerships().all().into_iter().find(|o| {
        o.uuid == request.domain || o.name == request.domain || found.as_ref().is_some_and(|uuid| *uuid == o.uuid)
    });
    let (uuid, name, known) = match (&ours, &found) {
        (Some(ours), _) => (ours.uuid.clone(), ours.name.clone(), ours.generation),
        // A record that cannot be read.
        (None, Some(uuid)) if request.force => (uuid.clone(), request.domain.clone(), 0),
        _ => return Err(Status::not_found(format!("nothing is recorded of domain {}", request.domain))),
    };
    let owner = ours.as_ref().is_some_and(|ours| ours.role == Role::Owner);
    // One that the backup site takes by itself: the way out of that, where neither it nor the witness will be heard again.
    let way_out = request.force && agent.registry.get(&uuid).is_ok_and(|protection| protection.is_automatic());
    if owner && !way_out && agent.config.ownerships().is_confirmed(&uuid) {
        return Err(Status::already_exists(format!("this host owns domain {name} already, in generation {known}")));
    }
    if owner && !request.force {
        return Err(Status::failed_precondition(format!(
            "as far as this host knows it owns domain {name}, in generation {known}; vmdr-agent asks the other site whether that \
             is still so, and starts the guest then. If that site is gone: --force"
        )));
    }
    let receiver = agent.sessions().get(&uuid).map(|session| session.protection.receiver.clone());
    let receiver = receiver.or_else(|| agent.config.receiver.clone());
    let event = if request.force {
        Event::Forced(request.reason.clone())
    } else {
        let receiver = receiver.ok_or_else(|| Status::failed_precondition("the other site is not known"))?;
        let mut questions = Questions::connect(&agent.trust, &receiver).await.map_err(Status::unavailable)?;
        let asked = OwnerRequest { domain_uuid: uuid.clone(), plan: false };
        let position = questions.owner(asked).await.map_err(Status::unavailable)?;
        let back = GiveBackRequest { domain_uuid: uuid.clone(), generation: position.generation };
        let given = questions.give_back(back).await.map_err(Status::failed_precondition)?;
        Event::GivenBack(given.generation)
    };
    if request.force {
        failover::claim_by_force(&agent, &uuid, &name, ours.as_ref()).await?;
    }
    let reason = if request.force { format!("forced: {}", request.reason) } else { "given back".to_owned() };
    let owned = {
        let (agent, uuid, name) = (agent.clone(), uuid.clone(), name.clone());
        blocking(move || Ok(agent.config.ownerships().transition(&uuid, &name, &event, &reason)?)).await?
    };
    let generation = owned.map_or(0, |owned| owned.generation);
    tracing::warn!(
        domain = name,
        generation,
        force = request.force,
        reason = request.reason,
        "this host owns the guest again"
    );
    let running = run_again(&agent, &uuid, generation).await?;
    Ok(OwnReply { name, generation, running })
}

/// The guest that is paused here goes on, and so does its protection, in the new generation. Whether it runs.
async fn run_again(agent: &Agent, uuid: &str, generation: u64) -> Result<bool, Status> {
    let session = agent.sessions().remove(uuid);
    let (again, id) = (agent.clone(), uuid.to_owned());
    let (running, protection) = blocking(move || {
        let mut protection = session.map(|mut session| {
            session.end(Input::Shutdown);
            session.protection.clone()
        });
        if let Some(protection) = &mut protection {
            protection.generation = generation;
            protection.fenced = false;
            protection.moving = None;
            // Whoever was to take it by itself is not to do that unasked.
            protection.failover = Mode::Manual;
            again.registry.save(protection)?;
            crate::failover::open(&again.config.ownerships().permission(&id), May::Always)?.set(May::Always);
        }
        let parsed = id.parse()?;
        let connection = Connection::open(&again.config.libvirt_uri)?;
        // A fenced shim lets nothing run: it goes, another one follows.
        if let Some(protection) = &protection
            && let Err(error) = attach::remove(&again.config, &connection, &parsed, &protection.id, true)
        {
            tracing::warn!(domain = protection.name, "what is left of the protection: {error:#}");
        }
        let domain = match connection.domain_by_uuid(&parsed) {
            Ok(domain) => domain,
            Err(error) if error.is_no_such_domain() => return Ok((false, protection)),
            Err(error) => return Err(error.into()),
        };
        if domain.state()?.0 == DomainState::Paused {
            domain.resume()?;
        }
        Ok((domain.state()?.0 == DomainState::Running, protection))
    })
    .await?;
    if let Some(protection) = protection {
        agent.start(protection, false).map_err(|error| internal(&error))?;
    }
    Ok(running)
}
