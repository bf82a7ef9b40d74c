//! What the standby of a domain consists of, and hashes of its content, for an agent that resyncs.
//!
//! The standby stands still meanwhile: a resync is an epoch of many parts, and none of it is applied before its last.
//! Hashes of what is damaged are such that nothing has them: so it is sent again.
//! An agent says which epoch it compares with, so that a standby that has moved on is noticed.

use tonic::Status;
use vmdr_proto::replication::{DescribeReply, HashesReply, HashesRequest, hashes_request};
use vmdr_proto::{GRANULE_BYTES, HASHES_MAX, PAGE_BYTES};

use crate::store::{Array, RecoveryPoint, Store, StoreError};

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
    let (array, unit) = image(&point, request)?;
    let beyond = || Status::invalid_argument(format!("unit {} lies beyond any image", request.first));
    request.first.checked_mul(unit as u64).and_then(|at| at.checked_add(1 << 40)).ok_or_else(beyond)?;
    let units = request.units as usize;
    let hashes =
        store.hashes(&request.domain_uuid, request.epoch, array, request.first, units, unit).map_err(status)?;
    Ok(HashesReply { hashes: hashes.into_iter().flat_map(u128::to_le_bytes).collect() })
}

fn image(point: &RecoveryPoint, request: &HashesRequest) -> Result<(Array, usize), Status> {
    let missing = |what: &str, number: u32| Status::not_found(format!("the standby has no {what} {number}"));
    let layout = &point.layout;
    let number = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    match request.of {
        Some(hashes_request::Of::RamBlock(n)) => {
            let block = layout.ram.get(n as usize).filter(|block| block.used_bytes > 0);
            block.map(|_| (Array::Ram(number(n)), PAGE_BYTES)).ok_or_else(|| missing("RAM block", n))
        }
        Some(hashes_request::Of::Disk(n)) => {
            let disk = layout.disks.get(n as usize);
            disk.map(|_| (Array::Disk(number(n)), GRANULE_BYTES as usize)).ok_or_else(|| missing("disk", n))
        }
        None => Err(Status::invalid_argument("neither a RAM block nor a disk is named")),
    }
}

fn status(error: StoreError) -> Status {
    Status::failed_precondition(error.to_string())
}
