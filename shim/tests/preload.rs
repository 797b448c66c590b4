//! The library in unmodified C programs (`tests/c`), against a scripted daemon
//! (`tests/fake_node`).

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use migshm_protocol::call::{Call, Errno};
use migshm_protocol::local::{LOCAL_VERSION, ToNode};

mod fake_node;

use fake_node::{FakeNode, Heard, Script};

/// Copies a program, in a process of its own: a file that this process has open for writing while
/// another thread forks is busy for exec.
fn copy_program(from: &std::path::Path, to: &std::path::Path) {
    let status = std::process::Command::new("cp").args([from, to]).status();
    assert!(status.expect("cp").success());
}

#[test]
fn every_function_works_from_everywhere() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    for from in [
        "main", "syscall", "thread", "signal", "fork", "clone", "vfork", "spawn",
    ] {
        let program = compile("calls.c", &[]);
        succeeds(place.command(&program).arg(from), from);
    }
    assert!(node.heard().iter().all(|heard| match heard.message {
        ToNode::Hello { version, .. } => version == LOCAL_VERSION,
        _ => true,
    }));
}

#[test]
fn calls_work_in_a_constructor_that_runs_before_ours() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    let library = compile("calls.c", &["-DCONSTRUCTOR", "-shared", "-fPIC"]);
    let program = compile("idle.c", &[]);
    // The later of two preloaded libraries is initialised first.
    let both = format!("{}:{}", shim().display(), library.display());
    succeeds(
        place.command(&program).env("LD_PRELOAD", both),
        "constructor",
    );
}

#[test]
fn blocked_operations_end_by_signals_and_timeouts_as_in_linux() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    succeeds(
        &mut place.command(&compile("interrupt.c", &[])),
        "interrupt",
    );
    let cancelled = |errno| {
        let cancels =
            |heard: &&Heard| matches!(heard.message, ToNode::Cancel { errno: e, .. } if e == errno);
        node.heard().iter().filter(cancels).count()
    };
    assert_eq!(cancelled(Errno::EINTR), 17);
    // With a timeout of zero, a cancellation may cross the answer of an operation that was done.
    assert!((4..=5).contains(&cancelled(Errno::EAGAIN)));
}

#[test]
fn a_signal_ends_a_blocked_operation_at_whatever_instant_it_comes() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    succeeds(&mut place.command(&compile("signals.c", &[])), "signals");
}

#[test]
fn the_child_of_a_handler_that_forks_leaves_the_call_to_its_parent() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    succeeds(&mut place.command(&compile("forker.c", &[])), "forker");
}

#[test]
fn a_program_may_close_or_reuse_all_descriptors() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    succeeds(&mut place.command(&compile("closer.c", &[])), "closer");
}

#[test]
fn more_threads_can_block_than_the_pool_has_connections() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    succeeds(
        &mut place.command(&compile("crowd.c", &["-pthread"])),
        "crowd",
    );
    let hellos = node
        .heard()
        .iter()
        .filter(|heard| matches!(heard.message, ToNode::Hello { .. }))
        .count();
    assert!(
        hellos < 2 * 200,
        "the second round uses the pool again: {hellos} connections"
    );
}

#[test]
fn calls_reuse_one_connection() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    succeeds(place.command(&compile("calls.c", &[])).arg("main"), "main");
    let heard = node.heard();
    assert!(heard.len() > 40 && heard.iter().all(|heard| heard.connection == 1));
}

#[test]
fn a_daemon_that_restarts_between_calls_is_not_noticed() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    let mut steps = Steps::start(&place);
    assert_eq!(steps.errno_of("call"), 0);
    node.stop();
    let _node = FakeNode::start(place.dir(), Script::default());
    assert_eq!(steps.errno_of("call"), 0);
    assert_eq!(steps.end(), "");
}

#[test]
fn a_daemon_that_dies_during_a_call_fails_it_with_one_line() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    let mut steps = Steps::start(&place);
    assert_eq!(steps.errno_of("die"), libc::ENOSYS);
    assert_eq!(steps.errno_of("die"), libc::ENOSYS);
    assert_eq!(steps.errno_of("call"), 0);
    let said = steps.end();
    assert!(is_one_line(&said), "{said}");
}

#[test]
fn a_changed_user_gets_a_new_connection() {
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can change its user");
        return;
    }
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    let mut steps = Steps::start(&place);
    assert_eq!(steps.errno_of("call"), 0);
    assert_eq!(steps.errno_of("nobody"), 0);
    assert_eq!(steps.errno_of("call"), 0);
    steps.end();
    let users: Vec<u32> = hellos(&node).iter().map(|hello| hello.uid).collect();
    assert_eq!(users, [0, 65534]);
}

#[test]
fn a_refusal_is_what_the_call_returns() {
    let place = Place::new();
    let _node = FakeNode::start(
        place.dir(),
        Script {
            refuse: Some(Errno::ENOSYS),
            ..Script::default()
        },
    );
    let output = place
        .command(&compile("nobody.c", &[]))
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && is_one_line(&said), "{said}");
}

#[test]
fn without_a_daemon_calls_fail_with_one_line() {
    let place = Place::new();
    let missing = place.dir().join("missing");
    let output = place
        .command(&compile("nobody.c", &[]))
        .env("MIGSHM_BIN", missing)
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && is_one_line(&said), "{said}");
    assert!(
        said.contains("missing: No such file or directory"),
        "{said}"
    );
}

#[test]
fn a_daemon_that_fails_to_start_says_why() {
    let place = Place::new();
    let mut command = place.autostarting(&compile("nobody.c", &[]));
    let output = command.env("FAKE_NODE_FAILS", "1").output().expect("run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && is_one_line(&said), "{said}");
    assert!(said.contains("told to fail"), "{said}");
}

#[test]
fn of_twenty_processes_at_once_one_starts_the_daemon() {
    let place = Place::new();
    let program = compile("calls.c", &[]);
    let start = |_| {
        place
            .autostarting(&program)
            .arg("main")
            .spawn()
            .expect("spawn")
    };
    let children: Vec<Child> = (0..20).map(start).collect();
    for mut child in children {
        assert!(child.wait().expect("wait").success());
    }
    assert_eq!(place.starts(), "clean\n");
}

#[test]
fn the_program_that_starts_the_daemon_has_no_child() {
    let place = Place::new();
    succeeds(
        &mut place.autostarting(&compile("stranger.c", &[])),
        "stranger",
    );
    assert_eq!(place.starts(), "clean\n");
}

#[test]
fn the_daemon_is_found_beside_the_library() {
    let place = Place::new();
    let library = place.dir().join("libmigshm.so");
    std::fs::copy(shim(), &library).expect("copy");
    copy_program(&fake_program(), &place.dir().join("migshm"));
    succeeds(
        place
            .command(&compile("calls.c", &[]))
            .arg("main")
            .env("LD_PRELOAD", library),
        "beside",
    );
    assert_eq!(place.starts(), "clean\n");
}

#[test]
fn a_private_directory_of_another_user_is_refused() {
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs two users");
        return;
    }
    let place = Place::new();
    let foreign = place.dir().join("migshm");
    std::fs::create_dir(&foreign).expect("mkdir");
    let library = place.dir().join("libmigshm.so");
    std::fs::copy(shim(), &library).expect("copy");
    let program = place.dir().join("nobody");
    copy_program(&compile("nobody.c", &[]), &program);
    let mut command = place.command(&program);
    command
        .env_remove("MIGSHM_RUNTIME_DIR")
        .env("XDG_RUNTIME_DIR", place.dir())
        .env("LD_PRELOAD", library);
    let output = std::os::unix::process::CommandExt::uid(&mut command, 65534)
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && is_one_line(&said), "{said}");
    assert!(said.contains("other users"), "{said}");
}

#[test]
fn forks_that_inherit_an_attach_introduce_themselves() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    let output = place
        .command(&compile("heir.c", &[]))
        .output()
        .expect("run");
    let [parent, forked, cloned] = pids(&output)[..] else {
        panic!("{output:?}")
    };
    let said: Vec<(i32, i32)> = hellos(&node)
        .iter()
        .map(|heard| match heard.message {
            ToNode::Hello { forked_from, .. } => (heard.pid, forked_from),
            _ => unreachable!(),
        })
        .collect();
    assert_eq!(said, [(parent, 0), (forked, parent), (cloned, parent)]);
}

#[test]
fn a_tracked_address_space_is_anchored_and_its_forks_are_introduced() {
    if std::fs::File::open("/dev/userfaultfd").is_err() {
        eprintln!("skipped: /dev/userfaultfd cannot be opened");
        return;
    }
    let place = Place::new();
    let node = FakeNode::start(
        place.dir(),
        Script {
            track: true,
            ..Script::default()
        },
    );
    let output = place
        .command(&compile("heir.c", &[]))
        .output()
        .expect("run");
    let all = pids(&output);
    assert_eq!(all.len(), 3, "{output:?}");
    assert_eq!(node.introduced(), all);
    let anchors = node
        .heard()
        .iter()
        .filter(|heard| matches!(heard.message, ToNode::Anchor { .. }))
        .count();
    assert_eq!(anchors, 1);
    let forked_from = |heard: &Heard| matches!(heard.message, ToNode::Hello { forked_from, .. } if forked_from != 0);
    assert!(!node.heard().iter().any(forked_from));

    for from in ["main", "thread", "signal", "fork", "clone", "vfork"] {
        succeeds(place.command(&compile("calls.c", &[])).arg(from), from);
    }
}

#[test]
fn a_cancelled_thread_makes_its_calls_and_ends_at_a_cancellation_point() {
    let tracks = std::fs::File::open("/dev/userfaultfd").is_ok();
    for track in [false, tracks] {
        let place = Place::new();
        let script = Script {
            track,
            ..Script::default()
        };
        let _node = FakeNode::start(place.dir(), script);
        let program = compile("cancelled.c", &["-pthread"]);
        succeeds(&mut place.command(&program), "cancelled");
    }
}

#[test]
fn who_has_waited_for_a_process_asks_until_its_end_is_seen() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    succeeds(
        &mut place.command(&compile("reap.c", &["-pthread"])),
        "reap",
    );
    let reaped = |heard: &&Heard| matches!(heard.message, ToNode::Reaped { .. });
    assert_eq!(node.heard().iter().filter(reaped).count(), 6);
}

#[test]
fn a_mapping_that_fails_gives_the_attach_up() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    succeeds(place.command(&compile("calls.c", &[])).arg("main"), "main");
    let heard = node.heard();
    let given_up = heard
        .iter()
        .filter(|heard| matches!(heard.message, ToNode::Mapped { address: 0, .. }))
        .count();
    assert_eq!(
        given_up, 2,
        "the occupied place and the one past the end of memory"
    );
}

#[test]
fn operations_travel_as_the_program_laid_them_out() {
    let place = Place::new();
    let node = FakeNode::start(place.dir(), Script::default());
    succeeds(place.command(&compile("calls.c", &[])).arg("main"), "main");
    let first = node.heard().into_iter().find(|heard| {
        matches!(
            heard.message,
            ToNode::Call {
                call: Call::SemOp { .. },
                ..
            }
        )
    });
    assert_eq!(
        first.expect("a semop").raw,
        [0, 0, 0xff, 0xff, 0, 0x10, 1, 0, 2, 0, 0, 0x08]
    );
}

#[test]
fn files_that_tell_of_objects_open_by_every_function() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    succeeds(
        place.command(&compile("files.c", &[])).arg(place.dir()),
        "files",
    );
}

#[test]
fn there_are_no_such_files_without_a_daemon() {
    let place = Place::new();
    let output = place
        .command(Path::new("cat"))
        .arg("/proc/sysvipc/shm")
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
    assert!(said.contains("No such file or directory"), "{said}");
}

/// fakeroot's `fstat` makes System V calls; one of ours within such a call had no end.
#[test]
fn functions_that_another_library_replaces_are_not_called() {
    let place = Place::new();
    let replacing = compile("replaced.c", &["-DLIBRARY", "-shared", "-fPIC"]);
    let both = format!("{}:{}", replacing.display(), shim().display());
    let program = compile("replaced.c", &[]);
    let mut command = place.autostarting(&program);
    succeeds(command.env("LD_PRELOAD", both), "replaced");
    assert_eq!(place.starts(), "clean\n");
}

#[test]
fn a_library_loaded_with_deepbind_is_served() {
    let place = Place::new();
    let _node = FakeNode::start(place.dir(), Script::default());
    let plugin = compile("deep.c", &["-DPLUGIN", "-shared", "-fPIC"]);
    let name = plugin.file_name().expect("a file").to_string_lossy();
    let define = format!("-DNAME=\"{name}\"");
    let program = compile("deep.c", &[&define, "-Wl,-rpath,$ORIGIN"]);
    succeeds(&mut place.command(&program), "deep");
}

#[test]
fn a_program_without_system_v_calls_pays_nothing() {
    let Ok(_) = Command::new("strace").arg("-V").output() else {
        eprintln!("skipped: no strace");
        return;
    };
    let program = compile("idle.c", &[]);
    let trace = |preload: Option<PathBuf>| {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-e", "signal=none"]);
        if let Some(preload) = preload {
            command.arg(format!("-ELD_PRELOAD={}", preload.display()));
        }
        let output = command.arg(&program).output().expect("strace");
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let between = text.lines().skip_while(|line| !line.contains("begin"));
        // The names of the calls; what strace says of interleaved ones varies.
        let mut names: Vec<String> = between
            .filter(|line| !line.contains("resumed>") && line.contains('('))
            .map(|line| {
                line.split('(')
                    .next()
                    .unwrap()
                    .rsplit(' ')
                    .next()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        names.sort();
        names
    };
    assert_eq!(trace(Some(shim())), trace(None));
}

#[test]
fn only_the_functions_it_replaces_and_its_marker_are_exported() {
    let output = Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(shim())
        .output()
        .expect("nm");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut symbols: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    symbols.sort_unstable();
    let expected = [
        "__open",
        "__open64",
        "__open64_2",
        "__open_2",
        "__openat64_2",
        "__openat_2",
        "dlmopen",
        "dlopen",
        "execl",
        "execle",
        "execlp",
        "execv",
        "execve",
        "execveat",
        "execvp",
        "execvpe",
        "fexecve",
        "fopen",
        "fopen64",
        "freopen",
        "freopen64",
        "initgroups",
        "migshm_version",
        "mmap",
        "mmap64",
        "mprotect",
        "mremap",
        "msgctl",
        "msgget",
        "msgrcv",
        "msgsnd",
        "munmap",
        "open",
        "open64",
        "openat",
        "openat64",
        "pkey_mprotect",
        "posix_spawn",
        "posix_spawnp",
        "semctl",
        "semget",
        "semop",
        "semtimedop",
        "setegid",
        "seteuid",
        "setgid",
        "setgroups",
        "setregid",
        "setresgid",
        "setresuid",
        "setreuid",
        "setuid",
        "shmat",
        "shmctl",
        "shmdt",
        "shmget",
        "syscall",
        "wait",
        "wait3",
        "wait4",
        "waitid",
        "waitpid",
    ];
    assert_eq!(symbols, expected);
}

#[test]
fn the_launcher_sees_that_the_library_is_in_force() {
    let place = Place::new();
    let program = compile("idle.c", &[]);
    for preloaded in [true, false] {
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        // SAFETY: plain numbers: the program inherits this descriptor.
        unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFD, 0) };
        let mut command = place.command(&program);
        command.stdout(Stdio::null());
        if !preloaded {
            command.env_remove("LD_PRELOAD");
        }
        let status = command
            .env("MIGSHM_VERIFY_FD", writer.as_raw_fd().to_string())
            .status();
        assert!(status.expect("run").success());
        drop(writer);
        let mut said = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut said).expect("read");
        assert_eq!(said, if preloaded { &b"+"[..] } else { b"" });
    }
}

/// A fresh runtime directory, removed when dropped; a daemon that was started in it ends then.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "migshm-shim-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).expect("runtime directory");
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).expect("its mode");
        Place(dir)
    }

    fn dir(&self) -> &Path {
        &self.0
    }

    /// A program under the library, with this runtime directory and no way to start a daemon.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("LD_PRELOAD", shim())
            .env("MIGSHM_RUNTIME_DIR", &self.0)
            .env_remove("MIGSHM_BIN");
        command
    }

    /// The same, able to start the fake daemon.
    fn autostarting(&self, program: &Path) -> Command {
        let mut command = self.command(program);
        command.env("MIGSHM_BIN", fake_program());
        command
    }

    /// What the daemons that were started said about what they inherited.
    fn starts(&self) -> String {
        std::fs::read_to_string(self.0.join("starts")).expect("a daemon was started")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.0.join("starts").exists() {
            let _ = std::fs::write(self.0.join("stop"), "");
            // The daemon looks every 20 ms.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running `steps.c`.
struct Steps {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Steps {
    fn start(place: &Place) -> Steps {
        let mut command = place.command(&compile("steps.c", &[]));
        let piped = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = piped.spawn().expect("spawn");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Steps { child, answers }
    }

    fn errno_of(&mut self, step: &str) -> i32 {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{step}").expect("step");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("answer");
        line.trim().parse().expect("an errno")
    }

    /// Ends the program; what it said on stderr.
    fn end(mut self) -> String {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().expect("wait");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

fn succeeds(command: &mut Command, what: &str) {
    let output = command.output().expect("run");
    assert!(
        output.status.success(),
        "{what}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{what}");
}

fn is_one_line(text: &str) -> bool {
    text.starts_with("migshm: ") && text.ends_with('\n') && text.lines().count() == 1
}

fn hellos(node: &FakeNode) -> Vec<Heard> {
    node.heard()
        .into_iter()
        .filter(|heard| matches!(heard.message, ToNode::Hello { .. }))
        .collect()
}

fn pids(output: &Output) -> Vec<i32> {
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.parse().expect("a pid"))
        .collect()
}

/// Where cargo puts what it builds for this profile.
fn build_dir() -> PathBuf {
    let test = std::env::current_exe().expect("own path");
    test.ancestors()
        .nth(2)
        .expect("target/PROFILE/deps/TEST")
        .to_owned()
}

fn shim() -> PathBuf {
    build_dir().join("deps/libmigshm.so")
}

fn fake_program() -> PathBuf {
    build_dir().join("examples/fake-node")
}

/// Compiles a program of `tests/c`; each call makes a file of its own, as tests run in parallel.
fn compile(source: &str, flags: &[&str]) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let dir = build_dir().join("c-programs");
    std::fs::create_dir_all(&dir).expect("folder for programs");
    let name = format!(
        "{}-{}",
        source.trim_end_matches(".c"),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let program = dir.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/c")
        .join(source);
    let status = Command::new("gcc")
        .args([
            "-Wall",
            "-Wextra",
            "-O1",
            "-Wno-nonnull",
            "-Wno-stringop-overread",
            "-Wno-array-bounds",
            "-pthread",
            "-o",
        ])
        .arg(&program)
        .arg(source)
        .args(flags)
        .status();
    assert!(status.expect("gcc").success());
    program
}
