//! HTTP/1.1 requests: one strict reading of heads, of the framing of bodies, and so of where the next head begins.
//!
//! A request that a client sends ahead of the answers to others is judged like any other, because it is known where
//! the body before it ends. What passes, hyper reads the same way (tests/src/fuzz.rs `request_guard`).

use super::GuardFault;

/// Bytes of all extensions of the chunks of one body. None that we know of uses any.
const MAX_EXTENSION_BYTES: usize = 1024;

/// Longest line with a chunk's size.
const MAX_CHUNK_LINE: usize = 256;

/// Trailer section of one body.
const MAX_TRAILER_BYTES: usize = 8 * 1024;

/// Fields in it.
const MAX_TRAILERS: u32 = 32;

/// Empty lines before a request line: RFC 9112 §2.2 wants one or so forgiven.
const MAX_EMPTY_LINES: u8 = 4;

/// Longest method. The longest that is registered has 17 letters.
const MAX_METHOD: usize = 32;

/// Judges the requests of one connection.
pub struct RequestGuard {
    max_bytes: usize,
    max_fields: u32,
    state: State,
}

enum State {
    Head(Head),
    /// Bytes of a body that are still to come.
    Body(u64),
    ChunkSize {
        /// Extension bytes of the body so far.
        extensions: usize,
    },
    ChunkData {
        left: u64,
        extensions: usize,
    },
    /// The line end behind a chunk's data.
    ChunkEnd {
        extensions: usize,
    },
    Trailers {
        fields: u32,
        bytes: usize,
    },
    /// Behind a request to upgrade: nobody knows yet what comes.
    Undecided,
}

/// What is known of the head that is being read.
#[derive(Default)]
struct Head {
    /// Bytes of it that were judged: whole lines.
    scanned: usize,
    /// The request line was read.
    begun: bool,
    fields: u32,
    empty_lines: u8,
    http10: bool,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

/// What came of looking at bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judged {
    /// So many from the front may pass. The rest is to be shown again, with more behind.
    pub pass: usize,
    /// What is wrong with what comes next. Nothing may pass any more.
    pub fault: Option<GuardFault>,
}

impl RequestGuard {
    /// A guard at the beginning of a connection, with the policy's limits of a head.
    #[must_use]
    pub fn new(max_bytes: u32, max_fields: u32) -> Self {
        Self { max_bytes: max_bytes as usize, max_fields, state: State::Head(Head::default()) }
    }

    /// Looks at `bytes`: all that came and was not let pass.
    ///
    /// A head passes as a whole and not before, so that hyper never sees the beginning of a bad one.
    pub fn judge(&mut self, bytes: &[u8]) -> Judged {
        let mut pass = 0;
        while let Some(rest @ [_, ..]) = bytes.get(pass..) {
            match self.step(rest) {
                Ok(Some(len)) => pass += len,
                Ok(None) => break,
                Err(fault) => return Judged { pass, fault: Some(fault) },
            }
        }
        Judged { pass, fault: None }
    }

    /// Whether the next byte belongs to a head, or would begin one.
    #[must_use]
    pub fn in_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }

    /// Whether a request to upgrade has passed, behind which nothing is judged until [`RequestGuard::resume`].
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        matches!(self.state, State::Undecided)
    }

    /// The upgrade was refused: what follows are requests.
    pub fn resume(&mut self) {
        self.state = State::Head(Head::default());
    }

    /// Takes one step at the front of `bytes`, which are some: so many may pass, or more has to come.
    fn step(&mut self, bytes: &[u8]) -> Result<Option<usize>, GuardFault> {
        match &mut self.state {
            State::Head(head) => {
                let Some(len) = head.read(bytes, self.max_bytes, self.max_fields)? else { return Ok(None) };
                if head.begun {
                    self.state = head.end()?;
                } else {
                    head.scanned = 0;
                }
                Ok(Some(len))
            }
            State::Body(left) => {
                let len = take(left, bytes);
                if *left == 0 {
                    self.state = State::Head(Head::default());
                }
                Ok(Some(len))
            }
            State::ChunkSize { extensions } => {
                let Some((line, len)) = line(bytes, MAX_CHUNK_LINE, CHUNK)? else { return Ok(None) };
                let (size, extension) = chunk_size(line)?;
                let extensions = *extensions + extension;
                if extensions > MAX_EXTENSION_BYTES {
                    return Err(CHUNK);
                }
                self.state = match size {
                    0 => State::Trailers { fields: 0, bytes: 0 },
                    left => State::ChunkData { left, extensions },
                };
                Ok(Some(len))
            }
            State::ChunkData { left, extensions } => {
                let len = take(left, bytes);
                if *left == 0 {
                    self.state = State::ChunkEnd { extensions: *extensions };
                }
                Ok(Some(len))
            }
            State::ChunkEnd { extensions } => match bytes {
                [b'\r', b'\n', ..] => {
                    self.state = State::ChunkSize { extensions: *extensions };
                    Ok(Some(2))
                }
                [b'\r'] => Ok(None),
                _ => Err(CHUNK),
            },
            State::Trailers { fields, bytes: before } => {
                let room = MAX_TRAILER_BYTES.saturating_sub(*before);
                let Some((line, len)) = line(bytes, room, GuardFault::HeadTooLarge)? else { return Ok(None) };
                if line.is_empty() {
                    self.state = State::Head(Head::default());
                    return Ok(Some(len));
                }
                let (name, _) = field(line)?;
                if !may_trail(name) {
                    return Err(GuardFault::Malformed("a field that may not stand in a trailer section"));
                }
                *before += len;
                *fields += 1;
                if *fields > MAX_TRAILERS { Err(GuardFault::HeadTooLarge) } else { Ok(Some(len)) }
            }
            State::Undecided => Ok(None),
        }
    }
}

const CHUNK: GuardFault = GuardFault::Malformed("the chunks of the body are not valid");
const TWO_LENGTHS: GuardFault = GuardFault::Malformed("both Content-Length and Transfer-Encoding");

impl Head {
    /// The head's length, once it is whole; `bytes` begin where it does. Empty lines in front are one by themselves.
    fn read(&mut self, bytes: &[u8], max_bytes: usize, max_fields: u32) -> Result<Option<usize>, GuardFault> {
        loop {
            let unread = bytes.get(self.scanned..).unwrap_or_default();
            let too_long = if self.begun { GuardFault::HeadTooLarge } else { GuardFault::LineTooLong };
            if !self.begun && !unread.first().is_none_or(|first| is_token(*first) || *first == b'\r') {
                // Also what is no HTTP at all, and has no line ends: it need not wait for the deadline.
                return Err(match unread.first() {
                    Some(b'\n') => BARE_LF,
                    _ => GuardFault::Malformed("the request line does not begin with a method"),
                });
            }
            let room = max_bytes.saturating_sub(self.scanned);
            let Some((line, len)) = line(unread, room, too_long)? else { return Ok(None) };
            self.scanned += len;
            if line.is_empty() {
                if !self.begun {
                    self.empty_lines += 1;
                    if self.empty_lines > MAX_EMPTY_LINES {
                        return Err(GuardFault::Malformed("empty lines instead of a request"));
                    }
                }
                return Ok(Some(self.scanned));
            }
            if self.begun {
                self.fields += 1;
                if self.fields > max_fields {
                    return Err(GuardFault::HeadTooLarge);
                }
                self.take_field(line)?;
            } else {
                self.begun = true;
                self.http10 = request_line(line)?;
            }
        }
    }

    fn take_field(&mut self, line: &[u8]) -> Result<(), GuardFault> {
        let (name, value) = field(line)?;
        match name.len() {
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.upgrade = true,
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                // RFC 9112 §6.3 lets equal ones pass. Whoever sends them is not to be trusted with framing.
                if self.length.is_some() {
                    return Err(GuardFault::Malformed("more than one Content-Length"));
                }
                self.length = Some(decimal(value)?);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.chunked {
                    return Err(GuardFault::Malformed("more than one Transfer-Encoding"));
                }
                coding(value)?;
                self.chunked = true;
            }
            _ => {}
        }
        if self.length.is_some() && self.chunked { Err(TWO_LENGTHS) } else { Ok(()) }
    }

    /// What follows the head.
    fn end(&self) -> Result<State, GuardFault> {
        if self.chunked && self.http10 {
            return Err(GuardFault::Malformed("HTTP/1.0 has no transfer codings"));
        }
        // hyper takes HTTP/1.0 at its word that it cannot upgrade.
        if self.upgrade && !self.http10 {
            if self.chunked || self.length.is_some_and(|length| length > 0) {
                return Err(GuardFault::Malformed("an upgrade with a body"));
            }
            return Ok(State::Undecided);
        }
        Ok(match self.length {
            _ if self.chunked => State::ChunkSize { extensions: 0 },
            None | Some(0) => State::Head(Self::default()),
            Some(length) => State::Body(length),
        })
    }
}

const BARE_LF: GuardFault = GuardFault::Malformed("a line that ends without CR");

/// The first line of `bytes` without its end, and its length with it; `None` while it is not whole.
fn line(bytes: &[u8], room: usize, too_long: GuardFault) -> Result<Option<(&[u8], usize)>, GuardFault> {
    let Some(end) = memchr::memchr(b'\n', bytes.get(..room).unwrap_or(bytes)) else {
        return if bytes.len() >= room { Err(too_long) } else { Ok(None) };
    };
    match bytes.get(..end) {
        // httparse takes LF alone for a line end, and others do not (RFC 9112 §2.2).
        Some([line @ .., b'\r']) => Ok(Some((line, end + 1))),
        _ => Err(BARE_LF),
    }
}

/// Checks a request line (RFC 9112 §3); true for HTTP/1.0.
fn request_line(line: &[u8]) -> Result<bool, GuardFault> {
    let malformed = Err(GuardFault::Malformed("the request line is not valid"));
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), version, None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return malformed;
    };
    if method.is_empty() || method.len() > MAX_METHOD || !method.iter().all(|byte| is_token(*byte)) {
        return Err(GuardFault::Malformed("the method is not valid"));
    }
    // A fragment is not sent (RFC 9112 §3.2); the `http` crate would drop it.
    if target.is_empty() || !target.iter().all(|byte| is_of_target(*byte)) {
        return Err(GuardFault::Malformed(
            "the target has a character that must be encoded, or may not occur",
        ));
    }
    let http10 = match version {
        Some(b"HTTP/1.1") => false,
        Some(b"HTTP/1.0") => true,
        Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor])
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            return Err(GuardFault::UnknownVersion);
        }
        Some(_) => return malformed,
        None => return Err(GuardFault::Malformed("HTTP/0.9 is not spoken here")),
    };
    if method == b"CONNECT" {
        return Err(GuardFault::Connect);
    }
    let absolute =
        |scheme: &[u8]| target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
    let is_fine = target.starts_with(b"/")
        || target == b"*" && method == b"OPTIONS"
        || absolute(b"https://")
        || absolute(b"http://");
    if is_fine {
        Ok(http10)
    } else {
        Err(GuardFault::Malformed("the target has none of the forms of RFC 9112"))
    }
}

/// Name and value of a field line (RFC 9112 §5), the value without the blanks around it.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), GuardFault> {
    let len = line.iter().position(|byte| !is_token(*byte)).unwrap_or(line.len());
    let (name, rest) = line.split_at_checked(len).unwrap_or_default();
    let value = match (name, rest) {
        ([_, ..], [b':', value @ ..]) => value,
        ([], [b' ' | b'\t', ..]) => return Err(GuardFault::Malformed("a folded field")),
        (_, [b' ' | b'\t', ..]) => return Err(GuardFault::Malformed("a blank before the colon of a field")),
        _ => return Err(GuardFault::Malformed("the name of a field is not valid")),
    };
    // Without a branch for each byte, so that the compiler may take many at once.
    let illegal = value
        .iter()
        .fold(false, |illegal, byte| illegal | ((*byte < b' ') & (*byte != b'\t')) | (*byte == 0x7f));
    if illegal {
        return Err(GuardFault::Malformed("the value of a field has a control character"));
    }
    Ok((name, trim(value)))
}

fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn decimal(value: &[u8]) -> Result<u64, GuardFault> {
    let invalid = GuardFault::Malformed("the Content-Length is not valid");
    // 19 digits fit whatever they are, and RFC 9110 §8.6 warns of those that do not.
    if value.is_empty() || value.len() > 19 {
        return Err(invalid);
    }
    value.iter().try_fold(0_u64, |number, digit| match digit {
        b'0'..=b'9' => Ok(number * 10 + u64::from(digit - b'0')),
        _ => Err(invalid),
    })
}

/// Only `chunked`, once (RFC 9112 §6.1, §7).
fn coding(value: &[u8]) -> Result<(), GuardFault> {
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let mut codings = value.split(|byte| *byte == b',').map(trim);
    let is_chunked = |coding: &[u8]| coding.eq_ignore_ascii_case(b"chunked");
    let chunked = codings.clone().filter(|coding| is_chunked(coding)).count();
    Err(match chunked {
        _ if codings.any(|coding| coding.is_empty() || !coding.iter().all(|byte| is_token(*byte))) => {
            GuardFault::Malformed("the Transfer-Encoding is not valid")
        }
        // The body's end could not be told.
        1 if !value.rsplit(|byte| *byte == b',').next().is_some_and(|last| is_chunked(trim(last))) => {
            GuardFault::Malformed("`chunked` is not the last transfer coding")
        }
        0 | 1 => GuardFault::UnknownCoding,
        _ => GuardFault::Malformed("`chunked` stands twice"),
    })
}

/// A chunk's size, and the bytes of its extensions (RFC 9112 §7.1).
fn chunk_size(line: &[u8]) -> Result<(u64, usize), GuardFault> {
    let digits = line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len());
    let (digits, extension) = line.split_at_checked(digits).unwrap_or_default();
    if digits.is_empty() || digits.len() > 15 {
        return Err(CHUNK);
    }
    let size = digits
        .iter()
        .fold(0, |size, digit| size << 4 | u64::from(char::from(*digit).to_digit(16).unwrap_or_default()));
    // No blank before the semicolon, which RFC 9112 §7.1.1 calls bad: it is where readers differ.
    let is_fine = match extension {
        [] => true,
        [b';', rest @ ..] => rest.iter().all(|byte| matches!(byte, b'\t' | b' '..=0x7e)),
        _ => false,
    };
    if is_fine { Ok((size, extension.len())) } else { Err(CHUNK) }
}

/// RFC 9110 §6.5.1: nothing that frames, routes, authenticates or changes how the body is read. No trailer is passed on.
fn may_trail(name: &[u8]) -> bool {
    const NOT: [&[u8]; 20] = [
        b"authorization",
        b"cache-control",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"dpop",
        b"expect",
        b"forwarded",
        b"host",
        b"keep-alive",
        b"origin",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-forwarded-for",
    ];
    !NOT.iter().any(|not| name.eq_ignore_ascii_case(not))
}

fn take(left: &mut u64, bytes: &[u8]) -> usize {
    let len = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    *left -= len as u64;
    len
}

/// RFC 9110 §5.6.2.
const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
}

/// Whatever RFC 3986 lets stand in a URI as it is, but for `#`.
const fn is_of_target(byte: u8) -> bool {
    matches!(byte, b'!' | b'$'..=b';' | b'=' | b'?'..=b'[' | b']' | b'_' | b'a'..=b'z' | b'~')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: u32 = 1024;

    /// What passes of `wire`, and the fault; the same however it is cut.
    fn judge(wire: &[u8]) -> (usize, Option<GuardFault>) {
        let whole = judge_in_pieces(wire, wire.len().max(1));
        for cut in [1, 2, 3, 7, 64] {
            assert_eq!(judge_in_pieces(wire, cut), whole, "{:?} by {cut}", String::from_utf8_lossy(wire));
        }
        whole
    }

    fn judge_in_pieces(wire: &[u8], cut: usize) -> (usize, Option<GuardFault>) {
        let mut guard = RequestGuard::new(LIMIT, 10);
        let mut passed = 0;
        for end in (0..wire.len()).step_by(cut).map(|start| (start + cut).min(wire.len())) {
            let judged = guard.judge(&wire[passed..end]);
            passed += judged.pass;
            if judged.fault.is_some() {
                return (passed, judged.fault);
            }
        }
        (passed, None)
    }

    fn passes(wire: &str) {
        assert_eq!(judge(wire.as_bytes()), (wire.len(), None), "{wire:?}");
    }

    #[test]
    fn honest_requests_pass_one_behind_the_other() {
        for request in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
            "\r\nGET /x?y=z HTTP/1.1\r\nHost: a\r\nX-Text: a\tb \u{e9}\r\nEmpty:\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\ntransfer-ENCODING:\t Chunked \r\n\r\n3\r\nabc\r\n0A;x=y\r\n0123456789\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Checksum: 1\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            passes(request);
            passes(&request.repeat(3));
        }
    }

    #[test]
    fn a_body_is_not_read_as_a_head() {
        let inner = "GET /\n HTTP/9.9\r\nContent-Length: x\r\n\r\n";
        passes(&format!(
            "POST / HTTP/1.1\r\nContent-Length: {}\r\n\r\n{inner}GET / HTTP/1.1\r\n\r\n",
            inner.len()
        ));
        let chunk = format!("{:x}\r\n{inner}\r\n0\r\n\r\n", inner.len());
        passes(&format!(
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}GET / HTTP/1.1\r\n\r\n"
        ));
    }

    #[test]
    fn a_bad_head_behind_a_good_request_does_not_pass_in_part() {
        let good = "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
        let bad = "POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc";
        let (passed, fault) = judge(format!("{good}{bad}").as_bytes());
        assert_eq!(passed, good.len());
        assert_eq!(fault, Some(GuardFault::Malformed("more than one Content-Length")));
    }

    #[test]
    fn what_could_be_read_in_two_ways_does_not_pass() {
        let codings = |value: &str| format!("POST / HTTP/1.1\r\nTransfer-Encoding: {value}\r\n\r\n");
        let fields = |fields: &str| format!("POST / HTTP/1.1\r\n{fields}\r\n\r\n");
        for (wire, unknown) in [
            (codings("gzip, chunked"), true),
            (codings("xchunked"), true),
            (codings("identity"), true),
            (codings("chunked, identity"), false),
            (codings("chunked, chunked"), false),
            (codings("chunked,"), false),
            (codings(""), false),
            (codings("\"chunked\""), false),
            (codings("chunked;q=1"), false),
            (codings("\x0bchunked"), false),
        ] {
            let (passed, fault) = judge(wire.as_bytes());
            assert_eq!(
                (passed, fault == Some(GuardFault::UnknownCoding)),
                (0, unknown),
                "{wire:?} {fault:?}"
            );
            assert!(fault.is_some(), "{wire:?}");
        }
        for bad in [
            fields("Content-Length: 6\r\nTransfer-Encoding: chunked"),
            fields("Transfer-Encoding: chunked\r\nContent-Length: 6"),
            fields("Content-Length: 1\r\nContent-Length: 1"),
            fields("Content-Length: 1,1"),
            fields("Content-Length: +1"),
            fields("Content-Length: 0x1"),
            fields("Content-Length:"),
            fields("Content-Length: 1 1"),
            fields("Content-Length: 99999999999999999999"),
            fields("Content-Length : 1"),
            fields("X: a\r\n b"),
            fields(" X: a"),
            fields("X: a\rb"),
            fields("X: a\0b"),
            fields("X: a\x7fb"),
            fields("X\0: a"),
            fields("X(: a"),
            fields(": a"),
            fields("X"),
            fields("X: a\n"),
            fields("Upgrade: websocket\r\nContent-Length: 1"),
            "GET / HTTP/1.1\nHost: a\n\n".into(),
            "GET / HTTP/1.1\r\nHost: a\r\n\n".into(),
            "GET /\r\n\r\n".into(),
            "GET  / HTTP/1.1\r\n\r\n".into(),
            "GET / HTTP/1.1 \r\n\r\n".into(),
            "GET /\t HTTP/1.1\r\n\r\n".into(),
            "GET /a#b HTTP/1.1\r\n\r\n".into(),
            "GET /\u{e9} HTTP/1.1\r\n\r\n".into(),
            "GET a HTTP/1.1\r\n\r\n".into(),
            "GET * HTTP/1.1\r\n\r\n".into(),
            "GET ftp://a/ HTTP/1.1\r\n\r\n".into(),
            "G(T / HTTP/1.1\r\n\r\n".into(),
            "GET / http/1.1\r\n\r\n".into(),
            "GET / HTTP/2.0\r\n\r\n".into(),
            "CONNECT a:1 HTTP/1.1\r\n\r\n".into(),
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            "\u{16}\u{3}\u{1}".into(),
            "\r\n".repeat(5),
            format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(LIMIT as usize)),
            fields(&format!("X: {}", "a".repeat(LIMIT as usize))),
            fields(&"X: a\r\n".repeat(11)),
        ] {
            let (passed, fault) = judge(bad.as_bytes());
            assert!(fault.is_some() && passed <= 8, "{bad:?}: {passed} {fault:?}");
        }
    }

    #[test]
    fn chunks_by_the_book_only() {
        let head = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        for bad in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "+1\r\na\r\n",
            "0x1\r\na\r\n",
            " 1\r\na\r\n",
            "1 \r\na\r\n",
            "1 ;a\r\na\r\n",
            "1;a\rb\r\na\r\n",
            "1;\0\r\na\r\n",
            "1\na\r\n",
            "1\r\na\n",
            "1\r\nab\r\n",
            "1\r\na\r0\r\n",
            "0000000000000001\r\na\r\n",
            "ffffffffffffffff\r\n",
            "0\r\nX: a\n\r\n",
            "0\r\nHost: a\r\n\r\n",
            "0\r\nContent-Length: 1\r\n\r\n",
            "0\r\n X: a\r\n\r\n",
            "0\r\nX\r\n\r\n",
            "0\n\r\n",
        ] {
            let (_, fault) = judge(format!("{head}{bad}").as_bytes());
            assert!(fault.is_some(), "{bad:?}");
        }
        let extensions = format!("1;{}\r\na\r\n", "x".repeat(200)).repeat(6);
        assert!(judge(format!("{head}{extensions}").as_bytes()).1.is_some());
        let trailers = "X: a\r\n".repeat(33);
        assert!(judge(format!("{head}0\r\n{trailers}\r\n").as_bytes()).1.is_some());
    }

    #[test]
    fn behind_an_upgrade_nothing_passes_until_it_is_refused() {
        let upgrade = "GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n";
        let next = "GET / HTTP/1.1\r\n\r\n";
        let mut guard = RequestGuard::new(LIMIT, 10);
        let judged = guard.judge(format!("{upgrade}{next}").as_bytes());
        assert_eq!((judged.pass, judged.fault), (upgrade.len(), None));
        assert!(guard.is_undecided());
        assert_eq!(guard.judge(next.as_bytes()).pass, 0);
        guard.resume();
        assert_eq!(guard.judge(next.as_bytes()).pass, next.len());
    }

    proptest! {
        #[test]
        fn pieces_are_judged_as_the_whole(
            parts in proptest::collection::vec(prop_oneof![
                Just("GET / HTTP/1.1\r\n".to_owned()), Just("\r\n".to_owned()), Just("Host: a\r\n".to_owned()),
                Just("POST /x HTTP/1.1\r\n".to_owned()), Just("Content-Length: 5\r\n".to_owned()),
                Just("Transfer-Encoding: chunked\r\n".to_owned()), Just("5\r\nabcde\r\n".to_owned()),
                Just("0\r\n\r\n".to_owned()), Just("\n".to_owned()), Just("Upgrade: x\r\n".to_owned()), "\\PC{0,9}",
            ], 0..12),
            cut in 1_usize..40,
        ) {
            let wire = parts.concat();
            prop_assert_eq!(judge_in_pieces(wire.as_bytes(), cut), judge_in_pieces(wire.as_bytes(), wire.len().max(1)));
        }
    }
}
