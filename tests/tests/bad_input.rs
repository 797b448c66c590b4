//! What must not work, and how it says so; who means harm, and how little comes of it.

use std::fs;
use std::net::{ToSocketAddrs, UdpSocket};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use migshm_tests::{
    Lab, Outcome, Process, Solo, built, eventually, is_root_for, migshm, processes_with, program,
    run,
};

const NOBODY: u32 = 65534;

/// Certificates of a cluster that has no other members.
fn pki(folder: &Path, node: &str) {
    let folder = folder.to_str().expect("a plain path");
    run(migshm().args(["pki", "init", "--dir", folder])).succeeded();
    add_node(folder.as_ref(), node);
}

fn add_node(folder: &Path, node: &str) {
    let mut command = migshm();
    command.args(["pki", "node", "--name", node, "--dir"]);
    run(command.arg(folder)).succeeded();
}

/// What a daemon says that wants to join a lab, and may not.
fn refused(lab: &Lab, name: &str, pki: &Path) -> Outcome {
    let mut node = migshm();
    node.args(["node", "--coordinator", &lab.coordinator(), "--name", name])
        .args(["--listen", "127.0.0.1:0"])
        .arg("--pki")
        .arg(pki)
        .arg("--runtime-dir")
        .arg(lab.directory().join("stranger"));
    run(&mut node).exited(1)
}

/// Whether a lab's nodes share memory.
fn assert_works(lab: &Lab) {
    lab.spread("counter", 2, &["--ops", "50"]);
}

#[test]
fn an_unreachable_coordinator_is_named_and_nothing_falls_back_to_the_kernel() {
    if !is_root_for("a private IPC namespace") {
        return;
    }
    let solo = Solo::new();
    pki(&solo.file("pki"), "alpha");
    let script = r#"printf 'segment 1 4096\nsemaphore 1\n' | "$0"
        LD_PRELOAD= cat /proc/sysvipc/shm /proc/sysvipc/sem"#;
    // The discard port, on which nobody listens.
    let outcome = run(solo
        .preloaded("unshare")
        .env("MIGSHM_COORDINATOR", "127.0.0.1:9")
        .env("MIGSHM_NAME", "alpha")
        .env("MIGSHM_PKI", solo.file("pki"))
        .args(["--ipc", "sh", "-c", script])
        .arg(program("sysv")))
    .succeeded()
    .complained("cannot reach coordinator 127.0.0.1:9")
    .complained("is `migshm coordinator` running there?");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines[..2], ["ENOSYS", "ENOSYS"], "{outcome}");
    // Two headings.
    assert_eq!(lines[2..].len(), 2, "{outcome}");
    assert_eq!(solo.daemons(), [0; 0]);
}

#[test]
fn a_node_of_another_authority_is_refused() {
    let lab = Lab::new(1);
    let foreign = lab.directory().join("foreign");
    pki(&foreign, "node2");
    refused(&lab, "node2", &foreign).complained("cannot reach coordinator");
    assert_works(&lab);
}

#[test]
fn a_certificate_is_good_for_its_own_name_only() {
    let lab = Lab::new(1);
    let pki = lab.directory().join("pki");
    for suffix in ["pem", "key"] {
        let file = |name: &str| pki.join(format!("{name}.{suffix}"));
        fs::copy(file("node1"), file("thief")).expect("root's files");
    }
    refused(&lab, "thief", &pki).complained("thief");
    refused(&lab, "unknown", &pki).complained("unknown.pem");
    assert_works(&lab);
}

#[test]
fn a_daemon_takes_the_place_of_an_older_one_with_its_name() {
    let lab = Lab::new(3);
    let runtime = lab.directory().join("again");
    let mut node = lab.inside(built("target/release/migshm"));
    node.args(["node", "--coordinator", &lab.coordinator()])
        .args(["--name", "node1", "--listen", "127.0.0.1:0", "--pki"])
        .arg(lab.directory().join("pki"))
        .arg("--runtime-dir")
        .arg(&runtime);
    let _newer = Process::start(&mut node);
    eventually("it serves", || runtime.join("node.sock").exists());
    let mut orphan = lab.start(1, "sysv");
    assert_eq!(orphan.ask("semaphore 1"), "ENOSYS");
    let mut others = [lab.start(2, "sysv"), lab.start(3, "sysv")];
    for process in &mut others {
        process.obey("segment 1 65536");
    }
    others[0].obey("fill 1");
    others[1].obey("check 1");
}

#[test]
fn garbage_datagrams_disturb_nobody() {
    let lab = Lab::new(2);
    let mut targets: Vec<String> = lab.status(1)["members"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|member| member["address"].as_str().expect("an address").to_owned())
        .collect();
    targets.push(lab.coordinator());
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
            let mut garbage = Garbage(1);
            while !ended.load(Ordering::Relaxed) {
                for target in targets
                    .iter()
                    .flat_map(ToSocketAddrs::to_socket_addrs)
                    .flatten()
                {
                    // What cannot be sent does no harm either.
                    let _ = socket.send_to(&garbage.packet(1500), target);
                }
                thread::yield_now();
            }
        });
        let _end = SetOnDrop(&ended);
        lab.spread("counter", 4, &["--ops", "300"]);
        lab.spread("prodcons", 4, &["--ops", "300"]);
    });
}

#[test]
fn garbage_on_the_local_socket_harms_its_sender_only() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let solo = Solo::for_all_users();
    let mut garbage = migshm_tests::command("setpriv");
    garbage
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
        .arg(solo.install(&program("garbage")))
        .arg(lab.node(1).join("node.sock"));
    let mut garbage = Process::start(&mut garbage);
    assert_eq!(garbage.answer(), "ok");
    lab.spread("counter", 4, &["--ops", "300"]);
    lab.spread("killattach", 2, &["--rounds", "10"]);
}

/// Reproducible nonsense (splitmix64).
struct Garbage(u64);

impl Garbage {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn packet(&mut self, longest: u64) -> Vec<u8> {
        let length = self.next() % longest;
        (0..length).map(|_| self.next() as u8).collect()
    }
}

/// Ends the other thread, also when this one panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_node_that_may_not_track_pages_cannot_join() {
    if !is_root_for("becoming another user") {
        return;
    }
    let solo = Solo::for_all_users();
    let mut node = migshm_tests::command("setpriv");
    node.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
        .arg(solo.file("migshm"))
        .args(["node", "--coordinator", "127.0.0.1:9", "--runtime-dir"])
        .arg(solo.runtime_dir());
    run(&mut node)
        .exited(1)
        .complained("cannot open /dev/userfaultfd")
        .complained("run it as root");
}

#[test]
fn a_kernel_without_userfaultfd_serves_one_machine_but_no_cluster() {
    if !is_root_for("a mount namespace") {
        return;
    }
    let solo = Solo::new();
    let script = r#"mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@""#;
    let without_device = |mut command: Command| {
        command.args(["--mount", "sh", "-c", script, "sh"]);
        command
    };
    run(without_device(migshm_tests::command("unshare"))
        .arg(built("target/release/migshm"))
        .args(["node", "--coordinator", "127.0.0.1:9", "--runtime-dir"])
        .arg(solo.runtime_dir()))
    .exited(1)
    .complained("cannot open /dev/userfaultfd");

    run(without_device(solo.preloaded("unshare")).arg(program("basic"))).succeeded();
}

#[test]
fn a_runtime_directory_of_another_user_is_not_used() {
    if !is_root_for("a directory of another user") {
        return;
    }
    let solo = Solo::new();
    fs::create_dir(solo.runtime_dir()).expect("a new folder");
    chown(solo.runtime_dir(), Some(NOBODY), None).expect("root may");
    let mut node = migshm();
    run(node.args(["node", "--runtime-dir"]).arg(solo.runtime_dir()))
        .exited(1)
        .complained("belongs to another user");

    let mut process = Process::start(&mut solo.program("sysv"));
    assert_eq!(process.ask("semaphore 1"), "ENOSYS");
}

#[test]
fn a_directory_is_served_by_one_daemon() {
    let lab = Lab::new(1);
    let mut second = migshm();
    run(second.args(["node", "--runtime-dir"]).arg(lab.node(1)))
        .exited(1)
        .complained("another node daemon serves this directory");
    assert_works(&lab);
}

#[test]
fn a_segment_larger_than_the_cluster_is_refused() {
    let lab = Lab::with(2, &["--memory", "16M"]);
    let mut process = lab.start(1, "sysv");
    assert_eq!(process.ask("segment 1 0x10000000"), "ENOMEM");
    assert_eq!(process.ask("segment 1 0x10000"), "ok");
    process.obey("fill 1");
    process.obey("remove");
}

#[test]
fn a_program_that_cannot_be_preloaded_is_not_run() {
    let solo = Solo::for_all_users();
    let migshm_run = |program: &Path| {
        let mut command = migshm();
        command.env("MIGSHM_RUNTIME_DIR", solo.runtime_dir());
        run(command.args(["run", "--"]).arg(program))
    };

    let constant = solo.file("static");
    let mut gcc = Command::new("gcc");
    gcc.args(["-D_GNU_SOURCE", "-static", "-o"]).arg(&constant);
    run(gcc.arg(built("tests/programs/sysv.c"))).succeeded();
    migshm_run(&constant)
        .exited(126)
        .complained("statically linked");

    if is_root_for("a program that becomes another user") {
        let copy = solo.install(&program("sysv"));
        chown(&copy, Some(NOBODY), None).expect("root may");
        let mode = fs::Permissions::from_mode(0o4755);
        fs::set_permissions(&copy, mode).expect("root may");
        migshm_run(&copy).exited(126).complained("set-user-ID");
    }

    migshm_run(&solo.file("nothing"))
        .exited(127)
        .complained("nothing");
    assert_eq!(
        processes_with("MIGSHM_RUNTIME_DIR", &solo.runtime_dir()),
        [0; 0]
    );
}

#[test]
fn a_script_runs_with_the_status_it_ends_with() {
    let solo = Solo::new();
    let script = solo.file("script");
    let sysv = program("sysv");
    let text = format!("#!/bin/sh\necho semaphore 1 | {}\nexit 7\n", sysv.display());
    fs::write(&script, text).expect("our folder");
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&script, mode).expect("our file");
    let mut command = migshm();
    command.env("MIGSHM_RUNTIME_DIR", solo.runtime_dir());
    let outcome = run(command.args(["run", "--"]).arg(&script)).exited(7);
    assert_eq!(outcome.stdout, "ok\n");
    assert_eq!(solo.daemons().len(), 1);
}
