//! One strict reading of where a request wants to go.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version, header, uri::Scheme};
use hyper::ext::Protocol;
use sealgate_policy::Denial;

use super::headers::may_be_nominated;

/// Host and kind of a request, read once; what is judged is what is forwarded.
pub struct Target {
    /// Lower case, without port.
    pub host: String,
    /// As the client wrote it, for `X-Forwarded-Host`.
    pub authority: HeaderValue,
    /// It asks to become a WebSocket.
    pub websocket: bool,
    /// The declared length of its body.
    pub content_length: Option<u64>,
}

impl Target {
    /// Reads host, upgrade and length.
    ///
    /// # Errors
    ///
    /// [`Denial::Malformed`] for a request that could be understood in two ways.
    pub fn read<B>(request: &Request<B>) -> Result<Self, Denial> {
        nominations(request.headers())?;
        let authority = authority(request.uri(), request.headers(), request.version())?;
        let host = authority.to_str().ok().and_then(host_of);
        let host = host.ok_or(Denial::Malformed { detail: "the host is not valid" })?.to_ascii_lowercase();
        Ok(Self {
            host,
            authority,
            websocket: websocket(request)?,
            content_length: content_length(request.headers())?,
        })
    }
}

/// The one authority of a request: `Host` (RFC 9112 §3.2) or `:authority` (RFC 9113 §8.3.1). Where two
/// are given they must be equal.
fn authority(uri: &Uri, headers: &HeaderMap, version: Version) -> Result<HeaderValue, Denial> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Denial::Malformed { detail: "more than one Host field" });
    }
    if uri.scheme().is_some_and(|scheme| *scheme != Scheme::HTTPS) {
        return Err(Denial::Malformed { detail: "the scheme is not https" });
    }
    match (uri.authority().map(http::uri::Authority::as_str), host) {
        (Some(authority), Some(host)) if host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()) => {
            Ok(host.clone())
        }
        (Some(_), Some(_)) => Err(Denial::Malformed { detail: "the Host field and the target differ" }),
        (Some(authority), None) if version == Version::HTTP_2 => HeaderValue::from_str(authority)
            .map_err(|_| Denial::Malformed { detail: "the host is not valid" }),
        (None, Some(host)) => Ok(host.clone()),
        _ => Err(Denial::Malformed { detail: "no Host field" }),
    }
}

/// What `Connection` names besides itself (RFC 9110 §7.6.1).
fn nominations(headers: &HeaderMap) -> Result<(), Denial> {
    for value in headers.get_all(header::CONNECTION) {
        let names =
            value.to_str().map_err(|_| Denial::Malformed { detail: "the Connection field is not valid" })?;
        if !names.split(',').all(|name| may_be_nominated(name.trim_matches([' ', '\t']))) {
            return Err(Denial::Malformed {
                detail: "the Connection field names what does not end at a hop",
            });
        }
    }
    Ok(())
}

/// The host of an authority without its port; `None` if there is userinfo or anything odd in it.
fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']')?;
            address.parse::<std::net::Ipv6Addr>().ok()?;
            (address, rest.strip_prefix(':').or_else(|| rest.is_empty().then_some("")))
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, Some("")),
        },
    };
    let port = port?;
    let port_is_fine =
        port.is_empty() || port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit());
    let host_is_fine = !host.is_empty()
        && host.len() <= 253
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':'));
    (port_is_fine && host_is_fine).then_some(host)
}

/// Whether the request asks for a WebSocket. Any other upgrade, and any tunnel, is refused, so that no
/// rule can be walked around by an `Upgrade` header.
fn websocket<B>(request: &Request<B>) -> Result<bool, Denial> {
    if request.method() == Method::CONNECT {
        return extended_connect(request);
    }
    let mut upgrades = request.headers().get_all(header::UPGRADE).iter();
    let Some(upgrade) = upgrades.next() else { return Ok(false) };
    if request.version() == Version::HTTP_2 {
        return Err(Denial::Malformed { detail: "HTTP/2 has no Upgrade field" });
    }
    if upgrades.next().is_some() || !upgrade.as_bytes().eq_ignore_ascii_case(b"websocket") {
        return Err(Denial::Malformed { detail: "only an upgrade to websocket is offered here" });
    }
    Ok(true)
}

/// CONNECT with `:protocol` (RFC 8441 §4), which is how HTTP/2 opens a WebSocket.
fn extended_connect<B>(request: &Request<B>) -> Result<bool, Denial> {
    let Some(protocol) = request.extensions().get::<Protocol>() else {
        return Err(Denial::MethodNotAllowed {
            allow: Arc::from("DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"),
        });
    };
    if request.version() != Version::HTTP_2 || protocol.as_str() != "websocket" {
        return Err(Denial::ProtocolNotOffered);
    }
    if request.headers().contains_key(header::UPGRADE) {
        return Err(Denial::Malformed { detail: "HTTP/2 has no Upgrade field" });
    }
    Ok(true)
}

fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Denial> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(None) };
    let parsed = length
        .to_str()
        .ok()
        .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|text| text.parse().ok());
    match (parsed, lengths.next()) {
        (Some(length), None) => Ok(Some(length)),
        _ => Err(Denial::Malformed { detail: "the Content-Length field is not valid" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(build: impl FnOnce(http::request::Builder) -> http::request::Builder) -> Result<Target, Denial> {
        Target::read(&build(Request::builder()).body(()).unwrap())
    }

    #[test]
    fn the_host_is_lower_case_and_without_port() {
        for (host, expected) in [
            ("Chat.Example:8443", "chat.example"),
            ("chat.example", "chat.example"),
            ("[::1]:8443", "::1"),
            ("[::1]", "::1"),
        ] {
            let target = read(|r| r.uri("/").header("host", host)).unwrap();
            assert_eq!(target.host, expected);
        }
    }

    #[test]
    fn odd_and_doubtful_hosts_are_refused() {
        for host in ["", "a@b", "a/b", "a b", "chat.example:port", "chat.example:+80", "[::1", "[zz]", "a,b"]
        {
            assert!(read(|r| r.uri("/").header("host", host)).is_err(), "{host:?}");
        }
        assert!(read(|r| r.uri("/")).is_err(), "none");
        assert!(read(|r| r.uri("/").header("host", "a").header("host", "a")).is_err(), "two");
        assert!(read(|r| r.uri("https://b/").header("host", "a")).is_err(), "two that differ");
        assert!(read(|r| r.uri("https://a/").header("host", "a")).is_ok(), "two that agree");
        assert!(read(|r| r.uri("http://a/").header("host", "a")).is_err(), "another scheme");
    }

    #[test]
    fn only_websocket_upgrades_are_seen_as_such() {
        let upgrade = |value| read(|r| r.uri("/").header("host", "a").header("upgrade", value));
        assert!(upgrade("websocket").unwrap().websocket);
        assert!(upgrade("WebSocket").unwrap().websocket);
        assert!(upgrade("h2c").is_err());
        assert!(upgrade("websocket, h2c").is_err());
        assert!(!read(|r| r.uri("/").header("host", "a")).unwrap().websocket);
    }

    #[test]
    fn an_extended_connect_opens_a_websocket_and_nothing_else() {
        let connect = |version, uri: &'static str, protocol: Option<&'static str>| {
            read(|mut request| {
                request = request.method(Method::CONNECT).version(version).uri(uri);
                if let Some(protocol) = protocol {
                    request = request.extension(Protocol::from_static(protocol));
                }
                request
            })
        };
        let target = connect(Version::HTTP_2, "https://Chat.Example:8443/ws", Some("websocket")).unwrap();
        assert_eq!((target.host.as_str(), target.websocket), ("chat.example", true));
        for protocol in ["connect-udp", "websockets", "WebSocket", ""] {
            let refused = connect(Version::HTTP_2, "https://a/ws", Some(protocol));
            assert_eq!(refused.err(), Some(Denial::ProtocolNotOffered), "{protocol}");
        }
        let malformed = |outcome: Result<Target, Denial>| {
            assert!(matches!(outcome.err(), Some(Denial::Malformed { .. })));
        };
        let not_allowed = |outcome: Result<Target, Denial>| {
            assert!(matches!(outcome.err(), Some(Denial::MethodNotAllowed { .. })));
        };
        not_allowed(connect(Version::HTTP_2, "https://a/ws", None));
        malformed(connect(Version::HTTP_2, "http://a/ws", Some("websocket")));
        not_allowed(read(|r| r.method(Method::CONNECT).uri("a:443").header("host", "a:443")));
        let both = |r: http::request::Builder| {
            r.method(Method::CONNECT)
                .version(Version::HTTP_2)
                .uri("https://a/ws")
                .header("upgrade", "websocket")
                .extension(Protocol::from_static("websocket"))
        };
        malformed(read(both));
    }

    #[test]
    fn connection_names_only_what_ends_here() {
        let named = |value: &str| read(|r| r.uri("/").header("host", "a").header("connection", value));
        for fine in ["close", "keep-alive, Upgrade", "TE,\tX-Own ", ""] {
            assert!(named(fine).is_ok(), "{fine}");
        }
        for bad in ["Host", "close, X-Sealgate-Subject", "content-length", "Authorization"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_length_is_digits_once() {
        let length = |value| read(|r| r.uri("/").header("host", "a").header("content-length", value));
        assert_eq!(length("12").unwrap().content_length, Some(12));
        for bad in ["+1", "-1", "1,1", "", "0x1", "99999999999999999999999"] {
            assert!(length(bad).is_err(), "{bad:?}");
        }
    }
}
