//! What a worker measures: System V IPC as a program sees it, on whatever serves it.
//!
//! Every task verifies what it reads, outside of the time it measures; data that nobody wrote is
//! an error, however fast it came.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::sysv::{self, PAGE_WORDS, Segment, Semaphores};

/// Words of a cache line: random accesses go to different ones.
const LINE_WORDS: usize = 8;

/// Operations on a new semaphore set that are not counted; an even number.
const SEMOP_WARM_UP: usize = 20;

/// One thing to do; answered with samples in nanoseconds for one operation.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Task {
    /// `shmget`, `shmat`, `shmdt`, `IPC_RMID`.
    AttachCycle {
        /// How many.
        times: usize,
    },
    /// The first write to each page of a new segment.
    FirstTouch {
        /// Its size.
        pages: usize,
    },
    /// Reads all of a segment whose pages are there, from its beginning to its end.
    StreamRead {
        /// Its size.
        pages: usize,
        /// How often.
        passes: usize,
    },
    /// Writes all of it.
    StreamWrite {
        /// Its size.
        pages: usize,
        /// How often.
        passes: usize,
    },
    /// Reads every cache line once, in random order, each read giving the next one's place.
    RandomAccess {
        /// Its size.
        pages: usize,
    },
    /// `semop` without a wait: adds and takes in turns.
    Semop {
        /// How many calls.
        times: usize,
        /// With `SEM_UNDO`.
        undo: bool,
    },
    /// Two processes hand a semaphore-guarded word to each other; a round trip is two hand-overs.
    PingPong {
        /// How many round trips.
        times: usize,
        /// Whether both share one core.
        one_core: bool,
    },
    /// `fork` and `waitpid` of a process that has a segment attached.
    Fork {
        /// How many.
        times: usize,
    },
    /// Attaches the segment with this key, in place of the last one. Measures nothing, like the
    /// next two.
    Map {
        /// The key.
        key: i32,
        /// The segment's size.
        pages: usize,
    },
    /// Whether segments that are made from now on have release consistency, where that is to be had.
    Consistency {
        /// Else sequential.
        release: bool,
    },
    /// One of two processes that write alternate words of the same pages of it between barriers,
    /// column by column; samples of one page in one round. They check what they see.
    FalseSharing {
        /// Key of two semaphores, for the two sides.
        key: i32,
        /// 0 or 1; 0 removes the set.
        side: u16,
        /// How often they do.
        rounds: usize,
        /// Nanoseconds of computing for each word of a page.
        work: u64,
    },
    /// Writes all of the attached segment.
    Fill {
        /// What tells this writing from others.
        stamp: u32,
    },
    /// Detaches it.
    Unmap {
        /// And removes it.
        remove: bool,
    },
    /// Touches each of its pages once, in random order; a sample for each page.
    Touch {
        /// What [`Task::Fill`] wrote.
        stamp: u32,
        /// Write, or read.
        write: bool,
    },
    /// Reads all of it, from its beginning to its end; one sample.
    Scan {
        /// What [`Task::Fill`] wrote.
        stamp: u32,
    },
    /// One of two processes that hand a word of it to each other.
    HandOver {
        /// Key of two semaphores, for the two sides.
        key: i32,
        /// 0 begins; 1 follows.
        side: u16,
        /// How often each side gets the word.
        times: usize,
    },
}

/// A worker's state.
#[derive(Default)]
pub struct Tasks {
    segment: Option<Segment>,
}

impl Tasks {
    /// Performs a task.
    ///
    /// # Errors
    /// A call fails, or memory does not contain what was written.
    pub fn perform(&mut self, task: Task) -> Result<Vec<f64>> {
        match task {
            Task::AttachCycle { times } => mean(times, |_| Segment::private(1).map(drop)),
            Task::FirstTouch { pages } => first_touch(pages),
            Task::StreamRead { pages, passes } => stream_read(pages, passes),
            Task::StreamWrite { pages, passes } => stream_write(pages, passes),
            Task::RandomAccess { pages } => random_access(pages),
            Task::Semop { times, undo } => semop(times, undo),
            Task::PingPong { times, one_core } => ping_pong(times, one_core),
            Task::Fork { times } => fork(times),
            Task::Map { key, pages } => {
                self.segment = None;
                self.segment = Some(Segment::attach(key, pages)?);
                Ok(vec![0.0])
            }
            Task::Consistency { release } => {
                let name = if release { "release" } else { "sequential" };
                // SAFETY: a worker has one thread.
                unsafe { std::env::set_var("MIGSHM_CONSISTENCY", name) };
                Ok(vec![0.0])
            }
            Task::FalseSharing {
                key,
                side,
                rounds,
                work,
            } => {
                let set = Semaphores::open(key, 2)?;
                false_sharing(set, self.segment()?, side, rounds, work)
            }
            Task::Fill { stamp } => {
                let segment = self.segment()?;
                for index in 0..segment.len() {
                    segment.store(index, content(stamp, index / PAGE_WORDS));
                }
                Ok(vec![0.0])
            }
            Task::Unmap { remove } => {
                let segment = self.segment.take().context("no segment is mapped")?;
                if remove {
                    segment.remove()?;
                }
                Ok(vec![0.0])
            }
            Task::Touch { stamp, write } => touch(self.segment()?, stamp, write),
            Task::Scan { stamp } => scan(self.segment()?, stamp),
            Task::HandOver { key, side, times } => {
                hand_over(Semaphores::open(key, 2)?, self.segment()?, side, times)
            }
        }
    }

    fn segment(&self) -> Result<&Segment> {
        self.segment.as_ref().context("no segment is mapped")
    }
}

/// What every word of a page contains.
fn content(stamp: u32, page: usize) -> u64 {
    u64::from(stamp) << 32 | page as u64
}

fn first_touch(pages: usize) -> Result<Vec<f64>> {
    let segment = Segment::private(pages)?;
    let sample = mean(pages, |page| {
        segment.store(page * PAGE_WORDS, 1);
        Ok(())
    })?;
    for page in 0..pages {
        ensure!(
            segment.load(page * PAGE_WORDS + 1) == 0,
            "a new page is not zero"
        );
    }
    Ok(sample)
}

fn stream_read(pages: usize, passes: usize) -> Result<Vec<f64>> {
    let mut segment = Segment::private(pages)?;
    // SAFETY: nobody else has the segment.
    let words = unsafe { segment.words() };
    words.fill(3);
    (0..passes)
        .map(|_| {
            let start = Instant::now();
            let sum: u64 = black_box(&*words).iter().sum();
            let elapsed = nanoseconds(start);
            ensure!(sum == 3 * words.len() as u64, "wrong data read");
            Ok(elapsed)
        })
        .collect()
}

fn stream_write(pages: usize, passes: usize) -> Result<Vec<f64>> {
    let mut segment = Segment::private(pages)?;
    // SAFETY: nobody else has the segment.
    let words = unsafe { segment.words() };
    words.fill(0);
    (1..=passes as u64)
        .map(|pass| {
            let start = Instant::now();
            black_box(&mut *words).fill(pass);
            let elapsed = nanoseconds(start);
            ensure!(words.iter().all(|word| *word == pass), "wrong data read");
            Ok(elapsed)
        })
        .collect()
}

fn random_access(pages: usize) -> Result<Vec<f64>> {
    let segment = Segment::private(pages)?;
    let lines = segment.len() / LINE_WORDS;
    let order = shuffled(lines);
    for (index, line) in order.iter().enumerate() {
        segment.store(line * LINE_WORDS, order[(index + 1) % lines] as u64);
    }
    let mut line = order[0];
    let sample = mean(lines, |_| {
        line = usize::try_from(segment.load(line * LINE_WORDS))?;
        Ok(())
    })?;
    ensure!(line == order[0], "wrong data read");
    Ok(sample)
}

fn semop(times: usize, undo: bool) -> Result<Vec<f64>> {
    let set = Semaphores::open(libc::IPC_PRIVATE, 1)?;
    let flags = if undo { libc::SEM_UNDO } else { 0 };
    let operate = |index| set.add(0, if index % 2 == 0 { 1 } else { -1 }, flags);
    // The first operations of a set are of another kind.
    (0..SEMOP_WARM_UP).try_for_each(operate)?;
    let sample = mean(times, operate)?;
    set.remove()?;
    Ok(sample)
}

fn ping_pong(times: usize, one_core: bool) -> Result<Vec<f64>> {
    let _core = one_core.then(sysv::OneCore::stay).transpose()?;
    let set = Semaphores::open(libc::IPC_PRIVATE, 2)?;
    let segment = Segment::private(1)?;
    // SAFETY: a worker has one thread.
    let child = unsafe { sysv::fork(|| hand_over(set, &segment, 1, times).map(drop)) }?;
    let samples = hand_over(set, &segment, 0, times)?;
    child.wait()?;
    Ok(samples.iter().map(|hand_over| 2.0 * hand_over).collect())
}

fn fork(times: usize) -> Result<Vec<f64>> {
    let segment = Segment::private(1)?;
    segment.store(0, 1);
    let check = || {
        ensure!(segment.load(0) == 1, "wrong data read");
        Ok(())
    };
    // SAFETY: a worker has one thread.
    mean(times, |_| unsafe { sysv::fork(check) }?.wait())
}

fn touch(segment: &Segment, stamp: u32, write: bool) -> Result<Vec<f64>> {
    let pages = segment.len() / PAGE_WORDS;
    let mut samples = Vec::with_capacity(pages);
    for page in shuffled(pages) {
        let word = page * PAGE_WORDS;
        let start = Instant::now();
        if write {
            segment.store(word + 1, u64::MAX);
            samples.push(nanoseconds(start));
        } else {
            let read = segment.load(word);
            samples.push(nanoseconds(start));
            ensure!(
                read == content(stamp, page),
                "page {page}: wrong data read: {read:x}"
            );
        }
    }
    for page in 0..pages {
        let read = segment.load(page * PAGE_WORDS + PAGE_WORDS - 1);
        ensure!(
            read == content(stamp, page),
            "page {page}: wrong data read: {read:x}"
        );
    }
    Ok(samples)
}

fn scan(segment: &Segment, stamp: u32) -> Result<Vec<f64>> {
    let start = Instant::now();
    let mut wrong = None;
    for page in 0..segment.len() / PAGE_WORDS {
        let first = page * PAGE_WORDS;
        let sum = (first..first + PAGE_WORDS)
            .fold(0_u64, |sum, word| sum.wrapping_add(segment.load(word)));
        if sum != content(stamp, page).wrapping_mul(PAGE_WORDS as u64) {
            wrong = wrong.or(Some(page));
        }
    }
    let elapsed = nanoseconds(start);
    ensure!(wrong.is_none(), "page {wrong:?}: wrong data read");
    Ok(vec![elapsed])
}

/// Time of one hand-over, after a tenth of them that warm up. Side 0 removes the set.
fn hand_over(set: Semaphores, segment: &Segment, side: u16, times: usize) -> Result<Vec<f64>> {
    let warm_up = times / 10;
    let mut start = Instant::now();
    if side == 0 {
        set.add(0, 1, 0)?;
    }
    for turn in 0..times {
        if turn == warm_up {
            start = Instant::now();
        }
        set.add(side, -1, 0)?;
        let count = segment.load(0);
        ensure!(
            count == 2 * turn as u64 + u64::from(side),
            "turn {turn}: wrong data read: {count}"
        );
        segment.store(0, count + 1);
        set.add(1 - side, 1, 0)?;
    }
    if side == 0 {
        set.add(0, -1, 0)?;
    }
    let elapsed = nanoseconds(start);
    if side == 0 {
        set.remove()?;
    }
    Ok(vec![elapsed / (2 * (times - warm_up)) as f64])
}

/// Time that writing takes, with so many nanoseconds of computing before each column, for one page.
fn false_sharing(
    set: Semaphores,
    segment: &Segment,
    side: u16,
    rounds: usize,
    work: u64,
) -> Result<Vec<f64>> {
    let pages = segment.len() / PAGE_WORDS;
    let barrier = || {
        set.add(1 - side, 1, 0)?;
        set.add(side, -1, 0)
    };
    let value = |round: usize, index: usize| (index ^ (round % 3 + 1)) as u64;
    let mut samples = Vec::with_capacity(rounds);
    for round in 0..rounds {
        barrier()?;
        let start = Instant::now();
        for word in (usize::from(side)..PAGE_WORDS).step_by(2) {
            compute(work);
            for page in 0..pages {
                let index = page * PAGE_WORDS + word;
                segment.store(index, value(round, index));
            }
        }
        barrier()?;
        samples.push(nanoseconds(start) / pages as f64);
        for index in 0..segment.len() {
            ensure!(
                segment.load(index) == value(round, index),
                "round {round}: wrong data read"
            );
        }
    }
    // The other side waits for nothing any more.
    if side == 0 {
        set.add(0, -1, 0)?;
        set.remove()?;
    } else {
        set.add(0, 1, 0)?;
    }
    Ok(samples)
}

/// Keeps the processor busy for so many nanoseconds.
fn compute(work: u64) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_nanos(work) {
        std::hint::spin_loop();
    }
}

/// Mean time of an operation that is too short to be timed by itself.
fn mean(times: usize, mut operation: impl FnMut(usize) -> Result<()>) -> Result<Vec<f64>> {
    let start = Instant::now();
    for index in 0..times {
        operation(index)?;
    }
    Ok(vec![nanoseconds(start) / times as f64])
}

fn nanoseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9
}

/// 0 to `length`, in an order that looks random and is the same in every run.
fn shuffled(length: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..length).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for index in (1..length).rev() {
        // Xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        #[allow(clippy::cast_possible_truncation, reason = "smaller than the length")]
        order.swap(index, (state % (index as u64 + 1)) as usize);
    }
    order
}
