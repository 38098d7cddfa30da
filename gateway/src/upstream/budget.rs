//! How many retries an upstream's requests may make, so that an outage is not multiplied.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::lock::lock;

/// Over which requests and retries are weighed against each other.
const WINDOW: Duration = Duration::from_secs(10);

/// Retries in a window that are allowed however few requests there are.
const FLOOR: u64 = 10;

/// The retries of one upstream, over all cores; reloads change nothing of it.
#[derive(Debug)]
pub(super) struct Budget {
    /// All so far. The only thing that every request touches.
    requests: AtomicU64,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    /// Requests before it.
    base: u64,
    /// Requests in the one before, or as many as there were in such a time.
    before: u64,
    retries: u64,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        let window = Window { began: now, base: 0, before: 0, retries: 0 };
        Self { requests: AtomicU64::new(0), window: Mutex::new(window) }
    }

    /// A request came; not its retries.
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    /// Takes a retry: of the requests in this window, or in the one before if those were more, `percent` may.
    pub(super) fn take(&self, percent: u32, now: Instant) -> bool {
        let requests = self.requests.load(Relaxed);
        let mut window = lock(&self.window);
        let elapsed = now.saturating_duration_since(window.began);
        if elapsed >= WINDOW {
            // Nobody looked for longer, perhaps.
            let share = WINDOW.as_secs_f64() / elapsed.as_secs_f64();
            let before = (requests.saturating_sub(window.base) as f64 * share) as u64;
            *window = Window { began: now, base: requests, before, retries: 0 };
        }
        let weighed = requests.saturating_sub(window.base).max(window.before);
        let allowed = FLOOR.saturating_add(weighed.saturating_mul(percent.into()) / 100);
        let taken = window.retries < allowed;
        window.retries += u64::from(taken);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &Budget, percent: u32, now: Instant) -> usize {
        (0..10_000).take_while(|_| budget.take(percent, now)).count()
    }

    #[test]
    fn a_few_are_always_allowed_and_a_share_beyond() {
        let now = Instant::now();
        let budget = Budget::new(now);
        assert_eq!(taken(&budget, 20, now), 10);
        assert_eq!(taken(&budget, 20, now + WINDOW / 2), 0);
        (0..1000).for_each(|_| budget.request());
        assert_eq!(taken(&budget, 20, now + WINDOW / 2), 200);
        assert_eq!(taken(&budget, 0, now + WINDOW / 2), 0);
    }

    #[test]
    fn a_new_window_goes_by_the_pace_of_the_one_before() {
        let start = Instant::now();
        let budget = Budget::new(start);
        (0..1000).for_each(|_| budget.request());
        assert_eq!(taken(&budget, 20, start + WINDOW), 210);
        // After a minute that nobody asked in, only the floor is left.
        assert_eq!(taken(&budget, 20, start + WINDOW * 7), 10);
        // 700 requests in 70 seconds are 100 in a window.
        (0..700).for_each(|_| budget.request());
        assert_eq!(taken(&budget, 20, start + WINDOW * 14), 30);
    }
}
