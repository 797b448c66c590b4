//! The functions that open files, for the few files of [`proc`](crate::proc).
//!
//! Each is assembly that asks [`choose`] where to go on, and jumps there with registers and stack
//! as they came: to the next function of its name, for any other file. So an open of those is what
//! it would be without us, cancellation point and variable arguments included, but for the
//! comparison of the first bytes of its path.
//!
//! A file of ours is made as a memfd, which the next function then opens by its name in
//! `/proc/self/fd`: flags, modes and streams are its own affair.

use std::ffi::{c_char, c_int, c_void};
use std::fmt::Write;
use std::os::fd::AsRawFd;
use std::ptr;

use migshm_protocol::call::Errno;

use crate::hooks::enter;
use crate::next::Next;
use crate::proc::{self, File};
use crate::sys;
use crate::text::Text;

/// The functions, and which of the entries in this module serves a file of ours.
static FUNCTIONS: [(Next, Entry); 14] = [
    (Next::new(c"open"), open_file::<0>),
    (Next::new(c"open64"), open_file::<1>),
    (Next::new(c"__open"), open_file::<2>),
    (Next::new(c"__open64"), open_file::<3>),
    (Next::new(c"__open_2"), open_file::<4>),
    (Next::new(c"__open64_2"), open_file::<5>),
    (Next::new(c"openat"), open_file_at::<6>),
    (Next::new(c"openat64"), open_file_at::<7>),
    (Next::new(c"__openat_2"), open_file_at::<8>),
    (Next::new(c"__openat64_2"), open_file_at::<9>),
    (Next::new(c"fopen"), open_stream::<10>),
    (Next::new(c"fopen64"), open_stream::<11>),
    (Next::new(c"freopen"), open_stream::<12>),
    (Next::new(c"freopen64"), open_stream::<13>),
];

/// Any of the functions, as its arguments' registers.
type Entry = unsafe extern "C" fn(usize, usize, usize, usize) -> usize;

/// Looks the hidden functions up.
pub fn prepare() {
    for (next, _) in &FUNCTIONS {
        next.address();
    }
}

/// Defines a function: the number of its entry in [`FUNCTIONS`], and what puts directory and path
/// in the first two registers.
macro_rules! opens {
    ($($name:ident = $number:literal, $($arrange:literal),*;)*) => { $(
        /// As the C library's.
        ///
        /// # Safety
        /// That of the C library's.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() {
            core::arch::naked_asm!(
                // With the return address 48 bytes: the stack is aligned.
                "push rax", // how many vector registers a variadic call uses
                "push rdi",
                "push rsi",
                "push rdx",
                "push rcx",
                $($arrange,)*
                concat!("mov edx, ", $number),
                "call {choose}",
                "mov r11, rax",
                "pop rcx",
                "pop rdx",
                "pop rsi",
                "pop rdi",
                "pop rax",
                "jmp r11",
                choose = sym choose,
            )
        }
    )* };
}

opens! {
    open = 0, "mov rsi, rdi", "mov edi, -100"; // AT_FDCWD
    open64 = 1, "mov rsi, rdi", "mov edi, -100";
    __open = 2, "mov rsi, rdi", "mov edi, -100";
    __open64 = 3, "mov rsi, rdi", "mov edi, -100";
    __open_2 = 4, "mov rsi, rdi", "mov edi, -100";
    __open64_2 = 5, "mov rsi, rdi", "mov edi, -100";
    openat = 6, "";
    openat64 = 7, "";
    __openat_2 = 8, "";
    __openat64_2 = 9, "";
    fopen = 10, "mov rsi, rdi", "mov edi, -100";
    fopen64 = 11, "mov rsi, rdi", "mov edi, -100";
    freopen = 12, "mov rsi, rdi", "mov edi, -100";
    freopen64 = 13, "mov rsi, rdi", "mov edi, -100";
}

const _: () = assert!(libc::AT_FDCWD == -100);

/// Where a function goes on.
extern "C" fn choose(directory: c_int, path: *const c_char, number: usize) -> usize {
    let (next, ours) = &FUNCTIONS[number];
    // SAFETY: the program's path, a C string.
    match unsafe { proc::find(directory, path) } {
        Some(_) => *ours as usize,
        None => next.address(),
    }
}

/// `open(path, flags, mode)`, `__open_2(path, flags)` and kin.
unsafe extern "C" fn open_file<const NUMBER: usize>(
    path: usize,
    flags: usize,
    mode: usize,
    _: usize,
) -> usize {
    // SAFETY: as in `choose`.
    let file = unsafe { proc::find(libc::AT_FDCWD, path as *const c_char) };
    open_at::<NUMBER>(file, flags as c_int, |path, flags| (path, flags, mode, 0))
}

/// `openat(directory, path, flags, mode)` and kin.
unsafe extern "C" fn open_file_at<const NUMBER: usize>(
    directory: usize,
    path: usize,
    flags: usize,
    mode: usize,
) -> usize {
    // SAFETY: as in `choose`.
    let file = unsafe { proc::find(directory as c_int, path as *const c_char) };
    open_at::<NUMBER>(file, flags as c_int, |path, flags| {
        (directory, path, flags, mode)
    })
}

fn open_at<const NUMBER: usize>(
    file: Option<File>,
    flags: c_int,
    arguments: impl FnOnce(usize, usize) -> (usize, usize, usize, usize),
) -> usize {
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
    // The name that the memfd is opened by is a symbolic link.
    let flags = (flags & !libc::O_NOFOLLOW) as usize;
    enter(|| {
        let opened = substitute::<NUMBER>(file, writes, |path| arguments(path, flags))? as c_int;
        sys::check(opened).map(|descriptor| descriptor as isize)
    }) as usize
}

/// `fopen(path, mode)`, `freopen(path, mode, stream)`.
unsafe extern "C" fn open_stream<const NUMBER: usize>(
    path: usize,
    mode: usize,
    stream: usize,
    _: usize,
) -> usize {
    // SAFETY: as in `choose`; so is the mode.
    let (file, writes) = unsafe {
        let mode = std::ffi::CStr::from_ptr(mode as *const c_char).to_bytes();
        let file = proc::find(libc::AT_FDCWD, path as *const c_char);
        (file, mode.first() != Some(&b'r') || mode.contains(&b'+'))
    };
    let opened = enter(|| {
        let opened = substitute::<NUMBER>(file, writes, |path| (path, mode, stream, 0))?;
        match opened {
            0 => Err(sys::errno()),
            stream => Ok(stream as isize),
        }
    });
    match opened {
        -1 => ptr::null_mut::<c_void>() as usize,
        stream => stream as usize,
    }
}

/// Makes the file, and calls the next function with its path among the arguments.
///
/// # Errors
/// `EACCES` for writing: the cluster's limits are what they are. `ENOENT` if there is no daemon, as
/// there is no such file where there is no System V IPC.
fn substitute<const NUMBER: usize>(
    file: Option<File>,
    writes: bool,
    arguments: impl FnOnce(usize) -> (usize, usize, usize, usize),
) -> Result<usize, Errno> {
    // It was one of ours a moment ago; another thread has changed the current directory since.
    let file = file.ok_or(Errno::ENOENT)?;
    if writes {
        return Err(Errno::EACCES);
    }
    let _cancellation = sys::CancellationOff::new();
    let memory = file.make().map_err(|errno| match errno {
        Errno::ENOSYS => Errno::ENOENT,
        errno => errno,
    })?;
    let mut path = Text::<32>::new();
    // It fits.
    let _ = write!(path, "/proc/self/fd/{}", memory.as_raw_fd());
    let (a, b, c, d) = arguments(path.as_c_str().as_ptr() as usize);
    // SAFETY: the function of this number takes these arguments, those of the program but for the
    // path; surplus ones are ignored. No vector register is used.
    Ok(unsafe {
        let next: Entry = std::mem::transmute(FUNCTIONS[NUMBER].0.address());
        next(a, b, c, d)
    })
}
