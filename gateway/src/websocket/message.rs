//! From frames to messages, one direction of one tunnel: no I/O, no clock.
//!
//! What goes on is the wire bytes as they came, unless they were compressed. What is judged is the unmasked and
//! inflated payload, in a scratch buffer of the core (or, where nothing is masked, in the peer's own buffer).

use std::time::{Duration, Instant};

use sealgate_policy::{Denial, MessageKind, TunnelLimits};
use zeroize::Zeroize as _;

use super::close::CloseError;
use super::deflate::{InflateError, Inflater};
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
    /// A frame of a message that nobody looks into: it keeps frame and message rules, and may go on as soon as
    /// the message is judged by its kind.
    Frame {
        /// Bytes on the wire.
        len: usize,
        /// Text (checked to be UTF-8 so far) or binary.
        kind: MessageKind,
        /// Whether it begins the message.
        first: bool,
        /// Whether it ends it.
        last: bool,
        /// Its payload as it is on the wire, masked or not.
        payload: &'a [u8],
    },
    /// A whole message to be judged.
    Message {
        /// Bytes on the wire of its last frame.
        len: usize,
        /// Text (already checked to be UTF-8) or binary.
        kind: MessageKind,
        /// Unmasked and inflated, over all fragments.
        payload: &'a [u8],
        /// What is to be forwarded, if it may be.
        forward: Forward,
    },
}

/// In which form a whole message goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forward {
    /// Its only frame, as it lies.
    InPlace,
    /// Its wire bytes (this last frame included) from [`Assembler::take_held`].
    Held,
    /// Its payload in a new frame, for it came compressed.
    Anew,
}

/// Buffers of a core, overwritten with every message.
#[derive(Default)]
pub struct Scratch {
    /// Unmasked payload.
    plain: Vec<u8>,
    inflater: Inflater,
}

impl Scratch {
    /// Erases the last message: there was a secret in it.
    pub fn erase(&mut self) {
        self.plain.zeroize();
        self.inflater.erase();
    }

    /// Gives back memory that a long message needed, beyond `kept` bytes.
    pub fn trim(&mut self, kept: usize) {
        if self.plain.capacity() > kept {
            self.plain = Vec::new();
        }
        self.inflater.trim(kept);
    }
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
    /// A compressed message that does not inflate within its bounds.
    #[error(transparent)]
    Inflate(#[from] InflateError),
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
            WireFault::Inflate(error) => error.into(),
            WireFault::ControlFlood { .. } => Denial::ControlFlood,
        }
    }
}

/// One direction of a tunnel. Small, for there is one for every idle direction too.
#[derive(Debug)]
pub struct Assembler {
    sender: Sender,
    /// Whether its messages may come compressed.
    deflate: bool,
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
    compressed: bool,
    frames: u32,
    size: usize,
}

impl Assembler {
    /// For the frames that `sender` sends, of messages that may be compressed if `deflate` is agreed on.
    pub fn new(sender: Sender, deflate: bool) -> Assembler {
        Assembler {
            sender,
            deflate,
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
    /// message that begins now has to be held until it is whole; a compressed one is in any case. `scratch` is
    /// overwritten at will.
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
        scratch: &'a mut Scratch,
    ) -> Result<Step<'a>, WireFault> {
        let Scratch { plain, inflater } = scratch;
        let Some(header) = frame::read_header(self.sender, limits.max_frame, self.deflate, wire)? else {
            return Ok(Step::Partial);
        };
        let len = header.wire_len();
        let whole = wire.get(..len);
        if header.opcode.is_control() {
            let Some(whole) = whole else {
                return Ok(Step::Partial);
            };
            self.control.count(limits.control_per_second, now)?;
            return Ok(Step::Control { len, opcode: header.opcode, payload: unmasked(header, whole, plain) });
        }

        let mut open = match (self.open, header.opcode) {
            (Some(open), Opcode::Continuation) => open,
            (None, Opcode::Continuation) => return Err(WireFault::NothingToContinue),
            (Some(_), _) => return Err(WireFault::NotContinued),
            (None, Opcode::Text) => Open::new(MessageKind::Text, judged, header),
            (None, _) => Open::new(MessageKind::Binary, judged, header),
        };
        open.add(header.payload_len, limits)?;

        let Some(whole) = whole else {
            if open.is_text_on_the_wire() {
                self.read_text_ahead(header, wire, plain)?;
            }
            return Ok(Step::Partial);
        };
        // A message in one frame: the usual case, judged where it lies.
        if header.fin && open.frames == 1 {
            if open.kind == MessageKind::Binary && !open.held {
                return Ok(open.frame(header, whole));
            }
            let payload = unmasked(header, whole, plain);
            if open.compressed {
                return open.inflated(len, payload, limits, inflater);
            }
            if open.kind == MessageKind::Text {
                self.check_text(payload, true)?;
            }
            return Ok(match open.held {
                false => open.frame(header, whole),
                true => Step::Message { len, kind: open.kind, payload, forward: Forward::InPlace },
            });
        }

        if open.is_text_on_the_wire() {
            self.check_text(unmasked(header, whole, plain), header.fin)?;
        }
        self.open = (!header.fin).then_some(open);
        if !open.held {
            return Ok(open.frame(header, whole));
        }
        self.held.extend_from_slice(whole);
        if !header.fin {
            return Ok(Step::Held { len });
        }
        plain.clear();
        let mut rest = self.held.as_slice();
        while let Some(header) = frame::read_header(self.sender, limits.max_frame, self.deflate, rest)? {
            let Some((whole, behind)) = rest.split_at_checked(header.wire_len()) else {
                break;
            };
            append_payload(header, whole, 0, plain);
            rest = behind;
        }
        if open.compressed {
            self.held = Vec::new();
            return open.inflated(len, plain, limits, inflater);
        }
        Ok(Step::Message { len, kind: open.kind, payload: plain, forward: Forward::Held })
    }

    /// Whether compressed messages are read.
    pub fn inflates(&self) -> bool {
        self.deflate
    }

    /// Wire bytes of the fragmented message that [`Assembler::next`] just gave: to be forwarded or dropped.
    pub fn take_held(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// Whether a message is on its way frame by frame, so that no other may begin on the receiver's side.
    pub fn is_amid_message(&self) -> bool {
        self.open.is_some_and(|open| !open.held)
    }

    /// Checks what has come of an incomplete frame, so that wrong text ends the tunnel at its first wrong byte.
    fn read_text_ahead(
        &mut self,
        header: Header,
        wire: &[u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), WireFault> {
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
    fn new(kind: MessageKind, judged: bool, header: Header) -> Open {
        let compressed = header.compressed;
        Open { kind, held: judged || compressed, compressed, frames: 0, size: 0 }
    }

    fn is_text_on_the_wire(self) -> bool {
        self.kind == MessageKind::Text && !self.compressed
    }

    /// The whole message, from its compressed payload.
    fn inflated<'a>(
        self,
        len: usize,
        compressed: &[u8],
        limits: &TunnelLimits,
        inflater: &'a mut Inflater,
    ) -> Result<Step<'a>, WireFault> {
        let payload = inflater.inflate(compressed, limits)?;
        if self.kind == MessageKind::Text && simdutf8::basic::from_utf8(payload).is_err() {
            return Err(WireFault::NotUtf8);
        }
        Ok(Step::Message { len, kind: self.kind, payload, forward: Forward::Anew })
    }

    fn frame(self, header: Header, whole: &[u8]) -> Step<'_> {
        Step::Frame {
            len: whole.len(),
            kind: self.kind,
            first: self.frames == 1,
            last: header.fin,
            payload: whole.get(header.header_len..).unwrap_or_default(),
        }
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
            let Some((&byte, rest)) = text.split_first() else {
                return Ok(());
            };
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
        let Err(error) = simdutf8::compat::from_utf8(text) else {
            return Ok(());
        };
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::deflate;
    use super::*;

    const LIMITS: TunnelLimits = TunnelLimits {
        max_frame: 1000,
        max_message: 2000,
        max_fragments: 4,
        max_inflate_ratio: 100,
        control_per_second: 3,
        idle: None,
        ping_interval: Duration::from_secs(30),
        pong_timeout: Duration::from_secs(20),
        write_timeout: Duration::from_secs(20),
        buffer: 4096,
    };

    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

    /// One frame, FIN as given.
    fn frame(sender: Sender, fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let mask = (sender == Sender::Client).then_some(MASK);
        frame::write_frame(&mut wire, opcode, mask, payload);
        if !fin {
            wire[0] &= 0x7F;
        }
        wire
    }

    /// What a reader made of some bytes, in a form that does not depend on how they were cut.
    #[derive(Debug, PartialEq, Eq)]
    enum Event {
        Control(Opcode, Vec<u8>),
        Message(MessageKind, Vec<u8>),
        Frame { first: bool, last: bool, len: usize },
        Fault(WireFault),
    }

    /// Feeds `wire` in pieces as the relay does, and checks that held messages keep their wire bytes.
    fn read(sender: Sender, judged: bool, pieces: &[&[u8]]) -> Vec<Event> {
        read_with(sender, false, judged, pieces)
    }

    fn read_with(sender: Sender, deflate: bool, judged: bool, pieces: &[&[u8]]) -> Vec<Event> {
        let mut assembler = Assembler::new(sender, deflate);
        let (mut unread, mut events, mut scratch) = (Vec::new(), Vec::new(), Scratch::default());
        let (mut expected_held, now) = (Vec::new(), Instant::now());
        for piece in pieces {
            unread.extend_from_slice(piece);
            loop {
                let taken = match assembler.next(&unread, judged, &LIMITS, now, &mut scratch) {
                    Ok(Step::Partial) => break,
                    Ok(Step::Control { len, opcode, payload }) => {
                        events.push(Event::Control(opcode, payload.to_vec()));
                        len
                    }
                    Ok(Step::Held { len }) => {
                        expected_held.extend_from_slice(&unread[..len]);
                        len
                    }
                    Ok(Step::Frame { len, first, last, payload, .. }) => {
                        assert!(!judged);
                        events.push(Event::Frame { first, last, len: payload.len() });
                        len
                    }
                    Ok(Step::Message { len, kind, payload, forward }) => {
                        assert!(judged || forward == Forward::Anew);
                        events.push(Event::Message(kind, payload.to_vec()));
                        match forward {
                            Forward::InPlace => {}
                            Forward::Held => expected_held.extend_from_slice(&unread[..len]),
                            Forward::Anew => expected_held.clear(),
                        }
                        assert_eq!(assembler.take_held(), std::mem::take(&mut expected_held));
                        len
                    }
                    Err(fault) => {
                        events.push(Event::Fault(fault));
                        return events;
                    }
                };
                unread.drain(..taken);
            }
        }
        events
    }

    fn fault(sender: Sender, frames: &[Vec<u8>]) -> WireFault {
        let wire = frames.concat();
        let faults = [true, false].map(|judged| match read(sender, judged, &[&wire]).pop() {
            Some(Event::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        });
        assert_eq!(faults[0], faults[1]);
        faults[0]
    }

    #[test]
    fn a_fragmented_message_with_a_ping_inside() {
        for sender in [Sender::Client, Sender::Server] {
            let wire = [
                frame(sender, false, Opcode::Text, b"Hel"),
                frame(sender, true, Opcode::Ping, b"?"),
                frame(sender, false, Opcode::Continuation, b""),
                frame(sender, true, Opcode::Continuation, b"lo"),
                frame(sender, true, Opcode::Binary, b"next"),
            ]
            .concat();
            let ping = || Event::Control(Opcode::Ping, b"?".to_vec());
            assert_eq!(
                read(sender, true, &[&wire]),
                [
                    ping(),
                    Event::Message(MessageKind::Text, b"Hello".to_vec()),
                    Event::Message(MessageKind::Binary, b"next".to_vec()),
                ]
            );
            assert_eq!(
                read(sender, false, &[&wire]),
                [
                    Event::Frame { first: true, last: false, len: 3 },
                    ping(),
                    Event::Frame { first: false, last: false, len: 0 },
                    Event::Frame { first: false, last: true, len: 2 },
                    Event::Frame { first: true, last: true, len: 4 },
                ]
            );
        }
    }

    #[test]
    fn the_order_of_frames_is_kept() {
        for sender in [Sender::Client, Sender::Server] {
            let text = frame(sender, false, Opcode::Text, b"a");
            assert_eq!(
                fault(sender, &[frame(sender, true, Opcode::Continuation, b"")]),
                WireFault::NothingToContinue
            );
            assert_eq!(fault(sender, &[text.clone(), text.clone()]), WireFault::NotContinued);
            assert_eq!(
                fault(sender, &[text, frame(sender, true, Opcode::Binary, b"")]),
                WireFault::NotContinued
            );
        }
    }

    #[test]
    fn limits_hold_before_the_payload_comes() {
        let sender = Sender::Server;
        let first = frame(sender, false, Opcode::Binary, &[0; 1000]);
        let more = frame(sender, false, Opcode::Continuation, &[0; 1000]);
        let header_of_one_byte = vec![0x80, 1];
        assert_eq!(
            fault(sender, &[first.clone(), more, header_of_one_byte]),
            WireFault::TooLarge { limit: 2000 }
        );
        let empty = frame(sender, false, Opcode::Continuation, b"");
        let header = vec![0x80, 5];
        assert_eq!(
            fault(sender, &[first, empty.clone(), empty.clone(), empty, header]),
            WireFault::TooManyFragments { limit: 4 }
        );
        assert_eq!(
            fault(sender, &[vec![0x82, 126, 0x03, 0xE9]]),
            WireFault::Frame(FrameError::TooLarge { size: 1001, limit: 1000 })
        );
    }

    #[test]
    fn control_frames_have_a_rate() {
        let mut window = Window::default();
        let start = Instant::now();
        for _ in 0..3 {
            window.count(3, start).unwrap();
        }
        assert_eq!(
            window.count(3, start + Duration::from_millis(999)),
            Err(WireFault::ControlFlood { limit: 3 })
        );
        assert_eq!(window.count(3, start + Duration::from_secs(1)), Ok(()));

        let ping = frame(Sender::Client, true, Opcode::Ping, b"");
        assert_eq!(fault(Sender::Client, &vec![ping; 4]), WireFault::ControlFlood { limit: 3 });
    }

    #[test]
    fn text_is_utf8_over_fragments_and_fails_at_the_first_wrong_byte() {
        let sender = Sender::Client;
        let [a, b, c] = "€".as_bytes() else { panic!() };
        let split = [
            frame(sender, false, Opcode::Text, &[*a]),
            frame(sender, false, Opcode::Continuation, &[*b]),
            frame(sender, true, Opcode::Continuation, &[*c]),
        ]
        .concat();
        assert_eq!(
            read(sender, true, &[&split]),
            [Event::Message(MessageKind::Text, "€".as_bytes().to_vec())]
        );
        assert_eq!(fault(sender, &[frame(sender, true, Opcode::Text, &[*a, *b])]), WireFault::NotUtf8);
        assert_eq!(
            fault(
                sender,
                &[frame(sender, false, Opcode::Text, &[*a]), frame(sender, true, Opcode::Continuation, b"a")]
            ),
            WireFault::NotUtf8
        );
        // Surrogates, overlong forms, beyond U+10FFFF.
        for wrong in [&[0xED, 0xA0, 0x80][..], &[0xC0, 0x80], &[0xE0, 0x80, 0x80], &[0xF4, 0x90, 0x80, 0x80]]
        {
            assert_eq!(fault(sender, &[frame(sender, true, Opcode::Text, wrong)]), WireFault::NotUtf8);
        }
        // The second byte already is wrong, and the frame is not whole.
        let whole = frame(sender, true, Opcode::Text, &[0xF4, 0x90, 0x80, 0x80]);
        let header = whole.len() - 4;
        assert_eq!(read(sender, true, &[&whole[..header + 1]]), []);
        assert_eq!(read(sender, true, &[&whole[..header + 2]]), [Event::Fault(WireFault::NotUtf8)]);
        // Binary is not text.
        let binary = frame(sender, true, Opcode::Binary, &[0xFF]);
        assert_eq!(read(sender, true, &[&binary]), [Event::Message(MessageKind::Binary, vec![0xFF])]);
    }

    /// One frame, compressed if it begins a message.
    fn packed(sender: Sender, fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
        let mut wire = frame(sender, fin, opcode, payload);
        wire[0] |= if opcode == Opcode::Continuation { 0 } else { 0x40 };
        wire
    }

    #[test]
    fn a_compressed_message_is_whole_before_anybody_sees_it() {
        let sender = Sender::Client;
        let hello = deflate::compressed("Grüße, Grüße, Grüße".as_bytes());
        let (first, last) = hello.split_at(5);
        let wire = [
            packed(sender, false, Opcode::Text, first),
            frame(sender, true, Opcode::Ping, b"!"),
            packed(sender, true, Opcode::Continuation, last),
            packed(sender, true, Opcode::Binary, &hello),
            frame(sender, true, Opcode::Text, b"plain"),
        ]
        .concat();
        let whole = Event::Message(MessageKind::Text, "Grüße, Grüße, Grüße".as_bytes().to_vec());
        let again = Event::Message(MessageKind::Binary, "Grüße, Grüße, Grüße".as_bytes().to_vec());
        let ping = Event::Control(Opcode::Ping, b"!".to_vec());
        let plain = Event::Message(MessageKind::Text, b"plain".to_vec());
        assert_eq!(read_with(sender, true, true, &[&wire]), [ping, whole, again, plain]);
        // Whether it is judged or not: what is compressed is inflated.
        assert_eq!(
            read_with(sender, true, false, &[&wire])[3],
            Event::Frame { first: true, last: true, len: 5 }
        );
        assert_eq!(
            read_with(sender, true, false, &[&wire])[..3],
            read_with(sender, true, true, &[&wire])[..3]
        );
    }

    #[test]
    fn a_compressed_message_keeps_every_limit() {
        let sender = Sender::Client;
        let fault = |frames: &[Vec<u8>]| match read_with(sender, true, true, &[&frames.concat()]).pop() {
            Some(Event::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        };
        let one = |payload: &[u8]| packed(sender, true, Opcode::Text, &deflate::compressed(payload));
        assert_eq!(fault(&[one(&[b'a'; 2001])]), InflateError::TooLarge { limit: 2000 }.into());
        assert_eq!(read_with(sender, true, true, &[&one(&[b'a'; 2000])]).len(), 1);
        assert_eq!(fault(&[one(&[b'a', 0xFF])]), WireFault::NotUtf8);
        // A character may be cut between fragments, for they are cut while compressed; not at the end.
        assert_eq!(fault(&[one(&"ß".as_bytes()[..1])]), WireFault::NotUtf8);
        assert_eq!(fault(&[packed(sender, true, Opcode::Binary, &[0x07])]), InflateError::Malformed.into());
        assert_eq!(fault(&[packed(sender, true, Opcode::Binary, &[])]), InflateError::Malformed.into());
        let piece = |fin, opcode| packed(sender, fin, opcode, &[0; 700]);
        assert_eq!(
            fault(&[
                piece(false, Opcode::Text),
                piece(false, Opcode::Continuation),
                piece(true, Opcode::Continuation)
            ]),
            WireFault::TooLarge { limit: 2000 }
        );
        let empty = frame(sender, false, Opcode::Continuation, b"");
        assert_eq!(
            fault(&[packed(sender, false, Opcode::Text, b""), empty.repeat(4)]),
            WireFault::TooManyFragments { limit: 4 }
        );
        let again = packed(sender, false, Opcode::Text, b"");
        assert_eq!(fault(&[again.clone(), again]), WireFault::NotContinued);
        let mut continued = frame(sender, true, Opcode::Continuation, b"");
        continued[0] |= 0x40;
        assert_eq!(
            fault(&[packed(sender, false, Opcode::Text, b""), continued]),
            FrameError::ReservedBit.into()
        );
    }

    #[test]
    fn every_fault_has_its_close_code() {
        let inflate = |error: InflateError| Denial::from(WireFault::from(error)).close_code();
        assert_eq!(inflate(InflateError::Malformed), 1007);
        assert_eq!(inflate(InflateError::TooLarge { limit: 1 }), 1009);
        assert_eq!(inflate(InflateError::Ratio { limit: 1 }), 1009);
        let code = |fault: WireFault| Denial::from(fault).close_code();
        assert_eq!(code(FrameError::Unmasked.into()), 1002);
        assert_eq!(code(CloseError::Truncated.into()), 1002);
        assert_eq!(code(CloseError::NotUtf8.into()), 1007);
        assert_eq!(code(WireFault::NothingToContinue), 1002);
        assert_eq!(code(WireFault::NotUtf8), 1007);
        assert_eq!(code(WireFault::TooLarge { limit: 1 }), 1009);
        assert_eq!(code(FrameError::TooLarge { size: 2, limit: 1 }.into()), 1009);
        assert_eq!(code(WireFault::TooManyFragments { limit: 1 }), 1009);
        assert_eq!(code(WireFault::ControlFlood { limit: 1 }), 4429);
    }

    /// Random frames, mostly right.
    fn frames() -> impl Strategy<Value = Vec<(bool, u8, Vec<u8>)>> {
        let opcode = prop_oneof![
            8 => Just(0u8),
            4 => Just(1u8),
            2 => Just(2u8),
            1 => Just(9u8),
            1 => Just(8u8),
        ];
        let text = proptest::collection::vec(prop_oneof!["[a-zäß€😀]{0,40}".prop_map(String::into_bytes)], 1)
            .prop_map(|mut texts| texts.pop().unwrap());
        let payload = prop_oneof![4 => text, 1 => proptest::collection::vec(any::<u8>(), 0..40)];
        proptest::collection::vec((any::<bool>(), opcode, payload), 1..12)
    }

    fn wire(sender: Sender, frames: &[(bool, u8, Vec<u8>)]) -> Vec<u8> {
        let frame = |(fin, opcode, payload): &(bool, u8, Vec<u8>)| {
            let opcode = match opcode {
                0 => Opcode::Continuation,
                1 => Opcode::Text,
                2 => Opcode::Binary,
                8 => Opcode::Close,
                _ => Opcode::Ping,
            };
            frame(sender, *fin || opcode.is_control(), opcode, payload)
        };
        frames.iter().flat_map(frame).collect()
    }

    /// Bytes to be read; what is written goes nowhere.
    struct Recording<'a>(&'a [u8]);

    impl std::io::Read for Recording<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(into)
        }
    }

    impl std::io::Write for Recording<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        /// However the bytes are cut: the same messages, the same fault, also by the plainest way to say it.
        #[test]
        fn cutting_changes_nothing(
            frames in frames(), cuts in proptest::collection::vec(1usize..30, 1..60), client: bool, judged: bool,
        ) {
            let sender = if client { Sender::Client } else { Sender::Server };
            let wire = wire(sender, &frames);
            let whole = read(sender, judged, &[&wire]);
            let single: Vec<&[u8]> = wire.chunks(1).collect();
            prop_assert_eq!(&whole, &read(sender, judged, &single));
            let (mut pieces, mut rest) = (Vec::new(), &wire[..]);
            for cut in cuts {
                let (piece, behind) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = behind;
            }
            pieces.push(rest);
            prop_assert_eq!(&whole, &read(sender, judged, &pieces));

            for event in &whole {
                if let Event::Message(MessageKind::Text, payload) = event {
                    prop_assert!(std::str::from_utf8(payload).is_ok());
                }
            }
        }

        /// Compressed messages, mostly whole, in fragments with pings between them, however the bytes are cut.
        #[test]
        fn cutting_changes_nothing_of_what_is_compressed(
            messages in proptest::collection::vec(("[a-zß]{0,300}", 1usize..4, 0u8..8, any::<bool>()), 1..5),
            cut in 1usize..40, judged: bool,
        ) {
            let sender = Sender::Client;
            let (mut wire, mut expected) = (Vec::new(), Vec::new());
            for (text, pieces, broken, text_kind) in &messages {
                let mut payload = deflate::compressed(text.as_bytes());
                if *broken == 0 {
                    payload.pop();
                }
                let size = payload.len().div_ceil(*pieces).max(1);
                let last = payload.chunks(size).count().saturating_sub(1);
                for (index, piece) in payload.chunks(size).enumerate() {
                    let kind = if *text_kind { Opcode::Text } else { Opcode::Binary };
                    let opcode = if index == 0 { kind } else { Opcode::Continuation };
                    wire.extend(packed(sender, index == last, opcode, piece));
                }
                let kind = if *text_kind { MessageKind::Text } else { MessageKind::Binary };
                expected.push((*broken != 0).then(|| Event::Message(kind, text.as_bytes().to_vec())));
            }
            let whole = read_with(sender, true, judged, &[&wire]);
            let pieces: Vec<&[u8]> = wire.chunks(cut).collect();
            prop_assert_eq!(&whole, &read_with(sender, true, judged, &pieces));
            let good: Vec<Event> = expected.into_iter().map_while(|it| it).collect();
            prop_assert_eq!(&whole[..good.len()], &good[..]);
            if let Some((text, ..)) = messages.get(good.len()).filter(|(text, ..)| !text.is_empty()) {
                match &whole[good.len()] {
                    Event::Fault(_) => {}
                    // The bytes that end every message (RFC 7692 §7.2.2) stand in for the one that is missing, and DEFLATE has
                    // no checksum: it may say something else then. Nothing that another inflater does not read there.
                    Event::Message(_, payload) => {
                        let mut cut = deflate::compressed(text.as_bytes());
                        cut.pop();
                        let other = deflate::inflated_by_another(&cut);
                        prop_assert_eq!(Some(payload), other.as_ref());
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
            }
        }

        /// The same messages, and a fault exactly where tungstenite sees one, from the same bytes.
        #[test]
        fn tungstenite_reads_the_same(frames in frames(), client: bool) {
            use tokio_tungstenite::tungstenite::{self, protocol::Role};
            let sender = if client { Sender::Client } else { Sender::Server };
            let wire = wire(sender, &frames);
            let ours = read(sender, true, &[&wire]);

            let role = if client { Role::Server } else { Role::Client };
            let mut theirs = tungstenite::WebSocket::from_raw_socket(Recording(wire.as_slice()), role, None);
            let mut seen = Vec::new();
            let fault = loop {
                match theirs.read() {
                    Ok(tungstenite::Message::Text(text)) => {
                        seen.push(Event::Message(MessageKind::Text, text.as_bytes().to_vec()));
                    }
                    Ok(tungstenite::Message::Binary(bytes)) => {
                        seen.push(Event::Message(MessageKind::Binary, bytes.to_vec()));
                    }
                    Ok(tungstenite::Message::Ping(bytes)) => {
                        seen.push(Event::Control(Opcode::Ping, bytes.to_vec()));
                    }
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            // Limits are ours, and a close frame ends their reading.
            let is_theirs = |event: &&Event| !matches!(event, Event::Fault(_) | Event::Control(Opcode::Close, _));
            let ours_until_close: Vec<&Event> = ours.iter().take_while(is_theirs).collect();
            let is_limited = matches!(
                ours.last(),
                Some(Event::Fault(WireFault::TooManyFragments { .. } | WireFault::ControlFlood { .. }))
            );
            if is_limited {
                prop_assert!(seen.len() >= ours_until_close.len());
            } else {
                prop_assert_eq!(ours_until_close, seen.iter().collect::<Vec<_>>());
            }
            let closed = ours.iter().any(|event| matches!(event, Event::Control(Opcode::Close, _)));
            let is_order = matches!(
                ours.last(),
                Some(Event::Fault(WireFault::NothingToContinue | WireFault::NotContinued))
            );
            if is_order && !closed {
                prop_assert!(matches!(fault, tungstenite::Error::Protocol(_)), "{fault}");
            }
        }

        #[test]
        fn utf8_in_pieces_is_utf8(bytes in proptest::collection::vec(any::<u8>(), 0..40), cut in 1usize..8) {
            let mut text = Utf8::default();
            let streamed = bytes.chunks(cut).try_for_each(|piece| text.feed(piece)).is_ok() && text.is_complete();
            prop_assert_eq!(streamed, std::str::from_utf8(&bytes).is_ok());
        }
    }
}
