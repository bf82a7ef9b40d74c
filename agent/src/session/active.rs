//! A session that has a shim: cuts, copies, and what the link says.

pub(super) mod application;
mod mirrors;
mod ship;

use std::collections::VecDeque;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use vmdr_codec::Layout;
use vmdr_daemon::ownership::Event;
use vmdr_proto::replication::{Position, RefusedCode, ToReceiver};
use vmdr_proto::shim::{NoPart, NoPartReason};
use vmdr_shim::capture::Whole;

use super::attach::{self, Attached};
use super::ended::Ended;
use super::moving::HAND_OVER_LIMIT;
use super::resume::{Resume, resume};
use super::{Answer, Input, Phase, RETRY, Stop, Worker};
use crate::encode::PartEncoder;
use crate::failover::END_LIMIT;
use crate::link::LinkEvent;
use crate::quiesce::Frozen;
use crate::quiesce::stage::Stage;
use crate::resync::Resync;
use std::path::PathBuf;
use vmdr_hypervisor::domain_xml::DomainXml;
use vmdr_shim::monitor::Address;

/// Parts that may be on their way before the next cut waits.
const IN_FLIGHT_MAX: usize = 4;
/// Bytes of a part while copying: small enough that acknowledgements come often.
const FILL_BYTES: u64 = 16 << 20;
/// A rest of this many pages is copied in the pause that ends a copy.
const REST_PAGES: u64 = 4096;
/// Passes after which a guest that dirties faster than it is copied gets a longer pause instead of another pass.
const ROUNDS_MAX: u32 = 8;
/// How often state is looked at when nothing else happens.
pub(super) const LOOK: Duration = Duration::from_millis(200);
/// How often a guest without cuts (there is no link) is looked at.
const GUEST_LOOK: Duration = Duration::from_secs(1);

/// How the open epoch is being captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// One part per epoch.
    Cuts,
    /// Parts until little is left; `round` passes so far.
    Copy { round: u32, need_pass: bool },
}

/// A part that is not durable.
struct InFlight {
    epoch: u64,
    part: u32,
    last: bool,
    cut_unix_ns: u64,
    /// When it was handed to the link.
    begun: Instant,
}

/// A hold that was asked for.
pub(super) struct Hold {
    pub(super) answer: Answer<u64>,
    /// The epoch that the guest was paused with.
    epoch: Option<u64>,
}

/// A session with a shim.
pub(super) struct Active<'a> {
    pub(super) worker: &'a mut Worker,
    pub(super) attached: Attached,
    encoder: PartEncoder,
    pub(super) sender: Option<tokio::sync::mpsc::Sender<ToReceiver>>,
    mode: Mode,
    in_flight: VecDeque<InFlight>,
    pub(super) next_cut: Instant,
    /// Asked for and not answered yet.
    pub(super) hold: Option<Hold>,
    /// QEMU is gone.
    pub(super) ended: Option<Ended>,
    /// The open epoch is a resync.
    resync: Option<Resync>,
    /// The receiver has asked for a resync that compares everything, whatever was noted of what was written.
    compare_wanted: bool,
    /// The receiver did not take differences: send everything.
    no_resync: bool,
    /// What the receiver was sent on this connection.
    sent_xml: String,
    sent_layout: Option<Layout>,
    xml_changed: bool,
    xml_looked: Instant,
    /// Since when mirrors have been out of order.
    mirrors_bad: Option<Instant>,
    /// A mirror is gone: begun anew, with a resync, as soon as nothing is on its way.
    mirror_gone: bool,
    /// When a guest without cuts was last looked at.
    guest_looked: Instant,
    /// What has stopped the guest: an I/O error of a disk.
    io_error: String,
    /// The state to go back to when the guest's storage answers again.
    before_stall: Option<Phase>,
    /// Since when the receiver has been asked to take the guest.
    pub(super) asked_over: Option<Instant>,
    /// An application-consistent point that is being made.
    application: Stage<Frozen>,
}

pub(super) enum Never {}

impl<'a> Active<'a> {
    pub(super) fn new(worker: &'a mut Worker, attached: Attached) -> Self {
        Self {
            worker,
            attached,
            encoder: PartEncoder::default(),
            sender: None,
            mode: Mode::Cuts,
            in_flight: VecDeque::new(),
            next_cut: Instant::now(),
            hold: None,
            resync: None,
            no_resync: false,
            compare_wanted: false,
            sent_xml: String::new(),
            sent_layout: None,
            xml_changed: true,
            xml_looked: Instant::now(),
            mirrors_bad: None,
            mirror_gone: false,
            guest_looked: Instant::now(),
            io_error: String::new(),
            ended: None,
            before_stall: None,
            asked_over: None,
            application: Stage::default(),
        }
    }

    pub(super) fn run(&mut self) -> Result<Never, Stop> {
        if self.worker.protection.fenced {
            if self.worker.owns_again()? {
                // It came back in the moment between.
                return Err(Stop::Unsettled);
            }
            self.attached.shim.fence()?;
            return Err(Stop::Fenced("another site owns this guest".to_owned()));
        }
        if let Some(failover) = &self.worker.failover {
            failover.runs();
        }
        {
            let mut status = self.worker.shared.status();
            status.monitor = self.attached.monitor.kind();
            status.heeds = self.attached.state.may.is_some();
        }
        self.worker.open_channel(&self.attached.domain);
        self.end_hold_to_move()?;
        let held = self.attached.state.held;
        self.worker.set_phase(if held { Phase::Held } else { Phase::Disconnected });
        loop {
            let wait = self.next_cut.saturating_duration_since(Instant::now()).min(LOOK);
            let heard = match self.worker.received.recv_timeout(wait) {
                Ok(input) => self.hear(input),
                Err(RecvTimeoutError::Timeout) => Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(Stop::Shutdown),
            };
            self.unless_gone(heard)?;
            self.worker.shared.status().figures.observe_rpo();
            if self.asked_over.is_some_and(|asked| asked.elapsed() > HAND_OVER_LIMIT) {
                return Err(Stop::Unsettled);
            }
            self.look_at_application();
            if Instant::now() >= self.next_cut {
                let acted = match self.ended {
                    Some(ended) => self.end_step(ended),
                    None => self.act(),
                };
                self.worker.shared.limits.worked(self.attached.state.pid);
                self.unless_gone(acted)?;
            }
        }
    }

    /// That QEMU is gone is no reason to stop: what the guest wrote last is still here.
    fn unless_gone(&mut self, result: Result<(), Stop>) -> Result<(), Stop> {
        match result {
            Err(Stop::GuestGone(message)) if self.ended.is_none() => self.guest_gone(&message),
            other => other,
        }
    }

    pub(super) fn finish(&mut self, stop: &Stop, first: bool) {
        let (ends, suspend) = match stop {
            Stop::Unprotect => (true, false),
            Stop::Again(_) | Stop::GuestGone(_) | Stop::FoundOff(_) => (first, false),
            Stop::Shutdown | Stop::Fenced(_) | Stop::Unsettled => (false, false),
            // Durably said before anything is taken off. If it cannot be, all stays as it is.
            Stop::Suspend(_) => (self.worker.record_suspended().is_ok(), true),
            Stop::Off(_) => {
                // There are no mirrors any more, and what else the shim had was in QEMU.
                self.attached.guard.end();
                if let Err(error) = self.attached.shim.detach(false) {
                    tracing::debug!(domain = self.worker.protection.name, "end the shim: {error}");
                }
                return;
            }
        };
        if !ends {
            return;
        }
        self.attached.guard.end();
        let (domain, disks) = (&self.attached.domain, &self.attached.disks);
        if let Err(error) = attach::detach(domain, disks, &mut self.attached.shim, suspend) {
            tracing::warn!(domain = self.worker.protection.name, "end the protection: {error:#}");
            self.worker.remove(suspend);
        }
    }

    pub(super) fn hear(&mut self, input: Input) -> Result<(), Stop> {
        if self.asked_over.is_some() {
            return self.hear_handing_over(input);
        }
        self.hear_ordinary(input)
    }

    pub(super) fn hear_ordinary(&mut self, input: Input) -> Result<(), Stop> {
        match input {
            Input::Hold(answer) => {
                self.worker.record_hold_to_move(false)?;
                let phase = self.worker.shared.status().shown_phase();
                if phase == Phase::Protected && self.hold.is_none() {
                    self.hold = Some(Hold { answer, epoch: None });
                    self.next_cut = Instant::now();
                } else {
                    let _ = answer.send(Err(format!("the domain is {}, not protected", phase.name())));
                }
                Ok(())
            }
            Input::Release(answer) => {
                self.worker.record_hold_to_move(false)?;
                if !self.attached.shim.state()?.held {
                    let _ = answer.send(Err("the domain is not held".to_owned()));
                    return Ok(());
                }
                self.attached.shim.resume()?;
                self.hold_ended();
                let _ = answer.send(Ok(()));
                Ok(())
            }
            Input::HoldToMove(answer) => self.hold_to_move(answer),
            Input::HandOver(protect_back, answer) => self.hand_over(protect_back, answer),
            Input::Suspend(answer) => match self.worker.suspend_refused() {
                Some(why) => {
                    let _ = answer.send(Err(why));
                    Ok(())
                }
                None => Err(Stop::Suspend(answer)),
            },
            Input::Resume(answer) => {
                let _ = answer.send(Err("the protection is not suspended".to_owned()));
                Ok(())
            }
            Input::Application(answer) => {
                self.ask_application(answer);
                Ok(())
            }
            Input::Frozen(result) => {
                self.froze(result);
                Ok(())
            }
            Input::Unprotect => Err(Stop::Unprotect),
            Input::Shutdown => Err(Stop::Shutdown),
            Input::IoError(what) => {
                self.io_error = what;
                Ok(())
            }
            Input::Outdated(generation) => {
                let reason = "the witness has another owner, in a newer generation";
                self.outdated(generation, reason, reason.to_owned())
            }
            Input::DevicesChanged if self.ended.is_some() => Ok(()),
            Input::DevicesChanged => {
                self.xml_changed = true;
                self.look_at_devices()
            }
            Input::Link(LinkEvent::Up { position, disarmed, sender }) => {
                self.worker.shared.status().backup_disarmed = disarmed;
                if self.worker.protection.generation == 0 {
                    self.worker.protection.generation = position.generation.max(1);
                    self.worker.registry.save(&self.worker.protection)?;
                }
                self.worker.owned()?;
                let position = Position { generation: self.worker.protection.generation, ..position };
                self.sender = Some(sender);
                self.start_from(&position)
            }
            Input::Link(LinkEvent::Compare) => {
                // Also while one is under way: what was found may lie where that has been already.
                self.compare_wanted = true;
                Ok(())
            }
            Input::Link(LinkEvent::Durable(durable)) => self.durable(durable.epoch, durable.part),
            Input::Link(LinkEvent::Refused(refused)) => {
                self.sender = None;
                let message = format!("the receiver refused: {}", refused.message);
                if self.worker.protection.moving.is_some() {
                    return self.not_taken(&refused);
                }
                let known = refused.position.map_or(u64::MAX, |position| position.generation);
                if refused.code() == RefusedCode::Fenced && known < self.worker.protection.generation {
                    // This host became the owner by force: what was active there is of an older generation.
                    let name = &self.worker.protection.name;
                    return Err(Stop::Again(anyhow!(
                        "{message}; this host owns it in a newer generation: end what is left of it there, then `vmdr \
                         reprotect {name}` here"
                    )));
                }
                if refused.code() == RefusedCode::Fenced {
                    let newer = refused.position.map_or(0, |position| position.generation);
                    return self.outdated(newer, "the receiver has a newer generation", message);
                }
                if matches!(refused.code(), RefusedCode::Version | RefusedCode::Domain) {
                    return Err(Stop::Again(anyhow!(message)));
                }
                if matches!(refused.code(), RefusedCode::Sequence | RefusedCode::Corrupt)
                    && self.resync.take().is_some()
                {
                    self.no_resync = true;
                }
                tracing::warn!(domain = self.worker.protection.name, code = ?refused.code(), "{message}");
                self.worker.set_error(message);
                Ok(())
            }
            Input::Link(LinkEvent::Taken(generation)) => {
                self.sender = None;
                tracing::info!(domain = self.worker.protection.name, generation, "the other site has taken the guest");
                self.worker.tell_taken(generation);
                self.attached.shim.fence()?;
                Err(Stop::Unsettled)
            }
            Input::Link(LinkEvent::Down(_)) if self.worker.protection.moving.is_some() => Err(Stop::Unsettled),
            Input::Link(LinkEvent::Disarmed) => {
                self.worker.shared.status().backup_disarmed = Some(true);
                Ok(())
            }
            Input::Link(LinkEvent::Down(reason)) => {
                self.sender = None;
                self.worker.shared.status().backup_disarmed = None;
                self.worker.set_error(reason);
                if self.worker.shared.status().phase != Phase::Held && self.ended.is_none() {
                    self.worker.set_phase(Phase::Disconnected);
                }
                Ok(())
            }
        }
    }

    /// The stream is about to end. If somebody has ended the guest, its backup is not to start it because of that.
    pub(super) fn rests_if_off(&self, stop: &Stop) {
        let Some(failover) = self.worker.failover.as_ref().filter(|_| matches!(stop, Stop::Off(_))) else { return };
        if !self.worker.how_it_ended().is_meant() {
            return;
        }
        if let Err(error) = self.worker.runtime.block_on(failover.rests(END_LIMIT)) {
            tracing::warn!(domain = self.worker.protection.name, "the guest was ended: {error}");
        }
    }

    /// Another site owns the guest.
    fn outdated(&mut self, generation: u64, reason: &str, message: String) -> Result<(), Stop> {
        // First of all, so that it holds whatever becomes of guest and shim now.
        self.worker.protection.fenced = true;
        self.worker.registry.save(&self.worker.protection)?;
        let newer = generation.max(self.worker.protection.generation + 1);
        self.worker.tell_taken(newer);
        self.worker.own(&Event::Outdated(newer), reason)?;
        self.attached.shim.fence()?;
        Err(Stop::Fenced(message))
    }

    /// What is needed to resume the guest should the shim be lost.
    pub(super) fn rescue(&self) -> (PathBuf, Address) {
        let directory = attach::directory(&self.worker.config, &self.worker.uuid);
        (vmdr_shim::config::state_page(&directory), self.attached.monitor.clone())
    }

    /// Devices came or went: a disk that is not mirrored, or one that cannot be protected, ends this round.
    fn look_at_devices(&self) -> Result<(), Stop> {
        let domain = &self.attached.domain;
        let live = match domain.live_xml() {
            Ok(live) => live,
            Err(error) => {
                // Said again when libvirt's events are.
                tracing::warn!(domain = domain.name(), "{error}");
                return Ok(());
            }
        };
        attach::still_protectable(&self.worker.config, domain, &live)?;
        let xml = DomainXml::from_element(&live).map_err(anyhow::Error::from)?;
        if attach::mirrored_disks(domain, &xml)? != self.attached.disks {
            return Err(anyhow!("the disks of domain {} have changed", domain.name()).into());
        }
        Ok(())
    }

    /// Joins what the shim holds to what the receiver has.
    fn start_from(&mut self, position: &Position) -> Result<(), Stop> {
        let state = self.attached.shim.state()?;
        {
            let mut status = self.worker.shared.status();
            status.generation = self.worker.protection.generation;
            status.durable_epoch = position.epoch;
            status.waiting_since = None;
        }
        self.xml_changed = true;
        self.sent_xml.clear();
        self.sent_layout = None;
        match resume(position, &state) {
            Resume::From { durable, again } => {
                if let Some((epoch, part)) = durable {
                    self.durable(epoch, part)?;
                }
                tracing::info!(
                    domain = self.worker.protection.name,
                    again = again.len(),
                    "going on, nothing is copied again"
                );
                self.in_flight.clear();
                for (epoch, part) in again {
                    match self.attached.shim.resend(epoch, part)? {
                        Ok(part) => {
                            self.ship(part)?;
                        }
                        Err(no) => return Err(anyhow!("a held part is gone: {}", no.message).into()),
                    }
                }
                if self.ended.is_some() {
                    return Ok(());
                }
                let copying = state.next_part > 0 || state.seed;
                self.set_mode(if copying { Mode::Copy { round: 0, need_pass: true } } else { Mode::Cuts }, state.seed);
            }
            Resume::Seed { .. } if self.ended.is_some() => {
                let what = "what the guest wrote last does not join what the receiver has";
                return Err(Stop::Off(Some(what.to_owned())));
            }
            Resume::Seed { epoch } => {
                self.copy_whole(position, epoch)?;
                if !self.attached.adopted || !state.armed {
                    self.start_mirrors()?;
                    self.attached.adopted = true;
                }
            }
        }
        if state.held {
            self.worker.set_phase(Phase::Held);
        }
        self.next_cut = Instant::now();
        Ok(())
    }

    /// Begins `epoch` with the whole guest. Of what the receiver has at `position`, only what differs will be sent.
    fn copy_whole(&mut self, position: &Position, epoch: u64) -> Result<(), Stop> {
        let comparing = std::mem::take(&mut self.compare_wanted);
        self.in_flight.clear();
        self.sent_layout = None;
        self.fail_application(
            "its epoch was given up: the whole guest is compared with the receiver's copy, or copied again",
        );
        self.resync = self.compare_with(position);
        let whole = if self.resync.is_some() { Whole::Resync } else { Whole::Seed };
        let generation = self.worker.protection.generation;
        // What was noted of what was written says nothing about what is damaged there.
        self.attached.shim.arm(generation, epoch, whole, comparing)?;
        tracing::info!(domain = self.worker.protection.name, epoch, ?whole, "copying the whole guest");
        self.set_mode(Mode::Copy { round: 0, need_pass: true }, true);
        Ok(())
    }

    /// What the receiver has is damaged: everything is compared with it, and what differs is sent again.
    fn compare_all(&mut self) -> Result<(), Stop> {
        let durable = self.worker.shared.status().durable_epoch;
        let held = self.attached.shim.state()?.held;
        if !self.in_flight.is_empty() || durable == 0 || held {
            // As for mirrors: what is on its way comes first.
            self.next_cut = Instant::now() + LOOK;
            return Ok(());
        }
        tracing::warn!(
            domain = self.worker.protection.name,
            "the receiver's copy is damaged, everything is compared with it"
        );
        self.xml_changed = true;
        self.sent_xml.clear();
        self.copy_whole_after(durable)?;
        self.next_cut = Instant::now();
        Ok(())
    }

    /// The same, on top of the recovery point that is durable.
    fn copy_whole_after(&mut self, durable: u64) -> Result<(), Stop> {
        let generation = self.worker.protection.generation;
        self.copy_whole(&Position { generation, epoch: durable, ..Position::default() }, durable + 1)
    }

    /// What the receiver has, if the guest can be compared with it.
    fn compare_with(&self, position: &Position) -> Option<Resync> {
        if position.epoch == 0 || self.no_resync {
            return None;
        }
        let protection = &self.worker.protection;
        match Resync::begin(&self.worker.runtime, &self.worker.trust, &protection.receiver, &protection.uuid, position)
        {
            Ok(resync) => resync,
            Err(error) => {
                tracing::warn!(
                    domain = protection.name,
                    "everything is sent again, the receiver's copy cannot be compared: {error:#}"
                );
                None
            }
        }
    }

    fn set_mode(&mut self, mode: Mode, seed: bool) {
        self.mode = mode;
        self.worker.set_phase(match mode {
            Mode::Cuts => Phase::Protected,
            Mode::Copy { .. } if self.resync.is_some() => Phase::Resync,
            Mode::Copy { .. } if seed => Phase::Seeding,
            Mode::Copy { .. } => Phase::Behind,
        });
    }

    fn durable(&mut self, epoch: u64, part: u32) -> Result<(), Stop> {
        self.attached.shim.release(epoch, part)?;
        let mut status = self.worker.shared.status();
        while let Some(sent) = self.in_flight.front() {
            if (sent.epoch, sent.part) > (epoch, part) {
                break;
            }
            if sent.last {
                status.durable_epoch = sent.epoch;
                status.figures.durable(sent.cut_unix_ns);
                status.last_error.clear();
            }
            self.in_flight.pop_front();
        }
        status.waiting_since = self.in_flight.front().map(|sent| sent.begun);
        let durable = status.durable_epoch;
        drop(status);
        self.application_durable(durable);
        if self.hold.as_ref().is_some_and(|hold| hold.epoch.is_some_and(|held| held <= epoch))
            && let Some(hold) = self.hold.take()
            && hold.answer.send(Ok(epoch)).is_err()
        {
            // It took too long for whoever has asked: nobody would release it.
            tracing::warn!(domain = self.worker.protection.name, epoch, "nobody waits for the hold any more: it ends");
            self.attached.shim.resume()?;
            self.hold_ended();
        }
        Ok(())
    }

    /// One step: a cut, or a piece of a copy.
    fn act(&mut self) -> Result<(), Stop> {
        if self.asked_over.is_some() {
            self.next_cut = Instant::now() + LOOK;
            return Ok(());
        }
        if self.worker.shared.status().phase == Phase::Held {
            // Perhaps somebody else has resumed the guest.
            if self.look_at_guest()? {
                self.next_cut = Instant::now() + LOOK;
            } else {
                self.hold_ended();
            }
            return Ok(());
        }
        if self.sender.is_none() {
            self.next_cut = Instant::now() + LOOK;
            if self.guest_looked.elapsed() >= GUEST_LOOK {
                self.look_at_guest()?;
            }
            return Ok(());
        }
        if self.mirror_gone {
            return self.begin_mirrors_anew();
        }
        if self.compare_wanted {
            return self.compare_all();
        }
        // Nobody waits for it any more.
        if self.hold.as_ref().is_some_and(|hold| hold.answer.is_closed()) {
            self.hold = None;
        }
        if self.in_flight.len() >= IN_FLIGHT_MAX {
            // Acknowledgements wake the thread; this is only in case none comes.
            self.next_cut = Instant::now() + Duration::from_millis(5);
            return Ok(());
        }
        let limits = self.worker.shared.limits.clone();
        let rest = limits.rest();
        if !rest.is_zero() && self.hold.is_none() && !self.application.is_frozen() {
            self.next_cut = Instant::now() + rest.min(LOOK);
            return Ok(());
        }
        match self.mode {
            Mode::Cuts => self.cut(0),
            Mode::Copy { round, need_pass: true } => match limits.seat.turn(|| self.attached.shim.pass())? {
                Ok(passed) => {
                    self.storage_answers();
                    self.worker.shared.status().figures.pause(&passed.timing.unwrap_or_default());
                    if passed.pending_pages <= REST_PAGES || round >= ROUNDS_MAX {
                        // The longest pause is twice as long with each round beyond the limit.
                        let pages = self.worker.config.cut_pages_max << round.saturating_sub(ROUNDS_MAX).min(16);
                        self.cut(pages)
                    } else {
                        self.mode = Mode::Copy { round: round + 1, need_pass: false };
                        Ok(())
                    }
                }
                Err(no) => self.no_part(&no),
            },
            Mode::Copy { round, need_pass: false } => match self.attached.shim.fill(FILL_BYTES)? {
                Ok(part) => {
                    self.ship(part)?;
                    self.look_at_pending()
                }
                // While mirrors are not in order there will be no recovery point: the guest is not paused for passes, and
                // what it writes to its memory again and again is not sent each time. The cut looks at the mirrors first.
                Err(no) if no.reason() == NoPartReason::Nothing && self.mirrors_bad.is_some() => self.cut(REST_PAGES),
                Err(no) if no.reason() == NoPartReason::Nothing => {
                    self.mode = Mode::Copy { round, need_pass: true };
                    Ok(())
                }
                Err(no) => self.no_part(&no),
            },
        }
    }

    /// Whether the guest is held; an error if its QEMU is gone.
    fn look_at_guest(&mut self) -> Result<bool, Stop> {
        self.guest_looked = Instant::now();
        let state = self.attached.shim.state()?;
        if state.gone {
            return Err(Stop::GuestGone("QEMU ended".to_owned()));
        }
        if state.stopped {
            self.worker.set_phase(Phase::Stopped);
        } else if self.worker.shared.status().phase == Phase::Stopped {
            self.worker.set_phase(Phase::Disconnected);
        }
        Ok(state.held)
    }

    /// The guest runs again after a hold.
    pub(super) fn hold_ended(&mut self) {
        self.next_cut = Instant::now();
        self.worker.set_phase(if self.sender.is_some() { Phase::Protected } else { Phase::Disconnected });
    }

    fn look_at_pending(&mut self) -> Result<(), Stop> {
        let state = self.attached.shim.state()?;
        let pages = state.pending_pages * vmdr_proto::PAGE_BYTES as u64;
        self.worker.shared.status().pending_bytes = pages + state.remembered_bytes + state.log_bytes;
        Ok(())
    }

    fn cut(&mut self, pages_max: u64) -> Result<(), Stop> {
        let interval = Duration::from_millis(u64::from(self.worker.protection.interval_ms));
        let started = Instant::now();
        // A guest at rest has to run to be thawed: it is held with the next one. One that is behind is held when it has caught
        // up: with a next cut it might be behind again.
        let hold = self.hold.is_some() && !self.application.needs_it_to_run();
        let limits = self.worker.shared.limits.clone();
        match limits.seat.turn(|| self.attached.shim.cut(pages_max, hold))? {
            Ok(part) if !part.last => {
                // Something has changed under the cut: its data is sent, and the next one ends the epoch.
                self.worker.shared.status().figures.pause(&part.timing.unwrap_or_default());
                self.ship(part)?;
                self.next_cut = Instant::now() + LOOK;
                Ok(())
            }
            Ok(part) => {
                self.next_cut = limits.seat.aim(self.next_cut + interval, interval).max(started);
                self.mirrors_bad = None;
                self.io_error.clear();
                self.before_stall = None;
                if !hold {
                    self.thaw_after_cut(&part);
                }
                let (epoch, timing, pages) = (part.epoch, part.timing.unwrap_or_default(), part.dirty_pages);
                let bytes = self.ship(part)?;
                let mut status = self.worker.shared.status();
                status.epoch = epoch;
                status.pending_bytes = 0;
                status.figures.cut(&timing, pages, bytes);
                drop(status);
                if let Some(hold) = self.hold.as_mut().filter(|_| hold) {
                    hold.epoch = Some(epoch);
                    self.mode = Mode::Cuts;
                    self.worker.set_phase(Phase::Held);
                } else if self.sender.is_some() {
                    self.set_mode(Mode::Cuts, false);
                }
                Ok(())
            }
            Err(no) => self.no_part(&no),
        }
    }

    /// There was no recovery point (or nothing to copy): what next?
    fn no_part(&mut self, no: &NoPart) -> Result<(), Stop> {
        if let Some(timing) = &no.timing {
            self.worker.shared.status().figures.pause(timing);
        }
        let mut again = LOOK;
        if no.reason() != NoPartReason::Storage {
            self.storage_answers();
        }
        match no.reason() {
            NoPartReason::Pending => {
                // It has looked at the mirrors before.
                self.mirrors_bad = None;
                let round = if let Mode::Copy { round, .. } = self.mode { round } else { 0 };
                let seed = matches!(self.worker.shared.status().phase, Phase::Seeding | Phase::Resync);
                self.set_mode(Mode::Copy { round: round + 1, need_pass: false }, seed);
                again = Duration::ZERO;
            }
            NoPartReason::NotRunning => {
                let why = if self.io_error.is_empty() { "" } else { " - " };
                self.worker.set_error(format!("{}{why}{}", no.message, self.io_error));
                self.worker.set_phase(Phase::Paused);
            }
            NoPartReason::NotPermitted => {
                self.worker.set_error(no.message.clone());
                self.worker.set_phase(Phase::Stopped);
            }
            NoPartReason::Mirror => self.mend_mirrors(&no.message)?,
            NoPartReason::NoSpace => again = Duration::from_millis(20),
            NoPartReason::TimeLimit => {
                self.worker.set_error(no.message.clone());
                again = RETRY;
            }
            NoPartReason::Storage => {
                self.worker.set_error(no.message.clone());
                let phase = self.worker.shared.status().phase;
                if phase != Phase::Stalled {
                    self.before_stall = Some(phase);
                }
                self.worker.set_phase(Phase::Stalled);
            }
            NoPartReason::Nothing | NoPartReason::Unspecified => {}
        }
        self.next_cut = Instant::now() + again;
        Ok(())
    }

    /// The guest's storage is not silent, or no longer.
    fn storage_answers(&mut self) {
        let Some(before) = self.before_stall.take() else { return };
        if self.worker.shared.status().phase == Phase::Stalled {
            self.worker.set_phase(before);
        }
    }
}
