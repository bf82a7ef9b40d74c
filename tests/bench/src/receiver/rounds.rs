//! Commit rounds: all guests make an epoch durable at the same moment, again and again.
//!
//! Every guest has a journal of its own, and syncs it itself. So a round has as many fsyncs as guests; how many times the device
//! flushes is another matter, because the file system makes one commit of those that come at the same time. What other ways would
//! take is measured in turn, with the same bytes on the same file system: plain files with an `fdatasync` each, plain files with one
//! `syncfs` for all, and one file for all with one `fdatasync`. Once with nothing else to do, and once beside somebody who writes, as
//! a receiver does that applies epochs: `syncfs` waits for all of that too.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use vmdr_journal::{Disk, File, FsDisk, Mode, write_all};
use vmdr_receiver::store::{Ingest, Store};

use super::disk::{Beside, Counting, flushes};
use super::{Noise, Options, RAM_PAGES, begin, by_hand, layout, small};
use crate::figures::{Samples, short};
use crate::report::{Bar, Report, Table};

/// Fsyncs of a commit round of all guests, at most.
const SYNCS_PER_ROUND_MAX: f64 = 1.3;
/// Rounds before those that count: they begin segments.
const WARM_ROUNDS: u64 = 2;

/// Ways to make the same bytes durable.
const WAYS: [&str; 4] =
    ["the store", "a file each, fdatasync each", "a file each, one syncfs", "one file, one fdatasync"];

struct Guest {
    ingest: Ingest,
    noise: Noise,
    plain: Box<dyn File>,
}

/// What one way took.
#[derive(Default)]
struct Way {
    ms: Samples,
    syncs: u64,
    flushes: Option<u64>,
}

pub fn rounds(directory: &Path, options: &Options, report: &mut Report) -> Result<()> {
    let counting = Counting::default();
    let store = Store::open_on(Arc::new(counting.clone()), &directory.join("state"), by_hand())?;
    let layout = layout(RAM_PAGES, 0);
    let mut guests = Vec::new();
    for guest in 0..options.guests {
        let plain =
            FsDisk.open(&directory.join(format!("plain-{guest}")), Mode::Create).context("make a plain file")?;
        guests.push(Guest { ingest: begin(&store, guest + 1, &layout)?, noise: Noise(guest as u64 + 1), plain });
    }
    let shared = FsDisk.open(&directory.join("shared"), Mode::Create).context("make a plain file")?;
    let whole = std::fs::File::open(directory).context("open the directory")?;
    let (mut epoch, guest_count) = (1, options.guests as u64);
    for beside_mib in [0, options.beside_mib] {
        let _beside = (beside_mib > 0).then(|| Beside::begin(directory, beside_mib)).transpose()?;
        let mut ways: [Way; WAYS.len()] = Default::default();
        for round in 0..WARM_ROUNDS + options.commits as u64 {
            epoch += 1;
            let sent = guests.iter_mut().map(|guest| small(epoch, &mut guest.noise)).collect::<Result<Vec<_>>>()?;
            let bytes: Vec<Vec<u8>> = sent.iter().map(|sent| sent.bytes()).collect();
            let length = bytes.iter().map(Vec::len).max().unwrap_or(0) as u64;
            for (number, way) in ways.iter_mut().enumerate() {
                let (syncs, flushed, began) = (counting.syncs(), flushes(directory), Instant::now());
                // All at once, each in a thread of its own, as streams are.
                std::thread::scope(|scope| {
                    let each =
                        guests.iter_mut().zip(&sent).zip(&bytes).enumerate().map(|(at, ((guest, sent), bytes))| {
                            let shared = &shared;
                            scope.spawn(move || -> Result<()> {
                                match number {
                                    0 => sent.send(&mut guest.ingest)?,
                                    3 => write_all(&**shared, bytes, (epoch * guest_count + at as u64) * length)?,
                                    // Two of the ways append to the same file.
                                    _ => write_all(&*guest.plain, bytes, (epoch * 2 + number as u64 - 1) * length)?,
                                }
                                if number == 1 {
                                    guest.plain.sync()?;
                                }
                                Ok(())
                            })
                        });
                    let each: Vec<_> = each.collect();
                    each.into_iter()
                        .try_for_each(|guest| guest.join().map_err(|_| anyhow::anyhow!("a guest's thread panicked"))?)
                })?;
                match number {
                    2 => rustix::fs::syncfs(&whole).context("syncfs")?,
                    3 => shared.sync()?,
                    _ => {}
                }
                if round >= WARM_ROUNDS {
                    way.ms.add(began.elapsed().as_secs_f64() * 1e3);
                    way.syncs += match number {
                        0 => counting.syncs() - syncs,
                        1 => options.guests as u64,
                        _ => 1,
                    };
                    way.flushes =
                        flushes(directory).zip(flushed).map(|(now, then)| way.flushes.unwrap_or(0) + now - then);
                }
            }
        }
        tell(beside_mib, &ways, options, report);
    }
    Ok(())
}

fn tell(beside_mib: u64, ways: &[Way], options: &Options, report: &mut Report) {
    let guests = options.guests;
    let mut table = Table {
        title: format!(
            "commit rounds of {guests} guests at once, {} of each way in turn, beside {beside_mib} MiB/s of other writes",
            options.commits
        ),
        heads: vec!["way", "fsyncs", "device flushes (of everybody)", "p50, ms", "p99, ms"],
        rows: Vec::new(),
    };
    let each = |count: u64| count as f64 / options.commits as f64;
    for (name, way) in WAYS.into_iter().zip(ways) {
        let (syncs, flushes) = (each(way.syncs), way.flushes.map(each));
        let (p50, p99) = (way.ms.median(), way.ms.quantile(990));
        let shown = flushes.map_or_else(|| "-".to_owned(), short);
        table.rows.push(vec![name.to_owned(), short(syncs), shown, short(p50), short(p99)]);
        report.results.push(json!({
            "what": "commit round", "way": name, "guests": guests, "beside_mib_per_s": beside_mib,
            "syncs_per_round": syncs, "device_flushes_per_round": flushes, "p50_ms": p50, "p99_ms": p99
        }));
    }
    report.tables.push(table);
    if beside_mib == 0 {
        let syncs = each(ways[0].syncs);
        report.bars.push(Bar::new(format!("fsyncs per commit round of {guests} guests"), syncs, SYNCS_PER_ROUND_MAX));
    }
}
