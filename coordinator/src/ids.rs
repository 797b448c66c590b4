//! The table of one kind of object: keys, ids, and the order in which ids are given out.
//!
//! An id is `sequence << 15 | index`, as on Linux with its default limits. Indices are given out
//! cyclically, within a window that grows with the number of objects (64 at least, half as many
//! again as are in use), so that an id comes back late. The sequence number steps whenever the
//! index wraps around, so a stale id names an index whose sequence has moved on.
//!
//! Linux answers EINVAL for a stale id whether its index is free or used again (since 4.3); EIDRM
//! is left to calls that were already waiting when the object went away.

use migshm_protocol::call::{Caller, Errno, Perm, StatBy};
use migshm_protocol::limits::IPCMNI;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::perm;
use crate::quotas::Amount;

/// `IPC_PRIVATE`: the key that never finds anything.
pub(crate) const IPC_PRIVATE: i32 = 0;
const IPC_CREAT: i32 = 0o1000;
const IPC_EXCL: i32 = 0o2000;

const INDEX_BITS: u32 = 15;
const INDEX_MASK: i32 = IPCMNI - 1;
/// Sequence numbers run below this.
const SEQUENCES: u16 = (i32::MAX >> INDEX_BITS) as u16;
/// Indices are given out from at least this many before one comes back.
const MIN_CYCLE: usize = 64;

/// An object with its owner, mode and key.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Entry<T> {
    pub(crate) perm: Perm,
    pub(crate) object: T,
}

/// What a user's quota bounds beside the number of objects.
pub(crate) trait Contents {
    /// How much of it this object is; it never changes.
    fn contents(&self) -> u64;
}

/// The objects of one kind.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Table<T> {
    slots: Vec<Option<Entry<T>>>,
    keys: BTreeMap<i32, i32>,
    in_use: usize,
    limit: usize,
    /// Where the search for a free index starts.
    next: usize,
    /// The index given out last.
    last: Option<usize>,
    sequence: u16,
    /// What each user has created that exists.
    created: BTreeMap<u32, Amount>,
}

impl<T: Contents> Table<T> {
    pub(crate) fn new(limit: usize) -> Table<T> {
        Table {
            slots: Vec::new(),
            keys: BTreeMap::default(),
            in_use: 0,
            limit,
            next: 0,
            last: None,
            sequence: 0,
            created: BTreeMap::new(),
        }
    }

    /// The existing object that a `*get` call asks for, or `None` if it is to be created.
    ///
    /// `fits` tells whether an existing object is as large as the caller wants.
    pub(crate) fn find(
        &self,
        key: i32,
        flags: i32,
        caller: &Caller,
        fits: impl FnOnce(&T) -> bool,
    ) -> Result<Option<i32>, Errno> {
        if key == IPC_PRIVATE {
            return Ok(None);
        }
        let Some(&id) = self.keys.get(&key) else {
            return if flags & IPC_CREAT == 0 {
                Err(Errno::ENOENT)
            } else {
                Ok(None)
            };
        };
        if flags & IPC_CREAT != 0 && flags & IPC_EXCL != 0 {
            return Err(Errno::EEXIST);
        }
        let entry = self.get(id)?;
        if !fits(&entry.object) {
            return Err(Errno::EINVAL);
        }
        perm::check(&entry.perm, caller, flags.cast_unsigned())?;
        Ok(Some(id))
    }

    /// ENOSPC if an object with these contents would be more than the caller may create.
    pub(crate) fn check_quota(
        &self,
        caller: &Caller,
        quota: Amount,
        contents: u64,
    ) -> Result<(), Errno> {
        let has = self.created.get(&caller.uid).copied().unwrap_or_default();
        has.plus(Amount {
            objects: 1,
            contents,
        })
        .check(quota, caller)
    }

    /// Adds the object that `make` builds from its id; ENOSPC at the limit.
    pub(crate) fn insert(
        &mut self,
        key: i32,
        flags: i32,
        caller: &Caller,
        make: impl FnOnce(i32) -> T,
    ) -> Result<i32, Errno> {
        if self.in_use >= self.limit {
            return Err(Errno::ENOSPC);
        }
        let index = self.free_index().ok_or(Errno::ENOSPC)?;
        if self.last.is_some_and(|last| index <= last) {
            self.sequence = (self.sequence + 1) % SEQUENCES;
        }
        self.last = Some(index);
        self.next = index + 1;
        let id =
            i32::from(self.sequence) << INDEX_BITS | i32::try_from(index).expect("below IPCMNI");

        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, || None);
        }
        let perm = perm::new(key, self.sequence, flags.cast_unsigned(), caller);
        let entry = Entry {
            perm,
            object: make(id),
        };
        let created = self.created.entry(perm.cuid).or_default();
        *created = created.plus(entry.amount());
        self.slots[index] = Some(entry);
        self.in_use += 1;
        if key != IPC_PRIVATE {
            self.keys.insert(key, id);
        }
        Ok(id)
    }

    fn free_index(&self) -> Option<usize> {
        let end = (self.in_use * 3 / 2).max(MIN_CYCLE).min(IPCMNI as usize);
        let free = |&index: &usize| self.slots.get(index).is_none_or(Option::is_none);
        (self.next..end)
            .find(free)
            .or_else(|| (0..end.min(self.next)).find(free))
    }

    /// The object with this id; EINVAL if there is none.
    pub(crate) fn get(&self, id: i32) -> Result<&Entry<T>, Errno> {
        match self.slots.get(index_of(id)?) {
            Some(Some(entry)) if entry.perm.seq == sequence_of(id) => Ok(entry),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The object with this id; EINVAL if there is none.
    pub(crate) fn get_mut(&mut self, id: i32) -> Result<&mut Entry<T>, Errno> {
        match self.slots.get_mut(index_of(id)?) {
            Some(Some(entry)) if entry.perm.seq == sequence_of(id) => Ok(entry),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The object at this index, and its id. As on Linux an id will do: its sequence is ignored.
    pub(crate) fn at(&self, index: i32) -> Result<(i32, &Entry<T>), Errno> {
        let index = index_of(index)?;
        let entry = self
            .slots
            .get(index)
            .and_then(Option::as_ref)
            .ok_or(Errno::EINVAL)?;
        let id =
            i32::from(entry.perm.seq) << INDEX_BITS | i32::try_from(index).expect("below IPCMNI");
        Ok((id, entry))
    }

    /// The object that a `*_STAT` command names, and its id, if the caller may read it or need not.
    pub(crate) fn named(
        &self,
        id: i32,
        by: StatBy,
        caller: &Caller,
    ) -> Result<(i32, &Entry<T>), Errno> {
        let (id, entry) = match by {
            StatBy::Id => (id, self.get(id)?),
            StatBy::Index | StatBy::Any => self.at(id)?,
        };
        if by != StatBy::Any {
            perm::check(&entry.perm, caller, perm::READ)?;
        }
        Ok((id, entry))
    }

    /// Makes the object's key free for others, while it lives on under its id.
    pub(crate) fn forget_key(&mut self, id: i32) {
        if let Ok(entry) = self.get_mut(id) {
            let key = std::mem::replace(&mut entry.perm.key, IPC_PRIVATE);
            if key != IPC_PRIVATE {
                self.keys.remove(&key);
            }
        }
    }

    /// Takes the object out.
    pub(crate) fn remove(&mut self, id: i32) -> Option<Entry<T>> {
        self.get(id).ok()?;
        let entry = self.slots[index_of(id).ok()?].take()?;
        self.in_use -= 1;
        if let Some(created) = self.created.get_mut(&entry.perm.cuid) {
            *created = created.minus(entry.amount());
            if created.objects == 0 {
                self.created.remove(&entry.perm.cuid);
            }
        }
        if entry.perm.key != IPC_PRIVATE {
            self.keys.remove(&entry.perm.key);
        }
        while self.slots.last().is_some_and(Option::is_none) {
            self.slots.pop();
        }
        Some(entry)
    }

    /// How many objects there are.
    pub(crate) fn in_use(&self) -> i32 {
        i32::try_from(self.in_use).expect("at most IPCMNI")
    }

    /// The highest index in use, 0 if there is none: what the `*_INFO` commands return.
    pub(crate) fn highest(&self) -> i32 {
        i32::try_from(self.slots.len().saturating_sub(1)).expect("below IPCMNI")
    }

    /// All objects, by index.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten().map(|entry| &entry.object)
    }

    /// The ids of all objects, by index.
    pub(crate) fn ids(&self) -> Vec<i32> {
        (0..IPCMNI)
            .take(self.slots.len())
            .filter_map(|index| self.at(index).ok().map(|(id, _)| id))
            .collect()
    }
}

impl<T: Contents> Entry<T> {
    fn amount(&self) -> Amount {
        Amount {
            objects: 1,
            contents: self.object.contents(),
        }
    }
}

fn index_of(id: i32) -> Result<usize, Errno> {
    if id < 0 {
        Err(Errno::EINVAL)
    } else {
        Ok((id & INDEX_MASK) as usize)
    }
}

fn sequence_of(id: i32) -> u16 {
    (id >> INDEX_BITS) as u16
}
