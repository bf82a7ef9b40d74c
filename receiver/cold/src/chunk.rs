//! Chunks: pieces of RAM blocks and disks, named by their content, compressed, sealed.
//!
//! The first segment of the object is an encoding (0: as it is, 1: zstd) and the content in it. What is shorter than a chunk
//! is the end of its array.

use crate::keys::DataKey;
use crate::manifest::Name;
use crate::sealed::{self, CHUNK, HEADER_BYTES, Place};
use crate::{CHUNK_BYTES, ColdError};

/// Level of zstd: beyond it the time doubles for some per cent.
const LEVEL: i32 = 3;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// The largest chunk object: content that does not compress.
pub const OBJECT_BYTES_MAX: u64 = CHUNK_BYTES_MAX as u64 + HEADER_BYTES as u64 + 64;
/// The smallest: the encoding and a byte, and the segment's tag.
pub const OBJECT_BYTES_MIN: u64 = HEADER_BYTES as u64 + 2 + 16;
/// The largest chunk that is read, whoever wrote it.
pub const CHUNK_BYTES_MAX: u32 = 16 * CHUNK_BYTES;

/// The object's name within the domain.
pub fn object(name: &Name) -> String {
    let hex = name.to_string();
    format!("chunks/{}/{hex}", &hex[..2])
}

/// The chunk that an object is, by its name below `chunks/`.
pub fn of_object(below: &str) -> Option<Name> {
    let (shard, hex) = below.split_once('/')?;
    if hex.get(..2)? == shard { hex.parse().ok() } else { None }
}

fn place<'a>(owner: &'a [u8; 16], name: &'a Name, shown: &'a str) -> Place<'a> {
    Place { kind: CHUNK, owner, name: &name.0, shown }
}

/// Makes the object of a chunk.
pub fn seal(key: &DataKey, owner: &[u8; 16], name: &Name, content: &[u8]) -> Result<Vec<u8>, ColdError> {
    let shown = object(name);
    let mut first = Vec::with_capacity(content.len() + 1);
    match zstd::bulk::compress(content, LEVEL) {
        Ok(packed) if packed.len() < content.len() => {
            first.push(ZSTD);
            first.extend_from_slice(&packed);
        }
        // What cannot be made smaller is stored as it is.
        _ => {
            first.push(RAW);
            first.extend_from_slice(content);
        }
    }
    sealed::seal(key, place(owner, name, &shown), first, &[])
}

/// The content of a chunk that has this many bytes, checked against its name.
pub fn open(
    key: &DataKey,
    owner: &[u8; 16],
    name: &Name,
    bytes: usize,
    object_bytes: &[u8],
) -> Result<Vec<u8>, ColdError> {
    let shown = object(name);
    let place = place(owner, name, &shown);
    let (first, rest) = sealed::open(key, place, object_bytes)?;
    let content = match first.split_first() {
        Some((&RAW, raw)) => raw.to_vec(),
        Some((&ZSTD, packed)) => {
            zstd::bulk::decompress(packed, bytes).map_err(|e| place.damaged(&format!("it does not unpack: {e}")))?
        }
        _ => return Err(place.damaged("its encoding is unknown")),
    };
    if content.len() != bytes || !rest.is_empty() {
        return Err(place.damaged(&format!("it has {} bytes, {bytes} are expected", content.len())));
    }
    if key.name(&content) != name.0 {
        return Err(place.damaged("its content does not have its name"));
    }
    Ok(content)
}
