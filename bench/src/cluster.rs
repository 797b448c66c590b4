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
use crate::{Effort, Installation, this_program};

/// Node 1, which has the pages at first, and another.
const FIRST: usize = 0;
const SECOND: usize = 1;
const THIRD: usize = 2;

/// What a page fault costs on the wire: a request, and a page.
const PAGE_ECHO: (&str, usize, usize) = ("echo 16 B -> 4 KiB", 16, PAGE);
/// Pages that two nodes write at once, and how often they do.
const FALSE_SHARING_PAGES: usize = 8;
const FALSE_SHARING_ROUNDS: usize = 50;
/// What a message and its answer cost.
const SMALL_ECHO: (&str, usize, usize) = ("echo 64 B", 64, 64);

/// The first key of the segments and semaphore sets made here: of a cluster that nobody else uses.
const FIRST_KEY: i32 = 0x4d00_0000;

/// Starts a lab and measures inside it.
///
/// # Errors
/// Something does not work.
pub fn measure(
    nodes: usize,
    effort: Effort,
    installation: &Installation,
    scratch: &Path,
) -> Result<Vec<Figure>> {
    let results = scratch.join(format!("{nodes}-nodes.json"));
    let mut command = Command::new(&installation.program);
    command.args(["lab", "--nodes", &nodes.to_string(), "--"]);
    command
        .arg(this_program()?)
        .arg("in-lab")
        .arg(nodes.to_string())
        .arg(&results);
    command
        .args(effort.argument())
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

/// Measures what `nodes` nodes show, and writes it to the file `results`.
///
/// # Errors
/// Something does not work.
pub fn measure_in_lab(
    nodes: usize,
    effort: Effort,
    installation: &Installation,
    results: &Path,
) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut lab = Lab::start(nodes, installation, scratch.path())?;
    let figures = if nodes == 2 {
        between_two(&mut lab, effort)?
    } else {
        among_three(&mut lab, effort)?
    };
    Ok(std::fs::write(results, serde_json::to_vec(&figures)?)?)
}

fn between_two(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let Effort {
        rounds,
        pages,
        bulk_pages,
        exchanges,
        hand_overs,
        ..
    } = effort;
    let [mut read, mut write, mut page_echo] = <[Series; 3]>::default();
    let [mut handed, mut small_echo] = <[Series; 2]>::default();
    let [mut scan, mut stream] = <[Series; 2]>::default();
    let [mut idle, mut loaded] = <[Series; 2]>::default();
    let [mut released, mut sequential] = <[Series; 2]>::default();
    for round in 1..=rounds {
        eprintln!("two nodes, round {round} of {rounds}");
        page_echo.push(lab.echo(PAGE_ECHO, exchanges)?);
        read.push(lab.touch(pages, SECOND, false, &[])?);
        page_echo.push(lab.echo(PAGE_ECHO, exchanges)?);
        write.push(lab.touch(pages, SECOND, true, &[])?);
        small_echo.push(lab.echo(SMALL_ECHO, exchanges)?);
        handed.push(lab.hand_over(hand_overs)?);
        stream.push(lab.echo(("", PAGE_ECHO.1, bulk_pages * PAGE), 1)?);
        scan.push(lab.scan(bulk_pages)?);
        released.push(lab.false_sharing(true, FALSE_SHARING_ROUNDS)?);
        sequential.push(lab.false_sharing(false, FALSE_SHARING_ROUNDS / 5)?);
        idle.push(lab.touch(pages, SECOND, false, &[])?);
        loaded.push({
            let _load = Load::start()?;
            lab.touch(pages, SECOND, false, &[])?
        });
    }
    let us = Unit::Microseconds;
    let page = (PAGE_ECHO.0, &page_echo);
    let at_most = |bound| Some(Wanted::AtMost(bound));
    let throughput = Unit::GigabytesPerSecond(bulk_pages * PAGE);
    Ok(vec![
        Figure::new(
            "false sharing between barriers, release",
            &released,
            ("sequential", &sequential),
            50,
            us,
            at_most(1.0 / 20.0),
        ),
        Figure::new("remote read fault, p50", &read, page, 50, us, at_most(1.5)),
        Figure::new("remote read fault, p99", &read, page, 99, us, at_most(3.0)),
        Figure::new("remote write fault, p50", &write, page, 50, us, None),
        Figure::new("remote write fault, p99", &write, page, 99, us, None),
        Figure::new(
            "sequential read of a remote segment",
            &scan,
            ("QUIC stream", &stream),
            50,
            throughput,
            Some(Wanted::AtLeast(0.7)),
        ),
        Figure::new(
            "hand-over of a guarded page",
            &handed,
            (SMALL_ECHO.0, &small_echo),
            50,
            us,
            at_most(3.0),
        ),
        Figure::new(
            "remote read fault, all cores busy, p50",
            &loaded,
            ("idle", &idle),
            50,
            us,
            at_most(2.0),
        ),
        Figure::new(
            "remote read fault, all cores busy, p99",
            &loaded,
            ("idle", &idle),
            99,
            us,
            at_most(2.0),
        ),
    ])
}

fn among_three(lab: &mut Lab, effort: Effort) -> Result<Vec<Figure>> {
    let Effort {
        rounds,
        pages,
        exchanges,
        ..
    } = effort;
    let [mut at_home, mut elsewhere, mut page_echo] = <[Series; 3]>::default();
    for round in 1..=rounds {
        eprintln!("three nodes, round {round} of {rounds}");
        page_echo.push(lab.echo(PAGE_ECHO, exchanges)?);
        at_home.push(lab.touch(pages, FIRST, true, &[SECOND, THIRD])?);
        page_echo.push(lab.echo(PAGE_ECHO, exchanges)?);
        elsewhere.push(lab.touch(pages, SECOND, true, &[FIRST, THIRD])?);
    }
    let (us, page) = (Unit::Microseconds, (PAGE_ECHO.0, &page_echo));
    let wanted = Some(Wanted::AtMost(2.5));
    Ok(vec![
        Figure::new(
            "write fault, page read by two, at its home",
            &at_home,
            page,
            50,
            us,
            wanted,
        ),
        Figure::new(
            "write fault, page read by two, elsewhere",
            &elsewhere,
            page,
            50,
            us,
            wanted,
        ),
    ])
}

/// A worker on each node, and the ends of the echo.
struct Lab {
    nodes: Vec<Worker>,
    client: Worker,
    _server: Worker,
    last_key: i32,
}

impl Lab {
    fn start(nodes: usize, installation: &Installation, scratch: &Path) -> Result<Lab> {
        let start_node = |number| {
            let name = format!("node{number}");
            let mut command = Command::new(&installation.program);
            command
                .args(["run", "--on", &name, "--"])
                .arg(this_program()?)
                .arg("worker");
            Worker::start(name, &mut command)
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
        let nodes = (1..=nodes).map(start_node).collect::<Result<_>>()?;
        Ok(Lab {
            nodes,
            client,
            _server: server,
            last_key: FIRST_KEY,
        })
    }

    fn next_key(&mut self) -> i32 {
        self.last_key += 1;
        self.last_key
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
    fn false_sharing(&mut self, release: bool, rounds: usize) -> Result<Vec<f64>> {
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
        let task = |side| Task::FalseSharing { key, side, rounds };
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
