//! Who may write changes: a hand-over on its stream, a standby that goes on in a newer generation, one made of files.

use std::fs;

use super::*;

/// Sends some epochs in a generation; the store then has the guest.
fn protect(store: &Store, guest: &mut Guest, random: &mut Random, generation: u64, epochs: u64) -> Ingest {
    let mut ingest = store.open_stream(UUID, "gast", generation).unwrap();
    let first = ingest.position().epoch + 1;
    for epoch in first..first + epochs {
        let kind = if epoch == 1 { Kind::Seed } else { Kind::Delta };
        for part in guest.epoch(random, generation, epoch, kind) {
            part.send(&mut ingest).unwrap();
        }
    }
    ingest
}

#[test]
fn a_domain_is_handed_over_once_by_its_newest_stream() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut random) = (Guest::new(), Random(7));
    let store = store_in(&dir);
    let mut old = protect(&store, &mut guest, &mut random, 1, 3);
    // Not the newest epoch, not the next generation: nothing has happened.
    assert!(matches!(old.hand_over(2, 2), Err(StoreError::Refused { .. })));
    assert!(matches!(old.hand_over(3, 3), Err(StoreError::Refused { .. })));
    // The sender has asked on another stream whether it was taken, and was told that it was not: that stays true.
    let mut new = store.open_stream(UUID, "gast", 1).unwrap();
    assert!(matches!(old.hand_over(3, 2), Err(StoreError::Superseded(_))));
    assert_eq!(store.position(UUID).unwrap().generation, 1);
    new.hand_over(3, 2).unwrap();
    drop((old, new, store));
    let store = store_in(&dir);
    assert_eq!(store.position(UUID).unwrap(), Position { generation: 2, epoch: 3, ..Position::default() });
    assert!(matches!(store.open_stream(UUID, "gast", 1), Err(StoreError::Fenced { stored: 2, .. })));
    guest.assert_stored(&store, 3, "handed over");
}

#[test]
fn a_standby_that_was_given_back_goes_on_in_the_next_generation() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut random) = (Guest::new(), Random(8));
    let store = store_in(&dir);
    let mut ingest = protect(&store, &mut guest, &mut random, 1, 3);
    ingest.hand_over(3, 2).unwrap();
    store.set_frozen(UUID, true).unwrap();
    store.carry_on(UUID, 3).unwrap();
    guest.assert_stored(&store, 3, "carried on");
    assert!(matches!(store.open_stream(UUID, "gast", 2), Err(StoreError::Fenced { stored: 3, .. })));
    drop(protect(&store, &mut guest, &mut random, 3, 4));
    guest.assert_stored(&store, 7, "gone on");
    drop((ingest, store));
    let store = store_in(&dir);
    guest.assert_stored(&store, 7, "opened again");
    let points = store.points(UUID).unwrap();
    assert!(points.iter().all(|point| point.generation == 3 && point.epoch >= 3), "{points:?}");
}

#[test]
fn files_become_a_standby_on_which_a_resync_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut random) = (Guest::new(), Random(9));
    let store = store_in(&dir);
    let ingest = protect(&store, &mut guest, &mut random, 1, 2);
    let old = store.recovery_point(UUID).unwrap().dir;
    store.raise_generation(UUID, 2).unwrap();
    store.set_frozen(UUID, true).unwrap();
    fs::write(old.join(KEPT), "").unwrap();
    let layout = Layout { ram: Vec::new(), ..guest.layout.clone() };
    let base = Base { peer: "ab", name: "gast", generation: 3, layout: &layout, xml: "<domain/>", cut_unix_ns: 5 };
    // It was received when there were no peers yet: any could say that it is its own.
    let denied = store.seed_from_files(UUID, &base, &mut |_, _| Ok(()));
    assert!(matches!(denied, Err(StoreError::Refused { .. })), "{denied:?}");
    store.grant(UUID, "ab", true).unwrap();
    // One that fails changes nothing.
    let failed = store.seed_from_files(UUID, &base, &mut |_, _| Err(std::io::Error::other("unreadable")));
    assert!(matches!(failed, Err(StoreError::Io { .. })), "{failed:?}");
    guest.assert_stored(&store, 2, "as before");
    let disks = guest.disks.clone();
    let mut fill = |index: usize, image: &Path| fs::write(image, &disks[index]);
    let made = store.seed_from_files(UUID, &base, &mut fill).unwrap();
    assert_eq!(made, PointId { generation: 3, epoch: 3 });
    drop((ingest, store));
    let store = Store::open(dir.path(), eager()).unwrap();
    let point = store.recovery_point(UUID).unwrap();
    assert!(point.ram.is_empty() && old.is_dir() && point.dir != old);
    for (image, bytes) in point.disks.iter().zip(&guest.disks) {
        assert!(fs::read(&image.path).unwrap() == *bytes, "{}", image.target);
    }
    // What the owner sends: its layout, all of its memory, and what differs of its disks.
    let mut ingest = store.open_stream(UUID, "gast", 3).unwrap();
    let mut encoder = Encoder::new();
    encoder.layout(&guest.layout).unwrap();
    encoder.domain_xml(&guest.xml).unwrap();
    guest.send_all(&mut encoder);
    guest.run(&mut random, &mut encoder);
    guest.device = vec![9; 700];
    encoder.device_state(&guest.device).unwrap();
    guest.cut = 77;
    let head = PartHead { generation: 3, epoch: 4, part: 0, kind: Kind::Delta };
    seal(encoder, head, true, 77).send(&mut ingest).unwrap();
    guest.assert_stored(&store, 4, "resynced");
    drop(ingest);
    assert_eq!(store.remove_unused_standby(UUID, 1).unwrap(), 0, "it is kept");
}
