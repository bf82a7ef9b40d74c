//! History: what applying an epoch overwrote, so that the standby can be taken back.
//!
//! A *set* takes a standby from the epoch `to` back to the epoch `from`. It consists of before-images: units of 4 KiB of an
//! array (a RAM block, a disk, the device state, the domain XML, the layout) as they were at `from`. Arrays are thought of
//! as going on with zeroes for ever, so that growing and shrinking need no case of their own; how long they were at `from`
//! is in the set's end and in the layout.
//!
//! Rules that everything here keeps:
//!
//! - **The older value wins.** Of two before-images of a unit the one that was written first in a set, and the one of the
//!   older set, is what the unit was. So two neighbouring sets become one by writing the older one's units and then those
//!   of the newer one that are not there yet; nothing else is read.
//! - A set says nothing about units that did not change.
//! - Everything is appended; a set is whole in one segment. How far the log is valid says the control record: up to
//!   `committed` there are whole sets, from there up to `announced` there are records of a batch that was being applied,
//!   from which the standby is taken back to where the batch began. What is behind that is rubbish.
//!
//! Formats are those of `docs/journal.md`, section "History".

mod log;
mod read;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::record::{u16_at, u32_at, u64_at};

pub use log::{HistoryLog, segments};
pub use read::{HistoryScan, read_back, read_set, read_unit, read_unit_as_kept};

/// Bytes of a unit: a page of the guest.
pub const UNIT_BYTES: usize = 4096;
/// A set is put into a new segment when the newest one is this long, so that space comes back in small steps.
pub const HISTORY_SEGMENT_BYTES: u64 = 16 << 20;

pub(crate) const TYPE_SET_BEGIN: u16 = 16;
pub(crate) const TYPE_BEFORE: u16 = 17;
pub(crate) const TYPE_SET_END: u16 = 18;

/// A Before record is closed when it has this many bytes. Its entries are read as a whole.
const BEFORE_BYTES: usize = 1 << 20;
/// The end of the longest file there can be: offsets are signed.
const OFFSET_MAX: u64 = i64::MAX as u64;
const BEFORE_HEAD_BYTES: usize = 8;
const ENTRY_BYTES: usize = 32;
const SET_END_BYTES: usize = 80;
const ENCODING_ZERO: u8 = 0;
const ENCODING_RAW: u8 = 1;
const ENCODING_LZ4: u8 = 2;

/// What before-images are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Array {
    /// The RAM block of this number in the layout.
    Ram(u16),
    /// The disk of this number in the layout.
    Disk(u16),
    /// What xen-save-devices-state wrote.
    Device,
    /// The domain's XML.
    Xml,
    /// The layout, as bytes.
    Layout,
}

impl Array {
    /// The number that stands for it in files.
    pub fn to_number(self) -> u32 {
        match self {
            Array::Ram(n) => u32::from(n),
            Array::Disk(n) => 1 << 16 | u32::from(n),
            Array::Device => 2 << 16,
            Array::Xml => 3 << 16,
            Array::Layout => 4 << 16,
        }
    }

    /// The array that a number stands for.
    pub fn from_number(number: u32) -> Option<Self> {
        let low = (number & 0xffff) as u16;
        match (number >> 16, low) {
            (0, n) => Some(Array::Ram(n)),
            (1, n) => Some(Array::Disk(n)),
            (2, 0) => Some(Array::Device),
            (3, 0) => Some(Array::Xml),
            (4, 0) => Some(Array::Layout),
            _ => None,
        }
    }
}

/// One unit of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Which array.
    pub array: Array,
    /// Which unit of it, counted from 0.
    pub unit: u64,
}

/// A place in the log: up to, not including. All zero: the beginning, before there is a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Number of the segment.
    pub segment: u64,
    /// Offset in it.
    pub offset: u64,
}

/// What a set says of the point it goes back to, beside its units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PointTail {
    /// Wall clock of the protected host at its cut.
    pub cut_unix_ns: u64,
    /// Whether its file systems were at rest at the cut (application-consistent).
    pub application: bool,
    /// Length of its device state.
    pub device_bytes: u64,
    /// Length of its domain XML.
    pub xml_bytes: u64,
    /// Length of its layout.
    pub layout_bytes: u64,
    /// Bytes written to disks, or zeroed, between it and the point that the set starts from.
    pub disk_bytes: u64,
}

/// A set in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set {
    /// Generation of both its points.
    pub generation: u64,
    /// The epoch that it takes back to.
    pub from: u64,
    /// The epoch that it starts from. More than `from`.
    pub to: u64,
    /// The segment that it is in.
    pub segment: u64,
    /// Where its first record begins.
    pub offset: u64,
    /// Where its last record ends.
    pub end: u64,
    /// How many units it has, neighbouring zero ones counted one by one.
    pub units: u64,
    /// The point.
    pub point: PointTail,
}

impl Set {
    /// Bytes that it takes up.
    pub fn bytes(&self) -> u64 {
        self.end - self.offset
    }
}

/// A before-image, or several of neighbouring units that were zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first unit.
    pub key: Key,
    /// How many units: more than one only if they are zero.
    pub count: u32,
    encoding: u8,
    /// Bytes stored.
    length: u32,
    /// [`unit_sum`] of what the unit's content should be.
    xxh3: u64,
    /// It was damaged before it was kept: the content is what was found, and the checksum that of what should have been there.
    flawed: bool,
}

/// The checksum of a unit, here and beside the standby's images: XXH3-64; 0 if all of it is zero, so that holes have theirs
/// without anything being written.
pub fn unit_sum(content: &[u8; UNIT_BYTES]) -> u64 {
    if *content == [0; UNIT_BYTES] { 0 } else { xxh3_64(content) }
}

impl Entry {
    /// Whether the units are zero.
    pub fn is_zero(&self) -> bool {
        self.encoding == ENCODING_ZERO
    }

    /// Whether what was kept was damaged already: there is nothing that could be gone back to.
    pub fn is_flawed(&self) -> bool {
        self.flawed
    }

    /// The checksum of what the unit should have been; 0: zero.
    pub fn sum(&self) -> u64 {
        self.xxh3
    }

    /// The unit's content out of the bytes that are stored of it, checked.
    pub fn content(&self, stored: &[u8], unit: &mut [u8; UNIT_BYTES]) -> Result<(), String> {
        self.as_kept(stored, unit)?;
        if self.flawed { Err(self.wrong("was damaged before it was kept")) } else { Ok(()) }
    }

    fn wrong(&self, what: &str) -> String {
        format!("the before-image of unit {} of {:?} {what}", self.key.unit, self.key.array)
    }

    /// What was kept of the unit; of one that was damaged before, that.
    pub fn as_kept(&self, stored: &[u8], unit: &mut [u8; UNIT_BYTES]) -> Result<(), String> {
        let wrong = |what: &str| self.wrong(what);
        match self.encoding {
            ENCODING_ZERO => {
                unit.fill(0);
                return Ok(());
            }
            ENCODING_RAW => {
                let whole: &[u8; UNIT_BYTES] = stored.try_into().map_err(|_| wrong("is cut short"))?;
                *unit = *whole;
            }
            _ => {
                let got = lz4_flex::block::decompress_into(stored, unit).map_err(|_| wrong("cannot be unpacked"))?;
                if got != UNIT_BYTES {
                    return Err(wrong("is cut short"));
                }
            }
        }
        if self.flawed || xxh3_64(unit) == self.xxh3 { Ok(()) } else { Err(wrong("does not match its checksum")) }
    }

    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.key.array.to_number().to_le_bytes());
        to.extend_from_slice(&[self.encoding, u8::from(self.flawed), 0, 0]);
        to.extend_from_slice(&self.key.unit.to_le_bytes());
        to.extend_from_slice(&self.count.to_le_bytes());
        to.extend_from_slice(&self.length.to_le_bytes());
        to.extend_from_slice(&self.xxh3.to_le_bytes());
    }

    fn read(from: &[u8]) -> Option<Self> {
        let (unit, count) = (u64_at(from, 8), u32_at(from, 16));
        let entry = Entry {
            key: Key { array: Array::from_number(u32_at(from, 0))?, unit },
            count,
            encoding: from[4],
            length: u32_at(from, 20),
            xxh3: u64_at(from, 24),
            flawed: from[5] & 1 != 0,
        };
        let fits = match entry.encoding {
            ENCODING_ZERO => entry.length == 0 && count > 0 && !entry.flawed,
            ENCODING_RAW => entry.length as usize == UNIT_BYTES && count == 1,
            ENCODING_LZ4 => (1..UNIT_BYTES as u32).contains(&entry.length) && count == 1,
            _ => false,
        };
        let end = unit.checked_add(u64::from(count)).and_then(|end| end.checked_mul(UNIT_BYTES as u64));
        (fits && end.is_some_and(|end| end <= OFFSET_MAX)).then_some(entry)
    }
}

/// The entries of a Before record's body, each with where in the body its bytes are.
pub(crate) fn entries(body: &[u8]) -> Result<Vec<(Entry, std::ops::Range<usize>)>, String> {
    let wrong = || "the list of before-images is not valid".to_owned();
    if body.len() < BEFORE_HEAD_BYTES {
        return Err(wrong());
    }
    let count = u32_at(body, 0) as usize;
    let data_at = count.checked_mul(ENTRY_BYTES).map(|list| list + BEFORE_HEAD_BYTES).filter(|at| *at <= body.len());
    let mut at = data_at.ok_or_else(wrong)?;
    let mut all = Vec::with_capacity(count);
    for from in body[BEFORE_HEAD_BYTES..at].chunks_exact(ENTRY_BYTES) {
        let entry = Entry::read(from).ok_or_else(wrong)?;
        let end = at + entry.length as usize;
        if end > body.len() {
            return Err(wrong());
        }
        all.push((entry, at..end));
        at = end;
    }
    if at == body.len() { Ok(all) } else { Err(wrong()) }
}

/// What closes a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SetEnd {
    pub from: u64,
    pub point: PointTail,
    pub units: u64,
    pub records: u32,
    /// XXH3-64 over the bodies' checksums.
    pub xxh3: u64,
}

impl SetEnd {
    fn to_bytes(self) -> Bytes {
        let p = &self.point;
        let mut to = Vec::with_capacity(SET_END_BYTES);
        for number in
            [self.from, p.cut_unix_ns, p.device_bytes, p.xml_bytes, p.layout_bytes, p.disk_bytes, self.units, self.xxh3]
        {
            to.extend_from_slice(&number.to_le_bytes());
        }
        to.extend_from_slice(&self.records.to_le_bytes());
        to.extend_from_slice(&u16::from(p.application).to_le_bytes());
        to.resize(SET_END_BYTES, 0);
        to.into()
    }

    pub(crate) fn from_bytes(from: &[u8]) -> Option<Self> {
        if from.len() != SET_END_BYTES {
            return None;
        }
        let number = |i: usize| u64_at(from, i * 8);
        let point = PointTail {
            cut_unix_ns: number(1),
            application: u16_at(from, 68) & 1 != 0,
            device_bytes: number(2),
            xml_bytes: number(3),
            layout_bytes: number(4),
            disk_bytes: number(5),
        };
        Some(SetEnd { from: number(0), point, units: number(6), records: u32_at(from, 64), xxh3: number(7) })
    }
}
