//! What a node has counted of the accesses to a segment, and how it tells a tool.
//!
//! A node's account of a segment may be longer than a message: a reader asks for part after part
//! ([`crate::call::Call::Accesses`]), each of which says where the next one begins.

use serde::{Deserialize, Serialize};

use crate::ids::{EXTENT_PAGES, NodeId};
use crate::page::Access;

/// Traffic that one part tells of at most.
pub const PART_TRAFFIC: usize = 128;
/// Requests that one part tells of at most.
pub const PART_REQUESTS: usize = 4096;
/// Processes that one part tells of at most.
pub const PART_USERS: usize = 1024;

/// A part of a node's account of one segment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// When it was made: nanoseconds since the epoch, by the node's clock.
    pub time: u64,
    /// Processes that use or used the segment; in the first part only.
    pub users: Vec<User>,
    /// Who used which extent, and with which node.
    pub traffic: Vec<Traffic>,
    /// The last requests that the node was asked for as a home, the oldest first.
    pub requests: Vec<Request>,
    /// Events of all segments that the node has forgotten, for lack of room.
    pub forgotten: u64,
    /// Where the next part begins; `None` after the last.
    pub next: Option<u64>,
}

/// A process, in one address space: after `execve` it is another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its number on its node, never 0.
    pub user: u32,
    /// Its pid there; 0 if that was never known.
    pub pid: i32,
    /// Name of its command (`/proc/PID/comm`); empty if that was never known.
    pub command: String,
    /// Whether it has the segment attached.
    pub attached: bool,
    /// Since when it has been known: nanoseconds since the epoch.
    pub since: u64,
    /// When it ended, if it has.
    pub ended: Option<u64>,
}

/// What passed for one process, on one extent, between its node and another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// The process; 0 if the pages were sent and nobody here had faulted on them before.
    pub user: u32,
    /// Index of the extent in the segment.
    pub extent: u32,
    /// The other node, by its slot. The node itself: faults of the process, wherever they were served.
    pub peer: u16,
    /// How often what happened.
    pub counts: Counts,
    /// Which pages came.
    pub received: Seen,
    /// Which were given away.
    pub sent: Seen,
}

/// One bit for each page of an extent.
pub type PageBits = [u64; EXTENT_PAGES as usize / 64];

/// Pages that something happened to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// At least once.
    pub once: PageBits,
    /// More than once.
    pub again: PageBits,
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Faults for reading.
    pub reads: u64,
    /// Faults for writing.
    pub writes: u64,
    /// Pages that came.
    pub received: u64,
    /// Bytes that came.
    pub bytes_received: u64,
    /// Pages that were given away.
    pub sent: u64,
    /// Bytes that were given away.
    pub bytes_sent: u64,
}

impl Seen {
    /// It happened to a page, by its index in the extent.
    ///
    /// # Panics
    /// If there is no such page in an extent.
    pub fn note(&mut self, page: usize) {
        let (word, bit) = (page / 64, 1 << (page % 64));
        self.again[word] |= self.once[word] & bit;
        self.once[word] |= bit;
    }
}

impl Counts {
    /// Number of events.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.reads + self.writes + self.received + self.sent
    }
}

/// A request that a home got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Nanoseconds since the epoch, by the home's clock.
    pub time: u64,
    /// Index of the page in the segment.
    pub page: u32,
    /// Who asked.
    pub node: NodeId,
    /// For what.
    pub access: Access,
}
