//! Blocks that become holes, and files that become shorter.
//!
//! A block is not cleared by punching it out: what of that a crash leaves could be a version that nothing was to be read of any more, or
//! one that does not open. Its other side gets an entry without content (length 0) instead, with the next number, as any
//! other version. What the block had takes room until that is durable.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::PoisonError;

use vmdr_journal::write_all;
use vmdr_keys::salt;

use crate::file::{SealedFile, Writer, no_key};
use crate::layout::{BLOCK, ENTRY, Entry, GROUP_BLOCKS, GROUP_BYTES, SIDES, entry_at, slot_at};

/// Where it is said that a block was cleared, and as which version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cleared {
    pub side: u64,
    pub number: u64,
}

impl SealedFile {
    /// Whether nothing was ever written to a block, or it was cleared since.
    pub(crate) fn is_hole(&self, block: u64, sides: &[Option<Entry>; SIDES as usize]) -> bool {
        let newest = sides.iter().flatten().max_by_key(|entry| entry.number);
        newest.is_none_or(|entry| entry.length == 0 && self.open(block, entry, &mut []))
    }

    /// Makes whole blocks holes.
    pub(crate) fn clear(&self, blocks: Range<u64>) -> io::Result<()> {
        let stored = self.inner.length()?;
        let mut writer = self.writer();
        writer.check()?;
        let mut at = blocks.start;
        while at < blocks.end {
            let group = at / GROUP_BLOCKS * GROUP_BYTES;
            let data = if group < stored { self.inner.data_from(group)? } else { stored };
            if data >= stored {
                break;
            }
            at = at.max(data / GROUP_BYTES * GROUP_BLOCKS);
            let end = ((at / GROUP_BLOCKS + 1) * GROUP_BLOCKS).min(blocks.end);
            if at < end {
                self.clear_within(&mut writer, at..end)?;
            }
            at = end.max(at + 1);
        }
        Ok(())
    }

    /// The same, of one group.
    fn clear_within(&self, writer: &mut Writer, blocks: Range<u64>) -> io::Result<()> {
        let mut targets = Vec::new();
        for (block, sides) in blocks.clone().zip(self.entries(&blocks)?) {
            let dirty = writer.dirty.get(&block).copied();
            let Some(newest) = sides.iter().flatten().map(|entry| entry.number).max() else { continue };
            // What counts as cleared already may not be durable: then it is said once more.
            if (dirty.is_some() || writer.is_settled(block)) && self.is_hole(block, &sides) {
                continue;
            }
            let side = match (dirty, &sides) {
                (Some(dirty), _) => dirty,
                (None, [Some(_), None]) => 1,
                (None, [None, Some(_)]) => 0,
                // The other one than what counts; where nothing does, either.
                _ => 1 - self.load(block..block + 1, &mut [0; BLOCK])?[0].side.unwrap_or(0),
            };
            targets.push((block, Cleared { side, number: newest.saturating_add(1) }));
        }
        self.write_cleared(writer, &targets)
    }

    /// Writes entries without content.
    pub(crate) fn write_cleared(&self, writer: &mut Writer, targets: &[(u64, Cleared)]) -> io::Result<()> {
        for side in 0..SIDES {
            let of: Vec<_> = targets.iter().filter(|(_, target)| target.side == side).copied().collect();
            for run in of.chunk_by(|(a, _), (b, _)| a + 1 == *b && b % GROUP_BLOCKS != 0) {
                let mut entries = Vec::with_capacity(run.len() * ENTRY);
                for (block, Cleared { number, .. }) in run {
                    let salt = salt().map_err(no_key)?;
                    let tag = self.key.seal(&salt, &self.about(*block, (*number, 0)), &mut []).map_err(no_key)?;
                    entries.extend_from_slice(&Entry { salt, tag, number: *number, length: 0 }.to_bytes());
                }
                let (Some((first, _)), Some((last, _))) = (run.first(), run.last()) else { continue };
                let at = entry_at(*first, side);
                let mut before = vec![0; entries.len()];
                self.read_inner(&mut before, at)?;
                let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = write_all(&*self.inner, &entries, at) {
                    // What was written since the last sync has no other version to go back to.
                    let dirty = (*first..=*last).any(|block| writer.dirty.contains_key(&block));
                    writer.failed |= dirty && write_all(&*self.inner, &before, at).is_err();
                    return Err(error);
                }
                for (block, _) in run {
                    writer.dirty.insert(*block, side);
                    writer.cleared.insert(*block, side);
                }
            }
        }
        Ok(())
    }

    /// Makes versions without content of blocks that were holes and are going to be written in part: a hole is no version to go
    /// back to, and of an image what does not open is damage.
    pub(crate) fn fill_holes(&self, writer: &mut Writer, holes: &[u64]) -> io::Result<()> {
        let targets: Vec<_> = holes.iter().map(|block| (*block, Cleared { side: 0, number: 1 })).collect();
        let filled = self.fill(writer, &targets);
        for block in holes {
            writer.dirty.remove(block);
            writer.cleared.remove(block);
            if filled.is_err() {
                // Whether it is durable is not known, so it is none. Where there was no room for it nothing is there to be taken back.
                let at = entry_at(*block, 0);
                let mut there = [0; ENTRY];
                let undone = self.read_inner(&mut there, at).and_then(|()| match there.iter().all(|byte| *byte == 0) {
                    true => Ok(()),
                    false => write_all(&*self.inner, &[0; ENTRY], at),
                });
                writer.failed |= undone.is_err();
            }
        }
        filled?;
        writer.settle(holes.iter().copied());
        Ok(())
    }

    fn fill(&self, writer: &mut Writer, targets: &[(u64, Cleared)]) -> io::Result<()> {
        if writer.settled.is_some() {
            // It may be a hole only because what cut the file was never durable.
            for (block, _) in targets {
                write_all(&*self.inner, &[0; ENTRY], entry_at(*block, 1))?;
            }
        }
        self.write_cleared(writer, targets)?;
        writer.sync(&*self.inner)
    }

    /// That these blocks were cleared is durable: what they had before is not needed any more. Where this fails it only takes room.
    pub(crate) fn reclaim(&self, cleared: BTreeMap<u64, u64>) {
        if cleared.is_empty() {
            return;
        }
        let all: Vec<_> = cleared.into_iter().collect();
        let Ok(stored) = self.inner.length() else { return };
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let punch = |at: u64, bytes: u64| match bytes.min(stored.saturating_sub(at)) {
            0 => Ok(()),
            bytes => self.inner.zero(at, bytes),
        };
        for run in all.chunk_by(|a, b| a.0 + 1 == b.0 && b.0 % GROUP_BLOCKS != 0 && a.1 == b.1) {
            let Some((first, side)) = run.first() else { continue };
            let (count, other) = (run.len() as u64, 1 - side);
            let done = punch(entry_at(*first, other), count * ENTRY as u64)
                .and_then(|()| punch(slot_at(*first, other), count * BLOCK as u64))
                .and_then(|()| punch(slot_at(*first, *side), count * BLOCK as u64));
            if done.is_err() {
                return;
            }
        }
    }

    /// Cuts the file, which has `length`.
    pub(crate) fn shorten(&self, length: u64, to: u64) -> io::Result<()> {
        let block_bytes = BLOCK as u64;
        if to == 0 {
            let mut writer = self.writer();
            writer.check()?;
            writer.forget(|_| true);
            let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            return self.inner.set_length(0);
        }
        let last = (to - 1) / block_bytes;
        // First what stays: it is in the clear neither before nor after.
        let mut content = [0; BLOCK];
        let now = self.load(last..last + 1, &mut content)?[0];
        let inside = to - last * block_bytes;
        if now.side.is_none() || u64::from(now.length) != inside {
            self.put(&content[..inside as usize], last * block_bytes, (length.max(to), to), false)?;
        }
        let group_end = (last / GROUP_BLOCKS + 1) * GROUP_BLOCKS;
        self.clear(last + 1..group_end)?;
        let stored = group_end / GROUP_BLOCKS * GROUP_BYTES;
        let mut writer = self.writer();
        writer.forget(|block| block >= group_end);
        if self.inner.length()? > stored {
            self.inner.set_length(stored)?;
        }
        Ok(())
    }
}
