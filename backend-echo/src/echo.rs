//! Gives back what it gets: for proving the gateway, and for measuring it. So it costs as little as can be.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, StreamExt};
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::problem::Problem;
use crate::routes::body;
use crate::server::{Backend, Open};
use crate::websocket::{self, Accepted, Socket};

/// Longest body echoed, and highest `?bytes=`: 1 MiB.
const MAX_BODY: usize = 1024 * 1024;

static FILLER: LazyLock<Bytes> = LazyLock::new(|| vec![b'x'; MAX_BODY].into());

pub(crate) async fn answer(
    backend: &Arc<Backend>,
    open: Open,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Problem> {
    if websocket::wanted(request.headers()) {
        return upgrade(backend, open, request);
    }
    match *request.method() {
        Method::GET => get(request.uri().query()),
        Method::POST => {
            let kind = request.headers().get(header::CONTENT_TYPE).cloned();
            let body = body(request, MAX_BODY).await?;
            let kind = kind.unwrap_or_else(|| HeaderValue::from_static("application/octet-stream"));
            Ok(whole(body, kind))
        }
        _ => Err(Problem::method("GET, POST")),
    }
}

fn get(query: Option<&str>) -> Result<Response<Full<Bytes>>, Problem> {
    let Some(query) = query else {
        return Ok(whole(
            Bytes::from_static(br#"{"echo":"sealgate"}"#),
            HeaderValue::from_static("application/json"),
        ));
    };
    let wanted = query.split('&').find_map(|pair| pair.strip_prefix("bytes="));
    let bytes = match wanted.map(str::parse) {
        None => 0,
        Some(Ok(bytes)) if bytes <= MAX_BODY => bytes,
        Some(_) => return Err(Problem::malformed("bytes is a number up to 1,048,576")),
    };
    Ok(whole(FILLER.slice(..bytes), HeaderValue::from_static("application/octet-stream")))
}

fn whole(body: Bytes, kind: HeaderValue) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn upgrade(
    backend: &Arc<Backend>,
    open: Open,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Problem> {
    let Accepted { response, upgrade } = websocket::accept(request, &["echo.v1"])?;
    let backend = backend.clone();
    tokio::spawn(async move {
        let _open = open;
        let Ok(mut socket) = upgrade.socket().await else {
            return;
        };
        let ended = tokio::select! {
            ended = echo(&mut socket) => ended,
            () = backend.stopping() => return websocket::close(socket, 1001, "going-away").await,
        };
        if let Err(Some((code, reason))) = ended.map_err(|error| websocket::close_code(&error)) {
            websocket::close(socket, code, reason).await;
        }
    });
    Ok(response)
}

/// Everything that one read brought is answered by one write. Pings and closes are answered by tungstenite.
async fn echo(socket: &mut Socket) -> Result<(), Error> {
    while let Some(message) = socket.next().await {
        give_back(socket, message?).await?;
        while let Some(Some(message)) = socket.next().now_or_never() {
            give_back(socket, message?).await?;
        }
        socket.flush().await?;
    }
    Ok(())
}

async fn give_back(socket: &mut Socket, message: Message) -> Result<(), Error> {
    match message {
        Message::Text(_) | Message::Binary(_) => socket.feed(message).await,
        _ => Ok(()),
    }
}
