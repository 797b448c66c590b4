//! A node as a home, and as a manager: pages go out, what others wrote comes in.

use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::release::{MAX_COPIES, MAX_WANTED, ReleaseMessage, Sent};
use migshm_protocol::{NodeId, NodeSet, Page, SegmentId};
use serde::{Deserialize, Serialize};

use super::backup::{Part, replicate};
use super::loans::Request;
use super::tables::slot;
use super::{Action, Context, Diff, Release, State};

/// A message of diffs, some of which are not merged yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Merging {
    pub(super) segment: SegmentId,
    /// How many.
    left: usize,
    /// As in [`ReleaseMessage::Merged`].
    shared: Vec<u32>,
    offered: Vec<u32>,
}

impl Release {
    pub(super) fn receive(
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
                requester,
                number,
                write,
                pages,
            } => {
                if pages.len() > MAX_WANTED || usize::from(requester.0) >= MAX_NODES {
                    return self.protocol_error();
                }
                for index in pages {
                    let page = Page { segment, index };
                    let fetch = Request::Fetch {
                        by: requester,
                        number,
                        write,
                    };
                    self.on_fetch(cx, page, fetch);
                }
            }
            ReleaseMessage::Copies {
                segment,
                number,
                pages,
            } => self.on_copies(cx, from, segment, number, &pages, data),
            ReleaseMessage::Diffs {
                segment,
                number,
                pages,
            } => self.on_diffs(cx, from, segment, number, &pages, data),
            ReleaseMessage::Merged {
                segment,
                number,
                shared,
                offered,
            } => self.merged(cx, from, segment, number, [&shared, &offered]),
            ReleaseMessage::Taken {
                segment,
                number,
                taken,
                refused,
            } => self.on_taken(cx, from, segment, number, [&taken, &refused]),
            ReleaseMessage::Recall { segment, pages } => self.on_recall(cx, from, segment, &pages),
            ReleaseMessage::Returned {
                page,
                zeros,
                copies,
            } => self.on_returned(cx, from, page, (!zeros).then_some(data), copies),
            ReleaseMessage::Replicate {
                extent,
                number,
                first,
                last,
                pages,
            } => self.on_replicate(cx, from, extent, number, [first, last], &pages, data),
            ReleaseMessage::Lost { segment, pages } => {
                for page in self.known_pages(segment, &pages) {
                    self.fail(cx, page);
                }
            }
        }
    }

    fn on_copies(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        segment: SegmentId,
        number: u64,
        pages: &[(u32, Sent)],
        data: &[u8],
    ) {
        let with_bytes = pages.iter().filter(|(_, sent)| *sent == Sent::Bytes);
        if data.len() != with_bytes.count() * self.tables.page_size {
            return self.protocol_error();
        }
        let mut contents = data.chunks_exact(self.tables.page_size);
        for &(index, sent) in pages {
            let page = Page { segment, index };
            let contents = (sent == Sent::Bytes).then(|| contents.next()).flatten();
            if self.knows(page) {
                self.copied(cx, from, page, number, sent, contents);
            } else {
                self.protocol_error();
            }
        }
    }

    /// Takes diffs apart; those that are none are left out.
    pub(super) fn parse_diffs(
        &mut self,
        segment: SegmentId,
        pages: &[(u32, u32)],
        mut data: &[u8],
    ) -> Vec<(Page, Diff)> {
        let mut parts = Vec::new();
        for &(index, length) in pages {
            let page = Page { segment, index };
            let Some((bytes, rest)) = data.split_at_checked(length as usize) else {
                self.protocol_error();
                break;
            };
            data = rest;
            match Diff::parse(bytes, self.tables.page_size) {
                Some(diff) if self.knows(page) => parts.push((page, diff)),
                _ => self.protocol_error(),
            }
        }
        parts
    }

    /// A node asks for a page: of the manager, or of the home to which the manager has passed it on.
    fn on_fetch(&mut self, cx: &mut Context<'_>, page: Page, fetch: Request) {
        let Request::Fetch { by, number, write } = fetch else {
            return;
        };
        if !self.knows(page) {
            return self.protocol_error();
        }
        if self.is_durable(page.segment) {
            return self.on_durable_request(cx, page, fetch);
        }
        if self.line(page).borrowed && by != self.tables.me {
            return self.serve(cx, by, page, number);
        }
        if self.become_manager(page) {
            return self.on_request(cx, page, fetch);
        }
        // It has gone back to the manager, which knows where it is now.
        let manager = self.manager_of(page.extent());
        match manager.filter(|&manager| !self.is_lost(page.segment, manager)) {
            Some(manager) => {
                let key = (manager, page.segment, by, number, write);
                cx.passed.entry(key).or_default().push(page.index);
            }
            None => self.protocol_error(),
        }
    }

    /// Sends a copy of a page that has its home here.
    pub(super) fn serve(&mut self, cx: &mut Context<'_>, to: NodeId, page: Page, number: u64) {
        let state = self.line(page).state;
        if state == State::Absent {
            cx.frames.protect(page);
            self.line_mut(page).state = State::Clean;
        }
        if state != State::Dirty || !self.note_change(cx, page) {
            cx.frames.read(page, &mut self.buffer);
        }
        let extent = self.extent_mut(page.extent());
        extent.copies.add(to, slot(page), extent.lines.len());
        let sent = if self.buffer.iter().all(|&byte| byte == 0) {
            Sent::Zeros
        } else {
            Sent::Bytes
        };
        self.send_copy(cx, to, page, number, sent);
    }

    /// Sends a page that is in the buffer.
    pub(super) fn send_copy(
        &mut self,
        cx: &mut Context<'_>,
        to: NodeId,
        page: Page,
        number: u64,
        sent: Sent,
    ) {
        self.counters.copies += 1;
        let copied = cx.copies.entry((to, page.segment, number)).or_default();
        copied.pages.push((page.index, sent));
        if sent == Sent::Bytes {
            copied.data.extend_from_slice(&self.buffer);
        }
        if copied.pages.len() == MAX_COPIES {
            Self::send_copies(cx, to, page.segment, number);
        }
    }

    /// Sends the pages for a fetch that were put together.
    pub(super) fn send_copies(cx: &mut Context<'_>, to: NodeId, segment: SegmentId, number: u64) {
        let copied = cx.copies.remove(&(to, segment, number)).unwrap_or_default();
        if !copied.pages.is_empty() {
            let message = ReleaseMessage::Copies {
                segment,
                number,
                pages: copied.pages,
            };
            let data = copied.data;
            cx.out.push(Action::Send { to, message, data });
        }
    }

    /// Another node's diffs, each of which is merged now or when the page is back.
    fn on_diffs(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        segment: SegmentId,
        number: u64,
        pages: &[(u32, u32)],
        data: &[u8],
    ) {
        let mut parts = self.parse_diffs(segment, pages, data);
        if !self.is_durable(segment) {
            let sent = parts.len();
            parts.retain(|(page, _)| self.manages(*page));
            self.counters.protocol_errors += (sent - parts.len()) as u64;
        }
        let merging = Merging {
            segment,
            left: parts.len(),
            shared: Vec::new(),
            offered: Vec::new(),
        };
        // A number that was used already: its sender is not a correct peer.
        if self
            .tables
            .merging
            .insert((from, number), merging)
            .is_some()
        {
            self.protocol_error();
        }
        self.confirm(cx, from, number);
        for (page, diff) in parts {
            let by = from;
            let request = Request::Diff { by, number, diff };
            match self.is_durable(segment) {
                true => self.on_durable_request(cx, page, request),
                false => self.on_request(cx, page, request),
            }
        }
    }

    /// Merges what another node wrote to a page that has its home here.
    pub(super) fn merge(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        number: u64,
        page: Page,
        diff: &Diff,
    ) {
        self.make_home(cx, page);
        cx.frames.merge(page, diff);
        if let Some(twin) = self.tables.twins.get_mut(&page) {
            diff.apply(&mut twin.bytes);
        }
        self.counters.merges += 1;
        let shared = self.note_writer(page, from);
        if self.is_durable(page.segment) {
            let part = Part {
                from,
                number,
                page,
                shared,
            };
            return replicate(cx, page, diff.clone(), Some(part));
        }
        let offered = self.offer(page, from);
        self.note_merged(cx, from, number, page, shared, offered);
    }

    /// A part of a message of diffs needs no more care.
    pub(super) fn note_merged(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeId,
        number: u64,
        page: Page,
        shared: bool,
        offered: bool,
    ) {
        if let Some(merging) = self.tables.merging.get_mut(&(from, number)) {
            merging.left = merging.left.saturating_sub(1);
            merging.shared.extend(shared.then_some(page.index));
            merging.offered.extend(offered.then_some(page.index));
            self.confirm(cx, from, number);
        }
    }

    /// Answers a message of diffs if all are merged.
    fn confirm(&mut self, cx: &mut Context<'_>, to: NodeId, number: u64) {
        let merging = self.tables.merging.get(&(to, number));
        if merging.is_none_or(|merging| merging.left > 0) {
            return;
        }
        if let Some(merging) = self.tables.merging.remove(&(to, number)) {
            let message = ReleaseMessage::Merged {
                segment: merging.segment,
                number,
                shared: merging.shared,
                offered: merging.offered,
            };
            let data = Vec::new();
            cx.out.push(Action::Send { to, message, data });
        }
    }

    /// Who has a copy of a page that is not old, as far as its home knows.
    pub(super) fn copies(&self, page: Page) -> NodeSet {
        let extent = self.extent(page.extent());
        extent
            .map(|extent| extent.copies.of(slot(page)))
            .unwrap_or_default()
    }

    /// At the home: a page has been written by a node. Whether others have to be told.
    ///
    /// Copies of others are old now. Those that were old before the node need not tell of again, if
    /// it has told of them itself: what it says to the coordinator arrives in order.
    pub(super) fn note_writer(&mut self, page: Page, writer: NodeId) -> bool {
        let copies = self.copies(page);
        let before = self.record(page).writer;
        let fresh = copies.contains(writer);
        let extent = self.extent_mut(page.extent());
        let left: NodeSet = fresh.then_some(writer).into_iter().collect();
        let pages = extent.lines.len();
        extent.copies.set(left, slot(page), pages);
        let record = self.record_mut(page);
        record.note_writer(writer);
        !copies.without(writer).is_empty() || before.is_some_and(|before| before != writer)
    }

    /// At the home: whether nobody else has a copy that is not old, and those that are old were told
    /// of by this node.
    pub(super) fn is_alone(&self, page: Page) -> bool {
        let writer = self.record(page).writer;
        self.copies(page).is_empty() && writer.is_none_or(|writer| writer == self.tables.me)
    }
}
