//! Damage of what lies on the disk: always found, never taken for data, and mended by sending again.

use vmdr_journal::UNIT_BYTES;

use super::history::{by_hand, host};
use super::*;

/// Verifies to the end.
pub fn verified(store: &Store, scope: Scope) -> Verdict {
    let mut verification = store.begin_verification(UUID, scope).unwrap();
    for _ in 0..1_000_000 {
        if let Progress::Done(verdict) = verification.step(64 << 10).unwrap() {
            return verdict;
        }
    }
    panic!("a verification that does not end");
}

/// A guest with a past that is all in the standby and its history: deltas up to `newest`.
fn with_a_past(dir: &Path, host: &mut Host, newest: u64) -> Store {
    let store = Store::open(dir, by_hand()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let domain = store.domain(UUID).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    for epoch in 2..=newest {
        delta(host, &mut ingest, epoch);
        domain.apply_all().unwrap();
    }
    domain.apply_all().unwrap();
    drop(ingest);
    store
}

fn delta(host: &mut Host, ingest: &mut Ingest, epoch: u64) {
    for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
        part.send(ingest).unwrap();
    }
    host.past.insert(epoch, host.guest.clone());
    host.acknowledged = epoch;
}

fn flip(path: &Path, at: u64, bit: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at as usize] ^= 1 << bit;
    std::fs::write(path, bytes).unwrap();
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// Every point that is offered reads as it was; every other is refused as damaged.
fn offered(store: &Store, host: &Host, context: &str) -> (Vec<u64>, Vec<u64>) {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for point in store.points(UUID).unwrap() {
        match store.read_point(UUID, Some(point.id())) {
            Ok(reader) if !point.damaged => {
                host.past[&point.epoch].assert_read(&reader, context);
                good.push(point.epoch);
            }
            Ok(_) => panic!("{context}: {point:?} is damaged and can be read"),
            Err(StoreError::Flawed { .. } | StoreError::Damaged { .. }) => bad.push(point.epoch),
            Err(other) => panic!("{context}: {other}"),
        }
    }
    (good, bad)
}

#[test]
fn one_flipped_bit_in_the_standby_is_found_and_older_points_are_offered() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(11);
    drop(with_a_past(dir.path(), &mut host, 14));
    let baseline = {
        let store = Store::open(dir.path(), by_hand()).unwrap();
        let verdict = verified(&store, Scope::All);
        assert_eq!((verdict.damaged.len(), verdict.damage.len()), (0, 0), "{verdict:?}");
        let points = store.points(UUID).unwrap();
        assert!(points.iter().all(|point| point.verified_unix_ns.is_some() && !point.damaged), "{points:?}");
        points.len()
    };
    let standby = dir.path().join(UUID).join("standby.1");
    let (mut flips, mut older) = (0, 0);
    for file in files(&standby).into_iter().filter(|path| !path.to_str().unwrap().contains("history")) {
        let name = file.strip_prefix(dir.path()).unwrap().to_owned();
        let length = std::fs::metadata(&file).unwrap().len();
        if length == 0 || name.to_str().unwrap().contains("layout") {
            continue;
        }
        for n in 0..16 {
            let at = if n == 0 { length - 1 } else { host.random.below(length) };
            let copy = tempfile::tempdir().unwrap();
            super::crash::copy_dir(dir.path(), copy.path());
            flip(&copy.path().join(&name), at, host.random.below(8));
            let context = format!("{} byte {at} of {length}", name.display());
            let store = Store::open(copy.path(), by_hand()).unwrap();
            let verdict = verified(&store, Scope::All);
            assert!(!verdict.damaged.is_empty() && !verdict.damage.is_empty(), "{context}: not found");
            let newest = &store.points(UUID).unwrap()[0];
            assert!(newest.damaged, "{context}: {newest:?}");
            let refused = store.recovery_point_at(UUID, None, false);
            assert!(matches!(refused, Err(StoreError::Flawed { .. })), "{context}: {refused:?}");
            // (An XML that is no text any more is of no use to anybody.)
            let forced = store.recovery_point_at(UUID, None, true);
            assert!(context.contains("domain-") || forced.unwrap().epoch == 14, "{context}");
            let (good, bad) = offered(&store, &host, &context);
            assert_eq!(good.len() + bad.len(), baseline, "{context}");
            assert_eq!(bad.len(), verdict.damaged.len(), "{context}: {bad:?} {verdict:?}");
            older += usize::from(!good.is_empty());
            flips += 1;
            // It is still known after a restart.
            drop(store);
            let store = Store::open(copy.path(), by_hand()).unwrap();
            assert_eq!(offered(&store, &host, &context), (good, bad), "{context}: after a restart");
            assert!(store.domains()[0].damage.is_some(), "{context}");
            if n % 4 == 0 {
                mended(&store, &mut clone_of(&host), &context);
            }
        }
    }
    assert!(flips > 80 && older > 20, "{flips} {older}");
}

fn clone_of(host: &Host) -> Host {
    let mut copy = Host::new(7);
    copy.guest = host.guest.clone();
    copy.past = host.past.clone();
    (copy.acknowledged, copy.seeded, copy.keep) = (host.acknowledged, true, true);
    copy
}

/// What a resync sends: all that has another hash than the guest's.
fn mended(store: &Store, host: &mut Host, context: &str) {
    let epoch = host.acknowledged;
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    assert!(ingest.wants_comparison(), "{context}");
    assert!(!ingest.wants_comparison(), "{context}: said once");
    let mut encoder = Encoder::new();
    encoder.layout(&host.guest.layout).unwrap();
    let blocks = host.guest.layout.ram.iter().enumerate().filter(|(_, block)| block.used_bytes > 0);
    for (n, _) in blocks {
        let ram = &host.guest.ram[n];
        let pages = ram.len() / PAGE_BYTES;
        let hashes = store.hashes(UUID, epoch, Array::Ram(n as u16), 0, pages, PAGE_BYTES).unwrap();
        for (page, (content, hash)) in ram.chunks(PAGE_BYTES).zip(hashes).enumerate() {
            if super::hash(content) != hash {
                encoder.ram_page(n as u16, page as u64, content.try_into().unwrap());
            }
        }
    }
    for (n, disk) in host.guest.disks.iter().enumerate() {
        let hashes = store.hashes(UUID, epoch, Array::Disk(n as u16), 0, disk.len().div_ceil(65_536), 65_536).unwrap();
        for (piece, (content, hash)) in disk.chunks(65_536).zip(hashes).enumerate() {
            let mut padded = content.to_vec();
            padded.resize(65_536, 0);
            if super::hash(&padded) != hash {
                encoder.disk_data(n as u16, piece as u64 * 65_536, content);
            }
        }
    }
    encoder.device_state(&host.guest.device).unwrap();
    encoder.domain_xml(&host.guest.xml).unwrap();
    host.guest.cut += 1;
    let head = PartHead { generation: 1, epoch: epoch + 1, part: 0, kind: Kind::Delta };
    seal(encoder, head, true, host.guest.cut).send(&mut ingest).unwrap();
    store.domain(UUID).unwrap().apply_all().unwrap();
    host.past.insert(epoch + 1, host.guest.clone());
    host.guest.assert_stored(store, epoch + 1, context);
    let before: Vec<u64> = store.points(UUID).unwrap().iter().filter(|p| p.damaged).map(|p| p.epoch).collect();
    assert!(!before.contains(&(epoch + 1)) && before.contains(&epoch), "{context}: {before:?}");
    assert_eq!(store.domains()[0].damage, None, "{context}");
    let verdict = verified(store, Scope::All);
    let (good, bad) = offered(store, host, context);
    assert!(good.contains(&(epoch + 1)) && bad.contains(&epoch), "{context}: {good:?} {bad:?}");
    assert_eq!(verdict.damaged.len(), bad.len(), "{context}: {verdict:?}");
}

#[test]
fn what_is_damaged_does_not_become_a_sound_before_image() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(5);
    drop(with_a_past(dir.path(), &mut host, 4));
    let image = dir.path().join(UUID).join("standby.1/disk/vda.raw");
    // Units that will be written over: as a whole, in part, and not at all.
    for unit in [2, 4, 6] {
        flip(&image, unit * UNIT_BYTES as u64 + 70, 3);
    }
    let store = Store::open(dir.path(), by_hand()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let mut encoder = Encoder::new();
    let (whole, part) = (2 * UNIT_BYTES, 4 * UNIT_BYTES + 1000);
    host.guest.disks[0][whole..whole + UNIT_BYTES].fill(0x17);
    host.guest.disks[0][part..part + 100].fill(0x18);
    encoder.disk_data(0, whole as u64, &host.guest.disks[0][whole..whole + UNIT_BYTES]);
    encoder.disk_data(0, part as u64, &host.guest.disks[0][part..part + 100]);
    encoder.device_state(&host.guest.device).unwrap();
    host.guest.cut += SECOND_NS;
    let head = PartHead { generation: 1, epoch: 5, part: 0, kind: Kind::Delta };
    seal(encoder, head, true, host.guest.cut).send(&mut ingest).unwrap();
    store.domain(UUID).unwrap().apply_all().unwrap();
    host.past.insert(5, host.guest.clone());
    // Found when it was written over, before anybody has verified anything; what was written in part is damaged still.
    let points = store.points(UUID).unwrap();
    assert!(points[0].damaged && points[1].damaged, "{points:?}");
    let verdict = verified(&store, Scope::All);
    let (_, bad) = offered(&store, &host, "after a write over damage");
    assert!(bad.contains(&4) && bad.contains(&5), "{bad:?}");
    let text = verdict.damage.join("; ");
    for offset in [4, 6].map(|unit| unit * UNIT_BYTES) {
        assert!(text.contains(&format!("disk vda: {UNIT_BYTES} bytes from offset {offset}")), "{text}");
    }
    // The rest comes with the next epoch.
    let mut encoder = Encoder::new();
    encoder.disk_data(0, 0, &host.guest.disks[0]);
    encoder.device_state(&host.guest.device).unwrap();
    host.guest.cut += SECOND_NS;
    seal(encoder, PartHead { epoch: 6, ..head }, true, host.guest.cut).send(&mut ingest).unwrap();
    store.domain(UUID).unwrap().apply_all().unwrap();
    host.past.insert(6, host.guest.clone());
    let verdict = verified(&store, Scope::Newest);
    assert_eq!((verdict.damaged.len(), verdict.sound.len()), (0, 1), "{verdict:?}");
    let (good, bad) = offered(&store, &host, "mended");
    assert!(good.contains(&6) && bad.contains(&5) && bad.contains(&4), "{good:?} {bad:?}");
}

#[test]
fn a_standby_without_checksums_gets_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(8);
    drop(with_a_past(dir.path(), &mut host, 5));
    let standby = dir.path().join(UUID).join("standby.1");
    let sums: Vec<_> = files(&standby).into_iter().filter(|path| path.extension() == Some("sums".as_ref())).collect();
    assert!(sums.len() > 3, "{sums:?}");
    sums.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    let store = Store::open(dir.path(), by_hand()).unwrap();
    assert!(store.domains()[0].unsummed.is_some());
    // Epochs come while they are made, and a restart comes between.
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for epoch in 6..12 {
        assert!(epoch > 7 || store.tend(UUID, UNIT_BYTES).unwrap() > 0);
        delta(&mut host, &mut ingest, epoch);
        store.domain(UUID).unwrap().apply_all().unwrap();
    }
    drop((ingest, store));
    let store = Store::open(dir.path(), by_hand()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let mut epoch = 12;
    while store.tend(UUID, 3 * UNIT_BYTES).unwrap() > 0 {
        if epoch < 30 {
            delta(&mut host, &mut ingest, epoch);
            store.domain(UUID).unwrap().apply_all().unwrap();
            epoch += 1;
        }
    }
    assert_eq!(store.domains()[0].unsummed, None);
    assert!(standby.join("disk/vda.sums").exists() && standby.join("ram/0.sums").exists());
    let verdict = verified(&store, Scope::All);
    assert_eq!(verdict.damaged, [], "{verdict:?}");
    assert!(offered(&store, &host, "with checksums").1.is_empty());
    drop((ingest, store));
    flip(&standby.join("disk/sdb.raw"), 5000, 1);
    assert!(!verified(&Store::open(dir.path(), by_hand()).unwrap(), Scope::Newest).damaged.is_empty());
}

#[test]
fn epochs_that_come_meanwhile_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(3);
    let store = with_a_past(dir.path(), &mut host, 4);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for round in 0..3 {
        let mut verification = store.begin_verification(UUID, Scope::All).unwrap();
        let verdict = loop {
            match verification.step(UNIT_BYTES).unwrap() {
                Progress::Done(verdict) => break verdict,
                _ if host.acknowledged < 20 * (round + 1) => {
                    let epoch = host.acknowledged + 1;
                    delta(&mut host, &mut ingest, epoch);
                    store.domain(UUID).unwrap().apply_all().unwrap();
                    store.domain(UUID).unwrap().thin(false);
                }
                _ => {}
            }
        };
        assert!(verdict.damaged.is_empty() && !verdict.sound.is_empty(), "{verdict:?}");
        let newest = &store.points(UUID).unwrap()[0];
        assert!(newest.verified_unix_ns.is_some(), "{newest:?}");
    }
    // It ends when the guest is activated.
    let mut verification = store.begin_verification(UUID, Scope::Newest).unwrap();
    store.set_frozen(UUID, true).unwrap();
    assert!(matches!(verification.step(UNIT_BYTES), Err(StoreError::Frozen(_))));
    store.set_frozen(UUID, false).unwrap();
    let mut verification = store.begin_verification(UUID, Scope::Newest).unwrap();
    drop(ingest);
    store.forget(UUID).unwrap();
    assert!(verification.step(UNIT_BYTES).is_err());
}

#[test]
fn a_record_of_damage_that_is_damaged_is_no_clean_bill() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(2);
    drop(with_a_past(dir.path(), &mut host, 4));
    let standby = dir.path().join(UUID).join("standby.1");
    flip(&standby.join("ram/0.img"), 9000, 1);
    drop({
        let store = Store::open(dir.path(), by_hand()).unwrap();
        assert!(!verified(&store, Scope::Newest).damaged.is_empty());
        store
    });
    flip(&standby.join("flaws"), 20, 1);
    flip(&standby.join("ram/0.img"), 9000, 1);
    let store = Store::open(dir.path(), by_hand()).unwrap();
    assert!(store.points(UUID).unwrap().iter().all(|point| point.damaged));
    // Only when all has been read is it known what there is.
    assert!(verified(&store, Scope::Newest).damaged.is_empty());
    assert!(offered(&store, &host, "read again").1.is_empty());
}

fn inspected(dir: &Path) -> inspect::Report {
    inspect::inspect(dir, &inspect::Wanted::default()).unwrap()
}

fn sound_points(report: &inspect::Report) -> Vec<u64> {
    let all = report.domains.iter().flat_map(|domain| &domain.points);
    let sound = all.filter(|point| point.soundness == inspect::Soundness::Sound);
    sound.map(|point| point.id.parse::<PointId>().unwrap().epoch).collect()
}

#[test]
fn one_flipped_bit_anywhere_is_seen_without_a_receiver() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(4);
    {
        let store = with_a_past(dir.path(), &mut host, 9);
        assert!(verified(&store, Scope::All).damaged.is_empty());
        // Some of it is in the journal only.
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        (10..13).for_each(|epoch| delta(&mut host, &mut ingest, epoch));
        assert!(inspected(dir.path()).receiver_running);
    }
    let whole = inspected(dir.path());
    assert!(whole.sound && !whole.receiver_running, "{:?}", whole.domains[0].damage);
    assert_eq!(whole.domains[0].points[0].id, "1-12");
    let baseline = sound_points(&whole);
    assert!(baseline.len() > 7, "{baseline:?}");
    let domain = dir.path().join(UUID);
    let before: Vec<_> = files(dir.path()).iter().map(|path| std::fs::read(path).unwrap()).collect();
    let (mut flips, mut still) = (0, 0);
    for file in files(&domain) {
        let length = std::fs::metadata(&file).unwrap().len();
        let name = file.strip_prefix(dir.path()).unwrap().to_owned();
        if length == 0 {
            continue;
        }
        let bytes = std::fs::read(&file).unwrap();
        let heads = bytes.windows(4).enumerate().filter(|(_, window)| *window == b"VJR1").map(|(at, _)| at as u64);
        // Header and body of records of each kind, and places all over.
        let heads: Vec<u64> =
            heads.flat_map(|at| [at + 5, at + 20, at + 50, at + 57]).filter(|at| *at < length).collect();
        let step = (heads.len() / 12).max(1);
        let mut places: Vec<u64> = heads.into_iter().step_by(step).collect();
        places.extend((0..4).map(|_| host.random.below(length)));
        for at in places {
            let copy = tempfile::tempdir().unwrap();
            super::crash::copy_dir(dir.path(), copy.path());
            flip(&copy.path().join(&name), at, host.random.below(8));
            let context = format!("{} byte {at} of {length}", name.display());
            let report = inspected(copy.path());
            // A header that is broken at the very end of the journal looks like what a crash has torn.
            let torn = report.domains[0].points.first().is_some_and(|newest| newest.id != "1-12");
            assert!(!report.sound || torn, "{context}: not seen");
            assert!(report.sound || !report.domains[0].damage.is_empty(), "{context}");
            // What it says is sound is what the receiver gives.
            let sound = sound_points(&report);
            still += usize::from(!sound.is_empty());
            flips += 1;
            let Ok(store) = Store::open(copy.path(), by_hand()) else { continue };
            let _ = store.domain(UUID).and_then(|domain| domain.apply_all());
            while store.tend(UUID, 1 << 20).unwrap_or(0) > 0 {}
            for epoch in sound {
                let id = PointId { generation: 1, epoch };
                match store.read_point(UUID, Some(id)) {
                    Ok(reader) => host.past[&epoch].assert_read(&reader, &context),
                    // What is damaged has been given up with what lies before it.
                    Err(StoreError::NoSuchPoint { .. } | StoreError::Unknown(_)) => {}
                    Err(other) => panic!("{context}: point {epoch} was called sound: {other}"),
                }
            }
        }
    }
    assert!(flips > 100 && still > flips / 4, "{flips} {still}");
    let after: Vec<_> = files(dir.path()).iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(before == after, "something was changed");
}

#[test]
fn what_a_crash_leaves_is_no_damage() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(seed);
        let store = with_a_past(dir.path(), &mut host, 6);
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        (7..10).for_each(|epoch| delta(&mut host, &mut ingest, epoch));
        // In the middle of a batch: what is in the images then is taken back by what the history has.
        let copy = tempfile::tempdir().unwrap();
        {
            let domain = store.domain(UUID).unwrap();
            let mut standby = domain.standby();
            let applier = standby.as_mut().unwrap();
            applier.interrupted = true;
            let epochs: Vec<_> = domain.shared().backlog.iter().cloned().collect();
            applier.gather_for_test(&domain, &epochs);
            super::crash::copy_dir(dir.path(), copy.path());
        }
        let report = inspected(copy.path());
        assert!(report.sound, "seed {seed}: {:?} {:?}", report.domains[0].damage, report.domains[0].points);
        let store = Store::open(copy.path(), by_hand()).unwrap();
        store.domain(UUID).unwrap().apply_all().unwrap();
        host.past[&9].assert_stored(&store, 9, "after the crash");
        assert!(verified(&store, Scope::All).damaged.is_empty());
    }
}
