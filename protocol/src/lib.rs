//! What the processes of a migshm cluster say to each other.
//!
//! Three links, each with its own vocabulary:
//!
//! | link | module | promise |
//! |---|---|---|
//! | shim ↔ node daemon, over a unix socket | [`local`] | both ship together; any change is allowed |
//! | node daemon ↔ coordinator, over QUIC | [`control`] | versioned by [`VERSION`] |
//! | node daemon ↔ node daemon, over QUIC | [`page`] | versioned by [`VERSION`] |
//!
//! A System V call is the same value on the first two links: [`call::Call`], which the shim
//! makes, the node daemon stamps with the kernel's word for who the caller is, and the
//! coordinator answers. Every message is a serde value encoded by [`codec`], optionally followed
//! by raw bytes (page contents, `sembuf` arrays, `SETALL` values, messages of queues), which are
//! never re-encoded.
#![forbid(unsafe_code)]

pub mod accesses;
pub mod call;
pub mod codec;
pub mod control;
pub mod ids;
pub mod limits;
pub mod local;
pub mod nodes;
pub mod page;
pub mod polling;
pub mod release;
pub mod session;

pub use ids::{Extent, NodeId, Page, ProcessId, SegmentId};
pub use nodes::NodeSet;

/// Version of the node-to-node and node-to-coordinator protocols.
///
/// Peers whose major versions differ refuse each other; a minor version only adds what an
/// older peer never sends.
pub const VERSION: Version = Version { major: 4, minor: 0 };

/// A protocol version, compared in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Version {
    /// Incompatible changes.
    pub major: u16,
    /// Compatible additions.
    pub minor: u16,
}

impl Version {
    /// Whether a peer that speaks `other` can be talked to.
    #[must_use]
    pub fn accepts(self, other: Version) -> bool {
        self.major == other.major
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
