//! Which processes are strongly linked, which weakly, and through which segments.
//!
//! Processes that use the same pages in turns should be on one node; those that merely attach the
//! same segment, or keep to pages of their own, need not. The measure is what their being apart
//! costs: the pages that travel between them.
//!
//! A page that comes to node X for its process A, from node Y where it was last used by process B, is
//! a *transfer* from B to A. X knows A, and which node the page came from; Y knows B, and where the
//! page went ([`Traffic`]). Both keep, for each extent, which pages that were, and which came more than
//! once. So what A got from Y is shared out among the processes of Y that gave pages to X:
//!
//! - each page once: to those that gave the page;
//! - what came again: to those that gave again what A got again, in proportion to how often they gave
//!   again, and to how much of that are pages of A's.
//!
//! That is exact where one process of Y uses those pages, and leaves out those that use others.
//! Where Y does not know whose the pages were (written before the segment was shared), all processes
//! of Y that have the segment attached have an equal part in them.
//!
//! A page that travels once, to who uses it from then on, says nothing; one that comes again is used
//! in turns. So the *rate* of a link is the transfers of pages that had come before, both ways, by
//! the time for which both processes have been known (at least a second): transfers a second.
//! Processes of one node share its memory: nothing is seen between them, and their link is called
//! local.

use std::collections::BTreeMap;

use migshm_protocol::NodeId;
use migshm_protocol::accesses::{Counts, PageBits, Traffic, User};

/// Transfers a second from which on a link is strong: a transfer keeps a process waiting for some
/// 0.2 ms, so that both together lose 2 % of their time.
pub const STRONG: f64 = 100.0;

const SECOND: u64 = 1_000_000_000;

/// What one node tells of a segment.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// When: nanoseconds since the epoch.
    pub time: u64,
    /// Its processes.
    pub users: Vec<User>,
    /// Their traffic.
    pub traffic: Vec<Traffic>,
}

/// A process of the cluster: its node, and its number there.
pub type ProcessKey = (NodeId, u32);

/// How much two processes have to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub enum Strength {
    /// They use the same pages in turns.
    Strong,
    /// Both use the segment, but hardly the same pages, or seldom.
    Weak,
    /// They are on one node.
    Local,
}

/// What two processes have to do with each other through one segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// One of them.
    pub a: ProcessKey,
    /// The other.
    pub b: ProcessKey,
    /// Pages that came to `a` from `b`.
    pub to_a: f64,
    /// Pages that came to `b` from `a`.
    pub to_b: f64,
    /// Bytes, both ways.
    pub bytes: f64,
    /// Of all these pages, those that had come before.
    pub again: f64,
    /// For how long both have been known.
    pub seconds: f64,
    /// `again`, by the second.
    pub rate: f64,
    /// What that means.
    pub strength: Strength,
}

/// All links through one segment, by what its nodes tell; the strongest first. `strong` is the rate
/// from which on a link is strong.
#[must_use]
pub fn links(accounts: &BTreeMap<NodeId, Account>, strong: f64) -> Vec<Link> {
    let transfers = transfers(accounts);
    let mut processes = Vec::new();
    for (node, account) in accounts {
        processes.extend(account.users.iter().map(|user| (*node, account, user)));
    }
    let mut links = Vec::new();
    for (at, (node_a, account_a, a)) in processes.iter().enumerate() {
        for (node_b, account_b, b) in &processes[at + 1..] {
            let (key_a, key_b) = ((*node_a, a.user), (*node_b, b.user));
            let of = |to, from| transfers.get(&(to, from)).copied().unwrap_or_default();
            let (there, back) = (of(key_b, key_a), of(key_a, key_b));
            let end = |user: &User, account: &Account| user.ended.unwrap_or(account.time);
            let until = end(a, account_a).min(end(b, account_b));
            let together = until.saturating_sub(a.since.max(b.since)).max(SECOND);
            let seconds = together as f64 / SECOND as f64;
            let again = there.again + back.again;
            let rate = again / seconds;
            let strength = match () {
                () if node_a == node_b => Strength::Local,
                () if rate >= strong => Strength::Strong,
                () => Strength::Weak,
            };
            links.push(Link {
                a: key_a,
                b: key_b,
                to_a: back.pages,
                to_b: there.pages,
                bytes: there.bytes + back.bytes,
                again,
                seconds,
                rate,
                strength,
            });
        }
    }
    links.sort_by(|x, y| {
        let by_rate = y.rate.total_cmp(&x.rate);
        by_rate.then((x.a, x.b).cmp(&(y.a, y.b)))
    });
    links
}

/// What each process did to the segment, all extents and nodes together.
#[must_use]
pub fn totals(account: &Account, me: NodeId) -> BTreeMap<u32, Counts> {
    let mut totals: BTreeMap<u32, Counts> = BTreeMap::new();
    for traffic in &account.traffic {
        let total = totals.entry(traffic.user).or_default();
        let counts = traffic.counts;
        if traffic.peer == me.0 {
            total.reads += counts.reads;
            total.writes += counts.writes;
        }
        total.received += counts.received;
        total.bytes_received += counts.bytes_received;
        total.sent += counts.sent;
        total.bytes_sent += counts.bytes_sent;
    }
    totals
}

/// What came to a process from another.
#[derive(Clone, Copy, Default)]
struct Transfers {
    pages: f64,
    bytes: f64,
    again: f64,
}

/// What came to each process (the first) from each other.
fn transfers(
    accounts: &BTreeMap<NodeId, Account>,
) -> BTreeMap<(ProcessKey, ProcessKey), Transfers> {
    // By sender's node, receiver's node and extent.
    let mut given: BTreeMap<(NodeId, NodeId, u32), Vec<&Traffic>> = BTreeMap::new();
    for (node, account) in accounts {
        for traffic in account.traffic.iter().filter(|t| t.counts.sent > 0) {
            let key = (*node, NodeId(traffic.peer), traffic.extent);
            given.entry(key).or_default().push(traffic);
        }
    }
    let mut transfers = BTreeMap::new();
    for (node, account) in accounts {
        for got in account.traffic.iter().filter(|t| t.counts.received > 0) {
            let from = NodeId(got.peer);
            let Some(theirs) = accounts.get(&from) else {
                continue;
            };
            let gave = given.get(&(from, *node, got.extent));
            let gave = gave.map_or(&[][..], Vec::as_slice);
            let first = shares(gave, &theirs.users, |t| {
                common(&t.sent.once, &got.received.once)
            });
            let mut later = shares(gave, &theirs.users, |t| {
                let again = t.counts.sent as f64 - size(&t.sent.once);
                let known = size(&t.sent.again).max(1.0);
                again * common(&t.sent.again, &got.received.again) / known
            });
            if later.is_empty() {
                later.clone_from(&first);
            }
            let once = size(&got.received.once);
            let again = (got.counts.received as f64 - once).max(0.0);
            let page = got.counts.bytes_received as f64 / got.counts.received as f64;
            let mut add = |giver, pages, again| {
                let sum: &mut Transfers = transfers
                    .entry(((*node, got.user), (from, giver)))
                    .or_default();
                sum.pages += pages;
                sum.bytes += pages * page;
                sum.again += again;
            };
            for (giver, part) in first {
                add(giver, part * once, 0.0);
            }
            for (giver, part) in later {
                add(giver, part * again, part * again);
            }
        }
    }
    transfers
}

/// The processes that gave, each with its part by a weight; the parts are 1 together.
fn shares(gave: &[&Traffic], users: &[User], weight: impl Fn(&Traffic) -> f64) -> Vec<(u32, f64)> {
    let total: f64 = gave.iter().map(|t| weight(t)).sum();
    let mut shares = Vec::new();
    for giver in gave {
        let part = weight(giver) / total;
        if part.is_nan() || part == 0.0 {
            continue;
        }
        if giver.user != 0 {
            shares.push((giver.user, part));
            continue;
        }
        let attached: Vec<u32> = users
            .iter()
            .filter(|u| u.attached)
            .map(|u| u.user)
            .collect();
        let each = part / attached.len() as f64;
        shares.extend(attached.into_iter().map(|user| (user, each)));
    }
    shares
}

/// Number of pages.
fn size(pages: &PageBits) -> f64 {
    f64::from(pages.iter().map(|word| word.count_ones()).sum::<u32>())
}

/// Number of pages in both.
fn common(some: &PageBits, others: &PageBits) -> f64 {
    let words = some.iter().zip(others);
    f64::from(words.map(|(a, b)| (a & b).count_ones()).sum::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use migshm_protocol::accesses::Seen;

    const X: NodeId = NodeId(0);
    const Y: NodeId = NodeId(1);

    fn user(user: u32) -> User {
        User {
            user,
            pid: 100 + user as i32,
            command: String::new(),
            attached: true,
            since: 0,
            ended: None,
        }
    }

    fn traffic(user: u32, peer: NodeId, pages: &[u32], received: u64, sent: u64) -> Traffic {
        let mut bits = [0; 8];
        for page in pages {
            bits[*page as usize / 64] |= 1 << (page % 64);
        }
        let seen = |times| match times {
            0 => Seen::default(),
            _ => Seen {
                once: bits,
                again: if times > pages.len() as u64 {
                    bits
                } else {
                    [0; 8]
                },
            },
        };
        Traffic {
            user,
            extent: 0,
            peer: peer.0,
            counts: Counts {
                received,
                bytes_received: received * 4096,
                sent,
                bytes_sent: sent * 4096,
                ..Counts::default()
            },
            received: seen(received),
            sent: seen(sent),
        }
    }

    fn account(users: &[u32], traffic: Vec<Traffic>) -> Account {
        Account {
            time: 10 * SECOND,
            users: users.iter().map(|n| user(*n)).collect(),
            traffic,
        }
    }

    fn find(links: &[Link], a: ProcessKey, b: ProcessKey) -> Link {
        *links.iter().find(|l| (l.a, l.b) == (a, b)).unwrap()
    }

    #[test]
    fn processes_that_use_the_same_pages_in_turns_are_strongly_linked() {
        let x = vec![traffic(1, Y, &[5], 900, 900), traffic(2, Y, &[6, 7], 2, 0)];
        let y = vec![traffic(1, X, &[5], 900, 900), traffic(2, X, &[6, 7], 0, 2)];
        let accounts = BTreeMap::from([(X, account(&[1, 2], x)), (Y, account(&[1, 2], y))]);
        let links = links(&accounts, STRONG);
        let strong = find(&links, (X, 1), (Y, 1));
        assert_eq!((strong.to_a, strong.to_b), (900.0, 900.0));
        assert_eq!((strong.again, strong.strength), (1798.0, Strength::Strong));
        assert_eq!(strong.rate, 179.8);
        let weak = find(&links, (X, 2), (Y, 2));
        assert_eq!((weak.to_a, weak.to_b), (2.0, 0.0));
        // Each travelled once.
        assert_eq!((weak.rate, weak.strength), (0.0, Strength::Weak));
        // The same extent, other pages.
        assert_eq!(find(&links, (X, 1), (Y, 2)).rate, 0.0);
        assert_eq!(find(&links, (X, 1), (X, 2)).strength, Strength::Local);
        assert_eq!(links.len(), 6);
        assert_eq!((links[0].a, links[0].b), ((X, 1), (Y, 1)));
    }

    #[test]
    fn what_several_may_have_given_is_shared_out_and_nothing_is_lost() {
        // 2 pages once, and 98 again.
        let x = vec![traffic(1, Y, &[5, 6], 100, 0)];
        let y = vec![
            traffic(1, X, &[5], 0, 61),
            traffic(2, X, &[6], 0, 31),
            // Nobody's, each once: of all who are attached.
            traffic(0, X, &[5, 6], 0, 2),
            // Not what the other got.
            traffic(3, X, &[7], 0, 500),
        ];
        let accounts = BTreeMap::from([(X, account(&[1], x)), (Y, account(&[1, 2], y))]);
        let links = links(&accounts, STRONG);
        let (first, second) = (find(&links, (X, 1), (Y, 1)), find(&links, (X, 1), (Y, 2)));
        let is = |a: f64, b: f64| (a - b).abs() < 1e-9;
        let once = 2.0 / 2.0;
        assert!(is(first.to_a, once + 98.0 * 60.0 / 90.0), "{first:?}");
        assert!(is(second.to_a, once + 98.0 * 30.0 / 90.0), "{second:?}");
        assert!(is(first.again + second.again, 98.0));
        assert!((first.bytes + second.bytes - 409_600.0).abs() < 1e-6);
    }

    #[test]
    fn time_counts_while_both_are_there() {
        let x = vec![traffic(1, Y, &[5], 401, 0)];
        let y = vec![traffic(1, X, &[5], 0, 401)];
        let (mut x, mut y) = (account(&[1], x), account(&[1], y));
        x.users[0].ended = Some(4 * SECOND);
        y.users[0].since = 2 * SECOND;
        let links = links(&BTreeMap::from([(X, x), (Y, y)]), STRONG);
        assert_eq!((links[0].seconds, links[0].rate), (2.0, 200.0));
        assert_eq!(links[0].strength, Strength::Strong);
    }
}
