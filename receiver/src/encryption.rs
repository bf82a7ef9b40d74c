//! `[encryption]`: the state directory's keys, and where a guest may be in the clear when it runs.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use vmdr_keys::{KeyError, MasterKey};

use crate::store::Keyring;

/// Old keys, at most.
pub const OLD_KEYS_MAX: usize = 16;

/// `[encryption]`: what is stored of domains that are protected from now on is encrypted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionConfig {
    /// The master key: 32 bytes or 64 hexadecimal digits, mode 0600.
    pub key_file: Option<PathBuf>,
    /// The same as a systemd credential of this name.
    pub key_credential: String,
    /// Keys that domains may still be encrypted under; each is wrapped anew under the key above when it is opened.
    pub old_key_files: Vec<PathBuf>,
    /// Where a guest that is activated or drilled lies decrypted, and what it writes: a directory on storage that is encrypted
    /// by other means. None: domains that are encrypted are neither activated nor drilled here.
    pub clear_dir: Option<PathBuf>,
}

/// The key in a file, or of a credential, and then older ones; none, if neither is named. Reads files.
pub fn read_keys(file: Option<&Path>, credential: &str, old: &[PathBuf]) -> Result<Vec<MasterKey>, KeyError> {
    let mut keys = Vec::new();
    match (file, credential) {
        (Some(path), _) => keys.push(MasterKey::read(path)?),
        (None, "") => {}
        (None, name) => keys.push(MasterKey::credential(name)?),
    }
    for path in old {
        keys.push(MasterKey::read(path)?);
    }
    Ok(keys)
}

impl EncryptionConfig {
    /// What is wrong with it, if anything. `state_dir`: what is to be encrypted.
    pub fn check(&self, state_dir: &Path) -> Result<(), String> {
        if self.key_file.is_some() && !self.key_credential.is_empty() {
            return Err("key_file and key_credential are given: one of them decides".to_owned());
        }
        if !self.is_on() && (!self.old_key_files.is_empty() || self.clear_dir.is_some()) {
            return Err("old_key_files or clear_dir without a key: name a key_file or a key_credential".to_owned());
        }
        if self.old_key_files.len() > OLD_KEYS_MAX {
            return Err(format!("more than {OLD_KEYS_MAX} old_key_files"));
        }
        for path in self.key_file.iter().chain(&self.old_key_files).chain(&self.clear_dir) {
            if !path.is_absolute() {
                return Err(format!("{} is not an absolute path", path.display()));
            }
        }
        if self.clear_dir.as_ref().is_some_and(|clear| clear.starts_with(state_dir)) {
            return Err("clear_dir is in state_dir: what is decrypted must not lie there".to_owned());
        }
        Ok(())
    }

    /// Whether anything is to be encrypted.
    pub fn is_on(&self) -> bool {
        self.key_file.is_some() || !self.key_credential.is_empty()
    }

    /// The keys. One that cannot be read is no error: the receiver starts, and says so for each domain that needs it.
    pub fn keyring(&self) -> Keyring {
        if !self.is_on() {
            return Keyring::default();
        }
        match read_keys(self.key_file.as_deref(), &self.key_credential, &self.old_key_files) {
            Ok(mut keys) if !keys.is_empty() => Keyring::new(keys.remove(0), keys),
            Ok(_) => Keyring::unusable("none is configured".to_owned()),
            Err(error) => {
                tracing::error!(%error, "what is encrypted in the state directory cannot be used");
                Keyring::unusable(error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_said() {
        let on = EncryptionConfig { key_file: Some("/k".into()), ..EncryptionConfig::default() };
        let state = Path::new("/var/lib/vmdr/receiver");
        on.check(state).unwrap();
        EncryptionConfig::default().check(state).unwrap();
        for (config, word) in [
            (EncryptionConfig { key_credential: "k".to_owned(), ..on.clone() }, "one of them"),
            (EncryptionConfig { key_file: Some("k".into()), ..on.clone() }, "absolute"),
            (EncryptionConfig { clear_dir: Some(state.join("clear")), ..on.clone() }, "in state_dir"),
            (EncryptionConfig { clear_dir: Some("/x".into()), ..EncryptionConfig::default() }, "without a key"),
            (EncryptionConfig { old_key_files: vec!["/o".into(); OLD_KEYS_MAX + 1], ..on }, "more than"),
        ] {
            let error = config.check(state).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_key_that_cannot_be_read_is_no_reason_not_to_start() {
        let config = EncryptionConfig { key_file: Some("/nonexistent/key".into()), ..EncryptionConfig::default() };
        assert_ne!(config.keyring(), Keyring::default());
        assert_eq!(EncryptionConfig::default().keyring(), Keyring::default());
    }
}
