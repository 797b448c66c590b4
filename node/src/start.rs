//! A daemon's beginning and end: its directory, who may start it, when it goes.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use migshm_protocol::local::{LOCK, SOCKET};

use crate::local::Socket;

/// The write end of a pipe on which whoever started the daemon waits: `+` says that it serves,
/// anything else why it cannot.
pub struct Ready(Option<File>);

impl Ready {
    /// Takes over an inherited descriptor.
    #[must_use]
    pub fn new(fd: Option<i32>) -> Ready {
        // SAFETY: the command line says that this descriptor was passed for this use.
        Ready(fd.map(|fd| unsafe { File::from_raw_fd(fd) }))
    }

    /// Tells that the daemon serves, or why not; then nobody waits any more.
    pub fn tell(&mut self, outcome: Result<(), String>) {
        if let Some(mut pipe) = self.0.take() {
            let text = outcome.err().unwrap_or_else(|| "+".to_owned());
            // Whoever waited may be gone.
            let _ = pipe.write_all(text.as_bytes());
        }
    }
}

/// Makes the runtime directory if it is not there.
///
/// # Errors
/// Those of `mkdir(2)`; `PermissionDenied` if it belongs to another user, who could put another
/// socket in our place.
pub fn runtime_directory(path: &Path) -> io::Result<()> {
    // Other users may look up the socket below a directory of root, nobody's else.
    let mode = if is_for_all_users() { 0o755 } else { 0o700 };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)?;
    if fs::metadata(path)?.uid() == user() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the directory belongs to another user",
        ))
    }
}

/// Whether this daemon serves all users, and not only the one it runs as.
#[must_use]
pub fn is_for_all_users() -> bool {
    user() == 0
}

/// Whether a user may tell this daemon what to do.
#[must_use]
pub fn may_command(uid: u32) -> bool {
    uid == 0 || uid == user()
}

fn user() -> u32 {
    // SAFETY: geteuid cannot fail.
    unsafe { libc::geteuid() }
}

/// The lock under which a daemon starts listening and stops.
pub struct Lock(File);

impl Lock {
    /// Waits for the lock of a runtime directory. A shim that starts a daemon holds it until the
    /// daemon is ready, so a daemon that was started that way does not take it.
    ///
    /// # Errors
    /// Those of `open(2)` and `flock(2)`.
    pub fn take(directory: &Path) -> io::Result<Lock> {
        Lock::with(directory, libc::LOCK_EX)
    }

    /// Takes the lock if nobody has it.
    ///
    /// # Errors
    /// `WouldBlock` if somebody has, else those of [`Lock::take`].
    pub fn try_take(directory: &Path) -> io::Result<Lock> {
        Lock::with(directory, libc::LOCK_EX | libc::LOCK_NB)
    }

    fn with(directory: &Path, how: libc::c_int) -> io::Result<Lock> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            // Whoever can open it can lock it, for ever.
            .mode(0o600)
            .open(directory.join(LOCK))?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        // SAFETY: plain flock on an owned descriptor.
        if unsafe { libc::flock(file.as_raw_fd(), how) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Lock(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // SAFETY: plain flock on an owned descriptor.
        unsafe { libc::flock(self.0.as_raw_fd(), libc::LOCK_UN) };
    }
}

/// Listens in a runtime directory.
///
/// # Errors
/// `AddrInUse` if a daemon listens there already, else those of `bind(2)`.
pub fn listen(directory: &Path) -> io::Result<Socket> {
    let path = directory.join(SOCKET);
    if Socket::is_served(&path) {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another node daemon serves this directory",
        ));
    }
    Socket::listen(&path)
}

/// Keeps the buffers of frames, which come and go all the time, from being given back to the kernel
/// and got from it, zeroed, again.
pub fn keep_memory() {
    const LARGEST_BUFFER: libc::c_int = 1 << 20;
    const SPARE: libc::c_int = 16 << 20;
    // SAFETY: plain integers. (A C library that knows of neither does nothing.)
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_BUFFER);
        libc::mallopt(libc::M_TRIM_THRESHOLD, SPARE);
    }
}

/// Lets this process have as many descriptors as it may: several for each local process.
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a live rlimit structure.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// How many descriptors this process may have open.
#[must_use]
pub fn descriptor_limit() -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a live rlimit structure.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

/// Bytes of this machine's memory.
#[must_use]
pub fn physical_memory() -> u64 {
    // SAFETY: plain integers.
    let (pages, size) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(size).unwrap_or(0)
}
