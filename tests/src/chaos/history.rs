//! What clients noted of their operations: the log of `c-tests/chaos/client.c`.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

/// Bytes of an entry in a log.
const ENTRY: usize = 48;

/// What a client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Loaded a register.
    Read,
    /// Stored to a register.
    Write,
    /// Compared a register, and stored to it if it was as expected.
    Swap,
    /// Added to a counter.
    Add,
    /// Added up the balances of the bank.
    Audit,
    /// Put a value into the ring.
    Push,
    /// Took a value out of the ring.
    Pop,
    /// `msgsnd`.
    Send,
    /// `msgrcv`.
    Receive,
    /// Moved money between accounts.
    Transfer,
    /// Took tokens and gave them back.
    Take,
}

/// One operation of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Whose it is.
    pub client: u32,
    /// When it began, in nanoseconds of a clock that all clients share.
    pub invoked: u64,
    /// When it was over; `None` if its client did not live to see that.
    pub returned: Option<u64>,
    /// What it is.
    pub kind: Kind,
    /// The register or counter; the type of a message.
    pub object: u32,
    /// What is written, added, sent; of a [`Kind::Pop`] without an end what it was about to take, or 0; of a
    /// [`Kind::Receive`] the type that is wanted.
    pub argument: i64,
    /// What a [`Kind::Swap`] expects.
    pub expected: i64,
    /// What was there, or taken; or an errno, negative.
    pub result: i64,
}

impl Operation {
    /// Whether it ended before another began.
    #[must_use]
    pub fn precedes(&self, other: &Operation) -> bool {
        self.returned.is_some_and(|end| end < other.invoked)
    }

    /// Whether it came to its end and did what it was to do.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.returned.is_some() && self.result >= 0
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operation {
            client,
            invoked,
            kind,
            object,
            argument,
            expected,
            result,
            ..
        } = self;
        write!(f, "{invoked:>16}")?;
        match self.returned {
            Some(end) => write!(f, " +{:>10} ns", end.saturating_sub(*invoked))?,
            None => write!(f, "       never  ")?,
        }
        write!(f, "  client {client:<4} {kind:?} {object} ")?;
        match kind {
            Kind::Swap => write!(f, "{expected:#x} for {argument:#x}")?,
            Kind::Receive | Kind::Add => write!(f, "{argument}")?,
            _ => write!(f, "{argument:#x}")?,
        }
        match (self.returned, *result) {
            (None, _) => Ok(()),
            (_, result @ ..0) => write!(f, " -> errno {}", -result),
            (_, result) => write!(f, " -> {result:#x}"),
        }
    }
}

/// Reads a client's log, in the order of its operations.
///
/// # Errors
/// A file that cannot be read, or that is no log.
pub fn load(path: &Path, client: u32) -> io::Result<Vec<Operation>> {
    let bytes = fs::read(path)?;
    let entries = bytes.chunks_exact(ENTRY).map(parse);
    let mut operations = Vec::new();
    for entry in entries.take_while(|entry| entry[0] != 0) {
        let [invoked, returned, what, argument, expected, result] = entry;
        let kind = kind(what as u32).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}", path.display()))
        })?;
        operations.push(Operation {
            client,
            invoked,
            returned: (returned != 0).then_some(returned),
            kind,
            object: (what >> 32) as u32,
            argument: argument.cast_signed(),
            expected: expected.cast_signed(),
            result: result.cast_signed(),
        });
    }
    Ok(operations)
}

fn parse(entry: &[u8]) -> [u64; 6] {
    let word = |at: usize| {
        let bytes = entry[8 * at..8 * at + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    std::array::from_fn(word)
}

fn kind(number: u32) -> Option<Kind> {
    Some(match number {
        1 => Kind::Read,
        2 => Kind::Write,
        3 => Kind::Swap,
        4 => Kind::Add,
        5 => Kind::Audit,
        6 => Kind::Push,
        7 => Kind::Pop,
        8 => Kind::Send,
        9 => Kind::Receive,
        10 => Kind::Transfer,
        11 => Kind::Take,
        _ => return None,
    })
}
