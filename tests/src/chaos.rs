//! Fault injection: clients work on a cluster while processes are killed and stopped, daemons
//! stopped, links cut; then the history of all that the clients saw is judged.
//!
//! ```text
//!  seed ──▶ Schedule ──▶ run ──┬─ Lab ◀── labctl pause, cut, ...
//!                              ├─ c-tests/chaos/client ──▶ log ┐
//!                              ├─ ...    ▲ SIGKILL, SIGSTOP    ├──▶ history ──▶ check ──▶ Report
//!                              └─ client finish ──▶ log        ┘
//! ```
//!
//! The seed determines what is done and when, and what the clients do; not how the machine
//! schedules them. [`Fault`] says what must hold in spite of each fault, [`check`] how that is
//! judged.

pub mod check;
pub mod history;
pub mod linearizable;
pub mod schedule;

use std::fs::{self, File};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use self::history::Operation;
use self::schedule::{Event, Fault, Schedule};
use crate::random::Random;
use crate::{Lab, eventually, run as run_to_end};

/// Keys of the segments that the clients use under locks only.
const GUARDED_KEYS: &str = "0x6d730001-0x6d730002";
/// What a client exits with when a page is lost for good.
const EXIT_LOST: i32 = 7;
/// How long a client may take to end when it is told to: a hang is a finding.
const PATIENCE: Duration = Duration::from_secs(20);
/// How late a step may be. Where the machine is slower, faults last longer, and follow each other sooner, than what
/// is to be survived: then nothing is judged.
const LATE: Duration = Duration::from_millis(400);
/// The longest time between two faults that happen in turn.
const MOMENT: Duration = Duration::from_millis(1500);
/// How long clients work on when the last fault is over.
const AFTERMATH: Duration = Duration::from_millis(500);

/// What to run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// From which the schedule follows.
    pub seed: u64,
    /// Nodes of the cluster.
    pub nodes: usize,
    /// Clients, which are spread over the nodes.
    pub clients: usize,
    /// How long faults are injected.
    pub time: Duration,
    /// Which.
    pub faults: Vec<Fault>,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// What was done.
    pub schedule: Schedule,
    /// How many operations were judged.
    pub operations: usize,
    /// What ought not to be.
    pub wrong: Vec<String>,
    /// Why nothing was judged, if so: the machine was too slow to keep to the schedule.
    pub void: Option<String>,
    /// Logs of clients and daemons, if anything is wrong.
    pub kept: Option<PathBuf>,
}

impl Report {
    /// Fails if anything is wrong, or nothing was done.
    ///
    /// # Panics
    /// With the seed, the schedule, and what is wrong.
    #[track_caller]
    pub fn assert_right(&self, seed: u64) {
        let events = &self.schedule.events;
        let shown: Vec<String> = events.iter().map(ToString::to_string).collect();
        let wrong = self.wrong.join("\n\n");
        assert!(
            wrong.is_empty(),
            "seed {seed}\n{}\n\n{wrong}",
            shown.join("\n")
        );
        assert!(self.operations > 0);
    }
}

/// Runs the clients on a cluster of their own, with faults, and judges what they saw.
///
/// # Panics
/// If the cluster cannot be started, or told what to do.
#[must_use]
pub fn run(setup: &Setup) -> Report {
    let Setup {
        seed,
        nodes,
        clients,
        time,
        ..
    } = *setup;
    let schedule = Schedule::new(seed, nodes, clients, time, &setup.faults);
    let networks = setup.faults.iter().any(|fault| fault.is_cut());
    let options: &[&str] = if networks { &["--netns"] } else { &[] };
    stage(setup, options, schedule, |scene, schedule| {
        scene.perform(schedule);
    })
}

/// Runs the clients on a cluster of several coordinators, and kills leaders, `turns` times each kind; judges what
/// the clients saw.
///
/// # Panics
/// If the cluster cannot be started, or told what to do.
#[must_use]
pub fn run_failovers(setup: &Setup, turns: usize) -> Report {
    let mut random = Random(setup.seed);
    let schedule = Schedule {
        release: random.below(2) == 1,
        events: Vec::new(),
    };
    stage(
        setup,
        &["--coordinators", "3"],
        schedule,
        |scene, schedule| {
            scene.take_turns(schedule, turns, &mut random);
        },
    )
}

/// Has clients work while something is performed, and judges what they saw.
fn stage(
    setup: &Setup,
    options: &[&str],
    mut schedule: Schedule,
    perform: impl FnOnce(&mut Scene, &mut Schedule),
) -> Report {
    let keys = if schedule.release { GUARDED_KEYS } else { "" };
    let directory = tempfile::Builder::new().prefix("migshm-chaos-").tempdir();
    let directory = directory.expect("/tmp can be written").keep();
    let lab = Lab::of(setup.nodes, options, &[("MIGSHM_RELEASE_KEYS", keys)]);
    let mut scene = Scene::new(&lab, setup, &directory);
    perform(&mut scene, &mut schedule);
    let operations = scene.end();
    let void = scene.void;
    let mut wrong = if void.is_some() {
        Vec::new()
    } else {
        scene.wrong
    };
    if !wrong.is_empty() {
        keep_logs(&lab, &directory);
    }
    drop(lab);
    let kept = if wrong.is_empty() {
        fs::remove_dir_all(&directory).expect("it is ours");
        None
    } else {
        wrong.push(format!("logs: {}", directory.display()));
        Some(directory)
    };
    Report {
        schedule,
        operations,
        wrong,
        void,
        kept,
    }
}

/// The cluster, its clients, and what has been found.
struct Scene<'a> {
    lab: &'a Lab,
    setup: &'a Setup,
    directory: &'a Path,
    /// By place; those of a node that is down are none.
    clients: Vec<Option<Client>>,
    /// How many clients there have been.
    started: u32,
    wrong: Vec<String>,
    void: Option<String>,
}

struct Client {
    number: u32,
    child: Child,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab, setup: &'a Setup, directory: &'a Path) -> Scene<'a> {
        run_to_end(lab.on(1, "client").arg("create")).succeeded();
        let mut scene = Scene {
            lab,
            setup,
            directory,
            clients: Vec::new(),
            started: 0,
            wrong: Vec::new(),
            void: None,
        };
        scene.clients.resize_with(setup.clients, || None);
        (0..setup.clients).for_each(|place| scene.start(place));
        scene
    }

    /// The node of a client, from 1.
    fn node(&self, place: usize) -> usize {
        1 + place % self.setup.nodes
    }

    fn log(&self, number: u32) -> PathBuf {
        self.directory.join(format!("client{number}.log"))
    }

    fn complaints(&self, number: u32) -> PathBuf {
        self.directory.join(format!("client{number}.err"))
    }

    fn start(&mut self, place: usize) {
        self.started += 1;
        let number = self.started;
        let complaints = File::create(self.complaints(number)).expect("it is ours");
        let seed = self.setup.seed.wrapping_add(u64::from(number) << 32);
        let mut command = self.lab.on(self.node(place), "client");
        command
            .arg("work")
            .arg(self.log(number))
            .args([number.to_string(), seed.to_string()])
            .stdin(Stdio::null())
            .stderr(complaints);
        let child = command.spawn().expect("migshm can be executed");
        self.clients[place] = Some(Client { number, child });
    }

    /// Does all that is scheduled, at its time.
    fn perform(&mut self, schedule: &mut Schedule) {
        let mut steps: Vec<(Duration, bool, Event)> = Vec::new();
        for &event in &schedule.events {
            steps.push((event.at, true, event));
            if event.fault != Fault::KillProcess {
                steps.push((event.at + event.lasts, false, event));
            }
        }
        steps.sort_by_key(|(at, ..)| *at);
        let start = Instant::now();
        let end = steps.iter().map(|(at, ..)| *at).max().unwrap_or_default();
        let until = |at: Duration| sleep((start + at).saturating_duration_since(Instant::now()));
        for (at, begins, event) in steps {
            until(at);
            match (event.fault.is_of_process(), begins) {
                (true, _) => self.disturb(event, begins),
                (false, true) => self.inject(event),
                (false, false) => self.heal(event),
            }
            let late = start.elapsed().saturating_sub(at);
            if late > LATE && !event.fault.is_of_process() {
                let seconds = late.as_secs_f64();
                self.void = Some(format!("{seconds:.1} s late:{event}"));
            }
        }
        until(end.max(self.setup.time) + AFTERMATH);
    }

    /// Kills leaders, each when the one before is back, and notes when, and for how long nobody else led.
    fn take_turns(&mut self, schedule: &mut Schedule, turns: usize, random: &mut Random) {
        let start = Instant::now();
        let between = || Duration::from_millis(random.below(MOMENT.as_millis() as u64));
        let pauses: Vec<Duration> = std::iter::repeat_with(between)
            .take(2 * turns + 1)
            .collect();
        let faults = self.setup.faults.iter().copied().cycle();
        for (fault, pause) in faults.zip(&pauses).take(2 * turns) {
            sleep(*pause);
            let leader = self.leader(fault);
            let at = start.elapsed();
            self.labctl("kill", &leader);
            // Asks the coordinator: answered when one leads, and stores.
            let _ = self.lab.ipcs();
            schedule.events.push(Event {
                at,
                lasts: start.elapsed() - at,
                fault,
                target: 0,
            });
            self.labctl("start", &leader);
        }
        sleep(pauses[2 * turns]);
    }

    /// The host that leads, coordinators or etcd.
    fn leader(&self, fault: Fault) -> String {
        let kind = match fault {
            Fault::KillEtcdLeader => "etcd",
            _ => "coordinator",
        };
        let mut leader = None;
        eventually("one leads", || {
            leader = self.lab.leader(kind);
            leader.is_some()
        });
        leader.expect("one leads")
    }

    fn disturb(&mut self, event: Event, begins: bool) {
        let Some(client) = &mut self.clients[event.target] else {
            return;
        };
        match (event.fault, begins) {
            (Fault::KillProcess, _) => {
                self.kill(event.target);
                self.start(event.target);
            }
            (_, true) => client.signal(libc::SIGSTOP),
            (_, false) => client.signal(libc::SIGCONT),
        }
    }

    /// Ends a client; if it had ended before, that had better been right.
    fn kill(&mut self, place: usize) {
        let Some(mut client) = self.clients[place].take() else {
            return;
        };
        client.signal(libc::SIGKILL);
        let status = client.child.wait().expect("it is a child");
        self.judge_end(client.number, status);
    }

    fn inject(&mut self, event: Event) {
        let name = host(event.target);
        match event.fault {
            Fault::PauseDaemon | Fault::PauseCoordinator => self.labctl("pause", &name),
            Fault::Cut | Fault::CutCoordinator => self.labctl("cut", &name),
            Fault::KillDaemon | Fault::KillCoordinator => self.labctl("kill", &name),
            Fault::CrashNode => {
                self.labctl("crash", &name);
                let of_node = (0..self.clients.len()).filter(|&p| self.node(p) == event.target);
                of_node
                    .collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|place| self.kill(place));
            }
            Fault::KillProcess | Fault::StopProcess => unreachable!("of a process"),
            Fault::KillLeader | Fault::KillEtcdLeader => unreachable!("in turn"),
        }
    }

    fn heal(&mut self, event: Event) {
        let name = host(event.target);
        match event.fault {
            Fault::PauseDaemon | Fault::PauseCoordinator => self.labctl("resume", &name),
            Fault::Cut | Fault::CutCoordinator => self.labctl("heal", &name),
            _ => self.labctl("start", &name),
        }
        for place in 0..self.clients.len() {
            if self.clients[place].is_none() {
                self.start(place);
            }
        }
    }

    fn labctl(&self, what: &str, host: &str) {
        self.lab.labctl(&[what, host]);
    }

    /// Has all clients end, looks at what they left, and judges their histories; returns how many
    /// operations there were.
    fn end(&mut self) -> usize {
        let clients: Vec<Client> = self.clients.iter_mut().filter_map(Option::take).collect();
        for client in &clients {
            client.signal(libc::SIGCONT);
            client.signal(libc::SIGTERM);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut hangs = false;
        for mut client in clients {
            match client.end(deadline) {
                Some(status) => self.judge_end(client.number, status),
                None => {
                    hangs = true;
                    self.report_hang(client);
                }
            }
        }
        let mut history = Vec::new();
        for number in 1..=self.started {
            history.extend(self.load(number));
        }
        if hangs {
            return history.len();
        }
        let look = run_to_end(self.lab.on(1, "client").arg("finish").arg(self.log(0)));
        let last = self.load(0);
        history.extend(&last);
        let memory_is_lost = look.status.signal() == Some(libc::SIGBUS) && self.may_lose_pages();
        if !look.status.success() && !memory_is_lost {
            self.wrong.push(look.to_string());
        }
        if look.status.success() {
            self.wrong.extend(check::check(&history));
        }
        for node in 1..=self.setup.nodes {
            let errors = &self.lab.status(node)["coherence"]["protocol_errors"];
            if *errors != 0 {
                self.wrong
                    .push(format!("node{node}: {errors} protocol errors"));
            }
        }
        history.len()
    }

    fn may_lose_pages(&self) -> bool {
        self.setup.faults.contains(&Fault::CrashNode)
    }

    /// Of a client that was killed before it had a log there is none.
    fn load(&self, number: u32) -> Vec<Operation> {
        match history::load(&self.log(number), number) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            result => result.expect("a log can be read"),
        }
    }

    fn judge_end(&mut self, number: u32, status: ExitStatus) {
        let is_told = [Some(libc::SIGKILL), Some(libc::SIGTERM)].contains(&status.signal());
        let is_lost = status.code() == Some(EXIT_LOST) && self.may_lose_pages();
        if !status.success() && !is_told && !is_lost {
            let said = fs::read_to_string(self.complaints(number)).unwrap_or_default();
            let text = format!("client {number} ended with {status}\n{said}");
            self.wrong.push(text);
        }
    }

    fn report_hang(&mut self, client: Client) {
        let Client { number, mut child } = client;
        let wchan = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
        let last = self.load(number).pop().map(|last| last.to_string());
        let text = format!(
            "client {number} does not end: in {wchan}, last in its log:\n{}",
            last.unwrap_or_default()
        );
        self.wrong.push(text);
        child.kill().expect("it is a child");
        child.wait().expect("it is a child");
    }
}

impl Client {
    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("pids are positive ints");
        // SAFETY: plain integers; the child has not been waited for.
        unsafe { libc::kill(pid, signal) };
    }

    /// Waits for its end.
    fn end(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            let status = self.child.try_wait().expect("it is a child");
            if status.is_some() || Instant::now() > deadline {
                return status;
            }
            sleep(Duration::from_millis(5));
        }
    }
}

fn host(target: usize) -> String {
    match target {
        0 => "coordinator".to_owned(),
        node => format!("node{node}"),
    }
}

/// Copies what the daemons said.
fn keep_logs(lab: &Lab, directory: &Path) {
    let files = fs::read_dir(lab.directory()).expect("the lab lives");
    for path in files.flatten().map(|entry| entry.path()) {
        if path.extension() == Some("log".as_ref()) {
            let to = directory.join(path.file_name().expect("a file"));
            fs::copy(&path, to).expect("it can be written");
        }
    }
}
