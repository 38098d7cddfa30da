//! Our stream below hyper: the TLS session, watched.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use sealgate_policy::ConnectionPolicy;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use super::{
    connection::{Connection, STAND_IN},
    guard::{Guard, Judged, RequestGuard},
};
use crate::tls::ServerStream;

/// Most that is read and thrown away of a client that was refused, so that it reads the answer: a socket that is
/// closed before all was read is reset, and the answer with it.
const MAX_DISCARDED: usize = 256 * 1024;

/// Longest wait for it.
const LINGER: Duration = Duration::from_millis(800);

/// A downstream TLS stream. It has bytes judged by a [`Guard`] before hyper interprets them, tells its connection's clock
/// what is under way, and puts a request of its own in the place of one that is refused.
pub struct EdgeStream {
    tls: ServerStream<TcpStream>,
    connection: Arc<Connection>,
    guard: Guard,
    /// What was read and not handed on: the beginning of a head, for the most part.
    held: Vec<u8>,
    /// So much of `held` was judged and may go on.
    passed: usize,
    stage: Stage,
    discarded: usize,
    linger: Option<Pin<Box<Sleep>>>,
    /// Ciphertext that waited when the client was last seen to take nothing.
    stalled_at: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Bytes are judged and go on.
    Open,
    /// Nothing goes on any more but [`STAND_IN`], which stands in `held`.
    Refused,
    /// The body that hyper reads is cut off.
    Cut,
}

impl EdgeStream {
    /// Watches `tls` for `connection`.
    #[must_use]
    pub fn new(tls: ServerStream<TcpStream>, connection: Arc<Connection>, limits: &ConnectionPolicy) -> Self {
        let guard = Guard::new(connection.tls.http2, limits);
        Self {
            tls,
            connection,
            guard,
            held: Vec::new(),
            passed: 0,
            stage: Stage::Open,
            discarded: 0,
            linger: None,
            stalled_at: None,
        }
    }

    /// The stream of a WebSocket: what comes now is no HTTP.
    #[must_use]
    pub fn upgraded(mut self) -> Self {
        self.guard = Guard::None;
        self.passed = self.held.len();
        self
    }

    /// Hands on what may go on.
    fn hand_on(&mut self, buf: &mut ReadBuf<'_>) {
        let len = self.passed.min(buf.remaining());
        buf.put_slice(self.held.get(..len).unwrap_or_default());
        self.passed -= len;
        self.held.drain(..len);
        if self.held.is_empty() {
            self.held = Vec::new();
        }
    }

    fn poll_requests(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.passed > 0 {
                self.hand_on(buf);
                return Poll::Ready(Ok(()));
            }
            match self.stage {
                Stage::Open => {}
                // Whatever comes, the answer is on its way; hyper would drop it if it saw the client leave.
                Stage::Refused => {
                    let _ = ready!(self.poll_discard(cx, buf));
                    return Poll::Pending;
                }
                Stage::Cut => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
            }
            if self.connection.condemned().is_some() {
                self.refuse();
                continue;
            }
            let Guard::Requests(guard) = &mut self.guard else {
                return Pin::new(&mut self.tls).poll_read(cx, buf);
            };
            if guard.is_undecided() && self.connection.take_refused_upgrade() {
                guard.resume();
                self.judge_held();
                continue;
            }
            if guard.is_undecided() && !self.held.is_empty() {
                // What comes behind a request to upgrade waits for its answer. So does the rest, in the socket.
                return Poll::Pending;
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut self.tls).poll_read(cx, buf))?;
            let fresh = buf.filled().get(before..).unwrap_or_default();
            if fresh.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.held.is_empty() {
                // As a rule all of it goes on, and is looked at where it lies.
                let judged = guard.judge(fresh);
                if judged.pass < fresh.len() && judged.fault.is_none() {
                    self.held = fresh.get(judged.pass..).unwrap_or_default().to_vec();
                }
                buf.set_filled(before + judged.pass);
                self.note(judged);
                if judged.pass > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                self.held.extend_from_slice(fresh);
                buf.set_filled(before);
                self.judge_held();
            }
        }
    }

    fn judge_held(&mut self) {
        if let Guard::Requests(guard) = &mut self.guard {
            let judged = guard.judge(&self.held);
            self.passed = judged.pass;
            self.note(judged);
        }
    }

    /// What `judged` means for the clock, and for the connection if there is a fault.
    fn note(&mut self, judged: Judged) {
        let undecided = matches!(&self.guard, Guard::Requests(guard) if guard.is_undecided());
        self.connection.clock.reading(self.held.len() > self.passed && !undecided);
        if let Some(fault) = judged.fault {
            tracing::debug!(peer = %self.connection.peer, %fault, "refused");
            self.connection.condemn(fault.denial());
            self.refuse();
        }
    }

    /// Lets nothing go on any more. Where a request would begin, hyper is given one that is answered by the refusal; a body
    /// is cut off.
    fn refuse(&mut self) {
        self.held.truncate(self.passed);
        if matches!(&self.guard, Guard::Requests(guard) if guard.in_head()) {
            self.held.extend_from_slice(STAND_IN);
            self.passed = self.held.len();
            self.stage = Stage::Refused;
        } else {
            self.stage = Stage::Cut;
        }
    }

    /// Throws away what comes. Ready at its end, or when it is too much.
    fn poll_discard(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        while self.discarded < MAX_DISCARDED {
            ready!(Pin::new(&mut self.tls).poll_read(cx, buf))?;
            let came = buf.filled().len() - before;
            buf.set_filled(before);
            if came == 0 {
                return Poll::Ready(Ok(()));
            }
            self.discarded += came;
        }
        Poll::Pending
    }

    /// Tells the clock whether the client takes what we send.
    fn note_write<T>(&mut self, outcome: &Poll<io::Result<T>>) {
        match outcome {
            Poll::Ready(_) if self.stalled_at.is_none() => {}
            Poll::Ready(_) => {
                self.stalled_at = None;
                self.connection.clock.writes();
            }
            Poll::Pending => {
                let unsent = self.tls.unsent();
                if self.stalled_at != Some(unsent) {
                    self.stalled_at = Some(unsent);
                    self.connection.clock.stalls();
                }
            }
        }
    }
}

impl AsyncRead for EdgeStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match &mut this.guard {
            Guard::Requests(_) => this.poll_requests(cx, buf),
            Guard::None if this.passed > 0 => {
                this.hand_on(buf);
                Poll::Ready(Ok(()))
            }
            Guard::None => Pin::new(&mut this.tls).poll_read(cx, buf),
            Guard::Frames(frames) => {
                let before = buf.filled().len();
                let outcome = Pin::new(&mut this.tls).poll_read(cx, buf);
                let fresh = buf.filled().get(before..).unwrap_or_default();
                if fresh.is_empty() {
                    return outcome;
                }
                let judged = frames.judge(fresh, Instant::now());
                this.connection.clock.reading(frames.is_amid());
                match judged {
                    Ok(()) => outcome,
                    Err(fault) => {
                        tracing::debug!(peer = %this.connection.peer, %fault, "connection ended");
                        buf.set_filled(before);
                        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault)))
                    }
                }
            }
        }
    }
}

impl AsyncWrite for EdgeStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.tls).poll_write(cx, buf);
        this.note_write(&outcome);
        if let (Guard::Frames(frames), Poll::Ready(Ok(len))) = (&mut this.guard, &outcome) {
            frames.sent(*len);
        }
        outcome
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.tls).poll_write_vectored(cx, bufs);
        this.note_write(&outcome);
        if let (Guard::Frames(frames), Poll::Ready(Ok(len))) = (&mut this.guard, &outcome) {
            frames.sent(*len);
        }
        outcome
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.tls).poll_flush(cx);
        this.note_write(&outcome);
        outcome
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.tls).poll_shutdown(cx);
        this.note_write(&outcome);
        ready!(outcome)?;
        let amid = this.stage != Stage::Open
            || matches!(&this.guard, Guard::Requests(guard) if !guard.in_head() && !guard.is_undecided());
        if !amid {
            return Poll::Ready(Ok(()));
        }
        // The client may still be sending. What it was told must not be lost by that.
        let linger = this.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        if linger.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut scratch = [0; 2048];
        // An end, an error, and too much all mean the same.
        let _ = ready!(this.poll_discard(cx, &mut ReadBuf::new(&mut scratch)));
        Poll::Ready(Ok(()))
    }
}

impl Drop for EdgeStream {
    fn drop(&mut self) {
        if self.connection.is_cut() {
            // Whoever does not read would keep what was sent in the system's memory for as long as it likes.
            let _ = SockRef::from(self.tls.get_ref()).set_linger(Some(Duration::ZERO));
        }
    }
}

// The guard's state is small: every idle WebSocket has one.
const _: () = assert!(size_of::<RequestGuard>() <= 96);
