//! Follows a stream of progress to its end: one line that is rewritten, on stderr and only where that is a terminal.
//!
//! Messages that a daemon sends on the way are given back, the newest last: what matters of them also without a
//! terminal ([`Outcome::lasting`]) is shown with the result.

use std::io::{IsTerminal, Write};

use tonic::Streaming;
use vmdr_proto::control::{
    ActivationReport, DrillReport, ExportReport, GroupReport, ImportReport, MoveReport, Progress, VerifyReport,
};

use crate::client::Daemon;
use crate::failure::Failure;
use crate::text;

/// How many messages are kept: what a person would read.
const MESSAGES_MAX: usize = 32;

/// What a stream brought.
#[derive(Debug, Default)]
pub struct Outcome {
    /// In order, without repetitions in a row.
    pub messages: Vec<String>,
    /// The last message of an activation carries it.
    pub report: Option<ActivationReport>,
    /// The last message of a move carries it.
    pub moved: Option<MoveReport>,
    /// The last message of a verification carries it.
    pub verification: Option<VerifyReport>,
    /// The last message of a drill carries it.
    pub drill: Option<DrillReport>,
    /// That of an export.
    pub exported: Option<ExportReport>,
    /// That of an import.
    pub imported: Option<ImportReport>,
    /// That of an activation of a group.
    pub group: Option<GroupReport>,
}

impl Outcome {
    /// The warnings, and what was said last; the others only told of the moment.
    pub fn lasting(&self) -> impl Iterator<Item = &str> {
        let last = self.messages.len().saturating_sub(1);
        let lasts = move |(i, message): &(usize, &String)| *i == last || message.starts_with("warning");
        self.messages.iter().enumerate().filter(lasts).map(|(_, message)| message.as_str())
    }
}

/// Reads until the daemon ends the stream.
pub async fn follow(daemon: Daemon, request: &str, stream: Streaming<Progress>) -> Result<Outcome, Failure> {
    read(daemon, request, stream, false).await
}

/// The same, and each message stays, a line on stderr, terminal or not.
pub async fn follow_aloud(daemon: Daemon, request: &str, stream: Streaming<Progress>) -> Result<Outcome, Failure> {
    read(daemon, request, stream, true).await
}

async fn read(daemon: Daemon, request: &str, mut stream: Streaming<Progress>, aloud: bool) -> Result<Outcome, Failure> {
    let mut line = Line::new(std::io::stderr().is_terminal());
    let mut outcome = Outcome::default();
    loop {
        match stream.message().await {
            Ok(Some(progress)) => {
                line.show(&rendered(&progress));
                let message = text::one_line(&progress.message);
                if aloud && !message.is_empty() {
                    line.clear();
                    line.write(&text::wrapped("", &message));
                }
                if !message.is_empty() && outcome.messages.last() != Some(&message) {
                    if outcome.messages.len() == MESSAGES_MAX {
                        outcome.messages.remove(0);
                    }
                    outcome.messages.push(message);
                }
                if progress.verification.is_some() {
                    outcome.verification = progress.verification;
                }
                if progress.drill.is_some() {
                    outcome.drill = progress.drill;
                }
                if progress.activation.is_some() {
                    outcome.report = progress.activation;
                }
                if progress.moved.is_some() {
                    outcome.moved = progress.moved;
                }
                outcome.exported = progress.exported.or(outcome.exported);
                outcome.imported = progress.imported.or(outcome.imported);
                outcome.group = progress.group.or(outcome.group);
            }
            Ok(None) => return Ok(outcome),
            Err(status) => return Err(Failure::from_status(daemon, request, &status)),
        }
    }
}

/// `copy memory  123 MiB of 512 MiB  24 %  seeding`.
fn rendered(progress: &Progress) -> String {
    let step = text::one_line(&progress.step);
    let amount = |n: u64| match progress.unit.as_str() {
        "bytes" => text::bytes(n as f64),
        unit => format!("{} {}", text::count(n as f64), text::one_line(unit)).trim_end().to_owned(),
    };
    let far = match (progress.done, progress.total) {
        (0, 0) => String::new(),
        (done, 0) => amount(done),
        (done, total) => {
            let share = (done as f64 / total as f64 * 100.0).min(100.0);
            format!("{} of {}  {share:.0} %", amount(done), amount(total))
        }
    };
    let pieces = [step, far, text::one_line(&progress.message)];
    pieces.into_iter().filter(|piece| !piece.is_empty()).collect::<Vec<_>>().join("  ")
}

/// The line that is rewritten; it is wiped when this is dropped, so that what follows starts clean.
struct Line {
    terminal: bool,
    shown: bool,
}

impl Line {
    fn new(terminal: bool) -> Line {
        Line { terminal, shown: false }
    }

    fn show(&mut self, text: &str) {
        if self.terminal && !text.is_empty() {
            // Short of the width of any terminal that is still in use, so that it never wraps.
            self.write(&format!("\r\x1b[K{}", text::shortened(text, 79)));
            self.shown = true;
        }
    }

    fn clear(&mut self) {
        if self.shown {
            self.write("\r\x1b[K");
            self.shown = false;
        }
    }

    fn write(&self, text: &str) {
        // Progress that cannot be shown is no reason to stop what it is about.
        let mut stderr = std::io::stderr();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let progress = |done, total, unit: &str| Progress {
            step: "copy\nmemory".into(),
            done,
            total,
            unit: unit.into(),
            ..Progress::default()
        };
        assert_eq!(rendered(&progress(0, 0, "")), "copy memory");
        assert_eq!(rendered(&progress(1 << 27, 1 << 29, "bytes")), "copy memory  128 MiB of 512 MiB  25 %");
        assert_eq!(rendered(&progress(12, 0, "pages")), "copy memory  12 pages");
        assert_eq!(rendered(&progress(9, 3, "")), "copy memory  9 of 3  100 %");
        let seeding = Progress { message: "seeding".into(), ..progress(0, 0, "") };
        assert_eq!(rendered(&seeding), "copy memory  seeding");
    }

    #[test]
    fn warnings_and_the_last_word_stay() {
        let lasting = |messages: &[&str]| {
            let messages = messages.iter().map(|message| (*message).to_owned()).collect();
            Outcome { messages, ..Outcome::default() }.lasting().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(lasting(&["warning: a", "starting", "seeding", "done"]), ["warning: a", "done"]);
        assert_eq!(lasting(&["warning: a"]), ["warning: a"]);
        assert!(lasting(&[]).is_empty());
    }
}
