//! The protection of one domain: a thread that asks the shim for parts, encodes them and hands them to the link.
//!
//! ```text
//!            attach          link up: seed                last part sent
//!  starting ---------> linking -----------> copying -------------------> protected --+
//!     ^                   ^                    ^    <------------------------|       | a cut each interval
//!     |  shim lost        |  link down         |     too much is dirty               |
//!     +-------------------+--------------------+-------------------------------------+
//!     |                                                                              |
//!     +-- resume ---- suspended (nothing is attached) <------------------ suspend ---+
//!     +-- it runs --- shut off, crashed <----------- last epoch ------ QEMU is gone -+
//! ```
//!
//! Nothing is kept here that cannot be asked for again: what was captured is in the shim until the receiver says that
//! it is durable.

mod active;
pub mod attach;
mod ended;
pub mod figures;
pub mod moving;
pub mod off;
pub mod rest;
mod resume;
mod suspend;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use uuid::Uuid;
use vmdr_daemon::guest_channel::GuestChannel;
use vmdr_daemon::ownership::{Event, Ownerships};
use vmdr_guest_channel::PORT;
use vmdr_hypervisor::domain_xml::channel_socket;
use vmdr_hypervisor::libvirt::{Connection, Domain};
use vmdr_shim::permission::May;
use vmdr_trust::Trust;

use self::active::Active;
pub use self::active::application::Application;
use self::attach::Attached;
use self::figures::Figures;
use self::moving::Moved;
use self::off::{NotRunning, Off};
use self::rest::Resting;
use crate::config::Config;
use crate::failover::{self, Failover};
use crate::guard;
use crate::limits;
use crate::link::{self, LinkEvent, Target};
use crate::quiesce::Frozen;
use crate::quiesce::stage::Asker;
use crate::registry::{Protection, Registry};
use crate::shim_client::ShimError;

/// Rest before another attempt.
const RETRY: Duration = Duration::from_secs(1);
/// A part that is not acknowledged for this long is a link, or a receiver, that does not keep up.
const BEHIND_AFTER: Duration = Duration::from_secs(2);
/// What the receiver is told of a protection that is suspended.
const SUSPENDED: &str = "its protection is suspended";

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
    /// The guest's storage does not answer: no cuts, because stopping the guest would wait for it.
    Stalled,
    /// Paused on request, the standby level with the guest.
    Held,
    /// Somebody else stopped the guest.
    Paused,
    /// It may not run now, because the backup site may have taken it.
    Stopped,
    /// Taken off for a while, on request.
    Suspended,
    /// The guest was ended by itself or by somebody.
    ShutOff,
    /// The guest's QEMU crashed or was killed.
    Crashed,
    /// It cannot go on by itself.
    Failed,
    /// Another site owns the guest.
    Fenced,
    /// The guest is paused and another site was asked to take it.
    Moving,
    /// This session is over: the guest has come back since, and is another one's.
    Over,
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
            Self::Stalled => "stalled",
            Self::Held => "held",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Suspended => "suspended",
            Self::ShutOff => "shut off",
            Self::Crashed => "crashed",
            Self::Failed => "failed",
            Self::Fenced => "fenced",
            Self::Moving => "moving",
            Self::Over => "over",
        }
    }
}

/// What others may know of a session.
#[derive(Debug)]
pub struct Status {
    /// Where it stands.
    pub phase: Phase,
    /// Since when, wall clock.
    pub since_unix_ns: u64,
    /// When the oldest part was handed to the link that is not durable yet.
    pub waiting_since: Option<Instant>,
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
    /// Application-consistent points.
    pub application: Application,
    /// Whether the shim looks if the guest may run.
    pub heeds: bool,
    /// Whether the receiver has stood down, if it can take guests by itself and there is a stream to it.
    pub backup_disarmed: Option<bool>,
}

impl Status {
    /// Where it stands, as an operator is told: what the receiver does not acknowledge for [`BEHIND_AFTER`] is behind.
    pub fn shown_phase(&self) -> Phase {
        let waiting = self.waiting_since.is_some_and(|since| since.elapsed() > BEHIND_AFTER);
        if self.phase == Phase::Protected && waiting { Phase::Behind } else { self.phase }
    }
}

/// Shared between the session's thread and whoever asks.
#[derive(Debug)]
pub struct Shared {
    status: Mutex<Status>,
    /// The session is told to end: nothing more is sent.
    ending: AtomicBool,
    /// What it may take of this host.
    pub limits: Arc<limits::Guest>,
    tools: Mutex<Option<GuestChannel>>,
}

impl Shared {
    /// The status; held only for reading or writing fields.
    pub fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The channel to the guest's tools, while there is one; held only for a look at it.
    pub fn tools(&self) -> MutexGuard<'_, Option<GuestChannel>> {
        self.tools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the session is told to end.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
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
    /// An I/O error has stopped the guest: of which disk, and why.
    IoError(String),
    /// Another site owns the guest, in this generation.
    Outdated(u64),
    /// Take mirrors, watch and shim off; answered with the epoch of the recovery point that stays.
    Suspend(Answer<u64>),
    /// Put them back on; answered when that begins.
    Resume(Answer<()>),
    /// Pause the guest with a cut; answered when that is durable.
    Hold(Answer<u64>),
    /// The same for a move: an agent that is started anew ends it.
    HoldToMove(Answer<u64>),
    /// End a hold.
    Release(Answer<()>),
    /// Hand the held guest over; answered when it runs there, or is known to have stayed.
    HandOver(bool, Answer<Moved>),
    /// Make an application-consistent point; answered when that is durable.
    Application(Asker),
    /// What came of freezing the guest. Dropped, it is thawed.
    Frozen(Result<Frozen, String>),
    /// End the protection: mirrors and shim too.
    Unprotect,
    /// The agent ends; the shim stays.
    Shutdown,
}

impl Input {
    /// Tells whoever waits for an answer that there is nothing to be had, and why.
    fn refuse(self, why: &str) {
        let why = why.to_owned();
        // Who does not wait any more need not know.
        match self {
            Self::Suspend(answer) | Self::Hold(answer) | Self::HoldToMove(answer) => drop(answer.send(Err(why))),
            Self::Resume(answer) | Self::Release(answer) => drop(answer.send(Err(why))),
            Self::HandOver(_, answer) => drop(answer.send(Err(why))),
            Self::Application(answer) => drop(answer.send(Err(why))),
            // Thawed with that.
            Self::Frozen(late) => drop(late),
            Self::Link(_) | Self::DevicesChanged | Self::IoError(_) => {}
            Self::Outdated(_) | Self::Unprotect | Self::Shutdown => {}
        }
    }
}

/// A running session.
#[derive(Debug)]
pub struct Session {
    /// Who and where to.
    pub protection: Protection,
    /// What it is doing.
    pub shared: Arc<Shared>,
    /// Whether the backup site takes the guest by itself: how that stands.
    pub failover: Option<Failover>,
    inputs: Sender<Input>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Starts one. `first`: it was just asked for, so that a failure ends it instead of being tried again.
    pub fn start(
        config: Arc<Config>,
        registry: Registry,
        trust: Trust,
        limits: Arc<limits::Guest>,
        protection: Protection,
        first: bool,
        runtime: tokio::runtime::Handle,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            status: Mutex::new(Status {
                phase: Phase::Starting,
                since_unix_ns: unix_ns(),
                epoch: 0,
                durable_epoch: 0,
                monitor: "",
                generation: protection.generation,
                last_error: String::new(),
                pending_bytes: 0,
                waiting_since: None,
                figures: Figures::default(),
                application: Application::default(),
                heeds: false,
                backup_disarmed: None,
            }),
            ending: AtomicBool::new(false),
            limits,
            tools: Mutex::default(),
        });
        let (inputs, received) = channel();
        let uuid = protection.uuid.parse().context("the domain's UUID")?;
        let ownerships = config.ownerships();
        let failover = if !protection.is_automatic() {
            None
        } else if protection.fenced {
            failover::open(&ownerships.permission(&protection.uuid), May::Never)?.set(May::Never);
            None
        } else {
            let holder = trust.id().context("this host's identity")?;
            Some(Failover::start(&config, &protection, holder, inputs.clone(), &runtime)?)
        };
        let worker = Worker {
            failover: failover.clone(),
            config,
            registry,
            trust,
            uuid,
            protection: protection.clone(),
            shared: shared.clone(),
            inputs: inputs.clone(),
            received,
            runtime,
            ownerships,
            mover: None,
            application_due: None,
            resting: None,
        };
        let thread = std::thread::Builder::new()
            .name(format!("session {}", protection.name))
            .spawn(move || worker.run(first))
            .context("start the session's thread")?;
        Ok(Self { protection, shared, failover, inputs, thread: Some(thread) })
    }

    /// Tells it something. A session that has ended hears nothing.
    pub fn tell(&self, input: Input) {
        let _ = self.inputs.send(input);
    }

    /// Whether it has ended by itself, because the guest is another session's now.
    pub fn is_over(&self) -> bool {
        self.shared.status().phase == Phase::Over
    }

    /// Ends it and waits for that. Blocks.
    pub fn end(&mut self, input: Input) {
        self.shared.ending.store(true, Ordering::Relaxed);
        self.tell(input);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(domain = self.protection.name, "the session's thread had panicked");
        }
        // Whoever comes next has the only word.
        if let Some(failover) = &self.failover {
            failover.end();
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
    /// A move is under way of which the end is not known here.
    Unsettled,
    /// The protection is suspended; whoever asked for it waits.
    Suspend(Answer<u64>),
    /// QEMU is gone.
    GuestGone(String),
    /// The guest does not run any more; why there is no last epoch of its disks, if there is none.
    Off(Option<String>),
    /// The guest did not run in the first place.
    FoundOff(Off),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Again(error)
    }
}

impl From<ShimError> for Stop {
    fn from(error: ShimError) -> Self {
        match error {
            ShimError::GuestGone(message) => Self::GuestGone(message),
            other => Self::Again(other.into()),
        }
    }
}

/// The thread's own.
struct Worker {
    config: Arc<Config>,
    registry: Registry,
    trust: Trust,
    uuid: Uuid,
    protection: Protection,
    shared: Arc<Shared>,
    inputs: Sender<Input>,
    received: Receiver<Input>,
    runtime: tokio::runtime::Handle,
    ownerships: Ownerships,
    /// Who waits for a move.
    mover: Option<Answer<Moved>>,
    /// When the next application-consistent point is due by the schedule.
    application_due: Option<Instant>,
    /// While nothing is sent on purpose.
    resting: Option<Resting>,
    /// If the backup site takes the guest by itself.
    failover: Option<Failover>,
}

impl Worker {
    fn application_every(&self) -> Option<Duration> {
        let seconds = self.protection.application_every_seconds;
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }

    fn run(mut self, mut first: bool) {
        self.application_due = self.application_every().map(|every| Instant::now() + every);
        if self.protection.fenced {
            self.set_phase(Phase::Fenced);
        }
        loop {
            if let Some(suspended) = self.protection.suspended {
                first = false;
                match self.stay_suspended(suspended) {
                    None => {}
                    Some(Stop::Unprotect) => {
                        self.remove(false);
                        return;
                    }
                    Some(_) => return,
                }
            }
            match self.before_attaching() {
                Ok(()) => {}
                Err(None) => {
                    match self.rest() {
                        None => {}
                        Some(Stop::Suspend(answer)) => {
                            let why = "it is not known yet whether this host still owns the domain";
                            let _ = answer.send(Err(why.to_owned()));
                        }
                        Some(stop) => {
                            if matches!(stop, Stop::Unprotect) {
                                self.remove(false);
                            }
                            return;
                        }
                    }
                    continue;
                }
                Err(Some(Stop::Unsettled)) => continue,
                Err(Some(Stop::Unprotect)) => {
                    self.remove(false);
                    return;
                }
                Err(Some(_)) => return,
            }
            let stop = match self.attach() {
                Ok(attached) => {
                    self.resting = None;
                    let link = self.link();
                    let mut active = Active::new(&mut self, attached);
                    let stop = match active.run() {
                        Err(stop) => stop,
                        Ok(never) => match never {},
                    };
                    active.rests_if_off(&stop);
                    link.abort();
                    let reached = active.worker.shared.status().durable_epoch > 0;
                    first &= !reached;
                    active.finish(&stop, first);
                    let (page, monitor) = active.rescue();
                    drop(active);
                    *self.shared.tools() = None;
                    if matches!(stop, Stop::Again(_)) && !guard::alive(&page) {
                        let permission = self.ownerships.permission(&self.protection.uuid);
                        guard::resume_if_left_paused(&self.protection.name, &page, &permission, &monitor);
                    }
                    stop
                }
                Err(error) => match error.downcast_ref::<NotRunning>() {
                    Some(found) if !first => Stop::FoundOff(found.off),
                    _ => Stop::Again(error),
                },
            };
            match stop {
                Stop::Unprotect | Stop::Shutdown => return,
                Stop::Again(error) if first => {
                    self.fail(&error);
                    return;
                }
                Stop::Off(_) | Stop::GuestGone(_) if first => {
                    self.fail(&anyhow::anyhow!("the guest ended: {}", self.how_it_ended()));
                    return;
                }
                // It is not known who owns it: that comes before anything else.
                Stop::Again(error) if self.protection.moving.is_some() => {
                    tracing::warn!(domain = self.protection.name, "{error:#}");
                    self.set_error(format!("{error:#}"));
                    self.set_phase(Phase::Moving);
                    continue;
                }
                Stop::Again(error) => {
                    tracing::warn!(domain = self.protection.name, "{error:#}");
                    self.set_error(format!("{error:#}"));
                    self.set_phase(if self.protection.fenced { Phase::Fenced } else { Phase::Starting });
                }
                Stop::GuestGone(message) => self.set_off(self.how_it_ended(), Some(message)),
                Stop::Off(note) => self.set_off(self.how_it_ended(), note),
                Stop::FoundOff(off) => self.found_off(off),
                Stop::Fenced(message) => self.record_fence(message),
                Stop::Unsettled => continue,
                Stop::Suspend(answer) => {
                    self.suspend(answer);
                    continue;
                }
            }
            match self.rest() {
                Some(Stop::Unprotect) => {
                    self.remove(false);
                    return;
                }
                Some(Stop::Suspend(answer)) => self.suspend(answer),
                Some(_) => return,
                None => {}
            }
        }
    }

    /// Answers that the protection is suspended, which it has to be for good before.
    fn suspend(&mut self, answer: Answer<u64>) {
        let recorded = match self.protection.suspended {
            Some(suspended) => Ok(suspended.epoch),
            None => self.record_suspended(),
        };
        if recorded.is_ok() {
            self.set_phase(Phase::Suspended);
            self.rests(SUSPENDED.to_owned());
            self.wait_rests();
        }
        let _ = answer.send(recorded.map_err(|error| format!("{error:#}")));
    }

    /// Ends what a lost shim left of a protection; all of it, unless a resync will follow (`suspend`).
    fn remove(&self, suspend: bool) {
        let removed = Connection::open(&self.config.libvirt_uri)
            .map_err(anyhow::Error::from)
            .and_then(|connection| attach::remove(&self.config, &connection, &self.uuid, &self.protection.id, suspend));
        if let Err(error) = removed {
            tracing::warn!(domain = self.protection.name, "end the protection: {error:#}");
        }
    }

    /// Talks to the guest's tools from now on, if the domain has a channel to them.
    fn open_channel(&self, domain: &Domain) {
        let socket = domain.live_xml().ok().as_ref().and_then(|live| channel_socket(live, PORT));
        let opened =
            socket.map(|socket| GuestChannel::open(domain.name(), socket, self.config.guest_clock)).transpose();
        *self.shared.tools() = opened.unwrap_or_else(|error| {
            tracing::warn!(domain = domain.name(), "talk to the guest's tools: {error}");
            None
        });
    }

    fn attach(&self) -> anyhow::Result<Attached> {
        let connection = Connection::open(&self.config.libvirt_uri)?;
        attach::attach(&self.config, &connection, &self.uuid, &self.protection)
    }

    fn link(&self) -> tokio::task::JoinHandle<()> {
        let target = Target {
            receiver: self.protection.receiver.clone(),
            domain_uuid: self.protection.uuid.clone(),
            domain_name: self.protection.name.clone(),
            generation: self.protection.generation,
            trust: self.trust.clone(),
            limits: self.shared.limits.clone(),
            failover: self.failover.clone(),
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
                Ok(Input::Suspend(answer)) => match self.suspend_refused() {
                    Some(why) => {
                        let _ = answer.send(Err(why));
                    }
                    None => return Some(Stop::Suspend(answer)),
                },
                Ok(Input::Resume(answer)) => {
                    let _ = answer.send(Err("the protection is not suspended".to_owned()));
                }
                Ok(Input::HandOver(_, answer)) => {
                    let _ = answer.send(Err("the domain is not held".to_owned()));
                }
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

    /// Records what happened to this host's ownership of the guest.
    fn own(&self, event: &Event, reason: &str) -> anyhow::Result<()> {
        self.ownerships.transition(&self.protection.uuid, &self.protection.name, event, reason)?;
        Ok(())
    }

    fn set_phase(&self, phase: Phase) {
        let mut status = self.shared.status();
        if status.phase != phase {
            tracing::info!(domain = self.protection.name, from = status.phase.name(), to = phase.name(), "state");
            status.phase = phase;
            status.since_unix_ns = unix_ns();
        }
    }

    fn set_error(&self, error: String) {
        self.shared.status().last_error = error;
    }
}

fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}
