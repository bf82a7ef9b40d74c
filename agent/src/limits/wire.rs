//! The connection to a receiver, as slow as the limits say.
//!
//! The limit is where the bytes leave: frames, pings and all. What does not fit waits in the stream's queue, which is bounded,
//! then the session waits, cuts become fewer, and epochs larger; the guest notices nothing. HTTP/2's pings overtake
//! the data that waits, so a slow link is not taken for a lost one.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::Guest;

/// A TCP connection that writes no faster than its guest and its host may.
#[derive(Debug)]
pub struct Throttled {
    stream: TcpStream,
    guest: Arc<Guest>,
    /// Bytes that may be written...
    granted: usize,
    /// ...after this.
    rest: Option<Pin<Box<Sleep>>>,
}

impl Throttled {
    /// Of this guest.
    pub fn new(stream: TcpStream, guest: Arc<Guest>) -> Self {
        Self { stream, guest, granted: 0, rest: None }
    }

    /// How many of `want` bytes (one at least) may be written now.
    fn allowed(&mut self, context: &mut Context<'_>, want: usize) -> Poll<usize> {
        if self.granted == 0 {
            let (bytes, wait) = self.guest.reserve(want, Instant::now());
            self.granted = bytes;
            self.rest = (!wait.is_zero()).then(|| Box::pin(tokio::time::sleep(wait)));
        }
        if let Some(rest) = &mut self.rest {
            std::task::ready!(rest.as_mut().poll(context));
            self.rest = None;
        }
        Poll::Ready(self.granted.min(want))
    }

    fn wrote(&mut self, bytes: usize) {
        self.granted = self.granted.saturating_sub(bytes);
        self.guest.sent(bytes);
    }
}

impl AsyncWrite for Throttled {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let allowed = std::task::ready!(this.allowed(context, bytes.len()));
        let written = std::task::ready!(Pin::new(&mut this.stream).poll_write(context, &bytes[..allowed]))?;
        this.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let want: usize = slices.iter().map(|slice| slice.len()).sum();
        let allowed = std::task::ready!(this.allowed(context, want));
        let stream = Pin::new(&mut this.stream);
        let written = if allowed == want {
            stream.poll_write_vectored(context, slices)
        } else {
            // The first that has anything; the others come with the next call.
            let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&[][..], |slice| slice);
            stream.poll_write(context, &first[..allowed.min(first.len())])
        };
        let written = std::task::ready!(written)?;
        this.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

impl AsyncRead for Throttled {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}
