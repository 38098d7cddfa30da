//! Close codes and close frames (RFC 6455 §5.5.1 and §7.4).

use sealgate_policy::Denial;

use super::frame::{self, Opcode};

/// Going away: the other end of the tunnel left, or broke its rules.
pub const GOING_AWAY: u16 = 1001;
/// The close frame had no code. Never on the wire.
pub const NO_STATUS: u16 = 1005;
/// The connection ended without a close frame. Never on the wire.
pub const ABNORMAL: u16 = 1006;
/// The fault is not the receiver's.
pub const INTERNAL_ERROR: u16 = 1011;

/// Longest reason beside a code, in bytes: a control frame has 125.
pub const MAX_REASON: usize = frame::MAX_CONTROL_PAYLOAD - 2;

/// Whether a code may stand in a close frame (§7.4, and IANA's registry for 1012 to 1014).
pub fn may_be_sent(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

/// Why the payload of a close frame is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// One byte is half a code (§5.5.1).
    #[error("close frame with half a code")]
    Truncated,
    /// The code is reserved, or must never be on the wire (§7.4).
    #[error("close code {code} may not be sent")]
    Code {
        /// As it was sent.
        code: u16,
    },
    /// The reason is text (§5.5.1).
    #[error("close reason is not UTF-8")]
    NotUtf8,
}

impl From<CloseError> for Denial {
    fn from(error: CloseError) -> Denial {
        match error {
            CloseError::Truncated => Denial::Protocol { detail: "close frame with half a code" },
            CloseError::Code { .. } => Denial::Protocol { detail: "close code that may not be sent" },
            CloseError::NotUtf8 => Denial::NotUtf8,
        }
    }
}

/// Reads the (unmasked) payload of a close frame: its code, or [`NO_STATUS`] when it is empty.
///
/// # Errors
/// Close with the [`Denial`] that it turns into; the peer's code is not to be passed on.
pub fn read(payload: &[u8]) -> Result<u16, CloseError> {
    let Some((code, reason)) = payload.split_first_chunk::<2>() else {
        return if payload.is_empty() { Ok(NO_STATUS) } else { Err(CloseError::Truncated) };
    };
    let code = u16::from_be_bytes(*code);
    if !may_be_sent(code) {
        return Err(CloseError::Code { code });
    }
    match simdutf8::basic::from_utf8(reason) {
        Ok(_) => Ok(code),
        Err(_) => Err(CloseError::NotUtf8),
    }
}

/// Appends a close frame to `out`, masked when there is a key.
///
/// A code that may not be sent gives a frame without one, as §7.4.1 asks for 1005. The reason is cut
/// to [`MAX_REASON`] at a character; write its machine-readable word first.
pub fn write(out: &mut Vec<u8>, mask: Option<[u8; 4]>, code: u16, reason: &str) {
    let mut payload = [0; frame::MAX_CONTROL_PAYLOAD];
    let mut len = 0;
    if may_be_sent(code) {
        let reason = reason.get(..reason.floor_char_boundary(MAX_REASON)).unwrap_or_default();
        for (place, byte) in payload.iter_mut().zip(code.to_be_bytes().iter().chain(reason.as_bytes())) {
            *place = *byte;
            len += 1;
        }
    }
    frame::write_frame(out, Opcode::Close, mask, payload.get(..len).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Sender, read_header, unmask};
    use super::*;

    #[test]
    fn codes_on_the_wire() {
        for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 4401, 4999]
        {
            assert_eq!(read(&u16::to_be_bytes(code)), Ok(code));
        }
        for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535] {
            assert_eq!(read(&u16::to_be_bytes(code)), Err(CloseError::Code { code }));
        }
        assert_eq!(read(&[]), Ok(NO_STATUS));
        assert_eq!(read(&[3]), Err(CloseError::Truncated));
        assert_eq!(read(&[0x03, 0xE8, 0xC3]), Err(CloseError::NotUtf8));
        assert_eq!(read(&[0x03, 0xE8, 0xC3, 0xA4]), Ok(1000));
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let mut wire = Vec::new();
        write(&mut wire, None, 1008, &"ä".repeat(100));
        let header = read_header(Sender::Server, 0, false, &wire).unwrap().unwrap();
        assert_eq!(header.payload_len, 2 + 122);
        assert_eq!(read(&wire[2..]), Ok(1008));
    }

    #[test]
    fn towards_a_server_it_is_masked() {
        let mut wire = Vec::new();
        write(&mut wire, Some([9, 8, 7, 6]), 4401, "token-expired");
        let header = read_header(Sender::Client, 0, false, &wire).unwrap().unwrap();
        let mut payload = wire[header.header_len..].to_vec();
        unmask(&mut payload, header.mask.unwrap(), 0);
        assert_eq!(&payload[2..], b"token-expired");
        assert_eq!(read(&payload), Ok(4401));
    }

    #[test]
    fn a_code_that_may_not_be_sent_is_left_out() {
        let mut wire = Vec::new();
        write(&mut wire, None, NO_STATUS, "never");
        assert_eq!(wire, [0x88, 0]);
    }
}
