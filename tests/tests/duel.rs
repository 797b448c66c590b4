//! Random programs of System V calls by several processes of several users, on the kernel's own IPC
//! and under the preload, on one machine and spread over a cluster: they must print the same. See `programs/duel.c`.
//!
//! `DUEL_SEEDS=200 cargo test --release -p migshm-tests --test duel` makes a million calls. Seeds
//! are consecutive numbers from `DUEL_FIRST`, else from one that differs from run to run.

use std::ops::Range;
use std::process::Command;

use migshm_tests::random::{number, seed};
use migshm_tests::{Lab, Solo, assert_prints_as_on_the_kernel, is_root_for, library, program, run};

const STEPS: &str = "5000";
const NODES: usize = 3;

#[test]
fn random_programs_print_what_they_print_on_the_kernel() {
    if !is_root_for("an IPC namespace for the kernel's side") {
        return;
    }
    for seed in seeds() {
        let solo = Solo::for_all_users();
        let duel = solo.install(&program("duel"));
        compare(seed, &[], solo.preloaded(&duel));
    }
}

#[test]
fn random_programs_of_three_nodes_print_what_they_print_on_the_kernel() {
    if !is_root_for("an IPC namespace for the kernel's side") {
        return;
    }
    for seed in seeds() {
        let lab = Lab::new(NODES);
        let mut ours = lab.inside(program("duel"));
        ours.env("LD_PRELOAD", library());
        compare(seed, &[&NODES.to_string()], ours);
    }
}

fn seeds() -> Range<u64> {
    let first = seed("DUEL_FIRST");
    first..first + number("DUEL_SEEDS").unwrap_or(6)
}

/// Runs the same program on both sides; ours with more arguments.
#[track_caller]
fn compare(seed: u64, spread: &[&str], mut ours: Command) {
    let arguments = [&seed.to_string(), STEPS];
    let mut native = Command::new("unshare");
    native.arg("--ipc").arg(ours.get_program()).args(arguments);
    let native = run(&mut native).succeeded().stdout;
    let ours = run(ours.args(arguments).args(spread)).succeeded().stdout;
    assert_prints_as_on_the_kernel(&format!("seed {seed}"), &native, &ours);
}
