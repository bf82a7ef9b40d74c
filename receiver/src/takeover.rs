//! A guest that its owner hands over: taken, brought up here, and protected back where that was asked for.
//!
//! ```text
//!  sender: guest held, its epoch durable       receiver
//!    record "handing over" --- HandOver ------> note what is asked (takeover.json)
//!                                               raise the generation, durably:        THE HAND-OVER
//!    record "fenced" <-------- Taken ---------- bring the guest up (crate::activate); once more after a crash
//!    asks Owner until it runs, then ends        protect it back, by the agent of this host
//!    what is left of it there
//! ```
//! The generation decides. It is raised under the lock of the stream that asked for it, and only while that is the domain's
//! newest stream: a sender that has lost the answer asks with [`settle`], which opens a newer stream, and what it is told
//! then stays true. Before the raise nothing has happened; the note alone means nothing. After it this site owns the
//! guest, whatever dies: the note leads [`resume_all`] there. A guest that cannot be brought up can be given back.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tonic::{Code, Status};
use uuid::Uuid;
use vmdr_daemon::durable;
use vmdr_daemon::ownership::Event;
use vmdr_proto::control::agent_client::AgentClient;
use vmdr_proto::control::{ActivateRequest, ProtectRequest};
use vmdr_proto::replication::{
    GiveBackReply, GiveBackRequest, HandOver, OwnerReply, OwnerRequest, OwnerState, Refusal, RefusedCode, SettleReply,
    SettleRequest,
};

use crate::activate::host::{Host, LocalHost};
use crate::activate::record::Step;
use crate::activate::run::unix_ns;
use crate::control::{self, Cause};
use crate::daemon::Receiver;
use crate::drill;
use crate::failover;
use crate::store::{Ingest, StoreError};

const FILE: &str = "takeover.json";
/// Rest before libvirt, or the agent of this host, is asked again.
const RETRY: Duration = Duration::from_secs(2);
/// What `protection_back` says once it is done.
pub const PROTECTED: &str = "protected";

/// What was asked for, and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Takeover {
    generation: u64,
    epoch: u64,
    /// The guest shall be protected from here.
    protect_back: bool,
    /// It has run here: it is never brought up again on account of this.
    up: bool,
    /// Why it cannot be brought up; empty: nothing is known against it.
    failed: String,
    /// How that ended; empty: it has not.
    back: String,
}

impl Takeover {
    fn is_under_way(&self) -> bool {
        self.failed.is_empty() && (!self.up || (self.protect_back && self.back.is_empty()))
    }
}

fn path(receiver: &Receiver, uuid: Uuid) -> PathBuf {
    receiver.domain_directory(uuid).join(FILE)
}

fn read(receiver: &Receiver, uuid: Uuid) -> anyhow::Result<Option<Takeover>> {
    let path = path(receiver, uuid);
    let bytes = durable::read(&path).with_context(|| format!("read {}", path.display()))?;
    bytes.map(|bytes| serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))).transpose()
}

fn write(receiver: &Receiver, uuid: Uuid, takeover: &Takeover) -> anyhow::Result<()> {
    let path = path(receiver, uuid);
    durable::write(&path, &serde_json::to_vec_pretty(takeover)?).with_context(|| format!("write {}", path.display()))
}

/// Takes a guest over, on its stream: it is this site's when this returns. An error: it is the sender's, as before.
pub fn take(
    receiver: &Arc<Receiver>,
    uuid: Uuid,
    ingest: &mut Ingest,
    asked: &HandOver,
) -> Result<u64, (RefusedCode, String)> {
    let not_taken = |message: String| (RefusedCode::NotTaken, message);
    let internal = |error: anyhow::Error| not_taken(format!("{error:#}"));
    let lock = receiver.activation_lock(uuid);
    let Ok(_one_at_a_time) = lock.try_lock() else {
        return Err(not_taken("the domain is being activated or forgotten there".to_owned()));
    };
    match receiver.active_directory(uuid).read(uuid).map(|record| record.map(|record| record.step)) {
        Ok(None | Some(Step::Planned { .. })) => {}
        Ok(Some(_)) => return Err(not_taken("an activation was begun there".to_owned())),
        Err(error) => return Err(not_taken(error.to_string())),
    }
    let takeover = Takeover {
        generation: asked.generation,
        epoch: asked.epoch,
        protect_back: asked.protect_back,
        up: false,
        failed: String::new(),
        back: String::new(),
    };
    // While the guest is still the sender's: what comes afterwards has nothing to wait for.
    let mut said = |step: &str| tracing::info!(domain = %uuid, step, "hand-over");
    drill::run::make_way(receiver, uuid, drill::run::HAND_OVER_WAIT_MAX, &mut said);
    // A recovery plan that cannot be applied is found out while the guest runs where it is.
    let name = receiver.store.recovery_point(&uuid.to_string()).map(|point| point.name).unwrap_or_default();
    if let Some(wrong) = receiver.settings(&name, uuid).mapping.trouble.first() {
        return Err(not_taken(format!("{}: {}; {}", wrong.subject, wrong.fact, wrong.remedy)));
    }
    write(receiver, uuid, &takeover).map_err(internal)?;
    ingest.hand_over(asked.epoch, asked.generation).map_err(|error| match error {
        StoreError::Refused { .. } | StoreError::Superseded(_) => {
            // An activation can come to the same generation, and shall not find what was asked for here.
            if let Err(error) = durable::remove(&path(receiver, uuid)) {
                tracing::warn!(%uuid, %error, "remove the note of a hand-over that was not taken");
            }
            not_taken(error.to_string())
        }
        StoreError::Fenced { .. } => (RefusedCode::Fenced, error.to_string()),
        // It cannot be said whether it is durable: the sender asks.
        _ => (RefusedCode::Io, error.to_string()),
    })?;
    tracing::info!(domain = %uuid, generation = asked.generation, epoch = asked.epoch, "taken over");
    failover::owned(receiver, uuid, asked.generation);
    bring_up(Arc::clone(receiver), uuid);
    Ok(asked.generation)
}

/// Whether a domain was handed over to this site in the generation that is stored.
pub fn has_taken(receiver: &Receiver, uuid: Uuid, generation: u64) -> anyhow::Result<bool> {
    Ok(read(receiver, uuid)?.is_some_and(|takeover| takeover.generation == generation))
}

/// Goes on with everything that was taken over and is not done.
pub fn resume_all(receiver: &Arc<Receiver>) {
    for domain in receiver.store.domains() {
        let Ok(uuid) = Uuid::parse_str(&domain.uuid) else { continue };
        match read(receiver, uuid) {
            Ok(Some(takeover)) if takeover.generation > domain.position.generation => {
                // Asked for and not taken.
                if let Err(error) = durable::remove(&path(receiver, uuid)) {
                    tracing::warn!(%uuid, %error, "remove the note of a hand-over that was not taken");
                }
            }
            Ok(Some(takeover)) if takeover.is_under_way() && takeover.generation == domain.position.generation => {
                bring_up(Arc::clone(receiver), uuid);
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%uuid, "a hand-over: {error:#}"),
        }
    }
}

fn bring_up(receiver: Arc<Receiver>, uuid: Uuid) {
    let requested = (Instant::now(), unix_ns(SystemTime::now()));
    tokio::spawn(async move {
        let of = Arc::clone(&receiver);
        let up = tokio::task::spawn_blocking(move || run_until_known(&of, uuid, requested)).await;
        match up {
            Ok(Ok(Some(takeover))) if takeover.protect_back && takeover.back.is_empty() => {
                protect_back(&receiver, uuid, takeover).await;
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::error!(%uuid, "a guest that was taken over: {error:#}"),
            Err(error) => tracing::error!(%uuid, %error, "a guest that was taken over"),
        }
    });
}

/// Until the guest runs, or it is known that it will not.
fn run_until_known(
    receiver: &Arc<Receiver>,
    uuid: Uuid,
    requested: (Instant, u64),
) -> anyhow::Result<Option<Takeover>> {
    loop {
        let Some(mut takeover) = read(receiver, uuid)? else { return Ok(None) };
        if takeover.up {
            return Ok(Some(takeover));
        }
        if receiver.is_ending() {
            return Ok(None);
        }
        {
            let lock = receiver.activation_lock(uuid);
            let _one_at_a_time = lock.blocking_lock();
            if receiver.store.position(&uuid.to_string())?.generation != takeover.generation {
                return Ok(None);
            }
            let active = receiver.active_directory(uuid);
            if !matches!(active.read(uuid)?, Some(record) if record.step.generation() >= takeover.generation) {
                // The generation is raised already: the activation goes on from there.
                let name = receiver.store.recovery_point(&uuid.to_string())?.name;
                active.write(uuid, &name, &Step::Planned { generation: takeover.generation })?;
            }
        }
        let request = ActivateRequest { domain: uuid.to_string(), ..ActivateRequest::default() };
        let mut progress = |step: &str| tracing::info!(domain = %uuid, step, "hand-over");
        match control::activate_in(
            receiver,
            &request,
            Cause::HandedOver { generation: takeover.generation },
            requested,
            &mut progress,
        ) {
            Ok(_) => {
                takeover.up = true;
                write(receiver, uuid, &takeover)?;
                return Ok(Some(takeover));
            }
            // It was given back meanwhile.
            Err(status) if status.code() == Code::Aborted => return Ok(None),
            Err(status) if status.code() == Code::Unavailable => {
                tracing::warn!(%uuid, "hand-over: {}; tried again", status.message());
                std::thread::sleep(RETRY);
            }
            Err(status) => {
                tracing::error!(%uuid, "hand-over: {}", status.message());
                status.message().clone_into(&mut takeover.failed);
                write(receiver, uuid, &takeover)?;
                return Ok(None);
            }
        }
    }
}

/// Asks the agent of this host, until it answers.
async fn protect_back(receiver: &Arc<Receiver>, uuid: Uuid, mut takeover: Takeover) {
    let mut ending = receiver.ending();
    loop {
        match ask_agent(receiver, uuid).await {
            Ok(()) => PROTECTED.clone_into(&mut takeover.back),
            Err(status) if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled) => {
                tracing::warn!(%uuid, "protect it back: {}; tried again", status.message());
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => continue,
                    _ = ending.wait_for(|ending| *ending) => return,
                }
            }
            Err(status) if status.code() == Code::AlreadyExists => PROTECTED.clone_into(&mut takeover.back),
            Err(status) => status.message().clone_into(&mut takeover.back),
        }
        tracing::info!(%uuid, back = takeover.back, "protection back");
        let of = Arc::clone(receiver);
        let written = tokio::task::spawn_blocking(move || write(&of, uuid, &takeover)).await;
        if let Ok(Err(error)) = written {
            tracing::error!(%uuid, "a hand-over: {error:#}");
        }
        return;
    }
}

async fn ask_agent(receiver: &Receiver, uuid: Uuid) -> Result<(), Status> {
    let socket = receiver.config.agent_socket.clone();
    let unavailable = |what: String| Status::unavailable(format!("the agent of this host: {what}"));
    let stream = UnixStream::connect(&socket).await.map_err(|e| unavailable(format!("{}: {e}", socket.display())))?;
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let stream = once.take().ok_or_else(|| std::io::Error::other("the connection was lost"));
        async move { stream }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://vmdr.invalid");
    let channel = endpoint.connect_with_connector(connector).await.map_err(|e| unavailable(e.to_string()))?;
    let request = ProtectRequest { domain: uuid.to_string(), ..ProtectRequest::default() };
    let mut progress = AgentClient::new(channel).reprotect(request).await?.into_inner();
    while let Some(step) = progress.message().await? {
        tracing::debug!(%uuid, step = step.step, message = step.message, "protect it back");
    }
    Ok(())
}

/// How a domain stands here.
pub fn owner(receiver: &Arc<Receiver>, request: &OwnerRequest) -> Result<OwnerReply, Status> {
    let uuid = parse(&request.domain_uuid)?;
    let position = receiver.store.position(&uuid.to_string()).map_err(|e| control::store_status(&e))?;
    let record = receiver.active_directory(uuid).read(uuid).map_err(|e| Status::internal(e.to_string()))?;
    let takeover = read(receiver, uuid).map_err(|e| Status::internal(format!("{e:#}")))?;
    let takeover = takeover.filter(|takeover| takeover.generation == position.generation);
    let failed = takeover.as_ref().map(|takeover| takeover.failed.clone()).unwrap_or_default();
    let state = match record.map(|record| record.step) {
        Some(Step::Running { generation, .. }) if generation == position.generation => OwnerState::Runs,
        Some(step) if step.generation() > position.generation => OwnerState::Standby,
        Some(_) if failed.is_empty() => OwnerState::Taking,
        None if takeover.is_none() => OwnerState::Standby,
        None if failed.is_empty() => OwnerState::Taking,
        _ => OwnerState::Failed,
    };
    let mut refusals = Vec::new();
    if request.plan {
        let wanted = ActivateRequest { domain: uuid.to_string(), ..ActivateRequest::default() };
        let plan = control::make_plan(receiver, &wanted)?;
        if plan.already_active {
            refusals.push(Refusal {
                subject: "domain".to_owned(),
                fact: "a guest of this UUID runs there".to_owned(),
                remedy: "find out which of the two is the right one".to_owned(),
            });
        }
        let found = crate::activate::findings::refusals(&plan.findings);
        refusals.extend(found.map(|f| Refusal {
            subject: f.subject.clone(),
            fact: f.fact.clone(),
            remedy: f.remedy.clone(),
        }));
    }
    Ok(OwnerReply {
        generation: position.generation,
        epoch: position.epoch,
        state: state.into(),
        message: failed,
        refusals,
        protection_back: takeover.map(|takeover| takeover.back).unwrap_or_default(),
    })
}

/// Whether a hand-over was taken; if not, none that was sent before is taken any more: opening a stream ends older ones.
pub fn settle(receiver: &Arc<Receiver>, request: &SettleRequest) -> Result<SettleReply, Status> {
    let uuid = parse(&request.domain_uuid)?;
    let id = uuid.to_string();
    if receiver.store.position(&id).map_err(|e| control::store_status(&e))?.generation == 0 {
        return Ok(SettleReply { taken: false, generation: 0 });
    }
    match receiver.store.open_stream(&id, &request.domain_name, request.generation) {
        Ok(ingest) => Ok(SettleReply { taken: false, generation: ingest.generation() }),
        Err(StoreError::Fenced { stored, .. }) => Ok(SettleReply { taken: true, generation: stored }),
        Err(StoreError::Frozen(_)) => {
            let position = receiver.store.position(&id).map_err(|e| control::store_status(&e))?;
            let taken = position.generation > request.generation;
            if !taken {
                return Err(Status::unavailable("an activation is under way there"));
            }
            Ok(SettleReply { taken, generation: position.generation })
        }
        Err(error) => Err(Status::unavailable(error.to_string())),
    }
}

/// Gives a domain back that never ran here, in the next generation: its standby goes on being one.
pub fn give_back(receiver: &Arc<Receiver>, request: &GiveBackRequest) -> Result<GiveBackReply, Status> {
    let uuid = parse(&request.domain_uuid)?;
    let id = uuid.to_string();
    let lock = receiver.activation_lock(uuid);
    let Ok(_one_at_a_time) = lock.try_lock() else {
        return Err(Status::failed_precondition("it is being activated there; wait for that to end"));
    };
    let position = receiver.store.position(&id).map_err(|e| control::store_status(&e))?;
    if position.generation != request.generation {
        return Err(Status::failed_precondition(format!(
            "generation {} is in force there, not {}",
            position.generation, request.generation
        )));
    }
    let active = receiver.active_directory(uuid);
    let record = active.read(uuid).map_err(|e| Status::internal(e.to_string()))?;
    let attempts = match record.map(|record| record.step) {
        None | Some(Step::Planned { .. } | Step::Fenced { .. }) => true,
        Some(Step::Restoring { .. } | Step::Running { .. }) => false,
    };
    let host = LocalHost::connect(&receiver.config.libvirt_uri).map_err(|e| Status::unavailable(e.to_string()))?;
    let runs = host.guest(uuid).map_err(|e| Status::unavailable(e.to_string()))?.is_some_and(|g| g.state.is_active());
    if runs || !attempts {
        return Err(Status::failed_precondition(
            "it runs there, or has run: what it did since would be lost. `vmdr move` it back, or `vmdr own --force` here",
        ));
    }
    let generation = position.generation + 1;
    // First of all: from here on it is not started here.
    let name = receiver.store.domains().into_iter().find(|d| d.uuid == id).map(|d| d.name).unwrap_or_default();
    let recorded = receiver.ownerships.transition(&id, &name, &Event::Outdated(generation), "given back");
    recorded.map_err(|e| Status::internal(e.to_string()))?;
    failover::given_back(receiver, uuid)?;
    receiver.store.carry_on(&id, generation).map_err(|e| control::store_status(&e))?;
    let cleared = crate::activate::clear::remove(active.path()).and_then(|()| durable::remove(&path(receiver, uuid)));
    let gone = cleared.and_then(|()| match std::fs::remove_dir_all(active.path()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    if let Err(error) = gone {
        tracing::warn!(%uuid, %error, "what is left of an activation that never came to run");
    }
    tracing::info!(%uuid, generation, "given back");
    Ok(GiveBackReply { generation })
}

/// The UUID of a domain as a peer may write it: in 36 characters, as the store takes it. In any other spelling what is asked about
/// and what the peer's right was looked up for could be two things.
pub(crate) fn parse(uuid: &str) -> Result<Uuid, Status> {
    let parsed = Uuid::try_parse(uuid).ok().filter(|parsed| uuid.len() == 36 && !parsed.is_nil());
    parsed.ok_or_else(|| Status::invalid_argument("this is not the UUID of a domain"))
}
