//! Crashes at any instant, on a disk that drops and tears what was not synced.

use super::sim::{Fault, Lie, SimDisk};
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
    schedules(100, &eager());
}

/// Lives that end in crashes; after each what was acknowledged is there.
pub fn schedules(seeds_usual: u64, options: &StoreOptions) {
    let store_on = |disk: &SimDisk| Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options.clone());
    // VMDR_SEEDS=FROM..TO replays or widens.
    let seeds = std::env::var("VMDR_SEEDS").ok();
    let range = seeds.as_deref().and_then(|text| text.split_once(".."));
    let (from, to) = range.map_or((0, seeds_usual), |(from, to)| (from.parse().unwrap(), to.parse().unwrap()));
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
fn a_disk_that_only_pretends_to_sync_is_found_out() {
    // That the crashes above would show a sync that is missing.
    for lie in [Lie::Files, Lie::Names] {
        let mut lost = 0;
        for seed in 0..20 {
            let mut host = Host::new(seed);
            let disk = SimDisk::new();
            disk.lie(lie);
            disk.fail(100 + host.random.below(400), Fault::Crash);
            let _ = work(&store_on(&disk).unwrap(), &mut host, "lying");
            let disk = disk.crashed(&mut host.random);
            let found = store_on(&disk).map(|store| store.domains());
            let epoch = found.ok().and_then(|all| all.first().map(|domain| domain.position.epoch)).unwrap_or(0);
            lost += u32::from(host.acknowledged > 0 && epoch < host.acknowledged);
        }
        assert!(lost >= 10, "{lie:?}: {lost}");
    }
}

#[test]
fn a_copy_of_the_directory_between_batches_is_the_recovery_point() {
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
        let copy = tempfile::tempdir().unwrap();
        {
            // A copy is not atomic as a crash is: nothing may be applied during it. History that the control record does
            // not name any more may go meanwhile.
            let domain = store.domain(UUID).unwrap();
            let _no_batch = domain.standby();
            copy_dir(dir.path(), copy.path());
        }
        let copied = store_in(&copy);
        assert_eq!(copied.position(UUID).unwrap().epoch, host.acknowledged);
        host.guest.assert_stored(&copied, host.acknowledged, &format!("step {step}"));
    }
}

/// A delta of one part on top of `epoch - 1`.
fn delta(host: &mut Host, epoch: u64) -> Sent {
    let mut encoder = Encoder::new();
    host.guest.run(&mut host.random, &mut encoder);
    host.guest.device = vec![epoch as u8; 30_000];
    host.guest.cut = epoch;
    encoder.device_state(&host.guest.device).unwrap();
    host.past.insert(epoch, host.guest.clone());
    seal(encoder, PartHead { generation: 1, epoch, part: 0, kind: Kind::Delta }, true, epoch)
}

/// A directory with a seed, and deltas up to `newest` that are all in the journal only.
fn unapplied(host: &mut Host, newest: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), lazy()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    for epoch in 2..=newest {
        delta(host, epoch).send(&mut ingest).unwrap();
    }
    dir
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join(UUID).join("journal")).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn a_part_cut_off_anywhere_is_not_there_and_the_ones_before_are() {
    let mut host = Host::new(21);
    let dir = unapplied(&mut host, 3);
    let before = std::fs::metadata(segments(dir.path()).last().unwrap()).unwrap().len();
    {
        let store = Store::open(dir.path(), lazy()).unwrap();
        delta(&mut host, 4).send(&mut store.open_stream(UUID, "gast", 0).unwrap()).unwrap();
    }
    let segment = segments(dir.path()).pop().unwrap();
    let whole = std::fs::metadata(&segment).unwrap().len();
    let name = segment.strip_prefix(dir.path()).unwrap();
    let step = ((whole - before) / 100).max(1) as usize;
    let near = (before..before + 130).chain(whole - 140..whole);
    for cut in near.chain((before..whole).step_by(step)) {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        std::fs::OpenOptions::new().write(true).open(copy.path().join(name)).unwrap().set_len(cut).unwrap();
        let store = store_in(&copy);
        host.past[&3].assert_stored(&store, 3, &format!("cut at {cut} of {before}..{whole}"));
        assert_eq!(store.domains()[0].trouble, None);
    }
    host.past[&4].assert_stored(&store_in(&dir), 4, "whole");
}

#[test]
fn flipped_bits_in_the_journal_are_never_applied() {
    let mut host = Host::new(5);
    let dir = unapplied(&mut host, 12);
    let all = segments(dir.path());
    assert!(all.len() > 3, "{}", all.len());
    let mut lost = 0;
    for (i, segment) in all.iter().enumerate() {
        let whole = std::fs::read(segment).unwrap();
        let name = segment.strip_prefix(dir.path()).unwrap();
        for n in 0..40 {
            // The header of the segment, those of the first records, and places all over.
            let at = if n < 20 { n * 13 } else { host.random.below(whole.len() as u64) as usize };
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << host.random.below(8);
            std::fs::write(copy.path().join(name), bytes).unwrap();
            let context = format!("segment {i} of {}, byte {at} of {}", all.len(), whole.len());
            let store = store_in(&copy);
            let summary = store.domains().pop().unwrap();
            let epoch = summary.position.epoch;
            let torn_tail = epoch == 11 && i + 1 == all.len();
            assert!(summary.trouble.is_some() || torn_tail, "{context}: epoch {epoch}");
            host.past[&epoch].assert_stored(&store, epoch, &context);
            lost += u64::from(epoch < 12);
            if n % 10 == 0 {
                // It goes on with a new seed, after which the trouble is over; also after a restart.
                let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
                let mut guest = host.past[&12].clone();
                for part in guest.epoch(&mut host.random, 1, 13, Kind::Seed) {
                    part.send(&mut ingest).unwrap();
                }
                drop((ingest, store));
                let store = store_in(&copy);
                guest.assert_stored(&store, 13, &context);
                assert_eq!(store.domains()[0].trouble, None, "{context}");
            }
        }
    }
    assert!(lost > 60, "{lost}");
}

#[test]
fn a_standby_that_may_be_a_mixture_is_not_offered() {
    let mut host = Host::new(8);
    let dir = unapplied(&mut host, 6);
    // As if the batch up to 6 had begun, and then the machine had died and the journal lost its last epoch.
    let domain = dir.path().join(UUID);
    let uuid = parse(UUID).unwrap();
    let mut control = vmdr_journal::Control::load(&FsDisk, &domain, uuid.as_bytes()).unwrap();
    control.standby.as_mut().unwrap().applying = 6;
    control.store(&FsDisk, &domain).unwrap();
    let whole = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), whole.path());
    let segment = segments(dir.path()).pop().unwrap();
    let length = std::fs::metadata(&segment).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&segment).unwrap().set_len(length - 1).unwrap();
    for restart in 0..2 {
        let store = store_in(&dir);
        let summary = store.domains().pop().unwrap();
        assert_eq!(summary.position, Position { generation: 1, ..Position::default() }, "restart {restart}");
        assert!(summary.trouble.unwrap().contains("mixture of epochs 1 to 6"), "restart {restart}");
        assert!(matches!(store.recovery_point(UUID), Err(StoreError::NoPoint(_))));
    }
    let store = store_in(&dir);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let mut guest = host.guest.clone();
    for part in guest.epoch(&mut host.random, 1, 7, Kind::Seed) {
        part.send(&mut ingest).unwrap();
    }
    drop((ingest, store));
    let store = store_in(&dir);
    guest.assert_stored(&store, 7, "seeded anew");
    assert!(!domain.join("damaged-standby.1").exists());
    // With the journal whole, the same control record is in order.
    host.past[&6].assert_stored(&store_in(&whole), 6, "the journal is whole");
}

pub fn copy_dir(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else {
            match std::fs::copy(entry.path(), &target) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copied => drop(copied.unwrap()),
            }
        }
    }
}
