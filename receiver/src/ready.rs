//! Whether a guest does its work again: what the checks of drills ([`crate::drill::checks`]) and of groups ([`crate::group::checks`])
//! have in common. Both are tried until they pass or their time is over.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmdr_guest_channel::{Decoder, Frame, Hello, Message, PORT};
use vmdr_hypervisor::Error;
use vmdr_hypervisor::domain_xml::{GUEST_AGENT_CHANNEL, channel};
use vmdr_hypervisor::libvirt::Domain;
use vmdr_hypervisor::xml::Element;

/// How long one try of a connection may take.
pub const CONNECT: Duration = Duration::from_millis(1500);
/// How long the guest agent may take for one answer, in libvirt's whole seconds.
pub const ANSWER_SECONDS: i32 = 2;

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// Which.
    pub check: String,
    /// Whether it passed.
    pub passed: bool,
    /// What was found.
    pub said: String,
    /// How long it took.
    pub seconds: f64,
}

impl From<&Checked> for vmdr_proto::control::DrillCheck {
    fn from(checked: &Checked) -> Self {
        let Checked { check, passed, said, seconds } = checked.clone();
        Self { check, passed, said, seconds }
    }
}

/// What a try found: passed, not yet, or for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// As it should be.
    Passed(String),
    /// It may come right.
    NotYet(String),
    /// It will not.
    Failed(String),
}

/// How long, and how often, something is tried.
#[derive(Debug, Clone, Copy)]
pub struct Tries {
    /// From the first try on.
    pub limit: Duration,
    /// Between two.
    pub interval: Duration,
    /// After the first; `None`: as the time allows.
    pub retries: Option<u64>,
}

/// Tries until it passes, has failed for good, or may not be tried again. `rest` rests, or says why there is no more to be done;
/// `one` is given the number of the try and what is left of the time.
pub fn try_until<E>(
    name: &str,
    tries: Tries,
    rest: &mut dyn FnMut(Duration) -> Result<(), E>,
    one: &mut dyn FnMut(usize, Duration) -> Result<Found, E>,
) -> Result<Checked, E> {
    let begun = Instant::now();
    let done =
        |passed, said| Ok(Checked { check: name.to_owned(), passed, said, seconds: begun.elapsed().as_secs_f64() });
    let mut turn = 0;
    loop {
        match one(turn, tries.limit.saturating_sub(begun.elapsed()))? {
            Found::Passed(said) => return done(true, said),
            Found::Failed(said) => return done(false, said),
            Found::NotYet(said)
                if begun.elapsed() >= tries.limit || tries.retries.is_some_and(|most| turn as u64 >= most) =>
            {
                return done(false, said);
            }
            Found::NotYet(_) => rest(tries.interval)?,
        }
        turn += 1;
    }
}

/// Who in a guest is to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Port {
    /// vmdr's tools, at this socket.
    Tools(PathBuf),
    /// The QEMU guest agent.
    Agent,
}

/// The channels of a guest that runs at whose port somebody is to answer: where the guest's end is open, or where the channel is
/// one of `answered`. Also whether all ends are open.
pub fn ports(live: &Element, answered: &[&str]) -> (Vec<Port>, bool) {
    let there = [PORT, GUEST_AGENT_CHANNEL].map(|name| channel(live, name));
    let is_open = |of: &&Element| of.attribute_at("target", "state") == Some("connected");
    let all = there.iter().flatten().all(is_open);
    let counts =
        |of: &&Element| is_open(of) || of.attribute_at("target", "name").is_some_and(|name| answered.contains(&name));
    let [tools, agent] = there.map(|of| of.filter(counts));
    let tools = tools.and_then(|of| of.attribute_at("source", "path")).map(|path| Port::Tools(path.into()));
    (tools.into_iter().chain(agent.map(|_| Port::Agent)).collect(), all)
}

/// Whether somebody answers there; the QEMU guest agent is asked this.
pub fn heartbeat(domain: Result<Domain, Error>, port: &Port, ask: &str) -> Found {
    match port {
        Port::Tools(path) => match greet(path) {
            Ok(true) => Found::Passed("its tools answer".to_owned()),
            Ok(false) => Found::NotYet("its tools do not answer".to_owned()),
            Err(error) => Found::NotYet(format!("its tools: {}: {error}", path.display())),
        },
        Port::Agent => match domain.and_then(|of| of.guest_agent(ask, ANSWER_SECONDS)) {
            Ok(_) => Found::Passed("its QEMU guest agent answers".to_owned()),
            Err(error) => Found::NotYet(error.to_string()),
        },
    }
}

/// Whether a port takes connections.
pub fn connect(to: SocketAddr) -> Found {
    match TcpStream::connect_timeout(&to, CONNECT) {
        Ok(_) => Found::Passed(format!("{to} takes connections")),
        Err(error) => Found::NotYet(format!("{to}: {error}")),
    }
}

/// Whether the guest's tools introduce themselves, as they do when they are asked.
fn greet(path: &Path) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.set_write_timeout(Some(CONNECT))?;
    let message = Message::Hello(Hello::own(0, true, concat!("vmdr receiver ", env!("CARGO_PKG_VERSION"))));
    stream.write_all(&Frame { number: 1, message }.encode())?;
    let (mut decoder, until) = (Decoder::default(), Instant::now() + CONNECT);
    let mut buffer = [0; 1024];
    while Instant::now() < until {
        let read = match stream.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        };
        let mut bytes = &buffer[..read];
        while let Some(frame) = decoder.next(&mut bytes) {
            if matches!(frame.message, Message::Hello(_)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn tried(tries: Tries, found: &[Found]) -> (Checked, usize) {
        let mut made = 0;
        let checked = try_until::<Infallible>("x", tries, &mut |_| Ok(()), &mut |turn, _| {
            assert_eq!(turn, made);
            made += 1;
            Ok(found[turn.min(found.len() - 1)].clone())
        });
        let Ok(checked) = checked;
        (checked, made)
    }

    #[test]
    fn it_is_tried_until_it_passes_or_may_not_be_tried_again() {
        let not_yet = Found::NotYet("no".to_owned());
        let tries = Tries { limit: Duration::from_secs(60), interval: Duration::ZERO, retries: Some(2) };
        let (checked, made) = tried(tries, &[not_yet.clone(), Found::Passed("yes".to_owned())]);
        assert!((checked.passed, checked.said.as_str(), made) == (true, "yes", 2), "{checked:?}");
        let (checked, made) = tried(tries, std::slice::from_ref(&not_yet));
        assert!((checked.passed, checked.said.as_str(), made) == (false, "no", 3), "{checked:?}");
        let (checked, made) = tried(tries, &[Found::Failed("never".to_owned())]);
        assert!((checked.passed, checked.said.as_str(), made) == (false, "never", 1), "{checked:?}");
        let none = Tries { limit: Duration::ZERO, retries: None, ..tries };
        assert_eq!(tried(none, &[not_yet]).1, 1, "once in any case");
    }

    #[test]
    fn tools_that_introduce_themselves_live() {
        let dir = tempfile::tempdir().unwrap();
        let frame = |message| Frame { number: 1, message }.encode();
        let hello = || frame(Message::Hello(Hello::own(0, false, "x")));
        let late = [frame(Message::Unsupported(9)), hello()].concat();
        let answers =
            [(hello(), true), (late, true), (frame(Message::Unsupported(9)), false), (b"noise".to_vec(), false)];
        for (turn, (said, lives)) in answers.into_iter().enumerate() {
            let path = dir.path().join(turn.to_string());
            let listener = UnixListener::bind(&path).unwrap();
            let guest = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = [0; 256];
                assert!(stream.read(&mut asked).unwrap() > 0);
                stream.write_all(&said).unwrap();
            });
            assert_eq!(greet(&path).unwrap(), lives);
            guest.join().unwrap();
        }
        assert!(greet(&dir.path().join("nobody")).is_err());
    }
}
