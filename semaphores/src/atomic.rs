//! The atomic words of the model, whose threads can be killed before any access.

use std::cell::Cell;

use loom::sync::atomic::Ordering;

loom::thread_local! {
    /// Accesses that the thread has left; `None`: any number.
    static LEFT: Cell<Option<usize>> = Cell::new(None);
}

/// Ends of a thread's effects.
#[derive(Debug)]
pub struct Kill;

impl Kill {
    /// The calling thread is killed once it has made this many accesses: those that follow have
    /// no effect, and its swaps appear to succeed, so that it comes to its end.
    pub fn after(accesses: usize) {
        LEFT.with(|left| left.set(Some(accesses)));
    }

    fn is_dead() -> bool {
        LEFT.with(|left| match left.get() {
            None => false,
            Some(0) => true,
            Some(more) => {
                left.set(Some(more - 1));
                false
            }
        })
    }
}

/// loom's, for threads that can be killed.
#[derive(Debug)]
pub struct AtomicU64(loom::sync::atomic::AtomicU64);

#[allow(missing_docs, reason = "as in the standard library")]
impl AtomicU64 {
    #[must_use]
    pub fn new(value: u64) -> AtomicU64 {
        AtomicU64(loom::sync::atomic::AtomicU64::new(value))
    }

    pub fn load(&self, order: Ordering) -> u64 {
        // What a dead thread reads has no effect; this ends its loops.
        if Kill::is_dead() {
            0
        } else {
            self.0.load(order)
        }
    }

    pub fn store(&self, value: u64, order: Ordering) {
        if !Kill::is_dead() {
            self.0.store(value, order);
        }
    }

    pub fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.0.swap(value, order)
    }

    pub fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.0.fetch_or(bits, order)
    }

    pub fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        self.0.fetch_and(bits, order)
    }

    pub fn compare_exchange(
        &self,
        from: u64,
        to: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        if Kill::is_dead() {
            return Ok(from);
        }
        self.0.compare_exchange(from, to, success, failure)
    }
}
