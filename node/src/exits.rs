//! The ends of processes.
//!
//! All pidfds are in one epoll instance. A task waits for it; and every call looks at it first, so
//! that whoever has seen a process end (`waitpid`) finds its attaches counted off and its undo
//! done, as in the kernel. So that whoever he then tells on another node finds the same, the
//! library asks after each `waitpid` whether the coordinator has [confirmed](Confirmations) all
//! ends so far.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::daemon::ConnectionId;

/// Watches processes.
#[derive(Debug)]
pub struct Exits(OwnedFd);

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

/// Which ends of processes the coordinator has been told and has not confirmed, and who waits for
/// that. Each has the id of its request, and these ascend.
#[derive(Debug, Default)]
pub struct Confirmations {
    ends: BTreeSet<u64>,
    waiting: VecDeque<(u64, ConnectionId)>,
}

impl Confirmations {
    /// The coordinator is told of an end.
    pub fn tell(&mut self, id: u64) {
        self.ends.insert(id);
    }

    /// Those that are not confirmed.
    pub fn ends(&self) -> impl Iterator<Item = u64> {
        self.ends.iter().copied()
    }

    /// Somebody wants all ends before `id` confirmed. False if they are.
    pub fn wait(&mut self, id: u64, connection: ConnectionId) -> bool {
        let waits = !self.ends.is_empty();
        if waits {
            self.waiting.push_back((id, connection));
        }
        waits
    }

    /// An end is confirmed, if `id` is that of one. Those who need not wait any longer are left
    /// for [`Confirmations::done`].
    pub fn confirm(&mut self, id: u64) -> bool {
        self.ends.remove(&id)
    }

    /// Who need not wait any longer.
    pub fn done(&mut self) -> Option<(u64, ConnectionId)> {
        let (id, _) = self.waiting.front()?;
        let waits = self.ends.first().is_some_and(|end| end < id);
        if waits {
            None
        } else {
            self.waiting.pop_front()
        }
    }
}

impl AsRawFd for Exits {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_waits_for_the_ends_before_and_for_no_others() {
        let mut confirmations = Confirmations::default();
        assert!(!confirmations.wait(1, ConnectionId(10)));
        confirmations.tell(2);
        confirmations.tell(3);
        assert!(confirmations.wait(4, ConnectionId(10)));
        confirmations.tell(5);
        assert!(confirmations.wait(6, ConnectionId(11)));
        assert!(confirmations.confirm(2));
        assert!(!confirmations.confirm(4), "no end");
        assert_eq!(confirmations.done(), None);
        assert!(confirmations.confirm(3));
        assert_eq!(confirmations.done(), Some((4, ConnectionId(10))));
        assert_eq!(confirmations.done(), None);
        assert!(confirmations.confirm(5));
        assert_eq!(confirmations.done(), Some((6, ConnectionId(11))));
        assert_eq!(confirmations.done(), None);
    }
}
