//! Fields that end at a hop, and fields that we alone may set.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use sealgate_policy::{ForwardCertificate, Identity};

use super::{exchange::RequestId, target::Target};
use crate::{edge::Client, session};

/// Fields of one hop only (RFC 9110 §7.6.1, RFC 9112 §9).
const HOP_BY_HOP: [HeaderName; 10] = [
    header::CONNECTION,
    // Answered by us: 100 when the body is wanted.
    header::EXPECT,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// What a client may say of itself only through us.
const OURS: [HeaderName; 11] = [
    header::FORWARDED,
    CLIENT_CERT,
    CLIENT_CERT_CHAIN,
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-real-ip"),
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

/// What an upstream says of its software, or of other ways to reach it.
const TELLTALE: [HeaderName; 3] = [header::SERVER, header::ALT_SVC, HeaderName::from_static("x-powered-by")];

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const CLIENT_CERT: HeaderName = HeaderName::from_static("client-cert");
const CLIENT_CERT_CHAIN: HeaderName = HeaderName::from_static("client-cert-chain");
const CLIENT_THUMBPRINT: HeaderName = HeaderName::from_static("x-sealgate-client-thumbprint");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const IDENTITY_PREFIX: &str = "x-sealgate-";

/// Takes out of a client's fields what ends here: hop-by-hop fields, those that `Connection`
/// nominates, forged forwarding and identity fields, and the token, which was spent at this door.
pub fn strip_request(headers: &mut HeaderMap, token_spent: bool) {
    remove_nominated(headers);
    remove_where(headers, |name| {
        HOP_BY_HOP.contains(name)
            || OURS.contains(name)
            || name.as_str().starts_with(IDENTITY_PREFIX)
            // Many backends read `X_Sealgate_Subject` as `X-Sealgate-Subject`; nginx drops such names too.
            || name.as_str().contains('_')
            || token_spent && (*name == header::AUTHORIZATION || *name == session::DPOP)
    });
}

/// Adds what the backend may trust: identity, where the request came from, and its id.
pub fn add_trusted(
    headers: &mut HeaderMap,
    identity: Option<&Identity>,
    origin: &Origin,
    target: &Target,
    id: RequestId,
    span: u64,
) {
    let identity = identity.map_or(&[][..], |identity| &identity.upstream_headers);
    // At once, so that the map grows once.
    headers.reserve(identity.len() + 8);
    for (name, value) in identity {
        headers.insert(name.clone(), value.clone());
    }
    headers.insert(FORWARDED_FOR, origin.address.clone());
    headers.insert(FORWARDED_HOST, target.authority.clone());
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("https"));
    headers.insert(header::FORWARDED, origin.forwarded.clone());
    headers.insert(TRACEPARENT, id.traceparent(span));
    headers.insert(REQUEST_ID, id.header());
}

/// Adds what the backend may trust of the client's certificate (RFC 9440), and its thumbprint, by which a backend that looks at tokens
/// itself can check them (RFC 8705 §3.1).
pub fn add_certificate(headers: &mut HeaderMap, vouched: Option<(&Client, ForwardCertificate)>) {
    let Some((client, forward)) = vouched else { return };
    if forward == ForwardCertificate::None {
        return;
    }
    headers.insert(CLIENT_CERT, client.own());
    headers.insert(CLIENT_THUMBPRINT, client.thumbprint());
    if let (ForwardCertificate::Chain, Some(issuers)) = (forward, client.issuers()) {
        headers.insert(CLIENT_CERT_CHAIN, issuers);
    }
}

/// Where a connection comes from, as backends are told. Made once for each connection.
pub struct Origin {
    address: HeaderValue,
    forwarded: HeaderValue,
}

impl Origin {
    /// What is said of `peer`.
    #[must_use]
    pub fn of(peer: IpAddr) -> Self {
        let text = |text: String| HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("unknown"));
        // RFC 7239 §6: an IPv6 address is bracketed and so quoted.
        let node = match peer {
            IpAddr::V4(peer) => peer.to_string(),
            IpAddr::V6(peer) => format!("\"[{peer}]\""),
        };
        Self { address: text(peer.to_string()), forwarded: text(format!("for={node};proto=https")) }
    }
}

/// Takes out of an upstream's fields what ends here or tells too much.
pub fn strip_response(headers: &mut HeaderMap) {
    remove_nominated(headers);
    remove_where(headers, |name| {
        HOP_BY_HOP.contains(name) || TELLTALE.contains(name) || name.as_str().starts_with(IDENTITY_PREFIX)
    });
}

/// What every answer carries.
pub fn add_security(headers: &mut HeaderMap, hsts: Option<&HeaderValue>, id: RequestId) {
    if let Some(hsts) = hsts {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, hsts.clone());
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REQUEST_ID, id.header());
}

fn remove_nominated(headers: &mut HeaderMap) {
    if !headers.contains_key(header::CONNECTION) {
        return;
    }
    let nominated: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in nominated {
        // Framing and routing fields cannot be nominated away.
        if name != header::HOST && name != header::CONTENT_LENGTH && name != header::CONTENT_TYPE {
            headers.remove(name);
        }
    }
}

fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    // Names are lower case in a `HeaderMap`. Usually none is found, and nothing allocated.
    while let Some(name) = headers.keys().find(|name| unwanted(name)).cloned() {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn forged_fields_and_hop_by_hop_fields_go_and_others_stay() {
        let mut headers = map(&[
            ("x-sealgate-subject", "root"),
            ("x-sealgate-anything", "1"),
            ("x_sealgate_subject", "root"),
            ("x-forwarded-for", "10.0.0.1"),
            ("forwarded", "for=10.0.0.1"),
            ("connection", "keep-alive, x-private"),
            ("x-private", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("authorization", "Bearer x"),
            ("accept", "*/*"),
            ("cookie", "a=b"),
        ]);
        strip_request(&mut headers, true);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept", "cookie"]);
    }

    #[test]
    fn a_token_that_was_not_spent_is_passed_on() {
        let mut headers = map(&[("authorization", "Basic x")]);
        strip_request(&mut headers, false);
        assert!(headers.contains_key("authorization"));
    }

    #[test]
    fn connection_cannot_nominate_the_host_away() {
        let mut headers =
            map(&[("connection", "host, content-length"), ("host", "a"), ("content-length", "3")]);
        strip_request(&mut headers, true);
        assert!(headers.contains_key("host") && headers.contains_key("content-length"));
    }

    #[test]
    fn an_upstream_does_not_name_its_software() {
        let mut headers = map(&[("server", "x/1.0"), ("x-powered-by", "y"), ("content-type", "text/plain")]);
        strip_response(&mut headers);
        let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["content-type"]);
    }
}
