//! Exports by the clock: each domain that has a recovery point, one after another.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::activate::run::unix_ns;
use crate::daemon::Receiver;

use super::export::{self, Wanted};

/// Between two looks at what is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// After a failure it is tried again this soon, if an export is not due sooner.
const RETRY_INTERVAL: Duration = Duration::from_secs(300);

/// Names and UUIDs told from one another: case does not matter in a UUID.
fn is_meant(wanted: &[String], uuid: &str, name: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|wanted| wanted == name || wanted.eq_ignore_ascii_case(uuid))
}

/// Whether an export is due: `exported_ns` is when the last one ended well (0: never), `tried_ns` when one was last tried.
fn due(now_ns: u64, every: Duration, exported_ns: u64, tried_ns: u64, failed: bool) -> bool {
    // A time to come is one of a clock that was wrong: it is not waited for.
    let passed = |since: u64, time: Duration| since > now_ns || now_ns - since >= time.as_nanos() as u64;
    // What failed may be the prune alone, for ever even, where objects are locked: that is no reason to export more often.
    passed(exported_ns, every) && passed(tried_ns, if failed { every.min(RETRY_INTERVAL) } else { every })
}

/// Runs until the receiver ends.
pub async fn run(receiver: Arc<Receiver>) {
    let config = receiver.cold.config.clone();
    if config.every_seconds == 0 {
        return;
    }
    let every = Duration::from_secs(config.every_seconds);
    let mut ending = receiver.ending();
    loop {
        tokio::select! {
            _ = tokio::time::sleep(LOOK_INTERVAL) => {}
            _ = ending.wait_for(|ending| *ending) => return,
        }
        let of = Arc::clone(&receiver);
        let Ok(domains) = tokio::task::spawn_blocking(move || of.store.domains()).await else { continue };
        for domain in domains.iter().filter(|domain| domain.position.epoch > 0) {
            let Ok(uuid) = Uuid::parse_str(&domain.uuid) else { continue };
            if !is_meant(&config.domains, &domain.uuid, &domain.name) {
                continue;
            }
            let exported = export::record(&receiver.domain_directory(uuid)).map_or(0, |record| record.exported_unix_ns);
            let known = receiver.cold.exported(uuid);
            let failed = !known.error.is_empty();
            if due(unix_ns(SystemTime::now()), every, exported, known.tried_unix_ns, failed)
                && !*receiver.ending().borrow()
            {
                // Where all points stay there is little to delete, and to find it every manifest has to be read.
                let wanted = Wanted { point: None, export: true, prune: !config.keep.is_empty() };
                // What became of it is noted and logged there.
                let _ = export::run(&receiver, (uuid, &domain.name), wanted, &|_| ()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_due_when_the_last_is_long_ago() {
        let (hour, second) = (Duration::from_secs(3600), 1_000_000_000);
        assert!(due(10_000 * second, hour, 0, 0, false));
        assert!(!due(10_000 * second, hour, 9_000 * second, 0, false));
        assert!(due(13_000 * second, hour, 9_000 * second, 9_000 * second, false));
        // The same point again: it was there, nothing new was noted.
        assert!(!due(13_000 * second, hour, 9_000 * second, 12_000 * second, false));
        assert!(!due(13_000 * second, hour, 9_000 * second, 12_900 * second, true));
        assert!(due(13_200 * second, hour, 9_000 * second, 12_900 * second, true));
        // It was exported, and the prune after it failed.
        assert!(!due(13_200 * second, hour, 12_800 * second, 12_900 * second, true));
        // The clock was put back.
        assert!(due(13_000 * second, hour, 90_000 * second, 80_000 * second, false));
        assert!(!due(13_000 * second, hour, 90_000 * second, 12_000 * second, false));
        let wanted = ["web1".to_owned(), "4558469E-4501-400c-b892-00faab0db21d".to_owned()];
        assert!(is_meant(&[], "x", "y") && is_meant(&wanted, "x", "web1"));
        assert!(is_meant(&wanted, "4558469e-4501-400c-b892-00faab0db21d", "") && !is_meant(&wanted, "x", "web2"));
    }
}
