//! System calls and functions of the C library that need more than a line to use.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use migshm_protocol::call::Errno;
use migshm_protocol::ids::PAGE_SIZE;

use crate::kernel::kernel;

unsafe extern "C" {
    fn secure_getenv(name: *const c_char) -> *const c_char;
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}

/// The calling thread's `errno`.
pub fn errno() -> Errno {
    // SAFETY: the location is the thread's own, always valid.
    Errno(unsafe { *libc::__errno_location() })
}

/// Sets the calling thread's `errno`.
pub fn set_errno(errno: Errno) {
    // SAFETY: as in `errno`.
    unsafe { *libc::__errno_location() = errno.0 }
}

/// Turns a result of -1 into `errno`.
pub fn check<T: PartialEq + From<i8>>(result: T) -> Result<T, Errno> {
    if result == T::from(-1) {
        Err(errno())
    } else {
        Ok(result)
    }
}

/// An environment variable that is set and not empty. libc's own lookup, since std's takes a lock;
/// and nothing in a set-uid program, whose environment is not to be trusted.
pub fn env(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: `name` is a C string. What is returned lives until the program changes its
    // environment, which it may not do while another thread reads it (`environ(7)`).
    let value = unsafe {
        let value = secure_getenv(name.as_ptr());
        if value.is_null() {
            return None;
        }
        CStr::from_ptr(value)
    };
    (!value.is_empty()).then_some(value)
}

/// Takes ownership of a descriptor that a system call has just made.
pub fn own(result: Result<usize, Errno>) -> Result<OwnedFd, Errno> {
    // SAFETY: the descriptor is new, so nobody else owns it.
    result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The effective user and group that the kernel, and so the daemon, knows.
pub fn effective_user() -> (u32, u32) {
    let id = |result: Result<usize, Errno>| result.map_or(u32::MAX, |id| id as u32);
    // SAFETY: no preconditions; neither can fail.
    unsafe { (id(kernel!(SYS_geteuid)), id(kernel!(SYS_getegid))) }
}

/// This process.
pub fn pid() -> libc::pid_t {
    // SAFETY: no preconditions; it cannot fail.
    unsafe { kernel!(SYS_getpid) }.map_or(0, |pid| pid as libc::pid_t)
}

/// Opens a file, with the mode 0600 if that makes it.
///
/// # Errors
/// Those of `open(2)`.
pub fn open(path: &CStr, flags: c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: a C string.
    own(unsafe { kernel!(SYS_open, path.as_ptr(), flags, 0o600) })
}

/// Moves a descriptor to where programs do not expect one: out of the low numbers that shells and
/// daemons assign by hand, but below 1024.
pub fn move_high(fd: OwnedFd) -> OwnedFd {
    const TOP: u64 = 1024;
    const RESERVED: u64 = 160;
    let mut limit = libc::rlimit {
        rlim_cur: TOP,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid out pointer; F_DUPFD_CLOEXEC takes plain numbers.
    let high = unsafe {
        let _ = kernel!(SYS_getrlimit, libc::RLIMIT_NOFILE, &raw mut limit);
        let lowest = limit.rlim_cur.min(TOP);
        let lowest = lowest.saturating_sub(RESERVED).max(lowest / 2);
        kernel!(
            SYS_fcntl,
            fd.as_raw_fd(),
            libc::F_DUPFD_CLOEXEC,
            lowest as c_int
        )
    };
    own(high).unwrap_or(fd)
}

/// A socket's identity: device and inode, which no other open socket has.
pub fn identity(fd: RawFd) -> Option<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` is a valid out pointer, and initialised if the call succeeds.
    let stat = unsafe {
        kernel!(SYS_fstat, fd, stat.as_mut_ptr()).ok()?;
        stat.assume_init()
    };
    Some((stat.st_dev, stat.st_ino))
}

/// Maps private zeroed memory that a fork child sees as zeros again (`MADV_WIPEONFORK`), and
/// touches none of it.
pub fn map_wiped(length: usize) -> Result<*mut c_void, Errno> {
    let memory = map_private(length)?;
    // SAFETY: the range was mapped just now.
    if let Err(errno) = check(unsafe { libc::madvise(memory, length, libc::MADV_WIPEONFORK) }) {
        unmap(memory, length);
        return Err(errno);
    }
    Ok(memory)
}

/// Maps private zeroed memory.
pub fn map_private(length: usize) -> Result<*mut c_void, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    unsafe { mmap(0, length, protection, flags, -1, 0) }.map(|memory| memory as *mut c_void)
}

/// Unmaps what one of the above mapped, when no reference into it is left.
pub fn unmap(memory: *mut c_void, length: usize) {
    // SAFETY: the callers pass mappings of their own that nothing refers to any more.
    let _ = unsafe { munmap(memory as usize, length) };
}

/// Maps a file's start shared, writable.
///
/// # Errors
/// Those of `mmap(2)`.
pub fn map_shared(fd: RawFd, length: usize) -> Result<usize, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    unsafe { mmap(0, length, protection, libc::MAP_SHARED, fd, 0) }
}

/// Replaces whatever is mapped in a range of whole pages by nothing that can be accessed.
///
/// # Safety
/// As for [`munmap`].
///
/// # Errors
/// Those of `mmap(2)`.
pub unsafe fn reserve_over(address: usize, length: usize) -> Result<(), Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: by the caller.
    unsafe { mmap(address, length, libc::PROT_NONE, flags, -1, 0) }.map(drop)
}

/// The kernel's `mmap(2)`, past our own.
///
/// # Safety
/// With `MAP_FIXED`, as for [`munmap`].
///
/// # Errors
/// Those of the manual page.
pub unsafe fn mmap(
    address: usize,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Result<usize, Errno> {
    // SAFETY: by the caller.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            address,
            length,
            protection,
            flags,
            fd,
            offset,
        )
    };
    check(result).map(|address| address as usize)
}

/// The kernel's `mprotect(2)`, past our own; `pkey_mprotect(2)` with a key.
///
/// # Safety
/// Nothing may rely on the protection that the range has, as the caller or the program vouches.
///
/// # Errors
/// Those of the manual page.
pub unsafe fn mprotect(
    address: usize,
    length: usize,
    protection: c_int,
    key: Option<c_int>,
) -> Result<(), Errno> {
    // SAFETY: by the caller.
    check(unsafe {
        match key {
            None => libc::syscall(libc::SYS_mprotect, address, length, protection),
            Some(key) => libc::syscall(libc::SYS_pkey_mprotect, address, length, protection, key),
        }
    })
    .map(drop)
}

/// The kernel's `mremap(2)`, past our own.
///
/// # Safety
/// As for [`munmap`], of the range that is left, and with `MREMAP_FIXED` that which is taken.
///
/// # Errors
/// Those of the manual page.
pub unsafe fn mremap(
    address: usize,
    length: usize,
    new_length: usize,
    flags: c_int,
    new_address: usize,
) -> Result<usize, Errno> {
    // SAFETY: by the caller.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mremap,
            address,
            length,
            new_length,
            flags,
            new_address,
        )
    };
    check(result).map(|address| address as usize)
}

/// The kernel's `munmap(2)`, past our own.
///
/// # Safety
/// Nothing may refer into the range, as the caller or the program vouches.
///
/// # Errors
/// Those of the manual page.
pub unsafe fn munmap(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: by the caller.
    unsafe { kernel!(SYS_munmap, address, length) }.map(drop)
}

/// Plain C data: any bytes are a value, and it has no padding that would leak memory.
///
/// # Safety
/// That must be true of the type.
pub unsafe trait Plain: Copy {}

// SAFETY: two longs.
unsafe impl Plain for libc::timespec {}
// SAFETY: bytes.
unsafe impl<const N: usize> Plain for [u8; N] {}

/// Reads a value at an address that the program gave, which may be any number.
///
/// # Errors
/// `EFAULT` if the address cannot be read.
pub fn copy_in<T: Plain>(address: usize) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::uninit();
    let local = libc::iovec {
        iov_base: value.as_mut_ptr().cast(),
        iov_len: size_of::<T>(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut c_void,
        iov_len: size_of::<T>(),
    };
    // SAFETY: `local` is a valid buffer; the kernel checks `remote`.
    let copied = unsafe {
        kernel!(
            SYS_process_vm_readv,
            pid(),
            &raw const local,
            1,
            &raw const remote,
            1,
            0
        )
    };
    if copied == Ok(size_of::<T>()) {
        // SAFETY: all of its bytes were written, and any bytes are a `T`.
        return Ok(unsafe { value.assume_init() });
    }
    if copy_refused(copied) && address != 0 {
        // SAFETY: where the kernel cannot copy for us, a bad pointer crashes, as it may in C.
        return Ok(unsafe { ptr::read_unaligned(address as *const T) });
    }
    Err(Errno::EFAULT)
}

/// As [`copy_in`], of a few bytes, which cost no system call where a page has been read before that
/// way. A program crashes if such a page has become unreadable since then past the library's
/// functions that change mappings, as by `free` of a large block.
///
/// # Errors
/// `EFAULT` if the address cannot be read.
pub fn copy_in_small<const N: usize>(address: usize) -> Result<[u8; N], Errno> {
    let pages = [address, address.wrapping_add(N - 1)].map(|byte| byte / PAGE_SIZE);
    let slots = pages.map(|page| &READABLE[page % READABLE.len()]);
    if (0..2).all(|i| slots[i].load(Ordering::Relaxed) == pages[i]) {
        // SAFETY: the pages could be read when they were noted, and were not unmapped since.
        return Ok(unsafe { ptr::read_volatile(address as *const [u8; N]) });
    }
    let value = copy_in(address)?;
    for (slot, page) in slots.into_iter().zip(pages) {
        slot.store(page, Ordering::Relaxed);
    }
    Ok(value)
}

/// Numbers of pages that could be read.
static READABLE: [AtomicUsize; 8] = [const { AtomicUsize::new(NO_PAGE) }; 8];
const NO_PAGE: usize = usize::MAX;

/// Notes that pages may not be readable any more.
pub fn forget_readable() {
    for slot in &READABLE {
        slot.store(NO_PAGE, Ordering::Relaxed);
    }
}

/// Writes a value to an address that the program gave, which may be any number.
///
/// # Errors
/// `EFAULT` if the address cannot be written.
pub fn copy_out<T: Plain>(value: &T, address: usize) -> Result<(), Errno> {
    let local = libc::iovec {
        iov_base: ptr::from_ref(value).cast_mut().cast(),
        iov_len: size_of::<T>(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut c_void,
        iov_len: size_of::<T>(),
    };
    // SAFETY: `local` is only read; the kernel checks `remote`.
    let copied = unsafe {
        kernel!(
            SYS_process_vm_writev,
            pid(),
            &raw const local,
            1,
            &raw const remote,
            1,
            0
        )
    };
    if copied == Ok(size_of::<T>()) {
        return Ok(());
    }
    if copy_refused(copied) && address != 0 {
        // SAFETY: as in `copy_in`; the program gave the address for this.
        unsafe { ptr::write_unaligned(address as *mut T, *value) };
        return Ok(());
    }
    Err(Errno::EFAULT)
}

/// Whether `process_vm_*` does not exist here, or a sandbox forbids it.
fn copy_refused(copied: Result<usize, Errno>) -> bool {
    matches!(copied, Err(Errno::ENOSYS | Errno::EPERM))
}

/// All signals blocked in this thread until dropped.
pub struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    pub fn new() -> SignalsBlocked {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: both are valid out pointers, initialised by the calls, which cannot fail.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
            SignalsBlocked(before.assume_init())
        }
    }
}

impl SignalsBlocked {
    /// Lets signals in again; whether a handler has run thereby. (One that is ignored may be
    /// pending too.)
    pub fn unblock(self) -> bool {
        signals_of(self.pending()).any(has_handler)
    }

    /// Has the kernel forget signals that were ignored had they not been blocked: to let them in
    /// ends a wait with `EINTR`.
    pub fn forget_ignored(&self) {
        let pending = self.pending();
        if pending != 0 && !signals_of(pending).any(has_handler) {
            let mut all = MaybeUninit::uninit();
            // SAFETY: restores the mask that was saved, and blocks all again.
            unsafe {
                libc::sigfillset(all.as_mut_ptr());
                libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut());
                libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), ptr::null_mut());
            }
        }
    }

    /// The signals that wait to be let in, as the kernel's set.
    fn pending(&self) -> u64 {
        let mut pending = 0_u64;
        // SAFETY: a live word, as long as the kernel is told.
        let looked = unsafe { kernel!(SYS_rt_sigpending, &raw mut pending, KERNEL_SIGSET_SIZE) };
        // SAFETY: the kernel's set is the beginning of libc's.
        let blocked = unsafe { ptr::from_ref(&self.0).cast::<u64>().read() };
        looked.map_or(0, |_| pending & !blocked)
    }
}

fn signals_of(set: u64) -> impl Iterator<Item = c_int> {
    (1..=u64::BITS as c_int).filter(move |signal| set >> (signal - 1) & 1 != 0)
}

fn has_handler(signal: c_int) -> bool {
    // The kernel's `struct sigaction`: the handler, flags, restorer, mask.
    let mut action = [0_usize; 4];
    let none: *const usize = ptr::null();
    // SAFETY: no action is given, and there is room for the present one.
    let looked = unsafe {
        kernel!(
            SYS_rt_sigaction,
            signal,
            none,
            action.as_mut_ptr(),
            KERNEL_SIGSET_SIZE
        )
    };
    looked.is_ok() && ![libc::SIG_DFL, libc::SIG_IGN].contains(&action[0])
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: restores the mask that was saved.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}

/// The size of the kernel's signal sets, which are smaller than libc's.
const KERNEL_SIGSET_SIZE: usize = size_of::<u64>();

/// Closes a descriptor. Not libc's function, which is a cancellation point.
pub fn close(descriptor: OwnedFd) {
    // SAFETY: nobody else has the descriptor.
    let _ = unsafe { kernel!(SYS_close, descriptor.into_raw_fd()) };
}

/// Waits until a descriptor can be read, a handler of a signal runs that was not blocked before, or
/// the timeout is over, when it gives 0. Not libc's function, which is a cancellation point.
pub fn poll(
    fd: RawFd,
    mut timeout: Option<libc::timespec>,
    signals: &SignalsBlocked,
) -> Result<usize, Errno> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: valid pointers; the kernel reads as much of the mask as it is told.
    unsafe {
        kernel!(
            SYS_ppoll,
            &raw mut poll,
            1,
            pointer_to(&mut timeout),
            &raw const signals.0,
            KERNEL_SIGSET_SIZE,
        )
    }
}

/// An epoll descriptor that says when `fd` can be read.
pub fn epoll_of(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: takes its argument by value.
    let epoll = own(unsafe { kernel!(SYS_epoll_create1, libc::EPOLL_CLOEXEC) })?;
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 0,
    };
    // SAFETY: `event` is only read.
    unsafe {
        kernel!(
            SYS_epoll_ctl,
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            fd,
            &raw mut event
        )
    }?;
    Ok(epoll)
}

/// As [`poll`], of what an epoll descriptor watches; a stop and continuation end the wait too, with
/// `EINTR`.
pub fn epoll_wait(
    epoll: &OwnedFd,
    mut timeout: Option<libc::timespec>,
    signals: &SignalsBlocked,
) -> Result<usize, Errno> {
    let mut event = MaybeUninit::<libc::epoll_event>::uninit();
    // SAFETY: as in `poll`.
    unsafe {
        kernel!(
            SYS_epoll_pwait2,
            epoll.as_raw_fd(),
            event.as_mut_ptr(),
            1,
            pointer_to(&mut timeout),
            &raw const signals.0,
            KERNEL_SIGSET_SIZE,
        )
    }
}

fn pointer_to<T>(value: &mut Option<T>) -> *mut T {
    value.as_mut().map_or(ptr::null_mut(), ptr::from_mut)
}

/// No cancellation of this thread until dropped: `pthread_cancel` would unwind through us.
pub struct CancellationOff(c_int);

impl CancellationOff {
    pub fn new() -> CancellationOff {
        const PTHREAD_CANCEL_DISABLE: c_int = 1;
        let mut before = 0;
        // SAFETY: `before` is a valid out pointer.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &mut before) };
        CancellationOff(before)
    }
}

impl Drop for CancellationOff {
    fn drop(&mut self) {
        // SAFETY: restores the state that was saved.
        unsafe { pthread_setcancelstate(self.0, ptr::null_mut()) };
    }
}

/// Now, on the clock that timeouts are measured by.
pub fn monotonic() -> libc::timespec {
    let mut now = NO_TIME;
    // SAFETY: `now` is a valid out pointer.
    let _ = unsafe { kernel!(SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now) };
    now
}

/// Now, on a clock that the C library reads without a system call.
pub fn vdso_time(clock: libc::clockid_t) -> libc::timespec {
    let mut now = NO_TIME;
    // SAFETY: `now` is a valid out pointer.
    unsafe { libc::clock_gettime(clock, &mut now) };
    now
}

const NO_TIME: libc::timespec = libc::timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Lets others run on this processor, if any want to.
pub fn yield_processor() {
    // SAFETY: no preconditions; it cannot fail.
    let _ = unsafe { kernel!(SYS_sched_yield) };
}

/// A time in whole nanoseconds.
pub fn nanoseconds(time: libc::timespec) -> u64 {
    (time.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec as u64)
}

/// A time in whole milliseconds.
pub fn milliseconds(time: libc::timespec) -> u64 {
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}
