//! `/v1/stream`: a device's messages as they come, over a WebSocket.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio_tungstenite::tungstenite::Message;

use crate::messages;
use crate::problem::Problem;
use crate::server::{Backend, Open, unix_seconds};
use crate::websocket::{self, Accepted, Socket};
use crate::wire::{DeviceAddress, FromDevice, SUBPROTOCOL, ToDevice};

/// Messages read from the store at once.
const BATCH: u32 = 32;
/// Messages sent and not yet acknowledged; then the stream waits for the device.
const WINDOW: u64 = 256;
/// How long a device may refuse to read.
const WRITE: Duration = Duration::from_secs(30);

pub(crate) async fn upgrade(
    backend: &Arc<Backend>,
    open: Open,
    request: Request<Incoming>,
    now: u64,
) -> Result<Response<Full<Bytes>>, Problem> {
    if !websocket::wanted(request.headers()) {
        return Err(Problem::malformed("this is a WebSocket"));
    }
    let device = messages::sender(backend, request.headers(), now).await?;
    if websocket::subprotocol(request.headers(), &[SUBPROTOCOL]).is_none() {
        return Err(Problem::malformed(format!("offer the subprotocol {SUBPROTOCOL}")));
    }
    let Accepted { response, upgrade } = websocket::accept(request, &[SUBPROTOCOL])?;
    let backend = backend.clone();
    tokio::spawn(async move {
        let _open = open;
        let Ok(mut socket) = upgrade.socket().await else {
            return;
        };
        let end = Stream { backend: &backend, device, sent: 0, acknowledged: 0 }.run(&mut socket).await;
        if let Some((code, reason)) = end {
            websocket::close(socket, code, reason).await;
        }
    });
    Ok(response)
}

/// A close code and its reason; none if there is nobody left to tell.
type End = Option<(u16, &'static str)>;

struct Stream<'b> {
    backend: &'b Arc<Backend>,
    device: DeviceAddress,
    /// The last sequence number sent on this socket.
    sent: u64,
    /// The last one acknowledged on it.
    acknowledged: u64,
}

impl Stream<'_> {
    async fn run(mut self, socket: &mut Socket) -> End {
        // Entered before the queue is read: what is stored in between rings the bell.
        let seat = self.backend.hub.enter(self.device.clone());
        if let Err(end) = self.greet(socket).await {
            return end;
        }
        loop {
            if let Err(end) = self.deliver(socket).await {
                return end;
            }
            let step = tokio::select! {
                () = self.backend.stopping() => return Some((1001, "going-away")),
                () = seat.bell.replaced.notified() => return Some((4409, "replaced")),
                () = seat.bell.message.notified() => Ok(()),
                message = socket.next() => match message {
                    Some(Ok(message)) => self.take(socket, message).await,
                    Some(Err(error)) => return websocket::close_code(&error),
                    None => return None,
                },
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    async fn greet(&mut self, socket: &mut Socket) -> Result<(), End> {
        let queued = self.backend.store.queued(&self.device).await.map_err(|error| failed(&error))?;
        let keys = self.backend.store.key_count(&self.device).await.map_err(|error| failed(&error))?;
        feed(socket, &ToDevice::Ready { device: self.device.device.clone(), queued, keys }).await?;
        flush(socket).await
    }

    /// Sends what waits, as far as the window allows.
    async fn deliver(&mut self, socket: &mut Socket) -> Result<(), End> {
        while self.sent < self.acknowledged.saturating_add(WINDOW) {
            let waiting = self.backend.store.waiting(&self.device, self.sent, BATCH).await;
            let waiting = waiting.map_err(|error| failed(&error))?;
            let Some(last) = waiting.last().map(|delivery| delivery.seq) else {
                return Ok(());
            };
            if self.acknowledged == 0 {
                // The window counts from where this socket began.
                self.acknowledged = waiting.first().map_or(0, |first| first.seq.saturating_sub(1));
            }
            for delivery in waiting {
                feed(socket, &ToDevice::Message(delivery)).await?;
            }
            flush(socket).await?;
            self.sent = last;
        }
        Ok(())
    }

    async fn take(&mut self, socket: &mut Socket, message: Message) -> Result<(), End> {
        let text = match message {
            Message::Text(text) => text,
            Message::Binary(_) => return Err(Some((1003, "text-only"))),
            _ => return Ok(()),
        };
        let Ok(message) = serde_json::from_str(text.as_str()) else {
            return Err(Some((1007, "schema")));
        };
        match message {
            FromDevice::Ack { seq } => self.acknowledge(seq).await,
            FromDevice::Send { envelope } => {
                let id = envelope.id;
                let now = unix_seconds(SystemTime::now());
                let answer = match messages::send(self.backend, self.device.clone(), envelope, now).await {
                    Ok(accepted) => ToDevice::Accepted(accepted),
                    Err(problem) => ToDevice::Refused {
                        id,
                        reason: problem.slug.to_owned(),
                        detail: problem.detail.into_owned(),
                    },
                };
                feed(socket, &answer).await?;
                flush(socket).await
            }
        }
    }

    async fn acknowledge(&mut self, seq: u64) -> Result<(), End> {
        // What was never sent cannot have been dealt with: such an ack would delete messages unseen.
        if seq > self.sent {
            return Err(Some((1008, "ack-ahead")));
        }
        self.backend.store.acknowledge(&self.device, seq).await.map_err(|error| failed(&error))?;
        self.acknowledged = self.acknowledged.max(seq);
        Ok(())
    }
}

async fn feed(socket: &mut Socket, message: &ToDevice) -> Result<(), End> {
    let text = serde_json::to_string(message).map_err(|error| failed(&error))?;
    in_time(socket.feed(Message::text(text))).await
}

async fn flush(socket: &mut Socket) -> Result<(), End> {
    in_time(socket.flush()).await
}

async fn in_time<E>(writing: impl Future<Output = Result<(), E>>) -> Result<(), End> {
    match tokio::time::timeout(WRITE, writing).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(None),
    }
}

fn failed(error: &dyn std::error::Error) -> End {
    tracing::error!(error = %crate::problem::chain(error), "a stream failed");
    Some((1011, "internal"))
}
