//! Tools' questions to nodes, passed on: what a node has counted of the accesses to a segment.
//!
//! They go through here because only the coordinator knows who may read the segment.

use migshm_protocol::call::{Answer, Errno};
use migshm_protocol::control::FromCoordinator;
use migshm_protocol::limits::MAX_LOCAL;
use migshm_protocol::{NodeId, SegmentId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::processes::{Awaited, CallKey, Wake};
use crate::{Context, Output, Request};

/// Longest part that still fits a message to a process.
const MAX_PART: usize = MAX_LOCAL - 1024;

/// Questions that have not been answered.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Accounts {
    asked: BTreeMap<u64, (NodeId, CallKey)>,
    last: u64,
}

impl Accounts {
    /// Asks a node on behalf of a call, which is blocked until the node answers; ENOENT if it is no
    /// member.
    pub(crate) fn ask(
        &mut self,
        request: &Request<'_>,
        node: NodeId,
        segment: SegmentId,
        from: u64,
        requests: bool,
        cx: &mut Context<'_>,
    ) -> Result<(), Errno> {
        if !cx.members.contains(node) {
            return Err(Errno::ENOENT);
        }
        self.last += 1;
        let number = self.last;
        self.asked.insert(number, (node, request.call));
        cx.block(request, Awaited::Account(number));
        let question = FromCoordinator::Account {
            number,
            segment,
            from,
            requests,
        };
        cx.out.push(Output::new(node, question));
        Ok(())
    }

    /// A node answers. Nobody may wait for it any more.
    pub(crate) fn answered(
        &mut self,
        node: NodeId,
        number: u64,
        part: &[u8],
        cx: &mut Context<'_>,
    ) {
        if self.asked.get(&number).is_none_or(|(of, _)| *of != node) {
            return;
        }
        let Some((_, call)) = self.asked.remove(&number) else {
            return;
        };
        let wake = match u32::try_from(part.len()) {
            Ok(length) if part.len() <= MAX_PART => Wake {
                call,
                outcome: Ok(Answer::Accesses(length)),
                raw: part.to_vec(),
            },
            _ => Wake::failed(call, Errno::EIO),
        };
        cx.wake([wake]);
    }

    /// The call does not wait any longer.
    pub(crate) fn cancel(&mut self, number: u64) {
        self.asked.remove(&number);
    }

    /// A node has left: what was asked of it has no answer.
    pub(crate) fn lose(&mut self, node: NodeId, cx: &mut Context<'_>) {
        let mut wakes = Vec::new();
        self.asked.retain(|_, (of, call)| {
            if *of == node {
                wakes.push(Wake::failed(*call, Errno::EIO));
            }
            *of != node
        });
        cx.wake(wakes);
    }
}
