//! The node's access log: what is told to it, and what it tells (`migshm links`).
//!
//! The log itself is pure ([`AccessLog`]). It knows processes by their address spaces, as faults do.

use migshm_coherence::Time;
use migshm_protocol::control::ToCoordinator;
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::page::{Access, Contents, PageMessage, PageRun};
use migshm_protocol::release::{ReleaseMessage, Sent};
use migshm_protocol::{NodeId, Page, SegmentId, codec};

use crate::daemon::Node;
use crate::memory::{Range, SpaceId};
use crate::pages::now;

/// Longest name of a command that is kept, in bytes (`TASK_COMM_LEN`).
const COMMAND: usize = 16;

impl Node {
    /// A process needs more of a page than the node has.
    pub(crate) fn log_fault(&mut self, space: SpaceId, page: Page, access: Access) {
        let user = user(space);
        if self.log.fault(user, page, access) {
            self.introduce(space);
        }
    }

    /// A message brought pages, or did not.
    pub(crate) fn log_grant(&mut self, from: NodeId, run: &PageRun) {
        if let PageMessage::Grant {
            page,
            contents: Contents::Bytes,
            ..
        } = run.message
        {
            for page in Range::of(page, run.pages.into()).iter() {
                self.log.received(page, from, PAGE_SIZE);
            }
        }
    }

    /// Pages go out: to a node that asked for them, or home.
    pub(crate) fn log_sent(&mut self, to: NodeId, run: &PageRun) {
        if let PageMessage::Grant {
            page,
            contents: Contents::Bytes,
            ..
        } = run.message
        {
            for page in Range::of(page, run.pages.into()).iter() {
                self.log.sent(page, to, PAGE_SIZE);
            }
        }
    }

    /// A message about a segment with release consistency arrives: pages, or what was written to them.
    pub(crate) fn log_release(&mut self, from: NodeId, message: &ReleaseMessage) {
        if let ReleaseMessage::Fetch {
            segment,
            requester,
            write,
            pages,
            ..
        } = message
            && *requester == from
        {
            let access = if *write { Access::Write } else { Access::Read };
            for &index in pages {
                let segment = *segment;
                let page = Page { segment, index };
                self.log.requested(now(), page, from, access);
            }
        }
        for (page, bytes) in carried(message) {
            self.log.received(page, from, bytes);
        }
    }

    /// One goes out.
    pub(crate) fn log_release_sent(&mut self, to: NodeId, message: &ReleaseMessage) {
        for (page, bytes) in carried(message) {
            self.log.sent(page, to, bytes);
        }
    }

    /// There is an address space.
    pub(crate) fn log_start(&mut self, space: SpaceId) {
        self.log.meet(now(), user(space));
    }

    /// Says whose an address space is.
    fn introduce(&mut self, space: SpaceId) {
        let pid = self.spaces.get(&space).and_then(|resident| resident.pid);
        let command = pid.and_then(|pid| std::fs::read(format!("/proc/{pid}/comm")).ok());
        let mut command = command.unwrap_or_default();
        command.truncate(COMMAND);
        let command = String::from_utf8_lossy(&command).trim_end().to_owned();
        self.log
            .introduce(now(), user(space), pid.unwrap_or(0), command);
    }

    /// An address space has ended.
    pub(crate) fn log_end(&mut self, space: SpaceId) {
        self.log.ended(now(), user(space));
    }

    /// Answers the coordinator's question for a part of the log.
    pub(crate) fn on_account(
        &mut self,
        number: u64,
        segment: SegmentId,
        from: u64,
        requests: bool,
    ) {
        let attached: Vec<SpaceId> = self.memory.spaces.mappings.spaces(segment).collect();
        for space in &attached {
            if self.log.is_unnamed(user(*space)) {
                self.introduce(*space);
            }
        }
        let attached: Vec<u32> = attached.into_iter().map(user).collect();
        let (now, since_epoch) = (now(), since_epoch());
        let mut part = self.log.part(
            segment,
            from,
            requests,
            &attached,
            since_epoch.saturating_sub(now),
        );
        part.time = since_epoch;
        let mut bytes = Vec::new();
        if let Err(error) = codec::encode(&part, &[], &mut bytes) {
            tracing::error!(%error, "cannot tell of accesses");
        }
        self.tell(ToCoordinator::Account { number }, &bytes);
    }
}

/// The pages of which a message carries bytes, and how many.
fn carried(message: &ReleaseMessage) -> Vec<(Page, usize)> {
    match message {
        ReleaseMessage::Copies { segment, pages, .. } => {
            let sent = pages.iter().filter(|(_, sent)| *sent == Sent::Bytes);
            let sent = sent.map(|&(index, _)| (index, PAGE_SIZE));
            of_segment(*segment, sent)
        }
        ReleaseMessage::Diffs { segment, pages, .. } => {
            let diffs = pages.iter();
            let diffs = diffs.map(|&(index, length)| (index, length as usize));
            of_segment(*segment, diffs)
        }
        ReleaseMessage::Returned {
            page, zeros: false, ..
        } => vec![(*page, PAGE_SIZE)],
        _ => Vec::new(),
    }
}

fn of_segment(segment: SegmentId, pages: impl Iterator<Item = (u32, usize)>) -> Vec<(Page, usize)> {
    let pages = pages.map(|(index, bytes)| (Page { segment, index }, bytes));
    pages.collect()
}

/// A process's number in the log.
fn user(space: SpaceId) -> u32 {
    // After four billion of them: as if nobody knew who that was.
    u32::try_from(space.0).unwrap_or(0)
}

/// Nanoseconds since the epoch.
fn since_epoch() -> Time {
    let elapsed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}
