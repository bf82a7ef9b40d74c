//! The history is thinned out as the policy asks, and given up from its oldest end when there is no room.
//!
//! Sets become one without reading the journal or the images: the older before-image of a unit wins. The new set is durable
//! and in force by the control record before the old ones are removed, and they are only removed when no reader needs them.

use std::collections::HashSet;
use std::path::Path;

use vmdr_journal::{Chain as ChainMark, Disk, HistoryLog, HistoryMark, JournalError, Key, Place, Set, read_set};

use super::apply::Applier;
use super::catalog::{Catalog, Chain, Doomed, PointId};
use super::domain::Domain;
use super::retention::{self, Step};
use super::standby;
use super::{KEPT, StoreError};

/// Units remembered while sets become one: some 64 MiB. What comes after is taken over even if it is there already, which
/// costs space and nothing else.
const MERGE_UNITS_MAX: usize = 1 << 20;
/// Bytes of sets that become one at once, if there are more than two: the standby is not written meanwhile, and who waits for
/// it waits for a few seconds of the disk.
const MERGE_BYTES_MAX: u64 = 256 << 20;
/// Standbys that seeds have replaced, at most. Each takes as much space as the guest.
const CHAINS_MAX: usize = 8;

/// What others leave free beside what is too little for the history: they look only now and then.
const MARGIN_BYTES: u64 = 64 << 20;

/// Whether somebody else needs this standby's directory, or may: one that cannot be read is not removed.
pub(super) fn is_kept(disk: &dyn Disk, standby: &Path) -> bool {
    match disk.list(standby) {
        Ok(names) => names.iter().any(|name| name == KEPT),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

impl Domain {
    /// Whether a standby that a seed replaces is worth keeping for its points.
    pub fn keeps_chain(&self, chain: &ChainMark) -> bool {
        let pinned = self.control().pins.iter().any(|pin| {
            pin.generation == chain.standby.generation
                && (chain.history.floor..=chain.standby.epoch).contains(&pin.epoch)
        });
        let (room, read) = {
            let catalog = self.catalog();
            let mut read = catalog.read.keys().filter(|id| id.generation == chain.standby.generation);
            let read = read.any(|id| (chain.history.floor..=chain.standby.epoch).contains(&id.epoch));
            (catalog.chains.len() < CHAINS_MAX, read)
        };
        pinned || read || (room && !self.retention().tiers.is_empty())
    }

    /// Does what the policy asks for, step by step, until there is nothing more or epochs wait to be applied. `full`: there
    /// is no space.
    pub fn thin(&self, full: bool) {
        let low = self.low_bytes();
        let mut full = full;
        // Whether nothing is left that could go.
        let mut done = false;
        loop {
            {
                let shared = self.shared();
                if shared.closing || shared.failed.is_some() || shared.frozen {
                    return;
                }
            }
            let short = full || self.disk.free_bytes(&self.dir).is_ok_and(|free| free < low);
            match self.thin_step(short) {
                Ok(true) => full = false,
                Ok(false) => {
                    done = true;
                    break;
                }
                Err(error) => {
                    tracing::warn!(domain = %self.id, %error, "the history cannot be thinned out now");
                    break;
                }
            }
            self.remove_doomed();
            let shared = self.shared();
            if shared.sync_wanted || shared.backlog_bytes >= self.options.apply_bytes {
                break;
            }
        }
        self.remove_doomed();
        self.watch_budget(low, done);
    }

    /// With less free space than this the oldest points go.
    fn low_bytes(&self) -> u64 {
        low_bytes(self.options.space_reserve_bytes)
    }

    /// Whether history may have to go although nothing is applied: others use the same disk.
    pub fn wants_room(&self) -> bool {
        let over = self.shared().over_budget.is_some();
        over || self.disk.free_bytes(&self.dir).is_ok_and(|free| free < self.low_bytes())
    }

    /// One step; false: there is nothing to do.
    fn thin_step(&self, short: bool) -> Result<bool, StoreError> {
        let mut standby = self.standby();
        let policy = self.retention();
        let pins: HashSet<PointId> = self.pinned();
        let free = self.disk.free_bytes(&self.dir).unwrap_or(u64::MAX);
        let stopped = standby.as_ref().is_some_and(Applier::is_stopped);
        // A merge needs sets that can be read, room for what it writes, and a log that nothing else is at the end of: what is
        // behind the committed place there after a batch that was stopped is still needed.
        let can = |chain: &Chain, current: bool, step: &Step| match *step {
            _ if chain.unread => false,
            Step::Forget(_) => true,
            Step::Merge(from, count) => {
                let sets = &chain.sets[from..(from + count).min(chain.sets.len())];
                let bytes: u64 = sets.iter().map(Set::bytes).sum();
                let whole = sets.iter().all(|set| !chain.bad.contains(&set.from));
                sets.len() > 1
                    && (!current || !stopped)
                    && whole
                    && free > bytes.saturating_add(self.options.space_reserve_bytes)
            }
        };
        let (index, step, chain) = {
            let catalog = self.catalog();
            let protected = |id: PointId| pins.contains(&id) || catalog.read.contains_key(&id);
            let now_ns = catalog.chains.last().map_or(0, |chain| chain.standby.cut_unix_ns);
            let all = catalog.chains.iter().enumerate();
            let next = all.clone().find_map(|(index, chain)| {
                let points = chain.held(protected);
                let current = catalog.is_current(index);
                let step = retention::next(&chain.sets, &points, !current, &policy, now_ns);
                let step = step.map(|step| bounded(step, &chain.sets, MERGE_BYTES_MAX));
                let step = step.filter(|step| can(chain, current, step)).map(Work::Step);
                let expired = || {
                    let kept = points.iter().any(|point| point.protected || policy.keeps(point.cut_ns, now_ns));
                    (!current && !kept && !chain.unread).then_some(Work::Drop)
                };
                step.or_else(expired).map(|work| (index, work))
            });
            let over = short || retention::over(catalog.history_bytes(), &policy);
            let next = next.or_else(|| {
                let mut all = all.filter(|_| over);
                all.find_map(|(index, chain)| {
                    let points = chain.held(protected);
                    let current = catalog.is_current(index);
                    let unprotected = !points.iter().any(|point| point.protected);
                    let step = retention::give_up(&points).filter(|step| can(chain, current, step));
                    let work = match step {
                        Some(step) => Some(Work::Step(step)),
                        None => (!current && unprotected && !chain.unread).then_some(Work::Drop),
                    };
                    work.map(|work| (index, work))
                })
            });
            let Some((index, work)) = next else { return Ok(false) };
            (index, work, catalog.chains[index].clone())
        };
        let current = self.catalog().is_current(index);
        let applier = standby.as_mut().filter(|_| current);
        match step {
            Work::Drop => self.drop_chain(&chain).map(|()| true),
            Work::Step(Step::Forget(count)) => self.forget_sets(applier, &chain, count).map(|()| true),
            Work::Step(Step::Merge(from, count)) => self.merge(applier, &chain, from, count),
        }
    }

    fn drop_chain(&self, chain: &Chain) -> Result<(), StoreError> {
        let dir = chain.standby.dir;
        self.change_control(|control| control.chains.retain(|kept| kept.standby.dir != dir))?;
        let mut catalog = self.catalog();
        catalog.chains.retain(|kept| kept.standby.dir != dir);
        catalog.chain_bytes.remove(&dir);
        catalog.doom(Doomed::Standby(dir));
        tracing::info!(domain = %self.id, dir, epoch = chain.standby.epoch, "a standby from before the last seed is given up");
        Ok(())
    }

    fn forget_sets(&self, applier: Option<&mut Applier>, chain: &Chain, count: usize) -> Result<(), StoreError> {
        let floor = chain.sets.get(count).map_or(chain.standby.epoch, |set| set.from);
        let sets = chain.sets[count.min(chain.sets.len())..].to_vec();
        let mark = self.mark(applier.as_deref(), chain)?;
        self.put_mark(applier, chain, HistoryMark { floor, ..mark })?;
        self.replace_sets(chain, sets, mark);
        Ok(())
    }

    /// Makes sets one, which can be; false: one of them is damaged.
    fn merge(
        &self,
        mut applier: Option<&mut Applier>,
        chain: &Chain,
        from: usize,
        count: usize,
    ) -> Result<bool, StoreError> {
        let old = &chain.sets[from..(from + count).min(chain.sets.len())];
        let dir = standby::history_dir(&self.standby_dir(chain.standby.dir));
        let mark = self.mark(applier.as_deref(), chain)?;
        let mut own = None;
        let log = match &mut applier {
            Some(applier) => &mut applier.log,
            None => {
                let log = HistoryLog::open(self.disk.clone(), &dir, *self.uuid.as_bytes(), mark.committed);
                own.insert(log.map_err(|error| self.failure(error))?)
            }
        };
        let (new, place) = match self.write_merged(log, &dir, old) {
            Ok(done) => done,
            Err((from, error)) => {
                log.cut(mark.committed).map_err(|error| self.failure(error))?;
                if let (Some(from), JournalError::Damaged { .. }) = (from, &error) {
                    self.found_damaged(chain.standby.dir, from, &error.to_string());
                    return Ok(false);
                }
                return Err(StoreError::of(&self.id, error));
            }
        };
        let announced_for = if applier.is_some() { chain.standby.epoch } else { mark.announced_for };
        let before = mark.committed;
        let mark = HistoryMark { committed: place, announced: place, announced_for, ..mark };
        if let Err(error) = self.put_mark(applier.as_deref_mut(), chain, mark) {
            // The control record does not have the new set. Were it left in the log, the next batch would be announced
            // behind it, and to undo that batch would mean to go back by the new set too.
            let log = match (&mut applier, &mut own) {
                (Some(applier), _) => Some(&mut applier.log),
                (None, own) => own.as_mut(),
            };
            if let Some(log) = log {
                log.cut(before).map_err(|error| self.failure(error))?;
            }
            return Err(error);
        }
        let sets = [&chain.sets[..from], &[new], &chain.sets[from + old.len()..]].concat();
        self.replace_sets(chain, sets, mark);
        Ok(true)
    }

    /// Appends the set that `old` make, in a segment of its own.
    fn write_merged(
        &self,
        log: &mut HistoryLog,
        dir: &std::path::Path,
        old: &[Set],
    ) -> Result<(Set, Place), (Option<u64>, JournalError)> {
        let plain = |error| (None, error);
        let (first, last) = (&old[0], &old[old.len() - 1]);
        log.roll().map_err(plain)?;
        log.begin(first.generation, first.from, last.to).map_err(plain)?;
        let mut seen: HashSet<Key> = HashSet::new();
        for (i, set) in old.iter().enumerate() {
            let remember = i + 1 < old.len();
            read_set(&*self.disk, dir, set, &mut |entry, stored, _| {
                for n in 0..u64::from(entry.count) {
                    let key = Key { unit: entry.key.unit + n, ..entry.key };
                    if seen.contains(&key) {
                        continue;
                    }
                    if remember && seen.len() < MERGE_UNITS_MAX {
                        seen.insert(key);
                    }
                    if entry.is_zero() { log.zeroes(key, 1)? } else { log.copy(entry, stored)? }
                }
                Ok(())
            })
            .map_err(|error| (Some(set.from), error))?;
        }
        let disk_bytes = old.iter().fold(0u64, |sum, set| sum.saturating_add(set.point.disk_bytes));
        let new = log.end(vmdr_journal::PointTail { disk_bytes, ..first.point }).map_err(plain)?;
        log.roll().map_err(plain)?;
        Ok((new, log.place()))
    }

    /// What the control record says of a chain's history.
    fn mark(&self, applier: Option<&Applier>, chain: &Chain) -> Result<HistoryMark, StoreError> {
        let kept =
            || self.control().chains.iter().find(|kept| kept.standby.dir == chain.standby.dir).map(|k| k.history);
        let mark = applier.map(|applier| applier.mark).or_else(kept);
        mark.ok_or_else(|| StoreError::Damaged {
            domain: self.id.clone(),
            what: format!("standby.{} is not in the control record", chain.standby.dir),
        })
    }

    fn put_mark(&self, applier: Option<&mut Applier>, chain: &Chain, mark: HistoryMark) -> Result<(), StoreError> {
        let dir = chain.standby.dir;
        match applier {
            Some(applier) => {
                self.change_control(|control| control.history = mark)?;
                applier.mark = mark;
            }
            None => self.change_control(|control| {
                for kept in control.chains.iter_mut().filter(|kept| kept.standby.dir == dir) {
                    kept.history = mark;
                }
            })?,
        }
        Ok(())
    }

    /// The chain has these sets now; what segments nothing is in any more are to be removed.
    fn replace_sets(&self, chain: &Chain, sets: Vec<Set>, mark: HistoryMark) {
        let used: HashSet<u64> = sets.iter().map(|set| set.segment).collect();
        // From the committed place on there may be what takes a batch back that was stopped.
        let closed = mark.committed.segment.saturating_add(u64::from(mark.committed.offset == u64::MAX));
        let dir = chain.standby.dir;
        // All that there are: one that was open when the last of its sets went has none any more.
        let there = vmdr_journal::segments(&*self.disk, &standby::history_dir(&self.standby_dir(dir)));
        let there = there.unwrap_or_else(|error| {
            tracing::warn!(domain = %self.id, %error, "cannot look for history that is not needed any more");
            Vec::new()
        });
        let mut catalog = self.catalog();
        for number in there {
            if number < closed && !used.contains(&number) {
                catalog.doom(Doomed::Segment(dir, number));
            }
        }
        for kept in catalog.chains.iter_mut().filter(|kept| kept.standby.dir == dir) {
            kept.sets.clone_from(&sets);
        }
    }

    /// A set is not what was written: nothing from before it can be gone back to.
    pub fn found_damaged(&self, dir: u64, from: u64, what: &str) {
        tracing::error!(domain = %self.id, epoch = from, %what, "the history is damaged: this point and older ones cannot be had");
        for chain in self.catalog().chains.iter_mut().filter(|chain| chain.standby.dir == dir) {
            chain.bad.insert(from);
        }
        let mut shared = self.shared();
        shared.damage.get_or_insert_with(|| format!("{what}; points up to epoch {from} cannot be activated"));
    }

    /// Removes what is not needed any more and not being read. What cannot be removed now is at the next open.
    pub fn remove_doomed(&self) {
        let removable = self.catalog().removable();
        for doomed in removable {
            let result = match doomed {
                Doomed::Standby(dir) if is_kept(&*self.disk, &self.standby_dir(dir)) => Ok(()),
                Doomed::Standby(dir) => self.disk.remove_dir_all(&self.standby_dir(dir)),
                Doomed::Segment(dir, number) => {
                    let dir = standby::history_dir(&self.standby_dir(dir));
                    self.disk.remove_file(&vmdr_journal::segment_path(&dir, number))
                }
            };
            match result {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(domain = %self.id, ?doomed, %error, "cannot remove history that is not needed any more");
                }
                _ => {}
            }
        }
    }

    /// Removes a standby that nobody needs any more; one that is needed stays. Bytes freed.
    pub fn remove_unused_standby(&self, number: u64) -> Result<u64, StoreError> {
        let dir = self.standby_dir(number);
        let used = {
            let control = self.control();
            let chains = control.chains.iter().map(|chain| chain.standby.dir);
            let others = [control.standby.map(|s| s.dir), control.seed.map(|s| s.dir)].into_iter().flatten();
            chains.chain(others).any(|used| used == number)
        };
        if used || is_kept(&*self.disk, &dir) {
            return Ok(0);
        }
        let bytes = self.disk.used_bytes(&dir).unwrap_or(0);
        self.disk.remove_dir_all(&dir).map_err(|error| self.failure(JournalError::io("remove", &dir)(error)))?;
        Ok(bytes)
    }

    /// A standby that a seed has replaced and that is not kept.
    pub fn doom_standby(&self, dir: u64) {
        self.catalog().doom(Doomed::Standby(dir));
        self.remove_doomed();
    }

    /// How much space a standby takes that a seed has replaced.
    pub fn measure_chain(&self, dir: u64) {
        let path = self.standby_dir(dir);
        let images = ["ram", "disk"].map(|sub| self.disk.used_bytes(&path.join(sub)).unwrap_or(0));
        self.catalog().chain_bytes.insert(dir, images.iter().sum());
    }

    /// Raises the alarm, and stops accepting, when nothing that may go is left.
    /// `done`: thinning ended because nothing more may go, not because something else came first.
    fn watch_budget(&self, low: u64, done: bool) {
        let policy = self.retention();
        let used = self.catalog().history_bytes();
        let free = self.disk.free_bytes(&self.dir).unwrap_or(u64::MAX);
        let budget = policy.budget_bytes;
        let alarm = if retention::alarming(used, &policy) {
            Some(format!("the history has {} MiB of its budget of {} MiB", used >> 20, budget >> 20))
        } else if free < low && used > 0 {
            Some(format!("{} MiB are free: the oldest recovery points are given up for space", free >> 20))
        } else {
            None
        };
        let over = (done && used > budget).then(|| {
            format!(
                "the history has {} MiB, its budget is {} MiB, and what is left of it is pinned: release points \
                 (`vmdr point release`) or raise the budget",
                used >> 20,
                budget >> 20
            )
        });
        let mut shared = self.shared();
        if alarm.is_some() && shared.alarm.is_none() {
            tracing::warn!(domain = %self.id, alarm = alarm.as_deref().unwrap_or_default(), "history");
        }
        (shared.alarm, shared.over_budget) = (alarm, over);
        self.changed.notify_all();
    }

    /// The points that are pinned.
    pub fn pinned(&self) -> HashSet<PointId> {
        let control = self.control();
        control.pins.iter().map(|pin| PointId { generation: pin.generation, epoch: pin.epoch }).collect()
    }
}

fn low_bytes(space_reserve_bytes: u64) -> u64 {
    space_reserve_bytes.saturating_mul(2)
}

/// What everything that is not replication leaves free: with less, it would cost the oldest points.
pub fn floor_bytes(space_reserve_bytes: u64) -> u64 {
    low_bytes(space_reserve_bytes).saturating_add(MARGIN_BYTES)
}

/// A merge of more than so many bytes becomes one of the two neighbours that are least to write again.
fn bounded(step: Step, sets: &[Set], bytes_max: u64) -> Step {
    let Step::Merge(from, count) = step else { return step };
    let of = &sets[from.min(sets.len())..(from + count).min(sets.len())];
    if count <= 2 || of.iter().map(Set::bytes).sum::<u64>() <= bytes_max {
        return step;
    }
    let pair = of.windows(2).enumerate().min_by_key(|(_, pair)| pair[0].bytes() + pair[1].bytes());
    pair.map_or(step, |(i, _)| Step::Merge(from + i, 2))
}

enum Work {
    Step(Step),
    Drop,
}

impl Catalog {
    /// All points, newest first, with the chain of each.
    pub fn points(&self) -> impl Iterator<Item = (&Chain, PointId, usize)> {
        self.chains.iter().rev().flat_map(|chain| {
            let generation = chain.standby.generation;
            let own = (chain, PointId { generation, epoch: chain.standby.epoch }, chain.sets.len());
            let sets = chain.sets.iter().enumerate().rev();
            std::iter::once(own).chain(sets.map(move |(i, set)| (chain, PointId { generation, epoch: set.from }, i)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmdr_journal::PointTail;

    #[test]
    fn others_end_before_points_are_given_up() {
        assert!(floor_bytes(0) > low_bytes(0) && floor_bytes(1 << 30) > low_bytes(1 << 30));
        assert_eq!(floor_bytes(u64::MAX), u64::MAX);
    }

    #[test]
    fn large_sets_become_one_two_at_a_time() {
        let set = |from: u64, bytes: u64| {
            let point = PointTail::default();
            Set { generation: 1, from, to: from + 1, segment: 1, offset: 0, end: bytes, units: 1, point }
        };
        let mut sets: Vec<Set> =
            [90, 80, 10, 20, 80].into_iter().zip(1..).map(|(bytes, from)| set(from, bytes)).collect();
        assert_eq!(bounded(Step::Merge(0, 5), &sets, 280), Step::Merge(0, 5));
        assert_eq!(bounded(Step::Forget(5), &sets, 1), Step::Forget(5));
        assert_eq!(bounded(Step::Merge(1, 2), &sets, 1), Step::Merge(1, 2));
        assert_eq!(bounded(Step::Merge(0, 5), &sets, 100), Step::Merge(2, 2));
        // However little may be written at once, they become one in the end, and each is written again a few times.
        let mut rewritten = 0;
        while sets.len() > 1 {
            let Step::Merge(from, count) = bounded(Step::Merge(0, sets.len()), &sets, 1) else { panic!("a merge") };
            let bytes = sets[from..from + count].iter().map(Set::bytes).sum();
            rewritten += bytes;
            sets.splice(from..from + count, [set(0, bytes)]);
        }
        assert_eq!(rewritten, 30 + 110 + 190 + 280);
    }
}
