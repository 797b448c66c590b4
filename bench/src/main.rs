//! Benchmarks of migshm: every figure as a ratio to a reference measured in the same run.
//!
//! `migshm-bench [--quick] [--json]` measures one node against the kernel's own System V IPC
//! ([`one_node`]) and nodes of this machine against a bare QUIC stream ([`cluster`]). Value and
//! reference are measured in turns, so that noise hits both, and a figure is a median over the
//! turns ([`figures`]). It exits with 0 whatever the figures are, and with 1 if something does not
//! work: a call fails, or memory contains what nobody wrote.
//!
//! What is measured ([`tasks`]) runs in [worker processes](process): this program again, as a
//! subcommand that is not meant for people.
//!
//! ```text
//!  migshm-bench ──┬── native-worker            a private IPC namespace
//!                 ├── worker                   under the preload, with a daemon of its own
//!                 └── migshm lab -- in-lab ──┬── migshm run --on nodeK -- worker
//!                                            └── echo-server, echo-client, compute
//! ```

mod cluster;
mod echo;
mod figures;
mod one_node;
mod process;
mod sysv;
mod tasks;

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail, ensure};

use crate::figures::Report;
use crate::tasks::Tasks;

const USAGE: &str = "\
usage: migshm-bench [--quick] [--json]

Measures migshm on this machine, each figure beside a reference of the same run. Needs root (a
private IPC namespace, page tracking), and `migshm` and `libmigshm.so` beside this program or where
$MIGSHM, the path of `migshm`, says.

  --quick   less than a minute, with more noise
  --json    for programs";

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
        ["compute"] => compute(),
        ["in-lab", nodes, results, ref options @ ..] => {
            let effort = Effort::of(options.contains(&QUICK));
            cluster::measure_in_lab(
                nodes.parse()?,
                effort,
                &Installation::find()?,
                Path::new(results),
            )
        }
        ["--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        ref options => {
            if let Some(unknown) = options
                .iter()
                .find(|option| ![QUICK, JSON].contains(option))
            {
                bail!("unknown argument {unknown:?}\n\n{USAGE}");
            }
            measure(
                Effort::of(options.contains(&QUICK)),
                options.contains(&JSON),
            )
        }
    }
}

fn measure(effort: Effort, json: bool) -> Result<()> {
    let installation = Installation::find()?;
    let scratch = tempfile::tempdir()?;
    let mut figures = one_node::measure(effort, &installation, scratch.path())?;
    for nodes in [2, 3] {
        figures.extend(cluster::measure(
            nodes,
            effort,
            &installation,
            scratch.path(),
        )?);
    }
    let report = Report {
        cores: available_parallelism()?.get(),
        kernel: kernel()?,
        figures,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

const QUICK: &str = "--quick";
const JSON: &str = "--json";

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
    };

    fn of(quick: bool) -> Effort {
        if quick { Effort::QUICK } else { Effort::FULL }
    }

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

fn kernel() -> io::Result<String> {
    let mut names = MaybeUninit::<libc::utsname>::uninit();
    // SAFETY: a live out pointer.
    sysv::check(unsafe { libc::uname(names.as_mut_ptr()) })?;
    // SAFETY: the call has filled it with C strings.
    let release = unsafe { CStr::from_ptr((*names.as_ptr()).release.as_ptr()) };
    Ok(release.to_string_lossy().into_owned())
}
