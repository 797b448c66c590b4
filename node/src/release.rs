//! Segments with release consistency: between their engine, memory and peers, and between a
//! release and the coordinator.
//!
//! A *release* is whatever this node tells the coordinator that another process may come to see:
//! a call that changes something, the end of an attach or a process, the return of a semaphore set.
//! It is told once the homes have what the node's processes wrote before; what follows it waits
//! behind it, so that the coordinator hears everything in order. An answer of the coordinator's is
//! an *acquire*, and follows the write notices that it implies.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use bytes::Bytes;
use migshm_coherence::release::{Action, Diff, Frames, Input};
use migshm_protocol::call::Consistency;
use migshm_protocol::control::ToCoordinator;
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::page::{Access, PeerMessage};
use migshm_protocol::release::{ReleaseMessage, Runs};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

use crate::cached::Cached;
use crate::daemon::{Counters, Node};
use crate::memory::Memory;
use crate::pages::now;
use crate::readers::Turns;

/// What the coordinator is told once releases are done. The first waits for one, if there is any.
#[derive(Default, Serialize, Deserialize)]
pub struct Outbox(VecDeque<Held>);

#[derive(Serialize, Deserialize)]
struct Held {
    message: ToCoordinator,
    /// What follows it.
    raw: Vec<u8>,
    /// Whether it waits for a release of its own.
    releases: bool,
}

/// Whether others may see by a message that something has happened on this node.
fn is_release(message: &ToCoordinator, raw: &[u8]) -> bool {
    match message {
        ToCoordinator::Call { call, .. } => !call.is_query(raw),
        ToCoordinator::Returned { .. }
        | ToCoordinator::Exited { .. }
        | ToCoordinator::Detached { .. } => true,
        _ => false,
    }
}

/// Whether a message tells, without asking for an answer, what users of other nodes see.
fn is_effect(message: &ToCoordinator) -> bool {
    matches!(
        message,
        ToCoordinator::Exited { .. }
            | ToCoordinator::Inherited { .. }
            | ToCoordinator::Detached { id: 0, .. }
            | ToCoordinator::Unattached { .. }
    )
}

/// Whether a message has nothing to do with what processes do, and something may wait for it.
fn passes(message: &ToCoordinator) -> bool {
    matches!(
        message,
        ToCoordinator::Query { .. }
            | ToCoordinator::FindHome { .. }
            | ToCoordinator::Flushed { .. }
            | ToCoordinator::Unreachable { .. }
            | ToCoordinator::FindSegment { .. }
            | ToCoordinator::ProposeHome { .. }
            | ToCoordinator::HomeMoved { .. }
            | ToCoordinator::Account { .. }
            | ToCoordinator::Sharing { .. }
    )
}

impl Node {
    /// Says something to the coordinator, after all that was to be said before. A release is said
    /// when it is done.
    pub(crate) fn tell(&mut self, message: ToCoordinator, raw: &[u8]) {
        self.effects += u64::from(is_effect(&message));
        let releases = !self.release.is_clean() && is_release(&message, raw);
        if !releases && (self.outbox.0.is_empty() || passes(&message)) {
            return self.say(message, raw);
        }
        self.outbox.0.push_back(Held {
            message,
            raw: raw.to_vec(),
            releases,
        });
        if releases {
            self.drive_release(Input::Release);
        }
    }

    /// The oldest release is done: tells what was written, and what waited.
    fn on_released(&mut self, wrote: Vec<(SegmentId, Runs)>) {
        for (segment, pages) in wrote {
            self.say(ToCoordinator::Wrote { segment, pages }, &[]);
        }
        if let Some(held) = self.outbox.0.pop_front() {
            self.say(held.message, &held.raw);
        }
        while let Some(held) = self.outbox.0.pop_front() {
            if held.releases {
                return self.outbox.0.push_front(held);
            }
            self.say(held.message, &held.raw);
        }
    }

    /// This node is the home of an extent of a durable segment.
    pub(crate) fn on_backup(&mut self, extent: Extent, backup: Option<NodeId>, blank: bool) {
        if !self.memory.is_tracked(extent.segment) {
            let segment = extent.segment;
            self.guarded.push((extent, backup, blank));
            return self.tell(ToCoordinator::FindSegment { segment }, &[]);
        }
        if backup.is_none() {
            tracing::warn!(
                segment = extent.segment.0,
                extent = extent.index,
                "no other node has room for a second copy: until one does, what is released is here alone"
            );
        }
        self.drive_release(Input::BackupIs {
            extent,
            backup,
            blank,
        });
    }

    /// Tells at once what waits for a release, as there is no time left; unless it would have count what
    /// is to be at a second node first.
    pub(crate) fn empty_outbox(&mut self) {
        if self
            .with_release
            .values()
            .any(|of| *of == Consistency::Durable)
        {
            return self.outbox.0.clear();
        }
        for held in std::mem::take(&mut self.outbox.0) {
            self.say(held.message, &held.raw);
        }
    }

    pub(crate) fn drive_release(&mut self, input: Input) {
        let mut actions = Vec::new();
        let mut frames = NodeFrames {
            memory: &mut self.memory,
            cached: &mut self.cached,
            turns: &mut self.turns,
            counters: &mut self.counters,
        };
        self.release.handle(input, &mut frames, &mut actions);
        self.execute_release(actions);
    }

    fn execute_release(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, message, data } => {
                    self.log_release_sent(to, &message);
                    if let ReleaseMessage::Copies { .. } | ReleaseMessage::Returned { .. } = message
                    {
                        self.counters.pages_sent += (data.len() / PAGE_SIZE) as u64;
                    }
                    self.send_peer(to, PeerMessage::Release(message), Bytes::from(data));
                }
                Action::FindHome { extent } => self.tell(ToCoordinator::FindHome { extent }, &[]),
                Action::Released { wrote } => self.on_released(wrote),
                Action::Lost { extent } => tracing::error!(
                    segment = extent.segment.0,
                    extent = extent.index,
                    "its home died before its backup had it: SIGBUS for who touches it"
                ),
                Action::Fail { page } => {
                    tracing::error!(%page, "the page is lost, or no node has memory for it: SIGBUS");
                    self.memory.poison(page);
                }
            }
        }
    }

    /// Begins to track a segment.
    pub(crate) fn add_to_engine(&mut self, segment: SegmentId, default_home: Option<NodeId>) {
        let pages = self.memory.pages(segment).unwrap_or(0);
        match self.consistency(segment) {
            Consistency::Release => self.release.add_segment(segment, pages, default_home),
            Consistency::Durable => self.release.add_durable_segment(segment, pages),
            Consistency::Sequential => self.engine.add_segment(segment, pages, default_home),
        }
    }

    fn consistency(&self, segment: SegmentId) -> Consistency {
        let known = self.with_release.get(&segment);
        known.copied().unwrap_or_default()
    }

    /// Forgets a segment that is gone.
    pub(crate) fn remove_from_release(&mut self, segment: SegmentId) {
        if self.with_release.remove(&segment).is_some() {
            let mut actions = Vec::new();
            self.release.remove_segment(segment, &mut actions);
            self.execute_release(actions);
        }
    }

    /// What local processes may do with a page.
    pub(crate) fn access(&self, page: Page) -> Option<Access> {
        match self.consistency(page.segment).is_release() {
            true => self.release.access(page),
            false => self.engine.access(page),
        }
    }

    /// Whether this node alone must keep a page: it may not be forgotten for lack of memory.
    pub(crate) fn must_keep(&self, page: Page) -> bool {
        match self.consistency(page.segment).is_release() {
            true => self.release.is_home(page) && !self.release.is_borrowed(page),
            false => self.engine.is_home(page.extent()),
        }
    }

    /// Whether a page is on its way here.
    pub(crate) fn is_pending(&self, page: Page) -> bool {
        match self.consistency(page.segment).is_release() {
            true => self.release.is_pending(page),
            false => self.engine.is_pending(page),
        }
    }

    /// A message of another node about a segment with release consistency.
    pub(crate) fn deliver_release(&mut self, from: NodeId, message: ReleaseMessage, raw: &[u8]) {
        self.log_release(from, &message);
        let came = match &message {
            ReleaseMessage::Copies { segment, pages, .. } => pages.last().map(|(index, _)| Page {
                segment: *segment,
                index: *index,
            }),
            _ => None,
        };
        self.drive_release(Input::Message {
            from,
            message,
            data: raw.to_vec(),
        });
        if let Some(page) = came {
            self.prefetcher.came(page);
            self.prefetch();
        }
    }

    /// Hands a fault, or the wish to evict a page, to the segment's engine, if it is that of
    /// segments with release consistency. False if not.
    pub(crate) fn is_for_release(&mut self, page: Page, input: Input) -> bool {
        let is = self.consistency(page.segment).is_release();
        if is {
            self.drive_release(input);
        }
        is
    }
}

/// Memory, and who has to know what happens to its pages.
struct NodeFrames<'a> {
    memory: &'a mut Memory,
    cached: &'a mut Cached,
    turns: &'a mut Turns,
    counters: &'a mut Counters,
}

impl Frames for NodeFrames<'_> {
    fn read(&self, page: Page, buffer: &mut [u8]) {
        self.memory.read(page, buffer);
    }

    fn protect(&mut self, page: Page) {
        self.memory.protect(page.into());
    }

    fn permit(&mut self, page: Page) {
        self.turns.note_write_grant(self.memory, page, now());
        self.memory.change(page.into(), Access::Write);
    }

    fn install(&mut self, page: Page, access: Access, contents: Option<&[u8]>) {
        self.counters.pages_received += u64::from(contents.is_some());
        if access == Access::Write {
            self.turns.note_write_grant(self.memory, page, now());
        }
        self.memory.install(page.into(), access, |_| contents);
        self.cached.push(page);
    }

    fn retry(&mut self, page: Page) {
        self.memory.wake_waiters(page);
    }

    fn merge(&mut self, page: Page, diff: &Diff) {
        self.memory.merge(page, diff);
    }

    fn drop(&mut self, page: Page) {
        self.cached.remove(page);
        self.memory.drop_pages(page.into());
    }

    fn is_used(&self, page: Page) -> bool {
        self.memory.is_seen(page)
    }

    fn is_present(&self, page: Page) -> bool {
        self.memory.is_present(page)
    }
}
