//! What the standby of a domain consists of, and hashes of its content, for an agent that resyncs.
//!
//! The standby stands still meanwhile: a resync is an epoch of many parts, and none of it is applied before its last.
//! An agent says which epoch it compares with, so that a standby that has moved on is noticed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tonic::Status;
use vmdr_proto::replication::{DescribeReply, HashesReply, HashesRequest, hashes_request};
use vmdr_proto::{GRANULE_BYTES, HASHES_MAX, PAGE_BYTES};
use xxhash_rust::xxh3::xxh3_128;

use crate::store::{RecoveryPoint, Store, StoreError};

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;

/// What is there of a domain.
pub fn describe(store: &Store, uuid: &str) -> Result<DescribeReply, Status> {
    let point = store.recovery_point(uuid).map_err(status)?;
    let layout = point.layout.to_bytes().map_err(|error| Status::data_loss(error.to_string()))?;
    let position = store.position(uuid).map_err(status)?;
    Ok(DescribeReply { position: Some(position.into()), layout })
}

/// Hashes of neighbouring units.
pub fn hashes(store: &Store, request: &HashesRequest) -> Result<HashesReply, Status> {
    if request.units == 0 || request.units > HASHES_MAX {
        return Err(Status::invalid_argument(format!(
            "{} units asked for, 1 to {HASHES_MAX} are possible",
            request.units
        )));
    }
    let point = store.recovery_point(&request.domain_uuid).map_err(status)?;
    if point.epoch != request.epoch {
        let message = format!("the standby is at epoch {}, not {}", point.epoch, request.epoch);
        return Err(Status::failed_precondition(message));
    }
    let (path, unit) = image(&point, request)?;
    let start = request.first.checked_mul(unit as u64);
    let start =
        start.ok_or_else(|| Status::invalid_argument(format!("unit {} lies beyond any image", request.first)))?;
    let hashes = hash(&path, start, unit, request.units as usize)
        .map_err(|error| Status::data_loss(format!("read {}: {error}", path.display())))?;
    Ok(HashesReply { hashes })
}

fn image(point: &RecoveryPoint, request: &HashesRequest) -> Result<(std::path::PathBuf, usize), Status> {
    let missing = |what: &str, number: u32| Status::not_found(format!("the standby has no {what} {number}"));
    match request.of {
        Some(hashes_request::Of::RamBlock(number)) => {
            let block = point.layout.ram.get(number as usize).filter(|block| block.used_bytes > 0);
            let block = block.ok_or_else(|| missing("RAM block", number))?;
            let image = point.ram.iter().find(|image| image.name == block.name);
            Ok((image.ok_or_else(|| missing("RAM block", number))?.path.clone(), PAGE_BYTES))
        }
        Some(hashes_request::Of::Disk(number)) => {
            let disk = point.disks.get(number as usize).ok_or_else(|| missing("disk", number))?;
            Ok((disk.path.clone(), GRANULE_BYTES as usize))
        }
        None => Err(Status::invalid_argument("neither a RAM block nor a disk is named")),
    }
}

fn hash(path: &Path, start: u64, unit: usize, units: usize) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut buffer = vec![0; READ_BYTES / unit * unit];
    let per_read = buffer.len() / unit;
    let mut hashes = Vec::with_capacity(units * vmdr_proto::HASH_BYTES);
    let mut done = 0;
    while done < units {
        let n = per_read.min(units - done);
        let wanted = &mut buffer[..n * unit];
        wanted.fill(0);
        read_to_end(&file, wanted, start.saturating_add((done * unit) as u64))?;
        for piece in wanted.chunks_exact(unit) {
            hashes.extend_from_slice(&xxh3_128(piece).to_le_bytes());
        }
        done += n;
    }
    Ok(hashes)
}

/// Reads what there is; the rest of `into` stays as it is.
fn read_to_end(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    let mut got = 0;
    while got < into.len() {
        match file.read_at(&mut into[got..], at.saturating_add(got as u64)) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn status(error: StoreError) -> Status {
    Status::failed_precondition(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_hashed_one_by_one_and_what_lies_beyond_is_zero() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let bytes: Vec<u8> = (0..3 * PAGE_BYTES + 100).map(|i| (i / 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let hashes = hash(&path, PAGE_BYTES as u64, PAGE_BYTES, 5).unwrap();
        let mut padded = bytes.clone();
        padded.resize(6 * PAGE_BYTES, 0);
        let expected: Vec<u8> =
            padded[PAGE_BYTES..].chunks(PAGE_BYTES).flat_map(|page| xxh3_128(page).to_le_bytes()).collect();
        assert_eq!(hashes, expected);
    }
}
