//! Who belongs to the cluster, and where the pages of segments are.

mod support;

use migshm_coordinator::JoinError;
use migshm_protocol::call::{Attachment, Consistency, Errno, ShmCommand, StatBy};
use migshm_protocol::control::{FromCoordinator, Member, Placement, ToCoordinator};
use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::{Extent, NodeId, SegmentId};
use support::*;

const EXTENT: u64 = 2 * MIB;

fn shared(default_home: Option<NodeId>) -> Placement {
    Placement::Shared { default_home }
}

/// Creates a segment and attaches it once.
fn segment(cluster: &mut Cluster, process: &Process, size: u64) -> (i32, Attachment, Placement) {
    let id = cluster.shmget(process, IPC_PRIVATE, size, 0o600).unwrap();
    let (attachment, placement) = cluster.shmat(process, id, 0).unwrap();
    (id, attachment, placement)
}

/// Asks for the home of an extent.
fn home(cluster: &mut Cluster, asker: NodeId, segment: SegmentId, index: u32) -> Option<NodeId> {
    let extent = Extent { segment, index };
    cluster.send(asker, ToCoordinator::FindHome { extent });
    match cluster.told(asker).pop() {
        Some(FromCoordinator::HomeIs {
            extent: of, home, ..
        }) if of == extent => home,
        other => panic!("not an answer to FindHome: {other:?}"),
    }
}

mod membership {
    use super::*;

    #[test]
    fn everybody_hears_of_every_change() {
        let mut cluster = Cluster::new();
        let a = cluster.join("a", MIB);
        let b = cluster.join("b", MIB);
        let told_of = |cluster: &mut Cluster, node| {
            let names = |news| match news {
                FromCoordinator::Members { members, .. } => members,
                FromCoordinator::Joined { member } => vec![member],
                other => panic!("not of a member: {other:?}"),
            };
            let members = cluster.told(node).into_iter().map(names);
            let named = |members: Vec<Member>| members.into_iter().map(|m| (m.node, m.name));
            members.map(|m| named(m).collect()).collect::<Vec<Vec<_>>>()
        };
        let (first, second) = ((a, "a".to_owned()), (b, "b".to_owned()));
        assert_eq!(
            told_of(&mut cluster, a),
            [vec![first.clone()], vec![second.clone()]]
        );
        assert_eq!(told_of(&mut cluster, b), [vec![first, second]]);
        cluster.leave(a);
        assert_eq!(cluster.told(a), []);
        let view = 3;
        assert_eq!(cluster.told(b), [FromCoordinator::Left { node: a, view }]);
    }

    #[test]
    fn a_node_that_returns_gets_its_slot_back_in_a_new_epoch() {
        let mut cluster = Cluster::new();
        let join = |cluster: &mut Cluster, name: &str| {
            cluster.core.join(
                name.into(),
                "[::1]:1".parse().unwrap(),
                MIB,
                &mut cluster.mail,
            )
        };
        let (a, first) = join(&mut cluster, "a").unwrap();
        join(&mut cluster, "b").unwrap();
        assert_eq!(
            join(&mut cluster, "a"),
            Err(JoinError::NameTaken("a".into()))
        );
        cluster.leave(a);
        let (c, _) = join(&mut cluster, "c").unwrap();
        assert_ne!(c, a, "a newcomer gets a fresh slot");
        let (again, second) = join(&mut cluster, "a").unwrap();
        assert_eq!(again, a);
        assert!(second > first);
    }

    #[test]
    fn a_cluster_has_max_nodes_members_at_most() {
        let mut cluster = Cluster::new();
        let nodes: Vec<NodeId> = (0..MAX_NODES)
            .map(|n| cluster.join(&format!("n{n}"), MIB))
            .collect();
        let join = |cluster: &mut Cluster, name: &str| {
            cluster.core.join(
                name.into(),
                "[::1]:1".parse().unwrap(),
                MIB,
                &mut cluster.mail,
            )
        };
        assert_eq!(join(&mut cluster, "more"), Err(JoinError::Full));
        cluster.leave(nodes[9]);
        assert_eq!(join(&mut cluster, "more").unwrap().0, nodes[9]);
        assert_eq!(join(&mut cluster, ""), Err(JoinError::BadName));
        assert_eq!(
            join(&mut cluster, &"x".repeat(256)),
            Err(JoinError::BadName)
        );
    }

    #[test]
    fn a_member_does_not_join_again_on_the_same_stream() {
        let (mut cluster, [a]) = Cluster::with_nodes([MIB]);
        let version = migshm_protocol::VERSION;
        let address = "[::1]:1".parse().unwrap();
        cluster.send(
            a,
            ToCoordinator::Join {
                version,
                name: "x".into(),
                address,
                memory: MIB,
            },
        );
        assert_eq!(cluster.core.protocol_errors(), 1);
        assert_eq!(cluster.mail, []);
    }
}

#[test]
fn the_first_user_has_a_segment_to_itself_if_it_fits_three_quarters_of_its_memory() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB, 8 * MIB]);
    let p = root(a, 10);
    assert_eq!(segment(&mut cluster, &p, 4 * MIB).2, Placement::Solo);
    assert_eq!(
        segment(&mut cluster, &p, 2 * MIB + 1).2,
        shared(None),
        "only 2 MiB are left"
    );
    assert_eq!(segment(&mut cluster, &p, 2 * MIB).2, Placement::Solo);
    assert_eq!(segment(&mut cluster, &p, 1).2, shared(None));
    assert_eq!(
        segment(&mut cluster, &root(b, 20), 6 * MIB).2,
        Placement::Solo
    );
}

#[test]
fn a_segment_that_goes_gives_its_memory_back() {
    let (mut cluster, [a]) = Cluster::with_nodes([8 * MIB]);
    let p = root(a, 10);
    for _ in 0..3 {
        let (id, attachment, placement) = segment(&mut cluster, &p, 6 * MIB);
        assert_eq!(placement, Placement::Solo);
        cluster.shmdt(&p, attachment.segment, 1);
        cluster.shmctl(&p, id, ShmCommand::Remove).unwrap();
    }
}

#[test]
fn foreign_attaches_wait_until_the_sole_user_shares() {
    let (mut cluster, [a, b, c]) = Cluster::with_nodes([8 * MIB; 3]);
    let (p, q, r) = (root(a, 10), root(b, 20), root(c, 30));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, MIB);
    let waiting = [cluster.start_shmat(&q, id), cluster.start_shmat(&r, id)];
    assert_eq!(
        cluster.told(a),
        [FromCoordinator::Share { segment }],
        "asked once"
    );
    let own = cluster.start_shmat(&p, id);
    assert_eq!(
        cluster.attached(own).unwrap().unwrap().1,
        shared(Some(a)),
        "the user itself need not wait"
    );
    assert!(
        waiting
            .iter()
            .all(|&pending| cluster.attached(pending).is_none())
    );
    assert_eq!(
        cluster.shm_stat(&p, id, StatBy::Id).unwrap().nattch,
        2,
        "those that wait do not count"
    );

    cluster.send(b, ToCoordinator::Sharing { segment });
    assert_eq!(
        cluster.core.protocol_errors(),
        1,
        "it is not for others to say"
    );
    cluster.send(a, ToCoordinator::Sharing { segment });
    for pending in waiting {
        assert_eq!(
            cluster.attached(pending).unwrap().unwrap().1,
            shared(Some(a))
        );
    }
    assert_eq!(cluster.shm_stat(&p, id, StatBy::Id).unwrap().nattch, 4);
}

#[test]
fn a_sole_user_that_has_detached_is_asked_all_the_same() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, MIB);
    cluster.shmdt(&p, segment, 1);
    assert_eq!(
        cluster.shmat(&p, id, 0).unwrap().1,
        Placement::Solo,
        "still its own"
    );
    cluster.shmdt(&p, segment, 1);
    let pending = cluster.start_shmat(&q, id);
    assert_eq!(cluster.told(a), [FromCoordinator::Share { segment }]);
    cluster.send(a, ToCoordinator::Sharing { segment });
    assert_eq!(
        cluster.attached(pending).unwrap().unwrap().1,
        shared(Some(a))
    );
}

#[test]
fn if_the_sole_user_leaves_the_attaches_go_on() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let (id, ..) = segment(&mut cluster, &p, MIB);
    let pending = cluster.start_shmat(&q, id);
    cluster.leave(a);
    assert_eq!(cluster.attached(pending).unwrap().unwrap().1, shared(None));
    assert_eq!(cluster.shm_stat(&q, id, StatBy::Id).unwrap().nattch, 1);
}

#[test]
fn homes_of_a_dead_node_are_named_again_once_all_have_flushed() {
    let (mut cluster, [a, b, c]) = Cluster::with_nodes([8 * MIB; 3]);
    let (p, q, r) = (root(a, 10), root(b, 20), root(c, 30));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, 2 * EXTENT);
    let pending = [cluster.start_shmat(&q, id), cluster.start_shmat(&r, id)];
    cluster.send(a, ToCoordinator::Sharing { segment });
    for pending in pending {
        cluster.attached(pending).unwrap().unwrap();
    }
    // One home moves; the word of another move has yet to come.
    let [moved, moving] = [0, 1].map(|index| Extent { segment, index });
    cluster.send(b, ToCoordinator::HomeMoved { extent: moved });
    cluster.leave(a);
    let view = match cluster.told(c).pop() {
        Some(FromCoordinator::Left { node, view }) if node == a => view,
        other => panic!("not that it has left: {other:?}"),
    };
    cluster.told(b);
    for extent in [moved, moving] {
        cluster.send(c, ToCoordinator::FindHome { extent });
    }
    cluster.send(b, ToCoordinator::HomeMoved { extent: moving });
    cluster.send(c, ToCoordinator::Flushed { view });
    assert_eq!(cluster.told(c), [], "b has yet to flush");
    cluster.send(b, ToCoordinator::Flushed { view });
    let at_b = |extent| FromCoordinator::HomeIs {
        extent,
        home: Some(b),
        orphaned: false,
    };
    assert_eq!(cluster.told(c), [at_b(moved), at_b(moving)]);
    // What nobody has taken over goes to who asks, who is told what that means.
    cluster.leave(b);
    let view = match cluster.told(c).pop() {
        Some(FromCoordinator::Left { node, view: next }) if node == b && next > view => next,
        other => panic!("not that it has left: {other:?}"),
    };
    cluster.send(c, ToCoordinator::Flushed { view });
    let extent = moved;
    cluster.send(c, ToCoordinator::FindHome { extent });
    let is = |orphaned| FromCoordinator::HomeIs {
        extent,
        home: Some(c),
        orphaned,
    };
    assert_eq!(cluster.told(c), [is(true), is(false)]);
    cluster.send(c, ToCoordinator::FindHome { extent });
    assert_eq!(cluster.told(c), [is(false)]);
}

#[test]
fn a_waiting_attach_can_be_cancelled_and_dies_with_its_process_or_node() {
    let (mut cluster, [a, b, c]) = Cluster::with_nodes([8 * MIB; 3]);
    let (p, q, r) = (root(a, 10), root(b, 20), root(c, 30));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, MIB);
    let cancelled = cluster.start_shmat(&q, id);
    let dead = cluster.start_shmat(&q, id);
    let gone = cluster.start_shmat(&r, id);
    cluster.send(
        b,
        ToCoordinator::Cancel {
            id: cancelled.id,
            errno: Errno::EINTR,
        },
    );
    assert_eq!(cluster.attached(cancelled), Some(Err(Errno::EINTR)));
    cluster.exit(&q);
    cluster.leave(c);
    cluster.send(a, ToCoordinator::Sharing { segment });
    assert!(cluster.attached(dead).is_none());
    assert!(cluster.attached(gone).is_none());
    assert_eq!(cluster.shm_stat(&p, id, StatBy::Id).unwrap().nattch, 1);
}

#[test]
fn a_segment_destroyed_meanwhile_ends_waiting_attaches_with_eidrm() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, MIB);
    let pending = cluster.start_shmat(&q, id);
    cluster.shmdt(&p, segment, 1);
    cluster.shmctl(&p, id, ShmCommand::Remove).unwrap();
    assert_eq!(cluster.attached(pending), Some(Err(Errno::EIDRM)));
    cluster.send(a, ToCoordinator::Sharing { segment });
    assert_eq!(cluster.core.protocol_errors(), 1, "late, and harmless");
}

#[test]
fn an_extent_without_a_home_goes_to_who_asks_then_to_who_has_most_room_then_nowhere() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([4 * MIB, 8 * MIB]);
    let p = root(a, 10);
    let (_, Attachment { segment, .. }, placement) = segment(&mut cluster, &p, 12 * MIB);
    assert_eq!(placement, shared(None));
    let homes: Vec<_> = (0..6)
        .map(|index| home(&mut cluster, a, segment, index))
        .collect();
    assert_eq!(homes, [Some(a), Some(b), Some(b), Some(b), None, None]);
    assert_eq!(home(&mut cluster, a, segment, 0), Some(a), "known by now");
    assert_eq!(home(&mut cluster, a, segment, 6), None, "past the end");
    assert_eq!(home(&mut cluster, a, SegmentId(77), 0), None);
}

#[test]
fn the_former_sole_user_is_home_of_every_extent_without_another() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([8 * MIB; 2]);
    let (p, q) = (root(a, 10), root(b, 20));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, 4 * MIB);
    assert_eq!(
        home(&mut cluster, b, segment, 0),
        None,
        "it has nothing to do with the segment"
    );
    let pending = cluster.start_shmat(&q, id);
    cluster.send(a, ToCoordinator::Sharing { segment });
    cluster.attached(pending).unwrap().unwrap();
    assert_eq!(home(&mut cluster, b, segment, 1), Some(a));
}

#[test]
fn a_home_may_move_to_a_user_with_room_for_it() {
    let (mut cluster, [a, b, c]) = Cluster::with_nodes([4 * EXTENT, EXTENT, 4 * EXTENT]);
    let (p, q, r) = (root(a, 10), root(b, 20), root(c, 30));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, 3 * EXTENT);
    let extent = Extent { segment, index: 2 };
    let pending = cluster.start_shmat(&q, id);
    cluster.send(a, ToCoordinator::Sharing { segment });
    cluster.attached(pending).unwrap().unwrap();
    cluster.told(a);
    let mut allowed = |from, to| {
        cluster.send(from, ToCoordinator::ProposeHome { extent, to });
        cluster.told(from).pop()
    };
    assert_eq!(allowed(a, c), None, "c has nothing to do with the segment");
    assert_eq!(allowed(a, b), None, "b has no room");
    let pending = cluster.start_shmat(&r, id);
    cluster.attached(pending).unwrap().unwrap();
    let mut allowed = |from, to| {
        cluster.send(from, ToCoordinator::ProposeHome { extent, to });
        cluster.told(from).pop()
    };
    assert_eq!(allowed(b, c), None, "b is not the home");
    assert_eq!(
        allowed(a, c),
        Some(FromCoordinator::MoveHome { extent, to: c })
    );
}

#[test]
fn a_home_that_moves_takes_its_reservation_along() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([4 * EXTENT, 4 * EXTENT]);
    let (p, q) = (root(a, 10), root(b, 20));
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, 3 * EXTENT);
    let moved = Extent { segment, index: 2 };
    cluster.send(b, ToCoordinator::HomeMoved { extent: moved });
    assert_eq!(
        cluster.core.protocol_errors(),
        1,
        "it has nothing to do with the segment"
    );
    let pending = cluster.start_shmat(&q, id);
    cluster.send(a, ToCoordinator::Sharing { segment });
    cluster.attached(pending).unwrap().unwrap();

    cluster.send(b, ToCoordinator::HomeMoved { extent: moved });
    assert_eq!(home(&mut cluster, a, segment, 2), Some(b));
    assert_eq!(home(&mut cluster, a, segment, 1), Some(a));
    assert_eq!(
        self::segment(&mut cluster, &p, EXTENT).2,
        Placement::Solo,
        "a has room for one extent again"
    );
    assert_eq!(
        self::segment(&mut cluster, &q, 2 * EXTENT + 1).2,
        shared(None),
        "b has room for two"
    );
}

#[test]
fn homes_that_leave_are_forgotten() {
    let (mut cluster, [a, b]) = Cluster::with_nodes([4 * MIB, 8 * MIB]);
    let p = root(a, 10);
    let (_, Attachment { segment, .. }, _) = segment(&mut cluster, &p, 4 * MIB);
    assert_eq!(
        [0, 1].map(|index| home(&mut cluster, a, segment, index)),
        [Some(a), Some(b)]
    );
    cluster.leave(b);
    let Some(FromCoordinator::Left { view, .. }) = cluster.told(a).pop() else {
        panic!("it is told");
    };
    cluster.send(a, ToCoordinator::Flushed { view });
    assert_eq!(
        [0, 1].map(|index| home(&mut cluster, a, segment, index)),
        [Some(a), None]
    );
}

#[test]
fn users_homes_and_those_that_asked_hear_of_a_segments_end() {
    let (mut cluster, [a, b, c, d]) = Cluster::with_nodes([2 * MIB, 8 * MIB, 2 * MIB, 2 * MIB]);
    let p = root(a, 10);
    let (id, Attachment { segment, .. }, _) = segment(&mut cluster, &p, 6 * MIB);
    assert_eq!(home(&mut cluster, a, segment, 0), Some(b));
    cluster.send(c, ToCoordinator::FindSegment { segment });
    let is = FromCoordinator::SegmentIs {
        segment,
        size: Some(6 * MIB),
        consistency: Consistency::default(),
        default_home: None,
    };
    assert_eq!(cluster.told(c), [is]);
    cluster.shmctl(&p, id, ShmCommand::Remove).unwrap();
    cluster.shmdt(&p, segment, 1);
    for node in [a, b, c] {
        assert_eq!(cluster.told(node), [FromCoordinator::Destroyed { segment }]);
    }
    assert_eq!(cluster.told(d), []);
    cluster.send(c, ToCoordinator::FindSegment { segment });
    let is_not = FromCoordinator::SegmentIs {
        segment,
        size: None,
        consistency: Consistency::default(),
        default_home: None,
    };
    assert_eq!(cluster.told(c), [is_not]);
}
