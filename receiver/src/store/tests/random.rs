//! Choices of a schedule.

/// Numbers that a seed reproduces (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below this.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Zeroes, one byte again and again, or noise.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        match self.below(4) {
            0 => bytes.fill(0),
            1 => bytes.fill(self.next() as u8),
            _ => bytes.chunks_mut(8).for_each(|chunk| {
                let noise = self.next().to_le_bytes();
                let length = chunk.len();
                chunk.copy_from_slice(&noise[..length]);
            }),
        }
    }
}
