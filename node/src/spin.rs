//! When the daemon looks for news instead of sleeping.
//!
//! While something is expected soon of other nodes (the answer to a fault that a thread of this node
//! waits for; the next request of a node that has just been answered) the daemon polls where that
//! pays ([`migshm_protocol::polling`]), and only on a machine that has more than one core and a core
//! for everything that runs: who waits for an answer polls on the core that its thread has left. (A
//! `sched_yield(2)` between two looks made faults slower than sleeping does.) For the next call of a
//! process its connection's task polls.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::thread::available_parallelism;

use migshm_coherence::Time;
use migshm_protocol::polling::Expected;
use tokio::sync::Notify;

/// Nanoseconds of polling at most, for what other nodes send.
const OF_NODES: Time = 200_000;
/// Nanoseconds for which it is taken to be true that there are idle cores: this daemon may run before
/// everything else on its core, another daemon that has to be waited for included.
const LOOK_INTERVAL: Time = 20_000;

/// Whether to poll.
#[derive(Default)]
pub struct Spin {
    /// The answer to a fault.
    answers: Expected,
    /// The request after an answer.
    requests: Expected,
    cores: Cores,
    /// There is something to poll for.
    pub begun: Rc<Notify>,
}

impl Spin {
    /// A thread waits for another node's answer.
    pub fn expect_answer(&mut self, now: Time) {
        self.answers.expect(now, OF_NODES);
        self.begin(now);
    }

    /// Another node's answer has come.
    pub fn note_answer(&mut self, now: Time) {
        self.answers.came(now, OF_NODES);
    }

    /// Another node has been answered.
    pub fn expect_request(&mut self, now: Time) {
        self.requests.expect(now, OF_NODES);
        self.begin(now);
    }

    /// Another node asks.
    pub fn note_request(&mut self, now: Time) {
        self.requests.came(now, OF_NODES);
    }

    fn begin(&mut self, now: Time) {
        if self.is_worthwhile(now) {
            self.begun.notify_one();
        }
    }

    /// Whether to go on.
    pub fn is_worthwhile(&mut self, now: Time) -> bool {
        (self.answers.is_near(now, OF_NODES) || self.requests.is_near(now, OF_NODES))
            && self.cores.are_idle(now)
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
    fn the_kernel_tells_what_runs() {
        let load = File::open("/proc/loadavg").unwrap();
        assert!(running(&load).unwrap() >= 1);
    }
}
