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
//! While it is taking it does not stand down, whatever the host asks for. A claim that is refused because somebody owns the guest
//! in a newer generation leads to Disarmed.
//!
//! A stance that could not be written may be on the disk or not. Until it was written again, nothing is promised by it and
//! nothing is taken because of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Allowed, Claim, Over, Owner, Silence, Time, View, allows};

/// How often the witness is looked at while the host is silent.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long an answer of the witness is waited for before it is asked again.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What the backup has promised.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stance {
    /// It takes nothing by itself: the host may run the guest without a lease.
    #[default]
    Disarmed,
    /// The host runs the guest by its lease alone, and it may be taken when that has ended.
    Armed {
        /// The host, and the generation in which it owns the guest.
        from: Owner,
    },
    /// It is being taken, in the generation after the host's.
    Taking {
        /// The host that it is taken from.
        from: Owner,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Read what the witness has; the answer goes to [`Standby::seen`].
    Look,
    /// Claim the lease. The answer goes to [`Standby::granted`], [`Standby::refused`] or [`Standby::unanswered`]; one that does
    /// not come is asked for again by itself. There is one at a time.
    Claim {
        /// Of this request.
        number: u64,
        /// What is claimed.
        claim: Claim,
    },
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
    /// What was not written for sure counts as it was before.
    Dirty,
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
    /// What is on the disk may be another one.
    dirty: bool,
    automatic: bool,
    /// The operator has asked for it to be taken.
    asked: bool,
    silence: Silence,
    next: Time,
    number: u64,
    /// The claim that was not answered.
    claimed: Option<u64>,
    /// Why the guest was not taken when it was last tried.
    obstacle: Option<Allowed>,
    done: bool,
    #[cfg(test)]
    pub(crate) without: Option<Without>,
}

impl Standby {
    /// `me`: the id of this site's host, as in [`Claim`]. `stance`: as it was kept. `bound`: silence after which the guest is
    /// taken, if that is `automatic`. It counts from `now`.
    pub fn new(me: &str, stance: Stance, bound: Duration, automatic: bool, now: Time) -> Self {
        Self {
            me: me.to_owned(),
            stance,
            dirty: false,
            automatic,
            asked: false,
            silence: Silence::new(bound, now),
            next: now,
            number: 0,
            claimed: None,
            obstacle: None,
            done: false,
            #[cfg(test)]
            without: None,
        }
    }

    /// What it has promised; nothing: that is not known, because it could not be written.
    pub fn stance(&self) -> Option<&Stance> {
        (!self.is_dirty()).then_some(&self.stance)
    }

    /// Why the guest was not taken when it was last tried.
    pub fn obstacle(&self) -> Option<&Allowed> {
        self.obstacle.as_ref()
    }

    /// Whether nothing was heard of the host for too long.
    pub fn is_silent(&self, now: Time) -> bool {
        self.silence.is_too_long(now)
    }

    /// A stream was opened, which ends those before it. Says whether it has stood down.
    pub fn opened(&mut self, stream: u64, now: Time) -> bool {
        self.silence.opened(stream, now);
        self.stance() == Some(&Stance::Disarmed)
    }

    /// Something came in on a stream.
    pub fn heard(&mut self, stream: u64, now: Time) {
        self.silence.heard(stream, now);
    }

    /// The host, which owns the guest in this generation, holds its lease. Whether that has armed it. `keep` makes a stance
    /// durable; after an error of its it is not known whether it has.
    pub fn arm<E>(
        &mut self,
        stream: u64,
        from: &Owner,
        keep: impl FnOnce(&Stance) -> Result<(), E>,
    ) -> Result<bool, E> {
        if !self.is_newest(stream) || matches!(self.stance, Stance::Taking { .. }) {
            return Ok(false);
        }
        self.become_stance(Stance::Armed { from: from.clone() }, keep)?;
        Ok(true)
    }

    /// The host asks to stand down. Whether it has: not while the guest is being taken. `keep`: see [`arm`](Self::arm).
    pub fn disarm<E>(&mut self, stream: u64, keep: impl FnOnce(&Stance) -> Result<(), E>) -> Result<bool, E> {
        if !self.is_newest(stream) {
            return Ok(false);
        }
        let taking = matches!(self.stance, Stance::Taking { .. });
        #[cfg(test)]
        match self.without {
            Some(Without::Durable) if !taking => {
                self.stance = Stance::Disarmed;
                return Ok(true);
            }
            Some(Without::Taking) if taking => return Ok(true),
            _ => {}
        }
        if !taking {
            self.become_stance(Stance::Disarmed, keep)?;
        }
        Ok(!taking)
    }

    /// The operator wants the guest here, without waiting for the bound. The lease is waited for all the same.
    pub fn ask(&mut self) {
        self.asked = true;
    }

    /// The guest was activated here by hand: nothing is to be taken any more.
    pub fn activated(&mut self) {
        self.done = true;
    }

    /// What is to be done now; to be asked several times a second. `keep`: see [`arm`](Self::arm).
    pub fn tick<E>(&mut self, now: Time, keep: impl FnOnce(&Stance) -> Result<(), E>) -> Result<Option<Act>, E> {
        if self.done || now < self.next {
            return Ok(None);
        }
        self.next = now + LOOK_EVERY;
        if self.dirty {
            self.become_stance(self.stance.clone(), keep)?;
        }
        match &self.stance {
            Stance::Taking { from } => {
                let from = from.clone();
                #[cfg(test)]
                if self.without == Some(Without::Granted) && self.number > 0 {
                    self.done = true;
                    return Ok(Some(Act::Activate { generation: from.generation + 1 }));
                }
                Ok(Some(self.claim(from, now)))
            }
            _ if self.may_take(now) => Ok(Some(Act::Look)),
            Stance::Armed { .. } | Stance::Disarmed => Ok(None),
        }
    }

    /// What the witness has. `keep`: see [`arm`](Self::arm).
    pub fn seen<E>(
        &mut self,
        view: &View,
        now: Time,
        keep: impl FnOnce(&Stance) -> Result<(), E>,
    ) -> Result<Option<Act>, E> {
        // It may have been heard again, or have asked to stand down, since.
        if self.done || !self.may_take(now) {
            return Ok(None);
        }
        let Some(from) = self.from() else { return Ok(None) };
        let allowed = allows(view, &self.wanted(&from));
        if allowed != Allowed::Yes {
            self.obstacle = Some(allowed);
            return Ok(None);
        }
        self.become_stance(Stance::Taking { from: from.clone() }, keep)?;
        Ok(Some(self.claim(from, now)))
    }

    /// The claim was granted. `stored`: the generation of what is stored here.
    pub fn granted(&mut self, number: u64, stored: u64) -> Option<Act> {
        if self.done || self.claimed.take_if(|claimed| *claimed == number).is_none() {
            return None;
        }
        let Some(Stance::Taking { from }) = self.stance() else { return None };
        // What is here may be of another owner since.
        if from.generation != stored {
            return None;
        }
        let generation = from.generation + 1;
        (self.done, self.obstacle) = (true, None);
        Some(Act::Activate { generation })
    }

    /// The claim was refused: the host has its lease again, the witness has forgotten, or somebody owns the guest in a newer
    /// generation; then what is here is not to be taken. `keep`: see [`arm`](Self::arm).
    pub fn refused<E>(
        &mut self,
        number: u64,
        why: Allowed,
        keep: impl FnOnce(&Stance) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.done || self.claimed.take_if(|claimed| *claimed == number).is_none() {
            return Ok(());
        }
        let Stance::Taking { from } = &self.stance else { return Ok(()) };
        let to = match why {
            Allowed::Yes => return Ok(()),
            Allowed::Held(_) | Allowed::Missing => Stance::Armed { from: from.clone() },
            Allowed::Outdated(_) => Stance::Disarmed,
        };
        self.obstacle = Some(why);
        self.become_stance(to, keep)
    }

    /// The witness could not be asked: whether it has granted the claim is not known.
    pub fn unanswered(&mut self, number: u64, now: Time) {
        if self.claimed.take_if(|claimed| *claimed == number).is_some() {
            self.next = now + LOOK_EVERY;
        }
    }

    /// Another stance, durably; where that is not known, the one before, which is to be written again.
    fn become_stance<E>(&mut self, to: Stance, keep: impl FnOnce(&Stance) -> Result<(), E>) -> Result<(), E> {
        if self.is_dirty() || self.stance != to {
            self.dirty = true;
            keep(&to)?;
            (self.dirty, self.stance) = (false, to);
        }
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        #[cfg(test)]
        if self.without == Some(Without::Dirty) {
            return false;
        }
        self.dirty
    }

    fn from(&self) -> Option<Owner> {
        match &self.stance {
            Stance::Armed { from } => Some(from.clone()),
            #[cfg(test)]
            Stance::Disarmed if self.without == Some(Without::Armed) => {
                Some(Owner { generation: 1, holder: "a".to_owned() })
            }
            Stance::Taking { .. } | Stance::Disarmed => None,
        }
    }

    fn may_take(&self, now: Time) -> bool {
        let wanted = self.asked || (self.automatic && self.silence.is_too_long(now));
        !self.is_dirty() && self.from().is_some() && wanted
    }

    fn is_newest(&self, stream: u64) -> bool {
        #[cfg(test)]
        if self.without == Some(Without::Stream) {
            return true;
        }
        self.silence.is_newest(stream)
    }

    fn wanted(&self, from: &Owner) -> Claim {
        Claim { holder: self.me.clone(), generation: from.generation + 1, over: Over::Owner(from.clone()) }
    }

    fn claim(&mut self, from: Owner, now: Time) -> Act {
        self.number += 1;
        (self.claimed, self.next) = (Some(self.number), now + ANSWER_LIMIT);
        Act::Claim { number: self.number, claim: self.wanted(&from) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Time = Time::from_secs;

    fn keep(_: &Stance) -> Result<(), ()> {
        Ok(())
    }

    fn a() -> Owner {
        Owner { generation: 1, holder: "a".to_owned() }
    }

    fn view(lease: Option<&str>) -> View {
        View { owner: Some(a()), lease: lease.map(str::to_owned) }
    }

    fn armed() -> Standby {
        let mut standby = Standby::new("b", Stance::Disarmed, S(5), true, S(100));
        assert!(standby.opened(1, S(100)));
        assert_eq!(standby.arm(1, &a(), keep), Ok(true));
        standby
    }

    fn claimed(number: u64) -> Option<Act> {
        let claim = Claim { holder: "b".to_owned(), generation: 2, over: Over::Owner(a()) };
        Some(Act::Claim { number, claim })
    }

    fn taking() -> Standby {
        let mut standby = armed();
        assert_eq!(standby.seen(&view(None), S(106), keep), Ok(claimed(1)));
        standby
    }

    #[test]
    fn a_guest_is_taken_when_its_lease_has_ended_and_not_before() {
        let mut standby = armed();
        assert_eq!((standby.tick(S(104), keep), standby.tick(S(106), keep)), (Ok(None), Ok(Some(Act::Look))));
        assert_eq!(standby.seen(&view(Some("a")), S(106), keep), Ok(None));
        assert_eq!(standby.obstacle(), Some(&Allowed::Held("a".to_owned())));
        assert_eq!(standby.seen(&view(None), S(107), keep), Ok(claimed(1)));
        assert_eq!(standby.stance(), Some(&Stance::Taking { from: a() }));
        assert_eq!(standby.disarm(1, keep), Ok(false));
        assert_eq!(standby.arm(1, &a(), keep), Ok(false));
        assert_eq!((standby.tick(S(108), keep), standby.tick(S(113), keep)), (Ok(None), Ok(claimed(2))));
        assert_eq!(standby.granted(1, 1), None, "that one is not waited for any more");
        assert_eq!(standby.granted(2, 1), Some(Act::Activate { generation: 2 }));
        assert_eq!((standby.granted(2, 1), standby.tick(S(200), keep)), (None, Ok(None)));
    }

    #[test]
    fn a_witness_that_has_forgotten_allows_nothing() {
        let mut standby = armed();
        for view in [View::default(), View { owner: Some(Owner { holder: "c".to_owned(), ..a() }), lease: None }] {
            assert_eq!(standby.seen(&view, S(107), keep), Ok(None));
            assert_eq!(standby.obstacle(), Some(&Allowed::Missing));
        }
    }

    #[test]
    fn one_that_has_stood_down_takes_nothing_even_if_the_operator_asks() {
        let mut standby = armed();
        assert_eq!(standby.disarm(1, keep), Ok(true));
        standby.ask();
        assert_eq!((standby.tick(S(200), keep), standby.stance()), (Ok(None), Some(&Stance::Disarmed)));
        assert_eq!(standby.seen(&view(None), S(200), keep), Ok(None));
    }

    #[test]
    fn what_cannot_be_kept_is_neither_promised_nor_acted_upon() {
        let mut standby = armed();
        assert_eq!(standby.disarm(1, |_| Err("disk")), Err("disk"));
        assert_eq!(standby.stance(), None);
        assert!(!standby.opened(2, S(101)));
        // It may have stood down: it takes nothing before what it is was written again.
        standby.ask();
        assert_eq!(standby.seen(&view(None), S(200), keep), Ok(None));
        assert_eq!(standby.tick(S(200), |_| Err("disk")), Err("disk"));
        let mut written = None;
        let act = standby.tick(S(201), |stance| {
            written = Some(stance.clone());
            Ok::<_, ()>(())
        });
        assert_eq!((act, written), (Ok(Some(Act::Look)), Some(Stance::Armed { from: a() })));
        // It may be armed: it has not stood down before that was written.
        let mut standby = Standby::new("b", Stance::Disarmed, S(5), true, S(100));
        standby.opened(1, S(100));
        assert_eq!(standby.arm(1, &a(), |_| Err("disk")), Err("disk"));
        assert!(!standby.opened(2, S(101)));
        assert_eq!(standby.disarm(2, |_| Err("disk")), Err("disk"));
        assert_eq!((standby.disarm(2, keep), standby.opened(3, S(102))), (Ok(true), true));
        assert_eq!(taking().seen(&view(None), S(106), |_| Err("disk")), Ok(None));
    }

    #[test]
    fn a_claim_that_is_refused_is_over() {
        let held = Allowed::Held("a".to_owned());
        for (why, to) in [
            (held, Stance::Armed { from: a() }),
            (Allowed::Missing, Stance::Armed { from: a() }),
            (Allowed::Outdated(3), Stance::Disarmed),
        ] {
            let mut standby = taking();
            standby.refused(1, why, keep).unwrap();
            assert_eq!(standby.stance(), Some(&to));
        }
        // One that was not answered is made again at once, and after a restart.
        let mut standby = taking();
        standby.unanswered(1, S(106));
        assert_eq!(standby.tick(S(107), keep), Ok(claimed(2)));
        let mut again = Standby::new("b", Stance::Taking { from: a() }, S(5), true, S(100));
        assert_eq!(again.tick(S(100), keep), Ok(claimed(1)));
        // What is stored here is of another owner by now.
        assert_eq!(again.granted(1, 2), None);
    }
}
