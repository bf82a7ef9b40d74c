//! Threads that read blocks with O_DIRECT into random pages without a break, and know what every page must hold.
//!
//! Such pages are written by DMA, which the page tables of the machine below need not see: a dirty log that loses them leaves
//! a page behind whose block differs from the number noted beside it.

use crate::aligned::{Aligned, PAGE_BYTES};
use crate::cli::Workload;
use crate::disk::{READER_BLOCKS, open_direct, reader_offset};
use crate::stamp::{self, Area, mix};
use crate::workers::{Worker, Workers};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The most pages one read fills.
const RUN_PAGES_MAX: u64 = 16;

/// Starts the readers that `options` asks for, on the blocks that [`crate::disk::Disk::open`] wrote.
pub fn start(path: &Path, options: &Workload, workers: &mut Workers) -> Result<()> {
    for number in 0..options.readers {
        let reader = Reader {
            file: open_direct(path)?,
            offset: reader_offset(options),
            held: vec![None; (options.reader_mib << 20) / PAGE_BYTES],
            memory: Aligned::new(options.reader_mib << 20),
            random: mix(options.seed ^ mix(number as u64 + 1)),
        };
        workers.start(&format!("reader{number}"), reader)?;
    }
    Ok(())
}

struct Reader {
    file: File,
    offset: u64,
    memory: Aligned,
    /// The block that each page holds.
    held: Vec<Option<u64>>,
    random: u64,
}

impl Reader {
    fn below(&mut self, limit: u64) -> u64 {
        self.random = mix(self.random);
        self.random % limit
    }
}

impl Worker for Reader {
    fn step(&mut self) -> Result<()> {
        let pages = self.held.len() as u64;
        let run = (1 + self.below(RUN_PAGES_MAX)).min(pages);
        let page = self.below(pages - run + 1);
        let block = self.below(READER_BLOCKS - run);
        let bytes = page as usize * PAGE_BYTES..(page + run) as usize * PAGE_BYTES;
        self.file
            .read_exact_at(&mut self.memory[bytes], self.offset + block * PAGE_BYTES as u64)
            .context("read with O_DIRECT")?;
        for step in 0..run {
            self.held[(page + step) as usize] = Some(block + step);
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        for (page, held) in self.held.iter().enumerate() {
            let Some(block) = *held else { continue };
            if let Err(bad) = stamp::check(self.memory.page(page), Area::Reader, block, block, stamp::FILL_BYTES_MAX) {
                bail!("page {page}, read with O_DIRECT from block {block}, {bad}");
            }
        }
        Ok(())
    }
}
