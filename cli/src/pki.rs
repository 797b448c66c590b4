//! `migshm pki`: the cluster's authority and certificates.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use migshm_transport::pki::Valid;
use migshm_transport::{BadName, Peer, pki};
use time::OffsetDateTime;

/// Where certificates are, unless told otherwise.
pub const DEFAULT_DIRECTORY: &str = "/etc/migshm/pki";

const DAY: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_DAYS: u32 = (pki::DEFAULT_VALIDITY.as_secs() / DAY.as_secs()) as u32;
/// Ten years, as an authority has.
const MAX_DAYS: i64 = 3650;

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
    /// Issue certificates and keys anew, in the place of those that are there. The daemons use them
    /// once they are on their hosts, at SIGHUP or within an hour.
    Renew {
        #[command(flatten)]
        directory: Directory,
        #[command(flatten)]
        validity: Validity,
        /// Whose: nodes' names, `coordinator` [default: all].
        #[arg(value_name = "NAME", value_parser = peer)]
        peers: Vec<Peer>,
    },
    /// Trust somebody's certificate that is here no longer: adds it to the file revoked, for all hosts.
    Revoke {
        #[command(flatten)]
        directory: Directory,
        /// Whose: a node's name, `coordinator`.
        #[arg(value_name = "NAME", value_parser = peer)]
        peer: Peer,
    },
    /// Replace the authority, first step: a new one issues from now on, and hosts that have the new
    /// ca.pem trust both.
    RotateCa(Directory),
    /// Replace the authority, last step: hosts that have the new ca.pem trust the new one alone.
    RetireCa(Directory),
    /// Show whose certificates there are, and check each.
    Show(Directory),
}

fn peer(name: &str) -> Result<Peer, BadName> {
    Peer::of_file_stem(name)
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
    #[arg(long, default_value_t = DEFAULT_DAYS, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    days: u32,
}

/// Runs the subcommand; fails if `show` finds a certificate that does not work.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let issue = |Directory { dir }: Directory, peer: &Peer, validity: Validity| {
        pki::issue(&dir, peer, DAY * validity.days)?;
        println!("{}", file(&dir, peer.file_stem()));
        anyhow::Ok(())
    };
    match args.command {
        Command::Init(Directory { dir }) => {
            pki::create_authority(&dir)?;
            println!("{}", file(&dir, "ca"));
        }
        Command::Coordinator {
            directory,
            validity,
        } => issue(directory, &Peer::Coordinator, validity)?,
        Command::Node {
            directory,
            validity,
            name,
        } => issue(directory, &Peer::node(&name)?, validity)?,
        Command::Renew {
            directory: Directory { dir },
            validity,
            mut peers,
        } => {
            if peers.is_empty() {
                peers = pki::certified(&dir)?;
            }
            for peer in peers {
                pki::renew(&dir, &peer, DAY * validity.days)?;
                println!("{}", file(&dir, peer.file_stem()));
            }
        }
        Command::Revoke {
            directory: Directory { dir },
            peer,
        } => {
            pki::revoke(&dir, &peer)?;
            println!("{}", dir.join("revoked").display());
            eprintln!("Copy it to every host, and send the daemons SIGHUP.");
        }
        Command::RotateCa(Directory { dir }) => {
            pki::rotate_authority(&dir)?;
            println!("{}", file(&dir, "ca"));
            eprintln!(
                "Copy it to every host, and send the daemons SIGHUP; then `migshm pki renew`, \
                 the same with its files, and `migshm pki retire-ca`."
            );
        }
        Command::RetireCa(Directory { dir }) => {
            let former = pki::retire_authorities(&dir)?;
            println!("{}", file(&dir, "ca"));
            eprintln!(
                "{former} former authorities are trusted no longer where this file is: \
                 copy it to every host, and send the daemons SIGHUP."
            );
        }
        Command::Show(directory) => return show(&directory),
    }
    Ok(ExitCode::SUCCESS)
}

fn file(directory: &Path, stem: &str) -> String {
    directory.join(format!("{stem}.pem")).display().to_string()
}

fn show(directory: &Directory) -> anyhow::Result<ExitCode> {
    let mut all_work = true;
    for (peer, valid) in pki::list(&directory.dir)? {
        match valid {
            Ok(Valid { until, current }) => {
                let day = OffsetDateTime::from(until).date();
                let issuer = if current {
                    ""
                } else {
                    ", of a former authority"
                };
                println!("{peer}: valid until {day}{issuer}");
            }
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
