//! A state directory as it lies there, read without changing anything: what is in it, what of it is damaged, and which recovery
//! points can be restored from it.
//!
//! It needs no receiver, takes no lock and refuses nothing that it can read. Of a directory in which a receiver works it says so:
//! what that changes meanwhile may look like damage.
//!
//! A point is *sound* if everything that it consists of matches its checksums: the control record, layout, device state and XML,
//! each unit of the standby's images that no before-image replaces, and the history on the way back. If a batch was interrupted
//! the before-images that undo it count for what they replace. It is *unproved* where there are no checksums (of an older version).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;
use vmdr_codec::{DEVICE_STATE_BYTES_MAX, DOMAIN_XML_BYTES_MAX, Layout, PAGE_BYTES};
use vmdr_journal::{
    Array, Control, Disk, FsDisk, HistoryMark, HistoryScan, JournalError, Key, Mode, Standby, UNIT_BYTES, read_back,
    read_set, segment_path, segments, survey_journal, survey_segment, unit_sum,
};
use vmdr_keys::MasterKey;
use xxhash_rust::xxh3::xxh3_64;

use super::apply::same_files;
use super::catalog::{Chain, PointId};
use super::domain::standby_dir;
use super::flaws::{self, Flaw};
use super::recover::Replay;
use super::rest;
use super::standby::{self, image_path};
use super::sums::{self, Sums};
use super::{EXPORTED_FILE, GROUPS, IMPORTED_FILE, OWNER_FILE};

/// Bytes of an image read at once.
const READ_BYTES: usize = 1 << 20;
/// Damaged ranges of an image that are named one by one.
const RANGES_MAX: usize = 64;

/// What was found in a state directory.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The directory.
    pub directory: PathBuf,
    /// A receiver works in it.
    pub receiver_running: bool,
    /// Nothing is damaged, and every point is sound or unproved.
    pub sound: bool,
    /// The domains.
    pub domains: Vec<DomainReport>,
    /// What is not of vmdr.
    pub strange: Vec<PathBuf>,
}

/// What was found of a domain.
#[derive(Debug, Default, Serialize)]
pub struct DomainReport {
    /// Its UUID.
    pub uuid: String,
    /// Its name, as the control record has it.
    pub name: String,
    /// What there is, in order.
    pub files: Vec<FileReport>,
    /// Damage, each once.
    pub damage: Vec<DamageReport>,
    /// The recovery points, newest first.
    pub points: Vec<PointReport>,
    /// Why nothing of it can be read: it is encrypted, and the key is not here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
}

/// A file.
#[derive(Debug, Serialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// What it is, in words.
    pub what: String,
    /// Its length.
    pub bytes: u64,
    /// The records in it, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<RecordReport>,
}

/// A record of a segment.
#[derive(Debug, Serialize)]
pub struct RecordReport {
    /// Where it begins.
    pub offset: u64,
    /// In words.
    pub what: String,
    /// What is wrong with it.
    pub damage: Option<String>,
}

/// A place that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamageReport {
    /// The file.
    pub path: PathBuf,
    /// Where in it, if that is known.
    pub offset: Option<u64>,
    /// In which way.
    pub what: String,
}

/// Whether a point can be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Soundness {
    /// Proved.
    Sound,
    /// Nothing speaks against it, but there are no checksums of everything.
    Unproved,
    /// Refuted.
    Damaged,
}

/// A recovery point.
#[derive(Debug, Serialize)]
pub struct PointReport {
    /// GENERATION-EPOCH.
    pub id: String,
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// Whether it can be restored.
    pub soundness: Soundness,
    /// Why not.
    pub why: Option<String>,
    /// Its names.
    pub names: Vec<String>,
}

/// What to look at.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Only this domain: UUID or name.
    pub domain: Option<String>,
    /// Every record of every segment.
    pub records: bool,
    /// Keys that domains may be encrypted under.
    pub keys: Vec<MasterKey>,
}

/// Looks at the state directory `dir`.
pub fn inspect(dir: &Path, wanted: &Wanted) -> std::io::Result<Report> {
    let mut report =
        Report { directory: dir.to_owned(), receiver_running: is_locked(dir), sound: true, ..Report::default() };
    let mut names: Vec<String> = FsDisk.list(dir)?;
    names.sort();
    for name in names {
        let path = dir.join(&name);
        let uuid = Uuid::try_parse(&name).ok().filter(|uuid| uuid.to_string() == name);
        let Some(uuid) = uuid else {
            if !["lock", OWNER_FILE, GROUPS].contains(&&*name) {
                report.strange.push(path);
            }
            continue;
        };
        let domain = Looked::at(&path, uuid, wanted).report;
        let is_it = wanted.domain.as_ref().is_none_or(|wanted| *wanted == domain.uuid || *wanted == domain.name);
        if is_it {
            report.sound &= domain.damage.is_empty() && domain.closed.is_none();
            report.sound &= domain.points.iter().all(|point| point.soundness != Soundness::Damaged);
            report.domains.push(domain);
        }
    }
    Ok(report)
}

/// Whether a receiver holds the lock of the directory.
fn is_locked(dir: &Path) -> bool {
    let Ok(file) = std::fs::File::open(dir.join("lock")) else { return false };
    // Let go of at once: a receiver that starts must not be kept from it.
    let locked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared);
    matches!(locked, Err(rustix::io::Errno::WOULDBLOCK))
}

struct Looked<'a> {
    disk: Arc<dyn Disk>,
    dir: &'a Path,
    uuid: Uuid,
    records: bool,
    report: DomainReport,
}

/// A standby with what was found out about it.
struct Found {
    standby: Standby,
    chain: Chain,
    /// Units that are not what they should be.
    flaws: Vec<Flaw>,
    /// Why no point of it can be had.
    fatal: Option<String>,
    /// There are no checksums of all of it.
    unproved: bool,
}

impl<'a> Looked<'a> {
    fn at(dir: &'a Path, uuid: Uuid, wanted: &Wanted) -> Self {
        let report = DomainReport { uuid: uuid.to_string(), ..DomainReport::default() };
        let disk: Arc<dyn Disk> = Arc::new(FsDisk);
        let place = rest::place_to_read(&disk, dir, uuid, &wanted.keys);
        let mut looked = Self { disk, dir, uuid, records: wanted.records, report };
        match place {
            Ok(place) => {
                looked.disk = place.disk;
                if place.sealed {
                    looked.file(&dir.join(rest::KEY_FILE), "the domain's data key: everything else here is encrypted");
                }
                looked.domain();
            }
            Err(what) => looked.closed(what),
        }
        looked
    }

    /// Lists what there is of a domain of which nothing can be read.
    fn closed(&mut self, what: String) {
        let mut left = vec![self.dir.to_owned()];
        while let Some(dir) = left.pop() {
            for name in self.disk.list(&dir).unwrap_or_default() {
                let path = dir.join(name);
                if path.is_dir() && !path.is_symlink() {
                    left.push(path);
                } else {
                    self.file(&path, "cannot be read");
                }
            }
        }
        self.report.files.sort_by(|a, b| a.path.cmp(&b.path));
        self.report.closed = Some(what);
    }

    fn damage(&mut self, path: &Path, offset: Option<u64>, what: impl Into<String>) {
        let damage = DamageReport { path: path.to_owned(), offset, what: what.into() };
        if !self.report.damage.contains(&damage) {
            self.report.damage.push(damage);
        }
    }

    /// Notes damage that a reader has found; what it says of it.
    fn failed(&mut self, path: &Path, error: &JournalError) -> String {
        let text = error.to_string();
        self.damage(path, None, text.clone());
        text
    }

    fn file(&mut self, path: &Path, what: impl Into<String>) {
        let bytes = std::fs::metadata(path).map_or(0, |meta| meta.len());
        self.report.files.push(FileReport { path: path.to_owned(), what: what.into(), bytes, records: Vec::new() });
    }

    fn domain(&mut self) {
        let path = self.dir.join(vmdr_journal::CONTROL_FILE);
        let control = match Control::load(&*self.disk, self.dir, self.uuid.as_bytes()) {
            Ok(control) => Some(control),
            Err(error) => {
                self.failed(&path, &error);
                None
            }
        };
        if let Some(control) = &control {
            self.report.name.clone_from(&control.name);
            self.control(control, &path);
        }
        self.others();
        let mut found = Vec::new();
        if let Some(control) = &control {
            for of in &control.chains {
                found.push(self.standby(control, of.standby, &of.history, false));
            }
            if let Some(standby) = control.standby {
                found.push(self.standby(control, standby, &control.history, true));
            }
        } else {
            self.without_control();
        }
        let newest = self.journal(control.as_ref(), found.last());
        self.points(control.as_ref(), &found, newest);
    }

    fn control(&mut self, control: &Control, path: &Path) {
        let mut what = format!("control record: {:?}, generation {}", control.name, control.generation);
        if let Some(s) = &control.standby {
            what += &format!("; standby.{} is epoch {} of generation {}", s.dir, s.epoch, s.generation);
            if s.applying > s.epoch {
                what += &format!("; a batch up to epoch {} was interrupted and will be taken back", s.applying);
            }
        }
        if let Some(seed) = &control.seed {
            what += &format!("; a seed grows in standby.{}, {} parts of it are there", seed.dir, seed.parts);
        }
        if control.frozen {
            what += "; a guest runs, or ran, on the standby";
        }
        what += &format!("; history back to epoch {}, {} named points", control.history.floor, control.pins.len());
        self.file(path, what);
        if let Some(damage) = &control.damage {
            self.damage(path, None, format!("damage was noted before: {damage}"));
        }
    }

    /// What lies beside control record, journal and standbys.
    fn others(&mut self) {
        let mut names = self.disk.list(self.dir).unwrap_or_default();
        names.sort();
        for name in names {
            let path = self.dir.join(&name);
            match name.as_str() {
                "control" | "journal" => {}
                "control.new" => self.file(&path, "a control record that was being prepared: of no meaning"),
                "verified" => {
                    let good = super::verified::is_good(&*self.disk, self.dir);
                    self.file(&path, "when points were last verified");
                    if !good {
                        self.damage(&path, None, "it does not match its checksum: it counts as if it were not there");
                    }
                }
                "drill" => self.file(&path, "drills: how they went, and what there is of one"),
                IMPORTED_FILE => self.file(&path, "which point of object storage the standby was made from"),
                "failover.json" => self.file(&path, "automatic failover: what was promised to its host"),
                EXPORTED_FILE => self.file(&path, "which point was last sent to object storage"),
                "active" => self.file(&path, "an activation: its record and overlays"),
                _ if name.starts_with("damaged-standby.") => {
                    self.file(&path, "a standby that was moved aside as damaged")
                }
                _ if name.starts_with("standby.") => {}
                _ => self.file(&path, "not of vmdr"),
            }
        }
    }

    /// Standbys of which it is not known what they are: their files are looked at all the same.
    fn without_control(&mut self) {
        let mut names = self.disk.list(self.dir).unwrap_or_default();
        names.sort();
        for name in names.iter().filter(|name| name.starts_with("standby.")) {
            let dir = self.dir.join(name);
            self.file(&dir, "a standby; without the control record it is not known of which epoch");
            self.segments(&standby::history_dir(&dir), "history");
            for sub in ["ram", "disk"] {
                let mut images = self.disk.list(&dir.join(sub)).unwrap_or_default();
                images.retain(|name| name.ends_with(".img") || name.ends_with(".raw"));
                images.sort();
                for image in images {
                    let path = dir.join(sub).join(image);
                    let file = self.disk.open(&path, Mode::Read);
                    let length = file.and_then(|file| file.length()).unwrap_or(0);
                    self.image(&path, Array::Layout, length, &BTreeMap::new());
                }
            }
        }
    }

    fn standby(&mut self, control: &Control, standby: Standby, mark: &HistoryMark, current: bool) -> Found {
        let dir = standby_dir(self.dir, standby.dir);
        let history = standby::history_dir(&dir);
        let mut fatal = None;
        let layout_path = standby::layout_path(&dir, standby.layout_epoch);
        let layout = match standby::read_layout(&*self.disk, &layout_path) {
            Ok(layout) => {
                let what = format!("layout: {} RAM blocks, {} disks", layout.ram.len(), layout.disks.len());
                self.file(&layout_path, what);
                Some(layout)
            }
            Err(error) => {
                fatal = Some(self.failed(&layout_path, &error));
                None
            }
        };
        let mut flaws = self.small(control, &dir, &standby);
        let undo = self.undo(&standby, mark, &history, current).unwrap_or_else(|why| {
            fatal.get_or_insert(why);
            BTreeMap::new()
        });
        let mut unproved = !control.small_sums.iter().any(|sums| sums.dir == standby.dir);
        for (array, path, length) in images(&*self.disk, &dir, layout.as_ref()) {
            match self.image(&path, array, length, &undo) {
                Some(found) => flaws.extend(found),
                None => unproved = true,
            }
        }
        let known = flaws::path(&dir);
        if known.exists() {
            self.file(&known, "what of this standby is, or was, known to be damaged");
            let bytes = standby::read_small(&*self.disk, &known, 1 << 20).unwrap_or_default();
            if flaws::parse(&bytes).is_none() {
                self.damage(&known, None, "it does not match its checksum");
            }
        }
        self.segments(&history, "history");
        let scan = HistoryScan::read(&*self.disk, &history, self.uuid.as_bytes(), mark.committed);
        let scan = scan.unwrap_or_else(|error| {
            self.failed(&history, &error);
            HistoryScan::default()
        });
        let (mut chain, missing) = Chain::new(standby, mark, &scan);
        if let Some(missing) = missing {
            self.damage(&history, None, missing);
        }
        self.sets(&history, &mut chain, &mut flaws, &scan);
        chain.flaws = flaws.clone();
        Found { standby, chain, flaws, fatal, unproved }
    }

    /// Device state and XML.
    fn small(&mut self, control: &Control, dir: &Path, standby: &Standby) -> Vec<Flaw> {
        let sums = control.small_sums.iter().find(|sums| same_files(sums, standby)).copied();
        let device = (standby::device_path(dir, standby.device_epoch), DEVICE_STATE_BYTES_MAX, "device state");
        let xml = (standby::xml_path(dir, standby.xml_epoch), DOMAIN_XML_BYTES_MAX, "the domain's XML");
        let expected = [sums.map(|sums| sums.device), sums.map(|sums| sums.xml)];
        let mut flaws = Vec::new();
        for (((path, most, what), expected), array) in
            [device, xml].into_iter().zip(expected).zip([Array::Device, Array::Xml])
        {
            match standby::read_small(&*self.disk, &path, most) {
                Ok(bytes) => {
                    self.file(&path, what);
                    if expected.is_some_and(|sum| sum != xxh3_64(&bytes)) {
                        self.damage(&path, None, "it does not match its checksum");
                        flaws.push(Flaw::of(array, 0, flaws::small_units(bytes.len())));
                    }
                }
                Err(error) => {
                    self.failed(&path, &error);
                    flaws.push(Flaw::of(array, 0, 1));
                }
            }
        }
        flaws
    }

    /// The units that an interrupted batch may have overwritten, and what their checksums are when it is taken back.
    fn undo(
        &mut self,
        standby: &Standby,
        mark: &HistoryMark,
        history: &Path,
        current: bool,
    ) -> Result<BTreeMap<Key, bool>, String> {
        let mut undo = BTreeMap::new();
        if !current || standby.applying <= standby.epoch || mark.announced <= mark.committed {
            return Ok(undo);
        }
        let read = read_back(&*self.disk, history, mark.committed, mark.announced, &mut |entry, _| {
            for n in 0..u64::from(entry.count) {
                undo.insert(Key { unit: entry.key.unit + n, ..entry.key }, !entry.is_flawed());
            }
            Ok(())
        });
        read.map_err(|error| {
            let why = self.failed(history, &error);
            format!("what was interrupted cannot be taken back: {why}")
        })?;
        Ok(undo)
    }

    /// Reads an image; the units that are damaged, or nothing if there are no checksums.
    fn image(&mut self, path: &Path, array: Array, length: u64, undo: &BTreeMap<Key, bool>) -> Option<Vec<Flaw>> {
        let sums = Sums::open(&*self.disk, path, Mode::Read).ok().flatten();
        let what = if sums.is_some() { "image with checksums" } else { "image without checksums: nothing proves it" };
        self.file(path, format!("{what}, {length} bytes"));
        let file = match self.disk.open(path, Mode::Read) {
            Ok(file) => file,
            Err(error) => {
                self.damage(path, None, format!("it cannot be opened: {error}"));
                return Some(vec![Flaw::of(array, 0, sums::units(length).max(1))]);
            }
        };
        let sums = sums?;
        let sums_path = sums::sums_path(path);
        self.file(&sums_path, "checksums of the image beside it");
        let mut flaws: Vec<Flaw> = Vec::new();
        let end = sums::units(length);
        let mut unit = 0;
        while unit < end {
            // Holes in both are what they should be.
            let at = unit * UNIT_BYTES as u64;
            let real = file.length().unwrap_or(0);
            let data = if at >= real { Ok(u64::MAX) } else { file.data_from(at) };
            let data = data.map_or(unit, |at| if at >= real { u64::MAX } else { at / UNIT_BYTES as u64 });
            unit = unit.max(data.min(sums.data_from(unit).unwrap_or(unit)));
            if unit >= end {
                break;
            }
            let count = ((READ_BYTES / UNIT_BYTES) as u64).min(end - unit) as usize;
            let mut bytes = vec![0; count * UNIT_BYTES];
            let mut known = vec![0; count];
            let got = file.read_at(&mut bytes, unit * UNIT_BYTES as u64);
            if let Err(error) =
                got.map_err(|e| e.to_string()).and(sums.read(unit, &mut known).map_err(|e| e.to_string()))
            {
                self.damage(path, Some(unit * UNIT_BYTES as u64), format!("it cannot be read: {error}"));
                flaws.push(Flaw::of(array, unit, count as u64));
                unit += count as u64;
                continue;
            }
            for (content, sum) in bytes.as_chunks::<UNIT_BYTES>().0.iter().zip(&known) {
                let good = undo.get(&Key { array, unit }).copied();
                if !good.unwrap_or_else(|| unit_sum(content) == *sum) {
                    match flaws.last_mut().filter(|last| last.unit + last.count == unit) {
                        Some(last) => last.count += 1,
                        None => flaws.push(Flaw::of(array, unit, 1)),
                    }
                }
                unit += 1;
            }
        }
        for flaw in flaws.iter().take(RANGES_MAX) {
            let bytes = flaw.count * UNIT_BYTES as u64;
            let what = format!("{bytes} bytes do not match their checksums (in {})", sums_path.display());
            self.damage(path, Some(flaw.unit * UNIT_BYTES as u64), what);
        }
        if flaws.len() > RANGES_MAX {
            self.damage(path, None, format!("{} more ranges are damaged", flaws.len() - RANGES_MAX));
        }
        Some(flaws)
    }

    /// Every record of the segments in a directory.
    fn segments(&mut self, dir: &Path, of: &str) {
        let mut numbers = segments(&*self.disk, dir).unwrap_or_default();
        numbers.sort_unstable();
        for number in numbers {
            let path = segment_path(dir, number);
            let mut records = Vec::new();
            let mut bad: Vec<(u64, String)> = Vec::new();
            let mut kinds: BTreeMap<&'static str, u64> = BTreeMap::new();
            let mut epochs: Option<(u64, u64)> = None;
            let wanted = self.records;
            let seen = survey_segment(&*self.disk, dir, number, self.uuid.as_bytes(), &mut |record| {
                *kinds.entry(record.name).or_default() += 1;
                let (low, high) = epochs.unwrap_or((record.epoch, record.epoch));
                epochs = Some((low.min(record.epoch), high.max(record.epoch)));
                if let Some(what) = &record.damage {
                    bad.push((record.offset, format!("{} of epoch {}: {what}", record.name, record.epoch)));
                }
                if wanted {
                    let what = format!(
                        "{} generation {} epoch {} part {} number {}, {} bytes {}",
                        record.name,
                        record.generation,
                        record.epoch,
                        record.part,
                        record.sequence,
                        record.bytes,
                        record.says
                    );
                    let what = what.trim_end().to_owned();
                    records.push(RecordReport { offset: record.offset, what, damage: record.damage });
                }
            });
            let seen = match seen {
                Ok(seen) => seen,
                Err(error) => {
                    self.failed(&path, &error);
                    continue;
                }
            };
            let kinds: Vec<String> = kinds.iter().map(|(name, n)| format!("{n} {name}")).collect();
            let epochs = epochs.map_or_else(String::new, |(low, high)| format!(", epochs {low} to {high}"));
            let what = format!("{of} segment: {} records{epochs} ({})", seen.records, kinds.join(", "));
            self.report.files.push(FileReport { path: path.clone(), what, bytes: seen.bytes, records });
            if let Some(what) = seen.damage {
                self.damage(&path, Some(0), what);
            }
            for (offset, what) in bad {
                self.damage(&path, Some(offset), what);
            }
            if let Some(at) = seen.broken_at.filter(|_| of == "history") {
                self.damage(&path, Some(at), "no record's header is where one should be");
            }
        }
    }

    /// Reads all sets; which points the flaws of the standby concern.
    fn sets(&mut self, history: &Path, chain: &mut Chain, flaws: &mut Vec<Flaw>, scan: &HistoryScan) {
        let mut open: BTreeSet<Key> = BTreeSet::new();
        for flaw in flaws.iter().filter(|flaw| flaw.array != Array::Layout) {
            open.extend((flaw.unit..flaw.unit + flaw.count).map(|unit| Key { array: flaw.array, unit }));
        }
        let mut located: Vec<Flaw> = Vec::new();
        let mut unit = [0; UNIT_BYTES];
        for set in chain.sets.iter().rev() {
            let mut hit = Vec::new();
            let mut dead = Vec::new();
            let read = read_set(&*self.disk, history, set, &mut |entry, stored, _| {
                let wrong = |what| JournalError::Damaged { path: history.to_owned(), what };
                entry.as_kept(stored, &mut unit).map_err(wrong)?;
                if entry.is_flawed() {
                    dead.push(entry.key);
                    return Ok(());
                }
                let last = entry.key.unit + u64::from(entry.count);
                let covered =
                    open.range(entry.key..Key { unit: last, ..entry.key }).filter(|key| key.array == entry.key.array);
                hit.extend(covered.copied());
                Ok(())
            });
            if let Err(error) = read {
                let path = segment_path(history, set.segment);
                self.damage(&path, Some(set.offset), format!("the set back to epoch {}: {error}", set.from));
                chain.bad.insert(set.from);
                continue;
            }
            for key in hit {
                open.remove(&key);
                located.push(Flaw { after: set.from, ..Flaw::of(key.array, key.unit, 1) });
            }
            // What was damaged before it was kept: from there on back, to where an older value is.
            for key in dead {
                let older = chain.sets.iter().rev().filter(|older| older.from < set.from);
                let mut after = 0;
                for older in older {
                    let mut has = false;
                    let found = read_set(&*self.disk, history, older, &mut |entry, _, _| {
                        let units = entry.key.unit..entry.key.unit + u64::from(entry.count);
                        has |= entry.key.array == key.array && units.contains(&key.unit) && !entry.is_flawed();
                        Ok(())
                    });
                    if found.is_ok() && has {
                        after = older.from;
                        break;
                    }
                }
                located.push(Flaw { after, up_to: set.from, ..Flaw::of(key.array, key.unit, 1) });
            }
        }
        located.extend(open.into_iter().map(|key| Flaw::of(key.array, key.unit, 1)));
        flaws.retain(|flaw| flaw.array == Array::Layout);
        flaws.extend(located);
        if !scan.damage.is_empty() {
            for what in &scan.damage {
                self.damage(history, None, what.clone());
            }
        }
    }

    /// What recovery would find in the journal: the newest durable epoch and its cut, if it is not the standby's.
    fn journal(&mut self, control: Option<&Control>, current: Option<&Found>) -> Option<(PointId, u64)> {
        let dir = self.dir.join("journal");
        self.segments(&dir, "journal");
        let mut names = self.disk.list(&dir).unwrap_or_default();
        names.sort();
        for name in names.iter().filter(|name| name.ends_with(".damaged")) {
            self.file(&dir.join(name), "a journal segment that was moved aside as damaged");
        }
        let current = current.filter(|_| control.is_some_and(|control| control.standby.is_some()));
        let standby = current.map(|found| found.standby);
        let layout = standby.and_then(|standby| {
            let at = standby_dir(self.dir, standby.dir);
            standby::read_layout(&*self.disk, &standby::layout_path(&at, standby.layout_epoch)).ok().map(Arc::new)
        });
        let mut replay = Replay { standby, layout, ..Replay::default() };
        let recovered =
            survey_journal(&*self.disk, &dir, self.uuid.as_bytes(), &mut |part, payloads| replay.part(part, payloads));
        match recovered {
            Ok(recovered) => {
                for damage in &recovered.damage {
                    let path = segment_path(&dir, damage.segment);
                    self.damage(&path, Some(damage.offset), format!("epoch {}: {}", damage.epoch, damage.what));
                }
                if let Some(torn) = &recovered.torn {
                    let path = segment_path(&dir, torn.segment);
                    let durable = if torn.ended { ", and may have been acknowledged" } else { "" };
                    let what =
                        format!("{} bytes from offset {} on are no whole part{durable}", torn.bytes, torn.offset);
                    if torn.ended {
                        self.damage(&path, Some(torn.offset), what);
                    } else {
                        self.file(&path, format!("torn end: {what}; recovery cuts it off"));
                    }
                }
            }
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                self.failed(&dir, &error);
            }
        }
        if let Some(broken) = replay.broken.take() {
            self.damage(&dir, None, broken);
        }
        let standby = standby?;
        let newest = replay.epochs.last()?;
        Some((PointId { generation: standby.generation, epoch: newest.epoch }, newest.cut_unix_ns))
    }

    fn points(&mut self, control: Option<&Control>, found: &[Found], newest: Option<(PointId, u64)>) {
        let names = |id: PointId| {
            let pins = control.map_or(&[][..], |control| &control.pins[..]);
            let of = pins.iter().filter(|pin| (pin.generation, pin.epoch) == (id.generation, id.epoch));
            of.map(|pin| pin.name.clone()).collect::<Vec<_>>()
        };
        let mut points = Vec::new();
        let judge = |of: &Found, id: PointId, as_of: u64, cut_unix_ns: u64| {
            let why = of.fatal.clone().or_else(|| {
                let bad = of.chain.bad.range(as_of..).next();
                bad.map(|bad| format!("the history back to epoch {bad} is damaged"))
            });
            let why = why.or_else(|| {
                let flaw = of.flaws.iter().find(|flaw| flaw.concerns(as_of));
                let dir = standby_dir(self.dir, of.standby.dir);
                let layout = standby::read_layout(&*self.disk, &standby::layout_path(&dir, of.standby.layout_epoch));
                flaw.map(|flaw| flaws::describe(&layout.unwrap_or_default(), flaw))
            });
            let soundness = match (&why, of.unproved) {
                (Some(_), _) => Soundness::Damaged,
                (None, true) => Soundness::Unproved,
                (None, false) => Soundness::Sound,
            };
            PointReport { id: id.to_string(), cut_unix_ns, soundness, why, names: names(id) }
        };
        if let (Some((id, cut)), Some(of)) = (newest, found.last()) {
            points.push(judge(of, id, u64::MAX, cut));
        }
        for of in found.iter().rev() {
            let generation = of.standby.generation;
            let own = PointId { generation, epoch: of.standby.epoch };
            points.push(judge(of, own, of.standby.epoch, of.standby.cut_unix_ns));
            for set in of.chain.sets.iter().rev() {
                points.push(judge(of, PointId { generation, epoch: set.from }, set.from, set.point.cut_unix_ns));
            }
        }
        self.report.points = points;
    }
}

/// The images of a standby: by its layout, or, where that cannot be read, those that lie there.
fn images(disk: &dyn Disk, dir: &Path, layout: Option<&Layout>) -> Vec<(Array, PathBuf, u64)> {
    let Some(layout) = layout else {
        let mut all = Vec::new();
        for sub in ["ram", "disk"] {
            for name in disk.list(&dir.join(sub)).unwrap_or_default() {
                let path = dir.join(sub).join(&name);
                if name.ends_with(".img") || name.ends_with(".raw") {
                    let length = disk.open(&path, Mode::Read).and_then(|file| file.length()).unwrap_or(0);
                    all.push((Array::Layout, path, length));
                }
            }
        }
        return all;
    };
    let ram = layout.ram.iter().enumerate().map(|(n, block)| (Array::Ram(n as u16), block.pages() * PAGE_BYTES as u64));
    let disks = layout.disks.iter().enumerate().map(|(n, disk)| (Array::Disk(n as u16), disk.size_bytes));
    let all = ram.chain(disks).filter(|(_, length)| *length > 0);
    all.filter_map(|(array, length)| Some((array, image_path(dir, layout, array)?, length))).collect()
}
