//! The hosts of a lab: their daemons, and the faults that `migshm labctl` asks for.
//!
//! Daemons are real processes with real certificates. A host outlives its daemon, which can be
//! killed and started again with the same name, directory and address of the coordinator. A task
//! for each running daemon waits for its end and reports one that nobody wanted.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
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
/// Lines of a dead daemon's log that are shown.
const LOG_LINES: usize = 20;

/// What a lab consists of.
pub struct Lab {
    program: PathBuf,
    directory: PathBuf,
    hosts: Vec<Host>,
    network: Option<Network>,
}

/// A host of the lab: its daemon, dead or alive.
struct Host {
    name: String,
    arguments: Vec<OsString>,
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
    /// Makes certificates and networks for a coordinator and `nodes` nodes of `memory` bytes
    /// each. `program` is this command, `directory` the lab's.
    pub fn new(
        program: &Path,
        directory: &Path,
        nodes: u16,
        memory: u64,
        networks: bool,
    ) -> anyhow::Result<Lab> {
        let names: Vec<String> = std::iter::once(COORDINATOR.to_owned())
            .chain((1..=nodes).map(|number| format!("node{number}")))
            .collect();
        let certificates = directory.join("pki");
        pki::create_authority(&certificates)?;
        pki::issue(&certificates, &Peer::Coordinator, pki::DEFAULT_VALIDITY)?;
        for name in &names[1..] {
            pki::issue(&certificates, &Peer::node(name)?, pki::DEFAULT_VALIDITY)?;
        }
        let network = networks
            .then(|| Network::create(directory, &names))
            .transpose()?;
        let coordinator = match network {
            Some(_) => SocketAddr::from((netns::address(0), COORDINATOR_PORT)),
            None => free_address()?,
        };
        let hosts = names.into_iter().enumerate().map(|(index, name)| {
            let mut arguments: Vec<OsString> = ["--config", "/dev/null"].map(Into::into).into();
            if index == 0 {
                arguments
                    .extend(["coordinator", "--listen", &coordinator.to_string()].map(Into::into));
                arguments.extend(["--state-dir".into(), directory.join("state").into()]);
            } else {
                let ip = if networks {
                    netns::address(index)
                } else {
                    Ipv4Addr::LOCALHOST
                };
                let listen = format!("{ip}:0");
                let coordinator = coordinator.to_string();
                let memory = memory.to_string();
                let options = [
                    "--coordinator",
                    &coordinator,
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
                arguments,
                daemon: Rc::default(),
                ended: Rc::default(),
                cut: Cell::new(false),
            }
        });
        Ok(Lab {
            program: program.to_owned(),
            directory: directory.to_owned(),
            hosts: hosts.collect(),
            network,
        })
    }

    /// Starts all hosts; returns when they serve.
    pub async fn start(&self) -> anyhow::Result<()> {
        for host in &self.hosts {
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
            Request::Status { .. } => return Ok(self.hosts.iter().map(Host::status).collect()),
        }
        Ok(Vec::new())
    }

    fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts
            .iter()
            .find(|host| host.name == name)
            .with_context(|| {
                format!(
                    "the lab has no {name}; it has coordinator and node1 to node{}",
                    self.hosts.len() - 1
                )
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
    /// Starts the daemon and waits until it serves.
    async fn start(&self, lab: &Lab) -> anyhow::Result<()> {
        if self.daemon.borrow().is_some() {
            bail!("{} runs already", self.name);
        }
        let log = lab.directory.join(format!("{}.log", self.name));
        let output = File::options().create(true).append(true).open(&log)?;
        let (ready, tell) = io::pipe()?;
        let mut command = Command::new(&lab.program);
        command
            .args(&self.arguments)
            .arg("--ready-fd")
            .arg(tell.as_raw_fd().to_string())
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
        ] {
            command.env_remove(format!("MIGSHM_{name}"));
        }
        let namespace = match lab.network {
            Some(_) => Some(File::open(netns::path(&lab.directory, &self.name))?),
            None => None,
        };
        let fd = tell.as_raw_fd();
        let prepare = move || {
            if let Some(namespace) = &namespace {
                netns::enter_file(namespace)?;
            }
            // SAFETY: clears close-on-exec of an open descriptor.
            match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: `prepare` makes nothing but system calls.
        let mut child = unsafe { command.pre_exec(prepare) }
            .spawn()
            .context("cannot start a daemon")?;
        drop(tell);
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
        let shown = log.clone();
        spawn_local(async move {
            let status = child.wait().await;
            let gone = daemon.borrow_mut().take();
            if let (Ok(status), Some(Daemon { doomed: false, .. })) = (status, gone) {
                eprintln!(
                    "migshm: {name} ended unexpectedly ({status}); the end of {}:\n{}",
                    shown.display(),
                    tail(&shown)
                );
            }
            ended.notify_waiters();
        });

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

    fn status(&self) -> HostStatus {
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

/// A UDP address that is free now.
fn free_address() -> io::Result<SocketAddr> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
