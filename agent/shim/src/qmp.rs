//! A QMP client on the domain's own monitor socket: commands pipelined, events kept with QEMU's time stamps, every
//! wait with a limit.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// How long a command that does no I/O may take, QEMU's main loop being busy with others.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// The longest line accepted from QEMU.
const LINE_BYTES_MAX: usize = 64 << 20;
/// Events kept for the owner; older ones are dropped first.
const EVENTS_MAX: usize = 1024;

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket failed or QEMU closed it.
    #[error("QMP connection: {0}")]
    Io(#[from] io::Error),
    /// QEMU answered with an error.
    #[error("QMP {command}: {message}")]
    Command {
        /// The command.
        command: String,
        /// QEMU's words.
        message: String,
    },
    /// No answer in time. The command may still be executed later.
    #[error("QMP {command}: no answer within {limit:?}")]
    Timeout {
        /// The command.
        command: String,
        /// What was allowed.
        limit: Duration,
    },
    /// Not JSON, or not a QMP message.
    #[error("QMP: not understood: {0}")]
    Malformed(String),
}

impl QmpError {
    /// Whether nothing can be said on this connection any more.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Malformed(_))
    }
}

/// An event, with QEMU's time stamp.
#[derive(Clone, Debug)]
pub struct Event {
    /// `STOP`, `RESUME`, `SHUTDOWN`, ...
    pub name: String,
    /// Microseconds since the epoch, by QEMU's clock.
    pub at_us: u64,
    /// What comes with it.
    pub data: Value,
}

/// A command that was sent; its answer is waited for with [`Qmp::wait`].
#[derive(Debug)]
#[must_use]
pub struct Sent {
    id: u64,
    command: &'static str,
}

impl Sent {
    pub(crate) fn new(id: u64, command: &'static str) -> Self {
        Self { id, command }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

/// A command with its arguments.
pub type Command<'a> = (&'static str, Option<&'a Value>);

/// The connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Bytes of `buffer` already searched for a line's end.
    searched: usize,
    next_id: u64,
    replies: Vec<(u64, Result<Value, String>)>,
    /// Answers that nobody waits for any more.
    abandoned: Vec<u64>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects and leaves negotiation mode. A QMP socket serves one client at a time: another one's presence shows
    /// as a greeting that does not come.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)?;
        let mut qmp = Self {
            stream,
            buffer: Vec::new(),
            searched: 0,
            next_id: 1,
            replies: Vec::new(),
            abandoned: Vec::new(),
            events: VecDeque::new(),
        };
        let deadline = Instant::now() + limit;
        let greeting = qmp.read_line(deadline)?.ok_or_else(|| QmpError::Timeout {
            command: format!("greeting on {} (is another client connected?)", path.display()),
            limit,
        })?;
        let greeting: Value = serde_json::from_slice(&greeting).map_err(|e| QmpError::Malformed(e.to_string()))?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed(format!("greeting {greeting}")));
        }
        // Without `oob` QEMU reads no further command before one is done, whatever was sent: in a cut that costs a wake-up
        // of its I/O thread between any two commands, a millisecond in all.
        let offered = greeting.pointer("/QMP/capabilities").and_then(Value::as_array);
        let oob = offered.is_some_and(|offered| offered.iter().any(|capability| capability == "oob"));
        let enable = if oob { json!({ "enable": ["oob"] }) } else { json!({ "enable": [] }) };
        qmp.execute("qmp_capabilities", Some(&enable))?;
        Ok(qmp)
    }

    /// The same connection, for whoever is to end it.
    pub fn try_clone(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Sends commands in one write; QEMU executes them in order.
    pub fn send<const N: usize>(&mut self, commands: [Command<'_>; N]) -> Result<[Sent; N], QmpError> {
        let mut text = Vec::with_capacity(128 * N);
        let sent = commands.map(|command| self.encode(command, &mut text));
        self.stream.write_all(&text)?;
        Ok(sent)
    }

    /// Waits for the answer to a command. After a timeout its late answer is thrown away.
    pub fn wait(&mut self, sent: Sent, limit: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.replies.iter().position(|(id, _)| *id == sent.id) {
                let (_, reply) = self.replies.swap_remove(at);
                return reply.map_err(|message| QmpError::Command { command: sent.command.to_owned(), message });
            }
            match self.read_line(deadline)? {
                Some(line) => self.take_line(&line)?,
                None => {
                    self.abandoned.push(sent.id);
                    return Err(QmpError::Timeout { command: sent.command.to_owned(), limit });
                }
            }
        }
    }

    /// Sends one command and waits for its answer, [`COMMAND_LIMIT`] at most.
    pub fn execute(&mut self, command: &'static str, arguments: Option<&Value>) -> Result<Value, QmpError> {
        let [sent] = self.send([(command, arguments)])?;
        self.wait(sent, COMMAND_LIMIT)
    }

    /// A command of the human monitor.
    pub fn human(&mut self, line: &str) -> Result<String, QmpError> {
        let answer = self.execute("human-monitor-command", Some(&json!({ "command-line": line })))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Hands a descriptor to QEMU as fd set `set`, as which it is `/dev/fdset/SET`.
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>, set: u32) -> Result<(), QmpError> {
        let mut text = Vec::new();
        let sent = self.encode(("add-fd", Some(&json!({ "fdset-id": set }))), &mut text);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for a descriptor").into());
        }
        let n = sendmsg(self.stream.as_fd(), &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)
            .map_err(io::Error::from)?;
        self.stream.write_all(&text[n..])?;
        self.wait(sent, COMMAND_LIMIT)?;
        Ok(())
    }

    /// Takes the events that have arrived, without waiting.
    pub fn events(&mut self) -> Result<Vec<Event>, QmpError> {
        let now = Instant::now();
        while let Some(line) = self.read_line(now)? {
            self.take_line(&line)?;
        }
        Ok(self.events.drain(..).collect())
    }

    /// Takes the events that were read already: also those that came before the connection ended.
    pub fn read_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// Takes the first event called `name`, waiting for it until `limit` has passed.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Option<Event>, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|event| event.name == name) {
                return Ok(self.events.remove(at));
            }
            match self.read_line(deadline)? {
                Some(line) => self.take_line(&line)?,
                None => return Ok(None),
            }
        }
    }

    fn encode(&mut self, (command, arguments): Command<'_>, text: &mut Vec<u8>) -> Sent {
        let id = self.next_id;
        self.next_id += 1;
        let message = match arguments {
            Some(arguments) => json!({ "execute": command, "arguments": arguments, "id": id }),
            None => json!({ "execute": command, "id": id }),
        };
        text.extend_from_slice(message.to_string().as_bytes());
        text.push(b'\n');
        Sent { id, command }
    }

    fn take_line(&mut self, line: &[u8]) -> Result<(), QmpError> {
        let mut message: Value = serde_json::from_slice(line).map_err(|e| QmpError::Malformed(e.to_string()))?;
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let stamp = |key| message.pointer(key).and_then(Value::as_u64).unwrap_or(0);
            let event = Event {
                name: name.to_owned(),
                at_us: stamp("/timestamp/seconds") * 1_000_000 + stamp("/timestamp/microseconds"),
                data: message.get("data").cloned().unwrap_or(Value::Null),
            };
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(event);
            return Ok(());
        }
        let id = message.get("id").and_then(Value::as_u64);
        let reply = match message.get("error") {
            Some(error) => Err(error.get("desc").and_then(Value::as_str).unwrap_or("unknown error").to_owned()),
            None => Ok(message.get_mut("return").map(Value::take).unwrap_or(Value::Null)),
        };
        match id {
            Some(id) if self.abandoned.contains(&id) => self.abandoned.retain(|other| *other != id),
            Some(id) => self.replies.push((id, reply)),
            None => return Err(QmpError::Malformed(String::from_utf8_lossy(line).into_owned())),
        }
        Ok(())
    }

    /// The next line, or nothing when the deadline passes first. What has arrived already is returned even after it.
    fn read_line(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            if let Some(at) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + at + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.searched > LINE_BYTES_MAX {
                return Err(QmpError::Malformed("line without an end".to_owned()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut space = [0; 16 << 10];
            let read = if left.is_zero() {
                self.stream.set_nonblocking(true)?;
                let read = self.stream.read(&mut space);
                self.stream.set_nonblocking(false)?;
                read
            } else {
                self.stream.set_read_timeout(Some(left))?;
                self.stream.read(&mut space)
            };
            match read {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed it").into()),
                Ok(n) => self.buffer.extend_from_slice(&space[..n]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
