//! One-use tickets: how a page opens a WebSocket without a token in its upgrade.

use std::thread;

use sealgate_tests::{Bundle, Gateway, Reply, frame};
use serde_json::{Value, json};

const RULES: &str = r#"
[[route]]
name = "ticket"
path = "/ticket"
methods = ["POST"]
ticket = { ttl = "5m" }

[[websocket]]
name = "socket"
path = "/ws/echo"
upstream = "backend"
origins = ["https://chat.example", "https://other.example"]
subprotocols = ["im.v1"]
require_subprotocol = false

[[websocket]]
name = "administrators"
path = "/ws/admin"
upstream = "backend"
roles = ["administrator"]
origins = ["https://chat.example"]
"#;

const HERE: &str = "https://chat.example";

fn asked(gateway: &Gateway, token: &str, origin: Option<&str>) -> Reply {
    let request = gateway.curl("/ticket").method("POST").token(token);
    match origin {
        Some(origin) => request.header(&format!("Origin: {origin}")).send(),
        None => request.send(),
    }
}

fn ticket(gateway: &Gateway, token: &str) -> String {
    let reply = asked(gateway, token, Some(HERE));
    assert_eq!((reply.status, reply.header("cache-control")), (200, Some("no-store")), "{reply:?}");
    assert_eq!(reply.json()["expires_in"], 300);
    reply.json()["ticket"].as_str().expect("a ticket").to_owned()
}

fn upgrade(gateway: &Gateway, path: &str, ticket: &str, more: &str) -> Reply {
    gateway
        .wire()
        .upgrade(path, &format!("Sec-WebSocket-Protocol: im.v1, sealgate.ticket.{ticket}\r\n{more}"))
}

fn origin(origin: &str) -> String {
    format!("Origin: {origin}\r\n")
}

fn refused(name: &str, reply: &Reply, status: u16, reason: &str) {
    let problem: Value = serde_json::from_str(&reply.body).unwrap_or_else(|_| panic!("{name}: {reply:?}"));
    let said = (reply.status, problem["type"].as_str().unwrap_or_default());
    assert_eq!(said, (status, &*format!("urn:sealgate:problem:{reason}")), "{name}");
}

#[test]
fn a3_a_ticket_opens_one_socket_of_its_session_and_page() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    let here = origin(HERE);

    let one = ticket(&gateway, &token);
    assert_eq!(bundle.upstream.seen().len(), 0, "the gateway itself answers");
    let mut wire = gateway.wire();
    let fields = format!("Sec-WebSocket-Protocol: sealgate.ticket.{one}, im.v1\r\n{here}");
    let reply = wire.upgrade("/ws/echo", &fields);
    assert_eq!((reply.status, reply.header("sec-websocket-protocol")), (101, Some("im.v1")), "{reply:?}");
    wire.send(frame(0x81, b"hello"));
    assert_eq!(wire.message().expect("an echo").payload, b"hello");
    let seen = bundle.upstream.last();
    assert_eq!(seen.header("x-sealgate-subject"), Some("alice"));
    assert_eq!(seen.header("x-sealgate-session"), Some("session-of-alice"));
    assert_eq!(seen.header("sec-websocket-protocol"), Some("im.v1"), "a ticket is never forwarded");
    let opened = bundle.upstream.seen().len();

    let invalid = |name: &str, reply: &Reply| refused(name, reply, 401, "token-invalid");
    // On new connections, so that either core is met.
    for _ in 0..8 {
        invalid("used", &upgrade(&gateway, "/ws/echo", &one, &here));
    }
    for (name, fields) in [
        ("another page, though it may connect", origin("https://other.example")),
        ("no page", String::new()),
        ("a page that hides", origin("null")),
    ] {
        let stolen = ticket(&gateway, &token);
        invalid(name, &upgrade(&gateway, "/ws/echo", &stolen, &fields));
        invalid("and then it is used", &upgrade(&gateway, "/ws/echo", &stolen, &here));
    }
    let another = ticket(&gateway, &token);
    let mut guessed = another.clone();
    guessed.replace_range(0..1, if another.starts_with('A') { "B" } else { "A" });
    for (name, text) in [
        ("guessed", guessed.as_str()),
        ("empty", ""),
        ("cut short", &another[1..]),
        ("too long", &format!("{another}A")),
        ("padded", &format!("{another}=")),
        ("a token", &token),
    ] {
        invalid(name, &upgrade(&gateway, "/ws/echo", text, &here));
    }
    // Two credentials are two too many, whoever they are of.
    let bob = bundle.issuer.token("bob");
    for fields in [
        format!("{here}Authorization: Bearer {bob}\r\n"),
        format!("{here}Authorization: Bearer {token}\r\n"),
        format!("{here}Sec-WebSocket-Protocol: sealgate.bearer.{bob}\r\n"),
        format!("{here}Sec-WebSocket-Protocol: sealgate.ticket.{another}\r\n"),
    ] {
        refused("beside a token", &upgrade(&gateway, "/ws/echo", &another, &fields), 400, "token-twice");
    }
    // A ticket carries the session's rights and no more.
    let weak = ticket(&gateway, &token);
    refused("without the role", &upgrade(&gateway, "/ws/admin", &weak, &here), 403, "role-missing");
    // It is for sockets alone.
    let reply =
        gateway.curl("/ticket").method("POST").header(&format!("Authorization: Bearer {another}")).send();
    invalid("as a token", &reply);
    assert_eq!(bundle.upstream.seen().len(), opened, "the backend sees none of that");
}

#[test]
fn a3_a_ticket_is_made_for_pages_with_a_good_token_only() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    refused("no page", &asked(&gateway, &token, None), 403, "origin-not-allowed");
    refused("a page that hides", &asked(&gateway, &token, Some("null")), 403, "origin-not-allowed");
    refused(
        "no token",
        &gateway.curl("/ticket").method("POST").header("Origin: https://chat.example").send(),
        401,
        "token-missing",
    );
    refused(
        "a token that expired",
        &asked(&gateway, &bundle.issuer.with("alice", json!({ "exp": 1, "iat": 1, "nbf": 1 })), Some(HERE)),
        401,
        "token-expired",
    );
    refused("by GET", &gateway.curl("/ticket").token(&token).send(), 405, "method-not-allowed");
    for _ in 0..100 {
        ticket(&gateway, &token);
    }
    let reply = asked(&gateway, &token, Some(HERE));
    refused("too many", &reply, 429, "too-many-tickets");
    assert!(reply.header("retry-after").is_some(), "{reply:?}");
    ticket(&gateway, &bundle.issuer.token("bob"));
    assert_eq!(bundle.upstream.seen().len(), 0);
}

#[test]
fn a3_of_many_upgrades_with_one_ticket_one_opens() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    for _ in 0..5 {
        let ticket = ticket(&gateway, &token);
        let outcomes: Vec<u16> = thread::scope(|scope| {
            let asking: Vec<_> = (0..6)
                .map(|_| scope.spawn(|| upgrade(&gateway, "/ws/echo", &ticket, &origin(HERE)).status))
                .collect();
            asking.into_iter().map(|it| it.join().unwrap()).collect()
        });
        assert_eq!(outcomes.iter().filter(|status| **status == 101).count(), 1, "{outcomes:?}");
    }
}

#[test]
fn s4_a_ticket_of_a_revoked_session_opens_nothing() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let held = ticket(&gateway, &bundle.issuer.token("alice"));
    let output = sealgate_tests::sealgate(&[
        &"sessions",
        &"revoke",
        &"--control",
        &gateway.control(),
        &"--session",
        &"session-of-alice",
    ]);
    assert!(output.status.success(), "{output:?}");
    refused("revoked", &upgrade(&gateway, "/ws/echo", &held, &origin(HERE)), 401, "revoked");
    assert_eq!(bundle.upstream.seen().len(), 0);
}
