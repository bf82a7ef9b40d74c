//! Every operation fails once, in each way: nothing false is acknowledged, and work goes on afterwards.

use super::sim::{Fault, SimDisk};
use super::*;

/// Sends epochs; after an error connects again, as the daemon does, and goes on. Ends after enough epochs.
fn work(store: &Store, host: &mut Host, context: &str) -> u32 {
    let mut errors = 0;
    let mut ingest = None;
    while host.acknowledged < 12 {
        assert!(errors < 60, "{context}: it does not get on");
        let connected = match ingest.take() {
            Some(connected) => Ok(connected),
            None => store.open_stream(UUID, "gast", 0),
        };
        if errors > 0 {
            std::thread::sleep(Duration::from_millis(5)); // What stalls for lack of space is tried again meanwhile.
        }
        let Ok(mut connected) = connected else {
            errors += 1;
            continue;
        };
        let from = host.reconnected(connected.position(), context);
        host.cut();
        match host.send(&mut connected, from) {
            Ok(()) => ingest = Some(connected),
            Err(error) => {
                assert!(matches!(error, StoreError::Full { .. } | StoreError::Io { .. }), "{context}: {error}");
                errors += 1;
            }
        }
    }
    errors
}

fn all_faults(fault: Fault) {
    let mut hit = 0;
    let mut after = 1;
    loop {
        let context = format!("{fault:?} after {after}");
        let disk = SimDisk::new();
        let mut host = Host::new(3);
        host.keep = true;
        host.guest.clock = Some(1_000 * SECOND_NS);
        let store = store_on(&disk).unwrap();
        disk.fail(after, fault);
        hit += work(&store, &mut host, &context);
        let reached = disk.operations() >= after;
        disk.heal();
        // The acknowledged epoch is there, now and in the next life, also if that comes with a crash.
        let (epoch, past) = (host.acknowledged, host.past[&host.acknowledged].clone());
        past.assert_stored(&store, epoch, &context);
        drop(store);
        let disk = disk.crashed(&mut host.random);
        let store = store_on(&disk).unwrap();
        past.assert_stored(&store, epoch, &format!("{context}, after a crash"));
        // Every point before it is what it was, and none that was applied before is missing.
        let points = store.points(UUID).unwrap();
        for point in &points {
            let reader = store.read_point(UUID, Some(point.id())).unwrap_or_else(|e| panic!("{context}: {e}"));
            host.past[&point.epoch].assert_read(&reader, &context);
        }
        assert!(points.len() >= 10, "{context}: {points:?}");
        if !reached {
            break;
        }
        // Every operation at first, when the domain is new; then a sample.
        after += if after < 120 { 1 } else { 3 };
    }
    assert!(hit > 40, "{hit} errors over {after} operations");
}

#[test]
fn no_space_at_any_operation() {
    all_faults(Fault::Full);
}

#[test]
fn a_short_write_at_any_operation() {
    all_faults(Fault::Short);
}

#[test]
fn an_io_error_at_any_operation() {
    all_faults(Fault::Error);
}

#[test]
fn the_reserve_is_left_alone() {
    let disk = SimDisk::new();
    let options = StoreOptions { space_reserve_bytes: 1000, ..eager() };
    let store = Store::open_on(Arc::new(disk.clone()), Path::new("/state"), options).unwrap();
    let mut host = Host::new(3);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    host.cut();
    disk.set_space(Some(999));
    let error = host.send(&mut ingest, 0).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert_eq!(error.code(), vmdr_proto::replication::RefusedCode::Full);
    disk.set_space(Some(1000));
    host.send(&mut ingest, 0).unwrap();
    host.guest.assert_stored(&store, 1, "reserve");
}

#[test]
fn a_stream_left_over_from_before_a_failure_cuts_nothing_off() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), lazy()).unwrap(); // Only the journal has what is durable.
    let mut host = Host::new(3);
    host.guest.add_block("big", 1024);
    (0..3).for_each(|i| host.guest.add_block(&format!("more{i}"), 2)); // Hotplug is at the end of the list.
    let mut old = store.open_stream(UUID, "gast", 0).unwrap();
    host.cut();
    host.send(&mut old, 0).unwrap();
    for part in host.guest.epoch(&mut host.random, 1, 2, Kind::Delta) {
        part.send(&mut old).unwrap();
    }
    // Enough of a part that some of it is in the file.
    let mut encoder = Encoder::new();
    let mut page = [0; PAGE_BYTES];
    for number in 0..1024 {
        page.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&host.random.next().to_le_bytes()));
        for _ in 0..2 {
            encoder.ram_page(3, number as u64, &page);
        }
    }
    let sent = seal(encoder, PartHead { generation: 1, epoch: 3, part: 0, kind: Kind::Delta }, false, 0);
    assert!(sent.tail.payload_bytes > 8 << 20);
    old.begin(sent.head).unwrap();
    for (i, (payload, xxh3)) in sent.chunks.iter().enumerate() {
        old.chunk(i as u32, payload.clone(), *xxh3).unwrap();
    }
    let failure = StoreError::Io { domain: UUID.to_owned(), what: "a test".to_owned() };
    store.domain(UUID).unwrap().fail(&failure);
    assert!(matches!(old.end(sent.tail), Err(StoreError::Io { .. })));
    let mut new = store.open_stream(UUID, "gast", 0).unwrap();
    for epoch in 3..6 {
        for part in host.guest.epoch(&mut host.random, 1, epoch, Kind::Delta) {
            part.send(&mut new).unwrap();
        }
    }
    drop(old);
    drop((new, store));
    host.guest.assert_stored(&store_in(&dir), 5, "after the old stream's end");
}

/// A journal whose newest segment has a break, and behind it a part that is durable: damage, and nothing of it is cut off, also
/// when the disk fails while that is found out.
#[test]
fn a_read_that_fails_makes_no_torn_end_of_damage() {
    let dir = Path::new("/state/journal");
    let uuid = parse(UUID).unwrap();
    let open = |disk: &SimDisk| {
        vmdr_journal::Journal::open(Arc::new(disk.clone()), dir, *uuid.as_bytes(), 1, &mut |_, _| {})
            .map(|(_, recovered)| recovered)
    };
    let broken = || {
        let disk = SimDisk::new();
        let (mut journal, _) =
            vmdr_journal::Journal::open(Arc::new(disk.clone()), dir, *uuid.as_bytes(), 1, &mut |_, _| {}).unwrap();
        for epoch in 1..=2 {
            journal.begin(PartHead { generation: 1, epoch, part: 0, kind: Kind::Delta }).unwrap();
            journal.end(PartTail { digest: vmdr_codec::Digest::new().halves(), ..PartTail::default() }).unwrap();
        }
        drop(journal);
        let file = disk.open(&dir.join("00000001.seg"), vmdr_journal::Mode::Write).unwrap();
        vmdr_journal::write_all(&*file, &[0; 4], 64).unwrap(); // The mark of the first record, behind the segment's header.
        disk
    };
    let sound = open(&broken()).unwrap();
    assert!(sound.torn.is_none() && sound.damage.len() == 1, "{sound:?}");
    let mut refused = 0;
    for after in 1.. {
        let disk = broken();
        let before = disk.reached(Fault::Read);
        disk.fail(after, Fault::Read);
        match open(&disk) {
            Err(vmdr_journal::JournalError::Io { .. }) => refused += 1,
            Err(error) => panic!("read {after}: {error}"),
            Ok(recovered) => assert!(
                recovered.torn.is_none() && recovered.damage == sound.damage,
                "read {after} of {before}: {recovered:?}"
            ),
        }
        if disk.reached(Fault::Read) < before + after {
            break;
        }
    }
    assert!(refused >= 5, "{refused}");
}
