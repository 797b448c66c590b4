//! `wait(2)` and its kin: who has seen a process end may tell others, on other nodes too, by ways
//! that the daemon knows nothing of. As in the kernel they must find its attaches counted off and its
//! undo done; so the daemon is asked to have that confirmed before the function returns.
//!
//! A process that the daemon does not know asks nothing. Nor do the waits inside of the C library
//! (`system`, `pclose`).

use std::ffi::c_int;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use libc::{id_t, idtype_t, pid_t, rusage, siginfo_t};

use crate::next::Next;
use crate::{client, process, sys};

static WAIT: Next = Next::new(c"wait");
static WAITPID: Next = Next::new(c"waitpid");
static WAIT3: Next = Next::new(c"wait3");
static WAIT4: Next = Next::new(c"wait4");
static WAITID: Next = Next::new(c"waitid");

/// Looks the hidden functions up.
pub fn prepare() {
    for next in [&WAIT, &WAITPID, &WAIT3, &WAIT4, &WAITID] {
        next.address();
    }
}

/// Defines functions that call the next of their name, then see to it that what has ended has ended
/// for everybody, if the result says that something has.
///
/// They are cancellation points: a thread that is cancelled in the next function unwinds through ours.
/// Hence `C-unwind`, no `hook!`, and nothing that would have to be dropped.
macro_rules! waits {
    ($($name:ident = $next:ident($($argument:ident: $type:ty),*) -> $result:ty, $ended:expr;)*) => { $(
        /// As the C library's.
        ///
        /// # Safety
        /// That of the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($($argument: $type),*) -> $result {
            // SAFETY: the next function of this name has this type, or is `missing`, which takes
            // no arguments and gives -1.
            let result = unsafe {
                let next = mem::transmute::<
                    usize,
                    unsafe extern "C-unwind" fn($($type),*) -> $result,
                >($next.address());
                next($($argument),*)
            };
            let ended: fn($result, $($type),*) -> bool = $ended;
            if ended(result, $($argument),*) {
                confirm();
            }
            result
        }
    )* };
}

waits! {
    wait = WAIT(status: *mut c_int) -> pid_t, |pid, _| pid > 0;
    waitpid = WAITPID(pid: pid_t, status: *mut c_int, options: c_int) -> pid_t, |pid, _, _, _| pid > 0;
    wait3 = WAIT3(status: *mut c_int, options: c_int, usage: *mut rusage) -> pid_t, |pid, _, _, _| pid > 0;
    wait4 = WAIT4(pid: pid_t, status: *mut c_int, options: c_int, usage: *mut rusage) -> pid_t,
        |pid, _, _, _, _| pid > 0;
    waitid = WAITID(what: idtype_t, id: id_t, info: *mut siginfo_t, options: c_int) -> c_int,
        // It finds nothing with WNOHANG, and says so there.
        // SAFETY: the next function has filled it in; it may be null.
        |result, _, _, info, _| result == 0 && (info.is_null() || unsafe { (*info).si_pid() } != 0);
}

/// Waits until the ends of all processes that have ended by now are seen by all nodes.
fn confirm() {
    let Some(own) = process::started() else {
        return;
    };
    if !own.introduced.load(Ordering::Relaxed) {
        return;
    }
    let before = sys::errno();
    // Without a daemon nobody sees anything, and the wait has succeeded all the same.
    let _ = catch_unwind(AssertUnwindSafe(client::tell_reaped));
    sys::set_errno(before);
}
