//! Faults at seeded times; see `migshm_tests::chaos`. `scripts/soak` does the same with new seeds, for long.

use std::time::Duration;

use migshm_tests::chaos::schedule::Fault;
use migshm_tests::chaos::{Setup, run};
use migshm_tests::is_root_for;
use migshm_tests::random::seed;

/// Runs a seed that the environment or the time chooses, and the next.
#[track_caller]
fn survives(faults: &[Fault]) {
    let first = seed("CHAOS_SEED");
    (first..first + 2).for_each(|seed| run_one(seed, faults));
}

#[track_caller]
fn run_one(seed: u64, faults: &[Fault]) {
    let setup = Setup {
        seed,
        nodes: 3,
        clients: 6,
        time: Duration::from_secs(6),
        faults: faults.to_vec(),
    };
    let report = run(&setup);
    report.assert_right(seed);
    if let Some(reason) = report.void {
        eprintln!("not judged: {reason}");
    }
}

#[test]
fn clients_that_are_killed_and_stopped_harm_nobody() {
    survives(&[Fault::KillProcess, Fault::StopProcess]);
}

#[test]
fn daemons_that_are_stopped_coordinators_that_are_killed_and_links_that_are_cut_go_on() {
    if !is_root_for("a network that can be cut") {
        return;
    }
    survives(&Fault::SURVIVED);
}
