//! Operations on semaphore sets that are delegated to this node, done in their memory without a
//! call; see `migshm_semaphores`.
//!
//! The memory of the sets that the process uses is listed in wiped memory (see `process`): a fork
//! child lists its own. It inherits the parent's mappings all the same, as it may begin in a signal
//! handler that interrupted an operation, and go on with that. A thread that uses an entry is counted in it, in the same word that says
//! what the entry is, so that its memory stays mapped; there is nothing to lock. A thread that
//! leaves an operation by `longjmp` leaves the entry in use for good, and costs no more than that.
//!
//! # An operation that has to wait
//!
//! The thread looks at the memory for a while ([`POLLED`]) before it asks the daemon, which closes
//! the memory for everybody. It is in no queue meanwhile: it is as if the call began later. Between
//! two looks it yields the processor, so that whoever it waits for can run if both share one.
//! Signals are blocked: a handler that would have ended the wait runs after it, and ends it
//! (`EINTR`). Where polling does not pay it is done ever more seldom ([`Polling`]).

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use libc::timespec;
use migshm_protocol::call::{Errno, SemBuf, SetMemory, SharedSet};
use migshm_semaphores::{Layout, Moment, Operator, Outcome, Set};

use crate::polling::Polling;
use crate::process::{self, Wiped};
use crate::sys::{self, SignalsBlocked};

/// Sets that a process can use so at once.
const ENTRIES_COUNT: usize = 64;
/// Entries that a set may be in, counted from the one that its id names.
const PROBES: usize = 4;

/// Fields of [`Entry::control`]: the number of threads in it, marks, the set's id.
const USERS: u64 = 0xffff;
/// The entry is that of a set.
const READY: u64 = 1 << 16;
/// A thread is filling or emptying it.
const BUSY: u64 = 1 << 17;
/// It is emptied by the last thread that leaves it.
const RETIRED: u64 = 1 << 18;
const ID_SHIFT: u32 = 32;

const NO_SEAT: u32 = u32::MAX;

/// For how long a wait is polled, in nanoseconds: about what it costs to ask the daemon.
const POLLED: u64 = 60_000;
/// Time after which a wait that was polled should not have been, however it ended, in nanoseconds:
/// others compute on this processor, and run on when a thread yields.
const LATE: u64 = 500_000;
/// Semaphores of a set whose waits are told apart.
const POLLINGS: usize = 8;

/// The sets in whose memory this process operates. Zeros: none.
pub struct Entries {
    entries: [Entry; ENTRIES_COUNT],
    /// Whether a thread is adding one.
    adding: AtomicBool,
}

struct Entry {
    control: AtomicU64,
    address: AtomicUsize,
    semaphores: AtomicU32,
    seat: AtomicU32,
    pid: AtomicI32,
    /// Whether a thread operates from the seat.
    seated: AtomicBool,
    /// By semaphore.
    polling: [Polling; POLLINGS],
}

/// A set's entry, which stays as it is meanwhile.
struct Use<'a>(&'a Entry);

/// Does a call of one operation, which is at an address that the program gave, if that can be done
/// without waiting for long; until `deadline` at most, on the monotonic clock. `None` if the daemon
/// has to be asked.
pub fn operate(
    own: &'static Wiped,
    id: i32,
    address: usize,
    deadline: Option<timespec>,
) -> Option<Result<isize, Errno>> {
    let entry = own.sets.enter(id)?;
    // A bad address is noticed when the daemon is asked.
    let operation = SemBuf::from_bytes(sys::copy_in_small(address).ok()?);
    let may_wait = i32::from(operation.flags) & libc::IPC_NOWAIT == 0;
    let mut outcome = entry.attempt(operation);
    if may_wait && has_to_wait(outcome) {
        let polling = &entry.0.polling[usize::from(operation.num) % POLLINGS];
        if polling.is_due() {
            let signals;
            (outcome, signals) = entry.poll(polling, operation, deadline);
            // A handler may leave by `longjmp`.
            drop(entry);
            if outcome != Outcome::Done && signals.unblock() {
                return Some(Err(Errno::EINTR));
            }
        }
    }
    match outcome {
        Outcome::Done => Some(Ok(0)),
        Outcome::WouldWait if !may_wait => Some(Err(Errno::EAGAIN)),
        Outcome::WouldWait | Outcome::MayWait | Outcome::Ask => None,
    }
}

fn has_to_wait(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::WouldWait | Outcome::MayWait)
}

/// What to say of the set's memory in a call.
pub fn memory_of(own: &'static Wiped, id: i32) -> SetMemory {
    if let Some(entry) = own.sets.enter(id) {
        if entry.set().is_some_and(|set| !set.is_retired()) {
            return SetMemory::Mapped;
        }
        entry.retire();
    }
    if own.sets.of(id).any(Entry::is_free) {
        SetMemory::Wanted
    } else {
        SetMemory::Unusable
    }
}

/// Maps a set's memory for the operations that follow. If that cannot be done, they are calls as
/// before.
pub fn add(own: &'static Wiped, id: i32, shared: SharedSet, memory: OwnedFd) {
    // Two entries for one set would have two threads in one seat.
    if !own.sets.adding.swap(true, Ordering::Acquire) {
        own.sets.add(id, shared, &memory);
        own.sets.adding.store(false, Ordering::Release);
    }
    sys::close(memory);
}

/// Has all sets be asked for again, as the process may have become one that may not alter them.
pub fn forget() {
    if let Some(own) = process::started() {
        own.sets.entries.iter().for_each(Entry::retire);
    }
}

impl Entries {
    /// The entries that a set may be in.
    fn of(&self, id: i32) -> impl Iterator<Item = &Entry> {
        (0..PROBES).map(move |probe| &self.entries[(id as usize + probe) % ENTRIES_COUNT])
    }

    fn enter(&self, id: i32) -> Option<Use<'_>> {
        self.of(id).find_map(|entry| entry.enter(id))
    }

    fn add(&self, id: i32, shared: SharedSet, memory: &OwnedFd) {
        // Nor may there be one that a thread is still in, from before the process became another user.
        let of_set = |entry: &Entry| {
            let control = entry.control.load(Ordering::Relaxed);
            control >> ID_SHIFT == u64::from(id.cast_unsigned()) && control & READY != 0
        };
        if self.of(id).any(of_set) {
            return;
        }
        let Some(layout) = Layout::of(shared.semaphores as usize) else {
            return;
        };
        let claim = |entry: &&Entry| {
            entry
                .control
                .compare_exchange(0, BUSY, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let Some(entry) = self.of(id).find(claim) else {
            return;
        };
        let Ok(address) = sys::map_shared(memory.as_raw_fd(), length_of(layout)) else {
            entry.control.fetch_xor(BUSY, Ordering::Release);
            return;
        };
        entry.address.store(address, Ordering::Relaxed);
        entry.semaphores.store(shared.semaphores, Ordering::Relaxed);
        entry
            .seat
            .store(shared.seat.unwrap_or(NO_SEAT), Ordering::Relaxed);
        entry.pid.store(shared.pid, Ordering::Relaxed);
        entry.seated.store(false, Ordering::Relaxed);
        for polling in &entry.polling {
            polling.reset();
        }
        let id = u64::from(id.cast_unsigned()) << ID_SHIFT;
        entry
            .control
            .fetch_xor(BUSY | READY | id, Ordering::Release);
    }
}

impl Entry {
    /// Whether it is empty, or is now because its set is gone.
    fn is_free(&self) -> bool {
        let control = self.control.load(Ordering::Relaxed);
        if control & READY != 0
            && let Some(entry) = self.enter((control >> ID_SHIFT) as i32)
        {
            if !entry.set().is_some_and(|set| set.is_retired()) {
                return false;
            }
            entry.retire();
        }
        self.control.load(Ordering::Relaxed) == 0
    }

    /// Uses it, if it is that of a set.
    fn enter(&self, id: i32) -> Option<Use<'_>> {
        if !is_of(id, self.control.load(Ordering::Relaxed)) {
            return None;
        }
        let entered = Use(self);
        is_of(id, self.control.fetch_add(1, Ordering::Acquire)).then_some(entered)
    }

    /// Has the last thread that uses the entry empty it.
    fn retire(&self) {
        let retire = |control: u64| (control & READY != 0).then_some(control | RETIRED);
        let retired = self
            .control
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, retire);
        if retired.is_ok() {
            self.empty();
        }
    }

    /// Empties an entry that is retired and not in use.
    fn empty(&self) {
        let claim = |control: u64| {
            (control & (USERS | BUSY | RETIRED) == RETIRED).then_some(control | BUSY)
        };
        let claimed = self
            .control
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, claim);
        if claimed.is_err() {
            return;
        }
        if let Some(layout) = self.layout() {
            let address = self.address.load(Ordering::Relaxed);
            sys::unmap(address as *mut _, length_of(layout));
        }
        // Threads that are about to find that it is not theirs stay counted.
        self.control.fetch_and(USERS, Ordering::Release);
    }

    fn layout(&self) -> Option<Layout> {
        Layout::of(self.semaphores.load(Ordering::Relaxed) as usize)
    }
}

impl Use<'_> {
    fn set(&self) -> Option<Set<'_>> {
        let layout = self.0.layout()?;
        let address = self.0.address.load(Ordering::Relaxed) as *const AtomicU64;
        // SAFETY: the mapping is that long, and stays while the entry is in use; everybody accesses
        // it atomically.
        let words = unsafe { std::slice::from_raw_parts(address, layout.words()) };
        Set::new(words, layout)
    }

    /// Tries an operation.
    fn attempt(&self, operation: SemBuf) -> Outcome {
        let undo = i32::from(operation.flags) & libc::SEM_UNDO != 0;
        let now = Moment {
            seconds: sys::vdso_time(libc::CLOCK_REALTIME_COARSE).tv_sec,
            boottime: sys::milliseconds(sys::vdso_time(libc::CLOCK_BOOTTIME)),
        };
        let Some(set) = self.set() else {
            return Outcome::Ask;
        };
        let seat = if undo { self.sit() } else { None };
        let who = Operator {
            pid: self.0.pid.load(Ordering::Relaxed),
            seat,
        };
        let outcome = set.operate(who, operation.num.into(), operation.op, undo, now);
        if seat.is_some() {
            self.0.seated.store(false, Ordering::Release);
        }
        outcome
    }

    /// Tries an operation that has to wait, for a while. Signals are blocked from then on.
    fn poll(
        &self,
        polling: &Polling,
        operation: SemBuf,
        deadline: Option<timespec>,
    ) -> (Outcome, SignalsBlocked) {
        let signals = SignalsBlocked::new();
        let start = sys::nanoseconds(sys::monotonic());
        let patience = deadline.map_or(POLLED, |deadline| {
            sys::nanoseconds(deadline).saturating_sub(start).min(POLLED)
        });
        loop {
            sys::yield_processor();
            let outcome = self.attempt(operation);
            let elapsed = sys::nanoseconds(sys::monotonic()) - start;
            if outcome == Outcome::Done {
                polling.note(elapsed < LATE);
                return (outcome, signals);
            }
            if !has_to_wait(outcome) || elapsed >= patience {
                polling.note(false);
                return (outcome, signals);
            }
        }
    }

    /// The process's seat, if it has one that no other thread is in.
    fn sit(&self) -> Option<usize> {
        let seat = self.0.seat.load(Ordering::Relaxed);
        let free = seat != NO_SEAT && !self.0.seated.swap(true, Ordering::Acquire);
        free.then_some(seat as usize)
    }

    fn retire(&self) {
        self.0.retire();
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        let before = self.0.control.fetch_sub(1, Ordering::Release);
        if before & (USERS | RETIRED) == 1 | RETIRED {
            self.0.empty();
        }
    }
}

/// Whether a control word is that of a set that can be used.
fn is_of(id: i32, control: u64) -> bool {
    control >> ID_SHIFT == u64::from(id.cast_unsigned())
        && control & (READY | BUSY | RETIRED) == READY
}

fn length_of(layout: Layout) -> usize {
    layout.words() * size_of::<AtomicU64>()
}
