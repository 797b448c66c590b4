//! The address spaces of the node's processes: what they report, and what is done to their page
//! tables.
//!
//! A fork duplicates mappings and protections. The kernel reports it on the parent's userfaultfd
//! before `fork` returns, and until that report is read it refuses to change the parent's page
//! tables (`Done::Busy`); reading it adds the child's mappings to the segment, behind those that a
//! loop over them has still to visit. No mapping escapes, whichever came first.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Duration;

use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::{Page, SegmentId};
use rustc_hash::FxHashMap;

use super::PAGE;
use super::bits::Bits;
use super::file::FileId;
use super::mappings::{AttachId, Granted, Mapping, Mappings, Replaced, Seen, View};
use super::maps::{self, Run};
use super::range::{Adjacent, Range};
use super::segment::Segment;
use crate::handover::descriptor;
use crate::uffd::{Done, Event, Uffd};

/// How long a forking thread is given to notice that its event was read.
const FORK_PAUSE: Duration = Duration::from_micros(20);

/// An address space, on this node and in this daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SpaceId(pub u64);

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
    /// Nothing is mapped any more of attaches of these segments.
    Ended(Vec<SegmentId>),
}

/// All address spaces of the node.
#[derive(Default, Serialize, Deserialize)]
pub struct Spaces {
    spaces: BTreeMap<SpaceId, Space>,
    /// What they map. Anything that changes page tables as well is done by [`Spaces`].
    pub mappings: Mappings,
    /// Tracked segments, with the pages that nobody can write here.
    tracked: FxHashMap<SegmentId, Bits>,
    /// What the files are of that are mapped.
    files: FxHashMap<FileId, (SegmentId, View)>,
    #[serde(skip)]
    reports: VecDeque<(SpaceId, Report)>,
    last_id: u64,
}

#[derive(Serialize, Deserialize)]
struct Space {
    uffd: Option<Rc<Uffd>>,
    /// `/proc/PID`, once the process is known.
    #[serde(with = "descriptor::optional")]
    process: Option<File>,
    /// Its `pagemap`, while there are descriptors enough.
    #[serde(with = "descriptor::optional")]
    pagemap: Option<File>,
    /// Address of the anchor page; 0 without userfaultfd.
    anchor: u64,
    /// Whether it, or one that it is a copy of, has moved mappings: a fork at that moment may have
    /// copied them before or after.
    moved: bool,
    /// Attaches that it has leave to make, and has not told the places of.
    untold: u32,
    /// Children that were forked while there were any.
    copies: Vec<SpaceId>,
}

impl Spaces {
    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
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
                process: None,
                pagemap: None,
                anchor,
                moved: false,
                untold: 0,
                copies: Vec::new(),
            },
        );
        Ok(id)
    }

    /// Whether a segment is tracked.
    #[must_use]
    pub fn is_tracked(&self, segment: SegmentId) -> bool {
        self.tracked.contains_key(&segment)
    }

    /// The address space's userfaultfd, to wait for reports on.
    #[must_use]
    pub fn uffd(&self, id: SpaceId) -> Option<Rc<Uffd>> {
        self.spaces.get(&id)?.uffd.clone()
    }

    /// Says whose address space it is.
    pub fn identify(&mut self, id: SpaceId, pid: i32) {
        let open = |name: &str| {
            File::open(format!("/proc/{pid}{name}"))
                .inspect_err(|error| tracing::debug!(pid, %error, "cannot look at a process"))
                .ok()
        };
        if let Some(space) = self.spaces.get_mut(&id) {
            space.process = open("");
            space.pagemap = open("/pagemap");
            if space.moved {
                self.look(id);
            }
        }
    }

    /// Its process has ended; others may still be in the address space.
    pub fn forget_process(&mut self, id: SpaceId) {
        if let Some(space) = self.spaces.get_mut(&id) {
            space.process = None;
        }
    }

    /// Whether the page table at an address has an entry. Nothing is known without a pagemap.
    pub(super) fn is_mapped(&self, space: SpaceId, address: u64) -> Option<bool> {
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

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.spaces.len()
    }

    /// See [`Memory::remove_space`](super::Memory::remove_space).
    pub(super) fn remove(&mut self, id: SpaceId) -> Vec<(SegmentId, u32)> {
        if self.spaces.remove(&id).is_none() {
            return Vec::new();
        }
        let fault = |report: &Report| matches!(report, Report::Fault { .. });
        self.reports
            .retain(|(space, report)| *space != id || !fault(report));
        self.mappings.remove_space(id)
    }

    /// Forgets the mappings of a segment, and lets go any thread that still waits in them.
    pub(super) fn remove_segment(&mut self, id: SegmentId) {
        self.tracked.remove(&id);
        self.files.retain(|_, (segment, _)| *segment != id);
        for mapping in self.mappings.remove_segment(id) {
            self.wake_range(&mapping);
        }
    }

    /// A number for a new attach, which the address space has leave to make.
    pub fn new_attach(&mut self, space: SpaceId) -> AttachId {
        if let Some(space) = self.spaces.get_mut(&space) {
            space.untold += 1;
        }
        AttachId(self.next_id())
    }

    /// An address space has told where an attach is, or will not. Returns the children that were
    /// forked since it had leave to.
    pub fn attach_told(&mut self, space: SpaceId) -> Vec<SpaceId> {
        let Some(space) = self.spaces.get_mut(&space) else {
            return Vec::new();
        };
        space.untold -= 1;
        if space.untold == 0 {
            std::mem::take(&mut space.copies)
        } else {
            space.copies.clone()
        }
    }

    /// Copies an attach to a child that was forked after it was made, and before it was told of.
    /// Whether the child still exists.
    pub fn inherit_attach(&mut self, parent: SpaceId, child: SpaceId, attach: AttachId) -> bool {
        let Some(space) = self.spaces.get_mut(&child) else {
            return false;
        };
        // A signal handler may have forked before it was made, in the midst of `shmat`: see what is
        // there, now or when the child is known.
        space.moved = true;
        for (segment, copy) in self.mappings.inherit_attach(parent, child, attach) {
            self.adopt(segment, &copy);
        }
        self.look(child);
        true
    }

    /// Whether a page table has an entry for a page, as far as can be told.
    pub(super) fn is_seen(&self, page: Page) -> bool {
        let mut mappings = self.mappings.of_segment(page.segment).iter();
        mappings.any(|mapping| {
            let address = mapping.address_of(page.index);
            address.is_some_and(|address| self.is_mapped(mapping.space, address) != Some(false))
        })
    }

    /// See [`Memory::map`](super::Memory::map).
    pub(super) fn map(
        &mut self,
        space: SpaceId,
        granted: Granted,
        segment: &Segment,
        address: u64,
    ) -> (Vec<SegmentId>, io::Result<()>) {
        let Granted {
            attach,
            segment: id,
            view,
            read_only,
        } = granted;
        if !self.spaces.contains_key(&space) {
            return (Vec::new(), Err(io::ErrorKind::NotFound.into()));
        }
        let length = u64::from(segment.pages()) * PAGE;
        if !address.is_multiple_of(PAGE) || address.checked_add(length).is_none() {
            return (Vec::new(), Err(io::ErrorKind::InvalidInput.into()));
        }
        let mapping = Mapping {
            space,
            attach,
            address,
            first_page: 0,
            pages: segment.pages(),
            view,
            read_only,
            counts: true,
        };
        let ended = self.unmap_range(space, address, mapping.end());
        if let Some(file) = segment.id(view) {
            self.files.insert(file, (id, view));
        }
        self.mappings.link(mapping, id);
        self.adopt(id, &mapping);
        (ended, Ok(()))
    }

    /// Tracks every mapping of a segment, wherever it is by now.
    pub(super) fn track(&mut self, segment: SegmentId) {
        self.tracked.insert(segment, Bits::default());
        let mapped = self.mappings.of_segment(segment).iter();
        let spaces: BTreeSet<SpaceId> = mapped.map(|m| m.space).collect();
        for space in spaces {
            self.look(space);
        }
        self.for_each_mapping(segment, |spaces, mapping| {
            spaces.register(mapping);
            // A fork may have copied the mapping before, and is only known after.
            spaces.await_forks(mapping.space);
        });
    }

    /// Does something for every mapping of a segment. Forks found on the way append to the list
    /// (see the module's comment); if they took something out of it, one may have been skipped.
    fn for_each_mapping(&mut self, segment: SegmentId, act: impl Fn(&mut Spaces, &Mapping)) {
        loop {
            let before = self.mappings.removals();
            let mut index = 0;
            while let Some(&mapping) = self.mappings.of_segment(segment).get(index) {
                index += 1;
                act(self, &mapping);
            }
            if self.mappings.removals() == before {
                return;
            }
        }
    }

    /// Brings what is known of an address space into line with what the kernel says that it maps.
    /// Whether that could be done. What has ended is reported.
    pub fn look(&mut self, space: SpaceId) -> bool {
        let Some(process) = self.spaces.get(&space).and_then(|s| s.process.as_ref()) else {
            return false;
        };
        let runs = match maps::mapped(process) {
            Ok(runs) => runs,
            Err(error) => {
                tracing::debug!(space = space.0, %error, "cannot see what a process maps");
                return false;
            }
        };
        let seen: Vec<Seen> = runs.iter().filter_map(|run| self.recognise(run)).collect();
        let Replaced { old, new, ended } = self.mappings.replace(space, &seen);
        for (_, mapping) in &old {
            self.wake_range(mapping);
        }
        if !ended.is_empty() {
            self.reports.push_back((space, Report::Ended(ended)));
        }
        for (segment, mapping) in &new {
            self.adopt(*segment, mapping);
        }
        true
    }

    fn recognise(&self, run: &Run) -> Option<Seen> {
        let (segment, view) = *self.files.get(&run.file)?;
        Some(Seen {
            segment,
            view,
            address: run.address,
            first_page: u32::try_from(run.first_page).ok()?,
            pages: u32::try_from((run.end - run.address) / PAGE).ok()?,
        })
    }

    /// Gives a new mapping of a segment what the others have, if that is tracked.
    fn adopt(&mut self, segment: SegmentId, mapping: &Mapping) {
        let Some(protected) = self.tracked.get(&segment) else {
            return;
        };
        let protected = protected.runs();
        self.register(mapping);
        if mapping.view != View::Pages {
            return;
        }
        for (first, pages) in protected {
            let range = Range {
                segment,
                first,
                pages,
            };
            if let Some((start, length)) = mapping.addresses_of(range) {
                self.in_space(mapping.space, |uffd| uffd.protect(start, length, true));
            }
        }
    }

    /// Tracks a mapping. Where that fails the process has unmapped it, is gone, or watches the range
    /// itself; the loss is its own.
    fn register(&self, mapping: &Mapping) {
        let Some(uffd) = self.uffd(mapping.space) else {
            return;
        };
        let registered = match mapping.view {
            View::Pages => uffd.register(mapping.address, mapping.length()),
            View::Replica(_) => uffd.register_missing(mapping.address, mapping.length()),
        };
        if let Err(error) = registered {
            tracing::error!(space = mapping.space.0, %error, "a mapping cannot be tracked");
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
        self.unmap_range(space, address, end)
    }

    fn unmap_range(&mut self, space: SpaceId, start: u64, end: u64) -> Vec<SegmentId> {
        let covered = self.mappings.carve(space, start, end);
        self.ended(space, &covered)
    }

    /// Forgets the runs of an attach that do not count any more; something else may be there by now.
    pub fn unmap_attach(&mut self, space: SpaceId, attach: AttachId) {
        let covered = self.mappings.carve_attach(space, attach);
        self.ended(space, &covered);
    }

    fn ended(&mut self, space: SpaceId, covered: &[(SegmentId, Mapping)]) -> Vec<SegmentId> {
        for (_, mapping) in covered {
            self.wake_range(mapping);
        }
        self.mappings.ended(space, covered)
    }

    /// Reads what an address space has to report into the queue of [`Spaces::next_report`].
    pub fn collect(&mut self, space: SpaceId) {
        let Some(uffd) = self.uffd(space) else { return };
        let mut events = Vec::new();
        while let Err(error) = uffd.events(&mut events) {
            if !self.spare_descriptor() {
                tracing::error!(space = space.0, %error, "cannot watch a forked child");
                self.kill(space);
                break;
            }
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
                    let (anchor, moved) = match self.spaces.get_mut(&space) {
                        Some(parent) => {
                            if parent.untold > 0 {
                                parent.copies.push(child);
                            }
                            (parent.anchor, parent.moved)
                        }
                        None => (0, false),
                    };
                    self.spaces.insert(
                        child,
                        Space {
                            uffd: Some(Rc::new(uffd)),
                            process: None,
                            pagemap: None,
                            anchor,
                            moved,
                            untold: 0,
                            copies: Vec::new(),
                        },
                    );
                    self.mappings.inherit(space, child);
                    self.reports.push_back((space, Report::Forked(child)));
                }
                Event::Remap { from, to, len } => self.on_remap(space, from, to, len),
            }
        }
    }

    /// `mremap` has moved `length` bytes; or has made a second mapping of what is at `from`, or
    /// left the first where it was (`MREMAP_DONTUNMAP`). It may have made it longer.
    fn on_remap(&mut self, space: SpaceId, from: u64, to: u64, length: u64) {
        if let Some(space) = self.spaces.get_mut(&space) {
            space.moved = true;
        }
        if self.look(space) {
            return;
        }
        // What a process does whom nobody knows is taken for the plain case.
        let moved = self
            .mappings
            .carve(space, from, from.saturating_add(length));
        let covered = self.mappings.carve(space, to, to.saturating_add(length));
        for (segment, piece) in moved {
            let address = to + (piece.address - from);
            self.mappings.link(Mapping { address, ..piece }, segment);
        }
        let ended = self.ended(space, &covered);
        if !ended.is_empty() {
            self.reports.push_back((space, Report::Ended(ended)));
        }
    }

    /// Closes a descriptor that can be done without; whether there was one.
    fn spare_descriptor(&mut self) -> bool {
        let mut spaces = self.spaces.values_mut();
        spaces.any(|space| space.pagemap.take().is_some())
    }

    /// Ends the process that an address space is of, and so a fork that is under way: better than a
    /// child that nobody watches, or a node that waits for it.
    fn kill(&self, space: SpaceId) {
        let Some(process) = self.spaces.get(&space).and_then(|s| s.process.as_ref()) else {
            return;
        };
        let (fd, no_info) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: plain integers and a null pointer, which is permitted. The descriptor is of the
        // very process, should its pid be another's by now.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) };
    }

    /// Has a touch handled as if it came now.
    pub fn report_again(&mut self, space: SpaceId, address: u64, write: bool) {
        let fault = Report::Fault {
            address,
            write,
            thread: 0,
        };
        self.reports.push_back((space, fault));
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

    /// Fills the anchor page. A thread that waits for it goes on once it is woken.
    pub fn fill_anchor(&mut self, space: SpaceId, address: u64, page: &[u8; PAGE_SIZE]) {
        let page = Adjacent::new(page);
        self.in_space(space, |uffd| Ok(uffd.copy(address, page)?.1));
    }

    /// Returns when every fork of the address space that is under way has been reported.
    pub fn await_forks(&mut self, space: SpaceId) {
        // Any change of the address space is refused until then; this one changes nothing.
        let anchor = self.spaces.get(&space).map_or(0, |s| s.anchor);
        self.in_space(space, |uffd| uffd.protect(anchor, PAGE, false));
    }

    /// Whether nobody can write a page here.
    #[must_use]
    pub(super) fn is_protected(&self, page: Page) -> bool {
        let protected = self.tracked.get(&page.segment);
        protected.is_some_and(|protected| protected.contains(page.index))
    }

    fn note_protection(&mut self, range: Range, on: bool) {
        if let Some(protected) = self.tracked.get_mut(&range.segment) {
            for index in range.first..range.first + range.pages {
                protected.set(index, on);
            }
        }
    }

    /// Keeps every process from writing pages, mapped there yet or not.
    pub(super) fn protect(&mut self, range: Range) {
        self.note_protection(range, true);
        self.set_protection(range, true);
    }

    /// Lifts the protection of pages that are gone: their page table entries are, their mark is not.
    pub(super) fn unprotect_gone(&mut self, range: Range) {
        if range.iter().any(|page| self.is_protected(page)) {
            self.note_protection(range, false);
            self.set_protection(range, false);
        }
    }

    /// Permits that pages become writable, which is done where a thread wants that.
    pub(super) fn release(&mut self, range: Range) {
        self.note_protection(range, false);
    }

    /// Lets every process write pages.
    pub(super) fn unprotect_everywhere(&mut self, range: Range) {
        self.set_protection(range, false);
    }

    fn set_protection(&mut self, range: Range, on: bool) {
        self.for_each_mapping(range.segment, |spaces, mapping| {
            if mapping.view == View::Pages
                && let Some((address, length)) = mapping.addresses_of(range)
            {
                spaces.in_space(mapping.space, |uffd| uffd.protect(address, length, on));
            }
        });
    }

    /// Lets the process write a page at an address.
    pub(super) fn unprotect(&mut self, space: SpaceId, address: u64) {
        self.in_space(space, |uffd| uffd.protect(address, PAGE, false));
    }

    /// Makes an address raise SIGBUS, also for who waits there.
    pub fn poison_at(&mut self, space: SpaceId, address: u64) {
        self.in_space(space, |uffd| uffd.poison(address));
        self.wake(space, address);
    }

    /// Wakes who waits for the page at an address.
    pub fn wake(&self, space: SpaceId, address: u64) {
        if let Some(uffd) = self.spaces.get(&space).and_then(|s| s.uffd.as_ref()) {
            uffd.wake(address, PAGE);
        }
    }

    fn wake_range(&self, mapping: &Mapping) {
        if let Some(uffd) = self.uffd(mapping.space) {
            uffd.wake(mapping.address, mapping.length());
        }
    }

    /// Does `operation` in an address space; if that is being forked, once the fork is seen.
    fn in_space(&mut self, space: SpaceId, operation: impl Fn(&Uffd) -> io::Result<Done>) {
        loop {
            let Some(uffd) = self.uffd(space) else {
                return;
            };
            match operation(&uffd) {
                Ok(Done::Busy) => {
                    self.collect(space);
                    std::thread::sleep(FORK_PAUSE);
                }
                Ok(_) => return,
                Err(error) => {
                    tracing::error!(space = space.0, %error, "userfaultfd operation failed");
                    return;
                }
            }
        }
    }
}
