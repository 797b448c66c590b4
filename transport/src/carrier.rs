//! A link that carries a session.

use migshm_protocol::session::{Cursor, Mark, Session};

use crate::link::FrameSender;

/// The sending half of a link, and what it has had of a session.
#[derive(Debug)]
pub struct Carrier {
    sender: FrameSender,
    cursor: Cursor,
}

impl Carrier {
    /// A link that goes on at `cursor`.
    #[must_use]
    pub fn new(sender: FrameSender, cursor: Cursor) -> Carrier {
        Carrier { sender, cursor }
    }

    /// Sends what the link has not had up to `mark`; does not wait.
    pub fn advance(&mut self, session: &Session, mark: Mark) {
        let sender = &self.sender;
        self.cursor
            .advance(session, mark, |frame| sender.send_frame(frame));
    }

    /// The link.
    #[must_use]
    pub fn sender(&self) -> &FrameSender {
        &self.sender
    }
}
