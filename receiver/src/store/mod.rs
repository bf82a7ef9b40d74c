//! What the receiver keeps of each domain: journal, standby, control record.
//!
//! The store is synchronous: a daemon calls it where it may block. What it guarantees, of a disk that keeps what was synced:
//!
//! - [`Ingest::end`] returns only after the part is durable; after a crash at any instant it is still there.
//! - [`Store::recovery_point`] is always a whole durable epoch, the newest one, never a mixture; a seed under way leaves
//!   the one before it untouched until the seed is whole.
//! - `cut >= sent >= durable >= applied >= synced`: what is acknowledged is durable in the journal, the standby may be
//!   behind it, and the journal is kept from what is synced into the standby on.
//! - Damage to the journal never makes a mixture of the standby: durable epochs are applied in batches, and how far a batch
//!   goes is persisted before it begins. If later the journal does not reach that far, the standby is not offered.
//! - A generation is persisted before it is in force; an older one is refused from then on.
//! - Bytes from a peer or from the disk never panic here; damage concerns its domain only and is reported.
//!
//! On disk, below the state directory (`docs/journal.md` has the formats):
//! ```text
//! lock                                held while a receiver works here
//! UUID/key                            the domain's data key, if it is encrypted: then all of the following is
//! UUID/control                        what the rest contains
//! UUID/journal/NNNNNNNN.seg           durable epochs that may not be in the standby yet
//! UUID/standby.N/ram/I.img            RAM block number I
//! UUID/standby.N/disk/TARGET.raw      a disk
//! UUID/standby.N/{device-E.state,layout-E,domain-E.xml}   as of epoch E
//! UUID/standby.N/history/NNNNNNNN.seg what leads back from the standby to older points
//! UUID/standby.N/kept                 somebody else needs the directory: it is not removed
//! UUID/verified                       when points were last verified
//! UUID/exported                       which point was last sent to object storage, see `cold`
//! ```

mod access;
mod apply;
mod base;
mod catalog;
mod check;
mod domain;
mod error;
mod flaws;
mod images;
mod ingest;
pub mod inspect;
mod pending;
mod points;
mod reader;
mod recover;
mod rest;
mod retention;
mod standby;
mod sums;
#[cfg(test)]
mod tests;
mod thin;
mod verified;
mod verify;
mod wire;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use vmdr_journal::{Disk, FsDisk, JournalError, LockGuard};

use domain::Domain;

pub use access::Access;
pub use base::{Base, Fill};
pub use catalog::PointId;
pub use error::StoreError;
pub use ingest::Ingest;
pub use points::{DiskImage, GivenUp, Point, RamImage, RecoveryPoint, Verified, VerifiedImage};
pub use reader::{Change, PointReader};
pub use rest::{KEY_FILE, Keyring};
pub use retention::Retention;
pub use thin::floor_bytes;
pub use verify::{Progress, Scope, Verdict, Verification};
pub use vmdr_journal::{Array, Kind, PartHead, PartTail, Tier};
pub use wire::{part_head, part_tail};

/// A file in a standby's directory that keeps it from being removed: disks of a guest that ran here lie over it.
pub const KEPT: &str = "kept";
/// Which point was last sent to object storage. It is removed when epochs are lost: their numbers then come again.
pub(crate) const EXPORTED_FILE: &str = "exported";
/// Who this receiver is to others that prune the same object storage; in the state directory.
pub(crate) const OWNER_FILE: &str = "cold-owner";
/// Directory of the records of groups; in the state directory.
pub(crate) const GROUPS: &str = "groups";
/// The standby came from object storage, where nobody knows which generation the guest has elsewhere.
pub(crate) const IMPORTED_FILE: &str = "imported";
/// Prefix of a domain's directory while it is being removed.
const FORGOTTEN: &str = ".forgotten-";

/// The largest generation and epoch taken from a peer: room to count on, whatever it sends.
pub(crate) const NUMBER_MAX: u64 = u64::MAX / 2;

/// How often the newest point is looked for while others come.
const NEWEST_TRIES: u32 = 8;

/// How a store works. The defaults suit some ten domains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Bytes that must stay free where the state directory is: no part begins when there are fewer.
    pub space_reserve_bytes: u64,
    /// Payload bytes durable but not applied, per domain, from which on the next part waits.
    pub backlog_bytes_max: u64,
    /// Payload bytes durable but not applied from which on they are applied. Less than `backlog_bytes_max`.
    pub apply_bytes: u64,
    /// The longest that durable epochs wait to be applied.
    pub apply_interval: Duration,
    /// Between tries to apply when there is no space.
    pub retry_interval: Duration,
    /// Length of a journal segment from which on no further part goes into it.
    pub segment_bytes: u64,
    /// The same for sets of the history.
    pub history_segment_bytes: u64,
    /// Which points are kept, of a domain that has no policy of its own.
    pub retention: Retention,
    /// The keys that domains are encrypted under; the default: none, new domains are stored in the clear.
    pub keys: Keyring,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            space_reserve_bytes: 256 << 20,
            backlog_bytes_max: 128 << 20,
            apply_bytes: 32 << 20,
            apply_interval: Duration::from_secs(1),
            retry_interval: Duration::from_secs(1),
            segment_bytes: vmdr_journal::SEGMENT_BYTES,
            history_segment_bytes: vmdr_journal::HISTORY_SEGMENT_BYTES,
            retention: Retention::default(),
            keys: Keyring::default(),
        }
    }
}

/// How far a domain has come. All zero: nothing is stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// The highest generation seen.
    pub generation: u64,
    /// The newest durable whole epoch; 0: none.
    pub epoch: u64,
    /// An epoch of which some parts are durable but not the last one; 0: none.
    pub open_epoch: u64,
    /// How many of its parts, from 0, are durable without a gap.
    pub open_parts: u32,
}

/// A part is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// Its generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Its number.
    pub part: u32,
    /// Whether the epoch is whole with it.
    pub last: bool,
}

/// A domain in a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainSummary {
    /// The domain's UUID.
    pub uuid: String,
    /// Its name when last heard of; empty if its control record cannot be read.
    pub name: String,
    /// How far it has come.
    pub position: Position,
    /// Generation of the recovery point.
    pub point_generation: u64,
    /// Wall clock of the protected host at the recovery point's cut.
    pub cut_unix_ns: u64,
    /// Up to which epoch the standby is written.
    pub applied_epoch: u64,
    /// Payload bytes that are durable but not applied.
    pub backlog_bytes: u64,
    /// Bytes that all of it takes up on the disk.
    pub stored_bytes: u64,
    /// A stream is open.
    pub receiving: bool,
    /// A guest runs on the standby.
    pub frozen: bool,
    /// How many recovery points there are.
    pub points: u64,
    /// Bytes that older points take up, and how many they may.
    pub history_bytes: u64,
    /// See `history_bytes`.
    pub history_budget_bytes: u64,
    /// Older points will soon have to go, or have to already.
    pub alarm: Option<String>,
    /// What of the standby is damaged.
    pub damage: Option<String>,
    /// Recovery points that are known to be damaged.
    pub damaged_points: u64,
    /// When a point was last found to be sound.
    pub verified_unix_ns: Option<u64>,
    /// Checksums of the standby are being made: of so many bytes, of so many in all.
    pub unsummed: Option<(u64, u64)>,
    /// Why the domain cannot be used, or what is damaged, or why it does not get on.
    pub trouble: Option<String>,
}

/// A state directory. Cloned, it is the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    options: StoreOptions,
    slots: Mutex<HashMap<Uuid, Arc<Slot>>>,
    _lock: Box<dyn LockGuard>,
}

/// A domain's place. Its lock is held while the domain is opened, which may take as long as reading its journal.
#[derive(Debug)]
struct Slot(Mutex<SlotState>);

#[derive(Debug)]
enum SlotState {
    Absent,
    Open(Arc<Domain>),
    /// It could not be opened, for this reason.
    Broken(String),
}

impl Store {
    /// Opens the state directory `dir`, making it if need be, with all domains in it. One that cannot be opened is reported
    /// by [`Store::domains`] and keeps nobody else from working.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(FsDisk), dir, options)
    }

    /// [`Store::open`] on another disk than the file system.
    pub fn open_on(disk: Arc<dyn Disk>, dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let of = |error| StoreError::of("all", error);
        if let Err(error) = disk.list(dir)
            && error.kind() == std::io::ErrorKind::NotFound
        {
            disk.create_dir_all(dir).map_err(JournalError::io("create", dir)).map_err(of)?;
        }
        // Also of one that is there: who made it may have failed to do this.
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent).map_err(JournalError::io("sync", parent)).map_err(of)?;
        }
        let lock = match disk.lock(&dir.join("lock")) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(StoreError::Locked(dir.display().to_string()));
            }
            other => other.map_err(JournalError::io("lock", dir)).map_err(of)?,
        };
        let names = disk.list(dir).map_err(JournalError::io("list", dir)).map_err(of)?;
        let inner = Inner { dir: dir.to_owned(), disk, options, slots: Mutex::new(HashMap::new()), _lock: lock };
        let store = Self { inner: Arc::new(inner) };
        for name in names {
            if name.starts_with(FORGOTTEN) {
                let path = dir.join(&name);
                store.inner.disk.remove_dir_all(&path).map_err(JournalError::io("remove", &path)).map_err(of)?;
            } else if let Ok(uuid) = canonical(&name) {
                let slot = store.slot(uuid);
                let mut state = slot.lock();
                if let Err(error) = store.open_slot(uuid, &mut state, None) {
                    tracing::error!(domain = %uuid, %error, "the domain cannot be opened");
                }
            } else if !["lock", OWNER_FILE, GROUPS].contains(&&*name) {
                tracing::warn!(%name, dir = %dir.display(), "this is not of vmdr and is left alone");
            }
        }
        Ok(store)
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// All domains, in order of their UUIDs.
    pub fn domains(&self) -> Vec<DomainSummary> {
        let mut slots: Vec<(Uuid, Arc<Slot>)> = self.slots().iter().map(|(uuid, slot)| (*uuid, slot.clone())).collect();
        slots.sort_by_key(|(uuid, _)| *uuid);
        slots.into_iter().filter_map(|(uuid, slot)| self.summary(uuid, &slot)).collect()
    }

    /// How far a domain has come; all zero if nothing is stored of it.
    pub fn position(&self, uuid: &str) -> Result<Position, StoreError> {
        match self.domain(uuid) {
            Ok(domain) => Ok(domain.shared().position),
            Err(StoreError::Unknown(_)) => Ok(Position::default()),
            Err(other) => Err(other),
        }
    }

    /// Opens a stream into a domain, which is begun if nothing is stored of it. Generation 0 takes the stored one. An older
    /// stream of the domain is cut off. A domain that failed before is opened anew.
    pub fn open_stream(&self, uuid: &str, name: &str, generation: u64) -> Result<Ingest, StoreError> {
        let uuid = parse(uuid)?;
        let slot = self.slot(uuid);
        let mut state = slot.lock();
        let failed = match &*state {
            SlotState::Open(domain) => {
                let shared = domain.shared();
                shared.failed.is_some() || shared.closing
            }
            _ => true,
        };
        if failed {
            self.open_slot(uuid, &mut state, Some((name, generation.max(1))))?;
        }
        let SlotState::Open(domain) = &*state else { return Err(StoreError::Unknown(uuid.to_string())) };
        if let Some(what) = &domain.refused {
            return Err(StoreError::Sealed { domain: uuid.to_string(), what: what.clone() });
        }
        domain.open_stream(name, generation)
    }

    /// Makes `generation` the oldest that may write, durably. When this returns older streams are cut off. A lower one than
    /// the stored changes nothing. Returns the one in force.
    pub fn raise_generation(&self, uuid: &str, generation: u64) -> Result<u64, StoreError> {
        self.domain(uuid)?.raise_generation(generation)
    }

    /// Takes the newest recovery point over into a newer generation, whose owner goes on from it.
    pub fn carry_on(&self, uuid: &str, generation: u64) -> Result<(), StoreError> {
        self.domain(uuid)?.carry_on(generation)
    }

    /// Freezes the standby, because a guest is to run on it, or lets go of it: durable when this returns. Freezing cuts off
    /// the stream, and waits until the newest durable epoch is applied and synced.
    pub fn set_frozen(&self, uuid: &str, frozen: bool) -> Result<(), StoreError> {
        self.domain(uuid)?.set_frozen(frozen)
    }

    /// The newest durable epoch, once it is applied and synced.
    pub fn recovery_point(&self, uuid: &str) -> Result<RecoveryPoint, StoreError> {
        self.domain(uuid)?.recovery_point()
    }

    /// A recovery point; `None`: the newest, once it is applied and synced. One that is known to be damaged is refused, unless
    /// it is taken as it is (`damaged`).
    pub fn recovery_point_at(
        &self,
        uuid: &str,
        id: Option<PointId>,
        damaged: bool,
    ) -> Result<RecoveryPoint, StoreError> {
        let newest = self.newest_point(uuid, damaged);
        match (id, newest) {
            (Some(id), Ok(newest)) if (newest.generation, newest.epoch) != (id.generation, id.epoch) => {
                Ok(Arc::new(PointReader::open(self.domain(uuid)?, Some(id), damaged)?).recovery_point())
            }
            (Some(id), Err(_)) => {
                Ok(Arc::new(PointReader::open(self.domain(uuid)?, Some(id), damaged)?).recovery_point())
            }
            (_, Ok(newest)) => {
                if !damaged && self.domain(uuid)?.newest_is_damaged() {
                    let point = PointId { generation: newest.generation, epoch: newest.epoch }.to_string();
                    return Err(StoreError::Flawed { domain: newest.uuid, point });
                }
                Ok(newest)
            }
            (None, Err(_)) if !damaged && self.domain(uuid)?.newest_is_damaged() => {
                Err(StoreError::Flawed { domain: uuid.to_owned(), point: "the newest".to_owned() })
            }
            (None, newest) => newest,
        }
    }

    /// The newest point, with what reads it: so that its small files have been compared with their checksums, unless it is taken
    /// as it is.
    fn newest_point(&self, uuid: &str, damaged: bool) -> Result<RecoveryPoint, StoreError> {
        let mut point = self.recovery_point(uuid);
        for _ in 0..NEWEST_TRIES {
            let Ok(newest) = &mut point else { return point };
            let domain = self.domain(uuid)?;
            let as_it_is = damaged || domain.newest_is_damaged();
            if as_it_is && !newest.sealed {
                return point;
            }
            let id = PointId { generation: newest.generation, epoch: newest.epoch };
            match PointReader::open(domain, Some(id), as_it_is) {
                Ok(reader) => {
                    newest.checked = Some(Arc::new(reader));
                    return point;
                }
                // Thinned out meanwhile: there is a newer one.
                Err(StoreError::NoSuchPoint { .. }) => point = self.recovery_point(uuid),
                // Known now; whoever looks at it says so.
                Err(StoreError::Flawed { .. }) => return point,
                Err(error) => return Err(error),
            }
        }
        point
    }

    /// What going back to a point gives up.
    pub fn given_up(&self, uuid: &str, id: PointId) -> Result<GivenUp, StoreError> {
        self.domain(uuid)?.given_up(id)
    }

    /// The recovery points there are, newest first.
    pub fn points(&self, uuid: &str) -> Result<Vec<Point>, StoreError> {
        let domain = self.domain(uuid)?;
        let bytes = self.used_bytes(domain.uuid);
        Ok(domain.points(bytes))
    }

    /// [`Store::points`], after a look at the history for which of them damage leaves alone that has just been found.
    pub fn points_looked_at(&self, uuid: &str) -> Result<Vec<Point>, StoreError> {
        self.domain(uuid)?.look_at_new_flaws();
        self.points(uuid)
    }

    /// Reads a recovery point, without activating it and whatever is applied meanwhile; `None`: the newest. As long as the
    /// reader lives the point is kept.
    pub fn read_point(&self, uuid: &str, id: Option<PointId>) -> Result<PointReader, StoreError> {
        PointReader::open(self.domain(uuid)?, id, false)
    }

    /// [`Store::read_point`] of one that may be damaged: what is, is given as it was found.
    pub fn read_damaged_point(&self, uuid: &str, id: Option<PointId>) -> Result<PointReader, StoreError> {
        PointReader::open(self.domain(uuid)?, id, true)
    }

    /// Begins to verify points. See [`Verification`].
    pub fn begin_verification(&self, uuid: &str, scope: Scope) -> Result<Verification, StoreError> {
        Verification::begin(self.domain(uuid)?, scope)
    }

    /// The UUIDs of the domains that there are.
    pub fn uuids(&self) -> Vec<String> {
        self.slots().keys().map(Uuid::to_string).collect()
    }

    /// The name of a domain that is in order, when last heard of.
    pub fn name(&self, uuid: &str) -> Option<String> {
        Some(self.working(uuid)?.shared().name.clone())
    }

    /// Why a long read of a domain's history, which keeps it from being thinned out, should end: nothing more is accepted, or soon
    /// will not be. `alarmed`: the latter was so before the read began, which then is not the reason.
    pub fn strain(&self, uuid: &str, alarmed: bool) -> Option<String> {
        let domain = self.working(uuid)?;
        let shared = domain.shared();
        shared.over_budget.clone().or_else(|| shared.alarm.clone().filter(|_| !alarmed))
    }

    /// When a point of a domain was last found to be sound, and what is to be read because something is damaged of which it is
    /// not known where. Nothing of a domain that has no point, or that was activated.
    pub fn last_verified(&self, uuid: &str) -> Option<(Option<u64>, Option<Scope>)> {
        let domain = self.working(uuid)?;
        let shared = domain.shared();
        if shared.frozen || shared.position.epoch == 0 {
            return None;
        }
        drop(shared);
        let mut catalog = domain.catalog();
        let unknown = catalog.standby().and_then(|chain| chain.unknown());
        Some((catalog.verified.values().max().copied(), unknown))
    }

    /// One step of what is to be done for a domain without being asked: checksums where there are none, of at most `bytes`,
    /// and a closer look at damage. Returns bytes read; 0: there is nothing to do.
    pub fn tend(&self, uuid: &str, bytes: usize) -> Result<u64, StoreError> {
        self.working(uuid).map_or(Ok(0), |domain| domain.tend(bytes))
    }

    /// Hashes (XXH3-128) of neighbouring pieces of an image of the standby, which must be at `epoch`. Of what is damaged it is
    /// one that nothing has.
    pub fn hashes(
        &self,
        uuid: &str,
        epoch: u64,
        array: Array,
        first: u64,
        pieces: usize,
        piece_bytes: usize,
    ) -> Result<Vec<u128>, StoreError> {
        self.domain(uuid)?.hashes(epoch, array, first, pieces, piece_bytes)
    }

    /// Names a point, which is kept until it is released; `None`: the newest, as of now. Returns which it is.
    pub fn pin(&self, uuid: &str, name: &str, id: Option<PointId>) -> Result<PointId, StoreError> {
        self.domain(uuid)?.pin(name, id)
    }

    /// Releases a named point: from now on the policy decides about it.
    pub fn release(&self, uuid: &str, name: &str) -> Result<PointId, StoreError> {
        self.domain(uuid)?.release(name)
    }

    /// Which points of a domain are kept.
    pub fn retention(&self, uuid: &str) -> Result<Retention, StoreError> {
        Ok(self.domain(uuid)?.retention())
    }

    /// Gives a domain a policy of its own, durably; `None`: again that of all.
    pub fn set_retention(&self, uuid: &str, retention: Option<Retention>) -> Result<(), StoreError> {
        self.domain(uuid)?.set_retention(retention)
    }

    /// Notes, durably, that a point was read and found to be whole.
    pub fn note_verified(&self, uuid: &str, id: PointId, unix_ns: u64) -> Result<(), StoreError> {
        self.domain(uuid)?.note_verified(id, unix_ns)
    }

    /// Hashes of everything in the standby, with the epoch that they are of: the newest one durable when this began, or a
    /// later one. Applying waits meanwhile.
    pub fn verify(&self, uuid: &str) -> Result<Verified, StoreError> {
        self.domain(uuid)?.verify()
    }

    /// Deletes what is stored of a domain that has no stream and no guest; also of one that cannot be opened. Returns the
    /// bytes freed.
    pub fn forget(&self, uuid: &str) -> Result<u64, StoreError> {
        let uuid = parse(uuid)?;
        let id = uuid.to_string();
        let slot = self.slot(uuid);
        let mut state = slot.lock();
        match &*state {
            SlotState::Absent => return Err(StoreError::Unknown(id)),
            SlotState::Broken(_) => {}
            SlotState::Open(domain) => {
                let busy = |what: &str| Err(StoreError::Busy { domain: id.clone(), what: what.to_owned() });
                let shared = domain.shared();
                if shared.frozen {
                    return busy("it is active at this site: stop it first");
                }
                if shared.stream_open {
                    return busy("it is receiving: unprotect it first");
                }
                drop(shared);
                domain.close();
            }
        }
        let bytes = self.used_bytes(uuid);
        let (dir, aside) = (self.domain_dir(uuid), self.inner.dir.join(format!("{FORGOTTEN}{uuid}")));
        let disk = &self.inner.disk;
        let result = (|| {
            disk.remove_dir_all(&aside).map_err(JournalError::io("remove", &aside))?;
            disk.rename(&dir, &aside).map_err(JournalError::io("move aside", &dir))?;
            disk.sync_dir(&self.inner.dir).map_err(JournalError::io("sync", &self.inner.dir))?;
            disk.remove_dir_all(&aside).map_err(JournalError::io("remove", &aside))
        })();
        *state = match &result {
            Ok(()) => SlotState::Absent,
            Err(error) => SlotState::Broken(error.to_string()),
        };
        result.map_err(|error| StoreError::of(&id, error))?;
        Ok(bytes)
    }

    /// Removes `standby.N` unless it is in use, or kept. Returns the bytes freed.
    pub fn remove_unused_standby(&self, uuid: &str, number: u64) -> Result<u64, StoreError> {
        self.domain(uuid)?.remove_unused_standby(number)
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Slot>>> {
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, uuid: Uuid) -> Arc<Slot> {
        self.slots().entry(uuid).or_insert_with(|| Arc::new(Slot(Mutex::new(SlotState::Absent)))).clone()
    }

    fn domain_dir(&self, uuid: Uuid) -> PathBuf {
        self.inner.dir.join(uuid.to_string())
    }

    fn used_bytes(&self, uuid: Uuid) -> u64 {
        // A figure for people: files that come and go while it is taken are no error.
        self.inner.disk.used_bytes(&self.domain_dir(uuid)).unwrap_or(0)
    }

    fn domain(&self, uuid: &str) -> Result<Arc<Domain>, StoreError> {
        let uuid = parse(uuid)?;
        let slot = self.slots().get(&uuid).cloned();
        let slot = slot.ok_or_else(|| StoreError::Unknown(uuid.to_string()))?;
        let mut state = slot.lock();
        match &*state {
            SlotState::Open(domain) if domain.shared().failed.is_none() => return Ok(domain.clone()),
            SlotState::Absent => return Err(StoreError::Unknown(uuid.to_string())),
            // It may be usable again: a disk came back, an operator repaired it.
            SlotState::Open(_) | SlotState::Broken(_) => self.open_slot(uuid, &mut state, None)?,
        }
        match &*state {
            SlotState::Open(domain) => Ok(domain.clone()),
            SlotState::Absent | SlotState::Broken(_) => Err(StoreError::Unknown(uuid.to_string())),
        }
    }

    /// A domain that is in order; one that is not, or is being opened, is left alone.
    fn working(&self, uuid: &str) -> Option<Arc<Domain>> {
        let slot = self.slots().get(&parse(uuid).ok()?).cloned()?;
        let state = slot.0.try_lock().ok()?;
        match &*state {
            SlotState::Open(domain) if domain.shared().failed.is_none() => Some(domain.clone()),
            _ => None,
        }
    }

    /// Opens the domain, or opens it anew.
    fn open_slot(&self, uuid: Uuid, state: &mut SlotState, new: Option<(&str, u64)>) -> Result<(), StoreError> {
        if let SlotState::Open(domain) = state {
            domain.close();
        }
        let Inner { disk, options, .. } = &*self.inner;
        match Domain::open(disk.clone(), &self.domain_dir(uuid), uuid, options.clone(), new) {
            Ok(domain) => {
                *state = SlotState::Open(domain);
                Ok(())
            }
            Err(StoreError::Unknown(id)) => {
                *state = SlotState::Absent;
                Err(StoreError::Unknown(id))
            }
            Err(error) => {
                *state = SlotState::Broken(error.to_string());
                Err(error)
            }
        }
    }

    fn summary(&self, uuid: Uuid, slot: &Slot) -> Option<DomainSummary> {
        let mut summary = DomainSummary { uuid: uuid.to_string(), ..DomainSummary::default() };
        match slot.0.try_lock() {
            Err(_) => summary.trouble = Some("it is being opened".to_owned()),
            Ok(state) => match &*state {
                SlotState::Absent => return None,
                SlotState::Broken(why) => summary.trouble = Some(why.clone()),
                SlotState::Open(domain) => domain.summarize(&mut summary),
            },
        }
        summary.stored_bytes = self.used_bytes(uuid);
        Some(summary)
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let slots = self.slots.get_mut().unwrap_or_else(PoisonError::into_inner);
        for slot in slots.values() {
            if let SlotState::Open(domain) = &*slot.lock() {
                domain.close();
            }
        }
    }
}

/// A UUID as a peer or person writes it. Nothing else may become a path.
fn parse(uuid: &str) -> Result<Uuid, StoreError> {
    // Shown in messages: as much of a wrong one as is useful.
    let shown = || StoreError::BadUuid(uuid.chars().take(64).collect());
    match Uuid::try_parse(uuid) {
        Ok(parsed) if !parsed.is_nil() && uuid.len() == 36 => Ok(parsed),
        _ => Err(shown()),
    }
}

/// A directory's name, if it is the UUID as the store writes it.
fn canonical(name: &str) -> Result<Uuid, StoreError> {
    let uuid = parse(name)?;
    if uuid.to_string() == name { Ok(uuid) } else { Err(StoreError::BadUuid(name.to_owned())) }
}
