//! The cluster's authority on System V objects: one namespace of segments, semaphore sets and
//! message queues for all nodes, who the members are, and where the pages of each segment live.
//!
//! [`Core`] is a pure state machine. It gets the messages of the nodes and the time, and gives
//! back the messages to send; it does no I/O and has no clock, and all of its state is plain data
//! that serde can store, without hash maps, whose order would show. [`replica`] is what makes it
//! outlive its process, [`store`] where. Calls behave as on Linux 6.x to the last errno: the tests run the same
//! calls on the kernel and compare.
//!
//! ```text
//!     ids, keys, limits   permissions   quotas of users
//!                  [ids]     [perm]     [quotas]
//!                     ╲             ╱
//!   [sem] semget, semop, semctl   [shm] shmget, shmat, shmctl ── [placement] Solo, Shared, homes
//!     │ set, queue, undo                │                             │
//!     │   [msg] msgget, msgsnd, ...     │                        [members] slots, epochs, memory
//!     │     │ queue                     │
//!     ╰─────┴─ [processes] blocked calls, undo of a process
//! ```
//!
//! # Trust
//!
//! A node speaks for itself and its own processes only: whatever names an object of another
//! node, or an object that does not exist, or makes no sense, gets an errno or is ignored and
//! counted ([`Core::protocol_errors`]). It is trusted in what it says about its processes (uid,
//! pid, attaches), as the kernel told it.
#![forbid(unsafe_code)]

mod accounts;
mod complaints;
pub mod etcd;
mod ids;
mod journal;
mod members;
mod msg;
mod notices;
mod perm;
mod placement;
mod processes;
mod quotas;
pub mod replica;
mod rules;
mod sem;
pub mod server;
mod shm;
pub mod store;

use migshm_protocol::call::{
    Answer, Attachment, Call, Caller, Consistency, Errno, Outcome, SetMemory,
};
use migshm_protocol::control::{FromCoordinator, Placement, ToCoordinator};
use migshm_protocol::{Extent, NodeId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

pub use members::JoinError;
pub use quotas::Quotas;
pub use rules::Rules;

use accounts::Accounts;
use complaints::Complaints;
use members::Members;
use msg::MsgQueues;
use notices::Notices;
use processes::{Awaited, CallKey, ProcessKey, Processes, Wake};
use sem::{Held, SemSets};
use shm::Segments;

/// A message to send to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The receiver, a member.
    pub to: NodeId,
    /// The message.
    pub message: FromCoordinator,
    /// What follows it: the values of `GETALL`, the message of `msgrcv`, otherwise nothing.
    pub raw: Vec<u8>,
}

/// The state of the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub struct Core {
    members: Members,
    processes: Processes,
    segments: Segments,
    sets: SemSets,
    queues: MsgQueues,
    accounts: Accounts,
    notices: Notices,
    settings: Settings,
    /// Who asks for which homes, and is answered when the members have flushed.
    asking: Vec<(NodeId, Extent)>,
    complaints: Complaints,
    protocol_errors: u64,
}

/// What a person has decided about the cluster. It holds from then on: what there is stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Which keys of segments decide on their consistency.
    pub rules: Rules,
    /// What one user may have.
    pub quotas: Quotas,
}

/// Who makes a call.
struct Request<'a> {
    call: CallKey,
    caller: &'a Caller,
}

/// The objects of all kinds.
struct Objects<'a> {
    segments: &'a mut Segments,
    sets: &'a mut SemSets,
    queues: &'a mut MsgQueues,
    accounts: &'a mut Accounts,
}

/// What the calls on objects need besides their objects.
struct Context<'a> {
    now: i64,
    quotas: Quotas,
    members: &'a mut Members,
    processes: &'a mut Processes,
    out: &'a mut Vec<Output>,
}

impl Default for Core {
    fn default() -> Core {
        Core::new()
    }
}

impl Core {
    /// A cluster without members and objects.
    #[must_use]
    pub fn new() -> Core {
        Core {
            members: Members::default(),
            processes: Processes::default(),
            segments: Segments::new(),
            sets: SemSets::new(),
            queues: MsgQueues::new(),
            accounts: Accounts::default(),
            notices: Notices::default(),
            settings: Settings::default(),
            asking: Vec::new(),
            complaints: Complaints::default(),
            protocol_errors: 0,
        }
    }

    /// Has this hold from now on; what there is stays.
    #[must_use]
    pub fn with_settings(self, settings: Settings) -> Core {
        Core { settings, ..self }
    }

    /// A node becomes a member: under a new name, or under that of one that has left. Returns its
    /// slot and the epoch of its membership, for [`FromCoordinator::Welcome`], which has to reach
    /// it before anything in `out`.
    ///
    /// `address` is where other nodes reach it, `memory` its budget in bytes.
    ///
    /// # Errors
    /// [`JoinError`], for [`FromCoordinator::Refused`].
    pub fn join(
        &mut self,
        name: String,
        address: SocketAddr,
        memory: u64,
        out: &mut Vec<Output>,
    ) -> Result<(NodeId, u64), JoinError> {
        let joined = self.members.join(name, address, memory)?;
        self.introduce(joined.0, out);
        self.segments.guard(&mut self.members, out);
        Ok(joined)
    }

    /// A node is gone, and all of its processes with it: their blocked calls are void, their undo
    /// is applied, their attaches end. `now` is in seconds since the epoch.
    pub fn leave(&mut self, now: i64, node: NodeId, out: &mut Vec<Output>) {
        if !self.members.leave(node) {
            return;
        }
        // Before anybody learns of what it held: who has copies of its pages must not go on with them.
        let view = self.members.view();
        let left = self.members.nodes();
        out.extend(left.map(|to| Output::new(to, FromCoordinator::Left { node, view })));
        let start = out.len();
        self.notices.forget(node);
        self.segments.distrust(node, &mut self.notices);
        let abandoned = self.sets.abandon(node);
        let processes = self.processes.of_node(node);
        for &process in &processes {
            self.void_calls(process);
        }
        for process in processes {
            self.undo(now, process, None, out);
        }
        let (
            Objects {
                segments, accounts, ..
            },
            mut cx,
        ) = self.split(now, out);
        segments.lose(node, &mut cx);
        accounts.lose(node, &mut cx);
        for set in abandoned {
            self.catch_up(now, set, out);
        }
        self.notices.precede_answers(out, start);
        self.asking.retain(|(asker, _)| *asker != node);
        self.complaints.forget(node);
        self.name_homes(now, out);
    }

    /// Answers who asks for homes, once what the members have said of them is all that there is.
    fn name_homes(&mut self, now: i64, out: &mut Vec<Output>) {
        if !self.members.is_flushed() {
            return;
        }
        for (asker, extent) in std::mem::take(&mut self.asking) {
            let (Objects { segments, .. }, mut cx) = self.split(now, out);
            let (home, orphaned) = segments.find_home(extent, asker, &mut cx).unzip();
            let is = |orphaned| FromCoordinator::HomeIs {
                extent,
                home,
                orphaned,
            };
            // The new home must not learn of it from others first.
            if let (Some(home), Some(true)) = (home, orphaned) {
                out.push(Output::new(home, is(true)));
            }
            out.push(Output::new(asker, is(false)));
        }
    }

    /// The semaphore sets that are delegated to a node. What its processes have done to them since
    /// is lost if it leaves.
    #[must_use]
    pub fn delegated_to(&self, node: NodeId) -> Vec<i32> {
        self.sets.delegated_to(node)
    }

    /// A member that has to [leave](Core::leave), as it and another one cannot reach each other.
    /// `silence` says for how many milliseconds nothing was heard of a member.
    #[must_use]
    pub fn condemned(&self, silence: impl Fn(NodeId) -> u64) -> Option<NodeId> {
        let epoch = |node| self.members.epoch(node).unwrap_or(0);
        self.complaints.judge(silence, epoch)
    }

    /// A message from a node, with the raw bytes that follow it; `now` is in seconds since the
    /// epoch. What has to be sent is appended to `out`, for each receiver in order.
    pub fn handle(
        &mut self,
        now: i64,
        from: NodeId,
        message: ToCoordinator,
        raw: &[u8],
        out: &mut Vec<Output>,
    ) {
        let start = out.len();
        let accepted = self.members.contains(from) && self.accept(now, from, message, raw, out);
        self.notices.precede_answers(out, start);
        self.protocol_errors += u64::from(!accepted);
    }

    /// Whether no object exists.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.sets.is_empty() && self.queues.is_empty()
    }

    /// How many messages made no sense and were ignored.
    #[must_use]
    pub fn protocol_errors(&self) -> u64 {
        self.protocol_errors
    }

    /// False if the message makes no sense.
    fn accept(
        &mut self,
        now: i64,
        from: NodeId,
        message: ToCoordinator,
        raw: &[u8],
        out: &mut Vec<Output>,
    ) -> bool {
        match message {
            ToCoordinator::Join { .. } | ToCoordinator::Resume { .. } => false,
            ToCoordinator::Call { id, caller, call } => {
                let request = Request {
                    call: CallKey { node: from, id },
                    caller: &caller,
                };
                let fresh = !self.processes.is_blocked(request.call);
                if fresh {
                    self.call(now, &request, call, raw, out);
                }
                fresh
            }
            ToCoordinator::Cancel { id, errno } => {
                let call = CallKey { node: from, id };
                if let Some(Awaited::Return(set)) = self.processes.awaited(call) {
                    // It has not been tried yet, and may not have to wait at all.
                    self.sets.cancel_held(set, call, errno);
                } else if self.void_call(call) {
                    out.push(Output::answer(call, Err(errno)));
                }
                true
            }
            ToCoordinator::Confirm { id } => {
                let call = CallKey { node: from, id };
                out.push(Output::answer(call, Ok(Answer::Value(0))));
                true
            }
            ToCoordinator::Exited { process, pid } => {
                let process = ProcessKey {
                    node: from,
                    process,
                };
                self.void_calls(process);
                self.undo(now, process, Some(pid), out);
                true
            }
            ToCoordinator::Inherited {
                segment,
                count,
                pid,
            } => {
                let (Objects { segments, .. }, cx) = self.split(now, out);
                segments.inherit(from, segment, count, pid, &cx)
            }
            ToCoordinator::Detached {
                id,
                segment,
                count,
                pid,
            } => {
                let (Objects { segments, .. }, mut cx) = self.split(now, out);
                let detached = segments.detach(from, segment, count, pid, &mut cx);
                if id != 0 {
                    let call = CallKey { node: from, id };
                    out.push(Output::answer(call, detached.map(|()| Answer::Value(0))));
                }
                detached.is_ok()
            }
            ToCoordinator::Unattached { segment } => {
                let (Objects { segments, .. }, mut cx) = self.split(now, out);
                segments.unattach(from, segment, &mut cx).is_ok()
            }
            ToCoordinator::Sharing { segment } => {
                let (Objects { segments, .. }, mut cx) = self.split(now, out);
                segments.sharing(from, segment, &mut cx)
            }
            ToCoordinator::FindHome { extent } => {
                self.asking.push((from, extent));
                self.name_homes(now, out);
                true
            }
            ToCoordinator::Unreachable { node, epoch } => {
                if node != from && self.members.epoch(node) == Some(epoch) {
                    self.complaints.note(from, node);
                }
                true
            }
            ToCoordinator::Flushed { view } => {
                self.members.flushed(from, view);
                self.name_homes(now, out);
                true
            }
            ToCoordinator::FindSegment { segment } => {
                let introduced = self.segments.introduce(segment, from);
                let (size, default_home) = introduced.map(|i| (i.0, i.1)).unzip();
                let default_home = default_home.flatten();
                let consistency = introduced.map(|i| i.2).unwrap_or_default();
                out.push(Output::new(
                    from,
                    FromCoordinator::SegmentIs {
                        segment,
                        size,
                        consistency,
                        default_home,
                    },
                ));
                true
            }
            ToCoordinator::ProposeHome { extent, to } => {
                if self.segments.may_move(extent, from, to, &self.members) {
                    out.push(Output::new(from, FromCoordinator::MoveHome { extent, to }));
                }
                true
            }
            ToCoordinator::Wrote { segment, pages } => {
                self.segments
                    .wrote(from, segment, &pages, &mut self.notices)
            }
            ToCoordinator::Returned { set, number, state } => {
                let (Objects { sets, .. }, mut cx) = self.split(now, out);
                let returned = sets.take_back(from, set, number, &state, &mut cx);
                if returned {
                    self.catch_up(now, set, out);
                }
                returned
            }
            ToCoordinator::Query { number } => {
                out.push(Output::new(from, FromCoordinator::Present { number }));
                true
            }
            ToCoordinator::Account { number } => {
                let (Objects { accounts, .. }, mut cx) = self.split(now, out);
                accounts.answered(from, number, raw, &mut cx);
                true
            }
            ToCoordinator::HomeMoved { extent } => {
                let (Objects { segments, .. }, mut cx) = self.split(now, out);
                segments.move_home(extent, from, &mut cx)
            }
        }
    }

    fn call(
        &mut self,
        now: i64,
        request: &Request<'_>,
        call: Call,
        raw: &[u8],
        out: &mut Vec<Output>,
    ) {
        let by_key = |key| self.settings.rules.consistency(key);
        let made = match call {
            Call::ShmGet {
                key, consistency, ..
            } => consistency.unwrap_or_else(|| by_key(key)),
            _ => Consistency::default(),
        };
        // What is done to a set that is delegated dies with the node.
        let stays = self.segments.are_durable_at(request.call.node);
        let (
            Objects {
                segments,
                sets,
                queues,
                accounts,
            },
            mut cx,
        ) = self.split(now, out);
        if sets.hold(request, call, raw, &mut cx) {
            return;
        }
        let mut beside = Vec::new();
        let mut with_raw = |answered: Result<(Answer, Vec<u8>), Errno>| {
            answered.map(|(answer, raw)| {
                beside = raw;
                answer
            })
        };
        // `None`: the call is blocked, or answered already.
        let outcome = match call {
            Call::ShmGet {
                key, size, flags, ..
            } => Some(
                segments
                    .get(request, key, size, flags, made, &cx)
                    .map(Answer::Value),
            ),
            Call::ShmAttach { id, flags } => {
                segments.attach(request, id, flags, &mut cx).err().map(Err)
            }
            Call::ShmCtl { id, command } => Some(segments.control(request, id, command, &mut cx)),
            Call::SemGet { key, count, flags } => {
                Some(sets.get(request, key, count, flags, &cx).map(Answer::Value))
            }
            Call::SemOp { id, memory } => sets
                .operate(
                    request,
                    id,
                    if stays { SetMemory::Unusable } else { memory },
                    raw,
                    &mut cx,
                )
                .map(|done| done.map(|()| Answer::Value(0))),
            Call::SemCtl { id, command } => {
                Some(with_raw(sets.control(request, id, command, raw, &mut cx)))
            }
            Call::MsgGet { key, flags } => {
                Some(queues.get(request, key, flags, &cx).map(Answer::Value))
            }
            Call::MsgSend { id, flags } => queues.send(request, id, flags, raw, &mut cx),
            Call::MsgReceive {
                id,
                size,
                mtype,
                flags,
            } => queues
                .receive(request, id, size, mtype, flags, &mut cx)
                .map(with_raw),
            Call::MsgCtl { id, command } => Some(queues.control(request, id, command, &mut cx)),
            Call::Accesses {
                id,
                node,
                from,
                requests,
            } => segments
                .readable(request, id)
                .and_then(|segment| accounts.ask(request, node, segment, from, requests, &mut cx))
                .err()
                .map(Err),
        };
        if let Some(outcome) = outcome {
            out.push(Output {
                raw: beside,
                ..Output::answer(request.call, outcome)
            });
        }
    }

    /// Does what was held back while a set was delegated.
    fn catch_up(&mut self, now: i64, set: i32, out: &mut Vec<Output>) {
        while let Some(held) = self.sets.next_held(set) {
            match held {
                Held::Call(held) => {
                    self.processes.unblock(held.key);
                    let request = Request {
                        call: held.key,
                        caller: &held.caller,
                    };
                    self.call(now, &request, held.call, &held.raw, out);
                    if let Some(errno) = held.cancelled
                        && self.void_call(held.key)
                    {
                        out.push(Output::answer(held.key, Err(errno)));
                    }
                }
                Held::Undo(process, pid) => {
                    let (Objects { sets, .. }, mut cx) = self.split(now, out);
                    sets.undo(process, pid, set, &mut cx);
                }
            }
        }
    }

    /// Takes a blocked call back; false if it is not blocked.
    fn void_call(&mut self, call: CallKey) -> bool {
        match self.processes.unblock(call) {
            Some(Awaited::Semaphores(id) | Awaited::Return(id)) => self.sets.cancel(id, call),
            Some(Awaited::Segment(segment)) => self.segments.cancel(segment, call),
            Some(Awaited::Queue(id)) => self.queues.cancel(id, call),
            Some(Awaited::Account(number)) => self.accounts.cancel(number),
            None => return false,
        }
        true
    }

    fn void_calls(&mut self, process: ProcessKey) {
        for call in self.processes.calls(process) {
            self.void_call(call);
        }
    }

    /// Applies the undo of a process that has ended; its pid is the one it was last known by if
    /// it is not given.
    fn undo(&mut self, now: i64, process: ProcessKey, pid: Option<i32>, out: &mut Vec<Output>) {
        let Some((last_pid, ids)) = self.processes.remove(process) else {
            return;
        };
        let (Objects { sets, .. }, mut cx) = self.split(now, out);
        for id in ids {
            sets.undo(process, pid.unwrap_or(last_pid), id, &mut cx);
        }
    }

    fn split<'a>(&'a mut self, now: i64, out: &'a mut Vec<Output>) -> (Objects<'a>, Context<'a>) {
        let objects = Objects {
            segments: &mut self.segments,
            sets: &mut self.sets,
            queues: &mut self.queues,
            accounts: &mut self.accounts,
        };
        let cx = Context {
            now,
            quotas: self.settings.quotas,
            members: &mut self.members,
            processes: &mut self.processes,
            out,
        };
        (objects, cx)
    }

    /// Tells a new member who the members are, and them of it.
    fn introduce(&self, newcomer: NodeId, out: &mut Vec<Output>) {
        let members = self.members.list();
        if let Some(member) = members.iter().find(|member| member.node == newcomer) {
            let others = self.members.nodes().filter(|&node| node != newcomer);
            let joined = |to| {
                let member = member.clone();
                Output::new(to, FromCoordinator::Joined { member })
            };
            out.extend(others.map(joined));
        }
        let view = self.members.view();
        let members = FromCoordinator::Members { members, view };
        out.push(Output::new(newcomer, members));
    }
}

impl Output {
    fn new(to: NodeId, message: FromCoordinator) -> Output {
        Output {
            to,
            message,
            raw: Vec::new(),
        }
    }

    fn answer(call: CallKey, outcome: Outcome) -> Output {
        Output::new(
            call.node,
            FromCoordinator::Answer {
                id: call.id,
                outcome,
                placement: None,
            },
        )
    }

    fn attached(call: CallKey, attachment: Attachment, placement: Placement) -> Output {
        let outcome = Ok(Answer::Attached(attachment));
        Output::new(
            call.node,
            FromCoordinator::Answer {
                id: call.id,
                outcome,
                placement: Some(placement),
            },
        )
    }
}

impl Context<'_> {
    /// The call is blocked from now on.
    fn block(&mut self, request: &Request<'_>, on: Awaited) {
        let Caller { pid, .. } = *request.caller;
        self.processes
            .block(request.call, request.process(), pid, on);
    }

    /// Answers the calls that are blocked no longer.
    fn wake(&mut self, wakes: impl IntoIterator<Item = Wake>) {
        for Wake { call, outcome, raw } in wakes {
            self.processes.unblock(call);
            self.out.push(Output {
                raw,
                ..Output::answer(call, outcome)
            });
        }
    }
}

impl Request<'_> {
    fn process(&self) -> ProcessKey {
        ProcessKey {
            node: self.call.node,
            process: self.caller.process,
        }
    }
}
