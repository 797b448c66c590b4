//! Processes that may only read a segment: they see what is written, on every node, and write
//! nothing, whatever they try.

use migshm_tests::{Lab, Process, Solo, eventually, is_root_for, program};

const READER: u32 = 65001;
const OTHER_READER: u32 = 65002;
const PAGES: u64 = 16;
const BYTES: u64 = PAGES * 4096;

/// A reader on a node, of a user, attached.
fn reader(lab: &Lab, node: usize, user: u32) -> Process {
    let mut reader = lab.start(node, "reader");
    reader.obey(&format!("become {user}"));
    reader.obey(&format!("attach 1 {BYTES}"));
    reader
}

/// A process of the owner on a node, attached for writing.
fn writer(lab: &Lab, node: usize) -> Process {
    let mut writer = lab.start(node, "sysv");
    writer.obey(&format!("segment 1 {BYTES}"));
    writer.obey("mode 0644");
    writer
}

fn resident(lab: &Lab, node: usize) -> u64 {
    lab.status(node)["resident"].as_u64().expect("a number")
}

#[test]
fn readers_on_all_nodes_see_every_write() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(3);
    let mut writers: Vec<Process> = vec![writer(&lab, 1)];
    writers[0].obey("fill 1");
    // The segment is not shared with other nodes yet.
    let mut readers = vec![reader(&lab, 1, READER)];
    readers[0].obey("check 1");
    // Reader and writer on one node, which has the pages for writing.
    for value in 100..110 {
        writers[0].obey(&format!("fill {value}"));
        readers[0].obey(&format!("check {value}"));
    }
    writers.push(writer(&lab, 2));
    for (node, user) in [
        (1, OTHER_READER),
        (2, READER),
        (3, READER),
        (3, OTHER_READER),
    ] {
        readers.push(reader(&lab, node, user));
    }
    for value in 1..40 {
        // Each twice in a row: the second time the pages are there, and seen by readers.
        writers[value / 2 % 2].obey(&format!("fill {value}"));
        for reader in &mut readers {
            reader.obey(&format!("check {value}"));
        }
        // Late, and gone again.
        let mut late = reader(&lab, value % 3 + 1, READER);
        late.obey(&format!("check {value}"));
        late.obey("detach");
    }
    assert_eq!(writers[0].ask("nattch"), "7");
}

#[test]
fn readers_that_wait_for_a_write_see_it_while_others_write() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut writers = [writer(&lab, 1), writer(&lab, 2)];
    let mut readers = [
        reader(&lab, 1, READER),
        reader(&lab, 1, OTHER_READER),
        reader(&lab, 2, READER),
    ];
    // A child sees what its parent saw, and what is written later.
    readers[2].obey("fork");
    for value in 0..100 {
        for reader in &mut readers {
            reader.tell(&format!("await {value}"));
        }
        // Each twice in a row: the second time the pages are there, and seen by readers.
        writers[value / 2 % 2].obey(&format!("fill {value}"));
        for reader in &mut readers {
            assert_eq!(reader.answer(), "ok");
        }
    }
}

#[test]
fn no_load_of_a_reader_shows_what_sequential_consistency_forbids() {
    if !is_root_for("becoming another user") {
        return;
    }
    for nodes in [2, 4] {
        let lab = Lab::new(nodes);
        for options in [
            &["--rounds", "512"][..],
            &["--rounds", "256", "--order", "fenced"],
            &["--rounds", "256", "--order", "relaxed"],
            &["--rounds", "256", "--stride", "8"],
        ] {
            lab.spread("litmus", 4, &[&["--readers"], options].concat());
        }
    }
}

#[test]
fn readers_see_a_segment_that_does_not_fit_the_node() {
    if !is_root_for("becoming another user") {
        return;
    }
    const BYTES: u64 = 24 << 20;
    let lab = Lab::with(3, &["--memory", "16M"]);
    let mut writer = lab.start(1, "sysv");
    writer.obey(&format!("segment 1 {BYTES}"));
    writer.obey("mode 0644");
    let mut reader = lab.start(2, "reader");
    reader.obey(&format!("become {READER}"));
    reader.obey(&format!("attach 1 {BYTES}"));
    for value in 1..4 {
        writer.obey(&format!("fill {value}"));
        reader.obey(&format!("check {value}"));
        let replicated = lab.status(2)["replicated_pages"].as_u64();
        assert!((1..=1024).contains(&replicated.unwrap()), "{replicated:?}");
    }
}

#[test]
fn an_attach_that_was_made_to_read_only_never_becomes_writable() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut writers = vec![writer(&lab, 1)];
    writers[0].obey("fill 1");
    // One that may write, and chose not to; of a segment that is not tracked yet.
    let mut chooser = lab.start(1, "reader");
    chooser.obey(&format!("attach 1 {BYTES}"));
    assert_eq!(chooser.ask("permit"), "EACCES");
    writers.push(writer(&lab, 2));
    for mut reader in [chooser, reader(&lab, 1, READER), reader(&lab, 2, READER)] {
        assert_eq!(reader.ask("permit"), "EACCES");
        reader.obey("check 1");
        reader.obey("fork");
        assert_eq!(reader.ask("permit"), "EACCES");
        reader.obey("move");
        assert_eq!(reader.ask("permit"), "EACCES");
        reader.obey("check 1");
    }
}

#[test]
fn a_replica_goes_with_its_last_reader() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut writer = writer(&lab, 1);
    writer.obey("fill 1");
    let mut first = reader(&lab, 1, READER);
    let mut second = reader(&lab, 1, READER);
    assert_eq!(resident(&lab, 1), BYTES);
    first.obey("check 1");
    second.obey("check 1");
    assert_eq!(resident(&lab, 1), 2 * BYTES);
    first.obey("detach");
    second.obey("check 1");
    assert_eq!(resident(&lab, 1), 2 * BYTES);
    second.kill();
    eventually("the replica is freed", || resident(&lab, 1) == BYTES);
    assert_eq!(writer.ask("nattch"), "1");
}

#[test]
fn a_hostile_reader_changes_what_nobody_else_sees() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut writers = [writer(&lab, 1), writer(&lab, 2)];
    writers[0].obey("fill 5");
    writers[1].obey("check 5");
    let mut honest = [reader(&lab, 1, OTHER_READER), reader(&lab, 2, OTHER_READER)];
    for node in [1, 2] {
        let mut hostile = reader(&lab, node, READER);
        hostile.obey("check 5");
        hostile.obey("spoil 666");
        for process in writers.iter_mut().chain(&mut honest) {
            process.obey("check 5");
        }
        // Nor later, when pages move.
        for value in [6, 5] {
            writers[value % 2].obey(&format!("fill {value}"));
            for process in writers.iter_mut().chain(&mut honest) {
                process.obey(&format!("check {value}"));
            }
        }
        hostile.kill();
        reader(&lab, node, READER).obey("check 5");
    }
}

#[test]
fn a_hostile_reader_on_one_machine_changes_nothing() {
    if !is_root_for("becoming another user") {
        return;
    }
    let solo = Solo::for_all_users();
    let mut writer = Process::start(&mut solo.program("sysv"));
    writer.obey(&format!("segment 1 {BYTES}"));
    writer.obey("mode 0644");
    writer.obey("fill 5");
    let mut hostile = solo.preloaded(solo.install(&program("reader")));
    let mut hostile = Process::start(&mut hostile);
    hostile.obey(&format!("become {READER}"));
    hostile.obey(&format!("attach 1 {BYTES}"));
    hostile.obey("check 5");
    hostile.obey("spoil 666");
    writer.obey("check 5");
    hostile.obey("check 5");
}
