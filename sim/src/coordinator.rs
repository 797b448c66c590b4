//! The coordinator's tables as they grow: what its calls really take.
//!
//! Unlike the rest of this crate this is measured in real time, on the very
//! [`migshm_coordinator::Core`] that serves clusters. What takes the same time in each column is
//! constant for a call; what grows with a column would be quadratic in all.

use std::time::Instant;

use migshm_coordinator::{Core, Output};
use migshm_protocol::call::{Call, Caller, Errno, SemBuf, SetMemory};
use migshm_protocol::control::ToCoordinator;
use migshm_protocol::{NodeId, ProcessId};
use serde::Serialize;

/// Nanoseconds for each call, by what is done.
#[derive(Clone, Debug, Serialize)]
pub struct Growth {
    /// What is done.
    pub what: &'static str,
    /// By [`SIZES`].
    pub nanoseconds: Vec<f64>,
}

/// Nodes, and processes of them all.
pub const SIZES: [(usize, usize); 4] = [(16, 1_000), (64, 4_000), (256, 25_000), (1024, 100_000)];

/// Flag of a `sembuf`: undo when the process ends.
const SEM_UNDO: i16 = 0x1000;
/// Sets that processes spread over.
const SETS: usize = 10_000;

/// Measures all of it.
#[must_use]
pub fn grow() -> Vec<Growth> {
    let mut growths: Vec<Growth> = Vec::new();
    for (nodes, processes) in SIZES {
        for (at, (what, nanoseconds)) in stages(nodes, processes).into_iter().enumerate() {
            if growths.len() <= at {
                growths.push(Growth {
                    what,
                    nanoseconds: Vec::new(),
                });
            }
            growths[at].nanoseconds.push(nanoseconds);
        }
    }
    growths
}

/// For people.
#[must_use]
pub fn table(growths: &[Growth]) -> String {
    let mut table = format!("{:<44}", "nanoseconds for each, of nodes/processes");
    for (nodes, processes) in SIZES {
        table += &format!("{:>14}", format!("{nodes}/{processes}"));
    }
    for Growth { what, nanoseconds } in growths {
        table += &format!("\n{what:<44}");
        for time in nanoseconds {
            table += &format!("{time:>14.0}");
        }
    }
    table + "\n"
}

/// A coordinator, and processes that call it in turn.
struct Load {
    core: Core,
    out: Vec<Output>,
    nodes: usize,
    calls: u64,
}

fn stages(nodes: usize, processes: usize) -> Vec<(&'static str, f64)> {
    let mut load = Load {
        core: Core::new(),
        out: Vec::new(),
        nodes,
        calls: 0,
    };
    let sets = SETS.min(processes);
    let mut times = Vec::new();
    let mut stage = |load: &mut Load, what, count: usize, each: &dyn Fn(&mut Load, usize)| {
        let started = Instant::now();
        for index in 0..count {
            each(load, index);
            load.out.clear();
        }
        let time = started.elapsed().as_nanos() as f64 / count as f64;
        times.push((what, time));
    };
    let load = &mut load;
    stage(load, "join", nodes, &|load, node| load.join(node));
    stage(load, "semget of a new set", sets, &|load, set| {
        let (key, flags) = (set as i32 + 1, 0o1600);
        load.call(
            set,
            Call::SemGet {
                key,
                count: 4,
                flags,
            },
            &[],
        );
    });
    stage(
        load,
        "semop with SEM_UNDO, spread over sets",
        processes,
        &|load, process| {
            load.operate(process, (process % sets) as i32, 0, 1, SEM_UNDO);
        },
    );
    stage(
        load,
        "semop that blocks, all at one semaphore",
        processes,
        &|load, process| {
            load.operate(process, 0, 3, -1, 0);
        },
    );
    stage(
        load,
        "cancel of every second of them",
        processes / 2,
        &|load, half| {
            let process = 2 * half;
            let id = load.calls - (processes - process) as u64 + 1;
            load.cancel(process, id);
        },
    );
    stage(
        load,
        "semop that wakes one of the others",
        processes / 2,
        &|load, process| {
            load.operate(process, 0, 3, 1, 0);
        },
    );
    stage(
        load,
        "exit of every second process, with undo",
        processes / 2,
        &|load, half| {
            load.exit(2 * half);
        },
    );
    stage(
        load,
        "leave of a node with the others",
        nodes,
        &|load, node| {
            load.core.leave(1, NodeId(node as u16), &mut load.out);
        },
    );
    times
}

impl Load {
    fn join(&mut self, node: usize) {
        let address = "127.0.0.1:1".parse().expect("an address");
        let joined = self
            .core
            .join(format!("node{node}"), address, 1 << 30, &mut self.out);
        assert!(joined.is_ok());
    }

    fn node(&self, process: usize) -> NodeId {
        NodeId((process % self.nodes) as u16)
    }

    fn call(&mut self, process: usize, call: Call, raw: &[u8]) {
        self.calls += 1;
        let caller = Caller {
            process: ProcessId(process as u64),
            pid: process as i32,
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            capabilities: 0,
            memlock: None,
        };
        let id = self.calls;
        let node = self.node(process);
        let message = ToCoordinator::Call { id, caller, call };
        self.core.handle(1, node, message, raw, &mut self.out);
    }

    fn operate(&mut self, process: usize, id: i32, num: u16, op: i16, flags: i16) {
        let raw = SemBuf { num, op, flags }.to_bytes();
        let memory = SetMemory::Unusable;
        self.call(process, Call::SemOp { id, memory }, &raw);
    }

    fn cancel(&mut self, process: usize, id: u64) {
        let errno = Errno::EAGAIN;
        let message = ToCoordinator::Cancel { id, errno };
        let node = self.node(process);
        self.core.handle(1, node, message, &[], &mut self.out);
        assert_eq!(self.out.len(), 1, "the call was blocked");
    }

    fn exit(&mut self, process: usize) {
        let message = ToCoordinator::Exited {
            process: ProcessId(process as u64),
            pid: process as i32,
        };
        let node = self.node(process);
        self.core.handle(1, node, message, &[], &mut self.out);
    }
}
