//! The load: a client of our own that does nothing but what is measured, on one thread.
//!
//! Requests are bytes written once, answers are compared byte for byte with what they must be. One
//! wrong answer ends the run: a benchmark that measures refusals measures nothing.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustls::SignatureScheme::{self, ECDSA_NISTP256_SHA256, RSA_PKCS1_SHA256, RSA_PSS_SHA256};
use rustls::crypto::aws_lc_rs::kx_group::{X25519, X25519MLKEM768};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::measure::{Processes, Watch, percentile};

/// Payload of one WebSocket message, in bytes.
pub(crate) const MESSAGE_BYTES: usize = 128;

/// How many connections of an idle measurement are opened at the same time.
const OPENING_AT_ONCE: usize = 64;

/// Longest wait for all connections to stand, before the first unit of work.
const OPENING: Duration = Duration::from_secs(120);

/// The unit of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// One HTTPS/1.1 request on a kept-alive connection.
    Request,
    /// One HTTP/2 request on a kept-alive connection.
    Request2,
    /// TCP connect, TLS 1.3 handshake, one HTTPS/1.1 request, close.
    Handshake(Shake),
    /// One message through a WebSocket and back.
    Echo {
        /// Where the WebSocket is.
        path: &'static str,
        /// Messages under way per connection.
        in_flight: usize,
    },
}

/// A kind of handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shake {
    /// Full, the server's key ECDSA P-256, X25519.
    Ecdsa,
    /// Full, the server's key RSA-2048, X25519.
    Rsa,
    /// Resumed by a ticket, with a fresh key exchange (X25519).
    Resumed,
    /// Full, the server's key ECDSA P-256, X25519MLKEM768.
    Hybrid,
}

/// How much of it, and how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Connections that work at the same time.
    pub connections: usize,
    /// Work that is done and not measured, after all connections stand.
    pub warm_up: Duration,
    /// Work that is measured.
    pub measured: Duration,
    /// Units per second over all connections; `None` is a closed loop, as fast as answers come.
    pub rate: Option<f64>,
}

/// What one visit to one proxy found.
#[derive(Clone, Debug)]
pub(crate) struct Visit {
    /// Units of work that ended while it was measured.
    pub units: u64,
    /// CPU time of all processes of the proxy while it was measured.
    pub cpu: Duration,
    /// Wall time of the measurement.
    pub wall: Duration,
    /// Share of our CPUs that went to strangers.
    pub(crate) others: f64,
    /// Median time of a unit as the client sees it.
    pub p50: Duration,
    /// 99th percentile of the same.
    pub p99: Duration,
}

/// A proxy as the client sees it.
pub(crate) struct Target {
    address: SocketAddr,
    name: ServerName<'static>,
    config: rustls::ClientConfig,
    authority: CertificateDer<'static>,
    http1: TlsConnector,
    http2: TlsConnector,
    /// What every connection or request takes its bearer token from, in turn.
    tokens: Vec<String>,
    /// The body that a request must be answered with, known after the first answer.
    answer: OnceCell<Bytes>,
}

impl Target {
    /// A client of the proxy at `address`, trusting `authority` alone: TLS 1.3 only, X25519 only, TLS_AES_128_GCM_SHA256 only, ECDSA
    /// with P-256 only, no resumption; so that all proxies do the same cryptography.
    pub(crate) fn new(
        address: SocketAddr,
        authority: CertificateDer<'static>,
        tokens: Vec<String>,
    ) -> Result<Self> {
        ensure!(!tokens.is_empty(), "no token to send");
        let config = client(authority.clone(), X25519, ECDSA)?;
        let with_alpn = |alpn: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![alpn.to_vec()];
            TlsConnector::from(Arc::new(config))
        };
        Ok(Self {
            address,
            name: ServerName::try_from("localhost")?,
            config: config.clone(),
            authority,
            http1: with_alpn(b"http/1.1"),
            http2: with_alpn(b"h2"),
            tokens,
            answer: OnceCell::new(),
        })
    }

    /// A connector for one connection after the other, with a memory of its own where sessions are resumed.
    fn connector(&self, shake: Shake) -> Result<TlsConnector> {
        let mut config = match shake {
            Shake::Ecdsa | Shake::Resumed => self.config.clone(),
            Shake::Rsa => client(self.authority.clone(), X25519, RSA)?,
            Shake::Hybrid => client(self.authority.clone(), X25519MLKEM768, ECDSA)?,
        };
        if shake == Shake::Resumed {
            config.resumption = rustls::client::Resumption::in_memory_sessions(8);
        }
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsConnector::from(Arc::new(config)))
    }

    async fn connect(&self, tls: &TlsConnector) -> Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(tls.connect(self.name.clone(), stream).await?)
    }

    fn token(&self, index: usize) -> &str {
        index
            .checked_rem(self.tokens.len())
            .and_then(|index| self.tokens.get(index))
            .map_or("", String::as_str)
    }

    fn request(&self, index: usize) -> Vec<u8> {
        format!(
            "GET /v1/echo HTTP/1.1\r\nHost: localhost\r\nUser-Agent: sealgate-benches\r\nAccept: application/json\r\n\
             Authorization: Bearer {}\r\n\r\n",
            self.token(index)
        )
        .into_bytes()
    }

    /// The first answer must be JSON, every later one the same bytes.
    fn check(&self, status: u16, body: &[u8]) -> Result<()> {
        if let Some(answer) = self.answer.get()
            && status == 200
            && answer == body
        {
            return Ok(());
        }
        ensure!(status == 200, "answered {status}: {}", String::from_utf8_lossy(body));
        ensure!(
            self.answer.get().is_none(),
            "answer differs from the first: {}",
            String::from_utf8_lossy(body)
        );
        serde_json::from_slice::<serde_json::Value>(body)
            .with_context(|| format!("answer is not JSON: {}", String::from_utf8_lossy(body)))?;
        self.answer.get_or_init(|| Bytes::copy_from_slice(body));
        Ok(())
    }
}

/// TLS 1.3 signs by the first; but to HAProxy, a client that does not offer PKCS #1 has no RSA.
const RSA: (SignatureScheme, SignatureScheme) = (RSA_PSS_SHA256, RSA_PKCS1_SHA256);
const ECDSA: (SignatureScheme, SignatureScheme) = (ECDSA_NISTP256_SHA256, ECDSA_NISTP256_SHA256);

fn client(
    authority: CertificateDer<'static>,
    group: &'static dyn rustls::crypto::SupportedKxGroup,
    // Of the server, from the first to the last in rustls' list; those of its chain are another matter.
    (first, last): (SignatureScheme, SignatureScheme),
) -> Result<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority)?;
    let theirs = rustls::crypto::aws_lc_rs::default_provider();
    let known = theirs.signature_verification_algorithms.mapping;
    let place = |wanted| known.iter().position(|(scheme, _)| *scheme == wanted).context("a signature");
    let provider = rustls::crypto::CryptoProvider {
        cipher_suites: vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        kx_groups: vec![group],
        signature_verification_algorithms: rustls::crypto::WebPkiSupportedAlgorithms {
            mapping: known.get(place(first)?..=place(last)?).unwrap_or_default(),
            ..theirs.signature_verification_algorithms
        },
        ..theirs
    };
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Lets `plan.connections` connections do `work` and measures the proxy while they do.
///
/// All connections stand and are warm before the first reading, and none has stopped before the
/// last, so neither opening nor closing is in the figure (but where they are the work).
pub(crate) async fn visit(
    target: &Rc<Target>,
    work: Work,
    plan: &Plan,
    processes: &Processes,
    watch: &Watch,
) -> Result<Visit> {
    let meter = Rc::new(Meter::default());
    let mut tasks = JoinSet::new();
    for index in 0..plan.connections {
        let pace = plan.pace(work, index)?;
        let (target, meter) = (target.clone(), meter.clone());
        match work {
            Work::Request => tasks.spawn_local(requests(target, index, pace, meter)),
            Work::Request2 => tasks.spawn_local(requests2(target, index, pace, meter)),
            Work::Handshake(shake) => tasks.spawn_local(handshakes(target, shake, index, pace, meter)),
            Work::Echo { path, in_flight } => {
                tasks.spawn_local(echoes(target, path, in_flight, index, pace, meter))
            }
        };
    }
    while_working(&mut tasks, tokio::time::timeout(OPENING, meter.all_standing(plan.connections)))
        .await?
        .context("connections did not open in time")?;
    while_working(&mut tasks, tokio::time::sleep(plan.warm_up)).await?;

    let others = watch.others()?;
    let (units, cpu, started) = (meter.units.get(), processes.cpu()?, Instant::now());
    meter.recording.set(true);
    while_working(&mut tasks, tokio::time::sleep(plan.measured)).await?;
    let (units, cpu, wall) = (meter.units.get() - units, processes.cpu()? - cpu, started.elapsed());
    // CPU seconds of strangers, as a share of all that there was.
    let others = (watch.others()? - others).max(0.0) / (wall.as_secs_f64() * watch.cpus() as f64);
    meter.recording.set(false);
    processes.unchanged()?;

    ensure!(units > 0, "nothing was done in {wall:?}");
    if let Some(rate) = plan.rate {
        let reached = units as f64 / wall.as_secs_f64();
        ensure!(reached > 0.95 * rate, "{rate} units per second were asked for, {reached:.0} were done");
    }
    let mut latencies = meter.latencies.take();
    let mut at = |share| percentile(&mut latencies, share).map(|ns| Duration::from_nanos(u64::from(ns)));
    let (p50, p99) = at(0.5).zip(at(0.99)).context("no unit was timed")?;
    Ok(Visit { others, units, cpu, wall, p50, p99 })
}

/// What idles.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Quiet {
    /// A WebSocket at that path that has carried one message.
    Socket(&'static str),
    /// An HTTPS/1.1 connection that has carried one request and is kept alive.
    KeptAlive,
    /// A connection after its TLS handshake, without a request.
    Handshaken,
}

/// Connections that say nothing now. Closed when dropped.
pub(crate) struct Idle {
    /// One for each; ends when its socket does.
    pub(crate) tasks: JoinSet<Result<()>>,
}

impl Idle {
    /// Opens `count` of them.
    pub(crate) async fn open(target: &Rc<Target>, quiet: Quiet, count: usize) -> Result<Self> {
        let meter = Rc::new(Meter::default());
        let turns = Rc::new(Semaphore::new(OPENING_AT_ONCE));
        let mut tasks = JoinSet::new();
        for index in 0..count {
            let (target, meter, turns) = (target.clone(), meter.clone(), turns.clone());
            tasks.spawn_local(async move {
                let turn = turns.acquire().await?;
                let path = match quiet {
                    Quiet::Socket(path) => path,
                    Quiet::KeptAlive | Quiet::Handshaken => {
                        let mut stream = target.connect(&target.http1).await?;
                        if matches!(quiet, Quiet::KeptAlive) {
                            let mut buffer = BytesMut::with_capacity(4096);
                            exchange(&mut stream, &target, &target.request(index), &mut buffer).await?;
                        }
                        drop(turn);
                        meter.stands();
                        let read = stream.read(&mut [0]).await;
                        bail!("an idle connection ended, or something came: {read:?}");
                    }
                };
                let mut socket = WebSocket::open(&target, path, index).await?;
                socket.send_message();
                socket.flush().await?;
                socket.receive().await?;
                drop(turn);
                meter.stands();
                loop {
                    // Answers pings; a message that nobody asked for is an error.
                    ensure!(socket.receive().await? == 0, "a message came on an idle socket");
                    socket.flush().await?;
                }
            });
        }
        while_working(&mut tasks, tokio::time::timeout(OPENING, meter.all_standing(count)))
            .await?
            .context("they did not open in time")?;
        Ok(Self { tasks })
    }

    /// Waits while they idle; fails if one of them closes.
    pub(crate) async fn hold(&mut self, time: Duration) -> Result<()> {
        while_working(&mut self.tasks, tokio::time::sleep(time)).await
    }
}

/// What all connections of a visit count into. One thread, so cells do.
#[derive(Default)]
struct Meter {
    units: Cell<u64>,
    recording: Cell<bool>,
    /// In nanoseconds; what lasted longer than 4.3 s counts as that.
    latencies: RefCell<Vec<u32>>,
    standing: Cell<usize>,
    stood: Notify,
}

impl Meter {
    fn stands(&self) {
        self.standing.set(self.standing.get() + 1);
        self.stood.notify_one();
    }

    async fn all_standing(&self, count: usize) {
        while self.standing.get() < count {
            self.stood.notified().await;
        }
    }

    fn unit(&self, started: Instant) {
        self.units.set(self.units.get() + 1);
        if self.recording.get() {
            let nanoseconds = u32::try_from(started.elapsed().as_nanos()).unwrap_or(u32::MAX);
            self.latencies.borrow_mut().push(nanoseconds);
        }
    }
}

/// Waits for `future` while `tasks` work; the first of them to end ends the wait, with its error.
pub(crate) async fn while_working<T>(
    tasks: &mut JoinSet<Result<()>>,
    future: impl Future<Output = T>,
) -> Result<T> {
    tokio::select! {
        biased;
        Some(ended) = tasks.join_next() => {
            ended??;
            bail!("a connection ended by itself");
        }
        value = future => Ok(value),
    }
}

impl Plan {
    /// When connection `index` starts its next unit (or burst of `in_flight` messages).
    fn pace(&self, work: Work, index: usize) -> Result<Pace> {
        let Some(rate) = self.rate else {
            return Ok(Pace(None));
        };
        let burst = match work {
            Work::Echo { in_flight, .. } => in_flight,
            _ => 1,
        };
        let period = self.connections as f64 * burst as f64 / rate;
        ensure!(period.is_finite() && period > 0.0, "{rate} units per second cannot be kept");
        // Spread evenly, so that connections take turns instead of starting together.
        let first = period * (index + 1) as f64 / self.connections as f64;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        timer.set(
            Expiration::IntervalDelayed(
                Duration::from_secs_f64(first).into(),
                Duration::from_secs_f64(period).into(),
            ),
            TimerSetTimeFlags::empty(),
        )?;
        #[expect(deprecated, reason = "its successor is unsafe; a `Timer` owns one descriptor and keeps it")]
        let timer = AsyncFd::new(Timer(timer))?;
        Ok(Pace(Some(timer)))
    }
}

/// A beat for open-loop work, or none for a closed loop. Tokio's timers are too coarse (1 ms).
struct Pace(Option<AsyncFd<Timer>>);

struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Pace {
    async fn beat(&self) -> Result<()> {
        let Some(timer) = &self.0 else { return Ok(()) };
        loop {
            let mut ready = timer.readable().await?;
            // Only an error of the outer kind means "not yet": wait again.
            if let Ok(beat) = ready.try_io(|timer| Ok(timer.get_ref().0.wait()?)) {
                return Ok(beat?);
            }
        }
    }
}

async fn requests(target: Rc<Target>, index: usize, pace: Pace, meter: Rc<Meter>) -> Result<()> {
    let mut stream = target.connect(&target.http1).await?;
    let request = target.request(index);
    let mut buffer = BytesMut::with_capacity(4096);
    meter.stands();
    loop {
        pace.beat().await?;
        let started = Instant::now();
        exchange(&mut stream, &target, &request, &mut buffer).await?;
        meter.unit(started);
    }
}

async fn handshakes(
    target: Rc<Target>,
    shake: Shake,
    index: usize,
    pace: Pace,
    meter: Rc<Meter>,
) -> Result<()> {
    let mut buffer = BytesMut::with_capacity(4096);
    let tls = target.connector(shake)?;
    if shake == Shake::Resumed {
        // Its ticket comes with the answer at the latest.
        let mut stream = target.connect(&tls).await?;
        exchange(&mut stream, &target, &target.request(index), &mut buffer).await?;
        stream.shutdown().await?;
    }
    let (expected, group) = match shake {
        Shake::Ecdsa | Shake::Rsa => (rustls::HandshakeKind::Full, X25519),
        Shake::Resumed => (rustls::HandshakeKind::Resumed, X25519),
        Shake::Hybrid => (rustls::HandshakeKind::Full, X25519MLKEM768),
    };
    meter.stands();
    for turn in index.. {
        pace.beat().await?;
        let started = Instant::now();
        let mut stream = target.connect(&tls).await?;
        let session = stream.get_ref().1;
        let (kind, agreed) = (session.handshake_kind(), session.negotiated_key_exchange_group());
        ensure!(kind == Some(expected), "not {expected:?}: {kind:?}");
        ensure!(agreed.is_some_and(|agreed| agreed.name() == group.name()), "another group: {agreed:?}");
        exchange(&mut stream, &target, &target.request(turn), &mut buffer).await?;
        meter.unit(started);
        stream.shutdown().await?;
    }
    Ok(())
}

async fn exchange(
    stream: &mut TlsStream<TcpStream>,
    target: &Target,
    request: &[u8],
    buffer: &mut BytesMut,
) -> Result<()> {
    stream.write_all(request).await?;
    stream.flush().await?;
    let answer = read_answer(stream, buffer).await?;
    target.check(answer.status, buffer.get(answer.head..answer.head + answer.body).unwrap_or_default())?;
    buffer.advance(answer.head + answer.body);
    ensure!(buffer.is_empty(), "more came than was asked for");
    Ok(())
}

async fn requests2(target: Rc<Target>, index: usize, pace: Pace, meter: Rc<Meter>) -> Result<()> {
    let stream = target.connect(&target.http2).await?;
    ensure!(stream.get_ref().1.alpn_protocol() == Some(b"h2"), "HTTP/2 was not agreed");
    let (mut sender, connection) = hyper::client::conn::http2::handshake(Here, TokioIo::new(stream)).await?;
    let authorization = http::HeaderValue::try_from(format!("Bearer {}", target.token(index)))?;
    let mut driver = JoinSet::new();
    driver.spawn_local(async move { anyhow::Ok(connection.await?) });
    meter.stands();
    loop {
        pace.beat().await?;
        let started = Instant::now();
        let request = http::Request::get("https://localhost/v1/echo")
            .header(http::header::USER_AGENT, "sealgate-benches")
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::AUTHORIZATION, authorization.clone())
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        target.check(status, &body)?;
        meter.unit(started);
    }
}

/// Runs hyper's own tasks on this thread.
#[derive(Clone, Copy)]
struct Here;

impl<F: Future + 'static> hyper::rt::Executor<F> for Here {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move {
            future.await;
        });
    }
}

async fn echoes(
    target: Rc<Target>,
    path: &'static str,
    in_flight: usize,
    index: usize,
    pace: Pace,
    meter: Rc<Meter>,
) -> Result<()> {
    let mut socket = WebSocket::open(&target, path, index).await?;
    let mut sent = VecDeque::with_capacity(in_flight);
    meter.stands();
    let mut due = in_flight;
    loop {
        if due > 0 {
            pace.beat().await?;
        }
        let now = Instant::now();
        for _ in 0..due {
            socket.send_message();
            sent.push_back(now);
        }
        socket.flush().await?;
        let echoed = socket.receive().await?;
        for started in sent.drain(..echoed) {
            meter.unit(started);
        }
        due = match pace.0 {
            // Closed loop: every echo makes room for one message.
            None => echoed,
            // On a beat: the burst must be whole again first.
            Some(_) if sent.is_empty() => in_flight,
            Some(_) => 0,
        };
    }
}

/// The client's side of a WebSocket, as little of RFC 6455 as an echo needs.
pub(crate) struct WebSocket {
    stream: TlsStream<TcpStream>,
    incoming: BytesMut,
    outgoing: Vec<u8>,
    /// Stands in every message of this socket, so that another's echo is noticed.
    index: usize,
    sent: u64,
    received: u64,
}

const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8a;

/// Sample key and its answer of RFC 6455 §1.3. What it defends against (caches that were fooled) is not
/// what is measured here.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &[u8] = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

impl WebSocket {
    pub(crate) async fn open(target: &Target, path: &str, index: usize) -> Result<Self> {
        let mut stream = target.connect(&target.http1).await?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: sealgate-benches\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\
             Authorization: Bearer {}\r\n\r\n",
            target.token(index)
        );
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        let mut incoming = BytesMut::with_capacity(4096);
        let answer = read_answer(&mut stream, &mut incoming).await?;
        ensure!(
            answer.status == 101 && answer.accepted,
            "{path} answered {}: {}",
            answer.status,
            String::from_utf8_lossy(&incoming)
        );
        incoming.advance(answer.head);
        Ok(Self { stream, incoming, outgoing: Vec::new(), index, sent: 0, received: 0 })
    }

    /// Puts the next message into the buffer that [`Self::flush`] sends.
    pub(crate) fn send_message(&mut self) {
        let payload = message(self.index, self.sent);
        // Any key will do: what counts is that the proxy cannot know it.
        let mask = (self.sent as u32).wrapping_mul(0x9e37_79b9).to_be_bytes();
        self.sent += 1;
        put_frame(&mut self.outgoing, TEXT, mask, &payload);
    }

    pub(crate) async fn flush(&mut self) -> Result<()> {
        if !self.outgoing.is_empty() {
            self.stream.write_all(&self.outgoing).await?;
            self.stream.flush().await?;
            self.outgoing.clear();
        }
        Ok(())
    }

    /// Waits for bytes and takes the whole frames among them; returns how many echoes came. Pings are
    /// answered with the next [`Self::flush`].
    pub(crate) async fn receive(&mut self) -> Result<usize> {
        let mut echoed = 0;
        let mut frames = 0;
        loop {
            while let Some((opcode, head, length)) = frame(&self.incoming)? {
                let payload = self.incoming.get(head..head + length).unwrap_or_default();
                match opcode {
                    TEXT => {
                        let expected = message(self.index, self.received);
                        ensure!(payload == expected, "wrong echo: {}", String::from_utf8_lossy(payload));
                        self.received += 1;
                        echoed += 1;
                    }
                    PING => put_frame(&mut self.outgoing, PONG, [1, 2, 3, 4], payload),
                    CLOSE => {
                        let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                        bail!(
                            "closed with {code} {}",
                            String::from_utf8_lossy(payload.get(2..).unwrap_or_default())
                        );
                    }
                    other => bail!("unexpected frame {other:#04x}"),
                }
                self.incoming.advance(head + length);
                frames += 1;
            }
            if frames > 0 {
                return Ok(echoed);
            }
            ensure!(self.stream.read_buf(&mut self.incoming).await? > 0, "closed without a close frame");
        }
    }
}

impl WebSocket {
    /// Waits for a close frame; gives its code and when it was read.
    pub(crate) async fn closed(mut self) -> Result<(u16, Instant)> {
        loop {
            while let Some((opcode, head, length)) = frame(&self.incoming)? {
                if opcode == CLOSE {
                    let payload = self.incoming.get(head..head + length).unwrap_or_default();
                    let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    return Ok((code, Instant::now()));
                }
                self.incoming.advance(head + length);
            }
            ensure!(self.stream.read_buf(&mut self.incoming).await? > 0, "ended without a close frame");
        }
    }
}

/// A JSON message of [`MESSAGE_BYTES`] that names its socket and its place in it, in the sixteen digits.
fn message(index: usize, number: u64) -> [u8; MESSAGE_BYTES] {
    const DIGITS_AT: usize = 23;
    let mut bytes = *b"{\"type\":\"echo\",\"text\":\"0000000000000000.........................\
        ..............................................................\"}";
    let name = (index as u64) << 40 | number;
    for (place, nibble) in bytes.iter_mut().skip(DIGITS_AT).zip((0..16).rev()) {
        let digit = (name >> (nibble * 4) & 0xf) as u8;
        *place = if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
    }
    bytes
}

/// Appends a masked frame (RFC 6455 §5.2); for payloads up to 64 KiB, which ours are.
fn put_frame(out: &mut Vec<u8>, opcode: u8, mask: [u8; 4], payload: &[u8]) {
    out.push(opcode);
    match u8::try_from(payload.len()) {
        Ok(length @ ..=125) => out.push(0x80 | length),
        _ => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

/// First byte, length of the head and length of the payload of the first frame, when it is whole.
fn frame(bytes: &[u8]) -> Result<Option<(u8, usize, usize)>> {
    let [opcode, length, rest @ ..] = bytes else {
        return Ok(None);
    };
    let (head, length) = match length {
        0..=125 => (2, usize::from(*length)),
        126 => match rest.first_chunk() {
            Some(length) => (4, usize::from(u16::from_be_bytes(*length))),
            None => return Ok(None),
        },
        127 => bail!("a frame of more than 64 KiB"),
        128.. => bail!("a masked frame from a server"),
    };
    Ok((bytes.len() >= head + length).then_some((*opcode, head, length)))
}

/// A response that stands whole in the buffer.
struct Answer {
    status: u16,
    head: usize,
    body: usize,
    /// It accepts the WebSocket that [`KEY`] asked for.
    accepted: bool,
}

/// Reads until `buffer` holds one whole response; leaves it there.
async fn read_answer(stream: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> Result<Answer> {
    loop {
        if let Some(answer) = answer(buffer)? {
            return Ok(answer);
        }
        let got = stream.read_buf(buffer).await?;
        ensure!(got > 0, "closed before the answer was whole: {}", String::from_utf8_lossy(buffer));
    }
}

fn answer(bytes: &[u8]) -> Result<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes)? else {
        return Ok(None);
    };
    let status = response.code.context("no status")?;
    let (mut length, mut accepted) = (None, false);
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            length = Some(std::str::from_utf8(header.value)?.parse::<usize>()?);
        } else if header.name.eq_ignore_ascii_case("sec-websocket-accept") {
            accepted = header.value == ACCEPT;
        }
    }
    let body = match (status, length) {
        (101, _) => 0,
        (_, Some(length)) => length,
        (_, None) => bail!("answer {status} has no length"),
    };
    Ok((bytes.len() >= head + body).then_some(Answer { status, head, body, accepted }))
}

/// One request on a connection of its own; for what is not measured. Returns the body of a 200.
pub(crate) async fn fetch(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> Result<Bytes> {
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut buffer = BytesMut::new();
    let answer = read_answer(&mut stream, &mut buffer).await?;
    buffer.advance(answer.head);
    buffer.truncate(answer.body);
    ensure!(answer.status == 200, "answered {}: {}", answer.status, String::from_utf8_lossy(&buffer));
    Ok(buffer.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_json_of_the_stated_size_and_differ() {
        let value: serde_json::Value = serde_json::from_slice(&message(3, 7)).unwrap();
        assert_eq!(value["type"], "echo");
        assert!(value["text"].as_str().unwrap().starts_with("0000030000000007"));
        assert_ne!(message(3, 7), message(3, 8));
        assert_ne!(message(3, 7), message(4, 7));
    }

    #[test]
    fn a_frame_is_masked_and_a_server_must_not() {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, TEXT, [1, 2, 3, 4], b"abcde");
        assert_eq!(bytes, [0x81, 0x85, 1, 2, 3, 4, b'a' ^ 1, b'b' ^ 2, b'c' ^ 3, b'd' ^ 4, b'e' ^ 1]);
        assert!(frame(&bytes).is_err());
    }

    #[test]
    fn frames_are_taken_when_whole() {
        let mut bytes = vec![TEXT, 126, 0, 128];
        bytes.extend([b'x'; 127]);
        assert_eq!(frame(&bytes).unwrap(), None);
        bytes.push(b'x');
        assert_eq!(frame(&bytes).unwrap(), Some((TEXT, 4, 128)));
        assert_eq!(frame(&[PING, 0]).unwrap(), Some((PING, 2, 0)));
        assert_eq!(frame(&[PING]).unwrap(), None);
        assert_eq!(frame(&[]).unwrap(), None);
    }

    #[test]
    fn answers_are_taken_when_whole() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        assert!(answer(&whole[..whole.len() - 1]).unwrap().is_none());
        assert!(answer(&whole[..20]).unwrap().is_none());
        let taken = answer(whole).unwrap().unwrap();
        assert_eq!((taken.status, &whole[taken.head..][..taken.body]), (200, &b"{}"[..]));
        assert!(answer(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
        let upgrade = b"HTTP/1.1 101 S\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        assert!(answer(upgrade).unwrap().unwrap().accepted);
        assert!(!answer(b"HTTP/1.1 101 S\r\n\r\n").unwrap().unwrap().accepted);
    }
}
