//! The protection of one domain: a thread that asks the shim for parts, encodes them and hands them to the link.
//!
//! ```text
//!            attach          link up: seed                last part sent
//!  starting ---------> linking -----------> copying -------------------> protected --+
//!     ^                   ^                    ^    <------------------------|       | a cut each interval
//!     |  shim lost        |  link down         |     too much is dirty               |
//!     +-------------------+--------------------+-------------------------------------+
//! ```
//!
//! Nothing is kept here that cannot be asked for again: what was captured is in the shim until the receiver says that
//! it is durable.

mod active;
pub mod attach;
pub mod figures;
mod resume;

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use uuid::Uuid;
use vmdr_hypervisor::libvirt::Connection;

use self::active::Active;
use self::attach::Attached;
use self::figures::Figures;
use crate::config::Config;
use crate::guard;
use crate::link::{self, LinkEvent, Target};
use crate::registry::{Protection, Registry};
use crate::shim_client::ShimError;

/// Rest before another attempt.
const RETRY: Duration = Duration::from_secs(1);

/// Where a protection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No shim yet.
    Starting,
    /// No receiver.
    Disconnected,
    /// The first copy is under way: there is no recovery point, or only an old one.
    Seeding,
    /// The standby is being brought level again; the old recovery point can be activated meanwhile.
    Resync,
    /// Epochs become durable.
    Protected,
    /// More is dirty than an epoch takes: it is being copied in parts.
    Behind,
    /// Paused on request, the standby level with the guest.
    Held,
    /// Somebody else stopped the guest.
    Paused,
    /// It cannot go on by itself.
    Failed,
    /// Another site owns the guest.
    Fenced,
}

impl Phase {
    /// As `status` and metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Disconnected => "disconnected",
            Self::Seeding => "seeding",
            Self::Resync => "resync",
            Self::Protected => "protected",
            Self::Behind => "behind",
            Self::Held => "held",
            Self::Paused => "paused",
            Self::Failed => "failed",
            Self::Fenced => "fenced",
        }
    }
}

/// What others may know of a session.
#[derive(Debug)]
pub struct Status {
    /// Where it stands.
    pub phase: Phase,
    /// Newest epoch cut.
    pub epoch: u64,
    /// Newest epoch that is durable.
    pub durable_epoch: u64,
    /// How QEMU is talked to: `direct` or `passthrough`; empty before that is known.
    pub monitor: &'static str,
    /// The generation in use.
    pub generation: u64,
    /// What last went wrong.
    pub last_error: String,
    /// While copying: pages and disk bytes that are in no part yet.
    pub pending_bytes: u64,
    /// Figures over time.
    pub figures: Figures,
}

/// Shared between the session's thread and whoever asks.
#[derive(Debug)]
pub struct Shared {
    status: Mutex<Status>,
}

impl Shared {
    /// The status; held only for reading or writing fields.
    pub fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where an answer goes: what was asked for, or one line why not.
pub type Answer<T> = tokio::sync::oneshot::Sender<Result<T, String>>;

/// What a session hears.
#[derive(Debug)]
pub enum Input {
    /// From the link.
    Link(LinkEvent),
    /// The domain's devices have changed.
    DevicesChanged,
    /// Pause the guest with a cut; answered when that is durable.
    Hold(Answer<u64>),
    /// End a hold.
    Release(Answer<()>),
    /// End the protection: mirrors and shim too.
    Unprotect,
    /// The agent ends; the shim stays.
    Shutdown,
}

/// A running session.
#[derive(Debug)]
pub struct Session {
    /// Who and where to.
    pub protection: Protection,
    /// What it is doing.
    pub shared: Arc<Shared>,
    inputs: Sender<Input>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Starts one. `first`: it was just asked for, so that a failure ends it instead of being tried again.
    pub fn start(
        config: Arc<Config>,
        registry: Registry,
        protection: Protection,
        first: bool,
        runtime: tokio::runtime::Handle,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            status: Mutex::new(Status {
                phase: Phase::Starting,
                epoch: 0,
                durable_epoch: 0,
                monitor: "",
                generation: protection.generation,
                last_error: String::new(),
                pending_bytes: 0,
                figures: Figures::default(),
            }),
        });
        let (inputs, received) = channel();
        let uuid = protection.uuid.parse().context("the domain's UUID")?;
        let worker = Worker {
            config,
            registry,
            uuid,
            protection: protection.clone(),
            shared: shared.clone(),
            inputs: inputs.clone(),
            received,
            runtime,
        };
        let thread = std::thread::Builder::new()
            .name(format!("session {}", protection.name))
            .spawn(move || worker.run(first))
            .context("start the session's thread")?;
        Ok(Self { protection, shared, inputs, thread: Some(thread) })
    }

    /// Tells it something. A session that has ended hears nothing.
    pub fn tell(&self, input: Input) {
        let _ = self.inputs.send(input);
    }

    /// Ends it and waits for that. Blocks.
    pub fn end(&mut self, input: Input) {
        self.tell(input);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(domain = self.protection.name, "the session's thread had panicked");
        }
    }
}

/// Why a protection stopped for now.
enum Stop {
    /// The protection ends.
    Unprotect,
    /// The agent ends.
    Shutdown,
    /// The shim or libvirt failed: attach again.
    Again(anyhow::Error),
    /// Another site owns the guest.
    Fenced(String),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Again(error)
    }
}

impl From<ShimError> for Stop {
    fn from(error: ShimError) -> Self {
        Self::Again(error.into())
    }
}

/// The thread's own.
struct Worker {
    config: Arc<Config>,
    registry: Registry,
    uuid: Uuid,
    protection: Protection,
    shared: Arc<Shared>,
    inputs: Sender<Input>,
    received: Receiver<Input>,
    runtime: tokio::runtime::Handle,
}

impl Worker {
    fn run(mut self, mut first: bool) {
        if self.protection.fenced {
            self.set_phase(Phase::Fenced);
        }
        loop {
            let stop = match self.attach() {
                Ok(attached) => {
                    let link = self.link();
                    let mut active = Active::new(&mut self, attached);
                    let stop = match active.run() {
                        Err(stop) => stop,
                        Ok(never) => match never {},
                    };
                    link.abort();
                    let reached = active.worker.shared.status().durable_epoch > 0;
                    first &= !reached;
                    active.finish(&stop, first);
                    let (page, monitor) = active.rescue();
                    drop(active);
                    if matches!(stop, Stop::Again(_)) && !guard::alive(&page) {
                        guard::resume_if_left_paused(&self.protection.name, &page, &monitor);
                    }
                    stop
                }
                Err(error) => Stop::Again(error),
            };
            match stop {
                Stop::Unprotect | Stop::Shutdown => return,
                Stop::Again(error) if first => {
                    self.fail(&error);
                    return;
                }
                Stop::Again(error) => {
                    tracing::warn!(domain = self.protection.name, "{error:#}");
                    self.set_error(format!("{error:#}"));
                    self.set_phase(if self.protection.fenced { Phase::Fenced } else { Phase::Starting });
                }
                Stop::Fenced(message) => self.record_fence(message),
            }
            match self.rest() {
                Some(Stop::Unprotect) => {
                    self.remove();
                    return;
                }
                Some(_) => return,
                None => {}
            }
        }
    }

    /// Ends what a lost shim left of a protection.
    fn remove(&self) {
        let removed = Connection::open(&self.config.libvirt_uri)
            .map_err(anyhow::Error::from)
            .and_then(|connection| attach::remove(&self.config, &connection, &self.uuid));
        if let Err(error) = removed {
            tracing::warn!(domain = self.protection.name, "end the protection: {error:#}");
        }
    }

    fn attach(&self) -> anyhow::Result<Attached> {
        let connection = Connection::open(&self.config.libvirt_uri)?;
        attach::attach(&self.config, &connection, &self.uuid)
    }

    fn link(&self) -> tokio::task::JoinHandle<()> {
        let target = Target {
            receiver: self.protection.receiver.clone(),
            domain_uuid: self.protection.uuid.clone(),
            domain_name: self.protection.name.clone(),
            generation: self.protection.generation,
        };
        self.runtime.spawn(link::run(target, self.inputs.clone(), Input::Link))
    }

    /// Waits before another attempt, unless the session is over.
    fn rest(&self) -> Option<Stop> {
        let until = Instant::now() + RETRY;
        loop {
            match self.received.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::Unprotect) => return Some(Stop::Unprotect),
                Ok(Input::Shutdown) | Err(RecvTimeoutError::Disconnected) => return Some(Stop::Shutdown),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return None,
            }
        }
    }

    fn fail(&self, error: &anyhow::Error) {
        tracing::error!(domain = self.protection.name, "{error:#}");
        self.set_error(format!("{error:#}"));
        self.set_phase(Phase::Failed);
    }

    fn record_fence(&mut self, message: String) {
        self.set_error(message);
        self.set_phase(Phase::Fenced);
        self.protection.fenced = true;
        if let Err(error) = self.registry.save(&self.protection) {
            tracing::error!(domain = self.protection.name, "{error:#}");
        }
    }

    fn set_phase(&self, phase: Phase) {
        let mut status = self.shared.status();
        if status.phase != phase {
            tracing::info!(domain = self.protection.name, from = status.phase.name(), to = phase.name(), "state");
            status.phase = phase;
        }
    }

    fn set_error(&self, error: String) {
        self.shared.status().last_error = error;
    }
}
