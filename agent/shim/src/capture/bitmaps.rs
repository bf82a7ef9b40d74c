//! What was written to a disk since a recovery point, as QEMU itself notes it: dirty bitmaps.
//!
//! A resync has to compare whole disks, because a new shim does not know what was written before it came. QEMU does, if
//! a dirty bitmap was added in time: it lives as long as QEMU does, whatever becomes of mirrors, shims and agents. So each
//! disk has one, begun before the cut of the epoch that is in its name, and a resync from the recovery point of that
//! epoch, or of a later one, reads and compares only what the bitmap has. A newer bitmap is begun now and then, because
//! one that is months old has everything; the older goes when an epoch of the newer's is durable.
//!
//! A bitmap is believed only if its name has this protection's own id, its generation, an epoch not after the recovery
//! point's, and the size that the disk has now. In every doubt there is none, and everything is compared.
//!
//! What it does not spare is the mirror job's own copy: `virDomainBlockCopy` cannot start from a bitmap.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmdr_proto::GRANULE_BYTES;

use super::Capture;
use super::exports::mirrored_node;
use crate::bitmap::Bitmap;
use crate::monitor::{Address, Monitor};
use crate::nbd::{Client, Extent};
use crate::qmp::QmpError;

/// How often a newer bitmap is begun.
const RENEW: Duration = Duration::from_secs(600);
/// Letters of a protection's id that are in a name: QEMU's limit for the whole is 1023 bytes, this is for people.
const ID_LETTERS: usize = 8;
/// How long QEMU's monitor may take to greet.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long QEMU may take for any answer about the copy of a bitmap.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a disk asked for at once: a guest decides how many extents there are, up to one for each granule.
const STATUS_STEP_BYTES: u64 = 2 << 30;
/// The copy of a bitmap that is read.
const READ_NAME: &str = "vmdr-read";

/// The id that bitmaps of this protection have in their names, and what is to be done with them.
#[derive(Debug)]
pub(super) struct Bitmaps {
    /// Empty: no bitmaps.
    id: String,
    due: Instant,
    /// The newest epoch known to be durable.
    pub(super) durable_epoch: u64,
    /// They stay in QEMU when this shim ends.
    pub(super) keep: bool,
    /// The recovery point that the open epoch is compared with; 0: the open epoch is no resync.
    pub(super) base_epoch: u64,
}

/// What a bitmap's name says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark {
    generation: u64,
    epoch: u64,
    size_bytes: u64,
}

impl Bitmaps {
    pub(super) fn new(protection: &str) -> Self {
        let id: String = protection.chars().filter(char::is_ascii_alphanumeric).take(ID_LETTERS).collect();
        // Too short an id could be another protection's.
        let id = if id.len() == ID_LETTERS { id } else { String::new() };
        Self { id, due: Instant::now(), durable_epoch: 0, keep: false, base_epoch: 0 }
    }

    fn name(&self, mark: &Mark) -> String {
        format!("{}{}-{}-{}", self.prefix(), mark.generation, mark.epoch, mark.size_bytes)
    }

    fn prefix(&self) -> String {
        format!("vmdr-{}-", self.id)
    }

    fn parse(&self, name: &str) -> Option<Mark> {
        let mut numbers = name.strip_prefix(&self.prefix())?.split('-').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let mark = Mark { generation: next()?, epoch: next()?, size_bytes: next()? };
        numbers.next().is_none().then_some(mark)
    }

    fn remove(&self, qmp: &mut Monitor) -> Result<(), QmpError> {
        if self.id.is_empty() {
            return Ok(());
        }
        let nodes = qmp.execute("query-named-block-nodes", Some(&json!({ "flat": true })))?;
        for node in nodes.as_array().into_iter().flatten().filter_map(|node| node["node-name"].as_str()) {
            for mark in self.of_node(&nodes, node) {
                let arguments = json!({ "node": node, "name": self.name(&mark) });
                qmp.execute("block-dirty-bitmap-remove", Some(&arguments))?;
            }
        }
        Ok(())
    }

    /// Those of a node that still note what is written, from `query-named-block-nodes`.
    fn of_node(&self, nodes: &Value, node: &str) -> Vec<Mark> {
        let nodes = nodes.as_array().into_iter().flatten();
        let bitmaps =
            nodes.filter(|found| found["node-name"] == node).filter_map(|node| node["dirty-bitmaps"].as_array());
        let mut marks: Vec<Mark> = bitmaps
            .flatten()
            .filter(|bitmap| bitmap["recording"] == true && bitmap["inconsistent"] != true)
            .filter_map(|bitmap| self.parse(bitmap["name"].as_str()?))
            .collect();
        marks.sort_by_key(|mark| (mark.generation, mark.epoch));
        marks
    }
}

/// Takes all bitmaps of a protection out of QEMU, for one that has no shim any more.
pub fn remove_all(monitor: &Address, protection: &str) -> Result<(), QmpError> {
    let bitmaps = Bitmaps::new(protection);
    if bitmaps.id.is_empty() { Ok(()) } else { bitmaps.remove(&mut Monitor::connect(monitor, CONNECT_LIMIT)?) }
}

/// The bitmap with the least in it that has everything since the cut of `base_epoch`.
fn newest_before(marks: &[Mark], generation: u64, base_epoch: u64, size_bytes: u64) -> Option<&Mark> {
    let fits =
        |mark: &&Mark| mark.generation == generation && mark.epoch <= base_epoch && mark.size_bytes == size_bytes;
    marks.iter().filter(fits).max_by_key(|mark| mark.epoch)
}

/// Bitmaps that are no longer needed when `durable_epoch` is a recovery point.
fn superseded(marks: &[Mark], generation: u64, durable_epoch: u64, size_bytes: u64) -> Vec<&Mark> {
    let kept = newest_before(marks, generation, durable_epoch, size_bytes);
    let is_old = |mark: &&Mark| {
        mark.generation != generation
            || mark.size_bytes != size_bytes
            || kept.is_some_and(|kept| mark.epoch < kept.epoch)
    };
    marks.iter().filter(is_old).collect()
}

impl Capture {
    /// Whether bitmaps outlive this shim: a resync will follow.
    pub fn keep_bitmaps(&mut self, keep: bool) {
        self.bitmaps.keep = keep;
    }

    /// The open resync reads all of the disks: what it is compared with is damaged, wherever that may be.
    pub fn compare_whole_disks(&mut self) {
        self.bitmaps.base_epoch = 0;
    }

    /// Before a cut whose mirrors are in order: begins a bitmap on each disk, if it is time to. It then has everything
    /// that is written after that cut. A failure costs a resync's reads, no more.
    pub(super) fn renew_bitmaps(&mut self) {
        if self.bitmaps.id.is_empty() || Instant::now() < self.bitmaps.due {
            return;
        }
        self.bitmaps.due = Instant::now() + RENEW;
        let Some((jobs, nodes)) = self.jobs_and_nodes() else { return };
        for disk in &self.disks {
            let Some(node) = mirrored_node(&jobs, disk.target()) else { continue };
            let marks = self.bitmaps.of_node(&nodes, node);
            for mark in superseded(&marks, self.generation, self.bitmaps.durable_epoch, disk.size()) {
                let arguments = json!({ "node": node, "name": self.bitmaps.name(mark) });
                let _ = self.qmp.execute("block-dirty-bitmap-remove", Some(&arguments));
            }
            let mark = Mark { generation: self.generation, epoch: self.epoch, size_bytes: disk.size() };
            if marks.contains(&mark) {
                continue;
            }
            let arguments = json!({
                "node": node, "name": self.bitmaps.name(&mark), "granularity": GRANULE_BYTES, "persistent": false,
            });
            if let Err(error) = self.qmp.execute("block-dirty-bitmap-add", Some(&arguments)) {
                tracing::warn!(domain = self.config.domain_name, disk = disk.target(), "{error}");
            }
        }
    }

    /// Takes all bitmaps of this protection out of QEMU, unless a resync will follow.
    pub(super) fn remove_bitmaps(&mut self) {
        if self.bitmaps.keep {
            return;
        }
        if let Err(error) = self.bitmaps.remove(&mut self.qmp) {
            tracing::warn!(domain = self.config.domain_name, "take the dirty bitmaps out of QEMU: {error}");
        }
    }

    /// For a resync that is about to read a whole disk: what was written to it since the recovery point, at least.
    /// Nothing where QEMU does not know. QEMU's NBD server must run.
    pub(super) fn written_since_base(&mut self, index: usize) -> Option<Bitmap> {
        if self.bitmaps.id.is_empty() || self.bitmaps.base_epoch == 0 {
            return None;
        }
        let (target, size) = (self.disks[index].target().to_owned(), self.disks[index].size());
        let (jobs, nodes) = self.jobs_and_nodes()?;
        let node = mirrored_node(&jobs, &target)?;
        let marks = self.bitmaps.of_node(&nodes, node);
        let mark = newest_before(&marks, self.generation, self.bitmaps.base_epoch, size)?;
        let (source, id) = (self.bitmaps.name(mark), format!("vmdr-{target}-written"));
        let read = self.read_bitmap(node, &source, &id);
        // Whatever became of it: nothing of it stays. A bitmap cannot go while it is exported.
        let _ = self.qmp.execute("block-export-del", Some(&json!({ "id": id, "mode": "hard" })));
        let _ = self.qmp.execute("block-dirty-bitmap-remove", Some(&json!({ "node": node, "name": READ_NAME })));
        match read {
            Ok(written) => {
                let (read_bytes, size_bytes) = (written.count() * GRANULE_BYTES, size);
                tracing::info!(
                    domain = self.config.domain_name,
                    disk = target,
                    bitmap = source,
                    read_bytes,
                    size_bytes,
                    "QEMU's dirty bitmap spares reading what was not written"
                );
                Some(written)
            }
            Err(error) => {
                tracing::warn!(domain = self.config.domain_name, disk = target, "read the dirty bitmap: {error:#}");
                None
            }
        }
    }

    /// Copies a bitmap, because QEMU does not show one that it still writes to, and reads the copy through an export `id`.
    fn read_bitmap(&mut self, node: &str, source: &str, id: &str) -> anyhow::Result<Bitmap> {
        let copy = json!({
            "node": node, "name": READ_NAME, "granularity": GRANULE_BYTES, "persistent": false, "disabled": true,
        });
        self.qmp.execute("block-dirty-bitmap-add", Some(&copy))?;
        let merge = json!({ "node": node, "target": READ_NAME, "bitmaps": [source] });
        self.qmp.execute("block-dirty-bitmap-merge", Some(&merge))?;
        let export = json!({
            "type": "nbd", "id": id, "node-name": node, "name": id, "writable": false, "bitmaps": [READ_NAME],
        });
        self.qmp.execute("block-export-add", Some(&export))?;
        let context = format!("qemu:dirty-bitmap:{READ_NAME}");
        let mut client = Client::connect_with(&self.export_socket()?, id, READ_LIMIT, Some(&context))?;
        let size = client.size_bytes();
        let mut dirty = Bitmap::new(size.div_ceil(GRANULE_BYTES));
        for at in (0..size).step_by(STATUS_STEP_BYTES as usize) {
            note_dirty(&mut dirty, at, &client.block_status(at, STATUS_STEP_BYTES.min(size - at))?);
        }
        Ok(dirty)
    }

    fn jobs_and_nodes(&mut self) -> Option<(Value, Value)> {
        let flat = json!({ "flat": true });
        let jobs = self.qmp.execute("query-block-jobs", None);
        match jobs.and_then(|jobs| Ok((jobs, self.qmp.execute("query-named-block-nodes", Some(&flat))?))) {
            Ok(both) => Some(both),
            Err(error) => {
                tracing::warn!(domain = self.config.domain_name, "look for dirty bitmaps: {error}");
                None
            }
        }
    }
}

/// Adds what is dirty of a disk from `at` on. In the context of a bitmap the flag that otherwise means "hole" means "dirty".
fn note_dirty(dirty: &mut Bitmap, mut at: u64, extents: &[Extent]) {
    for extent in extents {
        let end = at + extent.length;
        if extent.hole {
            let first = at / GRANULE_BYTES;
            dirty.insert(first, end.div_ceil(GRANULE_BYTES) - first);
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0a1b2c3d-1111-4111-8111-111111111111";

    fn mark(generation: u64, epoch: u64, size_bytes: u64) -> Mark {
        Mark { generation, epoch, size_bytes }
    }

    #[test]
    fn names_are_read_back_and_others_are_not_ours() {
        let bitmaps = Bitmaps::new(ID);
        let one = mark(3, 1001, 64 << 20);
        assert_eq!(bitmaps.name(&one), "vmdr-0a1b2c3d-3-1001-67108864");
        assert_eq!(bitmaps.parse(&bitmaps.name(&one)), Some(one));
        for other in [
            "vmdr-read",
            "libvirt-1",
            "vmdr-ffffffff-3-1001-67108864",
            "vmdr-0a1b2c3d-3-1001",
            "",
            "vmdr-0a1b2c3d-3-1-2-3",
        ] {
            assert_eq!(bitmaps.parse(other), None, "{other}");
        }
        assert_eq!(Bitmaps::new("").id, "");
    }

    #[test]
    fn only_a_bitmap_that_has_everything_since_the_recovery_point_is_believed() {
        let marks = [mark(3, 10, 5), mark(3, 40, 5), mark(3, 90, 5), mark(2, 50, 5), mark(3, 60, 7)];
        let epoch = |base| newest_before(&marks, 3, base, 5).map(|mark| mark.epoch);
        assert_eq!(epoch(9), None);
        assert_eq!(epoch(10), Some(10));
        assert_eq!(epoch(89), Some(40));
        assert_eq!(epoch(1000), Some(90));
        assert_eq!(newest_before(&marks, 4, 1000, 5), None);
    }

    #[test]
    fn a_bitmap_goes_when_a_newer_one_has_what_the_durable_point_needs() {
        let marks = [mark(2, 50, 5), mark(3, 10, 5), mark(3, 40, 5), mark(3, 60, 7), mark(3, 90, 5)];
        let gone: Vec<_> = superseded(&marks, 3, 89, 5).into_iter().map(|m| (m.generation, m.epoch)).collect();
        assert_eq!(gone, [(2, 50), (3, 10), (3, 60)]);
        assert_eq!(superseded(&marks, 3, 5, 5).len(), 2, "nothing that a point may still need");
    }

    #[test]
    fn a_granule_of_which_anything_was_written_is_read() {
        let extent = |length, hole| Extent { length, hole, zero: false };
        let mut dirty = Bitmap::new(7);
        let extents = [
            extent(3 * GRANULE_BYTES, false),
            extent(GRANULE_BYTES, true),
            extent(GRANULE_BYTES + 512, false),
            extent(1024, true),
        ];
        note_dirty(&mut dirty, 0, &extents);
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [(3, 1), (5, 1)]);
        note_dirty(&mut dirty, 6 * GRANULE_BYTES, &[extent(512, true)]);
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [(3, 1), (5, 2)]);
    }

    #[test]
    fn nodes_are_searched_for_bitmaps_that_record() {
        let bitmaps = Bitmaps::new(ID);
        let nodes = json!([
            { "node-name": "libvirt-1-format", "dirty-bitmaps": [
                { "name": "vmdr-0a1b2c3d-3-90-5", "recording": true },
                { "name": "vmdr-0a1b2c3d-3-10-5", "recording": true },
                { "name": "vmdr-0a1b2c3d-3-20-5", "recording": false },
                { "name": "backup", "recording": true } ] },
            { "node-name": "libvirt-1-storage" },
        ]);
        assert_eq!(bitmaps.of_node(&nodes, "libvirt-1-format"), [mark(3, 10, 5), mark(3, 90, 5)]);
        assert_eq!(bitmaps.of_node(&nodes, "libvirt-1-storage"), []);
        assert_eq!(bitmaps.of_node(&nodes, "libvirt-2-format"), []);
    }
}
