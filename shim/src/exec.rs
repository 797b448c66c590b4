//! The functions that execute programs: a program that is given an environment of its own keeps
//! the library, and with it the node and the objects of the one that executes it.
//!
//! An `LD_PRELOAD` that names the library already is left alone, with all that is beside it; so is
//! an empty one, which is how to ask for a program without the library. Otherwise the library is
//! put in front, and those `MIGSHM_*` variables are added that this program began with and the new
//! environment does not name.
//!
//! The children of a `vfork` come here, and signal handlers: nothing is allocated but a mapping
//! where an environment is large, which a child of a `vfork` leaves to its parent.
//!
//! `system`, `popen` and the like execute with the program's own environment and are not replaced:
//! they lose the library in a program that has emptied that.

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::pid_t;

use crate::next::Next;
use crate::start;
use crate::sys;
use crate::text::Text;

/// A list of C strings that ends with a null pointer.
type Strings = *const *const c_char;

static EXECVE: Next = Next::new(c"execve");
static EXECVEAT: Next = Next::new(c"execveat");
static FEXECVE: Next = Next::new(c"fexecve");
static EXECVPE: Next = Next::new(c"execvpe");
static POSIX_SPAWN: Next = Next::new(c"posix_spawn");
static POSIX_SPAWNP: Next = Next::new(c"posix_spawnp");

const PRELOAD: &[u8] = b"LD_PRELOAD=";
const OURS: &[u8] = b"MIGSHM_";
/// Of one launch only.
const VERIFY_FD: &[u8] = b"MIGSHM_VERIFY_FD=";

/// Pointers for which the stack has room, the string for `LD_PRELOAD` included.
const ROOM: usize = 512;

/// An `LD_PRELOAD` of the library alone and the `MIGSHM_*` variables that this program began with,
/// each with its NUL.
static BEGINNING: Beginning = Beginning {
    bytes: UnsafeCell::new([0; 4096]),
    length: AtomicUsize::new(0),
};

struct Beginning {
    bytes: UnsafeCell<[u8; 4096]>,
    /// Of what is valid; set after it.
    length: AtomicUsize,
}

// SAFETY: the bytes are written once, before `length` says that there are any.
unsafe impl Sync for Beginning {}

impl Beginning {
    /// Notes what the environment is now. Called once, by the constructor.
    fn note(&self) {
        // SAFETY: no other thread looks at the bytes, as `length` is still 0.
        let bytes = unsafe { &mut *self.bytes.get() };
        let Some(library) = start::library() else {
            return;
        };
        let preload = Text::<1024>::new().with(PRELOAD).with(library.to_bytes());
        if preload.is_truncated() {
            return;
        }
        let mut length = 0;
        let mut add = |entry: &CStr| {
            let entry = entry.to_bytes_with_nul();
            // What does not fit is not noted: paths of kilobytes.
            if let Some(room) = bytes.get_mut(length..length + entry.len()) {
                room.copy_from_slice(entry);
                length += entry.len();
            }
        };
        add(preload.as_c_str());
        // SAFETY: before `main` nobody changes the environment.
        for entry in unsafe { entries(environ) } {
            let name = entry.to_bytes();
            if name.starts_with(OURS) && !name.starts_with(VERIFY_FD) {
                add(entry);
            }
        }
        self.length.store(length, Ordering::Release);
    }

    fn strings(&'static self) -> impl Iterator<Item = &'static CStr> {
        let length = self.length.load(Ordering::Acquire);
        // SAFETY: so many bytes are never written again.
        let bytes: &'static [u8] = unsafe { &(&*self.bytes.get())[..length] };
        let strings = bytes.split_inclusive(|&byte| byte == 0);
        strings.filter_map(|string| CStr::from_bytes_with_nul(string).ok())
    }
}

/// Looks the hidden functions up, and notes the variables.
pub fn prepare() {
    for next in [
        &EXECVE,
        &EXECVEAT,
        &FEXECVE,
        &EXECVPE,
        &POSIX_SPAWN,
        &POSIX_SPAWNP,
    ] {
        next.address();
    }
    BEGINNING.note();
}

/// The strings of a list.
///
/// # Safety
/// Null, or a list that stays as it is for as long as the result is used.
unsafe fn entries<'a>(list: Strings) -> impl Iterator<Item = &'a CStr> {
    let mut at = list;
    std::iter::from_fn(move || {
        // SAFETY: by the caller; the list ends with a null pointer, past which nothing is read.
        unsafe {
            if at.is_null() || (*at).is_null() {
                return None;
            }
            let entry = CStr::from_ptr(*at);
            at = at.add(1);
            Some(entry)
        }
    })
}

/// Calls `execute` with an environment under which the library stays in force.
///
/// # Safety
/// `environment` is null or a list of C strings.
unsafe fn with_library(environment: Strings, execute: impl FnOnce(Strings) -> c_int) -> c_int {
    let mut variables = BEGINNING.strings();
    let Some(preload) = variables.next() else {
        return execute(environment);
    };
    let library = &preload.to_bytes()[PRELOAD.len()..];
    // SAFETY: by the caller.
    let given = || unsafe { entries(environment) };
    let others = given().find_map(|entry| entry.to_bytes().strip_prefix(PRELOAD));
    let stays = others.is_some_and(|list| {
        let mut items = list.split(|&byte| byte == b':' || byte == b' ');
        list.is_empty() || items.any(|item| item == library)
    });
    if stays {
        return execute(environment);
    }
    let mut preload = Text::<4096>::new().with(preload.to_bytes());
    if let Some(others) = others {
        preload = preload.with(b":").with(others);
    }
    if preload.is_truncated() {
        return execute(environment);
    }
    let names = |variable: &CStr| {
        let name = variable.to_bytes().split_inclusive(|&byte| byte == b'=');
        let name = name.take(1).next().unwrap_or_default();
        given().any(|entry| entry.to_bytes().starts_with(name))
    };
    let added = variables.filter(|variable| !names(variable));
    let kept = given().filter(|entry| !entry.to_bytes().starts_with(PRELOAD));
    // At most: those kept, those added, LD_PRELOAD and the null pointer.
    let count = given().count() + BEGINNING.strings().count() + 1;

    let mut room = [ptr::null(); ROOM];
    let mut mapping = None;
    let list = match room.get_mut(..count) {
        Some(list) => list,
        None => match Mapping::new(count) {
            Some(mapped) => mapping.insert(mapped).list(),
            None => return execute(environment),
        },
    };
    let all = std::iter::once(preload.as_c_str().as_ptr())
        .chain(kept.map(CStr::as_ptr))
        .chain(added.map(CStr::as_ptr));
    for (place, entry) in list[..count - 1].iter_mut().zip(all) {
        *place = entry;
    }
    execute(list.as_ptr())
}

/// Room for a large environment.
struct Mapping {
    address: *mut c_void,
    count: usize,
}

impl Mapping {
    fn new(count: usize) -> Option<Mapping> {
        // SAFETY: a new mapping.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                count * size_of::<*const c_char>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        (address != libc::MAP_FAILED).then_some(Mapping { address, count })
    }

    fn list(&mut self) -> &mut [*const c_char] {
        // SAFETY: the mapping has this length, zeros are null pointers, and it is ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        let _ = unsafe {
            sys::munmap(
                self.address as usize,
                self.count * size_of::<*const c_char>(),
            )
        };
    }
}

/// `execve(2)`.
///
/// # Safety
/// That of the function, as for all below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execve(path: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let next: unsafe extern "C" fn(*const c_char, Strings, Strings) -> c_int =
            mem::transmute(EXECVE.address());
        with_library(envp, |envp| next(path, argv, envp))
    }
}

/// `execveat(2)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execveat(
    directory: c_int,
    path: *const c_char,
    argv: Strings,
    envp: Strings,
    flags: c_int,
) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let next: unsafe extern "C" fn(c_int, *const c_char, Strings, Strings, c_int) -> c_int =
            mem::transmute(EXECVEAT.address());
        with_library(envp, |envp| next(directory, path, argv, envp, flags))
    }
}

/// `fexecve(3)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fexecve(file: c_int, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let next: unsafe extern "C" fn(c_int, Strings, Strings) -> c_int =
            mem::transmute(FEXECVE.address());
        with_library(envp, |envp| next(file, argv, envp))
    }
}

/// `execvpe(3)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvpe(file: *const c_char, argv: Strings, envp: Strings) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let next: unsafe extern "C" fn(*const c_char, Strings, Strings) -> c_int =
            mem::transmute(EXECVPE.address());
        with_library(envp, |envp| next(file, argv, envp))
    }
}

/// `execv(3)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execv(path: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the program's own call, with its own environment.
    unsafe { execve(path, argv, environ) }
}

/// `execvp(3)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn execvp(file: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the program's own call, with its own environment.
    unsafe { execvpe(file, argv, environ) }
}

/// `execle(3)`'s arguments as a list, behind whose null pointer the environment follows.
unsafe extern "C" fn execle_list(path: *const c_char, argv: Strings) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let environment = argv.add(entries(argv).count() + 1).cast::<Strings>();
        execve(path, argv, *environment)
    }
}

/// Defines a variadic function: the arguments after the first become a list in memory, which those
/// on the stack, above the return address, continue.
macro_rules! variadic {
    ($($name:ident => $list:ident;)*) => { $(
        /// As the C library's.
        ///
        /// # Safety
        /// As above.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() {
            core::arch::naked_asm!(
                "pop rax", // the return address
                "push r9",
                "push r8",
                "push rcx",
                "push rdx",
                "push rsi",
                "mov rsi, rsp",
                "push rax", // the stack is aligned
                "call {list}",
                "pop rdx",
                "add rsp, 40",
                "push rdx",
                "ret",
                list = sym $list,
            )
        }
    )* };
}

variadic! {
    execl => execv;
    execlp => execvp;
    execle => execle_list;
}

/// The arguments of `posix_spawn` between the pid and the arguments of the program.
type Spawn = unsafe extern "C" fn(
    *mut pid_t,
    *const c_char,
    *const c_void,
    *const c_void,
    Strings,
    Strings,
) -> c_int;

/// `posix_spawn(3)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawn(
    pid: *mut pid_t,
    path: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: Strings,
    envp: Strings,
) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let next: Spawn = mem::transmute(POSIX_SPAWN.address());
        with_library(envp, |envp| {
            next(pid, path, actions, attributes, argv, envp)
        })
    }
}

/// `posix_spawnp(3)`.
///
/// # Safety
/// As above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_spawnp(
    pid: *mut pid_t,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: Strings,
    envp: Strings,
) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let next: Spawn = mem::transmute(POSIX_SPAWNP.address());
        with_library(envp, |envp| {
            next(pid, file, actions, attributes, argv, envp)
        })
    }
}

unsafe extern "C" {
    static environ: Strings;
}
