//! `dlopen` and `dlmopen`, without `RTLD_DEEPBIND`.
//!
//! A library that is loaded with that flag looks its symbols up in itself and in what it depends on
//! first, hence finds the C library's System V functions and not ours: PHP loads all of its
//! extensions so. The flag is taken away. Everything else stays: the loader tells by its return
//! address who calls it (for `RPATH`, `$ORIGIN`, the namespace), so the functions are assembly that
//! jumps on.

use std::ffi::{c_char, c_int, c_long, c_void};

use crate::next::Next;

static DLOPEN: Next = Next::new(c"dlopen");
static DLMOPEN: Next = Next::new(c"dlmopen");

/// Looks the hidden functions up.
pub fn prepare() {
    DLOPEN.address();
    DLMOPEN.address();
}

/// `dlopen(3)`.
///
/// # Safety
/// That of the function.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void {
    core::arch::naked_asm!(
        "and esi, {without}",
        // 24 bytes with the filler, and the return address: the stack is aligned.
        "push rdi",
        "push rsi",
        "push rdx",
        "call {next}",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        without = const !libc::RTLD_DEEPBIND,
        next = sym next_dlopen,
    )
}

/// `dlmopen(3)`. A library in a namespace of its own still has a C library of its own, and with it
/// the kernel's functions.
///
/// # Safety
/// That of the function.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlmopen(
    namespace: c_long,
    file: *const c_char,
    mode: c_int,
) -> *mut c_void {
    core::arch::naked_asm!(
        "and edx, {without}",
        "push rdi",
        "push rsi",
        "push rdx",
        "call {next}",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        without = const !libc::RTLD_DEEPBIND,
        next = sym next_dlmopen,
    )
}

extern "C" fn next_dlopen() -> usize {
    DLOPEN.address()
}

extern "C" fn next_dlmopen() -> usize {
    DLMOPEN.address()
}
