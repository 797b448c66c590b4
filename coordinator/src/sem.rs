//! The calls on semaphore sets: `semget`, `semop`, `semctl`, and the undo of a process that ends.
//!
//! The order of checks in each call is Linux's, as it decides which errno a call gets that is
//! wrong in several ways. What a set does is in [`set`].

mod queue;
mod set;
mod undo;

use migshm_protocol::call::{
    Answer, Caller, Errno, SemBuf, SemCommand, SemLimits, SemStatus, StatBy,
};
use migshm_protocol::limits::{SEMMNI, SEMMNS, SEMMSL, SEMOPM, SEMVMX};
use serde::{Deserialize, Serialize};

use crate::ids::{Entry, Table};
use crate::perm;
use crate::processes::{Awaited, CallKey, ProcessKey};
use crate::{Context, Request};
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
        now: i64,
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
        let id = self
            .table
            .insert(key, flags, request.caller, |_| SemSet::new(size, now))?;
        self.semaphores += count;
        Ok(id)
    }

    /// `semop`, with its operations in `raw`. `None`: the call is blocked.
    pub(crate) fn operate(
        &mut self,
        request: &Request<'_>,
        id: i32,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> Option<Result<(), Errno>> {
        self.try_operate(request, id, raw, cx).transpose()
    }

    fn try_operate(
        &mut self,
        request: &Request<'_>,
        id: i32,
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
                Ok(Some(()))
            }
            Attempt::Failed(errno) => Err(errno),
            Attempt::Blocked(blocking) => {
                cx.block(request, Awaited::Semaphores(id));
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

    /// Applies what a process that ended is to undo in a set.
    pub(crate) fn undo(&mut self, process: ProcessKey, pid: i32, id: i32, cx: &mut Context<'_>) {
        if let Ok(entry) = self.table.get_mut(id) {
            let mut wakes = Vec::new();
            entry.object.undo(process, pid, cx.now, &mut wakes);
            cx.wake(wakes);
        }
    }

    /// The set, if the caller may read it.
    fn readable(&self, id: i32, caller: &Caller) -> Result<&SemSet, Errno> {
        let Entry { perm, object: set } = self.table.get(id)?;
        perm::check(perm, caller, perm::READ)?;
        Ok(set)
    }

    fn remove(&mut self, id: i32, cx: &mut Context<'_>) {
        let Some(Entry { object: set, .. }) = self.table.remove(id) else {
            return;
        };
        self.semaphores -= i32::try_from(set.len()).expect("at most SEMMSL");
        for process in set.undoers() {
            cx.processes.forget_undo(process, id);
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
