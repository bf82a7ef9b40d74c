//! The control socket: what the `vmdr` command asks of an agent.

mod failover;
mod ownership;
mod status;

use std::pin::Pin;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use vmdr_daemon::caller::Groups;
use vmdr_daemon::guard::Guard;
use vmdr_daemon::host::HostService;
use vmdr_daemon::ownership::Role;
use vmdr_daemon::socket::incoming;
use vmdr_hypervisor::domain_xml::own_qmp_socket;
use vmdr_hypervisor::libvirt::Connection;
use vmdr_proto::REPLICATION_VERSION;
use vmdr_proto::control::agent_server::{Agent as AgentService, AgentServer};
use vmdr_proto::control::{
    ApplicationPoint, DoctorReply, DoctorRequest, DomainRequest, DomainStatus, HoldReply, MoveRequest, OwnReply,
    OwnRequest, Point, PointRequest, PrepareReply, Progress, ProtectRequest, ReleaseReply, ResumeReply, StatusReply,
    StatusRequest, SuspendReply, UnprotectReply,
};
use vmdr_proto::host::host_server::HostServer;
use vmdr_proto::replication::{NamePointRequest, ProbeReply, ProbeRequest};
use vmdr_trust::Trust;

use crate::config::check_interval;
use crate::daemon::Agent;
use crate::link::Questions;
use crate::preflight::domain::PASSTHROUGH_INTERVAL_MS_MIN;
use crate::preflight::{self, DomainOptions, Finding, HostFacts, Severity};
use crate::quiesce;
use crate::registry::{Mode, Protection};
use crate::session::{Answer, Input, Phase, Session, rest};

const RECEIVER_REMEDY: &str = "start vmdr-receiver there, correct the address, or pair the two hosts (`vmdr pair`)";
/// How long a session may take for what it was asked, the receiver's acknowledgement included.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Reports to a command that does not read; what was asked for does not wait for it.
const REPORTS_MAX: usize = 16;
/// Beside freezing: how long the cut of an application-consistent point may take until it is durable.
const APPLICATION_LIMIT: Duration = Duration::from_secs(20);
/// Between application-consistent points of a schedule, in seconds: each makes the guest's writers wait for a moment.
const APPLICATION_EVERY_SECONDS: std::ops::RangeInclusive<u64> = 10..=30 * 24 * 3600;
const PROGRESS_LOOK: Duration = Duration::from_millis(100);

type Reports = Pin<Box<dyn tokio_stream::Stream<Item = Result<Progress, Status>> + Send>>;

/// What those may ask who may only look.
const READABLE: &[&str] = &["Doctor", "Peers", "Status"];

/// Serves it for ever.
pub async fn serve(listener: UnixListener, groups: Groups, agent: Agent) -> anyhow::Result<()> {
    let audit = agent.audit.clone();
    tonic::transport::Server::builder()
        .layer(Guard::new(audit.clone(), READABLE))
        .add_service(HostServer::new(HostService::new("agent", agent.trust.clone())))
        .add_service(AgentServer::new(Control { agent }))
        .serve_with_incoming(incoming(listener, groups, audit))
        .await
        .context("serve the control socket")
}

#[derive(Clone)]
struct Control {
    agent: Agent,
}

#[tonic::async_trait]
impl AgentService for Control {
    async fn doctor(&self, request: Request<DoctorRequest>) -> Result<Response<DoctorReply>, Status> {
        let name = request.into_inner().domain;
        let findings = if name.is_empty() {
            let config = self.agent.config.clone();
            let mut findings = blocking(move || {
                let connection = Connection::open(&config.libvirt_uri);
                Ok(preflight::host::findings(&HostFacts::gather(), connection.as_ref(), config.arena_bytes))
            })
            .await?;
            findings.push(self.receiver_finding().await);
            findings
        } else {
            let receiver = self.agent.config.receiver.clone();
            self.examine(&name, receiver.as_deref()).await?.findings
        };
        Ok(Response::new(DoctorReply { findings: findings.into_iter().map(Into::into).collect() }))
    }

    async fn prepare(&self, request: Request<DomainRequest>) -> Result<Response<PrepareReply>, Status> {
        let name = request.into_inner().domain;
        let uri = self.agent.config.libvirt_uri.clone();
        let prepared = blocking(move || {
            let connection = Connection::open(&uri)?;
            let domain = connection.domain(&name)?;
            Ok(preflight::prepare(&connection, &domain)?)
        })
        .await?;
        Ok(Response::new(PrepareReply {
            changed: prepared.changed,
            restart_needed: prepared.restart_needed,
            qmp_socket: prepared.socket.to_string_lossy().into_owned(),
        }))
    }

    type ProtectStream = Reports;

    async fn protect(&self, request: Request<ProtectRequest>) -> Result<Response<Self::ProtectStream>, Status> {
        let request = request.into_inner();
        let mode = failover::mode(&request)?;
        let interval = self.interval(request.interval_ms)?;
        if let Some(mode) = mode
            && let Some(uuid) = self.agent.find(&request.domain)
            && self.agent.sessions().get(&uuid).is_some_and(|session| !session.is_over())
        {
            return self.change_failover(&uuid, mode, &request).await;
        }
        let receiver =
            if request.receiver.is_empty() { self.agent.config.receiver.clone() } else { Some(request.receiver) };
        let Some(receiver) = receiver else {
            return Err(Status::failed_precondition(
                "no receiver is configured: set `receiver = \"HOST:PORT\"` in agent.toml or give --receiver",
            ));
        };
        let _one_at_a_time = self.agent.administration.lock().await;
        let examined = self.examine(&request.domain, Some(&receiver)).await?;
        if self.agent.sessions().get(&examined.uuid).is_some_and(|session| !session.is_over()) {
            return Err(Status::already_exists(format!("domain {} is already protected", examined.name)));
        }
        let every = request.application_every_seconds;
        if every > 0 && !APPLICATION_EVERY_SECONDS.contains(&every) {
            let (from, to) = (APPLICATION_EVERY_SECONDS.start(), APPLICATION_EVERY_SECONDS.end());
            return Err(Status::invalid_argument(format!(
                "an application-consistent point every {every} s is out of range: {from} s to {to} s are possible"
            )));
        }
        // What was activated here is owned in that generation, which a receiver that knows nothing of it is told. One that
        // does tells its own.
        let ours = self.agent.config.ownerships().get(&examined.uuid).map_err(|e| Status::internal(e.to_string()))?;
        let ours = ours.filter(|ours| ours.role == Role::Owner && examined.stored_generation == 0);
        let generation = ours.map_or(0, |ours| ours.generation);
        if mode == Some(Mode::Auto) {
            failover::possible(&self.agent, &examined.uuid).await?;
        }
        let (sender, progress) = mpsc::channel(REPORTS_MAX);
        self.begin(examined, receiver, interval, every, generation, mode.unwrap_or_default(), sender)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(progress))))
    }

    async fn unprotect(&self, request: Request<DomainRequest>) -> Result<Response<UnprotectReply>, Status> {
        let name = request.into_inner().domain;
        let _one_at_a_time = self.agent.administration.lock().await;
        let uuid = self.agent.find(&name);
        if let Some(uuid) = &uuid
            && self.phase(uuid) != Some(Phase::Moving)
        {
            failover::stand_down(&self.agent, uuid, &name).await?;
        }
        let session = {
            let mut sessions = self.agent.sessions();
            let moving = |session: &Session| session.shared.status().phase == Phase::Moving;
            if uuid.as_ref().and_then(|uuid| sessions.get(uuid)).is_some_and(moving) {
                return Err(Status::failed_precondition(format!(
                    "domain {name} is being moved, and it is not known yet who owns it: see `vmdr status {name}`"
                )));
            }
            uuid.and_then(|uuid| sessions.remove(&uuid))
        };
        let Some(mut session) = session else {
            return Err(Status::not_found(format!("domain {name} is not protected")));
        };
        let agent = self.agent.clone();
        let protection = blocking(move || {
            session.end(Input::Unprotect);
            agent.registry.remove(&session.protection.uuid)?;
            agent.ended(&session.protection)?;
            // It runs as any other does.
            let _ = std::fs::remove_file(agent.config.ownerships().permission(&session.protection.uuid));
            Ok(session.protection.clone())
        })
        .await?;
        if protection.is_automatic() {
            failover::release(&self.agent, &protection.uuid).await;
        }
        let why = "its protection was ended";
        if let Err(error) = rest::tell(&self.agent.trust, &protection, why).await {
            let domain = &protection.name;
            tracing::warn!(domain, "tell the receiver that {why}, so that it raises no alarm: {error}");
        }
        Ok(Response::new(UnprotectReply { domain: protection.name }))
    }

    async fn hold(&self, request: Request<DomainRequest>) -> Result<Response<HoldReply>, Status> {
        let epoch = self.ask(&request.into_inner().domain, ANSWER_LIMIT, Input::Hold).await?;
        Ok(Response::new(HoldReply { epoch }))
    }

    async fn release(&self, request: Request<DomainRequest>) -> Result<Response<ReleaseReply>, Status> {
        self.ask(&request.into_inner().domain, ANSWER_LIMIT, Input::Release).await?;
        Ok(Response::new(ReleaseReply {}))
    }

    async fn suspend(&self, request: Request<DomainRequest>) -> Result<Response<SuspendReply>, Status> {
        let name = request.into_inner().domain;
        let uuid = self.agent.find(&name).unwrap_or_default();
        let _one_at_a_time = self.agent.administration.lock().await;
        failover::stand_down(&self.agent, &uuid, &name).await?;
        let suspended = self.ask(&name, ANSWER_LIMIT, Input::Suspend).await;
        if suspended.is_err() {
            failover::stand_up(&self.agent, &uuid);
        }
        Ok(Response::new(SuspendReply { epoch: suspended? }))
    }

    async fn resume(&self, request: Request<DomainRequest>) -> Result<Response<ResumeReply>, Status> {
        let name = request.into_inner().domain;
        self.ask(&name, ANSWER_LIMIT, Input::Resume).await?;
        if let Some(uuid) = self.agent.find(&name) {
            failover::stand_up(&self.agent, &uuid);
        }
        Ok(Response::new(ResumeReply {}))
    }

    type MoveAwayStream = Reports;

    async fn move_away(&self, request: Request<MoveRequest>) -> Result<Response<Reports>, Status> {
        let (sender, progress) = mpsc::channel(REPORTS_MAX);
        let (control, request) = (self.clone(), request.into_inner());
        // Goes on when the command goes away, as everything that changes something does.
        tokio::spawn(async move {
            let last = match ownership::move_away(&control, request, &sender).await {
                Ok(report) => Ok(Progress { step: "done".to_owned(), moved: Some(report), ..Default::default() }),
                Err(status) => Err(status),
            };
            let _ = sender.send(last).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(progress))))
    }

    type ReprotectStream = Reports;

    async fn reprotect(&self, request: Request<ProtectRequest>) -> Result<Response<Reports>, Status> {
        let (sender, progress) = mpsc::channel(REPORTS_MAX);
        let (control, request) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            let reports = sender.clone();
            if let Err(status) = ownership::reprotect(&control, request, reports).await {
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(progress))))
    }

    async fn own(&self, request: Request<OwnRequest>) -> Result<Response<OwnReply>, Status> {
        ownership::own(self, request.into_inner()).await.map(Response::new)
    }

    async fn create_point(&self, request: Request<PointRequest>) -> Result<Response<ApplicationPoint>, Status> {
        let request = request.into_inner();
        let limit = quiesce::Limits::of(&self.agent.config).freeze + APPLICATION_LIMIT;
        let made = self.ask(&request.domain, limit, Input::Application).await?;
        let id = format!("{}-{}", made.generation, made.epoch);
        let mut point = Point {
            id: id.clone(),
            generation: made.generation,
            epoch: made.epoch,
            cut_unix_ns: made.cut_unix_ns,
            consistency: "application".to_owned(),
            ..Point::default()
        };
        if !request.name.is_empty() {
            let named = self.name_point(&request, made.generation, made.epoch).await;
            point.bytes = named.map_err(|why| {
                Status::failed_precondition(format!(
                    "recovery point {id} was made and is application-consistent, but could not be named: {why}"
                ))
            })?;
            point.pinned = true;
            point.names = vec![request.name];
        }
        Ok(Response::new(ApplicationPoint {
            point: Some(point),
            frozen_seconds: made.frozen.as_secs_f64(),
            file_systems: made.file_systems,
            way: made.way.to_owned(),
            note: made.note,
        }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let name = request.into_inner().domain;
        let domains: Vec<DomainStatus> = self
            .agent
            .sessions()
            .values()
            .filter(|session| !session.is_over())
            .filter(|session| name.is_empty() || session.protection.name == name || session.protection.uuid == name)
            .map(|session| {
                let owner = self.agent.config.ownerships().get(&session.protection.uuid).ok().flatten();
                DomainStatus { owner: owner.map(|o| o.describe()).unwrap_or_default(), ..status::of(session) }
            })
            .collect();
        if domains.is_empty() && !name.is_empty() {
            return Err(Status::not_found(format!("domain {name} is not protected")));
        }
        let trust = self.agent.trust.clone();
        let notices = blocking(move || Ok(trust.notices())).await?;
        Ok(Response::new(StatusReply { domains, notices, ..StatusReply::default() }))
    }
}

/// What is known of a domain before it is protected.
struct Examined {
    name: String,
    uuid: String,
    /// Whether QEMU can only be talked to through libvirt.
    passthrough: bool,
    /// Whether there is a channel to somebody in the guest who can freeze file systems.
    has_channel: bool,
    findings: Vec<Finding>,
    /// The generation that the receiver has stored of it; 0: nothing, or it was not asked.
    stored_generation: u64,
}

/// The time between cuts that was asked for, or else is configured.
struct Interval {
    asked: bool,
    ms: u32,
}

/// The interval for a domain without a QMP socket of its own is longer: the default one silently (a finding says so),
/// one that was asked for is refused.
fn slow_enough(examined: &Examined, interval: &Interval) -> Result<u32, Status> {
    if !examined.passthrough || interval.ms >= PASSTHROUGH_INTERVAL_MS_MIN {
        return Ok(interval.ms);
    }
    if !interval.asked {
        return Ok(PASSTHROUGH_INTERVAL_MS_MIN);
    }
    let asked_ms = interval.ms;
    Err(Status::invalid_argument(format!(
        "interval {asked_ms} ms is out of range: domain {0} has no QMP socket of its own, through libvirt's monitor \
         {PASSTHROUGH_INTERVAL_MS_MIN} ms and more are possible; `vmdr prepare {0}` and a restart give it one",
        examined.name
    )))
}

impl Control {
    /// 0: as configured.
    fn interval(&self, asked_ms: u32) -> Result<Interval, Status> {
        let asked = asked_ms > 0;
        let ms = if asked { asked_ms } else { self.agent.config.interval_ms };
        check_interval(ms).map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Interval { asked, ms })
    }

    fn phase(&self, uuid: &str) -> Option<Phase> {
        self.agent.sessions().get(uuid).map(|session| session.shared.status().phase)
    }

    /// Of a domain that is protected already, nothing else can be changed.
    async fn change_failover(
        &self,
        uuid: &str,
        mode: Mode,
        request: &ProtectRequest,
    ) -> Result<Response<Reports>, Status> {
        if request.interval_ms > 0 || !request.receiver.is_empty() || request.application_every_seconds > 0 {
            return Err(Status::already_exists(format!(
                "domain {} is already protected: only its failover can be changed",
                request.domain
            )));
        }
        let _one_at_a_time = self.agent.administration.lock().await;
        failover::set(&self.agent, uuid, mode).await?;
        let message = format!("failover of domain {} is {}", request.domain, mode.name());
        let done = Progress { step: "failover".to_owned(), message, ..Default::default() };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(done)))))
    }

    /// Begins a protection, unless something was found against it.
    #[allow(clippy::too_many_arguments)]
    fn begin(
        &self,
        examined: Examined,
        receiver: String,
        interval: Interval,
        application_every_seconds: u64,
        generation: u64,
        mode: Mode,
        reports: mpsc::Sender<Result<Progress, Status>>,
    ) -> Result<(), Status> {
        if let Some(error) = refusals(&examined) {
            return Err(error);
        }
        let interval_ms = slow_enough(&examined, &interval)?;
        if application_every_seconds > 0 && !examined.has_channel {
            return Err(Status::failed_precondition(format!(
                "domain {} cannot have application-consistent points: {}",
                examined.name,
                quiesce::REMEDY
            )));
        }
        self.admit(&examined.name)?;
        let protection = Protection {
            name: examined.name.clone(),
            uuid: examined.uuid.clone(),
            receiver,
            interval_ms,
            generation,
            fenced: false,
            id: uuid::Uuid::new_v4().to_string(),
            suspended: None,
            application_every_seconds,
            holds_to_move: false,
            moving: None,
            // Until there is a recovery point nothing could be taken: it is made automatic then.
            failover: Mode::Manual,
        };
        self.agent.registry.save(&protection).map_err(|error| internal(&error))?;
        if let Err(error) = self.agent.start(protection, true) {
            let _ = self.agent.registry.remove(&examined.uuid);
            return Err(internal(&error));
        }
        // Goes on when the command goes away: what was asked for is done.
        tokio::spawn(follow(self.agent.clone(), examined, mode, reports));
        Ok(())
    }

    /// Whether this host has memory for the checkpoints of one more domain.
    fn admit(&self, domain: &str) -> Result<(), Status> {
        let config = &self.agent.config;
        let arena = |session: &Session| config.arena_bytes_of(&session.protection.name);
        let arenas: Vec<u64> = self.agent.sessions().values().map(arena).collect();
        let admitted = self.agent.limits.admit(domain, config.arena_bytes_of(domain), &arenas);
        admitted.map_err(|error| Status::failed_precondition(error.to_string()))
    }

    /// Asks a session for something and waits for its answer.
    async fn ask<T>(&self, name: &str, limit: Duration, input: impl FnOnce(Answer<T>) -> Input) -> Result<T, Status> {
        let (sender, answer) = tokio::sync::oneshot::channel();
        {
            let uuid = self.agent.find(name);
            let sessions = self.agent.sessions();
            let session = uuid.as_ref().and_then(|uuid| sessions.get(uuid));
            session.ok_or_else(|| Status::not_found(format!("domain {name} is not protected")))?.tell(input(sender));
        }
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(message))) => Err(Status::failed_precondition(message)),
            Ok(Err(_)) => Err(Status::unavailable(format!("the protection of {name} is being set up anew"))),
            Err(_) => Err(Status::deadline_exceeded(format!("no answer within {limit:?}; see `vmdr status {name}`"))),
        }
    }

    /// Has the receiver keep a point under a name. What it takes up there, in bytes.
    async fn name_point(&self, request: &PointRequest, generation: u64, epoch: u64) -> Result<u64, String> {
        let (receiver, domain_uuid) = {
            let uuid = self.agent.find(&request.domain).ok_or("the domain is not protected any more")?;
            let sessions = self.agent.sessions();
            let session = sessions.get(&uuid).ok_or("the domain is not protected any more")?;
            (session.protection.receiver.clone(), uuid)
        };
        let name = request.name.clone();
        let mut questions = Questions::connect(&self.agent.trust, &receiver).await?;
        Ok(questions.name_point(NamePointRequest { domain_uuid, generation, epoch, name }).await?.bytes)
    }

    /// Preflight, and the receiver's own opinion.
    async fn examine(&self, domain: &str, receiver: Option<&str>) -> Result<Examined, Status> {
        let (config, name) = (self.agent.config.clone(), domain.to_owned());
        let protected = self.agent.find(domain).is_some();
        let (mut examined, probe) = blocking(move || {
            let facts = HostFacts::gather();
            let connection = Connection::open(&config.libvirt_uri)?;
            let domain = connection.domain(&name)?;
            let options = DomainOptions { arena_bytes: config.arena_bytes_of(domain.name()), protected };
            let mut findings = preflight::host::findings(&facts, Ok(&connection), config.arena_bytes);
            findings.extend(preflight::domain::findings(&domain, &facts, &options));
            let active = domain.state()?.0.is_active();
            let live = domain.live_xml()?;
            let passthrough = active && own_qmp_socket(&live).is_none();
            let has_channel = quiesce::has_channel(&live);
            let probe = if active { Some(preflight::probe_request(&domain)?) } else { None };
            let (name, uuid) = (domain.name().to_owned(), domain.uuid().to_string());
            Ok((Examined { name, uuid, passthrough, has_channel, findings, stored_generation: 0 }, probe))
        })
        .await?;
        if let (Some(receiver), Some(probe)) = (receiver, probe) {
            let reply = ask_receiver(&self.agent.trust, receiver, probe).await;
            let position = reply.as_ref().ok().and_then(|reply| reply.position);
            examined.stored_generation = position.map_or(0, |position| position.generation);
            examined.findings.extend(receiver_findings(receiver, reply));
        }
        Ok(examined)
    }

    async fn receiver_finding(&self) -> Finding {
        let Some(receiver) = &self.agent.config.receiver else {
            return Finding::warning("receiver", "none is configured", "set `receiver` in agent.toml");
        };
        let probe = ProbeRequest { protocol_version: REPLICATION_VERSION, ..Default::default() };
        match ask_receiver(&self.agent.trust, receiver, probe).await {
            Ok(reply) => Finding::ok("receiver", format!("{receiver} answers (vmdr {})", reply.receiver_version)),
            Err(error) => Finding::refused("receiver", error, RECEIVER_REMEDY),
        }
    }
}

async fn ask_receiver(trust: &Trust, receiver: &str, request: ProbeRequest) -> Result<ProbeReply, String> {
    Questions::connect(trust, receiver).await?.probe(request).await
}

fn receiver_findings(receiver: &str, reply: Result<ProbeReply, String>) -> Vec<Finding> {
    match reply {
        Ok(reply) => preflight::receiver(receiver, &reply),
        Err(error) => vec![Finding::refused("receiver", error, RECEIVER_REMEDY)],
    }
}

fn refusals(examined: &Examined) -> Option<Status> {
    let refused: Vec<String> =
        preflight::refusals(&examined.findings).map(|f| format!("{}: {} ({})", f.subject, f.fact, f.remedy)).collect();
    (!refused.is_empty()).then(|| {
        Status::failed_precondition(format!("domain {} cannot be protected: {}", examined.name, refused.join("; ")))
    })
}

/// Reports on a session until it is protected or has failed. A failure takes everything back.
async fn follow(agent: Agent, examined: Examined, mode: Mode, progress: mpsc::Sender<Result<Progress, Status>>) {
    for warning in examined.findings.iter().filter(|finding| finding.severity == Severity::Warning) {
        let message = format!("warning: {}: {} ({})", warning.subject, warning.fact, warning.remedy);
        let _ = progress.send(Ok(Progress { step: "check".to_owned(), message, ..Default::default() })).await;
    }
    let mut total = 0;
    loop {
        tokio::time::sleep(PROGRESS_LOOK).await;
        let seen = agent.sessions().get(&examined.uuid).map(|session| {
            let status = session.shared.status();
            (status.phase, status.durable_epoch, status.pending_bytes, status.last_error.clone())
        });
        let Some((phase, durable, pending, error)) = seen else {
            let _ = progress.send(Err(Status::cancelled("the protection was ended meanwhile"))).await;
            return;
        };
        match phase {
            Phase::Failed | Phase::Fenced => {
                let _ = agent.registry.remove(&examined.uuid);
                let session = agent.sessions().remove(&examined.uuid);
                if let Some(mut session) = session {
                    let of = agent.clone();
                    let ended = tokio::task::spawn_blocking(move || {
                        session.end(Input::Unprotect);
                        // In a generation of its own it is this host's, protected or not.
                        if session.protection.generation == 0 { of.ended(&session.protection) } else { Ok(()) }
                    });
                    if let Ok(Err(error)) = ended.await {
                        tracing::error!(domain = examined.name, "{error:#}");
                    }
                }
                let message = format!("domain {} could not be protected: {error}", examined.name);
                let _ = progress.send(Err(Status::failed_precondition(message))).await;
                return;
            }
            Phase::Protected if durable > 0 => {
                if mode == Mode::Auto {
                    let _one_at_a_time = agent.administration.lock().await;
                    if let Err(status) = failover::set(&agent, &examined.uuid, mode).await {
                        let message = format!(
                            "domain {} is protected, but its failover is manual: {}",
                            examined.name,
                            status.message()
                        );
                        let _ = progress.send(Err(Status::new(status.code(), message))).await;
                        return;
                    }
                }
                let message = format!("domain {} is protected: epoch {durable} is durable", examined.name);
                let _ =
                    progress.send(Ok(Progress { step: "protected".to_owned(), message, ..Default::default() })).await;
                return;
            }
            _ => {
                total = total.max(pending);
                let message =
                    if error.is_empty() { phase.name().to_owned() } else { format!("{}: {error}", phase.name()) };
                let report = Progress {
                    step: "copy".to_owned(),
                    done: total - pending,
                    total,
                    unit: "bytes".to_owned(),
                    message,
                    ..Default::default()
                };
                // A command that went away, or does not read, is no reason to stop.
                let _ = progress.try_send(Ok(report));
            }
        }
    }
}

/// Runs what blocks (libvirt) off the runtime, and maps its errors.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(internal(&error)),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

fn internal(error: &anyhow::Error) -> Status {
    let message = format!("{error:#}");
    match error.downcast_ref::<vmdr_hypervisor::Error>() {
        Some(error) if error.is_no_such_domain() => Status::not_found(message),
        Some(error) if error.is_wrong_state() => Status::failed_precondition(message),
        Some(error) if error.is_connection() => Status::unavailable(message),
        _ => Status::internal(message),
    }
}
