//! Which pages of which segments are mapped where: a table, which asks nothing of the kernel.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

use migshm_protocol::{Page, SegmentId};
use rustc_hash::{FxHashMap, FxHashSet};

use super::PAGE;
use super::range::Range;
use super::segment::UserId;
use super::spaces::SpaceId;

/// An attach: one successful `shmat`, or a fork's copy of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttachId(pub u64);

/// What an attach maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum View {
    /// The segment's pages.
    Pages,
    /// The replica of a user who may only read.
    Replica(UserId),
}

/// An attach that a process has leave to map.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Granted {
    /// Its number.
    pub attach: AttachId,
    /// Of what segment.
    pub segment: SegmentId,
    /// Of what in it.
    pub view: View,
    /// Whether it is to read only (`SHM_RDONLY`).
    pub read_only: bool,
}

/// All mappings of the node.
#[derive(Default, Serialize, Deserialize)]
pub struct Mappings {
    /// Of each segment, in every address space.
    mappings: FxHashMap<SegmentId, Vec<Mapping>>,
    /// Segments with a mapping in an address space (each once).
    segments: FxHashMap<SpaceId, Vec<SegmentId>>,
    /// How often mappings were taken out of a segment's list.
    removals: u64,
}

impl Mappings {
    /// Attaches of an address space, by segment.
    #[must_use]
    pub fn attaches(&self, space: SpaceId) -> Vec<(SegmentId, u32)> {
        self.segments_in(space)
            .iter()
            .filter_map(|s| Some((*s, count_attaches(self.mappings.get(s)?, space))))
            .collect()
    }

    fn segments_in(&self, space: SpaceId) -> &[SegmentId] {
        self.segments.get(&space).map_or(&[], Vec::as_slice)
    }

    /// The attach that `shmdt` of `address` ends: that of the first run of pages, from there on,
    /// which is where it would be had the attach begun at `address` (as in `ipc/shm.c`). With its
    /// segment and the runs that are where they would be.
    #[must_use]
    pub fn attach_at(
        &self,
        space: SpaceId,
        address: u64,
    ) -> Option<(AttachId, SegmentId, Vec<Mapping>)> {
        let of_segment = |id: &SegmentId| {
            let runs = self.mappings.get(id).into_iter().flatten();
            let id = *id;
            runs.filter(move |run| {
                run.space == space && run.counts && run.begins_at() == Some(address)
            })
            .map(move |run| (id, *run))
        };
        let mut runs: Vec<(SegmentId, Mapping)> = self
            .segments_in(space)
            .iter()
            .flat_map(of_segment)
            .collect();
        let (segment, first) = *runs.iter().min_by_key(|(_, run)| run.address)?;
        runs.retain(|(_, run)| run.attach == first.attach);
        let runs = runs.into_iter().map(|(_, run)| run).collect();
        Some((first.attach, segment, runs))
    }

    /// The page at an address of an address space, and how it is seen there.
    #[must_use]
    pub fn locate(&self, space: SpaceId, address: u64) -> Option<(Page, View)> {
        let (segment, mapping) = self.mapping_at(space, address)?;
        let offset = u32::try_from((address - mapping.address) / PAGE).expect("inside the mapping");
        let index = mapping.first_page + offset;
        Some((Page { segment, index }, mapping.view))
    }

    fn mapping_at(&self, space: SpaceId, address: u64) -> Option<(SegmentId, Mapping)> {
        self.segments_in(space).iter().find_map(|id| {
            let found = self.mappings.get(id)?.iter();
            let mut found =
                found.filter(|m| m.space == space && m.address <= address && address < m.end());
            Some((*id, *found.next()?))
        })
    }

    /// The first address in a range of an address space where an attach is that was made to read
    /// only; the end of the range if none is.
    #[must_use]
    pub fn first_read_only(&self, space: SpaceId, start: u64, end: u64) -> u64 {
        let segments = self.segments_in(space).iter();
        let mappings = segments.flat_map(|id| self.of_segment(*id));
        mappings
            .filter(|m| m.space == space && m.read_only && m.address < end && start < m.end())
            .map(|m| m.address.max(start))
            .min()
            .unwrap_or(end)
    }

    /// Mappings of a segment, in every address space. New ones come last.
    pub(super) fn of_segment(&self, segment: SegmentId) -> &[Mapping] {
        self.mappings.get(&segment).map_or(&[], Vec::as_slice)
    }

    /// Address spaces that map a segment, each once.
    pub fn spaces(&self, segment: SegmentId) -> impl Iterator<Item = SpaceId> {
        let of_segment = self.of_segment(segment).iter().map(|mapping| mapping.space);
        of_segment.collect::<BTreeSet<SpaceId>>().into_iter()
    }

    /// Whether anything maps a user's replica of a segment.
    pub(super) fn maps_replica(&self, segment: SegmentId, user: UserId) -> bool {
        let mut mappings = self.of_segment(segment).iter();
        mappings.any(|m| m.view == View::Replica(user))
    }

    /// How often mappings were taken out of a segment's list, or will never come to be there.
    #[must_use]
    pub fn removals(&self) -> u64 {
        self.removals
    }

    /// An attach that was granted is not mapped.
    pub fn give_up(&mut self) {
        self.removals += 1;
    }

    /// Adds a mapping of a segment.
    pub(super) fn link(&mut self, mapping: Mapping, segment: SegmentId) {
        self.mappings.entry(segment).or_default().push(mapping);
        let segments = self.segments.entry(mapping.space).or_default();
        if !segments.contains(&segment) {
            segments.push(segment);
        }
    }

    /// Copies an address space's attaches to that of its child.
    pub fn inherit(&mut self, parent: SpaceId, child: SpaceId) {
        let segments = self.segments_in(parent).to_vec();
        for id in &segments {
            let Some(mappings) = self.mappings.get_mut(id) else {
                continue;
            };
            let copies: Vec<Mapping> = mappings
                .iter()
                .filter(|m| m.space == parent)
                .map(|m| Mapping {
                    space: child,
                    counts: true,
                    ..*m
                })
                .collect();
            mappings.extend(copies);
        }
        self.segments.insert(child, segments);
    }

    /// Copies one attach of an address space to that of its child.
    pub(super) fn inherit_attach(
        &mut self,
        parent: SpaceId,
        child: SpaceId,
        attach: AttachId,
    ) -> Vec<(SegmentId, Mapping)> {
        let mut copies = Vec::new();
        for id in self.segments_in(parent) {
            let of_attach = |m: &&Mapping| m.space == parent && m.attach == attach;
            let found = self.of_segment(*id).iter().filter(of_attach);
            copies.extend(found.map(|m| (*id, Mapping { space: child, ..*m })));
        }
        for (id, copy) in &copies {
            self.link(*copy, *id);
        }
        copies
    }

    /// Stops counting runs of an attach that the process is about to unmap. They are served until
    /// [`Spaces::unmap_attach`](super::Spaces::unmap_attach), as other threads may still touch them.
    /// Whether the attach ends with them.
    pub fn stop_counting(&mut self, segment: SegmentId, runs: &[Mapping]) -> bool {
        let mappings = self.mappings.get_mut(&segment).into_iter().flatten();
        let mut ends = true;
        for mapping in mappings {
            let same = |run: &Mapping| {
                mapping.space == run.space
                    && mapping.attach == run.attach
                    && mapping.address == run.address
            };
            let beside = |run: &Mapping| mapping.space == run.space && mapping.attach == run.attach;
            if runs.iter().any(same) {
                mapping.counts = false;
            } else if runs.iter().any(beside) {
                ends &= !mapping.counts;
            }
        }
        ends
    }

    /// Takes a range out of an address space's mappings and returns what was there.
    pub(super) fn carve(
        &mut self,
        space: SpaceId,
        start: u64,
        end: u64,
    ) -> Vec<(SegmentId, Mapping)> {
        self.removals += 1;
        let mut taken = Vec::new();
        for id in self.segments.get(&space).into_iter().flatten() {
            let Some(mappings) = self.mappings.get_mut(id) else {
                continue;
            };
            let hit: Vec<Mapping> = mappings
                .extract_if(.., |m| {
                    m.space == space && m.address < end && start < m.end()
                })
                .collect();
            for mapping in hit {
                let from = start.max(mapping.address);
                let to = end.min(mapping.end());
                taken.push((*id, mapping.slice(from, to)));
                let rest = [
                    mapping.slice(mapping.address, from),
                    mapping.slice(to, mapping.end()),
                ];
                mappings.extend(rest.into_iter().filter(|m| m.pages > 0));
            }
        }
        taken
    }

    /// Takes out the runs of an attach that do not count any more.
    pub(super) fn carve_attach(
        &mut self,
        space: SpaceId,
        attach: AttachId,
    ) -> Vec<(SegmentId, Mapping)> {
        self.removals += 1;
        let mut taken = Vec::new();
        for (id, mappings) in &mut self.mappings {
            let of_attach = |m: &mut Mapping| m.space == space && m.attach == attach && !m.counts;
            taken.extend(mappings.extract_if(.., of_attach).map(|m| (*id, m)));
        }
        taken
    }

    /// Replaces what is known of an address space by what was seen there. Runs that were known
    /// stay what they are a piece of. Others are pieces of the attach that they most likely came
    /// from (`mremap`): of the same pages, and gone from where it was.
    pub(super) fn replace(&mut self, space: SpaceId, seen: &[Seen]) -> Replaced {
        self.removals += 1;
        let mut old: Vec<(SegmentId, Mapping)> = Vec::new();
        for id in self.segments.get(&space).into_iter().flatten() {
            let Some(mappings) = self.mappings.get_mut(id) else {
                continue;
            };
            let of_space = mappings.extract_if(.., |m| m.space == space);
            old.extend(of_space.map(|m| (*id, m)));
        }
        let mut rest = Vec::new();
        for seen in seen {
            let mut known: Vec<Mapping> = old
                .iter()
                .filter(|(id, m)| seen.shows(*id, m))
                .map(|(_, m)| m.slice(m.address.max(seen.address), m.end().min(seen.end())))
                .collect();
            known.sort_by_key(|m| m.address);
            let mut from = seen.address;
            for mapping in known {
                rest.push(seen.slice(from, mapping.address));
                from = mapping.end();
                self.link(mapping, seen.segment);
            }
            rest.push(seen.slice(from, seen.end()));
        }
        let mut new = Vec::new();
        for piece in rest.into_iter().filter(|piece| piece.pages > 0) {
            let candidates = old
                .iter()
                .filter(|(id, m)| *id == piece.segment && m.view == piece.view && m.counts);
            let likely = candidates.min_by_key(|(id, m)| {
                let other = !m.has_page(piece.first_page);
                (other, seen.iter().any(|seen| seen.shows(*id, m)))
            });
            // Else it is of an attach whose place is not known yet.
            if let Some((id, source)) = likely {
                let mapping = Mapping {
                    address: piece.address,
                    first_page: piece.first_page,
                    pages: piece.pages,
                    ..*source
                };
                self.link(mapping, *id);
                new.push((*id, mapping));
            }
        }
        let ended = self.ended(space, &old);
        Replaced { old, new, ended }
    }

    /// Settles what was taken out of an address space for good. Returns the segments of the
    /// attaches that were counted and lost their last piece by it, once for each attach.
    pub(super) fn ended(
        &mut self,
        space: SpaceId,
        taken: &[(SegmentId, Mapping)],
    ) -> Vec<SegmentId> {
        let mut ended = Vec::new();
        let mut seen = FxHashSet::default();
        for (id, old) in taken {
            let rest = &self.mappings[id];
            let has = |m: &Mapping| m.space == space && m.attach == old.attach;
            if old.counts && !rest.iter().any(has) && seen.insert(old.attach) {
                ended.push(*id);
            }
            if !rest.iter().any(|m| m.space == space)
                && let Some(segments) = self.segments.get_mut(&space)
            {
                segments.retain(|s| s != id);
            }
        }
        ended
    }

    /// Forgets an address space; returns how many attaches of which segments went with it.
    pub(super) fn remove_space(&mut self, space: SpaceId) -> Vec<(SegmentId, u32)> {
        self.removals += 1;
        let ended = self.attaches(space);
        for segment in self.segments.remove(&space).unwrap_or_default() {
            if let Some(mappings) = self.mappings.get_mut(&segment) {
                mappings.retain(|m| m.space != space);
            }
        }
        ended
    }

    /// Forgets a segment; returns its mappings.
    pub(super) fn remove_segment(&mut self, id: SegmentId) -> Vec<Mapping> {
        for segments in self.segments.values_mut() {
            segments.retain(|s| *s != id);
        }
        self.mappings.remove(&id).unwrap_or_default()
    }
}

/// A run of a segment's pages in an address space.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Mapping {
    /// Where.
    pub space: SpaceId,
    /// What it is a piece of.
    pub attach: AttachId,
    /// Of its first byte.
    pub address: u64,
    /// Index in the segment.
    pub first_page: u32,
    /// How many.
    pub pages: u32,
    /// Of what.
    pub view: View,
    /// Whether the process attached only to read (`SHM_RDONLY`).
    pub read_only: bool,
    /// False once the process has leave to unmap it: it no longer counts as an attach.
    pub counts: bool,
}

impl Mapping {
    /// The address of a page of the segment, if it is in this run.
    #[must_use]
    pub fn address_of(&self, page: u32) -> Option<u64> {
        let offset = page.checked_sub(self.first_page)?;
        (offset < self.pages).then(|| self.address + u64::from(offset) * PAGE)
    }

    /// Address and length of those pages of the segment that are in this run.
    #[must_use]
    pub fn addresses_of(&self, range: Range) -> Option<(u64, u64)> {
        let from = range.first.max(self.first_page);
        let to = (range.first + range.pages).min(self.first_page + self.pages);
        let start = self.address_of(from).filter(|_| from < to)?;
        Some((start, u64::from(to - from) * PAGE))
    }

    fn has_page(&self, page: u32) -> bool {
        self.address_of(page).is_some()
    }

    /// The part between two addresses in it.
    fn slice(&self, from: u64, to: u64) -> Mapping {
        Mapping {
            address: from,
            first_page: self.first_page + pages_between(self.address, from),
            pages: pages_between(from, to),
            ..*self
        }
    }

    /// Where the segment's first page would be.
    fn begins_at(&self) -> Option<u64> {
        self.address.checked_sub(u64::from(self.first_page) * PAGE)
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        u64::from(self.pages) * PAGE
    }

    /// The address behind its last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + self.length()
    }
}

/// A run of a segment's pages that was seen in an address space.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Of which segment.
    pub segment: SegmentId,
    /// Of what.
    pub view: View,
    /// Of its first byte.
    pub address: u64,
    /// Index in the segment.
    pub first_page: u32,
    /// How many.
    pub pages: u32,
}

impl Seen {
    fn end(&self) -> u64 {
        self.address + u64::from(self.pages) * PAGE
    }

    fn slice(&self, from: u64, to: u64) -> Seen {
        Seen {
            address: from,
            first_page: self.first_page + pages_between(self.address, from),
            pages: pages_between(from, to),
            ..*self
        }
    }

    /// Whether a known run, or a part of it, is what was seen.
    fn shows(&self, segment: SegmentId, known: &Mapping) -> bool {
        let offset = |first_page: u32| u64::from(first_page) * PAGE;
        self.segment == segment
            && self.view == known.view
            && self.address.wrapping_sub(offset(self.first_page))
                == known.address.wrapping_sub(offset(known.first_page))
            && self.address < known.end()
            && known.address < self.end()
    }
}

/// What [`Mappings::replace`] came to.
#[derive(Debug)]
pub struct Replaced {
    /// All runs before.
    pub old: Vec<(SegmentId, Mapping)>,
    /// Runs that were not known.
    pub new: Vec<(SegmentId, Mapping)>,
    /// Segments of attaches of which nothing is left, once for each attach.
    pub ended: Vec<SegmentId>,
}

fn pages_between(from: u64, to: u64) -> u32 {
    u32::try_from((to - from) / PAGE).expect("inside a run")
}

/// How many attaches an address space has, of the segment with these mappings.
fn count_attaches(mappings: &[Mapping], space: SpaceId) -> u32 {
    let of_space = mappings.iter().filter(|m| m.space == space && m.counts);
    let attaches: FxHashSet<AttachId> = of_space.map(|m| m.attach).collect();
    u32::try_from(attaches.len()).expect("attaches fit")
}
