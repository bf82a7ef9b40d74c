//! A connection whose other end is known, for as long as it is trusted.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::peers::{Peer, SHORT_CHARS};

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// The peer's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Where it connected from; nothing on connections that this host made.
    pub address: Option<SocketAddr>,
}

impl PeerInfo {
    pub(crate) fn of(peer: &Peer, address: Option<SocketAddr>) -> Self {
        Self { id: peer.id.clone(), name: peer.name.clone(), address }
    }

    /// Name and the first of the id, for people and the audit log.
    pub fn shown(&self) -> String {
        format!("peer {} ({})", self.name, self.id.get(..SHORT_CHARS).unwrap_or(&self.id))
    }
}

/// See the module.
#[derive(Debug)]
pub struct PeerStream<S> {
    stream: S,
    info: PeerInfo,
    ended: CancellationToken,
    ending: Pin<Box<WaitForCancellationFutureOwned>>,
    _kept: Kept,
}

/// What is given back when a connection ends.
pub(crate) type Kept = Box<dyn std::any::Any + Send + Sync>;

impl<S> PeerStream<S> {
    pub(crate) fn new(
        stream: S,
        info: PeerInfo,
        ended: CancellationToken,
        kept: impl std::any::Any + Send + Sync,
    ) -> Self {
        let ending = Box::pin(ended.clone().cancelled_owned());
        Self { stream, info, ended, ending, _kept: Box::new(kept) }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.info
    }

    fn trusted(&self) -> io::Result<()> {
        if self.ended.is_cancelled() { Err(revoked(&self.info)) } else { Ok(()) }
    }
}

fn revoked(info: &PeerInfo) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, format!("{} is no longer trusted here", info.shown()))
}

/// What the other end says when it refuses this host's certificate comes only with the first answer.
fn explained(error: io::Error, info: &PeerInfo) -> io::Error {
    let alert = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::AlertReceived(alert)) = alert else { return error };
    let message = format!(
        "{} does not accept this host's certificate ({alert:?}): the pairing is gone or revoked there, or a clock is wrong; \
         see its `vmdr peers` and `vmdr audit`",
        info.shown()
    );
    io::Error::new(io::ErrorKind::PermissionDenied, message)
}

impl<S> Connected for PeerStream<S> {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PeerStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ending.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(revoked(&self.info)));
        }
        let read = std::task::ready!(Pin::new(&mut self.stream).poll_read(context, to));
        Poll::Ready(read.map_err(|error| explained(error, &self.info)))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PeerStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.trusted()?;
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.trusted()?;
        Pin::new(&mut self.stream).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.trusted()?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
