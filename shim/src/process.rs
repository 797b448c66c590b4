//! All state of the library, and what becomes of it when the process forks.
//!
//! | state | in a fork child (`fork` or a raw `clone`) | after `execve` |
//! |---|---|---|
//! | [`Wiped`]: claims of pool slots, "introduced", "anchoring", sets in memory, what polling has paid | zeros, as in a fresh process | gone |
//! | the pool's descriptors (`pool::SLOTS`) | the parent's: closed at the first call, never used | closed |
//! | the anchor's address (`anchor::ANCHOR`), the userfaultfd | stay: the mappings and their registration are inherited | gone |
//! | [`ATTACHES`], [`REACH`], [`READ_ONLY`], [`LAST_PID`] | stay: the attaches are inherited, and the parent is who made them | gone |
//! | the runtime directory (`directory::CHOSEN`) | stays: a process and its children never change node | chosen anew |
//!
//! No `getpid` tells whether we are in a child: the kernel itself clears the pages marked
//! `MADV_WIPEONFORK` in any new copy of the address space. Everything that belongs to one process
//! lives in such pages, so in a child it is not reset but was never set; there is no moment at
//! which the state is half reset, and nothing to lock. A `vfork` child shares its parent's memory
//! and therefore counts as its parent, until it executes another program.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use migshm_protocol::call::Errno;
use once_cell::race::OnceNonZeroUsize;

use crate::polling::Polling;
use crate::pool::SLOTS_COUNT;
use crate::{anchor, client, delegated, pool, sys};

/// What belongs to one process alone. All zeros is the state of a new process.
pub struct Wiped {
    /// Whether descriptors inherited from the parent's pool have been closed.
    swept: AtomicBool,
    /// Whether the daemon has been told whose attaches this process inherited.
    pub introduced: AtomicBool,
    /// Whether a thread is anchoring the address space.
    pub anchoring: AtomicBool,
    /// Who has which slot of the pool; see `pool`.
    pub claims: [AtomicU32; SLOTS_COUNT],
    /// Semaphore sets in memory.
    pub sets: delegated::Entries,
    /// Of answers to calls that do not block.
    pub answers: Polling,
    /// Of answers to those that may.
    pub late_answers: Polling,
}

/// Address of the [`Wiped`] pages, once mapped.
static WIPED: OnceNonZeroUsize = OnceNonZeroUsize::new();

/// Attaches in this address space, inherited ones included.
pub static ATTACHES: AtomicUsize = AtomicUsize::new(0);

/// Where attaches have ever been in this address space.
pub static REACH: Reach = Reach {
    start: AtomicUsize::new(usize::MAX),
    end: AtomicUsize::new(0),
};

/// Where attaches that the program made to read only (`SHM_RDONLY`) have ever been.
pub static READ_ONLY: Reach = Reach {
    start: AtomicUsize::new(usize::MAX),
    end: AtomicUsize::new(0),
};

/// The smallest range that covers all ranges included so far. It tells most calls of `munmap` and kin
/// from those that the daemon must hear of, at the price of two loads.
pub struct Reach {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl Reach {
    /// Widens it to cover `length` bytes from `address`.
    pub fn include(&self, address: usize, length: usize) {
        self.start.fetch_min(address, Ordering::Relaxed);
        self.end
            .fetch_max(address.saturating_add(length), Ordering::Relaxed);
    }

    /// Whether a range touches it.
    pub fn overlaps(&self, address: usize, length: usize) -> bool {
        address < self.end.load(Ordering::Relaxed)
            && self.start.load(Ordering::Relaxed) < address.saturating_add(length)
    }
}

/// The process that last said Hello in this address space or in the one it is a copy of.
static LAST_PID: AtomicI32 = AtomicI32::new(0);

/// Source of request ids.
static LAST_REQUEST: AtomicU64 = AtomicU64::new(0);

/// Number of a new request, unique among those that a connection sees.
pub fn request_id() -> u64 {
    LAST_REQUEST.fetch_add(1, Ordering::Relaxed) + 1
}

/// This process's own state, if it is mapped.
pub fn started() -> Option<&'static Wiped> {
    // SAFETY: the address is that of a mapping of this size that is never unmapped, page-aligned;
    // zeros are a valid `Wiped`, and it consists of atomics.
    WIPED
        .get()
        .map(|address| unsafe { &*(address.get() as *const Wiped) })
}

/// This process's own state; mapped at the first call.
///
/// # Errors
/// `ENOMEM`.
pub fn own() -> Result<&'static Wiped, Errno> {
    let own = match started() {
        Some(own) => own,
        None => {
            let memory = sys::map_wiped(size_of::<Wiped>())?;
            let address = (memory as usize).try_into().expect("mmap gives no null");
            if WIPED.set(address).is_err() {
                sys::unmap(memory, size_of::<Wiped>());
            }
            started().expect("set by this thread or a faster one")
        }
    };
    // Read first: a swap would cost more than all the rest.
    if !own.swept.load(Ordering::Relaxed) && !own.swept.swap(true, Ordering::Relaxed) {
        pool::sweep(own);
    }
    Ok(own)
}

/// Whether this thread is the only one of the process, as far as the C library knows.
pub fn has_one_thread() -> bool {
    unsafe extern "C" {
        static __libc_single_threaded: std::ffi::c_char;
    }
    // SAFETY: glibc defines it (sys/single_threaded.h), and changes it only while there is one
    // thread, and that one does so.
    unsafe { __libc_single_threaded != 0 }
}

/// What to say in `Hello::forked_from`: where the daemon does not see forks through userfaultfd,
/// the process that this one inherited attaches from, until the daemon has been told.
pub fn forked_from(own: &Wiped) -> i32 {
    let told = own.introduced.load(Ordering::Relaxed);
    if told || anchor::is_set() || ATTACHES.load(Ordering::Relaxed) == 0 {
        return 0;
    }
    LAST_PID.load(Ordering::Relaxed)
}

/// Notes that the daemon knows this process now.
pub fn introduced(own: &Wiped) {
    LAST_PID.store(sys::pid(), Ordering::Relaxed);
    own.introduced.store(true, Ordering::Relaxed);
}

/// Has forks call [`in_child`].
pub fn watch_forks() {
    // SAFETY: the handler stays in memory: a preloaded library is never unloaded. The only failure
    // is lack of memory; then the first call in a child does what the handler would have done.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

/// Tells the daemon about a child that has inherited attaches, so that they count and so that its
/// death is noticed, although it may never make a call.
extern "C" fn in_child() {
    if anchor::is_set() {
        anchor::introduce();
    } else if ATTACHES.load(Ordering::Relaxed) > 0 {
        let before = sys::errno();
        // Without a daemon there is nobody to tell, and a fork is no reason to start one.
        let _ = client::say_hello();
        sys::set_errno(before);
    }
}
