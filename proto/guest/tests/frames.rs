//! Frames in, frames out, whatever lies between them.

use proptest::prelude::*;
use vmdr_guest_channel::network::{PIECE_BYTES_MAX, Phase};
use vmdr_guest_channel::{
    Decoder, FRAME_BYTES_MAX, Frame, Hello, Message, Outcome, SOFTWARE_BYTES_MAX, TEXT_BYTES_MAX, VERSION,
};

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        (any::<u16>(), any::<u16>(), any::<u32>(), any::<bool>(), "[a-zé ]{0,30}").prop_map(
            |(oldest, newest, features, answer, software)| Message::Hello(Hello {
                oldest,
                newest,
                features,
                answer,
                software
            })
        ),
        any::<u16>().prop_map(Message::Unsupported),
        (any::<u64>(), any::<i64>(), any::<i32>()).prop_map(|(guest_unix_ns, offset_ns, rate_ppm)| Message::ClockAsk {
            guest_unix_ns,
            offset_ns,
            rate_ppm
        }),
        any::<u64>().prop_map(|host_unix_ns| Message::ClockIs { host_unix_ns }),
        any::<u32>().prop_map(|hold_ms| Message::Freeze { hold_ms }),
        (outcome(), any::<u16>(), any::<u16>(), any::<u32>(), "[a-zé ]{0,90}").prop_map(
            |(outcome, file_systems, skipped, hold_ms, text)| Message::Frozen {
                outcome,
                file_systems,
                skipped,
                hold_ms,
                text
            }
        ),
        any::<u32>().prop_map(|freeze| Message::Thaw { freeze }),
        (any::<bool>(), any::<u32>(), "[a-zé ]{0,90}").prop_map(|(held, frozen_ms, text)| Message::Thawed {
            held,
            frozen_ms,
            text
        }),
        Just(Message::HeartbeatAsk),
        (any::<u32>(), any::<bool>()).prop_map(|(up_seconds, ready)| Message::Heartbeat { up_seconds, ready }),
        (any::<u16>(), any::<u16>(), proptest::collection::vec(any::<u8>(), 0..PIECE_BYTES_MAX))
            .prop_map(|(at, total, bytes)| Message::NetworkPut { at, total, bytes }),
        any::<u16>().prop_map(|at| Message::NetworkAsk { at }),
        (phase(), any::<u16>(), any::<u16>(), proptest::collection::vec(any::<u8>(), 0..PIECE_BYTES_MAX))
            .prop_map(|(phase, at, total, bytes)| Message::NetworkIs { phase, at, total, bytes }),
        (100u16..).prop_map(Message::Unknown),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![Just(Outcome::Frozen), Just(Outcome::Failed), Just(Outcome::Busy), (3u8..).prop_map(Outcome::Other),]
}

fn phase() -> impl Strategy<Value = Phase> {
    prop_oneof![Just(Phase::Idle), Just(Phase::Working), Just(Phase::Done), (6u8..).prop_map(Phase::Other)]
}

fn frame() -> impl Strategy<Value = Frame> {
    (any::<u32>(), message()).prop_map(|(number, message)| Frame { number, message })
}

/// All frames of a stream that arrives in pieces of this size.
fn decode(stream: &[u8], piece: usize) -> Vec<Frame> {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for mut bytes in stream.chunks(piece) {
        while let Some(frame) = decoder.next(&mut bytes) {
            frames.push(frame);
        }
        assert!(bytes.is_empty() && decoder.held() <= FRAME_BYTES_MAX);
    }
    frames
}

proptest! {
    #[test]
    fn frames_come_back_in_pieces_of_any_size(frames in proptest::collection::vec(frame(), 0..8), piece in 1usize..700) {
        let stream: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        prop_assert_eq!(decode(&stream, piece), frames);
    }

    #[test]
    fn a_reader_that_lost_its_place_finds_the_next_frame(
        torn in frame(), cut in 0usize..100, noise in proptest::collection::vec(any::<u8>(), 0..1500), last in frame(),
        piece in 1usize..700,
    ) {
        let torn = torn.encode();
        let mut stream = torn[..cut.min(torn.len() - 1)].to_vec();
        stream.extend(&noise);
        // Whatever the noise seemed to begin is over after the longest frame.
        stream.resize(stream.len() + FRAME_BYTES_MAX, 0);
        stream.extend(last.encode());
        prop_assert_eq!(decode(&stream, piece).pop(), Some(last));
    }

    #[test]
    fn any_bytes_are_borne(stream in proptest::collection::vec(any::<u8>(), 0..3000), piece in 1usize..700) {
        decode(&stream, piece);
    }

    #[test]
    fn a_flipped_bit_shows(frame in frame(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = frame.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(!decode(&bytes, 700).contains(&frame));
    }
}

#[test]
fn versions_are_agreed_on() {
    let hello = |oldest, newest| Hello { oldest, newest, ..Hello::own(0, false, "") };
    assert_eq!(hello(1, 1).common_version(), Some(1));
    assert_eq!(hello(1, VERSION + 7).common_version(), Some(VERSION));
    assert_eq!(hello(VERSION + 1, VERSION + 7).common_version(), None);
    assert_eq!(hello(5, 0).common_version(), None);
}

#[test]
fn a_long_name_is_cut_at_a_character() {
    let hello = Hello::own(0, true, &"é".repeat(SOFTWARE_BYTES_MAX));
    let frames = decode(&Frame { number: 1, message: Message::Hello(hello) }.encode(), 700);
    let Some(Frame { message: Message::Hello(hello), .. }) = frames.first() else { panic!("{frames:?}") };
    assert_eq!(hello.software, "é".repeat(SOFTWARE_BYTES_MAX / 2));
}

#[test]
fn a_long_reason_is_cut_at_a_character() {
    let frozen =
        |text: String| Message::Frozen { outcome: Outcome::Failed, file_systems: 1, skipped: 2, hold_ms: 3, text };
    let frames = decode(&Frame { number: 1, message: frozen("é".repeat(TEXT_BYTES_MAX)) }.encode(), 700);
    assert_eq!(frames, [Frame { number: 1, message: frozen("é".repeat(TEXT_BYTES_MAX / 2)) }]);
}

#[test]
fn a_body_may_have_more_than_is_known() {
    let short = Frame { number: 9, message: Message::ClockIs { host_unix_ns: 77 } }.encode();
    // The same frame of a later version, with a field more.
    let mut body = short[12..20].to_vec();
    body.extend([1, 2, 3]);
    let mut bytes = short[..12].to_vec();
    bytes[6] = body.len() as u8;
    bytes.extend(body);
    let sum = bytes.iter().fold(0x811c_9dc5_u32, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    bytes.extend(sum.to_le_bytes());
    let expected = Frame { number: 9, message: Message::ClockIs { host_unix_ns: 77 } };
    assert_eq!(decode(&bytes, 700), [expected]);
    // And one that is too short for its kind is nothing that anybody would act on.
    let mut bytes = short[..12].to_vec();
    bytes[6] = 0;
    let sum = bytes.iter().fold(0x811c_9dc5_u32, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    bytes.extend(sum.to_le_bytes());
    assert_eq!(decode(&bytes, 700), [Frame { number: 9, message: Message::Unknown(17) }]);
}

#[test]
fn a_name_that_is_not_utf8_is_kept_within_its_bound() {
    let hello = Message::Hello(Hello::own(0, false, &"x".repeat(SOFTWARE_BYTES_MAX)));
    let mut bytes = Frame { number: 1, message: hello }.encode();
    // Each of these becomes a character of three bytes.
    let end = bytes.len() - 4;
    bytes[end - SOFTWARE_BYTES_MAX..end].fill(0xff);
    let sum = bytes[..end].iter().fold(0x811c_9dc5u32, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    bytes[end..].copy_from_slice(&sum.to_le_bytes());
    let frames = decode(&bytes, bytes.len());
    let [Frame { message: Message::Hello(hello), .. }] = &frames[..] else { panic!("{frames:?}") };
    assert!(hello.software.len() <= SOFTWARE_BYTES_MAX && hello.software.len() > SOFTWARE_BYTES_MAX - 3);
    assert_eq!(decode(&frames[0].encode(), 600), frames);
}
