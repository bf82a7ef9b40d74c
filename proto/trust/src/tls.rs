//! TLS configurations: one for each connection, made of what is on the disk at that moment.

use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::TrustError;
use crate::identity::Held;
use crate::verify::{Expect, Found, Verifier};

/// What replication speaks inside.
pub(crate) const ALPN_LINK: &[u8] = b"h2";
/// What a pairing speaks inside.
pub(crate) const ALPN_PAIR: &[u8] = b"vmdr-pair/1";

/// The cryptography: ring's, TLS 1.3 only.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let mut provider = rustls::crypto::ring::default_provider();
        provider.cipher_suites.retain(|suite| suite.tls13().is_some());
        Arc::new(provider)
    };
    Arc::clone(PROVIDER.get_or_init(make))
}

pub(crate) fn server(held: &Held, expect: Expect, alpn: &[u8]) -> Result<(Arc<ServerConfig>, Found), TrustError> {
    let (verifier, found) = Verifier::new(expect, provider());
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(held.chain(), held.key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    // Nothing is resumed: a peer that was revoked meanwhile would be let in.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok((Arc::new(config), found))
}

pub(crate) fn client(held: &Held, expect: Expect, alpn: &[u8]) -> Result<(Arc<ClientConfig>, Found), TrustError> {
    let (verifier, found) = Verifier::new(expect, provider());
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = builder.with_client_auth_cert(held.chain(), held.key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok((Arc::new(config), found))
}
