//! A point of object storage becomes a standby.
//!
//! It comes in through the store's own door, as the seed of a new domain: checked, synced, and committed in one step when all
//! of it is there. Broken off, it leaves nothing that could be activated, and what it left is removed when it is begun again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tonic::Status;
use uuid::Uuid;
use vmdr_codec::{Digest, Encoder, PAGE_BYTES};
use vmdr_cold::{Array, Manifest, Piece, Restore, Vault, restore};

use crate::control::store_status;
use crate::daemon::Receiver;
use crate::store::{DomainSummary, Ingest, Kind, PartHead, PartTail, Store, StoreError};

use super::status;

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
        check_space(&of, &manifest)?;
        let id = uuid.to_string();
        let known = || of.store.domains().into_iter().find(|domain| domain.uuid == id);
        let was_there = known().is_some();
        let done = write(&of, &manifest, pieces, &progress);
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

fn check_space(receiver: &Receiver, manifest: &Manifest) -> Result<(), Status> {
    let chunk_bytes = u64::from(manifest.head.chunk_bytes);
    let needed = (manifest.names().count() as u64).saturating_mul(chunk_bytes);
    let free = receiver.free_bytes().map_err(|e| Status::internal(format!("measure the free space: {e}")))?;
    let usable = free.saturating_sub(receiver.config.space_reserve_bytes);
    if needed > usable {
        let what = format!(
            "the standby would take up to {needed} bytes, {usable} can be used: make room in the state directory"
        );
        return Err(Status::resource_exhausted(what));
    }
    Ok(())
}

fn write(
    receiver: &Receiver,
    manifest: &Manifest,
    pieces: Restore,
    progress: &dyn Fn(u64, u64),
) -> Result<u64, Status> {
    let (head, guest) = (&manifest.head, &manifest.guest);
    let failed = |error: StoreError| store_status(&error);
    let id = head.uuid.to_string();
    let mut ingest = receiver.store.open_stream(&id, &head.domain, head.generation).map_err(failed)?;
    let part = PartHead { generation: head.generation, epoch: head.epoch, part: 0, kind: Kind::Seed };
    ingest.begin(part).map_err(failed)?;
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
