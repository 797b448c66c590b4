//! Nodes of this machine against a bare QUIC stream of this machine.
//!
//! This program starts itself inside `migshm lab`, where it starts a worker on each node and the
//! two ends of [`crate::echo`]. Node 1 makes and writes every segment while it is alone, so
//! that its pages are there before another node comes; each round has a segment of its own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::available_parallelism;

use anyhow::{Context, Result, ensure};

use crate::echo::{self, Exchange};
use crate::figures::{Figure, Series, Unit, Wanted};
use crate::process::Worker;
use crate::sysv::PAGE;
use crate::tasks::Task;
use crate::topics::Topics;
use crate::{Effort, Installation, speed_up, this_program};

/// Node 1, which has the pages at first, and another.
const FIRST: usize = 0;
const SECOND: usize = 1;
const THIRD: usize = 2;

/// What a page fault costs on the wire: a request, and a page.
const PAGE_ECHO: (&str, usize, usize) = ("echo 16 B -> 4 KiB", 16, PAGE);
/// Pages that two nodes write at once, and how often they do.
const FALSE_SHARING_PAGES: usize = 8;
const FALSE_SHARING_ROUNDS: usize = 50;
/// Nanoseconds of computing for each word of a page.
const FALSE_SHARING_WORK: u64 = 5_000;
/// What a message and its answer cost.
const SMALL_ECHO: (&str, usize, usize) = ("echo 64 B", 64, 64);

/// The first key of the segments and semaphore sets made here: of a cluster that nobody else uses.
const FIRST_KEY: i32 = 0x4d00_0000;

/// A lab to be started, and what is measured in it.
pub struct Plan {
    nodes: usize,
    /// Whether each node has a core of its own and no other.
    confined: bool,
    groups: &'static [Group],
}

/// The figures of a topic, whose rounds are measured together.
type Group = (&'static str, fn(&mut Lab, Effort) -> Result<Vec<Figure>>);

/// All labs.
pub const LABS: [Plan; 3] = [
    Plan {
        nodes: 2,
        confined: false,
        groups: &[
            ("fault", faults),
            ("scan", scans),
            ("handover", hand_overs),
            ("busy", faults_of_busy_nodes),
            ("sharing", false_sharing),
        ],
    },
    Plan {
        nodes: 3,
        confined: false,
        groups: &[("upgrade", upgrades)],
    },
    Plan {
        nodes: 2,
        confined: true,
        groups: &[
            ("matmul", |lab, effort| {
                speed_up::measure(&speed_up::MATRIX_PRODUCT, lab, effort)
            }),
            ("tsp", |lab, effort| {
                speed_up::measure(&speed_up::TSP, lab, effort)
            }),
            ("sort", |lab, effort| {
                speed_up::measure(&speed_up::INTEGER_SORT, lab, effort)
            }),
            ("sort", |lab, effort| {
                speed_up::measure(&speed_up::INTEGER_SORT_A, lab, effort)
            }),
            ("jacobi", |lab, effort| {
                speed_up::measure(&speed_up::JACOBI, lab, effort)
            }),
        ],
    },
];

/// Starts the lab with this index and measures inside it what is wanted.
///
/// # Errors
/// Something does not work.
pub fn measure(
    lab: usize,
    effort: Effort,
    topics: &Topics,
    installation: &Installation,
    scratch: &Path,
) -> Result<Vec<Figure>> {
    let Plan { nodes, groups, .. } = LABS[lab];
    if !groups.iter().any(|(topic, _)| topics.want(topic)) {
        return Ok(Vec::new());
    }
    let results = scratch.join(format!("lab-{lab}.json"));
    let mut command = Command::new(&installation.program);
    command.args(["lab", "--nodes", &nodes.to_string(), "--"]);
    command
        .arg(this_program()?)
        .args(["in-lab", &lab.to_string()])
        .arg(&results)
        .args(effort.argument())
        .args(&topics.0)
        .env("MIGSHM", &installation.program);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    let results =
        std::fs::read(&results).with_context(|| format!("{command:?} left no results"))?;
    Ok(serde_json::from_slice(&results)?)
}

/// Measures what is wanted of a lab, inside it, and writes it to the file `results`.
///
/// # Errors
/// Something does not work.
pub fn measure_in_lab(
    plan: &Plan,
    effort: Effort,
    topics: &Topics,
    installation: &Installation,
    results: &Path,
) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    if plan.confined {
        speed_up::confine(installation)?;
    }
    let mut lab = Lab::start(plan.nodes, installation, scratch.path())?;
    let mut figures = Vec::new();
    for (topic, measure) in plan.groups {
        if topics.want(topic) {
            eprintln!("{} nodes: {topic}", plan.nodes);
            figures.extend(measure(&mut lab, effort)?);
        }
    }
    Ok(std::fs::write(results, serde_json::to_vec(&figures)?)?)
}

fn faults(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let [mut read, mut write, mut echo] = <[Series; 3]>::default();
    for _ in 0..effort.rounds {
        echo.push(lab.echo(PAGE_ECHO, effort.exchanges)?);
        read.push(lab.touch(effort.pages, SECOND, false, &[])?);
        echo.push(lab.echo(PAGE_ECHO, effort.exchanges)?);
        write.push(lab.touch(effort.pages, SECOND, true, &[])?);
    }
    let figure = |name, series, percent, wanted| {
        let echo = (PAGE_ECHO.0, &echo);
        Figure::new(name, series, echo, percent, Unit::Microseconds, wanted)
    };
    Ok(vec![
        figure(
            "remote read fault, p50",
            &read,
            50,
            Some(Wanted::AtMost(1.5)),
        ),
        figure(
            "remote read fault, p99",
            &read,
            99,
            Some(Wanted::AtMost(3.0)),
        ),
        figure("remote write fault, p50", &write, 50, None),
        figure("remote write fault, p99", &write, 99, None),
    ])
}

fn scans(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let pages = effort.bulk_pages;
    let [mut scan, mut stream] = <[Series; 2]>::default();
    for _ in 0..effort.rounds {
        stream.push(lab.echo(("", PAGE_ECHO.1, pages * PAGE), 1)?);
        scan.push(lab.scan(pages)?);
    }
    Ok(vec![Figure::new(
        "sequential read of a remote segment",
        &scan,
        ("QUIC stream", &stream),
        50,
        Unit::GigabytesPerSecond(pages * PAGE),
        Some(Wanted::AtLeast(0.7)),
    )])
}

fn hand_overs(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let [mut handed, mut echo] = <[Series; 2]>::default();
    for _ in 0..effort.rounds {
        echo.push(lab.echo(SMALL_ECHO, effort.exchanges)?);
        handed.push(lab.hand_over(effort.hand_overs)?);
    }
    Ok(vec![Figure::new(
        "hand-over of a guarded page",
        &handed,
        (SMALL_ECHO.0, &echo),
        50,
        Unit::Microseconds,
        Some(Wanted::AtMost(3.0)),
    )])
}

fn faults_of_busy_nodes(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let [mut idle, mut loaded] = <[Series; 2]>::default();
    for _ in 0..effort.rounds {
        idle.push(lab.touch(effort.pages, SECOND, false, &[])?);
        loaded.push({
            let _load = Load::start()?;
            lab.touch(effort.pages, SECOND, false, &[])?
        });
    }
    let figure = |name, percent| {
        let (idle, wanted) = (("idle", &idle), Some(Wanted::AtMost(2.0)));
        Figure::new(name, &loaded, idle, percent, Unit::Microseconds, wanted)
    };
    Ok(vec![
        figure("remote read fault, all cores busy, p50", 50),
        figure("remote read fault, all cores busy, p99", 99),
    ])
}

fn false_sharing(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let cases = [
        ("false sharing between barriers, release", 0),
        ("false sharing while computing, release", FALSE_SHARING_WORK),
    ];
    let mut figures = Vec::new();
    for (name, work) in cases {
        let [mut released, mut sequential] = <[Series; 2]>::default();
        for _ in 0..effort.rounds {
            released.push(lab.false_sharing(true, FALSE_SHARING_ROUNDS, work)?);
            sequential.push(lab.false_sharing(false, FALSE_SHARING_ROUNDS / 5, work)?);
        }
        figures.push(Figure::new(
            name,
            &released,
            ("sequential", &sequential),
            50,
            Unit::Microseconds,
            Some(Wanted::AtMost(1.0 / 20.0)),
        ));
    }
    Ok(figures)
}

fn upgrades(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let [mut at_home, mut elsewhere, mut echo] = <[Series; 3]>::default();
    for _ in 0..effort.rounds {
        echo.push(lab.echo(PAGE_ECHO, effort.exchanges)?);
        at_home.push(lab.touch(effort.pages, FIRST, true, &[SECOND, THIRD])?);
        echo.push(lab.echo(PAGE_ECHO, effort.exchanges)?);
        elsewhere.push(lab.touch(effort.pages, SECOND, true, &[FIRST, THIRD])?);
    }
    let figure = |name, series| {
        let (echo, wanted) = ((PAGE_ECHO.0, &echo), Some(Wanted::AtMost(2.5)));
        Figure::new(name, series, echo, 50, Unit::Microseconds, wanted)
    };
    Ok(vec![
        figure("write fault, page read by two, at its home", &at_home),
        figure("write fault, page read by two, elsewhere", &elsewhere),
    ])
}

/// A worker on each node, and the ends of the echo.
pub struct Lab {
    installation: Installation,
    nodes: Vec<Worker>,
    client: Worker,
    _server: Worker,
    last_key: i32,
}

impl Lab {
    fn start(nodes: usize, installation: &Installation, scratch: &Path) -> Result<Lab> {
        let start_node = |node| {
            let name = format!("node{}", node + 1);
            let mut command = program_on(installation, node, &this_program()?);
            Worker::start(name, command.arg("worker"))
        };
        echo::prepare(scratch)?;
        let command = || Ok::<_, anyhow::Error>(Command::new(this_program()?));
        let mut server = Worker::start(
            "the echo server",
            command()?.arg("echo-server").arg(scratch),
        )?;
        let address: String = server.line()?;
        let client = Worker::start(
            "the echo client",
            command()?.arg("echo-client").arg(scratch).arg(address),
        )?;
        let nodes = (0..nodes).map(start_node).collect::<Result<_>>()?;
        Ok(Lab {
            installation: installation.clone(),
            nodes,
            client,
            _server: server,
            last_key: FIRST_KEY,
        })
    }

    /// The command that runs a program on a node.
    pub fn program_on(&self, node: usize, program: &Path) -> Command {
        program_on(&self.installation, node, program)
    }

    fn next_key(&mut self) -> i32 {
        self.next_keys(1)
    }

    /// The first of `count` keys that nobody uses.
    pub fn next_keys(&mut self, count: i32) -> i32 {
        let first = self.last_key + 1;
        self.last_key += count;
        first
    }

    /// Makes a segment that node 1 has written and all nodes have attached, lets `measure` use
    /// it, and removes it.
    fn with_segment(
        &mut self,
        pages: usize,
        measure: impl FnOnce(&mut Lab, u32) -> Result<Vec<f64>>,
    ) -> Result<Vec<f64>> {
        let key = self.next_key();
        let stamp = key.cast_unsigned();
        for (node, worker) in self.nodes.iter_mut().enumerate() {
            worker.ask(&Task::Map { key, pages })?;
            if node == FIRST {
                worker.ask(&Task::Fill { stamp })?;
            }
        }
        let samples = measure(self, stamp)?;
        for (node, worker) in self.nodes.iter_mut().enumerate() {
            worker.ask(&Task::Unmap {
                remove: node == FIRST,
            })?;
        }
        Ok(samples)
    }

    /// Faults of node `by` on pages that node 1 has written and then `readers` have read.
    fn touch(
        &mut self,
        pages: usize,
        by: usize,
        write: bool,
        readers: &[usize],
    ) -> Result<Vec<f64>> {
        self.with_segment(pages, |lab, stamp| {
            for reader in readers {
                lab.nodes[*reader].ask(&Task::Touch {
                    stamp,
                    write: false,
                })?;
            }
            lab.nodes[by].ask(&Task::Touch { stamp, write })
        })
    }

    fn scan(&mut self, pages: usize) -> Result<Vec<f64>> {
        self.with_segment(pages, |lab, stamp| {
            lab.nodes[SECOND].ask(&Task::Scan { stamp })
        })
    }

    fn hand_over(&mut self, times: usize) -> Result<Vec<f64>> {
        let key = self.next_key();
        let segment = self.next_key();
        let [first, second, ..] = &mut self.nodes[..] else {
            anyhow::bail!("two nodes are needed")
        };
        for worker in [&mut *first, &mut *second] {
            worker.ask(&Task::Map {
                key: segment,
                pages: 1,
            })?;
        }
        first.give(&Task::HandOver {
            key,
            side: 0,
            times,
        })?;
        second.give(&Task::HandOver {
            key,
            side: 1,
            times,
        })?;
        let samples = first.answer()?;
        second.answer()?;
        second.ask(&Task::Unmap { remove: false })?;
        first.ask(&Task::Unmap { remove: true })?;
        Ok(samples)
    }

    /// Two nodes write alternate words of the same pages.
    fn false_sharing(&mut self, release: bool, rounds: usize, work: u64) -> Result<Vec<f64>> {
        let (key, segment) = (self.next_key(), self.next_key());
        let [first, second, ..] = &mut self.nodes[..] else {
            anyhow::bail!("two nodes are needed")
        };
        for worker in [&mut *first, &mut *second] {
            worker.ask(&Task::Consistency { release })?;
            worker.ask(&Task::Map {
                key: segment,
                pages: FALSE_SHARING_PAGES,
            })?;
            worker.ask(&Task::Consistency { release: false })?;
        }
        let task = |side| Task::FalseSharing {
            key,
            side,
            rounds,
            work,
        };
        first.give(&task(0))?;
        second.give(&task(1))?;
        let samples = first.answer()?;
        second.answer()?;
        second.ask(&Task::Unmap { remove: false })?;
        first.ask(&Task::Unmap { remove: true })?;
        Ok(samples)
    }

    fn echo(
        &mut self,
        (_, request, response): (&str, usize, usize),
        times: usize,
    ) -> Result<Vec<f64>> {
        self.client.ask(&Exchange {
            request,
            response,
            times,
        })
    }
}

fn program_on(installation: &Installation, node: usize, program: &Path) -> Command {
    let mut command = Command::new(&installation.program);
    let name = format!("node{}", node + 1);
    command.args(["run", "--on", &name, "--"]).arg(program);
    command
}

/// Programs that compute, one for each core, until dropped.
struct Load(Vec<Child>);

impl Load {
    fn start() -> Result<Load> {
        let mut load = Load(Vec::new());
        for _ in 0..available_parallelism()?.get() {
            load.0.push(
                Command::new(this_program()?)
                    .arg("compute")
                    .stdin(Stdio::null())
                    .spawn()?,
            );
        }
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
