//! Node daemon ↔ node daemon: the coherence protocol's messages.
//!
//! One bidirectional QUIC stream for each pair of nodes, so messages between two nodes arrive in
//! the order they were sent. `coherence` defines what they mean. Page contents travel raw after
//! the message that carries them.

use serde::{Deserialize, Serialize};

use crate::ids::{Extent, NodeId, Page, SegmentId};
use crate::release::ReleaseMessage;
use crate::{NodeSet, Version};

/// What a node may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Access {
    /// Read it; others may too.
    Read,
    /// Write it; nobody else has it.
    Write,
}

/// First message both ways on a connection between nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerHello {
    /// The sender's protocol version.
    pub version: Version,
    /// The sender.
    pub node: NodeId,
    /// Number of the sender's membership.
    pub epoch: u64,
}

/// A message between nodes, after the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage<Sequential = PageRun> {
    /// About a segment with sequential consistency.
    Sequential(Sequential),
    /// About a segment with release consistency.
    Release(ReleaseMessage),
    /// First on a link, and whenever a member has left: what the sender sent before belongs to
    /// earlier views of the cluster, what follows to this one.
    Flush {
        /// From [`crate::control::FromCoordinator::Left`]; 0 if no member has ever left.
        view: u64,
    },
}

impl PeerMessage {
    /// The segment that the message is about, if it is about one.
    #[must_use]
    pub fn segment(&self) -> Option<SegmentId> {
        match self {
            PeerMessage::Sequential(run) => Some(run.message.segment()),
            PeerMessage::Release(message) => Some(message.segment()),
            PeerMessage::Flush { .. } => None,
        }
    }
}

/// A message of the coherence protocol of segments with sequential consistency.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PageMessage {
    /// Requester → home (or former home, which relays it): a fault.
    Request {
        /// The page.
        page: Page,
        /// What is wanted.
        access: Access,
        /// Who wants it (not always the sender: former homes relay).
        requester: NodeId,
        /// Whether the requester holds a readable copy.
        has_copy: bool,
        /// Whether nobody waits for the page yet: rather than wait, or disturb those who use it,
        /// the answer is [`PageMessage::Decline`].
        prefetch: bool,
    },
    /// Home → owner: give the page to the requester.
    Forward {
        /// The page.
        page: Page,
        /// `Read`: keep a readable copy; `Write`: keep nothing.
        access: Access,
        /// Who gets it.
        requester: NodeId,
        /// To pass on in [`PageMessage::Grant::acks`].
        acks: u16,
        /// To pass on in [`PageMessage::Grant::pushed`].
        pushed: bool,
        /// As in [`PageMessage::Request::prefetch`].
        prefetch: bool,
    },
    /// Owner → home → requester of a prefetch: not now. Nothing has changed.
    Decline {
        /// The page.
        page: Page,
        /// Who asked for it.
        requester: NodeId,
    },
    /// Home → sharer: drop the copy, tell the requester.
    Invalidate {
        /// The page.
        page: Page,
        /// Who waits for the acknowledgement.
        requester: NodeId,
    },
    /// Owner or home → requester: the page may be used, once `acks` sharers have acknowledged.
    Grant {
        /// The page.
        page: Page,
        /// What is granted.
        access: Access,
        /// Acknowledgements of [`PageMessage::Invalidate`] to wait for.
        acks: u16,
        /// What the page contains.
        contents: Contents,
        /// The home, to which later requests go, and `Done` if `confirm`.
        home: NodeId,
        /// Whether the home waits for [`PageMessage::Done`].
        confirm: bool,
        /// Whether the former owner wanted it so: the requester has not asked, or its request is
        /// still to be answered.
        pushed: bool,
    },
    /// Owner → home: another node will want the page next. Has no effect where that is not
    /// possible at once.
    Push {
        /// The page, of which the sender has the only copy, or is the owner if `access` is `Read`.
        page: Page,
        /// What the other node will want.
        access: Access,
        /// Who.
        to: NodeId,
    },
    /// Sharer → home: the copy is gone, before anybody asked for that. The answer is
    /// [`PageMessage::WriteBackAck`].
    Relinquish {
        /// The page.
        page: Page,
        /// The former sharer (not always the sender: former homes relay).
        sharer: NodeId,
    },
    /// Sharer → requester: the copy is gone.
    InvalidateAck {
        /// The page.
        page: Page,
    },
    /// Requester → home: the grant arrived; the next transaction of the page may start.
    Done {
        /// The page.
        page: Page,
    },
    /// Owner → home: the page's contents (which follow), as the owner has to make room.
    WriteBack {
        /// The page.
        page: Page,
        /// The owner (not always the sender: former homes relay).
        owner: NodeId,
    },
    /// Home → former owner: it may drop the page now. Home → former sharer: it may ask for the page again.
    WriteBackAck {
        /// The page.
        page: Page,
        /// False if the ownership, or the copy, had gone to another node meanwhile.
        accepted: bool,
    },
    /// Home → node that holds pages of the extent: everything I sent you before this has
    /// arrived, say so; the home is about to move.
    Fence {
        /// The extent.
        extent: Extent,
    },
    /// The answer to [`PageMessage::Fence`].
    FenceAck {
        /// The extent.
        extent: Extent,
    },
    /// Old home → new home: the directory of the extent.
    HomeTransfer {
        /// The extent.
        extent: Extent,
        /// Its pages that are not untouched.
        entries: Vec<DirectoryEntry>,
    },
    /// Home → every member, when one has died: what do you hold of the extent?
    Survey {
        /// The extent.
        extent: Extent,
    },
    /// The answer to [`PageMessage::Survey`].
    Holdings {
        /// The extent.
        extent: Extent,
        /// The pages that the sender holds, ascending.
        pages: Vec<Holding>,
    },
    /// Home → requester: the page's only copy died with a node.
    Lost {
        /// The page.
        page: Page,
    },
}

/// Consecutive pages that a node holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Holding {
    /// Index of the first in its extent.
    pub first: u16,
    /// How many.
    pub count: u16,
    /// What its processes may do with them.
    pub access: Access,
}

/// What a granted page contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Contents {
    /// The bytes that follow the message.
    Bytes,
    /// Zeros: nobody has touched the page before.
    Zeros,
    /// What the requester has already.
    Yours,
}

/// A page in a directory that moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DirectoryEntry {
    /// Index of the page in its extent.
    pub page: u16,
    /// The node that answers for the contents; `None` if they are lost.
    pub owner: Option<NodeId>,
    /// The nodes that may hold a readable copy, owner included; empty if the owner holds the page
    /// exclusively.
    pub sharers: NodeSet,
}

impl PageMessage {
    /// The segment that the message is about.
    #[must_use]
    pub fn segment(&self) -> SegmentId {
        match self.subject() {
            Subject::Page(page) => page.segment,
            Subject::Extent(extent) => extent.segment,
        }
    }

    /// What the message is about.
    #[must_use]
    pub fn subject(&self) -> Subject {
        match self {
            PageMessage::Request { page, .. }
            | PageMessage::Forward { page, .. }
            | PageMessage::Decline { page, .. }
            | PageMessage::Invalidate { page, .. }
            | PageMessage::Grant { page, .. }
            | PageMessage::Push { page, .. }
            | PageMessage::Relinquish { page, .. }
            | PageMessage::InvalidateAck { page }
            | PageMessage::Done { page }
            | PageMessage::WriteBack { page, .. }
            | PageMessage::WriteBackAck { page, .. }
            | PageMessage::Lost { page } => Subject::Page(*page),
            PageMessage::Fence { extent }
            | PageMessage::FenceAck { extent }
            | PageMessage::HomeTransfer { extent, .. }
            | PageMessage::Survey { extent }
            | PageMessage::Holdings { extent, .. } => Subject::Extent(*extent),
        }
    }

    /// The same message about another page, where it is about one.
    #[must_use]
    pub fn about(&self, other: Page) -> PageMessage {
        let mut message = self.clone();
        match &mut message {
            PageMessage::Request { page, .. }
            | PageMessage::Forward { page, .. }
            | PageMessage::Decline { page, .. }
            | PageMessage::Invalidate { page, .. }
            | PageMessage::Grant { page, .. }
            | PageMessage::Push { page, .. }
            | PageMessage::Relinquish { page, .. }
            | PageMessage::InvalidateAck { page }
            | PageMessage::Done { page }
            | PageMessage::WriteBack { page, .. }
            | PageMessage::WriteBackAck { page, .. }
            | PageMessage::Lost { page } => *page = other,
            PageMessage::Fence { .. }
            | PageMessage::FenceAck { .. }
            | PageMessage::HomeTransfer { .. }
            | PageMessage::Survey { .. }
            | PageMessage::Holdings { .. } => {}
        }
        message
    }
}

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A page.
    Page(Page),
    /// A whole extent.
    Extent(Extent),
}

/// What travels between nodes: one message, or the same one about each of several consecutive
/// pages, whose contents, if there are any, follow in that order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// How many pages; 1 for a message about an extent.
    pub pages: u16,
    /// About the first page.
    pub message: PageMessage,
}

/// Pages in a [`PageRun`] at most.
pub const MAX_RUN: u16 = 32;

impl PageRun {
    /// The messages, one by one; `None` if no correct peer sends such a run.
    pub fn messages(&self) -> Option<impl Iterator<Item = PageMessage>> {
        let pages = u32::from(self.pages);
        let is_possible = match self.message.subject() {
            _ if self.pages == 0 || self.pages > MAX_RUN => false,
            Subject::Page(page) => page.index.checked_add(pages).is_some(),
            Subject::Extent(_) => pages == 1,
        };
        is_possible.then(|| {
            (0..pages).map(|offset| match self.message.subject() {
                Subject::Page(Page { segment, index }) => self.message.about(Page {
                    segment,
                    index: index + offset,
                }),
                Subject::Extent(_) => self.message.clone(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;
    use crate::ids::{EXTENT_PAGES, MAX_NODES};

    const PAGE: Page = Page {
        segment: SegmentId(1),
        index: 7,
    };

    fn messages(pages: u16, message: PageMessage) -> Option<Vec<PageMessage>> {
        Some(PageRun { pages, message }.messages()?.collect())
    }

    #[test]
    fn a_run_is_the_same_message_for_consecutive_pages() {
        let done = |index| PageMessage::Done {
            page: Page { index, ..PAGE },
        };
        assert_eq!(messages(2, done(7)), Some(vec![done(7), done(8)]));
    }

    #[test]
    fn no_run_is_empty_too_long_or_beyond_all_segments() {
        let done = |index| PageMessage::Done {
            page: Page { index, ..PAGE },
        };
        let fence = PageMessage::Fence {
            extent: PAGE.extent(),
        };
        assert_eq!(messages(0, done(7)), None);
        assert_eq!(messages(MAX_RUN + 1, done(7)), None);
        assert_eq!(messages(2, done(u32::MAX)), None);
        assert_eq!(messages(2, fence.clone()), None);
        assert_eq!(messages(1, fence.clone()), Some(vec![fence]));
    }

    #[test]
    fn the_largest_directory_fits_a_message() {
        let entry = |page| DirectoryEntry {
            page,
            owner: Some(NodeId(MAX_NODES as u16 - 1)),
            sharers: (0..MAX_NODES as u16).map(NodeId).collect(),
        };
        let message = PageMessage::HomeTransfer {
            extent: Extent {
                segment: SegmentId(u64::MAX),
                index: u32::MAX,
            },
            entries: (0..EXTENT_PAGES as u16).map(entry).collect(),
        };
        let mut frame = Vec::new();
        codec::encode_frame(&message, &[], &mut frame).unwrap();
        let (back, _) = codec::decode::<PageMessage>(&frame[codec::FRAME_HEADER..]).unwrap();
        assert_eq!(back, message);
    }
}
