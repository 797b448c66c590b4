//! Exhaustive search of what small clusters can do (stateright).
//!
//! Every order in which threads fault and write, pages are evicted, homes move, holds end and
//! messages arrive (in order between two nodes, in any order otherwise) is tried. Two
//! abstractions make the number of states finite without limiting how often anything happens:
//!
//! - Contents are fresh, if the last write of the page made them, or stale. [`State`]'s hash
//!   sees nothing else of a version.
//! - There is no time. Where holds are on, every page is held from the grant on until an action
//!   of the model ends it.
//!
//! That nothing is stuck is checked where nothing is under way. As an engine sends a bounded
//! number of messages for each fault, eviction and move, every fair run without new ones gets
//! there: no stuck state means progress.

use std::hash::{Hash, Hasher};

use migshm_protocol::Page;
use migshm_protocol::page::{Access, PageMessage};
use stateright::{Checker, Model, Property};

use super::cluster::{Cluster, EXTENT, Fate, Letter, Mutation, Version, node, page};
use crate::engine::cache::{Grant, Pending};
use crate::engine::directory::Directory;
use crate::engine::home::Work;
use crate::{Fill, Input, Time};

/// When everything happens but the end of a hold.
const NOW: Time = 1 << 20;
/// When a hold ends.
const LATER: Time = 1 << 40;
const HOLD: Time = 1 << 30;

/// What is searched.
#[derive(Clone, Debug)]
struct Search {
    nodes: usize,
    pages: usize,
    /// Whether the coordinator has to be asked for the home; otherwise it is at node 0.
    homeless: bool,
    /// Whether node 0 has written to page 0 while it was alone.
    preloaded: bool,
    holds: bool,
    limits: Limits,
    /// Whether nodes that are taken for dead go on to answer.
    expulsions: bool,
    /// A protocol broken on purpose, and the property that has to find that out.
    broken: Option<(Mutation, &'static str)>,
}

/// How often what may happen; `ANY` for without limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Limits {
    reads: u8,
    writes: u8,
    evictions: u8,
    moves: u8,
    pushes: u8,
    prefetches: u8,
    /// Deaths of nodes.
    deaths: u8,
}

const ANY: u8 = u8::MAX;

impl Limits {
    const NONE: Self = Self {
        reads: ANY,
        writes: ANY,
        evictions: ANY,
        moves: ANY,
        pushes: 0,
        prefetches: 0,
        deaths: 0,
    };
}

/// One of `limit` is used up, if there is any left.
fn spend(limit: u8) -> Option<u8> {
    if limit == ANY {
        Some(ANY)
    } else {
        limit.checked_sub(1)
    }
}

#[derive(Clone, Debug)]
struct State {
    cluster: Cluster,
    left: Limits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Deliver {
        channel: usize,
    },
    Overtake {
        channel: usize,
    },
    Answer {
        at: usize,
    },
    Hear {
        at: usize,
    },
    Lose {
        at: usize,
        fate: Fate,
    },
    EndHolds {
        at: usize,
    },
    Fault {
        at: usize,
        index: usize,
        access: Access,
    },
    Prefetch {
        at: usize,
        index: usize,
        access: Access,
    },
    Write {
        at: usize,
        index: usize,
    },
    Evict {
        at: usize,
        index: usize,
    },
    MoveHome {
        from: usize,
        to: usize,
    },
    Push {
        at: usize,
        index: usize,
        access: Access,
        to: usize,
    },
}

const SINGLE_WRITERS: &str = "one writer or many readers";
const FRESH_READS: &str = "a page that can be read contains the last write";
const NOT_STUCK: &str = "whoever waits is served";
const SINGLE_HOME: &str = "an extent has one home";
const KNOWN_MAPPINGS: &str = "processes can do no more than the engine believes";
const NOTHING_WRONG: &str = "no impossible message and no impossible action";

impl Model for Search {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let default_home = (!self.homeless).then(|| node(0));
        let hold = if self.holds { HOLD } else { 0 };
        let mut cluster = Cluster::new(self.nodes, self.pages, default_home, hold);
        if self.preloaded {
            cluster.preload(0, 0);
        }
        cluster.slow_words = self.limits.deaths > 0;
        vec![State {
            cluster: cluster.broken(self.broken.map(|(mutation, _)| mutation)),
            left: self.limits,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        let State { cluster, left } = state;
        for channel in cluster.busy_channels() {
            steps.push(Step::Deliver { channel });
            if cluster.overtakes(channel) {
                steps.push(Step::Overtake { channel });
            }
        }
        for (at, host) in cluster.hosts.iter().enumerate() {
            if host.fate == Fate::Dead {
                continue;
            }
            if !host.answers.is_empty() {
                steps.push(Step::Answer { at });
            }
            if !host.said.is_empty() {
                steps.push(Step::Hear { at });
            }
            if host.engine.next_timeout().is_some() {
                steps.push(Step::EndHolds { at });
            }
            if !host.is_member() {
                continue;
            }
            if left.deaths > 0 {
                let fate = if self.expulsions {
                    Fate::Expelled
                } else {
                    Fate::Dead
                };
                steps.push(Step::Lose { at, fate });
            }
            for (index, frame) in host.frames.iter().enumerate() {
                if frame.waiting.is_none() {
                    if frame.access.is_none() && left.reads > 0 {
                        steps.push(Step::Fault {
                            at,
                            index,
                            access: Access::Read,
                        });
                    }
                    if frame.access < Some(Access::Write) && left.writes > 0 {
                        steps.push(Step::Fault {
                            at,
                            index,
                            access: Access::Write,
                        });
                    }
                }
                for access in [Access::Read, Access::Write] {
                    let useful =
                        frame.access < Some(access) && !host.engine.is_pending(page(index));
                    if useful && left.prefetches > 0 {
                        steps.push(Step::Prefetch { at, index, access });
                    }
                }
                if frame.access == Some(Access::Write) {
                    steps.push(Step::Write { at, index });
                }
                if frame.access.is_some() && left.evictions > 0 {
                    steps.push(Step::Evict { at, index });
                }
                if frame.access.is_some() && left.pushes > 0 {
                    let others = (0..self.nodes).filter(|&to| to != at);
                    steps.extend(others.flat_map(|to| {
                        [Access::Read, Access::Write].map(|access| Step::Push {
                            at,
                            index,
                            access,
                            to,
                        })
                    }));
                }
            }
            if host.engine.is_home(EXTENT) && left.moves > 0 {
                let others = (0..self.nodes).filter(|&to| to != at);
                steps.extend(others.map(|to| Step::MoveHome { from: at, to }));
            }
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        let State { cluster, left } = &mut next;
        match step {
            Step::Deliver { channel } => cluster.deliver(NOW, channel),
            Step::Overtake { channel } => cluster.channels[channel].rotate_left(1),
            Step::Answer { at } => cluster.answer(NOW, at),
            Step::Hear { at } => cluster.hear(at),
            Step::Lose { at, fate } => {
                left.deaths = spend(left.deaths)?;
                cluster.lose(at, fate);
            }
            Step::EndHolds { at } => cluster.end_holds(LATER, at),
            Step::Fault { at, index, access } => {
                match access {
                    Access::Read => left.reads = spend(left.reads)?,
                    Access::Write => left.writes = spend(left.writes)?,
                }
                cluster.touch(NOW, at, index, access);
            }
            Step::Prefetch { at, index, access } => {
                left.prefetches = spend(left.prefetches)?;
                let page = page(index);
                cluster.handle(NOW, at, Input::Prefetch { page, access });
            }
            Step::Write { at, index } => cluster.write(at, index),
            Step::Evict { at, index } => {
                left.evictions = spend(left.evictions)?;
                cluster.handle(NOW, at, Input::Evict { page: page(index) });
            }
            Step::MoveHome { from, to } => {
                left.moves = spend(left.moves)?;
                let to = node(to);
                cluster.handle(NOW, from, Input::MoveHome { extent: EXTENT, to });
            }
            Step::Push {
                at,
                index,
                access,
                to,
            } => {
                left.pushes = spend(left.pushes)?;
                let (page, to) = (page(index), node(to));
                cluster.handle(NOW, at, Input::Push { page, access, to });
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let all = [
            Property::always(SINGLE_WRITERS, |_, s: &State| {
                s.cluster.has_single_writers()
            }),
            Property::always(FRESH_READS, |_, s: &State| s.cluster.reads_are_fresh()),
            Property::always(NOT_STUCK, |_, s: &State| s.cluster.is_not_stuck()),
            Property::always(SINGLE_HOME, |_, s: &State| s.cluster.has_single_home()),
            Property::always(KNOWN_MAPPINGS, |_, s: &State| {
                s.cluster.engines_know_the_mappings()
            }),
            Property::always(NOTHING_WRONG, |_, s: &State| s.cluster.nothing_is_wrong()),
        ];
        let sought = |name| self.broken.is_none_or(|(_, sought)| sought == name);
        all.into_iter()
            .filter(|property| sought(property.name))
            .collect()
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        fn digest(state: &State) -> u64 {
            let mut hasher = std::hash::DefaultHasher::new();
            state.hash(&mut hasher);
            hasher.finish()
        }
        digest(self) == digest(other)
    }
}

impl Hash for State {
    /// Hashes what decides on everything that can still happen, and nothing else.
    fn hash<H: Hasher>(&self, h: &mut H) {
        let Self { cluster, left } = self;
        left.hash(h);
        let pages = 0..cluster.latest.len();
        let fresh = |page: Page, version: Version| version == cluster.latest[page.index as usize];
        for &latest in &cluster.latest {
            (latest > 0).hash(h);
        }
        cluster.coordinator.hash(h);
        cluster.wrong.hash(h);
        for (channel, letters) in cluster.channels.iter().enumerate() {
            if letters.is_empty() {
                continue;
            }
            (channel, letters.len()).hash(h);
            for letter in letters {
                match letter {
                    Letter::Page(message, data) => hash_message(message, *data, fresh, h),
                    Letter::Flush(view) => view.hash(h),
                }
            }
        }
        for host in &cluster.hosts {
            let engine = &host.engine;
            (&host.answers, &host.said, host.fate).hash(h);
            if host.fate == Fate::Dead {
                continue;
            }
            engine.view.digest(h);
            for early in engine.view.early() {
                (early.from, early.view).hash(h);
                hash_message(&early.message, early.data, fresh, h);
            }
            if let Some(rebuild) = engine.rebuilds.get(&EXTENT) {
                (rebuild.awaited, &rebuild.held, rebuild.adopted).hash(h);
                rebuild.queue.len().hash(h);
                let works = rebuild.queue.iter();
                works.for_each(|work| hash_work(work, fresh, h));
            }
            if let Some(works) = engine.unrouted.get(&EXTENT) {
                works.len().hash(h);
                works.iter().for_each(|work| hash_work(work, fresh, h));
            }
            (engine.counters.protocol_errors > 0).hash(h);
            let state = engine.extent(EXTENT);
            let directory = state.and_then(|state| state.directory.as_ref());
            state.map(|state| (state.home, state.was_home)).hash(h);
            directory
                .map(|directory| (directory.busy(), directory.moving))
                .hash(h);
            if let Some(moving) = engine.moves.get(&EXTENT) {
                (moving.to, moving.fence).hash(h);
                moving.queue.len().hash(h);
                moving
                    .queue
                    .iter()
                    .for_each(|work| hash_work(work, fresh, h));
            }
            engine.finding.get(&EXTENT).hash(h);
            engine
                .deferred
                .iter()
                .for_each(|((_, page), take)| (page, take).hash(h));
            for index in pages.clone() {
                let page = page(index);
                let frame = host.frames[index];
                let contents = frame.contents.map(|version| fresh(page, version));
                (frame.access, contents, frame.waiting).hash(h);
                let line = engine.line(page);
                let held = line.hold.until(NOW, &engine.config, || true).is_some();
                (
                    line.state,
                    line.wanted,
                    held && line.state.access().is_some(),
                )
                    .hash(h);
                directory.is_some().hash(h);
                if let Some(directory) = directory {
                    hash_entry(directory, index, h);
                }
                if let Some(grant) = engine.pushed.get(&page) {
                    hash_grant(grant, |version| fresh(page, version), h);
                }
                if let Some(pending) = engine.pending.get(&page) {
                    hash_pending(pending, |version| fresh(page, version), h);
                }
                if let Some(transaction) = engine.transactions.get(&page) {
                    (transaction.requester, transaction.pushed).hash(h);
                    transaction.before.hash(h);
                    transaction.queue.len().hash(h);
                    transaction
                        .queue
                        .iter()
                        .for_each(|work| hash_work(work, fresh, h));
                }
            }
        }
    }
}

fn hash_entry<H: Hasher>(directory: &Directory, index: usize, h: &mut H) {
    directory.owner(index).hash(h);
    directory.is_lost(index).hash(h);
    directory.is_busy(index).hash(h);
    directory.is_exclusive(index).hash(h);
    directory.holders(index).hash(h);
}

fn hash_message<H: Hasher>(
    message: &PageMessage,
    data: Option<Version>,
    fresh: impl Fn(Page, Version) -> bool,
    h: &mut H,
) {
    message.hash(h);
    if let (PageMessage::Grant { page, .. } | PageMessage::WriteBack { page, .. }, Some(version)) =
        (message, data)
    {
        fresh(*page, version).hash(h);
    }
}

fn hash_pending<H: Hasher>(pending: &Pending<Version>, fresh: impl Fn(Version) -> bool, h: &mut H) {
    let Pending {
        access,
        awaited,
        prefetch,
        sent,
        acks,
        grant,
    } = pending;
    (access, awaited, prefetch, sent, acks).hash(h);
    if let Some(grant) = grant {
        hash_grant(grant, fresh, h);
    }
}

fn hash_grant<H: Hasher>(grant: &Grant<Version>, fresh: impl Fn(Version) -> bool, h: &mut H) {
    let Grant {
        access,
        acks,
        contents,
        home,
        confirm,
    } = grant;
    let contents = match contents {
        Fill::Data(version) => Fill::Data(fresh(*version)),
        Fill::Zeros => Fill::Zeros,
        Fill::InPlace => Fill::InPlace,
    };
    (access, acks, contents, home, confirm).hash(h);
}

fn hash_work<H: Hasher>(work: &Work<Version>, fresh: impl Fn(Page, Version) -> bool, h: &mut H) {
    match work {
        Work::Request(asked) => asked.hash(h),
        Work::WriteBack { page, owner, data } => (page, owner, fresh(*page, *data)).hash(h),
        Work::Relinquish { page, sharer } => (page, sharer).hash(h),
    }
}

impl Search {
    /// Three nodes and one page at home at node 0, where anything may happen any number of times.
    const ONE_PAGE: Self = Self {
        nodes: 3,
        pages: 1,
        homeless: false,
        preloaded: false,
        holds: false,
        limits: Limits::NONE,
        expulsions: false,
        broken: None,
    };

    /// # Panics
    ///
    /// If a property does not hold.
    fn check(self) {
        let started = std::time::Instant::now();
        let name = format!("{self:?}");
        let checker = self.checker().spawn_bfs().join();
        println!(
            "{} states, {} transitions, depth {}, {:.1?}: {name}",
            checker.unique_state_count(),
            checker.state_count(),
            checker.max_depth(),
            started.elapsed(),
        );
        checker.assert_properties();
    }

    const fn without_moves(self) -> Self {
        self.with_moves(0)
    }

    /// Where owners also give pages away unasked.
    const fn with_pushes(self, pushes: u8) -> Self {
        Self {
            limits: Limits {
                pushes,
                ..self.limits
            },
            ..self
        }
    }

    const fn with_moves(self, moves: u8) -> Self {
        Self {
            limits: Limits {
                moves,
                ..self.limits
            },
            ..self
        }
    }

    /// # Panics
    ///
    /// If no run of the broken protocol violates one of the properties.
    fn finds(self, mutation: Mutation, properties: &[&'static str]) {
        for property in properties {
            let broken = Self {
                broken: Some((mutation, property)),
                ..self.clone()
            };
            let path = broken
                .checker()
                .spawn_bfs()
                .join()
                .assert_any_discovery(property);
            let steps = path.into_actions();
            println!(
                "{mutation:?}: not \"{property}\" after {} steps: {steps:?}",
                steps.len()
            );
        }
    }
}

#[test]
fn two_nodes_are_coherent_whatever_happens() {
    for holds in [false, true] {
        Search {
            nodes: 2,
            holds,
            ..Search::ONE_PAGE
        }
        .check();
    }
}

#[test]
fn three_nodes_are_coherent_whatever_happens_while_the_home_stays() {
    for holds in [false, true] {
        Search {
            holds,
            ..Search::ONE_PAGE.without_moves()
        }
        .check();
    }
    Search {
        homeless: true,
        ..Search::ONE_PAGE.without_moves()
    }
    .check();
    Search {
        preloaded: true,
        ..Search::ONE_PAGE.without_moves()
    }
    .check();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn three_nodes_are_coherent_whatever_happens_around_one_move() {
    Search::ONE_PAGE.with_moves(1).check();
}

/// It once was not: a write-back of the home's own, from before it was the home, came back to it
/// after it had lost the page, taken it over from another node, and ceased to be the home.
#[test]
fn a_write_back_is_never_taken_for_a_later_one() {
    let limits = Limits {
        reads: 1,
        writes: 2,
        evictions: 2,
        moves: 2,
        pushes: 0,
        prefetches: 0,
        deaths: 0,
    };
    Search {
        limits,
        ..Search::ONE_PAGE
    }
    .check();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn three_nodes_are_coherent_with_two_pages_in_an_extent() {
    let limits = Limits {
        reads: 2,
        writes: 2,
        evictions: 1,
        moves: 0,
        pushes: 0,
        prefetches: 0,
        deaths: 0,
    };
    Search {
        pages: 2,
        limits,
        ..Search::ONE_PAGE
    }
    .check();
    let limits = Limits {
        reads: 2,
        writes: 1,
        evictions: 1,
        moves: 1,
        pushes: 0,
        prefetches: 0,
        deaths: 0,
    };
    Search {
        pages: 2,
        limits,
        ..Search::ONE_PAGE
    }
    .check();
    let limits = Limits { reads: 1, ..limits };
    for homeless in [false, true] {
        Search {
            pages: 2,
            holds: true,
            preloaded: !homeless,
            homeless,
            limits,
            ..Search::ONE_PAGE
        }
        .check();
    }
}

/// 5.5 million states: 80 s and 2.1 GB on one core.
#[test]
#[ignore = "takes 2 GB and more than a minute"]
fn three_nodes_are_coherent_with_two_pages_and_more_of_everything() {
    let limits = Limits {
        reads: 2,
        writes: 2,
        evictions: 1,
        moves: 1,
        pushes: 0,
        prefetches: 0,
        deaths: 0,
    };
    Search {
        pages: 2,
        limits,
        ..Search::ONE_PAGE
    }
    .check();
}

/// What is prefetched is a copy like any, whatever else happens to the page.
#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn prefetches_are_coherent_whatever_happens() {
    let prefetching = |search: Search, prefetches| Search {
        limits: Limits {
            prefetches,
            ..search.limits
        },
        ..search
    };
    for holds in [false, true] {
        let search = Search {
            nodes: 2,
            holds,
            ..Search::ONE_PAGE
        };
        prefetching(search, ANY).check();
        let search = Search {
            holds,
            ..Search::ONE_PAGE.without_moves()
        };
        prefetching(search, ANY).check();
        let limits = Limits {
            reads: 1,
            writes: 2,
            evictions: 1,
            moves: 0,
            pushes: 1,
            prefetches: 1,
            deaths: 0,
        };
        Search {
            holds,
            limits,
            ..Search::ONE_PAGE
        }
        .check();
    }
}

/// 13 million states: 4 minutes and 4 GB on one core.
#[test]
#[ignore = "takes 4 GB and minutes"]
fn prefetches_are_coherent_whatever_happens_around_one_move() {
    for holds in [false, true] {
        let limits = Limits {
            moves: 1,
            prefetches: 1,
            ..Limits::NONE
        };
        Search {
            holds,
            limits,
            ..Search::ONE_PAGE
        }
        .check();
    }
}

#[test]
fn a_decline_that_gets_lost_would_leave_a_thread_waiting() {
    let search = Search {
        holds: true,
        limits: Limits {
            prefetches: 1,
            moves: 0,
            ..Limits::NONE
        },
        ..Search::ONE_PAGE
    };
    search.finds(Mutation::ForgetDecline, &[NOT_STUCK]);
}

#[test]
fn a_home_that_overlooks_a_decline_would_lose_the_owner() {
    let search = Search {
        holds: true,
        limits: Limits {
            prefetches: 1,
            moves: 0,
            ..Limits::NONE
        },
        ..Search::ONE_PAGE
    };
    search.finds(Mutation::IgnoreDecline, &[NOTHING_WRONG, NOT_STUCK]);
}

#[test]
fn two_nodes_are_coherent_whatever_is_pushed() {
    for holds in [false, true] {
        Search {
            nodes: 2,
            holds,
            ..Search::ONE_PAGE.with_pushes(3)
        }
        .check();
    }
}

/// It once was not: a write-back was still on its way when its sender was given the page again.
#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn three_nodes_are_coherent_with_pages_pushed_between_evictions_and_moves() {
    let limits = Limits {
        reads: 2,
        writes: 2,
        evictions: 2,
        moves: 0,
        pushes: 1,
        prefetches: 0,
        deaths: 0,
    };
    let moving = Limits {
        reads: 1,
        evictions: 1,
        moves: 1,
        ..limits
    };
    for limits in [limits, moving] {
        Search {
            limits,
            ..Search::ONE_PAGE
        }
        .check();
    }
}

#[test]
fn a_home_that_does_not_wait_for_a_pushed_page_would_take_an_older_write_back() {
    let limits = Limits {
        reads: 2,
        writes: 2,
        evictions: 2,
        moves: 0,
        pushes: 1,
        prefetches: 0,
        deaths: 0,
    };
    let search = Search {
        limits,
        ..Search::ONE_PAGE
    };
    search.finds(Mutation::IgnoreDone, &[FRESH_READS]);
}

#[test]
fn readers_that_do_not_answer_for_a_copy_would_read_old_data() {
    let search = Search::ONE_PAGE.without_moves();
    search.finds(Mutation::KeepInvalidated, &[SINGLE_WRITERS, FRESH_READS]);
}

#[test]
fn a_writer_that_ignores_acks_would_be_in_among_readers() {
    let search = Search::ONE_PAGE.without_moves();
    search.finds(Mutation::IgnoreAcks, &[SINGLE_WRITERS, FRESH_READS]);
}

#[test]
fn a_home_that_ignores_done_would_overtake_its_own_transactions() {
    let search = Search::ONE_PAGE.without_moves();
    search.finds(
        Mutation::IgnoreDone,
        &[SINGLE_WRITERS, NOT_STUCK, NOTHING_WRONG],
    );
}

#[test]
fn a_page_sent_while_it_can_be_written_would_be_stale() {
    let search = Search::ONE_PAGE.without_moves();
    search.finds(Mutation::SkipProtect, &[FRESH_READS, KNOWN_MAPPINGS]);
}

#[test]
fn a_home_that_moves_without_a_fence_would_overtake_its_grants() {
    let search = Search::ONE_PAGE.with_moves(1);
    search.finds(Mutation::SkipFence, &[SINGLE_WRITERS, NOT_STUCK]);
}

#[test]
fn a_directory_sent_to_two_nodes_would_have_two_homes() {
    Search::ONE_PAGE
        .with_moves(1)
        .finds(Mutation::CopyDirectory, &[SINGLE_HOME]);
}

#[test]
fn a_stale_write_back_if_accepted_would_undo_a_write() {
    Search::ONE_PAGE
        .without_moves()
        .finds(Mutation::AcceptStaleWriteBack, &[FRESH_READS]);
}

#[test]
fn an_owner_that_drops_a_page_before_the_answer_would_lose_it() {
    let search = Search::ONE_PAGE.without_moves();
    search.finds(Mutation::DropOnWriteBack, &[FRESH_READS, NOTHING_WRONG]);
}

#[test]
fn a_forgotten_hold_would_leave_a_requester_waiting() {
    let search = Search {
        holds: true,
        ..Search::ONE_PAGE.without_moves()
    };
    search.finds(Mutation::ForgetDeferred, &[NOT_STUCK]);
}

#[test]
fn messages_that_overtake_each_other_would_break_the_protocol() {
    let search = Search::ONE_PAGE.without_moves();
    search.finds(Mutation::Reorder, &[SINGLE_WRITERS, FRESH_READS]);
}

/// A small cluster in which nodes die.
const MORTAL: Search = Search {
    limits: Limits {
        reads: 1,
        writes: 2,
        evictions: 1,
        moves: 0,
        pushes: 0,
        prefetches: 0,
        deaths: 1,
    },
    ..Search::ONE_PAGE
};

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn survivors_of_a_death_go_on_with_what_they_hold() {
    for (expulsions, homeless) in [(false, false), (true, false), (false, true)] {
        Search {
            expulsions,
            homeless,
            ..MORTAL
        }
        .check();
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn survivors_of_a_death_around_a_move_go_on_with_what_they_hold() {
    let limits = Limits {
        reads: 1,
        writes: 1,
        evictions: 0,
        moves: 1,
        ..MORTAL.limits
    };
    Search { limits, ..MORTAL }.check();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn a_death_during_recovery_begins_it_anew() {
    let limits = Limits {
        reads: 1,
        writes: 1,
        evictions: 0,
        deaths: 2,
        ..MORTAL.limits
    };
    Search { limits, ..MORTAL }.check();
}

#[test]
fn survivors_that_do_not_flush_would_take_an_old_answer_for_a_new_one() {
    MORTAL.finds(Mutation::SkipFlush, &[NOTHING_WRONG]);
}

#[test]
fn survivors_that_hide_what_they_hold_would_lose_it() {
    MORTAL.finds(Mutation::HideHoldings, &[NOTHING_WRONG]);
}

#[test]
fn a_home_that_takes_lost_pages_for_untouched_would_show_zeros() {
    MORTAL.finds(Mutation::ForgetLosses, &[FRESH_READS]);
}

#[test]
fn homes_named_before_all_have_flushed_would_be_two() {
    let limits = Limits {
        reads: 1,
        writes: 1,
        evictions: 0,
        moves: 1,
        ..MORTAL.limits
    };
    let search = Search { limits, ..MORTAL };
    search.finds(Mutation::NameEarly, &[SINGLE_HOME]);
}
