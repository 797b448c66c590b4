//! Who may have copies of the pages of an extent, in two bytes for each.
//!
//! The pages of an extent are mostly fetched by the same few groups of nodes, so a group is kept
//! once, and a page has its number.

use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::{NodeId, NodeSet};
use serde::{Deserialize, Serialize};

/// Groups that are kept at most, needed or not. The pages need [`EXTENT_PAGES`] and one.
const GROUPS_MAX: usize = 2 * EXTENT_PAGES as usize;

/// Of each page of an extent, the nodes that may have a copy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Copies {
    /// The first is of nobody.
    groups: Vec<NodeSet>,
    /// By page; as long as the extent once there is any copy.
    pages: Box<[u16]>,
}

impl Default for Copies {
    fn default() -> Self {
        Self {
            groups: vec![NodeSet::default()],
            pages: Box::default(),
        }
    }
}

impl Copies {
    /// Who may have a page.
    pub(super) fn of(&self, page: usize) -> NodeSet {
        let group = self.pages.get(page).copied().unwrap_or_default();
        self.groups[usize::from(group)]
    }

    /// A node gets a page, of an extent with so many.
    pub(super) fn add(&mut self, node: NodeId, page: usize, pages: usize) {
        if self.pages.is_empty() {
            self.pages = vec![0; pages].into();
        }
        let before = self.of(page);
        if !before.contains(node) {
            self.pages[page] = self.group(before.with(node));
        }
    }

    /// These nodes have a page, and no others.
    pub(super) fn set(&mut self, nodes: NodeSet, page: usize, pages: usize) {
        if self.of(page) == nodes {
            return;
        }
        if self.pages.is_empty() {
            self.pages = vec![0; pages].into();
        }
        self.pages[page] = self.group(nodes);
    }

    /// A node has nothing any more.
    pub(super) fn forget(&mut self, node: NodeId) {
        for group in &mut self.groups {
            group.remove(node);
        }
    }

    /// The number of a group, which is made if there is none.
    fn group(&mut self, nodes: NodeSet) -> u16 {
        let known = |groups: &[NodeSet]| groups.iter().position(|group| *group == nodes);
        let at = known(&self.groups).unwrap_or_else(|| {
            if self.groups.len() == GROUPS_MAX {
                self.drop_unused();
            }
            self.groups.push(nodes);
            self.groups.len() - 1
        });
        u16::try_from(at).expect("below GROUPS_MAX")
    }

    fn drop_unused(&mut self) {
        let old = std::mem::replace(&mut self.groups, vec![NodeSet::default()]);
        let mut numbers = vec![None; old.len()];
        numbers[0] = Some(0);
        for page in &mut self.pages {
            let group = usize::from(*page);
            *page = *numbers[group].get_or_insert_with(|| {
                self.groups.push(old[group]);
                (self.groups.len() - 1) as u16
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Random;
    use migshm_protocol::ids::MAX_NODES;

    #[test]
    fn copies_are_those_that_were_made_however_many_groups_there_are() {
        let random = &mut Random(4);
        let pages = EXTENT_PAGES as usize;
        let mut copies = Copies::default();
        let mut expected = vec![NodeSet::default(); pages];
        for _ in 0..20_000 {
            let (node, page) = (NodeId(random.below(MAX_NODES) as u16), random.below(pages));
            if random.below(1000) == 0 {
                copies.forget(node);
                expected.iter_mut().for_each(|nodes| nodes.remove(node));
            }
            if random.below(10) == 0 {
                let few: NodeSet = (0..random.below(3) as u16).map(NodeId).collect();
                copies.set(few, page, pages);
                expected[page] = few;
            }
            copies.add(node, page, pages);
            expected[page].insert(node);
            assert!(copies.groups.len() <= GROUPS_MAX);
        }
        for (page, nodes) in expected.iter().enumerate() {
            assert_eq!(copies.of(page), *nodes);
        }
    }
}
