//! One sealed file.
//!
//! A file is groups of 64 blocks, one after another. A group has two sides, each a page of 64 entries and then 64 slots of 4 KiB:
//! ```text
//! entries of side 0 | 64 slots | entries of side 1 | 64 slots
//! ```
//! An entry (64 bytes) is salt, tag, number (u64), length (u32), zeroes. One that is all zero: there is no such version.
//! Of an image the second side is a hole, but where blocks were written in part.

use std::collections::{HashMap, HashSet};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmdr_journal::{File, Mode, write_all};
use vmdr_keys::{BlockKey, SALT_BYTES, TAG_BYTES, fill_random};

/// Bytes of a block, and of a page of entries.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of an entry.
const ENTRY: usize = 64;
/// Blocks of a group.
const GROUP_BLOCKS: u64 = (BLOCK / ENTRY) as u64;
/// Bytes of a side of a group.
const SIDE_BYTES: u64 = (GROUP_BLOCKS + 1) * BLOCK as u64;
/// Bytes of a group.
pub(crate) const GROUP_BYTES: u64 = 2 * SIDE_BYTES;
/// Sides of a block.
const SIDES: u64 = 2;
/// How often a block that does not open is read: it may just be being written.
const TRIES: u32 = 3;
/// No length is known.
const UNKNOWN: u64 = u64::MAX;
/// EBADMSG: what is said of a block that does not open.
const BAD_MESSAGE: i32 = 74;
/// EIO.
const FAILED: i32 = 5;

/// What a file is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An image: whole blocks are written in place.
    Image,
    /// Anything else.
    Other,
}

impl Kind {
    pub fn of(path: &Path) -> Self {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.ends_with(".img") || name.ends_with(".raw") { Kind::Image } else { Kind::Other }
    }

    fn byte(self) -> u8 {
        match self {
            Kind::Image => 0,
            Kind::Other => 1,
        }
    }
}

/// Says which version of a block there is on a side.
#[derive(Debug, Clone, Copy)]
struct Entry {
    salt: [u8; SALT_BYTES],
    tag: [u8; TAG_BYTES],
    number: u64,
    length: u32,
}

impl Entry {
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.iter().all(|byte| *byte == 0) {
            return None;
        }
        let (mut salt, mut tag, mut number, mut length) = ([0; SALT_BYTES], [0; TAG_BYTES], [0; 8], [0; 4]);
        salt.copy_from_slice(&bytes[..16]);
        tag.copy_from_slice(&bytes[16..32]);
        number.copy_from_slice(&bytes[32..40]);
        length.copy_from_slice(&bytes[40..44]);
        Some(Self { salt, tag, number: u64::from_le_bytes(number), length: u32::from_le_bytes(length) })
    }

    fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..16].copy_from_slice(&self.salt);
        bytes[16..32].copy_from_slice(&self.tag);
        bytes[32..40].copy_from_slice(&self.number.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }
}

/// What there is of a block.
#[derive(Debug, Clone, Copy, Default)]
struct Now {
    /// The side of the version that counts.
    side: Option<u64>,
    /// The highest number of a version, whether or not it opens.
    number: u64,
    /// Bytes of the block that are within the file, if this is its last.
    length: u32,
    /// There is something, and nothing of it opens.
    bad: bool,
}

#[derive(Debug)]
pub(crate) struct SealedFile {
    inner: Box<dyn File>,
    key: BlockKey,
    kind: Kind,
    /// The file's length as far as it is known.
    length: AtomicU64,
    writer: Mutex<Writer>,
}

#[derive(Debug)]
struct Writer {
    /// Blocks that were written since the last sync, and on which side.
    dirty: HashMap<u64, u64>,
    /// Blocks of which the version that counts is durable for certain; `None`: all that are not dirty, because nobody else has
    /// ever written this file.
    settled: Option<HashSet<u64>>,
    /// A sync of our own has failed: what was written before it may be lost, and another sync would not say so.
    failed: bool,
}

impl Writer {
    fn check(&self) -> io::Result<()> {
        // EIO, so that nobody takes it for a want of space, after which one goes on.
        if self.failed { Err(io::Error::from_raw_os_error(FAILED)) } else { Ok(()) }
    }

    fn sync(&mut self, inner: &dyn File) -> io::Result<()> {
        self.failed = inner.sync().is_err();
        self.check()
    }
}

fn entry_at(block: u64, side: u64) -> u64 {
    block / GROUP_BLOCKS * GROUP_BYTES + side * SIDE_BYTES + block % GROUP_BLOCKS * ENTRY as u64
}

fn slot_at(block: u64, side: u64) -> u64 {
    let group = block / GROUP_BLOCKS * GROUP_BYTES + side * SIDE_BYTES;
    group + BLOCK as u64 * (1 + block % GROUP_BLOCKS)
}

/// Splits neighbouring blocks where a group ends.
fn by_group(blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = blocks.start;
    std::iter::from_fn(move || {
        let end = ((at / GROUP_BLOCKS + 1) * GROUP_BLOCKS).min(blocks.end);
        let range = at..end;
        at = end.max(at);
        (!range.is_empty()).then_some(range)
    })
}

fn no_key(error: vmdr_keys::KeyError) -> io::Error {
    io::Error::other(error)
}

fn is_unreadable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(5 | 61 | 74 | 84 | 117))
}

impl SealedFile {
    pub fn new(inner: Box<dyn File>, key: BlockKey, kind: Kind, mode: Mode) -> Self {
        let settled = (mode != Mode::Create).then(HashSet::new);
        let length = if mode == Mode::Create { 0 } else { UNKNOWN };
        let writer = Mutex::new(Writer { dirty: HashMap::new(), settled, failed: false });
        Self { inner, key, kind, length: AtomicU64::new(length), writer }
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn about(&self, block: u64, entry: (u64, u32)) -> [u8; 21] {
        let mut about = [0; 21];
        about[0] = self.kind.byte();
        about[1..9].copy_from_slice(&block.to_le_bytes());
        about[9..17].copy_from_slice(&entry.0.to_le_bytes());
        about[17..21].copy_from_slice(&entry.1.to_le_bytes());
        about
    }

    /// Reads what there is; what lies behind the end is zero.
    fn read_inner(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let got = self.inner.read_at(buffer, at)?;
        buffer[got..].fill(0);
        Ok(())
    }

    /// The entries of blocks of one group, for both sides.
    fn entries(&self, blocks: &Range<u64>) -> io::Result<Vec<[Option<Entry>; SIDES as usize]>> {
        let count = (blocks.end - blocks.start) as usize;
        let mut found = vec![[None; SIDES as usize]; count];
        let mut bytes = vec![0; count * ENTRY];
        for side in 0..SIDES {
            self.read_inner(&mut bytes, entry_at(blocks.start, side))?;
            for (of, bytes) in found.iter_mut().zip(bytes.as_chunks::<ENTRY>().0) {
                of[side as usize] = Entry::from_bytes(bytes);
            }
        }
        Ok(found)
    }

    /// Opens a version of a block; `slot` is what was read of its slot, and then its content.
    fn open(&self, block: u64, entry: &Entry, slot: &mut [u8]) -> bool {
        let Ok(length) = usize::try_from(entry.length) else { return false };
        let about = self.about(block, (entry.number, entry.length));
        let good = (1..=BLOCK).contains(&length) && self.key.open(&entry.salt, entry.tag, &about, slot).is_ok();
        if good {
            slot[length..].fill(0);
        }
        good
    }

    /// Reads blocks of one group. What there is not, or does not open, is zero.
    fn load(&self, blocks: Range<u64>, into: &mut [u8]) -> io::Result<Vec<Now>> {
        let entries = self.entries(&blocks)?;
        if entries.iter().any(|sides| sides[0].is_some()) {
            self.read_inner(into, slot_at(blocks.start, 0))?;
        }
        let mut found = Vec::with_capacity(entries.len());
        for (i, (sides, content)) in entries.into_iter().zip(into.as_chunks_mut::<BLOCK>().0).enumerate() {
            let block = blocks.start + i as u64;
            let mut now = self.choose(block, &sides, content)?;
            for _ in 1..TRIES {
                if !now.bad {
                    break;
                }
                std::thread::yield_now();
                now = self.load_again(block, content)?;
            }
            if now.side.is_none() {
                content.fill(0);
            }
            found.push(now);
        }
        Ok(found)
    }

    fn load_again(&self, block: u64, content: &mut [u8; BLOCK]) -> io::Result<Now> {
        let sides = self.entries(&(block..block + 1))?[0];
        self.read_inner(content, slot_at(block, 0))?;
        self.choose(block, &sides, content)
    }

    /// The version of a block that counts; `content` has what is in the slot of side 0.
    fn choose(
        &self,
        block: u64,
        sides: &[Option<Entry>; SIDES as usize],
        content: &mut [u8; BLOCK],
    ) -> io::Result<Now> {
        let mut now = Now::default();
        let mut order = [0, 1];
        let number = |side: usize| sides[side].map(|entry| entry.number);
        if number(1) > number(0) {
            order = [1, 0];
        }
        now.number = number(0).max(number(1)).unwrap_or(0);
        let mut other = [0; BLOCK];
        for side in order {
            let Some(entry) = &sides[side] else { continue };
            let opened = if side == 0 {
                // Opening spoils what does not open.
                other.copy_from_slice(content);
                self.open(block, entry, &mut other)
            } else {
                self.read_inner(&mut other, slot_at(block, 1))?;
                self.open(block, entry, &mut other)
            };
            if opened {
                content.copy_from_slice(&other);
                return Ok(Now { side: Some(side as u64), length: entry.length, ..now });
            }
            now.bad = true;
        }
        Ok(now)
    }

    /// The last block that there is anything of.
    fn last_block(&self) -> io::Result<Option<u64>> {
        let groups = self.inner.length()?.div_ceil(GROUP_BYTES);
        for group in (0..groups).rev() {
            let first = group * GROUP_BLOCKS;
            let entries = self.entries(&(first..first + GROUP_BLOCKS))?;
            if let Some(last) = entries.iter().rposition(|sides| sides.iter().any(Option::is_some)) {
                return Ok(Some(first + last as u64));
            }
        }
        Ok(None)
    }

    /// The file's length, as it is now.
    fn look(&self) -> io::Result<u64> {
        let Some(last) = self.last_block()? else { return Ok(0) };
        let mut content = [0; BLOCK];
        let now = self.load(last..last + 1, &mut content)?[0];
        let within = if now.side.is_some() { u64::from(now.length) } else { BLOCK as u64 };
        Ok(last * BLOCK as u64 + within)
    }

    fn known_length(&self) -> io::Result<u64> {
        match self.length.load(Ordering::Acquire) {
            UNKNOWN => {
                let length = self.look()?;
                self.length.store(length, Ordering::Release);
                Ok(length)
            }
            known => Ok(known),
        }
    }

    /// The length for a read up to `end`: another handle may have made the file longer.
    fn length_to(&self, end: u64) -> io::Result<u64> {
        let known = self.known_length()?;
        if end <= known || self.writer().settled.is_none() {
            return Ok(known);
        }
        let length = self.look()?;
        self.length.store(length, Ordering::Release);
        Ok(length)
    }

    /// Makes versions that count durable, before the other side of these blocks is written: whoever wrote them may have failed to.
    fn settle(&self, writer: &mut Writer, blocks: &[(u64, u64)]) -> io::Result<()> {
        let mut slot = vec![0; BLOCK];
        let mut entry = [0; ENTRY];
        for (block, side) in blocks {
            self.read_inner(&mut slot, slot_at(*block, *side))?;
            self.read_inner(&mut entry, entry_at(*block, *side))?;
            write_all(&*self.inner, &slot, slot_at(*block, *side))?;
            write_all(&*self.inner, &entry, entry_at(*block, *side))?;
        }
        writer.sync(&*self.inner)?;
        if let Some(settled) = &mut writer.settled {
            settled.extend(blocks.iter().map(|(block, _)| *block));
        }
        Ok(())
    }

    /// Writes bytes; the file has `length` before, and `length_after` then.
    fn put(&self, bytes: &[u8], offset: u64, length: u64, length_after: u64) -> io::Result<()> {
        let mut writer = self.writer();
        writer.check()?;
        let end = offset + bytes.len() as u64;
        let block_bytes = BLOCK as u64;
        for blocks in by_group(offset / block_bytes..end.div_ceil(block_bytes)) {
            self.put_group(&mut writer, blocks, bytes, offset, length, length_after)?;
        }
        Ok(())
    }

    fn put_group(
        &self,
        writer: &mut Writer,
        blocks: Range<u64>,
        bytes: &[u8],
        offset: u64,
        length: u64,
        length_after: u64,
    ) -> io::Result<()> {
        let block_bytes = BLOCK as u64;
        let end = offset + bytes.len() as u64;
        let count = (blocks.end - blocks.start) as usize;
        let mut content = vec![0; count * BLOCK];
        let entries = self.entries(&blocks)?;
        let mut targets = Vec::with_capacity(count);
        let (mut to_settle, mut holes) = (Vec::new(), Vec::new());
        for (i, (sides, content)) in entries.iter().zip(content.as_chunks_mut::<BLOCK>().0).enumerate() {
            let block = blocks.start + i as u64;
            let start = block * block_bytes;
            let (from, to) = (offset.max(start), end.min(start + block_bytes));
            // What of the block was in the file before.
            let within = length.saturating_sub(start).min(block_bytes);
            let whole = from == start && to - start >= within.min(length_after - start);
            let number = sides.iter().flatten().map(|entry| entry.number).max().unwrap_or(0);
            let there = sides.iter().any(Option::is_some);
            let newest = u64::from(sides[1].map(|entry| entry.number) > sides[0].map(|entry| entry.number));
            let dirty = writer.dirty.get(&block).copied();
            let target = if !there {
                dirty.unwrap_or(0)
            } else if whole && (dirty.is_some() || self.kind == Kind::Image) {
                dirty.unwrap_or(newest)
            } else {
                let now = match self.load(block..block + 1, content) {
                    Err(error) if is_unreadable(&error) && whole => Now { bad: true, ..Now::default() },
                    other => other?[0],
                };
                match (dirty, now.side) {
                    (Some(side), _) => side,
                    (None, None) => newest,
                    (None, Some(side)) => {
                        if writer.settled.as_ref().is_some_and(|settled| !settled.contains(&block)) {
                            to_settle.push((block, side));
                        }
                        1 - side
                    }
                }
            };
            if whole {
                content.fill(0);
            } else if !there && within > 0 && self.kind == Kind::Image {
                holes.push((block, within as u32));
            }
            content[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&bytes[(from - offset) as usize..(to - offset) as usize]);
            let inside = (length_after - start).min(block_bytes);
            content[inside as usize..].fill(0);
            targets.push((target, number + 1, inside as u32, self.kind != Kind::Image || !whole));
        }
        if !to_settle.is_empty() {
            self.settle(writer, &to_settle)?;
        }
        if !holes.is_empty() {
            self.fill_holes(writer, &holes)?;
            for (block, _) in holes {
                let target = &mut targets[(block - blocks.start) as usize];
                (target.0, target.1) = (1, target.1 + 1);
            }
        }
        self.write_sealed(writer, &blocks, &mut content, &targets)
    }

    /// Makes zero versions of blocks that were holes and are going to be written in part: a hole is no version to go back to, and
    /// of an image what does not open is damage.
    fn fill_holes(&self, writer: &mut Writer, holes: &[(u64, u32)]) -> io::Result<()> {
        for (block, within) in holes {
            self.write_sealed(writer, &(*block..block + 1), &mut [0; BLOCK], &[(0, 1, *within, false)])?;
        }
        writer.sync(&*self.inner)?;
        if let Some(settled) = &mut writer.settled {
            settled.extend(holes.iter().map(|(block, _)| *block));
        }
        Ok(())
    }

    fn write_sealed(
        &self,
        writer: &mut Writer,
        blocks: &Range<u64>,
        content: &mut [u8],
        targets: &[(u64, u64, u32, bool)],
    ) -> io::Result<()> {
        let mut salts = vec![0; targets.len() * SALT_BYTES];
        fill_random(&mut salts).map_err(no_key)?;
        let mut entries = Vec::with_capacity(targets.len() * ENTRY);
        let each = content.as_chunks_mut::<BLOCK>().0.iter_mut().zip(salts.as_chunks::<SALT_BYTES>().0);
        for (i, ((content, salt), (target, number, inside, shadow))) in each.zip(targets).enumerate() {
            let block = blocks.start + i as u64;
            let about = self.about(block, (*number, *inside));
            let tag = self.key.seal(salt, &about, content).map_err(no_key)?;
            entries.extend_from_slice(&Entry { salt: *salt, tag, number: *number, length: *inside }.to_bytes());
            if *shadow {
                writer.dirty.insert(block, *target);
            }
        }
        let mut first = 0;
        while first < targets.len() {
            let side = targets[first].0;
            let run = targets[first..].iter().take_while(|target| target.0 == side).count();
            let block = blocks.start + first as u64;
            write_all(&*self.inner, &content[first * BLOCK..(first + run) * BLOCK], slot_at(block, side))?;
            write_all(&*self.inner, &entries[first * ENTRY..(first + run) * ENTRY], entry_at(block, side))?;
            first += run;
        }
        Ok(())
    }

    /// Writes bytes, and knows the length after it, also if it fails.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let length = self.known_length()?;
        let after = length.max(offset + bytes.len() as u64);
        let result = self.put(bytes, offset, length, after);
        self.length.store(if result.is_ok() { after } else { UNKNOWN }, Ordering::Release);
        result
    }

    /// Makes whole blocks holes.
    fn clear(&self, blocks: Range<u64>) -> io::Result<()> {
        let stored = self.inner.length()?;
        let zero = |range: Range<u64>| match range.end.min(stored).checked_sub(range.start) {
            None | Some(0) => Ok(()),
            Some(bytes) => self.inner.zero(range.start, bytes),
        };
        let mut writer = self.writer();
        writer.dirty.retain(|block, _| !blocks.contains(block));
        if let Some(settled) = &mut writer.settled {
            settled.retain(|block| !blocks.contains(block));
        }
        let (first, last) = (blocks.start.div_ceil(GROUP_BLOCKS), blocks.end / GROUP_BLOCKS);
        if first < last {
            zero(first * GROUP_BYTES..last * GROUP_BYTES)?;
        }
        let whole = first * GROUP_BLOCKS..last.max(first) * GROUP_BLOCKS;
        for part in by_group(blocks).filter(|part| !(whole.contains(&part.start) && part.end <= whole.end)) {
            let count = part.end - part.start;
            for side in 0..SIDES {
                let (entries, slots) = (entry_at(part.start, side), slot_at(part.start, side));
                zero(entries..entries + count * ENTRY as u64)?;
                zero(slots..slots + count * BLOCK as u64)?;
            }
        }
        Ok(())
    }

    fn shorten(&self, length: u64, to: u64) -> io::Result<()> {
        let block_bytes = BLOCK as u64;
        if to == 0 {
            let mut writer = self.writer();
            self.inner.set_length(0)?;
            writer.dirty.clear();
            return Ok(());
        }
        let last = (to - 1) / block_bytes;
        // First what stays: it is in the clear neither before nor after.
        let mut content = [0; BLOCK];
        let now = self.load(last..last + 1, &mut content)?[0];
        let inside = to - last * block_bytes;
        if now.side.is_none() || u64::from(now.length) != inside {
            let keep = &content[..inside as usize];
            self.put_last(keep, last, length, to)?;
        }
        let group_end = (last / GROUP_BLOCKS + 1) * GROUP_BLOCKS;
        self.clear(last + 1..group_end)?;
        let stored = (last / GROUP_BLOCKS + 1) * GROUP_BYTES;
        if self.inner.length()? > stored {
            self.inner.set_length(stored)?;
        }
        let mut writer = self.writer();
        writer.dirty.retain(|block, _| *block <= last);
        if let Some(settled) = &mut writer.settled {
            settled.retain(|block| *block <= last);
        }
        Ok(())
    }

    /// Writes the last block of a file that becomes shorter: not in place, whatever file it is.
    fn put_last(&self, keep: &[u8], last: u64, length: u64, to: u64) -> io::Result<()> {
        let start = last * BLOCK as u64;
        if self.kind != Kind::Image || keep.len() == 1 {
            return self.put(keep, start, length.max(to), to);
        }
        // All but its first byte: what is written in part goes to the other side.
        self.put(&keep[1..], start + 1, length.max(to), to)
    }
}

impl File for SealedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let length = self.length_to(offset.saturating_add(buffer.len() as u64))?;
        let wanted = length.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..wanted];
        let block_bytes = BLOCK as u64;
        let end = offset + wanted as u64;
        if wanted == 0 {
            return Ok(0);
        }
        let mut room = Vec::new();
        for blocks in by_group(offset / block_bytes..end.div_ceil(block_bytes)) {
            let start = blocks.start * block_bytes;
            let (from, to) = (offset.max(start), end.min(blocks.end * block_bytes));
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            let whole = (blocks.end - blocks.start) as usize * BLOCK;
            let found = if part.len() == whole {
                self.load(blocks, part)?
            } else {
                room.resize(whole, 0);
                let found = self.load(blocks, &mut room)?;
                part.copy_from_slice(&room[(from - start) as usize..(to - start) as usize]);
                found
            };
            if self.kind == Kind::Image && found.iter().any(|now| now.bad && now.side.is_none()) {
                return Err(io::Error::from_raw_os_error(BAD_MESSAGE));
            }
        }
        Ok(wanted)
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        if let [one] = slices {
            return self.write(one, offset);
        }
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        self.write(&bytes, offset)
    }

    fn data_from(&self, offset: u64) -> io::Result<u64> {
        let length = self.length_to(offset.saturating_add(1))?;
        let stored = self.inner.length()?;
        let mut block = offset / BLOCK as u64;
        while block * (BLOCK as u64) < length {
            let group = block / GROUP_BLOCKS;
            let data = self.inner.data_from(group * GROUP_BYTES)?;
            if data >= stored {
                break;
            }
            let found = data / GROUP_BYTES;
            if found > group {
                block = found * GROUP_BLOCKS;
            }
            let end = (found + 1) * GROUP_BLOCKS;
            let entries = self.entries(&(block..end))?;
            match entries.iter().position(|sides| sides.iter().any(Option::is_some)) {
                Some(at) => return Ok(offset.max((block + at as u64) * BLOCK as u64)),
                None => block = end,
            }
        }
        Ok(length.max(offset))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let all = self.known_length()?;
        let end = offset.saturating_add(length).min(all);
        let block_bytes = BLOCK as u64;
        if offset >= end {
            return Ok(());
        }
        // The last block tells how long the file is, so it stays.
        let last = (all - 1) / block_bytes;
        let (first, behind) = (offset.div_ceil(block_bytes), (end / block_bytes).min(last));
        let zeroes = [0; BLOCK];
        if first >= behind {
            let mut at = offset;
            while at < end {
                let now = (block_bytes - at % block_bytes).min(end - at);
                self.write(&zeroes[..now as usize], at)?;
                at += now;
            }
            return Ok(());
        }
        if offset < first * block_bytes {
            self.write(&zeroes[..(first * block_bytes - offset) as usize], offset)?;
        }
        self.clear(first..behind)?;
        let mut at = behind * block_bytes;
        while at < end {
            let now = block_bytes.min(end - at);
            self.write(&zeroes[..now as usize], at)?;
            at += now;
        }
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        self.length_to(UNKNOWN)
    }

    fn set_length(&self, to: u64) -> io::Result<()> {
        let length = self.known_length()?;
        if to > length {
            // The last byte, so that there is a last block.
            return self.write(&[0], to - 1);
        }
        if to == length {
            return Ok(());
        }
        let result = self.shorten(length, to);
        self.length.store(if result.is_ok() { to } else { UNKNOWN }, Ordering::Release);
        result
    }

    fn sync(&self) -> io::Result<()> {
        let mut writer = self.writer();
        writer.check()?;
        self.inner.sync()?;
        let written = std::mem::take(&mut writer.dirty);
        if let Some(settled) = &mut writer.settled {
            settled.extend(written.into_keys());
        }
        Ok(())
    }
}
