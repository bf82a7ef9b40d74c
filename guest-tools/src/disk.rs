//! The records on the disk: a ring of slots in one file, read for checks past the guest's page cache.
//!
//! Record N (from 1) lies in slot `N mod slots`. RAM holds only the number of the newest acknowledged record A. A disk that was
//! brought back together with that RAM has exactly the records up to A, none older in a slot and none newer: the program that
//! counts is the one that writes, so at the instant of the cut nothing beyond A can have been written except the record being
//! written then, whose completion the resumed program still sees.

use crate::aligned::Aligned;
use crate::cli::Workload;
use crate::stamp::{self, Area, Bad};
use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Blocks behind the records that the O_DIRECT readers read.
pub const READER_BLOCKS: u64 = 1024;
/// A stamp's bytes without noise.
const STAMP_BYTES: usize = crate::aligned::PAGE_BYTES - stamp::FILL_BYTES_MAX;

/// The ring of records.
pub struct Disk {
    writer: File,
    reader: File,
    slots: u64,
    buffer: Aligned,
    fsync: bool,
    acknowledged: u64,
}

/// Opens a file for reading past the page cache.
pub fn open_direct(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .with_context(|| format!("open {} with O_DIRECT", path.display()))
}

/// Where the readers' blocks begin.
pub fn reader_offset(options: &Workload) -> u64 {
    options.records * options.record_bytes as u64
}

impl Disk {
    /// Opens the ring, creating it where it is missing. Records found in it (from before a reboot) are counted on from.
    pub fn open(path: &Path, options: &Workload) -> Result<Self> {
        if options.records == 0 || options.record_bytes == 0 || !options.record_bytes.is_multiple_of(4096) {
            bail!("records must be a positive multiple of 4096 bytes, and one at least");
        }
        let flags = if options.direct { libc::O_DIRECT } else { 0 };
        let writer = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(flags)
            .open(path)
            .with_context(|| format!("open {} for the records", path.display()))?;
        let bytes = reader_offset(options) + READER_BLOCKS * 4096;
        if writer.metadata().context("read the record file's size")?.len() < bytes {
            // A block device cannot be made longer: it is too small then, which set_len tells.
            writer.set_len(bytes).context("set the record file's size")?;
            writer.sync_all().context("flush the record file")?;
        }
        let buffer = Aligned::new(options.record_bytes);
        let reader = open_direct(path)?;
        let fsync = !options.no_fsync;
        let mut disk = Self { writer, reader, slots: options.records, buffer, fsync, acknowledged: 0 };
        disk.acknowledged = disk.newest()?;
        if options.readers > 0 {
            disk.write_reader_blocks(reader_offset(options))?;
        }
        Ok(disk)
    }

    fn write_reader_blocks(&self, offset: u64) -> Result<()> {
        let mut block = Aligned::new(4096);
        for number in 0..READER_BLOCKS {
            stamp::write(&mut block, Area::Reader, number, number, stamp::FILL_BYTES_MAX);
            self.writer.write_all_at(&block, offset + number * 4096).context("write the readers' blocks")?;
        }
        self.writer.sync_all().context("flush the readers' blocks")
    }

    fn fill_bytes(&self) -> usize {
        self.buffer.len() - STAMP_BYTES
    }

    fn load(&mut self, slot: u64) -> Result<()> {
        let offset = slot * self.buffer.len() as u64;
        self.reader.read_exact_at(&mut self.buffer, offset).with_context(|| format!("read disk record slot {slot}"))
    }

    fn newest(&mut self) -> Result<u64> {
        let mut newest = 0;
        for slot in 0..self.slots {
            self.load(slot)?;
            if let Ok(record) = stamp::read(&self.buffer, Area::Record, slot, self.fill_bytes()) {
                newest = newest.max(record);
            }
        }
        Ok(newest)
    }

    /// The newest record that was written whole.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Writes the next record and only then counts it as acknowledged. The slot must still hold what lay there a ring ago:
    /// a newer record in it would mean that the disk is ahead of RAM.
    pub fn write_next(&mut self) -> Result<u64> {
        let record = self.acknowledged + 1;
        let slot = record % self.slots;
        self.load(slot)?;
        self.expect(slot, record.saturating_sub(self.slots))?;
        let fill_bytes = self.fill_bytes();
        stamp::write(&mut self.buffer, Area::Record, slot, record, fill_bytes);
        let offset = slot * self.buffer.len() as u64;
        self.writer.write_all_at(&self.buffer, offset).with_context(|| format!("write disk record {record}"))?;
        if self.fsync {
            self.writer.sync_data().with_context(|| format!("fsync disk record {record}"))?;
        }
        self.acknowledged = record;
        Ok(record)
    }

    /// Checks the loaded slot for a record; 0 stands for a slot that was never written.
    fn expect(&self, slot: u64, record: u64) -> Result<()> {
        let result = match record {
            0 => match stamp::read(&self.buffer, Area::Record, slot, self.fill_bytes()) {
                Err(Bad::Magic(0)) => Ok(()),
                Err(bad) => Err(bad),
                Ok(found) => Err(Bad::Sequence { found, expected: 0 }),
            },
            _ => stamp::check(&self.buffer, Area::Record, slot, record, self.fill_bytes()),
        };
        if let Err(bad) = result {
            bail!("disk record slot {slot} {bad} (RAM has acknowledged {})", self.acknowledged);
        }
        Ok(())
    }

    /// Checks that every slot holds exactly the record that RAM has acknowledged for it.
    pub fn check(&mut self) -> Result<()> {
        for slot in 0..self.slots {
            self.load(slot)?;
            // The newest record up to the acknowledged one that lies in this slot; 0: none yet.
            let back = (self.acknowledged % self.slots + self.slots - slot) % self.slots;
            self.expect(slot, self.acknowledged.saturating_sub(back))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    struct TempFile(std::path::PathBuf);
    impl Drop for TempFile {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn ring(name: &str) -> (TempFile, Workload, Disk) {
        // Not in /tmp, which may be a tmpfs without O_DIRECT.
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/guest-{name}-{}", std::process::id()));
        let words = ["tools", "workload", "--records", "8", "--record-bytes", "8192", "--direct", "--readers", "1"];
        let crate::cli::Command::Workload(options) = crate::cli::Cli::parse_from(words).command else {
            panic!("parse")
        };
        let disk = Disk::open(&path, &options).unwrap();
        (TempFile(path), options, disk)
    }

    #[test]
    fn records_are_found_again_and_counted_on_from() {
        let (file, options, mut disk) = ring("again");
        disk.check().unwrap();
        for record in 1..=21 {
            assert_eq!(disk.write_next().unwrap(), record);
            disk.check().unwrap();
        }
        let mut again = Disk::open(&file.0, &options).unwrap();
        assert_eq!(again.acknowledged(), 21);
        again.check().unwrap();
    }

    #[test]
    fn a_disk_behind_or_ahead_of_ram_is_found() {
        for records in [3, 30] {
            let (_file, _, mut disk) = ring(&format!("ahead{records}"));
            (0..records).for_each(|_| assert!(disk.write_next().is_ok()));
            disk.acknowledged += 1;
            assert!(disk.check().is_err(), "behind");
            disk.acknowledged -= 2;
            assert!(disk.check().is_err(), "ahead");
            assert!(disk.write_next().is_err(), "ahead, at the next write");
        }
    }
}
