//! Verification: what a point consists of is read again and compared with its checksums, in small steps.
//!
//! A point is its standby and the sets that lead back to it. So to verify the newest one, the standby's images are read; to
//! verify an older one, also the sets back to it; to verify all, everything once. Whatever is applied meanwhile does no harm: a
//! unit that is written is compared with its checksum then, before it goes to the history, so that in the end each unit of the
//! point that was the newest at the beginning has been compared, here or there. The point that is the newest at the end consists
//! of those, and of what has just come in with its checksums: it counts as verified too, since the other may be thinned out.
//!
//! Between steps nothing is held: batches, seeds and thinning go on. What is found is durable before the step ends.

use std::sync::Arc;
use std::time::SystemTime;

use vmdr_journal::{Array, JournalError, Set, UNIT_BYTES, read_set};
use xxhash_rust::xxh3::xxh3_128;

use super::StoreError;
use super::apply::{Applier, same_files, small_files, small_flaws_of};
use super::catalog::{Chain, PointId};
use super::domain::Domain;
use super::flaws::{Flaw, push};
use super::images::StandbyFiles;
use super::standby;

/// What is to be verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The newest point.
    Newest,
    /// This one.
    Point(PointId),
    /// All that there are.
    All,
}

/// What came of a verification.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Points that were found to be sound.
    pub sound: Vec<PointId>,
    /// Points that were found to be damaged.
    pub damaged: Vec<PointId>,
    /// What is damaged, in words.
    pub damage: Vec<String>,
    /// Bytes that were read.
    pub bytes: u64,
}

/// A verification under way.
#[derive(Debug)]
pub struct Verification {
    domain: Arc<Domain>,
    scope: Scope,
    /// The standbys that are still to be looked at, by number.
    dirs: Vec<u64>,
    work: Option<Work>,
    verdict: Verdict,
    /// Bytes that there are to read, about.
    total: u64,
}

/// Where it is in one standby.
#[derive(Debug)]
struct Work {
    dir: u64,
    /// The standby's epoch when it began.
    from: u64,
    /// Images of a standby that is not in use any more.
    own: Option<Box<StandbyFiles>>,
    /// The image that is being read, counted, and the next unit.
    image: usize,
    unit: u64,
    images_done: bool,
    found: Vec<Flaw>,
    /// How often damage was found, or mended, by anybody when this was last looked at, unless somebody else did in between.
    touched: Option<u64>,
    /// The sets that lead to here are done.
    cursor: u64,
    /// As far back as this.
    back_to: u64,
    /// The newest set that is damaged: where it leads to.
    bad: Option<u64>,
    /// There are no checksums of its images, and will be none.
    unproved: bool,
}

/// How a step went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes were read; there is more.
    Read(u64),
    /// The standby is between epochs for want of space: try later.
    Wait,
    /// That was all.
    Done(Verdict),
}

impl Verification {
    pub(super) fn begin(domain: Arc<Domain>, scope: Scope) -> Result<Self, StoreError> {
        if !matches!(scope, Scope::Point(id) if domain.catalog().find(id).is_some()) {
            domain.wait_synced()?;
        }
        let (dirs, total) = {
            let mut catalog = domain.catalog();
            let dirs: Vec<u64> = match scope {
                Scope::Newest => catalog.standby().map(|chain| chain.standby.dir).into_iter().collect(),
                Scope::Point(id) => catalog.find(id).map(|chain| chain.standby.dir).into_iter().collect(),
                Scope::All => catalog.chains.iter().map(|chain| chain.standby.dir).collect(),
            };
            let history = |chain: &Chain| match scope {
                Scope::Newest => 0,
                Scope::Point(id) => chain.back_to(id.epoch).iter().map(Set::bytes).sum(),
                Scope::All => chain.history_bytes(),
            };
            let total =
                catalog.chains.iter().filter(|chain| dirs.contains(&chain.standby.dir)).map(history).sum::<u64>();
            (dirs, total)
        };
        if dirs.is_empty() {
            return Err(match scope {
                Scope::Point(id) => domain.no_such_point(id),
                _ => StoreError::NoPoint(domain.id.clone()),
            });
        }
        let images = dirs.iter().map(|dir| {
            let at = domain.standby_dir(*dir);
            ["ram", "disk"].iter().map(|sub| domain.disk.used_bytes(&at.join(sub)).unwrap_or(0)).sum::<u64>()
        });
        let total = total + images.sum::<u64>();
        Ok(Self { domain, scope, dirs, work: None, verdict: Verdict::default(), total })
    }

    /// Bytes read, and about how many there are to read.
    pub fn progress(&self) -> (u64, u64) {
        (self.verdict.bytes, self.total.max(self.verdict.bytes))
    }

    /// Goes on by about `bytes_max`.
    pub fn step(&mut self, bytes_max: usize) -> Result<Progress, StoreError> {
        let domain = self.domain.clone();
        {
            let shared = domain.shared();
            domain.alive(&shared)?;
            if shared.frozen {
                return Err(StoreError::Frozen(domain.id.clone()));
            }
        }
        let Some(mut work) = self.work.take() else {
            if self.dirs.is_empty() {
                return Ok(Progress::Done(std::mem::take(&mut self.verdict)));
            }
            let dir = self.dirs.remove(0);
            self.work = self.start(dir)?;
            return Ok(Progress::Read(0));
        };
        let step = if work.images_done { self.set(&mut work) } else { self.images(&mut work, bytes_max) };
        let read = match step? {
            Next::Read(bytes) => {
                self.work = Some(work);
                bytes
            }
            Next::Wait => {
                self.work = Some(work);
                return Ok(Progress::Wait);
            }
            Next::Over => {
                self.finish(&work)?;
                0
            }
            // Thinned out, or replaced by a seed and not kept.
            Next::Gone => 0,
        };
        self.verdict.bytes += read;
        Ok(Progress::Read(read))
    }

    fn start(&self, dir: u64) -> Result<Option<Work>, StoreError> {
        let domain = &*self.domain;
        let (chain, current) = {
            let mut catalog = domain.catalog();
            let current = catalog.standby().is_some_and(|chain| chain.standby.dir == dir);
            let Some(chain) = catalog.chain(dir).cloned() else { return Ok(None) };
            (chain, current)
        };
        let from = chain.standby.epoch;
        let own = if current { None } else { Some(Box::new(open_old(domain, &chain)?)) };
        let back_to = match self.scope {
            Scope::Newest => from,
            Scope::Point(id) => id.epoch,
            Scope::All => 0,
        };
        let unproved = own.as_ref().is_some_and(|files| {
            let (done, all) = files.summed_bytes();
            done < all
        });
        if unproved {
            tracing::warn!(domain = %domain.id, dir, "a standby from before the last seed has no checksums: it cannot be verified");
        }
        Ok(Some(Work {
            dir,
            from,
            own,
            image: 0,
            unit: 0,
            images_done: false,
            found: Vec::new(),
            touched: Some(chain.touched),
            cursor: from,
            back_to,
            bad: None,
            unproved,
        }))
    }

    /// Reads some of the images.
    fn images(&mut self, work: &mut Work, bytes_max: usize) -> Result<Next, StoreError> {
        let domain = self.domain.clone();
        let of = |error| StoreError::of(&domain.id, error);
        let mut standby = domain.live_standby()?;
        let current = standby.as_ref().is_some_and(|applier| applier.durable.dir == work.dir);
        if !current && work.own.is_none() {
            // A seed has replaced it. What was begun is finished only if it is kept, which is for another time.
            return Ok(Next::Gone);
        }
        if standby.as_ref().is_some_and(|applier| current && applier.is_stopped()) {
            return Ok(Next::Wait);
        }
        if current && let Some(applier) = &mut *standby {
            let made = domain.make_sums(applier, bytes_max)?;
            if made > 0 {
                return Ok(Next::Read(made));
            }
        }
        if work.image == 0 && work.unit == 0 {
            let small = match (&mut *standby, current) {
                (Some(applier), true) => applier.check_small().map_err(of)?,
                _ => check_old_small(&domain, work.dir)?,
            };
            work.note(&domain, small)?;
        }
        let files = match (&*standby, &work.own) {
            (Some(applier), _) if current => &applier.files,
            (_, Some(own)) => own,
            _ => return Ok(Next::Gone),
        };
        let images = files.images();
        let Some(&(array, length)) = images.get(work.image) else {
            let mut unit = [0; UNIT_BYTES];
            let exact = work.touched == Some(domain.touched(work.dir));
            domain.confirm_flaws(work.dir, &mut work.found, exact, &mut |key| {
                let known = images.iter().any(|(array, _)| *array == key.array);
                Ok(known && !files.read_checked(key.array, key.unit, &mut unit)?.is_empty())
            })?;
            work.images_done = true;
            return Ok(Next::Read(0));
        };
        let end = super::sums::units(length);
        let first = if work.unit < end { files.next_unit(array, work.unit).map_err(of)? } else { u64::MAX };
        if first >= end {
            (work.image, work.unit) = (work.image + 1, 0);
            return Ok(Next::Read(0));
        }
        let count = ((bytes_max / UNIT_BYTES).max(1) as u64).min(end - first);
        let mut units = vec![0; count as usize * UNIT_BYTES];
        let bad = files.read_checked(array, first, &mut units).map_err(of)?;
        work.unit = first + count;
        let mut found = Vec::new();
        bad.into_iter().for_each(|unit| push(&mut found, Flaw::of(array, unit, 1)));
        work.note(&domain, found)?;
        Ok(Next::Read(units.len() as u64))
    }

    /// Reads the next set.
    fn set(&mut self, work: &mut Work) -> Result<Next, StoreError> {
        let domain = self.domain.clone();
        let (number, set) = {
            let mut catalog = domain.catalog();
            let set = catalog.chain(work.dir).and_then(|chain| {
                let behind = chain.sets.partition_point(|set| set.from < work.cursor);
                chain.sets[..behind].last().filter(|set| set.from >= work.back_to).copied()
            });
            let Some(set) = set else { return Ok(Next::Over) };
            (catalog.begin_reading(), set)
        };
        let dir = standby::history_dir(&domain.standby_dir(work.dir));
        let mut unit = [0; UNIT_BYTES];
        // What was damaged before it was kept: the record of that may have been lost.
        let mut flawed = Vec::new();
        let read = read_set(&*domain.disk, &dir, &set, &mut |entry, stored, _| {
            if entry.is_flawed() {
                let flaw = Flaw::of(entry.key.array, entry.key.unit, u64::from(entry.count));
                push(&mut flawed, Flaw { up_to: set.from, ..flaw });
            }
            let wrong = |what| JournalError::Damaged { path: dir.clone(), what };
            entry.as_kept(stored, &mut unit).map_err(wrong)
        });
        domain.catalog().readers.remove(&number);
        domain.remove_doomed();
        match read {
            Ok(()) if flawed.is_empty() => {}
            Ok(()) => {
                let _standby = domain.live_standby()?;
                domain.note_flaws(work.dir, &flawed)?;
            }
            Err(error @ JournalError::Damaged { .. }) => {
                let _standby = domain.live_standby()?;
                domain.found_damaged(work.dir, set.from, &error.to_string());
                domain.note_flaws(work.dir, &[Flaw { up_to: set.from, ..Flaw::unknown() }])?;
                work.bad = work.bad.or(Some(set.from));
            }
            Err(error) => return Err(StoreError::of(&domain.id, error)),
        }
        work.cursor = set.from;
        Ok(Next::Read(set.bytes().max(1)))
    }

    fn finish(&mut self, work: &Work) -> Result<(), StoreError> {
        let domain = &*self.domain;
        if self.scope == Scope::All {
            domain.forget_history_flaws(work.dir, work.bad)?;
        }
        domain.locate_flaws(work.dir)?;
        let _standby = domain.live_standby()?;
        let (points, damage) = {
            let catalog = domain.catalog();
            let Some(chain) = catalog.chain(work.dir) else { return Ok(()) };
            let generation = chain.standby.generation;
            let mut epochs: Vec<u64> = chain.sets.iter().map(|set| set.from).collect();
            epochs.push(chain.standby.epoch);
            let newest = chain.standby.epoch;
            let looked_at = |epoch: u64| match self.scope {
                Scope::Newest => epoch == work.from || epoch == newest,
                Scope::Point(id) => epoch == id.epoch,
                Scope::All => epoch <= work.from || epoch == newest,
            };
            let points = epochs.into_iter().filter(|epoch| looked_at(*epoch));
            let points: Vec<_> = points.map(|epoch| (PointId { generation, epoch }, chain.is_good(epoch))).collect();
            (points, chain.flaws.clone())
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let sound: Vec<PointId> =
            points.iter().filter(|(_, good)| *good && !work.unproved).map(|(id, _)| *id).collect();
        domain.note_all_verified(&sound, now)?;
        let damaged: Vec<PointId> = points.iter().filter(|(_, good)| !*good).map(|(id, _)| *id).collect();
        let concerns = |flaw: &&Flaw| damaged.iter().any(|id| flaw.concerns(id.epoch));
        let damage: Vec<Flaw> = damage.iter().filter(concerns).copied().collect();
        self.verdict.damage.extend(domain.name_flaws(work.dir, &damage));
        self.verdict.sound.extend(sound);
        self.verdict.damaged.extend(damaged);
        Ok(())
    }
}

impl Work {
    /// Notes damage that was found in the images.
    fn note(&mut self, domain: &Domain, found: Vec<Flaw>) -> Result<(), StoreError> {
        let before = domain.touched(self.dir);
        domain.note_flaws(self.dir, &found)?;
        self.touched = self.touched.filter(|touched| *touched == before).map(|_| domain.touched(self.dir));
        found.into_iter().for_each(|flaw| push(&mut self.found, flaw));
        Ok(())
    }
}

enum Next {
    Read(u64),
    Wait,
    Over,
    Gone,
}

fn open_old(domain: &Domain, chain: &Chain) -> Result<StandbyFiles, StoreError> {
    let dir = domain.standby_dir(chain.standby.dir);
    let layout = standby::layout_path(&dir, chain.standby.layout_epoch);
    let layout = standby::read_layout(&*domain.disk, &layout);
    let files = layout.and_then(|layout| StandbyFiles::open(domain.disk.clone(), &dir, Arc::new(layout)));
    let mut files = files.map_err(|error| StoreError::of(&domain.id, error))?;
    if !domain.has_sums(chain.standby.dir) {
        files.ignore_sums();
    }
    Ok(files)
}

fn check_old_small(domain: &Domain, dir: u64) -> Result<Vec<Flaw>, StoreError> {
    let Some(standby) = domain.catalog().chain(dir).map(|chain| chain.standby) else { return Ok(Vec::new()) };
    let sums = domain.control().small_sums.iter().find(|sums| sums.dir == dir).copied();
    let Some(sums) = sums.filter(|sums| same_files(sums, &standby)) else { return Ok(Vec::new()) };
    let found = small_files(&*domain.disk, &domain.standby_dir(dir), &standby);
    let (device, xml) = found.map_err(|error| StoreError::of(&domain.id, error))?;
    Ok(small_flaws_of(&sums, &device, &xml))
}

/// What is told of units of the standby to one who compares.
const READ_BYTES: usize = 1 << 20;

impl Domain {
    /// Hashes of neighbouring pieces of an image of the standby, which must be at `epoch`: XXH3-128 of each `piece_bytes`. Of
    /// what is damaged it is a hash that nothing has, so that it is sent again.
    pub(super) fn hashes(
        &self,
        epoch: u64,
        array: Array,
        first: u64,
        pieces: usize,
        piece_bytes: usize,
    ) -> Result<Vec<u128>, StoreError> {
        self.wait_synced()?;
        let of = |error| StoreError::of(&self.id, error);
        let mut hashes = Vec::with_capacity(pieces);
        let per_read = READ_BYTES / piece_bytes;
        let per_piece = (piece_bytes / UNIT_BYTES) as u64;
        while hashes.len() < pieces {
            let standby = self.live_standby()?;
            let Some(applier) = &*standby else { return Err(StoreError::NoPoint(self.id.clone())) };
            if applier.durable.epoch != epoch || applier.is_stopped() {
                let what = format!("the standby is at epoch {}, not {epoch}", applier.durable.epoch);
                return Err(StoreError::Refused { domain: self.id.clone(), what });
            }
            let now = per_read.min(pieces - hashes.len());
            let mut bytes = vec![0; now * piece_bytes];
            let at = first.saturating_add(hashes.len() as u64).saturating_mul(per_piece);
            let bad = applier.files.read_checked(array, at, &mut bytes).map_err(of)?;
            let found: Vec<Flaw> = bad.iter().map(|unit| Flaw::of(array, *unit, 1)).collect();
            if !found.is_empty() {
                self.note_flaws(applier.durable.dir, &found)?;
            }
            for (i, piece) in bytes.chunks_exact(piece_bytes).enumerate() {
                let units = at + i as u64 * per_piece..at + (i as u64 + 1) * per_piece;
                let hash = xxh3_128(piece);
                hashes.push(if bad.iter().any(|unit| units.contains(unit)) { !hash } else { hash });
            }
        }
        Ok(hashes)
    }

    /// One step of what is done in the background without being asked: checksums where there are none, of at most `bytes`, and
    /// a closer look at damage. Returns bytes read; 0: there is nothing to do.
    pub(super) fn tend(&self, bytes: usize) -> Result<u64, StoreError> {
        {
            let shared = self.shared();
            self.alive(&shared)?;
            if shared.frozen {
                drop(shared);
                return Ok(u64::from(self.locate_new_flaws()?));
            }
        }
        {
            let mut standby = self.live_standby()?;
            let Some(applier) = standby.as_mut().filter(|applier| !applier.is_stopped()) else { return Ok(0) };
            let made = self.make_sums(applier, bytes)?;
            let (done, all) = applier.files.summed_bytes();
            self.shared().unsummed = (done < all).then_some((done, all));
            if made > 0 {
                return Ok(made);
            }
        }
        Ok(u64::from(self.locate_new_flaws()?))
    }

    /// Whether it is known of a standby that it has checksums. Others may have been made before the images were changed by a
    /// program that does not know of them.
    pub(super) fn has_sums(&self, dir: u64) -> bool {
        self.control().small_sums.iter().any(|sums| sums.dir == dir)
    }

    /// Makes some of the checksums that are missing; returns bytes read.
    fn make_sums(&self, applier: &mut Applier, bytes: usize) -> Result<u64, StoreError> {
        if !applier.files.lacks_sums() {
            return Ok(0);
        }
        let (dir, sums) = (applier.durable.dir, applier.sums);
        // From here on a program that does not know of checksums must not change the images.
        if !self.has_sums(dir) {
            self.change_control(|control| control.put_small_sums(sums))?;
        }
        let (made, unread) = applier.files.make_sums(bytes).map_err(|error| match error {
            JournalError::Io { action: "open" | "read", .. } => StoreError::of(&self.id, error),
            other => self.failure(other),
        })?;
        self.note_flaws(dir, &unread)?;
        Ok(made)
    }

    /// The history was read to its end, and where it leads to from a damaged set (`bad`, the newest) is not known.
    fn forget_history_flaws(&self, dir: u64, bad: Option<u64>) -> Result<(), StoreError> {
        let _standby = self.live_standby()?;
        let Some(mut flaws) = self.catalog().chain(dir).map(Chain::needed_flaws) else { return Ok(()) };
        let before = flaws.clone();
        let history = |flaw: &Flaw| flaw.array == Array::Layout && flaw.up_to != u64::MAX;
        flaws.retain(|flaw| bad.is_some() || !history(flaw));
        for flaw in flaws.iter_mut().filter(|flaw| history(flaw)) {
            flaw.up_to = flaw.up_to.min(bad.unwrap_or(u64::MAX));
        }
        if flaws == before { Ok(()) } else { self.put_flaws(dir, flaws, false) }
    }
}
