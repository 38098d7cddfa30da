//! A backend of one's own, and someone who asks it as the gateway would.

// Each test file uses its part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use backend_echo::{Listen, Options, serve};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::{ClientRequestBuilder, IntoClientRequest};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Long enough for a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub struct Backend {
    pub folder: TempDir,
    running: Option<(oneshot::Sender<()>, JoinHandle<anyhow::Result<()>>)>,
}

impl Backend {
    /// On a unix socket, with the development login.
    pub async fn start() -> Self {
        let mut backend = Self { folder: tempfile::tempdir().unwrap(), running: None };
        backend.start_with(|_| ()).await;
        backend
    }

    /// Starts in the same folder again, after [`Self::stop`].
    pub async fn start_with(&mut self, change: impl FnOnce(&mut Options)) {
        let mut options = Options::development(&self.state());
        change(&mut options);
        let socket = options.listeners().into_iter().find_map(|listen| match listen {
            Listen::Unix(path) => Some(path),
            Listen::Tls(_) => None,
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(options, async { drop(stopped.await) }));
        if let Some(socket) = socket {
            until("the backend listens", async || UnixStream::connect(&socket).await.is_ok()).await;
        }
        self.running = Some((stop, task));
    }

    pub async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(DEADLINE, task).await.expect("a stop takes this long at most").unwrap().unwrap();
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.state().join("backend.sock")
    }

    /// Logs in, and becomes what the gateway would say about the bearer of that token.
    pub async fn log_in(&self, user: &str, device: &str) -> Identity {
        let reply = self.post("/v1/dev/login", None, &json!({ "user": user, "device": device })).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        Identity::of(reply.json()["access_token"].as_str().unwrap())
    }

    pub async fn get(&self, path: &str, identity: Option<&Identity>) -> Reply {
        self.ask(as_caller(Request::get(path), identity).body(Full::default()).unwrap()).await
    }

    pub async fn post(&self, path: &str, identity: Option<&Identity>, body: &Value) -> Reply {
        self.send("POST", path, identity, body).await
    }

    pub async fn send(&self, method: &str, path: &str, identity: Option<&Identity>, body: &Value) -> Reply {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        self.ask(as_caller(request, identity).body(Full::from(body.to_string())).unwrap()).await
    }

    pub async fn ask(&self, mut request: Request<Full<Bytes>>) -> Reply {
        request.headers_mut().insert("host", "backend".parse().unwrap());
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        connection.abort();
        Reply { status: head.status, headers: head.headers, body }
    }

    /// Opens a WebSocket.
    pub async fn socket_to(
        &self,
        path: &str,
        identity: Option<&Identity>,
        subprotocol: Option<&str>,
    ) -> Result<Socket, StatusCode> {
        let mut request = ClientRequestBuilder::new(format!("ws://backend{path}").parse().unwrap());
        if let Some(name) = subprotocol {
            request = request.with_sub_protocol(name);
        }
        for (name, value) in identity.into_iter().flat_map(Identity::headers) {
            request = request.with_header(name, value);
        }
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let request = request.into_client_request().unwrap();
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, response)) => {
                let chosen =
                    response.headers().get("sec-websocket-protocol").map(|name| name.to_str().unwrap());
                Ok(Socket { chosen: chosen.map(str::to_owned), socket })
            }
            Err(Error::Http(response)) => Err(response.status()),
            Err(error) => panic!("{error}"),
        }
    }
}

/// What the gateway puts on a request.
#[derive(Clone)]
pub struct Identity {
    pub user: String,
    pub session: String,
    pub roles: String,
}

impl Identity {
    pub fn of(token: &str) -> Self {
        let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        let claims: Value = serde_json::from_slice(&claims).unwrap();
        let roles: Vec<_> =
            claims["roles"].as_array().unwrap().iter().map(|role| role.as_str().unwrap()).collect();
        Self {
            user: claims["sub"].as_str().unwrap().to_owned(),
            session: claims["sid"].as_str().unwrap().to_owned(),
            roles: roles.join(","),
        }
    }

    pub fn headers(&self) -> [(&'static str, String); 3] {
        [
            ("x-sealgate-subject", self.user.clone()),
            ("x-sealgate-session", self.session.clone()),
            ("x-sealgate-roles", self.roles.clone()),
        ]
    }
}

pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The status, and the last word of a problem's type.
    pub fn refusal(&self) -> (u16, String) {
        assert_eq!(self.headers["content-type"], "application/problem+json", "{}", self.text());
        let problem = self.json();
        assert_eq!(problem["status"], self.status.as_u16());
        let kind = problem["type"].as_str().unwrap();
        (self.status.as_u16(), kind.rsplit(':').next().unwrap().to_owned())
    }
}

pub struct Socket {
    pub chosen: Option<String>,
    pub socket: WebSocketStream<UnixStream>,
}

impl Socket {
    pub async fn say(&mut self, message: &Value) {
        self.socket.send(Message::text(message.to_string())).await.unwrap();
    }

    pub async fn hear(&mut self) -> Value {
        match self.next().await {
            Message::Text(text) => serde_json::from_str(text.as_str()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub async fn next(&mut self) -> Message {
        let next = tokio::time::timeout(DEADLINE, self.socket.next()).await;
        next.expect("something comes").expect("the socket is open").unwrap()
    }

    /// The code and reason that the server closes with.
    pub async fn closed(&mut self) -> (u16, String) {
        loop {
            if let Message::Close(frame) = self.next().await {
                let CloseFrame { code, reason } = frame.unwrap();
                return (code.into(), reason.as_str().to_owned());
            }
        }
    }

    /// Closes, and waits until the server has read everything before that.
    pub async fn close(mut self) {
        self.socket.close(None).await.unwrap();
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}

fn as_caller(mut request: http::request::Builder, identity: Option<&Identity>) -> http::request::Builder {
    for (name, value) in identity.into_iter().flat_map(Identity::headers) {
        request = request.header(name, value);
    }
    request
}

/// Waits for a condition, not for a time.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// Whether any file under `folder` holds `needle`.
pub fn found(folder: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return found(&path, needle);
        }
        path.is_file() && std::fs::read(&path).unwrap().windows(needle.len()).any(|part| part == needle)
    })
}
