//! One peer of a tunnel: its stream, what had to be kept of it and for it, and how far its closing has come.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use sealgate_policy::{Denial, TunnelLimits};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::close;
use super::deflate::Agreed;
use super::frame::{self, MAX_HEADER, Opcode, Sender};
use super::message::Assembler;

/// How a peer is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intake {
    /// For its messages.
    Frames,
    /// For its close frame only.
    Drain,
    /// For the end of its stream only.
    Discard,
    /// No more.
    Ended,
}

/// One peer: its stream, and what had to be kept of it and for it.
pub(super) struct Side<S> {
    pub(super) stream: S,
    pub(super) incoming: Assembler,
    /// If so, messages to it may go compressed.
    pub(super) deflate: Option<Agreed>,
    /// Read, but not a whole frame.
    pub(super) unread: Vec<u8>,
    /// Payload still to be skipped while draining.
    pub(super) skip: usize,
    /// To be written. It ends at a frame boundary, always.
    pub(super) out: Vec<u8>,
    pub(super) written: usize,
    /// Since when it takes nothing.
    pub(super) stalled: Option<Instant>,
    /// When it last sent anything.
    pub(super) heard: Instant,
    /// When it was pinged since.
    pub(super) pinged: Option<Instant>,
    pub(super) peer: Sender,
    pub(super) intake: Intake,
    /// `unread` may hold whole frames: it came with the handshake, or what was before it inflated to much.
    pub(super) unexamined: bool,
    pub(super) unflushed: bool,
    /// Nothing can be written any more.
    pub(super) broken: bool,
    /// Our writing end is shut, in order.
    pub(super) shut: bool,
    pub(super) close_sent: bool,
    pub(super) close_received: bool,
}

impl<S> Side<S> {
    pub(super) fn new(
        stream: S,
        peer: Sender,
        deflate: Option<Agreed>,
        early: &[u8],
        now: Instant,
    ) -> Side<S> {
        Side {
            stream,
            incoming: Assembler::new(peer, deflate.is_some()),
            deflate,
            unread: early.to_vec(),
            skip: 0,
            out: Vec::new(),
            written: 0,
            stalled: None,
            heard: now,
            pinged: None,
            peer,
            intake: Intake::Frames,
            unexamined: !early.is_empty(),
            unflushed: false,
            broken: false,
            shut: false,
            close_sent: false,
            close_received: false,
        }
    }

    /// Adds whole frames to what is to be written.
    pub(super) fn queue(&mut self, frames: &[u8]) {
        if !self.broken && !self.close_sent {
            self.out.extend_from_slice(frames);
        }
    }

    /// Adds a frame of our own.
    pub(super) fn queue_frame(&mut self, opcode: Opcode, payload: &[u8]) {
        self.queue_with(|out, mask| frame::write_frame(out, opcode, mask, payload));
    }

    /// Adds a message whose payload is compressed, as was agreed on.
    pub(super) fn queue_compressed(&mut self, opcode: Opcode, payload: &[u8]) {
        self.queue_with(|out, mask| frame::write_compressed(out, opcode, mask, payload));
    }

    /// Bytes that it has not taken.
    pub(super) fn waiting(&self) -> usize {
        self.out.len().saturating_sub(self.written)
    }

    fn queue_with(&mut self, write: impl FnOnce(&mut Vec<u8>, Option<[u8; 4]>)) {
        if self.broken || self.close_sent {
            return;
        }
        match fresh_mask(self.peer) {
            Ok(mask) => write(&mut self.out, mask),
            Err(NoRandomness) => self.break_off(),
        }
    }

    pub(super) fn close(&mut self, code: u16, reason: &str) {
        if !self.broken && !self.close_sent {
            match fresh_mask(self.peer) {
                Ok(mask) => close::write(&mut self.out, mask, code, reason),
                Err(NoRandomness) => self.break_off(),
            }
        }
        self.close_sent = true;
    }

    pub(super) fn close_with(&mut self, denial: &Denial) {
        self.close(denial.close_code(), &format!("{}: {}", denial.reason(), denial.detail()));
    }

    /// Answers a ping. One that finds the buffer full goes unanswered: a later pong answers it too
    /// (RFC 6455 §5.5.3).
    pub(super) fn pong(&mut self, payload: &[u8], limits: &TunnelLimits) {
        if self.waiting() + MAX_HEADER + payload.len() <= limits.buffer as usize {
            self.queue_frame(Opcode::Pong, payload);
        }
    }

    pub(super) fn ping_if_silent(&mut self, interval: Duration, now: Instant) {
        if self.pinged.is_none() && now >= self.heard + interval {
            self.pinged = Some(now);
            self.queue_frame(Opcode::Ping, b"");
        }
    }

    pub(super) fn hear(&mut self, now: Instant) {
        self.heard = now;
        self.pinged = None;
    }

    /// When it has to be pinged, or to have answered.
    pub(super) fn watch_at(&self, limits: &TunnelLimits) -> Instant {
        match self.pinged {
            Some(pinged) => pinged + limits.pong_timeout,
            None => self.heard + limits.ping_interval,
        }
    }

    pub(super) fn is_unresponsive(&self, limits: &TunnelLimits, now: Instant) -> bool {
        self.pinged.is_some_and(|pinged| now >= pinged + limits.pong_timeout)
    }

    /// When it has to have taken something of what is to be written.
    pub(super) fn stuck_at(&self, limits: &TunnelLimits) -> Option<Instant> {
        self.stalled.map(|since| since + limits.write_timeout)
    }

    pub(super) fn is_stuck(&self, limits: &TunnelLimits, now: Instant) -> bool {
        self.stuck_at(limits).is_some_and(|stuck| now >= stuck)
    }

    pub(super) fn stop_reading_messages(&mut self) {
        if self.intake == Intake::Frames {
            self.intake = Intake::Drain;
        }
    }

    /// The closing handshake takes too long: says the last word, expects none.
    pub(super) fn stop_waiting(&mut self, code: u16) {
        self.close(code, "");
        if self.intake != Intake::Ended {
            self.intake = Intake::Discard;
        }
    }

    /// The peer's own end is closed or worthless.
    pub(super) fn lose_input(&mut self) {
        self.intake = Intake::Ended;
        self.unread = Vec::new();
    }

    pub(super) fn lose(&mut self) {
        self.break_off();
        self.lose_input();
        self.close_sent = true;
    }

    pub(super) fn break_off(&mut self) {
        self.broken = true;
        self.out = Vec::new();
        self.written = 0;
        self.unflushed = false;
        self.stalled = None;
    }

    pub(super) fn is_done(&self) -> bool {
        (self.broken || self.shut) && (self.close_received || self.intake == Intake::Ended)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Side<S> {
    /// Reads until the peer has no more or `most` bytes are there: what came, whether there may be more, and
    /// whether the stream ended. A TLS stream gives one record at a time, however many there are.
    pub(super) fn poll_in<'b>(
        &mut self,
        cx: &mut Context<'_>,
        into: &'b mut [u8],
        most: usize,
    ) -> (&'b [u8], bool, bool) {
        let most = most.clamp(1, into.len());
        let mut buffer = ReadBuf::new(into.get_mut(..most).unwrap_or_default());
        let (mut more, mut ended) = (false, false);
        loop {
            let before = buffer.filled().len();
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                Poll::Pending => break,
                Poll::Ready(Err(_)) => {
                    ended = true;
                    self.break_off();
                    break;
                }
                Poll::Ready(Ok(())) if buffer.filled().len() == before => {
                    ended = true;
                    break;
                }
                Poll::Ready(Ok(())) if buffer.remaining() == 0 => {
                    more = true;
                    break;
                }
                Poll::Ready(Ok(())) => {}
            }
        }
        let filled = buffer.filled().len();
        (into.get(..filled).unwrap_or_default(), more, ended)
    }

    /// Writes `frames` behind what waits: from where they lie, as far as the stream takes them.
    pub(super) fn write(&mut self, frames: &[u8], cx: &mut Context<'_>, now: Instant) {
        if frames.is_empty() {
            return;
        }
        let mut rest = frames;
        if self.out.is_empty() && !self.broken && !self.close_sent {
            while !rest.is_empty() {
                match Pin::new(&mut self.stream).poll_write(cx, rest) {
                    Poll::Ready(Ok(taken)) if taken > 0 => {
                        self.unflushed = true;
                        rest = rest.get(taken..).unwrap_or_default();
                    }
                    Poll::Ready(_) => return self.break_off(),
                    Poll::Pending => {
                        self.stalled = Some(now);
                        break;
                    }
                }
            }
        }
        self.queue(rest);
    }

    /// Writes what waits; `true` if nothing waits any more.
    pub(super) fn poll_out(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        while let Some(rest) = self.out.get(self.written..).filter(|rest| !rest.is_empty()) {
            match Pin::new(&mut self.stream).poll_write(cx, rest) {
                Poll::Ready(Ok(taken)) if taken > 0 => {
                    self.unflushed = true;
                    self.written += taken;
                    self.stalled = None;
                }
                Poll::Ready(_) => {
                    self.break_off();
                    return true;
                }
                Poll::Pending => {
                    self.stalled.get_or_insert(now);
                    return false;
                }
            }
        }
        if self.written > 0 {
            self.out = Vec::new();
            self.written = 0;
        }
        // A TLS stream takes more than its socket does: what it holds for a slow reader counts as waiting.
        if self.unflushed {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(_)) => self.break_off(),
                Poll::Pending => {
                    self.stalled.get_or_insert(now);
                    return false;
                }
            }
        }
        self.stalled = None;
        true
    }

    /// Shuts our end once the last word is out and none is expected.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) {
        let is_over = matches!(self.intake, Intake::Discard | Intake::Ended) && self.close_sent;
        if !is_over || self.shut || self.broken || !self.out.is_empty() || self.unflushed {
            return;
        }
        match Pin::new(&mut self.stream).poll_shutdown(cx) {
            Poll::Ready(Ok(())) => self.shut = true,
            Poll::Ready(Err(_)) => self.break_off(),
            Poll::Pending => {}
        }
    }

    /// Reads on without keeping anything, for the peer's close frame or the end of its stream.
    pub(super) fn drain(&mut self, read: &mut [u8], cx: &mut Context<'_>) -> bool {
        let (came, more, ended) = self.poll_in(cx, read, usize::MAX);
        if self.intake == Intake::Drain {
            let mut kept = std::mem::take(&mut self.unread);
            kept.extend_from_slice(came);
            let mut rest = kept.as_slice();
            loop {
                let skipped = self.skip.min(rest.len());
                self.skip -= skipped;
                rest = rest.get(skipped..).unwrap_or_default();
                let Ok(header) = frame::read_header(self.peer, u32::MAX, self.incoming.inflates(), rest)
                else {
                    self.intake = Intake::Discard;
                    break;
                };
                match header {
                    Some(header) if header.opcode != Opcode::Close => self.skip = header.wire_len(),
                    Some(header) if header.wire_len() <= rest.len() => {
                        self.close_received = true;
                        self.intake = Intake::Discard;
                        break;
                    }
                    Some(_) | None => {
                        self.unread = rest.to_vec();
                        break;
                    }
                }
            }
        }
        if ended {
            self.lose_input();
        }
        more
    }
}

struct NoRandomness;

/// The key for a frame of our own: towards a server we are the client, and every frame has a new one
/// (RFC 6455 §5.3).
fn fresh_mask(peer: Sender) -> Result<Option<[u8; 4]>, NoRandomness> {
    match peer {
        Sender::Client => Ok(None),
        Sender::Server => {
            let mut key = [0; 4];
            SystemRandom::new().fill(&mut key).map_err(|_| NoRandomness)?;
            Ok(Some(key))
        }
    }
}
