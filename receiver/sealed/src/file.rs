//! One sealed file. [`super::layout`] has its bytes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vmdr_journal::{File, Mode, write_all};
use vmdr_keys::{BlockKey, SALT_BYTES, fill_random};

use crate::clear::Cleared;
use crate::layout::{BLOCK, ENTRY, Entry, GROUP_BLOCKS, GROUP_BYTES, Kind, SIDES, by_group, entry_at, slot_at};
use crate::parallel;

/// How often a block that does not open is read: it may just be being written.
const TRIES: u32 = 3;
/// No length is known.
const UNKNOWN: u64 = u64::MAX;
/// EBADMSG: what is said of a block that does not open.
const BAD_MESSAGE: i32 = 74;
/// EIO.
const FAILED: i32 = 5;

/// What there is of a block.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Now {
    /// The side of the version that counts.
    pub side: Option<u64>,
    /// The highest number of a version, whether or not it opens.
    number: u64,
    /// Bytes of the block that are within the file, if this is its last; 0: it was cleared, and tells nothing of that.
    pub length: u32,
    /// There is something, and nothing of it opens.
    bad: bool,
}

#[derive(Debug)]
pub(crate) struct SealedFile {
    pub(crate) inner: Box<dyn File>,
    pub(crate) key: BlockKey,
    kind: Kind,
    /// Held for writing while a block and its entry do not belong together: of all files that share it.
    pub(crate) gate: Arc<RwLock<()>>,
    /// The file's length as far as it is known.
    length: AtomicU64,
    writer: Mutex<Writer>,
}

/// A block that is about to be written.
#[derive(Debug, Clone, Copy)]
struct Target {
    side: u64,
    number: u64,
    /// Bytes of it that are within the file.
    inside: u32,
    /// To the side that the last synced version is not on.
    shadow: bool,
    /// It is there already, exactly so.
    unchanged: bool,
    /// It is a hole, and may be one only because what was to make it durable has failed: the other side has to become one, too, or what
    /// lies there on the disk would count.
    alone: bool,
}

/// What becomes of the blocks of one group, and what has to be done before.
#[derive(Debug, Default)]
struct Plan {
    targets: Vec<Target>,
    /// Versions that have to be durable before the other side is written.
    settle: Vec<(u64, u64)>,
    /// Versions that stay as they are, and that another process may not have made durable.
    rewrite: Vec<(u64, u64)>,
    /// Holes that are written in part.
    holes: Vec<u64>,
    /// What was written since the last sync and would be lost if this does not work: the block, its side, length and content.
    before: Vec<(u64, u64, u32, Box<[u8; BLOCK]>)>,
}

#[derive(Debug)]
pub(crate) struct Writer {
    /// Blocks that were written since the last sync, and on which side.
    pub dirty: HashMap<u64, u64>,
    /// Blocks of which the version that counts is durable for certain; `None`: all that are not dirty, because nobody else has
    /// ever written this file.
    pub settled: Option<HashSet<u64>>,
    /// Blocks of which the version that counts was written once more, as it is, since the last sync.
    rewritten: HashSet<u64>,
    /// Blocks that were cleared, and the side that says so: what they had before takes room until the next sync.
    pub cleared: BTreeMap<u64, u64>,
    /// A sync of our own has failed, or something could not be taken back: what was written before may be lost, and another
    /// sync would not say so.
    pub failed: bool,
}

impl Writer {
    pub(crate) fn check(&self) -> io::Result<()> {
        // EIO, so that nobody takes it for a want of space, after which one goes on.
        if self.failed { Err(io::Error::from_raw_os_error(FAILED)) } else { Ok(()) }
    }

    pub(crate) fn is_settled(&self, block: u64) -> bool {
        self.settled.as_ref().is_none_or(|settled| settled.contains(&block))
    }

    pub(crate) fn settle(&mut self, blocks: impl Iterator<Item = u64>) {
        if let Some(settled) = &mut self.settled {
            settled.extend(blocks);
        }
    }

    /// These blocks become holes, or whatever a crash leaves of them.
    pub(crate) fn forget(&mut self, gone: impl Fn(u64) -> bool) {
        self.dirty.retain(|block, _| !gone(*block));
        self.rewritten.retain(|block| !gone(*block));
        self.cleared.retain(|block, _| !gone(*block));
        if let Some(settled) = &mut self.settled {
            settled.retain(|block| !gone(*block));
        }
    }

    /// A sync of which nobody above knows. What is dirty stays so: it is not what has to be there after a crash.
    pub(crate) fn sync(&mut self, inner: &dyn File) -> io::Result<()> {
        self.failed = inner.sync().is_err();
        self.check()?;
        let rewritten = std::mem::take(&mut self.rewritten);
        self.settle(rewritten.into_iter());
        Ok(())
    }

    /// The sync that was asked for.
    fn sync_all(&mut self, inner: &dyn File) -> io::Result<()> {
        self.check()?;
        let synced = inner.sync();
        let (dirty, rewritten) = (std::mem::take(&mut self.dirty), std::mem::take(&mut self.rewritten));
        match &synced {
            Ok(()) => self.settle(dirty.into_keys().chain(rewritten)),
            // What it should have made durable reads as if it were, and may be lost. What was durable before is on the other
            // side, so each block is made sure of before that is written.
            Err(_) => self.settled = Some(HashSet::new()),
        }
        synced
    }
}

pub(crate) fn no_key(error: vmdr_keys::KeyError) -> io::Error {
    io::Error::other(error)
}

fn is_unreadable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(5 | 61 | 74 | 84 | 117))
}

impl SealedFile {
    pub fn new(inner: Box<dyn File>, key: BlockKey, gate: Arc<RwLock<()>>, kind: Kind, mode: Mode) -> Self {
        let settled = (mode != Mode::Create).then(HashSet::new);
        let length = if mode == Mode::Create { 0 } else { UNKNOWN };
        let writer = Writer {
            dirty: HashMap::new(),
            settled,
            rewritten: HashSet::new(),
            cleared: BTreeMap::new(),
            failed: false,
        };
        Self { inner, key, kind, gate, length: AtomicU64::new(length), writer: Mutex::new(writer) }
    }

    pub(crate) fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn about(&self, block: u64, entry: (u64, u32)) -> [u8; 21] {
        let mut about = [0; 21];
        about[0] = self.kind.byte();
        about[1..9].copy_from_slice(&block.to_le_bytes());
        about[9..17].copy_from_slice(&entry.0.to_le_bytes());
        about[17..21].copy_from_slice(&entry.1.to_le_bytes());
        about
    }

    /// Reads what there is; what lies behind the end is zero.
    pub(crate) fn read_inner(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let got = self.inner.read_at(buffer, at)?;
        buffer[got..].fill(0);
        Ok(())
    }

    /// The entries of blocks of one group, for both sides.
    pub(crate) fn entries(&self, blocks: &Range<u64>) -> io::Result<Vec<[Option<Entry>; SIDES as usize]>> {
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
    pub(crate) fn open(&self, block: u64, entry: &Entry, slot: &mut [u8]) -> bool {
        let Ok(length) = usize::try_from(entry.length) else { return false };
        let about = self.about(block, (entry.number, entry.length));
        if length == 0 {
            slot.fill(0);
            return self.key.open(&entry.salt, entry.tag, &about, &mut []).is_ok();
        }
        let good = (1..=BLOCK).contains(&length) && self.key.open(&entry.salt, entry.tag, &about, slot).is_ok();
        if good {
            slot[length..].fill(0);
        }
        good
    }

    /// Reads blocks of one group. What there is not, or does not open, is zero.
    pub(crate) fn load(&self, blocks: Range<u64>, into: &mut [u8]) -> io::Result<Vec<Now>> {
        let _still = self.gate.read().unwrap_or_else(PoisonError::into_inner);
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
            for (i, sides) in entries.iter().enumerate().rev() {
                let block = first + i as u64;
                if self.is_hole(block, sides) {
                    continue;
                }
                // The newest may not open, and what counts then have been cleared.
                if sides.iter().flatten().any(|entry| entry.length == 0) {
                    let now = self.load(block..block + 1, &mut [0; BLOCK])?[0];
                    if now.side.is_some() && now.length == 0 {
                        continue;
                    }
                }
                return Ok(Some(block));
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

    /// Writes versions that count once more, exactly as they are: whoever wrote them may have failed to make them durable, which
    /// another sync alone would not say. A write that a crash tears harms nothing, because it changes nothing.
    fn rewrite(&self, writer: &mut Writer, blocks: &[(u64, u64)]) -> io::Result<()> {
        let mut slot = vec![0; BLOCK];
        let mut entry = [0; ENTRY];
        for (block, side) in blocks {
            self.read_inner(&mut entry, entry_at(*block, *side))?;
            if Entry::from_bytes(&entry).is_some_and(|entry| entry.length > 0) {
                self.read_inner(&mut slot, slot_at(*block, *side))?;
                write_all(&*self.inner, &slot, slot_at(*block, *side))?;
            }
            write_all(&*self.inner, &entry, entry_at(*block, *side))?;
            writer.rewritten.insert(*block);
        }
        Ok(())
    }

    /// All blocks of a group that are there and not known to be durable: they are made sure of at once, with one sync.
    fn unsettled(&self, writer: &Writer, group: u64) -> io::Result<Vec<(u64, u64)>> {
        let first = group * GROUP_BLOCKS;
        let blocks = first..first + GROUP_BLOCKS;
        let mut found = Vec::new();
        let mut content = vec![0; GROUP_BLOCKS as usize * BLOCK];
        for (block, now) in blocks.clone().zip(self.load(blocks, &mut content)?) {
            if let Some(side) = now.side
                && !writer.dirty.contains_key(&block)
                && !writer.is_settled(block)
            {
                found.push((block, side));
            }
        }
        Ok(found)
    }

    /// Writes bytes; the file has `length` before, and `length_after` then. `anew`: what is there is of no use any more; otherwise
    /// these bytes are what is there, and stay if this does not work.
    pub(crate) fn put(
        &self,
        bytes: &[u8],
        offset: u64,
        (length, length_after): (u64, u64),
        anew: bool,
    ) -> io::Result<()> {
        let mut writer = self.writer();
        writer.check()?;
        let end = offset + bytes.len() as u64;
        let block_bytes = BLOCK as u64;
        for blocks in by_group(offset / block_bytes..end.div_ceil(block_bytes)) {
            let mut content = vec![0; (blocks.end - blocks.start) as usize * BLOCK];
            let lengths = (length, length_after);
            let plan = self.plan(&writer, &blocks, &mut content, (bytes, offset), lengths, anew)?;
            self.carry_out(&mut writer, &blocks, &mut content, plan)?;
        }
        Ok(())
    }

    /// What has to be done to write the part of `bytes` that is in these blocks of one group, which become `content`.
    fn plan(
        &self,
        writer: &Writer,
        blocks: &Range<u64>,
        content: &mut [u8],
        (bytes, offset): (&[u8], u64),
        (length, length_after): (u64, u64),
        anew: bool,
    ) -> io::Result<Plan> {
        let block_bytes = BLOCK as u64;
        let end = offset + bytes.len() as u64;
        let entries = self.entries(blocks)?;
        let mut plan = Plan::default();
        for (i, (sides, content)) in entries.iter().zip(content.as_chunks_mut::<BLOCK>().0).enumerate() {
            let block = blocks.start + i as u64;
            let start = block * block_bytes;
            let (from, to) = (offset.max(start), end.min(start + block_bytes));
            // What of the block was in the file before.
            let within = length.saturating_sub(start).min(block_bytes);
            let inside = (length_after - start).min(block_bytes) as u32;
            let whole = from == start && to - start >= within.min(length_after - start);
            let in_place = anew && whole && self.kind == Kind::Image;
            let number = sides.iter().flatten().map(|entry| entry.number).max().unwrap_or(0).saturating_add(1);
            let there = sides.iter().any(Option::is_some);
            let newest = u64::from(sides[1].map(|entry| entry.number) > sides[0].map(|entry| entry.number));
            let dirty = writer.dirty.get(&block).copied();
            let mut now = Now::default();
            let mut old = None;
            let side = if !there {
                dirty.unwrap_or(0)
            } else if anew && whole && (dirty.is_some() || in_place) {
                dirty.unwrap_or(newest)
            } else {
                now = match self.load(block..block + 1, content) {
                    Err(error) if is_unreadable(&error) && whole => Now { bad: true, ..Now::default() },
                    other => other?[0],
                };
                old = now.side.map(|_| Box::new(*content));
                dirty.unwrap_or(now.side.map_or(newest, |side| 1 - side))
            };
            if whole {
                content.fill(0);
            }
            content[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&bytes[(from - offset) as usize..(to - offset) as usize]);
            content[inside as usize..].fill(0);
            // A hole that nothing comes into stays one, unless it tells how long the file is, or may not be one on the disk.
            let stays = !there
                && writer.settled.is_none()
                && start + block_bytes < length_after
                && content.iter().all(|byte| *byte == 0);
            let unchanged = stays || (now.length == inside && old.as_deref() == Some(&*content));
            if !there && !stays && !in_place && self.kind == Kind::Image {
                plan.holes.push(block);
            }
            if let Some(counts) = now.side
                && dirty.is_none()
                && !writer.is_settled(block)
            {
                let list = if unchanged { &mut plan.rewrite } else { &mut plan.settle };
                list.push((block, counts));
            }
            if let Some(old) = old
                && !unchanged
                && dirty.is_some()
                && dirty == now.side
            {
                plan.before.push((block, side, now.length, old));
            }
            let alone = !there && !stays && writer.settled.is_some();
            plan.targets.push(Target { side, number, inside, shadow: !in_place, unchanged, alone });
        }
        Ok(plan)
    }

    fn carry_out(
        &self,
        writer: &mut Writer,
        blocks: &Range<u64>,
        content: &mut [u8],
        mut plan: Plan,
    ) -> io::Result<()> {
        self.rewrite(writer, &plan.rewrite)?;
        if !plan.settle.is_empty() {
            // What was written once more and waits for its sync needs no more than that.
            plan.settle.retain(|(block, _)| !writer.rewritten.contains(block));
            if self.kind == Kind::Other && !plan.settle.is_empty() {
                plan.settle = self.unsettled(writer, blocks.start / GROUP_BLOCKS)?;
            }
            self.rewrite(writer, &plan.settle)?;
            writer.sync(&*self.inner)?;
        }
        if !plan.holes.is_empty() {
            self.fill_holes(writer, &plan.holes)?;
            for block in &plan.holes {
                let target = &mut plan.targets[(*block - blocks.start) as usize];
                (target.side, target.number, target.alone) = (1, target.number + 1, false);
            }
        }
        let written = self.write_sealed(writer, blocks, content, &plan.targets);
        if written.is_err() {
            for (block, side, length, mut old) in plan.before {
                let number = plan.targets[(block - blocks.start) as usize].number.saturating_add(1);
                if length == 0 {
                    writer.failed |= self.write_cleared(writer, &[(block, Cleared { side, number })]).is_err();
                    continue;
                }
                let target = Target { side, number, inside: length, shadow: true, unchanged: false, alone: false };
                if self.write_sealed(writer, &(block..block + 1), &mut old[..], &[target]).is_err() {
                    writer.failed = true;
                }
            }
        }
        written
    }

    fn write_sealed(
        &self,
        writer: &mut Writer,
        blocks: &Range<u64>,
        content: &mut [u8],
        targets: &[Target],
    ) -> io::Result<()> {
        let mut salts = vec![0; targets.len() * SALT_BYTES];
        fill_random(&mut salts).map_err(no_key)?;
        let mut entries = Vec::with_capacity(targets.len() * ENTRY);
        let each = content.as_chunks_mut::<BLOCK>().0.iter_mut().zip(salts.as_chunks::<SALT_BYTES>().0);
        for (i, ((content, salt), target)) in each.zip(targets).enumerate() {
            if target.unchanged {
                entries.extend_from_slice(&[0; ENTRY]);
                continue;
            }
            let block = blocks.start + i as u64;
            let about = self.about(block, (target.number, target.inside));
            let tag = self.key.seal(salt, &about, content).map_err(no_key)?;
            let entry = Entry { salt: *salt, tag, number: target.number, length: target.inside };
            entries.extend_from_slice(&entry.to_bytes());
            if target.shadow {
                writer.dirty.insert(block, target.side);
            }
            writer.cleared.remove(&block);
        }
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut first = 0;
        while first < targets.len() {
            let Target { side, unchanged, alone, .. } = targets[first];
            let alike = |target: &&Target| (target.side, target.unchanged, target.alone) == (side, unchanged, alone);
            let run = targets[first..].iter().take_while(alike).count();
            let block = blocks.start + first as u64;
            if !unchanged {
                write_all(&*self.inner, &content[first * BLOCK..(first + run) * BLOCK], slot_at(block, side))?;
                write_all(&*self.inner, &entries[first * ENTRY..(first + run) * ENTRY], entry_at(block, side))?;
                if alone {
                    write_all(&*self.inner, &vec![0; run * ENTRY], entry_at(block, 1 - side))?;
                }
            }
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
        let result = self.put(bytes, offset, (length, after), true);
        self.length.store(if result.is_ok() { after } else { UNKNOWN }, Ordering::Release);
        result
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
        let mut parts = Vec::new();
        let mut rest = buffer;
        for blocks in by_group(offset / block_bytes..end.div_ceil(block_bytes)) {
            let start = blocks.start * block_bytes;
            let (from, to) = (offset.max(start), end.min(blocks.end * block_bytes));
            let (part, after) = rest.split_at_mut((to - from) as usize);
            rest = after;
            parts.push((blocks, (from - start) as usize, part));
        }
        parallel::each(parts, |(blocks, skipped, part)| {
            let whole = (blocks.end - blocks.start) as usize * BLOCK;
            let found = if part.len() == whole {
                self.load(blocks, part)?
            } else {
                let mut room = vec![0; whole];
                let found = self.load(blocks, &mut room)?;
                part.copy_from_slice(&room[skipped..skipped + part.len()]);
                found
            };
            if self.kind == Kind::Image && found.iter().any(|now| now.bad && now.side.is_none()) {
                return Err(io::Error::from_raw_os_error(BAD_MESSAGE));
            }
            Ok(())
        })?;
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
            let there = |(block, sides): &(u64, _)| !self.is_hole(*block, sides);
            match (block..).zip(entries).find(there) {
                Some((at, _)) => return Ok(offset.max(at * BLOCK as u64)),
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
        // Not in place: what is zero already stays so, whatever a crash leaves of this.
        let write = |from: u64, to: u64| {
            let mut at = from;
            while at < to {
                let now = (block_bytes - at % block_bytes).min(to - at);
                self.put(&[0; BLOCK][..now as usize], at, (all, all), false)?;
                at += now;
            }
            Ok(())
        };
        if first >= behind {
            return write(offset, end);
        }
        write(offset, first * block_bytes)?;
        self.clear(first..behind)?;
        write(behind * block_bytes, end)
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
        // Where this fails, what they had stays: whether they are cleared on the disk is not known.
        let cleared = std::mem::take(&mut writer.cleared);
        writer.sync_all(&*self.inner)?;
        self.reclaim(cleared);
        Ok(())
    }
}
