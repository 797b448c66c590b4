//! Segments and pages: from reports and messages to the coherence engine, and from its actions to
//! memory and peers.

use bytes::Bytes;
use migshm_coherence::release::Input as ReleaseInput;
use migshm_coherence::{Action, Body, Fill, Input, Lock, Push, Time, Touch, first_run, gather};
use migshm_protocol::call::Consistency;
use migshm_protocol::control::{Placement, ToCoordinator};
use migshm_protocol::ids::{EXTENT_PAGES, PAGE_SIZE};
use migshm_protocol::page::{
    Access, Contents, MAX_RUN, PageMessage, PageRun, PeerMessage, Subject,
};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

use crate::daemon::{Attaching, Node};
use crate::members;
use crate::memory::{Range, Report, SpaceId, View, Waiter};

/// Of a node's memory, the part that pages with homes elsewhere may take (the coordinator gives
/// away the rest): one quarter.
const CACHE_SHARE: u64 = 4;
/// Pages that a node may cache whatever its budget, so that an instruction that touches several
/// pages at once can complete.
const CACHE_FLOOR: usize = 64;
/// Pages given up at once for lack of memory.
const EVICTION_BATCH: usize = MAX_RUN as usize;
/// Of the pages that a node may cache, the part that is prefetched for one stream at most.
const PREFETCH_SHARE: usize = 4;

impl Node {
    pub(crate) fn drive(&mut self, input: Input<Bytes>) {
        self.drive_all(std::iter::once(input));
    }

    /// Handles events about different pages.
    fn drive_all(&mut self, inputs: impl Iterator<Item = Input<Bytes>>) {
        let mut actions = std::mem::take(&mut self.actions);
        let now = now();
        for input in inputs {
            self.engine.handle(now, input, &self.memory, &mut actions);
        }
        gather(&mut actions);
        let mut rest = &actions[..];
        while !rest.is_empty() {
            let longest = &rest[..rest.len().min(usize::from(MAX_RUN))];
            let (run, others) = rest.split_at(first_run(longest));
            self.execute(run);
            rest = others;
        }
        actions.clear();
        self.actions = actions;
    }

    /// Executes a run of actions.
    fn execute(&mut self, run: &[Action<Bytes>]) {
        let range_from = |page: Page| Range::of(page, run.len() as u32);
        match &run[0] {
            Action::Send { to, message, body } => {
                let message = message.clone();
                let pages = run.len() as u16;
                self.send(*to, &PageRun { pages, message }, body);
            }
            Action::Install {
                page,
                access,
                contents,
            } => {
                let range = range_from(*page);
                if *access == Access::Write {
                    let now = now();
                    for page in range.iter() {
                        self.turns.note_write_grant(&self.memory, page, now);
                    }
                }
                match contents {
                    Fill::Data(_) => {
                        self.counters.pages_received += run.len() as u64;
                        let bytes = |place: u32| data(&run[place as usize]);
                        self.memory.install(range, *access, bytes);
                    }
                    Fill::Zeros => self.memory.install(range, *access, |_| None),
                    Fill::InPlace => return self.memory.change(range, *access),
                }
                for page in range.iter().filter(|p| !self.engine.is_home(p.extent())) {
                    self.cached.push(page);
                }
            }
            Action::Protect { page } => self.memory.protect(range_from(*page)),
            Action::Drop { page } => {
                let range = range_from(*page);
                range.iter().for_each(|page| self.cached.remove(page));
                self.memory.drop_pages(range);
            }
            Action::FindHome { extent } => {
                let extent = *extent;
                self.tell(ToCoordinator::FindHome { extent }, &[]);
            }
            Action::BecameHome { extent } => {
                let extent = *extent;
                self.tell(ToCoordinator::HomeMoved { extent }, &[]);
            }
            Action::Fail { page } => {
                tracing::warn!(%page, "a page is lost, or no node has memory for it: SIGBUS");
                self.memory.poison(*page);
            }
            Action::Flush { to, view } => {
                let message = PeerMessage::Flush { view: *view };
                self.send_peer(*to, message, Bytes::new());
            }
            Action::Flushed { view } => {
                let view = *view;
                self.tell(ToCoordinator::Flushed { view }, &[]);
            }
            Action::Lost { extent, pages } => members::log_loss(*extent, pages),
        }
    }

    fn send(&mut self, to: NodeId, run: &PageRun, body: &Body<Bytes>) {
        self.note_taken(to, run);
        if let PageMessage::HomeTransfer { extent, .. } = &run.message {
            self.cache_extent(*extent);
        }
        self.log_sent(to, run);
        let Some(peer) = self.peers.get_mut(&to) else {
            return;
        };
        let range = |page: Page| Range::of(page, run.pages.into());
        let Some(link) = &peer.link else {
            let mut bytes = Vec::new();
            match body {
                Body::None => {}
                Body::Data(data) => bytes.extend_from_slice(data),
                Body::Page(page) => self.memory.append(range(*page), &mut bytes),
            }
            let message = PeerMessage::Sequential(run.clone());
            return peer.backlog.push((message, bytes.into()));
        };
        if let PageMessage::Grant { .. } = run.message {
            self.spin.expect_request(now());
        }
        let message = PeerMessage::Sequential(run);
        match body {
            Body::None => link.send(&message, &[]),
            Body::Data(bytes) => link.send(&message, bytes),
            Body::Page(page) => {
                let range = range(*page);
                self.counters.pages_sent += u64::from(range.pages);
                link.send_with(&message, range.length(), |frame| {
                    self.memory.append(range, frame)
                });
            }
        }
    }

    /// Notices what other nodes take of this one's pages.
    fn note_taken(&mut self, to: NodeId, run: &PageRun) {
        if let PageMessage::Grant {
            page,
            access,
            contents: Contents::Bytes | Contents::Yours,
            pushed: false,
            ..
        } = run.message
        {
            let now = now();
            for page in Range::of(page, run.pages.into()).iter() {
                self.carry.taken(page, access, to, now);
            }
        }
    }

    /// A process releases a lock: what others have always taken then goes to them at once.
    pub(crate) fn push_pages(&mut self, lock: Lock) {
        let can_push = |page, access| self.engine.can_push(page, access);
        let pushes = self.carry.released(lock, now(), can_push);
        // What is on its way to a node that is gone is nowhere.
        let is_there = |push: &Push| {
            let peer = self.peers.get(&push.to);
            peer.is_some_and(|peer| peer.link.is_some())
        };
        let pushes: Vec<Push> = pushes.into_iter().filter(is_there).collect();
        let push = |Push { page, access, to }| Input::Push { page, access, to };
        self.drive_all(pushes.into_iter().map(push));
    }

    /// The time that the engine wanted to be told of has come.
    pub(crate) fn on_timeout(&mut self) {
        self.timer_set = None;
        self.drive(Input::Timeout);
        self.retry_touches();
        self.settle();
    }

    /// What comes next, after a message while so many threads waited.
    pub(crate) fn expect(&mut self, waiting: usize) {
        let now = now();
        match self.memory.waiting() {
            left if left >= waiting => {}
            0 => self.spin.note_answer(now),
            _ => {
                self.spin.note_answer(now);
                self.spin.expect_answer(now);
            }
        }
    }

    /// Learns from a message of another node, before it has its effect.
    pub(crate) fn note_arrival(&mut self, run: &PageRun) {
        match run.message {
            PageMessage::Invalidate { requester, .. } => {
                let now = now();
                for message in run.messages().into_iter().flatten() {
                    if let Subject::Page(page) = message.subject() {
                        self.carry.taken(page, Access::Write, requester, now);
                    }
                }
            }
            PageMessage::Request {
                requester, access, ..
            } => {
                // To read through an extent once is one use of it, to write its pages is many.
                let uses = match access {
                    Access::Read => 1,
                    Access::Write => run.pages,
                };
                let messages = run.messages().into_iter().flatten();
                for message in messages.take(uses.into()) {
                    if let Subject::Page(page) = message.subject() {
                        self.count_request(page, requester, access);
                    }
                }
                self.spin.note_request(now());
            }
            _ => {}
        }
    }

    pub(crate) fn deliver(&mut self, from: NodeId, message: PeerMessage, raw: Bytes) {
        match message {
            PeerMessage::Sequential(run) => self.deliver_run(from, &run, &raw),
            PeerMessage::Release(message) => self.deliver_release(from, message, &raw),
            PeerMessage::Flush { .. } => {}
        }
    }

    fn deliver_run(&mut self, from: NodeId, run: &PageRun, raw: &Bytes) {
        if !raw.is_empty() && raw.len() != usize::from(run.pages) * PAGE_SIZE {
            tracing::warn!(%from, "page contents of a wrong length");
            return;
        }
        let Some(messages) = run.messages() else {
            tracing::warn!(%from, "a run of pages that cannot be");
            return;
        };
        self.log_grant(from, run);
        let contents = |place: usize| {
            let start = place * PAGE_SIZE;
            (!raw.is_empty()).then(|| raw.slice(start..start + PAGE_SIZE))
        };
        self.drive_all((0..).zip(messages).map(|(place, message)| Input::Message {
            from,
            message,
            data: contents(place),
        }));
        if let PageMessage::Grant { page, .. }
        | PageMessage::Decline { page, .. }
        | PageMessage::Lost { page } = run.message
        {
            let last = Page {
                index: page.index + u32::from(run.pages) - 1,
                ..page
            };
            match run.message {
                PageMessage::Grant { .. } => self.prefetcher.came(last),
                _ => self.prefetcher.declined(last),
            }
            self.prefetch();
        }
    }

    /// Asks for what programs are about to need.
    pub(crate) fn prefetch(&mut self) {
        // Others' memory is not worth more than what is used: some streams share it.
        let room = u32::try_from(self.cache_limit() / PREFETCH_SHARE).unwrap_or(u32::MAX);
        while let Some(ask) = {
            let pages = |segment| self.memory.pages(segment).unwrap_or(0);
            self.prefetcher.next(room, pages)
        } {
            let access = ask.access;
            if self.with_release.contains_key(&ask.segment) {
                let pages = ask.pages().collect();
                self.drive_release(ReleaseInput::Prefetch { pages, access });
            } else {
                let inputs = ask.pages().map(|page| Input::Prefetch { page, access });
                self.drive_all(inputs);
            }
            // What is not under way has come, or will not.
            let is_under_way = ask.pages().any(|page| self.is_pending(page));
            if let Some(page) = ask.last().filter(|_| !is_under_way) {
                match self.access(page) {
                    Some(granted) if granted >= access => self.prefetcher.came(page),
                    _ => self.prefetcher.declined(page),
                }
            }
        }
    }

    /// What the coordinator knows of a segment that a peer spoke of.
    pub(crate) fn on_segment(
        &mut self,
        segment: SegmentId,
        size: Option<u64>,
        consistency: Consistency,
        default_home: Option<NodeId>,
    ) {
        let held = self.unknown.remove(&segment).unwrap_or_default();
        let placement = Placement::Shared { default_home };
        let made = size.map(|size| self.prepare(segment, size, consistency, placement));
        match made {
            Some(Ok(())) => {
                let is_of_it = |extent: &mut Extent| extent.segment == segment;
                let orphans: Vec<Extent> = self.orphans.extract_if(.., is_of_it).collect();
                for extent in orphans {
                    self.on_home(extent, Some(self.id), true);
                }
                let is_of_it = |of: &mut (Extent, Option<NodeId>, bool)| of.0.segment == segment;
                let guarded: Vec<_> = self.guarded.extract_if(.., is_of_it).collect();
                for (extent, backup, blank) in guarded {
                    self.on_backup(extent, backup, blank);
                }
                for (from, message, raw) in held {
                    self.deliver(from, message, raw);
                }
            }
            Some(Err(error)) => {
                tracing::error!(segment = segment.0, %error, "cannot make the segment's memory");
            }
            None => {}
        }
        self.catch_up();
    }

    /// Something happened in an address space.
    pub(crate) fn on_report(&mut self, space: SpaceId, report: Report) {
        match report {
            Report::Forked(child) => self.on_fork(space, child),
            Report::Ended(segments) => self.on_attaches_ended(space, &segments),
            Report::Fault {
                address, thread, ..
            } if self.memory.spaces.is_anchor(space, address) => {
                self.on_introduction(space, address, thread);
            }
            Report::Fault { address, write, .. } => self.on_fault(space, address, write),
        }
    }

    fn on_fault(&mut self, space: SpaceId, address: u64, write: bool) {
        let Some((page, view)) = self.memory.spaces.mappings.locate(space, address) else {
            // Unmapped meanwhile, or nothing that the process ever told of.
            tracing::debug!(space = space.0, address, "fault outside of attaches");
            return self.memory.spaces.poison_at(space, address);
        };
        self.counters.faults += 1;
        let waiter = Waiter {
            space,
            address,
            view,
        };
        if self.memory.stops(page, waiter) {
            return;
        }
        if let View::Replica(user) = view {
            return self.on_reader(page, user, space, address);
        }
        let wanted = if write { Access::Write } else { Access::Read };
        match self.access(page) {
            // Readers may be at the page, and what has been granted is not needed.
            Some(_) if !write && self.memory.is_protected(page) => {
                self.memory.retry(page, space, address, Access::Read);
            }
            Some(access) if access >= wanted => {
                let shared = access == Access::Write && self.memory.is_replicated(page);
                if !shared || !self.must_wait_for_readers(page, space, address) {
                    self.memory.retry(page, space, address, access);
                }
            }
            _ => self.request(page, waiter, wanted),
        }
    }

    /// Has a thread wait for more access to a page than the node has.
    pub(crate) fn request(&mut self, page: Page, waiter: Waiter, access: Access) {
        self.memory.wait(page, waiter);
        self.log_fault(waiter.space, page, access);
        // A write to what is here to be read needs nobody else.
        if self.access(page).is_none() || !self.with_release.contains_key(&page.segment) {
            self.prefetcher.touch(Touch {
                space: waiter.space.0,
                page,
                access,
                pending: self.is_pending(page),
            });
        }
        if !self.is_for_release(page, ReleaseInput::Fault { page, access }) {
            self.count_request(page, self.id, access);
            self.drive(Input::Fault { page, access });
        }
        if self.is_pending(page) {
            self.spin.expect_answer(now());
        }
        self.prefetch();
    }

    /// How many pages with homes elsewhere may be here.
    fn cache_limit(&self) -> usize {
        let limit = usize::try_from(self.budget / CACHE_SHARE / PAGE_SIZE as u64);
        limit.unwrap_or(usize::MAX).max(CACHE_FLOOR)
    }

    /// Gives up cached pages if there are too many; whether it did anything.
    pub(crate) fn make_room(&mut self) -> bool {
        let limit = self.cache_limit();
        let mut progress = false;
        let mut leaving = Vec::new();
        for _ in 0..EVICTION_BATCH {
            if let Some(page) = self.release.lowest_twin()
                && self.release.twins() > limit
            {
                self.drive_release(ReleaseInput::Evict { page });
                progress = true;
            }
            if self.cached.len() + self.memory.replicated() <= limit {
                break;
            }
            // A replica costs nothing but a fault to have again.
            if self.memory.replicated() > CACHE_FLOOR {
                progress |= self.memory.empty_oldest_replicas();
                continue;
            }
            let Some(page) = self.cached.pop() else { break };
            if self.must_keep(page) {
                progress = true;
            } else if self.is_for_release(page, ReleaseInput::Evict { page }) {
                progress |= self.has_left(page);
            } else {
                leaving.push(page);
            }
        }
        self.drive_all(leaving.iter().map(|&page| Input::Evict { page }));
        for page in leaving {
            progress |= self.has_left(page);
        }
        progress
    }

    /// Whether a page that was to be evicted has gone at once. If it was refused, or is on its way home, it will
    /// have another turn.
    fn has_left(&mut self, page: Page) -> bool {
        let is_here = self.access(page).is_some();
        if is_here {
            self.cached.push(page);
        }
        !is_here
    }

    /// Starts to track a segment that another node, or a process that may only read, is about to
    /// use, once no process is between having leave to attach it untracked and having said where.
    pub(crate) fn try_arm(&mut self, segment: SegmentId) {
        let asked = self.arming.contains(&segment);
        let attaching = |a: &Attaching| a.segment == segment && !a.tracked;
        if !asked && !self.held.contains_key(&segment) || self.mapping.values().any(attaching) {
            return;
        }
        self.arming.remove(&segment);
        let known = self.memory.has_segment(segment) && !self.memory.is_tracked(segment);
        let shared = if known {
            self.share(segment, Some(self.id))
        } else {
            Ok(())
        };
        self.release_held(segment);
        match shared {
            Ok(()) if asked => self.tell(ToCoordinator::Sharing { segment }, &[]),
            Ok(()) => {}
            // Better that others wait than that they see stale pages.
            Err(error) => {
                tracing::error!(segment = segment.0, %error, "cannot share segment with other nodes");
            }
        }
    }

    /// Tracks a segment.
    fn share(&mut self, segment: SegmentId, default_home: Option<NodeId>) -> std::io::Result<()> {
        self.memory.track(segment)?;
        self.add_to_engine(segment, default_home);
        Ok(())
    }

    /// Makes the memory of a segment, if it is not here. Where it is, its own state counts: it may
    /// be about to be tracked, and is then once attaches under way are mapped.
    pub(crate) fn prepare(
        &mut self,
        segment: SegmentId,
        size: u64,
        consistency: Consistency,
        placement: Placement,
    ) -> std::io::Result<()> {
        if self.memory.has_segment(segment) {
            return Ok(());
        }
        self.memory.add_segment(segment, size)?;
        if consistency.is_release() {
            self.with_release.insert(segment, consistency);
        }
        match placement {
            Placement::Solo => Ok(()),
            Placement::Shared { default_home } => {
                self.share(segment, default_home).inspect_err(|_| {
                    self.memory.remove_segment(segment);
                    self.with_release.remove(&segment);
                })
            }
        }
    }

    /// Where an extent's home is; `orphaned`: here, instead of at a node that has died.
    pub(crate) fn on_home(&mut self, extent: Extent, home: Option<NodeId>, orphaned: bool) {
        if self.with_release.contains_key(&extent.segment) {
            return self.drive_release(ReleaseInput::HomeIs { extent, home });
        }
        if orphaned && !self.memory.is_tracked(extent.segment) {
            let segment = extent.segment;
            self.orphans.push(extent);
            return self.tell(ToCoordinator::FindSegment { segment }, &[]);
        }
        self.drive(Input::HomeIs {
            extent,
            home,
            orphaned,
        });
    }

    pub(crate) fn on_destroyed(&mut self, segment: SegmentId) {
        self.engine.remove_segment(segment);
        self.remove_from_release(segment);
        self.memory.remove_segment(segment);
        self.arming.remove(&segment);
        self.orphans.retain(|extent| extent.segment != segment);
        self.guarded
            .retain(|(extent, ..)| extent.segment != segment);
        self.turns.remove_segment(segment);
        self.policy.retain(|extent| extent.segment != segment);
        self.carry.retain(|page| page.segment != segment);
        self.prefetcher.remove_segment(segment);
        self.cached.remove_segment(segment);
        self.log.remove_segment(segment);
    }

    /// A node asks for a page of an extent; if this is its home, perhaps it should be there.
    fn count_request(&mut self, page: Page, requester: NodeId, access: Access) {
        let extent = page.extent();
        if !self.engine.is_home(extent) {
            return;
        }
        self.log.requested(now(), page, requester, access);
        if let Some(to) = self.policy.record(extent, requester)
            && to != self.id
        {
            self.tell(ToCoordinator::ProposeHome { extent, to }, &[]);
        }
    }

    /// Gives an extent's home to another node.
    pub(crate) fn move_home(&mut self, extent: Extent, to: NodeId) {
        self.policy.forget(extent);
        self.drive(Input::MoveHome { extent, to });
    }

    /// An extent has its home elsewhere now: what this node has of it is a cache.
    fn cache_extent(&mut self, extent: Extent) {
        for index in extent.first_page()..extent.first_page() + EXTENT_PAGES {
            let page = Page {
                segment: extent.segment,
                index,
            };
            if self.engine.access(page).is_some() {
                self.cached.push(page);
            }
        }
    }
}

/// What an action installs.
fn data(action: &Action<Bytes>) -> Option<&[u8]> {
    match action {
        Action::Install {
            contents: Fill::Data(bytes),
            ..
        } => Some(bytes),
        _ => None,
    }
}

/// Nanoseconds on the monotonic clock.
pub(crate) fn now() -> Time {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a live timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}
