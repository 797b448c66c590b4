//! `chaos`: faults at random times, for seeds one after the other, until something is wrong.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use migshm_tests::chaos::schedule::Fault;
use migshm_tests::chaos::{Setup, run};

/// Injects faults into clusters of this machine while clients work on them, and judges what the
/// clients saw.
#[derive(Debug, Parser)]
struct Args {
    /// The first seed; another one for each run. A seed determines the faults and their times.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds.
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// As many seeds as take this many minutes, instead.
    #[arg(long)]
    minutes: Option<u64>,
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Clients, which are spread over the nodes.
    #[arg(long, default_value_t = 6)]
    clients: usize,
    /// Seconds for which faults are injected in a run.
    #[arg(long, default_value_t = 10)]
    time: u64,
    /// Which faults, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = Fault::SURVIVED.map(|f| f.name().to_owned()))]
    faults: Vec<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let faults: Result<Vec<Fault>, String> = args.faults.iter().map(|name| name.parse()).collect();
    let faults = match faults {
        Ok(faults) => faults,
        Err(error) => {
            eprintln!("chaos: {error}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let minutes = args
        .minutes
        .map(|minutes| Duration::from_secs(60 * minutes));
    let (mut runs, mut operations, mut injected, mut void) = (0, 0, 0, 0);
    while minutes.map_or(runs < args.runs, |time| start.elapsed() < time) {
        let setup = Setup {
            seed: args.seed.wrapping_add(runs),
            nodes: args.nodes,
            clients: args.clients,
            time: Duration::from_secs(args.time),
            faults: faults.clone(),
        };
        let report = run(&setup);
        let kind = if report.schedule.release {
            "release"
        } else {
            "sequential"
        };
        let events = &report.schedule.events;
        let verdict = match &report.void {
            Some(reason) => format!("not judged, {reason}"),
            None if report.wrong.is_empty() => "right".to_owned(),
            None => "WRONG".to_owned(),
        };
        println!(
            "seed {}: {kind}, {} faults, {} operations: {verdict}",
            setup.seed,
            events.len(),
            report.operations,
        );
        if !report.wrong.is_empty() {
            events.iter().for_each(|event| println!("{event}"));
            report.wrong.iter().for_each(|wrong| println!("\n{wrong}"));
            println!(
                "\nagain: chaos --seed {} --nodes {} --clients {} --time {} --faults {}",
                setup.seed,
                args.nodes,
                args.clients,
                args.time,
                args.faults.join(",")
            );
            return ExitCode::FAILURE;
        }
        runs += 1;
        if report.void.is_some() {
            void += 1;
            continue;
        }
        operations += report.operations;
        injected += events.len();
    }
    let judged = runs - void;
    println!(
        "{judged} runs, {injected} faults, {operations} operations, nothing wrong; {void} not judged"
    );
    ExitCode::SUCCESS
}
