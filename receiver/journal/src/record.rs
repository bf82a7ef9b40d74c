//! Segment headers and records, to bytes and back. See `docs/journal.md`.

use xxhash_rust::xxh3::xxh3_64;

use crate::FORMAT_VERSION;

const SEGMENT_MAGIC: &[u8; 8] = b"VMDRSEG\0";
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"VJR1");

pub(crate) const SEGMENT_HEAD_BYTES: usize = 64;
pub(crate) const RECORD_HEAD_BYTES: usize = 56;
const PART_BEGIN_BYTES: usize = 8;
const PART_END_BYTES: usize = 72;

pub(crate) const TYPE_PART_BEGIN: u16 = 1;
pub(crate) const TYPE_CHUNK: u16 = 2;
pub(crate) const TYPE_PART_END: u16 = 3;

/// What an epoch builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// On the epoch before it.
    Delta,
    /// On nothing: a new standby.
    Seed,
}

/// Which part it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartHead {
    /// Generation of the host that cut it.
    pub generation: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Its number in the epoch, from 0.
    pub part: u32,
    /// What the epoch builds on.
    pub kind: Kind,
}

/// What closes a part, as on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PartTail {
    /// How many chunks it has.
    pub chunks: u32,
    /// Bytes of their payloads.
    pub payload_bytes: u64,
    /// XXH3-128 over the payloads: low and high half.
    pub digest: (u64, u64),
    /// Whether it is the last of its epoch.
    pub last: bool,
    /// Wall clock at the cut, with the last part.
    pub cut_unix_ns: u64,
    /// The guest's file systems were at rest at the cut (application-consistent), with the last part.
    pub application: bool,
    /// What it contains, as the sender counted.
    pub counts: vmdr_codec::Counts,
}

/// Where a chunk's payload is in its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkAt {
    /// Offset of the payload.
    pub offset: u64,
    /// Its length.
    pub length: u32,
    /// XXH3-64 of it.
    pub xxh3: u64,
}

/// A part that is whole and durable in the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which it is.
    pub head: PartHead,
    /// What closes it.
    pub tail: PartTail,
    /// The segment it is in.
    pub segment: u64,
    /// Its chunks in order.
    pub chunks: Vec<ChunkAt>,
}

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordHead {
    pub kind: u16,
    pub generation: u64,
    pub epoch: u64,
    pub part: u32,
    pub sequence: u32,
    pub length: u32,
    pub body_xxh3: u64,
}

impl RecordHead {
    pub(crate) fn of(kind: u16, part: &PartHead, sequence: u32, length: u32, body_xxh3: u64) -> Self {
        let PartHead { generation, epoch, part, .. } = *part;
        Self { kind, generation, epoch, part, sequence, length, body_xxh3 }
    }

    /// As bytes for a certain place: a record found anywhere else is not valid.
    pub(crate) fn to_bytes(self, segment: u64, offset: u64) -> [u8; RECORD_HEAD_BYTES] {
        let mut to = [0; RECORD_HEAD_BYTES];
        to[0..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        to[4..6].copy_from_slice(&self.kind.to_le_bytes());
        to[8..16].copy_from_slice(&self.generation.to_le_bytes());
        to[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        to[24..28].copy_from_slice(&self.part.to_le_bytes());
        to[28..32].copy_from_slice(&self.sequence.to_le_bytes());
        to[32..36].copy_from_slice(&self.length.to_le_bytes());
        to[40..48].copy_from_slice(&self.body_xxh3.to_le_bytes());
        let sum = head_sum(&to[..48], segment, offset);
        to[48..56].copy_from_slice(&sum.to_le_bytes());
        to
    }

    /// From bytes at a certain place, if they are a header written there.
    pub(crate) fn from_bytes(from: &[u8; RECORD_HEAD_BYTES], segment: u64, offset: u64) -> Option<Self> {
        if u32_at(from, 0) != RECORD_MAGIC || u64_at(from, 48) != head_sum(&from[..48], segment, offset) {
            return None;
        }
        Some(Self {
            kind: u16_at(from, 4),
            generation: u64_at(from, 8),
            epoch: u64_at(from, 16),
            part: u32_at(from, 24),
            sequence: u32_at(from, 28),
            length: u32_at(from, 32),
            body_xxh3: u64_at(from, 40),
        })
    }

    /// Where the next header may begin in `bytes`: the place of the magic's first byte.
    pub(crate) fn find(bytes: &[u8]) -> Option<usize> {
        let magic = RECORD_MAGIC.to_le_bytes();
        bytes.windows(magic.len()).position(|window| window == magic)
    }
}

fn head_sum(fields: &[u8], segment: u64, offset: u64) -> u64 {
    let mut all = [0; 64];
    all[..48].copy_from_slice(fields);
    all[48..56].copy_from_slice(&segment.to_le_bytes());
    all[56..64].copy_from_slice(&offset.to_le_bytes());
    xxh3_64(&all)
}

/// The body of a PartBegin record.
pub(crate) fn part_begin(kind: Kind) -> [u8; PART_BEGIN_BYTES] {
    let mut to = [0; PART_BEGIN_BYTES];
    to[0] = match kind {
        Kind::Delta => 1,
        Kind::Seed => 2,
    };
    to
}

pub(crate) fn kind_from(body: &[u8]) -> Option<Kind> {
    if body.len() != PART_BEGIN_BYTES {
        return None;
    }
    match body[0] {
        1 => Some(Kind::Delta),
        2 => Some(Kind::Seed),
        _ => None,
    }
}

/// The body of a PartEnd record.
pub(crate) fn part_end(tail: &PartTail) -> [u8; PART_END_BYTES] {
    let mut to = [0; PART_END_BYTES];
    to[0..4].copy_from_slice(&tail.chunks.to_le_bytes());
    to[4] = u8::from(tail.last);
    to[5] = u8::from(tail.application);
    let counts = &tail.counts;
    let (low, high) = tail.digest;
    let numbers = [
        tail.payload_bytes,
        low,
        high,
        tail.cut_unix_ns,
        counts.ram_pages,
        counts.zero_pages,
        counts.disk_bytes,
        counts.disk_zero_bytes,
    ];
    for (i, number) in numbers.into_iter().enumerate() {
        to[8 + i * 8..16 + i * 8].copy_from_slice(&number.to_le_bytes());
    }
    to
}

pub(crate) fn tail_from(body: &[u8]) -> Option<PartTail> {
    if body.len() != PART_END_BYTES || body[4] > 1 || body[5] > 1 {
        return None;
    }
    let number = |i: usize| u64_at(body, 8 + i * 8);
    Some(PartTail {
        chunks: u32_at(body, 0),
        payload_bytes: number(0),
        digest: (number(1), number(2)),
        last: body[4] == 1,
        cut_unix_ns: number(3),
        application: body[5] == 1,
        counts: vmdr_codec::Counts {
            ram_pages: number(4),
            zero_pages: number(5),
            disk_bytes: number(6),
            disk_zero_bytes: number(7),
        },
    })
}

/// The header of a segment.
pub(crate) fn segment_head(domain: &[u8; 16], segment: u64) -> [u8; SEGMENT_HEAD_BYTES] {
    let mut to = [0; SEGMENT_HEAD_BYTES];
    to[0..8].copy_from_slice(SEGMENT_MAGIC);
    to[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    to[12..16].copy_from_slice(&(SEGMENT_HEAD_BYTES as u32).to_le_bytes());
    to[16..32].copy_from_slice(domain);
    to[32..40].copy_from_slice(&segment.to_le_bytes());
    let sum = xxh3_64(&to[..56]);
    to[56..64].copy_from_slice(&sum.to_le_bytes());
    to
}

/// What a segment's header says.
pub(crate) enum SegmentHead {
    Good,
    Damaged,
    Version(u32),
    WrongDomain([u8; 16]),
}

pub(crate) fn check_segment_head(from: &[u8], domain: &[u8; 16], segment: u64) -> SegmentHead {
    if from.len() < SEGMENT_HEAD_BYTES
        || &from[0..8] != SEGMENT_MAGIC
        || u64_at(from, 56) != xxh3_64(&from[..56])
        || u64_at(from, 32) != segment
    {
        return SegmentHead::Damaged;
    }
    if u32_at(from, 8) != FORMAT_VERSION {
        return SegmentHead::Version(u32_at(from, 8));
    }
    let mut found = [0; 16];
    found.copy_from_slice(&from[16..32]);
    if &found == domain { SegmentHead::Good } else { SegmentHead::WrongDomain(found) }
}

pub(crate) fn u16_at(from: &[u8], at: usize) -> u16 {
    let mut bytes = [0; 2];
    bytes.copy_from_slice(&from[at..at + 2]);
    u16::from_le_bytes(bytes)
}

pub(crate) fn u32_at(from: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&from[at..at + 4]);
    u32::from_le_bytes(bytes)
}

pub(crate) fn u64_at(from: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&from[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// A UUID as people write it.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
