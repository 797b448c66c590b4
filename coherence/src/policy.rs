//! Where the home of an extent should be: with the node that uses it most.
//!
//! A request costs its home a message, and a requester that is not the home one more hop. So a
//! home that is asked for an extent almost only by one other node should be there. Two windows of
//! requests in a row have to say so, or homes would follow every phase of a program; and what the
//! home itself uses of the extent it mostly uses unseen (it does not fault on what it holds), so
//! its own faults count against a move. The move itself is [`crate::Input::MoveHome`].

use migshm_protocol::{Extent, NodeId};
use rustc_hash::FxHashMap;

/// Requests that are looked at together.
const WINDOW: u32 = 64;
/// Of them, how many one node must have made.
const DOMINANT: u32 = 48;

/// Counts requests for the extents at home here.
#[derive(Clone, Debug, Default)]
pub struct HomePolicy {
    extents: FxHashMap<Extent, Window>,
}

#[derive(Clone, Debug, Default)]
struct Window {
    requests: u32,
    by: FxHashMap<NodeId, u32>,
    /// Who dominated the window before.
    last: Option<NodeId>,
}

impl HomePolicy {
    /// A node asked this one, the home, for a page of an extent. Returns that node if the home
    /// should move there.
    pub fn record(&mut self, extent: Extent, requester: NodeId) -> Option<NodeId> {
        let window = self.extents.entry(extent).or_default();
        window.requests += 1;
        *window.by.entry(requester).or_default() += 1;
        if window.requests < WINDOW {
            return None;
        }
        let dominant = window.by.iter().find(|(_, count)| **count >= DOMINANT);
        let dominant = dominant.map(|(node, _)| *node);
        let last = window.last;
        *window = Window {
            last: dominant,
            ..Window::default()
        };
        dominant.filter(|_| dominant == last)
    }

    /// Forgets an extent that is no longer at home here.
    pub fn forget(&mut self, extent: Extent) {
        self.extents.remove(&extent);
    }

    /// Forgets all but those extents.
    pub fn retain(&mut self, keep: impl Fn(Extent) -> bool) {
        self.extents.retain(|extent, _| keep(*extent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migshm_protocol::SegmentId;

    const EXTENT: Extent = Extent {
        segment: SegmentId(1),
        index: 0,
    };

    fn first_move(requesters: impl Iterator<Item = u16>) -> Option<(usize, NodeId)> {
        let mut policy = HomePolicy::default();
        requesters
            .enumerate()
            .find_map(|(at, node)| Some((at, policy.record(EXTENT, NodeId(node))?)))
    }

    #[test]
    fn a_home_follows_its_only_user_after_two_windows() {
        let moved = first_move(std::iter::repeat_n(2, 1000));
        assert_eq!(moved, Some((2 * WINDOW as usize - 1, NodeId(2))));
    }

    #[test]
    fn a_home_stays_between_two_users() {
        assert_eq!(first_move((0..10_000).map(|n| n % 2)), None);
    }

    #[test]
    fn a_home_does_not_follow_a_phase() {
        let phases = (0..10_000).map(|n| u16::from((n / WINDOW).is_multiple_of(2)));
        assert_eq!(first_move(phases), None);
    }
}
