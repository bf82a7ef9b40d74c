//! A segment of the journal: opened, it gives whole parts and damage, and is then a journal that can be appended to.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use vmdr_journal::{Disk, Journal, Kind, Part, PartHead, PartTail, read_chunk};

use super::{files, split, with_fixtures};
use crate::disk::MemDisk;
use crate::seal;

const DIR: &str = "/state/journal";

/// The newest segment, or one before it.
pub fn run(bytes: &[u8]) {
    let Some((sealed, older, bytes)) = split(bytes) else { return };
    let mut bytes = bytes.to_vec();
    if sealed {
        seal::segment(&mut bytes, 1);
    }
    let disk = MemDisk::default();
    let dir = Path::new(DIR);
    disk.put(&dir.join("00000001.seg"), &bytes);
    if older {
        let mut newest = vec![0; 64];
        seal::segment(&mut newest, 2);
        disk.put(&dir.join("00000002.seg"), &newest);
    }
    let mut first: Vec<(PartHead, Vec<Bytes>)> = Vec::new();
    let mut visit = |part: &Part, payloads: &[Bytes]| first.push((part.head, payloads.to_vec()));
    let Ok((mut journal, recovered)) = Journal::open(Arc::new(disk.clone()), dir, seal::DOMAIN, 1, &mut visit) else {
        return;
    };
    assert_eq!(first.len(), recovered.parts.len());
    for (part, (_, payloads)) in recovered.parts.iter().zip(&first) {
        for (chunk, payload) in part.chunks.iter().zip(payloads) {
            let again = read_chunk(&disk, dir, part.segment, chunk);
            assert_eq!(&again.unwrap_or_else(|e| panic!("{e}")), payload);
        }
    }
    // It goes on: a part that is added is found again, behind those that were there.
    let payload = Bytes::from_static(b"payload");
    let xxh3 = vmdr_codec::chunk_hash(&payload);
    let mut digest = vmdr_codec::Digest::new();
    digest.update(&payload);
    let head = PartHead { generation: 1, epoch: 1 << 40, part: 0, kind: Kind::Delta };
    let tail = PartTail { chunks: 1, payload_bytes: 7, digest: digest.halves(), last: true, ..PartTail::default() };
    let added =
        journal.begin(head).and_then(|()| journal.chunk(payload.clone(), xxh3)).and_then(|()| journal.end(tail));
    added.unwrap_or_else(|e| panic!("{e}"));
    drop(journal);
    let mut second = Vec::new();
    let mut visit = |part: &Part, payloads: &[Bytes]| second.push((part.head, payloads.to_vec()));
    let again = Journal::open(Arc::new(disk.clone()), dir, seal::DOMAIN, 1, &mut visit);
    let (_, again) = again.unwrap_or_else(|e| panic!("{e}"));
    assert!(again.torn.is_none(), "{again:?}");
    first.push((head, vec![payload]));
    assert_eq!(second, first);
    let _ = disk.list(dir);
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    with_fixtures(|dir| {
        for (_, bytes) in files(&dir.join("journal")) {
            seeds.extend([0, 1, 3].map(|first| [&[first], &bytes[..]].concat()));
        }
    });
    seeds
}
