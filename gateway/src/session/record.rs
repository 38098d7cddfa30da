//! A revocation as text: in Redis, in the journal on disk, and in the events of a source.

use serde::{Deserialize, Serialize};

use super::revocation::{OwnedTarget, Revocation, Target};

/// Longest record that is read: an issuer and an id as long as tokens may have them.
pub(crate) const MAX_RECORD_BYTES: usize = 8192;

/// Longest time from now that a record may hold, in seconds: the longest life of a session.
pub(crate) const MAX_TTL: u64 = 400 * 86_400;

/// A revocation that owns its words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedRevocation {
    /// See [`Revocation::target`].
    pub target: OwnedTarget,
    /// See [`Revocation::issued_before`].
    pub issued_before: u64,
    /// See [`Revocation::until`].
    pub until: u64,
}

impl OwnedRevocation {
    /// The same, borrowed.
    pub fn borrowed(&self) -> Revocation<'_> {
        Revocation { target: self.target.borrowed(), issued_before: self.issued_before, until: self.until }
    }
}

/// The fields of a record.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record<T> {
    kind: Kind,
    issuer: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<T>,
    /// None: all that are and will be issued.
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<u64>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Token,
    Session,
    Subject,
    Issuer,
    Key,
}

/// The text of a revocation without its end. Equal revocations have equal texts.
pub fn encode(revocation: &Revocation<'_>) -> String {
    let (kind, issuer, id) = match revocation.target {
        Target::Token { issuer, token_id } => (Kind::Token, issuer, Some(token_id)),
        Target::Session { issuer, session } => (Kind::Session, issuer, Some(session)),
        Target::Subject { issuer, subject } => (Kind::Subject, issuer, Some(subject)),
        Target::Issuer { issuer } => (Kind::Issuer, issuer, None),
        Target::Key { issuer, key_id } => (Kind::Key, issuer, Some(key_id)),
    };
    let before = Some(revocation.issued_before).filter(|before| *before != u64::MAX);
    // INVARIANT: strings and numbers under names that are strings always serialize.
    serde_json::to_string(&Record { kind, issuer, id, before }).unwrap_or_default()
}

/// Reads a record that holds until `until`; `None` for what nobody of ours wrote.
pub fn decode(record: &[u8], until: u64, now: u64) -> Option<OwnedRevocation> {
    if record.len() > MAX_RECORD_BYTES {
        return None;
    }
    let record = serde_json::from_slice::<Record<String>>(record).ok()?;
    record.revocation(until.min(now.saturating_add(MAX_TTL)))
}

impl Record<String> {
    /// What it means, until `until`; `None` for what nobody of ours wrote.
    pub(crate) fn revocation(self, until: u64) -> Option<OwnedRevocation> {
        let Record { kind, issuer, id, before } = self;
        let target = match (kind, id) {
            (Kind::Token, Some(token_id)) => OwnedTarget::Token { issuer, token_id },
            (Kind::Session, Some(session)) => OwnedTarget::Session { issuer, session },
            (Kind::Subject, Some(subject)) => OwnedTarget::Subject { issuer, subject },
            (Kind::Issuer, None) => OwnedTarget::Issuer { issuer },
            (Kind::Key, Some(key_id)) => OwnedTarget::Key { issuer, key_id },
            _ => return None,
        };
        Some(OwnedRevocation { target, issued_before: before.unwrap_or(u64::MAX), until })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn a_record_that_nobody_of_ours_wrote_is_refused() {
        let good = r#"{"kind":"session","issuer":"i","id":"s"}"#;
        let read = decode(good.as_bytes(), u64::MAX, NOW).unwrap();
        assert_eq!(read.until, NOW + MAX_TTL);
        assert_eq!(encode(&read.borrowed()), good);
        for bad in [
            "",
            "{}",
            r#"{"kind":"session","issuer":"i"}"#,
            r#"{"kind":"issuer","issuer":"i","id":"s"}"#,
            r#"{"kind":"other","issuer":"i","id":"s"}"#,
            r#"{"kind":"session","issuer":"i","id":"s","more":1}"#,
            r#"{"kind":"session","issuer":"i","id":"s","before":-1}"#,
        ] {
            assert_eq!(decode(bad.as_bytes(), NOW, NOW), None, "{bad}");
        }
        let long = format!(r#"{{"kind":"session","issuer":"i","id":"{}"}}"#, "s".repeat(MAX_RECORD_BYTES));
        assert_eq!(decode(long.as_bytes(), NOW, NOW), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(kind in 0u8..5, issuer in ".{0,50}", id in ".{0,50}", before in any::<u64>(), until in 0..NOW) {
            let target = match kind {
                0 => Target::Token { issuer: &issuer, token_id: &id },
                1 => Target::Session { issuer: &issuer, session: &id },
                2 => Target::Subject { issuer: &issuer, subject: &id },
                3 => Target::Key { issuer: &issuer, key_id: &id },
                _ => Target::Issuer { issuer: &issuer },
            };
            let revocation = Revocation { target, issued_before: before, until };
            let read = decode(encode(&revocation).as_bytes(), until, NOW).unwrap();
            prop_assert_eq!(read.borrowed(), revocation);
        }
    }
}
