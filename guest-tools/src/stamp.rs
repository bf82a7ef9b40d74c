//! The stamp: which block this is and which write it holds, provable from the bytes alone.
//!
//! Layout, little-endian: magic u64, block number u64, sequence u64, XXH3-64 u64 of (the first 24 bytes, the noise, the
//! trailer), noise, zeros, and in the block's last eight bytes the sequence again, so that a torn block shows.

use crate::aligned::PAGE_BYTES;
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

/// Bytes before the noise.
const HEADER_BYTES: usize = 32;
/// Bytes of the copy of the sequence at the end.
const TRAILER_BYTES: usize = 8;
/// The most noise that fits a block of one page.
pub const FILL_BYTES_MAX: usize = PAGE_BYTES - HEADER_BYTES - TRAILER_BYTES;

/// What a block is stamped for; part of its magic, so that a disk block found in RAM is no valid RAM block.
#[derive(Clone, Copy, Debug)]
pub enum Area {
    /// The RAM area of the workload.
    Ram,
    /// The disk records that are acknowledged in RAM.
    Record,
    /// The blocks that the O_DIRECT readers read.
    Reader,
    /// Regions of a scratch device.
    Scratch,
    /// The value of a UEFI variable.
    Variable,
    /// Memory that is taken and given back.
    Churn,
}

impl Area {
    fn magic(self) -> u64 {
        u64::from_le_bytes(match self {
            Area::Ram => *b"vmdrRAM1",
            Area::Record => *b"vmdrREC1",
            Area::Reader => *b"vmdrRDR1",
            Area::Scratch => *b"vmdrSCR1",
            Area::Variable => *b"vmdrVAR1",
            Area::Churn => *b"vmdrCHU1",
        })
    }
}

/// What is wrong with a block.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Bad {
    /// It carries no stamp.
    #[error("no stamp (its first word is {0:#018x})")]
    Magic(u64),
    /// It is another block.
    #[error("holds block {0}")]
    Block(u64),
    /// It is the right block of another time.
    #[error("holds write {found} instead of {expected}")]
    Sequence {
        /// What is there.
        found: u64,
        /// What should be there.
        expected: u64,
    },
    /// Its bytes are not those that were stamped.
    #[error("write {0} is damaged (checksum)")]
    Checksum(u64),
    /// Its first and its last bytes are of two writes.
    #[error("is torn between write {head} and write {tail}")]
    Torn {
        /// Sequence in the header.
        head: u64,
        /// Sequence in the trailer.
        tail: u64,
    },
}

fn word(block: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn checksum(block: &[u8], fill_bytes: usize) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&block[..24]);
    hash.update(&block[HEADER_BYTES..HEADER_BYTES + fill_bytes]);
    hash.update(&block[block.len() - TRAILER_BYTES..]);
    hash.digest()
}

/// Stamps `block` (at least 40 bytes plus `fill_bytes`) as number `number` of `area`, written by write `sequence`.
pub fn write(block: &mut [u8], area: Area, number: u64, sequence: u64, fill_bytes: usize) {
    block[..8].copy_from_slice(&area.magic().to_le_bytes());
    block[8..16].copy_from_slice(&number.to_le_bytes());
    block[16..24].copy_from_slice(&sequence.to_le_bytes());
    let mut noise = mix(number ^ sequence.rotate_left(32)) | 1;
    for bytes in block[HEADER_BYTES..HEADER_BYTES + fill_bytes].chunks_mut(8) {
        noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        bytes.copy_from_slice(&(noise ^ (noise >> 29)).to_le_bytes()[..bytes.len()]);
    }
    let end = block.len();
    block[end - TRAILER_BYTES..].copy_from_slice(&sequence.to_le_bytes());
    let sum = checksum(block, fill_bytes);
    block[24..32].copy_from_slice(&sum.to_le_bytes());
}

/// The write that `block` holds, if it is an intact block `number` of `area`.
pub fn read(block: &[u8], area: Area, number: u64, fill_bytes: usize) -> Result<u64, Bad> {
    if word(block, 0) != area.magic() {
        return Err(Bad::Magic(word(block, 0)));
    }
    if word(block, 8) != number {
        return Err(Bad::Block(word(block, 8)));
    }
    let (head, tail) = (word(block, 16), word(block, block.len() - TRAILER_BYTES));
    if head != tail {
        return Err(Bad::Torn { head, tail });
    }
    if word(block, 24) != checksum(block, fill_bytes) {
        return Err(Bad::Checksum(head));
    }
    Ok(head)
}

/// Checks that `block` is an intact block `number` of `area` and holds exactly write `expected`.
pub fn check(block: &[u8], area: Area, number: u64, expected: u64, fill_bytes: usize) -> Result<(), Bad> {
    match read(block, area, number, fill_bytes)? {
        found if found == expected => Ok(()),
        found => Err(Bad::Sequence { found, expected }),
    }
}

/// A good mix of 64 bits (the finalizer of SplitMix64).
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_read_back_and_every_flipped_byte_of_it_shows() {
        let mut block = vec![0; PAGE_BYTES];
        write(&mut block, Area::Ram, 7, 99, 100);
        assert_eq!(read(&block, Area::Ram, 7, 100), Ok(99));
        for at in (0..HEADER_BYTES + 100).chain(PAGE_BYTES - TRAILER_BYTES..PAGE_BYTES) {
            block[at] ^= 1;
            assert!(check(&block, Area::Ram, 7, 99, 100).is_err(), "flip at {at}");
            block[at] ^= 1;
        }
    }

    #[test]
    fn another_area_block_or_write_is_told_apart() {
        let mut block = vec![0; PAGE_BYTES];
        write(&mut block, Area::Record, 7, 99, FILL_BYTES_MAX);
        assert!(matches!(read(&block, Area::Ram, 7, FILL_BYTES_MAX), Err(Bad::Magic(_))));
        assert_eq!(read(&block, Area::Record, 8, FILL_BYTES_MAX), Err(Bad::Block(7)));
        let wrong = Bad::Sequence { found: 99, expected: 98 };
        assert_eq!(check(&block, Area::Record, 7, 98, FILL_BYTES_MAX), Err(wrong));
    }
}
