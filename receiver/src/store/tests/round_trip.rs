//! What is sent is what is stored, on a real file system.

use super::*;

#[test]
fn many_epochs_arrive_byte_for_byte() {
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::new(seed);
        let mut store = store_in(&dir);
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        assert_eq!(ingest.generation(), 1);
        for step in 0..60 {
            host.cut();
            host.send(&mut ingest, 0).unwrap();
            let context = format!("seed {seed} step {step}");
            assert_eq!(ingest.position().epoch, host.acknowledged, "{context}");
            match host.random.below(12) {
                0 => host.guest.assert_stored(&store, host.acknowledged, &context),
                1 => {
                    drop(ingest);
                    drop(store);
                    store = store_in(&dir);
                    ingest = store.open_stream(UUID, "gast", 1).unwrap();
                    host.guest.assert_stored(&store, host.acknowledged, &context);
                }
                _ => {}
            }
        }
        host.guest.assert_stored(&store, host.acknowledged, &format!("seed {seed}"));
        let summary = &store.domains()[0];
        assert_eq!((summary.name.as_str(), summary.position.epoch), ("gast", host.acknowledged));
        assert_eq!(summary.trouble, None);
        assert!(summary.stored_bytes > 0 && summary.receiving);
        let point = &store.points(UUID).unwrap()[0];
        assert_eq!((point.generation, point.epoch, point.cut_unix_ns), (1, host.acknowledged, host.guest.cut));
    }
}

#[test]
fn the_files_are_the_guest_and_nothing_is_left_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::new(99);
    let store_in = |dir: &tempfile::TempDir| {
        let retention = Retention { tiers: Vec::new(), ..Retention::default() };
        Store::open(dir.path(), StoreOptions { retention, ..eager() }).unwrap()
    };
    let store = store_in(&dir);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for _ in 0..50 {
        host.cut();
        host.send(&mut ingest, 0).unwrap();
    }
    let point = store.recovery_point(UUID).unwrap();
    for (image, (block, bytes)) in point
        .ram
        .iter()
        .zip(host.guest.layout.ram.iter().zip(&host.guest.ram).filter(|(block, _)| block.used_bytes > 0))
    {
        assert_eq!((&image.name, image.used_bytes), (&block.name, block.used_bytes));
        assert!(&std::fs::read(&image.path).unwrap() == bytes, "{}", image.name);
    }
    for (image, bytes) in point.disks.iter().zip(&host.guest.disks) {
        assert!(&std::fs::read(&image.path).unwrap() == bytes, "{}", image.target);
    }
    assert!(std::fs::read(&point.device_state).unwrap() == host.guest.device);
    drop(ingest);
    drop(store);
    // After a clean open only what the control record mentions is there.
    let store = store_in(&dir);
    let names = |path: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let domain = dir.path().join(UUID);
    let standby = point.dir.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(names(&domain), ["control".to_owned(), "journal".to_owned(), standby]);
    assert_eq!(names(&point.dir).len(), 6);
    assert!(names(&point.dir.join("history")).len() <= 1);
    assert!(names(&domain.join("journal")).len() <= 2);
    let freed = store.forget(UUID).unwrap();
    assert!(freed > 0);
    assert_eq!(names(dir.path()), ["lock"]);
    assert_eq!(store.position(UUID).unwrap(), Position::default());
}

#[test]
fn a_point_whose_domain_is_forgotten_while_it_is_read_does_not_turn_into_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    let mut host = Host::new(98);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    for _ in 0..5 {
        host.cut();
        host.send(&mut ingest, 0).unwrap();
    }
    drop(ingest);
    let reader = store.read_point(UUID, None).unwrap();
    store.forget(UUID).unwrap();
    let arrays: Vec<_> = reader.arrays().filter(|array| reader.length(*array) > 0).collect();
    assert!(arrays.len() > 1);
    for array in arrays {
        let read = reader.read(array, 0, &mut [0; 4096]);
        assert!(matches!(read, Err(StoreError::NoSuchPoint { .. })), "{array:?}: {read:?}");
        assert!(reader.data_from(array, 0).is_err(), "{array:?}");
    }
}

#[test]
fn unwritten_memory_and_disks_take_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let layout = Layout {
        machine: "pc".to_owned(),
        ram: vec![RamBlock { name: "pc.ram".to_owned(), used_bytes: 4 << 30, page_bytes: 4096 }],
        disks: vec![DiskLayout { target: "vda".to_owned(), size_bytes: 3 << 40 }],
    };
    let mut encoder = Encoder::new();
    encoder.layout(&layout).unwrap();
    encoder.domain_xml("<domain/>").unwrap();
    encoder.ram_page(0, 1_000_000, &[7; PAGE_BYTES]);
    encoder.disk_zero(0, 0, 3 << 40);
    encoder.disk_data(0, 2 << 40, &[8; 5000]);
    encoder.device_state(b"devices").unwrap();
    let head = PartHead { generation: 1, epoch: 1, part: 0, kind: Kind::Seed };
    seal(encoder, head, true, 1).send(&mut ingest).unwrap();
    let point = store.recovery_point(UUID).unwrap();
    assert_eq!(std::fs::metadata(&point.ram[0].path).unwrap().len(), 4 << 30);
    assert_eq!(std::fs::metadata(&point.disks[0].path).unwrap().len(), 3 << 40);
    let stored = store.domains()[0].stored_bytes;
    assert!(stored < 1 << 20, "{stored}");
}

#[test]
fn a_large_epoch_is_applied_from_the_journal() {
    // More than is kept in memory: 80 MiB that do not compress, in two parts.
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreOptions { backlog_bytes_max: 1 << 30, ..eager() }).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let mut random = Random(1);
    let pages = 20_480;
    let mut guest = Guest::new();
    guest.add_block("big", pages);
    let mut encoder = Encoder::new();
    encoder.layout(&guest.layout).unwrap();
    encoder.domain_xml(&guest.xml).unwrap();
    guest.device = b"state".to_vec();
    encoder.device_state(&guest.device).unwrap();
    let head = PartHead { generation: 1, epoch: 1, part: 0, kind: Kind::Seed };
    seal(encoder, head, true, 0).send(&mut ingest).unwrap();
    for part in 0..2 {
        let mut encoder = Encoder::new();
        for page in (0..pages).filter(|page| page % 2 == part) {
            let bytes = &mut guest.ram[3][page * PAGE_BYTES..(page + 1) * PAGE_BYTES];
            bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next().to_le_bytes()));
            encoder.ram_page(3, page as u64, (&*bytes).try_into().unwrap());
        }
        if part == 1 {
            encoder.device_state(&guest.device).unwrap();
        }
        let head = PartHead { generation: 1, epoch: 2, part: part as u32, kind: Kind::Delta };
        seal(encoder, head, part == 1, 0).send(&mut ingest).unwrap();
    }
    guest.assert_stored(&store, 2, "large");
}
