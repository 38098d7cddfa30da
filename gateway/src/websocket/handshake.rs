//! The opening handshake (RFC 6455 §4), both sides of the gateway: judging the shape of a client's
//! upgrade request, and asking the upstream for a WebSocket of our own.
//!
//! No extension is ever agreed on with an upstream: a client's offers (browsers offer `permessage-deflate`) are not
//! forwarded, and an upstream that accepts one regardless is refused. So what passes is what was judged. With the
//! client, [`super::deflate`] may agree on compression, by policy.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use sealgate_policy::Denial;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::deflate::is_token_byte;

/// How an access token stands in the subprotocol list, where browsers can put one: `sealgate.bearer.<jwt>`.
/// Such an entry is neither forwarded nor ever chosen.
pub const BEARER_PREFIX: &str = "sealgate.bearer.";

/// Most subprotocols in one offer.
pub const MAX_SUBPROTOCOLS: usize = 16;

/// Longest response head taken from an upstream, in bytes.
pub const MAX_RESPONSE_HEAD: usize = 16 * 1024;

/// Most header fields taken from an upstream.
const MAX_RESPONSE_HEADERS: usize = 100;

/// Appended to the key before it is hashed (§1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const UPGRADE_TOKEN: HeaderValue = HeaderValue::from_static("Upgrade");

/// A client's upgrade request that keeps §4.2.1.
#[derive(Debug)]
pub struct Offer {
    /// `None` over HTTP/2, which has no key to answer (RFC 8441 §5).
    accept: Option<HeaderValue>,
    subprotocols: Vec<Box<str>>,
}

impl Offer {
    /// Checks an HTTP/1.1 upgrade request, or an extended CONNECT (RFC 8441): what the rules of the policy do not.
    ///
    /// # Errors
    /// [`Denial::MethodNotAllowed`] unless it is a `GET`, or over HTTP/2 a `CONNECT`; [`Denial::UpgradeRequired`] for another version than
    /// 13 (answer 426 with [`SUPPORTED_VERSION`]); [`Denial::Malformed`] for anything else.
    pub fn read(method: &Method, version: Version, headers: &HeaderMap) -> Result<Offer, Denial> {
        let http2 = version == Version::HTTP_2;
        let opening = if http2 { Method::CONNECT } else { Method::GET };
        if method != opening {
            return Err(Denial::MethodNotAllowed { allow: opening.as_str().into() });
        }
        if !http2 {
            if version != Version::HTTP_11 {
                return Err(malformed("a WebSocket upgrade needs HTTP/1.1"));
            }
            if !names_token(headers, &CONNECTION, "upgrade") {
                return Err(malformed("Connection does not name upgrade"));
            }
            match single(headers, &UPGRADE) {
                Some(upgrade) if upgrade.as_bytes().eq_ignore_ascii_case(b"websocket") => {}
                _ => return Err(malformed("Upgrade is not websocket alone")),
            }
        }
        if headers.contains_key(TRANSFER_ENCODING)
            || headers.get_all(CONTENT_LENGTH).iter().any(|length| length != "0")
        {
            return Err(malformed("a WebSocket upgrade has no body"));
        }
        match single(headers, &SEC_WEBSOCKET_VERSION) {
            Some(version) if version == "13" => {}
            Some(_) => return Err(Denial::UpgradeRequired),
            None => return Err(malformed("Sec-WebSocket-Version is not there once")),
        }
        let accept = match http2 {
            true => None,
            false => {
                let key = single(headers, &SEC_WEBSOCKET_KEY)
                    .filter(|key| is_key(key.as_bytes()))
                    .ok_or(malformed("Sec-WebSocket-Key is not 16 bytes in base64, once"))?;
                Some(HeaderValue::from_str(&accept_for(key.as_bytes())).map_err(|_| Denial::Internal)?)
            }
        };
        Ok(Offer { accept, subprotocols: offered_subprotocols(headers)? })
    }

    /// The client's subprotocols that are also `allowed`, in the client's order: what is offered upstream.
    ///
    /// # Errors
    /// [`Denial::SubprotocolNotAllowed`] if there is none and the policy demands one.
    pub fn subprotocols(&self, allowed: &[String], required: bool) -> Result<Vec<&str>, Denial> {
        let offered = self.subprotocols.iter().map(|name| &**name);
        let common: Vec<&str> =
            offered.filter(|name| allowed.iter().any(|allowed| allowed == name)).collect();
        match common.is_empty() && required {
            true => Err(Denial::SubprotocolNotAllowed),
            false => Ok(common),
        }
    }

    /// What accepts: 101, or 200 to an extended CONNECT (RFC 8441 §5).
    pub fn status(&self) -> StatusCode {
        match self.accept {
            Some(_) => StatusCode::SWITCHING_PROTOCOLS,
            None => StatusCode::OK,
        }
    }

    /// Headers of the answer that accepts; `subprotocol` is the upstream's choice.
    pub fn answer(
        &self,
        subprotocol: Option<&HeaderValue>,
    ) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let subprotocol = subprotocol.map(|name| (SEC_WEBSOCKET_PROTOCOL, name.clone()));
        let accept = self.accept.clone().map(|accept| {
            [(CONNECTION, UPGRADE_TOKEN), (UPGRADE, WEBSOCKET), (SEC_WEBSOCKET_ACCEPT, accept)]
        });
        accept.into_iter().flatten().chain(subprotocol)
    }
}

/// Header that goes with every 426 (§4.2.2).
pub const SUPPORTED_VERSION: (HeaderName, HeaderValue) =
    (SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));

/// Subprotocols in the client's order, without the token.
///
/// # Errors
/// [`Denial::Malformed`] if one is not a token (RFC 9110 §5.6.2), stands twice, or there are too many.
pub fn offered_subprotocols(headers: &HeaderMap) -> Result<Vec<Box<str>>, Denial> {
    let mut names: Vec<Box<str>> = Vec::new();
    for list in headers.get_all(SEC_WEBSOCKET_PROTOCOL) {
        let list = list.to_str().map_err(|_| malformed("Sec-WebSocket-Protocol is not a list of tokens"))?;
        for name in list.split(',').map(|name| name.trim_matches([' ', '\t'])) {
            if !is_token(name) {
                return Err(malformed("Sec-WebSocket-Protocol is not a list of tokens"));
            }
            if name.starts_with(BEARER_PREFIX) {
                continue;
            }
            if names.len() == MAX_SUBPROTOCOLS || names.iter().any(|known| **known == *name) {
                return Err(malformed("Sec-WebSocket-Protocol names one twice, or too many"));
            }
            names.push(name.into());
        }
    }
    Ok(names)
}

/// Our own upgrade request to an upstream, and what its answer has to match.
#[derive(Debug)]
pub struct UpstreamRequest {
    head: Vec<u8>,
    expect: Expected,
}

/// What a 101 must say for it to be the answer to our request.
#[derive(Debug, Clone)]
pub struct Expected {
    /// `Sec-WebSocket-Accept` for our key.
    pub accept: String,
    /// Subprotocols that we offered.
    pub subprotocols: Vec<String>,
}

/// The upstream agreed.
#[derive(Debug)]
pub struct Switched {
    /// The subprotocol that it chose among the offered, if any.
    pub subprotocol: Option<HeaderValue>,
    /// Bytes of its first frames that came with the head.
    pub early: Bytes,
}

/// Why there is no WebSocket to the upstream.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The request would not be well-formed; nothing was sent.
    #[error("request head would not be well-formed")]
    Request,
    /// No randomness for the key.
    #[error("no randomness")]
    Random,
    /// The connection broke, or ended before the answer did.
    #[error("upstream connection failed: {0}")]
    Io(#[from] io::Error),
    /// The head is too long, has too many fields, or is not HTTP/1.1.
    #[error("upstream answer is not acceptable HTTP/1.1")]
    NotHttp,
    /// It answered with another status; the service may pass it on.
    #[error("upstream answered {0}")]
    Status(StatusCode),
    /// A 101 that breaks RFC 6455 §4.1.
    #[error("upstream handshake: {0}")]
    NotAgreed(&'static str),
}

impl UpstreamRequest {
    /// Writes the request head, with a fresh key.
    ///
    /// `target` is path and query as judged, `host` goes into `Host`. Of `headers`, those that belong to one
    /// hop or to the handshake itself are left out.
    ///
    /// # Errors
    /// [`UpstreamError::Request`] if `target`, `host` or a subprotocol could break out of its line;
    /// [`UpstreamError::Random`].
    pub fn new<'a>(
        target: &str,
        host: &str,
        headers: impl IntoIterator<Item = (&'a HeaderName, &'a HeaderValue)>,
        subprotocols: &[&str],
    ) -> Result<UpstreamRequest, UpstreamError> {
        let is_visible = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !target.starts_with('/') || !is_visible(target) || !is_visible(host) {
            return Err(UpstreamError::Request);
        }
        if !subprotocols.iter().all(|name| is_token(name)) {
            return Err(UpstreamError::Request);
        }
        let mut nonce = [0; 16];
        SystemRandom::new().fill(&mut nonce).map_err(|_| UpstreamError::Random)?;
        let key = STANDARD.encode(nonce);

        let mut head = Vec::with_capacity(1024);
        head.extend_from_slice(b"GET ");
        head.extend_from_slice(target.as_bytes());
        head.extend_from_slice(b" HTTP/1.1\r\nhost: ");
        head.extend_from_slice(host.as_bytes());
        head.extend_from_slice(b"\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13");
        head.extend_from_slice(b"\r\nsec-websocket-key: ");
        head.extend_from_slice(key.as_bytes());
        if !subprotocols.is_empty() {
            head.extend_from_slice(b"\r\nsec-websocket-protocol: ");
            head.extend_from_slice(subprotocols.join(", ").as_bytes());
        }
        for (name, value) in headers.into_iter().filter(|(name, _)| is_forwarded(name)) {
            head.extend_from_slice(b"\r\n");
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            // INVARIANT: `HeaderValue` holds no CR, LF or NUL.
            head.extend_from_slice(value.as_bytes());
        }
        head.extend_from_slice(b"\r\n\r\n");
        let subprotocols = subprotocols.iter().map(|&name| name.to_owned()).collect();
        Ok(UpstreamRequest { head, expect: Expected { accept: accept_for(key.as_bytes()), subprotocols } })
    }

    /// Sends the request and reads the answer. Has no deadline of its own.
    ///
    /// # Errors
    /// Any but [`UpstreamError::Request`] and [`UpstreamError::Random`]; drop the stream then.
    pub async fn exchange<U>(self, stream: &mut U) -> Result<Switched, UpstreamError>
    where
        U: AsyncRead + AsyncWrite + Unpin,
    {
        stream.write_all(&self.head).await?;
        stream.flush().await?;
        let mut answer = Vec::with_capacity(1024);
        loop {
            let room = MAX_RESPONSE_HEAD.saturating_sub(answer.len());
            if room == 0 {
                return Err(UpstreamError::NotHttp);
            }
            if (&mut *stream).take(room as u64).read_buf(&mut answer).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if let Some((len, subprotocol)) = read_response(&answer, &self.expect)? {
                let early = Bytes::copy_from_slice(answer.get(len..).unwrap_or_default());
                return Ok(Switched { subprotocol, early });
            }
        }
    }
}

/// Reads the head of an upstream's answer: how long it is, and the subprotocol chosen. `None` while incomplete.
///
/// # Errors
/// As [`UpstreamRequest::exchange`], but for I/O.
pub fn read_response(
    answer: &[u8],
    expect: &Expected,
) -> Result<Option<(usize, Option<HeaderValue>)>, UpstreamError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_RESPONSE_HEADERS];
    let mut response = httparse::Response::new(&mut fields);
    let len = match response.parse(answer) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(UpstreamError::NotHttp),
    };
    let head = answer.get(..len).unwrap_or_default();
    // httparse takes a bare LF as a line end, empty lines in front, and HTTP/1.0.
    if !head.starts_with(b"HTTP/1.1 ") || has_bare_line_feed(head) {
        return Err(UpstreamError::NotHttp);
    }
    let status =
        response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(UpstreamError::NotHttp)?;
    if status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(UpstreamError::Status(status));
    }

    let mut headers = HeaderMap::with_capacity(response.headers.len());
    for field in response.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| UpstreamError::NotHttp)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| UpstreamError::NotHttp)?;
        headers.append(name, value);
    }
    if headers.contains_key(CONTENT_LENGTH) || headers.contains_key(TRANSFER_ENCODING) {
        return Err(UpstreamError::NotAgreed("101 with a body"));
    }
    if !names_token(&headers, &CONNECTION, "upgrade") {
        return Err(UpstreamError::NotAgreed("Connection does not name upgrade"));
    }
    match single(&headers, &UPGRADE) {
        Some(upgrade) if upgrade.as_bytes().eq_ignore_ascii_case(b"websocket") => {}
        _ => return Err(UpstreamError::NotAgreed("Upgrade is not websocket alone")),
    }
    match single(&headers, &SEC_WEBSOCKET_ACCEPT) {
        Some(accept) if accept.as_bytes() == expect.accept.as_bytes() => {}
        _ => {
            return Err(UpstreamError::NotAgreed("Sec-WebSocket-Accept does not fit the key"));
        }
    }
    if headers.contains_key(SEC_WEBSOCKET_EXTENSIONS) {
        return Err(UpstreamError::NotAgreed("extension that was not offered"));
    }
    let subprotocol = match headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
        false => None,
        true => match single(&headers, &SEC_WEBSOCKET_PROTOCOL) {
            Some(name) if expect.subprotocols.iter().any(|offered| offered == name) => Some(name.clone()),
            _ => return Err(UpstreamError::NotAgreed("subprotocol that was not offered")),
        },
    };
    Ok(Some((len, subprotocol)))
}

/// `Sec-WebSocket-Accept` for a key (§4.2.2).
pub fn accept_for(key: &[u8]) -> String {
    let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key);
    hash.update(GUID);
    STANDARD.encode(hash.finish())
}

fn malformed(detail: &'static str) -> Denial {
    Denial::Malformed { detail }
}

fn is_key(key: &[u8]) -> bool {
    let mut nonce = [0; 18];
    key.len() == 24 && STANDARD.decode_slice(key, &mut nonce).is_ok_and(|len| len == 16)
}

/// The value of a field that stands exactly once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Whether a comma-separated field names a token, in any case (RFC 9110 §7.6.1).
fn names_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// RFC 9110 §5.6.2.
fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(is_token_byte)
}

/// Not of one hop (RFC 9110 §7.6.1), and not of the handshake, which we hold ourselves.
fn is_forwarded(name: &HeaderName) -> bool {
    let own = [CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    let prefixes = ["sec-websocket-", "proxy-"];
    !own.contains(name)
        && name.as_str() != "keep-alive"
        && name.as_str() != "http2-settings"
        && !prefixes.iter().any(|prefix| name.as_str().starts_with(prefix))
}

fn has_bare_line_feed(head: &[u8]) -> bool {
    head.split_inclusive(|&byte| byte == b'\n').any(|line| line.ends_with(b"\n") && !line.ends_with(b"\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

    fn upgrade(change: impl FnOnce(&mut HeaderMap)) -> Result<Offer, Denial> {
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("WebSocket"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.insert(SEC_WEBSOCKET_KEY, HeaderValue::from_static(KEY));
        change(&mut headers);
        Offer::read(&Method::GET, Version::HTTP_11, &headers)
    }

    fn set(name: HeaderName, value: &'static str) -> impl FnOnce(&mut HeaderMap) {
        move |headers| drop(headers.insert(name, HeaderValue::from_static(value)))
    }

    fn add(name: HeaderName, value: &'static str) -> impl FnOnce(&mut HeaderMap) {
        move |headers| {
            headers.append(name, HeaderValue::from_static(value));
        }
    }

    fn take(name: HeaderName) -> impl FnOnce(&mut HeaderMap) {
        move |headers| drop(headers.remove(name))
    }

    #[test]
    fn the_example_of_rfc_6455_section_1_3() {
        let offer = upgrade(|_| ()).unwrap();
        let answer: HeaderMap = offer.answer(Some(&HeaderValue::from_static("chat"))).collect();
        assert_eq!(answer[SEC_WEBSOCKET_ACCEPT], ACCEPT);
        assert_eq!(answer[SEC_WEBSOCKET_PROTOCOL], "chat");
        assert_eq!(answer[UPGRADE], "websocket");
        assert_eq!(offer.answer(None).count(), 3);
    }

    #[test]
    fn what_breaks_section_4_2_1_is_refused() {
        let is_malformed = |result: Result<Offer, Denial>| {
            assert!(matches!(result, Err(Denial::Malformed { .. })), "{result:?}");
        };
        is_malformed(upgrade(take(CONNECTION)));
        is_malformed(upgrade(set(CONNECTION, "keep-alive")));
        is_malformed(upgrade(take(UPGRADE)));
        is_malformed(upgrade(set(UPGRADE, "websocket, h2c")));
        is_malformed(upgrade(add(UPGRADE, "websocket")));
        is_malformed(upgrade(take(SEC_WEBSOCKET_VERSION)));
        is_malformed(upgrade(add(SEC_WEBSOCKET_VERSION, "13")));
        is_malformed(upgrade(take(SEC_WEBSOCKET_KEY)));
        is_malformed(upgrade(add(SEC_WEBSOCKET_KEY, KEY)));
        is_malformed(upgrade(set(SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ")));
        is_malformed(upgrade(set(SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZWE=")));
        is_malformed(upgrade(set(SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25j!Q==")));
        is_malformed(upgrade(set(CONTENT_LENGTH, "1")));
        is_malformed(upgrade(set(TRANSFER_ENCODING, "chunked")));
        assert!(upgrade(set(CONTENT_LENGTH, "0")).is_ok());

        assert_eq!(upgrade(set(SEC_WEBSOCKET_VERSION, "8")).unwrap_err(), Denial::UpgradeRequired);
        let headers = HeaderMap::new();
        assert!(matches!(
            Offer::read(&Method::POST, Version::HTTP_11, &headers),
            Err(Denial::MethodNotAllowed { .. })
        ));
        is_malformed(Offer::read(&Method::GET, Version::HTTP_10, &headers));
    }

    #[test]
    fn an_extended_connect_needs_no_key_and_gets_no_accept() {
        let connect = |change: fn(&mut HeaderMap)| {
            let mut headers = HeaderMap::new();
            headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("chat"));
            change(&mut headers);
            Offer::read(&Method::CONNECT, Version::HTTP_2, &headers)
        };
        let is_malformed = |offer: Result<Offer, Denial>| {
            assert!(matches!(offer, Err(Denial::Malformed { .. })), "{offer:?}");
        };
        let offer = connect(|_| ()).unwrap();
        assert_eq!(offer.status(), StatusCode::OK);
        let answer: HeaderMap = offer.answer(Some(&HeaderValue::from_static("chat"))).collect();
        assert_eq!(answer.len(), 1);
        assert_eq!(answer[SEC_WEBSOCKET_PROTOCOL], "chat");
        is_malformed(connect(|headers| drop(headers.remove(SEC_WEBSOCKET_VERSION))));
        is_malformed(connect(|headers| drop(headers.insert(CONTENT_LENGTH, HeaderValue::from_static("1")))));
        let old =
            connect(|headers| drop(headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("8"))));
        assert_eq!(old.unwrap_err(), Denial::UpgradeRequired);
        let headers = HeaderMap::new();
        for (method, version) in [(Method::GET, Version::HTTP_2), (Method::CONNECT, Version::HTTP_11)] {
            let refused = Offer::read(&method, version, &headers);
            assert!(matches!(refused, Err(Denial::MethodNotAllowed { .. })), "{method} {version:?}");
        }
        assert_eq!(upgrade(|_| ()).unwrap().status(), StatusCode::SWITCHING_PROTOCOLS);
    }

    #[test]
    fn subprotocols_are_agreed_on_without_the_token() {
        let allowed = ["im.v1.json".to_owned(), "im.v2.json".to_owned()];
        let offer = upgrade(|headers| {
            add(SEC_WEBSOCKET_PROTOCOL, "other, sealgate.bearer.e30.e30.c2ln")(headers);
            add(SEC_WEBSOCKET_PROTOCOL, "im.v2.json,\tim.v1.json")(headers);
        })
        .unwrap();
        assert_eq!(offer.subprotocols(&allowed, true).unwrap(), ["im.v2.json", "im.v1.json"]);
        assert!(offer.subprotocols(&[], false).unwrap().is_empty());
        let foreign = ["sealgate.bearer.e30.e30.c2ln".to_owned()];
        assert_eq!(offer.subprotocols(&foreign, true).unwrap_err(), Denial::SubprotocolNotAllowed);

        let none = upgrade(set(SEC_WEBSOCKET_PROTOCOL, "sealgate.bearer.e30.e30.c2ln")).unwrap();
        assert!(none.subprotocols(&allowed, false).unwrap().is_empty());
        assert_eq!(none.subprotocols(&allowed, true).unwrap_err(), Denial::SubprotocolNotAllowed);

        for wrong in ["", "a,,b", "a b", "a, a", "ä", "a(b)"] {
            let offer = upgrade(|headers| {
                headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_bytes(wrong.as_bytes()).unwrap());
            });
            assert!(matches!(offer, Err(Denial::Malformed { .. })), "{wrong}");
        }
        let many = (0..=MAX_SUBPROTOCOLS).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        assert!(
            upgrade(|headers| {
                headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_str(&many).unwrap());
            })
            .is_err()
        );
    }

    fn request() -> UpstreamRequest {
        let mut headers = HeaderMap::new();
        headers.insert("x-sealgate-subject", HeaderValue::from_static("alice"));
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(HOST, HeaderValue::from_static("evil"));
        headers.insert(SEC_WEBSOCKET_EXTENSIONS, HeaderValue::from_static("permessage-deflate"));
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("sealgate.bearer.x"));
        UpstreamRequest::new("/v1/ws?a=1", "backend", &headers, &["im.v1.json"]).unwrap()
    }

    #[test]
    fn the_request_has_what_the_handshake_needs_and_no_offers_of_the_client() {
        let request = request();
        let head = String::from_utf8(request.head).unwrap();
        assert!(head.starts_with("GET /v1/ws?a=1 HTTP/1.1\r\nhost: backend\r\n"), "{head}");
        assert!(head.ends_with("\r\nx-sealgate-subject: alice\r\n\r\n"), "{head}");
        assert!(head.contains("\r\nsec-websocket-protocol: im.v1.json\r\n"), "{head}");
        assert!(!head.contains("deflate") && !head.contains("bearer") && !head.contains("evil"), "{head}");
        let key = head.split("sec-websocket-key: ").nth(1).unwrap().split("\r\n").next().unwrap();
        assert!(is_key(key.as_bytes()));
        assert_eq!(accept_for(key.as_bytes()), request.expect.accept);
    }

    #[test]
    fn a_request_cannot_be_broken_out_of() {
        let none = HeaderMap::new();
        for (target, host, subprotocol) in [
            ("/a b", "h", "p"),
            ("/a\r\n", "h", "p"),
            ("a", "h", "p"),
            ("", "h", "p"),
            ("/", "", "p"),
            ("/", "h\r\nx: y", "p"),
            ("/", "h", "p, q"),
        ] {
            let request = UpstreamRequest::new(target, host, &none, &[subprotocol]);
            assert!(matches!(request, Err(UpstreamError::Request)), "{target} {host} {subprotocol}");
        }
    }

    fn read(answer: &str) -> Result<Option<(usize, Option<HeaderValue>)>, UpstreamError> {
        let expect = Expected { accept: ACCEPT.into(), subprotocols: vec!["chat".into(), "talk".into()] };
        read_response(answer.as_bytes(), &expect)
    }

    const GOOD: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";

    #[test]
    fn an_answer_that_agrees() {
        assert!(read("HTTP/1.1 101 Swi").unwrap().is_none());
        assert!(read(GOOD).unwrap().is_none());
        let (len, subprotocol) = read(&format!("{GOOD}\r\nearly")).unwrap().unwrap();
        assert_eq!((len, subprotocol), (GOOD.len() + 2, None));
        let (_, subprotocol) = read(&format!("{GOOD}Sec-WebSocket-Protocol: talk\r\n\r\n")).unwrap().unwrap();
        assert_eq!(subprotocol.unwrap(), "talk");
    }

    #[test]
    fn an_answer_that_does_not() {
        let not_agreed = |answer: String| {
            assert!(matches!(read(&answer), Err(UpstreamError::NotAgreed(_))), "{answer}");
        };
        not_agreed(format!("{GOOD}Content-Length: 0\r\n\r\n"));
        not_agreed(format!("{GOOD}Transfer-Encoding: chunked\r\n\r\n"));
        not_agreed(format!("{GOOD}Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"));
        not_agreed(format!("{GOOD}Sec-WebSocket-Protocol: other\r\n\r\n"));
        not_agreed(format!("{GOOD}Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Protocol: chat\r\n\r\n"));
        not_agreed(format!("{GOOD}Sec-WebSocket-Accept: {ACCEPT}\r\n\r\n"));
        not_agreed(format!("{GOOD}Upgrade: websocket\r\n\r\n"));
        not_agreed(GOOD.replace("s3p", "S3p") + "\r\n");
        not_agreed(GOOD.replace("Connection: Upgrade", "Connection: close") + "\r\n");

        for status in [200, 302, 401, 404, 500] {
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n");
            assert!(matches!(read(&answer), Err(UpstreamError::Status(got)) if got == status));
        }
        for answer in [
            GOOD.replace("HTTP/1.1", "HTTP/1.0") + "\r\n",
            GOOD.replace("\r\nUpgrade", "\nUpgrade") + "\r\n",
            format!("\r\n{GOOD}\r\n"),
            "SSH-2.0-OpenSSH\r\n\r\n".into(),
            format!("{GOOD} folded\r\n\r\n"),
            format!("{GOOD}{}\r\n", "a: b\r\n".repeat(100)),
        ] {
            assert!(matches!(read(&answer), Err(UpstreamError::NotHttp)), "{answer}");
        }
    }

    #[tokio::test]
    async fn early_bytes_are_handed_back() {
        let (mut ours, mut theirs) = tokio::io::duplex(1024);
        let request = request();
        let answer = format!(
            "HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n\u{1}",
            request.expect.accept
        );
        theirs.write_all(answer.as_bytes()).await.unwrap();
        let switched = request.exchange(&mut ours).await.unwrap();
        assert_eq!(&switched.early[..], [1]);
        let mut sent = vec![0; 4];
        theirs.read_exact(&mut sent).await.unwrap();
        assert_eq!(sent, b"GET ");
    }

    #[tokio::test]
    async fn an_endless_head_and_a_short_one_are_refused() {
        let (mut ours, mut theirs) = tokio::io::duplex(64 * 1024);
        theirs.write_all(b"HTTP/1.1 101 X\r\nx: ").await.unwrap();
        theirs.write_all(&[b'a'; MAX_RESPONSE_HEAD]).await.unwrap();
        assert!(matches!(request().exchange(&mut ours).await, Err(UpstreamError::NotHttp)));

        let (mut ours, mut theirs) = tokio::io::duplex(64 * 1024);
        theirs.write_all(b"HTTP/1.1 101 X\r\n").await.unwrap();
        theirs.shutdown().await.unwrap();
        assert!(matches!(request().exchange(&mut ours).await, Err(UpstreamError::Io(_))));
    }
}
