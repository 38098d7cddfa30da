//! When an endpoint that fails is left alone: a circuit breaker, without a clock of its own.
//!
//! Closed, everything passes. After so many failures in a row it opens, and nothing does. When its time is over a few
//! requests try the endpoint: one answer closes it, one failure opens it again.

use std::time::Instant;

use sealgate_policy::Breaker;

/// The breaker of one endpoint.
#[derive(Debug)]
pub(super) struct Circuit {
    state: State,
    /// How often it opened. A verdict counts for the opening after which its request was let pass, and for no later one.
    openings: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed {
        /// In a row.
        failures: u32,
    },
    Open {
        until: Instant,
    },
    HalfOpen {
        /// Under way.
        trials: u32,
    },
}

/// By what right a request goes to the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// The circuit was closed.
    Free,
    /// It tries the endpoint, after so many openings.
    Trial(u64),
}

/// What a failure led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failed {
    /// Nothing yet, or nothing more.
    Noted,
    /// The endpoint is left alone from now on.
    Opened,
}

impl Circuit {
    pub(super) fn new() -> Self {
        Self { state: State::Closed { failures: 0 }, openings: 0 }
    }

    /// Lets a request pass, which ends by [`Self::succeeded`], [`Self::failed`] or [`Self::abandoned`].
    pub(super) fn admit(&mut self, breaker: &Breaker, now: Instant) -> Option<Pass> {
        if !self.would_admit(breaker, now) {
            return None;
        }
        let trials = match self.state {
            State::Closed { .. } => return Some(Pass::Free),
            State::Open { .. } => 0,
            State::HalfOpen { trials } => trials,
        };
        self.state = State::HalfOpen { trials: trials + 1 };
        Some(Pass::Trial(self.openings))
    }

    /// Whether [`Self::admit`] would.
    pub(super) fn would_admit(&self, breaker: &Breaker, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { until } => now >= until,
            State::HalfOpen { trials } => trials < breaker.trials,
        }
    }

    /// The endpoint answered.
    pub(super) fn succeeded(&mut self, pass: Pass) {
        match (self.state, pass) {
            (State::Closed { .. }, _) => self.state = State::Closed { failures: 0 },
            (State::HalfOpen { .. }, Pass::Trial(opening)) if opening == self.openings => {
                self.state = State::Closed { failures: 0 };
            }
            // Of a time that is over: it says nothing of the endpoint now.
            (State::Open { .. } | State::HalfOpen { .. }, _) => {}
        }
    }

    /// It did not, or not to the end.
    pub(super) fn failed(&mut self, pass: Pass, breaker: &Breaker, now: Instant) -> Failed {
        match (self.state, pass) {
            (State::Closed { failures }, _) if failures + 1 < breaker.failures => {
                self.state = State::Closed { failures: failures + 1 };
                Failed::Noted
            }
            (State::Closed { .. }, _) => self.open(breaker, now),
            (State::HalfOpen { .. }, Pass::Trial(opening)) if opening == self.openings => {
                self.open(breaker, now)
            }
            (State::Open { .. } | State::HalfOpen { .. }, _) => Failed::Noted,
        }
    }

    /// The request ended without telling anything of the endpoint: its client left.
    pub(super) fn abandoned(&mut self, pass: Pass) {
        if let (State::HalfOpen { trials }, Pass::Trial(opening)) = (self.state, pass)
            && opening == self.openings
        {
            self.state = State::HalfOpen { trials: trials.saturating_sub(1) };
        }
    }

    fn open(&mut self, breaker: &Breaker, now: Instant) -> Failed {
        self.state = State::Open { until: now + breaker.open_for };
        self.openings += 1;
        Failed::Opened
    }

    /// Nothing is held against the endpoint.
    pub(super) fn is_calm(&self) -> bool {
        self.state == State::Closed { failures: 0 }
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// When the endpoint is tried again; `None` unless it is left alone.
    pub(super) fn open_until(&self) -> Option<Instant> {
        match self.state {
            State::Open { until } => Some(until),
            State::Closed { .. } | State::HalfOpen { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const BREAKER: Breaker =
        Breaker { failures: 3, open_for: Duration::from_secs(10), trials: 2, server_errors: false };

    fn opened(now: Instant) -> Circuit {
        let mut circuit = Circuit::new();
        for _ in 0..2 {
            assert_eq!(circuit.failed(Pass::Free, &BREAKER, now), Failed::Noted);
        }
        assert_eq!(circuit.failed(Pass::Free, &BREAKER, now), Failed::Opened);
        circuit
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_not_before() {
        let now = Instant::now();
        let mut circuit = Circuit::new();
        for _ in 0..10 {
            circuit.failed(Pass::Free, &BREAKER, now);
            circuit.failed(Pass::Free, &BREAKER, now);
            circuit.succeeded(Pass::Free);
        }
        assert!(circuit.is_calm());
        let mut circuit = opened(now);
        assert_eq!(circuit.admit(&BREAKER, now + Duration::from_millis(9999)), None);
        assert_eq!(circuit.open_until(), Some(now + BREAKER.open_for));
    }

    #[test]
    fn it_is_tried_by_a_few_and_one_answer_closes_it() {
        let now = Instant::now();
        let mut circuit = opened(now);
        let later = now + BREAKER.open_for;
        let first = circuit.admit(&BREAKER, later).unwrap();
        let second = circuit.admit(&BREAKER, later).unwrap();
        assert_eq!(circuit.admit(&BREAKER, later), None);
        // One whose client left makes room.
        circuit.abandoned(second);
        assert_eq!(circuit.admit(&BREAKER, later), Some(second));
        circuit.succeeded(first);
        assert!(circuit.is_calm());
        assert_eq!(circuit.admit(&BREAKER, later), Some(Pass::Free));
    }

    #[test]
    fn a_failed_trial_opens_it_again_and_late_verdicts_say_nothing() {
        let now = Instant::now();
        let mut circuit = opened(now);
        let later = now + BREAKER.open_for;
        let first = circuit.admit(&BREAKER, later).unwrap();
        let second = circuit.admit(&BREAKER, later).unwrap();
        assert_eq!(circuit.failed(first, &BREAKER, later), Failed::Opened);
        // Those of before neither close it nor make its time longer.
        circuit.succeeded(Pass::Free);
        circuit.succeeded(second);
        assert_eq!(circuit.failed(Pass::Free, &BREAKER, later + BREAKER.open_for / 2), Failed::Noted);
        assert_eq!(circuit.open_until(), Some(later + BREAKER.open_for));
        let again = later + BREAKER.open_for;
        let third = circuit.admit(&BREAKER, again).unwrap();
        circuit.abandoned(second);
        assert!(circuit.admit(&BREAKER, again).is_some());
        assert_eq!(
            circuit.admit(&BREAKER, again),
            None,
            "the second of the round before is none of this one"
        );
        circuit.succeeded(third);
        assert!(circuit.is_calm());
    }

    /// The same rules, said in another way: by the history of verdicts that count, and the set of trials.
    struct Model {
        row: u32,
        opened_at: Option<u64>,
        round: u64,
        trials: Vec<(u64, usize)>,
    }

    proptest! {
        #[test]
        fn it_does_what_a_model_does(
            steps in prop::collection::vec((0_u8..5, any::<prop::sample::Index>(), 0_u64..8), 1..200),
            failures in 1_u32..4,
            trials in 1_u32..4,
        ) {
            let breaker = Breaker { failures, open_for: Duration::from_secs(10), trials, server_errors: false };
            let start = Instant::now();
            let (mut circuit, mut clock) = (Circuit::new(), 0);
            let mut model = Model { row: 0, opened_at: None, round: 0, trials: Vec::new() };
            let mut under_way: Vec<(usize, Pass)> = Vec::new();
            for (id, (step, which, wait)) in steps.into_iter().enumerate() {
                clock += wait;
                let now = start + Duration::from_secs(clock);
                if step < 2 {
                    let current = |it: &&(u64, usize)| it.0 == model.round;
                    let expected = match model.opened_at {
                        None => true,
                        Some(at) => clock >= at + 10
                            && model.trials.iter().filter(current).count() < trials as usize,
                    };
                    prop_assert_eq!(circuit.would_admit(&breaker, now), expected);
                    let pass = circuit.admit(&breaker, now);
                    prop_assert_eq!(pass.is_some(), expected);
                    let Some(pass) = pass else { continue };
                    prop_assert_eq!(matches!(pass, Pass::Trial(_)), model.opened_at.is_some());
                    if model.opened_at.is_some() {
                        model.trials.push((model.round, id));
                    }
                    under_way.push((id, pass));
                    continue;
                }
                if under_way.is_empty() {
                    continue;
                }
                let (id, pass) = under_way.swap_remove(which.index(under_way.len()));
                let trial = model.trials.iter().position(|(_, trial)| *trial == id);
                let round = trial.map(|at| model.trials.swap_remove(at).0);
                let counts = model.opened_at.is_none() || round == Some(model.round);
                match step {
                    2 => {
                        circuit.succeeded(pass);
                        if counts {
                            (model.row, model.opened_at) = (0, None);
                        }
                    }
                    3 => {
                        let outcome = circuit.failed(pass, &breaker, now);
                        let mut opens = false;
                        if counts {
                            model.row += 1;
                            opens = model.opened_at.is_some() || model.row >= failures;
                        }
                        if opens {
                            (model.opened_at, model.row) = (Some(clock), 0);
                            model.round += 1;
                        }
                        prop_assert_eq!(outcome == Failed::Opened, opens);
                    }
                    _ => circuit.abandoned(pass),
                }
                prop_assert_eq!(circuit.is_closed(), model.opened_at.is_none());
                prop_assert_eq!(circuit.is_calm(), model.opened_at.is_none() && model.row == 0);
            }
        }
    }
}
