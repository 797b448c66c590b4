//! Processes that may only read a segment, and the writers of the same node.
//!
//! A reader sees its user's replica of a page, which the page's writability empties. So, on one
//! node, readers and writers of a page take turns, as nodes do under the coherence protocol, with
//! the same window: who has the page keeps it for a minimum time, so that some thread makes
//! progress in each turn and the two do not merely exchange faults. The engine does not know of
//! this: what it grants the node for writing, the node may use for reading, and what it takes away
//! is gone at once for both.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use migshm_coherence::{Config as CoherenceConfig, Time};
use migshm_protocol::page::Access;
use migshm_protocol::{Page, SegmentId};
use rustc_hash::FxHashMap;

use crate::daemon::Node;
use crate::memory::{Memory, SpaceId, UserId, View, Waiter};
use crate::pages::now;

/// Whose turn it is with each page, and who waits for his.
#[derive(Default, Serialize, Deserialize)]
pub struct Turns {
    /// Of pages whose replicas were emptied for a local writer: when.
    writers: FxHashMap<Page, Time>,
    /// Of pages that a replica got while local writers had them: when.
    readers: FxHashMap<Page, Time>,
    /// Touches to look at again, by when (and a number).
    later: BTreeMap<(Time, u64), Touch>,
    last: u64,
}

/// A thread's touch of a page that has to wait.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Touch {
    space: SpaceId,
    address: u64,
    write: bool,
}

impl Turns {
    /// When touches are to be looked at again.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.later.first_key_value().map(|(&(time, _), _)| time)
    }

    /// The page is the writers' from now on.
    fn begin_writing(&mut self, page: Page, now: Time) {
        self.readers.remove(&page);
        self.writers.insert(page, now);
    }

    /// The page is the readers' from now on.
    fn begin_reading(&mut self, page: Page, now: Time) {
        self.writers.remove(&page);
        self.readers.insert(page, now);
    }

    /// The engine grants a page for writing, where threads may wait for that.
    pub fn note_write_grant(&mut self, memory: &Memory, page: Page, now: Time) {
        if memory.is_awaited(page) && memory.has_replicas(page.segment) {
            self.begin_writing(page, now);
        }
    }

    fn put_off(&mut self, until: Time, touch: Touch) {
        self.last += 1;
        self.later.insert((until, self.last), touch);
    }

    /// Forgets the pages of a segment.
    pub fn remove_segment(&mut self, segment: SegmentId) {
        self.writers.retain(|page, _| page.segment != segment);
        self.readers.retain(|page, _| page.segment != segment);
    }
}

impl Node {
    /// A reader touched a page that its replica has not.
    pub(crate) fn on_reader(&mut self, page: Page, user: UserId, space: SpaceId, address: u64) {
        if self.access(page).is_none() {
            let view = View::Replica(user);
            return self.request(
                page,
                Waiter {
                    space,
                    address,
                    view,
                },
                Access::Read,
            );
        }
        if !self.memory.is_protected(page) {
            let now = now();
            let since = self.turns.writers.get(&page).copied();
            // Nothing tells whether a writer has run.
            if let Some(until) = turn_ends(since, now, || true) {
                let write = false;
                return self.turns.put_off(
                    until,
                    Touch {
                        space,
                        address,
                        write,
                    },
                );
            }
            self.turns.begin_reading(page, now);
        }
        self.memory.show(page, user, space, address);
    }

    /// A thread is about to write a page that this node may write and readers see; whether it has
    /// to wait for its turn. It then will be looked at again.
    pub(crate) fn must_wait_for_readers(
        &mut self,
        page: Page,
        space: SpaceId,
        address: u64,
    ) -> bool {
        let now = now();
        let since = self.turns.readers.get(&page).copied();
        let touched = || self.memory.is_read(page);
        if let Some(until) = turn_ends(since, now, touched) {
            let write = true;
            let touch = Touch {
                space,
                address,
                write,
            };
            self.turns.put_off(until, touch);
            return true;
        }
        self.turns.begin_writing(page, now);
        false
    }

    /// Looks again at the touches whose time has come.
    pub(crate) fn retry_touches(&mut self) {
        let now = now();
        while let Some(entry) = self.turns.later.first_entry() {
            if entry.key().0 > now {
                return;
            }
            let Touch {
                space,
                address,
                write,
            } = entry.remove();
            self.memory.spaces.report_again(space, address, write);
        }
    }

    /// Frees replicas that no process maps or is about to map.
    pub(crate) fn release_replicas(&mut self) {
        let unmapped = self.memory.spaces.mappings.removals();
        if std::mem::replace(&mut self.unmapped, unmapped) == unmapped {
            return;
        }
        for (segment, user) in self.memory.unmapped_replicas() {
            let view = View::Replica(user);
            let mut attaching = self.mapping.values();
            if !attaching.any(|a| a.segment == segment && a.view == view) {
                self.memory.remove_replica(segment, user);
                if !self.memory.has_replicas(segment) {
                    self.turns.remove_segment(segment);
                }
            }
        }
    }
}

/// When to ask again whether a turn that began at `since` is over; `None` if it is.
fn turn_ends(since: Option<Time>, now: Time, touched: impl FnOnce() -> bool) -> Option<Time> {
    let CoherenceConfig { hold_min, hold_max } = CoherenceConfig::default();
    let elapsed = now.saturating_sub(since?);
    if elapsed < hold_min {
        Some(now + (hold_min - elapsed))
    } else if elapsed < hold_max && !touched() {
        Some(now + hold_min)
    } else {
        None
    }
}
