//! The backup site: receiver, activation.

use std::time::Duration;

use vmdr_daemon::ownership::{Event as Owning, next};

use super::super::witness::{Answer, Ask};
use super::{Crashed, Message, Mutant, SECOND, SILENT, TICK, What, World};
use crate::standby::Act;
use crate::{Owner, Stance, Standby};

impl World {
    pub(super) fn start_receiver(&mut self) {
        let bound = Duration::from_micros(SILENT);
        let mut standby = Standby::new("b", self.b.stance.clone(), bound, true, self.local_b());
        if let Some(Mutant::Standby(without)) = self.mutant {
            standby.without = Some(without);
        }
        self.b.standby = Some(standby);
        self.b.opened.clear();
        self.at(TICK, What::StandbyTick(self.b.process));
        if let Some(generation) = self.b.active.filter(|_| !self.b.runs) {
            let takes = self.random.range(100_000, SECOND);
            self.at(takes, What::Activated(generation));
        }
    }

    /// Asks the core something that has to keep its stance; it can die before and after that was written.
    pub(super) fn keeping<T>(
        &mut self,
        with: impl FnOnce(&mut Standby, &mut dyn FnMut(&Stance) -> Result<(), Crashed>) -> T,
    ) -> Option<T> {
        let (before, after) = (self.random.per_mille(10), self.random.per_mille(10));
        let (bad, written) = (self.now < self.b.sound, self.random.per_mille(500));
        let (mut crashed, mut stance) = (false, self.b.stance.clone());
        let mut keep = |to: &Stance| {
            crashed = !bad && (before || after);
            if if bad { written } else { !before } {
                stance = to.clone();
            }
            if bad || crashed { Err(Crashed) } else { Ok(()) }
        };
        let standby = self.b.standby.as_mut()?;
        let came = with(standby, &mut keep);
        if self.b.stance != stance {
            self.say(|| format!("B: stance {stance:?}"));
            self.b.stance = stance;
        }
        if crashed {
            self.say(|| "B: dies while it writes its stance".to_owned());
            self.crash_receiver(SECOND);
            return None;
        }
        Some(came)
    }

    pub(super) fn b_hears(&mut self, stream: u64, message: Message) -> Result<(), String> {
        let (local, stored) = (self.local_b(), self.b.stored);
        let Some(standby) = &mut self.b.standby else { return Ok(()) };
        // A connection does not outlive the process at its other end.
        if !matches!(message, Message::Open { .. }) && !self.b.opened.contains(&stream) {
            return Ok(());
        }
        // What comes on a stream of before an activation is answered with who owns the guest, as an epoch of an older generation is.
        if self.b.active.is_some() && !matches!(message, Message::Open { .. }) {
            self.send(1, stream, Message::Fenced(stored));
            return Ok(());
        }
        // It numbers them as they arrive.
        let order = self.b.opened.iter().position(|opened| *opened == stream).map_or(0, |at| at as u64 + 1);
        standby.heard(order, local);
        match message {
            Message::Open { generation } => {
                if generation < stored {
                    self.send(1, stream, Message::Fenced(stored));
                } else {
                    self.b.opened.push(stream);
                    let disarmed = standby.opened(self.b.opened.len() as u64, local);
                    self.send(1, stream, Message::Welcome { disarmed });
                }
            }
            Message::Arm(number) => {
                self.say(|| format!("B: hears arm {number}"));
                let from = Owner { generation: stored, holder: "a".to_owned() };
                if let Some(Ok(true)) = self.keeping(|standby, keep| standby.arm(order, &from, keep)) {
                    self.send(1, stream, Message::Armed(number));
                }
            }
            Message::Disarm(number) => {
                let done = self.keeping(|standby, keep| standby.disarm(order, keep));
                if let Some(Ok(true)) = done {
                    self.send(1, stream, Message::Disarmed(number));
                }
            }
            Message::Beat if self.b.opened.last() == Some(&stream) => self.send(1, stream, Message::Pong),
            Message::Beat => {}
            _ => return Err("a message that goes the other way".to_owned()),
        }
        Ok(())
    }

    pub(super) fn standby_tick(&mut self) -> Result<(), String> {
        let local = self.local_b();
        if self.b.active.is_some() {
            return Ok(());
        }
        let act = self.keeping(|standby, keep| standby.tick(local, keep));
        self.b_acts(act.and_then(Result::ok).flatten())
    }

    pub(super) fn b_acts(&mut self, act: Option<Act>) -> Result<(), String> {
        match act {
            None => {}
            Some(Act::Look) => self.ask(false, 0, Ask::Look),
            Some(Act::Claim { number, claim }) => self.ask(false, number, Ask::Claim(claim)),
            Some(Act::Activate { generation }) => self.activate(generation)?,
        }
        Ok(())
    }

    fn activate(&mut self, generation: u64) -> Result<(), String> {
        let state = next(self.b.own, &Owning::Activating(generation));
        self.b.own = state.ok_or_else(|| format!("no activation from {:?}", self.b.own))?;
        (self.b.stored, self.b.active) = (generation, Some(generation));
        self.say(|| format!("B: activates in generation {generation}"));
        let takes = self.random.range(50_000, SECOND);
        self.at(takes, What::Activated(generation));
        Ok(())
    }

    /// The witness is not asked: it may be what was lost.
    pub(super) fn activate_by_hand(&mut self) {
        self.say(|| "B: by hand".to_owned());
        if let Some(standby) = &mut self.b.standby
            && self.b.active.is_none()
        {
            standby.activated();
            let generation = self.b.stored + 1;
            // From nothing, or from what was activated before: it is always possible.
            let _ = self.activate(generation);
        }
    }

    pub(super) fn b_answered(&mut self, number: u64, answer: Answer) -> Result<(), String> {
        if self.b.active.is_some() {
            return Ok(());
        }
        let (local, stored) = (self.local_b(), self.b.stored);
        let act = match answer {
            Answer::View(view) => {
                let act = self.keeping(|standby, keep| standby.seen(&view, local, keep));
                act.and_then(Result::ok).flatten()
            }
            Answer::Granted => self.b.standby.as_mut().and_then(|standby| standby.granted(number, stored)),
            Answer::Refused(why) => {
                self.keeping(|standby, keep| standby.refused(number, why, keep).is_ok());
                None
            }
        };
        self.b_acts(act)
    }
}
