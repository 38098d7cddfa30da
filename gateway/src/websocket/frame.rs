//! Frame headers (RFC 6455 §5.2), read in place: no I/O, no allocation, no copy.
//!
//! Every fault is found at the first byte that shows it, so that a peer cannot make us wait for (or
//! keep) bytes of a frame that will be refused anyway.

use sealgate_policy::{Denial, MessageKind};

/// Longest frame header: two bytes, eight of length, four of masking key.
pub const MAX_HEADER: usize = 14;

/// Longest payload of a control frame, in bytes (RFC 6455 §5.5).
pub const MAX_CONTROL_PAYLOAD: usize = 125;

/// In the first byte of a frame: its message is compressed (RFC 7692 §6).
const RSV1: u8 = 0x40;

/// Which end of a WebSocket sent a frame: it decides whether the frame has to be masked (§5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// Masks every frame.
    Client,
    /// Masks none.
    Server,
}

/// What a frame is for (§5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// Goes on with the message that a text or binary frame began.
    Continuation,
    /// Begins a text message.
    Text,
    /// Begins a binary message.
    Binary,
    /// Begins or answers the closing handshake.
    Close,
    /// Asks the peer whether it is there.
    Ping,
    /// Answers a ping, or says unasked that one is there.
    Pong,
}

impl Opcode {
    /// Whether the frame is about the connection rather than part of a message (§5.5).
    pub fn is_control(self) -> bool {
        matches!(self, Opcode::Close | Opcode::Ping | Opcode::Pong)
    }

    fn from_wire(bits: u8) -> Option<Opcode> {
        match bits {
            0x0 => Some(Opcode::Continuation),
            0x1 => Some(Opcode::Text),
            0x2 => Some(Opcode::Binary),
            0x8 => Some(Opcode::Close),
            0x9 => Some(Opcode::Ping),
            0xA => Some(Opcode::Pong),
            _ => None,
        }
    }

    fn to_wire(self) -> u8 {
        match self {
            Opcode::Continuation => 0x0,
            Opcode::Text => 0x1,
            Opcode::Binary => 0x2,
            Opcode::Close => 0x8,
            Opcode::Ping => 0x9,
            Opcode::Pong => 0xA,
        }
    }
}

impl From<MessageKind> for Opcode {
    fn from(kind: MessageKind) -> Opcode {
        match kind {
            MessageKind::Text => Opcode::Text,
            MessageKind::Binary => Opcode::Binary,
        }
    }
}

/// A frame header that keeps every rule of RFC 6455 and of the limits it was read under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Last (or only) frame of its message.
    pub fin: bool,
    /// What the frame is for.
    pub opcode: Opcode,
    /// Begins a message that permessage-deflate compressed (RFC 7692 §6).
    pub compressed: bool,
    /// Present exactly when a client sent the frame.
    pub mask: Option<[u8; 4]>,
    /// Bytes that the header itself takes, 2 to 14.
    pub header_len: usize,
    /// Bytes that follow the header; at most the limit given to [`read_header`].
    pub payload_len: usize,
}

impl Header {
    /// Bytes of the whole frame on the wire.
    pub fn wire_len(&self) -> usize {
        self.header_len.saturating_add(self.payload_len)
    }
}

/// Why bytes are not an acceptable frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No extension that is agreed on gives it a meaning here (§5.2).
    #[error("reserved bit without a meaning")]
    ReservedBit,
    /// Opcodes 3 to 7 and 11 to 15 have no meaning (§5.2).
    #[error("reserved opcode {opcode:#x}")]
    ReservedOpcode {
        /// The four bits on the wire.
        opcode: u8,
    },
    /// A control frame is never one of several (§5.5).
    #[error("control frame is fragmented")]
    FragmentedControl,
    /// A control frame carries at most 125 bytes (§5.5).
    #[error("control frame is longer than 125 bytes")]
    LongControl,
    /// A client masks every frame (§5.1).
    #[error("client frame is not masked")]
    Unmasked,
    /// A server masks no frame (§5.1).
    #[error("server frame is masked")]
    Masked,
    /// A length is written in the fewest bytes, and has 63 bits (§5.2).
    #[error("payload length is not in its shortest form, or has more than 63 bits")]
    BadLength,
    /// The frame is longer than the policy allows.
    #[error("frame of {size} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// Bytes that the header announced.
        size: u64,
        /// Bytes that the policy allows.
        limit: u32,
    },
}

impl From<FrameError> for Denial {
    fn from(error: FrameError) -> Denial {
        let detail = match error {
            FrameError::ReservedBit => "reserved bit without a meaning",
            FrameError::ReservedOpcode { .. } => "reserved opcode",
            FrameError::FragmentedControl => "control frame is fragmented",
            FrameError::LongControl => "control frame is longer than 125 bytes",
            FrameError::Unmasked => "client frame is not masked",
            FrameError::Masked => "server frame is masked",
            FrameError::BadLength => "payload length is not in its shortest form",
            FrameError::TooLarge { limit, .. } => return Denial::MessageTooBig { limit },
        };
        Denial::Protocol { detail }
    }
}

/// Reads the frame header at the front of `wire`; `None` while it is incomplete.
///
/// `max_payload` bounds data frames, in bytes. A frame over it is refused as soon as its length is
/// read: before its masking key, before its payload, and before memory is taken for either. With `deflate`,
/// permessage-deflate is agreed on with the sender: the first frame of a message may say that it is compressed.
///
/// # Errors
/// A [`FrameError`] from the first byte that breaks a rule, whatever follows it. The connection
/// cannot be read any further.
pub fn read_header(
    sender: Sender,
    max_payload: u32,
    deflate: bool,
    wire: &[u8],
) -> Result<Option<Header>, FrameError> {
    let Some((&first, rest)) = wire.split_first() else {
        return Ok(None);
    };
    let compressed = deflate && first & RSV1 != 0;
    if first & 0x70 != 0 && (!compressed || first & 0x30 != 0) {
        return Err(FrameError::ReservedBit);
    }
    let fin = first & 0x80 != 0;
    let bits = first & 0x0F;
    let opcode = Opcode::from_wire(bits).ok_or(FrameError::ReservedOpcode { opcode: bits })?;
    if compressed && !matches!(opcode, Opcode::Text | Opcode::Binary) {
        return Err(FrameError::ReservedBit);
    }
    if opcode.is_control() && !fin {
        return Err(FrameError::FragmentedControl);
    }

    let Some((&second, rest)) = rest.split_first() else {
        return Ok(None);
    };
    match (sender, second & 0x80 != 0) {
        (Sender::Client, false) => return Err(FrameError::Unmasked),
        (Sender::Server, true) => return Err(FrameError::Masked),
        (Sender::Client, true) | (Sender::Server, false) => {}
    }
    let (payload_len, rest) = match second & 0x7F {
        126.. if opcode.is_control() => return Err(FrameError::LongControl),
        126 => {
            let Some((length, rest)) = rest.split_first_chunk::<2>() else {
                return Ok(None);
            };
            let length = u16::from_be_bytes(*length);
            if length < 126 {
                return Err(FrameError::BadLength);
            }
            (u64::from(length), rest)
        }
        127 => {
            let Some((length, rest)) = rest.split_first_chunk::<8>() else {
                return Ok(None);
            };
            let length = u64::from_be_bytes(*length);
            if length <= u64::from(u16::MAX) || length >> 63 != 0 {
                return Err(FrameError::BadLength);
            }
            (length, rest)
        }
        short => (u64::from(short), rest),
    };
    if !opcode.is_control() && payload_len > u64::from(max_payload) {
        return Err(FrameError::TooLarge { size: payload_len, limit: max_payload });
    }

    let (mask, rest) = match sender {
        Sender::Server => (None, rest),
        Sender::Client => match rest.split_first_chunk::<4>() {
            Some((key, rest)) => (Some(*key), rest),
            None => return Ok(None),
        },
    };
    // Bounded by `max_payload` or 125, so it fits every `usize` of 32 bits and more.
    let payload_len = usize::try_from(payload_len).unwrap_or(usize::MAX);
    Ok(Some(Header { fin, opcode, compressed, mask, header_len: wire.len() - rest.len(), payload_len }))
}

/// Appends a whole, unfragmented frame to `out`: masked when there is a key.
pub fn write_frame(out: &mut Vec<u8>, opcode: Opcode, mask: Option<[u8; 4]>, payload: &[u8]) {
    let mask_bit = if mask.is_some() { 0x80 } else { 0 };
    out.reserve(payload.len().saturating_add(MAX_HEADER));
    out.push(0x80 | opcode.to_wire());
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..126), _) => out.push(mask_bit | length),
        (_, Ok(length)) => {
            out.push(mask_bit | 126);
            out.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            out.push(mask_bit | 127);
            out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    match mask {
        None => out.extend_from_slice(payload),
        Some(key) => {
            out.extend_from_slice(&key);
            append_unmasked(out, payload, key, 0);
        }
    }
}

/// As [`write_frame`], for a payload that permessage-deflate compressed.
pub fn write_compressed(out: &mut Vec<u8>, opcode: Opcode, mask: Option<[u8; 4]>, payload: &[u8]) {
    let start = out.len();
    write_frame(out, opcode, mask, payload);
    if let Some(first) = out.get_mut(start) {
        *first |= RSV1;
    }
}

/// Appends `payload` to `out` with the mask taken off (or put on: it is its own inverse, §5.3).
///
/// `offset` is how many payload bytes of the frame came before this part.
pub fn append_unmasked(out: &mut Vec<u8>, payload: &[u8], key: [u8; 4], offset: usize) {
    let start = out.len();
    out.extend_from_slice(payload);
    if let Some(fresh) = out.get_mut(start..) {
        unmask(fresh, key, offset);
    }
}

/// Takes the mask off (or puts it on) in place; `offset` as in [`append_unmasked`].
///
/// Sixteen bytes a step, which the compiler turns into vector instructions.
pub fn unmask(payload: &mut [u8], key: [u8; 4], offset: usize) {
    // The key as it lies from `offset` on; then every chunk begins with the same byte of it.
    let [a, b, c, d] = key;
    let key = match offset % 4 {
        0 => [a, b, c, d],
        1 => [b, c, d, a],
        2 => [c, d, a, b],
        _ => [d, a, b, c],
    };
    let wide = u128::from_ne_bytes(repeat(key));
    let (chunks, rest) = payload.as_chunks_mut::<16>();
    for chunk in chunks {
        *chunk = (u128::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
}

fn repeat([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: u32 = 64 * 1024;

    fn read(sender: Sender, wire: &[u8]) -> Result<Option<Header>, FrameError> {
        read_header(sender, LIMIT, false, wire)
    }

    #[test]
    fn the_examples_of_rfc_6455_section_5_7() {
        let plain = [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f];
        let header = read(Sender::Server, &plain).unwrap().unwrap();
        assert_eq!(
            header,
            Header {
                fin: true,
                opcode: Opcode::Text,
                compressed: false,
                mask: None,
                header_len: 2,
                payload_len: 5
            }
        );

        let masked = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        let header = read(Sender::Client, &masked).unwrap().unwrap();
        assert_eq!(header.mask, Some([0x37, 0xfa, 0x21, 0x3d]));
        assert_eq!(header.wire_len(), masked.len());
        let mut payload = masked[header.header_len..].to_vec();
        unmask(&mut payload, header.mask.unwrap(), 0);
        assert_eq!(payload, b"Hello");

        let first = read(Sender::Server, &[0x01, 0x03, 0x48, 0x65, 0x6c]).unwrap().unwrap();
        assert_eq!((first.fin, first.opcode), (false, Opcode::Text));
        let second = read(Sender::Server, &[0x80, 0x02, 0x6c, 0x6f]).unwrap().unwrap();
        assert_eq!((second.fin, second.opcode), (true, Opcode::Continuation));

        let ping = read(Sender::Server, &[0x89, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]).unwrap().unwrap();
        assert_eq!(ping.opcode, Opcode::Ping);
        let pong = [0x8a, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        assert_eq!(read(Sender::Client, &pong).unwrap().unwrap().opcode, Opcode::Pong);

        let medium = read(Sender::Server, &[0x82, 0x7E, 0x01, 0x00]).unwrap().unwrap();
        assert_eq!((medium.payload_len, medium.header_len), (256, 4));
        let long = [0x82, 0x7F, 0, 0, 0, 0, 0, 1, 0, 0];
        assert_eq!(read_header(Sender::Server, 65_536, false, &long).unwrap().unwrap().payload_len, 65_536);
    }

    #[test]
    fn every_rule_is_kept_in_both_directions() {
        use FrameError::*;
        for bit in [0x40, 0x20, 0x10] {
            assert_eq!(read(Sender::Client, &[0x81 | bit]), Err(ReservedBit));
            assert_eq!(read(Sender::Server, &[0x81 | bit]), Err(ReservedBit));
        }
        for opcode in [0x3, 0x4, 0x5, 0x6, 0x7, 0xB, 0xC, 0xD, 0xE, 0xF] {
            assert_eq!(read(Sender::Client, &[0x80 | opcode]), Err(ReservedOpcode { opcode }));
        }
        for opcode in [0x8, 0x9, 0xA] {
            assert_eq!(read(Sender::Client, &[opcode]), Err(FragmentedControl));
            assert_eq!(read(Sender::Client, &[0x80 | opcode, 0x80 | 126]), Err(LongControl));
            assert_eq!(read(Sender::Server, &[0x80 | opcode, 127]), Err(LongControl));
            assert!(read(Sender::Server, &[0x80 | opcode, 125]).unwrap().is_some());
        }
        assert_eq!(read(Sender::Client, &[0x81, 0x05]), Err(Unmasked));
        assert_eq!(read(Sender::Server, &[0x81, 0x85]), Err(Masked));
        assert_eq!(read(Sender::Server, &[0x82, 126, 0, 125]), Err(BadLength));
        assert_eq!(read(Sender::Server, &[0x82, 127, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF]), Err(BadLength));
        assert_eq!(read(Sender::Server, &[0x82, 127, 0x80, 0, 0, 0, 0, 1, 0, 0]), Err(BadLength));
    }

    #[test]
    fn a_message_is_compressed_only_where_that_was_agreed_on_and_only_its_first_frame_says_so() {
        let deflate = |first| read_header(Sender::Server, LIMIT, true, &[first, 0]);
        for first in [0xC1, 0x41, 0xC2, 0x42] {
            assert!(deflate(first).unwrap().unwrap().compressed);
            assert_eq!(read(Sender::Server, &[first, 0]), Err(FrameError::ReservedBit));
        }
        assert!(!deflate(0x81).unwrap().unwrap().compressed);
        // Continuations, control frames, other bits beside it.
        for first in [0xC0, 0x40, 0xC8, 0xC9, 0xCA, 0xE1, 0xD1, 0xF1, 0xA1, 0x91] {
            assert_eq!(deflate(first), Err(FrameError::ReservedBit), "{first:#x}");
        }
        let mut wire = Vec::new();
        write_compressed(&mut wire, Opcode::Text, None, b"ab");
        assert_eq!(wire, [0xC1, 2, b'a', b'b']);
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_key_and_payload() {
        let huge = [0x82, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF];
        assert_eq!(
            read(Sender::Client, &huge),
            Err(FrameError::TooLarge { size: u64::MAX >> 1, limit: LIMIT })
        );
        assert_eq!(
            read_header(Sender::Server, 4, false, &[0x82, 5]),
            Err(FrameError::TooLarge { size: 5, limit: 4 })
        );
        assert!(read_header(Sender::Server, 5, false, &[0x82, 5]).unwrap().is_some());
        // Control frames have a bound of their own.
        assert!(read_header(Sender::Server, 0, false, &[0x89, 5]).unwrap().is_some());
    }

    #[test]
    fn what_is_written_reads_back() {
        for length in [0, 1, 125, 126, 127, 65_535, 65_536, 70_000] {
            for mask in [None, Some([1, 2, 3, 4])] {
                let payload: Vec<u8> = (0..length).map(|n| n as u8).collect();
                let mut wire = Vec::new();
                write_frame(&mut wire, Opcode::Binary, mask, &payload);
                let sender = if mask.is_some() { Sender::Client } else { Sender::Server };
                let header = read_header(sender, u32::MAX, false, &wire).unwrap().unwrap();
                assert_eq!((header.payload_len, header.wire_len()), (length, wire.len()));
                let mut read = wire[header.header_len..].to_vec();
                unmask(&mut read, mask.unwrap_or_default(), 0);
                assert_eq!(read, payload);
            }
        }
    }

    proptest! {
        #[test]
        fn unmasking_is_the_naive_xor(
            payload in proptest::collection::vec(any::<u8>(), 0..200), key: [u8; 4], offset in 0usize..9,
        ) {
            let naive: Vec<u8> =
                payload.iter().enumerate().map(|(at, byte)| byte ^ key[(at + offset) % 4]).collect();
            let mut fast = payload.clone();
            unmask(&mut fast, key, offset);
            prop_assert_eq!(&fast, &naive);
            let mut appended = vec![7];
            append_unmasked(&mut appended, &payload, key, offset);
            prop_assert_eq!(&appended[1..], &naive[..]);
        }

        /// A verdict never changes with bytes that come later, and needs no more of them than it has.
        #[test]
        fn one_byte_at_a_time_is_as_all_at_once(
            wire in proptest::collection::vec(any::<u8>(), 0..20), client: bool, limit in 0u32..200_000,
        ) {
            let sender = if client { Sender::Client } else { Sender::Server };
            let whole = read_header(sender, limit, false, &wire);
            let piecewise = (0..=wire.len())
                .map(|end| read_header(sender, limit, false, &wire[..end]))
                .find(|verdict| *verdict != Ok(None))
                .unwrap_or(Ok(None));
            prop_assert_eq!(whole, piecewise);
            if let Ok(Some(header)) = whole {
                prop_assert!(header.header_len <= wire.len().min(MAX_HEADER));
                prop_assert_eq!(header.mask.is_some(), client);
            }
        }
    }
}
