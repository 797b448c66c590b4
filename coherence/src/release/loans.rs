//! Pages whose home moves: from their manager to the node that writes them, and back.
//!
//! ```text
//! the only writer of a page, for some releases:    nobody has touched it yet:
//! W ──Diffs─────────────────────▶ M                W ──Fetch, to write──▶ M
//! W ◀─Merged, it is offered────── M  holds         W ◀─Copies, Lent────── M
//! W ──Taken, or refused─────────▶ M  others        W is its home
//! W is its home    M drops its copy  requests
//! W ◀─Merged───────────────────── M  goes on
//!
//! another node, R, reads it:                       another node, or M's processes, write it:
//! R ──Fetch──▶ M ──Fetch──▶ W                      R ──Fetch, to write, or Diffs──▶ M  holds it
//! R ◀─Copies────────────────W                                        W ◀─Recall─── M
//!                                                                    W ──Returned─▶ M  goes on as home
//! ```
//!
//! What W writes is then neither compared nor sent, as long as nobody reads it. A page never moves from
//! one borrower to another: the manager, which all requests reach first, orders everything by having it back
//! in between. W answers an offer at once, and says last what it has to say; so nothing crosses. Its next release
//! waits until M has no copy any more.
//!
//! A page that has come back is offered ever later: after twice as many releases each time (the rule of
//! Fang, Wang, Zhu and Lau, 2004: a threshold for each object, set by what moves have come to).

use migshm_protocol::page::Access;
use migshm_protocol::release::{ReleaseMessage, RunSet, Sent};
use migshm_protocol::{NodeId, NodeSet, Page, SegmentId};
use serde::{Deserialize, Serialize};

use super::tables::slot;
use super::{Action, Context, Diff, Line, Pending, Release, State};

/// Diffs in a row of one node and nobody else, after which a page is offered to it.
const PROVEN: u32 = 2;
/// How often that doubles, at most.
const MAX_DOUBLINGS: u8 = 8;

/// What a manager knows of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Record {
    /// To whom it is lent.
    pub(super) borrower: Option<NodeId>,
    /// Who has changed it last, since it has ever been anywhere else.
    pub(super) writer: Option<NodeId>,
    /// Diffs in a row of the last writer.
    row: u32,
    /// How often it has come back.
    returns: u8,
}

impl Record {
    pub(super) fn note_writer(&mut self, writer: NodeId) {
        self.row = match self.writer == Some(writer) {
            true => self.row.saturating_add(1),
            false => 1,
        };
        self.writer = Some(writer);
    }
}

/// A page whose home is moving.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Moving {
    /// The other node.
    with: NodeId,
    /// Whether it comes back; else it is offered.
    back: bool,
    /// What waits for that, in order.
    waiting: Vec<Request>,
}

/// What a node asks of a page's manager.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Request {
    /// A copy.
    Fetch {
        by: NodeId,
        number: u64,
        write: bool,
    },
    /// To merge what it wrote.
    Diff { by: NodeId, number: u64, diff: Diff },
}

/// As a manager.
impl Release {
    /// Grants a node's request for a page, now or when its home has ceased to move.
    pub(super) fn on_request(&mut self, cx: &mut Context<'_>, page: Page, request: Request) {
        let (Request::Fetch { by, .. } | Request::Diff { by, .. }) = request;
        if let Some(segment) = self.tables.segments.get_mut(&page.segment) {
            segment.users.insert(by);
        }
        if let Some(moving) = self.tables.moving.get_mut(&page) {
            // To whom it is offered it is as ever, until that node takes it.
            if moving.back || moving.with != by {
                moving.waiting.push(request);
                return;
            }
        }
        let Some(borrower) = self.borrower(page) else {
            return self.grant(cx, page, request);
        };
        match request {
            // It was asked for again before it came, and has come.
            Request::Fetch { by, .. } if by == borrower => {}
            _ if self.is_lost(page.segment, borrower) => self.deny(cx, page, request),
            Request::Fetch {
                by,
                number,
                write: false,
            } => {
                let key = (borrower, page.segment, by, number, false);
                cx.passed.entry(key).or_default().push(page.index);
            }
            request => {
                self.recall(cx, page);
                if let Some(moving) = self.tables.moving.get_mut(&page) {
                    moving.waiting.push(request);
                }
            }
        }
    }

    /// Grants a request for a page that has its home here.
    pub(super) fn grant(&mut self, cx: &mut Context<'_>, page: Page, request: Request) {
        match request {
            // Served already, by the home of then.
            Request::Fetch { by, .. } if by == self.tables.me => {}
            Request::Fetch { by, number, write } if write && self.is_untouched(cx, page) => {
                self.record_mut(page).borrower = Some(by);
                self.send_copy(cx, by, page, number, Sent::Lent);
            }
            Request::Fetch { by, number, .. } => self.serve(cx, by, page, number),
            Request::Diff { by, number, diff } => self.merge(cx, by, number, page, &diff),
        }
    }

    /// Answers a request for a page that is lost.
    pub(super) fn deny(&mut self, cx: &mut Context<'_>, page: Page, request: Request) {
        match request {
            Request::Fetch { by, .. } => {
                self.send_lost(cx, by, page.segment, vec![(page.index, 1)])
            }
            Request::Diff { by, number, .. } => {
                self.note_merged(cx, by, number, page, false, false);
            }
        }
    }

    fn is_untouched(&self, cx: &Context<'_>, page: Page) -> bool {
        !self.is_durable(page.segment)
            && self.line(page).state == State::Absent
            && self.copies(page).is_empty()
            && self.record(page).writer.is_none()
            && !cx.frames.is_present(page)
    }

    /// Whether a page that a node has just changed is offered to it.
    pub(super) fn offer(&mut self, page: Page, to: NodeId) -> bool {
        let Record { row, returns, .. } = self.record(page);
        let is_offered = row >= PROVEN << returns.min(MAX_DOUBLINGS)
            && self.line(page).state == State::Clean
            && self.copies(page).contains(to)
            && !self.is_away(page);
        if is_offered {
            let moving = Moving {
                with: to,
                back: false,
                waiting: Vec::new(),
            };
            self.tables.moving.insert(page, moving);
        }
        is_offered
    }

    /// A node has answered an offer.
    pub(super) fn on_taken(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        segment: SegmentId,
        number: u64,
        [taken, refused]: [&[u32]; 2],
    ) {
        let message = ReleaseMessage::Merged {
            segment,
            number,
            shared: Vec::new(),
            offered: Vec::new(),
        };
        let taken = taken.iter().map(|&index| (index, true));
        let refused = refused.iter().map(|&index| (index, false));
        for (index, is_taken) in taken.chain(refused) {
            let page = Page { segment, index };
            let is_offered = |moving: &Moving| moving.with == from && !moving.back;
            if !self.tables.moving.get(&page).is_some_and(is_offered) {
                self.protocol_error();
                continue;
            }
            if is_taken {
                self.record_mut(page).borrower = Some(from);
                if self.line(page).state != State::Absent {
                    cx.frames.drop(page);
                    *self.line_mut(page) = Line::default();
                }
                self.clear_copies(page);
            } else {
                self.record_mut(page).row = 0;
            }
            self.settle(cx, page);
        }
        let (to, data) = (from, Vec::new());
        cx.out.push(Action::Send { to, message, data });
    }

    /// Has a page come home.
    fn recall(&mut self, cx: &mut Context<'_>, page: Page) {
        let Some(borrower) = self.borrower(page) else {
            return;
        };
        if self.tables.moving.contains_key(&page) {
            return;
        }
        let moving = Moving {
            with: borrower,
            back: true,
            waiting: Vec::new(),
        };
        self.tables.moving.insert(page, moving);
        let recalled = cx.recalled.entry((borrower, page.segment)).or_default();
        recalled.push(page.index);
    }

    /// A page has come home.
    pub(super) fn on_returned(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        page: Page,
        contents: Option<&[u8]>,
        copies: NodeSet,
    ) {
        let fits = contents.is_none_or(|bytes| bytes.len() == self.tables.page_size);
        if !fits || !self.knows(page) || self.borrower(page) != Some(from) {
            return self.protocol_error();
        }
        if self.line(page).state != State::Absent {
            cx.frames.drop(page);
        }
        *self.line_mut(page) = Line::default();
        self.line_mut(page).state = State::Clean;
        cx.frames.install(page, Access::Read, contents);
        let copies = copies.without(self.tables.me);
        let extent = self.extent_mut(page.extent());
        let pages = extent.lines.len();
        extent.copies.set(copies, slot(page), pages);
        let record = self.record_mut(page);
        *record = Record {
            borrower: None,
            writer: Some(from),
            row: 0,
            returns: record.returns.saturating_add(1),
        };
        self.settle(cx, page);
    }

    /// A page's home has ceased to move: what has waited goes on.
    fn settle(&mut self, cx: &mut Context<'_>, page: Page) {
        let moving = self.tables.moving.remove(&page);
        if let Some(pending) = self.tables.pending.get(&page).copied() {
            if !self.is_home(page) {
                self.ask(cx, page);
            } else {
                self.tables.pending.remove(&page);
                match pending.write {
                    true => self.permit(cx, page),
                    false => cx.frames.retry(page),
                }
            }
        }
        for request in moving.into_iter().flat_map(|moving| moving.waiting) {
            self.on_request(cx, page, request);
        }
    }

    /// A process here wants a page that is elsewhere, or is offered.
    pub(super) fn ask_borrower(&mut self, cx: &mut Context<'_>, page: Page, pending: Pending) {
        match self.borrower(page) {
            Some(borrower) if self.is_lost(page.segment, borrower) => self.fail(cx, page),
            Some(_) if pending.write => self.recall(cx, page),
            Some(borrower) => self.fetch(cx, page, borrower, false),
            None => {}
        }
    }

    /// A node has left: what was lent to it is lost, what was offered to it stays.
    pub(super) fn lose_loans(&mut self, cx: &mut Context<'_>, node: NodeId) {
        let with = self.tables.moving.iter();
        let with = with.filter(|(_, moving)| moving.with == node);
        let with: Vec<Page> = with.map(|(page, _)| *page).collect();
        with.into_iter().for_each(|page| self.settle(cx, page));
        for moving in self.tables.moving.values_mut() {
            moving.waiting.retain(|request| {
                let (Request::Fetch { by, .. } | Request::Diff { by, .. }) = request;
                *by != node
            });
        }
        let mut lost = Vec::new();
        for (&segment, known) in &self.tables.segments {
            let mut pages = RunSet::default();
            for (extent, state) in (0..).zip(&known.extents) {
                let records = state.iter().flat_map(|state| &state.records);
                for (slot, record) in (0..).zip(records) {
                    if record.borrower == Some(node) {
                        pages.insert(extent * migshm_protocol::ids::EXTENT_PAGES + slot, 1);
                    }
                }
            }
            if !pages.is_empty() {
                lost.push((segment, known.users, pages.runs()));
            }
        }
        for (segment, users, pages) in lost {
            for page in self.known_pages(segment, &pages) {
                if !self.is_home(page) {
                    self.fail(cx, page);
                }
            }
            for user in users.without(self.tables.me) {
                self.send_lost(cx, user, segment, pages.clone());
            }
        }
    }

    fn send_lost(
        &mut self,
        cx: &mut Context<'_>,
        to: NodeId,
        segment: SegmentId,
        pages: Vec<(u32, u32)>,
    ) {
        let message = ReleaseMessage::Lost { segment, pages };
        let data = Vec::new();
        if to != self.tables.me {
            cx.out.push(Action::Send { to, message, data });
        }
    }

    /// As a manager: whether a page's home is elsewhere, or moving.
    pub(super) fn is_away(&self, page: Page) -> bool {
        self.tables.moving.contains_key(&page) || self.borrower(page).is_some()
    }
}

/// As a borrower.
impl Release {
    /// This node becomes a page's home.
    pub(super) fn borrow(&mut self, page: Page) {
        self.clear_copies(page);
        let line = self.line_mut(page);
        line.borrowed = true;
        line.state = State::Absent;
        self.counters.homes_taken += 1;
    }

    /// Takes what is offered, and is still here.
    pub(super) fn take(
        &mut self,
        cx: &mut Context<'_>,
        manager: NodeId,
        segment: SegmentId,
        offered: &[u32],
    ) {
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        for &index in offered {
            let page = Page { segment, index };
            if !self.knows(page) || self.manages(page) || self.line(page).borrowed {
                self.protocol_error();
                continue;
            }
            let state = self.line(page).state;
            if state == State::Absent || self.is_pending(page) {
                refused.push(index);
                continue;
            }
            self.tables.twins.remove(&page);
            self.borrow(page);
            if state == State::Clean {
                cx.frames.permit(page);
            }
            taken.push(index);
        }
        if !taken.is_empty() || !refused.is_empty() {
            // Its processes read their copies until the manager knows.
            let number = self.expect_merged(manager, segment);
            let message = ReleaseMessage::Taken {
                segment,
                number,
                taken,
                refused,
            };
            let (to, data) = (manager, Vec::new());
            cx.out.push(Action::Send { to, message, data });
        }
    }

    /// The manager wants pages back.
    pub(super) fn on_recall(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        segment: SegmentId,
        pages: &[u32],
    ) {
        for &index in pages {
            let page = Page { segment, index };
            if !self.knows(page) || self.manager_of(page.extent()) != Some(from) {
                self.protocol_error();
            } else if self.line(page).borrowed {
                self.give_back(cx, page, true);
            }
        }
    }

    /// Makes the manager the home of a page again; a copy stays here if `keep`.
    pub(super) fn give_back(&mut self, cx: &mut Context<'_>, page: Page, keep: bool) {
        let manager = self.manager_of(page.extent());
        let Some(to) = manager.filter(|&manager| !self.is_lost(page.segment, manager)) else {
            return;
        };
        match self.line(page).state {
            State::Dirty => self.end_writing(cx, page),
            State::Clean | State::Absent => cx.frames.protect(page),
        }
        cx.frames.read(page, &mut self.buffer);
        let mut copies = self.copies(page);
        self.clear_copies(page);
        self.line_mut(page).borrowed = false;
        if keep {
            copies.insert(self.tables.me);
            self.line_mut(page).state = State::Clean;
        } else {
            cx.frames.drop(page);
            *self.line_mut(page) = Line::default();
        }
        self.counters.homes_returned += 1;
        let zeros = self.buffer.iter().all(|&byte| byte == 0);
        let message = ReleaseMessage::Returned {
            page,
            zeros,
            copies,
        };
        let data = match zeros {
            true => Vec::new(),
            false => self.buffer.clone(),
        };
        cx.out.push(Action::Send { to, message, data });
    }
}
