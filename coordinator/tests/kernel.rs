//! The kernel as the reference: random programs of several processes run on Linux and on `Core`,
//! step by step, and every result must be the same.
//!
//! Each program gets an IPC namespace of its own, so that even the ids come out equal. Its
//! processes are forked workers that do one system call at a time, as whatever user the step
//! says. A worker may block in `semop`, `msgsnd` or `msgrcv`; after each step, who goes on, and with
//! what result, must be what `Core` says, and those that stay blocked are seen to sleep in the call
//! (`/proc/PID/syscall`). Then all values, pids and counts of waiters of all sets, and the state of
//! all queues are compared, so that the order in which waiters took their values shows. Signals
//! (EINTR) and SIGKILL (undo) are steps like any other.
//!
//! In a message queue the kernel lets those that it has woken race for room. Where programs use
//! queues, the workers share one processor in a real-time class, so that each acts when it is woken,
//! as `Core` lets them act.
//!
//! Needs root, for the namespace, for changing users and for the real-time class; without it, the
//! tests say so and pass.

mod support;

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use migshm_protocol::call::{
    Answer, Call, Caller, Errno, Memlock, MsgCommand, MsgStatus, NewPerm, SemCommand, SemStatus,
    ShmCommand, ShmStatus, StatBy,
};
use migshm_protocol::control::ToCoordinator;
use migshm_protocol::limits::{MSGMAX, MSGMNB, SEMOPM};
use migshm_protocol::{NodeId, ProcessId, SegmentId};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use support::native::{command, outcome, system_call, value, written};
use support::worker::{NO_GROUP, Order, Reply, User, Worker};
use support::{Cluster, MIB, Pending, Process, message, raw, semop};

/// Processes of a program; they live on two nodes.
const WORKERS: usize = 6;

const USERS: [User; 5] = [
    User {
        uid: 0,
        gid: 0,
        group: NO_GROUP,
    },
    User {
        uid: 1000,
        gid: 1000,
        group: NO_GROUP,
    },
    User {
        uid: 1001,
        gid: 1001,
        group: 1000,
    },
    User {
        uid: 1002,
        gid: 1000,
        group: NO_GROUP,
    },
    User {
        uid: 2000,
        gid: 2000,
        group: NO_GROUP,
    },
];

#[test]
fn random_programs_behave_as_on_the_kernel() {
    duels(
        Order::Any,
        cases(),
        prop::collection::vec(step(action()), 1..60),
        |duel, program| duel.run(&program),
    );
}

#[test]
fn random_programs_with_messages_behave_as_on_the_kernel() {
    duels(
        Order::AsWoken,
        cases(),
        prop::collection::vec(step(message_action()), 1..80),
        |duel, program| duel.run(&program),
    );
}

/// Hardly anything but calls that block, on a small queue that exists from the start.
#[test]
fn contention_for_a_queue_is_settled_as_by_the_kernel() {
    duels(
        Order::AsWoken,
        cases(),
        prop::collection::vec(step(queue_contention()), 1..100),
        |duel, program| {
            let id = IdChoice { nth: 0, bent: 0 };
            let actions = [
                Action::MsgGet {
                    key: 0,
                    flags: 0o666,
                },
                Action::MsgCtl {
                    id,
                    command: capacity(20, 0o666),
                },
            ];
            let steps = actions.map(|action| Step {
                worker: 0,
                user: 0,
                action,
            });
            duel.run(&steps)?;
            duel.run(&program)
        },
    );
}

/// Hardly anything but calls that block, on two sets that exist from the start.
#[test]
fn contention_is_settled_as_by_the_kernel() {
    duels(
        Order::Any,
        cases(),
        prop::collection::vec(step(contention()), 1..80),
        |duel, program| {
            let set = Action::SemGet {
                key: 0,
                count: 3,
                flags: 0o666,
            };
            let create = Step {
                worker: 0,
                user: 0,
                action: set,
            };
            duel.run(&[create.clone(), create])?;
            duel.run(&program)
        },
    );
}

#[test]
fn ids_are_given_out_as_by_the_kernel() {
    // Creates a set, or removes one of those that exist.
    let programs = prop::collection::vec(
        prop::option::weighted(0.45, any::<prop::sample::Index>()),
        1..400,
    );
    duels(Order::Any, cases() / 10, programs, |duel, program| {
        duel.run_ids(&program)
    });
}

/// Runs programs, each in a namespace of its own; shrinks one on which the two sides differ.
fn duels<S: Strategy>(
    order: Order,
    cases: u32,
    programs: S,
    run: fn(&mut Duel, S::Value) -> Result<(), String>,
) where
    S::Value: Send + 'static,
{
    let Some(capabilities) = root_capabilities() else {
        println!("skipped: needs root, to make IPC namespaces and to change users");
        return;
    };
    if Worker::spawn(order).is_err() {
        println!("skipped: needs a real-time class");
        return;
    }
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_time: 30_000,
        ..Config::default()
    };
    let result = TestRunner::new(config).run(&programs, |program| {
        // A thread of its own, as a namespace is entered by thread.
        let thread = std::thread::spawn(move || run(&mut Duel::new(order, capabilities)?, program));
        thread
            .join()
            .expect("no panic")
            .map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// This process's effective capabilities, if it is root.
fn root_capabilities() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let is_root = field("Uid:")?.split_whitespace().nth(1) == Some("0");
    u64::from_str_radix(field("CapEff:")?, 16)
        .ok()
        .filter(|_| is_root)
}

/// Programs to run: `PROPTEST_CASES`, or few enough for a quick test.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(200)
}

/// One step of a program: who does it, as which user, and what.
#[derive(Clone, Debug)]
struct Step {
    worker: usize,
    user: usize,
    action: Action,
}

#[derive(Clone, Debug)]
enum Action {
    ShmGet {
        key: i32,
        size: u64,
        flags: i32,
    },
    ShmAttach {
        id: IdChoice,
        flags: i32,
    },
    ShmDetach {
        nth: usize,
    },
    ShmCtl {
        id: IdChoice,
        command: ShmCommand,
    },
    SemGet {
        key: i32,
        count: i32,
        flags: i32,
    },
    SemOp {
        id: IdChoice,
        ops: Vec<(u16, i16, i16)>,
    },
    SemCtl {
        id: IdChoice,
        command: SemCommand,
        values: Vec<u16>,
    },
    /// One more than SEMOPM.
    TooManySemOps {
        id: IdChoice,
    },
    MsgGet {
        key: i32,
        flags: i32,
    },
    MsgSend {
        id: IdChoice,
        mtype: i64,
        length: usize,
        flags: i32,
    },
    MsgReceive {
        id: IdChoice,
        size: u64,
        mtype: i64,
        flags: i32,
    },
    MsgCtl {
        id: IdChoice,
        command: MsgCommand,
    },
    /// A signal, if it is blocked.
    Interrupt,
    /// SIGKILL; another process takes its place.
    Kill,
}

/// An id: one that has been given out (it may be gone), or nearly one.
#[derive(Clone, Copy, Debug)]
struct IdChoice {
    nth: usize,
    bent: i32,
}

fn step(action: impl Strategy<Value = Action>) -> impl Strategy<Value = Step> {
    let users = prop_oneof![6 => Just(0), 4 => 1..USERS.len()];
    (0..WORKERS, users, action).prop_map(|(worker, user, action)| Step {
        worker,
        user,
        action,
    })
}

fn contention() -> impl Strategy<Value = Action> {
    let id =
        || prop_oneof![4 => Just(0), 1 => Just(1usize)].prop_map(|nth| IdChoice { nth, bent: 0 });
    let flags = prop_oneof![16 => Just(0i16), 4 => Just(0x1000), 1 => Just(0o4000)];
    let op = (
        0..3u16,
        prop::sample::select(vec![-2, -1, -1, 0, 0, 1, 1, 2]),
        flags,
    );
    let ops = prop_oneof![3 => prop::collection::vec(op.clone(), 1), 2 => prop::collection::vec(op, 2..4)];
    prop_oneof![
        40 => (id(), ops).prop_map(|(id, ops)| Action::SemOp { id, ops }),
        2 => (id(), 0..3i32, 0..3i32)
            .prop_map(|(id, num, value)| (id, SemCommand::SetVal(num, value)))
            .prop_map(|(id, command)| Action::SemCtl { id, command, values: Vec::new() }),
        2 => Just(Action::Interrupt),
        2 => Just(Action::Kill),
    ]
}

fn queue_contention() -> impl Strategy<Value = Action> {
    let id = IdChoice { nth: 0, bent: 0 };
    let nowait = || prop_oneof![12 => Just(0), 1 => Just(0o4000)];
    let qbytes = prop::sample::select(vec![0, 3, 20, 20, 40]);
    let mode = prop::sample::select(vec![0o666, 0o666, 0o666, 0o600, 0o622, 0o644, 0]);
    prop_oneof![
        40 => (1..5i64, 0..14usize, nowait())
            .prop_map(move |(mtype, length, flags)| Action::MsgSend { id, mtype, length, flags }),
        40 => (0..16u64, -4..5i64, receive_flags(), nowait()).prop_map(move |(size, mtype, how, wait)| {
            Action::MsgReceive { id, size, mtype, flags: how | wait }
        }),
        5 => (qbytes, mode).prop_map(move |(qbytes, mode)| Action::MsgCtl {
            id,
            command: capacity(qbytes, mode),
        }),
        1 => Just(Action::MsgCtl { id, command: MsgCommand::Remove }),
        1 => Just(Action::MsgGet { key: 0, flags: 0o666 }),
        4 => Just(Action::Interrupt),
        4 => Just(Action::Kill),
    ]
}

/// IPC_SET of a queue of root's.
fn capacity(qbytes: u64, mode: u32) -> MsgCommand {
    let perm = NewPerm {
        uid: 0,
        gid: 0,
        mode,
    };
    MsgCommand::Set { perm, qbytes }
}

/// MSG_NOERROR, MSG_EXCEPT.
fn receive_flags() -> impl Strategy<Value = i32> {
    prop::sample::select(vec![0, 0, 0, 0o10_000, 0o10_000, 0o20_000, 0o30_000])
}

fn message_action() -> impl Strategy<Value = Action> {
    let mtype = prop_oneof![12 => 1..4i64, 1 => Just(0), 1 => Just(-1), 1 => Just(i64::MAX)];
    let length = prop_oneof![
        8 => 0..200usize,
        2 => Just(0),
        6 => Just(MSGMAX),
        2 => Just(MSGMAX / 2),
        1 => Just(MSGMAX + 1),
    ];
    let size = prop_oneof![
        8 => Just(MSGMAX as u64),
        4 => 0..200u64,
        2 => Just(i64::MAX as u64),
        1 => Just(u64::MAX),
        1 => Just(1 << 63),
    ];
    let wanted = prop_oneof![20 => -4..5i64, 1 => Just(i64::MIN), 1 => Just(i64::MAX)];
    let wait = || prop_oneof![2 => Just(0), 1 => Just(0o4000)];
    // Most copies do not wait, as they must not.
    let copy = prop_oneof![12 => Just(0), 3 => Just(0o44_000), 1 => Just(0o40_000)];
    let flags = (receive_flags(), wait(), copy).prop_map(|(how, wait, copy)| how | wait | copy);
    prop_oneof![
        8 => (key(), get_flags()).prop_map(|(key, flags)| Action::MsgGet { key, flags }),
        30 => (id(), mtype, length, wait())
            .prop_map(|(id, mtype, length, flags)| Action::MsgSend { id, mtype, length, flags }),
        30 => (id(), size, wanted, flags)
            .prop_map(|(id, size, mtype, flags)| Action::MsgReceive { id, size, mtype, flags }),
        12 => (id(), msg_command()).prop_map(|(id, command)| Action::MsgCtl { id, command }),
        2 => Just(Action::Interrupt),
        2 => Just(Action::Kill),
    ]
}

fn msg_command() -> impl Strategy<Value = MsgCommand> {
    let qbytes = prop_oneof![
        3 => Just(MSGMNB),
        2 => 0..500u64,
        1 => Just(MSGMNB + 1),
        1 => Just(4 * MSGMNB),
        1 => Just(1 << 32),
        1 => Just((1 << 32) + 100),
        1 => Just(u32::MAX.into()),
        1 => Just(u64::MAX),
    ];
    prop_oneof![
        2 => stat_by().prop_map(MsgCommand::Stat),
        4 => (new_perm(), qbytes).prop_map(|(perm, qbytes)| MsgCommand::Set { perm, qbytes }),
        1 => Just(MsgCommand::Remove),
        1 => Just(MsgCommand::Limits),
        1 => Just(MsgCommand::Usage),
    ]
}

fn get_flags() -> impl Strategy<Value = i32> {
    let mode = prop::sample::select(vec![
        0o600, 0o666, 0o640, 0o604, 0o222, 0o444, 0o060, 0o007, 0o700, 0, 0o1777,
    ]);
    let create = prop::sample::select(vec![0, 0o1000, 0o1000, 0o1000, 0o3000, 0o2000]);
    (mode, create).prop_map(|(mode, create)| mode | create)
}

fn key() -> impl Strategy<Value = i32> {
    prop_oneof![3 => Just(0), 7 => 1..4i32]
}

fn action() -> impl Strategy<Value = Action> {
    let size = prop_oneof![
        Just(0),
        Just(1),
        Just(4096),
        Just(4097),
        Just(10_000),
        Just(u64::MAX),
        Just(1 << 63)
    ];
    let count = prop_oneof![8 => 1..5i32, 1 => Just(0), 1 => Just(-1), 1 => Just(32_001)];
    let at_flags = prop::sample::select(vec![0, 0, 0o10_000, 0o100_000, 0o110_000]);
    prop_oneof![
        6 => (key(), size, get_flags()).prop_map(|(key, size, flags)| Action::ShmGet { key, size, flags }),
        6 => (id(), at_flags).prop_map(|(id, flags)| Action::ShmAttach { id, flags }),
        4 => (0..4usize).prop_map(|nth| Action::ShmDetach { nth }),
        8 => (id(), shm_command()).prop_map(|(id, command)| Action::ShmCtl { id, command }),
        8 => (key(), count, get_flags()).prop_map(|(key, count, flags)| Action::SemGet { key, count, flags }),
        50 => (id(), ops()).prop_map(|(id, ops)| Action::SemOp { id, ops }),
        1 => id().prop_map(|id| Action::TooManySemOps { id }),
        14 => (id(), sem_command(), prop::collection::vec(sem_value(), 1..5))
            .prop_map(|(id, command, values)| Action::SemCtl { id, command, values }),
        2 => Just(Action::Interrupt),
        3 => Just(Action::Kill),
    ]
}

fn id() -> impl Strategy<Value = IdChoice> {
    let bent = prop_oneof![20 => Just(0), 1 => Just(1 << 15), 1 => Just(i32::MIN), 1 => Just(5)];
    (0..3usize, bent).prop_map(|(nth, bent)| IdChoice { nth, bent })
}

fn ops() -> impl Strategy<Value = Vec<(u16, i16, i16)>> {
    let flags = prop::sample::select(vec![0, 0, 0, 0, 0, 0o4000, 0x1000, 0x1000, 0x1000 | 0o4000]);
    let delta = prop_oneof![
        4 => Just(-1i16), 4 => Just(1i16), 3 => Just(0i16), 2 => -3..4i16,
        1 => prop::sample::select(vec![i16::MAX, i16::MIN, 20_000, -20_000]),
    ];
    let num = prop_oneof![60 => 0..3u16, 1 => Just(7u16)];
    let op = (num, delta, flags);
    prop_oneof![
        6 => prop::collection::vec(op.clone(), 1),
        6 => prop::collection::vec(op.clone(), 2..5),
        1 => Just(Vec::new()),
    ]
}

fn sem_value() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 0..3u16, 1 => Just(32_767u16), 1 => Just(32_768u16)]
}

fn new_perm() -> impl Strategy<Value = NewPerm> {
    let uid = prop_oneof![4 => Just(1000u32), 2 => Just(0), 1 => Just(1001), 1 => Just(u32::MAX)];
    (uid.clone(), uid, 0..0o2000u32).prop_map(|(uid, gid, mode)| NewPerm { uid, gid, mode })
}

fn stat_by() -> impl Strategy<Value = StatBy> {
    prop::sample::select(vec![StatBy::Id, StatBy::Index, StatBy::Any])
}

fn shm_command() -> impl Strategy<Value = ShmCommand> {
    prop_oneof![
        stat_by().prop_map(ShmCommand::Stat),
        new_perm().prop_map(ShmCommand::Set),
        Just(ShmCommand::Remove),
        any::<bool>().prop_map(ShmCommand::Lock),
        Just(ShmCommand::Limits),
        Just(ShmCommand::Usage),
    ]
}

fn sem_command() -> impl Strategy<Value = SemCommand> {
    let num = || prop_oneof![9 => 0..3i32, 1 => Just(-1), 1 => Just(9)];
    let value = prop_oneof![8 => 0..4i32, 1 => Just(-1), 1 => Just(32_768), 1 => Just(32_767)];
    prop_oneof![
        2 => stat_by().prop_map(SemCommand::Stat),
        1 => new_perm().prop_map(SemCommand::Set),
        1 => Just(SemCommand::Remove),
        1 => Just(SemCommand::Limits),
        1 => Just(SemCommand::Usage),
        1 => Just(SemCommand::GetAll),
        3 => Just(SemCommand::SetAll),
        5 => (num(), value).prop_map(|(num, value)| SemCommand::SetVal(num, value)),
        1 => num().prop_map(SemCommand::GetVal),
        1 => num().prop_map(SemCommand::GetPid),
        1 => num().prop_map(SemCommand::GetNcnt),
        1 => num().prop_map(SemCommand::GetZcnt),
    ]
}

/// A program's run, on both sides.
struct Duel {
    order: Order,
    cluster: Cluster,
    nodes: [NodeId; 2],
    capabilities: u64,
    players: Vec<Player>,
    processes: u64,
    /// Ids given out, in order, whether they still exist or not.
    segments: Vec<i32>,
    sets: Vec<i32>,
    queues: Vec<i32>,
    /// Messages made, so that each is another.
    messages: usize,
}

/// A worker, and its double in the cluster.
struct Player {
    worker: Worker,
    process: Process,
    blocked: Option<(Pending, Call)>,
    attaches: Vec<(i64, SegmentId)>,
}

impl Duel {
    fn new(order: Order, capabilities: u64) -> Result<Duel, String> {
        // SAFETY: no memory is involved; the thread was made for this.
        if unsafe { libc::unshare(libc::CLONE_NEWIPC) } != 0 {
            return Err(format!("unshare: {}", io::Error::last_os_error()));
        }
        let (cluster, nodes) = Cluster::with_nodes([MIB; 2]);
        let mut duel = Duel {
            order,
            cluster,
            nodes,
            capabilities,
            players: Vec::new(),
            processes: 0,
            segments: Vec::new(),
            sets: Vec::new(),
            queues: Vec::new(),
            messages: 0,
        };
        for at in 0..WORKERS {
            let player = duel.new_player(at)?;
            duel.players.push(player);
        }
        Ok(duel)
    }

    fn new_player(&mut self, at: usize) -> Result<Player, String> {
        let worker = Worker::spawn(self.order).map_err(|error| format!("fork: {error}"))?;
        self.processes += 1;
        let caller = Caller {
            process: ProcessId(self.processes),
            pid: worker.pid,
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            capabilities: self.capabilities,
            memlock: None,
        };
        let process = Process {
            node: self.nodes[at % 2],
            caller,
        };
        Ok(Player {
            worker,
            process,
            blocked: None,
            attaches: Vec::new(),
        })
    }

    fn run(&mut self, program: &[Step]) -> Result<(), String> {
        for (at, step) in program.iter().enumerate() {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .expect("after 1970");
            self.cluster.now = now.as_secs() as i64;
            self.step(step)
                .and_then(|()| self.compare_waiters())
                .and_then(|()| self.compare_objects())
                .map_err(|error| format!("step {at}, {step:?}: {error}"))?;
        }
        Ok(())
    }

    fn run_ids(&mut self, program: &[Option<prop::sample::Index>]) -> Result<(), String> {
        let mut live = Vec::new();
        for removal in program {
            let call = match removal {
                Some(nth) if !live.is_empty() => {
                    let id = live.swap_remove(nth.index(live.len()));
                    Call::SemCtl {
                        id,
                        command: SemCommand::Remove,
                    }
                }
                _ => Call::SemGet {
                    key: 0,
                    count: 1,
                    flags: 0o600,
                },
            };
            // SAFETY: these calls touch no memory.
            let native = outcome(call, &unsafe {
                command(USERS[0], call, &[]).execute_here()
            });
            let ours = self.cluster.call(&root(self.nodes[0]), call, &[]);
            compare(&format!("{call:?}"), native, ours)?;
            if let (Call::SemGet { .. }, Ok(Answer::Value(id))) = (call, ours) {
                live.push(id);
            }
            let usage = Call::SemCtl {
                id: 0,
                command: SemCommand::Usage,
            };
            // SAFETY: it writes a `struct seminfo`, which the buffer has room for.
            let native = outcome(usage, &unsafe {
                command(USERS[0], usage, &[]).execute_here()
            });
            compare(
                "SEM_INFO",
                native,
                self.cluster.call(&root(self.nodes[0]), usage, &[]),
            )?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step.action {
            Action::Interrupt => self.interrupt(step.worker),
            Action::Kill => self.kill(step.worker),
            _ => {
                // A blocked worker cannot do anything; the next one will.
                let mut order = (0..WORKERS).map(|n| (step.worker + n) % WORKERS);
                let Some(at) = order.find(|&at| self.players[at].blocked.is_none()) else {
                    return Ok(());
                };
                self.act(at, step)
            }
        }
    }

    fn act(&mut self, at: usize, step: &Step) -> Result<(), String> {
        let user = USERS[step.user];
        let (segments, sets, queues) = (&self.segments, &self.sets, &self.queues);
        let player = &mut self.players[at];
        let caller = &mut player.process.caller;
        (caller.uid, caller.gid) = (user.uid, user.gid);
        caller.groups = if user.group == NO_GROUP {
            Vec::new()
        } else {
            vec![user.group]
        };
        caller.capabilities = if user.uid == 0 { self.capabilities } else { 0 };
        // More than all segments of a program have.
        caller.memlock = Some(Memlock {
            uid: user.uid,
            limit: u64::MAX,
        });

        let (call, raw) = match step.action.clone() {
            Action::ShmGet { key, size, flags } => (
                Call::ShmGet {
                    key,
                    size,
                    flags,
                    consistency: None,
                },
                Vec::new(),
            ),
            Action::ShmAttach { id, flags } => (
                Call::ShmAttach {
                    id: id.of(segments),
                    flags,
                },
                Vec::new(),
            ),
            Action::ShmCtl { id, command } => (
                Call::ShmCtl {
                    id: id.of(segments),
                    command,
                },
                Vec::new(),
            ),
            Action::SemGet { key, count, flags } => {
                (Call::SemGet { key, count, flags }, Vec::new())
            }
            Action::SemOp { id, ops } => (semop(id.of(sets)), raw(&ops)),
            Action::TooManySemOps { id } => (semop(id.of(sets)), raw(&[(0, 0, 0); SEMOPM + 1])),
            Action::SemCtl {
                id,
                command,
                values,
            } => {
                let id = id.of(sets);
                let size = self
                    .cluster
                    .getall(&root(self.nodes[0]), id)
                    .map_or(1, |values| values.len());
                let values: Vec<u16> = values.into_iter().cycle().take(size).collect();
                let raw = if command == SemCommand::SetAll {
                    values
                } else {
                    Vec::new()
                };
                (
                    Call::SemCtl { id, command },
                    raw.into_iter().flat_map(u16::to_le_bytes).collect(),
                )
            }
            Action::MsgGet { key, flags } => (Call::MsgGet { key, flags }, Vec::new()),
            Action::MsgSend {
                id,
                mtype,
                length,
                flags,
            } => {
                self.messages += 1;
                let text: Vec<u8> = (self.messages..).map(|n| n as u8).take(length).collect();
                let id = id.of(queues);
                (Call::MsgSend { id, flags }, message(mtype, &text))
            }
            Action::MsgReceive {
                id,
                size,
                mtype,
                flags,
            } => (
                Call::MsgReceive {
                    id: id.of(queues),
                    size,
                    mtype,
                    flags,
                },
                Vec::new(),
            ),
            Action::MsgCtl { id, command } => (
                Call::MsgCtl {
                    id: id.of(queues),
                    command,
                },
                Vec::new(),
            ),
            Action::ShmDetach { nth } => return self.detach(at, nth),
            Action::Interrupt | Action::Kill => unreachable!("not a call"),
        };
        let command = command(user, call, &raw);
        player.worker.send(&command).map_err(text)?;
        let reply = player.worker.settle().map_err(text)?;
        let native = reply.map(|reply| outcome(call, &reply));

        let pending = self.cluster.start(&player.process, call, &raw);
        self.cluster.share_as_asked(&self.nodes);
        let (ours, values) = match self.cluster.take_answer(pending) {
            Some((outcome, _, values)) => (Some(outcome), values),
            None => (None, Vec::new()),
        };
        if let (Some(Ok(answer)), Some(reply)) = (ours, reply) {
            compare("what was written", written(answer, &reply), &values)?;
        }
        match (ours, reply) {
            (None, None) => player.blocked = Some((pending, call)),
            (
                Some(Ok(Answer::Attached(attachment))),
                Some(Reply {
                    result: address, ..
                }),
            ) if address > 0 => {
                player.attaches.push((address, attachment.segment));
            }
            (Some(Ok(Answer::Value(id))), _) => match call {
                Call::ShmGet { .. } if !self.segments.contains(&id) => self.segments.push(id),
                Call::SemGet { .. } if !self.sets.contains(&id) => self.sets.push(id),
                Call::MsgGet { .. } if !self.queues.contains(&id) => self.queues.push(id),
                _ => {}
            },
            _ => {}
        }
        compare(
            "the call",
            native.map(|o| o.map(comparable)),
            ours.map(|o| o.map(comparable)),
        )
    }

    fn detach(&mut self, at: usize, nth: usize) -> Result<(), String> {
        let player = &mut self.players[at];
        if player.attaches.is_empty() {
            return Ok(());
        }
        let (address, segment) = player.attaches.remove(nth % player.attaches.len());
        let command = system_call(USERS[0], libc::SYS_shmdt, [address, 0, 0, 0], None);
        let reply = player.worker.call(&command).map_err(text)?;
        self.cluster.shmdt(&player.process, segment, 1);
        compare("shmdt", reply.result, 0)
    }

    fn interrupt(&mut self, at: usize) -> Result<(), String> {
        let player = &mut self.players[at];
        let Some((pending, _)) = player.blocked.take() else {
            return Ok(());
        };
        player.worker.interrupt().map_err(text)?;
        let native = player.worker.finish().map_err(text)?.result;
        self.cluster.send(
            pending.node,
            ToCoordinator::Cancel {
                id: pending.id,
                errno: Errno::EINTR,
            },
        );
        let ours = self.cluster.outcome(pending);
        compare("the interrupted call", Some(value(native)), ours)
    }

    fn kill(&mut self, at: usize) -> Result<(), String> {
        let successor = self.new_player(at)?;
        let Player {
            worker,
            process,
            blocked,
            attaches,
        } = std::mem::replace(&mut self.players[at], successor);
        drop(worker);
        self.cluster.exit(&process);
        for (_, segment) in attaches {
            self.cluster.shmdt(&process, segment, 1);
        }
        let answer = blocked.and_then(|(pending, _)| self.cluster.outcome(pending));
        compare("an answer to the dead", None, answer)
    }

    /// Whoever is woken on one side is on the other, with the same result.
    fn compare_waiters(&mut self) -> Result<(), String> {
        for (at, player) in self.players.iter_mut().enumerate() {
            let Some((pending, call)) = player.blocked else {
                continue;
            };
            let (ours, beside) = match self.cluster.take_answer(pending) {
                Some((outcome, _, beside)) => (Some(outcome), beside),
                None => (None, Vec::new()),
            };
            // One that has just been woken can look asleep for a moment.
            let native = match ours {
                Some(_) => player.worker.finish().ok(),
                None => player.worker.settle().map_err(text)?,
            };
            compare(
                &format!("blocked worker {at}"),
                native.map(|reply| outcome(call, &reply)),
                ours,
            )?;
            if let (Some(Ok(answer)), Some(reply)) = (ours, native) {
                compare("what it was given", written(answer, &reply), &beside)?;
            }
            if ours.is_some() {
                player.blocked = None;
            }
        }
        Ok(())
    }

    /// All that can be seen of all objects.
    fn compare_objects(&mut self) -> Result<(), String> {
        let mut calls = Vec::new();
        for &id in &self.segments {
            calls.push(Call::ShmCtl {
                id,
                command: ShmCommand::Stat(StatBy::Id),
            });
        }
        for &id in &self.sets {
            calls.push(Call::SemCtl {
                id,
                command: SemCommand::Stat(StatBy::Id),
            });
            for num in 0..4 {
                let commands = [
                    SemCommand::GetVal(num),
                    SemCommand::GetPid(num),
                    SemCommand::GetNcnt(num),
                    SemCommand::GetZcnt(num),
                ];
                calls.extend(commands.map(|command| Call::SemCtl { id, command }));
            }
        }
        for &id in &self.queues {
            calls.push(Call::MsgCtl {
                id,
                command: MsgCommand::Stat(StatBy::Id),
            });
        }
        calls.push(Call::MsgCtl {
            id: 0,
            command: MsgCommand::Usage,
        });
        for call in calls {
            // SAFETY: every call in this list writes at most a buffer.
            let native = outcome(call, &unsafe {
                command(USERS[0], call, &[]).execute_here()
            });
            let ours = self.cluster.call(&root(self.nodes[0]), call, &[]);
            compare(
                &format!("{call:?}"),
                native.map(comparable),
                ours.map(comparable),
            )?;
        }
        Ok(())
    }
}

impl IdChoice {
    fn of(self, known: &[i32]) -> i32 {
        // The latest ones, so that programs meet on live objects.
        let at = known.len().saturating_sub(1 + self.nth);
        known.get(at).copied().unwrap_or(0).wrapping_add(self.bent)
    }
}

fn root(node: NodeId) -> Process {
    support::root(node, 1)
}

fn compare<T: PartialEq + std::fmt::Debug>(what: &str, native: T, ours: T) -> Result<(), String> {
    if native == ours {
        Ok(())
    } else {
        Err(format!("{what}\n  kernel: {native:?}\n    core: {ours:?}"))
    }
}

fn text(error: io::Error) -> String {
    error.to_string()
}

/// An answer without what differs by nature: of times it keeps whether they are set, as both sides
/// run within the same second or two.
fn comparable(answer: Answer) -> Answer {
    let set = |time: i64| time.signum();
    match answer {
        Answer::Segment(s) => {
            let (atime, dtime, ctime) = (set(s.atime), set(s.dtime), set(s.ctime));
            Answer::Segment(ShmStatus {
                atime,
                dtime,
                ctime,
                ..s
            })
        }
        Answer::Set(s) => Answer::Set(SemStatus {
            otime: set(s.otime),
            ctime: set(s.ctime),
            ..s
        }),
        Answer::Queue(q) => Answer::Queue(MsgStatus {
            stime: set(q.stime),
            rtime: set(q.rtime),
            ctime: set(q.ctime),
            ..q
        }),
        // The kernel returns an address, or 0 and values that have been compared already.
        Answer::Attached(_) | Answer::Values(_) => Answer::Value(0),
        answer => answer,
    }
}
