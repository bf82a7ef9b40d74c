//! The backup side: is the protected host silent, and may its guest be taken?
//!
//! What it has promised is its [`Stance`], which is durable before it is answered, and before anything is done because of it.
//! A guest is taken in these steps, each of which can be gone on with after a crash:
//!
//! ```text
//!  Disarmed <---> Armed ---- silent, and the witness shows no lease ----> Taking ---- lease and owner are ours ----> activate
//!      the host's requests     ^                                            |
//!                              +------------- another has the lease --------+
//! ```
//! While it is taking it does not stand down, whatever the host asks for.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Allowed, Claim, Time, View, allows};

/// How often the witness is looked at while the host is silent.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long an answer of the witness is waited for before it is asked again.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What the backup has promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stance {
    /// It takes nothing by itself: the host may run the guest without a lease.
    #[default]
    Disarmed,
    /// The host runs the guest by its lease alone, and it may be taken when that has ended.
    Armed,
    /// It is being taken, in this generation.
    Taking {
        /// One more than the host's.
        generation: u64,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Read what the witness has; the answer goes to [`Standby::seen`].
    Look,
    /// Claim the lease; the answer goes to [`Standby::granted`] or [`Standby::refused`]. One that does not come is asked for
    /// again by itself.
    Claim(Claim),
    /// The lease and the generation are this site's: fence the host where a command for that is configured, and activate.
    Activate {
        /// In this generation.
        generation: u64,
    },
}

/// A check that is left out, so that the simulation shows what it is for.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Without {
    /// Standing down is answered before it is durable.
    Durable,
    /// It stands down although it is taking the guest.
    Taking,
    /// It takes although it has stood down.
    Armed,
    /// Messages of streams that newer ones have ended count.
    Stream,
    /// A claim counts as granted when no answer comes.
    Granted,
}

/// The backup side of one domain.
#[derive(Clone, Debug)]
pub struct Standby {
    me: String,
    stance: Stance,
    /// Silence after which an alarm is raised, and the guest is taken where that is wished.
    bound: Duration,
    automatic: bool,
    /// The operator has asked for it to be taken.
    asked: bool,
    heard: Time,
    stream: u64,
    next: Time,
    done: bool,
    #[cfg(test)]
    pub(crate) without: Option<Without>,
}

impl Standby {
    /// `me`: the id of this site's host, as in [`Claim`]. `stance`: as it was kept. Silence counts from `now`.
    pub fn new(me: &str, stance: Stance, bound: Duration, automatic: bool, now: Time) -> Self {
        Self {
            me: me.to_owned(),
            stance,
            bound,
            automatic,
            asked: false,
            heard: now,
            stream: 0,
            next: now,
            done: false,
            #[cfg(test)]
            without: None,
        }
    }

    /// What it has promised.
    pub fn stance(&self) -> Stance {
        self.stance
    }

    /// A stream was opened, which ends those before it. Says whether it has stood down.
    pub fn opened(&mut self, stream: u64, now: Time) -> bool {
        self.stream = self.stream.max(stream);
        self.heard(stream, now);
        self.stance == Stance::Disarmed
    }

    /// Something came in on a stream. Whether that counts: only the newest one's does.
    pub fn heard(&mut self, stream: u64, now: Time) -> bool {
        let counts = stream == self.stream;
        if counts {
            self.heard = self.heard.max(now);
        }
        counts
    }

    /// It was not waited for until now: silence counts from here.
    pub fn wait_from(&mut self, now: Time) {
        self.heard = self.heard.max(now);
    }

    /// How long nothing was heard.
    pub fn silence(&self, now: Time) -> Duration {
        now.saturating_sub(self.heard)
    }

    /// Whether that is too long.
    pub fn alarm(&self, now: Time) -> bool {
        self.silence(now) > self.bound
    }

    /// The host holds its lease again. `keep` makes a stance durable.
    pub fn arm<E>(&mut self, stream: u64, keep: impl FnOnce(Stance) -> Result<(), E>) -> Result<(), E> {
        if self.is_newest(stream) && self.stance == Stance::Disarmed {
            keep(Stance::Armed)?;
            self.stance = Stance::Armed;
        }
        Ok(())
    }

    /// The host asks to stand down. Whether it has: not while the guest is being taken. `keep` makes a stance durable.
    pub fn disarm<E>(&mut self, stream: u64, keep: impl FnOnce(Stance) -> Result<(), E>) -> Result<bool, E> {
        if !self.is_newest(stream) {
            return Ok(false);
        }
        #[cfg(test)]
        match (self.without, self.stance) {
            (Some(Without::Durable), Stance::Armed) => {
                self.stance = Stance::Disarmed;
                return Ok(true);
            }
            (Some(Without::Taking), Stance::Taking { .. }) => return Ok(true),
            _ => {}
        }
        match self.stance {
            Stance::Disarmed => Ok(true),
            Stance::Armed => {
                keep(Stance::Disarmed)?;
                self.stance = Stance::Disarmed;
                Ok(true)
            }
            Stance::Taking { .. } => Ok(false),
        }
    }

    /// The operator wants the guest here, without waiting for the bound. The lease is waited for all the same.
    pub fn ask(&mut self) {
        self.asked = true;
    }

    /// What is to be done now; to be asked several times a second.
    pub fn tick(&mut self, now: Time) -> Option<Act> {
        if self.done || now < self.next {
            return None;
        }
        match self.stance {
            Stance::Taking { generation } => {
                #[cfg(test)]
                if self.without == Some(Without::Granted) && self.next > Time::ZERO {
                    self.done = true;
                    return Some(Act::Activate { generation });
                }
                self.next = now + ANSWER_LIMIT;
                Some(Act::Claim(self.claim(generation)))
            }
            _ if self.may_take(now) => {
                self.next = now + LOOK_EVERY;
                Some(Act::Look)
            }
            Stance::Armed | Stance::Disarmed => None,
        }
    }

    /// What the witness has, while the guest is `generation` here. `keep` makes a stance durable.
    pub fn seen<E>(
        &mut self,
        view: &View,
        generation: u64,
        now: Time,
        keep: impl FnOnce(Stance) -> Result<(), E>,
    ) -> Result<Option<Act>, E> {
        // It may have been heard again, or have asked to stand down, since.
        let taking = matches!(self.stance, Stance::Taking { .. });
        if taking || !self.may_take(now) {
            return Ok(None);
        }
        let claim = self.claim(generation + 1);
        if allows(view, &claim) != Allowed::Yes {
            return Ok(None);
        }
        let stance = Stance::Taking { generation: claim.generation };
        keep(stance)?;
        self.stance = stance;
        self.next = now + ANSWER_LIMIT;
        Ok(Some(Act::Claim(claim)))
    }

    /// The claim for this generation was granted.
    pub fn granted(&mut self, generation: u64) -> Option<Act> {
        if self.done || self.stance != (Stance::Taking { generation }) {
            return None;
        }
        self.done = true;
        Some(Act::Activate { generation })
    }

    /// The claim was refused: the host has its lease again. `keep` makes a stance durable.
    pub fn refused<E>(&mut self, keep: impl FnOnce(Stance) -> Result<(), E>) -> Result<(), E> {
        if !self.done && matches!(self.stance, Stance::Taking { .. }) {
            keep(Stance::Armed)?;
            self.stance = Stance::Armed;
        }
        Ok(())
    }

    fn may_take(&self, now: Time) -> bool {
        let armed = self.stance == Stance::Armed;
        #[cfg(test)]
        let armed = armed || self.without == Some(Without::Armed);
        armed && (self.asked || (self.automatic && self.alarm(now)))
    }

    fn is_newest(&self, stream: u64) -> bool {
        #[cfg(test)]
        if self.without == Some(Without::Stream) {
            return true;
        }
        stream == self.stream
    }

    fn claim(&self, generation: u64) -> Claim {
        Claim { holder: self.me.clone(), generation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Owner;

    const S: fn(u64) -> Time = Time::from_secs;

    fn keep(_: Stance) -> Result<(), ()> {
        Ok(())
    }

    fn view(lease: Option<&str>) -> View {
        View { owner: Some(Owner { generation: 1, holder: "a".to_owned() }), lease: lease.map(str::to_owned) }
    }

    fn armed() -> Standby {
        let mut standby = Standby::new("b", Stance::Disarmed, S(5), true, S(100));
        assert!(standby.opened(1, S(100)));
        standby.arm(1, keep).unwrap();
        standby
    }

    #[test]
    fn an_alarm_is_raised_by_silence_and_ends_by_itself() {
        let mut standby = armed();
        assert!(!standby.alarm(S(105)) && standby.alarm(S(106)));
        standby.heard(1, S(107));
        assert!(!standby.alarm(S(110)));
        standby.opened(2, S(111));
        standby.heard(1, S(120));
        assert!(standby.alarm(S(120)), "an older stream says nothing");
    }

    #[test]
    fn a_guest_is_taken_when_its_lease_has_ended_and_not_before() {
        let mut standby = armed();
        assert_eq!((standby.tick(S(104)), standby.tick(S(106))), (None, Some(Act::Look)));
        assert_eq!(standby.seen(&view(Some("a")), 1, S(106), keep), Ok(None));
        let claim = Claim { holder: "b".to_owned(), generation: 2 };
        assert_eq!(standby.seen(&view(None), 1, S(107), keep), Ok(Some(Act::Claim(claim.clone()))));
        assert_eq!(standby.stance(), Stance::Taking { generation: 2 });
        assert_eq!(standby.disarm(1, keep), Ok(false));
        assert_eq!((standby.tick(S(108)), standby.tick(S(113))), (None, Some(Act::Claim(claim))));
        assert_eq!(standby.granted(2), Some(Act::Activate { generation: 2 }));
        assert_eq!((standby.granted(2), standby.tick(S(200))), (None, None));
    }

    #[test]
    fn one_that_has_stood_down_takes_nothing_even_if_the_operator_asks() {
        let mut standby = armed();
        assert_eq!(standby.disarm(1, keep), Ok(true));
        standby.ask();
        assert_eq!((standby.tick(S(200)), standby.stance()), (None, Stance::Disarmed));
        assert_eq!(standby.seen(&view(None), 1, S(200), keep), Ok(None));
    }

    #[test]
    fn what_cannot_be_kept_is_not_said() {
        let mut standby = armed();
        assert_eq!(standby.disarm(1, |_| Err("disk")), Err("disk"));
        assert_eq!(standby.stance(), Stance::Armed);
        assert_eq!(standby.seen(&view(None), 1, S(200), |_| Err("disk")), Err("disk"));
        assert_eq!(standby.stance(), Stance::Armed);
    }

    #[test]
    fn a_claim_that_is_refused_leaves_it_armed() {
        let mut standby = armed();
        standby.seen(&view(None), 1, S(106), keep).unwrap();
        standby.refused(keep).unwrap();
        assert_eq!(standby.stance(), Stance::Armed);
        // After a restart it goes on with what it was about.
        let mut again = Standby::new("b", Stance::Taking { generation: 2 }, S(5), true, S(100));
        assert!(matches!(again.tick(S(100)), Some(Act::Claim(_))));
    }
}
