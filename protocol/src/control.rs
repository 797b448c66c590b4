//! Node daemon ↔ coordinator: a session ([`crate::session`]) on one bidirectional QUIC stream at a time.
//!
//! A link is opened by [`ToCoordinator::Join`] or [`ToCoordinator::Resume`], which are no part of the
//! session, as are the answers [`FromCoordinator::Resumed`] and [`FromCoordinator::Refused`].

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

use crate::Version;
use crate::call::{Call, Caller, Consistency, Errno, Outcome};
use crate::ids::{Extent, NodeId, ProcessId, SegmentId};
use crate::release::Runs;

/// From a node daemon to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// Opens a link and a session; answered by [`FromCoordinator::Welcome`] or
    /// [`FromCoordinator::Refused`].
    Join {
        /// The node's protocol version.
        version: Version,
        /// Its name, unique in the cluster.
        name: String,
        /// Where other nodes reach it.
        address: SocketAddr,
        /// Its memory budget in bytes.
        memory: u64,
    },
    /// Opens a link for a session that there is; answered by [`FromCoordinator::Resumed`] or
    /// [`FromCoordinator::Refused`].
    Resume {
        /// The node's protocol version.
        version: Version,
        /// From [`FromCoordinator::Welcome`].
        cluster: u64,
        /// The node's slot.
        node: NodeId,
        /// Number of its membership.
        epoch: u64,
    },
    /// A call of a process, with its raw bytes after it; answered by
    /// [`FromCoordinator::Answer`].
    Call {
        /// Unique among the node's requests, ascending.
        id: u64,
        /// Who calls.
        caller: Caller,
        /// The call.
        call: Call,
    },
    /// Ends a call that is still blocked with `errno`; its answer comes in any case.
    Cancel {
        /// The call's id.
        id: u64,
        /// What the call then returns.
        errno: Errno,
    },
    /// Asks for a [`FromCoordinator::Answer`] of 0 once all messages before are done.
    Confirm {
        /// Unique among the node's requests.
        id: u64,
    },
    /// A process ended: its undo is due, its blocked calls are void.
    Exited {
        /// The process.
        process: ProcessId,
        /// Its pid, which undo leaves in `sempid`.
        pid: i32,
    },
    /// A fork copied attaches of a segment.
    Inherited {
        /// The segment.
        segment: SegmentId,
        /// How many attaches more.
        count: u32,
        /// The child's pid if it is known, else its parent's.
        pid: i32,
    },
    /// `shmdt`, exit or exec ended attaches of a segment; answered by
    /// [`FromCoordinator::Answer`] where `id` is not 0.
    Detached {
        /// Unique among the node's requests, or 0.
        id: u64,
        /// The segment.
        segment: SegmentId,
        /// How many attaches fewer.
        count: u32,
        /// Whose.
        pid: i32,
    },
    /// An attach that was answered came to nothing, as its process could not map it. Nothing of it
    /// shows, unlike of one that ended.
    Unattached {
        /// The segment.
        segment: SegmentId,
    },
    /// The node tracks this segment now, as [`FromCoordinator::Share`] asked.
    Sharing {
        /// The segment.
        segment: SegmentId,
    },
    /// Which node is an extent's home? Answered by [`FromCoordinator::HomeIs`].
    FindHome {
        /// The extent.
        extent: Extent,
    },
    /// No message that was sent to the sender before this view began can reach it any more. Homes
    /// are named again when all members have said so.
    Flushed {
        /// From [`FromCoordinator::Left`].
        view: u64,
    },
    /// What is this segment, of which a peer spoke? Answered by [`FromCoordinator::SegmentIs`].
    FindSegment {
        /// The segment.
        segment: SegmentId,
    },
    /// The sender is an extent's home and would rather have it at another node. If that has room
    /// for it, [`FromCoordinator::MoveHome`] follows.
    ProposeHome {
        /// The extent.
        extent: Extent,
        /// The other node.
        to: NodeId,
    },
    /// The sender became an extent's home.
    HomeMoved {
        /// The extent.
        extent: Extent,
    },
    /// The node has written these pages of a segment with release consistency, and their homes have
    /// what it wrote. The call, or what else has the writes count, follows.
    Wrote {
        /// The segment.
        segment: SegmentId,
        /// The pages; at most [`crate::release::MAX_RUNS`] runs.
        pages: Runs,
    },
    /// A semaphore set that was delegated to the sender is the coordinator's again.
    Returned {
        /// The set's id.
        set: i32,
        /// From [`FromCoordinator::Delegated`].
        number: u64,
        /// Its state. The debts are in addition to those when it was delegated.
        state: SetState,
    },
    /// Whether the sender is still a member: answered by [`FromCoordinator::Present`].
    Query {
        /// Echoed in the answer.
        number: u64,
    },
    /// The sender has lost the link to a member, and maybe what was said on it: one of both has to go.
    Unreachable {
        /// The member.
        node: NodeId,
        /// Its epoch.
        epoch: u64,
    },
    /// What [`FromCoordinator::Account`] asked for follows as raw bytes: an encoded
    /// [`crate::accesses::Part`].
    Account {
        /// From the question.
        number: u64,
    },
}

/// The state of a semaphore set for which no call waits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetState {
    /// By semaphore.
    pub values: Vec<u16>,
    /// Of the processes that changed the semaphores last.
    pub pids: Vec<i32>,
    /// When the last operation was done, in seconds since the epoch.
    pub otime: i64,
    /// What processes of the node owe (`semadj`).
    pub debts: Vec<Debt>,
}

/// What a process owes to a semaphore when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    /// The process.
    pub process: ProcessId,
    /// Its pid.
    pub pid: i32,
    /// The semaphore's number.
    pub num: u16,
    /// To be added to its value. 0 says that the process has used SEM_UNDO.
    pub owed: i16,
}

/// From the coordinator to a node daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCoordinator {
    /// The node is a member: the session's first message.
    Welcome {
        /// Tells the cluster from others, also from what this was before its state was lost.
        cluster: u64,
        /// Its slot.
        node: NodeId,
        /// Number of this membership; messages of an older one are refused.
        epoch: u64,
    },
    /// The session goes on.
    Resumed,
    /// The node cannot be a member, or is none any longer.
    Refused {
        /// Why, for a person.
        reason: String,
    },
    /// Who the members are: follows `Welcome`.
    Members {
        /// All of them, the receiver included.
        members: Vec<Member>,
        /// Number of the view that began when a member left last; 0 if none ever has.
        view: u64,
    },
    /// There is one member more.
    Joined {
        /// It.
        member: Member,
    },
    /// A member is gone.
    Left {
        /// The slot that it had.
        node: NodeId,
        /// Number of the view that begins with that, ascending.
        view: u64,
    },
    /// The answer to a request, raw bytes after it.
    Answer {
        /// The request's id.
        id: u64,
        /// How it ended.
        outcome: Outcome,
        /// With [`crate::call::Answer::Attached`]: how the segment's pages are kept.
        placement: Option<Placement>,
    },
    /// Another node is about to attach a segment that only the receiver used: track it from now
    /// on, then say [`ToCoordinator::Sharing`].
    Share {
        /// The segment.
        segment: SegmentId,
    },
    /// Where an extent's home is.
    HomeIs {
        /// The extent.
        extent: Extent,
        /// The home; `None` if no member has memory left for it.
        home: Option<NodeId>,
        /// It is the receiver, which may not have asked, as the former home has left: what no
        /// member holds of the extent is lost.
        orphaned: bool,
    },
    /// The receiver is the home of an extent of a durable segment, and has a backup: as of now, or it
    /// has another one.
    BackupIs {
        /// The extent.
        extent: Extent,
        /// Where what is written has to be before it is released; `None` if there is no other node
        /// that has room for it.
        backup: Option<NodeId>,
        /// Nothing of the extent was released before the receiver was its home or its backup.
        blank: bool,
    },
    /// The home of an extent, which is at the receiver, may move.
    MoveHome {
        /// The extent.
        extent: Extent,
        /// Where to.
        to: NodeId,
    },
    /// What a shared segment is. From now on the node hears of its end.
    SegmentIs {
        /// The segment.
        segment: SegmentId,
        /// Its size in bytes; `None` if it does not exist (any more).
        size: Option<u64>,
        /// How it is kept consistent.
        consistency: Consistency,
        /// As in [`Placement::Shared`].
        default_home: Option<NodeId>,
    },
    /// Other nodes have written these pages of a segment with release consistency: copies of them
    /// are old for whoever learns of what follows.
    Changed {
        /// The segment.
        segment: SegmentId,
        /// The pages; at most [`crate::release::MAX_RUNS`] runs.
        pages: Runs,
    },
    /// A `semop` has succeeded, and its set is delegated to the receiver: its processes may
    /// operate on it until the receiver says [`ToCoordinator::Returned`], which is due before
    /// anything else that it says about the set, or about a process that owes to it.
    Delegated {
        /// The `semop`'s id, which has no other answer.
        id: u64,
        /// The set's id.
        set: i32,
        /// Number of this delegation.
        number: u64,
        /// Changes whenever others may be permitted to alter the set than before.
        access: u64,
        /// Its state.
        state: SetState,
    },
    /// A delegated set is needed elsewhere. It may have been returned already.
    Recall {
        /// The set's id.
        set: i32,
        /// From [`FromCoordinator::Delegated`].
        number: u64,
    },
    /// A semaphore set that has ever been delegated to the receiver is gone.
    SetRemoved {
        /// The set's id.
        set: i32,
    },
    /// When the query was sent, the receiver was a member, and stays one for as long as links may
    /// be silent.
    Present {
        /// From [`ToCoordinator::Query`].
        number: u64,
    },
    /// What has the receiver counted of the accesses to a segment? Answered by
    /// [`ToCoordinator::Account`].
    Account {
        /// Echoed in the answer.
        number: u64,
        /// The segment.
        segment: SegmentId,
        /// From [`crate::accesses::Part::next`]; 0 for the first part.
        from: u64,
        /// Whether the requests to the receiver as a home are wanted too.
        requests: bool,
    },
    /// A segment is gone; nothing of it may be kept.
    Destroyed {
        /// The segment.
        segment: SegmentId,
    },
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its slot.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where its page server listens.
    pub address: SocketAddr,
    /// Number of its membership.
    pub epoch: u64,
    /// Its memory budget in bytes.
    pub memory: u64,
}

/// How the pages of a segment are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// Only the asking node uses the segment: no tracking, no homes.
    Solo,
    /// Tracked. Extents for which no home is known yet are at `default_home`, or, where that is
    /// `None`, have their home assigned at the first touch ([`ToCoordinator::FindHome`]).
    Shared {
        /// The node that used the segment alone before.
        default_home: Option<NodeId>,
    },
}
