//! What no sane peer sends, byte by byte: errors where the protocol has one, a closed connection where it has none, and
//! never harm to anybody else.

use crate::common::{Answer, MIB, NAME, Raw, Served, pattern};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::{Read, Write};
use std::net::Shutdown;
use vmdr_shim::nbd::message::{ContextQuery, ExportQuery, encode_option, encode_text};
use vmdr_shim::nbd::proto::{
    CONTEXT_ALLOCATION, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, command, command_flag, option, reply,
};

const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn query(name: &str) -> Vec<u8> {
    ExportQuery { name: name.to_owned(), infos: vec![] }.encode()
}

#[test]
fn options_are_answered_one_by_one() {
    let served = Served::empty(MIB);
    let mut raw = Raw::greeted(&served.socket, 3);
    // STARTTLS, EXTENDED_HEADERS, and one that nobody has.
    for unknown in [5, 11, 0x7777_7777] {
        assert_eq!(raw.option(unknown, b"whatever")[0].0, reply::ERR_UNSUP);
    }
    assert_eq!(raw.option(option::LIST, &[]), vec![(reply::SERVER, encode_text(NAME)), (reply::ACK, vec![])]);
    assert_eq!(raw.option(option::LIST, b"x")[0].0, reply::ERR_INVALID);
    assert_eq!(raw.option(option::STRUCTURED_REPLY, b"x")[0].0, reply::ERR_INVALID);
    for name in ["vdb", "vd", "VDA", "vda\0", &"x".repeat(4096)] {
        assert_eq!(raw.option(option::GO, &query(name))[0].0, reply::ERR_UNKNOWN, "{name}");
    }
    assert_eq!(raw.option(option::GO, &query(&"x".repeat(4097)))[0].0, reply::ERR_INVALID);
    assert_eq!(raw.option(option::INFO, &[])[0].0, reply::ERR_INVALID);
    let mut long = query(NAME);
    long.push(0);
    assert_eq!(raw.option(option::INFO, &long)[0].0, reply::ERR_INVALID);
    assert_eq!(raw.option(option::INFO, &[0, 0, 0, 1, 0xff, 0, 0])[0].0, reply::ERR_INVALID, "not UTF-8");
    assert_eq!(raw.option(option::INFO, &query(NAME)).last().unwrap().0, reply::ACK);
    // One export only: the empty name is its name too.
    assert_eq!(raw.option(option::INFO, &query("")).last().unwrap().0, reply::ACK);
    assert_eq!(raw.option(option::ABORT, &[])[0].0, reply::ACK);
    raw.assert_closed();
}

#[test]
fn contexts_need_structured_replies_and_the_same_export() {
    let served = Served::empty(MIB);
    let contexts = |queries: &[&str]| {
        ContextQuery { name: NAME.into(), queries: queries.iter().map(|q| (*q).into()).collect() }.encode()
    };
    let mut raw = Raw::greeted(&served.socket, 3);
    assert_eq!(raw.option(option::SET_META_CONTEXT, &contexts(&[CONTEXT_ALLOCATION]))[0].0, reply::ERR_INVALID);
    raw.option(option::STRUCTURED_REPLY, &[]);
    raw.structured = true;
    let named = |id: u32| [&id.to_be_bytes()[..], CONTEXT_ALLOCATION.as_bytes()].concat();
    for listing in [&["base:"][..], &[], &[CONTEXT_ALLOCATION]] {
        let replies = raw.option(option::LIST_META_CONTEXT, &contexts(listing));
        assert_eq!(replies, vec![(reply::META_CONTEXT, named(0)), (reply::ACK, vec![])], "{listing:?}");
    }
    for nothing in [&["base:"][..], &[], &["qemu:dirty-bitmap:x"]] {
        assert_eq!(raw.option(option::SET_META_CONTEXT, &contexts(nothing)), vec![(reply::ACK, vec![])]);
    }
    let replies = raw.option(option::SET_META_CONTEXT, &contexts(&["x:y", CONTEXT_ALLOCATION]));
    assert_eq!(replies.len(), 2);
    // Setting something else takes it away again, also when that fails.
    raw.option(option::SET_META_CONTEXT, b"nonsense");
    raw.option(option::GO, &query(NAME));
    assert_eq!(raw.ask(command::BLOCK_STATUS, 0, 0, 4096, 0).code(), EINVAL);

    let mut raw = Raw::greeted(&served.socket, 3);
    raw.option(option::STRUCTURED_REPLY, &[]);
    raw.structured = true;
    raw.option(option::SET_META_CONTEXT, &contexts(&[CONTEXT_ALLOCATION]));
    raw.option(option::GO, &query(NAME));
    assert_eq!(raw.ask(command::BLOCK_STATUS, 0, 0, 0, 0).code(), EINVAL, "no bytes");
    assert_eq!(raw.ask(command::BLOCK_STATUS, 0, MIB, 1, 0).code(), EINVAL, "beyond the end");
    raw.write(0, 0, &[1; 4096]).data();
    let all = raw.ask(command::BLOCK_STATUS, 0, 0, MIB as u32, 0).data();
    assert_eq!(all.len(), 16, "data and a hole");
    let one = raw.ask(command::BLOCK_STATUS, command_flag::REQ_ONE, 0, MIB as u32, 0).data();
    assert_eq!(one, [4096u32.to_be_bytes(), 0u32.to_be_bytes()].concat());
    let part = raw.ask(command::BLOCK_STATUS, command_flag::REQ_ONE, 8192, 512, 0).data();
    assert_eq!(part, [512u32.to_be_bytes(), 3u32.to_be_bytes()].concat());
}

#[test]
fn the_oldest_way_to_choose_an_export_works_too() {
    let served = Served::empty(MIB);
    for (flags, padding) in [(1, 124), (3, 0), (0, 124)] {
        let mut raw = Raw::greeted(&served.socket, flags);
        raw.stream.write_all(&encode_option(option::EXPORT_NAME, NAME.as_bytes())).unwrap();
        let mut told = vec![0; 8 + 2 + padding];
        raw.stream.read_exact(&mut told).unwrap();
        assert_eq!(told[..8], MIB.to_be_bytes());
        assert!(told[10..].iter().all(|b| *b == 0));
        raw.write(0, 512, b"written").data();
        assert_eq!(raw.ask(command::READ, 0, 511, 9, 9), Answer::Done(b"\0written\0".to_vec()));
        assert_eq!(raw.ask(command::READ, command_flag::DF, 0, 8, 8).code(), EINVAL, "DF was not announced");
    }
    let mut raw = Raw::greeted(&served.socket, 3);
    raw.stream.write_all(&encode_option(option::EXPORT_NAME, b"vdb")).unwrap();
    raw.assert_closed();
    served.assert_alive();
}

#[test]
fn requests_beyond_any_limit_are_refused_and_the_next_is_served() {
    let served = Served::empty(MIB);
    for structured in [false, true] {
        let mut raw = Raw::go(&served.socket, NAME, structured);
        for (offset, length) in [
            (MIB, 1),
            (MIB - 1, 2),
            (0, u32::MAX),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (u64::MAX - 511, 512),
            (1 << 63, 512),
            (MIB, PAYLOAD_BYTES_MAX),
        ] {
            assert_eq!(raw.ask(command::READ, 0, offset, length, 0).code(), EINVAL, "read {offset} {length}");
            assert_eq!(raw.ask(command::TRIM, 0, offset, length, 0).code(), EINVAL, "trim {offset} {length}");
            assert_eq!(raw.ask(command::WRITE_ZEROES, 0, offset, length, 0).code(), ENOSPC, "zero {offset} {length}");
        }
        for offset in [MIB, MIB - 1, u64::MAX, u64::MAX - 511, 1 << 63] {
            assert_eq!(raw.write(0, offset, &[7; 512]).code(), ENOSPC, "write {offset}");
        }
        let huge = vec![7; PAYLOAD_BYTES_MAX as usize];
        assert_eq!(raw.write(0, 0, &huge).code(), ENOSPC, "32 MiB into one");
        // Commands and flags that were not agreed on: CACHE, RESIZE, nonsense; PAYLOAD_LEN, FAST_ZERO on a write.
        for unknown in [5, 8, 0xffff] {
            assert_eq!(raw.ask(unknown, 0, 0, 512, 0).code(), EINVAL, "command {unknown}");
        }
        assert_eq!(raw.ask(command::TRIM, 1 << 5, 0, 512, 0).code(), EINVAL);
        assert_eq!(raw.ask(command::FLUSH, command_flag::NO_HOLE, 0, 0, 0).code(), EINVAL);
        assert_eq!(raw.write(command_flag::FAST_ZERO, 0, &[7; 512]).code(), EINVAL);
        assert_eq!(raw.write(0xfffe, 0, &[7; 512]).code(), EINVAL);
        // Nothing at all is no error, except where it means nothing.
        assert_eq!(raw.ask(command::READ, 0, MIB, 0, 0).code(), 0);
        assert_eq!(raw.write(0, 0, &[]).code(), 0);
        assert_eq!(raw.ask(command::TRIM, 0, 0, 0, 0).code(), 0);
        assert_eq!(raw.ask(command::WRITE_ZEROES, 0, 0, 0, 0).code(), 0);
        // FUA is allowed everywhere.
        assert_eq!(raw.ask(command::READ, command_flag::FUA, 0, 8, 8).data(), [0; 8]);
        assert_eq!(raw.ask(command::FLUSH, command_flag::FUA, 5, 7, 0).code(), 0);
    }
    assert!(served.content() == vec![0; 1 << 20], "a refused write left something");
}

#[test]
fn a_payload_beyond_the_limit_closes_the_connection() {
    let served = Served::empty(MIB);
    for length in [PAYLOAD_BYTES_MAX + 1, u32::MAX] {
        let mut raw = served.raw();
        raw.send(command::WRITE, 0, 0, length);
        raw.assert_closed();
        served.assert_alive();
    }
}

#[test]
fn bytes_that_are_no_nbd_close_the_connection() {
    let served = Served::empty(MIB);
    let mut raw = Raw::connect(&served.socket);
    raw.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    raw.assert_closed();
    // Client flags that were not offered.
    Raw::greeted(&served.socket, 4).assert_closed();
    Raw::greeted(&served.socket, u32::MAX).assert_closed();
    // Options without having said that replies to them are understood.
    let mut raw = Raw::greeted(&served.socket, 0);
    raw.stream.write_all(&encode_option(option::LIST, &[])).unwrap();
    raw.assert_closed();
    // An option larger than memory should be.
    let mut raw = Raw::greeted(&served.socket, 3);
    let mut head = encode_option(option::GO, &[]);
    head[12..].copy_from_slice(&(OPTION_BYTES_MAX + 1).to_be_bytes());
    raw.stream.write_all(&head).unwrap();
    raw.assert_closed();
    // Options without end.
    let mut raw = Raw::greeted(&served.socket, 3);
    let (mut answers, list) = (0, encode_option(option::LIST, &[]));
    while raw.stream.write_all(&list).is_ok() {
        answers += 1;
        let mut replies = [0; 20 + 4 + NAME.len() + 20];
        if raw.stream.read_exact(&mut replies).is_err() {
            break;
        }
        assert!(answers < 100_000, "options are not limited");
    }
    let mut raw = served.raw();
    raw.stream.write_all(&[0x25; 28]).unwrap();
    raw.assert_closed();
    served.assert_alive();
}

#[test]
fn a_conversation_cut_off_anywhere_harms_nobody() {
    let served = Served::empty(MIB);
    let mut spoken = 3u32.to_be_bytes().to_vec();
    spoken.extend(encode_option(option::STRUCTURED_REPLY, &[]));
    let contexts = ContextQuery { name: NAME.into(), queries: vec![CONTEXT_ALLOCATION.into()] };
    spoken.extend(encode_option(option::SET_META_CONTEXT, &contexts.encode()));
    spoken.extend(encode_option(option::GO, &query(NAME)));
    let handshake = spoken.len();
    let request =
        |command, length| vmdr_shim::nbd::message::Request { flags: 0, command, cookie: 9, offset: 0, length }.encode();
    spoken.extend(request(command::READ, 64));
    spoken.extend(request(command::WRITE, 32));
    spoken.extend([0xee; 32]);
    for cut in 0..=spoken.len() {
        let mut raw = Raw::connect(&served.socket);
        raw.stream.write_all(&spoken[..cut]).unwrap();
        raw.stream.shutdown(Shutdown::Write).unwrap();
        raw.assert_closed();
        let whole = cut == spoken.len();
        assert_eq!(served.content()[..32] == [0xee; 32], whole, "cut at {cut} of {}", spoken.len());
    }
    assert!(handshake < spoken.len());
    served.assert_alive();
}

#[test]
fn random_bytes_in_any_phase_harm_nobody() {
    let served = Served::empty(MIB);
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..300 {
        let mut raw = match round % 4 {
            0 => Raw::connect(&served.socket),
            1 => Raw::greeted(&served.socket, 3),
            _ => served.raw(),
        };
        let mut bytes = vec![0; rng.random_range(0..600)];
        rng.fill(&mut bytes[..]);
        if round % 4 == 1 {
            // Beyond the first magic.
            let option = rng.random_range(0..12);
            bytes = [encode_option(option, &bytes), bytes].concat();
        } else if round % 4 == 3 {
            for request in bytes.chunks_exact_mut(28) {
                request[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
                request[6..8].copy_from_slice(&rng.random_range(0..10u16).to_be_bytes());
            }
        }
        // The server may close before it has read everything.
        let _ = raw.stream.write_all(&bytes);
        let _ = raw.stream.shutdown(Shutdown::Write);
        raw.assert_closed();
    }
    served.assert_alive();
}

#[derive(Clone, Debug)]
struct Op {
    command: u16,
    flags: u16,
    offset: u64,
    length: u32,
}

const MODEL_BYTES: u64 = 256 << 10;

fn op() -> impl Strategy<Value = Op> {
    let offset = prop_oneof![8 => 0..MODEL_BYTES, 1 => MODEL_BYTES - 4..MODEL_BYTES + 4, 1 => any::<u64>()];
    let length = prop_oneof![8 => 0..40_000u32, 1 => Just(0), 1 => Just(MODEL_BYTES as u32)];
    let command =
        prop_oneof![Just(command::READ), Just(command::WRITE), Just(command::WRITE_ZEROES), Just(command::FLUSH)];
    (command, 0..4u16, offset, length).prop_map(|(command, flags, offset, length)| {
        let allowed = if command == command::WRITE_ZEROES { 3 } else { 1 };
        Op { command, flags: flags & allowed, offset, length }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    /// Against a disk that is a vector.
    #[test]
    fn any_sequence_of_requests_leaves_what_a_disk_would(ops in proptest::collection::vec(op(), 1..40), structured: bool) {
        let served = Served::empty(MODEL_BYTES);
        let mut raw = Raw::go(&served.socket, NAME, structured);
        let mut model = vec![0u8; MODEL_BYTES as usize];
        for (n, op) in ops.iter().enumerate() {
            let end = op.offset.checked_add(op.length.into()).filter(|end| *end <= MODEL_BYTES);
            let range = end.map(|end| op.offset as usize..end as usize);
            match op.command {
                command::READ => {
                    let answer = raw.ask(op.command, op.flags, op.offset, op.length, op.length as usize);
                    match range {
                        Some(range) => prop_assert!(answer.data() == model[range]),
                        None => prop_assert_eq!(answer.code(), EINVAL),
                    }
                }
                command::WRITE => {
                    let payload = vec![n as u8 + 1; op.length as usize];
                    let code = raw.write(op.flags, op.offset, &payload).code();
                    prop_assert_eq!(code, if range.is_some() { 0 } else { ENOSPC });
                    if let Some(range) = range {
                        model[range].copy_from_slice(&payload);
                    }
                }
                command::WRITE_ZEROES => {
                    let code = raw.ask(op.command, op.flags, op.offset, op.length, 0).code();
                    prop_assert_eq!(code, if range.is_some() { 0 } else { ENOSPC });
                    if let Some(range) = range {
                        model[range].fill(0);
                    }
                }
                _ => prop_assert_eq!(raw.ask(op.command, op.flags, op.offset, op.length, 0).code(), 0),
            }
        }
        prop_assert!(served.content() == model);
    }
}

#[test]
fn many_requests_may_be_on_their_way() {
    let served = Served::empty(MIB);
    let mut raw = served.raw();
    let cookies: Vec<u64> = (0..64u64)
        .map(|n| {
            let cookie = raw.send(command::WRITE, 0, n * 512, 512);
            raw.stream.write_all(&pattern(n * 512, 512)).unwrap();
            cookie
        })
        .collect();
    for cookie in cookies {
        assert_eq!(raw.answer(cookie, 0), Answer::Done(vec![]));
    }
    assert_eq!(raw.ask(command::READ, 0, 0, 64 * 512, 0).data(), pattern(0, 64 * 512));
    raw.send(command::DISC, 0, 0, 0);
    raw.assert_closed();
}

/// A peer that has said everything already.
struct Monologue {
    said: std::io::Cursor<Vec<u8>>,
    heard: Vec<u8>,
}

impl Read for Monologue {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.said.read(buf)
    }
}

impl Write for Monologue {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.heard.write(buf)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Pieces of a conversation, right and wrong, in any order.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let text = prop_oneof![Just(NAME.to_owned()), Just(String::new()), Just(CONTEXT_ALLOCATION.to_owned()), ".{0,8}"];
    let data = prop_oneof![
        text.clone().prop_map(|name| query(&name)),
        (text.clone(), proptest::collection::vec(text, 0..3)).prop_map(|(name, queries)| ContextQuery {
            name,
            queries
        }
        .encode()),
        Just(vec![]),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    let request = (any::<u16>(), 0..10u16, any::<u64>(), 0..MIB, any::<u32>(), 0..20u32).prop_map(
        |(flags, command, cookie, offset, length, shift)| {
            let (flags, length) = (flags >> (shift % 16), length >> shift);
            vmdr_shim::nbd::message::Request { flags, command, cookie, offset, length }.encode().to_vec()
        },
    );
    prop_oneof![
        3 => (0..12u32, data).prop_map(|(option, data)| encode_option(option, &data)),
        4 => request,
        1 => Just(encode_option(option::STRUCTURED_REPLY, &[])),
        1 => Just(encode_option(option::GO, &query(NAME))),
        1 => proptest::collection::vec(any::<u8>(), 0..60),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_conversation_ends_and_leaves_nobody_connected(flags in 0..5u32, pieces in proptest::collection::vec(piece(), 0..12)) {
        use vmdr_shim::nbd::handshake::negotiate;
        use vmdr_shim::nbd::session::{Tally, transmit};
        let dir = tempfile::TempDir::new().unwrap();
        let file = dir.path().join("disk.raw");
        std::fs::File::create(&file).unwrap().set_len(MIB).unwrap();
        let export = std::sync::Arc::new(vmdr_shim::nbd::FileExport::open(&file, NAME, false).unwrap());
        let exports: [std::sync::Arc<dyn vmdr_shim::nbd::Export>; 1] = [export.clone()];
        let said = [flags.to_be_bytes().to_vec(), pieces.concat()].concat();
        let mut stream = Monologue { said: std::io::Cursor::new(said), heard: vec![] };
        let mut tally = Tally::default();
        if let Ok(Some(agreed)) = negotiate(&mut stream, &exports, 1) {
            let before = stream.heard.len();
            let _ = transmit(&mut stream, &agreed, &mut tally);
            // Every request was answered, except a last one that ended the session.
            let smallest = tally.requests.saturating_sub(1) as usize * 16;
            prop_assert!(stream.heard.len() - before >= smallest);
        }
        prop_assert_eq!(tally.failures, 0, "the export was asked for what it could not do");
        drop(exports);
        prop_assert_eq!(std::sync::Arc::strong_count(&export), 1);
        prop_assert_eq!(std::fs::metadata(&file).unwrap().len(), MIB);
    }
}
