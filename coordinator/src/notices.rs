//! Write notices: what nodes have not yet been told of that others wrote.
//!
//! A release (see [`migshm_protocol::control::ToCoordinator::Wrote`]) adds its pages to what every
//! other node of the segment is to be told, before the call that it is for takes effect. Every
//! answer to a node is preceded by what it has not been told: whatever it can have synchronised
//! with by that call, or by one that another of its processes makes, has released before.

use std::collections::BTreeMap;

use migshm_protocol::control::FromCoordinator;
use migshm_protocol::release::RunSet;
use migshm_protocol::{NodeId, SegmentId};
use serde::{Deserialize, Serialize};

use crate::Output;

/// What each node has not been told of.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Notices(BTreeMap<NodeId, BTreeMap<SegmentId, RunSet>>);

impl Notices {
    /// A node is to be told that these pages have changed.
    pub(crate) fn add(&mut self, node: NodeId, segment: SegmentId, first: u32, count: u32) {
        let segments = self.0.entry(node).or_default();
        segments.entry(segment).or_default().insert(first, count);
    }

    /// Forgets a node that is gone.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.0.remove(&node);
    }

    /// Puts before the answers in `out`, from `start` on, what their receivers have to know first.
    pub(crate) fn precede_answers(&mut self, out: &mut Vec<Output>, start: usize) {
        if self.0.is_empty() {
            return;
        }
        for output in out.split_off(start) {
            match &output.message {
                FromCoordinator::Answer { .. } | FromCoordinator::Delegated { .. } => {
                    let changes = self.0.remove(&output.to).unwrap_or_default();
                    out.extend(changes.into_iter().map(|(segment, pages)| {
                        let pages = pages.runs();
                        Output::new(output.to, FromCoordinator::Changed { segment, pages })
                    }));
                }
                FromCoordinator::Destroyed { segment } => {
                    if let Some(segments) = self.0.get_mut(&output.to) {
                        segments.remove(segment);
                    }
                }
                _ => {}
            }
            out.push(output);
        }
    }
}
