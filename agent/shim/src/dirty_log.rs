//! The dirty log of a guest's memory: which pages were written since the last cut, over all RAM blocks.
//!
//! Guarantees, and what they rest on:
//! - A page that changes is reported by the next [`scan`](DirtyLog::scan), until [`protect`](DirtyLog::protect) is
//!   called on it. Protecting *consumes* the report: the caller has to remember it.
//! - [`protect`](DirtyLog::protect) may be called only while the guest is stopped and drained. A page pinned for
//!   direct I/O is written by DMA without touching the page table; protected again before that DMA has ended, it
//!   goes stale unseen.
//! - All blocks are scanned before any is protected, so that a failing scan consumes nothing.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::Context;
use vmdr_proto::PAGE_BYTES;

use crate::inject::{self, Origin};
use crate::procmem::ProcessMemory;
use crate::ramblock::RamBlock;
use crate::uffd::{Pagemap, Pages, Uffd};

/// Memory protected by one call. Smaller: more calls; larger: more of KVM's mappings dropped. A multiple of every page
/// size but 1 GiB, of which the kernel protects the whole page.
const WINDOW_BYTES: u64 = 32 << 20;

/// A run of neighbouring pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the block, see [`DirtyLog::blocks`].
    pub block: usize,
    /// First page.
    pub first: u64,
    /// Number of pages.
    pub pages: u64,
}

/// A block that is, or was, part of the guest.
#[derive(Clone, Debug)]
pub struct Watched {
    /// As QEMU named and placed it last.
    pub block: RamBlock,
    /// Whether QEMU still has it.
    pub present: bool,
    /// Whether its memory is anonymous, so that what is not in the page table is known to be zero.
    anonymous: bool,
}

impl Watched {
    /// Its length in pages of [`PAGE_BYTES`], the last one perhaps not full.
    pub fn pages(&self) -> u64 {
        self.block.used_bytes.div_ceil(PAGE_BYTES as u64)
    }

    /// What is watched: whole pages of the host's mapping.
    fn watched_bytes(&self) -> u64 {
        self.block.used_bytes.next_multiple_of(self.block.page_bytes.max(PAGE_BYTES as u64))
    }
}

/// The dirty log of one QEMU process.
#[derive(Debug)]
pub struct DirtyLog {
    pid: i32,
    uffd: Uffd,
    pagemap: Pagemap,
    memory: ProcessMemory,
    blocks: Vec<Watched>,
}

impl DirtyLog {
    /// Takes (or finds) the userfaultfd of `pid`; nothing is watched yet. `helper` is this program's own binary.
    pub fn open(pid: i32, helper: &Path) -> anyhow::Result<(Self, Origin)> {
        let (uffd, origin) = inject::userfaultfd_of(pid, helper)?;
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = Pagemap::new(File::open(&path).with_context(|| format!("open {path}"))?.into());
        let memory = ProcessMemory::new(pid);
        Ok((Self { pid, uffd, pagemap, memory, blocks: Vec::new() }, origin))
    }

    /// All blocks in the order of their first appearance; indexes never change.
    pub fn blocks(&self) -> &[Watched] {
        &self.blocks
    }

    /// Brings the watch in line with the blocks QEMU has now. A block that is new, has moved, has grown or was re-made
    /// is protected as a whole; all that is in it has to be copied, and is added to `fresh`, also when another block
    /// fails afterwards. Guest stopped, but for the very first time (then a drained pause has to come before the first
    /// copy).
    pub fn follow(&mut self, now: &[RamBlock], fresh: &mut Vec<Run>) -> anyhow::Result<()> {
        let unchanged = now.len() == self.blocks.iter().filter(|watched| watched.present).count()
            && now.iter().all(|block| self.blocks.iter().any(|old| old.present && old.block == *block));
        if unchanged {
            return Ok(());
        }
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).context("read QEMU's memory map")?;
        for watched in &mut self.blocks {
            watched.present &= now.iter().any(|block| block.name == watched.block.name);
        }
        for block in now {
            let anonymous = is_anonymous(&maps, block.host_address);
            let known = self.blocks.iter().position(|old| old.block.name == block.name);
            let index = match known {
                Some(index) if self.blocks[index].present && self.blocks[index].block == *block => continue,
                Some(index) => index,
                None => {
                    self.blocks.push(Watched { block: block.clone(), present: false, anonymous });
                    self.blocks.len() - 1
                }
            };
            self.blocks[index] = Watched { block: block.clone(), present: false, anonymous };
            self.watch(index, fresh).with_context(|| format!("watch RAM block {}", block.name))?;
            if known.is_some() {
                // The receiver has an image of it, with the old content where the new one was never touched.
                fresh.push(Run { block: index, first: 0, pages: self.blocks[index].pages() });
            }
            self.blocks[index].present = true;
        }
        Ok(())
    }

    /// Every page of every block.
    pub fn whole_blocks(&self) -> Vec<Run> {
        let present = self.blocks.iter().enumerate().filter(|(_, watched)| watched.present);
        present.map(|(block, watched)| Run { block, first: 0, pages: watched.pages() }).collect()
    }

    /// Everything that may differ from zero, as if all had been written.
    pub fn everything(&mut self) -> io::Result<Vec<Run>> {
        let mut runs = Vec::new();
        for index in 0..self.blocks.len() {
            if self.blocks[index].present {
                // Twice: a page that the kernel is just moving is not there for a moment.
                self.populated(index, &mut runs)?;
                self.populated(index, &mut runs)?;
            }
        }
        Ok(runs)
    }

    /// The runs written since they were protected, in ascending order within a block. Consumes nothing.
    pub fn scan(&mut self, runs: &mut Vec<Run>) -> anyhow::Result<()> {
        runs.clear();
        let mut remade = None;
        for (index, watched) in self.blocks.iter().enumerate().filter(|(_, watched)| watched.present) {
            let start = watched.block.host_address;
            let pages = watched.pages();
            let scanned = self.pagemap.scan(start, watched.watched_bytes(), Pages::Written, |at, length| {
                let first = (at - start) / PAGE_BYTES as u64;
                let count = (length / PAGE_BYTES as u64).min(pages.saturating_sub(first));
                if count > 0 {
                    runs.push(Run { block: index, first, pages: count });
                }
            });
            if let Err(error) = scanned {
                remade = Some((index, error));
                break;
            }
        }
        if let Some((index, error)) = remade {
            // Its memory was re-made under the same name: the next look at the blocks watches it anew, as a whole.
            self.blocks[index].present = false;
            return Err(error).with_context(|| format!("scan RAM block {}", self.blocks[index].block.name));
        }
        Ok(())
    }

    /// Protects what a scan found, and anything written near it since; `runs` is then what was protected. Guest stopped
    /// and drained. When it fails, what was protected until then is in `runs` all the same.
    ///
    /// One call per stretch of [`WINDOW_BYTES`] in which there is something, not one per run: a call costs some
    /// microseconds, a protected page a tenth of one. Not one call over all of memory: KVM drops its mappings of the
    /// whole range of a call.
    pub fn protect(&mut self, runs: &mut Vec<Run>) -> io::Result<()> {
        let mut windows: Vec<(usize, u64)> = Vec::new();
        for run in runs.iter() {
            let pages = WINDOW_BYTES / PAGE_BYTES as u64;
            for window in run.first / pages..=(run.first + run.pages - 1) / pages {
                if windows.last() != Some(&(run.block, window)) {
                    windows.push((run.block, window));
                }
            }
        }
        runs.clear();
        for (block, window) in windows {
            let watched = &self.blocks[block];
            let offset = window * WINDOW_BYTES;
            let length = (watched.watched_bytes() - offset).min(WINDOW_BYTES);
            let start = watched.block.host_address;
            let pages = watched.pages();
            self.pagemap.scan(start + offset, length, Pages::WrittenAndProtect, |at, length| {
                let first = (at - start) / PAGE_BYTES as u64;
                let count = (length / PAGE_BYTES as u64).min(pages.saturating_sub(first));
                if count > 0 {
                    runs.push(Run { block, first, pages: count });
                }
            })?;
        }
        Ok(())
    }

    /// Copies pages into `into`, which they must fill exactly ([`PAGE_BYTES`] each, the last page of a block padded
    /// with zeros by the host's mapping).
    pub fn read(&mut self, runs: &[Run], into: &mut [u8]) -> io::Result<()> {
        let blocks = &self.blocks;
        let ranges = runs.iter().map(|run| {
            (blocks[run.block].block.host_address + run.first * PAGE_BYTES as u64, run.pages * PAGE_BYTES as u64)
        });
        self.memory.read(ranges, into)
    }

    /// Ends the watch. The guest's memory is ordinary again.
    pub fn unwatch(&mut self) {
        for watched in self.blocks.drain(..).filter(|watched| watched.present) {
            // A block that vanished meanwhile needs no end.
            let _ = self.uffd.unregister(watched.block.host_address, watched.watched_bytes());
        }
    }

    fn watch(&mut self, index: usize, fresh: &mut Vec<Run>) -> io::Result<()> {
        let (start, length) = (self.blocks[index].block.host_address, self.blocks[index].watched_bytes());
        self.uffd.register(start, length)?;
        // Once before and once after: a page that appears between is found by the second look.
        self.populated(index, fresh)?;
        self.uffd.protect(start, length)?;
        self.populated(index, fresh)
    }

    fn populated(&mut self, index: usize, runs: &mut Vec<Run>) -> io::Result<()> {
        let watched = &self.blocks[index];
        let pages = watched.pages();
        // A page out in swap cannot be told from one that was never touched but is protected: then take all.
        if !watched.anonymous || swapped_bytes(self.pid)? > 0 {
            runs.push(Run { block: index, first: 0, pages });
            return Ok(());
        }
        let start = watched.block.host_address;
        self.pagemap.scan(start, watched.watched_bytes(), Pages::Populated, |at, length| {
            let first = (at - start) / PAGE_BYTES as u64;
            let count = (length / PAGE_BYTES as u64).min(pages.saturating_sub(first));
            if count > 0 {
                runs.push(Run { block: index, first, pages: count });
            }
        })?;
        if swapped_bytes(self.pid)? > 0 {
            runs.push(Run { block: index, first: 0, pages });
        }
        Ok(())
    }
}

/// Whether the mapping at `address` is anonymous memory (inode 0 in `/proc/PID/maps`).
fn is_anonymous(maps: &str, address: u64) -> bool {
    maps.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let Some((start, end)) = fields.next().and_then(|range| range.split_once('-')) else { return false };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) else {
            return false;
        };
        (start..end).contains(&address) && fields.nth(3) == Some("0")
    })
}

fn swapped_bytes(pid: i32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSwap:"))
        .and_then(|rest| rest.trim().strip_suffix("kB").and_then(|number| number.trim().parse::<u64>().ok()));
    // Without the line (a kernel without swap) nothing is swapped.
    Ok(kib.unwrap_or(0) * 1024)
}
