//! Node daemons that are replaced while programs use them (`migshm upgrade`), as the programs meet it:
//! they do not.
//!
//! `MIGSHM_UPGRADES` says how often, `MIGSHM_SEED` in which order.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use migshm_tests::random::{Random, number, seed};
use migshm_tests::{Lab, Process, Solo, built, eventually, is_root_for, run};

const NODES: usize = 3;

/// Programs of `c-tests` that judge themselves, and their options: locks that carry data, undo, spinning,
/// messages, forks, ends of processes.
const LOADS: [(&str, &[&str]); 7] = [
    ("counter", &["--ops", "1000", "--undo"]),
    ("litmus", &["--rounds", "500", "--batch", "64"]),
    ("post", &[]),
    ("latecomer", &[]),
    ("prodcons", &["--ops", "500"]),
    ("heat", &["--size", "256"]),
    ("churn", &[]),
];

fn upgrade(lab: &Lab, node: usize) {
    let before = lab.status(node)["upgrades"].as_u64();
    let mut command = lab.inside(built("target/release/migshm"));
    command
        .arg("upgrade")
        .env("MIGSHM_RUNTIME_DIR", lab.node(node));
    run(&mut command).succeeded();
    let after = lab.status(node)["upgrades"].as_u64();
    assert_eq!(after, before.map(|count| count + 1));
}

fn upgrades() -> u64 {
    number("MIGSHM_UPGRADES").unwrap_or(40)
}

#[test]
fn no_program_notices() {
    let lab = Lab::new(NODES);
    let mut random = Random(seed("MIGSHM_SEED"));
    let mut done = 0;
    for (name, options) in LOADS.iter().cycle() {
        let mut load = lab.inside(built("c-tests/spread.sh"));
        load.args([name, "3"]).args(*options);
        let mut load = Process::start(&mut load);
        while !load.has_ended() {
            upgrade(&lab, random.index(NODES) + 1);
            done += 1;
        }
        assert!(load.end().success(), "{name} after {done} upgrades");
        if done >= upgrades() {
            break;
        }
    }
    let ipcs = lab.ipcs();
    for kind in ["segments", "semaphores", "queues"] {
        assert_eq!(ipcs[kind].as_array().map_or(0, Vec::len), 0, "{ipcs}");
    }
}

#[test]
fn released_writes_arrive() {
    let lab = Lab::new(NODES);
    let mut random = Random(seed("MIGSHM_SEED"));
    let mut load = lab.inside(built("c-tests/spread.sh"));
    load.args(["counter", "3", "--ops", "1000"]);
    let mut load = Process::start(load.env("MIGSHM_CONSISTENCY", "release"));
    while !load.has_ended() {
        upgrade(&lab, random.index(NODES) + 1);
    }
    assert!(load.end().success());
}

#[test]
fn calls_that_wait_are_answered_by_the_next_daemon() {
    let lab = Lab::new(2);
    let [mut waiter, mut other] = [2, 1].map(|node| lab.start(node, "sysv"));
    waiter.obey("semaphore 1");
    other.obey("semaphore 1");
    waiter.tell("change -2");
    eventually("it waits", || other.ask("waiters") == "1");
    upgrade(&lab, 2);
    upgrade(&lab, 1);
    assert_eq!(other.ask("waiters"), "1");
    other.obey("change 3");
    assert_eq!(waiter.answer(), "ok");
    assert_eq!(other.ask("value"), "1");
    other.obey("forget");
}

#[test]
fn what_is_owed_to_a_delegated_set_is_undone() {
    let lab = Lab::new(2);
    let mut holder = lab.start(2, "sysv");
    holder.obey("semaphore 1");
    holder.obey("change 1");
    for _ in 0..20 {
        holder.obey("lock -1");
        holder.obey("lock 1");
    }
    holder.obey("lock -1");
    upgrade(&lab, 2);
    holder.obey("lock 1");
    holder.obey("lock -1");
    upgrade(&lab, 2);
    holder.kill();
    let mut other = lab.start(1, "sysv");
    other.obey("semaphore 1");
    other.obey("lock -1");
    other.obey("forget");
}

#[test]
fn a_machine_alone_keeps_all_that_it_has() {
    let solo = Solo::new();
    let mut program = Process::start(&mut solo.program("sysv"));
    program.obey("segment 1 65536");
    program.obey("fill 1");
    program.obey("semaphore 1");
    program.obey("change 2");
    program.obey("queue 1");
    program.obey("send 7");
    let mut command = migshm_tests::migshm();
    command
        .arg("upgrade")
        .env("MIGSHM_RUNTIME_DIR", solo.runtime_dir());
    run(&mut command).succeeded();
    program.obey("check 1");
    assert_eq!(program.ask("value"), "2");
    assert_eq!(program.ask("nattch"), "1");
    assert_eq!(program.ask("receive 7"), "7");
    let mut late = Process::start(&mut solo.program("sysv"));
    late.obey("segment 1 65536");
    late.obey("check 1");
    assert_eq!(program.ask("nattch"), "2");
    program.obey("drop");
    program.obey("forget");
    program.obey("remove");
}

#[test]
fn a_daemon_that_cannot_be_replaced_goes_on() {
    let solo = Solo::for_all_users();
    let mut program = Process::start(&mut solo.program("sysv"));
    program.obey("segment 1 65536");
    program.obey("fill 1");
    let daemon = solo.file("migshm");
    fs::remove_file(&daemon).expect("it is ours");
    fs::write(&daemon, "no program").expect("it is ours");
    fs::set_permissions(&daemon, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let mut command = migshm_tests::migshm();
    command
        .arg("upgrade")
        .env("MIGSHM_RUNTIME_DIR", solo.runtime_dir());
    run(&mut command).exited(1).complained("cannot be replaced");
    program.obey("check 1");
    solo.install(&built("target/release/migshm"));
    run(&mut command).succeeded();
    program.obey("check 1");
    program.obey("remove");
}

#[test]
fn other_users_cannot_have_it_replaced() {
    if !is_root_for("being another user") {
        return;
    }
    let solo = Solo::for_all_users();
    let mut program = Process::start(&mut solo.program("sysv"));
    program.obey("segment 1 65536");
    let mut command = Command::new(solo.file("migshm"));
    command
        .arg("upgrade")
        .env("MIGSHM_RUNTIME_DIR", solo.runtime_dir())
        .uid(65534)
        .gid(65534);
    run(&mut command).exited(1).complained("permission denied");
    program.obey("remove");
}
