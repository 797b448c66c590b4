//! Consecutive pages: what one system call is told of.

use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::{Page, SegmentId};

use super::PAGE;

/// Consecutive pages of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The segment.
    pub segment: SegmentId,
    /// Index of the first page.
    pub first: u32,
    /// How many.
    pub pages: u32,
}

impl Range {
    /// So many pages from one on.
    #[must_use]
    pub fn of(page: Page, pages: u32) -> Range {
        Range {
            segment: page.segment,
            first: page.index,
            pages,
        }
    }

    /// The pages.
    pub fn iter(self) -> impl Iterator<Item = Page> {
        let segment = self.segment;
        (self.first..self.first + self.pages).map(move |index| Page { segment, index })
    }

    /// The part from a page of it on.
    #[must_use]
    pub fn skip(self, pages: u32) -> Range {
        Range {
            first: self.first + pages,
            pages: self.pages - pages,
            ..self
        }
    }

    /// Offset of its first byte in the segment.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.first) * PAGE
    }

    /// Bytes in it.
    #[must_use]
    pub fn length(self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

impl From<Page> for Range {
    fn from(page: Page) -> Self {
        Range::of(page, 1)
    }
}

/// Contents of pages that lie one after the other in this process's memory.
#[derive(Clone, Copy, Debug)]
pub struct Adjacent<'a> {
    /// Of the first page.
    first: &'a [u8],
    pages: u32,
}

impl<'a> Adjacent<'a> {
    /// One page.
    ///
    /// # Panics
    /// If it has another size.
    #[must_use]
    pub fn new(page: &'a [u8]) -> Self {
        assert_eq!(page.len(), PAGE_SIZE);
        Self {
            first: page,
            pages: 1,
        }
    }

    /// Takes another page in, if it lies behind the last one; whether it does.
    pub fn extend(&mut self, page: &'a [u8]) -> bool {
        let end = self.address() + self.length();
        let adjacent = page.len() == PAGE_SIZE && page.as_ptr() as u64 == end;
        self.pages += u32::from(adjacent);
        adjacent
    }

    /// Where they begin.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.first.as_ptr() as u64
    }

    /// How many bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        u64::from(self.pages) * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_behind_is_adjacent() {
        let bytes = [0; 3 * PAGE_SIZE];
        let page = |at: usize| &bytes[at * PAGE_SIZE..(at + 1) * PAGE_SIZE];
        let mut pages = Adjacent::new(page(0));
        assert!(!pages.extend(page(2)));
        assert!(pages.extend(page(1)));
        assert!(!pages.extend(page(1)));
        assert!(pages.extend(page(2)));
        assert_eq!(pages.length(), 3 * PAGE);
    }
}
