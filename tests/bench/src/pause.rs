//! How long a cut stops the guest.
//!
//! Measured from QEMU's STOP event to its RESUME event, by QEMU's own time stamps, on one running guest and in turn: a cut of
//! the product ([`vmdr_shim::capture::Capture::cut`]), and the floor, which is the same pause with everything left out that
//! makes it a checkpoint: `stop` and `xen-save-devices-state` in one write, `cont` once the save is answered. Both
//! go over a unix socket of QEMU's of their own. A third figure is `cont` sent along with the rest, which no checkpoint can do.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use vmdr_proto::shim::Timing;
use vmdr_shim::qmp::{COMMAND_LIMIT, Qmp};

use crate::figures::{Samples, short};
use crate::machine::{Machine, Protected, Runs, Spec};
use crate::report::{Bar, Report, Table, kvm_opens};

/// The most that the median pause may be of the floor's (issue 2).
const RATIO_MAX: f64 = 1.25;
/// Page numbers up to which that holds.
const RATIO_PAGES_MAX: u64 = 1_000;
/// The fd set of the floor, other than the capture's.
const FLOOR_FD_SET: u32 = 0x7642_4401;
/// Between two cuts, at first; then it is adjusted until the number of dirty pages is as wanted.
const EPOCH_MS: f64 = 100.0;
const EPOCH_MS_MIN: f64 = 6.0;
const EPOCH_MS_MAX: f64 = 300.0;
/// Rounds before the first that counts: caches fill, and between the steps the length of an epoch is adjusted.
const WARM_UP_ROUNDS: usize = 5;
const WARM_UP_STEPS: usize = 4;
/// How far the dirty pages may be from what was wanted, as a factor, and how often another pace is tried.
const OFF_MAX: f64 = 1.4;
const ATTEMPTS_MAX: usize = 4;
/// PAUSE instructions in an epoch, to begin with: where they are intercepted, one takes some microseconds.
const BARE_METAL_SPINS: f64 = 20_000.0;
/// Guest memory under KVM: more pages than are to be dirty.
const BARE_METAL_MIB: u64 = 256;
const LINUX_MIB: u64 = 192;

/// What to measure.
#[derive(Args, Debug)]
pub struct Options {
    /// Cuts measured at each number of dirty pages, and as many floors.
    #[arg(long, default_value_t = 300)]
    pub samples: usize,
    /// Cuts measured under disk load; 1,000 are the least of which a p99.9 says something.
    #[arg(long, default_value_t = 1500)]
    pub disk_samples: usize,
    /// Dirty pages in an epoch, about.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1_000, 8_000])]
    pub pages: Vec<u64>,
    /// Guests; where /dev/kvm does not open, those under KVM are left out.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Guest::LinuxTcg, Guest::BareKvm, Guest::MinimalKvm])]
    pub guests: Vec<Guest>,
}

/// One thing to measure.
struct Case {
    guest: Guest,
    load: &'static str,
    /// Wanted in an epoch; nothing: whatever comes.
    pages: Option<u64>,
    samples: usize,
}

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// Linux under TCG, with the devices that libvirt makes and a mirrored disk.
    LinuxTcg,
    /// No operating system, under KVM, with the same devices.
    BareKvm,
    /// No operating system, under KVM, with as few devices as possible: the lowest floor.
    MinimalKvm,
}

impl Guest {
    fn name(self) -> &'static str {
        match self {
            Guest::LinuxTcg => "linux-tcg",
            Guest::BareKvm => "bare-kvm",
            Guest::MinimalKvm => "minimal-kvm",
        }
    }
}

/// What came out.
struct Measured {
    cut: Samples,
    floor: Samples,
    burst: Samples,
    dirty_pages: Samples,
    timing: Vec<Timing>,
    /// Of the guest's time, what the cuts' pauses took: 0 to 1.
    share: f64,
    epoch_ms: f64,
    device_bytes: u64,
}

/// Runs the benchmark.
pub fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("pause")?;
    let mut table = Table {
        title: "Pause, STOP to RESUME by QEMU's time stamps (ms); floor: stop, device save, cont".to_owned(),
        heads: vec![
            "guest",
            "load",
            "pages",
            "samples",
            "cut p50",
            "floor p50",
            "ratio",
            "cut p99",
            "floor p99",
            "cut p99.9",
            "floor p99.9",
            "burst p50",
            "epoch ms",
            "share",
        ],
        rows: Vec::new(),
    };
    let mut parts = Table {
        title: "Where a cut's time goes (ms, medians; device: what was left of the save after the copy)".to_owned(),
        heads: vec!["guest", "load", "pages", "stop", "scan", "protect", "copy", "device", "resume", "pause", "KiB"],
        rows: Vec::new(),
    };
    for case in cases(options) {
        eprintln!(
            "pause: {}, {}, {} pages",
            case.guest.name(),
            case.load,
            case.pages.map_or("any".to_owned(), |n| n.to_string())
        );
        let measured = measure(&case).with_context(|| format!("guest {}, {}", case.guest.name(), case.load))?;
        table.rows.push(row(&case, &measured));
        eprintln!("  {}", table.rows.last().map_or(String::new(), |row| row.join("  ")));
        parts.rows.push(parts_row(&case, &measured));
        let ratio = measured.cut.median() / measured.floor.median();
        // Nobody protects a guest without a disk and a network card: its figures are there to be looked at.
        let bar = case.guest != Guest::MinimalKvm;
        if let Some(pages) = case.pages.filter(|&pages| bar && pages <= RATIO_PAGES_MAX) {
            let name = format!("{}: pause p50 of {pages} pages / floor p50", case.guest.name());
            report.bars.push(Bar::new(name, ratio, RATIO_MAX));
        }
        report.results.push(result(&case, &measured));
    }
    report.tables = vec![table, parts];
    Ok(report.finish())
}

fn cases(options: &Options) -> Vec<Case> {
    let mut cases = Vec::new();
    for &guest in &options.guests {
        if guest != Guest::LinuxTcg && !kvm_opens() {
            eprintln!("pause: {} is left out: /dev/kvm does not open here", guest.name());
            continue;
        }
        for &pages in &options.pages {
            cases.push(Case { guest, load: "memory", pages: Some(pages), samples: options.samples });
        }
        if guest == Guest::LinuxTcg && options.disk_samples > 0 {
            cases.push(Case { guest, load: "disk", pages: None, samples: options.disk_samples });
        }
    }
    cases
}

impl Case {
    /// The guest, writing about as many pages as are wanted in [`EPOCH_MS`] if `pace` is right: how fast it is, only
    /// trying tells.
    fn spec(&self, pace: f64) -> Spec {
        let pages = self.pages.unwrap_or(0) as f64;
        if self.guest == Guest::LinuxTcg {
            let workload = match self.pages {
                Some(_) => {
                    let pages = (pace * pages / (EPOCH_MS / 10.0)).ceil().clamp(1.0, 1e6);
                    format!("--ram-mib 96 --interval-ms 10 --fill-bytes 0 --pages {pages}")
                }
                // Records of 64 KiB, each synced, as fast as the guest can.
                None => "--ram-mib 16 --pages 20 --interval-ms 1 --record-bytes 65536 --records 256".to_owned(),
            };
            let runs = Runs::Linux(format!("{workload} --print-every 1000000"));
            return Spec { runs, accelerator: "tcg", devices: true, memory_mib: LINUX_MIB };
        }
        // Spinning takes microseconds where PAUSE is intercepted, and nanoseconds elsewhere.
        let spins = (BARE_METAL_SPINS / (pace * pages)).clamp(0.0, 1e9) as u32;
        let devices = self.guest == Guest::BareKvm;
        Spec { runs: Runs::BareMetal(spins), accelerator: "kvm", devices, memory_mib: BARE_METAL_MIB }
    }
}

/// Starts the guest at a pace at which it writes what is wanted.
fn start(case: &Case) -> Result<(Machine, Protected, Floor, f64)> {
    let mut pace = 1.0;
    let mut attempt = 1;
    loop {
        let machine = Machine::start(case.spec(pace))?;
        let mut floor = Floor::new(machine.monitor()?)?;
        let mut protected = machine.protect(&mut floor.monitor)?;
        protected.seed(&mut floor.monitor, &mut |_| Ok(()))?;
        let (epoch_ms, found) = settle(case, &mut protected, &mut floor)?;
        let off = case.pages.map_or(1.0, |pages| found / pages as f64);
        if (1.0 / OFF_MAX..OFF_MAX).contains(&off) || attempt == ATTEMPTS_MAX {
            return Ok((machine, protected, floor, epoch_ms));
        }
        attempt += 1;
        // It ended at a bound of the epoch's length: with this pace it would have come out at the usual one.
        pace /= off * EPOCH_MS / epoch_ms;
        protected.capture.detach();
    }
}

fn measure(case: &Case) -> Result<Measured> {
    let (_machine, mut protected, mut floor, epoch_ms) = start(case)?;
    let mut measured = Measured {
        cut: Samples::default(),
        floor: Samples::default(),
        burst: Samples::default(),
        dirty_pages: Samples::default(),
        timing: Vec::new(),
        share: 0.0,
        epoch_ms,
        device_bytes: 0,
    };
    let wait = Duration::from_secs_f64(epoch_ms / 3000.0);
    let begun = Instant::now();
    for _ in 0..case.samples {
        let round = round(&mut protected, &mut floor, wait)?;
        measured.cut.add(round.timing.pause_ns as f64 / 1e6);
        measured.floor.add(round.floor_ms);
        measured.burst.add(round.burst_ms);
        measured.dirty_pages.add(round.dirty_pages as f64);
        measured.timing.push(round.timing);
        measured.device_bytes = round.device_bytes;
    }
    let guest_ms = begun.elapsed().as_secs_f64() * 1e3 - measured.floor.sum() - measured.burst.sum();
    measured.share = measured.cut.sum() / guest_ms;
    measured.epoch_ms = guest_ms / case.samples as f64;
    protected.capture.detach();
    Ok(measured)
}

/// One cut and one of each floor.
struct Round {
    timing: Timing,
    dirty_pages: u64,
    device_bytes: u64,
    floor_ms: f64,
    burst_ms: f64,
}

fn round(protected: &mut Protected, floor: &mut Floor, wait: Duration) -> Result<Round> {
    std::thread::sleep(wait);
    let part = protected.cut()?;
    protected.release(&part);
    let timing = part.timing.context("a cut without its timing")?;
    ensure!(timing.pause_ns > 0, "QEMU's events of a cut's pause are missing");
    std::thread::sleep(wait);
    let floor_ms = floor.pause(false)?;
    std::thread::sleep(wait);
    let burst_ms = floor.pause(true)?;
    let device_bytes = part.device_state.map_or(0, |range| range.length);
    Ok(Round { timing, dirty_pages: part.dirty_pages, device_bytes, floor_ms, burst_ms })
}

/// Finds the length of an epoch in which the guest writes as many pages as are wanted; gives it in ms, and how many it wrote.
fn settle(case: &Case, protected: &mut Protected, floor: &mut Floor) -> Result<(f64, f64)> {
    let mut epoch_ms = EPOCH_MS;
    let mut found = 0.0;
    for _ in 0..WARM_UP_STEPS {
        if let (Some(pages), true) = (case.pages, found > 0.0) {
            epoch_ms = (epoch_ms * pages as f64 / found).clamp(EPOCH_MS_MIN, EPOCH_MS_MAX);
        }
        // Not by every single epoch: they vary.
        let mut recent = Samples::default();
        for _ in 0..WARM_UP_ROUNDS {
            let round = round(protected, floor, Duration::from_secs_f64(epoch_ms / 3000.0))?;
            recent.add(round.dirty_pages as f64);
        }
        found = recent.median().max(1.0);
    }
    Ok((epoch_ms, found))
}

/// The pause without a capture.
struct Floor {
    monitor: Qmp,
    writer: File,
    save: Value,
}

impl Floor {
    fn new(mut monitor: Qmp) -> Result<Self> {
        let memory: OwnedFd = memfd_create("vmdr-bench-floor", MemfdFlags::CLOEXEC).context("make a memfd")?;
        // QEMU takes a descriptor of a set only if its access mode is the one it wants to open.
        let writer = File::options()
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
            .context("open the floor's memfd for writing")?;
        monitor.add_fd(writer.as_fd(), FLOOR_FD_SET).context("pass a descriptor to QEMU")?;
        let save = json!({ "filename": format!("/dev/fdset/{FLOOR_FD_SET}"), "live": false });
        Ok(Self { monitor, writer, save })
    }

    /// One pause, in ms. With `burst`, `cont` is sent along with the rest.
    fn pause(&mut self, burst: bool) -> Result<f64> {
        self.writer.seek(SeekFrom::Start(0)).context("rewind the device state")?;
        // Those of the cut before.
        self.monitor.events()?;
        let save = ("xen-save-devices-state", Some(&self.save));
        let (save, cont) = if burst {
            let [stop, save, cont] = self.monitor.send([("stop", None), save, ("cont", None)])?;
            self.monitor.wait(stop, COMMAND_LIMIT)?;
            (save, Some(cont))
        } else {
            let [stop, save] = self.monitor.send([("stop", None), save])?;
            self.monitor.wait(stop, COMMAND_LIMIT)?;
            (save, None)
        };
        self.monitor.wait(save, COMMAND_LIMIT)?;
        let cont = match cont {
            Some(cont) => cont,
            None => {
                let [cont] = self.monitor.send([("cont", None)])?;
                cont
            }
        };
        self.monitor.wait(cont, COMMAND_LIMIT)?;
        let stopped = self.monitor.wait_event("STOP", COMMAND_LIMIT)?.context("no STOP event")?;
        let resumed = self.monitor.wait_event("RESUME", COMMAND_LIMIT)?.context("no RESUME event")?;
        Ok(resumed.at_us.saturating_sub(stopped.at_us) as f64 / 1e3)
    }
}

fn row(case: &Case, measured: &Measured) -> Vec<String> {
    // Of fewer samples it would be the maximum.
    let per_mille =
        |samples: &Samples| if samples.len() >= 1000 { short(samples.quantile(999)) } else { "-".to_owned() };
    vec![
        case.guest.name().to_owned(),
        case.load.to_owned(),
        short(measured.dirty_pages.median()),
        measured.cut.len().to_string(),
        short(measured.cut.median()),
        short(measured.floor.median()),
        short(measured.cut.median() / measured.floor.median()),
        short(measured.cut.quantile(990)),
        short(measured.floor.quantile(990)),
        per_mille(&measured.cut),
        per_mille(&measured.floor),
        short(measured.burst.median()),
        short(measured.epoch_ms),
        format!("{:.1} %", measured.share * 100.0),
    ]
}

/// Median of one field of the timings, in ms.
fn part(measured: &Measured, field: impl Fn(&Timing) -> u64) -> f64 {
    measured.timing.iter().map(|timing| field(timing) as f64 / 1e6).collect::<Samples>().median()
}

type Field = fn(&Timing) -> u64;

const PARTS: [(&str, Field); 7] = [
    ("stop_ms", |timing| timing.stop_ns),
    ("scan_ms", |timing| timing.scan_ns),
    ("protect_ms", |timing| timing.protect_ns),
    ("copy_ms", |timing| timing.copy_ns),
    ("device_ms", |timing| timing.device_ns),
    ("resume_ms", |timing| timing.resume_ns),
    ("pause_ms", |timing| timing.pause_ns),
];

fn parts_row(case: &Case, measured: &Measured) -> Vec<String> {
    let mut row = vec![case.guest.name().to_owned(), case.load.to_owned(), short(measured.dirty_pages.median())];
    row.extend(PARTS.iter().map(|(_, field)| short(part(measured, field))));
    row.push(short(measured.device_bytes as f64 / 1024.0));
    row
}

fn result(case: &Case, measured: &Measured) -> Value {
    let summary = |samples: &Samples| {
        json!({
            "samples": samples.len(), "p50_ms": samples.median(), "p99_ms": samples.quantile(990),
            "p999_ms": (samples.len() >= 1000).then(|| samples.quantile(999)), "max_ms": samples.quantile(1000),
        })
    };
    let parts: serde_json::Map<String, Value> =
        PARTS.iter().map(|(name, field)| ((*name).to_owned(), part(measured, field).into())).collect();
    json!({
        "guest": case.guest.name(), "load": case.load, "pages_wanted": case.pages,
        "dirty_pages_p50": measured.dirty_pages.median(), "device_state_bytes": measured.device_bytes,
        "cut": summary(&measured.cut), "floor": summary(&measured.floor), "burst": summary(&measured.burst),
        "ratio_p50": measured.cut.median() / measured.floor.median(),
        "ratio_p99": measured.cut.quantile(990) / measured.floor.quantile(990),
        "epoch_ms": measured.epoch_ms, "pause_share": measured.share, "parts_p50": parts,
    })
}
