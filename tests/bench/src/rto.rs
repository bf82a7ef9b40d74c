//! How long a lost guest is away.
//!
//! A guest is protected at one site of the rig; the site is killed; the page cache is dropped; `vmdr activate` starts it at the
//! other. Measured from the start of that command: until the receiver says that the guest runs, until the guest answers its first
//! request, and until it does 90 % of the work per second that it did before. The floor is the same domain started cold
//! by `virsh start`, the page cache dropped as well, until it answers its first request: what there is without vmdr, the disks being
//! at hand.

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use vmdr_tests::client::{Client, WORKLOAD_UDP_PORT};
use vmdr_tests::exec;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};

use crate::figures::{Samples, short};
use crate::report::{Bar, Report, Table};

/// The most that the RTO of a large guest may be of a small one's, and in seconds (issue 2).
const RATIO_MAX: f64 = 1.3;
const RTO_SECONDS_MAX: f64 = 2.0;
/// How often a guest is asked while it is waited for.
const ASK: Duration = Duration::from_millis(5);
/// How long a guest that was started cold may take until it answers.
const COLD: Duration = Duration::from_secs(180);
/// How long an activated guest may take until it works as before.
const RECOVERY: Duration = Duration::from_secs(30);
/// Work is counted over this long.
const WINDOW: Duration = Duration::from_millis(500);
/// Part of the work per second before that counts as working again.
const RECOVERED: f64 = 0.9;
/// What the guest does all the time: pages all over its RAM area, and a synced record, 50 times a second.
const WORKLOAD: &str = "--pages 200 --interval-ms 20 --print-every 1000000";

/// What to measure.
#[derive(Args, Debug)]
pub struct Options {
    /// Guest memory in MiB; the first is what the others are compared with. Half of it is touched.
    #[arg(long, value_delimiter = ',', default_values_t = [512, 4096])]
    pub memory_mib: Vec<u64>,
    /// How often each is measured, in turn.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
}

/// One guest's figures, in seconds from the start of a command.
#[derive(Default)]
struct Measured {
    running: Samples,
    command: Samples,
    answer: Samples,
    recovered: Samples,
    cold_kernel: Samples,
    cold_answer: Samples,
}

/// Runs the benchmark.
pub fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("rto")?;
    let mut all: Vec<Measured> = options.memory_mib.iter().map(|_| Measured::default()).collect();
    for round in 1..=options.rounds {
        for (&memory_mib, measured) in options.memory_mib.iter().zip(&mut all) {
            eprintln!("rto: {memory_mib} MiB, round {round} of {}", options.rounds);
            measure(memory_mib, measured).with_context(|| format!("a guest of {memory_mib} MiB"))?;
        }
    }
    let mut table = Table {
        title: "Seconds from the command, medians; the page cache dropped before it; cold: virsh start".to_owned(),
        heads: vec![
            "MiB",
            "touched",
            "rounds",
            "running",
            "returned",
            "answer",
            "90 % work",
            "cold: init",
            "cold: answer",
            "answer/cold",
        ],
        rows: Vec::new(),
    };
    for (&memory_mib, measured) in options.memory_mib.iter().zip(&all) {
        let median = |samples: &Samples| short(samples.median());
        table.rows.push(vec![
            memory_mib.to_string(),
            touched_mib(memory_mib).to_string(),
            measured.running.len().to_string(),
            median(&measured.running),
            median(&measured.command),
            median(&measured.answer),
            median(&measured.recovered),
            median(&measured.cold_kernel),
            median(&measured.cold_answer),
            short(measured.answer.median() / measured.cold_answer.median()),
        ]);
        report.results.push(result(memory_mib, measured));
    }
    report.tables = vec![table];
    if let Some((first, others)) = all.split_first() {
        for (memory_mib, measured) in options.memory_mib[1..].iter().zip(others) {
            let (value, base) = (measured.running.median(), options.memory_mib[0]);
            let ratio = value / first.running.median();
            report.bars.push(Bar::new(format!("RTO of {memory_mib} MiB / RTO of {base} MiB"), ratio, RATIO_MAX));
            report.bars.push(Bar::new(format!("RTO of {memory_mib} MiB in seconds"), value, RTO_SECONDS_MAX));
        }
    }
    Ok(report.finish())
}

/// What the workload's RAM area takes, and every page of it is written.
fn touched_mib(memory_mib: u64) -> u64 {
    memory_mib / 2
}

fn measure(memory_mib: u64, measured: &mut Measured) -> Result<()> {
    let workload = format!("--ram-mib {} {WORKLOAD}", touched_mib(memory_mib));
    let guest = GuestSpec::linux("bench").memory(memory_mib).workload(&workload);
    let mut scene = Scene::new("bench-rto", guest)?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    // Without this, the first answer would wait for an address resolution that is repeated once a second.
    let [_, b, c, d] = address.octets();
    let mac = format!("52:54:00:{b:02x}:{c:02x}:{d:02x}");
    scene.rig.wan_ip(&["neigh", "replace", &address.to_string(), "lladdr", &mac, "dev", "br-guest"])?;

    let site = scene.rig.site(At::A);
    site.virsh(&["destroy", &scene.guest.name])?;
    fs::write(site.path(scene.guest.console_path()), "").context("empty the console's log")?;
    drop_page_cache()?;
    let begun = Instant::now();
    site.virsh(&["start", &scene.guest.name])?;
    scene.guest.wait_console(site, "guest up", COLD)?;
    measured.cold_kernel.add(begun.elapsed().as_secs_f64());
    let cold = Watch::new(&client, address)?.first_answer(COLD)?;
    measured.cold_answer.add(cold.at.duration_since(begun).as_secs_f64());

    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let before = work_per_second(&client, address)?;
    let durable = scene.wait_durable()?;
    scene.lose_site_a()?;
    drop_page_cache()?;

    let watch = Watch::new(&client, address)?;
    let ended = AtomicBool::new(false);
    let begun = Instant::now();
    let (seen, report, returned) = std::thread::scope(|scope| {
        let seen = scope.spawn(|| watch.until_working(before, &ended));
        let report = scene.activate();
        let returned = begun.elapsed();
        ended.store(report.is_err(), Ordering::SeqCst);
        let seen = seen.join().unwrap_or_else(|_| bail!("the thread that watches the guest panicked"));
        anyhow::Ok((seen, report?, returned))
    })?;
    let seen = seen?;
    let epoch = report["point"]["epoch"].as_u64().context("the report names no epoch")?;
    if epoch < durable {
        bail!("epoch {durable} had been acknowledged, {epoch} was activated");
    }
    measured.running.add(report["rto_seconds"].as_f64().context("the report has no RTO")?);
    measured.command.add(returned.as_secs_f64());
    measured.answer.add(seen.answered.duration_since(begun).as_secs_f64());
    measured.recovered.add(seen.worked.duration_since(begun).as_secs_f64());
    eprintln!(
        "  running {:.2}, answered {:.2}, working {:.2}, cold {:.2}",
        report["rto_seconds"].as_f64().unwrap_or(0.0),
        seen.answered.duration_since(begun).as_secs_f64(),
        seen.worked.duration_since(begun).as_secs_f64(),
        measured.cold_answer.quantile(1000),
    );
    client.self_check(address).context("RAM and disk after the activation")?;
    scene.rig.finish()
}

/// Everything that is read afterwards comes from the disk.
fn drop_page_cache() -> Result<()> {
    // Written back first: only what is clean can be dropped.
    exec::run(&mut exec::limited(120, "sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache (root is needed)")
}

/// Pages the workload writes in a second.
fn work_per_second(client: &Client, address: Ipv4Addr) -> Result<f64> {
    let first = client.ping(address, ANSWER)?;
    let begun = Instant::now();
    std::thread::sleep(4 * WINDOW);
    let last = client.ping(address, ANSWER)?;
    Ok(last.writes.saturating_sub(first.writes) as f64 / begun.elapsed().as_secs_f64())
}

/// Asks a guest again and again.
struct Watch {
    socket: UdpSocket,
}

/// An answer.
#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    writes: u64,
}

/// What was seen of a guest that came back.
struct Back {
    answered: Instant,
    worked: Instant,
}

impl Watch {
    fn new(client: &Client, address: Ipv4Addr) -> Result<Self> {
        let socket = client.udp(0)?;
        socket.connect((address, WORKLOAD_UDP_PORT)).context("connect a UDP socket")?;
        socket.set_read_timeout(Some(ASK)).context("set a time limit")?;
        Ok(Self { socket })
    }

    /// One request, and the answer if it comes within [`ASK`]. A late answer to an earlier one is as good.
    fn ask(&self) -> Option<Seen> {
        // Unreachable (no guest yet) is what the repetition is for.
        let _ = self.socket.send(b"ping bench");
        let mut buffer = [0; 4096];
        let asked = Instant::now();
        match self.socket.recv(&mut buffer) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
                let writes = text.split_whitespace().find_map(|word| word.strip_prefix("writes=")?.parse().ok())?;
                Some(Seen { at: Instant::now(), writes })
            }
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
                    std::thread::sleep(ASK.saturating_sub(asked.elapsed()));
                }
                None
            }
        }
    }

    fn first_answer(&self, limit: Duration) -> Result<Seen> {
        let begun = Instant::now();
        while begun.elapsed() < limit {
            if let Some(seen) = self.ask() {
                return Ok(seen);
            }
        }
        bail!("the guest did not answer within {limit:?}")
    }

    /// Waits for the first answer, and from there for the first [`WINDOW`] in which as much is done as before, nearly.
    fn until_working(&self, before: f64, ended: &AtomicBool) -> Result<Back> {
        let begun = Instant::now();
        let mut seen: Vec<Seen> = Vec::new();
        while begun.elapsed() < RECOVERY && !ended.load(Ordering::SeqCst) {
            let Some(now) = self.ask() else { continue };
            seen.push(now);
            // Of a window that ends now, or a little earlier.
            let start = seen.iter().rev().find(|then| now.at.duration_since(then.at) >= WINDOW);
            if let Some(start) = start {
                let seconds = now.at.duration_since(start.at).as_secs_f64();
                if now.writes.saturating_sub(start.writes) as f64 / seconds >= RECOVERED * before {
                    return Ok(Back { answered: seen[0].at, worked: start.at });
                }
            }
            std::thread::sleep(ASK);
        }
        match seen.first() {
            None => bail!("the guest did not answer within {RECOVERY:?}"),
            Some(_) => bail!("the guest did not do {:.0} pages/s again within {RECOVERY:?}", RECOVERED * before),
        }
    }
}

fn result(memory_mib: u64, measured: &Measured) -> Value {
    let summary = |samples: &Samples| json!({ "p50_s": samples.median(), "max_s": samples.quantile(1000), "samples": samples.len() });
    json!({
        "memory_mib": memory_mib, "touched_mib": touched_mib(memory_mib),
        "running": summary(&measured.running), "command": summary(&measured.command),
        "answer": summary(&measured.answer), "recovered": summary(&measured.recovered),
        "cold_init": summary(&measured.cold_kernel), "cold_answer": summary(&measured.cold_answer),
        "answer_to_cold": measured.answer.median() / measured.cold_answer.median(),
    })
}
