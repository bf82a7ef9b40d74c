//! A client of the guests in the network between the sites.

use crate::wait::wait_for;
use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// UDP port of the workload in a guest.
pub const WORKLOAD_UDP_PORT: u16 = 7000;
/// TCP port of the workload in a guest.
pub const WORKLOAD_TCP_PORT: u16 = 7001;
/// How long one datagram is waited for before it is sent again.
const RESEND_MS: u64 = 200;
/// How long a guest may take for its self-check.
const CHECK_SECONDS_MAX: u64 = 120;
/// The longest answer of a workload (bytes).
const DATAGRAM_BYTES_MAX: usize = 4096;

/// Makes sockets in a network namespace; they stay in it, whoever uses them.
#[derive(Clone, Debug)]
pub struct Client {
    pid: u32,
}

/// What a workload says of its self-check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// None was made.
    None,
    /// RAM and disk agreed after this tick.
    Ok(u64),
    /// They did not.
    Failed(String),
}

/// An answer of a workload.
#[derive(Clone, Debug)]
pub struct Pong {
    /// Ticks since the workload began.
    pub tick: u64,
    /// The newest record on its disk.
    pub acknowledged: u64,
    /// RAM pages written since the workload began.
    pub writes: u64,
    /// By the guest's own clock.
    pub uptime: Duration,
    /// The same as long as the guest has not booted anew.
    pub boot: String,
    /// Its newest self-check.
    pub check: Check,
}

static TOKEN: AtomicU64 = AtomicU64::new(1);

impl Client {
    /// A client in the network namespace of this process.
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }

    /// Runs `make` in the namespace.
    pub fn inside<T: Send>(&self, make: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid)).context("open the client's namespace")?;
        // A thread of its own, because it cannot go back.
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("enter the client's namespace")?;
                make()
            });
            thread.join()
        });
        match made {
            Ok(result) => result,
            Err(_) => bail!("a thread in the client's namespace panicked"),
        }
    }

    /// A UDP socket; port 0: any.
    pub fn udp(&self, port: u16) -> Result<UdpSocket> {
        self.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).context("bind a UDP socket"))
    }

    /// A TCP connection.
    pub fn tcp(&self, to: SocketAddr, limit: Duration) -> Result<TcpStream> {
        self.inside(|| TcpStream::connect_timeout(&to, limit).with_context(|| format!("connect to {to}")))
    }

    /// A TCP listener.
    pub fn listen(&self, at: SocketAddr) -> Result<TcpListener> {
        self.inside(|| TcpListener::bind(at).with_context(|| format!("listen at {at}")))
    }

    /// Sends a request to a workload, again and again, until it answers or `limit` is over. `once`: sends it once only.
    pub fn request(&self, guest: Ipv4Addr, request: &str, once: bool, limit: Duration) -> Result<String> {
        let socket = self.udp(0)?;
        let token = format!("t{}", TOKEN.fetch_add(1, Relaxed));
        let (word, rest) = request.split_once(' ').unwrap_or((request, ""));
        let text = format!("{word} {token} {rest}");
        let end = Instant::now() + limit;
        let mut sent = false;
        while Instant::now() < end {
            if !(sent && once) {
                // Unreachable (no guest yet, or none any more) is what the repetition is for.
                sent = socket.send_to(text.as_bytes(), (guest, WORKLOAD_UDP_PORT)).is_ok();
            }
            let left = end.saturating_duration_since(Instant::now());
            let wait = left.min(Duration::from_millis(RESEND_MS)).max(Duration::from_millis(1));
            socket.set_read_timeout(Some(wait)).context("set a time limit")?;
            let mut buffer = [0; DATAGRAM_BYTES_MAX];
            match socket.recv(&mut buffer) {
                Ok(bytes) => {
                    let answer = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
                    if answer.split_whitespace().nth(1) == Some(&token) {
                        return Ok(answer);
                    }
                }
                // ENETUNREACH and the like come at once.
                Err(_) if !sent => std::thread::sleep(wait),
                Err(_) => {}
            }
        }
        bail!("guest {guest} did not answer {word} within {:.1} s", limit.as_secs_f64())
    }

    /// Asks a workload how far it is.
    pub fn ping(&self, guest: Ipv4Addr, limit: Duration) -> Result<Pong> {
        let answer = self.request(guest, "ping", false, limit)?;
        parse(&answer).with_context(|| format!("guest {guest} answered {answer:?}"))
    }

    /// Waits until a workload has done this many ticks.
    pub fn wait_tick(&self, guest: Ipv4Addr, tick: u64, limit: Duration) -> Result<Pong> {
        wait_for(&format!("tick {tick} of guest {guest}"), limit, || {
            Ok(self.ping(guest, Duration::from_secs(1)).ok().filter(|pong| pong.tick >= tick))
        })
    }

    /// Has a workload check that its RAM and its disk agree; a disagreement is an error. Gives the tick after which it did.
    pub fn self_check(&self, guest: Ipv4Addr) -> Result<u64> {
        let answer = self.request(guest, "check", true, Duration::from_secs(CHECK_SECONDS_MAX))?;
        let tick = answer.split_whitespace().find_map(|word| word.strip_prefix("tick=")?.parse().ok());
        match (answer.split_whitespace().nth(2), tick) {
            (Some("ok"), Some(tick)) => Ok(tick),
            _ => bail!("self-check of guest {guest}: {answer}"),
        }
    }

    /// Changes a workload: `pages=N interval=MS records=0|1`.
    pub fn set(&self, guest: Ipv4Addr, settings: &str, limit: Duration) -> Result<()> {
        let answer = self.request(guest, &format!("set {settings}"), false, limit)?;
        if answer.split_whitespace().nth(2) != Some("ok") {
            bail!("guest {guest}: {answer}");
        }
        Ok(())
    }
}

fn parse(answer: &str) -> Result<Pong> {
    let value = |key: &str| {
        let found = answer.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        found.with_context(|| format!("{key} is missing"))
    };
    let number = |key: &str| value(key)?.parse::<u64>().with_context(|| format!("{key} is no number"));
    let check = match value("check")? {
        "none" => Check::None,
        ok if ok.starts_with("ok@") => Check::Ok(ok[3..].parse().context("the check's tick is no number")?),
        _ => Check::Failed(answer.split_once("reason=").map_or("no reason", |(_, reason)| reason).to_owned()),
    };
    Ok(Pong {
        tick: number("tick")?,
        acknowledged: number("acknowledged")?,
        writes: number("writes")?,
        uptime: Duration::from_millis(number("uptime_ms")?),
        boot: value("boot")?.to_owned(),
        check,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_understood() {
        let line = "pong t1 tick=5 acknowledged=4 writes=900 pages=1 interval=2 uptime_ms=77 boot=ab check=failed@3 reason=a b";
        let pong = parse(line).unwrap();
        assert_eq!((pong.tick, pong.acknowledged, pong.writes, pong.boot.as_str()), (5, 4, 900, "ab"));
        assert_eq!(pong.check, Check::Failed("a b".to_owned()));
        assert!(parse("pong t1 tick=x").is_err());
    }
}
