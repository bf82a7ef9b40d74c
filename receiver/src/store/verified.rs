//! When points were last found to be whole: `verified` in the domain's directory, see `docs/journal.md`. Only a note: one
//! that cannot be read is as good as none.

use std::collections::BTreeMap;
use std::path::Path;

use vmdr_journal::{Disk, JournalError};

use super::catalog::PointId;
use super::standby::{read_small, write_aside};

const FILE: &str = "verified";
const MAGIC: &[u8; 8] = b"VMDRVER\0";
const ENTRY_BYTES: usize = 24;
/// The largest file read: some 40,000 points.
const BYTES_MAX: u64 = 1 << 20;

pub(super) fn read(disk: &dyn Disk, dir: &Path) -> BTreeMap<PointId, u64> {
    let bytes = read_small(disk, &dir.join(FILE), BYTES_MAX).unwrap_or_default();
    parse(&bytes).unwrap_or_default()
}

/// Whether the file can be read.
pub(super) fn is_good(disk: &dyn Disk, dir: &Path) -> bool {
    read_small(disk, &dir.join(FILE), BYTES_MAX).is_ok_and(|bytes| parse(&bytes).is_some())
}

fn parse(bytes: &[u8]) -> Option<BTreeMap<PointId, u64>> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(8)?)?;
    let entries = body.strip_prefix(MAGIC)?;
    if sum != vmdr_codec::chunk_hash(body).to_le_bytes() || entries.len() % ENTRY_BYTES != 0 {
        return None;
    }
    let number = |at: &[u8]| at.try_into().map(u64::from_le_bytes).ok();
    entries
        .chunks_exact(ENTRY_BYTES)
        .map(|e| Some((PointId { generation: number(&e[..8])?, epoch: number(&e[8..16])? }, number(&e[16..])?)))
        .collect()
}

pub(super) fn write(disk: &dyn Disk, dir: &Path, all: &BTreeMap<PointId, u64>) -> Result<(), JournalError> {
    let numbers = all.iter().flat_map(|(id, unix_ns)| [id.generation, id.epoch, *unix_ns]);
    let mut bytes = MAGIC.to_vec();
    bytes.extend(numbers.flat_map(u64::to_le_bytes));
    let sum = vmdr_codec::chunk_hash(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    write_aside(disk, &dir.join(FILE), &bytes)?;
    disk.sync_dir(dir).map_err(JournalError::io("sync", dir))
}
