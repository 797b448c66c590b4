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
//! another process then maps it without an event, and still cannot write it unseen. A page is put
//! in by `UFFDIO_COPY` only (atomic: no neighbour maps a half-written page), through the daemon's
//! own mapping, which is registered for nothing but that. The daemon itself reads by `pread`, which neither faults nor fills a hole.
//! Punching a page out of the memfd takes it from every process at once.
//!
//! A fork duplicates mappings and protections. The kernel reports it on the parent's userfaultfd
//! before `fork` returns, and until that report is read it refuses to change the parent's page
//! tables (`Done::Busy`); reading it adds the child's mappings to the segment, behind those that a
//! loop over them has still to visit. No mapping escapes, whichever came first.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Duration;

use migshm_coherence::PageSet;
use migshm_protocol::ids::{EXTENT_PAGES, PAGE_SIZE};
use migshm_protocol::page::Access;
use migshm_protocol::{Extent, Page, SegmentId};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::uffd::{Done, Event, Uffd};

const PAGE: u64 = PAGE_SIZE as u64;
const MEMFD_NAME: &CStr = c"migshm";
/// How long a forking thread is given to notice that its event was read.
const FORK_PAUSE: Duration = Duration::from_micros(20);

/// How many threads that were woken are remembered: more than fault within a hold.
const WOKEN: usize = 256;

/// An address space, on this node and in this daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub u64);

/// An attach: one successful `shmat`, or a fork's copy of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttachId(pub u64);

/// What an address space reports.
#[derive(Debug)]
pub enum Report {
    /// A touch of `address` that must wait.
    Fault {
        /// Page-aligned.
        address: u64,
        /// Whether to write.
        write: bool,
        /// The touching thread.
        thread: i32,
    },
    /// A child was forked.
    Forked(SpaceId),
}

/// All segments and address spaces of the node.
pub struct Memory {
    /// Of the daemon's own mappings; `None` where userfaultfd is not to be had.
    own: Option<Uffd>,
    segments: FxHashMap<SegmentId, Segment>,
    spaces: BTreeMap<SpaceId, Space>,
    /// Threads that wait for a page: where they touched it.
    waiting: FxHashMap<Page, Vec<(SpaceId, u64)>>,
    /// The last [`WOKEN`] of them that were woken.
    woken: VecDeque<(Page, SpaceId, u64)>,
    /// Pages that came and could not be kept.
    lost: FxHashSet<Page>,
    reports: VecDeque<(SpaceId, Report)>,
    /// How often mappings were taken out of a segment's list.
    removals: u64,
    last_id: u64,
}

struct Segment {
    memfd: File,
    pages: u32,
    /// The daemon's own mapping; there while the segment is tracked.
    own: Option<OwnMapping>,
    /// Of a tracked segment: the pages that may only be read here.
    protected: Bits,
    mappings: Vec<Mapping>,
}

/// A run of a segment's pages in an address space.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    space: SpaceId,
    attach: AttachId,
    address: u64,
    first_page: u32,
    pages: u32,
    /// False once the process has leave to unmap it: it no longer counts as an attach.
    counts: bool,
}

impl Mapping {
    fn address_of(&self, page: u32) -> Option<u64> {
        let offset = page.checked_sub(self.first_page)?;
        (offset < self.pages).then(|| self.address + u64::from(offset) * PAGE)
    }

    fn end(&self) -> u64 {
        self.address + u64::from(self.pages) * PAGE
    }
}

struct Space {
    uffd: Option<Rc<Uffd>>,
    /// `/proc/PID/pagemap`, once the process is known.
    pagemap: Option<File>,
    /// Address of the anchor page; 0 without userfaultfd.
    anchor: u64,
    /// Segments with a mapping here (each once).
    segments: Vec<SegmentId>,
}

struct OwnMapping {
    address: u64,
    length: usize,
}

/// A set of page indexes, as large as its largest.
#[derive(Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn set(&mut self, index: u32, on: bool) {
        let (word, bit) = (index as usize / 64, 1 << (index % 64));
        if on {
            if self.0.len() <= word {
                self.0.resize(word + 1, 0);
            }
            self.0[word] |= bit;
        } else if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Runs of neighbours: first index and length.
    fn runs(&self) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for (word, bits) in (0u32..).zip(&self.0) {
            for index in (0..64)
                .filter(|bit| bits & (1 << bit) != 0)
                .map(|bit| word * 64 + bit)
            {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == index => *count += 1,
                    _ => runs.push((index, 1)),
                }
            }
        }
        runs
    }
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Segment::map_own`, nothing refers into it.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.length) };
    }
}

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
            spaces: BTreeMap::new(),
            waiting: FxHashMap::default(),
            woken: VecDeque::with_capacity(WOKEN),
            lost: FxHashSet::default(),
            reports: VecDeque::new(),
            removals: 0,
            last_id: 0,
        })
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// A number for a new attach.
    pub fn new_attach(&mut self) -> AttachId {
        AttachId(self.next_id())
    }

    /// Makes a segment's memory, all holes. Sealed, so that no process that maps it can resize it.
    ///
    /// # Errors
    /// Those of `memfd_create(2)` and `ftruncate(2)`.
    pub fn add_segment(&mut self, id: SegmentId, size: u64) -> io::Result<()> {
        let pages = u32::try_from(size.div_ceil(PAGE)).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: the name is a C string; the call returns a new descriptor or -1.
        let fd = unsafe {
            libc::memfd_create(
                MEMFD_NAME.as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a descriptor that nothing else owns.
        let memfd = unsafe { File::from_raw_fd(fd) };
        memfd.set_len(u64::from(pages) * PAGE)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain fcntl on an owned descriptor.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.segments.insert(
            id,
            Segment {
                memfd,
                pages,
                own: None,
                protected: Bits::default(),
                mappings: Vec::new(),
            },
        );
        Ok(())
    }

    /// Forgets a segment and frees its pages once nothing maps them.
    pub fn remove_segment(&mut self, id: SegmentId) {
        if let Some(segment) = self.segments.remove(&id) {
            for mapping in &segment.mappings {
                self.wake_range(mapping);
            }
            self.waiting.retain(|page, _| page.segment != id);
            self.woken.retain(|(page, ..)| page.segment != id);
            self.lost.retain(|page| page.segment != id);
            for space in self.spaces.values_mut() {
                space.segments.retain(|s| *s != id);
            }
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
        self.segments.get(&id).map(|s| s.pages)
    }

    /// Whether the segment's pages are tracked.
    #[must_use]
    pub fn is_tracked(&self, id: SegmentId) -> bool {
        self.segments.get(&id).is_some_and(|s| s.own.is_some())
    }

    /// A descriptor of the segment to hand to a process. One that is not writable cannot be
    /// mapped writable, now or later.
    ///
    /// # Errors
    /// `ENOENT` for an unknown segment, else those of `open(2)`.
    pub fn descriptor(&self, id: SegmentId, writable: bool) -> io::Result<OwnedFd> {
        let segment = self.segments.get(&id).ok_or(io::ErrorKind::NotFound)?;
        if writable {
            return Ok(segment.memfd.try_clone()?.into());
        }
        Ok(File::open(format!("/proc/self/fd/{}", segment.memfd.as_raw_fd()))?.into())
    }

    /// Starts to track a segment: from now on every touch of a page that the engine has not
    /// granted is reported. Pages that are there stay as they are.
    ///
    /// # Errors
    /// Those of `mmap(2)` and `UFFDIO_REGISTER`; `Unsupported` without userfaultfd.
    pub fn track(&mut self, id: SegmentId) -> io::Result<()> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let segment = self.segments.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        if segment.own.is_some() {
            return Ok(());
        }
        let mapping = segment.map_own()?;
        own.register(mapping.address, mapping.length as u64)?;
        segment.own = Some(mapping);
        for mapping in &self.segments[&id].mappings {
            self.register(mapping);
        }
        Ok(())
    }

    /// Tracks a mapping. Where that fails the process has unmapped it, is gone, or watches the range
    /// itself; the loss is its own.
    fn register(&self, mapping: &Mapping) {
        let Some(uffd) = self.uffd(mapping.space) else {
            return;
        };
        let length = u64::from(mapping.pages) * PAGE;
        if let Err(error) = uffd.register(mapping.address, length) {
            tracing::error!(space = mapping.space.0, %error, "a mapping cannot be tracked");
        }
    }

    /// A new address space. With `uffd`, `anchor` is its page that reports forks and who the
    /// child is.
    ///
    /// # Errors
    /// Those of `UFFDIO_REGISTER` on the anchor.
    pub fn add_space(&mut self, uffd: Option<Uffd>, anchor: u64) -> io::Result<SpaceId> {
        if let Some(uffd) = &uffd {
            uffd.register_missing(anchor, PAGE)?;
        }
        let id = SpaceId(self.next_id());
        self.spaces.insert(
            id,
            Space {
                uffd: uffd.map(Rc::new),
                pagemap: None,
                anchor,
                segments: Vec::new(),
            },
        );
        Ok(id)
    }

    /// The address space's userfaultfd, to wait for reports on.
    #[must_use]
    pub fn uffd(&self, id: SpaceId) -> Option<Rc<Uffd>> {
        self.spaces.get(&id)?.uffd.clone()
    }

    /// Says whose address space it is.
    pub fn identify(&mut self, id: SpaceId, pid: i32) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.pagemap = File::open(format!("/proc/{pid}/pagemap"))
                .inspect_err(|error| tracing::debug!(pid, %error, "cannot open pagemap"))
                .ok();
        }
    }

    /// Whether the page table at an address has an entry. Nothing is known without a pagemap.
    fn is_mapped(&self, space: SpaceId, address: u64) -> Option<bool> {
        /// `Documentation/admin-guide/mm/pagemap.rst`.
        const PRESENT: u64 = 1 << 63;
        let pagemap = self.spaces.get(&space)?.pagemap.as_ref()?;
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, address / PAGE * 8).ok()?;
        Some(u64::from_le_bytes(entry) & PRESENT != 0)
    }

    /// Whether an address space with a userfaultfd still exists; true without one.
    #[must_use]
    pub fn is_alive(&self, id: SpaceId) -> bool {
        let Some(space) = self.spaces.get(&id) else {
            return false;
        };
        space
            .uffd
            .as_ref()
            .is_none_or(|uffd| uffd.alive(space.anchor))
    }

    /// Forgets an address space; returns how many attaches of which segments went with it.
    pub fn remove_space(&mut self, id: SpaceId) -> Vec<(SegmentId, u32)> {
        let Some(space) = self.spaces.remove(&id) else {
            return Vec::new();
        };
        let mut ended = Vec::new();
        for segment_id in space.segments {
            let Some(segment) = self.segments.get_mut(&segment_id) else {
                continue;
            };
            ended.push((segment_id, segment.attaches(id)));
            segment.mappings.retain(|m| m.space != id);
        }
        for waiters in self.waiting.values_mut() {
            waiters.retain(|(space, _)| *space != id);
        }
        self.woken.retain(|(_, space, _)| *space != id);
        let forked = |report: &Report| matches!(report, Report::Forked(_));
        self.reports
            .retain(|(space, report)| *space != id || forked(report));
        ended
    }

    /// Copies an address space's attaches to that of a child that was forked unseen.
    pub fn inherit(&mut self, parent: SpaceId, child: SpaceId) {
        self.copy_mappings(parent, child);
    }

    fn copy_mappings(&mut self, parent: SpaceId, child: SpaceId) {
        let segments = self
            .spaces
            .get(&parent)
            .map(|s| s.segments.clone())
            .unwrap_or_default();
        for id in &segments {
            let Some(segment) = self.segments.get_mut(id) else {
                continue;
            };
            let copies: Vec<Mapping> = segment
                .mappings
                .iter()
                .filter(|m| m.space == parent)
                .map(|m| Mapping {
                    space: child,
                    counts: true,
                    ..*m
                })
                .collect();
            segment.mappings.extend(copies);
        }
        if let Some(space) = self.spaces.get_mut(&child) {
            space.segments = segments;
        }
    }

    /// Attaches of an address space, by segment.
    #[must_use]
    pub fn attaches(&self, id: SpaceId) -> Vec<(SegmentId, u32)> {
        let Some(space) = self.spaces.get(&id) else {
            return Vec::new();
        };
        space
            .segments
            .iter()
            .filter_map(|s| Some((*s, self.segments.get(s)?.attaches(id))))
            .collect()
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
        attach: AttachId,
        segment: SegmentId,
        address: u64,
    ) -> (Vec<SegmentId>, io::Result<()>) {
        let Some(entry) = self
            .segments
            .get(&segment)
            .filter(|_| self.spaces.contains_key(&space))
        else {
            return (Vec::new(), Err(io::ErrorKind::NotFound.into()));
        };
        let length = u64::from(entry.pages) * PAGE;
        if !address.is_multiple_of(PAGE) || address.checked_add(length).is_none() {
            return (Vec::new(), Err(io::ErrorKind::InvalidInput.into()));
        }
        let mapping = Mapping {
            space,
            attach,
            address,
            first_page: 0,
            pages: entry.pages,
            counts: true,
        };
        let tracked = entry.own.is_some();
        let covered = self.carve(space, address, mapping.end());
        let ended = self.ended(space, covered);
        self.link(mapping, segment);
        if tracked {
            self.register(&mapping);
            for (first, count) in self.segments[&segment].protected.runs() {
                let start = address + u64::from(first) * PAGE;
                self.in_space(space, |uffd| {
                    uffd.protect(start, u64::from(count) * PAGE, true)
                });
            }
        }
        (ended, Ok(()))
    }

    fn link(&mut self, mapping: Mapping, segment: SegmentId) {
        if let (Some(entry), Some(space)) = (
            self.segments.get_mut(&segment),
            self.spaces.get_mut(&mapping.space),
        ) {
            entry.mappings.push(mapping);
            if !space.segments.contains(&segment) {
                space.segments.push(segment);
            }
        }
    }

    fn wake_range(&self, mapping: &Mapping) {
        if let Some(uffd) = self.uffd(mapping.space) {
            uffd.wake(mapping.address, mapping.end() - mapping.address);
        }
    }

    /// The attach that starts at `address`, with its segment and mapped length in bytes.
    #[must_use]
    pub fn attach_at(&self, space: SpaceId, address: u64) -> Option<(AttachId, SegmentId, u64)> {
        let (segment, mapping) = self.mapping_at(space, address)?;
        (mapping.address == address && mapping.first_page == 0 && mapping.counts).then(|| {
            let length = u64::from(self.segments[&segment].pages) * PAGE;
            (mapping.attach, segment, length)
        })
    }

    /// Stops counting an attach that the process is about to unmap. It is served until
    /// [`Memory::unmap`], as other threads may still touch it.
    pub fn stop_counting(&mut self, space: SpaceId, attach: AttachId) {
        for segment in self.segments.values_mut() {
            for mapping in segment
                .mappings
                .iter_mut()
                .filter(|m| m.space == space && m.attach == attach)
            {
                mapping.counts = false;
            }
        }
    }

    /// Forgets a range that the process has unmapped, and lets go any thread that still waits in
    /// it. Returns the segments of attaches of which nothing is left, once for each attach.
    pub fn unmap(&mut self, space: SpaceId, address: u64, length: u64) -> Vec<SegmentId> {
        let Some(end) = address
            .checked_add(length)
            .filter(|end| (address | end).is_multiple_of(PAGE))
        else {
            return Vec::new();
        };
        let covered = self.carve(space, address, end);
        self.ended(space, covered)
    }

    /// Forgets what is left of one attach, wherever it was; something else may be there by now.
    pub fn unmap_attach(&mut self, space: SpaceId, attach: AttachId) {
        let mut covered = Vec::new();
        for (id, segment) in &mut self.segments {
            let of_attach = |m: &mut Mapping| m.space == space && m.attach == attach;
            covered.extend(segment.mappings.extract_if(.., of_attach).map(|m| (*id, m)));
        }
        self.removals += 1;
        self.ended(space, covered);
    }

    /// Segments of the attaches that were counted and lost their last piece, which is in `covered`.
    fn ended(&mut self, space: SpaceId, covered: Vec<(SegmentId, Mapping)>) -> Vec<SegmentId> {
        let mut ended = Vec::new();
        let mut seen = FxHashSet::default();
        for (id, old) in covered {
            self.wake_range(&old);
            let rest = &self.segments[&id].mappings;
            let has = |m: &Mapping| m.space == space && m.attach == old.attach;
            if old.counts && !rest.iter().any(has) && seen.insert(old.attach) {
                ended.push(id);
            }
            if !rest.iter().any(|m| m.space == space)
                && let Some(space) = self.spaces.get_mut(&space)
            {
                space.segments.retain(|s| *s != id);
            }
        }
        ended
    }

    fn mapping_at(&self, space: SpaceId, address: u64) -> Option<(SegmentId, Mapping)> {
        self.spaces.get(&space)?.segments.iter().find_map(|id| {
            let found = self.segments.get(id)?.mappings.iter();
            let mut found =
                found.filter(|m| m.space == space && m.address <= address && address < m.end());
            Some((*id, *found.next()?))
        })
    }

    /// The page at an address of an address space.
    #[must_use]
    pub fn locate(&self, space: SpaceId, address: u64) -> Option<Page> {
        let (segment, mapping) = self.mapping_at(space, address)?;
        let offset = u32::try_from((address - mapping.address) / PAGE).expect("inside the mapping");
        Some(Page {
            segment,
            index: mapping.first_page + offset,
        })
    }

    /// Takes a range out of an address space's mappings and returns what was there.
    fn carve(&mut self, space: SpaceId, start: u64, end: u64) -> Vec<(SegmentId, Mapping)> {
        self.removals += 1;
        let mut taken = Vec::new();
        let Some(entry) = self.spaces.get(&space) else {
            return taken;
        };
        for id in entry.segments.clone() {
            let Some(segment) = self.segments.get_mut(&id) else {
                continue;
            };
            let hit: Vec<Mapping> = segment
                .mappings
                .extract_if(.., |m| {
                    m.space == space && m.address < end && start < m.end()
                })
                .collect();
            for mapping in hit {
                let from = start.max(mapping.address);
                let to = end.min(mapping.end());
                let slice = |from: u64, to: u64| Mapping {
                    address: from,
                    first_page: mapping.first_page
                        + u32::try_from((from - mapping.address) / PAGE).expect("inside"),
                    pages: u32::try_from((to - from) / PAGE).expect("inside"),
                    ..mapping
                };
                taken.push((id, slice(from, to)));
                let rest = [slice(mapping.address, from), slice(to, mapping.end())];
                segment
                    .mappings
                    .extend(rest.into_iter().filter(|m| m.pages > 0));
            }
        }
        taken
    }

    /// Reads what an address space has to report into the queue of [`Memory::next_report`].
    pub fn collect(&mut self, space: SpaceId) {
        let Some(uffd) = self.uffd(space) else { return };
        let mut events = Vec::new();
        if let Err(error) = uffd.events(&mut events) {
            tracing::warn!(space = space.0, %error, "cannot read userfaultfd events");
        }
        for event in events {
            match event {
                Event::Fault {
                    address,
                    write,
                    thread,
                } => {
                    self.reports.push_back((
                        space,
                        Report::Fault {
                            address,
                            write,
                            thread,
                        },
                    ));
                }
                Event::Fork(uffd) => {
                    let child = SpaceId(self.next_id());
                    let anchor = self.spaces.get(&space).map_or(0, |s| s.anchor);
                    self.spaces.insert(
                        child,
                        Space {
                            uffd: Some(Rc::new(uffd)),
                            pagemap: None,
                            anchor,
                            segments: Vec::new(),
                        },
                    );
                    self.copy_mappings(space, child);
                    self.reports.push_back((space, Report::Forked(child)));
                }
                Event::Remap { from, to, len } => {
                    for (segment, piece) in self.carve(space, from, from.saturating_add(len)) {
                        self.link(
                            Mapping {
                                address: to + (piece.address - from),
                                ..piece
                            },
                            segment,
                        );
                    }
                }
            }
        }
    }

    /// The oldest report not yet handled.
    pub fn next_report(&mut self) -> Option<(SpaceId, Report)> {
        self.reports.pop_front()
    }

    /// Whether `address` is the space's anchor page.
    #[must_use]
    pub fn is_anchor(&self, space: SpaceId, address: u64) -> bool {
        self.spaces.get(&space).is_some_and(|s| s.anchor == address)
    }

    /// Fills the anchor page: the process in this address space is known now.
    pub fn introduce(&mut self, space: SpaceId, address: u64, page: &[u8; PAGE_SIZE]) {
        self.in_space(space, |uffd| uffd.copy(address, page));
        if let Some(uffd) = self.uffd(space) {
            uffd.wake(address, PAGE);
        }
    }

    /// Returns when every fork of the address space that is under way has been reported.
    pub fn await_forks(&mut self, space: SpaceId) {
        // Any change of the address space is refused until then; this one changes nothing.
        let anchor = self.spaces.get(&space).map_or(0, |s| s.anchor);
        self.in_space(space, |uffd| uffd.protect(anchor, PAGE, false));
    }

    /// Does `operation` in an address space; if that is being forked, once the fork is seen.
    fn in_space(&mut self, space: SpaceId, operation: impl Fn(&Uffd) -> io::Result<Done>) -> Done {
        loop {
            let Some(uffd) = self.uffd(space) else {
                return Done::Dead;
            };
            match operation(&uffd) {
                Ok(Done::Busy) => {
                    self.collect(space);
                    std::thread::sleep(FORK_PAUSE);
                }
                Ok(done) => return done,
                Err(error) => {
                    tracing::error!(space = space.0, %error, "userfaultfd operation failed");
                    return Done::Unmapped;
                }
            }
        }
    }

    /// Remembers that a thread waits for a page.
    pub fn wait(&mut self, page: Page, space: SpaceId, address: u64) {
        let waiters = self.waiting.entry(page).or_default();
        if !waiters.contains(&(space, address)) {
            waiters.push((space, address));
        }
    }

    /// Puts a page in (zeros without `contents`), with the given access for every process, and
    /// wakes who waits for it.
    pub fn install(&mut self, page: Page, access: Access, contents: Option<&[u8]>) {
        match access {
            Access::Read => self.protect(page),
            Access::Write => self.note_protection(page, false),
        }
        self.put(page, contents);
        self.wake_waiters(page);
    }

    fn put(&mut self, page: Page, contents: Option<&[u8]>) {
        let mut result = self.try_put(page, contents);
        if matches!(result, Ok(Done::Exists)) {
            // Some process got at the page cache untracked; what it put there is not the page.
            tracing::error!(%page, "page in the way");
            self.drop_page(page);
            result = self.try_put(page, contents);
        }
        if !matches!(result, Ok(Done::Yes)) {
            tracing::error!(%page, ?result, "cannot keep page: SIGBUS for who needs it");
            self.lost.insert(page);
            self.poison(page);
        }
    }

    fn try_put(&self, page: Page, contents: Option<&[u8]>) -> io::Result<Done> {
        let segment = self.segments.get(&page.segment);
        let (Some(uffd), Some(own)) = (&self.own, segment.and_then(|s| s.own.as_ref())) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let address = own.address + page.offset();
        match contents {
            Some(bytes) => uffd.copy(address, bytes),
            None => uffd.zero(address),
        }
    }

    /// Wakes who waits for a page, and remembers who that was.
    fn wake_waiters(&mut self, page: Page) {
        let waiters = self.waiting.remove(&page).unwrap_or_default();
        self.wake(&waiters);
        for (space, address) in waiters {
            if self.woken.len() == WOKEN {
                self.woken.pop_front();
            }
            self.woken.push_back((page, space, address));
        }
    }

    /// Gives a page that is here another access and wakes who waits for it.
    pub fn change(&mut self, page: Page, access: Access) {
        match access {
            Access::Read => self.protect(page),
            // Other mappings' protection is lifted when they fault.
            Access::Write => {
                self.note_protection(page, false);
                for (space, address) in self.waiting.get(&page).cloned().unwrap_or_default() {
                    self.in_space(space, |uffd| uffd.protect(address, PAGE, false));
                }
            }
        }
        self.wake_waiters(page);
    }

    /// Lets a thread go on whose page has come, or was granted, between its fault and now.
    pub fn retry(&mut self, page: Page, space: SpaceId, address: u64, access: Access) {
        if self.lost.contains(&page) {
            return self.poison_at(space, address);
        }
        if !self.is_present(page) {
            // The program itself gave the page back (MADV_REMOVE), so it reads as zeros.
            if access == Access::Read {
                self.protect(page);
            }
            self.put(page, None);
        }
        if access == Access::Write {
            self.in_space(space, |uffd| uffd.protect(address, PAGE, false));
        }
        self.wake(&[(space, address)]);
    }

    fn is_present(&self, page: Page) -> bool {
        let Some(segment) = self.segments.get(&page.segment) else {
            return false;
        };
        segment.next_data(page.offset()) == Some(page.offset())
    }

    fn wake(&self, waiters: &[(SpaceId, u64)]) {
        for (space, address) in waiters {
            if let Some(uffd) = self.spaces.get(space).and_then(|s| s.uffd.as_ref()) {
                uffd.wake(*address, PAGE);
            }
        }
    }

    /// Keeps every process from writing a page, mapped there yet or not.
    pub fn protect(&mut self, page: Page) {
        self.note_protection(page, true);
        loop {
            // Forks found on the way append to the list (see the module's comment); if they took
            // something out of it, one may have been skipped.
            let before = self.removals;
            let mut index = 0;
            while let Some(mapping) = self.mapping(page.segment, index) {
                index += 1;
                if let Some(address) = mapping.address_of(page.index) {
                    self.in_space(mapping.space, |uffd| uffd.protect(address, PAGE, true));
                }
            }
            if self.removals == before {
                return;
            }
        }
    }

    fn mapping(&self, segment: SegmentId, index: usize) -> Option<Mapping> {
        self.segments.get(&segment)?.mappings.get(index).copied()
    }

    fn note_protection(&mut self, page: Page, on: bool) {
        if let Some(segment) = self.segments.get_mut(&page.segment) {
            segment.protected.set(page.index, on);
        }
    }

    /// Takes a page from every process and frees it.
    pub fn drop_page(&mut self, page: Page) {
        self.note_protection(page, false);
        let Some(segment) = self.segments.get(&page.segment) else {
            return;
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let offset = libc::off_t::try_from(page.offset()).expect("a file offset");
        let length = libc::off_t::try_from(PAGE).expect("a file offset");
        // SAFETY: plain fallocate on an owned descriptor; mappings of a hole fault, as they must.
        if unsafe { libc::fallocate(segment.memfd.as_raw_fd(), mode, offset, length) } < 0 {
            tracing::error!(%page, error = %io::Error::last_os_error(), "cannot drop page");
        }
    }

    /// Makes the page raise SIGBUS where somebody waits for it.
    pub fn poison(&mut self, page: Page) {
        for (space, address) in self.waiting.remove(&page).unwrap_or_default() {
            self.poison_at(space, address);
        }
    }

    /// Makes an address raise SIGBUS, also for who waits there.
    pub fn poison_at(&mut self, space: SpaceId, address: u64) {
        self.in_space(space, |uffd| uffd.poison(address));
        self.wake(&[(space, address)]);
    }

    /// Copies a page's bytes out; zeros if it is a hole.
    pub fn read(&self, page: Page, buffer: &mut [u8]) {
        let read = self
            .segments
            .get(&page.segment)
            .map(|s| s.memfd.read_exact_at(buffer, page.offset()));
        if !matches!(read, Some(Ok(()))) {
            tracing::error!(%page, ?read, "cannot read page");
            buffer.fill(0);
        }
    }

    /// Bytes of memory that the segments take here.
    #[must_use]
    pub fn resident(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.segments
            .values()
            .filter_map(|s| s.memfd.metadata().ok())
            .map(|m| m.blocks() * 512)
            .sum()
    }

    /// How many segments and address spaces there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.segments.len(), self.spaces.len())
    }
}

impl migshm_coherence::Memory for Memory {
    /// A page is put into the page cache and not into page tables, so a page table has an entry
    /// once the thread that was woken has run and touched the page again.
    fn touched(&self, page: Page) -> bool {
        let mut woken = self
            .woken
            .iter()
            .rev()
            .filter(|(woken, ..)| *woken == page)
            .peekable();
        woken.peek().is_none()
            || woken.any(|(_, space, address)| self.is_mapped(*space, *address) != Some(false))
    }

    fn present(&self, extent: Extent) -> PageSet {
        let mut set = PageSet::default();
        let Some(segment) = self.segments.get(&extent.segment) else {
            return set;
        };
        let start = u64::from(extent.first_page()) * PAGE;
        let end = start + u64::from(EXTENT_PAGES) * PAGE;
        let mut offset = start;
        while let Some(data) = segment.next_data(offset).filter(|data| *data < end) {
            set.insert(u32::try_from((data - start) / PAGE).expect("inside the extent"));
            offset = data + PAGE;
        }
        set
    }
}

impl Segment {
    /// How many attaches an address space has.
    fn attaches(&self, space: SpaceId) -> u32 {
        let of_space = self
            .mappings
            .iter()
            .filter(|m| m.space == space && m.counts);
        let attaches: FxHashSet<AttachId> = of_space.map(|m| m.attach).collect();
        u32::try_from(attaches.len()).expect("attaches fit")
    }

    /// Offset of the first page at or after `offset` that is not a hole.
    fn next_data(&self, offset: u64) -> Option<u64> {
        let offset = libc::off_t::try_from(offset).ok()?;
        // SAFETY: plain lseek on an owned descriptor, whose position nothing uses.
        u64::try_from(unsafe { libc::lseek(self.memfd.as_raw_fd(), offset, libc::SEEK_DATA) }).ok()
    }

    fn map_own(&self) -> io::Result<OwnMapping> {
        let length = self.pages as usize * PAGE_SIZE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice; never dereferenced.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                self.memfd.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: advice on the mapping just made. A huge page could not be punched out in part.
        unsafe { libc::madvise(address, length, libc::MADV_NOHUGEPAGE) };
        Ok(OwnMapping {
            address: address as u64,
            length,
        })
    }
}
