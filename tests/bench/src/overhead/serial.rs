//! The lines of a guest's serial port, with the host's time at which they came.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The guest without an operating system prints a line after so many pages; this many lines are a million.
const LINES_OF_A_MILLION: f64 = 1e6 / 4096.0;

/// A piece of work.
#[derive(Clone, Debug)]
pub struct Piece {
    /// When the guest said that it begins...
    pub begun: Instant,
    /// ...and that it is done.
    pub ended: Instant,
    /// How much of it there was: what is compared is the time for 1.
    pub work: f64,
}

impl Piece {
    /// How long it took.
    pub fn seconds(&self) -> f64 {
        (self.ended - self.begun).as_secs_f64()
    }
}

/// Follows the port from now on.
pub struct Serial<'a> {
    file: File,
    kinds: &'a [&'a str],
    /// How long the guest without an operating system, which never ends a piece, is watched for one.
    watched: Duration,
    rest: Vec<u8>,
    lines: Vec<(Instant, String)>,
}

impl<'a> Serial<'a> {
    /// `kinds`: the pieces of a cycle, in order.
    pub fn open(path: &Path, kinds: &'a [&'a str], watched: Duration) -> Result<Self> {
        let mut file = File::open(path).context("open the guest's serial port")?;
        file.seek(SeekFrom::End(0)).context("go to the end of the guest's serial port")?;
        Ok(Self { file, kinds, watched, rest: Vec::new(), lines: Vec::new() })
    }

    /// Reads what has come; whether that was a line at least.
    pub fn look(&mut self) -> Result<bool> {
        self.file.read_to_end(&mut self.rest).context("read the guest's serial port")?;
        let now = Instant::now();
        let before = self.lines.len();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.lines.push((now, String::from_utf8_lossy(&line).trim().to_owned()));
        }
        Ok(self.lines.len() > before)
    }

    /// The pieces of a cycle, once there is a whole one.
    pub fn whole_cycle(&self) -> Option<Vec<Piece>> {
        if let ["pages"] = self.kinds {
            let lines: Vec<Instant> =
                self.lines.iter().filter(|(_, line)| line.starts_with("writes ")).map(|(at, _)| *at).collect();
            let (begun, ended) = (*lines.first()?, *lines.last()?);
            // A million pages.
            let work = (lines.len() - 1) as f64 / LINES_OF_A_MILLION;
            return (ended - begun >= self.watched).then_some(vec![Piece { begun, ended, work }]);
        }
        let mut lines = self.lines.iter().skip_while(|(_, line)| *line != format!("job begins {}", self.kinds[0]));
        let mut next = |text: String| lines.find(|(_, line)| *line == text).map(|(at, _)| *at);
        self.kinds
            .iter()
            .map(|kind| {
                let (begun, ended) = (next(format!("job begins {kind}"))?, next(format!("job ends {kind}"))?);
                Some(Piece { begun, ended, work: 1.0 })
            })
            .collect()
    }
}
