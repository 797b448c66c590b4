//! The calls on segments: `shmget`, `shmat`, `shmctl`, and the ends of attaches.
//!
//! Attaches are counted for each node, as a node that leaves takes its own with it. A removed
//! segment lives until its last attach has ended: without its key, but open to attaches by id.
//! Where its pages are is the business of [`crate::placement`].

use migshm_protocol::call::{
    Answer, Attachment, Caller, Consistency, Errno, Memlock, Outcome, ShmCommand, ShmLimits,
    ShmStatus, ShmUsage, StatBy,
};
use migshm_protocol::control::FromCoordinator;
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::limits::{SHMALL, SHMMAX, SHMMNI};
use migshm_protocol::release::{MAX_RUNS, Runs};
use migshm_protocol::{Extent, NodeId, SegmentId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Contents, Entry, Table};
use crate::members::Members;
use crate::notices::Notices;
use crate::placement::{Admission, Guarded, Pages, WaitingAttach};
use crate::processes::{Awaited, CallKey, Wake};
use crate::quotas::Amount;
use crate::{Context, Output, Request, perm};

/// Flag of `shmget`: do not count the size against memory.
const SHM_NORESERVE: i32 = 0o10000;
/// Flag of `shmget`: of huge pages, which a cluster never has.
const SHM_HUGETLB: i32 = 0o4000;
/// In the flags of `shmget`: the binary logarithm of a huge page's size, 0 for the default.
const SHM_HUGE_SHIFT: u32 = 26;
const SHM_HUGE_MASK: u32 = 0x3f;
/// The sizes of huge pages that there are on x86-64: 2 MiB and 1 GiB.
const HUGE_SIZES: [u32; 3] = [0, 21, 30];
/// Flag of `shmat`: attach for reading only.
const SHM_RDONLY: i32 = 0o10000;
/// Flag of `shmat`: attach for execution too.
const SHM_EXEC: i32 = 0o100_000;
/// In a mode: the segment goes with its last attach.
const SHM_DEST: u32 = 0o1000;
/// In a mode: the segment is locked into memory.
const SHM_LOCKED: u32 = 0o2000;

/// Smallest segment in bytes (`SHMMIN`).
const SHMMIN: u64 = 1;
/// Largest size that Linux accepts in practice: a segment is a file.
const MAX_FILE: u64 = i64::MAX as u64;
/// Largest segment that there are page numbers for: 16 TiB.
const MAX_SIZE: u64 = (1 << 32) * PAGE_SIZE as u64;

/// Bits of a [`SegmentId`] that hold the segment's id; those above count the segments created.
const ID_BITS: u32 = 31;

/// All segments.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Segments {
    table: Table<Segment>,
    /// Pages of all segments together; SHMMNI segments of the largest size are below SHMALL.
    pages: u64,
    created: u64,
    /// Pages that each real user has locked.
    locked: BTreeMap<u32, u64>,
    /// The ids of durable segments.
    durable: BTreeSet<i32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Segment {
    segment: SegmentId,
    size: u64,
    consistency: Consistency,
    atime: i64,
    dtime: i64,
    ctime: i64,
    cpid: i32,
    lpid: i32,
    /// `lpid` and `atime` before the last attach, should it come to nothing.
    before_attach: (i32, i64),
    /// The real user who has locked it, if anyone has.
    locked_by: Option<u32>,
    /// Of each node that has any.
    attaches: BTreeMap<NodeId, u64>,
    pages: Pages,
}

/// Its bytes, in whole pages.
impl Contents for Segment {
    fn contents(&self) -> u64 {
        whole_pages(self.size)
    }
}

impl Segments {
    pub(crate) fn new() -> Segments {
        Segments {
            table: Table::new(SHMMNI as usize),
            pages: 0,
            created: 0,
            locked: BTreeMap::new(),
            durable: BTreeSet::new(),
        }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.table.in_use() == 0
    }

    /// `shmget`; a segment that is made has this consistency.
    pub(crate) fn get(
        &mut self,
        request: &Request<'_>,
        key: i32,
        size: u64,
        flags: i32,
        consistency: Consistency,
        cx: &Context<'_>,
    ) -> Result<i32, Errno> {
        if let Some(id) = self
            .table
            .find(key, flags, request.caller, |segment| size <= segment.size)?
        {
            return Ok(id);
        }
        if size < SHMMIN || size > SHMMAX.min(MAX_FILE) {
            return Err(Errno::EINVAL);
        }
        if flags & SHM_HUGETLB != 0 {
            check_huge(flags, request.caller)?;
            return Err(Errno::ENOMEM);
        }
        if size > MAX_SIZE || (flags & SHM_NORESERVE == 0 && size > cx.members.total_memory()) {
            return Err(Errno::ENOMEM);
        }
        let quota = Amount {
            objects: cx.quotas.segments,
            contents: cx.quotas.bytes.unwrap_or(cx.members.total_memory() / 2),
        };
        self.table
            .check_quota(request.caller, quota, whole_pages(size))?;
        let created = self.created;
        let id = self
            .table
            .insert(key, flags, request.caller, |id| Segment {
                segment: SegmentId(created << ID_BITS | u64::from(id.cast_unsigned())),
                size,
                consistency,
                atime: 0,
                dtime: 0,
                ctime: cx.now,
                cpid: request.caller.pid,
                lpid: 0,
                before_attach: (0, 0),
                locked_by: None,
                attaches: BTreeMap::new(),
                pages: Pages::new(size, consistency == Consistency::Durable),
            })?;
        if consistency == Consistency::Durable {
            self.durable.insert(id);
        }
        self.created += 1;
        self.pages += pages(size);
        Ok(id)
    }

    /// `shmat`; it is answered from here, now or later, unless it fails.
    pub(crate) fn attach(
        &mut self,
        request: &Request<'_>,
        id: i32,
        flags: i32,
        cx: &mut Context<'_>,
    ) -> Result<(), Errno> {
        let Entry {
            perm,
            object: segment,
        } = self.table.get_mut(id)?;
        let mut wanted = perm::READ;
        if flags & SHM_RDONLY == 0 {
            wanted |= perm::WRITE;
        }
        if flags & SHM_EXEC != 0 {
            wanted |= perm::EXECUTE;
        }
        perm::check(perm, request.caller, wanted)?;
        let may_write = perm::check(perm, request.caller, perm::WRITE).is_ok();

        let pid = request.caller.pid;
        match segment.pages.admit(request.call.node, cx.members) {
            Admission::Now(placement) => {
                segment.attached(request.call.node, 1, pid, cx.now);
                cx.out.push(Output::attached(
                    request.call,
                    segment.attachment(may_write),
                    placement,
                ));
            }
            Admission::Later { ask } => {
                cx.block(request, Awaited::Segment(segment.segment));
                segment.pages.wait(WaitingAttach {
                    call: request.call,
                    pid,
                    may_write,
                });
                let message = FromCoordinator::Share {
                    segment: segment.segment,
                };
                cx.out.extend(ask.map(|to| Output::new(to, message)));
            }
        }
        Ok(())
    }

    /// Forgets an attach that is blocked.
    pub(crate) fn cancel(&mut self, segment: SegmentId, call: CallKey) {
        if let Some((_, segment)) = self.find(segment) {
            segment.pages.cancel(call);
        }
    }

    /// The node tracks the segment now; false if it was not asked to. The attaches that waited
    /// for it are answered.
    pub(crate) fn sharing(
        &mut self,
        node: NodeId,
        segment: SegmentId,
        cx: &mut Context<'_>,
    ) -> bool {
        let Some((_, segment)) = self.find(segment) else {
            return false;
        };
        let Some(waiting) = segment.pages.shared_by(node) else {
            return false;
        };
        segment.admit_all(waiting, cx);
        true
    }

    /// A fork has copied `count` attaches; false if there is none to copy.
    pub(crate) fn inherit(
        &mut self,
        node: NodeId,
        segment: SegmentId,
        count: u32,
        pid: i32,
        cx: &Context<'_>,
    ) -> bool {
        let Some((_, segment)) = self.find(segment) else {
            return false;
        };
        if count == 0 || !segment.attaches.contains_key(&node) {
            return false;
        }
        segment.attached(node, u64::from(count), pid, cx.now);
        true
    }

    /// `count` attaches have ended; EINVAL if the node has not that many.
    pub(crate) fn detach(
        &mut self,
        node: NodeId,
        segment: SegmentId,
        count: u32,
        pid: i32,
        cx: &mut Context<'_>,
    ) -> Result<(), Errno> {
        let (id, segment) = self.find(segment).ok_or(Errno::EINVAL)?;
        segment.end_attaches(node, count)?;
        segment.lpid = pid;
        segment.dtime = cx.now;
        self.destroy_if_due(id, cx);
        Ok(())
    }

    /// An attach of a node came to nothing.
    pub(crate) fn unattach(
        &mut self,
        node: NodeId,
        segment: SegmentId,
        cx: &mut Context<'_>,
    ) -> Result<(), Errno> {
        let (id, segment) = self.find(segment).ok_or(Errno::EINVAL)?;
        segment.end_attaches(node, 1)?;
        (segment.lpid, segment.atime) = segment.before_attach;
        self.destroy_if_due(id, cx);
        Ok(())
    }

    /// A node has left, with its attaches and its pages; it is no member any longer, and none of
    /// its calls is blocked.
    pub(crate) fn lose(&mut self, node: NodeId, cx: &mut Context<'_>) {
        for id in self.table.ids() {
            let Ok(Entry {
                object: segment, ..
            }) = self.table.get_mut(id)
            else {
                continue;
            };
            let guarded = segment.pages.lose_durable(node, cx.members);
            segment.tell_homes(guarded, cx.out);
            let waiting = segment.pages.lose(node);
            segment.admit_all(waiting, cx);
            if segment.attaches.remove(&node).is_some() {
                segment.dtime = cx.now;
                self.destroy_if_due(id, cx);
            }
        }
    }

    /// There is a member more: durable extents that have no backup may get one.
    pub(crate) fn guard(&mut self, members: &mut Members, out: &mut Vec<Output>) {
        for &id in &self.durable {
            if let Ok(Entry {
                object: segment, ..
            }) = self.table.get_mut(id)
            {
                let guarded = segment.pages.guard_all(members);
                segment.tell_homes(guarded, out);
            }
        }
    }

    /// Whether processes of a node have attached a durable segment.
    pub(crate) fn are_durable_at(&self, node: NodeId) -> bool {
        let mut durable = self.durable.iter();
        durable.any(|&id| {
            let entry = self.table.get(id);
            entry.is_ok_and(|entry| entry.object.attaches.contains_key(&node))
        })
    }

    /// What a node that is gone had written to durable segments, and not released, may be at their
    /// homes: whoever learns of its end looks there.
    pub(crate) fn distrust(&mut self, node: NodeId, notices: &mut Notices) {
        for &id in &self.durable {
            let Ok(Entry { object: found, .. }) = self.table.get(id) else {
                continue;
            };
            if found.pages.is_known_to(node) {
                let count = u32::try_from(pages(found.size)).unwrap_or(u32::MAX);
                for other in found.pages.others(node) {
                    notices.add(other, found.segment, 0, count);
                }
            }
        }
    }

    /// Tells a node a segment's size, default home and consistency; from now on it hears of its
    /// end.
    pub(crate) fn introduce(
        &mut self,
        segment: SegmentId,
        to: NodeId,
    ) -> Option<(u64, Option<NodeId>, Consistency)> {
        let (_, segment) = self.find(segment)?;
        let home = segment.pages.introduce(to);
        Some((segment.size, home, segment.consistency))
    }

    /// A node has written these pages: others that may have copies are to be told. False if it
    /// cannot have.
    pub(crate) fn wrote(
        &mut self,
        node: NodeId,
        segment: SegmentId,
        runs: &Runs,
        notices: &mut Notices,
    ) -> bool {
        let Some((_, found)) = self.find(segment) else {
            // It is gone since.
            return true;
        };
        let in_range =
            |&(first, count): &(u32, u32)| u64::from(first) + u64::from(count) <= pages(found.size);
        if !found.consistency.is_release()
            || runs.len() > MAX_RUNS
            || !found.pages.is_known_to(node)
            || !runs.iter().all(in_range)
        {
            return false;
        }
        for other in found.pages.others(node) {
            for &(first, count) in runs {
                notices.add(other, segment, first, count);
            }
        }
        true
    }

    /// See [`Pages::find_home`]. With release consistency a home that has died has no successor.
    pub(crate) fn find_home(
        &mut self,
        extent: Extent,
        asker: NodeId,
        cx: &mut Context<'_>,
    ) -> Option<(NodeId, bool)> {
        let (_, segment) = self.find(extent.segment)?;
        if segment.consistency == Consistency::Durable {
            let (home, guarded) = segment.pages.find_durable(extent.index, asker, cx.members);
            segment.tell_homes(guarded, cx.out);
            return home.map(|home| (home, false));
        }
        let is_lost = segment.pages.is_orphan(extent.index);
        if is_lost && segment.consistency == Consistency::Release {
            return None;
        }
        segment.pages.find_home(extent.index, asker, cx.members)
    }

    /// See [`Pages::may_move`].
    pub(crate) fn may_move(
        &mut self,
        extent: Extent,
        from: NodeId,
        to: NodeId,
        members: &Members,
    ) -> bool {
        self.find(extent.segment)
            .is_some_and(|(_, segment)| segment.pages.may_move(extent.index, from, to, members))
    }

    /// See [`Pages::move_home`].
    pub(crate) fn move_home(&mut self, extent: Extent, to: NodeId, cx: &mut Context<'_>) -> bool {
        self.find(extent.segment)
            .is_some_and(|(_, segment)| segment.pages.move_home(extent.index, to, cx.members))
    }

    /// `shmctl`.
    pub(crate) fn control(
        &mut self,
        request: &Request<'_>,
        id: i32,
        command: ShmCommand,
        cx: &mut Context<'_>,
    ) -> Outcome {
        if id < 0 {
            return Err(Errno::EINVAL);
        }
        match command {
            ShmCommand::Stat(by) => return self.stat(request, id, by).map(Answer::Segment),
            ShmCommand::Limits => return Ok(Answer::ShmLimits(self.limits())),
            ShmCommand::Usage => return Ok(Answer::ShmUsage(self.usage())),
            ShmCommand::Remove => {
                let Entry { perm, .. } = self.table.get_mut(id)?;
                perm::check_control(perm, request.caller)?;
                perm.mode |= SHM_DEST;
                self.table.forget_key(id);
                self.destroy_if_due(id, cx);
            }
            ShmCommand::Set(new) => {
                let Entry {
                    perm,
                    object: segment,
                } = self.table.get_mut(id)?;
                perm::check_control(perm, request.caller)?;
                perm::update(perm, new)?;
                segment.ctime = cx.now;
            }
            ShmCommand::Lock(true) => self.lock(id, request.caller)?,
            ShmCommand::Lock(false) => {
                let Entry { perm, .. } = self.table.get(id)?;
                perm::check_unlock(perm, request.caller)?;
                self.unlock(id);
            }
        }
        Ok(Answer::Value(0))
    }

    /// SHM_LOCK. The pages count to the real user who locks them, until they are unlocked,
    /// by whomever; a segment that is locked already stays as it is.
    fn lock(&mut self, id: i32, caller: &Caller) -> Result<(), Errno> {
        let Entry {
            perm,
            object: segment,
        } = self.table.get_mut(id)?;
        let nothing = Memlock {
            uid: caller.uid,
            limit: 0,
        };
        let Memlock { uid, limit } = caller.memlock.unwrap_or(nothing);
        perm::check_lock(perm, caller, limit)?;
        if segment.locked_by.is_some() {
            return Ok(());
        }
        let wanted = self.locked.get(&uid).unwrap_or(&0) + pages(segment.size);
        // As Linux: only whole pages of the limit count.
        if wanted > limit / PAGE_SIZE as u64 && limit != u64::MAX && !perm::may_lock(caller) {
            return Err(Errno::ENOMEM);
        }
        self.locked.insert(uid, wanted);
        segment.locked_by = Some(uid);
        perm.mode |= SHM_LOCKED;
        Ok(())
    }

    /// SHM_UNLOCK, and what the end of a segment undoes.
    fn unlock(&mut self, id: i32) {
        let Ok(Entry {
            perm,
            object: segment,
        }) = self.table.get_mut(id)
        else {
            return;
        };
        perm.mode &= !SHM_LOCKED;
        if let Some(uid) = segment.locked_by.take()
            && let Some(locked) = self.locked.get_mut(&uid)
        {
            *locked -= pages(segment.size);
            if *locked == 0 {
                self.locked.remove(&uid);
            }
        }
    }

    fn stat(&self, request: &Request<'_>, id: i32, by: StatBy) -> Result<ShmStatus, Errno> {
        let (
            id,
            Entry {
                perm,
                object: segment,
            },
        ) = self.table.named(id, by, request.caller)?;
        let &Segment {
            size,
            consistency,
            atime,
            dtime,
            ctime,
            cpid,
            lpid,
            ..
        } = segment;
        let nattch = segment.attaches.values().sum();
        Ok(ShmStatus {
            id,
            perm: *perm,
            consistency,
            size,
            atime,
            dtime,
            ctime,
            cpid,
            lpid,
            nattch,
        })
    }

    /// A segment that the caller may read.
    pub(crate) fn readable(&self, request: &Request<'_>, id: i32) -> Result<SegmentId, Errno> {
        let Entry {
            perm,
            object: segment,
        } = self.table.get(id)?;
        perm::check(perm, request.caller, perm::READ)?;
        Ok(segment.segment)
    }

    fn limits(&self) -> ShmLimits {
        ShmLimits {
            shmmax: SHMMAX,
            shmmin: SHMMIN,
            shmmni: SHMMNI,
            shmseg: SHMMNI,
            shmall: SHMALL,
            highest: self.table.highest(),
        }
    }

    /// Residence and swap are the nodes' affair: they are 0 here.
    fn usage(&self) -> ShmUsage {
        ShmUsage {
            used_ids: self.table.in_use(),
            shm_tot: self.pages,
            shm_rss: 0,
            shm_swp: 0,
            swap_attempts: 0,
            swap_successes: 0,
            highest: self.table.highest(),
        }
    }

    fn find(&mut self, segment: SegmentId) -> Option<(i32, &mut Segment)> {
        let id = i32::try_from(segment.0 & ((1 << ID_BITS) - 1)).ok()?;
        let found = &mut self.table.get_mut(id).ok()?.object;
        (found.segment == segment).then_some((id, found))
    }

    /// Destroys the segment if it is removed and has no attach.
    fn destroy_if_due(&mut self, id: i32, cx: &mut Context<'_>) {
        let due = |entry: &Entry<Segment>| {
            entry.perm.mode & SHM_DEST != 0 && entry.object.attaches.is_empty()
        };
        if !self.table.get(id).is_ok_and(due) {
            return;
        }
        self.unlock(id);
        self.durable.remove(&id);
        let Some(Entry {
            object:
                Segment {
                    segment,
                    size,
                    pages: placed,
                    ..
                },
            ..
        }) = self.table.remove(id)
        else {
            return;
        };
        self.pages -= pages(size);
        let (known, waiting) = placed.dissolve(cx.members);
        let failed = |attach: WaitingAttach| Wake::failed(attach.call, Errno::EIDRM);
        cx.wake(waiting.into_iter().map(failed));
        cx.out.extend(
            known
                .into_iter()
                .map(|to| Output::new(to, FromCoordinator::Destroyed { segment })),
        );
    }
}

impl Segment {
    fn end_attaches(&mut self, node: NodeId, count: u32) -> Result<(), Errno> {
        let attaches = self.attaches.get_mut(&node).ok_or(Errno::EINVAL)?;
        let left = attaches
            .checked_sub(u64::from(count))
            .filter(|_| count > 0)
            .ok_or(Errno::EINVAL)?;
        if left == 0 {
            self.attaches.remove(&node);
        } else {
            *attaches = left;
        }
        Ok(())
    }

    fn attached(&mut self, node: NodeId, count: u64, pid: i32, now: i64) {
        self.before_attach = (self.lpid, self.atime);
        *self.attaches.entry(node).or_default() += count;
        self.lpid = pid;
        self.atime = now;
    }

    fn attachment(&self, may_write: bool) -> Attachment {
        Attachment {
            segment: self.segment,
            size: self.size,
            consistency: self.consistency,
            may_write,
            attach: 0,
            tracked: false,
        }
    }

    /// Tells the homes of durable extents of their backups.
    fn tell_homes(&self, guarded: impl IntoIterator<Item = Guarded>, out: &mut Vec<Output>) {
        for Guarded {
            home,
            extent,
            backup,
            blank,
        } in guarded
        {
            let extent = Extent {
                segment: self.segment,
                index: extent,
            };
            let message = FromCoordinator::BackupIs {
                extent,
                backup,
                blank,
            };
            out.push(Output::new(home, message));
        }
    }

    /// Answers attaches that had to wait.
    fn admit_all(&mut self, waiting: Vec<WaitingAttach>, cx: &mut Context<'_>) {
        for WaitingAttach {
            call,
            pid,
            may_write,
        } in waiting
        {
            // It waits no longer: the segment is shared.
            if let Admission::Now(placement) = self.pages.admit(call.node, cx.members) {
                cx.processes.unblock(call);
                self.attached(call.node, 1, pid, cx.now);
                cx.out.push(Output::attached(
                    call,
                    self.attachment(may_write),
                    placement,
                ));
            }
        }
    }
}

/// `SHM_HUGETLB`: EINVAL for a size that huge pages do not have, EPERM for a caller who may not
/// have them.
fn check_huge(flags: i32, caller: &Caller) -> Result<(), Errno> {
    let size = flags.cast_unsigned() >> SHM_HUGE_SHIFT & SHM_HUGE_MASK;
    if !HUGE_SIZES.contains(&size) {
        return Err(Errno::EINVAL);
    }
    perm::check_huge(caller)
}

/// Of a size of at most [`MAX_SIZE`].
fn whole_pages(size: u64) -> u64 {
    pages(size) * PAGE_SIZE as u64
}

fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE as u64)
}
