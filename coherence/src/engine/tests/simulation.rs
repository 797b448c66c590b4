//! Random runs of whole clusters, checked after every step and again when they have come to
//! rest.

use migshm_protocol::page::Access;

use super::Random;
use super::cluster::{Cluster, EXTENT, Fate, Host, node, page};
use crate::{Counters, Input, Time};

#[test]
fn random_runs_stay_coherent_and_come_to_rest() {
    let mut seen = Counters::default();
    for seed in 0..1_500 {
        for host in run(seed, 600, 0).hosts {
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

#[test]
fn random_runs_in_which_nodes_die_stay_coherent_and_come_to_rest() {
    let (mut deaths, mut lost, mut kept) = (0, 0, 0);
    for seed in 0..3_000 {
        let cluster = run(seed, 300, 4);
        let members = cluster.hosts.iter().filter(|host| host.is_member());
        deaths += cluster.hosts.len() - members.clone().count();
        for host in members.filter(|host| host.engine.is_home(EXTENT)) {
            let state = host.engine.extent(EXTENT).expect("it is the home");
            let directory = state.directory.as_ref().expect("it is the home");
            lost += directory.lost().count();
            kept += directory.touched().count();
        }
    }
    let counts = [deaths, lost, kept];
    assert!(counts.iter().all(|&count| count > 1_000), "{counts:?}");
}

/// One run, in which so many nodes die at most; everything about it follows from the seed.
fn run(seed: u64, steps: usize, deaths: usize) -> Cluster {
    let random = &mut Random(seed);
    let nodes = 2 + random.below(7);
    let pages = 1 + random.below(5);
    let default_home = (random.below(2) == 0).then(|| node(random.below(nodes)));
    let hold = [0, 100_000][random.below(2)];
    let mut cluster = Cluster::new(nodes, pages, default_home, hold);
    if let Some(home) = default_home {
        (0..random.below(pages + 1)).for_each(|index| cluster.preload(home.0.into(), index));
    }
    cluster.slow_words = deaths > 0;
    let mut deaths = deaths.min(nodes - 1);
    // How many steps of ten are deliveries: few of them keep many messages under way.
    let deliveries = 4 + random.below(5);
    let mut now = 1_000_000;
    for _ in 0..steps {
        now += random.below(20_000) as Time;
        let at = random.below(nodes);
        let index = random.below(pages);
        if random.below(10) < deliveries {
            settle_one(&mut cluster, random, now);
        } else if !cluster.hosts[at].is_member() {
            continue;
        } else if deaths > 0 && random.below(60) == 0 {
            deaths -= 1;
            cluster.lose(at, [Fate::Dead, Fate::Expelled][random.below(2)]);
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
        if cluster.hosts[at].fate != Fate::Dead
            && cluster.hosts[at]
                .engine
                .next_timeout()
                .is_some_and(|due| due <= now)
        {
            return cluster.end_holds(now, at);
        }
    }
    let channels: Vec<usize> = cluster.busy_channels().collect();
    let with = |waits: fn(&Host) -> bool| -> Vec<usize> {
        let hosts = 0..cluster.hosts.len();
        hosts.filter(|&at| waits(&cluster.hosts[at])).collect()
    };
    let asking = with(|host| !host.answers.is_empty());
    let telling = with(|host| !host.said.is_empty());
    let all = channels.len() + asking.len() + telling.len();
    if all == 0 {
        return;
    }
    let choice = random.below(all);
    if let Some(&channel) = channels.get(choice) {
        cluster.deliver(now, channel);
    } else if let Some(&at) = asking.get(choice - channels.len()) {
        cluster.answer(now, at);
    } else {
        cluster.hear(telling[choice - channels.len() - asking.len()]);
    }
}
