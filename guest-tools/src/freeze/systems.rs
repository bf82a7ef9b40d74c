//! Freezing and thawing of several file systems, of which the thawing must not wait for the freezing.
//!
//! ```text
//!  freezing thread:  freeze a, freeze b, ... c hangs (its storage does) ........ c is frozen: thawed at once
//!  main thread:                                  time is over: thaw b, a
//! ```
//! Whoever ends it ends it for good: what is frozen by then is thawed in reverse order, and what becomes frozen later is
//! thawed by the thread that froze it, before that does anything else.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What is asked of the kernel, and of a model of it in tests.
pub trait Kernel: Send + Sync {
    /// A file system that is kept open.
    type Handle: Send;
    /// FIFREEZE. Waits until what is being written to it is written.
    fn freeze(&self, handle: &Self::Handle) -> io::Result<()>;
    /// FITHAW. EINVAL: it was not frozen.
    fn thaw(&self, handle: &Self::Handle) -> io::Result<()>;
}

/// What came of freezing one.
#[derive(Debug, PartialEq, Eq)]
pub enum Froze {
    /// It is frozen.
    Done,
    /// It knows no freezing.
    Skipped,
    /// It was ended meanwhile: nothing more is to be frozen.
    Ended,
}

struct State<H> {
    ended: bool,
    frozen: Vec<H>,
    since: Option<Instant>,
}

/// See the module.
pub struct Systems<K: Kernel> {
    kernel: K,
    state: Mutex<State<K::Handle>>,
}

/// What thawing found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// Each was frozen until now.
    pub held: bool,
    /// How many were thawed.
    pub count: usize,
    /// How long the first of them was frozen (ms).
    pub frozen_ms: u32,
}

impl<K: Kernel> Systems<K> {
    /// Nothing frozen yet.
    pub fn new(kernel: K) -> Self {
        Self { kernel, state: Mutex::new(State { ended: false, frozen: Vec::new(), since: None }) }
    }

    fn state(&self) -> MutexGuard<'_, State<K::Handle>> {
        // A list that is only pushed to and taken from: valid after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was ended.
    pub fn ended(&self) -> bool {
        self.state().ended
    }

    /// Freezes one more. An error freezes nothing.
    pub fn freeze(&self, handle: K::Handle) -> io::Result<Froze> {
        {
            let mut state = self.state();
            if state.ended {
                return Ok(Froze::Ended);
            }
            state.since.get_or_insert_with(Instant::now);
        }
        // Without the lock: this may take long, and thawing the others must not wait for it.
        match self.kernel.freeze(&handle) {
            Ok(()) => {}
            Err(error) if unknown_there(&error) => return Ok(Froze::Skipped),
            Err(error) => return Err(error),
        }
        let mut state = self.state();
        if state.ended {
            drop(state);
            self.kernel.thaw(&handle)?;
            return Ok(Froze::Ended);
        }
        state.frozen.push(handle);
        Ok(Froze::Done)
    }

    /// Ends it: thaws all, the last frozen first. Once is enough; a second time there is nothing left.
    pub fn thaw(&self) -> Thawed {
        let (frozen, since) = {
            let mut state = self.state();
            state.ended = true;
            (std::mem::take(&mut state.frozen), state.since)
        };
        let mut held = true;
        for handle in frozen.iter().rev() {
            let mut thawed = self.kernel.thaw(handle);
            while thawed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
                thawed = self.kernel.thaw(handle);
            }
            held &= thawed.is_ok();
        }
        let frozen_ms = since.map_or(0, |since| u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX));
        Thawed { held, count: frozen.len(), frozen_ms }
    }
}

fn unknown_there(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    const COUNT: usize = 6;

    /// File systems by number; freezing one at which `hang` points waits until it is let go.
    #[derive(Default)]
    struct Model {
        frozen: [AtomicBool; COUNT],
        order: Mutex<Vec<(char, usize)>>,
        skips: u8,
        hang: AtomicU8,
        hangs: Mutex<Option<mpsc::Sender<()>>>,
    }

    impl Kernel for Arc<Model> {
        type Handle = usize;
        fn freeze(&self, handle: &usize) -> io::Result<()> {
            if self.skips >> handle & 1 == 1 {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
            if usize::from(self.hang.load(Ordering::SeqCst)) == *handle + 1 {
                if let Some(said) = self.hangs.lock().unwrap().take() {
                    said.send(()).unwrap();
                }
                while self.hang.load(Ordering::SeqCst) != 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            if self.frozen[*handle].swap(true, Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            self.order.lock().unwrap().push(('f', *handle));
            Ok(())
        }
        fn thaw(&self, handle: &usize) -> io::Result<()> {
            if !self.frozen[*handle].swap(false, Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            self.order.lock().unwrap().push(('t', *handle));
            Ok(())
        }
    }

    impl Model {
        fn at_rest(&self) -> bool {
            self.frozen.iter().all(|frozen| !frozen.load(Ordering::SeqCst))
        }
    }

    #[test]
    fn one_that_hangs_keeps_the_others_from_nothing_and_is_thawed_when_it_comes_back() {
        let (said, hangs) = mpsc::channel();
        let model = Arc::new(Model { hang: 3.into(), hangs: Mutex::new(Some(said)), ..Model::default() });
        let systems = Arc::new(Systems::new(model.clone()));
        let own = systems.clone();
        let thread = std::thread::spawn(move || (0..COUNT).map(|n| own.freeze(n).unwrap()).collect::<Vec<_>>());
        hangs.recv_timeout(Duration::from_secs(20)).unwrap();
        let thawed = systems.thaw();
        assert!(thawed.held && thawed.count == 2 && model.at_rest());
        model.hang.store(0, Ordering::SeqCst);
        use Froze::{Done, Ended};
        assert_eq!(thread.join().unwrap(), [Done, Done, Ended, Ended, Ended, Ended]);
        assert!(model.at_rest());
        assert_eq!(*model.order.lock().unwrap(), [('f', 0), ('f', 1), ('t', 1), ('t', 0), ('f', 2), ('t', 2)]);
    }

    #[test]
    fn that_somebody_else_has_thawed_one_is_noticed() {
        let model = Arc::new(Model::default());
        let systems = Systems::new(model.clone());
        for n in 0..3 {
            systems.freeze(n).unwrap();
        }
        model.thaw(&1).unwrap();
        let thawed = systems.thaw();
        assert!(!thawed.held && thawed.count == 3 && model.at_rest());
        assert_eq!(systems.thaw().count, 0);
    }

    proptest! {
        /// Wherever it is ended, by whichever way: nothing stays frozen, and nothing is thawed that was not frozen here.
        #[test]
        fn nothing_stays_frozen(freeze in 0..=COUNT, skips in any::<u8>(), foreign in 0..=COUNT) {
            let model = Arc::new(Model { skips, ..Model::default() });
            if foreign < COUNT {
                model.frozen[foreign].store(true, Ordering::SeqCst);
            }
            let systems = Systems::new(model.clone());
            let mut done = 0;
            for n in 0..freeze {
                match systems.freeze(n) {
                    Ok(Froze::Done) => done += 1,
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
            let thawed = systems.thaw();
            prop_assert!(thawed.held && thawed.count == done);
            for n in 0..COUNT {
                prop_assert_eq!(model.frozen[n].load(Ordering::SeqCst), n == foreign);
            }
            prop_assert_eq!(systems.freeze(0).unwrap(), Froze::Ended);
        }
    }
}
