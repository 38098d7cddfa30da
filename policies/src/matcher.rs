//! Matchers that are compiled at load: paths, hosts and methods, origins, content types.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use http::{HeaderMap, Method, header};

use crate::denial::Denial;
use crate::rule::Rule;

/// Longest path, in bytes as received.
const MAX_PATH: usize = 4096;

/// Longest query, in bytes as received; a rule may allow less.
pub(crate) const MAX_QUERY: usize = 8192;

/// Finds the rule for host, path and method.
///
/// An exact host comes before a wildcard, a wildcard before any; within a host a literal segment comes before a
/// parameter, a parameter before `**`.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    exact: HashMap<Box<str>, PathTable>,
    /// `*.example.com` stands here as `example.com`; the star is exactly one label, as in certificates (RFC 6125).
    wildcard: HashMap<Box<str>, PathTable>,
    any: Option<PathTable>,
}

/// The rules of one host.
#[derive(Debug, Default)]
struct PathTable {
    router: matchit::Router<Slot>,
}

/// The rules of one path pattern.
#[derive(Debug, Default, Clone)]
pub(crate) struct Slot {
    /// The path itself, if it has no parameter: matched requests share it instead of copying.
    literal: Option<Arc<str>>,
    methods: Vec<(Method, Arc<Rule>)>,
    websocket: Option<Arc<Rule>>,
}

/// A path in canonical form: what was judged is what is forwarded.
#[derive(Debug, Clone)]
pub(crate) enum CanonicalPath {
    /// Equal to a rule's literal path.
    Literal(Arc<str>),
    /// From the request.
    Own(Box<str>),
}

impl CanonicalPath {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Literal(path) => path,
            Self::Own(path) => path,
        }
    }
}

impl Routes {
    /// # Errors
    /// The [`Denial`] for a malformed path, unknown host, unknown path or wrong method.
    pub(crate) fn find(
        &self,
        host: &str,
        method: &Method,
        path: &str,
        websocket: bool,
    ) -> Result<(&Arc<Rule>, CanonicalPath), Denial> {
        let path = canonical_path(path)?;
        let wildcard = host
            .split_once('.')
            .and_then(|(_, parent)| self.wildcard.get(parent));
        let tables = [self.exact.get(host), wildcard, self.any.as_ref()];
        if tables.iter().all(Option::is_none) {
            return Err(Denial::Misdirected);
        }
        let slots = || {
            tables
                .iter()
                .flatten()
                .filter_map(|table| Some(table.router.at(&path).ok()?.value))
        };
        for slot in slots() {
            if let Some(rule) = slot.rule(method, websocket) {
                let path = match &slot.literal {
                    Some(literal) => CanonicalPath::Literal(Arc::clone(literal)),
                    None => CanonicalPath::Own(path.into()),
                };
                return Ok((rule, path));
            }
        }
        Err(no_rule(slots(), method, websocket))
    }
}

/// Why no rule was found, given the slots whose path matched.
fn no_rule<'s>(slots: impl Iterator<Item = &'s Slot>, method: &Method, websocket: bool) -> Denial {
    let slots: Vec<_> = slots.collect();
    let mut methods: Vec<_> = slots
        .iter()
        .flat_map(|slot| &slot.methods)
        .map(|(method, _)| method.as_str())
        .collect();
    methods.sort_unstable();
    methods.dedup();
    let has_websocket = slots.iter().any(|slot| slot.websocket.is_some());
    if slots.is_empty() {
        Denial::NoRoute
    } else if websocket && has_websocket {
        Denial::MethodNotAllowed { allow: "GET".into() }
    } else if websocket {
        Denial::NoWebsocket
    } else if has_websocket && (methods.is_empty() || method == Method::GET) {
        Denial::UpgradeRequired
    } else {
        Denial::MethodNotAllowed {
            allow: methods.join(", ").into(),
        }
    }
}

impl Slot {
    fn rule(&self, method: &Method, websocket: bool) -> Option<&Arc<Rule>> {
        if websocket {
            // RFC 6455 §4.1 opens with GET, RFC 8441 §4 with CONNECT.
            let opens = method == Method::GET || method == Method::CONNECT;
            return self.websocket.as_ref().filter(|_| opens);
        }
        let find = |method: &Method| self.methods.iter().find(|(known, _)| known == method);
        // Whoever may GET may HEAD (RFC 9110 §9.3.2).
        let found = find(method).or_else(|| {
            if method == Method::HEAD {
                find(&Method::GET)
            } else {
                None
            }
        });
        found.map(|(_, rule)| rule)
    }
}

/// Collects rules until all are known.
#[derive(Debug, Default)]
pub(crate) struct RoutesBuilder {
    tables: HashMap<Host, HashMap<String, Slot>>,
}

impl RoutesBuilder {
    /// Adds a rule under one of its hosts; `None` for methods makes it the path's WebSocket.
    ///
    /// # Errors
    /// The rule that already stands there.
    pub(crate) fn insert(
        &mut self,
        host: &Host,
        path: &PathPattern,
        methods: Option<&[Method]>,
        rule: &Arc<Rule>,
    ) -> Result<(), Arc<Rule>> {
        let slots = self.tables.entry(host.clone()).or_default();
        let slot = slots.entry(path.router_form.clone()).or_default();
        slot.literal.clone_from(&path.literal);
        let Some(methods) = methods else {
            return slot.websocket.replace(Arc::clone(rule)).map_or(Ok(()), Err);
        };
        for method in methods {
            if let Some((_, other)) = slot.methods.iter().find(|(known, _)| known == method) {
                return Err(Arc::clone(other));
            }
            slot.methods.push((method.clone(), Arc::clone(rule)));
        }
        Ok(())
    }

    /// # Errors
    /// Text of a conflict between patterns; the checks before leave none.
    pub(crate) fn build(self) -> Result<Routes, String> {
        let mut routes = Routes::default();
        for (host, mut slots) in self.tables {
            // `/files/**` also covers `/files/` itself, unless that stands there on its own.
            let trees: Vec<_> = slots
                .iter()
                .filter_map(|(path, slot)| Some((path.strip_suffix("{*rest}")?.to_owned(), slot.clone())))
                .collect();
            for (parent, slot) in trees {
                slots.entry(parent).or_insert(slot);
            }
            let mut table = PathTable::default();
            for (path, slot) in slots {
                table
                    .router
                    .insert(path, slot)
                    .map_err(|error| error.to_string())?;
            }
            match host {
                Host::Exact(name) => drop(routes.exact.insert(name, table)),
                Host::Wildcard(parent) => drop(routes.wildcard.insert(parent, table)),
                Host::Any => routes.any = Some(table),
            }
        }
        Ok(routes)
    }
}

/// A host pattern.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Host {
    Exact(Box<str>),
    Wildcard(Box<str>),
    Any,
}

impl Host {
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "expected \"*\", a host name in lower case without port, or \"*.\" and one";
        let label = |label: &str| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        };
        let name = |name: &str| name.len() <= 253 && name.split('.').all(label);
        // An IPv6 literal stands in brackets in `Host`.
        let ipv6 = |text: &str| {
            text.strip_prefix('[')
                .and_then(|text| text.strip_suffix(']'))
                .is_some_and(|text| {
                    text.parse::<std::net::Ipv6Addr>()
                        .is_ok_and(|a| a.to_string() == text)
                })
        };
        match text.strip_prefix("*.") {
            _ if text == "*" => Ok(Self::Any),
            Some(parent) if name(parent) => Ok(Self::Wildcard(parent.into())),
            None if name(text) || ipv6(text) => Ok(Self::Exact(text.into())),
            _ => Err(EXPECTED),
        }
    }
}

/// A path pattern of the policy: `/v1/users/{user}`, `/v1/files/**`.
#[derive(Debug, Clone)]
pub(crate) struct PathPattern {
    router_form: String,
    literal: Option<Arc<str>>,
}

impl PathPattern {
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let segments = text
            .strip_prefix('/')
            .ok_or("expected a path that begins with `/`")?;
        let mut router_form = String::new();
        let mut parameters = 0_usize;
        let mut tree = false;
        for segment in segments.split('/') {
            if tree {
                return Err("`**` may only be the last segment");
            }
            router_form.push('/');
            let name = segment
                .strip_prefix('{')
                .and_then(|segment| segment.strip_suffix('}'));
            if segment == "**" {
                tree = true;
                router_form.push_str("{*rest}");
            } else if let Some(name) = name {
                if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                    return Err("expected letters, digits or `_` between `{` and `}`");
                }
                // Numbered, so that equal patterns with other names are found to be equal.
                router_form.push_str(&format!("{{p{parameters}}}"));
                parameters += 1;
            } else if segment.contains(['{', '}', '*']) {
                return Err("a parameter `{name}` or `**` must be a whole segment");
            } else {
                router_form.push_str(segment);
            }
        }
        let plain = text.replace(['{', '}', '*'], "x");
        match canonical_path(&plain) {
            Ok(Cow::Borrowed(_)) => {}
            Ok(Cow::Owned(_)) => return Err("expected the canonical form: no needless percent-encoding"),
            Err(Denial::Malformed { detail }) => return Err(detail),
            Err(_) => return Err("too long"),
        }
        let literal = (parameters == 0 && !tree).then(|| text.into());
        Ok(Self { router_form, literal })
    }
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
    Ok(if canonical == path {
        Cow::Borrowed(path)
    } else {
        Cow::Owned(canonical)
    })
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
        let Some(byte) = bytes
            .next()
            .zip(bytes.next())
            .and_then(|(high, low)| hex_byte(high, low))
        else {
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

/// Checks the bytes of a query (RFC 3986 §3.4; `[` and `]` as browsers send them).
///
/// # Errors
/// [`Denial::Malformed`].
pub(crate) fn check_query(query: &str) -> Result<(), Denial> {
    let malformed = |detail| Err(Denial::Malformed { detail });
    let mut bytes = query.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => match bytes
                .next()
                .zip(bytes.next())
                .and_then(|(high, low)| hex_byte(high, low))
            {
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

/// Origins that may open a WebSocket (RFC 6454, RFC 6455 §10.2).
#[derive(Debug, Default)]
pub(crate) struct Origins {
    any: bool,
    /// The page's host is the request's. Ports are not compared: the gateway's own may be mapped.
    same_host: bool,
    exact: Box<[String]>,
    /// `https://*.example.com` as (`https://`, `.example.com`); the star is one label or several.
    wildcard: Box<[(String, String)]>,
    required: bool,
}

impl Origins {
    /// # Errors
    /// Index of the bad entry, and what was expected.
    pub(crate) fn parse(list: &[String], required: bool) -> Result<Self, Vec<(usize, &'static str)>> {
        const EXPECTED: &str = "expected \"*\", \"self\", \"null\", or scheme://host[:port] in lower case without default port or path";
        let mut origins = Self {
            required,
            ..Self::default()
        };
        let mut exact = Vec::new();
        let mut wildcard = Vec::new();
        let mut errors = Vec::new();
        for (index, text) in list.iter().enumerate() {
            match (text.as_str(), text.split_once("://")) {
                ("*", _) => origins.any = true,
                ("self", _) => origins.same_host = true,
                ("null", _) => exact.push(text.clone()),
                (_, Some((scheme, rest))) if is_origin(scheme, rest) => match rest.strip_prefix('*') {
                    Some(suffix) => wildcard.push((format!("{scheme}://"), suffix.to_owned())),
                    None => exact.push(text.clone()),
                },
                _ => errors.push((index, EXPECTED)),
            }
        }
        origins.exact = exact.into();
        origins.wildcard = wildcard.into();
        if errors.is_empty() {
            Ok(origins)
        } else {
            Err(errors)
        }
    }

    pub(crate) fn check(&self, headers: &HeaderMap, host: &str) -> Result<(), Denial> {
        let mut values = headers.get_all(header::ORIGIN).iter();
        let origin = match (values.next(), values.next()) {
            // Only browsers send an origin, and only a browser can be led into connecting for somebody else.
            (None, _) if self.required => return Err(Denial::OriginNotAllowed),
            (None, _) => return Ok(()),
            (Some(_), Some(_)) => {
                return Err(Denial::Malformed {
                    detail: "more than one Origin",
                });
            }
            (Some(origin), None) => origin.to_str().map_err(|_| Denial::OriginNotAllowed)?,
        };
        if self.any || self.exact.iter().any(|known| known == origin) {
            return Ok(());
        }
        let below = |(scheme, suffix): &(String, String)| {
            origin
                .strip_prefix(scheme.as_str())
                .and_then(|rest| rest.strip_suffix(suffix.as_str()))
                .is_some_and(|labels| {
                    !labels.is_empty()
                        && labels
                            .bytes()
                            .all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
                })
        };
        if self.wildcard.iter().any(below) || (self.same_host && is_same_host(origin, host)) {
            return Ok(());
        }
        Err(Denial::OriginNotAllowed)
    }
}

fn is_origin(scheme: &str, rest: &str) -> bool {
    let scheme_is_plain = !scheme.is_empty()
        && scheme
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (rest, None),
    };
    let default_port = match scheme {
        "https" => "443",
        "http" => "80",
        _ => "",
    };
    let port_is_plain =
        port.is_none_or(|port| port != default_port && !port.starts_with('0') && port.parse::<u16>().is_ok());
    scheme_is_plain && port_is_plain && host != "*" && Host::parse(host).is_ok()
}

fn is_same_host(origin: &str, host: &str) -> bool {
    let Some(rest) = origin.strip_prefix("https://") else {
        return false;
    };
    let name = match rest.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => rest,
    };
    !host.is_empty() && name == host
}

/// Media types that a body may have.
#[derive(Debug)]
pub(crate) enum ContentTypes {
    Any,
    /// Essences in lower case. Never empty.
    Listed(Vec<String>),
}

impl ContentTypes {
    /// Judges the headers of a request that brings a body.
    ///
    /// A body that will be checked must not be hidden from the check, so `judged` refuses content codings.
    pub(crate) fn check(&self, headers: &HeaderMap, judged: bool) -> Result<(), Denial> {
        let coded = |value: &http::HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
        if judged && headers.get_all(header::CONTENT_ENCODING).iter().any(coded) {
            return Err(Denial::ContentType);
        }
        let mut values = headers.get_all(header::CONTENT_TYPE).iter();
        let value = match (values.next(), values.next()) {
            (_, Some(_)) => {
                return Err(Denial::Malformed {
                    detail: "more than one Content-Type",
                });
            }
            (value, None) => value,
        };
        let Self::Listed(list) = self else { return Ok(()) };
        let value = value
            .and_then(|value| value.to_str().ok())
            .ok_or(Denial::ContentType)?;
        let mut parts = value.split(';').map(|part| part.trim_matches([' ', '\t']));
        let essence = parts.next().unwrap_or_default();
        let listed = list.iter().any(|known| known.eq_ignore_ascii_case(essence));
        // JSON is UTF-8 (RFC 8259 §8.1); a parameter must not make a reader behind us see it differently.
        let charset_agrees = !judged
            || parts.all(|parameter| match parameter.split_once('=') {
                Some((name, value)) if name.eq_ignore_ascii_case("charset") => {
                    value.trim_matches('"').eq_ignore_ascii_case("utf-8")
                }
                _ => true,
            });
        if listed && charset_agrees {
            Ok(())
        } else {
            Err(Denial::ContentType)
        }
    }
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
            assert!(
                matches!(canonical_path(bad), Err(Denial::Malformed { .. })),
                "{bad}"
            );
        }
        assert_eq!(
            canonical_path(&format!("/{}", "a".repeat(MAX_PATH))),
            Err(Denial::UriTooLong)
        );
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
        for good in [
            "/",
            "/a",
            "/a/",
            "/{id}",
            "/a/{b}/c",
            "/a/**",
            "/**",
            "/.well-known/x",
        ] {
            assert!(PathPattern::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "", "a", "/a//b", "/../a", "/a/**/b", "/a*", "/{", "/{}", "/{a-b}", "/x{a}", "/%61", "/a b",
        ] {
            assert!(PathPattern::parse(bad).is_err(), "{bad}");
        }
        let form = |text| PathPattern::parse(text).unwrap().router_form;
        assert_eq!(form("/a/{x}"), form("/a/{y}"));
    }

    #[test]
    fn hosts() {
        for good in [
            "*",
            "a",
            "a.example",
            "*.a.example",
            "127.0.0.1",
            "[::1]",
            "xn--a_b",
        ] {
            assert!(Host::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "", "A", "a:1", "a..b", "a.*", "*.", "**", "[::01]", "::1", "é", "*.*.a",
        ] {
            assert!(Host::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn origins() {
        let list = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let origins = Origins::parse(
            &list(&[
                "https://a.example",
                "https://*.b.example",
                "https://c.example:8443",
                "self",
            ]),
            false,
        )
        .unwrap();
        let check = |origin: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            origins.check(&headers, "gate.example")
        };
        for good in [
            "https://a.example",
            "https://x.b.example",
            "https://x.y.b.example",
            "https://c.example:8443",
            "https://gate.example",
            "https://gate.example:9443",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in [
            "http://a.example",
            "https://a.example.evil",
            "https://evil/https://a.example",
            "https://b.example",
            "https://evil/.b.example",
            "https://evil@x.b.example",
            "https://.gate.example",
            "http://gate.example",
            "https://gate.example:x",
            "https://c.example",
            "null",
            "",
        ] {
            assert_eq!(check(bad), Err(Denial::OriginNotAllowed), "{bad}");
        }
        assert_eq!(origins.check(&HeaderMap::new(), "gate.example"), Ok(()));
        let strict = Origins::parse(&list(&["*"]), true).unwrap();
        assert_eq!(
            strict.check(&HeaderMap::new(), "a"),
            Err(Denial::OriginNotAllowed)
        );
        for bad in [
            "https://a.example/",
            "https://a.example:443",
            "a.example",
            "https://A",
            "https://*",
            "://a",
        ] {
            assert!(Origins::parse(&list(&[bad]), false).is_err(), "{bad}");
        }
    }

    #[test]
    fn content_types() {
        let json = ContentTypes::Listed(vec!["application/json".to_owned()]);
        let headers = |pairs: &[(&'static str, &'static str)]| {
            pairs.iter().fold(HeaderMap::new(), |mut map, (name, value)| {
                map.append(*name, http::HeaderValue::from_static(value));
                map
            })
        };
        for good in [
            "application/json",
            "Application/JSON ; Charset=\"UTF-8\"",
            "application/json;v=1",
        ] {
            assert_eq!(
                json.check(&headers(&[("content-type", good)]), true),
                Ok(()),
                "{good}"
            );
        }
        for bad in [
            "text/plain",
            "application/jsonx",
            "",
            "application/json; charset=utf-16",
        ] {
            let judged = json.check(&headers(&[("content-type", bad)]), true);
            assert_eq!(judged, Err(Denial::ContentType), "{bad}");
        }
        assert_eq!(json.check(&HeaderMap::new(), true), Err(Denial::ContentType));
        let zipped = headers(&[("content-type", "application/json"), ("content-encoding", "gzip")]);
        assert_eq!(json.check(&zipped, true), Err(Denial::ContentType));
        assert_eq!(json.check(&zipped, false), Ok(()));
        let twice = headers(&[
            ("content-type", "application/json"),
            ("content-type", "text/plain"),
        ]);
        assert!(matches!(json.check(&twice, false), Err(Denial::Malformed { .. })));
        assert_eq!(ContentTypes::Any.check(&HeaderMap::new(), false), Ok(()));
    }
}
