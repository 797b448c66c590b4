//! When the daemon looks for news instead of sleeping.
//!
//! To be woken takes a core that sleeps tens of microseconds, a good part of a remote fault. So while
//! something is expected soon (the answer to a fault that a thread of this node waits for; the next
//! request of a node that has just been answered) the daemon polls: for no longer than twice what
//! such things have taken lately, not at all where that is longer than [`MAX_SPIN`], and only on a
//! machine that has more than one core and a core for everything that runs: who waits for an
//! answer polls on the core that its thread has left. (A `sched_yield(2)` between two looks made
//! faults slower than sleeping does.)

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::thread::available_parallelism;

use migshm_coherence::Time;
use tokio::sync::Notify;

/// Nanoseconds of polling at most.
const MAX_SPIN: Time = 200_000;
/// Nanoseconds for which it is taken to be true that there are idle cores: this daemon may run before
/// everything else on its core, another daemon that has to be waited for included.
const LOOK_INTERVAL: Time = 20_000;

/// Whether to poll.
#[derive(Default)]
pub struct Spin {
    /// The answer to a fault.
    pub answers: Expected,
    /// The request after an answer.
    pub requests: Expected,
    cores: Cores,
    /// There is something to poll for.
    pub begun: Rc<Notify>,
}

impl Spin {
    /// Something has just been told to be expected: polls if that pays.
    pub fn begin(&mut self, now: Time) {
        if self.is_worthwhile(now) {
            self.begun.notify_one();
        }
    }

    /// Whether to go on.
    pub fn is_worthwhile(&mut self, now: Time) -> bool {
        (self.answers.is_near(now) || self.requests.is_near(now)) && self.cores.are_idle(now)
    }
}

/// Something that comes some time after something else.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    since: Option<Time>,
    /// Nanoseconds, a mean in which the latest count most.
    usual: Time,
}

impl Expected {
    /// It will come.
    pub fn expect(&mut self, now: Time) {
        self.since = Some(now);
    }

    /// It has come.
    pub fn came(&mut self, now: Time) {
        if let Some(since) = self.since.take() {
            let took = now.saturating_sub(since).min(4 * MAX_SPIN);
            self.usual = (7 * self.usual + took) / 8;
        }
    }

    /// Whether it is worth while to look for it.
    fn is_near(&self, now: Time) -> bool {
        let limit = 2 * self.usual.max(MAX_SPIN / 16);
        self.usual <= MAX_SPIN
            && self
                .since
                .is_some_and(|since| now.saturating_sub(since) < limit.min(MAX_SPIN))
    }
}

/// What else runs on this machine.
struct Cores {
    count: usize,
    /// `/proc/loadavg`.
    load: Option<File>,
    looked: Time,
    idle: bool,
}

impl Default for Cores {
    fn default() -> Cores {
        Cores {
            count: available_parallelism().map_or(1, usize::from),
            load: File::open("/proc/loadavg").ok(),
            looked: 0,
            idle: false,
        }
    }
}

impl Cores {
    /// Whether there is a core for everything that runs, this daemon included.
    fn are_idle(&mut self, now: Time) -> bool {
        if now.saturating_sub(self.looked) >= LOOK_INTERVAL {
            self.looked = now;
            let running = self.load.as_ref().and_then(running);
            self.idle = self.count > 1 && running.is_some_and(|n| n <= self.count);
        }
        self.idle
    }
}

/// How many threads run or could: `proc_loadavg(5)`.
fn running(load: &File) -> Option<usize> {
    let mut text = [0; 64];
    let length = load.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..length]).ok()?;
    text.split(' ').nth(3)?.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_late_is_not_waited_for() {
        let mut expected = Expected::default();
        let mut waits = |took: Time| {
            expected.expect(0);
            let waits = (0..2 * MAX_SPIN)
                .step_by(1000)
                .find(|t| !expected.is_near(*t));
            expected.came(took);
            waits
        };
        for _ in 0..20 {
            let _ = waits(50_000);
        }
        assert!((80_000..=101_000).contains(&waits(50_000).unwrap()));
        for _ in 0..20 {
            let _ = waits(10 * MAX_SPIN);
        }
        assert_eq!(waits(50_000), Some(0));
        for _ in 0..40 {
            let _ = waits(50_000);
        }
        assert!(waits(50_000) > Some(80_000));
    }

    #[test]
    fn the_kernel_tells_what_runs() {
        let load = File::open("/proc/loadavg").unwrap();
        assert!(running(&load).unwrap() >= 1);
    }
}
