//! `migshm bench`: the program `migshm-bench`, which is beside this one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, anyhow};

/// Measure migshm on this machine; `migshm bench --help` says what and how.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// The benchmark's options and topics.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    arguments: Vec<OsString>,
}

/// Replaces this process by the benchmark; returns only if that cannot be.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let program = own.with_file_name("migshm-bench");
    let error = Command::new(&program)
        .args(args.arguments)
        .env("MIGSHM", own)
        .exec();
    Err(anyhow!(error).context(format!("cannot start {}", program.display())))
}
