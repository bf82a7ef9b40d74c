//! Work of a fixed amount: what it takes, by a clock outside of the guest, says what protection costs.
//!
//! Three kinds in turn, for ever, one line each when it begins and when it ends: *cpu* hashes a buffer that stays in a cache,
//! *memory* writes to every page of an area, *disk* writes records and syncs each. No clock of the guest is involved: it stands
//! still in every pause.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::aligned::{Aligned, PAGE_BYTES};
use crate::cli::Job;

/// Hashed again and again: no larger than a first-level cache.
const BUFFER_BYTES: usize = 16 << 10;
/// Bytes of a record.
const RECORD_BYTES: usize = 16 << 10;
/// Records after which the file is written from its beginning again.
const RECORDS_MAX: u64 = 512;

/// Works until the process is ended.
pub fn run(options: &Job) -> Result<()> {
    let buffer = vec![7_u8; BUFFER_BYTES];
    let mut area = Aligned::new(options.memory_mib.max(1) << 20);
    let disk = match &options.disk {
        Some(path) => Some(File::create(path).with_context(|| format!("create {}", path.display()))?),
        None => None,
    };
    if let Some(file) = &disk {
        // So that a record never changes the file's size.
        file.write_all_at(&vec![1; RECORD_BYTES * RECORDS_MAX as usize], 0).context("make the job's file")?;
        file.sync_all().context("sync the job's file")?;
    }
    say("job ready");
    for round in 0_u64.. {
        say("job begins cpu");
        let mut hash = round;
        for _ in 0..(options.cpu_mib << 20) / BUFFER_BYTES as u64 {
            hash = xxh3_64_with_seed(black_box(&buffer), hash);
        }
        black_box(hash);
        say("job ends cpu");
        say("job begins memory");
        for pass in 0..options.memory_rounds {
            for page in area.chunks_mut(PAGE_BYTES) {
                page[..8].copy_from_slice(&(hash ^ pass).to_le_bytes());
            }
            black_box(&mut area);
        }
        say("job ends memory");
        let Some(file) = &disk else { continue };
        say("job begins disk");
        let record = vec![round as u8; RECORD_BYTES];
        for number in 0..options.disk_records {
            let slot = (round * options.disk_records + number) % RECORDS_MAX;
            file.write_all_at(&record, slot * RECORD_BYTES as u64).context("write a record")?;
            file.sync_data().context("sync a record")?;
        }
        say("job ends disk");
    }
    Ok(())
}

/// A line on the console, whole and at once. A console that cannot be written to must not end the work.
fn say(line: &str) {
    let mut console = std::io::stdout().lock();
    let _ = writeln!(console, "{line}");
    let _ = console.flush();
}
