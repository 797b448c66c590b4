//! What the directory costs in memory: the bytes that are really allocated, for each page that
//! somebody has touched.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use migshm_coherence::{Action, Body, Config, Engine, Footprint, Input, Memory, PageSet};
use migshm_protocol::ids::{EXTENT_PAGES, MAX_NODES};
use migshm_protocol::page::{Access, PageMessage};
use migshm_protocol::{Extent, NodeId, Page, SegmentId};

/// Bytes for each touched page.
const WANTED: usize = 16;

const HOME: NodeId = NodeId(0);
const SEGMENT: SegmentId = SegmentId(1);
const EXTENTS: u32 = 4;
const PAGES: u32 = EXTENTS * EXTENT_PAGES;

/// Counts the bytes that a thread has allocated and not freed.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().wrapping_add(layout.size()));
        // SAFETY: as promised to this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: as promised to this function.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Which pages of an extent the home wrote while it was alone.
struct Written(fn(u32) -> bool);

impl Memory for Written {
    fn present(&self, _: Extent) -> PageSet {
        let mut set = PageSet::new();
        let written = (0..EXTENT_PAGES).filter(|&page| self.0(page));
        written.for_each(|page| set.insert(page));
        set
    }
}

/// Has nodes read the home's pages, by index in the segment. What the engine then says that it
/// takes, and what is allocated.
fn measure(written: &Written, readers: impl Fn(u32) -> Vec<u16>) -> (Footprint, usize) {
    let config = Config {
        hold_min: 0,
        hold_max: 0,
    };
    let mut engine = Engine::<()>::new(HOME, config);
    engine.add_segment(SEGMENT, PAGES, Some(HOME));
    let before = LIVE.get();
    for index in (0..PAGES).filter(|index| written.0(index % EXTENT_PAGES)) {
        for reader in readers(index).into_iter().map(NodeId) {
            read(&mut engine, reader, index, written);
        }
    }
    (engine.footprint(), LIVE.get() - before)
}

fn read(engine: &mut Engine<()>, reader: NodeId, index: u32, written: &Written) {
    let message = PageMessage::Request {
        page: Page {
            segment: SEGMENT,
            index,
        },
        access: Access::Read,
        requester: reader,
        has_copy: false,
        prefetch: false,
    };
    let input = Input::Message {
        from: reader,
        message,
        data: None,
    };
    let mut out = Vec::new();
    engine.handle(1, input, written, &mut out);
    let is_given = |action: &Action<()>| matches!(action, Action::Send { to, body: Body::Page(_), .. } if *to == reader);
    assert!(out.iter().any(is_given), "{out:?}");
}

#[test]
fn the_footprint_is_what_is_allocated() {
    let (footprint, allocated) = measure(&Written(|_| true), |page| match page % 3 {
        0 => vec![1],
        1 => vec![1, 2, 700],
        _ => (1..9).collect(),
    });
    assert_eq!(footprint.directory + footprint.lines, allocated);
}

#[test]
fn a_touched_page_costs_its_home_sixteen_bytes_at_most() {
    type Readers = fn(u32) -> Vec<u16>;
    let patterns: [(&str, Readers); 5] = [
        ("read by one node", |_| vec![3]),
        ("read by two of 64 neighbours", |page| {
            let at = (page % 62) as u16;
            vec![at + 1, at + 2]
        }),
        ("read by one of eight groups of eight", |page| {
            let group = (page % 8) as u16;
            (1..9).map(|n| group * 100 + n).collect()
        }),
        ("read by 64 nodes", |_| (1..65).collect()),
        ("read by 1023 nodes", |_| (1..MAX_NODES as u16).collect()),
    ];
    for (pattern, readers) in patterns {
        let (footprint, _) = measure(&Written(|_| true), readers);
        assert_eq!(footprint.touched, PAGES as usize);
        let per_page = footprint.directory as f64 / footprint.touched as f64;
        println!("{pattern}: {per_page:.1} bytes a page");
        assert!(
            footprint.directory <= WANTED * footprint.touched,
            "{pattern}: {per_page}"
        );
    }
    let third = Written(|page| page % 3 == 0);
    let (footprint, _) = measure(&third, |_| vec![1, 2, 3, 4]);
    assert!(
        footprint.directory <= WANTED * footprint.touched,
        "a third of the pages: {footprint:?}"
    );
}

#[test]
fn a_page_with_a_group_of_its_own_costs_a_bit_for_each_node() {
    let readers = |page: u32| {
        let reader = |n: u32| 1 + ((page * 7919 + n * 331) % 1023) as u16;
        (0..3).map(reader).collect()
    };
    let (footprint, _) = measure(&Written(|_| true), readers);
    let per_page = footprint.directory / footprint.touched;
    println!("each page a group of its own: {per_page} bytes a page");
    assert!(per_page <= MAX_NODES / 8 + 72);
}
