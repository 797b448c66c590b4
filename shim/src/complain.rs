//! The one line on stderr: why System V IPC does not work in this process, and what to do.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use migshm_protocol::call::Errno;

use crate::kernel::kernel;
use crate::text::Text;

/// Bytes of the line, its newline included.
const LINE: usize = 512;

/// Whether this process, or one that it was forked from, has complained.
static COMPLAINED: AtomicBool = AtomicBool::new(false);

/// Writes `migshm: ...` to stderr, once for a process and its forks, and gives the errno of a
/// kernel without System V IPC.
pub fn complain(what: fmt::Arguments<'_>) -> Errno {
    if !COMPLAINED.swap(true, Ordering::Relaxed) {
        let mut line = Text::<LINE>::new().with(b"migshm: ");
        // Truncation is the only failure, and a truncated line is better than none.
        let _ = line.write_fmt(what);
        let parts = [
            libc::iovec {
                iov_base: line.as_bytes().as_ptr().cast_mut().cast(),
                iov_len: line.as_bytes().len(),
            },
            libc::iovec {
                iov_base: b"\n".as_ptr().cast_mut().cast(),
                iov_len: 1,
            },
        ];
        // SAFETY: both buffers are valid and only read.
        let _ = unsafe { kernel!(SYS_writev, libc::STDERR_FILENO, parts.as_ptr(), 2) };
    }
    Errno::ENOSYS
}

/// What an errno means, in words.
pub fn describe(errno: Errno) -> Text<64> {
    let mut buffer = [0_u8; 64];
    // SAFETY: the buffer is as long as said.
    unsafe { libc::strerror_r(errno.0, buffer.as_mut_ptr().cast(), buffer.len()) };
    Text::new().with(&buffer)
}
