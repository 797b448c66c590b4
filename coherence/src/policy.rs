//! Where the home of an extent should be: with the node that uses it most.
//!
//! A request costs its home a message, and a requester that is not the home one more hop. So a
//! home that is asked for an extent almost only by one other node should be there. What the home
//! itself uses of the extent it mostly uses unseen (it does not fault on what it holds), so its own
//! faults count against a move. The move itself is [`crate::Input::MoveHome`].
//!
//! [`Policy`] names the rules that there are; [`crate::replay`] compares them on what programs did.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

use migshm_protocol::{Extent, NodeId};
use rustc_hash::FxHashMap;

/// A rule that says when a home moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// Never.
    Stay,
    /// Never; the home is where the first request came from, once the log begins.
    FirstTouch,
    /// To every node that asks.
    Follow,
    /// To a node that made `dominant` of `requests` requests, twice in a row.
    Window {
        /// Requests that are looked at together.
        requests: u16,
        /// Of them, how many one node must have made.
        dominant: u16,
    },
    /// To a node that has made `lead` requests more than all others together, since the last time
    /// that another was ahead.
    Lead(u16),
}

impl Default for Policy {
    /// A lead of 32: see `docs/coherence.md`.
    fn default() -> Self {
        Self::Lead(32)
    }
}

/// Counts requests for the extents at home here.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HomePolicy {
    rule: Policy,
    extents: FxHashMap<Extent, Tally>,
}

/// What a rule remembers of an extent.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Tally {
    /// Of [`Policy::Window`].
    Window(Window),
    /// Of [`Policy::Lead`]: who is ahead, and by how many requests.
    Ahead(NodeId, u16),
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Window {
    requests: u16,
    by: FxHashMap<NodeId, u16>,
    /// Who dominated the window before.
    last: Option<NodeId>,
}

impl HomePolicy {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(rule: Policy) -> Self {
        Self {
            rule,
            extents: FxHashMap::default(),
        }
    }

    /// A node asked this one, the home, for a page of an extent. Returns that node if the home
    /// should move there.
    pub fn record(&mut self, extent: Extent, requester: NodeId) -> Option<NodeId> {
        match self.rule {
            Policy::Stay | Policy::FirstTouch => None,
            Policy::Follow => Some(requester),
            Policy::Window { requests, dominant } => {
                let tally = self.extents.entry(extent);
                let tally = tally.or_insert_with(|| Tally::Window(Window::default()));
                let Tally::Window(window) = tally else {
                    return None;
                };
                window.record(requester, requests, dominant)
            }
            Policy::Lead(lead) => {
                let tally = self.extents.entry(extent);
                let Tally::Ahead(node, ahead) = tally.or_insert(Tally::Ahead(requester, 0)) else {
                    return None;
                };
                if *node == requester {
                    *ahead = ahead.saturating_add(1);
                } else if *ahead == 0 {
                    (*node, *ahead) = (requester, 1);
                } else {
                    *ahead -= 1;
                }
                (*ahead >= lead).then(|| {
                    *ahead = lead;
                    *node
                })
            }
        }
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

impl Window {
    fn record(&mut self, requester: NodeId, requests: u16, dominant: u16) -> Option<NodeId> {
        self.requests += 1;
        *self.by.entry(requester).or_default() += 1;
        if self.requests < requests {
            return None;
        }
        let found = self.by.iter().find(|(_, count)| **count >= dominant);
        let found = found.map(|(node, _)| *node);
        let last = self.last;
        *self = Window {
            last: found,
            ..Window::default()
        };
        found.filter(|_| found == last)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stay => write!(f, "stay"),
            Self::FirstTouch => write!(f, "first-touch"),
            Self::Follow => write!(f, "follow"),
            Self::Window { requests, dominant } => write!(f, "window,{requests},{dominant}"),
            Self::Lead(lead) => write!(f, "lead,{lead}"),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    /// `stay`, `first-touch`, `follow`, `window,REQUESTS,DOMINANT` or `lead,REQUESTS`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let numbers: Result<Vec<u16>, _> = parts.map(str::parse).collect();
        let numbers = numbers.map_err(|error| format!("{text}: {error}"))?;
        match (name, &numbers[..]) {
            ("stay", []) => Ok(Self::Stay),
            ("first-touch", []) => Ok(Self::FirstTouch),
            ("follow", []) => Ok(Self::Follow),
            ("window", []) => Ok(Self::Window {
                requests: 64,
                dominant: 48,
            }),
            ("window", &[requests, dominant]) if 0 < dominant && dominant <= requests => {
                Ok(Self::Window { requests, dominant })
            }
            ("lead", &[lead]) if lead > 0 => Ok(Self::Lead(lead)),
            _ => Err(format!(
                "{text} is none of stay, first-touch, follow, window,REQUESTS,DOMINANT, lead,REQUESTS"
            )),
        }
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
    const WINDOW: Policy = Policy::Window {
        requests: 64,
        dominant: 48,
    };

    fn first_move(rule: Policy, requesters: impl Iterator<Item = u16>) -> Option<(usize, NodeId)> {
        let mut policy = HomePolicy::new(rule);
        requesters
            .enumerate()
            .find_map(|(at, node)| Some((at, policy.record(EXTENT, NodeId(node))?)))
    }

    #[test]
    fn a_home_follows_its_only_user_after_two_windows() {
        let moved = first_move(WINDOW, std::iter::repeat_n(2, 1000));
        assert_eq!(moved, Some((127, NodeId(2))));
        let moved = first_move(Policy::Lead(32), std::iter::repeat_n(2, 1000));
        assert_eq!(moved, Some((31, NodeId(2))));
    }

    #[test]
    fn a_home_stays_between_two_users() {
        for rule in [WINDOW, Policy::Lead(32), Policy::Stay] {
            assert_eq!(first_move(rule, (0..10_000).map(|n| n % 2)), None);
        }
    }

    #[test]
    fn a_home_does_not_follow_a_phase() {
        let phases = (0..10_000).map(|n| n / 64 % 2);
        assert_eq!(first_move(WINDOW, phases), None);
        let phases = (0..10_000).map(|n| n / 31 % 2);
        assert_eq!(first_move(Policy::Lead(32), phases), None);
    }

    #[test]
    fn a_lead_is_lost_to_others() {
        let many = (0..10_000).map(|n| if n % 3 == 0 { 1 } else { 2 + n % 5 });
        assert_eq!(first_move(Policy::Lead(32), many), None);
        let mostly_one = (0..10_000).map(|n| if n % 4 == 0 { 1 } else { 2 });
        let moved = first_move(Policy::Lead(32), mostly_one);
        assert_eq!(moved.map(|(_, node)| node), Some(NodeId(2)));
    }

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in ["stay", "first-touch", "follow", "window,64,48", "lead,32"] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "window,1",
            "window,4,5",
            "window,4,0",
            "lead",
            "lead,0",
            "stay,1",
            "lead,x",
        ] {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }
}
