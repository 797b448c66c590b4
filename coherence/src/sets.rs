//! Sets of an extent's pages.

use migshm_protocol::ids::EXTENT_PAGES;
use serde::{Deserialize, Serialize};

/// A set of the pages of one extent, by their index in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageSet([u64; EXTENT_PAGES as usize / 64]);

impl PageSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a page.
    ///
    /// # Panics
    ///
    /// If `page` is not below [`EXTENT_PAGES`].
    pub fn insert(&mut self, page: u32) {
        self.0[page as usize / 64] |= 1 << (page % 64);
    }

    /// Whether it has no member.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    /// Whether a page is a member; no page from [`EXTENT_PAGES`] on is.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.0
            .get(page as usize / 64)
            .is_some_and(|word| word & (1 << (page % 64)) != 0)
    }
}
