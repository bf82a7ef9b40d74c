//! One record as a line: what is in it and how its hash is made.
//!
//! ```text
//!   {"seq":7,"time":"...","prev":"HASH OF LINE 6",...,"hash":"SHA-256 of this line without the hash"}
//! ```

use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What the first record has for the hash of the one before.
pub const ZERO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Hexadecimal digits of a hash.
pub(crate) const HASH_CHARS: usize = 64;
/// The longest word or sentence taken over from a caller.
const FIELD_CHARS_MAX: usize = 512;
const HASH_FIELD: &str = ",\"hash\":\"";

/// How something ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is about to be done.
    Begun,
    /// It was done.
    Done,
    /// It was tried and did not succeed.
    Failed,
    /// It was not allowed.
    Refused,
    /// Not an act, but worth keeping.
    Noted,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begun => "begun",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Noted => "noted",
        })
    }
}

/// What is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Entry {
    /// A verb: `Activate`, `connect`, `pair`.
    pub act: String,
    /// Who: `uid 0 (pid 77)`, `peer site-a (1f2e3d...)`, an address.
    pub actor: String,
    /// To what: a domain, a peer. May be empty.
    pub subject: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, in a sentence. May be empty.
    pub detail: String,
}

impl Entry {
    /// Without a detail.
    pub fn new(act: &str, actor: &str, subject: &str, outcome: Outcome) -> Self {
        let (act, actor, subject) = (act.to_owned(), actor.to_owned(), subject.to_owned());
        Self { act, actor, subject, outcome, detail: String::new() }
    }

    /// The same with a detail.
    #[must_use]
    pub fn because(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// The same with another outcome.
    #[must_use]
    pub fn with(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }
}

/// A record as it stands in the line, without its own hash.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub seq: u64,
    pub time: String,
    pub prev: String,
    pub daemon: String,
    pub act: String,
    pub actor: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    pub outcome: Outcome,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// How many times, if more than once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Of a record that says what was deleted: the last record that was, and its hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<(u64, String)>,
}

/// The place in the chain: the newest record and its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub seq: u64,
    pub hash: String,
}

impl Head {
    pub fn zero() -> Self {
        Self { seq: 0, hash: ZERO_HASH.to_owned() }
    }
}

fn short(text: &str) -> String {
    text.chars().take(FIELD_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The next line of a chain, with its newline, and the head after it.
pub(crate) fn line(
    head: &Head,
    daemon: &str,
    entry: &Entry,
    count: u64,
    dropped: Option<&Head>,
    now: SystemTime,
) -> Result<(String, Head), serde_json::Error> {
    let record = Record {
        seq: head.seq + 1,
        time: humantime::format_rfc3339_millis(now).to_string(),
        prev: head.hash.clone(),
        daemon: daemon.to_owned(),
        act: short(&entry.act),
        actor: short(&entry.actor),
        subject: short(&entry.subject),
        outcome: entry.outcome,
        detail: short(&entry.detail),
        count: (count > 1).then_some(count),
        dropped: dropped.map(|head| (head.seq, head.hash.clone())),
    };
    let body = serde_json::to_string(&record)?;
    let hash = hash(&body);
    let open = body.strip_suffix('}').unwrap_or(&body);
    Ok((format!("{open}{HASH_FIELD}{hash}\"}}\n"), Head { seq: record.seq, hash }))
}

/// A line, checked by itself; without its newline. The error is a sentence.
pub(crate) fn parse(line: &str) -> Result<(Record, Head), String> {
    let split = line.strip_suffix("\"}").and_then(|rest| {
        let at = rest.len().checked_sub(HASH_CHARS)?;
        let (open, hash) = rest.split_at_checked(at)?;
        Some((open.strip_suffix(HASH_FIELD)?, hash))
    });
    let (open, claimed) = split.ok_or("it is no record with a hash")?;
    let body = format!("{open}}}");
    if hash(&body) != claimed {
        return Err("its hash does not match what it says".to_owned());
    }
    let record: Record = serde_json::from_str(&body).map_err(|error| format!("it is no record: {error}"))?;
    let head = Head { seq: record.seq, hash: claimed.to_owned() };
    Ok((record, head))
}

fn hash(body: &str) -> String {
    Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}
