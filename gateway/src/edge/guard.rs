//! Judges raw bytes before hyper interprets them: what hyper forgives or does not count.
//!
//! Without I/O. Bytes are looked at, never changed or held back.

use std::time::{Duration, Instant};

/// HTTP/2 control frames that a peer may send in [`WINDOW`]. Browsers stay below a hundred.
const MAX_CONTROL_FRAMES: u32 = 1000;

/// The time over which control frames are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// What ends a connection here and now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuardFault {
    /// A line of a head ends in LF alone, which httparse takes for CRLF and others do not (RFC 9112 §2.2).
    #[error("a line of the head ends without CR")]
    BareLineFeed,
    /// Both `Content-Length` and `Transfer-Encoding`: hyper drops the first, another server may not
    /// (RFC 9112 §6.1).
    #[error("both Content-Length and Transfer-Encoding")]
    TwoLengths,
    /// More SETTINGS, PING, PRIORITY and RST_STREAM frames than any honest client sends (CVE-2019-9512 and
    /// its kin).
    #[error("a flood of control frames")]
    ControlFlood,
}

/// The guard of one connection.
pub enum Guard {
    /// HTTP/1.1.
    Heads(HeadGuard),
    /// HTTP/2.
    Frames(FrameGuard),
    /// Neither any more: a WebSocket, whose frames the relay judges.
    None,
}

impl Guard {
    /// A guard for what ALPN chose.
    #[must_use]
    pub fn new(http2: bool) -> Self {
        if http2 { Self::Frames(FrameGuard::default()) } else { Self::Heads(HeadGuard::default()) }
    }
}

/// Looks at the heads of HTTP/1.1 requests.
///
/// A head that a client sends ahead, before the answer to the request before it, is not seen here; it is
/// framed anew on its way to the backend like any other.
#[derive(Default)]
pub struct HeadGuard {
    /// The first bytes of the line that is being read; enough to tell the names below.
    line: Line,
    begun: bool,
    length: bool,
    coding: bool,
}

#[derive(Default)]
struct Line {
    start: [u8; NAME_BYTES],
    /// Bytes of the line so far, CR included.
    len: usize,
    last: u8,
}

const LENGTH: &[u8] = b"content-length:";
const CODING: &[u8] = b"transfer-encoding:";
const NAME_BYTES: usize = CODING.len();

impl HeadGuard {
    /// Looks at more bytes of a head. True when the head has ended; call it again when the next begins.
    ///
    /// # Errors
    ///
    /// The head can be read in two ways.
    pub fn judge(&mut self, mut bytes: &[u8]) -> Result<bool, GuardFault> {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at(end);
            self.line.extend(line);
            bytes = rest.get(1..).unwrap_or_default();
            let line = std::mem::take(&mut self.line);
            if line.last != b'\r' {
                return Err(GuardFault::BareLineFeed);
            }
            if line.len == 1 {
                // Empty lines before a request line are allowed (RFC 9112 §2.2), and end nothing.
                if !self.begun {
                    continue;
                }
                *self = Self::default();
                return Ok(true);
            }
            self.begun = true;
            self.length |= line.is(LENGTH);
            self.coding |= line.is(CODING);
            if self.length && self.coding {
                return Err(GuardFault::TwoLengths);
            }
        }
        self.line.extend(bytes);
        Ok(false)
    }
}

impl Line {
    fn extend(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.last = *last;
        }
        if let Some(room) = self.start.get_mut(self.len..) {
            room.iter_mut().zip(bytes).for_each(|(room, byte)| *room = byte.to_ascii_lowercase());
        }
        self.len += bytes.len();
    }

    fn is(&self, name: &[u8]) -> bool {
        self.start.starts_with(name)
    }
}

/// Counts HTTP/2 control frames (RFC 9113 §4.1), which h2 does not.
pub struct FrameGuard {
    /// Bytes to pass over: the rest of the client's preface, or of a frame's payload.
    skip: usize,
    header: [u8; HEADER_BYTES],
    have: usize,
    since: Option<Instant>,
    count: u32,
}

const HEADER_BYTES: usize = 9;
const PREFACE_BYTES: usize = 24;

impl Default for FrameGuard {
    fn default() -> Self {
        Self { skip: PREFACE_BYTES, header: [0; HEADER_BYTES], have: 0, since: None, count: 0 }
    }
}

impl FrameGuard {
    /// Looks at more bytes of the connection.
    ///
    /// # Errors
    ///
    /// [`GuardFault::ControlFlood`].
    pub fn judge(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), GuardFault> {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(());
            }
            let taken = (HEADER_BYTES - self.have).min(bytes.len());
            let (head, rest) = bytes.split_at(taken);
            if let Some(room) = self.header.get_mut(self.have..self.have + taken) {
                room.copy_from_slice(head);
            }
            self.have += taken;
            bytes = rest;
            if self.have < HEADER_BYTES {
                return Ok(());
            }
            self.have = 0;
            let [a, b, c, kind, ..] = self.header;
            self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
            if matches!(kind, PRIORITY | RST_STREAM | SETTINGS | PING) {
                self.count(now)?;
            }
        }
    }

    fn count(&mut self, now: Instant) -> Result<(), GuardFault> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > WINDOW) {
            self.since = Some(now);
            self.count = 0;
        }
        self.count += 1;
        if self.count > MAX_CONTROL_FRAMES { Err(GuardFault::ControlFlood) } else { Ok(()) }
    }
}

// Frame types (RFC 9113 §6).
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn judge(head: &str) -> Result<bool, GuardFault> {
        let whole = HeadGuard::default().judge(head.as_bytes());
        let mut bytewise = HeadGuard::default();
        let mut outcome = Ok(false);
        for byte in head.as_bytes() {
            outcome = bytewise.judge(&[*byte]);
            if outcome != Ok(false) {
                break;
            }
        }
        assert_eq!(whole, outcome, "{head:?} whole and byte by byte");
        whole
    }

    #[test]
    fn an_honest_head_passes() {
        assert_eq!(judge("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), Ok(true));
        assert_eq!(judge("POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nx"), Ok(true));
        assert_eq!(judge("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Ok(true));
        assert_eq!(
            judge("GET / HTTP/1.1\r\nX-Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Ok(true)
        );
        assert_eq!(judge("\r\n\r\nGET / HTTP/1.1\r\n\r\n"), Ok(true));
        assert_eq!(judge("\r\n\r\n"), Ok(false), "nothing begun, nothing ended");
        assert_eq!(judge("GET / HTTP/1.1\r\nHost: a\r\n"), Ok(false), "not at its end yet");
    }

    #[test]
    fn a_head_that_can_be_read_in_two_ways_does_not() {
        let both = "POST / HTTP/1.1\r\nContent-Length: 6\r\ntransfer-ENCODING: chunked\r\n\r\n";
        assert_eq!(judge(both), Err(GuardFault::TwoLengths));
        assert_eq!(judge("GET / HTTP/1.1\nHost: a\n\n"), Err(GuardFault::BareLineFeed));
        assert_eq!(judge("GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"), Err(GuardFault::BareLineFeed));
        assert_eq!(judge("GET / HTTP/1.1\r\nHost: a\r\n\n"), Err(GuardFault::BareLineFeed));
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    fn connection(frames: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        [preface].into_iter().chain(frames).flatten().collect()
    }

    #[test]
    fn control_frames_are_counted_and_others_are_not() {
        let now = Instant::now();
        let pings = |n: u32| connection((0..n).map(|_| frame(PING, &[6; 8])));
        assert!(FrameGuard::default().judge(&pings(MAX_CONTROL_FRAMES), now).is_ok());
        assert!(FrameGuard::default().judge(&pings(MAX_CONTROL_FRAMES + 1), now).is_err());
        // Payload that looks like control frames is none.
        let data = connection((0..5000).map(|_| frame(0, &frame(SETTINGS, &[]))));
        assert!(FrameGuard::default().judge(&data, now).is_ok());
    }

    #[test]
    fn a_new_window_starts_at_nought() {
        let now = Instant::now();
        let mut guard = FrameGuard::default();
        let half = |first: bool| {
            let frames = (0..MAX_CONTROL_FRAMES).map(|_| frame(PING, &[0; 8]));
            if first { connection(frames) } else { frames.flatten().collect() }
        };
        assert!(guard.judge(&half(true), now).is_ok());
        assert!(guard.judge(&half(false), now + WINDOW + Duration::from_millis(1)).is_ok());
        assert!(guard.judge(&frame(PING, &[0; 8]), now + WINDOW * 2).is_err());
    }

    proptest! {
        #[test]
        fn pieces_are_judged_as_the_whole(bytes: Vec<u8>, cut in 1_usize..64) {
            let now = Instant::now();
            let mut pieces = FrameGuard::default();
            let mut whole = FrameGuard::default();
            prop_assert!(whole.judge(&bytes, now).is_ok());
            for piece in bytes.chunks(cut) {
                prop_assert!(pieces.judge(piece, now).is_ok());
            }
            prop_assert_eq!(pieces.count, whole.count);
            prop_assert_eq!((pieces.skip, pieces.have), (whole.skip, whole.have));
        }
    }
}
