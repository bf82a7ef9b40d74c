//! Answers to the outside: requests over UDP, and lines over TCP connections that must survive the change of site.
//!
//! UDP, one datagram each way, `WORD [TOKEN] ...`, the token being sent back so that late answers are told apart:
//! - `ping TOKEN` -> `pong TOKEN tick=... acknowledged=... writes=... boot=... check=none|ok@TICK|failed@TICK [reason=...]`
//! - `check TOKEN` -> after the check: `selfcheck TOKEN ok tick=N` or `selfcheck TOKEN FAILED tick=N REASON`
//! - `set TOKEN pages=N interval=MS records=0|1 churn=MIB` -> `set TOKEN ok` or `set TOKEN FAILED REASON`
//! - `clock TOKEN` -> `clock TOKEN unix_ns=...`: the guest's clock, for whoever wants to compare it
//! - `poweroff TOKEN`, `reboot TOKEN` -> `poweroff TOKEN ok`, and the guest does it
//!
//! TCP: each line is answered by `COUNT tick=N LINE`, the count being kept per connection.

use crate::cli::{Ask, Workload};
use crate::state::{Check, State};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest request or answer (bytes).
const DATAGRAM_BYTES_MAX: usize = 2048;
/// The longest a self-check may take before the answer says so.
const CHECK_SECONDS_MAX: u64 = 120;
/// The longest line taken over TCP (bytes).
const LINE_BYTES_MAX: u64 = 64 * 1024;
/// How long `ask` waits for an answer.
const ASK_SECONDS_MAX: u64 = 130;

/// Starts both servers.
pub fn start(options: &Workload, state: &Arc<State>) -> Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", options.port)).context("bind the UDP port")?;
    let listener = TcpListener::bind(("0.0.0.0", options.tcp_port)).context("bind the TCP port")?;
    let shared = Arc::clone(state);
    thread::Builder::new().name("udp".into()).spawn(move || serve_udp(&socket, &shared)).context("start a thread")?;
    let shared = Arc::clone(state);
    thread::Builder::new().name("tcp".into()).spawn(move || serve_tcp(&listener, &shared)).context("start a thread")?;
    Ok(())
}

fn serve_udp(socket: &UdpSocket, state: &Arc<State>) {
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    loop {
        let Ok((bytes, peer)) = socket.recv_from(&mut buffer) else { continue };
        let request = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
        let mut words = request.split_whitespace();
        let (word, token) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let answer = match word {
            "ping" => format!("pong {token} {}", state.line()),
            "clock" => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                format!("clock {token} unix_ns={}", since.as_nanos())
            }
            "set" => {
                let result = words.try_for_each(|pair| {
                    let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair} is not KEY=VALUE"))?;
                    state.set(key, value)
                });
                match result {
                    Ok(()) => format!("set {token} ok"),
                    Err(reason) => format!("set {token} FAILED {reason}"),
                }
            }
            "check" => {
                // A check takes a while: others get their answers meanwhile.
                let (state, token) = (Arc::clone(state), token.to_owned());
                if let Ok(socket) = socket.try_clone() {
                    thread::spawn(move || {
                        let check = state.request_check(Duration::from_secs(CHECK_SECONDS_MAX));
                        let _ = socket.send_to(check_line(&token, check).as_bytes(), peer);
                    });
                }
                continue;
            }
            "poweroff" | "reboot" => format!("{word} {token} ok"),
            _ => format!("error {token} unknown request: ping, check, set, clock, poweroff, reboot are known"),
        };
        // The asker repeats what got lost.
        let _ = socket.send_to(answer.as_bytes(), peer);
        if matches!(word, "poweroff" | "reboot") {
            // busybox's: writes out what the page cache has, and asks the kernel at once.
            let ended = Command::new(word).arg("-f").status();
            println!("{word}: {ended:?}");
        }
    }
}

fn check_line(token: &str, check: Option<Check>) -> String {
    match check {
        Some(Check { tick, failure: None }) => format!("selfcheck {token} ok tick={tick}"),
        Some(Check { tick, failure: Some(reason) }) => format!("selfcheck {token} FAILED tick={tick} {reason}"),
        None => format!("selfcheck {token} FAILED tick=0 no result within {CHECK_SECONDS_MAX} s"),
    }
}

fn serve_tcp(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming().flatten() {
        let state = Arc::clone(state);
        thread::spawn(move || {
            // The other end closing, or breaking, ends this connection and nothing else.
            let _ = serve_lines(&stream, &state);
        });
    }
}

fn serve_lines(stream: &TcpStream, state: &State) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    for count in 1u64.. {
        let mut line = String::new();
        if (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            break;
        }
        let answer = format!("{count} tick={} {}\n", state.tick.load(SeqCst), line.trim_end());
        stream.write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// Sends one request to a workload and prints the answer.
pub fn ask(options: &Ask) -> Result<()> {
    let local = if options.address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(local).context("bind a UDP socket")?;
    socket.set_read_timeout(Some(Duration::from_secs(ASK_SECONDS_MAX))).context("set a time limit")?;
    let (word, rest) = options.request.split_first().context("a request is needed: ping, check or set")?;
    let request = format!("{word} ask {}", rest.join(" "));
    socket.send_to(request.as_bytes(), options.address).context("send the request")?;
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    let (bytes, _) = socket.recv_from(&mut buffer).context("wait for the answer")?;
    let answer = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
    println!("{answer}");
    if answer.contains("FAILED") {
        bail!("the workload reports a failure");
    }
    Ok(())
}
