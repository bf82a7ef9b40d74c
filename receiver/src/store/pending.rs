//! Writes that wait in memory until what they replace is durable in the history.
//!
//! Units are those of the history, 4 KiB. A unit is here from its first change on until it is written to its image, so that
//! a batch of epochs that write the same page again and again reads and writes the image once. A write that changes nothing
//! leaves no trace.

use std::collections::BTreeMap;
use std::ops::Range;

use vmdr_journal::{Array, HistoryLog, JournalError, Key, UNIT_BYTES};

/// Bytes that a unit takes here beside its content.
const UNIT_OVERHEAD_BYTES: u64 = 96;
/// Units read, or written, at once.
const RUN_UNITS: u64 = 256;

pub(super) static ZERO_UNIT: [u8; UNIT_BYTES] = [0; UNIT_BYTES];

/// What reads as an array: as long as it likes, with zeroes behind its end.
pub(super) trait Source {
    /// Fills `buffer` from `offset` on.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), JournalError>;
    /// Everything from `offset` up to what this returns is zero.
    fn data_from(&self, offset: u64) -> Result<u64, JournalError>;
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Pending {
    units: BTreeMap<Key, Unit>,
    bytes: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Unit {
    /// `None`: zero.
    content: Option<Box<[u8; UNIT_BYTES]>>,
    /// The epoch whose set has what it was before.
    recorded: u64,
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

    pub fn clear(&mut self) {
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
            let result = result.and_then(|()| self.change(array, first, &old, (at % unit_bytes) as usize, piece, to));
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
            self.change(array, unit, &old, 0, &ZERO_UNIT, to)?;
            unit += 1;
        }
        self.write(source, array, end, &ZERO_UNIT[..(range.end - end) as usize], to)
    }

    /// What units are now.
    fn read(&self, source: &dyn Source, array: Array, first: u64, into: &mut [u8]) -> Result<(), JournalError> {
        let count = (into.len() / UNIT_BYTES) as u64;
        let range = Key { array, unit: first }..Key { array, unit: first + count };
        if self.units.range(range.clone()).count() < count as usize {
            source.read(into, first * UNIT_BYTES as u64)?;
        }
        for (key, unit) in self.units.range(range) {
            let at = (key.unit - first) as usize * UNIT_BYTES;
            into[at..at + UNIT_BYTES].copy_from_slice(unit.content.as_deref().unwrap_or(&ZERO_UNIT));
        }
        Ok(())
    }

    /// `old` is what the units from `first` on are; `bytes` go to `offset` in them.
    fn change(
        &mut self,
        array: Array,
        first: u64,
        old: &[u8],
        offset: usize,
        bytes: &[u8],
        to: &mut Recorder<'_>,
    ) -> Result<(), JournalError> {
        for (i, old) in old.as_chunks::<UNIT_BYTES>().0.iter().enumerate() {
            let start = (i * UNIT_BYTES).max(offset);
            let end = ((i + 1) * UNIT_BYTES).min(offset + bytes.len());
            if start >= end || old[start - i * UNIT_BYTES..end - i * UNIT_BYTES] == bytes[start - offset..end - offset]
            {
                continue;
            }
            let mut new = *old;
            new[start - i * UNIT_BYTES..end - i * UNIT_BYTES].copy_from_slice(&bytes[start - offset..end - offset]);
            let key = Key { array, unit: first + i as u64 };
            let before = self.units.get(&key);
            if before.is_none_or(|unit| unit.recorded != to.epoch) {
                to.log.before(key, (*old != ZERO_UNIT).then_some(old))?;
            }
            let content = (new != ZERO_UNIT).then(|| Box::new(new));
            self.bytes += cost(content.is_some());
            if let Some(before) = self.units.insert(key, Unit { content, recorded: to.epoch }) {
                self.bytes -= cost(before.content.is_some());
            }
        }
        Ok(())
    }

    /// Gives everything to `write` or `zero`, in order and in runs: array, offset, and bytes or how many.
    pub fn drain(
        &mut self,
        write: &mut dyn FnMut(Array, u64, Run<'_>) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        let unit_bytes = UNIT_BYTES as u64;
        let units = std::mem::take(&mut self.units);
        self.bytes = 0;
        let mut all = units.iter().peekable();
        let mut bytes: Vec<u8> = Vec::with_capacity(RUN_UNITS as usize * UNIT_BYTES);
        while let Some((key, unit)) = all.next() {
            let mut count = 1;
            bytes.clear();
            bytes.extend_from_slice(unit.content.as_deref().map_or(&[][..], |content| &content[..]));
            let zero = unit.content.is_none();
            while let Some((_, more)) = all.next_if(|(next, more)| {
                let follows = next.array == key.array && next.unit == key.unit + count;
                follows && more.content.is_none() == zero && (zero || count < RUN_UNITS)
            }) {
                count += 1;
                bytes.extend_from_slice(more.content.as_deref().map_or(&[][..], |content| &content[..]));
            }
            let run = if zero { Run::Zero(count * unit_bytes) } else { Run::Data(&bytes) };
            write(key.array, key.unit * unit_bytes, run)?;
        }
        Ok(())
    }
}

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
