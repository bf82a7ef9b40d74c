//! Encryption at rest: which domains are encrypted, and under which key.
//!
//! A domain with a file `key` is encrypted: everything that the store writes in its directory goes through a
//! [`SealedDisk`]. The file has the domain's data key, wrapped under the operator's master key, in the form that object
//! storage has it in too. Another master key therefore means writing these 128 bytes anew, aside and renamed.
//!
//! A domain is encrypted from its beginning or not at all. With a key configured, nothing more is taken for one that is not:
//! a setting must not claim what is not so.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;
use vmdr_journal::{CONTROL_FILE, Disk, JournalError, Mode, write_all};
use vmdr_keys::{DataKey, KEY_RECORD_BYTES, KeyError, MasterKey, key_record, wrapped_key};
use vmdr_sealed::SealedDisk;

use super::StoreError;

/// The file with a domain's data key.
pub const KEY_FILE: &str = "key";
/// The next one, being prepared; of no meaning.
const KEY_FILE_NEW: &str = "key.new";
/// What a control record begins with that is not encrypted.
const CONTROL_MAGIC: &[u8; 8] = b"VMDRCTL\0";

/// The operator's keys for a state directory.
#[derive(Debug, Clone, Default)]
pub struct Keyring {
    wanted: bool,
    keys: Vec<MasterKey>,
    trouble: Option<String>,
}

impl PartialEq for Keyring {
    fn eq(&self, other: &Self) -> bool {
        let ids = |ring: &Self| ring.keys.iter().map(MasterKey::id).collect::<Vec<_>>();
        (self.wanted, &self.trouble, ids(self)) == (other.wanted, &other.trouble, ids(other))
    }
}

impl Eq for Keyring {}

impl Keyring {
    /// The key that new domains are encrypted under, and older ones that some may still be under.
    pub fn new(key: MasterKey, old: Vec<MasterKey>) -> Self {
        let mut keys = vec![key];
        keys.extend(old);
        Self { wanted: true, keys, trouble: None }
    }

    /// Keys are configured and cannot be had, because of `trouble`: what is encrypted cannot be used, and nothing is begun.
    pub fn unusable(trouble: String) -> Self {
        Self { wanted: true, keys: Vec::new(), trouble: Some(trouble) }
    }
}

/// The disk that a domain is on.
#[derive(Debug)]
pub(super) struct Place {
    pub disk: Arc<dyn Disk>,
    /// It is encrypted.
    pub sealed: bool,
    /// Why nothing more is taken for it.
    pub refused: Option<String>,
}

/// The disk for the domain in `dir`; `new`: it may be begun.
pub(super) fn place(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    uuid: Uuid,
    ring: &Keyring,
    new: bool,
) -> Result<Place, StoreError> {
    let sealed_off = |what: String| StoreError::Sealed { domain: uuid.to_string(), what };
    let failed = |action: &'static str, at: &Path, error: io::Error| {
        StoreError::of(&uuid.to_string(), JournalError::io(action, at)(error))
    };
    let path = dir.join(KEY_FILE);
    let plain = |refused| Ok(Place { disk: disk.clone(), sealed: false, refused });
    let sealed = |key: &DataKey| {
        let disk = Arc::new(SealedDisk::new(disk.clone(), key.blocks(uuid.as_bytes())));
        Ok(Place { disk, sealed: true, refused: None })
    };
    if let Some(record) = read(&**disk, &path).map_err(|e| failed("read", &path, e))? {
        if let Some(trouble) = ring.trouble.as_ref() {
            return Err(sealed_off(format!("it is encrypted, and its key cannot be had: {trouble}")));
        }
        let wrapped = wrapped_key(&record, uuid.as_bytes()).map_err(|fault| {
            sealed_off(format!("{}: {fault}; bring it back from a copy, nothing else opens the domain", path.display()))
        })?;
        let (key, under) = DataKey::unwrap(wrapped, &ring.keys, uuid.as_bytes()).map_err(|error| {
            sealed_off(match error {
                KeyError::WrongKey { .. } if !ring.wanted => {
                    "it is encrypted and no key is configured: name it as key_file in [encryption]".to_owned()
                }
                error => format!("{}: {error}", path.display()),
            })
        })?;
        if let Some(first) = ring.keys.first().filter(|first| first.id() != under) {
            // As good as it was if it fails: it is tried again at the next start.
            match write(disk, dir, uuid, &key, first) {
                Ok(()) => {
                    tracing::info!(domain = %uuid, from = %under, to = %first.id(), "the data key is wrapped anew")
                }
                Err(error) => tracing::error!(domain = %uuid, %error, "the data key is not wrapped anew yet"),
            }
        } else if ring.keys.len() > 1 {
            // It may have been wrapped anew by somebody who was ended before that was durable.
            let synced = disk.open(&path, Mode::Write).and_then(|file| file.sync()).and_then(|()| disk.sync_dir(dir));
            synced.map_err(|error| failed("sync", &path, error))?;
            tracing::info!(domain = %uuid, key = %under, "the data key is wrapped under the first key");
        }
        return sealed(&key);
    }
    if !ring.wanted {
        return plain(None);
    }
    match beginning(&**disk, dir).map_err(|e| failed("read", &dir.join(CONTROL_FILE), e))? {
        Beginning::Plain => plain(Some(
            "it is stored in the clear, and a key is configured: `vmdr forget` it and protect it anew, or take [encryption] \
             out; what is stored can be activated meanwhile"
                .to_owned(),
        )),
        Beginning::Other => {
            let what = "is missing, and what is stored of the domain does not open without it: bring it back from a copy";
            Err(sealed_off(format!("{} {what}", path.display())))
        }
        Beginning::Nothing if !new => plain(None),
        Beginning::Nothing => {
            if let Some(trouble) = ring.trouble.as_ref() {
                return Err(sealed_off(format!("it is to be encrypted, and the key cannot be had: {trouble}")));
            }
            let key = DataKey::generate().map_err(|error| sealed_off(error.to_string()))?;
            let Some(master) = ring.keys.first() else { return Err(sealed_off("there is no key".to_owned())) };
            begin(disk, dir).map_err(|e| failed("create", dir, e))?;
            write(disk, dir, uuid, &key, master).map_err(|e| failed("write", &path, e))?;
            sealed(&key)
        }
    }
}

enum Beginning {
    Nothing,
    Plain,
    Other,
}

/// What there is in a directory without a key.
fn beginning(disk: &dyn Disk, dir: &Path) -> io::Result<Beginning> {
    let names = match disk.list(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Beginning::Nothing),
        other => other?,
    };
    if names.iter().any(|name| name == CONTROL_FILE) {
        let mut magic = [0; CONTROL_MAGIC.len()];
        disk.open(&dir.join(CONTROL_FILE), Mode::Read)?.read_at(&mut magic, 0)?;
        return Ok(if &magic == CONTROL_MAGIC { Beginning::Plain } else { Beginning::Other });
    }
    let there = names.iter().any(|name| name.starts_with("standby.") || name == "journal");
    Ok(if there { Beginning::Other } else { Beginning::Nothing })
}

fn begin(disk: &Arc<dyn Disk>, dir: &Path) -> io::Result<()> {
    disk.create_dir_all(dir)?;
    dir.parent().map_or(Ok(()), |parent| disk.sync_dir(parent))
}

fn read(disk: &dyn Disk, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, Mode::Read) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut bytes = vec![0; KEY_RECORD_BYTES + 1];
    let got = file.read_at(&mut bytes, 0)?;
    bytes.truncate(got);
    Ok(Some(bytes))
}

/// Writes the key record aside and renames it, durably.
fn write(disk: &Arc<dyn Disk>, dir: &Path, uuid: Uuid, key: &DataKey, master: &MasterKey) -> io::Result<()> {
    let wrapped = key.wrap(master, uuid.as_bytes()).map_err(io::Error::other)?;
    let (new, path) = (dir.join(KEY_FILE_NEW), dir.join(KEY_FILE));
    let file = disk.open(&new, Mode::Create)?;
    write_all(&*file, &key_record(uuid.as_bytes(), &wrapped), 0)?;
    file.sync()?;
    disk.rename(&new, &path)?;
    disk.sync_dir(dir)
}

/// The disk that reads the domain in `dir` offline, without changing anything; an error says what is missing, in words.
pub(super) fn place_to_read(disk: &Arc<dyn Disk>, dir: &Path, uuid: Uuid, keys: &[MasterKey]) -> Result<Place, String> {
    let path = dir.join(KEY_FILE);
    let record = read(&**disk, &path).map_err(|error| format!("{}: {error}", path.display()))?;
    let Some(record) = record else {
        return match beginning(&**disk, dir) {
            Ok(Beginning::Other) => Err(format!(
                "it has no control record that can be read: it is damaged, or encrypted and {} is missing",
                path.display()
            )),
            _ => Ok(Place { disk: disk.clone(), sealed: false, refused: None }),
        };
    };
    let wrapped = wrapped_key(&record, uuid.as_bytes()).map_err(|fault| format!("{}: {fault}", path.display()))?;
    let (key, _) = DataKey::unwrap(wrapped, keys, uuid.as_bytes()).map_err(|error| match error {
        KeyError::WrongKey { wanted, .. } if keys.is_empty() => {
            format!("it is encrypted, under the master key {wanted}: name that with --key-file")
        }
        error => format!("{}: {error}", path.display()),
    })?;
    let disk = Arc::new(SealedDisk::new(disk.clone(), key.blocks(uuid.as_bytes())));
    Ok(Place { disk, sealed: true, refused: None })
}
