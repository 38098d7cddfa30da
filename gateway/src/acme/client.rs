//! HTTPS to ACME servers: one connection for each request, verified, bounded in size and time.

use std::{error::Error as StdError, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header, uri::PathAndQuery};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, task::AbortHandle, time::timeout};
use tokio_rustls::TlsConnector;

/// For one request, from the name look-up to the last byte. Servers answer some only when they have done their part.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer: a chain of certificates.
const MAX_ANSWER_BYTES: usize = 256 * 1024;

/// How ACME servers of one authority are reached.
#[derive(Clone)]
pub(super) struct HttpsClient {
    tls: Arc<ClientConfig>,
}

impl HttpsClient {
    pub(super) fn new(tls: Arc<ClientConfig>) -> Self {
        Self { tls }
    }
}

impl HttpClient for HttpsClient {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let tls = self.tls.clone();
        Box::pin(async move {
            let answer = match timeout(REQUEST_TIMEOUT, exchange(tls, request)).await {
                Ok(answer) => answer,
                Err(_) => Err(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()).into()),
            };
            answer.map(BytesResponse::from).map_err(Error::Other)
        })
    }
}

type Fault = Box<dyn StdError + Send + Sync>;

async fn exchange(
    tls: Arc<ClientConfig>,
    request: Request<BodyWrapper<Bytes>>,
) -> Result<Response<Full<Bytes>>, Fault> {
    let (mut parts, body) = request.into_parts();
    // The server names the addresses of its resources itself: they too are HTTPS only.
    if parts.uri.scheme_str() != Some("https") {
        return Err(format!("not an https address: {}", shown(&parts.uri)).into());
    }
    let authority = parts.uri.authority().ok_or("an address without a host")?.clone();
    if authority.as_str().contains('@') {
        return Err("an address with credentials".into());
    }
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    let tcp = TcpStream::connect((host.as_str(), authority.port_u16().unwrap_or(443))).await?;
    let stream = TlsConnector::from(tls).connect(ServerName::try_from(host)?, tcp).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let _connection = AbortOnDrop(tokio::spawn(connection).abort_handle());
    parts.headers.insert(header::HOST, HeaderValue::from_str(authority.as_str())?);
    let path = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    let (parts, body) = sender.send_request(Request::from_parts(parts, body)).await?.into_parts();
    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await?.to_bytes();
    Ok(Response::from_parts(parts, Full::new(body)))
}

/// An address as it may be shown: what comes from outside is kept short.
fn shown(uri: &Uri) -> String {
    uri.to_string().chars().take(200).collect()
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
