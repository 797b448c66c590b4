//! What the process has learned of polling, shared by its threads; zeros at first.

use std::sync::atomic::{AtomicU32, Ordering};

use migshm_protocol::polling;

/// See [`polling::Polling`].
pub struct Polling(AtomicU32);

impl Polling {
    /// Whether to poll the wait that begins.
    pub fn is_due(&self) -> bool {
        self.change(polling::Polling::is_due)
    }

    /// What was waited for came, or did not, while it was polled for.
    pub fn note(&self, came: bool) {
        self.change(|polling| polling.note(came));
    }

    /// Begins anew.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn change<T>(&self, change: impl FnOnce(&mut polling::Polling) -> T) -> T {
        let before = self.0.load(Ordering::Relaxed);
        let mut polling = polling::Polling::from_bits(before);
        let result = change(&mut polling);
        if polling.to_bits() != before {
            self.0.store(polling.to_bits(), Ordering::Relaxed);
        }
        result
    }
}
