//! Reading the log: is the chain whole, and what are its newest lines.

use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::chain::{self, Head, ZERO_HASH};
use crate::files::{AuditError, LINE_BYTES_MAX, files, noted, of};

/// What is wrong, and where first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub file: PathBuf,
    /// Its line, from 1.
    pub line: u64,
    /// A sentence.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}: {}", self.file.display(), self.line, self.what)
    }
}

/// What came of looking at a daemon's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The daemon.
    pub daemon: String,
    /// Records that are good, up to the first fault.
    pub records: u64,
    /// Numbers of the first and the last of them; 0: none.
    pub first: u64,
    /// See `first`.
    pub last: u64,
    /// Hash of the last one, to compare with what was noted elsewhere.
    pub hash: String,
    /// The first fault.
    pub fault: Option<Fault>,
}

/// The daemons that have a chain in this directory.
pub fn daemons(directory: &Path) -> Result<Vec<String>, AuditError> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory).map_err(of("list", directory))? {
        let name = entry.map_err(of("list", directory))?.file_name();
        let name = name.to_string_lossy();
        let daemon = name.strip_suffix(".jsonl").and_then(|name| name.rsplit_once('-')).map(|(daemon, _)| daemon);
        found.extend(daemon.or(name.strip_suffix(".head")).map(str::to_owned));
    }
    Ok(found.into_iter().collect())
}

/// Reads a daemon's chain from its beginning to its end.
pub fn verify(directory: &Path, daemon: &str) -> Result<Verdict, AuditError> {
    let mut verdict =
        Verdict { daemon: daemon.to_owned(), records: 0, first: 0, last: 0, hash: ZERO_HASH.to_owned(), fault: None };
    // Before the lines are read: a record that comes meanwhile is then no fault.
    let newest = noted(directory, daemon);
    let mut begin: Option<(PathBuf, Head)> = None;
    let mut dropped = Head::zero();
    let mut last_place = None;
    'files: for path in files(directory, daemon)? {
        let mut number = 0;
        for line in lines(&path)? {
            let line = line.map_err(of("read", &path))?;
            number += 1;
            last_place = Some((path.clone(), number));
            let fault = |what: String| Some(Fault { file: path.clone(), line: number, what });
            let (record, head) = match chain::parse(&line) {
                Ok(parsed) => parsed,
                Err(what) => {
                    verdict.fault = fault(what);
                    break 'files;
                }
            };
            if begin.is_none() {
                begin = Some((path.clone(), Head { seq: record.seq.saturating_sub(1), hash: record.prev.clone() }));
                verdict.first = record.seq;
            } else if record.seq != verdict.last + 1 {
                verdict.fault = fault(format!("it has number {}, {} is expected", record.seq, verdict.last + 1));
                break 'files;
            } else if record.prev != verdict.hash {
                verdict.fault = fault(format!("it does not follow record {} as that stands now", verdict.last));
                break 'files;
            }
            if let Some((seq, hash)) = record.dropped {
                dropped = Head { seq, hash };
            }
            verdict.records += 1;
            (verdict.last, verdict.hash) = (head.seq, head.hash);
        }
    }
    if verdict.fault.is_some() {
        return Ok(verdict);
    }
    // What was to be deleted and is still there (a crash came between) is good: the chain goes through it.
    let wrong = |before: &Head| before.seq > dropped.seq || (before.seq == dropped.seq && *before != dropped);
    if let Some((file, before)) = begin.filter(|(_, before)| wrong(before)) {
        let what = format!("records {} to {} are missing before it", dropped.seq + 1, before.seq);
        let what = if before.seq > dropped.seq { what } else { "it is not where the log began".to_owned() };
        verdict.fault = Some(Fault { file, line: 1, what });
    } else if let Some(newest) = newest.filter(|newest| newest.seq > verdict.last) {
        let (file, line) = last_place.unwrap_or_else(|| (directory.to_owned(), 0));
        let what = format!("records {} to {} are missing after it", verdict.last + 1, newest.seq);
        verdict.fault = Some(Fault { file, line, what });
    }
    Ok(verdict)
}

/// The newest lines of a daemon's chain, oldest first, as they stand.
pub fn last_lines(directory: &Path, daemon: &str, count: usize) -> Result<Vec<String>, AuditError> {
    let mut last = VecDeque::new();
    for path in files(directory, daemon)?.into_iter().rev() {
        let mut of_file = VecDeque::new();
        for line in lines(&path)? {
            of_file.push_back(line.map_err(of("read", &path))?);
            if of_file.len() + last.len() > count {
                of_file.pop_front();
            }
        }
        of_file.extend(std::mem::take(&mut last));
        last = of_file;
        if last.len() >= count {
            break;
        }
    }
    Ok(last.into())
}

/// Lines without their newlines, as text whatever they are; a line that is too long comes in pieces, which are no records.
fn lines(path: &Path) -> Result<impl Iterator<Item = std::io::Result<String>>, AuditError> {
    let mut reader = BufReader::new(File::open(path).map_err(of("open", path))?);
    Ok(std::iter::from_fn(move || {
        let mut bytes = Vec::new();
        match Read::take(&mut reader, LINE_BYTES_MAX as u64).read_until(b'\n', &mut bytes) {
            Ok(0) => None,
            Ok(_) => {
                if bytes.last() == Some(&b'\n') {
                    bytes.pop();
                }
                Some(Ok(String::from_utf8_lossy(&bytes).into_owned()))
            }
            Err(error) => Some(Err(error)),
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::files::Limits;
    use crate::{Audit, Entry, Outcome, REPEAT_WINDOW};

    fn entry(subject: &str) -> Entry {
        Entry::new("Activate", "uid 0", subject, Outcome::Done)
    }

    fn write(directory: &Path, records: u64) {
        let audit = Audit::open(directory, "receiver").unwrap();
        for number in 0..records {
            audit.record(entry(&format!("web{number}")));
        }
    }

    fn only_file(directory: &Path) -> PathBuf {
        let files = files(directory, "receiver").unwrap();
        assert_eq!(files.len(), 1);
        files[0].clone()
    }

    #[test]
    fn a_chain_is_whole_over_restarts_and_every_change_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        write(directory, 3);
        write(directory, 4);
        let verdict = verify(directory, "receiver").unwrap();
        assert_eq!((verdict.records, verdict.first, verdict.last, &verdict.fault), (7, 1, 7, &None));
        assert_eq!(daemons(directory).unwrap(), ["receiver"]);
        let path = only_file(directory);
        let good = fs::read_to_string(&path).unwrap();
        let fault_of = |text: &str| {
            fs::write(&path, text).unwrap();
            verify(directory, "receiver").unwrap().fault.map(|fault| (fault.line, fault.what))
        };
        assert_eq!(fault_of(&good), None);
        // Every byte of a record in the middle.
        let lines: Vec<&str> = good.lines().collect();
        for at in 0..lines[2].len() {
            let mut bytes = lines[2].as_bytes().to_vec();
            bytes[at] ^= 1;
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            let text = good.replace(lines[2], &changed);
            assert_eq!(fault_of(&text).map(|(line, _)| line), Some(3), "byte {at}");
        }
        let without = |n: usize| lines.iter().enumerate().filter(move |(i, _)| *i != n).map(|(_, l)| format!("{l}\n"));
        assert_eq!(fault_of(&without(3).collect::<String>()).unwrap().0, 4);
        assert!(fault_of(&without(0).collect::<String>()).unwrap().1.contains("records 1 to 1 are missing before"));
        assert!(fault_of(&without(6).collect::<String>()).unwrap().1.contains("records 7 to 7 are missing after"));
        assert!(fault_of("").unwrap().1.contains("records 1 to 7 are missing after"));
        // One that is well made itself, with a hash of its own.
        let (forged, _) = chain::line(
            &Head { seq: 2, hash: "f".repeat(64) },
            "receiver",
            &entry("x"),
            1,
            None,
            std::time::SystemTime::now(),
        )
        .unwrap();
        let text = good.replace(&format!("{}\n", lines[2]), &forged);
        assert!(fault_of(&text).unwrap().1.contains("does not follow"));
    }

    #[test]
    fn what_was_cut_off_stays_a_gap() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        write(directory, 5);
        let path = only_file(directory);
        let good = fs::read_to_string(&path).unwrap();
        let kept: String = good.lines().take(3).map(|line| format!("{line}\n")).collect();
        fs::write(&path, kept).unwrap();
        write(directory, 1);
        let fault = verify(directory, "receiver").unwrap().fault.unwrap();
        assert_eq!((fault.line, fault.what.as_str()), (4, "it has number 6, 4 is expected"));
        let lines = last_lines(directory, "receiver", 2).unwrap();
        assert!(lines[0].contains("records 4 to 5 are missing"), "{lines:?}");
    }

    #[test]
    fn a_line_torn_by_a_crash_is_cut_off_and_said() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        write(directory, 2);
        let path = only_file(directory);
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"seq\":3,\"ti");
        fs::write(&path, text).unwrap();
        write(directory, 1);
        let verdict = verify(directory, "receiver").unwrap();
        assert_eq!((verdict.records, verdict.fault), (4, None));
    }

    #[test]
    fn rotation_keeps_the_chain_and_deletion_shows() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let limits = Limits { file_bytes: 700, files: 3 };
        let audit = Audit::open_limited(directory, "receiver", limits).unwrap();
        let there = || files(directory, "receiver").unwrap();
        let mut deleted = 0;
        for number in 0..40 {
            let before: Vec<_> = there().into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect();
            audit.record(entry(&format!("web{number}")));
            assert_eq!(verify(directory, "receiver").unwrap().fault, None, "record {number}");
            // As if a crash had come before they were deleted.
            let gone: Vec<_> = before.iter().filter(|(_, path)| !path.exists()).collect();
            deleted += gone.len();
            gone.iter().for_each(|(bytes, path)| fs::write(path, bytes).unwrap());
            assert_eq!(verify(directory, "receiver").unwrap().fault, None, "record {number}");
            gone.iter().for_each(|(_, path)| fs::remove_file(path).unwrap());
        }
        assert!(deleted > 0);
        let files = there();
        assert!(files.len() <= 3, "{files:?}");
        drop(audit);
        let audit = Audit::open_limited(directory, "receiver", limits).unwrap();
        audit.record(entry("again"));
        assert_eq!(verify(directory, "receiver").unwrap().fault, None);
        fs::remove_file(&files[0]).unwrap();
        let fault = verify(directory, "receiver").unwrap().fault.unwrap();
        assert!(fault.what.contains("are missing before it"), "{fault}");
    }

    #[test]
    fn a_flood_of_refusals_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let begun = Instant::now();
        let audit = Audit::open(directory, "receiver").unwrap();
        for _ in 0..1000 {
            audit.refused(Entry::new("connect", "192.0.2.1", "", Outcome::Refused).because("no certificate"));
        }
        for number in 0..2000 {
            audit.refused(Entry::new("connect", &format!("caller {number}"), "", Outcome::Refused));
        }
        drop(audit);
        // The thread may hold the last reference for a moment.
        let (mut total, dropped) = (0, Instant::now());
        while dropped.elapsed() < Duration::from_secs(60) {
            let lines = last_lines(directory, "receiver", 10_000).unwrap();
            // Those that are counted apart, once and with their count, in each window: a slow disk takes several.
            let windows = 1 + begun.elapsed().as_secs() / REPEAT_WINDOW.as_secs();
            assert!(lines.len() as u64 <= windows * 2 * 300, "{} in {windows}", lines.len());
            total = lines.iter().map(|line| chain::parse(line).unwrap().0.count.unwrap_or(1)).sum();
            if total == 3000 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(total, 3000);
        assert_eq!(verify(directory, "receiver").unwrap().fault, None);
    }
}
