//! Node daemon ↔ node daemon, about segments with release consistency: beside [`crate::page`], on
//! the same stream. `coherence` defines what the messages mean.

mod runs;

use serde::{Deserialize, Serialize};

use crate::ids::{Page, SegmentId};
pub use runs::RunSet;

/// Runs of neighbouring pages of a segment: index of the first, and how many.
pub type Runs = Vec<(u32, u32)>;

/// Runs in one message at most.
pub const MAX_RUNS: usize = 4096;
/// Pages that one message asks for at most.
pub const MAX_WANTED: usize = 512;
/// Bytes of diffs in one message at most, so that there is room for what they are of.
pub const MAX_DIFFS: usize = 128 * 1024;

/// A message about a segment with release consistency.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReleaseMessage {
    /// Node → home: send copies of these pages. Answered by a [`ReleaseMessage::Copy`] for each.
    Fetch {
        /// The segment.
        segment: SegmentId,
        /// Repeated in the answers.
        number: u64,
        /// The pages; at most [`MAX_WANTED`].
        pages: Vec<u32>,
    },
    /// Home → node: a page, whose bytes follow unless it is all zeros.
    Copy {
        /// The page.
        page: Page,
        /// Of the fetch.
        number: u64,
        /// Whether it is all zeros.
        zeros: bool,
    },
    /// Node → home: what was written to these pages, as diffs one after the other. Answered by
    /// [`ReleaseMessage::Merged`].
    Diffs {
        /// The segment.
        segment: SegmentId,
        /// Repeated in the answer.
        number: u64,
        /// Each page, and the bytes of its diff.
        pages: Vec<(u32, u32)>,
    },
    /// Home → node: the diffs are in the pages, and whoever fetches these gets them.
    Merged {
        /// The segment.
        segment: SegmentId,
        /// Of the diffs.
        number: u64,
        /// Those of the pages that a third node may have a copy of.
        shared: Vec<u32>,
    },
}

impl ReleaseMessage {
    /// The segment that the message is about.
    #[must_use]
    pub fn segment(&self) -> SegmentId {
        match self {
            ReleaseMessage::Copy { page, .. } => page.segment,
            ReleaseMessage::Fetch { segment, .. }
            | ReleaseMessage::Diffs { segment, .. }
            | ReleaseMessage::Merged { segment, .. } => *segment,
        }
    }
}
