//! Who this host is, which other hosts it trusts, and the encrypted links between them.
//!
//! **Every host has a certificate authority of its own** and nobody else's: it signs nothing but the certificate that this
//! host's daemons show, as client and as server. Two hosts trust each other when each has the other's authority on file, which
//! is what pairing does ([`pair`]). So there is no key whose loss gives away more than one host, and no certificate that has to
//! be fetched from anybody: a host renews its own while the link is down, and revoking a peer is forgetting its authority.
//!
//! What it guarantees:
//!
//! - Links are TLS 1.3 with certificates on both sides; there is no other mode. A session is never resumed, so that every
//!   connection is checked against the peers as they are on the disk at that moment.
//! - A host that sends to an address knows who must answer there: the peer it was paired with at that address, or the first peer
//!   that answered. Another one, although paired, is refused: no peer can stand in for another.
//! - Connections of a peer that is revoked end within [`WATCH`], in both directions and in both daemons of the host.
//! - Keys and records are files of mode 0600, replaced whole and durably. The two daemons of a host share them.
//!
//! **The crypto provider is ring.** It needs a C compiler and nothing else to build, on the platforms meant here it is
//! hand-written assembler with AES-NI, and rustls ships it. aws-lc-rs would bring a FIPS mode and post-quantum key exchange for a
//! larger build; the choice is one function, [`tls::provider`].

mod accept;
mod files;
mod identity;
pub mod pair;
mod partners;
mod peers;
mod stream;
pub mod tls;
mod token;
mod trust;
mod verify;

pub use accept::{CONNECTIONS_MAX, CONNECTIONS_PER_PEER_MAX, HANDSHAKE_TIME_MAX, HANDSHAKES_MAX, incoming};
pub use identity::{Identity, LEAF_LIFE};
pub use partners::Partner;
pub use peers::{Peer, Peers, fingerprint};
pub use stream::{PeerInfo, PeerStream};
pub use token::{TOKEN_LIFE, TOKEN_LIFE_MAX, Token};
pub use trust::{Trust, WATCH, introduce};

use std::io;
use std::path::{Path, PathBuf};

/// Where a host's identity and peers are, unless configured otherwise; both daemons use the same.
pub const DIRECTORY: &str = "/var/lib/vmdr/identity";

/// What went wrong, for an operator.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// A verb.
        action: &'static str,
        /// Of what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {what}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A certificate could not be made or read.
    #[error("certificate: {0}")]
    Certificate(String),
    /// No peer of this name, or several.
    #[error("{0}")]
    NoPeer(String),
    /// Not as things stand.
    #[error("{0}")]
    Refused(String),
}

impl TrustError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TrustError {
        let path = path.to_owned();
        move |source| TrustError::Io { action, path, source }
    }
}

impl From<rcgen::Error> for TrustError {
    fn from(error: rcgen::Error) -> Self {
        Self::Certificate(error.to_string())
    }
}

impl From<rustls::Error> for TrustError {
    fn from(error: rustls::Error) -> Self {
        Self::Certificate(error.to_string())
    }
}
