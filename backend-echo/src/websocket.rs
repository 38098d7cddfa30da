//! Taking a WebSocket (RFC 6455 §4.2), and what is the same for all of ours.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use crate::problem::Problem;

pub(crate) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Longest message, in payload bytes over all fragments. What a user may send is the policy's business; this guards
/// our memory.
pub(crate) const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// How long the other side may take to answer a close.
const CLOSING: Duration = Duration::from_secs(5);

/// A handshake that was agreed to.
pub(crate) struct Accepted {
    /// The 101, to be sent.
    pub(crate) response: Response<Full<Bytes>>,
    pub(crate) upgrade: Upgrade,
}

/// A connection that is about to become a WebSocket.
pub(crate) struct Upgrade(OnUpgrade);

impl Upgrade {
    /// The socket, once the 101 was sent.
    pub(crate) async fn socket(self) -> Result<Socket, hyper::Error> {
        let stream = TokioIo::new(self.0.await?);
        Ok(WebSocketStream::from_raw_socket(stream, Role::Server, Some(config())).await)
    }
}

/// Whether a request asks for a WebSocket at all.
pub(crate) fn wanted(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
}

/// Answers 101 to a proper handshake.
///
/// The first of `offered` that is in the client's list is chosen.
///
/// # Errors
/// 400 for a malformed handshake, 405 for another method than GET, 426 for another version than 13.
pub(crate) fn accept(mut request: Request<Incoming>, offered: &[&'static str]) -> Result<Accepted, Problem> {
    let key = judge(request.method(), request.headers())?;
    let chosen = subprotocol(request.headers(), offered);

    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, key);
    if let Some(name) = chosen {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }

    Ok(Accepted { response, upgrade: Upgrade(hyper::upgrade::on(&mut request)) })
}

/// The subprotocol that [`accept`] would choose.
pub(crate) fn subprotocol(headers: &HeaderMap, offered: &[&'static str]) -> Option<&'static str> {
    let list: Vec<&str> = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(str::trim))
        .collect();
    offered.iter().copied().find(|name| list.contains(name))
}

/// Closes in order: sends the code, waits for the answer, but not for ever.
pub(crate) async fn close(mut socket: Socket, code: u16, reason: &'static str) {
    let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
    let closing = async {
        if socket.close(Some(frame)).await.is_ok() {
            while let Some(Ok(_)) = socket.next().await {}
        }
    };
    let _ = tokio::time::timeout(CLOSING, closing).await;
}

/// The close code for what is wrong with a peer's frames; none if the stream itself is gone.
pub(crate) fn close_code(error: &Error) -> Option<(u16, &'static str)> {
    match error {
        Error::Capacity(CapacityError::MessageTooLong { .. }) => Some((1009, "message-too-big")),
        Error::Utf8(_) => Some((1007, "not-utf-8")),
        Error::Protocol(_) => Some((1002, "protocol-error")),
        _ => None,
    }
}

fn judge(method: &Method, headers: &HeaderMap) -> Result<HeaderValue, Problem> {
    if method != Method::GET {
        return Err(Problem::method("GET"));
    }
    let lists = |name: header::HeaderName, wanted: &str| {
        headers.get_all(name).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|text| text.split(',').any(|item| item.trim().eq_ignore_ascii_case(wanted)))
        })
    };
    if !lists(header::CONNECTION, "upgrade") || !lists(header::UPGRADE, "websocket") {
        return Err(Problem::malformed("an upgrade goes to `websocket` only, and Connection must name it"));
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let problem =
            Problem::new(StatusCode::UPGRADE_REQUIRED, "version", "the WebSocket version must be 13");
        return Err(problem.header(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13")));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default();
    if STANDARD.decode(key).map_or(0, |nonce| nonce.len()) != 16 {
        return Err(Problem::malformed("Sec-WebSocket-Key must be 16 bytes in base64"));
    }
    HeaderValue::from_str(&derive_accept_key(key)).map_err(|error| Problem::internal(&error))
}

fn config() -> WebSocketConfig {
    // Small buffers: thousands of idle sockets are the usual state. Both grow with what is in flight.
    WebSocketConfig::default()
        .read_buffer_size(4 * 1024)
        .write_buffer_size(16 * 1024)
        .max_write_buffer_size(2 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("WebSocket"));
        headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.insert(header::SEC_WEBSOCKET_KEY, HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        headers
    }

    #[test]
    fn the_accept_value_is_that_of_rfc_6455() {
        assert_eq!(judge(&Method::GET, &handshake()).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_wrong_handshake_is_refused() {
        assert_eq!(judge(&Method::POST, &handshake()).unwrap_err().status, StatusCode::METHOD_NOT_ALLOWED);
        let wrong = |name: header::HeaderName, value: &'static str| {
            let mut headers = handshake();
            headers.insert(name, HeaderValue::from_static(value));
            judge(&Method::GET, &headers).unwrap_err().status
        };
        assert_eq!(wrong(header::SEC_WEBSOCKET_VERSION, "8"), StatusCode::UPGRADE_REQUIRED);
        assert_eq!(wrong(header::SEC_WEBSOCKET_KEY, "c2hvcnQ="), StatusCode::BAD_REQUEST);
        assert_eq!(wrong(header::UPGRADE, "h2c"), StatusCode::BAD_REQUEST);
        assert_eq!(wrong(header::CONNECTION, "close"), StatusCode::BAD_REQUEST);
    }

    #[test]
    fn our_subprotocol_is_found_in_the_list() {
        let mut headers = HeaderMap::new();
        assert_eq!(subprotocol(&headers, &["echo.v1"]), None);
        headers.append(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("chat, echo.v1"));
        assert_eq!(subprotocol(&headers, &["echo.v1"]), Some("echo.v1"));
        assert_eq!(subprotocol(&headers, &["im.v1.json"]), None);
    }
}
