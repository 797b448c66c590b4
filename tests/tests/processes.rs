//! Processes that die, on one node as seen from another.

use std::os::unix::process::ExitStatusExt;

use migshm_tests::{Lab, Solo, descriptors, eventually, run};

#[test]
fn locks_survive_holders_that_are_killed_anywhere() {
    let lab = Lab::new(3);
    lab.spread("undo", 3, &["--rounds", "20"]);
    lab.spread("killed", 3, &["--rounds", "50"]);
    lab.spread("killattach", 3, &["--rounds", "20"]);
}

#[test]
fn a_killed_holder_lets_a_waiter_on_another_node_go_on() {
    let lab = Lab::new(2);
    let mut holder = lab.start(1, "sysv");
    let mut waiter = lab.start(2, "sysv");
    holder.obey("semaphore 1");
    waiter.obey("semaphore 1");
    holder.obey("change 1");
    holder.obey("lock -1");
    waiter.tell("lock -1");
    eventually("it waits", || holder.ask("waiters") == "1");
    holder.kill();
    assert_eq!(waiter.answer(), "ok");
    assert_eq!(waiter.ask("value"), "0");
    waiter.obey("forget");
}

#[test]
fn a_killed_waiter_takes_nothing() {
    let lab = Lab::new(2);
    let mut giver = lab.start(1, "sysv");
    let mut waiter = lab.start(2, "sysv");
    giver.obey("semaphore 1");
    waiter.obey("semaphore 1");
    waiter.tell("change -1");
    eventually("it waits", || giver.ask("waiters") == "1");
    waiter.kill();
    eventually("it waits no more", || giver.ask("waiters") == "0");
    giver.obey("change 1");
    assert_eq!(giver.ask("value"), "1");
    giver.obey("forget");
}

#[test]
fn a_removed_semaphore_wakes_its_waiters_everywhere() {
    let lab = Lab::new(3);
    let mut remover = lab.start(1, "sysv");
    remover.obey("semaphore 1");
    let mut waiters: Vec<_> = (1..=3).map(|node| lab.start(node, "sysv")).collect();
    for waiter in &mut waiters {
        waiter.obey("semaphore 1");
        waiter.tell("change -1");
    }
    eventually("they wait", || remover.ask("waiters") == "3");
    remover.obey("forget");
    for mut waiter in waiters {
        assert_eq!(waiter.answer(), "EIDRM");
    }
}

#[test]
fn a_killed_receiver_takes_no_message() {
    let lab = Lab::new(2);
    let mut sender = lab.start(1, "sysv");
    let mut receiver = lab.start(2, "sysv");
    sender.obey("queue 1");
    receiver.obey("queue 1");
    receiver.tell("receive 7");
    let waits = || lab.status(2)["pending_calls"] == 1;
    eventually("it waits", waits);
    receiver.kill();
    eventually("it waits no more", || !waits());
    sender.obey("send 7");
    assert_eq!(sender.ask("queued"), "1");
    sender.obey("drop");
}

#[test]
fn what_waits_on_a_node_that_crashes_neither_sends_nor_receives() {
    let lab = Lab::new(3);
    let mut witness = lab.start(1, "sysv");
    witness.obey("queue 1");
    let mut waiters: Vec<_> = (2..=3).map(|node| lab.start(node, "sysv")).collect();
    for waiter in &mut waiters {
        waiter.obey("queue 1");
        waiter.tell("receive 7");
    }
    eventually("they wait", || {
        (2..=3).all(|node| lab.status(node)["pending_calls"] == 1)
    });
    lab.labctl(&["crash", "node2"]).succeeded();
    let members = || lab.status(1)["members"].as_array().map(Vec::len);
    eventually("the node is gone", || members() == Some(2));
    // The first message goes to who still waits, the second to nobody.
    witness.obey("send 7");
    assert_eq!(waiters[1].answer(), "7");
    witness.obey("send 7");
    assert_eq!(witness.ask("queued"), "1");
    witness.obey("drop");
}

#[test]
fn what_would_travel_with_a_message_stays_if_its_receivers_node_has_crashed() {
    let lab = Lab::new(2);
    let mut owner = lab.start(1, "sysv");
    let mut taker = lab.start(2, "sysv");
    for process in [&mut owner, &mut taker] {
        process.obey("segment 1 4096");
        process.obey("queue 1");
    }
    let pushes = || lab.status(2)["coherence"]["pushes"].as_u64();
    let mut value = 0;
    while pushes() < Some(2) {
        value += 1;
        assert!(value < 200, "the page is not pushed");
        owner.obey(&format!("fill {value}"));
        owner.obey("send 7");
        assert_eq!(taker.ask("receive 7"), "7");
        taker.obey(&format!("check {value}"));
        taker.obey(&format!("fill -{value}"));
    }
    owner.obey("fill 6");
    lab.labctl(&["crash", "node2"]).succeeded();
    let members = || lab.status(1)["members"].as_array().map(Vec::len);
    eventually("the node is gone", || members() == Some(1));
    owner.obey("send 7");
    owner.obey("check 6");
}

#[test]
fn attaches_of_a_killed_process_are_counted_off() {
    let lab = Lab::new(2);
    let mut observer = lab.start(1, "sysv");
    observer.obey("segment 1 8192");
    observer.obey("fill 1");
    for round in 2..12 {
        let mut victim = lab.start(2, "sysv");
        victim.obey("segment 1 8192");
        victim.obey("attach");
        victim.obey(&format!("fill {round}"));
        assert_eq!(observer.ask("nattch"), "3");
        victim.kill();
        eventually("its attaches end", || observer.ask("nattch") == "1");
        // What it wrote stays.
        observer.obey(&format!("check {round}"));
    }
    observer.obey("remove");
}

#[test]
fn a_removed_segment_goes_with_its_last_process() {
    let lab = Lab::new(2);
    let mut first = lab.start(1, "sysv");
    let mut last = lab.start(2, "sysv");
    first.obey("segment 1 8192");
    last.obey("segment 1 8192");
    first.obey("fill 5");
    first.obey("remove");
    first.kill();
    last.obey("check 5");
    eventually("one attach is left", || last.ask("nattch") == "1");
    last.kill();
    eventually("it is gone", || lab.ipcs()["sharedmemory"][0].is_null());
}

#[test]
fn a_process_that_forks_more_than_can_be_watched_ends_alone() {
    let lab = Lab::new(2);
    let mut writers = [lab.start(1, "sysv"), lab.start(2, "sysv")];
    let mut forker = lab.start(1, "sysv");
    for process in writers.iter_mut().chain([&mut forker]) {
        process.obey("segment 1 65536");
        process.obey("fill 1");
    }
    let daemon = lab.pid("node1");
    let before = limit_descriptors(daemon, None);
    let few = libc::rlimit {
        rlim_cur: descriptors(daemon) as u64 + 10,
        ..before
    };
    limit_descriptors(daemon, Some(few));
    forker.tell("children 100");
    let end = forker.end();
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    for value in [2, 3] {
        writers[value % 2].obey(&format!("fill {value}"));
        writers[1 - value % 2].obey(&format!("check {value}"));
    }
    limit_descriptors(daemon, Some(before));
    eventually("what it had is counted off", || {
        writers[0].ask("nattch") == "2"
    });
    assert_eq!(lab.status(1)["tracking"], true);
}

/// Sets, or only tells, how many descriptors a process may have.
fn limit_descriptors(pid: i32, limit: Option<libc::rlimit>) -> libc::rlimit {
    let mut before = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let new = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: live structures, or null for no change.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, new, &raw mut before) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    before
}

#[test]
fn a_fork_inherits_the_attaches_of_its_moment() {
    for nodes in [1, 2] {
        let lab = Lab::new(nodes);
        run(lab.on(nodes, "forkattach").arg("500")).succeeded();
    }
    run(Solo::new().program("forkattach").arg("500")).succeeded();
}
