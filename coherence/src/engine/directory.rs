//! The directory of an extent: who has which page, in four bytes for each.
//!
//! An entry is the owner and, in two bytes, who else has a copy: nobody, one other node, or the
//! number of a set. The pages of an extent are mostly shared by the same few groups of nodes, so a
//! set is kept once, however many entries name it. That is exact for any number of sharers, and
//! costs something only for groups that differ: a bit for each node up to the highest.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use migshm_protocol::NodeId;
use migshm_protocol::ids::{EXTENT_PAGES, MAX_NODES};
use migshm_protocol::nodes::Members;

use super::NodeSet;

/// Where the pages of an extent are, or will be once their transactions under way end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Directory {
    entries: Box<[Entry]>,
    groups: Groups,
    /// How many entries are busy.
    busy: u32,
    /// Whether the extent is on its way to another home: no transaction may begin.
    pub(super) moving: bool,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Entry {
    /// The number of the node that answers for the contents, with [`BUSY`]; [`UNTOUCHED`] or
    /// [`LOST`] if there is none.
    owner: u16,
    /// Who else may have a readable copy; see [`Sharers`].
    sharers: u16,
}

const _: () = assert!(size_of::<Entry>() == 4);

/// Set in [`Entry::owner`] while the page has a transaction.
const BUSY: u16 = 1 << 15;
/// In [`Entry::owner`].
const UNTOUCHED: u16 = BUSY - 1;
/// In [`Entry::owner`]: the contents died with a node.
const LOST: u16 = BUSY - 2;
/// In [`Entry::sharers`]: nobody, the owner may write.
const NOBODY: u16 = u16::MAX;
/// In [`Entry::sharers`], added to the number of a group.
const GROUP: u16 = 1 << 15;

const _: () = assert!(MAX_NODES < LOST as usize);
// As many groups as pages, and one more while it takes the place of another.
const _: () = assert!((EXTENT_PAGES as usize) < (NOBODY - GROUP) as usize);

/// Bytes that an [`Arc`] puts before its contents.
const ARC_COUNTS: usize = 2 * size_of::<usize>();

/// What [`Entry::sharers`] means.
enum Sharers {
    Nobody,
    One(NodeId),
    /// The group with this number, the owner included.
    Group(usize),
}

impl Directory {
    pub(super) fn untouched(pages: usize) -> Self {
        let entry = Entry {
            owner: UNTOUCHED,
            sharers: NOBODY,
        };
        Self {
            entries: vec![entry; pages].into(),
            groups: Groups::default(),
            busy: 0,
            moving: false,
        }
    }

    /// The node that answers for a page's contents; `None` if nobody has touched it, or if it is
    /// lost.
    pub(super) fn owner(&self, page: usize) -> Option<NodeId> {
        match self.entries[page].owner & !BUSY {
            UNTOUCHED | LOST => None,
            owner => Some(NodeId(owner)),
        }
    }

    /// The contents of a page that nobody holds cannot be had any more.
    pub(super) fn lose(&mut self, page: usize) {
        self.entries[page].owner = LOST;
    }

    pub(super) fn is_lost(&self, page: usize) -> bool {
        self.entries[page].owner == LOST
    }

    /// Whether nobody but the owner may have a copy.
    pub(super) fn is_exclusive(&self, page: usize) -> bool {
        self.entries[page].sharers == NOBODY
    }

    /// Whether a node may have a copy.
    pub(super) fn is_holder(&self, page: usize, node: NodeId) -> bool {
        self.owner(page) == Some(node)
            || match self.entries[page].sharers() {
                Sharers::Nobody => false,
                Sharers::One(sharer) => sharer == node,
                Sharers::Group(group) => self.groups.contains(group, node),
            }
    }

    /// All nodes that may have a copy.
    pub(super) fn holders(&self, page: usize) -> NodeSet {
        let owner: NodeSet = self.owner(page).into_iter().collect();
        match self.entries[page].sharers() {
            Sharers::Nobody => owner,
            Sharers::One(sharer) => owner.with(sharer),
            Sharers::Group(group) => self.groups.set(group),
        }
    }

    /// A node owns a page, and nobody else has a copy; those who may have had one.
    pub(super) fn give(
        &mut self,
        page: usize,
        owner: NodeId,
    ) -> impl Iterator<Item = NodeId> + use<> {
        let former = self.owner(page);
        let (one, group) = match self.entries[page].sharers() {
            Sharers::Nobody => (None, Arc::default()),
            Sharers::One(sharer) => (
                Some(sharer).filter(|_| Some(sharer) != former),
                Arc::default(),
            ),
            Sharers::Group(group) => (None, self.groups.release(group)),
        };
        let entry = &mut self.entries[page];
        entry.sharers = NOBODY;
        entry.owner = entry.owner & BUSY | owner.0;
        let few = if group.is_empty() {
            [former, one]
        } else {
            [None; 2]
        };
        few.into_iter().flatten().chain(Members::of(group))
    }

    /// A node owns a page that these may read; if there are none, it has it exclusively.
    pub(super) fn place(&mut self, page: usize, owner: NodeId, sharers: &NodeSet) {
        let _ = self.give(page, owner);
        if sharers.is_empty() {
            return;
        }
        let mut others = sharers.without(owner).into_iter();
        self.entries[page].sharers = match (others.next(), others.next()) {
            (None, _) => owner.0,
            (Some(one), None) => one.0,
            _ => self.groups.intern(&sharers.with(owner)),
        };
    }

    /// A node may have a copy too of a page that has an owner.
    pub(super) fn share(&mut self, page: usize, node: NodeId) {
        if let Sharers::Nobody = self.entries[page].sharers() {
            self.entries[page].sharers = node.0;
        } else if !self.is_holder(page, node) {
            self.entries[page].sharers = match self.entries[page].sharers() {
                Sharers::Group(group) => {
                    let more = self.groups.intern_with(group, node);
                    let _ = self.groups.release(group);
                    more
                }
                _ => self.groups.intern(&self.holders(page).with(node)),
            };
        }
    }

    /// How many pages have transactions.
    pub(super) fn busy(&self) -> u32 {
        self.busy
    }

    pub(super) fn is_busy(&self, page: usize) -> bool {
        self.entries[page].owner & BUSY != 0
    }

    /// A page's transaction begins.
    pub(super) fn begin(&mut self, page: usize) {
        self.entries[page].owner |= BUSY;
        self.busy += 1;
    }

    /// A page's transaction has ended.
    pub(super) fn end(&mut self, page: usize) {
        self.entries[page].owner &= !BUSY;
        self.busy -= 1;
    }

    /// The pages whose contents are lost.
    pub(super) fn lost(&self) -> impl Iterator<Item = usize> {
        (0..self.entries.len()).filter(|&page| self.is_lost(page))
    }

    /// The pages that have an owner.
    pub(super) fn touched(&self) -> impl Iterator<Item = (usize, NodeId)> {
        (0..self.entries.len()).filter_map(|page| Some((page, self.owner(page)?)))
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.entries) + self.groups.heap_bytes()
    }
}

impl Entry {
    fn sharers(self) -> Sharers {
        match self.sharers {
            NOBODY => Sharers::Nobody,
            node if node & GROUP == 0 => Sharers::One(NodeId(node)),
            group => Sharers::Group(usize::from(group & !GROUP)),
        }
    }
}

/// Sets of nodes, each once, by number.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Groups(Vec<Group>);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Group {
    /// As [`NodeSet::words`].
    words: Arc<[u64]>,
    /// [`hash`] of its members, all of them in exclusive or.
    hash: u32,
    /// How many entries name it; 0 if the number is free.
    entries: u16,
}

impl Groups {
    /// What names the set in an entry, one entry more.
    fn intern(&mut self, set: &NodeSet) -> u16 {
        let hash = set.into_iter().fold(0, |all, node| all ^ hash(node));
        let equal = |words: &[u64]| *words == *set.words();
        match self.find(hash, equal) {
            Ok(number) => self.name(number),
            Err(free) => self.insert(free, set.words().into(), hash),
        }
    }

    /// What names the group and one node more. As a scan through an extent does the same for one
    /// page after the other, this mostly finds what it made for the first one.
    fn intern_with(&mut self, group: usize, node: NodeId) -> u16 {
        let (at, bit) = (usize::from(node.0) / 64, 1 << (node.0 % 64));
        let Group {
            words, hash: of, ..
        } = &self.0[group];
        let hash = of ^ hash(node);
        let length = words.len().max(at + 1);
        let word = |n| words.get(n).unwrap_or(&0) | if n == at { bit } else { 0 };
        let equal = |other: &[u64]| {
            other.len() == length && other.iter().zip(0..).all(|(&other, n)| other == word(n))
        };
        match self.find(hash, equal) {
            Ok(number) => self.name(number),
            Err(free) => {
                let words = (0..length).map(word).collect();
                self.insert(free, words, hash)
            }
        }
    }

    /// The number of a group, or one that is free.
    fn find(&self, hash: u32, equal: impl Fn(&[u64]) -> bool) -> Result<usize, usize> {
        let mut free = self.0.len();
        for (number, group) in self.0.iter().enumerate() {
            if group.entries == 0 {
                free = number;
            } else if group.hash == hash && equal(&group.words) {
                return Ok(number);
            }
        }
        Err(free)
    }

    fn insert(&mut self, number: usize, words: Arc<[u64]>, hash: u32) -> u16 {
        let group = Group {
            words,
            hash,
            entries: 0,
        };
        match self.0.get_mut(number) {
            Some(free) => *free = group,
            None => self.0.push(group),
        }
        self.name(number)
    }

    /// One entry more names the group.
    fn name(&mut self, number: usize) -> u16 {
        self.0[number].entries += 1;
        GROUP | number as u16
    }

    /// One entry less names the group; its words.
    fn release(&mut self, number: usize) -> Arc<[u64]> {
        let group = &mut self.0[number];
        group.entries -= 1;
        if group.entries == 0 {
            std::mem::take(&mut group.words)
        } else {
            Arc::clone(&group.words)
        }
    }

    fn contains(&self, number: usize, node: NodeId) -> bool {
        let word = self.0[number].words.get(usize::from(node.0) / 64);
        word.is_some_and(|word| word & (1 << (node.0 % 64)) != 0)
    }

    fn set(&self, number: usize) -> NodeSet {
        NodeSet::from_words(&self.0[number].words).expect("they were a set's")
    }

    fn heap_bytes(&self) -> usize {
        let named = self.0.iter().filter(|group| group.entries > 0);
        let words = named.map(|group| ARC_COUNTS + size_of_val(&*group.words));
        self.0.capacity() * size_of::<Group>() + words.sum::<usize>()
    }
}

fn hash(node: NodeId) -> u32 {
    let mixed = (u64::from(node.0) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Random;

    const PAGES: usize = EXTENT_PAGES as usize;

    /// What the directory stands for, kept without any thrift.
    #[derive(Clone, Default)]
    struct Plain {
        owner: Option<NodeId>,
        holders: NodeSet,
        exclusive: bool,
    }

    #[test]
    fn a_directory_says_what_it_was_told_and_forgets_the_groups_that_are_gone() {
        for seed in 0..20 {
            let random = &mut Random(seed);
            let nodes = [3, 8, 64, MAX_NODES][seed as usize % 4];
            let pages = [3, 40, PAGES][seed as usize % 3];
            let mut directory = Directory::untouched(pages);
            let mut plain = vec![Plain::default(); pages];
            for _ in 0..4_000 {
                let page = random.below(pages);
                let node = NodeId(random.below(nodes) as u16);
                let expected = &mut plain[page];
                match random.below(8) {
                    0 => {
                        let former = directory.give(page, node).collect();
                        assert_eq!(expected.holders, former);
                        let holders = NodeSet::default().with(node);
                        (expected.owner, expected.holders) = (Some(node), holders);
                        expected.exclusive = true;
                    }
                    1 if expected.owner.is_some() => {
                        expected.owner = Some(node);
                        expected.holders.insert(node);
                        expected.exclusive = false;
                        directory.place(page, node, &expected.holders);
                    }
                    2 if directory.is_busy(page) => directory.end(page),
                    2 => directory.begin(page),
                    _ if expected.owner.is_some() => {
                        directory.share(page, node);
                        expected.holders.insert(node);
                        expected.exclusive = false;
                    }
                    _ => {}
                }
                assert_eq!(directory.owner(page), expected.owner);
                assert_eq!(directory.holders(page), expected.holders);
                assert_eq!(
                    directory.is_holder(page, node),
                    expected.holders.contains(node)
                );
                if expected.owner.is_some() {
                    assert_eq!(directory.is_exclusive(page), expected.exclusive);
                }
            }
            for (page, expected) in plain.iter().enumerate() {
                assert_eq!(directory.owner(page), expected.owner);
                assert_eq!(directory.holders(page), expected.holders);
            }
            let named = directory.groups.0.iter().map(|g| usize::from(g.entries));
            let naming = directory.entries.iter();
            let naming = naming.filter(|e| matches!(e.sharers(), Sharers::Group(_)));
            assert_eq!(named.sum::<usize>(), naming.count());
            assert!(directory.groups.0.len() <= pages + 1);
            (0..pages).for_each(|page| drop(directory.give(page, NodeId(0))));
            assert!(
                directory
                    .groups
                    .0
                    .iter()
                    .all(|group| group.words.is_empty())
            );
        }
    }

    #[test]
    fn pages_that_the_same_nodes_read_share_one_set() {
        let mut directory = Directory::untouched(PAGES);
        for page in 0..PAGES {
            let _ = directory.give(page, NodeId(0));
        }
        for node in 1..MAX_NODES as u16 {
            for page in 0..PAGES {
                directory.share(page, NodeId(node));
            }
        }
        let groups = directory.groups.0.iter().filter(|group| group.entries > 0);
        assert_eq!(groups.count(), 1);
        assert_eq!(directory.holders(7).len(), MAX_NODES);
        assert!(
            directory.heap_bytes() < 5 * PAGES,
            "{}",
            directory.heap_bytes()
        );
    }
}
