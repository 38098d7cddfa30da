//! HTTP/1.1 towards backends, without I/O: heads as they are written, answers read in the one strict way (RFC 9112).
//!
//! hyper serves clients. Towards backends a codec of our own costs a fifth of a request less: the head goes from the judged
//! request straight to the wire, an answer that comes in one piece passes through no channel, and what could be read
//! in two ways is refused rather than repaired.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING},
};

/// Longest head of an answer, in bytes.
pub const MAX_HEAD: usize = 64 * 1024;

/// Most fields of an answer.
const MAX_FIELDS: usize = 128;

/// Longest line that holds a chunk's size and its extensions, and all trailers together, in bytes.
const MAX_LINE: u32 = 4 * 1024;

/// An answer that cannot be trusted to mean one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Http1Error {
    /// The request's target could break out of its line. Nothing was sent.
    #[error("the request head would not be well-formed")]
    Request,
    /// The request's body is longer or shorter than its head said. It did not go out whole.
    #[error("the request's body is not as long as it said")]
    Body,
    /// No status line or fields as RFC 9112 has them, or a line that ends in LF alone.
    #[error("the answer's head is not HTTP/1.1")]
    Head,
    /// More than [`MAX_HEAD`] bytes.
    #[error("the answer's head is too long")]
    TooLong,
    /// Lengths that contradict each other, or a transfer coding other than `chunked` (RFC 9112 §6.3).
    #[error("the answer's length can be read in two ways")]
    Length,
    /// An upgrade that nobody asked for, or interim answers without end.
    #[error("an interim answer that was not asked for")]
    Interim,
    /// The chunked coding is broken (RFC 9112 §7.1).
    #[error("the answer's chunks are malformed")]
    Chunk,
}

/// How long a body is going to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// There is none.
    None,
    /// So many bytes.
    Known(u64),
    /// In chunks.
    Chunked,
}

/// A request, as far as its head tells.
pub struct Head<'a> {
    /// Written as it is.
    pub method: &'a Method,
    /// Path as judged.
    pub path: &'a str,
    /// Query as judged, without `?`.
    pub query: Option<&'a str>,
    /// Written as `Host`.
    pub host: &'a HeaderValue,
    /// Calls with each field; `Host` and `Content-Length` among them are passed over.
    pub fields: &'a Fields<'a>,
}

/// Fields that are written without a map of them being made.
pub type Fields<'a> = dyn Fn(&mut dyn FnMut(&HeaderName, &HeaderValue)) + 'a;

impl Head<'_> {
    /// Writes it, with the length of the body.
    ///
    /// # Errors
    /// [`Http1Error::Request`].
    pub fn write(&self, length: Length, out: &mut Vec<u8>) -> Result<(), Http1Error> {
        let is_visible = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if !self.path.starts_with('/') || !is_visible(self.path) || !self.query.is_none_or(is_visible) {
            return Err(Http1Error::Request);
        }
        out.extend_from_slice(self.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.path.as_bytes());
        if let Some(query) = self.query {
            out.push(b'?');
            out.extend_from_slice(query.as_bytes());
        }
        out.extend_from_slice(b" HTTP/1.1\r\n");
        // INVARIANT: `HeaderValue` holds no CR, LF or NUL, `HeaderName` nothing but a token.
        let mut field = |name: &HeaderName, value: &[u8]| {
            out.extend_from_slice(name.as_str().as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        };
        field(&HOST, self.host.as_bytes());
        (self.fields)(&mut |name, value| {
            if *name != HOST && *name != CONTENT_LENGTH {
                field(name, value.as_bytes());
            }
        });
        match length {
            Length::None if matches!(*self.method, Method::POST | Method::PUT | Method::PATCH) => {
                // RFC 9110 §8.6: such a method is expected to have a body.
                field(&CONTENT_LENGTH, b"0");
            }
            Length::None => {}
            Length::Known(length) => field(&CONTENT_LENGTH, length.to_string().as_bytes()),
            Length::Chunked => field(&TRANSFER_ENCODING, b"chunked"),
        }
        out.extend_from_slice(b"\r\n");
        Ok(())
    }
}

/// The head of an answer.
#[derive(Debug)]
pub struct Answer {
    /// Final: never 1xx.
    pub status: StatusCode,
    /// As they came.
    pub fields: HeaderMap,
    /// Where the body ends.
    pub body: BodyReader,
    /// Whether the connection may be used again once the body was read.
    pub reusable: bool,
}

/// What stands at the beginning of what an upstream sent.
#[derive(Debug)]
pub enum Read {
    /// Not a whole head.
    Partial,
    /// An interim answer of so many bytes (RFC 9110 §15.2), which ends here.
    Interim(usize),
    /// The answer, behind so many bytes.
    Answer(usize, Answer),
}

/// Reads the head of the answer to a request of `method`.
///
/// # Errors
/// The connection is of no more use.
pub fn read_answer(bytes: &[u8], method: &Method) -> Result<Read, Http1Error> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let len = match response.parse(bytes) {
        Ok(httparse::Status::Complete(len)) if len <= MAX_HEAD => len,
        Ok(httparse::Status::Complete(_)) => return Err(Http1Error::TooLong),
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(Read::Partial),
        Ok(httparse::Status::Partial) => return Err(Http1Error::TooLong),
        Err(_) => return Err(Http1Error::Head),
    };
    let head = bytes.get(..len).unwrap_or_default();
    // httparse takes a bare LF for the end of a line, and empty lines in front.
    let bare = |end: usize| end == 0 || head.get(end - 1) != Some(&b'\r');
    if !head.starts_with(b"HTTP/1.") || memchr::memchr_iter(b'\n', head).any(bare) {
        return Err(Http1Error::Head);
    }
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Http1Error::Head)?;
    if status == StatusCode::SWITCHING_PROTOCOLS || status.as_u16() < 100 {
        return Err(Http1Error::Interim);
    }
    if status.is_informational() {
        return Ok(Read::Interim(len));
    }
    let old = response.version == Some(0);
    // One copy of the head, of which all values are parts.
    let shared = Bytes::copy_from_slice(head);
    let mut map = HeaderMap::with_capacity(response.headers.len() + 6);
    for field in response.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Http1Error::Head)?;
        let start = (field.value.as_ptr() as usize).wrapping_sub(head.as_ptr() as usize);
        let value = match field.value {
            [] => HeaderValue::from_static(""),
            value if start + value.len() <= len => {
                HeaderValue::from_maybe_shared(shared.slice(start..start + value.len()))
                    .map_err(|_| Http1Error::Head)?
            }
            _ => return Err(Http1Error::Head),
        };
        map.append(name, value);
    }
    let (body, bounded) = body_of(method, status, &map, old)?;
    let closes = map.get_all(CONNECTION).iter().any(|value| names(value, b"close"));
    Ok(Read::Answer(len, Answer { status, fields: map, body, reusable: bounded && !old && !closes }))
}

/// RFC 9112 §6.3, without its leniency: and whether the body has an end before the connection's.
fn body_of(
    method: &Method,
    status: StatusCode,
    fields: &HeaderMap,
    old: bool,
) -> Result<(BodyReader, bool), Http1Error> {
    let mut lengths = fields.get_all(CONTENT_LENGTH).iter();
    let length = match lengths.next() {
        None => None,
        Some(first) => {
            if lengths.any(|other| other != first) {
                return Err(Http1Error::Length);
            }
            let digits = first.to_str().map_err(|_| Http1Error::Length)?;
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(Http1Error::Length);
            }
            Some(digits.parse::<u64>().map_err(|_| Http1Error::Length)?)
        }
    };
    let mut codings = fields.get_all(TRANSFER_ENCODING).iter();
    let chunked = match (codings.next(), codings.next()) {
        (None, _) => false,
        (Some(coding), None)
            if !old && length.is_none() && coding.as_bytes().eq_ignore_ascii_case(b"chunked") =>
        {
            true
        }
        _ => return Err(Http1Error::Length),
    };
    if *method == Method::HEAD || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Ok((BodyReader(State::Ended), true));
    }
    Ok(match (chunked, length) {
        (true, _) => (BodyReader(State::Chunked(Chunks::default())), true),
        (false, Some(0)) => (BodyReader(State::Ended), true),
        (false, Some(length)) => (BodyReader(State::Length(length)), true),
        (false, None) => (BodyReader(State::UntilClose), false),
    })
}

fn names(value: &HeaderValue, token: &[u8]) -> bool {
    value.as_bytes().split(|&byte| byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(token))
}

/// Where in the body of an answer we are.
#[derive(Debug)]
pub struct BodyReader(State);

#[derive(Debug)]
enum State {
    /// So many bytes are to come: never none.
    Length(u64),
    Chunked(Chunks),
    UntilClose,
    Ended,
}

impl BodyReader {
    /// Nothing more is to come.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        matches!(self.0, State::Ended)
    }

    /// Bytes to come, where that is known.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        match self.0 {
            State::Length(left) => Some(left),
            State::Ended => Some(0),
            State::Chunked(_) | State::UntilClose => None,
        }
    }

    /// Takes what of `bytes` belongs to the body: its content, and how many bytes of the wire that was. After the end of
    /// the body nothing is taken.
    ///
    /// # Errors
    /// [`Http1Error::Chunk`].
    pub fn take(&mut self, bytes: &[u8]) -> Result<(Bytes, usize), Http1Error> {
        match &mut self.0 {
            State::Ended => Ok((Bytes::new(), 0)),
            State::UntilClose => Ok((Bytes::copy_from_slice(bytes), bytes.len())),
            State::Length(left) => {
                let most = usize::try_from(*left).unwrap_or(usize::MAX);
                let part = bytes.get(..most).unwrap_or(bytes);
                *left -= part.len() as u64;
                if *left == 0 {
                    self.0 = State::Ended;
                }
                Ok((Bytes::copy_from_slice(part), part.len()))
            }
            State::Chunked(chunks) => {
                let mut content = Vec::new();
                let (len, ended) = chunks.take(bytes, &mut content)?;
                if ended {
                    self.0 = State::Ended;
                }
                Ok((content.into(), len))
            }
        }
    }

    /// The connection has ended: whether the body has, too.
    pub fn close(&mut self) -> bool {
        if matches!(self.0, State::UntilClose) {
            self.0 = State::Ended;
        }
        self.is_ended()
    }
}

/// Decoder of the chunked coding. Remembers single bytes, so it may be fed in any pieces.
#[derive(Debug, Default)]
struct Chunks {
    at: At,
    /// Of the chunk: first read, then counted down.
    size: u64,
    digits: u8,
    /// Of the line, or of the trailers.
    line: u32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    #[default]
    Size,
    Extension,
    SizeLineFeed,
    Data,
    DataReturn,
    DataLineFeed,
    /// At the beginning of a line of the trailer section.
    TrailerStart,
    Trailer,
    TrailerLineFeed,
    LastLineFeed,
}

impl Chunks {
    /// Appends to `content`; how much of `bytes` it was, and whether that was the end.
    fn take(&mut self, bytes: &[u8], content: &mut Vec<u8>) -> Result<(usize, bool), Http1Error> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.at == At::Data {
                let rest = bytes.get(at..).unwrap_or_default();
                let most = usize::try_from(self.size).unwrap_or(usize::MAX);
                let part = rest.get(..most).unwrap_or(rest);
                content.extend_from_slice(part);
                at += part.len();
                self.size -= part.len() as u64;
                if self.size == 0 {
                    self.at = At::DataReturn;
                }
                continue;
            }
            at += 1;
            self.line += 1;
            if self.line > MAX_LINE {
                return Err(Http1Error::Chunk);
            }
            self.at = match (self.at, byte) {
                (At::Size, byte) if byte.is_ascii_hexdigit() => {
                    self.digits += 1;
                    if self.digits > 16 {
                        return Err(Http1Error::Chunk);
                    }
                    let digit = (byte as char).to_digit(16).ok_or(Http1Error::Chunk)?;
                    self.size = self.size << 4 | u64::from(digit);
                    At::Size
                }
                (At::Size, b'\r') if self.digits > 0 => At::SizeLineFeed,
                (At::Size, b';') if self.digits > 0 => At::Extension,
                (At::Extension, b'\r') => At::SizeLineFeed,
                // Extensions mean nothing to us, and end here; but they are one line of text.
                (At::Extension, b'\t' | b' '..=b'~' | 0x80..) => At::Extension,
                (At::SizeLineFeed, b'\n') => {
                    self.line = 0;
                    self.digits = 0;
                    if self.size == 0 { At::TrailerStart } else { At::Data }
                }
                (At::DataReturn, b'\r') => At::DataLineFeed,
                (At::DataLineFeed, b'\n') => {
                    self.line = 0;
                    At::Size
                }
                (At::TrailerStart, b'\r') => At::LastLineFeed,
                // Trailers are fields that nobody judged: they end here.
                (At::TrailerStart, b'!'..=b'~') | (At::Trailer, b'\t' | b' '..=b'~' | 0x80..) => At::Trailer,
                (At::Trailer, b'\r') => At::TrailerLineFeed,
                (At::TrailerLineFeed, b'\n') => At::TrailerStart,
                (At::LastLineFeed, b'\n') => return Ok((at, true)),
                _ => return Err(Http1Error::Chunk),
            };
        }
        Ok((at, false))
    }
}

/// Appends `data` as a chunk (RFC 9112 §7.1). Nothing for nothing, which would be the last chunk.
pub fn write_chunk(data: &[u8], out: &mut Vec<u8>) {
    if data.is_empty() {
        return;
    }
    out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

/// The last chunk, without trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(text: &str) -> Result<Read, Http1Error> {
        read_answer(text.as_bytes(), &Method::GET)
    }

    /// The whole answer: its content, whether it ended, whether the connection may be used again.
    fn whole(text: &str, method: &Method) -> Result<(Bytes, bool, bool), Http1Error> {
        let Read::Answer(len, mut answer) = read_answer(text.as_bytes(), method)? else {
            panic!("{text:?} is not whole")
        };
        let rest = &text.as_bytes()[len..];
        let (content, taken) = answer.body.take(rest)?;
        let surplus = taken < rest.len();
        Ok((content, answer.body.is_ended(), answer.reusable && !surplus))
    }

    #[test]
    fn a_body_ends_where_rfc_9112_says() {
        for (text, content, ended, reusable) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", true, true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", "ab", false, true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n", "abc", true, false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "", true, true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", "a", true, true),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", "ab", true, true),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nab\r\n", "ab", false, true),
            ("HTTP/1.1 200 OK\r\n\r\nabc", "abc", false, false),
            ("HTTP/1.1 204 No Content\r\n\r\n", "", true, true),
            ("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "", true, true),
            ("HTTP/1.1 204 No Content\r\n\r\nabc", "", true, false),
            ("HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 1\r\n\r\na", "a", true, false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", "a", true, false),
            ("HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\na", "a", true, true),
        ] {
            assert_eq!(whole(text, &Method::GET), Ok((content.into(), ended, reusable)), "{text:?}");
        }
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(whole(head, &Method::HEAD), Ok((Bytes::new(), true, true)));
    }

    #[test]
    fn an_answer_that_can_be_read_in_two_ways_is_none() {
        for fields in [
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Content-Length: 1\r\nContent-Length: 2",
            "Content-Length: 1, 1",
            "Content-Length: +1",
            "Content-Length: ",
            "Content-Length: 18446744073709551616",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked, identity",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: identity",
        ] {
            let text = format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n");
            assert_eq!(answer(&text).unwrap_err(), Http1Error::Length, "{fields}");
        }
        let old = "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(answer(old).unwrap_err(), Http1Error::Length);
        for head in [
            "HTTP/1.1 200 OK\nContent-Length: 1\n\n",
            "HTTP/1.1 200 OK\r\nX: a\n\r\n",
            "\r\nHTTP/1.1 200 OK\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
        ] {
            assert_eq!(answer(head).unwrap_err(), Http1Error::Head, "{head:?}");
        }
        assert_eq!(answer("HTTP/1.1 101 Go\r\n\r\n").unwrap_err(), Http1Error::Interim);
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "a".repeat(MAX_HEAD));
        assert_eq!(answer(&long).unwrap_err(), Http1Error::TooLong);
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: a\r\n".repeat(MAX_FIELDS + 1));
        assert_eq!(answer(&many).unwrap_err(), Http1Error::Head);
    }

    #[test]
    fn interim_answers_are_passed_over() {
        let early = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
        assert!(
            matches!(answer(&format!("{early}HTTP/1.1 200 OK\r\n\r\n")), Ok(Read::Interim(len)) if len == early.len())
        );
        assert!(matches!(answer("HTTP/1.1 200 OK\r\n"), Ok(Read::Partial)));
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for chunks in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1 \r\n",
            "1\n",
            "1\r\nab\r\n",
            "1\r\na\n0\r\n\r\n",
            "11111111111111111\r\n",
            "1;\0\r\n",
            "1;a\n\r\n",
            "0\r\n\n",
            "0\r\n a: b\r\n",
            "0\r\nA: b\n",
        ] {
            let outcome = Chunks::default().take(chunks.as_bytes(), &mut Vec::new());
            assert_eq!(outcome, Err(Http1Error::Chunk), "{chunks:?}");
        }
        for endless in
            [format!("1;{}", "a".repeat(MAX_LINE as usize)), format!("0\r\n{}", "A: b\r\n".repeat(1000))]
        {
            assert_eq!(Chunks::default().take(endless.as_bytes(), &mut Vec::new()), Err(Http1Error::Chunk));
        }
        let mut content = Vec::new();
        let fine = b"1;name=\"value\"\r\na\r\n00A\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nHTTP";
        assert_eq!(Chunks::default().take(fine, &mut content), Ok((fine.len() - 4, true)));
        assert_eq!(content, b"a0123456789");
    }

    fn head<'a>(path: &'a str, query: Option<&'a str>, host: &'a HeaderValue) -> Head<'a> {
        const FIELDS: [(HeaderName, &str); 4] = [
            (HOST, "other"),
            (CONTENT_LENGTH, "9"),
            (HeaderName::from_static("x-a"), "1"),
            (HeaderName::from_static("x-a"), "2"),
        ];
        let fields: &Fields<'_> =
            &|put| FIELDS.iter().for_each(|(name, value)| put(name, &HeaderValue::from_static(value)));
        Head { method: &Method::POST, path, query, host, fields }
    }

    #[test]
    fn a_head_says_one_host_and_one_length() {
        let host = HeaderValue::from_static("chat.example");
        for (length, says) in [
            (Length::None, "content-length: 0\r\n"),
            (Length::Known(5), "content-length: 5\r\n"),
            (Length::Chunked, "transfer-encoding: chunked\r\n"),
        ] {
            let mut out = Vec::new();
            head("/a", Some("b=c"), &host).write(length, &mut out).unwrap();
            let expected =
                format!("POST /a?b=c HTTP/1.1\r\nhost: chat.example\r\nx-a: 1\r\nx-a: 2\r\n{says}\r\n");
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    #[test]
    fn a_target_cannot_break_out_of_its_line() {
        let host = HeaderValue::from_static("a");
        for (path, query) in [
            ("/a b", None),
            ("/a\r\nX: y", None),
            ("a", None),
            ("", None),
            ("/a", Some("b c")),
            ("/\u{e9}", None),
        ] {
            let outcome = head(path, query, &host).write(Length::None, &mut Vec::new());
            assert_eq!(outcome, Err(Http1Error::Request), "{path:?} {query:?}");
        }
    }

    proptest! {
        #[test]
        fn chunks_in_pieces_are_the_whole(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6),
            cut in 1_usize..20,
            noise in prop::collection::vec(any::<u8>(), 0..8),
            at in any::<prop::sample::Index>(),
            spoil in any::<bool>(),
        ) {
            let mut wire = Vec::new();
            parts.iter().for_each(|part| write_chunk(part, &mut wire));
            wire.extend_from_slice(LAST_CHUNK);
            if spoil {
                let at = at.index(wire.len());
                wire.splice(at..at, noise);
            }
            let mut content = Vec::new();
            let whole = Chunks::default().take(&wire, &mut content);
            let (mut pieces, mut got, mut len) = (Chunks::default(), Vec::new(), 0);
            let mut outcome = Ok((0, false));
            for piece in wire.chunks(cut) {
                outcome = pieces.take(piece, &mut got);
                match outcome {
                    Ok((taken, ended)) => {
                        len += taken;
                        if ended { break }
                    }
                    Err(_) => break,
                }
            }
            prop_assert_eq!(whole.map(|(_, ended)| ended), outcome.map(|(_, ended)| ended));
            if let Ok((taken, _)) = whole {
                prop_assert_eq!((taken, &content), (len, &got));
            }
            if !spoil {
                prop_assert_eq!(content, parts.concat());
                prop_assert_eq!(len, wire.len());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, cut in 0_usize..64) {
            let mut text = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nX-Y: z\r\n\r\n0123456789ab".to_vec();
            text.splice(cut.min(text.len())..cut.min(text.len()), bytes);
            if let Ok(Read::Answer(len, mut answer)) = read_answer(&text, &Method::GET) {
                let (_, taken) = answer.body.take(&text[len..]).unwrap_or_default();
                prop_assert!(len + taken <= text.len());
            }
        }
    }
}
