//! Samples and what is said of them.

/// Values of one thing measured again and again.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values: Vec<f64>,
}

impl Samples {
    /// One more.
    pub fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// The sum of all.
    pub fn sum(&self) -> f64 {
        self.values.iter().sum()
    }

    /// The value that `per_mille` of 1,000 samples do not exceed (nearest rank); 0 without samples.
    pub fn quantile(&self, per_mille: u32) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * per_mille as usize).div_ceil(1000).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0.0)
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.quantile(500)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self { values: values.into_iter().collect() }
    }
}

/// A number with as many digits as say something.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => group(value.round() as i64),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn group(value: i64) -> String {
    let digits = value.abs().to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0 { format!("-{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples: Samples = (1..=1000).rev().map(f64::from).collect();
        assert_eq!((samples.median(), samples.quantile(990), samples.quantile(999)), (500.0, 990.0, 999.0));
        assert_eq!(samples.quantile(1000), 1000.0);
        let one: Samples = [7.0].into_iter().collect();
        assert_eq!((one.median(), one.quantile(999)), (7.0, 7.0));
        assert_eq!(Samples::default().median(), 0.0);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([1.256, 15.07, 123.4, 1_234_567.0].map(short), ["1.26", "15.1", "123", "1,234,567"]);
    }
}
