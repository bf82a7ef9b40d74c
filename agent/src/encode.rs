//! A part as the shim describes it, to the messages that carry it.

use anyhow::{Context, ensure};
use vmdr_codec::{Digest, Encoder, Layout, chunk_hash};
use vmdr_proto::PAGE_BYTES;
use vmdr_proto::replication::{Chunk, EpochKind, PartBegin, PartCounts, PartEnd, ToReceiver, to_receiver};
use vmdr_proto::shim::{DiskOpKind, Part};

use crate::arena_map::ArenaMap;

/// What goes with a part beside what the shim captured.
#[derive(Debug, Default)]
pub struct Extras<'a> {
    /// The domain's XML, where the receiver does not have it yet.
    pub domain_xml: Option<&'a str>,
    /// What the guest consists of; sent with the first and the last part of an epoch.
    pub layout: Option<&'a Layout>,
    /// The guest's file systems were at rest at the cut.
    pub application: bool,
}

/// Encodes parts, one at a time. Keeps its buffers.
#[derive(Debug, Default)]
pub struct PartEncoder {
    encoder: Encoder,
}

impl PartEncoder {
    /// Hands the messages of `part` to `send` in order and returns the bytes of their payloads. `send` failing ends it.
    pub fn encode<E: From<anyhow::Error>>(
        &mut self,
        part: &Part,
        arena: &ArenaMap,
        extras: &Extras<'_>,
        mut send: impl FnMut(ToReceiver) -> Result<(), E>,
    ) -> Result<u64, E> {
        // Nothing of a part that broke off may be left over.
        self.encoder = Encoder::new();
        let kind = if part.seed { EpochKind::Seed } else { EpochKind::Delta };
        send(message(to_receiver::Message::Begin(PartBegin {
            generation: part.generation,
            epoch: part.epoch,
            part: part.part,
            kind: kind.into(),
        })))?;
        let mut chunks = Chunks { sequence: 0, bytes: 0, digest: Digest::new() };
        if let Some(layout) = extras.layout {
            self.encoder.layout(layout).context("encode the layout")?;
        }
        if let Some(xml) = extras.domain_xml {
            self.encoder.domain_xml(xml).context("encode the domain XML")?;
        }
        for run in &part.runs {
            let block = u16::try_from(run.block).context("more RAM blocks than can be numbered")?;
            let bytes = range(arena, run.arena_offset, u64::from(run.pages) * PAGE_BYTES as u64)?;
            for (index, page) in bytes.as_chunks::<PAGE_BYTES>().0.iter().enumerate() {
                self.encoder.ram_page(block, run.first + index as u64, page);
            }
            chunks.send(&mut self.encoder, &mut send)?;
        }
        for op in &part.ops {
            let disk = u16::try_from(op.disk).context("more disks than can be numbered")?;
            match op.kind() {
                DiskOpKind::Data => {
                    self.encoder.disk_data(disk, op.offset, range(arena, op.arena_offset, op.length)?);
                }
                DiskOpKind::Zero => self.encoder.disk_zero(disk, op.offset, op.length),
            }
            chunks.send(&mut self.encoder, &mut send)?;
        }
        if let Some(state) = &part.device_state {
            let bytes = range(arena, state.offset, state.length)?;
            self.encoder.device_state(bytes).context("encode the device state")?;
        }
        let counts = self.encoder.finish();
        chunks.send(&mut self.encoder, &mut send)?;
        let (digest_low, digest_high) = chunks.digest.halves();
        send(message(to_receiver::Message::End(PartEnd {
            chunks: chunks.sequence,
            payload_bytes: chunks.bytes,
            digest_low,
            digest_high,
            last: part.last,
            cut_unix_ns: part.cut_unix_ns,
            application: part.last && extras.application,
            counts: Some(PartCounts {
                ram_pages: counts.ram_pages,
                zero_pages: counts.zero_pages,
                disk_bytes: counts.disk_bytes,
                disk_zero_bytes: counts.disk_zero_bytes,
            }),
        })))?;
        Ok(chunks.bytes)
    }
}

struct Chunks {
    sequence: u32,
    bytes: u64,
    digest: Digest,
}

impl Chunks {
    fn send<E>(&mut self, encoder: &mut Encoder, send: &mut impl FnMut(ToReceiver) -> Result<(), E>) -> Result<(), E> {
        while let Some(payload) = encoder.take_full() {
            self.bytes += payload.len() as u64;
            self.digest.update(&payload);
            let chunk = Chunk { sequence: self.sequence, xxh3: chunk_hash(&payload), payload };
            self.sequence += 1;
            send(message(to_receiver::Message::Chunk(chunk)))?;
        }
        Ok(())
    }
}

fn range(arena: &ArenaMap, offset: u64, length: u64) -> anyhow::Result<&[u8]> {
    let bytes = arena.get(offset, length).context("the shim describes a range outside its arena")?;
    ensure!(bytes.len() as u64 == length, "the arena is shorter than described");
    Ok(bytes)
}

fn message(message: to_receiver::Message) -> ToReceiver {
    ToReceiver { message: Some(message) }
}
