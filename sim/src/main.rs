//! `migshm-sim`: see the library.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use migshm_sim::plot::{Curve, plot};
use migshm_sim::{Costs, Row, Workload, coordinator, report, run};

/// What clusters of up to 1024 nodes cost, on a simulated network.
#[derive(Debug, Parser)]
#[command(name = "migshm-sim", version)]
struct Args {
    /// What to look at.
    #[arg(value_enum, default_value = "cluster")]
    subject: Subject,
    /// The largest number of nodes; the others are the powers of two below.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u16).range(2..=1024))]
    nodes: u16,
    /// Workloads instead of all of them.
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Everything follows from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Shortest time of a message on its way, in microseconds.
    #[arg(long, default_value_t = Costs::default().latency / 1000)]
    latency: u64,
    /// Mean of what comes on top of that, in microseconds.
    #[arg(long, default_value_t = Costs::default().jitter / 1000)]
    jitter: u64,
    /// What a host can send, in megabytes per second.
    #[arg(long, default_value_t = Costs::default().bandwidth / 1_000_000)]
    bandwidth: u64,
    /// Processor time to handle a message, in nanoseconds.
    #[arg(long, default_value_t = Costs::default().receive)]
    receive: u64,
    /// Processor time to send one, in nanoseconds.
    #[arg(long, default_value_t = Costs::default().send)]
    send: u64,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Also draw the curves, into this directory.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Subject {
    /// Workloads on whole clusters.
    Cluster,
    /// The real time that the coordinator's calls take, as its tables grow.
    Coordinator,
}

/// A picture: its file, its title, its axis, and what it shows of a row.
type Picture = (&'static str, &'static str, &'static str, fn(&Row) -> f64);

/// Bytes for each touched page that a directory is to take at most.
const DIRECTORY_LIMIT: f64 = 16.0;

const PICTURES: [Picture; 8] = [
    (
        "messages",
        "Messages between nodes",
        "for each operation",
        |row| row.messages,
    ),
    (
        "bytes",
        "Bytes between nodes",
        "for each operation",
        |row| row.bytes,
    ),
    (
        "coordinator",
        "Messages of the coordinator",
        "for each operation",
        |row| row.control_messages,
    ),
    (
        "load",
        "Load of the coordinator",
        "messages in each second",
        |row| row.coordinator_rate,
    ),
    ("time", "Time of an operation", "us", |row| row.time),
    ("write-fault", "Write fault", "us, median", |row| {
        row.write_median
    }),
    (
        "busiest",
        "Load of the busiest node",
        "multiple of the mean",
        |row| row.imbalance,
    ),
    (
        "directory",
        "Directory",
        "bytes for each touched page",
        // That of a few pages is mostly what any extent has.
        |row| if row.touched < 64 { 0.0 } else { row.directory },
    ),
];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let rows = match args.subject {
        Subject::Cluster => rows(&args),
        Subject::Coordinator => {
            let rows = coordinator::grow();
            if args.json {
                println!("{}", serde_json::to_string_pretty(&rows)?);
            } else {
                print!("{}", coordinator::table(&rows));
            }
            return Ok(());
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", report::table(&rows));
    }
    if let Some(directory) = args.svg {
        std::fs::create_dir_all(&directory)?;
        for (file, title, axis, value) in PICTURES {
            let limit = (file == "directory").then_some(DIRECTORY_LIMIT);
            let svg = plot(title, axis, limit, &curves(&rows, value));
            std::fs::write(directory.join(file).with_extension("svg"), svg)?;
        }
    }
    Ok(())
}

fn rows(args: &Args) -> Vec<Row> {
    let costs = Costs {
        latency: args.latency * 1000,
        jitter: args.jitter * 1000,
        bandwidth: args.bandwidth * 1_000_000,
        receive: args.receive,
        send: args.send,
    };
    let workloads = match &args.workload[..] {
        [] => Workload::all(),
        chosen => chosen,
    };
    let most = usize::from(args.nodes);
    let sizes = || (1..=10).map(|power| 1 << power).filter(move |&n| n <= most);
    let runs = workloads.iter().flat_map(|&w| sizes().map(move |n| (w, n)));
    runs.map(|(workload, nodes)| run(workload, nodes, args.seed, costs))
        .collect()
}

fn curves(rows: &[Row], value: fn(&Row) -> f64) -> Vec<Curve> {
    let curve = |(index, workload): (usize, &Workload)| {
        let of = rows.iter().filter(|row| row.workload == workload.name());
        let points = of.map(|row| (row.nodes as f64, value(row)));
        let spread = Workload::all()[..=index].iter();
        Curve {
            name: workload.name(),
            // Where the homes are spread: the colour of the workload before.
            colour: index - spread.filter(|w| w.has_spread_homes()).count(),
            is_dashed: workload.has_spread_homes(),
            points: points.filter(|(_, y)| *y > 0.0).collect(),
        }
    };
    let all = Workload::all().iter().enumerate().map(curve);
    all.filter(|curve| !curve.points.is_empty()).collect()
}
