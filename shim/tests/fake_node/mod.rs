//! A node daemon that has no System V objects: it answers each call by a fixed script, remembers
//! what it heard and from whom, and checks nothing. What the ids mean is in `tests/c/fake.h`.

#![allow(dead_code, reason = "each user of this module uses a part of it")]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use migshm_protocol::call::{
    Answer, Attachment, Call, Consistency, Errno, MsgCommand, MsgLimits, MsgStatus, Outcome, Perm,
    SemCommand, SemLimits, SemStatus, ShmCommand, ShmLimits, ShmStatus, ShmUsage, StatBy,
};
use migshm_protocol::codec;
use migshm_protocol::limits::{MAX_LOCAL, MSGMAX};
use migshm_protocol::local::{FromNode, Pieces, SOCKET, ToNode};
use migshm_protocol::{NodeId, SegmentId};

mod tracking;

/// Ids with a meaning; the same as in `tests/c/fake.h`.
const BLOCKS: i32 = 2;
const WINS: i32 = 3;
const DIES: i32 = 4;
const STALE: i32 = 5;
const RAISES: i32 = 6;
/// A key with a meaning.
const FORKS: i32 = 77777;

/// Size of every segment, deliberately not whole pages.
const SIZE: u64 = 3 * 4096 - 1;
/// The values of every semaphore set.
const VALUES: [u16; 3] = [7, 8, 65535];
/// The type of every message received.
const MTYPE: i64 = 0x0102_0304_0506_0708;

/// What a message was, who sent it, and on which connection.
#[derive(Clone, Debug)]
pub struct Heard {
    pub pid: i32,
    pub uid: u32,
    pub connection: usize,
    pub message: ToNode,
    pub raw: Vec<u8>,
}

/// How the daemon behaves.
#[derive(Clone, Copy, Default)]
pub struct Script {
    /// Tracks address spaces: sends `/dev/userfaultfd` and expects an anchor.
    pub track: bool,
    /// Refuses every connection with this errno.
    pub refuse: Option<Errno>,
}

#[derive(Default)]
struct State {
    heard: Vec<Heard>,
    /// Attaches by address.
    attaches: HashMap<u64, u64>,
    segments: HashMap<i32, OwnedFd>,
    connections: Vec<Arc<OwnedFd>>,
    /// Threads that read the anchor of an address space and were thereby introduced.
    introduced: Vec<i32>,
    next_attach: u64,
}

/// The daemon; it serves in threads of this process.
pub struct FakeNode {
    dir: PathBuf,
    listener: Arc<OwnedFd>,
    script: Script,
    state: Arc<Mutex<State>>,
}

impl FakeNode {
    /// Listens in `dir`.
    pub fn start(dir: &Path, script: Script) -> FakeNode {
        let path = dir.join(SOCKET);
        let _ = std::fs::remove_file(&path);
        // SAFETY: plain numbers; the address is valid and of that length.
        let listener = unsafe {
            let socket = OwnedFd::from_raw_fd(libc::socket(
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
                0,
            ));
            let mut address: libc::sockaddr_un = std::mem::zeroed();
            address.sun_family = libc::AF_UNIX as u16;
            for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
                *to = *from as libc::c_char;
            }
            let length = size_of::<libc::sockaddr_un>() as u32;
            assert_eq!(
                libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length),
                0,
                "{path:?}"
            );
            assert_eq!(libc::listen(socket.as_raw_fd(), 512), 0);
            socket
        };
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&path, mode).expect("socket's mode");
        let node = FakeNode {
            dir: dir.to_owned(),
            listener: Arc::new(listener),
            script,
            state: Arc::default(),
        };
        let (listener, state) = (node.listener.clone(), node.state.clone());
        thread::spawn(move || accept(&listener, script, &state));
        node
    }

    /// Ends as a killed daemon does: the socket file stays, nobody listens.
    pub fn stop(self) {
        hang_up(&self.listener);
        self.state
            .lock()
            .unwrap()
            .connections
            .iter()
            .for_each(|connection| hang_up(connection));
    }

    /// All that was heard so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.state.lock().unwrap().heard.clone()
    }

    /// Thread ids that faulted on an anchor.
    pub fn introduced(&self) -> Vec<i32> {
        self.state.lock().unwrap().introduced.clone()
    }

    /// Waits until `condition` holds of what was heard.
    pub fn wait_until(&self, condition: impl Fn(&[Heard]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition(&self.state.lock().unwrap().heard) {
            assert!(Instant::now() < deadline, "not heard in time");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn hang_up(socket: &OwnedFd) {
    // SAFETY: plain numbers.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

fn accept(listener: &OwnedFd, script: Script, state: &Arc<Mutex<State>>) {
    loop {
        // SAFETY: the peer's address is not asked for.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        if fd == -1 {
            return;
        }
        // SAFETY: the descriptor is new.
        let socket = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let number = {
            let mut state = state.lock().unwrap();
            state.connections.push(socket.clone());
            state.connections.len()
        };
        let state = state.clone();
        thread::spawn(move || {
            serve(&socket, number, script, &state);
            hang_up(&socket);
        });
    }
}

fn serve(socket: &OwnedFd, connection: usize, script: Script, state: &Arc<Mutex<State>>) {
    let (pid, uid) = credentials(socket);
    let send = |message: FromNode, raw: &[u8], descriptor: Option<RawFd>| {
        send(socket, message, raw, descriptor)
    };
    while let Some((message, raw, descriptor)) = receive(socket) {
        state.lock().unwrap().heard.push(Heard {
            pid,
            uid,
            connection,
            message,
            raw: raw.clone(),
        });
        match message {
            ToNode::Hello { .. } => match script.refuse {
                Some(errno) => send(FromNode::Refused { errno }, &[], None),
                None => {
                    let device = script.track.then(|| {
                        File::options()
                            .read(true)
                            .write(true)
                            .open("/dev/userfaultfd")
                            .expect("/dev/userfaultfd")
                    });
                    let welcome = FromNode::Welcome {
                        node: NodeId(1),
                        track: script.track,
                    };
                    send(welcome, &[], device.as_ref().map(AsRawFd::as_raw_fd));
                }
            },
            ToNode::Anchor { id, address } => {
                tracking::watch(
                    descriptor.expect("a userfaultfd"),
                    address,
                    pid,
                    state.clone(),
                );
                send(
                    FromNode::Answer {
                        id,
                        outcome: Ok(Answer::Value(0)),
                    },
                    &[],
                    None,
                );
            }
            ToNode::Call {
                call: Call::SemOp { id: DIES, .. },
                ..
            } => return,
            ToNode::Call {
                call:
                    Call::SemOp {
                        id: BLOCKS | WINS, ..
                    }
                    | Call::MsgSend {
                        id: BLOCKS | WINS, ..
                    }
                    | Call::MsgReceive {
                        id: BLOCKS | WINS, ..
                    },
                ..
            } => {}
            ToNode::Call {
                call: Call::SemOp { id: RAISES, .. } | Call::MsgReceive { id: RAISES, .. },
                ..
            } => {
                // SAFETY: plain numbers.
                unsafe { libc::kill(pid, libc::SIGUSR1) };
            }
            ToNode::Call { id, call } => {
                if matches!(call, Call::SemGet { key: FORKS, .. }) {
                    // SAFETY: plain numbers.
                    unsafe { libc::kill(pid, libc::SIGUSR1) };
                    let is_child = |heard: &Heard| heard.pid != pid;
                    while !state.lock().unwrap().heard.iter().any(is_child) {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
                if matches!(call, Call::SemOp { id: STALE, .. }) {
                    send(
                        FromNode::Answer {
                            id: id - 1,
                            outcome: Err(Errno::EIO),
                        },
                        &[],
                        None,
                    );
                }
                let (outcome, raw) = answer(call, &raw, script);
                let memory = match call {
                    Call::ShmAttach { id, .. } => Some(memory_of(id, state)),
                    _ => None,
                };
                let outcome = match outcome {
                    Ok(Answer::Attached(mut attachment)) => {
                        let mut state = state.lock().unwrap();
                        state.next_attach += 1;
                        attachment.attach = state.next_attach;
                        Ok(Answer::Attached(attachment))
                    }
                    outcome => outcome,
                };
                send(
                    FromNode::Answer { id, outcome },
                    &raw,
                    memory.filter(|_| outcome.is_ok()),
                );
            }
            ToNode::Cancel { id, errno } => {
                let cancelled = state.lock().unwrap().heard.iter().find_map(|heard| {
                    let ToNode::Call { id: theirs, call } = heard.message else {
                        return None;
                    };
                    (heard.connection == connection && theirs == id).then_some(call)
                });
                let (outcome, raw) = match cancelled {
                    Some(Call::SemOp { id: WINS, .. } | Call::MsgSend { id: WINS, .. }) => {
                        (Ok(Answer::Value(0)), Vec::new())
                    }
                    Some(Call::MsgReceive { id: WINS, size, .. }) => received(size),
                    _ => (Err(errno), Vec::new()),
                };
                send(FromNode::Answer { id, outcome }, &raw, None);
            }
            ToNode::Mapped {
                id,
                attach,
                address,
            } => {
                state.lock().unwrap().attaches.insert(address, attach);
                if let Some(id) = id {
                    send(
                        FromNode::Answer {
                            id,
                            outcome: Ok(Answer::Value(0)),
                        },
                        &[],
                        None,
                    );
                }
            }
            ToNode::Detach { id, address } => {
                let attach = state.lock().unwrap().attaches.get(&address).copied();
                match attach {
                    Some(attach) => send(
                        FromNode::Detaching {
                            id,
                            attach,
                            pieces: whole(SIZE),
                        },
                        &[],
                        None,
                    ),
                    None => send(
                        FromNode::Answer {
                            id,
                            outcome: Err(Errno::EINVAL),
                        },
                        &[],
                        None,
                    ),
                }
            }
            ToNode::Unmapping { id, .. } | ToNode::Remapped { id } | ToNode::Reaped { id } => send(
                FromNode::Answer {
                    id,
                    outcome: Ok(Answer::Value(0)),
                },
                &[],
                None,
            ),
            ToNode::Permitting {
                id,
                address,
                length,
            } => {
                let until = address + length;
                send(FromNode::Permitted { id, until }, &[], None);
            }
            ToNode::Unmapped { .. } | ToNode::Status { .. } | ToNode::Upgrade { .. } => {}
        }
    }
}

/// The script.
fn answer(call: Call, raw: &[u8], script: Script) -> (Outcome, Vec<u8>) {
    let perm = |key| Perm {
        key,
        uid: 11,
        gid: 12,
        cuid: 13,
        cgid: 14,
        mode: 0o1640,
        seq: 15,
    };
    let outcome = match call {
        Call::ShmGet { key, .. } | Call::SemGet { key, .. } | Call::MsgGet { key, .. } => {
            if key < 0 {
                Err(Errno::ENOENT)
            } else {
                Ok(Answer::Value(key))
            }
        }
        Call::ShmAttach { id, .. } if id < 0 => Err(Errno::EINVAL),
        Call::ShmAttach { id, .. } => Ok(Answer::Attached(Attachment {
            segment: SegmentId(id as u64),
            size: SIZE,
            consistency: Consistency::default(),
            may_write: true,
            attach: 0,
            tracked: script.track,
        })),
        Call::ShmCtl { id, command } => match command {
            ShmCommand::Stat(by) => Ok(Answer::Segment(ShmStatus {
                id: if by == StatBy::Id { id } else { id + 100 },
                perm: perm(id),
                consistency: Consistency::default(),
                size: SIZE,
                atime: 21,
                dtime: 22,
                ctime: 23,
                cpid: 24,
                lpid: 25,
                nattch: 26,
            })),
            ShmCommand::Set(new) if (new.uid, new.gid, new.mode) == (31, 32, 0o600) => {
                Ok(Answer::Value(0))
            }
            ShmCommand::Set(_) => Err(Errno::EPERM),
            ShmCommand::Remove | ShmCommand::Lock(_) => Ok(Answer::Value(0)),
            ShmCommand::Limits => Ok(Answer::ShmLimits(ShmLimits {
                shmmax: 41,
                shmmin: 42,
                shmmni: 43,
                shmseg: 44,
                shmall: 45,
                highest: 46,
            })),
            ShmCommand::Usage => Ok(Answer::ShmUsage(ShmUsage {
                used_ids: 51,
                shm_tot: 52,
                shm_rss: 53,
                shm_swp: 54,
                swap_attempts: 55,
                swap_successes: 56,
                highest: 57,
            })),
        },
        Call::SemOp { .. } => Ok(Answer::Value(0)),
        Call::SemCtl { id, command } => match command {
            SemCommand::Stat(by) => Ok(Answer::Set(SemStatus {
                id: if by == StatBy::Index { id + 100 } else { id },
                perm: perm(id),
                otime: 61,
                ctime: 62,
                nsems: VALUES.len() as u64,
            })),
            SemCommand::Set(new) if (new.uid, new.gid, new.mode) == (31, 32, 0o600) => {
                Ok(Answer::Value(0))
            }
            SemCommand::Set(_) => Err(Errno::EPERM),
            SemCommand::Remove => Ok(Answer::Value(0)),
            SemCommand::Limits | SemCommand::Usage => Ok(Answer::SemLimits(SemLimits {
                semmap: 71,
                semmni: 72,
                semmns: 73,
                semmnu: 74,
                semmsl: 75,
                semopm: 76,
                semume: 77,
                semusz: 78,
                semvmx: 79,
                semaem: 80,
                highest: 81,
            })),
            SemCommand::GetAll => {
                return (Ok(Answer::Values(VALUES.len() as u32)), bytes(&VALUES));
            }
            SemCommand::SetAll if raw == bytes(&VALUES) => Ok(Answer::Value(0)),
            SemCommand::SetAll => Err(Errno::ERANGE),
            SemCommand::SetVal(_, value) if value < 0 => Err(Errno::ERANGE),
            SemCommand::SetVal(..) => Ok(Answer::Value(0)),
            SemCommand::GetVal(number) => Ok(Answer::Value(1000 + number)),
            SemCommand::GetPid(number) => Ok(Answer::Value(2000 + number)),
            SemCommand::GetNcnt(number) => Ok(Answer::Value(3000 + number)),
            SemCommand::GetZcnt(number) => Ok(Answer::Value(4000 + number)),
        },
        // The text is as many times the flags as the type says.
        Call::MsgSend { flags, .. } => match raw.split_first_chunk() {
            Some((mtype, text))
                if text.len() as i64 == i64::from_le_bytes(*mtype)
                    && text.iter().all(|&byte| i32::from(byte) == flags) =>
            {
                Ok(Answer::Value(0))
            }
            _ => Err(Errno::EIO),
        },
        Call::MsgReceive { mtype, flags, .. } if (mtype, flags) != (-9, 77) => Err(Errno::ENOMSG),
        Call::MsgReceive { size, .. } => return received(size),
        Call::Accesses { .. } => Err(Errno::ENOSYS),
        Call::MsgCtl { id, command } => match command {
            MsgCommand::Stat(by) => Ok(Answer::Queue(MsgStatus {
                id: if by == StatBy::Id { id } else { id + 100 },
                perm: perm(id),
                stime: 91,
                rtime: 92,
                ctime: 93,
                cbytes: 94,
                qnum: 95,
                qbytes: 96,
                lspid: 97,
                lrpid: 98,
            })),
            MsgCommand::Set { perm: new, qbytes }
                if (new.uid, new.gid, new.mode, qbytes) == (31, 32, 0o600, 33) =>
            {
                Ok(Answer::Value(0))
            }
            MsgCommand::Set { .. } => Err(Errno::EPERM),
            MsgCommand::Remove => Ok(Answer::Value(0)),
            MsgCommand::Limits | MsgCommand::Usage => Ok(Answer::MsgLimits(MsgLimits {
                msgpool: 101,
                msgmap: 102,
                msgmax: 103,
                msgmnb: 104,
                msgmni: 105,
                msgssz: 106,
                msgtql: 107,
                msgseg: 108,
                highest: 109,
            })),
        },
    };
    (outcome, Vec::new())
}

/// A message that fills the receiver's room, within what a message may have.
fn received(size: u64) -> (Outcome, Vec<u8>) {
    let length = size.min(MSGMAX as u64) as usize;
    let text = (0..length).map(|n| n as u8);
    let raw = MTYPE.to_le_bytes().into_iter().chain(text).collect();
    (Ok(Answer::Message(length as u32)), raw)
}

fn bytes(values: &[u16]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// The segment's memory, the same for every attach.
fn memory_of(id: i32, state: &Mutex<State>) -> RawFd {
    let mut state = state.lock().unwrap();
    let memory = state.segments.entry(id).or_insert_with(|| {
        // SAFETY: a C string; the descriptor is new.
        let memory = unsafe {
            OwnedFd::from_raw_fd(libc::memfd_create(c"segment".as_ptr(), libc::MFD_CLOEXEC))
        };
        let length = SIZE.next_multiple_of(4096) as i64;
        // SAFETY: plain numbers.
        assert_eq!(unsafe { libc::ftruncate(memory.as_raw_fd(), length) }, 0);
        memory
    });
    memory.as_raw_fd()
}

fn credentials(socket: &OwnedFd) -> (i32, u32) {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as u32;
    // SAFETY: valid out pointers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    (peer.pid, peer.uid)
}

#[repr(C, align(8))]
struct Control([u8; 24]);

fn send(socket: &OwnedFd, message: FromNode, raw: &[u8], descriptor: Option<RawFd>) {
    let mut bytes = Vec::new();
    codec::encode(&message, raw, &mut bytes).unwrap();
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; 24]);
    // SAFETY: all buffers are valid; the control buffer has room for one descriptor.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if let Some(descriptor) = descriptor {
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = 24;
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(4) as usize;
            libc::CMSG_DATA(first)
                .cast::<RawFd>()
                .write_unaligned(descriptor);
        }
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL);
    }
}

fn receive(socket: &OwnedFd) -> Option<(ToNode, Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; MAX_LOCAL];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; 24]);
    // SAFETY: all buffers are valid; a descriptor that came is new and ours.
    let (count, descriptor) = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = 24;
        let count = libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC);
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        let descriptor = (count > 0 && !first.is_null())
            .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()));
        (count, descriptor)
    };
    if count <= 0 {
        if count < 0 {
            assert_eq!(
                io::Error::last_os_error().raw_os_error(),
                Some(libc::ECONNRESET)
            );
        }
        return None;
    }
    let (message, raw) =
        codec::decode(&bytes[..count as usize]).expect("a message of this protocol");
    Some((message, raw.to_vec(), descriptor))
}

/// The one piece that an attach is in.
fn whole(size: u64) -> Pieces {
    let mut pieces = Pieces::default();
    pieces[0] = (0, size.div_ceil(4096) as u32);
    pieces
}
