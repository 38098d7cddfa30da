//! Attacks on HTTP: heads, framing and frames (tests/attacks/http1.toml, http2.toml), smuggling, floods, slowness, and
//! upstreams that lie. Each gets its answer; what it would have reached sees nothing of it.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Process, Wire, until};
use serde::Deserialize;
use serde_json::Value;

const RULES: &str = r#"
[[route]]
name = "open"
path = "/open/**"
methods = ["GET"]
upstream = "backend"
auth = "none"
query = {}

[[route]]
name = "body"
path = "/body"
methods = ["POST"]
upstream = "backend"
auth = "none"
body = { max_bytes = "1MiB" }

[[route]]
name = "secret"
path = "/secret"
methods = ["GET"]
upstream = "backend"

[[websocket]]
name = "socket"
path = "/ws/{variant}"
upstream = "backend"
origins = ["*"]
inspect = "none"
"#;

fn start(more: &str) -> (Bundle, Gateway) {
    let bundle = Bundle::new(&format!("{more}{RULES}"));
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

// HTTP/1.1.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List<C> {
    group: Vec<Group<C>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group<C> {
    about: String,
    source: String,
    expect: String,
    cases: Vec<C>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Http1Case {
    name: String,
    source: Option<String>,
    send: String,
    #[serde(default)]
    sees: Vec<String>,
}

#[test]
fn a2_every_attack_on_http_1_gets_its_answer_and_reaches_nobody() {
    let list = include_str!("../attacks/http1.toml");
    let list: List<Http1Case> = toml::from_str(list).unwrap_or_else(|error| panic!("http1.toml: {error}"));
    let (bundle, gateway) = start("");
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    let (mut attacks, mut passing) = (0, 0);
    for group in &list.group {
        for case in &group.cases {
            let name = format!("{}: {}", group.about, case.name);
            assert!(names.insert(name.clone()), "{name} stands twice");
            assert!(!case.source.as_ref().unwrap_or(&group.source).is_empty(), "{name} has no source");
            let wire = filled(&case.send);
            if group.expect == "200" {
                passing += 1;
                faults.extend(passes(&bundle, &gateway, case, &wire).map(|fault| format!("{name}: {fault}")));
                continue;
            }
            attacks += 1;
            for behind in [false, true] {
                let fault = refused(&bundle, &gateway, &group.expect, &wire, behind);
                let place = if behind { " behind a good one" } else { "" };
                faults.extend(fault.map(|fault| format!("{name}{place}: {fault}")));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert!(attacks >= 150 && passing >= 15, "{attacks} attacks, {passing} that pass");
    assert_eq!(gateway.curl("/open/x").send().status, 200);
}

fn passes(bundle: &Bundle, gateway: &Gateway, case: &Http1Case, bytes: &[u8]) -> Option<String> {
    let before = bundle.upstream.seen().len();
    let mut wire = gateway.wire();
    wire.send(bytes);
    for _ in &case.sees {
        match wire.response() {
            Some(reply) if reply.status == 200 => {}
            other => return Some(format!("{other:?}")),
        }
    }
    let seen: Vec<String> = bundle.upstream.seen()[before..].iter().map(|seen| seen.target.clone()).collect();
    (seen != case.sees).then(|| format!("the backend saw {seen:?}"))
}

const SMUGGLED: &str = "GET /open/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn refused(bundle: &Bundle, gateway: &Gateway, expect: &str, bytes: &[u8], behind: bool) -> Option<String> {
    let (status, reason) = expect.split_once(' ').expect("`expect` is status and reason");
    let before = bundle.upstream.seen().len();
    let mut wire = gateway.wire();
    let first = if behind { "GET /open/first HTTP/1.1\r\nHost: localhost\r\n\r\n" } else { "" };
    wire.send([first.as_bytes(), bytes, SMUGGLED.as_bytes()].concat());
    if behind && wire.response().is_none_or(|reply| reply.status != 200) {
        return Some("the good request in front of it was not answered".to_owned());
    }
    let Some(reply) = wire.response() else { return Some("no answer".to_owned()) };
    let Ok(problem) = serde_json::from_str::<Value>(&reply.body) else {
        return Some(format!("no problem document: {reply:?}"));
    };
    if reply.status.to_string() != status
        || problem["type"] != format!("urn:sealgate:problem:{reason}")
        || problem["instance"]
            .as_str()
            .is_none_or(|id| !id.ends_with(reply.header("x-request-id").unwrap_or("?")))
    {
        return Some(format!("answered {} {problem}", reply.status));
    }
    if reply.header("connection") != Some("close") || !wire.ended() {
        return Some("the connection goes on".to_owned());
    }
    let seen: Vec<String> = bundle.upstream.seen()[before..].iter().map(|seen| seen.target.clone()).collect();
    let expected: &[&str] = if behind { &["/open/first"] } else { &[] };
    (seen != expected).then(|| format!("the backend saw {seen:?}"))
}

/// Puts in what stands between `<` and `>`, and CRLF for ⏎.
fn filled(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        bytes.extend_from_slice(before.replace('⏎', "\r\n").as_bytes());
        let (word, after) = after.split_once('>').unwrap_or_else(|| panic!("no `>` in {text}"));
        match (word, word.strip_prefix('x'), word.rsplit_once('*')) {
            ("h", ..) => bytes.extend_from_slice(b"Host: localhost\r\n"),
            (_, _, Some((part, count))) => {
                let part = part.replace('⏎', "\r\n");
                bytes.extend_from_slice(part.repeat(count.parse().expect("a count")).as_bytes());
            }
            (_, Some(hex), _) => bytes.push(u8::from_str_radix(hex, 16).expect("hexadecimal")),
            _ => panic!("<{word}>?"),
        }
        rest = after;
    }
    bytes.extend_from_slice(rest.replace('⏎', "\r\n").as_bytes());
    bytes
}

// HTTP/2.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Http2Case {
    name: String,
    source: Option<String>,
    #[serde(default)]
    pseudo: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    without: Vec<String>,
    #[serde(default)]
    front: Vec<(String, String)>,
    #[serde(default)]
    fields: Vec<(String, String)>,
    data: Option<Vec<String>>,
    trailers: Option<Vec<(String, String)>>,
    #[serde(default)]
    raw: Vec<String>,
}

#[test]
fn a2_every_attack_on_http_2_is_refused_and_reaches_nobody() {
    let list = include_str!("../attacks/http2.toml");
    let list: List<Http2Case> = toml::from_str(list).unwrap_or_else(|error| panic!("http2.toml: {error}"));
    let (bundle, gateway) = start("");
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    let (mut attacks, mut passing) = (0, 0);
    for group in &list.group {
        for case in &group.cases {
            let name = format!("{}: {}", group.about, case.name);
            assert!(names.insert(name.clone()), "{name} stands twice");
            assert!(!case.source.as_ref().unwrap_or(&group.source).is_empty(), "{name} has no source");
            *(if group.expect == "200" { &mut passing } else { &mut attacks }) += 1;
            let before = bundle.upstream.seen().len();
            let outcome = case.outcome(&gateway);
            let seen = bundle.upstream.seen().split_off(before);
            let reached = seen.len();
            let (fits, expected) = match group.expect.as_str() {
                "200" => (outcome.status() == Some(200), 1),
                "reset" => (matches!(outcome, Outcome::Reset | Outcome::End), 0),
                "refused" => (
                    matches!(outcome, Outcome::Reset | Outcome::End)
                        || outcome.status().is_some_and(|status| (400..600).contains(&status)),
                    0,
                ),
                "end" => (outcome == Outcome::End, 0),
                other => panic!("{name}: expect {other}?"),
            };
            if !fits || reached != expected {
                faults.push(format!("{name}: {outcome:?}, and the backend saw {seen:?}"));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert!(attacks >= 90 && passing >= 10, "{attacks} attacks, {passing} that pass");
    assert_eq!(gateway.curl("/open/x").send().status, 200);
}

impl Http2Case {
    fn outcome(&self, gateway: &Gateway) -> Outcome {
        let mut h2 = H2::connect(gateway, &[]);
        if !self.raw.is_empty() {
            for frame in &self.raw {
                h2.write(&hex(frame));
            }
            return h2.outcome(u32::MAX);
        }
        let base =
            [(":method", "GET"), (":scheme", "https"), (":path", "/open/x"), (":authority", "localhost")];
        let base = base.iter().filter(|(name, _)| !self.without.iter().any(|without| without == name)).map(
            |(name, value)| (name.to_string(), self.pseudo.get(*name).cloned().unwrap_or(value.to_string())),
        );
        let head: Vec<(String, String)> =
            self.front.iter().cloned().chain(base).chain(self.fields.iter().cloned()).collect();
        let block = block(&head);
        let data = self.data.as_deref().unwrap_or_default();
        h2.headers(1, &block, data.is_empty() && self.trailers.is_none());
        for (at, piece) in data.iter().enumerate() {
            let ends = at + 1 == data.len() && self.trailers.is_none();
            h2.send(0, u8::from(ends), 1, piece.as_bytes());
        }
        if let Some(trailers) = &self.trailers {
            h2.headers(1, &self::block(trailers), true);
        }
        h2.outcome(1)
    }
}

/// What came of a stream.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Whether the status is 200, and the body.
    Answer(bool, String),
    Reset,
    /// Of the connection.
    End,
}

impl Outcome {
    fn status(&self) -> Option<u64> {
        match self {
            Outcome::Answer(true, _) => Some(200),
            // h2 answers heads that are too large without a body.
            Outcome::Answer(false, body) if body.is_empty() => Some(431),
            Outcome::Answer(false, body) => serde_json::from_str::<Value>(body).ok()?["status"].as_u64(),
            Outcome::Reset | Outcome::End => None,
        }
    }
}

/// An HTTP/2 connection whose frames are the test's own.
struct H2 {
    stream: Box<dyn Stream>,
    read: Vec<u8>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl H2 {
    fn connect(gateway: &Gateway, settings: &[u8]) -> H2 {
        let mut wire = Wire::connect(gateway.address(), gateway.ca(), &["h2"]);
        assert_eq!(wire.alpn().as_deref(), Some("h2"));
        let stream = wire.into_stream();
        stream.sock.set_write_timeout(Some(DEADLINE)).expect("a timeout");
        let mut h2 = H2 { stream: Box::new(stream), read: Vec::new() };
        h2.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        h2.send(4, 0, 0, settings);
        h2
    }

    fn write(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).and_then(|()| self.stream.flush()).is_ok()
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> bool {
        self.write(&frame(kind, flags, stream, payload))
    }

    fn headers(&mut self, stream: u32, block: &[u8], end: bool) -> bool {
        let mut pieces = block.chunks(16_000).peekable();
        let mut kind = 1;
        while let Some(piece) = pieces.next() {
            let last = if pieces.peek().is_none() { 4 } else { 0 };
            if !self.send(kind, last | u8::from(end && kind == 1), stream, piece) {
                return false;
            }
            kind = 9;
        }
        true
    }

    fn get(&mut self, stream: u32, path: &str) -> bool {
        self.headers(stream, &block(&head("GET", path)), true)
    }

    /// The next frame; `None` at the end.
    fn frame(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        loop {
            if let Some((header, rest)) = self.read.split_first_chunk::<9>() {
                let len = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
                if rest.len() >= len {
                    let stream = u32::from_be_bytes([header[5] & 0x7f, header[6], header[7], header[8]]);
                    let frame = (header[3], header[4], stream, rest[..len].to_vec());
                    self.read.drain(..9 + len);
                    return Some(frame);
                }
            }
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.read.extend_from_slice(&buffer[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    panic!("silence for {DEADLINE:?}")
                }
                Err(_) => return None,
            }
        }
    }

    fn outcome(&mut self, stream: u32) -> Outcome {
        let (mut ok, mut body) = (false, Vec::new());
        loop {
            match self.frame() {
                None => return Outcome::End,
                Some((7, _, _, payload)) if payload[4..8] != [0; 4] => return Outcome::End,
                Some((3, _, of, _)) if of == stream => return Outcome::Reset,
                Some((kind, flags, of, payload)) if of == stream && matches!(kind, 0 | 1) => {
                    match kind {
                        // `:status 200` of the static table (RFC 7541, appendix A).
                        1 if payload.first() == Some(&0x88) => ok = true,
                        0 => body.extend(payload),
                        _ => {}
                    }
                    if flags & 1 != 0 {
                        return Outcome::Answer(ok, String::from_utf8_lossy(&body).into_owned());
                    }
                }
                Some(_) => {}
            }
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn head(method: &str, path: &str) -> Vec<(String, String)> {
    [(":method", method), (":scheme", "https"), (":path", path), (":authority", "localhost")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
}

/// A header block of literals that enter no table (RFC 7541 §6.2.2).
fn block(fields: &[(String, String)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            let text = String::from_utf8(filled(text)).expect("text");
            let mut length = text.len();
            if length < 127 {
                block.push(length as u8);
            } else {
                block.push(127);
                length -= 127;
                while length >= 128 {
                    block.push((length % 128) as u8 | 128);
                    length /= 128;
                }
                block.push(length as u8);
            }
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

fn hex(text: &str) -> Vec<u8> {
    let text: String = String::from_utf8(filled(text)).expect("text").replace(' ', "");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

// Pairs.

/// Bodies that look like heads, ends and chunks, over both protocols to an HTTP/1.1 upstream: each request arrives by itself, on
/// connections that are used again.
#[test]
fn what_follows_a_body_on_a_kept_connection_is_another_request() {
    let (bundle, gateway) = start("");
    let bodies = [
        SMUGGLED.to_owned(),
        "0\r\n\r\n".to_owned(),
        format!("0\r\n\r\n{SMUGGLED}"),
        format!("5\r\nhello\r\n0\r\n\r\n{SMUGGLED}"),
        "\r\n\r\n".to_owned(),
        format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n{SMUGGLED}"),
        String::new(),
        "x".repeat(100_000),
    ];
    let mut expected = Vec::new();
    let mut h1 = gateway.wire();
    for (at, body) in bodies.iter().enumerate() {
        for chunked in [false, true] {
            let framed = match (chunked, body.len()) {
                (false, length) => format!("Content-Length: {length}\r\n\r\n{body}"),
                (true, 0) => "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
                (true, length) => {
                    format!("Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n")
                }
            };
            let next = format!("/open/{at}-{chunked}");
            h1.send(format!(
                "POST /body HTTP/1.1\r\nHost: localhost\r\n{framed}GET {next} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            ));
            for _ in 0..2 {
                assert_eq!(h1.response().expect("an answer").status, 200, "{at} {chunked}");
            }
            expected.push(("/body".to_owned(), body.clone()));
            expected.push((next, String::new()));
        }
    }
    let mut h2 = H2::connect(&gateway, &[0, 4, 0, 0x7f, 0xff, 0xff]);
    let mut stream = 1;
    for (at, body) in bodies.iter().enumerate() {
        for declared in [false, true] {
            let mut post = head("POST", "/body");
            if declared {
                post.push(("content-length".to_owned(), body.len().to_string()));
            }
            h2.headers(stream, &block(&post), false);
            // Never more than the window; and an empty DATA at the end.
            for piece in body.as_bytes().chunks(16_000).take(4) {
                h2.send(0, 0, stream, piece);
            }
            let sent = body.len().min(64_000);
            if sent < body.len() {
                // What is not ended is no request.
                h2.send(3, 0, stream, &[0, 0, 0, 8]);
            } else {
                h2.send(0, 1, stream, &[]);
                assert_eq!(h2.outcome(stream).status(), Some(200), "{at} {declared}");
                expected.push(("/body".to_owned(), body.clone()));
            }
            let next = format!("/open/{at}-{declared}-2");
            h2.get(stream + 2, &next);
            assert_eq!(h2.outcome(stream + 2).status(), Some(200), "{at} {declared}");
            expected.push((next, String::new()));
            stream += 4;
        }
    }
    let seen: Vec<(String, String)> = bundle
        .upstream
        .seen()
        .into_iter()
        .map(|seen| (seen.target, String::from_utf8_lossy(&seen.body).into_owned()))
        .collect();
    assert_eq!(seen, expected);
    // A body that may still be coming keeps its connection from being used again, and nothing else does.
    assert!(bundle.upstream.connections() < seen.len(), "no connection was used again");
}

/// A client that goes away, or says that it is done, before its body has its declared length has made no request, whether or not
/// the backend could take it for one.
#[test]
fn a_body_that_is_cut_short_of_its_length_is_no_request() {
    let (bundle, gateway) = start("");
    let mut h2 = H2::connect(&gateway, &[]);
    let mut stream = 1;
    // What is declared, what is sent of it, and how it ends: END_STREAM, RST_STREAM, or trailers.
    for (declared, sent, end) in [
        (Some(9), "hello", "end"),
        (Some(9), "hello", "reset"),
        (Some(9), "hello", "trailers"),
        (Some(9), "", "end"),
        // All of it came, and the client has not said so.
        (Some(5), "hello", "reset"),
        (Some(0), "", "reset"),
        (None, "hello", "reset"),
        (None, "0\r\n\r\n", "reset"),
    ] {
        let mut post = head("POST", "/body");
        post.extend(declared.map(|length: usize| ("content-length".to_owned(), length.to_string())));
        h2.headers(stream, &block(&post), false);
        match end {
            "reset" => {
                h2.send(0, 0, stream, sent.as_bytes());
                h2.send(3, 0, stream, &[0, 0, 0, 8]);
            }
            "trailers" => {
                h2.send(0, 0, stream, sent.as_bytes());
                h2.headers(stream, &block(&[("x-checksum".to_owned(), "1".to_owned())]), true);
            }
            _ => {
                h2.send(0, 1, stream, sent.as_bytes());
            }
        }
        // The same connection goes on, and what it says is read behind that.
        h2.get(stream + 2, "/open/after");
        assert_eq!(h2.outcome(stream + 2).status(), Some(200), "{declared:?} {sent:?} {end}");
        assert_eq!(bundle.upstream.count("/body"), 0, "{declared:?} {sent:?} {end}");
        stream += 4;
    }
    for framed in [
        "Content-Length: 9\r\n\r\nhello",
        "Content-Length: 9\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "Transfer-Encoding: chunked\r\n\r\n9\r\nhello",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    ] {
        let mut wire = gateway.wire();
        wire.send(format!("POST /body HTTP/1.1\r\nHost: localhost\r\n{framed}"));
        drop(wire);
    }
    until("all of them are gone", DEADLINE, || {
        (gateway.metrics().sum("sealgate_connections_open", &[]) <= 1.0).then_some(())
    });
    assert_eq!(gateway.curl("/open/after").send().status, 200);
    assert_eq!(bundle.upstream.count("/body"), 0);
    // The whole of it is one.
    let mut post = head("POST", "/body");
    post.push(("content-length".to_owned(), "5".to_owned()));
    h2.headers(stream, &block(&post), false);
    h2.send(0, 1, stream, b"hello");
    assert_eq!(h2.outcome(stream).status(), Some(200));
    assert_eq!(bundle.upstream.count("/body"), 1);
}

// What broke other proxies.

#[test]
fn an_upgrade_field_opens_no_door() {
    let (bundle, gateway) = start("");
    for (path, status) in [("/secret", 404), ("/open/x", 404), ("/nowhere", 404), ("/ws/echo", 401)] {
        let mut wire = gateway.wire();
        let reply = wire.upgrade(path, "");
        assert_eq!(reply.status, status, "{path}: {reply:?}");
        // The connection goes on as it was: what comes behind a refused upgrade are requests, and judged.
        wire.send("GET /open/after HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.response().expect("an answer").status, 200, "{path}");
        wire.send("GET /open/x HTTP/1.1\nHost: localhost\n\n");
        assert_eq!(wire.response().expect("an answer").status, 400, "{path}");
        assert!(wire.ended());
    }
    // Also when they were sent ahead.
    let mut wire = gateway.wire();
    let upgrade = "GET /secret HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    wire.send(format!("{upgrade}GET /open/ahead HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    assert_eq!(wire.response().expect("an answer").status, 404);
    assert_eq!(wire.response().expect("an answer").status, 200);
    let targets: BTreeSet<String> = bundle.upstream.seen().into_iter().map(|seen| seen.target).collect();
    assert_eq!(targets.into_iter().collect::<Vec<_>>(), ["/open/after", "/open/ahead"]);
    // And frames that were sent ahead of a 101 are frames.
    let token = bundle.issuer.token("alice");
    let upgrade = upgrade
        .replace("/secret", "/ws/echo")
        .replace("Connection: Upgrade", &format!("Connection: Upgrade\r\nAuthorization: Bearer {token}"));
    let mut wire = gateway.wire();
    wire.send([upgrade.as_bytes(), &sealgate_tests::frame(0x81, b"early")].concat());
    assert_eq!(wire.response().expect("an answer").status, 101);
    assert_eq!(wire.message().expect("an echo").payload, b"early");
}

#[test]
fn an_upstream_that_lies_gets_502_and_is_not_asked_again_over_that_connection() {
    let (bundle, gateway) = start("");
    let upstream = &bundle.upstream;
    let lies = [
        (
            "both-lengths",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
        ("two-lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
        ("list-of-lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok"),
        ("signed-length", "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"),
        ("other-coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok"),
        ("chunked-first", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        ("http-1.0-chunked", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        (
            "unasked-101",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        ),
        ("folded", "HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok"),
        ("blank-before-colon", "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok"),
        ("nul", "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nok"),
        ("no-status", "HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\nok"),
        ("no-http", "SSH-2.0-OpenSSH_9.2\r\n"),
        ("half-a-head", "HTTP/1.1 200 OK\r\nContent-Le"),
        ("nothing", ""),
    ];
    for (name, bytes) in lies {
        // Some keep the connection open, as if nothing had been.
        let keep = !matches!(name, "half-a-head" | "nothing" | "no-http");
        upstream.script(&format!("/open/{name}"), bytes, keep);
    }
    upstream.endless("/open/endless-fields", "HTTP/1.1 200 OK\r\n", "X-Field: 0123456789\r\n");
    upstream.endless("/open/endless-field", "HTTP/1.1 200 OK\r\nX: ", "0123456789");
    upstream.endless("/open/endless-1xx", "", "HTTP/1.1 102 Processing\r\n\r\n");
    let names = lies.iter().map(|(name, _)| *name).chain(["endless-fields", "endless-field", "endless-1xx"]);
    for name in names {
        for http in ["--http1.1", "--http2"] {
            let reply = gateway.curl(&format!("/open/{name}")).args([http]).send();
            assert_eq!(reply.status, 502, "{name} {http}: {reply:?}");
            reply.problem(502);
            let after = gateway.curl(&format!("/open/after-{name}")).args([http]).send();
            assert_eq!(after.status, 200, "after {name} {http}: {after:?}");
            assert!(after.body.contains(&format!("after-{name}")), "another one's answer: {after:?}");
        }
    }
    // What comes behind an answer is no answer to the next one.
    let split =
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    upstream.script("/open/split", split, true);
    for round in 0..4 {
        assert_eq!(gateway.curl("/open/split").send().body, "ok");
        let next = gateway.curl(&format!("/open/next-{round}")).send();
        assert!(next.status == 200 && next.body.contains(&format!("next-{round}")), "{next:?}");
    }
    // An answer that breaks off is not passed off as whole.
    upstream.script("/open/short", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", false);
    upstream.script(
        "/open/half-a-chunk",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        false,
    );
    upstream.script(
        "/open/bad-chunk",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        true,
    );
    for name in ["short", "half-a-chunk", "bad-chunk"] {
        for http in ["--http1.1", "--http2"] {
            let reply = gateway.curl(&format!("/open/{name}")).args([http]).try_send();
            // 502 where the fault came with the head; a broken transfer where that had gone out.
            let broke_off = match &reply {
                Ok(reply) => reply.status == 502,
                Err(error) => error.contains("curl exit"),
            };
            assert!(broke_off, "{name} {http}: {reply:?}");
            assert_eq!(gateway.curl("/open/x").args([http]).send().status, 200);
        }
    }
    // Interim answers are none of the client's business; the final one is.
    let interim =
        "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    upstream.script("/open/interim", interim, true);
    assert_eq!(gateway.curl("/open/interim").send().body, "ok");
}

#[test]
fn a_101_before_the_body_was_read_is_no_tunnel() {
    let (bundle, gateway) = start("");
    let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    bundle.upstream.script(
        "/body at once",
        format!("{switch}HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"),
        true,
    );
    let mut wire = gateway.wire();
    wire.send("POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nbeginning");
    let reply = wire.response().expect("an answer");
    assert_eq!(reply.status, 502, "{reply:?}");
    wire.send(SMUGGLED);
    assert!(wire.ended());
    assert_eq!(bundle.upstream.count("/open/smuggled"), 0);
    for _ in 0..3 {
        let next = gateway.curl("/open/next").send();
        assert!(next.status == 200 && next.body.contains("/open/next"), "{next:?}");
    }
    // Frames in one packet with the 101 are the tunnel's.
    let token = bundle.issuer.token("alice");
    let mut wire = gateway.wire();
    let reply = wire.upgrade("/ws/echo", &format!("Authorization: Bearer {token}\r\n"));
    assert_eq!(reply.status, 101);
}

// Slowness.

#[test]
fn a_head_that_trickles_is_told_so_and_cut_also_behind_an_answer() {
    let (bundle, gateway) = start("[connections]\nheader_timeout = \"1s\"\nidle_timeout = \"20s\"\n");
    for first in ["", "GET /open/first HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let mut wire = gateway.wire();
        let begun = Instant::now();
        wire.send(format!("{first}GET /open/x HTTP/1.1\r\nHo"));
        if !first.is_empty() {
            assert_eq!(wire.response().expect("an answer").status, 200);
        }
        for byte in ["s", "t"] {
            std::thread::sleep(Duration::from_millis(300));
            wire.send(byte);
        }
        let reply = wire.response().expect("an answer");
        reply.problem(408);
        assert!(wire.ended());
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    }
    assert_eq!(bundle.upstream.count("/open/x"), 0);
    // The preface of HTTP/2, and a header block, have the same time.
    let mut silent = Wire::connect(gateway.address(), gateway.ca(), &["h2"]);
    assert_eq!(silent.alpn().as_deref(), Some("h2"));
    let mut half = H2::connect(&gateway, &[]);
    half.send(1, 1, 1, &block(&head("GET", "/open/x")));
    let begun = Instant::now();
    assert!(silent.ends_within(DEADLINE));
    assert_eq!(half.outcome(1), Outcome::End);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(gateway.curl("/open/y").send().status, 200);
    assert_eq!(bundle.upstream.count("/open/x"), 0);
}

#[test]
fn a_body_that_drips_is_cut_by_its_rate_and_one_that_flows_is_not() {
    let (bundle, gateway) = start("[connections]\nbody_timeout = \"10s\"\nmin_body_rate = \"1KiB\"\n");
    let mut dripping = gateway.wire();
    dripping.send("POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n");
    let begun = Instant::now();
    let mut flowing = gateway.wire();
    flowing.send("POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70000\r\n\r\n");
    // A byte each half second never pauses for ten; 5 KiB a second is as slow as it may be, and more.
    for round in 0..14 {
        // No more than it is listened to: what comes behind the answer may be reset, and the answer with it.
        if round < 9 {
            dripping.send("x");
        }
        flowing.send("x".repeat(5000));
        std::thread::sleep(Duration::from_millis(500));
    }
    let slow = dripping.response().expect("an answer");
    slow.problem(408);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(flowing.response().expect("an answer").status, 200);
    assert_eq!(bundle.upstream.count("/body"), 1);
}

#[test]
fn a_client_that_takes_nothing_of_its_answer_is_cut_and_keeps_no_memory() {
    let (bundle, mut gateway) =
        start("[connections]\nwrite_timeout = \"1s\"\nidle_timeout = \"2s\"\nheader_timeout = \"2s\"\n");
    bundle.upstream.publish("/open/large", &"x".repeat(16 << 20));
    assert_eq!(gateway.curl("/open/large").send().body.len(), 16 << 20, "who reads gets all");
    let watch = gateway.process().watch_memory();
    let mut wires: Vec<Wire> = (0..4).map(|_| gateway.wire()).collect();
    for wire in &mut wires {
        wire.send("GET /open/large HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    // No window at all over HTTP/2: nothing of the body may go, and TCP is never full.
    let mut h2 = H2::connect(&gateway, &[0, 4, 0, 0, 0, 0]);
    for stream in 0..50 {
        h2.get(1 + 2 * stream, "/open/large");
    }
    assert_eq!(h2.outcome(1), Outcome::Reset);
    until("all are gone", DEADLINE, || {
        // A fresh client is served meanwhile.
        assert_eq!(gateway.curl("/open/x").http1().header("Connection: close").send().status, 200);
        (gateway.metrics().sum("sealgate_connections_open", &[]) <= 1.0).then_some(())
    });
    assert!(watch.grown() < 64 << 20, "{} MiB", watch.grown() >> 20);
    drop((wires, h2));
}

#[test]
fn slowhttptest_in_its_four_modes_cannot_hold_a_connection_and_others_are_served() {
    let (bundle, gateway) = start(
        "[connections]\nheader_timeout = \"3s\"\nidle_timeout = \"3s\"\nbody_timeout = \"3s\"\nwrite_timeout = \"3s\"\n",
    );
    bundle.upstream.publish("/open/large", &"x".repeat(16 << 20));
    const EACH: usize = 15;
    let modes: [(&str, &str, &[&str]); 4] = [
        ("headers", "/open/x", &["-H", "-i", "1"]),
        ("body", "/body", &["-B", "-i", "1", "-s", "8192"]),
        ("range", "/open/x", &["-R"]),
        ("read", "/open/large", &["-X", "-w", "512", "-y", "1024", "-n", "1", "-z", "32"]),
    ];
    let begun = Instant::now();
    let mut running: Vec<(&str, Process)> = modes
        .iter()
        .map(|(name, path, arguments)| {
            let mut command = Command::new("slowhttptest");
            command.args(*arguments).args(["-c", &EACH.to_string(), "-r", "50", "-l", "60", "-u"]);
            command.arg(gateway.url(path));
            (*name, Process::start(&mut command, bundle.folder(), name))
        })
        .collect();
    let open = || gateway.metrics().sum("sealgate_connections_open", &[]);
    until("the slow ones are there", DEADLINE, || (open() > 2.0 * EACH as f64).then_some(()));
    // What it reads slowly, slowhttptest has read of a whole record: it does not look at its socket until then.
    let mut left: BTreeSet<&str> =
        running.iter().map(|(name, _)| *name).filter(|name| *name != "read").collect();
    while !left.is_empty() || open() > 1.0 || sockets_of(gateway.port()) > 0 {
        assert_eq!(gateway.curl("/open/legitimate").send().status, 200);
        for (name, process) in &mut running {
            if process.ended().is_some() && left.remove(name) {
                let said = format!("{}{}", process.stdout(), process.stderr());
                assert!(said.contains("No open connections left"), "{name}: {said}");
            }
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{left:?} still hold connections; the gateway has {}, the system {}",
            open(),
            sockets_of(gateway.port())
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How many sockets the system keeps for our side of connections to `port`: open ones, and closed ones with something to send.
fn sockets_of(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the system's sockets");
    let local = format!(":{port:04X}");
    // Neither LISTEN, TIME_WAIT nor SYN_RECV.
    table
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            Some((words.next()?, words.nth(1)?))
        })
        .filter(|(address, state)| address.ends_with(&local) && !["0A", "06", "03"].contains(state))
        .count()
}

// Floods.

#[test]
fn http_2_floods_end_the_connection_and_cost_little() {
    // No deadline helps: what ends the connection is the flood.
    let patient = "[connections]\nheader_timeout = \"5m\"\nidle_timeout = \"1h\"\nbody_timeout = \"1h\"\nmin_body_rate = \"0B\"\n";
    let (bundle, mut gateway) = start(patient);
    assert_eq!(gateway.curl("/open/x").send().status, 200);
    let get = block(&head("GET", "/open/x"));
    let post = block(&head("POST", "/body"));
    let open = frame(1, 4, 1, &post);
    let each = |frames: &dyn Fn(u32) -> Vec<u8>| (0..5_000).flat_map(frames).collect::<Vec<u8>>();
    let reset = [0, 0, 0, 8];
    let bomb = {
        // One field of 4,000 bytes enters the table; 15,000 references to it follow in each head.
        let mut first = vec![0x40, 1, b'x', 127, 0xa1, 0x1e];
        first.extend([b'y'; 4000]);
        let head = [get.as_slice(), &first].concat();
        let references = [get.as_slice(), &vec![0xbe; 15_000]].concat();
        let more: Vec<u8> = (1..60).flat_map(|n| frame(1, 5, 1 + 2 * n, &references)).collect();
        [frame(1, 5, 1, &head), more].concat()
    };
    let floods: Vec<(&str, &str, Vec<u8>)> = vec![
        (
            "rapid reset",
            "CVE-2023-44487",
            each(&|n| [frame(1, 5, 1 + 2 * n, &get), frame(3, 0, 1 + 2 * n, &reset)].concat()),
        ),
        (
            "MadeYouReset by WINDOW_UPDATE of nought",
            "CVE-2025-8671",
            each(&|n| [frame(1, 5, 1 + 2 * n, &get), frame(8, 0, 1 + 2 * n, &[0; 4])].concat()),
        ),
        (
            "MadeYouReset by a window beyond 2 GiB",
            "CVE-2025-8671",
            each(&|n| {
                [frame(1, 5, 1 + 2 * n, &get), frame(8, 0, 1 + 2 * n, &[0x7f, 0xff, 0xff, 0xff])].concat()
            }),
        ),
        (
            "MadeYouReset by DATA on a stream that ended",
            "CVE-2025-8671",
            each(&|n| [frame(1, 5, 1 + 2 * n, &get), frame(0, 1, 1 + 2 * n, b"x")].concat()),
        ),
        (
            "MadeYouReset by PRIORITY of another length",
            "CVE-2025-8671",
            each(&|n| [frame(1, 5, 1 + 2 * n, &get), frame(2, 0, 1 + 2 * n, &[0; 4])].concat()),
        ),
        (
            "CONTINUATION",
            "CVE-2024-27316",
            [frame(1, 1, 1, &get), each(&|_| frame(9, 0, 1, b"\x00\x01x\x01y"))].concat(),
        ),
        (
            "CONTINUATION, empty",
            "CVE-2024-27316",
            [frame(1, 1, 1, &get), each(&|_| frame(9, 0, 1, b""))].concat(),
        ),
        ("SETTINGS", "CVE-2019-9515", each(&|_| frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]))),
        ("SETTINGS, acknowledged", "CVE-2019-9515", each(&|_| frame(4, 1, 0, &[]))),
        ("PING", "CVE-2019-9512", each(&|_| frame(6, 0, 0, &[0; 8]))),
        ("PRIORITY", "CVE-2019-9513", each(&|n| frame(2, 0, 1 + 2 * (n % 50), &[0, 0, 0, 0, 1]))),
        ("WINDOW_UPDATE of the connection", "RFC 9113 §10.5", each(&|_| frame(8, 0, 0, &[0, 0, 0, 1]))),
        (
            "WINDOW_UPDATE of a stream",
            "RFC 9113 §10.5",
            [open.clone(), each(&|_| frame(8, 0, 1, &[0, 0, 0, 1]))].concat(),
        ),
        ("empty DATA", "CVE-2019-9518", [open.clone(), each(&|_| frame(0, 0, 1, &[]))].concat()),
        ("empty DATA, padded", "CVE-2019-9518", [open, each(&|_| frame(0, 8, 1, &[0]))].concat()),
        ("unknown frames", "RFC 9113 §5.5", each(&|_| frame(0xee, 0, 0, &[0; 8]))),
        ("PRIORITY_UPDATE", "RFC 9218 §7.1", each(&|_| frame(16, 0, 0, &[0, 0, 0, 1, b'u', b'=', b'1']))),
        ("HPACK bomb", "CVE-2016-1544", bomb),
        ("streams beyond the limit", "RFC 9113 §5.1.2", each(&|n| frame(1, 4, 1 + 2 * n, &post))),
        (
            "heads too large",
            "RFC 9113 §10.5.1",
            each(&|n| {
                frame(1, 5, 1 + 2 * n, &[b"\x00\x01x\x7f\x81\x7f".as_slice(), &[b'y'; 16_000]].concat())
            }),
        ),
    ];
    let before = bundle.upstream.seen().len();
    for (name, source, flood) in floods {
        let reached = bundle.upstream.seen().len();
        let watch = gateway.process().watch_memory();
        let mut h2 = H2::connect(&gateway, &[]);
        // As long as it is taken. A reader of our own is not needed: what it is told, it ignores.
        for piece in flood.chunks(16 * 1024) {
            if !h2.write(piece) {
                break;
            }
        }
        // A fresh client is served meanwhile.
        let begun = Instant::now();
        assert_eq!(gateway.curl("/open/fresh").send().status, 200, "{name}");
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{name}: a fresh client waited {:?}",
            begun.elapsed()
        );
        while h2.frame().is_some() {}
        assert!(watch.grown() < 64 << 20, "{name} ({source}): {} MiB more", watch.grown() >> 20);
        let reached = bundle.upstream.seen().len() - reached;
        assert!(reached < 500, "{name}: {reached} requests reached the backend");
    }
    assert!(bundle.upstream.seen().len() > before);
}

#[test]
fn streams_that_stay_half_open_are_ended() {
    let (bundle, gateway) = start("[connections]\nbody_timeout = \"1s\"\nidle_timeout = \"2s\"\n");
    let mut h2 = H2::connect(&gateway, &[]);
    let post = block(&head("POST", "/body"));
    for stream in 0..90 {
        h2.headers(1 + 2 * stream, &post, false);
    }
    assert_eq!(h2.outcome(1).status(), Some(408));
    // One stream for a whole hour of silence is one connection, which then is idle.
    while h2.frame().is_some() {}
    assert_eq!(bundle.upstream.count("/body"), 0);
}

// Fields of answers.

#[test]
fn a_policy_says_which_fields_answers_have() {
    let (bundle, gateway) = start(
        "[headers]\nreferrer_policy = \"strict-origin\"\nremove = [\"X-Debug\"]\n\
         set = { \"X-Frame-Options\" = \"DENY\", \"Content-Security-Policy\" = \"default-src 'none'\" }\n",
    );
    bundle.upstream.script(
        "/open/chatty",
        "HTTP/1.1 200 OK\r\nServer: x\r\nVia: 1.1 x\r\nX-Powered-By: y\r\nX-AspNet-Version: 4\r\nX-Runtime: 0.1\r\n\
         Alt-Svc: h3=\":1\"\r\nX-Debug: stack\r\nX-Frame-Options: ALLOWALL\r\nX-Accel-Redirect: /etc\r\n\
         X-Content-Type-Options: sniff\r\nX-Kept: yes\r\nContent-Length: 2\r\n\r\nok",
        true,
    );
    let answers = ["/open/chatty", "/open/x", "/nowhere", "/secret"].map(|path| gateway.curl(path).send());
    for reply in &answers {
        assert_eq!(reply.header("x-frame-options"), Some("DENY"), "{reply:?}");
        assert_eq!(reply.header("content-security-policy"), Some("default-src 'none'"), "{reply:?}");
        assert_eq!(reply.header("referrer-policy"), Some("strict-origin"), "{reply:?}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"), "{reply:?}");
        for gone in [
            "server",
            "via",
            "x-powered-by",
            "x-aspnet-version",
            "x-runtime",
            "alt-svc",
            "x-debug",
            "x-accel-redirect",
        ] {
            assert_eq!(reply.header(gone), None, "{gone}: {reply:?}");
        }
        let count = reply.headers.iter().filter(|(name, _)| name == "x-frame-options").count();
        assert_eq!(count, 1, "{reply:?}");
        if reply.status >= 400 {
            assert_eq!(reply.header("cache-control"), Some("no-store"), "{reply:?}");
        }
    }
    assert_eq!(answers[0].header("x-kept"), Some("yes"));
    // What a policy may not say is an error that names its place.
    bundle.write(&format!(
        "[headers]\nset = {{ \"Content-Length\" = \"0\", \"X\" = \"a\\nb\" }}\nremove = [\"a b\"]\n{RULES}"
    ));
    let (reloaded, said) = gateway.reload();
    assert!(!reloaded && said.contains("headers.set.Content-Length"), "{said}");
    assert!(said.contains("headers.set.X") && said.contains("headers.remove"), "{said}");
}
