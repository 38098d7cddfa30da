//! Bodies on their way through: counted while they flow, never gathered unless a schema asks.

use std::{
    cell::{Cell, OnceCell},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use sealgate_policy::{ConnectionPolicy, Denial, FormJudge, Mode};
use tokio::time::{Instant, Sleep};

use super::exchange::Exchange;
use crate::upstream::pool::{AnswerBody, SendError};

/// What goes upstream.
pub enum RequestBody {
    /// Nothing.
    Empty,
    /// Held back until it was judged.
    Held(Option<Bytes>),
    /// Passed on as it comes, within its bounds.
    Streamed(Box<Streamed>),
}

/// A body that is counted while it flows.
pub struct Streamed {
    incoming: Incoming,
    received: u64,
    /// The whole length, if it was told.
    declared: Option<u64>,
    /// The last part of that length, until the client has said that it is the last (RFC 9113 §8.1.1).
    last: Option<Bytes>,
    limits: BodyLimits,
    /// Since when more is waited for.
    waiting: Option<Instant>,
    waited: Duration,
    deadline: Option<Pin<Box<Sleep>>>,
    fate: Rc<Cell<Fate>>,
    judge: Option<Box<FlowJudge>>,
}

/// Judges a form on its way: nothing of it goes on that was not agreed with, and its end only when all was.
struct FlowJudge {
    judge: FormJudge,
    mode: Mode,
    verdict: Rc<OnceCell<Denial>>,
}

/// What a request body is bounded by.
#[derive(Clone, Copy)]
pub struct BodyLimits {
    /// Most bytes.
    pub max_bytes: u64,
    /// Longest pause.
    pub patience: Duration,
    /// Least bytes in a second, over the time that was waited for the client; 0 for any.
    pub min_rate: u32,
}

impl BodyLimits {
    /// Those of a policy, for a body of `max_bytes` at most.
    #[must_use]
    pub fn of(limits: &ConnectionPolicy, max_bytes: u64) -> Self {
        Self { max_bytes, patience: limits.body_timeout, min_rate: limits.min_body_rate }
    }
}

/// Waiting for which a body needs nothing to show.
const GRACE: Duration = Duration::from_secs(5);

/// How a streamed request body fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Not all of it came yet.
    Flowing,
    /// All of it went upstream.
    Complete,
    /// It was longer than the route allows: 413.
    TooLarge,
    /// It came too slowly: 408.
    TooSlow,
    /// It is not the form that the route wants.
    Refused,
    /// The client broke off.
    Broken,
}

/// Why a body could not be passed on.
#[derive(Debug, thiserror::Error)]
#[error("request body: {0:?}")]
pub struct BodyError(Fate);

impl BodyError {
    /// What became of it.
    #[must_use]
    pub fn fate(&self) -> Fate {
        self.0
    }
}

impl RequestBody {
    /// Passes `incoming` on within `limits`.
    #[must_use]
    pub fn streamed(incoming: Incoming, limits: BodyLimits) -> (Self, Rc<Cell<Fate>>) {
        let fate = Rc::new(Cell::new(Fate::Flowing));
        let streamed = Streamed {
            declared: incoming.size_hint().exact(),
            incoming,
            received: 0,
            last: None,
            limits,
            waiting: None,
            waited: Duration::ZERO,
            deadline: None,
            fate: fate.clone(),
            judge: None,
        };
        (Self::Streamed(Box::new(streamed)), fate)
    }

    /// Has what flows judged, and says where the verdict will stand if it is a refusal.
    pub fn judge(&mut self, judge: FormJudge, mode: Mode) -> Rc<OnceCell<Denial>> {
        let verdict = Rc::new(OnceCell::new());
        if let Self::Streamed(streamed) = self {
            let verdict = Rc::clone(&verdict);
            streamed.judge = Some(Box::new(FlowJudge { judge, mode, verdict }));
        }
        verdict
    }

    /// The same once more, where it is at hand.
    #[must_use]
    pub fn again(&self) -> Option<Self> {
        match self {
            Self::Empty => Some(Self::Empty),
            Self::Held(bytes) => Some(Self::Held(bytes.clone())),
            Self::Streamed(_) => None,
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Held(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Streamed(streamed) => streamed.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Held(bytes) => bytes.is_none(),
            Self::Streamed(streamed) => streamed.fate.get() == Fate::Complete,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Held(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Streamed(streamed) => streamed.incoming.size_hint(),
        }
    }
}

impl Streamed {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else {
                ready!(self.poll_deadline(cx));
                return Poll::Ready(Some(Err(self.fail(Fate::TooSlow))));
            };
            if let Some(since) = self.waiting.take() {
                self.waited += since.elapsed();
            }
            if let Some(frame) = self.take(frame) {
                return Poll::Ready(frame);
            }
        }
    }

    /// What goes on of a frame that came; `None` if that has to wait for the next one.
    fn take(
        &mut self,
        frame: Option<Result<Frame<Bytes>, hyper::Error>>,
    ) -> Option<Option<Result<Frame<Bytes>, BodyError>>> {
        let data = match frame {
            Some(Err(_)) => return Some(Some(Err(self.fail(Fate::Broken)))),
            Some(Ok(frame)) => frame.into_data().ok(),
            None => None,
        };
        let Some(data) = data else {
            // The end; or trailers, fields that nobody judged: they end here.
            if self.judged(FormJudge::finish).is_err() {
                return Some(Some(Err(self.fail(Fate::Refused))));
            }
            self.fate.set(Fate::Complete);
            return Some(self.last.take().map(|last| Ok(Frame::data(last))));
        };
        self.received = self.received.saturating_add(data.len() as u64);
        if self.received > self.limits.max_bytes {
            return Some(Some(Err(self.fail(Fate::TooLarge))));
        }
        let ends = self.incoming.is_end_stream();
        let judged = self.judged(|judge| {
            judge.take(&data)?;
            if ends { judge.finish() } else { Ok(()) }
        });
        if judged.is_err() {
            return Some(Some(Err(self.fail(Fate::Refused))));
        }
        if ends {
            self.fate.set(Fate::Complete);
        } else if self.declared == Some(self.received) && !data.is_empty() {
            // Passed on, it would be a whole request, whatever the client may still say to it.
            self.last = Some(data);
            return None;
        }
        // An empty part may end the stream.
        Some(Some(Ok(Frame::data(match self.last.take() {
            Some(last) if data.is_empty() => last,
            _ => data,
        }))))
    }

    /// Asks the judge, if there is one; an error if nothing more may go on.
    fn judged(&mut self, ask: impl FnOnce(&mut FormJudge) -> Result<(), Denial>) -> Result<(), ()> {
        let Some(FlowJudge { judge, mode, verdict }) = self.judge.as_deref_mut() else { return Ok(()) };
        let Err(denial) = ask(judge) else { return Ok(()) };
        let enforces = *mode == Mode::Enforce;
        // Nothing was said before: whoever has refused is not asked again.
        let _ = verdict.set(denial);
        if enforces {
            return Err(());
        }
        self.judge = None;
        Ok(())
    }

    /// Ready when the client has had its time. Only the time that it was waited for counts: it is no fault of a client that
    /// a backend reads slowly.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.waiting.is_none() {
            let now = Instant::now();
            let deadline = now + self.patience();
            self.waiting = Some(now);
            match &mut self.deadline {
                Some(timer) => timer.as_mut().reset(deadline),
                none => *none = Some(Box::pin(tokio::time::sleep_until(deadline))),
            }
        }
        self.deadline.as_mut().map_or(Poll::Pending, |timer| timer.as_mut().poll(cx))
    }

    fn patience(&self) -> Duration {
        let BodyLimits { patience, min_rate, .. } = self.limits;
        match self.received.checked_div(min_rate.into()) {
            Some(earned) => patience.min((GRACE + Duration::from_secs(earned)).saturating_sub(self.waited)),
            None => patience,
        }
    }

    fn fail(&self, fate: Fate) -> BodyError {
        self.fate.set(fate);
        BodyError(fate)
    }
}

/// What goes to the client.
///
/// Dropped when the last byte went out or the client left: that ends the [`Exchange`].
pub struct ResponseBody {
    content: Content,
    exchange: Box<Exchange>,
}

enum Content {
    Held(Option<Bytes>, Option<Unread>),
    Streamed(AnswerBody),
}

impl ResponseBody {
    /// A body of our own, which a HEAD request does not get (RFC 9110 §9.3.2). `unread` is what is left of the request; it is thrown away, within bounds.
    #[must_use]
    pub fn held(bytes: Bytes, unread: Option<Incoming>, exchange: Box<Exchange>) -> Self {
        let unread = unread.filter(|unread| !unread.is_end_stream()).map(Unread::new);
        // Over HTTP/1.1 hyper sees to it, and tells the length that there would be.
        let is_bare = bytes.is_empty() || (exchange.is_head() && exchange.over_http2());
        Pace::waits(true);
        Self { content: Content::Held((!is_bare).then_some(bytes), unread), exchange }
    }

    /// The upstream's body.
    #[must_use]
    pub fn streamed(body: AnswerBody, exchange: Box<Exchange>) -> Self {
        Pace::waits(true);
        Self { content: Content::Streamed(body), exchange }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = SendError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        let this = self.get_mut();
        match &mut this.content {
            Content::Held(bytes, unread) => {
                if let Some(bytes) = bytes.take() {
                    this.exchange.sent(bytes.len());
                    Pace::waits(true);
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Pace::waits(false);
                if let Some(left) = unread {
                    ready!(left.poll_discard(cx));
                    *unread = None;
                }
                Poll::Ready(None)
            }
            Content::Streamed(body) => {
                let data = body.poll_data(cx);
                Pace::waits(data.is_ready());
                let data = ready!(data);
                if let Some(Ok(data)) = &data {
                    this.exchange.sent(data.len());
                }
                Poll::Ready(data.map(|data| data.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Held(bytes, unread) => bytes.is_none() && unread.is_none(),
            // Over HTTP/2 the end goes out by itself, when the client has a window for it: so a response stays ours, and on the
            // clock, until its client took it, rather than h2's, which would keep it for ever.
            Content::Streamed(body) => {
                body.is_ended() && (self.exchange.bytes() <= SMALL || !self.exchange.over_http2())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Held(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Content::Streamed(body) => body.left().map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

/// A response that h2 may keep for a client that opens no window for it.
const SMALL: u64 = 16 * 1024;

/// How the response of an HTTP/2 stream gets on, as far as its client decides; see `while_taken` in edge/accept.rs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    to_client: bool,
    steps: u32,
}

thread_local! {
    /// Of the stream that is being polled.
    static PACE: Cell<Pace> = const { Cell::new(Pace { to_client: false, steps: 0 }) };
}

impl Pace {
    /// Runs a poll of the stream that this is the pace of.
    pub fn during<T>(&mut self, poll: impl FnOnce() -> T) -> T {
        let outer = PACE.replace(*self);
        let outcome = poll();
        *self = PACE.replace(outer);
        outcome
    }

    /// Whether there is more to send, and the client has no window for it.
    #[must_use]
    pub fn waits_for_client(&self) -> bool {
        self.to_client
    }

    /// A step was done; and what comes next is for the client to do, or not.
    fn waits(to_client: bool) {
        let Pace { steps, .. } = PACE.get();
        PACE.set(Pace { to_client, steps: steps.wrapping_add(1) });
    }
}

/// The rest of a request that was refused before it was read.
///
/// Read and thrown away, within bounds, between the answer and its end: a stream that is reset while the
/// client still sends makes some clients lose the answer.
struct Unread {
    incoming: Incoming,
    left: usize,
    deadline: Pin<Box<Sleep>>,
}

/// Most that is thrown away of a refused request.
const MAX_DISCARDED: usize = 64 * 1024;

/// Longest wait for it.
const DISCARD_PATIENCE: Duration = Duration::from_secs(1);

impl Unread {
    fn new(incoming: Incoming) -> Self {
        let deadline = Box::pin(tokio::time::sleep(DISCARD_PATIENCE));
        Self { incoming, left: MAX_DISCARDED, deadline }
    }

    /// Ready when the rest has come, or has come too slowly, or is too much.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) {
            let Some(Ok(frame)) = frame else { return Poll::Ready(()) };
            let size = frame.data_ref().map_or(0, Bytes::len);
            match self.left.checked_sub(size) {
                Some(left) => self.left = left,
                None => return Poll::Ready(()),
            }
        }
        self.deadline.as_mut().poll(cx)
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        Pace::waits(false);
    }
}
