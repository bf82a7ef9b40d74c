//! How many dirty pages a second become durable.
//!
//! Epochs of a running guest are captured, encoded and sent over loopback by the agent's own code to a `vmdr-receiver` process, which
//! journals and syncs them on this machine's disk and acknowledges them. In turn with that, the same pages, where the capture has put
//! them, are copied with memcpy, compressed with LZ4 page by page, and encoded without being sent. So it shows what
//! is lost on the way from what one core could do at best.
//!
//! The same through the real daemons: a guest of the two-site rig that writes at a steady rate, and what `vmdr status` counts.

use std::fs;
use std::hint::black_box;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use vmdr_agent::arena_map::ArenaMap;
use vmdr_agent::encode::{Extras, PartEncoder};
use vmdr_agent::link::{self, LinkEvent, Target};
use vmdr_audit::Audit;
use vmdr_codec::{Disk, Layout, RamBlock};
use vmdr_proto::PAGE_BYTES;
use vmdr_proto::replication::ToReceiver;
use vmdr_proto::shim::Part;
use vmdr_shim::config::ARENA_BYTES;
use vmdr_tests::daemon;
use vmdr_tests::guest::GuestSpec;
use vmdr_tests::rig::At;
use vmdr_tests::scene::{ANSWER, Scene};
use vmdr_tests::wait::wait_for;
use vmdr_trust::Trust;

use crate::figures::{Samples, short};
use crate::machine::{Machine, Protected, Runs, Spec};
use crate::report::{Report, Table};

/// How long a receiver may take to start, and a part to become durable.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two cuts.
const EPOCH: Duration = Duration::from_millis(100);
/// How long the real daemons are watched.
const WATCHED: Duration = Duration::from_secs(15);
/// Pages that compress with LZ4 about as those of a database do (4.9 times; see docs/benchmarks.md), written at a rate that
/// leaves a core some time.
const WORKLOAD: &str = "--ram-mib 128 --fill-bytes 800 --interval-ms 10 --pages 400 --print-every 1000000";
const MEMORY_MIB: u64 = 256;
/// Not /tmp, which may be memory: the receiver's state belongs on a disk.
const DIRECTORY: &str = "/var/tmp";

/// What to measure.
#[derive(Args, Debug)]
pub struct Options {
    /// Rounds; each sends some epochs, then copies, compresses and encodes the same pages.
    #[arg(long, default_value_t = 15)]
    pub rounds: usize,
    /// Epochs in a round.
    #[arg(long, default_value_t = 6)]
    pub epochs: usize,
    /// Leave out the real daemons.
    #[arg(long)]
    pub no_daemons: bool,
}

/// Pages per second, by way.
#[derive(Default)]
struct Rates {
    pages: Samples,
    durable: Samples,
    shipped: Samples,
    copied: Samples,
    encoded: Samples,
    memcpy: Samples,
    lz4: Samples,
    /// Bytes of pages by bytes sent.
    compression: Samples,
}

/// Runs the benchmark.
pub fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("pipeline")?;
    let rates = libraries(options)?;
    let durable = rates.durable.median();
    let ways = [
        ("guest to durable", "durable", &rates.durable),
        ("  copy out of the guest", "copied", &rates.copied),
        ("  encode, send, sync, acknowledge", "shipped", &rates.shipped),
        ("encode alone", "encoded", &rates.encoded),
        ("LZ4 alone", "lz4", &rates.lz4),
        ("memcpy alone", "memcpy", &rates.memcpy),
    ];
    let mut table = Table {
        title: format!(
            "4 KiB pages per second, medians of {} rounds of {} pages; sent at 1/{} of their size",
            options.rounds,
            short(rates.pages.median()),
            short(rates.compression.median())
        ),
        heads: vec!["way", "pages/s", "MB/s", "of LZ4", "of memcpy"],
        rows: Vec::new(),
    };
    let mut result = serde_json::Map::new();
    for (name, key, samples) in ways {
        let rate = samples.median();
        let percent = |of: &Samples| format!("{:.0} %", 100.0 * rate / of.median());
        let megabytes = short(rate * PAGE_BYTES as f64 / 1e6);
        table.rows.push(vec![name.to_owned(), short(rate), megabytes, percent(&rates.lz4), percent(&rates.memcpy)]);
        result.insert(format!("{key}_pages_per_s"), rate.into());
    }
    result.insert("way".to_owned(), "libraries".into());
    result.insert("pages_per_round".to_owned(), rates.pages.median().into());
    result.insert("compression".to_owned(), rates.compression.median().into());
    result.insert("durable_to_lz4".to_owned(), (durable / rates.lz4.median()).into());
    result.insert("durable_to_memcpy".to_owned(), (durable / rates.memcpy.median()).into());
    report.results.push(result.into());
    report.tables.push(table);
    if !options.no_daemons {
        let (table, result) = daemons()?;
        report.tables.push(table);
        report.results.push(result);
    }
    Ok(report.finish())
}

fn libraries(options: &Options) -> Result<Rates> {
    eprintln!("pipeline: the agent's code and a receiver process");
    let runs = Runs::Linux(WORKLOAD.to_owned());
    let machine = Machine::start(Spec { runs, accelerator: "tcg", devices: true, memory_mib: MEMORY_MIB })?;
    let mut monitor = machine.monitor()?;
    let mut protected = machine.protect(&mut monitor)?;
    let receiver = Receiver::start()?;
    let mut shipper = Shipper::connect(&receiver, &protected)?;
    protected.seed(&mut monitor, &mut |part| {
        shipper.ship(part)?;
        shipper.wait_durable(part)
    })?;
    let mut rates = Rates::default();
    for round in 0..=options.rounds {
        let measured = one_round(options.epochs, &mut protected, &mut shipper)?;
        // In the first, files and caches grow.
        if round > 0 {
            measured.add_to(&mut rates);
        }
    }
    protected.capture.detach();
    Ok(rates)
}

/// Seconds that the same pages took.
struct Round {
    pages: f64,
    bytes_sent: f64,
    copy: f64,
    ship: f64,
    encode: f64,
    memcpy: f64,
    lz4: f64,
}

impl Round {
    fn add_to(&self, rates: &mut Rates) {
        rates.pages.add(self.pages);
        rates.durable.add(self.pages / (self.copy + self.ship));
        rates.shipped.add(self.pages / self.ship);
        rates.copied.add(self.pages / self.copy);
        rates.encoded.add(self.pages / self.encode);
        rates.memcpy.add(self.pages / self.memcpy);
        rates.lz4.add(self.pages / self.lz4);
        rates.compression.add(self.pages * PAGE_BYTES as f64 / self.bytes_sent);
    }
}

fn one_round(epochs: usize, protected: &mut Protected, shipper: &mut Shipper) -> Result<Round> {
    let mut parts = Vec::new();
    for _ in 0..epochs {
        std::thread::sleep(EPOCH);
        parts.push(protected.cut()?);
    }
    let last = parts.last().context("a round has an epoch at least")?;
    let pages = parts.iter().map(|part| part.dirty_pages).sum::<u64>() as f64;
    let copy = parts.iter().filter_map(|part| part.timing).map(|timing| timing.copy_ns).sum::<u64>() as f64 / 1e9;

    let begun = Instant::now();
    let mut bytes_sent = 0;
    for part in &parts {
        bytes_sent += shipper.ship(part)?;
    }
    shipper.wait_durable(last)?;
    let ship = begun.elapsed().as_secs_f64();

    let mut buffer = vec![0; vmdr_shim::arena::CHUNK_BYTES.max(lz4_flex::block::get_maximum_output_size(PAGE_BYTES))];
    let memcpy = shipper.over(&parts, |bytes| {
        buffer[..bytes.len()].copy_from_slice(bytes);
        black_box(&buffer);
    })?;
    let lz4 = shipper.over(&parts, |bytes| {
        for page in bytes.chunks(PAGE_BYTES) {
            // The buffer takes whatever a page can become.
            black_box(lz4_flex::block::compress_into(page, &mut buffer).unwrap_or(0));
        }
    })?;
    let begun = Instant::now();
    for part in &parts {
        shipper.encode(part, |message| {
            black_box(message);
            Ok(())
        })?;
    }
    let encode = begun.elapsed().as_secs_f64();
    protected.release(last);
    Ok(Round { pages, bytes_sent: bytes_sent as f64, copy, ship, encode, memcpy, lz4 })
}

/// The agent's half of the stream.
struct Shipper {
    map: ArenaMap,
    disks: Vec<Disk>,
    encoder: PartEncoder,
    sender: tokio::sync::mpsc::Sender<ToReceiver>,
    events: mpsc::Receiver<LinkEvent>,
    _runtime: tokio::runtime::Runtime,
}

impl Shipper {
    fn connect(receiver: &Receiver, protected: &Protected) -> Result<Self> {
        let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
        let (to, events) = mpsc::channel();
        let target = Target {
            receiver: receiver.address.to_string(),
            domain_uuid: uuid::Uuid::new_v4().to_string(),
            domain_name: "bench".to_owned(),
            generation: 1,
            trust: receiver.agent()?,
            limits: vmdr_agent::limits::Guest::unlimited(),
            failover: None,
        };
        runtime.spawn(link::run(target, to, |event| event));
        let sender = match events.recv_timeout(LIMIT).context("no word from the receiver")? {
            LinkEvent::Up { sender, .. } => sender,
            other => bail!("the receiver did not take the stream: {other:?}"),
        };
        let map = ArenaMap::open(std::process::id(), protected.arena_fd, ARENA_BYTES)?;
        let disks = protected.disks.iter();
        let disks = disks.map(|disk| Disk { target: disk.target().to_owned(), size_bytes: disk.size() }).collect();
        Ok(Self { map, disks, encoder: PartEncoder::default(), sender, events, _runtime: runtime })
    }

    fn encode(&mut self, part: &Part, send: impl FnMut(ToReceiver) -> Result<()>) -> Result<u64> {
        let ram = part.blocks.iter().map(|block| RamBlock {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
            page_bytes: block.page_bytes,
        });
        let layout = Layout { machine: "pc-q35-10.0".to_owned(), ram: ram.collect(), disks: self.disks.clone() };
        // As the agent does: the layout where the receiver needs it, the XML once.
        let extras = Extras {
            layout: (part.seed && (part.part == 0 || part.last)).then_some(&layout),
            domain_xml: (part.seed && part.last).then_some("<domain type='qemu'><name>bench</name></domain>"),
            application: false,
        };
        self.encoder.encode(part, &self.map, &extras, send)
    }

    fn ship(&mut self, part: &Part) -> Result<u64> {
        let sender = self.sender.clone();
        self.encode(part, |message| sender.blocking_send(message).context("the receiver closed the stream"))
    }

    fn wait_durable(&self, part: &Part) -> Result<()> {
        loop {
            match self.events.recv_timeout(LIMIT).context("an epoch does not become durable")? {
                LinkEvent::Durable(durable) if (durable.epoch, durable.part) == (part.epoch, part.part) => {
                    return Ok(());
                }
                LinkEvent::Durable(_) => {}
                other => bail!("the stream broke off: {other:?}"),
            }
        }
    }

    /// Seconds that `work` takes on the pages of these parts, a run or a chunk's length at a time.
    fn over(&self, parts: &[Part], mut work: impl FnMut(&[u8])) -> Result<f64> {
        let begun = Instant::now();
        for run in parts.iter().flat_map(|part| &part.runs) {
            let bytes = self.map.get(run.arena_offset, u64::from(run.pages) * PAGE_BYTES as u64);
            bytes.context("a run outside the arena")?.chunks(vmdr_shim::arena::CHUNK_BYTES).for_each(&mut work);
        }
        Ok(begun.elapsed().as_secs_f64())
    }
}

/// A `vmdr-receiver` process with a directory of its own.
struct Receiver {
    process: Child,
    address: SocketAddr,
    directory: tempfile::TempDir,
}

impl Receiver {
    fn start() -> Result<Self> {
        let directory =
            tempfile::Builder::new().prefix("vmdr-bench-").tempdir_in(DIRECTORY).context("make a directory")?;
        let address = TcpListener::bind("127.0.0.1:0").and_then(|at| at.local_addr()).context("find a free port")?;
        let socket = directory.path().join("receiver.sock");
        let config = format!(
            "listen = \"{address}\"\nmetrics_listen = \"\"\nstate_dir = {:?}\naudit_dir = {:?}\nidentity_dir = {:?}\ncontrol_socket = {socket:?}\n",
            directory.path().join("state"),
            directory.path().join("audit"),
            directory.path().join("identity")
        );
        let (own, agent) = (directory.path().join("identity"), directory.path().join("agent"));
        vmdr_trust::introduce((&own, "receiver", &[]), (&agent, "agent", &[])).context("pair the two")?;
        let file = directory.path().join("receiver.toml");
        fs::write(&file, config).context("write the receiver's configuration")?;
        let log = directory.path().join("log");
        let process = Command::new(daemon::binary("vmdr-receiver")?)
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).context("create the receiver's log")?)
            .spawn()
            .context("start vmdr-receiver")?;
        let mut receiver = Self { process, address, directory };
        wait_for("vmdr-receiver", LIMIT, || {
            if let Some(status) = receiver.process.try_wait().context("look at the receiver")? {
                bail!("vmdr-receiver ended with {status}: {}", fs::read_to_string(&log).unwrap_or_default());
            }
            Ok(UnixStream::connect(&socket).is_ok().then_some(()))
        })?;
        Ok(receiver)
    }
}

impl Receiver {
    /// Who the agent's code is to it.
    fn agent(&self) -> Result<Trust> {
        let audit = Audit::open(&self.directory.path().join("agent-audit"), "agent")?;
        Ok(Trust::open(&self.directory.path().join("agent"), audit)?)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It is gone already, or it goes now.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The real daemons, by what `vmdr status` says.
fn daemons() -> Result<(Table, Value)> {
    eprintln!("pipeline: the real daemons");
    let guest = GuestSpec::linux("bench").memory(MEMORY_MIB).workload(WORKLOAD);
    let scene = Scene::new("bench-pipeline", guest)?;
    let (client, address) = (scene.rig.client().clone(), scene.guest.address);
    scene.protect(&["--interval", "100ms"])?;
    scene.wait_durable()?;
    let first = (scene.status_number(At::A, "durable_epoch")?, client.ping(address, ANSWER)?.writes);
    let begun = Instant::now();
    std::thread::sleep(WATCHED);
    let status = scene.status(At::A)?;
    let last = (scene.status_number(At::A, "durable_epoch")?, client.ping(address, ANSWER)?.writes);
    let seconds = begun.elapsed().as_secs_f64();
    let number = |key: &str| status[key].as_f64().with_context(|| format!("{key} is no number in {status}"));
    let per_epoch = number("dirty_pages_per_epoch")?;
    let epochs = (last.0 - first.0) / seconds;
    let written = last.1.saturating_sub(first.1) as f64 / seconds;
    let (durable, age, bytes) = (epochs * per_epoch, number("rpo_seconds")?, number("bytes_per_epoch")?);
    let table = Table {
        title: "The real daemons, 100 ms epochs, a guest that writes steadily".to_owned(),
        heads: vec![
            "guest writes pages/s",
            "durable pages/s",
            "ratio",
            "epochs/s",
            "pages/epoch",
            "KiB/epoch",
            "RPO s",
        ],
        rows: vec![vec![
            short(written),
            short(durable),
            short(durable / written),
            short(epochs),
            short(per_epoch),
            short(bytes / 1024.0),
            short(age),
        ]],
    };
    let result = json!({
        "way": "daemons", "written_pages_per_s": written, "durable_pages_per_s": durable,
        "durable_to_written": durable / written, "epochs_per_s": epochs, "dirty_pages_per_epoch": per_epoch,
        "bytes_per_epoch": bytes, "rpo_s": age,
    });
    scene.rig.finish()?;
    Ok((table, result))
}
