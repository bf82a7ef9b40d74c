//! A resync: everything may be dirty, but most of it is at the receiver already.
//!
//! For each part of the epoch, the receiver is asked for the hashes of the pages and granules in it; those that it has
//! are left out. That is only right the first time a unit comes up in the epoch: once one was sent, the standby it is
//! compared with is no longer what the epoch's earlier parts will make of it, so from then on it is always sent.
//!
//! The guest need not be made of the same as the standby. What the standby lacks (a RAM block of another name at that
//! number, a disk that was added) the receiver begins with zeros; a disk that has grown has zeros behind its old end. Only
//! disks that went, or became others, cannot be said in a difference.

use anyhow::{Context, ensure};
use tokio::runtime::Handle;
use vmdr_codec::{Disk, Layout};
use vmdr_proto::replication::{DescribeRequest, HashesRequest, Position, hashes_request};
use vmdr_proto::shim::{DiskOp, DiskOpKind, Part, RamRun};
use vmdr_proto::{GRANULE_BYTES, HASH_BYTES, HASHES_MAX, PAGE_BYTES};
use vmdr_shim::bitmap::Bitmap;
use vmdr_trust::Trust;
use xxhash_rust::xxh3::xxh3_128;

use crate::arena_map::ArenaMap;
use crate::link::Questions;

/// Pages that are not asked about, but lie between pages that are: up to this many, one question is better than two.
const GAP_PAGES: u64 = 512;

/// A comparison with one recovery point.
pub struct Resync {
    runtime: Handle,
    questions: Questions,
    domain_uuid: String,
    epoch: u64,
    /// What the standby consists of.
    standby: Layout,
    /// What the guest consists of.
    layout: Layout,
    /// Units sent in this epoch, by RAM block and by disk.
    sent_pages: Vec<Bitmap>,
    sent_granules: Vec<Bitmap>,
    /// Bytes left out so far.
    pub saved_bytes: u64,
}

impl Resync {
    /// Asks the receiver what it has. Nothing, if that is not the recovery point at `position`.
    pub fn begin(
        runtime: &Handle,
        trust: &Trust,
        receiver: &str,
        domain_uuid: &str,
        position: &Position,
    ) -> anyhow::Result<Option<Self>> {
        let request = DescribeRequest { domain_uuid: domain_uuid.to_owned() };
        let mut questions = runtime.block_on(Questions::connect(trust, receiver)).map_err(anyhow::Error::msg)?;
        let reply = runtime.block_on(questions.describe(request)).map_err(anyhow::Error::msg)?;
        if reply.position.unwrap_or_default().epoch != position.epoch {
            return Ok(None);
        }
        let standby = Layout::from_bytes(&reply.layout).context("the layout of the standby")?;
        Ok(Some(Self {
            runtime: runtime.clone(),
            questions,
            domain_uuid: domain_uuid.to_owned(),
            epoch: position.epoch,
            standby,
            layout: Layout::default(),
            sent_pages: Vec::new(),
            sent_granules: Vec::new(),
            saved_bytes: 0,
        }))
    }

    /// Whether a guest of this layout can be compared. If so, the next parts are of it.
    pub fn fits(&mut self, layout: &Layout) -> bool {
        if !comparable(&self.standby, layout) {
            return false;
        }
        // Blocks that come in the middle of the epoch are not compared: the standby may have an image of that name, but the
        // epoch's first layout, which lacks it, has made zeros of it.
        let first = self.layout.ram.is_empty();
        for block in layout.ram.iter().skip(self.sent_pages.len()) {
            let mut sent = Bitmap::new(block.pages());
            if !first {
                sent.fill();
            }
            self.sent_pages.push(sent);
        }
        for (index, block) in layout.ram.iter().enumerate() {
            if self.sent_pages[index].len() != block.pages() {
                // Another one at this number, or of another size: what was sent of the old one says nothing.
                self.sent_pages[index] = Bitmap::new(block.pages());
                if self.layout.ram.len() > index {
                    // Not compared any more: the standby is not what this epoch's earlier parts have made of it.
                    self.sent_pages[index].fill();
                }
            }
        }
        if self.sent_granules.is_empty() {
            let granules = |disk: &Disk| Bitmap::new(disk.size_bytes.div_ceil(GRANULE_BYTES));
            self.sent_granules = layout.disks.iter().map(granules).collect();
        }
        self.layout = layout.clone();
        true
    }

    /// The epoch that begins with the recovery point compared with.
    pub fn open_epoch(&self) -> u64 {
        self.epoch + 1
    }

    /// Leaves out of `part` what the receiver has.
    pub fn reduce(&mut self, part: &mut Part, arena: &ArenaMap) -> anyhow::Result<()> {
        let runs = std::mem::take(&mut part.runs);
        for group in groups(&runs) {
            self.reduce_pages(group, arena, &mut part.runs)?;
        }
        let ops = std::mem::take(&mut part.ops);
        for op in ops {
            self.reduce_op(op, arena, &mut part.ops)?;
        }
        Ok(())
    }

    /// Runs of one block that lie close together.
    fn reduce_pages(&mut self, group: &[RamRun], arena: &ArenaMap, kept: &mut Vec<RamRun>) -> anyhow::Result<()> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { return Ok(()) };
        let start = first.first;
        let units = last.first + u64::from(last.pages) - start;
        let hashes = if same_block(&self.standby, &self.layout, first.block as usize) {
            self.hashes(hashes_request::Of::RamBlock(first.block), start, units)?
        } else {
            // The receiver begins this block with zeros.
            vec![xxh3_128(&[0; PAGE_BYTES]).to_le_bytes(); units as usize]
        };
        let sent = self.sent_pages.get_mut(first.block as usize).context("a RAM block that the standby lacks")?;
        for run in group {
            let bytes = arena
                .get(run.arena_offset, u64::from(run.pages) * PAGE_BYTES as u64)
                .context("the shim describes a range outside its arena")?;
            let mut keep: Option<RamRun> = None;
            for (index, page) in bytes.as_chunks::<PAGE_BYTES>().0.iter().enumerate() {
                let number = run.first + index as u64;
                let known = &hashes[(number - start) as usize];
                if !sent.contains(number) && xxh3_128(page).to_le_bytes() == *known {
                    self.saved_bytes += PAGE_BYTES as u64;
                    kept.extend(keep.take());
                    continue;
                }
                sent.insert(number, 1);
                let arena_offset = run.arena_offset + (index * PAGE_BYTES) as u64;
                keep.get_or_insert(RamRun { block: run.block, first: number, pages: 0, arena_offset }).pages += 1;
            }
            kept.extend(keep);
        }
        Ok(())
    }

    fn reduce_op(&mut self, op: DiskOp, arena: &ArenaMap, kept: &mut Vec<DiskOp>) -> anyhow::Result<()> {
        let size = self.layout.disks.get(op.disk as usize).context("a disk that the standby lacks")?.size_bytes;
        let end = op.offset + op.length;
        let whole = op.offset.is_multiple_of(GRANULE_BYTES) && (end.is_multiple_of(GRANULE_BYTES) || end == size);
        let first = op.offset / GRANULE_BYTES;
        let count = end.div_ceil(GRANULE_BYTES) - first;
        let disk = op.disk as usize;
        if op.kind() != DiskOpKind::Data || !whole || count > u64::from(HASHES_MAX) {
            self.sent_granules[disk].insert(first, count);
            kept.push(op);
            return Ok(());
        }
        let hashes = if disk < self.standby.disks.len() {
            self.hashes(hashes_request::Of::Disk(op.disk), first, count)?
        } else {
            // The receiver begins this disk with zeros.
            vec![xxh3_128(&[0; GRANULE_BYTES as usize]).to_le_bytes(); count as usize]
        };
        let bytes = arena.get(op.arena_offset, op.length).context("the shim describes a range outside its arena")?;
        let mut padded = vec![0; GRANULE_BYTES as usize];
        let mut keep: Option<DiskOp> = None;
        for (index, granule) in bytes.chunks(GRANULE_BYTES as usize).enumerate() {
            let number = first + index as u64;
            let hash = if granule.len() == padded.len() {
                xxh3_128(granule)
            } else {
                padded[..granule.len()].copy_from_slice(granule);
                padded[granule.len()..].fill(0);
                xxh3_128(&padded)
            };
            if !self.sent_granules[disk].contains(number) && hash.to_le_bytes() == hashes[index] {
                self.saved_bytes += granule.len() as u64;
                kept.extend(keep.take());
                continue;
            }
            self.sent_granules[disk].insert(number, 1);
            let at = index as u64 * GRANULE_BYTES;
            let part = DiskOp { offset: op.offset + at, length: 0, arena_offset: op.arena_offset + at, ..op };
            keep.get_or_insert(part).length += granule.len() as u64;
        }
        kept.extend(keep);
        Ok(())
    }

    fn hashes(&mut self, of: hashes_request::Of, first: u64, units: u64) -> anyhow::Result<Vec<[u8; HASH_BYTES]>> {
        let request = HashesRequest {
            domain_uuid: self.domain_uuid.clone(),
            epoch: self.epoch,
            of: Some(of),
            first,
            units: u32::try_from(units).context("too many hashes at once")?,
        };
        let reply = self.runtime.block_on(self.questions.hashes(request)).map_err(anyhow::Error::msg)?;
        let (hashes, rest) = reply.hashes.as_chunks::<HASH_BYTES>();
        ensure!(
            hashes.len() as u64 == units && rest.is_empty(),
            "the receiver sent {} hashes, not {units}",
            hashes.len()
        );
        Ok(hashes.to_vec())
    }
}

/// Whether a guest of `layout` can be brought to the standby as differences.
fn comparable(standby: &Layout, layout: &Layout) -> bool {
    let same = standby.disks.iter().zip(&layout.disks).all(|(theirs, ours)| theirs.target == ours.target);
    standby.machine == layout.machine && standby.disks.len() <= layout.disks.len() && same
}

/// Whether the standby has this block of the guest's, so that it goes on from what it has.
fn same_block(standby: &Layout, layout: &Layout, index: usize) -> bool {
    let of =
        |layout: &Layout| layout.ram.get(index).filter(|block| block.used_bytes > 0).map(|block| block.name.clone());
    of(standby).is_some() && of(standby) == of(layout)
}

/// Neighbouring runs of a block, such that a group spans few pages that are not in it, and at most [`HASHES_MAX`].
fn groups(runs: &[RamRun]) -> impl Iterator<Item = &[RamRun]> {
    let mut rest = runs;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let mut end = first.first + u64::from(first.pages);
        let mut count = 1;
        for run in &rest[1..] {
            let next_end = run.first + u64::from(run.pages);
            let near = run.block == first.block && run.first >= end && run.first - end <= GAP_PAGES;
            if !near || next_end - first.first > u64::from(HASHES_MAX) {
                break;
            }
            end = next_end;
            count += 1;
        }
        let (group, others) = rest.split_at(count);
        rest = others;
        Some(group)
    })
}

#[cfg(test)]
mod tests {
    use vmdr_codec::RamBlock;

    use super::*;

    fn layout(ram: &[(&str, u64)], disks: &[(&str, u64)]) -> Layout {
        let block =
            |&(name, used_bytes): &(&str, u64)| RamBlock { name: name.to_owned(), used_bytes, page_bytes: 4096 };
        let disk = |&(target, size_bytes): &(&str, u64)| Disk { target: target.to_owned(), size_bytes };
        Layout {
            machine: "q35".to_owned(),
            ram: ram.iter().map(block).collect(),
            disks: disks.iter().map(disk).collect(),
        }
    }

    #[test]
    fn only_disks_that_went_or_became_others_make_a_new_seed() {
        let standby = layout(&[("pc.ram", 4096)], &[("vda", 10), ("vdb", 10)]);
        for (ram, disks, can) in [
            (&[("pc.ram", 4096)][..], &[("vda", 10), ("vdb", 10)][..], true),
            // Resized, added; RAM blocks as they come.
            (&[("pc.ram", 4096)], &[("vda", 20), ("vdb", 5)], true),
            (&[("pc.ram", 8192), ("rom", 1)], &[("vda", 10), ("vdb", 10), ("vdc", 1)], true),
            (&[], &[("vda", 10), ("vdb", 10)], true),
            (&[("pc.ram", 4096)], &[("vda", 10)], false),
            (&[("pc.ram", 4096)], &[("vda", 10), ("vdc", 10)], false),
        ] {
            assert_eq!(comparable(&standby, &layout(ram, disks)), can, "{ram:?} {disks:?}");
        }
        let other = Layout { machine: "pc".to_owned(), ..standby.clone() };
        assert!(!comparable(&standby, &other));
    }

    #[test]
    fn a_block_goes_on_only_from_its_own_image() {
        // The guest shut down: the standby has no memory.
        let off = layout(&[], &[("vda", 10)]);
        let standby = layout(&[("pc.ram", 4096), ("a", 0), ("b", 4096)], &[]);
        let guest = layout(&[("pc.ram", 8192), ("a", 4096), ("c", 4096), ("b", 4096)], &[]);
        let same: Vec<bool> = (0..4).map(|index| same_block(&standby, &guest, index)).collect();
        // `a` had gone, so that its image is empty; `b` has another number now.
        assert_eq!(same, [true, false, false, false]);
        assert!(!same_block(&off, &guest, 0));
    }

    #[test]
    fn groups_keep_order_and_limits() {
        let run = |block, first, pages| RamRun { block, first, pages, arena_offset: 0 };
        let runs = [run(0, 0, 4), run(0, 10, 2), run(0, 5000, 1), run(1, 5002, 3), run(1, 4, 1)];
        let lengths: Vec<usize> = groups(&runs).map(<[RamRun]>::len).collect();
        assert_eq!(lengths, [2, 1, 1, 1]);
        let long: Vec<RamRun> = (0..200).map(|i| run(0, i * 600, 200)).collect();
        let total: usize = groups(&long)
            .map(|group| {
                let (first, last) = (group[0], group[group.len() - 1]);
                assert!(last.first + u64::from(last.pages) - first.first <= u64::from(HASHES_MAX));
                group.len()
            })
            .sum();
        assert_eq!(total, 200);
    }
}
