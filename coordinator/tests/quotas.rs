//! What one user may have: enough for him, and not what the others need.

mod support;

use migshm_coordinator::{Quotas, Settings};
use migshm_protocol::NodeId;
use migshm_protocol::call::{Errno, NewPerm, SemCommand, ShmCommand};
use migshm_protocol::limits::{MSGMNI, SEMMSL, SHMMNI};
use support::{Cluster, IPC_PRIVATE, MIB, Process, root, user};

const ALICE: u32 = 1000;
const BOB: u32 = 1001;
const CAP_SYS_RESOURCE: u64 = 1 << 24;

fn cluster(quotas: Quotas) -> (Cluster, [NodeId; 1]) {
    let (mut cluster, nodes) = Cluster::with_nodes([64 * MIB]);
    let settings = Settings {
        quotas,
        ..Settings::default()
    };
    cluster.core = std::mem::take(&mut cluster.core).with_settings(settings);
    (cluster, nodes)
}

/// How many objects a process gets before there are no more for it.
fn until_full(mut make: impl FnMut() -> Result<i32, Errno>) -> Vec<i32> {
    let mut ids = Vec::new();
    loop {
        match make() {
            Ok(id) => ids.push(id),
            Err(errno) => {
                assert_eq!(errno, Errno::ENOSPC);
                return ids;
            }
        }
    }
}

#[test]
fn a_user_who_takes_all_he_gets_leaves_as_much_to_others() {
    let (mut cluster, [node]) = cluster(Quotas::default());
    let (alice, bob) = (user(node, 1, ALICE), user(node, 2, BOB));
    for process in [&alice, &bob] {
        let segments = until_full(|| cluster.shmget(process, IPC_PRIVATE, 1, 0o600));
        assert_eq!(segments.len() as u64, SHMMNI / 2);
        let queues = until_full(|| cluster.msgget(process, IPC_PRIVATE, 0o600));
        assert_eq!(queues.len() as i32, MSGMNI / 8);
        let large = until_full(|| cluster.semget(process, IPC_PRIVATE, SEMMSL, 0o600));
        assert_eq!(large.len(), (1 << 20) / SEMMSL as usize);
    }
}

#[test]
fn memory_is_divided_too_whatever_its_flags() {
    const SHM_NORESERVE: i32 = 0o10000;
    let (mut cluster, [node]) = cluster(Quotas::default());
    let (alice, bob) = (user(node, 1, ALICE), user(node, 2, BOB));
    for process in [&alice, &bob] {
        cluster
            .shmget(process, IPC_PRIVATE, 31 * MIB, 0o600)
            .unwrap();
        for flags in [0, SHM_NORESERVE] {
            let more = cluster.shmget(process, IPC_PRIVATE, MIB + 1, 0o600 | flags);
            assert_eq!(more, Err(Errno::ENOSPC));
        }
        // A byte takes a page.
        let small = until_full(|| cluster.shmget(process, IPC_PRIVATE, 1, 0o600));
        assert_eq!(small.len() as u64, MIB / 4096);
    }
    // What a node that joins brings is for all.
    cluster.join("another", 64 * MIB);
    for process in [&alice, &bob] {
        cluster
            .shmget(process, IPC_PRIVATE, 32 * MIB, 0o600)
            .unwrap();
    }
}

#[test]
fn who_may_exceed_limits_has_no_quota() {
    let none = Quotas {
        segments: 0,
        bytes: Some(0),
        sets: 0,
        semaphores: 0,
        queues: 0,
    };
    let (mut cluster, [node]) = cluster(none);
    let mut capable = user(node, 2, ALICE);
    capable.caller.capabilities = CAP_SYS_RESOURCE;
    // As they are before the node has looked for capabilities.
    let mut plain_root = root(node, 1);
    plain_root.caller.capabilities = 0;
    for process in [&plain_root, &capable] {
        cluster.shmget(process, IPC_PRIVATE, MIB, 0o600).unwrap();
        cluster.semget(process, IPC_PRIVATE, 1, 0o600).unwrap();
        cluster.msgget(process, IPC_PRIVATE, 0o600).unwrap();
    }
    let alice = user(node, 3, ALICE);
    assert_eq!(
        cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600),
        Err(Errno::ENOSPC)
    );
    assert_eq!(
        cluster.semget(&alice, IPC_PRIVATE, 1, 0o600),
        Err(Errno::ENOSPC)
    );
    assert_eq!(
        cluster.msgget(&alice, IPC_PRIVATE, 0o600),
        Err(Errno::ENOSPC)
    );
    // What exists is found as ever.
    let id = cluster.shmget(&plain_root, 7, 1, 0o1666).unwrap();
    assert_eq!(cluster.shmget(&alice, 7, 1, 0o1666), Ok(id));
}

/// Two segments of a page, two sets of four semaphores together.
fn small() -> Quotas {
    Quotas {
        segments: 2,
        bytes: Some(2 * 4096),
        sets: 2,
        semaphores: 4,
        queues: 1,
    }
}

fn owned_by(uid: u32) -> NewPerm {
    NewPerm {
        uid,
        gid: uid,
        mode: 0o666,
    }
}

#[test]
fn who_creates_pays_whoever_becomes_the_owner() {
    let (mut cluster, [node]) = cluster(small());
    let (alice, bob) = (user(node, 1, ALICE), user(node, 2, BOB));
    let full = |cluster: &mut Cluster, process: &Process| {
        cluster.shmget(process, IPC_PRIVATE, 1, 0o600) == Err(Errno::ENOSPC)
    };
    let ids = until_full(|| cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600));
    assert_eq!(ids.len(), 2);
    for &id in &ids {
        let given = ShmCommand::Set(owned_by(BOB));
        cluster.shmctl(&alice, id, given).unwrap();
    }
    assert!(full(&mut cluster, &alice));
    // He has not been made to pay.
    let own = until_full(|| cluster.shmget(&bob, IPC_PRIVATE, 1, 0o600));
    assert_eq!(own.len(), 2);
    // She can end it by herself, and so can he.
    cluster.shmctl(&alice, ids[0], ShmCommand::Remove).unwrap();
    cluster.shmctl(&bob, ids[1], ShmCommand::Remove).unwrap();
    let again = until_full(|| cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600));
    assert_eq!(again.len(), 2);
    assert!(full(&mut cluster, &bob));
}

#[test]
fn what_is_removed_is_free_again_once_it_is_gone() {
    let (mut cluster, [node]) = cluster(small());
    let alice = user(node, 1, ALICE);
    for _ in 0..3 {
        let set = cluster.semget(&alice, IPC_PRIVATE, 3, 0o600).unwrap();
        assert_eq!(
            cluster.semget(&alice, IPC_PRIVATE, 2, 0o600),
            Err(Errno::ENOSPC)
        );
        let rest = cluster.semget(&alice, IPC_PRIVATE, 1, 0o600).unwrap();
        for set in [set, rest] {
            cluster.semctl(&alice, set, SemCommand::Remove).unwrap();
        }
    }
    // A segment goes with its last attach, and so when its node leaves.
    let id = cluster.shmget(&alice, IPC_PRIVATE, 4096, 0o600).unwrap();
    let other = cluster.shmget(&alice, IPC_PRIVATE, 4096, 0o600).unwrap();
    let (first, _) = cluster.shmat(&alice, id, 0).unwrap();
    cluster.shmat(&alice, other, 0).unwrap();
    for id in [id, other] {
        cluster.shmctl(&alice, id, ShmCommand::Remove).unwrap();
    }
    assert_eq!(
        cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600),
        Err(Errno::ENOSPC)
    );
    cluster.shmdt(&alice, first.segment, 1);
    cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600).unwrap();
    cluster.leave(node);
    let node = cluster.join("another", 64 * MIB);
    let alice = user(node, 2, ALICE);
    cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600).unwrap();
    assert_eq!(
        cluster.shmget(&alice, IPC_PRIVATE, 1, 0o600),
        Err(Errno::ENOSPC)
    );
}
