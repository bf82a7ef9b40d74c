//! The guest channel: frames in any bytes, however they arrive.

use vmdr_guest_channel::{Decoder, FRAME_BYTES_MAX, Frame, Hello, Message, Outcome};

use super::split;
use crate::seal;

pub fn run(bytes: &[u8]) {
    let Some((sealed, piecewise, bytes)) = split(bytes) else { return };
    let mut bytes = bytes.to_vec();
    if sealed {
        seal::guest(&mut bytes);
    }
    let all = frames(&bytes, bytes.len().max(1));
    let pieces = frames(&bytes, if piecewise { 3 } else { 17 });
    assert_eq!(all, pieces);
    for frame in all {
        let encoded = frame.encode();
        let again = frames(&encoded, encoded.len());
        // One of a kind that is not known loses its body.
        assert_eq!(again, [frame]);
    }
}

fn frames(bytes: &[u8], step: usize) -> Vec<Frame> {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for mut piece in bytes.chunks(step) {
        while let Some(frame) = decoder.next(&mut piece) {
            frames.push(frame);
        }
        assert!(piece.is_empty() && decoder.held() <= FRAME_BYTES_MAX);
    }
    assert!(decoder.skipped() + decoder.held() as u64 <= bytes.len() as u64);
    frames
}

pub fn seeds() -> Vec<Vec<u8>> {
    let messages = [
        Message::Hello(Hello::own(1, true, "vmdr-guest-tools 0.1.0")),
        Message::Unsupported(99),
        Message::ClockAsk { guest_unix_ns: 1_700_000_000_000_000_000, offset_ns: -5_000_000, rate_ppm: 40_000 },
        Message::ClockIs { host_unix_ns: 1_700_000_000_000_000_001 },
        Message::Freeze { hold_ms: 10_000 },
        Message::Frozen {
            outcome: Outcome::Frozen,
            file_systems: 3,
            skipped: 1,
            hold_ms: 9_000,
            text: "/srv".to_owned(),
        },
        Message::Frozen {
            outcome: Outcome::Failed,
            file_systems: 0,
            skipped: 0,
            hold_ms: 0,
            text: "a hook".to_owned(),
        },
        Message::Thaw { freeze: 7 },
        Message::Thawed { held: true, frozen_ms: 40, text: String::new() },
        Message::Unknown(48),
    ];
    let frames: Vec<Vec<u8>> =
        messages.into_iter().zip(7..).map(|(message, number)| Frame { number, message }.encode()).collect();
    let stream = [&b"half a frame vGST"[..], &frames.concat(), b"vGST"].concat();
    [frames, vec![stream]]
        .concat()
        .into_iter()
        .flat_map(|seed| (0..4).map(move |first| [&[first], &seed[..]].concat()))
        .collect()
}
