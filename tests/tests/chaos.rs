//! Faults at seeded times; see `migshm_tests::chaos`. `scripts/soak` does the same with new seeds, for long.

use std::time::Duration;

use migshm_tests::chaos::schedule::Fault;
use migshm_tests::chaos::{Setup, run};
use migshm_tests::is_root_for;

/// Runs a seed whose segments have, or have not, release consistency.
#[track_caller]
fn survives(seed: u64, release: bool, faults: &[Fault]) {
    let setup = Setup {
        seed,
        nodes: 3,
        clients: 6,
        time: Duration::from_secs(6),
        faults: faults.to_vec(),
    };
    let report = run(&setup);
    let shown: Vec<String> = report
        .schedule
        .events
        .iter()
        .map(ToString::to_string)
        .collect();
    let wrong = report.wrong.join("\n\n");
    assert!(wrong.is_empty(), "{}\n\n{wrong}", shown.join("\n"));
    assert_eq!(report.schedule.release, release);
    if let Some(reason) = report.void {
        eprintln!("not judged: {reason}");
    }
    assert!(report.operations > 0);
}

#[test]
fn clients_that_are_killed_and_stopped_harm_nobody() {
    survives(1, true, &[Fault::KillProcess, Fault::StopProcess]);
    survives(2, false, &[Fault::KillProcess, Fault::StopProcess]);
}

#[test]
fn daemons_that_are_stopped_and_links_that_are_cut_for_a_moment_go_on() {
    if !is_root_for("a network that can be cut") {
        return;
    }
    survives(1, true, &Fault::SURVIVED);
    survives(2, false, &Fault::SURVIVED);
}
