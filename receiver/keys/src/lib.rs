//! Keys: where they come from, how data keys are kept, and how bytes are sealed with them. No buckets, no guests.
//!
//! Two levels. A *master key* is the operator's: 32 random bytes in a file or a systemd credential; it only ever wraps data
//! keys. A *data key* is made here, and all that is stored is sealed under keys derived from it. Another master key
//! therefore means wrapping 32 bytes anew and nothing else.
//!
//! - **Cipher**: AES-256-GCM of `ring`: constant time on every CPU, fast with AES-NI, under rustls and the S3 client
//!   already, so that nothing new has to be trusted. (`aws-lc-rs` is as good, and takes cmake and minutes to build;
//!   RustCrypto's `aes-gcm` is slower without the right target features.)
//! - **Nonces never repeat**, because no key is used for two messages: every object, and every wrapping, has a key of its
//!   own, derived from the data key, what the object is, and 128 fresh random bits (the *salt*) that are stored with it. Under
//!   that key nonces count from 0, one for each segment. Writing an object again takes another salt, so another key.
//! - **Derivation**: BLAKE3's key derivation, one context string for each purpose, every input with its length.
//! - **Objects cannot be exchanged**: what an object is (domain, kind, name) is in its key and in the associated data, with the
//!   segment's number and whether it is the last. Moved, cut, reordered or extended, it does not open.
//! - Secrets are wiped from memory when they are dropped and are not in any `Debug` output.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a key's identity.
pub const KEY_ID_BYTES: usize = 16;
/// Bytes of a salt.
pub const SALT_BYTES: usize = 16;
/// Bytes by which a sealed segment is longer than what is in it.
pub const TAG_BYTES: usize = 16;
/// Bytes of a wrapped data key: whose (16), which (16), salt (16), the sealed key.
pub const WRAPPED_BYTES: usize = 2 * KEY_ID_BYTES + SALT_BYTES + KEY_BYTES + TAG_BYTES;
/// The longest key file: hexadecimal with a line end, and one byte to notice a longer one.
const KEY_FILE_BYTES_MAX: usize = 2 * KEY_BYTES + 2;
/// Where systemd says that a service's credentials are.
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

const RECORD_MAGIC: &[u8; 8] = b"VMDRKEY\0";
const RECORD_VERSION: u32 = 1;
/// Bytes before the wrapped key in a key record.
pub const KEY_RECORD_HEAD_BYTES: usize = 32;
/// Bytes of a key record.
pub const KEY_RECORD_BYTES: usize = KEY_RECORD_HEAD_BYTES + WRAPPED_BYTES;

const CONTEXT_ID: &str = "vmdr 2026-11 identity of a master key";
const CONTEXT_WRAP: &str = "vmdr 2026-11 wrapping of a data key";
const CONTEXT_SEAL: &str = "vmdr 2026-11 sealing of an object";
const CONTEXT_NAME: &str = "vmdr 2026-11 names of content";
const CONTEXT_BLOCKS: &str = "vmdr 2026-11 sealing of blocks";

/// What is wrong with keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("read the key {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// It is not a key, or others can read it.
    #[error("the key {path} is not used: {what}", path = path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A credential is asked for outside of systemd.
    #[error(
        "the key is the systemd credential {0:?}, but CREDENTIALS_DIRECTORY is not set: start the service with \
         LoadCredential= or LoadCredentialEncrypted=, or name a key file"
    )]
    NoCredentials(String),
    /// The data key was wrapped under a master key that is not here.
    #[error("it is sealed under key {wanted}, here is {}: configure the key that it was written with", Ids(have))]
    WrongKey {
        /// Which is needed.
        wanted: KeyId,
        /// Which there are.
        have: Vec<KeyId>,
    },
    /// The right key, but what it opens is not what was sealed.
    #[error("what was sealed does not open: it was changed, cut short, or belongs elsewhere")]
    Forged,
    /// The operating system gives no random numbers.
    #[error("the operating system gives no random numbers")]
    NoRandom,
}

struct Ids<'a>(&'a [KeyId]);

impl fmt::Display for Ids<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (i, id) in self.0.iter().enumerate() {
            write!(f, "{}{id}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// Tells keys apart; says nothing about them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; KEY_ID_BYTES]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// The operator's key, which wraps data keys.
#[derive(Clone)]
pub struct MasterKey {
    id: KeyId,
    secret: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({})", self.id)
    }
}

impl MasterKey {
    /// From its bytes.
    pub fn new(secret: [u8; KEY_BYTES]) -> Self {
        let secret = Zeroizing::new(secret);
        let derived = derive(CONTEXT_ID, &[&secret[..]]);
        let mut id = [0; KEY_ID_BYTES];
        id.copy_from_slice(&derived[..KEY_ID_BYTES]);
        Self { id: KeyId(id), secret }
    }

    /// From a file: 32 bytes, or 64 hexadecimal digits with or without a line end. The file must be a plain file that nobody
    /// but its owner can read or write, and the owner this process's user or root.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read { path: path.to_owned(), source };
        let unusable = |what: &str| KeyError::Unusable { path: path.to_owned(), what: what.to_owned() };
        // A pipe without a writer would be waited for.
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = File::options().read(true).custom_flags(nonblock).open(path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(unusable("it is not a plain file"));
        }
        if about.mode() & 0o077 != 0 {
            let (mode, shown) = (about.mode() & 0o7777, path.display());
            let what = format!("others than its owner can read or write it (mode {mode:04o}): `chmod 0600 {shown}`");
            return Err(KeyError::Unusable { path: path.to_owned(), what });
        }
        let own = rustix::process::geteuid().as_raw();
        if about.uid() != own && about.uid() != 0 {
            return Err(unusable("its owner is neither this user nor root"));
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_FILE_BYTES_MAX));
        file.take(KEY_FILE_BYTES_MAX as u64).read_to_end(&mut bytes).map_err(failed)?;
        let secret = parse(&bytes).ok_or_else(|| {
            unusable("it has neither 32 bytes nor 64 hexadecimal digits: make one with `openssl rand -hex 32`")
        })?;
        if secret.iter().all(|byte| *byte == secret[0]) {
            return Err(unusable("it is one byte repeated, no key: make one with `openssl rand -hex 32`"));
        }
        Ok(Self::new(*secret))
    }

    /// From a credential that systemd gave this service.
    pub fn credential(name: &str) -> Result<Self, KeyError> {
        let directory = std::env::var_os(CREDENTIALS_VARIABLE).filter(|directory| !directory.is_empty());
        let directory = directory.ok_or_else(|| KeyError::NoCredentials(name.to_owned()))?;
        Self::read(&Path::new(&directory).join(name))
    }

    /// Which it is.
    pub fn id(&self) -> KeyId {
        self.id
    }

    fn wrapping(&self, owner: &[u8], which: &[u8], salt: &[u8]) -> Result<LessSafeKey, KeyError> {
        cipher(&derive(CONTEXT_WRAP, &[&self.secret[..], owner, which, salt]))
    }
}

fn parse(bytes: &[u8]) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    if let Ok(raw) = <[u8; KEY_BYTES]>::try_from(bytes) {
        return Some(Zeroizing::new(raw));
    }
    let digits = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let digits = digits.strip_suffix(b"\r").unwrap_or(digits);
    if digits.len() != 2 * KEY_BYTES {
        return None;
    }
    let mut secret = Zeroizing::new([0; KEY_BYTES]);
    for (byte, pair) in secret.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| (c as char).to_digit(16).map(|digit| digit as u8);
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(secret)
}

/// What an object is: sealed under one of these it opens under no other.
#[derive(Debug, Clone, Copy)]
pub struct Identity<'a> {
    /// Whose it is, for example a domain's UUID.
    pub owner: &'a [u8],
    /// What kind of object.
    pub kind: &'a [u8],
    /// Its name.
    pub name: &'a [u8],
    /// What is stored with it in the clear and must not be changed.
    pub header: &'a [u8],
}

/// A key for what is stored.
#[derive(Clone)]
pub struct DataKey {
    id: KeyId,
    secret: Zeroizing<[u8; KEY_BYTES]>,
    naming: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKey({})", self.id)
    }
}

impl DataKey {
    /// A new one.
    pub fn generate() -> Result<Self, KeyError> {
        let (mut id, mut secret) = ([0; KEY_ID_BYTES], Zeroizing::new([0; KEY_BYTES]));
        random(&mut id)?;
        random(&mut secret[..])?;
        Ok(Self::with(KeyId(id), secret))
    }

    fn with(id: KeyId, secret: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let naming = derive(CONTEXT_NAME, &[&secret[..]]);
        Self { id, secret, naming }
    }

    /// Which it is.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The key as it may be stored, for this owner.
    pub fn wrap(&self, under: &MasterKey, owner: &[u8]) -> Result<[u8; WRAPPED_BYTES], KeyError> {
        let salt = salt()?;
        let mut wrapped = Vec::with_capacity(WRAPPED_BYTES);
        wrapped.extend_from_slice(&under.id.0);
        wrapped.extend_from_slice(&self.id.0);
        wrapped.extend_from_slice(&salt);
        let cipher = under.wrapping(owner, &self.id.0, &salt)?;
        let mut sealed = Zeroizing::new(self.secret.to_vec());
        let aad = Aad::from([&wrapped[..], owner].concat());
        cipher.seal_in_place_append_tag(nonce(0), aad, &mut *sealed).map_err(|_| KeyError::Forged)?;
        wrapped.extend_from_slice(&sealed);
        wrapped.try_into().map_err(|_| KeyError::Forged)
    }

    /// The key out of what was stored, and which of the master keys it was wrapped under.
    pub fn unwrap(wrapped: &[u8; WRAPPED_BYTES], keys: &[MasterKey], owner: &[u8]) -> Result<(Self, KeyId), KeyError> {
        let (head, sealed) = wrapped.split_at(2 * KEY_ID_BYTES + SALT_BYTES);
        let id = |at: usize| {
            let mut id = [0; KEY_ID_BYTES];
            id.copy_from_slice(&head[at..at + KEY_ID_BYTES]);
            KeyId(id)
        };
        let (wanted, which) = (id(0), id(KEY_ID_BYTES));
        let have = || keys.iter().map(MasterKey::id).collect();
        let key = keys.iter().find(|key| key.id == wanted);
        let key = key.ok_or_else(|| KeyError::WrongKey { wanted, have: have() })?;
        let cipher = key.wrapping(owner, &which.0, &head[2 * KEY_ID_BYTES..])?;
        let mut opened = Zeroizing::new(sealed.to_vec());
        let aad = Aad::from([head, owner].concat());
        let secret = cipher.open_in_place(nonce(0), aad, &mut opened).map_err(|_| KeyError::Forged)?;
        let secret = Zeroizing::new(<[u8; KEY_BYTES]>::try_from(&*secret).map_err(|_| KeyError::Forged)?);
        Ok((Self::with(which, secret), wanted))
    }

    /// A name for content: the same for the same bytes, and of no use to whoever lacks the key.
    pub fn name(&self, content: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.naming, content).as_bytes()
    }

    /// What seals blocks of this owner.
    pub fn blocks(&self, owner: &[u8]) -> BlockKey {
        BlockKey { secret: derive(CONTEXT_BLOCKS, &[&self.secret[..], owner]) }
    }

    /// What seals the segments of one object. The salt must be fresh for every object written, see [`salt`].
    pub fn sealer(&self, of: Identity<'_>, salt: &[u8; SALT_BYTES]) -> Result<Sealer, KeyError> {
        let key = derive(CONTEXT_SEAL, &[&self.secret[..], of.owner, of.kind, of.name, salt]);
        let mut aad = Vec::new();
        for part in [of.owner, of.kind, of.name, of.header] {
            aad.extend_from_slice(&(part.len() as u32).to_le_bytes());
            aad.extend_from_slice(part);
        }
        Ok(Sealer { cipher: cipher(&key)?, aad, next: 0 })
    }
}

/// Seals or opens the segments of one object, in order. Used for one of both, once.
pub struct Sealer {
    cipher: LessSafeKey,
    aad: Vec<u8>,
    next: u32,
}

impl Sealer {
    fn turn(&mut self, last: bool) -> Result<(Nonce, Aad<Vec<u8>>), KeyError> {
        let number = self.next;
        self.next = number.checked_add(1).ok_or(KeyError::Forged)?;
        let mut aad = self.aad.clone();
        aad.extend_from_slice(&number.to_le_bytes());
        aad.push(u8::from(last));
        Ok((nonce(number), Aad::from(aad)))
    }

    /// Seals the next segment in place; it becomes [`TAG_BYTES`] longer.
    pub fn seal(&mut self, segment: &mut Vec<u8>, last: bool) -> Result<(), KeyError> {
        let (nonce, aad) = self.turn(last)?;
        self.cipher.seal_in_place_append_tag(nonce, aad, segment).map_err(|_| KeyError::Forged)
    }

    /// Opens the next segment in place; it becomes [`TAG_BYTES`] shorter.
    pub fn open(&mut self, segment: &mut Vec<u8>, last: bool) -> Result<(), KeyError> {
        let (nonce, aad) = self.turn(last)?;
        let length = self.cipher.open_in_place(nonce, aad, segment).map_err(|_| KeyError::Forged)?.len();
        segment.truncate(length);
        Ok(())
    }
}

/// Seals single blocks that are written again and again, in any order: each writing under a key of its own, derived from the
/// data key, whose they are, and the salt, which must be fresh each time ([`fill_random`]).
#[derive(Clone)]
pub struct BlockKey {
    secret: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockKey")
    }
}

impl BlockKey {
    fn cipher(&self, salt: &[u8; SALT_BYTES]) -> Result<LessSafeKey, KeyError> {
        cipher(&Zeroizing::new(*blake3::keyed_hash(&self.secret, salt).as_bytes()))
    }

    /// Seals a block in place; `about` is what it is, which must be the same when it is opened.
    pub fn seal(&self, salt: &[u8; SALT_BYTES], about: &[u8], block: &mut [u8]) -> Result<[u8; TAG_BYTES], KeyError> {
        let tag = self.cipher(salt)?.seal_in_place_separate_tag(nonce(0), Aad::from(about), block);
        let mut bytes = [0; TAG_BYTES];
        bytes.copy_from_slice(tag.map_err(|_| KeyError::Forged)?.as_ref());
        Ok(bytes)
    }

    /// Opens a block in place. After an error it holds nothing of use.
    pub fn open(
        &self,
        salt: &[u8; SALT_BYTES],
        tag: [u8; TAG_BYTES],
        about: &[u8],
        block: &mut [u8],
    ) -> Result<(), KeyError> {
        let cipher = self.cipher(salt)?;
        let opened = cipher.open_in_place_separate_tag(nonce(0), Aad::from(about), tag.into(), block, 0..);
        opened.map(|_| ()).map_err(|_| KeyError::Forged)
    }
}

/// What is wrong with the bytes of a key record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    /// Something else.
    #[error("it is no key")]
    NoKey,
    /// Of a later version.
    #[error("it has version {0}, this vmdr knows {RECORD_VERSION}")]
    Version(u32),
    /// Cut short, or with something behind it.
    #[error("it has {0} bytes, {KEY_RECORD_BYTES} are expected")]
    Length(usize),
    /// Of another owner.
    #[error("it is another domain's")]
    Owner,
}

/// A wrapped key as it lies in a file or object: `VMDRKEY\0`, version (u32), 0 (u32), the owner's UUID (16), the wrapped key.
pub fn key_record(owner: &[u8; 16], wrapped: &[u8; WRAPPED_BYTES]) -> [u8; KEY_RECORD_BYTES] {
    let mut bytes = [0; KEY_RECORD_BYTES];
    bytes[..8].copy_from_slice(RECORD_MAGIC);
    bytes[8..12].copy_from_slice(&RECORD_VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(owner);
    bytes[KEY_RECORD_HEAD_BYTES..].copy_from_slice(wrapped);
    bytes
}

/// The wrapped key in a record that is this owner's.
pub fn wrapped_key<'a>(bytes: &'a [u8], owner: &[u8; 16]) -> Result<&'a [u8; WRAPPED_BYTES], RecordFault> {
    if bytes.len() < 12 || &bytes[..8] != RECORD_MAGIC {
        return Err(RecordFault::NoKey);
    }
    let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    if version != RECORD_VERSION {
        return Err(RecordFault::Version(version));
    }
    let wrapped = bytes.get(KEY_RECORD_HEAD_BYTES..).and_then(|wrapped| wrapped.try_into().ok());
    let wrapped = wrapped.ok_or(RecordFault::Length(bytes.len()))?;
    if &bytes[16..32] == owner { Ok(wrapped) } else { Err(RecordFault::Owner) }
}

/// Fills a buffer with random bytes, for many salts at once.
pub fn fill_random(bytes: &mut [u8]) -> Result<(), KeyError> {
    random(bytes)
}

/// A fresh salt.
pub fn salt() -> Result<[u8; SALT_BYTES], KeyError> {
    let mut salt = [0; SALT_BYTES];
    random(&mut salt)?;
    Ok(salt)
}

fn random(bytes: &mut [u8]) -> Result<(), KeyError> {
    SystemRandom::new().fill(bytes).map_err(|_| KeyError::NoRandom)
}

fn nonce(number: u32) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn cipher(key: &[u8; KEY_BYTES]) -> Result<LessSafeKey, KeyError> {
    UnboundKey::new(&AES_256_GCM, key).map(LessSafeKey::new).map_err(|_| KeyError::Forged)
}

fn derive(context: &str, parts: &[&[u8]]) -> Zeroizing<[u8; KEY_BYTES]> {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Zeroizing::new(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn key_file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (directory, path)
    }

    #[test]
    fn a_key_is_read_raw_or_in_hexadecimal() {
        let raw: Vec<u8> = (0..32).collect();
        let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = MasterKey::new(raw.clone().try_into().unwrap()).id();
        for content in [raw, hex.clone().into_bytes(), (hex.to_uppercase() + "\n").into_bytes()] {
            let (_directory, path) = key_file(&content, 0o600);
            assert_eq!(MasterKey::read(&path).unwrap().id(), expected);
        }
    }

    #[test]
    fn what_is_no_key_is_refused_with_what_to_do() {
        for (content, mode, word) in [
            (&[7; 31][..], 0o600, "openssl rand"),
            (&[7; 33][..], 0o600, "openssl rand"),
            (&[b'g'; 64][..], 0o600, "openssl rand"),
            (&[b'a'; 67][..], 0o600, "openssl rand"),
            (&[0; 32][..], 0o600, "repeated"),
            (&b"0123456789abcdef0123456789abcdef"[..], 0o640, "chmod 0600"),
            (&b"0123456789abcdef0123456789abcdef"[..], 0o604, "chmod 0600"),
        ] {
            let (_directory, path) = key_file(content, mode);
            let error = MasterKey::read(&path).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(&*path.to_string_lossy()), "{error}");
        }
        let (directory, _path) = key_file(b"", 0o600);
        assert!(MasterKey::read(directory.path()).unwrap_err().to_string().contains("plain file"));
    }

    #[test]
    fn a_wrapped_key_opens_for_its_owner_and_its_key_only() {
        let (old, new) = (MasterKey::new([1; 32]), MasterKey::new([2; 32]));
        let data = DataKey::generate().unwrap();
        let wrapped = data.wrap(&old, b"owner").unwrap();
        let keys = [new.clone(), old.clone()];
        let (opened, under) = DataKey::unwrap(&wrapped, &keys, b"owner").unwrap();
        assert_eq!((opened.id(), &opened.secret, under), (data.id(), &data.secret, old.id()));
        assert!(matches!(DataKey::unwrap(&wrapped, &keys, b"other"), Err(KeyError::Forged)));
        let error = DataKey::unwrap(&wrapped, std::slice::from_ref(&new), b"owner").unwrap_err();
        assert!(error.to_string().contains(&old.id().to_string()), "{error}");
        for bit in 0..wrapped.len() * 8 {
            let mut changed = wrapped;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(DataKey::unwrap(&changed, &keys, b"owner").is_err(), "bit {bit}");
        }
        // Rotation: the same data key under another master key.
        let wrapped = opened.wrap(&new, b"owner").unwrap();
        assert_eq!(DataKey::unwrap(&wrapped, &[new], b"owner").unwrap().0.secret, data.secret);
        assert_ne!(data.wrap(&old, b"owner").unwrap(), data.wrap(&old, b"owner").unwrap());
    }

    #[test]
    fn segments_open_in_their_place_only() {
        let key = DataKey::generate().unwrap();
        let of = |name| Identity { owner: b"o", kind: b"k", name, header: b"h" };
        let (one, other) = (salt().unwrap(), salt().unwrap());
        let mut sealer = key.sealer(of(b"n"), &one).unwrap();
        let (mut first, mut second) = (b"first".to_vec(), b"second".to_vec());
        sealer.seal(&mut first, false).unwrap();
        sealer.seal(&mut second, true).unwrap();
        let open = |of: Identity<'_>, salt, segments: &[(&Vec<u8>, bool)]| {
            let mut sealer = key.sealer(of, salt).unwrap();
            segments.iter().try_for_each(|(segment, last)| sealer.open(&mut (*segment).clone(), *last))
        };
        open(of(b"n"), &one, &[(&first, false), (&second, true)]).unwrap();
        assert!(open(of(b"m"), &one, &[(&first, false)]).is_err());
        assert!(open(Identity { owner: b"p", ..of(b"n") }, &one, &[(&first, false)]).is_err());
        assert!(open(Identity { header: b"i", ..of(b"n") }, &one, &[(&first, false)]).is_err());
        assert!(open(of(b"n"), &other, &[(&first, false)]).is_err());
        assert!(open(of(b"n"), &one, &[(&first, true)]).is_err());
        assert!(open(of(b"n"), &one, &[(&second, true)]).is_err());
        let mut again = b"first".to_vec();
        key.sealer(of(b"n"), &other).unwrap().seal(&mut again, false).unwrap();
        assert_ne!(again, first, "the same under another salt is other bytes");
    }

    #[test]
    fn names_are_the_keys_own() {
        let (one, other) = (DataKey::generate().unwrap(), DataKey::generate().unwrap());
        assert_eq!(one.name(b"x"), one.name(b"x"));
        assert_ne!(one.name(b"x"), other.name(b"x"));
        assert_ne!(one.name(b"x"), *blake3::hash(b"x").as_bytes());
        assert!(!format!("{one:?} {:?}", MasterKey::new([9; 32])).contains("9, 9"));
    }
}
