//! From bytes to frames, whatever the bytes.

use crate::{BODY_BYTES_MAX, FRAME_BYTES_MAX, Frame, HEAD_BYTES, MARK, Message, SUM_BYTES, checksum};

/// Finds frames in a stream. Keeps at most [`FRAME_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    held: Vec<u8>,
    skipped: u64,
}

impl Decoder {
    /// Takes what it can of `bytes` and gives the first frame that is whole, if there is one; call it again until there is
    /// none and `bytes` is empty.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        loop {
            let room = FRAME_BYTES_MAX - self.held.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.held.extend_from_slice(now);
            *bytes = later;
            match look(&self.held) {
                Look::Frame(length, frame) => {
                    self.held.drain(..length);
                    return Some(frame);
                }
                Look::Skip(length) => {
                    self.skipped += length as u64;
                    self.held.drain(..length);
                }
                // A full buffer holds a whole frame, so that there is always more room here.
                Look::More if bytes.is_empty() => return None,
                Look::More => {}
            }
        }
    }

    /// Bytes that were in no frame.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Bytes that wait for the rest of their frame.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

enum Look {
    Frame(usize, Frame),
    Skip(usize),
    More,
}

fn look(held: &[u8]) -> Look {
    let start = (0..held.len()).find(|&at| held[at..].iter().zip(&MARK).all(|(is, should)| is == should));
    match start {
        None if held.is_empty() => return Look::More,
        None => return Look::Skip(held.len()),
        Some(0) => {}
        Some(at) => return Look::Skip(at),
    }
    let Some((head, rest)) = held.split_first_chunk::<HEAD_BYTES>() else { return Look::More };
    let [.., k0, k1, l0, l1, n0, n1, n2, n3] = *head;
    let length = usize::from(u16::from_le_bytes([l0, l1]));
    if length > BODY_BYTES_MAX {
        return Look::Skip(1);
    }
    let Some((body, rest)) = rest.split_at_checked(length) else { return Look::More };
    let Some(sum) = rest.first_chunk::<SUM_BYTES>() else { return Look::More };
    if checksum(&held[..HEAD_BYTES + length]) != u32::from_le_bytes(*sum) {
        return Look::Skip(1);
    }
    let message = Message::parse(u16::from_le_bytes([k0, k1]), body);
    let frame = Frame { number: u32::from_le_bytes([n0, n1, n2, n3]), message };
    Look::Frame(HEAD_BYTES + length + SUM_BYTES, frame)
}
