//! The journal on a real file system: what is found again, what is cut, what is damage.

#![allow(clippy::unwrap_used, clippy::panic)] // Test helpers outside #[test] functions.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use vmdr_journal::*;

const DOMAIN: [u8; 16] = [7; 16];

fn open(dir: &Path, first: u64) -> (Journal, Recovered, Vec<(PartHead, Vec<Bytes>)>) {
    let mut seen = Vec::new();
    let mut visit = |part: &Part, payloads: &[Bytes]| seen.push((part.head, payloads.to_vec()));
    let (journal, recovered) = Journal::open(Arc::new(FsDisk), dir, DOMAIN, first, &mut visit).unwrap();
    (journal, recovered, seen)
}

fn head(epoch: u64, part: u32) -> PartHead {
    PartHead { generation: 3, epoch, part, kind: Kind::Delta }
}

fn payloads(epoch: u64, part: u32) -> Vec<Bytes> {
    let seed = epoch * 31 + u64::from(part);
    let length = |i: u64| (seed * 977 + i * 131) % 3000 + 1;
    (0..seed % 4).map(|i| (0..length(i)).map(|n| (n * seed + i) as u8).collect()).collect()
}

fn append(journal: &mut Journal, head: PartHead, last: bool) -> Part {
    journal.begin(head).unwrap();
    let (mut digest, mut bytes) = (vmdr_codec::Digest::new(), 0);
    let payloads = payloads(head.epoch, head.part);
    for payload in &payloads {
        digest.update(payload);
        bytes += payload.len() as u64;
        journal.chunk(payload.clone(), vmdr_codec::chunk_hash(payload)).unwrap();
    }
    let counts = vmdr_codec::Counts { ram_pages: 1, zero_pages: 2, disk_bytes: 3, disk_zero_bytes: 4 };
    let tail = PartTail {
        chunks: payloads.len() as u32,
        payload_bytes: bytes,
        digest: digest.halves(),
        last,
        cut_unix_ns: 5,
        application: false,
        counts,
    };
    journal.end(tail).unwrap()
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// A journal of 20 epochs of two parts each, in several segments.
fn filled(dir: &Path) -> Vec<Part> {
    let (mut journal, ..) = open(dir, 1);
    journal.set_segment_bytes(20_000);
    let heads = (1..=20).flat_map(|epoch| [head(epoch, 0), head(epoch, 1)]);
    heads.map(|head| append(&mut journal, head, head.part == 1)).collect()
}

#[test]
fn what_was_ended_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let parts = filled(dir.path());
    assert!(segments(dir.path()).len() > 2);
    for _ in 0..2 {
        let (_, recovered, seen) = open(dir.path(), 1);
        assert_eq!(recovered.parts, parts);
        assert!(recovered.damage.is_empty() && recovered.torn.is_none());
        for (head, found) in seen {
            assert_eq!(found, payloads(head.epoch, head.part));
        }
    }
    for part in &parts {
        let found = part.chunks.iter().map(|chunk| read_chunk(&FsDisk, dir.path(), part.segment, chunk).unwrap());
        assert_eq!(found.collect::<Vec<_>>(), payloads(part.head.epoch, part.head.part));
    }
}

#[test]
fn what_was_not_ended_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = filled(dir.path());
    {
        let (mut journal, ..) = open(dir.path(), 1);
        journal.begin(head(21, 0)).unwrap();
        // More than is gathered, so that some of it is in the file.
        let payload = Bytes::from(vec![1; 2 << 20]);
        for _ in 0..3 {
            journal.chunk(payload.clone(), vmdr_codec::chunk_hash(&payload)).unwrap();
        }
    }
    let length = |dir: &Path| fs::metadata(segments(dir).pop().unwrap()).unwrap().len();
    assert!(length(dir.path()) > 4 << 20);
    let (mut journal, recovered, _) = open(dir.path(), 1);
    assert_eq!(recovered.parts, parts);
    let torn = recovered.torn.unwrap();
    assert_eq!((torn.epoch, torn.ended), (21, false));
    assert!(length(dir.path()) < 1 << 20);
    // Given up while running, it is cut off too.
    journal.begin(head(21, 0)).unwrap();
    let payload = Bytes::from(vec![1; 5 << 20]);
    journal.chunk(payload.clone(), vmdr_codec::chunk_hash(&payload)).unwrap();
    journal.abort().unwrap();
    parts.push(append(&mut journal, head(21, 0), true));
    assert_eq!(open(dir.path(), 1).1.parts, parts);
}

#[test]
fn the_newest_segment_cut_anywhere_keeps_the_parts_before() {
    let dir = tempfile::tempdir().unwrap();
    let parts = filled(dir.path());
    let segment = segments(dir.path()).pop().unwrap();
    let whole = fs::read(&segment).unwrap();
    let mut counts = std::collections::BTreeSet::new();
    for length in 0..whole.len() {
        if length > 200 && length % 41 != 0 && whole.len() - length > 150 {
            continue;
        }
        fs::write(&segment, &whole[..length]).unwrap();
        let (mut journal, recovered, _) = open(dir.path(), 1);
        let kept = recovered.parts.len();
        assert_eq!(recovered.parts, parts[..kept], "cut at {length}");
        assert!(recovered.damage.is_empty(), "cut at {length}");
        counts.insert(kept);
        // It goes on from there, and that is found again together with what was kept.
        let more = append(&mut journal, head(99, 0), true);
        let (_, recovered, _) = open(dir.path(), 1);
        assert_eq!((recovered.parts.len(), recovered.parts.last()), (kept + 1, Some(&more)), "cut at {length}");
        for extra in segments(dir.path()).into_iter().filter(|path| *path > segment) {
            fs::remove_file(extra).unwrap();
        }
    }
    assert!(counts.len() > 3 && !counts.contains(&parts.len()), "{counts:?}");
}

#[test]
fn a_flipped_bit_anywhere_is_damage_or_a_torn_end() {
    let dir = tempfile::tempdir().unwrap();
    let parts = filled(dir.path());
    let paths = segments(dir.path());
    for (i, segment) in paths.iter().enumerate() {
        let whole = fs::read(segment).unwrap();
        for at in (0..whole.len()).filter(|at| *at < 150 || at % 211 == 0) {
            let copy = tempfile::tempdir().unwrap();
            for path in &paths {
                fs::copy(path, copy.path().join(path.file_name().unwrap())).unwrap();
            }
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(copy.path().join(segment.file_name().unwrap()), bytes).unwrap();
            let context = format!("segment {i} of {}, byte {at}", paths.len());
            let (mut journal, recovered, seen) = open(copy.path(), 1);
            assert!(!recovered.damage.is_empty() || recovered.torn.is_some(), "{context}");
            assert!(recovered.torn.is_none() || i + 1 == paths.len(), "{context}");
            for part in &recovered.parts {
                assert!(parts.contains(part), "{context}");
            }
            // All parts of the other segments are there; of this one no wrong byte.
            let others = parts.iter().filter(|part| part.segment != i as u64 + 1);
            assert!(others.clone().all(|part| recovered.parts.contains(part)), "{context}");
            for (head, found) in seen {
                assert_eq!(found, payloads(head.epoch, head.part), "{context}");
            }
            // What comes later is not lost in the damage.
            let more = append(&mut journal, head(99, 0), true);
            assert_eq!(open(copy.path(), 1).1.parts.last(), Some(&more), "{context}");
        }
    }
}

#[test]
fn a_missing_segment_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    fs::remove_file(&segments(dir.path())[1]).unwrap();
    let (_, recovered, _) = open(dir.path(), 1);
    assert!(recovered.damage[0].what.contains("missing"), "{:?}", recovered.damage);
}

#[test]
fn segments_that_are_not_needed_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let parts = filled(dir.path());
    let (_, recovered, _) = open(dir.path(), 3);
    let kept: Vec<_> = parts.iter().filter(|part| part.segment >= 3).cloned().collect();
    assert_eq!(recovered.parts, kept);
    assert!(segments(dir.path())[0].ends_with("00000003.seg"));
    // Also if all are: numbers are not used again.
    let (mut journal, recovered, _) = open(dir.path(), 100);
    assert!(recovered.parts.is_empty());
    assert_eq!(append(&mut journal, head(30, 0), true).segment, 100);
}

#[test]
fn what_looks_like_a_record_inside_a_page_is_not_taken_for_one() {
    // A guest that knows the format writes a whole part into its memory, as it would stand at that very place.
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(dir.path(), 1);
    let forged = {
        let other = tempfile::tempdir().unwrap();
        let (mut journal, ..) = open(other.path(), 1);
        append(&mut journal, head(1, 0), true);
        fs::read(&segments(other.path())[0]).unwrap()[64..].to_vec()
    };
    journal.begin(head(1, 0)).unwrap();
    let payload: Bytes = [vec![0; 4096 - 64 - 64 - 56], forged, vec![0; 4096]].concat().into();
    journal.chunk(payload.clone(), vmdr_codec::chunk_hash(&payload)).unwrap();
    let mut digest = vmdr_codec::Digest::new();
    digest.update(&payload);
    let tail = PartTail {
        chunks: 1,
        payload_bytes: payload.len() as u64,
        digest: digest.halves(),
        last: true,
        ..PartTail::default()
    };
    journal.end(tail).unwrap();
    // The header of its chunk is hit, so that the chain of records breaks right before the forgery.
    let segment = &segments(dir.path())[0];
    let mut bytes = fs::read(segment).unwrap();
    bytes[64 + 64 + 20] ^= 1;
    fs::write(segment, bytes).unwrap();
    let (_, recovered, seen) = open(dir.path(), 1);
    assert!(recovered.parts.is_empty() && seen.is_empty());
    assert!(!recovered.damage.is_empty() || recovered.torn.is_some());
}

#[test]
fn another_domains_or_a_later_versions_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let error = Journal::open(Arc::new(FsDisk), dir.path(), [8; 16], 1, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, JournalError::WrongDomain { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("07070707-0707") && error.contains("08080808-0808"), "{error}");
}

#[test]
fn damaged_segments_can_be_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let newest = segments(dir.path()).len() as u64;
    let (mut journal, ..) = open(dir.path(), 1);
    let first = journal.quarantine().unwrap();
    assert_eq!(first, newest + 1);
    let part = append(&mut journal, head(50, 0), true);
    assert_eq!(part.segment, first);
    let (_, recovered, _) = open(dir.path(), first);
    assert_eq!(recovered.parts, [part]);
    let aside = segments(dir.path()).iter().filter(|path| path.to_str().unwrap().ends_with(".damaged")).count();
    assert_eq!(aside as u64, newest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn whatever_a_segment_contains_does_no_harm(
        noise in vec(any::<u8>(), 0..300),
        places in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..400usize), 0..6),
        keep_newest in any::<bool>(),
    ) {
        // Pieces of good segments copied over others, so that valid records stand where they do not belong; then noise.
        let dir = tempfile::tempdir().unwrap();
        let parts = filled(dir.path());
        let paths = segments(dir.path());
        let segment = &paths[if keep_newest { 0 } else { paths.len() - 1 }];
        let mut bytes = fs::read(segment).unwrap();
        for (from, to, length) in places {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let length = length.min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + length, to);
        }
        let at = bytes.len() / 2;
        bytes.splice(at..at, noise);
        fs::write(segment, bytes).unwrap();
        let (mut journal, recovered, _) = open(dir.path(), 1);
        for part in &recovered.parts {
            prop_assert!(parts.contains(part));
        }
        let more = append(&mut journal, head(99, 0), true);
        let recovered = open(dir.path(), 1).1;
        prop_assert_eq!(recovered.parts.last(), Some(&more));
    }
}
