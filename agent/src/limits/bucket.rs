//! A bucket of tokens that come at a rate: bytes to send, or nanoseconds of processor time.
//!
//! Over any time the rate is kept: what is taken in t seconds is at most rate x (t + the burst), plus what was overdrawn last.
//! The clock is the caller's, so that tests have their own.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest that anybody waits at once: the rate may change meanwhile, and a debt may not lock anybody out.
pub const WAIT_MAX: Duration = Duration::from_secs(2);
/// The shortest: a timer's own grain.
const WAIT_MIN: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
struct State {
    tokens: f64,
    at: Option<Instant>,
}

/// See the module.
#[derive(Debug)]
pub struct Bucket {
    /// As much as comes in this time can be taken at once, in seconds.
    burst_seconds: f64,
    /// And at least this much.
    burst_min: f64,
    /// At most as much as comes in this time is owed, in seconds.
    debt_seconds: f64,
    state: Mutex<State>,
}

impl Bucket {
    /// A full one.
    pub fn new(burst_seconds: f64, burst_min: f64, debt_seconds: f64) -> Self {
        Self { burst_seconds, burst_min, debt_seconds, state: Mutex::default() }
    }

    fn filled(&self, rate: f64, now: Instant) -> MutexGuard<'_, State> {
        // Two numbers that are valid after a panic between their uses.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let most = (rate * self.burst_seconds).max(self.burst_min);
        let tokens = match state.at {
            Some(at) => state.tokens + rate * now.saturating_duration_since(at).as_secs_f64(),
            None => most,
        };
        state.tokens = tokens.clamp(-rate * self.debt_seconds, most);
        state.at = Some(state.at.map_or(now, |at| at.max(now)));
        state
    }

    /// Takes tokens, whether or not they are there, and says after how long they are: whoever comes first goes first.
    pub fn reserve(&self, rate: f64, amount: f64, now: Instant) -> Duration {
        let mut state = self.filled(rate, now);
        state.tokens -= amount;
        Duration::from_secs_f64((-state.tokens / rate).max(0.0))
    }

    /// Takes tokens, whether or not they are there.
    pub fn charge(&self, rate: f64, amount: f64, now: Instant) {
        self.filled(rate, now).tokens -= amount;
    }

    /// How long until nothing is owed.
    pub fn wait(&self, rate: f64, now: Instant) -> Duration {
        let owed = -self.filled(rate, now).tokens;
        if owed <= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(owed / rate).clamp(WAIT_MIN, WAIT_MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_any_time_the_rate_is_kept_and_used() {
        let bucket = Bucket::new(0.1, 1000.0, 10.0);
        let begun = Instant::now();
        let (mut passed, mut taken) = (Duration::ZERO, 0.0);
        let rate = 50_000.0;
        while passed < Duration::from_secs(10) {
            passed += bucket.reserve(rate, 4_000.0, begun + passed);
            taken += 4_000.0;
            assert!(taken <= rate * (passed.as_secs_f64() + 0.1) + 1.0, "{taken} after {passed:?}");
        }
        assert!(taken > rate * 9.9, "{taken}");
        // Idle for a minute: no more than the burst has gathered.
        let later = begun + passed + Duration::from_secs(60);
        assert_eq!(bucket.reserve(rate, 5_000.0, later), Duration::ZERO);
        assert_eq!(bucket.reserve(rate, 50_000.0, later), Duration::from_secs(1));
    }

    #[test]
    fn a_debt_is_paid_and_bounded() {
        let bucket = Bucket::new(0.1, 0.0, 5.0);
        let now = Instant::now();
        bucket.charge(10.0, 6.0, now);
        let wait = bucket.wait(10.0, now);
        assert!((wait.as_secs_f64() - 0.5).abs() < 1e-6, "{wait:?}");
        assert_eq!(bucket.wait(10.0, now + wait + Duration::from_nanos(10)), Duration::ZERO);
        bucket.charge(10.0, 1e9, now);
        assert_eq!(bucket.wait(10.0, now), WAIT_MAX);
        assert_eq!(bucket.wait(10.0, now + Duration::from_secs(6)), Duration::ZERO);
    }

    #[test]
    fn a_rate_may_change_and_time_stand_still() {
        let bucket = Bucket::new(0.1, 0.0, 1.0);
        let now = Instant::now();
        assert_eq!(bucket.reserve(1e6, 1e5, now), Duration::ZERO);
        assert_eq!(bucket.reserve(1e6, 1e5, now), Duration::from_millis(100));
        // What is owed is kept within what the rate that holds now pays back in a second.
        assert_eq!(bucket.reserve(1e3, 0.0, now), Duration::from_secs(1));
        assert_eq!(bucket.reserve(1e3, 0.0, now + Duration::from_secs(2)), Duration::ZERO);
        assert_eq!(bucket.reserve(1e3, 200.0, now), Duration::from_millis(100));
    }
}
