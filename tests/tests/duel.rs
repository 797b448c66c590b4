//! Random programs of System V calls by several processes of several users, on the kernel's own IPC
//! and under the preload: they must print the same. See `programs/duel.c`.
//!
//! `DUEL_SEEDS=200 cargo test --release -p migshm-tests --test duel` makes a million calls. Seeds
//! are consecutive numbers from `DUEL_FIRST`, else from one that differs from run to run.

use std::env;
use std::process::Command;
use std::time::UNIX_EPOCH;

use migshm_tests::{Solo, is_root_for, program, run};

const STEPS: &str = "5000";
/// Lines shown before and from the first difference.
const SHOWN: usize = 12;

#[test]
fn random_programs_print_what_they_print_on_the_kernel() {
    if !is_root_for("an IPC namespace for the kernel's side") {
        return;
    }
    let first = number("DUEL_FIRST").unwrap_or_else(|| {
        UNIX_EPOCH
            .elapsed()
            .map_or(0, |elapsed| elapsed.as_secs() % 1_000_000)
    });
    let seeds = number("DUEL_SEEDS").unwrap_or(6);
    for seed in first..first + seeds {
        let solo = Solo::for_all_users();
        let duel = solo.install(&program("duel"));
        let mut native = Command::new("unshare");
        native.arg("--ipc").arg(&duel);
        compare(seed, native, solo.preloaded(&duel));
    }
}

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok()?.parse().ok()
}

/// Runs the same program on both sides.
#[track_caller]
fn compare(seed: u64, native: Command, ours: Command) {
    let printed = |mut side: Command| {
        let outcome = run(side.args([&seed.to_string(), STEPS]));
        outcome.succeeded().stdout
    };
    let (native, ours) = (printed(native), printed(ours));
    assert!(native.ends_with("end\n"), "{native}");
    let differs = native.lines().zip(ours.lines()).position(|(n, o)| n != o);
    if let Some(line) = differs {
        let shown = |text: &str| {
            let from = text.lines().skip(line.saturating_sub(SHOWN));
            from.take(2 * SHOWN).collect::<Vec<_>>().join("\n")
        };
        panic!(
            "seed {seed}, line {line}\n== kernel\n{}\n== migshm\n{}",
            shown(&native),
            shown(&ours)
        );
    }
    assert_eq!(
        native.len(),
        ours.len(),
        "seed {seed}: one side stopped early"
    );
}
