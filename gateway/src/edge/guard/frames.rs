//! HTTP/2 frames: counts those that cost us more than their sender, which h2 does in part or not at all.
//!
//! What h2 counts itself: CONTINUATION frames of one header block, small DATA frames, streams that were reset before
//! they were looked at, and resets that our own errors caused (CVE-2025-8671); see `accept.rs`.

use std::time::{Duration, Instant};

use super::GuardFault;

/// Control frames that a peer may send in [`WINDOW`]. Browsers stay below a hundred.
const MAX_CONTROL: u32 = 1000;

/// Streams that a peer may reset in [`WINDOW`] (CVE-2023-44487). A page that is left resets what it was loading, a hundred
/// streams at most.
const MAX_RESETS: u32 = 300;

/// Frames of types that nobody knows (RFC 9113 §5.5) that a peer may send in [`WINDOW`].
const MAX_UNKNOWN: u32 = 100;

/// The time over which frames are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Bytes that we sent for which one more WINDOW_UPDATE is in order: some clients send two for each DATA frame, however small.
const BYTES_PER_UPDATE: u64 = 32;

/// Counts HTTP/2 frames (RFC 9113 §4.1) of one connection.
pub struct FrameGuard {
    /// Bytes to pass over: the rest of the client's preface, or of a frame's payload.
    skip: usize,
    header: [u8; HEADER_BYTES],
    have: usize,
    /// A header block has begun and not ended (RFC 9113 §6.10).
    in_block: bool,
    since: Option<Instant>,
    counts: Counts,
    /// Bytes that we have sent, ever.
    sent: u64,
}

/// Frames in the present window.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    control: u32,
    resets: u32,
    unknown: u32,
    updates: u64,
    /// [`FrameGuard::sent`] when the window began.
    sent_before: u64,
}

const HEADER_BYTES: usize = 9;
const PREFACE_BYTES: usize = 24;

impl Default for FrameGuard {
    fn default() -> Self {
        Self {
            skip: PREFACE_BYTES,
            header: [0; HEADER_BYTES],
            have: 0,
            in_block: false,
            since: None,
            counts: Counts::default(),
            sent: 0,
        }
    }
}

impl FrameGuard {
    /// Looks at more bytes of the connection.
    ///
    /// # Errors
    ///
    /// [`GuardFault::Flood`].
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
            let [a, b, c, kind, flags, ..] = self.header;
            self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
            self.count(kind, flags, now)?;
        }
    }

    /// Whether something has begun that has to be ended: the preface, a frame, a header block.
    #[must_use]
    pub fn is_amid(&self) -> bool {
        self.skip > 0 || self.have > 0 || self.in_block
    }

    /// We have sent so many bytes.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    fn count(&mut self, kind: u8, flags: u8, now: Instant) -> Result<(), GuardFault> {
        match kind {
            // Flow control and h2's budget bound it, unless it carries nothing.
            DATA if self.skip > 0 || flags & END_STREAM != 0 => return Ok(()),
            // Bound by the streams that may be open, and by what becomes of them.
            HEADERS => {
                self.in_block = flags & END_HEADERS == 0;
                return Ok(());
            }
            CONTINUATION => self.in_block = flags & END_HEADERS == 0,
            _ => {}
        }
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > WINDOW) {
            self.since = Some(now);
            self.counts = Counts { sent_before: self.sent, ..Counts::default() };
        }
        let counts = &mut self.counts;
        let (count, most, name) = match kind {
            WINDOW_UPDATE => {
                counts.updates += 1;
                let earned = (self.sent - counts.sent_before) / BYTES_PER_UPDATE;
                return if counts.updates > u64::from(MAX_CONTROL) + earned {
                    Err(GuardFault::Flood("WINDOW_UPDATE frames"))
                } else {
                    Ok(())
                };
            }
            RST_STREAM => (&mut counts.resets, MAX_RESETS, "resets"),
            DATA | PRIORITY | SETTINGS | PUSH_PROMISE | PING | GOAWAY | CONTINUATION | PRIORITY_UPDATE => {
                (&mut counts.control, MAX_CONTROL, "control frames")
            }
            _ => (&mut counts.unknown, MAX_UNKNOWN, "unknown frames"),
        };
        *count += 1;
        if *count > most { Err(GuardFault::Flood(name)) } else { Ok(()) }
    }
}

// Frame types (RFC 9113 §6, RFC 9218 §7.1).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const PRIORITY_UPDATE: u8 = 16;

// Flags.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn connection(frames: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        [preface].into_iter().chain(frames).flatten().collect()
    }

    #[test]
    fn floods_are_ended_and_as_many_as_are_allowed_are_not() {
        let now = Instant::now();
        for (most, one) in [
            (MAX_CONTROL, frame(PING, 0, &[6; 8])),
            (MAX_CONTROL, frame(SETTINGS, 0, &[])),
            (MAX_CONTROL, frame(PRIORITY, 0, &[0; 5])),
            (MAX_CONTROL, frame(CONTINUATION, 0, &[])),
            (MAX_CONTROL, frame(DATA, 0, &[])),
            (MAX_CONTROL, frame(WINDOW_UPDATE, 0, &[0, 0, 0, 1])),
            (MAX_RESETS, frame(RST_STREAM, 0, &[0, 0, 0, 8])),
            (MAX_UNKNOWN, frame(0xfe, 0, &[])),
        ] {
            let flood = |n: u32| connection((0..n).map(|_| one.clone()));
            assert_eq!(FrameGuard::default().judge(&flood(most), now), Ok(()));
            assert!(FrameGuard::default().judge(&flood(most + 1), now).is_err());
        }
        // Payload that looks like control frames is none.
        let data = connection((0..5000).map(|_| frame(DATA, 0, &frame(SETTINGS, 0, &[]))));
        assert_eq!(FrameGuard::default().judge(&data, now), Ok(()));
    }

    #[test]
    fn who_is_sent_much_may_open_the_window_often() {
        let now = Instant::now();
        let mut guard = FrameGuard::default();
        guard.judge(&connection([frame(WINDOW_UPDATE, 0, &[0, 0, 0, 1])]), now).unwrap();
        guard.sent(100_000 * BYTES_PER_UPDATE as usize);
        let updates = frame(WINDOW_UPDATE, 0, &[0, 0, 0, 1]).repeat(100_000);
        assert_eq!(guard.judge(&updates, now), Ok(()));
        assert!(guard.judge(&updates, now).is_err());
    }

    #[test]
    fn a_new_window_starts_at_nought() {
        let now = Instant::now();
        let mut guard = FrameGuard::default();
        let pings = frame(PING, 0, &[0; 8]).repeat(MAX_CONTROL as usize);
        assert!(guard.judge(&connection([pings.clone()]), now).is_ok());
        assert!(guard.judge(&pings, now + WINDOW + Duration::from_millis(1)).is_ok());
        assert!(guard.judge(&frame(PING, 0, &[0; 8]), now + WINDOW * 2).is_err());
    }

    #[test]
    fn it_knows_what_has_not_come_to_its_end() {
        let now = Instant::now();
        let mut guard = FrameGuard::default();
        assert!(guard.is_amid(), "the preface");
        let head = frame(HEADERS, END_STREAM, &[0x82]);
        let wire = connection([frame(SETTINGS, 0, &[]), head]);
        for (at, byte) in wire.iter().enumerate() {
            guard.judge(&[*byte], now).unwrap();
            let settled = [PREFACE_BYTES, PREFACE_BYTES + HEADER_BYTES].contains(&(at + 1));
            assert_eq!(guard.is_amid(), !settled, "{at}");
        }
        guard.judge(&frame(CONTINUATION, END_HEADERS, &[0x87]), now).unwrap();
        assert!(!guard.is_amid());
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
            prop_assert_eq!(pieces.counts, whole.counts);
            prop_assert_eq!((pieces.skip, pieces.have), (whole.skip, whole.have));
        }
    }
}
