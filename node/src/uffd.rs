//! userfaultfd behind one small type: the only module that issues its ioctls.
//!
//! Constants and layouts are those of `linux/userfaultfd.h`; behaviour is described in
//! `ioctl_userfaultfd(2)` and `Documentation/admin-guide/mm/userfaultfd.rst`.

use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use migshm_protocol::ids::PAGE_SIZE;

use crate::handover::descriptor;
use crate::memory::Adjacent;

/// The device whose descriptors make userfaultfds that also handle faults in kernel mode.
pub const DEVICE: &str = "/dev/userfaultfd";

const API: u64 = 0xAA;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_THREAD_ID: u64 = 1 << 8;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_POISON: u64 = 1 << 14;

const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
const WRITEPROTECT_WP: u64 = 1 << 0;
const FAULT_WRITE: u64 = 1 << 0;
const FAULT_WP: u64 = 1 << 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;

/// Events read at once.
const BATCH: usize = 16;

const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;

const fn iowr(number: u64, size: usize) -> libc::c_ulong {
    (3 << 30) | ((size as u64) << 16) | (API << 8) | number
}
const fn ior(number: u64, size: usize) -> libc::c_ulong {
    (2 << 30) | ((size as u64) << 16) | (API << 8) | number
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}
/// `uffdio_zeropage` and `uffdio_poison`: the same layout.
#[repr(C)]
struct Fill {
    range: Range,
    mode: u64,
    done: i64,
}
#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}
#[repr(C)]
#[derive(Clone, std::marker::Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    arg: [u64; 3],
}

const IOC_API: libc::c_ulong = iowr(0x3F, size_of::<ApiArg>());
const IOC_REGISTER: libc::c_ulong = iowr(0x00, size_of::<Register>());
/// `UFFDIO_COPY_MODE_DONTWAKE`.
const COPY_MODE_DONTWAKE: u64 = 1;
const IOC_WAKE: libc::c_ulong = ior(0x02, size_of::<Range>());
const IOC_COPY: libc::c_ulong = iowr(0x03, size_of::<Copy>());
const IOC_ZEROPAGE: libc::c_ulong = iowr(0x04, size_of::<Fill>());
const IOC_WRITEPROTECT: libc::c_ulong = iowr(0x06, size_of::<WriteProtect>());
const IOC_POISON: libc::c_ulong = iowr(0x08, size_of::<Fill>());

/// What happened in an address space.
#[derive(Debug)]
pub enum Event {
    /// A thread touched a page that is missing or write-protected, and waits.
    Fault {
        /// Where, rounded down to the page.
        address: u64,
        /// Whether it wants to write.
        write: bool,
        /// The thread's id in its pid namespace.
        thread: i32,
    },
    /// The address space was forked; this watches the child's.
    Fork(Uffd),
    /// `mremap` moved a range.
    Remap {
        /// From where.
        from: u64,
        /// Where to.
        to: u64,
        /// Bytes.
        len: u64,
    },
}

/// What an ioctl on another process's memory came to.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq)]
pub enum Done {
    /// It took effect.
    Yes,
    /// The page was there already (`EEXIST`).
    Exists,
    /// The address space is being forked or remapped: read its events, then try again (`EAGAIN`).
    Busy,
    /// The range is not (any more) mapped and registered there (`ENOENT`, `EINVAL`).
    Unmapped,
    /// The address space is gone (`ESRCH`).
    Dead,
}

/// One address space's userfaultfd.
#[derive(Debug, Serialize, Deserialize)]
pub struct Uffd(#[serde(with = "descriptor")] OwnedFd);

impl Uffd {
    /// Opens [`DEVICE`].
    ///
    /// # Errors
    /// `ENOENT` on kernels before 6.1, `EACCES` without permission.
    pub fn device() -> io::Result<File> {
        File::options().read(true).write(true).open(DEVICE)
    }

    /// Makes a userfaultfd of the calling process's own address space.
    ///
    /// # Errors
    /// Those of `USERFAULTFD_IOC_NEW` and `UFFDIO_API`.
    pub fn own(device: &File) -> io::Result<Uffd> {
        let uffd = Uffd(Uffd::open(device)?);
        uffd.handshake(0)?;
        Ok(uffd)
    }

    fn open(device: &File) -> io::Result<OwnedFd> {
        // SAFETY: the ioctl takes flags by value and returns a new descriptor or -1.
        let fd = unsafe {
            libc::ioctl(
                device.as_raw_fd(),
                USERFAULTFD_IOC_NEW,
                libc::O_CLOEXEC | libc::O_NONBLOCK,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a descriptor that nothing else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Whether this process may do with `device` what [`Uffd::of_process`] does.
    ///
    /// # Errors
    /// Those of `USERFAULTFD_IOC_NEW` and `UFFDIO_API`.
    pub fn probe(device: &File) -> io::Result<()> {
        Uffd::of_process(Uffd::open(device)?).map(drop)
    }

    /// Takes over a userfaultfd that a process made of its own address space and sent here.
    ///
    /// # Errors
    /// Those of `UFFDIO_API`: `EPERM` if this process may not see forks (`CAP_SYS_PTRACE`),
    /// `EINVAL` if the kernel lacks a feature or `fd` is something else.
    pub fn of_process(fd: OwnedFd) -> io::Result<Uffd> {
        // Anything else could answer our ioctls and reads as it likes.
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let uffd = Uffd(fd);
        uffd.handshake(FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_THREAD_ID)?;
        uffd.set_nonblocking();
        Ok(uffd)
    }

    /// Who made it may not have set the flag, and a fork's descriptor has the flags of the first.
    fn set_nonblocking(&self) {
        // SAFETY: plain fcntl on an owned descriptor.
        unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    }

    fn handshake(&self, features: u64) -> io::Result<()> {
        let features =
            features | FEATURE_MISSING_SHMEM | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_POISON;
        let mut arg = ApiArg {
            api: API,
            features,
            ioctls: 0,
        };
        self.ioctl(IOC_API, &mut arg)
    }

    fn ioctl<T>(&self, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
        // SAFETY: every caller passes the structure that `request` encodes the size of.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(arg)) } < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Tracks missing pages and writes to protected pages of a shared mapping.
    ///
    /// # Errors
    /// Those of `UFFDIO_REGISTER`.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        self.register_mode(start, len, REGISTER_MISSING | REGISTER_WP)
    }

    /// Tracks only the first touch of a private page (and, by it, forks).
    ///
    /// # Errors
    /// Those of `UFFDIO_REGISTER`.
    pub fn register_missing(&self, start: u64, len: u64) -> io::Result<()> {
        self.register_mode(start, len, REGISTER_MISSING)
    }

    fn register_mode(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        self.ioctl(
            IOC_REGISTER,
            &mut Register {
                range: Range { start, len },
                mode,
                ioctls: 0,
            },
        )
    }

    /// Puts pages at `address`, each atomically. Who waits there goes on waiting.
    ///
    /// Returns how many took effect, and what became of the next one, if there is one.
    ///
    /// # Errors
    /// What [`Done`] does not cover, `ENOMEM` say, of the first page.
    pub fn copy(&self, address: u64, pages: Adjacent<'_>) -> io::Result<(u32, Done)> {
        let mut arg = Copy {
            dst: address,
            src: pages.address(),
            len: pages.length(),
            mode: COPY_MODE_DONTWAKE,
            copied: 0,
        };
        let done = done(self.ioctl(IOC_COPY, &mut arg))?;
        Ok((whole_pages(arg.copied), done))
    }

    /// Puts pages of zeros at `address` and wakes who waits there; returns as [`Uffd::copy`] does.
    ///
    /// # Errors
    /// What [`Done`] does not cover, of the first page.
    pub fn zero(&self, address: u64, pages: u32) -> io::Result<(u32, Done)> {
        let mut arg = Fill {
            range: Range {
                start: address,
                len: u64::from(pages) * PAGE_SIZE as u64,
            },
            mode: 0,
            done: 0,
        };
        let done = done(self.ioctl(IOC_ZEROPAGE, &mut arg))?;
        Ok((whole_pages(arg.done), done))
    }

    /// Makes any access to the page at `address` raise SIGBUS, and wakes who waits there.
    ///
    /// # Errors
    /// What [`Done`] does not cover.
    pub fn poison(&self, address: u64) -> io::Result<Done> {
        done(self.ioctl(
            IOC_POISON,
            &mut Fill {
                range: page_at(address),
                mode: 0,
                done: 0,
            },
        ))
    }

    /// Write-protects a range, present or not; or lifts that and wakes who waits.
    ///
    /// # Errors
    /// What [`Done`] does not cover.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<Done> {
        let mode = if on { WRITEPROTECT_WP } else { 0 };
        let range = Range { start, len };
        done(self.ioctl(IOC_WRITEPROTECT, &mut WriteProtect { range, mode }))
    }

    /// Wakes every thread that waits in a range.
    pub fn wake(&self, start: u64, len: u64) {
        // The only failure is a malformed range.
        let _ = self.ioctl(IOC_WAKE, &mut Range { start, len });
    }

    /// Whether the address space still exists, asked with the address of its anchor.
    #[must_use]
    pub fn alive(&self, anchor: u64) -> bool {
        !matches!(
            self.protect(anchor, PAGE_SIZE as u64, false),
            Ok(Done::Dead)
        )
    }

    /// Reads the events that are there, without blocking.
    ///
    /// # Errors
    /// Those of `read(2)` but `EAGAIN`, which is an empty answer. A fork for which there is no
    /// descriptor (`EMFILE`) stays to be read, behind what has been.
    pub fn events(&self, events: &mut Vec<Event>) -> io::Result<()> {
        // A batch also ends before what cannot be read: only the next one tells.
        while self.read_batch(events)? > 0 {}
        Ok(())
    }

    /// Reads up to [`BATCH`] events; returns how many.
    fn read_batch(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut messages = [Message {
            event: 0,
            reserved: [0; 7],
            arg: [0; 3],
        }; BATCH];
        let size = size_of_val(&messages);
        // SAFETY: the buffer has `size` bytes, and any bytes are a valid Message.
        let got = unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), size) };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock {
                Ok(0)
            } else {
                Err(error)
            };
        };
        let got = got / size_of::<Message>();
        for message in &messages[..got] {
            let [a, b, c] = message.arg;
            match message.event {
                EVENT_PAGEFAULT => events.push(Event::Fault {
                    address: b & !(PAGE_SIZE as u64 - 1),
                    write: a & (FAULT_WRITE | FAULT_WP) != 0,
                    #[allow(clippy::cast_possible_truncation, reason = "a 32-bit field")]
                    thread: c as u32 as i32,
                }),
                EVENT_FORK => {
                    #[allow(clippy::cast_possible_truncation, reason = "a 32-bit field")]
                    let fd = a as u32 as RawFd;
                    // SAFETY: reading the event made this descriptor for us.
                    let child = Uffd(unsafe { OwnedFd::from_raw_fd(fd) });
                    child.set_nonblocking();
                    events.push(Event::Fork(child));
                }
                EVENT_REMAP => events.push(Event::Remap {
                    from: a,
                    to: b,
                    len: c,
                }),
                _ => {}
            }
        }
        Ok(got)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Of bytes that the kernel says it has filled; a negative number is an error.
fn whole_pages(bytes: i64) -> u32 {
    u32::try_from(bytes).unwrap_or(0) / PAGE_SIZE as u32
}

fn page_at(start: u64) -> Range {
    Range {
        start,
        len: PAGE_SIZE as u64,
    }
}

fn done(result: io::Result<()>) -> io::Result<Done> {
    let Err(error) = result else {
        return Ok(Done::Yes);
    };
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(Done::Exists),
        Some(libc::EAGAIN) => Ok(Done::Busy),
        Some(libc::ENOENT | libc::EINVAL) => Ok(Done::Unmapped),
        Some(libc::ESRCH) => Ok(Done::Dead),
        _ => Err(error),
    }
}
