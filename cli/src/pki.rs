//! `migshm pki`: the cluster's authority and certificates.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use migshm_transport::{Peer, pki};
use time::OffsetDateTime;

/// Where certificates are, unless told otherwise.
pub const DEFAULT_DIRECTORY: &str = "/etc/migshm/pki";

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Make and show the certificates with which daemons prove themselves.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create the cluster's authority: ca.pem, which every host needs, and ca.key, which only the
    /// host that issues certificates should have.
    Init(Directory),
    /// Issue the coordinator's certificate and key: coordinator.pem, coordinator.key.
    Coordinator {
        #[command(flatten)]
        directory: Directory,
        #[command(flatten)]
        validity: Validity,
    },
    /// Issue a node's certificate and key: NAME.pem, NAME.key. Copy them and ca.pem to the node.
    Node {
        #[command(flatten)]
        directory: Directory,
        #[command(flatten)]
        validity: Validity,
        /// The node's name.
        #[arg(long)]
        name: String,
    },
    /// Show whose certificates there are, and check each.
    Show(Directory),
}

#[derive(Debug, clap::Args)]
struct Directory {
    /// Directory of the certificates.
    #[arg(long, value_name = "DIR", env = "MIGSHM_PKI", default_value = DEFAULT_DIRECTORY)]
    dir: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Validity {
    /// Days from now that the certificate is valid.
    #[arg(long, default_value_t = pki::DEFAULT_VALIDITY.as_secs() / DAY.as_secs())]
    days: u64,
}

/// Runs the subcommand; fails if `show` finds a certificate that does not work.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let issue = |directory: Directory, peer: &Peer, validity: Validity| {
        let days = u32::try_from(validity.days)?;
        pki::issue(&directory.dir, peer, DAY * days)?;
        println!(
            "{}",
            directory
                .dir
                .join(format!("{}.pem", peer.file_stem()))
                .display()
        );
        anyhow::Ok(ExitCode::SUCCESS)
    };
    match args.command {
        Command::Init(directory) => {
            pki::create_authority(&directory.dir)?;
            println!("{}", directory.dir.join("ca.pem").display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Coordinator {
            directory,
            validity,
        } => issue(directory, &Peer::Coordinator, validity),
        Command::Node {
            directory,
            validity,
            name,
        } => issue(directory, &Peer::node(&name)?, validity),
        Command::Show(directory) => show(&directory),
    }
}

fn show(directory: &Directory) -> anyhow::Result<ExitCode> {
    let mut all_work = true;
    for (peer, expires) in pki::list(&directory.dir)? {
        match expires {
            Ok(time) => println!("{peer}: valid until {}", OffsetDateTime::from(time).date()),
            Err(error) => {
                all_work = false;
                println!("{peer}: {error}");
            }
        }
    }
    Ok(if all_work {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
