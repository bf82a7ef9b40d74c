//! The writing end of the journal.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::disk::{Disk, File, Mode, write_all};
use crate::record::*;
use crate::scan::{self, Recovered};
use crate::{BODY_BYTES_MAX, JournalError, SEGMENT_BYTES};

/// Bytes of a part gathered before they are written: few large writes, and bounded memory.
const GATHER_BYTES: u64 = 4 << 20;
/// Bytes copied at once when a part is written again at open.
const COPY_BYTES: usize = 1 << 20;

/// A journal open for appending. One part at a time; each durable when [`Journal::end`] returns.
///
/// A part that fails for lack of space, or is given up, is cut off again; the parts before it stay. When cutting off or a
/// sync fails, the journal is poisoned: every further call fails until it is opened again.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    domain: [u8; 16],
    segment_bytes: u64,
    segment: Option<Segment>,
    next: u64,
    open: Option<OpenPart>,
    poisoned: Option<String>,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    path: PathBuf,
    file: Box<dyn File>,
    /// End of the last durable part.
    end: u64,
}

#[derive(Debug)]
struct OpenPart {
    head: PartHead,
    chunks: Vec<ChunkAt>,
    /// Where the next record goes, counting what is gathered.
    end: u64,
    /// Up to where the file was written, or tried to be.
    written: u64,
    gathered: Vec<Bytes>,
}

/// The path of segment `number` in journal directory `dir`.
pub fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:08}.seg"))
}

/// The number in a segment's file name.
pub(crate) fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    if digits.len() < 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// Removes the segments below `first`. Some may be left after a crash; opening with the same `first` removes them.
pub fn remove_segments_before(disk: &dyn Disk, dir: &Path, first: u64) -> Result<(), JournalError> {
    for name in disk.list(dir).map_err(JournalError::io("list", dir))? {
        if segment_number(&name).is_some_and(|number| number < first) {
            let path = dir.join(name);
            disk.remove_file(&path).map_err(JournalError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Reads a chunk's payload back and checks it.
pub fn read_chunk(disk: &dyn Disk, dir: &Path, segment: u64, chunk: &ChunkAt) -> Result<Bytes, JournalError> {
    let path = segment_path(dir, segment);
    let file = disk.open(&path, Mode::Read).map_err(JournalError::io("open", &path))?;
    let mut bytes = vec![0; chunk.length.min(BODY_BYTES_MAX) as usize];
    let got = file.read_at(&mut bytes, chunk.offset).map_err(JournalError::io("read", &path))?;
    if got != chunk.length as usize || vmdr_codec::chunk_hash(&bytes) != chunk.xxh3 {
        let what = format!("the chunk at offset {} was whole before and is not now", chunk.offset);
        return Err(JournalError::Damaged { path, what });
    }
    Ok(bytes.into())
}

impl Journal {
    /// Opens, or makes, the journal of `domain` in `dir`, removing segments below `first`. What a crash has torn is cut off.
    ///
    /// `visit` gets each whole part with its payloads, in order, before this returns.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        domain: [u8; 16],
        first: u64,
        visit: &mut dyn FnMut(&Part, &[Bytes]),
    ) -> Result<(Self, Recovered), JournalError> {
        disk.create_dir_all(dir).map_err(JournalError::io("create", dir))?;
        if let Some(parent) = dir.parent() {
            disk.sync_dir(parent).map_err(JournalError::io("sync", parent))?;
        }
        remove_segments_before(&*disk, dir, first)?;
        let mut recovered = scan::scan(&*disk, dir, &domain, visit)?;
        if let Some(torn) = &recovered.torn {
            tracing::warn!(
                segment = torn.segment,
                offset = torn.offset,
                bytes = torn.bytes,
                generation = torn.generation,
                epoch = torn.epoch,
                ended = torn.ended,
                "cutting off the end of the journal, which is not a whole part"
            );
            let removed = scan::cut(&*disk, dir, torn)?;
            if removed && recovered.newest == torn.segment {
                // Its number is used again: numbers without a gap are how a missing segment is noticed.
                recovered.newest -= 1;
            }
        }
        let mut journal = Self {
            disk,
            dir: dir.to_owned(),
            domain,
            segment_bytes: SEGMENT_BYTES,
            segment: None,
            next: recovered.newest.max(first.saturating_sub(1)) + 1,
            open: None,
            poisoned: None,
        };
        journal.settle(&recovered)?;
        Ok((journal, recovered))
    }

    /// Changes the length from which on a segment gets no further part.
    pub fn set_segment_bytes(&mut self, bytes: u64) {
        self.segment_bytes = bytes;
    }

    /// Writes the newest part again, if it is in the newest segment, and goes on behind it.
    ///
    /// A process that died after a failed sync may have left a part that is in the page cache but will never be on the
    /// disk; another sync alone would report success. Writing makes it dirty again.
    fn settle(&mut self, recovered: &Recovered) -> Result<(), JournalError> {
        let Some((number, end)) = recovered.appendable else { return Ok(()) };
        let path = segment_path(&self.dir, number);
        let file = self.disk.open(&path, Mode::Write).map_err(JournalError::io("open", &path))?;
        let start = match recovered.parts.last() {
            Some(part) if part.segment == number => {
                // The records of a part are contiguous: the first chunk or end record tells where it begins.
                let begin = (RECORD_HEAD_BYTES + part_begin(part.head.kind).len()) as u64;
                let ends = RECORD_HEAD_BYTES as u64;
                match part.chunks.first() {
                    Some(chunk) => chunk.offset - ends - begin,
                    None => end - ends - part_end(&part.tail).len() as u64 - begin,
                }
            }
            _ => 0,
        };
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = start;
        while at < end {
            let now = (end - at).min(buffer.len() as u64) as usize;
            let got = file.read_at(&mut buffer[..now], at).map_err(JournalError::io("read", &path))?;
            if got != now {
                let what = format!("it ended at {} while being read", at + got as u64);
                return Err(JournalError::Damaged { path, what });
            }
            write_all(&*file, &buffer[..now], at).map_err(JournalError::io("write", &path))?;
            at += now as u64;
        }
        file.sync().map_err(JournalError::io("sync", &path))?;
        self.disk.sync_dir(&self.dir).map_err(JournalError::io("sync", &self.dir))?;
        self.segment = Some(Segment { number, path, file, end });
        Ok(())
    }

    /// The segment that the next part goes into, unless it starts a new one.
    pub fn segment(&self) -> u64 {
        self.segment.as_ref().map_or(self.next, |segment| segment.number)
    }

    /// Makes the next part start a new segment, whose number this returns.
    pub fn roll(&mut self) -> Result<u64, JournalError> {
        self.abort()?;
        self.segment = None;
        Ok(self.next)
    }

    /// Moves all segments there are out of the way, for later inspection; the next part starts a new one.
    pub fn quarantine(&mut self) -> Result<u64, JournalError> {
        self.roll()?;
        for name in self.disk.list(&self.dir).map_err(JournalError::io("list", &self.dir))? {
            if segment_number(&name).is_some() {
                let (from, to) = (self.dir.join(&name), self.dir.join(format!("{name}.damaged")));
                self.disk.rename(&from, &to).map_err(JournalError::io("move aside", &from))?;
            }
        }
        self.disk.sync_dir(&self.dir).map_err(JournalError::io("sync", &self.dir))?;
        Ok(self.next)
    }

    /// Begins a part. One that was begun and not ended is given up.
    pub fn begin(&mut self, head: PartHead) -> Result<(), JournalError> {
        self.abort()?;
        let full = self.segment.as_ref().is_some_and(|segment| segment.end >= self.segment_bytes);
        if full || self.segment.is_none() {
            self.start_segment()?;
        }
        let Some(segment) = &self.segment else { return Ok(()) };
        let end = segment.end;
        let mut open = OpenPart { head, chunks: Vec::new(), end, written: end, gathered: Vec::new() };
        let body = part_begin(head.kind);
        open.put(segment.number, TYPE_PART_BEGIN, 0, Bytes::copy_from_slice(&body), vmdr_codec::chunk_hash(&body));
        self.open = Some(open);
        Ok(())
    }

    /// Adds the next chunk to the part; `xxh3` is that of the payload, and was checked by the caller.
    pub fn chunk(&mut self, payload: Bytes, xxh3: u64) -> Result<(), JournalError> {
        self.usable()?;
        let (Some(open), Some(segment)) = (&mut self.open, &self.segment) else { return Err(self.misused()) };
        let sequence = open.chunks.len() as u32;
        let (offset, length) = (open.end + RECORD_HEAD_BYTES as u64, payload.len() as u32);
        open.put(segment.number, TYPE_CHUNK, sequence, payload, xxh3);
        open.chunks.push(ChunkAt { offset, length, xxh3 });
        if open.end - open.written >= GATHER_BYTES {
            self.write()?;
        }
        Ok(())
    }

    /// Ends the part: it is durable when this returns.
    pub fn end(&mut self, tail: PartTail) -> Result<Part, JournalError> {
        self.usable()?;
        let (Some(open), Some(segment)) = (&mut self.open, &self.segment) else { return Err(self.misused()) };
        let body = part_end(&tail);
        open.put(segment.number, TYPE_PART_END, 0, Bytes::copy_from_slice(&body), vmdr_codec::chunk_hash(&body));
        self.write()?;
        let (Some(open), Some(segment)) = (self.open.take(), &mut self.segment) else { return Err(self.misused()) };
        if let Err(source) = segment.file.sync() {
            let error = JournalError::Io { action: "sync", path: segment.path.clone(), source };
            self.poisoned = Some(error.to_string());
            return Err(error);
        }
        segment.end = open.end;
        Ok(Part { head: open.head, tail, segment: segment.number, chunks: open.chunks })
    }

    /// Gives up the part that was begun, if any: it is cut off.
    pub fn abort(&mut self) -> Result<(), JournalError> {
        self.usable()?;
        let (Some(open), Some(segment)) = (self.open.take(), &self.segment) else { return Ok(()) };
        if open.written > segment.end
            && let Err(source) = segment.file.set_length(segment.end)
        {
            let error = JournalError::Io { action: "cut", path: segment.path.clone(), source };
            self.poisoned = Some(error.to_string());
            return Err(error);
        }
        Ok(())
    }

    /// Whether the journal must be opened again before it can be used.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.is_some()
    }

    fn usable(&self) -> Result<(), JournalError> {
        match &self.poisoned {
            Some(why) => Err(JournalError::Poisoned { path: self.dir.clone(), why: why.clone() }),
            None => Ok(()),
        }
    }

    fn misused(&self) -> JournalError {
        let why = "a part was continued that had not been begun".to_owned();
        JournalError::Poisoned { path: self.dir.clone(), why }
    }

    /// Writes what is gathered. If that fails, the part is given up.
    fn write(&mut self) -> Result<(), JournalError> {
        let (Some(open), Some(segment)) = (&mut self.open, &self.segment) else { return Err(self.misused()) };
        let at = open.written;
        open.written = open.end;
        let mut slices: Vec<IoSlice<'_>> = open.gathered.iter().map(|bytes| IoSlice::new(bytes)).collect();
        let result = segment.file.write_at(&mut slices, at);
        open.gathered.clear();
        if let Err(source) = result {
            let error = JournalError::Io { action: "append to", path: segment.path.clone(), source };
            self.abort()?;
            return Err(error);
        }
        Ok(())
    }

    fn start_segment(&mut self) -> Result<(), JournalError> {
        self.segment = None;
        let number = self.next;
        let path = segment_path(&self.dir, number);
        let result = (|| {
            let file = self.disk.open(&path, Mode::Create).map_err(JournalError::io("create", &path))?;
            let head = segment_head(&self.domain, number);
            write_all(&*file, &head, 0).map_err(JournalError::io("write", &path))?;
            file.sync().map_err(JournalError::io("sync", &path))?;
            self.disk.sync_dir(&self.dir).map_err(JournalError::io("sync", &self.dir))?;
            Ok(file)
        })();
        match result {
            Ok(file) => {
                self.next += 1;
                self.segment = Some(Segment { number, path, file, end: SEGMENT_HEAD_BYTES as u64 });
                Ok(())
            }
            Err(error) => {
                // No part is in it: as good as never made, and a file that cannot be removed is emptied at the next try.
                let _ = self.disk.remove_file(&path);
                Err(error)
            }
        }
    }
}

impl OpenPart {
    fn put(&mut self, segment: u64, kind: u16, sequence: u32, body: Bytes, xxh3: u64) {
        let head = RecordHead::of(kind, &self.head, sequence, body.len() as u32, xxh3);
        self.gathered.push(Bytes::copy_from_slice(&head.to_bytes(segment, self.end)));
        self.end += (RECORD_HEAD_BYTES + body.len()) as u64;
        self.gathered.push(body);
    }
}
