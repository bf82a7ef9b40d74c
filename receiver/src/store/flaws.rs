//! What of a standby is known to be damaged, and which points that concerns.
//!
//! A *flaw* is a range of units of an image (or a small file) whose content does not match its checksum. It concerns the points
//! between two epochs: older ones have before-images of the units, newer ones have written them anew. So a flaw ends by itself
//! when the guest, or a resync, writes the whole of what is damaged; until then the newest point is not sound.
//!
//! Flaws are in the file `flaws` of the standby's directory, which is durable before anything rests on it:
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `VMDRFLW` and NUL |
//! | 40 each | array u32 (as in the history), zero u32, first unit u64, units u64, the points concerned are those after this epoch u64, up to this one u64 (2^64-1: the newest) |
//! | 8 | XXH3-64 of all before |
//!
//! One that cannot be read stands for a flaw of which it is not known where it is, until all has been read again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmdr_journal::{Array, Disk, JournalError, Key, Set, UNIT_BYTES, read_set, unit_sum};

use super::StoreError;
use super::catalog::Chain;
use super::domain::Domain;
use super::pending::Flawed;
use super::standby::{self, image_path, read_small, write_aside};
use super::sums::Sums;
use super::verify::Scope;

const FILE: &str = "flaws";
const MAGIC: &[u8; 8] = b"VMDRFLW\0";
const ENTRY_BYTES: usize = 40;
/// Flaws of a standby that are told apart. With more, those of an image are taken for one that has everything between them.
const FLAWS_MAX: usize = 4096;
const BYTES_MAX: u64 = 1 << 20;
/// Flaws that are named to the operator one by one.
const NAMED_MAX: usize = 8;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flaw {
    /// What is damaged. `Layout`: it is not known what.
    pub array: Array,
    /// The first unit of 4 KiB.
    pub unit: u64,
    /// How many.
    pub count: u64,
    /// Points after this epoch are concerned.
    pub after: u64,
    /// Points up to this epoch are; `u64::MAX`: the newest too.
    pub up_to: u64,
}

impl Flaw {
    /// What is damaged, of a point that is not looked at yet.
    pub fn of(array: Array, unit: u64, count: u64) -> Self {
        Flaw { array, unit, count, after: 0, up_to: u64::MAX }
    }

    /// It is not known what is damaged.
    pub fn unknown() -> Self {
        Flaw::of(Array::Layout, 0, 0)
    }

    /// Whether a point at this epoch has it.
    pub fn concerns(&self, epoch: u64) -> bool {
        self.after < epoch && epoch <= self.up_to
    }

    fn end(&self) -> u64 {
        self.unit.saturating_add(self.count)
    }
}

/// Where the flaws of a standby are written down.
pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// The flaws of the standby in `dir`.
pub(super) fn read(disk: &dyn Disk, dir: &Path) -> Vec<Flaw> {
    match read_small(disk, &path(dir), BYTES_MAX) {
        Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Ok(bytes) => parse(&bytes).unwrap_or_else(|| vec![Flaw::unknown()]),
        Err(_) => vec![Flaw::unknown()],
    }
}

/// What a file of flaws says; `None`: it is damaged.
pub(super) fn parse(bytes: &[u8]) -> Option<Vec<Flaw>> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(8)?)?;
    let entries = body.strip_prefix(MAGIC)?;
    if sum != vmdr_codec::chunk_hash(body).to_le_bytes() || entries.len() % ENTRY_BYTES != 0 {
        return None;
    }
    let number = |at: &[u8]| at.try_into().map(u64::from_le_bytes).ok();
    let entry = |e: &[u8]| {
        Some(Flaw {
            array: Array::from_number(u32::try_from(number(&e[..8])?).ok()?)?,
            unit: number(&e[8..16])?,
            count: number(&e[16..24])?,
            after: number(&e[24..32])?,
            up_to: number(&e[32..])?,
        })
    };
    entries.chunks_exact(ENTRY_BYTES).map(entry).collect()
}

/// Makes these the flaws of the standby in `dir`, durably.
pub(super) fn write(disk: &dyn Disk, dir: &Path, flaws: &[Flaw]) -> Result<(), JournalError> {
    let path = path(dir);
    if flaws.is_empty() {
        match disk.remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(JournalError::io("remove", &path)(e)),
            _ => {}
        }
    } else {
        let numbers = flaws.iter().flat_map(|f| [u64::from(f.array.to_number()), f.unit, f.count, f.after, f.up_to]);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(numbers.flat_map(u64::to_le_bytes));
        let sum = vmdr_codec::chunk_hash(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        write_aside(disk, &path, &bytes)?;
    }
    disk.sync_dir(dir).map_err(JournalError::io("sync", dir))
}

/// Adds one, to its neighbour if that is the last.
pub(super) fn push(flaws: &mut Vec<Flaw>, new: Flaw) {
    let follows = |last: &&mut Flaw| {
        (last.array, last.after, last.up_to, last.end()) == (new.array, new.after, new.up_to, new.unit)
    };
    match flaws.last_mut().filter(follows) {
        Some(last) => last.count += new.count,
        None => flaws.push(new),
    }
}

/// Flaws of an array become one with those next to them that are `near`.
fn join(flaws: &mut Vec<Flaw>, near: &dyn Fn(&Flaw, &Flaw) -> bool) {
    flaws.dedup_by(|next, last| {
        let joins = last.array == next.array && near(last, next);
        if joins {
            let end = last.end().max(next.end());
            last.unit = last.unit.min(next.unit);
            last.count = end - last.unit;
            (last.after, last.up_to) = (last.after.min(next.after), last.up_to.max(next.up_to));
        }
        joins
    });
}

/// Neighbouring flaws of the same points become one.
fn join_neighbours(flaws: &mut Vec<Flaw>) {
    flaws.sort_unstable_by_key(|f| (f.array, f.after, f.up_to, f.unit));
    join(flaws, &|last, next| (last.after, last.up_to) == (next.after, next.up_to) && next.unit <= last.end());
}

/// The same; too many become few, with what is between them. Says whether that was so.
fn tidy(flaws: &mut Vec<Flaw>) -> bool {
    join_neighbours(flaws);
    if flaws.len() <= FLAWS_MAX {
        return false;
    }
    join(flaws, &|last, next| (last.after, last.up_to) == (next.after, next.up_to));
    if flaws.len() > FLAWS_MAX {
        // What is over does not become what is open: that ends when the images are in order.
        let open = |f: &Flaw| f.up_to == u64::MAX;
        flaws.sort_unstable_by_key(|f| (f.array, open(f), f.unit));
        join(flaws, &|last, next| open(last) == open(next));
    }
    true
}

/// Adds what was found to be damaged.
fn add(flaws: &mut Vec<Flaw>, found: &[Flaw]) -> bool {
    for new in found {
        // One that is open may end without the others: when the images turn out to be in order.
        let same = |f: &Flaw| f.concerns(new.up_to) && (f.up_to == u64::MAX) == (new.up_to == u64::MAX);
        let known = flaws
            .iter()
            .any(|f| f.array == new.array && f.unit <= new.unit && f.end() >= new.end() && f.count > 0 && same(f));
        if !known || new.count == 0 {
            flaws.push(*new);
        }
    }
    tidy(flaws)
}

/// What the flaws that are `meant` have in common with `ranges` (which do not overlap, and are of the same `up_to`) is changed
/// as `change` says; the rest stays.
fn split(
    flaws: &mut Vec<Flaw>,
    ranges: &mut [Flaw],
    meant: &dyn Fn(&Flaw) -> bool,
    change: &dyn Fn(Flaw, &Flaw) -> Option<Flaw>,
) {
    ranges.sort_unstable_by_key(|r| (r.up_to, r.array, r.unit));
    let concerned: Vec<Flaw> = flaws.extract_if(.., |f| f.count > 0 && meant(f)).collect();
    for f in concerned {
        let mut at = f.unit;
        let first = ranges.partition_point(|r| (r.up_to, r.array, r.end()) <= (f.up_to, f.array, f.unit));
        let near = |r: &&Flaw| (r.up_to, r.array) == (f.up_to, f.array) && r.unit < f.end();
        for range in ranges[first..].iter().take_while(near) {
            let (from, end) = (range.unit.max(at), range.end().min(f.end()));
            flaws.extend((at < from).then(|| Flaw { unit: at, count: from - at, ..f }));
            if from < end {
                flaws.extend(change(Flaw { unit: from, count: end - from, ..f }, range));
                at = end;
            }
        }
        flaws.extend((at < f.end()).then(|| Flaw { unit: at, count: f.end() - at, ..f }));
    }
}

impl Chain {
    /// What is known to be damaged of the standby as it is now.
    pub fn open_flaws(&self) -> impl Iterator<Item = &Flaw> {
        self.flaws.iter().filter(|flaw| flaw.up_to == u64::MAX)
    }

    /// What is to be read because it is not known where the damage is.
    pub fn unknown(&self) -> Option<Scope> {
        // Of a set that is known to be damaged there is nothing more to find out.
        let unknown = |flaw: &&Flaw| flaw.array == Array::Layout && !self.bad.contains(&flaw.up_to);
        if self.needed_flaws().iter().any(|flaw| unknown(&flaw)) {
            return Some(Scope::All);
        }
        (self.coarse && self.open_flaws().next().is_some()).then_some(Scope::Newest)
    }

    /// The flaws without those that concern no point any more.
    pub fn needed_flaws(&self) -> Vec<Flaw> {
        let floor = self.floor();
        self.flaws.iter().filter(|flaw| flaw.up_to >= floor).copied().collect()
    }
}

impl Domain {
    /// Before the control record says that a batch is done: what of the standby was damaged and what has been mended by it.
    /// `None`: nothing has changed. With whether some of it may have more than what is damaged.
    pub(super) fn flaws_after(&self, dir: u64, touched: &[Flawed]) -> Result<Option<(Vec<Flaw>, bool)>, StoreError> {
        if touched.is_empty() {
            return Ok(None);
        }
        let Some(mut flaws) = self.catalog().chain_mut(dir).map(|chain| {
            chain.touched += 1;
            chain.flaws.clone()
        }) else {
            return Ok(None);
        };
        let mut found: Vec<Flaw> = touched.iter().map(|t| Flaw::of(t.key.array, t.key.unit, t.count)).collect();
        let mut coarse = tidy(&mut found);
        coarse |= add(&mut flaws, &found);
        // `after` is here the epoch that has written it anew.
        let mended = touched.iter().filter_map(|t| Some((t, t.healed_by?)));
        let mended = mended.map(|(t, by)| Flaw { after: by, ..Flaw::of(t.key.array, t.key.unit, t.count) });
        split(&mut flaws, &mut mended.collect::<Vec<_>>(), &|f| f.up_to == u64::MAX, &|f, by| {
            Some(Flaw { up_to: by.after.saturating_sub(1), ..f })
        });
        coarse |= tidy(&mut flaws);
        let at = self.standby_dir(dir);
        write(&*self.disk, &at, &flaws).map_err(|error| self.failure(error))?;
        let text = self.name_flaws(dir, &found);
        tracing::error!(domain = %self.id, damage = %text.join("; "), "damage was found in the standby when it was written");
        Ok(Some((flaws, coarse)))
    }

    /// Notes what of a standby was found to be damaged, durably. The standby's lock must be held.
    pub(super) fn note_flaws(&self, dir: u64, found: &[Flaw]) -> Result<(), StoreError> {
        if found.is_empty() {
            return Ok(());
        }
        let needed = self.catalog().chain_mut(dir).map(|chain| {
            chain.touched += 1;
            chain.needed_flaws()
        });
        let Some(mut flaws) = needed else { return Ok(()) };
        let before = flaws.clone();
        let coarse = add(&mut flaws, found);
        if flaws == before {
            return Ok(());
        }
        let text = self.name_flaws(dir, found);
        tracing::error!(domain = %self.id, damage = %text.join("; "), "the standby is damaged");
        self.put_flaws(dir, flaws, coarse)
    }

    /// How often damage was found or mended so far.
    pub(super) fn touched(&self, dir: u64) -> u64 {
        self.catalog().chain(dir).map_or(0, |chain| chain.touched)
    }

    /// All images of a standby have been read: what is in order now is no flaw any more. `found` is what was damaged when it was
    /// read; `exact`: and nothing was found or mended since by anybody else. Else `bad` looks at a unit again. The standby's
    /// lock must be held.
    pub(super) fn confirm_flaws(
        &self,
        dir: u64,
        found: &mut [Flaw],
        exact: bool,
        bad: &mut dyn FnMut(Key) -> Result<bool, JournalError>,
    ) -> Result<(), StoreError> {
        let before = self.catalog().chain(dir).map(|chain| (chain.needed_flaws(), chain.standby.epoch, chain.coarse));
        let Some((before, epoch, was_coarse)) = before else { return Ok(()) };
        let mut flaws = before.clone();
        // Of the images it is known now what there is; not so of the way back to older points.
        for f in flaws.iter_mut().filter(|f| f.array == Array::Layout && f.up_to == u64::MAX) {
            f.up_to = epoch.saturating_sub(1);
        }
        if exact {
            let open = flaws.extract_if(.., |f| f.up_to == u64::MAX).collect::<Vec<_>>();
            found.sort_unstable_by_key(|f| (f.array, f.unit));
            for f in open {
                let first = found.partition_point(|g| (g.array, g.end()) <= (f.array, f.unit));
                for g in found[first..].iter().take_while(|g| g.array == f.array && g.unit < f.end()) {
                    let (from, end) = (g.unit.max(f.unit), g.end().min(f.end()));
                    flaws.extend((from < end).then(|| Flaw { unit: from, count: end - from, ..f }));
                }
            }
        } else {
            let mut stay = Vec::with_capacity(flaws.len());
            for f in flaws {
                let found = || found.iter().any(|g| g.array == f.array && g.unit < f.end() && f.unit < g.end());
                let stays = match f.array {
                    _ if f.up_to != u64::MAX => true,
                    Array::Ram(_) | Array::Disk(_) if f.count <= FLAWS_MAX as u64 => {
                        let mut still = false;
                        for unit in f.unit..f.end() {
                            let key = Key { array: f.array, unit };
                            still = still || bad(key).map_err(|error| StoreError::of(&self.id, error))?;
                        }
                        still
                    }
                    _ => found(),
                };
                stay.extend(stays.then_some(f));
            }
            flaws = stay;
        }
        let coarse = tidy(&mut flaws) || (was_coarse && !exact);
        if let Some(chain) = self.catalog().chain_mut(dir) {
            chain.coarse = coarse;
        }
        let mut same = before;
        tidy(&mut same);
        if flaws == same { Ok(()) } else { self.put_flaws(dir, flaws, coarse) }
    }

    /// The standby's lock must be held.
    pub(super) fn put_flaws(&self, dir: u64, flaws: Vec<Flaw>, coarse: bool) -> Result<(), StoreError> {
        self.write_flaws(dir, &flaws)?;
        self.set_flaws(dir, flaws, coarse);
        Ok(())
    }

    /// Not of a domain that was closed: another may have been opened over its files.
    fn write_flaws(&self, dir: u64, flaws: &[Flaw]) -> Result<(), StoreError> {
        self.alive(&self.shared())?;
        write(&*self.disk, &self.standby_dir(dir), flaws).map_err(|error| StoreError::of(&self.id, error))
    }

    /// These are in force.
    pub(super) fn set_flaws(&self, dir: u64, flaws: Vec<Flaw>, coarse: bool) {
        let mut catalog = self.catalog();
        let Some(chain) = catalog.chain_mut(dir) else { return };
        let more = flaws.iter().filter(|f| f.after == 0).any(|f| !chain.flaws.contains(f));
        chain.flaws = flaws;
        chain.coarse |= coarse;
        if more {
            catalog.flaws_found += 1;
        }
    }

    /// Finds out what older points the newest damage leaves alone, if that was not looked at yet; says whether there was
    /// anything to do. Until then none of them is offered.
    pub(super) fn locate_new_flaws(&self) -> Result<bool, StoreError> {
        let dir = {
            let mut catalog = self.catalog();
            if catalog.flaws_found <= catalog.flaws_located {
                return Ok(false);
            }
            catalog.standby().map(|chain| chain.standby.dir)
        };
        dir.map_or(Ok(false), |dir| self.locate_flaws(dir))
    }

    /// The same for somebody who chooses a point: what cannot be found out now stays as it was.
    pub(super) fn look_at_new_flaws(&self) {
        if let Err(error) = self.locate_new_flaws() {
            tracing::warn!(domain = %self.id, %error, "cannot find out which points the damage leaves alone");
        }
    }

    /// Finds out from which point on a standby's flaws matter: older points have before-images of what is damaged. Reads the
    /// history from its newest end, until all is found; says whether there was anything to do.
    pub(super) fn locate_flaws(&self, dir: u64) -> Result<bool, StoreError> {
        let (found, number, chain) = {
            let mut catalog = self.catalog();
            let chain = catalog.chain(dir).map(|chain| {
                let open: Vec<Flaw> = chain.flaws.iter().filter(|f| f.after == 0 && f.count > 0).copied().collect();
                (open, chain.sets.clone())
            });
            (catalog.flaws_found, catalog.begin_reading(), chain)
        };
        let result = chain.map_or(Ok(Vec::new()), |(open, sets)| self.locate(dir, open, &sets));
        self.catalog().readers.remove(&number);
        self.remove_doomed();
        let mut located = result?;
        let _standby = self.live_standby()?;
        let needed = self.catalog().chain(dir).map(Chain::needed_flaws);
        let mut changed = false;
        if let Some(mut flaws) = needed.filter(|_| !located.is_empty()) {
            let before = flaws.clone();
            split(&mut flaws, &mut located, &|f| f.after == 0, &|f, at| Some(Flaw { after: at.after, ..f }));
            let coarse = tidy(&mut flaws);
            changed = flaws != before;
            if changed {
                self.write_flaws(dir, &flaws)?;
                // What was found out about damage that is known is no news: nobody is asked to compare again.
                if let Some(chain) = self.catalog().chain_mut(dir) {
                    chain.flaws = flaws;
                    chain.coarse |= coarse;
                }
            }
        }
        // What was found since has its turn.
        let mut catalog = self.catalog();
        catalog.flaws_located = catalog.flaws_located.max(found);
        Ok(changed)
    }

    /// Where the flaws in `open` end, going back: the flaws again, in parts, with that.
    fn locate(&self, dir: u64, mut open: Vec<Flaw>, sets: &[Set]) -> Result<Vec<Flaw>, StoreError> {
        // What is older than all there is needs no further look.
        let floor = sets.first().map_or(0, |set| set.from).saturating_sub(1);
        open.retain(|f| f.count <= FLAWS_MAX as u64);
        if open.is_empty() || sets.is_empty() {
            return Ok(Vec::new());
        }
        let history = standby::history_dir(&self.standby_dir(dir));
        let mut located: Vec<Flaw> = Vec::new();
        for set in sets.iter().rev() {
            if open.is_empty() {
                break;
            }
            let newest = open.iter().map(|f| f.up_to).max().unwrap_or(0);
            if set.from > newest {
                continue;
            }
            let mut hit: BTreeMap<Key, u64> = BTreeMap::new();
            let read = read_set(&*self.disk, &history, set, &mut |entry, _, _| {
                if !entry.is_flawed() {
                    hit.insert(entry.key, u64::from(entry.count));
                }
                Ok(())
            });
            match read {
                Ok(()) => {}
                // Where the way back is broken nothing older is offered.
                Err(error @ JournalError::Damaged { .. }) => {
                    self.found_damaged(dir, set.from, &error.to_string());
                    break;
                }
                // It may be read later.
                Err(error) => return Err(StoreError::of(&self.id, error)),
            }
            let mut rest = Vec::new();
            for f in open.drain(..) {
                for unit in f.unit..f.end() {
                    let one = Flaw { unit, count: 1, ..f };
                    let near = hit.range(..=Key { array: f.array, unit }).next_back();
                    let covered = near.is_some_and(|(key, n)| key.array == f.array && unit < key.unit + n);
                    if covered && set.from < f.up_to {
                        push(&mut located, Flaw { after: set.from, ..one });
                    } else {
                        push(&mut rest, one);
                    }
                }
            }
            open = rest;
        }
        // What no set has is as old as the oldest point there is.
        located.extend(open.into_iter().map(|f| Flaw { after: floor, ..f }));
        Ok(located)
    }

    /// Flaws in words.
    pub(super) fn name_flaws(&self, dir: u64, flaws: &[Flaw]) -> Vec<String> {
        let layout = self.catalog().chain(dir).map(|chain| chain.standby.layout_epoch);
        let layout = layout.and_then(|epoch| {
            let path = standby::layout_path(&self.standby_dir(dir), epoch);
            standby::read_layout(&*self.disk, &path).ok()
        });
        let layout = layout.unwrap_or_default();
        let mut text: Vec<String> = flaws.iter().take(NAMED_MAX).map(|flaw| describe(&layout, flaw)).collect();
        if flaws.len() > NAMED_MAX {
            text.push(format!("{} more ranges", flaws.len() - NAMED_MAX));
        }
        text
    }

    /// Whether the standby in use is known to be damaged.
    pub(super) fn newest_is_damaged(&self) -> bool {
        self.catalog().standby().is_some_and(|chain| !chain.is_good(u64::MAX))
    }

    /// What of the standby in use is damaged, in words.
    pub(super) fn damage_of_standby(&self) -> Option<String> {
        let (dir, flaws) = {
            let mut catalog = self.catalog();
            let chain = catalog.standby()?;
            (chain.standby.dir, chain.open_flaws().copied().collect::<Vec<_>>())
        };
        (!flaws.is_empty()).then(|| self.name_flaws(dir, &flaws).join("; "))
    }
}

/// A flaw in words.
pub(super) fn describe(layout: &vmdr_codec::Layout, flaw: &Flaw) -> String {
    let (offset, bytes) = (flaw.unit * UNIT_BYTES as u64, flaw.count.saturating_mul(UNIT_BYTES as u64));
    match flaw.array {
        Array::Ram(n) => {
            let name = layout.ram.get(usize::from(n)).map_or("?", |block| block.name.as_str());
            format!("RAM block {name}: {} pages from page {} on", flaw.count, flaw.unit)
        }
        Array::Disk(n) => {
            let name = layout.disks.get(usize::from(n)).map_or("?", |disk| disk.target.as_str());
            format!("disk {name}: {bytes} bytes from offset {offset} on")
        }
        Array::Device => "the device state".to_owned(),
        Array::Xml => "the domain's XML".to_owned(),
        Array::Layout if flaw.up_to == u64::MAX => "it is not known what, verify it".to_owned(),
        Array::Layout => format!("the history up to epoch {}", flaw.up_to),
    }
}

/// At open, after a batch may have been taken back: what was to be mended by it is damaged still.
pub(super) fn recheck(disk: &dyn Disk, dir: &Path, epoch: u64, layout: &vmdr_codec::Layout) -> Vec<Flaw> {
    let mut flaws = read(disk, dir);
    for flaw in flaws.iter_mut().filter(|flaw| flaw.up_to >= epoch && flaw.up_to != u64::MAX) {
        if (flaw.unit..flaw.end()).any(|unit| !matches!(unit_is_good(disk, dir, layout, flaw.array, unit), Ok(true))) {
            flaw.up_to = u64::MAX;
        }
    }
    flaws
}

fn unit_is_good(
    disk: &dyn Disk,
    dir: &Path,
    layout: &vmdr_codec::Layout,
    array: Array,
    unit: u64,
) -> Result<bool, JournalError> {
    let Some(path) = image_path(dir, layout, array) else { return Ok(true) };
    let Some(sums) = Sums::open(disk, &path, vmdr_journal::Mode::Read)? else { return Ok(true) };
    let file = disk.open(&path, vmdr_journal::Mode::Read).map_err(JournalError::io("open", &path))?;
    let mut content = [0; UNIT_BYTES];
    let got = file.read_at(&mut content, unit * UNIT_BYTES as u64).map_err(JournalError::io("read", &path))?;
    content[got..].fill(0);
    let mut sum = [0];
    let known = sums.read(unit, &mut sum)?;
    Ok(known == 0 || unit_sum(&content) == sum[0])
}

/// Device state and XML, if they do not match their checksums: all of them, since it is not known where. With the length of
/// what is damaged, each.
pub(super) fn small_flaws(device: Option<usize>, xml: Option<usize>) -> Vec<Flaw> {
    let all = [(device, Array::Device), (xml, Array::Xml)];
    let flaw = |(bytes, array): (Option<usize>, Array)| Some(Flaw::of(array, 0, small_units(bytes?)));
    all.into_iter().filter_map(flaw).collect()
}

/// Units of a small file, at least one.
pub(super) fn small_units(bytes: usize) -> u64 {
    bytes.div_ceil(UNIT_BYTES).max(1) as u64
}
