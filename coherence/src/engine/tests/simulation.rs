//! Random runs of whole clusters, checked after every step and again when they have come to
//! rest.

use migshm_protocol::page::Access;

use super::Random;
use super::cluster::{Cluster, EXTENT, node, page};
use crate::{Counters, Input, Time};

#[test]
fn random_runs_stay_coherent_and_come_to_rest() {
    let mut seen = Counters::default();
    for seed in 0..1_500 {
        for host in run(seed, 600).hosts {
            let counters = host.engine.counters();
            seen.forwards += counters.forwards;
            seen.invalidations += counters.invalidations;
            seen.hold_deferrals += counters.hold_deferrals;
            seen.evictions += counters.evictions;
            seen.write_backs += counters.write_backs;
            seen.home_moves += counters.home_moves;
            seen.relays += counters.relays;
            seen.pushes += counters.pushes;
            seen.relinquished += counters.relinquished;
            seen.prefetches += counters.prefetches;
            seen.declined += counters.declined;
        }
    }
    let Counters {
        forwards,
        invalidations,
        hold_deferrals,
        ..
    } = seen;
    let Counters {
        evictions,
        write_backs,
        home_moves,
        relays,
        pushes,
        relinquished,
        prefetches,
        declined,
        ..
    } = seen;
    let counts = [
        forwards,
        invalidations,
        hold_deferrals,
        evictions,
        write_backs,
        home_moves,
        relays,
        pushes,
        relinquished,
        prefetches,
        declined,
    ];
    assert!(
        counts.iter().all(|&count| count > 1_000),
        "hardly tried: {seen:?}"
    );
}

/// One run; everything about it follows from the seed.
fn run(seed: u64, steps: usize) -> Cluster {
    let random = &mut Random(seed);
    let nodes = 2 + random.below(7);
    let pages = 1 + random.below(5);
    let default_home = (random.below(2) == 0).then(|| node(random.below(nodes)));
    let hold = [0, 100_000][random.below(2)];
    let mut cluster = Cluster::new(nodes, pages, default_home, hold);
    if let Some(home) = default_home {
        (0..random.below(pages + 1)).for_each(|index| cluster.preload(home.0.into(), index));
    }
    // How many steps of ten are deliveries: few of them keep many messages under way.
    let deliveries = 4 + random.below(5);
    let mut now = 1_000_000;
    for _ in 0..steps {
        now += random.below(20_000) as Time;
        let at = random.below(nodes);
        let index = random.below(pages);
        if random.below(10) < deliveries {
            settle_one(&mut cluster, random, now);
        } else {
            match random.below(20) {
                0..8 => drop(cluster.touch(now, at, index, Access::Read)),
                8..13 => drop(cluster.touch(now, at, index, Access::Write)),
                13..15 => {
                    let access = [Access::Read, Access::Write][random.below(2)];
                    let (page, to) = (page(index), node(random.below(nodes)));
                    cluster.handle(now, at, Input::Push { page, access, to });
                }
                15..17 => {
                    let access = [Access::Read, Access::Write][random.below(2)];
                    let page = page(index);
                    cluster.handle(now, at, Input::Prefetch { page, access });
                }
                17..19 => cluster.handle(now, at, Input::Evict { page: page(index) }),
                _ => {
                    let to = node(random.below(nodes));
                    cluster.handle(now, at, Input::MoveHome { extent: EXTENT, to });
                }
            }
        }
        cluster.check();
    }
    for _ in 0..100 * steps {
        if cluster.is_quiet() {
            break;
        }
        now += 1_000;
        settle_one(&mut cluster, random, now);
        cluster.check();
    }
    assert!(cluster.is_quiet(), "seed {seed} does not come to rest");
    cluster
}

/// Delivers one message, answer or end of a hold, chosen at random, if there is any.
fn settle_one(cluster: &mut Cluster, random: &mut Random, now: Time) {
    for at in 0..cluster.hosts.len() {
        if cluster.hosts[at]
            .engine
            .next_timeout()
            .is_some_and(|due| due <= now)
        {
            return cluster.end_holds(now, at);
        }
    }
    let channels: Vec<usize> = cluster.busy_channels().collect();
    let asking: Vec<usize> = (0..cluster.hosts.len())
        .filter(|&at| !cluster.hosts[at].answers.is_empty())
        .collect();
    if channels.len() + asking.len() == 0 {
        return;
    }
    let choice = random.below(channels.len() + asking.len());
    match channels.get(choice) {
        Some(&channel) => cluster.deliver(now, channel),
        None => cluster.answer(now, asking[choice - channels.len()]),
    }
}
