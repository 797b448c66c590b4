//! Small clusters: everything comes to its end, and costs what the protocol says.

use migshm_sim::{Costs, Row, Workload, run};

fn row(workload: Workload, nodes: usize) -> Row {
    run(workload, nodes, 1, Costs::default())
}

#[test]
fn every_workload_ends_with_every_read_fresh() {
    for &workload in Workload::all() {
        for nodes in [2, 3, 8, 33] {
            for seed in 0..4 {
                let row = run(workload, nodes, seed, Costs::default());
                assert!(row.operations > 0, "{workload:?}");
            }
        }
    }
}

#[test]
fn a_run_follows_from_its_seed() {
    let once = |seed| run(Workload::FalseSharing, 16, seed, Costs::default());
    assert_eq!(once(7), once(7));
    assert_ne!(once(7).time, once(8).time);
}

#[test]
fn a_first_touch_takes_a_request_and_a_grant_until_the_home_follows() {
    for nodes in [2, 16, 64] {
        let others = (nodes - 1) as f64 / nodes as f64;
        let messages = row(Workload::Private, nodes).messages;
        assert!(messages > 0.0 && messages <= 2.0 * others, "{messages}");
    }
}

/// Each reader's request and grant, and in the second of two rounds the end of its copy. (A single
/// reader would become the home.)
#[test]
fn a_page_that_its_home_writes_and_others_read_takes_three_messages_a_reader() {
    for nodes in [4, 16, 64] {
        assert_eq!(row(Workload::Consumers, nodes).messages, 3.0);
    }
}

#[test]
fn a_barrier_takes_two_calls_and_their_answers_a_node() {
    for nodes in [4, 16, 64] {
        let row = row(Workload::Barrier, nodes);
        assert_eq!(row.control_messages, 4.0 * nodes as f64);
        assert_eq!(row.messages, 0.0);
    }
}

#[test]
fn a_hand_over_of_a_lock_costs_no_more_in_a_larger_cluster() {
    let (small, large) = (row(Workload::Migratory, 32), row(Workload::Migratory, 128));
    assert_eq!(small.control_messages, 4.0);
    assert_eq!(large.control_messages, 4.0);
    assert!(large.messages < 1.05 * small.messages);
}

#[test]
fn a_directory_takes_sixteen_bytes_a_touched_page_at_most() {
    for &workload in Workload::all() {
        let row = row(workload, 128);
        assert!(row.touched < 64 || row.directory <= 16.0, "{row:?}");
    }
}
