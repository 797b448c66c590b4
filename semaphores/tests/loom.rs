//! Every interleaving of a few processes, one of which is killed at every possible instant, and of
//! the daemon that closes the set: `scripts/test` runs it.
#![cfg(loom)]

use loom::sync::Arc;
use loom::thread;
use migshm_semaphores::{AtomicU64, Kill, Layout, Moment, Operator, Outcome, Set, State};

const NOW: Moment = Moment {
    seconds: 7,
    boottime: 1,
};

struct Memory {
    words: Vec<AtomicU64>,
    layout: Layout,
}

impl Memory {
    /// Open, with these values, and a seat for each of so many processes.
    fn open(values: &[u16], processes: usize) -> Arc<Memory> {
        let layout = Layout::of(values.len()).unwrap();
        let words = (0..layout.words()).map(|_| AtomicU64::new(0)).collect();
        let memory = Arc::new(Memory { words, layout });
        for seat in 0..processes {
            memory.set().seat(seat, pid(seat));
        }
        memory.set().lease(2);
        memory.set().open(&State {
            values: values.to_vec(),
            pids: vec![0; values.len()],
            otime: 0,
            owing: vec![0; values.len()],
        });
        memory
    }

    fn set(&self) -> Set<'_> {
        Set::new(&self.words, self.layout).unwrap()
    }
}

fn pid(seat: usize) -> i32 {
    100 + seat as i32
}

fn who(seat: usize) -> Operator {
    Operator {
        pid: pid(seat),
        seat: Some(seat),
    }
}

/// What two processes owe to the first semaphore, in all sets closed so far.
#[derive(Default)]
struct Ledger {
    value: i64,
    owed: [i64; 2],
}

impl Ledger {
    fn close(&mut self, memory: &Memory) -> State {
        let (state, accounts) = memory.set().close();
        self.value = state.values[0].into();
        for account in accounts {
            self.owed[account.seat] += i64::from(account.owed[0]);
        }
        state
    }
}

/// 1 if an operation was done. It is not where another process owes something to the semaphore.
fn done(outcome: Outcome) -> i64 {
    i64::from(outcome == Outcome::Done)
}

/// Explores what two processes and the daemon do, the first process killed after each possible
/// number of accesses.
fn explore(run: impl Fn() + Copy + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(run);
}

/// Accesses of an operation with SEM_UNDO that nothing disturbs, and some.
const ACCESSES: usize = 14;

#[test]
fn a_killed_process_owes_what_it_has_done() {
    for kill in 0..=ACCESSES {
        explore(move || {
            let memory = Memory::open(&[2], 2);
            let workers: Vec<_> = (0..2)
                .map(|seat| {
                    let memory = memory.clone();
                    thread::spawn(move || {
                        if seat == 0 {
                            Kill::after(kill);
                        }
                        memory.set().operate(who(seat), 0, -1, true, NOW)
                    })
                })
                .collect();
            let outcomes: Vec<_> = workers.into_iter().map(|w| w.join().unwrap()).collect();
            let mut ledger = Ledger::default();
            let state = ledger.close(&memory);
            assert_eq!(ledger.owed[1], done(outcomes[1]));
            assert!(matches!(ledger.owed[0], 0 | 1));
            assert_eq!(ledger.value + ledger.owed[0] + ledger.owed[1], 2);
            assert!(state.pids.iter().all(|p| [100, 101].contains(p)));
        });
    }
}

#[test]
fn a_set_may_be_closed_and_opened_at_any_instant() {
    for kill in 0..=ACCESSES {
        explore(move || {
            let memory = Memory::open(&[1], 2);
            let worker = {
                let memory = memory.clone();
                thread::spawn(move || {
                    if kill < ACCESSES {
                        Kill::after(kill);
                    }
                    let first = memory.set().operate(who(0), 0, -1, true, NOW);
                    (first, memory.set().operate(who(0), 0, 1, true, NOW))
                })
            };
            let mut ledger = Ledger::default();
            let state = ledger.close(&memory);
            memory.set().open(&state);
            let (down, up) = worker.join().unwrap();
            ledger.close(&memory);
            assert_eq!(ledger.value + ledger.owed[0], 1);
            if kill == ACCESSES {
                assert_eq!(ledger.owed[0], done(down) - done(up));
            }
        });
    }
}

#[test]
fn what_a_killed_process_left_unsettled_others_settle_once() {
    for kill in 0..=ACCESSES {
        explore(move || {
            let memory = Memory::open(&[5], 2);
            let worker = {
                let memory = memory.clone();
                thread::spawn(move || {
                    Kill::after(kill);
                    memory.set().operate(who(0), 0, -1, true, NOW)
                })
            };
            let down = memory.set().operate(who(1), 0, -2, true, NOW);
            let up = memory.set().operate(who(1), 0, 1, true, NOW);
            worker.join().unwrap();
            let mut ledger = Ledger::default();
            ledger.close(&memory);
            assert_eq!(ledger.owed[1], 2 * done(down) - done(up));
            assert_eq!(ledger.value + ledger.owed[0] + ledger.owed[1], 5);
        });
    }
}

#[test]
fn a_set_of_two_may_be_closed_at_any_instant() {
    for kill in 0..=2 * ACCESSES {
        explore(move || {
            let memory = Memory::open(&[1, 1], 2);
            let worker = {
                let memory = memory.clone();
                thread::spawn(move || {
                    Kill::after(kill);
                    let set = memory.set();
                    let first = set.operate(who(0), 0, -1, true, NOW);
                    (first, set.operate(who(0), 1, -1, true, NOW))
                })
            };
            let (state, accounts) = memory.set().close();
            worker.join().unwrap();
            for num in 0..2 {
                let owed: i64 = accounts.iter().map(|a| i64::from(a.owed[num])).sum();
                assert_eq!(i64::from(state.values[num]) + owed, 1);
                assert!(state.pids[num] == if owed == 1 { pid(0) } else { 0 });
            }
        });
    }
}

#[test]
fn operations_without_undo_are_done_or_not() {
    for kill in 0..=4 {
        explore(move || {
            let memory = Memory::open(&[1], 2);
            let worker = {
                let memory = memory.clone();
                thread::spawn(move || {
                    Kill::after(kill);
                    memory.set().operate(who(0), 0, -1, false, NOW)
                })
            };
            let other = memory.set().operate(who(1), 0, -1, false, NOW);
            worker.join().unwrap();
            let mut ledger = Ledger::default();
            ledger.close(&memory);
            assert!(ledger.value == 0 || kill < 2 && ledger.value == 1);
            assert!(other == Outcome::Done || ledger.value == 0);
            assert_eq!(ledger.owed, [0, 0]);
        });
    }
}

#[test]
fn operations_on_two_semaphores_are_settled_one_after_the_other() {
    for kill in 0..=2 * ACCESSES {
        explore(move || {
            let memory = Memory::open(&[1, 1], 2);
            let worker = {
                let memory = memory.clone();
                thread::spawn(move || {
                    Kill::after(kill);
                    let set = memory.set();
                    let first = set.operate(who(0), 0, -1, true, NOW);
                    (first, set.operate(who(0), 1, -1, true, NOW))
                })
            };
            let other = memory.set().operate(who(1), 0, 1, false, NOW);
            worker.join().unwrap();
            let (state, accounts) = memory.set().close();
            let owed = |num: usize| accounts.first().map_or(0, |a| i64::from(a.owed[num]));
            assert_eq!(i64::from(state.values[0]) + owed(0), 1 + done(other));
            assert_eq!(i64::from(state.values[1]) + owed(1), 1);
        });
    }
}

#[test]
fn a_program_that_is_executed_completes_what_its_predecessor_began() {
    for kill in 0..=ACCESSES {
        explore(move || {
            let memory = Memory::open(&[1, 1], 2);
            let before = {
                let memory = memory.clone();
                thread::spawn(move || {
                    Kill::after(kill);
                    memory.set().operate(who(0), 0, -1, true, NOW)
                })
            };
            before.join().unwrap();
            let other = {
                let memory = memory.clone();
                thread::spawn(move || memory.set().operate(who(1), 0, 1, false, NOW))
            };
            memory.set().complete(0);
            let after = memory.set().operate(who(0), 1, -1, true, NOW);
            let other = other.join().unwrap();
            let (state, accounts) = memory.set().close();
            let owed = |num: usize| accounts.first().map_or(0, |a| i64::from(a.owed[num]));
            assert_eq!(after, Outcome::Done);
            assert_eq!(i64::from(state.values[0]) + owed(0), 1 + done(other));
            assert_eq!((i64::from(state.values[1]), owed(1)), (0, 1));
        });
    }
}
