//! A forked process that does system calls on demand, one at a time, as any user.
#![allow(dead_code, reason = "only the tests against the kernel use it")]

use std::fs;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::time::{Duration, Instant};

/// Longest that a worker may take to do what it is known to do.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes that a system call may read and write: the largest message with its type, and one byte
/// too many.
pub const BUFFER: usize = 8208;
pub type Buffer = [u8; BUFFER];

/// Who a system call is made as.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// A supplementary group, or [`NO_GROUP`].
    pub group: u32,
}

pub const NO_GROUP: u32 = u32::MAX;

/// The calls that a worker may sleep in.
const BLOCKING: [i64; 3] = [libc::SYS_semop, libc::SYS_msgsnd, libc::SYS_msgrcv];

/// A system call. The argument with the number `pointer` becomes the address of `buffer`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Command {
    pub user: User,
    pub number: i64,
    pub arguments: [i64; 5],
    pub pointer: Option<usize>,
    pub buffer: Buffer,
}

/// What a system call returned: an errno is negative.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Reply {
    pub result: i64,
    pub buffer: Buffer,
}

/// The order in which processes run that have been woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Whatever the kernel likes.
    Any,
    /// That in which they were woken: they have one processor, of a real-time class.
    AsWoken,
}

/// The process. It is killed when this is dropped.
pub struct Worker {
    pub pid: i32,
    socket: i32,
}

impl Worker {
    pub fn spawn(order: Order) -> io::Result<Worker> {
        let mut sockets = [0; 2];
        // SAFETY: the array has room for the two descriptors.
        check(unsafe {
            libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, sockets.as_mut_ptr())
        })?;
        // SAFETY: the child calls only what is async-signal-safe: `serve` allocates nothing,
        // takes no lock and cannot panic.
        let pid = check(unsafe { libc::fork() })?;
        if pid == 0 {
            serve(sockets[1]);
        }
        if order == Order::AsWoken {
            run_as_woken(pid)?;
        }
        // SAFETY: the descriptor is the child's, and not used here.
        unsafe { libc::close(sockets[1]) };
        Ok(Worker {
            pid,
            socket: sockets[0],
        })
    }

    /// Starts a system call.
    pub fn send(&self, command: &Command) -> io::Result<()> {
        // SAFETY: `command` is valid for its size.
        let sent = unsafe {
            libc::send(
                self.socket,
                (&raw const *command).cast(),
                size_of::<Command>(),
                0,
            )
        };
        check(sent as i32).map(drop)
    }

    /// Waits until the call has returned, or sleeps in the kernel: then `None`.
    pub fn settle(&self) -> io::Result<Option<Reply>> {
        let start = Instant::now();
        loop {
            if let Some(reply) = self.receive(Duration::ZERO)? {
                return Ok(Some(reply));
            }
            if self.sleeps_in_call() {
                return Ok(None);
            }
            if start.elapsed() > PATIENCE {
                return Err(io::Error::other("a worker neither sleeps nor returns"));
            }
            std::thread::yield_now();
        }
    }

    /// Waits for the call to return.
    pub fn finish(&self) -> io::Result<Reply> {
        self.receive(PATIENCE)?
            .ok_or_else(|| io::Error::other("a worker does not return"))
    }

    /// Makes a system call that must not block.
    pub fn call(&self, command: &Command) -> io::Result<Reply> {
        self.send(command)?;
        self.finish()
    }

    /// Interrupts the call that it sleeps in.
    pub fn interrupt(&self) -> io::Result<()> {
        // SAFETY: kill has no memory effects here; the pid is a child that was not reaped.
        check(unsafe { libc::kill(self.pid, libc::SIGUSR1) }).map(drop)
    }

    fn receive(&self, timeout: Duration) -> io::Result<Option<Reply>> {
        let mut ready = libc::pollfd {
            fd: self.socket,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: `ready` is one valid pollfd.
        if check(unsafe { libc::poll(&raw mut ready, 1, timeout.as_millis() as i32) })? == 0 {
            return Ok(None);
        }
        let mut reply = MaybeUninit::<Reply>::uninit();
        // SAFETY: `reply` has room for its size.
        let length = unsafe {
            libc::recv(
                self.socket,
                reply.as_mut_ptr().cast(),
                size_of::<Reply>(),
                0,
            )
        };
        if length != size_of::<Reply>() as isize {
            return Err(io::Error::other("a worker is dead"));
        }
        // SAFETY: the worker sent a whole reply.
        Ok(Some(unsafe { reply.assume_init() }))
    }

    fn sleeps_in_call(&self) -> bool {
        let state = fs::read_to_string(format!("/proc/{}/syscall", self.pid)).unwrap_or_default();
        let number = state
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok());
        number.is_some_and(|number| BLOCKING.contains(&number))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: the child was not reaped before, and nobody uses the descriptor afterwards.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            libc::close(self.socket);
        }
    }
}

/// Gives a process one processor of ours, always the same, and a real-time class in which nobody
/// runs before those that were woken earlier.
pub fn run_as_woken(pid: i32) -> io::Result<()> {
    // SAFETY: both structures are plain integers, for which zeros are valid; the calls read and
    // write no more than the sizes given.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        check(libc::sched_getaffinity(
            0,
            size_of::<libc::cpu_set_t>(),
            &raw mut allowed,
        ))?;
        let first = (0..libc::CPU_SETSIZE as usize).find(|&cpu| libc::CPU_ISSET(cpu, &allowed));
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(first.unwrap_or(0), &mut one);
        check(libc::sched_setaffinity(
            pid,
            size_of::<libc::cpu_set_t>(),
            &raw const one,
        ))?;
        let mut lowest: libc::sched_param = std::mem::zeroed();
        lowest.sched_priority = 1;
        check(libc::sched_setscheduler(
            pid,
            libc::SCHED_FIFO,
            &raw const lowest,
        ))
        .map(drop)
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The life of a worker.
fn serve(socket: i32) -> ! {
    extern "C" fn ignore(_: i32) {}

    // SAFETY: plain system calls; `command` and `reply` are plain memory of the size given, and
    // every bit pattern that the parent sends is a valid command, as it has the same layout.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
        let mut command = MaybeUninit::<Command>::uninit();
        loop {
            let length = libc::recv(socket, command.as_mut_ptr().cast(), size_of::<Command>(), 0);
            if length < 0 && *libc::__errno_location() == libc::EINTR {
                continue;
            }
            if length != size_of::<Command>() as isize {
                libc::_exit(0);
            }
            let reply = execute(command.assume_init());
            libc::send(socket, (&raw const reply).cast(), size_of::<Reply>(), 0);
        }
    }
}

impl Command {
    /// Makes the call in this process, as the user that it has.
    ///
    /// # Safety
    /// The call must be one that reads and writes no memory but the buffer.
    pub unsafe fn execute_here(mut self) -> Reply {
        let arguments = self.addressed();
        // SAFETY: by contract.
        let result = unsafe { raw_call(self.number, arguments) };
        Reply {
            result,
            buffer: self.buffer,
        }
    }

    fn addressed(&mut self) -> [i64; 5] {
        let mut arguments = self.arguments;
        if let Some(argument) = self.pointer.and_then(|nth| arguments.get_mut(nth)) {
            *argument = self.buffer.as_mut_ptr() as i64;
        }
        arguments
    }
}

/// Becomes the user, makes the call, becomes root again.
///
/// # Safety
/// The call must be one that reads and writes no memory but the buffer.
unsafe fn execute(mut command: Command) -> Reply {
    let User { uid, gid, group } = command.user;
    let groups = [group];
    let count = i64::from(group != NO_GROUP);
    let arguments = command.addressed();
    // SAFETY: `groups` has `count` entries; for the call itself, by contract. The raw calls
    // change this thread only, which is the only one.
    let result = unsafe {
        libc::syscall(libc::SYS_setgroups, count, groups.as_ptr());
        libc::syscall(libc::SYS_setresgid, -1, gid, -1);
        libc::syscall(libc::SYS_setresuid, -1, uid, -1);
        let result = raw_call(command.number, arguments);
        libc::syscall(libc::SYS_setresuid, -1, 0, -1);
        libc::syscall(libc::SYS_setresgid, -1, 0, -1);
        result
    };
    Reply {
        result,
        buffer: command.buffer,
    }
}

/// Returns a negative errno as such.
///
/// # Safety
/// That of the system call.
unsafe fn raw_call(number: i64, [a, b, c, d, e]: [i64; 5]) -> i64 {
    // SAFETY: by contract; errno is this thread's own.
    unsafe {
        match libc::syscall(number, a, b, c, d, e) {
            -1 => -i64::from(*libc::__errno_location()),
            result => result,
        }
    }
}
