//! Semaphore sets that are delegated to this node, in memory that its processes operate on.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use migshm_protocol::ProcessId;
use migshm_protocol::control::{Debt, SetState};
use migshm_semaphores::{Account, Layout, SEATS, Set, State};
use rustc_hash::FxHashMap;

use crate::handover::descriptor;
use crate::memory::sealed;

/// Sets with memory at once; each takes a descriptor.
const SETS_MAX: usize = 1024;

/// The sets that have ever been delegated to this node and still exist.
#[derive(Default, Serialize, Deserialize)]
pub struct Sets {
    sets: FxHashMap<i32, Shared>,
    /// Until when processes may operate, in milliseconds of `CLOCK_BOOTTIME`.
    lease: u64,
}

/// A set's memory, and who uses it.
#[derive(Serialize, Deserialize)]
struct Shared {
    memory: SharedMemory,
    /// Number of the delegation, while there is one.
    number: Option<u64>,
    /// Who may have the memory; see [`migshm_protocol::control::FromCoordinator::Delegated`].
    access: u64,
    seats: Vec<Option<(ProcessId, i32)>>,
    /// What processes of this node owed when the set was delegated.
    debts: Vec<Debt>,
}

impl Sets {
    /// Takes over a set. What `state` owes is noted, so that nobody comes to owe too much.
    ///
    /// # Errors
    /// Those of making memory, if there was none yet; the set is not taken over then.
    pub fn open(&mut self, id: i32, number: u64, access: u64, state: &SetState) -> io::Result<()> {
        if self.sets.get(&id).is_some_and(|set| set.access != access) {
            self.remove(id);
        }
        if !self.sets.contains_key(&id) {
            if self.sets.len() >= SETS_MAX {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            let layout = Layout::of(state.values.len()).ok_or(io::ErrorKind::InvalidInput)?;
            let shared = Shared {
                memory: SharedMemory::new(layout)?,
                number: None,
                access,
                seats: vec![None; SEATS],
                debts: Vec::new(),
            };
            self.sets.insert(id, shared);
        }
        let shared = self.sets.get_mut(&id).expect("it is there now");
        shared.number = Some(number);
        shared.debts = state.debts.clone();
        for seat in 0..SEATS {
            shared.note_debts(seat);
        }
        let mut owing = vec![0; state.values.len()];
        for debt in state.debts.iter().filter(|debt| debt.owed != 0) {
            if let Some(owing) = owing.get_mut(usize::from(debt.num)) {
                *owing += 1;
            }
        }
        let set = shared.memory.set();
        set.lease(self.lease);
        set.open(&State {
            values: state.values.clone(),
            pids: state.pids.clone(),
            otime: state.otime,
            owing,
        });
        Ok(())
    }

    /// A set's memory for a process, its layout, and the process's seat in it.
    pub fn share(
        &mut self,
        id: i32,
        process: ProcessId,
        pid: i32,
    ) -> Option<(&File, Layout, Option<usize>)> {
        let shared = self.sets.get_mut(&id)?;
        let taken = shared
            .seats
            .iter()
            .position(|seat| seat.is_some_and(|(p, _)| p == process));
        if let Some(seat) = taken {
            shared.memory.set().complete(seat);
        }
        let seat = taken.or_else(|| {
            let free = shared.seats.iter().position(Option::is_none)?;
            shared.seats[free] = Some((process, pid));
            shared.memory.set().seat(free, pid);
            shared.note_debts(free);
            Some(free)
        });
        Some((&shared.memory.file, shared.memory.layout, seat))
    }

    /// Takes a set from the processes, if it is delegated; gives the number of the delegation and
    /// the set's state, for [`migshm_protocol::control::ToCoordinator::Returned`].
    pub fn close(&mut self, id: i32) -> Option<(u64, SetState)> {
        let shared = self.sets.get_mut(&id)?;
        let number = shared.number.take()?;
        let (state, accounts) = shared.memory.set().close();
        let debts = accounts
            .iter()
            .flat_map(|account| shared.debts_of(account))
            .collect();
        let state = SetState {
            values: state.values,
            pids: state.pids,
            otime: state.otime,
            debts,
        };
        Some((number, state))
    }

    /// The number of a set's delegation.
    #[must_use]
    pub fn number(&self, id: i32) -> Option<u64> {
        self.sets.get(&id)?.number
    }

    /// Delegated sets.
    #[must_use]
    pub fn delegated(&self) -> Vec<i32> {
        let delegated = self.sets.iter().filter(|(_, set)| set.number.is_some());
        delegated.map(|(id, _)| *id).collect()
    }

    /// Delegated sets to which a process may have come to owe something.
    #[must_use]
    pub fn owed_by(&self, process: ProcessId) -> Vec<i32> {
        let owes = |shared: &Shared| {
            shared.number.is_some()
                && (0..SEATS).any(|seat| {
                    shared.seats[seat].is_some_and(|(p, _)| p == process)
                        && shared.memory.set().is_used(seat)
                })
        };
        let owed = self.sets.iter().filter(|(_, shared)| owes(shared));
        owed.map(|(id, _)| *id).collect()
    }

    /// Frees the seats of a process that has ended and owes nothing to a set that is delegated.
    pub fn leave(&mut self, process: ProcessId) {
        for shared in self.sets.values_mut() {
            for seat in &mut shared.seats {
                seat.take_if(|(p, _)| *p == process);
            }
        }
    }

    /// Forgets a set that is gone, or whose memory others may no longer have.
    pub fn remove(&mut self, id: i32) {
        if let Some(shared) = self.sets.remove(&id) {
            let set = shared.memory.set();
            set.close();
            set.retire();
        }
    }

    /// Extends the time for which processes may operate, to milliseconds of `CLOCK_BOOTTIME`.
    pub fn extend(&mut self, until: u64) {
        self.lease = self.lease.max(until);
        for shared in self.sets.values() {
            shared.memory.set().lease(self.lease);
        }
    }
}

impl Shared {
    fn note_debts(&self, seat: usize) {
        let set = self.memory.set();
        let Some((process, _)) = self.seats[seat] else {
            return;
        };
        for num in 0..self.memory.layout.semaphores() {
            set.set_old_debt(seat, num, 0);
        }
        for debt in self.debts.iter().filter(|debt| debt.process == process) {
            set.set_old_debt(seat, debt.num.into(), debt.owed);
        }
    }

    fn debts_of(&self, account: &Account) -> Vec<Debt> {
        let Some((process, pid)) = self.seats[account.seat] else {
            return Vec::new();
        };
        let debt = |num, owed| Debt {
            process,
            pid,
            num,
            owed,
        };
        let mut debts = vec![debt(0, 0)];
        let owed = (0u16..).zip(&account.owed).filter(|(_, owed)| **owed != 0);
        debts.extend(owed.map(|(num, &owed)| debt(num, owed)));
        debts
    }
}

/// Memory of a set, mapped here.
struct SharedMemory {
    file: File,
    layout: Layout,
    words: NonNull<AtomicU64>,
}

impl SharedMemory {
    fn new(layout: Layout) -> io::Result<SharedMemory> {
        let length = layout.words() * size_of::<AtomicU64>();
        let file = sealed(c"semaphores of migshm", length as u64)?;
        SharedMemory::map(file, layout)
    }

    fn map(file: File, layout: Layout) -> io::Result<SharedMemory> {
        let length = layout.words() * size_of::<AtomicU64>();
        // SAFETY: a new mapping of a file that is that long and cannot shrink.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(address.cast()).expect("mmap gives no null");
        Ok(SharedMemory {
            file,
            layout,
            words,
        })
    }

    fn set(&self) -> Set<'_> {
        // SAFETY: the mapping is that long, page-aligned, and lives as long as `self`; all who have
        // it access it atomically, or are free to spoil it.
        let words = unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.layout.words()) };
        Set::new(words, self.layout).expect("as long as the layout says")
    }
}

/// A set's memory on its way to the next daemon.
#[derive(Serialize)]
struct Leaving<'a> {
    #[serde(with = "descriptor")]
    file: &'a File,
    semaphores: usize,
}

/// It, as it comes.
#[derive(Deserialize)]
struct Coming {
    #[serde(with = "descriptor")]
    file: File,
    semaphores: usize,
}

impl Serialize for SharedMemory {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let semaphores = self.layout.semaphores();
        let file = &self.file;
        Leaving { file, semaphores }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SharedMemory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Coming { file, semaphores } = Coming::deserialize(deserializer)?;
        let layout =
            Layout::of(semaphores).ok_or_else(|| D::Error::custom("too many semaphores"))?;
        SharedMemory::map(file, layout).map_err(D::Error::custom)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let length = self.layout.words() * size_of::<AtomicU64>();
        // SAFETY: the mapping is ours, and no reference into it is left.
        unsafe { libc::munmap(self.words.as_ptr().cast(), length) };
    }
}
