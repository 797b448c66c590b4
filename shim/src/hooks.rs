//! The functions that the library defines in libc's stead.
//!
//! Nothing is looked up for them: the functions that they hide are never called.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use libc::{c_long, key_t, off_t, sembuf, size_t, ssize_t, timespec};
use migshm_protocol::call::Errno;

use crate::{anchor, msg, sem, shm, sys};

redhook::hook! {
    unsafe fn shmget(key: key_t, size: size_t, flags: c_int) -> c_int => on_shmget {
        enter(|| shm::get(key, size, flags)) as c_int
    }
}

redhook::hook! {
    unsafe fn shmat(id: c_int, address: *const c_void, flags: c_int) -> *mut c_void => on_shmat {
        enter(|| shm::attach(id, address as usize, flags)) as *mut c_void
    }
}

redhook::hook! {
    unsafe fn shmdt(address: *const c_void) -> c_int => on_shmdt {
        enter(|| shm::detach(address as usize)) as c_int
    }
}

redhook::hook! {
    unsafe fn munmap(address: *mut c_void, length: size_t) -> c_int => on_munmap {
        // SAFETY: the program's own call.
        enter(|| unsafe { shm::unmap(address as usize, length) }) as c_int
    }
}

redhook::hook! {
    unsafe fn mmap(address: *mut c_void, length: size_t, protection: c_int, flags: c_int, fd: c_int,
        offset: off_t) -> *mut c_void => on_mmap {
        // SAFETY: the program's own call.
        enter(|| unsafe {
            shm::map(address as usize, length, protection, flags, fd, offset)
        }) as *mut c_void
    }
}

redhook::hook! {
    unsafe fn mmap64(address: *mut c_void, length: size_t, protection: c_int, flags: c_int,
        fd: c_int, offset: off_t) -> *mut c_void => on_mmap64 {
        // SAFETY: as for mmap, which it is the same as.
        unsafe { on_mmap(address, length, protection, flags, fd, offset) }
    }
}

redhook::hook! {
    unsafe fn mprotect(address: *mut c_void, length: size_t, protection: c_int)
        -> c_int => on_mprotect {
        // SAFETY: the program's own call.
        enter(|| unsafe { shm::protect(address as usize, length, protection, None) }) as c_int
    }
}

redhook::hook! {
    unsafe fn pkey_mprotect(address: *mut c_void, length: size_t, protection: c_int, key: c_int)
        -> c_int => on_pkey_mprotect {
        // SAFETY: the program's own call.
        enter(|| unsafe {
            shm::protect(address as usize, length, protection, Some(key))
        }) as c_int
    }
}

// Variadic in C, as `semctl`: the fifth argument is there with MREMAP_FIXED.
redhook::hook! {
    unsafe fn mremap(address: *mut c_void, length: size_t, new_length: size_t, flags: c_int,
        new_address: *mut c_void) -> *mut c_void => on_mremap {
        // SAFETY: the program's own call.
        enter(|| unsafe {
            shm::remap(address as usize, length, new_length, flags, new_address as usize)
        }) as *mut c_void
    }
}

redhook::hook! {
    unsafe fn shmctl(id: c_int, command: c_int, buffer: *mut c_void) -> c_int => on_shmctl {
        enter(|| shm::control(id, command, buffer as usize)) as c_int
    }
}

redhook::hook! {
    unsafe fn semget(key: key_t, count: c_int, flags: c_int) -> c_int => on_semget {
        enter(|| sem::get(key, count, flags)) as c_int
    }
}

redhook::hook! {
    unsafe fn semop(id: c_int, operations: *mut sembuf, count: size_t) -> c_int => on_semop {
        enter(|| sem::operate(id, operations as usize, count, 0)) as c_int
    }
}

redhook::hook! {
    unsafe fn semtimedop(id: c_int, operations: *mut sembuf, count: size_t, timeout: *const timespec)
        -> c_int => on_semtimedop {
        enter(|| sem::operate(id, operations as usize, count, timeout as usize)) as c_int
    }
}

// `semctl` is variadic in C. Its fourth argument, a union of an int and pointers passed by value,
// travels in the same register as a fixed fourth argument would.
redhook::hook! {
    unsafe fn semctl(id: c_int, number: c_int, command: c_int, argument: usize) -> c_int => on_semctl {
        enter(|| sem::control(id, number, command, argument)) as c_int
    }
}

redhook::hook! {
    unsafe fn msgget(key: key_t, flags: c_int) -> c_int => on_msgget {
        enter(|| msg::get(key, flags)) as c_int
    }
}

redhook::hook! {
    unsafe fn msgsnd(id: c_int, message: *const c_void, size: size_t, flags: c_int)
        -> c_int => on_msgsnd {
        enter(|| msg::send(id, message as usize, size, flags)) as c_int
    }
}

redhook::hook! {
    unsafe fn msgrcv(id: c_int, message: *mut c_void, size: size_t, mtype: c_long, flags: c_int)
        -> ssize_t => on_msgrcv {
        enter(|| msg::receive(id, message as usize, size, mtype, flags))
    }
}

redhook::hook! {
    unsafe fn msgctl(id: c_int, command: c_int, buffer: *mut c_void) -> c_int => on_msgctl {
        enter(|| msg::control(id, command, buffer as usize)) as c_int
    }
}

/// Runs a call as C expects it: -1 and `errno` on failure, `errno` untouched on success, and no
/// panic past this point. (`hook!` would answer a panic by calling the kernel's function.)
pub fn enter(call: impl FnOnce() -> Result<isize, Errno>) -> isize {
    let before = sys::errno();
    let result = catch_unwind(AssertUnwindSafe(|| {
        anchor::introduce();
        call()
    }));
    match result.unwrap_or(Err(Errno::ENOSYS)) {
        Ok(value) => {
            sys::set_errno(before);
            value
        }
        Err(errno) => {
            sys::set_errno(errno);
            -1
        }
    }
}
