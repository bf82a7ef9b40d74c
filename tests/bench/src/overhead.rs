//! What protection costs the guest.
//!
//! A guest does the same pieces of work again and again (processor, memory, disk), and says on its serial port when each begins and
//! ends; they are timed by the host's clock, since the guest's stands still in every pause. In turn, in one run, it is unprotected
//! and protected at some rates of epochs: by the shim's own code in this process, which also encodes what it captures as the agent does,
//! and throws it away. So what sending takes is not in it; what copying and encoding take from the guest's processors is.
//!
//! A piece that is stopped for a part p of the time takes 1 / (1 - p) times as long. What is lost beyond that is shown with where the
//! guest's processor was meanwhile, by the host kernel's own count: running, waiting for a processor of the host, or asleep.

mod host;
mod serial;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::json;
use vmdr_agent::arena_map::ArenaMap;
use vmdr_agent::encode::{Extras, PartEncoder};
use vmdr_shim::config::ARENA_BYTES;
use vmdr_shim::qmp::Qmp;

use self::host::{Spent, Vcpu};
use self::serial::{Piece, Serial};
use crate::figures::{Samples, short};
use crate::machine::{Machine, Protected, Runs, Spec};
use crate::report::{Report, Table, kvm_opens};

/// Pieces of about a second each under TCG.
const JOB: &str = "--cpu-mib 256 --memory-mib 32 --memory-rounds 400 --disk-records 400";
const LINUX_MIB: u64 = 192;
/// A quarter of it is too much for caches, and copied quickly.
const BARE_METAL_MIB: u64 = 64;
/// How long the guest without an operating system is watched for a piece.
const BARE_METAL_WATCHED: Duration = Duration::from_secs(2);
/// How long a cycle of all pieces may take.
const CYCLE_LIMIT: Duration = Duration::from_secs(240);
/// How often the serial port is looked at: also how exact a piece's length is.
const LOOK: Duration = Duration::from_millis(1);

/// What to measure.
#[derive(Args, Debug)]
pub struct Options {
    /// Epochs a second, each in turn with no protection at all.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 40])]
    pub rates: Vec<u32>,
    /// How often each is measured.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Guests; where /dev/kvm does not open, those under KVM are left out.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Guest::LinuxTcg, Guest::BareKvm, Guest::SlowKvm])]
    pub guests: Vec<Guest>,
}

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// Linux under TCG with libvirt's devices and a mirrored disk: cpu, memory and disk.
    LinuxTcg,
    /// No operating system, under KVM, writing memory as fast as it can.
    BareKvm,
    /// The same, which spins between any two pages: mostly processor work.
    SlowKvm,
}

impl Guest {
    fn name(self) -> &'static str {
        match self {
            Guest::LinuxTcg => "linux-tcg",
            Guest::BareKvm => "bare-kvm",
            Guest::SlowKvm => "slow-kvm",
        }
    }

    fn spec(self) -> Spec {
        let bare = |spins| Spec {
            runs: Runs::BareMetal(spins),
            accelerator: "kvm",
            devices: false,
            memory_mib: BARE_METAL_MIB,
        };
        match self {
            Guest::LinuxTcg => {
                Spec { runs: Runs::Job(JOB.to_owned()), accelerator: "tcg", devices: true, memory_mib: LINUX_MIB }
            }
            Guest::BareKvm => bare(0),
            Guest::SlowKvm => bare(500),
        }
    }
}

/// All pieces of one kind at one rate.
#[derive(Default)]
struct Measured {
    seconds: Samples,
    /// Part of each piece's time that the guest was paused.
    paused: Samples,
    /// What the guest's processor did: seconds per second.
    running: Samples,
    waiting: Samples,
    /// Seconds of a processor that the piece took: what waiting for one does not change.
    processor_seconds: Samples,
    faults_per_second: Samples,
    epochs_per_second: Samples,
}

/// Runs the benchmark.
pub fn run(options: &Options) -> Result<Report> {
    if options.rates.iter().any(|rate| !(1..=40).contains(rate)) {
        bail!("1 to 40 epochs a second are possible");
    }
    let mut report = Report::new("overhead")?;
    let mut table = Table {
        title: "Time for the same work, protected / unprotected; beyond: what the pauses do not explain; cpu: the same ratio of the \
                processor time it took"
            .to_owned(),
        heads: vec![
            "guest",
            "work",
            "epochs/s",
            "reached",
            "seconds",
            "ratio",
            "paused",
            "explained",
            "beyond",
            "cpu",
            "running",
            "waiting",
            "asleep",
            "faults/s",
        ],
        rows: Vec::new(),
    };
    for &guest in &options.guests {
        if guest != Guest::LinuxTcg && !kvm_opens() {
            eprintln!("overhead: {} is left out: /dev/kvm does not open here", guest.name());
            continue;
        }
        measure(guest, options, &mut report, &mut table).with_context(|| format!("guest {}", guest.name()))?;
    }
    report.tables = vec![table];
    Ok(report.finish())
}

fn measure(guest: Guest, options: &Options, report: &mut Report, table: &mut Table) -> Result<()> {
    let machine = Machine::start(guest.spec())?;
    let mut monitor = machine.monitor()?;
    let vcpu = Vcpu::find(&mut monitor, machine.pid())?;
    let kinds: &[&str] = if guest == Guest::LinuxTcg { &["cpu", "memory", "disk"] } else { &["pages"] };
    let mut rates: Vec<u32> = vec![0];
    rates.extend(&options.rates);
    let mut all: Vec<Vec<Measured>> =
        rates.iter().map(|_| kinds.iter().map(|_| Measured::default()).collect()).collect();
    // Caches and translated code: not measured.
    cycle(&machine, kinds, &vcpu, None)?;
    for round in 0..options.rounds {
        for step in 0..rates.len() {
            // Each round begins with another: what comes first has no advantage.
            let index = (round + step) % rates.len();
            eprintln!(
                "overhead: {}, round {} of {}, {} epochs/s",
                guest.name(),
                round + 1,
                options.rounds,
                rates[index]
            );
            let found = at_rate(&machine, &mut monitor, kinds, &vcpu, rates[index])?;
            for (measured, found) in all[index].iter_mut().zip(found) {
                add(measured, &found);
            }
        }
    }
    for (index, &rate) in rates.iter().enumerate() {
        for (number, kind) in kinds.iter().enumerate() {
            let (bare, measured) = (&all[0][number], &all[index][number]);
            let ratio = measured.seconds.median() / bare.seconds.median();
            let paused = measured.paused.median();
            let explained = 1.0 / (1.0 - paused);
            let (running, waiting) = (measured.running.median(), measured.waiting.median());
            let processor = measured.processor_seconds.median() / bare.processor_seconds.median();
            let percent = |part: f64| format!("{:.1} %", part * 100.0);
            table.rows.push(vec![
                guest.name().to_owned(),
                (*kind).to_owned(),
                rate.to_string(),
                short(measured.epochs_per_second.median()),
                short(measured.seconds.median()),
                format!("{ratio:.3}"),
                percent(paused),
                format!("{explained:.3}"),
                format!("{:.3}", ratio / explained),
                format!("{processor:.3}"),
                percent(running),
                percent(waiting),
                percent((1.0 - running - waiting).max(0.0)),
                short(measured.faults_per_second.median()),
            ]);
            report.results.push(json!({
                "guest": guest.name(),
                "work": kind,
                "epochs_per_second": rate,
                "epochs_per_second_reached": measured.epochs_per_second.median(),
                "pieces": measured.seconds.len(),
                "seconds_p50": measured.seconds.median(),
                "ratio": ratio,
                "paused_ratio": paused,
                "explained_ratio": explained,
                "beyond_ratio": ratio / explained,
                "processor_seconds_ratio": processor,
                "vcpu_running_ratio": running,
                "vcpu_waiting_ratio": waiting,
                "faults_per_second": measured.faults_per_second.median(),
            }));
        }
    }
    Ok(())
}

/// A piece, and what happened in it.
struct Found {
    piece: Piece,
    paused_seconds: f64,
    epochs: usize,
    spent: Spent,
}

fn add(measured: &mut Measured, found: &Found) {
    let seconds = found.piece.seconds();
    measured.seconds.add(seconds / found.piece.work);
    measured.paused.add(found.paused_seconds / seconds);
    measured.running.add(found.spent.running_seconds / seconds);
    measured.waiting.add(found.spent.waiting_seconds / seconds);
    measured.processor_seconds.add(found.spent.running_seconds / found.piece.work);
    measured.faults_per_second.add(found.spent.faults as f64 / seconds);
    measured.epochs_per_second.add(found.epochs as f64 / seconds);
}

/// One cycle of all pieces at a rate; 0: unprotected.
fn at_rate(machine: &Machine, monitor: &mut Qmp, kinds: &[&str], vcpu: &Vcpu, rate: u32) -> Result<Vec<Found>> {
    if rate == 0 {
        return cycle(machine, kinds, vcpu, None);
    }
    let mut protected = machine.protect(monitor)?;
    protected.seed(monitor, &mut |_| Ok(()))?;
    let mut cutter = Cutter::new(&mut protected, rate)?;
    let found = cycle(machine, kinds, vcpu, Some(&mut cutter));
    machine.unprotect(monitor, protected)?;
    found
}

/// Waits for a cycle that begins after now; cuts meanwhile.
fn cycle(machine: &Machine, kinds: &[&str], vcpu: &Vcpu, mut cutter: Option<&mut Cutter<'_>>) -> Result<Vec<Found>> {
    let mut serial = Serial::open(&machine.serial(), kinds, BARE_METAL_WATCHED)?;
    let mut samples = vec![(Instant::now(), vcpu.spent()?)];
    let limit = Instant::now() + CYCLE_LIMIT;
    loop {
        if let Some(cutter) = &mut cutter {
            cutter.cut_if_due()?;
        }
        if serial.look()? {
            samples.push((Instant::now(), vcpu.spent()?));
        }
        if let Some(pieces) = serial.whole_cycle() {
            return Ok(pieces.into_iter().map(|piece| found(piece, &samples, cutter.as_deref())).collect());
        }
        if Instant::now() > limit {
            bail!("no whole cycle of work within {CYCLE_LIMIT:?}");
        }
        std::thread::sleep(LOOK);
    }
}

fn found(piece: Piece, samples: &[(Instant, Spent)], cutter: Option<&Cutter<'_>>) -> Found {
    let at = |when: Instant| {
        let sample = samples.iter().find(|(at, _)| *at >= when).or(samples.last());
        sample.map_or(Spent::default(), |(_, spent)| *spent)
    };
    let inside = |pause: &&Pause| piece.begun <= pause.at && pause.at < piece.ended;
    let pauses: Vec<&Pause> = cutter.map_or(&[][..], |cutter| &cutter.pauses).iter().filter(inside).collect();
    Found {
        paused_seconds: pauses.iter().fold(0.0, |sum, pause| sum + pause.seconds),
        epochs: pauses.len(),
        spent: at(piece.ended).since(&at(piece.begun)),
        piece,
    }
}

/// A pause of a cut, and when it was over.
struct Pause {
    at: Instant,
    seconds: f64,
}

/// Cuts at a rate, and encodes.
struct Cutter<'a> {
    protected: &'a mut Protected,
    arena: ArenaMap,
    encoder: PartEncoder,
    interval: Duration,
    next: Instant,
    pauses: Vec<Pause>,
}

impl<'a> Cutter<'a> {
    fn new(protected: &'a mut Protected, rate: u32) -> Result<Self> {
        let arena = ArenaMap::open(std::process::id(), protected.arena_fd, ARENA_BYTES)?;
        let interval = Duration::from_secs(1) / rate;
        let encoder = PartEncoder::default();
        Ok(Self { protected, arena, encoder, interval, next: Instant::now(), pauses: Vec::new() })
    }

    fn cut_if_due(&mut self) -> Result<()> {
        let now = Instant::now();
        if now < self.next {
            return Ok(());
        }
        self.next = (self.next + self.interval).max(now);
        let part = self.protected.cut()?;
        let pause_ns = part.timing.context("a cut without its timing")?.pause_ns;
        self.pauses.push(Pause { at: Instant::now(), seconds: pause_ns as f64 / 1e9 });
        let discard = |_| anyhow::Ok(());
        self.encoder.encode(&part, &self.arena, &Extras::default(), discard)?;
        self.protected.release(&part);
        Ok(())
    }
}
