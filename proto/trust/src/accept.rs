//! Connections from other hosts: who is let in, and how many.
//!
//! Nothing of HTTP/2 is spoken before the handshake has shown a peer. What comes before is bounded in number, per address and in
//! all, and in time; so a flood of connections, or of such that say nothing, costs sockets and seconds and keeps out only
//! newcomers from the same address. Connections that stand are not touched by it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use vmdr_audit::{Entry, Outcome};

use crate::peers::fingerprint;
use crate::stream::{PeerInfo, PeerStream};
use crate::trust::{Trust, blocking, host_of};
use crate::verify::Expect;
use crate::{pair, tls};

/// From connecting to a finished handshake: 50 round trips of a link with 200 ms.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Handshakes under way at the same time.
pub const HANDSHAKES_MAX: usize = 64;
/// Of these, from one address.
const HANDSHAKES_PER_ADDRESS_MAX: usize = 16;
/// Connections of all peers.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections of one peer: it has one for each guest, and a few for questions.
pub const CONNECTIONS_PER_PEER_MAX: usize = 256;
/// Silence after which the kernel asks whether the other end is there.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Rest after a failed accept: mostly descriptors ran out, and come back.
const ACCEPT_REST: Duration = Duration::from_millis(200);

type Accepted = PeerStream<TlsStream<TcpStream>>;

/// Handshakes under way, by address.
#[derive(Debug, Default)]
struct Counts(Mutex<HashMap<IpAddr, usize>>);

struct Counted {
    counts: Arc<Counts>,
    address: IpAddr,
}

impl Counts {
    fn add(self: &Arc<Self>, address: IpAddr) -> Option<Counted> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= HANDSHAKES_PER_ADDRESS_MAX {
            return None;
        }
        *count += 1;
        Some(Counted { counts: Arc::clone(self), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.counts.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// Connections of peers. Ends when the stream is dropped.
pub fn incoming(listener: TcpListener, trust: Trust) -> ReceiverStream<io::Result<Accepted>> {
    let (sender, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        let (handshakes, connections) =
            (Arc::new(Semaphore::new(HANDSHAKES_MAX)), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
        let counts = Arc::new(Counts::default());
        loop {
            let accepted = tokio::select! {
                () = sender.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept a connection");
                    tokio::time::sleep(ACCEPT_REST).await;
                    continue;
                }
            };
            let permits = (
                counts.add(address.ip().to_canonical()),
                Arc::clone(&handshakes).try_acquire_owned().ok(),
                Arc::clone(&connections).try_acquire_owned().ok(),
            );
            let (Some(counted), Some(handshake), Some(connection)) = permits else {
                refused(&trust, &host_of(address), "too many connections at once");
                continue;
            };
            let (trust, sender) = (trust.clone(), sender.clone());
            tokio::spawn(async move {
                let _until_then = (counted, handshake);
                match tokio::time::timeout(HANDSHAKE_TIME_MAX, greet(&trust, stream, address, connection)).await {
                    Ok(Ok(Some(stream))) => {
                        // A daemon that ends takes nobody any more.
                        let _ = sender.send(Ok(stream)).await;
                    }
                    Ok(Ok(None)) => {}
                    Ok(Err(why)) => refused(&trust, &host_of(address), &why),
                    Err(_) => refused(&trust, &host_of(address), "no TLS handshake in time"),
                }
            });
        }
    });
    ReceiverStream::new(stream)
}

fn refused(trust: &Trust, who: &str, why: &str) {
    let entry = Entry::new("connect", who, "", Outcome::Refused).because(why);
    let audit = trust.audit().clone();
    tokio::task::spawn_blocking(move || audit.refused(entry));
}

/// The handshake. Nothing comes of a pairing, which is done here.
async fn greet(
    trust: &Trust,
    stream: TcpStream,
    address: SocketAddr,
    connection: OwnedSemaphorePermit,
) -> Result<Option<Accepted>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    prepare(&stream).map_err(|error| text(&error))?;
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await;
    let start = start.map_err(|error| format!("it does not speak TLS 1.3: {error}"))?;
    let pairing = start.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == tls::ALPN_PAIR));
    let of = trust.clone();
    let prepared = blocking(move || {
        let peers = of.peers()?;
        let (expect, alpn) = match pairing {
            true => (Expect::Anybody, tls::ALPN_PAIR),
            false => (Expect::Peers(peers.clone()), tls::ALPN_LINK),
        };
        let (config, found) = tls::server(&of.held()?, expect, alpn)?;
        Ok((config, found, peers))
    });
    let (config, found, peers) = prepared.await.map_err(|error| text(&error))?;
    let shaken = start.into_stream(config).await;
    let (stream, ca) = match (shaken, found.take()) {
        (Ok(stream), Some(Ok(ca))) => (stream, ca),
        (_, Some(Err(why))) => return Err(why),
        (Err(error), _) => return Err(format!("the TLS handshake failed: {error}")),
        (Ok(_), None) => return Err("it shows no certificate".to_owned()),
    };
    if pairing {
        pair::answer(trust, stream, ca, address).await;
        return Ok(None);
    }
    let id = fingerprint(&ca);
    let Some(peer) = peers.iter().find(|peer| peer.id == id) else { return Err("the peer is gone".to_owned()) };
    let Some(standing) = trust.registered().add(&peer.id, CONNECTIONS_PER_PEER_MAX) else {
        return Err(format!("{} has {CONNECTIONS_PER_PEER_MAX} connections already", peer.shown()));
    };
    let token = standing.token.clone();
    Ok(Some(PeerStream::new(stream, PeerInfo::of(peer, Some(address)), token, (standing, connection))))
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    Ok(())
}
