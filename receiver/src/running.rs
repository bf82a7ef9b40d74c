//! Time during which this receiver ran: what passes while it is stopped, or its host suspended, is not counted.
//!
//! Whoever was heard of up to a stop of half an hour has not been silent for half an hour: what it said meanwhile waits in
//! sockets, or could not be said. So silence is measured with this clock. Whoever looks after it calls [`RunningClock::step`]
//! several times in each [`STEP_MAX`], from something that stands still when the rest does.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::Handle;

/// What counts at most between two steps.
const STEP_MAX: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct RunningClock {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    stepped: Duration,
    ran: Duration,
}

impl Inner {
    fn at(&self, host: Duration) -> Duration {
        self.ran + host.saturating_sub(self.stepped).min(STEP_MAX)
    }

    fn step(&mut self, host: Duration) {
        self.ran = self.at(host);
        self.stepped = self.stepped.max(host);
    }
}

impl Default for RunningClock {
    fn default() -> Self {
        RunningClock { inner: Mutex::new(Inner { stepped: host(), ran: Duration::ZERO }) }
    }
}

impl RunningClock {
    /// For how long this receiver has run; never less than before.
    pub fn now(&self) -> Duration {
        self.inner().at(host())
    }

    /// It runs, and so does whoever reads from the network: if not, this waits, and the clock stands still. `false`: the
    /// runtime has ended.
    pub fn step(&self, runtime: &Handle) -> bool {
        let turn = runtime.spawn(async { tokio::time::sleep(Duration::from_millis(1)).await });
        let runs = runtime.block_on(turn).is_ok();
        if runs {
            self.inner().step(host());
        }
        runs
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This host's clock that goes on while the host is suspended.
fn host() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_between_two_steps_counts_only_up_to_a_bound() {
        let s = Duration::from_secs_f64;
        let mut inner = Inner { stepped: s(100.0), ran: s(5.0) };
        assert_eq!((inner.at(s(100.0)), inner.at(s(100.5)), inner.at(s(99.0))), (s(5.0), s(5.5), s(5.0)));
        inner.step(s(100.5));
        // Half an hour in which nothing ran.
        assert_eq!(inner.at(s(1900.0)), s(6.5));
        inner.step(s(1900.0));
        assert_eq!((inner.at(s(1900.0)), inner.at(s(1900.25))), (s(6.5), s(6.75)));
    }
}
