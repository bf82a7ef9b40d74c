//! The activation record: how far the activation of a domain has come, on disk beside its standby.
//!
//! It is written before each step, whole or not at all, so that whoever finds it after a crash knows what may have been
//! done and never does it twice:
//!
//! ```text
//! (none) -> Planned    the generation that will be raised is chosen; nothing has happened
//!        -> Fenced     the generation is raised: no host's stream can change the standby any more
//!        -> Restoring  libvirt may be starting the guest, on the overlays of this attempt
//!        -> Running    the guest has run here; it is never restored again from here
//! ```
//! A restore that fails goes back to Fenced. Each attempt has overlays of its own, and those of an earlier one are only
//! deleted when the guest was seen running on others or is known not to run at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmdr_daemon::durable;

/// What a reader of the record must understand.
///
/// Version history, one sentence each:
///   1  first version.
const VERSION: u32 = 1;
/// Directory of the record and of the overlays, in the directory of the domain.
pub const DIRECTORY: &str = "active";
const FILE: &str = "activation.json";
const ATTEMPT: &str = "attempt-";

/// The recovery point that is or was activated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointId {
    /// Generation in which it was taken.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Wall clock of the protected host at the cut.
    pub cut_unix_ns: u64,
}

/// How an overlay looked before any guest could have written to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pristine {
    /// The overlay.
    pub path: PathBuf,
    /// Bytes of the file.
    pub bytes: u64,
    /// When it was written last.
    pub modified_unix_ns: i64,
}

/// How far an activation has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// This generation will be the standby's.
    Planned {
        /// The generation to raise to.
        generation: u64,
    },
    /// The standby's generation is raised, its recovery point fixed.
    Fenced {
        /// The raised generation.
        generation: u64,
        /// What will be activated.
        point: PointId,
        /// The last attempt that was made, 0: none.
        attempt: u32,
    },
    /// libvirt was or will be asked.
    Restoring {
        /// The raised generation.
        generation: u64,
        /// What is being activated.
        point: PointId,
        /// Number of this attempt, from 1; its directory has this name.
        attempt: u32,
        /// The overlays of this attempt.
        overlays: Vec<Pristine>,
    },
    /// The guest ran.
    Running {
        /// The raised generation.
        generation: u64,
        /// What was activated.
        point: PointId,
        /// The attempt whose overlays the guest has.
        attempt: u32,
        /// When it was seen running.
        running_unix_ns: u64,
        /// From the request to the running guest; unknown if the receiver was restarted in between.
        rto_seconds: Option<f64>,
        /// Age of the point at the request.
        lost_seconds: f64,
    },
}

impl Step {
    /// The generation that was or will be raised.
    pub fn generation(&self) -> u64 {
        match self {
            Step::Planned { generation }
            | Step::Fenced { generation, .. }
            | Step::Restoring { generation, .. }
            | Step::Running { generation, .. } => *generation,
        }
    }

    /// The number of the last attempt, 0: none.
    pub fn last_attempt(&self) -> u32 {
        match self {
            Step::Planned { .. } => 0,
            Step::Fenced { attempt, .. } | Step::Restoring { attempt, .. } | Step::Running { attempt, .. } => *attempt,
        }
    }
}

/// The record of one domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The domain.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// How far it has come.
    pub step: Step,
}

/// Why a record cannot be used.
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
    /// It does not say what a record says.
    #[error(
        "the activation record {path:?} cannot be understood: {why}; see with `virsh list --all` whether the guest runs \
         here, then repair or move the file away"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Where the record of a domain lies, and its overlays.
#[derive(Debug, Clone)]
pub struct ActiveDirectory {
    path: PathBuf,
}

impl ActiveDirectory {
    /// That of the domain whose standby is in `domain_directory`.
    pub fn of(domain_directory: &Path) -> Self {
        ActiveDirectory { path: domain_directory.join(DIRECTORY) }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its files are: beside the record, or where the link there points ([`super::clear`]).
    pub fn files(&self) -> PathBuf {
        super::clear::linked(&self.path).unwrap_or_else(|| self.path.clone())
    }

    /// The directory of an attempt.
    pub fn attempt(&self, attempt: u32) -> PathBuf {
        self.files().join(format!("{ATTEMPT}{attempt}"))
    }

    /// The numbers of the attempts that have a directory.
    pub fn attempts(&self) -> Result<Vec<u32>, RecordError> {
        let files = self.files();
        let failed = |source| RecordError::Io { what: "list", path: files.clone(), source };
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&files).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            numbers.extend(name.to_str().and_then(|n| n.strip_prefix(ATTEMPT)).and_then(|n| n.parse::<u32>().ok()));
        }
        Ok(numbers)
    }

    /// The record, if there is one.
    pub fn read(&self, uuid: Uuid) -> Result<Option<Record>, RecordError> {
        let path = self.path.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(RecordError::Io { what: "read the activation record", path, source }),
        };
        let damaged = |why: String| RecordError::Damaged { path: path.clone(), why };
        let record: Record = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("it has version {}, this vmdr knows {VERSION}", record.version)));
        }
        if record.uuid != uuid {
            return Err(damaged(format!("it is of domain {}, not of {uuid}", record.uuid)));
        }
        Ok(Some(record))
    }

    /// Makes `step` the durable truth.
    pub fn write(&self, uuid: Uuid, name: &str, step: &Step) -> Result<(), RecordError> {
        let path = self.path.join(FILE);
        let record = Record { version: VERSION, uuid, name: name.to_owned(), step: step.clone() };
        let mut text = serde_json::to_string_pretty(&record)
            .map_err(|e| RecordError::Damaged { path: path.clone(), why: e.to_string() })?;
        text.push('\n');
        durable::write(&path, text.as_bytes()).map_err(|source| RecordError::Io {
            what: "write the activation record",
            path,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINT: PointId = PointId { generation: 1, epoch: 9, cut_unix_ns: 77 };

    #[test]
    fn what_is_written_is_read_and_replaces_what_was() {
        let dir = tempfile::tempdir().unwrap();
        let active = ActiveDirectory::of(dir.path());
        let uuid = Uuid::from_u128(7);
        assert_eq!(active.read(uuid).unwrap(), None);
        let overlay = Pristine { path: "/x".into(), bytes: 5, modified_unix_ns: -3 };
        for step in [
            Step::Planned { generation: 2 },
            Step::Fenced { generation: 2, point: POINT, attempt: 0 },
            Step::Restoring { generation: 2, point: POINT, attempt: 1, overlays: vec![overlay] },
            Step::Running {
                generation: 2,
                point: POINT,
                attempt: 1,
                running_unix_ns: 5,
                rto_seconds: Some(0.5),
                lost_seconds: 1.5,
            },
        ] {
            active.write(uuid, "web", &step).unwrap();
            let record = active.read(uuid).unwrap().unwrap();
            assert_eq!((record.step, record.name.as_str()), (step, "web"));
        }
    }

    #[test]
    fn a_record_that_is_not_ours_is_not_guessed_at() {
        let dir = tempfile::tempdir().unwrap();
        let active = ActiveDirectory::of(dir.path());
        let uuid = Uuid::from_u128(7);
        active.write(uuid, "web", &Step::Planned { generation: 2 }).unwrap();
        let error = active.read(Uuid::from_u128(8)).unwrap_err().to_string();
        assert!(error.contains("is of domain"), "{error}");
        let file = active.path().join(FILE);
        let good = fs::read_to_string(&file).unwrap();
        for (bad, what) in [
            (good.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (good.replace("planned", "plan"), "unknown variant"),
            (good[..good.len() / 2].to_owned(), "EOF"),
        ] {
            fs::write(&file, bad).unwrap();
            let error = active.read(uuid).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("virsh list"), "{error}");
        }
    }
}
