//! A limit on bytes per second.

use std::time::Duration;

use tokio::time::Instant;

/// Lets bytes go at a rate: what was let go is waited for before the next.
#[derive(Debug)]
pub struct Limit {
    bytes_per_second: u64,
    free_at: Instant,
}

impl Limit {
    /// 0: no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Instant::now() }
    }

    /// Waits for the turn of this many bytes.
    pub async fn take(&mut self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        tokio::time::sleep_until(self.free_at).await;
        // What was not used while nothing was to be sent is not saved up.
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.free_at = Instant::now().max(self.free_at) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_cost_their_time() {
        let begun = Instant::now();
        let mut limit = Limit::new(1_000_000);
        for _ in 0..5 {
            limit.take(5_000).await;
        }
        // Five turns of 5 ms, the last of which is not waited for.
        assert!(begun.elapsed() >= Duration::from_millis(20));
        assert!(limit.free_at >= begun + Duration::from_millis(25));
        let mut none = Limit::new(0);
        none.take(u64::MAX).await;
    }
}
