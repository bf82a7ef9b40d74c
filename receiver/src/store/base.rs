//! A standby made of files that are at this site already, instead of by a stream: what a former owner's disks have.
//!
//! It is a seed like any other, of one part: its disks are filled by the caller while it is open, and it becomes the
//! standby in one step. It has no memory, like a guest that has shut down; a resync on top of it brings the rest.

use std::path::{Path, PathBuf};

use vmdr_codec::{Digest, Encoder, Layout, chunk_hash};
use vmdr_journal::{Kind, PartHead, PartTail};

use super::domain::Content;
use super::standby::disk_path;
use super::{Ingest, PointId, Store, StoreError};

/// What such a standby is made as.
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// The peer whose domain it is, from here on where it was nobody's.
    pub peer: &'a str,
    /// The domain's name.
    pub name: &'a str,
    /// The generation in which it will be received.
    pub generation: u64,
    /// Machine type and disks; no RAM blocks.
    pub layout: &'a Layout,
    /// The domain's XML.
    pub xml: &'a str,
    /// When its disks were last written.
    pub cut_unix_ns: u64,
}

/// Writes the content of a disk, by its index in the layout, to the image that is there, and syncs it.
pub type Fill<'a> = &'a mut dyn FnMut(usize, &Path) -> std::io::Result<()>;

impl Store {
    /// Makes the standby of a domain out of what `fill` brings. What was its standby before is kept, or goes, as with any
    /// seed; nothing of it is changed before the new one is whole.
    pub fn seed_from_files(&self, uuid: &str, base: &Base<'_>, fill: Fill<'_>) -> Result<PointId, StoreError> {
        match self.set_frozen(uuid, false) {
            Err(StoreError::Unknown(_)) | Ok(()) => {}
            Err(error) => return Err(error),
        }
        let mut ingest = self.open_stream(uuid, base.name, base.generation)?;
        let unusable = |what: String| StoreError::Refused { domain: uuid.to_owned(), what };
        // Before anything of it is durable: afterwards it would be known to belong to somebody, and not to whom.
        if !self.claim(uuid, base.peer)? {
            return Err(unusable("it belongs to another peer".to_owned()));
        }
        let epoch = ingest.position().epoch + 1;
        ingest.begin(PartHead { generation: base.generation, epoch, part: 0, kind: Kind::Seed })?;
        let mut encoder = Encoder::new();
        encoder.layout(base.layout).map_err(|error| unusable(error.to_string()))?;
        encoder.domain_xml(base.xml).map_err(|error| unusable(error.to_string()))?;
        let counts = encoder.finish();
        let (mut chunks, mut payload_bytes, mut digest) = (0, 0, Digest::new());
        while let Some(payload) = encoder.take_full() {
            digest.update(&payload);
            payload_bytes += payload.len() as u64;
            let hash = chunk_hash(&payload);
            ingest.chunk(chunks, payload.into(), hash)?;
            chunks += 1;
        }
        // Whoever fills an image of a domain that is encrypted would write it in the clear. Left empty it is right too: the resync
        // then sends all that is not zero.
        let images = if ingest.is_sealed() { Vec::new() } else { ingest.seed_images(base.layout)? };
        for (index, image) in images.into_iter().enumerate() {
            let io = |source: std::io::Error| {
                let what = format!("fill {}: {source}", image.display());
                match source.kind() {
                    std::io::ErrorKind::StorageFull => StoreError::Full { domain: uuid.to_owned(), what },
                    _ => StoreError::Io { domain: uuid.to_owned(), what },
                }
            };
            fill(index, &image).map_err(io)?;
        }
        let digest = digest.halves();
        let cut_unix_ns = base.cut_unix_ns;
        ingest.end(PartTail { chunks, payload_bytes, digest, last: true, cut_unix_ns, application: false, counts })?;
        Ok(PointId { generation: base.generation, epoch })
    }
}

impl Ingest {
    fn is_sealed(&self) -> bool {
        self.domain.sealed
    }

    /// The images of the disks of the seed that is open. They are written past what makes checksums, which are made later.
    fn seed_images(&self, layout: &Layout) -> Result<Vec<PathBuf>, StoreError> {
        let mut ingest = self.domain.ingest();
        let dir = match ingest.open.as_mut().map(|open| &mut open.content) {
            Some(Content::Seed { files, .. }) => {
                files.drop_sums().map_err(|error| self.domain.failure(error))?;
                files.dir().to_owned()
            }
            _ => return Err(StoreError::Superseded(self.domain.id.clone())),
        };
        Ok(layout.disks.iter().map(|disk| disk_path(&dir, &disk.target)).collect())
    }
}
