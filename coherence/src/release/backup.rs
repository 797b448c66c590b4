//! Durable segments: what has been released is at two nodes, so either may die.
//!
//! ```text
//! W has written pages of H's, whose backup is B
//!
//! W ──Diffs──▶ H                      H merges them
//!              H ──Replicate──▶ B     B merges them into its replica
//!              H ◀──Merged───── B
//! W ◀─Merged── H                      W's release goes on to the coordinator
//! ```
//!
//! - The pages of an extent stay at its home, and none is lent. The home tracks its own writes as others do
//!   theirs, and sends them to the backup before its releases go on.
//! - A replica is no page memory: no process sees it. It is what the home has, without what the home's
//!   processes have written since the twin was taken; so what is sent afresh is the twin.
//! - H dies: B installs its replica and is the home. All drop their copies, which may contain what was at H
//!   alone. What they wrote, and what H has not said to be merged, they send to B: twice the same diff does no harm,
//!   as nobody else writes those bytes until the release that waits for it is done.
//! - B dies: H has another node as a backup, to which it sends all that it has. Until it is there no release
//!   goes on that waited for B, nor any other.
//! - Who is whose backup the coordinator says ([`super::Input::BackupIs`]). If there is no other node, releases
//!   go on at once.
//! - A backup whose home dies before it has all of the extent has nothing, and the extent is lost; but for the
//!   first backup of an extent: of that nothing was released, and its pages are zeros.

use std::collections::{BTreeMap, BTreeSet};

use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::page::Access;
use migshm_protocol::release::ReleaseMessage;
use migshm_protocol::{Extent, NodeId, Page, SegmentId};
use serde::{Deserialize, Serialize};

use super::loans::Request;
use super::tables::{encode, first_page, split_diffs};
use super::{Action, Context, Diff, Pending, Release, State};

/// Diffs that were sent and are not known to be merged.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Unmerged {
    /// Where they are to be merged.
    pub(super) to: NodeId,
    pub(super) segment: SegmentId,
    pub(super) kept: Kept,
}

/// What is needed should the receiver die.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Kept {
    Nothing,
    /// To a durable page's home: the diffs.
    Diffs(Vec<(u32, Diff)>),
    /// To the backup of an extent: what waits for it.
    Parts(Extent, Vec<Part>),
}

/// A part of another node's message of diffs that the home has merged.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) from: NodeId,
    pub(super) number: u64,
    pub(super) page: Page,
    /// Whether a third node may have a copy of the page.
    pub(super) shared: bool,
}

/// What a home has of an extent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Replica {
    home: NodeId,
    /// Whether it is all.
    complete: bool,
    /// Those that are not all zeros.
    pages: BTreeMap<u32, Box<[u8]>>,
}

#[cfg(test)]
impl Replica {
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }
}

/// At the home: a page has changed, and its backup is to know; `part` waits for that.
pub(super) fn replicate(cx: &mut Context<'_>, page: Page, diff: Diff, part: Option<Part>) {
    let (diffs, parts) = cx.replicated.entry(page.extent()).or_default();
    diffs.push((page.index, diff));
    parts.extend(part);
}

/// As a home.
impl Release {
    /// A node asks this one for a page of a durable segment, or to merge what it wrote.
    pub(super) fn on_durable_request(
        &mut self,
        cx: &mut Context<'_>,
        page: Page,
        request: Request,
    ) {
        if !self.manages(page) {
            // The coordinator has said it to others first.
            let early = self.tables.early.entry(page.extent()).or_default();
            early.push((page, request));
        } else if self.is_extent_lost(page.extent()) {
            self.deny(cx, page, request);
        } else {
            self.grant(cx, page, request);
        }
    }

    /// A process here needs a page that has its home here.
    pub(super) fn touch_home(&mut self, cx: &mut Context<'_>, page: Page, pending: Pending) {
        if self.is_extent_lost(page.extent()) {
            return self.fail(cx, page);
        }
        self.tables.pending.remove(&page);
        match (self.line(page).state, pending.write) {
            (State::Absent, write) => {
                self.line_mut(page).state = State::Clean;
                cx.frames.install(page, Access::Read, None);
                if write {
                    self.permit(cx, page);
                }
            }
            (State::Clean, true) => self.permit(cx, page),
            (State::Clean | State::Dirty, _) => cx.frames.retry(page),
        }
    }

    /// Of a durable page that nobody has used, its home tracks what its own processes do.
    pub(super) fn make_home(&mut self, cx: &mut Context<'_>, page: Page) {
        if self.is_durable(page.segment) && self.line(page).state == State::Absent {
            cx.frames.protect(page);
            self.line_mut(page).state = State::Clean;
        }
    }

    /// This node is an extent's home, and has this backup.
    pub(super) fn backup_is(
        &mut self,
        cx: &mut Context<'_>,
        extent: Extent,
        backup: Option<NodeId>,
        blank: bool,
    ) {
        if !self.is_durable(extent.segment) || !self.knows(first_page(extent)) {
            return;
        }
        let me = self.tables.me;
        if self.manager_of(extent) != Some(me) {
            self.abandon(cx, extent);
            self.extent_mut(extent).manager = Some(me);
            self.promote(cx, extent, blank);
        }
        let can_be = |backup: &NodeId| *backup != me && usize::from(backup.0) < MAX_NODES;
        self.extent_mut(extent).backup = backup.filter(can_be);
        let parts = self.tables.unbacked.remove(&extent).unwrap_or_default();
        self.replicate_afresh(cx, extent, parts);
        for (page, request) in self.tables.early.remove(&extent).unwrap_or_default() {
            self.on_durable_request(cx, page, request);
        }
        self.defer_releases(cx);
    }

    /// This node takes the place of an extent's home, or is the first.
    fn promote(&mut self, cx: &mut Context<'_>, extent: Extent, blank: bool) {
        let replica = self.tables.replicas.remove(&extent);
        self.counters.promotions += u64::from(replica.is_some());
        match replica.filter(|replica| replica.complete) {
            Some(replica) => {
                for (index, bytes) in replica.pages {
                    let page = Page {
                        segment: extent.segment,
                        index,
                    };
                    self.line_mut(page).state = State::Clean;
                    cx.frames.install(page, Access::Read, Some(&bytes));
                }
            }
            None if blank => {}
            None => {
                self.extent_mut(extent).lost = true;
                self.tables.orphans.remove(&extent);
                cx.out.push(Action::Lost { extent });
            }
        }
        for (index, diff) in self.tables.orphans.remove(&extent).unwrap_or_default() {
            let page = Page {
                segment: extent.segment,
                index,
            };
            self.make_home(cx, page);
            cx.frames.merge(page, &diff);
            self.note_own_change(page);
        }
    }

    /// Sends the backup all that there is of an extent; these parts wait until it is there.
    fn replicate_afresh(&mut self, cx: &mut Context<'_>, extent: Extent, parts: Vec<Part>) {
        cx.replicated.remove(&extent);
        let state = self.extent_mut(extent);
        let (lost, backup) = (state.lost, state.backup);
        let Some(backup) = backup.filter(|_| !lost) else {
            return self.note_replicated(cx, parts);
        };
        let zeros = vec![0; self.tables.page_size];
        let mut diffs = Vec::new();
        for page in self.pages_here(extent) {
            let diff = match self.tables.twins.get(&page) {
                Some(twin) => Diff::between(&zeros, &twin.bytes),
                None => {
                    cx.frames.read(page, &mut self.buffer);
                    Diff::between(&zeros, &self.buffer)
                }
            };
            diffs.extend(diff.map(|diff| (page.index, diff)));
        }
        self.send_replica(cx, backup, extent, &diffs, parts, true);
    }

    /// Sends to backups what was put together.
    pub(super) fn replicate_all(&mut self, cx: &mut Context<'_>) {
        for (extent, (diffs, parts)) in std::mem::take(&mut cx.replicated) {
            let backup = self.extent(extent).and_then(|extent| extent.backup);
            match (backup, self.tables.unbacked.get_mut(&extent)) {
                (Some(backup), _) => self.send_replica(cx, backup, extent, &diffs, parts, false),
                (None, Some(waiting)) => waiting.extend(parts),
                (None, None) => self.note_replicated(cx, parts),
            }
        }
    }

    fn send_replica(
        &mut self,
        cx: &mut Context<'_>,
        to: NodeId,
        extent: Extent,
        diffs: &[(u32, Diff)],
        mut parts: Vec<Part>,
        afresh: bool,
    ) {
        let mut rest = diffs;
        let mut first = afresh;
        loop {
            let (now, later) = split_diffs(rest);
            rest = later;
            let parts = match rest.is_empty() {
                true => std::mem::take(&mut parts),
                false => Vec::new(),
            };
            let number = self.expect(to, extent.segment, Kept::Parts(extent, parts));
            let (pages, data) = encode(now);
            self.counters.replicated_bytes += data.len() as u64;
            let last = afresh && rest.is_empty();
            let message = ReleaseMessage::Replicate {
                extent,
                number,
                first,
                last,
                pages,
            };
            cx.out.push(Action::Send { to, message, data });
            first = false;
            if rest.is_empty() {
                return;
            }
        }
    }

    /// The backup has what these parts changed.
    pub(super) fn note_replicated(&mut self, cx: &mut Context<'_>, parts: Vec<Part>) {
        for Part {
            from,
            number,
            page,
            shared,
        } in parts
        {
            self.note_merged(cx, from, number, page, shared, false);
        }
    }

    fn is_extent_lost(&self, extent: Extent) -> bool {
        self.extent(extent).is_some_and(|extent| extent.lost)
    }

    /// The pages of an extent that are not Absent.
    fn pages_here(&self, extent: Extent) -> Vec<Page> {
        let lines = self.extent(extent).into_iter().flat_map(|e| &e.lines);
        let pages = (extent.first_page()..).zip(lines);
        let here = pages.filter(|(_, line)| line.state != State::Absent);
        let page = |(index, _)| Page {
            segment: extent.segment,
            index,
        };
        here.map(page).collect()
    }
}

/// As a backup.
impl Release {
    #[allow(clippy::too_many_arguments, reason = "a message's fields")]
    pub(super) fn on_replicate(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        extent: Extent,
        number: u64,
        [first, last]: [bool; 2],
        pages: &[(u32, u32)],
        data: &[u8],
    ) {
        let is_home = self.manager_of(extent) == Some(self.tables.me);
        if !self.is_durable(extent.segment) || !self.knows(first_page(extent)) || is_home {
            return self.protocol_error();
        }
        let parts = self.parse_diffs(extent.segment, pages, data);
        if first {
            let replica = Replica {
                home: from,
                complete: false,
                pages: BTreeMap::new(),
            };
            self.tables.replicas.insert(extent, replica);
        }
        let size = self.tables.page_size;
        let replica = self.tables.replicas.get_mut(&extent);
        let Some(replica) = replica.filter(|replica| replica.home == from) else {
            return self.protocol_error();
        };
        for (page, diff) in parts {
            if page.extent() == extent {
                let zeros = || vec![0; size].into();
                diff.apply(replica.pages.entry(page.index).or_insert_with(zeros));
            }
        }
        replica.complete |= last;
        let message = ReleaseMessage::Merged {
            segment: extent.segment,
            number,
            shared: Vec::new(),
            offered: Vec::new(),
        };
        let (to, data) = (from, Vec::new());
        cx.out.push(Action::Send { to, message, data });
    }
}

/// As a user of pages whose home dies.
impl Release {
    /// What was written to a page whose home has left is for its successor.
    pub(super) fn keep_orphan(&mut self, cx: &mut Context<'_>, page: Page, diff: Diff) {
        if self.is_durable(page.segment) {
            let orphans = self.tables.orphans.entry(page.extent()).or_default();
            orphans.push((page.index, diff));
            self.find(cx, page.extent());
        }
    }

    /// It is known who is the home of an extent now, if anybody is.
    pub(super) fn adopt(&mut self, cx: &mut Context<'_>, extent: Extent, home: Option<NodeId>) {
        let orphans = self.tables.orphans.remove(&extent).unwrap_or_default();
        // What is at home here was merged when the coordinator said so.
        if let Some(home) = home.filter(|home| *home != self.tables.me)
            && !orphans.is_empty()
        {
            cx.diffs.insert((home, extent.segment), orphans);
            self.defer_releases(cx);
        }
    }

    /// Releases under way wait for what is sent now, too.
    fn defer_releases(&mut self, cx: &mut Context<'_>) {
        self.send_all(cx);
        let last = self.tables.last;
        self.tables.releases.iter_mut().for_each(|of| *of = last);
    }

    /// Drops what is here of an extent whose home has left; what was written to it is kept.
    fn abandon(&mut self, cx: &mut Context<'_>, extent: Extent) {
        self.extent_mut(extent).manager = None;
        for page in self.pages_here(extent) {
            self.lose(cx, page);
        }
    }

    /// A node has left: with the homes of durable extents, their backups, or neither.
    pub(super) fn leave_durable(&mut self, cx: &mut Context<'_>, node: NodeId) {
        let is_of_others = |part: &Part| part.from != node;
        let (to_it, mut unmerged): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.tables.unmerged)
                .into_iter()
                .partition(|(_, diffs)| diffs.to == node);
        for diffs in to_it.into_values() {
            match diffs.kept {
                Kept::Nothing => {}
                Kept::Diffs(pages) => {
                    for (index, diff) in pages {
                        let segment = diffs.segment;
                        self.keep_orphan(cx, Page { segment, index }, diff);
                    }
                }
                Kept::Parts(extent, parts) => {
                    let waiting = self.tables.unbacked.entry(extent).or_default();
                    waiting.extend(parts);
                }
            }
        }
        for diffs in unmerged.values_mut() {
            if let Kept::Parts(_, parts) = &mut diffs.kept {
                parts.retain(is_of_others);
            }
        }
        self.tables.unmerged = unmerged;
        for extent in self.durable_extents() {
            let state = self.extent_mut(extent);
            if state.manager == Some(node) {
                self.abandon(cx, extent);
                self.ask_again(cx, extent);
            } else if state.backup == Some(node) {
                state.backup = None;
                self.tables.unbacked.entry(extent).or_default();
            }
        }
        for parts in self.tables.unbacked.values_mut() {
            parts.retain(is_of_others);
        }
        for requests in self.tables.early.values_mut() {
            requests.retain(|(_, request)| {
                let (Request::Fetch { by, .. } | Request::Diff { by, .. }) = request;
                *by != node
            });
        }
    }

    fn durable_extents(&self) -> Vec<Extent> {
        let durable = self.tables.segments.iter().filter(|(_, s)| s.durable);
        let extents = durable.flat_map(|(&segment, state)| {
            let known = (0..).zip(&state.extents);
            let known = known.filter(|(_, extent)| extent.is_some());
            known.map(move |(index, _)| Extent { segment, index })
        });
        extents.collect()
    }

    /// Has the pages of an extent that are on their way here come from its next home.
    fn ask_again(&mut self, cx: &mut Context<'_>, extent: Extent) {
        let of_extent = |page: &&Page| page.extent() == extent;
        let pending: BTreeSet<Page> = self
            .tables
            .pending
            .keys()
            .filter(of_extent)
            .copied()
            .collect();
        for page in pending {
            if let Some(pending) = self.tables.pending.get_mut(&page) {
                pending.number = 0;
            }
            self.ask(cx, page);
        }
    }
}
