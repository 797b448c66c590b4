//! For how long a granted page stays (the time window of the Mirage system).
//!
//! A node that gets a page keeps it for [`Config::hold_min`] at least, whoever else asks for it, so
//! that the thread that faulted gets its work done and two writers do not merely exchange the page.
//! On a busy machine that thread may not even have run by then. So a page that nobody here has used
//! yet stays until it is, [`Config::hold_max`] at most: every grant lets some thread go on, and
//! those who spin on a page hand it over as soon as they have looked. What is asked for meanwhile
//! waits; as a window ends by time alone, it delays and never deadlocks. A page that nobody else
//! wants needs no timer: the window is only looked at when somebody asks.

use super::{Config, Time};
use serde::{Deserialize, Serialize};

/// When a page last came: 4 bytes of its line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hold {
    /// In units of 1.024 us, modulo 2^32 (73 minutes: mistaken at worst for one more window);
    /// 0 for never.
    stamp: u32,
}

/// Nanoseconds are kept divided by 2 to the power of this.
const STAMP_SHIFT: u32 = 10;

impl Hold {
    /// The page came.
    pub(super) fn mark(&mut self, now: Time) {
        self.stamp = stamp(now).max(1);
    }

    /// When to ask again whether the page, which is here, may be given away; `None` if it may.
    pub(super) fn until(
        &self,
        now: Time,
        config: &Config,
        touched: impl FnOnce() -> bool,
    ) -> Option<Time> {
        if self.stamp == 0 {
            return None;
        }
        let elapsed = u64::from(stamp(now).wrapping_sub(self.stamp)) << STAMP_SHIFT;
        if elapsed < config.hold_min {
            Some(now + (config.hold_min - elapsed))
        } else if elapsed < config.hold_max && !touched() {
            Some(now + config.hold_min.max(1))
        } else {
            None
        }
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
    const CAME: Time = 5000 << STAMP_SHIFT;

    fn held() -> Hold {
        let mut hold = Hold::default();
        hold.mark(CAME);
        hold
    }

    #[test]
    fn a_page_stays_for_the_minimum_even_if_used() {
        assert_eq!(
            held().until(CAME, &CONFIG, || true),
            Some(CAME + CONFIG.hold_min)
        );
        assert_eq!(held().until(CAME + CONFIG.hold_min, &CONFIG, || true), None);
    }

    #[test]
    fn an_unused_page_stays_until_the_maximum() {
        let due = CAME + CONFIG.hold_min;
        assert_eq!(
            held().until(due, &CONFIG, || false),
            Some(due + CONFIG.hold_min)
        );
        assert_eq!(
            held().until(CAME + CONFIG.hold_max, &CONFIG, || false),
            None
        );
    }

    #[test]
    fn a_page_that_never_came_is_not_held() {
        assert_eq!(Hold::default().until(CAME, &CONFIG, || false), None);
    }

    #[test]
    fn no_window_holds_nothing() {
        let config = Config {
            hold_min: 0,
            hold_max: 0,
        };
        assert_eq!(held().until(CAME, &config, || false), None);
    }
}
