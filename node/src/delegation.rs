//! What the coordinator delegates to this node, and how it gets it back.

use std::os::fd::AsFd;

use migshm_protocol::call::{Answer, SetMemory, SharedSet};
use migshm_protocol::control::{SetState, ToCoordinator};
use migshm_transport::FrameSender;

use crate::daemon::{Coordinator, Node, Pending, boottime};
use crate::local;

/// For how long after the coordinator was asked something and answered, processes may use shared
/// pages, and operate on sets that are delegated to this node, in milliseconds: less than the silence
/// after which the coordinator takes the node for dead.
pub(crate) const LEASE: u64 = 2_500;

impl Node {
    /// A `semop` succeeded, and its set is this node's for now.
    pub(crate) fn on_delegated(
        &mut self,
        id: u64,
        set: i32,
        number: u64,
        access: u64,
        state: SetState,
    ) {
        let Some(Pending::Operate(connection, memory, asked)) = self.pending.remove(&id) else {
            tracing::warn!(set, "a semaphore set was delegated unasked");
            return;
        };
        self.sets.extend(asked + LEASE);
        match self.sets.open(set, number, access, &state) {
            Ok(()) => self.delegated.notify_one(),
            Err(error) => {
                tracing::warn!(set, %error, "no memory for a semaphore set");
                let debts = Vec::new();
                let state = SetState { debts, ..state };
                let returned = ToCoordinator::Returned { set, number, state };
                self.tell(returned, &[]);
            }
        }
        let caller = self.connections.get(&connection).and_then(|c| {
            let caller = c.caller.as_ref()?;
            Some((caller.process, caller.pid))
        });
        let Some(theirs) = self.finish(connection, id) else {
            return;
        };
        let shared = match caller {
            Some((process, pid)) if memory == SetMemory::Wanted && local::shares_clock(pid) => {
                self.sets.share(set, process, pid).and_then(|shared| {
                    let (file, layout, seat) = shared;
                    let shared = SharedSet {
                        semaphores: u32::try_from(layout.semaphores()).ok()?,
                        seat: seat.and_then(|seat| u32::try_from(seat).ok()),
                        pid,
                    };
                    Some((shared, file.try_clone().ok()?))
                })
            }
            _ => None,
        };
        match shared {
            Some((shared, file)) => {
                let answer = Ok(Answer::Shared(shared));
                self.answer(connection, theirs, answer, &[], Some(file.as_fd()));
            }
            None => self.answer(connection, theirs, Ok(Answer::Value(0)), &[], None),
        }
    }

    /// Returns a set to the coordinator, if it is delegated to this node.
    pub(crate) fn return_set(&mut self, set: i32) {
        if let Some((number, state)) = self.sets.close(set) {
            self.tell(ToCoordinator::Returned { set, number, state }, &[]);
        }
    }

    /// Asks the coordinator whether the lease on shared pages and delegated sets may be extended, or,
    /// where it is in this daemon, extends it. False if there is nothing to extend.
    ///
    /// If the lease has ended, the cluster may have gone on without this node: then its processes have to
    /// wait until the coordinator has answered.
    pub(crate) fn extend_lease(&mut self) -> bool {
        let now = boottime();
        let is_remote = match &self.coordinator {
            Coordinator::Remote(_) => true,
            Coordinator::Embedded(_) | Coordinator::Lost => false,
        };
        if is_remote && now >= self.lease && !self.memory.is_fenced() {
            tracing::warn!(
                "no word from the coordinator: shared pages are out of reach until it answers"
            );
            self.memory.fence();
        }
        if !is_remote && self.sets.delegated().is_empty() {
            return false;
        }
        // A coordinator that cannot be reached would hear it too late.
        if self.coordinator.is_reachable() {
            self.tell(ToCoordinator::Query { number: now }, &[]);
            self.settle();
        }
        true
    }

    /// Returns all that is delegated, before the end; gives the link on which that is told.
    pub(crate) fn say_goodbye(&mut self) -> Option<FrameSender> {
        for set in self.sets.delegated() {
            self.return_set(set);
        }
        self.empty_outbox();
        match &self.coordinator {
            Coordinator::Remote(remote) => remote.link().cloned(),
            Coordinator::Embedded(_) | Coordinator::Lost => None,
        }
    }

    /// What the coordinator was asked at this time it has answered: this node is a member.
    pub(crate) fn on_present(&mut self, asked: u64) {
        self.sets.extend(asked + LEASE);
        self.lease = self.lease.max(asked + LEASE);
        if self.memory.is_fenced() && boottime() < self.lease {
            tracing::info!("the coordinator answers: shared pages are in reach again");
            self.memory.unfence();
        }
    }
}
