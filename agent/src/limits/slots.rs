//! Who of this host's guests may be paused now: at most so many at once, and spread over the interval.
//!
//! Each guest has a phase of its own in the interval, as far from the others' as can be (the golden ratio's multiples), and
//! its cuts drift towards it by at most an eighth of an interval at a time, so that their rate stays what it is ([`aim`]).
//! Whatever phases have come to, no more than a number of guests are in a pause at once: the others wait in the order in
//! which they came ([`Slots::enter`]). A guest whose cut hangs does not take the others with it: nobody waits for longer
//! than [`ENTER_MAX`].

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait for a slot: a cut ends itself after that time.
const ENTER_MAX: Duration = Duration::from_secs(2);
/// How much a cut is moved towards its guest's phase at most: this part of the interval.
const DRIFT_PART: f64 = 1.0 / 8.0;
/// The golden ratio's fraction: its multiples (modulo 1) are spread evenly, however many there are.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

#[derive(Debug, Default)]
struct State {
    most: usize,
    inside: usize,
    waiting: VecDeque<u64>,
    next: u64,
    numbers: BTreeSet<u32>,
}

/// The slots of a host; clones share them.
#[derive(Clone, Debug)]
pub struct Slots {
    state: Arc<(Mutex<State>, Condvar)>,
    origin: Instant,
}

/// A guest's part in it; dropping it gives its phase back.
#[derive(Debug)]
pub struct Seat {
    slots: Slots,
    number: u32,
}

/// The right to pause a guest, until it is dropped.
#[derive(Debug)]
pub struct Permit<'a>(&'a Slots);

impl Slots {
    /// For at most so many pauses at once.
    pub fn new(most: usize) -> Self {
        let state = State { most, ..State::default() };
        Self { state: Arc::new((Mutex::new(state), Condvar::new())), origin: Instant::now() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single one.
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on at most so many.
    pub fn set_most(&self, most: usize) {
        self.state().most = most;
        self.state.1.notify_all();
    }

    /// Takes the lowest phase that is free.
    pub fn seat(&self) -> Seat {
        let mut state = self.state();
        let number = (0..).find(|number| !state.numbers.contains(number)).unwrap_or(0);
        state.numbers.insert(number);
        drop(state);
        Seat { slots: self.clone(), number }
    }

    /// Waits for its turn, for [`ENTER_MAX`] at most.
    fn enter(&self) -> Permit<'_> {
        let until = Instant::now() + ENTER_MAX;
        let mut state = self.state();
        let ticket = state.next;
        state.next += 1;
        state.waiting.push_back(ticket);
        loop {
            let turn = state.waiting.front() == Some(&ticket) && state.inside < state.most;
            let left = until.saturating_duration_since(Instant::now());
            if turn || left.is_zero() {
                break;
            }
            state = self.state.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting.retain(|waiting| *waiting != ticket);
        state.inside += 1;
        drop(state);
        self.state.1.notify_all();
        Permit(self)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.state().inside -= 1;
        self.0.state.1.notify_all();
    }
}

impl Seat {
    /// Pauses the guest (`pause` does) when it is its turn.
    pub fn turn<T>(&self, pause: impl FnOnce() -> T) -> T {
        let permit = self.slots.enter();
        let result = pause();
        drop(permit);
        result
    }

    /// When to cut, if it were `at` by the interval alone.
    pub fn aim(&self, at: Instant, interval: Duration) -> Instant {
        aim(self.slots.origin, phase(self.number), at, interval)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.slots.state().numbers.remove(&self.number);
    }
}

/// The phase of a guest's number, 0 to 1.
fn phase(number: u32) -> f64 {
    (f64::from(number) * GOLDEN).fract()
}

/// `at`, moved a little towards the next instant after `origin` that has this phase of the interval.
fn aim(origin: Instant, phase: f64, at: Instant, interval: Duration) -> Instant {
    let length = interval.as_secs_f64();
    let passed = at.saturating_duration_since(origin).as_secs_f64() / length;
    // How far ahead the phase lies, -0.5 to 0.5 intervals.
    let ahead = (phase - passed).rem_euclid(1.0);
    let ahead = if ahead > 0.5 { ahead - 1.0 } else { ahead };
    let shift = ahead.clamp(-DRIFT_PART, DRIFT_PART) * length;
    if shift < 0.0 {
        at.checked_sub(Duration::from_secs_f64(-shift)).unwrap_or(at)
    } else {
        at + Duration::from_secs_f64(shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    #[test]
    fn guests_that_begin_together_are_spread_and_keep_their_rate() {
        let interval = Duration::from_millis(100);
        let origin = Instant::now();
        let slots = Slots { origin, ..Slots::new(1) };
        let seats: Vec<Seat> = (0..5).map(|_| slots.seat()).collect();
        let mut at: Vec<Instant> = seats.iter().map(|_| origin + Duration::from_secs(1)).collect();
        for _ in 0..100 {
            for (seat, at) in seats.iter().zip(&mut at) {
                let next = seat.aim(*at + interval, interval);
                let length = (next - *at).as_secs_f64();
                assert!((0.0874..0.1126).contains(&length), "an interval of {length} s");
                *at = next;
            }
        }
        let mut phases: Vec<f64> =
            at.iter().map(|at| (at.duration_since(origin).as_secs_f64() / 0.1).fract()).collect();
        phases.sort_by(f64::total_cmp);
        let gaps = phases.windows(2).map(|pair| pair[1] - pair[0]).chain([1.0 - phases[4] + phases[0]]);
        let least = gaps.fold(1.0, f64::min);
        // Five guests: a fifth each would be the best.
        assert!(least > 0.1, "{phases:?}");
        // In a hundred intervals nobody has lost or won more than half of one.
        let behind = at[0].duration_since(origin).as_secs_f64() - 11.0;
        assert!(behind.abs() <= 0.051, "{behind} s");
    }

    #[test]
    fn numbers_are_given_back() {
        let slots = Slots::new(1);
        let (one, two) = (slots.seat(), slots.seat());
        assert_eq!((one.number, two.number), (0, 1));
        drop(one);
        assert_eq!(slots.seat().number, 0);
    }

    /// The most that were inside at once.
    fn crowd(slots: &Slots, guests: usize, rounds: usize) -> usize {
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..guests {
                scope.spawn(|| {
                    let seat = slots.seat();
                    for _ in 0..rounds {
                        seat.turn(|| {
                            most.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                            std::thread::sleep(Duration::from_millis(2));
                            inside.fetch_sub(1, SeqCst);
                        });
                    }
                });
            }
        });
        most.load(SeqCst)
    }

    #[test]
    fn no_more_than_allowed_are_inside() {
        let slots = Slots::new(1);
        assert_eq!(crowd(&slots, 6, 5), 1);
        slots.set_most(3);
        assert!(crowd(&slots, 6, 5) <= 3);
        // The same crowd with room for all of it is a crowd: the test can fail.
        slots.set_most(6);
        assert!(crowd(&slots, 6, 20) > 1);
    }

    #[test]
    fn one_that_hangs_inside_does_not_keep_the_others_out() {
        let slots = Slots::new(1);
        let other = slots.seat();
        let _inside = slots.enter();
        assert_eq!(other.turn(|| 7), 7);
    }
}
