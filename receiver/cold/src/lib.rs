//! The cold tier: recovery points in object storage, encrypted.
//!
//! What this crate guarantees:
//!
//! - A point is offered only when it is whole: its manifest is written last, after every chunk that it lists.
//! - What is read back is what was written, or an error that names the object: every chunk and manifest is sealed
//!   (AES-256-GCM) under a key and with associated data that say which domain and which name it belongs to, and a chunk's
//!   name is a keyed hash of its content, which is compared again. An object in another's place is refused.
//! - Without the key nothing of the guest can be read or guessed from the bucket: content is sealed, names are keyed
//!   hashes. What it shows: the domain's UUID, how many objects there are, how large (after compression) and from when,
//!   and which chunks came with which export.
//! - Only chunks that the bucket lacks cross the wire; what the caller says has not changed since an exported point is not
//!   even read.
//! - A chunk is deleted only when no manifest needs it and no export can be relying on it ([`prune`]).
//! - Memory is bounded: a few chunks of 1 MiB under way, 32 bytes for each chunk of the manifest at hand, and some 50 for
//!   each chunk in the bucket while an export or a prune runs. So is parallelism, bandwidth, and how often is retried.
//! - Nothing here knows the receiver's store: an export reads a [`Source`], an import gives pieces ([`Restore`]).
//!
//! `docs/cold.md` has the objects byte by byte. Its keys are those of [`vmdr_keys`].

pub use vmdr_keys as keys;

mod bucket;
mod chunk;
mod error;
mod export;
mod import;
mod limit;
mod manifest;
mod mark;
mod prune;
mod sealed;
mod vault;

pub use bucket::{Bucket, Location};
pub use error::ColdError;
pub use export::{ExportOptions, ExportProgress, ExportReport, Range, Source, SourceError, export};
pub use import::{Piece, Restore, restore};
pub use manifest::{Array, ArrayChunks, Guest, Head, Manifest, Name};
pub use prune::{PruneOptions, PruneReport, Tier, prune};
pub use vault::{StoredPoint, Vault, domains, has_domain};

/// Bytes of a chunk, but an array's last: small enough that a changed page costs little, large enough that requests do not
/// cost more than bytes.
pub const CHUNK_BYTES: u32 = 1 << 20;
