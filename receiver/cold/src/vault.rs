//! What a bucket has of one domain, and the key to it.
//!
//! Below the bucket's prefix:
//! ```text
//! UUID/key                            the data key, wrapped under a master key
//! UUID/points/TIME-GENERATION-EPOCH   manifests, see `manifest`
//! UUID/chunks/NN/NAME                 chunks, see `chunk`
//! UUID/prune                          what is going to be deleted, see `mark`
//! UUID/sweep/ID                       who deletes what the mark of this identity lists: see `prune`
//! ```
//!
//! `key` is `VMDRKEY\0`, the version (u32), 0 (u32), the UUID (16 bytes), and a wrapped key ([`crate::keys`]) for this UUID. It is the one
//! object that all others need, and that is replaced: by itself, when the master key changes.

use std::collections::HashMap;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use uuid::Uuid;

use crate::bucket::Bucket;
use crate::chunk;
use crate::error::ColdError;
use crate::keys::{
    DataKey, KEY_ID_BYTES, KEY_RECORD_BYTES, KEY_RECORD_HEAD_BYTES, KeyError, KeyId, MasterKey, RecordFault,
    WRAPPED_BYTES, key_record, wrapped_key,
};
use crate::manifest::{HEAD_BYTES_USUAL, Head, MANIFEST_BYTES_MAX, Manifest, Name, check_head};
use crate::sealed::{self, MANIFEST, Place};

/// With so many points of a domain in a bucket no further one is exported.
const POINTS_MAX: usize = 20_000;
/// So many are read: exports at the same time may write some beyond the limit, and what is there must stay readable.
const POINTS_READ_MAX: usize = 2 * POINTS_MAX;
/// Domains in a bucket, at most.
const DOMAINS_MAX: usize = 20_000;
/// Heads that are read at the same time.
const READS_AT_ONCE: usize = 8;

/// A point in a list.
#[derive(Debug, Clone)]
pub struct StoredPoint {
    /// Its manifest's name within the domain.
    pub object: String,
    /// What it is, or why that cannot be told.
    pub head: Result<Head, String>,
    /// When its manifest was written, by the storage's clock (Unix time in ns).
    pub written_unix_ns: u64,
}

/// A chunk in a list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredChunk {
    /// When it was written, by the storage's clock (Unix time in ns).
    pub written_unix_ns: u64,
    /// Whether it has a size that a chunk can have.
    pub plausible: bool,
}

/// What a bucket has of a domain.
#[derive(Debug, Clone)]
pub struct Vault {
    pub(crate) bucket: Bucket,
    pub(crate) uuid: Uuid,
    pub(crate) key: DataKey,
    under: KeyId,
}

/// The domains that a bucket has something of.
pub async fn domains(bucket: &Bucket) -> Result<Vec<Uuid>, ColdError> {
    let names = bucket.directories().await?;
    if names.len() > DOMAINS_MAX {
        return Err(ColdError::Limit(format!("{} has more than {DOMAINS_MAX} directories", bucket.shown())));
    }
    let canonical = |name: &String| Uuid::parse_str(name).ok().filter(|uuid| uuid.to_string() == *name);
    let mut found: Vec<Uuid> = names.iter().filter_map(canonical).collect();
    found.sort();
    Ok(found)
}

/// Whether a bucket has anything of a domain.
pub async fn has_domain(bucket: &Bucket, uuid: Uuid) -> Result<bool, ColdError> {
    if bucket.head(&format!("{uuid}/key")).await?.is_some() {
        return Ok(true);
    }
    Ok(domains(bucket).await?.contains(&uuid))
}

fn key_bytes(uuid: Uuid, wrapped: &[u8; WRAPPED_BYTES]) -> Bytes {
    key_record(uuid.as_bytes(), wrapped).to_vec().into()
}

fn open_key(name: &str, uuid: Uuid, bytes: &[u8], keys: &[MasterKey]) -> Result<(DataKey, KeyId), ColdError> {
    let damaged = |what: &str| ColdError::Damaged { object: name.to_owned(), what: what.to_owned() };
    let wrapped = wrapped_key(bytes, uuid.as_bytes()).map_err(|fault| match fault {
        RecordFault::Version(found) => ColdError::Version { object: name.to_owned(), found },
        fault => damaged(&fault.to_string()),
    })?;
    DataKey::unwrap(wrapped, keys, uuid.as_bytes()).map_err(|source| match source {
        KeyError::Forged => damaged("it does not open under its key"),
        source => ColdError::Key { object: name.to_owned(), source },
    })
}

impl Vault {
    /// Opens what is there of a domain. `keys`: the master key, and older ones.
    pub async fn open(bucket: &Bucket, uuid: Uuid, keys: &[MasterKey]) -> Result<Option<Self>, ColdError> {
        let name = format!("{uuid}/key");
        let Some(bytes) = bucket.get(&name, KEY_RECORD_BYTES as u64).await? else { return Ok(None) };
        let (key, under) = open_key(&name, uuid, &bytes, keys)?;
        Ok(Some(Self { bucket: bucket.clone(), uuid, key, under }))
    }

    /// The same; where there is nothing a data key is made, wrapped under the first of `keys`.
    pub async fn open_or_begin(bucket: &Bucket, uuid: Uuid, keys: &[MasterKey]) -> Result<Self, ColdError> {
        let name = format!("{uuid}/key");
        let failed = |source| ColdError::Key { object: name.clone(), source };
        if let Some(vault) = Self::open(bucket, uuid, keys).await? {
            return Ok(vault);
        }
        // A key that is gone while there are points: another one would make them look like rubbish.
        let mut points = 0;
        let count = |_: &str, _: &object_store::ObjectMeta| {
            points += 1;
            Ok(())
        };
        bucket.list(&format!("{uuid}/points"), count).await?;
        if points > 0 {
            let advice =
                ", but there are points: bring it back (from a copy of the bucket) or export to another prefix";
            return Err(ColdError::Missing { object: name, advice });
        }
        let master = keys.first().ok_or_else(|| failed(KeyError::WrongKey { wanted: KeyId([0; 16]), have: vec![] }))?;
        let key = DataKey::generate().map_err(failed)?;
        let wrapped = key.wrap(master, uuid.as_bytes()).map_err(failed)?;
        if bucket.put_new(&name, key_bytes(uuid, &wrapped)).await? {
            return Ok(Self { bucket: bucket.clone(), uuid, key, under: master.id() });
        }
        // Somebody else was faster.
        let advice = ": it came and went; try again";
        Self::open(bucket, uuid, keys).await?.ok_or(ColdError::Missing { object: name, advice })
    }

    /// Refuses if the bucket has another data key by now, or none: what was sealed under this one could never be opened.
    pub(crate) async fn check_key(&self) -> Result<(), ColdError> {
        let name = self.object("key");
        let bytes = self.bucket.get(&name, KEY_RECORD_BYTES as u64).await?;
        let which = KEY_RECORD_HEAD_BYTES + KEY_ID_BYTES;
        match bytes.as_ref().and_then(|bytes| bytes.get(which..which + KEY_ID_BYTES)) {
            Some(id) if id == self.key.id().0 => Ok(()),
            Some(_) => {
                let what =
                    "another data key has taken its place meanwhile, nothing is exported under this one; run it again";
                Err(ColdError::Damaged { object: name, what: what.to_owned() })
            }
            None => {
                Err(ColdError::Missing { object: name, advice: ": it went meanwhile; bring it back and run it again" })
            }
        }
    }

    /// The master key that the data key is wrapped under.
    pub fn under(&self) -> KeyId {
        self.under
    }

    /// Wraps the data key under this master key, if it is not yet: nothing else has to change. Returns whether it was another.
    pub async fn rewrap(&mut self, master: &MasterKey) -> Result<bool, ColdError> {
        if self.under == master.id() {
            return Ok(false);
        }
        let name = self.object("key");
        let failed = |source| ColdError::Key { object: name.clone(), source };
        let wrapped = self.key.wrap(master, self.uuid.as_bytes()).map_err(failed)?;
        self.bucket.put(&name, key_bytes(self.uuid, &wrapped)).await?;
        // Read again: what everything hangs on must be what it is taken for.
        let bytes = self.bucket.get(&name, KEY_RECORD_BYTES as u64).await?.unwrap_or_default();
        open_key(&name, self.uuid, &bytes, std::slice::from_ref(master))?;
        self.under = master.id();
        Ok(true)
    }

    /// The storage, for messages.
    pub fn shown(&self) -> &str {
        self.bucket.shown()
    }

    /// The domain.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub(crate) fn object(&self, below: &str) -> String {
        format!("{}/{below}", self.uuid)
    }

    /// The points, newest first by the time of their cut. One whose head cannot be read is listed with the reason.
    pub async fn points(&self) -> Result<Vec<StoredPoint>, ColdError> {
        let mut names = self.manifests().await?;
        names.sort_by(|a, b| b.cmp(a));
        let heads = stream::iter(names).map(|(object, written_unix_ns)| async move {
            let head = match self.head(&object).await {
                Ok(head) => Ok(head),
                // One is damaged, the others are as good as they were; a storage that does not answer is another matter.
                Err(error @ ColdError::Store { .. }) => return Err(error),
                Err(error) => Err(error.to_string()),
            };
            Ok(StoredPoint { object, head, written_unix_ns })
        });
        heads.buffered(READS_AT_ONCE).try_collect().await
    }

    /// The names of the manifests there are.
    pub(crate) async fn point_names(&self) -> Result<Vec<String>, ColdError> {
        Ok(self.manifests().await?.into_iter().map(|(name, _)| name).collect())
    }

    /// The same, and when each was written, by the storage's clock (Unix time in ns).
    async fn manifests(&self) -> Result<Vec<(String, u64)>, ColdError> {
        let mut names = Vec::new();
        self.bucket
            .list(&self.object("points"), |below, meta| {
                if names.len() == POINTS_READ_MAX {
                    return Err(ColdError::Limit(format!("{} has more than {POINTS_READ_MAX} points", self.uuid)));
                }
                names.push((format!("points/{below}"), unix_ns(meta)));
                Ok(())
            })
            .await?;
        Ok(names)
    }

    /// Refuses another point where there are too many to be listed in reasonable time.
    pub(crate) async fn check_room(&self) -> Result<(), ColdError> {
        if self.point_names().await?.len() < POINTS_MAX {
            return Ok(());
        }
        let (shown, uuid) = (self.shown(), self.uuid);
        Err(ColdError::Limit(format!(
            "{shown} has {POINTS_MAX} points of {uuid}, and no more are exported: say in `keep` which of them stay, and prune \
             (`vmdr export {uuid} --prune`)"
        )))
    }

    async fn head(&self, object: &str) -> Result<Head, ColdError> {
        let owner = self.uuid.into_bytes();
        let place = Place { kind: MANIFEST, owner: &owner, name: object.as_bytes(), shown: object };
        let mut bytes = HEAD_BYTES_USUAL;
        loop {
            let Some(begin) = self.bucket.begin(&self.object(object), bytes).await? else {
                return Err(ColdError::Missing { object: object.to_owned(), advice: "" });
            };
            match sealed::open_head(&self.key, place, &begin)? {
                Ok(head) => return check_head(place, self.uuid, &head),
                Err(needed) if bytes == HEAD_BYTES_USUAL && needed < (1 << 20) => bytes = needed as u64,
                Err(_) => return Err(place.damaged("it is cut short")),
            }
        }
    }

    /// Whether there is a manifest of this name.
    pub(crate) async fn has_manifest(&self, object: &str) -> Result<bool, ColdError> {
        Ok(self.bucket.head(&self.object(object)).await?.is_some())
    }

    /// Reads a manifest, all of it checked.
    pub async fn manifest(&self, object: &str) -> Result<Manifest, ColdError> {
        let bytes = self.bucket.get(&self.object(object), MANIFEST_BYTES_MAX).await?;
        let advice = ": choose another point (`vmdr import --from URL --list`)";
        let bytes = bytes.ok_or_else(|| ColdError::Missing { object: object.to_owned(), advice })?;
        Manifest::open(&self.key, self.uuid, object, &bytes)
    }

    /// The newest point, or the one of this identity, with its manifest's name. If that one is damaged it is an error: an older
    /// one is not taken unasked.
    pub async fn find(&self, point: Option<&str>) -> Result<(String, Head), ColdError> {
        let points = self.points().await?;
        // A damaged one has its identity in its name still.
        let is_meant = |stored: &StoredPoint| {
            point.is_none_or(|point| stored.object.split_once('-').is_some_and(|(_, id)| id == point))
        };
        let mut meant: Vec<StoredPoint> = points.into_iter().filter(is_meant).collect();
        // Of two lives of the domain there may be points of the same identity.
        let sound = meant.iter().position(|stored| stored.head.is_ok()).filter(|at| point.is_some() || *at == 0);
        let found = if meant.is_empty() { None } else { Some(meant.swap_remove(sound.unwrap_or(0))) };
        match found {
            Some(StoredPoint { object, head: Ok(head), .. }) => Ok((object, head)),
            Some(StoredPoint { object, head: Err(what), .. }) => {
                let advice = "choose another point (`vmdr import --from URL --list`)";
                Err(ColdError::Damaged { object, what: format!("{what}; {advice}") })
            }
            None => Err(ColdError::NoPoint {
                url: self.shown().to_owned(),
                domain: self.uuid.to_string(),
                point: point.map_or_else(|| "point".to_owned(), |point| format!("point {point}")),
            }),
        }
    }

    /// The chunks there are.
    pub(crate) async fn chunks(&self) -> Result<HashMap<Name, StoredChunk>, ColdError> {
        let mut found = HashMap::new();
        self.bucket
            .list(&self.object("chunks"), |below, meta| {
                if let Some(name) = chunk::of_object(below) {
                    let plausible = (chunk::OBJECT_BYTES_MIN..=chunk::OBJECT_BYTES_MAX).contains(&meta.size);
                    found.insert(name, StoredChunk { written_unix_ns: unix_ns(meta), plausible });
                }
                Ok(())
            })
            .await?;
        Ok(found)
    }
}

/// When an object was written, by the storage's clock.
pub(crate) fn unix_ns(meta: &object_store::ObjectMeta) -> u64 {
    meta.last_modified.timestamp_nanos_opt().and_then(|ns| u64::try_from(ns).ok()).unwrap_or(0)
}
