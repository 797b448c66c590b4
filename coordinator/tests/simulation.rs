//! Random runs of a whole cluster as the coordinator sees it: processes that take and return
//! semaphores with SEM_UNDO, attach, send and receive; that end, are interrupted, or go with their
//! node, whatever is under way; sets that are delegated and recalled; a clock that jumps.
//!
//! Now and then all that is under way is delivered. Then nothing may be missing: the semaphores and what processes
//! hold of them are as many as ever, attaches are counted right, every message is in the queue or was
//! taken once, and nobody waits for what is there.

mod support;

use std::collections::{HashSet, VecDeque};

use migshm_protocol::call::{Answer, Call, Errno, SetMemory, StatBy};
use migshm_protocol::control::{Debt, FromCoordinator, SetState, ToCoordinator};
use migshm_protocol::{NodeId, SegmentId};
use support::*;

const NODES: usize = 3;
const SEMAPHORES: usize = 3;
/// Of each semaphore.
const TOKENS: u16 = 2;
const STEPS: usize = 400;
/// Steps between two looks at everything.
const ROUND: usize = 40;

#[test]
fn nothing_is_lost_whoever_ends_whenever() {
    let mut seen = Seen::default();
    for seed in 0..20_000 {
        World::new(seed).run(&mut seen);
    }
    let Seen {
        delegations,
        recalls,
        undone,
        left,
        late,
        voided,
    } = seen;
    let counts = [delegations, recalls, undone, left, late, voided];
    assert!(
        counts.iter().all(|&count| count > 500),
        "hardly tried: {seen:?}"
    );
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    delegations: u64,
    recalls: u64,
    /// Processes that ended while they held something.
    undone: u64,
    /// Nodes that left.
    left: u64,
    /// Answers to processes that had ended.
    late: u64,
    /// Calls that were blocked when their process ended.
    voided: u64,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

struct World {
    random: Random,
    cluster: Cluster,
    hosts: Vec<Option<Host>>,
    programs: Vec<Program>,
    /// What no program changes.
    set: i32,
    queue: i32,
    segment: i32,
    last_pid: i32,
    /// Messages that were sent, and that were taken, be it by who had ended.
    sent: u64,
    taken: u64,
    /// Calls that send.
    sends: HashSet<u64>,
}

/// A node: what it has not read yet, and the set if that is delegated to it.
struct Host {
    node: NodeId,
    inbox: VecDeque<FromCoordinator>,
    delegated: Option<Delegated>,
}

struct Delegated {
    number: u64,
    values: Vec<u16>,
    debts: Vec<Debt>,
}

struct Program {
    process: Process,
    holds: [i16; SEMAPHORES],
    attached: Vec<SegmentId>,
    waits: Option<Wait>,
}

/// A call without an answer.
struct Wait {
    id: u64,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Operate(Vec<(u16, i16, i16)>),
    Attach,
    Send,
    Receive,
}

impl World {
    fn new(seed: u64) -> World {
        let mut cluster = Cluster::new();
        let hosts = (0..NODES).map(|host| Some(Host::join(&mut cluster, host)));
        let hosts: Vec<Option<Host>> = hosts.collect();
        let creator = root(NodeId(0), 1);
        let set = cluster.semget(&creator, 1, SEMAPHORES as i32, IPC_CREAT | 0o666);
        let set = set.expect("there is room");
        cluster
            .setall(&creator, set, &[TOKENS; SEMAPHORES])
            .expect("it is there");
        let queue = cluster.msgget(&creator, 1, IPC_CREAT | 0o666);
        let segment = cluster.shmget(&creator, 1, MIB, IPC_CREAT | 0o666);
        let mut world = World {
            random: Random(seed),
            cluster,
            hosts,
            programs: Vec::new(),
            set,
            queue: queue.expect("there is room"),
            segment: segment.expect("there is room"),
            last_pid: 1,
            sent: 0,
            taken: 0,
            sends: HashSet::new(),
        };
        world.sort_mail();
        world
    }

    fn run(mut self, seen: &mut Seen) {
        for step in 1..=STEPS {
            self.step(seen);
            self.sort_mail();
            if step % ROUND == 0 {
                self.settle(seen);
                self.check();
            }
        }
    }

    fn step(&mut self, seen: &mut Seen) {
        let host = self.random.below(NODES);
        let program = (!self.programs.is_empty()).then(|| self.random.below(self.programs.len()));
        match (self.random.below(100), program) {
            (0..40, _) => self.read(host, seen),
            (40..48, _) => self.start(host),
            (48..80, Some(program)) => self.call(program),
            (80..85, Some(program)) => self.interrupt(program),
            (85..92, Some(program)) => self.end(program, seen),
            (92..95, _) => self.give_back(host),
            (95..96, _) if self.hosts.iter().flatten().count() > 1 => self.leave(host, seen),
            (96..98, _) if self.hosts[host].is_none() => {
                self.hosts[host] = Some(Host::join(&mut self.cluster, host));
            }
            _ => self.cluster.now += self.random.below(2_000) as i64 - 1_000,
        }
    }

    /// Puts what was sent before those who are to read it.
    fn sort_mail(&mut self) {
        for output in std::mem::take(&mut self.cluster.mail) {
            let mut hosts = self.hosts.iter_mut().flatten();
            let host = hosts.find(|host| host.node == output.to);
            // What is said while a node joins, it gets.
            let host = host.unwrap_or_else(|| panic!("nobody is {}", output.to));
            host.inbox.push_back(output.message);
        }
    }

    fn start(&mut self, host: usize) {
        let Some(host) = &self.hosts[host] else {
            return;
        };
        self.last_pid += 1;
        self.programs.push(Program {
            process: root(host.node, self.last_pid),
            holds: [0; SEMAPHORES],
            attached: Vec::new(),
            waits: None,
        });
    }

    /// The program makes a call, if it does not wait for one.
    fn call(&mut self, program: usize) {
        if self.programs[program].waits.is_some() {
            return;
        }
        let flags = [0, IPC_NOWAIT][self.random.below(2)];
        match self.random.below(10) {
            0..6 => self.operate(program),
            6 => {
                let call = Call::ShmAttach {
                    id: self.segment,
                    flags: 0,
                };
                self.ask(program, Kind::Attach, call, &[]);
            }
            7 => {
                if let Some(segment) = self.programs[program].attached.pop() {
                    let process = self.programs[program].process.clone();
                    self.cluster.shmdt(&process, segment, 1);
                }
            }
            8 => {
                let call = Call::MsgSend {
                    id: self.queue,
                    flags,
                };
                self.ask(program, Kind::Send, call, &message(1, b"text"));
            }
            _ => {
                let call = Call::MsgReceive {
                    id: self.queue,
                    size: 10,
                    mtype: 0,
                    flags,
                };
                self.ask(program, Kind::Receive, call, &[]);
            }
        }
    }

    /// Takes one or two semaphores, or returns what it holds: by itself if the set is delegated to its
    /// node and that is possible at once.
    fn operate(&mut self, program: usize) {
        let Program { process, holds, .. } = &mut self.programs[program];
        let flags = UNDO | [0, NOWAIT][self.random.below(2)];
        let held = (0..SEMAPHORES).find(|&num| holds[num] > 0);
        let ops = match held {
            Some(num) if self.random.below(3) > 0 => vec![(num as u16, 1, flags)],
            _ => (0..1 + self.random.below(2))
                .map(|_| (self.random.below(SEMAPHORES) as u16, -1, flags))
                .collect(),
        };
        let mut hosts = self.hosts.iter_mut().flatten();
        let host = hosts.find(|host| host.node == process.node);
        let host = host.expect("programs go with their node");
        let node = host.node;
        if let Some(delegated) = &mut host.delegated {
            if let [(num, op, _)] = ops[..]
                && let Some(value) = delegated.values[usize::from(num)].checked_add_signed(op)
            {
                delegated.values[usize::from(num)] = value;
                delegated.debts.push(Debt {
                    process: process.caller.process,
                    pid: process.caller.pid,
                    num,
                    owed: -op,
                });
                holds[usize::from(num)] -= op;
                return;
            }
            let at = self.place_of(node);
            self.give_back(at);
        }
        let call = Call::SemOp {
            id: self.set,
            memory: SetMemory::Wanted,
        };
        let bytes = raw(&ops);
        self.ask(program, Kind::Operate(ops), call, &bytes);
    }

    fn ask(&mut self, program: usize, kind: Kind, call: Call, raw: &[u8]) {
        let program = &mut self.programs[program];
        let Pending { id, .. } = self.cluster.start(&program.process, call, raw);
        if matches!(kind, Kind::Send) {
            self.sends.insert(id);
        }
        program.waits = Some(Wait { id, kind });
    }

    fn interrupt(&mut self, program: usize) {
        let Program { process, waits, .. } = &self.programs[program];
        if let Some(Wait { id, .. }) = *waits {
            let errno = Errno::EINTR;
            self.cluster
                .send(process.node, ToCoordinator::Cancel { id, errno });
        }
    }

    /// The program ends: its node says what becomes of its attaches, returns the set if it owes to
    /// that, and says that it has ended.
    fn end(&mut self, program: usize, seen: &mut Seen) {
        let Program {
            process,
            holds,
            attached,
            waits,
        } = self.programs.swap_remove(program);
        seen.undone += u64::from(holds.iter().any(|&held| held > 0));
        seen.voided += u64::from(waits.is_some());
        for segment in attached {
            self.cluster.shmdt(&process, segment, 1);
        }
        self.give_back(self.place_of(process.node));
        self.cluster.exit(&process);
    }

    fn leave(&mut self, host: usize, seen: &mut Seen) {
        let Some(host) = self.hosts[host].take() else {
            return;
        };
        seen.left += 1;
        self.programs
            .retain(|program| program.process.node != host.node);
        for message in host.inbox {
            self.count(&message);
        }
        self.cluster.leave(host.node);
        self.cluster.mail.retain(|output| output.to != host.node);
    }

    /// The node returns the set, if it has it.
    fn give_back(&mut self, host: usize) {
        let Some(host) = &mut self.hosts[host] else {
            return;
        };
        let Some(delegated) = host.delegated.take() else {
            return;
        };
        let message = ToCoordinator::Returned {
            set: self.set,
            number: delegated.number,
            state: SetState {
                pids: vec![0; delegated.values.len()],
                values: delegated.values,
                otime: self.cluster.now,
                debts: delegated.debts,
            },
        };
        self.cluster.send(host.node, message);
    }

    fn place_of(&self, node: NodeId) -> usize {
        let is_it = |host: &Option<Host>| host.as_ref().is_some_and(|host| host.node == node);
        self.hosts.iter().position(is_it).expect("it is a member")
    }

    /// A message that was sent or taken counts, whether or not anybody is left to hear of it.
    fn count(&mut self, message: &FromCoordinator) {
        let FromCoordinator::Answer {
            id,
            outcome: Ok(answer),
            ..
        } = message
        else {
            return;
        };
        match answer {
            Answer::Message(_) => self.taken += 1,
            Answer::Value(_) if self.sends.contains(id) => self.sent += 1,
            _ => {}
        }
    }

    /// The node reads the next message.
    fn read(&mut self, host: usize, seen: &mut Seen) {
        let Some(host) = &mut self.hosts[host] else {
            return;
        };
        let Some(message) = host.inbox.pop_front() else {
            return;
        };
        let node = host.node;
        match message {
            FromCoordinator::Share { segment } => {
                self.cluster.send(node, ToCoordinator::Sharing { segment });
            }
            FromCoordinator::Delegated {
                id,
                number,
                ref state,
                ..
            } => {
                seen.delegations += 1;
                host.delegated = Some(Delegated {
                    number,
                    values: state.values.clone(),
                    debts: Vec::new(),
                });
                self.answered(node, id, Ok(Answer::Value(0)), seen);
            }
            // It may have been returned already.
            FromCoordinator::Recall { number, .. } => {
                seen.recalls += 1;
                if host
                    .delegated
                    .as_ref()
                    .is_some_and(|set| set.number == number)
                {
                    let at = self.place_of(node);
                    self.give_back(at);
                }
            }
            FromCoordinator::Answer { id, outcome, .. } => {
                self.count(&message);
                self.answered(node, id, outcome, seen);
            }
            _ => {}
        }
    }

    fn answered(&mut self, node: NodeId, id: u64, outcome: Result<Answer, Errno>, seen: &mut Seen) {
        let asked = |program: &&mut Program| {
            program.process.node == node && program.waits.as_ref().is_some_and(|w| w.id == id)
        };
        let Some(program) = self.programs.iter_mut().find(asked) else {
            seen.late += 1;
            if let Ok(Answer::Attached(attachment)) = outcome {
                let segment = attachment.segment;
                self.cluster
                    .send(node, ToCoordinator::Unattached { segment });
            }
            return;
        };
        let wait = program.waits.take().expect("it was found by it");
        match (wait.kind, outcome) {
            (Kind::Operate(ops), Ok(_)) => {
                for (num, op, _) in ops {
                    program.holds[usize::from(num)] -= op;
                }
            }
            (Kind::Attach, Ok(Answer::Attached(attachment))) => {
                program.attached.push(attachment.segment);
            }
            (Kind::Send | Kind::Receive, Ok(_)) => {}
            (_, Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOMSG)) => {}
            (_, other) => panic!("{other:?}"),
        }
    }

    /// Delivers everything, and has the set returned.
    fn settle(&mut self, seen: &mut Seen) {
        loop {
            self.sort_mail();
            for host in 0..NODES {
                self.give_back(host);
            }
            self.sort_mail();
            let unread = |host: &Option<Host>| host.as_ref().is_some_and(|h| !h.inbox.is_empty());
            let Some(host) = self.hosts.iter().position(unread) else {
                break;
            };
            self.read(host, seen);
        }
    }

    fn check(&mut self) {
        let host = self.hosts.iter().flatten().next().expect("one stays");
        let inspector = root(host.node, 1);
        let values = self
            .cluster
            .getall(&inspector, self.set)
            .expect("it is not delegated");
        for (num, value) in values.iter().enumerate() {
            let held: i16 = self.programs.iter().map(|program| program.holds[num]).sum();
            assert_eq!(
                value.checked_add_signed(held),
                Some(TOKENS),
                "semaphore {num}"
            );
        }
        let attached: usize = self
            .programs
            .iter()
            .map(|program| program.attached.len())
            .sum();
        let status = self.cluster.shm_stat(&inspector, self.segment, StatBy::Id);
        assert_eq!(status.expect("it is there").nattch, attached as u64);
        let status = self.cluster.msg_stat(&inspector, self.queue, StatBy::Id);
        let queued = status.expect("it is there").qnum;
        assert_eq!(queued, self.sent - self.taken);
        for program in &self.programs {
            match &program.waits {
                None => {}
                Some(Wait {
                    kind: Kind::Operate(ops),
                    ..
                }) => {
                    let mut left: Vec<i32> = values.iter().map(|&value| value.into()).collect();
                    ops.iter()
                        .for_each(|&(num, op, _)| left[usize::from(num)] += i32::from(op));
                    assert!(
                        left.iter().any(|&value| value < 0),
                        "{values:?} do for {ops:?}"
                    );
                }
                Some(Wait {
                    kind: Kind::Receive,
                    ..
                }) => assert_eq!(queued, 0),
                Some(Wait {
                    kind: Kind::Attach | Kind::Send,
                    ..
                }) => panic!("it waits for ever"),
            }
        }
        self.sort_mail();
    }
}

impl Host {
    fn join(cluster: &mut Cluster, host: usize) -> Host {
        Host {
            node: cluster.join(&format!("node{host}"), 8 * MIB),
            inbox: VecDeque::new(),
            delegated: None,
        }
    }
}
