//! `libmigshm.so`: System V shared memory, semaphores and message queues for the whole cluster, by
//! `LD_PRELOAD`.
//!
//! The library defines `shmget shmat shmdt shmctl semget semop semtimedop semctl msgget msgsnd
//! msgrcv msgctl`, and libc's `syscall` for exactly those system calls, and `munmap`, `mmap` and
//! `mremap`, which can end or move an attach, and `mprotect`, which could make one writable. Each becomes a message to the node daemon, over a unix socket; the answer becomes the
//! call's result. The library never calls the kernel's own System V IPC: where it cannot reach a
//! daemon, calls fail with `ENOSYS`, which is what a kernel without System V IPC says.
//!
//! It also defines the functions that open files, for the few below `/proc` that tell of System V
//! objects; `dlopen`, for libraries that would be loaded past it; and the functions that execute
//! programs, for those that are given an environment without it; and `wait` and its kin, as a process that has
//! been waited for has ended for all nodes.
//!
//! ```text
//!  hooks, syscall                      the C ABI: arguments in, result and errno out
//!    └─ shm, sem, msg                  what each function does
//!         ├─ convert                   C structures ↔ protocol values
//!         ├─ anchor                    makes the address space known for page tracking
//!         └─ client                    one call and its answer; interruption and timeout
//!              ├─ pool                 connections that are kept for the next call
//!              ├─ connection           messages on the socket
//!              ├─ polling              whether to look for an answer before sleeping
//!              └─ start, directory     finds the daemon, or starts it
//!  open ── proc                        /proc/sysvipc and the limits in /proc/sys/kernel, as files
//!  load                                dlopen without RTLD_DEEPBIND
//!  exec                                keeps the library in programs that this one executes
//!  wait                                a process that was waited for has ended on all nodes
//!  next                                the functions that those four hide
//!  process                             every piece of state, and what a fork does to it
//!  kernel, sys                         system calls past the C library, and what needs more than a line
//!  text, complain                      strings without malloc, one line on stderr
//!  marker                              how `migshm run` sees that the library is in force
//! ```
//!
//! # What a guest in somebody else's process must not do
//!
//! - **No thread, no runtime**: forks and execs would break them. Every call is one blocking
//!   exchange on a socket that no other call uses meanwhile.
//! - **No `malloc`, no lock**: System V calls are made in signal handlers, in constructors before
//!   `main`, in the child of a fork of a threaded program. All state is static or mapped, and is
//!   handed over by atomics; strings have a fixed capacity. What a fork does to the state is told
//!   in `process.rs`.
//! - **Nothing at all until the first call**: the constructor registers a fork handler, which
//!   does nothing in a process that has made no call, and looks up the functions of `next`.
//! - **No unwinding into C**: a panic ends as `ENOSYS`. No cancellation point either: semop(2) is
//!   none, so system calls are made by the instruction, not through libc's cancellable wrappers.
//!   (msgsnd and msgrcv are cancellation points in libc: see below.)
//! - **No function that other preloaded libraries replace**: they may make System V calls there, or
//!   give answers of their own (`kernel.rs`).
//! - `errno` changes only when a call fails.
//!
//! # Caveats
//!
//! - A handler that leaves a blocked `semop` by `longjmp` loses that call's connection, and the
//!   operation stays queued until the process ends.
//! - `pthread_cancel` does not end a blocked `msgsnd` or `msgrcv`, as it would unwind through the
//!   library: the thread ends at its next cancellation point.
//! - A program that closes descriptors which it did not open is noticed (they are verified before
//!   each use); one that does so in the midst of another thread's call is not.
//! - The C library's own `syscall` function is replaced, not the instruction: a program that has
//!   its own assembly reaches the kernel's IPC.
//! - A library that is loaded with `RTLD_DEEPBIND` is loaded without: should it define a symbol of
//!   the same name as the program or another library, it gets theirs.
//! - `/proc/sysvipc/shm` and kin are what they are for functions of the C library that open files.
//!   `stat` and `access` see the kernel's, which look alike; a link of another name leads to the kernel's too.
//! - A program that wants another one to use the kernel's IPC must give it an empty `LD_PRELOAD`.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")))]
compile_error!("libmigshm.so knows the ABI of x86-64 GNU/Linux only");

mod anchor;
mod client;
mod complain;
mod connection;
mod convert;
mod delegated;
mod directory;
mod exec;
mod hooks;
mod identity;
mod kernel;
mod load;
mod marker;
mod msg;
mod next;
mod open;
mod polling;
mod pool;
mod proc;
mod process;
mod sem;
mod shm;
mod start;
mod sys;
mod syscall;
mod text;
mod wait;

/// Runs before `main`; other libraries' constructors may have made calls before it.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn construct() {
        process::watch_forks();
        open::prepare();
        load::prepare();
        exec::prepare();
        wait::prepare();
        marker::verify();
    }
    construct
};
