//! What a node counts of the accesses to shared segments: who faults where, and between which nodes
//! pages then travel.
//!
//! Everything here has a bound, and nothing is allocated for a fault once the tables are there:
//!
//! | table | bound | what is forgotten first | memory |
//! |---|---|---|---|
//! | traffic by process, extent and other node | 4096 rows | of 8 rows, the one that counts least | 1.4 MiB |
//! | who used a page last | 2048 extents (4 GiB) | another extent that falls on the same place | 4 MiB |
//! | processes | 4096 | the one that ended first, else the oldest | 0.5 MiB |
//! | requests to homes | 65,536 | the oldest | 1.5 MiB |
//!
//! How many events were forgotten is counted ([`AccessLog::forgotten`]). A process that shows up
//! here is an address space: what it was before an `execve` is another.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hash};

use migshm_protocol::accesses::{
    Counts, PART_REQUESTS, PART_TRAFFIC, PART_USERS, Part, Request, Seen, Traffic, User,
};
use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::page::Access;
use migshm_protocol::{Extent, NodeId, Page, SegmentId};
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::Time;

/// Rows of traffic that a key may be in.
const WAYS: usize = 8;
/// All rows of traffic.
const ROWS: usize = 4096;
/// Extents whose pages' last users are known.
const EXTENTS: usize = 2048;
/// Processes that are known.
const USERS: usize = 4096;
/// Requests that are kept.
const REQUESTS: usize = 65_536;

/// The log of one node.
#[derive(Debug, Serialize, Deserialize)]
pub struct AccessLog {
    me: NodeId,
    users: FxHashMap<u32, Known>,
    /// Sets of [`WAYS`] rows; empty until there is something to count.
    rows: Vec<Row>,
    /// By a hash of the extent; empty until there is something to count.
    recent: Vec<Option<Box<Recent>>>,
    requests: VecDeque<Requested>,
    /// The number of the first of them.
    first_request: u64,
    forgotten: u64,
}

/// What is known of a process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    pid: i32,
    /// `None` until it is introduced.
    command: Option<String>,
    since: Time,
    ended: Option<Time>,
}

/// Traffic of a process; none if there are no events.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Row {
    segment: SegmentId,
    traffic: Traffic,
}

/// Who used the pages of an extent last.
#[derive(Debug, Serialize, Deserialize)]
struct Recent {
    extent: Extent,
    /// The last of all, for pages that come unasked.
    last: u32,
    by_page: Box<[u32]>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Requested {
    time: Time,
    page: Page,
    node: u16,
    access: Access,
}

impl AccessLog {
    /// The empty log of node `me`.
    #[must_use]
    pub fn new(me: NodeId) -> Self {
        Self {
            me,
            users: FxHashMap::default(),
            rows: Vec::new(),
            recent: Vec::new(),
            requests: VecDeque::new(),
            first_request: 0,
            forgotten: 0,
        }
    }

    /// A process faulted on a page that it may not use (so far); whether it has to be introduced.
    /// `user` is its number, unique on the node for ever, and not 0.
    pub fn fault(&mut self, user: u32, page: Page, access: Access) -> bool {
        let recent = self.recent_mut(page.extent());
        recent.last = user;
        recent.by_page[slot(page)] = user;
        let me = self.me;
        let counts = &mut self.traffic(user, page, me).counts;
        match access {
            Access::Read => counts.reads += 1,
            Access::Write => counts.writes += 1,
        }
        self.is_unnamed(user)
    }

    /// There is a process.
    pub fn meet(&mut self, now: Time, user: u32) {
        if self.users.contains_key(&user) {
            return;
        }
        if self.users.len() >= USERS {
            self.forget_users();
        }
        let since = now;
        self.users.insert(
            user,
            Known {
                since,
                ..Known::default()
            },
        );
    }

    /// Whether nobody has said who a process is.
    #[must_use]
    pub fn is_unnamed(&self, user: u32) -> bool {
        let known = self.users.get(&user);
        known.is_none_or(|known| known.command.is_none())
    }

    /// Says who a process is.
    pub fn introduce(&mut self, now: Time, user: u32, pid: i32, command: String) {
        self.meet(now, user);
        if let Some(known) = self.users.get_mut(&user) {
            known.pid = pid;
            known.command = Some(command);
        }
    }

    /// A process has ended.
    pub fn ended(&mut self, now: Time, user: u32) {
        if let Some(known) = self.users.get_mut(&user) {
            known.ended = Some(now);
        }
    }

    /// A page came from a node, for the process that faulted on it last, or, if none did, for the one
    /// that used the extent last (a prefetch).
    pub fn received(&mut self, page: Page, from: NodeId, bytes: usize) {
        let recent = self.recent_mut(page.extent());
        let last = recent.last;
        let user = match &mut recent.by_page[slot(page)] {
            0 => last,
            user => *user,
        };
        recent.by_page[slot(page)] = user;
        let traffic = self.traffic(user, page, from);
        traffic.counts.received += 1;
        traffic.counts.bytes_received += bytes as u64;
        traffic.received.note(slot(page));
    }

    /// A page was given to a node that needs it. It was that of the process that faulted on it last;
    /// of nobody in particular (0), if none did.
    pub fn sent(&mut self, page: Page, to: NodeId, bytes: usize) {
        let user = self.recent_mut(page.extent()).by_page[slot(page)];
        let traffic = self.traffic(user, page, to);
        traffic.counts.sent += 1;
        traffic.counts.bytes_sent += bytes as u64;
        traffic.sent.note(slot(page));
    }

    /// A node asked this one, the page's home, for it.
    pub fn requested(&mut self, now: Time, page: Page, by: NodeId, access: Access) {
        if self.requests.len() == REQUESTS {
            self.requests.pop_front();
            self.first_request += 1;
        } else if self.requests.is_empty() {
            self.requests.reserve_exact(REQUESTS);
        }
        self.requests.push_back(Requested {
            time: now,
            page,
            node: by.0,
            access,
        });
    }

    /// Forgets a segment.
    pub fn remove_segment(&mut self, segment: SegmentId) {
        for row in self.rows.iter_mut().filter(|row| row.segment == segment) {
            *row = Row::EMPTY;
        }
        for recent in &mut self.recent {
            recent.take_if(|recent| recent.extent.segment == segment);
        }
        // The numbers of those that stay must not change under a reader: they are only hidden.
        for request in &mut self.requests {
            if request.page.segment == segment {
                request.page.segment = NO_SEGMENT;
            }
        }
    }

    /// Events of all segments that were forgotten for lack of room.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// A part of what is known of a segment, from 0 or where the last part said; `attached` are the
    /// processes that have it attached. Times are those of the log plus `epoch`.
    #[must_use]
    pub fn part(
        &self,
        segment: SegmentId,
        from: u64,
        requests: bool,
        attached: &[u32],
        epoch: Time,
    ) -> Part {
        let mut part = Part {
            forgotten: self.forgotten,
            ..Part::default()
        };
        if from == 0 {
            part.users = self.users_of(segment, attached, epoch);
        }
        let rows = self.rows.len() as u64;
        let mut next = from;
        while next < rows && part.traffic.len() < PART_TRAFFIC {
            let row = &self.rows[next as usize];
            if row.segment == segment && row.traffic.counts.events() > 0 {
                part.traffic.push(row.traffic);
            }
            next += 1;
        }
        if next < rows {
            part.next = Some(next);
        } else if requests && from < ROWS as u64 {
            part.next = Some(ROWS as u64 + self.first_request);
        } else if requests {
            let (found, next) = self.requests_of(segment, from - ROWS as u64, epoch);
            part.requests = found;
            part.next = next.map(|number| ROWS as u64 + number);
        }
        part
    }

    fn requests_of(
        &self,
        segment: SegmentId,
        from: u64,
        epoch: Time,
    ) -> (Vec<Request>, Option<u64>) {
        let skip = from.saturating_sub(self.first_request);
        let mut found = Vec::new();
        let later = self.requests.iter().zip(self.first_request..);
        for (request, number) in later.skip(usize::try_from(skip).unwrap_or(usize::MAX)) {
            if request.page.segment != segment {
                continue;
            }
            if found.len() == PART_REQUESTS {
                return (found, Some(number));
            }
            found.push(Request {
                time: request.time + epoch,
                page: request.page.index,
                node: NodeId(request.node),
                access: request.access,
            });
        }
        (found, None)
    }

    fn users_of(&self, segment: SegmentId, attached: &[u32], epoch: Time) -> Vec<User> {
        let rows = self.rows.iter();
        let rows = rows.filter(|row| row.segment == segment && row.traffic.counts.events() > 0);
        let mut users: Vec<u32> = rows.map(|row| row.traffic.user).collect();
        users.extend(attached);
        users.sort_unstable();
        users.dedup();
        let known = users.into_iter().filter_map(|user| {
            let known = self.users.get(&user)?;
            Some(User {
                user,
                pid: known.pid,
                command: known.command.clone().unwrap_or_default(),
                attached: attached.contains(&user),
                since: known.since + epoch,
                ended: known.ended.map(|time| time + epoch),
            })
        });
        known.take(PART_USERS).collect()
    }

    fn recent_mut(&mut self, extent: Extent) -> &mut Recent {
        if self.recent.is_empty() {
            self.recent.resize_with(EXTENTS, || None);
        }
        let place = &mut self.recent[place(extent, EXTENTS)];
        place.take_if(|recent| recent.extent != extent);
        place.get_or_insert_with(|| {
            Box::new(Recent {
                extent,
                last: 0,
                by_page: [0; EXTENT_PAGES as usize].into(),
            })
        })
    }

    /// The row of a process, a page's extent and a node: found, or made in place of another.
    fn traffic(&mut self, user: u32, page: Page, peer: NodeId) -> &mut Traffic {
        if self.rows.is_empty() {
            self.rows.resize(ROWS, Row::EMPTY);
        }
        let Extent { segment, index } = page.extent();
        let is_it = |row: &Row| {
            let t = &row.traffic;
            row.segment == segment && (t.user, t.extent, t.peer) == (user, index, peer.0)
        };
        let set = place((segment, index, user, peer), ROWS / WAYS) * WAYS;
        let set = &mut self.rows[set..set + WAYS];
        let at = set.iter().position(is_it).unwrap_or_else(|| {
            let (least, row) = set
                .iter_mut()
                .enumerate()
                .min_by_key(|(_, row)| row.traffic.counts.events())
                .expect("a set has rows");
            self.forgotten += row.traffic.counts.events();
            *row = Row {
                segment,
                traffic: Traffic {
                    user,
                    extent: index,
                    peer: peer.0,
                    ..Traffic::default()
                },
            };
            least
        });
        &mut set[at].traffic
    }

    /// Forgets a quarter of the processes: those that ended first, then those that came first.
    fn forget_users(&mut self) {
        let age = |known: &Known| (known.ended.is_none(), known.ended.unwrap_or(known.since));
        let mut ages: Vec<_> = self.users.values().map(age).collect();
        let quarter = ages.len() / 4;
        let (_, &mut youngest, _) = ages.select_nth_unstable(quarter);
        self.users.retain(|_, known| age(known) > youngest);
    }
}

impl Row {
    const EMPTY: Row = Row {
        segment: NO_SEGMENT,
        traffic: Traffic {
            user: 0,
            extent: 0,
            peer: 0,
            counts: Counts {
                reads: 0,
                writes: 0,
                received: 0,
                bytes_received: 0,
                sent: 0,
                bytes_sent: 0,
            },
            received: NOTHING_SEEN,
            sent: NOTHING_SEEN,
        },
    };
}

const NOTHING_SEEN: Seen = Seen {
    once: [0; EXTENT_PAGES as usize / 64],
    again: [0; EXTENT_PAGES as usize / 64],
};

/// No segment has this id: the coordinator counts them up from 0.
const NO_SEGMENT: SegmentId = SegmentId(u64::MAX);

/// Index of a page in its extent.
fn slot(page: Page) -> usize {
    (page.index % EXTENT_PAGES) as usize
}

/// One of `places`, by a hash.
fn place(key: impl Hash, places: usize) -> usize {
    (FxBuildHasher.hash_one(key) % places as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId(0);
    const OTHER: NodeId = NodeId(1);
    const SEGMENT: SegmentId = SegmentId(7);

    fn page(index: u32) -> Page {
        Page {
            segment: SEGMENT,
            index,
        }
    }

    fn whole(log: &AccessLog, segment: SegmentId, attached: &[u32]) -> Part {
        let mut whole = log.part(segment, 0, true, attached, 1000);
        while let Some(from) = whole.next {
            let part = log.part(segment, from, true, attached, 1000);
            assert!(part.next != whole.next, "no progress");
            whole.traffic.extend(part.traffic);
            whole.requests.extend(part.requests);
            whole.next = part.next;
        }
        whole
    }

    #[test]
    fn a_page_counts_for_who_faulted_on_it_last() {
        let mut log = AccessLog::new(ME);
        assert!(log.fault(1, page(3), Access::Read));
        log.introduce(5, 1, 100, "a".into());
        log.received(page(3), OTHER, 4096);
        assert!(!log.fault(1, page(3), Access::Write));
        assert!(log.fault(2, page(4), Access::Write));
        log.introduce(6, 2, 200, "b".into());
        log.received(page(4), OTHER, 4096);
        // Unasked.
        log.received(page(5), OTHER, 4096);
        log.sent(page(3), OTHER, 4096);
        log.sent(page(9), OTHER, 4096);
        log.ended(9, 1);

        let part = whole(&log, SEGMENT, &[2]);
        let find = |user, peer: NodeId| {
            let mut found = part.traffic.iter();
            let found = found.find(|t| t.user == user && t.peer == peer.0);
            found.map(|t| (t.counts, t.received.once[0], t.sent.once[0]))
        };
        let (mine, ..) = find(1, ME).unwrap();
        assert_eq!((mine.reads, mine.writes), (1, 1));
        let (exchanged, received, sent) = find(1, OTHER).unwrap();
        assert_eq!((exchanged.received, exchanged.sent), (1, 1));
        assert_eq!((received, sent), (1 << 3, 1 << 3));
        assert_eq!(find(2, OTHER).unwrap().0.received, 2);
        let (of_nobody, _, sent) = find(0, OTHER).unwrap();
        assert_eq!(
            (of_nobody.sent, of_nobody.bytes_sent, sent),
            (1, 4096, 1 << 9)
        );
        assert_eq!(part.users.len(), 2);
        let gone = &part.users[0];
        assert_eq!((gone.pid, &*gone.command), (100, "a"));
        assert_eq!((gone.since, gone.ended), (1005, Some(1009)));
        assert!(!gone.attached && part.users[1].attached);

        log.remove_segment(SEGMENT);
        let part = whole(&log, SEGMENT, &[]);
        assert_eq!((part.traffic.len(), part.users.len()), (0, 0));
    }

    #[test]
    fn requests_are_told_in_order_and_the_oldest_forgotten() {
        let mut log = AccessLog::new(ME);
        let total = REQUESTS as u64 + 10_000;
        for n in 0..total {
            let segment = SegmentId(n % 2);
            let index = (n / 2) as u32;
            log.requested(n, Page { segment, index }, OTHER, Access::Write);
        }
        let part = whole(&log, SegmentId(1), &[]);
        let pages: Vec<u32> = part.requests.iter().map(|r| r.page).collect();
        let expected: Vec<u32> = (5_000..(total / 2) as u32).collect();
        assert_eq!(pages, expected);
        log.remove_segment(SegmentId(1));
        assert_eq!(whole(&log, SegmentId(1), &[]).requests, []);
        assert_eq!(
            whole(&log, SegmentId(0), &[]).requests.len(),
            expected.len()
        );
    }

    #[test]
    fn memory_is_bounded_and_what_counts_most_is_kept() {
        let mut log = AccessLog::new(ME);
        for n in 0..200_000u32 {
            let user = 10 + n;
            if log.fault(user, page(n * 100), Access::Read) {
                log.introduce(n.into(), user, 1, String::new());
                log.ended(n.into(), user);
            }
            if log.fault(1, page(17), Access::Write) {
                log.introduce(n.into(), 1, 77, "busy".into());
            }
        }
        assert_eq!(log.rows.len(), ROWS);
        assert!(log.users.len() <= USERS);
        let part = whole(&log, SEGMENT, &[]);
        assert!(part.traffic.len() <= ROWS);
        let busy = part.traffic.iter().find(|t| t.user == 1).unwrap();
        assert_eq!(busy.counts.writes, 200_000);
        assert!(part.users.iter().any(|user| user.pid == 77));
        let kept: u64 = part.traffic.iter().map(|t| t.counts.events()).sum();
        assert_eq!(kept + log.forgotten(), 400_000);
    }
}
