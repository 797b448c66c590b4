//! `/proc/sysvipc/*`, and the limits in `/proc/sys/kernel`: what `ipcs` and `lsipc` read.
//!
//! Their text is made from the calls that programs can make too (`SHM_STAT_ANY`, `IPC_INFO` and
//! kin), in the format of Linux's `ipc/util.c` and its kin, so that all ways of asking agree.

use std::ffi::{CStr, c_char, c_int};
use std::fmt::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use migshm_protocol::call::{
    Answer, Call, Errno, MsgCommand, MsgLimits, MsgStatus, Perm, SemCommand, SemLimits, SemStatus,
    ShmCommand, ShmLimits, ShmStatus, StatBy,
};

use crate::client::{Session, out_of_step};
use crate::connection::Raw;
use crate::kernel::kernel;
use crate::sys;
use crate::text::Text;

/// A file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// The table of segments.
    Segments,
    /// The table of semaphore sets.
    Sets,
    /// The table of message queues.
    Queues,
    Shmmax,
    Shmall,
    Shmmni,
    /// Whether segments go with their last attach.
    RmidForced,
    /// The id that the next object shall have.
    NextId,
    /// Four limits of semaphores.
    Sem,
    Msgmax,
    Msgmnb,
    Msgmni,
}

const FILES: [(&[u8], File); 14] = [
    (b"/proc/sysvipc/shm", File::Segments),
    (b"/proc/sysvipc/sem", File::Sets),
    (b"/proc/sysvipc/msg", File::Queues),
    (b"/proc/sys/kernel/shmmax", File::Shmmax),
    (b"/proc/sys/kernel/shmall", File::Shmall),
    (b"/proc/sys/kernel/shmmni", File::Shmmni),
    (b"/proc/sys/kernel/shm_rmid_forced", File::RmidForced),
    (b"/proc/sys/kernel/shm_next_id", File::NextId),
    (b"/proc/sys/kernel/sem_next_id", File::NextId),
    (b"/proc/sys/kernel/msg_next_id", File::NextId),
    (b"/proc/sys/kernel/sem", File::Sem),
    (b"/proc/sys/kernel/msgmax", File::Msgmax),
    (b"/proc/sys/kernel/msgmnb", File::Msgmnb),
    (b"/proc/sys/kernel/msgmni", File::Msgmni),
];

/// The file that a path names, below an open directory, or the current one for `AT_FDCWD`, if it
/// is relative. Symbolic links to it are not seen through.
///
/// # Safety
/// The path is null or a C string.
pub unsafe fn find(directory: c_int, path: *const c_char) -> Option<File> {
    const PREFIX: &[u8] = b"/proc/sys";
    if path.is_null() {
        return None;
    }
    // SAFETY: by the caller; the comparison ends at the first byte that differs, so at the
    // string's end at the latest.
    let starts = |prefix: &[u8]| unsafe {
        let same = |(index, byte): (usize, &u8)| *path.cast::<u8>().add(index) == *byte;
        prefix.iter().enumerate().all(same)
    };
    let absolute = starts(b"/");
    if absolute && !starts(PREFIX) {
        return None;
    }
    // SAFETY: by the caller.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    if absolute {
        return named(path);
    }
    let last = path.rsplit(|&byte| byte == b'/').next()?;
    let is_named = |file: &[u8]| file.rsplit(|&byte| byte == b'/').next() == Some(last);
    // All of them do; most other files are told from them by that alone.
    if !matches!(last, [b's' | b'm', ..]) || !FILES.iter().any(|(file, _)| is_named(file)) {
        return None;
    }
    let whole = path_of(directory)?.with(b"/").with(path);
    named(whole.as_bytes()).filter(|_| !whole.is_truncated())
}

/// The path of a directory below `/proc`, and room for more.
fn path_of(directory: c_int) -> Option<Text<{ 4 * PATH }>> {
    let mut link = Text::<PATH>::new();
    let written = match directory {
        libc::AT_FDCWD => link.write_str("/proc/self/cwd"),
        directory => write!(link, "/proc/self/fd/{directory}"),
    };
    written.ok()?;
    let mut path = [0_u8; PATH];
    let name = link.as_c_str().as_ptr();
    // SAFETY: a C string, and a buffer of the length given.
    let length = unsafe { kernel!(SYS_readlink, name, path.as_mut_ptr(), path.len()) };
    let path = path.get(..length.ok()?)?;
    (path.len() < PATH && path.starts_with(b"/proc")).then(|| Text::new().with(path))
}

/// The file with this absolute path, in which `.`, `..` and repeated slashes may be.
fn named(path: &[u8]) -> Option<File> {
    let mut plain = [0_u8; PATH];
    let mut length = 0;
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                let kept = plain[..length].iter().rposition(|&byte| byte == b'/');
                length = kept.unwrap_or(0);
            }
            name => {
                let room = plain.get_mut(length..length + 1 + name.len())?;
                room[0] = b'/';
                room[1..].copy_from_slice(name);
                length += 1 + name.len();
            }
        }
    }
    let found = FILES.iter().find(|(file, _)| *file == &plain[..length]);
    found.map(|(_, file)| *file)
}

impl File {
    /// Its text as it is now, in a memfd.
    ///
    /// # Errors
    /// Those of a call to the daemon, and of `memfd_create(2)` and `write(2)`.
    pub fn make(self) -> Result<OwnedFd, Errno> {
        let mut session = Session::begin()?;
        let name = c"migshm-proc".as_ptr();
        // SAFETY: a C string.
        let memory = sys::own(unsafe { kernel!(SYS_memfd_create, name, libc::MFD_CLOEXEC) })?;
        // Out of the way of the descriptor that the program is to get: the lowest that is free.
        let out = Out(sys::move_high(memory));
        match self {
            File::Segments => out.segments(&mut session)?,
            File::Sets => out.sets(&mut session)?,
            File::Queues => out.queues(&mut session)?,
            File::Shmmax => out.line(format_args!("{}", shm_limits(&mut session)?.shmmax))?,
            File::Shmall => out.line(format_args!("{}", shm_limits(&mut session)?.shmall))?,
            File::Shmmni => out.line(format_args!("{}", shm_limits(&mut session)?.shmmni))?,
            File::Msgmax => out.line(format_args!("{}", msg_limits(&mut session)?.msgmax))?,
            File::Msgmnb => out.line(format_args!("{}", msg_limits(&mut session)?.msgmnb))?,
            File::Msgmni => out.line(format_args!("{}", msg_limits(&mut session)?.msgmni))?,
            File::RmidForced => out.line(format_args!("0"))?,
            File::NextId => out.line(format_args!("-1"))?,
            File::Sem => {
                let limits = sem(&mut session, 0, SemCommand::Limits)?;
                let Answer::SemLimits(SemLimits {
                    semmsl,
                    semmns,
                    semopm,
                    semmni,
                    ..
                }) = limits
                else {
                    return Err(out_of_step());
                };
                out.line(format_args!("{semmsl}\t{semmns}\t{semopm}\t{semmni}"))?;
            }
        }
        Ok(out.0)
    }
}

/// The file while it is written.
struct Out(OwnedFd);

impl Out {
    fn line(&self, text: fmt::Arguments<'_>) -> Result<(), Errno> {
        let mut line = Text::<LINE>::new();
        // The longest line of a table has 236 bytes.
        let _ = line.write_fmt(text);
        line.push(b"\n");
        let bytes = line.as_bytes();
        // SAFETY: a valid buffer of that length.
        let written =
            unsafe { kernel!(SYS_write, self.0.as_raw_fd(), bytes.as_ptr(), bytes.len()) };
        // Nothing but lack of memory cuts a write to a memfd short.
        match written? {
            length if length == bytes.len() => Ok(()),
            _ => Err(Errno::ENOMEM),
        }
    }

    fn segments(&self, session: &mut Session) -> Result<(), Errno> {
        self.line(format_args!("{SHM_HEADING}"))?;
        let highest = match shm(session, 0, ShmCommand::Usage)? {
            Answer::ShmUsage(usage) => usage.highest,
            _ => return Err(out_of_step()),
        };
        for index in 0..=highest {
            match shm(session, index, ShmCommand::Stat(StatBy::Any)) {
                Ok(Answer::Segment(status)) => self.segment(status)?,
                Ok(_) => return Err(out_of_step()),
                // No segment has this index.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn segment(&self, status: ShmStatus) -> Result<(), Errno> {
        let ShmStatus {
            id,
            perm,
            consistency: _,
            size,
            atime,
            dtime,
            ctime,
            cpid,
            lpid,
            nattch,
        } = status;
        let Perm {
            key,
            uid,
            gid,
            cuid,
            cgid,
            mode,
            seq: _,
        } = perm;
        // As in SHM_INFO, what is resident and what is swapped is not told.
        let (rss, swap) = (0, 0);
        self.line(format_args!(
            "{key:>10} {id:>10}  {mode:>4o} {size:>21} {cpid:>5} {lpid:>5}  {nattch:>5} {uid:>5} {gid:>5} {cuid:>5} {cgid:>5} {atime:>10} {dtime:>10} {ctime:>10} {rss:>21} {swap:>21}"
        ))
    }

    fn sets(&self, session: &mut Session) -> Result<(), Errno> {
        self.line(format_args!("{SEM_HEADING}"))?;
        let highest = match sem(session, 0, SemCommand::Usage)? {
            Answer::SemLimits(limits) => limits.highest,
            _ => return Err(out_of_step()),
        };
        for index in 0..=highest {
            match sem(session, index, SemCommand::Stat(StatBy::Any)) {
                Ok(Answer::Set(status)) => self.set(status)?,
                Ok(_) => return Err(out_of_step()),
                // No set has this index.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn set(&self, status: SemStatus) -> Result<(), Errno> {
        let SemStatus {
            id,
            perm,
            otime,
            ctime,
            nsems,
        } = status;
        let Perm {
            key,
            uid,
            gid,
            cuid,
            cgid,
            mode,
            seq: _,
        } = perm;
        self.line(format_args!(
            "{key:>10} {id:>10}  {mode:>4o} {nsems:>10} {uid:>5} {gid:>5} {cuid:>5} {cgid:>5} {otime:>10} {ctime:>10}"
        ))
    }

    fn queues(&self, session: &mut Session) -> Result<(), Errno> {
        self.line(format_args!("{MSG_HEADING}"))?;
        let highest = match msg(session, 0, MsgCommand::Usage)? {
            Answer::MsgLimits(limits) => limits.highest,
            _ => return Err(out_of_step()),
        };
        for index in 0..=highest {
            match msg(session, index, MsgCommand::Stat(StatBy::Any)) {
                Ok(Answer::Queue(status)) => self.queue(status)?,
                Ok(_) => return Err(out_of_step()),
                // No queue has this index.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn queue(&self, status: MsgStatus) -> Result<(), Errno> {
        let MsgStatus {
            id,
            perm,
            stime,
            rtime,
            ctime,
            cbytes,
            qnum,
            qbytes: _,
            lspid,
            lrpid,
        } = status;
        let Perm {
            key,
            uid,
            gid,
            cuid,
            cgid,
            mode,
            seq: _,
        } = perm;
        self.line(format_args!(
            "{key:>10} {id:>10}  {mode:>4o}  {cbytes:>10} {qnum:>10} {lspid:>5} {lrpid:>5} {uid:>5} {gid:>5} {cuid:>5} {cgid:>5} {stime:>10} {rtime:>10} {ctime:>10}"
        ))
    }
}

fn shm(session: &mut Session, id: i32, command: ShmCommand) -> Result<Answer, Errno> {
    session.call(Call::ShmCtl { id, command }, Raw::NONE)
}

fn shm_limits(session: &mut Session) -> Result<ShmLimits, Errno> {
    match shm(session, 0, ShmCommand::Limits)? {
        Answer::ShmLimits(limits) => Ok(limits),
        _ => Err(out_of_step()),
    }
}

fn sem(session: &mut Session, id: i32, command: SemCommand) -> Result<Answer, Errno> {
    session.call(Call::SemCtl { id, command }, Raw::NONE)
}

fn msg(session: &mut Session, id: i32, command: MsgCommand) -> Result<Answer, Errno> {
    session.call(Call::MsgCtl { id, command }, Raw::NONE)
}

fn msg_limits(session: &mut Session) -> Result<MsgLimits, Errno> {
    match msg(session, 0, MsgCommand::Limits)? {
        Answer::MsgLimits(limits) => Ok(limits),
        _ => Err(out_of_step()),
    }
}

/// Bytes of a line, and a NUL.
const LINE: usize = 256;
/// Bytes of a path that is looked at; those of the files are shorter.
const PATH: usize = 64;

const SHM_HEADING: &str = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap";
const SEM_HEADING: &str =
    "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime";
const MSG_HEADING: &str = "       key      msqid perms      cbytes       qnum lspid lrpid   uid   gid  cuid  cgid      stime      rtime      ctime";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_begin_as_the_search_presumes() {
        for (path, _) in FILES {
            let name = path.rsplit(|&byte| byte == b'/').next().unwrap();
            assert!(matches!(name, [b's' | b'm', ..]) && path.len() < PATH);
        }
    }

    #[test]
    fn paths_name_files_in_any_spelling() {
        let found = |path: &CStr| {
            // SAFETY: a C string.
            unsafe { find(libc::AT_FDCWD, path.as_ptr()) }
        };
        for (path, file) in [
            (c"/proc/sysvipc/shm", File::Segments),
            (c"/proc/sysvipc//./sem", File::Sets),
            (c"/proc/sys/../sysvipc/sem", File::Sets),
            (c"/proc/sys/kernel/sem", File::Sem),
            (c"/proc/sys/kernel/../kernel/shmmni", File::Shmmni),
        ] {
            assert_eq!(found(path), Some(file), "{path:?}");
        }
        for path in [
            c"",
            c"/",
            c"/proc",
            c"/proc/sysvipc",
            c"/proc/sysvipc/",
            c"/proc/sysvipc/shmmax",
            c"/proc/sysvipc/shm/sem",
            c"/proc/sys/kernel/hostname",
            c"/proc/sys/kernel/shmmaxx",
            c"shm",
            c"../sem",
            c"/proc/sys/../../../sysvipc/shm",
            c"/proc/sys/a/very/long/path/that/is/longer/than/any/file/that/there/is/shm",
        ] {
            assert_eq!(found(path), None, "{path:?}");
        }
        // SAFETY: null is allowed.
        assert_eq!(unsafe { find(libc::AT_FDCWD, std::ptr::null()) }, None);
    }

    #[test]
    fn relative_paths_are_looked_up_where_they_start() {
        let open = |path: &CStr| {
            // SAFETY: a C string.
            sys::open(path, libc::O_PATH).unwrap()
        };
        let (proc, kernel) = (open(c"/proc"), open(c"/proc/sys/kernel"));
        let found = |directory: &OwnedFd, path: &CStr| {
            // SAFETY: a C string.
            unsafe { find(directory.as_raw_fd(), path.as_ptr()) }
        };
        assert_eq!(found(&proc, c"sysvipc/shm"), Some(File::Segments));
        assert_eq!(found(&proc, c"sys/kernel/sem"), Some(File::Sem));
        assert_eq!(found(&kernel, c"sem"), Some(File::Sem));
        assert_eq!(found(&kernel, c"../../sysvipc/sem"), Some(File::Sets));
        assert_eq!(found(&kernel, c"shm"), None);
        assert_eq!(found(&proc, c"shm"), None);
    }
}
