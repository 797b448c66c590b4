//! What the cluster tests stand on: real daemons, unmodified C programs, processes of any node.
//!
//! ```text
//!  Lab ── migshm lab ─┬─ coordinator, node1, ... nodeN
//!   │                 └─ cat                 its end of input ends the lab
//!   └─ lab.on(2, ..) ── migshm run --on node2 -- PROGRAM
//!
//!  Solo ── a fresh runtime directory ◀── PROGRAM under LD_PRELOAD, which starts the daemon
//! ```
//!
//! Nothing outlives its owner: a [`Lab`] that is dropped checks that the teardown has left
//! nothing, a [`Solo`] ends what it started, a command that takes longer than [`LIMIT`] is killed
//! with all its processes. Daemons and programs are told from those of other tests by a directory
//! in their environment.
//!
//! A program is one of `c-tests/build` or of `tests/programs`, by its name; see [`program`].

pub mod chaos;
pub mod decoders;
mod process;
pub mod random;
mod solo;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use process::{LIMIT, Outcome, Process, run};
pub use solo::Solo;

/// How long [`eventually`] waits for what is promised, but for no particular time.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until a condition holds.
///
/// # Panics
/// If it does not within a generous time.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether this user may do what `what` needs; says so if not, for a test that is then skipped.
#[must_use]
pub fn is_root_for(what: &str) -> bool {
    // SAFETY: no preconditions.
    let is_root = unsafe { libc::geteuid() } == 0;
    if !is_root {
        eprintln!("skipped: {what} needs root");
    }
    is_root
}

/// A file of the build.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn built(path: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a folder of the workspace");
    let file = root.join(path);
    assert!(
        file.exists(),
        "{} is missing: run scripts/test",
        file.display()
    );
    file
}

/// The `migshm` command, without what the environment may say of migshm.
#[must_use]
pub fn migshm() -> Command {
    command(built("target/release/migshm"))
}

/// The preload library.
#[must_use]
pub fn library() -> PathBuf {
    built("target/release/libmigshm.so")
}

/// A C program: of this folder, which is compiled for the first test that asks, or of `c-tests`.
///
/// # Panics
/// If there is none of this name, or it does not compile.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    let own = COMPILED.get_or_init(compile_programs).join(name);
    if own.exists() {
        return own;
    }
    built(&format!("c-tests/build/{name}"))
}

/// Compiles all of `programs/`; returns the folder of the results.
fn compile_programs() -> PathBuf {
    let folder = built("target").join("test-programs");
    fs::create_dir_all(&folder).expect("target/ can be written");
    for entry in fs::read_dir(built("tests/programs")).expect("it is there") {
        let source = entry.expect("it is there").path();
        let name = source.file_stem().expect("a name").to_owned();
        // Another run of the tests may be using the old one.
        let new = tempfile::NamedTempFile::new_in(&folder)
            .expect("target/ can be written")
            .into_temp_path();
        let mut gcc = Command::new("gcc");
        gcc.args([
            "-std=c11",
            "-D_GNU_SOURCE",
            "-O2",
            "-Wall",
            "-Wextra",
            "-pthread",
        ]);
        run(gcc.args(["-Werror", "-o"]).arg(&new).arg(&source)).succeeded();
        fs::rename(&new, folder.join(name)).expect("same folder");
    }
    folder
}

/// A command in an environment that says nothing of migshm.
#[must_use]
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("MIGSHM_"))
        {
            command.env_remove(name);
        }
    }
    command
}

/// Processes that were started with this variable in their environment.
#[must_use]
pub fn processes_with(name: &str, value: &Path) -> Vec<i32> {
    let wanted = format!("{name}={}", value.display());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|&byte| byte == 0)
                .any(|variable| variable == wanted.as_bytes())
        })
        .collect()
}

/// Lines shown before and from the first difference.
const SHOWN: usize = 12;

/// Expects that a program whose last line is `end` has printed the same on the kernel's own IPC
/// and on ours.
///
/// # Panics
/// If it has not, with the lines around the first difference.
#[track_caller]
pub fn assert_prints_as_on_the_kernel(what: &str, kernel: &str, ours: &str) {
    assert!(kernel.ends_with("end\n"), "{kernel}");
    let differs = kernel.lines().zip(ours.lines()).position(|(k, o)| k != o);
    if let Some(line) = differs {
        let shown = |text: &str| {
            let from = text.lines().skip(line.saturating_sub(SHOWN));
            from.take(2 * SHOWN).collect::<Vec<_>>().join("\n")
        };
        panic!(
            "{what}, line {line}\n== kernel\n{}\n== migshm\n{}",
            shown(kernel),
            shown(ours)
        );
    }
    assert_eq!(kernel.len(), ours.len(), "{what}: one side stopped early");
}

/// Number of descriptors that a process has open.
#[must_use]
pub fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// A running cluster of node1..nodeN on this machine.
#[derive(Debug)]
pub struct Lab {
    command: Child,
    input: Option<ChildStdin>,
    nodes: usize,
    directory: PathBuf,
}

impl Lab {
    /// Starts a cluster.
    #[must_use]
    pub fn new(nodes: usize) -> Lab {
        Lab::with(nodes, &[])
    }

    /// Starts a cluster with further options of `migshm lab`.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn with(nodes: usize, options: &[&str]) -> Lab {
        Lab::of(nodes, options, &[])
    }

    /// Starts a cluster in which segments with these keys have release consistency.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn with_release_keys(nodes: usize, keys: &str) -> Lab {
        Lab::with_environment(nodes, &[("MIGSHM_RELEASE_KEYS", keys)])
    }

    /// Starts a cluster whose daemons have these variables in their environment.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn with_environment(nodes: usize, variables: &[(&str, &str)]) -> Lab {
        Lab::of(nodes, &[], variables)
    }

    /// Starts a cluster with these options of `migshm lab` and such variables.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn of(nodes: usize, options: &[&str], variables: &[(&str, &str)]) -> Lab {
        let mut command = migshm()
            .args(["lab", "--nodes", &nodes.to_string()])
            .args(options)
            .envs(variables.iter().copied())
            .args(["--", "sh", "-c", "echo $MIGSHM_LAB; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("migshm can be executed");
        let input = command.stdin.take();
        let mut directory = String::new();
        BufReader::new(command.stdout.take().expect("piped"))
            .read_line(&mut directory)
            .expect("the lab's command prints its directory");
        assert!(!directory.is_empty(), "the lab did not start");
        Lab {
            command,
            input,
            nodes,
            directory: directory.trim().into(),
        }
    }

    /// The lab's directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A node's runtime directory.
    #[must_use]
    pub fn node(&self, node: usize) -> PathBuf {
        self.directory.join(format!("node{node}"))
    }

    /// Any command, as one inside the lab: of node 1, with `migshm` on its path.
    #[must_use]
    pub fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = command(program);
        let commands = built("target/release");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", commands.display()))
            .env("MIGSHM_LAB", &self.directory)
            .env("MIGSHM_LAB_NODES", self.nodes.to_string())
            .env("MIGSHM_RUNTIME_DIR", self.node(1));
        command
    }

    /// A [`program`] as a process of a node, counted from 1.
    #[must_use]
    pub fn on(&self, node: usize, name: &str) -> Command {
        let mut command = self.inside(built("target/release/migshm"));
        command.args(["run", "--on", &format!("node{node}"), "--"]);
        command.arg(program(name));
        command
    }

    /// A [`program`] that is told what to do, as a process of a node.
    #[must_use]
    pub fn start(&self, node: usize, name: &str) -> Process {
        Process::start(&mut self.on(node, name))
    }

    /// A process of each of the first nodes, with the same semaphore.
    #[must_use]
    pub fn with_semaphore<const N: usize>(&self) -> [Process; N] {
        std::array::from_fn(|index| {
            let mut process = self.start(index + 1, "sysv");
            process.obey("semaphore 1");
            process
        })
    }

    /// Runs the ranks of a program of `c-tests`, rank r on node r modulo nodes.
    ///
    /// # Panics
    /// If any rank fails.
    #[track_caller]
    pub fn spread(&self, name: &str, ranks: usize, options: &[&str]) {
        run(&mut self.ranks(name, ranks, options)).succeeded();
    }

    /// The same, with segments of release consistency.
    ///
    /// # Panics
    /// If any rank fails.
    #[track_caller]
    pub fn spread_released(&self, name: &str, ranks: usize, options: &[&str]) {
        let mut command = self.ranks(name, ranks, options);
        run(command.env("MIGSHM_CONSISTENCY", "release")).succeeded();
    }

    fn ranks(&self, name: &str, ranks: usize, options: &[&str]) -> Command {
        let mut command = self.inside(built("c-tests/spread.sh"));
        command.args([name, &ranks.to_string()]).args(options);
        command
    }

    /// Injects a fault, or undoes one.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn labctl(&self, arguments: &[&str]) -> Outcome {
        run(self
            .inside(built("target/release/migshm"))
            .arg("labctl")
            .args(arguments))
        .succeeded()
    }

    /// What `migshm labctl status` says of a host.
    ///
    /// # Panics
    /// If there is no such host.
    #[must_use]
    pub fn host(&self, name: &str) -> Value {
        let hosts = self.labctl(&["status", "--json"]).json();
        let mut hosts = hosts.as_array().expect("a list").iter();
        let host = hosts.find(|host| host["name"] == name);
        host.unwrap_or_else(|| panic!("no host {name}")).clone()
    }

    /// The host of a kind that leads: `coordinator` or `etcd`.
    #[must_use]
    pub fn leader(&self, kind: &str) -> Option<String> {
        let hosts = self.labctl(&["status", "--json"]).json();
        let mut hosts = hosts.as_array().expect("a list").iter();
        let leads = |host: &&Value| {
            let name = host["name"].as_str().expect("a name");
            host["leads"] == true && name.starts_with(kind)
        };
        let leader = hosts.find(leads)?["name"].as_str();
        leader.map(str::to_owned)
    }

    /// Where the coordinator listens.
    ///
    /// # Panics
    /// If node 1 does not run.
    #[must_use]
    pub fn coordinator(&self) -> String {
        let node1 = format!("/proc/{}/cmdline", self.pid("node1"));
        let arguments = fs::read_to_string(node1).expect("it runs");
        let mut arguments = arguments.split('\0');
        arguments
            .find(|argument| *argument == "--coordinator")
            .and_then(|_| arguments.next())
            .expect("a node of a cluster has one")
            .to_owned()
    }

    /// Pid of a host's daemon.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn pid(&self, host: &str) -> i32 {
        let pid = self.host(host)["pid"].as_i64().expect("it runs");
        i32::try_from(pid).expect("pids are small")
    }

    /// What a node's daemon says of itself.
    #[must_use]
    pub fn status(&self, node: usize) -> Value {
        let mut command = self.inside(built("target/release/migshm"));
        command.args(["status", "--json"]);
        run(command.env("MIGSHM_RUNTIME_DIR", self.node(node)))
            .succeeded()
            .json()
    }

    /// Segments and semaphore sets of the cluster.
    #[must_use]
    pub fn ipcs(&self) -> Value {
        run(self
            .inside(built("target/release/migshm"))
            .args(["ipcs", "--json"]))
        .succeeded()
        .json()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let failing = std::thread::panicking();
        if failing {
            for file in fs::read_dir(&self.directory)
                .into_iter()
                .flatten()
                .flatten()
            {
                if file.path().extension() == Some("log".as_ref()) {
                    let text = fs::read_to_string(file.path()).unwrap_or_default();
                    let _ = write!(std::io::stderr(), "== {}\n{text}", file.path().display());
                }
            }
        }
        drop(self.input.take());
        let status = self.command.wait();
        if !failing {
            assert!(status.is_ok_and(|status| status.success()));
            assert!(!self.directory.exists());
            assert_eq!(processes_with("MIGSHM_LAB", &self.directory), [0; 0]);
        }
    }
}
