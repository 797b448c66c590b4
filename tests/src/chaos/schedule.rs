//! What is done to a cluster, and when: a function of the seed.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::random::Random;

/// The longest that a daemon is stopped where the cluster is to go on as if nothing had been: well
/// below the 3 s after which a node counts as dead.
const BRIEF: Duration = Duration::from_millis(1500);
/// The same of a link that is cut. QUIC probes a link ever more seldom: it may find the link mended
/// only when as much time again has passed.
const BRIEF_CUT: Duration = Duration::from_millis(700);
/// Mean time between two faults of processes, and between the end of a fault of a host and the next.
const MEAN_GAP: Duration = Duration::from_millis(400);

/// A kind of fault. Each says what must hold in spite of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL of a client, which is replaced: what it held with SEM_UNDO is free again, of its last
    /// operation nothing is known, all else stands.
    KillProcess,
    /// SIGSTOP of a client: others wait for what it holds, no longer.
    StopProcess,
    /// SIGSTOP of a node's daemon for less than 3 s: all is as if it had not been.
    PauseDaemon,
    /// SIGSTOP of the coordinator, likewise.
    PauseCoordinator,
    /// The link of a node is cut for less than 1 s, likewise.
    Cut,
    /// The link of the coordinator, likewise.
    CutCoordinator,
    /// A node's daemon is killed and started again: its processes wait, and go on.
    KillDaemon,
    /// The coordinator is killed and started again: programs wait, and go on.
    KillCoordinator,
    /// A node is killed with all its processes, and comes back empty: a page that only it had is
    /// lost for good (SIGBUS), all else stands.
    CrashNode,
    /// The coordinator that leads is killed, and started again when another leads: a pause.
    KillLeader,
    /// The member of etcd that leads it is killed, and started again when another leads: a pause.
    KillEtcdLeader,
}

impl Fault {
    /// All that happen at scheduled times.
    pub const ALL: [Fault; 9] = [
        Fault::KillProcess,
        Fault::StopProcess,
        Fault::PauseDaemon,
        Fault::PauseCoordinator,
        Fault::Cut,
        Fault::CutCoordinator,
        Fault::KillDaemon,
        Fault::KillCoordinator,
        Fault::CrashNode,
    ];

    /// Those that the clients do not notice.
    pub const SURVIVED: [Fault; 7] = [
        Fault::KillProcess,
        Fault::StopProcess,
        Fault::PauseDaemon,
        Fault::PauseCoordinator,
        Fault::Cut,
        Fault::CutCoordinator,
        Fault::KillCoordinator,
    ];

    /// Those that happen in turn, each when the one before is over: a cluster of several coordinators survives them.
    pub const OF_LEADERS: [Fault; 2] = [Fault::KillLeader, Fault::KillEtcdLeader];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Fault::KillProcess => "kill-process",
            Fault::StopProcess => "stop-process",
            Fault::PauseDaemon => "pause-daemon",
            Fault::PauseCoordinator => "pause-coordinator",
            Fault::Cut => "cut",
            Fault::CutCoordinator => "cut-coordinator",
            Fault::KillDaemon => "kill-daemon",
            Fault::KillCoordinator => "kill-coordinator",
            Fault::CrashNode => "crash-node",
            Fault::KillLeader => "kill-leader",
            Fault::KillEtcdLeader => "kill-etcd-leader",
        }
    }

    /// Whether it befalls one client, not a host.
    #[must_use]
    pub fn is_of_process(self) -> bool {
        matches!(self, Fault::KillProcess | Fault::StopProcess)
    }

    /// Whether it needs a network that can be cut.
    #[must_use]
    pub fn is_cut(self) -> bool {
        matches!(self, Fault::Cut | Fault::CutCoordinator)
    }

    fn is_of_coordinator(self) -> bool {
        matches!(
            self,
            Fault::PauseCoordinator | Fault::CutCoordinator | Fault::KillCoordinator
        )
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Fault, String> {
        let known = Fault::ALL.into_iter().find(|fault| fault.name() == name);
        known.ok_or_else(|| {
            let names = Fault::ALL.map(Fault::name).join(", ");
            format!("no fault {name:?}; there are {names}")
        })
    }
}

/// A fault that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// After the start of the run.
    pub at: Duration,
    /// How long it lasts; nothing of [`Fault::KillProcess`].
    pub lasts: Duration,
    /// What happens.
    pub fault: Fault,
    /// The client's place, or the node's number from 1; 0 is the coordinator.
    pub target: usize,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Event {
            at,
            lasts,
            fault,
            target,
        } = self;
        let of = if fault.is_of_process() {
            "client"
        } else {
            "host"
        };
        let name = fault.name();
        write!(f, "{:>7.3} s  {name} of {of} {target}", at.as_secs_f64())?;
        if *fault != Fault::KillProcess {
            write!(f, " for {:.3} s", lasts.as_secs_f64())?;
        }
        Ok(())
    }
}

/// All that follows from a seed.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Whether the segments that locks guard have release consistency.
    pub release: bool,
    /// In the order of time. Faults of hosts do not overlap; faults of clients overlap anything.
    pub events: Vec<Event>,
}

impl Schedule {
    /// The schedule of a seed for this many nodes and clients.
    #[must_use]
    pub fn new(
        seed: u64,
        nodes: usize,
        clients: usize,
        time: Duration,
        faults: &[Fault],
    ) -> Schedule {
        let mut random = Random(seed);
        let release = random.below(2) == 1;
        let mut events = Vec::new();
        let (of_processes, of_hosts): (Vec<Fault>, Vec<Fault>) =
            faults.iter().partition(|fault| fault.is_of_process());
        for faults in [of_processes, of_hosts] {
            let mut at = up_to(&mut random, 2 * MEAN_GAP);
            while at < time && !faults.is_empty() {
                let fault = faults[random.index(faults.len())];
                let target = match fault {
                    _ if fault.is_of_process() => random.index(clients),
                    _ if fault.is_of_coordinator() => 0,
                    _ => 1 + random.index(nodes),
                };
                // As many of 1 to 2 ms as of 1 to 2 s.
                let longest = if fault.is_cut() { BRIEF_CUT } else { BRIEF };
                let longest = longest / (1 << random.below(11));
                let lasts = longest / 2 + up_to(&mut random, longest / 2);
                events.push(Event {
                    at,
                    lasts,
                    fault,
                    target,
                });
                at += up_to(&mut random, 2 * MEAN_GAP);
                if !fault.is_of_process() {
                    at += lasts;
                }
                if fault.is_cut() {
                    at += lasts;
                }
            }
        }
        events.sort_by_key(|event| event.at);
        Schedule { release, events }
    }
}

fn up_to(random: &mut Random, longest: Duration) -> Duration {
    Duration::from_micros(random.below(longest.as_micros() as u64 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_is_the_schedule() {
        let new = |seed| Schedule::new(seed, 3, 6, Duration::from_secs(20), &Fault::ALL).events;
        assert_eq!(new(1), new(1));
        assert_ne!(new(1), new(2));
    }

    #[test]
    fn faults_of_hosts_do_not_overlap_and_all_happen() {
        let time = Duration::from_secs(600);
        let Schedule { events, .. } = Schedule::new(7, 3, 6, time, &Fault::ALL);
        for fault in Fault::ALL {
            assert!(events.iter().any(|event| event.fault == fault), "{fault:?}");
        }
        let of_hosts = events.iter().filter(|event| !event.fault.is_of_process());
        for pair in of_hosts.collect::<Vec<_>>().windows(2) {
            assert!(pair[0].at + pair[0].lasts <= pair[1].at);
            assert!(pair[0].lasts <= BRIEF);
        }
    }
}
