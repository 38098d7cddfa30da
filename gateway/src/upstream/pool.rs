//! Kept-alive HTTP/1.1 connections to the endpoints, one pool for each core.
//!
//! A connection has no task of its own: whoever waits for a response, or reads its body, drives it. That
//! saves the wake-ups between two tasks on every request, and an unused connection costs its memory only.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{self, Connection, SendRequest},
    },
};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, Sleep};

use super::{ConnectError, Endpoint, Upstream, UpstreamStream};
use crate::http::body::{Fate, RequestBody};

/// The connections of one core. Never leaves its thread.
#[derive(Default)]
pub struct Pool {
    /// By `EndpointId`; the last used first out, so that surplus ones age and go.
    idle: RefCell<Vec<Vec<Idle>>>,
}

struct Idle {
    wire: Wire,
    since: Instant,
}

/// A connection, and what drives it.
struct Wire {
    sender: SendRequest<RequestBody>,
    connection: Pin<Box<Connection<TokioIo<UpstreamStream>, RequestBody>>>,
    ended: bool,
    /// Kept with the connection: moving a timer on is cheaper than making one for each request.
    timer: Pin<Box<Sleep>>,
}

/// A connection on loan, with a response on it. Drive it while the body is read; give it back with
/// [`Lease::finish`] once that came to its end. Dropped, it closes.
pub struct Lease {
    /// `None` once it was given to a task of its own.
    wire: Option<Wire>,
    pool: Rc<Pool>,
    endpoint: usize,
    max_idle: usize,
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection could be had.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke, or what came was not HTTP.
    #[error("no response: {0}")]
    Http(#[from] hyper::Error),
    /// The upstream's `response_timeout` passed.
    #[error("no response within the time allowed")]
    TimedOut,
}

impl Pool {
    /// Sends `request` to `endpoint` and waits for the head of the response. `fate` tells how its body
    /// fares, if it is streamed.
    ///
    /// A kept connection that proves closed before it took the request costs another try; a request
    /// that was taken is never sent twice.
    ///
    /// # Errors
    ///
    /// See [`SendError`]; the caller answers 502 or 504.
    pub async fn send(
        self: &Rc<Self>,
        upstream: &Upstream,
        endpoint: &Endpoint,
        mut request: Request<RequestBody>,
        fate: Option<&Cell<Fate>>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        let deadline = Instant::now() + upstream.response_timeout;
        loop {
            let (mut wire, reused) = match self.take(endpoint, upstream.idle_timeout) {
                Some(wire) => (wire, true),
                // In a box, like all that is rare: this future is part of every request's.
                None => (Box::pin(Wire::open(upstream, endpoint, deadline)).await?, false),
            };
            if reused && !wire.is_ready().await {
                continue;
            }
            match wire.exchange(request, deadline).await? {
                Ok(response) => {
                    let mut lease = Lease {
                        wire: Some(wire),
                        pool: self.clone(),
                        endpoint: endpoint.id.0,
                        max_idle: upstream.max_idle,
                    };
                    if fate.is_some_and(|fate| fate.get() != Fate::Complete) {
                        lease.detach();
                    }
                    return Ok((response, lease));
                }
                Err(mut failed) => match failed.take_message() {
                    Some(untouched) if reused => request = untouched,
                    _ => return Err(SendError::Http(failed.into_error())),
                },
            }
        }
    }

    fn take(&self, endpoint: &Endpoint, idle_timeout: Duration) -> Option<Wire> {
        let mut pools = self.idle.borrow_mut();
        let idle = pools.get_mut(endpoint.id.0)?;
        let Idle { wire, since } = idle.pop()?;
        if since.elapsed() > idle_timeout {
            // The rest is older still.
            idle.clear();
            return None;
        }
        Some(wire)
    }
}

type Sent = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>;

impl Wire {
    async fn open(upstream: &Upstream, endpoint: &Endpoint, deadline: Instant) -> Result<Self, SendError> {
        let stream = upstream.connect(endpoint).await?;
        let (sender, connection) =
            http1::Builder::new().max_headers(128).handshake(TokioIo::new(stream)).await?;
        let timer = Box::pin(tokio::time::sleep_until(deadline));
        Ok(Self { sender, connection: Box::pin(connection), ended: false, timer })
    }

    /// Whether a kept connection may be used again: the exchange before has ended on the wire, and the
    /// peer has neither closed it nor said anything unasked.
    async fn is_ready(&mut self) -> bool {
        poll_fn(|cx| {
            self.drive(cx);
            Poll::Ready(!self.ended && self.sender.is_ready())
        })
        .await
    }

    async fn exchange(
        &mut self,
        request: Request<RequestBody>,
        deadline: Instant,
    ) -> Result<Sent, SendError> {
        self.timer.as_mut().reset(deadline);
        let Self { sender, connection, ended, timer } = self;
        let mut response = pin!(sender.try_send_request(request));
        poll_fn(|cx| {
            drive(connection, ended, cx);
            if let Poll::Ready(sent) = response.as_mut().poll(cx) {
                return Poll::Ready(Ok(sent));
            }
            // One that fired while the connection was unused has been moved on since.
            timer.as_mut().poll(cx).map(|()| Err(SendError::TimedOut))
        })
        .await
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        drive(&mut self.connection, &mut self.ended, cx);
    }
}

fn drive(
    connection: &mut Pin<Box<Connection<TokioIo<UpstreamStream>, RequestBody>>>,
    ended: &mut bool,
    cx: &mut Context<'_>,
) {
    if *ended {
        return;
    }
    if let Poll::Ready(outcome) = connection.as_mut().poll(cx) {
        *ended = true;
        if let Err(error) = outcome {
            tracing::debug!(%error, "upstream connection ended");
        }
    }
}

impl Lease {
    /// Moves bytes between the connection and the response's body.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(wire) = &mut self.wire {
            wire.drive(cx);
        }
    }

    /// Gives the connection a task of its own: the request is still being sent, which must go on even
    /// while nobody reads the response. It is not used again.
    fn detach(&mut self) {
        if let Some(Wire { sender, connection, ended: false, .. }) = self.wire.take() {
            tokio::task::spawn_local(async move {
                // Kept until the end: dropped, it would end the connection.
                let _sender = sender;
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "upstream connection ended");
                }
            });
        }
    }

    /// Puts the connection back for the next request.
    pub fn finish(self) {
        let Self { wire: Some(wire), pool, endpoint, max_idle } = self else { return };
        if wire.ended {
            return;
        }
        let mut pools = pool.idle.borrow_mut();
        if pools.len() <= endpoint {
            pools.resize_with(endpoint + 1, Vec::new);
        }
        if let Some(idle) = pools.get_mut(endpoint)
            && idle.len() < max_idle
        {
            idle.push(Idle { wire, since: Instant::now() });
        }
    }
}
