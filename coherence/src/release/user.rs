//! A node as a user of pages: faults, releases, and what it learns of others' writes.

use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::page::Access;
use migshm_protocol::release::{Runs, Sent};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

use super::backup::{Kept, Unmerged, replicate};
use super::tables::first_page;
use super::{Action, Context, Diff, Line, PATIENCE, Pending, Release, State, Twin};

/// Releases in a row without a change, up to which a page counts as one that is being written: to want it for
/// writing has it come back from whom it was lent to.
const RECENT: u8 = 3;

impl Release {
    pub(super) fn fault(&mut self, cx: &mut Context<'_>, page: Page, access: Access) {
        if !self.knows(page) || self.access(page) >= Some(access) {
            return;
        }
        self.counters.faults += 1;
        if self.line(page).state == State::Clean && !self.is_away(page) {
            return self.permit(cx, page);
        }
        self.want(cx, page, access == Access::Write, false);
    }

    /// Lets a page that is Clean, and stays where it is, be written.
    pub(super) fn permit(&mut self, cx: &mut Context<'_>, page: Page) {
        let durable = self.is_durable(page.segment);
        if self.is_home(page) && self.is_alone(page) && !durable {
            self.line_mut(page).state = State::Absent;
        } else {
            cx.frames.read(page, &mut self.buffer);
            self.begin_writing(page, None);
        }
        cx.frames.permit(page);
    }

    pub(super) fn prefetch(&mut self, cx: &mut Context<'_>, pages: &[Page], access: Access) {
        for &page in pages {
            let is_here = self.is_durable(page.segment) && self.manages(page);
            let is_wanted = self.access(page).is_none() && !is_here;
            if self.knows(page) && is_wanted && !self.is_pending(page) {
                self.counters.prefetches += 1;
                self.want(cx, page, access == Access::Write, true);
            }
        }
    }

    /// A page becomes Dirty; its twin is `contents`, or what is in the buffer.
    pub(super) fn begin_writing(&mut self, page: Page, contents: Option<&[u8]>) {
        let bytes = contents.unwrap_or(&self.buffer).into();
        let twin = Twin {
            bytes,
            idle: 0,
            alone: 0,
        };
        self.tables.twins.insert(page, twin);
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
        // What happens to it until it comes is noticed only in extents that are known.
        self.extent_mut(page.extent());
        self.ask(cx, page);
    }

    /// Asks for a page that is pending.
    pub(super) fn ask(&mut self, cx: &mut Context<'_>, page: Page) {
        let Some(pending) = self.tables.pending.get(&page).copied() else {
            return;
        };
        match self.manager_of(page.extent()) {
            Some(manager) if manager == self.tables.me && self.is_durable(page.segment) => {
                self.touch_home(cx, page, pending);
            }
            Some(manager) if manager == self.tables.me => self.ask_borrower(cx, page, pending),
            Some(manager) => self.fetch(cx, page, manager, pending.write),
            None => {
                self.find(cx, page.extent());
                let waiting = self.tables.finding.get_mut(&page.extent());
                waiting.expect("just asked for").insert(page.index);
            }
        }
    }

    /// Asks a node for a page that is pending.
    pub(super) fn fetch(&mut self, cx: &mut Context<'_>, page: Page, from: NodeId, write: bool) {
        if self.is_lost(page.segment, from) {
            return self.fail(cx, page);
        }
        let wanted = cx.wanted.entry((from, page.segment, write)).or_default();
        wanted.push(page.index);
        self.counters.fetches += 1;
    }

    /// A page that is pending, if it is, cannot be had.
    pub(super) fn fail(&mut self, cx: &mut Context<'_>, page: Page) {
        if self.tables.pending.remove(&page).is_some() {
            cx.out.push(Action::Fail { page });
        }
    }

    pub(super) fn home_is(&mut self, cx: &mut Context<'_>, extent: Extent, home: Option<NodeId>) {
        let waiting = self.tables.finding.remove(&extent).unwrap_or_default();
        let home = home.filter(|home| usize::from(home.0) < MAX_NODES);
        if self.knows(first_page(extent)) {
            let known = &mut self.extent_mut(extent).manager;
            *known = known.or(home);
        }
        self.adopt(cx, extent, home);
        for index in waiting {
            let page = Page {
                segment: extent.segment,
                index,
            };
            match home {
                _ if !self.is_pending(page) => {}
                Some(home) if home == self.tables.me && self.is_home(page) => {
                    self.tables.pending.remove(&page);
                    cx.frames.retry(page);
                }
                Some(_) => self.ask(cx, page),
                None => self.fail(cx, page),
            }
        }
    }

    /// A page has come.
    pub(super) fn copied(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        page: Page,
        number: u64,
        sent: Sent,
        contents: Option<&[u8]>,
    ) {
        let Some(pending) = self.tables.pending.get(&page).copied() else {
            return;
        };
        let lent = sent == Sent::Lent;
        let may_lend =
            || self.manager_of(page.extent()) == Some(from) && !self.is_durable(page.segment);
        if lent && !may_lend() {
            return self.protocol_error();
        }
        // An older answer, of which a newer one was asked since. What is lent is lent all the same.
        if pending.number != number && !lent {
            return;
        }
        self.tables.pending.remove(&page);
        self.line_mut(page).prefetched = pending.prefetch;
        // A manager writes a page once it has it back.
        let write = pending.write && !self.manages(page);
        if lent {
            self.borrow(page);
            cx.frames.install(page, Access::Write, contents);
        } else if write {
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

    pub(super) fn changed(&mut self, cx: &mut Context<'_>, segment: SegmentId, runs: &Runs) {
        for page in self.known_pages(segment, runs) {
            if self.is_home(page) {
                continue;
            }
            let Line {
                state, prefetched, ..
            } = self.line(page);
            if state == State::Absent {
                let pending = self.tables.pending.get(&page);
                if pending.is_some_and(|pending| pending.number != 0) {
                    self.ask(cx, page);
                }
                continue;
            }
            let is_used = !prefetched || cx.frames.is_used(page);
            let twin = self.tables.twins.get(&page);
            let is_written = twin.is_some_and(|twin| twin.idle <= RECENT);
            self.lose(cx, page);
            self.counters.invalidations += 1;
            if is_used {
                self.counters.prefetches += 1;
                self.want(cx, page, is_written, true);
            }
        }
    }

    /// Drops a page that has its home elsewhere, and sends home what was written to it.
    pub(super) fn lose(&mut self, cx: &mut Context<'_>, page: Page) {
        if self.line(page).state == State::Dirty {
            cx.frames.protect(page);
            self.note_change(cx, page);
            self.tables.twins.remove(&page);
        }
        cx.frames.drop(page);
        *self.line_mut(page) = Line::default();
    }

    pub(super) fn evict(&mut self, cx: &mut Context<'_>, page: Page) {
        if !self.knows(page) || self.is_pending(page) {
            return;
        }
        match (self.line(page).state, self.is_home(page)) {
            (State::Clean | State::Dirty, false) => {
                self.lose(cx, page);
                self.counters.evictions += 1;
            }
            (State::Dirty, true) => self.end_writing(cx, page),
            (_, true) if self.line(page).borrowed => self.give_back(cx, page, false),
            _ => {}
        }
    }

    pub(super) fn release(&mut self, cx: &mut Context<'_>) {
        if !self.is_clean() {
            self.counters.releases += 1;
        }
        let dirty: Vec<Page> = self.tables.twins.keys().copied().collect();
        for page in dirty {
            let changed = self.note_change(cx, page);
            let alone = self.is_home(page) && self.is_alone(page);
            let Some(twin) = self.tables.twins.get_mut(&page) else {
                continue;
            };
            twin.alone = if alone { twin.alone + 1 } else { 0 };
            twin.idle = if changed { 0 } else { twin.idle + 1 };
            let (is_alone, is_idle) = (twin.alone >= PATIENCE, twin.idle >= PATIENCE);
            if is_alone && !self.is_durable(page.segment) {
                self.forget_twin(page);
            } else if is_idle {
                self.end_writing(cx, page);
            }
        }
        self.send_all(cx);
        self.tables.releases.push_back(self.tables.last);
    }

    /// At the home of a page that nobody else has a copy of: what is written to it need not be known.
    pub(super) fn forget_twin(&mut self, page: Page) {
        self.tables.twins.remove(&page);
        self.line_mut(page).state = State::Absent;
    }

    /// Makes a Dirty page Clean.
    pub(super) fn end_writing(&mut self, cx: &mut Context<'_>, page: Page) {
        cx.frames.protect(page);
        self.note_change(cx, page);
        self.tables.twins.remove(&page);
        self.line_mut(page).state = State::Clean;
    }

    /// Finds out what was written to a Dirty page since the twin was taken, has it sent home, and
    /// makes the twin the page as it is. Whether there was anything.
    pub(super) fn note_change(&mut self, cx: &mut Context<'_>, page: Page) -> bool {
        let Some(twin) = self.tables.twins.get_mut(&page) else {
            return false;
        };
        cx.frames.read(page, &mut self.buffer);
        if *twin.bytes == *self.buffer {
            return false;
        }
        let (is_home, durable) = (self.is_home(page), self.is_durable(page.segment));
        if is_home {
            self.note_own_change(page);
        }
        if (!is_home || durable)
            && let Some(twin) = self.tables.twins.get(&page)
            && let Some(diff) = Diff::between(&twin.bytes, &self.buffer)
        {
            match self.manager_of(page.extent()) {
                Some(_) if is_home => replicate(cx, page, diff, None),
                Some(manager) => {
                    self.counters.diffs += 1;
                    self.counters.diff_bytes += diff.as_bytes().len() as u64;
                    let diffs = cx.diffs.entry((manager, page.segment)).or_default();
                    diffs.push((page.index, diff));
                }
                None => self.keep_orphan(cx, page, diff),
            }
        }
        if let Some(twin) = self.tables.twins.get_mut(&page) {
            twin.bytes.copy_from_slice(&self.buffer);
        }
        true
    }

    /// At the home: what its own processes wrote others may have to be told of.
    pub(super) fn note_own_change(&mut self, page: Page) {
        if self.note_writer(page, self.tables.me) {
            let wrote = self.tables.wrote.entry(page.segment).or_default();
            wrote.insert(page.index, 1);
        }
    }

    /// A manager has merged diffs, and offers some of the pages.
    pub(super) fn merged(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        segment: SegmentId,
        number: u64,
        [shared, offered]: [&[u32]; 2],
    ) {
        let is_awaited = |diffs: &Unmerged| diffs.to == from && diffs.segment == segment;
        if !self.tables.unmerged.get(&number).is_some_and(is_awaited) {
            return self.protocol_error();
        }
        if let Some(Unmerged {
            kept: Kept::Parts(_, parts),
            ..
        }) = self.tables.unmerged.remove(&number)
        {
            self.note_replicated(cx, parts);
        }
        let in_range = |page: &&u32| self.tables.segments[&segment].pages > **page;
        let shared: Vec<u32> = shared.iter().filter(in_range).copied().collect();
        if !shared.is_empty() {
            let wrote = self.tables.wrote.entry(segment).or_default();
            shared.iter().for_each(|&page| wrote.insert(page, 1));
        }
        self.take(cx, from, segment, offered);
    }

    pub(super) fn complete_releases(&mut self, out: &mut Vec<Action>) {
        if !self.tables.orphans.is_empty() || !self.tables.unbacked.is_empty() {
            return;
        }
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
    pub(super) fn left(&mut self, cx: &mut Context<'_>, node: NodeId) {
        self.leave_durable(cx, node);
        let tables = &mut self.tables;
        for segment in tables.segments.values_mut() {
            if !segment.durable {
                segment.lost.insert(node);
            }
            segment.users.remove(node);
            for extent in segment.extents.iter_mut().flatten() {
                extent.copies.forget(node);
            }
        }
        tables.unmerged.retain(|_, diffs| diffs.to != node);
        tables.merging.retain(|(from, _), _| *from != node);
        let lost = |page: &Page| self.manager_of(page.extent()) == Some(node);
        let pending: Vec<Page> = self.tables.pending.keys().copied().filter(lost).collect();
        pending.into_iter().for_each(|page| self.fail(cx, page));
        self.lose_loans(cx, node);
    }
}
