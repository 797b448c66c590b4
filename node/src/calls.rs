//! Local processes: who they are, what they ask, and how they end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use migshm_coherence::Lock;
use migshm_protocol::call::{
    Answer, Attachment, Call, Caller, Consistency, Errno, Outcome, SemBuf, SemCommand, SetMemory,
    ShmCommand,
};
use migshm_protocol::control::{FromCoordinator, Placement, ToCoordinator};
use migshm_protocol::ids::PAGE_SIZE;
use migshm_protocol::local::{FromNode, LOCAL_VERSION, Pieces, ToNode};
use migshm_protocol::{ProcessId, SegmentId, codec};
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::daemon::{
    Again, Attaching, Connection, ConnectionId, Coordinator, Node, Pending, Process, Resident,
    boottime,
};
use crate::local::{self, Credentials, Packet, Sender, Socket};
use crate::memory::{AttachId, Granted, SpaceId, UserId, View};
use crate::start;
use crate::tasks;
use crate::uffd::Uffd;

/// `SHM_RDONLY` of `shmat(2)`.
const SHM_RDONLY: i32 = 0o10000;

/// The capabilities that System V IPC knows, as bits: `CAP_IPC_LOCK`, `CAP_IPC_OWNER`,
/// `CAP_SYS_ADMIN`, `CAP_SYS_RESOURCE`.
const OF_IPC: u64 = 1 << 14 | 1 << 15 | 1 << 21 | 1 << 24;

/// Whether a call locks memory.
fn is_lock(call: &Call) -> bool {
    matches!(
        call,
        Call::ShmCtl {
            command: ShmCommand::Lock(true),
            ..
        }
    )
}

/// Whether a call may create an object.
fn creates(call: &Call) -> bool {
    matches!(
        call,
        Call::ShmGet { .. } | Call::SemGet { .. } | Call::MsgGet { .. }
    )
}

/// What a call releases: by the first semaphore that it raises, or the queue that it sends to.
fn released(call: &Call, raw: &[u8]) -> Option<Lock> {
    match *call {
        Call::SemOp { id, .. } => {
            let raised = SemBuf::parse_all(raw)?.into_iter().find(|op| op.op > 0)?;
            Some(Lock::Semaphore(id, raised.num))
        }
        Call::SemCtl {
            id,
            command: SemCommand::SetVal(num, _),
        } => Some(Lock::Semaphore(id, num.try_into().ok()?)),
        Call::MsgSend { id, .. } => Some(Lock::Queue(id)),
        _ => None,
    }
}

/// Bytes of a message that tells of an attach, at most.
const MESSAGE_ROOM: usize = 512;

/// Address spaces of one user that are kept although the process that they were known by has left
/// them: others live there that have called `vfork`, say. A program could anchor its own, or those
/// of others that hold still, again and again.
const MAX_LEFT: usize = 64;

/// An anchor page: the address space's secret, then zeros.
fn anchor_page(secret: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    page[..8].copy_from_slice(&secret.to_ne_bytes());
    page
}

impl Node {
    /// Whether a user may have one more connection. When most descriptors are taken, only those
    /// may who have fewer than their share: one user's processes must not keep others out.
    pub(crate) fn has_room_for(&self, user: u32) -> bool {
        // A process has a pidfd, an address space a userfaultfd and a pagemap.
        let taken = self.connections.len() + self.processes.len() + 2 * self.spaces.len();
        let share = self.connections.len() / self.users.len().max(1);
        taken < self.descriptors / 4 * 3 || self.users.get(&user).is_none_or(|has| *has < share)
    }

    /// A process connected.
    pub(crate) fn on_connect(
        &mut self,
        id: ConnectionId,
        user: u32,
        socket: Rc<AsyncFd<Socket>>,
        task: AbortHandle,
    ) {
        self.connections.insert(
            id,
            Connection {
                socket,
                task,
                user,
                caller: None,
                greeter: Sender::default(),
                call: None,
                again: None,
            },
        );
        *self.users.entry(user).or_default() += 1;
    }

    /// A connection's socket may be readable: takes one message.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else ends the connection.
    pub(crate) fn on_readable(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(connection) = self.connections.get(&id) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let socket = Rc::clone(&connection.socket);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(migshm_protocol::limits::MAX_LOCAL, 0);
        let result = self.take_message(id, &socket, &mut buffer);
        self.buffer = buffer;
        if result.is_ok() {
            self.settle();
        }
        result
    }

    fn take_message(
        &mut self,
        id: ConnectionId,
        socket: &AsyncFd<Socket>,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        socket.get_ref().receive(buffer).and_then(|packet| {
            let Packet {
                length,
                descriptor,
                sender,
            } = packet;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // What the sender has seen end has ended for it.
            self.reap();
            let (message, raw) = codec::decode::<ToNode>(&buffer[..length])
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.on_local(id, sender, message, raw, descriptor)
        })
    }

    /// Takes what processes of an address space have told of attaches, without waiting for an
    /// answer, before anything that may follow it.
    fn hear_attaches(&mut self, space: SpaceId) {
        // What is taken may lead here again; a hostile process could do so without end.
        if self.hearing {
            return;
        }
        let untold: Vec<ConnectionId> = self
            .mapping
            .values()
            .filter(|attaching| attaching.space == space)
            .map(|attaching| attaching.connection)
            .collect();
        self.hearing = true;
        for id in untold {
            let Some(connection) = self.connections.get(&id) else {
                continue;
            };
            let socket = Rc::clone(&connection.socket);
            let mut buffer = vec![0; MESSAGE_ROOM];
            if let Err(error) = self.take_message(id, &socket, &mut buffer)
                && !matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::UnexpectedEof
                )
            {
                tracing::debug!(%error, "closing a process's connection");
                socket.get_ref().shut_down();
            }
        }
        self.hearing = false;
    }

    fn on_local(
        &mut self,
        from: ConnectionId,
        sender: Sender,
        message: ToNode,
        raw: &[u8],
        descriptor: Option<OwnedFd>,
    ) -> io::Result<()> {
        if let ToNode::Hello {
            version,
            forked_from,
            anchor,
        } = message
        {
            return self.on_hello(from, sender, version, forked_from, anchor);
        }
        let Some(connection) = self.connections.get(&from) else {
            return Ok(());
        };
        let Some(caller) = connection.caller.clone() else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "request before Hello",
            ));
        };
        // A child that has become another user may have inherited the descriptor.
        if (sender.uid, sender.gid) != (connection.greeter.uid, connection.greeter.gid) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "request of another user",
            ));
        }
        let waits = connection.call.is_some();
        if waits
            && matches!(
                message,
                ToNode::Call { .. } | ToNode::Detach { .. } | ToNode::Reaped { .. }
            )
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a call before the answer to the last",
            ));
        }
        match message {
            ToNode::Hello { .. } => unreachable!("handled above"),
            ToNode::Anchor { id, address } => {
                let outcome = self.on_anchor(&caller, address, descriptor);
                self.answer(from, id, outcome.map(|()| Answer::Value(0)), &[], None);
            }
            ToNode::Call { id, call } => self.on_call(from, sender, id, caller, call, raw),
            ToNode::Cancel { id, errno } => {
                let connection = self.connections.get_mut(&from);
                let call = connection.and_then(|c| {
                    let call = c.call.filter(|(theirs, _)| *theirs == id)?;
                    if let Some(again) = &mut c.again {
                        again.cancelled = Some(errno);
                    }
                    Some(call)
                });
                if let Some((_, ours)) = call {
                    self.tell(ToCoordinator::Cancel { id: ours, errno }, &[]);
                }
            }
            ToNode::Mapped {
                id,
                attach,
                address,
            } => self.on_mapped(from, id, AttachId(attach), address),
            ToNode::Detach { id, address } => self.on_detach(from, id, &caller, address),
            ToNode::Unmapped { attach } => {
                if let Some(space) = self.space_after_forks(caller.pid) {
                    self.memory.spaces.unmap_attach(space, AttachId(attach));
                }
            }
            ToNode::Unmapping {
                id,
                address,
                length,
            } => {
                if let Some(space) = self.space_after_forks(caller.pid) {
                    for ended in self.memory.spaces.unmap(space, address, length) {
                        self.detached(ended, 1, caller.pid);
                    }
                }
                self.answer_confirmed(from, id, Ok(Answer::Value(0)));
            }
            ToNode::Remapped { id } => {
                if let Some(space) = self.space_after_forks(caller.pid) {
                    self.memory.spaces.look(space);
                    self.settle();
                }
                self.answer_confirmed(from, id, Ok(Answer::Value(0)));
            }
            ToNode::Permitting {
                id,
                address,
                length,
            } => {
                let end = address.saturating_add(length);
                let until = self.space_of(caller.pid).map_or(end, |space| {
                    self.hear_attaches(space);
                    let mappings = &self.memory.spaces.mappings;
                    mappings.first_read_only(space, address, end)
                });
                self.post(from, &FromNode::Permitted { id, until }, &[], None);
            }
            ToNode::Reaped { id } => self.answer_confirmed(from, id, Ok(Answer::Value(0))),
            ToNode::Upgrade { id } => {
                if start::may_command(sender.uid) {
                    self.upgraders.push((from, id));
                    self.upgrade.notify_one();
                } else {
                    self.answer(from, id, Err(Errno::EPERM), &[], None);
                }
            }
            ToNode::Status { id } => {
                let status = self.status().to_string();
                self.answer(from, id, Ok(Answer::Value(0)), status.as_bytes(), None);
            }
        }
        Ok(())
    }

    /// Another daemon has taken the place of the one that was asked to let it, or could not.
    pub(crate) fn answer_upgrade(&mut self, outcome: io::Result<()>) {
        let outcome = match outcome {
            Ok(()) => Ok(Answer::Value(0)),
            Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno)),
        };
        for (connection, id) in std::mem::take(&mut self.upgraders) {
            self.answer(connection, id, outcome, &[], None);
        }
    }

    fn space_of(&self, pid: i32) -> Option<SpaceId> {
        self.processes.get(&pid)?.space
    }

    /// The process's address space, once children that have inherited what it has now are known.
    fn space_after_forks(&mut self, pid: i32) -> Option<SpaceId> {
        let space = self.space_of(pid)?;
        self.hear_attaches(space);
        self.memory.spaces.await_forks(space);
        self.settle();
        Some(space)
    }

    fn on_hello(
        &mut self,
        from: ConnectionId,
        sender: Sender,
        version: u32,
        forked_from: i32,
        anchor: u64,
    ) -> io::Result<()> {
        let Some(connection) = self.connections.get(&from) else {
            return Ok(());
        };
        if connection.caller.is_some() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a second Hello"));
        }
        let socket = Rc::clone(&connection.socket);
        if version != LOCAL_VERSION {
            tracing::warn!(version, "a process uses another version of libmigshm.so");
            self.post(
                from,
                &FromNode::Refused {
                    errno: Errno::ENOSYS,
                },
                &[],
                None,
            );
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "another version of libmigshm.so",
            ));
        }
        let credentials = socket.get_ref().credentials()?;
        if sender.pid != credentials.pid {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "Hello of another process than connected",
            ));
        }
        if local::has_ended(&credentials.pidfd) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the process that connected has ended",
            ));
        }
        let process = self.meet(credentials.pid)?;
        if forked_from != 0 {
            self.adopt_fork(forked_from, credentials.pid);
        }
        let spaces = &self.spaces;
        let anchored = spaces
            .iter()
            .find(|(_, resident)| resident.pid.is_none() && resident.secret == anchor);
        if let Some((&space, _)) = anchored.filter(|_| anchor != 0) {
            self.identify(credentials.pid, space);
        }
        let Credentials {
            pid,
            uid,
            gid,
            groups,
            pidfd: _,
        } = credentials;
        let caller = Caller {
            process,
            pid,
            uid,
            gid,
            groups,
            capabilities: 0,
            memlock: None,
        };
        if let Some(connection) = self.connections.get_mut(&from) {
            connection.caller = Some(caller);
            connection.greeter = sender;
        }
        let device = self
            .device
            .as_ref()
            .and_then(|device| device.try_clone().ok());
        let welcome = FromNode::Welcome {
            node: self.id,
            track: device.is_some(),
        };
        self.post(from, &welcome, &[], device.as_ref().map(AsFd::as_fd));
        Ok(())
    }

    /// The process with this pid, watched from now on.
    fn meet(&mut self, pid: i32) -> io::Result<ProcessId> {
        if let Some(process) = self.processes.get(&pid) {
            if !local::has_ended(&process.pidfd) {
                return Ok(process.id);
            }
            // The pid went to a new process before the end of the old one was noticed.
            self.on_exit(pid);
        }
        let pidfd = local::pidfd(pid)?;
        self.exits.watch(pid, &pidfd)?;
        let id = ProcessId(self.next_id());
        self.processes.insert(
            pid,
            Process {
                id,
                pidfd,
                space: None,
            },
        );
        Ok(id)
    }

    fn on_anchor(
        &mut self,
        caller: &Caller,
        address: u64,
        descriptor: Option<OwnedFd>,
    ) -> Result<(), Errno> {
        let pid = caller.pid;
        let descriptor = descriptor.ok_or(Errno::EINVAL)?;
        if let Some(old) = self.space_of(pid) {
            self.leave_space(old);
        }
        let uffd = Uffd::of_process(descriptor).map_err(|error| self.no_tracking(pid, &error))?;
        let space = self
            .memory
            .spaces
            .add_space(Some(uffd), address)
            .map_err(|error| self.no_tracking(pid, &error))?;
        let secret = self.watch(space, caller.uid);
        self.memory
            .spaces
            .fill_anchor(space, address, &anchor_page(secret));
        self.settle_in(pid, space);
        Ok(())
    }

    /// Adds the entry of an address space with an anchor; gives its secret.
    fn watch(&mut self, space: SpaceId, user: u32) -> u64 {
        let secret = local::secret();
        let watcher = tasks::watch_space(self, space);
        let resident = Resident {
            pid: None,
            secret,
            user,
            is_left: false,
            watcher,
        };
        self.spaces.insert(space, resident);
        self.log_start(space);
        secret
    }

    /// An address space is known to be this process's.
    fn settle_in(&mut self, pid: i32, space: SpaceId) {
        if let (Some(process), Some(resident)) =
            (self.processes.get_mut(&pid), self.spaces.get_mut(&space))
        {
            process.space = Some(space);
            resident.pid = Some(pid);
            resident.is_left = false;
            self.memory.spaces.identify(space, pid);
        }
    }

    fn no_tracking(&self, pid: i32, error: &io::Error) -> Errno {
        tracing::error!(node = self.name, pid, %error, "cannot watch a process with userfaultfd");
        Errno::ENOMEM
    }

    /// The process's address space, made now if no userfaultfd is to be had.
    fn ensure_space(&mut self, pid: i32) -> Option<SpaceId> {
        if let Some(space) = self.space_of(pid) {
            return Some(space);
        }
        if self.device.is_some() {
            return None;
        }
        let space = self.memory.spaces.add_space(None, 0).ok()?;
        self.spaces.insert(space, Resident::default());
        self.settle_in(pid, space);
        Some(space)
    }

    /// A child says that it was forked from `parent`, where the kernel does not report forks.
    fn adopt_fork(&mut self, parent: i32, child: i32) {
        let Some(from) = self.space_of(parent).filter(|_| self.device.is_none()) else {
            return;
        };
        if self.space_of(child).is_some() || local::parent_of(child) != Some(parent) {
            return;
        }
        self.hear_attaches(from);
        if let Some(space) = self.ensure_space(child) {
            self.memory.spaces.mappings.inherit(from, space);
            self.report_inherited(space, child);
        }
    }

    fn report_inherited(&mut self, space: SpaceId, pid: i32) {
        for (segment, count) in self.memory.spaces.mappings.attaches(space) {
            self.tell(
                ToCoordinator::Inherited {
                    segment,
                    count,
                    pid,
                },
                &[],
            );
        }
    }

    /// The kernel reported a fork. Whose it is comes later.
    pub(crate) fn on_fork(&mut self, parent: SpaceId, child: SpaceId) {
        self.hear_attaches(parent);
        let parent = self.spaces.get(&parent);
        let (pid, user) = parent.map_or((0, 0), |r| (r.pid.unwrap_or(0), r.user));
        self.watch(child, user);
        self.quiet_space.notify_one();
        self.report_inherited(child, pid);
    }

    /// Attaches ended by what a process did to its memory.
    pub(crate) fn on_attaches_ended(&mut self, space: SpaceId, segments: &[SegmentId]) {
        let pid = self.spaces.get(&space).and_then(|r| r.pid).unwrap_or(0);
        for segment in segments {
            self.detached(*segment, 1, pid);
        }
    }

    /// A forked child touched its anchor page.
    ///
    /// The thread's id is in its own pid namespace, so in a container it may name another process:
    /// one that does not have the page. The child is then known from its first greeting.
    pub(crate) fn on_introduction(&mut self, space: SpaceId, address: u64, thread: i32) {
        let secret = self.spaces.get(&space).map_or(0, |r| r.secret);
        self.memory
            .spaces
            .fill_anchor(space, address, &anchor_page(secret));
        if let Some(pid) = local::process_of(thread)
            && local::word_at(pid, address) == Some(secret)
        {
            self.identify(pid, space);
        }
        // Not before: it may end at once, and nobody would know whose end that was.
        self.memory.spaces.wake(space, address);
    }

    /// A child has said, in one way or another, that an address space is its own.
    fn identify(&mut self, pid: i32, space: SpaceId) {
        if self.meet(pid).is_err() {
            return;
        }
        let old = self.space_of(pid);
        if old.is_none_or(|old| !self.memory.spaces.is_alive(old)) {
            if let Some(old) = old {
                self.end_space(old);
            }
            self.settle_in(pid, space);
        }
    }

    /// A process has another address space now, or none. The old one may live on with other
    /// processes (vfork, `CLONE_VM`); it then ends with the last.
    fn leave_space(&mut self, space: SpaceId) {
        let user = self.spaces.get(&space).map_or(0, |r| r.user);
        let left = self.spaces.values().filter(|r| r.is_left && r.user == user);
        if left.count() >= MAX_LEFT || !self.is_running(space, None) {
            return self.end_space(space);
        }
        if let Some(resident) = self.spaces.get_mut(&space) {
            resident.pid = None;
            resident.is_left = true;
            self.memory.spaces.forget_process(space);
        }
        self.quiet_space.notify_one();
    }

    fn on_call(
        &mut self,
        from: ConnectionId,
        sender: Sender,
        theirs: u64,
        mut caller: Caller,
        call: Call,
        raw: &[u8],
    ) {
        self.counters.calls += 1;
        let id = self.next_id();
        if let Call::ShmCtl {
            command: ShmCommand::Stat(_),
            ..
        } = call
        {
            self.probe();
        }
        let pending = match call {
            Call::ShmAttach { flags, .. } => {
                if self.ensure_space(caller.pid).is_none() {
                    tracing::debug!(
                        pid = caller.pid,
                        "attach from an address space without anchor"
                    );
                    return self.answer(from, theirs, Err(Errno::ENOMEM), &[], None);
                }
                Pending::Attach(from, flags)
            }
            Call::SemOp { id, memory } => {
                self.return_set(id);
                Pending::Operate(from, memory, boottime())
            }
            Call::SemCtl { id, .. } => {
                self.return_set(id);
                Pending::Call(from)
            }
            _ => Pending::Call(from),
        };
        // It counts only what is read of the process that asks, and not of one that it forked.
        let own = sender.pid == caller.pid;
        if own && is_lock(&call) {
            caller.memlock = local::memlock(caller.pid);
        }
        if let Some(connection) = self.connections.get_mut(&from) {
            connection.call = Some((theirs, id));
            connection.again = own.then(|| Again {
                call,
                raw: raw.to_vec(),
                memlock: caller.memlock,
                cancelled: None,
            });
        }
        self.pending.insert(id, pending);
        if let Some(lock) = released(&call, raw) {
            self.push_pages(lock);
        }
        self.tell(ToCoordinator::Call { id, caller, call }, raw);
    }

    /// A call was denied that was made without its caller's capabilities, as most calls need none
    /// and to know them takes longer than such a call. It had no effect; if the caller has any
    /// that could help, it is made again with them. False if that cannot be.
    fn call_again(&mut self, from: ConnectionId, ours: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&from) else {
            return false;
        };
        let Some((theirs, _)) = connection.call.filter(|(_, id)| *id == ours) else {
            return false;
        };
        let (Some(again), Some(caller)) = (connection.again.take(), connection.caller.clone())
        else {
            return false;
        };
        let capabilities = local::capabilities(caller.pid, caller.uid, caller.gid) & OF_IPC;
        let lives = |process: &Process| !local::has_ended(&process.pidfd);
        // Else it was another process with its pid, perhaps, whose capabilities were read.
        if capabilities == 0 || !self.processes.get(&caller.pid).is_some_and(lives) {
            return false;
        }
        let id = self.next_id();
        if let Some(connection) = self.connections.get_mut(&from) {
            connection.call = Some((theirs, id));
        }
        let Again {
            mut call,
            raw,
            memlock,
            cancelled,
        } = again;
        if let Call::SemOp { memory, .. } = &mut call {
            // It would keep the set's memory when it has lost the capabilities.
            *memory = SetMemory::Unusable;
        }
        let pending = match call {
            Call::ShmAttach { flags, .. } => Pending::Attach(from, flags),
            _ => Pending::Call(from),
        };
        self.pending.insert(id, pending);
        let caller = Caller {
            capabilities,
            memlock,
            ..caller
        };
        self.tell(ToCoordinator::Call { id, caller, call }, &raw);
        // The coordinator may have heard of that when it had answered the first already.
        if let Some(errno) = cancelled {
            self.tell(ToCoordinator::Cancel { id, errno }, &[]);
        }
        true
    }

    /// The coordinator answered.
    pub(crate) fn on_answer(
        &mut self,
        id: u64,
        outcome: Outcome,
        placement: Option<Placement>,
        raw: &[u8],
    ) {
        let Some(pending) = self.pending.remove(&id) else {
            return;
        };
        if let (
            Pending::Call(connection)
            | Pending::Operate(connection, ..)
            | Pending::Attach(connection, _),
            Err(errno),
        ) = (&pending, &outcome)
            && self.may_need_capabilities(*connection, *errno)
            && self.call_again(*connection, id)
        {
            return;
        }
        match pending {
            Pending::Call(connection) | Pending::Operate(connection, ..) => {
                if let Some(theirs) = self.finish(connection, id) {
                    self.answer(connection, theirs, outcome, raw, None);
                }
            }
            Pending::Attach(connection, flags) => {
                self.on_attach_answer(connection, id, flags, outcome, placement)
            }
            Pending::Confirm(connection, effects, outcome) => {
                // In the order of their requests, but for those that a lost coordinator leaves.
                self.confirmed = self.confirmed.max(effects);
                if let Some(theirs) = self.finish(connection, id) {
                    self.answer(connection, theirs, outcome, &[], None);
                }
            }
            Pending::Detach {
                connection,
                attach,
                pieces,
            } => {
                if let Some(theirs) = self.finish(connection, id) {
                    let message = match outcome {
                        Ok(_) => FromNode::Detaching {
                            id: theirs,
                            attach: attach.0,
                            pieces,
                        },
                        Err(_) => FromNode::Answer {
                            id: theirs,
                            outcome,
                        },
                    };
                    self.post(connection, &message, &[], None);
                }
            }
        }
    }

    /// Whether a call's outcome might be another with capabilities.
    fn may_need_capabilities(&self, connection: ConnectionId, errno: Errno) -> bool {
        let again = self.connections.get(&connection);
        let again = again.and_then(|connection| connection.again.as_ref());
        again.is_some_and(|again| match errno {
            Errno::EACCES | Errno::EPERM => true,
            Errno::ENOMEM => is_lock(&again.call),
            Errno::ENOSPC => creates(&again.call),
            _ => false,
        })
    }

    /// A process has seen others end; they were reaped before this.
    /// Answers a process once all nodes see what has happened so far, as it may tell others of it.
    fn answer_confirmed(&mut self, from: ConnectionId, theirs: u64, outcome: Outcome) {
        if self.confirmed == self.effects {
            return self.answer(from, theirs, outcome, &[], None);
        }
        let id = self.next_id();
        if let Some(connection) = self.connections.get_mut(&from) {
            connection.call = Some((theirs, id));
        }
        self.pending
            .insert(id, Pending::Confirm(from, self.effects, outcome));
        self.tell(ToCoordinator::Confirm { id }, &[]);
    }

    /// The shim's id of the call that the connection waits for, if it still does.
    pub(crate) fn finish(&mut self, connection: ConnectionId, ours: u64) -> Option<u64> {
        let entry = self.connections.get_mut(&connection)?;
        let (theirs, _) = entry.call.take_if(|(_, id)| *id == ours)?;
        entry.again = None;
        Some(theirs)
    }

    fn on_attach_answer(
        &mut self,
        connection: ConnectionId,
        id: u64,
        flags: i32,
        outcome: Outcome,
        placement: Option<Placement>,
    ) {
        if let (Ok(Answer::Attached(attachment)), Some(placement)) = (outcome, placement)
            && self.hold_reader(connection, id, flags, attachment, placement)
        {
            return;
        }
        let caller = self
            .connections
            .get(&connection)
            .and_then(|c| c.caller.clone());
        let theirs = self.finish(connection, id);
        let granted = match outcome {
            Ok(Answer::Attached(attachment)) => Ok(attachment),
            Ok(_) => Err(Errno::EIO),
            Err(errno) => Err(errno),
        };
        if granted.is_ok_and(|attachment| attachment.consistency == Consistency::Durable) {
            // From now on none is delegated: what a process does counts at once.
            for set in self.sets.delegated() {
                self.return_set(set);
            }
        }
        let (pid, uid) = caller.as_ref().map_or((0, 0), |c| (c.pid, c.uid));
        let leave = granted.and_then(|attachment| {
            let leave = match theirs {
                Some(theirs) => {
                    let user = (pid, uid);
                    self.leave_to_attach(connection, theirs, user, flags, attachment, placement)
                }
                None => Err(Errno::EINTR),
            };
            if leave.is_err() {
                // It counts already.
                let segment = attachment.segment;
                self.tell(ToCoordinator::Unattached { segment }, &[]);
            }
            leave
        });
        if let (Err(errno), Some(theirs)) = (leave, theirs) {
            self.answer(connection, theirs, Err(errno), &[], None);
        }
    }

    /// Has an attach by a process that may only read wait until its segment is tracked, where
    /// other nodes may come to use that; whether it has to wait.
    fn hold_reader(
        &mut self,
        connection: ConnectionId,
        id: u64,
        flags: i32,
        attachment: Attachment,
        placement: Placement,
    ) -> bool {
        let Attachment {
            segment,
            size,
            consistency,
            ..
        } = attachment;
        if attachment.may_write
            || matches!(self.coordinator, Coordinator::Embedded(_))
            || !self.connections.contains_key(&connection)
            || self.prepare(segment, size, consistency, placement).is_err()
            || self.memory.is_tracked(segment)
        {
            return false;
        }
        self.pending.insert(id, Pending::Attach(connection, flags));
        let held = self.held.entry(segment).or_default();
        held.push((id, attachment, placement));
        self.try_arm(segment);
        true
    }

    /// Goes on with attaches that had to wait until their segment was tracked; it is, or cannot be.
    pub(crate) fn release_held(&mut self, segment: SegmentId) {
        for (id, attachment, placement) in self.held.remove(&segment).unwrap_or_default() {
            let outcome = if self.memory.is_tracked(segment) {
                Ok(Answer::Attached(attachment))
            } else {
                self.tell(ToCoordinator::Unattached { segment }, &[]);
                Err(Errno::ENOMEM)
            };
            let placement = Some(placement);
            let answer = FromCoordinator::Answer {
                id,
                outcome,
                placement,
            };
            self.inbox.push_back((answer, Vec::new()));
        }
    }

    fn leave_to_attach(
        &mut self,
        connection: ConnectionId,
        theirs: u64,
        (pid, user): (i32, UserId),
        flags: i32,
        attachment: Attachment,
        placement: Option<Placement>,
    ) -> Result<(), Errno> {
        let segment = attachment.segment;
        let Some(space) = self.space_of(pid) else {
            tracing::error!(pid, "the address space ended during its attach");
            return Err(Errno::ENOMEM);
        };
        let placement = placement.ok_or(Errno::EIO)?;
        self.prepare(segment, attachment.size, attachment.consistency, placement)
            .map_err(|error| {
                tracing::error!(segment = segment.0, %error, "cannot make the segment's memory");
                Errno::ENOMEM
            })?;
        let tracked = self.memory.is_tracked(segment);
        // A mapping of a descriptor that is not writable cannot be tracked.
        let alone = matches!(self.coordinator, Coordinator::Embedded(_)) && !tracked;
        let (view, descriptor) = if attachment.may_write || alone {
            let writable = attachment.may_write && (!alone || flags & SHM_RDONLY == 0);
            (View::Pages, self.memory.descriptor(segment, writable))
        } else {
            (View::Replica(user), self.memory.replica(segment, user))
        };
        let descriptor = descriptor.map_err(|error| {
            tracing::error!(segment = segment.0, %error, "cannot open the segment's memory");
            if error.raw_os_error() == Some(libc::EMFILE) {
                Errno::EMFILE
            } else {
                Errno::ENOMEM
            }
        })?;
        let attach = self.memory.spaces.new_attach(space);
        self.mapping.insert(
            attach,
            Attaching {
                connection,
                space,
                segment,
                view,
                read_only: flags & SHM_RDONLY != 0,
                tracked,
            },
        );
        let attachment = Attachment {
            attach: attach.0,
            tracked,
            ..attachment
        };
        self.answer(
            connection,
            theirs,
            Ok(Answer::Attached(attachment)),
            &[],
            Some(descriptor.as_fd()),
        );
        Ok(())
    }

    fn on_mapped(&mut self, from: ConnectionId, id: Option<u64>, attach: AttachId, address: u64) {
        let expected = |a: &&Attaching| a.connection == from;
        let Some(&Attaching { space, .. }) = self.mapping.get(&attach).filter(expected) else {
            return;
        };
        if id.is_some() {
            // Children that were forked before have no copy of this, and its own process waits for
            // the answer before it forks.
            self.memory.spaces.await_forks(space);
            self.settle();
        }
        let Some(Attaching {
            space,
            segment,
            view,
            read_only,
            ..
        }) = self.mapping.remove(&attach)
        else {
            return;
        };
        let forked = self.memory.spaces.attach_told(space);
        let caller = self.connections.get(&from).and_then(|c| c.caller.as_ref());
        let pid = caller.map_or(0, |c| c.pid);
        let mut covers = false;
        let outcome = if address == 0 {
            Err(Errno::EINVAL)
        } else {
            let granted = Granted {
                attach,
                segment,
                view,
                read_only,
            };
            let (ended, mapped) = self.memory.map(space, granted, address);
            covers = !ended.is_empty();
            for covered in ended {
                self.detached(covered, 1, pid);
            }
            mapped.map(|()| Answer::Value(0)).map_err(|error| {
                tracing::error!(segment = segment.0, pid, %error, "cannot use an attach");
                Errno::ENOMEM
            })
        };
        if outcome.is_err() {
            self.memory.spaces.mappings.give_up();
            self.tell(ToCoordinator::Unattached { segment }, &[]);
        }
        match (id, outcome) {
            (Some(id), Ok(_)) if !covers => self.answer(from, id, outcome, &[], None),
            (Some(id), _) => self.answer_confirmed(from, id, outcome),
            (None, Ok(_)) => {
                for child in forked {
                    // One that this node has not met yet is counted when it is.
                    if self.memory.spaces.inherit_attach(space, child, attach)
                        && self.spaces.contains_key(&child)
                    {
                        let count = 1;
                        let inherited = ToCoordinator::Inherited {
                            segment,
                            count,
                            pid,
                        };
                        self.tell(inherited, &[]);
                    }
                }
            }
            (None, Err(_)) => {}
        }
        self.try_arm(segment);
    }

    fn on_detach(&mut self, from: ConnectionId, theirs: u64, caller: &Caller, address: u64) {
        let space = self.space_after_forks(caller.pid);
        let found = space.and_then(|space| self.memory.spaces.mappings.attach_at(space, address));
        let Some((attach, segment, runs)) = found else {
            return self.answer(from, theirs, Err(Errno::EINVAL), &[], None);
        };
        let mut pieces = Pieces::default();
        let runs = &runs[..runs.len().min(pieces.len())];
        for (piece, run) in pieces.iter_mut().zip(runs) {
            *piece = (run.first_page, run.pages);
        }
        if !self.memory.spaces.mappings.stop_counting(segment, runs) {
            // A part of it is elsewhere, or more than can be told at once, and stays an attach.
            let message = FromNode::Detaching {
                id: theirs,
                attach: attach.0,
                pieces,
            };
            return self.post(from, &message, &[], None);
        }
        let id = self.next_id();
        if let Some(connection) = self.connections.get_mut(&from) {
            connection.call = Some((theirs, id));
        }
        self.pending.insert(
            id,
            Pending::Detach {
                connection: from,
                attach,
                pieces,
            },
        );
        self.tell(
            ToCoordinator::Detached {
                id,
                segment,
                count: 1,
                pid: caller.pid,
            },
            &[],
        );
    }

    fn detached(&mut self, segment: SegmentId, count: u32, pid: i32) {
        if count > 0 {
            self.tell(
                ToCoordinator::Detached {
                    id: 0,
                    segment,
                    count,
                    pid,
                },
                &[],
            );
        }
    }

    /// A connection ended: of its call nothing is left to do, and the process may have gone on to
    /// another program.
    pub(crate) fn on_disconnect(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        if let Some(count) = self.users.get_mut(&connection.user) {
            *count -= 1;
            if *count == 0 {
                self.users.remove(&connection.user);
            }
        }
        if let Some((_, ours)) = connection.call {
            self.tell(
                ToCoordinator::Cancel {
                    id: ours,
                    errno: Errno::EINTR,
                },
                &[],
            );
        }
        let pid = connection.caller.map_or(0, |c| c.pid);
        let given_up: Vec<(AttachId, SpaceId, SegmentId)> = self
            .mapping
            .iter()
            .filter(|(_, a)| a.connection == id)
            .map(|(attach, a)| (*attach, a.space, a.segment))
            .collect();
        for (attach, space, segment) in given_up {
            self.mapping.remove(&attach);
            self.memory.spaces.attach_told(space);
            self.memory.spaces.mappings.give_up();
            self.detached(segment, 1, pid);
            self.try_arm(segment);
        }
        let attaching = |space| self.mapping.values().any(|a| a.space == space);
        if let Some(space) = self
            .space_of(pid)
            .filter(|space| !attaching(*space) && !self.is_running(*space, Some(pid)))
        {
            self.end_space(space);
        }
        self.quiet_space.notify_one();
        self.settle();
    }

    /// Handles the end of every process that has ended.
    pub(crate) fn reap(&mut self) {
        while let Some(pid) = self.exits.ended() {
            self.on_exit(pid);
        }
    }

    /// A process ended.
    fn on_exit(&mut self, pid: i32) {
        let Some(process) = self.processes.remove(&pid) else {
            return;
        };
        let of_process = |c: &Connection| {
            c.caller
                .as_ref()
                .is_some_and(|caller| caller.process == process.id)
        };
        let connections: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|(_, c)| of_process(c))
            .map(|(id, _)| *id)
            .collect();
        for id in connections {
            // A child may have inherited the descriptor, so the end of the socket may not come.
            self.connections[&id].task.abort();
            self.on_disconnect(id);
        }
        if let Some(space) = process.space {
            self.leave_space(space);
        }
        for set in self.sets.owed_by(process.id) {
            self.return_set(set);
        }
        self.sets.leave(process.id);
        self.tell(
            ToCoordinator::Exited {
                process: process.id,
                pid,
            },
            &[],
        );
        self.settle();
    }

    fn end_space(&mut self, space: SpaceId) {
        let resident = self.spaces.remove(&space).unwrap_or_default();
        if let Some(watcher) = resident.watcher {
            watcher.abort();
        }
        self.log_end(space);
        let pid = resident.pid.unwrap_or(0);
        if let Some(process) = self.processes.get_mut(&pid) {
            process.space.take_if(|s| *s == space);
        }
        for (segment, count) in self.memory.remove_space(space) {
            self.detached(segment, count, pid);
        }
    }

    /// Whether the end of an address space would go unnoticed but for [`Node::probe`]: that of an
    /// unknown process, or an exec by one that has no connection which would end with it.
    fn is_quiet(&self, resident: &Resident) -> bool {
        let connected = |pid| {
            self.connections
                .values()
                .any(|c| c.caller.as_ref().is_some_and(|caller| caller.pid == pid))
        };
        resident.pid.is_none_or(|pid| !connected(pid))
    }

    /// Whether there is an address space that only [`Node::probe`] sees the end of.
    pub(crate) fn has_quiet_spaces(&self) -> bool {
        self.spaces.values().any(|resident| self.is_quiet(resident))
    }

    /// Looks for the end of address spaces that would go unnoticed.
    pub(crate) fn probe(&mut self) {
        let gone: Vec<SpaceId> = self
            .spaces
            .iter()
            .filter(|(space, resident)| {
                self.is_quiet(resident) && !self.is_running(**space, resident.pid)
            })
            .map(|(space, _)| *space)
            .collect();
        for space in gone {
            self.end_space(space);
        }
        self.settle();
    }

    /// Whether an address space still exists.
    fn is_running(&self, space: SpaceId, pid: Option<i32>) -> bool {
        if self.device.is_some() {
            self.memory.spaces.is_alive(space)
        } else {
            pid.is_some_and(local::maps_segments)
        }
    }

    pub(crate) fn answer(
        &mut self,
        to: ConnectionId,
        id: u64,
        outcome: Outcome,
        raw: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) {
        self.post(to, &FromNode::Answer { id, outcome }, raw, descriptor);
    }

    fn post(
        &mut self,
        to: ConnectionId,
        message: &FromNode,
        raw: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) {
        let Some(connection) = self.connections.get(&to) else {
            return;
        };
        let mut packet = Vec::with_capacity(128 + raw.len());
        let sent = codec::encode(message, raw, &mut packet)
            .map_err(io::Error::other)
            .and_then(|()| connection.socket.get_ref().send(&packet, descriptor));
        if let Err(error) = sent {
            // It waits for this answer and has not read those before: broken or hostile.
            tracing::debug!(%error, "cannot answer a process; closing its connection");
            connection.socket.get_ref().shut_down();
        }
    }
}
