//! Protocol values as the structures of C, and back.
//!
//! The layouts are those of the kernel's `shmid64_ds`, `semid64_ds`, `msqid64_ds`, `ipc64_perm`,
//! `shminfo64`, `shm_info`, `seminfo` and `msginfo` on x86-64, which glibc's are made to equal.

use std::ffi::{c_int, c_long, c_ulong, c_ushort};

use migshm_protocol::call::{
    Answer, Errno, MsgLimits, MsgStatus, NewPerm, Perm, SemLimits, SemStatus, ShmLimits, ShmStatus,
    ShmUsage,
};

use crate::client::out_of_step;
use crate::sys::{self, Plain};

// Commands of `linux/shm.h`, `linux/sem.h` and `linux/msg.h` that libc's crate lacks or shifts.
pub const SHM_STAT: c_int = 13;
pub const SHM_INFO: c_int = 14;
pub const SHM_STAT_ANY: c_int = 15;
pub const SEM_STAT: c_int = 18;
pub const SEM_INFO: c_int = 19;
pub const SEM_STAT_ANY: c_int = 20;
pub const MSG_STAT: c_int = 11;
pub const MSG_INFO: c_int = 12;
pub const MSG_STAT_ANY: c_int = 13;

/// The result of a call that only returns a value.
pub fn value(answer: Answer) -> Result<isize, Errno> {
    match answer {
        Answer::Value(value) => Ok(value as isize),
        _ => Err(out_of_step()),
    }
}

/// The result of `shmctl`, `semctl` or `msgctl`, with what goes to the program's buffer put there. A status
/// that was asked for `by_id` is answered by 0, one by index by the id.
pub fn deliver(answer: Answer, by_id: bool, buffer: usize) -> Result<isize, Errno> {
    let stat = |id: i32| if by_id { 0 } else { id as isize };
    match answer {
        Answer::Value(value) => Ok(value as isize),
        Answer::Segment(status) => {
            sys::copy_out(&ShmidDs::from(status), buffer).map(|()| stat(status.id))
        }
        Answer::Set(status) => {
            sys::copy_out(&SemidDs::from(status), buffer).map(|()| stat(status.id))
        }
        Answer::ShmLimits(limits) => {
            sys::copy_out(&ShmInfo64::from(limits), buffer).map(|()| limits.highest as isize)
        }
        Answer::ShmUsage(usage) => {
            sys::copy_out(&ShmInfo::from(usage), buffer).map(|()| usage.highest as isize)
        }
        Answer::SemLimits(limits) => {
            sys::copy_out(&SemInfo::from(limits), buffer).map(|()| limits.highest as isize)
        }
        Answer::Queue(status) => {
            sys::copy_out(&MsqidDs::from(status), buffer).map(|()| stat(status.id))
        }
        Answer::MsgLimits(limits) => {
            sys::copy_out(&MsgInfo::from(limits), buffer).map(|()| limits.highest as isize)
        }
        Answer::Attached(_)
        | Answer::Values(_)
        | Answer::Shared(_)
        | Answer::Message(_)
        | Answer::Accesses(_) => Err(out_of_step()),
    }
}

/// `struct ipc_perm`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct IpcPerm {
    key: i32,
    uid: u32,
    gid: u32,
    cuid: u32,
    cgid: u32,
    mode: u32,
    seq: c_ushort,
    reserved: [c_ushort; 3],
    unused: [c_ulong; 2],
}

impl IpcPerm {
    /// What `IPC_SET` takes from it.
    pub fn to_new(self) -> NewPerm {
        // Older C libraries have a 16-bit mode here, and leave what follows it undefined.
        NewPerm {
            uid: self.uid,
            gid: self.gid,
            mode: self.mode & 0o777,
        }
    }
}

impl From<Perm> for IpcPerm {
    fn from(perm: Perm) -> IpcPerm {
        let Perm {
            key,
            uid,
            gid,
            cuid,
            cgid,
            mode,
            seq,
        } = perm;
        IpcPerm {
            key,
            uid,
            gid,
            cuid,
            cgid,
            mode,
            seq,
            ..IpcPerm::default()
        }
    }
}

/// `struct shmid_ds`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ShmidDs {
    pub perm: IpcPerm,
    size: usize,
    atime: c_long,
    dtime: c_long,
    ctime: c_long,
    cpid: c_int,
    lpid: c_int,
    nattch: c_ulong,
    unused: [c_ulong; 2],
}

impl From<ShmStatus> for ShmidDs {
    fn from(status: ShmStatus) -> ShmidDs {
        let ShmStatus {
            id: _,
            perm,
            consistency: _,
            size,
            atime,
            dtime,
            ctime,
            cpid,
            lpid,
            nattch,
        } = status;
        ShmidDs {
            perm: perm.into(),
            size: size as usize,
            atime,
            dtime,
            ctime,
            cpid,
            lpid,
            nattch,
            unused: [0; 2],
        }
    }
}

/// `struct semid_ds`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SemidDs {
    pub perm: IpcPerm,
    otime: c_long,
    unused_otime: c_ulong,
    ctime: c_long,
    unused_ctime: c_ulong,
    nsems: c_ulong,
    unused: [c_ulong; 2],
}

impl From<SemStatus> for SemidDs {
    fn from(status: SemStatus) -> SemidDs {
        let SemStatus {
            id: _,
            perm,
            otime,
            ctime,
            nsems,
        } = status;
        SemidDs {
            perm: perm.into(),
            otime,
            unused_otime: 0,
            ctime,
            unused_ctime: 0,
            nsems,
            unused: [0; 2],
        }
    }
}

/// `struct shminfo`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ShmInfo64 {
    shmmax: c_ulong,
    shmmin: c_ulong,
    shmmni: c_ulong,
    shmseg: c_ulong,
    shmall: c_ulong,
    unused: [c_ulong; 4],
}

impl From<ShmLimits> for ShmInfo64 {
    fn from(limits: ShmLimits) -> ShmInfo64 {
        let ShmLimits {
            shmmax,
            shmmin,
            shmmni,
            shmseg,
            shmall,
            highest: _,
        } = limits;
        ShmInfo64 {
            shmmax,
            shmmin,
            shmmni,
            shmseg,
            shmall,
            unused: [0; 4],
        }
    }
}

/// `struct shm_info`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ShmInfo {
    used_ids: c_int,
    padding: c_int,
    shm_tot: c_ulong,
    shm_rss: c_ulong,
    shm_swp: c_ulong,
    swap_attempts: c_ulong,
    swap_successes: c_ulong,
}

impl From<ShmUsage> for ShmInfo {
    fn from(usage: ShmUsage) -> ShmInfo {
        let ShmUsage {
            used_ids,
            shm_tot,
            shm_rss,
            shm_swp,
            swap_attempts,
            swap_successes,
            highest: _,
        } = usage;
        ShmInfo {
            used_ids,
            padding: 0,
            shm_tot,
            shm_rss,
            shm_swp,
            swap_attempts,
            swap_successes,
        }
    }
}

/// `struct seminfo`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SemInfo {
    semmap: c_int,
    semmni: c_int,
    semmns: c_int,
    semmnu: c_int,
    semmsl: c_int,
    semopm: c_int,
    semume: c_int,
    semusz: c_int,
    semvmx: c_int,
    semaem: c_int,
}

impl From<SemLimits> for SemInfo {
    fn from(limits: SemLimits) -> SemInfo {
        let SemLimits {
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
            highest: _,
        } = limits;
        SemInfo {
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
        }
    }
}

/// `struct msqid_ds`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MsqidDs {
    pub perm: IpcPerm,
    stime: c_long,
    rtime: c_long,
    ctime: c_long,
    cbytes: c_ulong,
    qnum: c_ulong,
    pub qbytes: c_ulong,
    lspid: c_int,
    lrpid: c_int,
    unused: [c_ulong; 2],
}

impl From<MsgStatus> for MsqidDs {
    fn from(status: MsgStatus) -> MsqidDs {
        let MsgStatus {
            id: _,
            perm,
            stime,
            rtime,
            ctime,
            cbytes,
            qnum,
            qbytes,
            lspid,
            lrpid,
        } = status;
        MsqidDs {
            perm: perm.into(),
            stime,
            rtime,
            ctime,
            cbytes,
            qnum,
            qbytes,
            lspid,
            lrpid,
            unused: [0; 2],
        }
    }
}

/// `struct msginfo`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MsgInfo {
    msgpool: c_int,
    msgmap: c_int,
    msgmax: c_int,
    msgmnb: c_int,
    msgmni: c_int,
    msgssz: c_int,
    msgtql: c_int,
    msgseg: c_ushort,
    padding: c_ushort,
}

impl From<MsgLimits> for MsgInfo {
    fn from(limits: MsgLimits) -> MsgInfo {
        let MsgLimits {
            msgpool,
            msgmap,
            msgmax,
            msgmnb,
            msgmni,
            msgssz,
            msgtql,
            msgseg,
            highest: _,
        } = limits;
        MsgInfo {
            msgpool,
            msgmap,
            msgmax,
            msgmnb,
            msgmni,
            msgssz,
            msgtql,
            msgseg,
            padding: 0,
        }
    }
}

// SAFETY: all of these consist of integers only, and the sizes asserted below leave no padding.
unsafe impl Plain for ShmidDs {}
// SAFETY: as above.
unsafe impl Plain for SemidDs {}
// SAFETY: as above.
unsafe impl Plain for ShmInfo64 {}
// SAFETY: as above.
unsafe impl Plain for ShmInfo {}
// SAFETY: as above.
unsafe impl Plain for SemInfo {}
// SAFETY: as above.
unsafe impl Plain for MsqidDs {}
// SAFETY: as above.
unsafe impl Plain for MsgInfo {}

const _: () = {
    assert!(size_of::<IpcPerm>() == size_of::<libc::ipc_perm>());
    assert!(size_of::<ShmidDs>() == size_of::<libc::shmid_ds>());
    assert!(size_of::<SemidDs>() == size_of::<libc::semid_ds>());
    assert!(size_of::<SemInfo>() == size_of::<libc::seminfo>());
    assert!(size_of::<MsqidDs>() == size_of::<libc::msqid_ds>());
    assert!(size_of::<MsgInfo>() == size_of::<libc::msginfo>());
    assert!(size_of::<ShmInfo64>() == 9 * size_of::<c_ulong>());
    assert!(size_of::<ShmInfo>() == 6 * size_of::<c_ulong>());
    assert!(
        std::mem::offset_of!(ShmidDs, nattch) == std::mem::offset_of!(libc::shmid_ds, shm_nattch)
    );
    assert!(
        std::mem::offset_of!(SemidDs, nsems) == std::mem::offset_of!(libc::semid_ds, sem_nsems)
    );
    assert!(
        std::mem::offset_of!(MsqidDs, lrpid) == std::mem::offset_of!(libc::msqid_ds, msg_lrpid)
    );
};
