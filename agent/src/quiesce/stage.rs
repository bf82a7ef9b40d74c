//! How far an application-consistent point has come. No I/O: `F` is what holds the guest at rest.
//!
//! ```text
//!  idle --begin--> freezing --froze--> frozen --cut--> (thawed, confirmed) --mark--> marked --durable--> idle
//!    ^                | could not         | no cut in time     | not confirmed          | the epoch is lost
//!    +----------------+-------------------+--------------------+------------------------+
//! ```
//! Whoever has asked is answered once, whatever happens: an answer that is dropped says so too. What holds the guest is given
//! out for thawing, or dropped, which thaws it as well.

use std::time::{Duration, Instant};

/// What has become durable.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Its generation.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock at its cut.
    pub cut_unix_ns: u64,
    /// For how long the guest was frozen, as it claims.
    pub frozen: Duration,
    /// How many file systems were.
    pub file_systems: u32,
    /// What of it an operator should know; empty: nothing.
    pub note: String,
    /// Who did it.
    pub way: &'static str,
}

/// Who is told.
pub type Asker = crate::session::Answer<Made>;

enum At<F> {
    Idle,
    Freezing,
    Frozen { by: F, until: Instant },
    Marked(Made),
}

/// See the module.
pub struct Stage<F> {
    at: At<F>,
    asker: Option<Asker>,
}

impl<F> Default for Stage<F> {
    fn default() -> Self {
        Self { at: At::Idle, asker: None }
    }
}

impl<F> Stage<F> {
    /// Whether another one may begin.
    pub fn is_idle(&self) -> bool {
        matches!(self.at, At::Idle)
    }

    /// Whether the guest is at rest and waits for a cut.
    pub fn is_frozen(&self) -> bool {
        matches!(self.at, At::Frozen { .. })
    }

    /// Whether the guest is brought to rest, or is at rest: it has to run to be thawed.
    pub fn needs_it_to_run(&self) -> bool {
        matches!(self.at, At::Freezing | At::Frozen { .. })
    }

    /// A freeze has been begun.
    pub fn begin(&mut self, asker: Option<Asker>) {
        self.at = At::Freezing;
        self.asker = asker;
    }

    /// The guest is at rest until then. Given back: nobody waits for that any more.
    pub fn froze(&mut self, by: F, until: Instant) -> Result<(), F> {
        if !matches!(self.at, At::Freezing) {
            return Err(by);
        }
        self.at = At::Frozen { by, until };
        Ok(())
    }

    /// Takes what holds the guest: it has been cut, or `now` it is too late for that.
    pub fn take(&mut self, now: Option<Instant>) -> Option<F> {
        let due = |until: Instant| now.is_none_or(|now| now >= until);
        match std::mem::replace(&mut self.at, At::Idle) {
            At::Frozen { by, until } if due(until) => {
                self.at = At::Freezing;
                Some(by)
            }
            other => {
                self.at = other;
                None
            }
        }
    }

    /// The epoch that was cut is application-consistent.
    pub fn mark(&mut self, made: Made) {
        self.at = At::Marked(made);
    }

    /// Whether this epoch is.
    pub fn marks(&self, epoch: u64) -> bool {
        matches!(&self.at, At::Marked(made) if made.epoch == epoch)
    }

    /// All up to this epoch is durable. What has been made, if that is news.
    pub fn durable(&mut self, epoch: u64) -> Option<Made> {
        let At::Marked(made) = &self.at else { return None };
        if epoch < made.epoch {
            return None;
        }
        let made = made.clone();
        self.at = At::Idle;
        if let Some(asker) = self.asker.take() {
            // Who has gone away finds it in the list of points.
            let _ = asker.send(Ok(made.clone()));
        }
        Some(made)
    }

    /// Nothing comes of it.
    pub fn fail(&mut self, why: &str) {
        self.at = At::Idle;
        if let Some(asker) = self.asker.take() {
            let _ = asker.send(Err(why.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// What holds a guest: counts those that do.
    struct Holds(Arc<AtomicUsize>);

    impl Holds {
        fn new(count: &Arc<AtomicUsize>) -> Self {
            count.fetch_add(1, Ordering::SeqCst);
            Self(count.clone())
        }
    }

    impl Drop for Holds {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn made(epoch: u64) -> Made {
        let (frozen, note) = (Duration::ZERO, String::new());
        Made { generation: 1, epoch, cut_unix_ns: 1, frozen, file_systems: 1, note, way: "" }
    }

    #[test]
    fn a_point_is_told_of_when_it_is_durable() {
        let (asker, mut answer) = tokio::sync::oneshot::channel();
        let held = Arc::default();
        let mut stage = Stage::default();
        stage.begin(Some(asker));
        assert!(stage.froze(Holds::new(&held), Instant::now() + Duration::from_secs(60)).is_ok());
        assert!(stage.take(Some(Instant::now())).is_none() && stage.is_frozen());
        drop(stage.take(None).unwrap());
        stage.mark(made(7));
        assert!(stage.marks(7) && !stage.marks(8) && stage.durable(6).is_none());
        assert!(answer.try_recv().is_err());
        assert_eq!(stage.durable(9), Some(made(7)));
        assert_eq!(answer.try_recv().unwrap(), Ok(made(7)));
        assert!(stage.is_idle() && stage.durable(9).is_none());
    }

    proptest! {
        /// Any order of events: whoever asks is answered once, at most one thing holds the guest, and none when it is idle.
        #[test]
        fn nobody_is_forgotten(events in proptest::collection::vec(0u8..7, 0..60)) {
            let held: Arc<AtomicUsize> = Arc::default();
            let mut stage: Stage<Holds> = Stage::default();
            let mut answers = Vec::new();
            let mut epoch = 1;
            for event in events {
                match event {
                    0 if stage.is_idle() => {
                        let (asker, answer) = tokio::sync::oneshot::channel();
                        answers.push(answer);
                        stage.begin(Some(asker));
                    }
                    1 => drop(stage.froze(Holds::new(&held), Instant::now())),
                    2 => drop(stage.take(Some(Instant::now()))),
                    3 => if let Some(by) = stage.take(None) {
                        drop(by);
                        stage.mark(made(epoch));
                    },
                    4 => epoch += 1,
                    5 => { let _ = stage.durable(epoch); }
                    6 => stage.fail("no"),
                    _ => {}
                }
                let holds = held.load(Ordering::SeqCst);
                prop_assert_eq!(holds, usize::from(stage.is_frozen()));
            }
            drop(stage);
            prop_assert_eq!(held.load(Ordering::SeqCst), 0);
            for mut answer in answers {
                // An answer, or the news that there will be none.
                prop_assert!(!matches!(answer.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty)));
            }
        }
    }
}
