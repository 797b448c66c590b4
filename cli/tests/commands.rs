//! The command as its users call it: certificates, configuration, programs, a lab's life.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The command, in an environment that says nothing.
fn migshm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_migshm"));
    command.args(args);
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

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// The command in a directory without the library. A link: a copy could not be executed while a
/// process that another test has just forked holds the descriptor that it was written through.
fn installed_alone() -> (TempDir, PathBuf) {
    let built = Path::new(env!("CARGO_BIN_EXE_migshm"));
    let directory = tempfile::tempdir_in(built.parent().unwrap()).unwrap();
    let command = directory.path().join("migshm");
    fs::hard_link(built, &command).unwrap();
    (directory, command)
}

/// A shell script inside a lab of `nodes`.
fn lab(nodes: &str, script: &str) -> Command {
    migshm(&["lab", "--nodes", nodes, "--", "sh", "-c", script])
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn certificates_are_made_shown_and_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path().join("pki");
    let pki = pki.to_str().unwrap();
    for args in [
        &["pki", "init", "--dir", pki][..],
        &["pki", "coordinator", "--dir", pki],
        &["pki", "node", "--dir", pki, "--name", "n1"],
    ] {
        let (status, _, error) = output(&mut migshm(args));
        assert_eq!((status, error.as_str()), (Some(0), ""));
    }
    let (status, shown, _) = output(&mut migshm(&["pki", "show", "--dir", pki]));
    assert_eq!(status, Some(0));
    assert!(
        shown.starts_with("the coordinator: valid until 20"),
        "{shown}"
    );
    assert!(shown.contains("\nnode n1: valid until 20"), "{shown}");

    let (status, _, error) = output(&mut migshm(&["pki", "node", "--dir", pki, "--name", "n1"]));
    assert_eq!(status, Some(1));
    assert!(
        error.contains("n1.pem exists and is never overwritten"),
        "{error}"
    );
    let (_, _, error) = output(&mut migshm(&["pki", "node", "--dir", pki, "--name", "N_1"]));
    assert!(error.contains("\"N_1\" is not a node name"), "{error}");
}

#[test]
fn certificates_are_renewed_revoked_and_moved_to_another_authority() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path().join("pki");
    let does = |args: &[&str]| {
        let mut command = migshm(&["pki"]);
        output(command.args(args).env("MIGSHM_PKI", &pki))
    };
    let works = |args: &[&str]| {
        let (status, printed, error) = does(args);
        assert_eq!(status, Some(0), "{args:?}: {error}");
        printed
    };
    works(&["init"]);
    works(&["coordinator"]);
    works(&["node", "--name", "n1", "--days", "3"]);
    let days = works(&["show"]);
    for (days, complaint) in [("0", "0 is not in 1..=3650"), ("x", "invalid digit")] {
        let (status, _, error) = does(&["node", "--name", "n2", "--days", days]);
        assert_ne!(status, Some(0));
        assert!(error.contains(complaint), "{error}");
    }

    works(&["renew", "n1"]);
    assert_ne!(works(&["show"]), days);
    works(&["rotate-ca"]);
    assert_eq!(
        works(&["show"]).matches(", of a former authority").count(),
        2
    );
    let (status, _, error) = does(&["retire-ca"]);
    assert_eq!(status, Some(1));
    assert!(error.contains("coordinator.pem was issued by"), "{error}");
    assert_eq!(works(&["renew"]).lines().count(), 2);
    works(&["retire-ca"]);
    assert!(!works(&["show"]).contains("former"));

    works(&["revoke", "n1"]);
    let (status, shown, _) = does(&["show"]);
    assert_eq!(status, Some(1));
    assert!(shown.contains("n1.pem has been revoked"), "{shown}");
    let (status, _, error) = does(&["revoke", "n2"]);
    assert_eq!(status, Some(1));
    assert!(error.contains("n2.pem does not exist"), "{error}");
    let (_, _, error) = does(&["renew", "N_1"]);
    assert!(error.contains("\"N_1\" is not a node name"), "{error}");
}

#[test]
fn flags_override_the_environment_which_overrides_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("migshm.toml");
    fs::write(&file, "runtime-dir = '/from/file'\n").unwrap();
    let config = file.to_str().unwrap();
    let asked = |command: &mut Command| {
        let (status, _, error) = output(command);
        assert_eq!(status, Some(1));
        error
            .split_whitespace()
            .nth(5)
            .unwrap()
            .trim_end_matches(';')
            .to_owned()
    };
    let from_file = asked(&mut migshm(&["--config", config, "status"]));
    assert_eq!(from_file, "/from/file/node.sock");
    let from_file = asked(migshm(&["status"]).env("MIGSHM_CONFIG", config));
    assert_eq!(from_file, "/from/file/node.sock");
    let mut overridden = migshm(&["--config", config, "status"]);
    overridden.env("MIGSHM_RUNTIME_DIR", "/from/env");
    assert_eq!(asked(&mut overridden), "/from/env/node.sock");
    overridden.args(["--runtime-dir", "/from/flag"]);
    assert_eq!(asked(&mut overridden), "/from/flag/node.sock");

    let (status, _, error) = output(&mut migshm(&["--config", "/no/such/file", "status"]));
    assert_eq!(status, Some(1));
    assert!(
        error.contains("configuration file /no/such/file"),
        "{error}"
    );
    let (_, help, _) = output(&mut migshm(&["--config", config, "node", "--help"]));
    assert!(help.contains("[default: /from/file]"), "{help}");
}

#[test]
fn daemons_say_what_they_lack() {
    let empty = tempfile::tempdir().unwrap();
    let pki = empty.path().to_str().unwrap();
    let (status, _, error) = output(&mut migshm(&["coordinator", "--pki", pki]));
    assert_eq!(status, Some(1));
    assert!(
        error.contains("ca.pem does not exist; create the authority"),
        "{error}"
    );
}

#[test]
fn a_program_that_cannot_be_preloaded_is_not_started() {
    // The library lies beside the command.
    // A link, not a copy: a file that was written while another thread forks is busy for exec.
    let (directory, command) = installed_alone();
    let run = |program: &str| output(Command::new(&command).args(["run", "--", program]));
    let (status, _, error) = run("true");
    assert_eq!(status, Some(1));
    assert!(
        error.contains("libmigshm.so does not exist; install it beside"),
        "{error}"
    );

    fs::write(directory.path().join("libmigshm.so"), "").unwrap();
    let (status, _, error) = run("no-such-program");
    assert_eq!(
        (status, error.trim()),
        (Some(127), "migshm: no-such-program: command not found")
    );
    let (status, _, error) = run("/etc/passwd");
    assert_eq!(status, Some(126));
    assert!(error.contains("permission denied"), "{error}");
}

#[test]
fn a_program_that_ignores_the_preload_is_stopped() {
    let (directory, command) = installed_alone();
    // The loader only warns of a library that is none.
    fs::write(directory.path().join("libmigshm.so"), "").unwrap();
    let start = Instant::now();
    let (status, _, error) = output(Command::new(&command).args(["run", "--", "sleep", "30"]));
    assert_eq!(status, None);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(error.contains("runs without libmigshm.so"), "{error}");
}

#[test]
fn a_lab_ends_with_its_commands_status_and_leaves_nothing() {
    let (status, printed, error) = output(&mut lab(
        "2",
        "echo $MIGSHM_LAB $MIGSHM_RUNTIME_DIR; exit 7",
    ));
    assert_eq!(status, Some(7), "{error}");
    let (directory, node1) = printed.trim().split_once(' ').unwrap();
    assert_eq!(node1, format!("{directory}/node1"));
    assert!(!Path::new(directory).exists());
    assert_eq!(output(&mut lab("1", "kill -TERM $$")).0, Some(128 + 15));
    let (status, _, error) = output(&mut migshm(&[
        "lab",
        "--nodes",
        "1",
        "--",
        "no-such-command",
    ]));
    assert_eq!(status, Some(127));
    assert!(error.contains("no-such-command"), "{error}");
}

#[test]
fn hosts_of_a_lab_are_killed_started_paused_and_resumed() {
    let script = "set -e
        states() { migshm labctl status | awk '{ printf \"%s \", $2 } END { print \"\" }'; }
        states
        migshm labctl kill node2; states
        migshm labctl start node2; states
        migshm labctl pause coordinator; states
        migshm labctl resume coordinator; states
        migshm labctl crash node1; states";
    let (status, printed, error) = output(&mut lab("2", script));
    assert_eq!(status, Some(0), "{error}");
    let states: Vec<&str> = printed.lines().map(str::trim).collect();
    assert_eq!(
        states,
        [
            "STATE running running running",
            "STATE running running dead",
            "STATE running running running",
            "STATE paused running running",
            "STATE running running running",
            "STATE running dead running",
        ]
    );
}

#[test]
fn impossible_faults_are_refused_with_the_reason() {
    let script = "migshm labctl kill node9; migshm labctl start node1; migshm labctl cut node1";
    let (_, _, error) = output(&mut lab("1", script));
    assert!(
        error.contains("the lab has no node9; it has coordinator, node1"),
        "{error}"
    );
    assert!(error.contains("node1 runs already"), "{error}");
    assert!(
        error.contains("links can be cut with `migshm lab --netns` only"),
        "{error}"
    );
    let (_, _, error) = output(&mut migshm(&["labctl", "status"]));
    assert!(
        error.contains("labctl works inside `migshm lab` only"),
        "{error}"
    );
}

#[test]
fn a_daemon_that_dies_by_itself_is_reported_with_its_log() {
    let script = "pid=$(migshm labctl status | awk '/^node1/ { print $3 }'); kill -ABRT $pid
        timeout 20 sh -c 'while migshm labctl status | grep -q ^node1.*running; do :; done'";
    let (status, _, error) = output(&mut lab("1", script));
    assert_eq!(status, Some(0), "{error}");
    assert!(
        error.contains("node1 ended unexpectedly (signal: 6"),
        "{error}"
    );
    assert!(error.contains("serving"), "{error}");
}

/// A lab that waits, and its directory.
fn waiting_lab() -> (Child, String) {
    let mut child = lab("1", "echo $MIGSHM_LAB; exec sleep 1000")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut directory = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut directory)
        .unwrap();
    (child, directory.trim().to_owned())
}

#[test]
fn a_lab_that_is_told_to_end_tears_everything_down() {
    for signal in ["TERM", "INT", "KILL"] {
        let (mut child, directory) = waiting_lab();
        Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .status()
            .unwrap();
        child.wait().unwrap();
        wait_until(&format!("SIG{signal} leaves {directory}"), || {
            !Path::new(&directory).exists()
        });
        // The command held the pipe.
        let mut rest = Vec::new();
        child.stdout.unwrap().read_to_end(&mut rest).unwrap();
    }
}

#[test]
fn a_cut_link_separates_a_node_and_a_mended_one_does_not() {
    // SAFETY: no preconditions.
    let privileged = unsafe { libc::geteuid() } == 0;
    if !privileged || Command::new("ip").arg("-V").output().is_err() {
        eprintln!("skipped: needs root and iproute2");
        return;
    }
    let script = "set -e
        migshm labctl status | grep -c up
        migshm labctl cut node2
        ip -n ${MIGSHM_LAB##*/}-node2 link show eth0 | grep -o NO-CARRIER
        migshm labctl heal node2
        ip -n ${MIGSHM_LAB##*/}-node2 link show eth0 | grep -c NO-CARRIER || true";
    let (status, printed, error) = output(&mut migshm(&[
        "lab", "--nodes", "2", "--netns", "--", "sh", "-c", script,
    ]));
    assert_eq!(status, Some(0), "{error}");
    assert_eq!(
        printed.lines().collect::<Vec<_>>(),
        ["3", "NO-CARRIER", "0"]
    );
}
