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
