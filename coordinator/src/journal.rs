//! A file of what has happened since a snapshot.
//!
//! A commit is appended with one write, and then the header says how far the file is committed: so a
//! commit costs microseconds. What follows may be there or not, whole or in part, as it was not confirmed:
//! a commit counts if its digest is right. What precedes has to be there, or the file is damaged.
//!
//! ```text
//!     header:  MAGIC, generation (8 bytes), committed (8), digest of these (32)
//!     commit:  size of its records (4 bytes), digest (32), records: size (4), bytes
//! ```
//!
//! Numbers are little-endian. A journal belongs to the snapshot with its generation. For the next one it is
//! begun anew in the same place, so that the disk need not find room for it again; the generation and the
//! place are in each digest, so that nothing of the former content counts.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN};

use crate::store::Durability;

const MAGIC: &[u8; 8] = b"migshm-j";
const HEADER: usize = MAGIC.len() + 8 + 8 + SHA256_OUTPUT_LEN;
/// Size and digest.
const PREFIX: usize = 4 + SHA256_OUTPUT_LEN;

/// A journal to append to.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    durability: Durability,
    generation: u64,
    /// Where the next commit goes.
    end: usize,
    /// Kept for its allocation.
    buffer: Vec<u8>,
}

/// What is in a journal.
pub(crate) struct Recovered {
    pub(crate) generation: u64,
    pub(crate) records: Vec<Vec<u8>>,
    end: usize,
}

impl Journal {
    /// Makes an empty one, in place of what may be there.
    pub(crate) fn create(
        path: &Path,
        durability: Durability,
        generation: u64,
    ) -> io::Result<Journal> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let mut journal = Journal {
            file,
            durability,
            generation,
            end: HEADER,
            buffer: Vec::new(),
        };
        journal.restart(generation)?;
        if durability == Durability::Power {
            journal.file.sync_all()?;
        }
        Ok(journal)
    }

    /// Goes on with one.
    pub(crate) fn open(
        path: &Path,
        durability: Durability,
        contents: &Recovered,
    ) -> io::Result<Journal> {
        Ok(Journal {
            file: File::options().write(true).open(path)?,
            durability,
            generation: contents.generation,
            end: contents.end,
            buffer: Vec::new(),
        })
    }

    /// Adds records, all or none.
    pub(crate) fn append(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.resize(PREFIX, 0);
        for record in records {
            self.buffer.extend(size(record.len())?);
            self.buffer.extend(record);
        }
        let (prefix, body) = self.buffer.split_at_mut(PREFIX);
        prefix[..4].copy_from_slice(&size(body.len())?);
        prefix[4..].copy_from_slice(&digest(self.generation, self.end, body));
        self.file.write_all_at(&self.buffer, self.end as u64)?;
        if self.durability == Durability::Power {
            self.file.sync_data()?;
        }
        self.end += self.buffer.len();
        // The disk gets it with the next commit: until then this one's digest tells that it is there.
        self.write_header()
    }

    /// What its commits survive.
    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Begins anew, for another snapshot; the disk gets that with the first commit.
    pub(crate) fn restart(&mut self, generation: u64) -> io::Result<()> {
        self.generation = generation;
        self.end = HEADER;
        self.write_header()
    }

    fn write_header(&self) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&self.generation.to_le_bytes());
        header[16..24].copy_from_slice(&(self.end as u64).to_le_bytes());
        let digest = digest(self.generation, self.end, MAGIC);
        header[24..].copy_from_slice(&digest);
        self.file.write_all_at(&header, 0)
    }
}

impl Recovered {
    /// What is in a file; `None` if it is damaged.
    pub(crate) fn parse(file: &[u8]) -> Option<Recovered> {
        let (header, _) = file.split_at_checked(HEADER)?;
        let number = |at| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        let generation = number(8);
        let committed = usize::try_from(number(16)).ok()?;
        if !header.starts_with(MAGIC) || header[24..] != digest(generation, committed, MAGIC) {
            return None;
        }
        let mut contents = Recovered {
            generation,
            records: Vec::new(),
            end: HEADER,
        };
        while let Some((records, end)) = commit(file, generation, contents.end) {
            contents.records.extend(records);
            contents.end = end;
        }
        (contents.end >= committed).then_some(contents)
    }
}

/// The records of a whole commit, and where it ends.
fn commit(file: &[u8], generation: u64, at: usize) -> Option<(Vec<Vec<u8>>, usize)> {
    let (prefix, rest) = file.get(at..)?.split_at_checked(PREFIX)?;
    let (size, expected) = prefix.split_first_chunk()?;
    let (mut body, _) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
    if expected != digest(generation, at, body) {
        return None;
    }
    let end = at + PREFIX + body.len();
    let mut records = Vec::new();
    while let Some((size, rest)) = body.split_first_chunk() {
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
        records.push(record.to_vec());
        body = rest;
    }
    Some((records, end))
}

fn size(of: usize) -> io::Result<[u8; 4]> {
    let size = u32::try_from(of).map_err(|_| io::ErrorKind::FileTooLarge)?;
    Ok(size.to_le_bytes())
}

fn digest(generation: u64, at: usize, bytes: &[u8]) -> [u8; SHA256_OUTPUT_LEN] {
    let mut context = Context::new(&SHA256);
    context.update(&generation.to_le_bytes());
    context.update(&(at as u64).to_le_bytes());
    context.update(bytes);
    let digest = context.finish();
    digest.as_ref().try_into().expect("SHA-256")
}
