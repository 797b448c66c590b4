//! For how long a granted page stays (the time window of the Mirage system).
//!
//! A node that gets a page keeps it for a minimum time, whoever else asks for it, so that the
//! thread that faulted gets its work done and two writers do not merely exchange the page. The
//! window starts at [`Config::hold_min`]. It doubles, up to [`Config::hold_max`], each time the
//! page is missed again soon after it was taken away, and halves for each `hold_max` of peace.
//! What is asked for meanwhile waits; as a window ends by time alone, it delays and never
//! deadlocks. A page that nobody else wants needs no timer: the window is only looked at when
//! somebody asks.

use super::{Config, Time};

/// When a page last came or was taken away, and how contended it is: 8 bytes with the line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hold {
    /// In units of 1.024 us, modulo 2^32 (73 minutes: mistaken at worst for one more window);
    /// 0 for never.
    stamp: u32,
    /// How many times the window has doubled.
    doublings: u8,
}

/// Nanoseconds are kept divided by 2 to the power of this.
const STAMP_SHIFT: u32 = 10;

impl Hold {
    /// The page came, or was taken away.
    pub(super) fn mark(&mut self, now: Time) {
        self.stamp = stamp(now).max(1);
    }

    /// The page, once taken away, is missed.
    pub(super) fn missed(&mut self, now: Time, config: &Config) {
        if self.stamp == 0 {
            return;
        }
        let away = self.since(now);
        if away < config.hold_max {
            if self.window(config) < config.hold_max {
                self.doublings = (self.doublings + 1).min(31);
            }
        } else {
            let halvings = (away / config.hold_max.max(1)).min(u64::from(u8::MAX)) as u8;
            self.doublings = self.doublings.saturating_sub(halvings);
        }
    }

    /// When the page, which is here, may be given away; `None` if now.
    pub(super) fn until(&self, now: Time, config: &Config) -> Option<Time> {
        let window = self.window(config);
        let elapsed = self.since(now);
        (self.stamp != 0 && elapsed < window).then(|| now + (window - elapsed))
    }

    fn window(&self, config: &Config) -> Time {
        config
            .hold_min
            .saturating_mul(1 << self.doublings)
            .min(config.hold_max)
    }

    fn since(&self, now: Time) -> Time {
        u64::from(stamp(now).wrapping_sub(self.stamp)) << STAMP_SHIFT
    }
}

fn stamp(now: Time) -> u32 {
    (now >> STAMP_SHIFT) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        hold_min: 100 << STAMP_SHIFT,
        hold_max: 800 << STAMP_SHIFT,
    };

    #[test]
    fn a_page_is_held_for_the_minimum_at_first() {
        let mut hold = Hold::default();
        assert_eq!(hold.until(0, &CONFIG), None);
        let came = 5 << STAMP_SHIFT;
        hold.mark(came);
        assert_eq!(hold.until(came, &CONFIG), Some(came + CONFIG.hold_min));
        assert_eq!(hold.until(came + CONFIG.hold_min, &CONFIG), None);
    }

    #[test]
    fn contention_doubles_the_window_up_to_the_maximum_and_peace_halves_it() {
        let mut hold = Hold::default();
        let mut now = 1 << 20;
        hold.mark(now);
        for expected in [2, 4, 8, 8] {
            hold.missed(now, &CONFIG);
            assert_eq!(hold.window(&CONFIG), expected * CONFIG.hold_min);
        }
        now += CONFIG.hold_max;
        hold.missed(now, &CONFIG);
        assert_eq!(hold.window(&CONFIG), 4 * CONFIG.hold_min);
        now += 100 * CONFIG.hold_max;
        hold.missed(now, &CONFIG);
        assert_eq!(hold.window(&CONFIG), CONFIG.hold_min);
    }

    #[test]
    fn a_window_of_zero_holds_nothing() {
        let config = Config {
            hold_min: 0,
            hold_max: 0,
        };
        let mut hold = Hold::default();
        hold.mark(7 << STAMP_SHIFT);
        hold.missed(7 << STAMP_SHIFT, &config);
        assert_eq!(hold.until(7 << STAMP_SHIFT, &config), None);
    }
}
