//! Peers that send what no correct peer sends, and what becomes of nodes that leave.

use migshm_protocol::page::Access;
use migshm_protocol::release::{ReleaseMessage, Sent};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

use super::cluster::{Frame, Memory, PAGE_SIZE, SEGMENT, node, page};
use crate::engine::tests::Random;
use crate::release::{Action, Input, PATIENCE, Release};

fn memory(pages: usize) -> Memory {
    Memory {
        frames: vec![Frame::default(); pages],
        ..Memory::default()
    }
}

fn any_page(random: &mut Random) -> Page {
    Page {
        segment: SegmentId(6 + random.below(2) as u64),
        index: [0, 1, 2, 511, 512, u32::MAX][random.below(6)],
    }
}

fn any_node(random: &mut Random) -> NodeId {
    NodeId([0, 1, 2, 1023, 1024, u16::MAX][random.below(6)])
}

#[test]
fn no_message_makes_an_engine_panic_or_address_a_node_that_cannot_exist() {
    for seed in 0..300 {
        let random = &mut Random(seed);
        let me = node(1);
        let mut engine = Release::new(me, PAGE_SIZE);
        match seed % 4 {
            3 => engine.add_durable_segment(SEGMENT, 2),
            of => engine.add_segment(SEGMENT, 2, (of == 0).then_some(me)),
        }
        let mut memory = memory(2);
        let mut out = Vec::new();
        for _ in 0..2_000 {
            let Page { segment, index } = any_page(random);
            let number = random.below(50) as u64;
            let message = match random.below(9) {
                8 => ReleaseMessage::Replicate {
                    extent: any_page(random).extent(),
                    number,
                    first: random.below(2) == 0,
                    last: random.below(2) == 0,
                    pages: vec![(index, random.below(12) as u32)],
                },
                0 => ReleaseMessage::Fetch {
                    segment,
                    requester: any_node(random),
                    number,
                    write: random.below(2) == 0,
                    pages: vec![index, any_page(random).index],
                },
                1 => ReleaseMessage::Copies {
                    segment,
                    number,
                    pages: vec![(
                        index,
                        [Sent::Bytes, Sent::Zeros, Sent::Lent][random.below(3)],
                    )],
                },
                3 => ReleaseMessage::Taken {
                    segment,
                    number,
                    taken: vec![index],
                    refused: vec![any_page(random).index],
                },
                4 => ReleaseMessage::Recall {
                    segment,
                    pages: vec![index],
                },
                5 => ReleaseMessage::Returned {
                    page: Page { segment, index },
                    zeros: random.below(2) == 0,
                    copies: [node(random.below(3))].into_iter().collect(),
                },
                6 => ReleaseMessage::Lost {
                    segment,
                    pages: vec![(index, 2), (0, u32::MAX)],
                },
                2 => ReleaseMessage::Diffs {
                    segment,
                    number,
                    pages: vec![(index, random.below(12) as u32), (0, u32::MAX)],
                },
                _ => ReleaseMessage::Merged {
                    segment,
                    number,
                    shared: vec![index],
                    offered: vec![index],
                },
            };
            let from = any_node(random);
            let length = [0, PAGE_SIZE, random.below(12)][random.below(3)];
            let data = (0..length).map(|_| random.below(256) as u8).collect();
            let page = page(random.below(2));
            let input = match random.below(13) {
                12 => Input::BackupIs {
                    extent: any_page(random).extent(),
                    backup: [None, Some(from)][random.below(2)],
                    blank: random.below(2) == 0,
                },
                0 => Input::Fault {
                    page,
                    access: [Access::Read, Access::Write][random.below(2)],
                },
                1 => Input::Evict {
                    page: any_page(random),
                },
                2 => Input::HomeIs {
                    extent: Extent {
                        segment,
                        index: index / 512,
                    },
                    home: Some(from),
                },
                3 => Input::Release,
                4 => Input::Changed {
                    segment,
                    pages: vec![(index, 2), (0, u32::MAX)],
                },
                5 => Input::Left {
                    node: node(random.below(3)),
                },
                _ => Input::Message {
                    from,
                    message,
                    data,
                },
            };
            engine.handle(input, &mut memory, &mut out);
            for action in out.drain(..) {
                if let Action::Send { to, .. } = action {
                    assert!(to != me && to.0 < 1024, "seed {seed}: sent to {to}");
                }
            }
        }
    }
}

/// An engine of node 0, the home, one page of which node 1 has a copy.
fn home() -> (Release, Memory, Vec<Action>) {
    let mut engine = Release::new(node(0), PAGE_SIZE);
    engine.add_segment(SEGMENT, 1, Some(node(0)));
    let mut memory = memory(1);
    let mut out = Vec::new();
    let message = ReleaseMessage::Fetch {
        segment: SEGMENT,
        requester: node(1),
        number: 1,
        write: false,
        pages: vec![0],
    };
    let from = node(1);
    let data = Vec::new();
    engine.handle(
        Input::Message {
            from,
            message,
            data,
        },
        &mut memory,
        &mut out,
    );
    out.clear();
    (engine, memory, out)
}

fn release(engine: &mut Release, memory: &mut Memory) -> Vec<Action> {
    let mut out = Vec::new();
    engine.handle(Input::Release, memory, &mut out);
    out
}

#[test]
fn a_home_does_not_take_for_its_own_what_others_wrote() {
    let (mut engine, mut memory, mut out) = home();
    let (page, access) = (page(0), Access::Write);
    memory.frames[0].contents = Some([0; PAGE_SIZE]);
    engine.handle(Input::Fault { page, access }, &mut memory, &mut out);
    assert_eq!(engine.access(page), Some(Access::Write));
    let message = ReleaseMessage::Diffs {
        segment: SEGMENT,
        number: 5,
        pages: vec![(0, 3)],
    };
    let (from, data) = (node(1), vec![1, 1, 9]);
    engine.handle(
        Input::Message {
            from,
            message,
            data,
        },
        &mut memory,
        &mut out,
    );
    assert_eq!(memory.frames[0].contents.map(|bytes| bytes[0]), Some(9));
    let wrote = Vec::new();
    assert_eq!(
        release(&mut engine, &mut memory),
        [Action::Released { wrote }]
    );
    memory.frames[0].contents.as_mut().expect("it is there")[1] = 1;
    let wrote = vec![(SEGMENT, vec![(0, 1)])];
    assert_eq!(
        release(&mut engine, &mut memory),
        [Action::Released { wrote }]
    );
}

#[test]
fn a_page_that_is_written_no_more_is_protected_again() {
    let (mut engine, mut memory, mut out) = home();
    let (page, access) = (page(0), Access::Write);
    engine.handle(Input::Fault { page, access }, &mut memory, &mut out);
    for _ in 0..PATIENCE {
        assert_eq!(engine.access(page), Some(Access::Write));
        release(&mut engine, &mut memory);
    }
    assert_eq!(engine.access(page), Some(Access::Read));
    assert!(memory.frames[0].protected);
    assert!(engine.is_clean());
}

#[test]
fn nothing_waits_for_a_node_that_has_left() {
    let mut engine = Release::new(node(1), PAGE_SIZE);
    engine.add_segment(SEGMENT, 2, Some(node(0)));
    let mut memory = memory(2);
    let mut out = Vec::new();
    let access = Access::Write;
    engine.handle(
        Input::Fault {
            page: page(0),
            access,
        },
        &mut memory,
        &mut out,
    );
    let message = ReleaseMessage::Copies {
        segment: SEGMENT,
        number: 1,
        pages: vec![(0, Sent::Zeros)],
    };
    let (from, data) = (node(0), Vec::new());
    engine.handle(
        Input::Message {
            from,
            message,
            data,
        },
        &mut memory,
        &mut out,
    );
    memory.frames[0].contents.as_mut().expect("it is there")[1] = 1;
    out.clear();
    engine.handle(Input::Release, &mut memory, &mut out);
    engine.handle(
        Input::Fault {
            page: page(1),
            access,
        },
        &mut memory,
        &mut out,
    );
    assert!(!out.contains(&Action::Released { wrote: Vec::new() }));
    out.clear();
    engine.handle(Input::Left { node: node(0) }, &mut memory, &mut out);
    let failed = Action::Fail { page: page(1) };
    assert_eq!(
        out,
        [failed.clone(), Action::Released { wrote: Vec::new() }]
    );
    out.clear();
    engine.handle(
        Input::Fault {
            page: page(1),
            access,
        },
        &mut memory,
        &mut out,
    );
    assert_eq!(out, [failed]);
}

/// What a fetch by a node leads to at node 0, the manager.
fn fetch(engine: &mut Release, memory: &mut Memory, by: u16, write: bool) -> Vec<Action> {
    let mut out = Vec::new();
    let (from, data) = (NodeId(by), Vec::new());
    let message = ReleaseMessage::Fetch {
        segment: SEGMENT,
        requester: from,
        number: 7,
        write,
        pages: vec![0],
    };
    let input = Input::Message {
        from,
        message,
        data,
    };
    engine.handle(input, memory, &mut out);
    out
}

#[test]
fn pages_that_were_lent_to_a_node_that_has_left_are_lost_to_all() {
    let mut manager = Release::new(node(0), PAGE_SIZE);
    manager.add_segment(SEGMENT, 1, Some(node(0)));
    let mut memory = memory(1);
    fetch(&mut manager, &mut memory, 1, true);
    assert_eq!(manager.access(page(0)), None, "it is lent");
    let passed = fetch(&mut manager, &mut memory, 2, false);
    assert!(matches!(passed[..], [Action::Send { to: NodeId(1), .. }]));

    let mut out = Vec::new();
    manager.handle(Input::Left { node: node(1) }, &mut memory, &mut out);
    let lost = Action::Send {
        to: node(2),
        message: ReleaseMessage::Lost {
            segment: SEGMENT,
            pages: vec![(0, 1)],
        },
        data: Vec::new(),
    };
    assert_eq!(out, std::slice::from_ref(&lost));
    for write in [false, true] {
        let told = fetch(&mut manager, &mut memory, 2, write);
        assert_eq!(told, std::slice::from_ref(&lost));
    }
    let (page, access) = (page(0), Access::Read);
    out.clear();
    manager.handle(Input::Fault { page, access }, &mut memory, &mut out);
    assert_eq!(out, [Action::Fail { page }]);
}

#[test]
fn what_waits_for_a_page_that_is_coming_back_ends_when_its_borrower_leaves() {
    let mut manager = Release::new(node(0), PAGE_SIZE);
    manager.add_segment(SEGMENT, 1, Some(node(0)));
    let mut memory = memory(1);
    fetch(&mut manager, &mut memory, 1, true);
    fetch(&mut manager, &mut memory, 2, true);
    let message = ReleaseMessage::Diffs {
        segment: SEGMENT,
        number: 8,
        pages: vec![(0, 3)],
    };
    let (from, data) = (node(3), vec![1, 1, 9]);
    let mut out = Vec::new();
    let input = Input::Message {
        from,
        message,
        data,
    };
    manager.handle(input, &mut memory, &mut out);
    assert_eq!(out, [], "it waits for the page");
    manager.handle(Input::Left { node: node(1) }, &mut memory, &mut out);
    let merged = |action: &Action| match action {
        Action::Send { to, message, .. } => {
            *to == node(3) && matches!(message, ReleaseMessage::Merged { number: 8, .. })
        }
        _ => false,
    };
    assert!(out.iter().any(merged), "{out:?}");
}

#[test]
fn who_waits_for_a_page_that_is_lost_is_told() {
    let mut engine = Release::new(node(2), PAGE_SIZE);
    engine.add_segment(SEGMENT, 1, Some(node(0)));
    let (mut memory, mut out) = (memory(1), Vec::new());
    let (page, access) = (page(0), Access::Read);
    engine.handle(Input::Fault { page, access }, &mut memory, &mut out);
    out.clear();
    let message = ReleaseMessage::Lost {
        segment: SEGMENT,
        pages: vec![(0, 1)],
    };
    let (from, data) = (node(0), Vec::new());
    let input = Input::Message {
        from,
        message,
        data,
    };
    engine.handle(input, &mut memory, &mut out);
    assert_eq!(out, [Action::Fail { page }]);
}
