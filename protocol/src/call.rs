//! A System V IPC call, as a value, and its answer.
//!
//! The shim parses `cmd` and flag integers into these types, so that everything past it deals
//! with calls that make sense. Names and meanings are those of `shmget(2)`, `shmop(2)`,
//! `shmctl(2)`, `semget(2)`, `semop(2)`, `semctl(2)`, `msgget(2)`, `msgop(2)` and `msgctl(2)`.

use serde::{Deserialize, Serialize};

use crate::ids::{NodeId, ProcessId, SegmentId};

/// An errno value (`errno(3)`), always positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Errno(pub i32);

/// The x86-64 and generic Linux values of the errnos that System V IPC returns.
#[allow(missing_docs)]
impl Errno {
    pub const EPERM: Errno = Errno(1);
    pub const ENOENT: Errno = Errno(2);
    pub const EINTR: Errno = Errno(4);
    pub const EIO: Errno = Errno(5);
    pub const E2BIG: Errno = Errno(7);
    pub const EAGAIN: Errno = Errno(11);
    pub const ENOMEM: Errno = Errno(12);
    pub const EACCES: Errno = Errno(13);
    pub const EFAULT: Errno = Errno(14);
    pub const EEXIST: Errno = Errno(17);
    pub const EINVAL: Errno = Errno(22);
    pub const EMFILE: Errno = Errno(24);
    pub const EFBIG: Errno = Errno(27);
    pub const ENOSPC: Errno = Errno(28);
    pub const ERANGE: Errno = Errno(34);
    pub const ENOSYS: Errno = Errno(38);
    pub const ENOMSG: Errno = Errno(42);
    pub const EIDRM: Errno = Errno(43);
}

/// Who makes a call, as the kernel told the node daemon (`SO_PEERCRED`, `SO_PEERGROUPS`,
/// `/proc/PID`), never as the caller says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The process, for undo and cancellation.
    pub process: ProcessId,
    /// Its pid on its node, for `shm_cpid`, `shm_lpid`, `GETPID`, `msg_lspid` and `msg_lrpid`.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Effective capabilities, as the kernel's bit mask (`capabilities(7)`); 0 where nobody has
    /// looked yet, as the call may need none.
    pub capabilities: u64,
    /// For `SHM_LOCK`: how much it may lock.
    pub memlock: Option<Memlock>,
}

/// How much memory a process may have locked by `SHM_LOCK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memlock {
    /// Real user id, to which locked segments are counted.
    pub uid: u32,
    /// `RLIMIT_MEMLOCK` (`getrlimit(2)`) in bytes; `u64::MAX` for no limit.
    pub limit: u64,
}

/// A call. `SemOp` is followed by its operations as raw [`SemBuf`]s, `SemCommand::SetAll` by its
/// values as raw little-endian `u16`s, `MsgSend` by its message as a raw `struct msgbuf` (see
/// [`MSG_TYPE_SIZE`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "parameters are named as in the manual pages")]
pub enum Call {
    /// `shmget(key, size, flags)`; answered by [`Answer::Value`]. A segment that it makes is kept
    /// consistent as `consistency` says; `None` leaves that to the coordinator's rules.
    ShmGet {
        key: i32,
        size: u64,
        flags: i32,
        consistency: Option<Consistency>,
    },
    /// `shmat(id, _, flags)`; answered by [`Answer::Attached`].
    ShmAttach { id: i32, flags: i32 },
    /// `shmctl(id, ...)`; the id is an index for [`StatBy::Index`] and [`StatBy::Any`].
    ShmCtl { id: i32, command: ShmCommand },
    /// `semget(key, count, flags)`; answered by [`Answer::Value`].
    SemGet { key: i32, count: i32, flags: i32 },
    /// `semop(id, ...)`, and `semtimedop`, whose clock the shim keeps (see
    /// [`crate::local::ToNode::Cancel`]); answered by [`Answer::Value`] 0, or by
    /// [`Answer::Shared`] if `memory` is [`SetMemory::Wanted`].
    SemOp { id: i32, memory: SetMemory },
    /// `semctl(id, ...)`.
    SemCtl { id: i32, command: SemCommand },
    /// `msgget(key, flags)`; answered by [`Answer::Value`].
    MsgGet { key: i32, flags: i32 },
    /// `msgsnd(id, ..., flags)`; answered by [`Answer::Value`] 0.
    MsgSend { id: i32, flags: i32 },
    /// `msgrcv(id, _, size, mtype, flags)`; answered by [`Answer::Message`].
    MsgReceive {
        id: i32,
        size: u64,
        mtype: i64,
        flags: i32,
    },
    /// `msgctl(id, ...)`.
    MsgCtl { id: i32, command: MsgCommand },
    /// A tool's, of whoever may read the segment: what a node has counted of the accesses to it,
    /// from there on where the last part said (0 for the first), with or without the requests to
    /// homes. Answered by [`Answer::Accesses`].
    Accesses {
        id: i32,
        node: NodeId,
        from: u64,
        requests: bool,
    },
}

/// What processes of different nodes see of each other's writes to a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Consistency {
    /// All of them, at once: any program is right.
    #[default]
    Sequential,
    /// What was written before a System V call that it has synchronised with: programs without
    /// data races are right, and do not wait for each other's writes to the same page.
    Release,
    /// The same; and what was written before such a call is at two nodes when that takes effect, so
    /// either may die.
    Durable,
}

/// The name of no consistency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownConsistency;

impl Consistency {
    /// Its name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Consistency::Sequential => "sequential",
            Consistency::Release => "release",
            Consistency::Durable => "durable",
        }
    }

    /// Whether processes see of each other's writes what was written before a System V call.
    #[must_use]
    pub const fn is_release(self) -> bool {
        matches!(self, Consistency::Release | Consistency::Durable)
    }

    /// The consistency with this name.
    ///
    /// # Errors
    /// [`UnknownConsistency`] if there is none.
    pub fn parse(name: &[u8]) -> Result<Consistency, UnknownConsistency> {
        let all = [
            Consistency::Sequential,
            Consistency::Release,
            Consistency::Durable,
        ];
        let found = all.into_iter().find(|c| c.name().as_bytes() == name);
        found.ok_or(UnknownConsistency)
    }
}

/// Bytes of a message's type (`mtype`, a little-endian `i64`), which precedes its text in a
/// `struct msgbuf`, in memory and on the wire.
pub const MSG_TYPE_SIZE: usize = 8;

/// What a process that calls `semop` has to do with the set's memory, in which it can operate on
/// the set without calling while that is delegated to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetMemory {
    /// It cannot use it; nor does this call make the coordinator delegate the set.
    Unusable,
    /// It could use it, and does not have it.
    Wanted,
    /// It has it.
    Mapped,
}

/// What `*_STAT` names its object by, and whether reading needs permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StatBy {
    /// `IPC_STAT`: by id.
    Id,
    /// `SHM_STAT` and its kin: by index into the kernel-like table; the answer carries the id.
    Index,
    /// `SHM_STAT_ANY` and its kin: by index, without a check for read permission.
    Any,
}

/// The commands of `shmctl(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShmCommand {
    /// Answered by [`Answer::Segment`].
    Stat(StatBy),
    /// `IPC_SET`.
    Set(NewPerm),
    /// `IPC_RMID`.
    Remove,
    /// `SHM_LOCK` (true) or `SHM_UNLOCK`.
    Lock(bool),
    /// `IPC_INFO`; answered by [`Answer::ShmLimits`].
    Limits,
    /// `SHM_INFO`; answered by [`Answer::ShmUsage`].
    Usage,
}

/// The commands of `semctl(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SemCommand {
    /// Answered by [`Answer::Set`].
    Stat(StatBy),
    /// `IPC_SET`.
    Set(NewPerm),
    /// `IPC_RMID`.
    Remove,
    /// `IPC_INFO`; answered by [`Answer::SemLimits`].
    Limits,
    /// `SEM_INFO`; answered by [`Answer::SemLimits`] with usage in two of its fields.
    Usage,
    /// `GETALL`; answered by [`Answer::Values`].
    GetAll,
    /// `SETALL`; the values follow the message.
    SetAll,
    /// `GETVAL` of a semaphore number.
    GetVal(i32),
    /// `SETVAL` of a semaphore number.
    SetVal(i32, i32),
    /// `GETPID` of a semaphore number.
    GetPid(i32),
    /// `GETNCNT` of a semaphore number.
    GetNcnt(i32),
    /// `GETZCNT` of a semaphore number.
    GetZcnt(i32),
}

/// The commands of `msgctl(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MsgCommand {
    /// Answered by [`Answer::Queue`].
    Stat(StatBy),
    /// `IPC_SET`.
    Set {
        /// As for the other kinds.
        perm: NewPerm,
        /// New capacity in bytes (`msg_qbytes`).
        qbytes: u64,
    },
    /// `IPC_RMID`.
    Remove,
    /// `IPC_INFO`; answered by [`Answer::MsgLimits`].
    Limits,
    /// `MSG_INFO`; answered by [`Answer::MsgLimits`] with usage in three of its fields.
    Usage,
}

/// What `IPC_SET` changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewPerm {
    /// New owner.
    pub uid: u32,
    /// New group.
    pub gid: u32,
    /// New permission bits; only the lowest nine count.
    pub mode: u32,
}

/// `struct sembuf`, laid out as in C: six bytes, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemBuf {
    /// Semaphore number.
    pub num: u16,
    /// The operation: positive adds, negative waits and subtracts, zero waits for zero.
    pub op: i16,
    /// `IPC_NOWAIT`, `SEM_UNDO`.
    pub flags: i16,
}

impl SemBuf {
    /// Bytes of one operation on the wire.
    pub const SIZE: usize = 6;

    /// The C layout.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let [a, b] = self.num.to_le_bytes();
        let [c, d] = self.op.to_le_bytes();
        let [e, f] = self.flags.to_le_bytes();
        [a, b, c, d, e, f]
    }

    /// Reads the C layout.
    #[must_use]
    pub fn from_bytes([a, b, c, d, e, f]: [u8; Self::SIZE]) -> SemBuf {
        SemBuf {
            num: u16::from_le_bytes([a, b]),
            op: i16::from_le_bytes([c, d]),
            flags: i16::from_le_bytes([e, f]),
        }
    }

    /// Reads an array of operations; `None` if the length is not a multiple of [`SemBuf::SIZE`].
    #[must_use]
    pub fn parse_all(bytes: &[u8]) -> Option<Vec<SemBuf>> {
        let chunks = bytes.chunks_exact(Self::SIZE);
        chunks.remainder().is_empty().then(|| {
            chunks
                .map(|c| SemBuf::from_bytes([c[0], c[1], c[2], c[3], c[4], c[5]]))
                .collect()
        })
    }
}

/// How a call ended.
pub type Outcome = Result<Answer, Errno>;

/// A successful call's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The call's return value.
    Value(i32),
    /// An attach may proceed; see [`Attachment`].
    Attached(Attachment),
    /// `IPC_STAT` and its kin; `value` of the C call is `status.id` for the index forms.
    Segment(ShmStatus),
    /// `IPC_INFO` of `shmctl`.
    ShmLimits(ShmLimits),
    /// `SHM_INFO`.
    ShmUsage(ShmUsage),
    /// `IPC_STAT` and its kin of `semctl`.
    Set(SemStatus),
    /// `IPC_INFO` and `SEM_INFO` of `semctl`.
    SemLimits(SemLimits),
    /// `GETALL`: this many raw little-endian `u16` values follow the message.
    Values(u32),
    /// `IPC_STAT` and its kin of `msgctl`.
    Queue(MsgStatus),
    /// `IPC_INFO` and `MSG_INFO` of `msgctl`.
    MsgLimits(MsgLimits),
    /// `semop` has succeeded, and here is the set's memory for the next.
    Shared(SharedSet),
    /// `msgrcv`: a `struct msgbuf` with this many bytes of text follows the message. Their number
    /// is the call's return value.
    Message(u32),
    /// This many bytes of an encoded [`crate::accesses::Part`] follow the message.
    Accesses(u32),
}

impl Call {
    /// Whether the call, with these raw bytes, only looks: it changes nothing that another process
    /// could notice, or wait for.
    #[must_use]
    pub fn is_query(&self, raw: &[u8]) -> bool {
        match self {
            Call::SemOp { .. } => {
                SemBuf::parse_all(raw).is_none_or(|ops| ops.iter().all(|op| op.op == 0))
            }
            Call::SemCtl { command, .. } => !matches!(
                command,
                SemCommand::Set(_)
                    | SemCommand::Remove
                    | SemCommand::SetAll
                    | SemCommand::SetVal(..)
            ),
            Call::ShmCtl { command, .. } => !matches!(
                command,
                ShmCommand::Set(_) | ShmCommand::Remove | ShmCommand::Lock(_)
            ),
            Call::MsgCtl { command, .. } => {
                !matches!(command, MsgCommand::Set { .. } | MsgCommand::Remove)
            }
            Call::Accesses { .. } => true,
            Call::ShmGet { .. }
            | Call::ShmAttach { .. }
            | Call::SemGet { .. }
            | Call::MsgGet { .. }
            | Call::MsgSend { .. }
            | Call::MsgReceive { .. } => false,
        }
    }
}

impl Answer {
    /// Bytes that follow the message which brings this answer.
    #[must_use]
    pub fn raw_length(&self) -> usize {
        match *self {
            Answer::Values(count) => count as usize * size_of::<u16>(),
            Answer::Message(text) => MSG_TYPE_SIZE + text as usize,
            Answer::Accesses(bytes) => bytes as usize,
            _ => 0,
        }
    }
}

/// Leave to attach a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The segment.
    pub segment: SegmentId,
    /// Its size in bytes, not rounded.
    pub size: u64,
    /// How it is kept consistent.
    pub consistency: Consistency,
    /// Whether the caller may write to it, by mode bits (the attach may still be read-only).
    pub may_write: bool,
    /// Between the daemon and the shim: this attach's number, for
    /// [`crate::local::ToNode::Mapped`]. 0 from the coordinator.
    pub attach: u64,
    /// Between the daemon and the shim: whether accesses are tracked already, so that the
    /// mapping must stay inaccessible until the daemon has registered it.
    pub tracked: bool,
}

/// A semaphore set's memory, which comes as a memfd with [`Answer::Shared`]; only from the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedSet {
    /// Number of semaphores, which gives the memory's layout.
    pub semaphores: u32,
    /// The process's seat in it, for operations with SEM_UNDO.
    pub seat: Option<u32>,
    /// The process's pid, as its node's daemon sees it.
    pub pid: i32,
}

/// `struct ipc_perm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Perm {
    pub key: i32,
    pub uid: u32,
    pub gid: u32,
    pub cuid: u32,
    pub cgid: u32,
    pub mode: u32,
    pub seq: u16,
}

/// `struct shmid_ds`, with the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ShmStatus {
    pub id: i32,
    pub perm: Perm,
    pub consistency: Consistency,
    pub size: u64,
    /// Seconds since the epoch, as all times here.
    pub atime: i64,
    pub dtime: i64,
    pub ctime: i64,
    pub cpid: i32,
    pub lpid: i32,
    pub nattch: u64,
}

/// `struct shminfo`: limits. `highest` is the call's return value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ShmLimits {
    pub shmmax: u64,
    pub shmmin: u64,
    pub shmmni: u64,
    pub shmseg: u64,
    pub shmall: u64,
    pub highest: i32,
}

/// `struct shm_info`: usage. `highest` is the call's return value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ShmUsage {
    pub used_ids: i32,
    pub shm_tot: u64,
    pub shm_rss: u64,
    pub shm_swp: u64,
    pub swap_attempts: u64,
    pub swap_successes: u64,
    pub highest: i32,
}

/// `struct semid_ds`, with the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SemStatus {
    pub id: i32,
    pub perm: Perm,
    pub otime: i64,
    pub ctime: i64,
    pub nsems: u64,
}

/// `struct seminfo`. `highest` is the call's return value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SemLimits {
    pub semmap: i32,
    pub semmni: i32,
    pub semmns: i32,
    pub semmnu: i32,
    pub semmsl: i32,
    pub semopm: i32,
    pub semume: i32,
    pub semusz: i32,
    pub semvmx: i32,
    pub semaem: i32,
    pub highest: i32,
}

/// `struct msqid_ds`, with the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MsgStatus {
    pub id: i32,
    pub perm: Perm,
    pub stime: i64,
    pub rtime: i64,
    pub ctime: i64,
    pub cbytes: u64,
    pub qnum: u64,
    pub qbytes: u64,
    pub lspid: i32,
    pub lrpid: i32,
}

/// `struct msginfo`. `highest` is the call's return value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MsgLimits {
    pub msgpool: i32,
    pub msgmap: i32,
    pub msgmax: i32,
    pub msgmnb: i32,
    pub msgmni: i32,
    pub msgssz: i32,
    pub msgtql: i32,
    pub msgseg: u16,
    pub highest: i32,
}
