//! System calls by the instruction, past every library.
//!
//! What the library does for itself must not be seen by other preloaded libraries that replace
//! functions of the C library. fakeroot's `fstat` and kin, for one, make System V calls: an
//! `fstat` of ours within such a call would make the next one, without end. Its `geteuid` says
//! root, and its `mkdir` tells a daemon of its own, where we mean what the kernel means. Nor is a
//! call by the instruction a cancellation point, or does it touch `errno`.
//!
//! Still the C library's: what changes mappings, which sanitizers and allocators must see; signal
//! masks; `clone`; and `close` where a descriptor is dropped.

use std::arch::asm;
use std::ffi::c_long;

use migshm_protocol::call::Errno;

/// Makes a system call: its name in `libc`, and up to six arguments. Gives what the kernel
/// returns, or the errno.
///
/// Unsafe as the call is.
macro_rules! kernel {
    ($name:ident $(, $argument:expr)* $(,)?) => {
        $crate::kernel::enter(libc::$name, [$($crate::kernel::Argument::register($argument)),*])
    };
}
pub(crate) use kernel;

/// Largest errno that the kernel returns, negated.
const ERRNO_MAX: usize = 4095;

/// What a register of a system call holds.
pub trait Argument {
    fn register(self) -> usize;
}

impl Argument for usize {
    fn register(self) -> usize {
        self
    }
}

impl Argument for i32 {
    fn register(self) -> usize {
        self as usize
    }
}

impl Argument for u32 {
    fn register(self) -> usize {
        self as usize
    }
}

impl<T> Argument for *const T {
    fn register(self) -> usize {
        self as usize
    }
}

impl<T> Argument for *mut T {
    fn register(self) -> usize {
        self as usize
    }
}

/// What [`kernel!`] calls; arguments that are not given are 0.
///
/// # Safety
/// That of the system call.
///
/// # Errors
/// Those of its manual page.
#[inline]
pub unsafe fn enter<const N: usize>(number: c_long, arguments: [usize; N]) -> Result<usize, Errno> {
    const { assert!(N <= 6) };
    let mut registers = [0; 6];
    registers[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = registers;
    let result: usize;
    // SAFETY: the kernel's convention; what the call does to memory is the caller's affair.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as usize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    match result.wrapping_neg() {
        errno @ 1..=ERRNO_MAX => Err(Errno(errno as i32)),
        _ => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_and_results_are_the_kernels() {
        // SAFETY: plain numbers; a null buffer is refused.
        unsafe {
            assert_eq!(kernel!(SYS_getpid), Ok(std::process::id() as usize));
            assert_eq!(kernel!(SYS_close, -1), Err(Errno(libc::EBADF)));
            let path = c"/proc/self/mem".as_ptr();
            let fd = kernel!(SYS_openat, libc::AT_FDCWD, path, libc::O_RDONLY, 0).unwrap() as i32;
            let byte = 7_u8;
            let mut copy = 0_u8;
            let read = kernel!(SYS_pread64, fd, &raw mut copy, 1_usize, &raw const byte);
            assert_eq!((read, copy), (Ok(1), 7));
            let pages = kernel!(SYS_mmap, 0_usize, 4096_usize, 0, 0x22, -1, 0_usize).unwrap();
            assert_eq!(kernel!(SYS_munmap, pages, 4096_usize), Ok(0));
            assert_eq!(kernel!(SYS_close, fd), Ok(0));
        }
    }
}
