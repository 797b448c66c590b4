//! Node daemon ↔ node daemon, about segments with release consistency: beside [`crate::page`], on
//! the same stream. `coherence` defines what the messages mean.
//!
//! The home of an extent is the *manager* of its pages here. A page has its home there, or at a node to
//! which the manager has lent it.

mod runs;

use serde::{Deserialize, Serialize};

use crate::NodeSet;
use crate::ids::{Extent, NodeId, Page, SegmentId};
pub use runs::RunSet;

/// Runs of neighbouring pages of a segment: index of the first, and how many.
pub type Runs = Vec<(u32, u32)>;

/// Runs in one message at most.
pub const MAX_RUNS: usize = 4096;
/// Pages that one message asks for at most.
pub const MAX_WANTED: usize = 512;
/// Pages that come in one message at most.
pub const MAX_COPIES: usize = 32;
/// Bytes of diffs in one message at most, so that there is room for what they are of.
pub const MAX_DIFFS: usize = 128 * 1024;

/// A message about a segment with release consistency.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReleaseMessage {
    /// Node → manager → home: send copies of these pages to the requester. Answered by
    /// [`ReleaseMessage::Copies`], in parts.
    Fetch {
        /// The segment.
        segment: SegmentId,
        /// Who wants them.
        requester: NodeId,
        /// Repeated in the answers.
        number: u64,
        /// Whether they are to be written.
        write: bool,
        /// The pages; at most [`MAX_WANTED`].
        pages: Vec<u32>,
    },
    /// Home → node: pages, with the bytes of those that are not all zeros one after the other.
    Copies {
        /// The segment.
        segment: SegmentId,
        /// Of the fetch.
        number: u64,
        /// The pages; at most [`MAX_COPIES`].
        pages: Vec<(u32, Sent)>,
    },
    /// Node → manager: what was written to these pages, as diffs one after the other. Answered by
    /// [`ReleaseMessage::Merged`].
    Diffs {
        /// The segment.
        segment: SegmentId,
        /// Repeated in the answer.
        number: u64,
        /// Each page, and the bytes of its diff.
        pages: Vec<(u32, u32)>,
    },
    /// Manager → node: the diffs are in the pages, and whoever fetches these gets them.
    Merged {
        /// The segment.
        segment: SegmentId,
        /// Of the diffs.
        number: u64,
        /// Those of the pages that a third node may have a copy of.
        shared: Vec<u32>,
        /// Those of the pages whose home may move to the receiver: answered by
        /// [`ReleaseMessage::Taken`].
        offered: Vec<u32>,
    },
    /// Node → manager: what became of the pages that were offered. Answered by
    /// [`ReleaseMessage::Merged`] once the manager has no copies of those that were taken.
    Taken {
        /// The segment.
        segment: SegmentId,
        /// Repeated in the answer.
        number: u64,
        /// The sender is their home now.
        taken: Vec<u32>,
        /// The sender has them no longer, so the manager stays their home.
        refused: Vec<u32>,
    },
    /// Manager → home: the manager is to be the home of these pages again. Answered by a
    /// [`ReleaseMessage::Returned`] for each, unless that is under way already.
    Recall {
        /// The segment.
        segment: SegmentId,
        /// The pages.
        pages: Vec<u32>,
    },
    /// Home → manager: the manager is a page's home again. Its bytes follow unless it is all zeros.
    Returned {
        /// The page.
        page: Page,
        /// Whether it is all zeros.
        zeros: bool,
        /// Who may have a copy that is not old, the sender among them.
        copies: NodeSet,
    },
    /// Home → backup, of a durable segment: what has changed in the pages of an extent, as diffs one
    /// after the other. Answered by [`ReleaseMessage::Merged`].
    Replicate {
        /// The extent.
        extent: Extent,
        /// Repeated in the answer.
        number: u64,
        /// What the receiver had of the extent does not count: all pages were zeros before this.
        first: bool,
        /// From here on the receiver has all that the sender has.
        last: bool,
        /// Each page, and the bytes of its diff.
        pages: Vec<(u32, u32)>,
    },
    /// Manager → node: these pages went with a node that has left.
    Lost {
        /// The segment.
        segment: SegmentId,
        /// The pages.
        pages: Runs,
    },
}

/// How a page comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Sent {
    /// A copy, whose bytes follow.
    Bytes,
    /// A copy; it is all zeros.
    Zeros,
    /// Nobody has used it so far: it is all zeros, and the receiver is its home.
    Lent,
}

impl ReleaseMessage {
    /// The segment that the message is about.
    #[must_use]
    pub fn segment(&self) -> SegmentId {
        match self {
            ReleaseMessage::Returned { page, .. } => page.segment,
            ReleaseMessage::Replicate { extent, .. } => extent.segment,
            ReleaseMessage::Fetch { segment, .. }
            | ReleaseMessage::Copies { segment, .. }
            | ReleaseMessage::Diffs { segment, .. }
            | ReleaseMessage::Merged { segment, .. }
            | ReleaseMessage::Taken { segment, .. }
            | ReleaseMessage::Recall { segment, .. }
            | ReleaseMessage::Lost { segment, .. } => *segment,
        }
    }
}
