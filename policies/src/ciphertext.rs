//! End-to-end encrypted conversations: what claims to be encrypted has to look it.
//!
//! Known without state: the conversation's id bears its kind. The gateway cannot tell good ciphertext from bad; it can
//! see to it that no plaintext takes its place by mistake, by an old client, or by one that was talked into it.

use serde_json::Value;

use crate::denial::Denial;
use crate::json::{self, Schema};

/// Bytes of a payload that are looked at for text. Sixteen random ones are text once in a million times, thirty-two
/// never; formats begin with a version or length byte that is none.
const LOOK: usize = 32;

/// One `[[ciphertext]]`.
#[derive(Debug)]
pub(crate) struct Ciphertext {
    /// Tokens of the pointer to the conversation's id.
    pub(crate) pointer: Vec<String>,
    /// What ids of encrypted conversations begin with.
    pub(crate) prefix: Box<str>,
    /// What ids of conversations begin with that may be readable.
    pub(crate) readable: Vec<Box<str>>,
    /// The structure of an encrypted message.
    pub(crate) envelope: Option<Schema>,
    /// Where nothing may stand. A token `*` is every item of an array.
    pub(crate) plaintext: Vec<Vec<String>>,
    /// Where ciphertext has to stand.
    pub(crate) payload: Vec<Vec<String>>,
    /// Least length of a payload, decoded.
    pub(crate) min_bytes: usize,
}

/// What a message's conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conversation {
    /// Encrypted from end to end, and so is the message.
    Encrypted,
    /// Of a kind that may be readable.
    Readable,
}

impl Ciphertext {
    /// # Errors
    /// [`Denial::PlaintextRefused`], for a conversation of unknown kind too: one that cannot be told must not be taken
    /// for readable. [`Denial::Schema`] if the envelope is not whole, but has no room for plaintext either.
    pub(crate) fn judge(&self, message: &Value) -> Result<Conversation, Denial> {
        let id = json::lookup(message, &self.pointer).and_then(Value::as_str);
        let id = id.ok_or(Denial::PlaintextRefused)?;
        if !id.starts_with(&*self.prefix) {
            let readable = self.readable.iter().any(|prefix| id.starts_with(&**prefix));
            return if readable { Ok(Conversation::Readable) } else { Err(Denial::PlaintextRefused) };
        }
        let sealed = !self.plaintext.iter().any(|tokens| is_anything_at(message, tokens))
            && self
                .payload
                .iter()
                .all(|tokens| all_hold_at(message, tokens, &|value| self.is_ciphertext(value)));
        if !sealed {
            return Err(Denial::PlaintextRefused);
        }
        if let Some(envelope) = &self.envelope {
            // A member that the envelope does not know is where plaintext would travel.
            envelope.check_value(message).map_err(|pointer| match envelope.has_unknown_members(message) {
                true => Denial::PlaintextRefused,
                false => Denial::Schema { pointer },
            })?;
        }
        Ok(Conversation::Encrypted)
    }

    fn is_ciphertext(&self, value: &Value) -> bool {
        let Some(text) = value.as_str() else { return false };
        let mut start = [0; LOOK];
        match decode(text, &mut start) {
            Some(length) if length >= self.min_bytes => {
                !is_text(start.get(..length.min(LOOK)).unwrap_or_default())
            }
            Some(_) | None => false,
        }
    }
}

/// Whether there is anything at `tokens`.
fn is_anything_at(value: &Value, tokens: &[String]) -> bool {
    let Some((token, rest)) = tokens.split_first() else { return true };
    match value {
        Value::Array(items) if token == "*" => items.iter().any(|item| is_anything_at(item, rest)),
        _ => step(value, token).is_some_and(|value| is_anything_at(value, rest)),
    }
}

/// Whether there is something at `tokens`, and all of it holds.
fn all_hold_at(value: &Value, tokens: &[String], holds: &impl Fn(&Value) -> bool) -> bool {
    let Some((token, rest)) = tokens.split_first() else { return holds(value) };
    match value {
        Value::Array(items) if token == "*" => {
            !items.is_empty() && items.iter().all(|item| all_hold_at(item, rest, holds))
        }
        _ => step(value, token).is_some_and(|value| all_hold_at(value, rest, holds)),
    }
}

fn step<'v>(value: &'v Value, token: &String) -> Option<&'v Value> {
    json::lookup(value, std::slice::from_ref(token))
}

/// How many bytes this is as base64 (RFC 4648 §4 or §5, padded or not), the first of them in `start`; `None` if it is
/// no base64.
fn decode(text: &str, start: &mut [u8; LOOK]) -> Option<usize> {
    let unpadded = text.trim_end_matches('=');
    let padding = text.len() - unpadded.len();
    if padding > 2 || (padding > 0 && !text.len().is_multiple_of(4)) || unpadded.len() % 4 == 1 {
        return None;
    }
    let url_safe = unpadded.bytes().any(|byte| matches!(byte, b'-' | b'_'));
    let (mut bits, mut count) = (0_u32, 0);
    let mut room = start.iter_mut();
    for byte in unpadded.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' if !url_safe => 62,
            b'/' if !url_safe => 63,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            if let Some(room) = room.next() {
                *room = (bits >> count & 0xff) as u8;
            }
        }
    }
    // Bits that carry nothing must say nothing (RFC 4648 §3.5): one spelling for one ciphertext.
    (bits & ((1 << count) - 1) == 0).then_some(unpadded.len() * 3 / 4)
}

/// Whether bytes can be read: UTF-8 (that may be cut off at the end) of visible characters and white space.
fn is_text(bytes: &[u8]) -> bool {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            let whole = bytes.get(..error.valid_up_to()).unwrap_or_default();
            std::str::from_utf8(whole).unwrap_or_default()
        }
        Err(_) => return false,
    };
    text.chars().all(|c| !c.is_control() || c.is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn tokens(pointers: &[&str]) -> Vec<Vec<String>> {
        pointers.iter().map(|pointer| json::pointer_tokens(pointer).unwrap()).collect()
    }

    fn rule() -> Ciphertext {
        Ciphertext {
            pointer: vec!["to".into(), "conversation".into()],
            prefix: "e2e:".into(),
            readable: vec!["managed:".into()],
            envelope: None,
            plaintext: tokens(&["/text", "/parts/*/text"]),
            payload: tokens(&["/parts/*/sealed"]),
            min_bytes: 16,
        }
    }

    /// 24 bytes as an Olm message has them at its beginning.
    const SEALED: &str = "AwogQUJDREVGR0hJSktMTU5PUFFSU1RV";

    fn message(conversation: Value, parts: Value) -> Value {
        json!({ "to": { "conversation": conversation }, "parts": parts })
    }

    #[test]
    fn what_looks_encrypted_passes() {
        let rule = rule();
        for sealed in
            [SEALED, "AAAAAAAAAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAAAAAAAAA==", "-_8AAAAAAAAAAAAAAAAAAAAA"]
        {
            let parts = json!([{ "sealed": SEALED }, { "sealed": sealed }]);
            assert_eq!(rule.judge(&message(json!("e2e:a"), parts)), Ok(Conversation::Encrypted), "{sealed}");
        }
    }

    #[test]
    fn what_does_not_is_refused() {
        let rule = rule();
        let refused = |parts: Value| {
            let judged = rule.judge(&message(json!("e2e:a"), parts.clone()));
            assert_eq!(judged, Err(Denial::PlaintextRefused), "{parts}");
        };
        refused(json!([]));
        refused(json!([{}]));
        refused(json!([{ "sealed": SEALED }, { "sealed": "hello, Bob, how are you today?" }]));
        refused(json!([{ "sealed": SEALED, "text": null }]));
        refused(json!([{ "sealed": { "ciphertext": SEALED } }]));
        refused(json!({ "sealed": SEALED }));
        refused(Value::Null);
        // Too short; text in base64; bytes that are no base64; padding where none belongs; bits left over.
        for sealed in
            ["AwoQ", "aGVsbG8sIEJvYiwgaG93IGFyZSB5b3UgdG9kYXk/", "Z3LDvMOfZSBhbiBhbGxlLCBsaWViZSBMZXV0ZSE="]
        {
            refused(json!([{ "sealed": sealed }]));
        }
        for sealed in [
            format!("{SEALED}="),
            format!("{SEALED} "),
            format!("{SEALED}A"),
            format!("{SEALED}AB"),
            format!("{SEALED}+_AA"),
        ] {
            refused(json!([{ "sealed": sealed }]));
        }
        let mut beside = message(json!("e2e:a"), json!([{ "sealed": SEALED }]));
        assert!(rule.judge(&beside).is_ok());
        beside["text"] = json!("hello");
        assert_eq!(rule.judge(&beside), Err(Denial::PlaintextRefused));
    }

    #[test]
    fn a_conversation_is_never_taken_for_readable_by_mistake() {
        let rule = rule();
        let parts = json!([{ "text": "hello" }]);
        assert_eq!(rule.judge(&message(json!("managed:a"), parts.clone())), Ok(Conversation::Readable));
        for id in [
            json!("E2E:a"),
            json!(" e2e:a"),
            json!("e2e"),
            json!(""),
            json!("other:a"),
            json!(7),
            json!(null),
        ] {
            assert!(rule.judge(&message(id.clone(), parts.clone())).is_err(), "{id}");
        }
        for id in [json!(["e2e:a"]), json!({ "e2e:": "a" })] {
            assert!(rule.judge(&message(id, parts.clone())).is_err());
        }
        assert!(rule.judge(&json!({ "parts": parts })).is_err(), "no id at all");
        assert!(rule.judge(&json!("managed:a")).is_err());
    }

    /// The plainest encoder there is.
    fn encode(bytes: &[u8]) -> String {
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let bit = |at: usize| bytes.get(at / 8).map_or(0, |byte| byte >> (7 - at % 8) & 1);
        let sextet = |at| (0..6).fold(0, |value, bit_at| value << 1 | bit(at + bit_at));
        (0..bytes.len() * 8).step_by(6).map(|at| char::from(alphabet[usize::from(sextet(at))])).collect()
    }

    proptest! {
        #[test]
        fn base64_is_read_as_it_was_written(bytes in prop::collection::vec(any::<u8>(), 0..100), pad: bool) {
            let mut text = encode(&bytes);
            while pad && !text.len().is_multiple_of(4) {
                text.push('=');
            }
            let mut start = [0; LOOK];
            prop_assert_eq!(decode(&text, &mut start), Some(bytes.len()));
            let look = bytes.len().min(LOOK);
            prop_assert_eq!(&start[..look], &bytes[..look]);
        }

        #[test]
        fn text_is_never_ciphertext(text in "[a-zA-Z0-9 äß,.!?\n🦀]{16,80}") {
            let parts = json!([{ "sealed": encode(text.as_bytes()) }]);
            prop_assert!(rule().judge(&message(json!("e2e:a"), parts)).is_err());
            let parts = json!([{ "sealed": text }]);
            let bare = rule().judge(&message(json!("e2e:a"), parts));
            // A text of letters and digits alone may be base64 of something; one with blanks never is.
            prop_assert!(bare.is_err() || !text.contains([' ', ',', '.', 'ä', '🦀']));
        }

        #[test]
        fn anything_can_be_judged(text in ".{0,60}") {
            let parts = json!([{ "sealed": text }]);
            let _ = rule().judge(&message(json!("e2e:a"), parts));
            let _ = rule().judge(&message(json!(text), json!(text)));
        }
    }
}
