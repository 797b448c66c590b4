//! `shmget`, `shmat`, `shmdt`, `shmctl`.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use migshm_protocol::call::{Answer, Attachment, Call, Consistency, Errno, ShmCommand, StatBy};
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::local::{FromNode, ToNode};

use crate::client::{self, Session, out_of_step};
use crate::complain::complain;
use crate::connection::{Patience, Raw, Reply};
use crate::convert::{self, ShmidDs};
use crate::process::{ATTACHES, REACH, READ_ONLY};
use crate::{anchor, process, sys};

/// `shmget(2)`.
pub fn get(key: i32, size: usize, flags: c_int) -> Result<isize, Errno> {
    convert::value(client::call(Call::ShmGet {
        key,
        size: size as u64,
        flags,
        consistency: consistency()?,
    })?)
}

/// What the environment says of the segments that this process makes.
fn consistency() -> Result<Option<Consistency>, Errno> {
    let of = |text: &std::ffi::CStr| Consistency::parse(text.to_bytes()).ok();
    let consistency = match sys::env(c"MIGSHM_CONSISTENCY").map(of) {
        None => None,
        Some(Some(consistency)) if consistency != Consistency::Durable => Some(consistency),
        Some(_) => {
            complain(format_args!(
                "MIGSHM_CONSISTENCY must be sequential or release"
            ));
            return Err(Errno::EINVAL);
        }
    };
    let durability = sys::env(c"MIGSHM_DURABILITY").map(|name| name.to_bytes());
    match (durability, consistency) {
        (None | Some(b"none"), consistency) => Ok(consistency),
        (Some(b"release"), None | Some(Consistency::Release)) => Ok(Some(Consistency::Durable)),
        _ => {
            complain(format_args!(
                "MIGSHM_DURABILITY must be none, or release, which is not for sequential consistency"
            ));
            Err(Errno::EINVAL)
        }
    }
}

/// `shmat(2)`. The result is the address.
///
/// The daemon grants the attach and sends the segment's memory; it is told where the memory was
/// mapped, and notes that before it hears of a child that inherits it. A segment whose pages are
/// tracked stays inaccessible until the daemon has registered the mapping.
pub fn attach(id: c_int, address: usize, flags: c_int) -> Result<isize, Errno> {
    let place = Place::parse(address, flags)?;
    let mut session = Session::begin()?;
    anchor::ensure(&mut session)?;

    let request = process::request_id();
    let call = Call::ShmAttach { id, flags };
    session.request(&ToNode::Call { id: request, call }, Raw::NONE)?;
    let Reply {
        message,
        descriptor,
    } = session.reply(request, Patience::Endless)?;
    let attachment = match message {
        FromNode::Answer {
            outcome: Ok(Answer::Attached(attachment)),
            ..
        } => attachment,
        FromNode::Answer {
            outcome: Err(errno),
            ..
        } => return Err(errno),
        _ => return Err(out_of_step()),
    };

    // Nothing is waited for that can be seen by nobody: what this thread does next the daemon hears
    // after this message, and what other threads may have done before it, forks and detaches, it does
    // not have to tell from what they do after.
    let waits = attachment.tracked || flags & libc::SHM_REMAP != 0 || !process::has_one_thread();
    let id = process::request_id();
    let mapped = |id, address| ToNode::Mapped {
        id,
        attach: attachment.attach,
        address,
    };
    // No descriptor comes if the process has as many open as it may.
    let mapping = descriptor.ok_or(Errno::ENOMEM).and_then(|memory| {
        let mapping = Mapping::make(place, &attachment, &memory, flags);
        sys::close(memory);
        mapping
    });
    let mapping = match mapping {
        Ok(mapping) => mapping,
        Err(errno) => {
            // It counts for nobody when this has returned.
            session.tell(&mapped(Some(id), 0), Raw::NONE, None)?;
            let _ = session.outcome(id, Patience::Endless);
            return Err(errno);
        }
    };
    let told = session.tell(
        &mapped(waits.then_some(id), mapping.address as u64),
        Raw::NONE,
        None,
    );
    let noted = told.and_then(|()| match waits {
        true => session.outcome(id, Patience::Endless).map(drop),
        false => Ok(()),
    });
    if let Err(errno) = noted {
        mapping.unmap();
        return Err(errno);
    }
    drop(session);
    ATTACHES.fetch_add(1, Ordering::Relaxed);
    REACH.include(mapping.address, mapping.length);
    if flags & libc::SHM_RDONLY != 0 {
        READ_ONLY.include(mapping.address, mapping.length);
    }
    if attachment.tracked
        && let Err(errno) = mapping.protect(protection(flags))
    {
        detach(mapping.address)?;
        return Err(errno);
    }
    Ok(mapping.address as isize)
}

/// `shmdt(2)`.
pub fn detach(address: usize) -> Result<isize, Errno> {
    sys::forget_readable();
    if !address.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    let mut session = Session::begin()?;
    let id = process::request_id();
    session.request(
        &ToNode::Detach {
            id,
            address: address as u64,
        },
        Raw::NONE,
    )?;
    match session.reply(id, Patience::Endless)?.message {
        FromNode::Detaching { attach, pieces, .. } => {
            for (first, pages) in pieces.into_iter().filter(|(_, pages)| *pages > 0) {
                Mapping {
                    address: address + first as usize * PAGE_SIZE,
                    length: pages as usize * PAGE_SIZE,
                }
                .unmap();
            }
            // The count only says whether a fork child has something to tell; it may not wrap
            // where a raw clone's child detaches what it never counted.
            let _ = ATTACHES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
                count.checked_sub(1)
            });
            // The detach has taken place, also if the daemon has gone meanwhile.
            let _ = session.tell(&ToNode::Unmapped { attach }, Raw::NONE, None);
            Ok(0)
        }
        FromNode::Answer {
            outcome: Err(errno),
            ..
        } => Err(errno),
        _ => Err(out_of_step()),
    }
}

/// `munmap(2)`, by which a program may end an attach, or a part of it.
///
/// Where the range may be of an attach, it is emptied, stays reserved until the daemon has
/// forgotten what was there, and only then is free for another thread's `shmat`.
///
/// # Safety
/// As for `munmap`: the program vouches that it does not use the range any more.
pub unsafe fn unmap(address: usize, length: usize) -> Result<isize, Errno> {
    sys::forget_readable();
    let whole = length.next_multiple_of(PAGE_SIZE);
    if address.is_multiple_of(PAGE_SIZE) && length > 0 && REACH.overlaps(address, whole) {
        // SAFETY: by the caller.
        unsafe { sys::reserve_over(address, whole) }?;
        // If there is no daemon, there is nobody to tell.
        let _ = client::tell_unmapping(address, whole);
    }
    // SAFETY: by the caller.
    unsafe { sys::munmap(address, length) }.map(|()| 0)
}

/// `mmap(2)`, by which a program may put something else over an attach, or over a part of it.
///
/// What was there is unmapped first, as by [`unmap`], if there will be something to put there.
///
/// # Safety
/// As for `mmap`.
pub unsafe fn map(
    address: usize,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Result<isize, Errno> {
    sys::forget_readable();
    let whole = length.next_multiple_of(PAGE_SIZE);
    let replaces = flags & libc::MAP_FIXED != 0 && flags & libc::MAP_FIXED_NOREPLACE == 0;
    if replaces && address.is_multiple_of(PAGE_SIZE) && REACH.overlaps(address, whole) {
        let elsewhere = flags & !(libc::MAP_FIXED | libc::MAP_POPULATE | libc::MAP_LOCKED);
        // SAFETY: a new mapping at an address of the kernel's choice, of which nobody knows.
        unsafe {
            let trial = sys::mmap(0, length, protection, elsewhere, fd, offset)?;
            sys::munmap(trial, length)?;
        }
        // SAFETY: by the caller.
        unsafe { sys::reserve_over(address, whole) }?;
        // If there is no daemon, there is nobody to tell.
        let _ = client::tell_unmapping(address, whole);
    }
    // SAFETY: by the caller.
    unsafe { sys::mmap(address, length, protection, flags, fd, offset) }
        .map(|address| address as isize)
}

/// `mremap(2)`, by which a program may move an attach, make it shorter or longer, or put something
/// over it. The daemon looks what has become of all attaches before the program knows where to.
///
/// # Safety
/// As for `mremap`.
pub unsafe fn remap(
    address: usize,
    length: usize,
    new_length: usize,
    flags: c_int,
    new_address: usize,
) -> Result<isize, Errno> {
    sys::forget_readable();
    let covers = flags & libc::MREMAP_FIXED != 0 && REACH.overlaps(new_address, new_length);
    // A length of 0 asks for a second mapping of what is there.
    let concerned = covers || REACH.overlaps(address, length.max(1));
    // SAFETY: by the caller.
    let result = unsafe { sys::mremap(address, length, new_length, flags, new_address) };
    if concerned {
        if let Ok(to) = result {
            REACH.include(to, new_length);
            if READ_ONLY.overlaps(address, length.max(1)) {
                READ_ONLY.include(to, new_length);
            }
        }
        // One that fails may have unmapped what was where it should go to.
        let _ = client::tell_remapped();
    }
    result.map(|to| to as isize)
}

/// `mprotect(2)`, or with a key `pkey_mprotect(2)`: `EACCES` for writing in an attach that was made
/// to read only.
///
/// The kernel refuses that itself only where the descriptor that was mapped is read-only, and what
/// is mapped from such a descriptor cannot be tracked.
///
/// # Safety
/// As for `mprotect`.
pub unsafe fn protect(
    address: usize,
    length: usize,
    protection: c_int,
    key: Option<c_int>,
) -> Result<isize, Errno> {
    sys::forget_readable();
    const PROT_SEM: c_int = 8;
    const VALID: c_int = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC | PROT_SEM;
    let whole = length.next_multiple_of(PAGE_SIZE);
    let valid = address.is_multiple_of(PAGE_SIZE) && protection & !VALID == 0;
    if valid && protection & libc::PROT_WRITE != 0 && READ_ONLY.overlaps(address, whole) {
        // Without a daemon nobody else sees what is written.
        let until = client::ask_permitted(address, whole).unwrap_or(address + whole);
        if until < address + whole {
            // As the kernel, which goes from mapping to mapping.
            if address < until {
                // SAFETY: by the caller.
                unsafe { sys::mprotect(address, until - address, protection, key) }?;
            }
            return Err(Errno::EACCES);
        }
    }
    // SAFETY: by the caller.
    unsafe { sys::mprotect(address, length, protection, key) }.map(|()| 0)
}

/// `shmctl(2)`.
pub fn control(id: c_int, command: c_int, buffer: usize) -> Result<isize, Errno> {
    if id < 0 {
        return Err(Errno::EINVAL);
    }
    let command = match command {
        libc::IPC_STAT => ShmCommand::Stat(StatBy::Id),
        convert::SHM_STAT => ShmCommand::Stat(StatBy::Index),
        convert::SHM_STAT_ANY => ShmCommand::Stat(StatBy::Any),
        libc::IPC_SET => ShmCommand::Set(sys::copy_in::<ShmidDs>(buffer)?.perm.to_new()),
        libc::IPC_RMID => ShmCommand::Remove,
        libc::SHM_LOCK => ShmCommand::Lock(true),
        libc::SHM_UNLOCK => ShmCommand::Lock(false),
        libc::IPC_INFO => ShmCommand::Limits,
        convert::SHM_INFO => ShmCommand::Usage,
        _ => return Err(Errno::EINVAL),
    };
    convert::deliver(
        client::call(Call::ShmCtl { id, command })?,
        command == ShmCommand::Stat(StatBy::Id),
        buffer,
    )
}

/// Where a segment is to be mapped.
#[derive(Clone, Copy)]
enum Place {
    /// Wherever the kernel likes.
    Anywhere,
    /// At this address, if nothing is there.
    Free(usize),
    /// At this address, whatever is there.
    Replacing(usize),
}

impl Place {
    /// Reads `shmat`'s address and flags with the rules of Linux's `do_shmat`.
    fn parse(address: usize, flags: c_int) -> Result<Place, Errno> {
        let (round, remap) = (flags & libc::SHM_RND != 0, flags & libc::SHM_REMAP != 0);
        if address == 0 {
            return if remap {
                Err(Errno::EINVAL)
            } else {
                Ok(Place::Anywhere)
            };
        }
        let offset = address % PAGE_SIZE;
        if offset != 0 && (!round || (remap && address == offset)) {
            return Err(Errno::EINVAL);
        }
        let address = address - offset;
        Ok(if remap {
            Place::Replacing(address)
        } else {
            Place::Free(address)
        })
    }
}

/// A segment in memory.
struct Mapping {
    address: usize,
    length: usize,
}

impl Mapping {
    fn make(
        place: Place,
        attachment: &Attachment,
        memory: &OwnedFd,
        flags: c_int,
    ) -> Result<Mapping, Errno> {
        let length = usize::try_from(attachment.size)
            .ok()
            .and_then(|size| size.checked_next_multiple_of(PAGE_SIZE))
            .ok_or(Errno::ENOMEM)?;
        let (wanted, how) = match place {
            Place::Anywhere => (0, 0),
            Place::Free(address) => (address, libc::MAP_FIXED_NOREPLACE),
            Place::Replacing(address) => (address, libc::MAP_FIXED),
        };
        if wanted.checked_add(length).is_none() {
            return Err(Errno::EINVAL);
        }
        let protection = if attachment.tracked {
            libc::PROT_NONE
        } else {
            protection(flags)
        };
        let flags = libc::MAP_SHARED | how;
        // SAFETY: replaces a mapping only where the program asked for it by SHM_REMAP.
        let mapped = unsafe { sys::mmap(wanted, length, protection, flags, memory.as_raw_fd(), 0) };
        let address = mapped.map_err(|errno| match errno {
            Errno::EEXIST => Errno::EINVAL,
            errno => errno,
        })?;
        // Coherence is by single pages. A kernel without huge pages refuses, and needs no telling.
        // SAFETY: advice on the mapping just made.
        unsafe { libc::madvise(address as *mut c_void, length, libc::MADV_NOHUGEPAGE) };
        Ok(Mapping { address, length })
    }

    fn protect(&self, protection: c_int) -> Result<(), Errno> {
        // SAFETY: the mapping is the segment's.
        unsafe { sys::mprotect(self.address, self.length, protection, None) }
    }

    fn unmap(&self) {
        // SAFETY: the mapping is the segment's, which the program has asked to detach or has not
        // been given yet.
        let _ = unsafe { sys::munmap(self.address, self.length) };
    }
}

fn protection(flags: c_int) -> c_int {
    let write = if flags & libc::SHM_RDONLY == 0 {
        libc::PROT_WRITE
    } else {
        0
    };
    let execute = if flags & libc::SHM_EXEC == 0 {
        0
    } else {
        libc::PROT_EXEC
    };
    libc::PROT_READ | write | execute
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_rules_of_the_kernel() {
        assert!(matches!(Place::parse(0, 0), Ok(Place::Anywhere)));
        assert!(matches!(
            Place::parse(0, libc::SHM_REMAP),
            Err(Errno::EINVAL)
        ));
        assert!(matches!(Place::parse(0x5001, 0), Err(Errno::EINVAL)));
        assert!(matches!(Place::parse(0x5000, 0), Ok(Place::Free(0x5000))));
        assert!(matches!(
            Place::parse(0x5fff, libc::SHM_RND),
            Ok(Place::Free(0x5000))
        ));
        assert!(matches!(
            Place::parse(0x5fff, libc::SHM_RND | libc::SHM_REMAP),
            Ok(Place::Replacing(0x5000))
        ));
        assert!(matches!(
            Place::parse(0xfff, libc::SHM_RND | libc::SHM_REMAP),
            Err(Errno::EINVAL)
        ));
    }
}
