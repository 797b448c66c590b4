//! A node as a holder of pages: its faults, its copies, what it gives away.

use migshm_protocol::page::{Access, Contents, PageMessage};
use migshm_protocol::{Extent, NodeId, Page};
use serde::{Deserialize, Serialize};

use super::hold::Hold;
use super::home::Asked;
use super::{Action, Body, Context, Engine, Fill, Home, Known, Time, first_page, is_node, slot};

/// This node's copy of a page.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) state: State,
    /// The home has asked for the copy and must wait until the hold ends.
    pub(super) wanted: bool,
    pub(super) hold: Hold,
}

// Every page that a node knows of has one.
const _: () = assert!(size_of::<Line>() <= 8);

/// What a copy is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum State {
    /// No copy.
    #[default]
    Invalid,
    /// Readable; another node answers for the contents.
    Shared,
    /// Readable, others may read too; this node answers for the contents.
    Owned,
    /// Writable, nobody else has a copy.
    Exclusive,
    /// As `Owned`, written back, not yet known whether in time.
    Evicting,
    /// Taken by another node while it was being written back, or relinquished: no copy, and nothing
    /// may be requested until the home has answered.
    Evicted,
}

impl State {
    pub(super) fn access(self) -> Option<Access> {
        match self {
            Self::Invalid | Self::Evicted => None,
            Self::Shared | Self::Owned | Self::Evicting => Some(Access::Read),
            Self::Exclusive => Some(Access::Write),
        }
    }

    /// Whether a write-back is under way.
    pub(super) fn is_written_back(self) -> bool {
        matches!(self, Self::Evicting | Self::Evicted)
    }

    /// Whether this node answers for the contents.
    pub(super) fn owns(self) -> bool {
        matches!(self, Self::Owned | Self::Exclusive | Self::Evicting)
    }
}

/// A page that was asked for, or will be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pending<D> {
    /// What was asked for.
    pub(super) access: Access,
    /// What some thread waits for; `None` if the page is prefetched and no thread does yet.
    pub(super) awaited: Option<Access>,
    /// Whether the request may be declined.
    pub(super) prefetch: bool,
    /// Whether the request is under way; it is not while the home is unknown or the page is
    /// being written back.
    pub(super) sent: bool,
    /// Acknowledgements that have come; they may come before the grant.
    pub(super) acks: u16,
    pub(super) grant: Option<Grant<D>>,
}

impl<D> Pending<D> {
    pub(super) fn fault(access: Access) -> Self {
        Self {
            access,
            awaited: Some(access),
            prefetch: false,
            sent: false,
            acks: 0,
            grant: None,
        }
    }

    fn prefetch(access: Access) -> Self {
        Self {
            awaited: None,
            prefetch: true,
            ..Self::fault(access)
        }
    }
}

/// A grant, as in [`PageMessage::Grant`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Grant<D> {
    pub(super) access: Access,
    pub(super) acks: u16,
    pub(super) contents: Fill<D>,
    pub(super) home: NodeId,
    pub(super) confirm: bool,
}

/// What a home asks a holder to do for a requester.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Take {
    /// Send the contents, keep a readable copy or none.
    Give(Give),
    /// Drop the copy and say so.
    Drop { requester: NodeId },
}

/// As in [`PageMessage::Forward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Give {
    pub(super) home: NodeId,
    pub(super) access: Access,
    pub(super) requester: NodeId,
    pub(super) acks: u16,
    pub(super) pushed: bool,
    pub(super) prefetch: bool,
}

impl<D> Engine<D> {
    pub(super) fn fault(&mut self, cx: &mut Context<'_, D>, page: Page, access: Access) {
        self.counters.faults += 1;
        if !matches!(self.knows(page), Known::Yes) {
            return cx.out.push(Action::Fail { page });
        }
        if self.home_of(page.extent()) == Some(self.me) {
            self.open_directory(cx, page.extent());
        }
        if let Some(granted) = self.access(page).filter(|&granted| granted >= access) {
            // Granted while the fault was under way, or since ever: only the protection lacks.
            let contents = Fill::InPlace;
            return cx.out.push(Action::Install {
                page,
                access: granted,
                contents,
            });
        }
        if let Some(pending) = self.pending.get_mut(&page) {
            pending.awaited = pending.awaited.max(Some(access));
            return;
        }
        self.await_page(cx, page, access);
    }

    fn await_page(&mut self, cx: &mut Context<'_, D>, page: Page, access: Access) {
        self.pending.insert(page, Pending::fault(access));
        match self.line(page).state {
            State::Evicting | State::Evicted => {}
            _ => self.send_request(cx, page),
        }
    }

    pub(super) fn prefetch(&mut self, cx: &mut Context<'_, D>, page: Page, access: Access) {
        if !matches!(self.knows(page), Known::Yes) || self.pending.contains_key(&page) {
            return;
        }
        if !self.view.is_flushed() {
            return;
        }
        match self.home_of(page.extent()) {
            None => return,
            Some(home) if home == self.me => self.open_directory(cx, page.extent()),
            Some(_) => {}
        }
        if self.access(page) >= Some(access) || self.line(page).state.is_written_back() {
            return;
        }
        self.counters.prefetches += 1;
        self.pending.insert(page, Pending::prefetch(access));
        self.send_request(cx, page);
    }

    /// What was to be prefetched cannot be had just now. Who waits for it by now asks in earnest.
    pub(super) fn declined(&mut self, cx: &mut Context<'_, D>, page: Page) {
        let declinable = |p: &Pending<D>| p.prefetch && p.sent && p.grant.is_none();
        if !self.pending.get(&page).is_some_and(declinable) {
            return self.protocol_error();
        }
        self.counters.declined += 1;
        let awaited = self.pending.remove(&page).and_then(|p| p.awaited);
        // What was pushed meanwhile may do.
        if let Some(access) = awaited.filter(|&access| self.access(page) < Some(access)) {
            self.await_page(cx, page, access);
        }
    }

    /// The page's contents are lost, or no node has room for it.
    pub(super) fn page_lost(&mut self, cx: &mut Context<'_, D>, page: Page) {
        match self.pending.remove(&page) {
            Some(Pending {
                awaited: Some(_), ..
            }) => cx.out.push(Action::Fail { page }),
            Some(_) => {}
            None => self.protocol_error(),
        }
    }

    pub(super) fn home_is(
        &mut self,
        cx: &mut Context<'_, D>,
        extent: Extent,
        home: Option<NodeId>,
        orphaned: bool,
    ) {
        let pages = self.finding.remove(&extent);
        if !matches!(self.knows(first_page(extent)), Known::Yes) || pages.is_none() && !orphaned {
            return;
        }
        let works = self.unrouted.remove(&extent).unwrap_or_default();
        let home = home.filter(|&home| is_node(home));
        match (self.home_of(extent), home) {
            (_, Some(home)) if home == self.me && orphaned => self.adopt(cx, extent),
            (None, Some(home)) if home == self.me && self.extent_mut(extent).was_home => {
                self.adopt(cx, extent);
            }
            (None, Some(home)) if home == self.me => self.open_directory(cx, extent),
            (None, Some(home)) => self.extent_mut(extent).home = Home::At(home),
            (None, None) => {
                works.into_iter().for_each(|work| self.refuse(cx, work));
                let pages = pages.unwrap_or_default();
                return pages.into_iter().for_each(|page| self.page_lost(cx, page));
            }
            (Some(_), _) => {}
        }
        for page in pages.unwrap_or_default() {
            self.send_request(cx, page);
        }
        works.into_iter().for_each(|work| self.accept(cx, work));
    }

    /// Asks the coordinator for an extent's home, if it has not been asked yet.
    pub(super) fn find_home(&mut self, cx: &mut Context<'_, D>, extent: Extent) -> &mut Vec<Page> {
        self.finding.entry(extent).or_insert_with(|| {
            cx.out.push(Action::FindHome { extent });
            Vec::new()
        })
    }

    /// Requests a page that has a pending fault, or finds out where.
    ///
    /// Not before nothing of an earlier view can come any more: then all is requested anew.
    pub(super) fn send_request(&mut self, cx: &mut Context<'_, D>, page: Page) {
        if !self.view.is_flushed() {
            return;
        }
        let extent = page.extent();
        let Some(home) = self.home_of(extent) else {
            return self.find_home(cx, extent).push(page);
        };
        let Some(pending) = self.pending.get_mut(&page) else {
            return;
        };
        pending.sent = true;
        let (access, prefetch) = (pending.access, pending.prefetch);
        let asked = Asked {
            page,
            access,
            requester: self.me,
            has_copy: self.access(page).is_some(),
            prefetch,
        };
        if home == self.me {
            self.request(cx, asked);
        } else {
            cx.send(home, asked.message(), Body::None);
        }
    }

    pub(super) fn granted(&mut self, cx: &mut Context<'_, D>, page: Page, grant: Grant<D>) {
        let copy_lacks = matches!(grant.contents, Fill::InPlace) && self.access(page).is_none();
        let home = grant.home;
        if copy_lacks || (home == self.me) != self.is_home(page.extent()) {
            return self.protocol_error();
        }
        match self.pending.get_mut(&page) {
            Some(pending) if pending.sent && pending.grant.is_none() => pending.grant = Some(grant),
            _ => return self.protocol_error(),
        }
        self.extent_mut(page.extent()).home = Home::At(home);
        self.complete(cx, page);
    }

    pub(super) fn invalidate_acked(&mut self, cx: &mut Context<'_, D>, page: Page) {
        match self.pending.get_mut(&page) {
            Some(pending) if pending.sent => {
                pending.acks = pending.acks.saturating_add(1);
                self.complete(cx, page);
            }
            _ => self.protocol_error(),
        }
    }

    /// Installs a page once the grant and all acknowledgements are in.
    fn complete(&mut self, cx: &mut Context<'_, D>, page: Page) {
        let complete = |p: &Pending<D>| p.grant.as_ref().is_some_and(|g| p.acks >= g.acks);
        if !self.pending.get(&page).is_some_and(complete) {
            return;
        }
        let Some(Pending {
            awaited,
            grant:
                Some(Grant {
                    access,
                    contents,
                    home,
                    confirm,
                    ..
                }),
            ..
        }) = self.pending.remove(&page)
        else {
            return;
        };
        // A copy that was pushed while the request was under way is as good.
        let contents = match self.access(page) {
            Some(_) => Fill::InPlace,
            None => contents,
        };
        self.install(cx, page, access, contents);
        if awaited.is_none() {
            // What nobody waits for yet need not stay.
            self.line_mut(page).hold = Hold::default();
        }
        self.confirm(cx, page, home, confirm);
    }

    fn install(&mut self, cx: &mut Context<'_, D>, page: Page, access: Access, contents: Fill<D>) {
        let line = self.line_mut(page);
        match (access, &contents) {
            (Access::Write, _) => line.state = State::Exclusive,
            (Access::Read, Fill::InPlace) => {}
            (Access::Read, _) => line.state = State::Shared,
        }
        line.hold.mark(cx.now);
        cx.out.push(Action::Install {
            page,
            access,
            contents,
        });
    }

    /// Tells the home that a grant has arrived, if it waits for that.
    fn confirm(&mut self, cx: &mut Context<'_, D>, page: Page, home: NodeId, confirm: bool) {
        if !confirm {
            return;
        }
        if home == self.me {
            self.done(cx, page, home);
        } else {
            cx.send(home, PageMessage::Done { page }, Body::None);
        }
    }

    /// Has the home give a page of this node's to another node, which will want it next.
    pub(super) fn push(&mut self, cx: &mut Context<'_, D>, page: Page, access: Access, to: NodeId) {
        let known = is_node(to) && matches!(self.knows(page), Known::Yes);
        if !known || !self.view.is_flushed() || self.pending.contains_key(&page) {
            return;
        }
        let line = self.line(page);
        if access == Access::Write && line.state == State::Shared {
            return self.relinquish(cx, page);
        }
        let can = match access {
            Access::Read => matches!(line.state, State::Owned | State::Exclusive),
            Access::Write => line.state == State::Exclusive,
        };
        match self.home_of(page.extent()) {
            // What came and was not used here was not written here under the lock either.
            Some(_) if !can || line.wanted || !cx.memory.touched(page) => {}
            Some(home) if home == self.me => {
                self.pass_on(cx, page, access, home, to);
            }
            Some(home) => {
                cx.send(home, PageMessage::Push { page, access, to }, Body::None);
            }
            None => {}
        }
    }

    /// Gives up this node's copy of a page that its owner will write next.
    fn relinquish(&mut self, cx: &mut Context<'_, D>, page: Page) {
        let Some(home) = self.home_of(page.extent()) else {
            return;
        };
        if self.line(page).wanted || home == self.me && !self.unlist(cx, page, home) {
            return;
        }
        self.counters.relinquished += 1;
        cx.out.push(Action::Drop { page });
        *self.line_mut(page) = Line::default();
        if home != self.me {
            // Until the home has answered, lest this be taken for a copy that comes later.
            self.line_mut(page).state = State::Evicted;
            let sharer = self.me;
            cx.send(home, PageMessage::Relinquish { page, sharer }, Body::None);
        }
    }

    /// A page came that this node has not asked for, or whose request is still to be answered.
    pub(super) fn pushed(&mut self, cx: &mut Context<'_, D>, page: Page, grant: Grant<D>) {
        let complete = grant.acks == 0 && grant.confirm && !matches!(grant.contents, Fill::InPlace);
        if !complete || (grant.home == self.me) != self.is_home(page.extent()) {
            return self.protocol_error();
        }
        match self.line(page).state {
            State::Invalid => {
                self.counters.pushes += 1;
                self.extent_mut(page.extent()).home = Home::At(grant.home);
                self.install(cx, page, grant.access, grant.contents);
                if !self.pending.contains_key(&page) {
                    // Whoever it was meant for may not be next after all.
                    self.line_mut(page).hold = Hold::default();
                }
                self.confirm(cx, page, grant.home, grant.confirm);
            }
            // The home's answer to an earlier write-back, which is under way, ends that first.
            State::Evicted if !self.pushed.contains_key(&page) => {
                self.pushed.insert(page, grant);
            }
            _ => self.protocol_error(),
        }
    }

    pub(super) fn forwarded(&mut self, cx: &mut Context<'_, D>, page: Page, give: Give) {
        if give.requester == self.me || !self.line(page).state.owns() {
            return self.protocol_error();
        }
        if give.prefetch && self.is_held(cx, page) {
            let requester = give.requester;
            let message = PageMessage::Decline { page, requester };
            return cx.send(give.home, message, Body::None);
        }
        if !self.defer(cx, page, Take::Give(give)) {
            self.give(cx, page, give);
        }
    }

    pub(super) fn invalidated(&mut self, cx: &mut Context<'_, D>, page: Page, requester: NodeId) {
        if requester == self.me || self.line(page).state == State::Exclusive {
            return self.protocol_error();
        }
        if !self.defer(cx, page, Take::Drop { requester }) {
            self.lose(cx, page);
            cx.send(requester, PageMessage::InvalidateAck { page }, Body::None);
        }
    }

    /// Puts off what a home asks for if the page is held; whether it did.
    pub(super) fn defer(&mut self, cx: &mut Context<'_, D>, page: Page, take: Take) -> bool {
        let line = self.line(page);
        if line.wanted {
            // A home has one transaction of a page under way at a time.
            self.protocol_error();
            return true;
        }
        if !matches!(line.state, State::Shared | State::Owned | State::Exclusive) {
            return false;
        }
        let Some(until) = self.hold_ends(cx, page) else {
            return false;
        };
        self.line_mut(page).wanted = true;
        self.deferred.insert((until, page), take);
        self.counters.hold_deferrals += 1;
        true
    }

    /// Whether the page would not be given away at once.
    pub(super) fn is_held(&self, cx: &Context<'_, D>, page: Page) -> bool {
        !self.line(page).state.is_written_back() && self.hold_ends(cx, page).is_some()
    }

    /// When to look again whether a page may go; `None` if it may.
    fn hold_ends(&self, cx: &Context<'_, D>, page: Page) -> Option<Time> {
        let touched = || cx.memory.touched(page);
        self.line(page).hold.until(cx.now, &self.config, touched)
    }

    /// Does what was put off and is due.
    pub(super) fn end_holds(&mut self, cx: &mut Context<'_, D>) {
        while let Some(entry) = self.deferred.first_entry() {
            let &(until, page) = entry.key();
            if until > cx.now {
                break;
            }
            let take = entry.remove();
            if let Some(later) = self.hold_ends(cx, page) {
                self.deferred.insert((later, page), take);
                continue;
            }
            self.line_mut(page).wanted = false;
            match take {
                Take::Give(give) => {
                    self.give(cx, page, give);
                    if give.home == self.me && give.acks == 0 && !give.pushed {
                        self.finish(cx, page);
                    }
                }
                Take::Drop { requester } => {
                    self.lose(cx, page);
                    cx.send(requester, PageMessage::InvalidateAck { page }, Body::None);
                }
            }
        }
    }

    /// Sends this node's copy to a requester and keeps a readable one, or none.
    ///
    /// Between a home and a requester alone there is nothing to confirm: what the home does
    /// next reaches the requester after the grant.
    pub(super) fn give(&mut self, cx: &mut Context<'_, D>, page: Page, give: Give) {
        let Give {
            home,
            access,
            requester,
            acks,
            pushed,
            ..
        } = give;
        self.counters.forwards += 1;
        let confirm = home != self.me || acks > 0 || pushed;
        let line = self.line_mut(page);
        if line.state == State::Exclusive {
            cx.out.push(Action::Protect { page });
            line.state = State::Owned;
        }
        let contents = Contents::Bytes;
        let message = PageMessage::Grant {
            page,
            access,
            acks,
            contents,
            home,
            confirm,
            pushed,
        };
        cx.send(requester, message, Body::Page(page));
        if access == Access::Write {
            self.lose(cx, page);
        }
    }

    /// Drops this node's copy, if there is one, for another node's write.
    pub(super) fn lose(&mut self, cx: &mut Context<'_, D>, page: Page) {
        let line = self.line_mut(page);
        line.state = match line.state {
            State::Invalid | State::Evicted => return,
            State::Shared | State::Owned | State::Exclusive => State::Invalid,
            State::Evicting => State::Evicted,
        };
        cx.out.push(Action::Drop { page });
        self.counters.invalidations += 1;
    }

    pub(super) fn evict(&mut self, cx: &mut Context<'_, D>, page: Page) {
        let line = self.line(page);
        if line.wanted || self.pending.contains_key(&page) || !self.view.is_flushed() {
            return;
        }
        match (line.state, self.home_of(page.extent())) {
            (State::Shared, _) => {
                *self.line_mut(page) = Line::default();
                cx.out.push(Action::Drop { page });
                self.counters.evictions += 1;
            }
            (State::Owned | State::Exclusive, Some(home)) if home != self.me => {
                if line.state == State::Exclusive {
                    cx.out.push(Action::Protect { page });
                }
                self.line_mut(page).state = State::Evicting;
                let message = PageMessage::WriteBack {
                    page,
                    owner: self.me,
                };
                cx.send(home, message, Body::Page(page));
                self.counters.write_backs += 1;
            }
            _ => {}
        }
    }

    /// The home has answered a write-back, or knows that a copy is gone; what waited for that may be
    /// requested now.
    pub(super) fn written_back(&mut self, cx: &mut Context<'_, D>, page: Page, accepted: bool) {
        let is_home = self.is_home(page.extent());
        let line = self.line_mut(page);
        match line.state {
            // The home came here meanwhile: this is where the page is kept.
            State::Evicting if !accepted && is_home => line.state = State::Owned,
            // Not accepted: after a death this was one of several that answered for it.
            State::Evicting => {
                *line = Line::default();
                cx.out.push(Action::Drop { page });
            }
            State::Evicted => line.state = State::Invalid,
            _ => return self.protocol_error(),
        }
        if let Some(grant) = self.pushed.remove(&page) {
            self.pushed(cx, page, grant);
        }
        if self.pending.get(&page).is_some_and(|pending| !pending.sent) {
            self.send_request(cx, page);
        }
    }

    pub(super) fn line(&self, page: Page) -> Line {
        let line = self
            .extent(page.extent())
            .and_then(|extent| extent.lines.get(slot(page)));
        line.copied().unwrap_or_default()
    }

    /// # Panics
    ///
    /// If the page is not one of a known segment: inputs are checked on entry.
    pub(super) fn line_mut(&mut self, page: Page) -> &mut Line {
        &mut self.extent_mut(page.extent()).lines[slot(page)]
    }
}
