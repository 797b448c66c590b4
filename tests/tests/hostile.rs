//! A local user who means harm and speaks to the daemon himself: others' objects stay as they are, their
//! service goes on, and the daemon stays small.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use migshm_tests::{
    Lab, Process, Solo, command, descriptors, eventually, is_root_for, program, run,
};

/// The first segment and the first set of all.
const FIRST: &str = "0";
/// Descriptors that a daemon opens and closes as it goes.
const SLACK: usize = 8;

/// A machine with a program of root's that has a segment, and waits at a semaphore.
struct Scene {
    solo: Solo,
    hostile: PathBuf,
    victim: Process,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(|solo| solo.program("sysv"))
    }

    fn with(start: impl Fn(&Solo) -> Command) -> Scene {
        let solo = Solo::for_all_users();
        let victim = Process::start(&mut start(&solo));
        Scene {
            hostile: solo.install(Path::new(env!("CARGO_BIN_EXE_hostile"))),
            victim: prepare(victim),
            solo,
        }
    }

    fn socket(&self) -> PathBuf {
        self.solo.runtime_dir().join("node.sock")
    }

    fn daemon(&self) -> i32 {
        self.solo.daemons()[0]
    }

    /// A part of the hostile program, as nobody.
    fn part(&self, part: &str, arguments: &[&str]) -> Command {
        as_nobody(&self.hostile, &self.socket(), part, arguments)
    }

    /// All is as it was.
    fn assert_unharmed(mut self) {
        let other = Process::start(&mut self.solo.program("sysv"));
        assert_unharmed(&mut self.victim, other);
        assert_eq!(self.solo.daemons().len(), 1);
    }
}

fn as_nobody(hostile: &Path, socket: &Path, part: &str, arguments: &[&str]) -> Command {
    let mut command = command("setpriv");
    command
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
        .args([hostile, socket])
        .arg(part)
        .args(arguments);
    command
}

fn prepare(mut victim: Process) -> Process {
    victim.obey("segment 1 4096");
    victim.obey("fill 7");
    victim.obey("semaphore 1");
    victim.tell("change -1");
    victim
}

/// The victim's segment and semaphore are as they were, and it still waits.
fn assert_unharmed(victim: &mut Process, mut other: Process) {
    other.obey("segment 1 4096");
    other.obey("check 7");
    assert_eq!(other.ask("nattch"), "2");
    other.obey("semaphore 1");
    eventually("the victim waits", || other.ask("waiters") == "1");
    other.obey("change 1");
    assert_eq!(victim.answer(), "ok");
    victim.obey("check 7");
    victim.obey("detach");
}

fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.expect("there is one").split_whitespace().next();
    kibibytes.and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn forged_names_give_nothing_of_others() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let victim = scene.victim.pid().to_string();
    for _ in 0..3 {
        run(&mut scene.part("forge", &[&victim, FIRST, FIRST])).succeeded();
    }
    scene.assert_unharmed();
}

#[test]
fn forged_names_give_nothing_of_others_in_a_cluster() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut victim = prepare(lab.start(1, "sysv"));
    let solo = Solo::for_all_users();
    let hostile = solo.install(Path::new(env!("CARGO_BIN_EXE_hostile")));
    for node in [1, 2] {
        let socket = lab.node(node).join("node.sock");
        let pid = victim.pid().to_string();
        run(&mut as_nobody(
            &hostile,
            &socket,
            "forge",
            &[&pid, FIRST, FIRST],
        ))
        .succeeded();
    }
    assert_unharmed(&mut victim, lab.start(2, "sysv"));
}

#[test]
fn who_breaks_the_protocol_is_cut_off() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    run(&mut scene.part("order", &[])).succeeded();
    scene.assert_unharmed();
}

#[test]
fn descriptors_that_belong_nowhere_are_closed() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let before = descriptors(scene.daemon());
    run(&mut scene.part("descriptors", &[])).succeeded();
    assert!(descriptors(scene.daemon()) <= before + SLACK);
    scene.assert_unharmed();
}

#[test]
fn who_does_not_read_is_cut_off() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    run(&mut scene.part("deaf", &[])).succeeded();
    let before = resident(scene.daemon());
    for _ in 0..20 {
        run(&mut scene.part("deaf", &[])).succeeded();
    }
    assert!(resident(scene.daemon()) < before + 4096, "KiB");
    scene.assert_unharmed();
}

#[test]
fn a_storm_of_packets_right_and_wrong_harms_nobody() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let before = descriptors(scene.daemon());
    for seed in ["1", "2"] {
        run(&mut scene.part("storm", &[seed])).succeeded();
    }
    eventually("what it opened is closed", || {
        descriptors(scene.daemon()) <= before + SLACK
    });
    // What it has made are objects, of which there are no more than the limits allow.
    assert!(resident(scene.daemon()) < 64 << 10, "KiB");
    scene.assert_unharmed();
}

#[test]
fn who_vanishes_at_any_moment_leaves_nothing() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let before = descriptors(scene.daemon());
    run(&mut scene.part("vanish", &[])).succeeded();
    eventually("what it opened is closed", || {
        descriptors(scene.daemon()) <= before + SLACK
    });
    scene.assert_unharmed();
}

#[test]
fn a_crowd_of_one_user_leaves_room_for_others() {
    if !is_root_for("becoming another user") {
        return;
    }
    // So many descriptors that the daemon may have.
    let scene = Scene::with(|solo| {
        let mut limited = solo.preloaded("prlimit");
        limited.arg("--nofile=400:400").arg(program("sysv"));
        limited
    });
    let mut crowd = Process::start(&mut scene.part("crowd", &["1000"]));
    let connections: usize = crowd.answer().parse().expect("a number");
    assert!((200..350).contains(&connections), "{connections}");
    scene.assert_unharmed();
}

#[test]
fn an_address_space_is_not_watched_without_bound() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let before = descriptors(scene.daemon());
    let mut anchored = Process::start(&mut scene.part("anchors", &["300"]));
    assert_eq!(anchored.answer(), "anchored");
    let after = descriptors(scene.daemon());
    assert!(after < before + 2 * 64 + SLACK, "{before} -> {after}");
    scene.assert_unharmed();
}

#[test]
fn a_child_that_became_another_user_cannot_use_what_it_inherited() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let mut root = command(&scene.hostile);
    run(root.arg(scene.socket()).args(["inherit", FIRST])).succeeded();
    scene.assert_unharmed();
}

#[test]
fn a_program_with_privileges_lends_them_to_nobody_who_holds_its_connection() {
    if !is_root_for("a set-user-ID program") {
        return;
    }
    let scene = Scene::new();
    let sleep = scene.solo.install(Path::new("/bin/sleep"));
    for set_user_id in [true, false] {
        if set_user_id {
            let mode = fs::Permissions::from_mode(0o4755);
            fs::set_permissions(&sleep, mode).expect("root may");
        } else {
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&sleep, mode).expect("root may");
            give_capability(&sleep);
        }
        let path = sleep.to_str().expect("a plain path");
        let mut hostile = Process::start(&mut scene.part("lend", &[FIRST, path]));
        assert_eq!(hostile.answer(), "greeted");
        let daemon = scene.daemon();
        // SAFETY: plain integers.
        unsafe { libc::kill(daemon, libc::SIGSTOP) };
        hostile.tell("go");
        let lent = hostile.answer();
        // SAFETY: plain integers.
        unsafe { libc::kill(daemon, libc::SIGCONT) };
        assert_eq!(lent, "lent");
        assert_eq!(hostile.answer(), "done");
    }
    scene.assert_unharmed();
}

/// `CAP_IPC_OWNER`, effective, to who executes the file.
fn give_capability(file: &Path) {
    // `struct vfs_cap_data`, revision 2.
    let words: [u32; 5] = [0x0200_0001, 1 << 15, 0, 0, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let path = CString::new(file.to_str().expect("a plain path")).expect("a path");
    // SAFETY: C strings and a live buffer.
    let result = unsafe {
        libc::setxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Of a program that has a segment with this mode.
fn with_mode(mut program: Process, key: i32, bytes: u64, mode: &str) -> Process {
    program.obey(&format!("segment {key} {bytes}"));
    program.obey(&format!("mode {mode}"));
    program.obey("fill 7");
    program
}

/// Id of a segment, from `migshm ipcs --json`.
fn id_of(ipcs: &serde_json::Value, key: i32) -> String {
    let segments = ipcs["sharedmemory"].as_array().expect("a list");
    let key = format!("0x{key:08x}");
    let found = segments.iter().find(|segment| segment["key"] == key);
    found.expect("there is one")["shmid"].to_string()
}

#[test]
fn a_segments_memory_gives_what_its_mode_allows_and_never_its_size() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let others = [scene.victim.pid(), scene.daemon()].map(|pid| pid.to_string());
    let mut writable = with_mode(
        Process::start(&mut scene.solo.program("sysv")),
        2,
        65536,
        "0666",
    );
    let mut readable = with_mode(
        Process::start(&mut scene.solo.program("sysv")),
        3,
        65536,
        "0644",
    );
    let mut ipcs = migshm_tests::migshm();
    ipcs.args(["ipcs", "--json"])
        .env("MIGSHM_RUNTIME_DIR", scene.solo.runtime_dir());
    let ipcs = run(&mut ipcs).succeeded().json();
    let arguments = [&id_of(&ipcs, 2), &id_of(&ipcs, 3), &others[0], &others[1]];
    run(&mut scene.part("memory", &arguments.map(String::as_str))).succeeded();
    writable.obey("check 7");
    readable.obey("check 7");
    scene.assert_unharmed();
}

#[test]
fn a_segments_memory_gives_what_its_mode_allows_in_a_cluster_too() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let solo = Solo::for_all_users();
    let hostile = solo.install(Path::new(env!("CARGO_BIN_EXE_hostile")));
    let mut programs: Vec<Process> = [
        (1, 2, "0666"),
        (2, 2, "0666"),
        (1, 3, "0644"),
        (2, 3, "0644"),
    ]
    .map(|(node, key, mode)| with_mode(lab.start(node, "sysv"), key, 65536, mode))
    .into();
    let ids = [id_of(&lab.ipcs(), 2), id_of(&lab.ipcs(), 3)];
    for node in [1, 2] {
        let socket = lab.node(node).join("node.sock");
        let others = [programs[0].pid(), lab.pid("node1")].map(|pid| pid.to_string());
        let arguments = [&ids[0], &ids[1], &others[0], &others[1]].map(String::as_str);
        run(&mut as_nobody(&hostile, &socket, "memory", &arguments)).succeeded();
    }
    for program in &mut programs {
        program.obey("check 7");
    }
}

#[test]
fn who_spoils_a_segment_that_he_may_write_spoils_no_other_and_stops_nobody() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let solo = Solo::for_all_users();
    let hostile = solo.install(Path::new(env!("CARGO_BIN_EXE_hostile")));
    let mut spoilt = [1, 2].map(|node| with_mode(lab.start(node, "sysv"), 2, 65536, "0666"));
    let mut sound = [1, 2].map(|node| with_mode(lab.start(node, "sysv"), 1, 65536, "0600"));
    let id = id_of(&lab.ipcs(), 2);
    let mut vandals = [1, 2].map(|node| {
        let socket = lab.node(node).join("node.sock");
        let mut vandal = Process::start(&mut as_nobody(&hostile, &socket, "vandal", &[&id]));
        assert_eq!(vandal.answer(), "attached");
        vandal
    });
    for value in 0..200 {
        let (writer, reader) = (value % 2, (value + 1) % 2);
        spoilt[writer].obey(&format!("fill {value}"));
        // Whatever it finds there.
        spoilt[reader].ask("check 0");
        sound[writer].obey(&format!("fill {value}"));
        sound[reader].obey(&format!("check {value}"));
    }
    for vandal in &mut vandals {
        vandal.tell("end");
        assert_eq!(vandal.answer(), "done");
    }
    for node in [1, 2] {
        assert_eq!(lab.status(node)["coordinator"], "connected");
    }
}

#[test]
fn a_user_who_creates_all_that_he_can_leaves_enough_for_others() {
    if !is_root_for("becoming another user") {
        return;
    }
    let scene = Scene::new();
    let mut greedy = Process::start(&mut scene.part("greed", &[]));
    assert_eq!(greedy.answer(), "2048 16000 4000");
    // Another of his; and root, who has no quota.
    let mut again = Process::start(&mut scene.part("greed", &[]));
    assert_eq!(again.answer(), "0 0 0");
    let mut root = command(&scene.hostile);
    let mut root = Process::start(root.arg(scene.socket()).arg("greed"));
    // The first segment and the first set of all are root's too.
    assert_eq!(root.answer(), "2047 15999 28000");
    for process in [&mut greedy, &mut again, &mut root] {
        process.tell("end");
        assert_eq!(process.answer(), "done");
    }
    let mut usage = migshm_tests::migshm();
    usage
        .args(["ipcs", "--users", "--json"])
        .env("MIGSHM_RUNTIME_DIR", scene.solo.runtime_dir());
    let usage = run(&mut usage).succeeded().json();
    let expected = serde_json::json!([
        {"uid": 0, "segments": 2048, "bytes": 2048 * 4096,
         "sets": 16000, "semaphores": 16000, "queues": 28000},
        {"uid": 65534, "segments": 2048, "bytes": 2048 * 4096,
         "sets": 16000, "semaphores": 16000, "queues": 4000},
    ]);
    assert_eq!(usage["users"], expected);
}
