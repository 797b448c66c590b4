//! Benchmarks of migshm: every figure as a ratio to a reference measured in the same run.
//!
//! `migshm bench` starts this program. It measures one node against the kernel's own System V IPC
//! ([`one_node`]), nodes of this machine against a bare QUIC stream ([`cluster`]), and programs on
//! two nodes against the same on one ([`speed_up`]). Value and
//! reference are measured in turns, so that noise hits both, and a figure is a median over the
//! turns ([`figures`]). It exits with 0 whatever the figures are, and with 1 if something does not
//! work: a call fails, or memory contains what nobody wrote.
//!
//! What is measured ([`tasks`]) runs in [worker processes](process): this program again, as a
//! subcommand that is not meant for people.
//!
//! ```text
//!  migshm-bench ──┬── native-worker            a private IPC namespace
//!                 ├── coordinator-server, bare-server, coordinator-load
//!                 ├── worker                   under the preload, with a daemon of its own
//!                 └── migshm lab -- in-lab ──┬── migshm run --on nodeK -- worker
//!                                            ├── echo-server, echo-client, compute
//!                                            └── workloads of c-tests, with and without migshm run
//! ```

mod cluster;
mod coordinator;
mod echo;
mod figures;
mod machine;
mod one_node;
mod plots;
mod process;
mod speed_up;
mod sysv;
mod tasks;
mod topics;

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use migshm_coordinator::store::Durability;

use crate::figures::Report;
use crate::machine::Machine;
use crate::tasks::Tasks;
use crate::topics::Topics;

/// Measure migshm on this machine, each figure beside a reference of the same run.
///
/// Needs root (a private IPC namespace, page tracking), and `migshm` and `libmigshm.so` beside this
/// program or where $MIGSHM, the path of `migshm`, says. Speed-ups need the built programs of c-tests.
#[derive(Debug, Parser)]
#[command(name = "migshm bench", bin_name = "migshm bench", version)]
struct Options {
    /// Less effort, more noise.
    #[arg(long)]
    quick: bool,
    /// For programs.
    #[arg(long)]
    json: bool,
    /// Draw the figures into this directory.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// What to measure, instead of everything.
    #[arg(value_name = "TOPIC", value_parser = topics::names())]
    topics: Vec<String>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["worker"] => worker(),
        ["native-worker"] => {
            // SAFETY: changes only which IPC objects this process finds.
            sysv::check(unsafe { libc::unshare(libc::CLONE_NEWIPC) })
                .context("cannot make an IPC namespace")?;
            worker()
        }
        ["echo-server", pki] => echo::server(Path::new(pki)),
        ["echo-client", pki, address] => echo::client(Path::new(pki), address.parse()?),
        ["coordinator-server", pki] => coordinator::serve(Path::new(pki), None),
        ["coordinator-server", pki, "stored"] => {
            coordinator::serve(Path::new(pki), Some(Durability::Process))
        }
        ["coordinator-server", pki, "synced"] => {
            coordinator::serve(Path::new(pki), Some(Durability::Power))
        }
        ["bare-server", pki] => coordinator::serve_bare(Path::new(pki)),
        ["coordinator-load", pki, address] => {
            coordinator::load_worker(Path::new(pki), address.parse()?)
        }
        ["compute"] => compute(),
        ["in-lab", lab, results, ref options @ ..] => {
            let options = Options::parse_from([&["migshm bench"], options].concat());
            cluster::measure_in_lab(
                &cluster::LABS[lab.parse::<usize>()?],
                options.effort(),
                &Topics(options.topics),
                &Installation::find()?,
                Path::new(results),
            )
        }
        _ => measure(Options::parse()),
    }
}

fn measure(options: Options) -> Result<()> {
    let effort = options.effort();
    let topics = Topics(options.topics);
    let installation = Installation::find()?;
    let scratch = tempfile::tempdir()?;
    let mut figures = one_node::measure(effort, &topics, &installation, scratch.path())?;
    if topics.want("coordinator") {
        figures.extend(coordinator::measure(effort, scratch.path())?);
    }
    for lab in 0..cluster::LABS.len() {
        figures.extend(cluster::measure(
            lab,
            effort,
            &topics,
            &installation,
            scratch.path(),
        )?);
    }
    let report = Report {
        machine: Machine::this()?,
        figures,
    };
    if let Some(directory) = &options.svg {
        plots::draw(&report, directory)
            .with_context(|| format!("cannot draw into {}", directory.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

impl Options {
    fn effort(&self) -> Effort {
        if self.quick {
            Effort::QUICK
        } else {
            Effort::FULL
        }
    }
}

const QUICK: &str = "--quick";

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Turns of value and reference.
    pub rounds: usize,
    /// Things of some 10 us in a round: attaches, forks, round trips.
    pub short: usize,
    /// Things of less: `semop` without a wait.
    pub calls: usize,
    /// Times that a segment is read, or written, in a round.
    pub passes: usize,
    /// Starts of a program in a round.
    pub starts: usize,
    /// Faults in a round.
    pub pages: usize,
    /// Pages that are read in a row.
    pub bulk_pages: usize,
    /// Echoes in a round.
    pub exchanges: usize,
    /// Hand-overs from each of two nodes in a round.
    pub hand_overs: usize,
    /// Runs of a program, on one node and on two.
    pub runs: usize,
    /// Pairs of operations of each process of many that a coordinator serves, in a round.
    pub pairs: usize,
}

impl Effort {
    const QUICK: Effort = Effort {
        rounds: 5,
        short: 200,
        calls: 1000,
        passes: 3,
        starts: 30,
        pages: 500,
        bulk_pages: (32 << 20) / sysv::PAGE,
        exchanges: 500,
        hand_overs: 300,
        runs: 3,
        pairs: 100,
    };

    const FULL: Effort = Effort {
        rounds: 9,
        short: 300,
        calls: 5000,
        passes: 5,
        starts: 100,
        pages: 2000,
        bulk_pages: (256 << 20) / sysv::PAGE,
        exchanges: 2000,
        hand_overs: 500,
        runs: 5,
        pairs: 200,
    };

    /// What a child has to be told to do as much.
    fn argument(self) -> Option<&'static str> {
        (self == Effort::QUICK).then_some(QUICK)
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Installation {
    /// The `migshm` command.
    pub program: PathBuf,
    /// The preload library.
    pub library: PathBuf,
}

impl Installation {
    fn find() -> Result<Installation> {
        let program = match std::env::var_os("MIGSHM") {
            Some(path) => PathBuf::from(path),
            None => this_program()?.with_file_name("migshm"),
        };
        let program = program
            .canonicalize()
            .with_context(|| format!("cannot find {}", program.display()))?;
        let library = program.with_file_name("libmigshm.so");
        ensure!(library.exists(), "{} does not exist", library.display());
        Ok(Installation { program, library })
    }
}

/// The path of this program.
///
/// # Errors
/// It has been replaced.
pub fn this_program() -> io::Result<PathBuf> {
    std::env::current_exe()
}

fn worker() -> Result<()> {
    let mut tasks = Tasks::default();
    process::serve(|task| tasks.perform(task))
}

/// Keeps a core busy until whoever started it ends it, or ends.
fn compute() -> Result<()> {
    // SAFETY: plain integers.
    sysv::check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    loop {
        std::hint::spin_loop();
    }
}
