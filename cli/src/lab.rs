//! `migshm lab`: a throw-away cluster on this machine, around one command.
//!
//! ```text
//!  migshm lab ─┬─ reaper              ends everything when the lab is gone, however it went
//!              ├─ migshm coordinator  DIR/coordinator.log
//!              ├─ migshm node         DIR/node1/, DIR/node1.log; ... nodeN
//!              └─ COMMAND             MIGSHM_LAB=DIR, as a program of node1
//!                   └─ migshm labctl ──▶ DIR/control.sock
//! ```
//!
//! Daemons are real processes with real certificates. With `--netns` each host has a network of
//! its own ([`netns`]).
//!
//! The reaper waits for the end of a pipe whose other end the lab holds, so it also outlives a
//! SIGKILL of the lab. It is the only teardown there is: it kills every process that has the
//! lab's directory in its environment, then removes namespaces and directory.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
use migshm_transport::{Peer, pki};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream, unix::pipe};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};

use crate::config::Size;
use crate::daemons::COORDINATOR_PORT;
use crate::labctl::{self, HostStatus, Reply, Request};
use crate::netns::{self, Network};
use crate::{processes, run};

/// The environment variable by which a lab's processes know it, and the reaper them.
const VARIABLE: &str = "MIGSHM_LAB";
const COORDINATOR: &str = "coordinator";
/// Time a daemon has to serve.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Time the command has to end after a signal, before it is killed.
const GRACE: Duration = Duration::from_secs(3);
/// Lines of a dead daemon's log that are shown.
const LOG_LINES: usize = 20;

/// Run a command inside a throw-away cluster of nodes node1..nodeN on this machine.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Number of nodes.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Give each host a network namespace, so that links can be cut (needs root and iproute2).
    #[arg(long)]
    netns: bool,
    /// Memory of each node, in bytes or with K, M, G, T; 0 for the machine's size.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    memory: Size,
    /// Keep the directory with the logs.
    #[arg(long)]
    keep: bool,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// What the reaper is told.
#[derive(Debug, clap::Args)]
pub struct ReapArgs {
    directory: PathBuf,
    #[arg(long)]
    keep: bool,
}

/// Runs the command; its exit status is the result.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let directory = PathBuf::from(format!("/tmp/migshm-lab-{}", std::process::id()));
    // Programs of other users must find their node's socket.
    fs::DirBuilder::new()
        .mode(0o755)
        .create(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let reaper = Reaper::start(&program, &directory, args.keep)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = LocalSet::new().block_on(&runtime, cluster(&args, &program, &directory));
    drop(runtime);
    reaper.finish();
    if args.keep {
        eprintln!("migshm: kept {}", directory.display());
    }
    result
}

/// The reaper's process: waits until the lab is gone, then removes what it left.
pub fn reap(args: ReapArgs) -> anyhow::Result<ExitCode> {
    // Ends when the lab closes it, in whatever way.
    let _ = io::stdin().read_to_end(&mut Vec::new());
    loop {
        // Until none is left: they may fork meanwhile.
        let left = processes::with_variable(VARIABLE, &args.directory);
        if left.is_empty() {
            break;
        }
        for pid in left {
            processes::signal(pid, libc::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    netns::remove(&args.directory);
    if !args.keep {
        fs::remove_dir_all(&args.directory)?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Reaper(Child);

impl Reaper {
    fn start(program: &Path, directory: &Path, keep: bool) -> anyhow::Result<Reaper> {
        let mut command = std::process::Command::new(program);
        command
            .arg("reap-lab")
            .arg(directory)
            .args(keep.then_some("--keep"));
        // A terminal's signals are not for it.
        command
            .stdin(Stdio::piped())
            .process_group(0)
            .env_remove(VARIABLE);
        Ok(Reaper(
            command.spawn().context("cannot start the lab's reaper")?,
        ))
    }

    fn finish(mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            eprintln!("migshm: the lab may not be torn down: {error}");
        }
        // The daemons, which have been killed.
        // SAFETY: waits for children of this process, which has no other use for them.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
    }
}

/// Starts the hosts, runs the command, and serves `labctl` meanwhile.
async fn cluster(args: &Args, program: &Path, directory: &Path) -> anyhow::Result<ExitCode> {
    let lab = Rc::new(Lab::new(args, program, directory)?);
    let control = UnixListener::bind(directory.join(labctl::SOCKET))?;
    for host in &lab.hosts {
        host.start(&lab).await?;
    }
    spawn_local(serve_control(control, Rc::clone(&lab)));
    command(&args.command, program, directory).await
}

/// Runs the lab's command to its end, or until this process is told to end.
async fn command(
    command: &[OsString],
    program: &Path,
    directory: &Path,
) -> anyhow::Result<ExitCode> {
    let (name, arguments) = command.split_first().expect("clap requires a command");
    let mut search = vec![program.parent().unwrap_or(Path::new("/")).to_owned()];
    search.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    let mut command = Command::new(name);
    command
        .args(arguments)
        .env(VARIABLE, directory)
        .env("MIGSHM_RUNTIME_DIR", directory.join("node1"))
        .env("PATH", std::env::join_paths(search)?)
        .env_remove("MIGSHM_COORDINATOR");
    if let Ok(library) = run::library() {
        command.env("MIGSHM_PRELOAD", library);
    }
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("migshm: {}: {error}", name.display());
            let code = if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            return Ok(ExitCode::from(code));
        }
    };
    let pid = child.id().map(|pid| pid as i32);
    // A terminal has sent its SIGINT to the command as well, which may handle it and go on.
    let interactive = io::IsTerminal::is_terminal(&io::stdin());
    let number = loop {
        tokio::select! {
            status = child.wait() => return Ok(exit_code(status?)),
            _ = interrupt.recv() => if !interactive { break libc::SIGINT },
            _ = terminate.recv() => break libc::SIGTERM,
            _ = hangup.recv() => break libc::SIGHUP,
        }
    };
    if let Some(pid) = pid {
        processes::signal(pid, number);
    }
    let _ = tokio::time::timeout(GRACE, child.wait()).await;
    Ok(ExitCode::from(128 + number as u8))
}

/// As a shell reports it.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(code as u8)
}

struct Lab {
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
    cut: RefCell<bool>,
}

/// A running daemon.
struct Daemon {
    pid: i32,
    paused: bool,
    /// Whether its end is wanted.
    doomed: bool,
}

impl Lab {
    fn new(args: &Args, program: &Path, directory: &Path) -> anyhow::Result<Lab> {
        let names: Vec<String> = std::iter::once(COORDINATOR.to_owned())
            .chain((1..=args.nodes).map(|number| format!("node{number}")))
            .collect();
        let certificates = directory.join("pki");
        pki::create_authority(&certificates)?;
        pki::issue(&certificates, &Peer::Coordinator, pki::DEFAULT_VALIDITY)?;
        for name in &names[1..] {
            pki::issue(&certificates, &Peer::node(name)?, pki::DEFAULT_VALIDITY)?;
        }
        let network = args
            .netns
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
            } else {
                let ip = if args.netns {
                    netns::address(index)
                } else {
                    Ipv4Addr::LOCALHOST
                };
                let listen = format!("{ip}:0");
                let coordinator = coordinator.to_string();
                let memory = args.memory.0.to_string();
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
                cut: RefCell::new(false),
            }
        });
        Ok(Lab {
            program: program.to_owned(),
            directory: directory.to_owned(),
            hosts: hosts.collect(),
            network,
        })
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
        *host.cut.borrow_mut() = cut;
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
            .env_remove("LD_PRELOAD")
            .env(VARIABLE, &lab.directory);
        for name in [
            "COORDINATOR",
            "COORDINATOR_LISTEN",
            "RUNTIME_DIR",
            "NAME",
            "LISTEN",
            "MEMORY",
            "PKI",
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
            Ok(Ok(_)) => bail!("{}: {word}", self.name),
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
            cut: *self.cut.borrow(),
        }
    }
}

async fn serve_control(control: UnixListener, lab: Rc<Lab>) {
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
