//! Connections kept for the next call.
//!
//! A slot is free, or claimed by one call; a claim is one compare-and-swap, so that calls from
//! any number of threads and from signal handlers never wait for each other. A call that finds
//! all slots claimed gets a connection of its own, which ends with it. A call that never returns
//! (a handler left it by `longjmp`) keeps its slot; the others go on.
//!
//! The claims are in wiped memory (see `process`): in a fork child every slot is `VOID`,
//! whatever the parent's threads were doing. The descriptors are in ordinary memory, so that the
//! child can find and close its copies of the parent's. They are written only under a claim, and
//! trusted only as far as `fstat` confirms them.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::connection::{Connection, User};
use crate::process::Wiped;

/// Calls that can be in progress without connections of their own.
pub const SLOTS_COUNT: usize = 64;

/// A slot's claim: no call has it, and it has no connection of this process.
const VOID: u32 = 0;
/// A call has it.
const CLAIMED: u32 = 1;
/// No call has it, and its connection is ready.
const IDLE: u32 = 2;

/// A connection at rest; see [`Connection`] for the fields.
struct Slot {
    fd: AtomicI32,
    device: AtomicU64,
    inode: AtomicU64,
    uid: AtomicU32,
    gid: AtomicU32,
    real_uid: AtomicU32,
    real_gid: AtomicU32,
    track: AtomicBool,
}

const NO_FD: RawFd = -1;

static SLOTS: [Slot; SLOTS_COUNT] = [const {
    Slot {
        fd: AtomicI32::new(NO_FD),
        device: AtomicU64::new(0),
        inode: AtomicU64::new(0),
        uid: AtomicU32::new(0),
        gid: AtomicU32::new(0),
        real_uid: AtomicU32::new(0),
        real_gid: AtomicU32::new(0),
        track: AtomicBool::new(false),
    }
}; SLOTS_COUNT];

/// The right to use one slot.
#[derive(Clone, Copy)]
pub struct Claim(usize);

/// Claims a slot, one with a connection if there is any; `None` if all are taken.
pub fn claim(own: &Wiped) -> Option<(Claim, Option<Connection>)> {
    let take = |from| {
        let take_one = |claim: &AtomicU32| {
            claim.load(Ordering::Relaxed) == from
                && claim
                    .compare_exchange(from, CLAIMED, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
        };
        own.claims.iter().position(take_one)
    };
    if let Some(index) = take(IDLE) {
        return Some((Claim(index), SLOTS[index].load()));
    }
    let index = take(VOID)?;
    SLOTS[index].close_inherited();
    Some((Claim(index), None))
}

/// Notes the slot's connection, so that a fork child can find it.
pub fn note(Claim(index): Claim, connection: Option<Connection>) {
    SLOTS[index].store(connection);
}

/// Whether the slot is still claimed. It is not in a child that was forked meanwhile.
pub fn is_claimed(own: &Wiped, Claim(index): Claim) -> bool {
    own.claims[index].load(Ordering::Relaxed) == CLAIMED
}

/// Gives a slot back, with the connection last noted.
pub fn release(own: &Wiped, Claim(index): Claim) {
    let claim = if SLOTS[index].load().is_some() {
        IDLE
    } else {
        VOID
    };
    own.claims[index].store(claim, Ordering::Release);
}

/// Closes this process's copies of its parent's connections.
pub fn sweep(own: &Wiped) {
    for (slot, claim) in SLOTS.iter().zip(&own.claims) {
        if claim
            .compare_exchange(VOID, CLAIMED, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
        {
            slot.close_inherited();
            claim.store(VOID, Ordering::Release);
        }
    }
}

impl Slot {
    fn load(&self) -> Option<Connection> {
        let fd = self.fd.load(Ordering::Relaxed);
        (fd != NO_FD).then(|| Connection {
            fd,
            identity: (
                self.device.load(Ordering::Relaxed),
                self.inode.load(Ordering::Relaxed),
            ),
            user: User {
                effective: (
                    self.uid.load(Ordering::Relaxed),
                    self.gid.load(Ordering::Relaxed),
                ),
                real: (
                    self.real_uid.load(Ordering::Relaxed),
                    self.real_gid.load(Ordering::Relaxed),
                ),
            },
            track: self.track.load(Ordering::Relaxed),
        })
    }

    /// A fork may copy the slot in the midst of this: then the child finds no descriptor, or one
    /// whose identity does not match, and leaves it alone.
    fn store(&self, connection: Option<Connection>) {
        self.fd.store(NO_FD, Ordering::Release);
        let Some(connection) = connection else {
            return;
        };
        self.device.store(connection.identity.0, Ordering::Relaxed);
        self.inode.store(connection.identity.1, Ordering::Relaxed);
        let User { effective, real } = connection.user;
        self.uid.store(effective.0, Ordering::Relaxed);
        self.gid.store(effective.1, Ordering::Relaxed);
        self.real_uid.store(real.0, Ordering::Relaxed);
        self.real_gid.store(real.1, Ordering::Relaxed);
        self.track.store(connection.track, Ordering::Relaxed);
        self.fd.store(connection.fd, Ordering::Release);
    }

    /// Called under a claim of a slot without a connection of this process.
    fn close_inherited(&self) {
        if let Some(connection) = self.load() {
            connection.abandon();
            self.store(None);
        }
    }
}
