//! One node against the kernel's own System V IPC: two workers, one in a private IPC namespace,
//! one under the preload library with a daemon of its own, which it starts.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::figures::{Figure, Series, Unit, Wanted};
use crate::process::Worker;
use crate::sysv::PAGE;
use crate::tasks::Task;
use crate::topics::Topics;
use crate::{Effort, Installation, this_program};

/// A program that uses no System V IPC.
const NO_IPC: &str = "/bin/true";
const NATIVE: &str = "kernel";

/// 64 MiB, more than caches hold.
const PAGES: usize = (64 << 20) / PAGE;
const BYTES: usize = PAGES * PAGE;

/// Access to memory must cost what it costs natively, up to noise.
const AS_NATIVE: Option<Wanted> = Some(Wanted::AtLeast(0.98));

/// Measures all of it.
///
/// # Errors
/// Something does not work.
pub fn measure(
    effort: Effort,
    topics: &Topics,
    installation: &Installation,
    scratch: &Path,
) -> Result<Vec<Figure>> {
    let Effort {
        rounds,
        short,
        calls,
        passes,
        ..
    } = effort;
    let plan = [
        (
            "attach",
            "shmget + shmat + shmdt + IPC_RMID",
            Task::AttachCycle { times: short },
            Unit::Microseconds,
            Some(Wanted::AtMost(5.0)),
        ),
        (
            "touch",
            "first touch of a page",
            Task::FirstTouch { pages: PAGES },
            Unit::Nanoseconds,
            Some(Wanted::AtMost(1.02)),
        ),
        (
            "stream",
            "streaming read",
            Task::StreamRead {
                pages: PAGES,
                passes,
            },
            Unit::GigabytesPerSecond(BYTES),
            AS_NATIVE,
        ),
        (
            "stream",
            "streaming write",
            Task::StreamWrite {
                pages: PAGES,
                passes,
            },
            Unit::GigabytesPerSecond(BYTES),
            AS_NATIVE,
        ),
        (
            "random",
            "random access",
            Task::RandomAccess { pages: PAGES },
            Unit::MillionsPerSecond,
            AS_NATIVE,
        ),
        (
            "semop",
            "semop",
            Task::Semop {
                times: calls,
                undo: false,
            },
            Unit::Nanoseconds,
            Some(Wanted::AtMost(0.3)),
        ),
        (
            "semop",
            "semop with SEM_UNDO",
            Task::Semop {
                times: calls,
                undo: true,
            },
            Unit::Nanoseconds,
            Some(Wanted::AtMost(0.7)),
        ),
        (
            "pingpong",
            "semop round trip of two processes",
            Task::PingPong {
                times: short,
                one_core: false,
            },
            Unit::Microseconds,
            Some(Wanted::AtMost(1.1)),
        ),
        (
            "pingpong",
            "semop round trip of two processes, one core",
            Task::PingPong {
                times: short,
                one_core: true,
            },
            Unit::Microseconds,
            Some(Wanted::AtMost(1.1)),
        ),
        (
            "fork",
            "fork + wait with an attach",
            Task::Fork { times: short },
            Unit::Microseconds,
            None,
        ),
    ];
    let mut native = Worker::start(
        "the native worker",
        Command::new(this_program()?).arg("native-worker"),
    )?;
    let mut ours = Worker::start(
        "the preloaded worker",
        Command::new(this_program()?)
            .arg("worker")
            .env("LD_PRELOAD", &installation.library)
            .env("MIGSHM_BIN", &installation.program)
            .env("MIGSHM_RUNTIME_DIR", scratch.join("one-node")),
    )?;
    let mut figures = Vec::new();
    for (topic, name, task, unit, wanted) in plan {
        if !topics.want(topic) {
            continue;
        }
        eprintln!("{name}");
        let (mut kernel, mut migshm) = (Series::default(), Series::default());
        for _ in 0..rounds {
            kernel.push(native.ask(&task)?);
            migshm.push(ours.ask(&task)?);
        }
        figures.push(Figure::new(
            name,
            &migshm,
            (NATIVE, &kernel),
            50,
            unit,
            wanted,
        ));
    }
    if topics.want("start") {
        figures.push(start_up(effort, installation)?);
    }
    Ok(figures)
}

/// What the preload costs a program that does not need it.
fn start_up(effort: Effort, installation: &Installation) -> Result<Figure> {
    let name = "start and end of a program without IPC";
    eprintln!("{name}");
    let (mut plain, mut preloaded) = (Series::default(), Series::default());
    for _ in 0..effort.rounds {
        plain.push(start_times(&mut Command::new(NO_IPC), effort.starts)?);
        let mut command = Command::new(NO_IPC);
        preloaded.push(start_times(
            command.env("LD_PRELOAD", &installation.library),
            effort.starts,
        )?);
    }
    Ok(Figure::new(
        name,
        &preloaded,
        ("without preload", &plain),
        50,
        Unit::Microseconds,
        None,
    ))
}

fn start_times(command: &mut Command, times: usize) -> Result<Vec<f64>> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    (0..times)
        .map(|_| {
            let start = Instant::now();
            let status = command.status()?;
            ensure!(status.success(), "{command:?} failed: {status}");
            Ok(start.elapsed().as_secs_f64() * 1e9)
        })
        .collect()
}
