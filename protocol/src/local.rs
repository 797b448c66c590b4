//! Shim (or tool) ↔ node daemon, over a `SOCK_SEQPACKET` unix socket.
//!
//! One connection carries one call at a time: a thread that blocks in `semop` keeps its
//! connection, other threads of the process use others. The daemon knows the process from the
//! socket's credentials. Descriptors travel beside the messages (`SCM_RIGHTS`), as noted.

use serde::{Deserialize, Serialize};

use crate::call::{Call, Errno, Outcome};
use crate::ids::NodeId;

/// Version of this link; both sides ship together, so any difference is refused.
pub const LOCAL_VERSION: u32 = 8;

/// File name of the daemon's socket in its runtime directory.
pub const SOCKET: &str = "node.sock";
/// Name of the file that says which coordinator the directory's daemon belonged to, if it was a
/// cluster's.
pub const CLUSTER: &str = "node.cluster";
/// File name of the lock that serialises the start and the end of a daemon.
pub const LOCK: &str = "node.lock";

/// From a process to its node daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToNode {
    /// First on every connection; answered by [`FromNode::Welcome`].
    Hello {
        /// [`LOCAL_VERSION`].
        version: u32,
        /// For a process that was forked where forks are not seen by userfaultfd: its parent's
        /// pid, whose attaches it inherited. 0 otherwise.
        forked_from: i32,
        /// What its anchor page contains, by which the daemon knows whose address space it is;
        /// 0 without an anchor.
        anchor: u64,
    },
    /// The process's userfaultfd (one descriptor, made with `USERFAULTFD_IOC_NEW`) and its
    /// anchor page; once per address space, before its first attach. Answered by
    /// [`FromNode::Answer`] with the same `id`.
    Anchor {
        /// Echoed in the answer.
        id: u64,
        /// Address of the anchor: one private anonymous page, `MADV_WIPEONFORK`, untouched.
        address: u64,
    },
    /// A System V call, with its raw bytes after it. Answered by [`FromNode::Answer`]; that to
    /// `ShmAttach` brings the segment's memfd.
    Call {
        /// Echoed in the answer.
        id: u64,
        /// The call.
        call: Call,
    },
    /// The caller of a blocked call was interrupted or its time is over. The call is answered
    /// all the same: by its own outcome if that came first, else by `errno`.
    Cancel {
        /// The call's id.
        id: u64,
        /// [`Errno::EINTR`] or [`Errno::EAGAIN`].
        errno: Errno,
    },
    /// Where an attach was mapped.
    Mapped {
        /// Of a process that waits for a [`FromNode::Answer`] with the same `id`: it comes when
        /// the mapping is noted, so that children that are forked from then on inherit it, and, if
        /// it is tracked, it may be made accessible; what it covers, or an attach that is given
        /// up, then counts on no node. `None` where a fork can only follow this message, and
        /// nothing is tracked or covered.
        id: Option<u64>,
        /// From [`crate::call::Attachment::attach`].
        attach: u64,
        /// Start of the mapping; 0 if it could not be made, which gives the attach up.
        address: u64,
    },
    /// `shmdt(address)`. Answered by [`FromNode::Detaching`], or by an [`FromNode::Answer`]
    /// with an errno.
    Detach {
        /// Echoed in the answer.
        id: u64,
        /// Start of an attach of this process.
        address: u64,
    },
    /// The mapping of a detach is gone; not answered. Something else may be there by now.
    Unmapped {
        /// From [`FromNode::Detaching`].
        attach: u64,
    },
    /// The program's own `munmap`: nothing is mapped any more in this range, which is reserved
    /// until [`FromNode::Answer`] has come. Attaches of which nothing is left have ended.
    Unmapping {
        /// Echoed in the answer.
        id: u64,
        /// Start of the range.
        address: u64,
        /// Its length in bytes, whole pages.
        length: u64,
    },
    /// The program's own `mremap` is done: attaches may be elsewhere, shorter or longer than
    /// before. Answered by [`FromNode::Answer`] when the daemon has seen what is where.
    Remapped {
        /// Echoed in the answer.
        id: u64,
    },
    /// The program's own `mprotect` is about to permit that a range is written. Answered by
    /// [`FromNode::Permitted`].
    Permitting {
        /// Echoed in the answer.
        id: u64,
        /// Start of the range.
        address: u64,
        /// Its length in bytes, whole pages.
        length: u64,
    },
    /// The sender has seen other processes end (`waitpid(2)`). Answered by [`FromNode::Answer`] when
    /// all nodes see what their ends have changed.
    Reaped {
        /// Echoed in the answer.
        id: u64,
    },
    /// The program that the daemon's file is now is to take its place, and serve this connection too.
    /// For root and the daemon's own user; answered by [`FromNode::Answer`] once that has happened, or
    /// cannot.
    Upgrade {
        /// Echoed in the answer.
        id: u64,
    },
    /// What the daemon counts and knows; answered by [`FromNode::Answer`], JSON after it.
    Status {
        /// Echoed in the answer.
        id: u64,
    },
}

/// From the node daemon to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromNode {
    /// The connection stands.
    Welcome {
        /// The node.
        node: NodeId,
        /// Whether `/dev/userfaultfd` (one descriptor) comes with this message; the process
        /// then anchors its address space before its first attach.
        track: bool,
    },
    /// The connection cannot be: wrong version, or the daemon is not able to serve.
    Refused {
        /// What the program's call returns.
        errno: Errno,
    },
    /// The answer to the request with this id, raw bytes after it.
    Answer {
        /// The request's id.
        id: u64,
        /// How it ended.
        outcome: Outcome,
    },
    /// What `mprotect` may do.
    Permitted {
        /// The request's id.
        id: u64,
        /// Address of the first byte in the range of an attach that was made to read only
        /// (`SHM_RDONLY`), which never becomes writable; the end of the range if there is none.
        until: u64,
    },
    /// `shmdt` may unmap; it then says [`ToNode::Unmapped`].
    Detaching {
        /// The request's id.
        id: u64,
        /// The attach.
        attach: u64,
        /// What is left of it.
        pieces: Pieces,
    },
}

/// Runs of an attach's pages: the index of the first and how many; those of none mean nothing.
/// Those that do not fit are not listed: they stay an attach, as what was moved away does.
pub type Pieces = [(u32, u32); 16];
