//! Uses of rules and messages that are recorded whatever `[audit]` says, and why they are made (rows P-3, D-1).

use std::sync::Arc;

use http::{HeaderMap, HeaderName};

use crate::authz::{Found, ResourceRule};
use crate::denial::Denial;

/// Most of a path that is recorded, in bytes.
pub(crate) const MAX_PATH: usize = 512;

/// Longest reason, in bytes.
pub(crate) const MAX_REASON: usize = 512;

/// One use of what is watched, for its record. Path, resource and reason are the peer's own text: bounded, but a resource may hold any
/// character, so whoever writes it down escapes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// What it does, by the policy's word.
    pub action: Option<Arc<str>>,
    /// Type of the message; `None` for a request.
    pub message: Option<Arc<str>>,
    /// Path of a request, in the form that was judged: 512 bytes at most, percent-encoded.
    pub path: Option<String>,
    /// What it is about; `None` where the rule names nothing, or it was not found.
    pub resource: Option<Resource>,
    /// Why, as the peer says; `None` where the rule does not ask, or he did not say.
    pub reason: Option<String>,
}

/// What an access is about. Each of its values has 256 bytes at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Entity type, by the policy's word.
    pub kind: String,
    /// Which one.
    pub id: String,
    /// Whose department's it is, where the rule says.
    pub department: Option<String>,
    /// Whose it is, where the rule says.
    pub owner: Option<String>,
}

impl Resource {
    pub(crate) fn of(rule: &ResourceRule, found: &Found<'_>) -> Self {
        let text = |text: &Option<std::borrow::Cow<'_, str>>| text.as_ref().map(ToString::to_string);
        Self {
            kind: rule.kind.to_string(),
            id: found.id.to_string(),
            department: text(&found.department),
            owner: text(&found.owner),
        }
    }
}

/// That uses are recorded, and where they must say why.
#[derive(Debug, Clone)]
pub(crate) struct AuditRule<P> {
    pub(crate) reason: Option<Reason<P>>,
}

/// Where a reason stands.
#[derive(Debug, Clone)]
pub(crate) struct Reason<P> {
    pub(crate) place: P,
    /// As the policy writes it.
    pub(crate) text: Arc<str>,
}

impl<P> AuditRule<P> {
    /// # Errors
    /// [`Denial::ReasonMissing`], if one is wanted and `given` is none.
    pub(crate) fn check(&self, given: Option<&str>) -> Result<(), Denial> {
        match (&self.reason, given) {
            (Some(reason), None) => Err(Denial::ReasonMissing { place: Arc::clone(&reason.text) }),
            _ => Ok(()),
        }
    }
}

impl AuditRule<HeaderName> {
    /// The reason that a request gives, if it is one.
    pub(crate) fn reason<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        let mut values = headers.get_all(&self.reason.as_ref()?.place).iter();
        let value = values.next()?;
        // Of two nobody knows which one is meant.
        if values.next().is_some() {
            return None;
        }
        reason(str::from_utf8(value.as_bytes()).ok()?)
    }
}

/// A text that can be a reason: something beside blanks, 512 bytes at most, no control characters.
pub(crate) fn reason(text: &str) -> Option<&str> {
    let text = text.trim();
    let fits = !text.is_empty() && text.len() <= MAX_REASON && !text.chars().any(char::is_control);
    fits.then_some(text)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_reason_is_one_short_text() {
        let rule = AuditRule {
            reason: Some(Reason {
                place: HeaderName::from_static("x-access-reason"),
                text: "X-Access-Reason".into(),
            }),
        };
        let given = |values: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("x-access-reason", HeaderValue::from_bytes(value).unwrap());
            }
            rule.reason(&headers).map(str::to_owned)
        };
        let longest = "x".repeat(MAX_REASON);
        for (value, found) in [
            ("case 4711", Some("case 4711")),
            ("  Beschwerde über Zimmer 3 ", Some("Beschwerde über Zimmer 3")),
            ("病历核查", Some("病历核查")),
            ("\"; DROP TABLE", Some("\"; DROP TABLE")),
            (&longest, Some(longest.as_str())),
            ("", None),
            (" \t ", None),
            ("a\tb", None),
            ("a\u{85}b", None),
        ] {
            assert_eq!(given(&[value.as_bytes()]).as_deref(), found, "{value}");
        }
        assert_eq!(given(&[]), None);
        assert_eq!(given(&[format!("{longest}x").as_bytes()]), None);
        assert_eq!(given(&[b"one", b"two"]), None);
        assert_eq!(given(&[b"\xff\xfe"]), None);
        assert!(
            matches!(rule.check(None), Err(Denial::ReasonMissing { place }) if &*place == "X-Access-Reason")
        );
        assert_eq!(rule.check(Some("x")), Ok(()));
        assert_eq!(AuditRule::<HeaderName> { reason: None }.check(None), Ok(()));
    }
}
