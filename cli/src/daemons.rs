//! `migshm coordinator` and `migshm node`.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use migshm_coordinator::etcd::{self, Candidate, Location, Tls};
use migshm_coordinator::replica::Replica;
use migshm_coordinator::store::{Directory, Durability, Store, StoreError};
use migshm_coordinator::{Quotas, Rules, Settings, server};
use migshm_transport::{Endpoint, Identity, Peer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::{self, Size};

/// Where a coordinator listens, unless told otherwise.
pub const COORDINATOR_PORT: u16 = 7411;

/// Run the cluster's coordinator: names, semaphores, message queues, membership.
#[derive(Debug, clap::Args)]
pub struct CoordinatorArgs {
    /// UDP address for nodes.
    #[arg(long, value_name = "ADDR:PORT", env = "MIGSHM_COORDINATOR_LISTEN", default_value_t = SocketAddr::from(([0, 0, 0, 0], COORDINATOR_PORT)))]
    listen: SocketAddr,
    /// Directory with ca.pem, coordinator.pem and coordinator.key.
    #[arg(long, value_name = "DIR", env = "MIGSHM_PKI", default_value = crate::pki::DEFAULT_DIRECTORY)]
    pki: PathBuf,
    /// Keys of segments with release consistency, and ranges of keys, separated by commas: those whose creators do not say otherwise (MIGSHM_CONSISTENCY).
    #[arg(
        long,
        value_name = "KEYS",
        env = "MIGSHM_RELEASE_KEYS",
        default_value = ""
    )]
    release_keys: Rules,
    /// Keys of durable segments, and ranges of keys: segments with release consistency, of which what was released is at two nodes (MIGSHM_DURABILITY).
    #[arg(
        long,
        value_name = "KEYS",
        env = "MIGSHM_DURABLE_KEYS",
        default_value = ""
    )]
    durable_keys: Rules,
    /// The most that one user may create: segments, bytes (of segments), sets, semaphores, queues, each as NAME=NUMBER or NAME=none, separated by commas [default: half of what there is, at most 1048576 semaphores and 4000 queues]. Not for root and CAP_SYS_RESOURCE.
    #[arg(
        long,
        value_name = "QUOTAS",
        env = "MIGSHM_QUOTA",
        default_value = "",
        hide_default_value = true,
        value_parser = config::quotas
    )]
    quota: Quotas,
    /// Directory for the coordinator's state, with which it goes on when it is started again [default: none, the state ends with the coordinator].
    #[arg(long, value_name = "DIR", env = "MIGSHM_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// An etcd cluster for the state instead: `etcd://HOST[:PORT],...[/PREFIX]`. Of several coordinators on the same one leads, and another takes its place when it ends.
    #[arg(
        long,
        value_name = "ETCD",
        env = "MIGSHM_STORE",
        conflicts_with = "state_dir"
    )]
    store: Option<Location>,
    /// Certificate of the authority of etcd's certificates, PEM; without it there is no TLS to etcd, which must be on this host then.
    #[arg(long, value_name = "FILE", env = "MIGSHM_ETCD_CA")]
    etcd_ca: Option<PathBuf>,
    /// This coordinator's certificate for etcd, PEM.
    #[arg(long, value_name = "FILE", env = "MIGSHM_ETCD_CERT", requires_all = ["etcd_ca", "etcd_key"])]
    etcd_cert: Option<PathBuf>,
    /// The key of that certificate, PEM.
    #[arg(
        long,
        value_name = "FILE",
        env = "MIGSHM_ETCD_KEY",
        requires = "etcd_cert"
    )]
    etcd_key: Option<PathBuf>,
    /// What a state directory outlives: the coordinator's `process`, or a loss of `power` too, for which every answer waits for the disk.
    #[arg(
        long,
        value_name = "WHAT",
        env = "MIGSHM_STATE_OUTLIVES",
        default_value = "process"
    )]
    state_outlives: Durability,
    /// Inherited pipe on which to tell that the coordinator serves ('+'), or why it cannot.
    #[arg(long, value_name = "FD", hide = true)]
    ready_fd: Option<i32>,
}

/// Run this machine's node daemon.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// The cluster's coordinator, or all of them, separated by commas [default: none, serve this machine alone].
    #[arg(long, value_name = "HOST[:PORT],...", env = "MIGSHM_COORDINATOR", value_parser = with_ports)]
    coordinator: Option<String>,
    /// Seconds for which calls wait for a coordinator that cannot be reached before they fail; 0 for ever.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "MIGSHM_PATIENCE",
        default_value_t = 86_400
    )]
    patience: u64,
    /// Where the socket for local programs is [default: /run/migshm for root, $XDG_RUNTIME_DIR/migshm or /tmp/migshm-UID for others].
    #[arg(long, value_name = "DIR", env = "MIGSHM_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    /// The node's name, as in its certificate [default: the host name's first label].
    #[arg(long, value_name = "NAME", env = "MIGSHM_NAME")]
    name: Option<String>,
    /// UDP address for other nodes; port 0 picks a free one.
    #[arg(
        long,
        value_name = "ADDR:PORT",
        env = "MIGSHM_LISTEN",
        default_value = "0.0.0.0:0"
    )]
    listen: SocketAddr,
    /// Memory for the cluster's segments, in bytes or with K, M, G, T; 0 for the machine's size.
    #[arg(long, value_name = "SIZE", env = "MIGSHM_MEMORY", default_value = "0")]
    memory: Size,
    /// Directory with ca.pem, NAME.pem and NAME.key; needed with a coordinator [default: /etc/migshm/pki].
    #[arg(long, value_name = "DIR", env = "MIGSHM_PKI")]
    pki: Option<PathBuf>,
    /// End when no program uses the daemon and nothing is left to keep.
    #[arg(long)]
    autostart: bool,
    /// Inherited pipe on which to tell that the daemon serves ('+'), or why it cannot.
    #[arg(long, value_name = "FD", hide = true)]
    ready_fd: Option<i32>,
    /// Inherited memory with all that the daemon had whose place this one takes.
    #[arg(long, value_name = "FD", hide = true)]
    handover_fd: Option<i32>,
}

/// Coordinators' addresses, with [`COORDINATOR_PORT`] unless they name another.
fn with_ports(addresses: &str) -> Result<String, Infallible> {
    let addresses = addresses
        .split(',')
        .map(|address| with_port(address.trim()));
    Ok(addresses.collect::<Vec<_>>().join(","))
}

fn with_port(address: &str) -> String {
    let port = COORDINATOR_PORT;
    if address.parse::<Ipv6Addr>().is_ok() {
        format!("[{address}]:{port}")
    } else if address.contains(':') && !address.ends_with(']') {
        address.to_owned()
    } else {
        format!("{address}:{port}")
    }
}

/// Why a coordinator no longer serves.
enum Ending {
    /// It was told to end.
    Told,
    /// It leads no longer.
    Deposed,
}

/// Serves nodes until SIGINT or SIGTERM; SIGHUP has it read its certificates again.
pub fn coordinator(args: CoordinatorArgs) -> anyhow::Result<ExitCode> {
    // SAFETY: the command line says that this descriptor was passed for this use.
    let mut ready = args.ready_fd.map(|fd| unsafe { File::from_raw_fd(fd) });
    let scheduling = migshm_transport::run_early();
    tracing::debug!(scheduling, "the class of this thread");
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let result = runtime.block_on(attend(&args, &mut ready));
        // Of a coordinator that leads no longer nothing is left with it: no task, no link, no socket.
        drop(runtime);
        match result {
            Ok(Ending::Told) => return Ok(ExitCode::SUCCESS),
            Ok(Ending::Deposed) => tracing::warn!("leads no longer; stands by"),
            Err(error) => {
                if let Some(mut pipe) = ready {
                    // Whoever waited may be gone.
                    let _ = write!(pipe, "{error:#}");
                }
                return Err(error);
            }
        }
    }
}

/// Serves, or stands by and then serves, until something ends that.
async fn attend(args: &CoordinatorArgs, ready: &mut Option<File>) -> anyhow::Result<Ending> {
    let identity = Identity::load(&args.pki, &Peer::Coordinator)?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let told = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let mut told = std::pin::pin!(told);
    let (replica, store, candidate) = match &args.store {
        None => {
            let (replica, store) = state(args)?;
            (Some(replica), store, None)
        }
        Some(location) => (None, None, Some(candidate(args, location).await?)),
    };
    let endpoint = Endpoint::bind(args.listen, &identity)?;
    let settings = Settings {
        rules: args
            .release_keys
            .clone()
            .with_durable(args.durable_keys.clone()),
        quotas: args.quota,
    };
    let renewals = migshm_transport::follow(endpoint.clone(), args.pki.clone())?;
    tokio::spawn(renewals);
    tracing::info!(address = %endpoint.local_address()?, pki = %args.pki.display(), "listening");
    if let Some(mut pipe) = ready.take() {
        pipe.write_all(b"+")
            .context("cannot tell that the coordinator serves")?;
    }
    let Some(candidate) = candidate else {
        let replica = replica.expect("a coordinator without etcd has one");
        tokio::select! {
            served = server::serve(endpoint.clone(), replica, settings, store) => served?,
            () = told => {}
        }
        endpoint.close("the coordinator stops").await;
        return Ok(Ending::Told);
    };
    let (known, leader) = watch::channel(None);
    let term = tokio::select! {
        term = candidate.lead(&known) => term?,
        () = server::stand_by(&endpoint, &leader) => return Ok(Ending::Told),
        () = &mut told => return Ok(Ending::Told),
    };
    let served = async {
        let (replica, log) = term.load().await?;
        let members = replica.members().count();
        tracing::info!(members, "leads");
        let store = Store::Etcd(Box::new(log));
        server::serve(endpoint.clone(), replica, settings, Some(store)).await
    };
    let ending = tokio::select! {
        served = served => match served {
            Ok(()) => Ok(Ending::Told),
            Err(StoreError::Etcd(etcd::Error::Deposed)) => Ok(Ending::Deposed),
            Err(error) => Err(error.into()),
        },
        () = term.keep() => Ok(Ending::Deposed),
        () = told => Ok(Ending::Told),
    };
    endpoint.close("the coordinator leads no longer").await;
    term.resign().await;
    ending
}

/// What waits to lead.
async fn candidate(args: &CoordinatorArgs, location: &Location) -> anyhow::Result<Candidate> {
    let read = |path: &PathBuf| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let identity = match (&args.etcd_cert, &args.etcd_key) {
        (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
        _ => None,
    };
    let authority = args.etcd_ca.as_ref().map(read).transpose()?;
    let tls = authority.map(|authority| Tls {
        authority,
        identity,
    });
    let address = match args.listen.ip().is_unspecified() {
        true => format!("{}:{}", config::node_name(), args.listen.port()),
        false => args.listen.to_string(),
    };
    let candidate = Candidate::open(location, tls.as_ref(), address).await?;
    tracing::info!(
        etcd = location.members.join(","),
        prefix = location.prefix,
        "stands by"
    );
    Ok(candidate)
}

/// What a coordinator goes on with, and where it stores what happens.
fn state(args: &CoordinatorArgs) -> anyhow::Result<(Replica, Option<Store>)> {
    let Some(path) = &args.state_dir else {
        return Ok((Replica::of_new_cluster(), None));
    };
    let (directory, replica) = Directory::open(path, args.state_outlives)?;
    let members = replica.members().count();
    tracing::info!(directory = %path.display(), members, "goes on with the state in");
    Ok((replica, Some(Store::Directory(directory))))
}

/// Serves local programs until SIGINT or SIGTERM.
pub fn node(args: NodeArgs) -> anyhow::Result<ExitCode> {
    migshm_node::run(migshm_node::Config {
        pki: args.pki.or_else(|| {
            args.coordinator
                .is_some()
                .then(|| crate::pki::DEFAULT_DIRECTORY.into())
        }),
        coordinator: args.coordinator,
        patience: (args.patience > 0).then(|| Duration::from_secs(args.patience)),
        runtime_dir: args.runtime_dir.unwrap_or_else(config::own_runtime_dir),
        name: args.name.unwrap_or_else(config::node_name),
        listen: args.listen,
        memory: args.memory.0,
        autostart: args.autostart,
        ready_fd: args.ready_fd,
        handover_fd: args.handover_fd,
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_needs_no_port() {
        for (given, meant) in [
            ("head", "head:7411"),
            ("head:1", "head:1"),
            ("10.0.0.1", "10.0.0.1:7411"),
            ("::1", "[::1]:7411"),
            ("[::1]", "[::1]:7411"),
            ("[::1]:1", "[::1]:1"),
            ("a, b:1,c", "a:7411,b:1,c:7411"),
        ] {
            assert_eq!(with_ports(given), Ok(meant.to_owned()));
        }
    }
}
