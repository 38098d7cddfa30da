//! When a certificate is asked for: the first time, before it ends, and again after it could not be had. No clock of its own.

use std::time::Duration;

/// After the first failure; doubled by each further one. Authorities bound failures by the hour.
const FIRST_WAIT: u64 = 60;

/// Longest wait after failures.
const LONGEST_WAIT: u64 = 6 * 60 * 60;

/// Wait where an authority has said that it was asked too often.
const LIMITED_WAIT: u64 = 60 * 60;

/// No certificate is replaced by advice before a hundredth of its time is over, an hour at most: an authority that always advises "now"
/// would be asked without end.
const LONGEST_REST: u64 = 60 * 60;

/// How often the authority is asked for its own advice, whatever it says of that itself (RFC 9773 §4.3).
const ADVICE_EVERY: std::ops::RangeInclusive<u64> = 60..=24 * 60 * 60;

/// When the authority's advice is asked for again where it could not be had.
const ADVICE_RETRY: u64 = 6 * 60 * 60;

/// When one certificate is to be asked for. Times are unix seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// By what is held: when it is to be renewed. None is held: at once.
    renewal: u64,
    /// By the authority's advice, which counts instead while there is some.
    advised: Option<u64>,
    ask_advice_at: u64,
    /// Not before this, by whatever advice.
    rests_until: u64,
    failures: u32,
    not_before: u64,
}

/// A certificate that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// When it became valid.
    pub begins: u64,
    /// When it expires.
    pub ends: u64,
}

impl Schedule {
    /// What is held has changed: nothing, or another certificate. It is renewed when `renew_before` is left of it, by default a
    /// third of its whole time. `chance` (0 to 1) spreads it over the last tenth before that, so that not all come at once.
    pub fn holds(&mut self, term: Option<Term>, renew_before: Option<Duration>, chance: f64) {
        let Some(Term { begins, ends }) = term else {
            (self.renewal, self.advised, self.rests_until) = (0, None, 0);
            return;
        };
        let whole = ends.saturating_sub(begins);
        self.rests_until = begins.saturating_add((whole / 100).min(LONGEST_REST));
        // One that was asked for with more time left than it has would be asked for again at once, for ever.
        let left = renew_before.map_or(whole / 3, |wanted| wanted.as_secs()).min(whole * 9 / 10);
        let latest = ends.saturating_sub(left);
        self.renewal = latest - within(latest.saturating_sub(begins) / 10, chance);
        self.advised = None;
        self.ask_advice_at = 0;
    }

    /// Whether it is to be asked for now.
    #[must_use]
    pub fn is_due(&self, now: u64) -> bool {
        now >= self.due_at()
    }

    /// When it is to be asked for next.
    #[must_use]
    pub fn due_at(&self) -> u64 {
        self.advised.unwrap_or(self.renewal).max(self.rests_until).max(self.not_before)
    }

    /// Whether the authority's advice is to be asked for now.
    #[must_use]
    pub fn wants_advice(&self, now: u64) -> bool {
        self.renewal > 0 && now >= self.ask_advice_at
    }

    /// The authority advises to renew between `start` and `end`, and to ask again in `again` seconds. `chance` as above.
    pub fn advise(&mut self, start: u64, end: u64, again: u64, chance: f64, now: u64) {
        self.ask_advice_at = now.saturating_add(again.clamp(*ADVICE_EVERY.start(), *ADVICE_EVERY.end()));
        // RFC 9773 §4.2: a window that ends before it begins is none.
        if start >= end {
            self.advised = None;
            return;
        }
        // The moment is chosen once, else asking often would mean renewing early.
        if self.advised.is_none_or(|chosen| !(start..=end).contains(&chosen)) {
            self.advised = Some(start + within(end - start, chance));
        }
    }

    /// There is no advice to be had: the certificate's own time counts.
    pub fn not_advised(&mut self, now: u64) {
        self.ask_advice_at = now.saturating_add(ADVICE_RETRY);
    }

    /// It could not be had. `limited`: the authority was asked too often.
    pub fn failed(&mut self, now: u64, limited: bool, chance: f64) {
        let doubled = FIRST_WAIT.saturating_mul(1 << self.failures.min(20)).min(LONGEST_WAIT);
        let wait = if limited { doubled.max(LIMITED_WAIT) } else { doubled };
        self.failures = self.failures.saturating_add(1);
        self.not_before = now.saturating_add(wait + within(wait / 4, chance));
    }

    /// What is to be known of failures after a restart: without, one that starts again and again would ask again and again.
    #[must_use]
    pub fn record(&self) -> String {
        format!("{} {}\n", self.failures, self.not_before)
    }

    /// Goes on where a [`record`](Self::record) was made. One that is none, or speaks of too far ahead (the clock was set back), is passed
    /// over.
    pub fn restore(&mut self, record: &str, now: u64) {
        let numbers = record.trim().split_once(' ').and_then(|(failures, not_before)| {
            Some((failures.parse::<u32>().ok()?, not_before.parse::<u64>().ok()?))
        });
        if let Some((failures, not_before)) = numbers
            && not_before <= now.saturating_add(LONGEST_WAIT * 5 / 4)
        {
            (self.failures, self.not_before) = (failures, not_before);
        }
    }

    /// It was had.
    pub fn succeeded(&mut self) {
        (self.failures, self.not_before) = (0, 0);
    }

    /// An operator wants it now.
    pub fn hurry(&mut self) {
        (self.renewal, self.advised, self.not_before, self.rests_until) = (0, None, 0, 0);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "seconds"
)]
fn within(span: u64, chance: f64) -> u64 {
    (span as f64 * chance.clamp(0.0, 1.0)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * 60 * 60;
    const NOW: u64 = 1_800_000_000;

    fn held(days: u64) -> Option<Term> {
        Some(Term { begins: NOW, ends: NOW + days * DAY })
    }

    #[test]
    fn without_one_it_is_asked_for_at_once_and_else_when_a_third_is_left() {
        let mut schedule = Schedule::default();
        assert!(schedule.is_due(NOW) && !schedule.wants_advice(NOW));
        schedule.holds(held(90), None, 0.0);
        assert_eq!(schedule.due_at(), NOW + 60 * DAY);
        assert!(!schedule.is_due(NOW + 60 * DAY - 1) && schedule.is_due(NOW + 60 * DAY));
        // Spread, and never later than that.
        schedule.holds(held(90), None, 1.0);
        assert_eq!(schedule.due_at(), NOW + 54 * DAY);
        schedule.holds(held(90), Some(Duration::from_secs(20 * DAY)), 0.0);
        assert_eq!(schedule.due_at(), NOW + 70 * DAY);
        // More than it has at all: not for ever anew.
        schedule.holds(held(10), Some(Duration::from_secs(20 * DAY)), 0.5);
        assert!(!schedule.is_due(NOW) && schedule.is_due(NOW + DAY));
        schedule.holds(None, None, 0.0);
        assert!(schedule.is_due(NOW));
    }

    #[test]
    fn failures_wait_longer_and_longer_and_success_forgets_them() {
        let mut schedule = Schedule::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            schedule.failed(NOW, false, 0.0);
            assert!(!schedule.is_due(NOW));
            waits.push(schedule.due_at() - NOW);
        }
        assert_eq!(waits[..4], [60, 120, 240, 480]);
        assert_eq!(waits[11], LONGEST_WAIT);
        schedule.failed(NOW, false, 1.0);
        assert_eq!(schedule.due_at() - NOW, LONGEST_WAIT * 5 / 4);
        schedule.succeeded();
        assert!(schedule.is_due(NOW));
        schedule.failed(NOW, true, 0.0);
        assert_eq!(schedule.due_at() - NOW, LIMITED_WAIT);
        schedule.hurry();
        assert!(schedule.is_due(NOW));
    }

    #[test]
    fn failures_are_known_after_a_restart() {
        let mut schedule = Schedule::default();
        for _ in 0..3 {
            schedule.failed(NOW, false, 0.5);
        }
        let mut again = Schedule::default();
        again.restore(&schedule.record(), NOW + 10);
        assert_eq!(again, schedule);
        for junk in ["", "1", "1 2 3", "x 1", "1 x", "-1 5", "3 1800099999", "3 99999999999999999999"] {
            let mut fresh = Schedule::default();
            fresh.restore(junk, NOW);
            assert_eq!(fresh, Schedule::default(), "{junk}");
        }
    }

    /// RFC 9773 §4.2.
    #[test]
    fn the_authoritys_advice_counts_while_there_is_some() {
        let mut schedule = Schedule::default();
        schedule.holds(held(90), None, 0.0);
        assert!(schedule.wants_advice(NOW));
        let (start, end) = (NOW + 10 * DAY, NOW + 12 * DAY);
        schedule.advise(start, end, 6 * 60 * 60, 0.5, NOW);
        assert_eq!(schedule.due_at(), NOW + 11 * DAY);
        assert!(!schedule.wants_advice(NOW + 6 * 60 * 60 - 1) && schedule.wants_advice(NOW + 6 * 60 * 60));
        // The same window again: the moment stays. Another one: another moment.
        schedule.advise(start, end, 6 * 60 * 60, 0.9, NOW);
        assert_eq!(schedule.due_at(), NOW + 11 * DAY);
        schedule.advise(NOW - DAY, NOW - 1, 6 * 60 * 60, 0.0, NOW);
        assert!(!schedule.is_due(NOW), "it has only just been issued");
        assert!(schedule.is_due(NOW + LONGEST_REST), "a window that is over: as soon as may be");
        // No window, or none that is one: its own time counts.
        schedule.advise(end, start, 0, 0.0, NOW);
        assert_eq!(schedule.due_at(), NOW + 60 * DAY);
        assert!(!schedule.wants_advice(NOW + 59), "asked once in a minute at most");
        schedule.advise(start, end, u64::MAX, 0.0, NOW);
        assert!(schedule.wants_advice(NOW + DAY), "and once in a day at least");
        schedule.not_advised(NOW);
        assert!(!schedule.wants_advice(NOW + ADVICE_RETRY - 1));
        // A failure holds against any advice.
        schedule.advise(NOW - DAY, NOW - 1, 0, 0.0, NOW);
        schedule.failed(NOW, false, 0.0);
        assert!(!schedule.is_due(NOW));
    }
}
