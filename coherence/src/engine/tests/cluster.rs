//! A cluster in one value: engines, their memory, the channels between them, the coordinator.
//!
//! Nothing happens by itself: a test chooses which message arrives next. The contents of a page
//! are the number of the write that made them, so a stale copy is seen at once.

use std::collections::VecDeque;
use std::sync::Arc;

use migshm_protocol::page::{Access, PageMessage};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};

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

/// What is under way from node to node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Letter {
    /// A message, with the contents that follow it.
    Page(PageMessage, Option<Version>),
    /// What follows is of this view.
    Flush(u64),
}

/// What the coordinator tells a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Word {
    HomeIs {
        home: Option<NodeId>,
        orphaned: bool,
    },
    View {
        number: u64,
        members: NodeSet,
    },
}

/// What a node tells the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Said {
    FindHome,
    BecameHome,
    Flushed(u64),
}

/// As far as it has to do with the extent.
#[derive(Clone, Debug, Hash)]
pub(super) struct Coordinator {
    pub(super) home: Option<NodeId>,
    /// Whether the extent had a home, which died.
    orphaned: bool,
    view: u64,
    members: NodeSet,
    /// Who has yet to say that it has flushed.
    unflushed: NodeSet,
    /// Who is answered then.
    asking: VecDeque<usize>,
}

/// A node's engine and what its processes see.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) engine: Engine<Version>,
    pub(super) frames: Vec<Frame>,
    /// The coordinator's words under way.
    pub(super) answers: VecDeque<Word>,
    /// Those to it.
    pub(super) said: VecDeque<Said>,
    pub(super) fate: Fate,
}

/// Whether a node is a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fate {
    Member,
    /// It was taken for dead: its processes have stopped, its engine goes on.
    Expelled,
    Dead,
}

impl Host {
    pub(super) fn is_member(&self) -> bool {
        self.fate == Fate::Member
    }
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
    /// Survivors of a death do not wait for what others have sent them before.
    SkipFlush,
    /// Survivors say that they hold nothing.
    HideHoldings,
    /// New homes take what nobody holds for untouched.
    ForgetLosses,
    /// The coordinator names homes before all have flushed.
    NameEarly,
}

#[derive(Clone, Debug)]
pub(super) struct Cluster {
    /// Shared between the states of a search, which differ in one host mostly.
    pub(super) hosts: Vec<Arc<Host>>,
    /// By sender and receiver.
    pub(super) channels: Vec<VecDeque<Letter>>,
    /// By page: the last write.
    pub(super) latest: Vec<Version>,
    pub(super) coordinator: Coordinator,
    /// Whether words to the coordinator take time.
    pub(super) slow_words: bool,
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
                said: VecDeque::new(),
                fate: Fate::Member,
            }
        };
        Self {
            hosts: (0..nodes).map(|index| Arc::new(host(index))).collect(),
            channels: vec![VecDeque::new(); nodes * nodes],
            latest: vec![0; pages],
            coordinator: Coordinator {
                home: default_home,
                orphaned: false,
                view: 0,
                members: (0..nodes).map(node).collect(),
                unflushed: NodeSet::default(),
                asking: VecDeque::new(),
            },
            slow_words: false,
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
        let Some(letter) = self.channels[channel].pop_front() else {
            return;
        };
        let (mut message, data) = match letter {
            Letter::Page(message, data) => (message, data),
            Letter::Flush(view) => {
                let from = node(from);
                return self.handle(now, to, Input::Flush { from, view });
            }
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
                let decline = PageMessage::Decline { page, requester };
                self.channels[on].push_back(Letter::Page(decline, None));
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
                let ack = PageMessage::InvalidateAck { page };
                return self.channels[back].push_back(Letter::Page(ack, None));
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

    /// Delivers the coordinator's next word to a node.
    pub(super) fn answer(&mut self, now: Time, at: usize) {
        match self.host_mut(at).answers.pop_front() {
            Some(Word::HomeIs { home, orphaned }) => {
                let extent = EXTENT;
                let orphaned = orphaned && self.mutation != Some(Mutation::ForgetLosses);
                let answer = Input::HomeIs {
                    extent,
                    home,
                    orphaned,
                };
                self.handle(now, at, answer);
            }
            Some(Word::View { number, members }) => {
                // The links to who is no member are closed.
                for other in (0..self.hosts.len()).filter(|&other| !members.contains(node(other))) {
                    let channel = self.channel(other, at);
                    self.channels[channel].clear();
                }
                self.handle(now, at, Input::View { number, members });
                if self.mutation == Some(Mutation::SkipFlush) {
                    for from in members.without(node(at)) {
                        let view = number;
                        self.handle(now, at, Input::Flush { from, view });
                    }
                }
            }
            None => {}
        }
    }

    /// Delivers a node's next word to the coordinator.
    pub(super) fn hear(&mut self, at: usize) {
        if let Some(said) = self.host_mut(at).said.pop_front() {
            self.heard(at, said);
        }
    }

    fn heard(&mut self, at: usize, said: Said) {
        let coordinator = &mut self.coordinator;
        match said {
            Said::BecameHome => {
                coordinator.home = Some(node(at));
                coordinator.orphaned = false;
            }
            Said::FindHome => coordinator.asking.push_back(at),
            Said::Flushed(view) if view == coordinator.view => {
                coordinator.unflushed.remove(node(at));
            }
            Said::Flushed(_) => {}
        }
        let early = self.mutation == Some(Mutation::NameEarly);
        while self.coordinator.unflushed.is_empty() || early {
            let Some(asker) = self.coordinator.asking.pop_front() else {
                break;
            };
            self.name_home(asker);
        }
    }

    /// Answers who asks for the home; the member with the lowest number gets what has none.
    fn name_home(&mut self, asker: usize) {
        let coordinator = &mut self.coordinator;
        let lowest = coordinator.members.into_iter().next();
        let home = coordinator.home.or(lowest);
        let orphaned = std::mem::take(&mut coordinator.orphaned);
        coordinator.home = home;
        if let Some(home) = home.filter(|_| orphaned) {
            let words = &mut self.host_mut(usize::from(home.0)).answers;
            words.push_back(Word::HomeIs {
                home: Some(home),
                orphaned,
            });
        }
        let orphaned = false;
        let words = &mut self.host_mut(asker).answers;
        words.push_back(Word::HomeIs { home, orphaned });
    }

    /// A member is taken for dead, and is, or not quite.
    pub(super) fn lose(&mut self, at: usize, fate: Fate) {
        let host = self.host_mut(at);
        host.fate = fate;
        host.answers.clear();
        host.said.clear();
        for frame in &mut host.frames {
            (frame.access, frame.waiting) = (None, None);
        }
        if fate == Fate::Dead {
            for from in 0..self.hosts.len() {
                let channel = self.channel(from, at);
                self.channels[channel].clear();
            }
        }
        let coordinator = &mut self.coordinator;
        coordinator.view += 1;
        coordinator.members.remove(node(at));
        coordinator.unflushed = coordinator.members;
        coordinator.asking.retain(|&asker| asker != at);
        if coordinator.home == Some(node(at)) {
            (coordinator.home, coordinator.orphaned) = (None, true);
        }
        let (number, members) = (coordinator.view, coordinator.members);
        for member in members {
            let words = &mut self.host_mut(usize::from(member.0)).answers;
            words.push_back(Word::View { number, members });
        }
    }

    fn tell(&mut self, at: usize, said: Said) {
        match self.hosts[at].fate {
            Fate::Member if self.slow_words => self.host_mut(at).said.push_back(said),
            Fate::Member => self.heard(at, said),
            Fate::Expelled | Fate::Dead => {}
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
            Action::FindHome { .. } => self.tell(at, Said::FindHome),
            Action::BecameHome { .. } => self.tell(at, Said::BecameHome),
            Action::Flush { to, view } => {
                let channel = self.channel(at, usize::from(to.0));
                if self.hosts[usize::from(to.0)].fate != Fate::Dead {
                    self.channels[channel].push_back(Letter::Flush(view));
                }
            }
            Action::Flushed { view } => self.tell(at, Said::Flushed(view)),
            Action::Lost { pages, .. } => {
                let count = self.latest.len();
                for index in (0..count).filter(|&index| pages.contains(index as u32)) {
                    self.note_loss(index);
                }
            }
            Action::Fail { page } => {
                let index = page.index as usize;
                self.host_mut(at).frames[index].waiting = None;
                if self.hosts[at].is_member() {
                    self.note_loss(index);
                }
            }
        }
    }

    /// A page may be lost only if no survivor has it.
    fn note_loss(&mut self, index: usize) {
        let mut members = self.hosts.iter().filter(|host| host.is_member());
        if members.any(|host| host.frames[index].contents.is_some()) {
            self.wrong = Some("a page was lost of which there is a copy");
        }
        if self.coordinator.view == 0 {
            self.wrong = Some("a page was lost and nobody has died");
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
        let message = match message {
            PageMessage::Holdings { extent, .. }
                if self.mutation == Some(Mutation::HideHoldings) =>
            {
                let pages = Vec::new();
                PageMessage::Holdings { extent, pages }
            }
            message => message,
        };
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
                    self.channels[channel].push_back(Letter::Page(message.clone(), data));
                }
            }
            (Some(Mutation::DropOnWriteBack), &PageMessage::WriteBack { page, .. }) => {
                self.drop_frame(at, page);
            }
            _ => {}
        }
        let channel = self.channel(at, usize::from(to.0));
        if self.hosts[usize::from(to.0)].fate != Fate::Dead {
            self.channels[channel].push_back(Letter::Page(message, data));
        }
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
        let idle = |host: &Arc<Host>| {
            let silent = host.answers.is_empty() && host.said.is_empty();
            host.fate == Fate::Dead || silent && host.engine.next_timeout().is_none()
        };
        self.channels.iter().all(VecDeque::is_empty) && self.hosts.iter().all(idle)
    }

    /// One writer or many readers.
    pub(super) fn has_single_writers(&self) -> bool {
        (0..self.latest.len()).all(|index| {
            let with = |least| {
                let hosts = self.hosts.iter().filter(|host| host.is_member());
                hosts
                    .filter(|host| host.frames[index].access >= Some(least))
                    .count()
            };
            with(Access::Write) == 0 || with(Access::Read) == 1
        })
    }

    /// Every page that can be read contains the last write.
    pub(super) fn reads_are_fresh(&self) -> bool {
        let mut members = self.hosts.iter().filter(|host| host.is_member());
        members.all(|host| {
            let frames = host.frames.iter().zip(&self.latest);
            frames
                .filter(|(frame, _)| frame.access.is_some())
                .all(|(frame, &latest)| frame.contents == Some(latest))
        })
    }

    /// Processes can do no more than their engine believes.
    pub(super) fn engines_know_the_mappings(&self) -> bool {
        let mut members = self.hosts.iter().filter(|host| host.is_member());
        members.all(|host| {
            let frames = (0..).zip(&host.frames);
            frames.fold(true, |agree, (index, frame)| {
                agree && frame.access <= host.engine.access(page(index))
            })
        })
    }

    /// The directory is at one node, or on its way to one.
    pub(super) fn has_single_home(&self) -> bool {
        let hosts = self.hosts.iter();
        let is_home = |host: &&Arc<Host>| host.is_member() && host.engine.is_home(EXTENT);
        let at_home = hosts.filter(is_home).count();
        let is_to_member = |&(channel, _): &(usize, _)| {
            let (from, to) = (channel / self.hosts.len(), channel % self.hosts.len());
            self.hosts[from].is_member() && self.hosts[to].is_member()
        };
        let channels = self.channels.iter().enumerate().filter(is_to_member);
        let moving = channels
            .flat_map(|(_, letters)| letters)
            .filter(|letter| matches!(letter, Letter::Page(PageMessage::HomeTransfer { .. }, _)))
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
                && engine.unrouted.is_empty()
                && engine.rebuilds.is_empty()
                && engine.view.is_settled()
                && host.frames.iter().all(|frame| frame.waiting.is_none())
        };
        let mut members = self.hosts.iter().filter(|host| host.is_member());
        !self.is_quiet() || members.all(settled)
    }

    /// No engine saw a message that a correct peer does not send, and none told its node to do
    /// what cannot be done.
    pub(super) fn nothing_is_wrong(&self) -> bool {
        let mut members = self.hosts.iter().filter(|host| host.is_member());
        self.wrong.is_none() && members.all(|host| host.engine.counters().protocol_errors == 0)
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
        assert!(self.nothing_is_wrong(), "{:?}: {self:?}", self.wrong);
    }
}
