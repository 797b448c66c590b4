//! Attaches that a program moves, resizes, doubles and covers: what it sees there is the segment
//! of all nodes, and what it put there instead stays its own.

use migshm_tests::{Lab, Process};

const BYTES: u64 = 16 * 4096;

/// What has a mover call the kernel itself from then on.
const PAST_THE_LIBRARY: &str = "raw 1";

/// Whether a segment is tracked already when something is done to an attach of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Before,
    After,
}

/// A mover on node 1, and a process of node 2 that shares a new segment with it.
fn moved(lab: &Lab, when: When, deeds: &[&str]) -> (Process, Process) {
    let mut mover = lab.start(1, "mover");
    let mut other = lab.start(2, "sysv");
    let key = mover_key();
    mover.obey(&format!("segment {key} {BYTES}"));
    mover.obey("fill 1");
    if when == When::After {
        other.obey(&format!("segment {key} {BYTES}"));
        other.obey("check 1");
    }
    for deed in deeds {
        mover.obey(deed);
    }
    if !deeds.contains(&PAST_THE_LIBRARY) {
        let attaches = if when == When::Before { "1" } else { "2" };
        assert_eq!(mover.ask("nattch"), attaches, "{deeds:?}");
    }
    if when == When::Before {
        other.obey(&format!("segment {key} {BYTES}"));
    }
    (mover, other)
}

/// A key that no other segment of this test process has.
fn mover_key() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static LAST: AtomicU32 = AtomicU32::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// Both see what either writes, `turns` times over.
#[track_caller]
fn share(mover: &mut Process, other: &mut Process, covered: bool) {
    if !covered {
        // At once: pages may be here that only reading is granted of.
        mover.obey("fill 2");
        other.obey("check 2");
    }
    for value in (10..30).step_by(2) {
        other.obey(&format!("fill {value}"));
        mover.obey(&format!("check {value}"));
        if !covered {
            mover.obey(&format!("fill {}", value + 1));
            mover.obey(&format!("check {}", value + 1));
            other.obey(&format!("check {}", value + 1));
        }
    }
}

#[test]
fn moved_attaches_are_coherent() {
    let lab = Lab::new(2);
    for when in [When::Before, When::After] {
        for deed in ["move", "onto", "resize", "double", "stay", "cover", "bury"] {
            eprintln!("{when:?}: {deed}");
            let (mut mover, mut other) = moved(&lab, when, &[deed]);
            share(&mut mover, &mut other, deed == "cover");
            assert_eq!(other.ask("nattch"), "2", "{deed}");
        }
    }
}

#[test]
fn attaches_that_are_moved_past_the_library_are_coherent() {
    let lab = Lab::new(2);
    for (when, deed) in [
        (When::Before, "move"),
        (When::Before, "onto"),
        (When::Before, "resize"),
        (When::Before, "double"),
        (When::Before, "stay"),
        (When::Before, "cover"),
        (When::After, "move"),
        (When::After, "onto"),
        (When::After, "stay"),
    ] {
        eprintln!("{when:?}: {deed}");
        let (mut mover, mut other) = moved(&lab, when, &[PAST_THE_LIBRARY, deed]);
        share(&mut mover, &mut other, deed == "cover");
        assert_eq!(other.ask("nattch"), "2", "{deed}");
    }
}
