//! What an agent sends, as the receiver takes it in: nothing that is acknowledged is lost, whatever else comes.

use std::path::Path;
use std::sync::Arc;

use vmdr_proto::replication::to_receiver::Message;
use vmdr_receiver::store::{Store, StoreError, part_head, part_tail};

use super::split;
use crate::archive::{STATE, UUID};
use crate::disk::MemDisk;
use crate::wire::{self, Sealer};

/// Bytes of a guest that are hashed in the end.
const GUEST_BYTES_MAX: u64 = 4 << 20;

fn open(disk: &MemDisk) -> Store {
    let store = Store::open_on(Arc::new(disk.clone()), Path::new(STATE), wire::options());
    store.unwrap_or_else(|e| panic!("{e}"))
}

pub fn run(bytes: &[u8]) {
    let Some((sealed, reopen, bytes)) = split(bytes) else { return };
    let disk = MemDisk::default();
    let mut store = open(&disk);
    let mut acknowledged = (0, 0);
    let mut stream = None;
    let mut sealer = Sealer::default();
    for message in wire::read(bytes) {
        let Some(mut message) = message.message else { continue };
        if sealed {
            sealer.seal(&mut message);
        }
        if let Message::Open(open_message) = &message {
            if reopen {
                drop((stream.take(), store));
                store = open(&disk);
            }
            stream = store.open_stream(UUID, &open_message.domain_name, open_message.generation).ok();
            continue;
        }
        let Some(ingest) = &mut stream else { continue };
        let result = match &message {
            Message::Begin(begin) => part_head(begin).map_or(Ok(()), |head| ingest.begin(head)),
            Message::Chunk(chunk) => ingest.chunk(chunk.sequence, chunk.payload.clone().into(), chunk.xxh3),
            Message::End(end) => ingest.end(part_tail(end)).map(|durable| {
                if durable.last {
                    acknowledged = (durable.generation, durable.epoch);
                }
            }),
            Message::HandOver(over) => ingest.hand_over(over.epoch, over.generation),
            Message::Arm(_) | Message::Disarm(_) => ingest.is_newest(),
            Message::Open(_) | Message::Heartbeat(_) => Ok(()),
        };
        match result {
            Ok(()) => {}
            // The stream ends with the first refusal, and the agent comes back.
            Err(StoreError::Io { what, .. }) => assert!(what.contains("too large"), "{what}"),
            Err(_) => {}
        }
    }
    drop(stream);
    let before = store.position(UUID).map(|position| (position.generation, position.epoch));
    drop(store);
    if acknowledged == (0, 0) {
        return;
    }
    let store = open(&disk);
    let position = store.position(UUID).unwrap_or_else(|e| panic!("{e}"));
    if let Ok((generation, epoch)) = before {
        assert_eq!((position.generation, position.epoch), (generation, epoch));
    }
    let point = store.read_point(UUID, None);
    let point = point
        .unwrap_or_else(|e| panic!("epoch {} of generation {} was acknowledged: {e}", acknowledged.1, acknowledged.0));
    assert_eq!((point.id().generation, point.id().epoch), acknowledged);
    let bytes: u64 = point.arrays().map(|array| point.length(array)).fold(0, u64::saturating_add);
    drop(point);
    if bytes < GUEST_BYTES_MAX {
        store.verify(UUID).unwrap_or_else(|e| panic!("{e}"));
    }
    assert!(store.domains().iter().all(|domain| domain.trouble.is_none()), "{:?}", store.domains());
}

pub fn seeds() -> Vec<Vec<u8>> {
    let whole = wire::write(&wire::messages());
    (0..4).map(|first| [&[first], &whole[..]].concat()).collect()
}
