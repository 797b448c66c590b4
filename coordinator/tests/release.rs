//! Segments with release consistency: who is told of writes, and when.

mod support;

use migshm_coordinator::Settings;
use migshm_protocol::call::{Answer, Call, Consistency, SemCommand, StatBy};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::release::{MAX_RUNS, Runs};
use migshm_protocol::{Extent, NodeId, SegmentId};
use support::*;

/// Three nodes, a process on each, all attached to a segment of 600 pages; the first is its home.
struct World {
    cluster: Cluster,
    processes: [Process; 3],
    segment: SegmentId,
    set: i32,
}

fn world(consistency: Consistency) -> World {
    let (mut cluster, nodes) = Cluster::with_nodes([8 * MIB; 3]);
    let processes = [10, 20, 30].map(|pid| root(nodes[pid as usize / 10 - 1], pid));
    let get = Call::ShmGet {
        key: 7,
        size: 600 * 4096,
        flags: IPC_CREAT | 0o666,
        consistency: Some(consistency),
    };
    let id = cluster.value(&processes[0], get).expect("a segment");
    let set = cluster
        .semget(&processes[0], 7, 1, 0o666 | IPC_CREAT)
        .expect("a set");
    let mut segment = None;
    for process in &processes {
        let attach = cluster.start(process, Call::ShmAttach { id, flags: 0 }, &[]);
        cluster.share_as_asked(&nodes);
        let (outcome, ..) = cluster.take_answer(attach).expect("it is attached");
        let Ok(Answer::Attached(attachment)) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(attachment.consistency, consistency);
        segment = Some(attachment.segment);
    }
    World {
        cluster,
        processes,
        segment: segment.expect("three attaches"),
        set,
    }
}

impl World {
    fn wrote(&mut self, by: usize, pages: Runs) {
        let segment = self.segment;
        self.cluster.send(
            self.processes[by].node,
            ToCoordinator::Wrote { segment, pages },
        );
    }

    fn change(&mut self, by: usize, delta: i16) -> Pending {
        let call = semop(self.set);
        self.cluster
            .start(&self.processes[by], call, &raw(&[(0, delta, 0)]))
    }

    /// All that a node was sent: what has changed, and `None` for an answer.
    fn heard(&mut self, by: usize) -> Vec<Option<Runs>> {
        let node = self.processes[by].node;
        let mail = self.cluster.mail.extract_if(.., |output| output.to == node);
        mail.filter_map(|output| match output.message {
            FromCoordinator::Changed { pages, .. } => Some(Some(pages)),
            FromCoordinator::Answer { .. } => Some(None),
            _ => None,
        })
        .collect()
    }
}

#[test]
fn who_is_woken_is_told_first_what_was_written() {
    let mut world = world(Consistency::Release);
    world.change(2, -1);
    world.wrote(1, vec![(3, 2), (520, 1)]);
    assert!(world.heard(2).is_empty());
    world.change(1, 1);
    assert_eq!(world.heard(1), [None], "its own writes it knows");
    assert_eq!(world.heard(2), [Some(vec![(3, 2), (520, 1)]), None]);
    // Once.
    world.change(2, 1);
    assert_eq!(world.heard(2), [None]);
}

#[test]
fn the_home_of_an_extent_is_told_too_as_pages_may_be_at_home_elsewhere() {
    let mut world = world(Consistency::Release);
    world.wrote(1, vec![(0, 600)]);
    world.change(0, 1);
    assert_eq!(world.heard(0), [Some(vec![(0, 600)]), None]);
}

#[test]
fn writes_of_several_releases_are_told_together() {
    let mut world = world(Consistency::Release);
    for page in 0..5 {
        world.wrote(0, vec![(page, 1)]);
        world.wrote(1, vec![(100 + 2 * page, 1)]);
    }
    world.change(2, 1);
    let of_others = [(100, 1), (102, 1), (104, 1), (106, 1), (108, 1)];
    let all = [&[(0, 5)][..], &of_others].concat();
    assert_eq!(world.heard(2), [Some(all), None]);
    world.change(1, 1);
    assert_eq!(world.heard(1), [Some(vec![(0, 5)]), None]);
}

#[test]
fn every_answer_is_preceded_also_one_that_reads_only() {
    let mut world = world(Consistency::Release);
    world.wrote(0, vec![(1, 1)]);
    let process = world.processes[2].clone();
    let id = world.set;
    let command = SemCommand::GetVal(0);
    world
        .cluster
        .start(&process, Call::SemCtl { id, command }, &[]);
    assert_eq!(world.heard(2), [Some(vec![(1, 1)]), None]);
}

#[test]
fn what_cannot_have_been_written_is_told_to_nobody() {
    let mut release = world(Consistency::Release);
    release.wrote(0, vec![(600, 1)]);
    release.wrote(0, vec![(1, u32::MAX)]);
    release.wrote(0, vec![(1, 1); MAX_RUNS + 1]);
    let stranger = release.cluster.join("stranger", MIB);
    let segment = release.segment;
    let pages = vec![(1, 1)];
    release
        .cluster
        .send(stranger, ToCoordinator::Wrote { segment, pages });
    assert_eq!(release.cluster.core.protocol_errors(), 4);
    let mut sequential = world(Consistency::Sequential);
    sequential.wrote(0, vec![(1, 1)]);
    assert_eq!(sequential.cluster.core.protocol_errors(), 1);
    for world in [&mut release, &mut sequential] {
        world.change(2, 1);
        assert_eq!(world.heard(2), [None]);
    }
}

#[test]
fn nobody_is_told_of_a_segment_that_is_gone_or_after_leaving() {
    let mut world = world(Consistency::Release);
    world.wrote(0, vec![(1, 1)]);
    let node = world.processes[1].node;
    world.cluster.leave(node);
    assert_eq!(world.cluster.join("node2", MIB), node);
    let process = world.processes[1].clone();
    let command = SemCommand::Stat(StatBy::Id);
    let id = world.set;
    world.cluster.mail.clear();
    world
        .cluster
        .start(&process, Call::SemCtl { id, command }, &[]);
    assert_eq!(world.heard(1), [None]);
    let ended: [NodeId; 2] = [world.processes[0].node, world.processes[2].node];
    let find = Call::ShmGet {
        key: 7,
        size: 0,
        flags: 0,
        consistency: None,
    };
    let id = world
        .cluster
        .value(&world.processes[0], find)
        .expect("its id");
    let command = migshm_protocol::call::ShmCommand::Remove;
    let remover = world.processes[0].clone();
    world
        .cluster
        .start(&remover, Call::ShmCtl { id, command }, &[]);
    for node in ended {
        let detached = ToCoordinator::Detached {
            id: 0,
            segment: world.segment,
            count: 1,
            pid: 1,
        };
        world.cluster.send(node, detached);
    }
    world.cluster.mail.clear();
    world.change(2, 1);
    assert_eq!(world.heard(2), [None]);
}

#[test]
fn rules_decide_where_the_maker_does_not_say() {
    let (mut cluster, [node]) = Cluster::with_nodes([8 * MIB]);
    let settings = Settings {
        rules: "5-6".parse().expect("rules"),
        ..Settings::default()
    };
    cluster.core = std::mem::take(&mut cluster.core).with_settings(settings);
    let process = root(node, 1);
    for (key, said, expected) in [
        (5, None, Consistency::Release),
        (7, None, Consistency::Sequential),
        (6, Some(Consistency::Sequential), Consistency::Sequential),
        (8, Some(Consistency::Release), Consistency::Release),
    ] {
        let get = Call::ShmGet {
            key,
            size: 1,
            flags: IPC_CREAT | 0o600,
            consistency: said,
        };
        let id = cluster.value(&process, get).expect("a segment");
        let status = cluster
            .shm_stat(&process, id, StatBy::Id)
            .expect("its status");
        assert_eq!(status.consistency, expected, "key {key}");
    }
}

/// What a node was told of backups: extent, backup, and whether nothing was released before.
fn backups(world: &mut World, node: NodeId) -> Vec<(u32, Option<NodeId>, bool)> {
    let told = world.cluster.told(node).into_iter();
    told.filter_map(|message| match message {
        FromCoordinator::BackupIs {
            extent,
            backup,
            blank,
        } => Some((extent.index, backup, blank)),
        _ => None,
    })
    .collect()
}

#[test]
fn durable_extents_have_a_backup_that_takes_the_place_of_their_home() {
    let mut world = world(Consistency::Durable);
    let [first, second, third] = world.processes.each_ref().map(|process| process.node);
    let extent = Extent {
        segment: world.segment,
        index: 0,
    };
    world.cluster.mail.clear();
    world
        .cluster
        .send(first, ToCoordinator::FindHome { extent });
    assert_eq!(backups(&mut world, first), [(0, Some(second), true)]);
    // The first backup dies: another one has to get all that there is.
    world.cluster.leave(second);
    assert_eq!(backups(&mut world, first), [(0, Some(third), true)]);
    // The home dies, and there is nobody else.
    world.cluster.leave(first);
    assert_eq!(backups(&mut world, third), [(0, None, false)]);
    let late = world.cluster.join("late", 8 * MIB);
    assert_eq!(backups(&mut world, third), [(0, Some(late), false)]);
    world.cluster.leave(third);
    assert_eq!(backups(&mut world, late), [(0, None, false)]);
}

#[test]
fn what_nobody_has_a_second_copy_of_dies_with_its_home() {
    let mut world = world(Consistency::Durable);
    let [first, second, third] = world.processes.each_ref().map(|process| process.node);
    for node in [second, third] {
        world.cluster.leave(node);
    }
    world
        .cluster
        .send(first, ToCoordinator::Flushed { view: 5 });
    let extent = Extent {
        segment: world.segment,
        index: 1,
    };
    world.cluster.mail.clear();
    world
        .cluster
        .send(first, ToCoordinator::FindHome { extent });
    assert_eq!(backups(&mut world, first), [(1, None, true)]);
    world.cluster.leave(first);
    let late = world.cluster.join("late", 8 * MIB);
    let process = root(late, 50);
    let id = world
        .cluster
        .shmget(&process, 7, 1, 0)
        .expect("it is there");
    world
        .cluster
        .shmat(&process, id, 0)
        .expect("it can be attached");
    world.cluster.mail.clear();
    world.cluster.send(late, ToCoordinator::FindHome { extent });
    let told = world.cluster.told(late);
    let lost =
        |message: &FromCoordinator| matches!(message, FromCoordinator::HomeIs { home: None, .. });
    assert!(told.iter().any(lost), "{told:?}");
}
