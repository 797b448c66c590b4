//! A connection to the daemon: messages with raw bytes and descriptors, one packet each.
//!
//! A call that a signal may interrupt waits in `epoll_pwait2` or `ppoll` rather than in `recvmsg`:
//! they let signals in that have been blocked since before the request was sent, and the kernel
//! never restarts them after a handler, whatever `SA_RESTART` says (signal(7)).
//!
//! Raw bytes travel straight between the socket and the program's memory: the kernel checks the
//! addresses, so a bad one is `EFAULT` and no crash, and nothing is copied twice.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_int, iovec, msghdr, timespec};
use migshm_protocol::call::Errno;
use migshm_protocol::codec;
use migshm_protocol::local::{FromNode, LOCAL_VERSION, ToNode};

use crate::anchor;
use crate::client::out_of_step;
use crate::complain::complain;
use crate::kernel::kernel;
use crate::process::{self, Wiped};
use crate::start::{self, Absent};
use crate::sys::{self, SignalsBlocked};

/// Room for any message, without the raw bytes after it.
const MESSAGE_MAX: usize = 512;

/// Attempts to connect; a daemon that has nothing left to do may end just after accepting one.
const CONNECT_ATTEMPTS: usize = 3;

/// An open connection to the daemon.
#[derive(Clone, Copy)]
pub struct Connection {
    pub fd: RawFd,
    /// Device and inode of the socket: programs close descriptors that they do not know, and
    /// then get the same number for another file.
    pub identity: (u64, u64),
    /// The user and group under which the daemon serves it.
    pub user: User,
    /// Whether the daemon tracks the address spaces that attach.
    pub track: bool,
}

/// Effective and real user and group. The daemon serves a connection for the effective ones, and
/// only as long as the real ones stay.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub effective: (u32, u32),
    pub real: (u32, u32),
}

/// Bytes that follow a message, at an address that the program gave.
#[derive(Clone, Copy)]
pub struct Raw {
    pub address: usize,
    pub length: usize,
}

impl Raw {
    pub const NONE: Raw = Raw {
        address: 0,
        length: 0,
    };
}

/// What ends the wait for an answer early. The signals are blocked since before the request was
/// sent; the wait lets them in, and so does its end.
pub enum Patience {
    /// Nothing.
    Endless,
    /// A signal handler, as for msgsnd(2).
    UntilHandler(SignalsBlocked),
    /// A signal handler or a continuation after a stop, as for semop(2); or this time on the
    /// monotonic clock.
    UntilSignal(SignalsBlocked, Option<timespec>),
}

/// A message from the daemon and the descriptor that came with it.
pub struct Reply {
    pub message: FromNode,
    pub descriptor: Option<OwnedFd>,
}

/// Why an exchange failed.
pub enum Failure {
    /// The daemon is gone.
    Lost,
    /// The kernel refused, or `EINTR`, `EAGAIN` for what they mean.
    Errno(Errno),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure::Errno(errno)
    }
}

impl Connection {
    /// Connects, and says Hello. The descriptor is `/dev/userfaultfd`, if the daemon tracks.
    pub fn open(own: &Wiped, absent: Absent) -> Result<(Connection, Option<OwnedFd>), Errno> {
        let _cancellation = sys::CancellationOff::new();
        let process = sys::pid();
        for _ in 0..CONNECT_ATTEMPTS {
            let user = User::now();
            let socket = sys::move_high(start::connect(absent)?);
            let fd = socket.as_raw_fd();
            let identity = sys::identity(fd).ok_or(Errno::ENOSYS)?;
            let connection = Connection {
                fd,
                identity,
                user,
                track: false,
            };
            let hello = ToNode::Hello {
                version: LOCAL_VERSION,
                forked_from: process::forked_from(own),
                anchor: anchor::introduce(),
            };
            let welcome = connection
                .send(&hello, Raw::NONE, None)
                .and_then(|()| connection.receive_patiently(process));
            match welcome {
                Ok(Reply {
                    message: FromNode::Welcome { track, .. },
                    descriptor,
                }) => {
                    process::introduced(own);
                    return Ok((
                        Connection {
                            fd: socket.into_raw_fd(),
                            track,
                            ..connection
                        },
                        descriptor,
                    ));
                }
                Ok(Reply {
                    message: FromNode::Refused { errno },
                    ..
                }) => {
                    complain(format_args!(
                        "the node daemon refuses to serve this process; its log says why (`migshm status` shows its state)"
                    ));
                    return Err(errno);
                }
                Ok(_) => return Err(out_of_step()),
                Err(Failure::Errno(errno)) => return Err(errno),
                Err(Failure::Lost) => {}
            }
        }
        Err(complain(format_args!(
            "the node daemon closes connections at once; see its log, or restart it with `migshm node`"
        )))
    }

    /// Whether the descriptor is still this connection, and the daemon would take a call on it for
    /// what it is: one of the present user and group.
    pub fn is_usable(&self) -> bool {
        sys::identity(self.fd) == Some(self.identity) && User::now() == self.user
    }

    /// Closes the descriptor, if it is still ours.
    pub fn abandon(self) {
        if sys::identity(self.fd) == Some(self.identity) {
            // SAFETY: the descriptor is this connection's, which nobody uses any more.
            sys::close(unsafe { OwnedFd::from_raw_fd(self.fd) });
        }
    }

    /// Sends one message, its raw bytes straight from the program's memory.
    pub fn send(
        &self,
        message: &ToNode,
        raw: Raw,
        descriptor: Option<&OwnedFd>,
    ) -> Result<(), Failure> {
        let mut bytes = [0_u8; MESSAGE_MAX];
        let length = codec::encode_into(message, &mut bytes).map_err(|_| Errno::EINVAL)?;
        let mut parts = [part(bytes.as_mut_ptr(), length), raw.part()];
        let mut control = Control::new();
        let mut header = packet(&mut parts);
        if let Some(descriptor) = descriptor {
            control.attach(&mut header, descriptor);
        }
        loop {
            // SAFETY: the header describes valid buffers, except the program's, which the kernel
            // checks.
            let sent =
                unsafe { kernel!(SYS_sendmsg, self.fd, &raw const header, libc::MSG_NOSIGNAL) };
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(lost_or(errno)),
            }
        }
    }

    /// Waits for a message, or for a handler of a signal that was not blocked before.
    ///
    /// # Errors
    /// `EINTR`.
    pub fn wait_endlessly(&self, signals: &SignalsBlocked) -> Result<(), Failure> {
        sys::poll(self.fd, None, signals)?;
        Ok(())
    }

    /// Waits for an interruptible call's answer; see [`Connection::wait_endlessly`] for others.
    ///
    /// # Errors
    /// `EINTR`, or `EAGAIN` if the time is up.
    pub fn wait(&self, patience: &Patience) -> Result<(), Failure> {
        let ready = match patience {
            Patience::Endless => return Ok(()),
            Patience::UntilHandler(signals) => {
                signals.forget_ignored();
                sys::poll(self.fd, None, signals)
            }
            // The kernel restarts `ppoll` after a stop that no handler saw, `epoll_pwait2` never.
            Patience::UntilSignal(signals, deadline) => {
                let timeout = deadline.map(remaining);
                match sys::epoll_of(self.fd) {
                    Ok(epoll) => {
                        signals.forget_ignored();
                        let ready = sys::epoll_wait(&epoll, timeout, signals);
                        sys::close(epoll);
                        ready
                    }
                    // The program has as many descriptors open as it may.
                    Err(_) => sys::poll(self.fd, timeout, signals),
                }
            }
        };
        match ready? {
            0 => Err(Failure::Errno(Errno::EAGAIN)),
            _ => Ok(()),
        }
    }

    /// Receives one message, and tells how many bytes encode it.
    pub fn receive(&self, flags: c_int) -> Result<(Reply, usize), Failure> {
        let mut bytes = [0_u8; MESSAGE_MAX];
        let mut parts = [part(bytes.as_mut_ptr(), MESSAGE_MAX)];
        let mut control = Control::new();
        let mut header = packet(&mut parts);
        control.offer(&mut header);
        // SAFETY: the header describes valid buffers.
        let received = unsafe {
            kernel!(
                SYS_recvmsg,
                self.fd,
                &raw mut header,
                flags | libc::MSG_CMSG_CLOEXEC
            )
        };
        let received = received.map_err(lost_or)?;
        let descriptor = control.received(&header);
        if received == 0 {
            return Err(Failure::Lost);
        }
        let bytes = &bytes[..received];
        let (message, raw) = codec::decode(bytes).map_err(|_| Errno::ENOSYS)?;
        Ok((
            Reply {
                message,
                descriptor,
            },
            bytes.len() - raw.len(),
        ))
    }

    /// Receives one message, whatever signals come, in the process that has made the connection.
    ///
    /// # Errors
    /// `EINTR` in a child that a handler has forked.
    fn receive_patiently(&self, process: libc::pid_t) -> Result<Reply, Failure> {
        loop {
            let signals = SignalsBlocked::new();
            if sys::pid() != process {
                return Err(Errno::EINTR.into());
            }
            match self.wait_endlessly(&signals) {
                Ok(()) => return self.receive(0).map(|(reply, _)| reply),
                Err(Failure::Errno(Errno::EINTR)) => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Receives the message that was peeked at, of `length` bytes, and puts the raw bytes after
    /// it in the program's memory.
    pub fn consume(&self, length: usize, raw: Raw) -> Result<(), Errno> {
        let mut bytes = [0_u8; MESSAGE_MAX];
        let mut parts = [part(bytes.as_mut_ptr(), length), raw.part()];
        let mut header = packet(&mut parts);
        // SAFETY: `length` is at most that of `bytes`; the kernel checks the program's buffer.
        unsafe { kernel!(SYS_recvmsg, self.fd, &raw mut header, 0) }.map(drop)
    }
}

impl Failure {
    /// The errno for the program.
    pub fn into_errno(self) -> Errno {
        match self {
            Failure::Lost => complain(format_args!(
                "the node daemon ended during a call; restart it with `migshm node`, or simply the program"
            )),
            Failure::Errno(errno) => errno,
        }
    }
}

impl Raw {
    fn part(self) -> iovec {
        part(self.address as *mut u8, self.length)
    }
}

/// Buffer for the ancillary data of one descriptor.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    descriptor: c_int,
    padding: c_int,
}

impl Control {
    fn new() -> Control {
        let header = libc::cmsghdr {
            cmsg_len: 0,
            cmsg_level: 0,
            cmsg_type: 0,
        };
        Control {
            header,
            descriptor: -1,
            padding: 0,
        }
    }

    /// Lets `message` carry a descriptor.
    fn attach(&mut self, message: &mut msghdr, descriptor: &OwnedFd) {
        self.header.cmsg_level = libc::SOL_SOCKET;
        self.header.cmsg_type = libc::SCM_RIGHTS;
        self.header.cmsg_len = Control::LENGTH;
        self.descriptor = descriptor.as_raw_fd();
        self.offer(message);
    }

    /// Makes room in `message` for a descriptor.
    fn offer(&mut self, message: &mut msghdr) {
        message.msg_control = ptr::from_mut(self).cast();
        message.msg_controllen = size_of::<Control>();
    }

    /// The descriptor that came.
    fn received(&self, message: &msghdr) -> Option<OwnedFd> {
        let came = message.msg_controllen >= Control::LENGTH
            && self.header.cmsg_level == libc::SOL_SOCKET
            && self.header.cmsg_type == libc::SCM_RIGHTS;
        // SAFETY: the kernel has just put a new descriptor there for us.
        came.then(|| unsafe { OwnedFd::from_raw_fd(self.descriptor) })
    }

    const LENGTH: usize = size_of::<libc::cmsghdr>() + size_of::<c_int>();
}

fn lost_or(errno: Errno) -> Failure {
    match errno.0 {
        libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN => Failure::Lost,
        _ => Failure::Errno(errno),
    }
}

impl User {
    fn now() -> User {
        let mut users = [0u32; 3];
        let mut groups = [0u32; 3];
        let [real, effective, saved] = &mut users;
        // SAFETY: live integers; it cannot fail.
        let _ = unsafe {
            kernel!(
                SYS_getresuid,
                real as *mut u32,
                effective as *mut u32,
                saved as *mut u32
            )
        };
        let [real, effective, saved] = &mut groups;
        // SAFETY: as above.
        let _ = unsafe {
            kernel!(
                SYS_getresgid,
                real as *mut u32,
                effective as *mut u32,
                saved as *mut u32
            )
        };
        User {
            effective: (users[1], groups[1]),
            real: (users[0], groups[0]),
        }
    }
}

/// Time until `deadline`, zero if it is past.
fn remaining(deadline: timespec) -> timespec {
    const NANOSECONDS: i64 = 1_000_000_000;
    let now = sys::monotonic();
    let borrow = deadline.tv_nsec < now.tv_nsec;
    let tv_sec = deadline.tv_sec.saturating_sub(now.tv_sec) - i64::from(borrow);
    let tv_nsec = deadline.tv_nsec - now.tv_nsec + if borrow { NANOSECONDS } else { 0 };
    if tv_sec < 0 {
        timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }
    } else {
        timespec { tv_sec, tv_nsec }
    }
}

fn part(address: *mut u8, length: usize) -> iovec {
    iovec {
        iov_base: address.cast(),
        iov_len: length,
    }
}

fn packet(parts: &mut [iovec]) -> msghdr {
    // SAFETY: a C struct of integers and pointers, for which zeros are valid.
    let mut header: msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = parts.len();
    header
}
