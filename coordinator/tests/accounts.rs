//! Questions to nodes about the accesses to a segment.

mod support;

use migshm_protocol::NodeId;
use migshm_protocol::call::{Answer, Call, Errno, ShmCommand};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use support::*;

fn question(id: i32, node: NodeId) -> Call {
    Call::Accesses {
        id,
        node,
        from: 7,
        requests: true,
    }
}

/// The number of the question that a node was asked last.
fn asked(cluster: &mut Cluster, node: NodeId) -> Option<u64> {
    match cluster.told(node).pop()? {
        FromCoordinator::Account {
            number,
            from: 7,
            requests: true,
            ..
        } => Some(number),
        other => panic!("not a question: {other:?}"),
    }
}

fn answer(cluster: &mut Cluster, node: NodeId, number: u64, raw: &[u8]) {
    let message = ToCoordinator::Account { number };
    cluster
        .core
        .handle(cluster.now, node, message, raw, &mut cluster.mail);
}

#[test]
fn a_reader_gets_the_answer_of_the_node_that_was_asked() {
    let (mut cluster, [a, b, c]) = Cluster::with_nodes([8 * MIB; 3]);
    let p = root(a, 10);
    let id = cluster.shmget(&p, IPC_PRIVATE, MIB, 0o600).unwrap();
    let call = cluster.start(&p, question(id, b), &[]);
    let number = asked(&mut cluster, b).expect("b is asked");
    // Not by another, nor for another question.
    answer(&mut cluster, c, number, b"wrong");
    answer(&mut cluster, b, number + 1, b"wrong");
    assert_eq!(cluster.outcome(call), None);
    answer(&mut cluster, b, number, b"part");
    let (outcome, _, raw) = cluster.take_answer(call).unwrap();
    assert_eq!((outcome, &raw[..]), (Ok(Answer::Accesses(4)), &b"part"[..]));
    // Once.
    answer(&mut cluster, b, number, b"again");
    assert_eq!(cluster.outcome(call), None);
    assert_eq!(cluster.core.protocol_errors(), 0);
}

#[test]
fn who_may_not_read_a_segment_may_not_ask() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB; 2]);
    let owner = user(a, 10, 1000);
    let other = user(b, 11, 1001);
    let id = cluster.shmget(&owner, IPC_PRIVATE, MIB, 0o620).unwrap();
    assert_eq!(
        cluster.call(&other, question(id, a), &[]),
        Err(Errno::EACCES)
    );
    assert_eq!(asked(&mut cluster, a), None);
    assert_eq!(
        cluster.call(&owner, question(id + 1, a), &[]),
        Err(Errno::EINVAL)
    );
    let nobody = NodeId(9);
    assert_eq!(
        cluster.call(&owner, question(id, nobody), &[]),
        Err(Errno::ENOENT)
    );
    let call = cluster.start(&owner, question(id, b), &[]);
    assert!(asked(&mut cluster, b).is_some());
    assert_eq!(cluster.outcome(call), None);
    cluster.shmctl(&owner, id, ShmCommand::Remove).unwrap();
}

#[test]
fn a_question_ends_with_its_node_and_with_its_asker() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB; 2]);
    let p = root(a, 10);
    let id = cluster.shmget(&p, IPC_PRIVATE, MIB, 0o600).unwrap();
    let call = cluster.start(&p, question(id, b), &[]);
    cluster.leave(b);
    assert_eq!(cluster.outcome(call), Some(Err(Errno::EIO)));

    let call = cluster.start(&p, question(id, a), &[]);
    let number = asked(&mut cluster, a).expect("a is asked");
    let errno = Errno::EINTR;
    cluster.send(a, ToCoordinator::Cancel { id: call.id, errno });
    assert_eq!(cluster.outcome(call), Some(Err(Errno::EINTR)));
    answer(&mut cluster, a, number, b"late");
    assert_eq!(cluster.outcome(call), None);
    // Too long for a process to take.
    let call = cluster.start(&p, question(id, a), &[]);
    let number = asked(&mut cluster, a).expect("a is asked");
    answer(&mut cluster, a, number, &vec![0; 200_000]);
    assert_eq!(cluster.outcome(call), Some(Err(Errno::EIO)));
}
