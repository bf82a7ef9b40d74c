//! Writes that wait in memory until what they replace is durable in the history.
//!
//! Units are those of the history, 4 KiB. A unit is here from its first change on until it is written to its image, so that
//! a batch of epochs that write the same page again and again reads and writes the image once. A write that changes nothing
//! leaves no trace.

use std::collections::BTreeMap;
use std::ops::Range;

use vmdr_journal::{Array, HistoryLog, JournalError, Key, UNIT_BYTES, unit_sum};

use super::sums::UNREADABLE;

/// Bytes that a unit takes here beside its content.
const UNIT_OVERHEAD_BYTES: u64 = 96;
/// Units read, or written, at once.
const RUN_UNITS: u64 = 256;

pub(super) static ZERO_UNIT: [u8; UNIT_BYTES] = [0; UNIT_BYTES];

/// What reads as an array: as long as it likes, with zeroes behind its end.
pub(super) trait Source {
    /// Fills `buffer` from `offset` on. Returns the units, counted from there, that cannot be read, which are zero in it.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<Vec<u64>, JournalError>;
    /// Everything from `offset` up to what this returns is zero, and has the checksums of that.
    fn data_from(&self, offset: u64) -> Result<u64, JournalError>;
    /// Fills `into` with the checksums that the units from `first` on should have; returns of how many that is known.
    fn sums(&self, first: u64, into: &mut [u64]) -> Result<usize, JournalError>;
    /// Where it ends: behind that it is always zero.
    fn length(&self) -> u64;
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Pending {
    units: BTreeMap<Key, Unit>,
    bytes: u64,
    buffer: Vec<u8>,
    sums: Vec<u64>,
    /// Of the units that were read last those that could not be.
    unread: Vec<u64>,
    flawed: Vec<Flawed>,
}

#[derive(Debug)]
struct Unit {
    /// `None`: zero.
    content: Option<Box<[u8; UNIT_BYTES]>>,
    /// Its checksum. That of something else if part of it comes from a unit that was damaged.
    sum: u64,
    flawed: bool,
    /// The epoch whose set has what it was before.
    recorded: u64,
}

/// Units of the standby that turned out to be damaged when they were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flawed {
    /// The first.
    pub key: Key,
    /// How many.
    pub count: u64,
    /// The epoch that has written all of them, so that they are in order from there on; `None`: only a part of each.
    pub healed_by: Option<u64>,
}

impl Flawed {
    /// Adds one, to its neighbour if that is the last.
    pub fn push(all: &mut Vec<Flawed>, new: Flawed) {
        let follows = |last: &&mut Flawed| {
            (last.key.array, last.healed_by) == (new.key.array, new.healed_by)
                && last.key.unit + last.count == new.key.unit
        };
        match all.last_mut().filter(follows) {
            Some(last) => last.count += new.count,
            None => all.push(new),
        }
    }
}

/// What a unit was before a write.
#[derive(Debug, Clone, Copy)]
struct Before {
    sum: u64,
    flawed: bool,
    /// It was read from the image.
    read: bool,
}

/// Where before-images go: the log, in which a set is open, and the epoch of that.
pub(super) struct Recorder<'a> {
    pub log: &'a mut HistoryLog,
    pub epoch: u64,
}

impl Pending {
    /// Memory that it takes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was found to be damaged since this was last asked.
    pub fn take_flawed(&mut self) -> Vec<Flawed> {
        std::mem::take(&mut self.flawed)
    }

    pub fn clear(&mut self) {
        self.flawed.clear();
        self.units.clear();
        self.bytes = 0;
    }

    /// Gathers a write.
    pub fn write(
        &mut self,
        source: &dyn Source,
        array: Array,
        offset: u64,
        bytes: &[u8],
        to: &mut Recorder<'_>,
    ) -> Result<(), JournalError> {
        let unit_bytes = UNIT_BYTES as u64;
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let first = at / unit_bytes;
            let most = (RUN_UNITS * unit_bytes - at % unit_bytes) as usize;
            let piece = &bytes[done..bytes.len().min(done + most)];
            let units = (at + piece.len() as u64).div_ceil(unit_bytes) - first;
            let mut old = std::mem::take(&mut self.buffer);
            old.clear();
            old.resize((units * unit_bytes) as usize, 0);
            let result = self.read(source, array, first, &mut old);
            let end = source.length();
            let result =
                result.and_then(|()| self.change(array, first, &old, (at % unit_bytes) as usize, piece, end, to));
            self.buffer = old;
            result?;
            done += piece.len();
        }
        Ok(())
    }

    /// Gathers that a range becomes zero.
    pub fn zero(
        &mut self,
        source: &dyn Source,
        array: Array,
        range: Range<u64>,
        to: &mut Recorder<'_>,
    ) -> Result<(), JournalError> {
        let unit_bytes = UNIT_BYTES as u64;
        let (start, end) = (range.start.next_multiple_of(unit_bytes), range.end / unit_bytes * unit_bytes);
        if start >= end {
            // Within one unit, or over the border of two.
            let middle = start.min(range.end);
            self.write(source, array, range.start, &ZERO_UNIT[..(middle - range.start) as usize], to)?;
            return self.write(source, array, middle, &ZERO_UNIT[..(range.end - middle) as usize], to);
        }
        self.write(source, array, range.start, &ZERO_UNIT[..(start - range.start) as usize], to)?;
        let (mut unit, last) = (start / unit_bytes, end / unit_bytes);
        let key = |unit| Key { array, unit };
        let mut old = [0; UNIT_BYTES];
        while unit < last {
            let pending = self.units.range(key(unit)..key(last)).next().map_or(last, |(key, _)| key.unit);
            if unit < pending {
                let data = source.data_from(unit * unit_bytes)? / unit_bytes;
                if data > unit {
                    unit = data.min(pending);
                    continue;
                }
            }
            self.read(source, array, unit, &mut old)?;
            self.change(array, unit, &old, 0, &ZERO_UNIT, source.length(), to)?;
            unit += 1;
        }
        self.write(source, array, end, &ZERO_UNIT[..(range.end - end) as usize], to)
    }

    /// Where from `offset` on there may be anything but zeroes, and not before; `u64::MAX`: nowhere.
    pub fn data_from(&self, source: &dyn Source, array: Array, offset: u64) -> Result<u64, JournalError> {
        let key = |unit| Key { array, unit };
        let gathered = self.units.range(key(offset / UNIT_BYTES as u64)..=key(u64::MAX)).next();
        let gathered = gathered.map_or(u64::MAX, |(key, _)| (key.unit * UNIT_BYTES as u64).max(offset));
        Ok(source.data_from(offset)?.min(gathered))
    }

    /// What units are now, and, in `self.sums`, what the image's checksums are as far as they are known.
    fn read(&mut self, source: &dyn Source, array: Array, first: u64, into: &mut [u8]) -> Result<(), JournalError> {
        self.sums.clear();
        self.unread.clear();
        let count = (into.len() / UNIT_BYTES) as u64;
        let range = Key { array, unit: first }..Key { array, unit: first + count };
        if self.units.range(range.clone()).count() < count as usize {
            self.unread = source.read(into, first * UNIT_BYTES as u64)?;
            self.sums.resize(count as usize, 0);
            let known = source.sums(first, &mut self.sums)?;
            self.sums.truncate(known);
        }
        for (key, unit) in self.units.range(range) {
            let at = (key.unit - first) as usize * UNIT_BYTES;
            into[at..at + UNIT_BYTES].copy_from_slice(unit.content.as_deref().unwrap_or(&ZERO_UNIT));
        }
        Ok(())
    }

    /// What is known of a unit that is `old` now, the one with number `i` of those that were read.
    fn before(&self, key: Key, i: usize, old: &[u8; UNIT_BYTES]) -> Before {
        match self.units.get(&key) {
            Some(unit) => Before { sum: unit.sum, flawed: unit.flawed, read: false },
            None => {
                let found = unit_sum(old);
                let unread = self.unread.contains(&(i as u64));
                let sum = self.sums.get(i).copied().unwrap_or(if unread { UNREADABLE } else { found });
                Before { sum, flawed: unread || sum != found, read: true }
            }
        }
    }

    /// `old` is what the units from `first` on are; `bytes` go to `offset` in them; the array ends at `array_end`.
    #[expect(clippy::too_many_arguments)]
    fn change(
        &mut self,
        array: Array,
        first: u64,
        old: &[u8],
        offset: usize,
        bytes: &[u8],
        array_end: u64,
        to: &mut Recorder<'_>,
    ) -> Result<(), JournalError> {
        for (i, old) in old.as_chunks::<UNIT_BYTES>().0.iter().enumerate() {
            let start = (i * UNIT_BYTES).max(offset);
            let end = ((i + 1) * UNIT_BYTES).min(offset + bytes.len());
            if start >= end {
                continue;
            }
            let within = start - i * UNIT_BYTES..end - i * UNIT_BYTES;
            let bytes = &bytes[start - offset..end - offset];
            let key = Key { array, unit: first + i as u64 };
            let same = old[within.clone()] == *bytes;
            let before = self.before(key, i, old);
            // What is damaged may by chance be what comes now; its checksum is not.
            if same && !before.flawed {
                continue;
            }
            let unit_end = key.unit * UNIT_BYTES as u64 + within.end as u64;
            let whole = within.start == 0 && (within.end == UNIT_BYTES || unit_end >= array_end);
            if before.flawed && (before.read || whole) {
                Flawed::push(&mut self.flawed, Flawed { key, count: 1, healed_by: whole.then_some(to.epoch) });
            }
            let mut new = if whole { ZERO_UNIT } else { *old };
            new[within].copy_from_slice(bytes);
            if self.units.get(&key).is_none_or(|unit| unit.recorded != to.epoch) {
                if before.flawed || *old != ZERO_UNIT {
                    to.log.before_with(key, old, before.sum, before.flawed)?;
                } else {
                    to.log.before(key, None)?;
                }
            }
            let flawed = before.flawed && !whole;
            // A checksum that this content cannot have.
            let sum = unit_sum(&new) ^ u64::from(flawed);
            let content = (new != ZERO_UNIT).then(|| Box::new(new));
            self.bytes += cost(content.is_some());
            if let Some(before) = self.units.insert(key, Unit { content, sum, flawed, recorded: to.epoch }) {
                self.bytes -= cost(before.content.is_some());
            }
        }
        Ok(())
    }

    /// Gives everything to `write`, in order and in runs: array, offset, bytes or how many zeroes, and their checksums (of
    /// zeroes none, unless they are not in order).
    pub fn drain(&mut self, write: Drain<'_>) -> Result<(), JournalError> {
        let unit_bytes = UNIT_BYTES as u64;
        let units = std::mem::take(&mut self.units);
        self.bytes = 0;
        let mut all = units.iter().peekable();
        let mut bytes: Vec<u8> = Vec::with_capacity(RUN_UNITS as usize * UNIT_BYTES);
        let mut sums: Vec<u64> = Vec::with_capacity(RUN_UNITS as usize);
        while let Some((key, unit)) = all.next() {
            let mut count = 1;
            bytes.clear();
            sums.clear();
            bytes.extend_from_slice(unit.content.as_deref().map_or(&[][..], |content| &content[..]));
            let zero = unit.content.is_none();
            if !zero || unit.flawed {
                sums.push(unit.sum);
            }
            while let Some((_, more)) = all.next_if(|(next, more)| {
                let follows = next.array == key.array && next.unit == key.unit + count;
                let orderly = !zero || (!more.flawed && !unit.flawed);
                follows && orderly && more.content.is_none() == zero && (zero || count < RUN_UNITS)
            }) {
                count += 1;
                bytes.extend_from_slice(more.content.as_deref().map_or(&[][..], |content| &content[..]));
                if !zero {
                    sums.push(more.sum);
                }
            }
            let run = if zero { Run::Zero(count * unit_bytes) } else { Run::Data(&bytes) };
            write(key.array, key.unit * unit_bytes, run, &sums)?;
        }
        Ok(())
    }
}

/// Is given a run of units: the array, the offset, the run, and the checksums.
pub(super) type Drain<'a> = &'a mut dyn FnMut(Array, u64, Run<'_>, &[u64]) -> Result<(), JournalError>;

/// Neighbouring units, to be written at once.
#[derive(Debug, Clone, Copy)]
pub(super) enum Run<'a> {
    Data(&'a [u8]),
    /// So many bytes.
    Zero(u64),
}

fn cost(data: bool) -> u64 {
    UNIT_OVERHEAD_BYTES + if data { UNIT_BYTES as u64 } else { 0 }
}
