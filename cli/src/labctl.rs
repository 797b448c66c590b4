//! `migshm labctl`: faults for the hosts of a lab, from inside it.
//!
//! One request and one reply, a line of JSON each, on the lab's control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Subcommand;
use serde::{Deserialize, Serialize};

/// File name of the control socket in the lab's directory.
pub const SOCKET: &str = "control.sock";

/// Inject faults into the surrounding `migshm lab`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    request: Request,
}

/// What a lab can do to its hosts; NAME is `coordinator` or `nodeK`; with several coordinators, `coordinatorK` or `etcdK`.
#[derive(Clone, Debug, Subcommand, Serialize, Deserialize)]
pub enum Request {
    /// Kill the daemon alone (SIGKILL).
    Kill {
        /// The host.
        name: String,
    },
    /// Kill the daemon and all programs of its node.
    Crash {
        /// The host.
        name: String,
    },
    /// Start a killed daemon again; returns when it serves.
    Start {
        /// The host.
        name: String,
    },
    /// Stop the daemon (SIGSTOP).
    Pause {
        /// The host.
        name: String,
    },
    /// Let a paused daemon go on (SIGCONT).
    Resume {
        /// The host.
        name: String,
    },
    /// Cut the host's network link (needs `migshm lab --netns`).
    Cut {
        /// The host.
        name: String,
    },
    /// Mend the host's network link.
    Heal {
        /// The host.
        name: String,
    },
    /// Show the hosts.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// The hosts, or nothing, or what went wrong.
pub type Reply = Result<Vec<HostStatus>, String>;

/// A host as `status` shows it.
#[derive(Debug, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its name.
    pub name: String,
    /// `running`, `paused`, `dead`.
    pub state: String,
    /// The daemon's pid.
    pub pid: Option<i32>,
    /// Whether its link is cut.
    pub cut: bool,
    /// Whether it is the one of several that leads.
    pub leads: bool,
}

/// Asks the lab that the environment names.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let lab = std::env::var_os("MIGSHM_LAB").map(PathBuf::from);
    let lab = lab.ok_or_else(|| anyhow!("labctl works inside `migshm lab` only"))?;
    let path = lab.join(SOCKET);
    let mut socket =
        UnixStream::connect(&path).with_context(|| format!("no lab at {}", path.display()))?;
    writeln!(socket, "{}", serde_json::to_string(&args.request)?)?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    let reply: Reply = serde_json::from_str(&line).context("the lab gave no answer")?;
    let hosts = reply.map_err(|reason| anyhow!(reason))?;
    match args.request {
        Request::Status { json: true } => println!("{}", serde_json::to_string_pretty(&hosts)?),
        Request::Status { json: false } => {
            println!("{:<12} {:<8} {:<8} LINK", "HOST", "STATE", "PID");
            for host in hosts {
                let pid = host
                    .pid
                    .map_or_else(|| "-".to_owned(), |pid| pid.to_string());
                let link = if host.cut { "cut" } else { "up" };
                let leads = if host.leads { ", leads" } else { "" };
                let (name, state) = (host.name, host.state);
                println!("{name:<12} {state:<8} {pid:<8} {link}{leads}");
            }
        }
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}
