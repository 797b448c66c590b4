//! A cluster of one `Core`, driven by calls, for the tests of this folder.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod native;
pub mod worker;

use migshm_coordinator::{Core, Output};
use migshm_protocol::call::{
    Answer, Attachment, Call, Caller, Errno, Outcome, SemBuf, SemCommand, StatBy,
};
use migshm_protocol::call::{MsgCommand, MsgStatus, SemStatus, SetMemory, ShmCommand, ShmStatus};
use migshm_protocol::control::{FromCoordinator, Placement, ToCoordinator};
use migshm_protocol::{NodeId, ProcessId, SegmentId};

pub const IPC_CREAT: i32 = 0o1000;
pub const IPC_EXCL: i32 = 0o2000;
pub const IPC_PRIVATE: i32 = 0;
pub const IPC_NOWAIT: i32 = 0o4000;
pub const NOWAIT: i16 = 0o4000;
pub const UNDO: i16 = 0x1000;

pub const MIB: u64 = 1 << 20;

/// The cluster, and what its nodes have been sent and not looked at yet.
pub struct Cluster {
    pub core: Core,
    pub now: i64,
    pub mail: Vec<Output>,
    next_call: u64,
}

/// The call of a process that cannot operate on sets by itself.
pub fn semop(id: i32) -> Call {
    Call::SemOp {
        id,
        memory: SetMemory::Unusable,
    }
}

/// A process, and who it runs as.
#[derive(Clone, Debug)]
pub struct Process {
    pub node: NodeId,
    pub caller: Caller,
}

/// A call that has been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    pub node: NodeId,
    pub id: u64,
}

impl Cluster {
    pub fn new() -> Cluster {
        Cluster {
            core: Core::new(),
            now: 1000,
            mail: Vec::new(),
            next_call: 1,
        }
    }

    /// A cluster whose nodes give so much memory each.
    pub fn with_nodes<const N: usize>(memory: [u64; N]) -> (Cluster, [NodeId; N]) {
        let mut cluster = Cluster::new();
        let mut number = 0;
        let nodes = memory.map(|memory| {
            number += 1;
            cluster.join(&format!("node{number}"), memory)
        });
        cluster.mail.clear();
        (cluster, nodes)
    }

    pub fn join(&mut self, name: &str, memory: u64) -> NodeId {
        let address = "127.0.0.1:7000".parse().unwrap();
        self.core
            .join(name.into(), address, memory, &mut self.mail)
            .unwrap()
            .0
    }

    pub fn leave(&mut self, node: NodeId) {
        self.core.leave(self.now, node, &mut self.mail);
    }

    pub fn send(&mut self, from: NodeId, message: ToCoordinator) {
        self.core
            .handle(self.now, from, message, &[], &mut self.mail);
    }

    /// Makes a call; its answer is in the mail, or comes later.
    pub fn start(&mut self, process: &Process, call: Call, raw: &[u8]) -> Pending {
        let id = self.next_call;
        self.next_call += 1;
        let message = ToCoordinator::Call {
            id,
            caller: process.caller.clone(),
            call,
        };
        self.core
            .handle(self.now, process.node, message, raw, &mut self.mail);
        Pending {
            node: process.node,
            id,
        }
    }

    /// Takes the answer to a call out of the mail, with its placement and raw bytes.
    pub fn take_answer(
        &mut self,
        pending: Pending,
    ) -> Option<(Outcome, Option<Placement>, Vec<u8>)> {
        let is_answer = |output: &Output| {
            output.to == pending.node
                && matches!(output.message, FromCoordinator::Answer { id, .. } if id == pending.id)
        };
        let at = self.mail.iter().position(is_answer)?;
        let Output {
            message: FromCoordinator::Answer {
                outcome, placement, ..
            },
            raw,
            ..
        } = self.mail.remove(at)
        else {
            unreachable!("found as an answer")
        };
        Some((outcome, placement, raw))
    }

    /// How a call ended; `None` while it is blocked.
    pub fn outcome(&mut self, pending: Pending) -> Option<Outcome> {
        self.take_answer(pending).map(|(outcome, ..)| outcome)
    }

    /// Makes a call that must be answered at once.
    pub fn call(&mut self, process: &Process, call: Call, raw: &[u8]) -> Outcome {
        let pending = self.start(process, call, raw);
        self.outcome(pending).expect("the call is blocked")
    }

    pub fn value(&mut self, process: &Process, call: Call) -> Result<i32, Errno> {
        self.call(process, call, &[]).map(|answer| match answer {
            Answer::Value(value) => value,
            other => panic!("not a value: {other:?}"),
        })
    }

    pub fn semget(
        &mut self,
        process: &Process,
        key: i32,
        count: i32,
        flags: i32,
    ) -> Result<i32, Errno> {
        self.value(process, Call::SemGet { key, count, flags })
    }

    pub fn start_semop(&mut self, process: &Process, id: i32, ops: &[(u16, i16, i16)]) -> Pending {
        self.start(process, semop(id), &raw(ops))
    }

    pub fn semop(
        &mut self,
        process: &Process,
        id: i32,
        ops: &[(u16, i16, i16)],
    ) -> Result<(), Errno> {
        self.call(process, semop(id), &raw(ops))
            .map(|answer| assert_eq!(answer, Answer::Value(0)))
    }

    pub fn semctl(
        &mut self,
        process: &Process,
        id: i32,
        command: SemCommand,
    ) -> Result<i32, Errno> {
        self.value(process, Call::SemCtl { id, command })
    }

    pub fn setall(&mut self, process: &Process, id: i32, values: &[u16]) -> Result<(), Errno> {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let call = Call::SemCtl {
            id,
            command: SemCommand::SetAll,
        };
        self.call(process, call, &raw)
            .map(|answer| assert_eq!(answer, Answer::Value(0)))
    }

    pub fn getall(&mut self, process: &Process, id: i32) -> Result<Vec<u16>, Errno> {
        let pending = self.start(
            process,
            Call::SemCtl {
                id,
                command: SemCommand::GetAll,
            },
            &[],
        );
        let (outcome, _, raw) = self.take_answer(pending).expect("never blocks");
        let values: Vec<u16> = raw
            .chunks_exact(2)
            .map(|c| u16::from_le_bytes([c[0], c[1]]))
            .collect();
        outcome.map(|answer| {
            assert_eq!(answer, Answer::Values(values.len() as u32));
            values
        })
    }

    pub fn sem_stat(&mut self, process: &Process, id: i32, by: StatBy) -> Result<SemStatus, Errno> {
        let call = Call::SemCtl {
            id,
            command: SemCommand::Stat(by),
        };
        self.call(process, call, &[]).map(|answer| match answer {
            Answer::Set(status) => status,
            other => panic!("not a set: {other:?}"),
        })
    }

    pub fn msgget(&mut self, process: &Process, key: i32, flags: i32) -> Result<i32, Errno> {
        self.value(process, Call::MsgGet { key, flags })
    }

    pub fn start_msgsnd(&mut self, process: &Process, id: i32, mtype: i64, text: &[u8]) -> Pending {
        let call = Call::MsgSend { id, flags: 0 };
        self.start(process, call, &message(mtype, text))
    }

    pub fn msgsnd(
        &mut self,
        process: &Process,
        id: i32,
        mtype: i64,
        text: &[u8],
        flags: i32,
    ) -> Result<(), Errno> {
        let call = Call::MsgSend { id, flags };
        self.call(process, call, &message(mtype, text))
            .map(|answer| assert_eq!(answer, Answer::Value(0)))
    }

    /// Receives with room for any message.
    pub fn start_msgrcv(&mut self, process: &Process, id: i32, mtype: i64) -> Pending {
        let size = u64::from(u32::MAX);
        let flags = 0;
        self.start(
            process,
            Call::MsgReceive {
                id,
                size,
                mtype,
                flags,
            },
            &[],
        )
    }

    /// What a `msgrcv` got; `None` while it is blocked.
    pub fn received(&mut self, pending: Pending) -> Option<Result<(i64, Vec<u8>), Errno>> {
        let (outcome, _, raw) = self.take_answer(pending)?;
        Some(outcome.map(|answer| {
            let (mtype, text) = raw.split_first_chunk().expect("a type");
            assert_eq!(answer, Answer::Message(text.len() as u32));
            (i64::from_le_bytes(*mtype), text.to_vec())
        }))
    }

    pub fn msgrcv(
        &mut self,
        process: &Process,
        id: i32,
        size: u64,
        mtype: i64,
        flags: i32,
    ) -> Result<(i64, Vec<u8>), Errno> {
        let call = Call::MsgReceive {
            id,
            size,
            mtype,
            flags,
        };
        let pending = self.start(process, call, &[]);
        self.received(pending).expect("the call is blocked")
    }

    pub fn msgctl(
        &mut self,
        process: &Process,
        id: i32,
        command: MsgCommand,
    ) -> Result<i32, Errno> {
        self.value(process, Call::MsgCtl { id, command })
    }

    pub fn msg_stat(&mut self, process: &Process, id: i32, by: StatBy) -> Result<MsgStatus, Errno> {
        let call = Call::MsgCtl {
            id,
            command: MsgCommand::Stat(by),
        };
        self.call(process, call, &[]).map(|answer| match answer {
            Answer::Queue(status) => status,
            other => panic!("not a queue: {other:?}"),
        })
    }

    pub fn shmget(
        &mut self,
        process: &Process,
        key: i32,
        size: u64,
        flags: i32,
    ) -> Result<i32, Errno> {
        self.value(
            process,
            Call::ShmGet {
                key,
                size,
                flags,
                consistency: None,
            },
        )
    }

    pub fn shmctl(
        &mut self,
        process: &Process,
        id: i32,
        command: ShmCommand,
    ) -> Result<i32, Errno> {
        self.value(process, Call::ShmCtl { id, command })
    }

    pub fn shm_stat(&mut self, process: &Process, id: i32, by: StatBy) -> Result<ShmStatus, Errno> {
        let call = Call::ShmCtl {
            id,
            command: ShmCommand::Stat(by),
        };
        self.call(process, call, &[]).map(|answer| match answer {
            Answer::Segment(status) => status,
            other => panic!("not a segment: {other:?}"),
        })
    }

    pub fn start_shmat(&mut self, process: &Process, id: i32) -> Pending {
        self.start(process, Call::ShmAttach { id, flags: 0 }, &[])
    }

    /// How an attach ended; `None` while it is blocked.
    pub fn attached(&mut self, pending: Pending) -> Option<Result<(Attachment, Placement), Errno>> {
        let (outcome, placement, _) = self.take_answer(pending)?;
        Some(outcome.map(|answer| match answer {
            Answer::Attached(attachment) => (
                attachment,
                placement.expect("an attach says where pages are"),
            ),
            other => panic!("not an attachment: {other:?}"),
        }))
    }

    pub fn shmat(
        &mut self,
        process: &Process,
        id: i32,
        flags: i32,
    ) -> Result<(Attachment, Placement), Errno> {
        let pending = self.start(process, Call::ShmAttach { id, flags }, &[]);
        self.attached(pending).expect("the attach is blocked")
    }

    pub fn shmdt(&mut self, process: &Process, segment: SegmentId, count: u32) {
        self.send(
            process.node,
            ToCoordinator::Detached {
                id: 0,
                segment,
                count,
                pid: process.caller.pid,
            },
        );
    }

    pub fn exit(&mut self, process: &Process) {
        let Caller {
            process: id, pid, ..
        } = process.caller;
        self.send(process.node, ToCoordinator::Exited { process: id, pid });
    }

    /// Nodes that were asked to share a segment do so.
    pub fn share_as_asked(&mut self, nodes: &[NodeId]) {
        for &node in nodes {
            for message in self.told(node) {
                if let FromCoordinator::Share { segment } = message {
                    self.send(node, ToCoordinator::Sharing { segment });
                }
            }
        }
    }

    /// What a node has been told beside answers, taken out of the mail.
    pub fn told(&mut self, node: NodeId) -> Vec<FromCoordinator> {
        let is_news = |output: &mut Output| {
            output.to == node && !matches!(output.message, FromCoordinator::Answer { .. })
        };
        self.mail
            .extract_if(.., is_news)
            .map(|output| output.message)
            .collect()
    }
}

/// A process of root's.
pub fn root(node: NodeId, pid: i32) -> Process {
    let capabilities = u64::MAX;
    Process {
        caller: Caller {
            capabilities,
            ..user(node, pid, 0).caller
        },
        node,
    }
}

/// A process of an ordinary user, in the group of the same number.
pub fn user(node: NodeId, pid: i32, uid: u32) -> Process {
    let process = ProcessId(u64::from(pid.cast_unsigned()));
    Process {
        node,
        caller: Caller {
            process,
            pid,
            uid,
            gid: uid,
            groups: Vec::new(),
            capabilities: 0,
            memlock: None,
        },
    }
}

/// A `struct msgbuf` as it goes over the wire.
pub fn message(mtype: i64, text: &[u8]) -> Vec<u8> {
    [&mtype.to_le_bytes()[..], text].concat()
}

/// `(number, operation, flags)` as it goes over the wire.
pub fn raw(ops: &[(u16, i16, i16)]) -> Vec<u8> {
    ops.iter()
        .flat_map(|&(num, op, flags)| SemBuf { num, op, flags }.to_bytes())
        .collect()
}
