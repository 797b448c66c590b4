//! The node's copy of the pages, and the address spaces that map it.
//!
//! A segment is one memfd; every process of the node maps it, so on one node sharing costs
//! nothing. While only this node uses a segment nothing is tracked. Once it is shared (or does not
//! fit here), every mapping is registered with its process's userfaultfd for missing and
//! write-protected pages, and these states hold for each page:
//!
//! | the engine's word | in the page cache | in the page tables of *every* mapping |
//! |---|---|---|
//! | no access | no | nothing, or a write-protection marker |
//! | read | yes | nothing with a marker, or present and write-protected |
//! | write | yes | anything; a stale protection is lifted when it faults |
//!
//! So, before a page is put into the page cache for reading, it is protected in every mapping:
//! another process then maps it without an event, and still cannot write it unseen.
//!
//! Processes that may only read see replicas of the pages instead; see [`segment`].

mod bits;
mod file;
mod mappings;
mod maps;
mod range;
mod segment;
mod spaces;

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use migshm_coherence::PageSet;
use migshm_coherence::release::Diff;
use migshm_protocol::ids::{EXTENT_PAGES, PAGE_SIZE};
use migshm_protocol::page::Access;
use migshm_protocol::{Extent, Page, SegmentId};
use rustc_hash::FxHashMap;

use crate::cached::Cached;
use crate::uffd::{Done, Uffd};
use file::Contents;
pub use file::sealed;
pub use mappings::{AttachId, Granted, View};
pub use range::{Adjacent, Range};
use segment::Segment;
pub use segment::UserId;
pub use spaces::{Report, SpaceId, Spaces};

const PAGE: u64 = PAGE_SIZE as u64;

/// How many threads that were woken are remembered: more than fault within a hold.
const WOKEN: usize = 256;

/// All segments and address spaces of the node.
#[derive(Serialize, Deserialize)]
pub struct Memory {
    /// Of the daemon's own mappings; `None` where userfaultfd is not to be had.
    #[serde(skip)]
    own: Option<Uffd>,
    segments: FxHashMap<SegmentId, Segment>,
    /// The address spaces. What concerns a segment's pages as well is done by [`Memory`].
    pub spaces: Spaces,
    /// Threads that wait for a page.
    waiting: FxHashMap<Page, Vec<Waiter>>,
    /// The last [`WOKEN`] of them that were woken.
    woken: VecDeque<(Page, Waiter)>,
    /// Pages that some replica has, or had.
    replicated: Cached,
    /// Pages that are here and not in the page cache, as that did not take them, or as they are behind the
    /// fence: what they contain.
    unplaced: FxHashMap<Page, Box<[u8]>>,
    fence: Fence,
}

/// Whether processes get at tracked pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Fence {
    Open,
    /// They wait.
    Closed,
    /// They get SIGBUS.
    Condemned,
}

/// A thread that waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiter {
    /// Its address space.
    pub space: SpaceId,
    /// Where it touched the page.
    pub address: u64,
    /// What is mapped there.
    pub view: View,
}

/// Segments.
impl Memory {
    /// Memory without segments. With `device` (an open [`crate::uffd::DEVICE`]) segments can be
    /// tracked.
    ///
    /// # Errors
    /// Those of making a userfaultfd.
    pub fn new(device: Option<&File>) -> io::Result<Memory> {
        Ok(Memory {
            own: device.map(Uffd::own).transpose()?,
            segments: FxHashMap::default(),
            spaces: Spaces::default(),
            waiting: FxHashMap::default(),
            woken: VecDeque::with_capacity(WOKEN),
            replicated: Cached::default(),
            unplaced: FxHashMap::default(),
            fence: Fence::Open,
        })
    }

    /// Goes on with what was handed over: the daemon's own mappings are made anew.
    ///
    /// # Errors
    /// Those of [`Memory::new`] and [`Memory::track`].
    pub fn resume(&mut self, device: Option<&File>) -> io::Result<()> {
        self.own = device.map(Uffd::own).transpose()?;
        let Some(own) = &self.own else {
            return Ok(());
        };
        for (id, segment) in &mut self.segments {
            segment.resume(self.spaces.is_tracked(*id), own)?;
        }
        Ok(())
    }

    /// Makes a segment's memory, all holes.
    ///
    /// # Errors
    /// Those of [`Segment::new`].
    pub fn add_segment(&mut self, id: SegmentId, size: u64) -> io::Result<()> {
        self.segments.insert(id, Segment::new(size)?);
        Ok(())
    }

    /// Forgets a segment and frees its pages once nothing maps them.
    pub fn remove_segment(&mut self, id: SegmentId) {
        if self.segments.remove(&id).is_some() {
            self.spaces.remove_segment(id);
            self.waiting.retain(|page, _| page.segment != id);
            self.woken.retain(|(page, _)| page.segment != id);
            self.unplaced.retain(|page, _| page.segment != id);
            self.replicated.remove_segment(id);
        }
    }

    /// Whether the segment's memory is here.
    #[must_use]
    pub fn has_segment(&self, id: SegmentId) -> bool {
        self.segments.contains_key(&id)
    }

    /// Pages of a segment.
    #[must_use]
    pub fn pages(&self, id: SegmentId) -> Option<u32> {
        self.segments.get(&id).map(Segment::pages)
    }

    /// Whether the segment's pages are tracked.
    #[must_use]
    pub fn is_tracked(&self, id: SegmentId) -> bool {
        self.segments.get(&id).is_some_and(Segment::is_tracked)
    }

    /// A descriptor of the segment to hand to a process. One that is not writable cannot be
    /// mapped writable, now or later.
    ///
    /// # Errors
    /// `ENOENT` for an unknown segment, else those of `open(2)`.
    pub fn descriptor(&self, id: SegmentId, writable: bool) -> io::Result<OwnedFd> {
        let segment = self.segments.get(&id).ok_or(io::ErrorKind::NotFound)?;
        segment.descriptor(writable)
    }

    /// A descriptor of a user's replica of a tracked segment.
    ///
    /// # Errors
    /// `ENOENT` for an unknown segment, else those of [`Segment::replica`].
    pub fn replica(&mut self, id: SegmentId, user: UserId) -> io::Result<OwnedFd> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let segment = self.segments.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        segment.replica(user, own)
    }

    /// Replicas that nothing maps.
    #[must_use]
    pub fn unmapped_replicas(&self) -> Vec<(SegmentId, UserId)> {
        let all = self.segments.iter();
        let all = all.flat_map(|(id, segment)| segment.replicas().map(|user| (*id, user)));
        all.filter(|(id, user)| !self.spaces.mappings.maps_replica(*id, *user))
            .collect()
    }

    /// Whether a segment has any replica.
    #[must_use]
    pub fn has_replicas(&self, id: SegmentId) -> bool {
        let segment = self.segments.get(&id);
        segment.is_some_and(Segment::has_replicas)
    }

    /// Frees a user's replica of a segment.
    pub fn remove_replica(&mut self, id: SegmentId, user: UserId) {
        if let Some(segment) = self.segments.get_mut(&id) {
            segment.remove_replica(user);
            if !segment.has_replicas() {
                self.replicated.remove_segment(id);
            }
        }
    }

    /// Starts to track a segment: from now on every touch of a page that the engine has not
    /// granted is reported. Pages that are there stay as they are.
    ///
    /// # Errors
    /// Those of `mmap(2)` and `UFFDIO_REGISTER`; `Unsupported` without userfaultfd.
    pub fn track(&mut self, id: SegmentId) -> io::Result<()> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let segment = self.segments.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        if !segment.is_tracked() {
            segment.track(own)?;
            self.spaces.track(id);
        }
        Ok(())
    }

    /// Records where an attach was mapped, and registers it if the segment is tracked. Also
    /// returns the segments of attaches of which it left nothing (`SHM_REMAP`).
    ///
    /// # Errors
    /// `NotFound` if the segment or the address space is gone, `InvalidInput` for an address that
    /// cannot be.
    pub fn map(
        &mut self,
        space: SpaceId,
        granted: Granted,
        address: u64,
    ) -> (Vec<SegmentId>, io::Result<()>) {
        let Some(segment) = self.segments.get(&granted.segment) else {
            return (Vec::new(), Err(io::ErrorKind::NotFound.into()));
        };
        self.spaces.map(space, granted, segment, address)
    }

    /// Forgets an address space; returns how many attaches of which segments went with it.
    pub fn remove_space(&mut self, id: SpaceId) -> Vec<(SegmentId, u32)> {
        for waiters in self.waiting.values_mut() {
            waiters.retain(|waiter| waiter.space != id);
        }
        self.woken.retain(|(_, waiter)| waiter.space != id);
        self.spaces.remove(id)
    }

    /// Bytes of memory that the segments take here.
    #[must_use]
    pub fn resident(&self) -> u64 {
        self.segments.values().filter_map(Segment::resident).sum()
    }

    /// How many segments and address spaces there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.segments.len(), self.spaces.count())
    }
}

/// The fence: while it is closed no process gets at a page of a tracked segment. What is there is kept
/// aside, and what comes is kept there too; who touches a page waits.
impl Memory {
    /// Whether processes are kept from tracked pages.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.fence != Fence::Open
    }

    /// Closes the fence.
    pub fn fence(&mut self) {
        if self.is_fenced() {
            return;
        }
        self.fence = Fence::Closed;
        let tracked = self.segments.iter().filter(|(_, s)| s.is_tracked());
        let tracked: Vec<(SegmentId, u32)> = tracked.map(|(id, s)| (*id, s.pages())).collect();
        for (segment, pages) in tracked {
            for index in 0..pages.div_ceil(EXTENT_PAGES) {
                self.set_aside(Extent { segment, index });
            }
        }
    }

    fn set_aside(&mut self, extent: Extent) {
        let Some(segment) = self.segments.get(&extent.segment) else {
            return;
        };
        let present = segment.present(extent);
        for index in (0..EXTENT_PAGES).filter(|&index| present.contains(index)) {
            let page = Page {
                segment: extent.segment,
                index: extent.first_page() + index,
            };
            // Nobody writes it between its copy and its end.
            self.protect(page.into());
            let mut contents = vec![0; PAGE_SIZE];
            self.read(page, &mut contents);
            self.drop_pages(page.into());
            self.unplaced.insert(page, contents.into());
        }
    }

    /// Opens the fence again: who has waited touches again.
    pub fn unfence(&mut self) {
        if self.fence != Fence::Closed {
            return;
        }
        self.fence = Fence::Open;
        for waiter in std::mem::take(&mut self.waiting).into_values().flatten() {
            self.spaces
                .report_again(waiter.space, waiter.address, false);
        }
    }

    /// Closes the fence for ever: who waits, or touches a page from now on, gets SIGBUS.
    pub fn condemn(&mut self) {
        self.fence();
        self.fence = Fence::Condemned;
        for waiter in std::mem::take(&mut self.waiting).into_values().flatten() {
            self.spaces.poison_at(waiter.space, waiter.address);
        }
    }

    /// Has a thread that touches a page wait at the fence, or fail; false if it is open.
    pub fn stops(&mut self, page: Page, waiter: Waiter) -> bool {
        match self.fence {
            Fence::Open => return false,
            Fence::Closed => self.wait(page, waiter),
            Fence::Condemned => self.spaces.poison_at(waiter.space, waiter.address),
        }
        true
    }
}

/// Pages.
impl Memory {
    /// Remembers that a thread waits for a page.
    pub fn wait(&mut self, page: Page, waiter: Waiter) {
        let waiters = self.waiting.entry(page).or_default();
        if !waiters.contains(&waiter) {
            waiters.push(waiter);
        }
    }

    /// For how many pages some thread waits.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a thread waits for the page itself, not for a replica of it.
    #[must_use]
    pub fn is_awaited(&self, page: Page) -> bool {
        let mut waiters = self.waiting.get(&page).into_iter().flatten();
        waiters.any(|waiter| waiter.view == View::Pages)
    }

    /// Puts pages in, with the given access for every process, and wakes who waits for them.
    /// `contents` gives those of the page at a place in the range; `None` is zeros.
    pub fn install<'a>(
        &mut self,
        range: Range,
        access: Access,
        contents: impl Fn(u32) -> Option<&'a [u8]>,
    ) {
        if self.is_fenced() {
            for (place, page) in (0..).zip(range.iter()) {
                let zeros = [0; PAGE_SIZE];
                let contents = contents(place).unwrap_or(&zeros);
                self.unplaced.insert(page, contents.into());
            }
            return;
        }
        // Each time: a page that goes takes its protection with it.
        match access {
            Access::Read => self.protect(range),
            Access::Write => self.release(range),
        }
        let mut done = 0;
        while done < range.pages {
            let next = adjacent(done..range.pages, &contents);
            let rest = range.skip(done);
            match self.try_put(rest, next) {
                Ok((pages, Done::Yes)) => done += pages,
                Ok((pages, _)) if pages > 0 => done += pages,
                _ => {
                    let page = rest.iter().next().expect("there is one");
                    self.put(page, access, contents(done));
                    done += 1;
                }
            }
        }
        range.iter().for_each(|page| self.wake_waiters(page));
    }

    fn put(&mut self, page: Page, access: Access, contents: Option<&[u8]>) {
        let range = Range::from(page);
        let bytes = |_| contents;
        let mut result = self.try_put(range, adjacent(0..1, &bytes));
        if matches!(result, Ok((_, Done::Exists))) {
            // Who may write the segment wrote through its descriptor; that is not the page.
            tracing::debug!(%page, "page in the way");
            self.drop_pages(range);
            if access == Access::Read {
                self.protect(range);
            }
            result = self.try_put(range, adjacent(0..1, &bytes));
        }
        // Again, so he does nothing else: then it is as if he had written after this.
        if matches!(result, Ok((1, Done::Yes) | (_, Done::Exists))) {
            self.unplaced.remove(&page);
            return;
        }
        tracing::error!(%page, ?result, "no memory for page: SIGBUS for who needs it here");
        let zeros = [0; PAGE_SIZE];
        let contents = contents.unwrap_or(&zeros);
        self.unplaced.insert(page, contents.into());
        self.poison(page);
    }

    fn try_put(&mut self, range: Range, contents: Contents<'_>) -> io::Result<(u32, Done)> {
        let (Some(uffd), Some(segment)) = (&self.own, self.segments.get(&range.segment)) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let done = segment.put(uffd, range.offset(), contents);
        if let (Ok((pages, _)), false) = (&done, self.unplaced.is_empty()) {
            for page in range.iter().take(*pages as usize) {
                self.unplaced.remove(&page);
            }
        }
        done
    }

    /// Wakes who waits for a page. Those who see a replica have their touch handled again, as
    /// that must be filled first.
    pub fn wake_waiters(&mut self, page: Page) {
        if self.waiting.is_empty() || self.is_fenced() {
            return;
        }
        for waiter in self.waiting.remove(&page).unwrap_or_default() {
            match waiter.view {
                View::Pages => self.wake(page, waiter),
                View::Replica(_) => self
                    .spaces
                    .report_again(waiter.space, waiter.address, false),
            }
        }
    }

    /// Wakes a thread, and remembers who that was.
    fn wake(&mut self, page: Page, waiter: Waiter) {
        self.spaces.wake(waiter.space, waiter.address);
        if self.woken.len() == WOKEN {
            self.woken.pop_front();
        }
        self.woken.push_back((page, waiter));
    }

    /// Gives pages that are here another access and wakes who waits for them.
    pub fn change(&mut self, range: Range, access: Access) {
        if self.is_fenced() {
            return;
        }
        match access {
            Access::Read => self.protect(range),
            // Of many pages, or of one that nobody waits for yet, all mappings will be written soon.
            Access::Write if range.pages > 1 || !self.is_waited_for(range) => {
                self.release(range);
                self.spaces.unprotect_everywhere(range);
            }
            // Other mappings' protection is lifted when they fault.
            Access::Write => {
                self.release(range);
                for page in range.iter() {
                    for waiter in self.waiting.get(&page).into_iter().flatten() {
                        if waiter.view == View::Pages {
                            self.spaces.unprotect(waiter.space, waiter.address);
                        }
                    }
                }
            }
        }
        range.iter().for_each(|page| self.wake_waiters(page));
    }

    fn is_waited_for(&self, range: Range) -> bool {
        range.iter().any(|page| self.waiting.contains_key(&page))
    }

    /// Lets a thread go on whose page has come, or was granted, between its fault and now.
    pub fn retry(&mut self, page: Page, space: SpaceId, address: u64, access: Access) {
        let view = View::Pages;
        let waiter = Waiter {
            space,
            address,
            view,
        };
        if self.stops(page, waiter) {
            return;
        }
        if !self.is_present(page) {
            // Unless it is unplaced, the program itself gave it back (MADV_REMOVE): zeros.
            let contents = self.unplaced.get(&page).cloned();
            match access {
                Access::Read => self.protect(page.into()),
                Access::Write => self.release(page.into()),
            }
            self.put(page, access, contents.as_deref());
            if self.unplaced.contains_key(&page) {
                return self.spaces.poison_at(space, address);
            }
        }
        if access == Access::Write {
            self.release(page.into());
            self.spaces.unprotect(space, address);
        }
        self.spaces.wake(space, address);
    }

    /// Whether a page is there, and not a hole.
    #[must_use]
    pub fn is_present(&self, page: Page) -> bool {
        let segment = self.segments.get(&page.segment);
        segment.is_some_and(|s| s.is_present(page.offset()))
    }

    /// Keeps every process from writing pages, mapped there yet or not.
    pub fn protect(&mut self, range: Range) {
        self.spaces.protect(range);
    }

    /// Whether nobody can write a page here.
    #[must_use]
    pub fn is_protected(&self, page: Page) -> bool {
        self.spaces.is_protected(page)
    }

    /// Permits that pages become writable here.
    fn release(&mut self, range: Range) {
        if self.has_replicas(range.segment) {
            range.iter().for_each(|page| self.empty_replicas(page));
        }
        self.spaces.release(range);
    }

    /// Takes pages from every process and frees them.
    pub fn drop_pages(&mut self, range: Range) {
        if !self.unplaced.is_empty() {
            range
                .iter()
                .for_each(|page| drop(self.unplaced.remove(&page)));
        }
        if self.has_replicas(range.segment) {
            range.iter().for_each(|page| self.empty_replicas(page));
        }
        let Some(segment) = self.segments.get(&range.segment) else {
            return;
        };
        if let Err(error) = segment.punch(range.offset(), range.length() as u64) {
            tracing::error!(?range, %error, "cannot drop pages");
        }
        self.spaces.unprotect_gone(range);
    }

    /// Puts what another node wrote into a page, which has its home here.
    pub fn merge(&mut self, page: Page, diff: &Diff) {
        self.empty_replicas(page);
        if let Some(bytes) = self.unplaced.get_mut(&page) {
            return diff.apply(bytes);
        }
        if self.is_fenced() {
            let mut bytes = [0; PAGE_SIZE];
            diff.apply(&mut bytes);
            self.unplaced.insert(page, bytes.into());
            return;
        }
        if !self.is_present(page) {
            self.protect(page.into());
            self.put(page, Access::Read, None);
        }
        let segment = self.segments.get_mut(&page.segment);
        let merged = segment.map(|s| s.merge(page.offset(), diff));
        if !matches!(merged, Some(Ok(()))) {
            tracing::error!(%page, ?merged, "cannot merge what another node wrote");
        }
    }

    /// Whether a process, or a replica, has the page in a page table, as far as can be told.
    #[must_use]
    pub fn is_seen(&self, page: Page) -> bool {
        self.is_replicated(page) || self.spaces.is_seen(page)
    }

    /// Makes the page raise SIGBUS where somebody waits for it.
    pub fn poison(&mut self, page: Page) {
        for waiter in self.waiting.remove(&page).unwrap_or_default() {
            self.spaces.poison_at(waiter.space, waiter.address);
        }
    }

    /// Appends the bytes of pages to a buffer; zeros for holes.
    pub fn append(&self, range: Range, buffer: &mut Vec<u8>) {
        let end = buffer.len() + range.length();
        let segment = self.segments.get(&range.segment);
        let read = segment
            .filter(|_| self.unplaced.is_empty())
            .map(|s| s.append(range.offset(), range.length(), buffer));
        if !matches!(read, Some(Ok(()))) {
            let start = buffer.len();
            buffer.resize(end, 0);
            let pages = buffer[start..].chunks_exact_mut(PAGE_SIZE);
            range
                .iter()
                .zip(pages)
                .for_each(|(page, bytes)| self.read(page, bytes));
        }
    }

    /// Copies a page's bytes out; zeros if it is a hole.
    pub fn read(&self, page: Page, buffer: &mut [u8]) {
        if let Some(bytes) = self.unplaced.get(&page) {
            return buffer.copy_from_slice(bytes);
        }
        let segment = self.segments.get(&page.segment);
        let read = segment.map(|s| s.read(page.offset(), buffer));
        if !matches!(read, Some(Ok(()))) {
            tracing::error!(%page, ?read, "cannot read page");
            buffer.fill(0);
        }
    }
}

/// Replicas.
impl Memory {
    /// Lets a thread that sees a user's replica read a page that is here. If anybody can write the
    /// page, that ends.
    pub fn show(&mut self, page: Page, user: UserId, space: SpaceId, address: u64) {
        let view = View::Replica(user);
        let waiter = Waiter {
            space,
            address,
            view,
        };
        if self.stops(page, waiter) {
            return;
        }
        if !self.is_protected(page) {
            self.protect(page.into());
        }
        match self.fill_replica(page, user) {
            Ok(Done::Yes | Done::Exists) => {
                self.wake(page, waiter);
            }
            result => {
                tracing::error!(%page, user, ?result, "cannot fill replica: SIGBUS for its reader");
                self.spaces.poison_at(space, address);
            }
        }
    }

    fn fill_replica(&mut self, page: Page, user: UserId) -> io::Result<Done> {
        let mut contents = [0; PAGE_SIZE];
        self.read(page, &mut contents);
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let segment = self.segments.get_mut(&page.segment);
        let segment = segment.ok_or(io::ErrorKind::NotFound)?;
        self.replicated.push(page);
        segment.fill_replica(user, page.index, &contents, own)
    }

    /// Takes a page out of all replicas.
    pub fn empty_replicas(&mut self, page: Page) {
        let segment = self.segments.get_mut(&page.segment);
        let Some(segment) = segment.filter(|s| s.is_replicated(page.index)) else {
            return;
        };
        self.replicated.remove(page);
        if let Err(error) = segment.punch_replicas(page.index) {
            tracing::error!(%page, %error, "cannot empty replicas");
        }
    }

    /// Takes the page that came first out of all replicas; whether there was one.
    pub fn empty_oldest_replicas(&mut self) -> bool {
        let oldest = self.replicated.pop();
        if let Some(page) = oldest {
            self.empty_replicas(page);
        }
        oldest.is_some()
    }

    /// Whether some replica has the page.
    #[must_use]
    pub fn is_replicated(&self, page: Page) -> bool {
        let segment = self.segments.get(&page.segment);
        segment.is_some_and(|s| s.is_replicated(page.index))
    }

    /// How many pages are in replicas, whosever.
    #[must_use]
    pub fn replicated(&self) -> usize {
        self.replicated.len()
    }

    /// Whether a reader has used its replica of a page since it got it, as far as can be told.
    #[must_use]
    pub fn is_read(&self, page: Page) -> bool {
        self.is_used(page, |view| view != View::Pages)
    }

    /// Whether a thread that was woken for a page, with such a view, has touched it since.
    ///
    /// A page is put into the page cache and not into page tables, so a page table has an entry
    /// once the thread that was woken has run and touched the page again.
    fn is_used(&self, page: Page, sees: impl Fn(View) -> bool) -> bool {
        let woken = self.woken.iter().rev();
        let mut woken = woken
            .filter(|(woken, waiter)| *woken == page && sees(waiter.view))
            .peekable();
        let is_mapped = |waiter: &Waiter| self.spaces.is_mapped(waiter.space, waiter.address);
        woken.peek().is_none() || woken.any(|(_, waiter)| is_mapped(waiter) != Some(false))
    }
}

impl migshm_coherence::Memory for Memory {
    fn touched(&self, page: Page) -> bool {
        self.is_used(page, |_| true)
    }

    fn present(&self, extent: Extent) -> PageSet {
        let segment = self.segments.get(&extent.segment);
        let mut present = segment.map(|s| s.present(extent)).unwrap_or_default();
        for page in self.unplaced.keys().filter(|p| p.extent() == extent) {
            present.insert(page.index % EXTENT_PAGES);
        }
        present
    }
}

/// What as many pages as possible from the first of some places on contain.
fn adjacent<'a>(
    mut places: std::ops::Range<u32>,
    contents: &impl Fn(u32) -> Option<&'a [u8]>,
) -> Contents<'a> {
    match places.next().and_then(contents) {
        Some(first) => {
            let mut pages = Adjacent::new(first);
            while places
                .next()
                .and_then(contents)
                .is_some_and(|page| pages.extend(page))
            {}
            Contents::Bytes(pages)
        }
        None => {
            let zeros = places.take_while(|&place| contents(place).is_none());
            Contents::Zeros(1 + u32::try_from(zeros.count()).expect("a part of the range"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_finds_no_room_is_neither_lost_nor_zeros() {
        let Ok(device) = Uffd::device() else {
            return eprintln!("skipped: userfaultfd is not to be had");
        };
        let mut memory = Memory::new(Some(&device)).expect("a userfaultfd");
        let segment = SegmentId(1);
        memory.add_segment(segment, 4 * PAGE).expect("a memfd");
        memory.track(segment).expect("it can be registered");
        let page = Page { segment, index: 1 };
        let contents = [7; PAGE_SIZE];
        let read = |memory: &Memory| {
            let mut bytes = [1; PAGE_SIZE];
            memory.read(page, &mut bytes);
            bytes
        };

        let own = memory.own.take();
        memory.install(page.into(), Access::Write, |_| Some(&contents));
        assert!(!memory.is_present(page));
        assert_eq!(read(&memory), contents, "what another node is sent");

        // There is room again when a thread touches it.
        memory.own = own;
        memory.retry(page, SpaceId(0), 0, Access::Write);
        assert!(memory.is_present(page));
        assert_eq!(read(&memory), contents);

        let own = memory.own.take();
        memory.drop_pages(page.into());
        memory.install(page.into(), Access::Read, |_| None);
        assert_eq!(read(&memory), [0; PAGE_SIZE]);
        memory.drop_pages(page.into());
        memory.own = own;
        memory.install(page.into(), Access::Read, |_| Some(&contents));
        assert_eq!(read(&memory), contents, "nothing is left of what it was");
    }
}
