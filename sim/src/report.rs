//! What a run has shown.

use migshm_coherence::Time;
use serde::Serialize;

use crate::cluster::Cluster;
use crate::workload::Workload;

/// One workload on one number of nodes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// [`Workload::name`].
    pub workload: String,
    /// What an operation is.
    pub unit: &'static str,
    /// Nodes.
    pub nodes: usize,
    /// Operations.
    pub operations: u64,
    /// Faults of an operation.
    pub faults: f64,
    /// Messages between nodes for each fault; 0 where there are no faults.
    pub messages_per_fault: f64,
    /// Messages between nodes for each operation.
    pub messages: f64,
    /// Their bytes.
    pub bytes: f64,
    /// Messages from and to the coordinator for each operation.
    pub control_messages: f64,
    /// Their bytes.
    pub control_bytes: f64,
    /// Messages from and to the coordinator for each `semop`; 0 where there are none.
    pub control_messages_per_semop: f64,
    /// Microseconds of an operation; where nodes do them side by side, of one node's.
    pub time: f64,
    /// Median of a read fault in microseconds.
    pub read_median: f64,
    /// Median of a write fault in microseconds.
    pub write_median: f64,
    /// 99th percentile of a write fault in microseconds.
    pub write_p99: f64,
    /// Messages that the coordinator handled, for each second of the run.
    pub coordinator_rate: f64,
    /// For how much of the run the coordinator was busy.
    pub coordinator_busy: f64,
    /// For how much of the run the busiest node's daemon was busy.
    pub busiest_node: f64,
    /// What that daemon handled, as a multiple of what daemons handled on average.
    pub imbalance: f64,
    /// Pages that were touched.
    pub touched: usize,
    /// Bytes of directory for each touched page.
    pub directory: f64,
    /// Bytes of all nodes' own parts for each touched page and node.
    pub lines: f64,
}

impl Row {
    /// Of a cluster whose programs have ended.
    #[must_use]
    pub fn of(workload: Workload, cluster: &Cluster) -> Row {
        let counts = cluster.counts();
        let nodes = cluster.len() as f64;
        let operations = counts.operations as f64;
        let faults = (counts.reads.len() + counts.writes.len()) as f64;
        let duration = cluster.duration() as f64;
        let mut loads = cluster.loads();
        let (handled, busy) = loads.next_back().unwrap_or_default();
        let loads: Vec<(u64, Time)> = loads.collect();
        let busiest = loads.iter().max().copied().unwrap_or_default();
        let mean = loads.iter().map(|(handled, _)| *handled).sum::<u64>() as f64 / nodes;
        let footprint = cluster.footprint();
        let beside = if workload.is_serial() { 1.0 } else { nodes };
        Row {
            workload: workload.name(),
            unit: workload.unit(),
            nodes: cluster.len(),
            operations: counts.operations,
            faults: per(faults, operations),
            messages_per_fault: per(counts.messages as f64, faults),
            messages: per(counts.messages as f64, operations),
            bytes: per(counts.bytes as f64, operations),
            control_messages: per(counts.control_messages as f64, operations),
            control_bytes: per(counts.control_bytes as f64, operations),
            control_messages_per_semop: per(counts.control_messages as f64, counts.semops as f64),
            time: per(duration * beside, operations) / 1e3,
            read_median: quantile(&counts.reads, 0.5),
            write_median: quantile(&counts.writes, 0.5),
            write_p99: quantile(&counts.writes, 0.99),
            coordinator_rate: per(handled as f64, duration / 1e9),
            coordinator_busy: per(busy as f64, duration),
            busiest_node: per(busiest.1 as f64, duration),
            imbalance: per(busiest.0 as f64, mean),
            touched: footprint.touched,
            directory: per(footprint.directory as f64, footprint.touched as f64),
            lines: per(footprint.lines as f64, footprint.touched as f64 * nodes),
        }
    }
}

/// A table of rows for people.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut table = format!(
        "{:<15}{:>6}{:>9}{:>9}{:>10}{:>11}{:>10}{:>9}{:>10}{:>10}{:>11}{:>8}{:>8}{:>8}\n",
        "workload",
        "nodes",
        "msg/op",
        "msg/flt",
        "bytes/op",
        "coord/op",
        "us/op",
        "read us",
        "write us",
        "w p99 us",
        "coord/s",
        "coord",
        "node",
        "dir B",
    );
    for row in rows {
        table += &format!(
            "{:<15}{:>6}{:>9.1}{:>9.2}{:>10.0}{:>11.2}{:>10.1}{:>9.0}{:>10.0}{:>10.0}{:>11.0}{:>7.0}%{:>7.0}%{:>8.1}\n",
            row.workload,
            row.nodes,
            row.messages,
            row.messages_per_fault,
            row.bytes,
            row.control_messages,
            row.time,
            row.read_median,
            row.write_median,
            row.write_p99,
            row.coordinator_rate,
            100.0 * row.coordinator_busy,
            100.0 * row.busiest_node,
            row.directory,
        );
    }
    table
}

fn per(amount: f64, of: f64) -> f64 {
    if of == 0.0 { 0.0 } else { amount / of }
}

/// In microseconds; 0 if there is none.
fn quantile(times: &[Time], q: f64) -> f64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    let at = (q * times.len() as f64) as usize;
    let time = times.get(at.min(times.len().saturating_sub(1)));
    time.map_or(0.0, |&time| time as f64 / 1e3)
}
