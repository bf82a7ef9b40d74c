//! Where in a sealed file what is.
//!
//! A file is groups of 64 blocks, one after another. A group has two sides, each a page of 64 entries and then 64 slots of 4 KiB:
//! ```text
//! entries of side 0 | 64 slots | entries of side 1 | 64 slots
//! ```
//! An entry (64 bytes) is salt, tag, number (u64), length (u32), zeroes. One that is all zero: there is no such version.
//! Of an image the second side is a hole, but where blocks were written in part.

use std::ops::Range;
use std::path::Path;

use vmdr_keys::{SALT_BYTES, TAG_BYTES};

/// Bytes of a block, and of a page of entries.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of an entry.
pub(crate) const ENTRY: usize = 64;
/// Blocks of a group.
pub(crate) const GROUP_BLOCKS: u64 = (BLOCK / ENTRY) as u64;
/// Bytes of a side of a group.
pub(crate) const SIDE_BYTES: u64 = (GROUP_BLOCKS + 1) * BLOCK as u64;
/// Bytes of a group.
pub(crate) const GROUP_BYTES: u64 = 2 * SIDE_BYTES;
/// Sides of a block.
pub(crate) const SIDES: u64 = 2;

/// What a file is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An image: whole blocks are written in place.
    Image,
    /// Anything else.
    Other,
}

impl Kind {
    pub fn of(path: &Path) -> Self {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.ends_with(".img") || name.ends_with(".raw") { Kind::Image } else { Kind::Other }
    }

    pub fn byte(self) -> u8 {
        match self {
            Kind::Image => 0,
            Kind::Other => 1,
        }
    }
}

/// Says which version of a block there is on a side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub salt: [u8; SALT_BYTES],
    pub tag: [u8; TAG_BYTES],
    pub number: u64,
    pub length: u32,
}

impl Entry {
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.iter().all(|byte| *byte == 0) {
            return None;
        }
        let (mut salt, mut tag, mut number, mut length) = ([0; SALT_BYTES], [0; TAG_BYTES], [0; 8], [0; 4]);
        salt.copy_from_slice(&bytes[..16]);
        tag.copy_from_slice(&bytes[16..32]);
        number.copy_from_slice(&bytes[32..40]);
        length.copy_from_slice(&bytes[40..44]);
        Some(Self { salt, tag, number: u64::from_le_bytes(number), length: u32::from_le_bytes(length) })
    }

    pub fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..16].copy_from_slice(&self.salt);
        bytes[16..32].copy_from_slice(&self.tag);
        bytes[32..40].copy_from_slice(&self.number.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }
}

pub(crate) fn entry_at(block: u64, side: u64) -> u64 {
    block / GROUP_BLOCKS * GROUP_BYTES + side * SIDE_BYTES + block % GROUP_BLOCKS * ENTRY as u64
}

pub(crate) fn slot_at(block: u64, side: u64) -> u64 {
    let group = block / GROUP_BLOCKS * GROUP_BYTES + side * SIDE_BYTES;
    group + BLOCK as u64 * (1 + block % GROUP_BLOCKS)
}

/// Splits neighbouring blocks where a group ends.
pub(crate) fn by_group(blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = blocks.start;
    std::iter::from_fn(move || {
        let end = ((at / GROUP_BLOCKS + 1) * GROUP_BLOCKS).min(blocks.end);
        let range = at..end;
        at = end.max(at);
        (!range.is_empty()).then_some(range)
    })
}
