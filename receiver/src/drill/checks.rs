//! What has to be true of a copy that runs.
//!
//! | check | passes when |
//! | --- | --- |
//! | `runs` | for some seconds the copy runs, its vCPUs get and use time, and no I/O of its disks fails; always made |
//! | `heartbeat` | the guest's tools answer, or its QEMU guest agent; made where the guest has, or had at the cut, the channel's port open |
//! | `tcp:PORT`, `tcp:ADDRESS:PORT` | a TCP connection from beside the guest is accepted |
//! | `cmd:COMMAND` | a shell's command ends with 0; it runs beside the guest, in a network with nothing else in it |
//!
//! All but the first are tried again until they pass or their time is over. What the guest says is not believed further than
//! that it was said.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde_json::Value;
use uuid::Uuid;
use vmdr_guest_channel::PORT;
use vmdr_hypervisor::domain_xml::{GUEST_AGENT_CHANNEL, channel};
use vmdr_hypervisor::libvirt::{Connection, Domain, DomainState};
use vmdr_hypervisor::xml::Element;

use super::net::Probe;
use super::{Control, DrillError};
use crate::ready::{self, ANSWER_SECONDS, Checked, Found, Port, Tries};

/// Checks of one drill, at most.
pub const CHECKS_MAX: usize = 16;
/// The longest command.
const COMMAND_BYTES_MAX: usize = 4096;
/// What its QEMU guest agent is asked: it does not thaw by itself what was frozen at the cut.
const THAW: &str = "guest-fsfreeze-thaw";
/// Between two looks, and two tries.
const LOOK: Duration = Duration::from_millis(250);
/// The same, while a command runs.
const COMMAND_LOOK: Duration = Duration::from_millis(20);
/// The largest file that a command may write, its output included.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// How long the guest's end of a channel may take to be seen.
const OPEN_MAX: Duration = Duration::from_secs(5);
/// As much of what a command says is shown.
const SAID_BYTES_MAX: u64 = 400;

/// A check that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A TCP port is open.
    Tcp {
        /// At this address; nothing: at the one that the guest announces.
        address: Option<Ipv4Addr>,
        /// The port.
        port: u16,
    },
    /// A command of the operator's ends with 0.
    Command(String),
}

impl FromStr for Check {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(64).collect();
        let wrong =
            |what: &str| format!("check {shown:?}: {what}; known are tcp:PORT, tcp:ADDRESS:PORT and cmd:COMMAND");
        match text.split_once(':') {
            Some(("tcp", rest)) => {
                let (address, port) = match rest.rsplit_once(':') {
                    None => (None, rest),
                    Some((address, port)) => {
                        let parsed = address.parse().map_err(|_| wrong("the address is not an IPv4 address"))?;
                        (Some(parsed), port)
                    }
                };
                let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(|| wrong("there is no such port"))?;
                Ok(Self::Tcp { address, port })
            }
            Some(("cmd", command)) if command.trim().is_empty() => Err(wrong("the command is empty")),
            Some(("cmd", command)) if command.len() > COMMAND_BYTES_MAX || command.contains('\0') => {
                Err(wrong("the command is too long, or has a NUL"))
            }
            Some(("cmd", command)) => Ok(Self::Command(command.to_owned())),
            _ => Err(wrong("it is none")),
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address: None, port } => write!(f, "tcp:{port}"),
            Self::Tcp { address: Some(address), port } => write!(f, "tcp:{address}:{port}"),
            Self::Command(command) => write!(f, "cmd:{command}"),
        }
    }
}

/// Reads what was asked for.
pub fn parse(texts: &[String]) -> Result<Vec<Check>, String> {
    if texts.len() > CHECKS_MAX {
        return Err(format!("{} checks: at most {CHECKS_MAX} are made", texts.len()));
    }
    texts.iter().map(|text| text.parse()).collect()
}

/// The copy, and how it is asked.
pub struct Subject<'a> {
    /// Its libvirt.
    pub connection: &'a Connection,
    /// Its domain.
    pub uuid: Uuid,
    /// Its identity, and the domain and point that it is of, for commands: names and values.
    pub environment: Vec<(&'static str, String)>,
    /// Beside it.
    pub probe: &'a Arc<Probe>,
    /// The addresses of its cards.
    pub macs: &'a [String],
    /// Where commands write.
    pub directory: &'a Path,
    /// Whether to go on.
    pub control: &'a Arc<Control>,
    /// The channels whose port the definition says was open.
    pub answered: &'a [&'static str],
    /// How long a check may take.
    pub limit: Duration,
    /// How long it has to run.
    pub run: Duration,
    /// Whether there is room to go on.
    pub guard: &'a dyn Fn() -> Result<(), DrillError>,
}

/// The names of the channels to which, by its definition, the guest's end was open.
pub fn answered(domain: &Element) -> Vec<&'static str> {
    let open =
        |name: &&str| channel(domain, name).is_some_and(|of| of.attribute_at("target", "state") == Some("connected"));
    [PORT, GUEST_AGENT_CHANNEL].into_iter().filter(open).collect()
}

impl Subject<'_> {
    /// Makes all checks. An error: the drill has to end.
    pub fn check(&self, asked: &[Check], progress: &mut dyn FnMut(&str)) -> Result<Vec<Checked>, DrillError> {
        let begun = Instant::now();
        let before = self.domain().and_then(|domain| vcpu_ns(&domain));
        let mut made = Vec::new();
        for port in self.open_ports()? {
            progress("wait for the guest's heartbeat");
            made.push(self.try_until("heartbeat", |_| Ok(ready::heartbeat(self.domain(), &port, THAW)))?);
        }
        for check in asked {
            progress(&format!("check {check}"));
            made.push(match check {
                Check::Tcp { address, port } => {
                    self.try_until(&check.to_string(), |turn| self.tcp(*address, *port, turn))?
                }
                Check::Command(command) => self.try_until(&check.to_string(), |turn| self.command(command, turn))?,
            });
        }
        progress("see the guest run");
        made.insert(0, self.runs(begun, before)?);
        Ok(made)
    }

    fn domain(&self) -> Result<Domain, vmdr_hypervisor::Error> {
        self.connection.domain_by_uuid(&self.uuid)
    }

    fn try_until(
        &self,
        name: &str,
        mut one: impl FnMut(usize) -> Result<Found, DrillError>,
    ) -> Result<Checked, DrillError> {
        let tries = Tries { limit: self.limit, interval: LOOK, retries: None };
        ready::try_until(name, tries, &mut |time| self.control.rest(time), &mut |turn, _| {
            (self.guard)()?;
            one(turn)
        })
    }

    fn runs(&self, begun: Instant, before: Result<u64, vmdr_hypervisor::Error>) -> Result<Checked, DrillError> {
        let done = |passed, said: String| {
            Ok(Checked { check: "runs".to_owned(), passed, said, seconds: begun.elapsed().as_secs_f64() })
        };
        loop {
            (self.guard)()?;
            let looked = self.domain().and_then(|domain| Ok((domain.state()?.0, failed_io(&domain)?, domain)));
            match looked {
                Err(error) if error.is_no_such_domain() => {
                    return done(false, "the guest has shut down, or QEMU has ended".to_owned());
                }
                Err(error) => return done(false, error.to_string()),
                Ok((state, ..)) if !matches!(state, DomainState::Running | DomainState::Blocked) => {
                    return done(false, format!("the guest is {state}"));
                }
                Ok((_, 1.., _)) => return done(false, "I/O of its disks has failed".to_owned()),
                Ok((_, _, domain)) if begun.elapsed() >= self.run => {
                    return match (before, vcpu_ns(&domain)) {
                        (Ok(before), Ok(now)) if now > before => {
                            let used = Duration::from_nanos(now - before).as_secs_f64();
                            let all = begun.elapsed().as_secs_f64();
                            done(true, format!("in {all:.1} s its vCPUs ran for {used:.1} s, and no I/O failed"))
                        }
                        (Ok(_), Ok(_)) => done(false, "its vCPUs do not run".to_owned()),
                        (Err(error), _) | (_, Err(error)) => done(false, error.to_string()),
                    };
                }
                Ok(_) => self.control.rest(LOOK)?,
            }
        }
    }

    /// The channels whose port the guest has open: somebody is to answer there. QEMU says so only once the guest runs, so a
    /// guest that has such a channel is given some time. Where somebody answered before, somebody is to answer in any case.
    fn open_ports(&self) -> Result<Vec<Port>, DrillError> {
        let until = Instant::now() + OPEN_MAX;
        loop {
            let Ok(xml) = self.domain().and_then(|domain| domain.live_xml()) else { return Ok(Vec::new()) };
            let (ports, all) = ready::ports(&xml, self.answered);
            if all || Instant::now() >= until {
                return Ok(ports);
            }
            self.control.rest(LOOK)?;
        }
    }

    /// Runs a command beside the guest, as long as there is room. Nothing: it was killed at its limit.
    fn guarded(&self, shell: Command) -> Result<std::io::Result<Option<std::process::ExitStatus>>, DrillError> {
        let stop = Arc::new(Control::default());
        let (probe, limit, of) = (self.probe, self.limit, Arc::clone(&stop));
        std::thread::scope(|threads| {
            let runs = threads.spawn(move || probe.run(move || wait(shell, &of, limit)));
            let mut refused = None;
            while !runs.is_finished() {
                if refused.is_none()
                    && let Err(error) = (self.guard)()
                {
                    stop.end(&error.to_string());
                    refused = Some(error);
                }
                std::thread::sleep(COMMAND_LOOK);
            }
            let ended = runs.join().map_err(|_| super::net::NetError::Ended)??;
            refused.map_or(Ok(ended), Err)
        })
    }

    /// Where the guest is: as it announces it, or as its agent claims.
    fn addresses(&self) -> Result<Vec<(usize, Ipv4Addr)>, DrillError> {
        let announced = self.probe.announced(self.macs)?;
        if !announced.is_empty() {
            return Ok(announced);
        }
        let asked = self.domain().and_then(|of| of.guest_agent("guest-network-get-interfaces", ANSWER_SECONDS));
        let claimed = asked.map(|claims| claimed(&claims, self.macs)).unwrap_or_default();
        let networks = 0..self.probe.networks();
        Ok(networks.flat_map(|network| claimed.iter().map(move |address| (network, *address))).collect())
    }

    fn tcp(&self, address: Option<Ipv4Addr>, port: u16, turn: usize) -> Result<Found, DrillError> {
        let places = match address {
            Some(address) => (0..self.probe.networks()).map(|network| (network, address)).collect(),
            None => self.addresses()?,
        };
        if self.probe.networks() == 0 {
            return Ok(Found::Failed("the guest has no network card".to_owned()));
        }
        let Some((network, address)) = places.get(turn % places.len().max(1)).copied() else {
            let said = "the guest has not announced an address; name it: tcp:ADDRESS:PORT".to_owned();
            return Ok(Found::NotYet(said));
        };
        self.probe.settle_beside(network, address, turn / places.len().max(1))?;
        let to = SocketAddr::from((address, port));
        Ok(self.probe.run(move || ready::connect(to))?)
    }

    fn command(&self, command: &str, turn: usize) -> Result<Found, DrillError> {
        let mut environment = self.environment.clone();
        let places = self.addresses()?;
        if let Some((network, address)) = places.first().copied() {
            self.probe.settle_beside(network, address, turn)?;
            environment.push(("VMDR_DRILL_ADDRESS", address.to_string()));
        }
        let said = self.directory.join("check.out");
        let out = File::create(&said).map_err(DrillError::io("create", &said))?;
        let errors = out.try_clone().map_err(DrillError::io("open", &said))?;
        let mut shell = shell(command);
        shell.envs(environment).stdin(Stdio::null()).stdout(out).stderr(errors);
        let ended = self.guarded(shell)?;
        let mut last = Vec::new();
        let read = File::open(&said).and_then(|file| file.take(SAID_BYTES_MAX).read_to_end(&mut last));
        read.map_err(DrillError::io("read", &said))?;
        let last = String::from_utf8_lossy(&last).trim().replace('\n', "; ");
        Ok(match ended {
            Ok(Some(status)) if status.success() => Found::Passed(last),
            Ok(Some(status)) => Found::NotYet(format!("{status}: {last}").trim_end_matches([' ', ':']).to_owned()),
            Ok(None) => {
                self.control.go_on()?;
                Found::Failed(format!("it did not end within {} s: {last}", self.limit.as_secs()))
            }
            Err(error) => Found::Failed(format!("cannot run it: {error}")),
        })
    }
}

/// A shell with a command, in a process group of its own, so that all of it can be ended. No file that it writes gets larger than
/// [`FILE_BYTES_MAX`].
fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    // In units of 512 bytes.
    let limited = format!("ulimit -f {} && exec sh -c \"$1\"", FILE_BYTES_MAX / 512);
    shell.arg("-c").arg(limited).arg("sh").arg(command).process_group(0);
    shell
}

/// Runs it to its end, and ends what it has started and left; nothing: it was killed.
fn wait(mut shell: Command, control: &Control, limit: Duration) -> std::io::Result<Option<std::process::ExitStatus>> {
    let mut child = shell.spawn()?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let until = Instant::now() + limit;
    loop {
        // It stays a zombie, so that its number is nobody else's while its group is ended.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if let Some(group) = group
            && waitid(WaitId::Pid(group), look)?.is_some()
        {
            // There may be nobody else in it.
            let _ = kill_process_group(group, Signal::KILL);
            return child.wait().map(Some);
        }
        if Instant::now() >= until || control.rest(Duration::from_millis(20)).is_err() {
            if let Some(group) = group {
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait()?;
            return Ok(None);
        }
    }
}

/// The IPv4 addresses that a guest agent claims for these cards.
fn claimed(claims: &Value, macs: &[String]) -> Vec<Ipv4Addr> {
    let cards = claims.as_array().into_iter().flatten();
    let ours = cards.filter(|card| {
        let mac = card["hardware-address"].as_str().unwrap_or_default();
        macs.iter().any(|known| known.eq_ignore_ascii_case(mac))
    });
    let addresses = ours.flat_map(|card| card["ip-addresses"].as_array().into_iter().flatten());
    addresses.filter_map(|address| address["ip-address"].as_str()?.parse().ok()).take(CHECKS_MAX).collect()
}

/// Nanoseconds for which the copy's vCPUs have run.
fn vcpu_ns(domain: &Domain) -> Result<u64, vmdr_hypervisor::Error> {
    let vcpus = domain.qmp("query-cpus-fast", Value::Null)?;
    let threads = vcpus.as_array().into_iter().flatten().filter_map(|vcpu| vcpu["thread-id"].as_u64());
    let ran = |thread: u64| {
        let text = std::fs::read_to_string(format!("/proc/{thread}/schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    Ok(threads.filter_map(ran).sum())
}

/// How many of its disks' operations have failed.
fn failed_io(domain: &Domain) -> Result<u64, vmdr_hypervisor::Error> {
    let disks = domain.qmp("query-blockstats", Value::Null)?;
    let kinds = ["failed_rd_operations", "failed_wr_operations", "failed_flush_operations"];
    let of = |disk: &Value| kinds.iter().map(|kind| disk["stats"][kind].as_u64().unwrap_or(0)).sum::<u64>();
    Ok(disks.as_array().into_iter().flatten().map(of).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_read_and_said_again() {
        for text in ["tcp:22", "tcp:10.0.0.1:443", "cmd:curl -sf http://$VMDR_DRILL_ADDRESS:80/"] {
            assert_eq!(text.parse::<Check>().unwrap().to_string(), text);
        }
        for (text, what) in [
            ("tcp:0", "no such port"),
            ("tcp:70000", "no such port"),
            ("tcp:host:1", "not an IPv4 address"),
            ("cmd: ", "empty"),
            ("udp:5", "it is none"),
            ("", "it is none"),
        ] {
            let error = text.parse::<Check>().unwrap_err();
            assert!(error.contains(what) && error.contains("known are"), "{text}: {error}");
        }
        assert!(parse(&vec!["tcp:1".to_owned(); CHECKS_MAX + 1]).is_err());
    }

    #[test]
    fn what_an_agent_claims_of_other_cards_does_not_count() {
        let claims = serde_json::json!([
            { "name": "lo", "ip-addresses": [{ "ip-address": "127.0.0.1" }], "hardware-address": "00:00:00:00:00:00" },
            { "name": "a", "ip-addresses": [{ "ip-address": "fe80::1" }, { "ip-address": "10.0.0.7" }],
              "hardware-address": "52:54:00:00:00:0A" },
            { "name": "b" }, 7
        ]);
        assert_eq!(claimed(&claims, &["52:54:00:00:00:0a".to_owned()]), [Ipv4Addr::new(10, 0, 0, 7)]);
        assert_eq!(claimed(&Value::Null, &[]), [] as [Ipv4Addr; 0]);
    }

    #[test]
    fn a_command_ends_in_any_case() {
        let control = Arc::new(Control::default());
        let limit = Duration::from_secs(60);
        assert!(wait(shell("true"), &control, limit).unwrap().unwrap().success());
        assert_eq!(wait(shell("exit 7"), &control, limit).unwrap().unwrap().code(), Some(7));
        assert!(wait(shell("sleep 600 & sleep 600"), &control, Duration::from_millis(100)).unwrap().is_none());
        control.end("enough");
        assert!(wait(shell("sleep 600"), &control, limit).unwrap().is_none());
    }

    #[test]
    fn what_a_command_leaves_ends_with_it_and_writes_no_more_than_it_may() {
        let control = Arc::new(Control::default());
        let dir = tempfile::tempdir().unwrap();
        let (pid, large) = (dir.path().join("pid"), dir.path().join("large"));
        let command = format!("sleep 600 & echo $! > {}", pid.display());
        let limit = Duration::from_secs(60);
        assert!(wait(shell(&command), &control, limit).unwrap().unwrap().success());
        let left = std::fs::read_to_string(&pid).unwrap();
        let until = Instant::now() + limit;
        let runs = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", left.trim())).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while runs() {
            assert!(Instant::now() < until, "{left} runs on");
            std::thread::sleep(LOOK);
        }
        let command = format!("exec dd if=/dev/zero bs=1048576 count=64 of={}", large.display());
        assert!(!wait(shell(&command), &control, limit).unwrap().unwrap().success());
        assert_eq!(large.metadata().unwrap().len(), FILE_BYTES_MAX);
    }

    #[test]
    fn where_somebody_answered_at_the_cut_is_in_the_definition() {
        let domain = |state: &str| {
            let channel = format!("<channel><target name='{GUEST_AGENT_CHANNEL}' state='{state}'/></channel>");
            Element::parse(&format!("<domain><devices>{channel}</devices></domain>")).unwrap()
        };
        assert_eq!(answered(&domain("connected")), [GUEST_AGENT_CHANNEL]);
        assert!(answered(&domain("disconnected")).is_empty());
    }
}
