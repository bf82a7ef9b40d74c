//! Exports by the clock: each domain that has a recovery point, a few at once, the one first that has waited longest.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use uuid::Uuid;

use crate::activate::run::unix_ns;
use crate::daemon::Receiver;

use super::export::{self, Wanted};

/// Between two looks at what is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// After a failure it is tried again this soon, if an export is not due sooner.
const RETRY_INTERVAL: Duration = Duration::from_secs(300);

/// Exports at once. Where the bytes per second are limited: one, because each export has the limit for itself.
const AT_ONCE: usize = 3;
/// After so many times the interval without an export it is an error.
const OVERDUE: u32 = 2;

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
    let at_once = if config.bytes_per_second == 0 { AT_ONCE } else { 1 };
    let mut exports = JoinSet::new();
    let mut under_way = HashSet::new();
    // Since when each domain is waited for: at first since the start.
    let mut waits: HashMap<Uuid, u64> = HashMap::new();
    let mut told = HashSet::new();
    loop {
        tokio::select! {
            _ = tokio::time::sleep(LOOK_INTERVAL) => {}
            Some(done) = exports.join_next(), if !exports.is_empty() => {
                match done {
                    Ok(uuid) => under_way.remove(&uuid),
                    // It is not known whose it was: the export's own turn keeps two of a domain apart.
                    Err(_) => { under_way.clear(); false }
                };
            }
            _ = ending.wait_for(|ending| *ending) => break,
        }
        let of = Arc::clone(&receiver);
        let Ok(domains) = tokio::task::spawn_blocking(move || of.store.domains()).await else { continue };
        let now_ns = unix_ns(SystemTime::now());
        let mut due_now = Vec::new();
        for domain in domains.iter().filter(|domain| domain.position.epoch > 0) {
            let Ok(uuid) = Uuid::parse_str(&domain.uuid) else { continue };
            if !is_meant(&config.domains, &domain.uuid, &domain.name) {
                continue;
            }
            let exported = export::record(&receiver.domain_directory(uuid)).map_or(0, |record| record.exported_unix_ns);
            let known = receiver.cold.exported(uuid);
            // The same point again is as good as an export: nothing came since.
            let tried_well = if known.error.is_empty() { known.tried_unix_ns } else { 0 };
            let since = *waits.entry(uuid).or_insert(now_ns);
            if !overdue(now_ns, every, exported.max(tried_well).max(since)) {
                told.remove(&uuid);
            } else if told.insert(uuid) {
                tracing::error!(domain = %domain.name, %uuid, every_seconds = config.every_seconds, last = %known.error,
                    "the scheduled export is overdue: raise every_seconds or bytes_per_second, or see why it fails");
            }
            let failed = !known.error.is_empty();
            if !under_way.contains(&uuid) && due(now_ns, every, exported, known.tried_unix_ns, failed) {
                due_now.push((known.tried_unix_ns, uuid, domain.name.clone()));
            }
        }
        due_now.sort();
        for (_, uuid, name) in due_now {
            if exports.len() >= at_once || *receiver.ending().borrow() {
                break;
            }
            under_way.insert(uuid);
            let of = Arc::clone(&receiver);
            // Where all points stay there is little to delete, and to find it every manifest has to be read.
            let wanted = Wanted { point: None, export: true, prune: !config.keep.is_empty() };
            exports.spawn(async move {
                // What became of it is noted and logged there.
                let _ = export::run(&of, (uuid, &name), wanted, &|_| ()).await;
                uuid
            });
        }
    }
    // The receiver's end breaks them off.
    while exports.join_next().await.is_some() {}
}

/// Whether the last export, or what is waited for since, is far too long ago.
fn overdue(now_ns: u64, every: Duration, since_ns: u64) -> bool {
    u128::from(now_ns.saturating_sub(since_ns)) > (every * OVERDUE).as_nanos()
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
        assert!(!overdue(9_000 * second, hour, 2_000 * second) && overdue(9_300 * second, hour, 2_000 * second));
        let wanted = ["web1".to_owned(), "4558469E-4501-400c-b892-00faab0db21d".to_owned()];
        assert!(is_meant(&[], "x", "y") && is_meant(&wanted, "x", "web1"));
        assert!(is_meant(&wanted, "4558469e-4501-400c-b892-00faab0db21d", "") && !is_meant(&wanted, "x", "web2"));
    }
}
