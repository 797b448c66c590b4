//! Messages both ways between a node and the coordinator, each taken once and in order, also when the
//! link between them is lost and another takes its place, and when one side ends and comes back with what
//! it had stored.
//!
//! Each side numbers its messages from 1, keeps them until the other side says that it has them, and
//! says with each message what it has itself. On a new link both say so first, and then what the other
//! lacks. So a cut link, a coordinator that is started again and one that takes another's place are all
//! the same: nothing is lost, and nothing is done twice.
//!
//! A frame is a [`Header`], then a message, then raw bytes. Without a number it is no part of the
//! session: it opens a link, or says nothing but what has been received.
//!
//! [`Session`] is what outlives links and may be stored; [`Cursor`] is how far one link is. A side that
//! stores its session shows the other only what is stored ([`Mark`]): neither messages nor
//! acknowledgements that it would not know of when it comes back.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};

/// Bytes that one side may keep for the other.
pub const MAX_BACKLOG: usize = 256 << 20;
/// Messages that are received before it is said without a message of one's own.
const ACKNOWLEDGED_TOGETHER: u64 = 64;

/// First in each frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The message's number, or 0.
    pub number: u64,
    /// Number of the last message that the sender has received.
    pub received: u64,
}

/// One side of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Session {
    /// Number of this side's last message.
    sent: u64,
    /// Frames of this side's last messages: those that the other side may not have.
    kept: VecDeque<Bytes>,
    /// Bytes of those.
    backlog: usize,
    /// Number of the other side's last message that was taken.
    received: u64,
}

/// How far a session is, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Number of this side's last message.
    pub sent: u64,
    /// Number of the other side's last message.
    pub received: u64,
}

/// How far a link is that carries a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// Number of the last message that was put on it, or that the other side had when it was made.
    sent: u64,
    /// What the other side was told that this one has.
    told: u64,
}

/// The other side does not keep to the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message is missing.
    #[error("message {number} follows message {after}")]
    Gap {
        /// The message's number.
        number: u64,
        /// That of the last.
        after: u64,
    },
    /// What it says it has was not sent, or is kept no longer.
    #[error("it claims to have {claimed} messages of {sent}, of which {kept} are kept")]
    Unknown {
        /// What it says.
        claimed: u64,
        /// How many were sent.
        sent: u64,
        /// How many of the last could be sent again.
        kept: usize,
    },
}

impl Session {
    /// Adds a message, to be put on a link with [`Cursor::advance`].
    ///
    /// # Errors
    /// [`CodecError::TooLarge`]: nothing is added.
    pub fn send<T: Serialize>(&mut self, message: &T, raw: &[u8]) -> Result<(), CodecError> {
        let header = Header {
            number: self.sent + 1,
            received: self.received,
        };
        let frame = frame(&(header, message), raw)?;
        self.backlog += frame.len();
        self.kept.push_back(frame);
        self.sent += 1;
        Ok(())
    }

    /// Takes what a frame's header says. Whether a message follows that is to be handled: one that has
    /// been before is not.
    ///
    /// # Errors
    /// [`Violation`]: nothing is taken.
    pub fn receive(&mut self, header: Header) -> Result<bool, Violation> {
        let Header { number, received } = header;
        if number > self.received + 1 {
            let after = self.received;
            return Err(Violation::Gap { number, after });
        }
        // An older claim is one that was made on a link before this.
        if received > self.acknowledged() {
            self.resume(received)?;
        }
        let is_new = number > self.received;
        self.received += u64::from(is_new);
        Ok(is_new)
    }

    /// A new link: the other side says what it has, and gets the rest.
    ///
    /// # Errors
    /// [`Violation::Unknown`]: it cannot be given the rest.
    pub fn resume(&mut self, received: u64) -> Result<Cursor, Violation> {
        let Some(has) = received
            .checked_sub(self.acknowledged())
            .and_then(|has| usize::try_from(has).ok())
            .filter(|has| *has <= self.kept.len())
        else {
            return Err(Violation::Unknown {
                claimed: received,
                sent: self.sent,
                kept: self.kept.len(),
            });
        };
        self.backlog -= self
            .kept
            .drain(..has)
            .map(|frame| frame.len())
            .sum::<usize>();
        Ok(Cursor {
            sent: received,
            told: self.received,
        })
    }

    /// How far it is.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            sent: self.sent,
            received: self.received,
        }
    }

    /// Messages that the other side may not have.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Bytes of those; to be kept below [`MAX_BACKLOG`] by giving up the session.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.backlog
    }

    fn acknowledged(&self) -> u64 {
        self.sent - self.kept.len() as u64
    }

    /// Frames by the numbers of their messages, of those that are kept.
    fn frames(&self, numbers: Range<u64>) -> impl Iterator<Item = &Bytes> {
        let first = self.acknowledged() + 1;
        let index = |number: u64| {
            usize::try_from(number.saturating_sub(first))
                .map_or(usize::MAX, |index| index.min(self.kept.len()))
        };
        self.kept.range(index(numbers.start)..index(numbers.end))
    }
}

impl Cursor {
    /// Puts on the link, with `push`, what it has not had up to a mark: frames, or word that much was
    /// received where there is no message to go with that.
    pub fn advance(&mut self, session: &Session, mark: Mark, mut push: impl FnMut(Bytes)) {
        let Mark { sent, received } = mark;
        if sent > self.sent {
            session
                .frames(self.sent + 1..sent + 1)
                .for_each(|frame| push(frame.clone()));
            *self = Cursor {
                sent,
                told: received,
            };
        } else if received >= self.told + ACKNOWLEDGED_TOGETHER {
            push(acknowledgement(received));
            self.told = received;
        }
    }
}

/// A frame that is no part of a session, with a message.
///
/// # Errors
/// [`CodecError::TooLarge`].
pub fn opening<T: Serialize>(message: &T, received: u64) -> Result<Bytes, CodecError> {
    frame(&(Header::unnumbered(received), message), &[])
}

impl Header {
    fn unnumbered(received: u64) -> Header {
        Header {
            number: 0,
            received,
        }
    }
}

fn acknowledgement(received: u64) -> Bytes {
    frame(&Header::unnumbered(received), &[]).expect("two numbers fit")
}

fn frame<T: Serialize>(message: &T, raw: &[u8]) -> Result<Bytes, CodecError> {
    let mut frame = Vec::with_capacity(MESSAGE_ROOM + raw.len());
    codec::encode_frame(message, raw, &mut frame)?;
    Ok(frame.into())
}

/// Room for a header and a message without raw bytes; more is allocated where it is needed.
const MESSAGE_ROOM: usize = 128;
