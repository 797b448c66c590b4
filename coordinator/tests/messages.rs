//! What message queues do, rule by rule. That they do it as the kernel does is shown in
//! `kernel.rs`; here are the rules that it cannot show: times, nodes, privileges, and what has a
//! name.

mod support;

use migshm_protocol::call::{Call, Errno, MsgCommand, NewPerm, StatBy};
use migshm_protocol::control::ToCoordinator;
use migshm_protocol::limits::{MSGMAX, MSGMNB, MSGMNI};
use support::*;

const MSG_NOERROR: i32 = 0o10000;
const MSG_EXCEPT: i32 = 0o20000;
const MSG_COPY: i32 = 0o40000;

/// Two nodes, a process of root's on either, and a queue.
fn queue() -> (Cluster, [Process; 2], i32) {
    let (mut cluster, [a, b]) = Cluster::with_nodes([MIB; 2]);
    let processes = [root(a, 10), root(b, 20)];
    let id = cluster.msgget(&processes[0], IPC_PRIVATE, 0o600).unwrap();
    (cluster, processes, id)
}

/// One that holds so many bytes.
fn queue_of(qbytes: u64) -> (Cluster, [Process; 2], i32) {
    let (mut cluster, processes, id) = queue();
    cluster.msgctl(&processes[0], id, capacity(qbytes)).unwrap();
    (cluster, processes, id)
}

fn capacity(qbytes: u64) -> MsgCommand {
    let perm = NewPerm {
        uid: 0,
        gid: 0,
        mode: 0o600,
    };
    MsgCommand::Set { perm, qbytes }
}

#[test]
fn one_queue_serves_all_nodes() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let id = cluster.msgget(&p, 77, IPC_CREAT | 0o600).unwrap();
    assert_eq!(cluster.msgget(&q, 77, 0), Ok(id));
    cluster.msgsnd(&p, id, 3, b"from afar", 0).unwrap();
    assert_eq!(
        cluster.msgrcv(&q, id, 100, 0, 0),
        Ok((3, b"from afar".to_vec()))
    );
    let status = cluster.msg_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.lspid, status.lrpid), (10, 20));
}

#[test]
fn a_type_chooses_the_message() {
    let (mut cluster, [p, _], id) = queue();
    for (mtype, text) in [(5, b"a"), (2, b"b"), (3, b"c"), (2, b"d"), (9, b"e")] {
        cluster.msgsnd(&p, id, mtype, text, 0).unwrap();
    }
    let mut got = |mtype, flags| {
        let (mtype, text) = cluster.msgrcv(&p, id, 100, mtype, flags)?;
        Ok((mtype, text[0]))
    };
    assert_eq!(got(3, 0), Ok((3, b'c')));
    assert_eq!(got(3, IPC_NOWAIT), Err(Errno::ENOMSG));
    assert_eq!(got(-1, IPC_NOWAIT), Err(Errno::ENOMSG));
    assert_eq!(got(-8, 0), Ok((2, b'b')), "the first of the lowest");
    assert_eq!(got(5, MSG_EXCEPT), Ok((2, b'd')));
    assert_eq!(got(i64::MIN, 0), Ok((5, b'a')));
    assert_eq!(got(0, 0), Ok((9, b'e')));
}

#[test]
fn a_message_that_is_too_long_stays_or_is_cut() {
    let (mut cluster, [p, _], id) = queue();
    cluster.msgsnd(&p, id, 1, b"long", 0).unwrap();
    assert_eq!(cluster.msgrcv(&p, id, 3, 0, 0), Err(Errno::E2BIG));
    let cut = Ok((1, b"lon".to_vec()));
    assert_eq!(cluster.msgrcv(&p, id, 3, 0, MSG_NOERROR), cut);
    let status = cluster.msg_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.qnum, status.cbytes), (0, 0));
}

#[test]
fn a_copy_leaves_the_message() {
    let (mut cluster, [p, q], id) = queue();
    cluster.msgsnd(&p, id, 7, b"one", 0).unwrap();
    cluster.msgsnd(&p, id, 8, b"two", 0).unwrap();
    let mut copy = |size, at, flags| cluster.msgrcv(&q, id, size, at, MSG_COPY | flags);
    assert_eq!(copy(3, 1, IPC_NOWAIT), Ok((8, b"two".to_vec())));
    assert_eq!(copy(3, 2, IPC_NOWAIT), Err(Errno::ENOMSG));
    assert_eq!(copy(3, -1, IPC_NOWAIT), Err(Errno::ENOMSG));
    assert_eq!(copy(3, 1, 0), Err(Errno::EINVAL));
    assert_eq!(copy(3, 1, IPC_NOWAIT | MSG_EXCEPT), Err(Errno::EINVAL));
    assert_eq!(copy(2, 1, IPC_NOWAIT), Err(Errno::E2BIG));
    assert_eq!(copy(2, 1, IPC_NOWAIT | MSG_NOERROR), Err(Errno::EINVAL));
    let status = cluster.msg_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.qnum, status.lrpid, status.rtime), (2, 0, 0));
}

#[test]
fn what_may_be_sent_is_limited() {
    let (mut cluster, [p, _], id) = queue();
    let largest = [b'x'; MSGMAX];
    assert_eq!(cluster.msgsnd(&p, id, 0, b"", 0), Err(Errno::EINVAL));
    assert_eq!(cluster.msgsnd(&p, id, -1, b"", 0), Err(Errno::EINVAL));
    let too_long = [b'x'; MSGMAX + 1];
    assert_eq!(cluster.msgsnd(&p, id, 1, &too_long, 0), Err(Errno::EINVAL));
    let torn = cluster.call(&p, Call::MsgSend { id, flags: 0 }, b"torn");
    assert_eq!(torn, Err(Errno::EINVAL));

    for _ in 0..MSGMNB / MSGMAX as u64 {
        cluster.msgsnd(&p, id, 1, &largest, 0).unwrap();
    }
    assert_eq!(
        cluster.msgsnd(&p, id, 1, b"1", IPC_NOWAIT),
        Err(Errno::EAGAIN)
    );
    // A message without text takes no bytes; but there are no more messages than bytes.
    cluster.msgsnd(&p, id, 1, b"", IPC_NOWAIT).unwrap();
    assert_eq!(
        cluster.msgrcv(&p, id, MSGMAX as u64, 0, 0),
        Ok((1, largest.to_vec()))
    );
    cluster.msgctl(&p, id, capacity(2)).unwrap();
    assert_eq!(
        cluster.msgsnd(&p, id, 1, b"", IPC_NOWAIT),
        Err(Errno::EAGAIN)
    );
}

#[test]
fn a_waiting_receiver_gets_what_it_wants_and_nothing_else() {
    let (mut cluster, [p, q], id) = queue();
    let second = cluster.start_msgrcv(&q, id, 2);
    let any = cluster.start_msgrcv(&q, id, 0);
    cluster.now = 2000;
    cluster.msgsnd(&p, id, 1, b"x", 0).unwrap();
    assert_eq!(cluster.received(second), None);
    assert_eq!(cluster.received(any), Some(Ok((1, b"x".to_vec()))));
    cluster.msgsnd(&p, id, 2, b"y", 0).unwrap();
    assert_eq!(cluster.received(second), Some(Ok((2, b"y".to_vec()))));
    let status = cluster.msg_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.lrpid, status.rtime, status.qnum), (20, 2000, 0));
}

#[test]
fn a_waiting_receiver_without_room_fails_and_the_next_one_gets_the_message() {
    let (mut cluster, [p, q], id) = queue();
    let receive = |size| Call::MsgReceive {
        id,
        size,
        mtype: 0,
        flags: 0,
    };
    let small = cluster.start(&q, receive(1), &[]);
    let large = cluster.start(&q, receive(2), &[]);
    cluster.msgsnd(&p, id, 1, b"xx", 0).unwrap();
    assert_eq!(cluster.received(small), Some(Err(Errno::E2BIG)));
    assert_eq!(cluster.received(large), Some(Ok((1, b"xx".to_vec()))));
}

#[test]
fn a_full_queue_is_refilled_in_the_order_of_the_senders() {
    let (mut cluster, [p, q], id) = queue_of(2);
    cluster.msgsnd(&p, id, 1, b"ab", 0).unwrap();
    let senders = [b"c", b"d", b"e"].map(|text| cluster.start_msgsnd(&q, id, 1, text));
    cluster.now = 3000;
    cluster.msgrcv(&p, id, 2, 0, 0).unwrap();
    let woken = senders.map(|sender| cluster.outcome(sender).is_some());
    assert_eq!(woken, [true, true, false]);
    for text in [b"c", b"d", b"e"] {
        assert_eq!(cluster.msgrcv(&p, id, 1, 0, 0), Ok((1, text.to_vec())));
    }
    let status = cluster.msg_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.lspid, status.stime), (20, 3000));
}

#[test]
fn a_message_without_room_is_passed_by_one_that_has_it() {
    let (mut cluster, [p, q], id) = queue_of(4);
    cluster.msgsnd(&p, id, 1, b"12", 0).unwrap();
    cluster.msgsnd(&p, id, 1, b"34", 0).unwrap();
    let large = cluster.start_msgsnd(&q, id, 1, b"large"[..4].as_ref());
    let small = cluster.start_msgsnd(&q, id, 1, b"s");
    cluster.msgrcv(&p, id, 4, 0, 0).unwrap();
    assert!(cluster.outcome(large).is_none());
    assert!(cluster.outcome(small).is_some());
}

#[test]
fn more_room_wakes_senders() {
    let (mut cluster, [p, q], id) = queue_of(0);
    let sender = cluster.start_msgsnd(&q, id, 1, b"four");
    let receiver = cluster.start_msgrcv(&q, id, 0);
    assert!(
        cluster.outcome(sender).is_none(),
        "room is needed also where somebody waits for the message"
    );
    cluster.msgctl(&p, id, capacity(4)).unwrap();
    assert!(cluster.outcome(sender).is_some());
    assert_eq!(cluster.received(receiver), Some(Ok((1, b"four".to_vec()))));
}

#[test]
fn privileges_are_needed_for_more_than_the_usual_room() {
    let (mut cluster, [node, _]) = Cluster::with_nodes([MIB; 2]);
    let owner = user(node, 1, 0);
    let id = cluster.msgget(&owner, IPC_PRIVATE, 0o600).unwrap();
    cluster.msgctl(&owner, id, capacity(MSGMNB)).unwrap();
    let more = capacity(MSGMNB + 1);
    assert_eq!(cluster.msgctl(&owner, id, more), Err(Errno::EPERM));
    assert_eq!(cluster.msgctl(&root(node, 2), id, more), Ok(0));
    let status = cluster.msg_stat(&owner, id, StatBy::Id).unwrap();
    assert_eq!(status.qbytes, MSGMNB + 1);
}

#[test]
fn who_loses_permission_while_it_waits_fails() {
    let (mut cluster, [node, _]) = Cluster::with_nodes([MIB; 2]);
    let (owner, stranger) = (root(node, 1), user(node, 2, 1000));
    let id = cluster.msgget(&owner, IPC_PRIVATE, 0o666).unwrap();
    let barred = cluster.start_msgrcv(&stranger, id, 1);
    let spared = cluster.start_msgrcv(&owner, id, 1);
    cluster.msgctl(&owner, id, capacity(10)).unwrap();
    assert_eq!(cluster.received(barred), Some(Err(Errno::EACCES)));
    assert_eq!(cluster.received(spared), None);
}

#[test]
fn removal_wakes_everybody() {
    let (mut cluster, [p, q], id) = queue_of(1);
    cluster.msgsnd(&p, id, 1, b"x", 0).unwrap();
    let sender = cluster.start_msgsnd(&q, id, 1, b"y");
    let receiver = cluster.start_msgrcv(&q, id, 2);
    cluster.msgctl(&p, id, MsgCommand::Remove).unwrap();
    assert_eq!(cluster.outcome(sender), Some(Err(Errno::EIDRM)));
    assert_eq!(cluster.received(receiver), Some(Err(Errno::EIDRM)));
    assert_eq!(cluster.msgsnd(&p, id, 1, b"", 0), Err(Errno::EINVAL));
    assert!(cluster.core.is_empty());
}

#[test]
fn a_call_that_is_taken_back_leaves_nothing() {
    let (mut cluster, [p, q], id) = queue_of(1);
    let receiver = cluster.start_msgrcv(&q, id, 0);
    let cancel = |pending: Pending| ToCoordinator::Cancel {
        id: pending.id,
        errno: Errno::EINTR,
    };
    cluster.send(q.node, cancel(receiver));
    assert_eq!(cluster.received(receiver), Some(Err(Errno::EINTR)));
    cluster.msgsnd(&p, id, 1, b"x", 0).unwrap();
    let sender = cluster.start_msgsnd(&q, id, 1, b"y");
    cluster.send(q.node, cancel(sender));
    assert_eq!(cluster.outcome(sender), Some(Err(Errno::EINTR)));
    cluster.msgrcv(&p, id, 1, 0, 0).unwrap();
    assert_eq!(
        cluster.msgrcv(&p, id, 1, 0, IPC_NOWAIT),
        Err(Errno::ENOMSG),
        "what was not sent is not there"
    );
}

#[test]
fn the_dead_neither_send_nor_receive() {
    let (mut cluster, [p, q], id) = queue_of(1);
    let (survivor, killed) = (root(q.node, 30), q);
    cluster.start_msgrcv(&killed, id, 0);
    let next = cluster.start_msgrcv(&survivor, id, 0);
    cluster.exit(&killed);
    cluster.msgsnd(&p, id, 1, b"x", 0).unwrap();
    assert_eq!(cluster.received(next), Some(Ok((1, b"x".to_vec()))));

    cluster.msgsnd(&p, id, 1, b"y", 0).unwrap();
    cluster.start_msgsnd(&survivor, id, 1, b"z");
    cluster.leave(survivor.node);
    cluster.msgrcv(&p, id, 1, 0, 0).unwrap();
    assert_eq!(cluster.msgrcv(&p, id, 1, 0, IPC_NOWAIT), Err(Errno::ENOMSG));
    // What was sent before stays.
    let status = cluster.msg_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.qnum, status.lspid), (0, 10));
}

#[test]
fn queues_are_limited_in_number() {
    let (mut cluster, [p, _], _) = queue();
    for _ in 1..MSGMNI {
        cluster.msgget(&p, IPC_PRIVATE, 0o600).unwrap();
    }
    assert_eq!(cluster.msgget(&p, IPC_PRIVATE, 0o600), Err(Errno::ENOSPC));
}
