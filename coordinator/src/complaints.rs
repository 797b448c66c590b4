//! Members that cannot reach each other, though both reach the coordinator: one of them has to go, as
//! what was lost between them is not sent again.

use migshm_protocol::NodeId;
use serde::{Deserialize, Serialize};

/// A member that was heard of so much longer ago than another, in milliseconds, is the one at fault.
/// Members say something every half second.
const SILENCE: u64 = 1_000;

/// Who has said of whom that it cannot be reached.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Complaints(Vec<(NodeId, NodeId)>);

impl Complaints {
    pub(crate) fn note(&mut self, by: NodeId, about: NodeId) {
        if !self.0.contains(&(by, about)) {
            self.0.push((by, about));
        }
    }

    /// A node is a member no longer.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.0.retain(|&(by, about)| by != node && about != node);
    }

    /// Who has to go: of two members the one that was silent for longer (`silence`, in milliseconds), if
    /// that tells them apart; else the one that cannot reach more of the others; else the one that came
    /// later (`epoch`).
    pub(crate) fn judge(
        &self,
        silence: impl Fn(NodeId) -> u64,
        epoch: impl Fn(NodeId) -> u64,
    ) -> Option<NodeId> {
        let &(one, other) = self.0.first()?;
        let (quiet, other_quiet) = (silence(one), silence(other));
        if quiet.abs_diff(other_quiet) >= SILENCE {
            return Some(if quiet > other_quiet { one } else { other });
        }
        let lacks = |node: NodeId| {
            let mut others: Vec<NodeId> = self
                .0
                .iter()
                .filter_map(|&(by, about)| match node {
                    _ if by == node => Some(about),
                    _ if about == node => Some(by),
                    _ => None,
                })
                .collect();
            others.sort_unstable();
            others.dedup();
            others.len()
        };
        [one, other]
            .into_iter()
            .max_by_key(|&node| (lacks(node), epoch(node)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(pairs: &[(u16, u16)]) -> Complaints {
        let mut complaints = Complaints::default();
        for &(by, about) in pairs {
            complaints.note(NodeId(by), NodeId(about));
        }
        complaints
    }

    fn epoch(node: NodeId) -> u64 {
        node.0.into()
    }

    #[test]
    fn a_silent_member_goes_whoever_complains() {
        let silence = |node| if node == NodeId(0) { 2_800 } else { 300 };
        for pairs in [[(0, 1)], [(1, 0)]] {
            let judged = complaints(&pairs).judge(silence, epoch);
            assert_eq!(judged, Some(NodeId(0)));
        }
    }

    #[test]
    fn who_cannot_reach_most_goes_and_of_equals_the_one_that_came_last() {
        let judge = |pairs: &[(u16, u16)]| complaints(pairs).judge(|_| 0, epoch);
        assert_eq!(judge(&[]), None);
        assert_eq!(judge(&[(1, 2), (2, 1)]), Some(NodeId(2)));
        assert_eq!(judge(&[(2, 1), (1, 3)]), Some(NodeId(1)));
    }

    #[test]
    fn nobody_goes_for_one_that_has_left() {
        let mut complaints = complaints(&[(1, 2), (3, 2)]);
        complaints.forget(NodeId(2));
        assert_eq!(complaints.judge(|_| 0, epoch), None);
    }
}
