//! A set of small units (pages of memory, granules of a disk), of fixed size.

/// A bitmap that knows how many bits are set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: u64,
    set: u64,
}

impl Bitmap {
    /// `bits` units, none of them set.
    pub fn new(bits: u64) -> Self {
        Self { words: vec![0; bits.div_ceil(64) as usize], bits, set: 0 }
    }

    /// How many units there are.
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Whether there are no units at all.
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// How many units are set.
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Whether a unit is set.
    pub fn contains(&self, unit: u64) -> bool {
        unit < self.bits && self.words[(unit / 64) as usize] >> (unit % 64) & 1 == 1
    }

    /// Sets `count` units from `first`. What lies beyond the end is ignored.
    pub fn insert(&mut self, first: u64, count: u64) {
        self.change(first, count, |word, mask| word | mask);
    }

    /// Sets the units of `bits`, the lowest of which is unit 64 * `index`. What lies beyond the end is ignored.
    pub fn insert_word(&mut self, index: u64, bits: u64) {
        let left = self.bits.saturating_sub(index.saturating_mul(64));
        if left == 0 {
            return;
        }
        let bits = if left < 64 { bits & ((1 << left) - 1) } else { bits };
        let word = &mut self.words[index as usize];
        self.set += u64::from((bits & !*word).count_ones());
        *word |= bits;
    }

    /// Clears `count` units from `first`.
    pub fn remove(&mut self, first: u64, count: u64) {
        self.change(first, count, |word, mask| word & !mask);
    }

    /// Sets every unit.
    pub fn fill(&mut self) {
        self.insert(0, self.bits);
    }

    /// Clears every unit.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.set = 0;
    }

    /// The first run of set units at or after `from`, at most `limit` long: (first, count).
    pub fn next_run(&self, from: u64, limit: u64) -> Option<(u64, u64)> {
        let first = self.find(from, true)?;
        let end = self.find(first, false).unwrap_or(self.bits);
        Some((first, (end - first).min(limit)))
    }

    /// All runs of set units.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, u64::MAX)?;
            from = run.0 + run.1;
            Some(run)
        })
    }

    fn change(&mut self, first: u64, count: u64, apply: impl Fn(u64, u64) -> u64) {
        let end = first.saturating_add(count).min(self.bits);
        let mut at = first;
        while at < end {
            let bit = at % 64;
            let n = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - n)) << bit;
            let word = &mut self.words[(at / 64) as usize];
            let new = apply(*word, mask);
            self.set = self.set + u64::from(new.count_ones()) - u64::from(word.count_ones());
            *word = new;
            at += n;
        }
    }

    fn find(&self, from: u64, value: bool) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let mut index = (from / 64) as usize;
        let flip = if value { 0 } else { u64::MAX };
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let at = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (at < self.bits).then_some(at);
            }
            index += 1;
            word = *self.words.get(index)? ^ flip;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_word_is_its_bits(bits in 1u64..200, before in any::<u64>(), index in 0u64..5, word in any::<u64>()) {
            let mut bitmap = Bitmap::new(bits);
            bitmap.insert(before % bits, 3);
            let mut model = bitmap.clone();
            bitmap.insert_word(index, word);
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                model.insert(index * 64 + bit, 1);
            }
            prop_assert_eq!(bitmap, model);
        }

        #[test]
        fn behaves_like_a_vector(bits in 1u64..300, ops in proptest::collection::vec((any::<bool>(), 0u64..320, 0u64..200), 0..40)) {
            let mut bitmap = Bitmap::new(bits);
            let mut model = vec![false; bits as usize];
            for (insert, first, count) in ops {
                if insert { bitmap.insert(first, count) } else { bitmap.remove(first, count) }
                for at in first..(first + count).min(bits) {
                    model[at as usize] = insert;
                }
                prop_assert_eq!(bitmap.count(), model.iter().filter(|b| **b).count() as u64);
                let mut seen = vec![false; bits as usize];
                let mut last_end = None;
                for (first, count) in bitmap.runs() {
                    prop_assert!(count > 0);
                    prop_assert!(last_end.is_none_or(|end| end < first), "runs are maximal and ascend");
                    last_end = Some(first + count);
                    seen[first as usize..(first + count) as usize].fill(true);
                }
                prop_assert_eq!(&seen, &model);
                for unit in 0..bits + 2 {
                    prop_assert_eq!(bitmap.contains(unit), model.get(unit as usize).copied().unwrap_or(false));
                }
            }
        }
    }
}
