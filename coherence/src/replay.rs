//! What requests that were made would have cost under another home policy.
//!
//! Which node faults on which page, and when, hardly depends on where homes are; what that costs
//! does. So the requests of a run, as homes have logged them, are played through a directory whose
//! homes move as a policy says, and the messages of [the protocol](crate) are counted. No time
//! passes: what would queue, or wait for a hold, does not.
//!
//! Before the first request an extent has its home at the node that logged it, which owns all of
//! its pages. A request that a move overtakes is logged by both homes,
//! and counts once. Pages that travel unasked are not logged, nor evictions; a node that asks for what it should have has evicted it.

use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::page::Access;
use migshm_protocol::{Extent, NodeId, NodeSet, Page};
use rustc_hash::FxHashMap;

use crate::policy::{HomePolicy, Policy};

/// Bytes that a message takes on the wire, with what UDP, IP and QUIC put around it.
pub const MESSAGE_BYTES: u64 = 90;
/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;
/// Bytes of a directory's entry when it moves.
const ENTRY_BYTES: u64 = 6;

/// A request, as a home logged it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When; the same clock for all.
    pub time: u64,
    /// The page.
    pub page: Page,
    /// Who asked.
    pub node: NodeId,
    /// For what.
    pub access: Access,
    /// The home that was asked.
    pub home: NodeId,
}

/// What requests cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Requests.
    pub requests: u64,
    /// Of them, those whose requester was not the home.
    pub remote: u64,
    /// Messages that requesters waited for, one after the other: the length of the longest chain,
    /// of each request, added up.
    pub hops: u64,
    /// All messages between nodes, and with the coordinator.
    pub messages: u64,
    /// Of them, requests passed on by a former home.
    pub relays: u64,
    /// Pages that travelled.
    pub pages: u64,
    /// Bytes on the wire, with [`MESSAGE_BYTES`] for a message.
    pub bytes: u64,
    /// Moves of homes.
    pub moves: u64,
}

/// Plays requests under a policy. They must be in the order of time.
#[must_use]
pub fn replay(policy: Policy, events: &[Event]) -> Cost {
    let mut replay = Replay {
        policy: HomePolicy::new(policy),
        rule: policy,
        extents: FxHashMap::default(),
        cost: Cost::default(),
    };
    for event in events {
        replay.play(event);
    }
    let mut cost = replay.cost;
    cost.bytes += cost.messages * MESSAGE_BYTES + cost.pages * PAGE_BYTES;
    cost
}

struct Replay {
    policy: HomePolicy,
    rule: Policy,
    extents: FxHashMap<Extent, State>,
    cost: Cost,
}

struct State {
    home: NodeId,
    /// Where homes have moved to, from each node.
    moved_to: FxHashMap<NodeId, NodeId>,
    /// Where nodes believe that the home is, unless it is where it was in the beginning.
    believed: FxHashMap<NodeId, NodeId>,
    first_home: NodeId,
    /// Who owned the pages in the beginning.
    first_owner: NodeId,
    /// Pages that have been asked for, by their index in the extent.
    pages: FxHashMap<u32, Copies>,
}

/// Who has a page.
#[derive(Clone, Copy)]
struct Copies {
    owner: NodeId,
    /// The owner included; empty if it has the page exclusively.
    sharers: NodeSet,
    /// The request before: who asked for what, and which home.
    last: Option<(NodeId, Access, NodeId)>,
}

impl Replay {
    fn play(&mut self, event: &Event) {
        let extent = event.page.extent();
        let is_first = !self.extents.contains_key(&extent);
        let state = self.extents.entry(extent);
        let state = state.or_insert_with(|| State::new(event.home));
        if self.rule == Policy::FirstTouch && is_first {
            // As if the home had been given out now.
            state.home = event.node;
            state.first_home = event.node;
        }
        if state.is_logged(event) {
            return;
        }
        self.cost.requests += 1;
        state.serve(event, &mut self.cost);
        let to = self.policy.record(extent, event.node);
        if let Some(to) = to.filter(|to| *to != state.home) {
            self.policy.forget(extent);
            state.move_home(to, &mut self.cost);
        }
    }
}

impl State {
    fn new(home: NodeId) -> Self {
        Self {
            home,
            moved_to: FxHashMap::default(),
            believed: FxHashMap::default(),
            first_home: home,
            first_owner: home,
            pages: FxHashMap::default(),
        }
    }

    /// Whether another home has logged this very request.
    fn is_logged(&mut self, event: &Event) -> bool {
        let copies = self.copies(event.page);
        let this = (event.node, event.access, event.home);
        let last = copies.last.replace(this);
        last.is_some_and(|(node, access, home)| {
            (node, access) == (event.node, event.access) && home != event.home
        })
    }

    fn serve(&mut self, event: &Event, cost: &mut Cost) {
        let (requester, home) = (event.node, self.home);
        let mut hops = self.find_home(requester);
        cost.relays += hops.saturating_sub(1);
        cost.remote += u64::from(hops > 0);
        let copies = self.copies(event.page);
        let is_exclusive = copies.sharers.is_empty();
        if copies.owner == requester && (is_exclusive || event.access == Access::Read) {
            // It has written the page back: the home is the owner.
            copies.owner = home;
            copies.sharers = copies.sharers.without(requester);
        }
        let Copies {
            owner,
            sharers,
            last,
        } = *copies;
        let has_copy = sharers.contains(requester);
        let holders = sharers.with(owner);
        let (in_place, victims) = match event.access {
            Access::Read => (false, NodeSet::default()),
            Access::Write if has_copy => (true, holders.without(requester)),
            Access::Write => (false, holders.without(requester).without(owner)),
        };
        // Who sends the grant: the home if what the requester has will do.
        let giver = if in_place { home } else { owner };
        let forward = u64::from(giver != home);
        let grant = u64::from(giver != requester);
        // Each is told, and tells the requester.
        let told = victims.without(home).len() as u64;
        let confirmed = giver != home || told > 0;
        let done = u64::from(confirmed && requester != home);
        let messages = hops + forward + grant + 2 * told + done;
        hops += (forward + grant).max(2 * u64::from(told > 0));
        cost.pages += u64::from(!in_place && giver != requester);
        cost.messages += messages;
        cost.hops += hops;
        *copies = match event.access {
            Access::Read => Copies {
                owner,
                sharers: holders.with(requester),
                last,
            },
            Access::Write => Copies {
                owner: requester,
                sharers: NodeSet::default(),
                last,
            },
        };
        self.believed.insert(requester, home);
    }

    fn copies(&mut self, page: Page) -> &mut Copies {
        let owned = Copies {
            owner: self.first_owner,
            sharers: NodeSet::default(),
            last: None,
        };
        let slot = page.index % EXTENT_PAGES;
        self.pages.entry(slot).or_insert(owned)
    }

    /// How many messages a request takes until it is at the home.
    fn find_home(&self, requester: NodeId) -> u64 {
        if requester == self.home {
            return 0;
        }
        let mut at = *self.believed.get(&requester).unwrap_or(&self.first_home);
        let mut messages = u64::from(at != requester);
        while at != self.home {
            at = *self.moved_to.get(&at).unwrap_or(&self.home);
            messages += 1;
        }
        messages
    }

    fn move_home(&mut self, to: NodeId, cost: &mut Cost) {
        // All pages that nobody has asked for are still where they were.
        let mut holders = NodeSet::default().with(self.first_owner);
        for page in self.pages.values() {
            holders.insert_all(&page.sharers.with(page.owner));
        }
        // The fence and its answers; the directory; ProposeHome, MoveHome, HomeMoved.
        let fenced = holders.without(self.home).len() as u64;
        cost.messages += 2 * fenced + 1 + 3;
        cost.bytes += ENTRY_BYTES * u64::from(EXTENT_PAGES);
        cost.moves += 1;
        self.moved_to.insert(self.home, to);
        self.believed.insert(self.home, to);
        self.believed.insert(to, to);
        self.home = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migshm_protocol::SegmentId;

    fn event(node: u16, index: u32, access: Access) -> Event {
        Event {
            time: 0,
            page: Page {
                segment: SegmentId(1),
                index,
            },
            node: NodeId(node),
            access,
            home: NodeId(0),
        }
    }

    fn cost(policy: Policy, events: &[(u16, u32, Access)]) -> Cost {
        let events: Vec<Event> = events.iter().map(|&(n, p, a)| event(n, p, a)).collect();
        replay(policy, &events)
    }

    use Access::{Read, Write};

    /// The sequences in the documentation of [`crate`].
    #[test]
    fn messages_are_those_of_the_protocol() {
        let of = |events: &[(u16, u32, Access)]| {
            let Cost {
                hops,
                messages,
                pages,
                ..
            } = cost(Policy::Stay, events);
            (hops, messages, pages)
        };
        assert_eq!(of(&[(1, 0, Read)]), (2, 2, 1));
        // From a third node: Request, Forward, Grant, Done.
        assert_eq!(of(&[(1, 0, Write), (2, 0, Read)]), (2 + 3, 2 + 4, 2));
        // In place: Request, Invalidate and its answer, Grant, Done; the home drops its own copy.
        let shared = [(1, 0, Read), (2, 0, Read)];
        assert_eq!(of(&shared), (4, 4, 2));
        let upgraded = [shared[0], shared[1], (2, 0, Write)];
        assert_eq!(of(&upgraded), (4 + 3, 4 + 5, 2));
        // By the home: Forward, Grant.
        assert_eq!(of(&[(1, 0, Write), (0, 0, Read)]), (2 + 2, 2 + 2, 2));
    }

    #[test]
    fn a_home_with_its_user_saves_messages() {
        // Node 2 works on what node 1 writes; the first home has nothing to do with it.
        let turn = |n: u32| [(1, n % 50, Write), (2, n % 50, Read), (2, n % 50, Write)];
        let events: Vec<_> = (0..1_000).flat_map(turn).collect();
        let stay = cost(Policy::Stay, &events);
        let lead = cost(Policy::Lead(32), &events);
        assert_eq!(lead.moves, 1);
        assert!(lead.messages < stay.messages, "{lead:?} {stay:?}");
        assert!(lead.hops < stay.hops, "{lead:?} {stay:?}");
        assert_eq!(lead.pages, stay.pages);
        assert_eq!((lead.requests, stay.requests), (3_000, 3_000));
        let follow = cost(Policy::Follow, &events);
        assert!(follow.messages > stay.messages && follow.moves > 1_000);
    }

    #[test]
    fn a_former_home_relays_once_to_each_node() {
        let mut events = vec![(1, 0, Write); 1];
        events.extend((0..200).map(|n| (2, n, Write)));
        events.extend([(1, 3, Write), (1, 4, Write)]);
        let cost = cost(Policy::Lead(100), &events);
        assert_eq!((cost.moves, cost.relays), (1, 1));
    }
}
