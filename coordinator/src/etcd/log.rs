//! How a coordinator's state lies in etcd, as a function: what is to be written, and what was.
//!
//! ```text
//!  PREFIX/format                    what this is
//!  PREFIX/leader                    address of the coordinator that leads, bound to its lease
//!  PREFIX/head                      "GENERATION S L": the state is S chunks of snapshot and L of log
//!  PREFIX/snapshot/GENERATION/N     chunks 0 to S-1, one after the other
//!  PREFIX/log/GENERATION/N          chunks 0 to L-1: records since, each with its length before it
//! ```
//!
//! Every transaction compares the leader's key, by the revision that made it, and the head. A
//! coordinator that leads no longer changes nothing, and a request that is made again, as the answer
//! to the first was lost, is done once. What fits no transaction is written ahead in several, where no head
//! points to yet: only the one that moves the head makes it part of the state. So at every revision
//! there is one state, that of the last commit.

use super::Error;
use super::wire::{
    DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, TxnRequest, TxnResponse,
};
use crate::replica::Stored;
use crate::store::Contents;

/// Bytes of one transaction's values, below etcd's limit for a request (1.5 MiB).
const CHUNK: usize = 1 << 20;
/// Before each record: bytes of its length.
const LENGTH: usize = size_of::<u32>();

/// The keys of one coordinator's state.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
    /// Bytes of a chunk at most.
    pub chunk: usize,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    generation: u64,
    snapshot: u64,
    log: u64,
}

/// Transactions that store something, in their order.
#[derive(Debug)]
pub struct Commit {
    /// Written ahead.
    pub ahead: Vec<TxnRequest>,
    /// What makes it part of the state.
    pub last: TxnRequest,
    /// The head then.
    pub head: Head,
}

impl Keys {
    /// Those below a prefix.
    pub fn new(prefix: &str) -> Keys {
        Keys {
            prefix: prefix.to_owned(),
            chunk: CHUNK,
        }
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    pub fn format(&self) -> Vec<u8> {
        self.key("format")
    }

    pub fn leader(&self) -> Vec<u8> {
        self.key("leader")
    }

    pub fn head(&self) -> Vec<u8> {
        self.key("head")
    }

    /// All of them.
    pub fn all(&self) -> RangeRequest {
        range(self.key(""), format!("{}0", self.prefix).into())
    }

    /// The chunks of a snapshot.
    pub fn snapshot(&self, head: Head) -> RangeRequest {
        let of = |chunk| self.part("snapshot", head.generation, chunk);
        range(of(0), of(head.snapshot))
    }

    /// The chunks of a log.
    pub fn log(&self, head: Head) -> RangeRequest {
        let of = |chunk| self.part("log", head.generation, chunk);
        range(of(0), of(head.log))
    }

    /// What it takes to store something, for who leads since revision `term`. Without a head there is nothing yet, and
    /// `format` says what there will be.
    pub fn commit(
        &self,
        term: i64,
        head: Option<Head>,
        format: &str,
        contents: &Contents,
    ) -> Commit {
        let now = head.unwrap_or_default();
        let (kind, first, then, bytes);
        match contents {
            Contents::Records(records) => {
                let stream = stream(records);
                let log = now.log + stream.len().div_ceil(self.chunk) as u64;
                (kind, first, then) = ("log", now.log, Head { log, ..now });
                bytes = stream;
            }
            Contents::Snapshot(snapshot) => {
                let generation = now.generation + 1;
                let chunks = snapshot.len().div_ceil(self.chunk) as u64;
                let new = Head {
                    generation,
                    snapshot: chunks,
                    log: 0,
                };
                (kind, first, then) = ("snapshot", 0, new);
                bytes = snapshot.clone();
            }
        }
        let mut puts: Vec<PutRequest> = (first..)
            .zip(bytes.chunks(self.chunk))
            .map(|(chunk, bytes)| PutRequest {
                key: self.part(kind, then.generation, chunk),
                value: bytes.to_owned(),
                lease: 0,
            })
            .collect();
        let fenced = || self.fenced(term, head);
        let mut last = fenced();
        if let Some(put) = puts.pop() {
            last = last.put(put);
        }
        if head != Some(then) {
            last = last.put(put(self.head(), &then.to_string()));
        }
        if head.is_none() {
            last = last.put(put(self.format(), format));
        }
        if then.generation != now.generation {
            for kind in ["snapshot", "log"] {
                last = last.delete(DeleteRangeRequest {
                    key: self.part(kind, 0, 0),
                    range_end: self.part(kind, then.generation, 0),
                });
            }
        }
        Commit {
            ahead: puts.into_iter().map(|put| fenced().put(put)).collect(),
            last,
            head: then,
        }
    }

    /// Does nothing, for who leads no longer; else says what is in the way.
    fn fenced(&self, term: i64, head: Option<Head>) -> TxnRequest {
        let txn = TxnRequest::new().if_created(&self.leader(), term);
        let txn = match head {
            Some(head) => txn.if_value(&self.head(), head.to_string().as_bytes()),
            None => txn.if_created(&self.head(), 0),
        };
        txn.or_read(&self.leader()).or_read(&self.head())
    }

    fn part(&self, kind: &str, generation: u64, chunk: u64) -> Vec<u8> {
        self.key(&format!("{kind}/{generation:016x}/{chunk:016x}"))
    }

    fn key(&self, name: &str) -> Vec<u8> {
        format!("{}/{name}", self.prefix).into()
    }

    /// What became of a transaction of a [`Commit`] that moves the head from `head` to `then`, or leads there:
    /// its revision.
    pub fn outcome(
        &self,
        term: i64,
        head: Option<Head>,
        then: Head,
        answer: TxnResponse,
    ) -> Result<i64, Error> {
        let revision = answer.header.unwrap_or_default().revision;
        if answer.succeeded {
            return Ok(revision);
        }
        let mut found = answer.read().map(|mut kvs| kvs.pop());
        let leader = found.next().flatten();
        let found = found.next().flatten();
        if leader.is_none_or(|leader| leader.create_revision != term) {
            return Err(Error::Deposed);
        }
        // It was done when it was first asked for, and the answer lost.
        let found = found.and_then(|found| Head::parse(&found.value));
        if found == Some(then) && found != head {
            return Ok(revision);
        }
        Err(self.damaged("somebody else has changed it"))
    }

    /// What was stored, from the chunks that the head speaks of.
    pub fn assemble(
        &self,
        head: Head,
        snapshot: &[KeyValue],
        log: &[KeyValue],
    ) -> Result<Stored, Error> {
        let bytes = |chunks: &[KeyValue], wanted: u64| {
            let found = chunks.len();
            if found as u64 != wanted {
                return Err(self.damaged(format!("there are {found} parts of {wanted}")));
            }
            let bytes = chunks.iter().flat_map(|kv| &kv.value);
            Ok(bytes.copied().collect::<Vec<u8>>())
        };
        let stream = bytes(log, head.log)?;
        let records = records(&stream).ok_or_else(|| self.damaged("its log is none"))?;
        Ok(Stored {
            snapshot: bytes(snapshot, head.snapshot)?,
            records,
        })
    }

    pub fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Damaged {
            prefix: self.prefix.clone(),
            reason: reason.into(),
        }
    }
}

impl Head {
    /// As it is stored.
    pub fn parse(text: &[u8]) -> Option<Head> {
        let text = std::str::from_utf8(text).ok()?;
        let numbers = text.split(' ').map(str::parse);
        let numbers: Vec<u64> = numbers.collect::<Result<_, _>>().ok()?;
        let [generation, snapshot, log] = numbers[..] else {
            return None;
        };
        Some(Head {
            generation,
            snapshot,
            log,
        })
    }
}

impl std::fmt::Display for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.generation, self.snapshot, self.log)
    }
}

/// Records, one after the other.
fn stream(records: &[Vec<u8>]) -> Vec<u8> {
    let mut stream = Vec::with_capacity(records.iter().map(|r| LENGTH + r.len()).sum());
    for record in records {
        let length = u32::try_from(record.len()).expect("a frame is smaller");
        stream.extend_from_slice(&length.to_le_bytes());
        stream.extend_from_slice(record);
    }
    stream
}

/// The records of a log; `None` if it is none.
fn records(mut stream: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut records = Vec::new();
    while !stream.is_empty() {
        let (length, rest) = stream.split_first_chunk::<LENGTH>()?;
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        records.push(record.to_owned());
        stream = rest;
    }
    Some(records)
}

fn put(key: Vec<u8>, value: &str) -> PutRequest {
    PutRequest {
        key,
        value: value.into(),
        lease: 0,
    }
}

fn range(key: Vec<u8>, range_end: Vec<u8>) -> RangeRequest {
    RangeRequest {
        key,
        range_end,
        ..RangeRequest::default()
    }
}
