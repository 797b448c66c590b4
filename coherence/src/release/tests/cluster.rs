//! A cluster in one value: a process on each node with its program, engines, their memory, the
//! channels between them, and an ideal coordinator of semaphores and barriers.
//!
//! Nothing happens by itself: a test chooses what is next. The programs have no data races, so
//! sequential consistency has one answer for each read: what was written last, in the order of the
//! steps. A variable is a byte; variables share pages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use migshm_protocol::page::Access;
use migshm_protocol::release::{ReleaseMessage, RunSet, Runs};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

use crate::release::backup::Replica;
use crate::release::{Action, Diff, Frames, Input, Release, State};

pub(super) const SEGMENT: SegmentId = SegmentId(7);
pub(super) const EXTENT: Extent = Extent {
    segment: SEGMENT,
    index: 0,
};
pub(super) const PAGE_SIZE: usize = 8;

pub(super) fn page(index: usize) -> Page {
    Page {
        segment: SEGMENT,
        index: index as u32,
    }
}

pub(super) fn node(index: usize) -> NodeId {
    NodeId(index as u16)
}

/// A byte of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Variable {
    pub(super) page: usize,
    pub(super) byte: usize,
}

/// What a process does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    Write(Variable, u8),
    Read(Variable),
    /// Takes one from a semaphore, waiting for it.
    Wait(usize),
    /// Adds one to a semaphore.
    Post(usize),
    /// Waits for all processes.
    Barrier,
}

/// A protocol broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Mutation {
    /// A release does not wait until its diffs are merged.
    IgnoreMerged,
    /// Nobody is told of writes.
    NoNotices,
    /// Notices are told after the call that they are for.
    LateNotices,
    /// A copy that was asked for before its page was changed is taken.
    TakeOldCopies,
    /// What was written to a page that is dropped is lost.
    LoseDropped,
    /// What was written to a page that is evicted is told to nobody.
    ForgetEvicted,
    /// A home's twin is not what it has sent.
    KeepTwinAtFetch,
    /// Diffs contain the whole page.
    WholePages,
    /// A node takes a page that is offered, though it has dropped it.
    TakeDropped,
    /// A page is offered to a node whose copy is old.
    OfferToAny,
    /// A manager forgets that it has lent a page.
    ForgetLoan,
    /// A page that goes back is what it was when it was lent.
    ReturnOld,
    /// Who takes a page does not wait until its manager has no copy.
    TakeAtOnce,
    /// The messages of a pair of nodes overtake each other.
    Reorder,
    /// A home does not wait for its backup.
    IgnoreBackup,
    /// Who has written to a page whose home dies does not send that to its successor.
    ForgetOrphans,
}

/// A page as local processes see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Frame {
    pub(super) contents: Option<[u8; PAGE_SIZE]>,
    pub(super) protected: bool,
    used: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Memory {
    pub(super) frames: Vec<Frame>,
    /// What the process sleeps for.
    pub(super) waiting: Option<(usize, Access)>,
    /// The first impossible thing that was asked for.
    pub(super) wrong: Option<&'static str>,
}

impl Memory {
    fn wake(&mut self, page: Page) {
        let index = page.index as usize;
        self.waiting.take_if(|(waiting, _)| *waiting == index);
    }
}

impl Frames for Memory {
    fn read(&self, page: Page, buffer: &mut [u8]) {
        let contents = self.frames[page.index as usize].contents;
        buffer.copy_from_slice(&contents.unwrap_or_default());
    }

    fn protect(&mut self, page: Page) {
        self.frames[page.index as usize].protected = true;
    }

    fn permit(&mut self, page: Page) {
        self.frames[page.index as usize].protected = false;
        self.wake(page);
    }

    fn install(&mut self, page: Page, access: Access, contents: Option<&[u8]>) {
        let frame = &mut self.frames[page.index as usize];
        if frame.contents.is_some() {
            self.wrong = Some("a page in the way");
        }
        let contents = contents.map_or([0; PAGE_SIZE], |c| c.try_into().expect("a page"));
        *frame = Frame {
            contents: Some(contents),
            protected: access == Access::Read,
            used: false,
        };
        self.wake(page);
    }

    fn retry(&mut self, page: Page) {
        self.wake(page);
    }

    fn merge(&mut self, page: Page, diff: &Diff) {
        let contents = &mut self.frames[page.index as usize].contents;
        diff.apply(contents.get_or_insert_default());
    }

    fn drop(&mut self, page: Page) {
        let frame = &mut self.frames[page.index as usize];
        if frame.contents.is_none() {
            self.wrong = Some("an absent page was dropped");
        }
        *frame = Frame::default();
    }

    fn is_used(&self, page: Page) -> bool {
        self.frames[page.index as usize].used
    }

    fn is_present(&self, page: Page) -> bool {
        self.frames[page.index as usize].contents.is_some()
    }
}

/// A node, with its process.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) engine: Release,
    pub(super) memory: Memory,
    /// What is left of the program.
    pub(super) program: VecDeque<Op>,
    /// Whether the process waits for the answer to a call.
    pub(super) calling: bool,
    /// A call that waits for its release.
    held: Option<Op>,
}

impl PartialEq for Host {
    fn eq(&self, other: &Self) -> bool {
        self.engine.tables == other.engine.tables
            && self.memory == other.memory
            && self.program == other.program
            && (self.calling, self.held) == (other.calling, other.held)
    }
}

impl Eq for Host {}

impl Hash for Host {
    fn hash<H: Hasher>(&self, h: &mut H) {
        (&self.engine.tables, &self.memory).hash(h);
        (&self.program, self.calling, self.held).hash(h);
    }
}

/// From a node to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Told {
    Wrote(Runs),
    Call(Op),
    FindHome(Extent),
}

/// From the coordinator to a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Said {
    Changed(Runs),
    Answer,
    HomeIs(Extent, NodeId),
    BackupIs(Option<NodeId>, bool),
    Left(NodeId),
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The process of a node goes on.
    Run(usize),
    /// A message of a node reaches another.
    Deliver(usize),
    /// The first message on a channel falls behind.
    Overtake(usize),
    /// A node's message reaches the coordinator.
    Tell(usize),
    /// The coordinator's message reaches a node.
    Hear(usize),
    /// A node gives a page up.
    Evict(usize, usize),
    /// A node dies.
    Die(usize),
    /// The last messages of a node that has died are lost.
    Lose(usize),
    /// The coordinator learns of a death.
    Leave(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cluster {
    /// Shared between the states of a search, which differ in one host mostly.
    pub(super) hosts: Vec<Arc<Host>>,
    /// By sender and receiver.
    channels: Vec<VecDeque<(ReleaseMessage, Vec<u8>)>>,
    told: Vec<VecDeque<Told>>,
    said: Vec<VecDeque<Said>>,
    /// What each node has not been told of.
    notices: Vec<RunSet>,
    semaphores: Vec<u32>,
    /// Who waits for a semaphore, and which.
    waiters: VecDeque<(usize, usize)>,
    /// Nodes that have come to the barrier.
    arrived: BTreeSet<usize>,
    home: NodeId,
    /// Of a durable segment.
    backup: Option<NodeId>,
    /// Whether the backup is the first one.
    first: bool,
    /// Whether the segment is durable.
    durable: bool,
    /// Nodes that have died, and the coordinator has not learned of it; and those of which it has.
    dead: BTreeSet<usize>,
    gone: BTreeSet<usize>,
    /// What each node has taken from semaphores and not given back: undone when it dies.
    taken: Vec<BTreeMap<usize, u32>>,
    /// What each node has written since its last release, and what there was before.
    unreleased: Vec<BTreeMap<Variable, BTreeSet<u8>>>,
    /// What variables may be that a node had written which died before it released them.
    unsure: BTreeMap<Variable, BTreeSet<u8>>,
    /// What sequential consistency shows.
    latest: Vec<[u8; PAGE_SIZE]>,
    /// The first thing that was found wrong.
    pub(super) wrong: Option<&'static str>,
    pub(super) mutation: Option<Mutation>,
}

impl Cluster {
    /// A cluster in which node 0 is the home; `found`: the coordinator has to be asked.
    pub(super) fn new(
        programs: &[Vec<Op>],
        pages: usize,
        semaphores: &[u32],
        home: usize,
        found: bool,
    ) -> Self {
        let nodes = programs.len();
        let home = node(home);
        let host = |(index, program): (usize, &Vec<Op>)| {
            let mut engine = Release::new(node(index), PAGE_SIZE);
            engine.add_segment(SEGMENT, pages as u32, (!found).then_some(home));
            let memory = Memory {
                frames: vec![Frame::default(); pages],
                ..Memory::default()
            };
            Arc::new(Host {
                engine,
                memory,
                program: program.iter().copied().collect(),
                calling: false,
                held: None,
            })
        };
        Self {
            hosts: programs.iter().enumerate().map(host).collect(),
            channels: vec![VecDeque::new(); nodes * nodes],
            told: vec![VecDeque::new(); nodes],
            said: vec![VecDeque::new(); nodes],
            notices: vec![RunSet::default(); nodes],
            semaphores: semaphores.to_vec(),
            waiters: VecDeque::new(),
            arrived: BTreeSet::new(),
            home,
            backup: None,
            first: true,
            durable: false,
            dead: BTreeSet::new(),
            gone: BTreeSet::new(),
            taken: vec![BTreeMap::new(); nodes],
            unreleased: vec![BTreeMap::new(); nodes],
            unsure: BTreeMap::new(),
            latest: vec![[0; PAGE_SIZE]; pages],
            wrong: None,
            mutation: None,
        }
    }

    /// A cluster with a durable segment, whose home has a backup; all know who that home is.
    pub(super) fn durable(
        programs: &[Vec<Op>],
        pages: usize,
        semaphores: &[u32],
        home: usize,
    ) -> Self {
        let mut cluster = Self::new(programs, pages, semaphores, home, true);
        cluster.durable = true;
        for (at, host) in cluster.hosts.iter_mut().enumerate() {
            let host = Arc::make_mut(host);
            host.engine = Release::new(node(at), PAGE_SIZE);
            host.engine.add_durable_segment(SEGMENT, pages as u32);
        }
        cluster.choose_backup(true);
        while let Some(step) = cluster
            .steps(false)
            .into_iter()
            .find(|step| matches!(step, Step::Hear(_) | Step::Deliver(_)))
        {
            cluster.take(step);
        }
        let (extent, home) = (EXTENT, Some(cluster.home));
        (0..programs.len()).for_each(|at| cluster.handle(at, Input::HomeIs { extent, home }));
        cluster
    }

    /// Nodes that may die: none before what another death has left to do is done.
    pub(super) fn mortals(&self) -> Vec<usize> {
        let home = usize::from(self.home.0);
        let is_backed = self.backup.is_some_and(|backup| {
            let engine = &self.hosts[home].engine;
            let replicas = &self.hosts[usize::from(backup.0)].engine.tables.replicas;
            engine
                .extent(EXTENT)
                .is_some_and(|e| e.backup == Some(backup))
                && engine.manager_of(EXTENT) == Some(self.home)
                && replicas.get(&EXTENT).is_some_and(Replica::is_complete)
        });
        let alive = (0..self.hosts.len()).filter(|at| !self.gone.contains(at));
        match is_backed && self.dead.is_empty() {
            true => alive.collect(),
            false => Vec::new(),
        }
    }

    fn die(&mut self, at: usize) {
        self.dead.insert(at);
        let host = self.host_mut(at);
        host.program.clear();
        host.calling = false;
        host.held = None;
        host.memory.waiting = None;
        for from in 0..self.hosts.len() {
            let channel = from * self.hosts.len() + at;
            self.channels[channel].clear();
        }
    }

    /// The coordinator takes a node for dead.
    fn leave(&mut self, at: usize) {
        self.dead.remove(&at);
        self.gone.insert(at);
        self.told[at].clear();
        self.said[at].clear();
        self.notices[at] = RunSet::default();
        self.waiters.retain(|(waiter, _)| *waiter != at);
        self.arrived.remove(&at);
        for other in 0..self.hosts.len() {
            if !self.gone.contains(&other) {
                self.said[other].push_back(Said::Left(node(at)));
                self.notices[other].insert(0, self.latest.len() as u32);
            }
        }
        for (variable, mut values) in std::mem::take(&mut self.unreleased[at]) {
            values.insert(self.latest[variable.page][variable.byte]);
            self.unsure.entry(variable).or_default().extend(values);
        }
        if self.home == node(at) {
            self.home = self.backup.take().expect("there is one");
            let blank = std::mem::take(&mut self.first);
            self.choose_backup(blank);
        } else if self.backup == Some(node(at)) {
            (self.backup, self.first) = (None, false);
            self.choose_backup(false);
        }
        for (semaphore, count) in std::mem::take(&mut self.taken[at]) {
            self.semaphores[semaphore] += count;
        }
        self.serve_waiters();
        self.open_barrier();
    }

    /// The home gets a backup.
    fn choose_backup(&mut self, blank: bool) {
        let home = usize::from(self.home.0);
        let nodes = self.hosts.len();
        let others = (1..nodes).map(|distance| (home + distance) % nodes);
        let backup = others.into_iter().find(|at| !self.gone.contains(at));
        self.backup = backup.map(node);
        self.said[home].push_back(Said::BackupIs(self.backup, blank));
    }

    fn open_barrier(&mut self) {
        let nodes = self.hosts.len() - self.gone.len();
        if !self.arrived.is_empty() && self.arrived.len() == nodes {
            let arrived = std::mem::take(&mut self.arrived);
            arrived.into_iter().for_each(|at| self.answer(at));
        }
    }

    /// Whether somebody waits for what cannot come, when nothing can happen any more.
    pub(super) fn is_stuck(&self) -> bool {
        let waits = |host: &Arc<Host>| host.held.is_some() || host.memory.waiting.is_some();
        match self.gone.is_empty() {
            true => !self.is_done(),
            // Who has died raises no semaphore.
            false => self.hosts.iter().any(waits),
        }
    }

    /// The home has touched all pages.
    pub(super) fn touch_all(&mut self) {
        let home = usize::from(self.home.0);
        for frame in &mut self.host_mut(home).memory.frames {
            frame.contents = Some([0; PAGE_SIZE]);
        }
    }

    /// All that can happen next; nodes give up pages if `evict`.
    pub(super) fn steps(&self, evict: bool) -> Vec<Step> {
        let mut steps = Vec::new();
        for (at, host) in self.hosts.iter().enumerate() {
            if !host.calling && host.memory.waiting.is_none() && !host.program.is_empty() {
                steps.push(Step::Run(at));
            }
            if !self.told[at].is_empty() {
                steps.push(Step::Tell(at));
            }
            let is_dead = self.dead.contains(&at);
            if is_dead {
                // It has been silent for long: what it sent has come, or never will.
                let sent = (0..self.hosts.len()).map(|to| at * self.hosts.len() + to);
                let mut open = sent.filter(|&channel| !self.channels[channel].is_empty());
                match open.next() {
                    Some(channel) => steps.push(Step::Lose(channel)),
                    None => steps.push(Step::Leave(at)),
                }
            }
            if !self.said[at].is_empty() && !is_dead {
                steps.push(Step::Hear(at));
            }
            if is_dead || self.gone.contains(&at) {
                continue;
            }
            let here = |frame: &&(usize, &Frame)| frame.1.contents.is_some();
            let frames = host.memory.frames.iter().enumerate();
            if evict {
                steps.extend(
                    frames
                        .filter(|f| here(&f))
                        .map(|(index, _)| Step::Evict(at, index)),
                );
            }
        }
        for (channel, letters) in self.channels.iter().enumerate() {
            if !letters.is_empty() {
                steps.push(Step::Deliver(channel));
            }
            if letters.len() > 1 && self.mutation == Some(Mutation::Reorder) {
                steps.push(Step::Overtake(channel));
            }
        }
        steps
    }

    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Run(at) => self.run(at),
            Step::Deliver(channel) => self.deliver(channel),
            Step::Overtake(channel) => self.channels[channel].rotate_left(1),
            Step::Tell(at) => self.tell(at),
            Step::Hear(at) => self.hear(at),
            Step::Die(at) => self.die(at),
            Step::Lose(channel) => self.channels[channel].clear(),
            Step::Leave(at) => self.leave(at),
            Step::Evict(at, index) => self.handle(at, Input::Evict { page: page(index) }),
        }
        self.check_mappings();
    }

    fn host_mut(&mut self, at: usize) -> &mut Host {
        Arc::make_mut(&mut self.hosts[at])
    }

    /// Whether all programs are at their end.
    pub(super) fn is_done(&self) -> bool {
        self.hosts
            .iter()
            .all(|host| host.program.is_empty() && !host.calling)
    }

    fn run(&mut self, at: usize) {
        let Some(&op) = self.hosts[at].program.front() else {
            return;
        };
        match op {
            Op::Write(variable, value) => {
                if !self.touch(at, variable.page, Access::Write) {
                    return;
                }
                let frame = &mut self.host_mut(at).memory.frames[variable.page];
                frame.contents.get_or_insert_default()[variable.byte] = value;
                if self.durable {
                    let before = self.latest[variable.page][variable.byte];
                    let unsure = self.unsure.remove(&variable);
                    let values = self.unreleased[at].entry(variable).or_default();
                    values.extend(unsure.unwrap_or_else(|| BTreeSet::from([before])));
                }
                self.latest[variable.page][variable.byte] = value;
            }
            Op::Read(variable) => {
                if !self.touch(at, variable.page, Access::Read) {
                    return;
                }
                let frame = &self.hosts[at].memory.frames[variable.page];
                let read = frame.contents.unwrap_or_default()[variable.byte];
                if let Some(values) = self.unsure.remove(&variable)
                    && values.contains(&read)
                {
                    // Whatever it is, all see the same from now on.
                    self.latest[variable.page][variable.byte] = read;
                }
                if read != self.latest[variable.page][variable.byte] {
                    self.wrong = Some(STALE_READ);
                }
            }
            // It learns, and changes nothing that others could see of its writes.
            Op::Wait(_) => {
                self.host_mut(at).calling = true;
                self.told[at].push_back(Told::Call(op));
            }
            Op::Post(_) | Op::Barrier => {
                let host = self.host_mut(at);
                host.calling = true;
                host.held = Some(op);
                self.handle(at, Input::Release);
            }
        }
        self.host_mut(at).program.pop_front();
    }

    /// The process touches a page; whether it could at once.
    fn touch(&mut self, at: usize, index: usize, access: Access) -> bool {
        let granted = self.hosts[at].engine.access(page(index));
        let frame = &mut self.host_mut(at).memory.frames[index];
        if granted >= Some(access) {
            if frame.contents.is_none() {
                frame.contents = Some([0; PAGE_SIZE]);
                frame.protected = granted == Some(Access::Read);
            }
            frame.protected &= access == Access::Read;
            frame.used = true;
            return true;
        }
        if frame.contents.is_some() && access == Access::Read {
            self.wrong = Some("a page is here that the engine does not know of");
        }
        self.host_mut(at).memory.waiting = Some((index, access));
        let page = page(index);
        self.handle(at, Input::Fault { page, access });
        false
    }

    fn deliver(&mut self, channel: usize) {
        let (from, to) = (channel / self.hosts.len(), channel % self.hosts.len());
        let Some((mut message, data)) = self.channels[channel].pop_front() else {
            return;
        };
        self.break_before(to, &message);
        let twins = self.hosts[to].engine.tables.twins.clone();
        let wrote = self.hosts[to].engine.tables.wrote.clone();
        let kept = match (self.mutation, &mut message) {
            (
                Some(Mutation::IgnoreMerged | Mutation::TakeAtOnce | Mutation::IgnoreBackup),
                ReleaseMessage::Merged { number, .. },
            ) if !self.hosts[to].engine.tables.unmerged.contains_key(number) => return,
            (Some(Mutation::TakeOldCopies), ReleaseMessage::Copies { number, pages, .. }) => {
                let page = page(pages[0].0 as usize);
                let pending = self.hosts[to].engine.tables.pending.get(&page);
                *number = pending.map_or(*number, |pending| pending.number);
                false
            }
            (Some(Mutation::KeepTwinAtFetch), ReleaseMessage::Fetch { .. }) => true,
            _ => false,
        };
        let from = node(from);
        self.handle(
            to,
            Input::Message {
                from,
                message,
                data,
            },
        );
        if kept {
            let tables = &mut self.host_mut(to).engine.tables;
            (tables.twins, tables.wrote) = (twins, wrote);
        }
    }

    /// What is broken about the receiver before a message reaches it.
    fn break_before(&mut self, to: usize, message: &ReleaseMessage) {
        let me = node(to);
        match (self.mutation, message) {
            (Some(Mutation::ForgetLoan), ReleaseMessage::Fetch { pages, .. }) => {
                let engine = &mut self.host_mut(to).engine;
                for &index in pages {
                    if engine.manages(page(index as usize)) {
                        engine.record_mut(page(index as usize)).borrower = None;
                    }
                }
            }
            (Some(Mutation::OfferToAny), ReleaseMessage::Diffs { pages, .. }) => {
                let engine = &mut self.host_mut(to).engine;
                for &(index, _) in pages {
                    let page = page(index as usize);
                    let copies = (0..8).map(node).filter(|&node| node != me).collect();
                    engine
                        .extent_mut(page.extent())
                        .copies
                        .set(copies, index as usize, 2);
                }
            }
            (Some(Mutation::TakeDropped), ReleaseMessage::Merged { offered, .. }) => {
                let host = self.host_mut(to);
                for &index in offered {
                    let page = page(index as usize);
                    if host.engine.line(page).state == State::Absent {
                        host.engine.tables.pending.remove(&page);
                        host.engine.line_mut(page).state = State::Clean;
                        host.memory.frames[index as usize].contents = Some([0; PAGE_SIZE]);
                    }
                }
            }
            _ => {}
        }
    }

    fn handle(&mut self, at: usize, input: Input) {
        let dropping = matches!(input, Input::Changed { .. } | Input::Evict { .. });
        let mut actions = Vec::new();
        let forgets = self.mutation == Some(Mutation::ForgetOrphans);
        let forgets = forgets && matches!(input, Input::Left { .. });
        let Host { engine, memory, .. } = self.host_mut(at);
        engine.handle(input, memory, &mut actions);
        if forgets {
            engine.tables.orphans.clear();
            engine.complete_releases(&mut actions);
        }
        for action in actions {
            self.execute(at, action, dropping);
        }
    }

    fn execute(&mut self, at: usize, action: Action, dropping: bool) {
        match action {
            Action::Send { to, message, data } => self.send(at, to, message, data, dropping),
            Action::FindHome { extent } => self.told[at].push_back(Told::FindHome(extent)),
            Action::Released { wrote } => {
                let runs = wrote.into_iter().flat_map(|(_, runs)| runs).collect();
                let Some(call) = self.host_mut(at).held.take() else {
                    self.wrong = Some("nothing was to be released");
                    return;
                };
                let mut told = vec![Told::Wrote(runs), Told::Call(call)];
                match self.mutation {
                    Some(Mutation::NoNotices) => drop(told.remove(0)),
                    Some(Mutation::LateNotices) => told.reverse(),
                    _ => {}
                }
                self.told[at].extend(told);
            }
            Action::Fail { .. } => self.wrong = Some("a fault failed"),
            Action::Lost { .. } => self.wrong = Some("an extent is lost"),
        }
    }

    fn send(
        &mut self,
        at: usize,
        to: NodeId,
        mut message: ReleaseMessage,
        mut data: Vec<u8>,
        dropping: bool,
    ) {
        if to == node(at) {
            self.wrong = Some("a message to itself");
            return;
        }
        if let (Some(Mutation::ReturnOld), ReleaseMessage::Returned { zeros, .. }) =
            (self.mutation, &mut message)
        {
            *zeros = true;
            data.clear();
        }
        let mut early = None;
        if let (
            Some(Mutation::TakeAtOnce),
            &ReleaseMessage::Taken {
                segment, number, ..
            },
        ) = (self.mutation, &message)
        {
            early = Some(ReleaseMessage::Merged {
                segment,
                number,
                shared: Vec::new(),
                offered: Vec::new(),
            });
        }
        if let ReleaseMessage::Diffs {
            segment,
            number,
            pages,
        } = &mut message
        {
            let merged = |shared| ReleaseMessage::Merged {
                segment: *segment,
                number: *number,
                shared,
                offered: Vec::new(),
            };
            match self.mutation {
                Some(Mutation::IgnoreMerged) => {
                    early = Some(merged(pages.iter().map(|(page, _)| *page).collect()));
                }
                Some(Mutation::LoseDropped) if dropping => {
                    let from = to;
                    let message = merged(Vec::new());
                    let data = Vec::new();
                    return self.handle(
                        at,
                        Input::Message {
                            from,
                            message,
                            data,
                        },
                    );
                }
                Some(Mutation::ForgetEvicted) if dropping => early = Some(merged(Vec::new())),
                Some(Mutation::WholePages) => {
                    data.clear();
                    for (index, length) in pages {
                        let twin = &self.hosts[at].engine.tables.twins[&page(*index as usize)];
                        let none: Vec<u8> = twin.bytes.iter().map(|byte| !byte).collect();
                        let diff = Diff::between(&none, &twin.bytes).expect("they differ");
                        *length = diff.as_bytes().len() as u32;
                        data.extend(diff.as_bytes());
                    }
                }
                _ => {}
            }
        }
        if let (Some(Mutation::IgnoreBackup), ReleaseMessage::Replicate { number, .. }) =
            (self.mutation, &message)
        {
            early = Some(ReleaseMessage::Merged {
                segment: SEGMENT,
                number: *number,
                shared: Vec::new(),
                offered: Vec::new(),
            });
        }
        let channel = at * self.hosts.len() + usize::from(to.0);
        let to_dead = usize::from(to.0);
        if !self.dead.contains(&to_dead) && !self.gone.contains(&to_dead) {
            self.channels[channel].push_back((message, data));
        }
        if let Some(message) = early {
            let from = to;
            let data = Vec::new();
            self.handle(
                at,
                Input::Message {
                    from,
                    message,
                    data,
                },
            );
        }
    }

    /// The coordinator handles a node's next message.
    fn tell(&mut self, at: usize) {
        match self.told[at].pop_front() {
            Some(Told::Wrote(runs)) => {
                for (other, notices) in self.notices.iter_mut().enumerate() {
                    if other != at {
                        runs.iter()
                            .for_each(|&(first, count)| notices.insert(first, count));
                    }
                }
            }
            Some(Told::Call(Op::Wait(semaphore))) => {
                self.waiters.push_back((at, semaphore));
                self.serve_waiters();
            }
            Some(Told::Call(Op::Post(semaphore))) => {
                self.unreleased[at].clear();
                if let Some(taken) = self.taken[at].get_mut(&semaphore) {
                    *taken = taken.saturating_sub(1);
                }
                self.semaphores[semaphore] += 1;
                self.answer(at);
                self.serve_waiters();
            }
            Some(Told::Call(Op::Barrier)) => {
                self.unreleased[at].clear();
                self.arrived.insert(at);
                self.open_barrier();
            }
            Some(Told::FindHome(extent)) => {
                self.said[at].push_back(Said::HomeIs(extent, self.home));
            }
            Some(Told::Call(_)) | None => {}
        }
    }

    fn serve_waiters(&mut self) {
        let mut still = VecDeque::new();
        while let Some((at, semaphore)) = self.waiters.pop_front() {
            if self.semaphores[semaphore] > 0 {
                self.semaphores[semaphore] -= 1;
                if self.durable {
                    *self.taken[at].entry(semaphore).or_default() += 1;
                }
                self.answer(at);
            } else {
                still.push_back((at, semaphore));
            }
        }
        self.waiters = still;
    }

    fn answer(&mut self, at: usize) {
        let notices = std::mem::take(&mut self.notices[at]);
        if !notices.is_empty() {
            self.said[at].push_back(Said::Changed(notices.runs()));
        }
        self.said[at].push_back(Said::Answer);
    }

    fn hear(&mut self, at: usize) {
        match self.said[at].pop_front() {
            Some(Said::Changed(pages)) => {
                let segment = SEGMENT;
                self.handle(at, Input::Changed { segment, pages });
            }
            Some(Said::Answer) => self.host_mut(at).calling = false,
            Some(Said::HomeIs(extent, home)) => {
                let home = Some(home);
                self.handle(at, Input::HomeIs { extent, home });
            }
            Some(Said::BackupIs(backup, blank)) => {
                let extent = EXTENT;
                self.handle(
                    at,
                    Input::BackupIs {
                        extent,
                        backup,
                        blank,
                    },
                );
            }
            Some(Said::Left(node)) => {
                let channel = usize::from(node.0) * self.hosts.len() + at;
                self.channels[channel].clear();
                self.handle(at, Input::Left { node });
            }
            None => {}
        }
    }

    /// Processes can do no more than their engine believes.
    fn check_mappings(&mut self) {
        for (at, host) in self.hosts.iter().enumerate() {
            if self.dead.contains(&at) || self.gone.contains(&at) {
                continue;
            }
            for (index, frame) in host.memory.frames.iter().enumerate() {
                let can = frame.contents.map(|_| match frame.protected {
                    true => Access::Read,
                    false => Access::Write,
                });
                if can > host.engine.access(page(index)) {
                    self.wrong = Some("a process can do what its engine does not know of");
                }
            }
            if host.memory.wrong.is_some() {
                self.wrong = host.memory.wrong;
            }
            if host.engine.counters().protocol_errors > 0 {
                self.wrong = Some("a message that no correct peer sends");
            }
        }
    }
}

/// What [`Cluster::wrong`] is when a process has read what sequential consistency would not show.
pub(super) const STALE_READ: &str = "a read that sequential consistency would not show";
