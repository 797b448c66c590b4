//! What a process owes to the semaphores of one set: `semadj`.

use migshm_protocol::limits::SEMVMX;
use serde::{Deserialize, Serialize};

/// Adjustments by semaphore, ascending; those that are not here are 0.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Undo(Vec<(u16, i16)>);

impl Undo {
    /// Adds `change` to what is owed to a semaphore; false, and nothing changed, if that exceeds
    /// SEMAEM.
    pub(crate) fn adjust(&mut self, num: u16, change: i32) -> bool {
        if change == 0 {
            return true;
        }
        let at = self.0.binary_search_by_key(&num, |&(num, _)| num);
        let owed = at.map_or(0, |at| i32::from(self.0[at].1));
        let Ok(owed) = i16::try_from(owed + change) else {
            return false;
        };
        match at {
            Ok(at) => self.0[at].1 = owed,
            Err(at) => self.0.insert(at, (num, owed)),
        }
        true
    }

    /// The semaphores that something is owed to, and how much.
    pub(crate) fn owed(&self) -> impl Iterator<Item = (u16, i16)> {
        self.0.iter().copied()
    }

    /// Owes nothing to a semaphore any longer.
    pub(crate) fn clear(&mut self, num: u16) {
        if let Ok(at) = self.0.binary_search_by_key(&num, |&(num, _)| num) {
            self.0.remove(at);
        }
    }

    /// Owes nothing any longer.
    pub(crate) fn clear_all(&mut self) {
        self.0.clear();
    }

    /// Pays what is owed, within 0..=SEMVMX; returns the semaphores that it was owed to.
    pub(crate) fn apply(self, values: &mut [u16]) -> impl Iterator<Item = u16> {
        self.0
            .into_iter()
            .filter(|&(_, owed)| owed != 0)
            .map(|(num, owed)| {
                let value = &mut values[usize::from(num)];
                *value = (i32::from(*value) + i32::from(owed)).clamp(0, SEMVMX) as u16;
                num
            })
    }
}
