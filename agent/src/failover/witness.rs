//! The witness, connected to when it is first asked.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use vmdr_etcd::{Config, Etcd};
use vmdr_witness::{Allowed, Claim};

/// Clones share the connection.
#[derive(Clone, Debug)]
pub struct Witness {
    config: Arc<Config>,
    etcd: Arc<Mutex<Option<Etcd>>>,
}

impl Witness {
    /// With these settings.
    pub fn new(config: Config) -> Self {
        Self { config: Arc::new(config), etcd: Arc::default() }
    }

    async fn etcd(&self) -> Result<Etcd, String> {
        let mut etcd = self.etcd.lock().await;
        if let Some(etcd) = &*etcd {
            return Ok(etcd.clone());
        }
        let connected = Etcd::connect(&self.config).await.map_err(|error| error.to_string())?;
        Ok(etcd.insert(connected).clone())
    }

    /// Claims or renews the lease of a domain. An error: it is not known whether it was granted.
    pub async fn claim(&self, uuid: &str, claim: &Claim) -> Result<Allowed, String> {
        let ttl = Duration::from_secs(self.config.lease_seconds);
        self.etcd().await?.claim(uuid, claim, ttl).await.map_err(|error| error.to_string())
    }

    /// Whether it answers.
    pub async fn look(&self, uuid: &str) -> Result<(), String> {
        self.etcd().await?.look(uuid).await.map(drop).map_err(|error| error.to_string())
    }

    /// Gives up the lease of a domain, so that nobody has to wait for its end.
    pub async fn release(&self, uuid: &str, holder: &str) -> Result<(), String> {
        self.etcd().await?.release(uuid, holder).await.map_err(|error| error.to_string())
    }
}
