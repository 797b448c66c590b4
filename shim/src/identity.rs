//! The functions that change who the process is: it may then no longer operate on the semaphore
//! sets whose memory it has.

use std::ffi::{c_char, c_int};
use std::mem;

use libc::{gid_t, size_t, uid_t};

use crate::delegated;
use crate::next::Next;

macro_rules! change {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        /// That of the manual page.
        ///
        /// # Safety
        /// That of the manual page.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            static NEXT: Next = Next::new(
                match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => unreachable!(),
                },
            );
            type Function = unsafe extern "C" fn($($type),*) -> c_int;
            // SAFETY: the function of this name has this type; the arguments are the program's.
            let result = unsafe { mem::transmute::<usize, Function>(NEXT.address())($($argument),*) };
            delegated::forget();
            result
        }
    )*};
}

change! {
    setuid(uid: uid_t);
    seteuid(uid: uid_t);
    setreuid(real: uid_t, effective: uid_t);
    setresuid(real: uid_t, effective: uid_t, saved: uid_t);
    setgid(gid: gid_t);
    setegid(gid: gid_t);
    setregid(real: gid_t, effective: gid_t);
    setresgid(real: gid_t, effective: gid_t, saved: gid_t);
    setgroups(size: size_t, list: *const gid_t);
    initgroups(user: *const c_char, group: gid_t);
}
