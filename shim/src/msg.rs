//! `msgget`, `msgsnd`, `msgrcv`, `msgctl`.

use std::ffi::{c_int, c_long};

use migshm_protocol::call::{Answer, Call, Errno, MSG_TYPE_SIZE, MsgCommand, StatBy};
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::limits::MSGMAX;
use migshm_protocol::local::ToNode;

use crate::client::{self, Session, out_of_step};
use crate::connection::{Patience, Raw};
use crate::convert::{self, MsqidDs};
use crate::process;
use crate::sys::{self, SignalsBlocked};

/// Flag of `msgrcv` that libc's crate lacks.
const MSG_COPY: c_int = 0o40000;

/// `msgget(2)`.
pub fn get(key: i32, flags: c_int) -> Result<isize, Errno> {
    convert::value(client::call(Call::MsgGet { key, flags })?)
}

/// `msgsnd(2)`. `message` is the address of a `struct msgbuf`.
pub fn send(id: c_int, message: usize, size: usize, flags: c_int) -> Result<isize, Errno> {
    let mtype = c_long::from_le_bytes(sys::copy_in::<[u8; MSG_TYPE_SIZE]>(message)?);
    if size > MSGMAX || id < 0 || mtype < 1 {
        return Err(Errno::EINVAL);
    }
    let mut session = Session::begin()?;
    let request = process::request_id();
    let message = Raw {
        address: message,
        length: MSG_TYPE_SIZE + size,
    };
    let signals = SignalsBlocked::new();
    let call = Call::MsgSend { id, flags };
    session.request(&ToNode::Call { id: request, call }, message)?;
    convert::value(session.outcome(request, Patience::UntilHandler(signals))?)
}

/// `msgrcv(2)`. As in Linux, a message that cannot be written to where it should go is lost.
pub fn receive(
    id: c_int,
    message: usize,
    size: usize,
    mtype: c_long,
    flags: c_int,
) -> Result<isize, Errno> {
    if id < 0 || isize::try_from(size).is_err() {
        return Err(Errno::EINVAL);
    }
    if flags & MSG_COPY != 0 {
        if flags & libc::MSG_EXCEPT != 0 || flags & libc::IPC_NOWAIT == 0 {
            return Err(Errno::EINVAL);
        }
        check_readable(message, size.min(MSGMAX))?;
    }
    let mut session = Session::begin()?;
    let request = process::request_id();
    let signals = SignalsBlocked::new();
    let call = Call::MsgReceive {
        id,
        size: size as u64,
        mtype,
        flags,
    };
    session.request(&ToNode::Call { id: request, call }, Raw::NONE)?;
    match session.outcome_at(request, Patience::UntilHandler(signals), message)? {
        Answer::Message(length) => Ok(length as isize),
        _ => Err(out_of_step()),
    }
}

/// `EFAULT` unless a range can be read, as the kernel does where it is to copy a message.
fn check_readable(address: usize, length: usize) -> Result<(), Errno> {
    let last = length.checked_sub(1);
    (0..length)
        .step_by(PAGE_SIZE)
        .chain(last)
        .try_for_each(|offset| sys::copy_in::<[u8; 1]>(address.wrapping_add(offset)).map(drop))
}

/// `msgctl(2)`.
pub fn control(id: c_int, command: c_int, buffer: usize) -> Result<isize, Errno> {
    if id < 0 {
        return Err(Errno::EINVAL);
    }
    let command = match command {
        libc::IPC_STAT => MsgCommand::Stat(StatBy::Id),
        convert::MSG_STAT => MsgCommand::Stat(StatBy::Index),
        convert::MSG_STAT_ANY => MsgCommand::Stat(StatBy::Any),
        libc::IPC_SET => {
            let new = sys::copy_in::<MsqidDs>(buffer)?;
            MsgCommand::Set {
                perm: new.perm.to_new(),
                qbytes: new.qbytes,
            }
        }
        libc::IPC_RMID => MsgCommand::Remove,
        libc::IPC_INFO => MsgCommand::Limits,
        convert::MSG_INFO => MsgCommand::Usage,
        _ => return Err(Errno::EINVAL),
    };
    convert::deliver(
        client::call(Call::MsgCtl { id, command })?,
        command == MsgCommand::Stat(StatBy::Id),
        buffer,
    )
}
