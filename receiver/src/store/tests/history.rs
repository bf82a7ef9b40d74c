//! Points in time: every one that is offered is exactly what the guest was, whatever happened to the disk.

use super::sim::{Fault, SimDisk};
use super::*;

/// Schedules of the usual run, and of one with VMDR_SOAK.
const SCHEDULES: (u64, u64) = (60, 2_400);
/// Each crash in turn, in so many steps.
const STEPS: u64 = 26;

/// Tiers that have something to do within some ten epochs of a second each.
fn tiers() -> Retention {
    let tier = |every, up_to| Tier { every_ns: every * SECOND_NS, for_ns: up_to * SECOND_NS };
    Retention { budget_bytes: 1 << 30, tiers: vec![tier(0, 8), tier(5, 25), tier(15, 90)] }
}

/// Nothing is done but what the test does: so that a seed gives the same operations each time.
pub fn by_hand() -> StoreOptions {
    StoreOptions { retention: tiers(), history_segment_bytes: 60_000, ..lazy() }
}

fn open(disk: &SimDisk) -> Result<Store, StoreError> {
    open_with(disk, &by_hand())
}

fn open_with(disk: &SimDisk, options: &StoreOptions) -> Result<Store, StoreError> {
    Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options.clone())
}

pub fn host(seed: u64) -> Host {
    let mut host = Host::new(seed);
    host.keep = true;
    host.guest.clock = Some(1_000 * SECOND_NS);
    host
}

/// Epochs come, are applied, thinned out, pinned and read, until the disk dies.
fn life(store: &Store, host: &mut Host, context: &str) -> Result<(), StoreError> {
    let mut ingest = store.open_stream(UUID, "gast", 0)?;
    let domain = store.domain(UUID)?;
    let from = host.reconnected(ingest.position(), context);
    host.send(&mut ingest, from)?;
    for step in 0..STEPS {
        host.cut();
        host.send(&mut ingest, 0)?;
        match host.random.below(9) {
            0..=2 => domain.batch()?,
            3 | 4 => {
                domain.apply_all()?;
                domain.thin(false);
            }
            5 => {
                domain.apply_all()?;
                let name = format!("pin-{step}-{}", host.acknowledged);
                store.pin(UUID, &name, None)?;
            }
            6 => {
                let names: Vec<_> = domain.control().pins.iter().map(|pin| pin.name.clone()).collect();
                if let Some(name) = names.first() {
                    store.release(UUID, name)?;
                }
            }
            7 => {
                // Sometimes to the end, sometimes only a little, with whatever comes next in between.
                let scope = if host.random.below(2) == 0 { Scope::All } else { Scope::Newest };
                let mut verification = store.begin_verification(UUID, scope)?;
                for _ in 0..host.random.below(60) {
                    if let Progress::Done(verdict) = verification.step(32 << 10)? {
                        assert!(verdict.damaged.is_empty(), "{context}: {verdict:?}");
                        break;
                    }
                }
            }
            _ => {
                let points = store.points(UUID)?;
                let point = points[host.random.below(points.len() as u64) as usize].id();
                if domain.catalog().find(point).is_some() {
                    let reader = store.read_point(UUID, Some(point))?;
                    // A disk that dies meanwhile ends this life, as anywhere else.
                    host.past[&point.epoch].read(&reader, context)?;
                }
            }
        }
    }
    Ok(())
}

/// Everything that is offered is what it was, and everything is offered that must be.
pub fn check(store: &Store, host: &Host, context: &str) {
    let domain = store.domain(UUID).unwrap_or_else(|e| panic!("{context}: {e}"));
    assert_eq!(store.domains()[0].trouble, None, "{context}");
    let position = store.position(UUID).unwrap();
    assert!(position.epoch >= host.acknowledged, "{context}: {position:?}, acknowledged {}", host.acknowledged);
    domain.apply_all().unwrap_or_else(|e| panic!("{context}: {e}"));
    let points = store.points(UUID).unwrap();
    if position.epoch == 0 {
        assert!(points.is_empty(), "{context}");
        return;
    }
    assert_eq!((points[0].epoch, points[0].newest), (position.epoch, true), "{context}");
    for point in &points {
        assert!(!point.damaged, "{context}: {point:?}");
        let guest = host.past.get(&point.epoch).unwrap_or_else(|| panic!("{context}: {point:?}"));
        let reader = store.read_point(UUID, Some(point.id())).unwrap_or_else(|e| panic!("{context}: {e}"));
        guest.assert_read(&reader, context);
    }
    host.past[&position.epoch].assert_stored(store, position.epoch, context);
    // Checksums went with what they are of, through all that has happened.
    while store.tend(UUID, 1 << 20).unwrap_or_else(|e| panic!("{context}: {e}")) > 0 {}
    let verdict = super::verify::verified(store, Scope::All);
    assert!(verdict.damaged.is_empty() && verdict.damage.is_empty(), "{context}: {verdict:?}");
    let there: Vec<u64> = points.iter().map(|point| point.epoch).collect();
    for pin in &domain.control().pins {
        assert!(there.contains(&pin.epoch), "{context}: {pin:?} of {there:?}");
    }
    // The finest tier keeps every epoch; what was sent before the first seed does not count.
    let now = host.past[&position.epoch].cut;
    let recent = host.past.range(..=position.epoch).filter(|(_, guest)| now - guest.cut <= 8 * SECOND_NS);
    for (epoch, _) in recent {
        assert!(there.contains(epoch), "{context}: epoch {epoch} of {there:?}, {position:?}");
    }
}

fn seeds(usual: u64, soak: u64) -> std::ops::Range<u64> {
    let given = std::env::var("VMDR_SEEDS").ok();
    if let Some((from, to)) = given.as_deref().and_then(|text| text.split_once("..")) {
        return from.parse().unwrap()..to.parse().unwrap();
    }
    0..if std::env::var_os("VMDR_SOAK").is_some() { soak } else { usual }
}

#[test]
fn every_point_is_what_it_was_after_a_crash_at_any_operation() {
    schedules(seeds(SCHEDULES.0, SCHEDULES.1), &by_hand());
}

#[test]
fn every_point_of_an_encrypted_domain_is_what_it_was_after_a_crash_at_any_operation() {
    // In some of these a crash once left a unit of zeroes that did not open, or its checksum of long ago.
    let found = [33, 56, 83, 210, 248];
    let all =
        seeds(SCHEDULES.0, SCHEDULES.1).chain(found.into_iter().filter(|_| std::env::var_os("VMDR_SEEDS").is_none()));
    schedules(all, &StoreOptions { keys: keyring(1), ..by_hand() });
}

/// How many operations a schedule has; crashes are spread over all of them.
fn schedules(seeds: impl Iterator<Item = u64>, options: &StoreOptions) {
    let test = if options.keys == Keyring::default() { "every_point_is" } else { "every_point_of_an_encrypted" };
    for seed in seeds {
        let context = format!(
            "replay: VMDR_SEEDS={seed}..{} cargo nextest run -p vmdr-receiver --lib history::{test}; seed {seed}",
            seed + 1
        );
        let mut host = host(seed % 16);
        let mut random = Random(seed ^ 0x5eed);
        let mut disk = SimDisk::new();
        for life_number in 0..3 {
            // All sixteen guests, each stopped elsewhere: with enough seeds at every operation there is.
            let after = match life_number {
                0 => 1 + (seed / 16) * 9 % 1_300 + random.below(9),
                _ => 1 + random.below(700),
            };
            disk.fail(after, Fault::Crash);
            if let Ok(store) = open_with(&disk, options) {
                let _ = life(&store, &mut host, &context);
            }
            disk = disk.crashed(&mut random);
            if random.below(3) == 0 {
                // The next life ends while it looks what is there.
                disk.fail(1 + random.below(60), Fault::Crash);
                let _ = open_with(&disk, options).and_then(|store| store.domain(UUID)?.apply_all());
                disk = disk.crashed(&mut random);
            }
            let store = open_with(&disk, options).unwrap_or_else(|e| panic!("{context}: {e}"));
            if !store.domains().is_empty() {
                check(&store, &host, &context);
            }
        }
    }
}

#[test]
fn a_history_that_cannot_be_read_now_keeps_nobody_from_protecting_and_is_there_again_later() {
    let disk = SimDisk::new();
    let mut host = host(9);
    let store = with_a_past(&disk, &mut host);
    let ids = |store: &Store| store.points(UUID).unwrap().iter().map(Point::id).collect::<Vec<_>>();
    let before = ids(&store);
    let pinned = store.pin(UUID, "old", Some(before[before.len() - 2])).unwrap();
    drop(store);
    let mut unread = 0;
    // From where the history begins to be read.
    for after in (1..).step_by(3) {
        disk.fail(after, Fault::Read);
        let reads = disk.reached(Fault::Read);
        let Ok(store) = open(&disk) else { continue };
        let reached = disk.reached(Fault::Read) >= reads + after;
        disk.heal();
        let offered = store.points(UUID).map(|points| points.len()).unwrap_or(0);
        if reached && offered == 1 {
            // Nothing of what could not be read is removed, whatever is done meanwhile.
            unread += 1;
            assert!(store.domains()[0].trouble.as_ref().unwrap().contains("cannot be had"), "{after}");
            let domain = store.domain(UUID).unwrap();
            let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
            deltas(&mut host, &mut ingest, 2);
            domain.apply_all().unwrap();
            domain.thin(true);
            assert_eq!(store.points(UUID).unwrap().len(), 3, "{after}");
        }
        drop(store);
        let store = open(&disk).unwrap();
        let now = ids(&store);
        assert!(now.contains(&pinned) && now.ends_with(&before), "{after}: {now:?} {before:?}");
        if reached && offered == 1 {
            check(&store, &host, &format!("read {after} failed"));
        }
        if !reached || unread == 4 {
            break;
        }
    }
    assert_eq!(unread, 4);
}

/// A history that thinning has something to merge in.
fn with_a_past(disk: &SimDisk, host: &mut Host) -> Store {
    let store = open(disk).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let domain = store.domain(UUID).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    while host.acknowledged < 34 {
        deltas(host, &mut ingest, 1);
        domain.apply_all().unwrap();
    }
    store
}

fn deltas(host: &mut Host, ingest: &mut Ingest, count: u64) {
    for _ in 0..count {
        let epoch = host.acknowledged + 1;
        for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
            part.send(ingest).unwrap();
        }
        host.past.insert(epoch, host.guest.clone());
        host.acknowledged = epoch;
    }
}

#[test]
fn a_merge_that_could_not_be_said_is_not_gone_back_by() {
    let mut merges_failed = 0;
    let mut after = 1;
    // Every operation of a thinning is one at which there is no space, and the batch behind it is stopped at several.
    loop {
        let mut reached = false;
        for stop in [9, 19, 29] {
            let context = format!("no space at operation {after} of thinning, a crash at {stop} of the next batch");
            let disk = SimDisk::new();
            let mut host = host(9);
            let store = with_a_past(&disk, &mut host);
            let domain = store.domain(UUID).unwrap();
            let before = disk.operations();
            disk.fail(after, Fault::Full);
            domain.thin(false);
            reached = disk.operations() >= before + after;
            merges_failed += u32::from(reached);
            disk.heal();
            let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
            deltas(&mut host, &mut ingest, 3);
            disk.fail(stop, Fault::Crash);
            let _ = domain.batch();
            drop((ingest, domain, store));
            let disk = disk.crashed(&mut Random(after * 31 + stop));
            let store = open(&disk).unwrap_or_else(|e| panic!("{context}: {e}"));
            check(&store, &host, &context);
        }
        if !reached {
            break;
        }
        after += 1;
    }
    assert!(merges_failed > 30, "{merges_failed}");
}

#[test]
fn a_quiet_life_is_thinned_out_as_the_policy_says() {
    let disk = SimDisk::new();
    let mut host = host(3);
    let store = open(&disk).unwrap();
    let domain = store.domain(UUID);
    assert!(matches!(domain, Err(StoreError::Unknown(_))));
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let domain = store.domain(UUID).unwrap();
    host.seeded = false;
    for n in 0..130 {
        host.cut();
        host.send(&mut ingest, 0).unwrap();
        if n % 3 == 0 {
            domain.apply_all().unwrap();
            domain.thin(false);
        }
        if n == 60 {
            assert_eq!(store.pin(UUID, "before-upgrade", None).unwrap().epoch, host.acknowledged);
        }
    }
    domain.apply_all().unwrap();
    domain.thin(false);
    check(&store, &host, "quiet");
    let points = store.points(UUID).unwrap();
    let now = points[0].cut_unix_ns;
    let named: Vec<_> = points.iter().filter(|point| !point.names.is_empty()).collect();
    assert_eq!((named.len(), named[0].names[0].as_str()), (1, "before-upgrade"));
    // What no tier asks for is gone but for the pinned one and those that wait to be merged.
    let old = points.iter().filter(|point| now - point.cut_unix_ns > 90 * SECOND_NS && point.names.is_empty());
    assert_eq!(old.filter(|point| point.epoch > named[0].epoch).count(), 0, "{points:?}");
    let coarse = points.iter().filter(|point| (30..85).contains(&((now - point.cut_unix_ns) / SECOND_NS)));
    assert!(coarse.count() <= 10, "{points:#?}");
    assert!(points.len() < 40, "{}", points.len());
    let error = store.pin(UUID, "before-upgrade", None).unwrap_err().to_string();
    assert!(error.contains("already"), "{error}");
    for name in ["", "-x", "a b", "../x", &"x".repeat(65), "ä"] {
        assert!(matches!(store.pin(UUID, name, None), Err(StoreError::Refused { .. })), "{name:?}");
    }
    store.release(UUID, "before-upgrade").unwrap();
    assert!(store.points(UUID).unwrap().iter().all(|point| point.names.is_empty()));
    assert!(matches!(store.release(UUID, "before-upgrade"), Err(StoreError::Refused { .. })));
    let gone = PointId { generation: 1, epoch: 2 };
    assert!(matches!(store.read_point(UUID, Some(gone)), Err(StoreError::NoSuchPoint { .. })));
}

#[test]
fn a_reader_sees_its_point_whatever_happens_meanwhile() {
    for seed in 0..4 {
        let disk = SimDisk::new();
        let mut host = host(seed);
        let store = open(&disk).unwrap();
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        let domain = store.domain(UUID).unwrap();
        let mut readers = Vec::new();
        for n in 0..70 {
            host.cut();
            host.send(&mut ingest, 0).unwrap();
            if n % 2 == 0 {
                domain.apply_all().unwrap();
                domain.thin(false);
            }
            if n % 10 == 4 {
                readers.push(store.read_point(UUID, None).unwrap());
            }
            if n % 7 == 0 {
                for reader in &readers {
                    host.past[&reader.id().epoch].assert_read(reader, &format!("seed {seed} epoch {n}"));
                }
            }
        }
        let (older, newer) = (readers[4].id(), &readers[5]);
        if let Ok(changes) = newer.changed_since(older) {
            // What is not among the changes is the same.
            let (old, new) = (&host.past[&older.epoch], &host.past[&newer.id().epoch]);
            for n in 0..old.disks.len().min(new.disks.len()) {
                for (unit, (a, b)) in old.disks[n].chunks(4096).zip(new.disks[n].chunks(4096)).enumerate() {
                    let at = unit as u64 * 4096;
                    let told = changes.iter().any(|change| {
                        change.array == Array::Disk(n as u16)
                            && (change.offset..change.offset + change.bytes).contains(&at)
                    });
                    assert!(told || a == &b[..a.len()], "seed {seed}: disk {n} at {at}");
                }
            }
        }
        drop(readers);
        domain.thin(false);
        check(&store, &host, &format!("seed {seed}"));
    }
}

#[test]
fn what_does_not_fit_goes_from_the_oldest_on_and_pinned_points_stay() {
    let disk = SimDisk::new();
    let mut host = host(5);
    let store = open(&disk).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let domain = store.domain(UUID).unwrap();
    let budget = 900_000;
    let all = Tier { every_ns: 0, for_ns: u64::MAX };
    let policy = Retention { budget_bytes: budget, tiers: vec![all] };
    store.set_retention(UUID, Some(policy.clone())).unwrap();
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    host.seeded = true;
    let mut pinned = None;
    let mut alarmed = false;
    for n in 0..60 {
        // Deltas only.
        let epoch = host.acknowledged + 1;
        for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
            part.send(&mut ingest).unwrap();
        }
        host.past.insert(epoch, host.guest.clone());
        host.acknowledged = epoch;
        domain.apply_all().unwrap();
        domain.thin(false);
        if n == 5 {
            pinned = Some(store.pin(UUID, "keep", None).unwrap().epoch);
        }
        let summary = &store.domains()[0];
        assert!(summary.history_bytes <= budget, "{n}: {}", summary.history_bytes);
        alarmed |= summary.alarm.is_some();
    }
    assert!(alarmed);
    let points = store.points(UUID).unwrap();
    let oldest = points.last().unwrap();
    assert_eq!(Some(oldest.epoch), pinned);
    assert!(points.len() > 3 && points.len() < 55, "{}", points.len());
    // The rest is the newest, without a gap.
    let rest: Vec<u64> = points.iter().map(|point| point.epoch).filter(|e| Some(*e) != pinned).collect();
    assert_eq!(rest.first().unwrap() - rest.last().unwrap() + 1, rest.len() as u64, "{rest:?}");
    for point in &points {
        let reader = store.read_point(UUID, Some(point.id())).unwrap();
        host.past[&point.epoch].assert_read(&reader, "budget");
    }
    // With nothing left that may go, nothing more is taken; a release helps.
    store.set_retention(UUID, Some(Retention { budget_bytes: 1000, ..policy.clone() })).unwrap();
    let parts = host.guest.epoch(&mut host.random, 1, host.acknowledged + 1, Kind::Delta);
    let error = parts[0].send(&mut ingest).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }) && error.to_string().contains("release"), "{error}");
    assert_eq!(store.points(UUID).unwrap().len(), 2);
    store.release(UUID, "keep").unwrap();
    for part in &parts {
        part.send(&mut ingest).unwrap();
    }
    assert_eq!(store.retention(UUID).unwrap().budget_bytes, 1000);
    store.set_retention(UUID, None).unwrap();
    assert_eq!(store.retention(UUID).unwrap(), tiers());
}

/// Sends another epoch and applies it.
fn go_on(store: &Store, host: &mut Host, epoch: u64) {
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
        part.send(&mut ingest).unwrap();
    }
    host.past.insert(epoch, host.guest.clone());
    store.domain(UUID).unwrap().apply_all().unwrap();
}

#[test]
fn one_flipped_bit_anywhere_in_the_history_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = host(11);
    {
        let store = Store::open(dir.path(), by_hand()).unwrap();
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        let domain = store.domain(UUID).unwrap();
        host.cut();
        host.send(&mut ingest, 0).unwrap();
        for epoch in 2..=14 {
            for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
                part.send(&mut ingest).unwrap();
            }
            host.past.insert(epoch, host.guest.clone());
            if epoch % 3 == 0 {
                domain.apply_all().unwrap();
                domain.thin(false);
            }
        }
        domain.apply_all().unwrap();
    }
    let (baseline, sets) = {
        let store = Store::open(dir.path(), by_hand()).unwrap();
        let sets = store.domain(UUID).unwrap().catalog().chains[0].sets.clone();
        (store.points(UUID).unwrap().len(), sets)
    };
    assert!(baseline > 8, "{baseline}");
    let history = dir.path().join(UUID).join("standby.1/history");
    let mut segments: Vec<_> = std::fs::read_dir(&history).unwrap().map(|e| e.unwrap().path()).collect();
    segments.sort();
    assert!(segments.len() > 1);
    let (mut flips, mut by_scan, mut unneeded) = (0, 0, 0);
    for segment in &segments {
        let whole = std::fs::read(segment).unwrap();
        let number: u64 = segment.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        // A segment stays as long as it has a set that is needed. Beside that there may be sets that were thinned out, or
        // became part of another: nothing that is offered is read through what is in those.
        let needed = |at: usize| {
            let within =
                |set: &vmdr_journal::Set| set.segment == number && (set.offset..set.end).contains(&(at as u64));
            at < 64 || sets.iter().any(within)
        };
        let name = segment.strip_prefix(dir.path()).unwrap();
        // Every record's header and the first bytes of its body, and places all over.
        let magic = whole.windows(4).enumerate().filter(|(_, w)| *w == b"VJR1").map(|(at, _)| at);
        let mut places: Vec<usize> = magic.flat_map(|at| [at, at + 5, at + 20, at + 45, at + 58]).collect();
        places.extend((0..12).map(|_| host.random.below(whole.len() as u64) as usize));
        places.extend([3, 20, 40, 60]);
        let step = (places.len() / 30).max(1);
        for at in places.into_iter().step_by(step).filter(|at| *at < whole.len()) {
            // Between the header's fields there are bytes that mean nothing; they are in a checksum all the same.
            let copy = tempfile::tempdir().unwrap();
            super::crash::copy_dir(dir.path(), copy.path());
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << host.random.below(8);
            std::fs::write(copy.path().join(name), bytes).unwrap();
            let context = format!("{} byte {at} of {}", name.display(), whole.len());
            let store = Store::open(copy.path(), by_hand()).unwrap();
            let points = store.points(UUID).unwrap();
            assert_eq!(points[0].epoch, 14, "{context}");
            let noticed = store.domains()[0].trouble.is_some();
            by_scan += usize::from(noticed);
            assert_eq!(noticed, points.len() < baseline, "{context}: {:?}", store.domains()[0].trouble);
            let mut lost = baseline - points.len();
            for point in &points {
                match store.read_point(UUID, Some(point.id())) {
                    Ok(reader) => host.past[&point.epoch].assert_read(&reader, &context),
                    Err(StoreError::Damaged { .. }) => lost += 1,
                    Err(other) => panic!("{context}: {other}"),
                }
            }
            // (The headers of records are noticed there too: the next record is found by them.)
            if lost == 0 && !needed(at) {
                assert_eq!(store.domains()[0].trouble, None, "{context}");
                unneeded += 1;
                continue;
            }
            assert!(lost > 0, "{context}: not noticed");
            assert!(store.domains()[0].trouble.is_some(), "{context}");
            let offered = store.points(UUID).unwrap().iter().filter(|point| !point.damaged).count();
            assert_eq!(offered, baseline - lost, "{context}");
            flips += 1;

            // What comes after that is not lost behind it.
            if flips % 4 == 0 {
                let (mut later, mut newest) = (host.clone(), store);
                for reopened in 0..2u64 {
                    go_on(&newest, &mut later, 15 + reopened);
                    drop(newest);
                    newest = Store::open(copy.path(), by_hand()).unwrap();
                    let points = newest.points(UUID).unwrap();
                    let epochs: Vec<u64> = points.iter().map(|point| point.epoch).collect();
                    let behind: Vec<u64> = (14..=15 + reopened).rev().collect();
                    assert_eq!(epochs[..behind.len()], behind, "{context}");
                    for point in &points[..behind.len()] {
                        let reader = newest.read_point(UUID, Some(point.id())).unwrap();
                        later.past[&point.epoch].assert_read(&reader, &context);
                    }
                }
            }
        }
    }
    assert!(flips > 40 && by_scan > 10 && by_scan < flips && unneeded < flips / 2, "{flips} {by_scan} {unneeded}");
}

#[test]
fn a_hundred_gibibytes_that_are_empty_cost_nothing_and_history_is_on_the_disk() {
    let units: u64 = if std::env::var_os("VMDR_SOAK").is_some() { 1 << 20 } else { 1 << 14 };
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), by_hand()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let domain = store.domain(UUID).unwrap();
    let layout = Layout {
        machine: "pc".to_owned(),
        ram: vec![RamBlock { name: "pc.ram".to_owned(), used_bytes: 4096, page_bytes: 4096 }],
        disks: vec![DiskLayout { target: "vda".to_owned(), size_bytes: 100 << 30 }],
    };
    let send = |ingest: &mut Ingest, epoch: u64, kind: Kind, write: &mut dyn FnMut(&mut Encoder)| {
        let mut encoder = Encoder::new();
        if kind == Kind::Seed {
            encoder.layout(&layout).unwrap();
            encoder.domain_xml("<domain/>").unwrap();
        }
        write(&mut encoder);
        encoder.device_state(b"device").unwrap();
        let sent = seal(encoder, PartHead { generation: 1, epoch, part: 0, kind }, true, epoch * SECOND_NS);
        sent.send(ingest).unwrap();
    };
    send(&mut ingest, 1, Kind::Seed, &mut |_| {});
    let memory = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let before = memory();
    // A byte in every second unit: each is a before-image of its own.
    let per_epoch = units / 8;
    for epoch in 2..10 {
        send(&mut ingest, epoch, Kind::Delta, &mut |encoder| {
            for n in 0..per_epoch {
                encoder.disk_data(0, ((epoch - 2) * per_epoch + n) * 8192, &[epoch as u8]);
            }
        });
        domain.apply_all().unwrap();
    }
    // The whole disk becomes zero: what was there is kept, what was not is not even looked at.
    send(&mut ingest, 10, Kind::Delta, &mut |encoder| encoder.disk_zero(0, 0, 100 << 30));
    domain.apply_all().unwrap();
    let grown = memory().saturating_sub(before);
    let entries: u64 = domain.catalog().chains[0].sets.iter().map(|set| set.units).sum();
    println!("{entries} units of history, {} MiB more memory", grown >> 20);
    assert!(entries >= 2 * units);
    // Bounded by what is gathered at once, and by the allocator's habits.
    assert!(grown < 400 << 20, "{} MiB", grown >> 20);
    let began = std::time::Instant::now();
    let reader = store.read_point(UUID, Some(PointId { generation: 1, epoch: 2 })).unwrap();
    println!(
        "the oldest point opened in {:?}, {} MiB more memory",
        began.elapsed(),
        memory().saturating_sub(before) >> 20
    );
    let mut byte = [0];
    for n in [0, 1, per_epoch - 1] {
        reader.read(Array::Disk(0), n * 8192, &mut byte).unwrap();
        assert_eq!(byte, [2]);
    }
    reader.read(Array::Disk(0), per_epoch * 8192, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}
