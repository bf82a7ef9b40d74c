//! The checksums that wire and journal carry beside the payloads.

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// XXH3-64 of a payload, as `Chunk.xxh3` on the wire.
pub fn chunk_hash(payload: &[u8]) -> u64 {
    xxh3_64(payload)
}

/// XXH3-128 over all payloads of a part in order, as `PartEnd.digest_low` and `digest_high` on the wire.
#[derive(Clone, Default)]
pub struct Digest(Box<Xxh3Default>);

impl Digest {
    /// A digest of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a payload.
    pub fn update(&mut self, payload: &[u8]) {
        self.0.update(payload);
    }

    /// The digest of all payloads so far: its low and its high half.
    pub fn halves(&self) -> (u64, u64) {
        let digest = self.0.digest128();
        (digest as u64, (digest >> 64) as u64)
    }

    /// Starts anew.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({:032x})", self.0.digest128())
    }
}
