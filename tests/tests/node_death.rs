//! Nodes die, and the others go on: with every page of which one of them has a copy, with SIGBUS
//! for the others, and never with zeros.

use std::fs;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use migshm_tests::random::{Random, number, seed};
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

/// One or two of four nodes die while all write: `NODE_DEATHS` times.
#[test]
fn nodes_that_die_while_all_write_leave_the_others_writing() {
    let mut random = Random(seed("NODE_DEATH_SEED"));
    let mut longest = Duration::ZERO;
    for _ in 0..number("NODE_DEATHS").unwrap_or(3) {
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
        let before = random.index(ROUNDS / 2);
        (0..=before).for_each(|_| assert_eq!(processes[2].answer(), "ok"));
        let victim = 1 + random.index(2);
        lab.labctl(&["crash", &format!("node{victim}")]);
        if random.below(3) == 0 {
            lab.labctl(&["crash", &format!("node{}", 3 - victim)]);
        }
        let mut survivors = processes.split_off(2);
        let stalls = thread::scope(|scope| {
            let answers = survivors.iter_mut().zip([before + 1, 0]);
            let watchers: Vec<_> = answers
                .map(|(survivor, got)| {
                    scope.spawn(move || longest_wait(survivor, ROUNDS - got, &["ok", "SIGBUS"]))
                })
                .collect();
            watchers
                .into_iter()
                .map(|watcher| watcher.join().expect("right answers"))
                .max()
        });
        longest = longest.max(stalls.unwrap_or_default());
        let census = survivors[0].ask("census");
        assert_eq!(survivors[1].ask("census"), census);
        let (held, lost) = census.split_once(" held, ").expect("no zeros");
        let lost = lost.strip_suffix(" lost").expect("no zeros");
        let count = |text: &str| text.parse::<usize>().expect("a number");
        assert_eq!(count(held) + count(lost), PAGES);
        survivors[0].obey("remove");
    }
    println!("a survivor waited for {longest:.1?} at most");
}

/// Takes so many answers, each one of those that may come; gives the longest time between two.
fn longest_wait(process: &mut Process, answers: usize, right: &[&str]) -> Duration {
    let mut longest = Duration::ZERO;
    for _ in 0..answers {
        let start = Instant::now();
        let answer = process.answer();
        longest = longest.max(start.elapsed());
        assert!(right.contains(&answer.as_str()), "{answer}");
    }
    longest
}

/// A link is cut for any time, `CUTS` times: the node stays a member or has to go, and a write is
/// seen by all who read after it or is lost.
#[test]
fn a_link_that_is_cut_for_any_time_makes_no_two_truths() {
    if !is_root_for("a network namespace for each host") {
        return;
    }
    let mut random = Random(seed("CUT_SEED"));
    let lab = Lab::with(3, &["--netns"]);
    let (mut stayed, mut gone) = (0, 0);
    for round in 0..number("CUTS").unwrap_or(3) {
        let [mut first, mut second, mut outsider] = [1, 2, 3].map(|node| lab.start(node, "sysv"));
        let segment = format!("segment {} 65536", round + 1);
        for process in [&mut first, &mut second, &mut outsider] {
            process.obey(&segment);
            process.obey("part 0 16");
        }
        let creator = [&mut first, &mut outsider];
        creator
            .into_iter()
            .nth(random.index(2))
            .expect("one of two")
            .obey("fill 1");
        for reader in [&mut first, &mut second, &mut outsider] {
            if random.below(2) == 0 {
                reader.obey("check 1");
            }
        }
        let inside = random.below(2) == 0;
        lab.labctl(&["cut", "node3"]);
        let (writer, reader) = if inside {
            (&mut first, &mut outsider)
        } else {
            (&mut outsider, &mut first)
        };
        writer.tell("fill 2");
        // As many of up to 0.8 s as of up to 6.4 s.
        let most = 6_400 >> random.below(4);
        sleep(Duration::from_millis(random.below(most)));
        lab.labctl(&["heal", "node3"]);
        let written = writer.answer();
        assert!(["ok", "SIGBUS"].contains(&written.as_str()), "{written}");
        let read = reader.ask("check 2");
        match (written.as_str(), read.as_str()) {
            ("ok", "ok" | "SIGBUS") | ("SIGBUS", "SIGBUS") => {}
            // Of what was written in part and is lost nothing is left but what was before.
            ("SIGBUS", _) => {
                let before = reader.ask("check 1");
                assert!(["ok", "SIGBUS"].contains(&before.as_str()), "{before}");
            }
            _ => panic!("written: {written}, read: {read}"),
        }
        let census = first.ask("census");
        assert_eq!(second.ask("census"), census);
        assert!(census.ends_with(" lost"), "{census}");
        if written == "ok" && inside {
            second.obey("check 2");
        }
        let has_left = outsider.ask("nattch") == "ENOSYS";
        first.obey("remove");
        if has_left {
            gone += 1;
            lab.labctl(&["crash", "node3"]);
            lab.labctl(&["start", "node3"]);
        } else {
            stayed += 1;
        }
    }
    println!("the node stayed {stayed} times and had to go {gone} times");
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
