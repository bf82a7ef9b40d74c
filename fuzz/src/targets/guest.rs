//! The guest channel: frames in any bytes, however they arrive; and what they do to the host's and to the guest's end of a change of
//! the guest's network.

use vmdr_guest_channel::exchange::{Conversation, Desk, Step};
use vmdr_guest_channel::network::{Item, NETWORK_BYTES_MAX, Network, PIECE_BYTES_MAX, Phase, Report};
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
    host_end(&all);
    guest_end(&all);
    texts(&bytes);
    for frame in all {
        let encoded = frame.encode();
        let again = frames(&encoded, encoded.len());
        // One of a kind that is not known loses its body.
        assert_eq!(again, [frame]);
    }
}

/// Both texts, whoever has written them.
fn texts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for text in [text.as_ref(), &format!("vmdr-network 1\n{text}")] {
        if let Ok(network) = Network::parse(text) {
            // One that was written down by others can be longer than what it says.
            if let Ok(again) = network.encode() {
                assert_eq!(Network::parse(&again).as_ref(), Ok(&network));
                assert!(!again.contains(['\r', '\0', ';', '$', '`']));
            }
        }
        let report = Report::parse(text).encode();
        assert!(report.len() <= NETWORK_BYTES_MAX && !report.contains('\u{1b}'));
    }
}

/// A hostile guest answers the host.
fn host_end(frames: &[Frame]) {
    let Ok(network) = Network::parse(NETWORK) else { return };
    let Ok(mut host) = Conversation::new(&network) else { return };
    for frame in frames {
        let Message::NetworkPut { bytes, .. } = host.message() else {
            if matches!(host.hear(&frame.message), Step::Done(_) | Step::Failed(_)) {
                break;
            }
            continue;
        };
        assert!(!bytes.is_empty() && bytes.len() <= PIECE_BYTES_MAX);
        if matches!(host.hear(&frame.message), Step::Done(_) | Step::Failed(_)) {
            break;
        }
    }
}

/// A hostile host tells the guest.
fn guest_end(frames: &[Frame]) {
    let mut guest = Desk::default();
    for frame in frames {
        let (answer, wanted) = guest.hear(&frame.message);
        assert!(guest.held() <= 2 * NETWORK_BYTES_MAX);
        let encoded = Frame { number: frame.number, message: answer }.encode();
        assert!(encoded.len() <= FRAME_BYTES_MAX);
        if let Some(wanted) = wanted {
            let of = |nic: &vmdr_guest_channel::network::Nic| Item {
                subject: format!("NIC {}", nic.mac),
                done: wanted.to_string(),
                error: String::new(),
            };
            guest.done(&Report { items: wanted.nics.iter().map(of).collect() });
        }
    }
}

const NETWORK: &str = "vmdr-network 1\nhostname web1-dr\nnameserver 10.1.0.53\nsearch example.org\nnic 52:54:00:12:34:56\naddress \
                       10.1.0.5/24\naddress fd00::5/64\nroute 0.0.0.0/0 via 10.1.0.1\n";

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
        Message::HeartbeatAsk,
        Message::Heartbeat { up_seconds: 7, ready: true },
        Message::NetworkPut { at: 0, total: NETWORK.len() as u16, bytes: NETWORK.as_bytes().to_vec() },
        Message::NetworkPut { at: 0, total: 20, bytes: b"vmdr-netwo".to_vec() },
        Message::NetworkPut { at: 10, total: 20, bytes: b"rk 1\ndance".to_vec() },
        Message::NetworkAsk { at: 3 },
        Message::NetworkIs { phase: Phase::Receiving, at: 10, total: 20, bytes: Vec::new() },
        Message::NetworkIs { phase: Phase::Working, at: 0, total: 0, bytes: Vec::new() },
        Message::NetworkIs { phase: Phase::Done, at: 0, total: 12, bytes: b"NIC 1\tgone\tx".to_vec() },
        Message::NetworkIs { phase: Phase::Refused, at: 0, total: 3, bytes: b"why".to_vec() },
        Message::Unknown(50),
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
