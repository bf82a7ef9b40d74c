//! A process that can be told from every other, also by a later receiver.

use std::io;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Between two looks at whether it is gone.
const LOOK: Duration = Duration::from_millis(20);

/// A process: its number alone may be another's by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it began, in clock ticks since the host did.
    started_ticks: u64,
    /// Since which start of the host.
    boot: String,
}

fn boot() -> Option<String> {
    Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// When a process began; nothing: it is gone, or a zombie.
fn started_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may have anything in it. After it: the state is the 3rd field, the time the 22nd.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl Process {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Process { pid, started_ticks: started_ticks(pid)?, boot: boot()? })
    }

    fn lives(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Ends it and waits until it is gone; nothing is done if it is already.
    pub fn kill(&self, limit: Duration) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(()) };
        // Taken before the look: what is found to live is what the descriptor stands for.
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            other => other?,
        };
        if !self.lives() {
            return Ok(());
        }
        match pidfd_send_signal(&process, Signal::KILL) {
            Err(Errno::SRCH) => return Ok(()),
            other => other?,
        }
        let until = Instant::now() + limit;
        while self.lives() {
            if Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ended_and_never_another() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let process = Process::of(i32::try_from(child.id()).unwrap()).unwrap();
        let another = Process { started_ticks: process.started_ticks + 1, ..process.clone() };
        let earlier = Process { boot: "x".to_owned(), ..process.clone() };
        for other in [another, earlier] {
            other.kill(Duration::from_secs(30)).unwrap();
            assert!(process.lives());
        }
        process.kill(Duration::from_secs(30)).unwrap();
        assert!(!child.wait().unwrap().success());
        process.kill(Duration::from_secs(30)).unwrap();
    }
}
