//! The blocked calls of one set, in the order in which Linux tries them again.
//!
//! There are two kinds of waiters: those that only wait for zero, and those that alter a value.
//! And there are two kinds of calls: simple ones of one operation, complex ones of several. Each
//! semaphore has a queue of simple waiters of either kind, so that a change of one value looks
//! only at those that wait for it. The set as a whole has a queue of complex waiters of either
//! kind. While a complex waiter of any kind is there, all altering waiters are in the set's
//! queue, complex or not: first come, first served, holds among calls that can take values from
//! each other.

use migshm_protocol::call::{Errno, SemBuf};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

use crate::processes::{CallKey, ProcessKey, Wake};

/// A blocked `semop`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Waiter {
    pub(crate) call: CallKey,
    pub(crate) process: ProcessKey,
    pub(crate) pid: i32,
    pub(crate) ops: Vec<SemBuf>,
    /// Which of `ops` it could not do when it was last tried.
    pub(crate) blocking: usize,
}

/// Waiters of one semaphore, or of the set as a whole, in order.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Queue {
    /// Those that alter a value.
    pub(crate) alter: VecDeque<Waiter>,
    /// Those that only wait for zero.
    pub(crate) zero: VecDeque<Waiter>,
}

/// All waiters of a set.
///
/// Invariants: `whole.zero` has complex waiters only, the queues in `single` have simple ones
/// only, and no altering one while `complex` is not 0; outside of a call on the set,
/// `whole.alter` is empty while `complex` is 0. An empty queue in `single` is kept for the next
/// waiter.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Queues {
    pub(crate) whole: Queue,
    single: BTreeMap<u16, Queue>,
    /// How many waiters there are.
    waiters: usize,
    /// How many of them are complex.
    complex: usize,
}

impl Waiter {
    pub(crate) fn new(
        call: CallKey,
        process: ProcessKey,
        pid: i32,
        ops: Vec<SemBuf>,
        blocking: usize,
    ) -> Waiter {
        Waiter {
            call,
            process,
            pid,
            ops,
            blocking,
        }
    }

    pub(crate) fn is_complex(&self) -> bool {
        self.ops.len() > 1
    }

    pub(crate) fn wake(&self, result: Result<(), Errno>) -> Wake {
        match result {
            Ok(()) => Wake::done(self.call),
            Err(errno) => Wake::failed(self.call, errno),
        }
    }

    fn alters(&self) -> bool {
        self.ops.iter().any(|op| op.op != 0)
    }

    fn blocked_by(&self) -> SemBuf {
        self.ops[self.blocking]
    }
}

impl Queue {
    fn remove(&mut self, call: CallKey) -> Option<Waiter> {
        [&mut self.alter, &mut self.zero]
            .into_iter()
            .find_map(|queue| {
                queue
                    .iter()
                    .position(|w| w.call == call)
                    .and_then(|at| queue.remove(at))
            })
    }

    fn in_order(self) -> impl Iterator<Item = Waiter> {
        self.zero.into_iter().chain(self.alter)
    }
}

impl Queues {
    /// Whether nobody waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiters == 0
    }

    pub(crate) fn push(&mut self, waiter: Waiter) {
        self.waiters += 1;
        if waiter.is_complex() {
            if self.complex == 0 {
                self.merge();
            }
            self.complex += 1;
        }
        let merged = self.complex > 0;
        let num = waiter.ops[0].num;
        match (waiter.is_complex(), waiter.alters()) {
            (true, false) => self.whole.zero.push_back(waiter),
            (false, false) => self.single.entry(num).or_default().zero.push_back(waiter),
            (_, true) if merged => self.whole.alter.push_back(waiter),
            (_, true) => self.single.entry(num).or_default().alter.push_back(waiter),
        }
    }

    /// Takes a waiter out, wherever it is.
    pub(crate) fn remove(&mut self, call: CallKey) {
        let found = self.whole.remove(call).or_else(|| {
            self.single
                .values_mut()
                .find_map(|queue| queue.remove(call))
        });
        if let Some(waiter) = found {
            self.left(&waiter);
            self.unmerge();
        }
    }

    /// A waiter has left the queue that it was in.
    pub(crate) fn left(&mut self, waiter: &Waiter) {
        self.waiters -= 1;
        if waiter.is_complex() {
            self.complex -= 1;
        }
    }

    /// The altering waiters of a semaphore, taken out to be tried; see [`Queues::restore_alter`].
    pub(crate) fn take_alter(&mut self, num: u16) -> VecDeque<Waiter> {
        self.single
            .get_mut(&num)
            .map(|queue| std::mem::take(&mut queue.alter))
            .unwrap_or_default()
    }

    /// Those of them that still wait.
    pub(crate) fn restore_alter(&mut self, num: u16, waiters: VecDeque<Waiter>) {
        if let Some(queue) = self.single.get_mut(&num) {
            queue.alter = waiters;
        }
    }

    /// The waiters for a semaphore's zero, taken out to be tried; see [`Queues::restore_zero`].
    pub(crate) fn take_zero(&mut self, num: u16) -> VecDeque<Waiter> {
        self.single
            .get_mut(&num)
            .map(|queue| std::mem::take(&mut queue.zero))
            .unwrap_or_default()
    }

    /// Those of them that still wait.
    pub(crate) fn restore_zero(&mut self, num: u16, waiters: VecDeque<Waiter>) {
        if let Some(queue) = self.single.get_mut(&num) {
            queue.zero = waiters;
        }
    }

    /// The semaphores that may have simple waiters, ascending.
    pub(crate) fn waited_for(&self) -> Vec<u16> {
        self.single.keys().copied().collect()
    }

    /// Where no complex waiter is left, gives each semaphore its waiters back.
    pub(crate) fn unmerge(&mut self) {
        if self.complex == 0 {
            for waiter in std::mem::take(&mut self.whole.alter) {
                self.single
                    .entry(waiter.ops[0].num)
                    .or_default()
                    .alter
                    .push_back(waiter);
            }
        }
    }

    /// Collects the altering waiters of all semaphores in the set's queue. Linux puts those of
    /// higher semaphores in front; it only shows in the order of wake-ups, as simple waiters of
    /// different semaphores have no values to take from each other.
    fn merge(&mut self) {
        for queue in self.single.values_mut().rev() {
            self.whole.alter.append(&mut queue.alter);
        }
    }

    /// How many wait for the semaphore's value to rise.
    ///
    /// As POSIX wants it, a call counts only for the operation that blocks it.
    pub(crate) fn waiting_for_increase(&self, num: u16) -> usize {
        let simple = self.single.get(&num).map_or(0, |queue| queue.alter.len());
        let blocked = |w: &&Waiter| w.blocked_by().num == num && w.blocked_by().op < 0;
        simple + self.whole.alter.iter().filter(blocked).count()
    }

    /// How many wait for the semaphore's value to become zero.
    pub(crate) fn waiting_for_zero(&self, num: u16) -> usize {
        let simple = self.single.get(&num).map_or(0, |queue| queue.zero.len());
        let blocked = |w: &&Waiter| w.blocked_by().num == num && w.blocked_by().op == 0;
        simple
            + self
                .whole
                .alter
                .iter()
                .chain(&self.whole.zero)
                .filter(blocked)
                .count()
    }

    /// All waiters, in the order in which Linux tells them that the set is gone.
    pub(crate) fn into_waiters(self) -> impl Iterator<Item = Waiter> {
        self.whole
            .in_order()
            .chain(self.single.into_values().flat_map(Queue::in_order))
    }
}
