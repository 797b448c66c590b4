//! What users of the engine can rely on, one run each.

use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::page::{Access, Contents, PageMessage};

use super::cluster::{Cluster, EXTENT, Letter, node, page};
use crate::{Config, Engine, Input, Memory, PageSet, Time};

const NOW: Time = 1 << 30;
const HOLD: Time = 100 << 10;

#[test]
fn the_first_touch_even_a_read_gets_the_page_for_writing() {
    let mut cluster = Cluster::new(2, 1, Some(node(0)), 0);
    cluster.touch(NOW, 1, 0, Access::Read);
    settle(&mut cluster);
    assert!(cluster.touch(NOW, 1, 0, Access::Write));
}

#[test]
fn what_a_node_wrote_while_alone_is_its_own_and_others_read_it() {
    let mut cluster = Cluster::new(2, 2, Some(node(0)), 0);
    cluster.preload(0, 1);
    cluster.touch(NOW, 1, 1, Access::Read);
    settle(&mut cluster);
    assert!(cluster.touch(NOW, 1, 1, Access::Read));
    assert_eq!(cluster.hosts[1].frames[1].contents, Some(1));
    assert_eq!(cluster.hosts[0].engine.access(page(1)), Some(Access::Read));
}

#[test]
fn a_writer_that_has_a_copy_gets_no_bytes() {
    let mut cluster = Cluster::new(3, 1, Some(node(0)), 0);
    for (at, access) in [(1, Access::Write), (2, Access::Read)] {
        cluster.touch(NOW, at, 0, access);
        settle(&mut cluster);
    }
    cluster.touch(NOW, 2, 0, Access::Write);
    let sent = settle(&mut cluster);
    let yours = |m: &PageMessage| {
        matches!(
            m,
            PageMessage::Grant {
                contents: Contents::Yours,
                ..
            }
        )
    };
    assert!(sent.iter().any(yours), "{sent:?}");
    assert!(
        !sent
            .iter()
            .any(|m| matches!(m, PageMessage::Forward { .. })),
        "{sent:?}"
    );
    assert_eq!(cluster.hosts[1].frames[0].access, None);
}

#[test]
fn a_page_of_the_home_s_own_takes_two_messages() {
    let mut cluster = Cluster::new(2, 1, Some(node(0)), 0);
    cluster.touch(NOW, 0, 0, Access::Write);
    cluster.touch(NOW, 1, 0, Access::Read);
    let sent = settle(&mut cluster);
    assert!(
        matches!(
            sent[..],
            [PageMessage::Request { .. }, PageMessage::Grant { .. }]
        ),
        "{sent:?}"
    );
}

#[test]
fn a_granted_page_stays_until_its_hold_ends() {
    let mut cluster = Cluster::new(2, 1, Some(node(0)), HOLD);
    cluster.touch(NOW, 0, 0, Access::Write);
    cluster.touch(NOW, 1, 0, Access::Write);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[0].frames[0].access, Some(Access::Write));
    assert_eq!(cluster.hosts[0].engine.next_timeout(), Some(NOW + HOLD));
    assert_eq!(cluster.hosts[0].engine.counters().hold_deferrals, 1);

    cluster.end_holds(NOW + HOLD - 1, 0);
    assert_eq!(cluster.hosts[0].frames[0].access, Some(Access::Write));
    cluster.end_holds(NOW + HOLD, 0);
    assert_eq!(cluster.hosts[0].frames[0].access, None);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[1].frames[0].access, Some(Access::Write));
}

#[test]
fn an_evicted_page_is_kept_by_its_home() {
    let mut cluster = Cluster::new(3, 1, Some(node(0)), 0);
    cluster.touch(NOW, 1, 0, Access::Write);
    settle(&mut cluster);
    cluster.write(1, 0);
    cluster.handle(NOW, 1, Input::Evict { page: page(0) });
    settle(&mut cluster);
    assert_eq!(cluster.hosts[1].frames[0].contents, None);

    cluster.handle(NOW, 0, Input::Evict { page: page(0) });
    cluster.touch(NOW, 2, 0, Access::Read);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[2].frames[0].contents, Some(cluster.latest[0]));
}

#[test]
fn a_former_home_passes_requests_on_and_the_requester_learns_the_home() {
    let mut cluster = Cluster::new(3, 2, Some(node(0)), 0);
    cluster.handle(
        NOW,
        0,
        Input::MoveHome {
            extent: EXTENT,
            to: node(1),
        },
    );
    assert!(
        !cluster.hosts[0].engine.is_home(EXTENT),
        "nothing to move before the first touch"
    );
    cluster.touch(NOW, 0, 0, Access::Write);
    cluster.handle(
        NOW,
        0,
        Input::MoveHome {
            extent: EXTENT,
            to: node(1),
        },
    );
    settle(&mut cluster);
    assert!(cluster.hosts[1].engine.is_home(EXTENT));
    for (index, relays) in [(0, 1), (1, 1)] {
        cluster.touch(NOW, 2, index, Access::Read);
        settle(&mut cluster);
        assert!(cluster.hosts[2].frames[index].access.is_some());
        assert_eq!(cluster.hosts[0].engine.counters().relays, relays);
    }
}

#[test]
fn a_move_keeps_whatever_is_asked_for_meanwhile() {
    const PAGES: usize = EXTENT_PAGES as usize;
    let mut cluster = Cluster::new(3, PAGES, Some(node(0)), 0);
    cluster.touch(NOW, 1, 0, Access::Write);
    settle(&mut cluster);
    let to = node(1);
    cluster.handle(NOW, 0, Input::MoveHome { extent: EXTENT, to });
    for index in 0..PAGES {
        cluster.touch(NOW, 2, index, Access::Write);
    }
    let requests = cluster.channel(2, 0);
    for _ in 0..PAGES {
        cluster.deliver(NOW, requests);
    }
    settle(&mut cluster);
    for index in 0..PAGES {
        let access = cluster.hosts[2].engine.access(page(index));
        assert_eq!(access, Some(Access::Write), "page {index}");
    }
}

#[test]
fn a_write_back_that_the_home_has_followed_ends_where_it_began() {
    let mut cluster = Cluster::new(2, 1, Some(node(0)), 0);
    cluster.touch(NOW, 1, 0, Access::Write);
    settle(&mut cluster);
    cluster.handle(
        NOW,
        0,
        Input::MoveHome {
            extent: EXTENT,
            to: node(1),
        },
    );
    let fence = cluster.channel(0, 1);
    cluster.deliver(NOW, fence);
    cluster.handle(NOW, 1, Input::Evict { page: page(0) });
    settle(&mut cluster);
    assert!(cluster.hosts[1].engine.is_home(EXTENT));
    assert_eq!(cluster.hosts[1].engine.access(page(0)), Some(Access::Read));
    assert!(cluster.hosts[1].frames[0].contents.is_some());
}

#[test]
fn a_prefetched_page_is_there_when_it_is_touched_and_not_held() {
    let mut cluster = Cluster::new(2, 1, Some(node(0)), HOLD);
    cluster.preload(0, 0);
    prefetch(&mut cluster, 1, Access::Read);
    settle(&mut cluster);
    assert!(cluster.touch(NOW, 1, 0, Access::Read));
    cluster.touch(NOW, 0, 0, Access::Write);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[0].frames[0].access, Some(Access::Write));
    assert_eq!(cluster.hosts[1].engine.counters().hold_deferrals, 0);
}

#[test]
fn a_prefetch_does_not_disturb_who_has_just_got_the_page() {
    for owner in [0, 1] {
        let mut cluster = Cluster::new(3, 1, Some(node(0)), HOLD);
        cluster.touch(NOW, owner, 0, Access::Write);
        settle(&mut cluster);
        prefetch(&mut cluster, 2, Access::Read);
        settle(&mut cluster);
        assert_eq!(cluster.hosts[2].engine.counters().declined, 1);
        assert_eq!(cluster.hosts[owner].frames[0].access, Some(Access::Write));
        assert!(cluster.is_quiet());
    }
}

#[test]
fn a_prefetch_for_writing_takes_no_copy_from_a_third_node() {
    let mut cluster = Cluster::new(3, 1, Some(node(0)), 0);
    for (at, access) in [(1, Access::Write), (2, Access::Read)] {
        cluster.touch(NOW, at, 0, access);
        settle(&mut cluster);
    }
    prefetch(&mut cluster, 2, Access::Write);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[2].engine.counters().declined, 1);
    assert_eq!(cluster.hosts[1].frames[0].access, Some(Access::Read));
}

#[test]
fn who_waits_for_a_declined_prefetch_is_served_and_keeps_the_page() {
    let mut cluster = Cluster::new(3, 1, Some(node(0)), HOLD);
    cluster.touch(NOW, 1, 0, Access::Write);
    settle(&mut cluster);
    prefetch(&mut cluster, 2, Access::Read);
    cluster.touch(NOW, 2, 0, Access::Write);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[2].engine.counters().declined, 1);
    cluster.end_holds(NOW + HOLD, 1);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[2].frames[0].access, Some(Access::Write));
    cluster.touch(NOW, 1, 0, Access::Read);
    settle(&mut cluster);
    assert_eq!(cluster.hosts[2].engine.counters().hold_deferrals, 1);
}

#[test]
fn a_copy_that_is_given_up_lets_the_owner_write_without_a_fault() {
    let mut cluster = Cluster::new(3, 1, Some(node(0)), 0);
    cluster.touch(NOW, 0, 0, Access::Write);
    for reader in [1, 2] {
        cluster.touch(NOW, reader, 0, Access::Read);
        settle(&mut cluster);
    }
    for (reader, access) in [(1, Access::Read), (2, Access::Write)] {
        give_up(&mut cluster, reader);
        settle(&mut cluster);
        assert_eq!(cluster.hosts[reader].frames[0].contents, None);
        assert_eq!(cluster.hosts[0].frames[0].access, Some(access));
    }
    assert!(cluster.touch(NOW, 0, 0, Access::Write));
    assert!(!cluster.touch(NOW, 1, 0, Access::Read));
    settle(&mut cluster);
    assert!(cluster.touch(NOW, 1, 0, Access::Read));
}

/// The new home would take the word that the copy is gone for one about the next copy, which the node has
/// asked for on a shorter way.
#[test]
fn a_copy_that_is_given_up_is_not_asked_for_before_the_home_knows() {
    let (old, new, reader) = (0, 1, 2);
    let mut cluster = Cluster::new(3, 2, Some(node(old)), 0);
    cluster.preload(old, 0);
    cluster.touch(NOW, reader, 0, Access::Read);
    settle(&mut cluster);
    let (extent, to) = (EXTENT, node(new));
    cluster.handle(NOW, old, Input::MoveHome { extent, to });
    settle(&mut cluster);
    // The reader still believes in the old home. What it asks for first tells it better.
    cluster.touch(NOW, reader, 1, Access::Read);
    give_up(&mut cluster, reader);
    let to_old = cluster.channel(reader, old);
    let relayed = cluster.channel(old, new);
    cluster.deliver(NOW, to_old);
    cluster.deliver(NOW, to_old);
    cluster.deliver(NOW, relayed);
    let grant = cluster.channel(new, reader);
    cluster.deliver(NOW, grant);
    assert!(cluster.touch(NOW, reader, 1, Access::Read));
    // Everything but the relayed word arrives.
    cluster.touch(NOW, reader, 0, Access::Read);
    let other = |cluster: &Cluster| cluster.busy_channels().find(|&channel| channel != relayed);
    while let Some(channel) = other(&cluster) {
        cluster.deliver(NOW, channel);
    }
    settle(&mut cluster);
    cluster.touch(NOW, old, 0, Access::Write);
    settle(&mut cluster);
    cluster.write(old, 0);
    cluster.check();
}

#[test]
fn a_fault_fails_where_no_node_has_memory() {
    struct Nothing;
    impl Memory for Nothing {
        fn present(&self, _: migshm_protocol::Extent) -> PageSet {
            PageSet::new()
        }
    }
    let mut engine = Engine::<u8>::new(node(1), Config::default());
    engine.add_segment(EXTENT.segment, 2, None);
    let mut out = Vec::new();
    for index in [0, 1] {
        let fault = Input::Fault {
            page: page(index),
            access: Access::Read,
        };
        engine.handle(NOW, fault, &Nothing, &mut out);
    }
    assert_eq!(out, [crate::Action::FindHome { extent: EXTENT }]);
    out.clear();
    engine.handle(
        NOW,
        Input::HomeIs {
            extent: EXTENT,
            home: None,
            orphaned: false,
        },
        &Nothing,
        &mut out,
    );
    assert_eq!(
        out,
        [0, 1].map(|index| crate::Action::Fail { page: page(index) })
    );
}

/// Whoever owns the page will write it next.
fn give_up(cluster: &mut Cluster, at: usize) {
    let (access, to) = (Access::Write, node(0));
    let page = page(0);
    cluster.handle(NOW, at, Input::Push { page, access, to });
}

fn prefetch(cluster: &mut Cluster, at: usize, access: Access) {
    let page = page(0);
    cluster.handle(NOW, at, Input::Prefetch { page, access });
}

/// Delivers everything; what was delivered.
fn settle(cluster: &mut Cluster) -> Vec<PageMessage> {
    let mut delivered = Vec::new();
    loop {
        let Some(channel) = cluster.busy_channels().next() else {
            break;
        };
        if let Some(Letter::Page(message, _)) = cluster.channels[channel].front() {
            delivered.push(message.clone());
        }
        cluster.deliver(NOW, channel);
        cluster.check();
    }
    delivered
}
