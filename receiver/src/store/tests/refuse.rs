//! Wrong input is refused with its reason, and changes nothing.

use vmdr_proto::replication::RefusedCode;

use super::*;

fn seeded() -> (tempfile::TempDir, Store, Ingest, Host) {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let mut host = Host::new(1);
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    (dir, store, ingest, host)
}

fn delta(host: &mut Host, epoch: u64) -> Sent {
    let mut encoder = Encoder::new();
    host.guest.run(&mut host.random, &mut encoder);
    encoder.ram_page(0, 0, &[9; PAGE_BYTES]);
    host.guest.ram[0][..PAGE_BYTES].fill(9);
    host.guest.device = b"devices".to_vec();
    encoder.device_state(&host.guest.device).unwrap();
    host.guest.cut = epoch;
    seal(encoder, PartHead { generation: 1, epoch, part: 0, kind: Kind::Delta }, true, epoch)
}

fn code(result: Result<Durable, StoreError>) -> RefusedCode {
    let error = result.unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    error.code()
}

#[test]
fn epochs_and_parts_out_of_order() {
    let (_dir, store, mut ingest, mut host) = seeded();
    let good = delta(&mut host, 2);
    let head = good.head;
    for wrong in [
        PartHead { epoch: 1, ..head },
        PartHead { epoch: 3, ..head },
        PartHead { epoch: 0, ..head },
        PartHead { part: 1, ..head },
        PartHead { generation: 2, ..head },
        PartHead { kind: Kind::Seed, epoch: 1, ..head },
        PartHead { kind: Kind::Seed, part: 1, ..head },
    ] {
        let sent = Sent { head: wrong, ..good.clone() };
        assert_eq!(code(sent.send(&mut ingest)), RefusedCode::Sequence, "{wrong:?}");
    }
    assert_eq!(
        code(Sent { head: PartHead { generation: 0, ..head }, ..good.clone() }.send(&mut ingest)),
        RefusedCode::Fenced
    );
    assert_eq!(ingest.chunk(0, good.chunks[0].0.clone(), 0).unwrap_err().code(), RefusedCode::Sequence);
    assert_eq!(ingest.end(good.tail).unwrap_err().code(), RefusedCode::Sequence);
    good.send(&mut ingest).unwrap();
    assert_eq!(code(good.send(&mut ingest)), RefusedCode::Sequence);
    host.guest.assert_stored(&store, 2, "after the refusals");
}

#[test]
fn the_first_epoch_is_a_seed() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    assert_eq!(code(delta(&mut Host::new(1), 1).send(&mut ingest)), RefusedCode::Sequence);
    assert!(matches!(store.recovery_point(UUID), Err(StoreError::NoPoint(_))));
    assert!(store.points(UUID).unwrap().is_empty());
}

#[test]
fn damaged_parts() {
    let (_dir, store, mut ingest, mut host) = seeded();
    let good = delta(&mut host, 2);
    let mut bad = Vec::new();
    for field in 0..9 {
        let mut sent = good.clone();
        let tail = &mut sent.tail;
        match field {
            0 => tail.chunks += 1,
            1 => tail.payload_bytes -= 1,
            2 => tail.digest.0 ^= 1,
            3 => tail.digest.1 ^= 1,
            4 => tail.counts.ram_pages += 1,
            5 => tail.counts.zero_pages += 1,
            6 => tail.counts.disk_bytes += 1,
            7 => tail.counts.disk_zero_bytes += 1,
            _ => sent.chunks[0].1 ^= 1,
        }
        bad.push(sent);
    }
    let mut random = Random(4);
    for _ in 0..100 {
        let mut sent = good.clone();
        let mut bytes = sent.chunks[0].0.to_vec();
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
        // With the checksum as it was, and with one that fits the damage: then the digest does not.
        sent.chunks[0].0 = bytes.into();
        bad.push(sent.clone());
        sent.chunks[0].1 = vmdr_codec::chunk_hash(&sent.chunks[0].0);
        bad.push(sent);
    }
    for (i, sent) in bad.iter().enumerate() {
        assert_eq!(code(sent.send(&mut ingest)), RefusedCode::Corrupt, "{i}");
        assert_eq!(ingest.position().epoch, 1, "{i}");
    }
    good.send(&mut ingest).unwrap();
    host.guest.assert_stored(&store, 2, "after the refusals");
}

#[test]
fn content_that_the_guest_does_not_have() {
    let (_dir, store, mut ingest, mut host) = seeded();
    let head = PartHead { generation: 1, epoch: 2, part: 0, kind: Kind::Delta };
    let pages = host.guest.layout.ram[0].pages();
    let size = host.guest.layout.disks[0].size_bytes;
    let mut other_disks = host.guest.layout.clone();
    other_disks.disks[0].target = "vdz".to_owned();
    let mut fewer_disks = host.guest.layout.clone();
    fewer_disks.disks.pop();
    type Write = Box<dyn Fn(&mut Encoder)>;
    let wrong: Vec<Write> = vec![
        Box::new(|e| e.ram_page(200, 0, &[1; PAGE_BYTES])),
        Box::new(move |e| e.ram_page(0, pages, &[1; PAGE_BYTES])),
        Box::new(move |e| e.ram_zero(0, pages - 1, 2)),
        Box::new(|e| e.disk_data(9, 0, &[1])),
        Box::new(move |e| e.disk_data(0, size, &[1])),
        Box::new(move |e| e.disk_zero(0, size - 1, 2)),
        Box::new(move |e| e.layout(&other_disks).unwrap()),
        Box::new(move |e| e.layout(&fewer_disks).unwrap()),
    ];
    for (i, write) in wrong.iter().enumerate() {
        let mut encoder = Encoder::new();
        write(&mut encoder);
        encoder.device_state(b"devices").unwrap();
        assert_eq!(code(seal(encoder, head, true, 1).send(&mut ingest)), RefusedCode::Corrupt, "{i}");
    }
    let mut encoder = Encoder::new();
    encoder.ram_page(0, 0, &[1; PAGE_BYTES]);
    assert_eq!(code(seal(encoder, head, true, 1).send(&mut ingest)), RefusedCode::Corrupt, "without a device state");
    let mut encoder = Encoder::new();
    encoder.ram_page(0, 0, &[1; PAGE_BYTES]);
    encoder.device_state(b"devices").unwrap();
    let head = PartHead { kind: Kind::Seed, ..head };
    assert_eq!(code(seal(encoder, head, true, 1).send(&mut ingest)), RefusedCode::Corrupt, "a seed without a layout");
    delta(&mut host, 2).send(&mut ingest).unwrap();
    host.guest.assert_stored(&store, 2, "after the refusals");
}

#[test]
fn generations_fence() {
    let (dir, store, mut old, mut host) = seeded();
    assert_eq!(store.raise_generation(UUID, 5).unwrap(), 5);
    assert_eq!(store.raise_generation(UUID, 3).unwrap(), 5);
    let sent = delta(&mut host, 2);
    assert_eq!(code(sent.send(&mut old)), RefusedCode::Fenced);
    assert_eq!(store.open_stream(UUID, "gast", 4).unwrap_err().code(), RefusedCode::Fenced);
    drop(old);
    drop(store);
    // It is on the disk, not only in memory.
    let store = store_in(&dir);
    assert_eq!(store.open_stream(UUID, "gast", 4).unwrap_err().code(), RefusedCode::Fenced);
    assert_eq!(store.position(UUID).unwrap(), Position { generation: 5, epoch: 1, ..Position::default() });
    let mut new = store.open_stream(UUID, "gast", 6).unwrap();
    let of_six = |sent: &Sent| Sent { head: PartHead { generation: 6, ..sent.head }, ..sent.clone() };
    assert_eq!(code(of_six(&sent).send(&mut new)), RefusedCode::Sequence, "a delta on another generation's point");
    for part in host.guest.epoch(&mut host.random, 6, 1, Kind::Seed) {
        part.send(&mut new).unwrap();
    }
    host.guest.assert_stored(&store, 1, "generation 6");
    assert_eq!(store.recovery_point(UUID).unwrap().generation, 6);
}

#[test]
fn a_newer_stream_takes_over() {
    let (_dir, store, mut old, mut host) = seeded();
    let sent = delta(&mut host, 2);
    old.begin(sent.head).unwrap();
    old.chunk(0, sent.chunks[0].0.clone(), sent.chunks[0].1).unwrap();
    let mut new = store.open_stream(UUID, "gast", 1).unwrap();
    assert!(matches!(old.end(sent.tail), Err(StoreError::Superseded(_))));
    sent.send(&mut new).unwrap();
    drop(old);
    assert!(store.domains()[0].receiving, "the old one's end is not the new one's");
    host.guest.assert_stored(&store, 2, "taken over");
}

#[test]
fn a_frozen_standby_does_not_change() {
    let (dir, store, mut ingest, mut host) = seeded();
    store.set_frozen(UUID, true).unwrap();
    assert_eq!(code(delta(&mut host, 2).send(&mut ingest)), RefusedCode::Fenced);
    drop(ingest);
    drop(store);
    let store = store_in(&dir);
    assert!(matches!(store.open_stream(UUID, "gast", 9), Err(StoreError::Frozen(_))));
    assert!(matches!(store.forget(UUID), Err(StoreError::Busy { .. })));
    assert_eq!(store.recovery_point(UUID).unwrap().epoch, 1);
    store.set_frozen(UUID, false).unwrap();
    store.open_stream(UUID, "gast", 0).unwrap();
}

#[test]
fn a_given_up_seed_leaves_the_recovery_point_alone() {
    let (dir, mut store, mut ingest, mut host) = seeded();
    let before = host.guest.clone();
    for (epoch, parts) in [(2, 1), (2, 2), (3, 1)] {
        let sent = loop {
            let sent = host.guest.epoch(&mut host.random, 1, epoch, Kind::Seed);
            if sent.len() > 2 {
                break sent;
            }
        };
        for part in &sent[..parts] {
            part.send(&mut ingest).unwrap();
        }
        let position = Position { generation: 1, epoch: 1, open_epoch: epoch, open_parts: parts as u32 };
        assert_eq!(ingest.position(), position);
        before.assert_stored(&store, 1, "a seed is under way");
        drop(ingest);
        drop(store);
        store = store_in(&dir);
        assert_eq!(store.position(UUID).unwrap(), position, "it survives a restart");
        before.assert_stored(&store, 1, "after a restart");
        ingest = store.open_stream(UUID, "gast", 0).unwrap();
    }
    let standbys = std::fs::read_dir(dir.path().join(UUID)).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(standbys.filter(|name| name.to_str().unwrap().starts_with("standby.")).count(), 2);
    let mut guest = before.clone();
    for part in guest.epoch(&mut host.random, 1, 2, Kind::Delta) {
        part.send(&mut ingest).unwrap();
    }
    guest.assert_stored(&store, 2, "a delta instead of the seed");
}

#[test]
fn names_that_are_no_uuid() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(&dir);
    for wrong in
        ["", "..", "../../etc", "gast", "6c0d4a3e111142228333abcdefabcdef", "{6c0d4a3e-1111-4222-8333-abcdefabcdef}"]
    {
        let error = store.open_stream(wrong, "gast", 0).unwrap_err();
        assert_eq!(error.code(), RefusedCode::Domain, "{wrong}");
        assert!(store.position(wrong).is_err() && store.forget(wrong).is_err());
    }
    assert!(matches!(store.recovery_point(UUID), Err(StoreError::Unknown(_))));
    assert_eq!(store.position(UUID).unwrap(), Position::default());
    // However it is written, it is the same domain.
    store.open_stream(&UUID.to_uppercase(), "gast", 0).unwrap();
    assert_eq!(store.domains()[0].uuid, UUID);
}

#[test]
fn another_domains_directory() {
    let (dir, store, ingest, _) = seeded();
    drop((store, ingest));
    let other = "00000000-2222-4222-8333-abcdefabcdef";
    std::fs::rename(dir.path().join(UUID), dir.path().join(other)).unwrap();
    let store = store_in(&dir);
    let trouble = store.domains()[0].trouble.clone().unwrap();
    assert!(trouble.contains(UUID) && trouble.contains(other), "{trouble}");
    let error = store.open_stream(other, "gast", 0).unwrap_err();
    assert_eq!(error.code(), RefusedCode::Domain, "{error}");
    // The others are not kept from working.
    store.open_stream(UUID, "gast", 0).unwrap();
}

#[test]
fn two_receivers_on_one_directory() {
    let (dir, _store, _ingest, _) = seeded();
    assert!(matches!(Store::open(dir.path(), eager()), Err(StoreError::Locked(_))));
}

#[test]
fn a_directory_without_its_control_record() {
    let (dir, store, ingest, _) = seeded();
    drop((store, ingest));
    std::fs::remove_file(dir.path().join(UUID).join("control")).unwrap();
    let store = store_in(&dir);
    assert!(store.domains()[0].trouble.as_deref().unwrap().contains("no control record"));
    assert_eq!(store.open_stream(UUID, "gast", 0).unwrap_err().code(), RefusedCode::Io);
    store.forget(UUID).unwrap();
    store.open_stream(UUID, "gast", 0).unwrap();
}

#[test]
fn a_seed_of_a_guest_that_has_shut_down_can_be_used_and_opened_again() {
    for with_device_before in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = store_in(&dir);
        let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
        let mut guest = Guest::new();
        let head = |part| PartHead { generation: 1, epoch: 1, part, kind: Kind::Seed };
        let mut encoder = Encoder::new();
        encoder.layout(&guest.layout).unwrap();
        encoder.domain_xml(&guest.xml).unwrap();
        encoder.disk_data(0, 0, &[7; 5000]);
        if with_device_before {
            encoder.device_state(b"devices").unwrap();
            guest.device = b"devices".to_vec();
        }
        seal(encoder, head(0), false, 0).send(&mut ingest).unwrap();
        guest.disks[0][..5000].fill(7);
        // The last part says that there is no memory any more, and brings no device state.
        guest.layout.ram.iter_mut().for_each(|block| block.used_bytes = 0);
        guest.ram.iter_mut().for_each(Vec::clear);
        let mut encoder = Encoder::new();
        encoder.layout(&guest.layout).unwrap();
        guest.cut = 5;
        seal(encoder, head(1), true, 5).send(&mut ingest).unwrap();
        guest.assert_stored(&store, 1, "a seed without memory");
        drop((ingest, store));
        let store = store_in(&dir);
        assert_eq!(store.domains()[0].trouble, None);
        guest.assert_stored(&store, 1, "opened again");
        store.open_stream(UUID, "gast", 0).unwrap();
    }
}

#[test]
fn a_part_with_layout_after_layout_or_chunks_without_end() {
    let (_dir, store, mut ingest, mut host) = seeded();
    let head = PartHead { generation: 1, epoch: 2, part: 0, kind: Kind::Delta };
    let mut encoder = Encoder::new();
    (0..100).for_each(|_| encoder.layout(&host.guest.layout).unwrap());
    encoder.device_state(b"devices").unwrap();
    assert_eq!(code(seal(encoder, head, true, 1).send(&mut ingest)), RefusedCode::Corrupt);
    // A zero page each.
    let mut encoder = Encoder::new();
    encoder.ram_zero(0, 0, 1);
    encoder.finish();
    let payload = Bytes::from(encoder.take_full().unwrap());
    let xxh3 = vmdr_codec::chunk_hash(&payload);
    ingest.begin(head).unwrap();
    let refused = (0..100_000).find_map(|n| ingest.chunk(n, payload.clone(), xxh3).err());
    assert!(matches!(refused, Some(StoreError::Corrupt { .. })), "{refused:?}");
    delta(&mut host, 2).send(&mut ingest).unwrap();
    host.guest.assert_stored(&store, 2, "after the refusals");
}

#[test]
fn a_disk_that_is_very_long_for_an_epoch_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), lazy()).unwrap();
    let mut ingest = store.open_stream(UUID, "gast", 0).unwrap();
    let mut host = Host::new(1);
    host.cut();
    host.send(&mut ingest, 0).unwrap();
    let right = host.guest.layout.clone();
    let mut send = |host: &mut Host, epoch, size_bytes: Option<u64>| {
        let mut layout = right.clone();
        let mut encoder = Encoder::new();
        layout.disks[1].size_bytes = size_bytes.unwrap_or(layout.disks[1].size_bytes);
        encoder.layout(&layout).unwrap();
        if let Some(bytes) = size_bytes {
            encoder.disk_zero(1, 0, bytes);
        }
        encoder.device_state(b"devices").unwrap();
        host.guest.device = b"devices".to_vec();
        host.guest.cut = epoch;
        let head = PartHead { generation: 1, epoch, part: 0, kind: Kind::Delta };
        seal(encoder, head, true, epoch).send(&mut ingest)
    };
    send(&mut host, 2, Some(1 << 43)).unwrap();
    host.guest.disks[1].fill(0);
    send(&mut host, 3, None).unwrap();
    host.guest.assert_stored(&store, 3, "the length is what it was");
    // Longer than a file can be here (XFS takes it): it is not acknowledged, and nothing is lost.
    let file = std::fs::File::create(dir.path().join("probe")).unwrap();
    let longest = i64::MAX as u64;
    let takes = file.set_len(longest).is_ok();
    drop(file);
    std::fs::remove_file(dir.path().join("probe")).unwrap();
    let sent = send(&mut host, 4, Some(longest));
    if takes {
        sent.unwrap();
    } else {
        assert!(sent.unwrap_err().to_string().contains("longer than a file can be"));
        send(&mut host, 4, None).unwrap();
        host.guest.assert_stored(&store, 4, "after the refusal");
    }
}
