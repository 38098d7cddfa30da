//! Fields that end at a hop, and fields that we alone may set.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use sealgate_policy::{ForwardCertificate, Identity, Policy};

use super::{exchange::RequestId, target::Target};
use crate::edge::Client;

/// Fields of one hop only (RFC 9110 §7.6.1, RFC 9112 §9). `Expect` is answered by us: 100 when the body is wanted.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "expect"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// What a client may say of itself only through us.
fn is_ours(name: &str) -> bool {
    matches!(
        name,
        "client-cert"
            | "client-cert-chain"
            | "forwarded"
            | "traceparent"
            | "tracestate"
            | "x-forwarded-for"
            | "x-forwarded-host"
            | "x-forwarded-port"
            | "x-forwarded-proto"
            | "x-real-ip"
            | "x-request-id"
    )
}

/// What an upstream says of its software, of other ways to reach it, or to a proxy of its own.
fn is_telltale(name: &str) -> bool {
    matches!(
        name,
        "alt-svc"
            | "public-key-pins"
            | "public-key-pins-report-only"
            | "server"
            | "via"
            | "x-accel-redirect"
            | "x-aspnet-version"
            | "x-aspnetmvc-version"
            | "x-backend-server"
            | "x-generator"
            | "x-powered-by"
            | "x-runtime"
            | "x-sendfile"
    )
}

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
    remove_where(headers, |name| ends_here(name, token_spent));
}

/// Whether a client's field ends here, whatever its `Connection` nominates.
pub fn ends_here(name: &HeaderName, token_spent: bool) -> bool {
    let name = name.as_str();
    is_hop_by_hop(name)
        || is_ours(name)
        || name.starts_with(IDENTITY_PREFIX)
        // Many backends read `X_Sealgate_Subject` as `X-Sealgate-Subject`; nginx drops such names too.
        || name.contains('_')
        || token_spent && matches!(name, "authorization" | "dpop")
}

/// What the backend may trust: who asks, where the request came from, its id, and the client's certificate. Its names are among
/// those that [`strip_request`] takes out.
pub struct Trusted<'a> {
    pub identity: Option<&'a Identity>,
    pub origin: &'a Origin,
    pub target: &'a Target,
    pub id: RequestId,
    /// Names this hop in the trace.
    pub span: u64,
    /// RFC 9440; with the thumbprint, by which a backend that looks at tokens itself can check them (RFC 8705 §3.1).
    pub certificate: Option<(&'a Client, ForwardCertificate)>,
}

impl Trusted<'_> {
    /// Calls `put` with each field.
    pub fn each(&self, put: &mut dyn FnMut(&HeaderName, &HeaderValue)) {
        for (name, value) in self.identity.map_or(&[][..], |identity| &identity.upstream_headers) {
            put(name, value);
        }
        put(&FORWARDED_FOR, &self.origin.address);
        put(&FORWARDED_HOST, &self.target.authority);
        put(&FORWARDED_PROTO, &HeaderValue::from_static("https"));
        put(&header::FORWARDED, &self.origin.forwarded);
        put(&TRACEPARENT, &self.id.traceparent(self.span));
        put(&REQUEST_ID, &self.id.header());
        let Some((client, forward)) = self.certificate else { return };
        if forward == ForwardCertificate::None {
            return;
        }
        put(&CLIENT_CERT, &client.own());
        put(&CLIENT_THUMBPRINT, &client.thumbprint());
        if let (ForwardCertificate::Chain, Some(issuers)) = (forward, client.issuers()) {
            put(&CLIENT_CERT_CHAIN, &issuers);
        }
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

/// What a policy says of the fields of answers, ready to be put in.
pub struct AnswerFields {
    set: Box<[(HeaderName, HeaderValue)]>,
    referrer_policy: HeaderValue,
    remove: Box<[HeaderName]>,
}

impl AnswerFields {
    /// Those of `policy`.
    #[must_use]
    pub fn of(policy: &Policy) -> Self {
        let hsts = policy.tls().hsts.as_deref().and_then(|value| HeaderValue::from_str(value).ok());
        let fields = policy.headers();
        let always = [(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))];
        let hsts = hsts.map(|hsts| (header::STRICT_TRANSPORT_SECURITY, hsts));
        Self {
            set: always.into_iter().chain(hsts).chain(fields.set.iter().cloned()).collect(),
            referrer_policy: fields.referrer_policy.clone(),
            remove: fields.remove.clone().into(),
        }
    }

    /// Takes out of an upstream's fields what ends here or tells too much.
    pub fn strip(&self, headers: &mut HeaderMap) {
        remove_nominated(headers);
        remove_where(headers, |name| {
            let text = name.as_str();
            is_hop_by_hop(text)
                || is_telltale(text)
                || text.starts_with(IDENTITY_PREFIX)
                || self.remove.contains(name)
        });
    }

    /// Adds what every answer carries.
    pub fn add(&self, headers: &mut HeaderMap, id: RequestId) {
        headers.reserve(self.set.len() + 2);
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        headers.entry(header::REFERRER_POLICY).or_insert_with(|| self.referrer_policy.clone());
        headers.insert(REQUEST_ID, id.header());
    }
}

/// Whether a client may name `field` in `Connection`: one that ends here anyway, or one that nothing relies on. To name
/// others is to have a proxy take away what the backend goes by.
pub fn may_be_nominated(field: &str) -> bool {
    // RFC 9110 §7.6.1: options that are no fields, and fields of one hop.
    const FINE: [&str; 7] =
        ["close", "keep-alive", "upgrade", "te", "trailer", "proxy-connection", "http2-settings"];
    let is = |other: &str| field.eq_ignore_ascii_case(other);
    FINE.into_iter().any(is)
        || !(RELIED_ON.into_iter().any(is)
            || is_ours(&field.to_ascii_lowercase())
            || field.get(..IDENTITY_PREFIX.len()).is_some_and(|it| it.eq_ignore_ascii_case(IDENTITY_PREFIX))
            || field.get(..4).is_some_and(|it| it.eq_ignore_ascii_case("sec-")))
}

/// What judgements, framing and caches go by.
const RELIED_ON: [&str; 17] = [
    "accept",
    "authorization",
    "cache-control",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "dpop",
    "expect",
    "host",
    "if-match",
    "if-none-match",
    "origin",
    "proxy-authorization",
    "range",
    "referer",
    "transfer-encoding",
];

/// Takes out what `Connection` nominates (RFC 9110 §7.6.1).
pub fn remove_nominated(headers: &mut HeaderMap) {
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
    fn what_is_added_was_taken_out_of_a_clients_fields() {
        let ours =
            [FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO, header::FORWARDED, TRACEPARENT, REQUEST_ID];
        let of_certificates = [CLIENT_CERT, CLIENT_THUMBPRINT, CLIENT_CERT_CHAIN];
        let mut headers = HeaderMap::new();
        for name in ours.into_iter().chain(of_certificates).chain(sealgate_policy::IDENTITY_HEADERS) {
            headers.append(name.clone(), HeaderValue::from_static("forged"));
            headers.append(name, HeaderValue::from_static("forged again"));
        }
        strip_request(&mut headers, false);
        assert!(headers.is_empty(), "{headers:?}");
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

    fn fields() -> AnswerFields {
        AnswerFields {
            set: Box::new([(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"))]),
            referrer_policy: HeaderValue::from_static("no-referrer"),
            remove: Box::new([HeaderName::from_static("x-debug")]),
        }
    }

    #[test]
    fn an_upstream_does_not_name_its_software_and_a_policy_may_silence_more() {
        let mut headers = map(&[
            ("server", "x/1.0"),
            ("x-powered-by", "y"),
            ("via", "z"),
            ("x-debug", "1"),
            ("content-type", "text/plain"),
        ]);
        fields().strip(&mut headers);
        let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["content-type"]);
    }

    #[test]
    fn a_policy_has_the_last_word_but_for_the_referrer() {
        let mut headers = map(&[("x-frame-options", "ALLOWALL"), ("referrer-policy", "same-origin")]);
        fields().add(&mut headers, RequestId::new(1));
        assert_eq!(headers["x-frame-options"], "DENY");
        assert_eq!(headers["referrer-policy"], "same-origin");
        let mut headers = HeaderMap::new();
        fields().add(&mut headers, RequestId::new(1));
        assert_eq!(headers["referrer-policy"], "no-referrer");
    }

    #[test]
    fn what_is_relied_on_cannot_be_nominated() {
        for fine in ["close", "Keep-Alive", "Upgrade", "TE", "X-Private", "", "HTTP2-Settings"] {
            assert!(may_be_nominated(fine), "{fine}");
        }
        for bad in
            ["Host", "X-Sealgate-Subject", "x-forwarded-for", "COOKIE", "Sec-WebSocket-Key", "Content-Length"]
        {
            assert!(!may_be_nominated(bad), "{bad}");
        }
    }
}
