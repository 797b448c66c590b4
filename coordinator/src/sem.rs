//! The calls on semaphore sets: `semget`, `semop`, `semctl`, and the undo of a process that ends.
//!
//! The order of checks in each call is Linux's, as it decides which errno a call gets that is
//! wrong in several ways. What a set does is in [`set`].

mod delegation;
mod queue;
mod set;
mod undo;

use migshm_protocol::NodeId;
use migshm_protocol::call::{
    Answer, Call, Caller, Errno, SemBuf, SemCommand, SemLimits, SemStatus, SetMemory, StatBy,
};
use migshm_protocol::control::{FromCoordinator, SetState};
use migshm_protocol::limits::{SEMMNI, SEMMNS, SEMMSL, SEMOPM, SEMVMX};
use serde::{Deserialize, Serialize};

use crate::ids::{Contents, Entry, Table};
use crate::perm;
use crate::processes::{Awaited, CallKey, ProcessKey, Wake};
use crate::quotas::Amount;
use crate::{Context, Output, Request};
pub(crate) use delegation::{Held, HeldCall};
use queue::Waiter;
use set::{Attempt, SemSet};

/// Flag of a `sembuf`: fail rather than wait.
const IPC_NOWAIT: i16 = 0o4000;
/// Flag of a `sembuf`: undo when the process ends.
const SEM_UNDO: i16 = 0x1000;

/// Fields of `struct seminfo` that Linux reports and does not use (`SEMUME`, `SEMUSZ`).
const SEMUME: i32 = SEMOPM as i32;
const SEMUSZ: i32 = 20;

/// All semaphore sets.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SemSets {
    table: Table<SemSet>,
    semaphores: i32,
}

/// Its semaphores.
impl Contents for SemSet {
    fn contents(&self) -> u64 {
        self.len() as u64
    }
}

impl SemSets {
    pub(crate) fn new() -> SemSets {
        SemSets {
            table: Table::new(SEMMNI as usize),
            semaphores: 0,
        }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.table.in_use() == 0
    }

    /// `semget`.
    pub(crate) fn get(
        &mut self,
        request: &Request<'_>,
        key: i32,
        count: i32,
        flags: i32,
        cx: &Context<'_>,
    ) -> Result<i32, Errno> {
        let size = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
        if count > SEMMSL {
            return Err(Errno::EINVAL);
        }
        if let Some(id) = self
            .table
            .find(key, flags, request.caller, |set| size <= set.len())?
        {
            return Ok(id);
        }
        if count == 0 {
            return Err(Errno::EINVAL);
        }
        if count > SEMMNS - self.semaphores {
            return Err(Errno::ENOSPC);
        }
        let quota = Amount {
            objects: cx.quotas.sets,
            contents: cx.quotas.semaphores,
        };
        self.table.check_quota(request.caller, quota, size as u64)?;
        let id = self
            .table
            .insert(key, flags, request.caller, |_| SemSet::new(size, cx.now))?;
        self.semaphores += count;
        Ok(id)
    }

    /// `semop`, with its operations in `raw`. `None`: the call is blocked, or answered by the
    /// delegation of the set.
    pub(crate) fn operate(
        &mut self,
        request: &Request<'_>,
        id: i32,
        memory: SetMemory,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> Option<Result<(), Errno>> {
        self.try_operate(request, id, memory, raw, cx).transpose()
    }

    fn try_operate(
        &mut self,
        request: &Request<'_>,
        id: i32,
        memory: SetMemory,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> Result<Option<()>, Errno> {
        if raw.len() > SEMOPM * SemBuf::SIZE {
            return Err(Errno::E2BIG);
        }
        if raw.is_empty() {
            return Err(Errno::EINVAL);
        }
        let ops = SemBuf::parse_all(raw).ok_or(Errno::EINVAL)?;
        let Entry { perm, object: set } = self.table.get_mut(id)?;

        let process = request.process();
        if ops.iter().any(|op| op.flags & SEM_UNDO != 0) {
            // Linux allocates it before all other checks, and that shows: its sets are undone,
            // and their `sem_otime` is set, also if nothing was ever done under it.
            cx.processes.note_undo(process, request.caller.pid, id);
            set.allocate_undo(process);
        }
        if ops.iter().any(|op| usize::from(op.num) >= set.len()) {
            return Err(Errno::EFBIG);
        }
        let alters = ops.iter().any(|op| op.op != 0);
        perm::check(
            perm,
            request.caller,
            if alters { perm::WRITE } else { perm::READ },
        )?;

        match set.attempt(&ops, process, request.caller.pid) {
            Attempt::Done => {
                let mut wakes = Vec::new();
                set.finished(&ops, cx.now, &mut wakes);
                cx.wake(wakes);
                // In memory everything may be altered and read.
                let may_all = alters && perm::check(perm, request.caller, perm::READ).is_ok();
                if may_all && memory != SetMemory::Unusable && set.is_due(request.call.node) {
                    set.delegate(request.call, id, cx);
                    return Ok(None);
                }
                Ok(Some(()))
            }
            Attempt::Failed(errno) => Err(errno),
            Attempt::Blocked(blocking) => {
                cx.block(request, Awaited::Semaphores(id));
                set.delegation.was_contended(request.call.node);
                set.enqueue(Waiter::new(
                    request.call,
                    process,
                    request.caller.pid,
                    ops,
                    blocking,
                ));
                Ok(None)
            }
        }
    }

    /// `semctl`, with the values of `SETALL` in `raw`; those of `GETALL` come beside the answer.
    pub(crate) fn control(
        &mut self,
        request: &Request<'_>,
        id: i32,
        command: SemCommand,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> Result<(Answer, Vec<u8>), Errno> {
        if id < 0 {
            return Err(Errno::EINVAL);
        }
        let caller = request.caller;
        let mut wakes = Vec::new();
        let answer = match command {
            SemCommand::Stat(by) => Answer::Set(self.stat(request, id, by)?),
            SemCommand::Limits => Answer::SemLimits(self.limits(SEMUSZ, SEMVMX)),
            SemCommand::Usage => {
                Answer::SemLimits(self.limits(self.table.in_use(), self.semaphores))
            }
            SemCommand::Remove => {
                perm::check_control(&self.table.get(id)?.perm, caller)?;
                self.remove(id, cx);
                Answer::Value(0)
            }
            SemCommand::Set(new) => {
                let Entry { perm, object: set } = self.table.get_mut(id)?;
                perm::check_control(perm, caller)?;
                perm::update(perm, new)?;
                set.ctime = cx.now;
                set.access += 1;
                Answer::Value(0)
            }
            SemCommand::GetAll => {
                let set = self.readable(id, caller)?;
                let count = u32::try_from(set.len()).expect("at most SEMMSL");
                let values = set
                    .values()
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                return Ok((Answer::Values(count), values));
            }
            SemCommand::SetAll => {
                let Entry { perm, object: set } = self.table.get_mut(id)?;
                perm::check(perm, caller, perm::WRITE)?;
                let values = parse_values(raw, set.len())?;
                set.set_all(&values, caller.pid, cx.now, &mut wakes);
                Answer::Value(0)
            }
            SemCommand::SetVal(num, value) => {
                // Linux looks at the value before it looks for the set.
                let in_range = |value: &u16| i32::from(*value) <= SEMVMX;
                let value = u16::try_from(value)
                    .ok()
                    .filter(in_range)
                    .ok_or(Errno::ERANGE)?;
                let Entry { perm, object: set } = self.table.get_mut(id)?;
                let num = semaphore(set, num)?;
                perm::check(perm, caller, perm::WRITE)?;
                set.set_value(num, value, caller.pid, cx.now, &mut wakes);
                Answer::Value(0)
            }
            SemCommand::GetVal(num) => {
                let set = self.readable(id, caller)?;
                Answer::Value(set.values()[usize::from(semaphore(set, num)?)].into())
            }
            SemCommand::GetPid(num) => {
                let set = self.readable(id, caller)?;
                Answer::Value(set.pid(semaphore(set, num)?))
            }
            SemCommand::GetNcnt(num) => {
                let set = self.readable(id, caller)?;
                Answer::Value(set.count_waiting_for_increase(semaphore(set, num)?))
            }
            SemCommand::GetZcnt(num) => {
                let set = self.readable(id, caller)?;
                Answer::Value(set.count_waiting_for_zero(semaphore(set, num)?))
            }
        };
        cx.wake(wakes);
        Ok((answer, Vec::new()))
    }

    /// Takes a blocked call out of its queue; nobody else can go on because of that.
    pub(crate) fn cancel(&mut self, id: i32, call: CallKey) {
        if let Ok(entry) = self.table.get_mut(id) {
            entry.object.cancel(call);
        }
    }

    /// Has a call that is held back not wait for more than the return of its set.
    pub(crate) fn cancel_held(&mut self, id: i32, call: CallKey, errno: Errno) {
        if let Ok(entry) = self.table.get_mut(id) {
            entry.object.delegation.cancel(call, errno);
        }
    }

    /// Applies what a process that ended is to undo in a set, as soon as that is not delegated.
    pub(crate) fn undo(&mut self, process: ProcessKey, pid: i32, id: i32, cx: &mut Context<'_>) {
        let Ok(Entry { object: set, .. }) = self.table.get_mut(id) else {
            return;
        };
        if set.delegation.to().is_some() {
            return hold(set, id, Held::Undo(process, pid), process.node, cx);
        }
        let mut wakes = Vec::new();
        set.undo(process, pid, cx.now, &mut wakes);
        cx.wake(wakes);
    }

    /// Holds a call back if it is about a set that is delegated; false if it is not.
    pub(crate) fn hold(
        &mut self,
        request: &Request<'_>,
        call: Call,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> bool {
        let id = match call {
            Call::SemOp { id, .. } => id,
            Call::SemCtl { id, command } => match command {
                SemCommand::Limits | SemCommand::Usage => return false,
                SemCommand::Stat(StatBy::Index | StatBy::Any) => match self.table.at(id) {
                    Ok((id, _)) => id,
                    Err(_) => return false,
                },
                _ => id,
            },
            _ => return false,
        };
        let Ok(Entry { object: set, .. }) = self.table.get_mut(id) else {
            return false;
        };
        if set.delegation.to().is_none() {
            return false;
        }
        cx.block(request, Awaited::Return(id));
        let held = HeldCall {
            key: request.call,
            caller: request.caller.clone(),
            call,
            raw: raw.to_vec(),
            cancelled: None,
        };
        hold(set, id, Held::Call(held), request.call.node, cx);
        true
    }

    /// A set is returned; false if it was not delegated thus. What was held back follows from
    /// [`SemSets::next_held`].
    pub(crate) fn take_back(
        &mut self,
        from: NodeId,
        id: i32,
        number: u64,
        state: &SetState,
        cx: &mut Context<'_>,
    ) -> bool {
        let Ok(Entry { object: set, .. }) = self.table.get_mut(id) else {
            return false;
        };
        let fits = state.values.len() == set.len()
            && state.pids.len() == set.len()
            && state.values.iter().all(|&v| i32::from(v) <= SEMVMX)
            && state.debts.iter().all(|d| usize::from(d.num) < set.len());
        if !fits || !set.delegation.take_back(from, number) {
            return false;
        }
        for debt in &state.debts {
            let process = ProcessKey {
                node: from,
                process: debt.process,
            };
            cx.processes.note_undo(process, debt.pid, id);
        }
        set.restore(from, state);
        true
    }

    /// What is next of all that was held back from a set that is delegated no longer.
    pub(crate) fn next_held(&mut self, id: i32) -> Option<Held> {
        let Entry { object: set, .. } = self.table.get_mut(id).ok()?;
        set.delegation.next_held()
    }

    /// A node is gone: the sets that were delegated to it are as they were before, and what was
    /// held back from them can follow. Gives their ids.
    pub(crate) fn abandon(&mut self, node: NodeId) -> Vec<i32> {
        let ids = self.table.ids();
        ids.into_iter()
            .filter(|&id| {
                self.table
                    .get_mut(id)
                    .is_ok_and(|entry| entry.object.delegation.forget(node))
            })
            .collect()
    }

    /// The sets that are delegated to a node.
    pub(crate) fn delegated_to(&self, node: NodeId) -> Vec<i32> {
        let is_delegated = |&id: &i32| {
            let to = self
                .table
                .get(id)
                .ok()
                .and_then(|e| e.object.delegation.to());
            to.is_some_and(|(to, _)| to == node)
        };
        self.table.ids().into_iter().filter(is_delegated).collect()
    }

    /// The set, if the caller may read it.
    fn readable(&self, id: i32, caller: &Caller) -> Result<&SemSet, Errno> {
        let Entry { perm, object: set } = self.table.get(id)?;
        perm::check(perm, caller, perm::READ)?;
        Ok(set)
    }

    fn remove(&mut self, id: i32, cx: &mut Context<'_>) {
        let Some(Entry {
            object: mut set, ..
        }) = self.table.remove(id)
        else {
            return;
        };
        while let Some(held) = set.delegation.next_held() {
            if let Held::Call(held) = held {
                cx.wake([Wake::failed(held.key, Errno::EIDRM)]);
            }
        }
        self.semaphores -= i32::try_from(set.len()).expect("at most SEMMSL");
        for process in set.undoers() {
            cx.processes.forget_undo(process, id);
        }
        for &node in set.delegation.known_to() {
            let gone = FromCoordinator::SetRemoved { set: id };
            cx.out.push(Output::new(node, gone));
        }
        cx.wake(set.dissolve());
    }

    fn stat(&self, request: &Request<'_>, id: i32, by: StatBy) -> Result<SemStatus, Errno> {
        let (id, Entry { perm, object: set }) = self.table.named(id, by, request.caller)?;
        Ok(SemStatus {
            id,
            perm: *perm,
            otime: set.otime,
            ctime: set.ctime,
            nsems: set.len() as u64,
        })
    }

    fn limits(&self, semusz: i32, semaem: i32) -> SemLimits {
        SemLimits {
            semmap: SEMMNS,
            semmni: SEMMNI,
            semmns: SEMMNS,
            semmnu: SEMMNS,
            semmsl: SEMMSL,
            semopm: SEMOPM as i32,
            semume: SEMUME,
            semusz,
            semvmx: SEMVMX,
            semaem,
            highest: self.table.highest(),
        }
    }
}

/// Holds something back until a set is returned, which it is asked to be.
fn hold(set: &mut SemSet, id: i32, held: Held, from: NodeId, cx: &mut Context<'_>) {
    if let Some((node, number)) = set.delegation.hold(held, from) {
        let recall = FromCoordinator::Recall { set: id, number };
        cx.out.push(Output::new(node, recall));
    }
}

/// A semaphore's number; EINVAL if the set does not have it.
fn semaphore(set: &SemSet, num: i32) -> Result<u16, Errno> {
    u16::try_from(num)
        .ok()
        .filter(|&num| usize::from(num) < set.len())
        .ok_or(Errno::EINVAL)
}

/// The values of `SETALL`: EINVAL unless there is one for each semaphore, ERANGE if one is too
/// large.
fn parse_values(raw: &[u8], count: usize) -> Result<Vec<u16>, Errno> {
    let (values, rest) = raw.as_chunks::<2>();
    if values.len() != count || !rest.is_empty() {
        return Err(Errno::EINVAL);
    }
    let in_range = |value: &u16| i32::from(*value) <= SEMVMX;
    values
        .iter()
        .map(|&bytes| {
            Some(u16::from_le_bytes(bytes))
                .filter(in_range)
                .ok_or(Errno::ERANGE)
        })
        .collect()
}
