//! Automatic failover at the protected host (`docs/failover.md`): drives the decision core of one domain ([`Holder`]).
//!
//! ```text
//!   link: opening, opened, Armed, Disarmed, closed --+            +--> permission: until when the guest may run
//!   witness: granted, lost, outdated ----------------+--> core ---+--> witness: renew
//!   clock -------------------------------------------+            +--> link: Arm, Disarm
//! ```
//! What the core says of the guest is in the permission ([`vmdr_shim::permission`]), which the shim and [`lookout`] have mapped,
//! before anything that it asks for is sent. It is a task of its own: a session that waits for a slow link or for QEMU does not
//! keep a lease from being renewed.

mod lookout;
mod witness;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender as Inputs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use vmdr_proto::control::FailoverStatus;
use vmdr_proto::replication::{Arm, Disarm, ToReceiver, to_receiver};
use vmdr_shim::permission::{Permission, now};
use vmdr_witness::holder::Act;
use vmdr_witness::{Allowed, Backup, Claim, Holder, May, Terms};

use self::lookout::Lookout;
pub use self::witness::Witness;
use crate::config::Config;
use crate::registry::Protection;
use crate::session::Input;

/// How long stopping a guest may take after its deadline: what the shim has ([`vmdr_shim::deadline`]), a look of the agent's
/// after it, and what that does then.
pub const MARGIN: Duration = Duration::from_secs(2);
/// How often the core is asked: several times in each of its periods, of which the shortest is a third of a second.
const TICK: Duration = Duration::from_millis(50);
const STAND_DOWN_LOOK: Duration = Duration::from_millis(20);
/// How long the backup may take to stand down when it is asked to for good.
pub const STAND_DOWN_LIMIT: Duration = Duration::from_secs(15);
/// How long, when this agent is told to end: that is no reason to take its guests.
pub const END_LIMIT: Duration = Duration::from_secs(3);

/// What happens.
#[derive(Debug)]
enum Event {
    /// A stream is being opened.
    Opening(u64),
    /// It was: as the backup says, it is disarmed; whereby it is spoken to, if it knows of such messages.
    Opened {
        stream: u64,
        disarmed: bool,
        sender: Option<mpsc::Sender<ToReceiver>>,
    },
    Closed(u64),
    Armed(u64, u64),
    Disarmed(u64, u64),
    /// Another site owns the guest.
    Taken(u64),
    SetAutomatic(bool),
    /// The guest runs, or was ended by somebody.
    Runs(bool),
    Answered(u64, Result<Allowed, String>),
}

/// What is known, for others.
#[derive(Clone, Debug)]
struct Seen {
    /// Nothing is said of the guest any more.
    ended: bool,
    automatic: bool,
    runs: bool,
    backup: Backup,
    fenced: Option<u64>,
    contradiction: Option<u64>,
    /// There is a stream; whether the receiver at its end can take guests by itself.
    stream: Option<bool>,
    /// Why the witness did not grant the last claim.
    witness: String,
}

/// The automatic failover of one domain. Clones share it; it ends with the last one.
#[derive(Clone, Debug)]
pub struct Failover {
    events: mpsc::UnboundedSender<Event>,
    streams: Arc<AtomicU64>,
    shared: Arc<Shared>,
    lookout: Arc<Lookout>,
}

#[derive(Debug)]
struct Shared {
    permission: Permission,
    seen: Mutex<Seen>,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The terms of a lease with these settings.
pub fn terms(config: &vmdr_etcd::Config) -> anyhow::Result<Terms> {
    Ok(Terms::new(Duration::from_secs(config.lease_seconds), MARGIN)?)
}

impl Failover {
    /// Begins. What was in force before is so again, unless the host was started anew since: then the guest may not run before
    /// the backup site was asked. `holder`: the id of this host.
    pub fn start(
        config: &Arc<Config>,
        protection: &Protection,
        holder: String,
        inputs: Inputs<Input>,
        runtime: &tokio::runtime::Handle,
    ) -> anyhow::Result<Self> {
        let path = config.ownerships().permission(&protection.uuid);
        let confirmed = config.ownerships().is_confirmed(&protection.uuid);
        Self::start_with(config, protection, holder, inputs, runtime, &path, confirmed)
    }

    fn start_with(
        config: &Arc<Config>,
        protection: &Protection,
        holder: String,
        inputs: Inputs<Input>,
        runtime: &tokio::runtime::Handle,
        path: &Path,
        confirmed: bool,
    ) -> anyhow::Result<Self> {
        let permission = open(path, May::Never)?;
        let may = permission.may();
        // It is only ever more than "never" after the backup was asked.
        let confirmed = confirmed || may != May::Never;
        let mut core = Holder::new(terms(&config.witness)?, may, confirmed);
        let automatic = protection.suspended.is_none() && protection.moving.is_none();
        core.set_automatic(automatic);
        let (fenced, contradiction) = (None, None);
        let witness = String::new();
        let seen = Seen {
            ended: false,
            automatic,
            runs: true,
            backup: core.backup(),
            fenced,
            contradiction,
            stream: None,
            witness,
        };
        let shared = Arc::new(Shared { permission, seen: Mutex::new(seen) });
        let (events, heard) = mpsc::unbounded_channel();
        let lookout = Lookout::start(config.clone(), protection, path)?;
        let driver = Driver {
            domain: protection.name.clone(),
            uuid: protection.uuid.clone(),
            generation: protection.generation,
            holder,
            core,
            witness: config.witness.is_set().then(|| Witness::new(config.witness.clone())),
            shared: shared.clone(),
            automatic,
            runs: true,
            stream: None,
            said: String::new(),
            inputs,
            heard,
            events: events.downgrade(),
        };
        runtime.spawn(driver.run());
        Ok(Self { events, streams: Arc::default(), shared, lookout: Arc::new(lookout) })
    }

    fn tell(&self, event: Event) {
        // One that has ended is one of a session that has.
        let _ = self.events.send(event);
    }

    /// A stream to the backup is being opened. Its number.
    pub fn opening(&self) -> u64 {
        let stream = self.streams.fetch_add(1, Ordering::SeqCst) + 1;
        self.tell(Event::Opening(stream));
        stream
    }

    /// The backup has answered. `failover`: what it says of it, if it knows of it.
    pub fn opened(&self, stream: u64, disarmed: Option<bool>, sender: mpsc::Sender<ToReceiver>) {
        let sender = disarmed.is_some().then_some(sender);
        self.tell(Event::Opened { stream, disarmed: disarmed.unwrap_or(false), sender });
    }

    /// The stream has ended.
    pub fn closed(&self, stream: u64) {
        self.tell(Event::Closed(stream));
    }

    /// The backup says that it is armed.
    pub fn armed(&self, stream: u64, number: u64) {
        self.tell(Event::Armed(stream, number));
    }

    /// The backup says that it has stood down.
    pub fn disarmed(&self, stream: u64, number: u64) {
        self.tell(Event::Disarmed(stream, number));
    }

    /// Another site owns the guest, in this generation.
    pub fn taken(&self, generation: u64) {
        self.tell(Event::Taken(generation));
    }

    /// Whether the backup is to take the guest by itself, from now on.
    pub fn set_automatic(&self, automatic: bool) {
        self.tell(Event::SetAutomatic(automatic));
    }

    /// From now on nothing is said of the guest any more. What was said last stays in force.
    pub fn end(&self) {
        self.shared.seen().ended = true;
        self.lookout.end();
    }

    /// Whether the guest may run now.
    pub fn allows(&self) -> bool {
        self.shared.permission.allows()
    }

    /// The guest is paused, and goes on when it may.
    pub fn stay_stopped(&self) {
        self.shared.permission.set_stopped(true);
    }

    /// The generation in which another site owns the guest.
    pub fn fenced(&self) -> Option<u64> {
        self.shared.seen().fenced
    }

    /// The guest runs.
    pub fn runs(&self) {
        self.tell(Event::Runs(true));
    }

    /// Somebody has ended the guest: that its host is silent then, or is shut down, is no reason to take it. Has the backup stand down
    /// until it runs again, and waits for that.
    pub async fn rests(&self, limit: Duration) -> Result<(), String> {
        self.tell(Event::Runs(false));
        self.has_stood_down(limit, |seen| !seen.runs).await
    }

    /// Has the backup stand down for good, and waits until it has. Where it does not in time everything is as before.
    pub async fn stand_down(&self, limit: Duration) -> Result<(), String> {
        let before = self.shared.seen().automatic;
        self.set_automatic(false);
        let stood = self.has_stood_down(limit, |seen| !seen.automatic).await;
        if stood.is_err() {
            self.set_automatic(before);
        }
        stood
    }

    async fn has_stood_down(&self, limit: Duration, heard: fn(&Seen) -> bool) -> Result<(), String> {
        let until = Instant::now() + limit;
        loop {
            let seen = self.shared.seen().clone();
            // What another site owns does not run here, and nothing is to be asked of it.
            if seen.fenced.is_some() || (heard(&seen) && seen.backup == Backup::Disarmed && self.allows()) {
                return Ok(());
            }
            if Instant::now() >= until {
                let why = match seen.stream {
                    None => "it cannot be reached",
                    Some(false) => "it has no [witness] any more",
                    Some(true) => "it has not answered",
                };
                return Err(format!(
                    "the backup site has not said within {limit:?} that it will not take the guest by itself ({why})"
                ));
            }
            tokio::time::sleep(STAND_DOWN_LOOK).await;
        }
    }

    /// Seconds for which the guest may run by its lease; 0: it does not go by one, or may not.
    pub fn lease_seconds(&self) -> f64 {
        match self.shared.permission.may() {
            May::Until(end) => end.saturating_sub(now()).as_secs_f64(),
            May::Never | May::Always => 0.0,
        }
    }

    /// For `status`.
    pub fn status(&self) -> FailoverStatus {
        let seen = self.shared.seen().clone();
        let stance = match seen.backup {
            Backup::Armed => "armed",
            Backup::Disarmed => "disarmed",
            Backup::MayBeArmed => "unknown",
        };
        FailoverStatus {
            stance: stance.to_owned(),
            lease_seconds: self.lease_seconds(),
            message: sentence(&seen, self.allows()),
        }
    }
}

/// Whether the guest would be taken now, and if not, why.
fn sentence(seen: &Seen, allows: bool) -> String {
    if let Some(generation) = seen.fenced {
        return format!("another site owns the guest, in generation {generation}");
    }
    if let Some(generation) = seen.contradiction {
        return format!(
            "the witness has another owner, in generation {generation}, although the backup site has stood down: nothing is \
             taken by itself until somebody has looked (`vmdr protect --failover manual`, then `auto`)"
        );
    }
    let mut reasons = Vec::new();
    if seen.stream.is_none() {
        reasons.push("the backup site cannot be reached".to_owned());
    }
    if seen.stream == Some(false) {
        reasons.push("the receiver there has no [witness]".to_owned());
    }
    if !seen.witness.is_empty() {
        reasons.push(seen.witness.clone());
    }
    let why = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join("; ")) };
    if !allows {
        return format!(
            "the guest stands still, because the backup site may have taken it: there is no lease, and that site has not said \
             that it stands down; it goes on when either can be had{why}"
        );
    }
    match seen.backup {
        Backup::Armed => {
            format!("the backup site takes the guest by itself when this host is silent and its lease has ended{why}")
        }
        Backup::Disarmed if !seen.runs => "the backup site does not take the guest: it was ended here".to_owned(),
        Backup::Disarmed if !seen.automatic => {
            "the backup site does not take the guest: that is off for the time being".to_owned()
        }
        Backup::Disarmed => format!("the backup site does not take the guest now{why}"),
        Backup::MayBeArmed => {
            format!(
                "the backup site takes the guest perhaps, when the lease has ended: it has not said how it stands{why}"
            )
        }
    }
}

/// The permission of a domain that is in force; `absent` where there is none.
pub fn open(path: &Path, absent: May) -> anyhow::Result<Permission> {
    let directory = path.parent().context("no directory")?;
    std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let opened = Permission::open_or_create(path, absent);
    Ok(opened.with_context(|| format!("until when the guest may run: {}", path.display()))?.0)
}

/// The task.
struct Driver {
    domain: String,
    uuid: String,
    generation: u64,
    holder: String,
    core: Holder,
    witness: Option<Witness>,
    shared: Arc<Shared>,
    automatic: bool,
    runs: bool,
    /// The newest stream, and whereby the backup is spoken to on it, if it can be.
    stream: Option<(u64, Option<mpsc::Sender<ToReceiver>>)>,
    /// Why the witness did not grant the last claim.
    said: String,
    inputs: Inputs<Input>,
    heard: mpsc::UnboundedReceiver<Event>,
    /// Its own, for the witness's answers; weak, so that it ends with the others.
    events: mpsc::WeakUnboundedSender<Event>,
}

impl Driver {
    async fn run(mut self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                event = self.heard.recv() => match event {
                    Some(event) => self.hear(event),
                    None => return,
                },
                _ = ticks.tick() => self.tick(),
            }
            if self.shared.seen().ended {
                return;
            }
        }
    }

    fn hear(&mut self, event: Event) {
        match event {
            Event::Opening(stream) => {
                self.core.opening(stream);
                self.stream = None;
            }
            Event::Opened { stream, disarmed, sender } => {
                if self.core.opened(stream, disarmed) {
                    self.stream = Some((stream, sender));
                }
            }
            Event::Closed(stream) => {
                self.core.closed(stream);
                self.stream.take_if(|(open, _)| *open == stream);
            }
            Event::Armed(stream, number) => self.core.armed(stream, number),
            Event::Disarmed(stream, number) => self.core.disarmed(stream, number),
            Event::Taken(generation) => self.core.taken(generation),
            Event::SetAutomatic(automatic) => {
                self.automatic = automatic;
                self.core.set_automatic(automatic && self.runs);
            }
            Event::Runs(runs) => {
                self.runs = runs;
                self.core.set_automatic(self.automatic && runs);
            }
            Event::Answered(number, answer) => self.answered(number, answer),
        }
        self.publish();
    }

    fn answered(&mut self, number: u64, answer: Result<Allowed, String>) {
        let said = match &answer {
            Ok(Allowed::Yes) => String::new(),
            Ok(Allowed::Held(_)) => "the witness has given the lease to another site".to_owned(),
            Ok(Allowed::Outdated(generation)) => {
                format!("the witness has an owner in generation {generation}, this host's is {}", self.generation)
            }
            Ok(Allowed::Missing) => "the witness knows nothing of this host: its keys were deleted".to_owned(),
            Err(error) => error.clone(),
        };
        if self.said != said {
            if said.is_empty() {
                tracing::info!(domain = self.domain, "the witness grants the lease");
            } else {
                tracing::warn!(domain = self.domain, "{said}");
            }
            self.said = said;
        }
        match answer {
            Ok(Allowed::Yes) => self.core.renewed(number, now()),
            Ok(Allowed::Held(_)) => self.core.lost(number),
            Ok(Allowed::Outdated(generation)) => self.core.outdated(number, generation),
            Ok(Allowed::Missing) | Err(_) => self.core.unanswered(number),
        }
    }

    fn tick(&mut self) {
        let acts = self.core.tick(now());
        // Before anything is sent.
        self.publish();
        for act in acts {
            match act {
                Act::Renew { number, over } => self.renew(number, over),
                Act::Arm { number } => self.send(to_receiver::Message::Arm(Arm { number })),
                Act::Disarm { number } => self.send(to_receiver::Message::Disarm(Disarm { number })),
            }
        }
    }

    /// What cannot be sent is asked for again.
    fn send(&self, message: to_receiver::Message) {
        let Some((_, Some(sender))) = &self.stream else { return };
        tracing::info!(domain = self.domain, ?message, "to the backup site");
        let _ = sender.try_send(ToReceiver { message: Some(message) });
    }

    fn renew(&mut self, number: u64, over: vmdr_witness::Over) {
        let Some(witness) = self.witness.clone() else {
            return self.answered(number, Err("no [witness] is configured here".to_owned()));
        };
        let claim = Claim { holder: self.holder.clone(), generation: self.generation, over };
        let (uuid, events) = (self.uuid.clone(), self.events.clone());
        tokio::spawn(async move {
            let answer = witness.claim(&uuid, &claim).await;
            if let Some(events) = events.upgrade() {
                let _ = events.send(Event::Answered(number, answer));
            }
        });
    }

    fn publish(&mut self) {
        let mut seen = self.shared.seen();
        if seen.ended {
            return;
        }
        let (may, before) = (self.core.may(), self.shared.permission.may());
        if may != before {
            self.shared.permission.set(may);
        }
        if std::mem::discriminant(&may) != std::mem::discriminant(&before) {
            tracing::info!(domain = self.domain, ?may, "may the guest run?");
        }
        let fenced = self.core.fenced().filter(|_| seen.fenced.is_none());
        *seen = Seen {
            ended: false,
            automatic: self.automatic,
            runs: self.runs,
            backup: self.core.backup(),
            fenced: self.core.fenced(),
            contradiction: self.core.contradiction(),
            stream: self.stream.as_ref().map(|(_, sender)| sender.is_some()),
            witness: self.said.clone(),
        };
        drop(seen);
        if let Some(generation) = fenced {
            tracing::error!(domain = self.domain, generation, "another site owns the guest");
            let _ = self.inputs.send(Input::Outdated(generation));
        }
    }
}

#[cfg(test)]
mod tests;
