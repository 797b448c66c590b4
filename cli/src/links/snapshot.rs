//! The access logs of a cluster's nodes at one time, and the file that they can be saved in.
//!
//! The file is JSON, one record a line; the first says [`FORMAT`] and [`VERSION`]. The records are
//! [`Record`]s; those of a segment or an account follow it, in any order otherwise.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use migshm_coherence::links::Account;
use migshm_coherence::replay::Event;
use migshm_protocol::accesses::{Part, Request, Traffic, User};
use migshm_protocol::call::{Answer, Call, Errno, ShmStatus};
use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::{NodeId, Page, SegmentId, codec};
use serde::{Deserialize, Serialize};

use crate::tools::{Client, Daemon, describe};

/// What the first line says.
const FORMAT: &str = "migshm accesses";
/// Of the format; a file of another is refused.
const VERSION: u32 = 1;

/// What the nodes of a cluster tell.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Names of the nodes.
    pub nodes: BTreeMap<NodeId, String>,
    /// The segments.
    pub segments: Vec<Segment>,
}

/// What the nodes tell of a segment.
#[derive(Debug)]
pub struct Segment {
    /// Which it is.
    pub status: Identity,
    /// By node.
    pub accounts: BTreeMap<NodeId, Account>,
    /// Requests, each with the home that got it.
    requests: Vec<(NodeId, Request)>,
    /// Events, of all segments, that nodes have forgotten.
    pub forgotten: u64,
    /// In a file: whose account the records belong to.
    teller: NodeId,
}

/// A segment's names and size.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// As in `ipcs`.
    pub shmid: i32,
    /// Its key.
    pub key: i32,
    /// Its size.
    pub bytes: u64,
}

/// A line of a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Record {
    /// First of all.
    File { format: String, version: u32 },
    /// A node of the cluster.
    Node { node: NodeId, name: String },
    /// What follows is about this segment.
    Segment(Identity),
    /// What follows is told by this node, at this time.
    Account {
        node: NodeId,
        time: u64,
        forgotten: u64,
    },
    /// A process of the node.
    User(User),
    /// Its traffic.
    Traffic(Box<Traffic>),
    /// A request to the node as a home.
    Request(Request),
}

impl Segment {
    fn new(status: Identity) -> Segment {
        Segment {
            status,
            accounts: BTreeMap::new(),
            requests: Vec::new(),
            forgotten: 0,
            teller: NodeId(0),
        }
    }

    /// Whether this is its id or its key.
    pub fn is_named(&self, number: i32) -> bool {
        self.status.shmid == number || self.status.key == number
    }
}

impl Snapshot {
    /// Asks all nodes, through the local daemon, about those segments that the caller may read, or
    /// one of them.
    pub fn take(daemon: &Daemon, wanted: Option<i32>, requests: bool) -> anyhow::Result<Snapshot> {
        let mut client = Client::connect(daemon)?;
        let mut snapshot = Snapshot {
            nodes: client.nodes()?,
            segments: Vec::new(),
        };
        for ShmStatus { id, perm, size, .. } in client.segments()? {
            let mut segment = Segment::new(Identity {
                shmid: id,
                key: perm.key,
                bytes: size,
            });
            if wanted.is_some_and(|wanted| !segment.is_named(wanted)) {
                continue;
            }
            if segment.ask(&mut client, &snapshot.nodes, requests)? {
                snapshot.segments.push(segment);
            }
        }
        Ok(snapshot)
    }

    /// Reads a file.
    pub fn load(file: &Path) -> anyhow::Result<Snapshot> {
        let input = File::open(file).with_context(|| file.display().to_string())?;
        let mut snapshot = Snapshot::default();
        for (line, number) in BufReader::new(input).lines().zip(1..) {
            let record = serde_json::from_str(&line?).map_err(anyhow::Error::from);
            record
                .and_then(|record| snapshot.add(number, record))
                .with_context(|| format!("{}, line {number}", file.display()))?;
        }
        Ok(snapshot)
    }

    fn add(&mut self, line: u32, record: Record) -> anyhow::Result<()> {
        if line == 1 {
            return match record {
                Record::File { format, version } if format == FORMAT && version == VERSION => {
                    Ok(())
                }
                Record::File { format, version } => {
                    bail!("{format} of version {version}, not {FORMAT} of version {VERSION}")
                }
                _ => bail!("not a file of {FORMAT}"),
            };
        }
        let misplaced = || anyhow!("a record out of place");
        let segment = self.segments.last_mut();
        match record {
            Record::File { .. } => bail!(misplaced()),
            Record::Node { node, name } => {
                known(node)?;
                self.nodes.insert(node, name);
            }
            Record::Segment(status) => self.segments.push(Segment::new(status)),
            Record::Account {
                node,
                time,
                forgotten,
            } => {
                let segment = segment.ok_or_else(misplaced)?;
                let account = segment.accounts.entry(known(node)?).or_default();
                account.time = time;
                segment.forgotten = forgotten;
                segment.teller = node;
            }
            Record::User(user) => segment.ok_or_else(misplaced)?.told()?.users.push(user),
            Record::Traffic(traffic) => {
                known(NodeId(traffic.peer))?;
                segment
                    .ok_or_else(misplaced)?
                    .told()?
                    .traffic
                    .push(*traffic);
            }
            Record::Request(request) => {
                known(request.node)?;
                let segment = segment.ok_or_else(misplaced)?;
                segment.told()?;
                segment.requests.push((segment.teller, request));
            }
        }
        Ok(())
    }

    /// Writes a file.
    pub fn save(&self, file: &Path) -> anyhow::Result<()> {
        let output = File::create(file).with_context(|| file.display().to_string())?;
        let mut output = BufWriter::new(output);
        let mut write = |record: Record| -> anyhow::Result<()> {
            serde_json::to_writer(&mut output, &record)?;
            Ok(output.write_all(b"\n")?)
        };
        write(Record::File {
            format: FORMAT.to_owned(),
            version: VERSION,
        })?;
        for (node, name) in &self.nodes {
            write(Record::Node {
                node: *node,
                name: name.clone(),
            })?;
        }
        for segment in &self.segments {
            write(Record::Segment(segment.status))?;
            for (node, account) in &segment.accounts {
                write(Record::Account {
                    node: *node,
                    time: account.time,
                    forgotten: segment.forgotten,
                })?;
                for user in &account.users {
                    write(Record::User(user.clone()))?;
                }
                for traffic in &account.traffic {
                    write(Record::Traffic(Box::new(*traffic)))?;
                }
                for (_, request) in segment.requests.iter().filter(|(home, _)| home == node) {
                    write(Record::Request(*request))?;
                }
            }
        }
        output.flush().with_context(|| file.display().to_string())
    }

    /// All requests, in the order of time.
    pub fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        for (segment, number) in self.segments.iter().zip(0..) {
            events.extend(segment.requests.iter().map(|(home, request)| Event {
                time: request.time,
                page: Page {
                    segment: SegmentId(number),
                    index: request.page,
                },
                node: request.node,
                access: request.access,
                home: *home,
            }));
        }
        events.sort_by_key(|event| event.time);
        events
    }
}

/// A node that there can be.
fn known(node: NodeId) -> anyhow::Result<NodeId> {
    if usize::from(node.0) < MAX_NODES {
        Ok(node)
    } else {
        bail!("there is no node {}", node.0)
    }
}

impl Segment {
    /// Asks all nodes; false if there is nothing to hear, as the segment is gone or not to be read.
    fn ask(
        &mut self,
        client: &mut Client,
        nodes: &BTreeMap<NodeId, String>,
        requests: bool,
    ) -> anyhow::Result<bool> {
        for (&node, name) in nodes {
            let mut from = Some(0);
            while let Some(part) = from {
                let call = Call::Accesses {
                    id: self.status.shmid,
                    node,
                    from: part,
                    requests,
                };
                let part = match client.call_with_raw(call)? {
                    (Ok(Answer::Accesses(_)), raw) => codec::decode::<Part>(raw)?.0,
                    (Ok(other), _) => bail!("the node daemon answers {other:?}"),
                    (Err(Errno::EIO | Errno::ENOENT), _) => {
                        eprintln!("migshm: {name} does not answer");
                        break;
                    }
                    (Err(Errno::EACCES | Errno::EINVAL | Errno::EIDRM), _) => return Ok(false),
                    (Err(errno), _) => bail!("{name}: {}", describe(errno)),
                };
                from = part.next;
                self.add(node, part);
            }
        }
        Ok(true)
    }

    fn add(&mut self, node: NodeId, part: Part) {
        if !self.accounts.contains_key(&node) {
            self.forgotten += part.forgotten;
        }
        let account = self.accounts.entry(node).or_default();
        account.time = part.time;
        account.users.extend(part.users);
        account.traffic.extend(part.traffic);
        let requests = part.requests.into_iter().map(|request| (node, request));
        self.requests.extend(requests);
    }

    /// The account that a file is telling.
    fn told(&mut self) -> anyhow::Result<&mut Account> {
        let account = self.accounts.get_mut(&self.teller);
        account.ok_or_else(|| anyhow!("a record out of place"))
    }
}
