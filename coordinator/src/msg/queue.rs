//! One message queue: its messages, those who wait to send, and those who wait to receive.
//!
//! A message that a waiting receiver wants never enters the queue, and a message that is in the
//! queue is wanted by no waiting receiver. The rules are Linux's:
//!
//! 1. A message is sent if there is room for it: its bytes within `msg_qbytes`, and no more
//!    messages than `msg_qbytes` either. That holds also if a receiver already waits for it.
//! 2. It goes to the receiver that has waited longest of those that want it; one that wants it and
//!    has not the room for it fails with E2BIG on the way. If nobody takes it, it is queued.
//! 3. A receiver takes the first message that it wants; one that names a range of types takes the
//!    first of the lowest type. If there is none, it waits.
//! 4. Who takes a message out of the queue wakes the senders: each whose message alone would now
//!    have room tries again, in the order in which they came. One that comes too late, as those
//!    before it took the room, starts at the end of the line. The others keep their places, and
//!    so a small message may pass a large one. A message that goes from hand to hand by rule 2
//!    makes no room, and wakes nobody.
//! 5. IPC_SET may take permissions away and make room: receivers are checked again, then senders
//!    wake by rule 4, and are checked again.
//!
//! In the kernel whoever is woken has to win the race to the queue, against others woken with it
//! and against newcomers. Here everybody acts in the order in which he is woken, before anyone
//! else comes; of all the outcomes that the kernel allows this is the fair one.

use migshm_protocol::call::{Answer, Caller, Errno, MSG_TYPE_SIZE, Perm};
use migshm_protocol::limits::{MSGMAX, MSGMNB};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use crate::perm;
use crate::processes::{CallKey, Wake};

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    mtype: i64,
    text: Vec<u8>,
}

/// Which messages a receiver wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Wanted {
    /// The first.
    Any,
    /// The first of this type.
    Type(i64),
    /// The first of another type.
    Except(i64),
    /// The first of the lowest type that is at most this.
    UpTo(i64),
}

/// A blocked `msgsnd`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sender {
    pub(crate) call: CallKey,
    pub(crate) caller: Caller,
    pub(crate) message: Message,
}

/// A blocked `msgrcv`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Receiver {
    pub(crate) call: CallKey,
    pub(crate) caller: Caller,
    pub(crate) wanted: Wanted,
    pub(crate) room: Room,
}

/// How much text a receiver can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Room {
    pub(crate) bytes: u64,
    /// Whether what exceeds it is cut off (MSG_NOERROR), rather than an error.
    pub(crate) cut: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Queue {
    pub(crate) stime: i64,
    pub(crate) rtime: i64,
    pub(crate) ctime: i64,
    pub(crate) lspid: i32,
    pub(crate) lrpid: i32,
    /// Capacity.
    qbytes: u64,
    /// Of the text of all messages.
    bytes: u64,
    messages: VecDeque<Message>,
    senders: VecDeque<Sender>,
    receivers: VecDeque<Receiver>,
}

impl Message {
    /// Reads a `struct msgbuf`: EINVAL for a type that is not positive, or too much text.
    pub(crate) fn parse(raw: &[u8]) -> Result<Message, Errno> {
        let (mtype, text) = raw
            .split_first_chunk::<MSG_TYPE_SIZE>()
            .ok_or(Errno::EINVAL)?;
        let mtype = i64::from_le_bytes(*mtype);
        if text.len() > MSGMAX || mtype < 1 {
            return Err(Errno::EINVAL);
        }
        let text = text.to_vec();
        Ok(Message { mtype, text })
    }

    /// The answer that brings it, cut to what the receiver can take, and what follows the answer.
    pub(crate) fn deliver(&self, room: Room) -> (Answer, Vec<u8>) {
        let length = usize::try_from(room.bytes)
            .unwrap_or(usize::MAX)
            .min(self.text.len());
        let mut raw = Vec::with_capacity(MSG_TYPE_SIZE + length);
        raw.extend_from_slice(&self.mtype.to_le_bytes());
        raw.extend_from_slice(&self.text[..length]);
        let length = u32::try_from(length).expect("at most MSGMAX");
        (Answer::Message(length), raw)
    }

    fn len(&self) -> u64 {
        self.text.len() as u64
    }
}

impl Wanted {
    /// Reads the type and the flag of `msgrcv`.
    pub(crate) fn parse(mtype: i64, except: bool) -> Wanted {
        match mtype {
            0 => Wanted::Any,
            // What the lowest number stands for does not exist; Linux takes the highest.
            ..0 => Wanted::UpTo(mtype.checked_neg().unwrap_or(i64::MAX)),
            _ if except => Wanted::Except(mtype),
            _ => Wanted::Type(mtype),
        }
    }

    fn includes(self, message: &Message) -> bool {
        match self {
            Wanted::Any => true,
            Wanted::Type(mtype) => message.mtype == mtype,
            Wanted::Except(mtype) => message.mtype != mtype,
            Wanted::UpTo(mtype) => message.mtype <= mtype,
        }
    }
}

impl Room {
    /// E2BIG unless the receiver can take the message.
    pub(crate) fn check(self, message: &Message) -> Result<(), Errno> {
        if self.cut || message.len() <= self.bytes {
            Ok(())
        } else {
            Err(Errno::E2BIG)
        }
    }
}

impl Queue {
    pub(crate) fn new(now: i64) -> Queue {
        Queue {
            stime: 0,
            rtime: 0,
            ctime: now,
            lspid: 0,
            lrpid: 0,
            qbytes: MSGMNB,
            bytes: 0,
            messages: VecDeque::new(),
            senders: VecDeque::new(),
            receivers: VecDeque::new(),
        }
    }

    /// `msg_qbytes`.
    pub(crate) fn capacity(&self) -> u64 {
        self.qbytes
    }

    /// `msg_cbytes`.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `msg_qnum`.
    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there is room for the message.
    pub(crate) fn fits(&self, message: &Message) -> bool {
        let (count, bytes) = (self.messages.len() as u64, self.bytes);
        message.len().saturating_add(bytes) <= self.qbytes && count < self.qbytes
    }

    /// Rule 2: sends a message that fits.
    pub(crate) fn send(&mut self, message: Message, pid: i32, now: i64, wakes: &mut Vec<Wake>) {
        self.lspid = pid;
        self.stime = now;
        while let Some(at) = self
            .receivers
            .iter()
            .position(|r| r.wanted.includes(&message))
        {
            let receiver = self.receivers.remove(at).expect("it is there");
            if let Err(errno) = receiver.room.check(&message) {
                wakes.push(Wake::failed(receiver.call, errno));
                continue;
            }
            self.lrpid = receiver.caller.pid;
            self.rtime = now;
            let (answer, raw) = message.deliver(receiver.room);
            return wakes.push(Wake {
                call: receiver.call,
                outcome: Ok(answer),
                raw,
            });
        }
        self.bytes += message.len();
        self.messages.push_back(message);
    }

    /// Queues a call whose message does not fit.
    pub(crate) fn await_room(&mut self, sender: Sender) {
        self.senders.push_back(sender);
    }

    /// Rule 3: where the message is that a receiver would take.
    pub(crate) fn find(&self, wanted: Wanted) -> Option<usize> {
        let mut candidates = self
            .messages
            .iter()
            .enumerate()
            .filter(|(_, message)| wanted.includes(message));
        let found = match wanted {
            // Of equal ones the first.
            Wanted::UpTo(_) => candidates.min_by_key(|(_, message)| message.mtype),
            _ => candidates.next(),
        };
        found.map(|(at, _)| at)
    }

    /// The message at this position.
    pub(crate) fn peek(&self, at: usize) -> Option<&Message> {
        self.messages.get(at)
    }

    /// Takes the message at this position out; senders may go on.
    pub(crate) fn take(
        &mut self,
        at: usize,
        perm: &Perm,
        pid: i32,
        now: i64,
        wakes: &mut Vec<Wake>,
    ) -> Option<Message> {
        let message = self.messages.remove(at)?;
        self.bytes -= message.len();
        self.lrpid = pid;
        self.rtime = now;
        self.wake_senders(perm, now, wakes);
        Some(message)
    }

    /// Queues a call that found no message it wants.
    pub(crate) fn await_message(&mut self, receiver: Receiver) {
        self.receivers.push_back(receiver);
    }

    /// Rule 5: the queue has another capacity, and the permissions `perm`.
    pub(crate) fn reset(&mut self, qbytes: u64, perm: &Perm, now: i64, wakes: &mut Vec<Wake>) {
        self.qbytes = qbytes;
        self.ctime = now;
        self.receivers.retain(|receiver| {
            let allowed = perm::check(perm, &receiver.caller, perm::READ);
            if let Err(errno) = allowed {
                wakes.push(Wake::failed(receiver.call, errno));
            }
            allowed.is_ok()
        });
        self.wake_senders(perm, now, wakes);
    }

    /// Takes a waiter out.
    pub(crate) fn cancel(&mut self, call: CallKey) {
        self.senders.retain(|sender| sender.call != call);
        self.receivers.retain(|receiver| receiver.call != call);
    }

    /// The queue is removed, and its messages with it.
    pub(crate) fn dissolve(self) -> Vec<Wake> {
        let receivers = self.receivers.into_iter().map(|receiver| receiver.call);
        let senders = self.senders.into_iter().map(|sender| sender.call);
        receivers
            .chain(senders)
            .map(|call| Wake::failed(call, Errno::EIDRM))
            .collect()
    }

    /// Rule 4.
    fn wake_senders(&mut self, perm: &Perm, now: i64, wakes: &mut Vec<Wake>) {
        let (woken, waiting) = std::mem::take(&mut self.senders)
            .into_iter()
            .partition::<VecDeque<_>, _>(|sender| self.fits(&sender.message));
        self.senders = waiting;
        for sender in woken {
            let Sender {
                call,
                caller,
                message,
            } = sender;
            if let Err(errno) = perm::check(perm, &caller, perm::WRITE) {
                wakes.push(Wake::failed(call, errno));
            } else if self.fits(&message) {
                self.send(message, caller.pid, now, wakes);
                wakes.push(Wake::done(call));
            } else {
                self.senders.push_back(Sender {
                    call,
                    caller,
                    message,
                });
            }
        }
    }
}
