//! What the `vmdr` command asks about object storage.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;
use tonic::Status;
use uuid::Uuid;
use vmdr_cold::keys::MasterKey;
use vmdr_cold::{Bucket, ColdError, Head, StoredPoint, Vault, domains};
use vmdr_proto::control as wire;
use vmdr_proto::control::Progress;

use crate::daemon::Receiver;
use crate::store::PointId;

use super::export::{Done, Wanted};
use super::{export, import, status};

/// Where progress and the last word go.
type Answers = mpsc::Sender<Result<Progress, Status>>;

/// Exports, prunes, and answers.
pub async fn export(receiver: Arc<Receiver>, domain: (Uuid, String), wanted: Wanted, answers: Answers) {
    let tell = answers.clone();
    let progress = move |far: vmdr_cold::ExportProgress| {
        let message = format!("{} bytes sent", far.sent_bytes);
        let (done, total, unit) = (far.done_bytes, far.total_bytes, "bytes".to_owned());
        // A client that does not read, or is gone, does not hold it up.
        let _ = tell.try_send(Ok(Progress {
            step: "export".to_owned(),
            done,
            total,
            unit,
            message,
            ..Progress::default()
        }));
    };
    let done = export::run(&receiver, (domain.0, &domain.1), wanted, &progress).await;
    let _ =
        answers.send(done.map(|done| Progress { exported: Some(report(&domain, done)), ..Progress::default() })).await;
}

fn report(domain: &(Uuid, String), done: Done) -> wire::ExportReport {
    let pruned = done.pruned.map(|report| wire::PruneReport {
        kept: report.kept,
        dropped: report.dropped,
        deleted_chunks: report.deleted_chunks,
        marked_chunks: report.marked_chunks,
    });
    let mut to = wire::ExportReport {
        name: domain.1.clone(),
        uuid: domain.0.to_string(),
        url: done.url,
        rewrapped: done.rewrapped,
        pruned,
        ..wire::ExportReport::default()
    };
    if let Some(report) = done.exported {
        to.point = report.head.point();
        to.cut_unix_ns = report.head.cut_unix_ns;
        to.already = report.already;
        to.base = report
            .base
            .as_deref()
            .and_then(|object| object.split_once('-'))
            .map_or_else(String::new, |(_, id)| id.to_owned());
        to.total_bytes = report.head.ram_bytes + report.head.disk_bytes;
        to.read_bytes = report.read_bytes;
        to.sent_chunks = report.sent_chunks;
        to.sent_bytes = report.sent_bytes;
        to.seconds = report.took.as_secs_f64();
    }
    to
}

/// What the storage has of this domain, or of all.
pub async fn list(receiver: &Receiver, request: wire::ColdListRequest) -> Result<wire::ColdListReply, Status> {
    let (bucket, keys) = receiver.cold.open(&request.from, &request.key_file).await?;
    let mut reply = wire::ColdListReply { url: bucket.shown().to_owned(), domains: Vec::new() };
    let wanted = &request.domain;
    for uuid in domains(&bucket).await.map_err(|e| status(&e))? {
        if Uuid::parse_str(wanted).is_ok_and(|wanted| wanted != uuid) {
            continue;
        }
        let domain = match listed(&bucket, uuid, &keys).await {
            Ok(domain) => domain,
            Err(error @ ColdError::Store { .. }) => return Err(status(&error)),
            Err(error) => {
                wire::ColdDomain { uuid: uuid.to_string(), error: error.to_string(), ..wire::ColdDomain::default() }
            }
        };
        if wanted.is_empty() || Uuid::parse_str(wanted).is_ok() || domain.name == *wanted || !domain.error.is_empty() {
            reply.domains.push(domain);
        }
    }
    if !wanted.is_empty() && reply.domains.is_empty() {
        return Err(status(&ColdError::NoDomain { url: reply.url, domain: wanted.clone() }));
    }
    Ok(reply)
}

async fn listed(bucket: &Bucket, uuid: Uuid, keys: &[MasterKey]) -> Result<wire::ColdDomain, ColdError> {
    let missing = || ColdError::Missing { object: format!("{uuid}/key"), advice: ", without which nothing opens" };
    let vault = Vault::open(bucket, uuid, keys).await?.ok_or_else(missing)?;
    let points = vault.points().await?;
    let newest = points.iter().find_map(|point| point.head.as_ref().ok());
    let name = newest.map_or_else(String::new, |head| head.domain.clone());
    let points = points.into_iter().map(point).collect();
    Ok(wire::ColdDomain { uuid: uuid.to_string(), name, points, error: String::new() })
}

fn point(StoredPoint { object, head, .. }: StoredPoint) -> wire::ColdPoint {
    match head {
        Ok(head) => wire::ColdPoint {
            id: head.point(),
            cut_unix_ns: head.cut_unix_ns,
            consistency: if head.application { "application" } else { "crash" }.to_owned(),
            exported_unix_ns: head.exported_unix_ns,
            ram_bytes: head.ram_bytes,
            disk_bytes: head.disk_bytes,
            chunks: head.chunks,
            damage: String::new(),
        },
        Err(damage) => {
            let name = object.rsplit('/').next().unwrap_or_default();
            let (time, id) = name.split_once('-').unwrap_or(("", name));
            let cut_unix_ns = time.parse().unwrap_or(0);
            wire::ColdPoint { id: id.to_owned(), cut_unix_ns, damage, ..wire::ColdPoint::default() }
        }
    }
}

/// The domain of this UUID or, by its newest point, this name.
async fn find(bucket: &Bucket, wanted: &str, keys: &[MasterKey]) -> Result<Vault, Status> {
    let failed = |error: ColdError| status(&error);
    let none = || ColdError::NoDomain { url: bucket.shown().to_owned(), domain: wanted.to_owned() };
    if let Ok(uuid) = Uuid::parse_str(wanted) {
        return Vault::open(bucket, uuid, keys).await.and_then(|vault| vault.ok_or_else(none)).map_err(failed);
    }
    let (mut found, mut closed) = (Vec::new(), None);
    for uuid in domains(bucket).await.map_err(failed)? {
        let vault = match Vault::open(bucket, uuid, keys).await {
            Ok(Some(vault)) => vault,
            Ok(None) => continue,
            Err(error @ ColdError::Store { .. }) => return Err(status(&error)),
            // Its name cannot be told; perhaps it is another's.
            Err(error) => {
                closed = closed.or(Some(error));
                continue;
            }
        };
        let points = vault.points().await.map_err(failed)?;
        match points.iter().find_map(|point| point.head.as_ref().ok()) {
            Some(head) if head.domain == wanted => found.push(vault),
            Some(_) => {}
            None => {
                let damaged = points.into_iter().find_map(|StoredPoint { object, head, .. }| {
                    Some(ColdError::Damaged { object: format!("{uuid}/{object}"), what: head.err()? })
                });
                closed = closed.or(damaged);
            }
        }
    }
    match (found.len(), closed) {
        (1, _) => found.pop().ok_or_else(|| status(&none())),
        (0, Some(error)) => Err(status(&error)),
        (0, None) => Err(status(&none())),
        _ => {
            let uuids: Vec<String> = found.iter().map(|vault| vault.uuid().to_string()).collect();
            Err(Status::failed_precondition(format!("several are named {wanted:?}: give one of {}", uuids.join(", "))))
        }
    }
}

/// Imports, and answers.
pub async fn import(receiver: Arc<Receiver>, request: wire::ImportRequest, answers: Answers) {
    let done = try_import(&receiver, &request, &answers).await;
    match &done {
        Ok(wire::ImportReport { name, uuid, point, read_bytes, .. }) => {
            tracing::info!(domain = %name, %uuid, %point, read_bytes, "imported");
        }
        Err(status) => tracing::warn!(domain = %request.domain, "import: {}", status.message()),
    }
    let _ = answers.send(done.map(|report| Progress { imported: Some(report), ..Progress::default() })).await;
}

async fn try_import(
    receiver: &Arc<Receiver>,
    request: &wire::ImportRequest,
    answers: &Answers,
) -> Result<wire::ImportReport, Status> {
    let begun = Instant::now();
    if request.domain.is_empty() {
        return Err(Status::invalid_argument("no domain is named: give a name or a UUID"));
    }
    if !request.point.is_empty() {
        request.point.parse::<PointId>().map_err(Status::invalid_argument)?;
    }
    let (bucket, keys) = receiver.cold.open(&request.from, &request.key_file).await?;
    let vault = find(&bucket, &request.domain, &keys).await?;
    let uuid = vault.uuid();
    let _turn = receiver.cold.turn(uuid, &request.domain)?;
    let of = Arc::clone(receiver);
    // Before anything is fetched; again before anything is written.
    let free = tokio::task::spawn_blocking(move || import::check_free(&of.store, uuid)).await;
    free.map_err(|e| Status::internal(e.to_string()))??;
    let point = (!request.point.is_empty()).then_some(&*request.point);
    let (object, _) = vault.find(point).await.map_err(|e| status(&e))?;
    let manifest = vault.manifest(&object).await.map_err(|e| status(&e))?;
    let head: Head = manifest.head.clone();
    import::check_owner(receiver, &head)?;
    let tell = answers.clone();
    let progress = move |done, total| {
        let (step, unit) = ("import".to_owned(), "bytes".to_owned());
        let _ = tell.try_send(Ok(Progress { step, done, total, unit, ..Progress::default() }));
    };
    let read_bytes = import::run(receiver, &vault, manifest, progress).await?;
    Ok(wire::ImportReport {
        point: head.point(),
        uuid: uuid.to_string(),
        cut_unix_ns: head.cut_unix_ns,
        total_bytes: head.ram_bytes + head.disk_bytes,
        name: head.domain,
        read_bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}
