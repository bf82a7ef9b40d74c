//! The cold tier in the receiver: which storage and key, who exports when, and what the store's points are to `vmdr-cold`.
//!
//! - [`export`]: a point of the store goes to object storage.
//! - [`import`]: a point of object storage becomes a standby, through the same door as an agent's first copy.
//! - [`requests`]: what the `vmdr` command asks.
//! - [`schedule`]: exports by the clock.
//!
//! One export, prune or import of a domain at a time. The receiver's end breaks them off; what was sent is not sent again.

pub mod export;
pub mod import;
pub mod requests;
pub mod schedule;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use tonic::Status;
use uuid::Uuid;
use vmdr_cold::keys::{KeyError, MasterKey};
use vmdr_cold::{Bucket, ColdError, Location, Tier};

use crate::config::TierConfig;
use crate::encryption::{OLD_KEYS_MAX, read_keys};
use crate::history;

/// The shortest time between two exports of a schedule.
const EVERY_SECONDS_MIN: u64 = 10;

/// `[cold]`: object storage for recovery points.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ColdConfig {
    /// `s3://BUCKET/PREFIX` or `file:///DIRECTORY`; "": none.
    pub url: String,
    /// Of an S3 service that is not AWS: `https://HOST:PORT`.
    pub endpoint: String,
    /// Of S3. Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`) or the machine's role.
    pub region: String,
    /// The master key: 32 bytes or 64 hexadecimal digits, mode 0600.
    pub key_file: Option<PathBuf>,
    /// The same as a systemd credential of this name.
    pub key_credential: String,
    /// Keys that objects may still be sealed under.
    pub old_key_files: Vec<PathBuf>,
    /// Between two exports of a domain; 0: only when asked for.
    pub every_seconds: u64,
    /// Names or UUIDs of the domains that are exported by schedule; none: all.
    pub domains: Vec<String>,
    /// Which exported points are kept, beside the newest; none: all.
    pub keep: Vec<TierConfig>,
    /// How long a chunk that no point needs any more stays.
    pub grace_seconds: u64,
    /// Bytes sent per second; 0: no limit.
    pub bytes_per_second: u64,
    /// Requests at the same time.
    pub parallel: usize,
}

impl Default for ColdConfig {
    fn default() -> Self {
        ColdConfig {
            url: String::new(),
            endpoint: String::new(),
            region: String::new(),
            key_file: None,
            key_credential: String::new(),
            old_key_files: Vec::new(),
            every_seconds: 0,
            domains: Vec::new(),
            keep: Vec::new(),
            grace_seconds: 24 * 3600,
            bytes_per_second: 0,
            parallel: 4,
        }
    }
}

impl ColdConfig {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        if self.key_file.is_some() && !self.key_credential.is_empty() {
            return Err("key_file and key_credential are given: one of them decides".to_owned());
        }
        if !self.url.is_empty() && self.key_file.is_none() && self.key_credential.is_empty() {
            return Err("url without a key: name a key_file or a key_credential (`openssl rand -hex 32`)".to_owned());
        }
        if self.url.is_empty() && self.every_seconds > 0 {
            return Err("every_seconds without a url".to_owned());
        }
        if (1..EVERY_SECONDS_MIN).contains(&self.every_seconds) {
            return Err(format!("every_seconds = {}: at least {EVERY_SECONDS_MIN}, or 0", self.every_seconds));
        }
        if self.old_key_files.len() > OLD_KEYS_MAX {
            return Err(format!("more than {OLD_KEYS_MAX} old_key_files"));
        }
        if self.parallel == 0 || self.parallel > 64 {
            return Err(format!("parallel = {}: 1 to 64 are possible", self.parallel));
        }
        for path in self.key_file.iter().chain(&self.old_key_files) {
            if !path.is_absolute() {
                return Err(format!("{} is not an absolute path", path.display()));
            }
        }
        self.tiers().map(|_| ())
    }

    fn tiers(&self) -> Result<Vec<Tier>, String> {
        let tiers = self.keep.iter().map(|tier| (tier.every_seconds, tier.for_seconds));
        let policy = history::policy(history::BUDGET_BYTES_MIN, tiers)?;
        Ok(policy.tiers.iter().map(|tier| Tier { every_ns: tier.every_ns, for_ns: tier.for_ns }).collect())
    }

    /// The master key, and older ones. Reads files.
    fn keys(&self, instead: Option<&Path>) -> Result<Vec<MasterKey>, KeyError> {
        read_keys(instead.or(self.key_file.as_deref()), &self.key_credential, &self.old_key_files)
    }

    fn location(&self, instead: &str) -> Result<Location, Status> {
        let url = if instead.is_empty() { self.url.as_str() } else { instead };
        if url.is_empty() {
            let what = "no object storage is configured: give a URL, or set url in [cold] of receiver.toml";
            return Err(Status::failed_precondition(what));
        }
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Ok(Location {
            url: url.to_owned(),
            endpoint: some(&self.endpoint),
            region: some(&self.region),
            credentials: None,
        })
    }
}

/// What is known of a domain's exports.
#[derive(Debug, Clone, Default)]
pub struct Exported {
    /// When one was last tried.
    pub tried_unix_ns: u64,
    /// Why that failed; empty: it did not.
    pub error: String,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Cold {
    /// The configuration.
    pub config: ColdConfig,
    /// Set when the receiver ends.
    ending: AtomicBool,
    busy: Mutex<HashMap<Uuid, Arc<tokio::sync::Mutex<()>>>>,
    exported: Mutex<HashMap<Uuid, Exported>>,
    /// Bytes that imports under way are still going to write.
    promised: AtomicU64,
}

impl Cold {
    /// With this configuration.
    pub fn new(config: ColdConfig) -> Self {
        Self {
            config,
            ending: AtomicBool::new(false),
            busy: Mutex::default(),
            exported: Mutex::default(),
            promised: AtomicU64::new(0),
        }
    }

    /// Breaks off what is under way.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// What is known of a domain's exports since the start.
    pub fn exported(&self, uuid: Uuid) -> Exported {
        self.all_exported().get(&uuid).cloned().unwrap_or_default()
    }

    fn note(&self, uuid: Uuid, with: impl FnOnce(&mut Exported)) {
        with(self.all_exported().entry(uuid).or_default());
    }

    fn all_exported(&self) -> MutexGuard<'_, HashMap<Uuid, Exported>> {
        self.exported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn of a domain; refused while something of it is under way.
    fn turn(&self, uuid: Uuid, name: &str) -> Result<tokio::sync::OwnedMutexGuard<()>, Status> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, lock| Arc::strong_count(lock) > 1);
        let lock = Arc::clone(busy.entry(uuid).or_default());
        let taken = lock.try_lock_owned();
        taken.map_err(|_| Status::already_exists(format!("an export, prune or import of {name} is under way already")))
    }

    /// The storage and the keys: those given, else those configured.
    async fn open(&self, from: &str, key_file: &str) -> Result<(Bucket, Vec<MasterKey>), Status> {
        if !key_file.is_empty() && !Path::new(key_file).is_absolute() {
            return Err(Status::invalid_argument(format!("the key {key_file:?} is not an absolute path")));
        }
        let location = self.config.location(from)?;
        let (config, key_file) = (self.config.clone(), key_file.to_owned());
        let opened = tokio::task::spawn_blocking(move || {
            let instead = (!key_file.is_empty()).then(|| Path::new(&key_file));
            let keys = config.keys(instead).map_err(|e| Status::failed_precondition(e.to_string()))?;
            let bucket = Bucket::open(&location).map_err(|e| status(&e))?;
            Ok((bucket, keys))
        });
        opened.await.map_err(|e| Status::internal(e.to_string()))?
    }
}

/// An error as the command is told it.
pub(crate) fn status(error: &ColdError) -> Status {
    let message = error.to_string();
    match error {
        ColdError::NoDomain { .. } | ColdError::NoPoint { .. } => Status::not_found(message),
        ColdError::Location { .. } => Status::invalid_argument(message),
        ColdError::Key { .. } | ColdError::Busy { .. } | ColdError::Disturbed { .. } | ColdError::Clock { .. } => {
            Status::failed_precondition(message)
        }
        ColdError::Store { .. } | ColdError::Slow { .. } | ColdError::Ended => Status::unavailable(message),
        ColdError::Missing { .. } | ColdError::Damaged { .. } => Status::data_loss(message),
        ColdError::Version { .. } | ColdError::Limit(_) | ColdError::Source(_) => Status::internal(message),
    }
}
