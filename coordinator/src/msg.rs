//! The calls on message queues: `msgget`, `msgsnd`, `msgrcv`, `msgctl`.
//!
//! The order of checks in each call is Linux's, as it decides which errno a call gets that is
//! wrong in several ways. What a queue does is in [`queue`].

mod queue;

use migshm_protocol::call::{Answer, Errno, MsgCommand, MsgLimits, MsgStatus, Outcome, StatBy};
use migshm_protocol::limits::{MSGMAX, MSGMNB, MSGMNI};
use serde::{Deserialize, Serialize};

use crate::ids::{Contents, Entry, Table};
use crate::processes::{Awaited, CallKey};
use crate::quotas::Amount;
use crate::{Context, Request, perm};
use queue::{Message, Queue, Receiver, Room, Sender, Wanted};

/// Flag: fail rather than wait.
const IPC_NOWAIT: i32 = 0o4000;
/// Flag of `msgrcv`: cut a message that is too long, rather than fail.
const MSG_NOERROR: i32 = 0o10000;
/// Flag of `msgrcv`: any type but the one given.
const MSG_EXCEPT: i32 = 0o20000;
/// Flag of `msgrcv`: a copy of the message at the position given in place of the type.
const MSG_COPY: i32 = 0o40000;

/// Fields of `struct msginfo` that Linux reports and does not use: KiB of all messages, bytes of a
/// segment, and how many of those there are at most.
const MSGPOOL: i32 = MSGMNI * MSGMNB as i32 / 1024;
const MSGSSZ: i32 = 16;
const MSGSEG: u16 = u16::MAX;

/// All message queues.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MsgQueues {
    table: Table<Queue>,
}

/// Its capacity is the same for all who have a quota.
impl Contents for Queue {
    fn contents(&self) -> u64 {
        0
    }
}

impl MsgQueues {
    pub(crate) fn new() -> MsgQueues {
        MsgQueues {
            table: Table::new(MSGMNI as usize),
        }
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.table.in_use() == 0
    }

    /// `msgget`.
    pub(crate) fn get(
        &mut self,
        request: &Request<'_>,
        key: i32,
        flags: i32,
        cx: &Context<'_>,
    ) -> Result<i32, Errno> {
        if let Some(id) = self.table.find(key, flags, request.caller, |_| true)? {
            return Ok(id);
        }
        let quota = Amount {
            objects: cx.quotas.queues,
            contents: 0,
        };
        self.table.check_quota(request.caller, quota, 0)?;
        self.table
            .insert(key, flags, request.caller, |_| Queue::new(cx.now))
    }

    /// `msgsnd`, with its message in `raw`. `None`: the call is blocked.
    pub(crate) fn send(
        &mut self,
        request: &Request<'_>,
        id: i32,
        flags: i32,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> Option<Outcome> {
        self.try_send(request, id, flags, raw, cx)
            .map(|sent| sent.map(|()| Answer::Value(0)))
            .transpose()
    }

    fn try_send(
        &mut self,
        request: &Request<'_>,
        id: i32,
        flags: i32,
        raw: &[u8],
        cx: &mut Context<'_>,
    ) -> Result<Option<()>, Errno> {
        let message = Message::parse(raw)?;
        let Entry {
            perm,
            object: queue,
        } = self.table.get_mut(id)?;
        perm::check(perm, request.caller, perm::WRITE)?;
        if queue.fits(&message) {
            let mut wakes = Vec::new();
            queue.send(message, request.caller.pid, cx.now, &mut wakes);
            cx.wake(wakes);
            return Ok(Some(()));
        }
        if flags & IPC_NOWAIT != 0 {
            return Err(Errno::EAGAIN);
        }
        cx.block(request, Awaited::Queue(id));
        queue.await_room(Sender {
            call: request.call,
            caller: request.caller.clone(),
            message,
        });
        Ok(None)
    }

    /// `msgrcv`; the message comes beside the answer. `None`: the call is blocked.
    pub(crate) fn receive(
        &mut self,
        request: &Request<'_>,
        id: i32,
        size: u64,
        mtype: i64,
        flags: i32,
        cx: &mut Context<'_>,
    ) -> Option<Result<(Answer, Vec<u8>), Errno>> {
        let room = Room {
            bytes: size,
            cut: flags & MSG_NOERROR != 0,
        };
        let received = if id < 0 || size.cast_signed() < 0 {
            Err(Errno::EINVAL)
        } else if flags & MSG_COPY != 0 {
            self.copy(request, id, room, mtype, flags).map(Some)
        } else {
            let wanted = Wanted::parse(mtype, flags & MSG_EXCEPT != 0);
            self.take(request, id, room, wanted, flags, cx)
        };
        received
            .map(|message| message.map(|message| message.deliver(room)))
            .transpose()
    }

    fn take(
        &mut self,
        request: &Request<'_>,
        id: i32,
        room: Room,
        wanted: Wanted,
        flags: i32,
        cx: &mut Context<'_>,
    ) -> Result<Option<Message>, Errno> {
        let Entry {
            perm,
            object: queue,
        } = self.table.get_mut(id)?;
        perm::check(perm, request.caller, perm::READ)?;
        if let Some(at) = queue.find(wanted) {
            if let Some(message) = queue.peek(at) {
                room.check(message)?;
            }
            let mut wakes = Vec::new();
            let message = queue.take(at, perm, request.caller.pid, cx.now, &mut wakes);
            cx.wake(wakes);
            return Ok(message);
        }
        if flags & IPC_NOWAIT != 0 {
            return Err(Errno::ENOMSG);
        }
        cx.block(request, Awaited::Queue(id));
        queue.await_message(Receiver {
            call: request.call,
            caller: request.caller.clone(),
            wanted,
            room,
        });
        Ok(None)
    }

    /// MSG_COPY.
    fn copy(
        &self,
        request: &Request<'_>,
        id: i32,
        room: Room,
        position: i64,
        flags: i32,
    ) -> Result<Message, Errno> {
        if flags & MSG_EXCEPT != 0 || flags & IPC_NOWAIT == 0 {
            return Err(Errno::EINVAL);
        }
        let Entry {
            perm,
            object: queue,
        } = self.table.get(id)?;
        perm::check(perm, request.caller, perm::READ)?;
        let message = usize::try_from(position)
            .ok()
            .and_then(|at| queue.peek(at))
            .ok_or(Errno::ENOMSG)?;
        room.check(message)?;
        // A copy is never cut: Linux copies into a message of the receiver's size.
        let whole = Room { cut: false, ..room };
        whole.check(message).map_err(|_| Errno::EINVAL)?;
        Ok(message.clone())
    }

    /// `msgctl`.
    pub(crate) fn control(
        &mut self,
        request: &Request<'_>,
        id: i32,
        command: MsgCommand,
        cx: &mut Context<'_>,
    ) -> Outcome {
        if id < 0 {
            return Err(Errno::EINVAL);
        }
        match command {
            MsgCommand::Stat(by) => return self.stat(request, id, by).map(Answer::Queue),
            MsgCommand::Limits => return Ok(Answer::MsgLimits(self.limits())),
            MsgCommand::Usage => return Ok(Answer::MsgLimits(self.usage())),
            MsgCommand::Remove => {
                perm::check_control(&self.table.get(id)?.perm, request.caller)?;
                if let Some(Entry { object: queue, .. }) = self.table.remove(id) {
                    cx.wake(queue.dissolve());
                }
            }
            MsgCommand::Set { perm: new, qbytes } => {
                let Entry {
                    perm,
                    object: queue,
                } = self.table.get_mut(id)?;
                perm::check_control(perm, request.caller)?;
                // Linux takes it for an `int` on the way: only the lower half counts.
                let qbytes = qbytes as i32;
                if u64::from(qbytes.cast_unsigned()) > MSGMNB {
                    perm::check_resource(request.caller)?;
                }
                perm::update(perm, new)?;
                let mut wakes = Vec::new();
                let qbytes = i64::from(qbytes).cast_unsigned();
                queue.reset(qbytes, perm, cx.now, &mut wakes);
                cx.wake(wakes);
            }
        }
        Ok(Answer::Value(0))
    }

    /// Takes a blocked call out of its queue; nobody else can go on because of that.
    pub(crate) fn cancel(&mut self, id: i32, call: CallKey) {
        if let Ok(entry) = self.table.get_mut(id) {
            entry.object.cancel(call);
        }
    }

    fn stat(&self, request: &Request<'_>, id: i32, by: StatBy) -> Result<MsgStatus, Errno> {
        let (
            id,
            Entry {
                perm,
                object: queue,
            },
        ) = self.table.named(id, by, request.caller)?;
        let &Queue {
            stime,
            rtime,
            ctime,
            lspid,
            lrpid,
            ..
        } = queue;
        Ok(MsgStatus {
            id,
            perm: *perm,
            stime,
            rtime,
            ctime,
            cbytes: queue.bytes(),
            qnum: queue.len() as u64,
            qbytes: queue.capacity(),
            lspid,
            lrpid,
        })
    }

    fn limits(&self) -> MsgLimits {
        MsgLimits {
            msgpool: MSGPOOL,
            msgmap: MSGMNB as i32,
            msgmax: MSGMAX as i32,
            msgmnb: MSGMNB as i32,
            msgmni: MSGMNI,
            msgssz: MSGSSZ,
            msgtql: MSGMNB as i32,
            msgseg: MSGSEG,
            highest: self.table.highest(),
        }
    }

    fn usage(&self) -> MsgLimits {
        let (messages, bytes) = self
            .table
            .objects()
            .fold((0, 0), |(messages, bytes), queue| {
                (messages + queue.len() as u64, bytes + queue.bytes())
            });
        // As Linux: the lower half.
        MsgLimits {
            msgpool: self.table.in_use(),
            msgmap: messages as i32,
            msgtql: bytes as i32,
            ..self.limits()
        }
    }
}
