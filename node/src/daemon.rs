//! The daemon's state, and what happens to it.
//!
//! Everything lives on one thread: the sockets of local processes, the userfaultfds, the timer,
//! the QUIC links. A fault's way from the userfaultfd to the packet, and from the packet back
//! into the page tables, crosses no other thread, takes no lock and waits for nothing. [`Node`]
//! is therefore plain data behind a `RefCell`; the tasks of `tasks` wait for something to
//! happen, tell it to the node in one synchronous call, and wait again. What a call leads to
//! (an embedded coordinator's answers, faults found on the way) queues up inside and is done
//! before it returns ([`Node::settle`]).
//!
//! The rest of `impl Node` is by subject: processes and their calls in `calls`, segments and pages
//! in `pages`.

use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use migshm_coherence::release::{Input as ReleaseInput, Release};
use migshm_coherence::{
    AccessLog, Action, Carry, Config as CoherenceConfig, Engine, HomePolicy, Prefetcher, Time,
};
use migshm_coordinator::{Core, Output};
use migshm_protocol::call::{
    Attachment, Call, Caller, Consistency, Errno, Memlock, Outcome, SetMemory,
};
use migshm_protocol::control::{FromCoordinator, Member, Placement, ToCoordinator};
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::local::Pieces;
use migshm_protocol::page::PeerMessage;
use migshm_protocol::{Extent, NodeId, ProcessId, SegmentId};
use migshm_transport::{Endpoint, FrameSender};
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::cached::Cached;
use crate::delegation::LEASE;
use crate::exits::Exits;
use crate::handover::descriptor;
use crate::local::{Sender, Socket};
use crate::membership::Remote;
use crate::memory::{AttachId, Memory, SpaceId, View};
use crate::readers::Turns;
use crate::release::Outbox;
use crate::sets::Sets;
use crate::spin::Spin;
use crate::start;
use crate::tasks::Timer;

/// The node, shared by the tasks of its one thread.
pub type Shared = Rc<RefCell<Node>>;

/// A connection of a local process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConnectionId(pub u64);

/// The node daemon's state. What is not handed over to a daemon that takes this one's place is made anew
/// there ([`crate::handover`]).
#[derive(Serialize, Deserialize)]
pub struct Node {
    #[serde(skip)]
    pub(crate) this: Weak<RefCell<Node>>,
    pub(crate) name: String,
    pub(crate) id: NodeId,
    pub(crate) epoch: u64,
    /// Bytes of memory this node gives to the cluster.
    pub(crate) budget: u64,
    /// `/dev/userfaultfd`, where it may be used.
    #[serde(skip)]
    pub(crate) device: Option<File>,
    pub(crate) memory: Memory,
    pub(crate) engine: Engine<Bytes>,
    pub(crate) policy: HomePolicy,
    /// What travels with which lock.
    pub(crate) carry: Carry,
    pub(crate) prefetcher: Prefetcher,
    #[serde(skip)]
    pub(crate) spin: Spin,
    /// What the engine wants done; empty between events.
    #[serde(skip)]
    pub(crate) actions: Vec<Action<Bytes>>,
    pub(crate) log: AccessLog,
    /// The engine of segments with release consistency.
    pub(crate) release: Release,
    /// Those segments.
    pub(crate) with_release: FxHashMap<SegmentId, Consistency>,
    /// What the coordinator is told when releases are done.
    pub(crate) outbox: Outbox,
    pub(crate) coordinator: Coordinator,
    #[serde(skip)]
    pub(crate) inbox: VecDeque<(FromCoordinator, Vec<u8>)>,
    #[serde(skip)]
    pub(crate) outputs: Vec<Output>,
    pub(crate) peers: FxHashMap<NodeId, Peer>,
    pub(crate) members: Vec<Member>,
    #[serde(skip)]
    pub(crate) members_changed: Rc<Notify>,
    /// There may be an address space whose end nothing reports.
    #[serde(skip)]
    pub(crate) quiet_space: Rc<Notify>,
    /// For links to other nodes; `None` on a single machine.
    #[serde(skip)]
    pub(crate) endpoint: Option<Endpoint>,

    #[serde(skip)]
    pub(crate) connections: FxHashMap<ConnectionId, Connection>,
    /// How many connections each user has.
    pub(crate) users: FxHashMap<u32, usize>,
    /// Descriptors that this process may have open.
    pub(crate) descriptors: usize,
    pub(crate) processes: FxHashMap<i32, Process>,
    pub(crate) exits: Rc<Exits>,
    /// How many effects of what processes did the coordinator was told of and does not answer.
    pub(crate) effects: u64,
    /// How many of them it has confirmed.
    pub(crate) confirmed: u64,
    pub(crate) spaces: FxHashMap<SpaceId, Resident>,
    /// Attaches that were answered and not yet mapped.
    pub(crate) mapping: FxHashMap<AttachId, Attaching>,
    /// Whether what was told of such attaches is being taken.
    #[serde(skip)]
    pub(crate) hearing: bool,
    /// Messages about segments whose memory is not here, until the coordinator has told.
    pub(crate) unknown: FxHashMap<SegmentId, Vec<(NodeId, PeerMessage, Bytes)>>,
    /// What must not pass those.
    pub(crate) behind: FxHashMap<NodeId, Vec<(PeerMessage, Bytes)>>,
    /// Extents that this node is to adopt, whose segments' memory is not here.
    pub(crate) orphans: Vec<Extent>,
    /// The same, of durable segments: with the backup, and whether that is the first.
    pub(crate) guarded: Vec<(Extent, Option<NodeId>, bool)>,
    /// Segments that are tracked as soon as attaches under way are mapped.
    pub(crate) arming: FxHashSet<SegmentId>,
    /// Granted attaches by processes that may only read, of segments that have to be tracked first:
    /// the request, and the coordinator's answer.
    pub(crate) held: FxHashMap<SegmentId, Vec<(u64, Attachment, Placement)>>,
    /// Between readers and writers of this node.
    pub(crate) turns: Turns,
    /// Mappings that were gone when replicas were last looked at.
    pub(crate) unmapped: u64,
    /// Semaphore sets that are delegated to this node.
    pub(crate) sets: Sets,
    /// Until when processes may use shared pages, in milliseconds of `CLOCK_BOOTTIME`, in a cluster.
    pub(crate) lease: u64,
    /// A set was delegated: somebody has to extend the lease.
    #[serde(skip)]
    pub(crate) delegated: Rc<Notify>,
    /// Requests that the coordinator has not answered.
    pub(crate) pending: FxHashMap<u64, Pending>,
    /// Pages that are here and have their home elsewhere.
    pub(crate) cached: Cached,
    /// Wakes the daemon when the engine or a turn is to be looked at, which is `timer_set` if it is set.
    #[serde(skip)]
    pub(crate) timer: Option<Rc<Timer>>,
    #[serde(skip)]
    pub(crate) timer_set: Option<Time>,
    pub(crate) last_id: u64,
    pub(crate) counters: Counters,
    /// Links to other nodes that are spoken on, or about to be.
    #[serde(skip)]
    pub(crate) links: usize,
    /// One of them has ended.
    #[serde(skip)]
    pub(crate) unlinked: Rc<Notify>,
    /// No link is to be made: another daemon takes this one's place.
    #[serde(skip)]
    pub(crate) is_leaving: bool,
    /// Somebody asks for that.
    #[serde(skip)]
    pub(crate) upgrade: Rc<Notify>,
    /// Who, with the ids of their requests.
    pub(crate) upgraders: Vec<(ConnectionId, u64)>,
    /// How often this node's daemon was replaced while it served.
    pub(crate) upgrades: u64,
    /// Reused by everything that sends or receives on a local socket.
    #[serde(skip)]
    pub(crate) buffer: Vec<u8>,
}

/// What this daemon has done so far.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// System V calls of local processes.
    pub calls: u64,
    /// Faults on tracked pages, reads and writes.
    pub faults: u64,
    /// Pages sent to other nodes.
    pub pages_sent: u64,
    /// Pages received from other nodes.
    pub pages_received: u64,
}

/// Where System V calls are answered.
#[derive(Serialize, Deserialize)]
pub enum Coordinator {
    /// In this daemon: it serves one machine alone.
    Embedded(Box<Core>),
    /// On the head node.
    Remote(Remote),
    /// It was lost for good: every call fails.
    Lost,
}

/// Another node.
#[derive(Default, Serialize, Deserialize)]
pub struct Peer {
    #[serde(skip)]
    pub(crate) link: Option<FrameSender>,
    /// Of the link, or the last one; 0 if nothing can be lost that was sent before the next.
    #[serde(skip)]
    pub(crate) number: u64,
    /// What is to be sent once there is a link.
    pub(crate) backlog: Vec<(PeerMessage, Bytes)>,
}

/// A local process's connection.
pub struct Connection {
    pub(crate) socket: Rc<AsyncFd<Socket>>,
    pub(crate) task: AbortHandle,
    /// Effective user of who connected.
    pub(crate) user: u32,
    /// Once it has said Hello.
    pub(crate) caller: Option<Caller>,
    /// Who sent that.
    pub(crate) greeter: Sender,
    /// The shim's id and ours of the call that is under way.
    pub(crate) call: Option<(u64, u64)>,
    /// That call, if it may be tried once more with capabilities.
    pub(crate) again: Option<Again>,
}

/// A call that was sent to the coordinator without the caller's capabilities.
#[derive(Serialize, Deserialize)]
pub struct Again {
    pub(crate) call: Call,
    /// What follows it.
    pub(crate) raw: Vec<u8>,
    pub(crate) memlock: Option<Memlock>,
    /// It was cancelled meanwhile, with this errno.
    pub(crate) cancelled: Option<Errno>,
}

/// A local process that has ever called.
#[derive(Serialize, Deserialize)]
pub struct Process {
    pub(crate) id: ProcessId,
    #[serde(with = "descriptor")]
    pub(crate) pidfd: OwnedFd,
    /// Its address space, if it has (or had) attaches.
    pub(crate) space: Option<SpaceId>,
}

/// An address space's entry.
#[derive(Default, Serialize, Deserialize)]
pub struct Resident {
    /// Whose it is; `None` for a child of a raw `clone` that has not made itself known.
    pub(crate) pid: Option<i32>,
    /// What its anchor page contains: a secret of its processes; 0 without an anchor.
    pub(crate) secret: u64,
    /// Effective user of the process that it was first heard of from.
    pub(crate) user: u32,
    /// Whether that process has left it, while others live in it.
    pub(crate) is_left: bool,
    #[serde(skip)]
    pub(crate) watcher: Option<AbortHandle>,
}

/// An attach between its answer and its mapping.
#[derive(Serialize, Deserialize)]
pub struct Attaching {
    pub(crate) connection: ConnectionId,
    pub(crate) space: SpaceId,
    pub(crate) segment: SegmentId,
    /// What its descriptor is of.
    pub(crate) view: View,
    /// Whether it asked only to read.
    pub(crate) read_only: bool,
    /// Whether the process was told to wait until its mapping is registered.
    pub(crate) tracked: bool,
}

/// What to do with a coordinator's answer.
#[derive(Serialize, Deserialize)]
pub enum Pending {
    /// Pass it on to the connection.
    Call(ConnectionId),
    /// Pass it on to the connection, or give it the set's memory if it wants that; asked at this
    /// time, in milliseconds of `CLOCK_BOOTTIME`.
    Operate(ConnectionId, SetMemory, u64),
    /// Prepare an attach with these flags, then answer.
    Attach(ConnectionId, i32),
    /// Let the process unmap.
    Detach {
        /// Who asked.
        connection: ConnectionId,
        /// What ends.
        attach: AttachId,
        /// What to unmap.
        pieces: Pieces,
    },
    /// Pass this on to the connection: as many effects as this are confirmed now.
    Confirm(ConnectionId, u64, Outcome),
}

impl Node {
    /// A node that is a member already.
    #[allow(clippy::too_many_arguments, reason = "made in one place")]
    pub(crate) fn new(
        name: String,
        id: NodeId,
        epoch: u64,
        budget: u64,
        device: Option<File>,
        memory: Memory,
        coordinator: Coordinator,
        exits: Exits,
    ) -> Shared {
        Node {
            this: Weak::new(),
            name,
            id,
            epoch,
            budget,
            device,
            memory,
            engine: Engine::new(id, CoherenceConfig::default()),
            policy: HomePolicy::default(),
            carry: Carry::default(),
            prefetcher: Prefetcher::default(),
            spin: Spin::default(),
            actions: Vec::new(),
            log: AccessLog::new(id),
            release: Release::new(id, PAGE_SIZE),
            with_release: FxHashMap::default(),
            outbox: Outbox::default(),
            coordinator,
            inbox: VecDeque::new(),
            outputs: Vec::new(),
            peers: FxHashMap::default(),
            members: Vec::new(),
            members_changed: Rc::default(),
            quiet_space: Rc::default(),
            endpoint: None,
            connections: FxHashMap::default(),
            users: FxHashMap::default(),
            descriptors: start::descriptor_limit(),
            processes: FxHashMap::default(),
            exits: Rc::new(exits),
            effects: 0,
            confirmed: 0,
            spaces: FxHashMap::default(),
            mapping: FxHashMap::default(),
            hearing: false,
            unknown: FxHashMap::default(),
            behind: FxHashMap::default(),
            orphans: Vec::new(),
            guarded: Vec::new(),
            arming: FxHashSet::default(),
            held: FxHashMap::default(),
            turns: Turns::default(),
            unmapped: 0,
            sets: Sets::default(),
            lease: boottime() + LEASE,
            delegated: Rc::new(Notify::new()),
            pending: FxHashMap::default(),
            cached: Cached::default(),
            timer: None,
            timer_set: None,
            last_id: 0,
            counters: Counters::default(),
            links: 0,
            unlinked: Rc::default(),
            is_leaving: false,
            upgrade: Rc::default(),
            upgraders: Vec::new(),
            upgrades: 0,
            buffer: Vec::new(),
        }
        .shared()
    }

    /// The node, for the tasks of its thread.
    pub(crate) fn shared(self) -> Shared {
        Rc::new_cyclic(|this| {
            RefCell::new(Node {
                this: this.clone(),
                ..self
            })
        })
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Says something to the coordinator, now.
    pub(crate) fn say(&mut self, message: ToCoordinator, raw: &[u8]) {
        match &mut self.coordinator {
            Coordinator::Embedded(core) => {
                let message = on_one_machine(message);
                core.handle(unix_time(), self.id, message, raw, &mut self.outputs);
                self.collect_outputs();
            }
            Coordinator::Remote(remote) => {
                if let Err(error) = remote.say(&message, raw) {
                    self.on_coordinator_lost(&error.to_string());
                }
            }
            Coordinator::Lost => {
                if let ToCoordinator::Call { id, .. }
                | ToCoordinator::Detached { id, .. }
                | ToCoordinator::Confirm { id } = message
                {
                    self.answer_unserved(id);
                }
            }
        }
    }

    /// Takes what the embedded coordinator said.
    pub(crate) fn collect_outputs(&mut self) {
        let mine = self
            .outputs
            .drain(..)
            .map(|output| (output.message, output.raw));
        self.inbox.extend(mine);
    }

    /// Does all that is waiting to be done. To be called after anything was told to the node.
    pub(crate) fn settle(&mut self) {
        loop {
            if let Some((message, raw)) = self.inbox.pop_front() {
                self.on_coordinator(message, &raw);
            } else if let Some((space, report)) = self.memory.spaces.next_report() {
                self.on_report(space, report);
            } else if !self.make_room() {
                self.release_replicas();
                return self.set_timer();
            }
        }
    }

    fn set_timer(&mut self) {
        let next = [self.engine.next_timeout(), self.turns.next_timeout()];
        let next = next.into_iter().flatten().min();
        if let (Some(time), Some(timer)) = (next, &self.timer)
            && self.timer_set != next
        {
            timer.set(time);
        }
        self.timer_set = next;
    }

    fn on_coordinator(&mut self, message: FromCoordinator, raw: &[u8]) {
        match message {
            FromCoordinator::Answer {
                id,
                outcome,
                placement,
            } => self.on_answer(id, outcome, placement, raw),
            FromCoordinator::Delegated {
                id,
                set,
                number,
                access,
                state,
            } => self.on_delegated(id, set, number, access, state),
            FromCoordinator::Recall { set, number } => {
                if self.sets.number(set) == Some(number) {
                    self.return_set(set);
                }
            }
            FromCoordinator::SetRemoved { set } => self.sets.remove(set),
            FromCoordinator::Changed { segment, pages } => {
                self.drive_release(ReleaseInput::Changed { segment, pages });
            }
            FromCoordinator::Present { number } => self.on_present(number),
            FromCoordinator::Share { segment } => {
                self.arming.insert(segment);
                self.try_arm(segment);
            }
            FromCoordinator::HomeIs {
                extent,
                home,
                orphaned,
            } => self.on_home(extent, home, orphaned),
            FromCoordinator::BackupIs {
                extent,
                backup,
                blank,
            } => self.on_backup(extent, backup, blank),
            FromCoordinator::MoveHome { extent, to } => self.move_home(extent, to),
            FromCoordinator::SegmentIs {
                segment,
                size,
                consistency,
                default_home,
            } => self.on_segment(segment, size, consistency, default_home),
            FromCoordinator::Account {
                number,
                segment,
                from,
                requests,
            } => self.on_account(number, segment, from, requests),
            FromCoordinator::Destroyed { segment } => self.on_destroyed(segment),
            FromCoordinator::Members { members, view } => {
                self.engine.join_view(view);
                members
                    .into_iter()
                    .for_each(|member| self.on_joined(member));
            }
            FromCoordinator::Joined { member } => self.on_joined(member),
            FromCoordinator::Left { node, view } => self.on_left(node, view),
            FromCoordinator::Welcome { .. }
            | FromCoordinator::Resumed
            | FromCoordinator::Refused { .. } => {
                tracing::warn!("unexpected message from the coordinator");
            }
        }
    }

    /// The coordinator is lost for good: what waits for it fails, and all later calls do.
    pub(crate) fn on_coordinator_lost(&mut self, reason: &str) {
        tracing::error!(
            node = self.name,
            reason,
            "lost the coordinator; System V calls now fail with ENOSYS, shared pages raise SIGBUS"
        );
        for set in self.sets.delegated() {
            self.sets.remove(set);
        }
        self.coordinator = Coordinator::Lost;
        if self.endpoint.is_some() {
            self.memory.condemn();
        }
        let ids: Vec<u64> = self.pending.keys().copied().collect();
        for id in ids {
            self.answer_unserved(id);
        }
    }

    /// Answers a request for the coordinator that is lost.
    fn answer_unserved(&mut self, id: u64) {
        let answer = FromCoordinator::Answer {
            id,
            outcome: Err(Errno::ENOSYS),
            placement: None,
        };
        self.inbox.push_back((answer, Vec::new()));
    }

    /// Whether this daemon holds nothing that anybody could still want.
    pub(crate) fn is_idle(&self) -> bool {
        let objects = match &self.coordinator {
            Coordinator::Embedded(core) => !core.is_empty(),
            Coordinator::Remote(_) => self.memory.counts().0 > 0,
            Coordinator::Lost => false,
        };
        !objects && self.connections.is_empty() && self.spaces.is_empty()
    }
}

/// A call as it is answered where there never is a second node.
fn on_one_machine(mut message: ToCoordinator) -> ToCoordinator {
    if let ToCoordinator::Call {
        call: Call::ShmGet { consistency, .. },
        ..
    } = &mut message
    {
        consistency.take_if(|consistency| *consistency == Consistency::Durable);
    }
    message
}

/// Milliseconds since the machine started, suspended or not, on a clock that processes read too.
pub(crate) fn boottime() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid out pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1000 + now.tv_nsec.cast_unsigned() / 1_000_000
}

/// Seconds since the epoch.
fn unix_time() -> i64 {
    let elapsed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX)
}
