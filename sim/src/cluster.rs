//! The cluster: hosts that handle one thing after the other, and what is under way between them.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};

use migshm_coherence::{
    Action, Body, Carry, Config, Engine, Fill, Footprint, HomePolicy, Input, Lock, Memory, PageSet,
    Push, Time,
};
use migshm_coordinator::{Core, Output};
use migshm_protocol::call::{Answer, Call, Caller, SemBuf, SetMemory};
use migshm_protocol::control::{FromCoordinator, Placement, SetState, ToCoordinator};
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::page::{Access, Contents, PageMessage};
use migshm_protocol::{Extent, NodeId, Page, ProcessId, SegmentId, codec};
use rustc_hash::FxHashMap;

use crate::network::{Costs, Links};
use crate::workload::{SEMAPHORES, Step, Workload, unlock};

/// The ids of the only segment and the only set: the first ones that there are.
const SHMID: i32 = 0;
const SEMID: i32 = 0;
const KEY: i32 = 1;
const CREATE: i32 = 0o1600;

/// Which write made a page's contents; 0 for none.
type Version = u32;

/// A cluster, and what has been counted since its programs started.
pub struct Cluster {
    workload: Workload,
    costs: Costs,
    now: Time,
    events: BinaryHeap<Reverse<Event>>,
    /// Events so far: of two at the same time the older one is first.
    number: u64,
    nodes: Vec<Node>,
    core: Core,
    /// By host: the nodes, and the coordinator after them.
    stations: Vec<Station>,
    links: Links,
    /// By page: the last write.
    latest: Vec<Version>,
    started: Time,
    counts: Counts,
}

/// What has been counted.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// [`Step::Count`].
    pub operations: u64,
    /// Messages between nodes.
    pub messages: u64,
    /// Bytes of those, frames and pages included.
    pub bytes: u64,
    /// Messages from and to the coordinator.
    pub control_messages: u64,
    /// Bytes of those.
    pub control_bytes: u64,
    /// `semop` calls, also those that were done without a message.
    pub semops: u64,
    /// Nanoseconds of each fault, by what was wanted.
    pub reads: Vec<Time>,
    /// See `reads`.
    pub writes: Vec<Time>,
}

/// A node: its daemon and its process.
struct Node {
    id: NodeId,
    segment: SegmentId,
    /// Of the segment.
    pages: u32,
    engine: Engine<Version>,
    policy: HomePolicy,
    carry: Carry,
    /// What the pages here contain.
    frames: FxHashMap<u32, Version>,
    /// The delegated sets, and the numbers of their delegations.
    sets: FxHashMap<i32, (u64, SetState)>,
    calls: u64,
    timeout: Option<Time>,
    program: Box<dyn Iterator<Item = Step>>,
    waits: Waits,
    since: Time,
}

/// What a process waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Waits {
    Nothing,
    Page(u32, Access),
    Answer,
}

/// A host's processor and what waits for it.
#[derive(Default)]
struct Station {
    inbox: VecDeque<Work>,
    is_serving: bool,
    free: Time,
    handled: u64,
    busy: Time,
}

/// What a host handles.
enum Work {
    Page(NodeId, PageMessage, Option<Version>),
    Up(NodeId, ToCoordinator, Vec<u8>),
    Down(FromCoordinator),
    Fault(u32, Access),
    Call(Call, Vec<u8>),
    Timeout,
}

/// Something that a host has to send.
enum Letter {
    Page(NodeId, PageMessage, Option<Version>),
    Up(ToCoordinator, Vec<u8>),
    Down(Output),
}

struct Event {
    time: Time,
    number: u64,
    what: Happening,
}

enum Happening {
    Arrives(usize, Work),
    /// The host handles what is next.
    Serves(usize),
    /// The process goes on.
    Resumes(usize),
    Timeout(usize),
}

/// Nothing was written while a node was alone.
struct Fresh;

impl Memory for Fresh {
    fn present(&self, _: Extent) -> PageSet {
        PageSet::new()
    }
}

impl Cluster {
    /// A cluster whose nodes have attached the workload's segment.
    ///
    /// # Panics
    ///
    /// If they cannot.
    #[must_use]
    pub fn new(nodes: usize, workload: Workload, seed: u64, costs: Costs) -> Self {
        let pages = workload.pages(nodes);
        let bytes = u64::from(pages) * PAGE_SIZE as u64;
        // A segment that does not fit its first user has the homes of its extents spread.
        let memory = |node| match node {
            0 if workload.has_spread_homes() => PAGE_SIZE as u64,
            _ => 2 * bytes,
        };
        let mut core = Core::new();
        for node in 0..nodes {
            let address = "127.0.0.1:1".parse().expect("an address");
            core.join(
                format!("node{node}"),
                address,
                memory(node),
                &mut Vec::new(),
            )
            .expect("there is room");
        }
        let mut cluster = Self {
            workload,
            costs,
            now: 1_000_000_000,
            events: BinaryHeap::new(),
            number: 0,
            nodes: (0..nodes).map(|node| Node::new(node, pages)).collect(),
            core,
            stations: (0..=nodes).map(|_| Station::default()).collect(),
            links: Links::new(nodes + 1, seed, costs),
            latest: vec![0; pages as usize],
            started: 0,
            counts: Counts::default(),
        };
        cluster.set_up(bytes);
        cluster
    }

    /// The first node makes the objects; then all attach.
    fn set_up(&mut self, bytes: u64) {
        let create = [
            Call::ShmGet {
                key: KEY,
                size: bytes,
                flags: CREATE,
                consistency: None,
            },
            Call::SemGet {
                key: KEY,
                count: SEMAPHORES,
                flags: CREATE,
            },
        ];
        for call in create {
            self.call(0, call, Vec::new());
        }
        self.call(0, semop(), unlock().to_bytes().to_vec());
        for node in 0..self.nodes.len() {
            let attach = Call::ShmAttach {
                id: SHMID,
                flags: 0,
            };
            self.call(node, attach, Vec::new());
        }
    }

    fn call(&mut self, node: usize, call: Call, raw: Vec<u8>) {
        self.nodes[node].waits = Waits::Answer;
        self.arrives(self.now, node, Work::Call(call, raw));
        self.settle();
        assert_eq!(self.nodes[node].waits, Waits::Nothing, "no answer");
    }

    /// Runs the programs to their end.
    ///
    /// # Panics
    ///
    /// If a protocol gets stuck, a message makes no sense, or a read returns something old.
    pub fn run(&mut self, program: impl Fn(usize) -> Box<dyn Iterator<Item = Step>>) {
        self.counts = Counts::default();
        for station in &mut self.stations {
            (station.handled, station.busy) = (0, 0);
        }
        self.started = self.now;
        for node in 0..self.nodes.len() {
            self.nodes[node].program = program(node);
            self.at(self.now, Happening::Resumes(node));
        }
        self.settle();
        for (node, state) in self.nodes.iter_mut().enumerate() {
            assert_eq!(state.waits, Waits::Nothing, "node {node} waits for ever");
            assert!(state.program.next().is_none(), "node {node} is stuck");
            assert_eq!(state.engine.counters().protocol_errors, 0, "node {node}");
        }
        assert_eq!(self.core.protocol_errors(), 0);
    }

    /// Nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no nodes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// What has been counted.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Nanoseconds that the programs took.
    #[must_use]
    pub fn duration(&self) -> Time {
        self.now - self.started
    }

    /// How much each node's daemon has handled, and for how long it was busy; last the
    /// coordinator.
    pub fn loads(&self) -> impl DoubleEndedIterator<Item = (u64, Time)> {
        self.stations.iter().map(|s| (s.handled, s.busy))
    }

    /// What all engines keep.
    #[must_use]
    pub fn footprint(&self) -> Footprint {
        let each = self.nodes.iter().map(|node| node.engine.footprint());
        each.fold(Footprint::default(), |all, one| Footprint {
            touched: all.touched + one.touched,
            directory: all.directory + one.directory,
            lines: all.lines + one.lines,
        })
    }

    fn settle(&mut self) {
        while let Some(Reverse(Event { time, what, .. })) = self.events.pop() {
            self.now = time;
            match what {
                Happening::Arrives(host, work) => {
                    self.stations[host].inbox.push_back(work);
                    self.serve_later(host);
                }
                Happening::Serves(host) => self.serve(host),
                Happening::Resumes(node) => self.resume(node),
                Happening::Timeout(node) => {
                    if self.nodes[node].timeout == Some(time) {
                        self.nodes[node].timeout = None;
                        self.arrives(time, node, Work::Timeout);
                    }
                }
            }
        }
    }

    fn at(&mut self, time: Time, what: Happening) {
        self.number += 1;
        let number = self.number;
        self.events.push(Reverse(Event { time, number, what }));
    }

    fn arrives(&mut self, time: Time, host: usize, work: Work) {
        self.at(time, Happening::Arrives(host, work));
    }

    fn serve_later(&mut self, host: usize) {
        let station = &mut self.stations[host];
        if !station.is_serving && !station.inbox.is_empty() {
            station.is_serving = true;
            let time = station.free.max(self.now);
            self.at(time, Happening::Serves(host));
        }
    }

    /// A host handles one thing; what it sends leaves one after the other.
    fn serve(&mut self, host: usize) {
        let station = &mut self.stations[host];
        station.is_serving = false;
        let Some(work) = station.inbox.pop_front() else {
            return;
        };
        station.handled += 1;
        let letters = match self.nodes.get_mut(host) {
            Some(node) => {
                let letters = node.handle(self.now, work);
                self.set_timer(host);
                letters
            }
            None => self.coordinate(work),
        };
        let mut time = self.now + self.costs.receive;
        for letter in letters {
            time += self.costs.send;
            self.send(time, host, letter);
        }
        self.stations[host].free = time;
        self.stations[host].busy += time - self.now;
        if host < self.nodes.len() {
            self.at(time, Happening::Resumes(host));
        }
        self.serve_later(host);
    }

    fn set_timer(&mut self, host: usize) {
        let Some(due) = self.nodes[host].engine.next_timeout() else {
            return;
        };
        let due = due.max(self.now + 1);
        if self.nodes[host].timeout.is_none_or(|set| due < set) {
            self.nodes[host].timeout = Some(due);
            self.at(due, Happening::Timeout(host));
        }
    }

    fn coordinate(&mut self, work: Work) -> Vec<Letter> {
        let Work::Up(from, message, raw) = work else {
            return Vec::new();
        };
        let mut out = Vec::new();
        let seconds = (self.now / 1_000_000_000) as i64;
        self.core.handle(seconds, from, message, &raw, &mut out);
        out.into_iter().map(Letter::Down).collect()
    }

    fn send(&mut self, time: Time, from: usize, letter: Letter) {
        let coordinator = self.nodes.len();
        let (to, bytes, work) = match letter {
            Letter::Page(to, message, contents) => {
                let bytes = size(&message, &[]) + contents.map_or(0, |_| PAGE_SIZE);
                let sender = NodeId(from as u16);
                (
                    usize::from(to.0),
                    bytes,
                    Work::Page(sender, message, contents),
                )
            }
            Letter::Up(message, raw) => {
                let bytes = size(&message, &raw);
                (
                    coordinator,
                    bytes,
                    Work::Up(NodeId(from as u16), message, raw),
                )
            }
            Letter::Down(Output { to, message, raw }) => {
                let bytes = size(&message, &raw);
                (usize::from(to.0), bytes, Work::Down(message))
            }
        };
        if let Work::Page(..) = work {
            self.counts.messages += 1;
            self.counts.bytes += bytes as u64;
        } else {
            self.counts.control_messages += 1;
            self.counts.control_bytes += bytes as u64;
        }
        let arrival = self.links.arrival(time, from, to, bytes);
        self.arrives(arrival, to, work);
    }

    /// The process goes on until it has to wait.
    fn resume(&mut self, node: usize) {
        loop {
            match self.nodes[node].waits {
                Waits::Nothing => {}
                Waits::Answer => return,
                Waits::Page(page, access) => {
                    if !self.has_touched(node, page, access) {
                        return;
                    }
                    self.nodes[node].waits = Waits::Nothing;
                    let took = self.now - self.nodes[node].since;
                    match access {
                        Access::Read => self.counts.reads.push(took),
                        Access::Write => self.counts.writes.push(took),
                    }
                }
            }
            match self.nodes[node].program.next() {
                None => return,
                Some(Step::Count) => self.counts.operations += 1,
                Some(Step::Compute(time)) => {
                    return self.at(self.now + time, Happening::Resumes(node));
                }
                Some(Step::Operate(op)) => {
                    self.counts.semops += 1;
                    if !self.nodes[node].operate(op) {
                        self.nodes[node].waits = Waits::Answer;
                        let raw = op.to_bytes().to_vec();
                        self.arrives(self.now, node, Work::Call(semop(), raw));
                    }
                }
                Some(Step::Touch(page, access)) => {
                    if !self.has_touched(node, page, access) {
                        self.nodes[node].since = self.now;
                        self.nodes[node].waits = Waits::Page(page, access);
                        self.arrives(self.now, node, Work::Fault(page, access));
                    }
                }
            }
        }
    }

    /// Touches a page, if the node may; checks what is read, and writes.
    fn has_touched(&mut self, node: usize, index: u32, access: Access) -> bool {
        let Node {
            engine,
            frames,
            segment,
            ..
        } = &mut self.nodes[node];
        let page = Page {
            segment: *segment,
            index,
        };
        if engine.access(page) < Some(access) {
            return false;
        }
        let latest = &mut self.latest[index as usize];
        assert_eq!(
            frames.get(&index),
            Some(&*latest),
            "node {node} reads old data"
        );
        if access == Access::Write {
            *latest += 1;
            frames.insert(index, *latest);
        }
        true
    }

    /// What is run.
    #[must_use]
    pub fn workload(&self) -> Workload {
        self.workload
    }
}

impl Node {
    fn new(node: usize, pages: u32) -> Self {
        let id = NodeId(node as u16);
        Self {
            id,
            segment: SegmentId(0),
            pages,
            engine: Engine::new(id, Config::default()),
            policy: HomePolicy::default(),
            carry: Carry::default(),
            frames: FxHashMap::default(),
            sets: FxHashMap::default(),
            calls: 0,
            timeout: None,
            program: Box::new(std::iter::empty()),
            waits: Waits::Nothing,
            since: 0,
        }
    }

    /// An operation in memory, if the set is delegated to this node and it need not wait.
    fn operate(&mut self, op: SemBuf) -> bool {
        let Some((_, state)) = self.sets.get_mut(&SEMID) else {
            return false;
        };
        let value = &mut state.values[usize::from(op.num)];
        match value.checked_add_signed(op.op) {
            Some(result) if op.op != 0 => {
                *value = result;
                true
            }
            _ => op.op == 0 && *value == 0,
        }
    }

    fn handle(&mut self, now: Time, work: Work) -> Vec<Letter> {
        let mut letters = Vec::new();
        match work {
            Work::Page(from, message, data) => {
                self.count_request(&message, &mut letters);
                if let PageMessage::Invalidate { page, requester } = message {
                    self.carry.taken(page, Access::Write, requester, now);
                }
                let input = Input::Message {
                    from,
                    message,
                    data,
                };
                self.drive(now, input, &mut letters);
            }
            Work::Fault(index, access) => {
                let page = Page {
                    segment: self.segment,
                    index,
                };
                self.drive(now, Input::Fault { page, access }, &mut letters);
            }
            Work::Timeout => self.drive(now, Input::Timeout, &mut letters),
            Work::Call(call, raw) => {
                if let Call::SemOp { id, .. } = call {
                    self.give_back(id, &mut letters);
                    self.push_pages(now, id, &raw, &mut letters);
                }
                self.calls += 1;
                let message = ToCoordinator::Call {
                    id: self.calls,
                    caller: caller(),
                    call,
                };
                letters.push(Letter::Up(message, raw));
            }
            Work::Down(message) => self.hear(now, message, &mut letters),
            Work::Up(..) => {}
        }
        letters
    }

    /// As the daemon does: the home of an extent follows its use.
    fn count_request(&mut self, message: &PageMessage, letters: &mut Vec<Letter>) {
        let &PageMessage::Request {
            page, requester, ..
        } = message
        else {
            return;
        };
        let extent = page.extent();
        if self.engine.is_home(extent)
            && let Some(to) = self.policy.record(extent, requester)
        {
            letters.push(up(ToCoordinator::ProposeHome { extent, to }));
        }
    }

    /// As the daemon does: what others always take after a release goes to them at once.
    fn push_pages(&mut self, now: Time, set: i32, raw: &[u8], letters: &mut Vec<Letter>) {
        let ops = SemBuf::parse_all(raw).unwrap_or_default();
        let Some(raised) = ops.iter().find(|op| op.op > 0) else {
            return;
        };
        let lock = Lock::Semaphore(set, raised.num);
        let can_push = |page, access| self.engine.can_push(page, access);
        for Push { page, access, to } in self.carry.released(lock, now, can_push) {
            self.drive(now, Input::Push { page, access, to }, letters);
        }
    }

    fn note_taken(&mut self, now: Time, to: NodeId, message: &PageMessage) {
        if let PageMessage::Grant {
            page,
            access,
            contents: Contents::Bytes | Contents::Yours,
            pushed: false,
            ..
        } = *message
        {
            self.carry.taken(page, access, to, now);
        }
    }

    fn hear(&mut self, now: Time, message: FromCoordinator, letters: &mut Vec<Letter>) {
        match message {
            FromCoordinator::Answer {
                outcome, placement, ..
            } => {
                let answer = outcome.expect("the call is right");
                if let Answer::Attached(attachment) = answer {
                    self.segment = attachment.segment;
                }
                if let Some(Placement::Shared { default_home }) = placement {
                    self.track(default_home);
                }
                self.waits = Waits::Nothing;
            }
            FromCoordinator::Share { segment } => {
                self.track(Some(self.id));
                letters.push(up(ToCoordinator::Sharing { segment }));
            }
            FromCoordinator::HomeIs {
                extent,
                home,
                orphaned,
            } => {
                let input = Input::HomeIs {
                    extent,
                    home,
                    orphaned,
                };
                self.drive(now, input, letters);
            }
            FromCoordinator::MoveHome { extent, to } => {
                self.policy.forget(extent);
                self.drive(now, Input::MoveHome { extent, to }, letters);
            }
            FromCoordinator::Delegated {
                set, number, state, ..
            } => {
                self.sets.insert(set, (number, state));
                self.waits = Waits::Nothing;
            }
            FromCoordinator::Recall { set, number }
                if self.sets.get(&set).is_some_and(|(of, _)| *of == number) =>
            {
                self.give_back(set, letters);
            }
            _ => {}
        }
    }

    fn track(&mut self, default_home: Option<NodeId>) {
        self.engine
            .add_segment(self.segment, self.pages, default_home);
    }

    /// Returns a set to the coordinator, if it is delegated to this node.
    fn give_back(&mut self, set: i32, letters: &mut Vec<Letter>) {
        if let Some((number, state)) = self.sets.remove(&set) {
            letters.push(up(ToCoordinator::Returned { set, number, state }));
        }
    }

    fn drive(&mut self, now: Time, input: Input<Version>, letters: &mut Vec<Letter>) {
        let mut actions = Vec::new();
        self.engine.handle(now, input, &Fresh, &mut actions);
        for action in actions {
            match action {
                Action::Send { to, message, body } => {
                    let contents = match body {
                        Body::None => None,
                        Body::Data(version) => Some(version),
                        Body::Page(page) => Some(self.frames[&page.index]),
                    };
                    self.note_taken(now, to, &message);
                    letters.push(Letter::Page(to, message, contents));
                }
                Action::Install { page, contents, .. } => {
                    let version = match contents {
                        Fill::Data(version) => version,
                        Fill::Zeros => 0,
                        Fill::InPlace => continue,
                    };
                    self.frames.insert(page.index, version);
                }
                Action::Drop { page } => {
                    self.frames.remove(&page.index);
                }
                Action::FindHome { extent } => letters.push(up(ToCoordinator::FindHome { extent })),
                Action::BecameHome { extent } => {
                    letters.push(up(ToCoordinator::HomeMoved { extent }));
                }
                Action::Fail { page } => panic!("no memory for page {page}"),
                Action::Flush { .. } | Action::Flushed { .. } | Action::Lost { .. } => {
                    panic!("nobody dies")
                }
                Action::Protect { .. } => {}
            }
        }
    }
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.time, self.number).cmp(&(other.time, other.number))
    }
}

fn up(message: ToCoordinator) -> Letter {
    Letter::Up(message, Vec::new())
}

fn semop() -> Call {
    Call::SemOp {
        id: SEMID,
        memory: SetMemory::Wanted,
    }
}

/// The process of a node.
fn caller() -> Caller {
    Caller {
        process: ProcessId(1),
        pid: 1000,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        capabilities: 0,
        memlock: None,
    }
}

/// Bytes of a frame, without page contents.
fn size<T: serde::Serialize>(message: &T, raw: &[u8]) -> usize {
    let mut frame = Vec::new();
    codec::encode_frame(message, raw, &mut frame).expect("it fits");
    frame.len()
}
