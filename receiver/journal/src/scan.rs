//! Reading a journal after whatever happened to it.
//!
//! Records are followed one by one from a segment's beginning. A body that does not match its checksum spoils its part, but
//! the records behind it can still be followed. A header that does not match breaks the chain: nothing behind it in that
//! segment is taken for data (a page of the guest could contain what looks like a record), but if something there looks like
//! the beginning of a later part, the break lies in what had been durable, and is damage rather than a torn end.

use std::ops::Range;
use std::path::Path;

use bytes::Bytes;

use crate::disk::{Disk, File, Mode};
use crate::journal::{segment_number, segment_path};
use crate::record::*;
use crate::{BODY_BYTES_MAX, JournalError};

/// Bytes searched at once for a record's header behind a broken chain.
const SEARCH_BYTES: usize = 1 << 20;

/// What was found in a journal.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The whole parts, in the order in which they were written.
    pub parts: Vec<Part>,
    /// Damage, in order.
    pub damage: Vec<Damage>,
    /// What was cut off the end.
    pub torn: Option<Torn>,
    /// The highest segment number there was.
    pub(crate) newest: u64,
    /// The segment that can be appended to, and where its last part ends.
    pub(crate) appendable: Option<(u64, u64)>,
}

/// A place where the journal is not what was written, in what had been durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The segment.
    pub segment: u64,
    /// Where in it the spoilt part begins, or the damage if it is between parts.
    pub offset: u64,
    /// Generation of the part; 0 if not known.
    pub generation: u64,
    /// Epoch of the part; 0 if not known.
    pub epoch: u64,
    /// In which way.
    pub what: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { segment, offset, epoch, what, .. } = self;
        write!(f, "journal segment {segment} at offset {offset}, epoch {epoch}: {what}")
    }
}

/// The end of the newest segment, which is not a whole part: a crash tore it, or it was damaged since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    /// The segment.
    pub segment: u64,
    /// Where it was cut.
    pub offset: u64,
    /// How much was cut.
    pub bytes: u64,
    /// Generation of the part; 0 if not known.
    pub generation: u64,
    /// Epoch of the part; 0 if not known.
    pub epoch: u64,
    /// Whether the part's end was there: then it may have been acknowledged.
    pub ended: bool,
}

/// Cuts a torn end off; of a segment of which nothing is left the file too, and then says so.
pub(crate) fn cut(disk: &dyn Disk, dir: &Path, torn: &Torn) -> Result<bool, JournalError> {
    let path = segment_path(dir, torn.segment);
    if torn.offset <= SEGMENT_HEAD_BYTES as u64 {
        disk.remove_file(&path).map_err(JournalError::io("remove", &path))?;
        disk.sync_dir(dir).map_err(JournalError::io("sync", dir))?;
        return Ok(true);
    }
    let file = disk.open(&path, Mode::Write).map_err(JournalError::io("open", &path))?;
    file.set_length(torn.offset).map_err(JournalError::io("cut", &path))?;
    file.sync().map_err(JournalError::io("sync", &path))?;
    Ok(false)
}

/// Reads all segments in `dir`.
pub(crate) fn scan(
    disk: &dyn Disk,
    dir: &Path,
    domain: &[u8; 16],
    visit: &mut dyn FnMut(&Part, &[Bytes]),
) -> Result<Recovered, JournalError> {
    let mut recovered = Recovered::default();
    let mut numbers = Vec::new();
    for name in disk.list(dir).map_err(JournalError::io("list", dir))? {
        let aside = name.strip_suffix(".damaged").and_then(segment_number);
        recovered.newest = recovered.newest.max(aside.unwrap_or(0));
        numbers.extend(segment_number(&name));
    }
    numbers.sort_unstable();
    recovered.newest = recovered.newest.max(numbers.last().copied().unwrap_or(0));
    for (i, &number) in numbers.iter().enumerate() {
        if i > 0 && numbers[i - 1] + 1 != number {
            let what = format!("the segments between {} and {number} are missing", numbers[i - 1]);
            recovered.damage.push(Damage { segment: number, offset: 0, generation: 0, epoch: 0, what });
        }
        let path = segment_path(dir, number);
        let file = disk.open(&path, Mode::Read).map_err(JournalError::io("open", &path))?;
        let length = file.length().map_err(JournalError::io("read", &path))?;
        let mut walk = Walk {
            file: &*file,
            path: &path,
            number,
            length,
            at: 0,
            part: None,
            spoilt: None,
            last: (0, 0),
            recovered: &mut recovered,
            visit,
        };
        walk.head(domain)?;
        let broken = walk.records()?;
        walk.finish(number == numbers[numbers.len() - 1], broken)?;
    }
    Ok(recovered)
}

/// A part that is being followed.
struct Following {
    head: PartHead,
    start: u64,
    chunks: Vec<ChunkAt>,
    payloads: Vec<Bytes>,
    digest: vmdr_codec::Digest,
    payload_bytes: u64,
    fault: Option<String>,
}

/// The first header of a record that begins in `range` of segment `number` and is `wanted`, and where.
pub(crate) fn find_head(
    file: &dyn File,
    path: &Path,
    number: u64,
    range: Range<u64>,
    wanted: impl Fn(&RecordHead) -> bool,
) -> Result<Option<(u64, RecordHead)>, JournalError> {
    let mut at = range.start;
    let mut bytes = vec![0; SEARCH_BYTES];
    while at < range.end {
        let got = file.read_at(&mut bytes, at).map_err(JournalError::io("read", path))?;
        let mut from = 0;
        while let Some(found) = RecordHead::find(&bytes[from..got]) {
            let place = at + (from + found) as u64;
            from += found + 1;
            let mut head = [0; RECORD_HEAD_BYTES];
            let whole = file.read_at(&mut head, place).map_err(JournalError::io("read", path))? == head.len();
            let head = RecordHead::from_bytes(&head, number, place).filter(|head| whole && wanted(head));
            if let Some(head) = head.filter(|_| place < range.end) {
                return Ok(Some((place, head)));
            }
        }
        // Windows overlap, so that a magic across a boundary is found.
        at += (got.max(4) - 3) as u64;
    }
    Ok(None)
}

struct Walk<'a> {
    file: &'a dyn File,
    path: &'a Path,
    number: u64,
    length: u64,
    at: u64,
    part: Option<Following>,
    /// A spoilt part with nothing seen behind it yet, and whether its end was seen.
    spoilt: Option<(Damage, bool)>,
    /// Generation and epoch of the newest part begun.
    last: (u64, u64),
    recovered: &'a mut Recovered,
    visit: &'a mut dyn FnMut(&Part, &[Bytes]),
}

impl Walk<'_> {
    fn read(&self, length: usize, at: u64) -> Result<Vec<u8>, JournalError> {
        let mut bytes = vec![0; length];
        let got = self.file.read_at(&mut bytes, at).map_err(JournalError::io("read", self.path))?;
        bytes.truncate(got);
        Ok(bytes)
    }

    fn head(&mut self, domain: &[u8; 16]) -> Result<(), JournalError> {
        let head = self.read(SEGMENT_HEAD_BYTES, 0)?;
        match check_segment_head(&head, domain, self.number) {
            SegmentHead::Good => {}
            SegmentHead::Version(found) => return Err(JournalError::Version { path: self.path.to_owned(), found }),
            SegmentHead::WrongDomain(found) => {
                let (expected, found) = (uuid_text(domain), uuid_text(&found));
                return Err(JournalError::WrongDomain { path: self.path.to_owned(), expected, found });
            }
            SegmentHead::Damaged => self.spoil(0, (0, 0), "the segment's header is not valid".to_owned(), false),
        }
        self.at = SEGMENT_HEAD_BYTES as u64;
        Ok(())
    }

    /// Follows the records; says whether the chain broke before the end.
    fn records(&mut self) -> Result<bool, JournalError> {
        while self.at < self.length {
            let head = self.read(RECORD_HEAD_BYTES, self.at)?;
            let head = head.as_slice().try_into().ok();
            let head = head.and_then(|bytes| RecordHead::from_bytes(bytes, self.number, self.at));
            let body_at = self.at + RECORD_HEAD_BYTES as u64;
            let Some(head) =
                head.filter(|head| head.length <= BODY_BYTES_MAX && body_at + u64::from(head.length) <= self.length)
            else {
                return Ok(true);
            };
            let body = self.read(head.length as usize, body_at)?;
            let good = vmdr_codec::chunk_hash(&body) == head.body_xxh3;
            match head.kind {
                TYPE_PART_BEGIN => self.begin(&head, &body, good),
                TYPE_CHUNK => self.chunk(&head, body, body_at, good),
                TYPE_PART_END => self.end(&head, &body, good),
                other => {
                    let what = format!("record type {other} at offset {} is of a later version, use that", self.at);
                    return Err(JournalError::Damaged { path: self.path.to_owned(), what });
                }
            }
            self.at = body_at + u64::from(head.length);
        }
        Ok(false)
    }

    fn begin(&mut self, head: &RecordHead, body: &[u8], good: bool) {
        if let Some(part) = self.part.take() {
            self.spoil(part.start, (part.head.generation, part.head.epoch), "the part has no end".to_owned(), false);
        }
        self.condemn();
        let kind = kind_from(body).filter(|_| good);
        let RecordHead { generation, epoch, part, .. } = *head;
        self.last = (generation, epoch);
        self.part = Some(Following {
            head: PartHead { generation, epoch, part, kind: kind.unwrap_or(Kind::Delta) },
            start: self.at,
            chunks: Vec::new(),
            payloads: Vec::new(),
            digest: vmdr_codec::Digest::new(),
            payload_bytes: 0,
            fault: kind.is_none().then(|| "the beginning of the part is damaged".to_owned()),
        });
    }

    fn chunk(&mut self, head: &RecordHead, body: Vec<u8>, body_at: u64, good: bool) {
        let Some(part) = self.part.as_mut().filter(|part| part.owns(head)) else {
            self.spoil(self.at, (head.generation, head.epoch), "a chunk outside of its part".to_owned(), false);
            return;
        };
        if !good || head.sequence as usize != part.chunks.len() {
            part.fault.get_or_insert_with(|| format!("chunk {} is damaged", head.sequence));
        }
        part.digest.update(&body);
        part.payload_bytes += body.len() as u64;
        part.chunks.push(ChunkAt { offset: body_at, length: head.length, xxh3: head.body_xxh3 });
        part.payloads.push(body.into());
    }

    fn end(&mut self, head: &RecordHead, body: &[u8], good: bool) {
        let Some(part) = self.part.take().filter(|part| part.owns(head)) else {
            self.spoil(self.at, (head.generation, head.epoch), "an end without its part".to_owned(), true);
            return;
        };
        let tail = tail_from(body).filter(|tail| {
            good && tail.chunks as usize == part.chunks.len()
                && tail.payload_bytes == part.payload_bytes
                && tail.digest == part.digest.halves()
        });
        match (part.fault, tail) {
            (None, Some(tail)) => {
                let whole = Part { head: part.head, tail, segment: self.number, chunks: part.chunks };
                (self.visit)(&whole, &part.payloads);
                self.recovered.parts.push(whole);
            }
            (fault, _) => {
                let what = fault.unwrap_or_else(|| "the part's end does not match its chunks".to_owned());
                self.spoil(part.start, (part.head.generation, part.head.epoch), what, true);
            }
        }
    }

    /// Notes damage; the first of several in a row stands for all.
    fn spoil(&mut self, offset: u64, (generation, epoch): (u64, u64), what: String, ended: bool) {
        if let Some((_, seen)) = &mut self.spoilt {
            *seen |= ended;
            return;
        }
        self.spoilt = Some((Damage { segment: self.number, offset, generation, epoch, what }, ended));
    }

    /// What is spoilt is damage for certain: something later is behind it.
    fn condemn(&mut self) {
        if let Some((damage, _)) = self.spoilt.take() {
            self.recovered.damage.push(damage);
        }
    }

    fn finish(mut self, newest: bool, broken: bool) -> Result<(), JournalError> {
        let end = self.part.as_ref().map_or(self.at, |part| part.start);
        if broken || self.part.is_some() {
            let of = if self.part.is_some() { self.last } else { (0, 0) };
            self.spoil(end, of, format!("the chain of records breaks at offset {}", self.at), false);
        }
        let damaged_before = self.recovered.damage.iter().any(|damage| damage.segment == self.number);
        if !newest || (broken && self.later_part_behind()?) {
            self.condemn();
            return Ok(());
        }
        match self.spoilt.take() {
            None if damaged_before => {}
            None => self.recovered.appendable = Some((self.number, self.length)),
            Some((damage, ended)) => {
                let Damage { segment, offset, generation, epoch, .. } = damage;
                let bytes = self.length.saturating_sub(offset);
                self.recovered.torn = Some(Torn { segment, offset, bytes, generation, epoch, ended });
                if !damaged_before && offset > SEGMENT_HEAD_BYTES as u64 {
                    self.recovered.appendable = Some((segment, offset));
                }
            }
        }
        Ok(())
    }

    /// Whether behind a break there is what looks like the beginning of a later part. A read that fails is no answer: taken for
    /// "no", it would have what was acknowledged cut off as a torn end.
    fn later_part_behind(&self) -> Result<bool, JournalError> {
        let begins = |head: &RecordHead| head.kind == TYPE_PART_BEGIN;
        Ok(find_head(self.file, self.path, self.number, self.at + 1..self.length, begins)?.is_some())
    }
}

impl Following {
    fn owns(&self, head: &RecordHead) -> bool {
        let PartHead { generation, epoch, part, .. } = self.head;
        (generation, epoch, part) == (head.generation, head.epoch, head.part)
    }
}
