//! Segments and pages: from reports and messages to the coherence engine, and from its actions to
//! memory and peers.

use std::convert::Infallible;

use bytes::Bytes;
use migshm_coherence::release::Input as ReleaseInput;
use migshm_coherence::{Action, Body, Fill, Input, Lock, Push, Time};
use migshm_protocol::call::Consistency;
use migshm_protocol::control::{Member, Placement, ToCoordinator};
use migshm_protocol::ids::{EXTENT_PAGES, PAGE_SIZE};
use migshm_protocol::page::{Access, Contents, PageMessage, PeerMessage};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};
use migshm_transport::FrameSender;

use crate::daemon::{Attaching, Node};
use crate::memory::{Report, SpaceId, View, Waiter};
use crate::tasks;

/// Of a node's memory, the part that pages with homes elsewhere may take (the coordinator gives
/// away the rest): one quarter.
const CACHE_SHARE: u64 = 4;
/// Pages that a node may cache whatever its budget, so that an instruction that touches several
/// pages at once can complete.
const CACHE_FLOOR: usize = 64;
/// Pages given up at once for lack of memory.
const EVICTION_BATCH: usize = 16;

impl Node {
    fn drive(&mut self, input: Input<Bytes>) {
        let mut actions = Vec::new();
        self.engine.handle(now(), input, &self.memory, &mut actions);
        for action in actions {
            self.execute(action);
        }
    }

    fn execute(&mut self, action: Action<Bytes>) {
        match action {
            Action::Send { to, message, body } => self.send(to, &message, body),
            Action::Install {
                page,
                access,
                contents,
            } => {
                if access == Access::Write {
                    self.turns.note_write_grant(&self.memory, page, now());
                }
                match contents {
                    Fill::Data(bytes) => {
                        self.counters.pages_received += 1;
                        self.memory.install(page, access, Some(&bytes));
                    }
                    Fill::Zeros => self.memory.install(page, access, None),
                    Fill::InPlace => return self.memory.change(page, access),
                }
                if !self.engine.is_home(page.extent()) {
                    self.cached.push(page);
                }
            }
            Action::Protect { page } => self.memory.protect(page),
            Action::Drop { page } => {
                self.cached.remove(page);
                self.memory.drop_page(page);
            }
            Action::FindHome { extent } => self.tell(ToCoordinator::FindHome { extent }, &[]),
            Action::BecameHome { extent } => self.tell(ToCoordinator::HomeMoved { extent }, &[]),
            Action::Fail { page } => {
                tracing::error!(%page, "no node has memory left for this page: SIGBUS");
                self.memory.poison(page);
            }
        }
    }

    fn send(&mut self, to: NodeId, message: &PageMessage, body: Body<Bytes>) {
        self.note_taken(to, message);
        if let PageMessage::HomeTransfer { extent, .. } = message {
            self.cache_extent(*extent);
        }
        let link = self.peers.entry(to).or_default().link.clone();
        let Some(link) = link else {
            let bytes = match body {
                Body::None => Bytes::new(),
                Body::Data(bytes) => bytes,
                Body::Page(page) => {
                    let mut bytes = vec![0; PAGE_SIZE];
                    self.memory.read(page, &mut bytes);
                    bytes.into()
                }
            };
            return self.send_peer(to, PeerMessage::Sequential(message.clone()), bytes);
        };
        if let Body::Page(_) = body {
            self.log_sent(to, message, PAGE_SIZE);
        }
        let message = PeerMessage::Sequential(message);
        match body {
            Body::None => link.send(&message, &[]),
            Body::Data(bytes) => link.send(&message, &bytes),
            Body::Page(page) => {
                self.counters.pages_sent += 1;
                let Ok(()) = link.send_with(&message, PAGE_SIZE, |buffer| {
                    self.memory.read(page, buffer);
                    Ok::<(), Infallible>(())
                });
            }
        }
    }

    /// Notices what other nodes take of this one's pages.
    fn note_taken(&mut self, to: NodeId, message: &PageMessage) {
        if let PageMessage::Grant {
            page,
            access,
            contents: Contents::Bytes | Contents::Yours,
            pushed: false,
            ..
        } = *message
        {
            self.carry.taken(page, access, to, now());
        }
    }

    /// A process releases a lock: what others have always taken then goes to them at once.
    pub(crate) fn push_pages(&mut self, lock: Lock) {
        for Push { page, access, to } in self.carry.released(lock, now()) {
            self.drive(Input::Push { page, access, to });
        }
    }

    /// Sends a message to another node, or has it wait for a link.
    pub(crate) fn send_peer(&mut self, to: NodeId, message: PeerMessage, raw: Bytes) {
        let peer = self.peers.entry(to).or_default();
        match &peer.link {
            Some(link) => link.send(&message, &raw),
            None => peer.backlog.push((message, raw)),
        }
    }

    /// The time that the engine wanted to be told of has come.
    pub(crate) fn on_timeout(&mut self) {
        self.timer_set = None;
        self.drive(Input::Timeout);
        self.retry_touches();
        self.settle();
    }

    /// A message of another node.
    pub(crate) fn on_peer(&mut self, from: NodeId, message: PeerMessage, raw: Bytes) {
        if let PeerMessage::Sequential(PageMessage::Invalidate { page, requester }) = message {
            self.carry.taken(page, Access::Write, requester, now());
        }
        let segment = message.segment();
        if let PeerMessage::Sequential(PageMessage::Request {
            page,
            requester,
            access,
            ..
        }) = message
        {
            self.count_request(page, requester, access);
        }
        if self.memory.is_tracked(segment) {
            self.on_peer_message(from, message, raw);
        } else {
            // This node may have been made a home of a segment that nobody here has attached.
            let held = self.unknown.entry(segment).or_default();
            held.push((from, message, raw));
            if held.len() == 1 {
                self.tell(ToCoordinator::FindSegment { segment }, &[]);
            }
        }
        self.settle();
    }

    fn on_peer_message(&mut self, from: NodeId, message: PeerMessage, raw: Bytes) {
        match message {
            PeerMessage::Sequential(message) => {
                self.log_grant(from, &message, raw.len());
                let data = (!raw.is_empty()).then_some(raw);
                if data.as_ref().is_some_and(|bytes| bytes.len() != PAGE_SIZE) {
                    return tracing::warn!(%from, "page contents of a wrong length");
                }
                self.drive(Input::Message {
                    from,
                    message,
                    data,
                });
            }
            PeerMessage::Release(message) => self.drive_release(ReleaseInput::Message {
                from,
                message,
                data: raw.to_vec(),
            }),
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
        let Some(size) = size else { return };
        let placement = Placement::Shared { default_home };
        if let Err(error) = self.prepare(segment, size, consistency, placement) {
            tracing::error!(segment = segment.0, %error, "cannot make the segment's memory");
            return;
        }
        for (from, message, raw) in held {
            self.on_peer_message(from, message, raw);
        }
    }

    /// A link to a member stands: what waited for it goes out.
    ///
    /// Returns the link's number, for [`Node::on_link_lost`].
    pub(crate) fn on_link(&mut self, peer: NodeId, link: FrameSender) -> u64 {
        let number = self.next_id();
        let entry = self.peers.entry(peer).or_default();
        for (message, bytes) in entry.backlog.drain(..) {
            link.send(&message, &bytes);
        }
        entry.link = Some(link);
        entry.number = number;
        number
    }

    /// A node is a member: the one with the lower slot opens the link.
    pub(crate) fn on_joined(&mut self, member: Member) {
        let at = self.members.partition_point(|m| m.node < member.node);
        self.members.insert(at, member.clone());
        self.members_changed.notify_waiters();
        if member.node > self.id {
            tasks::connect_peer(self, member);
        }
    }

    /// A node is a member no longer.
    pub(crate) fn on_left(&mut self, node: NodeId) {
        self.members.retain(|member| member.node != node);
        self.peers.remove(&node);
        self.drive_release(ReleaseInput::Left { node });
        self.members_changed.notify_waiters();
    }

    /// A link to a member is gone, perhaps after the next one stood.
    pub(crate) fn on_link_lost(&mut self, peer: NodeId, number: u64) {
        if let Some(entry) = self.peers.get_mut(&peer).filter(|p| p.number == number) {
            entry.link = None;
        }
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
            _ => {
                let waiter = Waiter {
                    space,
                    address,
                    view,
                };
                self.request(page, waiter, wanted);
            }
        }
    }

    /// Has a thread wait for more access to a page than the node has.
    pub(crate) fn request(&mut self, page: Page, waiter: Waiter, access: Access) {
        self.memory.wait(page, waiter);
        self.log_fault(waiter.space, page, access);
        if self.is_for_release(page, ReleaseInput::Fault { page, access }) {
            return;
        }
        self.count_request(page, self.id, access);
        self.drive(Input::Fault { page, access });
    }

    /// Gives up cached pages if there are too many; whether it did anything.
    pub(crate) fn make_room(&mut self) -> bool {
        let limit = usize::try_from(self.budget / CACHE_SHARE / PAGE_SIZE as u64);
        let limit = limit.unwrap_or(usize::MAX).max(CACHE_FLOOR);
        let mut progress = false;
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
            if !self.is_home(page.extent()) {
                if !self.is_for_release(page, ReleaseInput::Evict { page }) {
                    self.drive(Input::Evict { page });
                }
                if self.access(page).is_some() {
                    // Refused, or on its way home: look again when its turn comes.
                    self.cached.push(page);
                    continue;
                }
            }
            progress = true;
        }
        progress
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
        if consistency == Consistency::Release {
            self.with_release.insert(segment);
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

    pub(crate) fn on_home(&mut self, extent: Extent, home: Option<NodeId>) {
        if self.with_release.contains(&extent.segment) {
            return self.drive_release(ReleaseInput::HomeIs { extent, home });
        }
        self.drive(Input::HomeIs { extent, home });
    }

    pub(crate) fn on_destroyed(&mut self, segment: SegmentId) {
        self.engine.remove_segment(segment);
        self.remove_from_release(segment);
        self.memory.remove_segment(segment);
        self.arming.remove(&segment);
        self.turns.remove_segment(segment);
        self.policy.retain(|extent| extent.segment != segment);
        self.carry.retain(|page| page.segment != segment);
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
