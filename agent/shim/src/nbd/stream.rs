//! Reading and writing with an end: helpers for sockets whose peer may stall or go away.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A socket that fails with `TimedOut` once its deadline has passed, however the peer spreads its bytes.
///
/// The socket keeps the timeout of its last call: see [`DeadlineStream::lift`].
pub(super) struct DeadlineStream<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl<'a> DeadlineStream<'a> {
    pub(super) fn new(stream: &'a UnixStream, limit: Duration) -> Self {
        Self { stream, deadline: Instant::now() + limit }
    }

    /// Takes the socket's timeouts off again.
    pub(super) fn lift(self) -> io::Result<()> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }

    fn remaining(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // A timeout below the socket's resolution would mean "none".
        if left < Duration::from_micros(1) { Err(timed_out()) } else { Ok(left) }
    }
}

fn timed_out() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "the peer did not answer in time")
}

fn as_timeout(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { timed_out() } else { error }
}

impl Read for DeadlineStream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.remaining()?))?;
        self.stream.read(buf).map_err(as_timeout)
    }
}

impl Write for DeadlineStream<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        self.stream.write(buf).map_err(as_timeout)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fills `buf`; `false` when the stream ended before its first byte, an error when it ended later.
pub(super) fn read_or_end(stream: &mut impl Read, buf: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buf.len() {
        match stream.read(&mut buf[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_dribbles_does_not_move_the_deadline() {
        let (near, far) = UnixStream::pair().unwrap();
        let dribble = std::thread::spawn(move || {
            while (&far).write_all(&[0]).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let mut buf = [0; 1 << 20];
        let error = DeadlineStream::new(&near, Duration::from_millis(100)).read_exact(&mut buf).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        drop(near);
        dribble.join().unwrap();
    }

    #[test]
    fn a_peer_that_does_not_read_times_out_and_lifting_makes_the_socket_wait_again() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut limited = DeadlineStream::new(&near, Duration::from_millis(50));
        assert_eq!(limited.write_all(&vec![0; 64 << 20]).unwrap_err().kind(), ErrorKind::TimedOut);
        limited.lift().unwrap();
        assert_eq!(near.read_timeout().unwrap(), None);
        assert_eq!(near.write_timeout().unwrap(), None);
    }

    #[test]
    fn the_end_is_told_from_a_break() {
        assert!(!read_or_end(&mut io::empty(), &mut [0; 4]).unwrap());
        assert!(read_or_end(&mut &[1u8, 2, 3, 4][..], &mut [0; 4]).unwrap());
        assert_eq!(read_or_end(&mut &[1u8][..], &mut [0; 4]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
