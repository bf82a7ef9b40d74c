//! A recovery point goes to a bucket.
//!
//! One thread reads the point, chunk by chunk, names each by its content, and seals those that the bucket lacks; a bounded
//! number of uploads runs beside it. Of an older point that the bucket has, the chunks are taken over unread where the caller
//! says that nothing changed since. The manifest comes last.
//!
//! Broken off, an export has left chunks and no manifest: nothing is offered. The next one finds those chunks and does not send
//! them again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::chunk;
use crate::error::ColdError;
use crate::limit::Limit;
use crate::manifest::{Array, ArrayChunks, Guest, Head, Manifest, Name, chunk_count};
use crate::mark::{Mark, Stage};
use crate::prune::BROKEN_OFF_AFTER;
use crate::vault::{StoredChunk, Vault};
use crate::{CHUNK_BYTES, keys::DataKey};

/// Sealed chunks that wait for an upload.
const QUEUE_CHUNKS: usize = 4;
/// Uploads at once, at most, whatever is configured: each holds a chunk.
const PARALLEL_MAX: usize = 64;
/// Between two reports of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// What reading a point can fail with.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// A range of an array: where it begins, and how long it is, in bytes.
pub type Range = (Array, u64, u64);

/// A recovery point that can be read. Called where it may block.
pub trait Source: Send + Sync {
    /// Fills `buffer` with what an array has from `offset` on; it does not go beyond the array's end.
    fn read(&self, array: Array, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError>;
    /// Everything from `offset` up to what this returns is zero; the array's length if nothing more comes.
    fn data_from(&self, array: Array, offset: u64) -> Result<u64, SourceError>;
    /// Where this point may be other than the older one that the caller of [`export`] named; `None`: unknown.
    fn changes(&self, base: &Head) -> Result<Option<Vec<Range>>, SourceError>;
}

/// How to export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Uploads at the same time.
    pub parallel: usize,
    /// Bytes sent per second; 0: no limit.
    pub bytes_per_second: u64,
    /// The manifest of an older point that this receiver has exported: where nothing changed since, nothing is read.
    pub base: Option<String>,
    /// Set to end it.
    pub ending: Arc<AtomicBool>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { parallel: 4, bytes_per_second: 0, base: None, ending: Arc::default() }
    }
}

/// How far an export is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExportProgress {
    /// Bytes of the guest that are dealt with.
    pub done_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
}

/// What an export did.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportReport {
    /// Which point.
    pub head: Head,
    /// Its manifest's name within the domain.
    pub object: String,
    /// It was there already: nothing was done.
    pub already: bool,
    /// The manifest it was built on.
    pub base: Option<String>,
    /// Bytes of the guest that were read.
    pub read_bytes: u64,
    /// Chunks sent.
    pub sent_chunks: u64,
    /// Bytes sent, manifest included.
    pub sent_bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// Exports a point. `head` has what identifies it; the rest is filled in.
pub async fn export(
    vault: &Vault,
    mut head: Head,
    guest: Guest,
    source: Arc<dyn Source>,
    options: &ExportOptions,
    progress: &(dyn Fn(ExportProgress) + Send + Sync),
) -> Result<ExportReport, ColdError> {
    let begun = Instant::now();
    head.chunk_bytes = CHUNK_BYTES;
    let object = head.object();
    let there = already(vault, &object).await?;
    let present = present(vault).await?;
    if let Some(manifest) = there
        && manifest.names().all(|name| present.contains(name))
    {
        let (head, took) = (manifest.head, begun.elapsed());
        let (base, already) = (None, true);
        return Ok(ExportReport { head, object, already, base, read_bytes: 0, sent_chunks: 0, sent_bytes: 0, took });
    }
    vault.check_room().await?;
    let (base, changes) = base(vault, &source, options).await?;
    let base_object = base.as_ref().map(|base| base.head.object());

    let total_bytes = guest.arrays().map(|(_, bytes)| bytes).sum();
    let counters = Arc::new(Counters::default());
    let (queue, mut sealed) = mpsc::channel::<(Name, Bytes)>(QUEUE_CHUNKS);
    let reader = Reader {
        key: vault.key.clone(),
        owner: vault.uuid.into_bytes(),
        source,
        guest: guest.clone(),
        base,
        changes,
        present,
        queue,
        counters: counters.clone(),
        ending: options.ending.clone(),
    };
    let reading = tokio::task::spawn_blocking(move || reader.run());

    let mut uploads = JoinSet::new();
    let mut limit = Limit::new(options.bytes_per_second);
    let parallel = options.parallel.clamp(1, PARALLEL_MAX);
    let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
    let mut sent_chunks = 0;
    let tell = |sent_bytes| {
        let done_bytes = counters.done.load(Ordering::Relaxed);
        progress(ExportProgress { done_bytes, total_bytes, sent_bytes });
    };
    let mut sent_bytes = 0;
    loop {
        tokio::select! {
            _ = tick.tick() => tell(sent_bytes),
            Some(done) = uploads.join_next(), if !uploads.is_empty() => uploaded(done)?,
            next = sealed.recv(), if uploads.len() < parallel => {
                let Some((name, content)) = next else { break };
                limit.take(content.len() as u64).await;
                sent_chunks += 1;
                sent_bytes += content.len() as u64;
                let (bucket, path) = (vault.bucket.clone(), vault.object(&chunk::object(&name)));
                uploads.spawn(async move { bucket.put(&path, content).await });
            }
        }
    }
    while let Some(done) = uploads.join_next().await {
        uploaded(done)?;
    }
    let arrays = reading.await.map_err(|e| ColdError::Source(Box::new(e)))??;
    tell(sent_bytes);

    let size =
        |wanted: fn(&Array) -> bool| guest.arrays().filter(|(array, _)| wanted(array)).map(|(_, n)| n).sum::<u64>();
    head.ram_bytes = size(|array| matches!(array, Array::Ram(_)));
    head.disk_bytes = size(|array| matches!(array, Array::Disk(_)));
    head.exporter = env!("CARGO_PKG_VERSION").to_owned();
    head.exported_unix_ns = now_unix_ns();
    let mut manifest = Manifest { head, guest, arrays };
    manifest.head.chunks = manifest.names().count() as u64;
    let content = manifest.seal(&vault.key)?;
    sent_bytes += content.len() as u64;
    limit.take(content.len() as u64).await;
    vault.check_key().await?;
    undisturbed(vault, &manifest).await?;
    if options.ending.load(Ordering::Relaxed) {
        return Err(ColdError::Ended);
    }
    vault.bucket.put(&vault.object(&object), content.into()).await?;
    Ok(ExportReport {
        head: manifest.head,
        object,
        already: false,
        base: base_object,
        read_bytes: counters.read.load(Ordering::Relaxed),
        sent_chunks,
        sent_bytes,
        took: begun.elapsed(),
    })
}

/// The point's manifest, if the bucket has it whole. One that is damaged is written again.
async fn already(vault: &Vault, object: &str) -> Result<Option<Manifest>, ColdError> {
    if !vault.has_manifest(object).await? {
        return Ok(None);
    }
    match vault.manifest(object).await {
        Ok(manifest) => Ok(Some(manifest)),
        Err(error @ (ColdError::Damaged { .. } | ColdError::Missing { .. })) => {
            tracing::warn!(%error, "the point is exported again");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn uploaded(done: Result<Result<(), ColdError>, tokio::task::JoinError>) -> Result<(), ColdError> {
    done.unwrap_or_else(|e| Err(ColdError::Source(Box::new(e))))
}

pub(crate) fn now_unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Which chunks need not be sent. In this order, so that a chunk that is marked in between is found at the end.
async fn present(vault: &Vault) -> Result<HashSet<Name>, ColdError> {
    let mark = vault.mark().await?;
    let chunks = vault.chunks().await?;
    let doomed = doomed(mark.as_ref());
    // One that was broken off or emptied has its name and not its content: it is sent again.
    let lasting = |(name, chunk): (Name, StoredChunk)| lasting(&name, &chunk, &doomed).then_some(name);
    Ok(chunks.into_iter().filter_map(lasting).collect())
}

/// What is going to be deleted, unless it was written after this time.
fn doomed(mark: Option<&Mark>) -> HashMap<Name, u64> {
    let names = mark.into_iter().flat_map(|mark| mark.doomed.iter().map(|name| (*name, mark.marked_unix_ns)));
    names.collect()
}

/// Whether a chunk can be what its name says, and is not deleted: a sweep spares what is not older than its mark.
fn lasting(name: &Name, chunk: &StoredChunk, doomed: &HashMap<Name, u64>) -> bool {
    chunk.plausible && doomed.get(name).is_none_or(|marked| chunk.written_unix_ns >= *marked)
}

type Changes = HashMap<Array, HashSet<u64>>;

/// The manifest that may be built on, and which chunks of it may be other.
async fn base(
    vault: &Vault,
    source: &Arc<dyn Source>,
    options: &ExportOptions,
) -> Result<(Option<Manifest>, Changes), ColdError> {
    let Some(object) = &options.base else { return Ok((None, Changes::new())) };
    let base = match vault.manifest(object).await {
        Ok(base) if base.head.chunk_bytes == CHUNK_BYTES => base,
        Err(error @ ColdError::Store { .. }) => return Err(error),
        // Pruned, damaged: then everything is read.
        Ok(_) => return Ok((None, Changes::new())),
        Err(error) => {
            tracing::warn!(%error, "the last export is not built on: everything is read");
            return Ok((None, Changes::new()));
        }
    };
    let (source, of) = (source.clone(), base.head.clone());
    let changes = tokio::task::spawn_blocking(move || source.changes(&of)).await;
    let changes = changes.map_err(|e| ColdError::Source(Box::new(e)))?.map_err(ColdError::Source)?;
    let Some(changes) = changes else { return Ok((None, Changes::new())) };
    let mut changed = Changes::new();
    let chunk = u64::from(CHUNK_BYTES);
    for (array, offset, bytes) in changes {
        if bytes > 0 {
            changed.entry(array).or_default().extend(offset / chunk..=(offset + bytes - 1) / chunk);
        }
    }
    Ok((Some(base), changed))
}

/// Refuses a manifest some chunk of which may be deleted before it is there, or is already. See [`crate::prune`]. It always looks
/// at the chunks: in a long export a whole prune may have come and gone, of which no mark is left.
async fn undisturbed(vault: &Vault, manifest: &Manifest) -> Result<(), ColdError> {
    let disturbed = || ColdError::Disturbed { domain: manifest.head.domain.clone() };
    let now = vault.mark().await?;
    let fresh = |mark: &Mark| now_unix_ns().saturating_sub(mark.written_unix_ns) < BROKEN_OFF_AFTER.as_nanos() as u64;
    if now.as_ref().is_some_and(|mark| mark.stage == Stage::Sweeping && fresh(mark)) {
        return Err(disturbed());
    }
    let (doomed, chunks) = (doomed(now.as_ref()), vault.chunks().await?);
    let is_lasting = |name: &Name| chunks.get(name).is_some_and(|chunk| lasting(name, chunk, &doomed));
    if manifest.names().all(is_lasting) { Ok(()) } else { Err(disturbed()) }
}

#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    read: AtomicU64,
}

/// Reads a point and seals what is missing.
struct Reader {
    key: DataKey,
    owner: [u8; 16],
    source: Arc<dyn Source>,
    guest: Guest,
    base: Option<Manifest>,
    changes: Changes,
    present: HashSet<Name>,
    queue: mpsc::Sender<(Name, Bytes)>,
    counters: Arc<Counters>,
    ending: Arc<AtomicBool>,
}

impl Reader {
    fn run(mut self) -> Result<Vec<ArrayChunks>, ColdError> {
        let all: Vec<(Array, u64)> = self.guest.arrays().collect();
        all.into_iter().map(|(array, bytes)| self.array(array, bytes)).collect()
    }

    fn array(&mut self, array: Array, bytes: u64) -> Result<ArrayChunks, ColdError> {
        let base = self.base.as_ref().and_then(|base| {
            let same = base.guest.title(array) == self.guest.title(array);
            let found = base.arrays.iter().find(|of| of.array == array && of.bytes == bytes && same);
            found.map(|of| of.chunks.clone())
        });
        let changed = self.changes.remove(&array).unwrap_or_default();
        let count = chunk_count(bytes, CHUNK_BYTES);
        let mut chunks = Vec::with_capacity(count as usize);
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        let mut data = 0;
        for number in 0..count {
            if self.ending.load(Ordering::Relaxed) || self.queue.is_closed() {
                return Err(ColdError::Ended);
            }
            let offset = number * u64::from(CHUNK_BYTES);
            let length = (bytes - offset).min(u64::from(CHUNK_BYTES)) as usize;
            let taken_over = base.as_ref().and_then(|base| {
                let name = base.get(number as usize)?;
                let there = name.is_none_or(|name| self.present.contains(&name));
                (there && !changed.contains(&number)).then_some(*name)
            });
            let chunk = match taken_over {
                Some(name) => name,
                None => {
                    if data <= offset {
                        data = self.source.data_from(array, offset).map_err(ColdError::Source)?;
                    }
                    if data >= offset + length as u64 { None } else { self.read(array, offset, &mut buffer[..length])? }
                }
            };
            chunks.push(chunk);
            self.counters.done.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(ArrayChunks { array, bytes, chunks })
    }

    fn read(&mut self, array: Array, offset: u64, buffer: &mut [u8]) -> Result<Option<Name>, ColdError> {
        self.source.read(array, offset, buffer).map_err(ColdError::Source)?;
        self.counters.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        if buffer.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let name = Name(self.key.name(buffer));
        if self.present.insert(name) {
            let object = chunk::seal(&self.key, &self.owner, &name, buffer)?;
            // Nobody takes them any more when an upload has failed; that error is the one to tell.
            self.queue.blocking_send((name, object.into())).map_err(|_| ColdError::Ended)?;
        }
        Ok(Some(name))
    }
}
