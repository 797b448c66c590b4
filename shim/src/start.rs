//! Connects to the node daemon, and starts it if there is none.
//!
//! Whoever finds no daemon takes the runtime directory's lock, looks again, and starts one; it
//! holds the lock until the daemon says through a pipe that it listens. So of many processes that
//! start at once one starts a daemon and the others connect to it.
//!
//! The program must not notice that it has had a child:
//!
//! ```text
//! program ──clone, exit signal 0──▶ intermediate ──clone──▶ grandchild ──execve──▶ migshm node
//!            waits for it by pid      exits at once           adopted by init
//! ```
//!
//! Exit signal 0 means no `SIGCHLD`, and that the program's own `wait` passes the intermediate by
//! (it sees such children only with `__WALL` or `__WCLONE`). Both clones share the program's
//! memory and stop their creator until they are done with it (`CLONE_VM | CLONE_VFORK`), so
//! nothing is copied and no fork handler runs; they run on stacks of their own with all signals
//! blocked, and make nothing but system calls.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use migshm_protocol::call::Errno;

use crate::complain::{complain, describe};
use crate::directory::RuntimeDir;
use crate::kernel::kernel;
use crate::sys;
use crate::text::Text;

/// What to do if no daemon listens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// Start one.
    Start,
    /// Fail, silently.
    Fail,
}

/// Time a daemon has to say that it listens, in milliseconds.
const READY_TIMEOUT: c_int = 30_000;

/// Stack of each of the two children, in bytes.
const STACK: usize = 64 * 1024;

/// Descriptor on which the daemon says that it is ready.
const READY_FD: RawFd = 3;

/// Bytes of the program's path.
const PROGRAM_MAX: usize = 1024;

/// Connects to this process's daemon.
///
/// # Errors
/// `ENOSYS`, after a complaint unless `absent` is `Fail`.
pub fn connect(absent: Absent) -> Result<OwnedFd, Errno> {
    let dir = RuntimeDir::choose()?;
    let socket = match dir.connect() {
        Err(errno) if absent == Absent::Fail => return Err(errno),
        Err(errno) if nobody_listens(errno) => start(&dir)?,
        connected => connected.map_err(|errno| cannot_connect(&dir, errno))?,
    };
    dir.keep();
    Ok(socket)
}

/// Starts a daemon, unless another process has done so meanwhile, and connects to it.
fn start(dir: &RuntimeDir) -> Result<OwnedFd, Errno> {
    dir.prepare()?;
    let _lock = dir.lock().map_err(|errno| cannot_connect(dir, errno))?;
    match dir.connect() {
        Err(errno) if nobody_listens(errno) => {}
        connected => return connected.map_err(|errno| cannot_connect(dir, errno)),
    }
    let program = program()?;
    let (ready, ready_end) = pipe()?;
    if let Err(errno) = launch(&program, dir, ready_end) {
        return Err(complain(format_args!(
            "cannot start {program}: {}; start `migshm node` by hand, or set MIGSHM_BIN to the migshm program",
            describe(errno)
        )));
    }
    match obstacle(&ready) {
        None => dir.connect().map_err(|errno| cannot_connect(dir, errno)),
        Some(reason) => Err(complain(format_args!(
            "{program} node did not start: {reason}; see {}",
            dir.file("node.log")
        ))),
    }
}

/// There is no socket, or one that a dead daemon left.
fn nobody_listens(errno: Errno) -> bool {
    matches!(errno.0, libc::ENOENT | libc::ECONNREFUSED)
}

fn cannot_connect(dir: &RuntimeDir, errno: Errno) -> Errno {
    complain(format_args!(
        "cannot use the node daemon in {}: {}; see `migshm node --help` for runtime directories",
        dir.path(),
        describe(errno)
    ))
}

/// The daemon's program: `$MIGSHM_BIN`, else `migshm` beside this library.
fn program() -> Result<Text<PROGRAM_MAX>, Errno> {
    let path = match sys::env(c"MIGSHM_BIN") {
        Some(path) => Text::new().with(path.to_bytes()),
        None => beside_library().unwrap_or(Text::new()),
    };
    if path.as_bytes().is_empty() || path.is_truncated() {
        return Err(complain(format_args!(
            "cannot tell where the migshm program is; set MIGSHM_BIN to its path"
        )));
    }
    Ok(path)
}

/// Path of `migshm` in the folder that this library was loaded from.
fn beside_library() -> Option<Text<PROGRAM_MAX>> {
    let library = library()?.to_bytes();
    let name = library
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |slash| slash + 1);
    Some(Text::new().with(&library[..name]).with(b"migshm"))
}

/// Path that this library was loaded from.
pub fn library() -> Option<&'static CStr> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    let own_symbol = connect as fn(Absent) -> _ as *const c_void;
    // SAFETY: `info` is a valid out pointer, filled if the result is not 0, with a path that lives
    // as long as the library is loaded.
    unsafe {
        (libc::dladdr(own_symbol, info.as_mut_ptr()) != 0)
            .then(|| CStr::from_ptr(info.assume_init().dli_fname))
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut ends = [-1; 2];
    // SAFETY: room for two descriptors, which are new.
    unsafe {
        kernel!(SYS_pipe2, ends.as_mut_ptr(), libc::O_CLOEXEC)?;
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// Waits until the daemon says `+`; else gives the reason that it gives.
fn obstacle(ready: &OwnedFd) -> Option<Text<256>> {
    let mut said = Text::<256>::new();
    loop {
        let mut poll = libc::pollfd {
            fd: ready.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut bytes = [0_u8; 256];
        // SAFETY: valid out pointers of the lengths given.
        let count = unsafe {
            match kernel!(SYS_poll, &raw mut poll, 1, READY_TIMEOUT) {
                Ok(0) => return Some(said.with(b"it does not answer")),
                Err(_) => continue,
                Ok(_) => kernel!(SYS_read, ready.as_raw_fd(), bytes.as_mut_ptr(), bytes.len()),
            }
        };
        match count {
            Ok(0) if said.as_bytes().is_empty() => return Some(said.with(b"it ended")),
            Ok(0) => return Some(said),
            Err(Errno::EINTR) => {}
            Err(errno) => return Some(said.with(describe(errno).as_bytes())),
            Ok(_) if said.as_bytes().is_empty() && bytes[0] == b'+' => return None,
            Ok(count) => {
                // One line on stderr, so no line ends within.
                let bytes = &mut bytes[..count];
                bytes
                    .iter_mut()
                    .filter(|byte| **byte == b'\n')
                    .for_each(|byte| *byte = b' ');
                said.push(bytes.trim_ascii_end());
            }
        }
    }
}

/// All that the children need, prepared before they exist.
struct Launch {
    program: *const c_char,
    arguments: [*const c_char; 8],
    environment: *const *const c_char,
    null: RawFd,
    log: RawFd,
    ready: RawFd,
    /// Top of the grandchild's stack.
    stack: *mut c_void,
    /// Why there is no daemon; 0 if there is.
    errno: AtomicI32,
}

/// Runs the daemon's program; returns when it has been executed.
fn launch(program: &Text<PROGRAM_MAX>, dir: &RuntimeDir, ready: OwnedFd) -> Result<(), Errno> {
    let open = |path: &CStr, flags| sys::open(path, flags | libc::O_CLOEXEC).map(sys::move_high);
    let null = open(c"/dev/null", libc::O_RDWR)?;
    let log_path = dir.file("node.log");
    let log = open(
        log_path.as_c_str(),
        libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_NOFOLLOW,
    )?;
    // High, so that none of them is one of the numbers that the grandchild assigns.
    let ready = sys::move_high(ready);

    let memory = Memory::map(environment().count())?;
    memory.fill_environment();
    let launch = Launch {
        program: program.as_c_str().as_ptr(),
        arguments: [
            program.as_c_str().as_ptr(),
            c"node".as_ptr(),
            c"--autostart".as_ptr(),
            c"--runtime-dir".as_ptr(),
            dir.path().as_c_str().as_ptr(),
            c"--ready-fd".as_ptr(),
            c"3".as_ptr(),
            ptr::null(),
        ],
        environment: memory.environment(),
        null: null.as_raw_fd(),
        log: log.as_raw_fd(),
        ready: ready.as_raw_fd(),
        stack: memory.stack_top(1),
        errno: AtomicI32::new(0),
    };

    let _signals = sys::SignalsBlocked::new();
    let shared = libc::CLONE_VM | libc::CLONE_VFORK;
    // SAFETY: the child runs on memory of its own while this thread is stopped, and leaves only
    // `launch.errno` changed.
    let child = sys::check(unsafe {
        libc::clone(
            intermediate,
            memory.stack_top(0),
            shared,
            (&raw const launch).cast_mut().cast(),
        )
    })?;
    // SAFETY: reaps this child and no other; should the program have done so, nothing is left to do.
    while unsafe { kernel!(SYS_wait4, child, 0, libc::__WALL, 0) } == Err(Errno::EINTR) {}
    match launch.errno.load(Ordering::Relaxed) {
        0 => Ok(()),
        errno => Err(Errno(errno)),
    }
}

/// Creates the grandchild and exits, so that the program is not its parent.
extern "C" fn intermediate(launch: *mut c_void) -> c_int {
    // SAFETY: `launch` outlives this process, whose creator is stopped; the grandchild's stack is
    // not used otherwise.
    unsafe {
        let stack = (*launch.cast::<Launch>()).stack;
        let shared = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        if libc::clone(grandchild, stack, shared, launch) == -1 {
            (*launch.cast::<Launch>())
                .errno
                .store(sys::errno().0, Ordering::Relaxed);
        }
    }
    0
}

/// Becomes the daemon: a session, descriptors and signals of its own, nothing of the program's.
extern "C" fn grandchild(launch: *mut c_void) -> c_int {
    // SAFETY: as in `intermediate`. Descriptors and signal dispositions are this process's own
    // copies. Only async-signal-safe functions are called.
    unsafe {
        let launch = &*launch.cast::<Launch>();
        let _ = kernel!(SYS_setsid);
        for (from, to) in [
            (launch.null, 0),
            (launch.null, 1),
            (launch.log, 2),
            (launch.ready, READY_FD),
        ] {
            if let Err(errno) = kernel!(SYS_dup2, from, to) {
                launch.errno.store(errno.0, Ordering::Relaxed);
                return 1;
            }
        }
        let _ = kernel!(SYS_close_range, READY_FD + 1, c_int::MAX, 0);
        // Ignored signals would stay ignored; handlers must not run between unblocking and execve.
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none = MaybeUninit::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
        // Not by the function, which would give the daemon this library.
        let executed = kernel!(
            SYS_execve,
            launch.program,
            launch.arguments.as_ptr(),
            launch.environment,
        );
        let errno = executed.err().map_or(0, |errno| errno.0);
        launch.errno.store(errno, Ordering::Relaxed);
        1
    }
}

/// The program's environment without `LD_PRELOAD`: the daemon shall not be preloaded.
fn environment() -> impl Iterator<Item = *const c_char> {
    unsafe extern "C" {
        static environ: *const *const c_char;
    }
    // SAFETY: the pointer is libc's, valid to read.
    let mut next = unsafe { environ };
    std::iter::from_fn(move || {
        // SAFETY: the array ends with a null, after which we do not go (`environ(7)`).
        unsafe {
            if next.is_null() || (*next).is_null() {
                return None;
            }
            let entry = *next;
            next = next.add(1);
            Some(entry)
        }
    })
    .filter(|&entry| {
        // SAFETY: each entry is a C string.
        let entry = unsafe { CStr::from_ptr(entry) };
        !entry.to_bytes().starts_with(b"LD_PRELOAD=")
    })
}

/// Two stacks, and an environment above them; unmapped when dropped.
struct Memory {
    base: *mut c_void,
    entries: usize,
}

impl Memory {
    /// Room for an environment of so many entries, and its final null.
    fn map(entries: usize) -> Result<Memory, Errno> {
        Ok(Memory {
            base: sys::map_private(Memory::length(entries))?,
            entries,
        })
    }

    fn length(entries: usize) -> usize {
        2 * STACK + (entries + 1) * size_of::<*const c_char>()
    }

    fn stack_top(&self, which: usize) -> *mut c_void {
        self.base.wrapping_byte_add((which + 1) * STACK)
    }

    fn environment(&self) -> *const *const c_char {
        self.base.wrapping_byte_add(2 * STACK).cast_const().cast()
    }

    /// The array is zeroed, hence ends with a null, even if the environment has shrunk meanwhile.
    fn fill_environment(&self) {
        let array = self.environment().cast_mut();
        for (index, entry) in environment().take(self.entries).enumerate() {
            // SAFETY: below `entries`, for which there is room.
            unsafe { array.add(index).write(entry) };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        sys::unmap(self.base, Memory::length(self.entries));
    }
}
