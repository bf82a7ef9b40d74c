//! The daemon's side of a freeze: one process at a time ([`crate::freeze`]), what it says, and what the host is told of it.
//!
//! Nothing here touches a file while that process lives, and nothing waits for it.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use vmdr_guest_channel::{Frame, Message, Outcome};

use crate::cli::Daemon;
use crate::freeze::wire::{LINE_BYTES_MAX, Said};
use crate::freeze::{plan, thaw};

/// The shortest time for which anything is frozen: less is over before the host can have made use of it.
const HOLD_MS_MIN: u32 = 200;

/// What becomes of a freeze.
struct Worker {
    child: Child,
    /// Closed to say "thaw" by itself.
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    line: Vec<u8>,
    /// The host's number of it.
    freeze: u32,
    /// What it has said it would freeze.
    points: Vec<PathBuf>,
    /// It has said what came of it.
    answered: bool,
    /// It has said that nothing is frozen any more.
    thawed: bool,
    /// The host wants to know when it has, under this number.
    asked: Option<u32>,
}

/// See the module.
pub struct Freezer {
    options: Daemon,
    worker: Option<Worker>,
    /// The last freeze that has ended by itself, for a host that asks late.
    last: Option<(u32, Message)>,
    /// What there is to log when nothing is frozen any more.
    log: Vec<String>,
}

impl Freezer {
    /// None under way.
    pub fn new(options: Daemon) -> Self {
        Self { options, worker: None, last: None, log: Vec::new() }
    }

    /// Whether something may be frozen.
    pub fn is_active(&self) -> bool {
        self.worker.is_some()
    }

    /// What becomes readable when there is something to hear.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        self.worker.as_ref().map(|worker| worker.stdout.as_fd())
    }

    /// The host wants a freeze. The answer, if there is one already.
    pub fn freeze(&mut self, number: u32, hold_ms: u32) -> Option<Message> {
        let failed = |outcome, text: &str| Message::Frozen {
            outcome,
            file_systems: 0,
            skipped: 0,
            hold_ms: 0,
            text: text.to_owned(),
        };
        if self.worker.is_some() {
            return Some(failed(Outcome::Busy, "another freeze has not ended yet"));
        }
        let hold_ms = hold_ms.clamp(HOLD_MS_MIN, (self.options.freeze_seconds_max.max(1)).saturating_mul(1000));
        match self.start(number, hold_ms) {
            Ok(worker) => {
                self.worker = Some(worker);
                None
            }
            Err(error) => Some(failed(Outcome::Failed, &format!("start a process for it: {error}"))),
        }
    }

    fn start(&self, freeze: u32, hold_ms: u32) -> std::io::Result<Worker> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("freeze")
            .args(["--hold-ms", &hold_ms.to_string()])
            .args(["--hook-seconds", &self.options.hook_seconds.to_string()])
            .arg("--hooks")
            .arg(&self.options.hooks)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0);
        let mut child = command.spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(std::io::Error::other("no pipe to it"));
        };
        Ok(Worker {
            child,
            stdin: Some(stdin),
            stdout,
            line: Vec::new(),
            freeze,
            points: Vec::new(),
            answered: false,
            thawed: false,
            asked: None,
        })
    }

    /// The host wants it thawed. The answer, if there is one already.
    pub fn thaw(&mut self, number: u32, freeze: u32) -> Option<Message> {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.freeze == freeze && !worker.thawed) {
            worker.asked = Some(number);
            worker.end();
            return None;
        }
        let known = self.last.as_ref().filter(|(last, _)| *last == freeze);
        let unknown = || Message::Thawed { held: false, frozen_ms: 0, text: "there is no such freeze".to_owned() };
        Some(known.map_or_else(unknown, |(_, message)| message.clone()))
    }

    /// Nobody is at the other end of the channel any more: whatever for, it is not needed.
    pub fn abandoned(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.stdin = None;
        }
    }

    /// Hears what there is to hear; frames for the host.
    pub fn hear(&mut self) -> VecDeque<Frame> {
        let mut frames = VecDeque::new();
        let Some(worker) = &mut self.worker else { return frames };
        let mut buffer = [0; 1024];
        // There is something, or the end.
        let bytes = match worker.stdout.read(&mut buffer) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return frames,
            Err(_) => 0,
        };
        worker.line.extend_from_slice(&buffer[..bytes]);
        while let Some(end) = worker.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = worker.line.drain(..=end).collect();
            match Said::parse(&String::from_utf8_lossy(&line[..end])) {
                Some(said) => {
                    let freeze = worker.freeze;
                    let message = worker.said(said, &mut self.log);
                    if let Some((Some(number), message)) = &message {
                        frames.push_back(Frame { number: *number, message: message.clone() });
                    }
                    if let Some((_, message @ Message::Thawed { .. })) = message {
                        self.last = Some((freeze, by_itself(message)));
                    }
                }
                None => worker.stdin = None,
            }
        }
        if worker.line.len() > LINE_BYTES_MAX {
            worker.line.clear();
        }
        if bytes == 0 {
            frames.extend(self.ended());
        }
        frames
    }

    /// The process is gone. What it has not thawed, whatever ended it, is thawed here.
    fn ended(&mut self) -> Option<Frame> {
        let mut worker = self.worker.take()?;
        if !worker.thawed {
            thaw(&worker.points);
        }
        worker.stdin = None;
        // It has closed its output, so it is gone or going.
        let status = worker.child.wait();
        if worker.thawed {
            return None;
        }
        self.log.push(format!("freeze: its process ended before it was done ({status:?}), all is thawed"));
        let text = "the process that froze it was killed".to_owned();
        let thawed = Message::Thawed { held: false, frozen_ms: 0, text: text.clone() };
        self.last = Some((worker.freeze, thawed.clone()));
        if let Some(number) = worker.asked {
            return Some(Frame { number, message: thawed });
        }
        let failed = Message::Frozen { outcome: Outcome::Failed, file_systems: 0, skipped: 0, hold_ms: 0, text };
        (!worker.answered).then_some(Frame { number: worker.freeze, message: failed })
    }

    /// What there is to log, if nothing is frozen.
    pub fn take_log(&mut self) -> Vec<String> {
        if self.is_active() { Vec::new() } else { std::mem::take(&mut self.log) }
    }
}

/// Who asks after it has ended is told that it did not last until then.
fn by_itself(message: Message) -> Message {
    match message {
        Message::Thawed { frozen_ms, text, .. } => Message::Thawed { held: false, frozen_ms, text },
        other => other,
    }
}

impl Worker {
    /// Says "thaw".
    fn end(&mut self) {
        let said = self.stdin.as_mut().map(|stdin| stdin.write_all(b"thaw\n"));
        if !matches!(said, Some(Ok(()))) {
            self.stdin = None;
        }
    }

    /// What is to be told to the host, under which number.
    fn said(&mut self, said: Said, log: &mut Vec<String>) -> Option<(Option<u32>, Message)> {
        match said {
            Said::Freezing(path) => {
                if self.points.len() < plan::FILE_SYSTEMS_MAX {
                    self.points.push(path);
                }
                None
            }
            Said::Frozen { file_systems, skipped, hold_ms, text } => {
                self.answered = true;
                let count = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
                let (file_systems, skipped) = (count(file_systems), count(skipped));
                let message = Message::Frozen { outcome: Outcome::Frozen, file_systems, skipped, hold_ms, text };
                Some((Some(self.freeze), message))
            }
            Said::Failed(text) => {
                self.thawed = true;
                log.push(format!("freeze: {text}"));
                let message =
                    Message::Frozen { outcome: Outcome::Failed, file_systems: 0, skipped: 0, hold_ms: 0, text };
                let number = if self.answered { None } else { Some(self.freeze) };
                self.answered = true;
                Some((number, message))
            }
            Said::Thawed { held, frozen_ms, text } => {
                self.thawed = true;
                let why = if text.is_empty() { String::new() } else { format!(": {text}") };
                log.push(format!("freeze: thawed after {frozen_ms} ms{why}"));
                Some((self.asked, Message::Thawed { held, frozen_ms, text }))
            }
            Said::Ended(text) if text.is_empty() => None,
            Said::Ended(text) => {
                log.push(format!("freeze: {text}"));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Daemon {
        Daemon {
            port: None,
            hooks: "/nonexistent".into(),
            hook_seconds: 1,
            freeze_seconds_max: 10,
            state: "/nonexistent".into(),
            not_ready: "/nonexistent".into(),
            keep_network: false,
        }
    }

    /// A process that says these lines when it is told to thaw, or at once.
    fn freezer(script: &str) -> Freezer {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        let worker = Worker {
            child,
            stdin,
            stdout,
            line: Vec::new(),
            freeze: 7,
            points: Vec::new(),
            answered: false,
            thawed: false,
            asked: None,
        };
        Freezer { worker: Some(worker), ..Freezer::new(options()) }
    }

    /// All frames until the process is gone.
    fn rest(freezer: &mut Freezer) -> Vec<Frame> {
        let mut frames = Vec::new();
        while freezer.is_active() {
            frames.extend(freezer.hear());
        }
        frames
    }

    const FROZEN: &str = "echo freezing /nonexistent/a; echo frozen 2 1 5000 not all;";

    #[test]
    fn a_freeze_is_answered_and_thawed_when_it_is_asked_for() {
        let mut freezer = freezer(&format!("{FROZEN} read word; echo thawed 1 40; echo ended"));
        let mut frames = VecDeque::new();
        while frames.is_empty() {
            frames = freezer.hear();
        }
        let Message::Frozen { outcome: Outcome::Frozen, file_systems: 2, skipped: 1, hold_ms: 5000, .. } =
            frames[0].message
        else {
            panic!("{frames:?}")
        };
        assert_eq!(frames[0].number, 7);
        assert!(matches!(freezer.freeze(8, 1), Some(Message::Frozen { outcome: Outcome::Busy, .. })));
        assert!(freezer.take_log().is_empty());
        assert_eq!(freezer.thaw(9, 7), None);
        let frames = rest(&mut freezer);
        let thawed = Message::Thawed { held: true, frozen_ms: 40, text: String::new() };
        assert_eq!(frames, [Frame { number: 9, message: thawed }]);
        // Asked once more it did not last until then.
        assert!(matches!(freezer.thaw(10, 7), Some(Message::Thawed { held: false, frozen_ms: 40, .. })));
        assert!(matches!(freezer.thaw(11, 6), Some(Message::Thawed { held: false, frozen_ms: 0, .. })));
        assert_eq!(freezer.take_log().len(), 1);
    }

    #[test]
    fn one_that_is_killed_is_made_up_for() {
        let mut frozen = freezer(&format!("{FROZEN} kill -9 $$"));
        assert_eq!(rest(&mut frozen).len(), 1);
        assert!(matches!(frozen.thaw(9, 7), Some(Message::Thawed { held: false, .. })));
        let mut before = freezer("kill -9 $$");
        let frames = rest(&mut before);
        assert!(matches!(frames[0], Frame { number: 7, message: Message::Frozen { outcome: Outcome::Failed, .. } }));
    }

    #[test]
    fn whatever_it_says_is_borne() {
        let mut freezer = freezer("head -c 100000 /dev/urandom; echo; echo frozen x y; echo failed because");
        let frames = rest(&mut freezer);
        assert_eq!(frames.len(), 1, "{frames:?}");
    }

    #[test]
    fn a_host_that_is_gone_ends_it() {
        let mut freezer = freezer(&format!("{FROZEN} read word; echo thawed 0 40 gone; echo ended"));
        freezer.abandoned();
        assert_eq!(rest(&mut freezer).len(), 1);
        assert!(matches!(freezer.thaw(9, 7), Some(Message::Thawed { held: false, frozen_ms: 40, .. })));
    }
}
