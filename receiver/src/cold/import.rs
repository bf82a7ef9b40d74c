//! A point of object storage becomes a standby.
//!
//! It comes in through the store's own door, as the seed of a new domain: checked, synced, and committed in one step when all
//! of it is there. Broken off, it leaves nothing that could be activated, and what it left is removed when it is begun again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tonic::Status;
use uuid::Uuid;
use vmdr_codec::{Digest, Encoder, PAGE_BYTES};
use vmdr_cold::{Array, Head, Manifest, Piece, Restore, Vault, restore};

use crate::control::store_status;
use crate::daemon::Receiver;
use crate::store::{DomainSummary, IMPORTED_FILE, Ingest, Kind, PartHead, PartTail, Store, StoreError};

use super::status;

/// Bytes that are written between two looks at the free space.
const LOOK_BYTES: u64 = 64 << 20;

/// Refuses where there is something that would be overwritten.
pub fn check_free(store: &Store, uuid: Uuid) -> Result<(), Status> {
    let found: Option<DomainSummary> = store.domains().into_iter().find(|domain| domain.uuid == uuid.to_string());
    let Some(found) = found else { return Ok(()) };
    let name = if found.name.is_empty() { &found.uuid } else { &found.name };
    let refused = |what: String| Err(Status::failed_precondition(what));
    if found.receiving {
        return refused(format!(
            "{name} is being received here, or imported: an import would overwrite it. `vmdr unprotect` at its host first"
        ));
    }
    if found.frozen || found.position.epoch > 0 || found.trouble.is_some() {
        return refused(format!(
            "there is a standby of {name} here already (epoch {}), which an import would overwrite: `vmdr points {name}` shows \
             what can be activated; to have the imported point instead, `vmdr forget {name}` first, or import at another \
             receiver",
            found.position.epoch
        ));
    }
    Ok(())
}

/// Refuses a point of before what this host knows: it owned the guest, or was fenced, in a newer generation.
pub fn check_owner(receiver: &Receiver, head: &Head) -> Result<(), Status> {
    let record = receiver.ownerships.get(&head.uuid.to_string()).map_err(|e| Status::internal(e.to_string()))?;
    let Some(record) = record.filter(|record| record.generation > head.generation) else { return Ok(()) };
    Err(Status::failed_precondition(format!(
        "point {} of {} is of generation {}, but this host knows of generation {} ({}): the guest has run since, or runs, where that \
         one is owned. Import a newer point; or at another receiver; or, if the guest runs nowhere and what it did since is to be \
         given up, remove {}/{}.json first",
        head.point(),
        head.domain,
        head.generation,
        record.generation,
        record.describe(),
        receiver.ownerships.directories().0.display(),
        head.uuid,
    )))
}

/// Space that an import has been promised and has not used yet.
struct Promise<'a> {
    of: &'a Receiver,
    left_bytes: u64,
    /// Written since the last look.
    since_look: u64,
}

impl<'a> Promise<'a> {
    /// Refuses if it does not fit beside what other imports are going to write.
    fn new(of: &'a Receiver, needed_bytes: u64) -> Result<Self, Status> {
        let promised = of.cold.promised.fetch_add(needed_bytes, Ordering::SeqCst);
        let promise = Promise { of, left_bytes: needed_bytes, since_look: 0 };
        let usable = free_bytes(of)?.saturating_sub(of.config.space_floor_bytes()).saturating_sub(promised);
        if needed_bytes <= usable {
            return Ok(promise);
        }
        Err(Status::resource_exhausted(format!(
            "the standby would take up to {needed_bytes} bytes, {usable} can be used ({promised} are for other imports): make room in \
             the state directory"
        )))
    }

    /// So many bytes are written; from time to time it is looked whether others need the rest.
    fn used(&mut self, bytes: u64) -> Result<(), Status> {
        let used = bytes.min(self.left_bytes);
        self.left_bytes -= used;
        self.of.cold.promised.fetch_sub(used, Ordering::SeqCst);
        self.since_look += bytes;
        if self.since_look < LOOK_BYTES {
            return Ok(());
        }
        self.since_look = 0;
        let (free, floor) = (free_bytes(self.of)?, self.of.config.space_floor_bytes());
        if free < floor {
            return Err(Status::resource_exhausted(format!(
                "{free} bytes are free in the state directory, and with less than {floor} recovery points of other guests would be given \
                 up: the import was ended, make room and run it again"
            )));
        }
        Ok(())
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.of.cold.promised.fetch_sub(self.left_bytes, Ordering::SeqCst);
    }
}

fn free_bytes(receiver: &Receiver) -> Result<u64, Status> {
    receiver.free_bytes().map_err(|e| Status::internal(format!("measure the free space: {e}")))
}

/// Imports a point. Returns how many bytes its chunks had.
pub async fn run(
    receiver: &Arc<Receiver>,
    vault: &Vault,
    manifest: Manifest,
    progress: impl Fn(u64, u64) + Send + 'static,
) -> Result<u64, Status> {
    let manifest = Arc::new(manifest);
    let pieces = restore(vault, Arc::clone(&manifest), receiver.cold.config.parallel);
    let of = Arc::clone(receiver);
    let importing = tokio::task::spawn_blocking(move || {
        let uuid = manifest.head.uuid;
        check_free(&of.store, uuid)?;
        check_owner(&of, &manifest.head)?;
        let needed = (manifest.names().count() as u64).saturating_mul(u64::from(manifest.head.chunk_bytes));
        let mut promise = Promise::new(&of, needed)?;
        let id = uuid.to_string();
        let known = || of.store.domains().into_iter().find(|domain| domain.uuid == id);
        let was_there = known().is_some();
        let done = write(&of, &manifest, pieces, &mut promise, &progress);
        if done.is_err() {
            // What comes to this domain now is not imported. Where it stays, a generation is raised by more than it must be.
            let _ = std::fs::remove_file(of.domain_directory(uuid).join(IMPORTED_FILE));
        }
        // An agent that came in between has a standby here by now, or makes one.
        let left_over = || known().is_some_and(|domain| !domain.receiving && domain.position.epoch == 0);
        if done.is_err()
            && !was_there
            && left_over()
            && let Err(error) = of.store.forget(&id)
        {
            tracing::warn!(%uuid, %error, "what the broken-off import left is not removed");
        }
        done
    });
    importing.await.map_err(|e| Status::internal(e.to_string()))?
}

/// Notes that the standby was imported: an activation raises its generation far above what it was.
fn note(directory: &Path, head: &Head) -> Result<(), Status> {
    let path = directory.join(IMPORTED_FILE);
    let written = std::fs::write(&path, format!("{}\n", head.point()))
        .and_then(|()| std::fs::File::open(&path)?.sync_all())
        .and_then(|()| std::fs::File::open(directory)?.sync_all());
    written.map_err(|error| Status::internal(format!("{}: {error}", path.display())))
}

fn write(
    receiver: &Receiver,
    manifest: &Manifest,
    pieces: Restore,
    promise: &mut Promise<'_>,
    progress: &dyn Fn(u64, u64),
) -> Result<u64, Status> {
    let (head, guest) = (&manifest.head, &manifest.guest);
    let failed = |error: StoreError| store_status(&error);
    let id = head.uuid.to_string();
    let mut ingest = receiver.store.open_stream(&id, &head.domain, head.generation).map_err(failed)?;
    let part = PartHead { generation: head.generation, epoch: head.epoch, part: 0, kind: Kind::Seed };
    ingest.begin(part).map_err(failed)?;
    // Before there is anything to activate.
    note(&receiver.domain_directory(head.uuid), head)?;
    let mut out = Out { ingest, encoder: Encoder::new(), digest: Digest::new(), chunks: 0, bytes: 0 };
    let codec = |error: vmdr_codec::CodecError| Status::data_loss(format!("point {} of {id}: {error}", head.point()));
    out.encoder.layout(&guest.layout).map_err(codec)?;
    out.encoder.domain_xml(&guest.domain_xml).map_err(codec)?;
    // A piece counts when its array is dealt with up to it.
    let mut before = BTreeMap::new();
    let mut sum = 0;
    for array in &manifest.arrays {
        before.insert(array.array, sum);
        sum += array.bytes;
    }
    let mut read_bytes = 0;
    for piece in pieces {
        if receiver.cold.ending.load(Ordering::Relaxed) {
            return Err(status(&vmdr_cold::ColdError::Ended));
        }
        let Piece { array, offset, bytes } = piece.map_err(|error| status(&error))?;
        match array {
            Array::Ram(block) => {
                for (page, content) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                    // What is not sent is zero: the standby is a new one.
                    if let Ok(content) = <&[u8; PAGE_BYTES]>::try_from(content)
                        && content.iter().any(|byte| *byte != 0)
                    {
                        out.encoder.ram_page(block, offset / PAGE_BYTES as u64 + page as u64, content);
                    }
                }
            }
            Array::Disk(disk) => out.encoder.disk_data(disk, offset, &bytes),
        }
        read_bytes += bytes.len() as u64;
        out.pass().map_err(failed)?;
        promise.used(bytes.len() as u64)?;
        progress(before.get(&array).copied().unwrap_or(0) + offset + bytes.len() as u64, sum);
    }
    if !guest.device_state.is_empty() {
        out.encoder.device_state(&guest.device_state).map_err(codec)?;
    }
    out.end(head.cut_unix_ns, head.application).map_err(failed)?;
    Ok(read_bytes)
}

/// The seed as it goes into the store.
struct Out {
    ingest: Ingest,
    encoder: Encoder,
    digest: Digest,
    chunks: u32,
    bytes: u64,
}

impl Out {
    /// Passes on what is complete.
    fn pass(&mut self) -> Result<(), StoreError> {
        while let Some(payload) = self.encoder.take_full() {
            self.digest.update(&payload);
            self.bytes += payload.len() as u64;
            let xxh3 = vmdr_codec::chunk_hash(&payload);
            self.ingest.chunk(self.chunks, Bytes::from(payload), xxh3)?;
            self.chunks += 1;
        }
        Ok(())
    }

    fn end(mut self, cut_unix_ns: u64, application: bool) -> Result<(), StoreError> {
        let counts = self.encoder.finish();
        self.pass()?;
        let digest = self.digest.halves();
        let (chunks, payload_bytes) = (self.chunks, self.bytes);
        self.ingest.end(PartTail { chunks, payload_bytes, digest, last: true, cut_unix_ns, application, counts })?;
        Ok(())
    }
}
