//! Reading the history: which sets there are, what is in one, and a batch that was being applied, backwards.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use vmdr_codec::Digest;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::disk::{Disk, File, Mode};
use crate::journal::{segment_number, segment_path};
use crate::record::{RECORD_HEAD_BYTES, RecordHead, SEGMENT_HEAD_BYTES, SegmentHead, check_segment_head, uuid_text};
use crate::scan::find_head;
use crate::{BODY_BYTES_MAX, JournalError};

/// What there is in a history.
#[derive(Debug, Default)]
pub struct HistoryScan {
    /// Whole sets up to the committed place, in the order in which they were written.
    pub sets: Vec<Set>,
    /// What is not as it was written, in sentences for the operator. The sets there are not in `sets`.
    pub damage: Vec<String>,
}

impl HistoryScan {
    /// Reads all segments in `dir` up to `committed`: headers and ends of sets, not what is in the sets.
    pub fn read(disk: &dyn Disk, dir: &Path, domain: &[u8; 16], committed: Place) -> Result<Self, JournalError> {
        let mut scan = Self::default();
        let names = match disk.list(dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(JournalError::io("list", dir))?,
        };
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
        numbers.retain(|number| *number <= committed.segment);
        numbers.sort_unstable();
        if committed.offset < u64::MAX && committed.segment > 0 && !numbers.contains(&committed.segment) {
            scan.damage.push(format!("history segment {} is missing", committed.segment));
        }
        for number in numbers {
            let mut walk = Walk::open(disk, dir, number)?;
            if number == committed.segment && committed.offset < u64::MAX {
                if walk.end < committed.offset {
                    let (end, expected) = (walk.end, committed.offset);
                    scan.damage.push(format!("history segment {number} ends at {end}, it had {expected} bytes"));
                }
                walk.end = walk.end.min(committed.offset);
            }
            if let Err(what) = walk.head(domain)? {
                scan.damage.push(format!("history segment {number}: {what}"));
                continue;
            }
            if let Err(what) = walk.sets(&mut scan.sets)? {
                scan.damage.push(format!("history segment {number}: {what}"));
            }
        }
        Ok(scan)
    }
}

/// Is shown an entry, the bytes that are stored of it, and where in the segment those are.
pub type Show<'a> = &'a mut dyn FnMut(&Entry, &[u8], u64) -> Result<(), JournalError>;
/// Is shown units as they were before: the entry, and what they were; `None`: zero.
pub type ShowBack<'a> = &'a mut dyn FnMut(&Entry, Option<&[u8; UNIT_BYTES]>) -> Result<(), JournalError>;

/// Reads what a set consists of, in order, each entry with the bytes that are stored of it and where those are in the
/// segment. Everything was checked against its checksums before it is shown, but the set's end comes last: what was shown
/// counts only if this returns without an error.
pub fn read_set(disk: &dyn Disk, dir: &Path, set: &Set, show: Show<'_>) -> Result<(), JournalError> {
    let mut walk = Walk::open(disk, dir, set.segment)?;
    walk.at = set.offset;
    walk.end = walk.end.min(set.end);
    let path = walk.path.clone();
    let epochs = format!("history from epoch {} back to {}", set.to, set.from);
    let damaged = |what: String| JournalError::Damaged { path: path.clone(), what: format!("{epochs}: {what}") };
    let mut begun = false;
    let mut sums = Digest::new();
    let (mut records, mut units) = (0u32, 0u64);
    loop {
        let (head, body_at) = walk.next()?.map_err(damaged)?.ok_or_else(|| damaged("it has no end".to_owned()))?;
        if (head.generation, head.epoch) != (set.generation, set.to) {
            return Err(damaged(format!("a record at {} is of another set", walk.at)));
        }
        let body = walk.body(&head, body_at)?.map_err(damaged)?;
        match head.kind {
            TYPE_SET_BEGIN if !begun && body == set.from.to_le_bytes() => begun = true,
            TYPE_BEFORE if begun && head.sequence == records => {
                records += 1;
                sums.update(&head.body_xxh3.to_le_bytes());
                for (entry, at) in entries(&body).map_err(damaged)? {
                    units += u64::from(entry.count);
                    show(&entry, &body[at.clone()], body_at + at.start as u64)?;
                }
            }
            TYPE_SET_END if begun => {
                let end = SetEnd::from_bytes(&body).ok_or_else(|| damaged("its end is not valid".to_owned()))?;
                let expected = SetEnd { from: set.from, point: set.point, units, records, xxh3: sums.halves().0 };
                let whole = end == expected && units == set.units;
                return if whole { Ok(()) } else { Err(damaged("its end does not match".to_owned())) };
            }
            other => return Err(damaged(format!("a record of type {other} is out of place"))),
        }
    }
}

/// Reads a unit again that [`read_set`] has shown.
pub fn read_unit(
    disk: &dyn Disk,
    dir: &Path,
    segment: u64,
    entry: &Entry,
    at: u64,
    unit: &mut [u8; UNIT_BYTES],
) -> Result<(), JournalError> {
    read_with(disk, dir, (segment, at), entry, Entry::content, unit)
}

/// [`read_unit`] of a unit that may have been damaged before it was kept: what was kept of it.
pub fn read_unit_as_kept(
    disk: &dyn Disk,
    dir: &Path,
    segment: u64,
    entry: &Entry,
    at: u64,
    unit: &mut [u8; UNIT_BYTES],
) -> Result<(), JournalError> {
    read_with(disk, dir, (segment, at), entry, Entry::as_kept, unit)
}

/// Makes a unit out of what is stored of it.
type Unpack = fn(&Entry, &[u8], &mut [u8; UNIT_BYTES]) -> Result<(), String>;

fn read_with(
    disk: &dyn Disk,
    dir: &Path,
    (segment, at): (u64, u64),
    entry: &Entry,
    unpack: Unpack,
    unit: &mut [u8; UNIT_BYTES],
) -> Result<(), JournalError> {
    let path = segment_path(dir, segment);
    let stored = &mut [0; UNIT_BYTES][..(entry.length as usize).min(UNIT_BYTES)];
    let mut got = 0;
    if !entry.is_zero() {
        let file = disk.open(&path, Mode::Read).map_err(JournalError::io("open", &path))?;
        got = file.read_at(stored, at).map_err(JournalError::io("read", &path))?;
    }
    unpack(entry, &stored[..got], unit).map_err(|what| JournalError::Damaged { path, what })
}

/// Shows the before-images between two places, the newest first: written one after another, each over what came before,
/// they take the standby back. Sets need not be whole. Damage is found before anything is shown.
pub fn read_back(disk: &dyn Disk, dir: &Path, from: Place, to: Place, show: ShowBack<'_>) -> Result<(), JournalError> {
    let mut bodies: Vec<(RecordHead, u64, u64)> = Vec::new();
    let names = disk.list(dir).map_err(JournalError::io("list", dir))?;
    let there: HashSet<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    let first = if from.offset == u64::MAX { from.segment + 1 } else { from.segment.max(1) };
    for number in first..=to.segment {
        let path = segment_path(dir, number);
        let damaged = |what: String| JournalError::Damaged { path: path.clone(), what };
        if !there.contains(&number) {
            return Err(damaged("it is missing".to_owned()));
        }
        let mut walk = Walk::open(disk, dir, number)?;
        walk.at = if number == from.segment { from.offset } else { SEGMENT_HEAD_BYTES as u64 };
        if number == to.segment && to.offset < u64::MAX {
            if walk.end < to.offset {
                return Err(damaged(format!("it ends at {}, it had {} bytes", walk.end, to.offset)));
            }
            walk.end = to.offset;
        }
        while let Some((head, body_at)) = walk.next()?.map_err(damaged)? {
            if head.kind == TYPE_BEFORE {
                // Once to see that it is whole, and once to write it: it may be more than memory holds.
                let body = walk.body(&head, body_at)?.map_err(damaged)?;
                entries(&body).map_err(damaged)?;
                bodies.push((head, number, body_at));
            }
        }
    }
    for (head, number, body_at) in bodies.into_iter().rev() {
        let walk = Walk::open(disk, dir, number)?;
        let damaged = |what: String| JournalError::Damaged { path: walk.path.clone(), what };
        let body = walk.body(&head, body_at)?.map_err(damaged)?;
        let mut unit = [0; UNIT_BYTES];
        for (entry, at) in entries(&body).map_err(damaged)?.into_iter().rev() {
            entry.as_kept(&body[at], &mut unit).map_err(damaged)?;
            show(&entry, (!entry.is_zero()).then_some(&unit))?;
        }
    }
    Ok(())
}

/// Goes through a segment record by record.
struct Walk {
    file: Box<dyn File>,
    path: PathBuf,
    number: u64,
    at: u64,
    end: u64,
}

type Damaged<T> = Result<T, String>;

impl Walk {
    fn open(disk: &dyn Disk, dir: &Path, number: u64) -> Result<Self, JournalError> {
        let path = segment_path(dir, number);
        let file = disk.open(&path, Mode::Read).map_err(JournalError::io("open", &path))?;
        let end = file.length().map_err(JournalError::io("read", &path))?;
        Ok(Self { file, path, number, at: 0, end })
    }

    fn read(&self, length: usize, at: u64) -> Result<Vec<u8>, JournalError> {
        let mut bytes = vec![0; length];
        let got = self.file.read_at(&mut bytes, at).map_err(JournalError::io("read", &self.path))?;
        bytes.truncate(got);
        Ok(bytes)
    }

    fn head(&mut self, domain: &[u8; 16]) -> Result<Damaged<()>, JournalError> {
        let head = self.read(SEGMENT_HEAD_BYTES, 0)?;
        self.at = SEGMENT_HEAD_BYTES as u64;
        Ok(match check_segment_head(&head, domain, self.number) {
            SegmentHead::Good => Ok(()),
            SegmentHead::Damaged => Err("the segment's header is not valid".to_owned()),
            SegmentHead::Version(found) => return Err(JournalError::Version { path: self.path.clone(), found }),
            SegmentHead::WrongDomain(found) => {
                let (expected, found) = (uuid_text(domain), uuid_text(&found));
                return Err(JournalError::WrongDomain { path: self.path.clone(), expected, found });
            }
        })
    }

    /// The next record's header and where its body begins; nothing at the end.
    fn next(&mut self) -> Result<Damaged<Option<(RecordHead, u64)>>, JournalError> {
        if self.at >= self.end {
            return Ok(Ok(None));
        }
        let head = self.read(RECORD_HEAD_BYTES, self.at)?;
        let head = head.as_slice().try_into().ok();
        let head = head.and_then(|bytes| RecordHead::from_bytes(bytes, self.number, self.at));
        let body_at = self.at + RECORD_HEAD_BYTES as u64;
        let fits = |head: &RecordHead| head.length <= BODY_BYTES_MAX && body_at + u64::from(head.length) <= self.end;
        let Some(head) = head.filter(fits) else {
            return Ok(Err(format!("the record at offset {} is not valid", self.at)));
        };
        self.at = body_at + u64::from(head.length);
        Ok(Ok(Some((head, body_at))))
    }

    fn body(&self, head: &RecordHead, at: u64) -> Result<Damaged<Vec<u8>>, JournalError> {
        let body = self.read(head.length as usize, at)?;
        let good = body.len() == head.length as usize && xxh3_64(&body) == head.body_xxh3;
        Ok(if good {
            Ok(body)
        } else {
            Err(format!("the record before offset {} is damaged", at + u64::from(head.length)))
        })
    }

    /// Collects the sets that are whole as far as headers tell, also of those behind a header that is damaged.
    ///
    /// A page of the guest could look like a set there: one that is made for just this place, with which a guest could deceive
    /// nobody but those who take it back, and only where something else has damaged its history before.
    fn sets(&mut self, sets: &mut Vec<Set>) -> Result<Damaged<()>, JournalError> {
        let mut begun: Option<(u64, RecordHead)> = None;
        let mut fault = None;
        loop {
            let offset = self.at;
            let (head, body_at) = match self.next()? {
                Ok(None) => break,
                Ok(Some(found)) => found,
                Err(what) => {
                    (begun, fault) = (None, fault.or(Some(what)));
                    let begins = |head: &RecordHead| head.kind == TYPE_SET_BEGIN;
                    match find_head(&*self.file, &self.path, self.number, self.at + 1..self.end, begins)? {
                        Some((found, _)) => self.at = found,
                        None => break,
                    }
                    continue;
                }
            };
            match head.kind {
                TYPE_SET_BEGIN => begun = Some((offset, head)),
                TYPE_BEFORE => {}
                TYPE_SET_END => {
                    let begin = begun.take().filter(|(_, b)| (b.generation, b.epoch) == (head.generation, head.epoch));
                    let end = match self.body(&head, body_at)? {
                        Ok(body) => SetEnd::from_bytes(&body).ok_or_else(|| "the end of a set is not valid".to_owned()),
                        Err(what) => Err(what),
                    };
                    match (begin, end) {
                        (Some((offset, _)), Ok(end)) if end.from < head.epoch => sets.push(Set {
                            generation: head.generation,
                            from: end.from,
                            to: head.epoch,
                            segment: self.number,
                            offset,
                            end: self.at,
                            units: end.units,
                            point: end.point,
                        }),
                        (_, Err(what)) => fault = fault.or(Some(what)),
                        _ => fault = fault.or_else(|| Some(format!("the set before offset {} is not whole", self.at))),
                    }
                }
                other => {
                    let what = format!("record type {other} at offset {offset} is of a later version, use that");
                    return Err(JournalError::Damaged { path: self.path.clone(), what });
                }
            }
        }
        Ok(fault.map_or(Ok(()), Err))
    }
}
