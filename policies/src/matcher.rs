//! Matchers for header fields, compiled at load: origins, content types and content codings.

use std::sync::Arc;

use http::{HeaderMap, header};

use crate::denial::Denial;
use crate::routes::Host;

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
        let mut origins = Self { required, ..Self::default() };
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
        if errors.is_empty() { Ok(origins) } else { Err(errors) }
    }

    pub(crate) fn check(&self, headers: &HeaderMap, host: &str) -> Result<(), Denial> {
        let mut values = headers.get_all(header::ORIGIN).iter();
        let origin = match (values.next(), values.next()) {
            // Only browsers send an origin, and only a browser can be led into connecting for somebody else.
            (None, _) if self.required => return Err(Denial::OriginNotAllowed),
            (None, _) => return Ok(()),
            (Some(_), Some(_)) => {
                return Err(Denial::Malformed { detail: "more than one Origin" });
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
                        && labels.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
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
        && scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (rest, None),
    };
    let default_port = match scheme {
        "https" => "443",
        "http" => "80",
        _ => "",
    };
    let port_is_plain = port.is_none_or(|port| {
        port != default_port
            && port.starts_with(|c: char| matches!(c, '1'..='9'))
            && port.parse::<u16>().is_ok()
    });
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
    Listed {
        /// Essences in lower case. Never empty.
        list: Vec<String>,
        /// They, as an `Accept` value.
        accept: Arc<str>,
    },
}

impl ContentTypes {
    pub(crate) fn listed(list: Vec<String>) -> Self {
        let accept = list.join(", ").into();
        Self::Listed { list, accept }
    }

    /// Judges the headers of a request that brings a body; `judged` is whether it will be looked into.
    pub(crate) fn check(&self, headers: &HeaderMap, judged: bool) -> Result<(), Denial> {
        let mut values = headers.get_all(header::CONTENT_TYPE).iter();
        let value = match (values.next(), values.next()) {
            (_, Some(_)) => {
                return Err(Denial::Malformed { detail: "more than one Content-Type" });
            }
            (value, None) => value,
        };
        let Self::Listed { list, accept } = self else { return Ok(()) };
        let denial = || Denial::ContentType { accept: Arc::clone(accept) };
        let value = value.and_then(|value| value.to_str().ok()).ok_or_else(denial)?;
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
        if listed && charset_agrees { Ok(()) } else { Err(denial()) }
    }
}

/// Content codings that a body may have (RFC 9110 §8.4), besides none.
#[derive(Debug)]
pub(crate) struct ContentCodings {
    /// In lower case.
    list: Vec<String>,
    /// They and `identity`, as an `Accept-Encoding` value.
    accept: Arc<str>,
}

impl ContentCodings {
    pub(crate) fn new(list: &[String]) -> Self {
        let list: Vec<_> = list.iter().map(|coding| coding.to_ascii_lowercase()).collect();
        let identity = std::iter::once("identity");
        let accept = list.iter().map(String::as_str).chain(identity).collect::<Vec<_>>().join(", ").into();
        Self { list, accept }
    }

    /// Judges the headers of a request that brings a body. At most one coding: several are for hiding, and for bombs.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), Denial> {
        let mut values = headers.get_all(header::CONTENT_ENCODING).iter();
        let fits = match (values.next(), values.next()) {
            (None, _) => true,
            (Some(value), None) => {
                let is = |coding: &str| value.as_bytes().eq_ignore_ascii_case(coding.as_bytes());
                is("identity") || self.list.iter().any(|coding| is(coding))
            }
            (Some(_), Some(_)) => false,
        };
        if fits { Ok(()) } else { Err(Denial::ContentCoding { accept: Arc::clone(&self.accept) }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let list = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let origins = Origins::parse(
            &list(&["https://a.example", "https://*.b.example", "https://c.example:8443", "self"]),
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
        assert_eq!(strict.check(&HeaderMap::new(), "a"), Err(Denial::OriginNotAllowed));
        for bad in [
            "https://a.example/",
            "https://a.example:443",
            "a.example",
            "https://A",
            "https://*",
            "://a",
            "https://a:+1",
        ] {
            assert!(Origins::parse(&list(&[bad]), false).is_err(), "{bad}");
        }
    }

    #[test]
    fn content_types() {
        let json = ContentTypes::listed(vec!["application/json".to_owned()]);
        let headers = |pairs: &[(&'static str, &'static str)]| {
            pairs.iter().fold(HeaderMap::new(), |mut map, (name, value)| {
                map.append(*name, http::HeaderValue::from_static(value));
                map
            })
        };
        for good in ["application/json", "Application/JSON ; Charset=\"UTF-8\"", "application/json;v=1"] {
            assert_eq!(json.check(&headers(&[("content-type", good)]), true), Ok(()), "{good}");
        }
        let refused = Err(Denial::ContentType { accept: "application/json".into() });
        for bad in ["text/plain", "application/jsonx", "", "application/json; charset=utf-16"] {
            assert_eq!(json.check(&headers(&[("content-type", bad)]), true), refused, "{bad}");
        }
        assert_eq!(json.check(&HeaderMap::new(), true), refused);
        let twice = headers(&[("content-type", "application/json"), ("content-type", "text/plain")]);
        assert!(matches!(json.check(&twice, false), Err(Denial::Malformed { .. })));
        assert_eq!(ContentTypes::Any.check(&HeaderMap::new(), false), Ok(()));
    }

    #[test]
    fn content_codings() {
        let headers = |codings: &[&'static str]| {
            codings.iter().fold(HeaderMap::new(), |mut map, coding| {
                map.append(header::CONTENT_ENCODING, http::HeaderValue::from_static(coding));
                map
            })
        };
        let none = ContentCodings::new(&[]);
        let some = ContentCodings::new(&["gzip".to_owned(), "ZSTD".to_owned()]);
        for good in [&[][..], &["identity"], &["Identity"]] {
            assert_eq!(none.check(&headers(good)), Ok(()), "{good:?}");
            assert_eq!(some.check(&headers(good)), Ok(()), "{good:?}");
        }
        for coded in [&["gzip"][..], &["GZip"], &["zstd"]] {
            let refused = Err(Denial::ContentCoding { accept: "identity".into() });
            assert_eq!(none.check(&headers(coded)), refused, "{coded:?}");
            assert_eq!(some.check(&headers(coded)), Ok(()), "{coded:?}");
        }
        for bad in [&["br"][..], &["gzip, gzip"], &["gzip", "gzip"], &["identity", "gzip"], &["gzip,"], &[""]]
        {
            let refused = Err(Denial::ContentCoding { accept: "gzip, zstd, identity".into() });
            assert_eq!(some.check(&headers(bad)), refused, "{bad:?}");
        }
    }
}
