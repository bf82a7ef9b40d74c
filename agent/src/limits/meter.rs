//! Processor time that was used, and whether a limit is felt.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::lock;

/// Over about this long a limit is judged, in seconds.
const LATELY_SECONDS: f64 = 5.0;
/// A limit is felt when this part of the time was spent waiting for it.
const FELT: f64 = 0.2;

/// What was used since it was last asked. For one thread, one process and this process; each has its own memory.
#[derive(Debug, Default)]
pub struct Meter {
    thread: Mutex<Option<f64>>,
    process: Mutex<Option<(u32, f64)>>,
    own: Mutex<Option<f64>>,
}

impl Meter {
    /// Seconds used by the thread that asks, which must be the same each time.
    pub fn thread(&self) -> f64 {
        since(&mut lock(&self.thread), seconds(ClockId::ThreadCPUTime))
    }

    /// Seconds used by this process.
    pub fn own_process(&self) -> f64 {
        since(&mut lock(&self.own), seconds(ClockId::ProcessCPUTime))
    }

    /// Seconds used by another process; nothing the first time, or when it is gone.
    pub fn process(&self, pid: u32) -> f64 {
        let Some(now) = used_by(pid) else { return 0.0 };
        match lock(&self.process).replace((pid, now)) {
            Some((same, before)) if same == pid => (now - before).max(0.0),
            _ => 0.0,
        }
    }
}

fn since(before: &mut Option<f64>, now: f64) -> f64 {
    before.replace(now).map_or(0.0, |before| (now - before).max(0.0))
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// User and system time of all threads of a process (proc_pid_stat(5)).
fn used_by(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit(") ").next()?.split_whitespace().collect();
    // Fields 14 and 15, counted from 1; the third is the first here.
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// How much of the recent time was spent waiting for a limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Strain {
    waited: f64,
    at: Option<Instant>,
    until: Option<Instant>,
}

impl Strain {
    /// Waiting for so long has begun.
    pub fn waited(&mut self, wait: Duration, now: Instant) {
        self.waited = self.faded(now) + wait.as_secs_f64();
        self.at = Some(now);
    }

    /// Resting until then, however often that is asked for.
    pub fn rests_until(&mut self, until: Instant, now: Instant) {
        let from = self.until.map_or(now, |known| known.max(now));
        if until > from {
            self.waited(until - from, now);
            self.until = Some(until);
        }
    }

    /// Whether the limit is felt.
    pub fn holds(&self, now: Instant) -> bool {
        self.faded(now) > FELT * LATELY_SECONDS
    }

    fn faded(&self, now: Instant) -> f64 {
        let passed = self.at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.waited * (-passed / LATELY_SECONDS).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_measured() {
        // What is to hold more is measured from earlier until later.
        let meter = Meter::default();
        let begun = Instant::now();
        meter.process(std::process::id());
        meter.own_process();
        meter.thread();
        let mut value = 0_u64;
        while begun.elapsed() < Duration::from_millis(300) {
            value = std::hint::black_box(value.wrapping_mul(31).wrapping_add(7));
        }
        // On a busy machine less than was waited for, but never more. User and system time of a process are told in whole
        // ticks of 10 ms; a clock that is steered may run slower than that of the processor, by 500 ppm.
        let (thread, own, process) = (meter.thread(), meter.own_process(), meter.process(std::process::id()));
        assert!(thread > 0.0 && thread <= begun.elapsed().as_secs_f64() * 1.001, "{thread}");
        assert!(process + 0.021 >= thread && own >= thread, "{process} {own} {thread}");
        assert_eq!(meter.process(u32::MAX), 0.0);
    }

    #[test]
    fn a_limit_is_felt_while_a_fifth_of_the_time_is_waiting() {
        let begun = Instant::now();
        for (wait_ms, felt) in [(10, false), (40, true)] {
            let mut strain = Strain::default();
            for step in 0..300 {
                strain.waited(Duration::from_millis(wait_ms), begun + Duration::from_millis(100 * step));
            }
            assert_eq!(strain.holds(begun + Duration::from_secs(30)), felt, "{wait_ms} ms of 100");
            assert!(!strain.holds(begun + Duration::from_secs(60)));
        }
    }

    #[test]
    fn a_rest_counts_once() {
        let now = Instant::now();
        let mut strain = Strain::default();
        for step in 0..10 {
            strain.rests_until(now + Duration::from_millis(500), now + Duration::from_millis(step * 10));
        }
        assert!((strain.faded(now + Duration::from_millis(90)) - 0.5).abs() < 0.02, "{strain:?}");
    }
}
