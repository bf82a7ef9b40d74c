//! Holds the host to a limit: what protection may take of link, processors and memory, and who is paused when.
//!
//! | limit | of a guest | of the host | how it is kept |
//! | --- | --- | --- | --- |
//! | bandwidth | yes | yes | where bytes leave for the receiver ([`wire`]); with a schedule ([`schedule`]) |
//! | processor | its shim, and the thread that encodes for it | the agent, all shims | what a step has taken is paid by waiting before the next one ([`Guest::rest`]) |
//! | memory | size of its arena | sum of the arenas | at `protect`, which is refused beyond it ([`Host::admit`]) |
//! | pauses at once | - | yes | [`slots`] |
//!
//! Beyond a limit protection falls behind: cuts become fewer, epochs larger, the recovery point older, and `status` says which
//! limit it is ([`Guest::limited_by`]). The guest does not wait for anything of this. Limits can be changed while the agent
//! runs (SIGHUP).

mod bucket;
pub mod config;
mod local_time;
mod meter;
pub mod schedule;
pub mod slots;
pub mod wire;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::bucket::Bucket;
use self::config::{Caps, Limits};
use self::local_time::LocalTime;
use self::meter::{Meter, Strain};
use self::schedule::{Rate, Schedule};
use self::slots::{Seat, Slots};

/// Bytes that are sent at once when the link has been idle: what comes in this time...
const SEND_BURST_SECONDS: f64 = 0.1;
/// ...and a frame of HTTP/2 at least.
const SEND_BURST_MIN: f64 = 16_384.0;
/// What is sent in one turn, where guests share a link: a frame, or what comes in this time.
const SEND_TURN_SECONDS: f64 = 0.02;
/// What can be waited for at most: with 16 KiB each, 60 guests on the slowest link.
const SEND_DEBT_SECONDS: f64 = 10.0;
/// Processor time that may be used at once after a rest...
const CPU_BURST_SECONDS: f64 = 0.2;
/// ...and what one step can owe at most: a large pass may take seconds of a small share.
const CPU_DEBT_SECONDS: f64 = 30.0;
/// How long a schedule's answer holds.
const SCHEDULE_LOOK: Duration = Duration::from_secs(1);

/// When a schedule was asked, and the rate it gave.
type Answer = (Instant, Option<u64>);

/// A rate by schedule, and the bucket that keeps it.
#[derive(Debug)]
struct Link {
    bucket: Bucket,
    schedule: Mutex<(Schedule, Option<Answer>)>,
}

impl Link {
    fn new(schedule: Schedule) -> Self {
        let bucket = Bucket::new(SEND_BURST_SECONDS, SEND_BURST_MIN, SEND_DEBT_SECONDS);
        Self { bucket, schedule: Mutex::new((schedule, None)) }
    }

    fn set(&self, schedule: Schedule) {
        *lock(&self.schedule) = (schedule, None);
    }

    /// Bytes per second that hold now.
    fn rate(&self, now: Instant) -> Option<u64> {
        let (schedule, known) = &mut *lock(&self.schedule);
        match known {
            Some((at, rate)) if now.saturating_duration_since(*at) < SCHEDULE_LOOK => *rate,
            _ => {
                let rate = schedule.at(LocalTime::now());
                *known = Some((now, rate));
                rate
            }
        }
    }
}

/// A part of a processor, and the bucket that keeps it.
#[derive(Debug)]
struct Cpu {
    bucket: Bucket,
    percent: AtomicU64,
}

impl Cpu {
    fn new(percent: Option<u32>) -> Self {
        let bucket = Bucket::new(CPU_BURST_SECONDS, 0.0, CPU_DEBT_SECONDS);
        Self { bucket, percent: AtomicU64::new(percent.unwrap_or(0).into()) }
    }

    fn set(&self, percent: Option<u32>) {
        self.percent.store(percent.unwrap_or(0).into(), Ordering::Relaxed);
    }

    /// Seconds of processor time per second; nothing: no limit.
    fn rate(&self) -> Option<f64> {
        let percent = self.percent.load(Ordering::Relaxed);
        (percent > 0).then_some(percent as f64 / 100.0)
    }

    fn charge(&self, seconds: f64, now: Instant) {
        if let Some(rate) = self.rate() {
            self.bucket.charge(rate, seconds, now);
        }
    }

    fn wait(&self, now: Instant) -> Duration {
        self.rate().map_or(Duration::ZERO, |rate| self.bucket.wait(rate, now))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in these is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The limits of this host, in force. Clones share them.
#[derive(Clone, Debug)]
pub struct Host {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limits: Mutex<Limits>,
    link: Link,
    cpu: Cpu,
    agent: Meter,
    slots: Slots,
    guests: Mutex<BTreeMap<String, Vec<std::sync::Weak<Guest>>>>,
}

/// Why a domain gets no memory for its checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "memory: {guests} protected guests have {taken_mib} MiB for checkpoints, domain {domain} needs {wanted_mib} MiB, and \
     limits.memory_bytes allows {allowed_mib} MiB in all; raise that, or lower limits.domain.{domain}.memory_bytes"
)]
pub struct NoMemory {
    domain: String,
    guests: usize,
    taken_mib: u64,
    wanted_mib: u64,
    allowed_mib: u64,
}

impl Host {
    /// With these limits.
    pub fn new(limits: Limits) -> Self {
        let shared = Shared {
            link: Link::new(limits.schedule.clone()),
            cpu: Cpu::new(limits.cpu_percent),
            agent: Meter::default(),
            slots: Slots::new(cuts_at_once(&limits)),
            limits: Mutex::new(limits),
            guests: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Other limits from now on. Arenas keep their size until their shim is started anew.
    pub fn set(&self, limits: Limits) {
        let shared = &self.shared;
        shared.link.set(limits.schedule.clone());
        shared.cpu.set(limits.cpu_percent);
        shared.slots.set_most(cuts_at_once(&limits));
        for (name, guests) in lock(&shared.guests).iter() {
            let caps = limits.of(name);
            for guest in guests.iter().filter_map(std::sync::Weak::upgrade) {
                guest.set(&caps);
            }
        }
        *lock(&shared.limits) = limits;
    }

    /// A guest's part. `domain`: its name.
    pub fn guest(&self, domain: &str) -> Arc<Guest> {
        let caps = lock(&self.shared.limits).of(domain);
        let guest = Arc::new(Guest {
            host: self.clone(),
            seat: self.shared.slots.seat(),
            link: Link::new(caps.schedule.clone()),
            cpu: Cpu::new(caps.cpu_percent),
            meter: Meter::default(),
            strain: Mutex::default(),
            sent_bytes: AtomicU64::new(0),
        });
        let mut guests = lock(&self.shared.guests);
        guests.retain(|_, guests| {
            guests.retain(|guest| guest.strong_count() > 0);
            !guests.is_empty()
        });
        guests.entry(domain.to_owned()).or_default().push(Arc::downgrade(&guest));
        guest
    }

    /// Whether this host has memory for the checkpoints of one more. `arenas`: what the guests that are protected have.
    pub fn admit(&self, domain: &str, wanted: u64, arenas: &[u64]) -> Result<(), NoMemory> {
        let Some(allowed) = lock(&self.shared.limits).memory_bytes else { return Ok(()) };
        let taken: u64 = arenas.iter().sum();
        if taken + wanted <= allowed {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        let (taken_mib, wanted_mib, allowed_mib) = (mib(taken), mib(wanted), mib(allowed));
        Err(NoMemory { domain: domain.to_owned(), guests: arenas.len(), taken_mib, wanted_mib, allowed_mib })
    }
}

fn cuts_at_once(limits: &Limits) -> usize {
    let half = std::thread::available_parallelism().map_or(1, usize::from) / 2;
    limits.cuts_at_once.map_or(half.max(1), |cuts| cuts as usize)
}

/// What one guest may take, while it is protected.
#[derive(Debug)]
pub struct Guest {
    host: Host,
    /// Its turn among the guests of the host.
    pub seat: Seat,
    link: Link,
    cpu: Cpu,
    meter: Meter,
    strain: Mutex<Strains>,
    sent_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct Strains {
    link: [Strain; 2],
    cpu: [Strain; 2],
}

impl Guest {
    /// One that nothing limits.
    pub fn unlimited() -> Arc<Self> {
        Host::new(Limits::default()).guest("")
    }

    fn set(&self, caps: &Caps) {
        self.link.set(caps.schedule.clone());
        self.cpu.set(caps.cpu_percent);
    }

    /// How many of `want` bytes may be sent next, and after how long. They count as sent.
    fn reserve(&self, want: usize, now: Instant) -> (usize, Duration) {
        let links = [&self.link, &self.host.shared.link];
        let rates = links.map(|link| link.rate(now).map(|rate| rate as f64));
        // No more than that at once, so that all who share a link have their turns.
        let turn = |rate: &f64| (rate * SEND_TURN_SECONDS).max(SEND_BURST_MIN) as usize;
        let bytes = rates.iter().flatten().map(turn).fold(want, usize::min);
        let mut longest = (Duration::ZERO, 0);
        for (index, (link, rate)) in links.into_iter().zip(rates).enumerate() {
            if let Some(rate) = rate {
                longest = longest.max((link.bucket.reserve(rate, bytes as f64, now), index));
            }
        }
        let (wait, index) = longest;
        if !wait.is_zero() {
            lock(&self.strain).link[index].waited(wait, now);
        }
        (bytes, wait)
    }

    fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes written to the receiver's connection, HTTP/2's own included.
    pub fn wire_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// A step has been made by this thread and by the shim with this pid: what it took is paid by resting.
    pub fn worked(&self, shim_pid: u32) {
        let now = Instant::now();
        let own = self.meter.thread();
        let shim = self.meter.process(shim_pid);
        self.cpu.charge(own + shim, now);
        self.host.shared.cpu.charge(self.host.shared.agent.own_process() + shim, now);
    }

    /// How long to rest before the next step, to stay within the share of the processor.
    pub fn rest(&self) -> Duration {
        let now = Instant::now();
        let mut longest = Duration::ZERO;
        for (index, cpu) in [&self.cpu, &self.host.shared.cpu].into_iter().enumerate() {
            let wait = cpu.wait(now);
            if !wait.is_zero() {
                lock(&self.strain).cpu[index].rests_until(now + wait, now);
            }
            longest = longest.max(wait);
        }
        longest
    }

    /// The limits that hold protection back, for the operator; empty: none does.
    pub fn limited_by(&self) -> String {
        let now = Instant::now();
        let strain = lock(&self.strain);
        let host = &self.host.shared;
        let mut said = Vec::new();
        for (index, (whose, link)) in [("this guest", &self.link), ("this host", &host.link)].into_iter().enumerate() {
            if strain.link[index].holds(now)
                && let Some(rate) = link.rate(now)
            {
                said.push(format!("bandwidth of {whose} ({})", Rate(rate)));
            }
        }
        for (index, (whose, cpu)) in [("this guest", &self.cpu), ("this host", &host.cpu)].into_iter().enumerate() {
            if strain.cpu[index].holds(now)
                && let Some(rate) = cpu.rate()
            {
                said.push(format!("processor share of {whose} ({:.0} % of one)", rate * 100.0));
            }
        }
        said.join(", ")
    }
}

#[cfg(test)]
mod tests;
