//! Work that is spread over the host's processors.

use std::num::NonZero;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// As many threads at most.
const THREADS_MAX: usize = 8;
/// Work of fewer parts is not worth a thread.
const PARTS_MIN: usize = 4;

fn processors() -> usize {
    static FOUND: OnceLock<usize> = OnceLock::new();
    *FOUND.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX))
}

/// Does something with each of these; an error is one of those that there were, and what was not begun by then is left.
pub(crate) fn each<T: Send, E: Send>(parts: Vec<T>, work: impl Fn(T) -> Result<(), E> + Sync) -> Result<(), E> {
    let threads = (parts.len() / PARTS_MIN).min(processors());
    if threads < 2 {
        return parts.into_iter().try_for_each(work);
    }
    let left = Mutex::new((parts.into_iter(), None));
    let lock = || left.lock().unwrap_or_else(PoisonError::into_inner);
    let turn = || {
        loop {
            let next = {
                let mut left = lock();
                if left.1.is_some() { None } else { left.0.next() }
            };
            let Some(part) = next else { break };
            if let Err(error) = work(part) {
                lock().1 = Some(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without it the others do its work.
            let _ = thread::Builder::new().name("sealed".to_owned()).spawn_scoped(scope, turn);
        }
        turn();
    });
    left.into_inner().unwrap_or_else(PoisonError::into_inner).1.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn each_part_is_done_once() {
        for count in [0, 1, 7, 100] {
            let mut done = vec![0u32; count];
            each(done.iter_mut().collect(), |part| {
                *part += 1;
                Ok::<(), ()>(())
            })
            .unwrap();
            assert!(done.iter().all(|times| *times == 1));
        }
    }

    #[test]
    fn an_error_comes_through() {
        let begun = AtomicUsize::new(0);
        let work = |part: usize| {
            begun.fetch_add(1, Ordering::Relaxed);
            if part == 5 { Err(part) } else { Ok(()) }
        };
        assert_eq!(each((0..1000).collect(), work), Err(5));
        assert!(begun.into_inner() >= 6);
    }
}
