//! Several coordinators, one state: where it is in etcd, and who leads.
//!
//! ```text
//!  Candidate::open ──▶ lead ──▶ Term ─┬─▶ load ──▶ Replica, Log ──▶ server::serve
//!        ▲    the leader's key is     └─▶ keep: the lease, until it is lost
//!        ╰─── free: it takes it ─────────────────────╯
//! ```
//!
//! One coordinator leads: the one whose address is in the leader's key, which is bound to a lease. The others wait
//! until the key is gone. Nothing rests on clocks but how soon that is: whatever a leader says
//! is stored before, and storing succeeds only while the key is its own (`etcd/log.rs`). Besides it stops on its own
//! before its lease can have ended.
//!
//! etcd keeps what keys were until that is compacted; a leader does that to what was before the last
//! snapshot but one. So the etcd cluster should be one that is used for nothing else that reads the past.

mod client;
mod log;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use client::{Client, Location, Tls};

use crate::replica::Replica;
use crate::store::{self, Contents};
use log::{Head, Keys};
use wire::{KeyValue, PutRequest, RangeRequest, TxnRequest};

/// For how long a coordinator leads that is heard of no more, in seconds. etcd's own elections have to fit.
const LEASE: i64 = 5;
/// How long before its lease ends a coordinator stops by itself.
const MARGIN: Duration = Duration::from_secs(1);
/// How often the lease is kept.
const KEEP: Duration = Duration::from_millis(500);
/// How often those that wait look whether somebody leads.
const LOOK: Duration = Duration::from_millis(200);
/// How long etcd may be away when a coordinator is started.
const PATIENCE: Duration = Duration::from_secs(10);
/// Keys that are read at once.
const PAGE: i64 = 1_000;

/// etcd cannot be used, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its location makes no sense.
    #[error("{0}")]
    Unusable(String),
    /// No member answers.
    #[error("cannot reach etcd at {members}: {cause}")]
    Unreachable {
        /// Their addresses.
        members: String,
        /// What the last one said, or did not say.
        cause: String,
    },
    /// It does not do what it is asked.
    #[error("etcd refuses: {0}")]
    Refused(String),
    /// There is no such lease any more.
    #[error("the lease has ended")]
    Lapsed,
    /// The prefix has other keys.
    #[error(
        "what etcd has below {prefix}/ is not the state of a coordinator: there is {found:?}; name another prefix"
    )]
    Foreign {
        /// The prefix.
        prefix: String,
        /// A key that is there.
        found: String,
    },
    /// Of another version.
    #[error(
        "the state in etcd below {prefix}/ is of format {found:?}, this coordinator's is {expected:?}; it is left as it is"
    )]
    Version {
        /// The prefix.
        prefix: String,
        /// What it says.
        found: String,
        /// What is understood.
        expected: String,
    },
    /// Damaged.
    #[error(
        "the state in etcd below {prefix}/ is damaged: {reason}; it is left as it is (to begin anew without it, name another prefix)"
    )]
    Damaged {
        /// The prefix.
        prefix: String,
        /// How that shows.
        reason: String,
    },
    /// Another coordinator took the leader's key, or may have.
    #[error("this coordinator leads no longer")]
    Deposed,
}

/// A coordinator that leads when nobody else does.
pub struct Candidate {
    client: Arc<Client>,
    keys: Keys,
    /// Its own.
    address: String,
}

/// Who leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaders {
    /// The coordinator's address.
    pub coordinator: Option<String>,
    /// Addresses of the members of etcd that say so: one, or none while they elect.
    pub members: Vec<String>,
}

/// Looks who leads, now.
///
/// # Errors
/// [`Error`]: etcd does not answer soon.
pub async fn leaders(location: &Location, tls: Option<&Tls>) -> Result<Leaders, Error> {
    let client = Client::new(location, tls)?;
    let key = Keys::new(&location.prefix).leader();
    let found = client.range(&one(&key), Some(Instant::now())).await?;
    let address = |kv: &KeyValue| String::from_utf8_lossy(&kv.value).into_owned();
    Ok(Leaders {
        coordinator: found.kvs.first().map(address),
        members: client
            .leaders()
            .await
            .into_iter()
            .map(str::to_owned)
            .collect(),
    })
}

/// While a coordinator leads.
pub struct Term<'a> {
    candidate: &'a Candidate,
    /// Of the transaction that made the leader's key.
    revision: i64,
    lease: i64,
    /// When it ends, unless the lease is kept.
    ends: Instant,
}

/// The state in etcd, for who leads.
pub struct Log {
    client: Arc<Client>,
    keys: Keys,
    term: i64,
    /// `None`: there is nothing yet.
    head: Option<Head>,
    /// Revision of the last snapshot, if this term made it.
    snapshot: i64,
}

impl Candidate {
    /// Looks at a state; `address` is the coordinator's, for people who ask another one.
    ///
    /// # Errors
    /// [`Error`]: etcd cannot be reached, or has something else there.
    pub async fn open(
        location: &Location,
        tls: Option<&Tls>,
        address: String,
    ) -> Result<Candidate, Error> {
        let candidate = Candidate {
            client: Arc::new(Client::new(location, tls)?),
            keys: Keys::new(&location.prefix),
            address,
        };
        candidate.check(Some(Instant::now() + PATIENCE)).await?;
        Ok(candidate)
    }

    /// Waits until nobody leads, and does so. Meanwhile `leader` has the address of who leads.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn lead(&self, leader: &watch::Sender<Option<String>>) -> Result<Term<'_>, Error> {
        let key = self.keys.leader();
        loop {
            let found = self.client.range(&one(&key), None).await?.kvs.pop();
            if let Some(found) = found {
                let address = String::from_utf8_lossy(&found.value).into_owned();
                leader.send_if_modified(|known| known.replace(address.clone()) != Some(address));
                tokio::time::sleep(LOOK).await;
                continue;
            }
            leader.send_replace(None);
            let asked = Instant::now();
            let lease = self.client.grant(LEASE).await?.id;
            let txn = TxnRequest::new().if_created(&key, 0).or_read(&key);
            let txn = txn.put(PutRequest {
                key: key.clone(),
                value: self.address.clone().into(),
                lease,
            });
            let answer = match self.client.transact(&txn, None).await {
                Ok(answer) => answer,
                Err(Error::Lapsed) => continue,
                Err(error) => return Err(error),
            };
            let revision = if answer.succeeded {
                answer.header.unwrap_or_default().revision
            } else {
                // It may be this one's: the answer to a request before may have been lost.
                match answer.read().flatten().find(|kv| kv.lease == lease) {
                    Some(own) => own.create_revision,
                    None => match self.client.revoke(lease).await {
                        // It may have ended when that was first asked for.
                        Ok(_) | Err(Error::Lapsed) => continue,
                        Err(error) => return Err(error),
                    },
                }
            };
            return Ok(Term {
                candidate: self,
                revision,
                lease,
                ends: asked + Duration::from_secs(LEASE as u64) - MARGIN,
            });
        }
    }

    /// Whether there is a state, or may be: what there is must be one of this version.
    async fn check(&self, until: Option<Instant>) -> Result<bool, Error> {
        let mut all = self.keys.all();
        (all.limit, all.keys_only) = (2, true);
        // At once, for another coordinator may be about to make it.
        let both = TxnRequest::new().read(one(&self.keys.format())).read(all);
        let mut found = self.client.transact(&both, until).await?.read();
        let format = found.next().unwrap_or_default();
        let others = found.next().unwrap_or_default();
        let prefix = self.keys.prefix().to_owned();
        let expected = store::version();
        if let Some(found) = format.first() {
            if found.value == expected.as_bytes() {
                return Ok(true);
            }
            return Err(Error::Version {
                prefix,
                found: String::from_utf8_lossy(&found.value).into_owned(),
                expected,
            });
        }
        let leader = self.keys.leader();
        match others.iter().find(|kv| kv.key != leader) {
            Some(other) => Err(Error::Foreign {
                prefix,
                found: String::from_utf8_lossy(&other.key).into_owned(),
            }),
            None => Ok(false),
        }
    }

    /// All keys of a range, in their order.
    async fn read(&self, mut range: RangeRequest) -> Result<Vec<KeyValue>, Error> {
        range.limit = PAGE;
        let mut found: Vec<KeyValue> = Vec::new();
        loop {
            let page = self.client.range(&range, None).await?;
            found.extend(page.kvs);
            match found.last() {
                // The next key is this one and a zero.
                Some(last) if page.more => range.key = [&last.key[..], &[0]].concat(),
                _ => return Ok(found),
            }
        }
    }
}

impl Term<'_> {
    /// The state, to go on with. What coordinators before this one still try to write fails from now on.
    ///
    /// # Errors
    /// [`Error`]: what is there is left to whoever can mend it.
    pub async fn load(&self) -> Result<(Replica, Log), Error> {
        let Candidate { client, keys, .. } = self.candidate;
        let exists = self.candidate.check(None).await?;
        let mut log = Log {
            client: Arc::clone(client),
            keys: keys.clone(),
            term: self.revision,
            head: None,
            snapshot: 0,
        };
        if !exists {
            let replica = Replica::of_new_cluster();
            log.commit(&Contents::Snapshot(replica.snapshot())).await?;
            return Ok((replica, log));
        }
        let head = client.range(&one(&keys.head()), None).await?.kvs.pop();
        let head = head.and_then(|kv| Head::parse(&kv.value));
        let head = head.ok_or_else(|| keys.damaged("it has no head"))?;
        let snapshot = self.candidate.read(keys.snapshot(head)).await?;
        let log_chunks = self.candidate.read(keys.log(head)).await?;
        let stored = keys.assemble(head, &snapshot, &log_chunks)?;
        let replica = Replica::recover(&stored);
        let replica = replica.map_err(|error| keys.damaged(error.to_string()))?;
        log.head = Some(head);
        Ok((replica, log))
    }

    /// Keeps the lease; returns when that cannot be relied on any more.
    pub async fn keep(&self) {
        let mut ends = self.ends;
        while ends > Instant::now() {
            tokio::time::sleep(KEEP).await;
            let asked = Instant::now();
            let kept = self.candidate.client.keep_alive(self.lease);
            match tokio::time::timeout_at(ends.into(), kept).await {
                Ok(Ok(lease)) if lease.ttl > 0 => {
                    ends = asked + Duration::from_secs(lease.ttl as u64) - MARGIN;
                }
                Ok(Ok(_)) => return tracing::warn!("the lease has ended"),
                Ok(Err(error)) => tracing::warn!(%error, "the lease cannot be kept"),
                Err(_) => {}
            }
        }
        tracing::warn!("etcd does not answer; the lease may end");
    }

    /// Lets another lead at once.
    pub async fn resign(self) {
        let revoked = self.candidate.client.revoke(self.lease);
        if let Ok(Err(error)) = tokio::time::timeout(MARGIN, revoked).await {
            tracing::debug!(%error, "the lease ends by itself");
        }
    }
}

impl Log {
    /// Stores something, all or nothing; without records, makes sure that this coordinator still leads.
    ///
    /// # Errors
    /// [`Error::Deposed`], [`Error::Refused`], or the state is not what it was.
    pub async fn commit(&mut self, contents: &Contents) -> Result<(), Error> {
        let commit = self
            .keys
            .commit(self.term, self.head, &store::version(), contents);
        for txn in &commit.ahead {
            self.transact(txn, commit.head).await?;
        }
        let revision = self.transact(&commit.last, commit.head).await?;
        let is_snapshot = matches!(contents, Contents::Snapshot(_));
        self.head = Some(commit.head);
        if is_snapshot {
            let before = std::mem::replace(&mut self.snapshot, revision);
            if before > 0
                && let Err(error) = self.client.compact(before).await
            {
                tracing::debug!(%error, "etcd keeps what was");
            }
        }
        Ok(())
    }

    /// Does a transaction that moves the head to `then`, or leads there; gives its revision.
    async fn transact(&self, txn: &TxnRequest, then: Head) -> Result<i64, Error> {
        let answer = self.client.transact(txn, None).await?;
        self.keys.outcome(self.term, self.head, then, answer)
    }
}

/// Reads a key.
fn one(key: &[u8]) -> RangeRequest {
    RangeRequest {
        key: key.to_owned(),
        ..RangeRequest::default()
    }
}
