//! What semaphore sets do, rule by rule. That they do it as the kernel does is shown in
//! `kernel.rs`; here are the rules that it cannot show: times, nodes, and what has a name.

mod support;

use migshm_protocol::call::{Errno, SemCommand, StatBy};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::limits::{SEMMSL, SEMOPM, SEMVMX};
use migshm_protocol::{NodeId, ProcessId};
use support::*;

/// Two nodes, a process of root's on either, and a set with so many semaphores.
fn set_of(count: i32) -> (Cluster, [Process; 2], i32) {
    let (mut cluster, [a, b]) = Cluster::with_nodes([MIB; 2]);
    let processes = [root(a, 10), root(b, 20)];
    let id = cluster
        .semget(&processes[0], IPC_PRIVATE, count, 0o600)
        .unwrap();
    (cluster, processes, id)
}

#[test]
fn one_set_serves_all_nodes() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let id = cluster.semget(&p, 77, 2, IPC_CREAT | 0o600).unwrap();
    assert_eq!(cluster.semget(&q, 77, 2, 0), Ok(id));
    cluster.semop(&p, id, &[(1, 3, 0)]).unwrap();
    assert_eq!(cluster.getall(&q, id), Ok(vec![0, 3]));
    assert_eq!(cluster.semctl(&q, id, SemCommand::GetPid(1)), Ok(10));
}

#[test]
fn a_call_does_all_of_its_operations_or_none() {
    let (mut cluster, [p, _], id) = set_of(3);
    assert_eq!(
        cluster.semop(&p, id, &[(0, 1, 0), (1, -1, NOWAIT)]),
        Err(Errno::EAGAIN)
    );
    assert_eq!(
        cluster.semop(&p, id, &[(0, 1, UNDO), (0, i16::MAX, 0)]),
        Err(Errno::ERANGE)
    );
    assert_eq!(cluster.getall(&p, id), Ok(vec![0, 0, 0]));
    cluster.exit(&p);
    assert_eq!(
        cluster.getall(&p, id),
        Ok(vec![0, 0, 0]),
        "an undone call owes nothing"
    );
}

#[test]
fn a_semaphore_may_occur_twice_in_a_call() {
    let (mut cluster, [p, _], id) = set_of(1);
    cluster
        .semop(&p, id, &[(0, 0, 0), (0, 2, 0), (0, -1, 0)])
        .unwrap();
    assert_eq!(cluster.getall(&p, id), Ok(vec![1]));
    assert_eq!(
        cluster.semop(&p, id, &[(0, 1, 0), (0, -3, NOWAIT)]),
        Err(Errno::EAGAIN)
    );
    assert_eq!(cluster.getall(&p, id), Ok(vec![1]));
}

#[test]
fn waiters_are_served_in_the_order_they_came() {
    let (mut cluster, [p, q], id) = set_of(1);
    let first = cluster.start_semop(&p, id, &[(0, -1, 0)]);
    let second = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert!(cluster.outcome(first).is_some());
    assert!(cluster.outcome(second).is_none());
}

#[test]
fn a_waiter_that_cannot_go_is_passed_by_one_that_can() {
    let (mut cluster, [p, q], id) = set_of(1);
    let greedy = cluster.start_semop(&p, id, &[(0, -5, 0)]);
    let modest = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert!(cluster.outcome(greedy).is_none());
    assert!(cluster.outcome(modest).is_some());
}

#[test]
fn simple_and_complex_waiters_share_one_queue() {
    let (mut cluster, [p, q], id) = set_of(2);
    let simple = cluster.start_semop(&p, id, &[(0, -1, 0)]);
    let complex = cluster.start_semop(&q, id, &[(0, -1, 0), (1, 1, 0)]);
    let late = cluster.start_semop(&p, id, &[(0, -1, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert!(cluster.outcome(simple).is_some());
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert!(
        cluster.outcome(complex).is_some(),
        "it came before the last"
    );
    assert!(cluster.outcome(late).is_none());
}

#[test]
fn a_completed_waiter_enables_older_ones() {
    let (mut cluster, [p, q], id) = set_of(2);
    let old = cluster.start_semop(&p, id, &[(1, -1, 0), (1, 0, 0)]);
    let young = cluster.start_semop(&q, id, &[(0, -1, 0), (1, 1, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert!(cluster.outcome(young).is_some());
    assert!(cluster.outcome(old).is_some());
    assert_eq!(cluster.getall(&p, id), Ok(vec![0, 0]));
}

#[test]
fn waiters_for_zero_see_a_zero_that_the_next_waiter_takes_away() {
    let (mut cluster, [p, q], id) = set_of(1);
    cluster.semctl(&p, id, SemCommand::SetVal(0, 2)).unwrap();
    let zero = cluster.start_semop(&p, id, &[(0, 0, 0)]);
    let twice = cluster.start_semop(&q, id, &[(0, -3, 0), (0, 1, 0)]);
    cluster.semop(&p, id, &[(0, -2, 0)]).unwrap();
    assert!(cluster.outcome(zero).is_some());
    assert!(cluster.outcome(twice).is_none());
}

#[test]
fn a_waiter_that_brings_zero_completes_those_who_wait_for_it() {
    let (mut cluster, [p, q], id) = set_of(2);
    cluster.semctl(&p, id, SemCommand::SetVal(1, 1)).unwrap();
    let zero = cluster.start_semop(&p, id, &[(1, 0, 0)]);
    let both = cluster.start_semop(&q, id, &[(0, -1, 0), (1, -1, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert!(cluster.outcome(zero).is_some());
    assert!(cluster.outcome(both).is_some());
}

#[test]
fn simple_waiters_are_still_served_when_the_complex_ones_are_gone() {
    let (mut cluster, [p, q], id) = set_of(2);
    let simple = cluster.start_semop(&p, id, &[(0, -1, 0)]);
    let complex = cluster.start_semop(&q, id, &[(1, -1, 0), (0, -1, 0)]);
    cluster.send(
        q.node,
        ToCoordinator::Cancel {
            id: complex.id,
            errno: Errno::EINTR,
        },
    );
    let late = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    for (waiter, next) in [(simple, Some(late)), (late, None)] {
        cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
        assert!(cluster.outcome(waiter).is_some());
        assert!(next.is_none_or(|next| cluster.outcome(next).is_none()));
    }
}

#[test]
fn complex_waiters_for_zero_are_tried_again_only_when_a_changed_semaphore_is_zero() {
    let (mut cluster, [p, q], id) = set_of(2);
    cluster.semctl(&p, id, SemCommand::SetVal(1, 1)).unwrap();
    cluster.start_semop(&q, id, &[(0, 0, 0), (1, 0, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    let zcnt = [0, 1].map(|num| cluster.semctl(&p, id, SemCommand::GetZcnt(num)).unwrap());
    assert_eq!(zcnt, [0, 1], "it still counts for what blocked it first");
}

#[test]
fn undo_begins_with_the_set_that_was_used_last() {
    let (mut cluster, [p, q], first) = set_of(1);
    let second = cluster.semget(&p, IPC_PRIVATE, 1, 0o600).unwrap();
    for id in [first, second, first] {
        cluster.semop(&p, id, &[(0, 1, UNDO)]).unwrap();
    }
    let waiters = [second, first].map(|id| cluster.start_semop(&q, id, &[(0, 0, 0)]));
    cluster.exit(&p);
    let order: Vec<_> = cluster
        .mail
        .iter()
        .map(|output| output.message.clone())
        .collect();
    let answered = |pending: Pending| {
        order
            .iter()
            .position(|m| matches!(m, FromCoordinator::Answer { id, .. } if *id == pending.id))
            .unwrap()
    };
    assert!(answered(waiters[1]) < answered(waiters[0]));
}

#[test]
fn a_waiter_counts_for_the_operation_that_blocks_it() {
    let (mut cluster, [p, q], id) = set_of(2);
    cluster.setall(&p, id, &[1, 1]).unwrap();
    let waiter = cluster.start_semop(&q, id, &[(0, -1, 0), (1, 0, 0)]);
    let counts = |cluster: &mut Cluster| {
        [
            SemCommand::GetNcnt(0),
            SemCommand::GetZcnt(0),
            SemCommand::GetNcnt(1),
            SemCommand::GetZcnt(1),
        ]
        .map(|command| cluster.semctl(&p, id, command).unwrap())
    };
    assert_eq!(counts(&mut cluster), [0, 0, 0, 1]);
    cluster.semop(&p, id, &[(0, -1, 0)]).unwrap();
    assert_eq!(counts(&mut cluster), [1, 0, 0, 0]);
    assert!(cluster.outcome(waiter).is_none());
}

#[test]
fn a_waiter_fails_if_it_is_stopped_by_an_operation_that_must_not_wait() {
    let (mut cluster, [p, q], id) = set_of(2);
    let waiter = cluster.start_semop(&q, id, &[(0, -1, 0), (1, -1, NOWAIT)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert_eq!(cluster.outcome(waiter), Some(Err(Errno::EAGAIN)));
    assert_eq!(cluster.getall(&p, id), Ok(vec![1, 0]));
}

#[test]
fn a_cancelled_call_is_answered_once_and_changes_nothing() {
    let (mut cluster, [p, q], id) = set_of(1);
    let waiter = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    let cancel = ToCoordinator::Cancel {
        id: waiter.id,
        errno: Errno::EINTR,
    };
    cluster.send(p.node, cancel.clone());
    assert!(
        cluster.outcome(waiter).is_none(),
        "a node cancels its own calls only"
    );
    cluster.send(q.node, cancel.clone());
    assert_eq!(cluster.outcome(waiter), Some(Err(Errno::EINTR)));
    cluster.send(q.node, cancel);
    assert!(cluster.outcome(waiter).is_none());
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    assert_eq!(cluster.getall(&p, id), Ok(vec![1]));
}

#[test]
fn a_cancel_that_comes_too_late_is_not_answered() {
    let (mut cluster, [p, q], id) = set_of(1);
    let waiter = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    cluster.send(
        q.node,
        ToCoordinator::Cancel {
            id: waiter.id,
            errno: Errno::EAGAIN,
        },
    );
    assert!(cluster.outcome(waiter).unwrap().is_ok());
    assert!(cluster.outcome(waiter).is_none());
}

#[test]
fn removing_a_set_ends_its_waiters_with_eidrm() {
    let (mut cluster, [p, q], id) = set_of(2);
    let waiters = [
        cluster.start_semop(&q, id, &[(0, -1, 0)]),
        cluster.start_semop(&q, id, &[(0, -1, 0), (1, -1, 0)]),
    ];
    cluster.semctl(&p, id, SemCommand::Remove).unwrap();
    for waiter in waiters {
        assert_eq!(cluster.outcome(waiter), Some(Err(Errno::EIDRM)));
    }
    assert_eq!(cluster.semop(&p, id, &[(0, 1, 0)]), Err(Errno::EINVAL));
}

#[test]
fn a_killed_holder_releases_with_undo() {
    let (mut cluster, [p, q], id) = set_of(1);
    cluster.semctl(&p, id, SemCommand::SetVal(0, 1)).unwrap();
    cluster.semop(&p, id, &[(0, -1, UNDO)]).unwrap();
    let waiter = cluster.start_semop(&q, id, &[(0, -1, UNDO)]);
    cluster.exit(&p);
    assert!(cluster.outcome(waiter).unwrap().is_ok());
    assert_eq!(cluster.semctl(&q, id, SemCommand::GetPid(0)), Ok(20));
}

#[test]
fn undo_stays_within_the_range_of_a_semaphore() {
    let (mut cluster, [p, q], id) = set_of(2);
    cluster.semop(&p, id, &[(0, 5, UNDO)]).unwrap();
    cluster
        .semop(&q, id, &[(0, -4, 0), (1, SEMVMX as i16, 0)])
        .unwrap();
    cluster.semop(&p, id, &[(1, -5, UNDO)]).unwrap();
    cluster.semop(&q, id, &[(1, 3, 0)]).unwrap();
    cluster.exit(&p);
    assert_eq!(cluster.getall(&q, id), Ok(vec![0, SEMVMX as u16]));
    assert_eq!(
        cluster.semctl(&q, id, SemCommand::GetPid(0)),
        Ok(10),
        "the dead process's"
    );
}

#[test]
fn undo_beyond_semaem_is_refused() {
    let (mut cluster, [p, _], id) = set_of(1);
    for _ in 0..2 {
        cluster.semop(&p, id, &[(0, 16_000, UNDO)]).unwrap();
        cluster.semop(&p, id, &[(0, -16_000, 0)]).unwrap();
    }
    assert_eq!(cluster.semop(&p, id, &[(0, 769, UNDO)]), Err(Errno::ERANGE));
    cluster.semop(&p, id, &[(0, 768, UNDO)]).unwrap();
}

#[test]
fn setting_a_value_clears_what_is_owed_to_it() {
    let (mut cluster, [p, q], id) = set_of(2);
    cluster
        .semop(&p, id, &[(0, 1, UNDO), (1, 1, UNDO)])
        .unwrap();
    cluster.semctl(&q, id, SemCommand::SetVal(0, 4)).unwrap();
    cluster.exit(&p);
    assert_eq!(cluster.getall(&q, id), Ok(vec![4, 0]));
}

#[test]
fn undo_does_not_reach_a_set_that_took_the_place_of_another() {
    let (mut cluster, [p, q], id) = set_of(1);
    cluster.semop(&p, id, &[(0, 1, UNDO)]).unwrap();
    cluster.semctl(&p, id, SemCommand::Remove).unwrap();
    for _ in 0..63 {
        let passing = cluster.semget(&q, IPC_PRIVATE, 1, 0o600).unwrap();
        cluster.semctl(&q, passing, SemCommand::Remove).unwrap();
    }
    let heir = cluster.semget(&q, IPC_PRIVATE, 1, 0o600).unwrap();
    assert_eq!(
        heir,
        id + 32_768,
        "the same index, the next sequence number"
    );
    cluster.semop(&q, heir, &[(0, 5, 0)]).unwrap();
    cluster.exit(&p);
    assert_eq!(cluster.getall(&q, heir), Ok(vec![5]));
}

#[test]
fn equal_process_numbers_of_two_nodes_are_two_processes() {
    let (mut cluster, [p, mut q], id) = set_of(1);
    q.caller.process = p.caller.process;
    cluster.semop(&p, id, &[(0, 1, UNDO)]).unwrap();
    cluster.semop(&q, id, &[(0, 2, UNDO)]).unwrap();
    cluster.exit(&q);
    assert_eq!(cluster.getall(&p, id), Ok(vec![1]));
}

#[test]
fn an_exit_voids_blocked_calls_before_it_undoes() {
    let (mut cluster, [p, q], id) = set_of(1);
    cluster.semop(&p, id, &[(0, 1, 0)]).unwrap();
    cluster.semop(&p, id, &[(0, -1, UNDO)]).unwrap();
    let own = cluster.start_semop(&p, id, &[(0, -1, 0)]);
    let other = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    cluster.exit(&p);
    assert!(cluster.outcome(own).is_none());
    assert!(cluster.outcome(other).is_some());
}

#[test]
fn a_node_that_leaves_undoes_for_all_its_processes_and_voids_their_calls() {
    let (mut cluster, [p, q], id) = set_of(1);
    let r = root(p.node, 11);
    cluster.semop(&q, id, &[(0, 2, 0)]).unwrap();
    cluster.semop(&p, id, &[(0, -1, UNDO)]).unwrap();
    cluster.semop(&r, id, &[(0, -1, UNDO)]).unwrap();
    let dead = cluster.start_semop(&r, id, &[(0, -1, 0)]);
    let alive = cluster.start_semop(&q, id, &[(0, -2, 0)]);
    cluster.leave(p.node);
    assert!(cluster.outcome(dead).is_none());
    assert!(
        cluster.outcome(alive).is_some(),
        "both units came back, and no dead call took one"
    );
}

#[test]
fn times_are_those_of_the_last_operation_and_the_last_control() {
    let (mut cluster, [p, q], id) = set_of(2);
    let times = |cluster: &mut Cluster| {
        let status = cluster.sem_stat(&p, id, StatBy::Id).unwrap();
        (status.otime, status.ctime)
    };
    assert_eq!(times(&mut cluster), (0, 1000));
    cluster.now = 1001;
    cluster.semop(&p, id, &[(0, 0, 0)]).unwrap();
    assert_eq!(
        times(&mut cluster),
        (1001, 1000),
        "a wait for zero is an operation"
    );
    cluster.now = 1002;
    let waiter = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    assert_eq!(
        times(&mut cluster),
        (1001, 1000),
        "blocked calls have not operated"
    );
    cluster.now = 1003;
    cluster.semctl(&p, id, SemCommand::SetVal(1, 1)).unwrap();
    assert_eq!(times(&mut cluster), (1001, 1003), "it completed nobody");
    cluster.now = 1004;
    cluster.semctl(&p, id, SemCommand::SetVal(0, 1)).unwrap();
    assert!(cluster.outcome(waiter).is_some());
    assert_eq!(times(&mut cluster), (1004, 1004), "the waiter has operated");
    cluster.now = 1005;
    assert_eq!(
        cluster.semop(&p, id, &[(0, -1, NOWAIT)]),
        Err(Errno::EAGAIN)
    );
    assert_eq!(times(&mut cluster), (1004, 1004));
}

#[test]
fn an_exit_counts_as_operation_even_if_nothing_was_owed() {
    let (mut cluster, [p, q], id) = set_of(1);
    assert_eq!(
        cluster.semop(&p, id, &[(0, -1, UNDO | NOWAIT)]),
        Err(Errno::EAGAIN)
    );
    cluster.now = 1001;
    cluster.exit(&p);
    assert_eq!(cluster.sem_stat(&q, id, StatBy::Id).unwrap().otime, 1001);
}

#[test]
fn limits_of_calls() {
    let (mut cluster, [p, _], id) = set_of(1);
    assert_eq!(
        cluster.semget(&p, IPC_PRIVATE, SEMMSL + 1, 0o600),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        cluster.semop(&p, id, &[(0, 0, 0); SEMOPM + 1]),
        Err(Errno::E2BIG)
    );
    assert_eq!(cluster.semop(&p, id, &[(0, 0, 0); SEMOPM]), Ok(()));
    assert_eq!(cluster.semop(&p, id, &[]), Err(Errno::EINVAL));
    assert_eq!(cluster.semop(&p, id, &[(1, 1, 0)]), Err(Errno::EFBIG));
    assert_eq!(cluster.setall(&p, id, &[1, 1]), Err(Errno::EINVAL));
    assert_eq!(cluster.setall(&p, id, &[32_768]), Err(Errno::ERANGE));
}

#[test]
fn altering_needs_write_permission_and_waiting_for_zero_needs_read_permission() {
    let (mut cluster, [p, _], _) = set_of(1);
    let other = user(p.node, 30, 1000);
    let readable = cluster.semget(&p, 1, 1, IPC_CREAT | 0o604).unwrap();
    let writable = cluster.semget(&p, 2, 1, IPC_CREAT | 0o602).unwrap();
    assert_eq!(cluster.semop(&other, readable, &[(0, 0, 0)]), Ok(()));
    assert_eq!(
        cluster.semop(&other, readable, &[(0, 1, 0)]),
        Err(Errno::EACCES)
    );
    assert_eq!(
        cluster.semop(&other, writable, &[(0, 0, 0)]),
        Err(Errno::EACCES)
    );
    assert_eq!(cluster.semop(&other, writable, &[(0, 1, 0)]), Ok(()));
}

#[test]
fn a_second_call_with_the_id_of_a_blocked_one_is_ignored() {
    let (mut cluster, [p, q], id) = set_of(1);
    let waiter = cluster.start_semop(&q, id, &[(0, -1, 0)]);
    let call = semop(id);
    let again = ToCoordinator::Call {
        id: waiter.id,
        caller: q.caller.clone(),
        call,
    };
    cluster
        .core
        .handle(1000, q.node, again, &raw(&[(0, 1, 0)]), &mut cluster.mail);
    assert_eq!(cluster.core.protocol_errors(), 1);
    assert_eq!(cluster.getall(&p, id), Ok(vec![0]));
}

#[test]
fn strangers_are_not_heard() {
    let (mut cluster, [_, _], id) = set_of(1);
    let stranger = root(NodeId(9), 1);
    let pending = cluster.start_semop(&stranger, id, &[(0, 1, 0)]);
    assert!(cluster.outcome(pending).is_none());
    cluster.send(
        NodeId(u16::MAX),
        ToCoordinator::Exited {
            process: ProcessId(10),
            pid: 10,
        },
    );
    assert_eq!(cluster.core.protocol_errors(), 2);
}
