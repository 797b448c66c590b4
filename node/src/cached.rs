//! Which pages to give up first when memory runs short.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use migshm_protocol::{Page, SegmentId};
use rustc_hash::FxHashMap;

/// Pages that are here and have their home elsewhere, in the order in which they came.
///
/// A page that goes leaves its place in the queue behind, with a stamp that is no longer its own.
#[derive(Default, Serialize, Deserialize)]
pub struct Cached {
    stamps: FxHashMap<Page, u64>,
    queue: VecDeque<(u64, Page)>,
    last: u64,
}

impl Cached {
    /// How many pages there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stamps.len()
    }

    /// The page came, or is to stay: it is the youngest.
    pub fn push(&mut self, page: Page) {
        self.last += 1;
        self.stamps.insert(page, self.last);
        self.queue.push_back((self.last, page));
        if self.queue.len() > 2 * self.stamps.len() + 64 {
            let stamps = &self.stamps;
            self.queue
                .retain(|(stamp, page)| stamps.get(page) == Some(stamp));
        }
    }

    /// The page went.
    pub fn remove(&mut self, page: Page) {
        self.stamps.remove(&page);
    }

    /// Takes the oldest page out.
    pub fn pop(&mut self) -> Option<Page> {
        while let Some((stamp, page)) = self.queue.pop_front() {
            if self.stamps.get(&page) == Some(&stamp) {
                self.stamps.remove(&page);
                return Some(page);
            }
        }
        None
    }

    /// All pages of a segment went.
    pub fn remove_segment(&mut self, segment: SegmentId) {
        self.stamps.retain(|page, _| page.segment != segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(index: u32) -> Page {
        Page {
            segment: SegmentId(1),
            index,
        }
    }

    #[test]
    fn a_page_that_comes_and_goes_counts_once_and_takes_no_room() {
        let mut cached = Cached::default();
        cached.push(page(1));
        for _ in 0..10_000 {
            cached.push(page(2));
            cached.remove(page(2));
        }
        cached.push(page(2));
        assert_eq!(cached.len(), 2);
        assert!(cached.queue.len() < 100);
        assert_eq!(
            [cached.pop(), cached.pop(), cached.pop()],
            [Some(page(1)), Some(page(2)), None]
        );
    }
}
