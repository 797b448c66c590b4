//! Several coordinators with an etcd cluster, as programs meet the end of one that leads: a pause.

use std::time::Duration;

use migshm_tests::chaos::schedule::Fault;
use migshm_tests::chaos::{Setup, run_failovers};
use migshm_tests::random::seed;
use migshm_tests::{Lab, built, eventually, run};

fn lab(nodes: usize) -> Lab {
    Lab::with(nodes, &["--coordinators", "2"])
}

fn leader(lab: &Lab, kind: &str) -> String {
    let mut leader = None;
    eventually("one leads", || {
        leader = lab.leader(kind);
        leader.is_some()
    });
    leader.expect("one leads")
}

#[test]
fn operations_that_wait_go_on_with_the_next_leader() {
    let lab = lab(2);
    let [mut first, mut second] = lab.with_semaphore();
    first.tell("change -2");
    eventually("it waits", || second.ask("waiters") == "1");
    let former = leader(&lab, "coordinator");
    lab.labctl(&["kill", &former]);
    second.tell("change 3");
    assert_eq!([first.answer(), second.answer()], ["ok", "ok"]);
    assert_ne!(leader(&lab, "coordinator"), former);
    assert_eq!(first.ask("value"), "1");
    lab.labctl(&["start", &former]);
    second.obey("forget");
}

#[test]
fn a_leader_that_was_stopped_has_nothing_more_to_say() {
    let lab = lab(2);
    let [mut first, mut second] = lab.with_semaphore();
    let former = leader(&lab, "coordinator");
    lab.labctl(&["pause", &former]);
    first.obey("change 1");
    eventually("another leads", || {
        lab.leader("coordinator").is_some_and(|now| now != former)
    });
    second.obey("change 1");
    lab.labctl(&["resume", &former]);
    let log = lab.directory().join(format!("{former}.log"));
    eventually("it stands by", || {
        std::fs::read_to_string(&log).is_ok_and(|log| log.contains("leads no longer; stands by"))
    });
    // The one that was stopped is as good as any.
    lab.labctl(&["kill", &leader(&lab, "coordinator")]);
    first.obey("change 1");
    assert_eq!(leader(&lab, "coordinator"), former);
    assert_eq!(second.ask("value"), "3");
    second.obey("forget");
}

#[test]
fn without_most_of_etcd_programs_wait() {
    let lab = lab(1);
    let [mut process] = lab.with_semaphore();
    process.obey("queue 1");
    lab.labctl(&["kill", "etcd1"]);
    process.obey("send 1");
    lab.labctl(&["kill", "etcd2"]);
    process.tell("send 2");
    eventually("nobody leads", || lab.status(1)["coordinator"] == "waiting");
    assert!(!process.has_answered());
    // A member alone does not serve, so they are started at once.
    std::thread::scope(|scope| {
        for member in ["etcd1", "etcd2"] {
            let lab = &lab;
            scope.spawn(move || lab.labctl(&["start", member]));
        }
    });
    assert_eq!(process.answer(), "ok");
    assert_eq!(process.ask("queued"), "2");
    process.obey("drop");
    process.obey("forget");
}

#[test]
fn leaders_are_killed_under_load() {
    let seed = seed("FAILOVER_SEED");
    let setup = Setup {
        seed,
        nodes: 3,
        clients: 6,
        time: Duration::ZERO,
        faults: Fault::OF_LEADERS.to_vec(),
    };
    let report = run_failovers(&setup, 2);
    report.assert_right(seed);
    assert_eq!(report.schedule.events.len(), 4);
}

/// What a coordinator says that cannot be used with this etcd.
fn refusal(lab: &Lab, store: &str, expected: &str) {
    let mut command = lab.inside(built("target/release/migshm"));
    command.args(["coordinator", "--listen", "127.0.0.1:0", "--pki"]);
    command.arg(lab.directory().join("pki"));
    run(command.args(["--store", store])).complained(expected);
}

#[test]
fn an_etcd_that_cannot_be_used_is_refused() {
    let lab = lab(1);
    refusal(
        &lab,
        "etcd://127.0.0.1:1",
        "cannot reach etcd at 127.0.0.1:1",
    );
    refusal(&lab, "etcd://192.0.2.1", "needs TLS");
    refusal(&lab, "etcd://me:secret@127.0.0.1", "no user and password");
    refusal(&lab, "redis://127.0.0.1", "it is etcd://");
}
