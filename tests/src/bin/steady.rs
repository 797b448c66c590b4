//! `steady`: one cluster, programs over and over, and what its daemons need: it must not grow.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use migshm_tests::{Lab, descriptors};

/// Runs programs of every kind on one cluster of this machine, over and over, records memory and
/// descriptors of its daemons and how long the programs took, and fails if either of the first two grows.
#[derive(Debug, Parser)]
struct Args {
    /// For how long.
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 4)]
    nodes: usize,
    /// Where the records go: a line for each round.
    #[arg(long, default_value = "target/steady.csv")]
    output: PathBuf,
}

/// Programs of `c-tests` with their options.
const PROGRAMS: [(&str, &[&str]); 9] = [
    ("heat", &["--steps", "20"]),
    ("matmul", &["--size", "200"]),
    ("intsort", &[]),
    ("tsp", &["--cities", "13"]),
    ("water", &["--steps", "3"]),
    ("pipeline", &["--blocks", "100"]),
    ("hashtable", &["--ops", "500"]),
    ("killed", &["--rounds", "20"]),
    ("killattach", &["--rounds", "10"]),
];

/// What memory a daemon may need more than before, in KiB: an allocator's noise.
const NOISE: u64 = 2_048;

/// What a daemon has.
#[derive(Clone, Copy, Debug)]
struct Needs {
    /// Memory of its own, in KiB.
    memory: u64,
    descriptors: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let lab = Lab::new(args.nodes);
    let hosts: Vec<String> = std::iter::once("coordinator".to_owned())
        .chain((1..=args.nodes).map(|node| format!("node{node}")))
        .collect();
    let pids: Vec<i32> = hosts.iter().map(|host| lab.pid(host)).collect();
    let mut output = File::create(&args.output).expect("the output can be written");
    let columns = hosts
        .iter()
        .map(|host| format!(",{host} KiB,{host} descriptors"));
    let columns: String = columns.collect();
    writeln!(output, "seconds,round{columns}").expect("the output can be written");
    let start = Instant::now();
    let mut rounds: Vec<(Duration, Vec<Needs>)> = Vec::new();
    while start.elapsed() < Duration::from_secs(60 * args.minutes) {
        let begun = Instant::now();
        for (name, options) in PROGRAMS {
            lab.spread(name, args.nodes, options);
            lab.spread_released(name, args.nodes, options);
        }
        let took = begun.elapsed();
        let needs: Vec<Needs> = pids.iter().map(|&pid| needs(pid)).collect();
        let line = needs
            .iter()
            .map(|n| format!(",{},{}", n.memory, n.descriptors));
        let line: String = line.collect();
        let (seconds, took_s) = (start.elapsed().as_secs(), took.as_secs_f64());
        writeln!(output, "{seconds},{took_s:.2}{line}").expect("the output can be written");
        rounds.push((took, needs));
    }
    // The first third warms up.
    let third = rounds.len() / 3;
    if third == 0 {
        eprintln!("steady: {} rounds are too few to judge", rounds.len());
        return ExitCode::from(2);
    }
    let (early, late) = (&rounds[third..2 * third], &rounds[rounds.len() - third..]);
    let mut grows = false;
    println!(
        "median of the second third of {} rounds, and of the last:",
        rounds.len()
    );
    for (place, host) in hosts.iter().enumerate() {
        let of = |rounds: &[(Duration, Vec<Needs>)], what: fn(&Needs) -> u64| {
            median(rounds.iter().map(|(_, needs)| what(&needs[place])))
        };
        let memory = [early, late].map(|part| of(part, |n| n.memory));
        let open = [early, late].map(|part| of(part, |n| n.descriptors));
        let grown = memory[1] > memory[0] + memory[0] / 20 + NOISE || open[1] > open[0];
        grows |= grown;
        println!(
            "{host:12} {:>8} {:>8} KiB {:>5} {:>5} descriptors{}",
            memory[0],
            memory[1],
            open[0],
            open[1],
            if grown { "  GROWS" } else { "" }
        );
    }
    let took =
        [early, late].map(|part| median(part.iter().map(|(took, _)| took.as_millis() as u64)));
    println!(
        "a round took {} and {} ms; {}",
        took[0],
        took[1],
        args.output.display()
    );
    ExitCode::from(u8::from(grows))
}

fn needs(pid: i32) -> Needs {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon lives");
    let memory = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let memory = memory.and_then(|text| text.trim().strip_suffix(" kB"));
    Needs {
        memory: memory.and_then(|text| text.parse().ok()).expect("proc(5)"),
        descriptors: descriptors(pid) as u64,
    }
}

fn median(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values[values.len() / 2]
}
