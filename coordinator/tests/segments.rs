//! What segments do, rule by rule; see `kernel.rs` for the comparison with the kernel.

mod support;

use migshm_protocol::SegmentId;
use migshm_protocol::call::{Call, Errno, Memlock, NewPerm, ShmCommand, StatBy};
use migshm_protocol::control::{FromCoordinator, Placement, ToCoordinator};
use migshm_protocol::limits::SHMMNI;
use support::*;

const SHM_RDONLY: i32 = 0o10_000;
const SHM_NORESERVE: i32 = 0o10_000;
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

/// Two nodes and a process of root's on either.
fn two_processes() -> (Cluster, [Process; 2]) {
    let (cluster, [a, b]) = Cluster::with_nodes([64 * MIB; 2]);
    (cluster, [root(a, 10), root(b, 20)])
}

#[test]
fn one_key_names_one_segment_on_all_nodes() {
    let (mut cluster, [p, q]) = two_processes();
    let id = cluster.shmget(&p, 5, 100, IPC_CREAT | 0o600).unwrap();
    assert_eq!(cluster.shmget(&q, 5, 100, 0), Ok(id));
    assert_eq!(
        cluster.shmget(&q, 5, 101, 0),
        Err(Errno::EINVAL),
        "larger than it is"
    );
    assert_eq!(
        cluster.shmget(&q, 5, 0, IPC_CREAT | IPC_EXCL),
        Err(Errno::EEXIST)
    );
    assert_eq!(cluster.shmget(&q, 6, 0, 0), Err(Errno::ENOENT));
    assert_eq!(cluster.shmget(&q, 6, 0, IPC_CREAT), Err(Errno::EINVAL));
}

#[test]
fn a_segment_must_fit_the_cluster_unless_it_reserves_nothing() {
    let (mut cluster, [p, _]) = two_processes();
    assert_eq!(
        cluster.shmget(&p, 0, 128 * MIB + 1, 0o600),
        Err(Errno::ENOMEM)
    );
    cluster.shmget(&p, 0, 128 * MIB, 0o600).unwrap();
    cluster
        .shmget(&p, 0, 1 << 40, SHM_NORESERVE | 0o600)
        .unwrap();
    assert_eq!(
        cluster.shmget(&p, 0, 1 << 50, SHM_NORESERVE | 0o600),
        Err(Errno::ENOMEM),
        "no page numbers"
    );
    assert_eq!(
        cluster.shmget(&p, 0, u64::MAX, SHM_NORESERVE | 0o600),
        Err(Errno::EINVAL)
    );
}

#[test]
fn there_are_shmmni_segments_at_most() {
    let (mut cluster, [p, _]) = two_processes();
    let ids: Vec<i32> = (0..SHMMNI)
        .map(|_| cluster.shmget(&p, 0, 1, 0o600).unwrap())
        .collect();
    assert_eq!(cluster.shmget(&p, 0, 1, 0o600), Err(Errno::ENOSPC));
    cluster.shmctl(&p, ids[7], ShmCommand::Remove).unwrap();
    cluster.shmget(&p, 0, 1, 0o600).unwrap();
}

#[test]
fn attaches_of_all_nodes_are_counted() {
    let (mut cluster, [p, q]) = two_processes();
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    let (attachment, _) = cluster.shmat(&p, id, 0).unwrap();
    let remote = cluster.start_shmat(&q, id);
    cluster.send(
        p.node,
        ToCoordinator::Sharing {
            segment: attachment.segment,
        },
    );
    cluster.attached(remote).unwrap().unwrap();
    cluster.send(
        q.node,
        ToCoordinator::Inherited {
            segment: attachment.segment,
            count: 2,
            pid: 21,
        },
    );
    let status = cluster.shm_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.nattch, status.lpid, status.cpid), (4, 21, 10));

    cluster.now = 1005;
    cluster.shmdt(&q, attachment.segment, 3);
    let status = cluster.shm_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!(
        (status.nattch, status.lpid, status.atime, status.dtime),
        (1, 20, 1000, 1005)
    );
}

#[test]
fn a_node_ends_only_attaches_that_it_has() {
    let (mut cluster, [p, q]) = two_processes();
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    let (attachment, _) = cluster.shmat(&p, id, 0).unwrap();
    let segment = attachment.segment;
    for (process, count) in [(&q, 1), (&p, 2), (&p, 0)] {
        cluster.shmdt(process, segment, count);
    }
    cluster.shmdt(&p, SegmentId(u64::MAX), 1);
    cluster.send(
        q.node,
        ToCoordinator::Inherited {
            segment,
            count: 1,
            pid: 20,
        },
    );
    cluster.send(q.node, ToCoordinator::Sharing { segment });
    assert_eq!(cluster.core.protocol_errors(), 6);
    assert_eq!(cluster.shm_stat(&p, id, StatBy::Id).unwrap().nattch, 1);
}

#[test]
fn a_removed_segment_lives_until_its_last_attach_has_ended() {
    let (mut cluster, [p, _]) = two_processes();
    let id = cluster.shmget(&p, 5, 100, IPC_CREAT | 0o600).unwrap();
    let (attachment, _) = cluster.shmat(&p, id, 0).unwrap();
    cluster.shmctl(&p, id, ShmCommand::Remove).unwrap();
    let status = cluster.shm_stat(&p, id, StatBy::Id).unwrap();
    assert_eq!((status.perm.key, status.perm.mode), (0, 0o600 | SHM_DEST));
    assert_eq!(
        cluster.shmget(&p, 5, 100, 0),
        Err(Errno::ENOENT),
        "the key is free"
    );
    cluster.shmat(&p, id, 0).unwrap();
    cluster.shmdt(&p, attachment.segment, 1);
    assert_eq!(cluster.told(p.node), []);
    cluster.shmdt(&p, attachment.segment, 1);
    assert_eq!(
        cluster.told(p.node),
        [FromCoordinator::Destroyed {
            segment: attachment.segment
        }]
    );
    assert_eq!(cluster.shmat(&p, id, 0), Err(Errno::EINVAL));
}

#[test]
fn a_segment_without_attaches_goes_at_once() {
    let (mut cluster, [p, _]) = two_processes();
    let id = cluster.shmget(&p, 5, 100, IPC_CREAT | 0o600).unwrap();
    cluster.shmctl(&p, id, ShmCommand::Remove).unwrap();
    assert_eq!(cluster.shm_stat(&p, id, StatBy::Id), Err(Errno::EINVAL));
    assert_eq!(cluster.told(p.node), [], "it never knew the segment");
}

#[test]
fn a_node_that_leaves_takes_its_attaches_along() {
    let (mut cluster, [p, q]) = two_processes();
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    let (attachment, _) = cluster.shmat(&p, id, 0).unwrap();
    cluster.shmctl(&q, id, ShmCommand::Remove).unwrap();
    cluster.leave(p.node);
    assert_eq!(cluster.shm_stat(&q, id, StatBy::Id), Err(Errno::EINVAL));
    let destroyed = FromCoordinator::Destroyed {
        segment: attachment.segment,
    };
    assert!(
        !cluster.told(q.node).contains(&destroyed),
        "it never knew the segment"
    );
}

#[test]
fn an_attach_needs_the_permissions_of_its_kind() {
    let (mut cluster, [p, _]) = two_processes();
    let other = user(p.node, 30, 1000);
    let id = cluster.shmget(&p, 0, 100, 0o604).unwrap();
    assert_eq!(cluster.shmat(&other, id, 0), Err(Errno::EACCES));
    let (attachment, _) = cluster.shmat(&other, id, SHM_RDONLY).unwrap();
    assert!(!attachment.may_write);
    let (attachment, _) = cluster.shmat(&p, id, SHM_RDONLY).unwrap();
    assert!(attachment.may_write, "root may, even if it does not ask to");
}

#[test]
fn the_first_class_that_a_caller_belongs_to_decides() {
    let (mut cluster, [p, _]) = two_processes();
    let owner = user(p.node, 30, 1000);
    let id = cluster.shmget(&owner, 0, 100, 0o046).unwrap();
    let member = |uid: u32, gid: u32, groups: &[u32]| {
        let mut process = user(p.node, 31, uid);
        (process.caller.gid, process.caller.groups) = (gid, groups.to_vec());
        process
    };
    cluster
        .shmctl(
            &owner,
            id,
            ShmCommand::Set(NewPerm {
                uid: 1001,
                gid: 1001,
                mode: 0o046,
            }),
        )
        .unwrap();
    for (process, read, write) in [
        (member(1000, 1, &[]), false, false), // creator
        (member(1001, 1, &[]), false, false), // owner
        (member(5, 1000, &[]), true, false),  // the creator's group
        (member(5, 1001, &[]), true, false),  // the owner's group
        (member(5, 1, &[2, 1001]), true, false),
        (member(5, 1, &[2]), true, true), // the others
    ] {
        assert_eq!(
            cluster.shmat(&process, id, SHM_RDONLY).is_ok(),
            read,
            "{process:?}"
        );
        assert_eq!(cluster.shmat(&process, id, 0).is_ok(), write, "{process:?}");
    }
}

#[test]
fn capabilities_stand_in_for_permissions() {
    let (mut cluster, [p, _]) = two_processes();
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    let with = |capability: u32| {
        let mut process = user(p.node, 30, 1000);
        process.caller.capabilities = 1 << capability;
        process
    };
    let (lock, owner, admin) = (with(14), with(15), with(21));
    let set = ShmCommand::Set(NewPerm {
        uid: 0,
        gid: 0,
        mode: 0o600,
    });
    for (process, stat, control, locking) in [
        (lock, false, false, true),
        (owner, true, false, false),
        (admin, false, true, false),
    ] {
        assert_eq!(cluster.shm_stat(&process, id, StatBy::Id).is_ok(), stat);
        assert_eq!(cluster.shmctl(&process, id, set).is_ok(), control);
        assert_eq!(
            cluster.shmctl(&process, id, ShmCommand::Lock(true)).is_ok(),
            locking
        );
    }
    assert_eq!(
        cluster.shm_stat(&p, id, StatBy::Id).unwrap().perm.mode,
        0o600 | SHM_LOCKED
    );
}

#[test]
fn locked_segments_count_to_their_user_until_they_are_unlocked_or_gone() {
    let (mut cluster, [p, _]) = two_processes();
    let with = |real: u32, limit: u64| {
        let mut process = user(p.node, 30, 1000);
        process.caller.memlock = Some(Memlock { uid: real, limit });
        process
    };
    let creator = with(1000, 8192);
    let [first, second] = [8192, 1].map(|size| cluster.shmget(&creator, 0, size, 0o600).unwrap());
    let mut lock = |process: &Process, id| cluster.shmctl(process, id, ShmCommand::Lock(true));
    assert_eq!(lock(&with(1000, 0), first), Err(Errno::EPERM));
    assert_eq!(lock(&with(1000, 8191), first), Err(Errno::ENOMEM));
    assert!(lock(&creator, first).is_ok());
    assert!(lock(&creator, first).is_ok(), "it is locked already");
    assert_eq!(lock(&creator, second), Err(Errno::ENOMEM));
    assert!(lock(&with(1001, 4096), second).is_ok(), "another's share");
    let third = cluster.shmget(&creator, 0, 8192, 0o600).unwrap();
    for end in [ShmCommand::Lock(false), ShmCommand::Remove] {
        let locked = cluster.shmctl(&creator, third, ShmCommand::Lock(true));
        assert_eq!(locked, Err(Errno::ENOMEM));
        assert!(cluster.shmctl(&creator, first, end).is_ok());
        assert!(
            cluster
                .shmctl(&creator, third, ShmCommand::Lock(true))
                .is_ok()
        );
        assert!(
            cluster
                .shmctl(&creator, third, ShmCommand::Lock(false))
                .is_ok()
        );
        // For the other end.
        let _ = cluster.shmctl(&creator, first, ShmCommand::Lock(true));
    }
}

#[test]
fn a_stale_id_does_not_name_the_segment_that_took_its_place() {
    let (mut cluster, [p, _]) = two_processes();
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    cluster.shmctl(&p, id, ShmCommand::Remove).unwrap();
    for _ in 0..63 {
        let passing = cluster.shmget(&p, 0, 100, 0o600).unwrap();
        cluster.shmctl(&p, passing, ShmCommand::Remove).unwrap();
    }
    let heir = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    assert_eq!(
        heir,
        id + 32_768,
        "the same index, the next sequence number"
    );
    assert_eq!(cluster.shm_stat(&p, id, StatBy::Id), Err(Errno::EINVAL));
    assert_eq!(
        cluster.shm_stat(&p, id, StatBy::Index).unwrap().id,
        id + 32_768,
        "an index is no id"
    );
}

#[test]
fn a_detach_is_answered_if_it_asks_for_it() {
    let (mut cluster, [p, _]) = two_processes();
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    let (attachment, _) = cluster.shmat(&p, id, 0).unwrap();
    let segment = attachment.segment;
    for expected in [true, false] {
        cluster.send(
            p.node,
            ToCoordinator::Detached {
                id: 99,
                segment,
                count: 1,
                pid: 10,
            },
        );
        let outcome = cluster
            .outcome(Pending {
                node: p.node,
                id: 99,
            })
            .unwrap();
        assert_eq!(outcome.is_ok(), expected);
    }
}

#[test]
fn answers_to_attaches_alone_say_where_pages_are() {
    let (mut cluster, [p, _]) = two_processes();
    let get = cluster.start(
        &p,
        Call::ShmGet {
            key: 0,
            size: 1,
            flags: 0o600,
            consistency: None,
        },
        &[],
    );
    let (outcome, placement, _) = cluster.take_answer(get).unwrap();
    assert!(outcome.is_ok() && placement.is_none());
    let at = cluster.start(&p, Call::ShmAttach { id: 0, flags: 0 }, &[]);
    assert_eq!(cluster.take_answer(at).unwrap().1, Some(Placement::Solo));
}

#[test]
fn nothing_shows_of_an_attach_that_could_not_be_mapped() {
    let (mut cluster, [p, _]) = two_processes();
    let q = root(p.node, 11);
    let id = cluster.shmget(&p, 0, 100, 0o600).unwrap();
    let (attachment, _) = cluster.shmat(&p, id, 0).unwrap();
    let segment = attachment.segment;
    let before = cluster.shm_stat(&p, id, StatBy::Id);
    cluster.now += 1;
    cluster.shmat(&q, id, 0).unwrap();
    cluster.send(q.node, ToCoordinator::Unattached { segment });
    assert_eq!(cluster.shm_stat(&p, id, StatBy::Id), before);
}
