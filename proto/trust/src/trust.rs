//! What a daemon holds: the identity, the peers, and the connections that stand because of them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use vmdr_audit::{Audit, Entry, Outcome};

use crate::accept::HANDSHAKE_TIME_MAX;
use crate::identity::{Held, Identity};
use crate::partners::{Partner, Partners};
use crate::peers::{Peer, Peers, not_after, unix};
use crate::stream::{PeerInfo, PeerStream};
use crate::token::{Pairing, TOKEN_LIFE_MAX, Token};
use crate::verify::{Expect, Found, server_name};
use crate::{TrustError, files, tls};

/// How often peers on the disk are compared with the connections that stand.
pub const WATCH: Duration = Duration::from_secs(1);
/// How often certificates are looked at, and renewed.
const RENEW_LOOK: Duration = Duration::from_secs(600);
/// How long before its end a certificate that was not renewed is warned of.
const WARN_LEAF: Duration = Duration::from_secs(14 * 24 * 3600);
/// How long before its end an authority is warned of: replacing it means pairing anew.
const WARN_CA: Duration = Duration::from_secs(180 * 24 * 3600);

/// See the module. Clones share it.
#[derive(Debug, Clone)]
pub struct Trust {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    identity: Identity,
    peers: Peers,
    partners: Partners,
    pairing: Pairing,
    audit: Audit,
    connections: Arc<Connections>,
}

/// Connections that stand, by peer.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    next: AtomicU64,
    standing: Mutex<HashMap<u64, (String, CancellationToken)>>,
}

impl Connections {
    fn standing(&self) -> MutexGuard<'_, HashMap<u64, (String, CancellationToken)>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a connection to a peer as long as the answer lives; none where there are `most` already.
    pub fn add(self: &Arc<Self>, peer: &str, most: usize) -> Option<Standing> {
        let mut standing = self.standing();
        if standing.values().filter(|(of, _)| of == peer).count() >= most {
            return None;
        }
        let (number, token) = (self.next.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        standing.insert(number, (peer.to_owned(), token.clone()));
        Some(Standing { connections: Arc::clone(self), number, token })
    }
}

#[derive(Debug)]
pub(crate) struct Standing {
    connections: Arc<Connections>,
    number: u64,
    /// Cancelled when the peer is no longer trusted.
    pub token: CancellationToken,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.connections.standing().remove(&self.number);
    }
}

impl Trust {
    /// Opens the directory; the host's identity is made if it has none.
    pub fn open(directory: &Path, audit: Audit) -> Result<Self, TrustError> {
        let identity = Identity::open(directory)?;
        let inner = Inner {
            directory: directory.to_owned(),
            identity,
            peers: Peers::open(directory)?,
            partners: Partners::open(directory)?,
            pairing: Pairing::of(directory),
            audit,
            connections: Arc::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// This host's id.
    pub fn id(&self) -> Result<String, TrustError> {
        Ok(self.held()?.id)
    }

    /// All peers on file.
    pub fn peers(&self) -> Result<Vec<Peer>, TrustError> {
        self.inner.peers.load()
    }

    /// The peer of this name or id.
    pub fn find(&self, wanted: &str) -> Result<Peer, TrustError> {
        self.inner.peers.find(wanted)
    }

    /// The peer with which this host shares a domain.
    pub fn partner(&self, uuid: &str) -> Result<Option<Partner>, TrustError> {
        self.inner.partners.get(uuid)
    }

    /// Notes it, durably; none: no longer.
    pub fn set_partner(&self, uuid: &str, partner: Option<&Partner>) -> Result<(), TrustError> {
        let _lock = files::lock(&self.inner.directory)?;
        match partner {
            None => self.inner.partners.remove(uuid),
            // Seldom: a connection more of the same protection changes nothing.
            Some(partner) if self.partner(uuid)?.as_ref() == Some(partner) => Ok(()),
            Some(partner) => self.inner.partners.set(uuid, partner),
        }
    }

    /// Until when this host's certificate, and its authority, are good.
    pub fn good_until(&self) -> Result<(SystemTime, SystemTime), TrustError> {
        let held = self.held()?;
        Ok((not_after(&held.leaf)?, not_after(&held.ca)?))
    }

    /// The audit log.
    pub fn audit(&self) -> &Audit {
        &self.inner.audit
    }

    /// How many connections stand with a peer.
    pub fn connections(&self, id: &str) -> usize {
        self.inner.connections.standing().values().filter(|(of, _)| of == id).count()
    }

    /// Trusts a peer no longer. Its connections end within [`WATCH`].
    pub fn revoke(&self, wanted: &str) -> Result<Peer, TrustError> {
        let _lock = files::lock(&self.inner.directory)?;
        let mut peer = self.find(wanted)?;
        if peer.revoked_unix.is_some() {
            return Err(TrustError::Refused(format!("{} is revoked already", peer.shown())));
        }
        peer.revoked_unix = Some(unix(SystemTime::now()));
        self.inner.peers.store(&peer)?;
        self.end_untrusted();
        Ok(peer)
    }

    /// Notes that this peer, and no other, answers at an address (`HOST:PORT`, as connections are made to it).
    pub fn locate(&self, wanted: &str, address: &str) -> Result<Peer, TrustError> {
        let _lock = files::lock(&self.inner.directory)?;
        let peer = self.find(wanted)?;
        self.store_at(peer, address)
    }

    /// Writes a peer that answers at an address. The caller holds the lock of the identity.
    pub(crate) fn store_at(&self, mut peer: Peer, address: &str) -> Result<Peer, TrustError> {
        for mut other in self.peers()? {
            if other.id != peer.id && other.addresses.iter().any(|known| known == address) {
                other.addresses.retain(|known| known != address);
                self.store(&other)?;
            }
        }
        peer.answers_at(address);
        self.store(&peer)?;
        Ok(peer)
    }

    /// Another key and certificate for this host; connections that stand go on.
    pub fn rotate(&self) -> Result<SystemTime, TrustError> {
        self.inner.identity.rotate()
    }

    /// Shows a token for one pairing; the one before is void.
    pub fn show_token(&self, life: Duration) -> Result<Token, TrustError> {
        if life.is_zero() || life > TOKEN_LIFE_MAX {
            let most = TOKEN_LIFE_MAX.as_secs();
            return Err(TrustError::Refused(format!("a token is good for 1 s to {most} s")));
        }
        let _lock = files::lock(&self.inner.directory)?;
        self.inner.pairing.show(&self.held()?.id, life)
    }

    /// What is worth an operator's attention: certificates that end soon, a log that cannot be written.
    pub fn notices(&self) -> Vec<String> {
        let mut notices: Vec<String> =
            self.inner.audit.trouble().map(|why| format!("nothing is audited: {why}")).into_iter().collect();
        notices.extend(self.inner.identity.open_to_others().into_iter().map(|path| {
            format!(
                "{} is open to others than root, who can then connect as this host: `chmod go= {0}`",
                path.display()
            )
        }));
        let (now, remedy) = (SystemTime::now(), "another one means pairing anew (docs/security.md, runbooks)");
        let days = |until: SystemTime| until.duration_since(now).unwrap_or_default().as_secs() / (24 * 3600);
        match self.good_until() {
            Ok((leaf, ca)) => {
                if leaf < now + WARN_LEAF {
                    let left = days(leaf);
                    notices.push(format!(
                        "this host's certificate ends in {left} days and was not renewed: `vmdr peers rotate`"
                    ));
                }
                if ca < now + WARN_CA {
                    notices.push(format!("this host's authority ends in {} days: {remedy}", days(ca)));
                }
            }
            Err(error) => notices.push(error.to_string()),
        }
        match self.peers() {
            Ok(peers) => {
                for peer in peers.iter().filter(|peer| peer.revoked_unix.is_none()) {
                    match peer.good_until() {
                        Ok(until) if until < now + WARN_CA => {
                            notices.push(format!(
                                "the authority of peer {} ends in {} days: {remedy}",
                                peer.shown(),
                                days(until)
                            ));
                        }
                        Ok(_) => {}
                        Err(error) => notices.push(format!("peer {}: {error}", peer.shown())),
                    }
                }
            }
            Err(error) => notices.push(error.to_string()),
        }
        notices
    }

    /// Ends connections of peers that are revoked, and renews the certificate in time. For ever.
    pub async fn watch(self) {
        let mut renewed: Option<tokio::time::Instant> = None;
        loop {
            let trust = self.clone();
            let look = renewed.is_none_or(|at| at.elapsed() >= RENEW_LOOK);
            // One that panicked has said so.
            let _ = tokio::task::spawn_blocking(move || {
                trust.end_untrusted();
                if look {
                    trust.renew();
                }
            })
            .await;
            if look {
                renewed = Some(tokio::time::Instant::now());
            }
            tokio::time::sleep(WATCH).await;
        }
    }

    fn renew(&self) {
        let renewed = self.inner.identity.is_due().and_then(|due| if due { self.rotate().map(Some) } else { Ok(None) });
        match renewed {
            Ok(None) => {}
            Ok(Some(_)) => {
                self.inner.audit.record(Entry::new("renew", "this daemon", "this host's certificate", Outcome::Done))
            }
            Err(error) => tracing::error!("renew this host's certificate: {error}"),
        }
        for notice in self.notices() {
            tracing::warn!("{notice}");
        }
    }

    fn end_untrusted(&self) {
        if self.inner.connections.standing().is_empty() {
            return;
        }
        let peers = match self.peers() {
            Ok(peers) => peers,
            Err(error) => return tracing::error!("whom this host trusts: {error}"),
        };
        let trusted = |id: &str| peers.iter().any(|peer| peer.id == id && peer.revoked_unix.is_none());
        for (id, token) in self.inner.connections.standing().values() {
            if !trusted(id) && !token.is_cancelled() {
                tracing::warn!(peer = %id, "a connection is ended: its peer is no longer trusted");
                token.cancel();
            }
        }
    }

    pub(crate) fn held(&self) -> Result<Held, TrustError> {
        self.inner.identity.load()
    }

    pub(crate) fn registered(&self) -> &Arc<Connections> {
        &self.inner.connections
    }

    pub(crate) fn pairing(&self) -> &Pairing {
        &self.inner.pairing
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// Writes a peer, new or changed.
    pub(crate) fn store(&self, peer: &Peer) -> Result<(), TrustError> {
        self.inner.peers.store(peer)
    }

    /// TLS over a connection that this host has made to `address`, with whoever must be there.
    pub async fn connect<S>(&self, stream: S, address: &str) -> io::Result<PeerStream<TlsStream<S>>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (trust, at) = (self.clone(), address.to_owned());
        let prepared = blocking(move || {
            let peers = trust.peers()?;
            let peer = expected(&peers, &at)?;
            let (config, found) = tls::client(&trust.held()?, Expect::Peer(peer.clone(), peers), tls::ALPN_LINK)?;
            Ok((config, found, peer))
        })
        .await?;
        let (config, found, peer) = prepared;
        let stream = match handshake(config, found, stream).await {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() == io::ErrorKind::PermissionDenied {
                    let entry = Entry::new("connect to", "this daemon", address, Outcome::Refused);
                    let (audit, entry) = (self.audit().clone(), entry.because(error.to_string()));
                    tokio::task::spawn_blocking(move || audit.refused(entry));
                }
                return Err(error);
            }
        };
        if !peer.addresses.iter().any(|known| known == address) {
            let (trust, wanted, at) = (self.clone(), peer.id.clone(), address.to_owned());
            blocking(move || trust.locate(&wanted, &at)).await?;
        }
        let standing = self.registered().add(&peer.id, usize::MAX);
        let standing = standing.ok_or_else(|| io::Error::other("too many connections"))?;
        let token = standing.token.clone();
        Ok(PeerStream::new(stream, PeerInfo::of(&peer, None), token, standing))
    }
}

/// Who must answer at an address: the peer that is known to; the only one there is where none is. With several it has to be
/// said: one that can get between must not be given what is another's.
fn expected(peers: &[Peer], address: &str) -> Result<Peer, TrustError> {
    let trusted: Vec<&Peer> = peers.iter().filter(|peer| peer.revoked_unix.is_none()).collect();
    let answers = |peer: &&&Peer| peer.addresses.iter().any(|known| known == address);
    let known = trusted.iter().find(answers);
    let revoked: Vec<&Peer> = peers.iter().filter(|peer| peer.revoked_unix.is_some()).collect();
    match (known, trusted.as_slice()) {
        (Some(peer), _) => Ok((*peer).clone()),
        // Not whoever is left, and may have taken that address.
        (None, [_, ..]) if let Some(peer) = revoked.iter().find(answers) => Err(TrustError::Refused(format!(
            "{address} is where {} answered, which is revoked: `vmdr peers at PEER {address}` says who answers there now",
            peer.shown()
        ))),
        (None, [peer]) => Ok((*peer).clone()),
        (None, []) => Err(TrustError::Refused("this host is paired with no other: `vmdr pair`".to_owned())),
        (None, several) => {
            let names: Vec<String> = several.iter().map(|peer| peer.shown()).collect();
            let names = names.join(", ");
            Err(TrustError::Refused(format!(
                "which of the paired hosts answers at {address} is not known: `vmdr peers at PEER {address}` says so ({names})"
            )))
        }
    }
}

/// The client's handshake; gives the stream and the other end's authority.
pub(crate) async fn handshake<S>(
    config: Arc<rustls::ClientConfig>,
    found: Found,
    stream: S,
) -> io::Result<(TlsStream<S>, rustls::pki_types::CertificateDer<'static>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = server_name().map_err(io::Error::other)?;
    let shaken = tokio::time::timeout(HANDSHAKE_TIME_MAX, TlsConnector::from(config).connect(name, stream)).await;
    let shaken = shaken.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))?;
    match (shaken, found.take()) {
        (Ok(stream), Some(Ok(ca))) => Ok((stream, ca)),
        (_, Some(Err(why))) => Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("not trusted: {why}"))),
        (Err(error), _) => Err(io::Error::new(error.kind(), format!("no TLS there: {error}"))),
        (Ok(_), None) => Err(io::Error::other("the other end showed no certificate")),
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TrustError> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?.map_err(io::Error::other)
}

/// Makes two hosts peers of each other whose directories are both at hand: by configuration management, in tests. Each is then
/// known to answer at the addresses given.
pub fn introduce(a: (&Path, &str, &[String]), b: (&Path, &str, &[String])) -> Result<(), TrustError> {
    for ((directory, _, _), (other, name, addresses)) in [(a, b), (b, a)] {
        Identity::open(directory)?;
        let mut peer = Peer::new(&Identity::open(other)?.load()?.ca, name);
        peer.addresses = addresses.to_vec();
        let _lock = files::lock(directory)?;
        Peers::open(directory)?.store(&peer)?;
    }
    Ok(())
}

/// For messages: an address without its port, the same for all connections of a host.
pub(crate) fn host_of(address: SocketAddr) -> String {
    format!("host {}", address.ip().to_canonical())
}
