//! What runs in a guest all the time: it keeps the clock with the host's, and brings file systems to rest when asked to.
//!
//! The guest's time stands still in every pause that protection makes, some per cent of all time: more than NTP can follow. An
//! agent on the host tells the time over a virtio-serial port ([`vmdr_guest_channel`]); the clock is run faster by as much as
//! it loses, and stepped forward where that is not enough ([`steer`]). When nobody tells the time any more, the clock is left
//! to itself at its own rate.
//!
//! A freeze is the work of a process of its own ([`freezer`], [`crate::freeze`]); meanwhile nothing is written here but to the
//! port. Another network is the work of a thread ([`networker`], [`crate::network`]); meanwhile nothing is frozen.

mod freezer;
mod kernel;
mod networker;
mod port;
mod steer;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmdr_guest_channel::{Frame, Hello, Message, Outcome, features};

use self::freezer::Freezer;
use self::networker::Networker;
use self::port::Port;
use self::steer::{Do, Steer};
use crate::cli::Daemon;
use crate::network::Places;

/// How often the host is asked for the time: the clock is off by up to this much of what pauses take.
const ASK: Duration = Duration::from_millis(250);
/// How often the host is greeted until it answers.
const GREET: Duration = Duration::from_secs(1);
/// After this long without an answer nobody is there.
const SILENCE: Duration = Duration::from_secs(5);
/// An answer that took longer than this says too little, unless the clock is off by more than it took...
const ROUND_TRIP_MAX: Duration = Duration::from_millis(20);
/// ...unless this many in a row did.
const SLOW_MAX: u32 = 4;

/// How often a host that hangs up is noticed while something is frozen.
const HANG_UP_LOOK: Duration = Duration::from_millis(20);

/// A question on its way.
struct Asked {
    number: u32,
    at: Instant,
    guest_unix_ns: u64,
}

struct State {
    steer: Steer,
    greeted: bool,
    tells_time: bool,
    heard: Instant,
    next: Instant,
    number: u32,
    asked: Option<Asked>,
    slow: u32,
    offset_ns: i64,
    freezer: Freezer,
    /// Nothing, where the host may not change the network.
    networker: Option<Networker>,
    started: Instant,
    not_ready: PathBuf,
    /// What there is to log: nothing is written while file systems are frozen.
    log: Vec<String>,
}

/// Lines that wait to be logged, at most.
const LOG_MAX: usize = 16;

/// Runs until the process is ended.
pub fn run(options: &Daemon) -> Result<()> {
    crate::freeze::thaw_what_was_left();
    let mut port = Port::wait(options.port.as_deref())?;
    // A predecessor may have been killed with the clock running fast.
    kernel::set_rate(0.0).context("set the clock's rate (root is needed)")?;
    let now = Instant::now();
    let mut state = State {
        steer: Steer::default(),
        greeted: false,
        tells_time: false,
        heard: now,
        next: now,
        number: 0,
        asked: None,
        slow: 0,
        offset_ns: 0,
        freezer: Freezer::new(options.clone()),
        networker: (!options.keep_network)
            .then(|| Networker::new(Places { root: "/".into(), state: options.state.clone() })),
        started: now,
        not_ready: options.not_ready.clone(),
        log: Vec::new(),
    };
    loop {
        if Instant::now() >= state.next {
            state.speak(&mut port)?;
        }
        let wait = state.next.saturating_duration_since(Instant::now());
        let (frames, ready) = port.receive(wait, state.freezer.output())?;
        for frame in frames {
            state.hear(&mut port, frame)?;
        }
        if ready.hung_up && state.freezer.is_active() {
            state.freezer.abandoned();
            // That it hangs up is told again and again until its process has ended.
            std::thread::sleep(HANG_UP_LOOK);
        }
        if ready.also {
            for frame in state.freezer.hear() {
                port.send(&frame)?;
            }
        }
        if let Some(networker) = &mut state.networker {
            for line in networker.look() {
                state.say(line);
            }
        }
        state.write_log();
    }
}

impl State {
    fn say(&mut self, line: String) {
        if self.log.len() < LOG_MAX {
            self.log.push(line);
        }
    }

    fn write_log(&mut self) {
        if self.freezer.is_active() {
            return;
        }
        for line in self.log.drain(..).chain(self.freezer.take_log()) {
            println!("{line}");
        }
    }

    fn speak(&mut self, port: &mut Port) -> Result<()> {
        if self.greeted && self.heard.elapsed() > SILENCE {
            self.say("clock: the host is silent, the clock runs at its own rate".to_owned());
            self.greeted = false;
            self.let_go()?;
        }
        self.number = self.number.wrapping_add(1);
        if !self.greeted {
            self.next = Instant::now() + GREET;
            return port.send(&Frame { number: self.number, message: Message::Hello(self.own(true)) });
        }
        self.next = Instant::now() + ASK;
        if !self.tells_time {
            // Once more from the beginning, now and then: it may have changed its mind.
            self.next = Instant::now() + GREET;
            return port.send(&Frame { number: self.number, message: Message::Hello(self.own(true)) });
        }
        let guest_unix_ns = kernel::now_unix_ns();
        self.asked = Some(Asked { number: self.number, at: Instant::now(), guest_unix_ns });
        let rate_ppm = (self.steer.rate() * 1e6) as i32;
        let message = Message::ClockAsk { guest_unix_ns, offset_ns: self.offset_ns, rate_ppm };
        port.send(&Frame { number: self.number, message })
    }

    fn hear(&mut self, port: &mut Port, frame: Frame) -> Result<()> {
        match frame.message {
            Message::Hello(hello) => {
                if hello.answer {
                    port.send(&Frame { number: frame.number, message: Message::Hello(self.own(false)) })?;
                }
                if hello.common_version().is_none() {
                    return Ok(());
                }
                self.heard = Instant::now();
                let tells_time = hello.features & features::CLOCK != 0;
                if !self.greeted || self.tells_time != tells_time {
                    self.say(format!(
                        "clock: the host {} the time",
                        if tells_time { "tells" } else { "does not tell" }
                    ));
                    self.next = Instant::now();
                }
                if self.tells_time && !tells_time {
                    self.let_go()?;
                }
                self.greeted = true;
                self.tells_time = tells_time;
            }
            Message::ClockIs { host_unix_ns } => {
                self.heard = Instant::now();
                if let Some(asked) = self.asked.take_if(|asked| asked.number == frame.number) {
                    self.told(&asked, host_unix_ns)?;
                }
            }
            Message::HeartbeatAsk => {
                let up_seconds = u32::try_from(self.started.elapsed().as_secs()).unwrap_or(u32::MAX);
                let message = Message::Heartbeat { up_seconds, ready: !self.not_ready.exists() };
                port.send(&Frame { number: frame.number, message })?;
            }
            Message::NetworkPut { .. } | Message::NetworkAsk { .. } => {
                let frozen = self.freezer.is_active();
                let message = match &mut self.networker {
                    Some(networker) => networker.hear(&frame.message, frozen),
                    None => Message::Unsupported(frame.message.kind()),
                };
                port.send(&Frame { number: frame.number, message })?;
            }
            Message::Freeze { .. } if self.networker.as_ref().is_some_and(Networker::is_active) => {
                let message = Message::Frozen {
                    outcome: Outcome::Busy,
                    file_systems: 0,
                    skipped: 0,
                    hold_ms: 0,
                    text: "the network is being changed".to_owned(),
                };
                port.send(&Frame { number: frame.number, message })?;
            }
            Message::Freeze { hold_ms } => {
                if let Some(message) = self.freezer.freeze(frame.number, hold_ms) {
                    port.send(&Frame { number: frame.number, message })?;
                }
            }
            Message::Thaw { freeze } => {
                if let Some(message) = self.freezer.thaw(frame.number, freeze) {
                    port.send(&Frame { number: frame.number, message })?;
                }
            }
            Message::Unsupported(_) => {}
            Message::ClockAsk { .. }
            | Message::Frozen { .. }
            | Message::Thawed { .. }
            | Message::Heartbeat { .. }
            | Message::NetworkIs { .. }
            | Message::Unknown(_) => {
                let message = Message::Unsupported(frame.message.kind());
                port.send(&Frame { number: frame.number, message })?;
            }
        }
        Ok(())
    }

    /// The answer to a question: how far is the clock off, and what to do about it?
    fn told(&mut self, asked: &Asked, host_unix_ns: u64) -> Result<()> {
        let round_trip = asked.at.elapsed();
        // The host looked at its clock somewhere between question and answer: half-way, as far as anybody knows. What
        // a pause took before it looked counts; what one takes after it is found next time.
        let guest = i128::from(asked.guest_unix_ns) + (round_trip.as_nanos() / 2) as i128;
        let offset = i128::from(host_unix_ns) - guest;
        let slow = round_trip > ROUND_TRIP_MAX;
        self.slow = if slow { self.slow + 1 } else { 0 };
        // After a long pause even a slow answer says enough.
        let certain = offset.unsigned_abs() > round_trip.as_nanos() / 2;
        if slow && !certain && self.slow < SLOW_MAX {
            return Ok(());
        }
        self.offset_ns = i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX });
        match self.steer.observe(self.offset_ns as f64 / 1e9, Instant::now()) {
            Do::Rate => {}
            Do::Step => {
                if self.offset_ns.unsigned_abs() > 1_000_000_000 {
                    self.say(format!("clock: stepped by {:.3} s", self.offset_ns as f64 / 1e9));
                }
                kernel::step(self.offset_ns).context("step the clock (root is needed)")?;
            }
        }
        kernel::set_rate(self.steer.rate()).context("set the clock's rate (root is needed)")
    }

    fn let_go(&mut self) -> Result<()> {
        self.steer = Steer::default();
        self.asked = None;
        kernel::set_rate(0.0).context("set the clock's rate (root is needed)")
    }

    fn own(&self, answer: bool) -> Hello {
        let network = if self.networker.is_some() { features::NETWORK } else { 0 };
        let all = features::CLOCK | features::FREEZE | features::HEARTBEAT | network;
        Hello::own(all, answer, concat!("vmdr-guest-tools ", env!("CARGO_PKG_VERSION")))
    }
}
