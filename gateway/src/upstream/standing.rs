//! What is known of one endpoint, over all cores: what it has under way, and whether it is fit.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
    time::Instant,
};

use http::StatusCode;
use prometheus::IntCounter;
use sealgate_policy::{Breaker, Health};

use super::{
    Address,
    circuit::{Circuit, Failed, Pass},
};
use crate::lock::lock;

/// One endpoint of one upstream. Lives as long as the endpoint stays one, reloads and new addresses beside it or not.
pub(super) struct Standing {
    upstream: Arc<str>,
    pub(super) address: Address,
    /// Requests and WebSockets under way.
    load: Arc<AtomicUsize>,
    /// By the health checks; true where there are none.
    healthy: AtomicBool,
    /// Checks in a row that say otherwise than `healthy`.
    dissent: AtomicUsize,
    breaker: Option<Breaker>,
    circuit: Mutex<Circuit>,
    /// What stands in `circuit`, for those who need not take the lock: everything passes.
    closed: AtomicBool,
    /// And no failure is remembered.
    calm: AtomicBool,
    openings: IntCounter,
}

impl Standing {
    pub(super) fn new(
        upstream: Arc<str>,
        address: Address,
        breaker: Option<Breaker>,
        openings: IntCounter,
    ) -> Self {
        Self {
            upstream,
            address,
            load: Arc::default(),
            healthy: AtomicBool::new(true),
            dissent: AtomicUsize::new(0),
            breaker,
            circuit: Mutex::new(Circuit::new()),
            closed: AtomicBool::new(true),
            calm: AtomicBool::new(true),
            openings,
        }
    }

    /// The same endpoint under other rules for its health: what it has under way it still has.
    pub(super) fn under(&self, breaker: Option<Breaker>) -> Self {
        let new = Self::new(self.upstream.clone(), self.address.clone(), breaker, self.openings.clone());
        Self { load: self.load.clone(), ..new }
    }

    pub(super) fn load(&self) -> usize {
        self.load.load(Relaxed)
    }

    pub(super) fn is_healthy(&self) -> bool {
        self.healthy.load(Relaxed)
    }

    /// A health check has its outcome.
    pub(super) fn checked(&self, fit: bool, health: &Health) {
        if fit == self.is_healthy() {
            return self.dissent.store(0, Relaxed);
        }
        let enough = if fit { health.healthy } else { health.unhealthy };
        // INVARIANT: one check at a time (`Members::check_health`).
        if self.dissent.fetch_add(1, Relaxed) + 1 >= enough as usize {
            self.dissent.store(0, Relaxed);
            self.healthy.store(fit, Relaxed);
            let (upstream, address) = (&self.upstream, &self.address);
            if fit {
                tracing::info!(%upstream, %address, "the endpoint is healthy again");
            } else {
                tracing::warn!(%upstream, %address, "the endpoint is not healthy");
            }
        }
    }

    /// Whether it is healthy and would be let pass to.
    pub(super) fn is_available(&self, now: Instant) -> bool {
        self.is_healthy() && self.would_admit(now)
    }

    pub(super) fn would_admit(&self, now: Instant) -> bool {
        match &self.breaker {
            Some(breaker) if !self.closed.load(Acquire) => lock(&self.circuit).would_admit(breaker, now),
            _ => true,
        }
    }

    /// When its breaker lets pass again; `None` while it is not open.
    pub(super) fn open_until(&self) -> Option<Instant> {
        if self.closed.load(Acquire) { None } else { lock(&self.circuit).open_until() }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Acquire)
    }

    /// Begins a request or WebSocket; `None` where the breaker does not let it pass.
    pub(super) fn admit(self: &Arc<Self>, now: Instant) -> Option<Underway> {
        let pass = match &self.breaker {
            Some(breaker) if !self.closed.load(Acquire) => {
                self.with(|circuit| circuit.admit(breaker, now))?
            }
            _ => Pass::Free,
        };
        self.load.fetch_add(1, Relaxed);
        Some(Underway(Some(Place { standing: self.clone(), pass, settled: false })))
    }

    fn with<T>(&self, change: impl FnOnce(&mut Circuit) -> T) -> T {
        let mut circuit = lock(&self.circuit);
        let outcome = change(&mut circuit);
        self.closed.store(circuit.is_closed(), Release);
        self.calm.store(circuit.is_calm(), Release);
        outcome
    }

    fn succeeded(&self, pass: Pass) {
        if self.breaker.is_none() || self.calm.load(Acquire) {
            return;
        }
        let was_closed = self.closed.load(Acquire);
        self.with(|circuit| circuit.succeeded(pass));
        if !was_closed && self.closed.load(Acquire) {
            tracing::info!(upstream = %self.upstream, address = %self.address, "the endpoint answers again");
        }
    }

    fn failed(&self, pass: Pass, now: Instant) {
        let Some(breaker) = &self.breaker else { return };
        if self.with(|circuit| circuit.failed(pass, breaker, now)) == Failed::Opened {
            self.openings.inc();
            tracing::warn!(
                upstream = %self.upstream, address = %self.address, open_for = ?breaker.open_for,
                "the endpoint failed too often and is left alone"
            );
        }
    }

    fn abandoned(&self, pass: Pass) {
        if matches!(pass, Pass::Trial(_)) {
            self.with(|circuit| circuit.abandoned(pass));
        }
    }
}

/// A request or WebSocket under way at an endpoint. Its drop is the end, and by itself says nothing of the endpoint.
///
/// Empty where nobody counts: with one endpoint, or in turn, without a breaker.
#[derive(Default)]
pub struct Underway(Option<Place>);

struct Place {
    standing: Arc<Standing>,
    pass: Pass,
    /// The verdict has been given.
    settled: bool,
}

impl Underway {
    /// The head of an answer came. It may still break off, so what counts is its end ([`Self::ended`]); but a trial is over, or a
    /// long answer would keep all others waiting.
    pub fn answered(&mut self, status: StatusCode) {
        let Some(place) = &mut self.0 else { return };
        let Some(breaker) = &place.standing.breaker else { return };
        let is_fault = matches!(
            status,
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        );
        if breaker.server_errors && is_fault {
            place.settle(|standing, pass| standing.failed(pass, Instant::now()));
        } else if let Pass::Trial(_) = place.pass {
            place.standing.succeeded(place.pass);
            place.pass = Pass::Free;
        }
    }

    /// The answer came to its end, or the WebSocket is open.
    pub fn ended(&mut self) {
        if let Some(place) = &mut self.0 {
            place.settle(Standing::succeeded);
        }
    }

    /// There was no answer, or it broke off.
    pub fn failed(&mut self) {
        if let Some(place) = &mut self.0 {
            place.settle(|standing, pass| standing.failed(pass, Instant::now()));
        }
    }
}

impl Place {
    fn settle(&mut self, verdict: impl FnOnce(&Standing, Pass)) {
        if !std::mem::replace(&mut self.settled, true) {
            verdict(&self.standing, self.pass);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.settle(Standing::abandoned);
        self.standing.load.fetch_sub(1, AcqRel);
    }
}
