//! The witness of `vmdr-witness` in etcd: for each domain a key that says who owns it, and one that lives as long as a lease.
//!
//! | key | value | lives |
//! | --- | --- | --- |
//! | `PREFIX/UUID/owner` | `{"generation":2,"holder":"ID"}` | for ever; it only goes up |
//! | `PREFIX/UUID/lease` | the holder's id | as long as the lease that it was written with |
//!
//! **A lease is renewed by claiming it again**, with a lease of its own, in a transaction that compares the revisions of both keys
//! with those that were read. etcd's keep-alive is not used: it does not go through a majority, so that a leader that has been
//! cut off (and does not know it yet) answers it while the others have elected another and let the lease end. (Versions that
//! check are 3.4.28 and 3.5.10; Debian 12 has 3.4.23.) A transaction is granted by a majority or not at all.

mod config;

use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Identity, KeyValue, PutOptions, TlsOptions, Txn, TxnOp,
    TxnOpResponse,
};
use vmdr_witness::{Allowed, Claim, Owner, View, allows};

pub use config::{Config, ConfigError};

/// Somebody else may change the keys between reading and writing: then it is read again, so many times.
const ATTEMPTS: u32 = 3;
/// The longest value of a key that is looked at.
const VALUE_BYTES_MAX: usize = 4096;

/// Why there is no answer. Whether a claim was granted is then not known.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// Files of certificates cannot be read.
    #[error("witness: read {path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What went wrong.
        source: std::io::Error,
    },
    /// etcd refused, or cannot be reached.
    #[error("witness {endpoints}: {source}")]
    Etcd {
        /// Those that were asked.
        endpoints: String,
        /// What it said.
        source: Box<etcd_client::Error>,
    },
    /// It did not answer in time.
    #[error("witness {endpoints}: no answer within {limit:?}")]
    Late {
        /// Those that were asked.
        endpoints: String,
        /// How long they had.
        limit: Duration,
    },
    /// A key has a value that this version cannot have written.
    #[error("witness: key {key} has a value that is not understood; `etcdctl get {key}` shows it")]
    Damaged {
        /// The key.
        key: String,
    },
    /// etcd gave a shorter lease than was asked for, or others change the keys all the time.
    #[error("witness {endpoints}: {what}")]
    Unusable {
        /// Those that were asked.
        endpoints: String,
        /// What is wrong.
        what: String,
    },
}

/// A connection, which looks for its endpoints again by itself.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
    prefix: String,
    endpoints: String,
    limit: Duration,
}

/// What was read, and in which revisions: 0 where a key is not there.
struct Read {
    view: View,
    owner_revision: i64,
    lease_revision: i64,
    lease_id: i64,
}

impl Etcd {
    /// Connects, or at least makes ready to: an etcd that is not there is found out by the first question.
    pub async fn connect(config: &Config) -> Result<Self, WitnessError> {
        let limit = config.timeout();
        let mut options = ConnectOptions::new()
            .with_connect_timeout(limit)
            .with_timeout(limit)
            .with_keep_alive(limit, limit)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some((user, password)) = config.user().map_err(file)? {
            // Tokens end by themselves after some minutes.
            options = options.with_user(user, password).with_auto_token_refresh(true);
        }
        if let Some(tls) = tls(config)? {
            options = options.with_tls(tls);
        }
        let endpoints = config.endpoints.join(", ");
        let connecting = Client::connect(&config.endpoints, Some(options));
        let client = match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(client)) => client,
            Ok(Err(source)) => return Err(WitnessError::Etcd { endpoints, source: Box::new(source) }),
            Err(_) => return Err(WitnessError::Late { endpoints, limit }),
        };
        Ok(Self { client, prefix: config.prefix.trim_end_matches('/').to_owned(), endpoints, limit })
    }

    /// What there is of a domain, as a majority has it.
    pub async fn look(&self, uuid: &str) -> Result<View, WitnessError> {
        self.within(self.read(uuid)).await.map(|read| read.view)
    }

    /// Claims the lease of a domain, or renews it, if what the claim goes by is there, for `ttl` (whole seconds; rounded up) from some moment after this was called.
    /// An error: it is not known whether it was granted.
    pub async fn claim(&self, uuid: &str, claim: &Claim, ttl: Duration) -> Result<Allowed, WitnessError> {
        self.within(self.try_claim(uuid, claim, ttl)).await
    }

    /// Ends the lease of a domain, if this holder has it. Who owned it last stays.
    pub async fn release(&self, uuid: &str, holder: &str) -> Result<(), WitnessError> {
        self.within(async {
            let read = self.read(uuid).await?;
            if read.view.lease.as_deref() == Some(holder) && read.lease_id != 0 {
                self.client.clone().lease_revoke(read.lease_id).await.map_err(|error| self.etcd(error))?;
            }
            Ok(())
        })
        .await
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, WitnessError>>) -> Result<T, WitnessError> {
        let late = |_| WitnessError::Late { endpoints: self.endpoints.clone(), limit: self.limit };
        tokio::time::timeout(self.limit, work).await.map_err(late)?
    }

    async fn try_claim(&self, uuid: &str, claim: &Claim, ttl: Duration) -> Result<Allowed, WitnessError> {
        for _ in 0..ATTEMPTS {
            let read = self.read(uuid).await?;
            let allowed = allows(&read.view, claim);
            if allowed != Allowed::Yes {
                return Ok(allowed);
            }
            if self.write(uuid, claim, ttl, &read).await? {
                return Ok(Allowed::Yes);
            }
        }
        Err(self.unusable(format!("others change the keys of {uuid} all the time")))
    }

    /// Whether the keys were still as they had been read.
    async fn write(&self, uuid: &str, claim: &Claim, ttl: Duration, read: &Read) -> Result<bool, WitnessError> {
        let mut client = self.client.clone();
        let seconds = i64::try_from(ttl.as_nanos().div_ceil(1_000_000_000)).unwrap_or(i64::MAX);
        let lease = client.lease_grant(seconds, None).await.map_err(|error| self.etcd(error))?;
        let (owner_key, lease_key) = (self.key(uuid, "owner"), self.key(uuid, "lease"));
        let written = if lease.ttl() < seconds {
            Err(self.unusable(format!("a lease of {} s was granted, {seconds} s were asked for", lease.ttl())))
        } else {
            let owner = Owner { generation: claim.generation, holder: claim.holder.clone() };
            let damaged = |_| WitnessError::Damaged { key: owner_key.clone() };
            let owner = serde_json::to_vec(&owner).map_err(damaged)?;
            let held = PutOptions::new().with_lease(lease.id());
            let transaction = Txn::new()
                .when([
                    Compare::mod_revision(owner_key.clone(), CompareOp::Equal, read.owner_revision),
                    Compare::mod_revision(lease_key.clone(), CompareOp::Equal, read.lease_revision),
                ])
                .and_then([
                    TxnOp::put(owner_key.clone(), owner, None),
                    TxnOp::put(lease_key.clone(), claim.holder.clone(), Some(held)),
                ]);
            client.txn(transaction).await.map(|answer| answer.succeeded()).map_err(|error| self.etcd(error))
        };
        // The lease before this one, to which no key belongs any more, or the new one, which got none. They end by themselves too.
        let surplus = match &written {
            Ok(true) => read.lease_id,
            Ok(false) => lease.id(),
            // It may have been granted.
            Err(_) => 0,
        };
        if surplus != 0 {
            let _ = client.lease_revoke(surplus).await;
        }
        written
    }

    async fn read(&self, uuid: &str) -> Result<Read, WitnessError> {
        let (owner_key, lease_key) = (self.key(uuid, "owner"), self.key(uuid, "lease"));
        let both = [TxnOp::get(owner_key.clone(), None), TxnOp::get(lease_key.clone(), None)];
        // Both of one moment.
        let answer = self.client.clone().txn(Txn::new().and_then(both)).await.map_err(|error| self.etcd(error))?;
        let (mut owner, mut lease) = (None, None);
        for response in answer.op_responses() {
            let TxnOpResponse::Get(mut got) = response else { continue };
            for kv in got.take_kvs() {
                match kv.key() {
                    key if key == owner_key.as_bytes() => owner = Some(kv),
                    key if key == lease_key.as_bytes() => lease = Some(kv),
                    _ => {}
                }
            }
        }
        let revision = |kv: &Option<KeyValue>| kv.as_ref().map_or(0, KeyValue::mod_revision);
        let (owner_revision, lease_revision) = (revision(&owner), revision(&lease));
        let lease_id = lease.as_ref().map_or(0, KeyValue::lease);
        let damaged = |key: &str| WitnessError::Damaged { key: key.to_owned() };
        let fits = |kv: &KeyValue| kv.value().len() <= VALUE_BYTES_MAX;
        let owner = match owner.filter(fits) {
            Some(kv) => Some(serde_json::from_slice::<Owner>(kv.value()).map_err(|_| damaged(&owner_key))?),
            None if owner_revision != 0 => return Err(damaged(&owner_key)),
            None => None,
        };
        let lease = match lease.filter(fits) {
            Some(kv) => Some(String::from_utf8(kv.value().to_vec()).map_err(|_| damaged(&lease_key))?),
            None if lease_revision != 0 => return Err(damaged(&lease_key)),
            None => None,
        };
        Ok(Read { view: View { owner, lease }, owner_revision, lease_revision, lease_id })
    }

    fn key(&self, uuid: &str, what: &str) -> String {
        format!("{}/{uuid}/{what}", self.prefix)
    }

    fn etcd(&self, source: etcd_client::Error) -> WitnessError {
        WitnessError::Etcd { endpoints: self.endpoints.clone(), source: Box::new(source) }
    }

    fn unusable(&self, what: String) -> WitnessError {
        WitnessError::Unusable { endpoints: self.endpoints.clone(), what }
    }
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

fn file((path, source): (String, std::io::Error)) -> WitnessError {
    WitnessError::File { path, source }
}

fn tls(config: &Config) -> Result<Option<TlsOptions>, WitnessError> {
    let Some(files) = config.tls_files().map_err(file)? else { return Ok(None) };
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(files.ca));
    if let Some((certificate, key)) = files.own {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    Ok(Some(tls))
}
