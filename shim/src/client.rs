//! One call and its answer.
//!
//! A [`Session`] is the exclusive use of a connection for the length of one System V call: a
//! request, its answer, for some calls another exchange. The daemon learns who calls from the
//! socket's credentials, which the kernel took when the connection was made; so a connection made
//! under another user or group is replaced first.
//!
//! # Interruption
//!
//! A wait that a signal handler interrupts makes an interruptible call send `Cancel` and go on
//! waiting: the daemon's answer alone says whether the operation took place. Signals are blocked
//! from before the request is sent until the wait begins, so that none goes unnoticed in between.
//!
//! A handler that forks leaves two processes in the call, which is the parent's. So whatever is sent
//! or received is with signals blocked and by the parent: the child makes its call anew if nothing
//! has been sent yet, and is interrupted if something has.

use std::os::fd::OwnedFd;

use migshm_protocol::call::{Answer, Call, Errno};
use migshm_protocol::local::{FromNode, ToNode};

use crate::complain::complain;
use crate::connection::{Connection, Failure, Patience, Raw, Reply};
use crate::pool::{self, Claim};
use crate::process::{self, Wiped};
use crate::start::Absent;
use crate::sys::{self, SignalsBlocked};

/// For how long an answer is looked for before the thread sleeps, in nanoseconds: that of a daemon
/// on this machine comes in less, also if it has to wake up.
const POLLED: u64 = 50_000;

/// Makes one call that is one exchange and cannot be interrupted.
pub fn call(call: Call) -> Result<Answer, Errno> {
    Session::begin()?.call(call, Raw::NONE)
}

/// Tells a daemon that is there that nothing is mapped any more in a range, and waits until it
/// has noted that.
pub fn tell_unmapping(address: usize, length: usize) -> Result<(), Errno> {
    tell_change(|id| ToNode::Unmapping {
        id,
        address: address as u64,
        length: length as u64,
    })
}

/// Tells a daemon that is there that attaches may be elsewhere, and waits until it has looked.
pub fn tell_remapped() -> Result<(), Errno> {
    tell_change(|id| ToNode::Remapped { id })
}

/// Tells a daemon that is there that processes have been seen to end, and waits until all nodes see
/// what that has changed.
pub fn tell_reaped() -> Result<(), Errno> {
    tell_change(|id| ToNode::Reaped { id })
}

/// Asks a daemon that is there how far from an address on a range may be made writable: the first
/// address that may not be, or the range's end.
pub fn ask_permitted(address: usize, length: usize) -> Result<usize, Errno> {
    let session = Session::begin_with(Absent::Fail)?;
    let id = process::request_id();
    let message = ToNode::Permitting {
        id,
        address: address as u64,
        length: length as u64,
    };
    session.tell(&message, Raw::NONE, None)?;
    match session.reply(id, Patience::Endless)?.message {
        FromNode::Permitted { until, .. } => Ok(until as usize),
        FromNode::Answer {
            outcome: Err(errno),
            ..
        } => Err(errno),
        _ => Err(out_of_step()),
    }
}

fn tell_change(message: impl FnOnce(u64) -> ToNode) -> Result<(), Errno> {
    let session = Session::begin_with(Absent::Fail)?;
    let id = process::request_id();
    session.tell(&message(id), Raw::NONE, None)?;
    session.outcome(id, Patience::Endless).map(drop)
}

/// Tells a daemon that is there about this process.
pub fn say_hello() -> Result<(), Errno> {
    Session::begin_with(Absent::Fail).map(drop)
}

/// Exclusive use of a connection.
pub struct Session {
    own: &'static Wiped,
    claim: Option<Claim>,
    connection: Connection,
}

impl Session {
    /// Claims a connection, made and daemon started if need be.
    ///
    /// # Errors
    /// `ENOSYS` if there is no daemon and none can be started, or what the daemon refuses with.
    pub fn begin() -> Result<Session, Errno> {
        Session::begin_with(Absent::Start)
    }

    fn begin_with(absent: Absent) -> Result<Session, Errno> {
        let own = process::own()?;
        let claimed = pool::claim(own);
        let claim = claimed.map(|(claim, _)| claim);
        if let Some(connection) = claimed.and_then(|(_, connection)| connection) {
            if connection.is_usable() {
                return Ok(Session {
                    own,
                    claim,
                    connection,
                });
            }
            connection.abandon();
            note(claim, None);
        }
        match Connection::open(own, absent) {
            Ok((connection, device)) => {
                if let Some(device) = device {
                    sys::close(device);
                }
                note(claim, Some(connection));
                Ok(Session {
                    own,
                    claim,
                    connection,
                })
            }
            Err(errno) => {
                if let Some(claim) = claim {
                    pool::release(own, claim);
                }
                Err(errno)
            }
        }
    }

    /// Whether the daemon tracks the address spaces that attach.
    pub fn tracks(&self) -> bool {
        self.connection.track
    }

    /// Replaces the connection by a new one; gives the `/dev/userfaultfd` that came with it.
    pub fn renew(&mut self) -> Result<Option<OwnedFd>, Errno> {
        let (connection, device) = Connection::open(self.own, Absent::Start)?;
        self.connection.abandon();
        self.connection = connection;
        note(self.claim, Some(connection));
        Ok(device)
    }

    /// A call that is answered without waiting for other processes.
    pub fn call(&mut self, call: Call, raw: Raw) -> Result<Answer, Errno> {
        let id = process::request_id();
        self.request(&ToNode::Call { id, call }, raw)?;
        self.outcome(id, Patience::Endless)
    }

    /// Sends the first message of an exchange. The daemon may have ended since the connection was
    /// last used; it has not seen the message then, so a new one gets it.
    ///
    /// # Errors
    /// `EFAULT` if `raw` cannot be read.
    pub fn request(&mut self, message: &ToNode, raw: Raw) -> Result<(), Errno> {
        let sent = {
            let _signals = SignalsBlocked::new();
            let is_own = !self.is_inherited();
            is_own.then(|| self.connection.send(message, raw, None))
        };
        match sent {
            Some(Ok(())) => return Ok(()),
            Some(Err(Failure::Errno(errno))) => return Err(errno),
            Some(Err(Failure::Lost)) => {
                if let Some(device) = self.renew()? {
                    sys::close(device);
                }
            }
            None => {
                // The child may claim the same slot.
                self.claim = None;
                *self = Session::begin()?;
            }
        }
        self.tell(message, raw, None)
    }

    /// Sends a further message of an exchange, which only this daemon can understand.
    pub fn tell(
        &self,
        message: &ToNode,
        raw: Raw,
        descriptor: Option<&OwnedFd>,
    ) -> Result<(), Errno> {
        let _signals = SignalsBlocked::new();
        if self.is_inherited() {
            return Err(Errno::EINTR);
        }
        self.connection
            .send(message, raw, descriptor)
            .map_err(Failure::into_errno)
    }

    /// Waits for the outcome of request `id`.
    pub fn outcome(&self, id: u64, patience: Patience) -> Result<Answer, Errno> {
        match self.reply(id, patience)?.message {
            FromNode::Answer { outcome, .. } => outcome,
            _ => Err(out_of_step()),
        }
    }

    /// Waits for the reply to request `id`; earlier requests' replies are dropped. Always waits
    /// until the daemon has answered, whatever the patience: that ends in a `Cancel` that speeds
    /// the answer up.
    pub fn reply(&self, id: u64, mut patience: Patience) -> Result<Reply, Errno> {
        let mut polled = self.poll(&patience);
        loop {
            let received = match polled.take() {
                Some(received) => received,
                None => self
                    .wait(&patience)
                    .and_then(|_signals| self.connection.receive(0)),
            };
            let failure = match received {
                Ok((reply, _)) if replies_to(&reply.message) == Some(id) => {
                    report_unserved(&reply.message);
                    return Ok(reply);
                }
                Ok(_) => continue,
                Err(failure) => failure,
            };
            self.bear(failure, id, &mut patience)?;
        }
    }

    /// Looks for a message for a while, if that is likely to spare this thread from sleeping: it
    /// takes longer to wake a processor that has nothing to do than to answer most calls.
    fn poll(&self, patience: &Patience) -> Option<Result<(Reply, usize), Failure>> {
        let polling = match patience {
            Patience::Endless => &self.own.answers,
            Patience::UntilHandler(_) | Patience::UntilSignal(..) => &self.own.late_answers,
        };
        if !polling.is_due() {
            return None;
        }
        let _signals = matches!(patience, Patience::Endless).then(SignalsBlocked::new);
        if self.is_inherited() {
            return None;
        }
        let start = sys::nanoseconds(sys::monotonic());
        loop {
            match self.connection.receive(libc::MSG_DONTWAIT) {
                Err(Failure::Errno(Errno::EAGAIN)) => {}
                received => {
                    polling.note(true);
                    return Some(received);
                }
            }
            if sys::nanoseconds(sys::monotonic()) - start > POLLED {
                polling.note(false);
                return None;
            }
        }
    }

    /// Waits for a message. Signals are blocked when it is there: unless the patience has blocked
    /// them, until what is returned is dropped.
    fn wait(&self, patience: &Patience) -> Result<Option<SignalsBlocked>, Failure> {
        let signals = matches!(patience, Patience::Endless).then(SignalsBlocked::new);
        if self.is_inherited() {
            return Err(Errno::EINTR.into());
        }
        match &signals {
            Some(signals) => self.connection.wait_endlessly(signals)?,
            None => self.connection.wait(patience)?,
        }
        Ok(signals)
    }

    /// After a wait that failed: if it only ended early, there is patience for another.
    fn bear(&self, failure: Failure, id: u64, patience: &mut Patience) -> Result<(), Errno> {
        if self.is_inherited() {
            // A handler forked: this is the child, and the call its parent's.
            return Err(Errno::EINTR);
        }
        match (failure, &patience) {
            (Failure::Errno(Errno::EINTR), Patience::Endless) => Ok(()),
            (Failure::Errno(errno), Patience::UntilHandler(_) | Patience::UntilSignal(..)) => {
                *patience = Patience::Endless;
                self.tell(&ToNode::Cancel { id, errno }, Raw::NONE, None)
            }
            (failure, _) => Err(failure.into_errno()),
        }
    }

    /// As [`Session::outcome`], for an answer whose raw bytes go to an address that the program
    /// gave.
    ///
    /// # Errors
    /// `EFAULT` if it cannot be written to.
    pub fn outcome_at(
        &self,
        id: u64,
        mut patience: Patience,
        address: usize,
    ) -> Result<Answer, Errno> {
        loop {
            // The message's length is unknown until it is decoded: peek, then receive it with
            // the raw bytes going where they belong.
            let peeked = self.wait(&patience).and_then(|signals| {
                let peeked = self.connection.receive(libc::MSG_PEEK)?;
                Ok((peeked, signals))
            });
            let ((reply, length), _signals) = match peeked {
                Ok(peeked) => peeked,
                Err(failure) => {
                    self.bear(failure, id, &mut patience)?;
                    continue;
                }
            };
            let mine = replies_to(&reply.message) == Some(id);
            let raw = match reply.message {
                FromNode::Answer {
                    outcome: Ok(answer),
                    ..
                } if mine => Raw {
                    address,
                    length: answer.raw_length(),
                },
                _ => Raw::NONE,
            };
            self.connection.consume(length, raw)?;
            report_unserved(&reply.message);
            match reply.message {
                FromNode::Answer { outcome, .. } if mine => return outcome,
                _ if mine => return Err(out_of_step()),
                _ => {}
            }
        }
    }
}

impl Session {
    /// Whether a signal handler has forked during the call, and this is the child: the connection
    /// is the parent's.
    fn is_inherited(&self) -> bool {
        self.claim
            .is_some_and(|claim| !pool::is_claimed(self.own, claim))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.is_inherited() {
            return;
        }
        match self.claim {
            Some(claim) => pool::release(self.own, claim),
            None => self.connection.abandon(),
        }
    }
}

fn note(claim: Option<Claim>, connection: Option<Connection>) {
    if let Some(claim) = claim {
        pool::note(claim, connection);
    }
}

/// The request that a message answers.
fn replies_to(message: &FromNode) -> Option<u64> {
    match message {
        FromNode::Answer { id, .. }
        | FromNode::Permitted { id, .. }
        | FromNode::Detaching { id, .. } => Some(*id),
        FromNode::Welcome { .. } | FromNode::Refused { .. } => None,
    }
}

/// Complains if the daemon serves nobody any more: no call fails with `ENOSYS` otherwise.
fn report_unserved(message: &FromNode) {
    if let FromNode::Answer {
        outcome: Err(Errno::ENOSYS),
        ..
    } = message
    {
        complain(format_args!(
            "the node daemon has lost its coordinator; restart it once that runs again"
        ));
    }
}

/// A reply that fits no request: shim and daemon are not of one build.
pub fn out_of_step() -> Errno {
    complain(format_args!(
        "the node daemon is of another version; restart it"
    ))
}
