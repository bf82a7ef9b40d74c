//! A freeze through the QEMU guest agent, which never thaws by itself: so a process of its own does all of it.
//!
//! `vmdr-agent freeze` asks the guest agent to freeze, says so, and asks it to thaw when it hears "thaw", when its input ends
//! (the agent that started it has died) or when the time is over; again and again until it is answered, for [`THAW_TRIES`].
//! While the guest is paused nobody can be asked: that time does not count, however long it is.
//! It is in a group of its own and not ended by SIGTERM. Each question has a limit in libvirt; the blocking
//! `virDomainFSFreeze` has none, so the same commands are sent as `virDomainQemuAgentCommand`.
//!
//! Not bounded by anything at the host: a guest agent that dies while file systems are frozen, or this host's end of it
//! (SIGKILL of this process too, libvirtd gone for longer). `virsh domfsthaw DOMAIN`, or a reset of the guest, is what is left.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;
use vmdr_hypervisor::libvirt::{Connection, Domain};

use super::{Frozen, Held, Limits, Thawed};
use vmdr_daemon::guest_channel::printable;

/// As the operator is told.
const WAY: &str = "the QEMU guest agent";
/// How long the helper may take beside what it asks the guest agent for.
const SPARE: Duration = Duration::from_secs(5);
/// How long one question to thaw may take, in libvirt's whole seconds.
const THAW_SECONDS: i32 = 5;
/// For how long it is asked again when it fails.
const THAW_TRIES: Duration = Duration::from_secs(120);
/// Rest between two of them.
const THAW_REST: Duration = Duration::from_millis(500);
/// Rest where libvirt refused to ask because the guest is paused, as it is in every cut: at first, and when it stays so.
const PAUSE_REST: Duration = Duration::from_millis(10);
const PAUSE_REST_MAX: Duration = Duration::from_millis(500);
/// Why it was thawed: because the agent has asked, in time.
const ASKED: &str = "asked";
/// Or not.
const UNASKED: &str = "unasked";
/// Lines of the helper that wait to be read: it says two.
const LINES_MAX: usize = 4;
/// The longest of them.
const LINE_BYTES_MAX: u64 = 4096;

/// Words of the helper's command line.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// libvirt.
    #[arg(long)]
    uri: String,
    /// UUID of the domain.
    #[arg(long)]
    domain: Uuid,
    /// How long freezing may take, in milliseconds.
    #[arg(long)]
    freeze_ms: u64,
    /// How long it stays frozen at most, in milliseconds.
    #[arg(long)]
    hold_ms: u64,
}

/// The agent's end of it. Dropping it has the helper thaw.
#[derive(Debug)]
pub struct Helper {
    stdin: ChildStdin,
    lines: Receiver<String>,
    frozen: u32,
}

/// Starts the helper and waits until the guest is frozen.
pub fn freeze(uri: &str, uuid: &Uuid, limits: Limits) -> Result<Frozen, String> {
    let (stdin, lines) =
        start(uri, uuid, limits).map_err(|error| format!("start a process that freezes: {error:#}"))?;
    let line = lines.recv_timeout(limits.freeze + SPARE);
    match line.as_deref().map(|line| line.split_once(' ').unwrap_or((line, ""))) {
        Ok(("frozen", count)) => {
            let frozen = count.parse().unwrap_or(0);
            let held = Held::Agent(Helper { stdin, lines, frozen });
            Ok(Frozen::new(held, limits.hold, frozen, String::new(), WAY))
        }
        Ok((_, why)) => Err(format!("{WAY} could not freeze the file systems: {why}")),
        Err(RecvTimeoutError::Timeout) => Err(format!("{WAY} did not freeze the file systems in time")),
        Err(RecvTimeoutError::Disconnected) => Err("the process that freezes ended at once".to_owned()),
    }
}

fn start(uri: &str, uuid: &Uuid, limits: Limits) -> anyhow::Result<(ChildStdin, Receiver<String>)> {
    let ms = |time: Duration| time.as_millis().to_string();
    // Its file may have been replaced by a newer version: then it has this one's name no more.
    let own = std::env::current_exe().ok().filter(|own| own.exists());
    let mut command = Command::new(own.unwrap_or_else(|| "/proc/self/exe".into()));
    command.args(["freeze", "--uri", uri, "--domain", &uuid.to_string()]);
    command.args(["--freeze-ms", &ms(limits.freeze), "--hold-ms", &ms(limits.hold)]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let stdin = child.stdin.take().context("no pipe to it")?;
    let stdout = child.stdout.take().context("no pipe from it")?;
    let (sender, lines) = sync_channel(LINES_MAX);
    // Ends with the helper, which ends by itself.
    std::thread::Builder::new().name("freeze helper".to_owned()).spawn(move || {
        for line in BufReader::new(stdout.take(LINE_BYTES_MAX)).lines().map_while(Result::ok) {
            let _ = sender.try_send(printable(&line));
        }
        drop(sender);
        let _ = child.wait();
    })?;
    Ok((stdin, lines))
}

impl Helper {
    /// Has it thaw and waits. It goes on trying when this is over.
    pub fn thaw(mut self, limit: Duration) -> Result<Thawed, String> {
        let told = self.stdin.write_all(b"thaw\n");
        told.map_err(|_| "the process that froze the guest is gone".to_owned())?;
        let line = self.lines.recv_timeout(limit);
        let mut words = line.as_deref().unwrap_or_default().split(' ');
        match (words.next(), words.next().and_then(|n| n.parse().ok()), words.next().and_then(|n| n.parse().ok())) {
            (Some("thawed"), Some(count), Some(ms)) => {
                let whole = self.frozen > 0 && u32::ge(&count, &self.frozen);
                let asked = words.next() == Some(ASKED);
                let text = match (asked, whole) {
                    (true, true) => String::new(),
                    (true, false) => format!("only {count} were still frozen"),
                    (false, _) => "the time was over before they were asked to thaw".to_owned(),
                };
                Ok(Thawed { held: asked && whole, frozen: Duration::from_millis(ms), text })
            }
            _ => Err(format!("{WAY} has not thawed the file systems within {limit:?}; it is asked again")),
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes()).and_then(|()| out.flush());
}

/// What the helper does.
pub fn run(options: &Options) -> ExitCode {
    match work(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn work(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Caught once, they end nothing any more.
    runtime.block_on(async {
        for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::pipe()] {
            drop(signal(kind)?);
        }
        Ok::<_, std::io::Error>(())
    })?;
    let (sender, told) = mpsc::channel();
    std::thread::Builder::new().name("agent".to_owned()).spawn(move || {
        // "thaw", or the end of whoever would say it.
        let asked = matches!(std::io::stdin().read(&mut [0; 16]), Ok(1..));
        let _ = sender.send(asked);
    })?;
    let domain = Connection::open(&options.uri)?.domain_by_uuid(&options.domain)?;
    let seconds = i32::try_from(options.freeze_ms.div_ceil(1000)).unwrap_or(i32::MAX).max(1);
    let until = Instant::now() + Duration::from_millis(options.freeze_ms);
    let frozen = loop {
        match domain.guest_agent("guest-fsfreeze-freeze", seconds) {
            // A cut has paused the guest just now: libvirt sent nothing.
            Err(error) if error.is_wrong_state() && Instant::now() < until => std::thread::sleep(PAUSE_REST),
            answer => break answer,
        }
    };
    let begun = Instant::now();
    let mut why = UNASKED;
    match &frozen {
        Ok(count) if count.as_u64().is_some_and(|count| count > 0) => {
            say(&format!("frozen {count}"));
            // Whatever comes, nothing included.
            if told.recv_timeout(Duration::from_millis(options.hold_ms)) == Ok(true) {
                why = ASKED;
            }
        }
        Ok(_) => say("failed it has frozen nothing"),
        Err(error) => say(&format!("failed {error}")),
    }
    // Also what could not be frozen in time may be soon.
    let thawed = thaw(domain, options)?;
    say(&format!("thawed {thawed} {} {why}", begun.elapsed().as_millis()));
    Ok(())
}

fn thaw(mut domain: Domain, options: &Options) -> anyhow::Result<u64> {
    let (mut tried, mut rest) = (Duration::ZERO, PAUSE_REST);
    loop {
        let begun = Instant::now();
        match domain.guest_agent("guest-fsfreeze-thaw", THAW_SECONDS) {
            Ok(count) => return Ok(count.as_u64().unwrap_or(0)),
            // Held, suspended, moved: it goes on frozen when it goes on. One that has ended has nothing to thaw.
            Err(error) if error.is_wrong_state() => {
                if domain.state().is_ok_and(|(state, _)| !state.is_active()) {
                    return Err(error).context("the guest has ended");
                }
                std::thread::sleep(rest);
                rest = (rest * 2).min(PAUSE_REST_MAX);
            }
            Err(error) if tried >= THAW_TRIES => return Err(error).context("thaw the guest's file systems"),
            Err(error) => {
                eprintln!("vmdr-agent freeze: domain {}: {error}", options.domain);
                std::thread::sleep(THAW_REST);
                rest = PAUSE_REST;
                // libvirtd may have been restarted.
                if let Ok(again) = Connection::open(&options.uri).and_then(|c| c.domain_by_uuid(&options.domain)) {
                    domain = again;
                }
                tried += begun.elapsed();
            }
        }
    }
}
