//! A recovery point comes back from a bucket: its pieces in order, each checked.
//!
//! A bounded number of chunks is fetched ahead; opening (decryption, decompression, comparison with the name) happens where
//! the pieces are taken.
//!
//! The end of the pieces is told from the end of whoever fetches them: if fewer came than the manifest lists, the last word is
//! an error. What has no piece is zero, so a point cut short would otherwise look whole.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::chunk::{self, OBJECT_BYTES_MAX};
use crate::error::ColdError;
use crate::manifest::{Array, Manifest, Name};
use crate::vault::Vault;

/// Chunks fetched that wait to be taken.
const QUEUE_CHUNKS: usize = 4;
/// Fetches at once, at most, whatever is configured.
const PARALLEL_MAX: usize = 64;

/// A piece of an array; what is in no piece is zero.
#[derive(Debug)]
pub struct Piece {
    /// Which array.
    pub array: Array,
    /// Where in it, in bytes.
    pub offset: u64,
    /// What is there.
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
struct Fetched {
    wanted: Wanted,
    object: Result<Bytes, ColdError>,
}

#[derive(Debug, Clone, Copy)]
struct Wanted {
    array: Array,
    offset: u64,
    bytes: usize,
    name: Name,
}

/// The content of a point, piece by piece. Taken where it may block.
#[derive(Debug)]
pub struct Restore {
    vault: Vault,
    /// Pieces that are still to come.
    left: u64,
    fetched: mpsc::Receiver<Fetched>,
    fetching: JoinHandle<()>,
}

/// Begins to fetch a point's chunks, `parallel` at a time.
pub fn restore(vault: &Vault, manifest: Arc<Manifest>, parallel: usize) -> Restore {
    let (queue, fetched) = mpsc::channel(QUEUE_CHUNKS);
    let left = manifest.names().count() as u64;
    let of = vault.clone();
    let fetching = tokio::spawn(async move {
        let chunk_bytes = u64::from(manifest.head.chunk_bytes);
        let mut fetches = FuturesOrdered::new();
        for array in &manifest.arrays {
            for (number, name) in array.chunks.iter().enumerate() {
                let Some(name) = *name else { continue };
                let offset = number as u64 * chunk_bytes;
                let bytes = (array.bytes - offset).min(chunk_bytes) as usize;
                let (of, wanted) = (of.clone(), Wanted { array: array.array, offset, bytes, name });
                fetches.push_back(async move { Fetched { wanted, object: fetch(&of, &wanted).await } });
                if fetches.len() >= parallel.clamp(1, PARALLEL_MAX)
                    && let Some(next) = fetches.next().await
                    && !pass(&queue, next).await
                {
                    return;
                }
            }
        }
        while let Some(next) = fetches.next().await {
            if !pass(&queue, next).await {
                return;
            }
        }
    });
    Restore { vault: vault.clone(), left, fetched, fetching }
}

/// Whether there is a use in going on.
async fn pass(queue: &mpsc::Sender<Fetched>, next: Fetched) -> bool {
    let failed = next.object.is_err();
    queue.send(next).await.is_ok() && !failed
}

async fn fetch(vault: &Vault, wanted: &Wanted) -> Result<Bytes, ColdError> {
    let object = chunk::object(&wanted.name);
    let found = vault.bucket.get(&vault.object(&object), OBJECT_BYTES_MAX).await?;
    let advice = ": this point cannot be restored; choose another one, or export it again where it still is";
    found.ok_or(ColdError::Missing { object, advice })
}

/// An export sends what is missing and does not look into what is there.
fn advised(error: ColdError) -> ColdError {
    match error {
        ColdError::Damaged { object, what } => {
            let advice = "choose another point, or delete the object and export this one again where it still is";
            ColdError::Damaged { object, what: format!("{what}; {advice}") }
        }
        other => other,
    }
}

impl Iterator for Restore {
    type Item = Result<Piece, ColdError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Some(Fetched { wanted, object }) = self.fetched.blocking_recv() else {
            // The runtime ends, or the task has panicked.
            return (std::mem::take(&mut self.left) > 0).then_some(Err(ColdError::Ended));
        };
        // After an error nothing more comes, and it has been said why.
        self.left = if object.is_ok() { self.left.saturating_sub(1) } else { 0 };
        let Wanted { array, offset, bytes, name } = wanted;
        Some(object.and_then(|object| {
            let opened = chunk::open(&self.vault.key, &self.vault.uuid.into_bytes(), &name, bytes, &object);
            Ok(Piece { array, offset, bytes: opened.map_err(advised)? })
        }))
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        self.fetching.abort();
    }
}
