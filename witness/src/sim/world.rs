//! The world: what there is, what happens when, and what must never be.

mod backup;
mod protected;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use vmdr_daemon::ownership::{Event as Owning, Role, next};

use super::Random;
use super::faults::Fault;
use super::witness::{Answer, Ask, Witness};
use crate::{Holder, May, Stance, Standby, Terms, Time, holder, standby};

/// All in microseconds of real time.
const SECOND: u64 = 1_000_000;
const SHIM_LOOK: u64 = 50_000;
const PAUSE_MAX: u64 = 300_000;
const TICK: u64 = 200_000;
const BEAT: u64 = SECOND;
const RPC_LIMIT: u64 = 2 * SECOND;
const SILENT: u64 = 3 * SECOND;
/// No more faults from here on, and everything is mended.
const MENDED: u64 = 90 * SECOND;
const END: u64 = MENDED + 60 * SECOND;

/// One fencing check, left out. The simulation has to notice each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    Holder(holder::Without),
    Standby(standby::Without),
    /// The witness grants a lease that another holds.
    WitnessLease,
    /// The witness grants a lease to an older generation.
    WitnessGeneration,
    /// A witness that has lost everything grants any claim.
    WitnessEmpty,
    /// The shim does not look at the deadline.
    Shim,
    /// The agent does not look whether the shim does.
    Guard,
    /// A host that was started anew runs its guest before it has asked.
    Boot,
}

#[derive(Clone, Debug)]
enum Message {
    Open { generation: u64 },
    Beat,
    Arm(u64),
    Disarm(u64),
    Welcome { disarmed: bool },
    Fenced(u64),
    Armed(u64),
    Disarmed(u64),
    Pong,
}

#[derive(Clone, Debug)]
enum What {
    AgentTick(u64),
    ShimLook(u64),
    GuestPaused(u64),
    StandbyTick(u64),
    /// Stream, the process that is meant, message.
    ToB(u64, u64, Message),
    ToA(u64, u64, Message),
    Asked {
        by_a: bool,
        process: u64,
        number: u64,
        wiped: u32,
        ask: Ask,
    },
    Answered {
        by_a: bool,
        process: u64,
        number: u64,
        answer: Answer,
    },
    /// No answer has come in time, as whoever asked sees it.
    Late {
        by_a: bool,
        process: u64,
        number: u64,
    },
    Activated(u64),
    Fault,
    Mend(Fault),
}

struct Event {
    at: u64,
    order: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

#[derive(Clone, Copy)]
struct Clock {
    ppm: i64,
    offset: u64,
}

impl Clock {
    fn at(self, real: u64) -> Time {
        let drift = real as i64 / 1000 * self.ppm / 1000;
        Duration::from_micros((real as i64 + drift) as u64 + self.offset)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Off,
    Running,
    Stopped,
}

struct Agent {
    holder: Holder,
    stream: Option<u64>,
    tried: u64,
    heard: u64,
    beat: u64,
}

/// The protected host.
struct A {
    clock: Clock,
    up: bool,
    boot: u64,
    thaws: u64,
    process: u64,
    agent: Option<Agent>,
    automatic: bool,
    confirmed: bool,
    /// The shim looks again from here on.
    hung: u64,
    /// When neither shim nor agent looked last.
    unguarded: u64,
    page: May,
    guest: Guest,
    own: Option<(Role, u64)>,
}

/// The backup site.
struct B {
    clock: Clock,
    process: u64,
    standby: Option<Standby>,
    /// Streams that were opened to this process.
    opened: Vec<u64>,
    stance: Stance,
    /// Its disk is sound again from here on.
    sound: u64,
    stored: u64,
    own: Option<(Role, u64)>,
    active: Option<u64>,
    runs: bool,
}

struct Crashed;

pub(crate) struct World {
    random: Random,
    now: u64,
    order: u64,
    events: BinaryHeap<Reverse<Event>>,
    terms: Terms,
    witness: Witness,
    a: A,
    b: B,
    streams: u64,
    /// When the last message of a stream, one way, arrives: those of other streams can overtake it.
    fifo: BTreeMap<(usize, u64), u64>,
    /// Cut until: A to B, B to A, A and witness, B and witness.
    cut: [u64; 4],
    slow: u64,
    faults: bool,
    mutant: Option<Mutant>,
    pub(crate) trace: Vec<String>,
    tracing: bool,
    /// How long A's guest stood still although its host was up, and how often B has taken it.
    pub(crate) stopped_us: u64,
    pub(crate) taken: u32,
    /// The witness has lost all that it had, once.
    wiped: bool,
    pub(crate) running_since_b: Option<u64>,
}

impl World {
    pub(crate) fn new(seed: u64, mutant: Option<Mutant>, tracing: bool) -> Self {
        let mut random = Random::new(seed);
        // The agent looks, too, in case that the shim hangs.
        let margin = Duration::from_micros(TICK + PAUSE_MAX + 50_000);
        let terms = Terms::new(Duration::from_secs(6), margin).unwrap();
        // Extremes are worth more than what lies between.
        let mut clock = || {
            let ppm = [-500, 500, 0, random.range(0, 1000) as i64 - 500][random.range(0, 3) as usize];
            Clock { ppm, offset: random.range(0, 1 << 40) }
        };
        let (clock_a, clock_b, clock_w) = (clock(), clock(), clock());
        let mut witness = Witness::new(terms, clock_w.ppm);
        let is = |of: Mutant| mutant == Some(of);
        witness.without = (is(Mutant::WitnessLease), is(Mutant::WitnessGeneration), is(Mutant::WitnessEmpty));
        let mut world = Self {
            random,
            now: 0,
            order: 0,
            events: BinaryHeap::new(),
            terms,
            witness,
            a: A {
                clock: clock_a,
                up: true,
                boot: 0,
                thaws: 0,
                process: 0,
                agent: None,
                automatic: true,
                confirmed: false,
                hung: 0,
                unguarded: 0,
                page: May::Never,
                guest: Guest::Off,
                own: next(None, &Owning::Protected(1)).unwrap(),
            },
            b: B {
                clock: clock_b,
                process: 0,
                standby: None,
                opened: Vec::new(),
                stance: Stance::Disarmed,
                sound: 0,
                stored: 1,
                own: None,
                active: None,
                runs: false,
            },
            streams: 0,
            fifo: BTreeMap::new(),
            cut: [0; 4],
            slow: 0,
            faults: true,
            mutant,
            trace: Vec::new(),
            tracing,
            stopped_us: 0,
            taken: 0,
            wiped: false,
            running_since_b: None,
        };
        world.start_agent();
        world.start_receiver();
        world.at(SHIM_LOOK, What::ShimLook(0));
        world
    }

    /// Without faults of its own: only those that are [`inject`](Self::inject)ed.
    pub(crate) fn quiet(mut self) -> Self {
        self.faults = false;
        self
    }

    pub(crate) fn a_runs(&self) -> bool {
        self.a.up && self.a.guest == Guest::Running && self.now >= self.a.thaws
    }

    pub(crate) fn b_runs(&self) -> bool {
        self.b.runs
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.now / 1000
    }

    /// Runs to the end; an error is what must never be.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        if self.faults {
            let first = self.random.range(1, 8 * SECOND);
            self.at(first, What::Fault);
        }
        self.run_until(END / 1000)?;
        let fenced = !self.a_runs() && matches!(self.a.own, Some((Role::Fenced, _)));
        if self.wiped && fenced && self.b.active.is_none() {
            // The witness has lost everything while the guest was being taken, and grants nothing now: the alarm stands, and the operator
            // activates it.
            self.activate_by_hand();
            self.run_until(END / 1000 + 30_000)?;
        }
        self.is_well()
    }

    /// Up to this moment, in milliseconds.
    pub(crate) fn run_until(&mut self, ms: u64) -> Result<(), String> {
        while self.events.peek().is_some_and(|event| event.0.at <= ms * 1000) {
            let Some(Reverse(event)) = self.events.pop() else { break };
            let before = self.now;
            self.now = event.at;
            if self.a.up && self.a.guest == Guest::Stopped {
                self.stopped_us += self.now - before;
            }
            self.happen(event.what)?;
            if self.a.up && self.now < self.a.hung && self.a.agent.is_none() {
                self.a.unguarded = self.now;
            }
            // One that was frozen whole and goes on, or of which neither shim nor agent looked: until the guest was stopped
            // (docs/failover.md).
            let looks = if self.now < self.a.hung + SHIM_LOOK + PAUSE_MAX { TICK } else { SHIM_LOOK };
            let thawing = self.now <= self.a.thaws + looks + PAUSE_MAX
                || (self.a.unguarded > 0 && self.now <= self.a.unguarded + SHIM_LOOK + TICK + PAUSE_MAX);
            if self.a_runs() && self.b_runs() && !thawing {
                return Err(format!("at {} ms both sites run the guest", self.now_ms()));
            }
        }
        self.now = ms * 1000;
        Ok(())
    }

    /// At the end, a while after everything was mended: it runs at one site, and both know at which.
    fn is_well(&self) -> Result<(), String> {
        let a_owns = matches!(self.a.own, Some((Role::Owner, _)));
        match (self.a_runs(), self.b_runs()) {
            (true, false) if a_owns && self.b.active.is_none() => Ok(()),
            (false, true) if !a_owns && matches!(self.b.own, Some((Role::Owner, 2..))) => Ok(()),
            (a, b) => Err(format!(
                "in the end it runs at A: {a}, at B: {b}; A's record {:?}, permission {:?}, B's record {:?}, stance {:?}",
                self.a.own, self.a.page, self.b.own, self.b.stance
            )),
        }
    }

    fn at(&mut self, after: u64, what: What) {
        self.order += 1;
        self.events.push(Reverse(Event { at: self.now + after, order: self.order, what }));
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        if self.tracing {
            let line = format!("{:>9.3} s  {}", self.now as f64 / 1e6, text());
            self.trace.push(line);
        }
    }

    fn happen(&mut self, what: What) -> Result<(), String> {
        // A host that is frozen does everything later.
        let of_a = matches!(what, What::AgentTick(_) | What::ShimLook(_) | What::GuestPaused(_) | What::ToA(..))
            || matches!(what, What::Answered { by_a: true, .. } | What::Late { by_a: true, .. });
        if of_a && self.now < self.a.thaws {
            let wait = self.a.thaws - self.now + self.random.range(0, SHIM_LOOK);
            self.at(wait, what);
            return Ok(());
        }
        match what {
            What::AgentTick(process) if process == self.a.process => {
                self.agent_tick();
                self.at(TICK, What::AgentTick(process));
            }
            What::ShimLook(boot) if boot == self.a.boot => self.shim_look(),
            What::GuestPaused(boot) if boot == self.a.boot && !self.a.page.at(self.local_a()) => {
                self.a.guest = Guest::Stopped;
                self.say(|| "A: the guest stands still".to_owned());
            }
            What::StandbyTick(process) if process == self.b.process => {
                self.standby_tick()?;
                self.at(TICK, What::StandbyTick(process));
            }
            What::ToB(stream, process, message) if process == self.b.process => self.b_hears(stream, message)?,
            What::ToA(stream, process, message) if process == self.a.process => self.a_hears(stream, message)?,
            What::Asked { by_a, process, number, wiped, ask } if self.witness.up && wiped == self.witness.wiped => {
                let answer = self.witness.answer(ask, self.now);
                if let Some(delay) = self.travel(by_a) {
                    self.at(delay, What::Answered { by_a, process, number, answer });
                }
            }
            What::Answered { by_a: true, process, number, answer } if process == self.a.process => {
                self.a_answered(number, answer)?;
            }
            What::Answered { by_a: false, process, number, answer } if process == self.b.process => {
                self.b_answered(number, answer)?;
            }
            What::Late { by_a: true, process, number } if process == self.a.process => {
                if let Some(agent) = &mut self.a.agent {
                    agent.holder.unanswered(number);
                }
            }
            What::Late { by_a: false, process, number } if process == self.b.process => {
                let local = self.local_b();
                if let Some(standby) = &mut self.b.standby {
                    standby.unanswered(number, local);
                }
            }
            What::Activated(generation) if self.b.active == Some(generation) && !self.b.runs => {
                self.b.runs = true;
                self.taken += 1;
                self.running_since_b = Some(self.now);
                self.say(|| "B: the guest runs".to_owned());
            }
            What::Fault if self.now < MENDED => {
                let fault = self.draw_fault();
                self.inject(fault);
                let next = self.random.spread_ms(300, 12_000);
                self.at(next, What::Fault);
            }
            What::Mend(fault) => self.mend(fault),
            _ => {}
        }
        Ok(())
    }

    // The faults.

    /// Where a check is left out, what that is for happens more often: so that it is found soon.
    fn draw_fault(&mut self) -> Fault {
        let length = self.random.spread_ms(100, 25_000);
        let often = match self.mutant {
            Some(Mutant::Standby(standby::Without::Dirty)) => Some(Fault::Disk { length }),
            Some(Mutant::WitnessEmpty) => Some(Fault::Wipe),
            Some(Mutant::Guard) => Some(Fault::Shim { length }),
            Some(Mutant::Holder(holder::Without::Confirmed)) if self.a.up => Some(Fault::Host { length }),
            Some(Mutant::Holder(holder::Without::Confirmed)) => Some(Fault::ByHand),
            Some(Mutant::Holder(holder::Without::Opening)) => Some(Fault::Slow { length }),
            _ => None,
        };
        match often {
            Some(fault) if self.random.per_mille(400) => fault,
            _ => Fault::draw(&mut self.random),
        }
    }

    pub(crate) fn inject(&mut self, fault: Fault) {
        self.say(|| format!("fault: {fault:?}"));
        let until = |now: u64, length: u64| (now + length).min(MENDED);
        match fault {
            Fault::Cut { way, length } => self.cut[way] = self.cut[way].max(until(self.now, length)),
            Fault::Slow { length } => self.slow = until(self.now, length),
            Fault::Witness { length } if self.witness.up => {
                self.witness.up = false;
                self.at(until(self.now, length).saturating_sub(self.now), What::Mend(fault));
            }
            Fault::Freeze { length } if self.a.up => self.a.thaws = self.a.thaws.max(until(self.now, length)),
            Fault::Agent { length } if self.a.up => {
                self.a.agent = None;
                self.a.process += 1;
                self.at(until(self.now, length).saturating_sub(self.now), What::Mend(fault));
            }
            Fault::Host { length } if self.a.up => {
                self.a.up = false;
                self.a.boot += 1;
                self.a.process += 1;
                (self.a.agent, self.a.guest, self.a.thaws) = (None, Guest::Off, 0);
                (self.a.hung, self.a.unguarded) = (0, 0);
                self.at(until(self.now, length).saturating_sub(self.now), What::Mend(fault));
            }
            Fault::Receiver { length } => self.crash_receiver(until(self.now, length).saturating_sub(self.now)),
            Fault::Wipe if self.witness.up => {
                self.witness.wipe();
                self.wiped = true;
            }
            Fault::Shim { length } if self.a.up => self.a.hung = until(self.now, length),
            Fault::Disk { length } => self.b.sound = until(self.now, length),
            Fault::Operator => {
                if let Some(standby) = &mut self.b.standby {
                    standby.ask();
                }
            }
            Fault::ByHand if !self.a.up && self.b.active.is_none() => self.activate_by_hand(),
            Fault::Automatic(automatic) => {
                self.a.automatic = automatic;
                if let Some(agent) = &mut self.a.agent {
                    agent.holder.set_automatic(automatic);
                }
            }
            _ => {}
        }
    }

    fn mend(&mut self, fault: Fault) {
        self.say(|| format!("mended: {fault:?}"));
        match fault {
            Fault::Witness { .. } => self.witness.restart(self.now),
            Fault::Agent { .. } if self.a.up && self.a.agent.is_none() => self.start_agent(),
            Fault::Host { .. } if !self.a.up => {
                self.a.up = true;
                let boots = self.mutant == Some(Mutant::Boot);
                self.a.page = if boots { May::Always } else { May::Never };
                self.a.confirmed = false;
                self.at(SHIM_LOOK, What::ShimLook(self.a.boot));
                // Whatever starts guests at boot does not wait for it.
                let later = self.random.spread_ms(1, 5_000);
                self.at(later, What::Mend(Fault::Agent { length: later }));
            }
            Fault::Receiver { .. } if self.b.standby.is_none() => self.start_receiver(),
            _ => {}
        }
    }

    fn crash_receiver(&mut self, length: u64) {
        self.b.standby = None;
        self.b.process += 1;
        self.at(length, What::Mend(Fault::Receiver { length }));
    }

    // The network.

    /// The way from A (0) or B (1) to the other; what is under way waits out a cut, as TCP does, and keeps its order.
    fn send(&mut self, from: usize, stream: u64, message: Message) {
        let mut delay = self.random.range(500, 30_000);
        if self.now < self.slow {
            delay += self.random.spread_ms(100, 4_000);
        }
        if self.now < self.cut[from] {
            delay += self.cut[from] - self.now + self.random.spread_ms(10, 2_000);
        }
        let last = self.fifo.entry((from, stream)).or_default();
        let at = (self.now + delay).max(*last + 1);
        *last = at;
        let what = match from {
            0 => What::ToB(stream, self.b.process, message),
            _ => What::ToA(stream, self.a.process, message),
        };
        self.at(at - self.now, what);
    }

    /// How long a request to the witness, or its answer, takes; nothing: it is lost.
    fn travel(&mut self, by_a: bool) -> Option<u64> {
        let way = if by_a { 2 } else { 3 };
        if self.now < self.cut[way] {
            // Some are only late.
            let late = self.cut[way] - self.now + 1000;
            return self.random.per_mille(300).then_some(late);
        }
        let late = self.now < self.slow || self.random.per_mille(50);
        Some(if late { self.random.spread_ms(100, 3_500) } else { self.random.range(500, 20_000) })
    }

    fn ask(&mut self, by_a: bool, number: u64, ask: Ask) {
        let process = if by_a { self.a.process } else { self.b.process };
        if let Some(delay) = self.travel(by_a) {
            let wiped = self.witness.wiped;
            self.at(delay, What::Asked { by_a, process, number, wiped, ask });
        }
        self.at(RPC_LIMIT, What::Late { by_a, process, number });
    }

    fn local_a(&self) -> Time {
        self.a.clock.at(self.now)
    }

    fn local_b(&self) -> Time {
        self.b.clock.at(self.now)
    }
}
