//! Where a request may carry its token, and how many.

use std::fmt;

use http::header::{AUTHORIZATION, HeaderMap, SEC_WEBSOCKET_PROTOCOL};
use sealgate_policy::TokenFault;

/// What an entry of `Sec-WebSocket-Protocol` begins with when it carries a token: the way for browsers, which cannot
/// set headers on a WebSocket. Never echoed, never forwarded.
pub const SUBPROTOCOL_PREFIX: &str = "sealgate.bearer.";

/// A token as it came; nothing about it is known yet. Does not print.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token<'a> {
    text: &'a str,
    scheme: Scheme,
}

/// What a sender says of his token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Whoever bears it may use it.
    Bearer,
    /// It is bound to a key, and a proof comes with it (RFC 9449 §7.1).
    Dpop,
}

impl<'a> Token<'a> {
    /// The token itself. Must reach no log, label or header.
    pub fn as_str(&self) -> &'a str {
        self.text
    }

    /// How it was sent.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }
}

impl fmt::Debug for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Finds the request's token: in `Authorization: Bearer` (RFC 6750 §2.1) or `Authorization: DPoP` (RFC 9449 §7.1), or, for a WebSocket, in one entry of
/// `Sec-WebSocket-Protocol`. Never in the URL (RFC 6750 §2.3 explains why), never in a body or cookie.
///
/// `None` where there is none; another authorization scheme is none.
///
/// # Errors
/// [`TokenFault::Twice`] for two `Authorization` fields, two entries, or both places: two parties that read the same
/// request must not come to two identities. [`TokenFault::Malformed`] for a scheme without a token, or bytes that no
/// token has.
pub fn bearer(headers: &HeaderMap, websocket: bool) -> Result<Option<Token<'_>>, TokenFault> {
    let authorization = authorization(headers)?;
    let subprotocol = if websocket { subprotocol(headers, SUBPROTOCOL_PREFIX)? } else { None };
    match (authorization, subprotocol) {
        (Some(_), Some(_)) => Err(TokenFault::Twice),
        (Some((scheme, token)), None) => checked(token, scheme).map(Some),
        (None, Some(token)) => checked(token, Scheme::Bearer).map(Some),
        (None, None) => Ok(None),
    }
}

fn authorization(headers: &HeaderMap) -> Result<Option<(Scheme, &str)>, TokenFault> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let Some(field) = fields.next() else {
        return Ok(None);
    };
    if fields.next().is_some() {
        return Err(TokenFault::Twice);
    }
    let field = field.to_str().map_err(|_| TokenFault::Malformed)?;
    let (scheme, rest) = field.split_once(' ').unwrap_or((field, ""));
    let scheme = match scheme {
        name if name.eq_ignore_ascii_case("bearer") => Scheme::Bearer,
        name if name.eq_ignore_ascii_case("dpop") => Scheme::Dpop,
        _ => return Ok(None),
    };
    // RFC 9110 §11.4: one or more blanks after the scheme.
    Ok(Some((scheme, rest.trim_matches(' '))))
}

/// What stands behind `prefix` in the one entry of `Sec-WebSocket-Protocol` that begins with it.
pub(super) fn subprotocol<'a>(headers: &'a HeaderMap, prefix: &str) -> Result<Option<&'a str>, TokenFault> {
    let mut found = None;
    for field in headers.get_all(SEC_WEBSOCKET_PROTOCOL) {
        let field = field.to_str().map_err(|_| TokenFault::Malformed)?;
        let entries = field.split(',').map(|entry| entry.trim_matches([' ', '\t']));
        for credential in entries.filter_map(|entry| entry.strip_prefix(prefix)) {
            if found.replace(credential).is_some() {
                return Err(TokenFault::Twice);
            }
        }
    }
    Ok(found)
}

/// What a compact JWS is made of: base64url and dots. Padding, a second token after a comma, a quoted one: none of it.
fn checked(text: &str, scheme: Scheme) -> Result<Token<'_>, TokenFault> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() | matches!(byte, b'-' | b'_' | b'.');
    // To the end and without a branch, so that many bytes are looked at in one step.
    if text.is_empty() || !text.bytes().fold(true, |fine, byte| fine & allowed(byte)) {
        return Err(TokenFault::Malformed);
    }
    Ok(Token { text, scheme })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;
    use proptest::prelude::*;

    fn found(fields: &[(&str, &str)], websocket: bool) -> Result<Option<String>, TokenFault> {
        let fields = fields.iter().map(|(name, value)| {
            (name.parse::<HeaderName>().unwrap(), http::HeaderValue::from_bytes(value.as_bytes()).unwrap())
        });
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name, value);
        }
        bearer(&headers, websocket).map(|token| token.map(|token| token.as_str().to_owned()))
    }

    #[test]
    fn finds_the_token_in_either_place() {
        let token = || Ok(Some("a.b.c".to_owned()));
        assert_eq!(found(&[("authorization", "Bearer a.b.c")], false), token());
        assert_eq!(found(&[("authorization", "bEARER   a.b.c")], true), token());
        assert_eq!(found(&[("sec-websocket-protocol", "im.v1.json, sealgate.bearer.a.b.c")], true), token());
        let split =
            [("sec-websocket-protocol", "im.v1.json"), ("sec-websocket-protocol", "sealgate.bearer.a.b.c")];
        assert_eq!(found(&split, true), token());
    }

    #[test]
    fn the_scheme_is_told() {
        let mut headers = HeaderMap::new();
        for (field, scheme) in
            [("DPoP a.b.c", Scheme::Dpop), ("dpop a.b.c", Scheme::Dpop), ("Bearer a.b.c", Scheme::Bearer)]
        {
            headers.insert(AUTHORIZATION, http::HeaderValue::from_static(field));
            assert_eq!(bearer(&headers, true).unwrap().map(|token| token.scheme()), Some(scheme), "{field}");
        }
    }

    #[test]
    fn finds_none_where_none_may_stand() {
        assert_eq!(found(&[], true), Ok(None));
        assert_eq!(found(&[("authorization", "Basic a.b.c")], false), Ok(None));
        assert_eq!(found(&[("cookie", "token=a.b.c"), ("x-access-token", "a.b.c")], false), Ok(None));
        assert_eq!(found(&[("sec-websocket-protocol", "sealgate.bearer.a.b.c")], false), Ok(None));
        assert_eq!(found(&[("sec-websocket-protocol", "Sealgate.Bearer.a.b.c")], true), Ok(None));
    }

    #[test]
    fn two_tokens_are_refused_even_when_equal() {
        let one = ("authorization", "Bearer a.b.c");
        let other = ("sec-websocket-protocol", "sealgate.bearer.a.b.c");
        for fields in [&[one, one][..], &[one, other], &[other, other], &[one, ("authorization", "Basic eA")]]
        {
            assert_eq!(found(fields, true), Err(TokenFault::Twice), "{fields:?}");
        }
        let list = "sealgate.bearer.a.b.c,sealgate.bearer.a.b.c";
        assert_eq!(found(&[("sec-websocket-protocol", list)], true), Err(TokenFault::Twice));
    }

    #[test]
    fn what_no_token_has_is_malformed() {
        for value in [
            "Bearer",
            "Bearer ",
            "Bearer a.b.c, Bearer d.e.f",
            "Bearer a.b.c=",
            "Bearer \"a.b.c\"",
            "Bearer a b",
            "Bearer \u{e9}",
        ] {
            assert_eq!(found(&[("authorization", value)], false), Err(TokenFault::Malformed), "{value}");
        }
        for value in ["sealgate.bearer.", "sealgate.bearer.a=b", "sealgate.bearer.a b"] {
            assert_eq!(
                found(&[("sec-websocket-protocol", value)], true),
                Err(TokenFault::Malformed),
                "{value}"
            );
        }
    }

    #[test]
    fn does_not_print() {
        assert_eq!(format!("{:?}", Token { text: "s3cret", scheme: Scheme::Bearer }), "Token(..)");
    }

    proptest! {
        #[test]
        fn any_header_is_answered(first in any::<Vec<u8>>(), second in any::<Vec<u8>>(), websocket: bool) {
            let mut headers = HeaderMap::new();
            for (name, value) in [(AUTHORIZATION, first), (SEC_WEBSOCKET_PROTOCOL, second)] {
                headers.extend(http::HeaderValue::from_bytes(&value).ok().map(|value| (name, value)));
            }
            let _ = bearer(&headers, websocket);
        }
    }
}
