//! The functions that ours hide and that are called all the same: the ones that come next in the
//! search order, of the C library or of another preloaded one.
//!
//! They are looked up by the constructor, and before it (in a constructor that runs earlier) by
//! who needs one first: the loader's own lock and nothing else is taken, and nothing allocated.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use migshm_protocol::call::Errno;

use crate::sys;

/// Such a function.
pub struct Next {
    name: &'static CStr,
    address: AtomicUsize,
}

impl Next {
    pub const fn new(name: &'static CStr) -> Next {
        Next {
            name,
            address: AtomicUsize::new(0),
        }
    }

    /// Its address; that of a function that fails with `ENOSYS` if there is none.
    pub fn address(&self) -> usize {
        match self.address.load(Ordering::Relaxed) {
            0 => self.look_up(),
            address => address,
        }
    }

    #[cold]
    fn look_up(&self) -> usize {
        // SAFETY: a C string.
        let found = unsafe { dlsym(libc::RTLD_NEXT, self.name.as_ptr()) } as usize;
        let address = if found == 0 {
            missing as extern "C" fn() -> c_int as usize
        } else {
            found
        };
        self.address.store(address, Ordering::Relaxed);
        address
    }
}

/// In the place of a function that glibc no longer has.
extern "C" fn missing() -> c_int {
    sys::set_errno(Errno::ENOSYS);
    -1
}

unsafe extern "C" {
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}
