//! The one-time token of a pairing: what it says, and what the host that showed it remembers of it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::peers::unix;
use crate::{TrustError, files};

/// How long a token is good unless asked for otherwise.
pub const TOKEN_LIFE: Duration = Duration::from_secs(600);
/// The longest.
pub const TOKEN_LIFE_MAX: Duration = Duration::from_secs(3600);
/// Wrong secrets after which a token is void.
const WRONG_MAX: u32 = 5;
/// Bytes of the fingerprint: nobody finds another authority with the same 128 bits.
const FINGERPRINT_BYTES: usize = 16;
/// Bytes of the secret: guessed at most [`WRONG_MAX`] times.
const SECRET_BYTES: usize = 12;
const VERSION: u8 = 1;
const BYTES: usize = 1 + FINGERPRINT_BYTES + SECRET_BYTES + 1;
/// Characters between hyphens.
const GROUP: usize = 6;
const FILE: &str = "pairing.json";

/// What is shown on one side and typed on the other.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    fingerprint: [u8; FINGERPRINT_BYTES],
    secret: [u8; SECRET_BYTES],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    fn bytes(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[0] = VERSION;
        bytes[1..=FINGERPRINT_BYTES].copy_from_slice(&self.fingerprint);
        bytes[1 + FINGERPRINT_BYTES..BYTES - 1].copy_from_slice(&self.secret);
        bytes[BYTES - 1] = check(&bytes[..BYTES - 1]);
        bytes
    }

    /// Whether the host with this id showed the token.
    pub(crate) fn is_of(&self, id: &str) -> bool {
        id.starts_with(&HEXLOWER.encode(&self.fingerprint))
    }

    /// As it is sent.
    pub(crate) fn secret(&self) -> String {
        HEXLOWER.encode(&self.secret)
    }
}

/// Finds a slip of the finger before anything is asked.
fn check(bytes: &[u8]) -> u8 {
    Sha256::digest(bytes)[0]
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = BASE32_NOPAD.encode(&self.bytes());
        let groups: Vec<&str> = (0..text.len()).step_by(GROUP).filter_map(|at| text.get(at..at + GROUP)).collect();
        f.write_str(&groups.join("-"))
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let text: String = typed.chars().filter(|c| !c.is_whitespace() && *c != '-').collect();
        let wrong = || "that is not a token: is a character missing or mistyped?".to_owned();
        let bytes = BASE32_NOPAD.decode(text.to_ascii_uppercase().as_bytes()).map_err(|_| wrong())?;
        let bytes: [u8; BYTES] = bytes.try_into().map_err(|_| wrong())?;
        if bytes[BYTES - 1] != check(&bytes[..BYTES - 1]) {
            return Err(wrong());
        }
        if bytes[0] != VERSION {
            return Err(format!(
                "the token is of version {}, {VERSION} is known here: upgrade the older side",
                bytes[0]
            ));
        }
        let mut token = Self { fingerprint: [0; FINGERPRINT_BYTES], secret: [0; SECRET_BYTES] };
        token.fingerprint.copy_from_slice(&bytes[1..=FINGERPRINT_BYTES]);
        token.secret.copy_from_slice(&bytes[1 + FINGERPRINT_BYTES..BYTES - 1]);
        Ok(token)
    }
}

/// What the host that showed a token keeps: not the secret.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Shown {
    secret_sha256: String,
    shown_unix: u64,
    expires_unix: u64,
    used: bool,
    wrong: u32,
}

/// The last token that a host showed. The caller of what changes it holds the lock of the identity.
#[derive(Debug, Clone)]
pub(crate) struct Pairing {
    path: PathBuf,
}

impl Pairing {
    pub fn of(identity: &Path) -> Self {
        Self { path: identity.join(FILE) }
    }

    /// A new token, which replaces the one before.
    pub fn show(&self, id: &str, life: Duration) -> Result<Token, TrustError> {
        let fingerprint = HEXLOWER.decode(id.as_bytes()).ok();
        let fingerprint = fingerprint.as_deref().and_then(|bytes| bytes.first_chunk().copied());
        let fingerprint = fingerprint.ok_or_else(|| TrustError::Certificate("the authority has no id".to_owned()))?;
        let token = Token { fingerprint, secret: rand::random() };
        let shown = Shown {
            secret_sha256: digest(&token.secret()),
            shown_unix: unix(SystemTime::now()),
            expires_unix: unix(SystemTime::now() + life),
            used: false,
            wrong: 0,
        };
        self.store(&shown)?;
        Ok(token)
    }

    /// Uses the token up, durably. The inner error says why not.
    pub fn redeem(&self, secret: &str) -> Result<Result<(), &'static str>, TrustError> {
        let Some(mut shown) = self.load()? else { return Ok(Err("no token was shown here")) };
        let same: bool = digest(secret).as_bytes().ct_eq(shown.secret_sha256.as_bytes()).into();
        if !same {
            shown.wrong = shown.wrong.saturating_add(1);
            shown.used |= shown.wrong >= WRONG_MAX;
            self.store(&shown)?;
            return Ok(Err("the token is wrong"));
        }
        if shown.used {
            return Ok(Err("the token was used already, or is void after too many wrong ones"));
        }
        // A clock that was set back would make it good for longer.
        if !(shown.shown_unix..shown.expires_unix).contains(&unix(SystemTime::now())) {
            return Ok(Err("the token has expired"));
        }
        shown.used = true;
        self.store(&shown)?;
        Ok(Ok(()))
    }

    fn load(&self) -> Result<Option<Shown>, TrustError> {
        let Some(bytes) = files::read(&self.path)? else { return Ok(None) };
        let damaged = |error: serde_json::Error| {
            let what = format!("{error}: show another token");
            TrustError::Damaged { path: self.path.clone(), what }
        };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    fn store(&self, shown: &Shown) -> Result<(), TrustError> {
        let bytes = serde_json::to_vec(shown).map_err(|error| TrustError::Certificate(error.to_string()))?;
        files::replace(&self.path, &bytes)
    }
}

fn digest(secret: &str) -> String {
    HEXLOWER.encode(&Sha256::digest(secret.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_written_and_slips_are_noticed() {
        let token = Token { fingerprint: [7; FINGERPRINT_BYTES], secret: [9; SECRET_BYTES] };
        let text = token.to_string();
        assert_eq!((text.len(), text.matches('-').count()), (48 + 7, 7), "{text}");
        for typed in [text.clone(), text.to_lowercase(), text.replace('-', " "), text.replace('-', "")] {
            assert_eq!(typed.parse(), Ok(token.clone()), "{typed}");
        }
        let mut noticed = 0;
        for at in 0..text.len() {
            let mut typed = text.clone().into_bytes();
            typed[at] = if typed[at] == b'B' { b'C' } else { b'B' };
            noticed += u32::from(Token::from_str(&String::from_utf8(typed).unwrap()).is_err());
        }
        // One byte of check: one slip in 256 gets through, and is refused by the other side.
        assert!(noticed >= 52, "{noticed}");
        for typed in ["", "A", "x y", &text[1..], &format!("{text}A")] {
            assert!(Token::from_str(typed).is_err(), "{typed}");
        }
        assert!(token.is_of(&"07".repeat(32)) && !token.is_of(&"08".repeat(32)));
        assert_eq!(format!("{token:?}"), "Token(..)");
    }

    #[test]
    fn it_serves_once_and_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let pairing = Pairing::of(directory.path());
        assert_eq!(pairing.redeem("00").unwrap(), Err("no token was shown here"));
        let id = "ab".repeat(32);
        let token = pairing.show(&id, TOKEN_LIFE).unwrap();
        assert_eq!(pairing.redeem("00").unwrap(), Err("the token is wrong"));
        assert_eq!(pairing.redeem(&token.secret()).unwrap(), Ok(()));
        assert!(pairing.redeem(&token.secret()).unwrap().unwrap_err().contains("used already"));
        let expired = pairing.show(&id, Duration::ZERO).unwrap();
        assert_eq!(pairing.redeem(&expired.secret()).unwrap(), Err("the token has expired"));
        let mut early = pairing.load().unwrap().unwrap();
        (early.shown_unix, early.expires_unix) = (early.shown_unix + 1000, early.expires_unix + 2000);
        pairing.store(&early).unwrap();
        assert_eq!(pairing.redeem(&expired.secret()).unwrap(), Err("the token has expired"), "the clock was set back");
        // The one before it is worth nothing.
        assert_eq!(pairing.redeem(&token.secret()).unwrap(), Err("the token is wrong"));
        let guessed = pairing.show(&id, TOKEN_LIFE).unwrap();
        for _ in 0..WRONG_MAX {
            assert_eq!(pairing.redeem("00").unwrap(), Err("the token is wrong"));
        }
        assert!(pairing.redeem(&guessed.secret()).unwrap().unwrap_err().contains("too many wrong ones"));
    }
}
