//! `[witness]` in the configuration of both daemons.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// Where the witness is, and how it is talked to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// URLs of etcd's members: `https://10.0.7.1:2379`; `http://` only where nobody else is on the network.
    pub endpoints: Vec<String>,
    /// Before all keys.
    pub prefix: String,
    /// Certificates of the authorities that etcd's certificate may be signed by, PEM. Needed with `https://`.
    pub ca_file: Option<PathBuf>,
    /// This host's certificate, PEM, where etcd asks for one.
    pub certificate_file: Option<PathBuf>,
    /// Its key, PEM.
    pub key_file: Option<PathBuf>,
    /// A user of etcd's, where it wants one.
    pub user: Option<String>,
    /// A file with the password, whose end of line does not count.
    pub password_file: Option<PathBuf>,
    /// How long an answer may take, in milliseconds.
    pub timeout_ms: u64,
    /// How long a lease lives after it was last renewed, in seconds.
    pub lease_seconds: u64,
}

/// What is possible for `lease_seconds`: stopping a guest in time takes some of it.
const LEASE_SECONDS: std::ops::RangeInclusive<u64> = 5..=600;

impl Default for Config {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            prefix: "/vmdr".to_owned(),
            ca_file: None,
            certificate_file: None,
            key_file: None,
            user: None,
            password_file: None,
            timeout_ms: 2000,
            lease_seconds: 15,
        }
    }
}

/// Settings that make no sense together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("[witness]: {0}")]
pub struct ConfigError(String);

/// What the files of TLS have.
pub(crate) struct TlsFiles {
    pub(crate) ca: Vec<u8>,
    pub(crate) own: Option<(Vec<u8>, Vec<u8>)>,
}

type FileError = (String, io::Error);

impl Config {
    /// Whether a witness is wished for at all.
    pub fn is_set(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// What of it makes no sense.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError(what));
        if !self.is_set() {
            let nothing = Self { endpoints: Vec::new(), ..Self::default() };
            return if *self == nothing { Ok(()) } else { wrong("endpoints are missing".to_owned()) };
        }
        for endpoint in &self.endpoints {
            if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
                return wrong(format!("endpoint {endpoint:?} begins with neither https:// nor http://"));
            }
        }
        let tls = self.endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
        if tls != 0 && tls != self.endpoints.len() {
            return wrong("either all endpoints are https:// or none".to_owned());
        }
        if (tls != 0) != self.ca_file.is_some() {
            return wrong("ca_file belongs to https:// endpoints, and they need it".to_owned());
        }
        if self.certificate_file.is_some() != self.key_file.is_some() {
            return wrong("certificate_file and key_file belong together".to_owned());
        }
        if self.certificate_file.is_some() && tls == 0 {
            return wrong("certificate_file needs https:// endpoints".to_owned());
        }
        if self.user.is_some() != self.password_file.is_some() {
            return wrong("user and password_file belong together".to_owned());
        }
        if self.prefix.trim_end_matches('/').is_empty() {
            return wrong("prefix is empty".to_owned());
        }
        if !LEASE_SECONDS.contains(&self.lease_seconds) {
            let (from, to) = (LEASE_SECONDS.start(), LEASE_SECONDS.end());
            return wrong(format!("lease_seconds = {}: it is from {from} to {to}", self.lease_seconds));
        }
        if !(100..=60_000).contains(&self.timeout_ms) {
            return wrong(format!("timeout_ms = {}: it is from 100 to 60000", self.timeout_ms));
        }
        Ok(())
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    pub(crate) fn user(&self) -> Result<Option<(String, String)>, FileError> {
        let (Some(user), Some(file)) = (&self.user, &self.password_file) else { return Ok(None) };
        let password = std::fs::read_to_string(file).map_err(|error| (file.display().to_string(), error))?;
        Ok(Some((user.clone(), password.trim_end_matches(['\r', '\n']).to_owned())))
    }

    pub(crate) fn tls_files(&self) -> Result<Option<TlsFiles>, FileError> {
        let Some(ca) = &self.ca_file else { return Ok(None) };
        let own = match (&self.certificate_file, &self.key_file) {
            (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
            _ => None,
        };
        Ok(Some(TlsFiles { ca: read(ca)?, own }))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(|error| (path.display().to_string(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        assert_eq!(Config::default().check(), Ok(()));
        let one = |endpoint: &str| Config { endpoints: vec![endpoint.to_owned()], ..Config::default() };
        let file = || Some(PathBuf::from("/x"));
        let tls = || Config { ca_file: file(), ..one("https://e:1") };
        assert_eq!(one("http://e:1").check(), Ok(()));
        assert_eq!(tls().check(), Ok(()));
        for (config, word) in [
            (Config { user: Some("u".to_owned()), ..Config::default() }, "endpoints"),
            (one("e:1"), "neither"),
            (Config { endpoints: vec!["http://e:1".to_owned(), "https://e:1".to_owned()], ..tls() }, "all endpoints"),
            (one("https://e:1"), "ca_file"),
            (Config { ca_file: file(), ..one("http://e:1") }, "ca_file"),
            (Config { certificate_file: file(), ..tls() }, "key_file"),
            (Config { certificate_file: file(), key_file: file(), ..one("http://e:1") }, "https"),
            (Config { user: Some("u".to_owned()), ..tls() }, "password_file"),
            (Config { prefix: "/".to_owned(), ..tls() }, "prefix"),
            (Config { timeout_ms: 5, ..tls() }, "timeout_ms"),
            (Config { lease_seconds: 4, ..tls() }, "lease_seconds"),
        ] {
            let what = config.check().unwrap_err().to_string();
            assert!(what.contains(word), "{what}");
        }
    }
}
