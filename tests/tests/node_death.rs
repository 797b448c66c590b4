//! Nodes die, and the others go on: with every page of which one of them has a copy, with SIGBUS
//! for the others, and never with zeros.

use std::fs;

use migshm_tests::{Lab, Process, eventually, is_root_for};

const PAGES: usize = 16;

/// A process on each of three nodes, the first of which was alone with the segment.
fn processes(lab: &Lab) -> [Process; 3] {
    let mut first = lab.start(1, "sysv");
    first.obey("segment 1 65536");
    first.obey("fill 1");
    let others = [2, 3].map(|node| {
        let mut process = lab.start(node, "sysv");
        process.obey("segment 1 65536");
        process
    });
    let [second, third] = others;
    [first, second, third]
}

#[test]
fn what_a_dead_node_alone_had_raises_sigbus() {
    let lab = Lab::new(3);
    let [mut home, mut victim, mut other] = processes(&lab);
    victim.obey("part 0 4");
    victim.obey("fill 2");
    victim.obey("part 4 8");
    victim.obey("check 1");
    lab.labctl(&["crash", "node2"]);
    for process in [&mut home, &mut other] {
        assert_eq!(process.ask("census"), "12 held, 4 lost");
        process.obey("part 3 4");
        assert_eq!(process.ask("fill 3"), "SIGBUS");
        process.obey("part 4 16");
        process.obey("check 1");
        process.obey("part 0 16");
    }
    other.obey("part 4 16");
    other.obey("fill 3");
    home.obey("part 4 16");
    home.obey("check 3");
    let log = fs::read_to_string(lab.directory().join("node1.log")).expect("the lab's log");
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("pages died"))
        .collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("first=0 last=3"), "{log}");
    // What is lost stays lost, also for who comes later.
    let mut late = lab.start(3, "sysv");
    late.obey("segment 1 65536");
    assert_eq!(late.ask("census"), "12 held, 4 lost");
    home.obey("remove");
}

#[test]
fn copies_outlive_the_home_and_owner_of_their_pages() {
    let lab = Lab::new(3);
    let [_home, mut reader, mut other] = processes(&lab);
    // So few that nothing is prefetched.
    reader.obey("part 0 3");
    reader.obey("check 1");
    other.obey("part 8 10");
    other.obey("fill 2");
    lab.labctl(&["crash", "node1"]);
    other.obey("part 0 3");
    other.obey("check 1");
    other.obey("fill 3");
    reader.obey("part 0 3");
    reader.obey("check 3");
    reader.obey("part 8 10");
    reader.obey("check 2");
    reader.obey("part 0 16");
    assert_eq!(reader.ask("census"), "5 held, 11 lost");
    other.obey("remove");
}

#[test]
fn a_segment_that_only_a_dead_node_used_is_lost() {
    let lab = Lab::new(2);
    let mut sole = lab.start(1, "sysv");
    sole.obey("segment 1 65536");
    sole.obey("fill 1");
    lab.labctl(&["crash", "node1"]);
    let mut other = lab.start(2, "sysv");
    other.obey("segment 1 65536");
    assert_eq!(other.ask("census"), "0 held, 16 lost");
    other.obey("remove");
}

#[test]
fn nodes_that_die_while_all_write_leave_the_others_writing() {
    for victims in [&["node1"][..], &["node2"], &["node2", "node1"]] {
        let lab = Lab::new(4);
        let [first, second, third] = processes(&lab);
        let mut fourth = lab.start(4, "sysv");
        fourth.obey("segment 1 65536");
        let mut processes = vec![first, second, third, fourth];
        const ROUNDS: usize = 60;
        for process in &mut processes {
            (0..ROUNDS).for_each(|round| process.tell(&format!("fill {}", round + 2)));
        }
        // They are at it.
        assert_eq!(processes[2].answer(), "ok");
        for victim in victims {
            lab.labctl(&["crash", victim]);
        }
        let mut survivors = processes.split_off(2);
        assert_eq!(survivors[1].answer(), "ok");
        for process in &mut survivors {
            for _ in 1..ROUNDS {
                let answer = process.answer();
                assert!(["ok", "SIGBUS"].contains(&answer.as_str()), "{answer}");
            }
        }
        let census = survivors[0].ask("census");
        assert_eq!(survivors[1].ask("census"), census);
        let (held, lost) = census.split_once(" held, ").expect("no zeros");
        let lost = lost.strip_suffix(" lost").expect("no zeros");
        let count = |text: &str| text.parse::<usize>().expect("a number");
        assert_eq!(count(held) + count(lost), PAGES);
        survivors[0].obey("remove");
    }
}

#[test]
fn a_node_that_is_cut_off_stops_and_comes_back_as_a_new_one() {
    if !is_root_for("a network namespace for each host") {
        return;
    }
    let lab = Lab::with(3, &["--netns"]);
    let [mut first, mut second, mut third] = processes(&lab);
    third.obey("part 0 4");
    third.obey("fill 2");
    third.obey("part 8 16");
    third.obey("check 1");
    lab.labctl(&["cut", "node3"]);
    assert_eq!(first.ask("census"), "12 held, 4 lost");
    second.obey("part 8 16");
    second.obey("fill 3");
    // It waits. Were it to read on, it would find what is no longer true.
    third.tell("check 1");
    lab.labctl(&["heal", "node3"]);
    assert_eq!(third.answer(), "SIGBUS");
    third.obey("part 0 4");
    assert_eq!(third.ask("fill 4"), "SIGBUS");
    lab.labctl(&["crash", "node3"]);
    lab.labctl(&["start", "node3"]);
    let mut again = lab.start(3, "sysv");
    again.obey("segment 1 65536");
    assert_eq!(again.ask("census"), "12 held, 4 lost");
    again.obey("part 8 16");
    again.obey("check 3");
    again.obey("fill 5");
    second.obey("check 5");
    second.obey("remove");
}

#[test]
fn a_daemon_that_was_stopped_for_too_long_finds_that_the_others_have_gone_on() {
    let lab = Lab::new(3);
    let [mut first, _second, mut third] = processes(&lab);
    third.obey("part 0 4");
    third.obey("fill 2");
    third.obey("part 0 16");
    lab.labctl(&["pause", "node3"]);
    assert_eq!(first.ask("census"), "12 held, 4 lost");
    lab.labctl(&["resume", "node3"]);
    eventually("its processes lose its pages", || {
        third.ask("census") == "0 held, 16 lost"
    });
    first.obey("remove");
}
