//! `migshm lab`: a throw-away cluster on this machine, around one command.
//!
//! ```text
//!  migshm lab ─┬─ reaper              ends everything when the lab is gone, however it went
//!              ├─ migshm coordinator  DIR/coordinator.log; coordinator1, ... and etcd1 to etcd3
//!              ├─ migshm node         DIR/node1/, DIR/node1.log; ... nodeN
//!              └─ COMMAND             MIGSHM_LAB=DIR, as a program of node1
//!                   └─ migshm labctl ──▶ DIR/control.sock
//! ```
//!
//! The hosts are those of [`hosts`](crate::hosts), with `--netns` each on a network of its own
//! ([`netns`]).
//!
//! The reaper waits for the end of a pipe whose other end the lab holds, so it also outlives a
//! SIGKILL of the lab. It is the only teardown there is: it kills every process that has the
//! lab's directory in its environment, then removes namespaces and directory.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{LocalSet, spawn_local};

use crate::config::Size;
use crate::hosts::{Lab, Setup, VARIABLE, serve_control};
use crate::{labctl, netns, processes, run};

/// Time the command has to end after a signal, before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// Run a command inside a throw-away cluster of nodes node1..nodeN on this machine.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Number of nodes.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Number of coordinators; of several one leads, with three members of etcd (Debian's etcd-server).
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=8))]
    coordinators: u16,
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
    let setup = Setup {
        nodes: args.nodes,
        coordinators: args.coordinators,
        memory: args.memory.0,
        networks: args.netns,
    };
    let lab = Lab::new(program, directory, &setup)?;
    lab.start().await?;
    let control = UnixListener::bind(directory.join(labctl::SOCKET))?;
    spawn_local(serve_control(control, Rc::new(lab)));
    command(&args.command, args.nodes, program, directory).await
}

/// Runs the lab's command to its end, or until this process is told to end.
async fn command(
    command: &[OsString],
    nodes: u16,
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
        .env("MIGSHM_LAB_NODES", nodes.to_string())
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
