//! What a part of an epoch consists of, to bytes and back. No I/O.
//!
//! An [`Encoder`] turns pages, disk writes, device state and descriptions into chunk payloads; [`decode`] turns a
//! payload back into [`Record`]s that borrow from it. What this crate guarantees:
//!
//! - A payload consists of whole records, and a record needs no other payload to be read (a device state longer than a
//!   record says where each fragment belongs, see [`Assembler`]).
//! - Whatever bytes are given, decoding neither panics nor allocates more than the bounds below allow: every length is
//!   checked against what is there before it is used. Whether a block or disk exists and is that large is for the caller
//!   to check, against the [`Layout`].
//! - Checksums are not part of a record: the wire and the journal carry [`chunk_hash`] and a [`Digest`] outside.
//!
//! # Format, version 1
//! All numbers little-endian. A payload is a sequence of records, each of them:
//!
//! | offset | type | meaning |
//! | --- | --- | --- |
//! | 0 | u8 | kind |
//! | 1 | u32 | length of the body in bytes |
//! | 5 | bytes | body |
//!
//! Bodies by kind:
//!
//! **1 RamPages**: consecutive pages of a RAM block. `block u16, first u64, count u16` (1 to [`RECORD_PAGES_MAX`]), then for
//! each page its encoding and data:
//! `0` zero, nothing follows; `1` raw, 4096 bytes; `2` LZ4 block, `length u16` (1 to 4095) and that many bytes;
//! `3` reserved for the exclusive-or with the previous content.
//!
//! **2 RamZero**: consecutive pages that are zero. `block u16, first u64, pages u64` (at least 1).
//!
//! **3 DiskData**: bytes written to a disk. `disk u16, offset u64, length u32` (1 to [`DISK_PIECE_BYTES_MAX`]), `encoding u8`
//! (1 raw, 2 LZ4 block), then the data up to the end of the body.
//!
//! **4 DiskZero**: a range of a disk that reads as zeroes. `disk u16, offset u64, length u64` (at least 1).
//!
//! **5 DeviceState**, **7 DomainXml**: a fragment of QEMU's device state, or of the domain's XML (UTF-8).
//! `offset u64, total u64`, then the bytes up to the end of the body. Fragments come in order without gaps; one with
//! offset 0 starts anew. `total` is at most [`DEVICE_STATE_BYTES_MAX`] or [`DOMAIN_XML_BYTES_MAX`].
//!
//! **6 Layout**: what the guest consists of ([`Layout`]). `machine` string, `blocks u16`, for each its name as string, `used_bytes
//! u64, page_bytes u32`; `disks u16`, for each its target as string, `size_bytes u64`. A string is `length u16` and UTF-8.
//! Block and disk numbers in the other records are indices into these lists. A Layout holds from where it stands on. A block
//! with `used_bytes` 0 keeps its number but is not there.

mod assemble;
mod decode;
mod encode;
mod hash;
mod layout;

pub use assemble::Assembler;
pub use decode::{DiskBytes, PageData, Pages, RamPages, Record, Records, decode};
pub use encode::Encoder;
pub use hash::{Digest, chunk_hash};
pub use layout::{BLOCKS_MAX, DISKS_MAX, Disk, Layout, RamBlock, STRING_BYTES_MAX};

/// Bytes of a page of guest memory.
pub const PAGE_BYTES: usize = 4096;
/// The most a payload holds before it is closed. One more record may pass it.
pub const CHUNK_BYTES: usize = 1 << 20;
/// The most bytes a payload can have: a full one and the longest record that may pass its limit.
pub const PAYLOAD_BYTES_MAX: usize = 2 * CHUNK_BYTES;
/// Pages in one RamPages record: keeps its count in a u16, and what a damaged count can claim small.
pub const RECORD_PAGES_MAX: u16 = 16_384;
/// Bytes of a disk in one DiskData record: as far as LZ4 finds matches.
pub const DISK_PIECE_BYTES_MAX: usize = 64 << 10;
/// Bytes of a fragment of device state or XML, so that payloads stay near [`CHUNK_BYTES`].
pub const FRAGMENT_BYTES_MAX: usize = 256 << 10;
/// The longest device state accepted. Usual are 15 to 300 KB; display devices can bring some MB.
pub const DEVICE_STATE_BYTES_MAX: u64 = 256 << 20;
/// The longest domain XML accepted. Usual are 5 to 50 KB.
pub const DOMAIN_XML_BYTES_MAX: u64 = 4 << 20;

pub(crate) const KIND_RAM_PAGES: u8 = 1;
pub(crate) const KIND_RAM_ZERO: u8 = 2;
pub(crate) const KIND_DISK_DATA: u8 = 3;
pub(crate) const KIND_DISK_ZERO: u8 = 4;
pub(crate) const KIND_DEVICE_STATE: u8 = 5;
pub(crate) const KIND_LAYOUT: u8 = 6;
pub(crate) const KIND_DOMAIN_XML: u8 = 7;

pub(crate) const ENCODING_ZERO: u8 = 0;
pub(crate) const ENCODING_RAW: u8 = 1;
pub(crate) const ENCODING_LZ4: u8 = 2;

/// Bytes before a record's body: kind and length.
pub(crate) const RECORD_HEAD_BYTES: usize = 5;

/// Why bytes are not what this crate encodes, or a value cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// A record or a field in it ends beyond the bytes that are there.
    #[error("{what}: {needed} bytes needed, {left} left")]
    Truncated {
        /// The field or record.
        what: &'static str,
        /// Bytes it takes.
        needed: u64,
        /// Bytes there are.
        left: u64,
    },
    /// Bytes remain in a record after its last field.
    #[error("{what}: {left} bytes left over")]
    LeftOver {
        /// The record.
        what: &'static str,
        /// Bytes too many.
        left: u64,
    },
    /// A record kind that this version does not know.
    #[error("record kind {0} is unknown to this version")]
    UnknownKind(u8),
    /// A page or piece encoding that this version does not know.
    #[error("encoding {0} is unknown to this version")]
    UnknownEncoding(u8),
    /// A number is outside its bounds.
    #[error("{what} is {value}, allowed are {min} to {max}")]
    OutOfBounds {
        /// The field.
        what: &'static str,
        /// What it says.
        value: u64,
        /// The least allowed.
        min: u64,
        /// The most allowed.
        max: u64,
    },
    /// LZ4 data does not decode to the length it must have.
    #[error("{what}: LZ4 data is damaged")]
    Lz4 {
        /// Page or piece.
        what: &'static str,
    },
    /// A string is not UTF-8, or has characters that it must not have.
    #[error("{what} is not a valid name or text")]
    Text {
        /// The field.
        what: &'static str,
    },
    /// A fragment does not continue the ones before it.
    #[error("{what}: fragment at {offset} of {total}, expected one at {expected}")]
    Fragment {
        /// Device state or XML.
        what: &'static str,
        /// Where the fragment says it belongs.
        offset: u64,
        /// How long it says the whole is.
        total: u64,
        /// Where the next one belongs.
        expected: u64,
    },
    /// Two RAM blocks or disks have the same name.
    #[error("{what} {name:?} is there twice")]
    Duplicate {
        /// Block or disk.
        what: &'static str,
        /// Its name.
        name: String,
    },
}

/// What a part contains, for the trailer on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// 4 KiB pages, zero ones included.
    pub ram_pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Bytes written to disks, zeroed ranges not counted.
    pub disk_bytes: u64,
    /// Bytes of disks zeroed.
    pub disk_zero_bytes: u64,
}

impl Counts {
    /// Adds what another part contains. Saturates: a sum is never trusted before its summands are checked.
    pub fn add(&mut self, other: Counts) {
        self.ram_pages = self.ram_pages.saturating_add(other.ram_pages);
        self.zero_pages = self.zero_pages.saturating_add(other.zero_pages);
        self.disk_bytes = self.disk_bytes.saturating_add(other.disk_bytes);
        self.disk_zero_bytes = self.disk_zero_bytes.saturating_add(other.disk_zero_bytes);
    }
}
