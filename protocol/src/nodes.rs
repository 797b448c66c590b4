//! Sets of nodes.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::hash::{Hash, Hasher};

use crate::ids::{MAX_NODES, NodeId};

/// A set of nodes: one bit for each of [`MAX_NODES`].
///
/// On the wire, and where only [`NodeSet::words`] are kept, it is as long as its highest member
/// needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeSet([u64; WORDS]);

const WORDS: usize = MAX_NODES / 64;

/// The members of a set, ascending.
#[derive(Clone, Debug)]
pub struct Members<W = [u64; WORDS]> {
    words: W,
    /// The word that is looked at, and what is left of it.
    at: usize,
    left: u64,
}

impl NodeSet {
    /// The set whose member `64 * i + n` is bit `n` of word `i`; `None` if it has a member that is
    /// not below [`MAX_NODES`].
    #[must_use]
    #[inline]
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let (low, high) = words.split_at(words.len().min(WORDS));
        if high.iter().any(|&word| word != 0) {
            return None;
        }
        let mut set = Self::default();
        set.0[..low.len()].copy_from_slice(low);
        Some(set)
    }

    /// As [`NodeSet::from_words`] takes it, without zeros at the end.
    #[must_use]
    #[inline]
    pub fn words(&self) -> &[u64] {
        let used = self.0.iter().rposition(|&word| word != 0);
        &self.0[..used.map_or(0, |last| last + 1)]
    }

    /// Whether it has no member.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    /// How many members it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether `node` is a member; no node from [`MAX_NODES`] on is.
    #[must_use]
    #[inline]
    pub fn contains(&self, node: NodeId) -> bool {
        let (word, bit) = place(node);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Adds a node.
    ///
    /// # Panics
    ///
    /// If `node` is not below [`MAX_NODES`].
    #[inline]
    pub fn insert(&mut self, node: NodeId) {
        let (word, bit) = place(node);
        self.0[word] |= bit;
    }

    /// Takes a node out, if it is a member.
    #[inline]
    pub fn remove(&mut self, node: NodeId) {
        let (word, bit) = place(node);
        if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
    }

    /// The set and `node`.
    ///
    /// # Panics
    ///
    /// If `node` is not below [`MAX_NODES`].
    #[must_use]
    #[inline]
    pub fn with(mut self, node: NodeId) -> Self {
        self.insert(node);
        self
    }

    /// The set without `node`.
    #[must_use]
    #[inline]
    pub fn without(mut self, node: NodeId) -> Self {
        self.remove(node);
        self
    }

    /// Adds all members of another set.
    pub fn insert_all(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }
}

impl IntoIterator for NodeSet {
    type Item = NodeId;
    type IntoIter = Members;

    #[inline]
    fn into_iter(self) -> Members {
        Members::of(self.0)
    }
}

impl<W: AsRef<[u64]>> Members<W> {
    /// Those of the set with these [`NodeSet::words`].
    #[inline]
    pub fn of(words: W) -> Self {
        let left = words.as_ref().first().copied().unwrap_or(0);
        Self { words, at: 0, left }
    }
}

impl<W: AsRef<[u64]>> Iterator for Members<W> {
    type Item = NodeId;

    #[inline]
    fn next(&mut self) -> Option<NodeId> {
        while self.left == 0 {
            self.left = *self.words.as_ref().get(self.at + 1)?;
            self.at += 1;
        }
        let bit = self.left.trailing_zeros() as usize;
        self.left &= self.left - 1;
        Some(NodeId((64 * self.at + bit) as u16))
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> Self {
        nodes.into_iter().fold(Self::default(), Self::with)
    }
}

impl Hash for NodeSet {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.words().hash(state);
    }
}

impl Serialize for NodeSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.words().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for NodeSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let words = Vec::deserialize(deserializer)?;
        Self::from_words(&words).ok_or_else(|| D::Error::custom("no such node"))
    }
}

/// Which bit of which word stands for a node.
#[inline]
fn place(node: NodeId) -> (usize, u64) {
    (usize::from(node.0) / 64, 1 << (node.0 % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_has_the_members_that_were_put_in(
            steps in proptest::collection::vec((0..MAX_NODES as u16, any::<bool>()), 0..100),
        ) {
            let (mut set, mut expected) = (NodeSet::default(), BTreeSet::new());
            for (node, keep) in steps {
                let node = NodeId(node);
                if keep {
                    set.insert(node);
                    expected.insert(node);
                } else {
                    set.remove(node);
                    expected.remove(&node);
                }
                prop_assert_eq!(set.contains(node), keep);
                prop_assert_eq!(set.len(), expected.len());
                prop_assert_eq!(set.is_empty(), expected.is_empty());
            }
            prop_assert!(set.into_iter().eq(expected));
            let mut encoded = Vec::new();
            codec::encode(&set, &[], &mut encoded).unwrap();
            prop_assert_eq!(codec::decode::<NodeSet>(&encoded).unwrap(), (set, &[][..]));
        }
    }

    #[test]
    fn a_node_that_cannot_exist_is_no_member_and_does_not_decode() {
        let beyond = NodeId(MAX_NODES as u16);
        assert!(!NodeSet::default().contains(beyond));
        let mut words = vec![0u64; WORDS];
        words.push(1);
        assert_eq!(NodeSet::from_words(&words), None);
        let mut encoded = Vec::new();
        codec::encode(&words, &[], &mut encoded).unwrap();
        assert!(codec::decode::<NodeSet>(&encoded).is_err());
    }

    #[test]
    fn a_small_set_is_short_on_the_wire() {
        let set: NodeSet = [NodeId(1), NodeId(3)].into_iter().collect();
        let mut encoded = Vec::new();
        codec::encode(&set, &[], &mut encoded).unwrap();
        assert_eq!(encoded.len(), 2);
    }
}
