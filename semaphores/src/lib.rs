//! A semaphore set in memory that the processes of one node share with its daemon: operations
//! that need not wait are done by the processes themselves, without a system call.
//!
//! The daemon *opens* the memory with a set's state that the coordinator has delegated to the
//! node, and *closes* it to get the state back. While it is closed, and for whatever is more than
//! one operation that succeeds or fails at once, processes ask the daemon ([`Outcome::Ask`]).
//!
//! They also do once the *lease* is over, which the daemon extends while it lives and the
//! coordinator counts it as a member: whatever becomes of them, no two nodes operate on one set.
//!
//! # One operation
//!
//! A semaphore is one word: its value, who changed it last, and a version. An operation is one
//! compare-and-swap of that word, so a process that is killed has done it or has not.
//!
//! With SEM_UNDO two words change, the semaphore and what the process owes to it (`semadj`).
//! Each process has a *seat* in the memory, which it uses for one operation at a time:
//!
//! 1. It writes its *intent* to the seat: semaphore, operation, number of the operation.
//! 2. It swaps the semaphore's word; the new one names the seat and is marked *unsettled*.
//! 3. It *settles*: it swaps the debt for the new one, which carries the operation's number, and
//!    then takes the mark off the semaphore.
//!
//! Who meets an unsettled semaphore settles it first, whoever left it so. A process that is killed
//! after step 2 thus has done the operation, one that is killed before has not. The number makes
//! the debt change once, however many processes settle at the same time: an intent is overwritten
//! only after its operation has been settled (for a program that another one is executed in place
//! of, the daemon sees to that: [`Set::complete`]), and who settles swaps a debt that he read before
//! he saw that the semaphore was still unsettled.
//!
//! # Trust
//!
//! Whoever may alter the set may write anything into the memory, at any time. Positions and lengths
//! come from [`Layout`], which the daemon tells; numbers that are read are checked before they are
//! used as positions; values are bounded when the set is closed. So a hostile process can spoil
//! its own set, as it can with `semctl`, and nothing else.
#![forbid(unsafe_code)]

mod word;

#[cfg(loom)]
mod atomic;

#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(loom)]
pub use atomic::{AtomicU64, Kill};
#[cfg(loom)]
use loom::sync::atomic::Ordering;

use migshm_protocol::limits::SEMVMX;

use word::{Debt, Intent, Semaphore};

/// Largest set that is shared in memory.
pub const SEMAPHORES_MAX: usize = 64;
/// Processes that can have a seat at once; others ask the daemon for operations with SEM_UNDO.
pub const SEATS: usize = if cfg!(loom) { 2 } else { 64 };

/// Positions in the memory, in 64-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    semaphores: usize,
}

/// Word that is not 0 once the memory will never be opened again.
const RETIRED: usize = 0;
/// Word with the time of the last operation (`sem_otime`), in seconds since the epoch.
const OTIME: usize = 1;
/// Word with the time until which the set is open, in milliseconds of `CLOCK_BOOTTIME`.
const LEASE: usize = 2;
/// Word with a bit for each seat that was used since the set was opened.
const DEBTORS: usize = 3;
/// First semaphore.
const SEMAPHORES: usize = 8;

/// Words of a seat before its debts: the pid, the intent.
const SEAT_PID: usize = 0;
const SEAT_INTENT: usize = 1;
const SEAT_DEBTS: usize = 2;

impl Layout {
    /// That of a set; `None` if it has no semaphore, or too many.
    #[must_use]
    pub fn of(semaphores: usize) -> Option<Layout> {
        (1..=SEMAPHORES_MAX)
            .contains(&semaphores)
            .then_some(Layout { semaphores })
    }

    /// Number of semaphores.
    #[must_use]
    pub fn semaphores(self) -> usize {
        self.semaphores
    }

    /// Length of the memory, in words.
    #[must_use]
    pub fn words(self) -> usize {
        self.seat(SEATS)
    }

    fn semaphore(num: usize) -> usize {
        SEMAPHORES + num
    }

    fn seat(self, seat: usize) -> usize {
        // Each seat begins a cache line of its own.
        let size = (SEAT_DEBTS + 2 * self.semaphores).next_multiple_of(8);
        (SEMAPHORES + 2 * self.semaphores).next_multiple_of(8) + seat * size
    }

    fn debt(self, seat: usize, num: usize) -> usize {
        self.seat(seat) + SEAT_DEBTS + num
    }

    /// What the process owed before the set was opened, which bounds what it may come to owe.
    fn old_debt(self, seat: usize, num: usize) -> usize {
        self.debt(seat, num) + self.semaphores
    }

    /// How many processes owed something to a semaphore before the set was opened.
    fn owing(self, num: usize) -> usize {
        Layout::semaphore(self.semaphores) + num
    }
}

/// A set in memory.
#[derive(Clone, Copy, Debug)]
pub struct Set<'a> {
    words: &'a [AtomicU64],
    layout: Layout,
}

/// Who operates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operator {
    /// What `GETPID` gives afterwards.
    pub pid: i32,
    /// The process's seat, which no other thread uses meanwhile.
    pub seat: Option<usize>,
}

/// When an operation takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Seconds since the epoch, for `sem_otime`.
    pub seconds: i64,
    /// Milliseconds of `CLOCK_BOOTTIME`, for the lease.
    pub boottime: u64,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// Nothing was done: the operation would have to wait.
    WouldWait,
    /// Nothing was done: the operation would have to wait, unless a process has ended that owes
    /// something to the semaphore. Only the daemon can tell.
    MayWait,
    /// Nothing was done: only the daemon can tell.
    Ask,
}

/// The state of a set, as it is delegated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// By semaphore.
    pub values: Vec<u16>,
    /// Of the processes that changed the semaphores last.
    pub pids: Vec<i32>,
    /// Seconds since the epoch.
    pub otime: i64,
    /// How many processes owe something to each semaphore; not given when the set is closed.
    pub owing: Vec<u32>,
}

/// What became of a seat while the set was open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The seat.
    pub seat: usize,
    /// What is owed in addition, by semaphore (`semadj`).
    pub owed: Vec<i16>,
}

impl<'a> Set<'a> {
    /// The set in `words`; `None` if they are fewer than [`Layout::words`].
    #[must_use]
    pub fn new(words: &'a [AtomicU64], layout: Layout) -> Option<Set<'a>> {
        (words.len() >= layout.words()).then_some(Set { words, layout })
    }

    /// One operation of a `semop`: adds `op` to semaphore `num`, or waits for zero if it is 0.
    #[must_use]
    pub fn operate(self, who: Operator, num: usize, op: i16, undo: bool, now: Moment) -> Outcome {
        if num >= self.layout.semaphores
            || now.boottime >= self.words[LEASE].load(Ordering::Relaxed)
        {
            return Outcome::Ask;
        }
        let word = &self.words[Layout::semaphore(num)];
        let seat = match (undo, who.seat) {
            (false, _) => None,
            // Linux notes that the process has undo here even if it then owes nothing.
            (true, Some(seat)) if op != 0 && seat < SEATS => Some(seat),
            (true, _) => return Outcome::Ask,
        };
        loop {
            let before = Semaphore(word.load(Ordering::Acquire));
            if before.is_closed() {
                return Outcome::Ask;
            }
            if before.is_unsettled() {
                if !self.settle(num, before) {
                    return Outcome::Ask;
                }
                continue;
            }
            let value = i32::from(before.value()) + i32::from(op);
            let waits = value < 0 || op == 0 && value != 0;
            let owed = self.others_owe(who.seat, num);
            match (waits, owed) {
                (true, false) => return Outcome::WouldWait,
                (true, true) => return Outcome::MayWait,
                (false, true) => return Outcome::Ask,
                (false, false) if value > SEMVMX => return Outcome::Ask,
                (false, false) => {}
            }
            let after = match seat {
                None => before.changed(value as u16, who.pid),
                Some(seat) => {
                    if !self.intend(seat, num, op) {
                        return Outcome::Ask;
                    }
                    before.unsettled(value as u16, seat)
                }
            };
            let swapped =
                word.compare_exchange(before.0, after.0, Ordering::AcqRel, Ordering::Relaxed);
            if swapped.is_ok() {
                self.words[OTIME].store(now.seconds.cast_unsigned(), Ordering::Relaxed);
                self.settle_own(num, after);
                return Outcome::Done;
            }
        }
    }

    /// Whether another process owes something to a semaphore. It may have ended, and then its debt
    /// is paid before anybody knows of its end: only the daemon can tell.
    ///
    /// What is owed to a semaphore changes only with its word, so if that stays the same this does.
    fn others_owe(self, own: Option<usize>, num: usize) -> bool {
        let owes = |at: usize| Debt(self.words[at].load(Ordering::Acquire)).owed() != 0;
        let own = own.filter(|&seat| seat < SEATS);
        let own_owed = own.is_some_and(|seat| owes(self.layout.old_debt(seat, num)));
        let owed = self.words[self.layout.owing(num)].load(Ordering::Relaxed);
        if owed != u64::from(own_owed) {
            return true;
        }
        let mut debtors = self.words[DEBTORS].load(Ordering::Acquire);
        if let Some(own) = own {
            debtors &= !(1 << own);
        }
        while debtors != 0 {
            let seat = debtors.trailing_zeros() as usize;
            if seat < SEATS && owes(self.layout.debt(seat, num)) {
                return true;
            }
            debtors &= debtors - 1;
        }
        false
    }

    /// Whether the memory will never be opened again.
    #[must_use]
    pub fn is_retired(self) -> bool {
        self.words[RETIRED].load(Ordering::Relaxed) != 0
    }

    /// Step 1 of an operation with SEM_UNDO; false if too much would be owed.
    fn intend(self, seat: usize, num: usize, op: i16) -> bool {
        let debt = |at: usize| Debt(self.words[at].load(Ordering::Relaxed)).owed();
        let owed = i32::from(debt(self.layout.debt(seat, num)))
            + i32::from(debt(self.layout.old_debt(seat, num)))
            - i32::from(op);
        if i16::try_from(owed).is_err() {
            return false;
        }
        let debtors = &self.words[DEBTORS];
        if debtors.load(Ordering::Relaxed) & 1 << seat == 0 {
            debtors.fetch_or(1 << seat, Ordering::AcqRel);
        }
        let intent = &self.words[self.layout.seat(seat) + SEAT_INTENT];
        let number = Intent(intent.load(Ordering::Relaxed)).number();
        intent.store(
            Intent::new(num, op, number.wrapping_add(1)).0,
            Ordering::Release,
        );
        true
    }

    /// Step 3, for an operation of this process whose swap made the word `swapped`. When this
    /// returns it is settled, also if the set is being closed: the intent may be overwritten.
    fn settle_own(self, num: usize, swapped: Semaphore) {
        let word = &self.words[Layout::semaphore(num)];
        loop {
            let now = Semaphore(word.load(Ordering::Acquire));
            if !swapped.is_unsettled() || now.opened() != swapped || !self.settle(num, now) {
                return;
            }
        }
    }

    /// Step 3, for a semaphore whose word was `seen`. False if the memory makes no sense.
    fn settle(self, num: usize, seen: Semaphore) -> bool {
        let word = &self.words[Layout::semaphore(num)];
        let has_moved_on = || word.load(Ordering::Acquire) != seen.0;
        let seat = seen.seat();
        if seat >= SEATS {
            return has_moved_on();
        }
        let start = self.layout.seat(seat);
        let intent = Intent(self.words[start + SEAT_INTENT].load(Ordering::Acquire));
        if intent.num() != num {
            return has_moved_on();
        }
        let debt = &self.words[self.layout.debt(seat, num)];
        let before = Debt(debt.load(Ordering::Acquire));
        let pid = self.words[start + SEAT_PID].load(Ordering::Relaxed);
        // From here on both are known to be those of the operation that is to be settled.
        if has_moved_on() {
            return true;
        }
        if before.number() != intent.number() {
            let after = before.after(intent);
            let _ = debt.compare_exchange(before.0, after.0, Ordering::AcqRel, Ordering::Relaxed);
        }
        let settled = seen.settled(pid as i32);
        let _ = word.compare_exchange(seen.0, settled.0, Ordering::AcqRel, Ordering::Relaxed);
        true
    }
}

/// The daemon's side.
impl Set<'_> {
    /// Lets processes operate until a time, in milliseconds of `CLOCK_BOOTTIME`.
    pub fn lease(self, until: u64) {
        self.words[LEASE].store(until, Ordering::Relaxed);
    }

    /// Gives a free seat to a process. The set may be open.
    pub fn seat(self, seat: usize, pid: i32) {
        let pid = u64::from(pid.cast_unsigned());
        self.words[self.layout.seat(seat) + SEAT_PID].store(pid, Ordering::Relaxed);
        for num in 0..self.layout.semaphores {
            self.set_old_debt(seat, num, 0);
        }
    }

    /// Completes the operation that was begun last from a seat, as another program is about to use it
    /// and would overwrite its intent: an `execve` may have ended the thread that was in the midst of
    /// it. The set may be open.
    pub fn complete(self, seat: usize) {
        for num in 0..self.layout.semaphores {
            let word = self.words[Layout::semaphore(num)].load(Ordering::Acquire);
            let semaphore = Semaphore(word);
            if semaphore.is_unsettled() && semaphore.seat() == seat {
                self.settle(num, semaphore);
            }
        }
    }

    /// What the process in a seat owed to a semaphore before the set is opened.
    pub fn set_old_debt(self, seat: usize, num: usize, owed: i16) {
        self.words[self.layout.old_debt(seat, num)].store(Debt::new(owed, 0).0, Ordering::Relaxed);
    }

    /// Opens the memory, which must be closed or new, with a state that fits its layout. The old
    /// debts of all seats must have been set.
    pub fn open(self, state: &State) {
        self.words[DEBTORS].store(0, Ordering::Relaxed);
        for (num, &owing) in state.owing.iter().enumerate() {
            self.words[self.layout.owing(num)].store(owing.into(), Ordering::Relaxed);
        }
        self.words[OTIME].store(state.otime.cast_unsigned(), Ordering::Relaxed);
        for (num, (&value, &pid)) in state.values.iter().zip(&state.pids).enumerate() {
            let word = &self.words[Layout::semaphore(num)];
            let closed = Semaphore(word.load(Ordering::Relaxed));
            word.store(closed.changed(value, pid).opened().0, Ordering::Release);
        }
    }

    /// Closes the memory; gives the state of the set, and the accounts of the seats that were
    /// used. These are settled thereby: they start at nothing when the set is opened again.
    pub fn close(self) -> (State, Vec<Account>) {
        let mut state = State::default();
        let words = &self.words[SEMAPHORES..SEMAPHORES + self.layout.semaphores];
        for word in words {
            word.fetch_or(Semaphore::CLOSED, Ordering::AcqRel);
        }
        for (num, word) in words.iter().enumerate() {
            let mut semaphore = Semaphore(word.load(Ordering::Acquire));
            // Once is enough unless somebody spoils the memory.
            for _ in 0..2 {
                if semaphore.is_unsettled() {
                    self.settle(num, semaphore);
                    semaphore = Semaphore(word.load(Ordering::Acquire));
                }
            }
            state.values.push(semaphore.value().min(SEMVMX as u16));
            state.pids.push(semaphore.pid());
        }
        state.otime = self.words[OTIME].load(Ordering::Relaxed).cast_signed();
        let accounts = (0..SEATS).filter_map(|seat| self.account(seat)).collect();
        (state, accounts)
    }

    /// Whether the process in a seat has begun an operation with SEM_UNDO since the set was
    /// opened.
    #[must_use]
    pub fn is_used(self, seat: usize) -> bool {
        let start = self.layout.seat(seat);
        self.words[start + SEAT_INTENT].load(Ordering::Acquire) & Intent::USED != 0
    }

    /// Ends the use of the memory, which must be closed.
    pub fn retire(self) {
        self.words[RETIRED].store(1, Ordering::Relaxed);
    }

    fn account(self, seat: usize) -> Option<Account> {
        if !self.is_used(seat) {
            return None;
        }
        let intent = &self.words[self.layout.seat(seat) + SEAT_INTENT];
        let number = Intent(intent.fetch_and(!Intent::USED, Ordering::AcqRel)).number();
        let owed = (0..self.layout.semaphores)
            .map(|num| {
                let debt = &self.words[self.layout.debt(seat, num)];
                Debt(debt.swap(Debt::new(0, number).0, Ordering::AcqRel)).owed()
            })
            .collect();
        Some(Account { seat, owed })
    }
}
