//! `semget`, `semop`, `semtimedop`, `semctl`.

use std::ffi::c_int;

use libc::timespec;
use migshm_protocol::call::{Answer, Call, Errno, SemBuf, SemCommand, StatBy};
use migshm_protocol::limits::{IPCMNI, SEMOPM};
use migshm_protocol::local::{FromNode, ToNode};

use crate::client::{self, Session, out_of_step};
use crate::connection::{Patience, Raw, Reply};
use crate::convert::{self, SemidDs};
use crate::sys::{self, SignalsBlocked};
use crate::{delegated, process};

/// `semget(2)`.
pub fn get(key: i32, count: c_int, flags: c_int) -> Result<isize, Errno> {
    convert::value(client::call(Call::SemGet { key, count, flags })?)
}

/// `semop(2)` and `semtimedop(2)`; no timeout if its address is 0.
pub fn operate(id: c_int, operations: usize, count: usize, timeout: usize) -> Result<isize, Errno> {
    let timeout = if timeout == 0 {
        None
    } else {
        Some(sys::copy_in::<timespec>(timeout)?)
    };
    if count > SEMOPM {
        return Err(Errno::E2BIG);
    }
    if count == 0 {
        return Err(Errno::EINVAL);
    }
    let deadline = match timeout.map(deadline).transpose() {
        Ok(deadline) if id >= 0 => deadline,
        _ => {
            // The kernel reads the operations before it looks at these.
            for operation in 0..count {
                sys::copy_in::<[u8; SemBuf::SIZE]>(operations + operation * SemBuf::SIZE)?;
            }
            return Err(Errno::EINVAL);
        }
    };
    let own = process::own()?;
    if count == 1
        && let Some(done) = delegated::operate(own, id, operations, deadline)
    {
        return done;
    }
    let mut session = Session::begin()?;
    let request = process::request_id();
    let operations = Raw {
        address: operations,
        length: count * SemBuf::SIZE,
    };
    let memory = delegated::memory_of(own, id);
    let signals = SignalsBlocked::new();
    let call = Call::SemOp { id, memory };
    session.request(&ToNode::Call { id: request, call }, operations)?;
    let Reply {
        message,
        descriptor,
    } = session.reply(request, Patience::UntilSignal(signals, deadline))?;
    match (message, descriptor) {
        (
            FromNode::Answer {
                outcome: Ok(Answer::Shared(shared)),
                ..
            },
            descriptor,
        ) => {
            if let Some(memory) = descriptor {
                delegated::add(own, id, shared, memory);
            }
            Ok(0)
        }
        (FromNode::Answer { outcome, .. }, _) => convert::value(outcome?),
        _ => Err(out_of_step()),
    }
}

/// `semctl(2)`. `argument` is the register that holds the union: an int, a pointer, or nothing.
pub fn control(id: c_int, number: c_int, command: c_int, argument: usize) -> Result<isize, Errno> {
    if id < 0 {
        return Err(Errno::EINVAL);
    }
    let command = match command {
        libc::IPC_STAT => SemCommand::Stat(StatBy::Id),
        convert::SEM_STAT => SemCommand::Stat(StatBy::Index),
        convert::SEM_STAT_ANY => SemCommand::Stat(StatBy::Any),
        libc::IPC_SET => SemCommand::Set(sys::copy_in::<SemidDs>(argument)?.perm.to_new()),
        libc::IPC_RMID => SemCommand::Remove,
        libc::IPC_INFO => SemCommand::Limits,
        convert::SEM_INFO => SemCommand::Usage,
        libc::GETALL => return values(id, argument),
        libc::SETALL => return set_values(id, argument),
        libc::GETVAL => SemCommand::GetVal(number),
        libc::SETVAL => SemCommand::SetVal(number, argument as c_int),
        libc::GETPID => SemCommand::GetPid(number),
        libc::GETNCNT => SemCommand::GetNcnt(number),
        libc::GETZCNT => SemCommand::GetZcnt(number),
        _ => return Err(Errno::EINVAL),
    };
    convert::deliver(
        client::call(Call::SemCtl { id, command })?,
        command == SemCommand::Stat(StatBy::Id),
        argument,
    )
}

/// `GETALL`.
fn values(id: c_int, array: usize) -> Result<isize, Errno> {
    let mut session = Session::begin()?;
    let request = process::request_id();
    let call = Call::SemCtl {
        id,
        command: SemCommand::GetAll,
    };
    session.request(&ToNode::Call { id: request, call }, Raw::NONE)?;
    match session.outcome_at(request, Patience::Endless, array)? {
        Answer::Values(_) => Ok(0),
        _ => Err(out_of_step()),
    }
}

/// `SETALL`. The length of the program's array is the set's number of semaphores. Permission to
/// alter a set does not include that to read it, so the number is looked up by the set's index,
/// for which none is needed.
fn set_values(id: c_int, array: usize) -> Result<isize, Errno> {
    let mut session = Session::begin()?;
    let look_up = Call::SemCtl {
        id: id % IPCMNI,
        command: SemCommand::Stat(StatBy::Any),
    };
    let count = match session.call(look_up, Raw::NONE)? {
        Answer::Set(status) if status.id == id => status.nsems as usize,
        Answer::Set(_) => return Err(Errno::EINVAL),
        _ => return Err(out_of_step()),
    };
    let values = Raw {
        address: array,
        length: count * size_of::<u16>(),
    };
    convert::value(session.call(
        Call::SemCtl {
            id,
            command: SemCommand::SetAll,
        },
        values,
    )?)
}

/// The end of a timeout that begins now.
fn deadline(timeout: timespec) -> Result<timespec, Errno> {
    const NANOSECONDS: i64 = 1_000_000_000;
    if timeout.tv_sec < 0 || !(0..NANOSECONDS).contains(&timeout.tv_nsec) {
        return Err(Errno::EINVAL);
    }
    let now = sys::monotonic();
    let nanoseconds = now.tv_nsec + timeout.tv_nsec;
    Ok(timespec {
        tv_sec: now
            .tv_sec
            .saturating_add(timeout.tv_sec)
            .saturating_add(nanoseconds / NANOSECONDS),
        tv_nsec: nanoseconds % NANOSECONDS,
    })
}
