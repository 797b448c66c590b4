//! One call and its answer.
//!
//! A [`Session`] is the exclusive use of a connection for the length of one System V call: a
//! request, its answer, for some calls another exchange. The daemon learns who calls from the
//! socket's credentials, which the kernel took when the connection was made; so a connection made
//! under another effective user or group is replaced first.
//!
//! # Interruption
//!
//! The socket has a receive timeout, whose length means nothing: with one set, the kernel never
//! restarts a receive after a signal handler, whatever `SA_RESTART` says (signal(7)) - the rule
//! of semop(2). A receive that fails with `EINTR` makes an interruptible call send `Cancel` and
//! go on waiting: the daemon's answer alone says whether the operation took place. A handler that
//! runs after the request was sent but before the receive began interrupts nothing, as one that
//! runs just before a `semop` does not. A timed call waits in `ppoll`, which keeps time more
//! exactly and is not restarted either.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_int, c_void, iovec, msghdr, timespec};
use migshm_protocol::call::{Answer, Call, Errno};
use migshm_protocol::codec;
use migshm_protocol::local::{FromNode, LOCAL_VERSION, ToNode};

use crate::complain::complain;
use crate::pool::{self, Claim};
use crate::process::{self, Wiped};
use crate::start::{self, Absent};
use crate::sys;

/// Room for any message, without the raw bytes after it.
const MESSAGE_MAX: usize = 512;

/// Attempts to connect; a daemon that has nothing left to do may end just after accepting one.
const CONNECT_ATTEMPTS: usize = 3;

/// Makes one call that is one exchange and cannot be interrupted.
pub fn call(call: Call) -> Result<Answer, Errno> {
    Session::begin()?.call(call, Raw::NONE)
}

/// Tells a daemon that is there about this process.
pub fn say_hello() -> Result<(), Errno> {
    Session::begin_with(Absent::Fail).map(drop)
}

/// An open connection to the daemon.
#[derive(Clone, Copy)]
pub struct Connection {
    pub fd: RawFd,
    /// Device and inode of the socket: programs close descriptors that they do not know, and
    /// then get the same number for another file.
    pub identity: (u64, u64),
    /// Effective user and group that the daemon sees.
    pub user: (u32, u32),
    /// Whether the daemon tracks the address spaces that attach.
    pub track: bool,
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

/// What ends the wait for an answer early.
#[derive(Clone, Copy)]
pub enum Patience {
    /// Nothing.
    Endless,
    /// A signal handler.
    UntilSignal,
    /// A signal handler, or this time on the monotonic clock.
    Until(timespec),
}

/// A message from the daemon and the descriptor that came with it.
pub struct Reply {
    pub message: FromNode,
    pub descriptor: Option<OwnedFd>,
}

/// Why an exchange failed.
enum Failure {
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

/// Exclusive use of a connection.
pub struct Session {
    own: &'static Wiped,
    claim: Option<Claim>,
    connection: Connection,
}

impl Session {
    /// Claims a connection, made and daemon started if need be.
    ///
    /// # Errors
    /// `ENOSYS` if there is no daemon and none can be started, or what the daemon refuses with.
    pub fn begin() -> Result<Session, Errno> {
        Session::begin_with(Absent::Start)
    }

    fn begin_with(absent: Absent) -> Result<Session, Errno> {
        let own = process::own()?;
        let claimed = pool::claim(own);
        let claim = claimed.map(|(claim, _)| claim);
        if let Some(connection) = claimed.and_then(|(_, connection)| connection) {
            if connection.is_usable() {
                return Ok(Session {
                    own,
                    claim,
                    connection,
                });
            }
            connection.abandon();
            note(claim, None);
        }
        match Connection::open(own, absent) {
            Ok((connection, _device)) => {
                note(claim, Some(connection));
                Ok(Session {
                    own,
                    claim,
                    connection,
                })
            }
            Err(errno) => {
                if let Some(claim) = claim {
                    pool::release(own, claim);
                }
                Err(errno)
            }
        }
    }

    /// Whether the daemon tracks the address spaces that attach.
    pub fn tracks(&self) -> bool {
        self.connection.track
    }

    /// Replaces the connection by a new one; gives the `/dev/userfaultfd` that came with it.
    pub fn renew(&mut self) -> Result<Option<OwnedFd>, Errno> {
        let (connection, device) = Connection::open(self.own, Absent::Start)?;
        self.connection.abandon();
        self.connection = connection;
        note(self.claim, Some(connection));
        Ok(device)
    }

    /// A call that is answered without waiting for other processes.
    pub fn call(&mut self, call: Call, raw: Raw) -> Result<Answer, Errno> {
        let id = process::request_id();
        self.request(&ToNode::Call { id, call }, raw)?;
        self.outcome(id, Patience::Endless)
    }

    /// Sends the first message of an exchange. The daemon may have ended since the connection was
    /// last used; it has not seen the message then, so a new one gets it.
    ///
    /// # Errors
    /// `EFAULT` if `raw` cannot be read.
    pub fn request(&mut self, message: &ToNode, raw: Raw) -> Result<(), Errno> {
        match self.connection.send(message, raw, None) {
            Ok(()) => Ok(()),
            Err(Failure::Errno(errno)) => Err(errno),
            Err(Failure::Lost) => {
                self.renew()?;
                self.tell(message, raw, None)
            }
        }
    }

    /// Sends a further message of an exchange, which only this daemon can understand.
    pub fn tell(
        &self,
        message: &ToNode,
        raw: Raw,
        descriptor: Option<&OwnedFd>,
    ) -> Result<(), Errno> {
        self.connection
            .send(message, raw, descriptor)
            .map_err(Failure::into_errno)
    }

    /// Waits for the outcome of request `id`.
    pub fn outcome(&self, id: u64, patience: Patience) -> Result<Answer, Errno> {
        match self.reply(id, patience)?.message {
            FromNode::Answer { outcome, .. } => outcome,
            _ => Err(out_of_step()),
        }
    }

    /// Waits for the reply to request `id`; earlier requests' replies are dropped. Always waits
    /// until the daemon has answered, whatever the patience: that ends in a `Cancel` that speeds
    /// the answer up.
    pub fn reply(&self, id: u64, patience: Patience) -> Result<Reply, Errno> {
        let mut patience = patience;
        loop {
            let received = self
                .connection
                .wait(patience)
                .and_then(|()| self.connection.receive(0));
            let failure = match received {
                Ok((reply, _)) if replies_to(&reply.message) == Some(id) => return Ok(reply),
                Ok(_) => continue,
                Err(failure) => failure,
            };
            match (failure, patience) {
                (Failure::Errno(errno @ (Errno::EINTR | Errno::EAGAIN)), Patience::Until(_))
                | (Failure::Errno(errno @ Errno::EINTR), Patience::UntilSignal) => {
                    self.tell(&ToNode::Cancel { id, errno }, Raw::NONE, None)?;
                    patience = Patience::Endless;
                }
                (Failure::Errno(Errno::EINTR | Errno::EAGAIN), _) => {}
                (failure, _) => return Err(failure.into_errno()),
            }
        }
    }

    /// As [`Session::outcome`], for an answer whose raw bytes go to an address that the program
    /// gave.
    ///
    /// # Errors
    /// `EFAULT` if it cannot be written to.
    pub fn values(&self, id: u64, address: usize) -> Result<Answer, Errno> {
        loop {
            // The message's length is unknown until it is decoded: peek, then receive it with
            // the raw bytes going where they belong.
            let (reply, length) = match self.connection.receive(libc::MSG_PEEK) {
                Ok(peeked) => peeked,
                Err(Failure::Errno(Errno::EINTR | Errno::EAGAIN)) => continue,
                Err(failure) => return Err(failure.into_errno()),
            };
            let mine = replies_to(&reply.message) == Some(id);
            let raw = match reply.message {
                FromNode::Answer {
                    outcome: Ok(Answer::Values(count)),
                    ..
                } if mine => Raw {
                    address,
                    length: count as usize * size_of::<u16>(),
                },
                _ => Raw::NONE,
            };
            self.connection.consume(length, raw)?;
            match reply.message {
                FromNode::Answer { outcome, .. } if mine => return outcome,
                _ if mine => return Err(out_of_step()),
                _ => {}
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        match self.claim {
            Some(claim) => pool::release(self.own, claim),
            None => self.connection.abandon(),
        }
    }
}

impl Connection {
    /// Connects, and says Hello. The descriptor is `/dev/userfaultfd`, if the daemon tracks.
    fn open(own: &Wiped, absent: Absent) -> Result<(Connection, Option<OwnedFd>), Errno> {
        let _cancellation = sys::CancellationOff::new();
        for _ in 0..CONNECT_ATTEMPTS {
            let user = effective_user();
            let socket = sys::move_high(start::connect(absent)?);
            let fd = socket.as_raw_fd();
            set_receive_timeout(fd)?;
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
            };
            let welcome = connection
                .send(&hello, Raw::NONE, None)
                .and_then(|()| connection.receive_patiently());
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
    /// what it is: one of the present effective user and group.
    fn is_usable(&self) -> bool {
        sys::identity(self.fd) == Some(self.identity) && effective_user() == self.user
    }

    /// Closes the descriptor, if it is still ours.
    pub fn abandon(self) {
        if sys::identity(self.fd) == Some(self.identity) {
            // SAFETY: the descriptor is this connection's, which nobody uses any more.
            drop(unsafe { OwnedFd::from_raw_fd(self.fd) });
        }
    }

    /// Sends one message, its raw bytes straight from the program's memory.
    fn send(
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
            // checks. Not libc's sendmsg, which is a cancellation point.
            let sent = unsafe {
                libc::syscall(
                    libc::SYS_sendmsg,
                    self.fd,
                    &raw const header,
                    libc::MSG_NOSIGNAL,
                )
            };
            match sys::check(sent) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(lost_or(errno)),
            }
        }
    }

    /// Waits for a timed call's answer; the others wait in [`Connection::receive`].
    fn wait(&self, patience: Patience) -> Result<(), Failure> {
        let Patience::Until(deadline) = patience else {
            return Ok(());
        };
        let remaining = remaining(deadline);
        let mut poll = libc::pollfd {
            fd: self.fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: valid pointers; no signal mask. Not libc's ppoll, a cancellation point.
        let ready = unsafe {
            libc::syscall(
                libc::SYS_ppoll,
                &raw mut poll,
                1,
                &raw const remaining,
                ptr::null::<c_void>(),
                0,
            )
        };
        match sys::check(ready)? {
            0 => Err(Failure::Errno(Errno::EAGAIN)),
            _ => Ok(()),
        }
    }

    /// Receives one message, and tells how many bytes encode it.
    fn receive(&self, flags: c_int) -> Result<(Reply, usize), Failure> {
        let mut bytes = [0_u8; MESSAGE_MAX];
        let mut parts = [part(bytes.as_mut_ptr(), MESSAGE_MAX)];
        let mut control = Control::new();
        let mut header = packet(&mut parts);
        control.offer(&mut header);
        // SAFETY: the header describes valid buffers. Not libc's recvmsg, a cancellation point.
        let received = unsafe {
            libc::syscall(
                libc::SYS_recvmsg,
                self.fd,
                &raw mut header,
                flags | libc::MSG_CMSG_CLOEXEC,
            )
        };
        let received = sys::check(received).map_err(lost_or)?;
        let descriptor = control.received(&header);
        if received == 0 {
            return Err(Failure::Lost);
        }
        let bytes = &bytes[..received as usize];
        let (message, raw) = codec::decode(bytes).map_err(|_| Errno::ENOSYS)?;
        Ok((
            Reply {
                message,
                descriptor,
            },
            bytes.len() - raw.len(),
        ))
    }

    /// Receives one message, whatever signals come.
    fn receive_patiently(&self) -> Result<Reply, Failure> {
        loop {
            match self.receive(0) {
                Ok((reply, _)) => return Ok(reply),
                Err(Failure::Errno(Errno::EINTR | Errno::EAGAIN)) => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Receives the message that was peeked at, of `length` bytes, and puts the raw bytes after
    /// it in the program's memory.
    fn consume(&self, length: usize, raw: Raw) -> Result<(), Errno> {
        let mut bytes = [0_u8; MESSAGE_MAX];
        let mut parts = [part(bytes.as_mut_ptr(), length), raw.part()];
        let mut header = packet(&mut parts);
        // SAFETY: `length` is at most that of `bytes`; the kernel checks the program's buffer.
        let received = unsafe { libc::syscall(libc::SYS_recvmsg, self.fd, &raw mut header, 0) };
        sys::check(received).map(drop)
    }
}

impl Failure {
    /// The errno for the program.
    fn into_errno(self) -> Errno {
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

fn note(claim: Option<Claim>, connection: Option<Connection>) {
    if let Some(claim) = claim {
        pool::note(claim, connection);
    }
}

/// The request that a message answers.
fn replies_to(message: &FromNode) -> Option<u64> {
    match message {
        FromNode::Answer { id, .. } | FromNode::Detaching { id, .. } => Some(*id),
        FromNode::Welcome { .. } | FromNode::Refused { .. } => None,
    }
}

/// A reply that fits no request: shim and daemon are not of one build.
pub fn out_of_step() -> Errno {
    complain(format_args!(
        "the node daemon is of another version; restart it"
    ))
}

fn lost_or(errno: Errno) -> Failure {
    match errno.0 {
        libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN => Failure::Lost,
        _ => Failure::Errno(errno),
    }
}

fn effective_user() -> (u32, u32) {
    // SAFETY: no preconditions.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Any receive timeout will do; see the module's comment.
fn set_receive_timeout(fd: RawFd) -> Result<(), Errno> {
    let day = libc::timeval {
        tv_sec: 24 * 60 * 60,
        tv_usec: 0,
    };
    let (value, length) = (
        (&raw const day).cast(),
        size_of::<libc::timeval>() as libc::socklen_t,
    );
    // SAFETY: a valid value of the option's type.
    sys::check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, value, length) })
        .map(drop)
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
