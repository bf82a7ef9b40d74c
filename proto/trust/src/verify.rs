//! Which certificates are accepted, at either end.
//!
//! A host shows its own certificate and the authority that signed it. The authority says who it is: it must be, to the byte, that
//! of a peer on file. Then the certificate must be signed by it, be in its time and for its use, which rustls's own verifiers
//! check. Names in certificates mean nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};

use crate::identity::SERVER_NAME;
use crate::peers::{Peer, fingerprint, not_after};
use crate::token::Token;

/// Who may be at the other end.
#[derive(Debug, Clone)]
pub(crate) enum Expect {
    /// One of these peers.
    Peers(Vec<Peer>),
    /// This one and nobody else; by name if it is another one of these.
    Peer(Peer, Vec<Peer>),
    /// The host that showed this token.
    Shown(Token),
    /// Any host that has its own authority's key: it is to prove otherwise who it is.
    Anybody,
}

/// Who was found at the other end, or why that is nobody: for messages and the audit log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found(Arc<Mutex<Option<Result<CertificateDer<'static>, String>>>>);

impl Found {
    fn set(&self, found: Result<CertificateDer<'static>, String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }

    /// The authority, or a sentence; nothing before a certificate was shown.
    pub fn take(&self) -> Option<Result<CertificateDer<'static>, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[derive(Debug)]
pub(crate) struct Verifier {
    expect: Expect,
    provider: Arc<CryptoProvider>,
    found: Found,
}

/// Whether a certificate is signed by this authority, in its time and for its use.
pub(crate) fn signed(
    leaf: &CertificateDer<'_>,
    ca: &CertificateDer<'static>,
    now: UnixTime,
    side: Side,
    provider: &Arc<CryptoProvider>,
) -> Result<(), Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    let (roots, provider) = (Arc::new(roots), Arc::clone(provider));
    let general = |error: rustls::server::VerifierBuilderError| Error::General(error.to_string());
    match side {
        Side::Client => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().map_err(general)?;
            verifier.verify_client_cert(leaf, &[], now).map(|_| ())
        }
        Side::Server => {
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider).build().map_err(general)?;
            verifier.verify_server_cert(leaf, &[], &server_name()?, &[], now).map(|_| ())
        }
    }
}

/// What a certificate is shown as.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Server,
    Client,
}

impl Verifier {
    pub fn new(expect: Expect, provider: Arc<CryptoProvider>) -> (Arc<Self>, Found) {
        let found = Found::default();
        (Arc::new(Self { expect, provider, found: found.clone() }), found)
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
        side: Side,
    ) -> Result<(), Error> {
        let checked = self.check(leaf, others, now, side);
        match checked {
            Ok(ca) => {
                self.found.set(Ok(ca));
                Ok(())
            }
            Err((error, why)) => {
                self.found.set(Err(why));
                Err(Error::InvalidCertificate(error))
            }
        }
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
        side: Side,
    ) -> Result<CertificateDer<'static>, (CertificateError, String)> {
        let no = |error: CertificateError, why: String| Err((error, why));
        let [shown] = others else {
            return no(
                CertificateError::UnknownIssuer,
                "it does not show one certificate and its authority".to_owned(),
            );
        };
        let shown = shown.clone().into_owned();
        let id = fingerprint(&shown);
        let short: String = id.chars().take(crate::peers::SHORT_CHARS).collect();
        let who = match &self.expect {
            Expect::Peers(peers) | Expect::Peer(_, peers) => {
                let Some(peer) = peers.iter().find(|peer| peer.id == id) else {
                    return no(
                        CertificateError::UnknownIssuer,
                        format!("authority {short} is of no peer of this host"),
                    );
                };
                if peer.revoked_unix.is_some() {
                    return no(CertificateError::Revoked, format!("{} is revoked", peer.shown()));
                }
                if let Expect::Peer(only, _) = &self.expect
                    && only.id != id
                {
                    let why = format!("{} answers where {} is expected", peer.shown(), only.shown());
                    return no(CertificateError::ApplicationVerificationFailure, why);
                }
                peer.shown()
            }
            Expect::Shown(token) if !token.is_of(&id) => {
                return no(
                    CertificateError::UnknownIssuer,
                    format!("host {short} is not the one that showed the token"),
                );
            }
            Expect::Shown(_) | Expect::Anybody => format!("host {short}"),
        };
        let good = not_after(&shown).map_err(|error| (CertificateError::BadEncoding, error.to_string()))?;
        if good < UNIX_EPOCH + Duration::from_secs(now.as_secs()) {
            return no(CertificateError::Expired, format!("the authority of {who} has expired: pair it anew"));
        }
        match signed(leaf, &shown, now, side, &self.provider) {
            Ok(()) => Ok(shown),
            Err(Error::InvalidCertificate(error)) => {
                let why = format!("the certificate of {who}: {error}");
                no(error, why)
            }
            Err(error) => no(CertificateError::BadEncoding, format!("the certificate of {who}: {error}")),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The name in every certificate.
pub(crate) fn server_name() -> Result<ServerName<'static>, Error> {
    ServerName::try_from(SERVER_NAME).map_err(|error| Error::General(error.to_string()))
}

fn only_13() -> Error {
    Error::General("only TLS 1.3 is spoken".to_owned())
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hosts that are not paired need not learn who is.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, others, now, Side::Client).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, others, now, Side::Server).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}
