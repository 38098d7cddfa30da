//! Kept-alive HTTP/1.1 connections to the endpoints, one pool for each core.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;

use super::{ConnectError, Endpoint, Upstream};
use crate::http::body::RequestBody;

/// The connections of one core. Never leaves its thread.
#[derive(Default)]
pub struct Pool {
    /// By `EndpointId`; the last used first out, so that surplus ones age and go.
    idle: RefCell<Vec<Vec<Idle>>>,
}

struct Idle {
    sender: SendRequest<RequestBody>,
    since: Instant,
}

/// A connection on loan. Give it back with [`Lease::finish`] once the response was read to its end;
/// dropped, it closes.
pub struct Lease {
    sender: SendRequest<RequestBody>,
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
    /// Sends `request` to `endpoint` and waits for the head of the response.
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
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        let deadline = tokio::time::Instant::now() + upstream.response_timeout;
        loop {
            let (mut sender, reused) = match self.take(endpoint, upstream.idle_timeout) {
                Some(sender) => (sender, true),
                None => (open(upstream, endpoint).await?, false),
            };
            // Ready means that the exchange before has ended on the wire as well.
            if reused && !matches!(tokio::time::timeout_at(deadline, sender.ready()).await, Ok(Ok(()))) {
                continue;
            }
            match tokio::time::timeout_at(deadline, sender.try_send_request(request)).await {
                Err(_) => return Err(SendError::TimedOut),
                Ok(Ok(response)) => {
                    let lease = Lease {
                        sender,
                        pool: self.clone(),
                        endpoint: endpoint.id.0,
                        max_idle: upstream.max_idle,
                    };
                    return Ok((response, lease));
                }
                Ok(Err(mut failed)) => match failed.take_message() {
                    Some(untouched) if reused => request = untouched,
                    _ => return Err(SendError::Http(failed.into_error())),
                },
            }
        }
    }

    fn take(&self, endpoint: &Endpoint, idle_timeout: Duration) -> Option<SendRequest<RequestBody>> {
        let mut pools = self.idle.borrow_mut();
        let idle = pools.get_mut(endpoint.id.0)?;
        while let Some(Idle { sender, since }) = idle.pop() {
            if since.elapsed() > idle_timeout {
                // The rest is older still.
                idle.clear();
            } else if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }
}

impl Lease {
    /// Puts the connection back for the next request.
    pub fn finish(self) {
        if self.sender.is_closed() {
            return;
        }
        let mut pools = self.pool.idle.borrow_mut();
        if pools.len() <= self.endpoint {
            pools.resize_with(self.endpoint + 1, Vec::new);
        }
        if let Some(idle) = pools.get_mut(self.endpoint)
            && idle.len() < self.max_idle
        {
            idle.push(Idle { sender: self.sender, since: Instant::now() });
        }
    }
}

async fn open(upstream: &Upstream, endpoint: &Endpoint) -> Result<SendRequest<RequestBody>, SendError> {
    let stream = upstream.connect(endpoint).await?;
    let (sender, connection) = http1::Builder::new()
        .max_headers(128)
        .handshake(TokioIo::new(stream))
        .await?;
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "upstream connection ended");
        }
    });
    Ok(sender)
}
