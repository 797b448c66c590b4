//! The `migshm` command.
//!
//! | module | subcommands |
//! |---|---|
//! | [`daemons`] | `coordinator`, `node` |
//! | [`pki`] | `pki` |
//! | [`run`], [`elf`] | `run` |
//! | [`lab`], [`labctl`], [`hosts`], [`netns`] | `lab`, `labctl` |
//! | [`mod@bench`] | `bench` |
//! | [`tools`] | `status`, `upgrade`, `ipcs`, `ipcrm` |
//! | [`links`] | `links` |
//!
//! Every option comes from, in this order: the command line, the environment (`MIGSHM_*`), the
//! configuration file ([`config`]), its default.

mod bench;
mod config;
mod daemons;
mod elf;
mod hosts;
mod lab;
mod labctl;
mod links;
mod netns;
mod pki;
mod processes;
mod run;
mod tools;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// System V shared memory, semaphores and message queues for a whole cluster.
#[derive(Debug, Parser)]
#[command(name = "migshm", version, flatten_help = true)]
struct Cli {
    /// Configuration file; its values are the defaults of the options below.
    #[arg(long, value_name = "FILE", env = config::VARIABLE, default_value = config::DEFAULT_PATH)]
    config: std::path::PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Coordinator(daemons::CoordinatorArgs),
    Node(daemons::NodeArgs),
    Run(run::Args),
    Lab(lab::Args),
    Labctl(labctl::Args),
    Status(tools::StatusArgs),
    Upgrade(tools::UpgradeArgs),
    Ipcs(tools::IpcsArgs),
    Ipcrm(tools::IpcrmArgs),
    Links(links::Args),
    Pki(pki::Args),
    Bench(bench::Args),
    #[command(hide = true)]
    ReapLab(lab::ReapArgs),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("MIGSHM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    match execute() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("migshm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute() -> anyhow::Result<ExitCode> {
    let command = config::apply(Cli::command(), std::env::args_os())?;
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    if let Command::Status(_)
    | Command::Ipcs(_)
    | Command::Ipcrm(_)
    | Command::Links(_)
    | Command::Pki(_) = cli.command
    {
        end_on_broken_pipe();
    }
    match cli.command {
        Command::Coordinator(args) => daemons::coordinator(args),
        Command::Node(args) => daemons::node(args),
        Command::Run(args) => run::run(args),
        Command::Lab(args) => lab::run(args),
        Command::Labctl(args) => labctl::run(args),
        Command::Status(args) => tools::status(args),
        Command::Upgrade(args) => tools::upgrade(args),
        Command::Ipcs(args) => tools::ipcs(args),
        Command::Ipcrm(args) => tools::ipcrm(args),
        Command::Links(args) => links::links(args),
        Command::Pki(args) => pki::run(args),
        Command::Bench(args) => bench::run(args),
        Command::ReapLab(args) => lab::reap(args),
    }
}

/// Makes this process end quietly when nobody reads its output any more (`migshm status | head`),
/// as commands do; Rust's runtime ignores the signal, and printing would panic.
fn end_on_broken_pipe() {
    // SAFETY: restores a default disposition; no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
