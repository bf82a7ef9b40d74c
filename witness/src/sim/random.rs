//! SplitMix64: the same numbers from the same seed for ever, whatever version of whatever crate.

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    pub(crate) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True in so many of 1,000 cases.
    pub(crate) fn per_mille(&mut self, of_1000: u64) -> bool {
        self.next() % 1000 < of_1000
    }

    /// Milliseconds as microseconds, short ones as likely as long ones in proportion.
    pub(crate) fn spread_ms(&mut self, low: u64, high: u64) -> u64 {
        let octaves = (high / low).max(1).ilog2();
        let low = low << self.range(0, u64::from(octaves));
        self.range(low, (low * 2).min(high)) * 1000
    }
}
