//! The way to the backend: HTTPS and WSS through the gateway.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Method, Request, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::{ClientRequestBuilder, IntoClientRequest};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};
use zeroize::Zeroizing;

use crate::login::Granted;
use crate::tls;
use crate::wire::{DeviceAddress, FromDevice, MAX_CIPHERTEXT, SUBPROTOCOL, ToDevice};

/// How long connecting may take, TLS included.
const CONNECT: Duration = Duration::from_secs(10);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest answer read, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

pub(super) struct Gateway {
    host: String,
    port: u16,
    tls: TlsConnector,
    name: ServerName<'static>,
    address: DeviceAddress,
    token: Zeroizing<String>,
    connection: Option<SendRequest<Full<Bytes>>>,
}

/// The gateway or the backend said no. Trying again will not help.
#[derive(Debug, thiserror::Error)]
#[error("{detail} ({reason})")]
pub(super) struct Refused {
    reason: String,
    detail: String,
}

impl Refused {
    pub(super) fn is(&self, reason: &str) -> bool {
        self.reason == reason
    }
}

impl Gateway {
    /// # Errors
    /// If `url` is not `https:`: nothing is ever sent in the clear.
    pub(super) fn new(url: &Uri, ca: &Path, address: &DeviceAddress) -> anyhow::Result<Self> {
        if url.scheme_str() != Some("https") {
            bail!("the gateway's URL must begin with https://");
        }
        let host = url.host().context("the gateway's URL names no host")?.to_owned();
        let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(name).context("the gateway's URL names no proper host")?;

        let mut roots = RootCertStore::empty();
        for authority in tls::certificates(ca)? {
            roots.add(authority).with_context(|| format!("{} is no authority", ca.display()))?;
        }
        let mut config = ClientConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            host,
            port: url.port_u16().unwrap_or(443),
            tls: TlsConnector::from(Arc::new(config)),
            name,
            address: address.clone(),
            token: Zeroizing::default(),
            connection: None,
        })
    }

    /// Gets a token for this device, by the development login.
    pub(super) async fn log_in(&mut self) -> anyhow::Result<()> {
        self.token = Zeroizing::default();
        let wanted = json!({ "user": self.address.user, "device": self.address.device });
        let granted: Granted = self.post("/v1/dev/login", &wanted).await.context("cannot log in")?;
        self.token = Zeroizing::new(granted.access_token);
        Ok(())
    }

    pub(super) async fn get<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<T> {
        self.ask(Method::GET, path, None).await
    }

    pub(super) async fn put<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.ask(Method::PUT, path, Some(serde_json::to_vec(body)?)).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.ask(Method::POST, path, Some(serde_json::to_vec(body)?)).await
    }

    /// A `POST` that says everything with its path.
    pub(super) async fn post_to<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<T> {
        self.ask(Method::POST, path, None).await
    }

    async fn ask<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<T> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, self.authority());
        if !self.token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token.as_str()));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())))?;

        let response = tokio::time::timeout(ANSWER, self.connection().await?.send_request(request)).await;
        let response = response.context("the gateway took too long")?.context("the gateway broke off")?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect();
        let body = tokio::time::timeout(ANSWER, body).await.context("the gateway took too long")?;
        let body = body.map_err(|error| anyhow!(error)).context("the answer broke off")?.to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&body).context("the answer is not what it should be");
        }
        let refused = refused(status, &body);
        // Too fast, or out of order for a while: that may pass.
        if status.is_server_error() || status == http::StatusCode::TOO_MANY_REQUESTS {
            bail!("{refused}");
        }
        Err(refused.into())
    }

    /// The open connection, or a new one.
    async fn connection(&mut self) -> anyhow::Result<&mut SendRequest<Full<Bytes>>> {
        let mut kept = self.connection.take();
        if let Some(open) = &mut kept
            && open.ready().await.is_err()
        {
            kept = None;
        }
        let open = match kept {
            Some(open) => open,
            None => {
                let (sender, connection) = http1::handshake(TokioIo::new(self.connect().await?)).await?;
                // Ends with the sender. Its error comes out of the request that it broke.
                tokio::spawn(connection);
                sender
            }
        };
        Ok(self.connection.insert(open))
    }

    async fn connect(&self) -> anyhow::Result<TlsStream<TcpStream>> {
        let connecting = async {
            let host = self.host.trim_start_matches('[').trim_end_matches(']');
            let stream = TcpStream::connect((host, self.port)).await?;
            stream.set_nodelay(true)?;
            self.tls.connect(self.name.clone(), stream).await
        };
        let connected = tokio::time::timeout(CONNECT, connecting).await.map_err(std::io::Error::from);
        connected
            .and_then(|stream| stream)
            .with_context(|| format!("cannot reach the gateway at {}", self.authority()))
    }

    fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Opens `/v1/stream`.
    pub(super) async fn stream(&self) -> anyhow::Result<Stream> {
        let uri: Uri = format!("wss://{}/v1/stream", self.authority()).parse()?;
        let request = ClientRequestBuilder::new(uri)
            .with_header(header::AUTHORIZATION.as_str(), format!("Bearer {}", self.token.as_str()))
            .with_sub_protocol(SUBPROTOCOL)
            .into_client_request()?;
        // A ciphertext in base64, and room for what stands around it.
        let limit = Some(2 * MAX_CIPHERTEXT);
        let config = WebSocketConfig::default()
            .read_buffer_size(16 * 1024)
            .max_message_size(limit)
            .max_frame_size(limit);
        let opening =
            tokio_tungstenite::client_async_with_config(request, self.connect().await?, Some(config));
        match tokio::time::timeout(ANSWER, opening).await.context("the gateway took too long")? {
            Ok((socket, _)) => Ok(Stream(socket)),
            Err(Error::Http(response)) if response.status().is_client_error() => {
                Err(refused(response.status(), response.body().as_deref().unwrap_or_default()).into())
            }
            Err(error) => Err(error).context("cannot open the stream"),
        }
    }
}

/// The open `/v1/stream`.
pub(super) struct Stream(WebSocketStream<TlsStream<TcpStream>>);

impl Stream {
    /// The next message. Cancel-safe.
    ///
    /// # Errors
    /// When the stream ended, and why.
    pub(super) async fn next(&mut self) -> anyhow::Result<ToDevice> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => {
                    return serde_json::from_str(text.as_str()).context("a message is not what it should be");
                }
                Some(Ok(Message::Close(frame))) => return Err(closed(frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("the stream broke off"),
                None => bail!("the stream broke off"),
            }
        }
    }

    pub(super) async fn ack(&mut self, seq: u64) -> anyhow::Result<()> {
        let text = serde_json::to_string(&FromDevice::Ack { seq })?;
        Ok(self.0.send(Message::text(text)).await?)
    }

    /// Says goodbye, and waits until the other side has read everything before it.
    pub(super) async fn close(&mut self) -> anyhow::Result<()> {
        self.0.close(None).await?;
        let ending = async { while let Some(Ok(_)) = self.0.next().await {} };
        let _ = tokio::time::timeout(Duration::from_secs(5), ending).await;
        Ok(())
    }
}

/// Closes that say "not you" are final; all others may pass.
fn closed(frame: Option<CloseFrame>) -> anyhow::Error {
    let Some(frame) = frame else {
        return anyhow!("the gateway closed the stream");
    };
    let code = u16::from(frame.code);
    let reason = frame.reason.as_str().to_owned();
    match code {
        4403 | 4409 | 4410 | 4412 => {
            Refused { reason, detail: format!("the gateway closed the stream with {code}") }.into()
        }
        _ => anyhow!("the gateway closed the stream with {code} {reason}"),
    }
}

/// A problem document (RFC 9457), or what there is of it.
fn refused(status: http::StatusCode, body: &[u8]) -> Refused {
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |member: &str| problem.get(member).and_then(Value::as_str);
    let reason = text("type").and_then(|kind| kind.rsplit([':', '/', '#']).next()).unwrap_or(status.as_str());
    let detail = text("detail").or(text("title")).unwrap_or("refused");
    Refused { reason: reason.to_owned(), detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_from_a_problem_document_or_without_one() {
        let status = http::StatusCode::CONFLICT;
        let told = refused(status, br#"{"type":"urn:sealgate:problem:queue-full","detail":"full"}"#);
        assert!(told.is("queue-full"));
        assert_eq!(told.to_string(), "full (queue-full)");
        assert_eq!(refused(status, b"<html>").to_string(), "refused (409)");
    }

    #[test]
    fn only_https_is_spoken() {
        let address = DeviceAddress { user: "alice".parse().unwrap(), device: "d".parse().unwrap() };
        for url in ["http://127.0.0.1:8443", "127.0.0.1:8443", "ws://127.0.0.1"] {
            let url = url.parse().unwrap();
            assert!(Gateway::new(&url, Path::new("/nonexistent"), &address).is_err());
        }
    }
}
