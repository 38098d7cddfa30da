//! permessage-deflate (RFC 7692), ended at the gateway: what is agreed on with a client, and the codec. No I/O.
//!
//! Our answer always says that neither side keeps its window from one message to the next. So inflater and deflaters
//! with their windows belong to the *core*, and a socket that idles holds one byte for all of it.

use http::header::SEC_WEBSOCKET_EXTENSIONS;
use http::{HeaderMap, HeaderValue};
use sealgate_policy::{Denial, TunnelLimits};
use zeroize::Zeroize as _;
use zlib_rs::{Deflate, DeflateFlush, Inflate, InflateFlush, Status};

/// From so many bytes on a message to a client is worth compressing.
pub const COMPRESS_FROM: usize = 256;

/// A message may inflate to so many bytes whatever its ratio: short ones of much repetition are no bombs.
pub const RATIO_FLOOR: usize = 64 * 1024;

/// Largest window of DEFLATE, as a power of two (RFC 1951 §2).
const WINDOW_BITS: u8 = 15;

/// Smallest window that we compress with. RFC 7692 knows 8 too, which zlib does not do without its own header.
const MIN_DEFLATE_BITS: u8 = 9;

/// Fast, and most of what more effort would gain.
const LEVEL: i32 = 3;

/// Blocks with BFINAL in one message (RFC 7692 §7.2.1 allows them). Each makes us set up the window anew.
const MAX_FINAL_BLOCKS: u32 = 16;

/// What a sender leaves out of each message (§7.2.1).
const SYNC_TAIL: [u8; 4] = [0x00, 0x00, 0xFF, 0xFF];

/// Put behind each message: what its sender left out, and an empty last block. That block is only seen as such if
/// the message stops where a block does.
const TAIL: [u8; 9] = [0x00, 0x00, 0xFF, 0xFF, 0x01, 0x00, 0x00, 0xFF, 0xFF];

/// First memory of a scratch buffer, in bytes.
const FIRST_OUTPUT: usize = 16 * 1024;

/// permessage-deflate as agreed on with a client. Without context takeover, both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// What the client wants our window to be, 8 to 15.
    server_max_window_bits: Option<u8>,
}

impl Agreed {
    /// Accepts the first acceptable offer in `Sec-WebSocket-Extensions`, if there is one.
    ///
    /// An offer with an unknown, repeated or wrong parameter is declined (RFC 7692 §7), as is any other extension.
    ///
    /// # Errors
    /// [`Denial::Malformed`] if the field is not a list of extensions (RFC 6455 §9.1).
    pub fn accept(headers: &HeaderMap) -> Result<Option<Agreed>, Denial> {
        let mut agreed = None;
        for list in headers.get_all(SEC_WEBSOCKET_EXTENSIONS) {
            let offered = read_list(list.as_bytes()).ok_or(Denial::Malformed {
                detail: "Sec-WebSocket-Extensions is not a list of extensions",
            })?;
            agreed = agreed.or(offered);
        }
        Ok(agreed)
    }

    /// The extension as it stands in our answer.
    ///
    /// `client_max_window_bits` never does: the client's window costs us nothing (§7.1.2.2).
    pub fn answer(self) -> HeaderValue {
        const BOTH: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        let with_window = |bits| HeaderValue::try_from(format!("{BOTH}; server_max_window_bits={bits}"));
        let answer = self.server_max_window_bits.map(with_window);
        // Digits always are a value.
        answer.and_then(Result::ok).unwrap_or(HeaderValue::from_static(BOTH))
    }

    /// Window that messages to the client may be compressed with; `None` for one that is too small for us: then they
    /// go plain, which is always allowed.
    fn window_bits(self) -> Option<u8> {
        Some(self.server_max_window_bits.unwrap_or(WINDOW_BITS)).filter(|&bits| bits >= MIN_DEFLATE_BITS)
    }
}

/// Reads one field value: whether it keeps the grammar, and its first acceptable offer.
fn read_list(list: &[u8]) -> Option<Option<Agreed>> {
    let mut rest = Words(list);
    let mut agreed = None;
    loop {
        // Empty elements count as nothing (RFC 9110 §5.6.1.2).
        while rest.take(b',') {}
        if rest.is_at_end() {
            return Some(agreed);
        }
        let name = rest.token()?;
        let mut offer = Some(Offer::default()).filter(|_| name.eq_ignore_ascii_case(b"permessage-deflate"));
        while rest.take(b';') {
            let name = rest.token()?;
            let value = if rest.take(b'=') { Some(rest.value()?) } else { None };
            offer = offer.and_then(|offer| offer.with(name, value.as_deref()));
        }
        if !rest.is_at_end() && !rest.take(b',') {
            return None;
        }
        let acceptable = offer.map(|it| Agreed { server_max_window_bits: it.server_max_window_bits });
        agreed = agreed.or(acceptable);
    }
}

/// The parameters of an offer so far, each of which may stand once (RFC 7692 §7.1).
#[derive(Default)]
struct Offer {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: Option<u8>,
    client_max_window_bits: bool,
}

impl Offer {
    /// `None` declines.
    fn with(mut self, name: &[u8], value: Option<&[u8]>) -> Option<Offer> {
        let is_repeated = match (name, value) {
            (b"server_no_context_takeover", None) => {
                std::mem::replace(&mut self.server_no_context_takeover, true)
            }
            (b"client_no_context_takeover", None) => {
                std::mem::replace(&mut self.client_no_context_takeover, true)
            }
            (b"server_max_window_bits", Some(bits)) => {
                self.server_max_window_bits.replace(window_bits(bits)?).is_some()
            }
            (b"client_max_window_bits", bits) => {
                bits.map_or(Some(WINDOW_BITS), window_bits)?;
                std::mem::replace(&mut self.client_max_window_bits, true)
            }
            _ => return None,
        };
        (!is_repeated).then_some(self)
    }
}

/// A decimal from 8 to 15 without leading zeros (§7.1.2).
fn window_bits(digits: &[u8]) -> Option<u8> {
    match digits {
        [digit @ b'8'..=b'9'] => Some(digit - b'0'),
        [b'1', digit @ b'0'..=b'5'] => Some(10 + (digit - b'0')),
        _ => None,
    }
}

/// The rest of a field value, read word by word.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn skip_space(&mut self) {
        while let [b' ' | b'\t', rest @ ..] = self.0 {
            self.0 = rest;
        }
    }

    fn is_at_end(&mut self) -> bool {
        self.skip_space();
        self.0.is_empty()
    }

    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        match self.0.split_first() {
            Some((first, rest)) if *first == byte => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    fn token(&mut self) -> Option<&'a [u8]> {
        self.skip_space();
        let len = self.0.iter().position(|&byte| !is_token_byte(byte)).unwrap_or(self.0.len());
        let (token, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        (!token.is_empty()).then_some(token)
    }

    /// A token, or a token in quotes (RFC 6455 §9.1).
    fn value(&mut self) -> Option<std::borrow::Cow<'a, [u8]>> {
        if !self.take(b'"') {
            return self.token().map(Into::into);
        }
        let mut value = Vec::new();
        loop {
            let (&byte, rest) = self.0.split_first()?;
            let (byte, rest) = match byte {
                b'"' => {
                    self.0 = rest;
                    return (!value.is_empty()).then_some(value.into());
                }
                b'\\' => rest.split_first().map(|(&escaped, rest)| (escaped, rest))?,
                plain => (plain, rest),
            };
            if !is_token_byte(byte) {
                return None;
            }
            value.push(byte);
            self.0 = rest;
        }
    }
}

/// RFC 9110 §5.6.2.
pub(super) fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Why a compressed message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// Not DEFLATE, not to its end, or with a reference to an earlier message.
    #[error("compressed message does not inflate")]
    Malformed,
    /// Longer than a message may be.
    #[error("message inflates to more than {limit} bytes")]
    TooLarge {
        /// Bytes that the policy allows.
        limit: u32,
    },
    /// Grows more than a message may.
    #[error("message inflates to more than {limit} times its size")]
    Ratio {
        /// Bytes that the policy allows for each compressed one.
        limit: u32,
    },
}

impl From<InflateError> for Denial {
    fn from(error: InflateError) -> Denial {
        match error {
            InflateError::Malformed => Denial::BadCompression,
            InflateError::TooLarge { limit } => Denial::MessageTooBig { limit },
            InflateError::Ratio { limit } => Denial::InflateRatio { limit },
        }
    }
}

/// Inflates the messages of one core, each by itself.
#[derive(Default)]
pub struct Inflater {
    inflate: Option<Inflate>,
    /// All of it is memory to write to: what it holds is what earlier messages left.
    out: Vec<u8>,
}

impl Inflater {
    /// Inflates the (unmasked) payload of a message over all its fragments.
    ///
    /// The result is at most `max_message` bytes, and beyond [`RATIO_FLOOR`] at most `max_inflate_ratio` times as long
    /// as `compressed`; no memory is taken for more.
    ///
    /// # Errors
    /// Close with the [`Denial`] that the [`InflateError`] turns into.
    pub fn inflate(&mut self, compressed: &[u8], limits: &TunnelLimits) -> Result<&[u8], InflateError> {
        let by_ratio = compressed.len().saturating_mul(limits.max_inflate_ratio as usize).max(RATIO_FLOOR);
        let most = by_ratio.min(limits.max_message as usize);
        let Inflater { inflate, out } = self;
        let inflate = inflate.get_or_insert_with(|| Inflate::new(false, WINDOW_BITS));
        inflate.reset(false);

        let (mut input, mut is_tail) = (compressed, false);
        let (mut filled, mut final_blocks) = (0, 0);
        loop {
            // One byte more than is allowed: so there always is room, and what fills it is too long.
            if filled == out.len() {
                let size = out.len().saturating_mul(2).max(FIRST_OUTPUT).min(most.saturating_add(1));
                out.resize(size, 0);
            }
            let end = most.saturating_add(1).min(out.len());
            let room = out.get_mut(filled..end).unwrap_or_default();
            let space = room.len();
            let before = (inflate.total_in(), inflate.total_out());
            let status = inflate
                .decompress(input, room, InflateFlush::NoFlush)
                .map_err(|_| InflateError::Malformed)?;
            let taken = since(before.0, inflate.total_in());
            let made = since(before.1, inflate.total_out());
            input = input.get(taken..).unwrap_or_default();
            filled += made;
            if filled > most {
                return Err(match most < limits.max_message as usize {
                    true => InflateError::Ratio { limit: limits.max_inflate_ratio },
                    false => InflateError::TooLarge { limit: limits.max_message },
                });
            }
            match status {
                Status::StreamEnd if is_tail && input.is_empty() => {
                    return Ok(out.get(..filled).unwrap_or_default());
                }
                Status::StreamEnd => {
                    final_blocks += 1;
                    if final_blocks > MAX_FINAL_BLOCKS {
                        return Err(InflateError::Malformed);
                    }
                    // The message goes on behind it, with the same window.
                    let window = filled.saturating_sub(1 << WINDOW_BITS)..filled;
                    inflate.reset(false);
                    inflate
                        .set_dictionary(out.get(window).unwrap_or_default())
                        .map_err(|_| InflateError::Malformed)?;
                }
                Status::Ok | Status::BufError if made == space => {}
                Status::Ok | Status::BufError if !input.is_empty() => {
                    // It has input and room: without progress it is stuck.
                    if taken == 0 && made == 0 {
                        return Err(InflateError::Malformed);
                    }
                }
                Status::Ok | Status::BufError if is_tail => return Err(InflateError::Malformed),
                Status::Ok | Status::BufError => (input, is_tail) = (&TAIL, true),
            }
        }
    }

    /// Erases what earlier messages left.
    pub fn erase(&mut self) {
        self.out.as_mut_slice().zeroize();
    }

    /// Gives back memory that a long message needed, beyond `kept` bytes.
    pub fn trim(&mut self, kept: usize) {
        if self.out.len() > kept {
            self.out = Vec::new();
        }
    }
}

/// Compresses messages to the clients of one core, each by itself.
#[derive(Default)]
pub struct Deflater {
    /// One for each window from 2⁹ to 2¹⁵ bytes, made when a client first asks for it.
    deflates: [Option<Deflate>; (WINDOW_BITS - MIN_DEFLATE_BITS + 1) as usize],
    out: Vec<u8>,
}

impl Deflater {
    /// The payload of `message` as a compressed frame carries it; `None` if that is not smaller, or not worth it.
    pub fn deflate(&mut self, agreed: Agreed, message: &[u8]) -> Option<&[u8]> {
        if message.len() < COMPRESS_FROM {
            return None;
        }
        let bits = agreed.window_bits()?;
        let deflate = self
            .deflates
            .get_mut(usize::from(bits - MIN_DEFLATE_BITS))?
            .get_or_insert_with(|| Deflate::new(LEVEL, false, bits));
        deflate.reset();
        // Only what saves a byte fits, with one to spare: a full buffer may want more.
        let space = message.len().saturating_add(SYNC_TAIL.len());
        if self.out.len() < space {
            self.out.resize(space, 0);
        }
        let room = self.out.get_mut(..space)?;
        deflate.compress(message, room, DeflateFlush::SyncFlush).ok()?;
        let (taken, made) = (since(0, deflate.total_in()), since(0, deflate.total_out()));
        if taken != message.len() || made >= space {
            return None;
        }
        self.out.get(..made)?.strip_suffix(&SYNC_TAIL)
    }

    /// As [`Inflater::trim`].
    pub fn trim(&mut self, kept: usize) {
        if self.out.len() > kept {
            self.out = Vec::new();
        }
    }
}

fn since(before: u64, after: u64) -> usize {
    // Bounded by the buffers, so it fits.
    usize::try_from(after.saturating_sub(before)).unwrap_or(usize::MAX)
}

/// A message as a client compresses it.
#[cfg(test)]
pub(super) fn compressed(message: &[u8]) -> Vec<u8> {
    let mut deflate = Deflate::new(6, false, WINDOW_BITS);
    let mut out = vec![0; message.len() + 64];
    deflate.compress(message, &mut out, DeflateFlush::SyncFlush).unwrap();
    out.truncate(deflate.total_out() as usize);
    assert!(out.ends_with(&SYNC_TAIL));
    out.truncate(out.len() - SYNC_TAIL.len());
    out
}

/// What another inflater makes of a compressed message; `None` if it does not end.
#[cfg(test)]
pub(super) fn inflated_by_another(message: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(1 << 20);
    let mut inflate = flate2::Decompress::new(false);
    let whole = [message, &TAIL].concat();
    let status = inflate.decompress_vec(&whole, &mut out, flate2::FlushDecompress::Sync).ok()?;
    (status == flate2::Status::StreamEnd).then_some(out)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn limits(max_message: u32, max_inflate_ratio: u32) -> TunnelLimits {
        TunnelLimits {
            max_frame: max_message,
            max_message,
            max_fragments: 4,
            max_inflate_ratio,
            control_per_second: 3,
            idle: None,
            ping_interval: Duration::from_secs(30),
            pong_timeout: Duration::from_secs(20),
            write_timeout: Duration::from_secs(20),
            buffer: 4096,
        }
    }

    fn accept(lists: &[&str]) -> Result<Option<String>, Denial> {
        let mut headers = HeaderMap::new();
        for list in lists {
            headers.append(SEC_WEBSOCKET_EXTENSIONS, HeaderValue::from_bytes(list.as_bytes()).unwrap());
        }
        let answer = Agreed::accept(&headers)?.map(|agreed| agreed.answer());
        Ok(answer.map(|answer| answer.to_str().unwrap().to_owned()))
    }

    const BARE: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

    fn agreed(bits: Option<u8>) -> Agreed {
        Agreed { server_max_window_bits: bits }
    }

    fn window(bits: u8) -> String {
        format!("{BARE}; server_max_window_bits={bits}")
    }

    #[test]
    fn offers_are_answered_as_rfc_7692_section_7_1_says() {
        let accepted = |list: &str, answer: &str| {
            assert_eq!(accept(&[list]).unwrap().as_deref(), Some(answer), "{list}");
        };
        accepted("permessage-deflate", BARE);
        accepted("PerMessage-Deflate", BARE);
        accepted("permessage-deflate; client_max_window_bits", BARE);
        accepted("permessage-deflate;client_max_window_bits=8", BARE);
        accepted("permessage-deflate ; server_no_context_takeover\t;client_no_context_takeover", BARE);
        accepted("permessage-deflate; server_max_window_bits=8", &window(8));
        accepted("permessage-deflate; server_max_window_bits=15", &window(15));
        accepted("permessage-deflate; server_max_window_bits=\"12\"", &window(12));
        accepted("permessage-deflate; server_max_window_bits = \"1\\0\"", &window(10));
        // The first acceptable one, wherever it stands.
        accepted("x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=9", &window(9));
        accepted(
            "permessage-deflate; server_max_window_bits=16, permessage-deflate; server_max_window_bits=10, permessage-deflate",
            &window(10),
        );
        accepted(", permessage-deflate; mode=fast ,, permessage-deflate,", BARE);
        assert_eq!(
            accept(&["foo", "permessage-deflate; server_max_window_bits=11", "permessage-deflate"]).unwrap(),
            Some(window(11))
        );
    }

    #[test]
    fn an_unacceptable_offer_is_declined_and_nothing_else() {
        assert_eq!(accept(&[]), Ok(None));
        assert_eq!(accept(&[""]), Ok(None));
        for parameter in [
            "server_no_context_takeover=1",
            "server_no_context_takeover; server_no_context_takeover",
            "client_no_context_takeover=true",
            "client_no_context_takeover; client_no_context_takeover",
            "server_max_window_bits",
            "server_max_window_bits=7",
            "server_max_window_bits=16",
            "server_max_window_bits=08",
            "server_max_window_bits=+9",
            "server_max_window_bits=115",
            "server_max_window_bits=10; server_max_window_bits=10",
            "client_max_window_bits=7",
            "client_max_window_bits=",
            "client_max_window_bits=010",
            "client_max_window_bits; client_max_window_bits=10",
            "Client_Max_Window_Bits",
            "level=9",
        ] {
            let list = format!("permessage-deflate; {parameter}");
            assert!(matches!(accept(&[&list]), Ok(None) | Err(Denial::Malformed { .. })), "{list}");
        }
        assert_eq!(accept(&["permessage-deflate; server_max_window_bits"]), Ok(None));
        assert_eq!(accept(&["permessage-bzip2, x-snappy; a=b"]), Ok(None));
    }

    #[test]
    fn what_is_no_list_of_extensions_fails_the_handshake() {
        for list in [
            "permessage-deflate; client_max_window_bits=",
            "permessage-deflate;",
            "permessage-deflate; ;",
            "permessage-deflate; =10",
            "permessage deflate",
            ";",
            "permessage-deflate; server_max_window_bits=\"10",
            "permessage-deflate; server_max_window_bits=\"\"",
            "permessage-deflate; server_max_window_bits=\"1 0\"",
            "permessage-deflate; server_max_window_bits=\"10\\",
            "permessage-deflate; server_max_window_bits=\"10\"x",
            "a/b",
            "ä",
        ] {
            // Also behind an acceptable offer.
            for list in [list.to_owned(), format!("permessage-deflate, {list}")] {
                assert!(matches!(accept(&[&list]), Err(Denial::Malformed { .. })), "{list}");
            }
        }
    }

    #[test]
    fn the_examples_of_rfc_7692_section_7_2_3() {
        let limits = limits(1000, 100);
        let mut inflater = Inflater::default();
        let hello = [0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
        assert_eq!(inflater.inflate(&hello, &limits).unwrap(), b"Hello");
        // Twice, for nothing is kept; and so the one with a reference to an earlier message fails.
        assert_eq!(inflater.inflate(&hello, &limits).unwrap(), b"Hello");
        assert_eq!(inflater.inflate(&[0xf2, 0x00, 0x11, 0x00, 0x00], &limits), Err(InflateError::Malformed));
        let stored = [0x00, 0x05, 0x00, 0xfa, 0xff, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00];
        assert_eq!(inflater.inflate(&stored, &limits).unwrap(), b"Hello");
        let last_block = [0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00, 0x00];
        assert_eq!(inflater.inflate(&last_block, &limits).unwrap(), b"Hello");
        let two_blocks = [0xf2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xff, 0xff, 0xca, 0xc9, 0xc9, 0x07, 0x00];
        assert_eq!(inflater.inflate(&two_blocks, &limits).unwrap(), b"Hello");
        assert_eq!(inflater.inflate(&[0x00], &limits).unwrap(), b"");
    }

    #[test]
    fn last_blocks_amid_a_message_keep_its_window_and_are_counted() {
        let limits = limits(1000, 100);
        let mut inflater = Inflater::default();
        // "Hello" in a last block, and behind it a reference five bytes back.
        let hello = [0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
        let again = [0x02, 0x13, 0x00, 0x00];
        let both = [&hello[..], &again].concat();
        let inflated = inflater.inflate(&both, &limits).unwrap();
        assert_eq!(inflated, b"HelloHello", "{inflated:?}");
        assert_eq!(inflater.inflate(&again, &limits), Err(InflateError::Malformed));

        let many = |count| [[0x03, 0x00].repeat(count), vec![0x00]].concat();
        assert_eq!(inflater.inflate(&many(16), &limits).unwrap(), b"");
        assert_eq!(inflater.inflate(&many(17), &limits), Err(InflateError::Malformed));
        assert_eq!(inflater.inflate(&many(100_000), &limits), Err(InflateError::Malformed));
    }

    #[test]
    fn what_does_not_inflate_to_its_end_is_refused() {
        let limits = limits(1000, 100);
        let mut inflater = Inflater::default();
        let hello = [0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
        for end in 0..hello.len() - 1 {
            assert_eq!(inflater.inflate(&hello[..end], &limits), Err(InflateError::Malformed), "{end}");
        }
        // A block of a type that does not exist; a length and its complement that disagree; a stored block cut off.
        for wrong in [&[0x06][..], &[0x00, 0x05, 0x00, 0xfa, 0xfe], &[0x00, 0x20, 0x00, 0xdf, 0xff, 0x48]] {
            assert_eq!(inflater.inflate(wrong, &limits), Err(InflateError::Malformed), "{wrong:?}");
        }
        assert_eq!(inflater.inflate(&hello, &limits).unwrap(), b"Hello", "a fault leaves nothing behind");
    }

    #[test]
    fn bombs_meet_their_bounds_before_memory_is_taken() {
        let (mut inflater, mut deflater) = (Inflater::default(), Deflater::default());
        let bomb = deflater.deflate(agreed(None), &vec![b'a'; 8 << 20]).unwrap().to_vec();
        assert!(bomb.len() < 16 * 1024, "{}", bomb.len());

        let by_size = inflater.inflate(&bomb, &limits(100_000, 1032));
        assert_eq!(by_size, Err(InflateError::TooLarge { limit: 100_000 }));
        assert!(inflater.out.len() <= 100_001);
        let by_ratio = inflater.inflate(&bomb, &limits(16 << 20, 100));
        assert_eq!(by_ratio, Err(InflateError::Ratio { limit: 100 }));
        assert!(inflater.out.len() <= bomb.len() * 100 + 1);
        assert_eq!(inflater.inflate(&bomb, &limits(16 << 20, 1032)).unwrap().len(), 8 << 20);
        inflater.trim(1 << 20);
        assert!(inflater.out.capacity() == 0);

        // Exactly the limit is allowed, and short messages may repeat themselves.
        let short = deflater.deflate(agreed(None), &vec![b'a'; RATIO_FLOOR]).unwrap().to_vec();
        assert_eq!(inflater.inflate(&short, &limits(64 * 1024, 1)).unwrap().len(), RATIO_FLOOR);
        assert_eq!(
            inflater.inflate(&short, &limits(64 * 1024 - 1, 1)),
            Err(InflateError::TooLarge { limit: 64 * 1024 - 1 })
        );
        assert_eq!(inflater.inflate(&[0x00], &limits(0, 0)).unwrap(), b"");
    }

    #[test]
    fn what_does_not_shrink_goes_plain() {
        let mut deflater = Deflater::default();
        let random: Vec<u8> =
            (0..4096u64).map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect();
        let random: Vec<u8> = random.iter().zip(random.iter().skip(7).cycle()).map(|(a, b)| a ^ b).collect();
        if let Some(packed) = deflater.deflate(agreed(None), &random) {
            assert!(packed.len() < random.len());
        }
        let every: Vec<u8> = (0..=255).collect();
        assert_eq!(deflater.deflate(agreed(None), &every), None);
        assert_eq!(deflater.deflate(agreed(None), &[b'a'; COMPRESS_FROM - 1]), None);
        assert!(deflater.deflate(agreed(None), &[b'a'; COMPRESS_FROM]).unwrap().len() < 20);
        assert_eq!(
            deflater.deflate(agreed(Some(8)), &[b'a'; COMPRESS_FROM]),
            None,
            "window too small for us"
        );
    }

    proptest! {
        /// For every window that a client may ask for, with an inflater that has no more than that.
        #[test]
        fn what_is_deflated_inflates_in_the_agreed_window(
            words in proptest::collection::vec("[a-d]{1,300}", 1..60), repeat in 1usize..40, bits in 9u8..=15,
        ) {
            let message = words.concat().repeat(repeat).into_bytes();
            let mut deflater = Deflater::default();
            let Some(packed) = deflater.deflate(agreed(Some(bits)), &message).map(<[u8]>::to_vec) else {
                return Ok(());
            };
            prop_assert!(packed.len() < message.len());
            let mut inflater = Inflater::default();
            prop_assert_eq!(inflater.inflate(&packed, &limits(16 << 20, 1032)).unwrap(), &message[..]);
            // A few bytes at a time, so that it has to look back into its window rather than into what it wrote.
            let mut narrow = Inflate::new(false, bits);
            let whole = [&packed[..], &TAIL].concat();
            let mut out = vec![0; message.len() + 1];
            loop {
                let (taken, made) = (narrow.total_in() as usize, narrow.total_out() as usize);
                let room = &mut out[made..(made + 16).min(message.len() + 1)];
                match narrow.decompress(&whole[taken..], room, InflateFlush::NoFlush).unwrap() {
                    Status::StreamEnd => break,
                    Status::Ok | Status::BufError => prop_assert!(narrow.total_out() as usize <= message.len()),
                }
            }
            prop_assert_eq!(&out[..message.len()], &message[..]);
        }

        /// Any bytes: bounded, and the same answer again.
        #[test]
        fn any_bytes_are_inflated_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let limits = limits(70_000, 10);
            let mut inflater = Inflater::default();
            let first = inflater.inflate(&bytes, &limits).map(<[u8]>::to_vec);
            prop_assert!(inflater.out.len() <= 70_001);
            if let Ok(inflated) = &first {
                prop_assert!(inflated.len() <= 70_000);
                prop_assert!(inflated.len() <= RATIO_FLOOR.max(bytes.len() * 10));
            }
            prop_assert_eq!(first, inflater.inflate(&bytes, &limits).map(<[u8]>::to_vec));
        }

        #[test]
        fn any_list_is_read(list in "[ -~\t]{0,60}") {
            let _ = accept(&[&list]);
            let offered = format!("permessage-deflate; server_max_window_bits=10, {list}");
            match accept(&[&offered]) {
                Ok(answer) => prop_assert_eq!(answer, Some(window(10))),
                Err(denial) => prop_assert_eq!(denial.status(), 400),
            }
        }
    }
}
