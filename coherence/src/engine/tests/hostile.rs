//! Peers that send what no correct peer sends.

use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::page::{Access, Contents, DirectoryEntry, Holding, PageMessage};
use migshm_protocol::{Extent, NodeId, NodeSet, Page, SegmentId};

use super::Random;
use super::cluster::{EXTENT, SEGMENT, page};
use crate::{Action, Config, Engine, Input, Memory, PageSet};

struct NoMemory;

impl Memory for NoMemory {
    fn present(&self, _: Extent) -> PageSet {
        PageSet::new()
    }
}

#[test]
fn no_message_makes_an_engine_panic_or_address_a_node_that_cannot_exist() {
    for seed in 0..300 {
        let random = &mut Random(seed);
        let me = NodeId(1);
        let mut engine = Engine::<u8>::new(me, Config::default());
        engine.add_segment(SEGMENT, 2, (seed % 2 == 0).then_some(me));
        let mut out = Vec::new();
        for step in 0..2_000 {
            let input = match random.below(13) {
                0 => Input::Fault {
                    page: any_page(random),
                    access: any_access(random),
                },
                5 => Input::Prefetch {
                    page: any_page(random),
                    access: any_access(random),
                },
                1 => Input::Evict {
                    page: any_page(random),
                },
                2 => Input::MoveHome {
                    extent: any_extent(random),
                    to: any_node(random),
                },
                3 if random.below(2) == 0 => Input::Timeout,
                3 => Input::Push {
                    page: any_page(random),
                    access: any_access(random),
                    to: any_node(random),
                },
                4 => Input::HomeIs {
                    extent: any_extent(random),
                    home: Some(any_node(random)),
                    orphaned: random.below(2) == 0,
                },
                6 if random.below(20) == 0 => Input::View {
                    number: random.below(9) as u64,
                    members: NodeSet::from_words(&[random.below(16) as u64]).expect("small"),
                },
                6 => Input::Flush {
                    from: [NodeId(0), NodeId(2), NodeId(3)][random.below(3)],
                    view: random.below(9) as u64,
                },
                _ => Input::Message {
                    from: any_node(random),
                    message: any_message(random),
                    data: (random.below(2) == 0).then_some(1),
                },
            };
            engine.handle(step * 10_000, input, &NoMemory, &mut out);
            for action in out.drain(..) {
                if let Action::Send { to, .. } = action {
                    assert!(
                        to != me && usize::from(to.0) < MAX_NODES,
                        "seed {seed}: sent to {to}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_is_ignored_and_counted() {
    let mut engine = Engine::<u8>::new(NodeId(1), Config::default());
    engine.add_segment(SEGMENT, 1, Some(NodeId(1)));
    let page = page(0);
    let messages = [
        PageMessage::Done { page },
        PageMessage::InvalidateAck { page },
        PageMessage::WriteBackAck {
            page,
            accepted: true,
        },
        PageMessage::FenceAck { extent: EXTENT },
        PageMessage::Done {
            page: Page { index: 1, ..page },
        },
        PageMessage::Invalidate {
            page,
            requester: NodeId(MAX_NODES as u16),
        },
    ];
    let count = messages.len() as u64;
    let mut out = Vec::new();
    for message in messages {
        let input = Input::Message {
            from: NodeId(2),
            message,
            data: None,
        };
        engine.handle(0, input, &NoMemory, &mut out);
    }
    assert_eq!(out, []);
    assert_eq!(engine.counters().protocol_errors, count);
}

#[test]
fn messages_about_a_removed_segment_have_no_effect() {
    let mut engine = Engine::<u8>::new(NodeId(1), Config::default());
    engine.add_segment(SEGMENT, 1, Some(NodeId(2)));
    let mut out = Vec::new();
    let fault = Input::Fault {
        page: page(0),
        access: Access::Read,
    };
    engine.handle(0, fault, &NoMemory, &mut out);
    engine.remove_segment(SEGMENT);
    out.clear();
    let (page, contents, home) = (page(0), Contents::Zeros, NodeId(2));
    let access = Access::Write;
    let message = PageMessage::Grant {
        page,
        access,
        acks: 0,
        contents,
        home,
        confirm: false,
        pushed: false,
    };
    let grant = Input::Message {
        from: NodeId(2),
        message,
        data: None,
    };
    engine.handle(0, grant, &NoMemory, &mut out);
    assert_eq!(out, []);
    assert_eq!(engine.access(page), None);
    assert_eq!(engine.counters().unknown_segment, 1);
}

fn any_message(random: &mut Random) -> PageMessage {
    let page = any_page(random);
    let extent = any_extent(random);
    let access = any_access(random);
    let requester = any_node(random);
    let acks = random.below(3) as u16;
    let flag = random.below(2) == 0;
    match random.below(17) {
        0 => PageMessage::Request {
            page,
            access,
            requester,
            has_copy: flag,
            prefetch: random.below(2) == 0,
        },
        1 => PageMessage::Forward {
            page,
            access,
            requester,
            acks,
            pushed: flag,
            prefetch: flag,
        },
        2 => PageMessage::Invalidate { page, requester },
        3 => {
            let contents = [Contents::Bytes, Contents::Zeros, Contents::Yours][random.below(3)];
            PageMessage::Grant {
                page,
                access,
                acks,
                contents,
                home: requester,
                confirm: flag,
                pushed: random.below(2) == 0,
            }
        }
        4 => PageMessage::InvalidateAck { page },
        5 => PageMessage::Done { page },
        6 => PageMessage::WriteBack {
            page,
            owner: requester,
        },
        7 => PageMessage::WriteBackAck {
            page,
            accepted: flag,
        },
        8 => PageMessage::Fence { extent },
        9 => PageMessage::FenceAck { extent },
        10 => PageMessage::Push {
            page,
            access,
            to: requester,
        },
        11 => PageMessage::Decline { page, requester },
        12 => PageMessage::Relinquish {
            page,
            sharer: requester,
        },
        13 => PageMessage::Survey { extent },
        14 => {
            let holding = |random: &mut Random| Holding {
                first: [0, 1, 2, u16::MAX][random.below(4)],
                count: [0, 1, 2, u16::MAX][random.below(4)],
                access: any_access(random),
            };
            let pages = (0..random.below(3)).map(|_| holding(random)).collect();
            PageMessage::Holdings { extent, pages }
        }
        15 => PageMessage::Lost { page },
        _ => {
            let entry = |random: &mut Random| DirectoryEntry {
                page: [0, 1, 2, u16::MAX][random.below(4)],
                owner: (random.below(4) > 0).then(|| any_node(random)),
                sharers: NodeSet::from_words(&[random.below(8) as u64]).expect("small"),
            };
            let entries = (0..random.below(3)).map(|_| entry(random)).collect();
            PageMessage::HomeTransfer { extent, entries }
        }
    }
}

fn any_page(random: &mut Random) -> Page {
    let segment = [SEGMENT, SEGMENT, SEGMENT, SegmentId(0)][random.below(4)];
    Page {
        segment,
        index: [0, 0, 1, 1, 2, u32::MAX][random.below(6)],
    }
}

fn any_extent(random: &mut Random) -> Extent {
    Extent {
        index: [0, 0, 0, 1, u32::MAX][random.below(5)],
        ..EXTENT
    }
}

fn any_access(random: &mut Random) -> Access {
    [Access::Read, Access::Write][random.below(2)]
}

fn any_node(random: &mut Random) -> NodeId {
    NodeId([0, 1, 2, 3, 1023, 1024, u16::MAX][random.below(7)])
}
