//! Nothing is sent for a while, on purpose: the receiver is told, since silence is an alarm there.
//!
//! What is said counts until a stream is opened again. It can arrive late, after that: so it is said with a token of the
//! receiver's that changes with each stream (`Rest` in `replication.proto`), and the session lets go of [`Resting`] before it
//! opens one.

use std::time::Duration;

use tokio::task::JoinHandle;
use vmdr_proto::replication::RestRequest;
use vmdr_trust::Trust;

use super::Worker;
use crate::link::Questions;
use crate::registry::Protection;

/// How long the receiver may take to hear of it.
const LIMIT: Duration = Duration::from_secs(5);
/// Rest before it is told again, when it could not be.
const RETRY: Duration = Duration::from_secs(10);
/// The first is answered with a token.
const ATTEMPTS: u32 = 4;

/// Tells the receiver, until it knows; dropping this ends that.
#[derive(Debug)]
pub(super) struct Resting(JoinHandle<()>);

impl Drop for Resting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells the receiver once that nothing will be sent, and why.
pub async fn tell(trust: &Trust, protection: &Protection, why: &str) -> Result<(), String> {
    let told = async {
        let mut receiver = Questions::connect(trust, &protection.receiver).await?;
        let mut token = 0;
        for _ in 0..ATTEMPTS {
            let request = RestRequest { domain_uuid: protection.uuid.clone(), why: why.to_owned(), token };
            let reply = receiver.rest(request).await?;
            if reply.applied {
                return Ok(());
            }
            token = reply.token;
        }
        Err(format!("receiver {}: streams of the domain are opened all the time", protection.receiver))
    };
    let late = |_| Err(format!("receiver {} did not answer within {LIMIT:?}", protection.receiver));
    tokio::time::timeout(LIMIT, told).await.unwrap_or_else(late)
}

impl Worker {
    /// Has the receiver told that nothing will be sent, now or when it can be reached.
    pub(super) fn rests(&mut self, why: String) {
        let (trust, protection) = (self.trust.clone(), self.protection.clone());
        self.resting = Some(Resting(self.runtime.spawn(async move {
            let mut said = false;
            while let Err(error) = tell(&trust, &protection, &why).await {
                if !said {
                    let domain = &protection.name;
                    tracing::warn!(
                        domain,
                        "tell the receiver that {why}, so that it raises no alarm: {error}; tried again"
                    );
                    said = true;
                }
                tokio::time::sleep(RETRY).await;
            }
        })));
    }

    /// Waits until it has been told, for a moment.
    pub(super) fn wait_rests(&mut self) {
        if let Some(Resting(task)) = &mut self.resting {
            // One that cannot be told now is told later.
            let _ = self.runtime.block_on(async { tokio::time::timeout(LIMIT, task).await });
        }
    }
}
