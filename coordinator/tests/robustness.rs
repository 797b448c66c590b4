//! Whatever members send, the state stays sound: nothing panics, nobody is answered twice, and
//! when all have left, nothing is counted or reserved any more.

mod support;

use std::collections::HashSet;

use migshm_coordinator::Core;
use migshm_coordinator::replica::{Input, Record, Replica, Stored};
use migshm_protocol::call::{
    Call, Caller, Errno, MsgCommand, NewPerm, SemCommand, SetMemory, ShmCommand, StatBy,
};
use migshm_protocol::control::{Debt, FromCoordinator, SetState, ToCoordinator};
use migshm_protocol::session::Header;
use migshm_protocol::{Extent, NodeId, ProcessId, SegmentId, codec};
use proptest::prelude::*;
use support::*;

#[derive(Clone, Debug)]
enum Event {
    Message(u16, ToCoordinator, Vec<u8>),
    Join(u16),
    Leave(u16),
}

/// Ids that programs would meet, and some that they would not.
fn id() -> impl Strategy<Value = i32> {
    prop_oneof![20 => 0..3i32, 2 => any::<i32>(), 1 => Just(32_768)]
}

/// The first segments created, and others.
fn segment() -> impl Strategy<Value = SegmentId> {
    let plausible = (0..4u64, 0..4u64).prop_map(|(created, id)| created << 31 | id);
    prop_oneof![9 => plausible, 1 => any::<u64>()].prop_map(SegmentId)
}

fn call() -> impl Strategy<Value = Call> {
    let size = prop_oneof![4 => 1..(8 * MIB), 1 => any::<u64>()];
    let flags = || prop_oneof![4 => Just(0o1666), 1 => any::<i32>()];
    let perm = || {
        (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(uid, gid, mode)| NewPerm {
            uid,
            gid,
            mode,
        })
    };
    let by = || prop::sample::select(vec![StatBy::Id, StatBy::Index, StatBy::Any]);
    let num = || prop_oneof![9 => 0..3i32, 1 => any::<i32>()];
    let shm = prop_oneof![
        by().prop_map(ShmCommand::Stat),
        perm().prop_map(ShmCommand::Set),
        Just(ShmCommand::Remove),
        any::<bool>().prop_map(ShmCommand::Lock),
        Just(ShmCommand::Limits),
        Just(ShmCommand::Usage),
    ];
    let sem = prop_oneof![
        by().prop_map(SemCommand::Stat),
        perm().prop_map(SemCommand::Set),
        Just(SemCommand::Remove),
        Just(SemCommand::Limits),
        Just(SemCommand::Usage),
        Just(SemCommand::GetAll),
        Just(SemCommand::SetAll),
        num().prop_map(SemCommand::GetVal),
        (num(), num()).prop_map(|(num, value)| SemCommand::SetVal(num, value)),
        num().prop_map(SemCommand::GetPid),
        num().prop_map(SemCommand::GetNcnt),
        num().prop_map(SemCommand::GetZcnt),
    ];
    let msg = prop_oneof![
        by().prop_map(MsgCommand::Stat),
        (perm(), prop_oneof![3 => 0..100u64, 1 => any::<u64>()])
            .prop_map(|(perm, qbytes)| MsgCommand::Set { perm, qbytes }),
        Just(MsgCommand::Remove),
        Just(MsgCommand::Limits),
        Just(MsgCommand::Usage),
    ];
    let memory = vec![SetMemory::Wanted, SetMemory::Mapped, SetMemory::Unusable];
    let memory = prop::sample::select(memory);
    let mtype = prop_oneof![9 => -3..4i64, 1 => any::<i64>()];
    let room = prop_oneof![9 => 0..20u64, 1 => any::<u64>()];
    prop_oneof![
        2 => (0..4i32, size, flags()).prop_map(|(key, size, flags)| Call::ShmGet { key, size, flags, consistency: None }),
        4 => (id(), flags()).prop_map(|(id, flags)| Call::ShmAttach { id, flags }),
        1 => (id(), shm).prop_map(|(id, command)| Call::ShmCtl { id, command }),
        2 => (0..4i32, num(), flags()).prop_map(|(key, count, flags)| Call::SemGet { key, count, flags }),
        6 => (id(), memory).prop_map(|(id, memory)| Call::SemOp { id, memory }),
        2 => (id(), sem).prop_map(|(id, command)| Call::SemCtl { id, command }),
        2 => (0..4i32, flags()).prop_map(|(key, flags)| Call::MsgGet { key, flags }),
        5 => (id(), flags()).prop_map(|(id, flags)| Call::MsgSend { id, flags }),
        5 => (id(), room, mtype, flags())
            .prop_map(|(id, size, mtype, flags)| Call::MsgReceive { id, size, mtype, flags }),
        2 => (id(), msg).prop_map(|(id, command)| Call::MsgCtl { id, command }),
        2 => (id(), 0..4u16).prop_map(|(id, node)| Call::Accesses { id, node: NodeId(node), from: 0, requests: true }),
    ]
}

fn set_state() -> impl Strategy<Value = SetState> {
    let value = prop_oneof![9 => 0..3u16, 1 => any::<u16>()];
    let debt = (0..4u64, 0..4u16, any::<i16>()).prop_map(|(process, num, owed)| Debt {
        process: ProcessId(process),
        pid: 1,
        num,
        owed,
    });
    let values = prop::collection::vec(value, 0..4);
    (values, prop::collection::vec(debt, 0..3)).prop_map(|(values, debts)| SetState {
        pids: vec![1; values.len()],
        values,
        otime: 0,
        debts,
    })
}

fn message() -> impl Strategy<Value = ToCoordinator> {
    let caller = (
        0..4u64,
        any::<i32>(),
        prop_oneof![3 => Just(0u32), 1 => any::<u32>()],
    )
        .prop_map(|(process, pid, uid)| Caller {
            process: ProcessId(process),
            pid,
            uid,
            gid: uid,
            groups: vec![uid],
            capabilities: if uid == 0 { u64::MAX } else { 0 },
            memlock: None,
        });
    let extent = || (segment(), 0..6u32).prop_map(|(segment, index)| Extent { segment, index });
    let count = || prop_oneof![9 => 0..3u32, 1 => any::<u32>()];
    prop_oneof![
        20 => (0..60u64, caller, call()).prop_map(|(id, caller, call)| ToCoordinator::Call { id, caller, call }),
        1 => (0..60u64).prop_map(|id| ToCoordinator::Cancel { id, errno: Errno::EINTR }),
        2 => (0..4u64, any::<i32>())
            .prop_map(|(process, pid)| ToCoordinator::Exited { process: ProcessId(process), pid }),
        1 => (segment(), count()).prop_map(|(segment, count)| ToCoordinator::Inherited { segment, count, pid: 1 }),
        2 => (segment(), count())
            .prop_map(|(segment, count)| ToCoordinator::Detached { id: 0, segment, count, pid: 1 }),
        1 => segment().prop_map(|segment| ToCoordinator::Unattached { segment }),
        3 => segment().prop_map(|segment| ToCoordinator::Sharing { segment }),
        3 => extent().prop_map(|extent| ToCoordinator::FindHome { extent }),
        1 => segment().prop_map(|segment| ToCoordinator::FindSegment { segment }),
        1 => extent().prop_map(|extent| ToCoordinator::HomeMoved { extent }),
        1 => (0..9u64).prop_map(|number| ToCoordinator::Account { number }),
        1 => (0..9u64).prop_map(|number| ToCoordinator::Query { number }),
        1 => (extent(), 0..4u16)
            .prop_map(|(extent, to)| ToCoordinator::ProposeHome { extent, to: NodeId(to) }),
        1 => (segment(), prop::collection::vec((any::<u32>(), count()), 0..3))
            .prop_map(|(segment, pages)| ToCoordinator::Wrote { segment, pages }),
        3 => (id(), 0..4u64, set_state())
            .prop_map(|(set, number, state)| ToCoordinator::Returned { set, number, state }),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let ops = prop::collection::vec(
        (
            0..3u16,
            -2..3i16,
            prop::sample::select(vec![0, NOWAIT, UNDO]),
        ),
        1..4,
    );
    let messages = (1..4i64, prop::collection::vec(any::<u8>(), 0..20))
        .prop_map(|(mtype, text)| support::message(mtype, &text));
    let bytes = prop_oneof![
        9 => ops.prop_map(|ops| raw(&ops)),
        5 => messages,
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    let node = || prop_oneof![30 => 0..3u16, 1 => any::<u16>()];
    prop_oneof![
        60 => (node(), message(), bytes).prop_map(|(node, message, raw)| Event::Message(node, message, raw)),
        2 => (0..3u16).prop_map(Event::Join),
        1 => node().prop_map(Event::Leave),
    ]
}

/// Joins three nodes first, then lets events happen.
struct Run {
    cluster: Cluster,
    answered: HashSet<(NodeId, u64)>,
    asked: HashSet<(NodeId, u64)>,
}

impl Run {
    fn new() -> Run {
        let (cluster, _) = Cluster::with_nodes([8 * MIB; 3]);
        Run {
            cluster,
            answered: HashSet::new(),
            asked: HashSet::new(),
        }
    }

    fn happen(&mut self, at: usize, event: &Event) {
        self.cluster.now += 1;
        match event.clone() {
            Event::Message(node, mut message, raw) => {
                if let ToCoordinator::Call { id, .. } = &mut message {
                    // Ids ascend, apart from what looks like a repetition.
                    *id += at as u64 / 2;
                    self.answered.remove(&(NodeId(node), *id));
                    self.asked.insert((NodeId(node), *id));
                }
                let Cluster {
                    core, mail, now, ..
                } = &mut self.cluster;
                core.handle(*now, NodeId(node), message, &raw, mail);
            }
            Event::Join(node) => {
                let name = format!("node{}", node + 1);
                let Cluster { core, mail, .. } = &mut self.cluster;
                let _ = core.join(name, "[::1]:1".parse().unwrap(), 8 * MIB, mail);
            }
            Event::Leave(node) => self.cluster.leave(NodeId(node)),
        }
    }

    /// Nobody is answered who did not ask, and nobody twice.
    fn check_mail(&mut self) {
        for output in self.cluster.mail.drain(..) {
            if let FromCoordinator::Answer { id, .. } = output.message {
                assert!(self.asked.contains(&(output.to, id)), "{output:?}");
                assert!(
                    self.answered.insert((output.to, id)),
                    "answered twice: {output:?}"
                );
            }
        }
    }
}

/// An event, as it is stored: by node and number in its session.
fn record(now: i64, event: &Event, replica: &Replica) -> (Record, Vec<u8>) {
    let mut frame = Vec::new();
    let input = match event.clone() {
        Event::Message(node, message, raw) => {
            let node = NodeId(node);
            let mark = replica.member(node).map(|member| member.session.mark());
            let mark = mark.unwrap_or_default();
            let header = Header {
                number: mark.received + 1,
                // It has all but the last.
                received: mark.sent.saturating_sub(1),
            };
            codec::encode(&(header, message), &raw, &mut frame).unwrap();
            Input::Frame { node }
        }
        Event::Join(node) => Input::Join {
            name: format!("node{}", node + 1),
            address: "[::1]:1".parse().unwrap(),
            memory: 8 * MIB,
        },
        Event::Leave(node) => Input::Leave { node: NodeId(node) },
    };
    (Record { now, input }, frame)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn no_message_upsets_the_state(events in prop::collection::vec(event(), 1..200)) {
        let mut run = Run::new();
        for (at, event) in events.iter().enumerate() {
            run.happen(at, event);
            run.check_mail();
        }
        for node in 0..3 {
            run.cluster.leave(NodeId(node));
        }
        run.cluster.mail.clear();

        // A newcomer finds no attach and no waiter left, and all of its memory free.
        let node = run.cluster.join("node1", 8 * MIB);
        let inspector = root(node, 1);
        for index in 0..64 {
            if let Ok(status) = run.cluster.shm_stat(&inspector, index, StatBy::Any) {
                prop_assert_eq!(status.nattch, 0);
            }
            if let Ok(status) = run.cluster.sem_stat(&inspector, index, StatBy::Any) {
                for num in 0..status.nsems as i32 {
                    for command in [SemCommand::GetNcnt(num), SemCommand::GetZcnt(num)] {
                        prop_assert_eq!(run.cluster.semctl(&inspector, status.id, command), Ok(0));
                    }
                }
            }
        }
        for index in 0..64 {
            let Ok(status) = run.cluster.msg_stat(&inspector, index, StatBy::Any) else {
                continue;
            };
            // Nobody takes what is sent, and nobody sends where room is made.
            let before = status.qnum;
            if run.cluster.msgsnd(&inspector, status.id, 1, b"", IPC_NOWAIT) == Ok(()) {
                let status = run.cluster.msg_stat(&inspector, index, StatBy::Any);
                prop_assert_eq!(status.map(|status| status.qnum), Ok(before + 1));
            }
            while run.cluster.msgrcv(&inspector, status.id, 100, 0, IPC_NOWAIT).is_ok() {}
            let status = run.cluster.msg_stat(&inspector, index, StatBy::Any).unwrap();
            prop_assert_eq!((status.qnum, status.cbytes), (0, 0));
        }
        let id = run.cluster.shmget(&inspector, IPC_PRIVATE, 6 * MIB, 0o600).unwrap();
        let (_, placement) = run.cluster.shmat(&inspector, id, 0).unwrap();
        prop_assert_eq!(placement, migshm_protocol::control::Placement::Solo);
    }

    #[test]
    fn a_state_that_was_stored_goes_on_as_if_it_had_not(
        before in prop::collection::vec(event(), 1..80),
        after in prop::collection::vec(event(), 1..80),
    ) {
        let mut run = Run::new();
        before.iter().enumerate().for_each(|(at, event)| run.happen(at, event));
        let mut stored = Vec::new();
        codec::encode(&run.cluster.core, &[], &mut stored).unwrap();
        let (core, rest) = codec::decode::<Core>(&stored).unwrap();
        prop_assert!(rest.is_empty());
        let mut twin = Run::new();
        twin.cluster.core = core;
        twin.cluster.now = run.cluster.now;
        run.cluster.mail.clear();
        for (at, event) in after.iter().enumerate() {
            run.happen(at, event);
            twin.happen(at, event);
            prop_assert_eq!(&run.cluster.mail, &twin.cluster.mail);
        }
    }

    #[test]
    fn what_was_stored_gives_the_same_state_and_the_same_messages(
        events in prop::collection::vec(event(), 1..200),
        snapshot_at in 0..200usize,
    ) {
        let mut replica = Replica::new(7);
        let mut all = Stored { snapshot: replica.snapshot(), records: Vec::new() };
        let mut recent = all.clone();
        let joins = (0..3).map(Event::Join);
        for (at, event) in joins.chain(events).enumerate() {
            if at == snapshot_at {
                recent = Stored { snapshot: replica.snapshot(), records: Vec::new() };
            }
            let (record, frame) = record(at as i64, &event, &replica);
            if let Ok(true) = replica.apply(&record, &frame) {
                all.records.push(record.encode(&frame));
                recent.records.push(record.encode(&frame));
            }
        }
        let state = replica.snapshot();
        for stored in [all, recent] {
            let recovered = Replica::recover(&stored).unwrap();
            prop_assert!(recovered.snapshot() == state, "{:?} is not {:?}", recovered, replica);
        }
    }
}
