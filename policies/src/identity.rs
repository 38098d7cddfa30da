//! Who a verified token speaks for, and the headers that tell the upstream.

use std::fmt;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use ring::digest;

use crate::denial::Denial;

/// Prefix of every header that carries verified identity. Strip it, whole, from what clients send.
pub const IDENTITY_HEADER_PREFIX: &str = "x-sealgate-";

/// Headers that [`Identity::new`] builds.
pub const IDENTITY_HEADERS: [HeaderName; 6] = [SUBJECT, SESSION, ROLES, ISSUER, DEPARTMENT, TOKEN_ID];

const SUBJECT: HeaderName = HeaderName::from_static("x-sealgate-subject");
const SESSION: HeaderName = HeaderName::from_static("x-sealgate-session");
const ROLES: HeaderName = HeaderName::from_static("x-sealgate-roles");
const ISSUER: HeaderName = HeaderName::from_static("x-sealgate-issuer");
const DEPARTMENT: HeaderName = HeaderName::from_static("x-sealgate-department");
const TOKEN_ID: HeaderName = HeaderName::from_static("x-sealgate-token-id");

/// A verified identity. Only what verifies a token should make one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `iss`.
    pub issuer: Arc<str>,
    /// `sub`, or the claim that the issuer maps to it.
    pub subject: String,
    /// Session id (`sid`).
    pub session: Option<String>,
    /// `jti`.
    pub token_id: Option<String>,
    /// `kid` of the issuer's key that verified the token, if the key has one.
    pub key_id: Option<Arc<str>>,
    /// Roles, in the token's order.
    pub roles: Vec<String>,
    /// Department.
    pub department: Option<String>,
    /// Device, by the issuer's word.
    pub device: Option<String>,
    /// Authentication context class (RFC 9470).
    pub acr: Option<String>,
    /// Authentication methods.
    pub amr: Vec<String>,
    /// When the user last proved who he is, unix seconds.
    pub auth_time: Option<u64>,
    /// `iat`, unix seconds.
    pub issued_at: Option<u64>,
    /// `exp`, unix seconds.
    pub expires_at: u64,
    /// What its sender must prove to hold (`cnf`).
    pub binding: Binding,
    /// Names the session over all gateways.
    pub session_id: SessionId,
    /// `X-Sealgate-*`, built once, so that forwarding only clones (a `HeaderValue` is reference-counted).
    pub upstream_headers: Vec<(HeaderName, HeaderValue)>,
}

/// What an [`Identity`] is made of: claims of a verified token. Fields mean what they mean there.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "see the fields of `Identity`")]
pub struct IdentityParts {
    pub issuer: Arc<str>,
    pub subject: String,
    pub session: Option<String>,
    pub token_id: Option<String>,
    pub key_id: Option<Arc<str>>,
    pub roles: Vec<String>,
    pub department: Option<String>,
    pub device: Option<String>,
    pub acr: Option<String>,
    pub amr: Vec<String>,
    pub auth_time: Option<u64>,
    pub issued_at: Option<u64>,
    pub expires_at: u64,
    pub binding: Binding,
}

/// What a token is bound to, or what a sender has proved to hold: SHA-256 thumbprints. Empty: a bearer token, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Binding {
    /// Of a key, `jkt` (RFC 9449 §6.1, RFC 7638).
    pub key: Option<[u8; 32]>,
    /// Of a client certificate, `x5t#S256` (RFC 8705 §3.1).
    pub certificate: Option<[u8; 32]>,
}

/// Names a session: the same for all its tokens on all gateways, and no other session's. 128 bits of a SHA-256 of `iss` and
/// `sid`; without `sid`, of `iss`, `sub` and `auth_time`, which is a login; without either, of one token.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u128);

impl SessionId {
    fn of(parts: &IdentityParts) -> Self {
        let IdentityParts { issuer, subject, session, token_id, auth_time, issued_at, .. } = parts;
        match (session, auth_time) {
            (Some(session), _) => Self::digest(&[b"sid", issuer.as_bytes(), session.as_bytes()]),
            (None, Some(login)) => {
                Self::digest(&[b"login", issuer.as_bytes(), subject.as_bytes(), &login.to_be_bytes()])
            }
            (None, None) => Self::digest(&[
                b"token",
                issuer.as_bytes(),
                subject.as_bytes(),
                token_id.as_deref().unwrap_or_default().as_bytes(),
                &issued_at.unwrap_or(0).to_be_bytes(),
            ]),
        }
    }

    /// Names a subject in the same way.
    pub fn of_subject(issuer: &str, subject: &str) -> Self {
        Self::digest(&[b"subject", issuer.as_bytes(), subject.as_bytes()])
    }

    /// Each part with its length before it, so that no two lists look alike.
    fn digest(parts: &[&[u8]]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
            context.update(part);
        }
        Self(context.finish().as_ref().iter().take(16).fold(0, |id, byte| id << 8 | u128::from(*byte)))
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

impl Identity {
    /// Takes the claims of a verified token and builds the headers for the upstream.
    ///
    /// Bytes that are not visible ASCII are percent-encoded (UTF-8), `%` and, in a role, `,` too, so that the
    /// upstream can always decode and nobody can smuggle a role or a line end in a claim.
    pub fn new(parts: IdentityParts) -> Self {
        let IdentityParts { issuer, subject, session, token_id, roles, department, .. } = &parts;
        let single = [
            (SUBJECT, Some(subject.as_str())),
            (SESSION, session.as_deref()),
            (ISSUER, Some(issuer.as_ref())),
            (DEPARTMENT, department.as_deref()),
            (TOKEN_ID, token_id.as_deref()),
        ];
        let mut upstream_headers: Vec<_> = single
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .filter_map(|(name, value)| Some((name, header_value(&encoded(value))?)))
            .collect();
        if !roles.is_empty() {
            let joined = roles.iter().map(|role| encoded(role)).collect::<Vec<_>>().join(",");
            upstream_headers.extend(header_value(&joined).map(|value| (ROLES, value)));
        }
        Self {
            session_id: SessionId::of(&parts),
            issuer: parts.issuer,
            subject: parts.subject,
            session: parts.session,
            token_id: parts.token_id,
            key_id: parts.key_id,
            roles: parts.roles,
            department: parts.department,
            device: parts.device,
            acr: parts.acr,
            amr: parts.amr,
            auth_time: parts.auth_time,
            issued_at: parts.issued_at,
            expires_at: parts.expires_at,
            binding: parts.binding,
            upstream_headers,
        }
    }

    /// When the session began, unix seconds: `auth_time`, or `iat` where the token has none; `None` if it has neither.
    pub fn began(&self) -> Option<u64> {
        self.auth_time.or(self.issued_at)
    }

    /// Whether the token tells of a session or a login that other tokens may belong to as well.
    pub fn names_session(&self) -> bool {
        self.session.is_some() || self.auth_time.is_some()
    }

    /// Whether `new`, the identity of a later token, may take this one's place in an open socket.
    ///
    /// # Errors
    /// [`Denial::RenewalMismatch`] for another issuer, subject, session or key; [`Denial::RightsChanged`] for what the upstream
    /// was told when the socket was opened and now is different: a new socket has to tell it.
    pub fn renewed_by(&self, new: &Identity) -> Result<(), Denial> {
        // Without `..`: a new field has to be thought of here.
        let Identity {
            issuer,
            subject,
            session,
            roles,
            department,
            device,
            acr,
            binding,
            amr: _,
            token_id: _,
            key_id: _,
            auth_time: _,
            issued_at: _,
            expires_at: _,
            session_id: _,
            upstream_headers: _,
        } = self;
        let same_session = (issuer, subject, session) == (&new.issuer, &new.subject, &new.session);
        // Rates of the socket count by it.
        let same_session = same_session && *device == new.device;
        if !same_session || *binding != new.binding {
            return Err(Denial::RenewalMismatch);
        }
        // The order of roles means nothing.
        let all_in = |these: &[String], those: &[String]| these.iter().all(|role| those.contains(role));
        let same_roles = all_in(roles, &new.roles) && all_in(&new.roles, roles);
        if !same_roles || (department, acr) != (&new.department, &new.acr) {
            return Err(Denial::RightsChanged);
        }
        Ok(())
    }
}

/// INVARIANT: `encoded` leaves only visible ASCII, so the conversion cannot fail.
fn header_value(encoded: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(encoded).ok()
}

fn encoded(value: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |nibble: u8| HEX.get(usize::from(nibble)).map_or('0', |&digit| char::from(digit));
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_graphic() && byte != b'%' && byte != b',' {
            out.push(char::from(byte));
        } else {
            out.extend(['%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_renewed_by_one_of_the_same_session_and_rights_only() {
        let parts = || IdentityParts {
            issuer: "https://id.example".into(),
            subject: "alice".into(),
            session: Some("s1".into()),
            token_id: Some("t1".into()),
            roles: vec!["user".into(), "clerk".into()],
            department: Some("sales".into()),
            acr: Some("mfa".into()),
            auth_time: Some(1),
            expires_at: 100,
            ..IdentityParts::default()
        };
        let old = Identity::new(parts());
        let judged = |change: fn(&mut IdentityParts)| {
            let mut new = parts();
            change(&mut new);
            old.renewed_by(&Identity::new(new))
        };
        let later: fn(&mut IdentityParts) = |new| {
            new.token_id = None;
            new.roles.reverse();
            (new.auth_time, new.issued_at, new.expires_at) = (Some(50), Some(60), 200);
        };
        assert_eq!(judged(later), Ok(()));
        let mismatches: [fn(&mut IdentityParts); 6] = [
            |new| new.device = Some("another".into()),
            |new| new.binding = Binding { key: Some([7; 32]), certificate: None },
            |new| new.issuer = "https://other.example".into(),
            |new| new.subject = "mallory".into(),
            |new| new.session = Some("s2".into()),
            |new| new.session = None,
        ];
        for change in mismatches {
            assert_eq!(judged(change), Err(Denial::RenewalMismatch));
        }
        let changes: [fn(&mut IdentityParts); 5] = [
            |new| new.roles.push("administrator".into()),
            |new| new.roles.truncate(1),
            |new| new.department = None,
            |new| new.acr = Some("pwd".into()),
            |new| new.acr = None,
        ];
        for change in changes {
            assert_eq!(judged(change), Err(Denial::RightsChanged));
        }
    }

    #[test]
    fn a_session_has_one_name_whatever_its_tokens_and_no_other_has_it() {
        let parts = || IdentityParts {
            issuer: "https://id.example".into(),
            subject: "alice".into(),
            session: Some("s1".into()),
            token_id: Some("t1".into()),
            auth_time: Some(1),
            issued_at: Some(2),
            ..IdentityParts::default()
        };
        let named = |change: fn(&mut IdentityParts)| {
            let mut parts = parts();
            change(&mut parts);
            Identity::new(parts).session_id
        };
        let renewed: fn(&mut IdentityParts) = |it| {
            (it.token_id, it.auth_time, it.issued_at) = (Some("t2".into()), Some(50), Some(60));
            it.roles = vec!["user".into()];
        };
        assert_eq!(named(|_| {}), named(renewed));
        let login = named(|it| it.session = None);
        assert_eq!(login, named(|it| (it.session, it.token_id, it.issued_at) = (None, None, Some(9))));
        let all = [
            named(|_| {}),
            login,
            named(|it| it.session = Some("s2".into())),
            named(|it| it.issuer = "https://other.example".into()),
            named(|it| (it.session, it.auth_time) = (None, Some(2))),
            named(|it| (it.session, it.subject) = (None, "bob".into())),
            named(|it| (it.session, it.auth_time) = (None, None)),
            named(|it| (it.session, it.auth_time, it.token_id) = (None, None, Some("t2".into()))),
            named(|it| (it.session, it.auth_time, it.issued_at) = (None, None, Some(3))),
            // Borders between parts are no part of them.
            named(|it| (it.issuer, it.session) = ("https://id.examples".into(), Some("1".into()))),
            SessionId::of_subject("https://id.example", "alice"),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(all.iter().skip(index + 1).all(|other| other != one), "{index}");
        }
    }

    #[test]
    fn headers_carry_the_identity_and_cannot_be_broken_out_of() {
        let identity = Identity::new(IdentityParts {
            issuer: "https://id.example".into(),
            subject: "Zoë\r\nX-Evil: 1".into(),
            roles: vec!["user".into(), "a,admin".into()],
            department: Some("50%".into()),
            ..IdentityParts::default()
        });
        let header = |name: &HeaderName| {
            identity.upstream_headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.to_str().unwrap())
        };
        assert_eq!(header(&SUBJECT), Some("Zo%C3%AB%0D%0AX-Evil:%201"));
        assert_eq!(header(&ROLES), Some("user,a%2Cadmin"));
        assert_eq!(header(&DEPARTMENT), Some("50%25"));
        assert_eq!(header(&ISSUER), Some("https://id.example"));
        assert_eq!(header(&SESSION), None);
        assert!(IDENTITY_HEADERS.iter().all(|name| name.as_str().starts_with(IDENTITY_HEADER_PREFIX)));
    }
}
