//! The relay between two in-memory peers, on a clock that only moves when everybody waits.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr};

use http::{HeaderMap, Method};
use prometheus::{IntCounter, IntGauge};
use sealgate_policy::{Bundle, Identity, IdentityParts, Policy, RequestFacts, settle};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite;

use super::super::deflate;
use super::super::frame::{read_header, unmask, write_compressed, write_frame};
use super::*;

const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
const START: u64 = 1_700_000_000;

// ---- The bench the tunnel is on.

struct Bed {
    client: DuplexStream,
    backend: DuplexStream,
    orders: Rc<Orders>,
    renewals: Rc<Renewals>,
    metrics: Arc<TunnelMetrics>,
    limits: sealgate_policy::TunnelLimits,
    end: JoinHandle<TunnelEnd>,
}

/// Opens a tunnel under a `[[websocket]]` with these keys, and runs a test on it.
fn tunnel(keys: &str, test: impl AsyncFnOnce(Bed)) {
    tunnel_with(keys, 64 * 1024, b"", b"", test);
}

fn tunnel_with(keys: &str, pipe: usize, early: &[u8], late: &[u8], test: impl AsyncFnOnce(Bed)) {
    open(permit(keys, None), None, None, pipe, early, late, test);
}

/// As [`tunnel`], after permessage-deflate was agreed on with the client by this offer.
fn compressed_tunnel(keys: &str, offer: &'static str, pipe: usize, test: impl AsyncFnOnce(Bed)) {
    let offer = http::HeaderValue::from_static(offer);
    let headers = HeaderMap::from_iter([(http::header::SEC_WEBSOCKET_EXTENSIONS, offer)]);
    let agreed = Agreed::accept(&headers).unwrap();
    open(permit(keys, None), None, agreed, pipe, b"", b"", test);
}

/// As [`tunnel`], for alice, whose token expires at `expires_at` and whose session ends at `session_ends`.
fn tunnel_of_alice(keys: &str, expires_at: u64, session_ends: u64, test: impl AsyncFnOnce(Bed)) {
    let permit = permit(keys, Some(alice(expires_at)));
    open(permit, Some(session_ends), None, 64 * 1024, b"", b"", test);
}

fn open(
    permit: TunnelPermit,
    session_ends: Option<u64>,
    deflate: Option<Agreed>,
    pipe: usize,
    early: &[u8],
    late: &[u8],
    test: impl AsyncFnOnce(Bed),
) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let limits = permit.limits().clone();
    LocalSet::new().block_on(&runtime, async {
        let (client, downstream) = tokio::io::duplex(pipe);
        let (backend, upstream) = tokio::io::duplex(pipe);
        let (orders, renewals, metrics) = (Orders::new(), Rc::<Renewals>::default(), metrics());
        let tunnel = Tunnel {
            downstream,
            upstream,
            downstream_early: Bytes::copy_from_slice(early),
            upstream_early: Bytes::copy_from_slice(late),
            deflate,
            terms: Terms { session_ends, ..terms(permit, metrics.clone(), START) },
            renewer: renewals.clone(),
            orders: orders.clone(),
        };
        let end = tokio::task::spawn_local(tunnel.run());
        test(Bed { client, backend, orders, renewals, metrics, limits, end }).await;
    });
}

/// Terms made when the wall clock showed `now`.
fn terms(permit: TunnelPermit, metrics: Arc<TunnelMetrics>, now: u64) -> Terms {
    Terms {
        session: None,
        permit,
        rates: Rc::new(TwoOfEach::default()),
        decisions: Rc::new(sealgate_policy::DecisionCache::new(8)),
        metrics,
        session_ends: None,
        clock: (Instant::now(), UNIX_EPOCH + Duration::from_secs(now)),
    }
}

/// The tokens that clients want to go on with. The tests are the judge.
#[derive(Default)]
struct Renewals(RefCell<Vec<String>>);

impl Renewer for Renewals {
    fn renew(&self, renewal: Renewal) {
        self.0.borrow_mut().push(renewal.token().to_owned());
    }
}

fn permit(keys: &str, identity: Option<Identity>) -> TunnelPermit {
    let auth = if identity.is_some() { "required" } else { "none" };
    let text = format!(
        r#"
        version = 1
        [[issuer]]
        name = "issuer"
        issuer = "https://issuer.example"
        audience = ["sealgate"]
        algorithms = ["ES256"]
        jwks = "file:jwks.json"
        [[upstream]]
        name = "backend"
        endpoints = ["unix:/run/backend.sock"]
        [[rate]]
        name = "messages"
        per = ["address"]
        quota = 2
        period = "1m"
        [[websocket]]
        name = "chat"
        path = "/ws"
        upstream = "backend"
        auth = "{auth}"
        {keys}
        "#
    );
    let schema =
        br#"{ "type": "object", "required": ["text"], "properties": { "text": { "type": "string" } } }"#;
    let files = BTreeMap::from([
        ("policy.toml".to_owned(), text.into_bytes()),
        ("schemas/say.json".to_owned(), schema.to_vec()),
    ]);
    let policy = Policy::compile(&Bundle { root: "/".into(), files }, &BTreeMap::new()).unwrap();
    let facts = RequestFacts {
        certificate: None,
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        host: "localhost",
        method: &Method::GET,
        path: "/ws",
        query: None,
        headers: &HeaderMap::new(),
        websocket: true,
        content_length: None,
        has_body: false,
        tls: sealgate_policy::TlsFacts::default(),
    };
    let demands = policy.match_request(&facts).unwrap().judge(&facts, identity.map(Arc::new)).unwrap();
    settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None }).unwrap().into_tunnel().unwrap()
}

fn alice(expires_at: u64) -> Identity {
    Identity::new(IdentityParts { subject: "alice".into(), expires_at, ..IdentityParts::default() })
}

fn metrics() -> Arc<TunnelMetrics> {
    let counter = || IntCounter::new("test", "test").unwrap();
    Arc::new(TunnelMetrics {
        messages_to_upstream: counter(),
        bytes_to_upstream: counter(),
        messages_to_client: counter(),
        bytes_to_client: counter(),
        refused: ReasonCounters::prepare(|_| counter()),
        shadowed: ReasonCounters::prepare(|_| counter()),
        open: IntGauge::new("test", "test").unwrap(),
    })
}

fn counted(counters: &ReasonCounters, reason: &str) -> u64 {
    counters.0.iter().find(|(name, _)| *name == reason).unwrap().1.get()
}

/// A limiter that lets two messages through.
#[derive(Default)]
struct TwoOfEach(Cell<u32>);

impl RateTaker for TwoOfEach {
    fn take(&self, wanted: &[RateIndex], _: &RateFacts<'_>) -> Result<Option<Settling>, RateExceeded> {
        self.0.set(self.0.get() + 1);
        match self.0.get() {
            ..=2 => Ok(None),
            _ => Err(RateExceeded { rate: wanted[0], retry_after: Duration::from_secs(7), unknown: false }),
        }
    }
}

const CHECKED: &str = r#"
    type_pointer = "/type"
    message_rates = []
    [[websocket.message]]
    type = "say"
    direction = "both"
    schema = "schemas/say.json"
    activity = true
    [[websocket.message]]
    type = "try"
    direction = "to-upstream"
    schema = "schemas/say.json"
    on_refusal = "answer"
    [[websocket.message]]
    type = "limited"
    direction = "to-upstream"
    rates = ["messages"]
"#;

const SAY: &[u8] = br#"{"type":"say","text":"hello"}"#;
const SAY_NOTHING: &[u8] = br#"{"type":"say"}"#;
const TRY_NOTHING: &[u8] = br#"{"type":"try"}"#;
const LIMITED: &[u8] = br#"{"type":"limited"}"#;

// ---- Words of the wire.

fn from_client(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    write_frame(&mut wire, opcode, Some(MASK), payload);
    wire
}

fn from_backend(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    write_frame(&mut wire, opcode, None, payload);
    wire
}

/// A message that the client compressed.
fn compressed(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    write_compressed(&mut wire, opcode, Some(MASK), &deflate::compressed(payload));
    wire
}

fn unfinished(mut wire: Vec<u8>) -> Vec<u8> {
    wire[0] &= 0x7F;
    wire
}

fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    [&code.to_be_bytes(), reason.as_bytes()].concat()
}

/// Reads one frame: opcode and unmasked payload.
async fn read_frame(stream: &mut DuplexStream, sender: Sender) -> (Opcode, Vec<u8>) {
    let mut wire = Vec::new();
    loop {
        wire.push(stream.read_u8().await.expect("a frame"));
        if let Some(header) = read_header(sender, u32::MAX, false, &wire).unwrap() {
            let mut payload = vec![0; header.payload_len];
            stream.read_exact(&mut payload).await.unwrap();
            unmask(&mut payload, header.mask.unwrap_or_default(), 0);
            return (header.opcode, payload);
        }
    }
}

/// Reads a close frame, answers it, and gives its code and reason.
async fn read_close(stream: &mut DuplexStream, sender: Sender) -> (u16, String) {
    let (opcode, payload) = read_frame(stream, sender).await;
    assert_eq!(opcode, Opcode::Close, "{:?}", String::from_utf8_lossy(&payload));
    let code = close::read(&payload).unwrap();
    let reason = String::from_utf8(payload.get(2..).unwrap_or_default().to_vec()).unwrap();
    let answer = match sender {
        Sender::Server => from_client(Opcode::Close, &payload),
        Sender::Client => from_backend(Opcode::Close, &payload),
    };
    // The gateway may have hung up on a peer that broke the rules.
    let _ = stream.write_all(&answer).await;
    (code, reason)
}

impl Bed {
    async fn client_sends(&mut self, wire: &[u8]) {
        self.client.write_all(wire).await.unwrap();
    }

    async fn backend_sends(&mut self, wire: &[u8]) {
        self.backend.write_all(wire).await.unwrap();
    }

    async fn client_reads(&mut self) -> (Opcode, Vec<u8>) {
        read_frame(&mut self.client, Sender::Server).await
    }

    async fn backend_reads(&mut self) -> (Opcode, Vec<u8>) {
        read_frame(&mut self.backend, Sender::Client).await
    }

    async fn expect_renewed(&mut self) {
        let answer: serde_json::Value = serde_json::from_slice(&self.client_reads().await.1).unwrap();
        assert_eq!(answer["type"], "renew.ok", "{answer}");
    }

    /// Both are told to close and answer; gives the codes and the end.
    async fn closes(mut self) -> ((u16, String), (u16, String), TunnelEnd) {
        let client = read_close(&mut self.client, Sender::Server).await;
        let backend = read_close(&mut self.backend, Sender::Client).await;
        let mut rest = Vec::new();
        self.client.read_to_end(&mut rest).await.unwrap();
        self.backend.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"", "something follows the close frame");
        drop((self.client, self.backend));
        (client, backend, self.end.await.unwrap())
    }
}

// ---- Messages.

#[test]
fn accepted_messages_pass_in_their_wire_bytes() {
    tunnel(CHECKED, async |mut bed| {
        let fragmented =
            [unfinished(from_client(Opcode::Text, &SAY[..7])), from_client(Opcode::Continuation, &SAY[7..])];
        let wire = [from_client(Opcode::Text, SAY), fragmented.concat()].concat();
        bed.client_sends(&wire).await;
        let mut got = vec![0; wire.len()];
        bed.backend.read_exact(&mut got).await.unwrap();
        assert_eq!(got, wire);

        let wire = from_backend(Opcode::Text, SAY);
        bed.backend_sends(&wire).await;
        let mut got = vec![0; wire.len()];
        bed.client.read_exact(&mut got).await.unwrap();
        assert_eq!(got, wire);
        assert_eq!(bed.metrics.messages_to_upstream.get(), 2);
        assert_eq!(bed.metrics.bytes_to_upstream.get(), 2 * SAY.len() as u64);
        assert_eq!(bed.metrics.messages_to_client.get(), 1);
    });
}

#[test]
fn one_byte_at_a_time_changes_nothing() {
    tunnel(CHECKED, async |mut bed| {
        let wire = [
            from_client(Opcode::Text, SAY),
            unfinished(from_client(Opcode::Text, &SAY[..9])),
            from_client(Opcode::Ping, b"inside"),
            from_client(Opcode::Continuation, &SAY[9..]),
        ]
        .concat();
        for byte in wire {
            bed.client_sends(&[byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(bed.client_reads().await, (Opcode::Pong, b"inside".to_vec()));
        assert_eq!(bed.backend_reads().await, (Opcode::Text, SAY.to_vec()));
        let (first, second) = (bed.backend_reads().await, bed.backend_reads().await);
        assert_eq!((first.0, second.0), (Opcode::Text, Opcode::Continuation));
        assert_eq!([first.1, second.1].concat(), SAY);
    });
}

#[test]
fn what_nobody_looks_into_passes_frame_by_frame() {
    tunnel("max_message = '1MiB'", async |mut bed| {
        bed.client_sends(&unfinished(from_client(Opcode::Binary, b"a"))).await;
        assert_eq!(bed.backend_reads().await, (Opcode::Binary, b"a".to_vec()));
        bed.client_sends(&from_client(Opcode::Continuation, b"b")).await;
        assert_eq!(bed.backend_reads().await, (Opcode::Continuation, b"b".to_vec()));
        let long = vec![b'x'; 60_000];
        for _ in 0..4 {
            bed.backend_sends(&from_backend(Opcode::Text, &long)).await;
            assert_eq!(bed.client_reads().await, (Opcode::Text, long.clone()));
        }
    });
}

#[test]
fn bytes_that_came_with_the_handshake_come_first() {
    let early = from_client(Opcode::Text, SAY);
    let late = from_backend(Opcode::Text, SAY);
    tunnel_with(CHECKED, 4096, &early, &late[..5], async |mut bed| {
        assert_eq!(bed.backend_reads().await, (Opcode::Text, SAY.to_vec()));
        bed.backend_sends(&from_backend(Opcode::Text, SAY)[5..]).await;
        assert_eq!(bed.client_reads().await, (Opcode::Text, SAY.to_vec()));
    });
}

/// Counts the writes that reach a stream.
struct Counting<S>(S, Rc<Cell<u32>>);

impl<S: AsyncRead + Unpin> AsyncRead for Counting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counting<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.1.set(self.1.get() + 1);
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn sixteen_messages_are_one_write_and_leave_nothing_behind() {
    let (mut client, downstream) = tokio::io::duplex(64 * 1024);
    let (mut backend, upstream) = tokio::io::duplex(64 * 1024);
    let writes = Rc::new(Cell::new(0));
    let tunnel = Tunnel {
        downstream,
        upstream: Counting(upstream, writes.clone()),
        downstream_early: Bytes::new(),
        upstream_early: Bytes::new(),
        deflate: None,
        terms: terms(permit(CHECKED, None), metrics(), 0),
        renewer: Rc::<Renewals>::default(),
        orders: Orders::new(),
    };
    let mut relay = tunnel.run();
    let wire = from_client(Opcode::Text, SAY).repeat(16);
    client.write_all(&wire).await.unwrap();
    let polled = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut relay).poll(cx).is_pending())).await;
    assert!(polled);
    let mut got = vec![0; wire.len()];
    backend.read_exact(&mut got).await.unwrap();
    assert_eq!(got, wire);
    assert_eq!(writes.get(), 1);
    assert_eq!(relay.client.unread.capacity() + relay.upstream.out.capacity(), 0);
}

#[test]
fn an_idle_tunnel_is_small() {
    let size = size_of::<Relay<(), ()>>();
    assert!(size <= 768, "{size} bytes beside the streams");
}

// ---- Refusals.

#[test]
fn a_refused_message_closes_behind_those_accepted() {
    tunnel(CHECKED, async |mut bed| {
        let wire = [
            from_client(Opcode::Text, SAY),
            unfinished(from_client(Opcode::Text, &SAY[..3])),
            from_client(Opcode::Continuation, &SAY[3..]),
            from_client(Opcode::Text, SAY_NOTHING),
            from_client(Opcode::Text, SAY),
        ];
        bed.client_sends(&wire.concat()).await;
        assert_eq!(bed.backend_reads().await.1, SAY);
        assert_eq!([bed.backend_reads().await.1, bed.backend_reads().await.1].concat(), SAY);
        assert_eq!(counted(&bed.metrics.refused, "schema"), 1);
        let (client, backend, end) = bed.closes().await;
        assert_eq!(client.0, 1007);
        assert!(client.1.starts_with("schema: "), "{}", client.1);
        assert_eq!(backend, (1001, "schema".to_owned()));
        assert_eq!((end.code, end.by, end.refused), (1007, EndedBy::Gateway, 1));
        assert!(matches!(end.denial, Some(Denial::Schema { .. })));
        assert_eq!(end.to_upstream, Traffic { messages: 2, bytes: 2 * SAY.len() as u64 });
    });
}

#[test]
fn a_refused_message_may_be_answered_and_dropped() {
    tunnel(CHECKED, async |mut bed| {
        let wire = [
            from_client(Opcode::Text, SAY),
            from_client(Opcode::Text, TRY_NOTHING),
            unfinished(from_client(Opcode::Text, &TRY_NOTHING[..5])),
            from_client(Opcode::Continuation, &TRY_NOTHING[5..]),
            from_client(Opcode::Text, SAY),
        ];
        bed.client_sends(&wire.concat()).await;
        for _ in 0..2 {
            let (opcode, answer) = bed.client_reads().await;
            let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
            assert_eq!(opcode, Opcode::Text);
            assert_eq!((&answer["type"], &answer["reason"]), (&"error".into(), &"schema".into()));
        }
        assert_eq!(bed.backend_reads().await.1, SAY);
        assert_eq!(bed.backend_reads().await.1, SAY);
        assert!(timeout(Duration::from_secs(1), bed.backend_reads()).await.is_err());
        assert_eq!(counted(&bed.metrics.refused, "schema"), 2);
    });
}

#[test]
fn an_answer_does_not_begin_inside_a_message() {
    let keys = r#"
        [[websocket.message]]
        type = "try"
        direction = "to-upstream"
        schema = "schemas/say.json"
        on_refusal = "answer"
    "#;
    tunnel(keys, async |mut bed| {
        bed.backend_sends(&unfinished(from_backend(Opcode::Text, b"be"))).await;
        assert_eq!(bed.client_reads().await, (Opcode::Text, b"be".to_vec()));
        bed.client_sends(&from_client(Opcode::Text, TRY_NOTHING)).await;
        assert!(timeout(Duration::from_secs(1), bed.client_reads()).await.is_err());
        bed.backend_sends(&from_backend(Opcode::Continuation, b"gin")).await;
        assert_eq!(bed.client_reads().await, (Opcode::Continuation, b"gin".to_vec()));
        assert_eq!(bed.client_reads().await.0, Opcode::Text);
    });
}

#[test]
fn too_many_unread_answers_close() {
    tunnel_with(&format!("buffer = '1KiB'\n{CHECKED}"), 512, b"", b"", async |mut bed| {
        let wire = from_client(Opcode::Text, TRY_NOTHING);
        let mut sent = 0;
        while let Ok(Ok(())) = timeout(Duration::from_secs(1), bed.client.write_all(&wire)).await {
            sent += 1;
            if sent == 100 {
                break;
            }
        }
        assert_eq!(read_close(&mut bed.backend, Sender::Client).await, (1001, "schema".to_owned()));
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by), (1007, EndedBy::Gateway));
        assert!(end.refused < 30, "{} messages were answered", end.refused);
    });
}

#[test]
fn rates_are_asked_and_their_refusal_says_when_to_come_back() {
    tunnel(CHECKED, async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, LIMITED).repeat(3)).await;
        assert_eq!(bed.backend_reads().await.1, LIMITED);
        assert_eq!(bed.backend_reads().await.1, LIMITED);
        let (client, _, end) = bed.closes().await;
        assert_eq!(client, (4429, "rate-exceeded: try again in 7 s".to_owned()));
        assert_eq!(end.to_upstream.messages, 2);
    });
    // The same where nothing is looked into.
    tunnel("message_rates = ['messages']", async |mut bed| {
        bed.client_sends(&from_client(Opcode::Binary, b"a").repeat(3)).await;
        assert_eq!(bed.backend_reads().await.1, b"a");
        assert_eq!(bed.backend_reads().await.1, b"a");
        assert_eq!(bed.closes().await.0.0, 4429);
    });
}

/// A limiter that asks others about each message, and hears when the test says so.
#[derive(Default)]
struct Asking(RefCell<Vec<tokio::sync::oneshot::Sender<()>>>);

impl RateTaker for Asking {
    fn take(&self, _: &[RateIndex], _: &RateFacts<'_>) -> Result<Option<Settling>, RateExceeded> {
        let (sender, answer) = tokio::sync::oneshot::channel();
        self.0.borrow_mut().push(sender);
        Ok(Some(Box::pin(async move { drop(answer.await) })))
    }
}

#[test]
fn the_next_message_waits_until_shared_rates_have_settled_and_nothing_else_does() {
    for (keys, message) in [(CHECKED, LIMITED), ("message_rates = ['messages']", SAY)] {
        tunnel(keys, async |mut bed| {
            let asking = Rc::<Asking>::default();
            let asked = || asking.0.borrow().len();
            let terms = Terms { rates: asking.clone(), ..terms(permit(keys, None), metrics(), START) };
            bed.orders.give(Order::Policy(Box::new(terms)));
            // All three come at once, the last one's end later, and then the client's close.
            let wire = [from_client(Opcode::Text, message).repeat(3)].concat();
            bed.client_sends(&wire[..wire.len() - 2]).await;
            assert_eq!(bed.backend_reads().await.1, message);
            for number in 1..=2 {
                // Meanwhile the backend is heard.
                bed.backend_sends(&from_backend(Opcode::Text, SAY)).await;
                assert_eq!(bed.client_reads().await.1, SAY);
                assert_eq!(asked(), number);
                let settle = asking.0.borrow_mut().pop().unwrap();
                asking.0.borrow_mut().push(tokio::sync::oneshot::channel().0);
                settle.send(()).unwrap();
                if number == 2 {
                    bed.client_sends(&wire[wire.len() - 2..]).await;
                    bed.client_sends(&from_client(Opcode::Close, &close_payload(1000, ""))).await;
                }
                assert_eq!(bed.backend_reads().await.1, message);
            }
            asking.0.borrow_mut().clear();
            let (code, _) = read_close(&mut bed.backend, Sender::Client).await;
            assert_eq!(code, 1000);
        });
    }
}

#[test]
fn a_rule_in_shadow_mode_counts_and_lets_pass() {
    tunnel(&format!("mode = 'shadow'\n{CHECKED}"), async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, SAY_NOTHING)).await;
        assert_eq!(bed.backend_reads().await.1, SAY_NOTHING);
        assert_eq!(counted(&bed.metrics.shadowed, "schema"), 1);
        assert_eq!(counted(&bed.metrics.refused, "schema"), 0);
    });
}

#[test]
fn a_client_that_breaks_the_rules_is_told_which() {
    let unmasked = from_backend(Opcode::Text, b"a");
    let cases: &[(u16, &str, Vec<u8>)] = &[
        (1002, "protocol: client frame is not masked", unmasked),
        (1002, "protocol: reserved bit", vec![0xC1]),
        (1002, "protocol: reserved opcode", vec![0x83]),
        (1002, "protocol: continuation", from_client(Opcode::Continuation, b"a")),
        (1002, "protocol: close code", from_client(Opcode::Close, &close_payload(1005, ""))),
        (1002, "protocol: close frame", from_client(Opcode::Close, b"a")),
        (1007, "not-utf8", from_client(Opcode::Close, &[3, 232, 0xFF])),
        (1007, "not-utf8", from_client(Opcode::Text, &[0xFF])),
        (1007, "not-json", from_client(Opcode::Text, b"hello")),
        (1008, "unknown-message-type", from_client(Opcode::Text, b"{}")),
        (1003, "message-kind", from_client(Opcode::Binary, b"")),
        (1009, "message-too-big", vec![0x81, 0xFF, 0, 0, 0, 0, 0, 1, 0, 1]),
        (4429, "control-flood", from_client(Opcode::Ping, b"").repeat(11)),
    ];
    for (code, reason, wire) in cases {
        tunnel(CHECKED, async |mut bed| {
            bed.client_sends(wire).await;
            if *code == 4429 {
                for _ in 0..10 {
                    assert_eq!(bed.client_reads().await.0, Opcode::Pong);
                }
            }
            let (client, backend, end) = bed.closes().await;
            assert_eq!(client.0, *code, "{reason}");
            assert!(client.1.starts_with(reason), "{} is not {reason}", client.1);
            assert_eq!(backend.0, 1001);
            assert_eq!((end.code, end.by, end.refused), (*code, EndedBy::Gateway, 1));
        });
    }
}

#[test]
fn a_backend_that_breaks_the_rules_is_told_and_the_client_is_not() {
    let cases: &[(u16, Vec<u8>)] = &[
        (1002, from_client(Opcode::Text, SAY)),
        (1007, from_backend(Opcode::Text, &[0xFF])),
        (1007, from_backend(Opcode::Text, SAY_NOTHING)),
        (1008, from_backend(Opcode::Text, LIMITED)),
        (1009, vec![0x81, 127, 0, 0, 0, 0, 0, 1, 0, 1]),
    ];
    for (code, wire) in cases {
        tunnel(CHECKED, async |mut bed| {
            bed.backend_sends(wire).await;
            let (client, backend, end) = bed.closes().await;
            assert_eq!((client.0, backend.0), (1011, *code));
            assert_eq!((end.code, end.by), (1011, EndedBy::Gateway));
            assert_eq!(end.denial.map(|denial| denial.close_code()), Some(*code));
        });
    }
}

// ---- Pings.

#[test]
fn pings_are_answered_hop_by_hop() {
    tunnel("", async |mut bed| {
        bed.client_sends(&from_client(Opcode::Ping, b"one")).await;
        assert_eq!(bed.client_reads().await, (Opcode::Pong, b"one".to_vec()));
        bed.backend_sends(&from_backend(Opcode::Ping, b"two")).await;
        assert_eq!(bed.backend_reads().await, (Opcode::Pong, b"two".to_vec()));
        bed.client_sends(&from_client(Opcode::Pong, b"unasked")).await;
        bed.client_sends(&from_client(Opcode::Text, b"next")).await;
        assert_eq!(bed.backend_reads().await, (Opcode::Text, b"next".to_vec()));
    });
}

#[test]
fn a_silent_peer_is_pinged_and_given_up() {
    let keys = "ping_interval = '30s'\npong_timeout = '20s'";
    tunnel(keys, async |mut bed| {
        let start = Instant::now();
        assert_eq!(bed.client_reads().await, (Opcode::Ping, vec![]));
        assert_eq!(bed.backend_reads().await, (Opcode::Ping, vec![]));
        assert_eq!(start.elapsed().as_secs(), 30);
        bed.client_sends(&from_client(Opcode::Pong, b"")).await;
        bed.backend_sends(&from_backend(Opcode::Pong, b"")).await;
        assert_eq!(bed.client_reads().await, (Opcode::Ping, vec![]));
        assert_eq!(bed.backend_reads().await, (Opcode::Ping, vec![]));
        assert_eq!(start.elapsed().as_secs(), 60);
        // Anything heard is as good as a pong. The client stays silent.
        bed.backend_sends(&from_backend(Opcode::Text, b"here")).await;
        assert_eq!(bed.client_reads().await.1, b"here");
        assert_eq!(bed.client_reads().await, (Opcode::Close, close_payload(1001, "pong-timeout")));
        assert_eq!(start.elapsed().as_secs(), 80);
        assert_eq!(read_close(&mut bed.backend, Sender::Client).await, (1001, "client-gone".to_owned()));
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by), (1006, EndedBy::Client));
    });
    tunnel(keys, async |mut bed| {
        assert_eq!(bed.client_reads().await.0, Opcode::Ping);
        bed.client_sends(&from_client(Opcode::Pong, b"")).await;
        assert_eq!(bed.backend_reads().await.0, Opcode::Ping);
        let (client, backend, end) = bed.closes().await;
        assert_eq!((client.0, backend.1.as_str()), (1013, "pong-timeout"));
        assert_eq!(end.by, EndedBy::Upstream);
    });
}

// ---- Deadlines and orders.

#[test]
fn idle_is_without_declared_activity() {
    let keys = format!("idle = '60s'\nping_interval = '1h'\n{CHECKED}");
    tunnel(&keys, async |mut bed| {
        let start = Instant::now();
        tokio::time::advance(Duration::from_secs(40)).await;
        bed.client_sends(&from_client(Opcode::Text, SAY)).await;
        assert_eq!(bed.backend_reads().await.1, SAY);
        tokio::time::advance(Duration::from_secs(40)).await;
        // Neither pings nor messages that are not declared activity count, nor what the backend says.
        bed.client_sends(&from_client(Opcode::Ping, b"")).await;
        bed.client_sends(&from_client(Opcode::Text, LIMITED)).await;
        bed.backend_sends(&from_backend(Opcode::Text, SAY)).await;
        assert_eq!(bed.client_reads().await.0, Opcode::Pong);
        assert_eq!(bed.client_reads().await.1, SAY);
        assert_eq!(bed.backend_reads().await.1, LIMITED);
        let (client, backend, end) = bed.closes().await;
        assert_eq!((client.0, backend.0), (4408, 4408));
        assert_eq!(start.elapsed().as_secs(), 100);
        assert_eq!(end.denial, Some(Denial::SessionIdle));
    });
}

#[test]
fn a_token_expires_at_the_instant_and_a_renewal_counts() {
    let keys = "ping_interval = '1h'";
    tunnel(keys, async |bed| {
        let start = Instant::now();
        let renew = |expires_at, now| {
            let permit = permit(keys, Some(alice(expires_at)));
            Order::Policy(Box::new(terms(permit, bed.metrics.clone(), now)))
        };
        bed.orders.give(renew(START + 60, START));
        tokio::time::advance(Duration::from_millis(59_999)).await;
        tokio::task::yield_now().await;
        // Meanwhile the wall clock was set forward by an hour: what counts is how long the new token has still to go.
        bed.orders.give(renew(START + 3720, START + 3660));
        tokio::time::advance(Duration::from_secs(30)).await;
        let (client, backend, end) = bed.closes().await;
        assert_eq!(start.elapsed().as_secs(), 119);
        assert_eq!((client.0, backend.0), (4401, 4401));
        assert!(client.1.starts_with("token-expired"));
        assert_eq!((end.code, end.by), (4401, EndedBy::Gateway));
    });
}

#[test]
fn an_expired_token_never_relays() {
    tunnel("", async |mut bed| {
        let expired = permit("", Some(alice(START - 1)));
        bed.orders.give(Order::Policy(Box::new(terms(expired, bed.metrics.clone(), START))));
        bed.client_sends(&from_client(Opcode::Text, b"late")).await;
        assert_eq!(bed.closes().await.0.0, 4401);
    });
}

#[test]
fn orders_close_behind_what_was_accepted() {
    for (denial, code) in [(Denial::Revoked, 4410), (Denial::Restarting, 1012), (Denial::PolicyChanged, 1008)]
    {
        tunnel("", async |mut bed| {
            bed.client_sends(&from_client(Opcode::Text, b"before")).await;
            tokio::task::yield_now().await;
            bed.orders.give(Order::Close(denial.clone()));
            // A close is not taken back.
            bed.orders.give(Order::Close(Denial::Internal));
            bed.client_sends(&from_client(Opcode::Text, b"after")).await;
            assert_eq!(bed.backend_reads().await.1, b"before");
            let (client, backend, end) = bed.closes().await;
            assert_eq!((client.0, backend.0, end.code), (code, code, code));
            assert_eq!(end.denial, Some(denial));
        });
    }
}

#[test]
fn a_new_policy_holds_from_the_next_message() {
    tunnel("", async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, b"anything")).await;
        bed.client_sends(&unfinished(from_client(Opcode::Text, b"a message "))).await;
        assert_eq!(bed.backend_reads().await.1, b"anything");
        assert_eq!(bed.backend_reads().await.1, b"a message ");
        let stricter = metrics();
        assert_eq!((bed.metrics.open.get(), stricter.open.get()), (1, 0));
        bed.orders.give(Order::Policy(Box::new(terms(permit(CHECKED, None), stricter.clone(), START))));
        bed.client_sends(&from_client(Opcode::Continuation, b"under way")).await;
        assert_eq!(bed.backend_reads().await.1, b"under way");
        // From then on it counts for the rule that it is under.
        assert_eq!((bed.metrics.open.get(), stricter.open.get()), (0, 1));
        bed.client_sends(&from_client(Opcode::Text, b"anything")).await;
        assert_eq!(bed.closes().await.0.0, 1007);
        assert_eq!((stricter.open.get(), counted(&stricter.refused, "not-json")), (0, 1));
    });
}

#[test]
fn a_session_ends_after_its_time_however_fresh_its_token() {
    let keys = "ping_interval = '1h'";
    tunnel_of_alice(keys, START + 1000, START + 90, async |bed| {
        let start = Instant::now();
        tokio::time::advance(Duration::from_secs(60)).await;
        let renewed = terms(permit(keys, Some(alice(START + 2000))), bed.metrics.clone(), START + 60);
        bed.orders.give(Order::Renewal(Ok(Box::new(Terms { session_ends: Some(START + 90), ..renewed }))));
        let (client, backend, end) = bed.closes().await;
        assert_eq!(start.elapsed().as_secs(), 90);
        assert_eq!((client.0, backend.0, end.denial), (4401, 4401, Some(Denial::SessionEnded)));
        assert!(client.1.starts_with("session-ended: "), "{}", client.1);
    });
}

// ---- Renewal.

const RENEWED: &str = "renew = { type = 'renew', token_pointer = '/auth/token', min_interval = '10s' }";
const RENEW: &[u8] = br#"{"type":"renew","auth":{"token":"a.b.c"}}"#;

fn renewable(more: &str) -> String {
    // A table of its own comes last, and the key stands before the first.
    format!("ping_interval = '1h'\nmax_message = '1KiB'\n{more}\n{CHECKED}")
}

#[test]
fn a_renewal_is_swallowed_judged_and_answered() {
    let keys = renewable(RENEWED);
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        let start = Instant::now();
        bed.client_sends(&from_client(Opcode::Text, RENEW)).await;
        bed.client_sends(&from_client(Opcode::Text, SAY)).await;
        // Nothing of it reached the backend, and traffic goes on while it is judged.
        assert_eq!(bed.backend_reads().await.1, SAY);
        assert_eq!(*bed.renewals.0.borrow(), ["a.b.c"]);
        let renewed = terms(permit(&keys, Some(alice(START + 90))), bed.metrics.clone(), START);
        bed.orders.give(Order::Renewal(Ok(Box::new(Terms { session_ends: Some(START + 80), ..renewed }))));
        let answer: serde_json::Value = serde_json::from_slice(&bed.client_reads().await.1).unwrap();
        // Never later than the session's own end.
        assert_eq!(answer, serde_json::json!({ "type": "renew.ok", "expires_at": START + 80 }));
        assert_eq!(bed.metrics.messages_to_upstream.get(), 1);
        assert_eq!(bed.closes().await.0.0, 4401);
        assert_eq!(start.elapsed().as_secs(), 80);
    });
}

#[test]
fn a_renewal_in_fragments_is_one_and_between_messages_of_the_backend() {
    let keys = renewable(RENEWED);
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        let (head, tail) = RENEW.split_at(10);
        bed.client_sends(&unfinished(from_client(Opcode::Text, head))).await;
        bed.client_sends(&from_client(Opcode::Continuation, tail)).await;
        bed.client_sends(&from_client(Opcode::Text, SAY)).await;
        assert_eq!(bed.backend_reads().await.1, SAY);
        assert_eq!(*bed.renewals.0.borrow(), ["a.b.c"]);
    });
}

#[test]
fn a_refused_renewal_is_answered_and_the_old_token_stays() {
    let keys = renewable(RENEWED);
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        let start = Instant::now();
        let reason = async |bed: &mut Bed| {
            let answer: serde_json::Value = serde_json::from_slice(&bed.client_reads().await.1).unwrap();
            assert_eq!(answer["type"], "error", "{answer}");
            answer["reason"].as_str().unwrap().to_owned()
        };
        bed.client_sends(&from_client(Opcode::Text, RENEW)).await;
        // Another one while the first is being judged, and one right after: too soon.
        bed.client_sends(&from_client(Opcode::Text, RENEW)).await;
        assert_eq!(reason(&mut bed).await, "renewal-too-soon");
        bed.orders.give(Order::Renewal(Err(Denial::TokenInvalid(TokenFault::Signature))));
        assert_eq!(reason(&mut bed).await, "token-invalid");
        bed.client_sends(&from_client(Opcode::Text, RENEW)).await;
        assert_eq!(reason(&mut bed).await, "renewal-too-soon");
        assert_eq!(bed.renewals.0.borrow().len(), 1);
        tokio::time::advance(Duration::from_secs(10)).await;
        // Without a token there is nothing to verify, but it is judged like any other.
        bed.client_sends(&from_client(Opcode::Text, br#"{"type":"renew"}"#)).await;
        bed.client_sends(&from_client(Opcode::Text, SAY)).await;
        assert_eq!(bed.backend_reads().await.1, SAY);
        bed.orders.give(Order::Renewal(Err(Denial::TokenKeysUnavailable)));
        assert_eq!(reason(&mut bed).await, "token-keys-unavailable");
        assert_eq!(bed.renewals.0.borrow().last().unwrap(), "");
        assert_eq!(counted(&bed.metrics.refused, "renewal-too-soon"), 2);
        let (client, backend, end) = bed.closes().await;
        assert_eq!(
            (client.0, backend.0, end.denial),
            (4401, 4401, Some(Denial::TokenInvalid(TokenFault::Expired)))
        );
        assert_eq!(start.elapsed().as_secs(), 60);
    });
}

#[test]
fn a_renewal_that_proves_a_change_closes_whatever_the_rule_says() {
    let keys = renewable(RENEWED);
    for (denial, code) in [
        (Denial::Revoked, 4410),
        (Denial::RenewalMismatch, 4403),
        (Denial::RightsChanged, 1012),
        (Denial::SessionEnded, 4401),
        (Denial::PolicyChanged, 1008),
    ] {
        tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
            bed.client_sends(&from_client(Opcode::Text, SAY)).await;
            assert_eq!(bed.backend_reads().await.1, SAY);
            bed.orders.give(Order::Renewal(Err(denial.clone())));
            let (client, backend, end) = bed.closes().await;
            assert_eq!((client.0, backend.0, end.denial), (code, code, Some(denial)));
        });
    }
    let keys = renewable("renew = { type = 'renew', on_refusal = 'close' }");
    tunnel_of_alice(&keys, START + 60, START + 100, async |bed| {
        bed.orders.give(Order::Renewal(Err(Denial::TokenInvalid(TokenFault::Signature))));
        assert_eq!(bed.closes().await.0.0, 4401);
    });
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, br#"{"type":"renew","token":"t"}"#)).await;
        bed.client_sends(&from_client(Opcode::Text, br#"{"type":"renew","token":"t"}"#)).await;
        assert_eq!(bed.closes().await.0.0, 4429);
    });
}

#[test]
fn without_a_rule_for_renewals_the_type_is_unknown() {
    tunnel_of_alice(CHECKED, START + 60, START + 100, async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, RENEW)).await;
        let renewals = bed.renewals.clone();
        assert_eq!(bed.closes().await.0.0, 1008);
        assert!(renewals.0.borrow().is_empty());
    });
}

#[test]
fn orders_that_come_together_are_all_obeyed() {
    let keys = renewable(RENEWED);
    let alice_until = |at| permit(&keys, Some(alice(at)));
    // The newer terms count, whichever way they came; a close counts before all.
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        let start = Instant::now();
        bed.orders.give(Order::Policy(Box::new(terms(alice_until(START + 70), bed.metrics.clone(), START))));
        bed.orders.give(Order::Renewal(Ok(Box::new(terms(
            alice_until(START + 80),
            bed.metrics.clone(),
            START,
        )))));
        bed.expect_renewed().await;
        bed.closes().await;
        assert_eq!(start.elapsed().as_secs(), 80);
    });
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        let start = Instant::now();
        bed.orders.give(Order::Renewal(Ok(Box::new(terms(
            alice_until(START + 80),
            bed.metrics.clone(),
            START,
        )))));
        bed.orders.give(Order::Policy(Box::new(terms(alice_until(START + 75), bed.metrics.clone(), START))));
        bed.expect_renewed().await;
        bed.closes().await;
        assert_eq!(start.elapsed().as_secs(), 75);
    });
    tunnel_of_alice(&keys, START + 60, START + 100, async |mut bed| {
        bed.orders.give(Order::Close(Denial::Revoked));
        bed.orders.give(Order::Renewal(Ok(Box::new(terms(
            alice_until(START + 80),
            bed.metrics.clone(),
            START,
        )))));
        bed.expect_renewed().await;
        assert_eq!(bed.closes().await.0.0, 4410);
    });
}

// ---- Closing.

#[test]
fn a_client_that_closes_gets_what_the_backend_still_says_and_its_answer() {
    tunnel("", async |mut bed| {
        let wire =
            [from_client(Opcode::Text, b"last"), from_client(Opcode::Close, &close_payload(3001, "bye"))];
        bed.client_sends(&wire.concat()).await;
        assert_eq!(bed.backend_reads().await.1, b"last");
        bed.backend_sends(&from_backend(Opcode::Text, b"really last")).await;
        assert_eq!(read_close(&mut bed.backend, Sender::Client).await, (3001, "bye".to_owned()));
        assert_eq!(bed.client_reads().await.1, b"really last");
        assert_eq!(bed.client_reads().await, (Opcode::Close, close_payload(3001, "bye")));
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by, end.denial), (3001, EndedBy::Client, None));
        assert_eq!(bed.client.read(&mut [0]).await.unwrap(), 0);
    });
}

#[test]
fn a_client_may_close_without_a_code_and_shut_its_side() {
    tunnel("", async |mut bed| {
        bed.client_sends(&from_client(Opcode::Close, b"")).await;
        bed.client.shutdown().await.unwrap();
        assert_eq!(bed.backend_reads().await, (Opcode::Close, vec![]));
        bed.backend_sends(&from_backend(Opcode::Close, b"")).await;
        assert_eq!(bed.client_reads().await, (Opcode::Close, vec![]));
        assert_eq!(bed.end.await.unwrap().code, close::NO_STATUS);
    });
}

#[test]
fn a_backend_that_closes_gets_what_the_client_still_says_and_its_answer() {
    tunnel("", async |mut bed| {
        bed.backend_sends(&from_backend(Opcode::Close, &close_payload(1000, ""))).await;
        assert_eq!(bed.client_reads().await, (Opcode::Close, close_payload(1000, "")));
        bed.client_sends(&from_client(Opcode::Text, b"crossing")).await;
        bed.client_sends(&from_client(Opcode::Close, &close_payload(1000, ""))).await;
        assert_eq!(bed.backend_reads().await.1, b"crossing");
        assert_eq!(bed.backend_reads().await, (Opcode::Close, close_payload(1000, "")));
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by), (1000, EndedBy::Upstream));
    });
}

#[test]
fn a_close_that_nobody_answers_ends_all_the_same() {
    tunnel("", async |mut bed| {
        let start = Instant::now();
        bed.client_sends(&from_client(Opcode::Close, &close_payload(1000, ""))).await;
        assert_eq!(bed.client_reads().await, (Opcode::Close, close_payload(1000, "")));
        assert_eq!(start.elapsed(), CLOSE_TIMEOUT);
        bed.end.await.unwrap();
        assert_eq!(start.elapsed(), CLOSE_TIMEOUT + LINGER);
    });
    tunnel("", async |bed| {
        let start = Instant::now();
        bed.orders.give(Order::Close(Denial::Revoked));
        assert_eq!(bed.end.await.unwrap().code, 4410);
        assert_eq!(start.elapsed(), CLOSE_TIMEOUT + LINGER);
    });
}

#[test]
fn a_peer_that_vanishes_is_reported_to_the_other() {
    tunnel("", async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, b"last")).await;
        drop(bed.client);
        assert_eq!(read_frame(&mut bed.backend, Sender::Client).await.1, b"last");
        assert_eq!(read_close(&mut bed.backend, Sender::Client).await, (1001, "client-gone".to_owned()));
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by), (1006, EndedBy::Client));
    });
    tunnel("", async |mut bed| {
        bed.backend_sends(&from_backend(Opcode::Text, b"last")).await;
        drop(bed.backend);
        assert_eq!(read_frame(&mut bed.client, Sender::Server).await.1, b"last");
        let (code, reason) = read_close(&mut bed.client, Sender::Server).await;
        assert_eq!(code, 1013);
        assert!(reason.starts_with("upstream-unavailable"), "{reason}");
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by), (1013, EndedBy::Upstream));
    });
}

#[test]
fn while_we_close_messages_are_read_past() {
    tunnel("", async |mut bed| {
        bed.client_sends(&from_client(Opcode::Text, b"abc")[..7]).await;
        tokio::task::yield_now().await;
        bed.orders.give(Order::Close(Denial::Revoked));
        let rest = [
            from_client(Opcode::Text, b"abc")[7..].to_vec(),
            from_client(Opcode::Binary, &[0; 5000]),
            from_client(Opcode::Ping, b"?"),
        ]
        .concat();
        for piece in rest.chunks(999) {
            bed.client_sends(piece).await;
            tokio::task::yield_now().await;
        }
        let (client, backend, _) = bed.closes().await;
        assert_eq!((client.0, backend.0), (4410, 4410));
    });
}

// ---- Slow readers.

#[test]
fn a_client_that_does_not_read_is_bounded_and_cut() {
    tunnel_with("write_timeout = '10s'\nbuffer = '8KiB'", 1024, b"", b"", async |mut bed| {
        let start = Instant::now();
        let wire = from_backend(Opcode::Binary, &[0; 500]);
        let mut taken = 0;
        while let Ok(Ok(())) = timeout(Duration::from_secs(5), bed.backend.write_all(&wire)).await {
            taken += wire.len();
        }
        assert!(taken < 1024 + 8 * 1024 + 1024 + wire.len(), "{taken} bytes were taken");
        // The other direction goes on meanwhile.
        bed.client_sends(&from_client(Opcode::Text, b"still here")).await;
        assert_eq!(bed.backend_reads().await.1, b"still here");
        assert_eq!(read_close(&mut bed.backend, Sender::Client).await, (1001, "too-slow".to_owned()));
        assert_eq!(start.elapsed().as_secs(), 10);
        drop(bed.backend);
        let end = bed.end.await.unwrap();
        assert_eq!((end.code, end.by, end.denial), (1008, EndedBy::Gateway, Some(Denial::TooSlow)));
    });
}

#[test]
fn a_slow_client_that_reads_on_stays_and_loses_nothing() {
    let keys = "write_timeout = '10s'\nping_interval = '20s'\npong_timeout = '5s'";
    tunnel_with(keys, 1024, b"", b"", async |bed| {
        let Bed { mut client, mut backend, .. } = bed;
        let sending = tokio::task::spawn_local(async move {
            for n in 0..100 {
                backend.write_all(&from_backend(Opcode::Binary, &[n; 500])).await.unwrap();
            }
            backend
        });
        let mut expected = 0;
        while expected < 100 {
            tokio::time::sleep(Duration::from_secs(4)).await;
            let (opcode, payload) = read_frame(&mut client, Sender::Server).await;
            if opcode == Opcode::Binary {
                assert_eq!(payload, [expected; 500]);
                expected += 1;
            }
        }
        sending.await.unwrap();
        assert!(!bed.end.is_finished());
    });
}

#[test]
fn a_backend_that_does_not_read_is_given_up() {
    tunnel_with("write_timeout = '10s'", 1024, b"", b"", async |mut bed| {
        let wire = from_client(Opcode::Binary, &[0; 500]);
        while let Ok(Ok(())) = timeout(Duration::from_secs(5), bed.client.write_all(&wire)).await {}
        let (code, reason) = read_close(&mut bed.client, Sender::Server).await;
        assert_eq!(code, 1013);
        assert!(reason.starts_with("upstream-timeout"), "{reason}");
        assert_eq!(bed.end.await.unwrap().by, EndedBy::Upstream);
    });
}

// ---- Compressed.

const OFFER: &str = "permessage-deflate; client_max_window_bits";

#[test]
fn what_comes_compressed_is_judged_inflated_and_goes_on_plain() {
    compressed_tunnel(CHECKED, OFFER, 64 * 1024, async |mut bed| {
        let whole = compressed(Opcode::Text, SAY);
        let mut packed = deflate::compressed(SAY);
        let rest = packed.split_off(6);
        let mut first = Vec::new();
        write_compressed(&mut first, Opcode::Text, Some(MASK), &packed);
        let fragments = [unfinished(first), from_client(Opcode::Continuation, &rest)].concat();
        bed.client_sends(&[whole, fragments, from_client(Opcode::Text, SAY)].concat()).await;
        for _ in 0..3 {
            // `read_frame` takes no reserved bit.
            assert_eq!(bed.backend_reads().await, (Opcode::Text, SAY.to_vec()));
        }
        assert_eq!(bed.metrics.messages_to_upstream.get(), 3);
        assert_eq!(bed.metrics.bytes_to_upstream.get(), 3 * SAY.len() as u64);

        bed.client_sends(&compressed(Opcode::Text, SAY_NOTHING)).await;
        let (client, backend, _) = bed.closes().await;
        assert_eq!((client.0, backend.0), (1007, 1001));
    });
    // Where nobody looks into messages it is the same: what goes on is what was counted.
    compressed_tunnel("", OFFER, 64 * 1024, async |mut bed| {
        bed.client_sends(&compressed(Opcode::Binary, &[7; 5000])).await;
        assert_eq!(bed.backend_reads().await, (Opcode::Binary, vec![7; 5000]));
    });
}

#[test]
fn without_agreement_nothing_compressed_passes() {
    tunnel("", async |mut bed| {
        bed.client_sends(&compressed(Opcode::Text, SAY)).await;
        let (client, _, _) = bed.closes().await;
        assert_eq!(client.0, 1002);
    });
    // Nor from the upstream, which was offered nothing.
    compressed_tunnel("", OFFER, 64 * 1024, async |mut bed| {
        let mut wire = Vec::new();
        write_compressed(&mut wire, Opcode::Text, None, &deflate::compressed(SAY));
        bed.backend_sends(&wire).await;
        let (client, backend, _) = bed.closes().await;
        assert_eq!((client.0, backend.0), (1011, 1002));
    });
}

#[test]
fn bombs_and_broken_messages_close() {
    let closed_with = |keys: &str, wire: Vec<u8>, code: u16, reason: &'static str| {
        compressed_tunnel(keys, OFFER, 64 * 1024, async |mut bed| {
            bed.client_sends(&wire).await;
            let metrics = bed.metrics.clone();
            let (client, _, end) = bed.closes().await;
            assert_eq!(client.0, code, "{client:?}");
            assert!(client.1.starts_with(reason), "{client:?}");
            assert_eq!((end.refused, counted(&metrics.refused, reason)), (1, 1));
        });
    };
    let bomb = compressed(Opcode::Binary, &vec![0; 1 << 20]);
    closed_with("max_message = '2MiB'\ncompression = 'terminate'", bomb.clone(), 1009, "inflate-ratio");
    closed_with("", bomb.clone(), 1009, "message-too-big");
    closed_with("", compressed(Opcode::Text, &[0xFF]), 1007, "not-utf8");
    let mut broken = Vec::new();
    write_compressed(&mut broken, Opcode::Text, Some(MASK), b"\x07");
    closed_with("", broken, 1007, "bad-compression");
    // The same bomb passes where the policy says so.
    let keys = "max_message = '2MiB'\ncompression = 'terminate'\nmax_inflate_ratio = 1032";
    compressed_tunnel(keys, OFFER, 4 << 20, async |mut bed| {
        bed.client_sends(&bomb).await;
        assert_eq!(bed.backend_reads().await, (Opcode::Binary, vec![0; 1 << 20]));
    });
}

#[test]
fn to_the_client_goes_compressed_what_that_makes_smaller() {
    for (offer, is_compressed) in [
        (OFFER, true),
        ("permessage-deflate; server_max_window_bits=9", true),
        ("permessage-deflate; server_max_window_bits=8", false),
    ] {
        compressed_tunnel("", offer, 64 * 1024, async |mut bed| {
            let long = SAY.repeat(40);
            bed.backend_sends(&from_backend(Opcode::Text, SAY)).await;
            assert_eq!(bed.client_reads().await, (Opcode::Text, SAY.to_vec()), "too short to gain");
            for _ in 0..2 {
                bed.backend_sends(&from_backend(Opcode::Text, &long)).await;
                if !is_compressed {
                    assert_eq!(bed.client_reads().await, (Opcode::Text, long.clone()));
                    continue;
                }
                let mut head = [0; 2];
                bed.client.read_exact(&mut head).await.unwrap();
                assert_eq!(head[0], 0xC1);
                let mut payload = vec![0; usize::from(head[1])];
                assert!(payload.len() < 126);
                bed.client.read_exact(&mut payload).await.unwrap();
                let limits = bed.limits.clone();
                let mut inflater = deflate::Inflater::default();
                assert_eq!(inflater.inflate(&payload, &limits).unwrap(), &long[..]);
            }
            // Of several frames: as it came.
            bed.backend_sends(&unfinished(from_backend(Opcode::Text, &long))).await;
            bed.backend_sends(&from_backend(Opcode::Continuation, b"")).await;
            assert_eq!(bed.client_reads().await, (Opcode::Text, long));
            assert_eq!(bed.client_reads().await, (Opcode::Continuation, vec![]));
        });
    }
}

/// Each message may inflate to 64 KiB whatever its ratio, and hundreds of them fit into one read.
#[tokio::test(start_paused = true)]
async fn however_much_inflates_little_is_kept() {
    let (mut client, downstream) = tokio::io::duplex(64 * 1024);
    let (mut backend, upstream) = tokio::io::duplex(1024);
    let headers = HeaderMap::from_iter([(
        http::header::SEC_WEBSOCKET_EXTENSIONS,
        http::HeaderValue::from_static(OFFER),
    )]);
    let tunnel = Tunnel {
        downstream,
        upstream,
        downstream_early: Bytes::new(),
        upstream_early: Bytes::new(),
        deflate: Agreed::accept(&headers).unwrap(),
        terms: terms(permit("", None), metrics(), 0),
        renewer: Rc::<Renewals>::default(),
        orders: Orders::new(),
    };
    let mut relay = tunnel.run();
    let message = vec![b'a'; 60_000];
    let one = compressed(Opcode::Binary, &message);
    let count = 60_000 / one.len();
    let close = from_client(Opcode::Close, &close_payload(1000, ""));
    client.write_all(&[one.repeat(count), close].concat()).await.unwrap();
    client.shutdown().await.unwrap();
    assert!(count > 300, "{count}");

    let (mut got, mut most) = (0, 0);
    let mut wire = Vec::new();
    let mut closed = false;
    while !closed {
        tokio::select! {
            biased;
            _ = &mut relay => panic!("the backend has not answered the close"),
            read = backend.read_buf(&mut wire) => assert!(read.unwrap() > 0),
        }
        most = most.max(relay.upstream.out.capacity() + relay.client.unread.capacity());
        while let Some(header) = read_header(Sender::Client, u32::MAX, false, &wire).unwrap() {
            if wire.len() < header.wire_len() {
                break;
            }
            match header.opcode {
                Opcode::Binary => {
                    assert_eq!(header.payload_len, message.len());
                    got += 1;
                }
                other => closed = other == Opcode::Close,
            }
            wire.drain(..header.wire_len());
        }
    }
    assert_eq!(got, count, "what was accepted is delivered before the close");
    assert!(most < 512 * 1024, "{most} bytes were kept");
}

// ---- With an implementation that is not ours at both ends.

/// The bytes between a sans-I/O tungstenite and a stream.
#[derive(Default)]
struct Pipe {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    ended: bool,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.incoming.is_empty() && !self.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = into.len().min(self.incoming.len());
        into[..len].copy_from_slice(&self.incoming[..len]);
        self.incoming.drain(..len);
        Ok(len)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outgoing.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Peer {
    socket: tungstenite::WebSocket<Pipe>,
    stream: DuplexStream,
}

impl Peer {
    fn new(stream: DuplexStream, role: tungstenite::protocol::Role) -> Peer {
        Peer { socket: tungstenite::WebSocket::from_raw_socket(Pipe::default(), role, None), stream }
    }

    async fn send(&mut self, message: tungstenite::Message) {
        self.socket.send(message).unwrap();
        self.flush().await;
    }

    async fn flush(&mut self) {
        let outgoing = std::mem::take(&mut self.socket.get_mut().outgoing);
        let _ = self.stream.write_all(&outgoing).await;
    }

    async fn next(&mut self) -> tungstenite::Result<tungstenite::Message> {
        loop {
            let result = self.socket.read();
            self.flush().await;
            match result {
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    let pipe = self.socket.get_mut();
                    pipe.ended = self.stream.read_buf(&mut pipe.incoming).await.unwrap() == 0;
                }
                other => return other,
            }
        }
    }
}

#[test]
fn tungstenite_speaks_to_itself_through_us() {
    use tungstenite::Message as Frame;
    use tungstenite::protocol::Role;
    tunnel_with("max_message = '1MiB'\nmax_frame = '1MiB'", 3000, b"", b"", async |bed| {
        let mut client = Peer::new(bed.client, Role::Client);
        let mut backend = Peer::new(bed.backend, Role::Server);
        let echo = tokio::task::spawn_local(async move {
            loop {
                match backend.next().await {
                    Ok(message @ (Frame::Text(_) | Frame::Binary(_))) => backend.send(message).await,
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        });
        for size in [0, 1, 125, 126, 1000, 65_535, 65_536, 300_000] {
            let text = "é".repeat(size / 2);
            client.send(Frame::text(text.clone())).await;
            assert_eq!(client.next().await.unwrap(), Frame::text(text));
            let binary: Vec<u8> = (0..size).map(|n| n as u8).collect();
            client.send(Frame::binary(binary.clone())).await;
            assert_eq!(client.next().await.unwrap(), Frame::binary(binary));
        }
        client.send(Frame::Ping("p".into())).await;
        assert_eq!(client.next().await.unwrap(), Frame::Pong("p".into()));
        client.socket.close(None).unwrap();
        client.flush().await;
        assert!(matches!(client.next().await.unwrap(), Frame::Close(None)));
        assert!(matches!(client.next().await, Err(tungstenite::Error::ConnectionClosed)));
        assert!(matches!(echo.await.unwrap(), tungstenite::Error::ConnectionClosed));
        let end = bed.end.await.unwrap();
        assert_eq!((end.by, end.to_upstream.messages, end.to_client.messages), (EndedBy::Client, 16, 16));
    });
}
