//! An activation of a group, from its beginning to its end.
//!
//! ```text
//!  begin --- one thread for the group: who is next? --- a thread for each member under way
//!    |          record before each step                   activate (crate::control), then its readiness checks
//!    record of what is asked, durable                     tells the group's thread how far it is
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver as Events, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Handle;
use tonic::{Code, Status};
use vmdr_audit::{Entry, Outcome};
use vmdr_plan::{Domain, Group, OnFailure, Plan};
use vmdr_proto::control::{ActivateRequest, ActivationReport, GroupReport, GroupRequest};

use super::begin::{Beginning, beginning, domains, member_request, order_of, planned, record_status};
use super::checks::{self, Ending, Subject};
use super::order::{self, State};
use super::record::Record;
use super::{Claim, Watcher};
use crate::activate::run::unix_ns;
use crate::control::{self, find_named};
use crate::daemon::Receiver;
use crate::ready::Checked;

/// A receiver that was away for longer does not go on by itself: the guests may have been brought up elsewhere meanwhile.
pub(super) const GOES_ON_MAX: Duration = Duration::from_secs(900);
/// Rest before a libvirt that does not answer is asked again, at the start.
const RETRY: Duration = Duration::from_secs(2);
/// Between two looks whether the receiver ends.
const LOOK: Duration = Duration::from_millis(250);
/// How often the record says that somebody is at work on it.
const TOUCH: Duration = Duration::from_secs(60);

/// A member of which nothing is heard for longer is given up: those that do not need it must not wait for it. Longer than a hook or
/// a check may take.
const SILENT_MAX: Duration = Duration::from_secs(3600 + 900);

/// The activation of a group as a whole.
pub mod state {
    /// It goes on.
    pub const UNDER_WAY: &str = "under way";
    /// All members are ready.
    pub const READY: &str = "ready";
    /// Some are not.
    pub const FAILED: &str = "failed";
    /// The receiver has ended in the middle; it goes on when somebody asks for it.
    pub const INTERRUPTED: &str = "interrupted";
    /// Somebody has stopped it; it goes on when somebody asks for it.
    pub const STOPPED: &str = "stopped";
    /// It was never begun.
    pub const NONE: &str = "not activated";
}

pub(super) fn now() -> u64 {
    unix_ns(SystemTime::now())
}

/// Begins an activation of a group, goes on with it, or follows the one that is under way. `resumed`: nobody has asked, and the time of
/// the request stays.
pub fn begin(
    receiver: &Arc<Receiver>,
    request: &GroupRequest,
    watcher: Option<&Watcher>,
    resumed: bool,
) -> Result<(), Status> {
    let (plan, group) = planned(receiver, &request.group)?;
    let name = &group.name.value;
    let claim = loop {
        match receiver.groups.claim(name) {
            Ok(claim) => break claim,
            Err(live) => {
                if request.at_unix_ns > 0 || !request.points.is_empty() || request.damaged {
                    let message = format!(
                        "{name} is being activated already: its points cannot be chosen any more, nor damaged ones allowed; \
                         without that it is followed, and `vmdr group stop {name}` stops it"
                    );
                    return Err(Status::failed_precondition(message));
                }
                let Some(watcher) = watcher else { return Ok(()) };
                if live.attach(watcher)? {
                    return Ok(());
                }
                // It has just ended.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    };
    let Beginning { mut record, .. } = beginning(receiver, (&plan, &group), request, resumed)?;
    let report = &mut record.report;
    report.attempts = report.attempts.saturating_add(1);
    if !resumed || report.requested_unix_ns == 0 {
        report.requested_unix_ns = now();
    }
    state::UNDER_WAY.clone_into(&mut report.state);
    report.ended_unix_ns = 0;
    report.error.clear();
    record.touched_unix_ns = now();
    record.write(receiver.store.dir()).map_err(|error| record_status(&error))?;
    claim.live.set(&record.report);
    if let Some(watcher) = watcher {
        claim.live.attach(watcher)?;
    }
    let of = Arc::clone(receiver);
    let handle = Handle::current();
    let spawned = std::thread::Builder::new()
        .name("vmdr-group".to_owned())
        .spawn(move || Run::new(of, plan, group, record, claim).run(&handle));
    spawned.map(drop).map_err(|error| Status::internal(format!("start a thread for the group: {error}")))
}

/// Whether it was when its record was written last.
fn is_under_way(receiver: &Receiver, name: &str) -> Result<bool, Status> {
    let record = Record::read(receiver.store.dir(), name).map_err(|error| record_status(&error))?;
    Ok(record.is_some_and(|record| record.report.state == state::UNDER_WAY))
}

/// Has no further member begun, and none by itself later: those under way are brought to their end.
pub fn stop(receiver: &Receiver, name: &str) -> Result<GroupReport, Status> {
    if let Some(live) = receiver.groups.of(name) {
        live.stop();
        let mut report = live.report();
        // One that has just been asked for says nothing yet.
        name.clone_into(&mut report.group);
        return Ok(report);
    }
    let record = Record::read(receiver.store.dir(), name).map_err(|error| record_status(&error))?;
    let broken_off = |record: &Record| matches!(record.report.state.as_str(), state::UNDER_WAY | state::INTERRUPTED);
    let Some(mut record) = record.filter(broken_off) else {
        let shown: String = name.chars().take(64).collect();
        return Err(Status::failed_precondition(format!("no activation of a group {shown:?} is under way here")));
    };
    state::STOPPED.clone_into(&mut record.report.state);
    record.write(receiver.store.dir()).map_err(|error| record_status(&error))?;
    Ok(record.report)
}

/// Goes on with what was under way when the receiver was killed, unless that was too long ago. One that has ended in order may have
/// been stopped to stop this.
pub fn resume_all(receiver: &Arc<Receiver>) {
    for name in Record::names(receiver.store.dir()) {
        let record = match Record::read(receiver.store.dir(), &name) {
            Ok(Some(record)) => record,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(group = name, %error, "an activation of a group");
                continue;
            }
        };
        if record.report.state == state::INTERRUPTED {
            tracing::warn!(group = name, "its activation was interrupted: `vmdr group activate {name}` goes on");
        }
        if record.report.state != state::UNDER_WAY {
            continue;
        }
        let away = Duration::from_nanos(now().saturating_sub(record.touched_unix_ns));
        if away > GOES_ON_MAX {
            tracing::warn!(
                group = name,
                "its activation was interrupted long ago: `vmdr group activate {name}` brings up who does not run yet"
            );
            continue;
        }
        let of = Arc::clone(receiver);
        tokio::task::spawn_blocking(move || {
            let request = GroupRequest { group: name.clone(), ..GroupRequest::default() };
            let give_up = Instant::now() + GOES_ON_MAX;
            while !of.is_ending() {
                let under_way = is_under_way(&of, &name);
                match under_way
                    .and_then(|is| if is { begin(&of, &request, None, true).map(|()| true) } else { Ok(false) })
                {
                    // Somebody has stopped it meanwhile.
                    Ok(false) => return,
                    Ok(true) => {
                        let entry = Entry::new("ActivateGroup", "this daemon", &name, Outcome::Begun);
                        of.audit.record(entry.because("gone on with after the receiver had ended"));
                        return;
                    }
                    Err(status) if status.code() == Code::Unavailable && Instant::now() < give_up => {
                        tracing::warn!(group = name, "go on with its activation: {}; tried again", status.message());
                        std::thread::sleep(RETRY);
                    }
                    Err(status) => {
                        tracing::error!(group = name, "its activation does not go on: {}", status.message());
                        return;
                    }
                }
            }
        });
    }
}

/// What the thread of a member tells.
enum Event {
    Step(String),
    Activated(Box<ActivationReport>),
    Checked(Checked),
    Ended(Result<(), Why>),
}

/// Why a member is not ready.
enum Why {
    Failed(String),
    /// The receiver ends.
    Ending,
}

impl From<Ending> for Why {
    fn from(_: Ending) -> Self {
        Why::Ending
    }
}

struct Run {
    receiver: Arc<Receiver>,
    plan: Plan,
    group: Group,
    record: Record,
    claim: Claim,
    states: Vec<State>,
    /// When something was heard of each last.
    heard: Vec<Instant>,
    events: Events<(usize, Event)>,
    tell: Sender<(usize, Event)>,
    /// When it was asked for.
    requested: (Instant, u64),
}

impl Run {
    fn new(receiver: Arc<Receiver>, plan: Plan, group: Group, record: Record, claim: Claim) -> Self {
        let states: Vec<State> = record.report.members.iter().map(|member| State::of(&member.state)).collect();
        let heard = vec![Instant::now(); states.len()];
        let (tell, events) = channel();
        let asked = record.report.requested_unix_ns;
        let since = Duration::from_nanos(now().saturating_sub(asked));
        let requested = (Instant::now().checked_sub(since).unwrap_or_else(Instant::now), asked);
        Run { receiver, plan, group, record, claim, states, heard, events, tell, requested }
    }

    fn run(mut self, handle: &Handle) {
        let mut touched = Instant::now();
        loop {
            if self.receiver.is_ending() {
                state::INTERRUPTED.clone_into(&mut self.record.report.state);
                self.keep();
                return;
            }
            self.settle();
            if self.claim.live.is_stopped() {
                if self.record.report.state != state::STOPPED {
                    // Also for who finds it after a crash.
                    state::STOPPED.clone_into(&mut self.record.report.state);
                    self.keep();
                }
                if !self.states.iter().any(|state| state.is_under_way()) {
                    break;
                }
            } else {
                for index in order::next(&self.order(), self.group.parallel) {
                    self.start(index);
                }
            }
            if self.states.iter().all(|state| state.is_settled()) {
                break;
            }
            match self.events.recv_timeout(LOOK) {
                Ok((index, event)) => self.heard(index, event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            for index in silent(&self.states, &self.heard, Instant::now()) {
                let minutes = SILENT_MAX.as_secs() / 60;
                let why = format!("nothing was heard of it for {minutes} min: see the receiver's log, and libvirt's");
                self.failed(index, why);
            }
            if touched.elapsed() >= TOUCH {
                touched = Instant::now();
                self.keep();
            }
        }
        let ready = self.states.iter().all(|state| *state == State::Ready);
        let report = &mut self.record.report;
        report.ended_unix_ns = now();
        match (ready, self.claim.live.is_stopped()) {
            (true, _) => state::READY,
            (false, true) => state::STOPPED,
            (false, false) => state::FAILED,
        }
        .clone_into(&mut report.state);
        self.keep();
        let report = &self.record.report;
        let entry = Entry::new("ActivateGroup", "this daemon", &report.group, Outcome::Noted);
        self.receiver.audit.record(entry.because(format!("run {} has ended: {}", report.run, report.state)));
        tracing::info!(
            group = report.group,
            run = report.run,
            state = report.state,
            "an activation of a group has ended"
        );
        // The last word, after which the place is free.
        let live = Arc::clone(&self.claim.live);
        let report = self.record.report.clone();
        live.end(handle, &report);
    }

    fn domains(&self) -> Vec<&Domain> {
        domains(&self.plan, &self.group)
    }

    fn order(&self) -> Vec<order::Member> {
        order_of(&self.domains(), &self.states)
    }

    /// Writes the record. One that cannot be written keeps no guest from being brought up.
    fn keep(&mut self) {
        self.record.touched_unix_ns = now();
        if let Err(error) = self.record.write(self.receiver.store.dir()) {
            tracing::error!(group = self.record.report.group, %error, "how far its activation is");
            self.record.report.error = format!("after a restart of the receiver it may not go on from here: {error}");
        }
        self.claim.live.set(&self.record.report);
    }

    fn name(&self, index: usize) -> String {
        self.record.report.members[index].name.clone()
    }

    fn put(&mut self, index: usize, state: State, error: String) {
        self.states[index] = state;
        let member = &mut self.record.report.members[index];
        state.word().clone_into(&mut member.state);
        member.error = error;
        member.step.clear();
        if state.is_settled() {
            member.ended_unix_ns = now();
        }
    }

    /// Holds back who waits for somebody that will not be ready.
    fn settle(&mut self) {
        let mut order = self.order();
        let held = order::hold_back(&mut order);
        for (index, needed) in &held {
            let (name, needed) = (self.name(*index), &self.record.report.members[*needed]);
            let why = format!(
                "it needs {}, which is {}",
                needed.name,
                if needed.state == State::Failed.word() { "not ready" } else { "held back" }
            );
            let said = format!("{name} is held back: {why}");
            self.put(*index, State::HeldBack, why);
            self.claim.live.say(name, said);
        }
        if !held.is_empty() {
            self.keep();
        }
    }

    fn start(&mut self, index: usize) {
        self.heard[index] = Instant::now();
        self.put(index, State::Activating, String::new());
        let member = &mut self.record.report.members[index];
        (member.begun_unix_ns, member.ended_unix_ns) = (now(), 0);
        member.checks.clear();
        self.keep();
        let name = self.name(index);
        let worker = Worker {
            receiver: Arc::clone(&self.receiver),
            group: self.group.name.value.clone(),
            run: self.record.report.run.clone(),
            request: member_request(&self.record, &name),
            ready: self.domains()[index].ready.iter().map(|at| at.value.clone()).collect(),
            requested: self.requested,
            told: Told { index, tell: self.tell.clone(), ended: false },
        };
        let spawned = std::thread::Builder::new().name("vmdr-member".to_owned()).spawn(move || worker.run());
        if let Err(error) = spawned {
            // Its end was told when it was dropped; this says why.
            tracing::error!(member = name, %error, "start a thread for a member of a group");
        }
    }

    fn heard(&mut self, index: usize, event: Event) {
        if !self.states[index].is_under_way() {
            // It was given up.
            return;
        }
        self.heard[index] = Instant::now();
        let name = self.name(index);
        match event {
            Event::Step(step) => {
                self.record.report.members[index].step.clone_from(&step);
                self.claim.live.set(&self.record.report);
                self.claim.live.say(format!("{name}: {step}"), String::new());
            }
            Event::Activated(report) => {
                let member = &mut self.record.report.members[index];
                member.uuid.clone_from(&report.uuid);
                let said = format!("{name} runs here");
                // A later look finds it running; how it came up was told the first time.
                let same = |before: &&mut ActivationReport| report.was_active && before.generation == report.generation;
                match member.activation.as_mut().filter(same) {
                    Some(before) => follow(before, *report),
                    None => member.activation = Some(*report),
                }
                self.put(index, State::Checking, String::new());
                self.keep();
                self.claim.live.say(name, said);
            }
            Event::Checked(checked) => {
                self.record.report.members[index].checks.push((&checked).into());
                self.keep();
            }
            Event::Ended(Ok(())) => {
                self.put(index, State::Ready, String::new());
                self.keep();
                self.claim.live.say(name.clone(), format!("{name} is ready"));
            }
            Event::Ended(Err(Why::Failed(why))) => self.failed(index, why),
            // The record has it as it is.
            Event::Ended(Err(Why::Ending)) => {}
        }
    }

    fn failed(&mut self, index: usize, why: String) {
        let name = self.name(index);
        tracing::error!(group = self.group.name.value, member = name, "{why}");
        self.put(index, State::Failed, why.clone());
        self.keep();
        self.claim.live.say(name.clone(), format!("{name} is not ready: {why}"));
    }
}

/// Those that are to be given up.
fn silent(states: &[State], heard: &[Instant], now: Instant) -> Vec<usize> {
    let of = states.iter().zip(heard).enumerate();
    let silent =
        of.filter(|(_, (state, heard))| state.is_under_way() && now.saturating_duration_since(**heard) > SILENT_MAX);
    silent.map(|(index, _)| index).collect()
}

/// What a later look at a guest that ran already adds to how it came up: what was left to be done after.
fn follow(before: &mut ActivationReport, later: ActivationReport) {
    before.failed = later.failed;
    before.hooks.extend(later.hooks);
    let replace = |old: &mut Vec<_>, new: Vec<_>| {
        if !new.is_empty() {
            *old = new;
        }
    };
    replace(&mut before.network, later.network);
    replace(&mut before.dns, later.dns);
    if !later.announced.is_empty() {
        before.announced = later.announced;
    }
    if !later.warnings.is_empty() {
        before.warnings = later.warnings;
    }
}

/// The way to the group's thread. If it is dropped before an end was told, the member has failed.
struct Told {
    index: usize,
    tell: Sender<(usize, Event)>,
    ended: bool,
}

impl Told {
    fn say(&self, event: Event) {
        // Nobody listens any more: the receiver ends.
        let _ = self.tell.send((self.index, event));
    }

    fn end(mut self, how: Result<(), Why>) {
        self.ended = true;
        self.say(Event::Ended(how));
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if !self.ended {
            let why = "what was to bring it up has ended by itself: see the receiver's log".to_owned();
            self.say(Event::Ended(Err(Why::Failed(why))));
        }
    }
}

struct Worker {
    receiver: Arc<Receiver>,
    group: String,
    run: String,
    request: ActivateRequest,
    ready: Vec<vmdr_plan::Ready>,
    requested: (Instant, u64),
    told: Told,
}

impl Worker {
    fn run(self) {
        let name = self.request.domain.clone();
        let entry = Entry::new("Activate", "this daemon", &name, Outcome::Begun);
        let entry = entry.because(format!("of group {}, run {}", self.group, self.run));
        self.receiver.audit.record(entry.clone());
        let how = self.bring_up();
        match &how {
            Ok(()) => self.receiver.audit.record(entry.with(Outcome::Done)),
            Err(Why::Failed(why)) => {
                let detail = format!("{}: {why}", entry.detail);
                self.receiver.audit.record(entry.with(Outcome::Failed).because(detail));
            }
            Err(Why::Ending) => {}
        }
        self.told.end(how);
    }

    fn bring_up(&self) -> Result<(), Why> {
        let domain = &self.request.domain;
        let mut progress = |step: &str| {
            tracing::info!(%domain, step, "activation");
            self.told.say(Event::Step(step.to_owned()));
        };
        let done = control::activate(&self.receiver, &self.request, self.requested, &mut progress);
        let report = done.map_err(|status| {
            self.receiver.metrics.activation_failures.fetch_add(1, Ordering::Relaxed);
            Why::Failed(status.message().to_owned())
        })?;
        if report.was_active && report.point.is_none() {
            return Err(Why::Failed(format!(
                "a guest of this UUID runs here that was not activated from what is stored: see `virsh dominfo {}`, and stop it \
                 unless it is the right one",
                report.uuid
            )));
        }
        let (failed, generation) = (report.failed.clone(), report.generation);
        let point = report.point.as_ref().map(|point| point.id.clone()).unwrap_or_default();
        self.told.say(Event::Activated(Box::new(report)));
        if !failed.is_empty() {
            return Err(Why::Failed(format!("it runs here, but {failed}")));
        }
        if self.ready.is_empty() {
            return Ok(());
        }
        let found = find_named(&self.receiver, domain);
        let (uuid, name) = found.map_err(|status| Why::Failed(status.message().to_owned()))?;
        let settings = self.receiver.settings(&name, uuid);
        let environment = checks::environment(&self.receiver, (uuid, &name), &settings.mapping, &point, generation);
        let subject = Subject { receiver: &self.receiver, uuid, environment };
        for ready in &self.ready {
            let shown = ready.shown();
            self.told.say(Event::Step(format!("check {shown}")));
            let checked = subject.check(ready)?;
            let (passed, said) = (checked.passed, checked.said.clone());
            self.told.say(Event::Checked(checked));
            if !passed && ready.on_failure == OnFailure::Abort {
                return Err(Why::Failed(format!("it runs here, but its check {shown} did not pass: {said}")));
            }
            if !passed {
                tracing::warn!(%domain, check = shown, said, "a readiness check did not pass; its group goes on");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmdr_proto::control::HookRun;

    use super::*;

    #[test]
    fn who_is_silent_for_too_long_is_given_up() {
        let (begun, second) = (Instant::now(), Duration::from_secs(1));
        let states = [State::Activating, State::Ready, State::Waiting, State::Checking];
        let heard = [begun, begun, begun, begun + SILENT_MAX];
        assert_eq!(silent(&states, &heard, begun + SILENT_MAX), [] as [usize; 0]);
        assert_eq!(silent(&states, &heard, begun + SILENT_MAX + second), [0]);
    }

    #[test]
    fn a_later_look_adds_the_hooks_that_were_left() {
        let hook = |error: &str| HookRun { error: error.to_owned(), ..HookRun::default() };
        let first = ActivationReport {
            rto_seconds: 1.5,
            hooks: vec![hook("no")],
            failed: "no".to_owned(),
            ..ActivationReport::default()
        };
        let look = ActivationReport { was_active: true, ..ActivationReport::default() };
        let mut kept = first.clone();
        follow(&mut kept, ActivationReport { failed: "no".to_owned(), ..look.clone() });
        assert_eq!(kept, first);
        follow(&mut kept, ActivationReport { hooks: vec![hook("")], ..look });
        assert_eq!((kept.failed.as_str(), kept.hooks.len(), kept.rto_seconds), ("", 2, 1.5));
    }
}
