//! Looking at segments without changing anything, for people and for tools: every record in them, whether it is whole or not.

use std::path::Path;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::disk::{Disk, Mode};
use crate::history::{TYPE_BEFORE, TYPE_SET_BEGIN, TYPE_SET_END, entries};
use crate::journal::segment_path;
use crate::record::*;
use crate::scan::{self, Recovered};
use crate::{BODY_BYTES_MAX, JournalError, Part};

/// A record as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSeen {
    /// Where its header begins.
    pub offset: u64,
    /// Bytes of its body.
    pub bytes: u32,
    /// What kind of record.
    pub name: &'static str,
    /// Its generation.
    pub generation: u64,
    /// Its epoch; of a set the one that it starts from.
    pub epoch: u64,
    /// The part.
    pub part: u32,
    /// Its number within part or set.
    pub sequence: u32,
    /// What else it says, in words.
    pub says: String,
    /// Why it is not what was written; `None`: it is.
    pub damage: Option<String>,
}

/// A segment as it was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SegmentSeen {
    /// Its length.
    pub bytes: u64,
    /// Why its header is not what was written.
    pub damage: Option<String>,
    /// Records that were followed.
    pub records: u64,
    /// Where no record's header is where one should be.
    pub broken_at: Option<u64>,
}

/// Follows the records of segment `number` in `dir`.
pub fn survey_segment(
    disk: &dyn Disk,
    dir: &Path,
    number: u64,
    domain: &[u8; 16],
    show: &mut dyn FnMut(RecordSeen),
) -> Result<SegmentSeen, JournalError> {
    let path = segment_path(dir, number);
    let file = disk.open(&path, Mode::Read).map_err(JournalError::io("open", &path))?;
    let length = file.length().map_err(JournalError::io("read", &path))?;
    let read = |bytes: usize, at: u64| {
        let mut buffer = vec![0; bytes];
        let got = file.read_at(&mut buffer, at).map_err(JournalError::io("read", &path))?;
        buffer.truncate(got);
        Ok::<_, JournalError>(buffer)
    };
    let mut seen = SegmentSeen { bytes: length, ..SegmentSeen::default() };
    seen.damage = match check_segment_head(&read(SEGMENT_HEAD_BYTES, 0)?, domain, number) {
        SegmentHead::Good => None,
        SegmentHead::Damaged => Some("the segment's header is not valid".to_owned()),
        SegmentHead::Version(found) => Some(format!("the segment is of format version {found}")),
        SegmentHead::WrongDomain(found) => Some(format!("the segment is of domain {}", uuid_text(&found))),
    };
    let mut at = SEGMENT_HEAD_BYTES as u64;
    while at < length {
        let head = read(RECORD_HEAD_BYTES, at)?;
        let head = head.as_slice().try_into().ok().and_then(|bytes| RecordHead::from_bytes(bytes, number, at));
        let body_at = at + RECORD_HEAD_BYTES as u64;
        let fits = |head: &RecordHead| head.length <= BODY_BYTES_MAX && body_at + u64::from(head.length) <= length;
        let Some(head) = head.filter(fits) else {
            seen.broken_at = Some(at);
            break;
        };
        let body = read(head.length as usize, body_at)?;
        let good = body.len() == head.length as usize && xxh3_64(&body) == head.body_xxh3;
        let (name, says, valid) = explain(&head, &body);
        let damage = match (good, valid) {
            (false, _) => Some("its body does not match its checksum".to_owned()),
            (true, false) => Some("its body does not say what such a record says".to_owned()),
            (true, true) => None,
        };
        let RecordHead { generation, epoch, part, sequence, length: bytes, .. } = head;
        show(RecordSeen { offset: at, bytes, name, generation, epoch, part, sequence, says, damage });
        seen.records += 1;
        at = body_at + u64::from(head.length);
    }
    Ok(seen)
}

fn explain(head: &RecordHead, body: &[u8]) -> (&'static str, String, bool) {
    match head.kind {
        TYPE_PART_BEGIN => {
            let kind = kind_from(body);
            ("PartBegin", kind.map_or_else(String::new, |kind| format!("{kind:?}")), kind.is_some())
        }
        TYPE_CHUNK => ("Chunk", String::new(), true),
        TYPE_PART_END => {
            let tail = tail_from(body);
            let says = tail.map_or_else(String::new, |tail| {
                let last = if tail.last { ", the epoch is whole" } else { "" };
                format!("{} chunks with {} bytes{last}", tail.chunks, tail.payload_bytes)
            });
            ("PartEnd", says, tail.is_some())
        }
        TYPE_SET_BEGIN => {
            let from = body.try_into().map(u64::from_le_bytes).ok();
            let says = from.map_or_else(String::new, |from| format!("from epoch {} back to {from}", head.epoch));
            ("SetBegin", says, from.is_some())
        }
        TYPE_BEFORE => {
            let found = entries(body).ok();
            let says = found.as_ref().map_or_else(String::new, |all| {
                let units: u64 = all.iter().map(|(entry, _)| u64::from(entry.count)).sum();
                let flawed = all.iter().filter(|(entry, _)| entry.is_flawed()).count();
                let flawed = if flawed > 0 { format!(", {flawed} of them damaged before") } else { String::new() };
                format!("{units} units{flawed}")
            });
            ("Before", says, found.is_some())
        }
        TYPE_SET_END => {
            let end = crate::history::SetEnd::from_bytes(body);
            let says = end.map_or_else(String::new, |end| format!("back to epoch {}, {} units", end.from, end.units));
            ("SetEnd", says, end.is_some())
        }
        _ => ("unknown", format!("type {}", head.kind), false),
    }
}

/// What recovery would find in the journal in `dir`; nothing is cut off or changed. `visit` as with
/// [`Journal::open`](crate::Journal::open).
pub fn survey_journal(
    disk: &dyn Disk,
    dir: &Path,
    domain: &[u8; 16],
    visit: &mut dyn FnMut(&Part, &[Bytes]),
) -> Result<Recovered, JournalError> {
    scan::scan(disk, dir, domain, visit)
}
