//! The node daemon, `migshm node`: it holds the node's copy of the pages, serves the processes of
//! its node, and exchanges pages with the daemons of other nodes.
//!
//! ```text
//!  processes ──unix socket──▶ calls ──▶ coordinator (QUIC, or embedded)
//!      │                        │
//!  userfaultfd ────────────▶ pages ◀──▶ coherence engine ◀──QUIC──▶ other nodes
//!                               │
//!                            memory: memfds, page tables of the processes
//! ```

mod accesses;
mod cached;
mod calls;
mod daemon;
mod delegation;
mod exits;
mod handover;
mod local;
mod members;
mod membership;
mod memory;
mod pages;
mod readers;
mod release;
mod sets;
mod spin;
mod start;
mod status;
mod tasks;
mod uffd;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use migshm_coordinator::{Core, Quotas, Settings};
use migshm_protocol::local::{CLUSTER, SOCKET};
use migshm_transport::{Endpoint, FrameReceiver, LinkError};
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{AbortHandle, LocalSet, spawn_local};

use crate::daemon::{Coordinator, Node};
use crate::exits::Exits;
use crate::handover::{Estate, Heir};
use crate::membership::{Joined, Membership};
use crate::memory::Memory;
use crate::start::{Lock, Ready};
use crate::uffd::Uffd;

/// How often a daemon that was started by a program looks whether it may go, and so how long it
/// outlives its last use, at most twice over.
const LINGER: Duration = Duration::from_secs(2);
/// How long the daemon may take to return what was delegated to it, at its end.
const FAREWELL: Duration = Duration::from_millis(500);

/// Turns of the scheduler, each of up to 61 tasks, after which a busy daemon looks for news: faults
/// and datagrams must not wait for thousands of packets of a process that floods it.
const EVENT_INTERVAL: u32 = 1;

/// What a node daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// `HOST:PORT` of the coordinator; without one the daemon serves this machine alone.
    pub coordinator: Option<String>,
    /// For how long calls wait for a coordinator that cannot be reached before they fail; `None` for
    /// ever.
    pub patience: Option<Duration>,
    /// Where its socket is.
    pub runtime_dir: PathBuf,
    /// The node's name, as in its certificate.
    pub name: String,
    /// UDP address for other nodes.
    pub listen: SocketAddr,
    /// Bytes of memory that the node gives to the cluster; 0 for all of the machine's.
    pub memory: u64,
    /// Directory with `ca.pem`, `NAME.pem`, `NAME.key`.
    pub pki: Option<PathBuf>,
    /// Go when no process and no object is left.
    pub autostart: bool,
    /// A pipe to tell on when the daemon serves.
    pub ready_fd: Option<i32>,
    /// What a daemon before this one, in the same process, has left.
    pub handover_fd: Option<i32>,
}

/// Why a node daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runtime directory cannot be used.
    #[error(
        "cannot use runtime directory {path}: {cause}; choose another with --runtime-dir or MIGSHM_RUNTIME_DIR"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A program starts a daemon where that of a cluster should be.
    #[error(
        "the node daemon of the cluster of {coordinator} is not running here: start `migshm node` again, with its options (to use this machine alone, remove {file})",
        file = file.display()
    )]
    Absent {
        /// The cluster's coordinator.
        coordinator: String,
        /// What remembers it.
        file: PathBuf,
    },
    /// Tracking is not possible.
    #[error("cannot open {device}: {cause}; sharing with other nodes needs Linux 6.1 or later and a daemon that may open it (run it as root, or give its user access to the device and CAP_SYS_PTRACE)", device = uffd::DEVICE)]
    Tracking {
        /// Why.
        cause: io::Error,
    },
    /// The name cannot be a node's.
    #[error(transparent)]
    Name(#[from] migshm_transport::BadName),
    /// No certificates were named.
    #[error(
        "a node of a cluster needs certificates: name their directory with --pki or MIGSHM_PKI (migshm pki makes them)"
    )]
    NoPki,
    /// The certificates do not work.
    #[error(transparent)]
    Pki(#[from] migshm_transport::pki::PkiError),
    /// The QUIC socket cannot be made.
    #[error(transparent)]
    Endpoint(#[from] migshm_transport::EndpointError),
    /// The coordinator's address cannot be resolved.
    #[error("cannot resolve coordinator {coordinator:?}: {cause}")]
    Resolve {
        /// As configured.
        coordinator: String,
        /// Why.
        cause: io::Error,
    },
    /// The coordinator cannot be reached, or is not one.
    #[error(
        "cannot reach coordinator {coordinator}: {cause}; is `migshm coordinator` running there?"
    )]
    Unreachable {
        /// As configured.
        coordinator: String,
        /// Why.
        cause: LinkError,
    },
    /// The coordinator does not want this node.
    #[error("coordinator {coordinator} refuses this node: {reason}")]
    Refused {
        /// As configured.
        coordinator: String,
        /// In its words.
        reason: String,
    },
    /// Nobody can go on with what the daemon before this one had.
    #[error("cannot take over from the daemon before this one: {0}")]
    Handover(io::Error),
    /// Anything else of the system.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves until SIGINT or SIGTERM, or until nothing is left to serve where `config.autostart` says
/// so. SIGHUP has a node of a cluster read its certificates again; `migshm upgrade` has the program that
/// is in this one's place now go on (`handover.rs`).
///
/// # Errors
/// [`Error`], also told on `config.ready_fd`.
pub fn run(config: Config) -> Result<(), Error> {
    let mut ready = Ready::new(config.ready_fd);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(EVENT_INTERVAL)
        .build()?;
    let result = LocalSet::new().block_on(&runtime, serve(config, &mut ready));
    if let Err(error) = &result {
        ready.tell(Err(error.to_string()));
    }
    result
}

async fn serve(config: Config, ready: &mut Ready) -> Result<(), Error> {
    let directory = config.runtime_dir.clone();
    let program = handover::own_program()?;
    start::raise_descriptor_limit();
    start::keep_memory();
    let class = migshm_transport::run_early();
    let Service {
        node,
        listener,
        membership,
        link,
        connections,
        refused,
    } = match config.handover_fd {
        Some(fd) => take_over(&config, fd)?,
        None => begin(&config).await?,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let terms = membership.as_ref().map(|m| m.terms().clone());
    let endpoint = membership.as_ref().map(|m| m.endpoint().clone());
    let listener = Rc::new(tasks::watch(listener)?);
    let timer = Rc::new(tasks::Timer::new()?);
    {
        let mut node = node.borrow_mut();
        node.timer = Some(Rc::clone(&timer));
        node.endpoint.clone_from(&endpoint);
    }
    if let Some(membership) = membership {
        spawn_local(membership.keep(Rc::clone(&node), link));
    }
    spawn_local(tasks::keep_time(Rc::clone(&node), timer));
    spawn_local(tasks::look_for_news(Rc::clone(&node)));
    spawn_local(tasks::watch_exits(Rc::clone(&node)));
    spawn_local(tasks::probe(Rc::clone(&node)));
    spawn_local(tasks::keep_lease(Rc::clone(&node)));
    spawn_local(tasks::accept_local(Rc::clone(&node), Rc::clone(&listener)));
    handover::attend(&node, connections)?;
    node.borrow_mut().settle();
    let upgraded = match refused {
        true => Err(io::Error::from_raw_os_error(libc::ENOEXEC)),
        false => Ok(()),
    };
    node.borrow_mut().answer_upgrade(upgraded);
    let upgrade = Rc::clone(&node.borrow().upgrade);
    let mut accepting = link_up(&node, endpoint.as_ref());
    ready.tell(Ok(()));
    tracing::info!(node = config.name, directory = %directory.display(), class, "serving");

    let mut look = tokio::time::interval(LINGER);
    look.tick().await;
    let mut idle = false;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = upgrade.notified() => {
                tracing::info!(program = %program.display(), "hands over to");
                accepting.inspect(AbortHandle::abort);
                handover::leave_peers(&node).await;
                let error = {
                    let node = &mut node.borrow_mut();
                    handover::exec(node, listener.get_ref(), terms.as_ref(), &program)
                };
                tracing::error!(%error, program = %program.display(), "cannot hand over, and goes on");
                node.borrow_mut().answer_upgrade(Err(error));
                accepting = link_up(&node, endpoint.as_ref());
            }
            _ = look.tick(), if config.autostart => {
                if !directory.join(SOCKET).exists() {
                    tracing::warn!("the runtime directory is gone: no process finds this daemon any more");
                    break;
                }
                let was_idle = std::mem::replace(&mut idle, node.borrow().is_idle());
                if idle && was_idle && leave(&node, &listener, &directory)? {
                    break;
                }
            }
        }
    }
    let last_words = node.borrow_mut().say_goodbye();
    if let Some(sender) = last_words {
        let _ = tokio::time::timeout(FAREWELL, sender.finish()).await;
    }
    tracing::info!(node = config.name, "stopped");
    Ok(())
}

/// What a daemon serves with.
struct Service {
    node: daemon::Shared,
    listener: local::Socket,
    /// Of a cluster.
    membership: Option<Membership>,
    /// From the coordinator.
    link: Option<FrameReceiver>,
    /// Those that there are already.
    connections: Vec<Heir>,
    /// Whether the program that was to take over could not.
    refused: bool,
}

/// Links to other nodes, and has them link here.
fn link_up(node: &daemon::Shared, endpoint: Option<&Endpoint>) -> Option<AbortHandle> {
    node.borrow_mut().link_up();
    let accept = tasks::accept_peers(Rc::clone(node), endpoint?.clone());
    Some(spawn_local(accept).abort_handle())
}

/// A daemon that goes on with what the one before it had.
fn take_over(config: &Config, fd: i32) -> Result<Service, Error> {
    let (estate, refused) = handover::take(fd).map_err(Error::Handover)?;
    let Estate {
        mut node,
        connections,
        listener,
        terms,
    } = estate;
    node.device = device(config)?;
    node.memory.resume(node.device.as_ref())?;
    let membership = terms
        .map(|terms| Membership::resumed(config, terms))
        .transpose()?;
    tracing::info!(node = config.name, upgrades = node.upgrades, "took over");
    Ok(Service {
        node: node.shared(),
        listener,
        membership,
        link: None,
        connections,
        refused,
    })
}

/// `/dev/userfaultfd`, where it is of use.
fn device(config: &Config) -> Result<Option<File>, Error> {
    let device = match Uffd::device() {
        Ok(device) => Some(device),
        Err(cause) if config.coordinator.is_some() => return Err(Error::Tracking { cause }),
        Err(error) => {
            tracing::info!(%error, "no {}: forks by raw clone(2) are not seen", uffd::DEVICE);
            None
        }
    };
    Ok(device.filter(|device| config.coordinator.is_some() || can_track(device)))
}

/// A daemon where there was none.
async fn begin(config: &Config) -> Result<Service, Error> {
    let directory = config.runtime_dir.clone();
    let in_directory = |cause| Error::Directory {
        path: directory.clone(),
        cause,
    };
    start::runtime_directory(&directory).map_err(in_directory)?;
    let cluster = directory.join(CLUSTER);
    if config.autostart
        && config.coordinator.is_none()
        && let Ok(coordinator) = std::fs::read_to_string(&cluster)
    {
        // Programs of the cluster would find themselves alone, with nothing that they had.
        return Err(Error::Absent {
            coordinator,
            file: cluster,
        });
    }
    let device = device(config)?;
    let memory = Memory::new(device.as_ref())?;
    let budget = if config.memory == 0 {
        start::physical_memory()
    } else {
        config.memory
    };

    let joined = match &config.coordinator {
        Some(coordinator) => Some(membership::join(config, coordinator, budget).await?),
        None => None,
    };
    let lock = if config.autostart {
        None
    } else {
        Some(Lock::take(&directory).map_err(in_directory)?)
    };
    let listener = start::listen(&directory).map_err(in_directory)?;
    match &config.coordinator {
        Some(coordinator) => std::fs::write(&cluster, coordinator).map_err(in_directory)?,
        None if cluster.exists() => std::fs::remove_file(&cluster).map_err(in_directory)?,
        None => {}
    }
    drop(lock);

    let name = config.name.clone();
    let (node, membership, link) = match joined {
        Some(Joined {
            node,
            epoch,
            membership,
            link,
            receiver,
        }) => {
            let coordinator = Coordinator::Remote(link);
            let exits = Exits::new()?;
            let node = Node::new(
                name,
                node,
                epoch,
                budget,
                device,
                memory,
                coordinator,
                exits,
            );
            (node, Some(membership), Some(receiver))
        }
        None => {
            let node = embedded(name, config.listen, budget, device, memory)?;
            (node, None, None)
        }
    };
    Ok(Service {
        node,
        listener,
        membership,
        link,
        connections: Vec::new(),
        refused: false,
    })
}

/// Ends the service unless a process has come meanwhile. Under the lock, so that a program that
/// finds no daemon starts the next one only after this.
fn leave(
    node: &daemon::Shared,
    listener: &AsyncFd<local::Socket>,
    directory: &std::path::Path,
) -> io::Result<bool> {
    let _lock = match Lock::try_take(directory) {
        // Somebody is about to connect.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        lock => lock?,
    };
    if !node.borrow().is_idle() || listener.get_ref().has_callers() {
        return Ok(false);
    }
    std::fs::remove_file(directory.join(SOCKET))?;
    Ok(true)
}

/// Whether this process may also see the forks of those it watches.
fn can_track(device: &File) -> bool {
    Uffd::probe(device)
        .inspect_err(|error| tracing::info!(%error, "userfaultfd cannot report forks"))
        .is_ok()
}

/// A node that is its own cluster.
fn embedded(
    name: String,
    address: SocketAddr,
    budget: u64,
    device: Option<File>,
    memory: Memory,
) -> Result<daemon::Shared, Error> {
    let quotas = if start::is_for_all_users() {
        Quotas::default()
    } else {
        Quotas::NONE
    };
    let mut core = Box::new(Core::new().with_settings(Settings {
        quotas,
        ..Settings::default()
    }));
    let mut outputs = Vec::new();
    let (id, epoch) = core
        .join(name.clone(), address, budget, &mut outputs)
        .map_err(|error| Error::Refused {
            coordinator: "embedded".to_owned(),
            reason: error.to_string(),
        })?;
    let node = Node::new(
        name,
        id,
        epoch,
        budget,
        device,
        memory,
        Coordinator::Embedded(core),
        Exits::new()?,
    );
    {
        let mut node = node.borrow_mut();
        node.outputs = outputs;
        node.collect_outputs();
        node.settle();
    }
    Ok(node)
}
