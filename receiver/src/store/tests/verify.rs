//! Damage of what lies on the disk: always found, never taken for data, and mended by sending again.

use std::io::Read;

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
pub fn with_a_past(dir: &Path, host: &mut Host, newest: u64) -> Store {
    with_a_past_under(dir, host, newest, by_hand())
}

/// The same, with other options.
pub fn with_a_past_under(dir: &Path, host: &mut Host, newest: u64, options: StoreOptions) -> Store {
    let store = Store::open(dir, options).unwrap();
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

pub fn flip(path: &Path, at: u64, bit: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at as usize] ^= 1 << bit;
    std::fs::write(path, bytes).unwrap();
}

pub fn files(dir: &Path) -> Vec<PathBuf> {
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
pub fn offered(store: &Store, host: &Host, context: &str) -> (Vec<u64>, Vec<u64>) {
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
    assert_eq!(store.last_verified(UUID).unwrap().1, Some(Scope::All));
    // Only when all has been read is it known what there is: of the images first, then of the way back.
    assert!(verified(&store, Scope::Newest).damaged.is_empty());
    let (good, bad) = offered(&store, &host, "images read again");
    assert!(good == [4] && !bad.is_empty(), "{good:?} {bad:?}");
    assert_eq!(store.last_verified(UUID).unwrap().1, Some(Scope::All));
    assert!(verified(&store, Scope::All).damaged.is_empty());
    assert!(offered(&store, &host, "read again").1.is_empty());
    assert_eq!(store.last_verified(UUID).unwrap().1, None);
}

/// Epoch `epoch`, with these units of the first disk, and the same device state and XML as before.
fn rewrite(host: &mut Host, ingest: &mut Ingest, epoch: u64, units: std::ops::Range<usize>) {
    let mut encoder = Encoder::new();
    let range = units.start * UNIT_BYTES..(units.end * UNIT_BYTES).min(host.guest.disks[0].len());
    host.guest.disks[0][range.clone()].fill(epoch as u8);
    encoder.disk_data(0, range.start as u64, &host.guest.disks[0][range]);
    encoder.device_state(&host.guest.device).unwrap();
    host.guest.cut += SECOND_NS;
    let head = PartHead { generation: 1, epoch, part: 0, kind: Kind::Delta };
    seal(encoder, head, true, host.guest.cut).send(ingest).unwrap();
    host.past.insert(epoch, host.guest.clone());
    host.acknowledged = epoch;
}

#[test]
fn damage_of_the_small_files_found_at_run_time_is_mended_by_what_comes_next() {
    for (prefix, by_reader) in [("device-", false), ("device-", true), ("domain-", false), ("domain-", true)] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(6);
        let store = with_a_past(dir.path(), &mut host, 5);
        let standby = dir.path().join(UUID).join("standby.1");
        let file =
            files(&standby).into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix));
        flip(&file.unwrap(), 3, 2);
        let context = format!("{prefix} {by_reader}");
        if by_reader {
            let read = store.read_point(UUID, None);
            assert!(matches!(read, Err(StoreError::Flawed { .. })), "{context}: {read:?}");
        } else {
            assert_eq!(verified(&store, Scope::Newest).damaged.len(), 1, "{context}");
        }
        assert!(store.points(UUID).unwrap()[0].damaged, "{context}");
        mended(&store, &mut host, &context);
        drop(store);
        let store = Store::open(dir.path(), by_hand()).unwrap();
        assert!(!store.points(UUID).unwrap()[0].damaged, "{context}");
    }
}

#[test]
fn what_activation_takes_of_the_newest_point_was_compared() {
    for name in ["device-", "domain-", "0.img"] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(6);
        let store = with_a_past(dir.path(), &mut host, 5);
        let sound = store.recovery_point_at(UUID, None, false).unwrap();
        assert_eq!(sound.checked.as_ref().unwrap().device_state(), host.guest.device);
        drop(sound);
        let standby = dir.path().join(UUID).join("standby.1");
        let file =
            files(&standby).into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(name));
        flip(&file.unwrap(), 3, 2);
        let point = store.recovery_point_at(UUID, None, false);
        if name == "0.img" {
            // Not before it is read.
            let read = crate::activate::content::ram(&point.unwrap(), 0).unwrap().read_to_end(&mut Vec::new());
            assert!(read.is_err(), "{read:?}");
        } else {
            assert!(matches!(point, Err(StoreError::Flawed { .. })), "{name}: {point:?}");
        }
        assert!(store.points(UUID).unwrap()[0].damaged, "{name}");
    }
}

/// A past in whose last three epochs, 5 to 7, the units 2 and 3 of the disk were written each time.
fn written_three_times() -> (tempfile::TempDir, Host, Store) {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(5);
    let store = with_a_past(dir.path(), &mut host, 4);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for epoch in 5..8 {
        rewrite(&mut host, &mut ingest, epoch, 2..4);
        store.domain(UUID).unwrap().apply_all().unwrap();
    }
    (dir, host, store)
}

#[test]
fn damage_that_an_activation_finds_leaves_the_points_before_it() {
    let (_dir, _host, store) = written_three_times();
    let points = store.points(UUID).unwrap();
    assert_eq!(points[0].epoch, 7);
    // The activation has fenced the old host before it reads all that it needs.
    store.set_frozen(UUID, true).unwrap();
    let domain = store.domain(UUID).unwrap();
    {
        let standby = domain.standby();
        let dir = standby.as_ref().unwrap().durable.dir;
        domain.note_flaws(dir, &[flaws::Flaw::of(Array::Disk(0), 2, 1)]).unwrap();
    }
    assert!(matches!(store.recovery_point_at(UUID, Some(points[0].id()), false), Err(StoreError::Flawed { .. })));
    let earlier = store.recovery_point_at(UUID, Some(points[1].id()), false);
    assert!(earlier.is_ok(), "{earlier:?}");
    let damaged: Vec<u64> =
        store.points_looked_at(UUID).unwrap().iter().filter(|p| p.damaged).map(|p| p.epoch).collect();
    assert_eq!(damaged, [7]);
}

#[test]
fn a_sector_that_cannot_be_read_is_damage_and_no_failure() {
    for with_sums in [true, false] {
        let disk = super::sim::SimDisk::new();
        let image = Path::new("/state").join(UUID).join("standby.1/disk/vda.raw");
        let open = || Store::open_on(Arc::new(disk.clone()), Path::new("/state"), by_hand()).unwrap();
        let mut host = host(9);
        {
            let store = open();
            let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
            host.cut();
            host.send(&mut ingest, 0).unwrap();
            for epoch in 2..5 {
                rewrite(&mut host, &mut ingest, epoch, 0..9);
                store.domain(UUID).unwrap().apply_all().unwrap();
            }
        }
        if !with_sums {
            for name in ["ram/0.sums", "disk/vda.sums"] {
                use vmdr_journal::Disk;
                disk.remove_file(&image.parent().unwrap().parent().unwrap().join(name)).unwrap();
            }
        }
        let store = open();
        disk.lose_sector(&image, 5 * UNIT_BYTES as u64 + 600);
        let domain = store.domain(UUID).unwrap();
        let mut steps = 0;
        while store.tend(UUID, 1 << 20).unwrap() > 0 {
            steps += 1;
            assert!(steps < 1000);
        }
        if with_sums {
            let verdict = verified(&store, Scope::Newest);
            assert_eq!(verdict.damaged.len(), 1, "{verdict:?}");
        }
        let text = store.domains()[0].damage.clone().unwrap();
        assert!(text.contains("disk vda: 4096 bytes from offset 20480 on"), "{text}");
        let hashes = store.hashes(UUID, 4, Array::Disk(0), 0, 2, 65_536).unwrap();
        assert_eq!(
            (hashes[0] == super::hash(&host.guest.disks[0][..65_536]), hashes[1]),
            (false, super::hash(&host.guest.disks[0][65_536..131_072]))
        );
        assert!(matches!(store.read_point(UUID, None), Err(StoreError::Flawed { .. })));
        // Sent again, it is in order; the domain is the same all the time.
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        rewrite(&mut host, &mut ingest, 5, 5..6);
        domain.apply_all().unwrap();
        assert!(verified(&store, Scope::All).damaged.iter().all(|id| id.epoch < 5));
        let (good, bad) = offered(&store, &host, "sent again");
        assert!(good.contains(&5) && bad == [4], "{good:?} {bad:?}");
        assert_eq!(store.domains()[0].trouble, None);
    }
}

#[test]
fn checksums_that_cannot_be_read_stop_nothing_and_come_anew() {
    let disk = super::sim::SimDisk::new();
    let sums = Path::new("/state").join(UUID).join("standby.1/disk/vda.sums");
    let open = || Store::open_on(Arc::new(disk.clone()), Path::new("/state"), by_hand()).unwrap();
    let mut host = host(10);
    let store = open();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    rewrite(&mut host, &mut ingest, 2, 0..9);
    let domain = store.domain(UUID).unwrap();
    domain.apply_all().unwrap();

    // One unit is written, whose sum lies in a block with all the others.
    disk.lose_sector(&sums, 17);
    rewrite(&mut host, &mut ingest, 3, 5..6);
    domain.apply_all().unwrap();
    assert_eq!(store.position(UUID).unwrap().epoch, 3);
    drop((ingest, domain));
    drop(store);
    let store = open();
    assert_eq!(store.position(UUID).unwrap().epoch, 3);

    // What has no sum any more counts as damaged, until it is sent again.
    assert!(!verified(&store, Scope::Newest).damaged.is_empty());
    let units = host.guest.disks[0].len().div_ceil(UNIT_BYTES);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    rewrite(&mut host, &mut ingest, 4, 0..units);
    store.domain(UUID).unwrap().apply_all().unwrap();
    assert!(verified(&store, Scope::Newest).damaged.is_empty());
    let (good, _) = offered(&store, &host, "sent again");
    assert!(good.contains(&4), "{good:?}");
}

#[test]
fn before_images_that_were_damaged_are_found_when_the_record_of_it_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(5);
    {
        let store = with_a_past(dir.path(), &mut host, 4);
        flip(&dir.path().join(UUID).join("standby.1/disk/vda.raw"), 2 * UNIT_BYTES as u64 + 70, 3);
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        rewrite(&mut host, &mut ingest, 5, 2..3);
        rewrite(&mut host, &mut ingest, 6, 12..13);
        store.domain(UUID).unwrap().apply_all().unwrap();
        assert!(verified(&store, Scope::All).damaged.iter().any(|id| id.epoch == 4));
    }
    let expected = {
        let store = Store::open(dir.path(), by_hand()).unwrap();
        offered(&store, &host, "known")
    };
    assert!(expected.0.contains(&5) && expected.1.contains(&4), "{expected:?}");
    let record = dir.path().join(UUID).join("standby.1/flaws");
    for lost in [false, true] {
        // Damaged, or not there at all: then it is found by who reads everything.
        if lost {
            std::fs::remove_file(&record).unwrap()
        } else {
            flip(&record, 20, 1)
        }
        let store = Store::open(dir.path(), by_hand()).unwrap();
        let verdict = verified(&store, Scope::All);
        assert!(verdict.damaged.iter().any(|id| id.epoch == 4), "{verdict:?}");
        assert_eq!(offered(&store, &host, "found again"), expected);
        // And again nothing else comes of it.
        let again = verified(&store, Scope::All);
        assert_eq!((again.sound, again.damaged), (verdict.sound, verdict.damaged));
        assert_eq!(store.last_verified(UUID).unwrap().1, None);
    }
}

#[test]
fn nothing_is_written_for_a_domain_that_was_closed_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(5);
    let store = with_a_past(dir.path(), &mut host, 4);
    flip(&dir.path().join(UUID).join("standby.1/disk/vda.raw"), 2 * UNIT_BYTES as u64 + 70, 3);
    let reader = store.read_point(UUID, None).unwrap();
    let domain = store.domain(UUID).unwrap();
    let mut verification = store.begin_verification(UUID, Scope::All).unwrap();
    while verification.progress().0 == 0 {
        verification.step(UNIT_BYTES).unwrap();
    }
    let tends = domain.clone();
    let guard = domain.standby();
    let waits = std::thread::spawn(move || {
        loop {
            match verification.step(1 << 20) {
                Ok(Progress::Done(_)) => return false,
                Ok(_) => {}
                Err(_) => return true,
            }
        }
    });
    let tends = std::thread::spawn(move || {
        (tends.tend(1 << 20).is_err(), tends.hashes(4, Array::Disk(0), 0, 1, 65_536).is_err())
    });
    std::thread::sleep(Duration::from_millis(200));
    domain.shared().closing = true;
    drop(guard);
    assert!(waits.join().unwrap());
    assert_eq!(tends.join().unwrap(), (true, true));
    assert!(reader.read(Array::Disk(0), 0, &mut [0; 65_536]).is_err());
    assert!(!dir.path().join(UUID).join("standby.1/flaws").exists());
}

#[test]
fn damage_that_is_found_while_other_damage_is_located_is_located_too() {
    let (dir, host, store) = written_three_times();
    let domain = store.domain(UUID).unwrap();
    let note = |unit: u64| {
        let standby = domain.standby();
        domain.note_flaws(standby.as_ref().unwrap().durable.dir, &[flaws::Flaw::of(Array::Disk(0), unit, 1)]).unwrap();
    };
    note(2);
    // It cannot be read now: nothing is concluded from that.
    let history = dir.path().join(UUID).join("standby.1/history");
    let aside = dir.path().join(UUID).join("standby.1/aside");
    std::fs::rename(&history, &aside).unwrap();
    assert!(store.tend(UUID, 1).is_err());
    std::fs::rename(&aside, &history).unwrap();
    note(3);
    let found = domain.catalog().flaws_found;
    while store.tend(UUID, 1).unwrap() > 0 {}
    let (good, bad) = offered(&store, &host, "located");
    assert!(good.contains(&6) && bad == [7], "{good:?} {bad:?}");
    let catalog = domain.catalog();
    assert_eq!((catalog.flaws_found, catalog.flaws_located), (found, found));
    assert!(catalog.readers.is_empty());
}

#[test]
fn a_great_deal_of_damage_is_noted_quickly_and_ends_when_all_of_it_is_mended() {
    use super::super::pending::Flawed;
    use vmdr_journal::Key;
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(5);
    let store = with_a_past(dir.path(), &mut host, 4);
    let domain = store.domain(UUID).unwrap();
    let standby = domain.standby();
    let dir = standby.as_ref().unwrap().durable.dir;
    // Every second unit of 8 GiB, written by several epochs in no order.
    let units: u64 = if std::env::var_os("VMDR_SOAK").is_some() { 1 << 20 } else { 1 << 18 };
    let touched: Vec<Flawed> = (0..units)
        .map(|n| (n * 7919) % units)
        .map(|n| Flawed { key: Key { array: Array::Disk(0), unit: 2 * n }, count: 1, healed_by: Some(2 + n % 3) })
        .collect();
    let began = std::time::Instant::now();
    let (flaws, coarse) = domain.flaws_after(dir, &touched).unwrap().unwrap();
    println!("{units} units: {} flaws after {:?}", flaws.len(), began.elapsed());
    assert!(coarse && began.elapsed() < Duration::from_secs(20));
    domain.set_flaws(dir, flaws, coarse);
    assert!(domain.newest_is_damaged());
    drop(standby);
    // What lies between was never damaged: it is known when it was read.
    assert_eq!(store.last_verified(UUID).unwrap().1, Some(Scope::Newest));
    let verdict = verified(&store, Scope::Newest);
    assert!(verdict.damaged.is_empty() && !domain.newest_is_damaged(), "{verdict:?}");
    assert_eq!(store.last_verified(UUID).unwrap().1, None);
    // Older points have it still.
    assert!(store.points(UUID).unwrap().iter().all(|point| point.damaged == (point.epoch < 4)));
}

#[test]
fn damage_of_older_points_does_not_end_with_that_of_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(5);
    let store = with_a_past(dir.path(), &mut host, 6);
    let domain = store.domain(UUID).unwrap();
    // So many, of so many points each, that they are not told apart.
    let many =
        (0..9000).map(|n| flaws::Flaw { array: Array::Disk(0), unit: 2 * n, count: 1, after: n, up_to: u64::MAX });
    let mut many: Vec<_> = many.collect();
    many.push(flaws::Flaw { up_to: 3, after: 0, ..many[0] });
    {
        let _standby = domain.standby();
        domain.note_flaws(1, &many).unwrap();
    }
    assert!(verified(&store, Scope::Newest).damaged.is_empty());
    let damaged: Vec<_> = store.points(UUID).unwrap().iter().filter(|p| p.damaged).map(|p| p.epoch).collect();
    assert_eq!(damaged, [3, 2, 1]);
}

#[test]
fn checksums_are_made_only_when_it_is_said_that_there_are_some() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(8);
    let store = with_a_past(dir.path(), &mut host, 5);
    let standby = dir.path().join(UUID).join("standby.1");
    // As a program left it that knew of none, or came between.
    store.domain(UUID).unwrap().change_control(|control| control.small_sums.clear()).unwrap();
    drop(store);
    flip(&standby.join("disk/vda.raw"), 5000, 1);
    host.guest.disks[0][5000] ^= 2;
    host.past.insert(5, host.guest.clone());
    let store = Store::open(dir.path(), by_hand()).unwrap();
    assert!(store.domain(UUID).unwrap().control().small_sums.is_empty());
    assert!(store.tend(UUID, UNIT_BYTES).unwrap() > 0);
    assert_eq!(store.domain(UUID).unwrap().control().small_sums.len(), 1);
    while store.tend(UUID, 1 << 20).unwrap() > 0 {}
    assert!(verified(&store, Scope::Newest).damaged.is_empty());
    host.guest.assert_stored(&store, 5, "of another version");
    // A seed says so before it has any.
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let seed = host.guest.epoch(&mut host.random, 1, 6, Kind::Seed);
    ingest.begin(seed[0].head).unwrap();
    assert_eq!(store.domain(UUID).unwrap().control().small_sums.len(), 2);
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
