//! When it pays to look for something for a while before one sleeps until it comes.
//!
//! To be woken takes a core that sleeps tens of microseconds, longer than most answers take. So
//! whoever waits for a message may look for it first, for a time that he bounds. There is one rule for
//! all such waits: whether it is done is learned from those before ([`Polling`]). What a wait takes
//! that is *not* polled says nothing, as the wake-ups are in it; so what does not pay is still tried now
//! and then.

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

/// Something that comes some time after something else, in the course of other work: there is no
/// one wait that ends with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    polling: Polling,
    /// When it was told to come, in nanoseconds, if it is polled for.
    since: Option<u64>,
}

impl Expected {
    /// It will come; polled for, if that pays, for `limit` nanoseconds.
    pub fn expect(&mut self, now: u64, limit: u64) {
        // What was expected last has not come.
        if self
            .since
            .is_some_and(|since| now.saturating_sub(since) > limit)
        {
            self.polling.note(false);
        }
        self.since = self.polling.is_due().then_some(now);
    }

    /// It has come.
    pub fn came(&mut self, now: u64, limit: u64) {
        if let Some(since) = self.since.take() {
            self.polling.note(now.saturating_sub(since) <= limit);
        }
    }

    /// Whether to go on looking for it.
    #[must_use]
    pub fn is_near(&self, now: u64, limit: u64) -> bool {
        self.since
            .is_some_and(|since| now.saturating_sub(since) <= limit)
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

    #[test]
    fn what_is_expected_is_looked_for_while_it_comes_in_time() {
        const LIMIT: u64 = 100;
        let mut expected = Expected::default();
        let mut looked_for = |waits: usize, took: u64| {
            let look = |_: &usize| {
                expected.expect(1000, LIMIT);
                let is_near = expected.is_near(1000 + LIMIT / 2, LIMIT);
                assert!(!expected.is_near(1000 + LIMIT + 1, LIMIT));
                expected.came(1000 + took, LIMIT);
                is_near
            };
            (0..waits).filter(look).count()
        };
        assert_eq!(looked_for(1000, LIMIT), 1000);
        assert!(looked_for(10_000, LIMIT + 1) < 50);
        assert!(looked_for(1000, LIMIT) > 700, "it is tried again");
    }

    #[test]
    fn what_never_comes_is_not_looked_for() {
        let mut expected = Expected::default();
        let looked_for = (0..10_000).filter(|turn| {
            expected.expect(turn * 1000, 100);
            expected.is_near(turn * 1000 + 50, 100)
        });
        assert!(looked_for.count() < 50);
    }
}
