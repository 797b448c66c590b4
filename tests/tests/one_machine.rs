//! Programs on one machine: `LD_PRELOAD`, and nothing else.

use std::fs;
use std::process::Command;

use migshm_tests::{Outcome, Process, Solo, command, eventually, is_root_for, program, run};

/// Programs of `c-tests`, and options that make their work short.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("basic", &[]),
    ("ops", &[]),
    ("messages", &[]),
    ("post", &["--messages", "1000"]),
    ("pingpong", &["--rounds", "500"]),
    ("fork", &[]),
    ("syscallraw", &["--ops", "500"]),
    ("undo", &["--rounds", "20"]),
    ("killed", &["--rounds", "100"]),
    ("killattach", &["--rounds", "20"]),
    ("kernelio", &[]),
    ("churn", &["--objects", "50", "--seconds", "1"]),
    ("counter", &["--ops", "1000"]),
    ("prodcons", &["--ops", "1000"]),
    ("multi", &["--ops", "300"]),
    ("waitzero", &["--rounds", "50"]),
    ("litmus", &["--rounds", "10000"]),
    ("mcs", &["--ops", "2000"]),
    ("queue", &["--ops", "2000"]),
    ("seqlock", &["--ops", "2000"]),
    ("pthread_mutex", &["--ops", "1000"]),
    ("latecomer", &["--rounds", "10"]),
    ("bigseg", &["--ops", "1000"]),
    ("heat", &["--steps", "50"]),
];

#[test]
fn unmodified_programs_find_all_they_expect() {
    let solo = Solo::new();
    for (name, options) in PROGRAMS {
        run(solo.program(name).args(*options)).succeeded();
    }
    assert_eq!(solo.daemons().len(), 1);
}

#[test]
fn a_detach_in_one_thread_leaves_the_attach_of_another_alone() {
    let solo = Solo::new();
    for _ in 0..5 {
        run(solo.program("threads").args(["--ops", "1000"])).succeeded();
    }
}

#[test]
fn processes_of_containers_are_told_apart() {
    if !is_root_for("making namespaces") {
        return;
    }
    let solo = Solo::new();
    // A process outside keeps the daemon, which would end with the namespace that it is started in.
    let mut keeper = Process::start(&mut solo.program("sysv"));
    keeper.obey("segment 1 4096");
    for namespaces in [
        &["--pid", "--fork"][..],
        &[
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--mount-proc",
        ],
        &["--ipc", "--net", "--uts", "--mount"],
    ] {
        for name in ["fork", "undo"] {
            let mut command = solo.preloaded("unshare");
            run(command.args(namespaces).arg(program(name))).succeeded();
        }
    }
}

#[test]
fn programs_with_an_environment_of_their_own_stay_with_their_parents_objects() {
    let solo = Solo::new();
    run(solo.program("cleared").env("MIGSHM_NAME", "kept")).succeeded();
    let maps = |environment: &[&str]| {
        let mut command = solo.preloaded("env");
        command.args(environment).args(["cat", "/proc/self/maps"]);
        run(&mut command).succeeded().stdout
    };
    assert!(maps(&["-i"]).contains("libmigshm.so"));
    assert!(maps(&["LD_PRELOAD=libc.so.6"]).contains("libmigshm.so"));
    assert!(!maps(&["LD_PRELOAD="]).contains("libmigshm.so"));
    let environment = run(solo.preloaded("env").args(["-i", "env"])).succeeded();
    let directory = solo.runtime_dir();
    let expected = [
        format!("LD_PRELOAD={}", migshm_tests::library().display()),
        format!("MIGSHM_RUNTIME_DIR={}", directory.display()),
    ];
    assert_eq!(environment.stdout.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn what_an_ended_process_held_is_free_for_who_has_seen_the_end() {
    run(&mut Solo::new().program("settled")).succeeded();
}

#[test]
fn operations_without_a_call_have_the_effects_of_calls() {
    run(&mut Solo::new().program("shortcuts")).succeeded();
}

#[test]
fn a_short_wait_ends_as_a_long_one_does() {
    run(&mut Solo::new().program("waits")).succeeded();
}

#[test]
fn a_daemon_goes_when_nothing_needs_it() {
    let solo = Solo::new();
    let mut process = Process::start(&mut solo.program("sysv"));
    process.obey("segment 1 4096");
    process.obey("fill 7");
    assert_eq!(solo.daemons().len(), 1);
    process.kill();

    // The segment needs it: as in the kernel, it outlives its creator.
    let mut process = Process::start(&mut solo.program("sysv"));
    process.obey("segment 1 4096");
    process.obey("check 7");
    process.obey("remove");
    process.kill();
    eventually("the daemon goes", || solo.daemons().is_empty());
    assert!(!solo.runtime_dir().join("node.sock").exists());
}

#[test]
fn programs_started_at_once_start_one_daemon() {
    let solo = Solo::new();
    let mut processes: Vec<Process> = (0..20)
        .map(|_| Process::start(&mut solo.program("sysv")))
        .collect();
    for process in &mut processes {
        process.tell("segment 1 4096");
    }
    for process in &mut processes {
        assert_eq!(process.answer(), "ok");
    }
    assert_eq!(solo.daemons().len(), 1);
    assert_eq!(processes[0].ask("nattch"), "20");
    let log = fs::read_to_string(solo.runtime_dir().join("node.log")).unwrap();
    assert_eq!(log.matches("serving").count(), 1, "{log}");
}

#[test]
fn a_program_without_system_v_ipc_starts_no_daemon() {
    let solo = Solo::new();
    run(solo.preloaded("ls").arg("/")).succeeded();
    assert!(!solo.runtime_dir().exists());
}

#[test]
fn a_user_without_privileges_has_a_daemon_of_his_own() {
    if !is_root_for("becoming another user") {
        return;
    }
    let solo = Solo::for_all_users();
    let as_nobody = |name: &str, options: &[&str]| -> Outcome {
        let mut command = solo.preloaded("setpriv");
        command
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
            .arg(solo.install(&program(name)))
            .args(options);
        run(&mut command)
    };
    as_nobody("basic", &[]).succeeded();
    as_nobody("ops", &[]).succeeded();
    as_nobody("messages", &[]).succeeded();
    // Not `fork`, part of which is raw clone(2): that is seen with /dev/userfaultfd only.
    as_nobody("killattach", &["--rounds", "20"]).succeeded();
    as_nobody("counter", &["--ops", "500", "--undo"]).succeeded();
    let [daemon] = solo.daemons()[..] else {
        panic!("not one daemon: {:?}", solo.daemons());
    };
    let status = fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    assert!(status.contains("Uid:\t65534\t65534\t"), "{status}");
}

#[test]
fn no_system_v_call_reaches_the_kernel() {
    let solo = Solo::new();
    let trace = solo.file("trace");
    for (name, options) in [
        ("syscallraw", &["--ops", "100"][..]),
        ("ops", &[]),
        ("messages", &[]),
        ("basic", &[]),
        ("fork", &[]),
    ] {
        let mut strace = migshm_tests::command("strace");
        strace.args(["-f", "-qq", "-e", "trace=%ipc", "-e", "signal=none", "-o"]);
        strace.arg(&trace);
        for (name, value) in solo.preloaded("").get_envs() {
            if let Some(value) = value {
                let mut setting = name.to_owned();
                setting.push("=");
                setting.push(value);
                strace.arg("-E").arg(setting);
            }
        }
        run(strace.arg(program(name)).args(options)).succeeded();
        let calls = fs::read_to_string(&trace).unwrap();
        assert!(!calls.contains('('), "{name}: {calls}");
    }
}

#[test]
fn the_kernel_keeps_no_object() {
    if !is_root_for("a private IPC namespace") {
        return;
    }
    let solo = Solo::new();
    let script = r#"printf 'segment 1 4096
semaphore 1
queue 1
send 1
' | "$0"
        LD_PRELOAD= cat /proc/sysvipc/*"#;
    let mut command = solo.preloaded("unshare");
    command
        .args(["--ipc", "sh", "-c", script])
        .arg(program("sysv"));
    let outcome = run(&mut command).succeeded();
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines[..4], ["ok"; 4], "{outcome}");
    // Three headings.
    assert_eq!(lines[4..].len(), 3, "{outcome}");
}

#[test]
fn the_files_of_proc_are_those_of_the_kernel_with_our_objects() {
    if !is_root_for("a private IPC namespace") {
        return;
    }
    let script = r#"printf 'segment 1 4096\nsegment 2 100\nsemaphore 1\nqueue 1\nsend 1\n' | "$0" >/dev/null
        cd /proc/sysvipc; cat shm sem msg | sed -E 's/[0-9]+/N/g; s/ +/ /g'
        cat /proc/sysvipc/shm | head -1; head -n 1 sem msg
        cd /proc/sys/kernel; tail -n 1 shmmax shmall shmmni sem msgmax msgmnb msgmni shm_rmid_forced"#;
    let shown = |command: &mut Command| {
        let command = command.args(["--ipc", "sh", "-c", script]);
        run(command.arg(program("sysv"))).succeeded().stdout
    };
    let solo = Solo::new();
    let ours = shown(&mut solo.preloaded("unshare"));
    assert_eq!(ours, shown(&mut command("unshare")));
    assert_eq!(ours.lines().count(), 7 + 6 + 23, "{ours}");
}
