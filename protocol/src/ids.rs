//! Names of nodes, processes, segments, pages and extents.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a page: the unit of coherence.
pub const PAGE_SIZE: usize = 4096;
/// Pages in an extent: the unit that has a home (2 MiB).
pub const EXTENT_PAGES: u32 = 512;
/// Nodes a cluster can have.
pub const MAX_NODES: usize = 1024;

/// A node's slot in the cluster, below [`MAX_NODES`], given by the coordinator when it joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(pub u16);

/// A process of one node, never reused, also after its pid is.
///
/// Semaphore undo and pending operations belong to it. It lives through `execve` and is not
/// inherited by `fork`, as in Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId(pub u64);

/// A segment's identity inside the cluster, never reused (a `shmid` can be, after its
/// sequence number wraps).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentId(pub u64);

/// One page of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Page {
    /// The segment.
    pub segment: SegmentId,
    /// Index of the page in the segment, from 0.
    pub index: u32,
}

impl Page {
    /// The extent that the page lies in.
    #[must_use]
    pub fn extent(self) -> Extent {
        Extent {
            segment: self.segment,
            index: self.index / EXTENT_PAGES,
        }
    }

    /// Offset of the page's first byte in its segment.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.index) * PAGE_SIZE as u64
    }
}

/// [`EXTENT_PAGES`] consecutive pages of a segment: what has a home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    /// The segment.
    pub segment: SegmentId,
    /// Index of the extent in the segment, from 0.
    pub index: u32,
}

impl Extent {
    /// Index of the extent's first page in the segment.
    #[must_use]
    pub fn first_page(self) -> u32 {
        self.index * EXTENT_PAGES
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.segment.0, self.index)
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}..{}",
            self.segment.0,
            self.first_page(),
            self.first_page() + EXTENT_PAGES
        )
    }
}
