//! With which peer this host shares a domain: a file each.
//!
//! The agent notes, before anything of a domain is sent, which peer it goes to: that one, and no other, may later bring it home,
//! which fences what is here of it. The receiver of the same host reads the note. The operator can write one as well
//! (`vmdr peers grant`), for a domain of which nothing is stored here.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{TrustError, files};

/// What is noted of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partner {
    /// The peer's id.
    pub peer: String,
    /// The operator has said so, and not a protection: it holds also where this host has no record of the domain.
    #[serde(default)]
    pub granted: bool,
}

/// The notes of a host. Who changes one holds the lock of the identity.
#[derive(Debug, Clone)]
pub(crate) struct Partners {
    directory: PathBuf,
}

impl Partners {
    pub fn open(identity: &Path) -> Result<Self, TrustError> {
        let directory = identity.join("domains");
        files::make_directory(&directory)?;
        Ok(Self { directory })
    }

    /// What is noted of a domain. `uuid` is one, in its ordinary form.
    pub fn get(&self, uuid: &str) -> Result<Option<Partner>, TrustError> {
        let path = self.path(uuid)?;
        let Some(bytes) = files::read(&path)? else { return Ok(None) };
        let damaged = |error: serde_json::Error| TrustError::Damaged {
            path: path.clone(),
            what: format!("{error}: remove it, `vmdr peers grant` writes another one"),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    pub fn set(&self, uuid: &str, partner: &Partner) -> Result<(), TrustError> {
        let bytes = serde_json::to_vec(partner).map_err(|error| TrustError::Certificate(error.to_string()))?;
        files::replace(&self.path(uuid)?, &bytes)
    }

    pub fn remove(&self, uuid: &str) -> Result<(), TrustError> {
        let path = self.path(uuid)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(TrustError::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    fn path(&self, uuid: &str) -> Result<PathBuf, TrustError> {
        let good = uuid.len() == 36 && uuid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
        if !good {
            return Err(TrustError::Refused(format!("{uuid:?} is not the UUID of a domain")));
        }
        Ok(self.directory.join(format!("{}.json", uuid.to_ascii_lowercase())))
    }
}
