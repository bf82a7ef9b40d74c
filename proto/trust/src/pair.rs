//! Pairing: two hosts that have never met become peers of each other, by a token that is shown on one and typed on the other.
//!
//! ```text
//!   host that showed the token                       host where it was typed
//!     |  TLS 1.3, each shows its certificate and authority  |
//!     |<----------------------------------------------------|  checks: the authority is the one in the token
//!     |            {"secret": ..., "name": ...}             |
//!     |<----------------------------------------------------|
//!     |  checks: the secret; uses the token up, durably,    |
//!     |  then writes the peer                               |
//!     |            {"name": ...} or {"refused": ...}        |
//!     |---------------------------------------------------->|  writes the peer
//! ```
//!
//! The token carries 128 bits of the fingerprint of the authority of the host that showed it, so nobody in between can answer in its
//! place, and a secret of 96 bits, which only goes to that host. The certificate of the other is bound to the secret by the
//! connection that both are on: TLS has it prove its key. When the last answer is lost, the one host has the other on file and
//! not the reverse: another token mends it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use vmdr_audit::{Entry, Outcome};

use crate::identity::host_name;
use crate::peers::Peer;
use crate::token::Token;
use crate::trust::{Trust, blocking, handshake, host_of};
use crate::verify::Expect;
use crate::{TrustError, files, tls};

/// The longest line read.
const LINE_BYTES_MAX: u64 = 4 << 10;
/// For connecting, and for the answer.
const TIME_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    secret: String,
    name: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Reply {
    #[serde(default)]
    name: String,
    /// Why not; none: it is done.
    #[serde(default)]
    refused: Option<String>,
}

/// The side that showed the token: answers one request, and records what came of it.
pub(crate) async fn answer<S>(trust: &Trust, mut stream: S, ca: CertificateDer<'static>, address: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let who = host_of(address);
    let ask = match read_line::<Ask>(&mut stream).await {
        Ok(ask) => ask,
        Err(error) => {
            let (audit, why) = (trust.audit().clone(), error.to_string());
            tokio::task::spawn_blocking(move || {
                audit.refused(Entry::new("pair", &who, "", Outcome::Refused).because(why))
            });
            return;
        }
    };
    let of = trust.clone();
    let reply = tokio::task::spawn_blocking(move || {
        let peer = Peer::new(&ca, &ask.name);
        let entry = Entry::new("pair", &who, &peer.shown(), Outcome::Done);
        match take(&of, &ask, peer) {
            Ok(Ok(())) => {
                of.audit().record(entry.because("with the token shown here"));
                Reply { name: host_name(), refused: None }
            }
            Ok(Err(why)) => {
                of.audit().refused(entry.because(why));
                Reply { name: String::new(), refused: Some(why.to_owned()) }
            }
            Err(error) => {
                of.audit().record(entry.with(Outcome::Failed).because(error.to_string()));
                Reply {
                    name: String::new(),
                    refused: Some("the host that showed the token failed: see its log".to_owned()),
                }
            }
        }
    });
    if let Ok(reply) = reply.await {
        let sent = write_line(&mut stream, &reply).await;
        if let Err(error) = sent {
            tracing::warn!(%address, %error, "answer a pairing");
        }
        let _ = stream.shutdown().await;
    }
}

fn take(trust: &Trust, ask: &Ask, mut peer: Peer) -> Result<Result<(), &'static str>, TrustError> {
    let _lock = files::lock(trust.directory())?;
    if let Err(why) = trust.pairing().redeem(&ask.secret)? {
        return Ok(Err(why));
    }
    if peer.id == trust.held()?.id {
        return Ok(Err("this host cannot be paired with itself"));
    }
    if let Some(before) = trust.peers()?.into_iter().find(|before| before.id == peer.id) {
        peer.addresses = before.addresses;
    }
    trust.store(&peer)?;
    Ok(Ok(()))
}

/// The side where the token was typed: pairs with the host at `address` (`HOST:PORT`), which must be the one that showed it.
pub async fn join(trust: &Trust, token: &Token, address: &str) -> Result<Peer, TrustError> {
    let failed = |error: io::Error| TrustError::Refused(format!("pair with {address}: {error}"));
    let stream = tokio::time::timeout(TIME_MAX, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
    let (of, expect) = (trust.clone(), Expect::Shown(token.clone()));
    let made = blocking(move || tls::client(&of.held()?, expect, tls::ALPN_PAIR)).await;
    let (config, found) = made.map_err(failed)?;
    let (mut stream, ca) = handshake(config, found, stream).await.map_err(failed)?;
    let ask = Ask { secret: token.secret(), name: host_name() };
    write_line(&mut stream, &ask).await.map_err(failed)?;
    let reply: Reply = read_line(&mut stream).await.map_err(failed)?;
    if let Some(why) = reply.refused {
        return Err(TrustError::Refused(format!("the host at {address} refused: {why}")));
    }
    let (of, at) = (trust.clone(), address.to_owned());
    let stored = tokio::task::spawn_blocking(move || {
        let _lock = files::lock(of.directory())?;
        let mut peer = Peer::new(&ca, &reply.name);
        if let Some(before) = of.peers()?.into_iter().find(|before| before.id == peer.id) {
            peer.addresses = before.addresses;
        }
        of.store_at(peer, &at)
    });
    stored.await.map_err(|error| failed(io::Error::other(error)))?
}

async fn read_line<T: serde::de::DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream.take(LINE_BYTES_MAX));
    let read = tokio::time::timeout(TIME_MAX, reader.read_until(b'\n', &mut line)).await;
    read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end closed the connection"));
    }
    serde_json::from_slice(&line)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it does not speak as a pairing does"))
}

async fn write_line(stream: &mut (impl AsyncWrite + Unpin), what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}
