//! A segment on this node: its pages, and what those may see of them who may only read.
//!
//! A process without write permission must not have a descriptor of the pages themselves: a
//! writable one would let it write, and what a read-only one maps cannot be tracked. It gets one of
//! its user's *replica*, a second memfd, and maps that for reading. The daemon fills a replica and
//! never reads it back, so what such a process does to it shows to its own user only.
//!
//! The invariant: while a replica has a page, no process of this node can write that page, and the
//! engine grants it at least for reading. So a replica's page is punched before the page itself
//! becomes writable for anybody, or goes.

use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;

use migshm_coherence::PageSet;
use migshm_coherence::release::Diff;
use migshm_protocol::Extent;
use migshm_protocol::ids::PAGE_SIZE;
use rustc_hash::FxHashMap;

use super::PAGE;
use super::bits::Bits;
use super::file::{Contents, FileId, PageFile};
use super::mappings::View;
use super::range::Adjacent;
use crate::uffd::{Done, Uffd};

/// A user's number.
pub type UserId = u32;

/// A segment's memory on this node.
#[derive(Serialize, Deserialize)]
pub struct Segment {
    file: PageFile,
    /// Of users who may only read.
    replicas: FxHashMap<UserId, Replica>,
}

#[derive(Serialize, Deserialize)]
struct Replica {
    file: PageFile,
    /// The pages that it has.
    filled: Bits,
}

impl Segment {
    /// Memory of `size` bytes, all holes.
    ///
    /// # Errors
    /// Those of [`PageFile::new`].
    pub fn new(size: u64) -> io::Result<Segment> {
        Ok(Segment {
            file: PageFile::new(size)?,
            replicas: FxHashMap::default(),
        })
    }

    /// Goes on with what was handed over: tracked pages, replicas always among them, are mapped here again.
    ///
    /// # Errors
    /// Those of [`PageFile::track`].
    pub fn resume(&mut self, is_tracked: bool, uffd: &Uffd) -> io::Result<()> {
        if is_tracked {
            self.file.track(uffd)?;
        }
        let mut replicas = self.replicas.values_mut();
        replicas.try_for_each(|replica| replica.file.track(uffd))
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.file.pages()
    }

    /// Whether its pages are tracked.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        self.file.is_tracked()
    }

    /// See [`PageFile::descriptor`].
    ///
    /// # Errors
    /// As there.
    pub fn descriptor(&self, writable: bool) -> io::Result<OwnedFd> {
        self.file.descriptor(writable)
    }

    /// See [`PageFile::track`].
    ///
    /// # Errors
    /// As there.
    pub fn track(&mut self, uffd: &Uffd) -> io::Result<()> {
        self.file.track(uffd)
    }

    /// See [`PageFile::put`].
    ///
    /// # Errors
    /// As there.
    pub fn put(&self, uffd: &Uffd, offset: u64, contents: Contents<'_>) -> io::Result<(u32, Done)> {
        self.file.put(uffd, offset, contents)
    }

    /// See [`PageFile::punch`].
    ///
    /// # Errors
    /// As there.
    pub fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch(offset, length)
    }

    /// See [`PageFile::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, buffer)
    }

    /// See [`PageFile::append`].
    ///
    /// # Errors
    /// As there.
    pub fn append(&self, offset: u64, length: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        self.file.append(offset, length, buffer)
    }

    /// See [`PageFile::merge`].
    ///
    /// # Errors
    /// As there.
    pub fn merge(&mut self, offset: u64, diff: &Diff) -> io::Result<()> {
        self.file.merge(offset, diff)
    }

    /// See [`PageFile::is_present`].
    #[must_use]
    pub fn is_present(&self, offset: u64) -> bool {
        self.file.is_present(offset)
    }

    /// See [`PageFile::present`].
    #[must_use]
    pub fn present(&self, extent: Extent) -> PageSet {
        self.file.present(extent)
    }

    /// Bytes of memory that it takes, with its replicas; nothing is known if `fstat(2)` fails.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        let replicas = self.replicas.values();
        let replicas: u64 = replicas.filter_map(|r| r.file.resident()).sum();
        Some(self.file.resident()? + replicas)
    }

    /// See [`PageFile::id`].
    #[must_use]
    pub fn id(&self, view: View) -> Option<FileId> {
        match view {
            View::Pages => Some(self.file.id()),
            View::Replica(user) => Some(self.replicas.get(&user)?.file.id()),
        }
    }
}

/// Replicas.
impl Segment {
    /// A descriptor of a user's replica, which is made if there is none.
    ///
    /// # Errors
    /// Those of [`PageFile::new`] and [`PageFile::track`].
    pub fn replica(&mut self, user: UserId, uffd: &Uffd) -> io::Result<OwnedFd> {
        if let Some(replica) = self.replicas.get(&user) {
            return replica.file.descriptor(true);
        }
        let mut file = PageFile::new(u64::from(self.pages()) * PAGE)?;
        file.track(uffd)?;
        let descriptor = file.descriptor(true)?;
        let filled = Bits::default();
        self.replicas.insert(user, Replica { file, filled });
        Ok(descriptor)
    }

    /// The users that have a replica.
    pub fn replicas(&self) -> impl Iterator<Item = UserId> {
        self.replicas.keys().copied()
    }

    /// Frees a user's replica, once nothing maps it.
    pub fn remove_replica(&mut self, user: UserId) {
        self.replicas.remove(&user);
    }

    /// Whether anybody has a replica.
    #[must_use]
    pub fn has_replicas(&self) -> bool {
        !self.replicas.is_empty()
    }

    /// Whether some replica has the page.
    #[must_use]
    pub fn is_replicated(&self, page: u32) -> bool {
        self.replicas.values().any(|r| r.filled.contains(page))
    }

    /// Puts a page into a user's replica. Nobody may be able to write it.
    ///
    /// # Errors
    /// Those of [`PageFile::put`].
    pub fn fill_replica(
        &mut self,
        user: UserId,
        page: u32,
        contents: &[u8; PAGE_SIZE],
        uffd: &Uffd,
    ) -> io::Result<Done> {
        let replica = self.replicas.get_mut(&user);
        let Replica { file, filled } = replica.ok_or(io::ErrorKind::NotFound)?;
        let offset = u64::from(page) * PAGE;
        if filled.contains(page) && file.is_present(offset) {
            return Ok(Done::Yes);
        }
        let contents = Contents::Bytes(Adjacent::new(contents));
        let mut done = file.put(uffd, offset, contents);
        if matches!(done, Ok((_, Done::Exists))) {
            // The user wrote to the hole, through the descriptor.
            file.punch(offset, PAGE)?;
            done = file.put(uffd, offset, contents);
        }
        filled.set(page, true);
        Ok(done?.1)
    }

    /// Takes a page out of all replicas.
    ///
    /// # Errors
    /// Those of [`PageFile::punch`].
    pub fn punch_replicas(&mut self, page: u32) -> io::Result<()> {
        for Replica { file, filled } in self.replicas.values_mut() {
            if filled.contains(page) {
                file.punch(u64::from(page) * PAGE, PAGE)?;
                filled.set(page, false);
            }
        }
        Ok(())
    }
}
