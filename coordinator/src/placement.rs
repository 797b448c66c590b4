//! Where the pages of a segment are: with the one node that uses it, or spread over homes.
//!
//! ```text
//! Unused ── first attach, fits the node ───▶ Solo(A) ── attach from B, A is asked ──▶ Arming(A)
//!    │                                          │                                        │
//!    └── does not fit ──▶ Shared(no default) ◀──┴─ A dies, its extents are orphans ──────┤
//!                                                                                        │
//!                         Shared(default A) ◀──────────────────────── A says it shares ──┘
//! ```
//!
//! A segment that one node uses runs untracked, at native speed, and stays with that node even
//! when it has detached: the data is there. Before another node may attach, the user is asked to
//! track its accesses; foreign attaches wait for its word. From then on the former user is the
//! home of every extent that has no other.
//!
//! The extents of a durable segment have homes of their own from the beginning, each with a *backup*: another node,
//! which has all that was released. It takes the home's place when that dies; and whichever dies, there is another
//! backup as soon as a member has room for it.
//!
//! Memory is promised, not measured: a Solo segment reserves its size on its node, an extent
//! with a home of its own reserves its bytes there, and a home that moves takes its reservation
//! along. `reserved` says what to give back when the segment goes.

use migshm_protocol::control::Placement;
use migshm_protocol::ids::{EXTENT_PAGES, PAGE_SIZE};
use migshm_protocol::{NodeId, NodeSet};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::members::Members;
use crate::processes::CallKey;

const EXTENT_SIZE: u64 = EXTENT_PAGES as u64 * PAGE_SIZE as u64;

/// An attach that has to wait for [`Pages::shared_by`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WaitingAttach {
    pub(crate) call: CallKey,
    pub(crate) pid: i32,
    pub(crate) may_write: bool,
}

/// When an attach may be answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    Now(Placement),
    /// When the sole user shares; `ask` it if it has not been asked before.
    Later {
        ask: Option<NodeId>,
    },
}

/// The placement of one segment's pages.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pages {
    /// In whole pages.
    bytes: u64,
    usage: Usage,
    /// Of extents that have a home of their own; `None` if it has died.
    homes: BTreeMap<u32, Option<NodeId>>,
    /// Whether the home of all other extents has died.
    default_died: bool,
    /// Of a durable segment: the backups of extents that have a home; `None` if no member has room.
    backups: Option<BTreeMap<u32, Backup>>,
    reserved: BTreeMap<NodeId, u64>,
    /// The nodes that may keep something of the segment.
    known_to: NodeSet,
}

#[derive(Debug, Serialize, Deserialize)]
enum Usage {
    Unused,
    Solo(NodeId),
    Arming {
        user: NodeId,
        waiting: Vec<WaitingAttach>,
    },
    Shared {
        default_home: Option<NodeId>,
    },
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Backup {
    node: Option<NodeId>,
    /// Whether releases have gone on before there was this one.
    is_later: bool,
}

/// What a home is to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Guarded {
    pub(crate) home: NodeId,
    pub(crate) extent: u32,
    pub(crate) backup: Option<NodeId>,
    /// Nothing was released before the home had, or was, the extent's first backup.
    pub(crate) blank: bool,
}

impl Pages {
    /// `size` in bytes, at most 2^63.
    pub(crate) fn new(size: u64, durable: bool) -> Pages {
        Pages {
            bytes: size.next_multiple_of(PAGE_SIZE as u64),
            usage: Usage::Unused,
            homes: BTreeMap::default(),
            default_died: false,
            backups: durable.then(BTreeMap::new),
            reserved: BTreeMap::new(),
            known_to: NodeSet::default(),
        }
    }

    /// A node wants to attach.
    pub(crate) fn admit(&mut self, node: NodeId, members: &mut Members) -> Admission {
        let placement = match self.usage {
            Usage::Unused if self.backups.is_some() => {
                self.usage = Usage::Shared { default_home: None };
                Placement::Shared { default_home: None }
            }
            Usage::Unused if members.has_room(node, self.bytes) => {
                self.reserve(node, self.bytes, members);
                self.usage = Usage::Solo(node);
                Placement::Solo
            }
            Usage::Unused => {
                self.usage = Usage::Shared { default_home: None };
                Placement::Shared { default_home: None }
            }
            Usage::Solo(user) if user == node => Placement::Solo,
            Usage::Solo(user) => {
                self.usage = Usage::Arming {
                    user,
                    waiting: Vec::new(),
                };
                return Admission::Later { ask: Some(user) };
            }
            // It knows already that it has to share: the question travels ahead of this answer.
            Usage::Arming { user, .. } if user == node => Placement::Shared {
                default_home: Some(user),
            },
            Usage::Arming { .. } => return Admission::Later { ask: None },
            Usage::Shared { default_home } => Placement::Shared { default_home },
        };
        self.known_to.insert(node);
        Admission::Now(placement)
    }

    /// Queues an attach that [`Pages::admit`] answered with `Later`.
    pub(crate) fn wait(&mut self, attach: WaitingAttach) {
        if let Usage::Arming { waiting, .. } = &mut self.usage {
            waiting.push(attach);
        }
    }

    /// Forgets a waiting attach.
    pub(crate) fn cancel(&mut self, call: CallKey) {
        if let Usage::Arming { waiting, .. } = &mut self.usage {
            waiting.retain(|w| w.call != call);
        }
    }

    /// The sole user tracks the segment now; `None` if it was not asked to. Otherwise the attaches
    /// that waited for it, which [`Pages::admit`] now lets in.
    pub(crate) fn shared_by(&mut self, node: NodeId) -> Option<Vec<WaitingAttach>> {
        match &mut self.usage {
            Usage::Arming { user, waiting } if *user == node => {
                let waiting = std::mem::take(waiting);
                self.usage = Usage::Shared {
                    default_home: Some(node),
                };
                Some(waiting)
            }
            _ => None,
        }
    }

    /// A node is gone: backups take the place of homes, and get backups; returns what homes are to be
    /// told.
    pub(crate) fn lose_durable(&mut self, node: NodeId, members: &mut Members) -> Vec<Guarded> {
        let Some(backups) = &mut self.backups else {
            return Vec::new();
        };
        let mut changed = Vec::new();
        for (&extent, backup) in backups {
            let is_home = self.homes.get(&extent) == Some(&Some(node));
            if is_home {
                self.homes.insert(extent, backup.node);
            }
            if is_home || backup.node == Some(node) {
                changed.push((extent, !backup.is_later));
                *backup = Backup {
                    node: None,
                    is_later: true,
                };
            }
        }
        self.reserved.remove(&node);
        let guarded = changed.into_iter();
        guarded
            .filter_map(|(extent, blank)| self.guard(extent, blank, members))
            .collect()
    }

    /// Homes that have no backup get one, if a member has room for it; returns what they are to be
    /// told.
    pub(crate) fn guard_all(&mut self, members: &mut Members) -> Vec<Guarded> {
        let backups = self.backups.iter().flatten();
        let without = backups.filter(|(_, backup)| backup.node.is_none());
        let without: Vec<u32> = without.map(|(&extent, _)| extent).collect();
        let guarded = without.into_iter();
        guarded
            .filter_map(|extent| self.guard(extent, false, members))
            .filter(|guarded| guarded.backup.is_some())
            .collect()
    }

    /// The home of an extent gets a backup, if a member has room for it; returns what it is to be told.
    /// `blank`: the home has never been without one, or has been the first backup.
    fn guard(&mut self, extent: u32, blank: bool, members: &mut Members) -> Option<Guarded> {
        let home = self.home(extent)?;
        let bytes = self.extent_bytes(extent)?;
        let backup = self.backups.as_mut()?.entry(extent).or_default();
        backup.node = members.roomiest_but(home, bytes);
        backup.is_later |= backup.node.is_none();
        let node = backup.node;
        if let Some(node) = node {
            self.known_to.insert(node);
            self.reserve(node, bytes, members);
        }
        Some(Guarded {
            home,
            extent,
            backup: node,
            blank,
        })
    }

    /// A node is gone, with what it held; returns the attaches that waited for it.
    pub(crate) fn lose(&mut self, node: NodeId) -> Vec<WaitingAttach> {
        for home in self.homes.values_mut() {
            home.take_if(|home| *home == node);
        }
        self.reserved.remove(&node);
        self.known_to.remove(node);
        if self.default_home() != Some(node) {
            return Vec::new();
        }
        self.default_died = true;
        match std::mem::replace(&mut self.usage, Usage::Shared { default_home: None }) {
            Usage::Arming { waiting, .. } => waiting,
            _ => Vec::new(),
        }
    }

    /// A node is to be told of the segment's end; returns the home of extents without one.
    pub(crate) fn introduce(&mut self, node: NodeId) -> Option<NodeId> {
        self.known_to.insert(node);
        self.default_home()
    }

    /// The home of an extent; assigns one if need be. `None` if nobody has room for it, or if
    /// `asker` has nothing to do with the segment, or if there is no such extent. Also whether it
    /// takes the place of one that has died.
    pub(crate) fn find_home(
        &mut self,
        extent: u32,
        asker: NodeId,
        members: &mut Members,
    ) -> Option<(NodeId, bool)> {
        let bytes = self.extent_bytes(extent)?;
        if !self.is_known_to(asker) {
            return None;
        }
        if let Some(home) = self.home(extent) {
            return Some((home, false));
        }
        let orphaned = self.is_orphan(extent);
        let home = if members.has_room(asker, bytes) {
            asker
        } else {
            members.roomiest(bytes)?
        };
        self.settle(extent, home, bytes, members);
        Some((home, orphaned))
    }

    /// The same, of a durable segment: an extent that has died has no successor. Also what its home is
    /// to be told first.
    pub(crate) fn find_durable(
        &mut self,
        extent: u32,
        asker: NodeId,
        members: &mut Members,
    ) -> (Option<NodeId>, Option<Guarded>) {
        let is_new = !self.homes.contains_key(&extent);
        if self.is_orphan(extent) {
            return (None, None);
        }
        let home = self.find_home(extent, asker, members).map(|(home, _)| home);
        let guarded = match home {
            Some(_) if is_new => self.guard(extent, true, members),
            _ => None,
        };
        (home, guarded)
    }

    /// Whether the home of an extent has died, and has no successor.
    pub(crate) fn is_orphan(&self, extent: u32) -> bool {
        match self.homes.get(&extent) {
            Some(home) => home.is_none(),
            None => self.default_died,
        }
    }

    /// Whether the home of an extent may move from one node to another.
    pub(crate) fn may_move(
        &self,
        extent: u32,
        from: NodeId,
        to: NodeId,
        members: &Members,
    ) -> bool {
        let room = |bytes| members.has_room(to, bytes);
        self.home(extent) == Some(from)
            && self.is_known_to(to)
            && self.extent_bytes(extent).is_some_and(room)
    }

    /// An extent's home is where it says to be; false if it cannot be.
    pub(crate) fn move_home(&mut self, extent: u32, to: NodeId, members: &mut Members) -> bool {
        let Some(bytes) = self.extent_bytes(extent) else {
            return false;
        };
        if !self.is_known_to(to) {
            return false;
        }
        if let Some(from) = self.home(extent) {
            self.release(from, bytes, members);
        }
        self.settle(extent, to, bytes, members);
        true
    }

    /// The nodes but `but` that keep something of the segment.
    pub(crate) fn others(&self, but: NodeId) -> NodeSet {
        self.known_to.without(but)
    }

    /// Gives all reservations back, as the segment goes; returns the nodes to tell and the
    /// attaches that came too late.
    pub(crate) fn dissolve(mut self, members: &mut Members) -> (Vec<NodeId>, Vec<WaitingAttach>) {
        for (node, bytes) in std::mem::take(&mut self.reserved) {
            members.release(node, bytes);
        }
        let known = self.known_to.into_iter().collect();
        let waiting = match self.usage {
            Usage::Arming { waiting, .. } => waiting,
            _ => Vec::new(),
        };
        (known, waiting)
    }

    fn home(&self, extent: u32) -> Option<NodeId> {
        match self.homes.get(&extent) {
            Some(home) => *home,
            None => self.default_home(),
        }
    }

    fn default_home(&self) -> Option<NodeId> {
        match self.usage {
            Usage::Unused => None,
            Usage::Solo(node) | Usage::Arming { user: node, .. } => Some(node),
            Usage::Shared { default_home } => default_home,
        }
    }

    fn settle(&mut self, extent: u32, home: NodeId, bytes: u64, members: &mut Members) {
        self.homes.insert(extent, Some(home));
        self.known_to.insert(home);
        self.reserve(home, bytes, members);
    }

    fn reserve(&mut self, node: NodeId, bytes: u64, members: &mut Members) {
        *self.reserved.entry(node).or_default() += bytes;
        members.reserve(node, bytes);
    }

    fn release(&mut self, node: NodeId, bytes: u64, members: &mut Members) {
        let reserved = self.reserved.entry(node).or_default();
        let bytes = bytes.min(*reserved);
        *reserved -= bytes;
        members.release(node, bytes);
    }

    /// Bytes of an extent: the last one may be shorter. `None` past the end.
    fn extent_bytes(&self, extent: u32) -> Option<u64> {
        let start = u64::from(extent) * EXTENT_SIZE;
        (start < self.bytes).then(|| EXTENT_SIZE.min(self.bytes - start))
    }

    /// Whether a node may keep something of the segment.
    pub(crate) fn is_known_to(&self, node: NodeId) -> bool {
        self.known_to.contains(node)
    }
}
