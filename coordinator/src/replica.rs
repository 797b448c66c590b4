//! All that a coordinator knows, as a function of what has happened to it.
//!
//! A [`Replica`] is the [`Core`] and the coordinator's sides of the sessions with the members. What
//! happens is a [`Record`]; the same records in the same order give the same state, and the same messages
//! to members, wherever and whenever they are applied. So a coordinator that stores the records before it
//! sends what follows from them can be ended at any moment: another that applies them goes on where it
//! was, and sends again what a member may not have got.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;

use migshm_protocol::NodeId;
use migshm_protocol::codec::{self, CodecError};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::session::{Header, Session, Violation};
use serde::{Deserialize, Serialize};

use crate::{Core, JoinError, Output, Settings};

/// The state of a coordinator and its sessions.
#[derive(Debug, Serialize, Deserialize)]
pub struct Replica {
    cluster: u64,
    core: Core,
    members: BTreeMap<NodeId, Member>,
    /// Kept for its allocation.
    #[serde(skip)]
    out: Vec<Output>,
    /// Members for whom there is something in their sessions.
    #[serde(skip)]
    news: Vec<NodeId>,
}

/// A membership.
#[derive(Debug, Serialize, Deserialize)]
pub struct Member {
    /// The node's name.
    pub name: String,
    /// Number of the membership.
    pub epoch: u64,
    /// The coordinator's side of the session.
    pub session: Session,
}

/// Something that happens to a coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// It is told how it is to be.
    Configure {
        /// Like this.
        settings: Settings,
    },
    /// A node becomes a member.
    Join {
        /// Its name, which no member has.
        name: String,
        /// Where other nodes reach it.
        address: SocketAddr,
        /// Its memory budget in bytes.
        memory: u64,
    },
    /// A node is a member no longer.
    Leave {
        /// The node.
        node: NodeId,
    },
    /// A member has sent a frame, which follows.
    Frame {
        /// The member.
        node: NodeId,
    },
}

/// An input, and when it came, in seconds since the epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When.
    pub now: i64,
    /// What.
    pub input: Input,
}

/// What a store gives back: all that has happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// A [`Replica::snapshot`].
    pub snapshot: Vec<u8>,
    /// The records since, as [`Record::encode`] gave them.
    pub records: Vec<Vec<u8>>,
}

/// An input came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    /// A node cannot join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A frame is of no member.
    #[error("the node is no member")]
    NotAMember,
    /// A frame is none.
    #[error(transparent)]
    Malformed(#[from] CodecError),
    /// A frame does not belong there.
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// What was stored is not the state of a coordinator.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// The snapshot is none.
    #[error("its snapshot cannot be read: {0}")]
    Snapshot(CodecError),
    /// A record is none.
    #[error("record {0} cannot be read: {1}")]
    Record(usize, CodecError),
    /// A record does not fit those before it.
    #[error("record {0} does not follow from those before it: {1}")]
    Contradiction(usize, Rejected),
}

impl Replica {
    /// A cluster without members and objects. `cluster` tells it from others.
    #[must_use]
    pub fn new(cluster: u64) -> Replica {
        Replica {
            cluster,
            core: Core::new(),
            members: BTreeMap::new(),
            out: Vec::new(),
            news: Vec::new(),
        }
    }

    /// A cluster as [`Replica::new`] makes it, unlike all others.
    #[must_use]
    pub fn of_new_cluster() -> Replica {
        // What the standard library seeds its hash maps with comes from the system's random numbers.
        Replica::new(RandomState::new().build_hasher().finish())
    }

    /// What a coordinator was that stored this.
    ///
    /// # Errors
    /// [`Unreadable`]: damaged, or of another version.
    pub fn recover(stored: &Stored) -> Result<Replica, Unreadable> {
        let mut replica: Replica =
            codec::decode_stored(&stored.snapshot).map_err(Unreadable::Snapshot)?;
        for (index, bytes) in stored.records.iter().enumerate() {
            let (record, frame) =
                codec::decode::<Record>(bytes).map_err(|error| Unreadable::Record(index, error))?;
            replica
                .apply(&record, frame)
                .map_err(|rejected| Unreadable::Contradiction(index, rejected))?;
        }
        Ok(replica)
    }

    /// All of it, to be stored in place of what has happened so far.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        codec::encode_stored(self).expect("plain data can be encoded")
    }

    /// Something happens. What it has the coordinator say is in the members' sessions then. False if
    /// nothing has changed that a coordinator would have to know when it comes back.
    ///
    /// # Errors
    /// [`Rejected`]: nothing has changed.
    pub fn apply(&mut self, record: &Record, frame: &[u8]) -> Result<bool, Rejected> {
        let now = record.now;
        match &record.input {
            Input::Configure { settings } => self.core.settings = settings.clone(),
            &Input::Join {
                ref name,
                address,
                memory,
            } => {
                let joined = self
                    .core
                    .join(name.clone(), address, memory, &mut self.out)?;
                self.welcome(name.clone(), joined);
            }
            Input::Leave { node } => {
                self.members.remove(node);
                self.core.leave(now, *node, &mut self.out);
            }
            &Input::Frame { node } => return self.handle(now, node, frame),
        }
        self.say();
        Ok(true)
    }

    /// As [`Core::condemned`].
    #[must_use]
    pub fn condemned(&self, silence: impl Fn(NodeId) -> u64) -> Option<NodeId> {
        self.core.condemned(silence)
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.core.settings
    }

    /// Tells the cluster from others.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The members.
    pub fn members(&self) -> impl Iterator<Item = (NodeId, &Member)> {
        self.members.iter().map(|(node, member)| (*node, member))
    }

    /// A member.
    #[must_use]
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node)
    }

    /// The session with a member.
    pub fn session(&mut self, node: NodeId) -> Option<&mut Session> {
        Some(&mut self.members.get_mut(&node)?.session)
    }

    /// Members, some of them repeatedly, in whose sessions there is more than when this was last asked.
    pub fn news(&mut self) -> std::vec::Drain<'_, NodeId> {
        self.news.drain(..)
    }

    /// See [`Core::delegated_to`].
    #[must_use]
    pub fn delegated_to(&self, node: NodeId) -> Vec<i32> {
        self.core.delegated_to(node)
    }

    fn handle(&mut self, now: i64, from: NodeId, frame: &[u8]) -> Result<bool, Rejected> {
        let member = self.members.get_mut(&from).ok_or(Rejected::NotAMember)?;
        let (header, rest) = codec::decode::<Header>(frame)?;
        if header.number == 0 {
            member.session.receive(header)?;
            return Ok(false);
        }
        let (message, raw) = codec::decode::<ToCoordinator>(rest)?;
        let is_new = member.session.receive(header)?;
        if is_new {
            // It is to hear of that, if much has come.
            self.news.push(from);
            self.core.handle(now, from, message, raw, &mut self.out);
            self.say();
        }
        Ok(is_new)
    }

    fn welcome(&mut self, name: String, (node, epoch): (NodeId, u64)) {
        let cluster = self.cluster;
        let welcome = FromCoordinator::Welcome {
            cluster,
            node,
            epoch,
        };
        let mut session = Session::default();
        session.send(&welcome, &[]).expect("a few numbers fit");
        let member = Member {
            name,
            epoch,
            session,
        };
        self.members.insert(node, member);
        self.news.push(node);
    }

    /// Adds what the core has to say to the sessions.
    fn say(&mut self) {
        for Output { to, message, raw } in self.out.drain(..) {
            let Some(member) = self.members.get_mut(&to) else {
                continue;
            };
            match member.session.send(&message, &raw) {
                Ok(()) => self.news.push(to),
                Err(error) => tracing::error!(%to, %error, "a message cannot be sent"),
            }
        }
    }
}

impl Record {
    /// As it is stored, with the frame that follows it, if any.
    #[must_use]
    pub fn encode(&self, frame: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(RECORD_ROOM + frame.len());
        codec::encode(self, frame, &mut bytes).expect("plain data can be encoded");
        bytes
    }
}

/// Room for most records without their frames.
const RECORD_ROOM: usize = 32;
