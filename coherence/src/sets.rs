//! Small sets of nodes and of an extent's pages.

use migshm_protocol::NodeId;
use migshm_protocol::ids::{EXTENT_PAGES, MAX_NODES};

/// A set of nodes: one machine word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NodeSet(u64);

impl NodeSet {
    /// The set whose member `n` is bit `n`.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// One bit for each member.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether it has no member.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `node` is a member.
    #[must_use]
    pub fn contains(self, node: NodeId) -> bool {
        self.0 & bit(node) != 0
    }

    /// The set and `node`.
    #[must_use]
    pub fn with(self, node: NodeId) -> Self {
        Self(self.0 | bit(node))
    }

    /// The set without `node`.
    #[must_use]
    pub fn without(self, node: NodeId) -> Self {
        Self(self.0 & !bit(node))
    }

    /// Members of either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Iterator for NodeSet {
    type Item = NodeId;

    fn next(&mut self) -> Option<NodeId> {
        if self.0 == 0 {
            return None;
        }
        let lowest = self.0.trailing_zeros() as u16;
        self.0 &= self.0 - 1;
        Some(NodeId(lowest))
    }
}

/// `node`'s bit; nodes from [`MAX_NODES`] on are refused before they get here.
fn bit(node: NodeId) -> u64 {
    debug_assert!(usize::from(node.0) < MAX_NODES);
    1 << (node.0 % MAX_NODES as u16)
}

/// A set of the pages of one extent, by their index in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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

    /// Whether a page is a member; no page from [`EXTENT_PAGES`] on is.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.0
            .get(page as usize / 64)
            .is_some_and(|word| word & (1 << (page % 64)) != 0)
    }
}
