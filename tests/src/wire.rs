//! The link between the sites as a long and bad cable: Ethernet frames are delayed, lost, cut off and limited.
//!
//! The kernel here may lack netem, so frames pass through this process: a tap device at either end, and a thread for each
//! direction. In contrast to [`crate::relay`] the connections of the sites stay whole: what is lost is lost to their own TCP,
//! with its retransmissions and its idea of the way's length.
//!
//! ```text
//!   repl-a -- br-repl -- wire-a = this process = wire-b -- br-repl-b -- repl-b
//! ```

use crate::client::Client;
use crate::tap;
use anyhow::{Context, Result};
use rand::Rng;
use rand::rngs::StdRng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Names of the devices at the two ends.
pub const ENDS: [&str; 2] = ["wire-a", "wire-b"];
/// The longest frame: an MTU of 1500, the Ethernet header and a tag.
const FRAME_BYTES_MAX: usize = 1522;
/// What waits before a limited line, as in a router; what comes then is lost.
const QUEUE_BYTES_MAX: f64 = 256.0 * 1024.0;
/// How often a thread looks whether it shall end.
const LOOK: Duration = Duration::from_millis(50);

/// What happens to frames, in each direction alike.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// Added to each frame's way.
    pub delay: Duration,
    /// Part of the frames that is lost, from 0 to 1.
    pub loss: f64,
    /// Bytes per second that pass; 0: no limit.
    pub bytes_per_second: u64,
    /// Nothing passes.
    pub cut: bool,
}

#[derive(Debug, Default)]
struct Shared {
    weather: Mutex<Weather>,
    ended: AtomicBool,
    passed: AtomicU64,
    lost: AtomicU64,
}

/// A running wire; it ends when dropped.
#[derive(Debug)]
pub struct Wire {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Wire {
    /// Makes both ends, in the client's namespace, and passes frames between them. `random` decides which are lost.
    pub fn start(client: &Client, random: &mut StdRng) -> Result<Self> {
        let ends = [client.inside(|| tap::open(ENDS[0]))?, client.inside(|| tap::open(ENDS[1]))?];
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let from = ends[from].try_clone().context("share an end of the wire")?;
            let to = ends[to].try_clone().context("share an end of the wire")?;
            let shared = Arc::clone(&shared);
            let random = rand::SeedableRng::seed_from_u64(random.random());
            threads.push(thread::spawn(move || pass(&from, &to, &shared, random)));
        }
        Ok(Self { shared, threads })
    }

    /// What happens from now on.
    pub fn weather(&self, weather: Weather) {
        *self.shared.weather.lock().unwrap_or_else(PoisonError::into_inner) = weather;
    }

    /// Bytes that passed, and frames that were lost, in both directions.
    pub fn passed_and_lost(&self) -> (u64, u64) {
        (self.shared.passed.load(SeqCst), self.shared.lost.load(SeqCst))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Moves frames one way until the wire ends.
fn pass(mut from: &File, mut to: &File, shared: &Shared, mut random: StdRng) {
    let mut flight: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut frame = [0; FRAME_BYTES_MAX];
    // When a limited line has sent all that it was given.
    let mut free_at = Instant::now();
    while !shared.ended.load(SeqCst) {
        let due = flight.front().map_or(LOOK, |(at, _)| at.saturating_duration_since(Instant::now()));
        let Ok(limit) = Timespec::try_from(due.min(LOOK)) else { return };
        // An error is found by the read.
        let _ = poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&limit));
        let weather = *shared.weather.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(bytes) = from.read(&mut frame) {
            let now = Instant::now();
            let mut leaves = now;
            let mut lost = weather.cut || random.random_bool(weather.loss);
            if weather.bytes_per_second > 0 && !lost {
                let rate = weather.bytes_per_second as f64;
                lost = free_at.saturating_duration_since(now).as_secs_f64() * rate > QUEUE_BYTES_MAX;
                if !lost {
                    free_at = free_at.max(now) + Duration::from_secs_f64(bytes as f64 / rate);
                    leaves = free_at;
                }
            }
            if lost {
                shared.lost.fetch_add(1, SeqCst);
            } else {
                flight.push_back((leaves + weather.delay, frame[..bytes].to_vec()));
            }
            if flight.front().is_some_and(|(at, _)| *at <= now) {
                break;
            }
        }
        while let Some((at, frame)) = flight.front() {
            if *at > Instant::now() {
                break;
            }
            // A frame that the other end has no room for is lost, as anywhere.
            if to.write(frame).is_ok() {
                shared.passed.fetch_add(frame.len() as u64, SeqCst);
            }
            flight.pop_front();
        }
    }
}
