//! The book of a domain's drills: the one that is under way or kept, and how the last ones went. On disk beside the standby
//! (`drill/drills.json`), so that whoever comes after a crash knows what to remove.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmdr_daemon::durable;

use super::process::Process;
use crate::ready::Checked;

/// What a reader of the book must understand.
///
/// Version history, one sentence each:
///   1  first version.
const VERSION: u32 = 1;
/// Directory of the book, and of the files of drills, in the directory of the domain.
pub const DIRECTORY: &str = "drill";
const FILE: &str = "drills.json";
/// Reports that are kept.
const REPORTS_MAX: usize = 16;

/// How a drill ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It has not ended.
    UnderWay,
    /// The copy ran, and every check passed.
    Passed,
    /// It did not.
    Failed,
    /// It was ended before its time, for no fault of the copy.
    Ended,
}

impl Outcome {
    /// A word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::UnderWay => "under way",
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }
}

/// How a drill went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its identity: six hexadecimal digits.
    pub id: String,
    /// GENERATION-EPOCH; empty: it did not get as far.
    pub point: String,
    /// Wall clock of the protected host at the point's cut.
    pub cut_unix_ns: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed or was ended; empty: see the checks.
    pub error: String,
    /// Nobody asked for it.
    pub scheduled: bool,
    /// When it began.
    pub started_unix_ns: u64,
    /// When it ended; 0: it has not.
    pub ended_unix_ns: u64,
    /// Copying the point, which only a drill has to do.
    pub copy_seconds: f64,
    /// The rest, up to the running copy; nothing: it never ran.
    pub rto_seconds: Option<f64>,
    /// Bytes of the point that were written.
    pub copied_bytes: u64,
    /// Bytes of it that are shared with the standby.
    pub shared_bytes: u64,
    /// In the order in which they were made.
    pub checks: Vec<Checked>,
}

/// An identity for a drill.
pub fn new_id() -> String {
    let mut id = Uuid::new_v4().simple().to_string();
    id.truncate(6);
    id
}

impl Report {
    /// Of a drill that begins.
    pub fn begun(id: String, scheduled: bool, started_unix_ns: u64) -> Self {
        Report {
            id,
            point: String::new(),
            cut_unix_ns: 0,
            outcome: Outcome::UnderWay,
            error: String::new(),
            scheduled,
            started_unix_ns,
            ended_unix_ns: 0,
            copy_seconds: 0.0,
            rto_seconds: None,
            copied_bytes: 0,
            shared_bytes: 0,
            checks: Vec::new(),
        }
    }
}

/// What there is of a drill that has to be removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Current {
    /// Its identity, and the name of its directory.
    pub id: String,
    /// The domain of its copy.
    pub copy_name: String,
    /// The same.
    pub copy_uuid: Uuid,
    /// Its bridges.
    pub bridges: Vec<String>,
    /// Its QEMU, for the case that libvirt does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<Process>,
    /// Where its files are, of a domain that is encrypted at rest; otherwise beside this book.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear: Option<PathBuf>,
    /// It is over, and its copy runs on until it is ended.
    pub kept: bool,
    /// How it goes.
    pub report: Report,
}

/// The book of one domain.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Book {
    version: u32,
    /// The drill of which there may be something.
    pub current: Option<Current>,
    /// Those before it, newest first.
    pub reports: Vec<Report>,
}

/// Why a book cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The state directory failed.
    #[error("{what} {path:?}: {source}")]
    Io {
        /// A verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// It does not say what a book says.
    #[error(
        "the book of drills {path:?} cannot be understood: {why}; end what is left of a drill by hand (`virsh list`, \
         names with -drill-), and remove the file"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// The directory of drills of the domain whose standby is in `domain_directory`.
pub fn directory(domain_directory: &Path) -> PathBuf {
    domain_directory.join(DIRECTORY)
}

impl Book {
    /// Reads it; an empty one, if there is none.
    pub fn read(domain_directory: &Path) -> Result<Self, RecordError> {
        let path = directory(domain_directory).join(FILE);
        let read = durable::read(&path);
        let bytes =
            read.map_err(|source| RecordError::Io { what: "read the book of drills", path: path.clone(), source })?;
        let Some(bytes) = bytes else { return Ok(Self::default()) };
        let damaged = |why: String| RecordError::Damaged { path: path.clone(), why };
        let book: Self = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if book.version != VERSION {
            return Err(damaged(format!("it has version {}, this vmdr knows {VERSION}", book.version)));
        }
        Ok(book)
    }

    /// Makes it the durable truth. The domain's directory is there: it may have been forgotten meanwhile.
    pub fn write(&mut self, domain_directory: &Path) -> Result<(), RecordError> {
        self.version = VERSION;
        self.reports.truncate(REPORTS_MAX);
        let path = directory(domain_directory).join(FILE);
        let failed = |source| RecordError::Io { what: "write the book of drills", path: path.clone(), source };
        if !domain_directory.is_dir() {
            return Err(failed(io::ErrorKind::NotFound.into()));
        }
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| RecordError::Damaged { path: path.clone(), why: e.to_string() })?;
        text.push(b'\n');
        durable::write(&path, &text).map_err(failed)
    }

    /// The drill is over, and nothing of it is left.
    pub fn close(&mut self, report: Report) {
        self.current = None;
        self.reports.retain(|of| of.id != report.id);
        self.reports.insert(0, report);
        self.reports.truncate(REPORTS_MAX);
    }

    /// The drill that is under way or kept, or else the last one.
    pub fn newest(&self) -> Option<&Report> {
        self.current.as_ref().map(|current| &current.report).or(self.reports.first())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A report.
    pub fn report(id: &str) -> Report {
        Report {
            id: id.to_owned(),
            point: "3-9".to_owned(),
            cut_unix_ns: 7,
            outcome: Outcome::Passed,
            error: String::new(),
            scheduled: false,
            started_unix_ns: 1,
            ended_unix_ns: 2,
            copy_seconds: 0.5,
            rto_seconds: Some(1.5),
            copied_bytes: 5,
            shared_bytes: 6,
            checks: vec![Checked { check: "runs".to_owned(), passed: true, said: "yes".to_owned(), seconds: 5.0 }],
        }
    }

    #[test]
    fn what_is_written_is_read_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Book::read(dir.path()).unwrap(), Book::default());
        let mut book = Book::default();
        let current = Current {
            id: "0a0b0c".to_owned(),
            copy_name: "web1-drill-0a0b0c".to_owned(),
            copy_uuid: Uuid::from_u128(7),
            bridges: vec!["vmdr-d0a0b0c0".to_owned()],
            qemu: None,
            clear: None,
            kept: false,
            report: Report { outcome: Outcome::UnderWay, ..report("0a0b0c") },
        };
        book.current = Some(current.clone());
        book.write(dir.path()).unwrap();
        let text = std::fs::read_to_string(directory(dir.path()).join(FILE)).unwrap();
        assert!(!text.contains("qemu") && !text.contains("clear"), "as before: {text}");
        let mut read = Book::read(dir.path()).unwrap();
        assert_eq!((read.current.as_ref(), read.newest().unwrap().outcome), (Some(&current), Outcome::UnderWay));
        for n in 0..REPORTS_MAX + 3 {
            read.close(report(&n.to_string()));
        }
        read.write(dir.path()).unwrap();
        let read = Book::read(dir.path()).unwrap();
        assert_eq!((read.reports.len(), read.reports[0].id.as_str()), (REPORTS_MAX, "18"));
        assert_eq!((read.current.is_none(), read.newest().unwrap().id.as_str()), (true, "18"));
    }

    #[test]
    fn a_book_that_is_not_understood_is_not_guessed_at() {
        let dir = tempfile::tempdir().unwrap();
        Book::default().write(dir.path()).unwrap();
        let file = directory(dir.path()).join(FILE);
        let good = std::fs::read_to_string(&file).unwrap();
        for (bad, what) in [(good.replace(": 1", ": 2"), "version 2"), (good[..5].to_owned(), "EOF")] {
            std::fs::write(&file, bad).unwrap();
            let error = Book::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("-drill-"), "{error}");
        }
        assert!(Book::default().write(&dir.path().join("forgotten")).is_err());
    }
}
