//! Durable epochs become the standby's content: by a thread of each domain, behind the acknowledgements, in batches.
//!
//! A batch is, for some epochs that are durable:
//! 1. gather what they write in memory, and append what that replaces to the history, a set for each epoch;
//! 2. sync the history; say in the control record up to which epoch, and up to where in the history (*announced*);
//! 3. write the images. When there is too much for memory, 1 to 3 come several times;
//! 4. sync the images; say in the control record that the batch is done, and that its sets are whole (*committed*).
//!
//! Whatever stops a batch, the before-images up to the announced place take the standby back to where it began: it is
//! exactly one epoch again, which is where the next try begins. So the standby is never a mixture as long as the control
//! record and the history can be read, even if the journal cannot. Where the history is damaged the journal can replay all
//! of the batch instead, because nothing in it is removed before 4; points from before are then given up.

use std::sync::Arc;
use std::sync::PoisonError;
use std::time::Instant;

use vmdr_codec::{PAGE_BYTES, Record};
use vmdr_journal::{
    Array, HistoryLog, HistoryMark, JournalError, Key, PointTail, Set, SmallSums, Standby, UNIT_BYTES, read_chunk,
    remove_segments_before, unit_sum,
};
use xxhash_rust::xxh3::xxh3_64;

use super::StoreError;
use super::domain::{Domain, Epoch};
use super::flaws::{Flaw, small_flaws, small_units};
use super::images::{StandbyFiles, ZERO_BYTES};
use super::pending::{Flawed, Recorder, ZERO_UNIT};
use super::standby::{self, write_aside};

/// Memory for what is gathered before it is written.
const PENDING_BYTES_MAX: u64 = 48 << 20;

/// The current standby while it is written.
#[derive(Debug)]
pub(super) struct Applier {
    pub files: StandbyFiles,
    pub log: HistoryLog,
    /// What the control record says of the standby.
    pub durable: Standby,
    /// What it says of its history.
    pub mark: HistoryMark,
    /// A batch was begun and not ended: the images may be anything between.
    pub interrupted: bool,
    /// The images may be a mixture up to this epoch, which no before-images can undo: only the journal can, up to there.
    pub blind_until: u64,
    /// Checksums of the small files.
    pub sums: SmallSums,
    small: Small,
}

/// The small parts of a point, as bytes.
#[derive(Debug, Clone, Default)]
struct Small {
    device: Vec<u8>,
    xml: Vec<u8>,
    layout: Vec<u8>,
    /// What was read of the device state, or the XML, is not what was written.
    device_flawed: bool,
    xml_flawed: bool,
}

/// A batch that was gathered.
struct Batch {
    sets: Vec<Set>,
    small: Small,
    epoch: u64,
    cut_unix_ns: u64,
    application: bool,
    changed: Changed,
    /// What of the small files was damaged, and by which epoch it is mended.
    mended: Vec<Flawed>,
}

#[derive(Default)]
struct Changed {
    device: bool,
    xml: bool,
    layout: bool,
}

impl Applier {
    /// For files that are as `durable` says.
    pub fn new(
        files: StandbyFiles,
        log: HistoryLog,
        durable: Standby,
        mark: HistoryMark,
        sums: Option<SmallSums>,
    ) -> Result<Self, JournalError> {
        let (interrupted, blind_until, small) = (false, 0, Small::default());
        let mut applier =
            Self { files, log, durable, mark, interrupted, blind_until, sums: SmallSums::default(), small };
        applier.small = applier.read_small(&durable)?;
        let found = applier.small.sums(&durable);
        applier.sums = sums.filter(|sums| same_files(sums, &durable)).unwrap_or(found);
        applier.small.device_flawed = applier.sums.device != found.device;
        applier.small.xml_flawed = applier.sums.xml != found.xml;
        Ok(applier)
    }

    /// What of the standby is known to be damaged without reading its images.
    pub fn small_flaws(&self) -> Vec<Flaw> {
        let Small { device, xml, device_flawed, xml_flawed, .. } = &self.small;
        small_flaws(device_flawed.then_some(device.len()), xml_flawed.then_some(xml.len()))
    }

    /// Reads the small files again; whether device state and XML are not what they should be. What is damaged is what they are
    /// from now on, so that whatever comes next replaces the file, and it is known that this mends it.
    pub fn check_small(&mut self) -> Result<Vec<Flaw>, JournalError> {
        self.small = self.read_small(&self.durable)?;
        let found = self.small.sums(&self.durable);
        self.small.device_flawed = self.sums.device != found.device;
        self.small.xml_flawed = self.sums.xml != found.xml;
        Ok(self.small_flaws())
    }

    fn read_small(&self, durable: &Standby) -> Result<Small, JournalError> {
        let (disk, dir) = (self.files.disk(), self.files.dir());
        let device = standby::device_path(dir, durable.device_epoch);
        let xml = standby::xml_path(dir, durable.xml_epoch);
        let layout = standby::layout_path(dir, durable.layout_epoch);
        Ok(Small {
            device: standby::read_small(disk, &device, vmdr_codec::DEVICE_STATE_BYTES_MAX)?,
            xml: standby::read_small(disk, &xml, vmdr_codec::DOMAIN_XML_BYTES_MAX)?,
            layout: layout_body(&standby::read_layout(disk, &layout)?, &layout)?,
            ..Small::default()
        })
    }

    /// Whether the images, or the log's end, may be those of a batch that was begun and not ended.
    pub fn is_stopped(&self) -> bool {
        self.interrupted || self.blind_until > self.durable.epoch
    }

    /// What comes next goes to a segment of its own: where the last one is damaged it might not be found behind that.
    pub fn begin_segment(&mut self) -> Result<(), JournalError> {
        if self.mark.announced == self.mark.committed {
            self.log.roll()?;
            self.mark.committed = self.log.place();
            self.mark.announced = self.mark.committed;
        }
        Ok(())
    }

    /// After a batch that was stopped: the standby is what it was before.
    pub fn roll_back(&mut self, domain: &Domain) -> Result<(), StoreError> {
        let failure = |error| domain.failure(error);
        if self.blind_until <= self.durable.epoch {
            let layout = standby::layout_path(self.files.dir(), self.durable.layout_epoch);
            let layout = standby::read_layout(&*domain.disk, &layout).map_err(failure)?;
            let HistoryMark { committed, announced, .. } = self.mark;
            if announced > committed {
                self.files.roll_back(committed, announced, Arc::new(layout)).map_err(failure)?;
            } else {
                self.files.forget(Arc::new(layout));
            }
            if self.durable.applying != self.durable.epoch || announced != committed {
                let durable = Standby { applying: self.durable.epoch, ..self.durable };
                let mark = HistoryMark { announced: committed, announced_for: durable.epoch, ..self.mark };
                self.say(domain, durable, mark)?;
            }
        } else {
            let layout = standby::layout_path(self.files.dir(), self.durable.layout_epoch);
            let layout = standby::read_layout(&*domain.disk, &layout).map_err(failure)?;
            self.files.forget(Arc::new(layout));
        }
        self.log.cut(self.mark.committed).map_err(failure)?;
        self.interrupted = false;
        Ok(())
    }

    fn say(&mut self, domain: &Domain, durable: Standby, mark: HistoryMark) -> Result<(), StoreError> {
        domain.change_control(|control| {
            control.standby = Some(durable);
            control.history = mark;
        })?;
        (self.durable, self.mark) = (durable, mark);
        Ok(())
    }

    /// Gathers the epochs of a batch, and writes them as far as memory demands.
    fn gather(&mut self, domain: &Domain, epochs: &[Arc<Epoch>]) -> Result<Batch, StoreError> {
        let newest = epochs.last().map_or(self.durable.epoch, |epoch| epoch.epoch);
        let mut batch = Batch {
            sets: Vec::with_capacity(epochs.len()),
            small: self.small.clone(),
            epoch: self.durable.epoch,
            cut_unix_ns: self.durable.cut_unix_ns,
            application: self.mark.application,
            changed: Changed::default(),
            mended: Vec::new(),
        };
        for epoch in epochs {
            let begun = self.log.begin(self.durable.generation, batch.epoch, epoch.epoch);
            begun.map_err(|error| domain.failure(error))?;
            self.payloads(domain, epoch, newest)?;
            let set = self.end_epoch(epoch, &mut batch).map_err(|error| domain.failure(error))?;
            batch.sets.push(set);
        }
        self.flush(domain, newest)?;
        Ok(batch)
    }

    /// A batch that goes no further than to have written the images.
    #[cfg(test)]
    pub fn gather_for_test(&mut self, domain: &Domain, epochs: &[Arc<Epoch>]) {
        assert!(self.gather(domain, epochs).is_ok());
    }

    fn payloads(&mut self, domain: &Domain, epoch: &Epoch, newest: u64) -> Result<(), StoreError> {
        if let Some(payloads) = &epoch.payloads {
            return payloads.iter().try_for_each(|payload| self.payload(domain, payload, epoch.epoch, newest));
        }
        let dir = domain.journal_dir();
        for part in &epoch.parts {
            for chunk in &part.chunks {
                let payload = read_chunk(&*domain.disk, &dir, part.segment, chunk);
                let payload = payload.map_err(|error| domain.failure(error))?;
                self.payload(domain, &payload, epoch.epoch, newest)?;
            }
        }
        Ok(())
    }

    fn payload(&mut self, domain: &Domain, payload: &[u8], epoch: u64, newest: u64) -> Result<(), StoreError> {
        for record in vmdr_codec::decode(payload) {
            let record = record.map_err(|e| JournalError::Damaged {
                path: self.files.dir().to_owned(),
                what: format!("what is to be applied: {e}"),
            });
            match record.map_err(|error| domain.failure(error))? {
                Record::RamZero { block, first, pages } => {
                    let page = PAGE_BYTES as u64;
                    self.zero(domain, (Array::Ram(block), first * page, pages * page), epoch, newest)?;
                }
                Record::DiskZero { disk, offset, length } => {
                    self.zero(domain, (Array::Disk(disk), offset, length), epoch, newest)?;
                }
                record => {
                    if let Record::Layout(layout) = &record {
                        for range in self.files.zeroed_by(layout) {
                            self.zero(domain, range, epoch, newest)?;
                        }
                    }
                    let recorded = self.files.record(record, &mut Recorder { log: &mut self.log, epoch });
                    recorded.map_err(|error| domain.failure(error))?;
                }
            }
            self.flush_if_much(domain, newest)?;
        }
        Ok(())
    }

    fn zero(
        &mut self,
        domain: &Domain,
        (array, offset, length): (Array, u64, u64),
        epoch: u64,
        newest: u64,
    ) -> Result<(), StoreError> {
        let end = offset + length;
        let mut at = offset;
        loop {
            // Over a hole in one step: whatever length an agent gives a disk.
            at = self.files.data_from(array, at).map_err(|error| domain.failure(error))?;
            if at >= end {
                return Ok(());
            }
            let now = ZERO_BYTES.min(end - at);
            let mut to = Recorder { log: &mut self.log, epoch };
            self.files.record_zero(array, at, now, &mut to).map_err(|error| domain.failure(error))?;
            at += now;
            self.flush_if_much(domain, newest)?;
        }
    }

    fn flush_if_much(&mut self, domain: &Domain, newest: u64) -> Result<(), StoreError> {
        if self.files.pending_bytes() < PENDING_BYTES_MAX { Ok(()) } else { self.flush(domain, newest) }
    }

    /// Writes what was gathered, after what it replaces is durable and announced.
    fn flush(&mut self, domain: &Domain, newest: u64) -> Result<(), StoreError> {
        let announced = self.log.sync().map_err(|error| domain.failure(error))?;
        let durable = Standby { applying: newest.max(self.blind_until), ..self.durable };
        let announced_for = if self.blind_until > self.durable.epoch { 0 } else { durable.applying };
        self.say(domain, durable, HistoryMark { announced, announced_for, ..self.mark })?;
        self.files.flush().map_err(|error| domain.failure(error))
    }

    /// All of an epoch is gathered: what it changed beside pages and extents goes to the history too.
    fn end_epoch(&mut self, epoch: &Epoch, batch: &mut Batch) -> Result<Set, JournalError> {
        let brought = self.files.take_brought();
        let old = &batch.small;
        let point = PointTail {
            cut_unix_ns: batch.cut_unix_ns,
            application: batch.application,
            device_bytes: old.device.len() as u64,
            xml_bytes: old.xml.len() as u64,
            layout_bytes: old.layout.len() as u64,
            disk_bytes: epoch.disk_bytes(),
        };
        let layout = match brought.layout {
            true => layout_body(self.files.layout(), self.files.dir())?,
            false => old.layout.clone(),
        };
        let new = Small {
            device_flawed: old.device_flawed && brought.device_state.is_none(),
            xml_flawed: old.xml_flawed && brought.xml.is_none(),
            device: brought.device_state.unwrap_or_else(|| old.device.clone()),
            xml: brought.xml.unwrap_or_else(|| old.xml.clone()),
            layout,
        };
        let device_mended = old.device_flawed && !new.device_flawed;
        let xml_mended = old.xml_flawed && !new.xml_flawed;
        for (mended, array) in [(device_mended, Array::Device), (xml_mended, Array::Xml)] {
            if mended {
                let bytes = if array == Array::Device { old.device.len() } else { old.xml.len() };
                let (key, count) = (Key { array, unit: 0 }, small_units(bytes));
                batch.mended.push(Flawed { key, count, healed_by: Some(epoch.epoch) });
            }
        }
        batch.changed.device |= new.device != old.device || device_mended;
        batch.changed.xml |= new.xml != old.xml || xml_mended;
        batch.changed.layout |= new.layout != old.layout;
        for (array, old, new, flawed) in [
            (Array::Device, &old.device, &new.device, old.device_flawed),
            (Array::Xml, &old.xml, &new.xml, old.xml_flawed),
            (Array::Layout, &old.layout, &new.layout, false),
        ] {
            differences(&mut self.log, array, old, new, flawed)?;
        }
        batch.small = new;
        batch.epoch = epoch.epoch;
        batch.cut_unix_ns = epoch.cut_unix_ns;
        batch.application = epoch.application();
        self.log.end(point)
    }

    /// Makes a batch durable and says so in the control record; the journal up to there is then not needed.
    fn checkpoint(&mut self, domain: &Domain, batch: Batch) -> Result<(), StoreError> {
        let Batch { sets, small, epoch, cut_unix_ns, application, changed, mut mended } = batch;
        let blind = self.blind_until > self.durable.epoch;
        let mut durable = Standby { epoch, cut_unix_ns, applying: epoch, ..self.durable };
        self.write(domain, &mut durable, &small, &changed).map_err(|error| domain.failure(error))?;
        mended.extend(self.files.take_flawed());
        let flaws = domain.flaws_after(durable.dir, &mended)?;
        let sums = SmallSums {
            device: if changed.device { xxh3_64(&small.device) } else { self.sums.device },
            xml: if changed.xml { xxh3_64(&small.xml) } else { self.sums.xml },
            ..small.sums(&durable)
        };
        let committed = self.log.place();
        let mut mark =
            HistoryMark { committed, announced: committed, announced_for: epoch, application, floor: self.mark.floor };
        if blind || mark.floor == 0 {
            // What lies before was not recorded as it was.
            mark.floor = if blind { epoch } else { self.durable.epoch };
        }
        let first = {
            let shared = domain.shared();
            let backlog = shared.backlog.iter().filter(|waiting| waiting.epoch > epoch);
            let backlog = backlog.filter_map(|epoch| epoch.parts.first()).map(|part| part.segment);
            backlog.chain([shared.open_segment]).min().unwrap_or(shared.open_segment)
        };
        domain.change_control(|control| {
            control.standby = Some(durable);
            control.history = mark;
            control.journal_first = first;
            control.put_small_sums(sums);
        })?;
        let before = std::mem::replace(&mut self.durable, durable);
        (self.mark, self.small, self.sums, self.interrupted) = (mark, small, sums, false);
        domain.catalog().advance(durable, application, sets, blind);
        if let Some((flaws, coarse)) = flaws {
            domain.set_flaws(durable.dir, flaws, coarse);
        }
        {
            let mut shared = domain.shared();
            while shared.backlog.front().is_some_and(|waiting| waiting.epoch <= epoch) {
                let bytes = shared.backlog.pop_front().map_or(0, |epoch| epoch.bytes);
                shared.backlog_bytes = shared.backlog_bytes.saturating_sub(bytes);
            }
            (shared.applied, shared.synced) = (epoch, epoch);
            domain.changed.notify_all();
        }
        self.sweep(domain, first, &before);
        Ok(())
    }

    fn write(
        &mut self,
        domain: &Domain,
        durable: &mut Standby,
        small: &Small,
        changed: &Changed,
    ) -> Result<(), JournalError> {
        self.files.sync()?;
        let (disk, dir, epoch) = (&*domain.disk, self.files.dir(), durable.epoch);
        if changed.device {
            write_aside(disk, &standby::device_path(dir, epoch), &small.device)?;
            durable.device_epoch = epoch;
        }
        if changed.layout {
            let path = standby::layout_path(dir, epoch);
            write_aside(disk, &path, &standby::layout_bytes(self.files.layout(), &path)?)?;
            durable.layout_epoch = epoch;
        }
        if changed.xml {
            write_aside(disk, &standby::xml_path(dir, epoch), &small.xml)?;
            durable.xml_epoch = epoch;
        }
        disk.sync_dir(dir).map_err(JournalError::io("sync", dir))
    }

    /// Removes what the control record no longer mentions. What cannot be removed now is at the next open.
    fn sweep(&self, domain: &Domain, first: u64, before: &Standby) {
        let dir = self.files.dir();
        let after = &self.durable;
        let old = [
            (before.device_epoch != after.device_epoch).then(|| standby::device_path(dir, before.device_epoch)),
            (before.layout_epoch != after.layout_epoch).then(|| standby::layout_path(dir, before.layout_epoch)),
            (before.xml_epoch != after.xml_epoch).then(|| standby::xml_path(dir, before.xml_epoch)),
        ];
        for path in old.into_iter().flatten() {
            if let Err(error) = domain.disk.remove_file(&path) {
                tracing::warn!(domain = %domain.id, path = %path.display(), %error, "cannot remove a superseded file");
            }
        }
        if let Err(error) = remove_segments_before(&*domain.disk, &domain.journal_dir(), first) {
            tracing::warn!(domain = %domain.id, %error, "cannot remove journal segments that are applied");
        }
    }
}

/// A layout as it is kept in the history.
fn layout_body(layout: &vmdr_codec::Layout, path: &std::path::Path) -> Result<Vec<u8>, JournalError> {
    layout.to_bytes().map_err(|e| JournalError::Damaged { path: path.to_owned(), what: e.to_string() })
}

impl Small {
    fn sums(&self, durable: &Standby) -> SmallSums {
        let Standby { dir, device_epoch, xml_epoch, .. } = *durable;
        SmallSums { dir, device_epoch, device: xxh3_64(&self.device), xml_epoch, xml: xxh3_64(&self.xml) }
    }
}

/// Device state and XML of a standby.
pub(super) fn small_files(
    disk: &dyn vmdr_journal::Disk,
    dir: &std::path::Path,
    durable: &Standby,
) -> Result<(Vec<u8>, Vec<u8>), JournalError> {
    let device = standby::device_path(dir, durable.device_epoch);
    let xml = standby::xml_path(dir, durable.xml_epoch);
    let device = standby::read_small(disk, &device, vmdr_codec::DEVICE_STATE_BYTES_MAX)?;
    Ok((device, standby::read_small(disk, &xml, vmdr_codec::DOMAIN_XML_BYTES_MAX)?))
}

/// Checksums of the small files of a standby that has become one just now.
pub(super) fn small_sums(
    disk: &dyn vmdr_journal::Disk,
    dir: &std::path::Path,
    durable: &Standby,
) -> Result<SmallSums, JournalError> {
    let (device, xml) = small_files(disk, dir, durable)?;
    Ok(Small { device, xml, ..Small::default() }.sums(durable))
}

/// What of device state and XML is not what the checksums are of.
pub(super) fn small_flaws_of(sums: &SmallSums, device: &[u8], xml: &[u8]) -> Vec<Flaw> {
    let device = (xxh3_64(device) != sums.device).then_some(device.len());
    small_flaws(device, (xxh3_64(xml) != sums.xml).then_some(xml.len()))
}

/// Whether the checksums are of these files.
pub(super) fn same_files(sums: &SmallSums, durable: &Standby) -> bool {
    (sums.dir, sums.device_epoch, sums.xml_epoch) == (durable.dir, durable.device_epoch, durable.xml_epoch)
}

/// Records the units of `old` that `new` has otherwise; `flawed`: `old` is not what it should be.
fn differences(log: &mut HistoryLog, array: Array, old: &[u8], new: &[u8], flawed: bool) -> Result<(), JournalError> {
    if old == new {
        return Ok(());
    }
    for unit in 0..old.len().max(new.len()).div_ceil(UNIT_BYTES) {
        let (was, is) = (padded(old, unit), padded(new, unit));
        if was != is {
            let key = Key { array, unit: unit as u64 };
            if flawed {
                log.before_with(key, &was, !unit_sum(&was), true)?;
            } else {
                log.before(key, (was != ZERO_UNIT).then_some(&was))?;
            }
        }
    }
    Ok(())
}

fn padded(bytes: &[u8], unit: usize) -> [u8; UNIT_BYTES] {
    let mut padded = [0; UNIT_BYTES];
    let rest = bytes.get(unit * UNIT_BYTES..).unwrap_or(&[]);
    let length = rest.len().min(UNIT_BYTES);
    padded[..length].copy_from_slice(&rest[..length]);
    padded
}

impl Domain {
    /// Starts the thread that applies.
    pub fn start(self: &Arc<Self>) -> Result<(), StoreError> {
        let domain = self.clone();
        let thread = std::thread::Builder::new().name("vmdr-apply".to_owned()).spawn(move || domain.run());
        let thread = thread.map_err(|error| {
            let what = format!("cannot start the thread that applies: {error}");
            StoreError::Io { domain: self.id.clone(), what }
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    fn run(&self) {
        while self.wait_for_batch() {
            let result = self.batch();
            let full = matches!(result, Err(StoreError::Full { .. }));
            if full {
                // What the batch has written so far, then what is not asked for any more, or the oldest points: it may be
                // enough. What cannot be taken back now is before the next batch.
                if let Err(error) = self.take_back() {
                    tracing::warn!(domain = %self.id, %error, "a batch that was stopped cannot be taken back now");
                }
                self.thin(true);
            }
            self.settle(result);
            self.thin(false);
        }
    }

    /// Waits until there is enough to apply, or it has waited long enough, or somebody wants it; false: stop.
    fn wait_for_batch(&self) -> bool {
        let mut since = Instant::now();
        let mut shared = self.shared();
        loop {
            if shared.closing || shared.failed.is_some() {
                return false;
            }
            let idle = shared.backlog.is_empty();
            if idle {
                shared.sync_wanted = false;
                since = Instant::now();
            }
            let due = shared.sync_wanted
                || shared.backlog_bytes >= self.options.apply_bytes
                || since.elapsed() >= self.options.apply_interval;
            if due && !idle {
                return true;
            }
            let left = self.options.apply_interval.saturating_sub(since.elapsed());
            if !idle {
                shared = self.wait_at_most(shared, left);
                continue;
            }
            shared = self.wait(shared);
            if shared.backlog.is_empty() && !shared.closing && shared.failed.is_none() && !shared.frozen {
                drop(shared);
                if self.wants_room() {
                    return true;
                }
                shared = self.shared();
            }
        }
    }

    fn take_back(&self) -> Result<(), StoreError> {
        match &mut *self.standby() {
            Some(applier) if applier.interrupted => applier.roll_back(self),
            _ => Ok(()),
        }
    }

    /// Applies what is durable now, or as much of it as makes a batch, and makes that durable.
    pub fn batch(&self) -> Result<(), StoreError> {
        let mut standby = self.standby();
        let Some(applier) = &mut *standby else { return Ok(()) };
        if applier.interrupted {
            applier.roll_back(self)?;
        }
        // A seed replaces the backlog together with the standby, and has to wait for this lock.
        let mut bytes = 0;
        let mut epochs: Vec<Arc<Epoch>> = Vec::new();
        for epoch in self.shared().backlog.iter() {
            if bytes >= self.options.apply_bytes && epoch.epoch > applier.blind_until {
                break;
            }
            bytes += epoch.bytes;
            epochs.push(epoch.clone());
        }
        if epochs.is_empty() {
            return Ok(());
        }
        applier.interrupted = true;
        let batch = applier.gather(self, &epochs)?;
        applier.checkpoint(self, batch)
    }

    /// Applies all that is durable now.
    pub fn apply_all(&self) -> Result<(), StoreError> {
        while !self.shared().backlog.is_empty() {
            self.batch()?;
        }
        Ok(())
    }

    /// After work of the thread: lack of space is waited out, anything else has made the domain fail.
    fn settle(&self, result: Result<(), StoreError>) {
        let mut shared = self.shared();
        match result {
            Ok(()) => shared.stalled = None,
            Err(error @ StoreError::Full { .. }) => {
                if shared.stalled.is_none() {
                    tracing::error!(domain = %self.id, %error, "durable epochs cannot be applied, trying again");
                }
                shared.stalled = Some(error.to_string());
                shared.stalls += 1;
                shared.retry_wanted = false;
                self.changed.notify_all();
                let until = Instant::now() + self.options.retry_interval;
                while !shared.closing && !shared.retry_wanted && Instant::now() < until {
                    shared = self.wait_at_most(shared, until.saturating_duration_since(Instant::now()));
                }
            }
            Err(_) => {}
        }
    }
}
