//! The protected side: may the guest run here, and until when?
//!
//! The guest may run while its lease at the witness lasts, or while the backup site has stood down ("disarmed"): a site that
//! has durably said so takes nothing before this host has armed it again. So an outage of the witness stops no guest whose
//! backup can be reached, and a cut link stops none whose witness can be reached. Whoever reaches neither cannot know, and
//! stops when its lease runs out.
//!
//! **Order.** What [`Holder::may`] says has to be in force, with whoever stops the guest, before anything that
//! [`Holder::tick`] asks for is sent: permission is narrowed before the backup is armed.

use crate::{Terms, Time};

/// Whether the guest may run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// No.
    Never,
    /// Up to this moment, by this host's clock: then it has to be told to stop.
    Until(Time),
    /// As long as nothing else is said.
    Always,
}

impl May {
    /// Whether it may at this moment.
    pub fn at(self, now: Time) -> bool {
        match self {
            Self::Never => false,
            Self::Until(end) => now < end,
            Self::Always => true,
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Renew the lease, or claim one where there is none; note when that was sent.
    Renew,
    /// Tell the backup, on the newest stream, that the lease is held here again.
    Arm {
        /// Of this request.
        number: u64,
    },
    /// Ask the backup, on the newest stream, to stand down.
    Disarm {
        /// Of this request.
        number: u64,
    },
}

/// What this host knows of the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backup {
    /// It has to be reckoned with.
    MayBeArmed,
    /// It has stood down, durably, and has not been armed since.
    Disarmed,
}

/// A check that is left out, so that the simulation shows what it is for.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Without {
    /// The lease counts from when its renewal was answered, not sent.
    SentAt,
    /// Nothing is taken off for clocks and for the time that stopping takes.
    Margin,
    /// Permission stays without bound when the backup is armed.
    Narrowing,
    /// Any answer to any request to stand down counts.
    Number,
}

/// The protected side of one domain.
#[derive(Clone, Debug)]
pub struct Holder {
    terms: Terms,
    lease: Option<Time>,
    backup: Backup,
    stream: Option<u64>,
    number: u64,
    /// The last request on this stream, if it was one to stand down that has not been answered.
    asked: Option<u64>,
    renew_at: Time,
    ask_at: Time,
    /// Another site owns the guest, in this generation.
    fenced: Option<u64>,
    /// The witness names another owner, and the backup has stood down all the same.
    contradiction: Option<u64>,
    #[cfg(test)]
    pub(crate) without: Option<Without>,
}

impl Holder {
    /// `may`: what was in force before, where whoever stops the guest has kept it through a restart of this process; `Never`
    /// after a start of the host.
    pub fn new(terms: Terms, may: May) -> Self {
        Self {
            terms,
            lease: match may {
                May::Until(end) => Some(end),
                May::Never | May::Always => None,
            },
            backup: if may == May::Always { Backup::Disarmed } else { Backup::MayBeArmed },
            stream: None,
            number: 0,
            asked: None,
            renew_at: Time::ZERO,
            ask_at: Time::ZERO,
            fenced: None,
            contradiction: None,
            #[cfg(test)]
            without: None,
        }
    }

    /// Whether the guest may run here.
    pub fn may(&self) -> May {
        match (self.fenced, self.backup, self.lease) {
            (Some(_), _, _) => May::Never,
            (None, Backup::Disarmed, _) => May::Always,
            (None, Backup::MayBeArmed, Some(end)) => May::Until(end),
            (None, Backup::MayBeArmed, None) => May::Never,
        }
    }

    /// The generation in which another site owns the guest.
    pub fn fenced(&self) -> Option<u64> {
        self.fenced
    }

    /// The generation in which the witness has another owner although the backup has stood down: nothing takes over by
    /// itself before the operator has looked.
    pub fn contradiction(&self) -> Option<u64> {
        self.contradiction
    }

    /// What is to be done now; to be asked several times in each [`Terms::renew_every`].
    pub fn tick(&mut self, now: Time) -> Vec<Act> {
        let mut acts = Vec::new();
        if self.fenced.is_some() {
            return acts;
        }
        if now >= self.renew_at {
            self.renew_at = now + self.terms.renew_every();
            acts.push(Act::Renew);
        }
        if self.stream.is_none() {
            return acts;
        }
        let left = self.lease.map_or(Time::ZERO, |end| end.saturating_sub(now));
        let sound = left > self.terms.in_danger();
        match self.backup {
            Backup::Disarmed if sound => {
                self.number += 1;
                self.asked = None;
                if !self.is_without_narrowing() {
                    self.backup = Backup::MayBeArmed;
                }
                acts.push(Act::Arm { number: self.number });
            }
            Backup::MayBeArmed if !sound && now >= self.ask_at => {
                self.number += 1;
                self.asked = Some(self.number);
                self.ask_at = now + self.terms.renew_every();
                acts.push(Act::Disarm { number: self.number });
            }
            Backup::Disarmed | Backup::MayBeArmed => {}
        }
        acts
    }

    /// The witness has granted or renewed the lease that was asked for at `sent`. `now`: when that was heard.
    pub fn renewed(&mut self, sent: Time, now: Time) {
        let (from, hold) = (sent, self.terms.hold());
        #[cfg(test)]
        let (from, hold) = match self.without {
            Some(Without::SentAt) => (now, hold),
            Some(Without::Margin) => (from, self.terms.ttl() + Time::from_millis(400)),
            _ => (from, hold),
        };
        let end = from + hold;
        if self.fenced.is_none() && end > now {
            self.lease = Some(self.lease.map_or(end, |before| before.max(end)));
            self.contradiction = None;
        }
    }

    /// The witness does not have the lease (any more): another can have it at any moment.
    pub fn lost(&mut self) {
        self.lease = None;
        self.renew_at = Time::ZERO;
    }

    /// The witness names another owner, in a newer generation. A backup that has stood down is none that runs the guest: a
    /// claim of its from before may have arrived late, and nobody runs the guest if this host stops, too.
    pub fn outdated(&mut self, generation: u64) {
        self.lease = None;
        match self.backup {
            Backup::MayBeArmed => self.fenced = Some(generation),
            Backup::Disarmed => self.contradiction = Some(generation),
        }
    }

    /// The backup itself says that another site owns the guest.
    pub fn taken(&mut self, generation: u64) {
        self.lease = None;
        self.fenced = Some(generation);
    }

    /// A stream to the backup was opened, which ends all that were before it. `disarmed`: as the backup has said on it.
    pub fn opened(&mut self, stream: u64, disarmed: bool) {
        self.stream = Some(stream);
        self.asked = None;
        self.ask_at = Time::ZERO;
        self.backup = if disarmed { Backup::Disarmed } else { Backup::MayBeArmed };
    }

    /// A stream ended. What the backup has said stands.
    pub fn closed(&mut self, stream: u64) {
        if self.stream == Some(stream) {
            self.stream = None;
            self.asked = None;
        }
    }

    /// The backup has stood down, durably, as request `number` on `stream` had asked it to.
    pub fn disarmed(&mut self, stream: u64, number: u64) {
        #[cfg(test)]
        if self.without == Some(Without::Number) {
            self.backup = Backup::Disarmed;
            return;
        }
        if self.stream == Some(stream) && self.asked == Some(number) {
            self.backup = Backup::Disarmed;
            self.asked = None;
        }
    }

    #[cfg(test)]
    fn is_without_narrowing(&self) -> bool {
        self.without == Some(Without::Narrowing)
    }

    #[cfg(not(test))]
    fn is_without_narrowing(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Time = Time::from_secs;

    fn holder() -> Holder {
        Holder::new(Terms::new(S(10), S(2)).unwrap(), May::Never)
    }

    #[test]
    fn a_lease_counts_from_when_it_was_asked_for() {
        let mut holder = holder();
        assert_eq!((holder.may(), holder.tick(S(100))), (May::Never, vec![Act::Renew]));
        holder.renewed(S(100), S(103));
        let May::Until(end) = holder.may() else { panic!("{:?}", holder.may()) };
        assert!(end < S(108) && end > S(107), "{end:?}");
        assert!(holder.may().at(S(107)) && !holder.may().at(S(108)));
        // An answer that comes after its time is none.
        holder.renewed(S(101), S(120));
        assert_eq!(holder.may(), May::Until(end));
    }

    #[test]
    fn a_backup_is_asked_to_stand_down_when_the_witness_is_silent_and_armed_again_after() {
        let mut holder = holder();
        holder.renewed(S(100), S(100));
        holder.opened(1, false);
        assert_eq!(holder.tick(S(101)), [Act::Renew]);
        assert_eq!(holder.tick(S(105)), [Act::Renew, Act::Disarm { number: 1 }]);
        assert!(matches!(holder.may(), May::Until(_)), "only its answer counts");
        holder.disarmed(1, 1);
        assert_eq!(holder.may(), May::Always);
        assert_eq!(holder.tick(S(200)), [Act::Renew]);
        // The link goes, too: what was promised stands.
        holder.closed(1);
        assert_eq!(holder.may(), May::Always);
        holder.renewed(S(200), S(200));
        assert_eq!(holder.may(), May::Always);
        holder.opened(2, true);
        assert_eq!(holder.tick(S(201)), [Act::Renew, Act::Arm { number: 2 }]);
        assert!(matches!(holder.may(), May::Until(_)), "narrowed before it is sent");
        // Nothing older widens it.
        holder.disarmed(1, 1);
        holder.disarmed(2, 1);
        assert!(matches!(holder.may(), May::Until(_)));
    }

    #[test]
    fn a_newer_owner_ends_it_unless_the_backup_has_stood_down() {
        let mut fenced = holder();
        fenced.renewed(S(100), S(100));
        fenced.outdated(2);
        assert_eq!((fenced.may(), fenced.fenced(), fenced.tick(S(101))), (May::Never, Some(2), vec![]));
        let mut disarmed = Holder::new(Terms::new(S(10), S(2)).unwrap(), May::Always);
        disarmed.outdated(2);
        assert_eq!((disarmed.may(), disarmed.contradiction()), (May::Always, Some(2)));
        disarmed.taken(2);
        assert_eq!(disarmed.may(), May::Never);
    }

    #[test]
    fn a_restart_goes_on_with_what_was_in_force() {
        let terms = Terms::new(S(10), S(2)).unwrap();
        assert_eq!(Holder::new(terms, May::Until(S(5))).may(), May::Until(S(5)));
        assert_eq!(Holder::new(terms, May::Always).may(), May::Always);
        let mut gone = Holder::new(terms, May::Until(S(5)));
        gone.lost();
        assert_eq!(gone.may(), May::Never);
    }
}
