//! Segments with release consistency.

use migshm_tests::{Lab, Process, Solo, eventually, is_root_for, run};

/// A process of a node that makes segments with release consistency, and has one of 4 pages.
fn releasing(lab: &Lab, node: usize) -> Process {
    let mut process = Process::start(lab.on(node, "sysv").env("MIGSHM_CONSISTENCY", "release"));
    process.obey("segment 1 16384");
    process.obey("queue 1");
    process
}

/// One process tells another, by a message, that it has written.
fn hand_over(from: &mut Process, to: &mut Process) {
    from.obey("send 1");
    assert_eq!(to.ask("receive 1"), "1");
}

/// One process writes its segment again and again, and tells another.
fn write_rounds(writer: &mut Process, other: &mut Process, values: std::ops::Range<u32>) {
    for value in values {
        writer.obey(&format!("fill {value}"));
        hand_over(writer, other);
    }
}

/// What the engine of a node has counted.
fn counted(lab: &Lab, node: usize, what: &str) -> u64 {
    lab.status(node)["release"][what]
        .as_u64()
        .expect("a number")
}

#[test]
fn programs_that_use_semaphores_compute_what_they_should() {
    let lab = Lab::new(3);
    lab.spread_released("counter", 4, &["--ops", "300"]);
    lab.spread_released("counter", 4, &["--ops", "300", "--undo"]);
    lab.spread_released("prodcons", 4, &["--ops", "300"]);
    lab.spread_released("multi", 5, &["--ops", "200"]);
    lab.spread_released("waitzero", 4, &["--rounds", "50"]);
    lab.spread_released("heat", 3, &["--steps", "50"]);
    for program in ["intsort", "water", "pipeline", "hashtable", "matmul", "tsp"] {
        lab.spread_released(program, 3, &[]);
    }
    assert!(
        (1..=3)
            .map(|node| counted(&lab, node, "diffs"))
            .sum::<u64>()
            > 100
    );
    let errors = |node| counted(&lab, node, "protocol_errors");
    assert_eq!((1..=3).map(errors).sum::<u64>(), 0);
}

#[test]
fn the_calls_behave_as_ever() {
    let lab = Lab::new(3);
    lab.spread_released("basic", 2, &[]);
    lab.spread_released("fork", 2, &[]);
    lab.spread_released("ops", 2, &[]);
    lab.spread_released("messages", 2, &[]);
}

#[test]
fn holders_that_are_killed_leave_what_they_wrote() {
    let lab = Lab::new(3);
    lab.spread_released("undo", 3, &[]);
}

#[test]
fn nodes_write_to_the_same_pages_at_once() {
    let lab = Lab::new(3);
    lab.spread_released("falseshare", 2, &[]);
    lab.spread_released("falseshare", 3, &["--pages", "40", "--rounds", "10"]);
    lab.spread_released("falseshare", 5, &["--rounds", "10"]);
    lab.spread("falseshare", 3, &["--rounds", "3"]);
}

#[test]
fn a_program_may_have_a_segment_of_each_kind() {
    // The key in slot 1 is that of the team and 2.
    let lab = Lab::with_release_keys(3, "0x6002");
    lab.spread("mixed", 4, &["--key", "0x6000"]);
    assert!((1..=3).any(|node| counted(&lab, node, "diffs") > 0));
    let forwards = |node| lab.status(node)["coherence"]["forwards"].as_u64() > Some(0);
    assert!((1..=3).any(forwards));
}

#[test]
fn the_kind_of_a_segment_is_that_of_its_maker() {
    let lab = Lab::with_release_keys(2, "2,0x10-0x1f");
    let kinds = |key: &str, environment: &[(&str, &str)]| {
        let mut maker = Process::start(lab.on(1, "sysv").envs(environment.iter().copied()));
        maker.obey(&format!("segment {key} 4096"));
        let kind = lab.ipcs()["sharedmemory"][0]["consistency"].clone();
        maker.obey("remove");
        maker.obey("detach");
        kind
    };
    let variable = "MIGSHM_CONSISTENCY";
    assert_eq!(kinds("1", &[]), "sequential");
    assert_eq!(kinds("2", &[]), "release");
    assert_eq!(kinds("0x1f", &[]), "release");
    assert_eq!(kinds("1", &[(variable, "release")]), "release");
    assert_eq!(kinds("2", &[(variable, "sequential")]), "sequential");
    let mut command = lab.on(1, "basic");
    let refused = run(command.args(["--fork", "2"]).env(variable, "relaxed"));
    refused
        .exited(1)
        .complained("migshm: MIGSHM_CONSISTENCY must be sequential or release");
}

#[test]
fn on_one_machine_the_kind_makes_no_difference() {
    let solo = Solo::new();
    let mut command = solo.program("heat");
    command.env("MIGSHM_CONSISTENCY", "release");
    run(command.args(["--fork", "3", "--steps", "20"])).succeeded();
}

#[test]
fn writes_are_seen_after_a_message() {
    let lab = Lab::new(3);
    let mut processes: Vec<Process> = (1..=3).map(|node| releasing(&lab, node)).collect();
    for value in 1..40 {
        let (from, to) = (value % 3, (value + 1 + value / 7 % 2) % 3);
        processes[from].obey(&format!("fill {value}"));
        let [from, to] = processes.get_disjoint_mut([from, to]).expect("two");
        hand_over(from, to);
        to.obey(&format!("check {value}"));
    }
}

#[test]
fn what_a_process_wrote_before_its_end_is_seen() {
    let lab = Lab::new(3);
    let mut first = releasing(&lab, 1);
    let mut observer = releasing(&lab, 3);
    for value in 1..6 {
        let mut writer = releasing(&lab, 2);
        writer.obey("semaphore 1");
        writer.obey("lock 1");
        observer.obey(&format!("check {}", value - 1));
        writer.obey(&format!("fill {value}"));
        writer.kill();
        // The semaphore is undone when the process has ended.
        first.obey("semaphore 1");
        eventually("its end is noticed", || first.ask("value") == "0");
        hand_over(&mut first, &mut observer);
        observer.obey(&format!("check {value}"));
    }
}

#[test]
fn the_home_of_a_page_follows_its_only_writer() {
    let lab = Lab::new(2);
    let mut first = releasing(&lab, 1);
    first.obey("fill 1");
    let mut writer = releasing(&lab, 2);
    write_rounds(&mut writer, &mut first, 2..20);
    assert_eq!(counted(&lab, 2, "homes_taken"), 4);
    let diffs = counted(&lab, 2, "diffs");
    write_rounds(&mut writer, &mut first, 20..40);
    assert_eq!(counted(&lab, 2, "diffs"), diffs);
    first.obey("check 39");
    write_rounds(&mut writer, &mut first, 40..42);
    first.obey("check 41");
    // It goes back to where it was when others write it.
    first.obey("fill 42");
    hand_over(&mut first, &mut writer);
    writer.obey("check 42");
    assert_eq!(counted(&lab, 2, "homes_returned"), 4);
}

#[test]
fn a_page_that_nobody_has_touched_is_at_home_where_it_is_written_first() {
    let lab = Lab::new(2);
    let mut first = releasing(&lab, 1);
    let mut writer = releasing(&lab, 2);
    write_rounds(&mut writer, &mut first, 1..10);
    assert_eq!(counted(&lab, 2, "homes_taken"), 4);
    assert_eq!(counted(&lab, 2, "diffs"), 0);
    first.obey("check 9");
}

#[test]
fn who_exchanges_pages_is_in_the_log() {
    let lab = Lab::new(2);
    let mut processes = [1, 2].map(|node| releasing(&lab, node));
    for value in 1..9 {
        let [first, second] = &mut processes;
        let (from, to) = match value % 2 {
            0 => (first, second),
            _ => (second, first),
        };
        from.obey(&format!("fill {value}"));
        hand_over(from, to);
        to.obey(&format!("check {value}"));
    }
    let mut links = lab.inside(migshm_tests::built("target/release/migshm"));
    let links = run(links.args(["links", "--json"])).succeeded().json();
    let links = links["segments"][0]["links"].as_array().map(Vec::len);
    assert_eq!(links, Some(1));
}

#[test]
fn those_who_may_only_read_see_writes_after_a_call() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut writers = [releasing(&lab, 1), releasing(&lab, 2)];
    writers[0].obey("mode 0644");
    let mut readers: Vec<Process> = (1..=2).map(|node| lab.start(node, "reader")).collect();
    for reader in &mut readers {
        reader.obey("become 65001");
        reader.obey("attach 1 16384");
    }
    for value in 1..20 {
        let writer = &mut writers[value % 2];
        writer.obey(&format!("fill {value}"));
        // Each is a release, or an acquire of its node.
        writer.obey("send 1");
        for writer in &mut writers {
            writer.ask("queued");
        }
        for reader in &mut readers {
            reader.obey(&format!("check {value}"));
        }
    }
}

#[test]
fn a_segment_may_be_larger_than_the_memory_of_any_node() {
    let lab = Lab::with(4, &["--memory", "16M"]);
    lab.spread_released("bigseg", 4, &["--mib", "32", "--ops", "300"]);
    assert!((1..=4).any(|node| counted(&lab, node, "evictions") > 0));
}

#[test]
fn no_call_waits_for_a_node_that_is_gone() {
    let lab = Lab::new(3);
    let mut home = releasing(&lab, 2);
    home.obey("fill 1");
    let mut witness = releasing(&lab, 1);
    let mut writer = releasing(&lab, 3);
    writer.obey("check 1");
    writer.obey("fill 2");
    lab.labctl(&["crash", "node2"]);
    let members = || lab.status(1)["members"].as_array().map(Vec::len);
    eventually("the node is gone", || members() == Some(2));
    // What it wrote is lost with the node that is its home.
    writer.obey("send 1");
    assert_eq!(witness.ask("receive 1"), "1");
    assert_eq!(writer.ask("queued"), "0");
}
