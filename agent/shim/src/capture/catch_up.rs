//! Catching up with disks of which written places are known, but not what was written.
//!
//! From one instant on, data is kept again ([`Disk::take_all`](crate::disk::Disk::take_all)); the remembered places
//! are read from the guest's disk through a read-only NBD export of QEMU's own, which works for any format. Applied
//! in the order *log before that instant, reads, log after it*, the next cut is consistent, whatever raced.

use std::time::Duration;

use anyhow::{Context, anyhow};
use vmdr_proto::shim::{DiskOp, DiskOpKind};

use super::{Capture, Copied, mirror_of};
use crate::arena::CHUNK_BYTES;
use crate::bitmap::Bitmap;
use crate::nbd::Client;
use vmdr_proto::GRANULE_BYTES;

/// How long QEMU may take to answer a read of the guest's disk before catching up is given up for now.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// What is still to be read of one disk.
#[derive(Default)]
pub(super) struct CatchUp {
    reading: Option<Bitmap>,
    export: Option<Client>,
}

impl CatchUp {
    /// Bytes still to be read.
    pub(super) fn bytes(&self) -> u64 {
        self.reading.as_ref().map_or(0, |reading| reading.count() * GRANULE_BYTES)
    }

    /// The disk is to be read as a whole, or not at all: what was being read is no longer of interest.
    pub(super) fn forget(&mut self) {
        self.reading = None;
    }

    /// Lets go of the connection.
    pub(super) fn disconnect(&mut self) {
        self.export = None;
    }
}

impl Capture {
    /// Adds disk data to a part, at most about `bytes_max` of reads: logs, and what has to come before them.
    pub(super) fn read_disks(&mut self, bytes_max: u64, copied: &mut Copied) -> anyhow::Result<()> {
        let mut left = bytes_max;
        for index in 0..self.disks.len() {
            if self.catch_up[index].reading.is_none() {
                let disk = self.disks[index].clone();
                if disk.remembered_bytes() == 0 {
                    copied.add_log(index, disk.take());
                    continue;
                }
                if !self.mirror_is_ready(disk.target())? {
                    // The mirror is still copying: what it writes would be read twice.
                    if !disk.is_remembered() {
                        copied.add_log(index, disk.take());
                    }
                    continue;
                }
                let (log, remembered) = disk.take_all();
                copied.add_log(index, log);
                self.catch_up[index].reading = Some(remembered);
            }
            left = self.read_disk(index, left, copied)?;
        }
        Ok(())
    }

    fn mirror_is_ready(&mut self, target: &str) -> anyhow::Result<bool> {
        let jobs = self.qmp.execute("query-block-jobs", None)?;
        // One that is gone is missed by the next cut, and begun anew by the agent.
        Ok(mirror_of(&jobs, target).is_ok_and(|job| job["ready"] == true))
    }

    fn read_disk(&mut self, index: usize, bytes_max: u64, copied: &mut Copied) -> anyhow::Result<u64> {
        if self.storage.is_silent() {
            // It would not come back before the storage does; the next pass says so.
            return Ok(bytes_max);
        }
        let target = self.disks[index].target().to_owned();
        let size = self.disks[index].size();
        if self.catch_up[index].export.is_none() {
            self.catch_up[index].export = Some(self.open_export(&target, READ_LIMIT)?);
            // What was remembered one by one was written; of a whole disk QEMU may know what was not.
            let whole = |reading: &Bitmap| reading.count() == reading.len();
            if self.catch_up[index].reading.as_ref().is_some_and(whole)
                && let Some(written) = self.written_since_base(index)
            {
                self.catch_up[index].reading = Some(written);
            }
        }
        let catch_up = &mut self.catch_up[index];
        let (Some(reading), Some(client)) = (&mut catch_up.reading, &mut catch_up.export) else {
            return Err(anyhow!("disk {target}: no export to read from"));
        };
        let mut left = bytes_max;
        while left > 0 {
            let Some((first, count)) = reading.next_run(0, CHUNK_BYTES as u64 / GRANULE_BYTES) else {
                catch_up.reading = None;
                break;
            };
            let Some(mut chunk) = self.arena.take() else { break };
            let offset = first * GRANULE_BYTES;
            let length = (count * GRANULE_BYTES).min(size - offset);
            let bytes = &mut chunk.bytes_mut()[..length as usize];
            if let Err(error) = client.read(offset, bytes) {
                // A connection that failed once is not used again.
                catch_up.export = None;
                return Err(error).with_context(|| format!("read disk {target} through QEMU's export"));
            }
            copied.ops.push(DiskOp {
                disk: index as u32,
                offset,
                length,
                kind: DiskOpKind::Data.into(),
                arena_offset: chunk.offset(),
            });
            copied.chunks.push(chunk);
            reading.remove(first, count);
            left = left.saturating_sub(length);
        }
        Ok(left)
    }
}
