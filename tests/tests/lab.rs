//! Faults of daemons and links, as programs meet them. (`cli/tests` has the lab's own commands.)

use std::fs;
use std::path::Path;

use migshm_tests::{Lab, eventually, is_root_for, processes_with, run};

#[test]
fn a_paused_daemon_delays_and_loses_nothing() {
    let lab = Lab::new(2);
    let mut writer = lab.start(1, "sysv");
    let mut reader = lab.start(2, "sysv");
    writer.obey("segment 1 65536");
    writer.obey("fill 1");
    reader.obey("segment 1 65536");
    lab.labctl(&["pause", "node1"]);
    reader.tell("check 1");
    assert_eq!(lab.host("node1")["state"], "paused");
    lab.labctl(&["resume", "node1"]);
    assert_eq!(reader.answer(), "ok");
    reader.obey("fill 2");
    writer.obey("check 2");
    writer.obey("remove");
}

#[test]
fn a_paused_coordinator_delays_calls_but_no_page() {
    let lab = Lab::new(2);
    let mut first = lab.start(1, "sysv");
    let mut second = lab.start(2, "sysv");
    for process in [&mut first, &mut second] {
        process.obey("segment 1 65536");
        process.obey("semaphore 1");
        process.obey("fill 1");
    }
    lab.labctl(&["pause", "coordinator"]);
    first.tell("change 1");
    second.obey("fill 2");
    second.obey("check 2");
    lab.labctl(&["resume", "coordinator"]);
    assert_eq!(first.answer(), "ok");
    first.obey("check 2");
    assert_eq!(second.ask("value"), "1");
    second.obey("forget");
    second.obey("remove");
}

#[test]
fn a_crashed_node_takes_its_processes_and_no_others() {
    let lab = Lab::new(3);
    let mut victim = lab.start(2, "sysv");
    let mut survivors = [lab.start(1, "sysv"), lab.start(3, "sysv")];
    victim.obey("semaphore 1");
    victim.obey("change 1");
    victim.obey("lock -1");
    for process in &mut survivors {
        process.obey("semaphore 1");
    }
    survivors[0].tell("lock -1");
    eventually("it waits", || survivors[1].ask("waiters") == "1");
    lab.labctl(&["crash", "node2"]);
    assert_eq!(lab.host("node2")["state"], "dead");
    // Its end undoes what it held.
    assert_eq!(survivors[0].answer(), "ok");
    survivors[1].obey("forget");
}

#[test]
fn a_node_comes_back_under_its_name() {
    let lab = Lab::new(2);
    lab.labctl(&["kill", "node2"]);
    lab.labctl(&["start", "node2"]);
    lab.spread("counter", 4, &["--ops", "100"]);
}

#[test]
fn programs_of_a_node_whose_daemon_ended_do_not_go_on_alone() {
    let lab = Lab::new(2);
    let mut other = lab.start(1, "sysv");
    other.obey("semaphore 1");
    lab.labctl(&["kill", "node2"]);
    run(&mut lab.on(2, "basic")).complained("is not running here");
    lab.labctl(&["start", "node2"]);
    let mut process = lab.start(2, "sysv");
    process.obey("semaphore 1");
    process.obey("change 1");
    assert_eq!(other.ask("value"), "1");
    other.obey("forget");
}

#[test]
fn a_coordinator_without_its_state_fails_calls_and_the_node_says_so() {
    let lab = Lab::new(1);
    let mut process = lab.start(1, "sysv");
    process.obey("semaphore 1");
    lab.labctl(&["kill", "coordinator"]);
    fs::remove_dir_all(lab.directory().join("state")).expect("the lab's state");
    lab.labctl(&["start", "coordinator"]);
    assert_eq!(process.ask("value"), "ENOSYS");
    let log = fs::read_to_string(lab.directory().join("node1.log")).expect("the lab's log");
    assert!(log.contains("lost the coordinator"), "{log}");
}

#[test]
fn patience_with_a_lost_coordinator_can_end() {
    let lab = Lab::with_environment(2, &[("MIGSHM_PATIENCE", "1")]);
    let mut process = lab.start(1, "sysv");
    let mut other = lab.start(2, "sysv");
    for process in [&mut process, &mut other] {
        process.obey("segment 1 65536");
        process.obey("fill 1");
    }
    process.obey("semaphore 1");
    lab.labctl(&["kill", "coordinator"]);
    assert_eq!(process.ask("value"), "ENOSYS");
    assert_eq!(lab.status(1)["coordinator"], "lost");
    assert_eq!(process.ask("check 1"), "SIGBUS");
}

#[test]
fn a_short_cut_of_the_link_loses_nothing() {
    if !is_root_for("a network namespace for each host") {
        return;
    }
    let lab = Lab::with(2, &["--netns"]);
    let mut writer = lab.start(1, "sysv");
    let mut reader = lab.start(2, "sysv");
    writer.obey("segment 1 65536");
    writer.obey("fill 1");
    reader.obey("segment 1 65536");
    lab.labctl(&["cut", "node2"]);
    assert_eq!(lab.host("node2")["cut"], true);
    reader.tell("check 1");
    lab.labctl(&["heal", "node2"]);
    assert_eq!(reader.answer(), "ok");
    reader.obey("remove");
}

#[test]
fn nothing_is_left_of_a_lab() {
    if !is_root_for("a network namespace for each host") {
        return;
    }
    let lab = Lab::with(2, &["--netns"]);
    let directory = lab.directory().to_owned();
    let name = directory.file_name().expect("a name").to_owned();
    let networks = || {
        let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let name = name.to_str().expect("a plain name");
        let is_ours = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(name);
        entries.filter(is_ours).count()
    };
    assert_eq!(networks(), 4);
    // Also of programs that still run when the lab ends, and of daemons that cannot.
    let mut process = lab.start(1, "sysv");
    process.obey("segment 1 4096");
    lab.labctl(&["pause", "node2"]);
    drop(lab);
    assert_eq!(networks(), 0);
    assert!(!Path::new(&directory).exists());
    assert_eq!(processes_with("MIGSHM_LAB", &directory), [0; 0]);
}
