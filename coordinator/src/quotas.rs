//! What one user may have of the cluster's objects.
//!
//! The limits of System V IPC are for all users together, so that on one machine each user can take
//! everything. Here nobody may have more than a part, unless he may exceed limits (user 0,
//! `CAP_SYS_RESOURCE`): a call that would exceed it gets ENOSPC, as if the cluster's limit were
//! reached.
//!
//! Who creates an object pays for it until it is gone, whoever becomes its owner by `IPC_SET`:
//! nobody can make others pay, and who pays can remove it. A segment that is removed goes with its
//! last attach, and counts until then. What a message queue holds counts by the queue: nobody but
//! who may exceed limits makes one that holds more than `MSGMNB`.

use migshm_protocol::call::{Caller, Errno};
use migshm_protocol::limits::{MSGMNI, SEMMNI, SHMMNI};
use serde::{Deserialize, Serialize};

use crate::perm;

/// The most that one user may have of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quotas {
    /// Segments.
    pub segments: u64,
    /// Bytes of all segments, each in whole pages; `None` stands for half of the memory that the
    /// members give.
    pub bytes: Option<u64>,
    /// Semaphore sets.
    pub sets: u64,
    /// Semaphores of all sets.
    pub semaphores: u64,
    /// Message queues.
    pub queues: u64,
}

impl Quotas {
    /// As much as there is.
    pub const NONE: Quotas = Quotas {
        segments: u64::MAX,
        bytes: Some(u64::MAX),
        sets: u64::MAX,
        semaphores: u64::MAX,
        queues: u64::MAX,
    };
}

impl Default for Quotas {
    /// Half of what there can be; less where that would be too much for the coordinator's memory: a
    /// semaphore takes tens of bytes of it, a queue full of empty messages a megabyte.
    fn default() -> Quotas {
        Quotas {
            segments: SHMMNI / 2,
            bytes: None,
            sets: u64::from(SEMMNI.unsigned_abs()) / 2,
            semaphores: 1 << 20,
            queues: u64::from(MSGMNI.unsigned_abs()) / 8,
        }
    }
}

/// So many objects of one kind, and what they hold together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Amount {
    pub(crate) objects: u64,
    /// In bytes, or semaphores, as the kind of object has it.
    pub(crate) contents: u64,
}

impl Amount {
    pub(crate) fn plus(self, other: Amount) -> Amount {
        Amount {
            objects: self.objects.saturating_add(other.objects),
            contents: self.contents.saturating_add(other.contents),
        }
    }

    pub(crate) fn minus(self, other: Amount) -> Amount {
        Amount {
            objects: self.objects.saturating_sub(other.objects),
            contents: self.contents.saturating_sub(other.contents),
        }
    }

    /// ENOSPC if it is more than a quota, unless the caller may exceed that.
    pub(crate) fn check(self, quota: Amount, caller: &Caller) -> Result<(), Errno> {
        let within = self.objects <= quota.objects && self.contents <= quota.contents;
        // The kernel would know user 0 by his capabilities, which come with a second call only.
        if within || caller.uid == 0 || perm::check_resource(caller).is_ok() {
            Ok(())
        } else {
            Err(Errno::ENOSPC)
        }
    }
}
