//! This host's own authority and certificate.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::OffsetDateTime;

use crate::peers::{fingerprint, validity};
use crate::verify::{Side, signed};
use crate::{TrustError, files, tls};

/// How long an authority is good.
const CA_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// How long a certificate is good. The daemons make another one in time.
pub const LEAF_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// How long before its end a certificate is renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Certificates are good a little before they are made: clocks of two hosts differ.
const SKEW: Duration = Duration::from_secs(24 * 3600);
/// In every certificate; who it is of is known by who signed it.
pub(crate) const SERVER_NAME: &str = "vmdr.internal";

const CA_FILE: &str = "ca.pem";
const LEAF_FILE: &str = "host.pem";

/// This host's authority and certificate as files. Clones are the same.
#[derive(Debug, Clone)]
pub struct Identity {
    directory: PathBuf,
}

/// What a connection shows: read anew for each, so that a renewed one is used at once.
pub(crate) struct Held {
    /// This host, as its peers know it.
    pub id: String,
    /// The authority.
    pub ca: CertificateDer<'static>,
    /// The certificate.
    pub leaf: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Held {
    /// Certificates as they are shown, the host's first.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.leaf.clone(), self.ca.clone()]
    }

    pub fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Identity {
    /// Opens the directory; what is not there is made.
    pub fn open(directory: &Path) -> Result<Self, TrustError> {
        files::make_directory(directory)?;
        let identity = Self { directory: directory.to_owned() };
        let _lock = files::lock(directory)?;
        if files::read(&identity.ca_path())?.is_none() {
            identity.make_ca()?;
        }
        // It can always be made again; the authority cannot, because peers know it.
        let good = match files::read(&identity.leaf_path())? {
            Some(_) => identity.load().and_then(|held| check(&held.ca, &held.leaf)),
            None => Err(TrustError::Certificate("there is none yet".to_owned())),
        };
        if let Err(error) = good {
            tracing::info!("this host's certificate is made: {error}");
            identity.make_leaf(SystemTime::now() - SKEW, SystemTime::now() + LEAF_LIFE)?;
        }
        identity.load()?;
        Ok(identity)
    }

    /// Makes another key and certificate, which the next connections show.
    pub fn rotate(&self) -> Result<SystemTime, TrustError> {
        let until = SystemTime::now() + LEAF_LIFE;
        self.issue(SystemTime::now() - SKEW, until)?;
        Ok(until)
    }

    /// The same with another time in which it is good.
    pub fn issue(&self, from: SystemTime, until: SystemTime) -> Result<(), TrustError> {
        let _lock = files::lock(&self.directory)?;
        self.make_leaf(from, until)
    }

    /// Whether the certificate is to be renewed: it ends soon, or it was made while the clock was wrong.
    pub(crate) fn is_due(&self) -> Result<bool, TrustError> {
        let ((from, until), now) = (validity(&self.load()?.leaf)?, SystemTime::now());
        Ok(until < now + RENEW_BEFORE || from > now)
    }

    /// Files with keys in them that others than their owner may read.
    pub(crate) fn open_to_others(&self) -> Vec<PathBuf> {
        let files = [self.directory.clone(), self.ca_path(), self.leaf_path()];
        files.into_iter().filter(|path| files::is_open_to_others(path)).collect()
    }

    /// What is there now.
    pub(crate) fn load(&self) -> Result<Held, TrustError> {
        let (ca, _) = self.pair(&self.ca_path())?;
        let (leaf, key) = self.pair(&self.leaf_path())?;
        Ok(Held { id: fingerprint(&ca), ca, leaf, key })
    }

    fn ca_path(&self) -> PathBuf {
        self.directory.join(CA_FILE)
    }

    fn leaf_path(&self) -> PathBuf {
        self.directory.join(LEAF_FILE)
    }

    /// A certificate and its key, which are one file so that they are replaced together.
    fn pair(&self, path: &Path) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TrustError> {
        let damaged = |what: String| {
            let what =
                format!("{what}; without it this host has to be paired anew: move {} away", self.directory.display());
            TrustError::Damaged { path: path.to_owned(), what }
        };
        let bytes = files::read(path)?.ok_or_else(|| damaged("it is not there".to_owned()))?;
        let certificate = CertificateDer::from_pem_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        Ok((certificate, key))
    }

    fn make_ca(&self) -> Result<(), TrustError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&format!("vmdr authority of {}", host_name()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = moment(SystemTime::now() - SKEW);
        params.not_after = moment(SystemTime::now() + CA_LIFE);
        let certificate = params.self_signed(&key)?;
        files::replace(&self.ca_path(), format!("{}{}", certificate.pem(), key.serialize_pem()).as_bytes())
    }

    fn make_leaf(&self, from: SystemTime, until: SystemTime) -> Result<(), TrustError> {
        let (ca, ca_key) = self.pair(&self.ca_path())?;
        let ca_key = KeyPair::try_from(ca_key.secret_der())?;
        let issuer = Issuer::from_ca_cert_der(&ca, ca_key)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
        params.distinguished_name = named(&format!("vmdr on {}", host_name()));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = moment(from);
        params.not_after = moment(until);
        let certificate = params.signed_by(&key, &issuer)?;
        check(&ca, certificate.der()).map_err(|error| TrustError::Damaged {
            path: self.ca_path(),
            what: format!(
                "its key is not that of its certificate ({error}): restore it, or move the directory away and pair anew"
            ),
        })?;
        files::replace(&self.leaf_path(), format!("{}{}", certificate.pem(), key.serialize_pem()).as_bytes())
    }
}

/// Whether this host's peers would take a certificate in the time that it is made for.
fn check(ca: &CertificateDer<'static>, leaf: &CertificateDer<'_>) -> Result<(), TrustError> {
    let at = validity(leaf)?.0.duration_since(UNIX_EPOCH).unwrap_or_default();
    for side in [Side::Client, Side::Server] {
        signed(leaf, ca, UnixTime::since_unix_epoch(at), side, &tls::provider())?;
    }
    Ok(())
}

/// This host's name.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}

fn moment(at: SystemTime) -> OffsetDateTime {
    at.into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn a_certificate_is_renewed_when_it_ends_and_when_the_clock_was_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let identity = Identity::open(&directory.path().join("identity")).unwrap();
        let now = SystemTime::now();
        for (from, until, due) in [
            (now - DAY, now + LEAF_LIFE, false),
            (now - DAY, now + RENEW_BEFORE - DAY, true),
            (now - 3 * DAY, now - DAY, true),
            (now + DAY, now + LEAF_LIFE, true),
        ] {
            identity.issue(from, until).unwrap();
            assert_eq!(identity.is_due().unwrap(), due, "{from:?} {until:?}");
        }
        identity.rotate().unwrap();
        assert!(!identity.is_due().unwrap());
    }

    #[test]
    fn a_certificate_of_another_authority_is_made_anew_and_an_authority_with_another_key_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (directory.path().join("one"), directory.path().join("other"));
        let identity = Identity::open(&one).unwrap();
        let id = identity.load().unwrap().id;
        Identity::open(&other).unwrap();
        // Only the authority was restored.
        fs::copy(other.join(LEAF_FILE), one.join(LEAF_FILE)).unwrap();
        let held = Identity::open(&one).unwrap().load().unwrap();
        assert_eq!(held.id, id);
        check(&held.ca, &held.leaf).unwrap();
        // Its certificate with the key of another one: nothing is signed that no peer would take.
        let [own, strange] = [&one, &other].map(|of| fs::read_to_string(of.join(CA_FILE)).unwrap());
        let cut = |pem: &str| pem.find("-----BEGIN PRIVATE KEY").unwrap();
        let mixed = format!("{}{}", &own[..cut(&own)], &strange[cut(&strange)..]);
        fs::write(one.join(CA_FILE), mixed).unwrap();
        let error = identity.rotate().unwrap_err().to_string();
        assert!(error.contains("its key is not that of its certificate"), "{error}");
        assert_eq!(identity.load().unwrap().leaf, held.leaf, "the one before is kept");
        fs::write(one.join(CA_FILE), "nothing").unwrap();
        let error = Identity::open(&one).unwrap_err().to_string();
        assert!(error.contains("ca.pem") && error.contains("paired anew"), "{error}");
    }

    #[test]
    fn keys_that_others_may_read_are_noticed() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("above/identity");
        let identity = Identity::open(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join(CA_FILE)), mode(&path.join(LEAF_FILE))), (0o700, 0o600, 0o600));
        // QEMU has to get through to what lies beside it.
        assert_ne!(mode(path.parent().unwrap()) & 0o011, 0);
        assert_eq!(identity.open_to_others(), Vec::<PathBuf>::new());
        fs::set_permissions(path.join(CA_FILE), fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(identity.open_to_others(), [path.join(CA_FILE)]);
    }
}
