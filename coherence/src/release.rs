//! The coherence protocol of `release` segments, as a pure state machine.
//!
//! Many nodes write a page at once. What a node wrote, others see once they have synchronised with
//! it: its writes go to the page's home before a *release* (a System V call that changes
//! something) takes effect, and a node that *acquires* (gets the answer to a call) drops its
//! copies of what others have released. A program without data races sees what sequential
//! consistency would show it. The protocol is home-based lazy release consistency with multiple
//! writers (Keleher et al. 1992, Zhou et al. 1996); the coordinator, through which all
//! synchronisation passes, takes the write notices along, so there are no vector clocks.
//!
//! # Where a page has its home
//!
//! The home of an extent is the *manager* of its pages, and does not move. A page has its home there
//! until one node alone writes it: then the manager lends it to that node (`loans.rs`). What a home
//! writes is not sent anywhere, and while no other node has a copy it is not even looked at.
//!
//! # States of a page
//!
//! | state | processes may | read fault | write fault | another node's change is learned of | release | evict |
//! |---|---|---|---|---|---|---|
//! | Absent | nothing | `Fetch` → Clean | `Fetch` → Dirty, or its home | fetched again, if it is being fetched | - | - |
//! | Clean | read | - | twin → Dirty | drop → Absent | - | drop → Absent |
//! | Dirty | write | - | - | protect, diff to manager, drop → Absent | diff to manager, twin := page | protect, diff to manager, drop → Absent |
//!
//! and at the page's home:
//!
//! | state | processes may | write fault | `Fetch` | `Diffs` | release | evict |
//! |---|---|---|---|---|---|---|
//! | Absent: no other node has a copy | write | - | protect, send → Clean | (merge) | - | give back |
//! | Clean | read | twin → Dirty; no copies → Absent | send | merge | - | give back |
//! | Dirty | write | - | send, twin := page | merge, into the twin too | twin := page; no copies for [`PATIENCE`] → Absent | protect → Clean |
//!
//! Only the manager merges, and only a borrower gives back.
//!
//! A page that is Dirty stays so after a release: a program that iterates takes no write faults.
//! After [`PATIENCE`] releases at which it was the same as its twin it becomes Clean. A page that a
//! thread has used since it came is fetched again as soon as it is dropped for another node's
//! change, and is writable at once if it was being written: what is used in every round is there when the
//! round begins.
//!
//! # Messages
//!
//! W has written pages of M's, of which R has copies; C is the coordinator.
//!
//! ```text
//! W ──Diffs──▶ M     merged into M's pages
//! W ◀─Merged── M     "R, say, has a copy"
//! W ──Wrote, the call──▶ C     adds the pages to what it has to tell the other nodes
//!                        C ──Changed, an answer──▶ R    drops the pages, then passes on the answer
//!                                                  R ──Fetch───▶ M, or M's borrower
//!                                                  R ◀─Copies─── M, or M's borrower
//! ```
//!
//! # What else has to hold
//!
//! - A home whose page is Dirty has its twin be what it sent: a write that is undone before the next
//!   release would otherwise go unnoticed, while the copy has it.
//! - A copy that was asked for before its page was changed may be old: it is asked for again.
//! - A `Fetch` follows the node's own diffs of the page, on one stream.
//! - What was sent home without a release (a page was evicted, or dropped) is told at the next one.
//! - Once a page has been changed, the copies of others are old, and count no more. Whoever changes it
//!   next tells of them again, unless it has itself told of them: another's word to the coordinator may be
//!   later than its own.
//!
//! A node that dies takes the pages with it whose home it is: who touches them gets SIGBUS. Those of
//! *durable* segments are at a second node too (`backup.rs`).

mod backup;
mod copies;
mod diff;
mod home;
mod loans;
mod tables;
#[cfg(test)]
mod tests;
mod user;

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use migshm_protocol::page::Access;
use migshm_protocol::release::{ReleaseMessage, RunSet, Runs, Sent};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};

use backup::{Part, Replica, Unmerged};
use copies::Copies;
pub use diff::Diff;
use home::Merging;
use loans::{Moving, Record, Request};

/// Releases in a row that find a page the same as its twin, after which it is protected again: together
/// they cost what a write fault does. A program that iterates has several in each iteration.
pub const PATIENCE: u8 = 12;

/// The node's page memory. The engine works on it directly: it has to see what was written up to
/// the moment of protection.
pub trait Frames {
    /// Copies a page's bytes out; zeros if nobody has touched it.
    fn read(&self, page: Page, buffer: &mut [u8]);
    /// Takes write access from all local processes.
    fn protect(&mut self, page: Page);
    /// Gives write access to a page that is here, and wakes who waits for it.
    fn permit(&mut self, page: Page);
    /// Makes a page accessible, with these contents or zeros, and wakes who waits for it.
    fn install(&mut self, page: Page, access: Access, contents: Option<&[u8]>);
    /// Has threads that wait for a page touch it again: they may.
    fn retry(&mut self, page: Page);
    /// Puts what another node wrote into a page that has its home here.
    fn merge(&mut self, page: Page, diff: &Diff);
    /// Takes a page from all local processes and frees its memory.
    fn drop(&mut self, page: Page);
    /// Whether a local process has used a page since it was installed, as far as can be told.
    fn is_used(&self, page: Page) -> bool;
    /// Whether a page has memory: whether anybody has touched it here since it was dropped.
    fn is_present(&self, page: Page) -> bool;
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A local process needs more than [`Release::access`] gives it.
    Fault {
        /// The page.
        page: Page,
        /// What is needed.
        access: Access,
    },
    /// A local process may need these pages soon.
    Prefetch {
        /// The pages.
        pages: Vec<Page>,
        /// For what.
        access: Access,
    },
    /// A message of another node.
    Message {
        /// The sender.
        from: NodeId,
        /// The message.
        message: ReleaseMessage,
        /// What follows it.
        data: Vec<u8>,
    },
    /// The answer to [`Action::FindHome`].
    HomeIs {
        /// The extent.
        extent: Extent,
        /// Its home; `None` if no node has memory for it.
        home: Option<NodeId>,
    },
    /// This node is the home of an extent of a durable segment, with this backup: as of now, or as ever
    /// and the backup is another one.
    BackupIs {
        /// The extent.
        extent: Extent,
        /// Where changes have to be before they count; `None` if no other node can have them.
        backup: Option<NodeId>,
        /// Nothing of it was released before this node was its home or its backup: if it has no
        /// complete replica, the pages are zeros.
        blank: bool,
    },
    /// Whatever local processes have written is to be at its home: [`Action::Released`] follows,
    /// now or later, in the order of the releases.
    Release,
    /// Other nodes have changed these pages, as the coordinator says before an answer.
    Changed {
        /// The segment.
        segment: SegmentId,
        /// The pages.
        pages: Runs,
    },
    /// The page's memory is needed. Refused where this node is the one that must keep it, or it is
    /// on its way here; its home gives up the twin.
    Evict {
        /// The page.
        page: Page,
    },
    /// A node has left the cluster.
    Left {
        /// The node.
        node: NodeId,
    },
}

/// What is to be done, in the order of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message to another node.
    Send {
        /// The receiver, never this node.
        to: NodeId,
        /// The message.
        message: ReleaseMessage,
        /// What follows it.
        data: Vec<u8>,
    },
    /// Ask the coordinator; answered by [`Input::HomeIs`].
    FindHome {
        /// The extent.
        extent: Extent,
    },
    /// The oldest release that was asked for is done: the coordinator may be told of these pages,
    /// and then of what the release was for.
    Released {
        /// What others have copies of and this node has written.
        wrote: Vec<(SegmentId, Runs)>,
    },
    /// This node is the home of an extent whose pages went with the nodes that had them.
    Lost {
        /// The extent.
        extent: Extent,
    },
    /// The page cannot be had: whoever waits for it gets SIGBUS.
    Fail {
        /// The page.
        page: Page,
    },
}

/// How often what happened, since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseCounters {
    /// Faults of local processes.
    pub faults: u64,
    /// Pages asked of their homes.
    pub fetches: u64,
    /// Of them, those asked for without a fault.
    pub prefetches: u64,
    /// Pages sent to other nodes.
    pub copies: u64,
    /// Twins made.
    pub twins: u64,
    /// Releases with something to release.
    pub releases: u64,
    /// Diffs sent.
    pub diffs: u64,
    /// Their bytes.
    pub diff_bytes: u64,
    /// Diffs of other nodes merged.
    pub merges: u64,
    /// Bytes of diffs sent to backups.
    pub replicated_bytes: u64,
    /// Extents of whose home this node has taken the place.
    pub promotions: u64,
    /// Copies dropped because another node had changed the page.
    pub invalidations: u64,
    /// Pages whose home has moved here.
    pub homes_taken: u64,
    /// Pages whose home has gone back to the manager.
    pub homes_returned: u64,
    /// Copies dropped to make room.
    pub evictions: u64,
    /// Messages about segments that are not (or no longer) known here.
    pub unknown_segment: u64,
    /// Messages that no correct peer sends; they had no effect.
    pub protocol_errors: u64,
}

/// A node's side of the protocol.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Release {
    tables: Tables,
    counters: ReleaseCounters,
    /// Reused for the page that is looked at.
    buffer: Vec<u8>,
}

/// All of the state that decides what happens next.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Tables {
    me: NodeId,
    page_size: usize,
    segments: BTreeMap<SegmentId, Segment>,
    /// The twins of Dirty pages.
    twins: BTreeMap<Page, Twin>,
    /// Pages on their way here.
    pending: BTreeMap<Page, Pending>,
    /// Pages that wait until the home of their extent is known.
    finding: BTreeMap<Extent, BTreeSet<u32>>,
    /// Number of the last message that is answered.
    last: u64,
    /// Diffs that are not merged yet, as far as is known.
    unmerged: BTreeMap<u64, Unmerged>,
    /// As a backup: what other nodes have.
    replicas: BTreeMap<Extent, Replica>,
    /// Diffs of durable pages whose home has left, for its successor.
    orphans: BTreeMap<Extent, Vec<(u32, Diff)>>,
    /// As a home: extents whose backup has left, and what waits for its successor.
    unbacked: BTreeMap<Extent, Vec<Part>>,
    /// What was asked of this node as a home before it knew that it is.
    early: BTreeMap<Extent, Vec<(Page, Request)>>,
    /// As a manager: pages whose home is moving.
    moving: BTreeMap<Page, Moving>,
    /// As a manager: diffs of which a part waits for such pages, by sender and number.
    merging: BTreeMap<(NodeId, u64), Merging>,
    /// What has to be told at the next release.
    wrote: BTreeMap<SegmentId, RunSet>,
    /// Releases under way: number of the last diffs that each waits for.
    releases: VecDeque<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Segment {
    pages: u32,
    default_home: Option<NodeId>,
    /// Whether pages are at a second node before what was written to them counts.
    durable: bool,
    /// Nodes that have left since the segment is known.
    lost: NodeSet,
    /// Nodes that have asked this one for pages.
    users: NodeSet,
    /// By extent index; as long as the highest extent touched so far needs.
    extents: Vec<Option<Box<ExtentState>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct ExtentState {
    /// The extent's home.
    manager: Option<NodeId>,
    lines: Box<[Line]>,
    /// At a page's home: who may have a copy that is not old.
    copies: Copies,
    /// At the manager: about each page; empty until one was asked for.
    records: Box<[Record]>,
    /// At the home of a durable extent.
    backup: Option<NodeId>,
    /// At the home of a durable extent: nobody has its pages any more.
    lost: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Line {
    state: State,
    /// Whether it came without a fault.
    prefetched: bool,
    /// Whether the manager has lent it to this node, which is its home.
    borrowed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum State {
    /// At its home: here, and with no other node.
    #[default]
    Absent,
    Clean,
    Dirty,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Twin {
    bytes: Box<[u8]>,
    /// Releases in a row that found no change.
    idle: u8,
    /// At the home: releases in a row that found nobody with a copy.
    alone: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Pending {
    /// Of the fetch whose answer counts; 0 while the home is not known.
    number: u64,
    /// Whether a thread waits to write it, or would.
    write: bool,
    /// Whether no thread waits for it.
    prefetch: bool,
}

/// What one input leads to: messages are put together for each receiver.
struct Context<'a> {
    frames: &'a mut dyn Frames,
    out: &'a mut Vec<Action>,
    /// By manager and segment.
    diffs: BTreeMap<(NodeId, SegmentId), Vec<(u32, Diff)>>,
    /// By receiver, segment, and whether they are to be written.
    wanted: BTreeMap<(NodeId, SegmentId, bool), Vec<u32>>,
    /// Other nodes' fetches to be passed on, by receiver.
    passed: BTreeMap<(NodeId, SegmentId, NodeId, u64, bool), Vec<u32>>,
    /// By receiver, segment and number of the fetch.
    copies: BTreeMap<(NodeId, SegmentId, u64), Copied>,
    /// Pages that are to come home, by where they are.
    recalled: BTreeMap<(NodeId, SegmentId), Vec<u32>>,
    /// Changes for backups, and what waits until they are there.
    replicated: BTreeMap<Extent, (Vec<tables::PageDiff>, Vec<Part>)>,
}

/// Pages on their way out.
#[derive(Default)]
struct Copied {
    pages: Vec<(u32, Sent)>,
    data: Vec<u8>,
}

impl Release {
    /// The engine of node `me`, which knows of no segment. Pages have `page_size` bytes, whole words
    /// of 8.
    #[must_use]
    pub fn new(me: NodeId, page_size: usize) -> Self {
        let tables = Tables {
            me,
            page_size,
            segments: BTreeMap::new(),
            twins: BTreeMap::new(),
            pending: BTreeMap::new(),
            finding: BTreeMap::new(),
            last: 0,
            unmerged: BTreeMap::new(),
            replicas: BTreeMap::new(),
            orphans: BTreeMap::new(),
            unbacked: BTreeMap::new(),
            early: BTreeMap::new(),
            moving: BTreeMap::new(),
            merging: BTreeMap::new(),
            wrote: BTreeMap::new(),
            releases: VecDeque::new(),
        };
        Self {
            tables,
            counters: ReleaseCounters::default(),
            buffer: vec![0; page_size],
        }
    }

    /// Begins to track a segment; does nothing if it is tracked already.
    pub fn add_segment(&mut self, segment: SegmentId, pages: u32, default_home: Option<NodeId>) {
        self.add(segment, pages, default_home, false);
    }

    /// The same, of a segment whose pages are at a second node before what was written to them counts.
    pub fn add_durable_segment(&mut self, segment: SegmentId, pages: u32) {
        self.add(segment, pages, None, true);
    }

    fn add(&mut self, segment: SegmentId, pages: u32, default_home: Option<NodeId>, durable: bool) {
        let new = || Segment {
            pages,
            default_home,
            durable,
            lost: NodeSet::default(),
            users: NodeSet::default(),
            extents: Vec::new(),
        };
        self.tables.segments.entry(segment).or_insert_with(new);
    }

    /// Forgets a segment; messages about it have no effect from now on. No release waits for what
    /// was written to it.
    pub fn remove_segment(&mut self, segment: SegmentId, out: &mut Vec<Action>) {
        let tables = &mut self.tables;
        tables.segments.remove(&segment);
        tables.twins.retain(|page, _| page.segment != segment);
        tables.pending.retain(|page, _| page.segment != segment);
        tables.finding.retain(|extent, _| extent.segment != segment);
        tables.unmerged.retain(|_, diffs| diffs.segment != segment);
        tables
            .replicas
            .retain(|extent, _| extent.segment != segment);
        tables.orphans.retain(|extent, _| extent.segment != segment);
        tables
            .unbacked
            .retain(|extent, _| extent.segment != segment);
        tables.early.retain(|extent, _| extent.segment != segment);
        tables.moving.retain(|page, _| page.segment != segment);
        tables.merging.retain(|_, diffs| diffs.segment != segment);
        tables.wrote.remove(&segment);
        self.complete_releases(out);
    }

    /// Whether a segment is tracked here.
    #[must_use]
    pub fn has_segment(&self, segment: SegmentId) -> bool {
        self.tables.segments.contains_key(&segment)
    }

    /// What local processes may do with a page now; `None` if nothing.
    #[must_use]
    pub fn access(&self, page: Page) -> Option<Access> {
        match self.line(page).state {
            State::Dirty => Some(Access::Write),
            State::Clean => Some(Access::Read),
            State::Absent if self.is_durable(page.segment) => None,
            State::Absent => self.is_home(page).then_some(Access::Write),
        }
    }

    /// Whether this node is the home of a page, as far as it knows.
    #[must_use]
    pub fn is_home(&self, page: Page) -> bool {
        self.line(page).borrowed || self.manages(page) && self.borrower(page).is_none()
    }

    /// Whether its manager has lent this node a page: it goes back if it is evicted.
    #[must_use]
    pub fn is_borrowed(&self, page: Page) -> bool {
        self.line(page).borrowed
    }

    /// Whether a page was asked for, and has not come.
    #[must_use]
    pub fn is_pending(&self, page: Page) -> bool {
        self.tables.pending.contains_key(&page)
    }

    /// Whether there is nothing to release, and no release under way.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let Tables {
            twins,
            unmerged,
            wrote,
            releases,
            orphans,
            unbacked,
            ..
        } = &self.tables;
        let is_sent = orphans.is_empty() && unbacked.is_empty() && unmerged.is_empty();
        is_sent && twins.is_empty() && wrote.is_empty() && releases.is_empty()
    }

    /// How many pages have a twin.
    #[must_use]
    pub fn twins(&self) -> usize {
        self.tables.twins.len()
    }

    /// The first page that has one.
    #[must_use]
    pub fn lowest_twin(&self) -> Option<Page> {
        self.tables.twins.keys().next().copied()
    }

    /// How often what happened.
    #[must_use]
    pub fn counters(&self) -> ReleaseCounters {
        self.counters
    }

    /// Handles one event and appends what is to be done to `out`, to be executed in order and before
    /// the next event is handled.
    pub fn handle(&mut self, input: Input, frames: &mut dyn Frames, out: &mut Vec<Action>) {
        let cx = &mut Context {
            frames,
            out,
            diffs: BTreeMap::new(),
            wanted: BTreeMap::new(),
            passed: BTreeMap::new(),
            copies: BTreeMap::new(),
            recalled: BTreeMap::new(),
            replicated: BTreeMap::new(),
        };
        match input {
            Input::Fault { page, access } => self.fault(cx, page, access),
            Input::Prefetch { pages, access } => self.prefetch(cx, &pages, access),
            Input::Message {
                from,
                message,
                data,
            } => self.receive(cx, from, message, &data),
            Input::HomeIs { extent, home } => self.home_is(cx, extent, home),
            Input::BackupIs {
                extent,
                backup,
                blank,
            } => self.backup_is(cx, extent, backup, blank),
            Input::Release => self.release(cx),
            Input::Changed { segment, pages } => self.changed(cx, segment, &pages),
            Input::Evict { page } => self.evict(cx, page),
            Input::Left { node } => self.left(cx, node),
        }
        self.send_all(cx);
        self.complete_releases(cx.out);
    }
}
