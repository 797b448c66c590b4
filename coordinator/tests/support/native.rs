//! The system call that a [`Call`] stands for, and what the kernel's reply means.

use std::mem::{MaybeUninit, size_of};

use migshm_protocol::call::{
    Answer, Call, Consistency, Errno, MSG_TYPE_SIZE, MsgCommand, MsgLimits, MsgStatus, NewPerm,
    Outcome, Perm, SemBuf, SemCommand, SemLimits, SemStatus, ShmCommand, ShmLimits, ShmStatus,
    ShmUsage, StatBy,
};

use super::worker::{BUFFER, Buffer, Command, Reply, User};

// Commands of the kernel's headers, most of which libc lacks.
const IPC_RMID: i64 = 0;
const IPC_SET: i64 = 1;
const IPC_STAT: i64 = 2;
const IPC_INFO: i64 = 3;
const SHM_LOCK: i64 = 11;
const SHM_UNLOCK: i64 = 12;
const SHM_STAT: i64 = 13;
const SHM_INFO: i64 = 14;
const SHM_STAT_ANY: i64 = 15;
const GETPID: i64 = 11;
const GETVAL: i64 = 12;
const GETALL: i64 = 13;
const GETNCNT: i64 = 14;
const GETZCNT: i64 = 15;
const SETVAL: i64 = 16;
const SETALL: i64 = 17;
const SEM_STAT: i64 = 18;
const SEM_INFO: i64 = 19;
const SEM_STAT_ANY: i64 = 20;
const MSG_STAT: i64 = 11;
const MSG_INFO: i64 = 12;
const MSG_STAT_ANY: i64 = 13;

/// The arguments that are not given are 0.
pub fn system_call<const N: usize>(
    user: User,
    number: i64,
    given: [i64; N],
    pointer: Option<usize>,
) -> Command {
    let mut arguments = [0; 5];
    arguments[..N].copy_from_slice(&given);
    Command {
        user,
        number,
        arguments,
        pointer,
        buffer: [0; BUFFER],
    }
}

/// The system call that a call stands for.
pub fn command(user: User, call: Call, raw: &[u8]) -> Command {
    let mut command = match call {
        Call::ShmGet {
            key, size, flags, ..
        } => system_call(
            user,
            libc::SYS_shmget,
            [key.into(), size as i64, flags.into(), 0],
            None,
        ),
        Call::ShmAttach { id, flags } => {
            system_call(user, libc::SYS_shmat, [id.into(), 0, flags.into(), 0], None)
        }
        Call::ShmCtl { id, command } => {
            let number = match command {
                ShmCommand::Stat(StatBy::Id) => IPC_STAT,
                ShmCommand::Stat(StatBy::Index) => SHM_STAT,
                ShmCommand::Stat(StatBy::Any) => SHM_STAT_ANY,
                ShmCommand::Set(_) => IPC_SET,
                ShmCommand::Remove => IPC_RMID,
                ShmCommand::Lock(true) => SHM_LOCK,
                ShmCommand::Lock(false) => SHM_UNLOCK,
                ShmCommand::Limits => IPC_INFO,
                ShmCommand::Usage => SHM_INFO,
            };
            system_call(user, libc::SYS_shmctl, [id.into(), number, 0, 0], Some(2))
        }
        Call::SemGet { key, count, flags } => system_call(
            user,
            libc::SYS_semget,
            [key.into(), count.into(), flags.into(), 0],
            None,
        ),
        Call::SemOp { id, .. } => {
            let count = raw.len() / SemBuf::SIZE;
            system_call(
                user,
                libc::SYS_semop,
                [id.into(), 0, count as i64, 0],
                Some(1),
            )
        }
        Call::SemCtl { id, command } => {
            let (num, number, value) = match command {
                SemCommand::Stat(StatBy::Id) => (0, IPC_STAT, None),
                SemCommand::Stat(StatBy::Index) => (0, SEM_STAT, None),
                SemCommand::Stat(StatBy::Any) => (0, SEM_STAT_ANY, None),
                SemCommand::Set(_) => (0, IPC_SET, None),
                SemCommand::Remove => (0, IPC_RMID, None),
                SemCommand::Limits => (0, IPC_INFO, None),
                SemCommand::Usage => (0, SEM_INFO, None),
                SemCommand::GetAll => (0, GETALL, None),
                SemCommand::SetAll => (0, SETALL, None),
                SemCommand::GetVal(num) => (num, GETVAL, None),
                SemCommand::SetVal(num, value) => (num, SETVAL, Some(value)),
                SemCommand::GetPid(num) => (num, GETPID, None),
                SemCommand::GetNcnt(num) => (num, GETNCNT, None),
                SemCommand::GetZcnt(num) => (num, GETZCNT, None),
            };
            let arguments = [id.into(), num.into(), number, value.unwrap_or(0).into()];
            system_call(
                user,
                libc::SYS_semctl,
                arguments,
                value.is_none().then_some(3),
            )
        }
        Call::MsgGet { key, flags } => {
            system_call(user, libc::SYS_msgget, [key.into(), flags.into()], None)
        }
        Call::MsgSend { id, flags } => {
            let size = raw.len() as i64 - MSG_TYPE_SIZE as i64;
            let arguments = [id.into(), 0, size, flags.into()];
            system_call(user, libc::SYS_msgsnd, arguments, Some(1))
        }
        Call::MsgReceive {
            id,
            size,
            mtype,
            flags,
        } => {
            let arguments = [id.into(), 0, size as i64, mtype, flags.into()];
            system_call(user, libc::SYS_msgrcv, arguments, Some(1))
        }
        Call::MsgCtl { id, command } => {
            let number = match command {
                MsgCommand::Stat(StatBy::Id) => IPC_STAT,
                MsgCommand::Stat(StatBy::Index) => MSG_STAT,
                MsgCommand::Stat(StatBy::Any) => MSG_STAT_ANY,
                MsgCommand::Set { .. } => IPC_SET,
                MsgCommand::Remove => IPC_RMID,
                MsgCommand::Limits => IPC_INFO,
                MsgCommand::Usage => MSG_INFO,
            };
            system_call(user, libc::SYS_msgctl, [id.into(), number], Some(2))
        }
        Call::Accesses { .. } => unreachable!("not the kernel's"),
    };
    match call {
        Call::ShmCtl {
            command: ShmCommand::Set(new),
            ..
        }
        | Call::SemCtl {
            command: SemCommand::Set(new),
            ..
        } => write_perm(&mut command.buffer, new),
        Call::MsgCtl {
            command: MsgCommand::Set { perm, qbytes },
            ..
        } => {
            write_perm(&mut command.buffer, perm);
            let at = std::mem::offset_of!(libc::msqid_ds, msg_qbytes);
            command.buffer[at..at + 8].copy_from_slice(&qbytes.to_le_bytes());
        }
        _ => {}
    }
    // Of more operations than there may be the kernel reads none.
    let length = raw.len().min(command.buffer.len());
    command.buffer[..length].copy_from_slice(&raw[..length]);
    command
}

/// `struct shmid_ds`, `struct semid_ds` and `struct msqid_ds` begin with their `struct ipc_perm`.
fn write_perm(buffer: &mut Buffer, new: NewPerm) {
    // SAFETY: all zeros are a valid `ipc_perm`; the buffer is larger.
    unsafe {
        let mut perm: libc::ipc_perm = MaybeUninit::zeroed().assume_init();
        (perm.uid, perm.gid, perm.mode) = (new.uid, new.gid, new.mode as _);
        std::ptr::copy_nonoverlapping(
            (&raw const perm).cast(),
            buffer.as_mut_ptr(),
            size_of::<libc::ipc_perm>(),
        );
    }
}

/// What the kernel's reply to a call means.
pub fn outcome(call: Call, reply: &Reply) -> Outcome {
    if reply.result < 0 && reply.result > -4096 {
        return value(reply.result);
    }
    let result = reply.result as i32;
    let stat_id = |id: i32, by: StatBy| if by == StatBy::Id { id } else { result };
    match call {
        Call::ShmAttach { .. } => Ok(Answer::Value(0)),
        Call::ShmCtl {
            id,
            command: ShmCommand::Stat(by),
        } => {
            let ds: libc::shmid_ds = read(reply);
            Ok(Answer::Segment(ShmStatus {
                id: stat_id(id, by),
                perm: perm(&ds.shm_perm),
                consistency: Consistency::default(),
                size: ds.shm_segsz as u64,
                atime: ds.shm_atime,
                dtime: ds.shm_dtime,
                ctime: ds.shm_ctime,
                cpid: ds.shm_cpid,
                lpid: ds.shm_lpid,
                nattch: ds.shm_nattch,
            }))
        }
        Call::ShmCtl {
            command: ShmCommand::Limits,
            ..
        } => {
            let [shmmax, shmmin, shmmni, shmseg, shmall] = read::<[u64; 5]>(reply);
            Ok(Answer::ShmLimits(ShmLimits {
                shmmax,
                shmmin,
                shmmni,
                shmseg,
                shmall,
                highest: result,
            }))
        }
        Call::ShmCtl {
            command: ShmCommand::Usage,
            ..
        } => {
            let [
                used_ids,
                shm_tot,
                shm_rss,
                shm_swp,
                swap_attempts,
                swap_successes,
            ] = read::<[u64; 6]>(reply);
            let used_ids = used_ids as i32;
            let highest = result;
            Ok(Answer::ShmUsage(ShmUsage {
                used_ids,
                shm_tot,
                shm_rss,
                shm_swp,
                swap_attempts,
                swap_successes,
                highest,
            }))
        }
        Call::SemCtl {
            id,
            command: SemCommand::Stat(by),
        } => {
            let ds: libc::semid_ds = read(reply);
            Ok(Answer::Set(SemStatus {
                id: stat_id(id, by),
                perm: perm(&ds.sem_perm),
                otime: ds.sem_otime,
                ctime: ds.sem_ctime,
                nsems: ds.sem_nsems,
            }))
        }
        Call::SemCtl {
            command: SemCommand::Limits | SemCommand::Usage,
            ..
        } => {
            let [
                semmap,
                semmni,
                semmns,
                semmnu,
                semmsl,
                semopm,
                semume,
                semusz,
                semvmx,
                semaem,
            ] = read::<[i32; 10]>(reply);
            let highest = result;
            Ok(Answer::SemLimits(SemLimits {
                semmap,
                semmni,
                semmns,
                semmnu,
                semmsl,
                semopm,
                semume,
                semusz,
                semvmx,
                semaem,
                highest,
            }))
        }
        Call::MsgReceive { .. } => Ok(Answer::Message(result.cast_unsigned())),
        Call::MsgCtl {
            id,
            command: MsgCommand::Stat(by),
        } => {
            let ds: libc::msqid_ds = read(reply);
            Ok(Answer::Queue(MsgStatus {
                id: stat_id(id, by),
                perm: perm(&ds.msg_perm),
                stime: ds.msg_stime,
                rtime: ds.msg_rtime,
                ctime: ds.msg_ctime,
                cbytes: ds.__msg_cbytes,
                qnum: ds.msg_qnum,
                qbytes: ds.msg_qbytes,
                lspid: ds.msg_lspid,
                lrpid: ds.msg_lrpid,
            }))
        }
        Call::MsgCtl {
            command: MsgCommand::Limits | MsgCommand::Usage,
            ..
        } => {
            let [
                msgpool,
                msgmap,
                msgmax,
                msgmnb,
                msgmni,
                msgssz,
                msgtql,
                msgseg,
            ] = read::<[i32; 8]>(reply);
            Ok(Answer::MsgLimits(MsgLimits {
                msgpool,
                msgmap,
                msgmax,
                msgmnb,
                msgmni,
                msgssz,
                msgtql,
                msgseg: msgseg as u16,
                highest: result,
            }))
        }
        _ => value(reply.result),
    }
}

/// What the kernel wrote beside the answer.
pub fn written(answer: Answer, reply: &Reply) -> &[u8] {
    &reply.buffer[..answer.raw_length()]
}

/// A plain return value.
pub fn value(result: i64) -> Outcome {
    let result = result as i32;
    if result < 0 {
        Err(Errno(-result))
    } else {
        Ok(Answer::Value(result))
    }
}

fn read<T: Copy>(reply: &Reply) -> T {
    assert!(size_of::<T>() <= reply.buffer.len());
    // SAFETY: the buffer is large enough, and `T` is a C struct of integers.
    unsafe { reply.buffer.as_ptr().cast::<T>().read_unaligned() }
}

fn perm(native: &libc::ipc_perm) -> Perm {
    Perm {
        key: native.__key,
        uid: native.uid,
        gid: native.gid,
        cuid: native.cuid,
        cgid: native.cgid,
        mode: native.mode.into(),
        seq: native.__seq,
    }
}
