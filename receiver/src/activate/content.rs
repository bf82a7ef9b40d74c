//! What a recovery point has: straight from the standby's files (what is read of them here is compared with its checksums), or,
//! of an older point, with its older content laid over them.
//!
//! An older point is not copied. Its main memory is mapped from the standby's RAM image like the newest point's, and the pages
//! that were otherwise then go through the save image into QEMU's private mapping; its disks are overlays that have those
//! clusters. So it costs what lies between the two, the standby is only read, and the newest point is as it was.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use vmdr_codec::PAGE_BYTES;

use super::qcow2::CLUSTER_BYTES;
use super::save_image::Patch;
use crate::store::{Array, Change, PointReader, RecoveryPoint, StoreError};

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;

/// All of the RAM block with this index among those of the point.
pub fn ram(point: &RecoveryPoint, index: usize) -> io::Result<Box<dyn Read>> {
    let block = &point.ram[index];
    match point.older.as_ref().or(point.checked.as_ref()) {
        None => {
            let file = File::open(&block.path);
            let file = file.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", block.path.display())))?;
            Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, file)))
        }
        Some(older) => {
            let array = ram_array(point, index).ok_or_else(|| io::Error::other("the layout has no such RAM block"))?;
            let whole = Whole { reader: older.clone(), array, at: 0 };
            Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, whole)))
        }
    }
}

/// The pages of a RAM block that are other than in the standby's image; none of the newest point.
pub fn pages(point: &RecoveryPoint, index: usize) -> Result<Vec<(u64, u64)>, StoreError> {
    let (Some(older), Some(array)) = (&point.older, ram_array(point, index)) else { return Ok(Vec::new()) };
    let end = point.ram[index].used_bytes;
    let changes = older.differences(array)?;
    let within = changes.into_iter().filter(|change| change.offset < end);
    Ok(within.map(|Change { offset, bytes, .. }| (offset, bytes.min(end - offset))).collect())
}

/// The clusters of a disk that are other than in the standby's image; none of the newest point.
pub fn clusters(point: &RecoveryPoint, disk: usize) -> Result<Vec<u64>, StoreError> {
    let Some(older) = &point.older else { return Ok(Vec::new()) };
    let end = point.disks[disk].size_bytes;
    let mut clusters = Vec::new();
    for Change { offset, bytes, .. } in older.differences(Array::Disk(disk as u16))? {
        let last = (offset + bytes).min(end).div_ceil(CLUSTER_BYTES);
        let next = clusters.last().map_or(0, |last| last + 1);
        clusters.extend((offset / CLUSTER_BYTES).max(next)..last);
    }
    Ok(clusters)
}

/// Pages of a RAM block as the save image takes them.
pub struct Patches {
    reader: Arc<PointReader>,
    array: Array,
    ranges: Vec<(u64, u64)>,
    range: usize,
    done: u64,
}

impl Patches {
    /// Those of `ranges`; nothing where there is nothing to patch.
    pub fn new(point: &RecoveryPoint, index: usize, ranges: Vec<(u64, u64)>) -> Option<Self> {
        let (reader, array) = (point.older.clone()?, ram_array(point, index)?);
        Some(Patches { reader, array, ranges, range: 0, done: 0 })
    }
}

impl Patch for Patches {
    fn next(&mut self, page: &mut [u8; PAGE_BYTES]) -> io::Result<Option<u64>> {
        while let Some((offset, bytes)) = self.ranges.get(self.range) {
            if self.done < *bytes {
                let at = offset + self.done;
                self.done += PAGE_BYTES as u64;
                self.reader.read(self.array, at, page).map_err(io::Error::other)?;
                return Ok(Some(at));
            }
            self.range += 1;
            self.done = 0;
        }
        Ok(None)
    }
}

/// An array from its beginning to its end.
struct Whole {
    reader: Arc<PointReader>,
    array: Array,
    at: u64,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.reader.length(self.array).saturating_sub(self.at);
        let now = (buffer.len() as u64).min(left) as usize;
        self.reader.read(self.array, self.at, &mut buffer[..now]).map_err(io::Error::other)?;
        self.at += now as u64;
        Ok(now)
    }
}

/// The number in the layout of a RAM block of the point.
fn ram_array(point: &RecoveryPoint, index: usize) -> Option<Array> {
    let name = &point.ram[index].name;
    let number = point.layout.ram.iter().position(|block| block.used_bytes > 0 && block.name == *name)?;
    Some(Array::Ram(number as u16))
}
