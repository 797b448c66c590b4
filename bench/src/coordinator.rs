//! How many semaphore operations a coordinator on one core does for eight nodes: real links, each with
//! operations of many processes under way, from one process on another core.
//!
//! Most processes alter semaphores of their own; one in eight contends with one of another node for a
//! lock. The sets are not delegated, as those that several nodes use.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use migshm_coordinator::replica::Replica;
use migshm_coordinator::store::{Directory, Durability, Store};
use migshm_coordinator::{Settings, server};
use migshm_protocol::call::{Answer, Call, Caller, SemBuf, SetMemory};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::session::{Cursor, Header, Session, opening};
use migshm_protocol::{ProcessId, VERSION, codec};
use migshm_transport::{Carrier, Endpoint, FrameReceiver, Identity, Peer, pki};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::figures::{Figure, Series, Unit, Wanted};
use crate::process::{self, Worker};
use crate::{Effort, sysv, this_program};

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const NODES: usize = 8;
/// Of each node, each with one operation under way.
const PROCESSES: u16 = 64;
/// Of those, how many take and give a lock, each against one process of the node's neighbour.
const LOCKERS: u16 = PROCESSES / 8;
/// Wanted: 100,000 operations in a second; in nanoseconds for one.
const GOAL: f64 = 1e4;

/// Measures it.
///
/// # Errors
/// Something does not work.
pub fn measure(effort: Effort, scratch: &Path) -> Result<Vec<Figure>> {
    let pki = scratch.join("coordinator");
    std::fs::create_dir(&pki)?;
    pki::create_authority(&pki)?;
    let names = (0..NODES).map(name).collect::<Result<Vec<_>>>()?;
    for peer in names.iter().chain([&Peer::Coordinator]) {
        pki::issue(&pki, peer, pki::DEFAULT_VALIDITY)?;
    }
    let (mut served, mut bare, mut goal) = <(Series, Series, Series)>::default();
    let (mut stored, mut synced) = <(Series, Series)>::default();
    for round in 1..=effort.rounds {
        eprintln!("coordinator, round {round} of {}", effort.rounds);
        served.push(load(&pki, &["coordinator-server"], effort)?);
        stored.push(load(&pki, &["coordinator-server", "stored"], effort)?);
        synced.push(load(&pki, &["coordinator-server", "synced"], effort)?);
        bare.push(load(&pki, &["bare-server"], effort)?);
        goal.push(vec![GOAL]);
    }
    let name = "semaphore operations of 8 nodes";
    let figure = |name, measured, reference, wanted| {
        Figure::new(
            name,
            measured,
            reference,
            50,
            Unit::MillionsPerSecond,
            wanted,
        )
    };
    Ok(vec![
        figure(name, &served, ("wanted", &goal), Some(Wanted::AtLeast(1.0))),
        figure(name, &served, ("frames answered at once", &bare), None),
        figure(
            "the same, with a state directory",
            &stored,
            ("in memory", &served),
            None,
        ),
        figure(
            "the same, waiting for the disk",
            &synced,
            ("in memory", &served),
            None,
        ),
    ])
}

/// Nanoseconds for one operation of a server.
fn load(pki: &Path, server: &[&str], effort: Effort) -> Result<Vec<f64>> {
    let (server, options) = server.split_first().expect("a server");
    let mut server = Worker::start(
        "the coordinator",
        Command::new(this_program()?)
            .arg(server)
            .arg(pki)
            .args(options),
    )?;
    let address: SocketAddr = server.line()?;
    let mut nodes = Worker::start(
        "the nodes",
        Command::new(this_program()?)
            .arg("coordinator-load")
            .arg(pki)
            .arg(address.to_string()),
    )?;
    nodes.ask(&(effort.pairs / 5))?;
    nodes.ask(&effort.pairs)
}

/// A coordinator, which says its address; its state is in memory, or stored too.
///
/// # Errors
/// The endpoint or the state directory cannot be made.
pub fn serve(pki: &Path, state: Option<Durability>) -> Result<()> {
    on_core(0)?.block_on(async {
        let endpoint = Endpoint::bind(LOOPBACK, &Identity::load(pki, &Peer::Coordinator)?)?;
        process::say(&endpoint.local_address()?)?;
        let directory = tempfile::tempdir_in(pki)?;
        let (replica, store) = match state {
            None => (Replica::of_new_cluster(), None),
            Some(durability) => {
                let (directory, replica) = Directory::open(directory.path(), durability)?;
                (replica, Some(Store::Directory(directory)))
            }
        };
        server::serve(endpoint, replica, Settings::default(), store).await?;
        Ok(())
    })
}

/// What answers every frame at once, as a coordinator would that has nothing to do.
///
/// # Errors
/// The endpoint cannot be made.
pub fn serve_bare(pki: &Path) -> Result<()> {
    on_core(0)?.block_on(async {
        let endpoint = Endpoint::bind(LOOPBACK, &Identity::load(pki, &Peer::Coordinator)?)?;
        process::say(&endpoint.local_address()?)?;
        while let Some(incoming) = endpoint.accept().await {
            let mut link = incoming.link().await?;
            tokio::spawn(async move {
                let mut session = Session::default();
                let mut carrier = Carrier::new(link.sender, Cursor::default());
                while let Ok(frame) = link.receiver.next().await {
                    let (header, rest) = frame.decode::<Header>()?;
                    session.receive(header)?;
                    let (message, _) = codec::decode(rest)?;
                    let id = match message {
                        ToCoordinator::Call { id, .. } => id,
                        _ => 0,
                    };
                    let answer = FromCoordinator::Answer {
                        id,
                        outcome: Ok(Answer::Value(0)),
                        placement: None,
                    };
                    session.send(&answer, &[])?;
                    carrier.advance(&session, session.mark());
                }
                anyhow::Ok(())
            });
        }
        Ok(())
    })
}

/// A worker whose tasks are numbers: how often each process does two operations that cancel out.
///
/// # Errors
/// The links cannot be made.
pub fn load_worker(pki: &Path, address: SocketAddr) -> Result<()> {
    let runtime = on_core(1)?;
    let mut nodes = runtime.block_on(join_all(pki, address))?;
    process::serve(|pairs: usize| {
        runtime.block_on(async {
            let start = Instant::now();
            let mut running = JoinSet::new();
            for node in nodes.drain(..) {
                running.spawn(node.run(pairs));
            }
            while let Some(node) = running.join_next().await {
                nodes.push(node??);
            }
            let operations = NODES * usize::from(PROCESSES) * pairs * 2;
            Ok(vec![
                start.elapsed().as_secs_f64() * 1e9 / operations as f64,
            ])
        })
    })
}

async fn join_all(pki: &Path, address: SocketAddr) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for number in 0..NODES {
        let peer = name(number)?;
        let endpoint = Endpoint::bind(LOOPBACK, &Identity::load(pki, &peer)?)?;
        let link = endpoint.connect(address, &Peer::Coordinator).await?;
        let join = ToCoordinator::Join {
            version: VERSION,
            name: peer.file_stem().to_owned(),
            address: endpoint.local_address()?,
            memory: 1 << 30,
        };
        link.sender.send_frame(opening(&join, 0)?);
        nodes.push(Node {
            carrier: Carrier::new(link.sender, Cursor::default()),
            receiver: link.receiver,
            session: Session::default(),
            last_id: 0,
            _endpoint: endpoint,
            uses: Vec::new(),
        });
    }
    // A set for every node's own semaphores, and one of locks for every node and the next.
    let get = Call::SemGet {
        key: libc::IPC_PRIVATE,
        count: i32::from(PROCESSES),
        flags: 0o600 | libc::IPC_CREAT,
    };
    let mut sets = Vec::new();
    for _ in 0..2 * NODES {
        sets.push(nodes[0].call(get, &[]).await?);
    }
    let (own, locks) = sets.split_at(NODES);
    for (number, node) in nodes.iter_mut().enumerate() {
        for num in 0..LOCKERS {
            node.operate(locks[number], num, 1).await?;
        }
        let neighbour = locks[(number + 1) % NODES];
        node.uses = (0..PROCESSES)
            .map(|process| match process {
                // Half of the locks are the node's own, half the neighbour's.
                lock if lock < LOCKERS / 2 => (locks[number], lock, -1),
                lock if lock < LOCKERS => (neighbour, lock - LOCKERS / 2, -1),
                process => (own[number], process, 1),
            })
            .collect();
    }
    Ok(nodes)
}

struct Node {
    carrier: Carrier,
    receiver: FrameReceiver,
    session: Session,
    last_id: u64,
    _endpoint: Endpoint,
    /// By process: the semaphore that it uses, and its first operation of a pair.
    uses: Vec<(i32, u16, i16)>,
}

impl Node {
    /// Has every process do so many pairs of operations.
    async fn run(mut self, pairs: usize) -> Result<Node> {
        let mut left = vec![2 * pairs; self.uses.len()];
        let mut due: VecDeque<usize> = (0..self.uses.len()).collect();
        let mut under_way = 0;
        loop {
            while let Some(process) = due.pop_front() {
                let (set, num, first) = self.uses[process];
                let op = if left[process].is_multiple_of(2) {
                    first
                } else {
                    -first
                };
                self.send(process as u64, operation_on(set), &operation(num, op))?;
                under_way += 1;
            }
            if under_way == 0 {
                return Ok(self);
            }
            let (process, value) = self.answer().await?;
            ensure!(value == 0, "semop gives {value}");
            under_way -= 1;
            let process = usize::try_from(process)?;
            left[process] -= 1;
            if left[process] > 0 {
                due.push_back(process);
            }
        }
    }

    async fn operate(&mut self, set: i32, num: u16, op: i16) -> Result<()> {
        self.call(operation_on(set), &operation(num, op))
            .await
            .map(drop)
    }

    async fn call(&mut self, call: Call, raw: &[u8]) -> Result<i32> {
        self.send(0, call, raw)?;
        Ok(self.answer().await?.1)
    }

    /// Makes a call of a process.
    fn send(&mut self, process: u64, call: Call, raw: &[u8]) -> Result<()> {
        self.last_id += 1;
        let caller = Caller {
            process: ProcessId(process),
            pid: 1000 + process as i32,
            uid: 0,
            gid: 0,
            groups: vec![0],
            capabilities: 0,
            memlock: None,
        };
        let id = self.last_id << 16 | process;
        let message = ToCoordinator::Call { id, caller, call };
        self.session.send(&message, raw)?;
        self.carrier.advance(&self.session, self.session.mark());
        Ok(())
    }

    /// The next answer: whose call it is of, and its value.
    async fn answer(&mut self) -> Result<(u64, i32)> {
        loop {
            let frame = self.receiver.next().await?;
            let (header, rest) = frame.decode::<Header>()?;
            if !self.session.receive(header)? {
                continue;
            }
            if let (FromCoordinator::Answer { id, outcome, .. }, _) = codec::decode(rest)? {
                let Ok(Answer::Value(value)) = outcome else {
                    bail!("a call ends with {outcome:?}");
                };
                return Ok((id & 0xffff, value));
            }
        }
    }
}

fn operation_on(id: i32) -> Call {
    Call::SemOp {
        id,
        memory: SetMemory::Unusable,
    }
}

fn operation(num: u16, op: i16) -> [u8; SemBuf::SIZE] {
    SemBuf { num, op, flags: 0 }.to_bytes()
}

fn name(number: usize) -> Result<Peer> {
    Ok(Peer::node(&format!("load{number}"))?)
}

/// A runtime for this process's life on one core: of the allowed ones that with this index, or the
/// last.
fn on_core(index: usize) -> Result<Runtime> {
    std::mem::forget(sysv::OneCore::stay_on(index)?);
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
