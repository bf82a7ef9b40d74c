//! The writing end of the history.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use vmdr_codec::Digest;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::JournalError;
use crate::disk::{Disk, File, Mode, write_all};
use crate::journal::{segment_number, segment_path};
use crate::record::{RECORD_HEAD_BYTES, RecordHead, SEGMENT_HEAD_BYTES, segment_head};

/// Bytes gathered before they are written: few large writes, and bounded memory.
const GATHER_BYTES: usize = 4 << 20;

/// The history of one standby, open for appending. One set at a time. What was appended is durable after
/// [`HistoryLog::sync`]; after an error everything from the last place that is sure has to be cut off ([`HistoryLog::cut`]).
#[derive(Debug)]
pub struct HistoryLog {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    domain: [u8; 16],
    segment_bytes: u64,
    segment: Option<Segment>,
    next: u64,
    open: Option<OpenSet>,
    /// Records that are not written yet.
    gathered: Vec<Bytes>,
    gathered_bytes: usize,
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    path: PathBuf,
    file: Box<dyn File>,
    /// Where the next record goes, counting what is gathered.
    end: u64,
    written: u64,
}

#[derive(Debug)]
struct OpenSet {
    generation: u64,
    from: u64,
    to: u64,
    offset: u64,
    records: u32,
    units: u64,
    sums: Digest,
    /// The Before record that grows: its entries, their data.
    entries: Vec<u8>,
    count: u32,
    data: Vec<u8>,
    /// The entry before, if it may still grow.
    zero: Option<Entry>,
}

/// The numbers of the segments in `dir`.
pub fn segments(disk: &dyn Disk, dir: &Path) -> Result<Vec<u64>, JournalError> {
    match disk.list(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(JournalError::io("list", dir)(e)),
        Ok(names) => Ok(names.iter().filter_map(|name| segment_number(name)).collect()),
    }
}

impl HistoryLog {
    /// Opens the log in `dir`, making it if need be, and cuts off what is behind `end`.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, domain: [u8; 16], end: Place) -> Result<Self, JournalError> {
        disk.create_dir_all(dir).map_err(JournalError::io("create", dir))?;
        if let Some(parent) = dir.parent() {
            disk.sync_dir(parent).map_err(JournalError::io("sync", parent))?;
        }
        let mut log = Self {
            disk,
            dir: dir.to_owned(),
            domain,
            segment_bytes: HISTORY_SEGMENT_BYTES,
            segment: None,
            next: 1,
            open: None,
            gathered: Vec::new(),
            gathered_bytes: 0,
            scratch: vec![0; lz4_flex::block::get_maximum_output_size(UNIT_BYTES)],
        };
        log.cut(end)?;
        Ok(log)
    }

    /// Changes the length from which on a segment gets no further set.
    pub fn set_segment_bytes(&mut self, bytes: u64) {
        self.segment_bytes = bytes;
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the next record goes. Everything before it is durable only after [`HistoryLog::sync`].
    pub fn place(&self) -> Place {
        match &self.segment {
            Some(segment) => Place { segment: segment.number, offset: segment.end },
            None => Place { segment: self.next - 1, offset: u64::MAX },
        }
    }

    /// Makes the next set start a new segment: what lives for different times is kept apart.
    pub fn roll(&mut self) -> Result<(), JournalError> {
        self.write()?;
        if let Some(segment) = self.segment.take() {
            segment.file.sync().map_err(JournalError::io("sync", &segment.path))?;
        }
        Ok(())
    }

    /// Begins a set. The one before must have ended.
    pub fn begin(&mut self, generation: u64, from: u64, to: u64) -> Result<(), JournalError> {
        if self.open.is_some() {
            return Err(self.misused("a set was begun before the last one had ended"));
        }
        if self.segment.as_ref().is_some_and(|segment| segment.end >= self.segment_bytes) {
            self.roll()?;
        }
        if self.segment.is_none() {
            self.start_segment()?;
        }
        let offset = self.segment.as_ref().map_or(0, |segment| segment.end);
        self.open = Some(OpenSet {
            generation,
            from,
            to,
            offset,
            records: 0,
            units: 0,
            sums: Digest::new(),
            entries: Vec::new(),
            count: 0,
            data: Vec::new(),
            zero: None,
        });
        self.put(TYPE_SET_BEGIN, 0, Bytes::copy_from_slice(&from.to_le_bytes()))
    }

    /// Adds what a unit was; `None`: zero.
    pub fn before(&mut self, key: Key, content: Option<&[u8; UNIT_BYTES]>) -> Result<(), JournalError> {
        match content {
            Some(content) => self.before_with(key, content, xxh3_64(content), false),
            None => self.zeroes(key, 1),
        }
    }

    /// Adds what a unit was, of which the checksum is known; `flawed`: it is not what that checksum is of, and is kept only so
    /// that a batch that is stopped can be undone.
    pub fn before_with(
        &mut self,
        key: Key,
        content: &[u8; UNIT_BYTES],
        xxh3: u64,
        flawed: bool,
    ) -> Result<(), JournalError> {
        let length = lz4_flex::block::compress_into(content, &mut self.scratch).unwrap_or(UNIT_BYTES);
        let (encoding, length) = if length < UNIT_BYTES { (ENCODING_LZ4, length) } else { (ENCODING_RAW, UNIT_BYTES) };
        let entry = Entry { key, count: 1, encoding, length: length as u32, xxh3, flawed };
        let scratch = std::mem::take(&mut self.scratch);
        let stored = if encoding == ENCODING_RAW { &content[..] } else { &scratch[..length] };
        let result = self.copy(&entry, stored);
        self.scratch = scratch;
        result
    }

    /// Adds what neighbouring units were: zero.
    pub fn zeroes(&mut self, key: Key, count: u32) -> Result<(), JournalError> {
        self.copy(&Entry { key, count, encoding: ENCODING_ZERO, length: 0, xxh3: 0, flawed: false }, &[])
    }

    /// Adds an entry as it is stored in another set.
    pub fn copy(&mut self, entry: &Entry, stored: &[u8]) -> Result<(), JournalError> {
        let Some(open) = &mut self.open else { return Err(self.misused("a before-image without a set")) };
        open.units += u64::from(entry.count);
        if entry.is_zero() {
            if let Some(zero) = &mut open.zero
                && zero.key.array == entry.key.array
                && zero.key.unit + u64::from(zero.count) == entry.key.unit
                && let Some(count) = zero.count.checked_add(entry.count)
            {
                zero.count = count;
                return Ok(());
            }
            open.settle();
            open.zero = Some(*entry);
            return if open.entries.len() + open.data.len() >= BEFORE_BYTES { self.close_record() } else { Ok(()) };
        }
        open.settle();
        entry.write(&mut open.entries);
        open.count += 1;
        open.data.extend_from_slice(stored);
        if open.entries.len() + open.data.len() >= BEFORE_BYTES { self.close_record() } else { Ok(()) }
    }

    /// Ends the set.
    pub fn end(&mut self, point: PointTail) -> Result<Set, JournalError> {
        self.close_record()?;
        let Some(open) = &self.open else { return Err(self.misused("the end of a set that was not begun")) };
        let (xxh3, _) = open.sums.halves();
        let end = SetEnd { from: open.from, point, units: open.units, records: open.records, xxh3 };
        let OpenSet { generation, from, to, offset, units, .. } = *open;
        self.put(TYPE_SET_END, 0, end.to_bytes())?;
        self.open = None;
        let place = self.place();
        Ok(Set { generation, from, to, segment: place.segment, offset, end: place.offset, units, point })
    }

    /// Makes everything so far durable, also of a set that has not ended, and says up to where that is.
    pub fn sync(&mut self) -> Result<Place, JournalError> {
        self.close_record()?;
        self.write()?;
        if let Some(segment) = &self.segment {
            segment.file.sync().map_err(JournalError::io("sync", &segment.path))?;
        }
        Ok(self.place())
    }

    /// Cuts off everything behind `end`, and the set that is open.
    pub fn cut(&mut self, end: Place) -> Result<(), JournalError> {
        (self.open, self.segment) = (None, None);
        self.gathered.clear();
        self.gathered_bytes = 0;
        let mut removed = false;
        self.next = end.segment + 1;
        for name in self.disk.list(&self.dir).map_err(JournalError::io("list", &self.dir))? {
            let Some(number) = segment_number(&name) else { continue };
            let path = self.dir.join(&name);
            if number > end.segment {
                self.disk.remove_file(&path).map_err(JournalError::io("remove", &path))?;
                removed = true;
            } else if number == end.segment && end.offset < u64::MAX {
                let file = self.disk.open(&path, Mode::Write).map_err(JournalError::io("open", &path))?;
                let length = file.length().map_err(JournalError::io("read", &path))?;
                if length > end.offset {
                    file.set_length(end.offset).map_err(JournalError::io("cut", &path))?;
                    file.sync().map_err(JournalError::io("sync", &path))?;
                }
                if length >= end.offset {
                    self.segment = Some(Segment { number, path, file, end: end.offset, written: end.offset });
                }
            }
        }
        if removed {
            self.disk.sync_dir(&self.dir).map_err(JournalError::io("sync", &self.dir))?;
        }
        Ok(())
    }

    fn misused(&self, why: &str) -> JournalError {
        JournalError::Poisoned { path: self.dir.clone(), why: why.to_owned() }
    }

    fn close_record(&mut self) -> Result<(), JournalError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.settle();
        if open.count == 0 {
            return Ok(());
        }
        let mut body = Vec::with_capacity(BEFORE_HEAD_BYTES + open.entries.len() + open.data.len());
        body.extend_from_slice(&open.count.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.append(&mut open.entries);
        body.append(&mut open.data);
        open.count = 0;
        let sequence = open.records;
        open.records += 1;
        open.sums.update(&xxh3_64(&body).to_le_bytes());
        self.put(TYPE_BEFORE, sequence, body.into())
    }

    fn put(&mut self, kind: u16, sequence: u32, body: Bytes) -> Result<(), JournalError> {
        let (Some(segment), Some(open)) = (&mut self.segment, &self.open) else {
            return Err(self.misused("a record without a set"));
        };
        let (generation, epoch) = (open.generation, open.to);
        let length = body.len() as u32;
        let head = RecordHead { kind, generation, epoch, part: 0, sequence, length, body_xxh3: xxh3_64(&body) };
        let head = Bytes::copy_from_slice(&head.to_bytes(segment.number, segment.end));
        segment.end += (RECORD_HEAD_BYTES + body.len()) as u64;
        self.gathered_bytes += RECORD_HEAD_BYTES + body.len();
        self.gathered.push(head);
        self.gathered.push(body);
        if self.gathered_bytes >= GATHER_BYTES { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), JournalError> {
        let Some(segment) = &mut self.segment else { return Ok(()) };
        if self.gathered.is_empty() {
            return Ok(());
        }
        let mut slices: Vec<IoSlice<'_>> = self.gathered.iter().map(|bytes| IoSlice::new(bytes)).collect();
        segment.file.write_at(&mut slices, segment.written).map_err(JournalError::io("append to", &segment.path))?;
        segment.written = segment.end;
        self.gathered.clear();
        self.gathered_bytes = 0;
        Ok(())
    }

    fn start_segment(&mut self) -> Result<(), JournalError> {
        let number = self.next;
        let path = segment_path(&self.dir, number);
        let file = self.disk.open(&path, Mode::Create).map_err(JournalError::io("create", &path))?;
        write_all(&*file, &segment_head(&self.domain, number), 0).map_err(JournalError::io("write", &path))?;
        file.sync().map_err(JournalError::io("sync", &path))?;
        self.disk.sync_dir(&self.dir).map_err(JournalError::io("sync", &self.dir))?;
        let end = SEGMENT_HEAD_BYTES as u64;
        self.next = number + 1;
        self.segment = Some(Segment { number, path, file, end, written: end });
        Ok(())
    }
}

impl OpenSet {
    /// The run of zero units cannot grow any more.
    fn settle(&mut self) {
        if let Some(zero) = self.zero.take() {
            zero.write(&mut self.entries);
            self.count += 1;
        }
    }
}
