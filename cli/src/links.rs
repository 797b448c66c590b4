//! `migshm links`: which processes are strongly and which weakly linked, and what their accesses would
//! cost under another home policy.
//!
//! [`snapshot`] gets the nodes' access logs, from the cluster or from a file, and saves them; [`show`]
//! prints what [`migshm_coherence::links`] makes of them, [`replay`] what
//! [`migshm_coherence::replay`] does.

mod show;
mod snapshot;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use migshm_coherence::Policy;
use migshm_coherence::links::STRONG;
use migshm_coherence::replay::{self, Cost};
use serde_json::{Value, json};

use crate::tools::Daemon;
use snapshot::Snapshot;

/// Show which processes are linked through which segments: strongly, if they use the same pages in
/// turns, or weakly. Of the segments that you may read.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    daemon: Daemon,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// As a picture, for Graphviz: `migshm links --dot | dot -Tsvg`.
    #[arg(long, conflicts_with = "json")]
    dot: bool,
    /// Only the segment with this id or key.
    #[arg(long, value_name = "ID|KEY", value_parser = parse_number, allow_hyphen_values = true)]
    segment: Option<i32>,
    /// Pages that have to travel between two processes again, in a second, for their link to be strong.
    #[arg(long, value_name = "RATE", default_value_t = STRONG)]
    strong: f64,
    /// Save the logs, with the last requests to the homes, to a file.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Read the logs from a file, not from the cluster.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["save", "replay"])]
    load: Option<PathBuf>,
    /// Print what the requests in a saved log would have cost under the given policies.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["save", "dot"])]
    replay: Option<PathBuf>,
    /// A home policy to replay: stay, first-touch, follow, window,REQUESTS,DOMINANT or
    /// lead,REQUESTS
    /// [default: some of each].
    #[arg(long, value_name = "NAME[,PARAMETERS]", requires = "replay")]
    policy: Vec<Policy>,
}

/// Shows, saves or replays access logs.
pub fn links(args: Args) -> anyhow::Result<ExitCode> {
    let file = args.load.as_ref().or(args.replay.as_ref());
    let mut snapshot = match file {
        Some(file) => Snapshot::load(file)?,
        None => Snapshot::take(&args.daemon, args.segment, args.save.is_some())?,
    };
    if let Some(wanted) = args.segment {
        snapshot.segments.retain(|s| s.is_named(wanted));
        if snapshot.segments.is_empty() {
            bail!("no segment {wanted} that you may read");
        }
    }
    if let Some(file) = &args.save {
        snapshot.save(file)?;
    } else if args.replay.is_some() {
        replay_all(&snapshot, &args.policy, args.json)?;
    } else if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&show::json(&snapshot, args.strong))?
        );
    } else if args.dot {
        print!("{}", show::dot(&snapshot, args.strong));
    } else {
        print!("{}", show::table(&snapshot, args.strong));
    }
    Ok(ExitCode::SUCCESS)
}

fn replay_all(snapshot: &Snapshot, policies: &[Policy], json: bool) -> anyhow::Result<()> {
    let window = |requests, dominant| Policy::Window { requests, dominant };
    let usual = [
        Policy::Stay,
        Policy::FirstTouch,
        Policy::Follow,
        window(16, 12),
        window(64, 48),
        Policy::Lead(8),
        Policy::Lead(16),
        Policy::Lead(32),
        Policy::Lead(64),
    ];
    let policies = if policies.is_empty() {
        &usual
    } else {
        policies
    };
    let events = snapshot.events();
    let costs = policies.iter().map(|p| (p, replay::replay(*p, &events)));
    if json {
        let costs: Vec<Value> = costs
            .map(|(policy, cost)| json!({ "policy": policy.to_string(), "cost": cost }))
            .collect();
        println!("{}", serde_json::to_string_pretty(&costs)?);
        return Ok(());
    }
    println!(
        "{:<14} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7} {:>6} {:>12}",
        "policy", "requests", "remote", "hops", "messages", "relays", "pages", "moves", "bytes"
    );
    for (policy, cost) in costs {
        let Cost {
            requests,
            remote,
            hops,
            messages,
            relays,
            pages,
            bytes,
            moves,
        } = cost;
        println!(
            "{:<14} {requests:>9} {remote:>9} {hops:>9} {messages:>9} {relays:>7} {pages:>7} {moves:>6} {bytes:>12}",
            policy.to_string()
        );
    }
    Ok(())
}

/// An id or a key: decimal, or hexadecimal with 0x.
fn parse_number(text: &str) -> Result<i32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).map(u32::cast_signed),
        None => text.parse(),
    };
    number.map_err(|error| error.to_string())
}
