//! What belongs to a process: the sets it has undo in, and its calls that are blocked.
//!
//! The two halves of [`Processes`] mirror each other: a call is in `blocked` exactly while its
//! process lists it.

use migshm_protocol::call::{Answer, Errno, Outcome};
use migshm_protocol::{NodeId, ProcessId, SegmentId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A process of the cluster. Nodes number their processes independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct ProcessKey {
    pub(crate) node: NodeId,
    pub(crate) process: ProcessId,
}

/// A call of the cluster. Nodes number their calls independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct CallKey {
    pub(crate) node: NodeId,
    pub(crate) id: u64,
}

/// What a blocked call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Awaited {
    /// The semaphores of the set with this id.
    Semaphores(i32),
    /// The return of the set with this id, which is delegated.
    Return(i32),
    /// Leave to attach this segment.
    Segment(SegmentId),
    /// Room or messages in the message queue with this id.
    Queue(i32),
    /// A node's answer to the question with this number.
    Account(u64),
}

/// A blocked call has come to its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wake {
    pub(crate) call: CallKey,
    pub(crate) outcome: Outcome,
    /// What follows the answer.
    pub(crate) raw: Vec<u8>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Processes {
    /// By node, as all of a node's end at once.
    processes: BTreeMap<NodeId, BTreeMap<ProcessId, Process>>,
    blocked: BTreeMap<CallKey, Blocked>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Process {
    /// Its pid when it last took part in something.
    pid: i32,
    /// Ids of the sets that hold undo of it, the one used last at the end.
    undo: Vec<i32>,
    calls: Vec<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Blocked {
    process: ProcessKey,
    on: Awaited,
}

impl Wake {
    /// The call has succeeded, with nothing to return.
    pub(crate) fn done(call: CallKey) -> Wake {
        Wake {
            call,
            outcome: Ok(Answer::Value(0)),
            raw: Vec::new(),
        }
    }

    pub(crate) fn failed(call: CallKey, errno: Errno) -> Wake {
        Wake {
            call,
            outcome: Err(errno),
            raw: Vec::new(),
        }
    }
}

impl Processes {
    /// The process has undo in the set, and used it just now.
    pub(crate) fn note_undo(&mut self, key: ProcessKey, pid: i32, set: i32) {
        let process = self.process(key, pid);
        if process.undo.last() != Some(&set) {
            process.undo.retain(|&s| s != set);
            process.undo.push(set);
        }
    }

    /// The set is gone, and the process's undo in it.
    pub(crate) fn forget_undo(&mut self, key: ProcessKey, set: i32) {
        if let Some(process) = self.get_mut(key) {
            process.undo.retain(|&s| s != set);
            self.drop_if_idle(key);
        }
    }

    /// A call of the process is blocked from now on. False if a call with this id is already.
    pub(crate) fn block(
        &mut self,
        call: CallKey,
        process: ProcessKey,
        pid: i32,
        on: Awaited,
    ) -> bool {
        if self.is_blocked(call) {
            return false;
        }
        self.process(process, pid).calls.push(call.id);
        self.blocked.insert(call, Blocked { process, on });
        true
    }

    /// What a call waits for, if it is blocked.
    pub(crate) fn awaited(&self, call: CallKey) -> Option<Awaited> {
        Some(self.blocked.get(&call)?.on)
    }

    pub(crate) fn is_blocked(&self, call: CallKey) -> bool {
        self.blocked.contains_key(&call)
    }

    /// The call is blocked no longer; returns what it was waiting for, if it was.
    pub(crate) fn unblock(&mut self, call: CallKey) -> Option<Awaited> {
        let Blocked { process, on } = self.blocked.remove(&call)?;
        if let Some(owner) = self.get_mut(process) {
            owner.calls.retain(|&id| id != call.id);
            self.drop_if_idle(process);
        }
        Some(on)
    }

    /// The blocked calls of a process.
    pub(crate) fn calls(&self, key: ProcessKey) -> Vec<CallKey> {
        let calls = self.get(key).map_or(&[][..], |p| &p.calls);
        calls
            .iter()
            .map(|&id| CallKey { node: key.node, id })
            .collect()
    }

    /// Forgets a process, whose calls must be unblocked already; returns its pid and the sets
    /// that hold undo of it, in the order in which Linux applies it: the one used last first.
    pub(crate) fn remove(&mut self, key: ProcessKey) -> Option<(i32, Vec<i32>)> {
        let Process { pid, mut undo, .. } = self.take(key)?;
        undo.reverse();
        Some((pid, undo))
    }

    /// The processes of a node, in ascending order.
    pub(crate) fn of_node(&self, node: NodeId) -> Vec<ProcessKey> {
        let of_node = self.processes.get(&node).into_iter();
        of_node
            .flat_map(|of| of.keys())
            .map(|&process| ProcessKey { node, process })
            .collect()
    }

    fn get(&self, key: ProcessKey) -> Option<&Process> {
        self.processes.get(&key.node)?.get(&key.process)
    }

    fn get_mut(&mut self, key: ProcessKey) -> Option<&mut Process> {
        self.processes.get_mut(&key.node)?.get_mut(&key.process)
    }

    fn process(&mut self, key: ProcessKey, pid: i32) -> &mut Process {
        let of_node = self.processes.entry(key.node).or_default();
        let process = of_node.entry(key.process).or_default();
        process.pid = pid;
        process
    }

    fn take(&mut self, key: ProcessKey) -> Option<Process> {
        self.processes.get_mut(&key.node)?.remove(&key.process)
    }

    fn drop_if_idle(&mut self, key: ProcessKey) {
        let is_idle = |p: &Process| p.undo.is_empty() && p.calls.is_empty();
        if self.get(key).is_some_and(is_idle) {
            self.take(key);
        }
    }
}
