//! Locks that go on after a panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes the lock, poisoned or not. The code under our locks does not panic (lints deny it); if it did once, a gateway that
/// refuses everybody from then on would be the worse fault.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
