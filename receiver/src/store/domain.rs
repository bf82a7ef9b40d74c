//! One domain's state: what is shared between its stream, the thread that applies, and whoever asks.
//!
//! Locks are taken in the order `ingest`, `standby`, `control`, `catalog`, `shared`; `catalog` and `shared` are never held over
//! I/O, so that asking for the position or the points never waits for a disk.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;
use vmdr_codec::Layout;
use vmdr_journal::{Control, Disk, Journal, JournalError, Part};

use super::apply::Applier;
use super::catalog::Catalog;
use super::check::PartCheck;
use super::images::StandbyFiles;
use super::retention::Retention;
use super::{Position, StoreError, StoreOptions};

/// How long a wait goes before it looks again whether it is still wanted.
const WAIT: Duration = Duration::from_millis(500);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Domain {
    pub uuid: Uuid,
    /// For messages: the UUID as text.
    pub id: String,
    pub dir: PathBuf,
    pub disk: Arc<dyn Disk>,
    /// Its files are encrypted: nothing but `disk` can read them.
    pub sealed: bool,
    /// Why nothing more is taken for it.
    pub refused: Option<String>,
    pub options: StoreOptions,
    pub ingest: Mutex<IngestState>,
    pub standby: Mutex<Option<Applier>>,
    pub control: Mutex<Control>,
    pub catalog: Mutex<Catalog>,
    pub shared: Mutex<Shared>,
    /// Anything in `shared` changed.
    pub changed: Condvar,
    pub thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the stream works on.
#[derive(Debug)]
pub(super) struct IngestState {
    pub journal: Journal,
    /// The layout of the newest durable epoch.
    pub layout: Option<Arc<Layout>>,
    pub open: Option<OpenEpoch>,
    pub part: Option<OpenPart>,
}

/// An epoch of which the last part is not durable.
#[derive(Debug)]
pub(super) struct OpenEpoch {
    pub generation: u64,
    pub epoch: u64,
    /// How many parts are durable.
    pub parts: u32,
    /// The layout after those.
    pub layout: Option<Arc<Layout>>,
    pub content: Content,
}

/// Where the parts of an open epoch are.
#[derive(Debug)]
pub(super) enum Content {
    /// In the journal; the payloads also here unless they are too many.
    Delta { parts: Vec<Part>, payloads: Option<Vec<Bytes>>, bytes: u64 },
    /// In a standby directory of their own, and whether that has a domain XML.
    Seed { files: Box<StandbyFiles>, dir: u64, has_xml: bool },
}

/// A part that has begun and not ended.
#[derive(Debug)]
pub(super) struct OpenPart {
    pub head: vmdr_journal::PartHead,
    pub check: PartCheck,
    pub payloads: Vec<Bytes>,
}

/// A durable epoch that waits to be applied.
#[derive(Debug)]
pub(super) struct Epoch {
    pub epoch: u64,
    pub cut_unix_ns: u64,
    pub parts: Vec<Part>,
    pub payloads: Option<Vec<Bytes>>,
    pub bytes: u64,
}

impl Epoch {
    /// Bytes written to disks, or zeroed.
    pub fn disk_bytes(&self) -> u64 {
        let counts = self.parts.iter().map(|part| part.tail.counts);
        counts.fold(0, |sum, counts| sum.saturating_add(counts.disk_bytes).saturating_add(counts.disk_zero_bytes))
    }

    /// Whether its cut is application-consistent.
    pub fn application(&self) -> bool {
        self.parts.last().is_some_and(|part| part.tail.application)
    }
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub name: String,
    pub position: Position,
    /// Generation of the newest durable epoch.
    pub point_generation: u64,
    pub cut_unix_ns: u64,
    pub backlog: VecDeque<Arc<Epoch>>,
    pub backlog_bytes: u64,
    /// The epoch up to which the standby is written, and up to which that is durable.
    pub applied: u64,
    pub synced: u64,
    /// Somebody waits for `synced` to reach the newest durable epoch.
    pub sync_wanted: bool,
    /// The history is near its budget, or the disk nearly full.
    pub alarm: Option<String>,
    /// Nothing more can go, and it is still too much: nothing more is accepted.
    pub over_budget: Option<String>,
    /// The lowest segment that the open epoch, or the next one, is in.
    pub open_segment: u64,
    /// The state directory failed: the domain must be opened anew.
    pub failed: Option<String>,
    /// Applying waits for space, how often it has begun to, and whether somebody wants it to try again at once.
    pub stalled: Option<String>,
    pub stalls: u64,
    pub retry_wanted: bool,
    pub damage: Option<String>,
    /// Checksums of the standby are being made: of so many bytes, of so many in all.
    pub unsummed: Option<(u64, u64)>,
    pub frozen: bool,
    /// The stream that may write; older ones may not.
    pub stream: u64,
    pub stream_open: bool,
    pub closing: bool,
}

impl Domain {
    pub fn ingest(&self) -> MutexGuard<'_, IngestState> {
        self.ingest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn standby(&self) -> MutexGuard<'_, Option<Applier>> {
        self.standby.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The standby, unless the domain has failed or was closed, also while its lock was waited for: its files may have been
    /// opened a second time then. As long as this is held it is not closed.
    pub fn live_standby(&self) -> Result<MutexGuard<'_, Option<Applier>>, StoreError> {
        let standby = self.standby();
        self.alive(&self.shared())?;
        Ok(standby)
    }

    pub fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The policy of this domain, or that of all.
    pub fn retention(&self) -> Retention {
        match &self.control().retention {
            Some((budget_bytes, tiers)) => Retention { budget_bytes: *budget_bytes, tiers: tiers.clone() },
            None => self.options.retention.clone(),
        }
    }

    pub fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, for a bounded time.
    pub fn wait<'a>(&self, shared: MutexGuard<'a, Shared>) -> MutexGuard<'a, Shared> {
        self.wait_at_most(shared, WAIT)
    }

    /// Waits for a change, no longer than `most`.
    pub fn wait_at_most<'a>(&self, shared: MutexGuard<'a, Shared>, most: Duration) -> MutexGuard<'a, Shared> {
        self.changed.wait_timeout(shared, most.min(WAIT)).unwrap_or_else(PoisonError::into_inner).0
    }

    /// The directory of `standby.N`.
    pub fn standby_dir(&self, number: u64) -> PathBuf {
        standby_dir(&self.dir, number)
    }

    pub fn journal_dir(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// Turns a disk's error into the store's; one after which nothing is certain makes the domain fail.
    pub fn failure(&self, error: JournalError) -> StoreError {
        let error = StoreError::of(&self.id, error);
        if !matches!(error, StoreError::Full { .. }) {
            self.fail(&error);
        }
        error
    }

    /// From now on everything is refused until the domain is opened anew.
    pub fn fail(&self, error: &StoreError) {
        let mut shared = self.shared();
        if shared.failed.is_none() {
            tracing::error!(domain = %self.id, %error, "the domain's state failed, it is opened anew with the next stream");
            shared.failed = Some(error.to_string());
        }
        self.changed.notify_all();
    }

    /// Changes the control record durably. After an error the old one is in force.
    pub fn change_control(&self, change: impl FnOnce(&mut Control)) -> Result<(), StoreError> {
        let mut control = self.control();
        let mut new = control.clone();
        change(&mut new);
        if let Err(error) = new.store(&*self.disk, &self.dir) {
            // Only if it came no further than preparing the new record is it certain which one is in force.
            let prepared = matches!(&error, JournalError::Io { action: "create" | "write", .. });
            let full = error.is_full();
            let error = StoreError::of(&self.id, error);
            if !(prepared && full) {
                self.fail(&error);
            }
            return Err(error);
        }
        *control = new;
        Ok(())
    }

    /// Stops the thread that applies and refuses everything from now on. When this returns nothing of this domain touches
    /// its files any more, also not a stream that is still held somewhere: they may be opened a second time.
    pub fn close(&self) {
        self.shared().closing = true;
        self.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(domain = %self.id, "the thread that applies epochs panicked");
        }
        // Calls that had begun before it was closed.
        drop(self.ingest());
        drop(self.standby());
    }

    /// Waits until the epoch that is the newest durable one now is applied and synced; later ones may be, too.
    pub fn wait_synced(&self) -> Result<(), StoreError> {
        let mut shared = self.shared();
        let stalls = shared.stalls;
        let (epoch, generation) = (shared.position.epoch, shared.point_generation);
        loop {
            self.alive(&shared)?;
            if shared.position.epoch == 0 {
                return Err(StoreError::NoPoint(self.id.clone()));
            }
            // A seed of another generation counts anew: then it is the whole of what is durable that has to be synced.
            let target = if shared.point_generation == generation { epoch } else { shared.position.epoch };
            if shared.synced >= target {
                return Ok(());
            }
            if let Some(why) = shared.stalled.as_ref().filter(|_| shared.stalls > stalls) {
                let (applied, durable) = (shared.applied, shared.position.epoch);
                let what = format!("epoch {applied} is applied, {durable} is durable, between them: {why}");
                return Err(StoreError::Full { domain: self.id.clone(), what });
            }
            shared.sync_wanted = true;
            shared.retry_wanted = true;
            self.changed.notify_all();
            shared = self.wait(shared);
        }
    }

    /// Whether the domain can still be used.
    pub fn alive(&self, shared: &Shared) -> Result<(), StoreError> {
        if let Some(why) = &shared.failed {
            return Err(StoreError::Io { domain: self.id.clone(), what: why.clone() });
        }
        if shared.closing {
            return Err(StoreError::Superseded(self.id.clone()));
        }
        Ok(())
    }
}

/// The directory of `standby.N` in a domain's directory.
pub(super) fn standby_dir(domain: &Path, number: u64) -> PathBuf {
    domain.join(format!("standby.{number}"))
}
