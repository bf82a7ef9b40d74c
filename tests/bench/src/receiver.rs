//! What the receiver's store costs on this machine's disk.
//!
//! The store's own code in this process, on the file system of `--directory`: parts come in, become durable, are applied, older
//! points are read. In turn with each figure its floor on the same disk: `dd oflag=direct` for throughput, appending to a plain file
//! and `fdatasync` for commits. Syncs are counted below the store, at the trait through which it reaches the disk.

mod disk;
mod rounds;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Args;
use serde_json::json;
use vmdr_codec::{Digest, Disk as DiskLayout, Encoder, Layout, PAGE_BYTES, RamBlock};
use vmdr_journal::{Disk, FsDisk, Mode, write_all};
use vmdr_receiver::store::{Array, Ingest, Kind, PartHead, PartTail, PointId, Store, StoreOptions};

use crate::figures::{Samples, short};
use crate::report::{Report, Table};
use disk::{dd, resident};

/// Bytes of a part when throughput is measured, as an agent ships a fast guest's epochs.
const PART_BYTES: usize = 8 << 20;
/// Bytes of a part when commits are measured: 16 pages.
const SMALL_PAGES: usize = 16;
/// Memory of the guest of the throughput rounds.
const RAM_PAGES: u64 = 16_384;
/// How far back points are read, in epochs.
const BACK: [u64; 4] = [1, 10, 100, 1_000];
/// Pages that each of those epochs writes, of how many.
const EPOCH_PAGES: u64 = 64;
const HISTORY_RAM_PAGES: u64 = 4_096;
/// A disk with nothing in it but what the history is of.
const SPARSE_BYTES: u64 = 100 << 30;
/// Units that are written so many times: a million before-images.
const SPARSE_UNITS: u64 = 250_000;
const SPARSE_EPOCHS: u64 = 4;

/// What to measure.
#[derive(Args, Debug)]
pub struct Options {
    /// Where: not /tmp, which may be memory.
    #[arg(long, default_value = "/var/tmp")]
    pub directory: PathBuf,
    /// Rounds of throughput, each against dd.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// MiB in each of those.
    #[arg(long, default_value_t = 256)]
    pub mib: usize,
    /// Commits against plain fdatasync, and commit rounds of all guests.
    #[arg(long, default_value_t = 100)]
    pub commits: usize,
    /// Guests that commit at once.
    #[arg(long, default_value_t = 10)]
    pub guests: usize,
    /// MiB a second that somebody else writes in half of the commit rounds.
    #[arg(long, default_value_t = 30)]
    pub beside_mib: u64,
}

/// Applies nothing by itself: what is measured is one thing at a time.
fn by_hand() -> StoreOptions {
    StoreOptions {
        space_reserve_bytes: 0,
        apply_bytes: 1 << 40,
        apply_interval: Duration::from_secs(3600),
        backlog_bytes_max: 1 << 40,
        ..StoreOptions::default()
    }
}

fn uuid(number: usize) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// Pages that do not compress, the same ones each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn page(&mut self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&self.next().to_le_bytes()));
        page
    }
}

/// A part, ready to be sent.
struct Sent {
    head: PartHead,
    chunks: Vec<(Bytes, u64)>,
    tail: PartTail,
}

fn part(epoch: u64, kind: Kind, fill: impl FnOnce(&mut Encoder) -> Result<()>) -> Result<Sent> {
    let mut encoder = Encoder::new();
    fill(&mut encoder)?;
    encoder.device_state(b"device state")?;
    let counts = encoder.finish();
    let payloads: Vec<Bytes> = std::iter::from_fn(|| encoder.take_full()).map(Bytes::from).collect();
    let mut digest = Digest::new();
    payloads.iter().for_each(|payload| digest.update(payload));
    let tail = PartTail {
        chunks: payloads.len() as u32,
        payload_bytes: payloads.iter().map(|payload| payload.len() as u64).sum(),
        digest: digest.halves(),
        last: true,
        cut_unix_ns: epoch * 100_000_000,
        application: false,
        counts,
    };
    let chunks = payloads.into_iter().map(|payload| (payload.clone(), vmdr_codec::chunk_hash(&payload))).collect();
    Ok(Sent { head: PartHead { generation: 1, epoch, part: 0, kind }, chunks, tail })
}

impl Sent {
    /// What is to be durable of it.
    fn bytes(&self) -> Vec<u8> {
        self.chunks.iter().flat_map(|(payload, _)| payload.to_vec()).collect()
    }

    fn send(&self, ingest: &mut Ingest) -> Result<()> {
        ingest.begin(self.head)?;
        for ((payload, xxh3), sequence) in self.chunks.iter().zip(0..) {
            ingest.chunk(sequence, payload.clone(), *xxh3)?;
        }
        ingest.end(self.tail)?;
        Ok(())
    }
}

fn layout(ram_pages: u64, disk_bytes: u64) -> Layout {
    let used_bytes = ram_pages * PAGE_BYTES as u64;
    Layout {
        machine: "pc".to_owned(),
        ram: vec![RamBlock { name: "pc.ram".to_owned(), used_bytes, page_bytes: PAGE_BYTES as u32 }],
        disks: vec![DiskLayout { target: "vda".to_owned(), size_bytes: disk_bytes }],
    }
}

/// A domain with an empty standby, at epoch 1.
fn begin(store: &Store, number: usize, layout: &Layout) -> Result<Ingest> {
    let mut ingest = store.open_stream(&uuid(number), "bench", 0)?;
    let seed = part(1, Kind::Seed, |encoder| {
        encoder.layout(layout)?;
        Ok(encoder.domain_xml("<domain/>")?)
    })?;
    seed.send(&mut ingest)?;
    Ok(ingest)
}

/// Runs the benchmark.
pub fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("receiver")?;
    let directory = tempfile::Builder::new().prefix("vmdr-bench-").tempdir_in(&options.directory);
    let directory = directory.with_context(|| format!("make a directory in {}", options.directory.display()))?;
    let at = |name: &str| directory.path().join(name);
    // First, while the process is small.
    memory(&at("memory"), &mut report)?;
    throughput(&at("throughput"), options, &mut report)?;
    commits(&at("commits"), options, &mut report)?;
    rounds::rounds(&at("rounds"), options, &mut report)?;
    older_points(&at("points"), &mut report)?;
    Ok(report.finish())
}

fn throughput(directory: &Path, options: &Options, report: &mut Report) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let store = Store::open(&directory.join("state"), by_hand())?;
    let layout = layout(RAM_PAGES, 0);
    let per_part = (PART_BYTES / PAGE_BYTES) as u64;
    let epochs = (options.mib * (1 << 20) / PART_BYTES) as u64;
    let mut noise = Noise(88_172_645_463_325_252);
    let parts: Result<Vec<Sent>> = (0..epochs)
        .map(|n| {
            part(n + 2, Kind::Delta, |encoder| {
                for page in 0..per_part {
                    encoder.ram_page(0, (n * per_part + page) % RAM_PAGES, &noise.page());
                }
                Ok(())
            })
        })
        .collect();
    let parts = parts?;
    let bytes: u64 = parts.iter().map(|part| part.tail.payload_bytes).sum();
    let (mut journal, mut applied, mut floor) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..options.rounds {
        let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
        floor.add((options.mib << 20) as f64 / 1e6 / dd(directory, options.mib)?);
        let mut ingest = begin(&store, round + 1, &layout)?;
        let began = Instant::now();
        parts.iter().try_for_each(|part| part.send(&mut ingest))?;
        journal.add(rate(began.elapsed().as_secs_f64()));
        let began = Instant::now();
        store.recovery_point(&uuid(round + 1))?;
        applied.add(rate(began.elapsed().as_secs_f64()));
        drop(ingest);
        store.forget(&uuid(round + 1))?;
    }
    let mut table = Table {
        title: format!("MB/s, medians of {} rounds of {} MiB in parts of 8 MiB", options.rounds, options.mib),
        heads: vec!["what", "MB/s", "of dd"],
        rows: Vec::new(),
    };
    for (name, samples) in
        [("dd oflag=direct", &floor), ("journal: durable", &journal), ("apply, with history", &applied)]
    {
        let of = samples.median() / floor.median();
        table.rows.push(vec![name.to_owned(), short(samples.median()), short(of)]);
        report.results.push(json!({ "what": name, "mb_per_s": samples.median(), "of_dd": of }));
    }
    report.tables.push(table);
    Ok(())
}

fn small(epoch: u64, noise: &mut Noise) -> Result<Sent> {
    part(epoch, Kind::Delta, |encoder| {
        (0..SMALL_PAGES).for_each(|page| encoder.ram_page(0, page as u64, &noise.page()));
        Ok(())
    })
}

fn commits(directory: &Path, options: &Options, report: &mut Report) -> Result<()> {
    let store = Store::open(&directory.join("state"), by_hand())?;
    let mut ingest = begin(&store, 1, &layout(RAM_PAGES, 0))?;
    let plain = FsDisk.open(&directory.join("plain"), Mode::Create).context("make a plain file")?;
    let mut noise = Noise(7);
    let mut end = 0;
    let (mut commit, mut floor) = (Samples::default(), Samples::default());
    for n in 0..options.commits as u64 {
        let sent = small(n + 2, &mut noise)?;
        let bytes = sent.bytes();
        let began = Instant::now();
        write_all(&*plain, &bytes, end)?;
        plain.sync()?;
        floor.add(began.elapsed().as_secs_f64() * 1e3);
        end += bytes.len() as u64;
        let began = Instant::now();
        sent.send(&mut ingest)?;
        commit.add(began.elapsed().as_secs_f64() * 1e3);
    }
    let mut table = Table {
        title: format!("ms to make {SMALL_PAGES} pages durable, {} times each in turn", options.commits),
        heads: vec!["what", "p50", "p99", "of plain p50"],
        rows: Vec::new(),
    };
    for (name, samples) in [("append and fdatasync", &floor), ("part of an epoch", &commit)] {
        let (p50, p99) = (samples.median(), samples.quantile(990));
        let of = p50 / floor.median();
        table.rows.push(vec![name.to_owned(), short(p50), short(p99), short(of)]);
        report.results.push(json!({ "what": name, "p50_ms": p50, "p99_ms": p99, "of_plain": of }));
    }
    report.tables.push(table);
    Ok(())
}

fn older_points(directory: &Path, report: &mut Report) -> Result<()> {
    let store = Store::open(&directory.join("state"), by_hand())?;
    let mut ingest = begin(&store, 1, &layout(HISTORY_RAM_PAGES, 0))?;
    let mut noise = Noise(3);
    let newest = BACK[BACK.len() - 1] + 2;
    for epoch in 2..=newest {
        let sent = part(epoch, Kind::Delta, |encoder| {
            (0..EPOCH_PAGES).for_each(|_| encoder.ram_page(0, noise.next() % HISTORY_RAM_PAGES, &noise.page()));
            Ok(())
        })?;
        sent.send(&mut ingest)?;
    }
    store.recovery_point(&uuid(1))?;
    let mut table = Table {
        title: format!(
            "an older point of a guest of {} MiB, {EPOCH_PAGES} random pages an epoch; medians of 5",
            (HISTORY_RAM_PAGES * PAGE_BYTES as u64) >> 20
        ),
        heads: vec!["epochs back", "open, ms", "read all, ms", "open, us per epoch"],
        rows: Vec::new(),
    };
    for back in [0].into_iter().chain(BACK) {
        let (mut open, mut read) = (Samples::default(), Samples::default());
        for _ in 0..5 {
            let began = Instant::now();
            let reader = store.read_point(&uuid(1), Some(PointId { generation: 1, epoch: newest - back }))?;
            open.add(began.elapsed().as_secs_f64() * 1e3);
            let began = Instant::now();
            let mut buffer = vec![0; 1 << 20];
            for offset in (0..reader.length(Array::Ram(0))).step_by(buffer.len()) {
                reader.read(Array::Ram(0), offset, &mut buffer)?;
            }
            black_box(&buffer);
            read.add(began.elapsed().as_secs_f64() * 1e3);
        }
        let each = if back > 0 { short(open.median() * 1e3 / back as f64) } else { String::new() };
        table.rows.push(vec![back.to_string(), short(open.median()), short(read.median()), each]);
        let (open_ms, read_ms) = (open.median(), read.median());
        report.results.push(json!({ "what": "older point", "back": back, "open_ms": open_ms, "read_ms": read_ms }));
    }
    report.tables.push(table);
    Ok(())
}

fn memory(directory: &Path, report: &mut Report) -> Result<()> {
    let store = Store::open(&directory.join("state"), by_hand())?;
    let mut ingest = begin(&store, 1, &layout(1, SPARSE_BYTES))?;
    let before = resident()?;
    let step = SPARSE_BYTES / SPARSE_UNITS / PAGE_BYTES as u64 * PAGE_BYTES as u64;
    for epoch in 2..2 + SPARSE_EPOCHS {
        let sent = part(epoch, Kind::Delta, |encoder| {
            (0..SPARSE_UNITS).for_each(|n| encoder.disk_data(0, n * step, &[epoch as u8]));
            Ok(())
        })?;
        sent.send(&mut ingest)?;
        drop(sent);
        store.recovery_point(&uuid(1))?;
    }
    let applied = resident()?.saturating_sub(before);
    let began = Instant::now();
    let oldest = store.read_point(&uuid(1), Some(PointId { generation: 1, epoch: 1 }))?;
    let took = began.elapsed().as_secs_f64();
    let mut byte = [1];
    oldest.read(Array::Disk(0), step, &mut byte)?;
    ensure!(byte == [0], "the oldest point has a byte that was written later");
    let reading = resident()?.saturating_sub(before);
    drop(oldest);
    let entries = SPARSE_UNITS * SPARSE_EPOCHS;
    let points = store.points(&uuid(1))?.len();
    let stored: u64 = store.domains().iter().map(|domain| domain.stored_bytes).sum();
    drop((ingest, store));
    // Opened anew, as a receiver that was restarted.
    let before_open = resident()?;
    let began = Instant::now();
    let store = Store::open(&directory.join("state"), by_hand())?;
    let opened = began.elapsed().as_secs_f64();
    let after_open = resident()?.saturating_sub(before_open);
    ensure!(store.points(&uuid(1))?.len() == points, "points are lost over a restart");
    let mib = |bytes: u64| short(bytes as f64 / f64::from(1 << 20));
    report.tables.push(Table {
        title: format!(
            "memory with an empty disk of 100 GiB and {entries} before-images ({} MiB on the disk), MiB more than without",
            mib(stored)
        ),
        heads: vec!["when", "MiB", "seconds"],
        rows: vec![
            vec!["everything applied".to_owned(), mib(applied), String::new()],
            vec!["the oldest point is read".to_owned(), mib(reading), short(took)],
            vec!["opened anew (what was freed before is used again)".to_owned(), mib(after_open), short(opened)],
        ],
    });
    report.results.push(json!({
        "what": "memory", "entries": entries, "applied_bytes": applied, "reading_bytes": reading, "open_oldest_s": took,
        "reopen_s": opened, "reopen_bytes": after_open
    }));
    Ok(())
}
