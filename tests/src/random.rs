//! Random choices of a test that can be repeated: the seed is printed, and `VMDR_SEED` sets it.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

/// Sets the seed.
pub const SEED_VARIABLE: &str = "VMDR_SEED";
/// Set by `scripts/test --soak`.
pub const SOAK_VARIABLE: &str = "VMDR_SOAK";

/// A generator whose seed has been printed.
pub fn generator(what: &str) -> StdRng {
    seeded(what).1
}

/// A generator whose seed has been printed, and the seed.
pub fn seeded(what: &str) -> (u64, StdRng) {
    let given = std::env::var(SEED_VARIABLE).ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| rand::rng().random());
    println!("{what}: {SEED_VARIABLE}={seed}");
    (seed, StdRng::seed_from_u64(seed))
}

/// A time below `max`.
pub fn below(generator: &mut StdRng, max: Duration) -> Duration {
    Duration::from_secs_f64(generator.random_range(0.0..max.as_secs_f64()))
}

/// How often a test repeats itself: `soak` times under `scripts/test --soak`, else `usual` times.
pub fn rounds(usual: usize, soak: usize) -> usize {
    if std::env::var_os(SOAK_VARIABLE).is_some() { soak } else { usual }
}
