//! Threads beside the tick loop that do something without a break and know what must have come of it.
//!
//! Each owns what it knows, and checks between two steps only: whatever instant a copy of the guest is taken at, the step
//! that was under way ends in the copy too, before anything is checked.

use anyhow::{Context, Result};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

/// The longest a worker may take to finish its step and check.
const CHECK_SECONDS_MAX: u64 = 60;

/// What a thread does.
pub trait Worker: Send + 'static {
    /// Does a little.
    fn step(&mut self) -> Result<()>;
    /// Whether what was done is still there.
    fn check(&mut self) -> Result<()>;
}

/// The running workers.
#[derive(Default)]
pub struct Workers {
    handles: Vec<(String, Sender<()>, Receiver<Result<()>>)>,
}

impl Workers {
    /// Starts one more.
    pub fn start(&mut self, name: &str, worker: impl Worker) -> Result<()> {
        let (ask, asked) = channel();
        let (answer, answered) = channel();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(worker, &asked, &answer))
            .with_context(|| format!("start the thread {name}"))?;
        self.handles.push((name.to_owned(), ask, answered));
        Ok(())
    }

    /// Has every worker check.
    pub fn check(&self) -> Result<()> {
        for (name, ask, _) in &self.handles {
            ask.send(()).with_context(|| format!("ask {name}: its thread has ended"))?;
        }
        for (name, _, answered) in &self.handles {
            let limit = Duration::from_secs(CHECK_SECONDS_MAX);
            answered.recv_timeout(limit).with_context(|| format!("wait for {name}"))?.with_context(|| name.clone())?;
        }
        Ok(())
    }
}

/// Steps until one fails; then only answers.
fn run(mut worker: impl Worker, asked: &Receiver<()>, answer: &Sender<Result<()>>) {
    let mut failed: Option<String> = None;
    loop {
        let request = match failed {
            None => asked.try_recv(),
            Some(_) => asked.recv().map_err(|_| TryRecvError::Disconnected),
        };
        match request {
            Ok(()) => {
                let result = match &failed {
                    Some(error) => Err(anyhow::anyhow!("{error}")),
                    None => worker.check(),
                };
                if answer.send(result).is_err() {
                    return;
                }
            }
            Err(TryRecvError::Empty) => failed = worker.step().err().map(|error| format!("{error:#}")),
            Err(TryRecvError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    struct Counter {
        left: u32,
    }

    impl Worker for Counter {
        fn step(&mut self) -> Result<()> {
            if self.left == 0 {
                bail!("nothing is left");
            }
            self.left -= 1;
            Ok(())
        }

        fn check(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_step_that_failed_is_told_by_every_check_from_then_on() {
        let mut workers = Workers::default();
        workers.check().unwrap();
        workers.start("endless", Counter { left: u32::MAX }).unwrap();
        workers.check().unwrap();
        workers.start("counter", Counter { left: 3 }).unwrap();
        thread::sleep(Duration::from_millis(50));
        for _ in 0..2 {
            let error = format!("{:#}", workers.check().unwrap_err());
            assert!(error.contains("counter") && error.contains("nothing is left"), "{error}");
        }
    }
}
