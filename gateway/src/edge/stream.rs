//! Our stream below hyper: the TLS session, watched.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{connection::Connection, guard::Guard};
use crate::tls::ServerStream;

/// A downstream TLS stream: it tells its connection's clock when bytes arrive, and has them judged by a
/// [`Guard`] before hyper interprets them.
pub struct EdgeStream {
    tls: ServerStream<TcpStream>,
    connection: Arc<Connection>,
    guard: Guard,
    in_head: bool,
}

impl EdgeStream {
    /// Watches `tls` for `connection`.
    #[must_use]
    pub fn new(tls: ServerStream<TcpStream>, connection: Arc<Connection>) -> Self {
        let guard = Guard::new(connection.tls.http2);
        Self { tls, connection, guard, in_head: false }
    }

    /// The stream of a WebSocket: what comes now is no HTTP.
    #[must_use]
    pub fn upgraded(self) -> Self {
        Self { guard: Guard::None, ..self }
    }
}

impl AsyncRead for EdgeStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let outcome = Pin::new(&mut this.tls).poll_read(cx, buf);
        let fresh = buf.filled().get(before..).unwrap_or_default();
        if fresh.is_empty() {
            return outcome;
        }
        let judged = match &mut this.guard {
            Guard::Frames(frames) => {
                this.connection.clock.bytes_arrived();
                frames.judge(fresh, Instant::now())
            }
            Guard::Heads(heads) => {
                this.in_head |= this.connection.clock.bytes_arrived();
                if this.in_head { heads.judge(fresh).map(|ended| this.in_head = !ended) } else { Ok(()) }
            }
            Guard::None => Ok(()),
        };
        match judged {
            Ok(()) => outcome,
            Err(fault) => {
                tracing::debug!(peer = %this.connection.peer, %fault, "connection ended");
                buf.set_filled(before);
                Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault)))
            }
        }
    }
}

impl AsyncWrite for EdgeStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().tls).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().tls).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tls).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tls).poll_shutdown(cx)
    }
}
