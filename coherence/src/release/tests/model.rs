//! Exhaustive search of what small clusters can do (stateright): every order in which processes go
//! on, messages arrive (in order between two nodes, in any order otherwise) and pages are evicted.

use stateright::{Checker, Model, Property};

use super::cluster::{Cluster, Mutation, Op, STALE_READ, Step, Variable};

/// What is searched.
#[derive(Clone, Debug)]
struct Search {
    name: &'static str,
    programs: Vec<Vec<Op>>,
    pages: usize,
    semaphores: Vec<u32>,
    home: usize,
    /// Whether the coordinator has to be asked for the home.
    found: bool,
    /// Whether the home has touched all pages before.
    touched: bool,
    evictions: u8,
    /// Whether the segment is durable.
    durable: bool,
    /// Nodes that may die: then it is.
    deaths: u8,
    mutation: Option<Mutation>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    cluster: Cluster,
    evictions: u8,
    deaths: u8,
}

const SEQUENTIAL: &str = "reads show what sequential consistency shows";
const NOT_STUCK: &str = "every program comes to its end";
const NOTHING_WRONG: &str = "no impossible message and no impossible action";

impl Model for Search {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let Self { pages, home, .. } = *self;
        let mut cluster = match self.durable {
            true => Cluster::durable(&self.programs, pages, &self.semaphores, home),
            false => Cluster::new(&self.programs, pages, &self.semaphores, home, self.found),
        };
        cluster.mutation = self.mutation;
        if self.touched {
            cluster.touch_all();
        }
        let &Self {
            evictions, deaths, ..
        } = self;
        vec![State {
            cluster,
            evictions,
            deaths,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.cluster.wrong.is_none() {
            steps.extend(state.cluster.steps(state.evictions > 0));
            if state.deaths > 0 {
                steps.extend(state.cluster.mortals().into_iter().map(Step::Die));
            }
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        if let Step::Evict(..) = step {
            next.evictions -= 1;
        }
        if let Step::Die(_) = step {
            next.deaths -= 1;
        }
        next.cluster.take(step);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SEQUENTIAL, |_, s: &State| {
                s.cluster.wrong != Some(STALE_READ)
            }),
            Property::always(NOTHING_WRONG, |_, s: &State| {
                s.cluster.wrong.is_none_or(|wrong| wrong == STALE_READ)
            }),
            Property::always(NOT_STUCK, |_, s: &State| {
                s.cluster.wrong.is_some()
                    || !s.cluster.steps(false).is_empty()
                    || !s.cluster.is_stuck()
            }),
        ]
    }
}

impl Search {
    /// # Panics
    ///
    /// If a property does not hold.
    fn check(self) {
        let started = std::time::Instant::now();
        let Self {
            name,
            evictions,
            deaths,
            ..
        } = self;
        let nodes = self.programs.len();
        let checker = self.checker().spawn_bfs().join();
        println!(
            "{} states, depth {}, {:.1?}: {nodes} nodes, {evictions} evictions, {deaths} deaths, {name}",
            checker.unique_state_count(),
            checker.max_depth(),
            started.elapsed(),
        );
        checker.assert_properties();
    }

    fn with_evictions(self, evictions: u8) -> Self {
        Self { evictions, ..self }
    }

    /// The segment is durable, and so many nodes die, one after the other.
    fn with_deaths(self, deaths: u8) -> Self {
        Self {
            deaths,
            durable: true,
            ..self
        }
    }

    fn with_home(self, home: usize) -> Self {
        Self { home, ..self }
    }

    /// All pages have been touched by their first home, and so are not lent at once.
    fn touched(self) -> Self {
        Self {
            touched: true,
            ..self
        }
    }

    /// # Panics
    ///
    /// If no run of the broken protocol has a wrong read.
    fn finds(self, mutation: Mutation) {
        let broken = Self {
            mutation: Some(mutation),
            ..self
        };
        let path = broken
            .checker()
            .spawn_bfs()
            .join()
            .assert_any_discovery(SEQUENTIAL);
        let steps = path.into_actions();
        println!(
            "{mutation:?} is found after {} steps: {steps:?}",
            steps.len()
        );
    }
}

const fn at(page: usize, byte: usize) -> Variable {
    Variable { page, byte }
}

const X: Variable = at(0, 0);
const Y: Variable = at(0, 1);
const W: Variable = at(0, 2);
const Z: Variable = at(1, 0);

/// A search of these programs, with the home at node 0.
fn search(name: &'static str, programs: Vec<Vec<Op>>, semaphores: &[u32]) -> Search {
    Search {
        name,
        programs,
        pages: 2,
        semaphores: semaphores.to_vec(),
        home: 0,
        found: false,
        touched: false,
        evictions: 0,
        durable: false,
        deaths: 0,
        mutation: None,
    }
}

/// Each in turn, under a lock, looks at a variable and changes it.
fn guarded(nodes: usize, rounds: usize) -> Search {
    let program = |node: usize| {
        let round = |round: usize| {
            // Values come back.
            let value = ((node + round) % 2) as u8;
            [Op::Wait(0), Op::Read(X), Op::Write(X, value), Op::Post(0)]
        };
        (0..rounds).flat_map(round).collect()
    };
    search(
        "a guarded variable",
        (0..nodes).map(program).collect(),
        &[1],
    )
}

/// All write to their own variable of one page, and look at the others' after a barrier.
fn barriers(nodes: usize, rounds: usize) -> Search {
    let program = |node: usize| {
        let round = |round: usize| {
            let own = Op::Write(at(0, node), ((round + 1) % 2) as u8);
            let neighbour = Op::Read(at(0, (node + 1) % nodes));
            [own, Op::Barrier, neighbour, Op::Barrier]
        };
        (0..rounds).flat_map(round).collect()
    };
    search("false sharing", (0..nodes).map(program).collect(), &[])
}

/// What one writes another sees that has synchronised with a third.
fn chain() -> Search {
    let programs = vec![
        vec![
            Op::Read(X),
            Op::Post(2),
            Op::Wait(1),
            Op::Read(X),
            Op::Read(Z),
        ],
        vec![Op::Wait(2), Op::Write(X, 1), Op::Post(0)],
        vec![Op::Read(Y), Op::Wait(0), Op::Write(Z, 1), Op::Post(1)],
    ];
    search("a chain", programs, &[0, 0, 0])
}

/// A variable changes and changes back, while another node comes for its neighbour; then the two
/// change sides.
fn there_and_back(writer: usize) -> Search {
    let mut programs = vec![
        vec![
            Op::Read(W),
            Op::Write(X, 1),
            Op::Write(X, 0),
            Op::Post(0),
            Op::Wait(1),
            Op::Write(X, 0),
            Op::Post(2),
        ],
        vec![
            Op::Read(Y),
            Op::Write(Y, 1),
            Op::Wait(0),
            Op::Read(X),
            Op::Write(X, 1),
            Op::Post(1),
            Op::Wait(2),
            Op::Read(X),
            Op::Read(Y),
        ],
    ];
    if writer == 1 {
        programs.reverse();
    }
    search("there and back", programs, &[0, 0, 0])
}

/// A third node has a copy that is old when the two others change the page in turns and change it
/// back.
fn onlooker() -> Search {
    let programs = vec![
        vec![
            Op::Write(at(0, 3), 1),
            Op::Post(2),
            Op::Wait(0),
            Op::Write(X, 0),
            Op::Post(1),
        ],
        vec![Op::Write(X, 1), Op::Post(0), Op::Write(Y, 1)],
        vec![Op::Read(W), Op::Wait(1), Op::Read(X)],
    ];
    search("an onlooker", programs, &[0, 0, 0])
}

/// A page changes again while it is fetched, unasked, for its first change.
fn twice() -> Search {
    let programs = vec![
        vec![Op::Write(X, 1), Op::Barrier, Op::Write(X, 0), Op::Barrier],
        vec![Op::Read(W), Op::Barrier, Op::Barrier, Op::Read(X)],
    ];
    search("two changes", programs, &[])
}

/// A node looks at what it has itself written.
fn alone() -> Search {
    let programs = vec![vec![Op::Read(W)], vec![Op::Write(X, 1), Op::Read(X)]];
    search("one's own", programs, &[])
}

/// A page moves to the only one who writes it. When it has moved, another writes it, and it moves back; a
/// third, if there is one, looks on.
fn loan(nodes: usize) -> Search {
    let mut programs = vec![
        vec![
            Op::Read(W),
            Op::Wait(0),
            Op::Wait(0),
            Op::Wait(0),
            Op::Read(Y),
            Op::Read(X),
            Op::Write(X, 0),
            Op::Post(1),
        ],
        vec![
            Op::Write(X, 1),
            Op::Post(0),
            Op::Write(X, 2),
            Op::Post(0),
            Op::Write(Y, 1),
            Op::Post(0),
            Op::Wait(1),
            Op::Read(X),
            Op::Post(2),
        ],
        vec![Op::Read(W), Op::Wait(2), Op::Read(X)],
    ];
    programs.truncate(nodes);
    search("a loan", programs, &[0, 0, 0]).touched()
}

/// One writes a page again and again, while another has written to it once.
fn neighbour() -> Search {
    let programs = vec![
        vec![Op::Wait(0), Op::Read(Y)],
        vec![Op::Write(X, 1), Op::Post(1), Op::Write(X, 0), Op::Post(1)],
        vec![Op::Write(Y, 1), Op::Post(0)],
    ];
    search("a neighbour", programs, &[0, 0]).touched()
}

#[test]
fn guarded_variables_are_sequentially_consistent() {
    guarded(2, 3).check();
    guarded(2, 2).with_evictions(2).check();
    guarded(3, 1).check();
    guarded(3, 1).with_home(2).with_evictions(1).check();
}

#[test]
fn false_sharing_between_barriers_is_sequentially_consistent() {
    barriers(2, 3).check();
    barriers(2, 2).with_evictions(2).check();
    barriers(3, 1).check();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn false_sharing_of_three_nodes_with_evictions_is_sequentially_consistent() {
    barriers(3, 1).touched().with_evictions(1).check();
}

#[test]
fn synchronisation_is_transitive() {
    for home in 0..3 {
        chain().with_home(home).check();
    }
    chain().with_evictions(1).check();
}

#[test]
fn writes_that_are_undone_are_sequentially_consistent() {
    for writer in 0..2 {
        there_and_back(writer).check();
        there_and_back(writer).with_evictions(2).check();
        let found = true;
        Search {
            found,
            ..there_and_back(writer)
        }
        .check();
    }
    for home in 0..3 {
        onlooker().with_home(home).check();
    }
    twice().with_evictions(2).check();
    alone().with_evictions(2).check();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn onlookers_of_evictions_see_what_sequential_consistency_shows() {
    onlooker().touched().with_home(2).with_evictions(1).check();
}

#[test]
fn pages_that_are_lent_are_sequentially_consistent() {
    loan(2).check();
    loan(2).with_evictions(2).check();
    for home in 0..3 {
        loan(3).with_home(home).check();
    }
    neighbour().check();
    neighbour().with_home(1).check();
}

#[test]
fn a_page_that_is_gone_must_not_be_taken() {
    loan(2).with_evictions(1).finds(Mutation::TakeDropped);
}

#[test]
fn a_page_must_not_be_offered_to_a_node_whose_copy_is_old() {
    neighbour().finds(Mutation::OfferToAny);
}

#[test]
fn a_manager_that_forgets_a_loan_would_serve_what_it_has_not() {
    loan(3).with_home(2).finds(Mutation::ForgetLoan);
}

#[test]
fn a_page_that_comes_back_without_its_changes_would_be_old() {
    loan(2).finds(Mutation::ReturnOld);
}

#[test]
fn a_borrower_that_does_not_wait_would_leave_its_manager_with_an_old_copy() {
    loan(2).finds(Mutation::TakeAtOnce);
}

#[test]
fn a_release_that_does_not_wait_would_be_overtaken() {
    chain().finds(Mutation::IgnoreMerged);
}

#[test]
fn a_node_that_hears_of_no_writes_would_keep_its_copy() {
    chain().with_home(1).finds(Mutation::NoNotices);
    guarded(2, 2).finds(Mutation::NoNotices);
}

#[test]
fn notices_after_the_call_would_be_too_late() {
    guarded(2, 2).finds(Mutation::LateNotices);
}

#[test]
fn a_copy_from_before_the_change_would_be_old() {
    twice().finds(Mutation::TakeOldCopies);
}

#[test]
fn a_dirty_page_must_not_just_be_dropped() {
    barriers(2, 2)
        .with_evictions(1)
        .finds(Mutation::LoseDropped);
}

#[test]
fn a_page_that_was_evicted_has_to_be_told_of_later() {
    onlooker().with_evictions(1).finds(Mutation::ForgetEvicted);
}

#[test]
fn a_home_whose_twin_is_not_what_it_sent_would_miss_a_write_that_is_undone() {
    there_and_back(0)
        .with_evictions(1)
        .finds(Mutation::KeepTwinAtFetch);
}

#[test]
fn a_diff_with_the_whole_page_would_undo_what_others_wrote() {
    barriers(2, 2).finds(Mutation::WholePages);
}

#[test]
fn messages_that_overtake_each_other_would_break_the_protocol() {
    alone().with_evictions(1).finds(Mutation::Reorder);
}

/// One hands a variable to another under a lock, while a third has copies.
fn handed_over() -> Search {
    let programs = vec![
        vec![Op::Wait(0), Op::Write(X, 1), Op::Post(0)],
        vec![Op::Wait(0), Op::Read(X), Op::Write(X, 2), Op::Post(0)],
        vec![Op::Read(Y), Op::Wait(0), Op::Read(X), Op::Post(0)],
    ];
    search("handed over", programs, &[1])
}

/// Two write to one page and tell a third, who looks twice.
fn told() -> Search {
    let programs = vec![
        vec![Op::Write(X, 1), Op::Post(0)],
        vec![Op::Write(Y, 1), Op::Post(1)],
        vec![
            Op::Wait(0),
            Op::Read(X),
            Op::Wait(1),
            Op::Read(Y),
            Op::Read(X),
        ],
    ];
    search("told", programs, &[0, 0])
}

/// Before it releases, a node writes a value and undoes that.
fn undone() -> Search {
    let programs = vec![
        vec![
            Op::Write(X, 1),
            Op::Post(0),
            Op::Write(X, 2),
            Op::Write(X, 1),
            Op::Post(0),
        ],
        vec![Op::Read(Y)],
        vec![Op::Wait(0), Op::Wait(0), Op::Read(X)],
    ];
    search("undone", programs, &[0])
}

#[test]
fn durable_segments_are_sequentially_consistent() {
    guarded(2, 2).with_deaths(0).with_evictions(1).check();
    barriers(2, 2).with_deaths(0).check();
    there_and_back(0).with_deaths(0).with_evictions(1).check();
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes long where it is not optimised")]
fn what_was_released_outlives_any_node() {
    for home in 0..3 {
        handed_over().with_home(home).with_deaths(1).check();
        told().with_home(home).with_deaths(1).check();
        undone().with_home(home).with_deaths(1).check();
    }
}

#[test]
fn a_release_that_does_not_wait_for_the_backup_would_be_lost() {
    told().with_deaths(1).finds(Mutation::IgnoreBackup);
}

#[test]
fn what_a_dead_home_has_not_merged_its_successor_must_be_told() {
    told().with_deaths(1).finds(Mutation::ForgetOrphans);
}
