//! Which pages travel with which lock.
//!
//! A page that is written under a semaphore is wanted next by whoever gets the semaphore next. So a
//! node notices who takes which of its pages soon after one of its processes has released what
//! ([`Carry::taken`]); when the same node has done so twice in a row, the page is pushed there at the next release
//! ([`Carry::released`]), beside the message that lets the other process go on. Now and then it
//! is not, and if another node or none asks for it then, the habit is forgotten. This is the lock-data affinity of
//! Midway's entry consistency (Bershad and Zekauskas, 1991), learned rather than declared.

use migshm_protocol::page::Access;
use migshm_protocol::{NodeId, Page};
use rustc_hash::FxHashMap;

use crate::Time;

/// For how long after a release what others take counts as taken because of it, in nanoseconds.
const WINDOW: Time = 1_000_000_000;
/// How often in a row a page has to be taken before it is pushed.
const PROVEN: u32 = 2;
/// Every so many releases a page is not pushed, to see who asks for it; before, at each power of two.
const TRIAL: u32 = 64;
/// Pages that travel with one lock; more would delay it.
const PAGES: usize = 16;
/// Locks that are kept in mind.
const LOCKS: usize = 1024;

/// What a process releases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lock {
    /// A semaphore of a set: its id, its number.
    Semaphore(i32, u16),
    /// A message queue: its id.
    Queue(i32),
}

/// A page to be pushed, as in [`crate::Input::Push`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Push {
    /// The page.
    pub page: Page,
    /// What is wanted of it.
    pub access: Access,
    /// Who wants it.
    pub to: NodeId,
}

/// What a node knows about its locks.
#[derive(Clone, Debug, Default)]
pub struct Carry {
    locks: FxHashMap<Lock, Habits>,
    /// The last release, and when it was.
    last: Option<(Lock, Time)>,
}

#[derive(Clone, Debug, Default)]
struct Habits {
    pages: Vec<Habit>,
    last: Time,
}

#[derive(Clone, Copy, Debug)]
struct Habit {
    push: Push,
    /// How often it was taken, or pushed, without a trial that failed.
    count: u32,
    /// It was not pushed at the last release.
    on_trial: bool,
}

impl Carry {
    /// A process of this node releases a lock. Gives what to push.
    pub fn released(&mut self, lock: Lock, now: Time) -> Vec<Push> {
        self.last = Some((lock, now));
        let Some(habits) = self.locks.get_mut(&lock) else {
            return Vec::new();
        };
        habits.last = now;
        habits.pages.retain(|habit| !habit.on_trial);
        let mut pushes = Vec::new();
        for habit in &mut habits.pages {
            if habit.count < PROVEN {
                continue;
            }
            habit.count = habit.count.wrapping_add(1);
            habit.on_trial = habit.count.is_multiple_of(TRIAL) || habit.count.is_power_of_two();
            if !habit.on_trial {
                pushes.push(habit.push);
            }
        }
        pushes
    }

    /// A page of this node's was given to another that had asked for it.
    pub fn taken(&mut self, page: Page, access: Access, to: NodeId, now: Time) {
        let Some((lock, released)) = self.last else {
            return;
        };
        if now.saturating_sub(released) > WINDOW {
            return;
        }
        if self.locks.len() >= LOCKS && !self.locks.contains_key(&lock) {
            self.forget_oldest();
        }
        let habits = self.locks.entry(lock).or_default();
        // A page has many readers or one writer.
        habits.pages.retain(|Habit { push, .. }| {
            let reads = push.access == Access::Read && access == Access::Read;
            push.page != page || push.to == to || reads
        });
        let same = |habit: &&mut Habit| habit.push.page == page && habit.push.to == to;
        let room = habits.pages.len() < PAGES;
        match habits.pages.iter_mut().find(same) {
            Some(habit) => habit.taken(access),
            None if room => {
                habits.pages.push(Habit {
                    push: Push { page, access, to },
                    count: 1,
                    on_trial: false,
                });
            }
            None => {}
        }
    }

    /// Forgets the pages that do not satisfy a condition.
    pub fn retain(&mut self, keep: impl Fn(Page) -> bool) {
        for habits in self.locks.values_mut() {
            habits.pages.retain(|habit| keep(habit.push.page));
        }
        self.locks.retain(|_, habits| !habits.pages.is_empty());
    }

    fn forget_oldest(&mut self) {
        let oldest = self.locks.iter().min_by_key(|(_, habits)| habits.last);
        if let Some(lock) = oldest.map(|(lock, _)| *lock) {
            self.locks.remove(&lock);
        }
    }
}

impl Habit {
    /// What is first read and then written by one node is wanted for writing, and counts once.
    fn taken(&mut self, access: Access) {
        self.count += u32::from(self.push.access == access);
        self.push.access = self.push.access.max(access);
        self.on_trial = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migshm_protocol::SegmentId;

    const LOCK: Lock = Lock::Semaphore(7, 0);

    fn page(index: u32) -> Page {
        let segment = SegmentId(1);
        Page { segment, index }
    }

    fn push(index: u32, access: Access, to: u16) -> Push {
        let (page, to) = (page(index), NodeId(to));
        Push { page, access, to }
    }

    /// A node that released the lock, and what others took of it then, each time.
    fn learned(times: u64, taken: &[Push]) -> Carry {
        let mut carry = Carry::default();
        for turn in 0..times {
            carry.released(LOCK, turn * WINDOW);
            for &Push { page, access, to } in taken {
                carry.taken(page, access, to, turn * WINDOW + 1);
            }
        }
        carry
    }

    #[test]
    fn what_is_taken_twice_after_a_release_is_pushed_at_the_next() {
        let write = push(0, Access::Write, 2);
        assert_eq!(learned(1, &[write]).released(LOCK, 2 * WINDOW), []);
        let mut carry = learned(2, &[write]);
        assert_eq!(carry.released(Lock::Semaphore(7, 1), 2 * WINDOW), []);
        assert_eq!(carry.released(LOCK, 2 * WINDOW), [write]);
    }

    #[test]
    fn what_is_read_and_then_written_is_pushed_for_writing() {
        let taken = [push(0, Access::Read, 2), push(0, Access::Write, 2)];
        assert_eq!(learned(2, &taken).released(LOCK, 2 * WINDOW), taken[1..]);
    }

    #[test]
    fn a_page_is_pushed_to_all_its_readers_or_to_one_writer() {
        let readers = [push(0, Access::Read, 2), push(0, Access::Read, 3)];
        assert_eq!(learned(2, &readers).released(LOCK, 2 * WINDOW), readers);
        let writers = [push(0, Access::Write, 2), push(0, Access::Write, 3)];
        assert_eq!(learned(5, &writers).released(LOCK, 5 * WINDOW), []);
    }

    #[test]
    fn what_is_taken_late_is_not_because_of_the_release() {
        let mut carry = Carry::default();
        for turn in [0, 10, 20] {
            assert_eq!(carry.released(LOCK, turn * WINDOW), []);
            let late = (turn + 1) * WINDOW + 1;
            carry.taken(page(0), Access::Write, NodeId(2), late);
        }
    }

    #[test]
    fn a_page_that_nobody_asks_for_in_a_trial_is_forgotten() {
        let write = push(0, Access::Write, 2);
        let mut carry = learned(2, &[write]);
        let pushed = (0..10 * TRIAL).filter(|_| !carry.released(LOCK, 0).is_empty());
        assert!(pushed.count() < TRIAL as usize);
        assert_eq!(carry.released(LOCK, 0), []);
    }

    #[test]
    fn a_page_that_is_asked_for_in_a_trial_goes_on_being_pushed() {
        let write = push(0, Access::Write, 2);
        let mut carry = learned(2, &[write]);
        for _ in 0..10 * TRIAL {
            if carry.released(LOCK, 0).is_empty() {
                carry.taken(page(0), Access::Write, NodeId(2), 1);
            }
        }
        let next_two = [carry.released(LOCK, 0), carry.released(LOCK, 0)];
        assert!(next_two.contains(&vec![write]));
    }

    #[test]
    fn locks_that_are_kept_in_mind_are_bounded() {
        let mut carry = Carry::default();
        for id in 0..5000 {
            carry.released(Lock::Queue(id), id as Time);
            for index in 0..100 {
                carry.taken(page(index), Access::Write, NodeId(2), id as Time);
            }
        }
        assert_eq!(carry.locks.len(), LOCKS);
        assert!(carry.locks.values().all(|h| h.pages.len() <= PAGES));
        carry.retain(|_| false);
        assert!(carry.locks.is_empty());
    }
}
