//! The disk under the store, seen from below it, and what else there is to measure on it.

use std::fs::File as StdFile;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmdr_codec::PAGE_BYTES;
use vmdr_journal::{Disk, File, FsDisk, LockGuard, Mode};

use super::{Noise, PART_BYTES};

/// Counts the syncs of files.
#[derive(Debug, Clone, Default)]
pub struct Counting(Arc<AtomicU64>);

impl Counting {
    /// How many there were.
    pub fn syncs(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct CountingFile(Box<dyn File>, Arc<AtomicU64>);

impl Disk for Counting {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Box<dyn File>> {
        Ok(Box::new(CountingFile(FsDisk.open(path, mode)?, Arc::clone(&self.0))))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        FsDisk.create_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        FsDisk.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        FsDisk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        FsDisk.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        FsDisk.remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        FsDisk.sync_dir(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        FsDisk.free_bytes(path)
    }

    fn used_bytes(&self, path: &Path) -> io::Result<u64> {
        FsDisk.used_bytes(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        FsDisk.lock(path)
    }
}

impl File for CountingFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.0.write_at(slices, offset)
    }

    fn data_from(&self, offset: u64) -> io::Result<u64> {
        self.0.data_from(offset)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.zero(offset, length)
    }

    fn length(&self) -> io::Result<u64> {
        self.0.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.sync()
    }
}

/// Seconds that dd takes for so many MiB.
pub fn dd(directory: &Path, mib: usize) -> Result<f64> {
    let path = directory.join("dd");
    let count = mib * (1 << 20) / PART_BYTES;
    let began = Instant::now();
    let status = Command::new("dd")
        .args(["if=/dev/zero", "bs=8M", "oflag=direct", "conv=fdatasync", "status=none"])
        .arg(format!("of={}", path.display()))
        .arg(format!("count={count}"))
        .status()
        .context("run dd")?;
    let took = began.elapsed().as_secs_f64();
    ensure!(status.success(), "dd failed: does {} allow direct I/O?", directory.display());
    std::fs::remove_file(&path).context("remove dd's file")?;
    Ok(took)
}

/// Memory of this process now, bytes.
pub fn resident() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").context("read /proc/self/statm")?;
    let pages: u64 =
        text.split_whitespace().nth(1).context("statm has fields")?.parse().context("a number in statm")?;
    Ok(pages * PAGE_BYTES as u64)
}

/// Flushes that the device under `directory` has completed, of everybody; nothing where the kernel does not count them.
pub fn flushes(directory: &Path) -> Option<u64> {
    const FLUSHES: usize = 15; // The place of "flush requests completed" in the device's stat.
    let device = rustix::fs::stat(directory).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    text.split_whitespace().nth(FLUSHES)?.parse().ok()
}

/// Somebody else who writes to the same file system, as applying does: random pages of a file of 512 MiB, never synced.
#[derive(Debug)]
pub struct Beside {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Beside {
    const FILE_PAGES: u64 = 1 << 17;
    /// Between two bursts.
    const STEP: Duration = Duration::from_millis(100);

    pub fn begin(directory: &Path, mib_per_s: u64) -> Result<Self> {
        let file = StdFile::create(directory.join("beside")).context("make a file to write to beside")?;
        let over = Arc::new(AtomicBool::new(false));
        let pages = mib_per_s * (1 << 20) / PAGE_BYTES as u64 / 10;
        let stop = Arc::clone(&over);
        let write = move || {
            let mut noise = Noise(11);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..pages {
                    file.write_all_at(&[3; PAGE_BYTES], noise.next() % Self::FILE_PAGES * PAGE_BYTES as u64)?;
                }
                std::thread::sleep(Self::STEP);
            }
            Ok(())
        };
        Ok(Self { over, thread: Some(std::thread::spawn(write)) })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // What it could not write is no more than a disk that was less busy.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
