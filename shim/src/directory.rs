//! Where this process finds its node daemon: the runtime directory.
//!
//! 1. `$MIGSHM_RUNTIME_DIR`, an absolute path;
//! 2. else `/run/migshm`, if a daemon listens there;
//! 3. else, for root, `/run/migshm`; for others `$XDG_RUNTIME_DIR/migshm` or `/tmp/migshm-UID`,
//!    which must be a directory that only that user can write to.
//!
//! The choice is made at the first call and kept, also in fork children: a program that changes
//! its user or its environment stays on its node.

use std::fmt::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

use migshm_protocol::call::Errno;
use migshm_protocol::local::{LOCK, SOCKET};
use once_cell::race::OnceNonZeroUsize;

use crate::complain::{complain, describe};
use crate::kernel::kernel;
use crate::sys;
use crate::text::Text;

/// Bytes of a path in the runtime directory: what a socket's address holds.
const PATH_MAX: usize = 108;

const SYSTEM: &[u8] = b"/run/migshm";

/// Address of the [`RuntimeDir`] that was chosen, in memory that is never unmapped.
static CHOSEN: OnceNonZeroUsize = OnceNonZeroUsize::new();

/// A runtime directory.
#[derive(Clone, Copy)]
pub struct RuntimeDir {
    path: Text<PATH_MAX>,
    /// Whether others must not be able to write to it.
    private: bool,
}

impl RuntimeDir {
    /// This process's runtime directory.
    ///
    /// # Errors
    /// `ENOSYS`, after a complaint.
    pub fn choose() -> Result<RuntimeDir, Errno> {
        if let Some(address) = CHOSEN.get() {
            // SAFETY: `keep` has put a `RuntimeDir` there for good.
            return Ok(unsafe { *(address.get() as *const RuntimeDir) });
        }
        if let Some(path) = sys::env(c"MIGSHM_RUNTIME_DIR") {
            if !path.to_bytes().starts_with(b"/") {
                return Err(complain(format_args!(
                    "MIGSHM_RUNTIME_DIR must be an absolute path"
                )));
            }
            return RuntimeDir::new(path.to_bytes(), false);
        }
        let system = RuntimeDir::new(SYSTEM, false)?;
        let (user, _) = sys::effective_user();
        if user == 0 || system.connect().is_ok() {
            return Ok(system);
        }
        let mut path = Text::<PATH_MAX>::new();
        // Too long a path is noticed in `new`.
        let _ = match sys::env(c"XDG_RUNTIME_DIR") {
            Some(base) => {
                path.push(base.to_bytes());
                path.write_str("/migshm")
            }
            None => write!(path, "/tmp/migshm-{user}"),
        };
        RuntimeDir::new(path.as_bytes(), true)
    }

    /// Keeps this choice for the life of the process; called once a daemon has answered there.
    pub fn keep(&self) {
        if CHOSEN.get().is_some() {
            return;
        }
        let Ok(memory) = sys::map_private(size_of::<RuntimeDir>()) else {
            return;
        };
        // SAFETY: the memory is ours, page-aligned and large enough.
        unsafe { memory.cast::<RuntimeDir>().write(*self) };
        let address = (memory as usize).try_into().expect("mmap gives no null");
        if CHOSEN.set(address).is_err() {
            sys::unmap(memory, size_of::<RuntimeDir>());
        }
    }

    pub fn path(&self) -> &Text<PATH_MAX> {
        &self.path
    }

    /// Path of a file in the directory.
    pub fn file(&self, name: &str) -> Text<PATH_MAX> {
        self.path.with(b"/").with(name.as_bytes())
    }

    /// Connects to the daemon's socket.
    pub fn connect(&self) -> Result<OwnedFd, Errno> {
        // SAFETY: plain numbers.
        let socket = sys::own(unsafe {
            kernel!(
                SYS_socket,
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
                0
            )
        })?;
        let path = self.file(SOCKET);
        let mut address = libc::sockaddr_un {
            sun_family: libc::AF_UNIX as u16,
            sun_path: [0; PATH_MAX],
        };
        for (to, from) in address.sun_path.iter_mut().zip(path.as_bytes()) {
            *to = *from as libc::c_char;
        }
        let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        loop {
            // SAFETY: a valid address of that length.
            let connected =
                unsafe { kernel!(SYS_connect, socket.as_raw_fd(), &raw const address, length) };
            match connected {
                Ok(_) => return Ok(socket),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Makes the directory if it is not there.
    ///
    /// # Errors
    /// `ENOSYS`, after a complaint, if it cannot be made or is not to be trusted.
    pub fn prepare(&self) -> Result<(), Errno> {
        // Other users may look up the socket in a directory of root, nobody else's.
        let mode = match sys::effective_user() {
            (0, _) => 0o755,
            _ => 0o700,
        };
        // SAFETY: a C string.
        match unsafe { kernel!(SYS_mkdir, self.path.as_c_str().as_ptr(), mode) } {
            Ok(_) | Err(Errno::EEXIST) => {}
            Err(errno) => {
                return Err(complain(format_args!(
                    "cannot make {}: {}; set MIGSHM_RUNTIME_DIR to a directory that can be written",
                    self.path,
                    describe(errno)
                )));
            }
        }
        if self.private && !self.is_own() {
            return Err(complain(format_args!(
                "{} can be written by other users; set MIGSHM_RUNTIME_DIR to a directory of your own",
                self.path
            )));
        }
        Ok(())
    }

    /// Takes the lock that serialises the start and the end of daemons.
    pub fn lock(&self) -> Result<Lock, Errno> {
        let path = self.file(LOCK);
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC | libc::O_NOFOLLOW;
        let file = sys::open(path.as_c_str(), flags)?;
        loop {
            // SAFETY: plain numbers.
            match unsafe { kernel!(SYS_flock, file.as_raw_fd(), libc::LOCK_EX) } {
                Ok(_) => return Ok(Lock(file)),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn new(path: &[u8], private: bool) -> Result<RuntimeDir, Errno> {
        let dir = RuntimeDir {
            path: Text::new().with(path),
            private,
        };
        if dir.path.is_truncated() || dir.file(SOCKET).is_truncated() {
            return Err(complain(format_args!(
                "the runtime directory's path is too long: {}",
                dir.path
            )));
        }
        Ok(dir)
    }

    /// Whether it is a directory (not a link to one) that belongs to the effective user and that
    /// no one else can write to.
    fn is_own(&self) -> bool {
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: a C string and a valid out pointer, initialised if the call succeeds.
        let stat = unsafe {
            let path = self.path.as_c_str().as_ptr();
            if kernel!(SYS_lstat, path, stat.as_mut_ptr()).is_err() {
                return false;
            }
            stat.assume_init()
        };
        let (user, _) = sys::effective_user();
        stat.st_mode & libc::S_IFMT == libc::S_IFDIR
            && stat.st_uid == user
            && stat.st_mode & 0o022 == 0
    }
}

/// The lock of a runtime directory, held until dropped.
pub struct Lock(OwnedFd);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would not do: a child forked meanwhile has a copy of the descriptor.
        // SAFETY: plain numbers.
        let _ = unsafe { kernel!(SYS_flock, self.0.as_raw_fd(), libc::LOCK_UN) };
    }
}
