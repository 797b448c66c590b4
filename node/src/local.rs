//! The unix socket that processes of this node talk to, and what the kernel says about them.

use crate::handover::descriptor;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use migshm_protocol::call::Memlock;

/// A `SOCK_SEQPACKET` unix socket, nonblocking.
#[derive(Debug, Serialize, Deserialize)]
pub struct Socket(#[serde(with = "descriptor")] OwnedFd);

/// Who is at the other end of a connection, as the kernel knows it from `connect(2)`.
#[derive(Debug)]
pub struct Credentials {
    /// In the daemon's pid namespace; 0 if it has no name there.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Of the process that connected, also when its pid has gone to another.
    pub pidfd: OwnedFd,
}

/// One packet of a process.
#[derive(Debug)]
pub struct Packet {
    /// Bytes received; 0 is the end of the connection.
    pub length: usize,
    /// The descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
    /// Who sent it.
    pub sender: Sender,
}

/// The process that sent a packet, as the kernel knew it then (`SCM_CREDENTIALS`): not
/// necessarily the one that connected, as forked children have its descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sender {
    /// In the daemon's pid namespace; 0 if it has no name there.
    pub pid: i32,
    /// Real user id.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
}

/// `SO_PEERPIDFD` of `asm-generic/socket.h`.
const SO_PEERPIDFD: libc::c_int = 77;

/// Room for the sender's credentials and one descriptor, and a few more that a peer may send.
#[repr(align(8))]
struct Control([u8; 64]);

impl Control {
    fn new() -> Control {
        Control([0; 64])
    }
}

impl Socket {
    fn new() -> io::Result<Socket> {
        let flags = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: returns a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_UNIX, flags, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a descriptor that nothing else owns.
        Ok(Socket(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Binds `path`, over a socket file that a dead daemon left, and listens. Any local user may
    /// connect; what each may do is decided call by call.
    ///
    /// # Errors
    /// Those of `socket(2)`, `bind(2)`, `listen(2)`.
    pub fn listen(path: &Path) -> io::Result<Socket> {
        let (address, length) = unix_address(path)?;
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let socket = Socket::new()?;
        let fd = socket.0.as_raw_fd();
        // SAFETY: the address is initialised and its length is right.
        if unsafe { libc::bind(fd, (&raw const address).cast(), length) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Connections inherit it.
        socket.set_option(libc::SO_PASSCRED, 1)?;
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        // SAFETY: plain listen on an owned descriptor.
        if unsafe { libc::listen(fd, libc::SOMAXCONN) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    /// Whether somebody accepts connections at `path`.
    #[must_use]
    pub fn is_served(path: &Path) -> bool {
        let Ok((address, length)) = unix_address(path) else {
            return false;
        };
        let Ok(socket) = Socket::new() else {
            return false;
        };
        // SAFETY: the address is initialised and its length is right.
        unsafe { libc::connect(socket.0.as_raw_fd(), (&raw const address).cast(), length) == 0 }
    }

    /// Whether a connection waits to be accepted.
    #[must_use]
    pub fn has_callers(&self) -> bool {
        is_readable(self.0.as_raw_fd())
    }

    /// The next connection.
    ///
    /// # Errors
    /// Those of `accept4(2)`, `WouldBlock` among them.
    pub fn accept(&self) -> io::Result<Socket> {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no address is asked for; returns a new descriptor or -1.
        let fd = unsafe {
            libc::accept4(
                self.0.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                flags,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a descriptor that nothing else owns.
        Ok(Socket(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Receives one packet.
    ///
    /// # Errors
    /// Those of `recvmsg(2)`, `WouldBlock` among them; `InvalidData` if the packet is longer than
    /// the buffer.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Packet> {
        let mut iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let mut control = Control::new();
        // SAFETY: plain data, zero is a valid value.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = control.0.len();
        // SAFETY: the header refers to live buffers of the lengths it says.
        let got =
            unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let mut descriptor = None;
        let mut sender = Sender::default();
        // SAFETY: the kernel filled the control buffer; the macros stay inside it. All descriptors
        // in it are taken over here.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(&raw const header);
            while !message.is_null() {
                let data = libc::CMSG_DATA(message);
                match ((*message).cmsg_level, (*message).cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                        let libc::ucred { pid, uid, gid } =
                            data.cast::<libc::ucred>().read_unaligned();
                        sender = Sender { pid, uid, gid };
                    }
                    (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                        let header_length = libc::CMSG_LEN(0) as usize;
                        let count = ((*message).cmsg_len - header_length) / size_of::<RawFd>();
                        let data = data.cast::<RawFd>();
                        for index in 0..count {
                            descriptor =
                                Some(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                        }
                    }
                    _ => {}
                }
                message = libc::CMSG_NXTHDR(&raw const header, message);
            }
        }
        if header.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Packet {
            length: got,
            descriptor,
            sender,
        })
    }

    /// Ends the connection: the peer sees that, and so does who reads here.
    pub fn shut_down(&self) {
        // SAFETY: plain shutdown on an owned descriptor. It fails only if the peer has gone.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// Effective user id of who connected.
    ///
    /// # Errors
    /// Those of `getsockopt(2)`.
    pub fn user(&self) -> io::Result<u32> {
        self.peer().map(|peer| peer.uid)
    }

    fn peer(&self) -> io::Result<libc::ucred> {
        let mut peer = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        self.option(libc::SO_PEERCRED, std::slice::from_mut(&mut peer))?;
        Ok(peer)
    }

    fn set_option(&self, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        let length = libc::socklen_t::try_from(size_of_val(&value)).expect("small");
        // SAFETY: a live integer of the length given.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const value).cast(),
                length,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sends one packet, with a descriptor if one is given.
    ///
    /// # Errors
    /// Those of `sendmsg(2)`; `WouldBlock` if the peer does not read.
    pub fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut iov = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut control = Control::new();
        // SAFETY: plain data, zero is a valid value.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        if let Some(descriptor) = descriptor {
            let size = u32::try_from(size_of::<RawFd>()).expect("small");
            header.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: the control buffer is aligned and large enough for one descriptor.
            unsafe {
                header.msg_controllen = libc::CMSG_SPACE(size) as usize;
                let message = libc::CMSG_FIRSTHDR(&raw const header);
                (*message).cmsg_level = libc::SOL_SOCKET;
                (*message).cmsg_type = libc::SCM_RIGHTS;
                (*message).cmsg_len = libc::CMSG_LEN(size) as usize;
                libc::CMSG_DATA(message)
                    .cast::<RawFd>()
                    .write_unaligned(descriptor.as_raw_fd());
            }
        }
        // SAFETY: the header refers to live buffers of the lengths it says.
        let sent =
            unsafe { libc::sendmsg(self.0.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Who connected.
    ///
    /// # Errors
    /// Those of `getsockopt(2)`.
    pub fn credentials(&self) -> io::Result<Credentials> {
        let peer = self.peer()?;
        let mut groups = vec![0u32; 64];
        let used = match self.option(libc::SO_PEERGROUPS, &mut groups) {
            Err(e) if e.raw_os_error() == Some(libc::ERANGE) => {
                // NGROUPS_MAX.
                groups.resize(65536, 0);
                self.option(libc::SO_PEERGROUPS, &mut groups)?
            }
            other => other?,
        };
        groups.truncate(used / size_of::<u32>());
        let mut fd: [RawFd; 1] = [-1];
        let pidfd = match self.option(SO_PEERPIDFD, &mut fd) {
            // SAFETY: the kernel made this descriptor for us.
            Ok(_) => unsafe { OwnedFd::from_raw_fd(fd[0]) },
            // Before Linux 6.5.
            Err(_) => pidfd(peer.pid)?,
        };
        Ok(Credentials {
            pid: peer.pid,
            uid: peer.uid,
            gid: peer.gid,
            groups,
            pidfd,
        })
    }

    fn option<T>(&self, option: libc::c_int, value: &mut [T]) -> io::Result<usize> {
        let mut length = libc::socklen_t::try_from(size_of_val(value)).expect("small");
        // SAFETY: the value is a live buffer of the length given, of plain integers.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                value.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(length as usize)
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: plain data, zero is a valid value.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("small");
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "path too long for a unix socket",
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok((
        address,
        libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).expect("small"),
    ))
}

fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one live pollfd; does not block.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// Those of `pidfd_open(2)`; `ESRCH` if there is no such process.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).expect("a descriptor");
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is a descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the process of a pidfd has ended.
#[must_use]
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    is_readable(pidfd.as_raw_fd())
}

fn status(id: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{id}/status")).ok()
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = status.lines();
    lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// A field of `/proc/PID/status`.
fn status_field(id: i32, name: &str) -> Option<String> {
    field(&status(id)?, name).map(str::to_owned)
}

/// Effective capabilities of a process as the kernel's bit mask, if they are its own doing; none
/// if they are not to be had, or the process is gone.
///
/// It has become this user by itself, and connected as this user; but since then it may have
/// executed a set-user-ID program, or one with file capabilities, to which others speak that hold
/// the connection. The kernel marks such a program (`AT_SECURE`), and it never loads our library.
/// And those of another user namespace are capabilities over that namespace only.
#[must_use]
pub fn capabilities(pid: i32, uid: u32, gid: u32) -> u64 {
    own_capabilities(pid, uid, gid).unwrap_or(0)
}

fn own_capabilities(pid: i32, uid: u32, gid: u32) -> Option<u64> {
    let status = status(pid)?;
    let capabilities = u64::from_str_radix(field(&status, "CapEff")?, 16).ok()?;
    // Read after the capabilities: it is that of the program that has them, or of a later one.
    let auxiliary = fs::read(format!("/proc/{pid}/auxv")).ok()?;
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/user")).ok();
    let is_own = effective(field(&status, "Uid")?)? == uid
        && effective(field(&status, "Gid")?)? == gid
        && auxiliary_value(&auxiliary, libc::AT_SECURE) == Some(0)
        && namespace(&pid.to_string())? == namespace("self")?;
    is_own.then_some(capabilities)
}

/// Of "real effective saved filesystem".
fn effective(ids: &str) -> Option<u32> {
    ids.split_whitespace().nth(1)?.parse().ok()
}

/// A value of `/proc/PID/auxv` (`getauxval(3)`).
fn auxiliary_value(vector: &[u8], wanted: libc::c_ulong) -> Option<u64> {
    let (words, _) = vector.as_chunks::<8>();
    words
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[key, value]| (u64::from_ne_bytes(*key), u64::from_ne_bytes(*value)))
        .find_map(|(key, value)| (key == wanted).then_some(value))
}

/// How much memory a process may lock, and to whom it counts; `None` if it is gone.
///
/// Not by `prlimit(2)`, which for a process of another user needs `CAP_SYS_RESOURCE`; root of a
/// container often lacks it.
#[must_use]
pub fn memlock(pid: i32) -> Option<Memlock> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?
        .split_whitespace()
        .next()?;
    let limit = match soft {
        "unlimited" => u64::MAX,
        bytes => bytes.parse().ok()?,
    };
    let real = status_field(pid, "Uid")?;
    let uid = real.split_whitespace().next()?.parse().ok()?;
    Some(Memlock { uid, limit })
}

/// Whether a process reads the same time as this one: whether they are in one time namespace.
#[must_use]
pub fn shares_clock(pid: i32) -> bool {
    let namespace = |process: &str| fs::metadata(format!("/proc/{process}/ns/time"));
    match (namespace(&pid.to_string()), namespace("self")) {
        (Ok(theirs), Ok(ours)) => theirs.ino() == ours.ino(),
        // Kernels without time namespaces have no such files.
        (Err(_), Err(_)) => true,
        _ => false,
    }
}

/// The process that a thread belongs to.
#[must_use]
pub fn process_of(thread: i32) -> Option<i32> {
    status_field(thread, "Tgid")?.parse().ok()
}

/// Whether a process maps a segment's memory: for processes that no userfaultfd watches.
#[must_use]
pub fn maps_segments(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("/memfd:migshm"))
}

/// The parent of a process.
#[must_use]
pub fn parent_of(pid: i32) -> Option<i32> {
    status_field(pid, "PPid")?.parse().ok()
}

/// The word at an address of a process; `None` if it is gone, or has nothing there.
#[must_use]
pub fn word_at(pid: i32, address: u64) -> Option<u64> {
    let mut word = 0u64;
    let local = libc::iovec {
        iov_base: (&raw mut word).cast(),
        iov_len: size_of::<u64>(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: size_of::<u64>(),
    };
    // SAFETY: `local` is a live word; the kernel checks `remote`.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    (usize::try_from(read) == Ok(size_of::<u64>())).then_some(word)
}

/// A number that nobody can guess, and not 0.
#[must_use]
pub fn secret() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: a live buffer of that length; so few bytes come whole once the system is up.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_ne_bytes(bytes) | 1
}
