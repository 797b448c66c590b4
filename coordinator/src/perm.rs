//! Who may do what with an object: `ipcperms()` and its kin.
//!
//! The mode's three digits are for the owner or creator, for their groups, and for the others;
//! the first class that a caller belongs to decides, even where a later one would allow more.

use migshm_protocol::call::{Caller, Errno, NewPerm, Perm};

/// Read permission, in all three digits, as the checks take it.
pub(crate) const READ: u32 = 0o444;
/// Write (alter) permission.
pub(crate) const WRITE: u32 = 0o222;
/// Execute permission, for `SHM_EXEC`.
pub(crate) const EXECUTE: u32 = 0o111;

/// The bits of a mode that `IPC_SET` changes.
const MODE: u32 = 0o777;

const CAP_IPC_LOCK: u32 = 14;
const CAP_IPC_OWNER: u32 = 15;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// The caller's own, with the mode of `flags`.
pub(crate) fn new(key: i32, seq: u16, flags: u32, caller: &Caller) -> Perm {
    let (uid, gid) = (caller.uid, caller.gid);
    Perm {
        key,
        uid,
        gid,
        cuid: uid,
        cgid: gid,
        mode: flags & MODE,
        seq,
    }
}

/// EACCES unless the caller has every permission that `wanted` names in any of its digits.
pub(crate) fn check(perm: &Perm, caller: &Caller, wanted: u32) -> Result<(), Errno> {
    let wanted = wanted >> 6 | wanted >> 3 | wanted;
    let granted = if is_owner(perm, caller) {
        perm.mode >> 6
    } else if in_group(caller, perm.cgid) || in_group(caller, perm.gid) {
        perm.mode >> 3
    } else {
        perm.mode
    };
    if wanted & !granted & 0o7 == 0 || capable(caller, CAP_IPC_OWNER) {
        Ok(())
    } else {
        Err(Errno::EACCES)
    }
}

/// EPERM unless the caller may remove the object and change its owner and mode.
pub(crate) fn check_control(perm: &Perm, caller: &Caller) -> Result<(), Errno> {
    if is_owner(perm, caller) || capable(caller, CAP_SYS_ADMIN) {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

/// EPERM unless the caller may unlock the object.
pub(crate) fn check_unlock(perm: &Perm, caller: &Caller) -> Result<(), Errno> {
    if may_lock(caller) || is_owner(perm, caller) {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

/// EPERM unless the caller may lock the object into memory; how much is left to check.
pub(crate) fn check_lock(perm: &Perm, caller: &Caller, limit: u64) -> Result<(), Errno> {
    if may_lock(caller) || (is_owner(perm, caller) && limit > 0) {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

/// Whether the caller may lock memory without limit.
pub(crate) fn may_lock(caller: &Caller) -> bool {
    capable(caller, CAP_IPC_LOCK)
}

/// EPERM unless the caller may have huge pages: of group 0, `vm.hugetlb_shm_group`'s default.
pub(crate) fn check_huge(caller: &Caller) -> Result<(), Errno> {
    if may_lock(caller) || in_group(caller, 0) {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

/// EPERM unless the caller may exceed what everybody may have.
pub(crate) fn check_resource(caller: &Caller) -> Result<(), Errno> {
    if capable(caller, CAP_SYS_RESOURCE) {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

/// `IPC_SET`: EINVAL for the user or group -1, which means "none".
pub(crate) fn update(perm: &mut Perm, new: NewPerm) -> Result<(), Errno> {
    if new.uid == u32::MAX || new.gid == u32::MAX {
        return Err(Errno::EINVAL);
    }
    perm.uid = new.uid;
    perm.gid = new.gid;
    perm.mode = perm.mode & !MODE | new.mode & MODE;
    Ok(())
}

fn is_owner(perm: &Perm, caller: &Caller) -> bool {
    caller.uid == perm.cuid || caller.uid == perm.uid
}

fn in_group(caller: &Caller, gid: u32) -> bool {
    caller.gid == gid || caller.groups.contains(&gid)
}

fn capable(caller: &Caller, capability: u32) -> bool {
    caller.capabilities & 1 << capability != 0
}
