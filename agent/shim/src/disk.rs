//! A disk as QEMU's mirror job writes it: the log of what was written since the last cut.
//!
//! The mirror copies with synchronous writes: once it is ready, every guest write is answered here before the guest
//! sees it done. So at a pause the log holds exactly the epoch's writes, in an order that may be replayed.
//!
//! Data goes straight from the socket into the arena. When there is no room for it, the write is answered all the
//! same and only its place is remembered ("behind"): what it wrote is read from the guest's disk later. Nothing here
//! waits for the agent or the network.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmdr_proto::GRANULE_BYTES;

use crate::arena::{Arena, Chunk};
use crate::bitmap::Bitmap;
use crate::nbd::{Capabilities, Export, ExportError, Extent, WriteError};

/// Entries a log may have (64 bytes each); writes beyond are remembered.
const OPS_MAX: usize = 256 << 10;

/// One write, in the order of completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where the data lies in the arena; nothing: zeros.
    pub arena_offset: Option<u64>,
}

/// What was logged up to some instant.
#[derive(Debug, Default)]
pub struct Taken {
    /// The writes, to be applied in order.
    pub ops: Vec<Op>,
    /// Arena chunks of which all data belongs to these or earlier writes.
    pub chunks: Vec<Chunk>,
}

#[derive(Debug)]
struct Log {
    taken: Taken,
    /// The chunk being filled and how far. It is handed over with the log in which it becomes full, which is
    /// released after all logs that have writes in it.
    current: Option<(Chunk, usize)>,
    remembered: Bitmap,
}

/// One disk of the domain.
#[derive(Debug)]
pub struct Disk {
    target: String,
    size_bytes: u64,
    arena: Arena,
    /// Free arena bytes below which data is not kept: the rest is for the cut.
    reserve_bytes: u64,
    log: Mutex<Log>,
    sessions: AtomicU64,
    connected: AtomicU64,
    written_bytes: AtomicU64,
    last_written: AtomicU64,
}

impl Disk {
    /// A disk of which nothing is known yet.
    pub fn new(target: &str, size_bytes: u64, arena: Arena, reserve_bytes: u64) -> Self {
        let remembered = Bitmap::new(size_bytes.div_ceil(GRANULE_BYTES));
        Self {
            target: target.to_owned(),
            size_bytes,
            arena,
            reserve_bytes,
            log: Mutex::new(Log { taken: Taken::default(), current: None, remembered }),
            sessions: AtomicU64::new(0),
            connected: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            last_written: AtomicU64::new(0),
        }
    }

    /// Its target name in the domain XML.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Its virtual size.
    pub fn size(&self) -> u64 {
        self.size_bytes
    }

    /// How many NBD sessions there have been, and how many there are.
    pub fn sessions(&self) -> (u64, u64) {
        (self.sessions.load(Ordering::Relaxed), self.connected.load(Ordering::Relaxed))
    }

    /// Bytes written since the shim started.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// Where data was written last: a place at which the guest's disk has something. 0 before that.
    pub fn last_written(&self) -> u64 {
        self.last_written.load(Ordering::Relaxed)
    }

    /// Bytes known to be dirty of which the data is not held.
    pub fn remembered_bytes(&self) -> u64 {
        self.log().remembered.count() * GRANULE_BYTES
    }

    /// Whether the whole disk is to be read, so that the log is void.
    pub fn is_remembered(&self) -> bool {
        let log = self.log();
        log.remembered.count() == log.remembered.len()
    }

    /// Bytes of data in the log.
    pub fn log_bytes(&self) -> u64 {
        self.log().taken.ops.iter().filter(|op| op.arena_offset.is_some()).map(|op| op.length).sum()
    }

    /// Takes the log; a new one begins.
    pub fn take(&self) -> Taken {
        std::mem::take(&mut self.log().taken)
    }

    /// Takes the log and the remembered granules, in one instant: from now on data is kept again, if there is room.
    /// Where the whole disk is remembered, what was logged is void: all of it will be read.
    pub fn take_all(&self) -> (Taken, Bitmap) {
        let mut log = self.log();
        if log.remembered.count() == log.remembered.len() {
            log.taken.ops.clear();
        }
        let empty = Bitmap::new(log.remembered.len());
        let remembered = std::mem::replace(&mut log.remembered, empty);
        (std::mem::take(&mut log.taken), remembered)
    }

    /// Forgets the log; the whole disk is to be read.
    pub fn remember_everything(&self) {
        let mut log = self.log();
        log.taken = Taken::default();
        log.remembered.fill();
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // Every change of the log is one push or one replacement, so it is valid after a panic elsewhere.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, log: &mut Log, offset: u64, length: u64) {
        let first = offset / GRANULE_BYTES;
        log.remembered.insert(first, (offset + length).div_ceil(GRANULE_BYTES) - first);
    }

    /// A chunk with room, and how far it is filled; nothing when the arena is low or the log long.
    fn space(&self) -> Option<(Chunk, usize)> {
        let mut log = self.log();
        if log.taken.ops.len() >= OPS_MAX {
            return None;
        }
        if let Some((chunk, filled)) = log.current.take() {
            if filled < chunk.len() {
                return Some((chunk, filled));
            }
            log.taken.chunks.push(chunk);
        }
        if self.arena.free_bytes() <= self.reserve_bytes {
            return None;
        }
        Some((self.arena.take()?, 0))
    }
}

impl Export for Disk {
    fn name(&self) -> &str {
        &self.target
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: false,
            write: true,
            // A trimmed range would read as anything: the standby could not be compared any more.
            trim: false,
            fast_zero: true,
            block_status: false,
            multi_connection: false,
            block_bytes_min: 1,
        }
    }

    fn read(&self, _offset: u64, _buf: &mut [u8]) -> Result<(), ExportError> {
        Err(ExportError::Permission(format!("{} is a mirror's target and cannot be read", self.target)))
    }

    fn write_from(&self, offset: u64, length: u32, source: &mut dyn Read) -> Result<(), WriteError> {
        let mut at = offset;
        let end = offset + u64::from(length);
        while at < end {
            let Some((mut chunk, filled)) = self.space() else { break };
            let n = (end - at).min((chunk.len() - filled) as u64);
            let result = source.read_exact(&mut chunk.bytes_mut()[filled..filled + n as usize]);
            let arena_offset = Some(chunk.offset() + filled as u64);
            let mut log = self.log();
            // The chunk has to go back also when the payload broke off: earlier writes lie in it.
            if let Some((other, _)) = log.current.replace((chunk, filled + n as usize)) {
                log.taken.chunks.push(other);
            }
            result.map_err(WriteError::Source)?;
            log.taken.ops.push(Op { offset: at, length: n, arena_offset });
            at += n;
        }
        if at < end {
            io::copy(&mut source.take(end - at), &mut io::sink()).map_err(WriteError::Source)?;
            self.remember(&mut self.log(), at, end - at);
        }
        self.written_bytes.fetch_add(u64::from(length), Ordering::Relaxed);
        self.last_written.store(offset, Ordering::Relaxed);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _may_unmap: bool, _fast: bool) -> Result<(), ExportError> {
        let mut log = self.log();
        if log.taken.ops.len() < OPS_MAX {
            log.taken.ops.push(Op { offset, length, arena_offset: None });
        } else {
            self.remember(&mut log, offset, length);
        }
        Ok(())
    }

    fn trim(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Err(ExportError::Unsupported(format!("{} does not take TRIM", self.target)))
    }

    fn flush(&self) -> Result<(), ExportError> {
        // What is logged becomes durable with its epoch, at the receiver; the guest's own disk is flushed by QEMU.
        Ok(())
    }

    fn extents(&self, _offset: u64, length: u64, _limit: usize) -> Result<Vec<Extent>, ExportError> {
        Ok(vec![Extent { length, hole: false, zero: false }])
    }

    fn connected(&self, _session: u64) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        self.connected.fetch_add(1, Ordering::Relaxed);
    }

    fn disconnected(&self, _session: u64) {
        self.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use rand::prelude::*;

    use super::*;
    use crate::arena::CHUNK_BYTES;

    const SIZE: usize = 4 << 20;

    fn replay(arena_bytes: &dyn Fn(u64, usize) -> Vec<u8>, taken: &Taken, image: &mut [u8]) {
        for op in &taken.ops {
            let place = op.offset as usize..(op.offset + op.length) as usize;
            match op.arena_offset {
                Some(at) => image[place].copy_from_slice(&arena_bytes(at, op.length as usize)),
                None => image[place].fill(0),
            }
        }
    }

    /// Writes at random, with an arena so small that it keeps running full; catches up as the capture does.
    #[test]
    fn log_then_reads_then_log_gives_the_disk_whatever_did_not_fit() {
        for seed in 0..20 {
            let mut rng = StdRng::seed_from_u64(seed);
            let arena = Arena::new(4 * CHUNK_BYTES as u64).unwrap();
            let map = std::fs::File::open(format!("/proc/self/fd/{}", arena.fd_number())).unwrap();
            let read = |at: u64, length: usize| {
                let mut bytes = vec![0; length];
                std::os::unix::fs::FileExt::read_exact_at(&map, &mut bytes, at).unwrap();
                bytes
            };
            let disk = Disk::new("vda", SIZE as u64, arena, CHUNK_BYTES as u64);
            let mut truth = vec![0_u8; SIZE];
            let mut standby = vec![0_u8; SIZE];
            let mut held = Vec::new();
            for _ in 0..30 {
                for _ in 0..rng.random_range(0..20) {
                    let offset = rng.random_range(0..SIZE);
                    let length = rng.random_range(1..=(SIZE - offset).min(300_000));
                    if rng.random_bool(0.2) {
                        truth[offset..offset + length].fill(0);
                        disk.zero(offset as u64, length as u64, true, true).unwrap();
                    } else {
                        let mut data = vec![0; length];
                        rng.fill_bytes(&mut data);
                        disk.write_from(offset as u64, length as u32, &mut data.as_slice()).unwrap();
                        truth[offset..offset + length].copy_from_slice(&data);
                    }
                }
                let (taken, remembered) = disk.take_all();
                replay(&read, &taken, &mut standby);
                held.push(taken);
                for (first, count) in remembered.runs() {
                    let start = first as usize * GRANULE_BYTES as usize;
                    let end = (start + count as usize * GRANULE_BYTES as usize).min(SIZE);
                    standby[start..end].copy_from_slice(&truth[start..end]);
                }
                if rng.random_bool(0.5) {
                    held.clear();
                }
                assert!(standby == truth, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_payload_that_breaks_off_is_no_write() {
        let arena = Arena::new(2 * CHUNK_BYTES as u64).unwrap();
        let disk = Disk::new("vda", SIZE as u64, arena, 0);
        disk.write_from(0, 10, &mut [1; 10].as_slice()).unwrap();
        assert!(matches!(disk.write_from(0, 10, &mut [2; 9].as_slice()), Err(WriteError::Source(_))));
        assert_eq!(disk.take().ops.len(), 1);
    }
}
