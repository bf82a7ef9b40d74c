//! The mark of a prune: which chunks are going to be deleted. See [`crate::prune`] for why it is safe.
//!
//! The object `UUID/prune`, sealed. Its first segment is JSON (who, since when, which stage), its body the names of the chunks, 32
//! bytes each.

use serde::{Deserialize, Serialize};

use crate::error::ColdError;
use crate::manifest::Name;
use crate::sealed::{self, MARK, Place};
use crate::vault::{Vault, unix_ns};

/// Chunks in a mark, at most: what is more waits for the next prune.
pub const DOOMED_MAX: usize = 1 << 20;
const MARK_BYTES_MAX: u64 = 64 << 20;
/// The object's name within the domain.
const MARK_OBJECT: &str = "prune";

/// How far a prune is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Announced: nothing is deleted yet.
    Marked,
    /// Being deleted.
    Sweeping,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct About {
    id: String,
    owner: String,
    stage: Stage,
    /// When it was announced; 0 in the announcement itself, which does not know yet.
    marked_unix_ns: u64,
}

/// Chunks that are going to be deleted.
#[derive(Debug, Clone)]
pub struct Mark {
    /// Another for each prune.
    pub id: String,
    /// Whose it is.
    pub owner: String,
    /// How far it is.
    pub stage: Stage,
    /// When it was announced, by the storage's clock. A chunk that was written since is not deleted.
    pub marked_unix_ns: u64,
    /// When its object was written, by the storage's clock.
    pub written_unix_ns: u64,
    /// The chunks.
    pub doomed: Vec<Name>,
}

impl Vault {
    /// The mark, if there is one.
    pub(crate) async fn mark(&self) -> Result<Option<Mark>, ColdError> {
        let name = self.object(MARK_OBJECT);
        // In this order: should it be replaced in between, its time is too early and nothing is taken for older than it is.
        let Some(meta) = self.bucket.head(&name).await? else { return Ok(None) };
        let Some(bytes) = self.bucket.get(&name, MARK_BYTES_MAX).await? else { return Ok(None) };
        let owner = self.uuid.into_bytes();
        let place = Place { kind: MARK, owner: &owner, name: MARK_OBJECT.as_bytes(), shown: &name };
        let (first, body) = sealed::open(&self.key, place, &bytes)?;
        let about: About = serde_json::from_slice(&first).map_err(|e| place.damaged(&e.to_string()))?;
        if body.len() % 32 != 0 {
            return Err(place.damaged("a name is cut short"));
        }
        let doomed = body.chunks_exact(32).filter_map(|name| name.try_into().ok().map(Name)).collect();
        let written_unix_ns = unix_ns(&meta);
        let marked_unix_ns = if about.marked_unix_ns == 0 { written_unix_ns } else { about.marked_unix_ns };
        let About { id, owner, stage, .. } = about;
        Ok(Some(Mark { id, owner, stage, marked_unix_ns, written_unix_ns, doomed }))
    }

    /// Writes a mark, or a mark's next stage.
    pub(crate) async fn put_mark(&self, mark: &Mark) -> Result<(), ColdError> {
        let name = self.object(MARK_OBJECT);
        let owner = self.uuid.into_bytes();
        let place = Place { kind: MARK, owner: &owner, name: MARK_OBJECT.as_bytes(), shown: &name };
        let about = About {
            id: mark.id.clone(),
            owner: mark.owner.clone(),
            stage: mark.stage,
            marked_unix_ns: mark.marked_unix_ns,
        };
        let first = serde_json::to_vec(&about).map_err(|e| place.damaged(&e.to_string()))?;
        let mut body = Vec::with_capacity(mark.doomed.len() * 32);
        mark.doomed.iter().for_each(|name| body.extend_from_slice(&name.0));
        let object = sealed::seal(&self.key, place, first, &body)?;
        self.bucket.put(&name, object.into()).await
    }

    /// Whether the mark is the one of this identity still. A sweep that was slow may have been taken for broken off, and
    /// its mark replaced.
    pub(crate) async fn is_marked(&self, id: &str) -> Result<bool, ColdError> {
        Ok(self.mark().await?.is_some_and(|mark| mark.id == id))
    }

    /// Takes the mark away: the prune is over. Another's that has taken its place stays.
    pub(crate) async fn delete_mark(&self, id: &str) -> Result<(), ColdError> {
        if !self.is_marked(id).await? {
            return Ok(());
        }
        self.bucket.delete(&self.object(MARK_OBJECT)).await
    }
}
