//! A coordinator that ends and is started again on the same state, as programs meet it: they wait, and
//! then go on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use migshm_tests::{Lab, built, eventually, is_root_for, run};

fn kill(lab: &Lab) {
    lab.labctl(&["kill", "coordinator"]);
}

fn start(lab: &Lab) {
    lab.labctl(&["start", "coordinator"]);
}

#[test]
fn blocked_operations_go_on() {
    let lab = Lab::new(2);
    let [mut first, mut second] = lab.with_semaphore();
    first.tell("change -2");
    eventually("it waits", || second.ask("waiters") == "1");
    kill(&lab);
    second.tell("change 3");
    start(&lab);
    assert_eq!([first.answer(), second.answer()], ["ok", "ok"]);
    assert_eq!(first.ask("value"), "1");
    second.obey("forget");
}

#[test]
fn a_node_says_that_it_waits() {
    let lab = Lab::new(1);
    assert_eq!(lab.status(1)["coordinator"], "connected");
    kill(&lab);
    eventually("it waits", || lab.status(1)["coordinator"] == "waiting");
    start(&lab);
    eventually("it is back", || lab.status(1)["coordinator"] == "connected");
}

#[test]
fn what_a_process_owes_is_undone_that_ends_meanwhile() {
    let lab = Lab::new(2);
    let [mut holder, mut waiter] = lab.with_semaphore();
    holder.obey("change 1");
    holder.obey("lock -1");
    waiter.tell("lock -1");
    eventually("it waits", || holder.ask("waiters") == "1");
    kill(&lab);
    holder.kill();
    start(&lab);
    assert_eq!(waiter.answer(), "ok");
    waiter.obey("forget");
}

#[test]
fn timeouts_count() {
    let lab = Lab::new(2);
    let [mut before, mut meanwhile] = lab.with_semaphore();
    before.tell("within -1 300");
    kill(&lab);
    meanwhile.tell("within -1 300");
    start(&lab);
    assert_eq!([before.answer(), meanwhile.answer()], ["EAGAIN", "EAGAIN"]);
    before.obey("change 1");
    meanwhile.obey("within -1 60000");
    meanwhile.obey("forget");
}

#[test]
fn messages_are_neither_lost_nor_doubled() {
    let lab = Lab::new(2);
    let [mut sender, mut receiver] = [1, 2].map(|node| lab.start(node, "sysv"));
    sender.obey("queue 1");
    receiver.obey("queue 1");
    for mtype in 1..6 {
        sender.obey(&format!("send {mtype}"));
        sender.tell(&format!("send {}", mtype + 10));
        receiver.tell(&format!("receive {mtype}"));
        kill(&lab);
        start(&lab);
        assert_eq!(sender.answer(), "ok");
        assert_eq!(receiver.answer(), mtype.to_string());
    }
    assert_eq!(receiver.ask("queued"), "5");
    sender.obey("drop");
}

#[test]
fn attaches_are_counted_right() {
    let lab = Lab::new(2);
    let [mut first, mut second] = [1, 2].map(|node| lab.start(node, "sysv"));
    first.obey("segment 1 65536");
    first.obey("fill 1");
    kill(&lab);
    second.tell("segment 1 65536");
    start(&lab);
    assert_eq!(second.answer(), "ok");
    second.obey("check 1");
    assert_eq!(first.ask("nattch"), "2");
    first.tell("detach");
    kill(&lab);
    start(&lab);
    assert_eq!(first.answer(), "ok");
    assert_eq!(second.ask("nattch"), "1");
    second.obey("remove");
}

#[test]
fn pages_need_no_coordinator() {
    let lab = Lab::new(2);
    let mut processes = [1, 2].map(|node| lab.start(node, "sysv"));
    for process in &mut processes {
        process.obey("segment 1 65536");
        process.obey("fill 1");
    }
    kill(&lab);
    let [first, second] = &mut processes;
    for value in 2..10 {
        first.obey(&format!("fill {value}"));
        second.obey(&format!("check {value}"));
    }
    start(&lab);
    first.obey("remove");
}

#[test]
fn a_node_goes_on_with_what_is_delegated_to_it() {
    let lab = Lab::new(2);
    let [mut owner, mut other] = lab.with_semaphore();
    for _ in 0..100 {
        owner.obey("change 1");
    }
    kill(&lab);
    // For as long as the lease lasts, and then when the coordinator is back.
    owner.tell("change 1");
    start(&lab);
    assert_eq!(owner.answer(), "ok");
    for _ in 0..100 {
        owner.obey("change 1");
    }
    assert_eq!(other.ask("value"), "201");
    other.obey("forget");
}

#[test]
fn a_node_that_does_not_come_back_is_gone() {
    let lab = Lab::new(2);
    let [mut survivor, mut victim] = lab.with_semaphore();
    victim.obey("change 1");
    victim.obey("lock -1");
    kill(&lab);
    lab.labctl(&["crash", "node2"]);
    start(&lab);
    survivor.obey("lock -1");
    survivor.obey("forget");
}

#[test]
fn programs_do_not_notice() {
    let lab = Lab::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // At moments that are as good as random to the programs.
            for pause in [100, 1_700, 10, 2_500, 300, 1_200, 50, 3_000, 700, 2_000] {
                std::thread::sleep(Duration::from_millis(pause));
                kill(&lab);
                start(&lab);
            }
        });
        for (name, options) in [
            ("ring", ["--rounds", "1000"]),
            ("counter", ["--ops", "1000"]),
            ("prodcons", ["--ops", "500"]),
        ] {
            lab.spread(name, 4, &options);
        }
    });
}

/// What `labctl` says as it cannot start the coordinator.
fn refusal(lab: &Lab, expected: &str) {
    let mut command = lab.inside(built("target/release/migshm"));
    run(command.args(["labctl", "start", "coordinator"])).complained(expected);
}

#[test]
fn a_state_that_cannot_be_used_is_refused_and_kept() {
    let lab = Lab::new(1);
    let [mut process] = lab.with_semaphore();
    process.obey("change 7");
    kill(&lab);
    let state = lab.directory().join("state");
    let good = lab.directory().join("good");
    fs::rename(&state, &good).expect("same folder");

    fs::create_dir(&state).expect("it is gone");
    fs::write(state.join("thesis"), "much work").expect("it is ours");
    refusal(&lab, "is not the state directory of a coordinator");
    assert!(state.join("thesis").exists());
    fs::remove_dir_all(&state).expect("it is ours");

    fs::create_dir(&state).expect("it is gone");
    let whole = fs::read(good.join("coordinator.redb")).expect("it was stored");
    fs::write(state.join("coordinator.redb"), &whole[..whole.len() / 3]).expect("it is ours");
    refusal(&lab, "is damaged");
    fs::remove_dir_all(&state).expect("it is ours");

    fs::rename(&good, &state).expect("same folder");
    start(&lab);
    assert_eq!(process.ask("value"), "7");
    process.obey("forget");
}

/// Of messages, sent and received, that a process is told of at once.
const PAIRS: usize = 500;

/// A small file system, for as long as this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn over(directory: &Path, size: &str) -> SmallDisk {
        let options = format!("size={size}");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none"])
            .arg(directory))
        .succeeded();
        SmallDisk(directory.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_ends_the_coordinator_and_loses_nothing() {
    if !is_root_for("a small file system") {
        return;
    }
    let lab = Lab::new(1);
    let mut process = lab.start(1, "sysv");
    process.obey("queue 1");
    kill(&lab);
    let state = lab.directory().join("state");
    let files = ["coordinator.redb", "coordinator.journal"];
    let stored = files.map(|file| fs::read(state.join(file)).expect("it was stored"));
    let disk = SmallDisk::over(&state, "16m");
    for (file, stored) in files.iter().zip(stored) {
        fs::write(state.join(file), stored).expect("there is room");
    }
    let filler = state.join("filler");
    // Until nothing fits any more.
    let _ = fs::write(&filler, vec![1; 16 << 20]);
    start(&lab);
    let is_dead = || lab.host("coordinator")["state"] == "dead";
    let mut left = 0;
    while left == 0 {
        for _ in 0..PAIRS {
            process.tell("send 1");
            process.tell("receive 1");
        }
        left = 2 * PAIRS;
        while left > 0 && (process.has_answered() || !is_dead()) {
            if process.has_answered() {
                left -= 1;
                assert_eq!(process.answer(), ["1", "ok"][left % 2]);
            }
        }
    }
    let log = fs::read_to_string(lab.directory().join("coordinator.log")).expect("its log");
    assert!(
        log.contains("cannot store the coordinator's state"),
        "{log}"
    );
    fs::remove_file(filler).expect("it is ours");
    start(&lab);
    for left in (0..left).rev() {
        assert_eq!(process.answer(), ["1", "ok"][left % 2]);
    }
    assert_eq!(process.ask("queued"), "0");
    process.obey("drop");
    drop(disk);
}
