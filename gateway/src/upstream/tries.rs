//! The tries of one request or WebSocket over the endpoints of its upstream.

use std::time::Instant;

use http::Method;
use sealgate_policy::Denial;

use super::{
    Chosen, ConnectError, Key, Members, NoEndpoint, Tried, Upstream,
    pool::{SendError, Unanswered},
};
use crate::http::body::RequestBody;

/// Which endpoints were tried, and whether another one may be.
///
/// Again, and elsewhere, goes only what cannot be done twice by it (RFC 9110 §9.2.2): a request of which nothing was sent; or one of
/// an idempotent method whose body is at hand as a whole. Each other endpoint counts against the upstream's `retries` and,
/// over all requests, against its budget.
pub struct Tries<'a> {
    upstream: &'a Upstream,
    members: &'a Members,
    key: Key<'a>,
    tried: Tried,
    left: u32,
    /// The latest try is not the first.
    again: bool,
}

impl<'a> Tries<'a> {
    /// Those of a request or WebSocket that begins now.
    #[must_use]
    pub fn begin(upstream: &'a Upstream, members: &'a Members, key: Key<'a>) -> Self {
        let left = if members.is_single() { 0 } else { upstream.retries };
        if left > 0 {
            upstream.budget.request();
        }
        Self { upstream, members, key, tried: Tried::default(), left, again: false }
    }

    /// The first endpoint.
    ///
    /// # Errors
    /// [`NoEndpoint`].
    pub fn first(&mut self) -> Result<Chosen<'a>, NoEndpoint> {
        self.members.choose(self.key, &mut self.tried)
    }

    /// Another endpoint after one that did not answer, and what it is to be sent.
    ///
    /// # Errors
    /// The fault that stays, where there is none or there must be none.
    pub fn next(
        &mut self,
        unanswered: Unanswered,
        method: &Method,
    ) -> Result<(Chosen<'a>, RequestBody), SendError> {
        let Unanswered { error, sent, body, .. } = unanswered;
        let Some(body) = body.filter(|_| error.is_of_endpoint() && (!sent || method.is_idempotent())) else {
            self.gave_up();
            return Err(error);
        };
        match self.another(&error) {
            Some(chosen) => Ok((chosen, body)),
            None => Err(error),
        }
    }

    /// Another endpoint after one that could not be connected to.
    ///
    /// # Errors
    /// The fault that stays, where there is none or there must be none.
    pub fn connect_next(&mut self, error: ConnectError) -> Result<Chosen<'a>, ConnectError> {
        self.another(&error).ok_or(error)
    }

    fn another(&mut self, error: &dyn std::fmt::Display) -> Option<Chosen<'a>> {
        let counters = &self.upstream.counters;
        self.gave_up();
        self.left = self.left.checked_sub(1)?;
        // Whether there is one first, since the budget is for those that are made.
        let chosen = self.members.choose(self.key, &mut self.tried).ok()?;
        if !self.upstream.budget.take(self.upstream.retry_budget, Instant::now()) {
            counters.retries_refused.inc();
            return None;
        }
        tracing::info!(upstream = %self.upstream.name, %error, "no answer from one endpoint; another one is asked");
        self.again = true;
        Some(chosen)
    }

    /// The latest try brought nothing.
    fn gave_up(&mut self) {
        if std::mem::take(&mut self.again) {
            self.upstream.counters.retries_failed.inc();
        }
    }

    /// The latest try brought an answer.
    pub fn answered(&self) {
        if self.again {
            self.upstream.counters.retries_answered.inc();
        }
    }
}

impl From<NoEndpoint> for Denial {
    fn from(none: NoEndpoint) -> Self {
        match none {
            NoEndpoint::Unavailable => Self::UpstreamUnavailable,
            NoEndpoint::CircuitOpen { retry_after } => Self::UpstreamCircuitOpen { retry_after },
        }
    }
}
