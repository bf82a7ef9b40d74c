//! The form of every sealed object: a header in the clear, then sealed segments.
//!
//! | offset | type | meaning |
//! | --- | --- | --- |
//! | 0 | 8 bytes | magic: what kind of object |
//! | 8 | u32 | format version, 1 |
//! | 12 | u32 | bytes in the first segment, its tag not counted |
//! | 16 | 16 bytes | which data key |
//! | 32 | 16 bytes | salt, fresh for each writing |
//! | 48 | | segments, each with a tag of 16 bytes |
//!
//! Numbers are little-endian. All of the header is in the associated data of every segment.

use crate::ColdError;
use crate::keys::{DataKey, Identity, KEY_ID_BYTES, KeyId, SALT_BYTES, Sealer, TAG_BYTES, salt};

/// Version of the formats.
pub const VERSION: u32 = 1;
/// Bytes before the first segment.
pub const HEADER_BYTES: usize = 48;
/// Bytes of a segment after the first, but the last.
pub const SEGMENT_BYTES: usize = 1 << 20;

/// A kind of object.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// How it begins.
    pub magic: &'static [u8; 8],
    /// Its name in keys and associated data.
    pub name: &'static str,
}

/// A chunk of memory or disk.
pub const CHUNK: Kind = Kind { magic: b"VMDRCHK\0", name: "chunk" };
/// A recovery point.
pub const MANIFEST: Kind = Kind { magic: b"VMDRPNT\0", name: "manifest" };
/// What is being pruned.
pub const MARK: Kind = Kind { magic: b"VMDRPRN\0", name: "prune" };

/// Where an object belongs, for keys and messages.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The kind.
    pub kind: Kind,
    /// The domain's UUID.
    pub owner: &'a [u8; 16],
    /// The object's name within the domain.
    pub name: &'a [u8],
    /// For messages.
    pub shown: &'a str,
}

impl Place<'_> {
    fn key_error(&self, source: crate::keys::KeyError) -> ColdError {
        match source {
            crate::keys::KeyError::Forged => self.damaged("it does not open under its key"),
            source => ColdError::Key { object: self.shown.to_owned(), source },
        }
    }

    /// It is not what was written.
    pub fn damaged(&self, what: &str) -> ColdError {
        ColdError::Damaged { object: self.shown.to_owned(), what: what.to_owned() }
    }

    fn sealer(&self, key: &DataKey, header: &[u8], salt: &[u8; SALT_BYTES]) -> Result<Sealer, ColdError> {
        let of = Identity { owner: self.owner, kind: self.kind.name.as_bytes(), name: self.name, header };
        key.sealer(of, salt).map_err(|e| self.key_error(e))
    }
}

/// Makes an object of a first segment, and a body that is cut into further ones. An empty body has none.
pub fn seal(key: &DataKey, place: Place<'_>, first: Vec<u8>, body: &[u8]) -> Result<Vec<u8>, ColdError> {
    let salt = salt().map_err(|e| place.key_error(e))?;
    let mut object = Vec::with_capacity(HEADER_BYTES + first.len() + body.len() + 2 * TAG_BYTES);
    object.extend_from_slice(place.kind.magic);
    object.extend_from_slice(&VERSION.to_le_bytes());
    object.extend_from_slice(&(first.len() as u32).to_le_bytes());
    object.extend_from_slice(&key.id().0);
    object.extend_from_slice(&salt);
    let mut sealer = place.sealer(key, &object, &salt)?;
    let mut segment = first;
    sealer.seal(&mut segment, body.is_empty()).map_err(|e| place.key_error(e))?;
    object.extend_from_slice(&segment);
    let count = body.len().div_ceil(SEGMENT_BYTES);
    for (i, piece) in body.chunks(SEGMENT_BYTES).enumerate() {
        segment.clear();
        segment.extend_from_slice(piece);
        sealer.seal(&mut segment, i + 1 == count).map_err(|e| place.key_error(e))?;
        object.extend_from_slice(&segment);
    }
    Ok(object)
}

/// What an object's header says, checked.
fn header(key: &DataKey, place: Place<'_>, object: &[u8]) -> Result<([u8; SALT_BYTES], usize), ColdError> {
    let Some(header) = object.get(..HEADER_BYTES) else { return Err(place.damaged("it is cut short")) };
    if &header[..8] != place.kind.magic {
        return Err(place.damaged("it is something else"));
    }
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if number(8) != VERSION {
        return Err(ColdError::Version { object: place.shown.to_owned(), found: number(8) });
    }
    let mut id = KeyId([0; KEY_ID_BYTES]);
    id.0.copy_from_slice(&header[16..32]);
    if id != key.id() {
        let what = format!("it was sealed with data key {id}, this domain's is {}", key.id());
        return Err(place.damaged(&what));
    }
    let mut salt = [0; SALT_BYTES];
    salt.copy_from_slice(&header[32..48]);
    Ok((salt, number(12) as usize))
}

/// Opens an object: the first segment, and the body.
pub fn open(key: &DataKey, place: Place<'_>, object: &[u8]) -> Result<(Vec<u8>, Vec<u8>), ColdError> {
    let (salt, first) = header(key, place, object)?;
    let sealed = &object[HEADER_BYTES..];
    let Some((first, mut rest)) = sealed.split_at_checked(first.saturating_add(TAG_BYTES)) else {
        return Err(place.damaged("it is cut short"));
    };
    let mut sealer = place.sealer(key, &object[..HEADER_BYTES], &salt)?;
    let mut head = first.to_vec();
    sealer.open(&mut head, rest.is_empty()).map_err(|e| place.key_error(e))?;
    let mut body = Vec::with_capacity(rest.len());
    let mut segment = Vec::new();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(SEGMENT_BYTES + TAG_BYTES));
        rest = after;
        segment.clear();
        segment.extend_from_slice(piece);
        sealer.open(&mut segment, rest.is_empty()).map_err(|e| place.key_error(e))?;
        body.extend_from_slice(&segment);
    }
    Ok((head, body))
}

/// Opens the first segment of an object that has more, out of its beginning. `Err(n)`: `n` bytes are needed.
pub fn open_head(key: &DataKey, place: Place<'_>, begin: &[u8]) -> Result<Result<Vec<u8>, usize>, ColdError> {
    let (salt, first) = header(key, place, begin)?;
    let end = HEADER_BYTES + first + TAG_BYTES;
    let Some(segment) = begin.get(HEADER_BYTES..end) else { return Ok(Err(end)) };
    let mut head = segment.to_vec();
    let mut sealer = place.sealer(key, &begin[..HEADER_BYTES], &salt)?;
    sealer.open(&mut head, false).map_err(|e| place.key_error(e))?;
    Ok(Ok(head))
}
