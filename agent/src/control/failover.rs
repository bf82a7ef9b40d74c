//! Who activates a guest whose host is silent: `protect --failover`, and what has to come before other commands where that is the
//! backup site by itself.

use tonic::Status;
use vmdr_daemon::ownership::{Event, Ownership, next};
use vmdr_proto::control::ProtectRequest;
use vmdr_witness::{Allowed, Claim, Over};

use super::{blocking, internal};
use crate::daemon::Agent;
use crate::failover::{Failover, STAND_DOWN_LIMIT, Witness};
use crate::registry::{Mode, Protection};
use crate::session::{Input, Phase};

/// What was asked for, if anything was.
pub(super) fn mode(request: &ProtectRequest) -> Result<Option<Mode>, Status> {
    match request.failover.as_str() {
        "" => Ok(None),
        "auto" => Ok(Some(Mode::Auto)),
        "manual" => Ok(Some(Mode::Manual)),
        other => Err(Status::invalid_argument(format!("failover {other:?}: it is auto or manual"))),
    }
}

/// The failover of a domain, if it is automatic.
pub(super) fn of(agent: &Agent, uuid: &str) -> Option<Failover> {
    agent.sessions().get(uuid).and_then(|session| session.failover.clone())
}

/// Has the backup site stand down before something that ends what it goes by; nothing where it takes no guests by itself.
pub(super) async fn stand_down(agent: &Agent, uuid: &str, name: &str) -> Result<(), Status> {
    let Some(failover) = of(agent, uuid) else { return Ok(()) };
    failover.stand_down(STAND_DOWN_LIMIT).await.map_err(|why| {
        Status::unavailable(format!(
            "domain {name} stays as it is, its failover automatic: {why}. If that site is gone for good: `vmdr own {name} --force \
             --reason TEXT`, after which failover is manual"
        ))
    })?;
    let recorded = agent.registry.get(uuid).is_ok_and(|entry| entry.fenced);
    match failover.fenced().filter(|_| !recorded) {
        // The session has yet to record it. Until then nothing is to let the guest run.
        Some(generation) => Err(Status::failed_precondition(format!(
            "another site owns domain {name}, in generation {generation}: nothing was changed; see `vmdr status {name}`"
        ))),
        None => Ok(()),
    }
}

/// It goes on, because nothing came of what was to be done, unless something is under way all the same.
pub(super) fn stand_up(agent: &Agent, uuid: &str) {
    let at_rest = agent.registry.get(uuid).is_ok_and(|entry| entry.moving.is_none() && entry.suspended.is_none());
    if let Some(failover) = of(agent, uuid).filter(|_| at_rest) {
        failover.set_automatic(true);
    }
}

/// Whether automatic failover is possible here at all, whatever the domain.
pub(super) async fn possible(agent: &Agent, uuid: &str) -> Result<(), Status> {
    if !agent.config.witness.is_set() {
        return Err(Status::failed_precondition(
            "automatic failover needs a witness: set [witness] in agent.toml, and in receiver.toml at the backup site",
        ));
    }
    let witness = Witness::new(agent.config.witness.clone());
    witness.look(uuid).await.map_err(|error| {
        Status::failed_precondition(format!("automatic failover needs a witness that can be reached: {error}"))
    })
}

/// Makes the failover of a protected domain automatic, or manual.
pub(super) async fn set(agent: &Agent, uuid: &str, mode: Mode) -> Result<(), Status> {
    let current = agent.registry.get(uuid).map_err(|error| internal(&error))?;
    let name = &current.name;
    if current.failover == mode {
        return Ok(());
    }
    if current.fenced || current.moving.is_some() || current.suspended.is_some() {
        return Err(Status::failed_precondition(format!(
            "domain {name} is fenced, suspended or being moved: its failover stays as it is"
        )));
    }
    match mode {
        Mode::Auto => {
            possible(agent, uuid).await?;
            refuse_automatic(agent, &current)?;
        }
        Mode::Manual => stand_down(agent, uuid, name).await?,
    }
    let session = agent.sessions().remove(uuid);
    let of = agent.clone();
    let id = uuid.to_owned();
    let changed = blocking(move || {
        if let Some(mut session) = session {
            session.end(Input::Shutdown);
        }
        // As the session has written it last.
        let before = of.registry.get(&id)?;
        let after = Protection { failover: mode, ..before.clone() };
        let saved = of.registry.save(&after);
        of.start(if saved.is_ok() { after } else { before }, false)?;
        saved
    });
    changed.await?;
    if mode == Mode::Manual {
        release(agent, uuid).await;
    }
    tracing::info!(domain = current.name, ?mode, "failover");
    Ok(())
}

/// Why this protection cannot be automatic now.
fn refuse_automatic(agent: &Agent, protection: &Protection) -> Result<(), Status> {
    let name = &protection.name;
    let refused = |why: String| Err(Status::failed_precondition(format!("domain {name}: {why}")));
    let Some((phase, heeds, disarmed)) = agent.sessions().get(&protection.uuid).map(|session| {
        let status = session.shared.status();
        (status.phase, status.heeds, status.backup_disarmed)
    }) else {
        return Err(Status::not_found(format!("domain {name} is not protected")));
    };
    match disarmed {
        _ if protection.generation == 0 || !matches!(phase, Phase::Protected | Phase::Behind) => {
            refused(format!("it is {}: its failover is made automatic when it is protected", phase.name()))
        }
        _ if !heeds => refused(
            "the shim beside it is of an older version, which does not look whether the guest may run: `vmdr suspend` and `vmdr \
             resume` start another"
                .to_owned(),
        ),
        None => refused(format!(
            "the receiver {} cannot take guests by itself: it has no [witness], or is of an older version",
            protection.receiver
        )),
        Some(false) => refused(format!(
            "the receiver {} has not said yet that it has stood down from what was before: try again",
            protection.receiver
        )),
        Some(true) => Ok(()),
    }
}

/// Gives up the lease, so that nobody waits for its end.
pub(super) async fn release(agent: &Agent, uuid: &str) {
    if !agent.config.witness.is_set() {
        return;
    }
    let released = match agent.trust.id() {
        Ok(holder) => Witness::new(agent.config.witness.clone()).release(uuid, &holder).await,
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = released {
        tracing::info!(uuid, "the lease ends by itself: {error}");
    }
}

/// Before the operator makes this host the owner by his word, of a guest that the backup site may take by itself: the witness
/// has this host as the owner in the new generation, so that no claim of that site's is granted any more.
pub(super) async fn claim_by_force(
    agent: &Agent,
    uuid: &str,
    name: &str,
    ours: Option<&Ownership>,
) -> Result<(), Status> {
    if !agent.registry.get(uuid).is_ok_and(|protection| protection.is_automatic()) || !agent.config.witness.is_set() {
        return Ok(());
    }
    let state = ours.map(|ours| (ours.role, ours.generation));
    let Some(Some((_, generation))) = next(state, &Event::Forced(String::new())) else { return Ok(()) };
    let holder = agent.trust.id().map_err(|error| Status::internal(error.to_string()))?;
    let claim = Claim { holder, generation, over: Over::Anything };
    let refused = |why: String| Err(Status::failed_precondition(format!("domain {name}: {why}")));
    match Witness::new(agent.config.witness.clone()).claim(uuid, &claim).await {
        Ok(Allowed::Yes) => Ok(()),
        Ok(Allowed::Held(_)) => refused(
            "another site holds its lease, so that it runs there, or is about to: end it there, and wait for the end of the lease"
                .to_owned(),
        ),
        Ok(Allowed::Outdated(newer)) => {
            refused(format!("the witness has an owner in generation {newer}, newer than what is known here: try `vmdr own {name}`"))
        }
        Ok(Allowed::Missing) => refused("the witness does not grant it".to_owned()),
        Err(error) => refused(format!(
            "its backup site takes it by itself, and the witness cannot be told otherwise: {error}. If both are gone for good: take \
             [witness] out of agent.toml, restart vmdr-agent, and say it again"
        )),
    }
}
