//! State machines behind decoders: sequences of well-formed messages, right or wrong.

use migshm_coherence::release::{self, Diff, Frames, Release};
use migshm_coherence::{Action, Config, Engine, Input, Memory, PageSet};
use migshm_coordinator::Core;
use migshm_protocol::codec;
use migshm_protocol::control::ToCoordinator;
use migshm_protocol::ids::MAX_NODES;
use migshm_protocol::page::{Access, PeerMessage};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};
use serde::de::DeserializeOwned;

/// Of the pages of [`diffs`] and [`pages`], in bytes: short, so that much fits.
pub(super) const PAGE_BYTES: usize = 64;
/// The segment that the engines of [`pages`] know, and how many pages it has.
pub(super) const SEGMENT: SegmentId = SegmentId(7);
const PAGES: u32 = 3;
/// The node that the engines of [`pages`] are of.
pub(super) const ME: NodeId = NodeId(1);
/// Nodes of the cluster of [`coordinator`].
const MEMBERS: u16 = 3;
const MEMORY: u64 = 8 << 20;

/// A message to the coordinator: from which node, at what time, and the bytes beside it.
pub(super) type ToCore = (u16, i64, ToCoordinator, Vec<u8>);
/// A message to a node, with the bytes beside it.
pub(super) type ToEngine = (u16, PeerMessage, Vec<u8>);

/// Messages of nodes to the coordinator, whose clock may jump. When all have left, no member is
/// spoken to any more.
pub(super) fn coordinator(bytes: &[u8]) {
    let mut core = Core::new();
    let mut out = Vec::new();
    let address = "[::1]:1".parse().expect("an address");
    for member in 0..MEMBERS {
        let joined = core.join(format!("node{member}"), address, MEMORY, &mut out);
        joined.expect("there is room");
    }
    out.clear();
    let mut last = 0;
    for (from, now, message, raw) in steps::<ToCore>(bytes) {
        core.handle(now, NodeId(from), message, &raw, &mut out);
        last = now;
        for output in out.drain(..) {
            assert!(output.to.0 < MEMBERS, "{output:?}");
        }
    }
    for member in 0..MEMBERS {
        core.leave(last, NodeId(member), &mut out);
        for output in out.drain(..) {
            assert!(output.to.0 > member, "member {member} leaves: {output:?}");
        }
    }
}

/// Messages of other nodes to both engines of a node.
pub(super) fn pages(bytes: &[u8]) {
    let mut sequential = Engine::<u8>::new(ME, Config::default());
    sequential.add_segment(SEGMENT, PAGES, Some(ME));
    let mut release = Release::new(ME, PAGE_BYTES);
    release.add_segment(SEGMENT, PAGES, Some(ME));
    let mut now = 0;
    for (from, message, data) in steps::<ToEngine>(bytes) {
        let from = NodeId(from);
        now += 1_000_000;
        match message {
            PeerMessage::Sequential(run) => {
                for message in run.messages().into_iter().flatten() {
                    let data = data.first().copied();
                    let input = Input::Message {
                        from,
                        message,
                        data,
                    };
                    let mut out = Vec::new();
                    sequential.handle(now, input, &Nothing, &mut out);
                    for action in out {
                        if let Action::Send { to, .. } = action {
                            expect_other(to);
                        }
                    }
                }
            }
            PeerMessage::Flush { view } => {
                let mut out = Vec::new();
                sequential.handle(now, Input::Flush { from, view }, &Nothing, &mut out);
            }
            PeerMessage::Release(message) => {
                let input = release::Input::Message {
                    from,
                    message,
                    data,
                };
                let mut out = Vec::new();
                release.handle(input, &mut Nothing, &mut out);
                for action in out {
                    if let release::Action::Send { to, .. } = action {
                        expect_other(to);
                    }
                }
            }
        }
    }
}

/// A diff of another node, applied to a page; and one made of the bytes.
pub(super) fn diffs(bytes: &[u8]) {
    let mut page = [0x55; PAGE_BYTES];
    if let Some(diff) = Diff::parse(bytes, PAGE_BYTES) {
        assert_eq!(diff.as_bytes(), bytes);
        diff.apply(&mut page);
        diff.for_each_run(PAGE_BYTES, |at, run| {
            assert_eq!(page[at..at + run.len()], *run);
        });
    }
    let twin = page;
    for (to, from) in page.iter_mut().zip(bytes) {
        *to = *from;
    }
    if let Some(diff) = Diff::between(&twin, &page) {
        let diff = Diff::parse(diff.as_bytes(), PAGE_BYTES).expect("it is well-formed");
        let mut again = twin;
        diff.apply(&mut again);
        assert_eq!(again, page);
    }
}

/// The values that follow each other, as far as there are any.
fn steps<T: DeserializeOwned>(mut bytes: &[u8]) -> impl Iterator<Item = T> {
    std::iter::from_fn(move || {
        let (step, rest) = codec::decode(bytes).ok()?;
        bytes = rest;
        Some(step)
    })
}

#[track_caller]
fn expect_other(to: NodeId) {
    assert!(to != ME && usize::from(to.0) < MAX_NODES, "sent to {to}");
}

/// The memory of a node whose processes have touched nothing.
struct Nothing;

impl Memory for Nothing {
    fn present(&self, _: Extent) -> PageSet {
        PageSet::new()
    }
}

impl Frames for Nothing {
    fn read(&self, _: Page, buffer: &mut [u8]) {
        buffer.fill(0);
    }

    fn protect(&mut self, _: Page) {}

    fn permit(&mut self, _: Page) {}

    fn install(&mut self, _: Page, _: Access, contents: Option<&[u8]>) {
        assert!(contents.is_none_or(|bytes| bytes.len() == PAGE_BYTES));
    }

    fn retry(&mut self, _: Page) {}

    fn merge(&mut self, _: Page, diff: &Diff) {
        diff.apply(&mut [0; PAGE_BYTES]);
    }

    fn drop(&mut self, _: Page) {}

    fn is_used(&self, _: Page) -> bool {
        true
    }

    fn is_present(&self, _: Page) -> bool {
        false
    }
}
