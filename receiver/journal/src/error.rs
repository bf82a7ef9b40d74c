//! What can go wrong with a journal or control record.

use std::io;
use std::path::{Path, PathBuf};

/// What went wrong with a journal or control record.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// An earlier sync or truncation failed: what is on disk is not known until the journal is opened again.
    #[error("the journal in {} failed earlier and must be opened again: {why}", path.display())]
    Poisoned {
        /// Where the journal is.
        path: PathBuf,
        /// The first failure.
        why: String,
    },
    /// A control record or journal entry is not what was written.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In which way.
        what: String,
    },
    /// A file was written by a version that this one does not understand.
    #[error("{} has format version {found}, this program reads {}", path.display(), crate::FORMAT_VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A file belongs to another domain than the directory it is in.
    #[error("{} belongs to domain {found}, the directory to {expected}", path.display())]
    WrongDomain {
        /// The file.
        path: PathBuf,
        /// The UUID that was expected.
        expected: String,
        /// The UUID in the file.
        found: String,
    },
}

impl JournalError {
    /// For `map_err`: wraps what the operating system says about `action` on `path`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
        let path = path.to_owned();
        move |source| JournalError::Io { action, path, source }
    }

    /// Whether what was asked for is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, JournalError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether it is only for lack of space, so that the same may succeed later. After a failed sync it may not, whatever
    /// the reason: what was to be synced is then not known to be anywhere.
    pub fn is_full(&self) -> bool {
        match self {
            JournalError::Io { action, source, .. } if *action != "sync" => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}
