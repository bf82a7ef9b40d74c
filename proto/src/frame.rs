//! Length-prefixed protobuf frames, as agent and shim exchange them: a little-endian u32, then that many bytes.

use std::io::{self, Read, Write};

use prost::Message;

/// The longest frame accepted. A part that lists a million runs of pages stays below.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other end closed the connection between two frames.
    #[error("the connection was closed")]
    Closed,
    /// The connection failed.
    #[error("frame: {0}")]
    Io(#[from] io::Error),
    /// The peer announced more than [`FRAME_BYTES_MAX`].
    #[error("frame of {0} bytes is longer than {FRAME_BYTES_MAX}")]
    TooLong(usize),
    /// The bytes are not the message that was expected.
    #[error("frame: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Reads one frame. An end of file before its first byte is [`FrameError::Closed`].
pub fn read<M: Message + Default>(from: &mut impl Read) -> Result<M, FrameError> {
    let mut length = [0; 4];
    let mut got = 0;
    while got < length.len() {
        match from.read(&mut length[got..]) {
            Ok(0) if got == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    Ok(M::decode(body.as_slice())?)
}

/// Writes one frame in one call.
pub fn write<M: Message>(to: &mut impl Write, message: &M) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&(length as u32).to_le_bytes());
    message.encode_raw(&mut frame);
    to.write_all(&frame)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim;

    #[test]
    fn round_trip_and_end() {
        let mut wire = Vec::new();
        let message = shim::Release { epoch: 7, part: 3 };
        write(&mut wire, &message).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read::<shim::Release>(&mut from).unwrap(), message);
        assert!(matches!(read::<shim::Release>(&mut from), Err(FrameError::Closed)));
        let mut torn = &wire[..wire.len() - 1];
        assert!(matches!(read::<shim::Release>(&mut torn), Err(FrameError::Io(_))));
    }

    #[test]
    fn length_is_checked_before_memory_is_taken() {
        let wire = u32::MAX.to_le_bytes();
        assert!(matches!(read::<shim::Release>(&mut wire.as_slice()), Err(FrameError::TooLong(_))));
    }
}
