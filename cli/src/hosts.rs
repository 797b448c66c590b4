//! The hosts of a lab: their daemons, and the faults that `migshm labctl` asks for.
//!
//! Daemons are real processes with real certificates. A host outlives its daemon, which can be
//! killed and started again with the same name, directory and address of the coordinator. A task
//! for each running daemon waits for its end and reports one that nobody wanted.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use migshm_coordinator::etcd::{self, Leaders, Location};
use migshm_transport::{Peer, pki};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream, unix::pipe};
use tokio::process::Command;
use tokio::sync::Notify;
use tokio::task::spawn_local;

use crate::daemons::COORDINATOR_PORT;
use crate::labctl::{HostStatus, Reply, Request};
use crate::netns::{self, Network};
use crate::processes;

/// The environment variable by which a lab's processes know it, and the reaper them.
pub const VARIABLE: &str = "MIGSHM_LAB";
const COORDINATOR: &str = "coordinator";
/// Time a daemon has to serve.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How many members an etcd cluster has: one may be gone.
const ETCD_MEMBERS: usize = 3;
/// How often a member that starts is asked whether it serves.
const LOOK: Duration = Duration::from_millis(20);
/// Lines of a dead daemon's log that are shown.
const LOG_LINES: usize = 20;

/// What a lab consists of.
pub struct Lab {
    directory: PathBuf,
    hosts: Vec<Host>,
    /// If there are several coordinators.
    etcd: Option<Location>,
    network: Option<Network>,
}

/// How a lab is to be.
pub struct Setup {
    /// Number of nodes.
    pub nodes: u16,
    /// Number of coordinators; several have an etcd cluster.
    pub coordinators: u16,
    /// Of each node, in bytes.
    pub memory: u64,
    /// Whether each host has a network of its own.
    pub networks: bool,
}

/// A host of the lab: its daemon, dead or alive.
struct Host {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    /// Of a coordinator or a member of etcd.
    address: Option<String>,
    is_etcd: bool,
    daemon: Rc<RefCell<Option<Daemon>>>,
    ended: Rc<Notify>,
    cut: Cell<bool>,
}

/// A running daemon.
struct Daemon {
    pid: i32,
    paused: bool,
    /// Whether its end is wanted.
    doomed: bool,
}

impl Lab {
    /// Makes certificates, and networks if wanted. `program` is this command, `directory` the lab's.
    pub fn new(program: &Path, directory: &Path, setup: &Setup) -> anyhow::Result<Lab> {
        let nodes = (1..=setup.nodes).map(|number| format!("node{number}"));
        let mut coordinators = vec![COORDINATOR.to_owned()];
        if setup.coordinators > 1 {
            if setup.networks {
                bail!("several coordinators have no networks of their own: without --netns");
            }
            let numbers = 1..=setup.coordinators;
            coordinators = numbers.map(|k| format!("{COORDINATOR}{k}")).collect();
        }
        let names: Vec<String> = coordinators.iter().cloned().chain(nodes).collect();
        let certificates = directory.join("pki");
        pki::create_authority(&certificates)?;
        pki::issue(&certificates, &Peer::Coordinator, pki::DEFAULT_VALIDITY)?;
        for name in &names[coordinators.len()..] {
            pki::issue(&certificates, &Peer::node(name)?, pki::DEFAULT_VALIDITY)?;
        }
        let network = setup
            .networks
            .then(|| Network::create(directory, &names))
            .transpose()?;
        let addresses = match network {
            Some(_) => vec![SocketAddr::from((netns::address(0), COORDINATOR_PORT))],
            None => free_addresses(coordinators.len())?,
        };
        let (etcd, members) = match setup.coordinators {
            1 => (None, Vec::new()),
            _ => {
                let (location, members) = etcd_members(directory)?;
                (Some(location), members)
            }
        };
        let known: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let known = known.join(",");
        let hosts = names.into_iter().enumerate().map(|(index, name)| {
            let mut arguments: Vec<OsString> = ["--config", "/dev/null"].map(Into::into).into();
            let address = addresses.get(index).map(ToString::to_string);
            if let Some(address) = &address {
                arguments.extend(["coordinator", "--listen", address].map(Into::into));
                match &etcd {
                    None => {
                        arguments.extend(["--state-dir".into(), directory.join("state").into()]);
                    }
                    Some(location) => {
                        let members = location.members.join(",");
                        let store = format!("etcd://{members}/{}", location.prefix);
                        arguments.extend(["--store".into(), store.into()]);
                    }
                }
            } else {
                let ip = if setup.networks {
                    netns::address(index)
                } else {
                    Ipv4Addr::LOCALHOST
                };
                let listen = format!("{ip}:0");
                let memory = setup.memory.to_string();
                let options = [
                    "--coordinator",
                    &known,
                    "--name",
                    &name,
                    "--listen",
                    &listen,
                    "--memory",
                    &memory,
                ];
                arguments.push("node".into());
                arguments.extend(options.map(Into::into));
                arguments.extend(["--runtime-dir".into(), directory.join(&name).into()]);
            }
            arguments.extend(["--pki".into(), certificates.clone().into()]);
            Host {
                name,
                program: program.to_owned(),
                arguments,
                address,
                is_etcd: false,
                daemon: Rc::default(),
                ended: Rc::default(),
                cut: Cell::new(false),
            }
        });
        let hosts = members.into_iter().chain(hosts).collect();
        Ok(Lab {
            directory: directory.to_owned(),
            hosts,
            etcd,
            network,
        })
    }

    /// Starts all hosts; returns when they serve.
    pub async fn start(&self) -> anyhow::Result<()> {
        let (etcd, others): (Vec<&Host>, Vec<&Host>) =
            self.hosts.iter().partition(|host| host.is_etcd);
        // They serve when most of them are there.
        for host in &etcd {
            host.spawn(self, &[])?;
        }
        for host in etcd {
            host.await_member(self).await?;
        }
        for host in others {
            host.start(self).await?;
        }
        Ok(())
    }

    /// Does what `labctl` asks.
    async fn handle(&self, request: Request) -> anyhow::Result<Vec<HostStatus>> {
        match request {
            Request::Kill { name } => self.host(&name)?.kill().await?,
            Request::Crash { name } => self.crash(self.host(&name)?).await?,
            Request::Start { name } => self.host(&name)?.start(self).await?,
            Request::Pause { name } => self.host(&name)?.pause(true)?,
            Request::Resume { name } => self.host(&name)?.pause(false)?,
            Request::Cut { name } => self.set_cut(&name, true)?,
            Request::Heal { name } => self.set_cut(&name, false)?,
            Request::Status { .. } => {
                let leaders = match &self.etcd {
                    Some(location) => etcd::leaders(location, None).await.unwrap_or_default(),
                    None => Leaders::default(),
                };
                let status = |host: &Host| host.status(&leaders);
                return Ok(self.hosts.iter().map(status).collect());
            }
        }
        Ok(Vec::new())
    }

    fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts
            .iter()
            .find(|host| host.name == name)
            .with_context(|| {
                let names: Vec<&str> = self.hosts.iter().map(|host| host.name.as_str()).collect();
                format!("the lab has no {name}; it has {}", names.join(", "))
            })
    }

    /// Ends a node as a loss of power would: first the daemon, so that it reports no ends of
    /// programs; then all programs that have the library and this node in their environment.
    async fn crash(&self, host: &Host) -> anyhow::Result<()> {
        host.kill().await?;
        let directory = self.directory.join(&host.name);
        loop {
            let mut programs = processes::with_variable("MIGSHM_RUNTIME_DIR", &directory);
            programs.retain(|&pid| processes::has_library(pid));
            if programs.is_empty() {
                return Ok(());
            }
            for pid in programs {
                processes::signal(pid, libc::SIGKILL);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn set_cut(&self, name: &str, cut: bool) -> anyhow::Result<()> {
        let host = self.host(name)?;
        let Some(network) = &self.network else {
            bail!("links can be cut with `migshm lab --netns` only");
        };
        network.set_link(name, !cut)?;
        host.cut.set(cut);
        Ok(())
    }
}

impl Host {
    /// Starts the daemon, with a descriptor to inherit if one is named. The command line says of what use.
    fn spawn(&self, lab: &Lab, inherited: &[RawFd]) -> anyhow::Result<()> {
        if self.daemon.borrow().is_some() {
            bail!("{} runs already", self.name);
        }
        let log = self.log(lab);
        let output = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        for fd in inherited {
            command.arg("--ready-fd").arg(fd.to_string());
        }
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .env("LD_PRELOAD", "")
            .env(VARIABLE, &lab.directory);
        for name in [
            "COORDINATOR",
            "COORDINATOR_LISTEN",
            "RUNTIME_DIR",
            "NAME",
            "LISTEN",
            "MEMORY",
            "PKI",
            "STATE_DIR",
            "STATE_OUTLIVES",
            "STORE",
            "ETCD_CA",
            "ETCD_CERT",
            "ETCD_KEY",
        ] {
            command.env_remove(format!("MIGSHM_{name}"));
        }
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"ETCD_") {
                command.env_remove(name);
            }
        }
        let namespace = match lab.network {
            Some(_) => Some(File::open(netns::path(&lab.directory, &self.name))?),
            None => None,
        };
        let inherited = inherited.to_vec();
        let prepare = move || {
            if let Some(namespace) = &namespace {
                netns::enter_file(namespace)?;
            }
            for &fd in &inherited {
                // SAFETY: clears close-on-exec of an open descriptor.
                if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: `prepare` makes nothing but system calls.
        let mut child = unsafe { command.pre_exec(prepare) }
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let pid = child.id().context("a daemon ended at once")? as i32;
        *self.daemon.borrow_mut() = Some(Daemon {
            pid,
            paused: false,
            doomed: false,
        });

        let (daemon, ended, name) = (
            Rc::clone(&self.daemon),
            Rc::clone(&self.ended),
            self.name.clone(),
        );
        spawn_local(async move {
            let status = child.wait().await;
            let gone = daemon.borrow_mut().take();
            if let (Ok(status), Some(Daemon { doomed: false, .. })) = (status, gone) {
                eprintln!(
                    "migshm: {name} ended unexpectedly ({status}); the end of {}:\n{}",
                    log.display(),
                    tail(&log)
                );
            }
            ended.notify_waiters();
        });
        Ok(())
    }

    /// Starts the daemon and waits until it serves.
    async fn start(&self, lab: &Lab) -> anyhow::Result<()> {
        if self.is_etcd {
            self.spawn(lab, &[])?;
            return self.await_member(lab).await;
        }
        let (ready, tell) = io::pipe()?;
        self.spawn(lab, &[tell.as_raw_fd()])?;
        drop(tell);
        let log = self.log(lab);
        let mut word = String::new();
        let mut ready = pipe::Receiver::from_owned_fd(ready.into())?;
        let told = tokio::time::timeout(READY_TIMEOUT, ready.read_to_string(&mut word)).await;
        match told {
            Ok(Ok(_)) if word == "+" => Ok(()),
            Ok(Ok(_)) if word.is_empty() => bail!(
                "{} ended before it was ready; see {}",
                self.name,
                log.display()
            ),
            Ok(Ok(_)) => {
                // It has said why it ends, and may be started again when it has.
                let gone = self.ended.notified();
                if self.daemon.borrow().is_some() {
                    gone.await;
                }
                bail!("{}: {word}", self.name)
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => bail!(
                "{} is not ready after {} s:\n{}",
                self.name,
                READY_TIMEOUT.as_secs(),
                tail(&log)
            ),
        }
    }

    /// Waits until this member of etcd answers, which it does when it has found most of the others.
    async fn await_member(&self, lab: &Lab) -> anyhow::Result<()> {
        let location = Location {
            members: self.address.iter().cloned().collect(),
            ..lab.etcd.clone().context("the lab has no etcd")?
        };
        let deadline = Instant::now() + READY_TIMEOUT;
        while let Err(error) = etcd::leaders(&location, None).await {
            if self.daemon.borrow().is_none() || Instant::now() > deadline {
                bail!("{}: {error}\n{}", self.name, tail(&self.log(lab)));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    fn log(&self, lab: &Lab) -> PathBuf {
        lab.directory.join(format!("{}.log", self.name))
    }

    /// Kills the daemon and waits until it is gone.
    async fn kill(&self) -> anyhow::Result<()> {
        let gone = self.ended.notified();
        match self.daemon.borrow_mut().as_mut() {
            Some(daemon) => {
                daemon.doomed = true;
                processes::signal(daemon.pid, libc::SIGKILL);
            }
            None => bail!("{} does not run", self.name),
        }
        gone.await;
        Ok(())
    }

    fn pause(&self, pause: bool) -> anyhow::Result<()> {
        match self.daemon.borrow_mut().as_mut() {
            Some(daemon) => {
                daemon.paused = pause;
                processes::signal(
                    daemon.pid,
                    if pause { libc::SIGSTOP } else { libc::SIGCONT },
                );
                Ok(())
            }
            None => bail!("{} does not run", self.name),
        }
    }

    fn status(&self, leaders: &Leaders) -> HostStatus {
        let leads = self.address.as_ref().is_some_and(|address| {
            leaders.coordinator.as_ref() == Some(address) || leaders.members.contains(address)
        });
        let daemon = self.daemon.borrow();
        let state = match daemon.as_ref() {
            None => "dead",
            Some(daemon) if daemon.paused => "paused",
            Some(_) => "running",
        };
        HostStatus {
            name: self.name.clone(),
            state: state.to_owned(),
            pid: daemon.as_ref().map(|daemon| daemon.pid),
            cut: self.cut.get(),
            leads,
        }
    }
}

/// Serves `labctl` for as long as it is polled.
pub async fn serve_control(control: UnixListener, lab: Rc<Lab>) {
    while let Ok((connection, _)) = control.accept().await {
        let lab = Rc::clone(&lab);
        spawn_local(async move {
            // Whoever asked may be gone.
            let _ = answer(connection, &lab).await;
        });
    }
}

async fn answer(mut connection: UnixStream, lab: &Lab) -> anyhow::Result<()> {
    let mut line = String::new();
    BufReader::new(&mut connection).read_line(&mut line).await?;
    let reply: Reply = match serde_json::from_str(&line) {
        Ok(request) => lab
            .handle(request)
            .await
            .map_err(|error| format!("{error:#}")),
        Err(error) => Err(error.to_string()),
    };
    let mut text = serde_json::to_string(&reply)?;
    text.push('\n');
    connection.write_all(text.as_bytes()).await?;
    Ok(())
}

/// UDP addresses that are free now.
fn free_addresses(count: usize) -> io::Result<Vec<SocketAddr>> {
    let sockets = (0..count).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)));
    let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
    sockets.iter().map(UdpSocket::local_addr).collect()
}

/// An etcd cluster on this machine, with its data below the lab's directory.
fn etcd_members(directory: &Path) -> anyhow::Result<(Location, Vec<Host>)> {
    // For peers and for clients.
    let listeners = (0..2 * ETCD_MEMBERS).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
    let addresses = listeners.iter().map(|l| Ok(l.local_addr()?.to_string()));
    let addresses = addresses.collect::<io::Result<Vec<String>>>()?;
    let (peers, clients) = addresses.split_at(ETCD_MEMBERS);
    let cluster = peers.iter().enumerate();
    let cluster: Vec<String> = cluster
        .map(|(index, peer)| format!("etcd{}=http://{peer}", index + 1))
        .collect();
    let cluster = cluster.join(",");
    let member = |(index, (peer, client)): (usize, (&String, &String))| {
        let name = format!("etcd{}", index + 1);
        let [peer, url] = [peer, client].map(|address| format!("http://{address}"));
        let data = directory.join(&name).into_os_string();
        let mut arguments: Vec<OsString> = vec!["--data-dir".into(), data];
        let options = [
            ["--name", &name],
            ["--listen-client-urls", &url],
            ["--advertise-client-urls", &url],
            ["--listen-peer-urls", &peer],
            ["--initial-advertise-peer-urls", &peer],
            ["--initial-cluster", &cluster],
            ["--logger", "zap"],
        ];
        arguments.extend(options.iter().flatten().map(Into::into));
        Host {
            name,
            program: "etcd".into(),
            arguments,
            address: Some(client.clone()),
            is_etcd: true,
            daemon: Rc::default(),
            ended: Rc::default(),
            cut: Cell::new(false),
        }
    };
    let members = peers.iter().zip(clients).enumerate().map(member).collect();
    let location = format!("etcd://{}", clients.join(","));
    Ok((location.parse().map_err(anyhow::Error::msg)?, members))
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
