//! Sets of a segment's pages, of bounded size.

use std::collections::BTreeMap;

use super::{MAX_RUNS, Runs};

/// A set of pages, as runs of neighbours.
///
/// A set that would come to more than [`MAX_RUNS`] runs has neighbouring runs joined, with what is
/// between them: it says of pages that they changed which did not, never the contrary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct RunSet {
    /// Where each run begins, and ends.
    runs: BTreeMap<u32, u32>,
}

impl RunSet {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Adds `count` pages from `first` on.
    pub fn insert(&mut self, first: u32, count: u32) {
        let (mut start, mut end) = (first, first.saturating_add(count));
        if start == end {
            return;
        }
        while let Some((&from, &to)) = self.runs.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.runs.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        self.runs.insert(start, end);
        if self.runs.len() > MAX_RUNS {
            self.coarsen();
        }
    }

    /// Joins every second run with the one before.
    fn coarsen(&mut self) {
        let runs: Vec<(u32, u32)> = std::mem::take(&mut self.runs).into_iter().collect();
        let joined = runs
            .chunks(2)
            .map(|pair| (pair[0].0, pair[pair.len() - 1].1));
        self.runs = joined.collect();
    }

    /// The runs, in ascending order.
    #[must_use]
    pub fn runs(&self) -> Runs {
        let runs = self.runs.iter();
        runs.map(|(&start, &end)| (start, end - start)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_run() {
        let mut pages = RunSet::default();
        for (first, count) in [
            (4, 2),
            (10, 1),
            (0, 0),
            (6, 1),
            (2, 2),
            (9, 1),
            (11, 5),
            (20, 1),
        ] {
            pages.insert(first, count);
        }
        assert_eq!(pages.runs(), [(2, 5), (9, 7), (20, 1)]);
        pages.insert(3, 30);
        assert_eq!(pages.runs(), [(2, 31)]);
    }

    #[test]
    fn no_page_is_forgotten_however_many_there_are() {
        let mut pages = RunSet::default();
        let mut all = std::collections::BTreeSet::new();
        for step in 0..30_000u32 {
            let first = 7 * (step.wrapping_mul(2_654_435_761) % 100_000);
            let count = step % 3;
            pages.insert(first, count);
            all.extend(first..first + count);
        }
        let runs = pages.runs();
        assert!(runs.len() <= MAX_RUNS);
        assert!(
            runs.windows(2)
                .all(|pair| pair[0].0 + pair[0].1 < pair[1].0)
        );
        for page in all {
            assert!(
                runs.iter()
                    .any(|&(first, count)| (first..first + count).contains(&page))
            );
        }
    }
}
