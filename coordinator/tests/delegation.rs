//! Semaphore sets that are delegated to the node that uses them, and come back.

mod support;

use migshm_protocol::call::{Call, Errno, SemCommand, SetMemory, StatBy};
use migshm_protocol::control::{Debt, FromCoordinator, SetState, ToCoordinator};
use migshm_protocol::{NodeId, ProcessId};
use support::*;

/// Two nodes, a process of root's on either, and a set of two semaphores.
struct World {
    cluster: Cluster,
    p: Process,
    q: Process,
    id: i32,
}

fn world() -> World {
    let (mut cluster, [a, b]) = Cluster::with_nodes([MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let id = cluster.semget(&p, IPC_PRIVATE, 2, 0o666).unwrap();
    World { cluster, p, q, id }
}

/// What a node was told about a delegation.
#[derive(Debug, PartialEq)]
struct Delegated {
    to: NodeId,
    number: u64,
    access: u64,
    state: SetState,
}

impl World {
    /// A `semop` by a process that could use the set's memory; whether it was answered, by an
    /// outcome or by the delegation.
    fn operate(&mut self, process: &Process, ops: &[(u16, i16, i16)]) -> Pending {
        let call = Call::SemOp {
            id: self.id,
            memory: SetMemory::Wanted,
        };
        self.cluster.start(process, call, &raw(ops))
    }

    fn take_delegation(&mut self, call: Pending) -> Option<Delegated> {
        let is_it = |message: &FromCoordinator| matches!(message, FromCoordinator::Delegated { id, .. } if *id == call.id);
        let mail = &mut self.cluster.mail;
        let at = mail
            .iter()
            .position(|output| output.to == call.node && is_it(&output.message))?;
        let output = mail.remove(at);
        let FromCoordinator::Delegated {
            set,
            number,
            access,
            state,
            ..
        } = output.message
        else {
            unreachable!("found as one")
        };
        assert_eq!(set, self.id);
        Some(Delegated {
            to: output.to,
            number,
            access,
            state,
        })
    }

    /// Has the set delegated to a process's node; semaphore 0 is then greater by `calls`.
    fn delegate(&mut self, process: &Process) -> Delegated {
        for _ in 0..300 {
            let call = self.operate(process, &[(0, 1, 0)]);
            if let Some(delegated) = self.take_delegation(call) {
                return delegated;
            }
            assert!(self.cluster.outcome(call).is_some());
        }
        panic!("never delegated");
    }

    fn give_back(&mut self, delegated: &Delegated, state: SetState) {
        let message = ToCoordinator::Returned {
            set: self.id,
            number: delegated.number,
            state,
        };
        self.cluster.send(delegated.to, message);
    }

    /// Who was asked to return the set.
    fn recalls(&mut self) -> Vec<NodeId> {
        let id = self.id;
        let is_recall = |message: &FromCoordinator| matches!(message, FromCoordinator::Recall { set, .. } if *set == id);
        let mail = &mut self.cluster.mail;
        let (recalls, rest) = std::mem::take(mail)
            .into_iter()
            .partition(|output| is_recall(&output.message));
        *mail = rest;
        let recalls: Vec<_> = recalls;
        recalls.into_iter().map(|output| output.to).collect()
    }
}

fn debt(process: &Process, num: u16, owed: i16) -> Debt {
    Debt {
        process: process.caller.process,
        pid: process.caller.pid,
        num,
        owed,
    }
}

#[test]
fn a_set_goes_to_the_node_that_uses_it() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let first = w.operate(&p, &[(1, 3, UNDO)]);
    assert_eq!(w.take_delegation(first), None, "one call is no habit");
    let second = w.operate(&p, &[(0, 1, 0)]);
    let delegated = w.take_delegation(second).expect("two calls are");
    assert_eq!(delegated.to, p.node);
    assert_eq!(delegated.state.values, [1, 3]);
    assert_eq!(delegated.state.pids, [10, 10]);
    let owed: Vec<_> = delegated
        .state
        .debts
        .iter()
        .map(|d| (d.process, d.num, d.owed))
        .collect();
    assert_eq!(owed, [(p.caller.process, 1, -3)]);
    assert!(w.cluster.outcome(second).is_none(), "answered once");

    // The other node's calls wait until it is back, and are then done in order.
    let value = w.cluster.start(
        &q,
        Call::SemCtl {
            id: w.id,
            command: SemCommand::GetVal(0),
        },
        &[],
    );
    let taking = w.operate(&q, &[(0, -4, 0)]);
    assert_eq!(w.recalls(), [p.node], "recalled once");
    assert!(w.cluster.outcome(value).is_none() && w.cluster.outcome(taking).is_none());
    let state = SetState {
        values: vec![5, 2],
        pids: vec![11, 12],
        otime: 2000,
        debts: vec![debt(&p, 1, 1)],
    };
    w.give_back(&delegated, state);
    assert_eq!(
        w.cluster.outcome(value),
        Some(Ok(migshm_protocol::call::Answer::Value(5)))
    );
    assert!(w.cluster.outcome(taking).unwrap().is_ok());
    assert_eq!(w.cluster.semctl(&q, w.id, SemCommand::GetPid(1)), Ok(12));
    // What it owes is what it owed and what has been added: -3 + 1.
    w.cluster.exit(&p);
    assert_eq!(w.cluster.getall(&q, w.id), Ok(vec![1, 0]));
}

#[test]
fn a_set_for_which_calls_wait_stays() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let waiting = w.operate(&q, &[(1, -1, 0)]);
    for _ in 0..10 {
        let call = w.operate(&p, &[(0, 1, 0)]);
        assert_eq!(w.take_delegation(call), None);
    }
    assert!(w.cluster.outcome(waiting).is_none());
}

#[test]
fn a_set_that_one_node_waits_for_is_its_own_again_at_once() {
    let mut w = world();
    let p = w.p.clone();
    let other = root(p.node, 11);
    let mut delegated = w.delegate(&p);
    for _ in 0..10 {
        // A process of the node waits, for which the set comes back, and another ends the wait.
        let state = SetState {
            values: vec![0, 0],
            ..delegated.state.clone()
        };
        w.give_back(&delegated, state);
        let waiting = w.operate(&other, &[(0, -1, 0)]);
        let giving = w.operate(&p, &[(0, 1, 0)]);
        delegated = w.take_delegation(giving).expect("nobody waits any more");
        assert_eq!(delegated.state.values, [0, 0]);
        assert!(w.cluster.outcome(waiting).unwrap().is_ok());
    }
}

#[test]
fn a_wait_of_another_node_ends_the_row() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let first = w.operate(&p, &[(1, 1, 0)]);
    assert_eq!(w.take_delegation(first), None);
    let waiting = w.operate(&q, &[(0, -1, 0)]);
    let giving = w.operate(&p, &[(0, 1, 0)]);
    assert_eq!(
        w.take_delegation(giving),
        None,
        "the other node uses it too"
    );
    assert!(w.cluster.outcome(waiting).unwrap().is_ok());
}

#[test]
fn a_set_is_not_delegated_to_who_may_not_alter_it_or_cannot_use_it() {
    let mut w = world();
    let p = w.p.clone();
    for _ in 0..10 {
        let call = w.operate(&p, &[(0, 0, 0)]);
        assert_eq!(w.take_delegation(call), None);
        let id = w.id;
        w.cluster.semop(&p, id, &[(1, 1, 0)]).unwrap();
    }
    // Nor to who may alter it and not read it: in memory nobody could tell.
    let user = user(p.node, 30, 1000);
    let id = w.cluster.semget(&user, IPC_PRIVATE, 1, 0o200).unwrap();
    w.id = id;
    for _ in 0..10 {
        let call = w.operate(&user, &[(0, 1, 0)]);
        assert_eq!(w.take_delegation(call), None);
    }
}

#[test]
fn two_nodes_that_take_turns_do_not_pass_the_set_to_and_fro() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let mut delegations = 0;
    for turn in 0..200 {
        let who = if turn % 2 == 0 { &p } else { &q };
        for op in [1, -1] {
            let call = w.operate(who, &[(0, op, 0)]);
            let delegated = w.take_delegation(call);
            if let Some(delegated) = delegated {
                delegations += 1;
                let state = delegated.state.clone();
                // The other one's next call recalls it.
                let other = if turn % 2 == 0 { &q } else { &p };
                let next = w.operate(other, &[(0, 0, NOWAIT)]);
                assert_eq!(w.recalls(), [delegated.to]);
                w.give_back(&delegated, state);
                assert!(w.cluster.outcome(next).is_some());
            }
        }
    }
    assert!(delegations <= 2, "{delegations}");
}

#[test]
fn the_undo_of_a_process_waits_for_the_set() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let call = w.operate(&q, &[(1, 2, UNDO)]);
    assert!(w.cluster.outcome(call).is_some());
    for _ in 0..10 {
        let call = w.operate(&p, &[(0, 1, 0)]);
        assert_eq!(w.take_delegation(call), None, "somebody elsewhere owes");
    }
    let call = w.operate(&q, &[(1, -2, UNDO)]);
    assert!(w.cluster.outcome(call).is_some());
    let delegated = w.delegate(&p);
    w.cluster.exit(&q);
    assert_eq!(w.recalls(), [p.node]);
    let state = SetState {
        debts: Vec::new(),
        ..delegated.state.clone()
    };
    w.give_back(&delegated, state);
    assert_eq!(w.cluster.getall(&p, w.id).unwrap()[1], 0);
}

#[test]
fn a_call_that_is_held_back_can_be_cancelled() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let delegated = w.delegate(&p);
    let held = w.operate(&q, &[(1, 1, 0)]);
    w.cluster.send(
        q.node,
        ToCoordinator::Cancel {
            id: held.id,
            errno: Errno::EINTR,
        },
    );
    assert_eq!(w.cluster.outcome(held), None, "it has not been tried");
    let waiting = w.operate(&q, &[(1, -9, 0)]);
    let cancel = ToCoordinator::Cancel {
        id: waiting.id,
        errno: Errno::EAGAIN,
    };
    w.cluster.send(q.node, cancel);
    let state = SetState {
        debts: Vec::new(),
        ..delegated.state.clone()
    };
    w.give_back(&delegated, state);
    assert!(w.cluster.outcome(held).unwrap().is_ok(), "it need not wait");
    assert_eq!(w.cluster.outcome(waiting), Some(Err(Errno::EAGAIN)));
    assert_eq!(w.cluster.getall(&p, w.id).unwrap()[1], 1);
}

#[test]
fn calls_that_are_held_back_end_with_the_set() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let delegated = w.delegate(&p);
    let remove = Call::SemCtl {
        id: w.id,
        command: SemCommand::Remove,
    };
    let removing = w.cluster.start(&p, remove, &[]);
    let held = w.operate(&q, &[(1, 1, 0)]);
    let state = SetState {
        debts: Vec::new(),
        ..delegated.state.clone()
    };
    w.give_back(&delegated, state);
    assert!(w.cluster.outcome(removing).unwrap().is_ok());
    assert_eq!(w.cluster.outcome(held), Some(Err(Errno::EIDRM)));
}

#[test]
fn with_a_node_goes_what_it_did_to_a_set() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let delegated = w.delegate(&p);
    assert_eq!(w.cluster.core.delegated_to(p.node), [w.id]);
    let held = w.operate(&q, &[(1, 1, 0)]);
    w.cluster.leave(p.node);
    assert!(w.cluster.outcome(held).is_some());
    assert_eq!(
        w.cluster.getall(&q, w.id),
        Ok(vec![delegated.state.values[0], 1])
    );
    // It cannot return the set any more, not even under another membership.
    let again = w.cluster.join("node1", MIB);
    w.cluster.send(
        again,
        ToCoordinator::Returned {
            set: w.id,
            number: delegated.number,
            state: SetState::default(),
        },
    );
    assert_eq!(w.cluster.getall(&q, w.id).unwrap()[1], 1);
}

#[test]
fn nodes_hear_of_the_end_and_of_new_permissions() {
    let mut w = world();
    let p = w.p.clone();
    let delegated = w.delegate(&p);
    w.give_back(
        &delegated,
        SetState {
            debts: Vec::new(),
            otime: 2000,
            ..delegated.state.clone()
        },
    );
    let status = w.cluster.sem_stat(&p, w.id, StatBy::Id).unwrap();
    assert_eq!(status.otime, 2000);
    let perm = status.perm;
    let new = migshm_protocol::call::NewPerm {
        uid: perm.uid,
        gid: perm.gid,
        mode: 0o600,
    };
    w.cluster.semctl(&p, w.id, SemCommand::Set(new)).unwrap();
    let after = w.delegate(&p);
    assert_ne!(after.access, delegated.access);
    assert_ne!(after.number, delegated.number);
    w.give_back(
        &after,
        SetState {
            debts: Vec::new(),
            ..after.state.clone()
        },
    );
    w.cluster.semctl(&p, w.id, SemCommand::Remove).unwrap();
    let gone = FromCoordinator::SetRemoved { set: w.id };
    assert!(
        w.cluster
            .mail
            .iter()
            .any(|output| output.to == p.node && output.message == gone)
    );
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let mut w = world();
    let (p, q) = (w.p.clone(), w.q.clone());
    let delegated = w.delegate(&p);
    let good = SetState {
        debts: Vec::new(),
        ..delegated.state.clone()
    };
    let bad = [
        SetState {
            values: vec![1],
            ..good.clone()
        },
        SetState {
            values: vec![1, 40000],
            ..good.clone()
        },
        SetState {
            pids: vec![],
            ..good.clone()
        },
        SetState {
            debts: vec![Debt {
                process: ProcessId(1),
                pid: 1,
                num: 2,
                owed: 1,
            }],
            ..good.clone()
        },
    ];
    let errors = w.cluster.core.protocol_errors();
    for state in bad {
        w.give_back(&delegated, state);
    }
    w.cluster.send(
        q.node,
        ToCoordinator::Returned {
            set: w.id,
            number: delegated.number,
            state: good.clone(),
        },
    );
    assert_eq!(w.cluster.core.protocol_errors(), errors + 5);
    assert_eq!(w.cluster.core.delegated_to(p.node), [w.id]);
    w.give_back(&delegated, good);
    assert_eq!(w.cluster.core.delegated_to(p.node), [] as [i32; 0]);
}
