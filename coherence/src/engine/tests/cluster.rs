//! A cluster in one value: engines, their memory, the channels between them, the coordinator.
//!
//! Nothing happens by itself: a test chooses which message arrives next. The contents of a page
//! are the number of the write that made them, so a stale copy is seen at once.

use std::collections::VecDeque;
use std::sync::Arc;

use migshm_protocol::page::{Access, PageMessage};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

use crate::{Action, Body, Config, Engine, Fill, Input, Memory, PageSet, Time};

pub(super) const SEGMENT: SegmentId = SegmentId(7);
pub(super) const EXTENT: Extent = Extent {
    segment: SEGMENT,
    index: 0,
};

pub(super) fn page(index: usize) -> Page {
    Page {
        segment: SEGMENT,
        index: index as u32,
    }
}

pub(super) fn node(index: usize) -> NodeId {
    NodeId(index as u16)
}

/// Which write made a page's contents; 0 for none.
pub(super) type Version = u32;

/// A message under way, with the contents that follow it.
pub(super) type Letter = (PageMessage, Option<Version>);

/// A node's engine and what its processes see.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) engine: Engine<Version>,
    pub(super) frames: Vec<Frame>,
    /// The coordinator's answers under way.
    pub(super) answers: VecDeque<Extent>,
}

/// A page as local processes see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Frame {
    pub(super) access: Option<Access>,
    pub(super) contents: Option<Version>,
    /// What a thread that faulted sleeps for.
    pub(super) waiting: Option<Access>,
}

struct Frames<'a>(&'a [Frame]);

impl Memory for Frames<'_> {
    fn present(&self, extent: Extent) -> PageSet {
        let mut set = PageSet::new();
        if extent == EXTENT {
            let present = |(_, frame): &(u32, &Frame)| frame.contents.is_some();
            (0..)
                .zip(self.0)
                .filter(present)
                .for_each(|(index, _)| set.insert(index));
        }
        set
    }
}

/// A protocol broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// Requesters do not wait for acknowledgements.
    IgnoreAcks,
    /// Homes do not wait until a requester has what another node sent it.
    IgnoreDone,
    /// Pages are sent while they can still be written.
    SkipProtect,
    /// Sharers acknowledge and keep their copy.
    KeepInvalidated,
    /// Homes move while grants are under way.
    SkipFence,
    /// Homes hand their directory to two nodes.
    CopyDirectory,
    /// Homes take every write-back for the owner's.
    AcceptStaleWriteBack,
    /// Owners drop a page as soon as they have written it back.
    DropOnWriteBack,
    /// What was put off by a hold is forgotten.
    ForgetDeferred,
    /// The messages of a pair of nodes overtake each other.
    Reorder,
    /// Who waits for a prefetch that is declined is not told.
    ForgetDecline,
    /// Homes take an owner that declines for one that has given the page away.
    IgnoreDecline,
}

#[derive(Clone, Debug)]
pub(super) struct Cluster {
    /// Shared between the states of a search, which differ in one host mostly.
    pub(super) hosts: Vec<Arc<Host>>,
    /// By sender and receiver.
    pub(super) channels: Vec<VecDeque<Letter>>,
    /// By page: the last write.
    pub(super) latest: Vec<Version>,
    /// The coordinator's word.
    pub(super) home: Option<NodeId>,
    /// The first thing that was found wrong while actions were executed.
    pub(super) wrong: Option<&'static str>,
    mutation: Option<Mutation>,
}

impl Cluster {
    pub(super) fn new(
        nodes: usize,
        pages: usize,
        default_home: Option<NodeId>,
        hold: Time,
    ) -> Self {
        let host = |index| {
            let config = Config {
                hold_min: hold,
                hold_max: 4 * hold,
            };
            let mut engine = Engine::new(node(index), config);
            engine.add_segment(SEGMENT, pages as u32, default_home);
            Host {
                engine,
                frames: vec![Frame::default(); pages],
                answers: VecDeque::new(),
            }
        };
        Self {
            hosts: (0..nodes).map(|index| Arc::new(host(index))).collect(),
            channels: vec![VecDeque::new(); nodes * nodes],
            latest: vec![0; pages],
            home: default_home,
            wrong: None,
            mutation: None,
        }
    }

    pub(super) fn broken(self, mutation: Option<Mutation>) -> Self {
        Self { mutation, ..self }
    }

    /// Gives a node contents of its own, from the time when it used the segment alone.
    pub(super) fn preload(&mut self, at: usize, index: usize) {
        self.latest[index] += 1;
        self.host_mut(at).frames[index].contents = Some(self.latest[index]);
    }

    fn host_mut(&mut self, at: usize) -> &mut Host {
        Arc::make_mut(&mut self.hosts[at])
    }

    pub(super) fn channel(&self, from: usize, to: usize) -> usize {
        from * self.hosts.len() + to
    }

    /// A thread touches a page; whether it could at once.
    pub(super) fn touch(&mut self, now: Time, at: usize, index: usize, access: Access) -> bool {
        let frame = &mut self.host_mut(at).frames[index];
        if frame.access >= Some(access) {
            if access == Access::Write {
                self.write(at, index);
            }
            return true;
        }
        frame.waiting = frame.waiting.max(Some(access));
        self.handle(
            now,
            at,
            Input::Fault {
                page: page(index),
                access,
            },
        );
        false
    }

    /// A thread writes to a page that it may write to.
    pub(super) fn write(&mut self, at: usize, index: usize) {
        self.latest[index] += 1;
        self.host_mut(at).frames[index].contents = Some(self.latest[index]);
    }

    /// Delivers the next message of a channel.
    pub(super) fn deliver(&mut self, now: Time, channel: usize) {
        let (from, to) = (channel / self.hosts.len(), channel % self.hosts.len());
        let Some((mut message, data)) = self.channels[channel].pop_front() else {
            return;
        };
        match (self.mutation, &mut message) {
            (Some(Mutation::IgnoreAcks), PageMessage::InvalidateAck { .. })
            | (Some(Mutation::IgnoreDone), PageMessage::Done { .. }) => return,
            (Some(Mutation::IgnoreAcks), PageMessage::Grant { acks, .. }) => *acks = 0,
            (Some(Mutation::ForgetDecline), PageMessage::Decline { .. }) => return,
            (Some(Mutation::IgnoreDecline), &mut PageMessage::Decline { page, requester })
                if requester != node(to) =>
            {
                let on = self.channel(to, usize::from(requester.0));
                self.channels[on].push_back((PageMessage::Decline { page, requester }, None));
                let message = PageMessage::Done { page };
                let from = requester;
                return self.handle(
                    now,
                    to,
                    Input::Message {
                        from,
                        message,
                        data: None,
                    },
                );
            }
            (Some(Mutation::KeepInvalidated), &mut PageMessage::Invalidate { page, requester }) => {
                let back = self.channel(to, usize::from(requester.0));
                return self.channels[back].push_back((PageMessage::InvalidateAck { page }, None));
            }
            (Some(Mutation::AcceptStaleWriteBack), PageMessage::WriteBack { page, owner }) => {
                let state = self.hosts[to].engine.extent(page.extent());
                if let Some(directory) = state.and_then(|state| state.directory.as_ref()) {
                    *owner = directory.owner(page.index as usize).unwrap_or(*owner);
                }
            }
            _ => {}
        }
        self.handle(
            now,
            to,
            Input::Message {
                from: node(from),
                message,
                data,
            },
        );
    }

    /// Moves a channel's first message behind the others, if messages may overtake each other.
    pub(super) fn overtakes(&self, channel: usize) -> bool {
        self.mutation == Some(Mutation::Reorder) && self.channels[channel].len() > 1
    }

    /// Delivers the coordinator's next answer to a node.
    pub(super) fn answer(&mut self, now: Time, at: usize) {
        if let Some(extent) = self.host_mut(at).answers.pop_front() {
            self.handle(
                now,
                at,
                Input::HomeIs {
                    extent,
                    home: self.home,
                },
            );
        }
    }

    pub(super) fn end_holds(&mut self, now: Time, at: usize) {
        if self.mutation == Some(Mutation::ForgetDeferred) {
            self.hosts[at]
                .engine
                .clone()
                .handle(now, Input::Timeout, &Frames(&[]), &mut vec![]);
            self.host_mut(at).engine.deferred.clear();
        } else {
            self.handle(now, at, Input::Timeout);
        }
    }

    pub(super) fn handle(&mut self, now: Time, at: usize, input: Input<Version>) {
        let mut actions = Vec::new();
        let host = self.host_mut(at);
        host.engine
            .handle(now, input, &Frames(&host.frames), &mut actions);
        let installed = |action: &Action<Version>| match action {
            Action::Install { page, .. } => Some(page.index as usize),
            _ => None,
        };
        let woken: Vec<usize> = actions.iter().filter_map(installed).collect();
        for action in actions {
            self.execute(now, at, action);
        }
        // Threads that need more than was installed fault again.
        for index in woken {
            if let Some(wanted) = self.hosts[at].frames[index].waiting {
                self.touch(now, at, index, wanted);
            }
        }
    }

    fn execute(&mut self, now: Time, at: usize, action: Action<Version>) {
        match action {
            Action::Send { to, message, body } => self.send(now, at, to, message, body),
            Action::Install {
                page,
                access,
                contents,
            } => {
                let frame = &mut self.host_mut(at).frames[page.index as usize];
                match contents {
                    Fill::Data(version) => frame.contents = Some(version),
                    Fill::Zeros => frame.contents = Some(0),
                    Fill::InPlace => {}
                }
                frame.access = Some(access);
                if frame.waiting <= Some(access) {
                    frame.waiting = None;
                }
                if frame.contents.is_none() {
                    self.wrong = Some("nothing is in place");
                }
            }
            Action::Protect { page } => {
                let skipped = self.mutation == Some(Mutation::SkipProtect);
                let frame = &mut self.host_mut(at).frames[page.index as usize];
                if !skipped {
                    frame.access = frame.access.min(Some(Access::Read));
                }
            }
            Action::Drop { page } => self.drop_frame(at, page),
            Action::FindHome { extent } => {
                self.home.get_or_insert(node(0));
                self.host_mut(at).answers.push_back(extent);
            }
            Action::BecameHome { .. } => self.home = Some(node(at)),
            Action::Fail { .. } => self.wrong = Some("a fault failed"),
        }
    }

    fn send(
        &mut self,
        now: Time,
        at: usize,
        to: NodeId,
        message: PageMessage,
        body: Body<Version>,
    ) {
        let data = match body {
            Body::None => None,
            Body::Data(version) => Some(version),
            Body::Page(page) => {
                let contents = self.hosts[at].frames[page.index as usize].contents;
                if contents.is_none() {
                    self.wrong = Some("an absent page was sent");
                }
                Some(contents.unwrap_or(0))
            }
        };
        if to == node(at) {
            self.wrong = Some("a message to itself");
            return;
        }
        let mut early = None;
        match (self.mutation, &message) {
            (Some(Mutation::SkipFence), &PageMessage::Fence { extent }) => {
                let message = PageMessage::FenceAck { extent };
                return self.handle(
                    now,
                    at,
                    Input::Message {
                        from: to,
                        message,
                        data: None,
                    },
                );
            }
            (
                Some(Mutation::IgnoreDone),
                &PageMessage::Forward {
                    page, requester, ..
                },
            ) if requester != node(at) => {
                early = Some((requester, PageMessage::Done { page }));
            }
            (Some(Mutation::CopyDirectory), PageMessage::HomeTransfer { .. }) => {
                let other = (0..self.hosts.len()).find(|&other| other != at && node(other) != to);
                if let Some(other) = other {
                    let channel = self.channel(at, other);
                    self.channels[channel].push_back((message.clone(), data));
                }
            }
            (Some(Mutation::DropOnWriteBack), &PageMessage::WriteBack { page, .. }) => {
                self.drop_frame(at, page);
            }
            _ => {}
        }
        let channel = self.channel(at, usize::from(to.0));
        self.channels[channel].push_back((message, data));
        if let Some((from, message)) = early {
            self.handle(
                now,
                at,
                Input::Message {
                    from,
                    message,
                    data: None,
                },
            );
        }
    }

    fn drop_frame(&mut self, at: usize, page: Page) {
        let frame = &mut self.host_mut(at).frames[page.index as usize];
        (frame.access, frame.contents) = (None, None);
    }

    /// Channels with messages.
    pub(super) fn busy_channels(&self) -> impl Iterator<Item = usize> {
        let channels = self.channels.iter().enumerate();
        channels
            .filter(|(_, letters)| !letters.is_empty())
            .map(|(channel, _)| channel)
    }

    /// Whether nothing is under way: no message, no hold that somebody waits for, no answer.
    pub(super) fn is_quiet(&self) -> bool {
        let idle =
            |host: &Arc<Host>| host.answers.is_empty() && host.engine.next_timeout().is_none();
        self.channels.iter().all(VecDeque::is_empty) && self.hosts.iter().all(idle)
    }

    /// One writer or many readers.
    pub(super) fn has_single_writers(&self) -> bool {
        (0..self.latest.len()).all(|index| {
            let with = |least| {
                let hosts = self.hosts.iter();
                hosts
                    .filter(|host| host.frames[index].access >= Some(least))
                    .count()
            };
            with(Access::Write) == 0 || with(Access::Read) == 1
        })
    }

    /// Every page that can be read contains the last write.
    pub(super) fn reads_are_fresh(&self) -> bool {
        self.hosts.iter().all(|host| {
            let frames = host.frames.iter().zip(&self.latest);
            frames
                .filter(|(frame, _)| frame.access.is_some())
                .all(|(frame, &latest)| frame.contents == Some(latest))
        })
    }

    /// Processes can do no more than their engine believes.
    pub(super) fn engines_know_the_mappings(&self) -> bool {
        self.hosts.iter().all(|host| {
            let frames = (0..).zip(&host.frames);
            frames.fold(true, |agree, (index, frame)| {
                agree && frame.access <= host.engine.access(page(index))
            })
        })
    }

    /// The directory is at one node, or on its way to one.
    pub(super) fn has_single_home(&self) -> bool {
        let at_home = self
            .hosts
            .iter()
            .filter(|host| host.engine.is_home(EXTENT))
            .count();
        let letters = self.channels.iter().flatten();
        let moving = letters
            .filter(|(m, _)| matches!(m, PageMessage::HomeTransfer { .. }))
            .count();
        at_home + moving <= 1
    }

    /// Where nothing is under way nobody waits, no transaction is open, no home is moving.
    pub(super) fn is_not_stuck(&self) -> bool {
        let settled = |host: &Arc<Host>| {
            let engine = &host.engine;
            engine.pending.is_empty()
                && engine.transactions.is_empty()
                && engine.moves.is_empty()
                && engine.finding.is_empty()
                && host.frames.iter().all(|frame| frame.waiting.is_none())
        };
        !self.is_quiet() || self.hosts.iter().all(settled)
    }

    /// No engine saw a message that a correct peer does not send, and none told its node to do
    /// what cannot be done.
    pub(super) fn nothing_is_wrong(&self) -> bool {
        let errors = |host: &Arc<Host>| host.engine.counters().protocol_errors;
        self.wrong.is_none() && self.hosts.iter().map(errors).sum::<u64>() == 0
    }

    /// # Panics
    ///
    /// If an invariant does not hold.
    pub(super) fn check(&self) {
        assert!(self.has_single_writers(), "{self:?}");
        assert!(self.reads_are_fresh(), "{self:?}");
        assert!(self.engines_know_the_mappings(), "{self:?}");
        assert!(self.has_single_home(), "{self:?}");
        assert!(self.is_not_stuck(), "{self:?}");
        assert!(self.nothing_is_wrong(), "{self:?}");
    }
}
