//! What a program will touch next, from what it touched: a policy, without any mechanism.
//!
//! Faults of an address space for one kind of access that follow each other at one distance, forward or
//! backward, are a *stream*. (Who has written its own block and then reads on into its neighbour's has
//! begun another.) Of a stream, a window of pages ahead of the last fault is asked for, in chunks: the
//! next one when the last but [`DEPTH`] has come, so that the way between the nodes is never idle
//! and never crowded. Each fault that the stream foresaw doubles its window: a program that is slower
//! than the network faults once for each window, one that is faster finds each page on its way. A
//! page that is declined ends the stream. A stream that is none costs a few pages.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::page::Access;
use migshm_protocol::{Page, SegmentId};

/// Streams that are followed at once.
const STREAMS: usize = 16;
/// Faults at one distance from the one before that show that there is a stream. Fewer are a row of a neighbour's block, say, and
/// what lies behind it is his.
const PROVEN: u32 = 7;
/// Pages asked for ahead of the fault that shows that there is a stream.
const FIRST_WINDOW: u32 = 8;
/// Pages asked for ahead at most: two extents.
const MAX_WINDOW: u32 = 1024;
/// Pages asked for at once.
const CHUNK: u32 = 32;
/// Chunks on their way at once.
const DEPTH: u32 = 8;
/// Distance of the faults of a stream, in pages, at most.
const MAX_STRIDE: i64 = 64;

/// Finds streams among the faults of a node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Prefetcher {
    /// The one used last comes last.
    streams: VecDeque<Stream>,
}

/// A fault of a thread that has to wait for the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Number of its address space.
    pub space: u64,
    /// The page.
    pub page: Page,
    /// For what.
    pub access: Access,
    /// Whether the page was asked for already.
    pub pending: bool,
}

/// Pages to be prefetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Their segment.
    pub segment: SegmentId,
    /// Index of the one that is needed first.
    pub first: u32,
    /// From one to the next, in pages; never 0.
    pub stride: i32,
    /// How many.
    pub count: u32,
    /// For what.
    pub access: Access,
}

impl Ask {
    /// The one that is needed last.
    #[must_use]
    pub fn last(self) -> Option<Page> {
        let steps = self.count.checked_sub(1)?;
        Some(Page {
            segment: self.segment,
            index: self.first.checked_add_signed(self.stride * steps as i32)?,
        })
    }

    /// The pages, in the order of their indexes.
    pub fn pages(self) -> impl Iterator<Item = Page> {
        let index = move |step: u32| self.first.wrapping_add_signed(self.stride * step as i32);
        let count = self.count;
        (0..count).map(move |step| Page {
            segment: self.segment,
            index: index(if self.stride < 0 {
                count - 1 - step
            } else {
                step
            }),
        })
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Stream {
    space: u64,
    segment: SegmentId,
    access: Access,
    /// Where the last fault was.
    last: i64,
    /// From one fault to the next; 0 until there are two.
    stride: i64,
    /// How many faults in a row had this distance from the one before.
    steps: u32,
    /// Pages ahead of the last fault that may be asked for; 0 until it is a stream.
    window: u32,
    /// Pages ahead of the last fault that were asked for.
    asked: u32,
    /// Of these, those that have come, as far as is known.
    came: u32,
}

impl Prefetcher {
    /// A thread has to wait for a page. What follows it will be asked for by [`Prefetcher::next`].
    pub fn touch(&mut self, touch: Touch) {
        let place = self
            .streams
            .iter()
            .rposition(|stream| stream.expects(&touch));
        let place = place.or_else(|| self.streams.iter().rposition(|s| s.is_near(&touch)));
        let stream = match place.and_then(|place| self.streams.remove(place)) {
            Some(mut stream) => {
                stream.follow(&touch);
                stream
            }
            None => Stream::new(&touch),
        };
        if self.streams.len() == STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(stream);
    }

    /// A page has come that nobody had to wait for, or will not come.
    pub fn came(&mut self, page: Page) {
        for (stream, steps) in self.that_asked_for(page) {
            stream.came = stream.came.max(steps);
        }
    }

    /// A page was asked for and cannot be had without a wait: others use what lies ahead.
    pub fn declined(&mut self, page: Page) {
        for (stream, _) in self.that_asked_for(page) {
            (stream.window, stream.steps) = (0, 0);
        }
    }

    /// The streams ahead of which a page was asked for, and how many strides ahead it is.
    fn that_asked_for(&mut self, page: Page) -> impl Iterator<Item = (&mut Stream, u32)> {
        self.streams.iter_mut().filter_map(move |stream| {
            let steps = stream.steps_to(page)?;
            (steps <= stream.asked).then_some((stream, steps))
        })
    }

    /// What to ask for now, if anything; to be called again until nothing is left. No more than
    /// `room` pages are prefetched ahead of a thread; the segment of the answer has to have more
    /// than `pages` of it.
    pub fn next(&mut self, room: u32, pages: impl Fn(SegmentId) -> u32) -> Option<Ask> {
        self.streams
            .iter_mut()
            .rev()
            .find_map(|stream| stream.next(room, pages(stream.segment)))
    }

    /// Forgets a segment.
    pub fn remove_segment(&mut self, segment: SegmentId) {
        self.streams.retain(|stream| stream.segment != segment);
    }
}

impl Stream {
    fn new(touch: &Touch) -> Self {
        Self {
            space: touch.space,
            segment: touch.page.segment,
            access: touch.access,
            last: i64::from(touch.page.index),
            stride: 0,
            steps: 0,
            window: 0,
            asked: 0,
            came: 0,
        }
    }

    /// How many strides a page is ahead of the last fault.
    fn steps_to(&self, page: Page) -> Option<u32> {
        let distance = i64::from(page.index) - self.last;
        let is_on = page.segment == self.segment
            && self.stride != 0
            && distance.signum() == self.stride.signum()
            && distance % self.stride == 0;
        is_on.then(|| u32::try_from(distance / self.stride).ok())?
    }

    /// Whether a fault is where the stream goes on.
    fn expects(&self, touch: &Touch) -> bool {
        touch.space == self.space
            && touch.access == self.access
            && self.window > 0
            && self
                .steps_to(touch.page)
                .is_some_and(|steps| steps <= self.asked + 2)
    }

    /// Whether a fault may make a stream together with the last one.
    fn is_near(&self, touch: &Touch) -> bool {
        let distance = i64::from(touch.page.index) - self.last;
        touch.space == self.space
            && touch.access == self.access
            && touch.page.segment == self.segment
            && self.window == 0
            && distance.abs() <= MAX_STRIDE
    }

    fn follow(&mut self, touch: &Touch) {
        let distance = i64::from(touch.page.index) - self.last;
        if self.window > 0 {
            let steps = self.steps_to(touch.page).unwrap_or(0);
            self.window = (2 * self.window).clamp(FIRST_WINDOW, MAX_WINDOW);
            self.asked = self.asked.saturating_sub(steps);
            self.came = self.came.saturating_sub(steps);
            if !touch.pending {
                // Whatever was asked for was not to be had, or is gone again.
                (self.asked, self.came) = (0, 0);
            }
        } else if distance != 0 && distance == self.stride {
            self.steps += 1;
            if self.steps == PROVEN {
                self.window = FIRST_WINDOW;
                (self.asked, self.came) = (0, 0);
            }
        } else {
            self.stride = distance;
            self.steps = 1;
        }
        self.last = i64::from(touch.page.index);
    }

    fn next(&mut self, room: u32, pages: u32) -> Option<Ask> {
        if self.asked - self.came > (DEPTH - 1) * CHUNK {
            return None;
        }
        // Where the segment ends; to be written, the extent: the next may be another node's block.
        let (first, end) = match self.access {
            Access::Read => (0, i64::from(pages)),
            Access::Write => {
                let extent = i64::from(EXTENT_PAGES);
                let first = self.last - self.last % extent;
                (first, (first + extent).min(i64::from(pages)))
            }
        };
        let ahead = match self.stride {
            0 => 0,
            stride if stride > 0 => (end - 1 - self.last) / stride,
            stride => (self.last - first) / -stride,
        };
        let window = self.window.min(room);
        let limit = window.min(u32::try_from(ahead).unwrap_or(0));
        // Not in dribs and drabs.
        let wanted = limit.saturating_sub(self.asked);
        let count = wanted.min(CHUNK);
        if count == 0 {
            return None;
        }
        let first = self.last + (i64::from(self.asked) + 1) * self.stride;
        self.asked += count;
        Some(Ask {
            segment: self.segment,
            first: u32::try_from(first).ok()?,
            stride: i32::try_from(self.stride).ok()?,
            count,
            access: self.access,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const SEGMENT: SegmentId = SegmentId(3);
    const PAGES: u32 = 100_000;
    const ROOM: u32 = u32::MAX;

    fn page(index: u32) -> Page {
        Page {
            segment: SEGMENT,
            index,
        }
    }

    /// A thread that touches pages in an order, whose prefetches come at once; what it waited for.
    fn faults(touches: impl Iterator<Item = u32>, room: u32) -> (Vec<u32>, usize) {
        let mut prefetcher = Prefetcher::default();
        let mut here = std::collections::BTreeSet::new();
        let mut faults = Vec::new();
        for index in touches {
            if !here.insert(index) {
                continue;
            }
            faults.push(index);
            prefetcher.touch(Touch {
                space: 1,
                page: page(index),
                access: Access::Read,
                pending: false,
            });
            while let Some(ask) = prefetcher.next(room, |_| PAGES) {
                for page in ask.pages() {
                    here.insert(page.index);
                    prefetcher.came(page);
                }
            }
        }
        (faults, here.len())
    }

    #[test]
    fn a_stream_of_writes_ends_with_its_extent_and_goes_on_with_the_next() {
        let mut prefetcher = Prefetcher::default();
        let mut ahead = 0;
        for index in 0..3 * EXTENT_PAGES {
            prefetcher.touch(Touch {
                space: 1,
                page: page(index),
                access: Access::Write,
                pending: index <= ahead,
            });
            while let Some(ask) = prefetcher.next(ROOM, |_| PAGES) {
                ask.pages().for_each(|page| prefetcher.came(page));
                let last = ask.last().expect("a page").index;
                assert_eq!(last / EXTENT_PAGES, index / EXTENT_PAGES);
                ahead = last;
            }
        }
        assert_eq!(ahead, 3 * EXTENT_PAGES - 1);
    }

    #[test]
    fn a_scan_faults_once_for_each_window() {
        let (faults, here) = faults(0..20_000, ROOM);
        assert!(faults.len() < 40, "{faults:?}");
        assert!(here < 20_000 + MAX_WINDOW as usize + 1);
    }

    #[test]
    fn backward_and_strided_streams_are_followed() {
        for stride in [-1, 3, -7] {
            let start = if stride < 0 { 50_000 } else { 0 };
            let touches = (0..5_000).map(|n| (start + n * stride) as u32);
            let (faults, _) = faults(touches, ROOM);
            assert!(faults.len() < 20, "{stride}: {faults:?}");
        }
    }

    #[test]
    fn streams_of_one_program_do_not_hide_each_other() {
        let touches = (0..4_000).flat_map(|n| [n, 30_000 + n, 60_000 + n]);
        assert!(faults(touches, ROOM).0.len() < 60);
    }

    #[test]
    fn what_has_no_order_is_hardly_prefetched() {
        let touches = (0..2_000_u64).map(|n| (n * n * 7_919 % 99_991) as u32);
        let (faults, here) = faults(touches, ROOM);
        assert!(here < faults.len() * 11 / 10, "{here}");
    }

    #[test]
    fn nothing_is_asked_for_beyond_the_segment_or_the_room() {
        for (touches, room) in [(PAGES - 20..PAGES, ROOM), (0..2_000, 5)] {
            let (mut ahead, mut prefetcher) = (0, Prefetcher::default());
            for index in touches {
                prefetcher.touch(Touch {
                    space: 1,
                    page: page(index),
                    access: Access::Read,
                    pending: true,
                });
                while let Some(ask) = prefetcher.next(room, |_| PAGES) {
                    assert!(ask.pages().all(|page| page.index < PAGES));
                    ahead = ask.pages().last().map_or(0, |page| page.index) - index;
                }
                assert!(ahead <= room);
            }
        }
    }

    #[test]
    fn no_more_is_under_way_than_a_few_chunks() {
        let mut prefetcher = Prefetcher::default();
        for index in 0..200 {
            prefetcher.touch(Touch {
                space: 1,
                page: page(index),
                access: Access::Read,
                pending: index > 1,
            });
        }
        let mut asked = 0;
        while let Some(ask) = prefetcher.next(ROOM, |_| PAGES) {
            asked += ask.count;
        }
        assert_eq!(asked, DEPTH * CHUNK);
        prefetcher.came(page(199 + CHUNK));
        assert_eq!(
            prefetcher.next(ROOM, |_| PAGES).map(|a| a.count),
            Some(CHUNK)
        );
        assert_eq!(prefetcher.next(ROOM, |_| PAGES), None);
    }

    #[test]
    fn a_block_that_was_written_does_not_make_a_stream_of_the_row_read_behind_it() {
        let mut prefetcher = Prefetcher::default();
        let block = 8 * EXTENT_PAGES;
        let mut of_neighbour = 0;
        let mut touch = |index, access| {
            prefetcher.touch(Touch {
                space: 1,
                page: page(index),
                access,
                pending: false,
            });
            while let Some(ask) = prefetcher.next(ROOM, |_| PAGES) {
                ask.pages().for_each(|page| prefetcher.came(page));
                of_neighbour += ask.pages().filter(|page| page.index >= block).count();
            }
        };
        for index in 0..block {
            touch(index, Access::Write);
        }
        for _ in 0..100 {
            for index in block..block + 4 {
                touch(index, Access::Read);
            }
        }
        assert_eq!(of_neighbour, 0);
    }

    #[test]
    fn what_is_read_and_then_written_page_by_page_is_two_streams() {
        let touches = (0..1_000).flat_map(|index| [(index, Access::Read), (index, Access::Write)]);
        let mut prefetcher = Prefetcher::default();
        let mut here = HashSet::new();
        let mut faults = 0;
        for (index, access) in touches {
            if here.contains(&(page(index), access)) {
                continue;
            }
            faults += 1;
            prefetcher.touch(Touch {
                space: 1,
                page: page(index),
                access,
                pending: false,
            });
            while let Some(ask) = prefetcher.next(ROOM, |_| PAGES) {
                for page in ask.pages() {
                    here.extend([(page, Access::Read), (page, ask.access)]);
                    prefetcher.came(page);
                }
            }
        }
        assert!(faults < 40, "{faults}");
    }

    #[test]
    fn what_is_declined_is_not_asked_for_until_faults_follow_each_other_again() {
        let mut prefetcher = Prefetcher::default();
        let mut asked = 0;
        for index in 0..1000 {
            prefetcher.touch(Touch {
                space: 1,
                page: page(index),
                access: Access::Write,
                pending: false,
            });
            while let Some(ask) = prefetcher.next(ROOM, |_| PAGES) {
                asked += ask.count;
                prefetcher.declined(ask.last().expect("a page"));
            }
        }
        assert!(asked <= (1000 / PROVEN + 1) * FIRST_WINDOW, "{asked}");
    }
}
