//! The backup site: receiver, activation.

use std::time::Duration;

use vmdr_daemon::ownership::{Event as Owning, next};

use super::super::witness::{Answer, Ask};
use super::{Crashed, Message, Mutant, SECOND, SILENT, TICK, What, World};
use crate::standby::Act;
use crate::{Stance, Standby};

impl World {
    pub(super) fn start_receiver(&mut self) {
        let bound = Duration::from_micros(SILENT);
        let mut standby = Standby::new("b", self.b.stance, bound, true, self.local_b());
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
        with: impl FnOnce(&mut Standby, &mut dyn FnMut(Stance) -> Result<(), Crashed>) -> T,
    ) -> Option<T> {
        let (before, after) = (self.random.per_mille(10), self.random.per_mille(10));
        let (mut crashed, mut stance) = (false, self.b.stance);
        let mut keep = |to: Stance| {
            crashed = before || after;
            if !before {
                stance = to;
            }
            if crashed { Err(Crashed) } else { Ok(()) }
        };
        let standby = self.b.standby.as_mut()?;
        let came = with(standby, &mut keep);
        if self.b.stance != stance {
            self.b.stance = stance;
            self.say(|| format!("B: stance {stance:?}"));
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
        standby.heard(stream, local);
        match message {
            Message::Open { generation } => {
                if generation < stored {
                    self.send(1, stream, Message::Fenced(stored));
                } else {
                    let disarmed = standby.opened(stream, local);
                    self.b.opened.push(stream);
                    self.send(1, stream, Message::Welcome { disarmed });
                }
            }
            Message::Arm(number) => {
                self.say(|| format!("B: hears arm {number}"));
                self.keeping(|standby, keep| standby.arm(stream, keep).is_ok());
            }
            Message::Disarm(number) => {
                let done = self.keeping(|standby, keep| standby.disarm(stream, keep));
                if let Some(Ok(true)) = done {
                    self.send(1, stream, Message::Disarmed(number));
                }
            }
            Message::Beat if self.b.opened.iter().max() == Some(&stream) => self.send(1, stream, Message::Pong),
            Message::Beat => {}
            _ => return Err("a message that goes the other way".to_owned()),
        }
        Ok(())
    }

    pub(super) fn standby_tick(&mut self) -> Result<(), String> {
        let local = self.local_b();
        let act = if self.b.active.is_some() { None } else { self.b.standby.as_mut().and_then(|s| s.tick(local)) };
        self.b_acts(act)
    }

    pub(super) fn b_acts(&mut self, act: Option<Act>) -> Result<(), String> {
        match act {
            None => {}
            Some(Act::Look) => self.ask(false, Ask::Look),
            Some(Act::Claim(claim)) => self.ask(false, Ask::Claim(claim)),
            Some(Act::Activate { generation }) => {
                let state = next(self.b.own, &Owning::Activating(generation));
                self.b.own = state.ok_or_else(|| format!("no activation from {:?}", self.b.own))?;
                (self.b.stored, self.b.active) = (generation, Some(generation));
                self.say(|| format!("B: activates in generation {generation}"));
                let takes = self.random.range(50_000, SECOND);
                self.at(takes, What::Activated(generation));
            }
        }
        Ok(())
    }

    pub(super) fn b_answered(&mut self, answer: Answer) -> Result<(), String> {
        let (local, stored) = (self.local_b(), self.b.stored);
        let act = match answer {
            Answer::View(view) => {
                let act = self.keeping(|standby, keep| standby.seen(&view, stored, local, keep));
                act.and_then(Result::ok).flatten()
            }
            Answer::Granted(claim) => self.b.standby.as_mut().and_then(|standby| standby.granted(claim.generation)),
            Answer::Refused(_) => {
                self.keeping(|standby, keep| standby.refused(keep).is_ok());
                None
            }
        };
        self.b_acts(act)
    }
}
