//! The tables, and the messages that an input leads to.

use std::collections::BTreeSet;
use std::collections::btree_map::Entry;

use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::release::{MAX_DIFFS, MAX_WANTED, ReleaseMessage, Runs};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};

use super::backup::{Kept, Unmerged};
use super::copies::Copies;
use super::loans::Record;
use super::{Action, Context, Diff, ExtentState, Line, Release, State};

impl Release {
    /// Sends what was put together: diffs first, as what is fetched has to contain them.
    pub(super) fn send_all(&mut self, cx: &mut Context<'_>) {
        for ((to, segment), diffs) in std::mem::take(&mut cx.diffs) {
            let mut rest = diffs.as_slice();
            while !rest.is_empty() {
                let (now, later) = split_diffs(rest);
                rest = later;
                self.send_diffs(cx, to, segment, now);
            }
        }
        self.replicate_all(cx);
        for ((to, segment, write), pages) in std::mem::take(&mut cx.wanted) {
            for pages in pages.chunks(MAX_WANTED) {
                self.tables.last += 1;
                let number = self.tables.last;
                for &index in pages {
                    let page = Page { segment, index };
                    if let Some(pending) = self.tables.pending.get_mut(&page) {
                        pending.number = number;
                    }
                }
                let requester = self.tables.me;
                send_fetch(cx, to, segment, requester, number, write, pages);
            }
        }
        for ((to, segment, requester, number, write), pages) in std::mem::take(&mut cx.passed) {
            for pages in pages.chunks(MAX_WANTED) {
                send_fetch(cx, to, segment, requester, number, write, pages);
            }
        }
        for ((to, segment), pages) in std::mem::take(&mut cx.recalled) {
            let message = ReleaseMessage::Recall { segment, pages };
            let data = Vec::new();
            cx.out.push(Action::Send { to, message, data });
        }
        while let Some((&(to, segment, number), _)) = cx.copies.first_key_value() {
            Self::send_copies(cx, to, segment, number);
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
        let kept = match self.is_durable(segment) {
            true => Kept::Diffs(diffs.to_vec()),
            false => Kept::Nothing,
        };
        let number = self.expect(to, segment, kept);
        let (pages, data) = encode(diffs);
        let message = ReleaseMessage::Diffs {
            segment,
            number,
            pages,
        };
        cx.out.push(Action::Send { to, message, data });
    }

    /// The number of a message to a manager that releases wait for.
    pub(super) fn expect_merged(&mut self, manager: NodeId, segment: SegmentId) -> u64 {
        self.expect(manager, segment, Kept::Nothing)
    }

    pub(super) fn expect(&mut self, to: NodeId, segment: SegmentId, kept: Kept) -> u64 {
        self.tables.last += 1;
        let number = self.tables.last;
        let diffs = Unmerged { to, segment, kept };
        self.tables.unmerged.insert(number, diffs);
        number
    }

    /// Whether the pages of a segment are at a second node before what was written to them counts.
    pub(super) fn is_durable(&self, segment: SegmentId) -> bool {
        let segment = self.tables.segments.get(&segment);
        segment.is_some_and(|segment| segment.durable)
    }

    /// Asks for the home of an extent, unless that has been asked already.
    pub(super) fn find(&mut self, cx: &mut Context<'_>, extent: Extent) {
        if let Entry::Vacant(entry) = self.tables.finding.entry(extent) {
            entry.insert(BTreeSet::new());
            cx.out.push(Action::FindHome { extent });
        }
    }

    pub(super) fn protocol_error(&mut self) {
        self.counters.protocol_errors += 1;
    }

    pub(super) fn knows(&self, page: Page) -> bool {
        let segment = self.tables.segments.get(&page.segment);
        segment.is_some_and(|segment| page.index < segment.pages)
    }

    /// The pages in some runs that this node has, or waits for.
    pub(super) fn known_pages(&self, segment: SegmentId, runs: &Runs) -> Vec<Page> {
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

    /// The manager of an extent's pages: its home.
    pub(super) fn manager_of(&self, extent: Extent) -> Option<NodeId> {
        let known = self.extent(extent).and_then(|extent| extent.manager);
        let segment = self.tables.segments.get(&extent.segment);
        known.or(segment.and_then(|segment| segment.default_home))
    }

    /// Whether this node is a page's manager, as far as it knows.
    pub(super) fn manages(&self, page: Page) -> bool {
        self.manager_of(page.extent()) == Some(self.tables.me)
    }

    /// Whether this node is a page's manager; it becomes that if the coordinator may have said so to
    /// another node and not yet to this one.
    pub(super) fn become_manager(&mut self, page: Page) -> bool {
        let me = self.tables.me;
        if self.manager_of(page.extent()).is_none() {
            self.extent_mut(page.extent()).manager = Some(me);
        }
        self.manages(page)
    }

    /// As a manager: to whom a page is lent.
    pub(super) fn borrower(&self, page: Page) -> Option<NodeId> {
        self.record(page).borrower
    }

    /// Whether a node has left since a segment is known.
    pub(super) fn is_lost(&self, segment: SegmentId, node: NodeId) -> bool {
        let segment = self.tables.segments.get(&segment);
        segment.is_some_and(|segment| segment.lost.contains(node))
    }

    /// Nobody has a copy.
    pub(super) fn clear_copies(&mut self, page: Page) {
        let extent = self.extent_mut(page.extent());
        let pages = extent.lines.len();
        extent.copies.set(NodeSet::default(), slot(page), pages);
    }

    pub(super) fn record(&self, page: Page) -> Record {
        let extent = self.extent(page.extent());
        let record = extent.and_then(|extent| extent.records.get(slot(page)));
        record.copied().unwrap_or_default()
    }

    /// # Panics
    ///
    /// If the page is not one of a known segment.
    pub(super) fn record_mut(&mut self, page: Page) -> &mut Record {
        let extent = self.extent_mut(page.extent());
        if extent.records.is_empty() {
            extent.records = vec![Record::default(); extent.lines.len()].into();
        }
        &mut extent.records[slot(page)]
    }

    pub(super) fn extent(&self, extent: Extent) -> Option<&ExtentState> {
        let segment = self.tables.segments.get(&extent.segment)?;
        segment.extents.get(extent.index as usize)?.as_deref()
    }

    /// # Panics
    ///
    /// If it is not one of a known segment.
    pub(super) fn extent_mut(&mut self, extent: Extent) -> &mut ExtentState {
        let segment = self.tables.segments.get_mut(&extent.segment);
        let segment = segment.expect("a known segment");
        let index = extent.index as usize;
        if segment.extents.len() <= index {
            segment.extents.resize(index + 1, None);
        }
        let pages = (segment.pages - extent.first_page()).min(EXTENT_PAGES);
        segment.extents[index].get_or_insert_with(|| {
            Box::new(ExtentState {
                manager: None,
                lines: vec![Line::default(); pages as usize].into(),
                copies: Copies::default(),
                records: Box::default(),
                backup: None,
                lost: false,
            })
        })
    }

    pub(super) fn line(&self, page: Page) -> Line {
        let extent = self.extent(page.extent());
        let line = extent.and_then(|extent| extent.lines.get(slot(page)));
        line.copied().unwrap_or_default()
    }

    /// # Panics
    ///
    /// If the page is not one of a known segment.
    pub(super) fn line_mut(&mut self, page: Page) -> &mut Line {
        &mut self.extent_mut(page.extent()).lines[slot(page)]
    }
}

/// Index of a page in its extent.
pub(super) fn slot(page: Page) -> usize {
    (page.index % EXTENT_PAGES) as usize
}

/// A page of a segment and what was written to it.
pub(super) type PageDiff = (u32, Diff);

/// As many diffs as fit a message, at least one, and the others.
pub(super) fn split_diffs(diffs: &[PageDiff]) -> (&[PageDiff], &[PageDiff]) {
    let mut bytes = 0;
    let fits = diffs.iter().take_while(|(_, diff)| {
        bytes += diff.as_bytes().len();
        bytes <= MAX_DIFFS
    });
    diffs.split_at(fits.count().max(1).min(diffs.len()))
}

/// Diffs as they travel: the page and length of each, and their bytes.
pub(super) fn encode(diffs: &[PageDiff]) -> (Vec<(u32, u32)>, Vec<u8>) {
    let length =
        |diff: &Diff| u32::try_from(diff.as_bytes().len()).expect("less than a page twice");
    let pages = diffs.iter().map(|(page, diff)| (*page, length(diff)));
    let data = diffs.iter().flat_map(|(_, diff)| diff.as_bytes());
    (pages.collect(), data.copied().collect())
}

pub(super) fn first_page(extent: Extent) -> Page {
    Page {
        segment: extent.segment,
        index: extent.first_page(),
    }
}

fn send_fetch(
    cx: &mut Context<'_>,
    to: NodeId,
    segment: SegmentId,
    requester: NodeId,
    number: u64,
    write: bool,
    pages: &[u32],
) {
    let message = ReleaseMessage::Fetch {
        segment,
        requester,
        number,
        write,
        pages: pages.to_vec(),
    };
    let data = Vec::new();
    cx.out.push(Action::Send { to, message, data });
}
