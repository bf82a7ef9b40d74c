//! Makes the checksums of bytes right, as `docs/journal.md` has them, so that a mutation gets behind them.

use xxhash_rust::xxh3::xxh3_64;

const SEGMENT_HEAD_BYTES: usize = 64;
const RECORD_HEAD_BYTES: usize = 56;
/// The XXH3-64 at the end of small files.
const SUM_BYTES: usize = 8;
const GUEST_HEAD_BYTES: usize = 12;
const GUEST_SUM_BYTES: usize = 4;

/// The domain of every fixture, as bytes.
pub const DOMAIN: [u8; 16] =
    [0x6c, 0x0d, 0x4a, 0x3e, 0x11, 0x11, 0x42, 0x22, 0x83, 0x33, 0xab, 0xcd, 0xef, 0xab, 0xcd, 0xef];

/// A file that ends with the XXH3-64 of the rest.
pub fn trailer(bytes: &mut [u8]) {
    let Some(at) = bytes.len().checked_sub(SUM_BYTES) else { return };
    let sum = xxh3_64(&bytes[..at]);
    bytes[at..].copy_from_slice(&sum.to_le_bytes());
}

/// A control record: magic, version and length too.
pub fn control(bytes: &mut [u8]) {
    let Some(fields) = bytes.len().checked_sub(16 + SUM_BYTES) else { return };
    bytes[..8].copy_from_slice(b"VMDRCTL\0");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&(fields as u32).to_le_bytes());
    trailer(bytes);
}

/// A segment of the journal or the history: its header, and the header and body of every record as far as lengths lead.
pub fn segment(bytes: &mut [u8], number: u64) {
    if bytes.len() < SEGMENT_HEAD_BYTES {
        return;
    }
    bytes[..8].copy_from_slice(b"VMDRSEG\0");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    bytes[16..32].copy_from_slice(&DOMAIN);
    bytes[32..40].copy_from_slice(&number.to_le_bytes());
    let sum = xxh3_64(&bytes[..56]);
    bytes[56..64].copy_from_slice(&sum.to_le_bytes());
    let mut at = SEGMENT_HEAD_BYTES;
    while bytes.len() - at >= RECORD_HEAD_BYTES {
        let (head, body) = bytes[at..].split_at_mut(RECORD_HEAD_BYTES);
        let mut length = [0; 4];
        length.copy_from_slice(&head[32..36]);
        let length = (u32::from_le_bytes(length) as usize).min(body.len());
        head[..4].copy_from_slice(b"VJR1");
        head[32..36].copy_from_slice(&(length as u32).to_le_bytes());
        head[40..48].copy_from_slice(&xxh3_64(&body[..length]).to_le_bytes());
        let mut sum = [0; 64];
        sum[..48].copy_from_slice(&head[..48]);
        sum[48..56].copy_from_slice(&number.to_le_bytes());
        sum[56..].copy_from_slice(&(at as u64).to_le_bytes());
        head[48..].copy_from_slice(&xxh3_64(&sum).to_le_bytes());
        at += RECORD_HEAD_BYTES + length;
    }
}

/// Frames of the guest channel, one after another as far as lengths lead.
pub fn guest(bytes: &mut [u8]) {
    let mut at = 0;
    while bytes.len() - at >= GUEST_HEAD_BYTES + GUEST_SUM_BYTES {
        let frame = &mut bytes[at..];
        frame[..4].copy_from_slice(b"vGST");
        let room = frame.len() - GUEST_HEAD_BYTES - GUEST_SUM_BYTES;
        let length = usize::from(u16::from_le_bytes([frame[6], frame[7]])).min(room);
        frame[6..8].copy_from_slice(&(length.min(512) as u16).to_le_bytes());
        let end = GUEST_HEAD_BYTES + length.min(512);
        let sum =
            frame[..end].iter().fold(0x811c_9dc5u32, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        frame[end..end + GUEST_SUM_BYTES].copy_from_slice(&sum.to_le_bytes());
        at += end + GUEST_SUM_BYTES;
    }
}
