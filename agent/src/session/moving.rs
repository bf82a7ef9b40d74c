//! The planned move, at the site that the guest leaves.
//!
//! ```text
//!   held, its epoch durable ---- HandOver ----> recorded (registry, ownership), then the receiver is asked
//!        ^                                        |                 |                  |
//!        |   resumed, then recorded as kept       | NOT_TAKEN       | no answer        | Taken
//!        +----------------------------------------+                 v                  |
//!        +------------------------------- not taken --- asked: Settle --- taken -------+
//!                                                                                      v
//!     guest destroyed, record done <--- it runs there <--- asked: Owner <--- fenced, recorded
//! ```
//! From the record on the guest stays paused until it is known who owns it, whatever dies: the record leads back here when
//! the agent is restarted ([`Worker::before_attaching`]). Who owns it is the receiver's to say, because its generation is
//! where it becomes true; a receiver that says "not taken" cannot take it later, because the question ends older streams.
//! Only when the guest was seen to run there is what is left of it here ended. If it does not come to run there, it stays
//! here, paused, until the operator decides (`vmdr activate` there, `vmdr own` here).

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use vmdr_daemon::ownership::{Event, Role};
use vmdr_hypervisor::libvirt::{Connection, DomainState};
use vmdr_proto::replication::{
    HandOver, OwnerRequest, OwnerState, Refused, RefusedCode, SettleRequest, ToReceiver, to_receiver,
};
use vmdr_shim::config as shim_config;

use super::active::Active;
use super::{Answer, Input, Phase, Stop, Worker, attach};
use crate::failover::Failover;
use crate::link::{Closed, LinkEvent, Questions, send};
use crate::registry::Moving;
use crate::shim_client::ShimClient;

/// How long the receiver may take to answer a hand-over before it is asked in another way.
pub(super) const HAND_OVER_LIMIT: Duration = Duration::from_secs(20);
/// Between two questions whether the guest runs there: they are part of its downtime.
const OWNER_LOOK: Duration = Duration::from_millis(50);
/// How long a guest that is to be started waits for its permission before it is looked at from the beginning.
const PERMISSION_LIMIT: Duration = Duration::from_secs(10);
/// How long a shim may take to answer.
const SHIM_LIMIT: Duration = Duration::from_millis(500);

/// A guest that went over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moved {
    /// The generation in which the other site owns it.
    pub generation: u64,
    /// At which epoch.
    pub epoch: u64,
    /// From the cut that paused it to when it was seen running there.
    pub downtime: Duration,
}

/// What is known of a move.
enum Known {
    Taken(u64),
    NotTaken,
}

/// What an operator is told who asks for something else meanwhile.
pub(super) const BEING_MOVED: &str = "the domain is being moved";

impl Active<'_> {
    /// The receiver was asked to take the guest and has not answered: nothing lets it run here meanwhile.
    pub(super) fn hear_handing_over(&mut self, input: Input) -> Result<(), Stop> {
        match input {
            // The shim keeps the guest paused, the registry leads back to the end of the move.
            Input::Unprotect => Err(Stop::Shutdown),
            Input::Link(_) | Input::DevicesChanged | Input::IoError(_) | Input::Outdated(_) | Input::Shutdown => {
                self.hear_ordinary(input)
            }
            waiting => {
                waiting.refuse(BEING_MOVED);
                Ok(())
            }
        }
    }

    /// The guest is held: asks the receiver to take it.
    pub(super) fn hand_over(&mut self, protect_back: bool, answer: Answer<Moved>) -> Result<(), Stop> {
        let (phase, durable, cut, cut_unix_ns) = {
            let status = self.worker.shared.status();
            (status.phase, status.durable_epoch, status.epoch, status.figures.durable_cut_unix_ns())
        };
        let held = self.attached.shim.state()?.held;
        let Some(sender) = self.sender.clone().filter(|_| held && phase == Phase::Held && durable == cut) else {
            let _ = answer.send(Err(format!("the domain is {}, not held", phase.name())));
            return Ok(());
        };
        let generation = self.worker.protection.generation + 1;
        let moving = Moving { epoch: durable, cut_unix_ns, generation, taken: false, protect_back };
        if let Err(error) = self.worker.record_move(moving) {
            let _ = answer.send(Err(format!("{error:#}")));
            return Ok(());
        }
        self.worker.mover = Some(answer);
        self.worker.set_phase(Phase::Moving);
        self.asked_over = Some(Instant::now());
        let asked = HandOver { generation, epoch: durable, protect_back };
        let message = ToReceiver { message: Some(to_receiver::Message::HandOver(asked)) };
        let worker = &self.worker;
        match send(&worker.runtime, &sender, message, || worker.shared.is_ending()) {
            Ok(()) => Ok(()),
            Err(Closed) => Err(Stop::Unsettled),
        }
    }

    /// Records that the guest will be held for a move; the next cut holds it.
    pub(super) fn hold_to_move(&mut self, answer: Answer<u64>) -> Result<(), Stop> {
        self.hear(Input::Hold(answer))?;
        if self.hold.is_some()
            && let Err(error) = self.worker.record_hold_to_move(true)
            && let Some(hold) = self.hold.take()
        {
            let _ = hold.answer.send(Err(format!("{error:#}")));
        }
        Ok(())
    }

    /// A hold for a move that did not come to ask anybody is over.
    pub(super) fn end_hold_to_move(&mut self) -> Result<(), Stop> {
        if self.worker.protection.holds_to_move {
            if self.attached.shim.state()?.held {
                tracing::info!(domain = self.worker.protection.name, "held for a move that was not made: it goes on");
                self.attached.shim.resume()?;
                self.attached.state.held = false;
            }
            self.worker.record_hold_to_move(false)?;
        }
        Ok(())
    }

    /// The receiver has refused something while it was asked to take the guest.
    pub(super) fn not_taken(&mut self, refused: &Refused) -> Result<(), Stop> {
        if refused.code() != RefusedCode::NotTaken {
            return Err(Stop::Unsettled);
        }
        self.attached.shim.resume()?;
        self.asked_over = None;
        self.worker.kept(&format!("the other site did not take the guest: {}", refused.message))?;
        self.hold_ended();
        Ok(())
    }
}

impl Worker {
    /// What comes before everything else, each time: a move that is not done, a guest that came back, a host that was started
    /// anew. An error: not now; with a reason if the session is to end.
    pub(super) fn before_attaching(&mut self) -> Result<(), Option<Stop>> {
        let failed = |worker: &Self, error: anyhow::Error| {
            tracing::warn!(domain = worker.protection.name, "{error:#}");
            worker.set_error(format!("{error:#}"));
            None
        };
        if let Some(moving) = self.protection.moving {
            return self.go_on_moving(moving);
        }
        if self.protection.fenced {
            if !self.owns_again().map_err(|error| failed(self, error))? {
                return Ok(());
            }
            tracing::info!(domain = self.protection.name, "the guest is this host's again: this protection is over");
            self.registry.remove(&self.protection.uuid).map_err(|error| failed(self, error))?;
            if let Some(failover) = self.failover.take() {
                failover.end();
            }
            self.set_phase(Phase::Over);
            return Err(Some(Stop::Shutdown));
        }
        self.confirm().map_err(|error| failed(self, error))
    }

    /// Whether this host has become the guest's owner since this protection was fenced.
    pub(super) fn owns_again(&self) -> anyhow::Result<bool> {
        let now = self.ownerships.get(&self.protection.uuid)?;
        Ok(now.is_some_and(|now| now.role == Role::Owner && now.generation > self.protection.generation))
    }

    /// The receiver knows of no newer generation than this protection's.
    pub(super) fn owned(&self) -> anyhow::Result<()> {
        self.own(&Event::Protected(self.protection.generation), "protected from here")?;
        self.ownerships.confirm(&self.protection.uuid).context("note that the receiver has confirmed the ownership")
    }

    /// A host that was started anew asks before its guest runs; then it starts it, if libvirt was to.
    pub(super) fn confirm(&mut self) -> anyhow::Result<()> {
        if let Some(generation) = self.failover.as_ref().and_then(Failover::fenced) {
            return self.fence(generation, "another site owns the guest");
        }
        let uuid = self.protection.uuid.clone();
        if self.protection.generation == 0 || self.ownerships.is_confirmed(&uuid) {
            return Ok(());
        }
        let connection = Connection::open(&self.config.libvirt_uri)?;
        let domain = match connection.domain_by_uuid(&self.uuid) {
            Ok(domain) if !domain.state()?.0.is_active() => domain,
            // What runs already is paused by what the link says, or there is nothing to start.
            _ => return Ok(()),
        };
        match self
            .settle()
            .context("whether this host still owns the guest, which is not started before that is known")?
        {
            Known::Taken(generation) => {
                self.fence(generation, "the receiver has a newer generation")?;
            }
            Known::NotTaken => {
                let autostart = domain.autostart()?;
                // Also if the operator is to start it: the hook refuses that until then.
                self.wait_for_permission()?;
                self.owned()?;
                if autostart {
                    tracing::info!(domain = self.protection.name, "still owned by this host: starting it");
                    domain.start(false)?;
                }
            }
        }
        Ok(())
    }

    /// The backup site takes the guest by itself: it is not started before it may run, for which the backup or the witness has to
    /// be heard.
    fn wait_for_permission(&self) -> anyhow::Result<()> {
        let Some(failover) = &self.failover else { return Ok(()) };
        if failover.allows() {
            return Ok(());
        }
        // There is nothing to be sent on it but what the driver of the failover sends.
        let link = self.link();
        let mut stream = None;
        let until = Instant::now() + PERMISSION_LIMIT;
        while !failover.allows() && Instant::now() < until && !self.shared.is_ending() {
            match self.received.recv_timeout(OWNER_LOOK) {
                Ok(Input::Link(LinkEvent::Up { sender, .. })) => stream = Some(sender),
                Ok(ends @ (Input::Unprotect | Input::Shutdown)) => {
                    // Heard by who comes next.
                    let _ = self.inputs.send(ends);
                    break;
                }
                Ok(input) => input.refuse("the guest is not started yet: it is not known whether it may run"),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        link.abort();
        drop(stream);
        anyhow::ensure!(failover.allows(), "the guest is not started: {}", failover.status().message);
        Ok(())
    }

    /// Another site owns the guest.
    pub(super) fn tell_taken(&self, generation: u64) {
        if let Some(failover) = &self.failover {
            failover.taken(generation);
        }
    }

    fn fence(&mut self, generation: u64, reason: &str) -> anyhow::Result<()> {
        self.tell_taken(generation);
        let generation = generation.max(self.protection.generation + 1);
        self.own(&Event::Outdated(generation), reason)?;
        self.protection.fenced = true;
        self.registry.save(&self.protection)?;
        self.set_error(reason.to_owned());
        self.set_phase(Phase::Fenced);
        Ok(())
    }

    pub(super) fn record_hold_to_move(&mut self, holds: bool) -> anyhow::Result<()> {
        if self.protection.holds_to_move == holds {
            return Ok(());
        }
        self.protection.holds_to_move = holds;
        self.registry.save(&self.protection)
    }

    /// Writes that the receiver will be asked.
    fn record_move(&mut self, moving: Moving) -> anyhow::Result<()> {
        // The registry first: it is what leads back to the end of the move.
        self.protection.moving = Some(moving);
        self.protection.holds_to_move = false;
        let recorded = self.registry.save(&self.protection).and_then(|()| self.own(&Event::HandOver, "vmdr move"));
        if recorded.is_err() {
            self.protection.moving = None;
            self.protection.holds_to_move = true;
            self.registry.save(&self.protection)?;
        }
        recorded
    }

    /// The guest was not taken, and runs here again.
    fn kept(&mut self, why: &str) -> anyhow::Result<()> {
        self.own(&Event::KeptHere, why)?;
        self.protection.moving = None;
        self.registry.save(&self.protection)?;
        if let Some(failover) = &self.failover {
            failover.set_automatic(true);
        }
        self.set_error(why.to_owned());
        if let Some(mover) = self.mover.take() {
            let _ = mover.send(Err(format!("{why}; it runs here, as before")));
        }
        Ok(())
    }

    fn questions(&self) -> anyhow::Result<Questions> {
        self.runtime.block_on(Questions::connect(&self.trust, &self.protection.receiver)).map_err(anyhow::Error::msg)
    }

    /// Asks the receiver whether it has taken the guest, or anybody else has.
    fn settle(&self) -> anyhow::Result<Known> {
        let request = SettleRequest {
            domain_uuid: self.protection.uuid.clone(),
            domain_name: self.protection.name.clone(),
            generation: self.protection.generation,
        };
        let mut questions = self.questions()?;
        let reply = self.runtime.block_on(questions.settle(request)).map_err(anyhow::Error::msg)?;
        Ok(if reply.taken { Known::Taken(reply.generation) } else { Known::NotTaken })
    }

    fn go_on_moving(&mut self, moving: Moving) -> Result<(), Option<Stop>> {
        self.set_phase(Phase::Moving);
        self.shared.status().durable_epoch = moving.epoch;
        match self.step_of_move(moving) {
            Ok(true) => Ok(()),
            Ok(false) => self.rest_from_move(OWNER_LOOK),
            Err(error) => {
                tracing::warn!(domain = self.protection.name, "move: {error:#}");
                self.set_error(format!("move: {error:#}"));
                self.rest_from_move(super::RETRY)
            }
        }
    }

    /// One step. Whether it was the last.
    fn step_of_move(&mut self, moving: Moving) -> anyhow::Result<bool> {
        if !moving.taken {
            match self
                .settle()
                .context("it is not known yet whether the other site has taken the guest, which stays paused")?
            {
                Known::NotTaken => {
                    self.resume_guest()?;
                    self.kept("the other site did not take the guest")?;
                    return Ok(true);
                }
                Known::Taken(generation) => {
                    self.tell_taken(generation);
                    self.own(&Event::Outdated(generation), "moved")?;
                    self.protection.fenced = true;
                    self.protection.moving = Some(Moving { taken: true, generation, ..moving });
                    self.registry.save(&self.protection)?;
                }
            }
        }
        if self.owns_again()? {
            // By the operator's word, or because it was given back.
            self.protection.moving = None;
            self.registry.save(&self.protection)?;
            return Ok(true);
        }
        let request = OwnerRequest { domain_uuid: self.protection.uuid.clone(), plan: false };
        let mut questions = self.questions().context("whether the guest runs at the other site, which has taken it")?;
        let owner = self.runtime.block_on(questions.owner(request)).map_err(anyhow::Error::msg)?;
        match owner.state() {
            OwnerState::Runs => {}
            // It went on from there, or is being given back: what stands here stays, paused, until somebody says.
            _ if owner.generation > moving.generation => {
                let why = format!(
                    "the domain is owned in generation {} now, beyond this move: what is left of it here stays paused",
                    owner.generation
                );
                self.protection.moving = None;
                self.registry.save(&self.protection)?;
                self.set_error(why.clone());
                self.set_phase(Phase::Fenced);
                if let Some(mover) = self.mover.take() {
                    let _ = mover.send(Err(why));
                }
                return Ok(true);
            }
            OwnerState::Failed => {
                let why = format!(
                    "the other site has taken the guest and cannot bring it up: {}. Mend that and `vmdr activate` it there, or \
                     get it back with `vmdr own` here, where it is still paused",
                    owner.message
                );
                self.set_error(why.clone());
                if let Some(mover) = self.mover.take() {
                    let _ = mover.send(Err(why));
                }
                return Ok(false);
            }
            OwnerState::Taking | OwnerState::Standby => return Ok(false),
        }
        let downtime = now_unix_ns().saturating_sub(moving.cut_unix_ns);
        self.end_guest()?;
        self.protection.moving = None;
        self.registry.save(&self.protection)?;
        self.set_error(String::new());
        self.set_phase(Phase::Fenced);
        let moved =
            Moved { generation: moving.generation, epoch: moving.epoch, downtime: Duration::from_nanos(downtime) };
        tracing::info!(domain = self.protection.name, ?moved, "moved");
        if let Some(mover) = self.mover.take() {
            let _ = mover.send(Ok(moved));
        }
        Ok(true)
    }

    /// Rests between two steps; an operator's words are heard.
    fn rest_from_move(&self, rest: Duration) -> Result<(), Option<Stop>> {
        let until = Instant::now() + rest;
        loop {
            match self.received.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::Shutdown) => return Err(Some(Stop::Shutdown)),
                Ok(input) => input.refuse(BEING_MOVED),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Err(Some(Stop::Shutdown)),
            }
        }
        // Whatever it is now, it is looked at from the beginning.
        Err(Some(Stop::Unsettled))
    }

    /// The shim beside the guest, if there is one.
    fn shim(&self) -> Option<ShimClient> {
        let directory = attach::directory(&self.config, &self.uuid);
        ShimClient::connect(&shim_config::control_socket(&directory), SHIM_LIMIT).ok().map(|(shim, _)| shim)
    }

    /// The guest was paused for the move, and is to go on here.
    pub(super) fn resume_guest(&self) -> anyhow::Result<()> {
        if let Some(mut shim) = self.shim()
            && shim.state().is_ok_and(|state| state.held)
        {
            return shim.resume().map(|_| ()).context("resume the guest");
        }
        // Its shim was lost: nobody else resumes it.
        let connection = Connection::open(&self.config.libvirt_uri)?;
        match connection.domain_by_uuid(&self.uuid) {
            Ok(domain) if domain.state()?.0 == DomainState::Paused => match &self.failover {
                Some(failover) if !failover.allows() => failover.stay_stopped(),
                _ => domain.resume()?,
            },
            Ok(_) => {}
            Err(error) if error.is_no_such_domain() => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// It runs at the other site: ends what is left of it here.
    fn end_guest(&self) -> anyhow::Result<()> {
        let shim = self.shim().map(|mut shim| -> anyhow::Result<ShimClient> {
            shim.fence().context("keep the guest from running")?;
            Ok(shim)
        });
        let shim = shim.transpose()?;
        let connection = Connection::open(&self.config.libvirt_uri)?;
        match connection.domain_by_uuid(&self.uuid) {
            Ok(domain) if domain.state()?.0.is_active() => domain.destroy().context("end the guest that was moved")?,
            Ok(_) => {}
            Err(error) if error.is_no_such_domain() => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(mut shim) = shim
            && let Err(error) = shim.detach(false)
        {
            tracing::debug!(domain = self.protection.name, "end the shim: {error}");
        }
        Ok(())
    }
}

fn now_unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}
