//! Keeps the copying thread off the CPU on which QEMU's main thread saves the devices.
//!
//! Both work at the same time, and each wakes the other: the scheduler likes to put such a pair on one CPU, where they take
//! turns, and most of all in a virtual machine, where it takes CPUs that sleep for preempted ones. On a host of two
//! CPUs that was so in 103 cuts of 121, and the copy made the save longer by its whole length.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Field `processor` of `/proc/PID/task/TID/stat`, counted from the one after the command's name.
const PROCESSOR_FIELD: usize = 36;

/// Where QEMU's main thread runs.
#[derive(Debug)]
pub struct Placement {
    stat: File,
}

/// The thread's CPUs are restored when this is dropped.
#[derive(Debug)]
pub struct Aside(CpuSet);

impl Placement {
    /// Of the process `pid`, whose main thread has the same number.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { stat: File::open(format!("/proc/{pid}/task/{pid}/stat"))? })
    }

    /// Moves this thread to another CPU if it is on that of QEMU's main thread and may be on others. Without success it
    /// stays, which only takes longer.
    pub fn step_aside(&self) -> Option<Aside> {
        let mut text = [0; 1024];
        let length = self.stat.read_at(&mut text, 0).ok()?;
        let main = processor(std::str::from_utf8(&text[..length]).ok()?)?;
        if sched_getcpu() != main {
            return None;
        }
        let all = sched_getaffinity(None).ok()?;
        let mut others = all;
        others.unset(main);
        if others.count() == 0 {
            return None;
        }
        sched_setaffinity(None, &others).ok()?;
        Some(Aside(all))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(None, &self.0) {
            tracing::warn!("restore the CPUs of a thread: {error}");
        }
    }
}

/// The last CPU of the thread of which this is `stat`.
fn processor(stat: &str) -> Option<usize> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(PROCESSOR_FIELD)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_aside_from_itself_and_back() {
        // This thread's own CPU in the place of QEMU's: it may run on one only, so that it cannot move meanwhile.
        let all = sched_getaffinity(None).unwrap();
        let here = sched_getcpu();
        let tid = rustix::thread::gettid().as_raw_nonzero();
        let stat = File::open(format!("/proc/self/task/{tid}/stat")).unwrap();
        let mut one = CpuSet::new();
        one.set(here);
        sched_setaffinity(None, &one).unwrap();
        let placement = Placement { stat };
        assert!(placement.step_aside().is_none(), "there is no other CPU to go to");
        sched_setaffinity(None, &all).unwrap();
        if all.count() > 1 {
            let before = sched_getcpu();
            if let Some(aside) = placement.step_aside() {
                assert_ne!(sched_getcpu(), before);
                drop(aside);
            }
        }
        assert_eq!(sched_getaffinity(None).unwrap(), all);
    }

    #[test]
    fn the_processor_is_found_behind_any_name() {
        let text = format!("12 (a) b (c)) S {} 5 0 0", (0..35).map(|n| n.to_string()).collect::<Vec<_>>().join(" "));
        assert_eq!(processor(&text), Some(5));
        assert_eq!(processor("12 (short) S 1"), None);
    }
}
