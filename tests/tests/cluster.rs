//! Unmodified programs whose processes are spread over nodes.

use std::collections::BTreeMap;

use migshm_tests::{Lab, descriptors, eventually, library, program, run};

#[test]
fn no_outcome_that_sequential_consistency_forbids_shows() {
    let lab = Lab::new(4);
    for options in [
        &["--rounds", "1280"][..],
        &["--rounds", "640", "--order", "fenced"],
        &["--rounds", "640", "--stride", "8"],
        &["--rounds", "640", "--stride", "64"],
    ] {
        lab.spread("litmus", 4, options);
    }
}

#[test]
fn locks_made_of_plain_memory_exclude() {
    let lab = Lab::new(3);
    for lock in ["ticket", "mcs", "pthread_spin", "queue", "seqlock"] {
        lab.spread(lock, 3, &["--ops", "300"]);
    }
}

#[test]
fn semaphores_order_what_is_shared() {
    let lab = Lab::new(3);
    lab.spread("counter", 4, &["--ops", "300"]);
    lab.spread("counter", 4, &["--ops", "300", "--undo"]);
    lab.spread("prodcons", 4, &["--ops", "500"]);
    lab.spread("multi", 5, &["--ops", "200"]);
    lab.spread("waitzero", 4, &["--rounds", "50"]);
    lab.spread("ops", 2, &[]);
}

#[test]
fn a_lock_carries_the_pages_that_it_guards() {
    let lab = Lab::new(3);
    lab.spread("ring", 3, &["--rounds", "500", "--pages", "3"]);
    let count = |what: &str| -> u64 {
        let of = |node| lab.status(node)["coherence"][what].as_u64();
        (1..=3).filter_map(of).sum()
    };
    // All but the first few come unasked, and then some now and then, to see if they are wanted.
    let (passes, pushes, faults) = (3 * 3 * 500, count("pushes"), count("faults"));
    assert!(pushes > passes * 3 / 4, "{pushes} pushes");
    assert!(faults < passes / 2, "{faults} faults");
    assert_eq!(count("protocol_errors"), 0);
}

/// Two grids of 2 pages a row; each node reads a row of the other's at each step, and writes its own again.
#[test]
fn what_iterates_between_barriers_comes_to_have_no_faults() {
    let lab = Lab::new(2);
    lab.spread("heat", 2, &["--size", "1024", "--steps", "100"]);
    let count = |what: &str| -> u64 {
        let of = |node| lab.status(node)["coherence"][what].as_u64();
        (1..=2).filter_map(of).sum()
    };
    let (rows, pushes) = (2 * 2 * 100, count("pushes"));
    assert!(pushes > rows * 3 / 4, "{pushes} pushes");
    let relinquished = count("relinquished");
    assert!(relinquished > rows * 3 / 4, "{relinquished} relinquished");
    assert_eq!(count("protocol_errors"), 0);
}

#[test]
fn messages_reach_whom_they_are_for() {
    let lab = Lab::new(3);
    lab.spread("messages", 2, &[]);
    lab.spread("post", 6, &["--messages", "500"]);
    lab.spread("post", 4, &["--messages", "1000", "--interrupt"]);
    lab.spread("pingpong", 4, &["--rounds", "300", "--bytes", "8192"]);
}

#[test]
fn segments_behave_as_on_one_machine() {
    let lab = Lab::new(3);
    lab.spread("basic", 2, &[]);
    lab.spread("fork", 2, &[]);
    lab.spread("threads", 3, &["--ops", "300"]);
    lab.spread("syscallraw", 2, &["--ops", "300"]);
    lab.spread("latecomer", 3, &["--rounds", "20"]);
}

#[test]
fn system_calls_reach_pages_that_another_node_holds() {
    Lab::new(3).spread("kernelio", 3, &[]);
}

#[test]
fn nodes_compute_what_one_process_computes() {
    let lab = Lab::new(3);
    lab.spread("heat", 3, &["--steps", "50"]);
    lab.spread("heat", 3, &["--steps", "20", "--sor"]);
    lab.spread("matmul", 3, &["--size", "200"]);
    lab.spread("intsort", 3, &[]);
    lab.spread("tsp", 3, &["--cities", "14"]);
    lab.spread("water", 3, &["--steps", "4"]);
    lab.spread("pipeline", 3, &["--blocks", "100"]);
    lab.spread("hashtable", 3, &["--ops", "500"]);
    let picture = lab.directory().join("picture");
    let picture = picture.to_str().expect("a plain path");
    let options = ["--width", "160", "--height", "100", "--self-check"];
    lab.spread(
        "mandelbrot",
        3,
        &[&options[..], &["--output", picture]].concat(),
    );
}

#[test]
fn a_segment_may_be_larger_than_the_memory_of_any_node() {
    let lab = Lab::with(4, &["--memory", "16M"]);
    lab.spread("bigseg", 4, &["--mib", "32", "--ops", "500"]);
    let gave_up = |node| lab.status(node)["coherence"]["write_backs"].as_u64();
    assert!((1..=4).any(|node| gave_up(node) > Some(0)));
}

#[test]
fn no_link_between_living_nodes_breaks_under_a_burst_of_pages() {
    for _ in 0..5 {
        let lab = Lab::with(4, &["--memory", "16M"]);
        let options = ["--mib", "32", "--ops", "100", "--timeout", "60"];
        lab.spread("bigseg", 4, &options);
        for node in 1..=4 {
            let log = lab.directory().join(format!("node{node}.log"));
            let log = std::fs::read_to_string(log).expect("the lab's log");
            assert!(!log.contains("ERROR"), "{log}");
        }
    }
}

#[test]
fn a_late_attach_cannot_write_a_shared_page_unseen() {
    let lab = Lab::new(2);
    for reader_stays in [true, false] {
        let mut writer = lab.start(1, "sysv");
        writer.obey("segment 1 65536");
        writer.obey("fill 1");
        // Now both nodes have the pages, for reading.
        let mut reader = lab.start(2, "sysv");
        reader.obey("segment 1 65536");
        reader.obey("check 1");
        writer.obey("check 1");
        let reader = reader_stays.then_some(reader);

        let mut latecomer = lab.start(2, "sysv");
        latecomer.obey("segment 1 65536");
        latecomer.obey("fill 2");
        writer.obey("check 2");
        if let Some(mut reader) = reader {
            reader.obey("check 2");
        }
        writer.obey("remove");
    }
}

#[test]
fn a_process_that_attaches_again_sees_what_others_wrote_meanwhile() {
    let lab = Lab::new(2);
    let mut first = lab.start(1, "sysv");
    let mut second = lab.start(2, "sysv");
    first.obey("segment 1 65536");
    second.obey("segment 1 65536");
    for round in 0..50 {
        let (writer, reader) = match round % 2 {
            0 => (&mut first, &mut second),
            _ => (&mut second, &mut first),
        };
        reader.obey("detach");
        writer.obey(&format!("fill {round}"));
        reader.obey("attach");
        reader.obey(&format!("check {round}"));
    }
    first.obey("remove");
}

#[test]
fn a_storm_of_short_lived_objects_leaves_nothing() {
    let lab = Lab::new(4);
    let hosts = ["coordinator", "node1", "node2", "node3", "node4"];
    let open =
        || -> BTreeMap<&str, usize> { hosts.map(|host| (host, descriptors(lab.pid(host)))).into() };
    // Links between the nodes are made by first use.
    lab.spread("churn", 8, &["--seconds", "1"]);
    let settled = || {
        (1..=4).all(|node| {
            let status = lab.status(node);
            // The one that asks is a process as well.
            status["segments"] == 0
                && status["address_spaces"] == 0
                && status["pending_calls"] == 0
                && status["processes"] == 1
                && status["resident"] == 0
        })
    };
    eventually("the nodes forget what is gone", settled);
    let before = open();
    for _ in 0..3 {
        lab.spread("churn", 16, &["--seconds", "1"]);
    }
    eventually("the nodes forget what is gone", settled);
    eventually("descriptors are closed", || open() == before);
    let empty = "{\"messages\":[],\"semaphores\":[],\"sharedmemory\":[]}";
    assert_eq!(lab.ipcs().to_string(), empty);
    for node in 1..=4 {
        let status = lab.status(node);
        assert_eq!(status["coherence"]["protocol_errors"], 0, "{status}");
    }
}

#[test]
fn objects_of_one_node_are_listed_and_removed_on_another() {
    let lab = Lab::new(2);
    let mut process = lab.start(1, "sysv");
    process.obey("segment 0x51 4096");
    process.obey("semaphore 0x52");
    process.obey("queue 0x53");
    process.obey("send 1");
    let listed = lab.ipcs();
    assert_eq!(listed["sharedmemory"][0]["key"], "0x00000051");
    assert_eq!(listed["semaphores"][0]["key"], "0x00000052");
    assert_eq!(listed["messages"][0]["key"], "0x00000053");
    assert_eq!(listed["messages"][0]["msgs"], 1);
    let mut remove = lab.inside(migshm_tests::built("target/release/migshm"));
    remove
        .args(["ipcrm", "-M", "0x51", "-S", "0x52", "-Q", "0x53"])
        .env("MIGSHM_RUNTIME_DIR", lab.node(2));
    run(&mut remove).succeeded();
    assert_eq!(process.ask("value"), "EINVAL");
    assert_eq!(process.ask("queued"), "EINVAL");
    // It lives, nameless, until the last detach.
    assert_eq!(process.ask("nattch"), "1");
    process.obey("detach");
    assert_eq!(process.ask("nattch"), "EINVAL");
}

#[test]
fn what_happened_to_attaches_counts_for_who_is_told_on_another_node() {
    let lab = Lab::new(2);
    let mut counted = lab.inside(program("counted"));
    run(counted.arg("node2").env("LD_PRELOAD", library())).succeeded();
}
