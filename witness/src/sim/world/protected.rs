//! The protected host: agent, shim, guest.

use vmdr_daemon::ownership::{Event as Owning, Role, next};

use super::super::faults::Fault;
use super::super::witness::{Answer, Ask};
use super::{Agent, BEAT, Guest, MENDED, Message, Mutant, PAUSE_MAX, SECOND, SHIM_LOOK, TICK, What, World};
use crate::{Allowed, Claim, Holder, holder};

impl World {
    pub(super) fn start_agent(&mut self) {
        let mut holder = Holder::new(self.terms, self.a.page, self.a.confirmed);
        holder.set_automatic(self.a.automatic);
        // Streams of the process before are not this one's.
        holder.opening(self.streams);
        if let Some(Mutant::Holder(without)) = self.mutant {
            holder.without = Some(without);
        }
        if let Some((Role::Fenced, generation)) = self.a.own {
            holder.taken(generation);
        }
        let now = self.now;
        self.a.agent = Some(Agent { holder, stream: None, tried: 0, heard: now, beat: now });
        self.publish();
        self.at(TICK, What::AgentTick(self.a.process));
    }

    /// What may be done is in force before anything else is said.
    pub(super) fn publish(&mut self) {
        let Some(agent) = &self.a.agent else { return };
        let (may, fenced) = (agent.holder.may(), agent.holder.fenced());
        if self.a.page != may {
            self.a.page = may;
            self.say(|| format!("A: may run {may:?}"));
        }
        if let Some(generation) = fenced
            && let Some(state) = next(self.a.own, &Owning::Outdated(generation))
        {
            self.a.own = state;
        }
    }

    pub(super) fn agent_tick(&mut self) {
        let (now, local, generation) = (self.now, self.local_a(), self.a.own.map_or(0, |own| own.1));
        let Some(agent) = &mut self.a.agent else { return };
        // A stream that says nothing is given up, and another one is made.
        if agent.stream.is_some() && now - agent.heard > 3 * SECOND {
            if let Some(stream) = agent.stream.take() {
                agent.holder.closed(stream);
            }
            agent.tried = now;
        }
        if agent.stream.is_none() && now >= agent.tried + SECOND {
            agent.tried = now;
            self.streams += 1;
            let stream = self.streams;
            agent.holder.opening(stream);
            self.send(0, stream, Message::Open { generation });
        }
        let Some(agent) = &mut self.a.agent else { return };
        let acts = agent.holder.tick(local);
        let stream = agent.stream;
        if let Some(stream) = stream
            && now - agent.beat >= BEAT
        {
            agent.beat = now;
            self.send(0, stream, Message::Beat);
        }
        self.publish();
        if self.a.guest == Guest::Running && !self.a.page.at(local) && self.mutant != Some(Mutant::Guard) {
            // The shim should have seen that. It is killed, and the guest stopped without it.
            let takes = self.random.range(1_000, PAUSE_MAX);
            self.at(takes, What::GuestPaused(self.a.boot));
        }
        // It can die between the two.
        if self.random.per_mille(1) && self.now < MENDED {
            return self.inject(Fault::Agent { length: SECOND });
        }
        for act in acts {
            match (act, stream) {
                (holder::Act::Renew { number, over }, _) => {
                    let claim = Claim { holder: "a".to_owned(), generation, over };
                    self.ask(true, number, Ask::Claim(claim));
                }
                (holder::Act::Arm { number }, Some(stream)) => {
                    self.say(|| format!("A: arm {number}"));
                    self.send(0, stream, Message::Arm(number));
                }
                (holder::Act::Disarm { number }, Some(stream)) => {
                    self.say(|| format!("A: disarm {number}"));
                    self.send(0, stream, Message::Disarm(number));
                }
                _ => {}
            }
        }
    }

    pub(super) fn a_answered(&mut self, number: u64, answer: Answer) -> Result<(), String> {
        let local = self.local_a();
        let Some(agent) = &mut self.a.agent else { return Ok(()) };
        match answer {
            Answer::Granted => agent.holder.renewed(number, local),
            Answer::Refused(Allowed::Outdated(generation)) => agent.holder.outdated(number, generation),
            Answer::Refused(Allowed::Missing) => agent.holder.unanswered(number),
            Answer::Refused(_) => agent.holder.lost(number),
            Answer::View(_) => return Err("a view that nobody asked for".to_owned()),
        }
        self.publish();
        Ok(())
    }

    pub(super) fn a_hears(&mut self, stream: u64, message: Message) -> Result<(), String> {
        let now = self.now;
        let Some(agent) = &mut self.a.agent else { return Ok(()) };
        match message {
            Message::Welcome { disarmed } => {
                let counts = agent.holder.opened(stream, disarmed);
                if counts {
                    (agent.stream, agent.heard) = (Some(stream), now);
                    self.a.confirmed = true;
                }
            }
            Message::Armed(number) => {
                agent.holder.armed(stream, number);
                agent.heard = now;
            }
            Message::Fenced(generation) => agent.holder.taken(generation),
            Message::Disarmed(number) => {
                agent.holder.disarmed(stream, number);
                self.say(|| format!("A: hears that {number} is disarmed"));
            }
            _ if agent.stream == Some(stream) => agent.heard = now,
            _ => {}
        }
        self.publish();
        Ok(())
    }

    pub(super) fn shim_look(&mut self) {
        self.at(SHIM_LOOK, What::ShimLook(self.a.boot));
        if self.now < self.a.hung || self.mutant == Some(Mutant::Shim) && self.a.guest == Guest::Running {
            return;
        }
        let may = self.a.page.at(self.local_a());
        let owns = matches!(self.a.own, Some((Role::Owner, _)));
        match self.a.guest {
            Guest::Running if !may => {
                let takes = self.random.range(1_000, PAUSE_MAX);
                self.at(takes, What::GuestPaused(self.a.boot));
            }
            Guest::Stopped | Guest::Off if may && owns => {
                self.a.guest = Guest::Running;
                self.say(|| "A: the guest runs".to_owned());
            }
            _ => {}
        }
    }
}
