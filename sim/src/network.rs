//! The network: when a message arrives that leaves now.

use migshm_coherence::Time;
use rustc_hash::FxHashMap;

use crate::random::Random;

/// What things take. Times are in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Shortest time of a message on its way.
    pub latency: Time,
    /// Mean of what comes on top of that, exponentially distributed.
    pub jitter: Time,
    /// Bytes per second that a node can send.
    pub bandwidth: u64,
    /// Processor time for a message that comes in, a fault or a call.
    pub receive: Time,
    /// Processor time for a message that goes out.
    pub send: Time,
}

impl Default for Costs {
    /// A LAN of 10 Gbit/s, and a daemon that handles some 100,000 messages a second.
    fn default() -> Self {
        Self {
            latency: 20_000,
            jitter: 5_000,
            bandwidth: 1_250_000_000,
            receive: 5_000,
            send: 3_000,
        }
    }
}

/// Links between all pairs of hosts. Those of one pair arrive in the order in which they left;
/// what a host sends shares its bandwidth.
#[derive(Debug)]
pub(crate) struct Links {
    costs: Costs,
    random: Random,
    /// By host: when what it has sent so far has left.
    free: Vec<Time>,
    /// By sender and receiver: when the last message arrives.
    last: FxHashMap<(usize, usize), Time>,
}

impl Links {
    pub(crate) fn new(hosts: usize, seed: u64, costs: Costs) -> Self {
        Self {
            costs,
            random: Random(seed),
            free: vec![0; hosts],
            last: FxHashMap::default(),
        }
    }

    /// When a message arrives that is ready to leave at `time`.
    pub(crate) fn arrival(&mut self, time: Time, from: usize, to: usize, bytes: usize) -> Time {
        let transmission = bytes as u64 * 1_000_000_000 / self.costs.bandwidth;
        let left = self.free[from].max(time) + transmission;
        self.free[from] = left;
        let jitter = self.random.exponential(self.costs.jitter as f64) as Time;
        let last = self.last.entry((from, to)).or_default();
        *last = (*last).max(left + self.costs.latency + jitter);
        *last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_pair_arrive_in_order_and_share_the_bandwidth() {
        let costs = Costs::default();
        let mut links = Links::new(3, 1, costs);
        let arrivals: Vec<Time> = (0..1000).map(|_| links.arrival(0, 0, 1, 1250)).collect();
        assert!(arrivals.is_sorted());
        assert!(arrivals[0] >= 1000 + costs.latency);
        let other = links.arrival(0, 0, 2, 1250);
        assert!(other >= 1001 * 1000 + costs.latency, "behind the others");
    }
}
