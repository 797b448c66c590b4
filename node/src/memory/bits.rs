//! Sets of pages of one segment.

use serde::{Deserialize, Serialize};

/// A set of page indexes, as large as its largest.
#[derive(Default, Serialize, Deserialize)]
pub struct Bits(Vec<u64>);

impl Bits {
    /// Puts an index in, or takes it out.
    pub fn set(&mut self, index: u32, on: bool) {
        let (word, bit) = (index as usize / 64, 1 << (index % 64));
        if on {
            if self.0.len() <= word {
                self.0.resize(word + 1, 0);
            }
            self.0[word] |= bit;
        } else if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Whether an index is in the set.
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        let word = self.0.get(index as usize / 64);
        word.is_some_and(|word| word & 1 << (index % 64) != 0)
    }

    /// Runs of neighbours: first index and length.
    #[must_use]
    pub fn runs(&self) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for (word, bits) in (0u32..).zip(&self.0) {
            for index in (0..64)
                .filter(|bit| bits & (1 << bit) != 0)
                .map(|bit| word * 64 + bit)
            {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == index => *count += 1,
                    _ => runs.push((index, 1)),
                }
            }
        }
        runs
    }
}
