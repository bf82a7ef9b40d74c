//! What the `vmdr` command asks about recovery points: which there are, which one is meant, names, and how long they are kept.

use tonic::Status;
use vmdr_proto::control as wire;
use vmdr_proto::replication::{NamePointReply, NamePointRequest};

use crate::control::store_status;
use crate::store::{GivenUp, Point, PointId, Retention, Scope, Store, StoreError, Tier};

const SECOND_NS: u64 = 1_000_000_000;
/// Tiers of a policy, at most.
pub const TIERS_MAX: usize = 16;
/// The longest that anything is kept or apart: 100 years.
pub const SECONDS_MAX: u64 = 100 * 366 * 24 * 3600;
/// The smallest budget: less is taken for a slip.
pub const BUDGET_BYTES_MIN: u64 = 1 << 20;

/// A point as it is told.
pub fn message(point: &Point) -> wire::Point {
    wire::Point {
        id: point.id().to_string(),
        generation: point.generation,
        epoch: point.epoch,
        cut_unix_ns: point.cut_unix_ns,
        consistency: if point.application { "application" } else { "crash" }.to_owned(),
        bytes: point.bytes,
        pinned: !point.names.is_empty(),
        newest: point.newest,
        names: point.names.clone(),
        verified_unix_ns: point.verified_unix_ns.unwrap_or(0),
        damaged: point.damaged,
    }
}

/// All points of a domain, newest first.
pub fn points(store: &Store, uuid: &str) -> Result<wire::PointsReply, Status> {
    let points = store.points(uuid).map_err(|e| store_status(&e))?;
    let retention = Some(retention(store, uuid)?);
    Ok(wire::PointsReply { points: points.iter().map(message).collect(), retention })
}

/// The point with this identity, as it is told.
pub fn find(store: &Store, uuid: &str, id: PointId) -> Result<wire::Point, Status> {
    let points = store.points(uuid).map_err(|e| store_status(&e))?;
    let found = points.iter().find(|point| point.id() == id).map(message);
    found.ok_or_else(|| store_status(&StoreError::NoSuchPoint { domain: uuid.to_owned(), point: id.to_string() }))
}

/// Which point an activation means; `None`: the newest, whichever that is then.
pub fn choose(store: &Store, uuid: &str, request: &wire::ActivateRequest) -> Result<Option<PointId>, Status> {
    let points = || store.points_looked_at(uuid).map_err(|e| store_status(&e));
    let found = match (request.point.as_str(), request.at_unix_ns) {
        ("", 0) => return Ok(None),
        ("", at) => {
            let points = points()?;
            let found = points.iter().find(|point| point.cut_unix_ns <= at && (!point.damaged || request.damaged));
            found.cloned().ok_or_else(|| {
                let oldest =
                    points.last().map_or_else(|| "there is none".to_owned(), |p| format!("the oldest is {}", p.id()));
                Status::not_found(format!("no recovery point is that old: {oldest}; `vmdr points` lists them"))
            })?
        }
        (_, 1..) => return Err(Status::invalid_argument("a point and a time are given: one of them decides")),
        (text, 0) => {
            // By its identity, or by a name that it was given.
            let named = |point: &&Point| point.id().to_string() == text || point.names.iter().any(|name| name == text);
            let found = points()?.iter().find(named).cloned();
            let shown: String = text.chars().take(64).collect();
            found.ok_or_else(|| {
                Status::not_found(format!("there is no recovery point {shown:?}; `vmdr points` lists them"))
            })?
        }
    };
    if found.damaged && !request.damaged {
        return Err(Status::failed_precondition(format!(
            "recovery point {} is damaged; choose a sound one (`vmdr points`), or take it as it is with --damaged",
            found.id()
        )));
    }
    // Also when it is the newest one now: another may come before it is activated, and was not meant.
    Ok(Some(found.id()))
}

/// What is to be verified.
pub fn scope(store: &Store, uuid: &str, request: &wire::VerifyRequest) -> Result<Scope, Status> {
    match request.point.as_str() {
        _ if request.all && !request.point.is_empty() => {
            Err(Status::invalid_argument("a point and all points are asked for: one of them decides"))
        }
        _ if request.all => Ok(Scope::All),
        "" => Ok(Scope::Newest),
        text => {
            let named = |point: &&Point| point.id().to_string() == text || point.names.iter().any(|name| name == text);
            let points = store.points(uuid).map_err(|e| store_status(&e))?;
            let shown: String = text.chars().take(64).collect();
            let found = points.iter().find(named);
            let found = found.ok_or_else(|| {
                Status::not_found(format!("there is no recovery point {shown:?}; `vmdr points` lists them"))
            })?;
            Ok(Scope::Point(found.id()))
        }
    }
}

/// Names a point.
pub fn create(store: &Store, uuid: &str, request: &wire::PointRequest) -> Result<wire::Point, Status> {
    let id = match request.point.as_str() {
        "" => None,
        text => Some(text.parse::<PointId>().map_err(Status::invalid_argument)?),
    };
    let id = store.pin(uuid, &request.name, id).map_err(|e| store_status(&e))?;
    find(store, uuid, id)
}

/// Names a point that the agent has just made.
pub fn name_point(store: &Store, request: &NamePointRequest) -> Result<NamePointReply, Status> {
    let NamePointRequest { domain_uuid, generation, epoch, name } = request;
    let id = PointId { generation: *generation, epoch: *epoch };
    let id = store.pin(domain_uuid, name, Some(id)).map_err(|e| store_status(&e))?;
    let point = find(store, domain_uuid, id)?;
    let application = point.consistency == "application";
    Ok(NamePointReply { cut_unix_ns: point.cut_unix_ns, application, bytes: point.bytes })
}

/// Releases a name. The point may be gone when this answers.
pub fn release(store: &Store, uuid: &str, name: &str) -> Result<wire::Point, Status> {
    let id = store.release(uuid, name).map_err(|e| store_status(&e))?;
    let PointId { generation, epoch } = id;
    Ok(find(store, uuid, id).unwrap_or(wire::Point { id: id.to_string(), generation, epoch, ..wire::Point::default() }))
}

/// How long which points are kept, and what they take.
pub fn retention(store: &Store, uuid: &str) -> Result<wire::RetentionReply, Status> {
    let Retention { budget_bytes, tiers } = store.retention(uuid).map_err(|e| store_status(&e))?;
    let tier = |tier: Tier| wire::RetentionTier {
        every_seconds: tier.every_ns / SECOND_NS,
        for_seconds: tier.for_ns / SECOND_NS,
    };
    let summary = store.domains().into_iter().find(|domain| domain.uuid == uuid).unwrap_or_default();
    Ok(wire::RetentionReply {
        retention: Some(wire::Retention { budget_bytes, tiers: tiers.into_iter().map(tier).collect() }),
        history_bytes: summary.history_bytes,
        alarm: summary.alarm.unwrap_or_default(),
    })
}

/// Shows or changes that.
pub fn change_retention(
    store: &Store,
    uuid: &str,
    request: &wire::RetentionRequest,
) -> Result<wire::RetentionReply, Status> {
    if request.reset {
        store.set_retention(uuid, None).map_err(|e| store_status(&e))?;
    } else if request.change {
        let wanted = request.retention.clone().unwrap_or_default();
        let tiers = wanted.tiers.iter().map(|tier| (tier.every_seconds, tier.for_seconds));
        let policy = policy(wanted.budget_bytes, tiers).map_err(Status::invalid_argument)?;
        store.set_retention(uuid, Some(policy)).map_err(|e| store_status(&e))?;
    }
    retention(store, uuid)
}

/// A policy, if it makes sense. Budget in bytes, tiers as seconds.
pub fn policy(budget_bytes: u64, tiers: impl Iterator<Item = (u64, u64)>) -> Result<Retention, String> {
    if budget_bytes < BUDGET_BYTES_MIN {
        return Err(format!("a budget of {budget_bytes} bytes: at least {BUDGET_BYTES_MIN} are needed"));
    }
    let tiers: Vec<(u64, u64)> = tiers.take(TIERS_MAX + 1).collect();
    if tiers.len() > TIERS_MAX {
        return Err(format!("at most {TIERS_MAX} tiers are possible"));
    }
    if let Some((every, up_to)) = tiers.iter().find(|(every, up_to)| *every > *up_to || *up_to > SECONDS_MAX) {
        return Err(format!("a tier of one point every {every} s for {up_to} s makes no sense"));
    }
    let tier = |(every, up_to)| Tier { every_ns: every * SECOND_NS, for_ns: up_to * SECOND_NS };
    Ok(Retention { budget_bytes, tiers: tiers.into_iter().map(tier).collect() })
}

impl From<GivenUp> for wire::GivenUp {
    fn from(given: GivenUp) -> Self {
        wire::GivenUp { epochs: given.epochs, disk_bytes: given.disk_bytes, seconds: given.seconds }
    }
}
