//! Random programs without data races on larger clusters, in random runs to their end.

use super::cluster::{Cluster, Op, PAGE_SIZE, Step, Variable};
use crate::engine::tests::Random;

/// A program for each node: phases between barriers, in each of which every variable has one node
/// that may write it, or a lock that guards it.
fn programs(random: &mut Random, nodes: usize, pages: usize, locks: usize) -> Vec<Vec<Op>> {
    let mut programs = vec![Vec::new(); nodes];
    let variables: Vec<Variable> = (0..pages)
        .flat_map(|page| (0..PAGE_SIZE).map(move |byte| Variable { page, byte }))
        .collect();
    // The first variables are guarded, each by the lock of its number.
    let (guarded, free) = variables.split_at(locks);
    for _ in 0..2 + random.below(4) {
        let owners: Vec<usize> = free.iter().map(|_| random.below(nodes + 1)).collect();
        for (node, program) in programs.iter_mut().enumerate() {
            for _ in 0..random.below(8) {
                let at = random.below(free.len());
                // What nobody writes in this phase all may read.
                if owners[at] == node {
                    program.push(Op::Write(free[at], random.below(2) as u8));
                    program.push(Op::Read(free[at]));
                } else if owners[at] == nodes {
                    program.push(Op::Read(free[at]));
                }
                if random.below(3) == 0 && locks > 0 {
                    let lock = random.below(locks);
                    let value = random.below(2) as u8;
                    let variable = guarded[lock];
                    program.push(Op::Wait(lock));
                    program.push(Op::Read(variable));
                    program.push(Op::Write(variable, value));
                    program.push(Op::Post(lock));
                }
            }
            program.push(Op::Barrier);
        }
    }
    programs
}

#[test]
fn random_programs_see_what_sequential_consistency_would_show() {
    let mut seen = crate::release::ReleaseCounters::default();
    for seed in 0..3_000 {
        let random = &mut Random(seed);
        let nodes = 2 + random.below(7);
        let pages = 1 + random.below(4);
        let locks = random.below(3);
        let programs = programs(random, nodes, pages, locks);
        let found = random.below(3) == 0;
        let home = random.below(nodes);
        let mut cluster = Cluster::new(&programs, pages, &vec![1; locks], home, found);
        let haste = 1 + random.below(6);
        let mut evictions = random.below(60);
        while !cluster.is_done() {
            let steps = cluster.steps(evictions > 0);
            assert!(!steps.is_empty(), "seed {seed}: stuck: {cluster:?}");
            let mut step = steps[random.below(steps.len())];
            // Some runs keep many messages under way.
            for _ in 0..haste {
                if !matches!(step, Step::Run(_) | Step::Evict(..)) {
                    step = steps[random.below(steps.len())];
                }
            }
            evictions -= usize::from(matches!(step, Step::Evict(..)));
            cluster.take(step);
            assert_eq!(
                cluster.wrong, None,
                "seed {seed}, after {step:?}: {cluster:?}"
            );
        }
        for host in &cluster.hosts {
            let counters = host.engine.counters();
            seen.fetches += counters.fetches;
            seen.prefetches += counters.prefetches;
            seen.diffs += counters.diffs;
            seen.merges += counters.merges;
            seen.invalidations += counters.invalidations;
            seen.evictions += counters.evictions;
            seen.homes_taken += counters.homes_taken;
            seen.homes_returned += counters.homes_returned;
        }
    }
    let counts = [
        seen.fetches,
        seen.prefetches,
        seen.diffs,
        seen.merges,
        seen.invalidations,
        seen.evictions,
        seen.homes_taken,
        seen.homes_returned,
    ];
    println!("{seen:?}");
    assert!(
        counts.iter().all(|&count| count > 1_000),
        "hardly tried: {seen:?}"
    );
}

#[test]
fn random_programs_lose_nothing_that_was_released_to_deaths() {
    let (mut deaths, mut promotions) = (0, 0);
    for seed in 0..3_000 {
        let random = &mut Random(seed);
        let nodes = 3 + random.below(4);
        let pages = 1 + random.below(4);
        let locks = random.below(3);
        let programs = programs(random, nodes, pages, locks);
        let home = random.below(nodes);
        let mut cluster = Cluster::durable(&programs, pages, &vec![1; locks], home);
        let mut evictions = random.below(60);
        let mut mortals = random.below(nodes - 1);
        while !cluster.is_done() {
            let steps = cluster.steps(evictions > 0);
            let may_die = cluster.mortals();
            if mortals > 0 && !may_die.is_empty() && random.below(40) == 0 {
                cluster.take(Step::Die(may_die[random.below(may_die.len())]));
                mortals -= 1;
                deaths += 1;
                continue;
            }
            if steps.is_empty() {
                assert!(!cluster.is_stuck(), "seed {seed}: stuck: {cluster:?}");
                break;
            }
            let step = steps[random.below(steps.len())];
            evictions -= usize::from(matches!(step, Step::Evict(..)));
            cluster.take(step);
            assert_eq!(
                cluster.wrong, None,
                "seed {seed}, after {step:?}: {cluster:?}"
            );
        }
        let counters = cluster.hosts.iter().map(|host| host.engine.counters());
        promotions += counters.map(|counters| counters.promotions).sum::<u64>();
    }
    println!("{deaths} deaths, {promotions} promotions");
    assert!(promotions > 300 && deaths > 1_000, "hardly tried");
}
