//! Who belongs to the cluster, and what memory is promised on whom.
//!
//! A slot outlives the membership that used it, so that a daemon that comes back under its name
//! gets its number back; a newcomer takes a slot that nobody has had for as long as there is one.
//! The epoch, never the slot, tells one membership from another.

use migshm_protocol::control::Member;
use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::{NodeId, NodeSet};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Longest name of a node, in bytes: a list of [`MAX_NODES`] members must fit a message.
const MAX_NAME: usize = 192;

/// Why a node cannot be a member.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// A member has this name already.
    #[error("a node named {0:?} is a member already")]
    NameTaken(String),
    /// The name is empty, or too long.
    #[error("a node's name has 1 to {MAX_NAME} bytes")]
    BadName,
    /// All [`MAX_NODES`] slots are in use.
    #[error("the cluster is full: it has {MAX_NODES} nodes")]
    Full,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Members {
    slots: Vec<Slot>,
    epoch: u64,
    /// The epoch at which a member left last.
    view: u64,
    /// Members that other members' messages from before that may still reach.
    unflushed: NodeSet,
}

#[derive(Debug, Serialize, Deserialize)]
struct Slot {
    name: String,
    membership: Option<Membership>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Membership {
    address: SocketAddr,
    epoch: u64,
    memory: u64,
    /// Bytes of `memory` that are promised to segments.
    reserved: u64,
}

impl Members {
    pub(crate) fn join(
        &mut self,
        name: String,
        address: SocketAddr,
        memory: u64,
    ) -> Result<(NodeId, u64), JoinError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(JoinError::BadName);
        }
        let slot = match self.slots.iter().position(|slot| slot.name == name) {
            Some(slot) if self.slots[slot].membership.is_some() => {
                return Err(JoinError::NameTaken(name));
            }
            Some(slot) => slot,
            None if self.slots.len() < MAX_NODES => self.slots.len(),
            None => self
                .slots
                .iter()
                .position(|slot| slot.membership.is_none())
                .ok_or(JoinError::Full)?,
        };
        self.epoch += 1;
        let membership = Some(Membership {
            address,
            epoch: self.epoch,
            memory,
            reserved: 0,
        });
        let joined = Slot { name, membership };
        if slot == self.slots.len() {
            self.slots.push(joined);
        } else {
            self.slots[slot] = joined;
        }
        Ok((node_id(slot), self.epoch))
    }

    /// Begins a view without the node; false if it is no member.
    pub(crate) fn leave(&mut self, node: NodeId) -> bool {
        let slot = self.slots.get_mut(usize::from(node.0));
        if slot.and_then(|slot| slot.membership.take()).is_none() {
            return false;
        }
        self.epoch += 1;
        self.view = self.epoch;
        self.unflushed = self.nodes().collect();
        true
    }

    /// Number of the view, which began when a member left last; 0 if none ever has.
    pub(crate) fn view(&self) -> u64 {
        self.view
    }

    /// Nothing that was sent to the member in an earlier view can reach it any more.
    pub(crate) fn flushed(&mut self, node: NodeId, view: u64) {
        if view == self.view {
            self.unflushed.remove(node);
        }
    }

    /// Whether that holds for all members: what they have said of homes is all that there is.
    pub(crate) fn is_flushed(&self) -> bool {
        self.unflushed.is_empty()
    }

    pub(crate) fn contains(&self, node: NodeId) -> bool {
        self.membership(node).is_some()
    }

    /// The epoch of a member.
    pub(crate) fn epoch(&self, node: NodeId) -> Option<u64> {
        self.membership(node).map(|m| m.epoch)
    }

    pub(crate) fn list(&self) -> Vec<Member> {
        let member = |(slot, Slot { name, membership }): (usize, &Slot)| {
            let &Membership {
                address,
                epoch,
                memory,
                ..
            } = membership.as_ref()?;
            Some(Member {
                node: node_id(slot),
                name: name.clone(),
                address,
                epoch,
                memory,
            })
        };
        self.slots.iter().enumerate().filter_map(member).collect()
    }

    /// The slots of all members.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| slot.membership.is_some())
            .map(|(slot, _)| node_id(slot))
    }

    /// Bytes that all members together give.
    pub(crate) fn total_memory(&self) -> u64 {
        self.slots
            .iter()
            .filter_map(|slot| slot.membership.as_ref())
            .fold(0, |sum, m| sum.saturating_add(m.memory))
    }

    /// Whether the node can be promised `bytes` more: a quarter of its budget is kept free for
    /// copies of other nodes' pages.
    pub(crate) fn has_room(&self, node: NodeId, bytes: u64) -> bool {
        self.membership(node).is_some_and(|m| bytes <= m.room())
    }

    /// The member that has the most room, if that is enough for `bytes`.
    pub(crate) fn roomiest(&self, bytes: u64) -> Option<NodeId> {
        let room = |slot: usize| self.slots[slot].membership.as_ref().map(Membership::room);
        let slot = (0..self.slots.len()).rev().max_by_key(|&slot| room(slot))?;
        (room(slot)? >= bytes).then(|| node_id(slot))
    }

    /// The member but this one that has the most room, if that is enough for `bytes`.
    pub(crate) fn roomiest_but(&self, but: NodeId, bytes: u64) -> Option<NodeId> {
        let others = self.nodes().filter(|&node| node != but);
        let room = |node: &NodeId| self.membership(*node).map(Membership::room);
        let roomiest = others.max_by_key(|node| (room(node), std::cmp::Reverse(*node)))?;
        (room(&roomiest)? >= bytes).then_some(roomiest)
    }

    pub(crate) fn reserve(&mut self, node: NodeId, bytes: u64) {
        if let Some(m) = self.membership_mut(node) {
            m.reserved = m.reserved.saturating_add(bytes);
        }
    }

    pub(crate) fn release(&mut self, node: NodeId, bytes: u64) {
        if let Some(m) = self.membership_mut(node) {
            m.reserved = m.reserved.saturating_sub(bytes);
        }
    }

    fn membership(&self, node: NodeId) -> Option<&Membership> {
        self.slots.get(usize::from(node.0))?.membership.as_ref()
    }

    fn membership_mut(&mut self, node: NodeId) -> Option<&mut Membership> {
        self.slots.get_mut(usize::from(node.0))?.membership.as_mut()
    }
}

impl Membership {
    fn room(&self) -> u64 {
        (self.memory - self.memory / 4).saturating_sub(self.reserved)
    }
}

fn node_id(slot: usize) -> NodeId {
    NodeId(u16::try_from(slot).expect("below MAX_NODES"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use migshm_protocol::codec;
    use migshm_protocol::control::FromCoordinator;
    use migshm_protocol::limits::MAX_REMOTE;

    #[test]
    fn the_list_of_a_full_cluster_fits_a_message() {
        let mut members = Members::default();
        let address = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        for n in 0..MAX_NODES {
            let name = format!("{n:0>MAX_NAME$}");
            members
                .join(name, address.parse().unwrap(), u64::MAX)
                .unwrap();
        }
        members.epoch = u64::MAX;
        let mut frame = Vec::new();
        let members = members.list();
        let message = FromCoordinator::Members { members, view: 1 };
        codec::encode_frame(&message, &[], &mut frame).unwrap();
        let (_, body) = frame.split_at(codec::FRAME_HEADER);
        assert!(body.len() + 8 * MAX_NODES <= MAX_REMOTE);
        codec::decode::<FromCoordinator>(body).unwrap();
    }
}
