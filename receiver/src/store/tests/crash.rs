//! Crashes at any instant, on a disk that drops and tears what was not synced.

use super::sim::{Fault, SimDisk};
use super::*;

/// Works until the disk dies.
fn work(store: &Store, host: &mut Host, context: &str) -> Result<(), StoreError> {
    let mut ingest = store.open_stream(UUID, "gast", 0)?;
    let from = host.reconnected(ingest.position(), context);
    host.send(&mut ingest, from)?;
    for _ in 0..30 {
        host.cut();
        host.send(&mut ingest, 0)?;
        if host.random.below(8) == 0 {
            store.recovery_point(UUID)?;
        }
    }
    Ok(())
}

#[test]
fn nothing_acknowledged_is_lost_in_a_crash() {
    // VMDR_SEEDS=FROM..TO replays or widens.
    let seeds = std::env::var("VMDR_SEEDS").ok();
    let range = seeds.as_deref().and_then(|text| text.split_once(".."));
    let (from, to) = range.map_or((0, 150), |(from, to)| (from.parse().unwrap(), to.parse().unwrap()));
    for seed in from..to {
        let mut host = Host::new(seed);
        let mut disk = SimDisk::new();
        for crash in 0..8 {
            let context = format!("seed {seed} crash {crash}");
            // Early crashes also hit opening and recovery itself.
            let bound = [40, 400, 1500][host.random.below(3) as usize];
            disk.fail(1 + host.random.below(bound), Fault::Crash);
            if let Ok(store) = store_on(&disk) {
                let _ = work(&store, &mut host, &context);
            }
            disk = disk.crashed(&mut host.random);
            // Sometimes the next life is cut short too, before anybody looked.
            if host.random.below(3) == 0 {
                continue;
            }
            let store = store_on(&disk).unwrap_or_else(|e| panic!("{context}: {e}"));
            let summary = store.domains().pop().unwrap_or_default();
            assert_eq!(summary.trouble, None, "{context}");
            let position = summary.position;
            assert!(position.epoch >= host.acknowledged, "{context}: {position:?}, {}", host.acknowledged);
            if position.epoch > 0 {
                let guest = host.past.get(&position.epoch).unwrap_or_else(|| panic!("{context}: {position:?}"));
                guest.assert_stored(&store, position.epoch, &context);
            }
        }
    }
}

#[test]
fn any_copy_of_the_directory_is_a_recovery_point() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::new(7);
    let store = store_in(&dir);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for step in 0..40 {
        host.cut();
        host.send(&mut ingest, 0).unwrap();
        if step % 4 != 0 {
            continue;
        }
        // As after SIGKILL: what was written is there, whoever was in the middle of what. The applying thread runs.
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        let copied = store_in(&copy);
        assert_eq!(copied.position(UUID).unwrap().epoch, host.acknowledged);
        host.guest.assert_stored(&copied, host.acknowledged, &format!("step {step}"));
    }
}

#[test]
fn a_part_cut_off_anywhere_is_not_there_and_the_ones_before_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::new(21);
    // Nothing is applied for good, so that all epochs stay in the journal.
    let options = StoreOptions { checkpoint_bytes: 1 << 40, checkpoint_interval: Duration::from_secs(3600), ..eager() };
    let options = StoreOptions { segment_bytes: 1 << 30, ..options };
    let store = Store::open(dir.path(), options.clone()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    let journal = dir.path().join(UUID).join("journal");
    let mut lengths = Vec::new();
    for epoch in 2..=4 {
        let mut encoder = Encoder::new();
        host.guest.run(&mut host.random, &mut encoder);
        host.guest.device = vec![epoch as u8; 3000];
        host.guest.cut = epoch;
        encoder.device_state(&host.guest.device).unwrap();
        let head = PartHead { generation: 1, epoch, part: 0, kind: Kind::Delta };
        seal(encoder, head, true, epoch).send(&mut ingest).unwrap();
        host.past.insert(epoch, host.guest.clone());
        let segment = std::fs::read_dir(&journal).unwrap().next().unwrap().unwrap();
        lengths.push((segment.path(), segment.metadata().unwrap().len()));
    }
    drop(ingest);
    drop(store);
    let (segment, (before, whole)) = (&lengths[2].0, (lengths[1].1, lengths[2].1));
    let name = segment.strip_prefix(dir.path()).unwrap();
    let step = ((whole - before) / 150).max(1) as usize;
    let near = (before..before + 130).chain(whole - 140..whole);
    for cut in near.chain((before..whole).step_by(step)) {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        std::fs::OpenOptions::new().write(true).open(copy.path().join(name)).unwrap().set_len(cut).unwrap();
        let store = Store::open(copy.path(), options.clone()).unwrap();
        host.past[&3].assert_stored(&store, 3, &format!("cut at {cut} of {before}..{whole}"));
        assert_eq!(store.domains()[0].trouble, None);
    }
    let store = Store::open(dir.path(), options).unwrap();
    host.past[&4].assert_stored(&store, 4, "whole");
}

#[test]
fn flipped_bits_in_the_journal_are_never_applied() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::new(5);
    let options = StoreOptions { checkpoint_bytes: 1 << 40, checkpoint_interval: Duration::from_secs(3600), ..eager() };
    let store = Store::open(dir.path(), options.clone()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    while host.acknowledged < 12 {
        host.cut();
        let (epoch, parts) = host.sending.take().unwrap();
        if epoch > 1 && parts[0].head.kind == Kind::Seed {
            panic!("choose a seed without a second seed epoch");
        }
        host.sending = Some((epoch, parts));
        let past = std::mem::take(&mut host.past);
        host.past = past.clone();
        host.send(&mut ingest, 0).unwrap();
        host.past = past;
    }
    drop(ingest);
    drop(store);
    let journal = Path::new(UUID).join("journal");
    let mut segments: Vec<_> = std::fs::read_dir(dir.path().join(&journal)).unwrap().map(|e| e.unwrap()).collect();
    segments.sort_by_key(|entry| entry.file_name());
    assert!(segments.len() > 3, "{}", segments.len());
    let mut lost = 0;
    for (i, entry) in segments.iter().enumerate() {
        let length = entry.metadata().unwrap().len();
        for n in 0..14 {
            // The header of the segment, the first records, and places all over.
            let at = if n < 4 { 10 + n * 40 } else { host.random.below(length) };
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            let path = copy.path().join(&journal).join(entry.file_name());
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at as usize] ^= 1 << host.random.below(8);
            std::fs::write(&path, bytes).unwrap();
            let context = format!("segment {i} of {}, bit at {at} of {length}", segments.len());
            let store = Store::open(copy.path(), options.clone()).unwrap();
            let summary = store.domains().pop().unwrap();
            let epoch = summary.position.epoch;
            if epoch == 0 {
                // The header's version or domain is hit and its checksum fits by itself: impossible with one bit.
                panic!("{context}: {summary:?}");
            }
            lost += u64::from(epoch < 12);
            let torn_tail = epoch >= 11 && i + 1 == segments.len();
            assert!(summary.trouble.is_some() || epoch == 12 || torn_tail, "{context}: epoch {epoch}");
            host.past[&epoch].assert_stored(&store, epoch, &context);
            if epoch < 12 && summary.trouble.is_some() {
                // It goes on with a new seed, after which the trouble is over.
                let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
                let mut guest = host.past[&12].clone();
                for part in guest.epoch(&mut host.random, 1, 13, Kind::Seed) {
                    part.send(&mut ingest).unwrap();
                }
                guest.assert_stored(&store, 13, &context);
                assert_eq!(store.domains()[0].trouble, None, "{context}");
            }
        }
    }
    assert!(lost > 20, "{lost}");
}

pub fn copy_dir(from: &Path, to: &Path) {
    // Like a snapshot, and unlike cp, in the order in which a crash could have left things: the journal before the
    // control record would be a control record ahead of its files. A copy is not atomic, so control goes first.
    let mut entries: Vec<_> = std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else if let Err(e) = std::fs::copy(entry.path(), &target) {
            // The applying thread may just have removed it.
            assert_eq!(e.kind(), std::io::ErrorKind::NotFound);
        }
    }
}
