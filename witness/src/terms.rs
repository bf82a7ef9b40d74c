//! How long a lease lets its holder run, seen from the holder's own clock.

use std::time::Duration;

/// How far a clock may run fast or slow, in millionths: 500 is 43 s a day, five to ten times what crystals do.
pub const DRIFT_PPM: u32 = 500;
/// Shortest life of a lease at the witness. etcd counts in seconds, and an election there takes one or two.
const TTL_MIN: Duration = Duration::from_secs(3);
/// Longest life of a lease at the witness.
pub const TTL_MAX: Duration = Duration::from_secs(600);

/// The terms of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    ttl: Duration,
    margin: Duration,
}

/// Terms that cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// A lease that is too short or too long.
    #[error("a lease of {0:?}: it lasts from 3 to 600 s")]
    Ttl(Duration),
    /// Nothing useful is left of the lease.
    #[error("a margin of {margin:?} leaves less than half of a lease of {ttl:?}: make the lease longer")]
    Margin {
        /// Life of the lease.
        ttl: Duration,
        /// What is taken off.
        margin: Duration,
    },
}

impl Terms {
    /// `ttl`: how long a lease lives at the witness after it was last renewed, by the witness's clock. `margin`: how long
    /// stopping the guest may take at most, from the deadline until no instruction of it is executed any more.
    pub fn new(ttl: Duration, margin: Duration) -> Result<Self, TermsError> {
        if !(TTL_MIN..=TTL_MAX).contains(&ttl) {
            return Err(TermsError::Ttl(ttl));
        }
        if margin.saturating_mul(2) >= ttl {
            return Err(TermsError::Margin { ttl, margin });
        }
        Ok(Self { ttl, margin })
    }

    /// Life of a lease at the witness.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// How long after a renewal **was sent** the guest has to be told to stop, by the holder's clock.
    ///
    /// The witness's clock may be fast: the lease ends there after `ttl / (1 + d)` at the earliest. The holder's may be slow:
    /// what it takes for `h` lasts `h / (1 - d)` at most. So `h <= ttl * (1 - d) / (1 + d)`, and the margin comes off that.
    pub fn hold(&self) -> Duration {
        const MILLION: u64 = 1_000_000;
        let ttl = u64::try_from(self.ttl.as_nanos()).unwrap_or(u64::MAX);
        let slow = MILLION - u64::from(DRIFT_PPM);
        let fast = MILLION + u64::from(DRIFT_PPM);
        // Rounded down; whole parts first, so that nothing overflows.
        let held = (ttl / fast) * slow;
        Duration::from_nanos(held).saturating_sub(self.margin)
    }

    /// How often a lease is renewed: three attempts may fail before the backup is asked to stand down, and some after that.
    pub fn renew_every(&self) -> Duration {
        self.hold() / 8
    }

    /// How long an answer to a renewal is waited for before it is asked again.
    pub fn answer_limit(&self) -> Duration {
        self.hold() / 4
    }

    /// With less left of it than this a lease is in danger, and the backup site is asked to stand down.
    pub fn in_danger(&self) -> Duration {
        self.hold() / 2
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn terms_that_cannot_be_kept_are_refused() {
        let s = Duration::from_secs;
        assert_eq!(Terms::new(s(2), s(0)), Err(TermsError::Ttl(s(2))));
        assert_eq!(Terms::new(s(601), s(0)), Err(TermsError::Ttl(s(601))));
        assert!(matches!(Terms::new(s(10), s(5)), Err(TermsError::Margin { .. })));
        assert!(Terms::new(s(10), s(2)).is_ok());
    }

    proptest! {
        /// However the two clocks run within the bound, the guest stands still before the lease can have ended elsewhere.
        #[test]
        fn a_holder_stops_before_the_lease_ends(
            ttl_ms in 3_000u64..600_000, margin_share in 0.0f64..0.49,
            holder_ppm in -500.0f64..=500.0, witness_ppm in -500.0f64..=500.0,
        ) {
            let ttl = Duration::from_millis(ttl_ms);
            let margin = ttl.mul_f64(margin_share);
            let terms = Terms::new(ttl, margin).unwrap();
            let stops = terms.hold().as_secs_f64() / (1.0 + holder_ppm / 1e6) + margin.as_secs_f64();
            let ends = ttl.as_secs_f64() / (1.0 + witness_ppm / 1e6);
            // The margin is real time here, since stopping is: what the clock does to it is 500 millionths of it.
            prop_assert!(stops <= ends + 1e-9, "{stops} {ends}");
            prop_assert!(terms.hold() + terms.renew_every() >= ttl.mul_f64(0.5), "{:?}", terms.hold());
        }
    }
}
