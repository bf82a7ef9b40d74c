//! What agents send: as inputs, and a small guest's epochs to begin with.

use std::time::Duration;

use prost::Message as _;
use vmdr_codec::{Counts, Digest, Disk, Encoder, Layout, PAGE_BYTES, RamBlock};
use vmdr_proto::REPLICATION_VERSION;
use vmdr_proto::replication::to_receiver::Message;
use vmdr_proto::replication::{
    Arm, Chunk, Disarm, EpochKind, HandOver, Heartbeat, Open, PartBegin, PartCounts, PartEnd, ToReceiver,
};
use vmdr_receiver::store::StoreOptions;

use crate::archive::UUID;

/// Messages of an input, at most.
const MESSAGES_MAX: usize = 256;

/// Nothing is applied before somebody asks, so that an input does the same each time; small segments.
pub fn options() -> StoreOptions {
    StoreOptions {
        space_reserve_bytes: 0,
        apply_bytes: 1 << 40,
        backlog_bytes_max: 1 << 40,
        apply_interval: Duration::from_secs(3600),
        segment_bytes: 20_000,
        history_segment_bytes: 20_000,
        ..StoreOptions::default()
    }
}

/// The messages of an input: for each its length, u32, and its bytes.
pub fn read(mut bytes: &[u8]) -> Vec<ToReceiver> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>()
        && messages.len() < MESSAGES_MAX
    {
        let length = (u32::from_le_bytes(*length) as usize).min(rest.len());
        let (body, rest) = rest.split_at(length);
        messages.extend(ToReceiver::decode(body));
        bytes = rest;
    }
    messages
}

/// The other way.
pub fn write(messages: &[ToReceiver]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        bytes.extend_from_slice(&(message.encoded_len() as u32).to_le_bytes());
        bytes.extend_from_slice(&message.encode_to_vec());
    }
    bytes
}

/// Makes numbers and checksums of a part what its chunks are.
#[derive(Default)]
pub struct Sealer {
    chunks: u32,
    bytes: u64,
    digest: Digest,
    counts: Counts,
}

impl Sealer {
    pub fn seal(&mut self, message: &mut Message) {
        match message {
            Message::Begin(_) => *self = Self::default(),
            Message::Chunk(chunk) => {
                chunk.sequence = self.chunks;
                chunk.xxh3 = vmdr_codec::chunk_hash(&chunk.payload);
                self.chunks += 1;
                self.bytes += chunk.payload.len() as u64;
                self.digest.update(&chunk.payload);
                for record in vmdr_codec::decode(&chunk.payload).map_while(Result::ok) {
                    self.counts.add(record.counts().unwrap_or_default());
                }
            }
            Message::End(end) => {
                (end.chunks, end.payload_bytes) = (self.chunks, self.bytes);
                (end.digest_low, end.digest_high) = self.digest.halves();
                end.counts = Some(counts(self.counts));
            }
            Message::Open(_) | Message::Heartbeat(_) | Message::HandOver(_) | Message::Arm(_) | Message::Disarm(_) => {}
        }
    }
}

fn counts(counts: Counts) -> PartCounts {
    let Counts { ram_pages, zero_pages, disk_bytes, disk_zero_bytes } = counts;
    PartCounts { ram_pages, zero_pages, disk_bytes, disk_zero_bytes }
}

fn layout(ram_pages: u64) -> Layout {
    let block = |name: &str, pages: u64| RamBlock {
        name: name.to_owned(),
        used_bytes: pages * PAGE_BYTES as u64,
        page_bytes: PAGE_BYTES as u32,
    };
    let disk = |target: &str, size_bytes| Disk { target: target.to_owned(), size_bytes };
    Layout {
        machine: "pc-q35-10.0".to_owned(),
        ram: vec![block("pc.ram", ram_pages), block("system.flash0", 1)],
        disks: vec![disk("vda", 20_000), disk("sda", 8192)],
    }
}

fn page(seed: u8) -> [u8; PAGE_BYTES] {
    let mut page = [seed; PAGE_BYTES];
    page[..64].iter_mut().zip(0u8..).for_each(|(byte, i)| *byte = i.wrapping_mul(seed));
    page
}

/// A seed of two parts, a delta, a delta with another layout of two parts, and the last epoch of a guest that shut down.
fn parts() -> Vec<(EpochKind, u64, u32, bool, Encoder)> {
    let sound = "a codec that takes its own types";
    let mut seed = Encoder::new();
    seed.layout(&layout(8)).expect(sound);
    seed.domain_xml("<domain/>").expect(sound);
    for number in 0..4 {
        seed.ram_page(0, number, &page(number as u8 + 1));
    }
    seed.disk_data(0, 0, &[7; 9000]);
    let mut rest = Encoder::new();
    rest.ram_zero(0, 6, 2);
    rest.disk_zero(0, 10_000, 5_000);
    rest.device_state(b"device state of epoch 1").expect(sound);
    let mut delta = Encoder::new();
    delta.ram_page(0, 2, &page(9));
    delta.disk_data(1, 4000, &page(5));
    delta.device_state(b"device state of epoch 2").expect(sound);
    let mut grown = Encoder::new();
    grown.layout(&layout(10)).expect(sound);
    grown.ram_page(0, 9, &page(11));
    let mut grown_last = Encoder::new();
    grown_last.disk_zero(0, 0, 20_000);
    grown_last.domain_xml("<domain><!-- 3 --></domain>").expect(sound);
    grown_last.device_state(&[3; 5000]).expect(sound);
    let mut off = Encoder::new();
    off.layout(&layout(0)).expect(sound);
    off.disk_data(0, 100, b"last words");
    let (seeded, built) = (EpochKind::Seed, EpochKind::Delta);
    vec![
        (seeded, 1, 0, false, seed),
        (seeded, 1, 1, true, rest),
        (built, 2, 0, true, delta),
        (built, 3, 0, false, grown),
        (built, 3, 1, true, grown_last),
        (built, 4, 0, true, off),
    ]
}

/// The payloads of a small guest's epochs.
pub fn payloads() -> Vec<Vec<u8>> {
    let mut payloads = Vec::new();
    for (.., mut encoder) in parts() {
        encoder.finish();
        payloads.extend(std::iter::from_fn(|| encoder.take_full()));
    }
    payloads
}

/// A stream with a small guest's epochs.
pub fn messages() -> Vec<ToReceiver> {
    let open = Open {
        protocol_version: REPLICATION_VERSION,
        domain_uuid: UUID.to_owned(),
        domain_name: "gast".to_owned(),
        generation: 1,
        host_name: "a".to_owned(),
    };
    let mut all = vec![Message::Open(open), Message::Heartbeat(Heartbeat { sent_unix_ns: 1 })];
    let mut sealer = Sealer::default();
    for (kind, epoch, part, last, mut encoder) in parts() {
        encoder.finish();
        all.push(Message::Begin(PartBegin { generation: 1, epoch, part, kind: kind.into() }));
        for payload in std::iter::from_fn(|| encoder.take_full()) {
            all.push(Message::Chunk(Chunk { payload, ..Chunk::default() }));
        }
        let cut_unix_ns = if last { epoch * 1_000_000_000 } else { 0 };
        all.push(Message::End(PartEnd { last, cut_unix_ns, application: last && epoch == 3, ..PartEnd::default() }));
    }
    all.extend([Message::Arm(Arm { number: 1 }), Message::Disarm(Disarm { number: 2 })]);
    all.push(Message::HandOver(HandOver { generation: 2, epoch: 4, protect_back: false }));
    for message in &mut all {
        sealer.seal(message);
    }
    all.into_iter().map(|message| ToReceiver { message: Some(message) }).collect()
}
