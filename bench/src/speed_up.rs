//! Two nodes on a core each against one node on one core: workloads of `c-tests`.
//!
//! A program's ranks are confined to their node's core, as its daemon is; the coordinator is on
//! that of node 1. The reference is the program's only rank, on node 1. What two ranks on the same
//! cores get from the kernel's own System V IPC is the most that this machine has to give. Every run
//! must have the same result.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::cluster::Lab;
use crate::figures::{Figure, Series, Unit, Wanted};
use crate::sysv;
use crate::{Effort, Installation};

/// A program of `c-tests` that prints its time and its result.
pub struct Workload {
    name: &'static str,
    program: &'static str,
    options: &'static [&'static str],
    wanted: f64,
}

/// All of B goes to both nodes.
pub const MATRIX_PRODUCT: Workload = Workload {
    name: "matrix product",
    program: "matmul",
    options: &["--size", "1024"],
    wanted: 1.8,
};

/// Some 340 tours from a shared queue.
pub const TSP: Workload = Workload {
    name: "TSP",
    program: "tsp",
    options: &["--cities", "20", "--seed", "5"],
    wanted: 1.8,
};

/// Ten times, 16 KiB of counts goes to either node: as many keys for a value as TreadMarks took.
pub const INTEGER_SORT: Workload = Workload {
    name: "integer sort",
    program: "intsort",
    options: &["--keys", "16777216", "--values", "8192"],
    wanted: 1.5,
};

/// Ten times, 1 MiB of counts goes to either node.
pub const INTEGER_SORT_A: Workload = Workload {
    name: "NAS IS class A",
    program: "intsort",
    options: &["--keys", "8388608", "--values", "524288"],
    wanted: 1.5,
};

/// A row of 16 KiB from either node at each step.
pub const JACOBI: Workload = Workload {
    name: "Jacobi 2048 x 2048",
    program: "heat",
    options: &["--size", "2048", "--steps", "100"],
    wanted: 1.7,
};

/// The reference of a speed-up.
pub const ONE_NODE: &str = "one node";

/// Where the ranks are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    OneNode,
    TwoNodes,
    /// With segments in release consistency.
    TwoNodesRelease,
    /// Without migshm, on two cores.
    Kernel,
}

/// The environment variable by which a segment's creator chooses its consistency.
const CONSISTENCY: &str = "MIGSHM_CONSISTENCY";
/// Keys that a program of `c-tests` uses.
const KEYS: i32 = 256;

/// Measures the workload in a lab that is [confined](confine).
///
/// # Errors
/// Something does not work.
pub fn measure(workload: &Workload, lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let [mut one, mut two, mut release, mut kernel] = <[Series; 4]>::default();
    let mut result = None;
    for _ in 0..effort.runs {
        for (series, place) in [
            (&mut one, Place::OneNode),
            (&mut two, Place::TwoNodes),
            (&mut release, Place::TwoNodesRelease),
            (&mut kernel, Place::Kernel),
        ] {
            let outcome = run(workload, lab, place)?;
            ensure!(
                *result.get_or_insert(outcome.result.clone()) == outcome.result,
                "{}: another result: {place:?}",
                workload.program
            );
            series.push(vec![outcome.nanoseconds]);
        }
    }
    let figure = |place, series, wanted| {
        Figure::new(
            &format!("{} {place}", workload.name),
            series,
            (ONE_NODE, &one),
            50,
            Unit::PerSecond,
            wanted,
        )
    };
    let wanted = Some(Wanted::AtLeast(workload.wanted));
    Ok(vec![
        figure("on two nodes", &two, wanted),
        figure("on two nodes, release", &release, wanted),
        figure("on two cores, kernel", &kernel, None),
    ])
}

/// Confines each node's daemon to a core of its own, and the coordinator to node 1's; leaves the
/// kernel's IPC objects to others.
///
/// # Errors
/// There are fewer cores than nodes, or this process is not privileged.
pub fn confine(installation: &Installation) -> Result<()> {
    // SAFETY: changes only which IPC objects this process and its children find.
    sysv::check(unsafe { libc::unshare(libc::CLONE_NEWIPC) })?;
    let output = Command::new(&installation.program)
        .args(["labctl", "status", "--json"])
        .stderr(Stdio::inherit())
        .output()?;
    let hosts: Vec<Host> = serde_json::from_slice(&output.stdout).context("labctl status")?;
    for host in hosts {
        let number: usize = host.name.trim_start_matches("node").parse().unwrap_or(1);
        let pid = host.pid.with_context(|| format!("{} is dead", host.name))?;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = thread?.file_name();
            confine_thread(thread.to_string_lossy().parse()?, core(number - 1)?)?;
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Host {
    name: String,
    pid: Option<i32>,
}

/// What a run of a workload says.
struct Outcome {
    nanoseconds: f64,
    result: String,
}

fn run(workload: &Workload, lab: &mut Lab, place: Place) -> Result<Outcome> {
    let key = lab.next_keys(KEYS).to_string();
    let program = programs().join(workload.program);
    let ranks = if place == Place::OneNode { 1 } else { 2 };
    let start = |rank: usize| {
        let mut command = match place {
            Place::Kernel => Command::new(&program),
            _ => lab.program_on(rank, &program),
        };
        command
            .args(["--key", &key, "--rank", &rank.to_string()])
            .args(["--ranks", &ranks.to_string(), "--unchecked"])
            .args(workload.options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .env_remove(CONSISTENCY);
        if place == Place::TwoNodesRelease {
            command.env(CONSISTENCY, "release");
        }
        let core = core(rank)?;
        // SAFETY: makes nothing but a system call.
        unsafe { command.pre_exec(move || confine_thread(0, core)) };
        Ok(command.spawn()?)
    };
    let running: Vec<Child> = (0..ranks).map(start).collect::<Result<_>>()?;
    let mut text = String::new();
    for rank in running {
        let output = rank.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}: {}",
            workload.program,
            output.status
        );
        text += &String::from_utf8(output.stdout)?;
    }
    let line = |name| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("{} does not say {name:?}", workload.program))
    };
    let seconds: f64 = line("parallel: ")?.trim_end_matches(" s").parse()?;
    Ok(Outcome {
        nanoseconds: seconds * 1e9,
        result: line("result: ")?.to_owned(),
    })
}

/// Where the C programs are.
fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../c-tests/build")
}

/// The processor of this number among those that this process may use.
fn core(number: usize) -> Result<usize> {
    // SAFETY: a set of bits, for which all zeros is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: a live set of the size that is given; 0 is this thread.
    sysv::check(unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) })?;
    // SAFETY: the processor is one that the set has room for.
    let mut cores =
        (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) });
    match cores.nth(number) {
        Some(core) => Ok(core),
        None => bail!("speed-ups need a core for each node"),
    }
}

/// Confines a thread, or this one for 0, to a processor.
fn confine_thread(thread: i32, core: usize) -> io::Result<()> {
    // SAFETY: a set of bits, for which all zeros is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the processor is one that the set has room for.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: a live set of the size that is given.
    sysv::check(unsafe { libc::sched_setaffinity(thread, size_of_val(&set), &raw const set) })?;
    Ok(())
}
