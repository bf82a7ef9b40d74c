//! The connection to the witness: made when it is first needed, and anew after it has failed.

use std::time::Duration;

use tokio::sync::Mutex;
use uuid::Uuid;
use vmdr_etcd::{Config, Etcd, WitnessError};
use vmdr_witness::{Allowed, Claim, TTL_MAX, View};

/// The longest that an answer is waited for: shorter than the core does before it asks again.
const ANSWER_MAX: Duration = Duration::from_secs(4);

/// See the module.
#[derive(Debug)]
pub(super) struct Witness {
    config: Config,
    client: Mutex<Option<Etcd>>,
}

impl Witness {
    pub fn new(config: Config) -> Self {
        Witness { config, client: Mutex::default() }
    }

    /// What it has of a domain. An error is a sentence.
    pub async fn look(&self, uuid: Uuid) -> Result<View, String> {
        self.ask(async |etcd| etcd.look(&uuid.to_string()).await).await
    }

    /// Claims the lease of a domain. After an error, a sentence, it is not known whether it was granted.
    ///
    /// The lease is as long as any can be: the agent of this host may come to hold one under the same name, and this one
    /// must not end sooner than that one would have. Nobody waits for its end: from the first claim that is granted on, the
    /// owner in the witness is this site, with the lease or without.
    pub async fn claim(&self, uuid: Uuid, claim: &Claim) -> Result<Allowed, String> {
        self.ask(async |etcd| etcd.claim(&uuid.to_string(), claim, TTL_MAX).await).await
    }

    async fn ask<T>(&self, question: impl AsyncFnOnce(&Etcd) -> Result<T, WitnessError>) -> Result<T, String> {
        let answer = tokio::time::timeout(ANSWER_MAX, async {
            let etcd = self.client().await?;
            question(&etcd).await
        });
        let answer = match answer.await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("witness {}: no answer within {ANSWER_MAX:?}", self.config.endpoints.join(", "))),
        };
        if answer.is_err() {
            // Its certificates may have been replaced.
            *self.client.lock().await = None;
        }
        answer
    }

    async fn client(&self) -> Result<Etcd, WitnessError> {
        if let Some(etcd) = &*self.client.lock().await {
            return Ok(etcd.clone());
        }
        // Without the lock: others need not wait for a connection that does not come about.
        let etcd = Etcd::connect(&self.config).await?;
        *self.client.lock().await = Some(etcd.clone());
        Ok(etcd)
    }
}
