//! The hosts this one trusts: a file each.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{TrustError, files};

/// Peers on file, revoked ones included.
const PEERS_MAX: usize = 256;
/// Addresses remembered of a peer; the oldest goes.
const ADDRESSES_MAX: usize = 16;
/// Characters of a name.
const NAME_CHARS_MAX: usize = 64;
/// Characters of an id that are shown.
pub(crate) const SHORT_CHARS: usize = 12;

/// The id of the host whose authority this is: its SHA-256, in hexadecimal.
pub fn fingerprint(ca: &CertificateDer<'_>) -> String {
    Sha256::digest(ca.as_ref()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From when and until when a certificate is good.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), TrustError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate.as_ref())
        .map_err(|error| TrustError::Certificate(error.to_string()))?;
    let at = |time: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
    };
    Ok((at(parsed.validity().not_before), at(parsed.validity().not_after)))
}

/// Until when a certificate is good.
pub(crate) fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, TrustError> {
    Ok(validity(certificate)?.1)
}

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// SHA-256 of its authority.
    pub id: String,
    /// As it called itself when it was paired.
    pub name: String,
    /// Its authority, DER in hexadecimal.
    ca: String,
    /// When it was paired.
    pub paired_unix: u64,
    /// When it was revoked; none: it is trusted.
    pub revoked_unix: Option<u64>,
    /// Where it has answered, or was paired.
    pub addresses: Vec<String>,
}

impl Peer {
    /// One that is paired now.
    pub fn new(ca: &CertificateDer<'_>, name: &str) -> Self {
        let clean = |c: char| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '-' };
        let name: String = name.chars().take(NAME_CHARS_MAX).map(clean).collect();
        let id = fingerprint(ca);
        Self {
            name: if name.is_empty() { id.chars().take(SHORT_CHARS).collect() } else { name },
            id,
            ca: data_encoding::HEXLOWER.encode(ca.as_ref()),
            paired_unix: unix(SystemTime::now()),
            revoked_unix: None,
            addresses: Vec::new(),
        }
    }

    /// Its authority.
    pub fn authority(&self) -> Result<CertificateDer<'static>, TrustError> {
        let der = data_encoding::HEXLOWER.decode(self.ca.as_bytes());
        let ca = CertificateDer::from(der.map_err(|error| TrustError::Certificate(error.to_string()))?);
        if fingerprint(&ca) != self.id {
            return Err(TrustError::Certificate(format!("the authority on file of {} is another one", self.name)));
        }
        Ok(ca)
    }

    /// Until when that is good.
    pub fn good_until(&self) -> Result<SystemTime, TrustError> {
        not_after(&self.authority()?)
    }

    /// Name and the first of the id, for people.
    pub fn shown(&self) -> String {
        format!("{} ({})", self.name, self.short())
    }

    /// The first of the id.
    pub fn short(&self) -> &str {
        self.id.get(..SHORT_CHARS).unwrap_or(&self.id)
    }

    /// Remembers that it answers there.
    pub fn answers_at(&mut self, address: &str) {
        self.addresses.retain(|known| known != address);
        self.addresses.push(address.to_owned());
        if self.addresses.len() > ADDRESSES_MAX {
            self.addresses.remove(0);
        }
    }
}

/// The peers of a host.
#[derive(Debug, Clone)]
pub struct Peers {
    directory: PathBuf,
}

impl Peers {
    /// In the directory of an identity.
    pub fn open(identity: &Path) -> Result<Self, TrustError> {
        let directory = identity.join("peers");
        files::make_directory(&directory)?;
        Ok(Self { directory })
    }

    /// All of them, by name. One whose file is damaged is left out and said so: it is not trusted.
    pub fn load(&self) -> Result<Vec<Peer>, TrustError> {
        let mut peers = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(TrustError::io("list", &self.directory))? {
            let path = entry.map_err(TrustError::io("list", &self.directory))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let Some(bytes) = files::read(&path)? else { continue };
            match serde_json::from_slice::<Peer>(&bytes) {
                Ok(peer) => peers.push(peer),
                Err(error) => {
                    tracing::error!("{}: {error}: this peer is not trusted, pair it anew", path.display());
                }
            }
        }
        peers.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Ok(peers)
    }

    /// The one of this name, or whose id begins so.
    pub fn find(&self, wanted: &str) -> Result<Peer, TrustError> {
        let prefix = wanted.len() >= 6;
        let matches = |peer: &Peer| peer.name == wanted || (prefix && peer.id.starts_with(wanted));
        let mut found: Vec<Peer> = self.load()?.into_iter().filter(matches).collect();
        if found.len() > 1 {
            let ids: Vec<&str> = found.iter().map(Peer::short).collect();
            let message = format!("several peers are {wanted:?}: give one of the ids {}", ids.join(", "));
            return Err(TrustError::NoPeer(message));
        }
        let none = || TrustError::NoPeer(format!("no peer is {wanted:?}; `vmdr peers` lists them"));
        found.pop().ok_or_else(none)
    }

    /// Writes one, new or changed, durably. The caller holds the lock of the identity.
    pub(crate) fn store(&self, peer: &Peer) -> Result<(), TrustError> {
        let path = self.directory.join(format!("{}.json", peer.id));
        if !path.exists() && self.load()?.len() >= PEERS_MAX {
            let message = format!(
                "{PEERS_MAX} peers are on file, revoked ones included: remove files of {}",
                self.directory.display()
            );
            return Err(TrustError::Refused(message));
        }
        let bytes = serde_json::to_vec_pretty(peer).map_err(|error| TrustError::Certificate(error.to_string()))?;
        files::replace(&path, &bytes)
    }
}

/// Seconds since 1970.
pub(crate) fn unix(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
