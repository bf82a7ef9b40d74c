//! A block device without a file system that is written with O_DIRECT, trimmed and zeroed in random order, and of which every
//! region is known: what was written there last, or zeros, or nothing (after a TRIM the content is undefined).

use crate::aligned::Aligned;
use crate::ioctl;
use crate::stamp::{self, Area, mix};
use crate::workers::Worker;
use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// What is written, trimmed or zeroed as a unit. Not a multiple of vmdr's 64 KiB, so that neighbours share one.
const REGION_BYTES: usize = 24 << 10;
/// The most regions of a device that are used: 12 MiB.
const REGIONS_MAX: u64 = 512;
/// The most neighbouring regions in one step.
const RUN_REGIONS_MAX: u64 = 5;
/// Between two steps: a few hundred a second are enough.
const REST: Duration = Duration::from_millis(3);
/// How long the guest's kernel may take to find a device.
const FOUND_MAX: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Undefined,
    Zeros,
    Write(u64),
}

/// One device.
pub struct Scratch {
    path: String,
    file: File,
    held: Vec<Held>,
    buffer: Aligned,
    writes: u64,
    random: u64,
}

impl Scratch {
    /// Opens a device; nothing is known of its content.
    pub fn open(path: &Path, seed: u64) -> Result<Self> {
        let name = path.display().to_string();
        let mut file = open(path).with_context(|| format!("open {name} with O_DIRECT"))?;
        let bytes = file.seek(SeekFrom::End(0)).with_context(|| format!("size {name}"))?;
        let regions = (bytes / REGION_BYTES as u64).min(REGIONS_MAX);
        if regions < RUN_REGIONS_MAX {
            bail!("{name} is too small: {bytes} bytes");
        }
        let buffer = Aligned::new(REGION_BYTES * RUN_REGIONS_MAX as usize);
        let held = vec![Held::Undefined; regions as usize];
        Ok(Self { path: name, file, held, buffer, writes: 0, random: mix(seed) })
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random = mix(self.random);
        self.random % limit
    }

    fn write(&mut self, first: usize, run: usize, offset: u64) -> Result<()> {
        self.writes += 1;
        let bytes = run * REGION_BYTES;
        for (step, region) in self.buffer[..bytes].chunks_mut(REGION_BYTES).enumerate() {
            let number = (first + step) as u64;
            stamp::write(region, Area::Scratch, number, self.writes, fill_bytes());
        }
        self.file.write_all_at(&self.buffer[..bytes], offset).context("write")
    }
}

/// Devices of some buses are found in the background.
fn open(path: &Path) -> io::Result<File> {
    let until = Instant::now() + FOUND_MAX;
    loop {
        match OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < until => thread::sleep(REST),
            opened => return opened,
        }
    }
}

fn fill_bytes() -> usize {
    REGION_BYTES - (crate::aligned::PAGE_BYTES - stamp::FILL_BYTES_MAX)
}

impl Worker for Scratch {
    fn step(&mut self) -> Result<()> {
        thread::sleep(REST);
        let run = 1 + self.below(RUN_REGIONS_MAX) as usize;
        let first = self.below((self.held.len() - run + 1) as u64) as usize;
        let (offset, length) = ((first * REGION_BYTES) as u64, (run * REGION_BYTES) as u64);
        let range = first..first + run;
        let what = self.below(8);
        let doing = || format!("{} at {offset} for {length} bytes", self.path);
        match what {
            0 => {
                // A device without TRIM says so; then nothing happened.
                match ioctl::discard(&self.file, offset, length) {
                    Ok(()) => self.held[range].fill(Held::Undefined),
                    Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                    Err(error) => return Err(error).with_context(|| format!("trim {}", doing())),
                }
            }
            1 | 2 => {
                ioctl::zero(&self.file, offset, length).with_context(|| format!("zero {}", doing()))?;
                self.held[range].fill(Held::Zeros);
            }
            3 => self.file.sync_data().with_context(|| format!("flush {}", self.path))?,
            _ => {
                let path = self.path.clone();
                self.write(first, run, offset).with_context(|| format!("{path} at {offset}"))?;
                self.held[range].fill(Held::Write(self.writes));
            }
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        for region in 0..self.held.len() {
            let bytes = &mut self.buffer[..REGION_BYTES];
            let offset = (region * REGION_BYTES) as u64;
            self.file.read_exact_at(bytes, offset).with_context(|| format!("read {} at {offset}", self.path))?;
            match self.held[region] {
                Held::Undefined => {}
                Held::Zeros => {
                    if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                        bail!("{} was zeroed at {offset} and is not zero {at} bytes from there", self.path);
                    }
                }
                Held::Write(write) => {
                    if let Err(bad) = stamp::check(bytes, Area::Scratch, region as u64, write, fill_bytes()) {
                        bail!("{} at {offset} {bad}", self.path);
                    }
                }
            }
        }
        Ok(())
    }
}
