//! What the words mean.

/// A semaphore: value, bits 0 to 15; who changed it last, a pid or a seat, 22 bits; two marks;
/// version, 24 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Semaphore(pub(crate) u64);

/// What the process in a seat is about to do: semaphore, bits 0 to 14; [`Intent::USED`]; operation,
/// 16 bits; number, 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Intent(pub(crate) u64);

/// What the process in a seat owes to a semaphore: 16 bits; 16 unused; the number of the operation
/// that changed it last, 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Debt(pub(crate) u64);

const WHO_SHIFT: u32 = 16;
/// Linux's pids are below 2^22 (`PID_MAX_LIMIT`).
const WHO_MASK: u64 = (1 << 22) - 1;
const UNSETTLED: u64 = 1 << 38;
const VERSION_SHIFT: u32 = 40;

impl Semaphore {
    /// Nobody but the daemon may change the semaphore.
    pub(crate) const CLOSED: u64 = 1 << 39;

    pub(crate) fn value(self) -> u16 {
        self.0 as u16
    }

    /// Of a semaphore that is not unsettled.
    pub(crate) fn pid(self) -> i32 {
        (self.0 >> WHO_SHIFT & WHO_MASK) as i32
    }

    /// Of one that is.
    pub(crate) fn seat(self) -> usize {
        (self.0 >> WHO_SHIFT & WHO_MASK) as usize
    }

    pub(crate) fn is_closed(self) -> bool {
        self.0 & Semaphore::CLOSED != 0
    }

    pub(crate) fn is_unsettled(self) -> bool {
        self.0 & UNSETTLED != 0
    }

    /// The next version, with a new value; as closed as before.
    pub(crate) fn changed(self, value: u16, pid: i32) -> Semaphore {
        let version = (self.0 >> VERSION_SHIFT).wrapping_add(1) << VERSION_SHIFT;
        let closed = self.0 & Semaphore::CLOSED;
        Semaphore(version | closed | who(u64::from(pid.cast_unsigned())) | u64::from(value))
    }

    /// As [`Semaphore::changed`], by the process in a seat.
    pub(crate) fn unsettled(self, value: u16, seat: usize) -> Semaphore {
        Semaphore(self.changed(value, 0).0 | who(seat as u64) | UNSETTLED)
    }

    /// The same version, settled.
    pub(crate) fn settled(self, pid: i32) -> Semaphore {
        let rest = self.0 & !(UNSETTLED | WHO_MASK << WHO_SHIFT);
        Semaphore(rest | who(u64::from(pid.cast_unsigned())))
    }

    pub(crate) fn opened(self) -> Semaphore {
        Semaphore(self.0 & !Semaphore::CLOSED)
    }
}

fn who(who: u64) -> u64 {
    (who & WHO_MASK) << WHO_SHIFT
}

impl Intent {
    /// The seat was used since the daemon last looked.
    pub(crate) const USED: u64 = 1 << 15;

    pub(crate) fn new(num: usize, op: i16, number: u32) -> Intent {
        let op = u64::from(op.cast_unsigned());
        Intent(num as u64 | Intent::USED | op << 16 | u64::from(number) << 32)
    }

    pub(crate) fn num(self) -> usize {
        (self.0 & (Intent::USED - 1)) as usize
    }

    fn op(self) -> i16 {
        ((self.0 >> 16) as u16).cast_signed()
    }

    pub(crate) fn number(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl Debt {
    pub(crate) fn new(owed: i16, number: u32) -> Debt {
        Debt(u64::from(owed.cast_unsigned()) | u64::from(number) << 32)
    }

    pub(crate) fn owed(self) -> i16 {
        (self.0 as u16).cast_signed()
    }

    pub(crate) fn number(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Once the intended operation is done.
    pub(crate) fn after(self, intent: Intent) -> Debt {
        Debt::new(self.owed().wrapping_sub(intent.op()), intent.number())
    }
}
