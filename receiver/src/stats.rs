//! Figures of one domain's stream over the last minute and hour. Bounded: a slot per second and per minute.
//!
//! Time is given by the caller, in seconds since any fixed instant, so that nothing here depends on a clock.

use std::collections::VecDeque;

/// Seconds of the short window, and minutes of the long one.
const SLOTS: usize = 60;
/// The link's speed is the mean over this many seconds.
const LINK_WINDOW_S: u64 = 10;

#[derive(Debug, Clone, Copy, Default)]
struct Second {
    at: u64,
    bytes: u64,
    epochs: u64,
    pages: u64,
}

#[derive(Debug, Clone, Copy)]
struct Minute {
    at: u64,
    worst_age_seconds: f64,
}

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    seconds: VecDeque<Second>,
    minutes: VecDeque<Minute>,
}

/// What an operator is told.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Mean over the last minute.
    pub dirty_pages_per_epoch: f64,
    /// Mean over the last minute.
    pub bytes_per_epoch: f64,
    /// Mean over the last seconds.
    pub link_bytes_per_second: f64,
    /// The largest age that the newest recovery point has had.
    pub rpo_worst_hour_seconds: f64,
}

impl Stats {
    fn second(&mut self, now: u64) -> &mut Second {
        if self.seconds.back().is_none_or(|s| s.at < now) {
            self.seconds.push_back(Second { at: now, ..Second::default() });
        }
        while self.seconds.len() > SLOTS {
            self.seconds.pop_front();
        }
        let last = self.seconds.len() - 1;
        &mut self.seconds[last]
    }

    /// Payload came.
    pub fn received(&mut self, now: u64, bytes: u64) {
        self.second(now).bytes += bytes;
    }

    /// Pages came with a part that is durable.
    pub fn durable_pages(&mut self, now: u64, pages: u64) {
        self.second(now).pages += pages;
    }

    /// An epoch is whole. The recovery point before it had reached this age.
    pub fn durable_epoch(&mut self, now: u64, previous_age_seconds: Option<f64>) {
        self.second(now).epochs += 1;
        if let Some(age) = previous_age_seconds {
            self.age(now, age);
        }
    }

    /// The newest recovery point has this age.
    pub fn age(&mut self, now: u64, age_seconds: f64) {
        let minute = now / 60;
        match self.minutes.back_mut() {
            Some(last) if last.at >= minute => last.worst_age_seconds = last.worst_age_seconds.max(age_seconds),
            _ => self.minutes.push_back(Minute { at: minute, worst_age_seconds: age_seconds }),
        }
        while self.minutes.len() > SLOTS {
            self.minutes.pop_front();
        }
    }

    /// The figures now.
    pub fn figures(&self, now: u64) -> Figures {
        let recent = self.seconds.iter().filter(|s| now.saturating_sub(s.at) < SLOTS as u64);
        let (bytes, epochs, pages) = recent.fold((0, 0, 0), |(b, e, p), s| (b + s.bytes, e + s.epochs, p + s.pages));
        let per_epoch = |sum: u64| if epochs == 0 { 0.0 } else { sum as f64 / epochs as f64 };
        // The second under way is not over yet.
        let link = self.seconds.iter().filter(|s| s.at < now && now - s.at <= LINK_WINDOW_S);
        let hour = self.minutes.iter().filter(|m| (now / 60).saturating_sub(m.at) < SLOTS as u64);
        Figures {
            dirty_pages_per_epoch: per_epoch(pages),
            bytes_per_epoch: per_epoch(bytes),
            link_bytes_per_second: link.map(|s| s.bytes).sum::<u64>() as f64 / LINK_WINDOW_S as f64,
            rpo_worst_hour_seconds: hour.map(|m| m.worst_age_seconds).fold(0.0, f64::max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_over_the_last_minute_and_forget() {
        let mut stats = Stats::default();
        for now in 0..10 {
            stats.received(now, 1000);
            stats.durable_pages(now, 30);
            stats.durable_epoch(now, None);
            stats.durable_epoch(now, None);
        }
        let figures = stats.figures(10);
        assert_eq!((figures.bytes_per_epoch, figures.dirty_pages_per_epoch), (500.0, 15.0));
        assert_eq!(figures.link_bytes_per_second, 1000.0);
        assert_eq!(stats.figures(15).link_bytes_per_second, 500.0);
        assert_eq!(stats.figures(80), Figures::default());
    }

    #[test]
    fn the_worst_age_is_kept_for_an_hour() {
        let mut stats = Stats::default();
        stats.age(60, 7.5);
        stats.durable_epoch(61, Some(2.0));
        assert_eq!(stats.figures(3000).rpo_worst_hour_seconds, 7.5);
        stats.age(3600, 1.0);
        assert_eq!(stats.figures(3659).rpo_worst_hour_seconds, 7.5);
        assert_eq!(stats.figures(3660).rpo_worst_hour_seconds, 1.0);
    }

    #[test]
    fn memory_is_bounded() {
        let mut stats = Stats::default();
        for now in 0..100_000 {
            stats.received(now, 1);
            stats.age(now, 1.0);
        }
        assert!(stats.seconds.len() <= SLOTS && stats.minutes.len() <= SLOTS);
    }
}
