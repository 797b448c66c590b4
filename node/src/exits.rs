//! The ends of processes.
//!
//! All pidfds are in one epoll instance. A task waits for it; and every call looks at it first, so
//! that whoever has seen a process end (`waitpid`) finds its attaches counted off and its undo
//! done, as in the kernel. So that whoever he then tells on another node finds the same, the
//! library asks after each `waitpid` that the coordinator confirm all ends so far.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Watches processes. Handed over, it watches none.
#[derive(Debug)]
pub struct Exits(OwnedFd);

impl Serialize for Exits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

impl<'de> Deserialize<'de> for Exits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <()>::deserialize(deserializer)?;
        Exits::new().map_err(D::Error::custom)
    }
}

impl Exits {
    /// Watches none yet.
    ///
    /// # Errors
    /// Those of `epoll_create1(2)`.
    pub fn new() -> io::Result<Exits> {
        // SAFETY: returns a new descriptor or -1.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a descriptor that nothing else owns.
        Ok(Exits(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches a process until its pidfd is closed.
    ///
    /// # Errors
    /// Those of `epoll_ctl(2)`.
    pub fn watch(&self, pid: i32, pidfd: &OwnedFd) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN.cast_unsigned(),
            u64: u64::from(pid.cast_unsigned()),
        };
        // SAFETY: open descriptors and a live event.
        let result = unsafe {
            libc::epoll_ctl(
                self.0.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                pidfd.as_raw_fd(),
                &raw mut event,
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// A process that has ended; the same until its pidfd is closed.
    #[must_use]
    pub fn ended(&self) -> Option<i32> {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event; does not block.
        let count = unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut event, 1, 0) };
        let pid = event.u64;
        (count == 1).then(|| i32::try_from(pid).expect("a pid"))
    }
}

impl AsRawFd for Exits {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
