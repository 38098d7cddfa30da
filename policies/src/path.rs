//! Paths and queries: one canonical form, or refused; and the patterns they are matched by.

use std::borrow::Cow;
use std::sync::Arc;

use crate::denial::Denial;

/// Longest path, in bytes as received.
const MAX_PATH: usize = 4096;

/// Longest query, in bytes as received; a rule may allow less.
pub(crate) const MAX_QUERY: usize = 8192;

/// A path pattern of the policy: `/v1/users/{user}`, `/v1/files/**`.
#[derive(Debug, Clone)]
pub(crate) struct PathPattern {
    /// What stands between slashes, after the first.
    pub(crate) segments: Vec<Segment>,
    /// The pattern itself, if it is a plain path.
    pub(crate) literal: Option<Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    Literal(Box<str>),
    /// Exactly one segment, not empty. Its name is for readers only.
    Parameter,
    /// All that follows, the end of `/files/` included.
    Tree,
}

impl PathPattern {
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let rest = text.strip_prefix('/').ok_or("expected a path that begins with `/`")?;
        let mut segments = Vec::new();
        for segment in rest.split('/') {
            if segments.last() == Some(&Segment::Tree) {
                return Err("`**` may only be the last segment");
            }
            let name = segment.strip_prefix('{').and_then(|segment| segment.strip_suffix('}'));
            segments.push(if segment == "**" {
                Segment::Tree
            } else if let Some(name) = name {
                if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                    return Err("expected letters, digits or `_` between `{` and `}`");
                }
                Segment::Parameter
            } else if segment.contains(['{', '}', '*']) {
                return Err("a parameter `{name}` or `**` must be a whole segment");
            } else {
                Segment::Literal(segment.into())
            });
        }
        let plain = text.replace(['{', '}', '*'], "x");
        match canonical_path(&plain) {
            Ok(Cow::Borrowed(_)) => {}
            Ok(Cow::Owned(_)) => return Err("expected the canonical form: no needless percent-encoding"),
            Err(Denial::Malformed { detail }) => return Err(detail),
            Err(_) => return Err("too long"),
        }
        let plain = segments.iter().all(|segment| matches!(segment, Segment::Literal(_)));
        Ok(Self { segments, literal: plain.then(|| text.into()) })
    }
}

/// Which segment of a path pattern is the parameter `{name}`, from 0.
pub(crate) fn parameter(pattern: &str, name: &str) -> Option<usize> {
    let mut segments = pattern.strip_prefix('/')?.split('/');
    segments.position(|segment| {
        segment.strip_prefix('{').and_then(|segment| segment.strip_suffix('}')) == Some(name)
    })
}

/// Which bytes may stand in a path as they are: RFC 3986 §3.3 `pchar`, without `%`.
const fn is_pchar(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'-' | b'.'
                | b'_'
                | b'~'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b';'
                | b'='
                | b':'
                | b'@'
        )
}

/// Refuses whatever two readers might read differently; brings the rest into one form (RFC 3986 §6.2.2):
/// needlessly encoded characters decoded, hex digits in upper case. Borrowed when it already is.
///
/// # Errors
/// [`Denial::Malformed`]; [`Denial::UriTooLong`].
pub(crate) fn canonical_path(path: &str) -> Result<Cow<'_, str>, Denial> {
    let malformed = |detail| Err(Denial::Malformed { detail });
    if path.len() > MAX_PATH {
        return Err(Denial::UriTooLong);
    }
    let Some(segments) = path.strip_prefix('/') else {
        return malformed("the path does not begin with a slash");
    };
    let mut needs_rewrite = false;
    let mut rest = segments;
    loop {
        let (segment, more) = match rest.split_once('/') {
            Some((segment, more)) => (segment, Some(more)),
            None => (rest, None),
        };
        if segment.is_empty() && more.is_some() {
            return malformed("the path has an empty segment");
        }
        if segment.bytes().any(|byte| byte == b'%') {
            needs_rewrite = true;
        } else if !segment.bytes().all(is_pchar) {
            return malformed("the path has a character that must be encoded, or may not occur");
        } else if is_dot_segment(segment.as_bytes()) {
            return malformed("the path has a dot segment");
        }
        match more {
            Some(more) => rest = more,
            None => break,
        }
    }
    if !needs_rewrite {
        return Ok(Cow::Borrowed(path));
    }
    let mut canonical = String::with_capacity(path.len());
    for segment in segments.split('/') {
        canonical.push('/');
        push_canonical_segment(&mut canonical, segment)?;
    }
    // Encoded, but already in canonical form (`/a%20b`): the borrowed one saves a copy later.
    Ok(if canonical == path { Cow::Borrowed(path) } else { Cow::Owned(canonical) })
}

fn push_canonical_segment(out: &mut String, segment: &str) -> Result<(), Denial> {
    let malformed = |detail| Err(Denial::Malformed { detail });
    let mut decoded = Vec::with_capacity(segment.len());
    let mut bytes = segment.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            if !is_pchar(byte) {
                return malformed("the path has a character that must be encoded, or may not occur");
            }
            out.push(char::from(byte));
            decoded.push(byte);
            continue;
        }
        let Some(byte) = bytes.next().zip(bytes.next()).and_then(|(high, low)| hex_byte(high, low)) else {
            return malformed("the path has an incomplete percent-encoding");
        };
        match byte {
            b'/' | b'\\' => return malformed("the path has an encoded slash or backslash"),
            b'%' => return malformed("the path is encoded twice"),
            _ if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        decoded.push(byte);
    }
    match std::str::from_utf8(&decoded) {
        Err(_) => malformed("the path is not UTF-8"),
        Ok(text) if text.chars().any(char::is_control) => malformed("the path has a control character"),
        Ok(_) if is_dot_segment(&decoded) => malformed("the path has a dot segment"),
        Ok(_) => Ok(()),
    }
}

/// `.` and `..`, also with path parameters behind: some servers strip `;…` before they resolve dots.
fn is_dot_segment(segment: &[u8]) -> bool {
    let name = segment.split(|&byte| byte == b';').next().unwrap_or_default();
    name == b"." || name == b".."
}

pub(crate) fn hex_byte(high: u8, low: u8) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

/// Decodes `application/x-www-form-urlencoded`; `None` if the result is not UTF-8.
pub(crate) fn form_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'+' => b' ',
            b'%' => hex_byte(bytes.next()?, bytes.next()?)?,
            _ => byte,
        });
    }
    String::from_utf8(out).ok()
}

/// Checks the bytes of a query (RFC 3986 §3.4; `[` and `]` as browsers send them).
///
/// # Errors
/// [`Denial::Malformed`].
pub(crate) fn check_query(query: &str) -> Result<(), Denial> {
    let malformed = |detail| Err(Denial::Malformed { detail });
    let mut bytes = query.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => match bytes.next().zip(bytes.next()).and_then(|(high, low)| hex_byte(high, low)) {
                None => return malformed("the query has an incomplete percent-encoding"),
                Some(0) => return malformed("the query has a NUL character"),
                Some(_) => {}
            },
            b'/' | b'?' | b'[' | b']' => {}
            _ if is_pchar(byte) => {}
            _ => return malformed("the query has a character that must be encoded, or may not occur"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_that_are_refused() {
        for bad in [
            "",
            "a",
            "*",
            "//",
            "//a",
            "/a//b",
            "/a//",
            "/.",
            "/..",
            "/a/./b",
            "/a/../b",
            "/a/..",
            "/a/..;x/b",
            "/a/.;/b",
            "/%2e",
            "/a/%2E%2e/b",
            "/a/.%2e/b",
            "/a/..%3b/b",
            "/a%2fb",
            "/a%2Fb",
            "/a%5cb",
            "/a\\b",
            "/a%00",
            "/a%0a",
            "/a%7f",
            "/a%C2%80",
            "/a%",
            "/a%2",
            "/a%zz",
            "/a%2541",
            "/a%252e",
            "/a%25",
            "/a%c0%af",
            "/a%ff",
            "/\u{e9}",
            "/a b",
            "/a\"",
            "/a<",
            "/a{b}",
            "/a|b",
            "/a^",
            "/a`",
            "/a#b",
            "/a[b]",
            "/a\u{0}",
            "/a\r\nb",
        ] {
            assert!(matches!(canonical_path(bad), Err(Denial::Malformed { .. })), "{bad}");
        }
        assert_eq!(canonical_path(&format!("/{}", "a".repeat(MAX_PATH))), Err(Denial::UriTooLong));
    }

    #[test]
    fn paths_that_have_one_form() {
        for (received, canonical) in [
            ("/", "/"),
            ("/a/", "/a/"),
            ("/v1/%65cho", "/v1/echo"),
            ("/%7euser", "/~user"),
            ("/a%20b", "/a%20b"),
            ("/%e4%bd%a0", "/%E4%BD%A0"),
            ("/...", "/..."),
            ("/.well-known/jwks.json", "/.well-known/jwks.json"),
            ("/a;v=1/b", "/a;v=1/b"),
            ("/a%3bb", "/a%3Bb"),
            ("/a:b@c,d", "/a:b@c,d"),
        ] {
            assert_eq!(canonical_path(received).as_deref(), Ok(canonical), "{received}");
        }
        assert!(matches!(canonical_path("/a%20b"), Ok(Cow::Borrowed(_))));
    }

    proptest! {
        #[test]
        fn canonical_paths_are_stable_and_clean(path in "/([a-zA-Z0-9._~%/;:@ \\\\-]|%[0-9a-fA-F]{2}|\\PC){0,40}") {
            if let Ok(canonical) = canonical_path(&path) {
                // Judging the result again changes nothing: upstream sees what was judged.
                let again = canonical_path(&canonical);
                prop_assert_eq!(again.as_deref(), Ok(&*canonical));
                prop_assert!(canonical.is_ascii());
                prop_assert!(!canonical.contains("//") && !canonical.contains('\\') && !canonical.contains("%2F"));
                for segment in canonical.split('/') {
                    prop_assert!(segment != "." && segment != "..");
                }
            }
        }

        #[test]
        fn canonicalisation_keeps_the_meaning(name in "[ -~&&[^%/\\\\]]{1,20}") {
            prop_assume!(!is_dot_segment(name.as_bytes()));
            let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let path = format!("/{encoded}");
            let canonical = canonical_path(&path).unwrap().into_owned();
            let mut decoded = Vec::new();
            let mut bytes = canonical.bytes().skip(1);
            while let Some(byte) = bytes.next() {
                decoded.push(if byte == b'%' {
                    hex_byte(bytes.next().unwrap(), bytes.next().unwrap()).unwrap()
                } else {
                    byte
                });
            }
            prop_assert_eq!(String::from_utf8(decoded).unwrap(), name);
        }
    }

    #[test]
    fn queries() {
        for good in ["", "a=1&b=%20x", "q=a+b/c?d", "f[]=1", "n=%0A"] {
            assert_eq!(check_query(good), Ok(()), "{good}");
        }
        for bad in ["%", "a=%2", "a=%zz", "a=%00", "a b", "a\"", "<", "\u{e9}", "a#b"] {
            assert!(matches!(check_query(bad), Err(Denial::Malformed { .. })), "{bad}");
        }
    }

    #[test]
    fn path_patterns() {
        for good in ["/", "/a", "/a/", "/{id}", "/a/{b}/c", "/a/**", "/**", "/.well-known/x"] {
            assert!(PathPattern::parse(good).is_ok(), "{good}");
        }
        for bad in
            ["", "a", "/a//b", "/../a", "/a/**/b", "/a*", "/{", "/{}", "/{a-b}", "/x{a}", "/%61", "/a b"]
        {
            assert!(PathPattern::parse(bad).is_err(), "{bad}");
        }
        let form = |text| PathPattern::parse(text).unwrap().segments;
        assert_eq!(form("/a/{x}"), form("/a/{y}"));
    }
}
