//! By how much to run the clock faster, and when to step it: a pure decision.
//!
//! A proportional-integral controller without oscillation: the integral part becomes what pauses take, whatever that is, and
//! the proportional part removes what is left in about a second. The kernel lets a clock run at most 10 % faster or slower; what
//! more than that is lost is made up by steps forward, before it is [`STEP_FORWARD`]. A clock that is ahead is slowed
//! down, not stepped back, unless it is far off ([`STEP_BACK`]), as it is when a guest has just been started.

use std::time::Instant;

/// A clock that is behind by this many seconds is stepped: it is to stay within 50 ms of the host's.
const STEP_FORWARD: f64 = 0.035;
/// A clock that is ahead by this many seconds is stepped.
const STEP_BACK: f64 = 1.0;
/// Rate per second that the clock is off (1/s).
const PROPORTIONAL: f64 = 1.6;
/// And per second and second: a quarter of the square of the former, which is where it just does not oscillate (1/s²).
const INTEGRAL: f64 = PROPORTIONAL * PROPORTIONAL / 4.0;
/// The most that a clock is run faster or slower; the kernel's own limit is 0.1.
pub const RATE_MAX: f64 = 0.095;
/// Observations further apart than this (seconds) say nothing about the time between them.
const GAP_MAX: f64 = 2.0;

/// What to do beside setting the rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Nothing.
    Rate,
    /// Step the clock by the offset.
    Step,
}

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Steer {
    lost: f64,
    rate: f64,
    seen: Option<Instant>,
}

impl Steer {
    /// How much faster than by itself the clock should run now: 0.04 is 4 % faster.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// The clock is behind by `offset` seconds.
    pub fn observe(&mut self, offset: f64, now: Instant) -> Do {
        let passed = self.seen.map_or(0.0, |seen| now.saturating_duration_since(seen).as_secs_f64());
        let known = self.seen.is_some() && passed <= GAP_MAX;
        self.seen = Some(now);
        // A clock that was never looked at, or far off for a reason of its own, says nothing about its rate.
        if known && offset.abs() < STEP_BACK {
            self.lost = (self.lost + INTEGRAL * offset * passed).clamp(-RATE_MAX, RATE_MAX);
        }
        if !(-STEP_BACK..STEP_FORWARD).contains(&offset) {
            self.rate = self.lost;
            return Do::Step;
        }
        self.rate = (self.lost + PROPORTIONAL * offset).clamp(-RATE_MAX, RATE_MAX);
        Do::Rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A guest whose clock stands still for `pause` seconds in each tenth of a second; gives the largest |offset| in the last
    /// half, and how often it was stepped then.
    fn simulate(steer: &mut Steer, begun: Instant, behind: f64, pause: f64, seconds: f64) -> (f64, u32, f64) {
        let (mut host, mut guest) = (0.0_f64, -behind);
        let (mut worst, mut steps, mut next_ask) = (0.0_f64, 0, 0.0);
        while host < seconds {
            let running = 0.1 - pause;
            host += 0.1;
            guest += running * (1.0 + steer.rate());
            if host > seconds / 2.0 {
                worst = worst.max((host - guest).abs());
            }
            if host >= next_ask {
                next_ask += 0.25;
                if steer.observe(host - guest, begun + Duration::from_secs_f64(host)) == Do::Step {
                    guest = host;
                    steps += u32::from(host > seconds / 2.0);
                }
            }
        }
        (worst, steps, host - guest)
    }

    #[test]
    fn a_clock_that_loses_four_per_cent_is_held_by_its_rate_alone() {
        let (worst, steps, _) = simulate(&mut Steer::default(), Instant::now(), 0.0, 0.004, 30.0);
        assert!(worst < 0.005 && steps == 0, "{worst} s, {steps} steps");
    }

    #[test]
    fn from_the_first_second_on_it_is_within_the_limit() {
        let mut steer = Steer::default();
        let begun = Instant::now();
        let mut behind = 0.0;
        for second in 0..20 {
            let (worst, _, now) = simulate(&mut steer, begun + Duration::from_secs(second), behind, 0.004, 1.0);
            assert!(worst < 0.05, "{worst} s off in second {second}");
            behind = now;
        }
    }

    #[test]
    fn more_than_the_kernel_allows_is_made_up_by_steps() {
        let (worst, steps, _) = simulate(&mut Steer::default(), Instant::now(), 0.0, 0.02, 30.0);
        assert!(worst < 0.1 && steps > 0, "{worst} s, {steps} steps");
        // Half of the time: what is lost between two looks is the limit of any clock.
        let (worst, _, _) = simulate(&mut Steer::default(), Instant::now(), 0.0, 0.012, 30.0);
        assert!(worst < 0.05, "{worst} s");
    }

    #[test]
    fn a_clock_far_off_is_stepped_at_once_and_its_rate_stays() {
        let mut steer = Steer::default();
        let now = Instant::now();
        assert_eq!(steer.observe(3600.0, now), Do::Step);
        assert_eq!(steer.observe(-3600.0, now + Duration::from_millis(250)), Do::Step);
        assert_eq!(steer.rate(), 0.0);
        assert_eq!(steer.observe(-0.5, now + Duration::from_millis(500)), Do::Rate);
        assert!(steer.rate() < -0.09, "{}", steer.rate());
    }

    #[test]
    fn when_the_pauses_end_it_settles_again() {
        let mut steer = Steer::default();
        let begun = Instant::now();
        let (_, _, behind) = simulate(&mut steer, begun, 0.0, 0.005, 20.0);
        let (worst, steps, _) = simulate(&mut steer, begun + Duration::from_secs(21), behind, 0.0, 20.0);
        assert!(worst < 0.005 && steps == 0 && steer.rate().abs() < 0.002, "{worst} s, rate {}", steer.rate());
    }
}
