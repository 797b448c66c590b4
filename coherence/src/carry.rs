//! Which pages travel with which lock.
//!
//! A page that is written under a semaphore is wanted next by whoever gets the semaphore next. So a
//! node notices who takes which of its pages soon after one of its processes has released what
//! ([`Carry::taken`]); when the same node has done so twice in a row, the page is pushed there at the next release
//! ([`Carry::released`]), beside the message that lets the other process go on. This is the lock-data
//! affinity of Midway's entry consistency (Bershad and Zekauskas, 1991), learned rather than declared. A copy that
//! the page's writer has taken away twice is given up in the same way, so that the writer need not ask: dynamic
//! self-invalidation (Lebeck and Wood, 1995).
//!
//! Adjacent pages that go to one node are a run. Now and then the first page of a run is not pushed, and if another
//! node or none asks for it then, the whole run is forgotten.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use migshm_protocol::page::Access;
use migshm_protocol::{NodeId, Page};
use rustc_hash::FxHashMap;

use crate::Time;

/// For how long after a release what others take counts as taken because of it, in nanoseconds.
const WINDOW: Time = 1_000_000_000;
/// How often in a row a page has to be taken before it is pushed.
const PROVEN: u32 = 2;
/// Every so many pushes the first page of a run is not pushed, to see who asks for it; before, at each power of two.
const TRIAL: u32 = 64;
/// Releases for which a trial lasts. Of a barrier's semaphore, who raises it next may do so before the others have
/// read what the last raise was for; not the time after, as they have raised theirs.
const PATIENCE: u8 = 2;
/// Pages that travel with one lock: 4 MiB of them, some milliseconds.
const PAGES: usize = 1024;
/// Locks that are kept in mind.
const LOCKS: usize = 256;

/// What a process releases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Lock {
    /// A semaphore of a set: its id, its number.
    Semaphore(i32, u16),
    /// A message queue: its id.
    Queue(i32),
}

/// A page to be pushed, as in [`crate::Input::Push`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Push {
    /// The page.
    pub page: Page,
    /// What is wanted of it.
    pub access: Access,
    /// Who wants it.
    pub to: NodeId,
}

/// What a node knows about its locks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Carry {
    locks: FxHashMap<Lock, Habits>,
    /// The last release, and when it was.
    last: Option<(Lock, Time)>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Habits {
    /// By page and by who takes it.
    pages: BTreeMap<(Page, NodeId), Habit>,
    last: Time,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Habit {
    access: Access,
    /// How often it was taken, or pushed as the first of a run, without a trial that failed.
    count: u32,
    /// For how many releases it has been on trial: it could have been pushed, and was not.
    on_trial: u8,
}

impl Carry {
    /// A process of this node releases a lock. Gives what to push, in the order of the pages, of that for which
    /// there is something to be done ([`crate::Engine::can_push`]): a page that nobody here has written since it was
    /// pushed is neither pushed nor tried.
    pub fn released(
        &mut self,
        lock: Lock,
        now: Time,
        can_push: impl Fn(Page, Access) -> bool,
    ) -> Vec<Push> {
        self.last = Some((lock, now));
        let Some(habits) = self.locks.get_mut(&lock) else {
            return Vec::new();
        };
        habits.last = now;
        habits.end_trials();
        habits.push(can_push)
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
        self.locks.entry(lock).or_default().taken(page, access, to);
    }

    /// Forgets the pages that do not satisfy a condition.
    pub fn retain(&mut self, keep: impl Fn(Page) -> bool) {
        for habits in self.locks.values_mut() {
            habits.pages.retain(|(page, _), _| keep(*page));
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

impl Habits {
    /// What nobody asked for when it was not pushed is forgotten, and what follows it.
    fn end_trials(&mut self) {
        let mut failed = Vec::new();
        for (key, habit) in &mut self.pages {
            match habit.on_trial {
                0 => {}
                PATIENCE => failed.push(*key),
                _ => habit.on_trial += 1,
            }
        }
        for (mut page, to) in failed {
            while self.pages.remove(&(page, to)).is_some() {
                page.index = page.index.saturating_add(1);
            }
        }
    }

    fn push(&mut self, can_push: impl Fn(Page, Access) -> bool) -> Vec<Push> {
        let mut pushes: Vec<Push> = Vec::new();
        // The last page of this release, by who gets it.
        let mut last: FxHashMap<NodeId, Page> = FxHashMap::default();
        for (&(page, to), habit) in &mut self.pages {
            let access = habit.access;
            if habit.count < PROVEN || !can_push(page, access) {
                continue;
            }
            let before = last.insert(to, page);
            let is_first = !before.is_some_and(|before| is_next(before, page));
            if is_first && habit.on_trial == 0 {
                habit.count = habit.count.wrapping_add(1);
                let try_it = habit.count.is_multiple_of(TRIAL) || habit.count.is_power_of_two();
                habit.on_trial = u8::from(try_it);
            }
            if habit.on_trial == 0 {
                pushes.push(Push { page, access, to });
            }
        }
        pushes
    }

    fn taken(&mut self, page: Page, access: Access, to: NodeId) {
        // A page has many readers or one writer.
        let first = (page, NodeId(0));
        let others = self.pages.range(first..=(page, NodeId(u16::MAX)));
        let others = others.filter(|((_, node), habit)| {
            *node != to && (habit.access, access) != (Access::Read, Access::Read)
        });
        let others: Vec<(Page, NodeId)> = others.map(|(key, _)| *key).collect();
        for key in others {
            self.pages.remove(&key);
        }
        if let Some(habit) = self.pages.get_mut(&(page, to)) {
            return habit.taken(access);
        }
        if self.pages.len() >= PAGES {
            self.pages.retain(|_, habit| habit.count >= PROVEN);
        }
        if self.pages.len() < PAGES {
            let habit = Habit {
                access,
                count: 1,
                on_trial: 0,
            };
            self.pages.insert((page, to), habit);
        }
    }
}

impl Habit {
    /// What is first read and then written by one node is wanted for writing, and counts once.
    fn taken(&mut self, access: Access) {
        self.count += u32::from(self.access == access);
        self.access = self.access.max(access);
        self.on_trial = 0;
    }
}

fn is_next(before: Page, page: Page) -> bool {
    before.segment == page.segment && before.index.checked_add(1) == Some(page.index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migshm_protocol::SegmentId;

    const LOCK: Lock = Lock::Semaphore(7, 0);

    fn always(_: Page, _: Access) -> bool {
        true
    }

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
            carry.released(LOCK, turn * WINDOW, always);
            for &Push { page, access, to } in taken {
                carry.taken(page, access, to, turn * WINDOW + 1);
            }
        }
        carry
    }

    #[test]
    fn what_is_taken_twice_after_a_release_is_pushed_at_the_next() {
        let write = push(0, Access::Write, 2);
        assert_eq!(learned(1, &[write]).released(LOCK, 2 * WINDOW, always), []);
        let mut carry = learned(2, &[write]);
        assert_eq!(
            carry.released(Lock::Semaphore(7, 1), 2 * WINDOW, always),
            []
        );
        assert_eq!(carry.released(LOCK, 2 * WINDOW, always), [write]);
    }

    #[test]
    fn what_is_read_and_then_written_is_pushed_for_writing() {
        let taken = [push(0, Access::Read, 2), push(0, Access::Write, 2)];
        assert_eq!(
            learned(2, &taken).released(LOCK, 2 * WINDOW, always),
            taken[1..]
        );
    }

    #[test]
    fn a_page_is_pushed_to_all_its_readers_or_to_one_writer() {
        let readers = [push(0, Access::Read, 2), push(0, Access::Read, 3)];
        assert_eq!(
            learned(2, &readers).released(LOCK, 2 * WINDOW, always),
            readers
        );
        let writers = [push(0, Access::Write, 2), push(0, Access::Write, 3)];
        assert_eq!(learned(5, &writers).released(LOCK, 5 * WINDOW, always), []);
    }

    #[test]
    fn what_is_taken_late_is_not_because_of_the_release() {
        let mut carry = Carry::default();
        for turn in [0, 10, 20] {
            assert_eq!(carry.released(LOCK, turn * WINDOW, always), []);
            let late = (turn + 1) * WINDOW + 1;
            carry.taken(page(0), Access::Write, NodeId(2), late);
        }
    }

    #[test]
    fn a_page_that_nobody_asks_for_in_a_trial_is_forgotten() {
        let write = push(0, Access::Write, 2);
        let mut carry = learned(2, &[write]);
        let pushed = (0..10 * TRIAL).filter(|_| !carry.released(LOCK, 0, always).is_empty());
        assert!(pushed.count() < TRIAL as usize);
        assert_eq!(carry.released(LOCK, 0, always), []);
    }

    #[test]
    fn a_page_that_is_asked_for_in_a_trial_goes_on_being_pushed() {
        let write = push(0, Access::Write, 2);
        let mut carry = learned(2, &[write]);
        for _ in 0..10 * TRIAL {
            if carry.released(LOCK, 0, always).is_empty() {
                carry.taken(page(0), Access::Write, NodeId(2), 1);
            }
        }
        let next_two = [
            carry.released(LOCK, 0, always),
            carry.released(LOCK, 0, always),
        ];
        assert!(next_two.contains(&vec![write]));
    }

    #[test]
    fn what_could_not_be_pushed_was_not_tried() {
        let write = push(0, Access::Write, 2);
        let mut carry = learned(2, &[write]);
        for turn in 0..10 * TRIAL {
            // Two pages take turns under one lock, as the grids of an iteration do.
            let is_news = turn.is_multiple_of(2);
            let pushed = carry.released(LOCK, 0, |_, _| is_news);
            if is_news && pushed.is_empty() {
                carry.taken(page(0), Access::Write, NodeId(2), 1);
            }
            assert!(is_news || pushed.is_empty());
        }
        let next_two = [
            carry.released(LOCK, 0, always),
            carry.released(LOCK, 0, always),
        ];
        assert!(next_two.contains(&vec![write]));
    }

    #[test]
    fn of_a_run_only_the_first_page_is_tried_and_all_are_forgotten_with_it() {
        let run: Vec<Push> = (0..100).map(|n| push(n, Access::Read, 2)).collect();
        let mut carry = learned(2, &run);
        for trials in 1.. {
            let mut pushed = run.clone();
            while pushed == run {
                pushed = carry.released(LOCK, 0, always);
            }
            assert_eq!(pushed, run[1..]);
            if trials == 4 {
                break;
            }
            carry.taken(page(0), Access::Read, NodeId(2), 1);
        }
        assert_eq!(carry.released(LOCK, 0, always), run[1..]);
        assert_eq!(carry.released(LOCK, 0, always), []);
    }

    #[test]
    fn what_moved_once_in_bulk_makes_room_for_what_is_taken_again() {
        let mut carry = Carry::default();
        carry.released(LOCK, 0, always);
        for index in 0..2 * PAGES as u32 {
            carry.taken(page(index), Access::Read, NodeId(2), 1);
        }
        for _ in 0..2 {
            carry.released(LOCK, 0, always);
            carry.taken(page(9 * PAGES as u32), Access::Read, NodeId(2), 1);
        }
        let pushed = carry.released(LOCK, 0, always);
        assert_eq!(pushed, [push(9 * PAGES as u32, Access::Read, 2)]);
    }

    #[test]
    fn locks_that_are_kept_in_mind_are_bounded() {
        let mut carry = Carry::default();
        for id in 0..5000 {
            carry.released(Lock::Queue(id), id as Time, always);
            for index in 0..PAGES as u32 + 9 {
                carry.taken(page(index), Access::Write, NodeId(2), id as Time);
            }
        }
        assert_eq!(carry.locks.len(), LOCKS);
        assert!(carry.locks.values().all(|h| h.pages.len() <= PAGES));
        carry.retain(|_| false);
        assert!(carry.locks.is_empty());
    }
}
