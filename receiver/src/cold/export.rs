//! A point of the store goes to object storage.
//!
//! Built on the domain's last export where the history tells what changed since: the file `exported` in the domain's directory
//! says which that was. It is removed with the domain, and when epochs are lost ([`EXPORTED_FILE`]), because the same numbers
//! then come again with other content. Without it everything is read, and still only what is new is sent.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tonic::Status;
use uuid::Uuid;
use vmdr_cold::{
    Array as ColdArray, Bucket, ColdError, ExportOptions, ExportProgress, ExportReport, Guest, Head, PruneOptions,
    PruneReport, Range, Source, SourceError, Vault,
};

use crate::control::store_status;
use crate::daemon::Receiver;
use crate::store::{Array, EXPORTED_FILE, OWNER_FILE, PointId, PointReader};

use super::status;

/// The longest record read.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// Between two looks at whether an export has to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// What was last exported.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Other for each life of the domain here.
    life: Uuid,
    /// Where it went; empty: nowhere yet.
    url: String,
    /// Its manifest's name.
    object: String,
    /// Which point.
    pub point: String,
    /// When.
    pub exported_unix_ns: u64,
}

/// Reads the record of a domain's directory, if there is one that can be read.
pub fn record(directory: &Path) -> Option<Record> {
    let path = directory.join(EXPORTED_FILE);
    let about = std::fs::metadata(&path).ok().filter(|about| about.len() <= RECORD_BYTES_MAX)?;
    let text = about.is_file().then(|| std::fs::read(&path).ok())??;
    serde_json::from_slice(&text).ok()
}

/// Unlike other small files it is not worth a directory: a domain that was forgotten meanwhile stays so.
fn write_record(directory: &Path, record: &Record) -> std::io::Result<()> {
    let new = directory.join(format!("{EXPORTED_FILE}.new"));
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    std::fs::rename(&new, directory.join(EXPORTED_FILE))?;
    std::fs::File::open(directory)?.sync_all()
}

/// A point of the store, as `vmdr-cold` reads it.
struct Stored(Arc<PointReader>);

fn stored_array(array: ColdArray) -> Array {
    match array {
        ColdArray::Ram(n) => Array::Ram(n),
        ColdArray::Disk(n) => Array::Disk(n),
    }
}

impl Source for Stored {
    fn read(&self, array: ColdArray, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        Ok(self.0.read(stored_array(array), offset, buffer)?)
    }

    fn data_from(&self, array: ColdArray, offset: u64) -> Result<u64, SourceError> {
        Ok(self.0.data_from(stored_array(array), offset)?)
    }

    fn changes(&self, base: &Head) -> Result<Option<Vec<Range>>, SourceError> {
        let older = PointId { generation: base.generation, epoch: base.epoch };
        let changes = match self.0.changed_since(older) {
            Ok(changes) => changes,
            // Too long ago, of another generation, or a part of the history is damaged: then all is read.
            Err(error) => {
                tracing::info!(point = %self.0.id(), base = %older, %error, "what changed since is not known");
                return Ok(None);
            }
        };
        let change = |change: &crate::store::Change| {
            let array = match change.array {
                Array::Ram(n) => ColdArray::Ram(n),
                Array::Disk(n) => ColdArray::Disk(n),
                Array::Device | Array::Xml | Array::Layout => return None,
            };
            Some((array, change.offset, change.bytes))
        };
        Ok(Some(changes.iter().filter_map(change).collect()))
    }
}

/// What an export and a prune did.
#[derive(Debug, Default)]
pub struct Done {
    /// The storage.
    pub url: String,
    /// Nothing: it was only pruned.
    pub exported: Option<ExportReport>,
    /// The data key is under another master key now.
    pub rewrapped: bool,
    /// Nothing: it was not pruned.
    pub pruned: Option<PruneReport>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Export this point; the newest, if `None`.
    pub point: Option<PointId>,
    /// Export.
    pub export: bool,
    /// Prune, afterwards.
    pub prune: bool,
}

/// Exports and prunes; whatever becomes of it is noted.
pub async fn run(
    receiver: &Arc<Receiver>,
    (uuid, name): (Uuid, &str),
    wanted: Wanted,
    progress: &(dyn Fn(ExportProgress) + Send + Sync),
) -> Result<Done, Status> {
    let _turn = receiver.cold.turn(uuid, name)?;
    let done = try_run(receiver, (uuid, name), wanted, progress).await;
    receiver.cold.note(uuid, |exported| {
        exported.tried_unix_ns = crate::activate::run::unix_ns(std::time::SystemTime::now());
        exported.error = done.as_ref().map_or_else(|status| status.message().to_owned(), |_| String::new());
    });
    match &done {
        Ok(Done { url, exported: Some(report), .. }) => tracing::info!(
            domain = %name, %uuid, %url, point = %report.head.point(), already = report.already,
            base = report.base.as_deref().unwrap_or("none"), read_bytes = report.read_bytes,
            sent_bytes = report.sent_bytes, sent_chunks = report.sent_chunks, took = ?report.took, "exported"
        ),
        Ok(_) => {}
        Err(status) => tracing::warn!(domain = %name, %uuid, "export: {}", status.message()),
    }
    if let Ok(Done { url, pruned: Some(report), .. }) = &done {
        let PruneReport { kept, dropped, deleted_chunks, marked_chunks } = report;
        tracing::info!(domain = %name, %uuid, %url, kept, ?dropped, deleted_chunks, marked_chunks, "pruned");
    }
    done
}

async fn try_run(
    receiver: &Arc<Receiver>,
    (uuid, name): (Uuid, &str),
    wanted: Wanted,
    progress: &(dyn Fn(ExportProgress) + Send + Sync),
) -> Result<Done, Status> {
    let cold = &receiver.cold;
    let (bucket, keys) = cold.open("", "").await?;
    let mut done = Done { url: bucket.shown().to_owned(), ..Done::default() };
    let opened = |error: ColdError| status(&error);
    let mut vault = if wanted.export {
        check_there(&bucket, uuid, name, &receiver.domain_directory(uuid)).await?;
        Vault::open_or_begin(&bucket, uuid, &keys).await.map_err(opened)?
    } else {
        let none = || ColdError::NoDomain { url: done.url.clone(), domain: name.to_owned() };
        Vault::open(&bucket, uuid, &keys).await.and_then(|vault| vault.ok_or_else(none)).map_err(opened)?
    };
    if let Some(key) = keys.first() {
        done.rewrapped = vault.rewrap(key).await.map_err(opened)?;
        if done.rewrapped {
            tracing::info!(domain = %name, %uuid, key = %key.id(), "the data key is wrapped under another master key");
        }
    }
    if wanted.export {
        done.exported = Some(export(receiver, uuid, &vault, wanted.point, progress).await?);
    }
    if wanted.prune {
        let options = PruneOptions {
            tiers: cold.config.tiers().map_err(Status::failed_precondition)?,
            grace: Duration::from_secs(cold.config.grace_seconds),
            owner: owner(receiver.store.dir())?,
            exported: done.exported.as_ref().map(|report| report.object.clone()),
        };
        done.pruned = Some(vmdr_cold::prune(&vault, &options).await.map_err(opened)?);
    }
    Ok(done)
}

/// Refuses to begin anew where there was something before: a directory may not be mounted.
async fn check_there(bucket: &Bucket, uuid: Uuid, name: &str, directory: &Path) -> Result<(), Status> {
    let Some(record) = record(directory).filter(|record| record.url == bucket.shown()) else { return Ok(()) };
    if vmdr_cold::has_domain(bucket, uuid).await.map_err(|error| status(&error))? {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "{} has nothing of {name}, but point {} was exported there: is it the right storage, and mounted? To begin anew, remove {}",
        record.url,
        record.point,
        directory.join(EXPORTED_FILE).display()
    )))
}

/// Who this is, to other receivers: one process at a time has a state directory. Two hosts that were made from one image have the
/// same name and path; what is random is told apart, if the image was made before the first prune. It is kept, because a prune
/// that a crash broke off is gone on with by the same one.
fn owner(state_directory: &Path) -> Result<String, Status> {
    let path = state_directory.join(OWNER_FILE);
    let failed = |error: std::io::Error| Status::internal(format!("{}: {error}", path.display()));
    let host = rustix::system::uname();
    let named = |id: Uuid| format!("{}:{id}", host.nodename().to_string_lossy());
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let what = || format!("{} is damaged: it is no UUID; remove it", path.display());
            return Uuid::parse_str(text.trim()).map(named).map_err(|_| Status::data_loss(what()));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Two prunes of other domains may begin at once: the one that is there first stays.
    let id = Uuid::new_v4();
    let new = state_directory.join(format!("{OWNER_FILE}.{id}"));
    let written = std::fs::File::create_new(&new).and_then(|mut file| {
        file.write_all(format!("{id}\n").as_bytes())?;
        file.sync_all()?;
        std::fs::hard_link(&new, &path)
    });
    let _ = std::fs::remove_file(&new);
    match written {
        Ok(()) => {
            std::fs::File::open(state_directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
            Ok(named(id))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => owner(state_directory),
        Err(error) => Err(failed(error)),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Status> + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Status::internal(e.to_string()))?
}

async fn export(
    receiver: &Arc<Receiver>,
    uuid: Uuid,
    vault: &Vault,
    point: Option<PointId>,
    progress: &(dyn Fn(ExportProgress) + Send + Sync),
) -> Result<ExportReport, Status> {
    let of = Arc::clone(receiver);
    let (reader, name) = blocking(move || {
        let reader = of.store.read_point(&uuid.to_string(), point).map_err(|e| store_status(&e))?;
        let name = of.store.domains().into_iter().find(|domain| domain.uuid == uuid.to_string());
        Ok((Arc::new(reader), name.map(|domain| domain.name).unwrap_or_default()))
    })
    .await?;
    let directory: PathBuf = receiver.domain_directory(uuid);
    let begun = record(&directory);
    let life = match &begun {
        Some(record) => record.life,
        None => {
            let life = Uuid::new_v4();
            let empty =
                Record { life, url: String::new(), object: String::new(), point: String::new(), exported_unix_ns: 0 };
            write_record(&directory, &empty).map_err(|e| Status::internal(format!("{}: {e}", directory.display())))?;
            life
        }
    };
    let base = begun.filter(|record| record.url == vault.shown()).map(|record| record.object);
    let head = Head {
        domain: name,
        uuid,
        generation: reader.id().generation,
        epoch: reader.id().epoch,
        cut_unix_ns: reader.cut_unix_ns(),
        application: reader.application(),
        // What is exported says the rest.
        ..Head::default()
    };
    let guest = Guest {
        layout: reader.layout().clone(),
        domain_xml: reader.domain_xml().to_owned(),
        device_state: reader.device_state().to_vec(),
    };
    let config = &receiver.cold.config;
    let options = ExportOptions {
        parallel: config.parallel,
        bytes_per_second: config.bytes_per_second,
        base,
        ending: Arc::default(),
    };
    let source = Arc::new(Stored(Arc::clone(&reader)));
    let mut why = None;
    let report = {
        let exporting = vmdr_cold::export(vault, head, guest, source, &options, progress);
        tokio::pin!(exporting);
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                exported = &mut exporting => break exported,
                _ = look.tick() => {
                    why = why.or_else(|| reader.in_the_way());
                    if why.is_some() || receiver.cold.ending.load(Ordering::Relaxed) {
                        options.ending.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    let report = report.map_err(|error| match (&error, why) {
        (ColdError::Ended, Some(why)) => Status::resource_exhausted(format!(
            "the export was ended: {why}. What was sent is not sent again: run it again for the newest point, or raise the budget"
        )),
        _ => status(&error),
    })?;
    // Not after the domain was forgotten, or lost epochs, while it was exported.
    if record(&directory).is_some_and(|record| record.life == life) && !report.already {
        let done = Record {
            life,
            url: vault.shown().to_owned(),
            object: report.object.clone(),
            point: report.head.point(),
            exported_unix_ns: report.head.exported_unix_ns,
        };
        if let Err(error) = write_record(&directory, &done) {
            tracing::warn!(%uuid, %error, "cannot note what was exported: the next export reads everything");
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_stays_the_same_and_is_another_for_each_state_directory() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = owner(one.path()).unwrap();
        assert_eq!(owner(one.path()).unwrap(), first);
        assert_ne!(owner(other.path()).unwrap(), first);
        assert_eq!(std::fs::read_dir(one.path()).unwrap().count(), 1);
        std::fs::write(one.path().join(OWNER_FILE), "rubbish").unwrap();
        assert!(owner(one.path()).unwrap_err().message().contains("no UUID"));
    }
}
