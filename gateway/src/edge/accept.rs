//! One connection: permit, TLS handshake, HTTP until it ends.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::HandshakeKind;
use sealgate_policy::{ConnectionFacts, ConnectionPermit, ConnectionPolicy, Denial};
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{Instant, Sleep},
};

use super::{
    Core,
    clients::{Client, NoZone},
    connection::{Asked, Connection, TlsFacts},
    stream::EdgeStream,
};
use crate::{
    clock,
    http::{Pace, serve as serve_request},
    limits::{ConnectionGuard, LoadLevel},
    reload::Snapshot,
    tls::{ACME_TLS, ServerStream},
};

/// How long a connection that was told to end may take over it.
const FAREWELL: Duration = Duration::from_secs(1);

/// HTTP/2 streams that a client may reset before we have looked at them, at once (CVE-2023-44487).
const MAX_RESET_UNSEEN: usize = 20;

/// HTTP/2 streams of one connection that we reset for what was wrong with them (CVE-2025-8671). A decent client has none.
const MAX_ERROR_RESETS: usize = 100;

/// Judges a connection before a byte of it was read.
pub(super) fn permit(
    core: &Core,
    snapshot: &Snapshot,
    peer: SocketAddr,
) -> Result<(ConnectionPermit, ConnectionGuard), Denial> {
    // Counted first, judged second: two connections at once cannot both be the last one allowed.
    let counted = core.gateway.connections.open(peer.ip());
    let facts = ConnectionFacts {
        peer: peer.ip(),
        open_total: counted.others_in_total(),
        open_from_address: counted.others_from_address(),
        refused: core.gateway.refuses(snapshot, peer.ip(), clock::unix_now()),
    };
    let permit = snapshot.policy.permit_connection(&facts)?;
    let (load, overload) = (&core.gateway.load, snapshot.policy.overload());
    if load.level_at_accept(overload) == LoadLevel::Full || !load.accept(overload, std::time::Instant::now())
    {
        return Err(Denial::Overloaded);
    }
    Ok((permit, counted))
}

/// Judges a load balancer's connection before its header was read. Lists and limits of an address are for its client's.
pub(super) fn permit_proxy(
    core: &Core,
    snapshot: &Snapshot,
    proxy: SocketAddr,
) -> Result<ConnectionGuard, Denial> {
    let counted = core.gateway.connections.open(proxy.ip());
    let open_total = counted.others_in_total();
    let facts = ConnectionFacts { peer: proxy.ip(), open_total, open_from_address: 0, refused: false };
    snapshot.policy.permit_connection(&facts)?;
    Ok(counted)
}

/// Serves a permitted connection to its end.
pub(super) async fn serve(
    core: Rc<Core>,
    snapshot: Arc<Snapshot>,
    stream: TcpStream,
    peer: SocketAddr,
    permit: ConnectionPermit,
    counted: ConnectionGuard,
) {
    let _open = core.count_open();
    let metrics = core.gateway.metrics();
    metrics.connection_opened();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    // Also for what the system sends after we closed: a client that reads nothing keeps it in memory.
    let write_timeout = snapshot.policy.connections().write_timeout;
    if let Err(error) = SockRef::from(&stream).set_tcp_user_timeout(Some(write_timeout)) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT");
    }
    let handshake = shake_hands(&core, &snapshot, stream);
    let limit = snapshot.policy.connections().handshake_timeout;
    let tls = tokio::select! {
        outcome = tokio::time::timeout(limit, handshake) => outcome,
        () = core.drain.notified() => return,
    };
    match tls {
        Ok(Ok((tls, ..))) if tls.session().alpn_protocol() == Some(ACME_TLS) => {
            // RFC 8737 §3: the handshake was all of it.
            metrics.handshake_done("acme-tls/1");
            say_goodbye(tls).await;
        }
        Ok(Ok((tls, asked, client))) => {
            let facts = tls_facts(&tls);
            metrics.handshake_done(facts.version);
            let shown = (asked, client);
            let connection = Arc::new(Connection::new(peer, facts, shown, &snapshot, permit, counted));
            drop(snapshot);
            let _certified = connection.client.is_some().then(|| core.certify(&connection));
            serve_http(core.clone(), tls, connection).await;
        }
        Ok(Err(error)) => match refused_certificate(&error) {
            Some(reason) => {
                metrics.handshake_failed(reason);
                tracing::info!(
                    target: "sealgate::audit",
                    activity = "client-certificate-refused",
                    %peer,
                    reason,
                    %error,
                );
            }
            None => {
                metrics.handshake_failed("error");
                tracing::debug!(%peer, %error, "TLS handshake failed");
            }
        },
        Err(_) => {
            metrics.handshake_failed("timeout");
            tracing::debug!(%peer, "TLS handshake took too long");
        }
    }
}

/// The handshake of a client, by what the policy wants of it.
async fn shake_hands(
    core: &Core,
    snapshot: &Snapshot,
    stream: TcpStream,
) -> io::Result<(ServerStream<TcpStream>, Asked, Option<Client>)> {
    let port = stream.local_addr()?.port();
    let missing = |error: NoZone| io::Error::other(error);
    let mut name = None;
    let challenges = &core.gateway.outliving.acme.challenges;
    // In a box: what it needs is not to be kept by the connection.
    let tls = Box::pin(ServerStream::accept_by(
        |hello| {
            let asked = hello.name.as_deref();
            if let (true, Some(asked)) = (hello.validates && challenges.any_over_tls(), asked)
                && let Some(config) = challenges.over_tls(asked)
            {
                return Ok(Some(config));
            }
            if !snapshot.tls.knows(asked) {
                return Ok(None);
            }
            if snapshot.tls.by_name() {
                name = asked.map(Box::from);
            }
            let zone = snapshot.tls.of(asked, port).map_err(missing)?;
            Ok(Some(zone.configs.of(&hello.groups, hello.wants_chacha)))
        },
        stream,
    ))
    .await?;
    let session = tls.session();
    let asked = Asked { name, port };
    let Some(chain) = session.peer_certificates() else { return Ok((tls, asked, None)) };
    let client =
        Client::read(chain).ok_or_else(|| io::Error::other("the client certificate cannot be read"))?;
    if session.handshake_kind() == Some(HandshakeKind::Resumed) {
        // It came in the ticket, and rustls does not look at it again: time has passed since.
        let zone = snapshot.tls.of(asked.name.as_deref(), port).map_err(missing)?;
        if !client.is_good(zone) {
            let error = rustls::Error::InvalidCertificate(rustls::CertificateError::Expired);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    Ok((tls, asked, Some(client)))
}

/// Ends a connection in order, as far as the client listens.
async fn say_goodbye(mut tls: ServerStream<TcpStream>) {
    let _ = tokio::time::timeout(FAREWELL, tls.shutdown()).await;
}

/// Whether a handshake failed for the client's certificate, and how.
fn refused_certificate(error: &io::Error) -> Option<&'static str> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::NoCertificatesPresented => Some("client-certificate-missing"),
        rustls::Error::InvalidCertificate(_) | rustls::Error::InvalidCertRevocationList(_) => {
            Some("client-certificate-refused")
        }
        _ => None,
    }
}

fn tls_facts(tls: &ServerStream<TcpStream>) -> TlsFacts {
    let session = tls.session();
    TlsFacts {
        version: match session.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
            _ => "TLSv1.2",
        },
        http2: session.alpn_protocol() == Some(b"h2"),
    }
}

async fn serve_http(core: Rc<Core>, tls: ServerStream<TcpStream>, connection: Arc<Connection>) {
    let snapshot = core.snapshot();
    let limits = snapshot.policy.connections().clone();
    let io = TokioIo::new(EdgeStream::new(tls, connection.clone(), &limits));
    let service = {
        let (core, connection) = (core.clone(), connection.clone());
        service_fn(move |request| serve_request(core.clone(), connection.clone(), Box::new(request)))
    };
    let ended = if connection.tls.http2 {
        let mut builder = http2::Builder::new(LocalExecutor { patience: limits.write_timeout });
        if snapshot.policy.http2_websockets() {
            builder.enable_connect_protocol();
        }
        let serving = builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.h2_max_streams)
            .initial_stream_window_size(limits.h2_stream_window)
            .initial_connection_window_size(limits.h2_connection_window)
            .max_send_buf_size(limits.h2_stream_window as usize)
            .max_header_list_size(limits.max_header_bytes)
            .max_pending_accept_reset_streams(MAX_RESET_UNSEEN)
            .max_local_error_reset_streams(MAX_ERROR_RESETS)
            .keep_alive_interval(limits.idle_timeout)
            .keep_alive_timeout(limits.header_timeout)
            .serve_connection(io, service);
        drop(snapshot);
        watch(&core, &connection, &limits, serving, http2::Connection::graceful_shutdown).await
    } else {
        drop(snapshot);
        let serving = http1::Builder::new()
            .half_close(false)
            .header_read_timeout(None)
            .max_headers(limits.max_headers as usize)
            .max_buf_size(limits.max_header_bytes.max(8 * 1024) as usize)
            .timer(TokioTimer::new())
            .serve_connection(io, service)
            .with_upgrades();
        watch(&core, &connection, &limits, serving, http1::UpgradeableConnection::graceful_shutdown).await
    };
    if let Err(error) = ended {
        tracing::debug!(peer = %connection.peer, %error, "connection ended");
    }
}

/// Drives a connection, and ends its silences: idle, reading a head, not taking its answers, draining.
async fn watch<C>(
    core: &Core,
    connection: &Connection,
    limits: &ConnectionPolicy,
    serving: C,
    close: impl Fn(Pin<&mut C>),
) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut serving = pin!(serving);
    let mut drain = pin!(core.drain.notified());
    let mut ending = pin!(connection.ending.notified());
    // Past this it ends, even in the middle of a request.
    let mut last = None;
    let mut closing = core.draining();
    // When a connection that was told to end must have ended.
    let mut farewell: Option<Instant> = None;
    if closing {
        close(serving.as_mut());
    }
    let mut armed = Instant::now() + limits.idle_timeout;
    let mut timer: Pin<&mut Sleep> = pin!(tokio::time::sleep_until(armed));
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            if !closing && drain.as_mut().poll(cx).is_ready() {
                closing = true;
                close(serving.as_mut());
                continue;
            }
            if last.is_none() && ending.as_mut().poll(cx).is_ready() {
                (closing, last) = (true, Some(Instant::now() + FAREWELL));
                close(serving.as_mut());
                continue;
            }
            // The timer is only ever moved forward when it fires: a request costs no timer operation.
            let stalled = connection.clock.write_deadline(limits).map(Instant::from_std);
            let mut silent = connection.clock.deadline(limits).map(Instant::from_std);
            if last.is_some() {
                silent = last;
            } else if let Some(farewell) = &mut farewell {
                if silent.is_some() || connection.condemned().is_some() {
                    silent = Some(*farewell);
                } else {
                    // A request came while we said goodbye: it is answered.
                    *farewell = Instant::now() + FAREWELL;
                }
            }
            let Some(deadline) = stalled.into_iter().chain(silent).min() else {
                return Poll::Pending;
            };
            if deadline < armed {
                armed = deadline;
                timer.as_mut().reset(armed);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            if now < deadline {
                armed = deadline;
            } else if closing || stalled.is_some_and(|stalled| stalled <= now) {
                connection.cut();
                return Poll::Ready(Ok(()));
            } else {
                closing = true;
                if connection.clock.is_reading() && !connection.tls.http2 {
                    // One that trickles a head is told why; its stream sees to that.
                    connection.condemn(Denial::TooSlow);
                } else {
                    // An idle one says goodbye.
                    close(serving.as_mut());
                }
                armed = now + FAREWELL;
                farewell = Some(armed);
            }
            timer.as_mut().reset(armed);
        }
    })
    .await
}

/// Runs the streams of an HTTP/2 connection on its own core.
#[derive(Clone, Copy)]
struct LocalExecutor {
    /// How long the client may leave a response where it is.
    patience: Duration,
}

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(while_taken(future, self.patience));
    }
}

/// Drives a stream of HTTP/2, and drops it, which resets it, when its client opens no window for the rest of a response.
async fn while_taken<F: Future>(stream: F, patience: Duration) {
    let mut stream = pin!(stream);
    let mut pace = Pace::default();
    let mut deadline: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        let before = pace;
        let outcome = pace.during(|| stream.as_mut().poll(cx));
        if outcome.is_ready() {
            return Poll::Ready(());
        }
        if !pace.waits_for_client() {
            deadline = None;
            return Poll::Pending;
        }
        if pace != before {
            deadline = None;
        }
        deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience))).as_mut().poll(cx)
    })
    .await;
}
