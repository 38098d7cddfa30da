//! Bodies on their way through: counted while they flow, never gathered unless a schema asks.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
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
    left: u64,
    patience: Duration,
    deadline: Pin<Box<Sleep>>,
    fate: Rc<Cell<Fate>>,
}

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
    /// The client broke off.
    Broken,
}

/// Why a body could not be passed on.
#[derive(Debug, thiserror::Error)]
#[error("request body: {0:?}")]
pub struct BodyError(Fate);

impl RequestBody {
    /// Passes `incoming` on, `max_bytes` at most, each part within `patience` of the one before.
    #[must_use]
    pub fn streamed(incoming: Incoming, max_bytes: u64, patience: Duration) -> (Self, Rc<Cell<Fate>>) {
        let fate = Rc::new(Cell::new(Fate::Flowing));
        let streamed = Streamed {
            incoming,
            left: max_bytes,
            patience,
            deadline: Box::pin(tokio::time::sleep(patience)),
            fate: fate.clone(),
        };
        (Self::Streamed(Box::new(streamed)), fate)
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
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else {
            ready!(self.deadline.as_mut().poll(cx));
            return Poll::Ready(Some(Err(self.fail(Fate::TooSlow))));
        };
        let Some(frame) = frame else {
            self.fate.set(Fate::Complete);
            return Poll::Ready(None);
        };
        let Ok(frame) = frame else {
            return Poll::Ready(Some(Err(self.fail(Fate::Broken))));
        };
        let Ok(data) = frame.into_data() else {
            // Trailers are fields that nobody judged: they end here.
            self.fate.set(Fate::Complete);
            return Poll::Ready(None);
        };
        let Some(left) = self.left.checked_sub(data.len() as u64) else {
            return Poll::Ready(Some(Err(self.fail(Fate::TooLarge))));
        };
        self.left = left;
        self.deadline.as_mut().reset(Instant::now() + self.patience);
        if self.incoming.is_end_stream() {
            self.fate.set(Fate::Complete);
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
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
    exchange: Exchange,
}

enum Content {
    Held(Option<Bytes>, Option<Unread>),
    Streamed(AnswerBody),
}

impl ResponseBody {
    /// A body of our own. `unread` is what is left of the request; it is thrown away, within bounds.
    #[must_use]
    pub fn held(bytes: Bytes, unread: Option<Incoming>, exchange: Exchange) -> Self {
        let unread = unread.filter(|unread| !unread.is_end_stream()).map(Unread::new);
        Self { content: Content::Held((!bytes.is_empty()).then_some(bytes), unread), exchange }
    }

    /// The upstream's body.
    #[must_use]
    pub fn streamed(body: AnswerBody, exchange: Exchange) -> Self {
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
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                if let Some(left) = unread {
                    ready!(left.poll_discard(cx));
                    *unread = None;
                }
                Poll::Ready(None)
            }
            Content::Streamed(body) => {
                let data = ready!(body.poll_data(cx));
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
            Content::Streamed(body) => body.is_ended(),
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
