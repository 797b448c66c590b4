//! Memory that somebody has written anything into.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicU64, Ordering};

use migshm_semaphores::{Layout, Moment, Operator, SEATS, Set, State};

/// A small generator (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Often with few bits set, as the words have that mean something.
    fn word(&mut self) -> u64 {
        match self.next() % 4 {
            0 => self.next(),
            1 => self.next() & self.next() & self.next(),
            2 => 1 << (self.next() % 64) | 1 << (self.next() % 64),
            _ => 0,
        }
    }
}

#[test]
fn garbage_harms_nobody() {
    let mut random = Random(1);
    for round in 0..20_000 {
        let layout = Layout::of(1 + round % 5).unwrap();
        let words: Vec<AtomicU64> = (0..layout.words())
            .map(|_| AtomicU64::new(random.word()))
            .collect();
        let set = Set::new(&words, layout).unwrap();
        for _ in 0..20 {
            let who = Operator {
                pid: random.next() as i32,
                seat: (!random.next().is_multiple_of(3)).then_some((random.next() % 70) as usize),
            };
            let now = Moment {
                seconds: 0,
                boottime: random.word(),
            };
            let num = (random.next() % 7) as usize;
            let undo = random.next().is_multiple_of(2);
            let _ = set.operate(who, num, random.next() as i16, undo, now);
            let at = (random.next() % words.len() as u64) as usize;
            words[at].store(random.word(), Ordering::Relaxed);
        }
        let (state, accounts) = set.close();
        assert_eq!(state.values.len(), layout.semaphores());
        assert!(state.values.iter().all(|&value| value <= 32767));
        assert!(accounts.iter().all(|account| account.seat < SEATS));
        // Nothing of it is left when the set is opened again.
        let sane = State {
            values: vec![7; layout.semaphores()],
            pids: vec![9; layout.semaphores()],
            otime: 3,
            owing: Vec::new(),
        };
        set.open(&sane);
        let (state, _) = set.close();
        assert_eq!(state, sane);
    }
}
