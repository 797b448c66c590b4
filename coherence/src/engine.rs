//! The engine's surface, its tables, and where each input goes.
//!
//! [`cache`] is what a node does as a holder of pages, [`home`] what it does for the extents it
//! is the home of, [`home_move`] how it stops to be that, [`recovery`] what happens when a node
//! dies, [`hold`] for how long a page stays before it is given away. They share the tables of this module. Messages of a node to itself are plain calls between `cache` and
//! `home`, made depth first: that is the FIFO channel of a node to itself.

mod cache;
mod directory;
mod hold;
mod home;
mod home_move;
mod recovery;
#[cfg(test)]
pub(crate) mod tests;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use migshm_protocol::ids::{EXTENT_PAGES, MAX_NODES};
use migshm_protocol::page::{Access, Contents, PageMessage, Subject};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};
use rustc_hash::FxHashMap;

use crate::sets::PageSet;
use cache::{Line, Pending, State, Take};
use directory::Directory;
use home::{Asked, Transaction, Work};
use home_move::Move;
use recovery::{Rebuild, View};

/// Nanoseconds on a monotonic clock.
pub type Time = u64;

/// What can be tuned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Nanoseconds for which a granted page stays at least, before it is given to another node.
    pub hold_min: Time,
    /// Nanoseconds after which it is given away even if no local process has used it yet.
    pub hold_max: Time,
}

impl Default for Config {
    /// 50 us, about one remote fault, to 10 ms, which a thread may have to wait for a processor.
    fn default() -> Self {
        Self {
            hold_min: 50_000,
            hold_max: 10_000_000,
        }
    }
}

/// The node's page memory, as far as the engine asks about it.
pub trait Memory {
    /// Pages of an extent that have data here, by their index in the extent.
    ///
    /// Asked when this node first acts as the extent's home: what it wrote while it used the
    /// segment alone is then its own, exclusively.
    fn present(&self, extent: Extent) -> PageSet;

    /// Whether a local process has used the page since it came, as far as can be told.
    ///
    /// Asked when another node wants the page soon after.
    fn touched(&self, _page: Page) -> bool {
        true
    }
}

/// What happened. `D` is the contents of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input<D> {
    /// A local process needs more than [`Engine::access`] gives it; it sleeps until the page is
    /// installed or fails. Repeating it for other processes does no harm.
    Fault {
        /// The page.
        page: Page,
        /// What is needed.
        access: Access,
    },
    /// A local process may need a page soon. Best effort: refused, with no action, where that would
    /// take more than asking its home; and the home, or the owner, may decline.
    Prefetch {
        /// The page.
        page: Page,
        /// What will be needed.
        access: Access,
    },
    /// A message of another node.
    Message {
        /// The sender.
        from: NodeId,
        /// The message.
        message: PageMessage,
        /// The page's contents, if they follow it.
        data: Option<D>,
    },
    /// The answer to [`Action::FindHome`].
    HomeIs {
        /// The extent.
        extent: Extent,
        /// Its home; `None` if no node has memory for it.
        home: Option<NodeId>,
        /// The home is this node, as the former one died: nobody may have asked.
        orphaned: bool,
    },
    /// A member is gone. Everything is to begin anew among those that are left.
    View {
        /// From the coordinator, ascending.
        number: u64,
        /// The members that are left.
        members: NodeSet,
    },
    /// A node has begun a view: what it sends from now on belongs to that.
    Flush {
        /// The sender.
        from: NodeId,
        /// From [`Action::Flush`].
        view: u64,
    },
    /// The page's memory is needed. Refused, with no action, where the page is in use by the
    /// protocol or this node is the one that must keep it.
    Evict {
        /// The page.
        page: Page,
    },
    /// Another node shall be the extent's home. Refused, with no action, where this node is not
    /// its home or it is moving already.
    MoveHome {
        /// The extent.
        extent: Extent,
        /// The new home.
        to: NodeId,
    },
    /// Another node will want a page of this node's next. Ignored where it cannot be had at once.
    Push {
        /// The page.
        page: Page,
        /// `Write`: give it away, or give up the copy of a page that the other owns; `Read`: give a copy.
        access: Access,
        /// Who will want it.
        to: NodeId,
    },
    /// [`Engine::next_timeout`] has come.
    Timeout,
}

/// What is to be done, in the order of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<D> {
    /// Send a message to another node.
    Send {
        /// The receiver, never this node.
        to: NodeId,
        /// The message.
        message: PageMessage,
        /// What follows it.
        body: Body<D>,
    },
    /// Make a page accessible, then wake all processes that wait for it.
    Install {
        /// The page.
        page: Page,
        /// What every local process may do with it.
        access: Access,
        /// What it contains.
        contents: Fill<D>,
    },
    /// Take write access from all local processes, before the page's bytes are read.
    Protect {
        /// The page.
        page: Page,
    },
    /// Take the page from all local processes and free its memory.
    Drop {
        /// The page.
        page: Page,
    },
    /// Ask the coordinator; answered by [`Input::HomeIs`].
    FindHome {
        /// The extent.
        extent: Extent,
    },
    /// Tell the coordinator that this node is the extent's home now.
    BecameHome {
        /// The extent.
        extent: Extent,
    },
    /// The page cannot be had: whoever waits for it gets SIGBUS.
    Fail {
        /// The page.
        page: Page,
    },
    /// Tell a node that what follows belongs to this view, in line with other messages.
    Flush {
        /// The receiver.
        to: NodeId,
        /// The view.
        view: u64,
    },
    /// Tell the coordinator that no message of an earlier view can reach this node any more. It
    /// answers [`Action::FindHome`] once all members have said so.
    Flushed {
        /// The view.
        view: u64,
    },
    /// The only copies of these pages of an extent at home here died with a node.
    Lost {
        /// The extent.
        extent: Extent,
        /// The pages.
        pages: PageSet,
    },
}

/// Page contents that follow a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body<D> {
    /// None.
    None,
    /// What the page contains in local memory when the action is executed.
    Page(Page),
    /// These: a write-back on its way to the home.
    Data(D),
}

/// What an installed page contains.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Fill<D> {
    /// This.
    Data(D),
    /// Zeros.
    Zeros,
    /// What it contains already: only the protection changes.
    InPlace,
}

/// How often what happened, since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Faults of local processes.
    pub faults: u64,
    /// Pages asked for before anybody here waited for them.
    pub prefetches: u64,
    /// Of those, how many were declined.
    pub declined: u64,
    /// Requests that this node served as home, its own included.
    pub requests: u64,
    /// Pages given to another node out of this node's copy.
    pub forwards: u64,
    /// Pages that another node has pushed here.
    pub pushes: u64,
    /// Copies dropped for another node's write.
    pub invalidations: u64,
    /// Copies given up before another node asked for that.
    pub relinquished: u64,
    /// Pages given away or dropped later than asked, because they were held.
    pub hold_deferrals: u64,
    /// Copies dropped silently to make room.
    pub evictions: u64,
    /// Pages sent to their home to make room.
    pub write_backs: u64,
    /// Extents whose home moved away from here.
    pub home_moves: u64,
    /// Messages passed on to a newer home.
    pub relays: u64,
    /// Messages about segments that are not (or no longer) known here.
    pub unknown_segment: u64,
    /// Messages that no correct peer sends; they had no effect.
    pub protocol_errors: u64,
}

/// Memory that an engine takes for what it knows of pages at rest: of extents that have been used,
/// without what waits or is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Footprint {
    /// Pages at home here that somebody has touched.
    pub touched: usize,
    /// Bytes of the directories of the extents at home here.
    pub directory: usize,
    /// Bytes of this node's own part of all extents that it has to do with.
    pub lines: usize,
}

/// A node's side of the protocol: its cache, and its directory of the extents at home here.
///
/// `D` is the contents of a page: bytes in the daemon, a small value in tests.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Engine<D> {
    me: NodeId,
    config: Config,
    segments: FxHashMap<SegmentId, Segment>,
    /// Faults that wait: at most one request for each page.
    pending: FxHashMap<Page, Pending<D>>,
    /// Pages that were pushed here before it is known how their last eviction has ended.
    pushed: FxHashMap<Page, cache::Grant<D>>,
    /// Faults that wait until the home of their extent is known.
    finding: FxHashMap<Extent, Vec<Page>>,
    /// What the home asked for while the page was held, by the end of the hold.
    deferred: BTreeMap<(Time, Page), Take>,
    /// Pages at home here that a transaction is under way for.
    transactions: FxHashMap<Page, Transaction<D>>,
    /// Extents at home here that are moving.
    moves: FxHashMap<Extent, Move<D>>,
    view: View<D>,
    /// Extents at home here whose directory is made anew.
    rebuilds: FxHashMap<Extent, Rebuild<D>>,
    /// What came for extents that may be at home here, until the coordinator has said where they are.
    unrouted: FxHashMap<Extent, Vec<Work<D>>>,
    counters: Counters,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Segment {
    pages: u32,
    default_home: Option<NodeId>,
    /// By extent index; as long as the highest extent touched so far needs.
    extents: Vec<Option<Box<ExtentState>>>,
}

/// What a node knows of an extent.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ExtentState {
    home: Home,
    /// Whether this node has ever given the directory away.
    was_home: bool,
    /// This node's copies.
    lines: Box<[Line]>,
    /// Where this node is the home.
    directory: Option<Directory>,
}

/// Where an extent's home is believed to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Home {
    /// At the segment's default home.
    #[default]
    Default,
    /// A home at some time: learned from a grant, from the coordinator, or because it moved
    /// there from here. Whoever was a home once leads to a later one, so any of them will do.
    At(NodeId),
    /// Only the coordinator knows.
    Ask,
}

/// The circumstances of one input.
struct Context<'a, D> {
    now: Time,
    memory: &'a dyn Memory,
    out: &'a mut Vec<Action<D>>,
}

impl<D> Context<'_, D> {
    fn send(&mut self, to: NodeId, message: PageMessage, body: Body<D>) {
        self.out.push(Action::Send { to, message, body });
    }
}

impl<D> Engine<D> {
    /// The engine of node `me`, which knows of no segment.
    #[must_use]
    pub fn new(me: NodeId, config: Config) -> Self {
        Self {
            me,
            config,
            segments: FxHashMap::default(),
            pending: FxHashMap::default(),
            pushed: FxHashMap::default(),
            finding: FxHashMap::default(),
            deferred: BTreeMap::new(),
            transactions: FxHashMap::default(),
            moves: FxHashMap::default(),
            view: View::default(),
            rebuilds: FxHashMap::default(),
            unrouted: FxHashMap::default(),
            counters: Counters::default(),
        }
    }

    /// Begins to track a segment; does nothing if it is tracked already.
    ///
    /// A node must do so before it handles the first message about the segment, also where it
    /// serves only as a home and none of its processes is attached.
    pub fn add_segment(&mut self, segment: SegmentId, pages: u32, default_home: Option<NodeId>) {
        self.segments.entry(segment).or_insert_with(|| Segment {
            pages,
            default_home,
            extents: Vec::new(),
        });
    }

    /// Forgets a segment; messages about it have no effect from now on.
    pub fn remove_segment(&mut self, segment: SegmentId) {
        self.segments.remove(&segment);
        self.pending.retain(|page, _| page.segment != segment);
        self.pushed.retain(|page, _| page.segment != segment);
        self.finding.retain(|extent, _| extent.segment != segment);
        self.deferred.retain(|(_, page), _| page.segment != segment);
        self.transactions.retain(|page, _| page.segment != segment);
        self.moves.retain(|extent, _| extent.segment != segment);
        self.rebuilds.retain(|extent, _| extent.segment != segment);
        self.unrouted.retain(|extent, _| extent.segment != segment);
        self.view.remove_segment(segment);
    }

    /// What local processes may do with a page now; `None` if nothing.
    #[must_use]
    pub fn access(&self, page: Page) -> Option<Access> {
        self.line(page).state.access()
    }

    /// Whether this node keeps the extent's directory.
    #[must_use]
    pub fn is_home(&self, extent: Extent) -> bool {
        self.extent(extent)
            .is_some_and(|state| state.directory.is_some())
    }

    /// Whether [`Input::Push`] could be for something: no other node has what this one wrote, or (to be
    /// written) this node has a copy that the writer would have to take from it.
    #[must_use]
    pub fn can_push(&self, page: Page, access: Access) -> bool {
        let line = self.line(page);
        let is_news = match line.state {
            State::Exclusive => true,
            State::Shared => access == Access::Write,
            _ => false,
        };
        is_news && !line.wanted && !self.is_pending(page)
    }

    /// Whether the page was asked for and has not come yet.
    #[must_use]
    pub fn is_pending(&self, page: Page) -> bool {
        self.pending.contains_key(&page)
    }

    /// Extents at home here.
    #[must_use]
    pub fn homes(&self) -> usize {
        let extents = self
            .segments
            .values()
            .flat_map(|s| s.extents.iter().flatten());
        extents.filter(|extent| extent.directory.is_some()).count()
    }

    /// When [`Input::Timeout`] is due; it may come later, or needlessly.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.deferred
            .first_key_value()
            .map(|(&(until, _), _)| until)
    }

    /// What the directories and this node's own part of them take; looks at every extent.
    #[must_use]
    pub fn footprint(&self) -> Footprint {
        let mut footprint = Footprint::default();
        for Segment { extents, .. } in self.segments.values() {
            footprint.lines += extents.capacity() * size_of::<Option<Box<ExtentState>>>();
            for state in extents.iter().flatten() {
                footprint.lines += size_of::<ExtentState>() + size_of_val(&*state.lines);
                if let Some(directory) = &state.directory {
                    footprint.lines -= size_of::<Directory>();
                    footprint.directory += size_of::<Directory>() + directory.heap_bytes();
                    footprint.touched += directory.touched().count();
                }
            }
        }
        footprint
    }

    /// How often what happened.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Handles one event and appends what is to be done to `out`.
    ///
    /// The actions must be executed in order, and all of them before the next event is handled:
    /// messages to one node leave in the order of their `Send` actions. Events about different pages
    /// may be handled together: [`crate::gather`] says what may be reordered then.
    pub fn handle(
        &mut self,
        now: Time,
        input: Input<D>,
        memory: &dyn Memory,
        out: &mut Vec<Action<D>>,
    ) {
        let cx = &mut Context { now, memory, out };
        match input {
            Input::Fault { page, access } => self.fault(cx, page, access),
            Input::Prefetch { page, access } => self.prefetch(cx, page, access),
            Input::Message {
                from,
                message,
                data,
            } => self.receive(cx, from, message, data),
            Input::HomeIs {
                extent,
                home,
                orphaned,
            } => self.home_is(cx, extent, home, orphaned),
            Input::View { number, members } => self.begin_view(cx, number, members),
            Input::Flush { from, view } => self.flush_received(cx, from, view),
            Input::Evict { page } => self.evict(cx, page),
            Input::MoveHome { extent, to } => self.move_home(cx, extent, to),
            Input::Push { page, access, to } => self.push(cx, page, access, to),
            Input::Timeout => self.end_holds(cx),
        }
    }

    fn receive(
        &mut self,
        cx: &mut Context<'_, D>,
        from: NodeId,
        message: PageMessage,
        data: Option<D>,
    ) {
        let subject = match message.subject() {
            Subject::Page(page) => self.knows(page),
            Subject::Extent(extent) => self.knows(first_page(extent)),
        };
        if from == self.me || !is_node(from) || !names_nodes(&message) {
            return self.protocol_error();
        }
        match (subject, &message) {
            (Known::Yes, _) => {}
            (Known::NoSegment, &PageMessage::Survey { extent }) => {
                return self.surveyed(cx, from, extent);
            }
            (Known::NoSegment, _) => {
                self.counters.unknown_segment += 1;
                return;
            }
            (Known::OutOfRange, _) => return self.protocol_error(),
        }
        if let Some((message, data)) = self.current_only(cx, from, message, data) {
            self.dispatch(cx, from, message, data);
        }
    }

    /// Handles a message of the current view.
    fn dispatch(
        &mut self,
        cx: &mut Context<'_, D>,
        from: NodeId,
        message: PageMessage,
        data: Option<D>,
    ) {
        match message {
            PageMessage::Request {
                page,
                access,
                requester,
                has_copy,
                prefetch,
            } => {
                let asked = Asked {
                    page,
                    access,
                    requester,
                    has_copy,
                    prefetch,
                };
                self.request(cx, asked);
            }
            PageMessage::Forward {
                page,
                access,
                requester,
                acks,
                pushed,
                prefetch,
            } => {
                let home = from;
                let give = cache::Give {
                    home,
                    access,
                    requester,
                    acks,
                    pushed,
                    prefetch,
                };
                self.forwarded(cx, page, give);
            }
            PageMessage::Decline { page, requester } => {
                self.decline_received(cx, page, from, requester);
            }
            PageMessage::Invalidate { page, requester } => self.invalidated(cx, page, requester),
            PageMessage::Grant {
                page,
                access,
                acks,
                contents,
                home,
                confirm,
                pushed,
            } => {
                let contents = match (contents, data) {
                    (Contents::Bytes, Some(data)) => Fill::Data(data),
                    (Contents::Bytes, None) => return self.protocol_error(),
                    (Contents::Zeros, _) => Fill::Zeros,
                    (Contents::Yours, _) => Fill::InPlace,
                };
                let grant = cache::Grant {
                    access,
                    acks,
                    contents,
                    home,
                    confirm,
                };
                if pushed {
                    self.pushed(cx, page, grant);
                } else {
                    self.granted(cx, page, grant);
                }
            }
            PageMessage::Push { page, access, to } => self.pass_on(cx, page, access, from, to),
            PageMessage::Relinquish { page, sharer } => {
                self.hand_back(cx, Work::Relinquish { page, sharer });
            }
            PageMessage::InvalidateAck { page } => self.invalidate_acked(cx, page),
            PageMessage::Done { page } => self.done(cx, page, from),
            PageMessage::WriteBack { page, owner } => match data {
                Some(data) => self.hand_back(cx, Work::WriteBack { page, owner, data }),
                None => self.protocol_error(),
            },
            PageMessage::WriteBackAck { page, accepted } => {
                self.written_back(cx, page, accepted);
            }
            PageMessage::Fence { extent } => {
                cx.send(from, PageMessage::FenceAck { extent }, Body::None);
            }
            PageMessage::FenceAck { extent } => self.fence_acked(cx, extent, from),
            PageMessage::HomeTransfer { extent, entries } => {
                self.home_transferred(cx, extent, &entries);
            }
            PageMessage::Survey { extent } => self.surveyed(cx, from, extent),
            PageMessage::Holdings { extent, pages } => {
                self.holdings_received(cx, extent, from, pages);
            }
            PageMessage::Lost { page } => self.page_lost(cx, page),
        }
    }

    fn protocol_error(&mut self) {
        self.counters.protocol_errors += 1;
    }

    /// Where requests for the extent go, if that is known.
    fn home_of(&self, extent: Extent) -> Option<NodeId> {
        match self.extent(extent) {
            Some(ExtentState {
                directory: Some(_), ..
            }) => Some(self.me),
            Some(ExtentState {
                home: Home::At(home),
                ..
            }) => Some(*home),
            Some(ExtentState {
                home: Home::Ask, ..
            }) => None,
            _ => self.segments.get(&extent.segment)?.default_home,
        }
    }

    fn knows(&self, page: Page) -> Known {
        match self.segments.get(&page.segment) {
            None => Known::NoSegment,
            Some(segment) if page.index < segment.pages => Known::Yes,
            Some(_) => Known::OutOfRange,
        }
    }

    fn extent(&self, extent: Extent) -> Option<&ExtentState> {
        self.segments
            .get(&extent.segment)?
            .extents
            .get(extent.index as usize)?
            .as_deref()
    }

    /// The state of an extent, made on first use.
    ///
    /// # Panics
    ///
    /// If the extent is not one of a known segment: inputs are checked on entry.
    fn extent_mut(&mut self, extent: Extent) -> &mut ExtentState {
        let segment = self
            .segments
            .get_mut(&extent.segment)
            .expect("checked on entry");
        let index = extent.index as usize;
        if segment.extents.len() <= index {
            segment.extents.resize_with(index + 1, || None);
        }
        segment.extents[index].get_or_insert_with(|| {
            let pages = (segment.pages - extent.first_page()).min(EXTENT_PAGES) as usize;
            Box::new(ExtentState {
                home: Home::Default,
                was_home: false,
                lines: vec![Line::default(); pages].into(),
                directory: None,
            })
        })
    }
}

/// Whether a page is one of a segment tracked here.
enum Known {
    Yes,
    NoSegment,
    OutOfRange,
}

/// Whether every node that the message names can exist.
fn names_nodes(message: &PageMessage) -> bool {
    match message {
        PageMessage::Request {
            requester: node, ..
        }
        | PageMessage::Forward {
            requester: node, ..
        }
        | PageMessage::Decline {
            requester: node, ..
        }
        | PageMessage::Invalidate {
            requester: node, ..
        }
        | PageMessage::Grant { home: node, .. }
        | PageMessage::Push { to: node, .. }
        | PageMessage::Relinquish { sharer: node, .. }
        | PageMessage::WriteBack { owner: node, .. } => is_node(*node),
        PageMessage::HomeTransfer { entries, .. } => {
            entries.iter().filter_map(|e| e.owner).all(is_node)
        }
        _ => true,
    }
}

fn is_node(node: NodeId) -> bool {
    usize::from(node.0) < MAX_NODES
}

fn first_page(extent: Extent) -> Page {
    // Saturated, an index out of range stays out of range.
    Page {
        segment: extent.segment,
        index: extent.index.saturating_mul(EXTENT_PAGES),
    }
}

/// Index of a page in its extent.
fn slot(page: Page) -> usize {
    (page.index % EXTENT_PAGES) as usize
}
