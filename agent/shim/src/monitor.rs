//! How QEMU is talked to: the domain's own QMP socket, or libvirt's monitor passthrough where it has none.
//!
//! Passthrough has limits: commands are not pipelined, other API calls may come between them, events do not reach us
//! (the time of a pause is measured from outside and a little longer than it was), and while libvirtd is away a guest
//! that a cut has stopped waits for it. It serves for intervals of a second and more.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;
use vmdr_hypervisor::Error as VirtError;
use vmdr_hypervisor::libvirt::{Connection, Domain};

use crate::qmp::{COMMAND_LIMIT, Command, Event, Qmp, QmpError, Sent};

/// How long a libvirtd that is being restarted is waited for.
const LIBVIRTD_LIMIT: Duration = Duration::from_secs(30);
const LIBVIRTD_RETRY: Duration = Duration::from_millis(200);

/// Where a guest's monitor is.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Address {
    /// The domain's own QMP socket.
    Socket(PathBuf),
    /// Through libvirt.
    Libvirt {
        /// Of the host's libvirt.
        uri: String,
        /// Of the domain.
        uuid: Uuid,
    },
}

impl Address {
    /// As `status` calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Socket(_) => "direct",
            Self::Libvirt { .. } => "passthrough",
        }
    }
}

/// Ends a connection under whoever waits on it.
#[derive(Debug)]
pub struct Breaker(UnixStream);

impl Breaker {
    /// Nothing comes or goes any more.
    pub fn break_off(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A connection to a guest's monitor.
pub enum Monitor {
    /// See [`Address::Socket`].
    Direct(Qmp),
    /// See [`Address::Libvirt`].
    Passthrough(Box<Passthrough>),
}

impl Monitor {
    /// Connects.
    pub fn connect(address: &Address, limit: Duration) -> Result<Self, QmpError> {
        match address {
            Address::Socket(path) => Qmp::connect(path, limit).map(Self::Direct),
            Address::Libvirt { uri, uuid } => {
                Passthrough::connect(uri, *uuid, limit).map(|passthrough| Self::Passthrough(Box::new(passthrough)))
            }
        }
    }

    /// What ends this connection from elsewhere; nothing where others can talk to QEMU all the same.
    pub fn breaker(&self) -> io::Result<Option<Breaker>> {
        match self {
            Self::Direct(qmp) => Ok(Some(Breaker(qmp.try_clone()?))),
            Self::Passthrough(_) => Ok(None),
        }
    }

    /// Sends commands, to be executed in order.
    pub fn send<const N: usize>(&mut self, commands: [Command<'_>; N]) -> Result<[Sent; N], QmpError> {
        match self {
            Self::Direct(qmp) => qmp.send(commands),
            Self::Passthrough(passthrough) => passthrough.send(commands),
        }
    }

    /// Waits for the answer to a command.
    pub fn wait(&mut self, sent: Sent, limit: Duration) -> Result<Value, QmpError> {
        match self {
            Self::Direct(qmp) => qmp.wait(sent, limit),
            Self::Passthrough(passthrough) => passthrough.take(sent),
        }
    }

    /// Sends one command and waits for its answer.
    pub fn execute(&mut self, command: &'static str, arguments: Option<&Value>) -> Result<Value, QmpError> {
        let [sent] = self.send([(command, arguments)])?;
        self.wait(sent, COMMAND_LIMIT)
    }

    /// A command of the human monitor.
    pub fn human(&mut self, line: &str) -> Result<String, QmpError> {
        let answer = self.execute("human-monitor-command", Some(&json!({ "command-line": line })))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Hands a descriptor to QEMU as fd set `set`.
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>, set: u32) -> Result<(), QmpError> {
        match self {
            Self::Direct(qmp) => qmp.add_fd(fd, set),
            Self::Passthrough(passthrough) => passthrough.run("add-fd", &json!({ "fdset-id": set }), &[fd]).map(|_| ()),
        }
    }

    /// Takes the events that have arrived, without waiting.
    pub fn events(&mut self) -> Result<Vec<Event>, QmpError> {
        match self {
            Self::Direct(qmp) => qmp.events(),
            Self::Passthrough(passthrough) => Ok(passthrough.events.drain(..).collect()),
        }
    }

    /// Takes the events that were read already: also those that came before the connection ended.
    pub fn read_events(&mut self) -> Vec<Event> {
        match self {
            Self::Direct(qmp) => qmp.read_events(),
            Self::Passthrough(passthrough) => passthrough.events.drain(..).collect(),
        }
    }

    /// Takes the first event called `name`, waiting for it until `limit` has passed.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Option<Event>, QmpError> {
        match self {
            Self::Direct(qmp) => qmp.wait_event(name, limit),
            Self::Passthrough(passthrough) => {
                let at = passthrough.events.iter().position(|event| event.name == name);
                Ok(at.and_then(|at| passthrough.events.remove(at)))
            }
        }
    }
}

/// libvirt's `virDomainQemuMonitorCommand`, with the answers kept until they are waited for.
pub struct Passthrough {
    uri: String,
    uuid: Uuid,
    domain: Domain,
    next_id: u64,
    /// As `query-status` said last: `stop` stops only a guest that runs.
    running: bool,
    answers: Vec<(u64, Result<Value, QmpError>)>,
    events: VecDeque<Event>,
}

impl Passthrough {
    fn connect(uri: &str, uuid: Uuid, limit: Duration) -> Result<Self, QmpError> {
        let domain = find(uri, &uuid, limit)?;
        Ok(Self {
            uri: uri.to_owned(),
            uuid,
            domain,
            next_id: 1,
            running: false,
            answers: Vec::new(),
            events: VecDeque::new(),
        })
    }

    fn send<const N: usize>(&mut self, commands: [Command<'_>; N]) -> Result<[Sent; N], QmpError> {
        let mut fatal = None;
        let sent = commands.map(|(command, arguments)| {
            let id = self.next_id;
            self.next_id += 1;
            let before = now_us();
            // Events do not come this way: a guest that runs already was resumed by somebody else.
            if command == "cont"
                && self.run("query-status", &Value::Null, &[]).is_ok_and(|status| status["status"] == "running")
            {
                self.event("RESUME", before);
            }
            let answer = self.run(command, arguments.unwrap_or(&Value::Null), &[]);
            match (&answer, command) {
                (Ok(status), "query-status") => self.running = status["status"] == "running",
                (Ok(_), "stop") if self.running => self.event("STOP", before),
                (Ok(_), "cont") => self.event("RESUME", now_us()),
                (Err(error), _) if error.is_fatal() => fatal = Some(error.to_string()),
                _ => {}
            }
            self.answers.push((id, answer));
            Sent::new(id, command)
        });
        match fatal {
            Some(message) => Err(QmpError::Io(io::Error::other(message))),
            None => Ok(sent),
        }
    }

    fn take(&mut self, sent: Sent) -> Result<Value, QmpError> {
        match self.answers.iter().position(|(id, _)| *id == sent.id()) {
            Some(at) => self.answers.swap_remove(at).1,
            None => Err(QmpError::Malformed("an answer that was taken before".to_owned())),
        }
    }

    fn run(&mut self, command: &str, arguments: &Value, files: &[BorrowedFd<'_>]) -> Result<Value, QmpError> {
        loop {
            match self.domain.qmp_with_files(command, arguments.clone(), files) {
                Ok(answer) => return Ok(answer),
                Err(VirtError::Monitor { command, message, .. }) => return Err(QmpError::Command { command, message }),
                // Every command used may be given twice; libvirtd being restarted must not leave the guest stopped.
                Err(error) if error.is_connection() => self.domain = find(&self.uri, &self.uuid, LIBVIRTD_LIMIT)?,
                Err(error) if error.is_timeout() => {
                    // Another API call has the domain's job.
                    return Err(QmpError::Timeout { command: command.to_owned(), limit: COMMAND_LIMIT });
                }
                Err(error) => return Err(QmpError::Io(io::Error::other(error))),
            }
        }
    }

    fn event(&mut self, name: &str, at_us: u64) {
        self.events.push_back(Event { name: name.to_owned(), at_us, data: Value::Null });
    }
}

fn find(uri: &str, uuid: &Uuid, limit: Duration) -> Result<Domain, QmpError> {
    let until = Instant::now() + limit;
    loop {
        let error = match Connection::open(uri).and_then(|connection| connection.domain_by_uuid(uuid)) {
            Ok(domain) => return Ok(domain),
            Err(error) => error,
        };
        if error.is_no_such_domain() || Instant::now() >= until {
            return Err(QmpError::Io(io::Error::other(error)));
        }
        std::thread::sleep(LIBVIRTD_RETRY);
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}
