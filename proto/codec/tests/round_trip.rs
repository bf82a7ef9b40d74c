//! What goes in comes out, and what never went in does no harm.

#![allow(clippy::unwrap_used, clippy::panic)] // Test helpers outside #[test] functions.

use proptest::collection::vec;
use proptest::prelude::*;
use vmdr_codec::*;

/// What an encoder can be told.
#[derive(Debug, Clone)]
enum Op {
    Page { block: u16, page: u64, fill: Fill },
    Pages { block: u16, first: u64, fills: Vec<Fill> },
    Zero { block: u16, first: u64, pages: u64 },
    DiskData { disk: u16, offset: u64, pieces: Vec<(usize, Fill)> },
    DiskZero { disk: u16, offset: u64, length: u64 },
    Layout(Layout),
    Xml(String),
    State(usize, u64),
}

/// What a page or piece is filled with: zero, something that compresses, something that does not.
#[derive(Debug, Clone, Copy)]
enum Fill {
    Zero,
    Repeat(u8),
    Noise(u64),
}

fn filled(fill: Fill, length: usize) -> Vec<u8> {
    match fill {
        Fill::Zero => vec![0; length],
        Fill::Repeat(byte) => vec![byte; length],
        Fill::Noise(mut x) => (0..length)
            .map(|_| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (x >> 56) as u8
            })
            .collect(),
    }
}

fn page(fill: Fill) -> [u8; PAGE_BYTES] {
    filled(fill, PAGE_BYTES).try_into().unwrap()
}

fn fill() -> impl Strategy<Value = Fill> {
    prop_oneof![3 => Just(Fill::Zero), 3 => (1..=255u8).prop_map(Fill::Repeat), 2 => any::<u64>().prop_map(Fill::Noise)]
}

fn layout() -> impl Strategy<Value = Layout> {
    let block = (0..1u64 << 40, 12..31u32).prop_map(|(used_bytes, shift)| (used_bytes, 1u32 << shift));
    (".{0,40}", vec(block, 0..8), vec(0..1u64 << 50, 0..8)).prop_map(|(machine, ram, disks)| Layout {
        machine: machine.replace('\0', ""),
        ram: (ram.into_iter().enumerate())
            .map(|(i, (used_bytes, page_bytes))| RamBlock { name: format!("/rom@{i}"), used_bytes, page_bytes })
            .collect(),
        disks: (disks.into_iter().enumerate())
            .map(|(i, size_bytes)| Disk { target: format!("vd{i}"), size_bytes })
            .collect(),
    })
}

fn op() -> impl Strategy<Value = Op> {
    let disk_offset = prop_oneof![(0..64u64).prop_map(|b| b * 4096), 0..1u64 << 45];
    let piece = (prop_oneof![Just(4096usize), 1..9000usize], fill());
    prop_oneof![
        4 => (0..3u16, 0..40u64, fill()).prop_map(|(block, page, fill)| Op::Page { block, page, fill }),
        4 => (0..3u16, 0..1u64 << 40, vec(fill(), 1..60)).prop_map(|(block, first, fills)| Op::Pages { block, first, fills }),
        1 => (0..3u16, 0..1u64 << 40, 1..1u64 << 30).prop_map(|(block, first, pages)| Op::Zero { block, first, pages }),
        4 => (0..3u16, disk_offset, vec(piece, 1..40)).prop_map(|(disk, offset, pieces)| Op::DiskData { disk, offset, pieces }),
        1 => (0..3u16, 0..1u64 << 45, 1..1u64 << 45).prop_map(|(disk, offset, length)| Op::DiskZero { disk, offset, length }),
        1 => layout().prop_map(Op::Layout),
        1 => ".{0,300}".prop_map(Op::Xml),
        1 => (0..700_000usize, any::<u64>()).prop_map(|(length, seed)| Op::State(length, seed)),
    ]
}

/// What a part does, independent of how it was cut into records.
#[derive(Debug, PartialEq, Eq)]
enum Effect {
    Page(u16, u64, Box<[u8; PAGE_BYTES]>),
    ZeroPages(u16, u64, u64),
    Disk(u16, u64, Vec<u8>),
    ZeroDisk(u16, u64, u64),
    Layout(Layout),
    Xml(Vec<u8>),
    State(Vec<u8>),
}

/// Neighbouring effects that continue one another become one, however they were cut.
fn push(effects: &mut Vec<Effect>, effect: Effect) {
    let zero = |p: &[u8]| p.iter().all(|&b| b == 0);
    let effect = match effect {
        Effect::Page(block, page, data) if zero(&data[..]) => Effect::ZeroPages(block, page, 1),
        other => other,
    };
    match (effects.last_mut(), effect) {
        (Some(Effect::ZeroPages(b, first, pages)), Effect::ZeroPages(block, page, more))
            if *b == block && *first + *pages == page =>
        {
            *pages += more;
        }
        (_, effect) => effects.push(effect),
    }
}

fn encode(ops: &[Op]) -> (Vec<Vec<u8>>, Counts, Vec<Effect>) {
    let mut encoder = Encoder::new();
    let mut effects = Vec::new();
    let mut payloads = Vec::new();
    for op in ops {
        match op {
            Op::Page { block, page: number, fill } => {
                encoder.ram_page(*block, *number, &page(*fill));
                push(&mut effects, Effect::Page(*block, *number, Box::new(page(*fill))));
            }
            Op::Pages { block, first, fills } => {
                for (i, fill) in fills.iter().enumerate() {
                    encoder.ram_page(*block, first + i as u64, &page(*fill));
                    push(&mut effects, Effect::Page(*block, first + i as u64, Box::new(page(*fill))));
                }
            }
            Op::Zero { block, first, pages } => {
                encoder.ram_zero(*block, *first, *pages);
                push(&mut effects, Effect::ZeroPages(*block, *first, *pages));
            }
            Op::DiskData { disk, offset, pieces } => {
                let data: Vec<u8> = pieces.iter().flat_map(|(length, fill)| filled(*fill, *length)).collect();
                encoder.disk_data(*disk, *offset, &data);
                push(&mut effects, Effect::Disk(*disk, *offset, data));
            }
            Op::DiskZero { disk, offset, length } => {
                encoder.disk_zero(*disk, *offset, *length);
                push(&mut effects, Effect::ZeroDisk(*disk, *offset, *length));
            }
            Op::Layout(layout) => {
                encoder.layout(layout).unwrap();
                push(&mut effects, Effect::Layout(layout.clone()));
            }
            Op::Xml(xml) => {
                encoder.domain_xml(xml).unwrap();
                push(&mut effects, Effect::Xml(xml.clone().into_bytes()));
            }
            Op::State(length, seed) => {
                let state = filled(Fill::Noise(*seed), *length);
                encoder.device_state(&state).unwrap();
                push(&mut effects, Effect::State(state));
            }
        }
        payloads.extend(std::iter::from_fn(|| encoder.take_full()));
    }
    let counts = encoder.finish();
    payloads.extend(std::iter::from_fn(|| encoder.take_full()));
    (payloads, counts, effects)
}

/// Decodes, and checks each disk write against `expected` as it goes, because the encoder may cut writes.
fn decode_all(payloads: &[Vec<u8>], expected: &[Effect]) -> (Vec<Effect>, Counts) {
    let mut effects: Vec<Effect> = Vec::new();
    let mut counts = Counts::default();
    let (mut state, mut xml) = (Assembler::new("state", 1 << 30), Assembler::new("xml", 1 << 30));
    let mut disk_open: Option<(u16, u64, Vec<u8>, usize)> = None;
    let mut piece = Box::new([0; DISK_PIECE_BYTES_MAX]);
    for payload in payloads {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        for record in decode(payload) {
            let record = record.unwrap();
            counts.add(record.counts().unwrap());
            // A disk write of the model is whole again when its length is reached.
            let mut disk = |effects: &mut Vec<Effect>, disk: u16, offset: u64, data: Vec<u8>| {
                let (d, o, mut have, want) = disk_open.take().unwrap_or_else(|| match &expected[effects.len()] {
                    Effect::Disk(_, _, all) => (disk, offset, Vec::new(), all.len()),
                    other => panic!("disk record where {other:?} was encoded"),
                });
                assert_eq!((disk, offset), (d, o + have.len() as u64));
                have.extend(data);
                if have.len() == want {
                    effects.push(Effect::Disk(d, o, have));
                } else {
                    disk_open = Some((d, o, have, want));
                }
            };
            match record {
                Record::RamPages(run) => {
                    for data in run.pages() {
                        let (number, data) = data.unwrap();
                        let mut page = [0xee; PAGE_BYTES];
                        data.read(&mut page).unwrap();
                        push(&mut effects, Effect::Page(run.block, number, Box::new(page)));
                    }
                }
                Record::RamZero { block, first, pages } => push(&mut effects, Effect::ZeroPages(block, first, pages)),
                Record::DiskData { disk: d, offset, data } => {
                    let data = data.read(&mut piece).unwrap().to_vec();
                    disk(&mut effects, d, offset, data);
                }
                Record::DiskZero { disk: d, offset, length } => match expected.get(effects.len()) {
                    Some(Effect::Disk(..)) => disk(&mut effects, d, offset, vec![0; length as usize]),
                    _ => push(&mut effects, Effect::ZeroDisk(d, offset, length)),
                },
                Record::Layout(layout) => push(&mut effects, Effect::Layout(layout)),
                Record::DeviceState { offset, total, bytes } => {
                    state.add(offset, total, bytes).unwrap();
                    if offset + bytes.len() as u64 == total {
                        effects.push(Effect::State(state.take().unwrap().unwrap()));
                    }
                }
                Record::DomainXml { offset, total, bytes } => {
                    xml.add(offset, total, bytes).unwrap();
                    if offset + bytes.len() as u64 == total {
                        effects.push(Effect::Xml(xml.take().unwrap().unwrap()));
                    }
                }
            }
        }
    }
    (effects, counts)
}

/// Reads everything a payload offers, as far as it goes.
fn read_all(payload: &[u8]) -> Result<(), CodecError> {
    let mut page = [0; PAGE_BYTES];
    let mut piece = Box::new([0; DISK_PIECE_BYTES_MAX]);
    let mut assembler = Assembler::new("x", DEVICE_STATE_BYTES_MAX);
    for record in decode(payload) {
        let record = record?;
        record.counts()?;
        match record {
            Record::RamPages(run) => {
                for data in run.pages() {
                    data?.1.read(&mut page)?;
                }
            }
            Record::DiskData { data, .. } => {
                data.read(&mut piece)?;
            }
            Record::DeviceState { offset, total, bytes } | Record::DomainXml { offset, total, bytes } => {
                assembler.add(offset, total, bytes)?;
            }
            Record::RamZero { .. } | Record::DiskZero { .. } | Record::Layout(_) => {}
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_goes_in_comes_out(ops in vec(op(), 0..20)) {
        let (payloads, counts, expected) = encode(&ops);
        let (effects, decoded) = decode_all(&payloads, &expected);
        prop_assert!(effects == expected);
        prop_assert_eq!(decoded, counts);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..3000)) {
        let _ = read_all(&bytes);
    }

    #[test]
    fn records_of_arbitrary_bodies_do_no_harm(records in vec((0..9u8, vec(any::<u8>(), 0..200)), 0..10)) {
        let mut payload = Vec::new();
        for (kind, body) in records {
            payload.push(kind);
            payload.extend((body.len() as u32).to_le_bytes());
            payload.extend(body);
        }
        let _ = read_all(&payload);
    }

    #[test]
    fn flipped_bits_do_no_harm(ops in vec(op(), 1..6), flips in vec((any::<prop::sample::Index>(), 0..8u8), 1..8)) {
        for mut payload in encode(&ops).0 {
            let whole = chunk_hash(&payload);
            for (at, bit) in &flips {
                let at = at.index(payload.len());
                payload[at] ^= 1 << bit;
                prop_assert_ne!(chunk_hash(&payload), whole);
                let _ = read_all(&payload);
                payload[at] ^= 1 << bit;
            }
            prop_assert_eq!(chunk_hash(&payload), whole);
        }
    }

    #[test]
    fn truncated_payloads_are_errors(ops in vec(op(), 1..6), at in any::<prop::sample::Index>()) {
        for payload in encode(&ops).0 {
            let boundaries = boundaries(&payload);
            let at = at.index(payload.len());
            prop_assert_eq!(read_all(&payload[..at]).is_ok(), boundaries.contains(&at), "cut at {}", at);
        }
    }
}

/// Where records begin.
fn boundaries(payload: &[u8]) -> Vec<usize> {
    let mut at = 0;
    let mut all = Vec::new();
    while at < payload.len() {
        all.push(at);
        at += 5 + u32::from_le_bytes(payload[at + 1..at + 5].try_into().unwrap()) as usize;
    }
    all
}

#[test]
fn payloads_close_near_a_mebibyte() {
    let mut encoder = Encoder::new();
    let mut payloads = Vec::new();
    for number in 0..2000 {
        encoder.ram_page(0, number, &page(Fill::Noise(number)));
        payloads.extend(std::iter::from_fn(|| encoder.take_full()));
    }
    encoder.finish();
    payloads.extend(std::iter::from_fn(|| encoder.take_full()));
    assert_eq!(payloads.len(), 8);
    for payload in &payloads[..7] {
        assert!((CHUNK_BYTES..CHUNK_BYTES + PAGE_BYTES + 32).contains(&payload.len()), "{}", payload.len());
    }
}

#[test]
fn runs_of_zero_pages_take_no_space() {
    let mut encoder = Encoder::new();
    encoder.ram_page(0, 0, &page(Fill::Repeat(1)));
    for number in 1..1_000_000 {
        encoder.ram_page(0, number, &[0; PAGE_BYTES]);
    }
    encoder.ram_page(0, 1_000_000, &page(Fill::Repeat(1)));
    let counts = encoder.finish();
    assert_eq!(counts, Counts { ram_pages: 1_000_001, zero_pages: 999_999, ..Counts::default() });
    let payload = encoder.take_full().unwrap();
    assert_eq!(decode(&payload).count(), 3);
    assert!(payload.len() < 200, "{}", payload.len());
}

#[test]
fn the_format_is_what_the_documentation_says() {
    let mut encoder = Encoder::new();
    encoder.disk_data(3, 512, b"abc");
    encoder.disk_zero(1, 4096, 8192);
    encoder.ram_zero(2, 5, 6);
    encoder.finish();
    let payload = encoder.take_full().unwrap();
    let mut expected = vec![3, 18, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, b'a', b'b', b'c'];
    expected.extend([4, 18, 0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0]);
    expected.extend([2, 18, 0, 0, 0, 2, 0, 5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(payload, expected);
}

#[test]
fn names_that_would_leave_the_directory_are_refused() {
    for target in ["", "..", ".x", "a/b", "a\0", "ä", &"x".repeat(300)] {
        let disks = vec![Disk { target: target.to_owned(), size_bytes: 1 }];
        let layout = Layout { disks, ..Layout::default() };
        assert!(layout.to_bytes().is_err(), "{target:?}");
    }
    let disk = |target: &str| Disk { target: target.to_owned(), size_bytes: 1 };
    let layout = Layout { disks: vec![disk("vda"), disk("vda")], ..Layout::default() };
    assert_eq!(layout.to_bytes(), Err(CodecError::Duplicate { what: "disk", name: "vda".to_owned() }));
}

#[test]
fn fragments_out_of_order_are_refused() {
    let mut assembler = Assembler::new("device state", 100);
    assembler.add(0, 10, b"01234").unwrap();
    assert!(assembler.add(6, 10, b"6789").is_err());
    assert!(assembler.add(5, 11, b"56789").is_err());
    assert!(assembler.add(5, 10, b"567890").is_err());
    assembler.add(5, 10, b"56789").unwrap();
    assert_eq!(assembler.take().unwrap().unwrap(), b"0123456789");
    assert_eq!(assembler.take().unwrap(), None);
    assert!(assembler.add(0, 101, b"").is_err());
    assembler.add(0, 10, b"0").unwrap();
    assert!(assembler.take().is_err());
}

#[test]
fn the_digest_is_of_all_payloads_in_order() {
    let (mut whole, mut pieces) = (Digest::new(), Digest::new());
    whole.update(b"one, two");
    pieces.update(b"one, ");
    pieces.update(b"two");
    assert_eq!(whole.halves(), pieces.halves());
    pieces.update(b"!");
    assert_ne!(whole.halves(), pieces.halves());
    // XXH3-128 of nothing, as the reference implementation gives it: 99aa06d3014798d86001c324468d497f.
    assert_eq!(Digest::new().halves(), (0x6001_c324_468d_497f, 0x99aa_06d3_0147_98d8));
}
