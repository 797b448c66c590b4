//! A node as the home of extents: the directory, and one transaction at a time for each page.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use migshm_protocol::ids::{EXTENT_PAGES, MAX_NODES};
use migshm_protocol::page::{Access, Contents, PageMessage};
use migshm_protocol::{Extent, NodeId, Page};

use super::cache::{Give, Grant, Pending, State, Take};
use super::directory::Directory;
use super::{Action, Body, Context, Engine, Fill, NodeSet, slot};

/// A page's transaction that others than the home and the requester take part in, or that waits
/// for the end of the home's own hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Transaction<D> {
    /// Who will say that it is done.
    pub(super) requester: NodeId,
    /// Whether it gets the page unasked.
    pub(super) pushed: bool,
    /// Where the page was before, if the owner may decline.
    pub(super) before: Option<Before>,
    /// What comes next.
    pub(super) queue: VecDeque<Work<D>>,
}

/// What a home does for other nodes, one at a time for each page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Work<D> {
    Request(Asked),
    WriteBack { page: Page, owner: NodeId, data: D },
    Relinquish { page: Page, sharer: NodeId },
}

/// What the directory said of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Before {
    pub(super) owner: NodeId,
    /// None of them if the owner had the page exclusively.
    pub(super) sharers: NodeSet,
}

/// A request, as in [`PageMessage::Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Asked {
    pub(super) page: Page,
    pub(super) access: Access,
    pub(super) requester: NodeId,
    pub(super) has_copy: bool,
    pub(super) prefetch: bool,
}

impl Asked {
    pub(super) fn message(self) -> PageMessage {
        let Self {
            page,
            access,
            requester,
            has_copy,
            prefetch,
        } = self;
        PageMessage::Request {
            page,
            access,
            requester,
            has_copy,
            prefetch,
        }
    }
}

impl<D> Work<D> {
    fn page(&self) -> Page {
        match *self {
            Self::Request(Asked { page, .. })
            | Self::WriteBack { page, .. }
            | Self::Relinquish { page, .. } => page,
        }
    }

    /// Who waits for [`PageMessage::WriteBackAck`].
    fn handed_back_by(&self) -> Option<NodeId> {
        match *self {
            Self::Request(_) => None,
            Self::WriteBack { owner: node, .. } | Self::Relinquish { sharer: node, .. } => {
                Some(node)
            }
        }
    }
}

/// What can wait for a page: a node has at most one request and one write-back of it under way.
const MAX_QUEUED: usize = 2 * MAX_NODES;
/// What can wait for an extent whose home moves.
const MAX_QUEUED_FOR_MOVE: usize = EXTENT_PAGES as usize * MAX_QUEUED;

impl<D> Engine<D> {
    pub(super) fn request(&mut self, cx: &mut Context<'_, D>, asked: Asked) {
        let own = |p: &Pending<D>| p.sent && p.prefetch == asked.prefetch;
        if asked.requester == self.me && !self.pending.get(&asked.page).is_some_and(own) {
            return self.protocol_error();
        }
        self.accept(cx, Work::Request(asked));
    }

    /// A node writes a page back, or says that its copy is gone.
    pub(super) fn hand_back(&mut self, cx: &mut Context<'_, D>, work: Work<D>) {
        let page = work.page();
        let home = self.home_of(page.extent());
        if work.handed_back_by() == Some(self.me) && home.is_none_or(|home| home == self.me) {
            // It left when the home was elsewhere, and the home followed it here. Not queued:
            // the home does not move on before.
            self.written_back(cx, page, false);
            return self.fence(cx, page.extent());
        }
        self.accept(cx, work);
    }

    /// Does the work now, or when it is its turn, or has the home do it.
    pub(super) fn accept(&mut self, cx: &mut Context<'_, D>, work: Work<D>) {
        let page = work.page();
        match self.home_of(page.extent()) {
            Some(home) if home != self.me => return self.relay(cx, home, work),
            // After a death it takes the coordinator to tell an extent that is new from one that
            // has lost its home.
            None if self.view.number > 0 => return self.route(cx, work),
            // The coordinator sent the requester here: this is the home from now on.
            _ => self.open_directory(cx, page.extent()),
        }
        if let Some(owner) = work.handed_back_by()
            && self.is_pushed_to(page, owner)
        {
            // It left before the page was pushed, which the owner takes once it has this answer.
            let accepted = false;
            return cx.send(
                owner,
                PageMessage::WriteBackAck { page, accepted },
                Body::None,
            );
        }
        let is_rebuilt = self.rebuilds.contains_key(&page.extent());
        let Some(directory) = &self.extent_mut(page.extent()).directory else {
            return;
        };
        let busy = is_rebuilt || directory.moving || directory.is_busy(slot(page));
        if let Work::Request(Asked {
            requester,
            prefetch: true,
            ..
        }) = work
            && busy
        {
            return self.decline(cx, page, requester);
        }
        let (queue, limit) = if is_rebuilt {
            let rebuild = self.rebuilds.get_mut(&page.extent());
            (rebuild.map(|r| &mut r.queue), MAX_QUEUED_FOR_MOVE)
        } else if directory.moving {
            let moving = self.moves.get_mut(&page.extent());
            (moving.map(|m| &mut m.queue), MAX_QUEUED_FOR_MOVE)
        } else if directory.is_busy(slot(page)) {
            let transaction = self.transactions.get_mut(&page);
            (transaction.map(|t| &mut t.queue), MAX_QUEUED)
        } else {
            return self.work(cx, work);
        };
        match queue {
            Some(queue) if queue.len() < limit => queue.push_back(work),
            _ => self.protocol_error(),
        }
    }

    /// Has the coordinator say where the work is to be done.
    fn route(&mut self, cx: &mut Context<'_, D>, work: Work<D>) {
        let extent = work.page().extent();
        let waiting = self.unrouted.entry(extent).or_default();
        if waiting.len() < MAX_QUEUED_FOR_MOVE {
            waiting.push(work);
            self.find_home(cx, extent);
        } else {
            self.protocol_error();
        }
    }

    /// The work cannot be done.
    pub(super) fn refuse(&mut self, cx: &mut Context<'_, D>, work: Work<D>) {
        match work {
            Work::Request(Asked {
                page, requester, ..
            }) if requester == self.me => self.page_lost(cx, page),
            Work::Request(Asked {
                page, requester, ..
            }) => cx.send(requester, PageMessage::Lost { page }, Body::None),
            Work::WriteBack {
                page, owner: node, ..
            }
            | Work::Relinquish { page, sharer: node } => {
                let accepted = false;
                let message = PageMessage::WriteBackAck { page, accepted };
                cx.send(node, message, Body::None);
            }
        }
    }

    fn is_pushed_to(&self, page: Page, node: NodeId) -> bool {
        let transaction = self.transactions.get(&page);
        transaction.is_some_and(|t| t.pushed && t.requester == node)
    }

    pub(super) fn relay(&mut self, cx: &mut Context<'_, D>, home: NodeId, work: Work<D>) {
        self.counters.relays += 1;
        match work {
            Work::Request(asked) => {
                cx.send(home, self.current(asked).message(), Body::None);
            }
            Work::WriteBack { page, owner, data } => {
                cx.send(
                    home,
                    PageMessage::WriteBack { page, owner },
                    Body::Data(data),
                );
            }
            Work::Relinquish { page, sharer } => {
                cx.send(home, PageMessage::Relinquish { page, sharer }, Body::None);
            }
        }
    }

    /// A request as it would be made now: this node's own copy may have changed since it asked.
    fn current(&self, asked: Asked) -> Asked {
        if asked.requester == self.me {
            let has_copy = self.access(asked.page).is_some();
            Asked { has_copy, ..asked }
        } else {
            asked
        }
    }

    /// Leaves a prefetch be.
    fn decline(&mut self, cx: &mut Context<'_, D>, page: Page, requester: NodeId) {
        if requester == self.me {
            self.declined(cx, page);
        } else {
            cx.send(
                requester,
                PageMessage::Decline { page, requester },
                Body::None,
            );
        }
    }

    /// The owner of a page at home here, or the home of one that this node asked for, declines.
    pub(super) fn decline_received(
        &mut self,
        cx: &mut Context<'_, D>,
        page: Page,
        from: NodeId,
        requester: NodeId,
    ) {
        let Some(transaction) = self.transactions.get(&page) else {
            return match requester == self.me {
                true => self.declined(cx, page),
                false => self.protocol_error(),
            };
        };
        match transaction.before {
            Some(Before { owner, sharers })
                if owner == from && transaction.requester == requester =>
            {
                self.directory_mut(page).place(slot(page), owner, &sharers);
                self.decline(cx, page, requester);
                self.finish(cx, page);
            }
            _ => self.protocol_error(),
        }
    }

    fn work(&mut self, cx: &mut Context<'_, D>, work: Work<D>) {
        match work {
            Work::Request(asked) => {
                let asked = self.current(asked);
                self.serve(cx, asked);
            }
            Work::WriteBack { page, owner, data } => self.take_back(cx, page, owner, data),
            Work::Relinquish { page, sharer } => {
                let accepted = self.unlist(cx, page, sharer);
                let message = PageMessage::WriteBackAck { page, accepted };
                cx.send(sharer, message, Body::None);
            }
        }
    }

    fn serve(&mut self, cx: &mut Context<'_, D>, asked: Asked) {
        let Asked {
            page,
            access,
            requester,
            has_copy,
            prefetch,
        } = asked;
        self.counters.requests += 1;
        let home = self.me;
        let directory = self.directory_mut(page);
        let slot = slot(page);
        if directory.is_lost(slot) {
            return self.refuse(cx, Work::Request(asked));
        }
        let Some(owner) = directory.owner(slot) else {
            let _ = directory.give(slot, requester);
            return self.grant(cx, page, requester, Access::Write, 0, Fill::Zeros);
        };
        // An owner keeps its copy until the home has taken it back: one that says that it has none has
        // had the page pushed since it asked.
        let holds = owner == requester || has_copy && directory.is_holder(slot, requester);
        if prefetch && self.would_disturb(cx, asked, owner, holds) {
            return self.decline(cx, page, requester);
        }
        let directory = self.directory_mut(page);
        let before = prefetch.then(|| Before {
            owner,
            sharers: match directory.is_exclusive(slot) {
                true => NodeSet::default(),
                false => directory.holders(slot),
            },
        });
        let give = |acks| Give {
            home,
            access,
            requester,
            acks,
            pushed: false,
            prefetch,
        };
        match access {
            Access::Read if holds => {
                let access = if directory.is_exclusive(slot) {
                    Access::Write
                } else {
                    Access::Read
                };
                self.grant(cx, page, requester, access, 0, Fill::InPlace);
            }
            Access::Read => {
                directory.share(slot, requester);
                self.forward(cx, page, owner, give(0));
            }
            Access::Write => {
                let holders = directory.give(slot, requester);
                let victims = holders.filter(|&n| n != requester && (holds || n != owner));
                let acks = self.invalidate(cx, page, victims, requester);
                if holds {
                    self.grant(cx, page, requester, access, acks, Fill::InPlace);
                } else {
                    self.forward(cx, page, owner, give(acks));
                }
            }
        }
        if prefetch && let Some(transaction) = self.transactions.get_mut(&page) {
            transaction.before = before;
        }
    }

    /// Whether a prefetch would have to wait for a hold to end, or take a copy from a third node.
    fn would_disturb(
        &mut self,
        cx: &Context<'_, D>,
        asked: Asked,
        owner: NodeId,
        holds: bool,
    ) -> bool {
        let me = self.me;
        let Asked {
            page,
            access,
            requester,
            ..
        } = asked;
        let directory = self.directory_mut(page);
        let (takes_mine, takes_others) = match access {
            Access::Read => (!holds && owner == me, false),
            Access::Write => {
                let holders = directory.holders(slot(page)).without(requester);
                let is_taken = |node: NodeId| node != me && (holds || node != owner);
                let mut nodes = holders.into_iter();
                (directory.is_holder(slot(page), me), nodes.any(is_taken))
            }
        };
        takes_others || takes_mine && self.is_held(cx, page)
    }

    /// Has copies dropped; how many acknowledgements the requester has to wait for.
    fn invalidate(
        &mut self,
        cx: &mut Context<'_, D>,
        page: Page,
        victims: impl Iterator<Item = NodeId>,
        requester: NodeId,
    ) -> u16 {
        let mut acks = 0;
        victims.for_each(|victim| {
            if victim != self.me {
                acks += 1;
                cx.send(
                    victim,
                    PageMessage::Invalidate { page, requester },
                    Body::None,
                );
            } else if self.defer(cx, page, Take::Drop { requester }) {
                acks += 1;
            } else {
                self.lose(cx, page);
            }
        });
        acks
    }

    /// Lets the requester go on with what it has, or with zeros.
    fn grant(
        &mut self,
        cx: &mut Context<'_, D>,
        page: Page,
        requester: NodeId,
        access: Access,
        acks: u16,
        contents: Fill<D>,
    ) {
        let (home, confirm) = (self.me, acks > 0);
        if confirm {
            self.begin(page, requester, false);
        }
        if requester == self.me {
            return self.granted(
                cx,
                page,
                Grant {
                    access,
                    acks,
                    contents,
                    home,
                    confirm,
                },
            );
        }
        let contents = match contents {
            Fill::InPlace => Contents::Yours,
            Fill::Zeros | Fill::Data(_) => Contents::Zeros,
        };
        let message = PageMessage::Grant {
            page,
            access,
            acks,
            contents,
            home,
            confirm,
            pushed: false,
        };
        cx.send(requester, message, Body::None);
    }

    /// Has the owner give the page to a node that does not wait for it, if that can be done at once.
    pub(super) fn pass_on(
        &mut self,
        cx: &mut Context<'_, D>,
        page: Page,
        access: Access,
        from: NodeId,
        to: NodeId,
    ) {
        let state = self.extent(page.extent());
        let Some(directory) = state.and_then(|state| state.directory.as_ref()) else {
            return;
        };
        let slot = slot(page);
        let is_rebuilt = self.rebuilds.contains_key(&page.extent());
        let free = !is_rebuilt && !directory.moving && !directory.is_busy(slot);
        let owned = directory.owner(slot) == Some(from) && !directory.is_holder(slot, to);
        if !free || !owned || to != self.me && !self.view.is_member(to) {
            return;
        }
        let directory = self.directory_mut(page);
        match access {
            Access::Read => directory.share(slot, to),
            Access::Write if directory.is_exclusive(slot) => drop(directory.give(slot, to)),
            Access::Write => return,
        }
        let give = Give {
            home: self.me,
            access,
            requester: to,
            acks: 0,
            pushed: true,
            prefetch: false,
        };
        self.forward(cx, page, from, give);
    }

    /// Has the owner give the page to the requester.
    fn forward(&mut self, cx: &mut Context<'_, D>, page: Page, owner: NodeId, give: Give) {
        let Give {
            access,
            requester,
            acks,
            pushed,
            prefetch,
            ..
        } = give;
        if owner != self.me {
            self.begin(page, requester, pushed);
            let message = PageMessage::Forward {
                page,
                access,
                requester,
                acks,
                pushed,
                prefetch,
            };
            return cx.send(owner, message, Body::None);
        }
        if !self.line(page).state.owns() {
            return self.protocol_error();
        }
        let deferred = self.defer(cx, page, Take::Give(give));
        if deferred || acks > 0 || pushed {
            self.begin(page, requester, pushed);
        }
        if !deferred {
            self.give(cx, page, give);
        }
    }

    /// Makes the home the owner of a page whose owner needs the room, if it still is the owner.
    fn take_back(&mut self, cx: &mut Context<'_, D>, page: Page, owner: NodeId, data: D) {
        let me = self.me;
        let directory = self.directory_mut(page);
        let accepted = directory.owner(slot(page)) == Some(owner);
        if accepted {
            // The former owner reads its copy until the answer reaches it: a sharer like any.
            let sharers = directory.holders(slot(page)).with(me);
            directory.place(slot(page), me, &sharers);
            let line = self.line_mut(page);
            if line.state != State::Shared {
                let (access, contents) = (Access::Read, Fill::Data(data));
                cx.out.push(Action::Install {
                    page,
                    access,
                    contents,
                });
            }
            line.state = match line.state {
                State::Evicted => State::Evicting,
                _ => State::Owned,
            };
        }
        cx.send(
            owner,
            PageMessage::WriteBackAck { page, accepted },
            Body::None,
        );
    }

    /// Takes a sharer that has no copy any more out of the directory, unless the page is busy; whether it
    /// was there. Where this node is the owner, and nobody else has a copy now, it may write again.
    pub(super) fn unlist(&mut self, cx: &mut Context<'_, D>, page: Page, sharer: NodeId) -> bool {
        let me = self.me;
        let directory = self.directory_mut(page);
        let slot = slot(page);
        let Some(owner) = directory.owner(slot).filter(|&owner| owner != sharer) else {
            return false;
        };
        if directory.moving || directory.is_busy(slot) || !directory.is_holder(slot, sharer) {
            return false;
        }
        let left = directory.holders(slot).without(sharer);
        directory.place(slot, owner, &left);
        if owner == me && left.len() == 1 && self.line(page).state == State::Owned {
            let _ = self.directory_mut(page).give(slot, me);
            self.line_mut(page).state = State::Exclusive;
            cx.out.push(Action::Install {
                page,
                access: Access::Write,
                contents: Fill::InPlace,
            });
        }
        true
    }

    fn begin(&mut self, page: Page, requester: NodeId, pushed: bool) {
        self.transactions.insert(
            page,
            Transaction {
                requester,
                pushed,
                before: None,
                queue: VecDeque::new(),
            },
        );
        self.directory_mut(page).begin(slot(page));
    }

    pub(super) fn done(&mut self, cx: &mut Context<'_, D>, page: Page, requester: NodeId) {
        match self.transactions.get(&page) {
            Some(transaction) if transaction.requester == requester => self.finish(cx, page),
            _ => self.protocol_error(),
        }
    }

    /// Ends a page's transaction and does what has waited for that.
    pub(super) fn finish(&mut self, cx: &mut Context<'_, D>, page: Page) {
        let extent = page.extent();
        let Some(Transaction { mut queue, .. }) = self.transactions.remove(&page) else {
            return;
        };
        self.directory_mut(page).end(slot(page));
        if let Some(moving) = self.moves.get_mut(&extent) {
            moving.queue.append(&mut queue);
            return self.fence(cx, extent);
        }
        while let Some(work) = queue.pop_front() {
            self.work(cx, work);
            if let Some(transaction) = self.transactions.get_mut(&page) {
                transaction.queue = queue;
                return;
            }
        }
    }

    /// Makes this node the home of an extent that has none yet: what it has is its own.
    pub(super) fn open_directory(&mut self, cx: &mut Context<'_, D>, extent: Extent) {
        let me = self.me;
        let state = self.extent_mut(extent);
        if state.directory.is_some() {
            return;
        }
        let mut directory = Directory::untouched(state.lines.len());
        let present = cx.memory.present(extent);
        for (slot, line) in state.lines.iter_mut().enumerate() {
            if present.contains(slot as u32) {
                line.state = State::Exclusive;
                let _ = directory.give(slot, me);
            }
        }
        state.directory = Some(directory);
    }

    /// # Panics
    ///
    /// If this node is not the page's home: callers have made sure.
    fn directory_mut(&mut self, page: Page) -> &mut Directory {
        let directory = self.extent_mut(page.extent()).directory.as_mut();
        directory.expect("this node is the home")
    }
}
