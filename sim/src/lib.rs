//! Whole clusters on a simulated network: what the protocols cost as the number of nodes grows.
//!
//! Every node runs the coherence engine and the home policy of the daemon, the coordinator its
//! own [`migshm_coordinator::Core`]; messages have the size that the codec gives them. Simulated
//! are the network, the processors' time for a message, and the programs ([`workload`]). A run
//! follows from its seed. What is read is compared with what was written last.
//!
//! The counts (messages, bytes, memory) are those of the real daemons. Times follow from
//! [`network::Costs`], so only their growth means something.
//!
//! # Left out
//!
//! QUIC's own packets (acknowledgements, keep-alives) and headers; the lease on delegated semaphore
//! sets (a message each way and second for a node that has any); processes that share a node;
//! evictions.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod coordinator;
pub mod network;
pub mod plot;
pub mod report;
pub mod workload;

mod random;

pub use cluster::Cluster;
pub use network::Costs;
pub use report::Row;
pub use workload::Workload;

/// Runs a workload on a cluster of `nodes` (2 to 1024); everything follows from the seed.
///
/// # Panics
///
/// If a protocol gets stuck, a message makes no sense, or a read returns something old.
#[must_use]
pub fn run(workload: Workload, nodes: usize, seed: u64, costs: Costs) -> Row {
    let mut cluster = Cluster::new(nodes, workload, seed, costs);
    cluster.run(|node| workload.program(node, nodes));
    Row::of(workload, &cluster)
}
