//! What the daemon tells of itself (`migshm status`).

use serde_json::{Value, json};

use crate::daemon::{Coordinator, Node};

impl Node {
    /// Members, counts and counters.
    pub(crate) fn status(&self) -> Value {
        let coordinator = match &self.coordinator {
            Coordinator::Embedded(_) => "embedded",
            Coordinator::Remote(remote) if remote.link().is_none() => "waiting",
            Coordinator::Remote(_) => "connected",
            Coordinator::Lost => "lost",
        };
        let (segments, address_spaces) = self.memory.counts();
        let members: Vec<Value> = self
            .members
            .iter()
            .map(|m| {
                json!({
                    "name": m.name,
                    "node": m.node.0,
                    "address": m.address.to_string(),
                    "memory": m.memory,
                    "linked": m.node == self.id || self.peers.get(&m.node).is_some_and(|p| p.link.is_some()),
                })
            })
            .collect();
        json!({
            "name": self.name,
            "node": self.id.0,
            "epoch": self.epoch,
            "coordinator": coordinator,
            "members": members,
            "memory": self.budget,
            "resident": self.memory.resident(),
            "segments": segments,
            "processes": self.processes.len(),
            "address_spaces": address_spaces,
            "connections": self.connections.len(),
            "pending_calls": self.pending.len(),
            "cached_pages": self.cached.len(),
            "replicated_pages": self.memory.replicated(),
            "tracking": self.device.is_some(),
            "upgrades": self.upgrades,
            "counters": {
                "calls": self.counters.calls,
                "faults": self.counters.faults,
                "pages_sent": self.counters.pages_sent,
                "pages_received": self.counters.pages_received,
            },
            "coherence": self.engine.counters(),
            "homes": self.engine.homes(),
            "release": self.release.counters(),
        })
    }
}
