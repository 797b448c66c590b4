//! When it pays to look for something for a while before one sleeps until it comes.

/// Whether to poll the next wait of a kind, learned from those before: after each that polling did
/// not shorten more of them are not polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polling(u32);

/// How many waits are not polled: the lower bits; above them, how often polling has failed of late.
const SKIPS: u32 = 0xffff;
const FAILURES_SHIFT: u32 = 16;
/// At most 2 to this power waits are not polled in a row.
const FAILURES_MAX: u32 = 8;

impl Polling {
    /// As [`Polling::to_bits`] gave it; 0 is the beginning.
    #[must_use]
    pub fn from_bits(bits: u32) -> Polling {
        Polling(bits)
    }

    /// For memory that several threads share: what one overwrites of another does no harm.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        self.0
    }

    /// Whether to poll the wait that begins.
    pub fn is_due(&mut self) -> bool {
        let is_due = self.0 & SKIPS == 0;
        if !is_due {
            self.0 -= 1;
        }
        is_due
    }

    /// What was waited for came, or did not, while it was polled for.
    pub fn note(&mut self, came: bool) {
        let failures = self.0 >> FAILURES_SHIFT;
        let (failures, skips) = if came {
            (failures / 2, 0)
        } else {
            let failures = (failures + 1).min(FAILURES_MAX);
            (failures, (1 << failures) - 1)
        };
        self.0 = failures << FAILURES_SHIFT | skips;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many waits, how many are polled if all end as told.
    fn polled(polling: &mut Polling, waits: usize, come: bool) -> usize {
        let poll = |_: &usize| {
            let is_due = polling.is_due();
            if is_due {
                polling.note(come);
            }
            is_due
        };
        (0..waits).filter(poll).count()
    }

    #[test]
    fn what_pays_is_done_and_what_does_not_is_hardly_ever() {
        let mut polling = Polling::default();
        assert_eq!(polled(&mut polling, 1000, true), 1000);
        assert!(polled(&mut polling, 10_000, false) < 50);
        assert!(polled(&mut polling, 1000, true) > 700, "it is tried again");
    }

    #[test]
    fn any_bits_are_a_state() {
        let mut polling = Polling::from_bits(u32::MAX);
        polling.note(false);
        assert!(polled(&mut polling, 1000, true) > 700);
    }
}
