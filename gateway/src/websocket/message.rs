//! From frames to messages, one direction of one tunnel: no I/O, no clock.
//!
//! What goes on is always the wire bytes as they came. What is judged is the unmasked payload, in a
//! scratch buffer of the core (or, where nothing is masked, in the peer's own buffer).

use std::time::{Duration, Instant};

use sealgate_policy::{Denial, MessageKind, TunnelLimits};

use super::close::CloseError;
use super::frame::{self, FrameError, Header, Opcode, Sender};

/// What stands at the front of the bytes given to [`Assembler::next`]; `len` is its length on the wire.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Not a whole frame yet. Come back with more behind it.
    Partial,
    /// A ping, pong or close frame, with its payload unmasked. Not to be forwarded as it is.
    Control {
        /// Bytes on the wire.
        len: usize,
        /// [`Opcode::Close`], [`Opcode::Ping`] or [`Opcode::Pong`].
        opcode: Opcode,
        /// At most 125 bytes.
        payload: &'a [u8],
    },
    /// A fragment of a message that is held until it is whole: kept by the assembler.
    Held {
        /// Bytes on the wire.
        len: usize,
    },
    /// A frame of a message that nobody judges: it keeps frame and message rules, and may go on.
    Frame {
        /// Bytes on the wire.
        len: usize,
        /// When the frame ends its message: payload bytes of all of it.
        message: Option<usize>,
    },
    /// A whole message to be judged.
    Message {
        /// Bytes on the wire of its last frame.
        len: usize,
        /// Text (already checked to be UTF-8) or binary.
        kind: MessageKind,
        /// Unmasked, over all fragments.
        payload: &'a [u8],
        /// If so, its wire bytes (this last frame included) are in [`Assembler::take_held`].
        fragmented: bool,
    },
}

/// Why a peer cannot be read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireFault {
    /// A frame breaks the rules.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A close frame breaks the rules.
    #[error(transparent)]
    Close(#[from] CloseError),
    /// A continuation of nothing (RFC 6455 §5.4).
    #[error("continuation without a message")]
    NothingToContinue,
    /// A new message inside another (§5.4).
    #[error("message begun inside another")]
    NotContinued,
    /// More frames in one message than the policy allows.
    #[error("message in more than {limit} fragments")]
    TooManyFragments {
        /// Frames that the policy allows.
        limit: u32,
    },
    /// More payload over all fragments than the policy allows.
    #[error("message of more than {limit} bytes")]
    TooLarge {
        /// Bytes that the policy allows.
        limit: u32,
    },
    /// Text that is not UTF-8 (§8.1).
    #[error("text is not UTF-8")]
    NotUtf8,
    /// More control frames within a second than the policy allows.
    #[error("more than {limit} control frames in a second")]
    ControlFlood {
        /// Control frames that the policy allows in a second.
        limit: u32,
    },
}

impl From<WireFault> for Denial {
    fn from(fault: WireFault) -> Denial {
        match fault {
            WireFault::Frame(error) => error.into(),
            WireFault::Close(error) => error.into(),
            WireFault::NothingToContinue => Denial::Protocol { detail: "continuation without a message" },
            WireFault::NotContinued => Denial::Protocol { detail: "message begun inside another" },
            WireFault::TooManyFragments { limit } => Denial::TooManyFragments { limit },
            WireFault::TooLarge { limit } => Denial::MessageTooBig { limit },
            WireFault::NotUtf8 => Denial::NotUtf8,
            WireFault::ControlFlood { .. } => Denial::ControlFlood,
        }
    }
}

/// One direction of a tunnel. Small, for there is one for every idle direction too.
#[derive(Debug)]
pub struct Assembler {
    sender: Sender,
    /// The message under way, from its first whole frame to its last.
    open: Option<Open>,
    /// Wire bytes of the whole frames of a held message. At most `max_message` bytes and a header for
    /// each of `max_fragments`.
    held: Vec<u8>,
    text: Utf8,
    /// How much payload of the incomplete frame at the front `text` has seen already.
    text_seen: usize,
    control: Window,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    kind: MessageKind,
    /// Held to be judged, or passed on frame by frame. Decided with the first frame, for all of it.
    held: bool,
    frames: u32,
    size: usize,
}

impl Assembler {
    /// For the frames that `sender` sends.
    pub fn new(sender: Sender) -> Assembler {
        Assembler {
            sender,
            open: None,
            held: Vec::new(),
            text: Utf8::default(),
            text_seen: 0,
            control: Window::default(),
        }
    }

    /// Takes the next frame from the front of `wire`, which begins at a frame boundary.
    ///
    /// Unless the answer is [`Step::Partial`], call again behind its `len` bytes. `judged` says whether a
    /// message that begins now has to be held until it is whole. `scratch` is overwritten at will.
    ///
    /// # Errors
    /// The first rule that the peer broke; nothing of it can be read any further. A limit or a wrong byte of
    /// text shows as soon as it arrives, not when its frame is complete.
    pub fn next<'a>(
        &mut self,
        wire: &'a [u8],
        judged: bool,
        limits: &TunnelLimits,
        now: Instant,
        scratch: &'a mut Vec<u8>,
    ) -> Result<Step<'a>, WireFault> {
        let Some(header) = frame::read_header(self.sender, limits.max_frame, wire)? else {
            return Ok(Step::Partial);
        };
        let len = header.wire_len();
        let whole = wire.get(..len);
        if header.opcode.is_control() {
            let Some(whole) = whole else { return Ok(Step::Partial) };
            self.control.count(limits.control_per_second, now)?;
            return Ok(Step::Control { len, opcode: header.opcode, payload: unmasked(header, whole, scratch) });
        }

        let mut open = match (self.open, header.opcode) {
            (Some(open), Opcode::Continuation) => open,
            (None, Opcode::Continuation) => return Err(WireFault::NothingToContinue),
            (Some(_), _) => return Err(WireFault::NotContinued),
            (None, Opcode::Text) => Open::new(MessageKind::Text, judged),
            (None, _) => Open::new(MessageKind::Binary, judged),
        };
        open.add(header.payload_len, limits)?;

        let Some(whole) = whole else {
            if open.kind == MessageKind::Text {
                self.read_text_ahead(header, wire, scratch)?;
            }
            return Ok(Step::Partial);
        };
        // A message in one frame: the usual case, judged where it lies.
        if header.fin && open.frames == 1 {
            if open.kind == MessageKind::Binary && !open.held {
                return Ok(Step::Frame { len, message: Some(open.size) });
            }
            let payload = unmasked(header, whole, scratch);
            if open.kind == MessageKind::Text {
                self.check_text(payload, true)?;
            }
            return Ok(match open.held {
                false => Step::Frame { len, message: Some(open.size) },
                true => Step::Message { len, kind: open.kind, payload, fragmented: false },
            });
        }

        if open.kind == MessageKind::Text {
            self.check_text(unmasked(header, whole, scratch), header.fin)?;
        }
        self.open = (!header.fin).then_some(open);
        if !open.held {
            return Ok(Step::Frame { len, message: header.fin.then_some(open.size) });
        }
        self.held.extend_from_slice(whole);
        if !header.fin {
            return Ok(Step::Held { len });
        }
        scratch.clear();
        let mut rest = self.held.as_slice();
        while let Some(header) = frame::read_header(self.sender, limits.max_frame, rest)? {
            let Some((whole, behind)) = rest.split_at_checked(header.wire_len()) else { break };
            append_payload(header, whole, 0, scratch);
            rest = behind;
        }
        Ok(Step::Message { len, kind: open.kind, payload: scratch, fragmented: true })
    }

    /// Wire bytes of the fragmented message that [`Assembler::next`] just gave: to be forwarded or dropped.
    pub fn take_held(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// Whether a message has begun and not ended.
    pub fn is_between_messages(&self) -> bool {
        self.open.is_none()
    }

    /// Checks what has come of an incomplete frame, so that wrong text ends the tunnel at its first wrong byte.
    fn read_text_ahead(&mut self, header: Header, wire: &[u8], scratch: &mut Vec<u8>) -> Result<(), WireFault> {
        scratch.clear();
        append_payload(header, wire, self.text_seen, scratch);
        self.text_seen = self.text_seen.saturating_add(scratch.len());
        self.text.feed(scratch)
    }

    /// Checks a whole frame of text, but for what [`Assembler::read_text_ahead`] has seen.
    fn check_text(&mut self, payload: &[u8], last: bool) -> Result<(), WireFault> {
        let seen = std::mem::take(&mut self.text_seen);
        if seen == 0 && last && self.text.is_complete() {
            return simdutf8::basic::from_utf8(payload).map(drop).map_err(|_| WireFault::NotUtf8);
        }
        self.text.feed(payload.get(seen..).unwrap_or_default())?;
        if last && !self.text.is_complete() {
            return Err(WireFault::NotUtf8);
        }
        Ok(())
    }
}

impl Open {
    fn new(kind: MessageKind, held: bool) -> Open {
        Open { kind, held, frames: 0, size: 0 }
    }

    fn add(&mut self, payload_len: usize, limits: &TunnelLimits) -> Result<(), WireFault> {
        self.frames = self.frames.saturating_add(1);
        self.size = self.size.saturating_add(payload_len);
        if self.frames > limits.max_fragments.max(1) {
            return Err(WireFault::TooManyFragments { limit: limits.max_fragments });
        }
        if self.size > limits.max_message as usize {
            return Err(WireFault::TooLarge { limit: limits.max_message });
        }
        Ok(())
    }
}

/// Payload of a whole frame: in place if it is not masked, in `scratch` if it is.
fn unmasked<'a>(header: Header, whole: &'a [u8], scratch: &'a mut Vec<u8>) -> &'a [u8] {
    match header.mask {
        None => whole.get(header.header_len..).unwrap_or_default(),
        Some(_) => {
            scratch.clear();
            append_payload(header, whole, 0, scratch);
            scratch
        }
    }
}

/// Appends what `wire` has of a frame's payload, from byte `from` of it on, unmasked.
fn append_payload(header: Header, wire: &[u8], from: usize, out: &mut Vec<u8>) {
    let payload = wire.get(header.header_len.saturating_add(from)..).unwrap_or_default();
    match header.mask {
        None => out.extend_from_slice(payload),
        Some(key) => frame::append_unmasked(out, payload, key, from),
    }
}

/// UTF-8 that comes in pieces: holds at most three bytes of a character that is not whole.
#[derive(Debug, Clone, Copy, Default)]
struct Utf8 {
    tail: [u8; 4],
    len: u8,
}

impl Utf8 {
    fn is_complete(&self) -> bool {
        self.len == 0
    }

    fn feed(&mut self, mut text: &[u8]) -> Result<(), WireFault> {
        while !self.is_complete() {
            let Some((&byte, rest)) = text.split_first() else { return Ok(()) };
            text = rest;
            if let Some(place) = self.tail.get_mut(usize::from(self.len)) {
                *place = byte;
            }
            self.len += 1;
            match std::str::from_utf8(self.tail.get(..usize::from(self.len)).unwrap_or_default()) {
                Ok(_) => self.len = 0,
                // `None`: wrong only in that it ends too soon.
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(WireFault::NotUtf8),
            }
        }
        let Err(error) = simdutf8::compat::from_utf8(text) else { return Ok(()) };
        if error.error_len().is_some() {
            return Err(WireFault::NotUtf8);
        }
        for byte in text.iter().skip(error.valid_up_to()) {
            if let Some(place) = self.tail.get_mut(usize::from(self.len)) {
                *place = *byte;
            }
            self.len += 1;
        }
        Ok(())
    }
}

/// Control frames since a moment: at most twice the limit in any second, and no memory but this.
#[derive(Debug, Default)]
struct Window {
    since: Option<Instant>,
    count: u32,
}

impl Window {
    fn count(&mut self, limit: u32, now: Instant) -> Result<(), WireFault> {
        match self.since {
            Some(since) if now.saturating_duration_since(since) < Duration::from_secs(1) => self.count += 1,
            _ => *self = Window { since: Some(now), count: 1 },
        }
        match self.count > limit {
            true => Err(WireFault::ControlFlood { limit }),
            false => Ok(()),
        }
    }
}
