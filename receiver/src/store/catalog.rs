//! Which points a domain has, and what they need: in memory, a line for each set of the history.
//!
//! A domain has one or more *chains*: a standby that is exactly one epoch, and sets that lead back from it without a gap. The
//! last chain is the standby in use. A seed that replaces it leaves it behind as a chain of its own, for the points in it.

use std::collections::{BTreeMap, BTreeSet};

use vmdr_journal::{HistoryMark, HistoryScan, Set, Standby};

use super::flaws::Flaw;
use super::retention::Held;

/// Which point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointId {
    /// Its generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
}

impl std::fmt::Display for PointId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.generation, self.epoch)
    }
}

impl std::str::FromStr for PointId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('-').and_then(|(g, e)| Some((g.parse().ok()?, e.parse().ok()?)));
        let (generation, epoch) = numbers.ok_or_else(|| format!("{text:?} is not a point: write GENERATION-EPOCH"))?;
        Ok(PointId { generation, epoch })
    }
}

/// A standby and what leads back from it.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    pub standby: Standby,
    /// The standby's epoch is application-consistent.
    pub application: bool,
    /// From the oldest to the newest, each beginning where the one before ends.
    pub sets: Vec<Set>,
    /// The `from` of sets that turned out to be damaged: nothing older can be gone back to.
    pub bad: BTreeSet<u64>,
    /// What of the standby is known to be damaged, or was.
    pub flaws: Vec<Flaw>,
    /// Of these some may have more than what is damaged: there were too many to tell them apart.
    pub coarse: bool,
    /// Rises whenever damage is found, or mended by being written.
    pub touched: u64,
    /// The disk did not let its history be read when it was opened. The sets here are those written since, nothing of it is
    /// thinned out or removed, and the next time it is opened there may be more.
    pub unread: bool,
}

impl Chain {
    /// Puts together what a scan found. Also says what is missing, if the sets do not reach back as far as they should.
    pub fn new(standby: Standby, mark: &HistoryMark, scan: &HistoryScan) -> (Self, Option<String>) {
        let mut by_end: BTreeMap<u64, &Set> = BTreeMap::new();
        for set in scan.sets.iter().filter(|set| set.generation == standby.generation && set.from >= mark.floor) {
            // Of a set and those that it was made of, it is the one that counts.
            let best = by_end.entry(set.to).or_insert(set);
            if set.from < best.from {
                *best = set;
            }
        }
        let mut at = standby.epoch;
        let mut sets = Vec::new();
        while let Some(set) = by_end.get(&at) {
            sets.push(**set);
            at = set.from;
        }
        sets.reverse();
        let floor = if mark.floor == 0 { standby.epoch } else { mark.floor };
        let missing = (at > floor).then(|| {
            let found = if scan.damage.is_empty() { "sets are missing".to_owned() } else { scan.damage.join("; ") };
            format!("the history reaches back to epoch {at} only and not to {floor}: {found}")
        });
        (Self { sets, ..Self::begin(standby, mark.application) }, missing)
    }

    /// A standby without a past.
    pub fn begin(standby: Standby, application: bool) -> Self {
        Self {
            standby,
            application,
            sets: Vec::new(),
            bad: BTreeSet::new(),
            flaws: Vec::new(),
            coarse: false,
            touched: 0,
            unread: false,
        }
    }

    /// The oldest epoch that can be gone back to.
    pub fn floor(&self) -> u64 {
        self.sets.first().map_or(self.standby.epoch, |set| set.from)
    }

    pub fn has(&self, id: PointId) -> bool {
        let PointId { generation, epoch } = id;
        generation == self.standby.generation
            && (epoch == self.standby.epoch || self.sets.binary_search_by_key(&epoch, |set| set.from).is_ok())
    }

    /// The sets that lead back to `epoch`, oldest first.
    pub fn back_to(&self, epoch: u64) -> &[Set] {
        &self.sets[self.sets.partition_point(|set| set.from < epoch)..]
    }

    /// Whether nothing that the point at `epoch` consists of is known to be damaged; `u64::MAX`: the standby as it is now.
    pub fn is_good(&self, epoch: u64) -> bool {
        self.can_be_read(epoch) && !self.flaws.iter().any(|flaw| flaw.concerns(epoch))
    }

    /// Whether the way back to `epoch` can be gone, to whatever is there.
    pub fn can_be_read(&self, epoch: u64) -> bool {
        self.bad.range(epoch..).next().is_none()
    }

    /// The points, oldest first: those that the sets lead back to, and the standby itself.
    pub fn held(&self, protected: impl Fn(PointId) -> bool) -> Vec<Held> {
        let generation = self.standby.generation;
        let own = (self.standby.epoch, self.standby.cut_unix_ns, self.application);
        let all = self.sets.iter().map(|set| (set.from, set.point.cut_unix_ns, set.point.application)).chain([own]);
        let held = all.map(|(epoch, cut_ns, application)| {
            let protected = protected(PointId { generation, epoch });
            Held { epoch, cut_ns, protected, application }
        });
        held.collect()
    }

    pub fn history_bytes(&self) -> u64 {
        self.sets.iter().map(Set::bytes).sum()
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    /// Oldest first. The last is the standby in use, if `current`.
    pub chains: Vec<Chain>,
    /// Bytes on the disk of each chain but the one in use, by the number of its directory.
    pub chain_bytes: BTreeMap<u64, u64>,
    /// Whether the last chain is the standby in use.
    pub current: bool,
    /// When points were last found to be whole.
    pub verified: BTreeMap<PointId, u64>,
    /// Points that readers need, and how many do.
    pub read: BTreeMap<PointId, u32>,
    /// Readers at work, by their numbers, and the next number.
    pub readers: BTreeSet<u64>,
    pub next_reader: u64,
    /// Rises whenever more damage of a standby becomes known.
    pub flaws_found: u64,
    /// The same as of the last closer look.
    pub flaws_located: u64,
    /// What can be removed once no reader before this number is at work.
    pub doomed: Vec<(u64, Doomed)>,
}

/// What is not needed any more, but by a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doomed {
    /// A segment of the history of `standby.N`.
    Segment(u64, u64),
    /// All of `standby.N`.
    Standby(u64),
}

impl Catalog {
    /// Whether this chain, counted from the oldest, is the standby in use.
    pub fn is_current(&self, index: usize) -> bool {
        self.current && index + 1 == self.chains.len()
    }

    /// The chain of the standby in use.
    pub fn standby(&mut self) -> Option<&mut Chain> {
        if self.current { self.chains.last_mut() } else { None }
    }

    /// The standby in use has gone on; `afresh`: without a way back.
    pub fn advance(&mut self, standby: Standby, application: bool, sets: Vec<Set>, afresh: bool) {
        let Some(chain) = self.standby() else { return };
        (chain.standby, chain.application) = (standby, application);
        if afresh {
            chain.sets.clear();
        } else {
            chain.sets.extend(sets);
        }
    }

    /// A seed has become the standby in use; the one before is kept as a chain, or not.
    pub fn seeded(&mut self, chain: Chain, keep: bool) {
        if self.current && !keep {
            self.chains.pop();
        }
        self.chains.push(chain);
        self.current = true;
    }

    /// The chain that has this point.
    pub fn find(&self, id: PointId) -> Option<&Chain> {
        self.chains.iter().rev().find(|chain| chain.has(id))
    }

    /// The chain of `standby.N`.
    pub fn chain(&self, dir: u64) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.standby.dir == dir)
    }

    /// The same, to change it.
    pub fn chain_mut(&mut self, dir: u64) -> Option<&mut Chain> {
        self.chains.iter_mut().find(|chain| chain.standby.dir == dir)
    }

    /// Somebody begins to read: from now on until it is taken out of the readers, nothing goes that is not needed any more.
    pub fn begin_reading(&mut self) -> u64 {
        let number = self.next_reader;
        self.next_reader += 1;
        self.readers.insert(number);
        number
    }

    /// Says that this is not needed any more.
    pub fn doom(&mut self, what: Doomed) {
        if !self.doomed.iter().any(|(_, doomed)| *doomed == what) {
            self.doomed.push((self.next_reader, what));
        }
    }

    /// What can be removed now.
    pub fn removable(&mut self) -> Vec<Doomed> {
        let first = self.readers.first().copied().unwrap_or(u64::MAX);
        let (now, later) = std::mem::take(&mut self.doomed).into_iter().partition(|(before, _)| *before <= first);
        self.doomed = later;
        (now as Vec<(u64, Doomed)>).into_iter().map(|(_, what)| what).collect()
    }

    /// Bytes of history, standbys that were replaced included.
    pub fn history_bytes(&self) -> u64 {
        let sets: u64 = self.chains.iter().map(Chain::history_bytes).sum();
        sets + self.chain_bytes.values().sum::<u64>()
    }
}
