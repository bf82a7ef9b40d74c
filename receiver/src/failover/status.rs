//! What is said of automatic failover: in the status, in figures, in alarms.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;
use vmdr_proto::control::FailoverStatus;
use vmdr_witness::{Allowed, Stance, Time};

use super::{Core, Domain, Failover, drive, locked};
use crate::daemon::Receiver;

/// For how long somebody's lease of what was activated here by hand may be one that only has not ended yet: most have by then.
const HELD: Duration = Duration::from_secs(60);

impl Failover {
    /// Of a domain whose failover is, or was, automatic.
    pub fn status(&self, receiver: &Receiver, uuid: Uuid) -> Option<FailoverStatus> {
        let domain = self.of(uuid)?;
        let core = domain.core();
        if !core.unknown.is_empty() {
            let what = format!("{}: until then nothing is promised to its host, and nothing taken", core.unknown);
            return Some(of("unknown", what));
        }
        if !core.book.automatic {
            return None;
        }
        Some(self.describe(receiver, uuid, &core))
    }

    fn describe(&self, receiver: &Receiver, uuid: Uuid, core: &Core) -> FailoverStatus {
        let host = || receiver.peer_shown(drive::from(core));
        if let Some(generation) = core.book.publish {
            let why = [&core.contradiction, &core.silent_witness].into_iter().find(|why| !why.is_empty());
            let why = why.map(|why| format!(": {why}")).unwrap_or_default();
            return of(
                "disarmed",
                format!("it is this site's in generation {generation}, which the witness is told{why}"),
            );
        }
        if let Some(taking) = &core.taking {
            let generation = taking.generation();
            return of(
                "taking",
                match (&*taking.trouble, taking.failed) {
                    ("", _) => format!("it is this site's in generation {generation}, and is being activated"),
                    (why, true) => format!(
                        "it is this site's in generation {generation}, and could not be activated: {why}. It is tried again by \
                         `vmdr activate`, and when this receiver is started anew"
                    ),
                    (why, false) => {
                        format!("it is this site's in generation {generation}, and not activated yet: {why}")
                    }
                },
            );
        }
        let Some(standby) = &core.standby else { return of("disarmed", String::new()) };
        let obstacle = standby.obstacle().map(|obstacle| self::obstacle(receiver, obstacle));
        let Some(stance) = standby.stance() else {
            return of("unknown", "its stance could not be written: nothing is taken until it can be".to_owned());
        };
        let unheard = match &*core.silent_witness {
            "" => obstacle,
            error => Some(error.to_owned()),
        };
        match stance {
            Stance::Disarmed => {
                let because = match standby.obstacle() {
                    Some(obstacle @ Allowed::Outdated(_)) => format!(": {}", self::obstacle(receiver, obstacle)),
                    _ if !core.contradiction.is_empty() => format!(": {}", core.contradiction),
                    _ => String::new(),
                };
                of("disarmed", format!("it is not taken by itself{because}"))
            }
            Stance::Taking { .. } => {
                let why = unheard.map(|why| format!(": {why}")).unwrap_or_default();
                of("taking", format!("its lease is being claimed{why}"))
            }
            Stance::Armed { .. } => {
                let bound = self.config.after_seconds;
                let message = if receiver.silence.rest(uuid).is_some() {
                    format!("{} does not send on purpose: it is not taken", host())
                } else if standby.is_silent(self.clock.now()) {
                    let why = unheard.unwrap_or_else(|| "the witness is asked".to_owned());
                    format!("{} was not heard of for more than {bound} s, and the guest is not taken: {why}", host())
                } else {
                    format!("it is taken when {} was not heard of for {bound} s and its lease has ended", host())
                };
                of("armed", message)
            }
        }
    }

    /// Whether its guest would be taken; nothing: its failover is not automatic.
    pub fn is_armed(&self, uuid: Uuid) -> Option<bool> {
        let domain = self.of(uuid)?;
        let core = domain.core();
        core.book.automatic.then(|| core.unknown.is_empty() && core.book.stance != Stance::Disarmed)
    }

    /// Whether an operator has to see to anything.
    pub fn is_in_trouble(&self) -> bool {
        !self.troubles().is_empty()
    }

    /// What an operator has to see to: a guest that was to be activated, and is not.
    pub fn troubles(&self) -> HashMap<Uuid, String> {
        let domains: Vec<_> = locked(&self.domains).values().cloned().collect();
        let now = self.clock.now();
        domains.iter().filter_map(|domain| Some((domain.uuid, domain.trouble(now)?))).collect()
    }
}

impl Domain {
    fn trouble(&self, now: Time) -> Option<String> {
        let core = self.core();
        let ends_by_itself = core.held_since.is_some_and(|since| now < since + HELD);
        if !core.contradiction.is_empty() && !ends_by_itself {
            return Some(format!("automatic failover: {}", core.contradiction));
        }
        let trouble = core.taking.as_ref().map(|taking| taking.trouble.clone());
        trouble.filter(|trouble| !trouble.is_empty()).map(|trouble| format!("automatic failover: {trouble}"))
    }
}

fn of(stance: &str, message: String) -> FailoverStatus {
    FailoverStatus { stance: stance.to_owned(), lease_seconds: 0.0, message }
}

fn obstacle(receiver: &Receiver, obstacle: &Allowed) -> String {
    match obstacle {
        Allowed::Yes => String::new(),
        Allowed::Held(holder) => format!("{} has its lease at the witness", receiver.peer_shown(holder)),
        Allowed::Outdated(generation) => format!(
            "the witness has an owner of it in generation {generation}, newer than what is stored here: find out where it runs"
        ),
        Allowed::Missing => {
            "the witness does not have the owner that it would be taken from (was it wiped?): find out where it \
                             runs"
                .to_owned()
        }
    }
}
