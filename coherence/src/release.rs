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
//! # States of a page
//!
//! | state | processes may | read fault | write fault | another node's change is learned of | release | evict |
//! |---|---|---|---|---|---|---|
//! | Absent | nothing | `Fetch` → Clean | `Fetch` → Dirty | fetched again, if it is being fetched | - | - |
//! | Clean | read | - | twin → Dirty | drop → Absent | - | drop → Absent |
//! | Dirty | write | - | - | protect, diff to home, drop → Absent | diff to home, twin := page | protect, diff to home, drop → Absent |
//!
//! and at the page's home:
//!
//! | state | processes may | write fault | `Fetch` | `Diffs` | release | evict |
//! |---|---|---|---|---|---|---|
//! | Absent: no other node has had it | write | - | protect, send → Clean | - | - | - |
//! | Clean | read | twin → Dirty | send | merge | - | - |
//! | Dirty | write | - | send, twin := page | merge, into the twin too | twin := page | protect → Clean |
//!
//! A page that is Dirty stays so after a release: a program that iterates takes no write faults.
//! After [`PATIENCE`] releases at which it was the same as its twin it becomes Clean. A page that a
//! thread has used since it came is fetched again as soon as it is dropped for another node's
//! change, and is writable at once if it was Dirty: what is used in every round is there when the
//! round begins.
//!
//! # Messages
//!
//! W has written pages of H, of which R has copies; C is the coordinator.
//!
//! ```text
//! W ──Diffs──▶ H     merged into H's pages
//! W ◀─Merged── H     "R, say, has a copy"
//! W ──Wrote, the call──▶ C     adds the pages to what it has to tell the other nodes
//!                        C ──Changed, an answer──▶ R     drops the pages, then passes on the answer
//!                                                  R ──Fetch──▶ H
//!                                                  R ◀─Copy──── H
//! ```
//!
//! # What else has to hold
//!
//! - A home whose page is Dirty has its twin be what it sent: a write that is undone before the next
//!   release would otherwise go unnoticed, while the copy has it.
//! - A copy that was asked for before its page was changed may be old: it is asked for again.
//! - A `Fetch` follows the node's own diffs of the page, on one stream.
//! - What was sent home without a release (a page was evicted, or dropped) is told at the next one.
//! - Homes of these segments do not move.
//!
//! A node that dies takes the pages with it whose home it is: who touches them gets SIGBUS.

mod copies;
mod diff;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use migshm_protocol::ids::{EXTENT_PAGES, MAX_NODES};
use migshm_protocol::page::Access;
use migshm_protocol::release::{MAX_DIFFS, MAX_WANTED, ReleaseMessage, RunSet, Runs};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};

use copies::Copies;
pub use diff::Diff;

/// Releases in a row that find a page the same as its twin, after which it is protected again.
pub const PATIENCE: u8 = 3;

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
    /// The page cannot be had: whoever waits for it gets SIGBUS.
    Fail {
        /// The page.
        page: Page,
    },
}

/// How often what happened, since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ReleaseCounters {
    /// Faults of local processes.
    pub faults: u64,
    /// Pages asked of their homes.
    pub fetches: u64,
    /// Of them, those asked for again without a fault, as they had been used.
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
    /// Copies dropped because another node had changed the page.
    pub invalidations: u64,
    /// Copies dropped to make room.
    pub evictions: u64,
    /// Messages about segments that are not (or no longer) known here.
    pub unknown_segment: u64,
    /// Messages that no correct peer sends; they had no effect.
    pub protocol_errors: u64,
}

/// A node's side of the protocol.
#[derive(Clone, Debug)]
pub struct Release {
    tables: Tables,
    counters: ReleaseCounters,
    /// Reused for the page that is looked at.
    buffer: Vec<u8>,
}

/// All of the state that decides what happens next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
    /// Diffs that are not merged yet, as far as is known: whose they are to be.
    unmerged: BTreeMap<u64, (NodeId, SegmentId)>,
    /// What has to be told at the next release.
    wrote: BTreeMap<SegmentId, RunSet>,
    /// Releases under way: number of the last diffs that each waits for.
    releases: VecDeque<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Segment {
    pages: u32,
    default_home: Option<NodeId>,
    /// Nodes that have left since the segment is known.
    lost: NodeSet,
    /// By extent index; as long as the highest extent touched so far needs.
    extents: Vec<Option<Box<ExtentState>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ExtentState {
    home: Option<NodeId>,
    lines: Box<[Line]>,
    /// At the home: who may have a copy of each page.
    copies: Copies,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Line {
    state: State,
    /// Whether it came without a fault.
    prefetched: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum State {
    /// At its home: here, and with no other node.
    #[default]
    Absent,
    Clean,
    Dirty,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Twin {
    bytes: Box<[u8]>,
    /// Releases in a row that found no change.
    idle: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// By home and segment.
    diffs: BTreeMap<(NodeId, SegmentId), Vec<(u32, Diff)>>,
    wanted: BTreeMap<(NodeId, SegmentId), Vec<u32>>,
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
        let new = || Segment {
            pages,
            default_home,
            lost: NodeSet::default(),
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
        tables.unmerged.retain(|_, (_, of)| *of != segment);
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
            State::Absent => self.is_home(page.extent()).then_some(Access::Write),
        }
    }

    /// Whether this node is the home of an extent, as far as it knows.
    #[must_use]
    pub fn is_home(&self, extent: Extent) -> bool {
        self.home_of(extent) == Some(self.tables.me)
    }

    /// Whether there is nothing to release, and no release under way.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let Tables {
            twins,
            unmerged,
            wrote,
            releases,
            ..
        } = &self.tables;
        twins.is_empty() && unmerged.is_empty() && wrote.is_empty() && releases.is_empty()
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
        };
        match input {
            Input::Fault { page, access } => self.fault(cx, page, access),
            Input::Message {
                from,
                message,
                data,
            } => self.receive(cx, from, message, &data),
            Input::HomeIs { extent, home } => self.home_is(cx, extent, home),
            Input::Release => self.release(cx),
            Input::Changed { segment, pages } => self.changed(cx, segment, &pages),
            Input::Evict { page } => self.evict(cx, page),
            Input::Left { node } => self.left(cx, node),
        }
        self.send_all(cx);
        self.complete_releases(cx.out);
    }
}

/// As a user of pages.
impl Release {
    fn fault(&mut self, cx: &mut Context<'_>, page: Page, access: Access) {
        if !self.knows(page) || self.access(page) >= Some(access) {
            return;
        }
        self.counters.faults += 1;
        if self.line(page).state == State::Clean {
            cx.frames.read(page, &mut self.buffer);
            self.begin_writing(page, None);
            return cx.frames.permit(page);
        }
        self.want(cx, page, access == Access::Write, false);
    }

    /// A page becomes Dirty; its twin is `contents`, or what is in the buffer.
    fn begin_writing(&mut self, page: Page, contents: Option<&[u8]>) {
        let bytes = contents.unwrap_or(&self.buffer).into();
        self.tables.twins.insert(page, Twin { bytes, idle: 0 });
        self.line_mut(page).state = State::Dirty;
        self.counters.twins += 1;
    }

    /// Has a page come, if it is not on its way yet.
    fn want(&mut self, cx: &mut Context<'_>, page: Page, write: bool, prefetch: bool) {
        if let Some(pending) = self.tables.pending.get_mut(&page) {
            pending.write |= write;
            pending.prefetch &= prefetch;
            return;
        }
        let pending = Pending {
            number: 0,
            write,
            prefetch,
        };
        self.tables.pending.insert(page, pending);
        match self.home_of(page.extent()) {
            Some(home) => self.fetch(cx, page, home),
            None => {
                let waiting = self.tables.finding.entry(page.extent()).or_default();
                waiting.insert(page.index);
                if waiting.len() == 1 {
                    let extent = page.extent();
                    cx.out.push(Action::FindHome { extent });
                }
            }
        }
    }

    /// Asks for a page that is pending.
    fn fetch(&mut self, cx: &mut Context<'_>, page: Page, home: NodeId) {
        let segment = self.tables.segments.get(&page.segment);
        if segment.is_some_and(|segment| segment.lost.contains(home)) {
            self.tables.pending.remove(&page);
            return cx.out.push(Action::Fail { page });
        }
        let wanted = cx.wanted.entry((home, page.segment)).or_default();
        wanted.push(page.index);
        self.counters.fetches += 1;
    }

    fn home_is(&mut self, cx: &mut Context<'_>, extent: Extent, home: Option<NodeId>) {
        let waiting = self.tables.finding.remove(&extent).unwrap_or_default();
        let home = home.filter(|home| usize::from(home.0) < MAX_NODES);
        if self.knows(first_page(extent)) {
            let known = &mut self.extent_mut(extent).home;
            *known = known.or(home);
        }
        for index in waiting {
            let page = Page {
                segment: extent.segment,
                index,
            };
            if !self.tables.pending.contains_key(&page) {
                continue;
            }
            match home {
                Some(home) if home == self.tables.me => {
                    self.tables.pending.remove(&page);
                    cx.frames.retry(page);
                }
                Some(home) => self.fetch(cx, page, home),
                None => {
                    self.tables.pending.remove(&page);
                    cx.out.push(Action::Fail { page });
                }
            }
        }
    }

    fn copied(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        page: Page,
        number: u64,
        contents: Option<&[u8]>,
    ) {
        if self.home_of(page.extent()) != Some(from) {
            return self.protocol_error();
        }
        // An older answer, of which a newer one was asked since.
        let Some(pending) = self.tables.pending.get(&page).copied() else {
            return;
        };
        if pending.number != number {
            return;
        }
        self.tables.pending.remove(&page);
        self.line_mut(page).prefetched = pending.prefetch;
        if pending.write {
            let zeros;
            let bytes = match contents {
                Some(bytes) => bytes,
                None => {
                    zeros = vec![0; self.tables.page_size];
                    &zeros
                }
            };
            self.begin_writing(page, Some(bytes));
            cx.frames.install(page, Access::Write, contents);
        } else {
            self.line_mut(page).state = State::Clean;
            cx.frames.install(page, Access::Read, contents);
        }
    }

    fn changed(&mut self, cx: &mut Context<'_>, segment: SegmentId, runs: &Runs) {
        for page in self.known_pages(segment, runs) {
            if self.is_home(page.extent()) {
                continue;
            }
            let Line { state, prefetched } = self.line(page);
            if state == State::Absent {
                if let Some(pending) = self.tables.pending.get(&page)
                    && pending.number != 0
                    && let Some(home) = self.home_of(page.extent())
                {
                    self.fetch(cx, page, home);
                }
                continue;
            }
            let is_used = !prefetched || cx.frames.is_used(page);
            self.lose(cx, page);
            self.counters.invalidations += 1;
            if is_used {
                self.counters.prefetches += 1;
                self.want(cx, page, state == State::Dirty, true);
            }
        }
    }

    /// Drops a page that has its home elsewhere, and sends home what was written to it.
    fn lose(&mut self, cx: &mut Context<'_>, page: Page) {
        if self.line(page).state == State::Dirty {
            cx.frames.protect(page);
            self.note_change(cx, page);
            self.tables.twins.remove(&page);
        }
        cx.frames.drop(page);
        *self.line_mut(page) = Line::default();
    }

    fn evict(&mut self, cx: &mut Context<'_>, page: Page) {
        if !self.knows(page) || self.tables.pending.contains_key(&page) {
            return;
        }
        match (self.line(page).state, self.is_home(page.extent())) {
            (State::Clean | State::Dirty, false) => {
                self.lose(cx, page);
                self.counters.evictions += 1;
            }
            (State::Dirty, true) => self.end_writing(cx, page),
            _ => {}
        }
    }

    fn release(&mut self, cx: &mut Context<'_>) {
        if !self.is_clean() {
            self.counters.releases += 1;
        }
        let dirty: Vec<Page> = self.tables.twins.keys().copied().collect();
        for page in dirty {
            if self.note_change(cx, page) {
                continue;
            }
            let Some(twin) = self.tables.twins.get_mut(&page) else {
                continue;
            };
            twin.idle += 1;
            if twin.idle >= PATIENCE {
                self.end_writing(cx, page);
            }
        }
        self.send_all(cx);
        self.tables.releases.push_back(self.tables.last);
    }

    /// Makes a Dirty page Clean.
    fn end_writing(&mut self, cx: &mut Context<'_>, page: Page) {
        cx.frames.protect(page);
        self.note_change(cx, page);
        self.tables.twins.remove(&page);
        self.line_mut(page).state = State::Clean;
    }

    /// Finds out what was written to a Dirty page since the twin was taken, has it sent home, and
    /// makes the twin the page as it is. Whether there was anything.
    fn note_change(&mut self, cx: &mut Context<'_>, page: Page) -> bool {
        let is_home = self.is_home(page.extent());
        let Some(twin) = self.tables.twins.get_mut(&page) else {
            return false;
        };
        cx.frames.read(page, &mut self.buffer);
        if *twin.bytes == *self.buffer {
            return false;
        }
        if is_home {
            let wrote = self.tables.wrote.entry(page.segment).or_default();
            wrote.insert(page.index, 1);
        } else if let Some(diff) = Diff::between(&twin.bytes, &self.buffer) {
            self.counters.diffs += 1;
            self.counters.diff_bytes += diff.as_bytes().len() as u64;
            if let Some(home) = self.home_of(page.extent()) {
                let diffs = cx.diffs.entry((home, page.segment)).or_default();
                diffs.push((page.index, diff));
            }
        }
        if let Some(twin) = self.tables.twins.get_mut(&page) {
            twin.bytes.copy_from_slice(&self.buffer);
            twin.idle = 0;
        }
        true
    }

    fn merged(&mut self, from: NodeId, segment: SegmentId, number: u64, shared: &[u32]) {
        if self.tables.unmerged.get(&number) != Some(&(from, segment)) {
            return self.protocol_error();
        }
        self.tables.unmerged.remove(&number);
        let in_range = |page: &&u32| self.tables.segments[&segment].pages > **page;
        let shared: Vec<u32> = shared.iter().filter(in_range).copied().collect();
        if !shared.is_empty() {
            let wrote = self.tables.wrote.entry(segment).or_default();
            shared.iter().for_each(|&page| wrote.insert(page, 1));
        }
    }

    fn complete_releases(&mut self, out: &mut Vec<Action>) {
        while let Some(&last) = self.tables.releases.front() {
            let oldest = self.tables.unmerged.keys().next();
            if oldest.is_some_and(|&oldest| oldest <= last) {
                return;
            }
            self.tables.releases.pop_front();
            let wrote = std::mem::take(&mut self.tables.wrote);
            let wrote = wrote.into_iter();
            let wrote = wrote.map(|(segment, pages)| (segment, pages.runs()));
            out.push(Action::Released {
                wrote: wrote.collect(),
            });
        }
    }

    /// A node takes with it what is at home there, and needs nothing any more.
    fn left(&mut self, cx: &mut Context<'_>, node: NodeId) {
        let tables = &mut self.tables;
        for segment in tables.segments.values_mut() {
            segment.lost.insert(node);
            for extent in segment.extents.iter_mut().flatten() {
                extent.copies.forget(node);
            }
        }
        tables.unmerged.retain(|_, (home, _)| *home != node);
        let lost = |page: &Page| self.home_of(page.extent()) == Some(node);
        let pending: Vec<Page> = self.tables.pending.keys().copied().filter(lost).collect();
        for page in pending {
            self.tables.pending.remove(&page);
            cx.out.push(Action::Fail { page });
        }
    }
}

/// As a home.
impl Release {
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        message: ReleaseMessage,
        data: &[u8],
    ) {
        if !self.has_segment(message.segment()) {
            self.counters.unknown_segment += 1;
            return;
        }
        if from == self.tables.me || usize::from(from.0) >= MAX_NODES {
            return self.protocol_error();
        }
        match message {
            ReleaseMessage::Fetch {
                segment,
                number,
                pages,
            } => {
                if pages.len() > MAX_WANTED {
                    return self.protocol_error();
                }
                for index in pages {
                    self.serve(cx, from, Page { segment, index }, number);
                }
            }
            ReleaseMessage::Copy {
                page,
                number,
                zeros,
            } => {
                let fits = data.len() == if zeros { 0 } else { self.tables.page_size };
                if !fits || !self.knows(page) {
                    return self.protocol_error();
                }
                self.copied(cx, from, page, number, (!zeros).then_some(data));
            }
            ReleaseMessage::Diffs {
                segment,
                number,
                pages,
            } => {
                let shared = self.merge(cx, from, segment, &pages, data);
                cx.out.push(Action::Send {
                    to: from,
                    message: ReleaseMessage::Merged {
                        segment,
                        number,
                        shared,
                    },
                    data: Vec::new(),
                });
            }
            ReleaseMessage::Merged {
                segment,
                number,
                shared,
            } => self.merged(from, segment, number, &shared),
        }
    }

    /// Whether this node is a page's home; it becomes that if the coordinator may have said so to
    /// another node and not yet to this one.
    fn acts_as_home(&mut self, page: Page) -> bool {
        if !self.knows(page) {
            return false;
        }
        let me = self.tables.me;
        if self.home_of(page.extent()).is_none() {
            self.extent_mut(page.extent()).home = Some(me);
        }
        self.is_home(page.extent())
    }

    fn serve(&mut self, cx: &mut Context<'_>, to: NodeId, page: Page, number: u64) {
        if !self.acts_as_home(page) {
            return self.protocol_error();
        }
        let state = self.line(page).state;
        if state == State::Absent {
            cx.frames.protect(page);
            self.line_mut(page).state = State::Clean;
        }
        let extent = self.extent_mut(page.extent());
        extent.copies.add(to, slot(page), extent.lines.len());
        if state != State::Dirty || !self.note_change(cx, page) {
            cx.frames.read(page, &mut self.buffer);
        }
        let zeros = self.buffer.iter().all(|&byte| byte == 0);
        self.counters.copies += 1;
        cx.out.push(Action::Send {
            to,
            message: ReleaseMessage::Copy {
                page,
                number,
                zeros,
            },
            data: if zeros {
                Vec::new()
            } else {
                self.buffer.clone()
            },
        });
    }

    /// Merges diffs of another node; gives the pages that a third has copies of.
    fn merge(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        segment: SegmentId,
        pages: &[(u32, u32)],
        mut data: &[u8],
    ) -> Vec<u32> {
        let mut shared = Vec::new();
        for &(index, length) in pages {
            let page = Page { segment, index };
            let Some((bytes, rest)) = data.split_at_checked(length as usize) else {
                self.protocol_error();
                break;
            };
            data = rest;
            let diff = Diff::parse(bytes, self.tables.page_size);
            let is_home = self.knows(page) && self.is_home(page.extent());
            let Some(diff) = diff.filter(|_| is_home && self.copies(page).contains(from)) else {
                self.protocol_error();
                continue;
            };
            cx.frames.merge(page, &diff);
            if let Some(twin) = self.tables.twins.get_mut(&page) {
                diff.apply(&mut twin.bytes);
            }
            if !self.copies(page).without(from).is_empty() {
                shared.push(index);
            }
            self.counters.merges += 1;
        }
        shared
    }

    fn copies(&self, page: Page) -> NodeSet {
        let extent = self.extent(page.extent());
        extent
            .map(|extent| extent.copies.of(slot(page)))
            .unwrap_or_default()
    }
}

/// The tables.
impl Release {
    /// Sends what was put together: diffs first, as what is fetched has to contain them.
    fn send_all(&mut self, cx: &mut Context<'_>) {
        for ((to, segment), diffs) in std::mem::take(&mut cx.diffs) {
            let mut rest = diffs.as_slice();
            while !rest.is_empty() {
                let mut bytes = 0;
                let fits = rest.iter().take_while(|(_, diff)| {
                    bytes += diff.as_bytes().len();
                    bytes <= MAX_DIFFS
                });
                let (now, later) = rest.split_at(fits.count().max(1));
                rest = later;
                self.send_diffs(cx, to, segment, now);
            }
        }
        for ((to, segment), pages) in std::mem::take(&mut cx.wanted) {
            for pages in pages.chunks(MAX_WANTED) {
                self.tables.last += 1;
                let number = self.tables.last;
                for &index in pages {
                    let page = Page { segment, index };
                    if let Some(pending) = self.tables.pending.get_mut(&page) {
                        pending.number = number;
                    }
                }
                let message = ReleaseMessage::Fetch {
                    segment,
                    number,
                    pages: pages.to_vec(),
                };
                let data = Vec::new();
                cx.out.push(Action::Send { to, message, data });
            }
        }
    }

    fn send_diffs(
        &mut self,
        cx: &mut Context<'_>,
        to: NodeId,
        segment: SegmentId,
        diffs: &[(u32, Diff)],
    ) {
        let lost = self.tables.segments.get(&segment);
        if lost.is_none_or(|segment| segment.lost.contains(to)) {
            return;
        }
        self.tables.last += 1;
        let number = self.tables.last;
        self.tables.unmerged.insert(number, (to, segment));
        let length =
            |diff: &Diff| u32::try_from(diff.as_bytes().len()).expect("less than a page twice");
        let pages = diffs.iter().map(|(page, diff)| (*page, length(diff)));
        let message = ReleaseMessage::Diffs {
            segment,
            number,
            pages: pages.collect(),
        };
        let data = diffs.iter().flat_map(|(_, diff)| diff.as_bytes());
        let data = data.copied().collect();
        cx.out.push(Action::Send { to, message, data });
    }

    fn protocol_error(&mut self) {
        self.counters.protocol_errors += 1;
    }

    fn knows(&self, page: Page) -> bool {
        let segment = self.tables.segments.get(&page.segment);
        segment.is_some_and(|segment| page.index < segment.pages)
    }

    /// The pages in some runs that this node has, or waits for.
    fn known_pages(&self, segment: SegmentId, runs: &Runs) -> Vec<Page> {
        let Some(known) = self.tables.segments.get(&segment) else {
            return Vec::new();
        };
        let mut pages = Vec::new();
        for &(first, count) in runs {
            let end = first.saturating_add(count).min(known.pages);
            for extent in first / EXTENT_PAGES..end.div_ceil(EXTENT_PAGES) {
                let extent = Extent {
                    segment,
                    index: extent,
                };
                if self.extent(extent).is_none() {
                    continue;
                }
                let from = extent.first_page().max(first);
                let to = (extent.first_page() + EXTENT_PAGES).min(end);
                let has = |page: &Page| {
                    self.line(*page).state != State::Absent
                        || self.tables.pending.contains_key(page)
                };
                let in_extent = (from..to).map(|index| Page { segment, index });
                pages.extend(in_extent.filter(has));
            }
        }
        pages
    }

    fn home_of(&self, extent: Extent) -> Option<NodeId> {
        let known = self.extent(extent).and_then(|extent| extent.home);
        let segment = self.tables.segments.get(&extent.segment);
        known.or(segment.and_then(|segment| segment.default_home))
    }

    fn extent(&self, extent: Extent) -> Option<&ExtentState> {
        let segment = self.tables.segments.get(&extent.segment)?;
        segment.extents.get(extent.index as usize)?.as_deref()
    }

    /// # Panics
    ///
    /// If it is not one of a known segment.
    fn extent_mut(&mut self, extent: Extent) -> &mut ExtentState {
        let segment = self.tables.segments.get_mut(&extent.segment);
        let segment = segment.expect("a known segment");
        let index = extent.index as usize;
        if segment.extents.len() <= index {
            segment.extents.resize(index + 1, None);
        }
        let pages = (segment.pages - extent.first_page()).min(EXTENT_PAGES);
        segment.extents[index].get_or_insert_with(|| {
            Box::new(ExtentState {
                home: None,
                lines: vec![Line::default(); pages as usize].into(),
                copies: Copies::default(),
            })
        })
    }

    fn line(&self, page: Page) -> Line {
        let extent = self.extent(page.extent());
        let line = extent.and_then(|extent| extent.lines.get(slot(page)));
        line.copied().unwrap_or_default()
    }

    /// # Panics
    ///
    /// If the page is not one of a known segment.
    fn line_mut(&mut self, page: Page) -> &mut Line {
        &mut self.extent_mut(page.extent()).lines[slot(page)]
    }
}

/// Index of a page in its extent.
fn slot(page: Page) -> usize {
    (page.index % EXTENT_PAGES) as usize
}

fn first_page(extent: Extent) -> Page {
    Page {
        segment: extent.segment,
        index: extent.first_page(),
    }
}
