//! The daemon's side of an anchor: registers it, fills it at the first read, notes who read it,
//! and follows forks.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread;

use super::State;

const PAGE: u64 = 4096;

// `linux/userfaultfd.h`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_FORK: u8 = 0x13;

/// `struct uffd_msg`, with the arguments of a fault: flags, address, thread; or of a fork: the
/// child's userfaultfd.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    first: u64,
    address: u64,
    thread: u32,
    padding: u32,
}

/// Registers the anchor and serves its faults, and those of fork children, in threads.
pub fn watch(userfaultfd: OwnedFd, address: u64, pid: i32, state: Arc<Mutex<State>>) {
    let mut api = [
        UFFD_API,
        UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_THREAD_ID,
        0,
    ];
    let mut register = [address, PAGE, UFFDIO_REGISTER_MODE_MISSING, 0];
    // SAFETY: the arguments are laid out as the requests demand.
    unsafe {
        assert_eq!(
            libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()),
            0
        );
        assert_eq!(
            libc::ioctl(
                userfaultfd.as_raw_fd(),
                UFFDIO_REGISTER,
                register.as_mut_ptr()
            ),
            0,
            "the anchor of {pid} is registered once, by a full userfaultfd"
        );
    }
    thread::spawn(move || serve(userfaultfd, address, state));
}

fn serve(userfaultfd: OwnedFd, anchor: u64, state: Arc<Mutex<State>>) {
    let fd = userfaultfd.as_raw_fd();
    loop {
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut message = Message::default();
        // SAFETY: valid out pointers of the lengths given.
        let count = unsafe {
            libc::poll(&raw mut poll, 1, -1);
            libc::read(fd, (&raw mut message).cast(), size_of::<Message>())
        };
        if count != size_of::<Message>() as isize {
            if poll.revents & (libc::POLLHUP | libc::POLLERR) != 0 || count == 0 {
                return;
            }
            continue;
        }
        match message.event {
            UFFD_EVENT_PAGEFAULT => {
                assert_eq!(message.address & !(PAGE - 1), anchor);
                state.lock().unwrap().introduced.push(message.thread as i32);
                let page = [0x5a_u8; PAGE as usize];
                let mut copy = [anchor, page.as_ptr() as u64, PAGE, 0, 0];
                // SAFETY: the argument is laid out as the request demands.
                unsafe { libc::ioctl(fd, UFFDIO_COPY, copy.as_mut_ptr()) };
            }
            UFFD_EVENT_FORK => {
                // SAFETY: the kernel made the descriptor for us.
                let child = unsafe { OwnedFd::from_raw_fd(message.first as u32 as i32) };
                let state = state.clone();
                thread::spawn(move || serve(child, anchor, state));
            }
            _ => {}
        }
    }
}
