//! Pages in a sealed memfd, into which only the daemon's own mapping puts pages once they are
//! tracked.
//!
//! A page is put in by `UFFDIO_COPY` only (atomic: no neighbour maps a half-written page), through
//! the daemon's own mapping, which is registered for nothing but that. The daemon itself reads by
//! `pread`, which neither faults nor fills a hole. Punching a page out of the memfd takes it from
//! every process at once.

use serde::{Deserialize, Serialize};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use migshm_coherence::PageSet;
use migshm_coherence::release::Diff;
use migshm_protocol::Extent;
use migshm_protocol::ids::{EXTENT_PAGES, PAGE_SIZE};

use super::PAGE;
use super::range::Adjacent;
use crate::handover::descriptor;
use crate::uffd::{Done, Uffd};

pub(super) const MEMFD_NAME: &CStr = c"migshm";

/// What a process may do that reopens a descriptor of the memfd through `/proc/self/fd`, which
/// the memfd's mode decides: a reader must not become a writer by that.
const MEMFD_MODE: libc::mode_t = 0o600;

/// Which file a mapping is of, as `/proc/PID/maps` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// Number of its device.
    pub device: (u32, u32),
    /// Its inode.
    pub inode: u64,
}

/// A memfd of `length` zeros, which no process that maps it can resize.
///
/// # Errors
/// Those of `memfd_create(2)`, `fchmod(2)` and `ftruncate(2)`.
pub fn sealed(name: &CStr, length: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string; the call returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is a descriptor that nothing else owns.
    let memfd = unsafe { File::from_raw_fd(fd) };
    // SAFETY: plain fchmod on an owned descriptor.
    if unsafe { libc::fchmod(fd, MEMFD_MODE) } < 0 {
        return Err(io::Error::last_os_error());
    }
    memfd.set_len(length)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain fcntl on an owned descriptor.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(memfd)
}

/// What pages are to contain.
#[derive(Clone, Copy, Debug)]
pub enum Contents<'a> {
    /// This.
    Bytes(Adjacent<'a>),
    /// Zeros, so many pages of them.
    Zeros(u32),
}

/// Pages that local processes may map.
#[derive(Serialize, Deserialize)]
pub struct PageFile {
    #[serde(with = "descriptor")]
    memfd: File,
    id: FileId,
    pages: u32,
    /// The daemon's own mapping; there while the pages are tracked.
    #[serde(skip)]
    own: Option<OwnMapping>,
    /// Another, through which single bytes of pages are written: nothing faults there.
    #[serde(skip)]
    window: Option<OwnMapping>,
}

impl PageFile {
    /// Memory of `size` bytes, all holes.
    ///
    /// # Errors
    /// Those of [`sealed`] and `fstat(2)`.
    pub fn new(size: u64) -> io::Result<PageFile> {
        let pages = u32::try_from(size.div_ceil(PAGE)).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let memfd = sealed(MEMFD_NAME, u64::from(pages) * PAGE)?;
        let metadata = memfd.metadata()?;
        let device = metadata.dev();
        Ok(PageFile {
            id: FileId {
                device: (libc::major(device), libc::minor(device)),
                inode: metadata.ino(),
            },
            memfd,
            pages,
            own: None,
            window: None,
        })
    }

    /// Which file it is.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Whether its pages are tracked.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        self.own.is_some()
    }

    /// A descriptor to hand to a process. One that is not writable cannot be mapped writable, now
    /// or later.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn descriptor(&self, writable: bool) -> io::Result<OwnedFd> {
        if writable {
            return Ok(self.memfd.try_clone()?.into());
        }
        Ok(File::open(format!("/proc/self/fd/{}", self.memfd.as_raw_fd()))?.into())
    }

    /// Makes the daemon's own mapping, through which `uffd` puts pages in from now on.
    ///
    /// # Errors
    /// Those of `mmap(2)` and `UFFDIO_REGISTER`.
    pub fn track(&mut self, uffd: &Uffd) -> io::Result<()> {
        let mapping = self.map_own()?;
        uffd.register(mapping.address, mapping.length as u64)?;
        self.own = Some(mapping);
        Ok(())
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

    /// Puts pages in at `offset`. Returns as [`Uffd::copy`] does.
    ///
    /// # Errors
    /// `NotFound` unless tracked, by this `uffd`; else those of [`Uffd::copy`].
    pub fn put(&self, uffd: &Uffd, offset: u64, contents: Contents<'_>) -> io::Result<(u32, Done)> {
        let own = self.own.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let address = own.address + offset;
        match contents {
            Contents::Bytes(pages) => uffd.copy(address, pages),
            Contents::Zeros(pages) => uffd.zero(address, pages),
        }
    }

    /// Writes a diff into the page at `offset`, which processes may be using: to all of them each
    /// aligned run of up to a word appears at once.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn merge(&mut self, offset: u64, diff: &Diff) -> io::Result<()> {
        if self.window.is_none() {
            self.window = Some(self.map_own()?);
        }
        let window = self.window.as_ref().expect("it is there now");
        let offset = usize::try_from(offset).expect("an address");
        assert!(offset + PAGE_SIZE <= window.length);
        let page = (window.address as *mut u8).wrapping_add(offset);
        diff.for_each_run(PAGE_SIZE, |at, bytes| {
            let parts = aligned_parts(at, bytes);
            for (at, bytes) in parts {
                // SAFETY: inside the page, which is mapped for as long as `self` lives, and aligned
                // to its length; others access it as they like, this process only atomically.
                unsafe { store(page.add(at), bytes) };
            }
        });
        Ok(())
    }

    /// Frees `length` bytes of pages from `offset` on, whoever maps them.
    ///
    /// # Errors
    /// Those of `fallocate(2)`.
    pub fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let offset = libc::off_t::try_from(offset).expect("a file offset");
        let length = libc::off_t::try_from(length).expect("a file offset");
        // SAFETY: plain fallocate on an owned descriptor; mappings of a hole fault, as they must.
        if unsafe { libc::fallocate(self.memfd.as_raw_fd(), mode, offset, length) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Copies bytes out from `offset` on; zeros for a hole.
    ///
    /// # Errors
    /// Those of `pread(2)`.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.memfd.read_exact_at(buffer, offset)
    }

    /// Appends `length` bytes from `offset` on to a buffer; zeros for a hole.
    ///
    /// # Errors
    /// Those of `pread(2)`; `UnexpectedEof` beyond the file's end.
    pub fn append(&self, offset: u64, length: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.reserve(length);
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let spare = &mut buffer.spare_capacity_mut()[..length];
        // SAFETY: the kernel writes at most `length` bytes into the spare capacity.
        let got = unsafe {
            libc::pread(
                self.memfd.as_raw_fd(),
                spare.as_mut_ptr().cast(),
                length,
                offset,
            )
        };
        match usize::try_from(got) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(got) if got < length => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {
                // SAFETY: so many bytes behind the length have just been written.
                unsafe { buffer.set_len(buffer.len() + length) };
                Ok(())
            }
        }
    }

    /// Whether there is a page at `offset`, and not a hole.
    #[must_use]
    pub fn is_present(&self, offset: u64) -> bool {
        self.next_data(offset) == Some(offset)
    }

    /// Which pages of an extent are not holes, by their index in the extent.
    #[must_use]
    pub fn present(&self, extent: Extent) -> PageSet {
        let mut set = PageSet::default();
        let start = u64::from(extent.first_page()) * PAGE;
        let end = start + u64::from(EXTENT_PAGES) * PAGE;
        let mut offset = start;
        // Page by page: a search for the next hole would not stop at the extent's end.
        while let Some(data) = self.next_data(offset).filter(|data| *data < end) {
            set.insert(u32::try_from((data - start) / PAGE).expect("inside the extent"));
            offset = data + PAGE;
        }
        set
    }

    /// Offset of the first page at or after `offset` that is not a hole.
    fn next_data(&self, offset: u64) -> Option<u64> {
        let offset = libc::off_t::try_from(offset).ok()?;
        // SAFETY: plain lseek on an owned descriptor, whose position nothing uses.
        u64::try_from(unsafe { libc::lseek(self.memfd.as_raw_fd(), offset, libc::SEEK_DATA) }).ok()
    }

    /// Bytes of memory that it takes; nothing is known if `fstat(2)` fails.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        Some(self.memfd.metadata().ok()?.blocks() * 512)
    }
}

/// Divides bytes that are to be written at an offset into parts of 1, 2, 4 or 8 that are aligned to
/// their length.
fn aligned_parts(mut at: usize, mut bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    std::iter::from_fn(move || {
        let largest = [8, 4, 2, 1];
        let fits = |length: &usize| at.is_multiple_of(*length) && *length <= bytes.len();
        let length = largest.into_iter().find(fits)?;
        let (part, rest) = bytes.split_at(length);
        let from = at;
        (at, bytes) = (at + length, rest);
        Some((from, part))
    })
}

/// # Safety
/// `place` is valid for as many bytes, aligned to their number, and written by nobody in this process
/// but atomically.
unsafe fn store(place: *mut u8, bytes: &[u8]) {
    // SAFETY: as the caller promises.
    unsafe {
        match *bytes {
            [a] => AtomicU8::from_ptr(place).store(a, Ordering::Relaxed),
            [a, b] => {
                let value = u16::from_ne_bytes([a, b]);
                AtomicU16::from_ptr(place.cast()).store(value, Ordering::Relaxed);
            }
            [a, b, c, d] => {
                let value = u32::from_ne_bytes([a, b, c, d]);
                AtomicU32::from_ptr(place.cast()).store(value, Ordering::Relaxed);
            }
            [a, b, c, d, e, f, g, h] => {
                let value = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                AtomicU64::from_ptr(place.cast()).store(value, Ordering::Relaxed);
            }
            _ => unreachable!("a part has 1, 2, 4 or 8 bytes"),
        }
    }
}

struct OwnMapping {
    address: u64,
    length: usize,
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `PageFile::map_own`, nothing refers into it.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.length) };
    }
}
