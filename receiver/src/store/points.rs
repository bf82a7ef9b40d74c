//! Recovery points: what there is, where its files are, and what they hash to; who may write.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmdr_codec::{DOMAIN_XML_BYTES_MAX, Digest, Layout};
use vmdr_journal::{HistoryMark, JournalError, Mode, Pin, Standby};

use super::NUMBER_MAX;
use super::catalog::{Catalog, PointId};
use super::domain::{Domain, IngestState};
use super::ingest::Ingest;
use super::reader::PointReader;
use super::retention::Retention;
use super::standby::{self, read_layout, read_small};
use super::verified;
use super::{DomainSummary, StoreError};

/// Bytes hashed at once.
const HASH_BYTES: usize = 1 << 20;
/// Pins of a domain, at most: they stand in the control record.
const PINS_MAX: usize = 256;
/// The longest name of a pin.
const NAME_CHARS_MAX: usize = 64;

/// A recovery point in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// Bytes that it takes up on the disk: of the newest everything that is stored, of an older one what it takes to come
    /// back to it from the next newer one.
    pub bytes: u64,
    /// The guest's file systems were at rest at its cut.
    pub application: bool,
    /// The newest one.
    pub newest: bool,
    /// The names under which it is pinned.
    pub names: Vec<String>,
    /// When it was last verified.
    pub verified_unix_ns: Option<u64>,
    /// Something on the way back to it was found to be damaged: it cannot be activated.
    pub damaged: bool,
}

impl Point {
    /// Which point.
    pub fn id(&self) -> PointId {
        PointId { generation: self.generation, epoch: self.epoch }
    }
}

/// What going back to a point gives up, up to the newest one.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GivenUp {
    /// Epochs.
    pub epochs: u64,
    /// Bytes written to disks, or zeroed. What a seed has brought in between is not counted.
    pub disk_bytes: u64,
    /// Between the two cuts.
    pub seconds: f64,
}

/// A recovery point that can be activated. The files may be changed by later epochs unless the domain is frozen.
#[derive(Debug, Clone)]
pub struct RecoveryPoint {
    /// The domain's UUID.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// The point's generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// QEMU's machine type, with version.
    pub machine: String,
    /// The domain's XML.
    pub domain_xml: String,
    /// The RAM blocks that are there.
    pub ram: Vec<RamImage>,
    /// What xen-save-devices-state wrote.
    pub device_state: PathBuf,
    /// The disks.
    pub disks: Vec<DiskImage>,
    /// The standby's directory.
    pub dir: PathBuf,
    /// What it consists of, blocks that are gone included.
    pub layout: Layout,
    /// The files are encrypted: only a reader can read them.
    pub sealed: bool,
    /// It is not what the files have, which are of a newer point: this reads it. `device_state` is then not there.
    pub older: Option<Arc<PointReader>>,
    /// Of the newest point: reads it, compared with its checksums. Not of one that is taken although it is damaged.
    pub checked: Option<Arc<PointReader>>,
}

/// A RAM block of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamImage {
    /// QEMU's name of it.
    pub name: String,
    /// Bytes in use; the file has these, rounded up to 4 KiB.
    pub used_bytes: u64,
    /// Page size of the protected host's mapping.
    pub page_bytes: u32,
    /// The file.
    pub path: PathBuf,
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// libvirt's target name.
    pub target: String,
    /// Virtual size; the file has this length.
    pub size_bytes: u64,
    /// The file, raw.
    pub path: PathBuf,
}

/// What the standby hashes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The generation.
    pub generation: u64,
    /// The epoch that was hashed.
    pub epoch: u64,
    /// The RAM blocks.
    pub ram: Vec<VerifiedImage>,
    /// The disks.
    pub disks: Vec<VerifiedImage>,
    /// XXH3-128 of the device state.
    pub device_state: u128,
}

/// What a RAM block or disk hashes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedImage {
    /// The block's name or disk's target.
    pub name: String,
    /// Bytes hashed: the block's bytes in use, the disk's size.
    pub bytes: u64,
    /// XXH3-128 of them.
    pub xxh3: u128,
}

/// A name that is harmless in a table, a file name and a shell.
fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && name.len() <= NAME_CHARS_MAX && name.chars().all(good) {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_CHARS_MAX).collect();
    Err(format!(
        "{shown:?} is no name of a point: 1 to {NAME_CHARS_MAX} letters, digits, dots, underscores and hyphens, the first \
         a letter or digit"
    ))
}

fn chain_bytes(catalog: &Catalog, dir: u64) -> u64 {
    catalog.chain_bytes.get(&dir).copied().unwrap_or(0)
}

impl Domain {
    pub fn open_stream(self: &Arc<Self>, name: &str, generation: u64) -> Result<Ingest, StoreError> {
        let mut ingest = self.ingest();
        let (stored, frozen, known) = {
            let shared = self.shared();
            self.alive(&shared)?;
            (shared.position.generation, shared.frozen, shared.name == name)
        };
        if frozen {
            return Err(StoreError::Frozen(self.id.clone()));
        }
        let generation = if generation == 0 { stored } else { generation };
        if generation > NUMBER_MAX {
            let what = format!("generation {generation} is out of range");
            return Err(StoreError::Corrupt { domain: self.id.clone(), epoch: 0, part: 0, what });
        }
        if generation < stored {
            return Err(StoreError::Fenced { domain: self.id.clone(), offered: generation, stored });
        }
        ingest.give_up_part(self)?;
        if generation > stored {
            self.discard_open(&mut ingest)?;
        }
        if generation > stored || !known {
            self.change_control(|control| {
                control.generation = generation;
                control.name = name.to_owned();
            })?;
        }
        let mut shared = self.shared();
        shared.position.generation = generation;
        shared.name = name.to_owned();
        shared.stream += 1;
        shared.stream_open = true;
        self.changed.notify_all();
        let opened_at = shared.position.epoch;
        Ok(Ingest { domain: self.clone(), stream: shared.stream, generation, told: 0, opened_at, found: (0, 0) })
    }

    pub fn raise_generation(&self, generation: u64) -> Result<u64, StoreError> {
        let mut ingest = self.ingest();
        let stored = {
            let shared = self.shared();
            self.alive(&shared)?;
            shared.position.generation
        };
        if generation <= stored {
            return Ok(stored);
        }
        ingest.give_up_part(self)?;
        self.raise_locked(&mut ingest, generation)?;
        Ok(generation)
    }

    /// Makes a generation the one in force; no part is begun.
    pub fn raise_locked(&self, ingest: &mut IngestState, generation: u64) -> Result<(), StoreError> {
        self.change_control(|control| control.generation = generation)?;
        {
            let mut shared = self.shared();
            shared.position.generation = generation;
            shared.stream_open = false;
            self.changed.notify_all();
        }
        self.discard_open(ingest)
    }

    /// Takes the standby over into a newer generation, which goes on with its next epoch: nobody has changed anything since.
    pub fn carry_on(&self, generation: u64) -> Result<(), StoreError> {
        self.set_frozen(false)?;
        self.raise_generation(generation)?;
        self.wait_synced()?;
        let mut ingest = self.ingest();
        let mut standby = self.standby();
        let first = ingest.journal.roll().map_err(|error| self.failure(error))?;
        let Some(applier) = standby.as_mut().filter(|applier| !applier.is_stopped()) else {
            return Err(StoreError::NoPoint(self.id.clone()));
        };
        // Without a past: the sets of the history are of the generation before.
        let durable = Standby { generation, ..applier.durable };
        let mark = HistoryMark { floor: durable.epoch, ..applier.mark };
        self.change_control(|control| {
            control.standby = Some(durable);
            control.history = mark;
            control.journal_first = first;
        })?;
        (applier.durable, applier.mark) = (durable, mark);
        self.catalog().advance(durable, mark.application, Vec::new(), true);
        let mut shared = self.shared();
        shared.point_generation = generation;
        shared.open_segment = first;
        self.changed.notify_all();
        Ok(())
    }

    pub fn set_frozen(&self, frozen: bool) -> Result<(), StoreError> {
        {
            let mut ingest = self.ingest();
            {
                let mut shared = self.shared();
                self.alive(&shared)?;
                if shared.frozen == frozen {
                    return Ok(());
                }
                if frozen {
                    // In force before it is durable: nothing may become durable behind what is waited for.
                    shared.frozen = true;
                    shared.stream_open = false;
                }
                self.changed.notify_all();
            }
            ingest.give_up_part(self)?;
        }
        let result = if frozen { self.wait_synced() } else { Ok(()) };
        let result = result.and_then(|()| self.change_control(|control| control.frozen = frozen));
        let mut shared = self.shared();
        shared.frozen = if result.is_ok() { frozen } else { !frozen };
        result
    }

    pub fn recovery_point(&self) -> Result<RecoveryPoint, StoreError> {
        self.wait_synced()?;
        let (name, durable) = {
            let control = self.control();
            (control.name.clone(), control.standby)
        };
        let durable = durable.ok_or_else(|| StoreError::NoPoint(self.id.clone()))?;
        let dir = self.standby_dir(durable.dir);
        let of = |error| StoreError::of(&self.id, error);
        let layout = read_layout(&*self.disk, &standby::layout_path(&dir, durable.layout_epoch)).map_err(of)?;
        let xml_path = standby::xml_path(&dir, durable.xml_epoch);
        let xml = read_small(&*self.disk, &xml_path, DOMAIN_XML_BYTES_MAX).map_err(of)?;
        let domain_xml = String::from_utf8(xml).map_err(|_| {
            let what = format!("{} is not UTF-8", xml_path.display());
            StoreError::Damaged { domain: self.id.clone(), what }
        })?;
        let whole = layout.clone();
        let ram = layout.ram.into_iter().enumerate().filter(|(_, block)| block.used_bytes > 0);
        let ram = ram.map(|(i, block)| RamImage {
            name: block.name,
            used_bytes: block.used_bytes,
            page_bytes: block.page_bytes,
            path: standby::ram_path(&dir, i),
        });
        let disks = layout.disks.into_iter().map(|disk| DiskImage {
            path: standby::disk_path(&dir, &disk.target),
            target: disk.target,
            size_bytes: disk.size_bytes,
        });
        Ok(RecoveryPoint {
            uuid: self.id.clone(),
            name,
            generation: durable.generation,
            epoch: durable.epoch,
            cut_unix_ns: durable.cut_unix_ns,
            machine: layout.machine,
            domain_xml,
            ram: ram.collect(),
            device_state: standby::device_path(&dir, durable.device_epoch),
            disks: disks.collect(),
            dir,
            layout: whole,
            sealed: self.sealed,
            older: None,
            checked: None,
        })
    }

    pub fn points(&self, bytes: u64) -> Vec<Point> {
        let names = {
            let control = self.control();
            let mut names: BTreeMap<PointId, Vec<String>> = BTreeMap::new();
            for pin in &control.pins {
                let id = PointId { generation: pin.generation, epoch: pin.epoch };
                names.entry(id).or_default().push(pin.name.clone());
            }
            names
        };
        let catalog = self.catalog();
        let newest = {
            let shared = self.shared();
            let id = PointId { generation: shared.point_generation, epoch: shared.position.epoch };
            let application = shared.backlog.back().is_some_and(|epoch| epoch.application());
            (shared.position.epoch > 0).then_some((id, shared.cut_unix_ns, application))
        };
        let point = |id: PointId, cut_unix_ns, application, bytes, newest, damaged| Point {
            generation: id.generation,
            epoch: id.epoch,
            cut_unix_ns,
            bytes,
            application,
            newest,
            names: names.get(&id).cloned().unwrap_or_default(),
            verified_unix_ns: catalog.verified.get(&id).copied(),
            damaged,
        };
        let mut points = Vec::new();
        for (chain, id, index) in catalog.points() {
            let is_newest = newest.is_some_and(|(newest, ..)| newest == id);
            let damaged = !chain.is_good(id.epoch);
            points.push(match chain.sets.get(index) {
                Some(set) => point(id, set.point.cut_unix_ns, set.point.application, set.bytes(), is_newest, damaged),
                None => {
                    let bytes = if is_newest { bytes } else { chain_bytes(&catalog, chain.standby.dir) };
                    point(id, chain.standby.cut_unix_ns, chain.application, bytes, is_newest, damaged)
                }
            });
        }
        if let Some((id, cut_unix_ns, application)) = newest
            && !points.first().is_some_and(|first| first.newest)
        {
            // Durable and not applied yet.
            let damaged = catalog.chains.last().is_some_and(|chain| catalog.current && !chain.is_good(u64::MAX));
            points.insert(0, point(id, cut_unix_ns, application, bytes, true, damaged));
        }
        points
    }

    pub fn given_up(&self, id: PointId) -> Result<GivenUp, StoreError> {
        let catalog = self.catalog();
        let first = catalog.chains.iter().rposition(|chain| chain.has(id)).ok_or_else(|| self.no_such_point(id))?;
        let mut given = GivenUp::default();
        let mut at = id;
        let mut cut_unix_ns = 0;
        for (i, chain) in catalog.chains[first..].iter().enumerate() {
            let Standby { generation, epoch, .. } = chain.standby;
            let sets = if i == 0 { chain.back_to(id.epoch) } else { &chain.sets[..] };
            given.disk_bytes = sets.iter().fold(given.disk_bytes, |sum, set| sum.saturating_add(set.point.disk_bytes));
            let epochs = if generation == at.generation { epoch.saturating_sub(at.epoch) } else { epoch };
            given.epochs = given.epochs.saturating_add(epochs);
            at = PointId { generation, epoch };
            if i == 0 {
                cut_unix_ns = sets.first().map_or(chain.standby.cut_unix_ns, |set| set.point.cut_unix_ns);
            }
            given.seconds = Duration::from_nanos(chain.standby.cut_unix_ns.saturating_sub(cut_unix_ns)).as_secs_f64();
        }
        Ok(given)
    }

    /// Pins a point; nothing given: the newest one.
    pub fn pin(&self, name: &str, id: Option<PointId>) -> Result<PointId, StoreError> {
        let refused = |what: String| StoreError::Refused { domain: self.id.clone(), what };
        check_name(name).map_err(refused)?;
        // One that is durable and not applied yet is in no catalog.
        if id.is_none_or(|id| self.catalog().find(id).is_none()) {
            self.wait_synced()?;
        }
        // So that it is not thinned out between being found and being pinned.
        let _standby = self.standby();
        let id = {
            let mut catalog = self.catalog();
            let newest = catalog.standby().map(|chain| chain.standby);
            let newest = newest.map(|s| PointId { generation: s.generation, epoch: s.epoch });
            let id = id.or(newest).ok_or_else(|| StoreError::NoPoint(self.id.clone()))?;
            if catalog.find(id).is_none() {
                return Err(self.no_such_point(id));
            }
            id
        };
        {
            let control = self.control();
            if control.pins.len() >= PINS_MAX {
                return Err(refused(format!("{PINS_MAX} points are pinned already; release one")));
            }
            if let Some(pin) = control.pins.iter().find(|pin| pin.name == name) {
                let (generation, epoch) = (pin.generation, pin.epoch);
                return Err(refused(format!(
                    "point {generation}-{epoch} has the name {name:?} already; release it first"
                )));
            }
        }
        let pin = Pin { generation: id.generation, epoch: id.epoch, name: name.to_owned() };
        self.change_control(|control| control.pins.push(pin))?;
        Ok(id)
    }

    /// Releases the pin of this name; its point may go when the policy does not ask for it.
    pub fn release(&self, name: &str) -> Result<PointId, StoreError> {
        let found = self.control().pins.iter().find(|pin| pin.name == name).cloned();
        let pin = found.ok_or_else(|| StoreError::Refused {
            domain: self.id.clone(),
            what: format!("no point has the name {name:?}; `vmdr points` lists them"),
        })?;
        self.change_control(|control| control.pins.retain(|pin| pin.name != name))?;
        self.thin(false);
        Ok(PointId { generation: pin.generation, epoch: pin.epoch })
    }

    /// A policy of this domain's own, or again that of all.
    pub fn set_retention(&self, retention: Option<Retention>) -> Result<(), StoreError> {
        self.change_control(|control| control.retention = retention.map(|r| (r.budget_bytes, r.tiers)))?;
        self.thin(false);
        Ok(())
    }

    pub fn note_verified(&self, id: PointId, unix_ns: u64) -> Result<(), StoreError> {
        let all = {
            let mut catalog = self.catalog();
            if catalog.find(id).is_none() {
                return Err(self.no_such_point(id));
            }
            catalog.verified.insert(id, unix_ns);
            let there: BTreeSet<PointId> = catalog.points().map(|(_, id, _)| id).collect();
            catalog.verified.retain(|id, _| there.contains(id));
            catalog.verified.clone()
        };
        verified::write(&*self.disk, &self.dir, &all).map_err(|error| StoreError::of(&self.id, error))
    }

    /// [`Domain::note_verified`] of several; those that are not there any more do not matter.
    pub fn note_all_verified(&self, ids: &[PointId], unix_ns: u64) -> Result<(), StoreError> {
        let all = {
            let mut catalog = self.catalog();
            let there: BTreeSet<PointId> = catalog.points().map(|(_, id, _)| id).collect();
            catalog.verified.extend(ids.iter().map(|id| (*id, unix_ns)));
            catalog.verified.retain(|id, _| there.contains(id));
            catalog.verified.clone()
        };
        verified::write(&*self.disk, &self.dir, &all).map_err(|error| StoreError::of(&self.id, error))
    }

    pub fn no_such_point(&self, id: PointId) -> StoreError {
        StoreError::NoSuchPoint { domain: self.id.clone(), point: id.to_string() }
    }

    pub fn verify(&self) -> Result<Verified, StoreError> {
        self.wait_synced()?;
        let mut standby = self.standby();
        let Some(applier) = &mut *standby else { return Err(StoreError::NoPoint(self.id.clone())) };
        // The lock is only ever let go of between batches, when the files are exactly one epoch; or in the middle of one
        // that ran out of space.
        if applier.interrupted || applier.durable.applying != applier.durable.epoch {
            let (epoch, applying) = (applier.durable.epoch, applier.durable.applying);
            let what = format!("the standby is between epochs {epoch} and {applying} until there is space");
            return Err(StoreError::Full { domain: self.id.clone(), what });
        }
        let (durable, layout) = (applier.durable, applier.files.layout().clone());
        let dir = applier.files.dir().to_owned();
        let hash = |path: &Path, bytes: u64| self.hash(path, bytes).map_err(|error| StoreError::of(&self.id, error));
        let mut verified = Verified {
            generation: durable.generation,
            epoch: durable.epoch,
            ram: Vec::new(),
            disks: Vec::new(),
            device_state: 0,
        };
        for (i, block) in layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0) {
            let xxh3 = hash(&standby::ram_path(&dir, i), block.used_bytes)?;
            verified.ram.push(VerifiedImage { name: block.name.clone(), bytes: block.used_bytes, xxh3 });
        }
        for disk in &layout.disks {
            let xxh3 = hash(&standby::disk_path(&dir, &disk.target), disk.size_bytes)?;
            verified.disks.push(VerifiedImage { name: disk.target.clone(), bytes: disk.size_bytes, xxh3 });
        }
        let path = standby::device_path(&dir, durable.device_epoch);
        let length = self.disk.open(&path, Mode::Read).and_then(|file| file.length());
        let length = length.map_err(JournalError::io("read", &path)).map_err(|e| StoreError::of(&self.id, e))?;
        verified.device_state = hash(&path, length)?;
        Ok(verified)
    }

    fn hash(&self, path: &Path, bytes: u64) -> Result<u128, JournalError> {
        let file = self.disk.open(path, Mode::Read).map_err(JournalError::io("open", path))?;
        let mut digest = Digest::new();
        let mut buffer = vec![0; HASH_BYTES];
        let mut at = 0;
        while at < bytes {
            let now = (bytes - at).min(buffer.len() as u64) as usize;
            let got = file.read_at(&mut buffer[..now], at).map_err(JournalError::io("read", path))?;
            if got != now {
                let what = format!("it ends at {}, it should have {bytes} bytes", at + got as u64);
                return Err(JournalError::Damaged { path: path.to_owned(), what });
            }
            digest.update(&buffer[..now]);
            at += now as u64;
        }
        let (low, high) = digest.halves();
        Ok(u128::from(high) << 64 | u128::from(low))
    }

    pub fn summarize(&self, summary: &mut DomainSummary) {
        summary.history_budget_bytes = self.retention().budget_bytes;
        {
            let catalog = self.catalog();
            summary.history_bytes = catalog.history_bytes();
            summary.points = catalog.chains.iter().map(|chain| chain.sets.len() as u64 + 1).sum();
            summary.damaged_points = catalog.points().filter(|(chain, id, _)| !chain.is_good(id.epoch)).count() as u64;
            summary.verified_unix_ns = catalog.verified.values().max().copied();
        }
        summary.damage = self.damage_of_standby();
        let shared = self.shared();
        summary.name = shared.name.clone();
        summary.position = shared.position;
        summary.point_generation = shared.point_generation;
        summary.cut_unix_ns = shared.cut_unix_ns;
        summary.applied_epoch = shared.applied;
        summary.backlog_bytes = shared.backlog_bytes;
        summary.receiving = shared.stream_open;
        summary.frozen = shared.frozen;
        summary.unsummed = shared.unsummed;
        let trouble = shared.failed.clone().or(shared.stalled.clone()).or(shared.over_budget.clone());
        summary.trouble = trouble.or(shared.damage.clone()).or(self.refused.clone());
        summary.alarm = shared.alarm.clone();
    }
}
