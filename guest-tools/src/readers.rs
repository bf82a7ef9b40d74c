//! Threads that read blocks with O_DIRECT into random pages without a break, and know what every page must hold.
//!
//! Such pages are written by DMA, which the page tables of the machine below need not see: a dirty log that loses them leaves
//! a page behind whose block differs from the number noted beside it.

use crate::aligned::{Aligned, PAGE_BYTES};
use crate::cli::Workload;
use crate::disk::{READER_BLOCKS, open_direct, reader_offset};
use crate::stamp::{self, Area, mix};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

/// The longest a reader may take to finish its read and check its pages.
const CHECK_SECONDS_MAX: u64 = 60;
/// The most pages one read fills.
const RUN_PAGES_MAX: u64 = 16;

/// The running readers.
#[derive(Default)]
pub struct Readers {
    handles: Vec<(Sender<()>, Receiver<Result<()>>)>,
}

impl Readers {
    /// Starts the readers that `options` asks for, on the blocks that [`crate::disk::Disk::open`] wrote.
    pub fn start(path: &Path, options: &Workload) -> Result<Self> {
        let mut readers = Self::default();
        for number in 0..options.readers {
            let (ask, asked) = channel();
            let (answer, answered) = channel();
            let reader = Reader {
                file: open_direct(path)?,
                offset: reader_offset(options),
                held: vec![None; (options.reader_mib << 20) / PAGE_BYTES],
                memory: Aligned::new(options.reader_mib << 20),
                random: mix(options.seed ^ mix(number as u64 + 1)),
            };
            thread::Builder::new()
                .name(format!("reader{number}"))
                .spawn(move || reader.run(&asked, &answer))
                .context("start a reader thread")?;
            readers.handles.push((ask, answered));
        }
        Ok(readers)
    }

    /// Has every reader check all its pages.
    pub fn check(&self) -> Result<()> {
        for (ask, _) in &self.handles {
            ask.send(()).context("ask a reader: its thread has ended")?;
        }
        for (number, (_, answered)) in self.handles.iter().enumerate() {
            let limit = Duration::from_secs(CHECK_SECONDS_MAX);
            answered.recv_timeout(limit).context("wait for a reader")?.with_context(|| format!("reader {number}"))?;
        }
        Ok(())
    }
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
    fn run(mut self, asked: &Receiver<()>, answer: &Sender<Result<()>>) {
        let mut failed = None;
        loop {
            let request = if failed.is_none() { asked.try_recv().is_ok() } else { asked.recv().is_ok() };
            if request {
                let result = match failed.take() {
                    Some(error) => Err(error),
                    None => self.check(),
                };
                if answer.send(result).is_err() {
                    return;
                }
            }
            failed = self.read_some().err();
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random = mix(self.random);
        self.random % limit
    }

    fn read_some(&mut self) -> Result<()> {
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

    fn check(&self) -> Result<()> {
        for (page, held) in self.held.iter().enumerate() {
            let Some(block) = *held else { continue };
            if let Err(bad) = stamp::check(self.memory.page(page), Area::Reader, block, block, stamp::FILL_BYTES_MAX) {
                bail!("page {page}, read with O_DIRECT from block {block}, {bad}");
            }
        }
        Ok(())
    }
}
