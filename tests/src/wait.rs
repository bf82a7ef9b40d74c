//! Waiting with a limit, and saying what for.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const POLL_MS: u64 = 20;

/// Looks at `condition` until it gives a value, for at most `limit`. An error of the condition ends the wait at once.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("{what}: not within {:.0} s", limit.as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(POLL_MS));
    }
}
