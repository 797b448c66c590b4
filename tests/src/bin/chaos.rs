//! `chaos`: faults at random times, for seeds one after the other, until something is wrong.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use migshm_tests::chaos::schedule::Fault;
use migshm_tests::chaos::{Setup, run, run_failovers};

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
    /// Instead, kill the coordinator that leads and the member of etcd that leads so often each in a run.
    #[arg(long, value_name = "TIMES", conflicts_with_all = ["faults", "time"])]
    failovers: Option<usize>,
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
    let mut pauses: Vec<(Fault, Duration)> = Vec::new();
    let (mut runs, mut operations, mut injected, mut void) = (0, 0, 0, 0);
    while minutes.map_or(runs < args.runs, |time| start.elapsed() < time) {
        let setup = Setup {
            seed: args.seed.wrapping_add(runs),
            nodes: args.nodes,
            clients: args.clients,
            time: Duration::from_secs(args.time),
            faults: match args.failovers {
                Some(_) => Fault::OF_LEADERS.to_vec(),
                None => faults.clone(),
            },
        };
        let report = match args.failovers {
            Some(turns) => run_failovers(&setup, turns),
            None => run(&setup),
        };
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
        if args.failovers.is_some() {
            pauses.extend(events.iter().map(|event| (event.fault, event.lasts)));
        }
        if !report.wrong.is_empty() {
            events.iter().for_each(|event| println!("{event}"));
            report.wrong.iter().for_each(|wrong| println!("\n{wrong}"));
            let what = match args.failovers {
                Some(turns) => format!("--failovers {turns}"),
                None => format!("--time {} --faults {}", args.time, args.faults.join(",")),
            };
            println!(
                "\nagain: chaos --seed {} --nodes {} --clients {} {what}",
                setup.seed, args.nodes, args.clients
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
    for fault in Fault::OF_LEADERS {
        let of_fault = pauses.iter().filter(|(of, _)| *of == fault);
        let mut times: Vec<f64> = of_fault.map(|(_, time)| time.as_secs_f64()).collect();
        times.sort_by(f64::total_cmp);
        if let (Some(longest), median) = (times.last(), times.get(times.len() / 2)) {
            let (name, count, median) = (fault.name(), times.len(), median.unwrap_or(longest));
            println!("{name}: {count} pauses, median {median:.1} s, longest {longest:.1} s");
        }
    }
    println!(
        "{judged} runs, {injected} faults, {operations} operations, nothing wrong; {void} not judged"
    );
    ExitCode::SUCCESS
}
