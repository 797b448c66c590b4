//! One daemon takes the place of another, and nobody notices: `migshm upgrade` has a daemon become the
//! program that its own file is now, in the same process.
//!
//! All that the node is ([`Node`]) is plain data and descriptors. An `exec` keeps descriptors, so
//! that userfaultfds, segments and the connections of processes stay what they are, under the same
//! numbers; the data lies in a memfd meanwhile. What a process or the kernel says in between waits in
//! its socket or userfaultfd, what the coordinator says in its session. Links to other nodes have no
//! session. So both sides of each end what they say first, and have it all:
//!
//! ```text
//! leaving ──end──▶ other    from now on it keeps what it has to say
//!         ◀──end── other    and so does the other one: nothing is on its way any more
//! exec
//! next    ◀─link─▶ other    as between any two nodes; what was kept goes out
//! ```
//!
//! Meanwhile everything else goes on; nothing but the exec itself makes anybody wait.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use migshm_protocol::call::Caller;
use migshm_protocol::codec;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::daemon::{Again, Connection, ConnectionId, Node, Shared};
use crate::local::{Sender, Socket};
use crate::membership::Terms;
use crate::tasks;

/// Tells layouts of what is handed over apart: to be raised with each change of any of it.
const FORMAT: u32 = 1;

/// The option that names the memfd to the next program; it is followed by the descriptor's number.
const OPTION: &str = "--handover-fd";
/// The option that names a pipe on which only the first program tells that it serves.
const READY: &str = "--ready-fd";

/// First in the memfd, in every format.
#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    /// The program that has written this, should the next one not know the format.
    program: RawFd,
    /// Whether the next one does not.
    refused: bool,
    /// Bytes that follow.
    length: u64,
}

/// Bytes of an encoded [`Header`], at most.
const HEADER_ROOM: usize = 32;

/// What the next daemon begins with.
#[derive(Deserialize)]
pub struct Estate {
    /// The node.
    pub node: Node,
    /// Its connections.
    pub connections: Vec<Heir>,
    /// Where processes connect.
    pub listener: Socket,
    /// How to go on with the coordinator, in a cluster.
    pub terms: Option<Terms>,
}

/// As [`Estate`].
#[derive(Serialize)]
struct Leaving<'a> {
    node: &'a Node,
    connections: Vec<LeavingConnection<'a>>,
    listener: &'a Socket,
    terms: Option<&'a Terms>,
}

/// A connection of a local process.
#[derive(Deserialize)]
pub struct Heir {
    id: ConnectionId,
    socket: Socket,
    user: u32,
    caller: Option<Caller>,
    greeter: Sender,
    call: Option<(u64, u64)>,
    again: Option<Again>,
}

/// As [`Heir`].
#[derive(Serialize)]
struct LeavingConnection<'a> {
    id: ConnectionId,
    socket: &'a Socket,
    user: u32,
    caller: &'a Option<Caller>,
    greeter: Sender,
    call: Option<(u64, u64)>,
    again: &'a Option<Again>,
}

/// The file of this program, to be found out when it begins: what is there later takes its place.
///
/// # Errors
/// Those of `readlink(2)`.
pub fn own_program() -> io::Result<PathBuf> {
    const GONE: &[u8] = b" (deleted)";
    let path = std::env::current_exe()?;
    let mut path = OsString::from(path).into_vec();
    if path.ends_with(GONE) {
        path.truncate(path.len() - GONE.len());
    }
    Ok(OsString::from_vec(path).into())
}

/// Ends all links to other nodes; returns when nothing is on its way on any. What is to be said to them
/// is kept from then on.
pub async fn leave_peers(node: &Shared) {
    let unlinked = {
        let mut node = node.borrow_mut();
        node.is_leaving = true;
        node.end_links();
        Rc::clone(&node.unlinked)
    };
    loop {
        let changed = unlinked.notified();
        if node.borrow().links == 0 {
            return;
        }
        changed.await;
    }
}

/// Becomes another program, which goes on with all that this one has; links to other nodes have to have
/// been ended. Returns why that cannot be.
pub fn exec(
    node: &mut Node,
    listener: &Socket,
    terms: Option<&Terms>,
    program: &Path,
) -> io::Error {
    node.settle();
    node.upgrades += 1;
    let error = match hand_over(node, listener, terms) {
        Ok((memory, _own)) => execute(program, memory.as_raw_fd()),
        Err(error) => error,
    };
    node.upgrades -= 1;
    error
}

/// Puts into memory what the next program needs; also gives this program's file. All descriptors that
/// are handed over outlive an exec from now on.
fn hand_over(node: &Node, listener: &Socket, terms: Option<&Terms>) -> io::Result<(File, File)> {
    let connections = node.connections.iter();
    let leaving = Leaving {
        node,
        connections: connections
            .map(|(id, c)| LeavingConnection::of(*id, c))
            .collect(),
        listener,
        terms,
    };
    let body = codec::encode_stored(&leaving).map_err(io::Error::other)?;
    let program = File::open("/proc/self/exe")?;
    let header = Header {
        format: FORMAT,
        program: program.as_raw_fd(),
        refused: false,
        length: body.len() as u64,
    };
    let mut start = [0; HEADER_ROOM];
    codec::encode_into(&header, &mut start).map_err(io::Error::other)?;
    // SAFETY: the name is a C string; returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"migshm handover".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is a descriptor that nothing else owns.
    let mut memory = unsafe { File::from_raw_fd(fd) };
    memory.write_all(&start)?;
    memory.write_all(&body)?;
    keep_open(program.as_raw_fd(), true)?;
    keep_open(memory.as_raw_fd(), true)?;
    Ok((memory, program))
}

/// Takes over what a program before this one has left behind a descriptor. If that had another format,
/// that program goes on. Also tells whether this one is that program.
///
/// # Errors
/// It cannot be read, and nobody can go on.
pub fn take(fd: RawFd) -> io::Result<(Estate, bool)> {
    keep_open(fd, false)?;
    // SAFETY: the command line says that this descriptor was passed for this use.
    let mut memory = unsafe { File::from_raw_fd(fd) };
    memory.rewind()?;
    let mut start = [0; HEADER_ROOM];
    memory.read_exact(&mut start)?;
    let (mut header, _) = codec::decode::<Header>(&start).map_err(io::Error::other)?;
    if header.format != FORMAT {
        if header.refused {
            return Err(io::Error::other("no program knows its format"));
        }
        tracing::error!(
            theirs = header.format,
            ours = FORMAT,
            "cannot take over from this version of migshm: that goes on"
        );
        header.refused = true;
        codec::encode_into(&header, &mut start).map_err(io::Error::other)?;
        memory.rewind()?;
        memory.write_all(&start)?;
        keep_open(fd, true)?;
        let former = format!("/proc/self/fd/{}", header.program);
        return Err(execute(Path::new(&former), fd));
    }
    // SAFETY: the former program has passed this descriptor for this use.
    drop(unsafe { OwnedFd::from_raw_fd(header.program) });
    let mut body = Vec::new();
    memory.read_to_end(&mut body)?;
    if body.len() as u64 != header.length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let estate = codec::decode_stored(&body).map_err(io::Error::other)?;
    Ok((estate, header.refused))
}

/// Executes a program with the arguments of this one; returns why that cannot be.
fn execute(program: &Path, memory: RawFd) -> io::Error {
    let terminated = |word: OsString| CString::new(word.into_vec()).expect("came from C");
    let mut arguments = Vec::new();
    let mut given = std::env::args_os();
    while let Some(argument) = given.next() {
        if argument == OPTION || argument == READY {
            given.next();
        } else {
            arguments.push(terminated(argument));
        }
    }
    arguments.push(terminated(OPTION.into()));
    arguments.push(terminated(memory.to_string().into()));
    let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let program = terminated(program.into());
    // SAFETY: a C string, and a list of C strings that a null pointer ends.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}

fn keep_open(fd: RawFd, on: bool) -> io::Result<()> {
    let flags = if on { 0 } else { libc::FD_CLOEXEC };
    // SAFETY: plain fcntl; fails if there is no such descriptor.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl<'a> LeavingConnection<'a> {
    fn of(id: ConnectionId, connection: &'a Connection) -> Self {
        LeavingConnection {
            id,
            socket: connection.socket.get_ref(),
            user: connection.user,
            caller: &connection.caller,
            greeter: connection.greeter,
            call: connection.call,
            again: &connection.again,
        }
    }
}

/// Has the tasks of a node that was taken over wait for what its processes and the kernel say.
///
/// # Errors
/// Those of `epoll_ctl(2)`.
pub fn attend(node: &Shared, connections: Vec<Heir>) -> io::Result<()> {
    for heir in connections {
        let socket: Rc<AsyncFd<Socket>> = Rc::new(tasks::watch(heir.socket)?);
        let task = tasks::serve(node, heir.id, &socket);
        let connection = Connection {
            socket,
            task,
            user: heir.user,
            caller: heir.caller,
            greeter: heir.greeter,
            call: heir.call,
            again: heir.again,
        };
        node.borrow_mut().connections.insert(heir.id, connection);
    }
    let mut node = node.borrow_mut();
    let Node {
        exits, processes, ..
    } = &*node;
    for (pid, process) in processes {
        exits.watch(*pid, &process.pidfd)?;
    }
    let spaces: Vec<_> = node.spaces.keys().copied().collect();
    for space in spaces {
        let watcher = tasks::watch_space(&node, space);
        if let Some(resident) = node.spaces.get_mut(&space) {
            resident.watcher = watcher;
        }
    }
    Ok(())
}

/// Descriptors as numbers, which an exec keeps.
pub mod descriptor {
    use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::keep_open;

    /// Has the descriptor outlive an exec.
    ///
    /// # Errors
    /// Those of `fcntl(2)`.
    pub fn serialize<T: AsFd, S: Serializer>(
        descriptor: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        number(descriptor)?.serialize(serializer)
    }

    /// Takes over the descriptor.
    ///
    /// # Errors
    /// Those of `fcntl(2)`.
    pub fn deserialize<'de, T: From<OwnedFd>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        owned(RawFd::deserialize(deserializer)?)
    }

    fn number<T: AsFd, E: serde::ser::Error>(descriptor: &T) -> Result<RawFd, E> {
        let fd = descriptor.as_fd().as_raw_fd();
        keep_open(fd, true).map_err(E::custom)?;
        Ok(fd)
    }

    fn owned<T: From<OwnedFd>, E: serde::de::Error>(fd: RawFd) -> Result<T, E> {
        keep_open(fd, false).map_err(E::custom)?;
        // SAFETY: it is open, and the former program has passed it for this use.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
    }

    /// One that may not be there.
    pub mod optional {
        use super::*;

        /// As [`super::serialize`].
        ///
        /// # Errors
        /// As there.
        pub fn serialize<T: AsFd, S: Serializer>(
            descriptor: &Option<T>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            let fd = descriptor.as_ref().map(number).transpose()?;
            fd.serialize(serializer)
        }

        /// As [`super::deserialize`].
        ///
        /// # Errors
        /// As there.
        pub fn deserialize<'de, T: From<OwnedFd>, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<T>, D::Error> {
            Option::<RawFd>::deserialize(deserializer)?
                .map(owned)
                .transpose()
        }
    }
}
