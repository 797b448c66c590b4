//! One semaphore set: its values, its waiters, and what its processes owe it.
//!
//! A call does all its operations or none. Whoever changes a value then completes, on behalf of
//! the waiters, every call that has become possible; a waiter never has to look again by itself,
//! and a newcomer cannot overtake one that could have gone first. The order is Linux's:
//!
//! 1. After a change, those that only wait for zero go first, at the semaphores of the change
//!    that are zero: simple waiters in the order of the operations, then the complex ones. They
//!    change nothing, so the order among them has no effect on values.
//! 2. Then altering waiters. While complex calls wait, all are in one queue: it is tried from its
//!    head, and from its head again after each success, as that may have enabled an older one.
//!    Otherwise only the semaphores that were incremented are looked at, in the order of the
//!    operations, each queue once: a decrement that succeeds enables no other.
//! 3. A waiter that succeeds lets waiters for zero go by rule 1 before it goes itself.
//!
//! First come, first served, is not protection from starvation: a waiter that cannot go is
//! passed by younger ones that can.
//!
//! A waiter can also fail when it is tried again: the values may now stop it at an operation with
//! IPC_NOWAIT (EAGAIN) or carry it past a limit (ERANGE). Which waiters are tried again, and
//! which are not, is therefore visible, as is the operation that each is blocked by
//! (`GETNCNT`, `GETZCNT`); nothing is tried here that Linux would not try.

use migshm_protocol::NodeId;
use migshm_protocol::call::{Errno, SemBuf};
use migshm_protocol::control::{Debt, FromCoordinator, SetState};
use migshm_protocol::limits::SEMVMX;
use migshm_semaphores::SEMAPHORES_MAX;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::delegation::Delegation;
use super::queue::{Queues, Waiter};
use super::undo::Undo;
use super::{IPC_NOWAIT, SEM_UNDO};
use crate::processes::{CallKey, ProcessKey, Wake};
use crate::{Context, Output};

/// Sets to which more processes may owe something are not delegated.
const DELEGATED_DEBTORS_MAX: usize = 64;

/// How an attempt to do a call's operations ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// All done.
    Done,
    /// None done: the operation at this position has to wait.
    Blocked(usize),
    /// None done.
    Failed(Errno),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SemSet {
    pub(crate) otime: i64,
    pub(crate) ctime: i64,
    values: Vec<u16>,
    /// Of the processes that last changed each semaphore.
    pids: Vec<i32>,
    queues: Queues,
    undo: BTreeMap<ProcessKey, Undo>,
    pub(crate) delegation: Delegation,
    /// How often its owner and mode have been set.
    pub(crate) access: u64,
}

/// Why one operation cannot be done.
enum Stop {
    WouldBlock,
    OutOfRange,
}

impl SemSet {
    pub(crate) fn new(size: usize, now: i64) -> SemSet {
        SemSet {
            otime: 0,
            ctime: now,
            values: vec![0; size],
            pids: vec![0; size],
            queues: Queues::default(),
            undo: BTreeMap::default(),
            delegation: Delegation::new(),
            access: 0,
        }
    }

    /// How many semaphores it has.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn values(&self) -> &[u16] {
        &self.values
    }

    /// `GETPID`.
    pub(crate) fn pid(&self, num: u16) -> i32 {
        self.pids[usize::from(num)]
    }

    /// `GETNCNT`.
    pub(crate) fn count_waiting_for_increase(&self, num: u16) -> i32 {
        i32::try_from(self.queues.waiting_for_increase(num)).unwrap_or(i32::MAX)
    }

    /// `GETZCNT`.
    pub(crate) fn count_waiting_for_zero(&self, num: u16) -> i32 {
        i32::try_from(self.queues.waiting_for_zero(num)).unwrap_or(i32::MAX)
    }

    /// Makes room for what the process may come to owe; needed before an attempt with SEM_UNDO.
    pub(crate) fn allocate_undo(&mut self, process: ProcessKey) {
        self.undo.entry(process).or_default();
    }

    /// The processes that room was made for.
    pub(crate) fn undoers(&self) -> impl Iterator<Item = ProcessKey> {
        self.undo.keys().copied()
    }

    /// Does all operations of a call, or none.
    pub(crate) fn attempt(&mut self, ops: &[SemBuf], process: ProcessKey, pid: i32) -> Attempt {
        let mut undo = if ops.iter().any(|op| op.flags & SEM_UNDO != 0) {
            self.undo.get_mut(&process)
        } else {
            None
        };
        for (at, op) in ops.iter().enumerate() {
            let Err(stop) = perform(&mut self.values, undo.as_deref_mut(), op) else {
                continue;
            };
            for op in ops[..at].iter().rev() {
                revert(&mut self.values, undo.as_deref_mut(), op);
            }
            return match stop {
                Stop::OutOfRange => Attempt::Failed(Errno::ERANGE),
                Stop::WouldBlock if op.flags & IPC_NOWAIT != 0 => Attempt::Failed(Errno::EAGAIN),
                Stop::WouldBlock => Attempt::Blocked(at),
            };
        }
        for op in ops {
            self.pids[usize::from(op.num)] = pid;
        }
        Attempt::Done
    }

    /// After a newcomer's successful attempt.
    pub(crate) fn finished(&mut self, ops: &[SemBuf], now: i64, wakes: &mut Vec<Wake>) {
        self.otime = now;
        if !self.queues.is_empty() && ops.iter().any(|op| op.op != 0) {
            self.update(Some(ops), now, wakes);
        }
    }

    /// Queues a call whose attempt was blocked.
    pub(crate) fn enqueue(&mut self, waiter: Waiter) {
        self.queues.push(waiter);
    }

    /// Takes a waiter out of its queue.
    pub(crate) fn cancel(&mut self, call: CallKey) {
        self.queues.remove(call);
        self.delegation.forget_call(call);
    }

    /// `SETVAL`.
    pub(crate) fn set_value(
        &mut self,
        num: u16,
        value: u16,
        pid: i32,
        now: i64,
        wakes: &mut Vec<Wake>,
    ) {
        self.undo.values_mut().for_each(|undo| undo.clear(num));
        self.values[usize::from(num)] = value;
        self.pids[usize::from(num)] = pid;
        self.ctime = now;
        self.update(None, now, wakes);
    }

    /// `SETALL`; there must be a value for each semaphore.
    pub(crate) fn set_all(&mut self, values: &[u16], pid: i32, now: i64, wakes: &mut Vec<Wake>) {
        self.undo.values_mut().for_each(Undo::clear_all);
        self.values.copy_from_slice(values);
        self.pids.fill(pid);
        self.ctime = now;
        self.update(None, now, wakes);
    }

    /// A process has ended; pays what it owes.
    pub(crate) fn undo(&mut self, process: ProcessKey, pid: i32, now: i64, wakes: &mut Vec<Wake>) {
        let Some(undo) = self.undo.remove(&process) else {
            return;
        };
        for num in undo.apply(&mut self.values) {
            self.pids[usize::from(num)] = pid;
        }
        self.otime = now;
        self.update(None, now, wakes);
    }

    /// A call from a node has succeeded; whether the set is to be delegated to it now. What
    /// processes of other nodes owe would have to come back when they end, before anybody can have
    /// seen that; so they may not owe anything.
    pub(crate) fn is_due(&mut self, node: NodeId) -> bool {
        self.delegation.is_due(node)
            && self.queues.is_empty()
            && self.len() <= SEMAPHORES_MAX
            && self.undo.len() <= DELEGATED_DEBTORS_MAX
            && self.undo.iter().all(|(process, undo)| {
                process.node == node || undo.owed().all(|(_, owed)| owed == 0)
            })
    }

    /// Delegates the set to the node of a call that has succeeded, and answers that thereby.
    pub(crate) fn delegate(&mut self, call: CallKey, id: i32, cx: &mut Context<'_>) {
        let of_node = self.undo.iter().filter(|(key, _)| key.node == call.node);
        let debts = of_node
            .flat_map(|(key, undo)| {
                undo.owed().map(|(num, owed)| Debt {
                    process: key.process,
                    pid: 0,
                    num,
                    owed,
                })
            })
            .collect();
        let state = SetState {
            values: self.values.clone(),
            pids: self.pids.clone(),
            otime: self.otime,
            debts,
        };
        let delegated = FromCoordinator::Delegated {
            id: call.id,
            set: id,
            number: self.delegation.delegate(call.node),
            access: self.access,
            state,
        };
        cx.out.push(Output::new(call.node, delegated));
    }

    /// Takes over what has become of the set at a node; the state must fit.
    pub(crate) fn restore(&mut self, node: NodeId, state: &SetState) {
        self.values.copy_from_slice(&state.values);
        self.pids.copy_from_slice(&state.pids);
        self.otime = self.otime.max(state.otime);
        for debt in &state.debts {
            let process = ProcessKey {
                node,
                process: debt.process,
            };
            let undo = self.undo.entry(process).or_default();
            undo.adjust(debt.num, debt.owed.into());
        }
    }

    /// The set is removed.
    pub(crate) fn dissolve(self) -> Vec<Wake> {
        self.queues
            .into_waiters()
            .map(|w| w.wake(Err(Errno::EIDRM)))
            .collect()
    }

    /// Completes every waiter that a change has made possible. `changed`: the operations that
    /// made it, or `None` if any semaphore may have changed.
    fn update(&mut self, changed: Option<&[SemBuf]>, now: i64, wakes: &mut Vec<Wake>) {
        let mut completed = self.complete_zero(changed, wakes);
        if !self.queues.whole.alter.is_empty() {
            completed |= self.complete_alter_whole(wakes);
        } else if let Some(ops) = changed {
            for op in ops.iter().filter(|op| op.op > 0) {
                completed |= self.complete_alter_at(op.num, wakes);
            }
        } else {
            for num in self.queues.waited_for() {
                completed |= self.complete_alter_at(num, wakes);
            }
        }
        if completed {
            self.otime = now;
        }
        self.queues.unmerge();
    }

    /// Rule 1. True if a waiter succeeded.
    fn complete_zero(&mut self, changed: Option<&[SemBuf]>, wakes: &mut Vec<Wake>) -> bool {
        let mut completed = false;
        let mut any_zero = false;
        let mut at = |set: &mut SemSet, num: u16| {
            if set.values[usize::from(num)] == 0 {
                any_zero = true;
                completed |= set.complete_zero_at(num, wakes);
            }
        };
        match changed {
            Some(ops) => ops.iter().for_each(|op| at(self, op.num)),
            None => {
                self.queues
                    .waited_for()
                    .into_iter()
                    .for_each(|num| at(self, num));
                any_zero |= !self.queues.whole.zero.is_empty() && self.values.contains(&0);
            }
        }
        if any_zero && !self.queues.whole.zero.is_empty() {
            let mut waiters = std::mem::take(&mut self.queues.whole.zero);
            waiters.retain_mut(|w| self.still_waits(w, &mut completed, wakes));
            self.queues.whole.zero = waiters;
        }
        completed
    }

    fn complete_zero_at(&mut self, num: u16, wakes: &mut Vec<Wake>) -> bool {
        let mut completed = false;
        let mut waiters = self.queues.take_zero(num);
        waiters.retain_mut(|w| self.still_waits(w, &mut completed, wakes));
        self.queues.restore_zero(num, waiters);
        completed
    }

    /// Tries a waiter for zero; if it has come to its end, wakes it and returns false.
    fn still_waits(
        &mut self,
        waiter: &mut Waiter,
        completed: &mut bool,
        wakes: &mut Vec<Wake>,
    ) -> bool {
        let result = match self.attempt(&waiter.ops, waiter.process, waiter.pid) {
            Attempt::Blocked(at) => {
                waiter.blocking = at;
                return true;
            }
            Attempt::Done => Ok(()),
            Attempt::Failed(errno) => Err(errno),
        };
        *completed |= result.is_ok();
        self.queues.left(waiter);
        wakes.push(waiter.wake(result));
        false
    }

    /// Rule 2, where all altering waiters are in one queue. True if a waiter succeeded.
    fn complete_alter_whole(&mut self, wakes: &mut Vec<Wake>) -> bool {
        let mut completed = false;
        let mut waiters = std::mem::take(&mut self.queues.whole.alter);
        let mut at = 0;
        while let Some(waiter) = waiters.get_mut(at) {
            let attempt = self.attempt(&waiter.ops, waiter.process, waiter.pid);
            if let Attempt::Blocked(blocking) = attempt {
                waiter.blocking = blocking;
                at += 1;
                continue;
            }
            let waiter = waiters.remove(at).expect("it is there");
            if self.complete_alter(&waiter, attempt, wakes) {
                completed = true;
                at = 0;
            }
        }
        self.queues.whole.alter = waiters;
        completed
    }

    /// Rule 2, for the waiters of one semaphore. True if a waiter succeeded.
    fn complete_alter_at(&mut self, num: u16, wakes: &mut Vec<Wake>) -> bool {
        let mut completed = false;
        let mut waiters = self.queues.take_alter(num);
        let mut at = 0;
        while self.values[usize::from(num)] > 0 {
            let Some(waiter) = waiters.get_mut(at) else {
                break;
            };
            let attempt = self.attempt(&waiter.ops, waiter.process, waiter.pid);
            if let Attempt::Blocked(_) = attempt {
                at += 1;
                continue;
            }
            let waiter = waiters.remove(at).expect("it is there");
            completed |= self.complete_alter(&waiter, attempt, wakes);
        }
        self.queues.restore_alter(num, waiters);
        completed
    }

    /// Wakes a waiter whose last attempt was not blocked; true if it succeeded.
    fn complete_alter(&mut self, waiter: &Waiter, attempt: Attempt, wakes: &mut Vec<Wake>) -> bool {
        self.queues.left(waiter);
        let result = match attempt {
            Attempt::Failed(errno) => Err(errno),
            _ => Ok(()),
        };
        if result.is_ok() {
            self.complete_zero(Some(&waiter.ops), wakes);
        }
        wakes.push(waiter.wake(result));
        result.is_ok()
    }
}

fn perform(values: &mut [u16], undo: Option<&mut Undo>, op: &SemBuf) -> Result<(), Stop> {
    let value = &mut values[usize::from(op.num)];
    if op.op == 0 {
        return if *value == 0 {
            Ok(())
        } else {
            Err(Stop::WouldBlock)
        };
    }
    let result = i32::from(*value) + i32::from(op.op);
    if result < 0 {
        return Err(Stop::WouldBlock);
    }
    if result > SEMVMX {
        return Err(Stop::OutOfRange);
    }
    if op.flags & SEM_UNDO != 0 && !undo.is_none_or(|undo| undo.adjust(op.num, -i32::from(op.op))) {
        return Err(Stop::OutOfRange);
    }
    *value = result as u16;
    Ok(())
}

fn revert(values: &mut [u16], undo: Option<&mut Undo>, op: &SemBuf) {
    let value = &mut values[usize::from(op.num)];
    *value = (i32::from(*value) - i32::from(op.op)) as u16;
    if let (true, Some(undo)) = (op.flags & SEM_UNDO != 0, undo) {
        undo.adjust(op.num, i32::from(op.op));
    }
}
