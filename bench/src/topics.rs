//! What can be measured by itself.

use clap::builder::{PossibleValue, PossibleValuesParser};

/// Name of each topic, and what its figures are about.
const ALL: [(&str, &str); 19] = [
    ("attach", "life of a segment"),
    ("touch", "first touch of a page"),
    (
        "stream",
        "a segment read and written from its beginning to its end",
    ),
    ("random", "random access to a segment"),
    ("semop", "semop without a wait"),
    (
        "pingpong",
        "semop of two processes that wait for each other",
    ),
    (
        "coordinator",
        "semaphore operations of many nodes at one coordinator",
    ),
    ("fork", "fork with an attach"),
    ("start", "start of a program"),
    ("fault", "remote page faults"),
    ("scan", "sequential read of a remote segment"),
    ("handover", "hand-over of a guarded page between nodes"),
    ("busy", "remote page faults while all cores compute"),
    (
        "sharing",
        "two nodes that write the same pages between barriers",
    ),
    ("upgrade", "writes to pages that two others have read"),
    ("matmul", "speed-up of a matrix product by a second node"),
    ("tsp", "speed-up of the travelling salesman"),
    ("sort", "speed-up of an integer sort"),
    ("jacobi", "speed-up of a Jacobi iteration"),
];

/// The topics that are wanted; none means all.
#[derive(Clone, Debug)]
pub struct Topics(pub Vec<String>);

impl Topics {
    /// Whether this one is.
    #[must_use]
    pub fn want(&self, topic: &str) -> bool {
        debug_assert!(ALL.iter().any(|(name, _)| *name == topic));
        self.0.is_empty() || self.0.iter().any(|wanted| wanted == topic)
    }
}

/// What the command line takes for a topic.
#[must_use]
pub fn names() -> PossibleValuesParser {
    ALL.map(|(name, meaning)| PossibleValue::new(name).help(meaning))
        .into()
}
