//! Makes this address space, and those of later fork children, known to the node daemon's page
//! tracking.
//!
//! The daemon watches accesses through a userfaultfd of the address space, which only a process
//! that lives in it can open. Before the first attach the shim opens one, hands it over, and names
//! one page, the *anchor*, which the daemon registers although no data is ever in it:
//!
//! - Being registered, the anchor makes every fork, also a raw `clone`, send the daemon a fork
//!   event with the child's own userfaultfd, whether or not a segment is tracked at the time.
//! - Being wiped on fork, it is missing in the child. The child's first read of it faults; the
//!   daemon sees the fault on the child's userfaultfd, with the id of the thread that read, and so
//!   learns which process the address space belongs to. It then fills the page, and later reads
//!   cost nothing. The read is done by a fork handler, or else at the child's first call. In a
//!   container the thread's id may be another one than the daemon's, which then learns it by the
//!   secret that it has put into the page: every greeting tells it.
//!
//! The shim keeps its copy of the userfaultfd: if the daemon's were the last one, the daemon's
//! death would let blocked faults resume on zero pages.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::utils::Backoff;
use migshm_protocol::call::Errno;
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::local::ToNode;

use crate::client::{Session, out_of_step};
use crate::connection::{Patience, Raw};
use crate::kernel::kernel;
use crate::{process, sys};

/// `USERFAULTFD_IOC_NEW`: `_IO(0xAA, 0x00)` of `linux/userfaultfd.h`.
const USERFAULTFD_IOC_NEW: u32 = 0xAA00;

/// Address of the anchor, once it is registered; 0 before. Inherited by fork children, as its
/// registration is.
static ANCHOR: AtomicUsize = AtomicUsize::new(0);

/// Whether the address space is anchored.
pub fn is_set() -> bool {
    ANCHOR.load(Ordering::Acquire) != 0
}

/// Introduces this process to the daemon, if its address space is anchored and it has not been.
/// Gives what the daemon has put into the anchor; 0 without one.
pub fn introduce() -> u64 {
    match ANCHOR.load(Ordering::Acquire) {
        0 => 0,
        // SAFETY: the anchor is mapped for good, and nobody writes to it but the kernel on the
        // daemon's behalf.
        anchor => unsafe { (anchor as *const u64).read_volatile() },
    }
}

/// Anchors the address space, if the daemon tracks and it has not been done.
pub fn ensure(session: &mut Session) -> Result<(), Errno> {
    if !session.tracks() || is_set() {
        return Ok(());
    }
    // A handler that attached in the midst of this would wait for the thread that it interrupted.
    let _signals = sys::SignalsBlocked::new();
    let _cancellation = sys::CancellationOff::new();
    let _turn = Turn::take(&process::own()?.anchoring);
    if is_set() { Ok(()) } else { establish(session) }
}

fn establish(session: &mut Session) -> Result<(), Errno> {
    // The device comes with a new connection only, as most processes never need it.
    let device = session.renew()?.ok_or_else(out_of_step)?;
    let userfaultfd = open(&device)?;
    let anchor = sys::map_wiped(PAGE_SIZE)?;
    let id = process::request_id();
    let message = ToNode::Anchor {
        id,
        address: anchor as u64,
    };
    let registered = session
        .tell(&message, Raw::NONE, Some(&userfaultfd))
        .and_then(|()| session.outcome(id, Patience::Endless));
    if let Err(errno) = registered {
        sys::unmap(anchor, PAGE_SIZE);
        return Err(errno);
    }
    // Open until the process ends or executes another program.
    let _ = userfaultfd.into_raw_fd();
    ANCHOR.store(anchor as usize, Ordering::Release);
    introduce();
    Ok(())
}

/// Opens a userfaultfd that handles the kernel's own accesses too, whatever our privileges: the
/// daemon's descriptor of the device conveys the right.
fn open(device: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags: c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes its flags by value.
    sys::own(unsafe { kernel!(SYS_ioctl, device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })
        .map(sys::move_high)
}

/// The one turn at anchoring that a process has.
struct Turn(&'static AtomicBool);

impl Turn {
    fn take(flag: &'static AtomicBool) -> Turn {
        let backoff = Backoff::new();
        while flag
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            if backoff.is_completed() {
                std::thread::sleep(Duration::from_millis(1));
            } else {
                backoff.snooze();
            }
        }
        Turn(flag)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
