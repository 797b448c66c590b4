//! Numbers that follow from a seed.

use std::env;
use std::time::UNIX_EPOCH;

/// A number from the environment.
///
/// # Panics
/// If it is set to something else.
#[must_use]
pub fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

/// The seed that the environment names, else another one each second; printed, as a test that fails
/// has to name it.
#[must_use]
pub fn seed(variable: &str) -> u64 {
    let fresh = || {
        UNIX_EPOCH
            .elapsed()
            .map_or(0, |time| time.as_secs() % 1_000_000)
    };
    let seed = number(variable).unwrap_or_else(fresh);
    println!("{variable}={seed}");
    seed
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    /// A position among `length`.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }
}
