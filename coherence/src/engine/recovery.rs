//! The death of a node: what the survivors hold becomes the truth.
//!
//! A *view* is the cluster between two deaths. When one ends, every transaction ends with it: what
//! was asked for is asked for again, of directories that are made anew from the pages that are
//! there. That is possible as all copies of a page are equal to its last write, at any moment and
//! whatever is under way: a writer has to wait until all others have dropped theirs. This holds for
//! copies on their way in grants too; so all that has to be known is when they have arrived.
//!
//! ```text
//!                 Left, view 4, from the coordinator
//! each ──Flush 4──────▶ each    what was sent before belongs to view 3: of it, grants are kept as
//!                               copies, a directory on its way is taken over, all else is void
//!                               has a Flush of everyone: nothing of view 3 can come any more
//! each ──Flushed 4────▶ coordinator    names homes again once all have said so
//! H    ──Survey───────▶ each    for each extent at home at H
//! H    ◀─Holdings────── each
//!                               H makes the directory, and does what has waited for that
//! ```
//!
//! - Processes go on meanwhile with the pages that they have; who needs another one waits.
//! - What a survivor held only for reading it answers for now ([`State::Owned`]), lest it be dropped
//!   before the home has counted on it. The home takes it back when it is evicted.
//! - Of an extent whose home died nobody knows what was ever touched: the coordinator gives it
//!   to another node, for which all pages that nobody holds are lost. Where the home lives, pages are
//!   lost that were touched and that nobody holds. A lost page stays lost.
//! - Nobody believes in homes of an earlier view, only in the coordinator, which has heard of all
//!   moves when all have flushed. (A directory that was sent to a node that died is lost too:
//!   its sender then finds itself named, and takes the extent over as another would.)
//! - Another death begins another view, whatever the state of the last one: its messages are the old
//!   ones then, and its directories, half made or not, say only what was touched and lost.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use migshm_protocol::page::{Access, Contents, Holding, PageMessage};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};
use rustc_hash::FxHashMap;

use super::cache::{Grant, Line, Pending, State};
use super::directory::Directory;
use super::home::Work;
use super::{Action, Body, Context, Engine, Fill, Home};
use crate::sets::PageSet;

/// What this node knows of the view.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct View<D> {
    pub(super) number: u64,
    /// The other nodes that were members when it began.
    members: NodeSet,
    /// Those of them from which messages of earlier views may still come.
    unflushed: NodeSet,
    /// The view that the messages of a node are of.
    marks: FxHashMap<NodeId, u64>,
    /// Messages that came before their time, in their order.
    early: VecDeque<Early<D>>,
}

/// A message of a view that has not begun here, or is not flushed.
#[derive(Clone, Debug, Hash, Serialize, Deserialize)]
pub(super) struct Early<D> {
    pub(super) from: NodeId,
    pub(super) view: u64,
    pub(super) message: PageMessage,
    pub(super) data: Option<D>,
}

/// A directory that is made from what the survivors hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Rebuild<D> {
    /// Who has yet to say what it holds.
    pub(super) awaited: NodeSet,
    pub(super) held: Vec<(NodeId, Vec<Holding>)>,
    /// Whether the former home died: nothing is known to have been untouched.
    pub(super) adopted: bool,
    /// What waits for the directory.
    pub(super) queue: VecDeque<Work<D>>,
}

/// To which view a message belongs.
enum Era {
    /// That of a node that is no member.
    None,
    Earlier,
    Current,
    Later(u64),
}

impl<D> Default for View<D> {
    fn default() -> Self {
        Self {
            number: 0,
            members: NodeSet::default(),
            unflushed: NodeSet::default(),
            marks: FxHashMap::default(),
            early: VecDeque::new(),
        }
    }
}

impl<D> View<D> {
    /// Whether no message of an earlier view can come any more.
    pub(super) fn is_flushed(&self) -> bool {
        self.unflushed.is_empty()
    }

    /// Whether a node has not been heard to be gone.
    pub(super) fn is_member(&self, node: NodeId) -> bool {
        self.number == 0 || self.marks.contains_key(&node)
    }

    pub(super) fn remove_segment(&mut self, segment: SegmentId) {
        self.early
            .retain(|early| early.message.segment() != segment);
    }

    fn era(&self, from: NodeId) -> Era {
        match self.marks.get(&from) {
            None if self.number > 0 => Era::None,
            mark => match mark.copied().unwrap_or(0) {
                mark if mark > self.number => Era::Later(mark),
                mark if mark < self.number => Era::Earlier,
                _ if self.is_flushed() => Era::Current,
                mark => Era::Later(mark),
            },
        }
    }

    #[cfg(test)]
    pub(super) fn digest(&self, hasher: &mut impl std::hash::Hasher)
    where
        D: std::hash::Hash,
    {
        use std::hash::Hash;
        (self.number, &self.members, &self.unflushed).hash(hasher);
        let mut marks: Vec<_> = self.marks.iter().collect();
        marks.sort();
        (marks, self.early.len()).hash(hasher);
    }

    /// Whether nothing waits for the view, or for the next one.
    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        self.is_flushed() && self.early.is_empty()
    }

    #[cfg(test)]
    pub(super) fn early(&self) -> impl Iterator<Item = &Early<D>> {
        self.early.iter()
    }
}

impl<D> Engine<D> {
    /// The number of the view; 0 until a node has died.
    #[must_use]
    pub fn view(&self) -> u64 {
        self.view.number
    }

    /// Begins in this view: what happened before is of no concern to a node that has just joined.
    pub fn join_view(&mut self, number: u64) {
        self.view.number = self.view.number.max(number);
    }

    /// A member is gone, and all that was under way with it.
    pub(super) fn begin_view(&mut self, cx: &mut Context<'_, D>, number: u64, members: NodeSet) {
        if number <= self.view.number {
            return;
        }
        let members = members.without(self.me);
        self.view.number = number;
        self.view.members = members;
        self.view.marks.retain(|&node, _| members.contains(node));
        for node in members {
            self.view.marks.entry(node).or_default();
            let view = number;
            cx.out.push(Action::Flush { to: node, view });
        }
        let marks = &self.view.marks;
        let behind = |&node: &NodeId| marks.get(&node).is_some_and(|&mark| mark < number);
        self.view.unflushed = members.into_iter().filter(behind).collect();
        self.abandon(cx);
        let early = std::mem::take(&mut self.view.early);
        for early in early {
            match early.view {
                _ if !members.contains(early.from) => {}
                view if view < number => self.rescue(cx, early.message, early.data),
                _ => self.view.early.push_back(early),
            }
        }
        if self.view.is_flushed() {
            self.flushed(cx);
        }
    }

    /// What `from` says from now on is of this view.
    pub(super) fn flush_received(&mut self, cx: &mut Context<'_, D>, from: NodeId, view: u64) {
        let mark = self.view.marks.entry(from).or_default();
        if *mark > view {
            return self.protocol_error();
        }
        *mark = view;
        if view >= self.view.number && self.view.unflushed.contains(from) {
            self.view.unflushed.remove(from);
            if self.view.is_flushed() {
                self.flushed(cx);
            }
        }
    }

    /// Sees to a message that is not of the current view; gives back one that is.
    pub(super) fn current_only(
        &mut self,
        cx: &mut Context<'_, D>,
        from: NodeId,
        message: PageMessage,
        data: Option<D>,
    ) -> Option<(PageMessage, Option<D>)> {
        match self.view.era(from) {
            Era::Current => return Some((message, data)),
            Era::Later(view) => self.view.early.push_back(Early {
                from,
                view,
                message,
                data,
            }),
            Era::Earlier => self.rescue(cx, message, data),
            Era::None => {}
        }
        None
    }

    /// Ends all transactions. Pages stay what they are here.
    fn abandon(&mut self, cx: &mut Context<'_, D>) {
        self.transactions.clear();
        self.moves.clear();
        self.deferred.clear();
        self.finding.clear();
        self.unrouted.clear();
        for rebuild in self.rebuilds.values_mut() {
            rebuild.queue.clear();
        }
        let me = self.me;
        for segment in self.segments.values_mut() {
            segment.default_home = segment.default_home.filter(|&home| home == me);
            for state in segment.extents.iter_mut().flatten() {
                if let Some(directory) = &mut state.directory {
                    directory.moving = false;
                } else {
                    state.home = Home::Ask;
                }
                state.lines.iter_mut().for_each(|line| line.wanted = false);
            }
        }
        let mut grants = Vec::new();
        self.pending.retain(|&page, pending| {
            let grant = pending.grant.take();
            grants.extend(grant.map(|grant| (page, grant)));
            if let Some(access) = pending.awaited {
                *pending = Pending::fault(access);
            }
            pending.awaited.is_some()
        });
        for (page, grant) in grants {
            self.keep(cx, page, grant);
        }
    }

    /// Takes what is worth it from a message of an earlier view.
    fn rescue(&mut self, cx: &mut Context<'_, D>, message: PageMessage, data: Option<D>) {
        match message {
            PageMessage::Grant {
                page,
                access,
                acks,
                contents,
                home,
                confirm,
                ..
            } => {
                let contents = match (contents, data) {
                    (Contents::Bytes, Some(data)) => Fill::Data(data),
                    (Contents::Zeros, _) => Fill::Zeros,
                    _ => return,
                };
                let grant = Grant {
                    access,
                    acks,
                    contents,
                    home,
                    confirm,
                };
                self.keep(cx, page, grant);
            }
            PageMessage::WriteBackAck {
                page,
                accepted: true,
            } if self.line(page).state == State::Evicting => {
                *self.line_mut(page) = Line::default();
                cx.out.push(Action::Drop { page });
            }
            PageMessage::HomeTransfer { extent, entries } => {
                self.home_transferred(cx, extent, &entries);
            }
            _ => {}
        }
    }

    /// Keeps a page that was granted in an earlier view, to read.
    fn keep(&mut self, cx: &mut Context<'_, D>, page: Page, grant: Grant<D>) {
        if matches!(grant.contents, Fill::InPlace) {
            return;
        }
        match self.line(page).state {
            State::Invalid => {
                self.line_mut(page).state = State::Owned;
                cx.out.push(Action::Install {
                    page,
                    access: Access::Read,
                    contents: grant.contents,
                });
            }
            // Nothing of what the page was before may be left.
            State::Evicted => {
                self.pushed.entry(page).or_insert(grant);
            }
            _ => {}
        }
    }

    /// Nothing of an earlier view can come any more: what is here is what this node holds.
    fn flushed(&mut self, cx: &mut Context<'_, D>) {
        let view = self.view.number;
        cx.out.push(Action::Flushed { view });
        let (mut homes, mut orphans) = (Vec::new(), Vec::new());
        for (&segment, state) in &mut self.segments {
            let extents = (0..).zip(&mut state.extents);
            for (index, state) in extents.filter_map(|(n, state)| Some((n, state.as_mut()?))) {
                for line in &mut state.lines {
                    line.state = match line.state {
                        State::Shared | State::Evicting => State::Owned,
                        State::Evicted => State::Invalid,
                        other => other,
                    };
                }
                let is_used = || state.lines.iter().any(|line| line.state.access().is_some());
                let extent = Extent { segment, index };
                if state.directory.is_some() {
                    homes.push(extent);
                } else if state.home == Home::Ask && is_used() {
                    orphans.push(extent);
                }
            }
        }
        // The order of a hash table is nobody's business.
        homes.sort_unstable();
        orphans.sort_unstable();
        for (page, grant) in std::mem::take(&mut self.pushed) {
            self.keep(cx, page, grant);
        }
        for extent in homes {
            self.survey(cx, extent, false);
        }
        for extent in orphans {
            self.find_home(cx, extent);
        }
        let mut pages: Vec<Page> = self.pending.keys().copied().collect();
        pages.sort_unstable();
        for page in pages {
            let satisfied = |p: &Pending<D>| p.awaited <= self.access(page);
            if self.pending.get(&page).is_some_and(satisfied) {
                self.pending.remove(&page);
            } else {
                self.send_request(cx, page);
            }
        }
        for Early {
            from,
            view,
            message,
            data,
        } in std::mem::take(&mut self.view.early)
        {
            if view == self.view.number {
                self.dispatch(cx, from, message, data);
            } else {
                let message = Early {
                    from,
                    view,
                    message,
                    data,
                };
                self.view.early.push_back(message);
            }
        }
    }

    /// Becomes the home of an extent whose home is gone.
    pub(super) fn adopt(&mut self, cx: &mut Context<'_, D>, extent: Extent) {
        let state = self.extent_mut(extent);
        if state.directory.is_some() {
            return;
        }
        let mut directory = Directory::untouched(state.lines.len());
        (0..state.lines.len()).for_each(|page| directory.lose(page));
        state.directory = Some(directory);
        let rebuild = Rebuild {
            awaited: NodeSet::default(),
            held: Vec::new(),
            adopted: true,
            queue: VecDeque::new(),
        };
        self.rebuilds.insert(extent, rebuild);
        if self.view.is_flushed() {
            self.survey(cx, extent, true);
        }
    }

    /// Asks the survivors what they hold of an extent at home here.
    fn survey(&mut self, cx: &mut Context<'_, D>, extent: Extent, adopted: bool) {
        let members = self.view.members;
        let rebuild = self.rebuilds.entry(extent).or_insert_with(|| Rebuild {
            awaited: members,
            held: Vec::new(),
            adopted,
            queue: VecDeque::new(),
        });
        rebuild.awaited = members;
        rebuild.held.clear();
        for node in members {
            cx.send(node, PageMessage::Survey { extent }, Body::None);
        }
        self.rebuild(cx, extent);
    }

    /// Says what this node holds of an extent; nothing if it does not know the segment.
    pub(super) fn surveyed(&mut self, cx: &mut Context<'_, D>, home: NodeId, extent: Extent) {
        let mut pages: Vec<Holding> = Vec::new();
        let lines = self.extent(extent).map(|state| &state.lines);
        for (page, line) in (0..).zip(lines.into_iter().flatten()) {
            let Some(access) = line.state.access() else {
                continue;
            };
            match pages.last_mut() {
                Some(run) if run.access == access && run.first + run.count == page => {
                    run.count += 1;
                }
                _ => pages.push(Holding {
                    first: page,
                    count: 1,
                    access,
                }),
            }
        }
        let message = PageMessage::Holdings { extent, pages };
        cx.send(home, message, Body::None);
    }

    pub(super) fn holdings_received(
        &mut self,
        cx: &mut Context<'_, D>,
        extent: Extent,
        from: NodeId,
        pages: Vec<Holding>,
    ) {
        let count = self.extent_mut(extent).lines.len();
        let fits = |run: &Holding| usize::from(run.first) + usize::from(run.count) <= count;
        match self.rebuilds.get_mut(&extent) {
            Some(rebuild) if rebuild.awaited.contains(from) && pages.iter().all(fits) => {
                rebuild.awaited.remove(from);
                rebuild.held.push((from, pages));
                self.rebuild(cx, extent);
            }
            _ => self.protocol_error(),
        }
    }

    /// Makes a directory once all survivors have said what they hold.
    fn rebuild(&mut self, cx: &mut Context<'_, D>, extent: Extent) {
        let complete = |rebuild: &Rebuild<D>| rebuild.awaited.is_empty();
        if !self.rebuilds.get(&extent).is_some_and(complete) {
            return;
        }
        let Some(rebuild) = self.rebuilds.remove(&extent) else {
            return;
        };
        let me = self.me;
        let state = self.extent_mut(extent);
        let pages = state.lines.len();
        let former = state.directory.take();
        let mut sharers = vec![NodeSet::default(); pages];
        let mut writers = vec![None; pages];
        let mut note = |page: usize, node: NodeId, access: Access| match access {
            Access::Read => sharers[page].insert(node),
            Access::Write => writers[page] = Some(node),
        };
        for (page, line) in state.lines.iter().enumerate() {
            if let Some(access) = line.state.access() {
                note(page, me, access);
            }
        }
        for (node, runs) in &rebuild.held {
            for run in runs {
                let pages = usize::from(run.first)..usize::from(run.first + run.count);
                pages.for_each(|page| note(page, *node, run.access));
            }
        }
        let mut directory = Directory::untouched(pages);
        let mut lost = PageSet::new();
        for page in 0..pages {
            let is_known = |former: &Directory| former.owner(page).is_some();
            let was_lost = former.as_ref().is_some_and(|former| former.is_lost(page));
            let mut holders = sharers[page].into_iter();
            let reader = if sharers[page].contains(me) {
                Some(me)
            } else {
                holders.next()
            };
            match (writers[page], reader) {
                (Some(writer), _) => directory.place(page, writer, &NodeSet::default()),
                (None, Some(owner)) => directory.place(page, owner, &sharers[page]),
                (None, None) if was_lost || former.as_ref().is_some_and(is_known) => {
                    directory.lose(page);
                    if rebuild.adopted || !was_lost {
                        lost.insert(page as u32);
                    }
                }
                (None, None) => {}
            }
        }
        state.directory = Some(directory);
        if !lost.is_empty() {
            cx.out.push(Action::Lost {
                extent,
                pages: lost,
            });
        }
        for work in rebuild.queue {
            self.accept(cx, work);
        }
    }
}
