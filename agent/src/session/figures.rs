//! What an operator wants to know of a protected domain, collected as it happens.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vmdr_proto::shim::Timing;

/// Cuts kept for percentiles and means: a minute and more at 100 ms.
const CUTS_MAX: usize = 4096;
/// What "lately" means for means and percentiles.
const LATELY: Duration = Duration::from_secs(60);
/// How long the worst RPO is remembered.
const WORST_MINUTES: u64 = 60;

#[derive(Clone, Copy, Debug)]
struct CutFigures {
    at: Instant,
    pause_ns: u64,
    pages: u64,
    bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Figures {
    started: Instant,
    cuts: VecDeque<CutFigures>,
    /// (minute since the start, worst RPO in it in seconds).
    worst: VecDeque<(u64, f64)>,
    sent: VecDeque<(Instant, u64)>,
    durable_cut_unix_ns: u64,
    /// Bytes of payloads ever sent.
    pub sent_bytes: u64,
    /// Bytes of disk content ever sent, before they were compressed.
    pub sent_disk_bytes: u64,
    /// Cuts ever made.
    pub cuts_total: u64,
    /// Nanoseconds that pauses have taken in all.
    pub paused_ns_total: u64,
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            cuts: VecDeque::new(),
            worst: VecDeque::new(),
            sent: VecDeque::new(),
            durable_cut_unix_ns: 0,
            sent_bytes: 0,
            sent_disk_bytes: 0,
            cuts_total: 0,
            paused_ns_total: 0,
        }
    }
}

impl Figures {
    /// A cut was made and encoded.
    pub fn cut(&mut self, timing: &Timing, pages: u64, bytes: u64) {
        if self.cuts.len() == CUTS_MAX {
            self.cuts.pop_front();
        }
        self.cuts.push_back(CutFigures { at: Instant::now(), pause_ns: timing.pause_ns, pages, bytes });
        self.cuts_total += 1;
        self.paused_ns_total += timing.pause_ns;
    }

    /// A pause that was no cut.
    pub fn pause(&mut self, timing: &Timing) {
        self.paused_ns_total += timing.pause_ns;
    }

    /// Payload bytes went out.
    pub fn sent(&mut self, bytes: u64) {
        self.sent_bytes += bytes;
        let now = Instant::now();
        self.sent.push_back((now, bytes));
        while self.sent.len() > CUTS_MAX || self.sent.front().is_some_and(|(at, _)| now - *at > LATELY) {
            self.sent.pop_front();
        }
    }

    /// A recovery point has become durable.
    pub fn durable(&mut self, cut_unix_ns: u64) {
        self.observe_rpo();
        self.durable_cut_unix_ns = cut_unix_ns;
    }

    /// The wall clock at the newest recovery point's cut; 0: none is known.
    pub fn durable_cut_unix_ns(&self) -> u64 {
        self.durable_cut_unix_ns
    }

    /// Looks at the RPO now, for the worst of the hour. Call it at least every second.
    pub fn observe_rpo(&mut self) {
        let Some(rpo) = self.rpo_seconds() else { return };
        let minute = self.started.elapsed().as_secs() / 60;
        match self.worst.back_mut() {
            Some((at, worst)) if *at == minute => *worst = worst.max(rpo),
            _ => self.worst.push_back((minute, rpo)),
        }
        while self.worst.front().is_some_and(|(at, _)| at + WORST_MINUTES < minute) {
            self.worst.pop_front();
        }
    }

    /// Age of the newest recovery point; none yet: nothing.
    pub fn rpo_seconds(&self) -> Option<f64> {
        if self.durable_cut_unix_ns == 0 {
            return None;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Some((now as f64 - self.durable_cut_unix_ns as f64).max(0.0) / 1e9)
    }

    /// The worst RPO of the last hour.
    pub fn rpo_worst_seconds(&self) -> f64 {
        let now = self.rpo_seconds().unwrap_or(0.0);
        self.worst.iter().map(|(_, worst)| *worst).fold(now, f64::max)
    }

    /// Pause of the `quantile` (0..=1) of the cuts of the last minute, in seconds.
    pub fn pause_seconds(&self, quantile: f64) -> f64 {
        let mut pauses: Vec<u64> = self.lately().map(|cut| cut.pause_ns).collect();
        if pauses.is_empty() {
            return 0.0;
        }
        pauses.sort_unstable();
        let index = (quantile * (pauses.len() - 1) as f64).round() as usize;
        pauses[index] as f64 / 1e9
    }

    /// Part of the last minute that pauses took.
    pub fn paused_ratio(&self) -> f64 {
        let window = self.started.elapsed().min(LATELY).as_secs_f64();
        let paused: u64 = self.lately().map(|cut| cut.pause_ns).sum();
        if window > 0.0 { paused as f64 / 1e9 / window } else { 0.0 }
    }

    /// Mean pages of an epoch in the last minute.
    pub fn pages_per_epoch(&self) -> f64 {
        mean(self.lately().map(|cut| cut.pages))
    }

    /// Mean bytes on the wire of an epoch in the last minute.
    pub fn bytes_per_epoch(&self) -> f64 {
        mean(self.lately().map(|cut| cut.bytes))
    }

    /// Bytes on the wire per second in the last minute.
    pub fn link_bytes_per_second(&self) -> f64 {
        let window = self.started.elapsed().min(LATELY).as_secs_f64().max(1.0);
        self.sent.iter().filter(|(at, _)| at.elapsed() <= LATELY).map(|(_, bytes)| *bytes as f64).sum::<f64>() / window
    }

    fn lately(&self) -> impl Iterator<Item = &CutFigures> {
        self.cuts.iter().filter(|cut| cut.at.elapsed() <= LATELY)
    }
}

fn mean(values: impl Iterator<Item = u64>) -> f64 {
    let (sum, count) = values.fold((0_u64, 0_u64), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum as f64 / count as f64 }
}
