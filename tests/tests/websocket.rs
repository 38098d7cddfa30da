//! WebSockets: judged upgrades, judged messages, and the right close code for everything that is refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sealgate_tests::{
    Bundle, Client, DEADLINE, Driver, Frame, Gateway, Open, Wire, frame, unmasked_frame, until,
};
use serde_json::json;

const RULES: &str = r#"
[[websocket]]
name = "plain"
path = "/ws/{variant}"
upstream = "backend"
auth = "required"
origins = ["https://chat.example.test"]
subprotocols = ["im.v1.json"]
require_subprotocol = false
query = {}
max_frame = "4KiB"
max_message = "8KiB"
max_fragments = 4
inspect = "none"

[[websocket]]
name = "checked"
path = "/ws-checked"
upstream = "backend"
auth = "required"
origins = ["https://chat.example.test"]
subprotocols = ["im.v1.json"]
require_subprotocol = false
max_frame = "4KiB"
max_message = "4KiB"
inspect = "json"
type_pointer = "/type"

[[websocket.message]]
type = "say"
direction = "both"
schema = "schemas/say.json"

[[websocket.message]]
type = "typing"
direction = "to-upstream"
rates = ["typing"]

[[websocket.message]]
type = "notice"
direction = "to-client"

[[websocket]]
name = "administrators"
path = "/ws-admin"
upstream = "backend"
auth = "required"
roles = ["administrator"]
origins = ["*"]
inspect = "none"

[[websocket]]
name = "strict"
path = "/ws-strict"
upstream = "backend"
auth = "required"
origins = ["https://chat.example.test"]
require_origin = true
subprotocols = ["im.v1.json", "im.v2.json"]
inspect = "none"

[[websocket]]
name = "limited"
path = "/ws-limited"
upstream = "backend"
auth = "required"
origins = ["*"]
inspect = "none"
message_rates = ["messages"]

[[websocket]]
name = "compressed"
path = "/ws-compressed"
upstream = "backend"
auth = "required"
max_frame = "256KiB"
max_message = "256KiB"
compression = "terminate"
inspect = "json"
type_pointer = "/type"

[[websocket.message]]
type = "say"
direction = "both"
schema = "schemas/say.json"

[[websocket.message]]
type = "paste"
direction = "both"

[[route]]
name = "guarded"
path = "/guarded"
methods = ["GET"]
upstream = "backend"
auth = "required"

[[rate]]
name = "messages"
per = ["session"]
quota = 5
period = "1h"
burst = 5

[[rate]]
name = "typing"
per = ["session", "message-type"]
quota = 2
period = "1h"
burst = 2
"#;

const SAY: &str = r#"{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object", "required": ["type", "text"], "additionalProperties": false,
  "properties": { "type": { "const": "say" }, "text": { "type": "string", "maxLength": 100 } }
}"#;

const GOOD: &str = r#"{"type":"say","text":"hello"}"#;

fn start() -> (Bundle, Gateway) {
    start_with(RULES)
}

fn start_with(rules: &str) -> (Bundle, Gateway) {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/say.json", SAY);
    bundle.write(rules);
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// A raw socket, open on `path`.
fn open_raw(gateway: &Gateway, path: &str, token: &str) -> Wire {
    let mut wire = gateway.wire();
    let reply = wire.upgrade(path, &format!("Authorization: Bearer {token}\r\n"));
    assert_eq!(reply.status, 101, "{reply:?}");
    wire
}

/// Reads up to the close frame, then sees that the connection ends.
#[track_caller]
fn expect_close(wire: &mut Wire, code: u16, what: &str) {
    let close = loop {
        let frame = wire.message().unwrap_or_else(|| panic!("{what}: ended without a close frame"));
        assert!(!frame.masked, "{what}: a server's frame is masked");
        if frame.opcode == 8 {
            break frame;
        }
    };
    let (have, reason) = close.close();
    assert_eq!(have, code, "{what}: {reason}");
    assert!(reason.len() <= 123, "{what}: {reason}");
    assert!(wire.ended(), "{what}");
}

/// Waits until the upstream has got a close frame, and checks that no data frame came before it but those given.
#[track_caller]
fn upstream_got(bundle: &Bundle, data: &[&[u8]], what: &str) {
    let frames = until("the upstream is told", DEADLINE, || {
        let frames = bundle.upstream.frames();
        frames.iter().any(|frame| frame.opcode == 8).then_some(frames)
    });
    assert!(frames.iter().all(|frame| frame.masked), "{what}: a client's frame is not masked: {frames:?}");
    let have: Vec<&[u8]> =
        frames.iter().filter(|frame| frame.opcode < 8).map(|frame| &frame.payload[..]).collect();
    assert_eq!(have, data, "{what}");
}

#[test]
fn two_real_clients_exchange_every_kind_of_message_with_the_included_backend() {
    let gateway = Gateway::dev();
    let token = gateway.token();
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        driver.open("a", &gateway.ws("/v1/echo"), &Open::token(&token));
        driver.echo("a", "hello");
        driver.echo("a", "grüße 🦀");
        driver.echo("a", "");
        driver.echo("a", &"x".repeat(40_000));
        driver.fragments("a", &["one ", "two ", "thrée"]);
        driver.expect_text("a", "one two thrée");
        driver.binary("a", &[0, 255, 128, 7]);
        let event = driver.next("a");
        assert_eq!(
            (event["event"].as_str(), event["data"].as_str()),
            (Some("binary"), Some("AP+ABw==")),
            "{client:?}"
        );
        driver.ping("a");
        assert_eq!(driver.next("a")["event"], "pong", "{client:?}");
        driver.echo("a", "still here");
        driver.close("a", 1000, "done");
        driver.expect_close("a", 1000);

        // Messages under a schema: the included backend's checked echo.
        driver.open("checked", &gateway.ws("/v1/echo-checked"), &Open::token(&token));
        driver.text("checked", "this is not JSON");
        let reason = driver.expect_close("checked", 1007);
        assert!(reason.starts_with("not-json"), "{client:?}: {reason}");
        driver.refused("none", &gateway.ws("/v1/echo"), &Open::bare(), 401);
    }
}

#[test]
fn the_token_comes_in_a_header_or_in_the_subprotocol_list_and_never_in_the_url() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let url = gateway.ws("/ws/a");
    let bearer = format!("sealgate.bearer.{token}");
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let open = driver.open("header", &url, &Open::token(&token).subprotocol("im.v1.json"));
        assert_eq!(open["subprotocol"], "im.v1.json", "{client:?}: {open}");

        let list = Open::bare().subprotocol("im.v1.json").subprotocol(&bearer);
        let open = driver.open("list", &url, &list);
        assert_eq!(open["subprotocol"], "im.v1.json", "{client:?}: {open}");
        assert!(!open.to_string().contains("sealgate.bearer"), "{client:?}: {open}");
        driver.echo("list", "hello");
        let seen = bundle.upstream.last();
        assert_eq!(seen.header("sec-websocket-protocol"), Some("im.v1.json"), "{seen:?}");
        assert_eq!(seen.header("x-sealgate-subject"), Some("alice"), "{seen:?}");
        assert!(!format!("{seen:?}").contains(&token), "the upstream got the token: {seen:?}");

        let before = bundle.upstream.seen().len();
        let refusal = driver.refused("none", &url, &Open::bare(), 401);
        let headers = refusal["headers"].to_string();
        assert!(
            headers.contains("www-authenticate") && headers.contains("application/problem+json"),
            "{refusal}"
        );
        driver.refused("url", &format!("{url}?access_token={token}"), &Open::bare(), 401);
        driver.refused("bad", &url, &Open::token("bad"), 401);
        let bad = Open::bare().subprotocol("im.v1.json").subprotocol("sealgate.bearer.bad");
        driver.refused("bad list", &url, &bad, 401);
        let twice = Open::token(&token).subprotocol("im.v1.json").subprotocol(&bearer);
        driver.refused("twice", &url, &twice, 400);
        driver.refused("expired", &url, &Open::token(&bundle.issuer.with("alice", json!({ "exp": 1 }))), 401);
        driver.refused("role", &gateway.ws("/ws-admin"), &Open::token(&token), 403);
        driver.refused("nowhere", &gateway.ws("/ws"), &Open::token(&token), 404);
        assert_eq!(bundle.upstream.seen().len(), before, "a refused upgrade reached the upstream");
    }
    // The subprotocol list is a token's place in a WebSocket upgrade only.
    let reply = gateway.curl("/guarded").header(&format!("Sec-WebSocket-Protocol: {bearer}")).send();
    assert!(matches!(reply.status, 400 | 401), "{reply:?}");
}

#[test]
fn an_origin_that_policy_does_not_name_is_refused() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let open = Open::token(&token);
        driver.open("own", &gateway.ws("/ws/a"), &open.clone().origin("https://chat.example.test"));
        driver.open("none", &gateway.ws("/ws/a"), &open);
        for (id, origin) in [
            ("evil", "https://evil.test"),
            ("suffix", "https://chat.example.test.evil.test"),
            ("scheme", "http://chat.example.test"),
            ("port", "https://chat.example.test:8443"),
            ("null", "null"),
        ] {
            let refusal = driver.refused(id, &gateway.ws("/ws/a"), &open.clone().origin(origin), 403);
            assert!(
                refusal["body"].as_str().is_some_and(|body| body.contains("origin-not-allowed")),
                "{refusal}"
            );
        }
        driver.open("any", &gateway.ws("/ws-limited"), &open.clone().origin("https://evil.test"));
    }
}

#[test]
fn a_rule_may_demand_a_subprotocol_and_an_origin() {
    let (bundle, gateway) = start();
    let url = gateway.ws("/ws-strict");
    let good = || Open::token(&bundle.issuer.token("alice")).origin("https://chat.example.test");
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let before = bundle.upstream.seen().len();
        driver.refused("none", &url, &good(), 400);
        driver.refused("unknown", &url, &good().subprotocol("im.v9.json"), 400);
        driver.refused("case", &url, &good().subprotocol("IM.v1.json"), 400);
        let no_origin = Open::token(&bundle.issuer.token("alice")).subprotocol("im.v1.json");
        driver.refused("no origin", &url, &no_origin, 403);
        assert_eq!(bundle.upstream.seen().len(), before, "{client:?}");
        let both = good().subprotocol("im.v9.json").subprotocol("im.v2.json").subprotocol("im.v1.json");
        let open = driver.open("good", &url, &both);
        // The upstream chooses among those that are both offered and allowed.
        assert_eq!(open["subprotocol"], "im.v2.json", "{client:?}: {open}");
        let offered = bundle.upstream.last();
        assert_eq!(offered.header("sec-websocket-protocol"), Some("im.v2.json, im.v1.json"), "{client:?}");
        driver.echo("good", "hello");
    }
}

#[test]
fn an_upgrade_header_switches_no_rule_off() {
    let (bundle, gateway) = start();
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    // At a route that is no WebSocket, with and without a token; and one that is a WebSocket, without.
    for (path, token) in [("/guarded", false), ("/guarded", true), ("/nowhere", false), ("/ws/a", false)] {
        let bearer = if token {
            format!("Authorization: Bearer {}\r\n", bundle.issuer.token("alice"))
        } else {
            String::new()
        };
        let mut wire = gateway.wire();
        wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade}{bearer}\r\n"));
        let reply = wire.response().expect("an answer");
        assert!((400..500).contains(&reply.status), "{path}: {reply:?}");
        reply.problem(reply.status);
    }
    let token = bundle.issuer.token("alice");
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (name, status, method, headers) in [
        ("no upgrade at all", 426, "GET", String::new()),
        ("version 8", 426, "GET", format!("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\n{key}")),
        ("no key", 400, "GET", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n".to_owned()),
        ("short key", 400, "GET", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: c2hvcnQ=\r\n".to_owned()),
        ("key twice", 400, "GET", format!("{upgrade}{key}")),
        ("POST", 405, "POST", upgrade.to_owned()),
        ("a body", 400, "GET", format!("{upgrade}Content-Length: 5\r\n")),
    ] {
        let mut wire = gateway.wire();
        let body = if name == "a body" { "hello" } else { "" };
        wire.send(format!(
            "{method} /ws/a HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{headers}\r\n{body}"
        ));
        let reply = wire.response().expect("an answer");
        assert_eq!(reply.status, status, "{name}: {reply:?}");
        if status == 426 {
            assert_eq!(reply.header("sec-websocket-version"), Some("13"), "{name}: {reply:?}");
        }
    }
    assert_eq!(bundle.upstream.seen().len(), 0, "{:?}", bundle.upstream.seen());
}

#[test]
fn a2_messages_are_judged_by_their_type_and_schema() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let url = gateway.ws("/ws-checked");
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        driver.open("good", &url, &Open::token(&token));
        driver.echo("good", GOOD);
        driver.fragments("good", &["{\"type\":", "\"say\",", "\"text\":\"hé\"}"]);
        driver.expect_text("good", "{\"type\":\"say\",\"text\":\"hé\"}");
        for (id, code, word, message) in [
            ("no JSON", 1007, "not-json", "hello"),
            ("half", 1007, "not-json", r#"{"type":"say","text":"hel"#),
            ("twice", 1007, "json-duplicate-key", r#"{"type":"say","text":"a","text":"b"}"#),
            ("schema", 1007, "schema", r#"{"type":"say","text":7}"#),
            ("more", 1007, "schema", r#"{"type":"say","text":"a","admin":true}"#),
            ("unknown type", 1008, "unknown-message-type", r#"{"type":"shout","text":"a"}"#),
            ("no type", 1008, "unknown-message-type", r#"{"text":"a"}"#),
            ("type of no text", 1008, "unknown-message-type", r#"{"type":["say"],"text":"a"}"#),
            ("only to clients", 1008, "unknown-message-type", r#"{"type":"notice"}"#),
            ("an array", 1008, "unknown-message-type", "[1]"),
        ] {
            let before = bundle.upstream.frames().iter().filter(|frame| frame.opcode < 8).count();
            driver.open(id, &url, &Open::token(&token));
            driver.echo(id, GOOD);
            driver.text(id, message);
            let reason = driver.expect_close(id, code);
            assert!(reason.starts_with(word), "{client:?} {id}: {reason}");
            let after = bundle.upstream.frames().iter().filter(|frame| frame.opcode < 8).count();
            assert_eq!(after, before + 1, "{client:?} {id}: a refused message reached the upstream");
        }
        driver.open("binary", &url, &Open::token(&token));
        driver.binary("binary", GOOD.as_bytes());
        driver.expect_close("binary", 1003);
        // Nobody else noticed.
        driver.echo("good", GOOD);
    }
    // Both ends are closed cleanly: the upstream got a close frame for each refused socket.
    let closed = 2 * 11;
    until("the upstream is told", DEADLINE, || {
        (bundle.upstream.frames().iter().filter(|frame| frame.opcode == 8).count() >= closed).then_some(())
    });
    // The other direction is judged too: this upstream echoes what only clients may say.
    let mut driver = Driver::start(Client::Python, gateway.ca());
    driver.open("reverse", &url, &Open::token(&token));
    driver.text("reverse", r#"{"type":"typing"}"#);
    let event = driver.next("reverse");
    assert_eq!(event["event"], "close", "a message that must not go to clients did: {event}");
}

#[test]
fn offering_compression_neither_gets_it_nor_switches_judging_off() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let open = driver.open("a", &gateway.ws("/ws-checked"), &Open::token(&token).compression());
        assert!(open["extensions"].is_null(), "{client:?}: {open}");
        let seen = bundle.upstream.last();
        assert_eq!(seen.header("sec-websocket-extensions"), None, "{seen:?}");
        driver.echo("a", GOOD);
        driver.text("a", r#"{"type":"say","text":7}"#);
        driver.expect_close("a", 1007);
    }
    // A compressed frame all the same: RSV1 without the extension is a protocol error.
    let mut wire = open_raw(&gateway, "/ws-checked", &token);
    wire.send(frame(0xc1, b"\xaa\x56\x2a\xa9\x2c\x48\x55\xb2\x52\x50\x2a\x4e\xac\x54\xd2"));
    expect_close(&mut wire, 1002, "RSV1");
}

/// A message as a client compresses it (RFC 7692 §7.2.1).
fn deflated(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + 64);
    let mut deflate = flate2::Compress::new(flate2::Compression::default(), false);
    deflate.compress_vec(message, &mut out, flate2::FlushCompress::Sync).expect("it compresses");
    out.strip_suffix(&[0, 0, 0xff, 0xff]).expect("a flushed block").to_vec()
}

/// As [`deflated`], the other way.
fn inflated(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    let mut inflate = flate2::Decompress::new(false);
    let whole = [payload, &[0, 0, 0xff, 0xff]].concat();
    inflate.decompress_vec(&whole, &mut out, flate2::FlushDecompress::Sync).expect("it inflates");
    out
}

fn paste(length: usize) -> String {
    format!(r#"{{"type":"paste","text":"{}"}}"#, "Grüße, sealgate. ".repeat(length / 18))
}

#[test]
fn compression_is_terminated_where_the_policy_says_so() {
    let (bundle, gateway) = start();
    let (url, token) = (gateway.ws("/ws-compressed"), bundle.issuer.token("alice"));
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let open = driver.open("a", &url, &Open::token(&token).compression());
        let extensions = open["extensions"].as_str().unwrap_or_default();
        assert!(extensions.contains("permessage-deflate"), "{client:?}: {open}");
        let seen = bundle.upstream.last();
        assert_eq!(seen.header("sec-websocket-extensions"), None, "{seen:?}");
        // Both directions, long enough for both clients and for us to compress; and one that nobody compresses.
        let long = paste(3000);
        driver.echo("a", &long);
        driver.echo("a", GOOD);
        driver.echo("a", &long);
        let frames = bundle.upstream.frames();
        let [.., first, second, third] = &frames[..] else { panic!("{frames:?}") };
        for (frame, text) in [(first, &*long), (second, GOOD), (third, &*long)] {
            assert_eq!((frame.fin, frame.reserved, frame.opcode, frame.masked), (true, 0, 1, true));
            assert_eq!(frame.payload, text.as_bytes(), "{client:?}");
        }
        // It is judged inflated.
        driver.text("a", &format!(r#"{{"type":"say","text":"{}"}}"#, "x".repeat(2000)));
        driver.expect_close("a", 1007);
        // Who does not offer it does not get it.
        let open = driver.open("b", &url, &Open::token(&token));
        assert!(open["extensions"].is_null(), "{client:?}: {open}");
        driver.echo("b", &long);
    }
}

#[test]
fn compressed_messages_keep_their_bounds_and_their_form() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let open = |offer: &str| {
        let mut wire = gateway.wire();
        let headers = format!(
            "Authorization: Bearer {token}\r\nSec-WebSocket-Extensions: permessage-deflate{offer}\r\n"
        );
        let reply = wire.upgrade("/ws-compressed", &headers);
        (wire, reply)
    };
    let answer = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
    for (offer, window) in [
        ("", ""),
        ("; client_max_window_bits", ""),
        ("; server_max_window_bits=9", "; server_max_window_bits=9"),
        (
            "; server_max_window_bits=99, permessage-deflate; server_max_window_bits=\"12\"",
            "; server_max_window_bits=12",
        ),
    ] {
        let (mut wire, reply) = open(offer);
        assert_eq!(reply.status, 101, "{reply:?}");
        assert_eq!(reply.header("sec-websocket-extensions"), Some(&*format!("{answer}{window}")), "{offer}");
        let long = paste(2000);
        wire.send(frame(0xc1, &deflated(long.as_bytes())));
        let echoed = wire.frame().expect("an echo");
        assert_eq!((echoed.fin, echoed.reserved, echoed.opcode), (true, 0x40, 1), "{offer}");
        assert!(echoed.payload.len() < 300, "{}", echoed.payload.len());
        assert_eq!(inflated(&echoed.payload), long.as_bytes());
    }
    for declined in ["; server_max_window_bits=7", "; server_no_context_takeover=1", "; level=9"] {
        let (mut wire, reply) = open(declined);
        assert_eq!((reply.status, reply.header("sec-websocket-extensions")), (101, None), "{declined}");
        wire.send(frame(0xc1, &deflated(GOOD.as_bytes())));
        expect_close(&mut wire, 1002, declined);
    }
    let (_, reply) = open("; server_max_window_bits=");
    assert_eq!(reply.status, 400, "{reply:?}");

    let good = deflated(GOOD.as_bytes());
    let within = deflated(format!(r#"{{"type":"paste","text":"{}"}}"#, "x".repeat(60_000)).as_bytes());
    let cases: [(&str, u16, Vec<u8>); 7] = [
        ("more than max_message", 1009, frame(0xc1, &deflated(&vec![b' '; 300_000]))),
        ("more than a hundredfold", 1009, frame(0xc1, &deflated(&vec![b' '; 200_000]))),
        ("does not inflate", 1007, frame(0xc1, b"\x07")),
        ("cut off", 1007, frame(0xc1, &good[..good.len() - 3])),
        ("text that is not UTF-8", 1007, frame(0xc1, &deflated(b"\xff\xfe"))),
        ("RSV1 on a continuation", 1002, [frame(0x41, &good[..4]), frame(0xc0, &good[4..])].concat()),
        ("RSV1 on a ping", 1002, frame(0xc9, b"")),
    ];
    for (what, code, bytes) in cases {
        let (mut wire, _) = open("");
        wire.send(frame(0xc1, &within));
        wire.send(bytes);
        expect_close(&mut wire, code, what);
    }
}

#[test]
fn a_frame_that_breaks_the_protocol_closes_with_its_code_and_goes_no_further() {
    let long = vec![b'x'; 4097];
    let header_of_huge = [&[0x82, 0xff][..], &(1_u64 << 40).to_be_bytes(), &[1, 2, 3, 4]].concat();
    let header_of_negative = [&[0x82, 0xff][..], &u64::MAX.to_be_bytes(), &[1, 2, 3, 4]].concat();
    let fragments = |sizes: &[usize]| -> Vec<u8> {
        let last = sizes.len() - 1;
        let first = |at: usize| if at == 0 { 2 } else { 0 } | if at == last { 0x80 } else { 0 };
        sizes.iter().enumerate().flat_map(|(at, size)| frame(first(at), &vec![7; *size])).collect()
    };
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    for (name, code, bytes) in [
        ("unmasked", 1002, unmasked_frame(0x81, b"hello")),
        ("RSV1", 1002, frame(0xc1, b"hello")),
        ("RSV2", 1002, frame(0xa1, b"hello")),
        ("RSV3", 1002, frame(0x91, b"hello")),
        ("opcode 3", 1002, frame(0x83, b"hello")),
        ("opcode 11", 1002, frame(0x8b, b"")),
        ("fragmented ping", 1002, frame(0x09, b"hello")),
        ("long ping", 1002, frame(0x89, &[0; 126])),
        ("unmasked ping", 1002, unmasked_frame(0x89, b"")),
        ("continuation of nothing", 1002, frame(0x80, b"hello")),
        ("new message inside one", 1002, [frame(0x01, b"a"), frame(0x81, b"b")].concat()),
        ("length in more bytes than needed", 1002, [&[0x81, 0xfe, 0, 5, 0, 0, 0, 0][..], b"hello"].concat()),
        ("length with the highest bit", 1002, header_of_negative),
        ("close of one byte", 1002, frame(0x88, &[3])),
        ("close code 1005", 1002, frame(0x88, &1005_u16.to_be_bytes())),
        ("close code 999", 1002, frame(0x88, &999_u16.to_be_bytes())),
        ("close reason that is not UTF-8", 1007, frame(0x88, b"\x03\xe8\xff")),
        ("text that is not UTF-8", 1007, frame(0x81, b"caf\xe9")),
        ("text with a surrogate", 1007, frame(0x81, b"\xed\xa0\x80")),
        ("text cut within a character", 1007, frame(0x81, b"\xf0\x9f\xa6")),
        (
            "text that goes wrong later",
            1007,
            [frame(0x01, b"ok \xf0\x9f"), frame(0x80, b"\x28\x28")].concat(),
        ),
        ("frame above the limit", 1009, frame(0x82, &long)),
        ("its header alone", 1009, frame(0x82, &long)[..8].to_vec()),
        ("header of a terabyte", 1009, header_of_huge),
        ("message above the limit", 1009, fragments(&[4096, 4096, 1])),
        ("too many fragments", 1009, fragments(&[1, 1, 1, 1, 1])),
    ] {
        let mut wire = open_raw(&gateway, "/ws/a", &token);
        wire.send(&bytes);
        expect_close(&mut wire, code, name);
    }
    let got: Vec<Frame> = bundle.upstream.frames().into_iter().filter(|frame| frame.opcode != 8).collect();
    let whole: Vec<&Frame> = got.iter().filter(|frame| frame.fin && frame.opcode != 0).collect();
    assert!(whole.is_empty(), "a refused message reached the upstream: {whole:?}");

    // What is odd and allowed passes: empty messages, limits met exactly, a character across frames, a ping inside a
    // message, an empty continuation, every close code that may be sent.
    let mut wire = open_raw(&gateway, "/ws/a", &token);
    let passed: [(&str, Vec<u8>, &[u8]); 5] = [
        ("empty", frame(0x81, b""), b""),
        ("limits met", fragments(&[4096, 4096]), &[7; 8192]),
        ("four fragments", fragments(&[1, 0, 1, 1]), &[7; 3]),
        (
            "a character across frames",
            [frame(0x01, b"\xf0\x9f"), frame(0x80, b"\xa6\x80")].concat(),
            "🦀".as_bytes(),
        ),
        ("ping inside", [frame(0x01, b"a"), frame(0x89, b"p"), frame(0x80, b"b")].concat(), b"ab"),
    ];
    for (name, bytes, expected) in passed {
        wire.send(&bytes);
        let mut payload = Vec::new();
        loop {
            let frame = wire.message().unwrap_or_else(|| panic!("{name}: ended"));
            assert_ne!(frame.opcode, 8, "{name}: {:?}", frame.close());
            payload.extend_from_slice(&frame.payload);
            if frame.fin {
                break;
            }
        }
        assert_eq!(payload, expected, "{name}");
    }
    for code in [1000_u16, 1001, 1003, 3000, 4999] {
        let mut wire = open_raw(&gateway, "/ws/a", &token);
        wire.send(frame(0x88, &[&code.to_be_bytes()[..], "tschüß".as_bytes()].concat()));
        expect_close(&mut wire, code, "a clean close");
    }
}

#[test]
fn a_refusal_closes_the_upstream_side_cleanly_and_delivers_what_was_accepted() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let mut wire = open_raw(&gateway, "/ws-checked", &token);
    // In one write: two good messages, then a bad one. The good ones arrive.
    let say = |text: &str| format!(r#"{{"type":"say","text":"{text}"}}"#).into_bytes();
    wire.send([frame(0x81, &say("one")), frame(0x81, &say("two")), frame(0x81, b"{}")].concat());
    expect_close(&mut wire, 1008, "no type");
    upstream_got(&bundle, &[&say("one"), &say("two")], "accepted before the close");
}

#[test]
fn a1_too_many_messages_close_with_4429() {
    let (bundle, gateway) = start();
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let token = bundle.issuer.with("alice", json!({ "sid": format!("{client:?}") }));
        driver.open("a", &gateway.ws("/ws-limited"), &Open::token(&token));
        driver.open("b", &gateway.ws("/ws-limited"), &Open::token(&token));
        for n in 0..4 {
            driver.echo("a", &n.to_string());
        }
        // The limit is the session's, over all its sockets.
        driver.echo("b", "5");
        driver.text("a", "6");
        let reason = driver.expect_close("a", 4429);
        assert!(reason.starts_with("rate-exceeded"), "{reason}");
        // Another session has its own.
        let other = bundle.issuer.with("alice", json!({ "sid": format!("another {client:?}") }));
        driver.open("c", &gateway.ws("/ws-limited"), &Open::token(&other));
        driver.echo("c", "hello");

        // A rate of one message type leaves the others alone.
        driver.open("d", &gateway.ws("/ws-checked"), &Open::token(&token));
        driver.echo("d", GOOD);
    }
    let frames = bundle.upstream.frames();
    assert!(
        frames.iter().all(|frame| frame.payload != b"6"),
        "the message above the limit reached the upstream"
    );
    // Control frames have a limit of their own.
    let mut wire = open_raw(&gateway, "/ws/a", &bundle.issuer.token("bob"));
    for _ in 0..2000 {
        wire.send(frame(0x89, b""));
    }
    expect_close(&mut wire, 4429, "ping flood");
}

#[test]
fn a3_a_socket_closes_with_4401_when_its_token_expires() {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/say.json", SAY);
    let policy = Bundle::BASE.replace("jwks =", "skew = \"0s\"\njwks =");
    bundle.write_file("policy.toml", &format!("{policy}{RULES}"));
    let gateway = Gateway::run(&bundle);
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        // First, as a client takes its time to start.
        driver.open("long", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("alice")));
        let expires = now() as u64 + 3;
        let short = bundle.issuer.with("alice", json!({ "exp": expires }));
        driver.open("short", &gateway.ws("/ws/a"), &Open::token(&short));
        driver.echo("short", "hello");
        let reason = driver.expect_close("short", 4401);
        assert!(reason.starts_with("token-expired"), "{client:?}: {reason}");
        let late = now() - expires as f64;
        assert!((-0.1..2.0).contains(&late), "{client:?}: closed {late} s after the token expired");
        driver.echo("long", "still here");
        driver.refused("again", &gateway.ws("/ws/a"), &Open::token(&short), 401);
    }
}

#[test]
fn an_upstream_that_breaks_the_protocol_harms_no_client() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let mut driver = Driver::start(Client::Python, gateway.ca());
    for variant in ["refuse", "accept", "deflate", "subprotocol"] {
        let event = driver.attempt(variant, &gateway.ws(&format!("/ws/{variant}")), &Open::token(&token));
        assert_eq!(event["event"], "refused", "{variant}: {event}");
        assert!(matches!(event["status"].as_u64(), Some(403 | 502 | 503)), "{variant}: {event}");
    }
    for variant in ["masked", "latin", "gone"] {
        driver.open(variant, &gateway.ws(&format!("/ws/{variant}")), &Open::token(&token));
        driver.text(variant, "hello");
        let event = driver.next(variant);
        assert_eq!(event["event"], "close", "{variant}: {event}");
        assert!(matches!(event["code"].as_u64(), Some(1011..=1014)), "{variant}: {event}");
    }
    bundle.upstream.stop();
    let event = driver.attempt("stopped", &gateway.ws("/ws/a"), &Open::token(&token));
    assert!(matches!(event["status"].as_u64(), Some(502 | 503)), "{event}");
}

#[test]
fn a_client_that_goes_away_without_a_word_is_told_upstream() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let mut wire = open_raw(&gateway, "/ws/a", &token);
    wire.send(frame(0x81, b"hello"));
    assert_eq!(wire.message().expect("the echo").payload, b"hello");
    drop(wire);
    upstream_got(&bundle, &[b"hello"], "gone");
    until("the gauge falls", Duration::from_secs(10), || {
        (gateway.metrics().sum("sealgate_websocket_open", &[]) == 0.0).then_some(())
    });
}
