//! Kept-alive HTTP/1.1 connections to the endpoints, one pool for each core.
//!
//! A connection has no task of its own: whoever waits for an answer, or reads its body, drives it. That
//! saves the wake-ups between two tasks on every request, and an unused connection holds no buffer.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use http_body::Body as _;
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    time::{Instant, Sleep},
};

use super::{
    Chosen, ConnectError, Endpoint, Underway, Upstream, UpstreamStream,
    http1::{self, BodyReader, Head, Http1Error, Length, Read},
};
use crate::http::body::{BodyError, RequestBody};

/// Read from an upstream at once.
const READ: usize = 64 * 1024;

/// Interim answers (1xx) to one request.
const MAX_INTERIM: u32 = 16;

thread_local! {
    /// Memory of the core. INVARIANT: borrowed inside one poll of one connection only; the streams below have their own.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

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

/// The head of an upstream's answer, and its body.
pub struct Answered {
    /// Final.
    pub status: StatusCode,
    /// As they came.
    pub fields: HeaderMap,
    /// To be read.
    pub body: AnswerBody,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection could be had.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke, or ended before the answer did.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// What came cannot be trusted.
    #[error(transparent)]
    Http(#[from] Http1Error),
    /// The request's body did not come whole.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The upstream's `response_timeout` passed.
    #[error("no answer within the time allowed")]
    TimedOut,
}

impl SendError {
    /// Whether the endpoint is at fault, and neither the client nor this machine.
    #[must_use]
    pub fn is_of_endpoint(&self) -> bool {
        match self {
            Self::Connect(error) => !error.is_ours(),
            Self::Io(_) | Self::TimedOut => true,
            Self::Http(error) => !matches!(error, Http1Error::Request | Http1Error::Body),
            Self::Body(_) => false,
        }
    }
}

/// What is left of a request that an endpoint did not answer.
pub struct Unanswered {
    /// Why.
    pub error: SendError,
    /// Something of the request went out: the endpoint may have begun to do it.
    pub sent: bool,
    /// Something of an answer came.
    answered: bool,
    /// The whole body, where nothing of it is gone.
    pub body: Option<RequestBody>,
}

impl Pool {
    /// Sends a request to an endpoint and waits for the head of the answer.
    ///
    /// A kept connection that proves closed costs a new one if nothing of the request went out; or if nothing of an
    /// answer came, and the request may be sent twice: its method is idempotent (RFC 9110 §9.2.2) and its body at hand.
    ///
    /// # Errors
    ///
    /// See [`SendError`]; the caller tries another endpoint, or answers 502 or 504, or what became of the client's body.
    pub async fn send(
        self: &Rc<Self>,
        upstream: &Upstream,
        chosen: Chosen<'_>,
        head: &Head<'_>,
        body: RequestBody,
    ) -> Result<Answered, Box<Unanswered>> {
        let Chosen { endpoint, mut underway } = chosen;
        let outcome = self.try_send(upstream, endpoint, &mut underway, head, body).await;
        if outcome.as_ref().is_err_and(|unanswered| unanswered.error.is_of_endpoint()) {
            underway.failed();
        }
        outcome
    }

    async fn try_send(
        self: &Rc<Self>,
        upstream: &Upstream,
        endpoint: &Endpoint,
        underway: &mut Underway,
        head: &Head<'_>,
        mut body: RequestBody,
    ) -> Result<Answered, Box<Unanswered>> {
        let now = Instant::now();
        while let Some(mut wire) = self.take(endpoint, now, upstream.idle_timeout) {
            if !wire.is_quiet().await {
                continue;
            }
            let unanswered = match self.exchange(upstream, endpoint, wire, underway, head, body).await {
                Ok(answered) => return Ok(answered),
                Err(unanswered) => unanswered,
            };
            match *unanswered {
                Unanswered { error: SendError::Io(_), sent, answered: false, body: Some(whole) }
                    if !sent || head.method.is_idempotent() =>
                {
                    body = whole;
                    break;
                }
                unanswered => return Err(Box::new(unanswered)),
            }
        }
        // In a box, like all that is rare: this future is part of every request's.
        match Box::pin(Wire::open(upstream, endpoint, now)).await {
            Ok(wire) => self.exchange(upstream, endpoint, wire, underway, head, body).await,
            Err(error) => Err(Box::new(Unanswered { error, sent: false, answered: false, body: Some(body) })),
        }
    }

    fn take(&self, endpoint: &Endpoint, now: Instant, idle_timeout: Duration) -> Option<Wire> {
        let mut pools = self.idle.borrow_mut();
        let idle = pools.get_mut(endpoint.id.0)?;
        let Idle { wire, since } = idle.pop()?;
        if now.saturating_duration_since(since) > idle_timeout {
            // The rest is older still.
            idle.clear();
            return None;
        }
        Some(wire)
    }

    async fn exchange(
        self: &Rc<Self>,
        upstream: &Upstream,
        endpoint: &Endpoint,
        mut wire: Wire,
        underway: &mut Underway,
        head: &Head<'_>,
        body: RequestBody,
    ) -> Result<Answered, Box<Unanswered>> {
        let patience = upstream.response_timeout;
        wire.timer.as_mut().reset(Instant::now() + patience);
        let again = body.again();
        let mut sending = match Sending::begin(head, body, &mut wire) {
            Ok(sending) => sending,
            Err(error) => {
                let error = error.into();
                return Err(Box::new(Unanswered { error, sent: false, answered: false, body: again }));
            }
        };
        let mut interim = 0;
        let read = poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = sending.poll(&mut wire, cx) {
                return Poll::Ready(Err(error));
            }
            if let Poll::Ready(read) = wire.poll_head(cx, head.method, &mut interim) {
                return Poll::Ready(read);
            }
            // One that fired while the connection was unused has been moved on since.
            loop {
                ready!(wire.timer.as_mut().poll(cx));
                // It is moved on only when it fires: nothing has to be done for what is in time.
                let deadline = sending.waiting_since.map(|since| since + patience);
                match deadline.filter(|deadline| *deadline > Instant::now()) {
                    Some(deadline) => wire.timer.as_mut().reset(deadline),
                    None => return Poll::Ready(Err(SendError::TimedOut)),
                }
            }
        })
        .await;
        let (answer, first) = match read {
            Ok(read) => read,
            Err(error) => {
                let Wire { sent, answered, .. } = wire;
                // Of a body that flows, the beginning must still be there.
                let body = again.or_else(|| (!sending.touched).then_some(sending.body));
                return Err(Box::new(Unanswered { error, sent: sent > 0, answered, body }));
            }
        };
        let mut underway = std::mem::take(underway);
        underway.answered(answer.status);
        let lease = Lease { pool: self.clone(), endpoint: endpoint.id.0, max_idle: upstream.max_idle };
        let reusable = answer.reusable && first.surplus.is_none();
        let content = first.content;
        let body = if sending.is_done() && !sending.failed {
            if answer.body.is_ended() {
                underway.ended();
                if reusable {
                    lease.give_back(wire);
                }
                AnswerBody::Whole(content)
            } else {
                let reader = answer.body;
                AnswerBody::Flowing(Box::new(Flowing { content, reader, reusable, wire, lease, underway }))
            }
        } else {
            // The request is still being sent, which must go on even while nobody reads the answer.
            let wire = Rc::new(RefCell::new(wire));
            if !sending.failed {
                tokio::task::spawn_local(sending.finish(wire.clone()));
            }
            AnswerBody::Crossing(Box::new(Crossing { content, reader: answer.body, wire, underway }))
        };
        Ok(Answered { status: answer.status, fields: answer.fields, body })
    }
}

/// The way back to the pool.
struct Lease {
    pool: Rc<Pool>,
    endpoint: usize,
    max_idle: usize,
}

impl Lease {
    fn give_back(self, wire: Wire) {
        let Self { pool, endpoint, max_idle } = self;
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

/// A connection.
struct Wire {
    // In a box: the wire moves from the pool to the exchange to the body, and back.
    stream: Box<UpstreamStream>,
    /// To be written.
    out: Vec<u8>,
    written: usize,
    /// Part of a head.
    unread: Vec<u8>,
    /// Bytes of the request that the stream took.
    sent: u64,
    answered: bool,
    /// Of the task that still sends, while another reads: TLS may have to write in order to read.
    sender: Option<Waker>,
    /// Kept with the connection: moving a timer on is cheaper than making one for each request.
    timer: Pin<Box<Sleep>>,
}

/// What came with the head.
struct First {
    content: Bytes,
    /// Bytes behind the end of the answer, which nobody asked for.
    surplus: Option<usize>,
}

impl Wire {
    async fn open(upstream: &Upstream, endpoint: &Endpoint, deadline: Instant) -> Result<Self, SendError> {
        let stream = Box::new(upstream.connect(endpoint).await?);
        let timer = Box::pin(tokio::time::sleep_until(deadline));
        Ok(Self {
            stream,
            out: Vec::new(),
            written: 0,
            unread: Vec::new(),
            sent: 0,
            answered: false,
            sender: None,
            timer,
        })
    }

    /// Whether a kept connection may be used again: the peer has neither closed it nor said anything unasked.
    async fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        poll_fn(|cx| {
            let quiet = Pin::new(&mut *self.stream).poll_read(cx, &mut ReadBuf::new(&mut byte)).is_pending();
            Poll::Ready(quiet)
        })
        .await
    }

    /// Writes what waits.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest @ [_, ..]) = self.out.get(self.written..) {
            match ready!(Pin::new(&mut *self.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                taken => {
                    self.written += taken;
                    self.sent += taken as u64;
                }
            }
        }
        if self.written > 0 {
            self.written = 0;
            self.out = Vec::new();
        }
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
        interim: &mut u32,
    ) -> Poll<Result<(http1::Answer, First), SendError>> {
        SCRATCH.with_borrow_mut(|scratch| {
            loop {
                let kept = std::mem::take(&mut self.unread);
                if scratch.len() < READ {
                    scratch.resize(READ, 0);
                }
                let Some((front, room)) = scratch.split_at_mut_checked(kept.len()) else {
                    return Poll::Ready(Err(Http1Error::TooLong.into()));
                };
                front.copy_from_slice(&kept);
                let mut came = ReadBuf::new(room);
                match Pin::new(&mut *self.stream).poll_read(cx, &mut came) {
                    Poll::Pending => {
                        self.unread = kept;
                        return Poll::Pending;
                    }
                    Poll::Ready(outcome) => outcome?,
                }
                let came = came.filled().len();
                if came == 0 {
                    return Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
                }
                self.answered = true;
                let mut bytes = scratch.get(..kept.len() + came).unwrap_or_default();
                loop {
                    match http1::read_answer(bytes, method)? {
                        Read::Partial => break self.unread = bytes.to_vec(),
                        Read::Interim(len) => {
                            *interim += 1;
                            if *interim > MAX_INTERIM {
                                return Poll::Ready(Err(Http1Error::Interim.into()));
                            }
                            bytes = bytes.get(len..).unwrap_or_default();
                        }
                        Read::Answer(len, mut answer) => {
                            let rest = bytes.get(len..).unwrap_or_default();
                            let (content, taken) = answer.body.take(rest)?;
                            let surplus = rest.len().checked_sub(taken).filter(|surplus| *surplus > 0);
                            return Poll::Ready(Ok((answer, First { content, surplus })));
                        }
                    }
                }
            }
        })
    }

    /// Reads more of a body: nothing at its end.
    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut BodyReader,
        reusable: &mut bool,
    ) -> Poll<Result<Bytes, SendError>> {
        if let Some(sender) = self.sender.take() {
            sender.wake();
        }
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.len() < READ {
                scratch.resize(READ, 0);
            }
            while !reader.is_ended() {
                let mut came = ReadBuf::new(scratch);
                ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut came))?;
                let came = came.filled();
                if came.is_empty() {
                    *reusable = false;
                    return Poll::Ready(match reader.close() {
                        true => Ok(Bytes::new()),
                        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                    });
                }
                let (content, taken) = reader.take(came)?;
                // Bytes behind the end, which nobody asked for.
                *reusable &= taken == came.len();
                if !content.is_empty() {
                    return Poll::Ready(Ok(content));
                }
            }
            Poll::Ready(Ok(Bytes::new()))
        })
    }
}

/// A request on its way out.
struct Sending {
    body: RequestBody,
    /// What the head said of the body; counted down.
    length: Length,
    /// The body has been put into `out` to its end.
    ended: bool,
    done: bool,
    /// The upstream takes no more. It may have answered all the same.
    failed: bool,
    /// Something of a body that flows was taken out of it.
    touched: bool,
    /// More of it is the client's to give.
    wants_body: bool,
    /// Since when the upstream and nobody else is waited for; `None` while that is since the beginning.
    waiting_since: Option<Instant>,
}

impl Sending {
    fn begin(head: &Head<'_>, mut body: RequestBody, wire: &mut Wire) -> Result<Self, Http1Error> {
        (wire.sent, wire.answered) = (0, false);
        let length = match &body {
            RequestBody::Empty => Length::None,
            RequestBody::Held(bytes) => Length::Known(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            RequestBody::Streamed(_) => body.size_hint().exact().map_or(Length::Chunked, Length::Known),
        };
        wire.out.reserve(1024);
        head.write(length, &mut wire.out)?;
        if let RequestBody::Held(bytes) = &mut body
            && let Some(bytes) = bytes.take()
        {
            wire.out.extend_from_slice(&bytes);
        }
        let ended = !matches!(body, RequestBody::Streamed(_));
        Ok(Self {
            body,
            length,
            ended,
            done: false,
            failed: false,
            touched: false,
            wants_body: false,
            waiting_since: None,
        })
    }

    fn is_done(&self) -> bool {
        self.done
    }

    /// Sends on: an error of the client's body ends the exchange, one of the upstream's connection only the sending.
    fn poll(&mut self, wire: &mut Wire, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        let before = (wire.sent, self.touched);
        let outcome = self.poll_on(wire, cx);
        // What is sent at once costs no look at the clock.
        if (before != (0, false) || outcome.is_pending())
            && (self.wants_body || self.done || wire.sent != before.0)
        {
            self.waiting_since = Some(Instant::now());
        }
        outcome
    }

    fn poll_on(&mut self, wire: &mut Wire, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        while !self.done {
            if ready!(wire.poll_out(cx)).is_err() {
                (self.done, self.failed) = (true, true);
                break;
            }
            if self.ended {
                self.done = true;
                break;
            }
            let frame = Pin::new(&mut self.body).poll_frame(cx);
            self.wants_body = frame.is_pending();
            let frame = ready!(frame);
            self.touched = true;
            let Some(frame) = frame else {
                self.ended = true;
                match self.length {
                    Length::Chunked => wire.out.extend_from_slice(http1::LAST_CHUNK),
                    Length::None | Length::Known(0) => {}
                    Length::Known(_) => return Poll::Ready(Err(Http1Error::Body.into())),
                }
                continue;
            };
            let Ok(data) = frame?.into_data() else { continue };
            match &mut self.length {
                Length::Chunked => http1::write_chunk(&data, &mut wire.out),
                Length::Known(left) if data.len() as u64 <= *left => {
                    *left -= data.len() as u64;
                    wire.out.extend_from_slice(&data);
                }
                // More than was said would be read as the next request.
                Length::None | Length::Known(_) => return Poll::Ready(Err(Http1Error::Body.into())),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends to the end beside whoever reads the answer. The connection is not used again.
    async fn finish(mut self, wire: Rc<RefCell<Wire>>) {
        let outcome = poll_fn(|cx| {
            let mut wire = wire.borrow_mut();
            let outcome = self.poll(&mut wire, cx);
            if outcome.is_pending() {
                wire.sender = Some(cx.waker().clone());
            }
            outcome
        })
        .await;
        if let Err(error) = outcome {
            tracing::debug!(%error, "the request was not sent to its end");
        }
    }
}

/// The body of an upstream's answer.
pub enum AnswerBody {
    /// It came with the head; the connection is back in the pool.
    Whole(Bytes),
    /// It is read from the connection, which goes back to the pool at its end.
    Flowing(Box<Flowing>),
    /// It is read while the request is still being sent.
    Crossing(Box<Crossing>),
    /// Nothing more is to come.
    Ended,
}

/// See [`AnswerBody::Flowing`].
pub struct Flowing {
    content: Bytes,
    reader: BodyReader,
    reusable: bool,
    wire: Wire,
    lease: Lease,
    underway: Underway,
}

/// See [`AnswerBody::Crossing`].
pub struct Crossing {
    content: Bytes,
    reader: BodyReader,
    wire: Rc<RefCell<Wire>>,
    underway: Underway,
}

impl AnswerBody {
    /// More of it; `None` at its end.
    ///
    /// # Errors
    /// It broke off, or its framing is wrong. What came before cannot be taken for the whole.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, SendError>>> {
        let outcome = match self {
            Self::Ended => return Poll::Ready(None),
            Self::Whole(content) => Ok(std::mem::take(content)),
            Self::Flowing(flowing) => {
                let Flowing { content, reader, reusable, wire, .. } = &mut **flowing;
                match std::mem::take(content) {
                    content if !content.is_empty() => Ok(content),
                    _ => ready!(wire.poll_body(cx, reader, reusable)),
                }
            }
            Self::Crossing(crossing) => {
                let Crossing { content, reader, wire, .. } = &mut **crossing;
                match std::mem::take(content) {
                    content if !content.is_empty() => Ok(content),
                    _ => ready!(wire.borrow_mut().poll_body(cx, reader, &mut false)),
                }
            }
        };
        let is_ended = match self {
            Self::Flowing(flowing) => flowing.reader.is_ended(),
            Self::Crossing(crossing) => crossing.reader.is_ended(),
            Self::Whole(_) | Self::Ended => true,
        };
        if outcome.is_err() || is_ended {
            self.end(outcome.is_ok());
        }
        match outcome {
            Ok(content) if content.is_empty() => Poll::Ready(None),
            outcome => Poll::Ready(Some(outcome)),
        }
    }

    fn end(&mut self, in_order: bool) {
        match std::mem::replace(self, Self::Ended) {
            Self::Flowing(flowing) => {
                let Flowing { wire, lease, reusable, mut underway, .. } = *flowing;
                if in_order {
                    underway.ended();
                } else {
                    underway.failed();
                }
                if in_order && reusable {
                    lease.give_back(wire);
                }
            }
            // If it broke off, that may be for a client that broke off.
            Self::Crossing(mut crossing) if in_order => crossing.underway.ended(),
            Self::Crossing(_) | Self::Whole(_) | Self::Ended => {}
        }
    }

    /// Nothing more is to come.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        match self {
            Self::Ended => true,
            Self::Whole(content) => content.is_empty(),
            Self::Flowing(_) | Self::Crossing(_) => false,
        }
    }

    /// Bytes to come, where that is known.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        let sum =
            |content: &Bytes, reader: &BodyReader| Some(reader.left()?.saturating_add(content.len() as u64));
        match self {
            Self::Ended => Some(0),
            Self::Whole(content) => Some(content.len() as u64),
            Self::Flowing(flowing) => sum(&flowing.content, &flowing.reader),
            Self::Crossing(crossing) => sum(&crossing.content, &crossing.reader),
        }
    }
}
