//! Between the store's types and those of the wire.

use vmdr_codec::Counts;
use vmdr_journal::{Kind, PartHead, PartTail};
use vmdr_proto::replication as wire;

use super::{Durable, Position};

/// What begins a part; nothing if it is of a kind that this version does not know.
pub fn part_head(begin: &wire::PartBegin) -> Option<PartHead> {
    let kind = match begin.kind() {
        wire::EpochKind::Delta => Kind::Delta,
        wire::EpochKind::Seed => Kind::Seed,
        wire::EpochKind::Unspecified => return None,
    };
    Some(PartHead { generation: begin.generation, epoch: begin.epoch, part: begin.part, kind })
}

/// What ends a part.
pub fn part_tail(end: &wire::PartEnd) -> PartTail {
    let counts = end.counts.unwrap_or_default();
    PartTail {
        chunks: end.chunks,
        payload_bytes: end.payload_bytes,
        digest: (end.digest_low, end.digest_high),
        last: end.last,
        cut_unix_ns: end.cut_unix_ns,
        application: end.last && end.application,
        counts: Counts {
            ram_pages: counts.ram_pages,
            zero_pages: counts.zero_pages,
            disk_bytes: counts.disk_bytes,
            disk_zero_bytes: counts.disk_zero_bytes,
        },
    }
}

impl From<Position> for wire::Position {
    fn from(position: Position) -> Self {
        let Position { generation, epoch, open_epoch, open_parts } = position;
        Self { generation, epoch, open_epoch, open_parts }
    }
}

impl From<Durable> for wire::Durable {
    fn from(durable: Durable) -> Self {
        let Durable { generation, epoch, part, last } = durable;
        Self { generation, epoch, part, last }
    }
}
