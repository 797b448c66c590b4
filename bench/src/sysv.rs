//! System V calls as libc has them, so that the same code runs on the kernel and under the
//! preload library.

use std::io;
use std::ptr;

use anyhow::{Context, Result, ensure};
use libc::{c_int, key_t, sembuf};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Words of a page.
pub const PAGE_WORDS: usize = PAGE / size_of::<u64>();

const MODE: c_int = 0o600;

/// An attached segment.
pub struct Segment {
    id: c_int,
    words: *mut u64,
    length: usize,
}

impl Segment {
    /// Finds or makes the segment with this key, of `pages` pages, and attaches it.
    ///
    /// # Errors
    /// Those of `shmget(2)` and `shmat(2)`.
    pub fn attach(key: key_t, pages: usize) -> Result<Segment> {
        // SAFETY: plain integers.
        let id = check(unsafe { libc::shmget(key, pages * PAGE, libc::IPC_CREAT | MODE) })
            .context("shmget")?;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let address = unsafe { libc::shmat(id, ptr::null(), 0) };
        ensure!(
            address as isize != -1,
            "shmat: {}",
            io::Error::last_os_error()
        );
        Ok(Segment {
            id,
            words: address.cast(),
            length: pages * PAGE_WORDS,
        })
    }

    /// A segment without a key, to be removed with its last attach.
    ///
    /// # Errors
    /// As [`Segment::attach`].
    pub fn private(pages: usize) -> Result<Segment> {
        let segment = Segment::attach(libc::IPC_PRIVATE, pages)?;
        segment.remove()?;
        Ok(segment)
    }

    /// Removes the segment once nobody has it attached.
    ///
    /// # Errors
    /// Those of `shmctl(2)`.
    pub fn remove(&self) -> Result<()> {
        // SAFETY: IPC_RMID takes no buffer.
        check(unsafe { libc::shmctl(self.id, libc::IPC_RMID, ptr::null_mut()) })
            .context("IPC_RMID")
            .map(drop)
    }

    /// How many words it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Reads one word, as often as the program says: other processes write it.
    ///
    /// # Panics
    /// Beyond the end.
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        assert!(index < self.length);
        // SAFETY: inside the mapping, which lives as long as `self`; any bits are a u64.
        unsafe { self.words.add(index).read_volatile() }
    }

    /// Writes one word.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn store(&self, index: usize, value: u64) {
        assert!(index < self.length);
        // SAFETY: as in `load`.
        unsafe { self.words.add(index).write_volatile(value) }
    }

    /// All words, for loops that the compiler may make fast.
    ///
    /// # Safety
    /// Nobody else writes while the slice lives.
    #[must_use]
    pub unsafe fn words(&mut self) -> &mut [u64] {
        // SAFETY: the whole mapping, which lives as long as `self`; the caller excludes others.
        unsafe { std::slice::from_raw_parts_mut(self.words, self.length) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the address came from shmat, and no reference into it outlives `self`.
        unsafe { libc::shmdt(self.words.cast()) };
    }
}

/// A semaphore set.
#[derive(Clone, Copy)]
pub struct Semaphores(c_int);

impl Semaphores {
    /// Finds or makes the set with this key; its semaphores are 0 at first.
    ///
    /// # Errors
    /// Those of `semget(2)`.
    pub fn open(key: key_t, count: c_int) -> Result<Semaphores> {
        // SAFETY: plain integers.
        let id = unsafe { libc::semget(key, count, libc::IPC_CREAT | MODE) };
        check(id).context("semget").map(Semaphores)
    }

    /// Adds to one semaphore, or waits until so much can be taken from it.
    ///
    /// # Errors
    /// Those of `semop(2)`.
    pub fn add(self, number: u16, amount: i16, flags: c_int) -> Result<()> {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the flags fit, as the structure says"
        )]
        let mut operation = sembuf {
            sem_num: number,
            sem_op: amount,
            sem_flg: flags as i16,
        };
        // SAFETY: one live operation.
        check(unsafe { libc::semop(self.0, &raw mut operation, 1) })
            .context("semop")
            .map(drop)
    }

    /// Removes the set.
    ///
    /// # Errors
    /// Those of `semctl(2)`.
    pub fn remove(self) -> Result<()> {
        // SAFETY: IPC_RMID takes no argument.
        check(unsafe { libc::semctl(self.0, 0, libc::IPC_RMID) })
            .context("IPC_RMID")
            .map(drop)
    }
}

/// This thread, and what it forks, stay on one core; dropped, it may go where it could before.
pub struct OneCore(libc::cpu_set_t);

impl OneCore {
    /// Stays on the first core that is allowed.
    ///
    /// # Errors
    /// Those of `sched_setaffinity(2)`.
    pub fn stay() -> Result<OneCore> {
        OneCore::stay_on(0)
    }

    /// Stays on an allowed core: that of this index among them, or the last.
    ///
    /// # Errors
    /// Those of `sched_setaffinity(2)`.
    pub fn stay_on(index: usize) -> Result<OneCore> {
        // SAFETY: plain data, for which zeros are valid.
        let mut before: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: a live set of that size; 0 is this thread.
        check(unsafe { libc::sched_getaffinity(0, size_of_val(&before), &raw mut before) })?;
        // SAFETY: a number within the set.
        let is_allowed = |core: &usize| unsafe { libc::CPU_ISSET(*core, &before) };
        let allowed = (0..libc::CPU_SETSIZE as usize).filter(is_allowed);
        let core = allowed
            .take(index + 1)
            .last()
            .context("no core is allowed")?;
        // SAFETY: plain data, and a number within the set.
        let only = unsafe {
            let mut only: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(core, &mut only);
            only
        };
        set_affinity(&only)?;
        Ok(OneCore(before))
    }
}

impl Drop for OneCore {
    fn drop(&mut self) {
        // It was allowed before.
        let _ = set_affinity(&self.0);
    }
}

fn set_affinity(cores: &libc::cpu_set_t) -> io::Result<c_int> {
    // SAFETY: a live set of that size; 0 is this thread.
    check(unsafe { libc::sched_setaffinity(0, size_of_val(cores), cores) })
}

/// Runs `child` in a forked process and waits for its end.
///
/// # Errors
/// `fork(2)` fails, or `child` does (it says why on standard error).
///
/// # Safety
/// This process has only one thread.
pub unsafe fn fork(child: impl FnOnce() -> Result<()>) -> Result<Child> {
    // SAFETY: as the caller says, so the child may go on as any program does.
    let pid = check(unsafe { libc::fork() }).context("fork")?;
    if pid == 0 {
        let status = match child() {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("forked child: {error:#}");
                1
            }
        };
        // SAFETY: ends this process; the parent's exit handlers are not for it.
        unsafe { libc::_exit(status) };
    }
    Ok(Child(pid))
}

/// A process made by [`fork`].
#[must_use]
pub struct Child(libc::pid_t);

impl Child {
    /// Waits for its end.
    ///
    /// # Errors
    /// It failed.
    pub fn wait(self) -> Result<()> {
        let mut status = 0;
        // SAFETY: a live out pointer.
        check(unsafe { libc::waitpid(self.0, &raw mut status, 0) }).context("waitpid")?;
        ensure!(status == 0, "a forked child failed with status {status}");
        Ok(())
    }
}

/// Turns -1 into the error that errno says.
///
/// # Errors
/// That one.
pub fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
