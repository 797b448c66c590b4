//! How `migshm run` sees that the preload is in force: a static binary, a set-uid one or a wrong
//! path would silently ignore it.

use std::ffi::{CStr, c_char};

use crate::kernel::kernel;

/// Environment variable that names a descriptor to which the constructor writes one byte, and
/// which it then closes. It removes the variable too: to a program that this one executes, the
/// number may mean another file.
const VERIFY_FD: &CStr = c"MIGSHM_VERIFY_FD";

const VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => unreachable!(),
    };

/// The library's version, for `dlsym`.
#[unsafe(no_mangle)]
pub extern "C" fn migshm_version() -> *const c_char {
    VERSION.as_ptr()
}

/// Tells the launcher, if there is one.
pub fn verify() {
    let Some(fd) =
        crate::sys::env(VERIFY_FD).and_then(|value| value.to_str().ok()?.parse::<i32>().ok())
    else {
        return;
    };
    // SAFETY: writes one byte from a valid buffer; the launcher gave us this descriptor to close;
    // before `main` nobody else uses the environment.
    unsafe {
        libc::unsetenv(VERIFY_FD.as_ptr());
        let _ = kernel!(SYS_write, fd, [b'+'].as_ptr(), 1);
        let _ = kernel!(SYS_close, fd);
    }
}
