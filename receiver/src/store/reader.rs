//! Reading a recovery point: any range of its memory and disks, its device state, XML and layout.
//!
//! A point is its standby with the before-images that lead back to it laid over. What a reader guarantees:
//!
//! - Every byte it gives is of its point, whatever is applied, thinned out or seeded meanwhile. As long as it lives, its
//!   point and what leads there is kept.
//! - Every before-image was checked against its checksums, when the reader was opened and again when it is read, and what is
//!   read of the standby's images too. Damage is an error, unless the reader was opened to have what is left. So is every
//!   read after the domain was forgotten.
//! - It holds up the standby's next batch only for the time of one `read`.
//!
//! Opening costs what lies between the point and the standby, in time and, some 100 bytes for each unit of 4 KiB, in memory.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmdr_codec::{DEVICE_STATE_BYTES_MAX, DOMAIN_XML_BYTES_MAX, Layout, PAGE_BYTES};
use vmdr_journal::{
    Array, Entry, File, JournalError, Key, Mode, PointTail, Set, Standby, UNIT_BYTES, read_set, read_unit,
    read_unit_as_kept, unit_sum,
};

use super::StoreError;
use super::apply::{self, Applier};
use super::catalog::{Catalog, Chain, PointId};
use super::domain::Domain;
use super::flaws::Flaw;
use super::images::read_units;
use super::points::{DiskImage, RamImage, RecoveryPoint};
use super::retention;
use super::standby::{self, image_path};
use super::sums::Sums;

/// A recovery point that can be read. See the module's documentation.
#[derive(Debug)]
pub struct PointReader {
    domain: Arc<Domain>,
    name: String,
    id: PointId,
    /// The N of the `standby.N` that it is based on.
    dir: u64,
    number: u64,
    tail: PointTail,
    layout: Layout,
    device_state: Vec<u8>,
    domain_xml: String,
    /// What is damaged is given as it is.
    tolerant: bool,
    state: Mutex<State>,
}

/// A range of an array that may be other than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The array.
    pub array: Array,
    /// Where it begins: a multiple of 4 KiB.
    pub offset: u64,
    /// How long it is: a multiple of 4 KiB, which may go beyond the array's end.
    pub bytes: u64,
}

#[derive(Debug)]
struct State {
    /// The epoch of the standby from which the index leads to the point.
    base: u64,
    index: Index,
    images: HashMap<Array, Image>,
}

/// An open image, its path and checksums; `None`: there is none, which reads as zeroes.
type Image = Option<(PathBuf, Box<dyn File>, Option<Sums>)>;

/// What each unit was, where the standby has it otherwise.
#[derive(Debug, Default)]
struct Index(BTreeMap<Key, Slot>);

#[derive(Debug, Clone, Copy)]
struct Slot {
    entry: Entry,
    segment: u64,
    at: u64,
}

impl Index {
    /// Adds what a later set says: only what no earlier one has said.
    fn add(&mut self, entry: &Entry, segment: u64, at: u64) {
        let Key { array, mut unit } = entry.key;
        let end = unit + u64::from(entry.count);
        while unit < end {
            let key = Key { array, unit };
            if let Some((before, slot)) = self.0.range(..=key).next_back()
                && before.array == array
                && before.unit + u64::from(slot.entry.count) > unit
            {
                unit = before.unit + u64::from(slot.entry.count);
                continue;
            }
            let next = self.0.range(key..Key { array, unit: end }).next().map_or(end, |(next, _)| next.unit);
            let mut entry = *entry;
            (entry.key.unit, entry.count) = (unit, (next - unit) as u32);
            self.0.insert(key, Slot { entry, segment, at });
            unit = next;
        }
    }

    /// The slots that have something of these units.
    fn within(&self, array: Array, first: u64, end: u64) -> impl Iterator<Item = &Slot> {
        let before = self.0.range(..Key { array, unit: first }).next_back().map(|(_, slot)| slot);
        let before = before
            .filter(|slot| slot.entry.key.array == array && slot.entry.key.unit + u64::from(slot.entry.count) > first);
        before.into_iter().chain(self.0.range(Key { array, unit: first }..Key { array, unit: end }).map(|(_, s)| s))
    }
}

/// The small parts of a point while they are put together.
struct Patches(BTreeMap<Key, Option<Box<[u8; UNIT_BYTES]>>>);

impl Patches {
    /// What was `bytes` long, out of what it became.
    fn apply(&self, array: Array, mut now: Vec<u8>, bytes: u64, max: u64) -> Result<Vec<u8>, String> {
        if bytes > max {
            return Err(format!("{array:?} of {bytes} bytes"));
        }
        now.resize(bytes as usize, 0);
        for (key, content) in self.0.range(Key { array, unit: 0 }..Key { array, unit: u64::MAX }) {
            let at = key.unit as usize * UNIT_BYTES;
            let length = now.len().saturating_sub(at).min(UNIT_BYTES);
            if length > 0 {
                let content = content.as_deref().unwrap_or(&super::pending::ZERO_UNIT);
                now[at..at + length].copy_from_slice(&content[..length]);
            }
        }
        Ok(now)
    }
}

impl PointReader {
    /// Why this ought to be ended soon, if so: what it reads cannot be given up, and the history has nearly all of its
    /// budget, beyond which epochs are refused.
    pub fn in_the_way(&self) -> Option<String> {
        let policy = self.domain.retention();
        let used = self.domain.catalog().history_bytes();
        retention::pressing(used, &policy).then(|| {
            format!(
                "the history has {} MiB of its budget of {} MiB, and holds what is being read: beyond it epochs are refused",
                used >> 20,
                policy.budget_bytes >> 20
            )
        })
    }

    /// `tolerant`: also one that is known to be damaged, as far as it can be read.
    pub(super) fn open(domain: Arc<Domain>, id: Option<PointId>, tolerant: bool) -> Result<Self, StoreError> {
        if id.is_none_or(|id| domain.catalog().find(id).is_none()) {
            match domain.wait_synced() {
                Err(StoreError::NoPoint(_)) if id.is_some() => {}
                other => other?,
            }
        }
        if !tolerant && id.is_some() {
            domain.look_at_new_flaws();
        }
        let of = |error| StoreError::of(&domain.id, error);
        let name = domain.control().name.clone();
        // While this is held nothing is applied or thinned out.
        let mut guard = domain.standby();
        let (id, number, chain) = {
            let mut catalog = domain.catalog();
            let newest = catalog.standby().map(|chain| chain.standby);
            let newest = newest.map(|s| PointId { generation: s.generation, epoch: s.epoch });
            let id = id.or(newest).ok_or_else(|| StoreError::NoPoint(domain.id.clone()))?;
            let Some(chain) = catalog.find(id).cloned() else { return Err(domain.no_such_point(id)) };
            if !tolerant && chain.can_be_read(id.epoch) && !chain.is_good(id.epoch) {
                return Err(flawed(&domain, id));
            }
            if !chain.can_be_read(id.epoch) {
                let what = format!("the history on the way back to point {id} is damaged; choose a newer one");
                return Err(StoreError::Damaged { domain: domain.id.clone(), what });
            }
            let number = catalog.begin_reading();
            for epoch in [id.epoch, chain.standby.epoch] {
                hold(&mut catalog, PointId { generation: id.generation, epoch });
            }
            (id, number, chain)
        };
        let sets = chain.back_to(id.epoch).to_vec();
        let own = PointTail {
            cut_unix_ns: chain.standby.cut_unix_ns,
            application: chain.application,
            ..PointTail::default()
        };
        let tail = sets.first().map_or(own, |set| set.point);
        let durable = chain.standby;
        let mut reader = Self {
            domain: domain.clone(),
            name,
            id,
            dir: durable.dir,
            number,
            tail,
            layout: Layout::default(),
            device_state: Vec::new(),
            domain_xml: String::new(),
            tolerant,
            state: Mutex::new(State { base: durable.epoch, index: Index::default(), images: HashMap::new() }),
        };
        let dir = domain.standby_dir(durable.dir);
        let disk = &*domain.disk;
        let layout_path = standby::layout_path(&dir, durable.layout_epoch);
        let layout = standby::read_layout(disk, &layout_path).map_err(of)?;
        let device = standby::device_path(&dir, durable.device_epoch);
        let device = standby::read_small(disk, &device, DEVICE_STATE_BYTES_MAX).map_err(of)?;
        let xml_path = standby::xml_path(&dir, durable.xml_epoch);
        let xml = standby::read_small(disk, &xml_path, DOMAIN_XML_BYTES_MAX).map_err(of)?;
        reader.check_small(guard.as_mut(), &device, &xml, &durable)?;
        drop(guard);
        let patches = reader.index(&sets)?;
        let wrong =
            |what: String| StoreError::Damaged { domain: domain.id.clone(), what: format!("point {id}: {what}") };
        if sets.is_empty() {
            (reader.layout, reader.device_state) = (layout, device);
            reader.domain_xml = String::from_utf8(xml).map_err(|_| wrong("the XML is not UTF-8".to_owned()))?;
            return Ok(reader);
        }
        let body = layout.to_bytes().map_err(|e| wrong(e.to_string()))?;
        let body = patches.apply(Array::Layout, body, tail.layout_bytes, standby::LAYOUT_BYTES_MAX).map_err(wrong)?;
        reader.layout = Layout::from_bytes(&body).map_err(|e| wrong(format!("its layout: {e}")))?;
        reader.device_state =
            patches.apply(Array::Device, device, tail.device_bytes, DEVICE_STATE_BYTES_MAX).map_err(wrong)?;
        let xml = patches.apply(Array::Xml, xml, tail.xml_bytes, DOMAIN_XML_BYTES_MAX).map_err(wrong)?;
        reader.domain_xml = String::from_utf8(xml).map_err(|_| wrong("the XML is not UTF-8".to_owned()))?;
        Ok(reader)
    }

    /// Which point it is.
    pub fn id(&self) -> PointId {
        self.id
    }

    /// Wall clock of the protected host at its cut.
    pub fn cut_unix_ns(&self) -> u64 {
        self.tail.cut_unix_ns
    }

    /// Whether the guest's file systems were at rest at its cut.
    pub fn application(&self) -> bool {
        self.tail.application
    }

    /// What it consists of.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What xen-save-devices-state wrote.
    pub fn device_state(&self) -> &[u8] {
        &self.device_state
    }

    /// The domain's XML.
    pub fn domain_xml(&self) -> &str {
        &self.domain_xml
    }

    /// The images of the point: its RAM blocks that are there, and its disks.
    pub fn arrays(&self) -> impl Iterator<Item = Array> + '_ {
        let ram = self.layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0);
        let ram = ram.map(|(n, _)| Array::Ram(n as u16));
        ram.chain((0..self.layout.disks.len()).map(|n| Array::Disk(n as u16)))
    }

    /// The length of an array in bytes; 0 of one that is not there.
    pub fn length(&self, array: Array) -> u64 {
        match array {
            Array::Ram(n) => self.layout.ram.get(usize::from(n)).map_or(0, |block| block.pages() * PAGE_BYTES as u64),
            Array::Disk(n) => self.layout.disks.get(usize::from(n)).map_or(0, |disk| disk.size_bytes),
            Array::Device => self.device_state.len() as u64,
            Array::Xml => self.domain_xml.len() as u64,
            Array::Layout => 0,
        }
    }

    /// Fills `buffer` with what a RAM block or disk has from `offset` on. Behind its end there are zeroes.
    pub fn read(&self, array: Array, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let guard = self.domain.standby();
        let mut state = self.state();
        self.follow(&mut state, guard.as_ref())?;
        self.read_image(&mut state, array, offset, buffer)?;
        // The image stands still until here, and before-images are read whoever writes it.
        drop(guard);
        let unit_bytes = UNIT_BYTES as u64;
        let end = offset + buffer.len() as u64;
        let mut unit = [0; UNIT_BYTES];
        let history = standby::history_dir(&self.domain.standby_dir(self.dir));
        for slot in state.index.within(array, offset / unit_bytes, end.div_ceil(unit_bytes)) {
            let entry = &slot.entry;
            let (from, to) = (entry.key.unit * unit_bytes, (entry.key.unit + u64::from(entry.count)) * unit_bytes);
            let (start, stop) = (from.max(offset), to.min(end));
            let into = &mut buffer[(start - offset) as usize..(stop - offset) as usize];
            if entry.is_zero() {
                into.fill(0);
                continue;
            }
            let read = if self.tolerant { read_unit_as_kept } else { read_unit };
            read(&*self.domain.disk, &history, slot.segment, entry, slot.at, &mut unit)
                .map_err(|error| StoreError::of(&self.domain.id, error))?;
            into.copy_from_slice(&unit[(start - from) as usize..(stop - from) as usize]);
        }
        let length = self.length(array);
        if end > length {
            let beyond = length.saturating_sub(offset).min(buffer.len() as u64) as usize;
            buffer[beyond..].fill(0);
        }
        Ok(())
    }

    /// Everything from `offset` up to what this returns is zero; the array's length if nothing more comes.
    pub fn data_from(&self, array: Array, offset: u64) -> Result<u64, StoreError> {
        let length = self.length(array);
        if offset >= length {
            return Ok(length);
        }
        let guard = self.domain.standby();
        let mut state = self.state();
        self.follow(&mut state, guard.as_ref())?;
        self.open_image(&mut state, array)?;
        let own = match state.images.get(&array) {
            Some(Some((path, file, sums))) => {
                let failed = |e| StoreError::of(&self.domain.id, JournalError::io("read", path)(e));
                let end = file.length().map_err(failed)?;
                let at = if offset < end { file.data_from(offset) } else { Ok(end) };
                let at = at.map(|at| if at >= end { length } else { at });
                let at = at.map_err(|e| StoreError::of(&self.domain.id, JournalError::io("read", path)(e)))?;
                // What is a hole and should not be one is found when it is read.
                let sum = sums.as_ref().map_or(Ok(u64::MAX), |sums| sums.data_from(offset / UNIT_BYTES as u64));
                let sum = sum.map_err(|error| StoreError::of(&self.domain.id, error))?;
                at.min(sum.saturating_mul(UNIT_BYTES as u64).max(offset))
            }
            _ => length,
        };
        let unit_bytes = UNIT_BYTES as u64;
        let (first, end) = (offset / unit_bytes, own.div_ceil(unit_bytes));
        let mut older = state.index.within(array, first, end.max(first + 1)).filter(|slot| !slot.entry.is_zero());
        let older = older.next().map_or(length, |slot| (slot.entry.key.unit * unit_bytes).max(offset));
        Ok(own.min(older).min(length))
    }

    /// The ranges in which this point may be other than an older one, which must lie on the same way back. It need not be a
    /// point any more: where it was thinned out, what changed in the epochs around it is told too.
    pub fn changed_since(&self, older: PointId) -> Result<Vec<Change>, StoreError> {
        let sets = {
            let catalog = self.domain.catalog();
            let reaches = |chain: &&Chain| {
                older.generation == chain.standby.generation && (chain.floor()..=self.id.epoch).contains(&older.epoch)
            };
            let chain = catalog.chain(self.dir).filter(reaches);
            let chain = chain.ok_or_else(|| self.domain.no_such_point(older))?;
            let sets = chain.sets.iter().filter(|set| set.to > older.epoch && set.to <= self.id.epoch);
            sets.copied().collect::<Vec<Set>>()
        };
        let dir = standby::history_dir(&self.domain.standby_dir(self.dir));
        let mut index = Index::default();
        for set in &sets {
            let read = read_set(&*self.domain.disk, &dir, set, &mut |entry, _, at| {
                if matches!(entry.key.array, Array::Ram(_) | Array::Disk(_)) {
                    index.add(entry, set.segment, at);
                }
                Ok(())
            });
            read.map_err(|error| StoreError::of(&self.domain.id, error))?;
        }
        Ok(ranges(index.0.values()))
    }

    /// The ranges in which the point is other than the standby's images, and those images' directory. They stand still only
    /// while the domain is frozen.
    pub fn differences(&self, array: Array) -> Result<Vec<Change>, StoreError> {
        let guard = self.domain.standby();
        let mut state = self.state();
        self.follow(&mut state, guard.as_ref())?;
        Ok(ranges(state.index.within(array, 0, u64::MAX)))
    }

    /// The point as an activation needs it: the paths are those of the images that it is based on, from which it differs in
    /// [`PointReader::differences`].
    pub fn recovery_point(self: Arc<Self>) -> RecoveryPoint {
        let dir = self.domain.standby_dir(self.dir);
        let blocks = self.layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0);
        let ram = blocks.map(|(n, block)| RamImage {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
            page_bytes: block.page_bytes,
            path: standby::ram_path(&dir, n),
        });
        let disks = self.layout.disks.iter().map(|disk| DiskImage {
            target: disk.target.clone(),
            size_bytes: disk.size_bytes,
            path: standby::disk_path(&dir, &disk.target),
        });
        RecoveryPoint {
            uuid: self.domain.id.clone(),
            name: self.name.clone(),
            generation: self.id.generation,
            epoch: self.id.epoch,
            cut_unix_ns: self.tail.cut_unix_ns,
            machine: self.layout.machine.clone(),
            domain_xml: self.domain_xml.clone(),
            ram: ram.collect(),
            device_state: PathBuf::new(),
            disks: disks.collect(),
            dir,
            layout: self.layout.clone(),
            sealed: self.domain.sealed,
            older: Some(self),
            checked: None,
        }
    }

    /// Disk bytes that were written since, up to the standby that it is based on.
    pub fn disk_bytes_since(&self) -> u64 {
        let catalog = self.domain.catalog();
        let sets = catalog.chain(self.dir).map_or(&[][..], |chain| chain.back_to(self.id.epoch));
        sets.iter().fold(0, |sum, set| sum.saturating_add(set.point.disk_bytes))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads sets into the index; returns what they say of the small parts.
    fn index(&mut self, sets: &[Set]) -> Result<Patches, StoreError> {
        let tolerant = self.tolerant;
        let mut patches = BTreeMap::new();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unit = Box::new([0; UNIT_BYTES]);
        let dir = standby::history_dir(&self.domain.standby_dir(self.dir));
        for set in sets {
            let read = read_set(&*self.domain.disk, &dir, set, &mut |entry, stored, at| {
                if matches!(entry.key.array, Array::Ram(_) | Array::Disk(_)) {
                    state.index.add(entry, set.segment, at);
                    return Ok(());
                }
                let wrong = |what| JournalError::Damaged { path: dir.clone(), what };
                let units = 0..u64::from(entry.count).min(DEVICE_STATE_BYTES_MAX / UNIT_BYTES as u64);
                if tolerant {
                    entry.as_kept(stored, &mut unit).map_err(wrong)?;
                } else if !units.clone().all(|n| patches.contains_key(&Key { unit: entry.key.unit + n, ..entry.key })) {
                    entry.content(stored, &mut unit).map_err(wrong)?;
                }
                for n in units {
                    let key = Key { unit: entry.key.unit + n, ..entry.key };
                    patches.entry(key).or_insert_with(|| (!entry.is_zero()).then(|| unit.clone()));
                }
                Ok(())
            });
            if let Err(error) = read {
                if matches!(error, JournalError::Damaged { .. }) {
                    self.domain.found_damaged(self.dir, set.from, &error.to_string());
                }
                return Err(StoreError::of(&self.domain.id, error));
            }
        }
        Ok(Patches(patches))
    }

    /// The standby may have gone on: then the way back to the point is longer.
    fn follow(&self, state: &mut State, applier: Option<&Applier>) -> Result<(), StoreError> {
        let domain = &*self.domain;
        let gone = || StoreError::NoSuchPoint { domain: domain.id.clone(), point: self.id.to_string() };
        // Forgotten: an image that is gone with its directory must not be taken for one that never was, which reads as zeroes.
        if domain.shared().closing {
            return Err(gone());
        }
        if let Some(applier) = applier.filter(|applier| applier.durable.dir == self.dir)
            && (applier.interrupted || applier.blind_until > applier.durable.epoch)
        {
            let what = format!("the standby is between epochs after {} until there is space", applier.durable.epoch);
            return Err(StoreError::Full { domain: domain.id.clone(), what });
        }
        let (epoch, sets) = {
            let catalog = domain.catalog();
            let chain = catalog.chain(self.dir).ok_or_else(gone)?;
            (chain.standby.epoch, chain.back_to(state.base).to_vec())
        };
        if epoch == state.base {
            return Ok(());
        }
        if sets.first().is_none_or(|set| set.from != state.base) {
            return Err(gone());
        }
        let dir = standby::history_dir(&domain.standby_dir(self.dir));
        for set in &sets {
            let read = read_set(&*domain.disk, &dir, set, &mut |entry, _, at| {
                if matches!(entry.key.array, Array::Ram(_) | Array::Disk(_)) {
                    state.index.add(entry, set.segment, at);
                }
                Ok(())
            });
            read.map_err(|error| StoreError::of(&domain.id, error))?;
        }
        let mut catalog = domain.catalog();
        let point = |epoch| PointId { generation: self.id.generation, epoch };
        hold(&mut catalog, point(epoch));
        let_go(&mut catalog, point(state.base));
        state.base = epoch;
        state.images.clear();
        Ok(())
    }

    fn open_image(&self, state: &mut State, array: Array) -> Result<(), StoreError> {
        if state.images.contains_key(&array) {
            return Ok(());
        }
        let dir = self.domain.standby_dir(self.dir);
        let opened = match image_path(&dir, &self.layout, array) {
            None => None,
            Some(path) => match self.domain.disk.open(&path, Mode::Read) {
                Ok(file) => {
                    let sums = match self.domain.has_sums(self.dir) {
                        true => Sums::open(&*self.domain.disk, &path, Mode::Read),
                        false => Ok(None),
                    };
                    Some((path, file, sums.map_err(|error| StoreError::of(&self.domain.id, error))?))
                }
                // A block that went before a restart.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
                Err(e) => return Err(StoreError::of(&self.domain.id, JournalError::io("open", &path)(e))),
            },
        };
        state.images.insert(array, opened);
        Ok(())
    }

    fn read_image(&self, state: &mut State, array: Array, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.open_image(state, array)?;
        let Some(Some((path, file, sums))) = state.images.get(&array) else {
            buffer.fill(0);
            return Ok(());
        };
        let of = |error| StoreError::of(&self.domain.id, error);
        if self.tolerant {
            read_units(&**file, path, buffer, offset).map_err(of)?;
            return Ok(());
        }
        // Checksums are of whole units.
        let unit_bytes = UNIT_BYTES as u64;
        let first = offset / unit_bytes;
        let count = ((offset + buffer.len() as u64).div_ceil(unit_bytes) - first) as usize;
        let mut known = vec![0; count];
        let counted = sums.as_ref().map_or(Ok(0), |sums| sums.read(first, &mut known)).map_err(of)?;
        let mut whole = Vec::new();
        let skipped = (offset - first * unit_bytes) as usize;
        let aligned = skipped == 0 && buffer.len() == count * UNIT_BYTES;
        let units: &mut [u8] = if aligned {
            &mut *buffer
        } else {
            whole.resize(count * UNIT_BYTES, 0);
            &mut whole
        };
        let unread = read_units(&**file, path, units, first * unit_bytes).map_err(of)?;
        let mut found = Vec::new();
        for (i, content) in units.as_chunks::<UNIT_BYTES>().0.iter().enumerate() {
            let unit = first + i as u64;
            let bad = unread.contains(&(i as u64)) || (i < counted && unit_sum(content) != known[i]);
            // What the point has otherwise does not matter to it.
            if bad && state.index.within(array, unit, unit + 1).next().is_none() {
                found.push(Flaw::of(array, unit, 1));
            }
        }
        if !aligned {
            buffer.copy_from_slice(&whole[skipped..skipped + buffer.len()]);
        }
        if found.is_empty() { Ok(()) } else { self.found(&found) }
    }

    /// Notes damage of the standby that the point consists of.
    fn found(&self, found: &[Flaw]) -> Result<(), StoreError> {
        self.domain.note_flaws(self.dir, found)?;
        Err(flawed(&self.domain, self.id))
    }

    fn check_small(
        &self,
        applier: Option<&mut Applier>,
        device: &[u8],
        xml: &[u8],
        durable: &Standby,
    ) -> Result<(), StoreError> {
        let sums = self.domain.control().small_sums.iter().find(|sums| sums.dir == durable.dir).copied();
        let Some(sums) = sums.filter(|sums| apply::same_files(sums, durable) && !self.tolerant) else { return Ok(()) };
        let mut found = apply::small_flaws_of(&sums, device, xml);
        if let Some(applier) = applier.filter(|applier| applier.durable.dir == durable.dir && !found.is_empty()) {
            // So that it is mended by what comes next.
            applier.check_small().map_err(|error| StoreError::of(&self.domain.id, error))?;
        }
        if let Some(chain) = self.domain.catalog().chain(self.dir) {
            // It is known, and that this point has it otherwise.
            found.retain(|flaw| !chain.open_flaws().any(|known| known.array == flaw.array));
        }
        if found.is_empty() { Ok(()) } else { self.found(&found) }
    }
}

impl Drop for PointReader {
    fn drop(&mut self) {
        let base = self.state().base;
        let mut catalog = self.domain.catalog();
        catalog.readers.remove(&self.number);
        for epoch in [self.id.epoch, base] {
            let_go(&mut catalog, PointId { generation: self.id.generation, epoch });
        }
        drop(catalog);
        self.domain.remove_doomed();
    }
}

fn flawed(domain: &Domain, id: PointId) -> StoreError {
    StoreError::Flawed { domain: domain.id.clone(), point: id.to_string() }
}

fn hold(catalog: &mut Catalog, id: PointId) {
    *catalog.read.entry(id).or_insert(0) += 1;
}

fn let_go(catalog: &mut Catalog, id: PointId) {
    if let Some(count) = catalog.read.get_mut(&id) {
        *count -= 1;
        if *count == 0 {
            catalog.read.remove(&id);
        }
    }
}

/// Neighbouring slots as one.
fn ranges<'a>(slots: impl Iterator<Item = &'a Slot>) -> Vec<Change> {
    let unit_bytes = UNIT_BYTES as u64;
    let mut ranges: Vec<Change> = Vec::new();
    for slot in slots {
        let Key { array, unit } = slot.entry.key;
        let (offset, bytes) = (unit * unit_bytes, u64::from(slot.entry.count) * unit_bytes);
        match ranges.last_mut().filter(|last| last.array == array && last.offset + last.bytes == offset) {
            Some(last) => last.bytes += bytes,
            None => ranges.push(Change { array, offset, bytes }),
        }
    }
    ranges
}
