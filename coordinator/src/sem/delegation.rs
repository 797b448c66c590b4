//! Which node may operate on a set by itself.
//!
//! A set that one node alone has used for a while is delegated to it, if no call waits for it.
//! The node returns it before it passes on a call that its processes could not do by themselves,
//! or when it is recalled because of a call from another node; calls that come meanwhile are
//! held back, in order. A set that was recalled too soon is delegated later the next time.

use std::collections::VecDeque;

use migshm_protocol::NodeId;
use migshm_protocol::call::{Call, Caller, Errno};
use serde::{Deserialize, Serialize};

use crate::processes::{CallKey, ProcessKey};

/// Successful calls in a row from one node before a set is delegated to it.
const PATIENCE: u32 = 2;
/// As much at most.
const PATIENCE_MAX: u32 = 256;

/// What there is to know about a set besides its state.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Delegation {
    /// The node that may operate on the set, and the number of the delegation.
    to: Option<(NodeId, u64)>,
    /// Of the last delegation.
    number: u64,
    recalled: bool,
    held: VecDeque<Held>,
    /// Who made the last calls, and how many in a row.
    streak: (NodeId, u32),
    patience: u32,
    /// Nodes that the set was ever delegated to.
    known_to: Vec<NodeId>,
}

/// What waits until the set is returned.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Held {
    /// A call.
    Call(HeldCall),
    /// The undo of a process, and the pid that it leaves.
    Undo(ProcessKey, i32),
}

/// A call that waits until the set is returned.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HeldCall {
    pub(crate) key: CallKey,
    pub(crate) caller: Caller,
    pub(crate) call: Call,
    /// What follows it.
    pub(crate) raw: Vec<u8>,
    /// What it returns if it then has to wait, once it was cancelled.
    pub(crate) cancelled: Option<Errno>,
}

impl Delegation {
    pub(crate) fn new() -> Delegation {
        Delegation {
            to: None,
            number: 0,
            recalled: false,
            held: VecDeque::new(),
            streak: (NodeId(0), 0),
            patience: PATIENCE,
            known_to: Vec::new(),
        }
    }

    pub(crate) fn to(&self) -> Option<(NodeId, u64)> {
        self.to
    }

    /// The nodes that have to be told when the set is removed.
    pub(crate) fn known_to(&self) -> &[NodeId] {
        &self.known_to
    }

    /// A call from this node has succeeded without waiting; whether it is time to delegate.
    pub(crate) fn is_due(&mut self, node: NodeId) -> bool {
        let (last, count) = self.streak;
        let count = if last == node {
            count.saturating_add(1)
        } else {
            1
        };
        self.streak = (node, count);
        count >= self.patience && self.held.is_empty()
    }

    /// A call from this node has to wait. That ends the row of another node, not one of its own:
    /// a set is in memory again as soon as nobody waits for it.
    pub(crate) fn was_contended(&mut self, node: NodeId) {
        if self.streak.0 != node {
            self.streak = (node, 0);
        }
    }

    /// Delegates; gives the delegation's number.
    pub(crate) fn delegate(&mut self, node: NodeId) -> u64 {
        self.number += 1;
        self.to = Some((node, self.number));
        self.recalled = false;
        if !self.known_to.contains(&node) {
            self.known_to.push(node);
        }
        self.number
    }

    /// Holds something back on behalf of a node. The node and number to recall the set from, if
    /// that has not been done.
    pub(crate) fn hold(&mut self, held: Held, from: NodeId) -> Option<(NodeId, u64)> {
        self.held.push_back(held);
        let (node, _) = self.to?;
        if self.recalled {
            return None;
        }
        self.recalled = true;
        if node != from {
            self.patience = (self.patience * 2).min(PATIENCE_MAX);
            self.streak.1 = 0;
        }
        self.to
    }

    /// The set is the coordinator's again; false if it was not delegated thus.
    pub(crate) fn take_back(&mut self, node: NodeId, number: u64) -> bool {
        self.to.take_if(|to| *to == (node, number)).is_some()
    }

    /// The node is gone; whether the set was delegated to it.
    pub(crate) fn forget(&mut self, node: NodeId) -> bool {
        self.known_to.retain(|&known| known != node);
        self.to.take_if(|(to, _)| *to == node).is_some()
    }

    /// What is next of all that was held back, unless the set is delegated.
    pub(crate) fn next_held(&mut self) -> Option<Held> {
        if self.to.is_some() {
            return None;
        }
        self.held.pop_front()
    }

    /// Gives up a call that is held back.
    pub(crate) fn forget_call(&mut self, call: CallKey) {
        self.held
            .retain(|held| !matches!(held, Held::Call(held) if held.key == call));
    }

    /// A call that is held back is not to wait for more than its turn.
    pub(crate) fn cancel(&mut self, call: CallKey, errno: Errno) {
        for held in &mut self.held {
            if let Held::Call(held) = held
                && held.key == call
            {
                held.cancelled = Some(errno);
            }
        }
    }
}
