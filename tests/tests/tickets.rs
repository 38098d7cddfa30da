//! One-use tickets: how a page opens a WebSocket without a token in its upgrade.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use sealgate_tests::{Bundle, Gateway, Reply, filled, frame};
use serde::Deserialize;
use serde_json::{Value, json};

const RULES: &str = r#"
[[route]]
name = "ticket"
path = "/ticket"
methods = ["POST"]
ticket = { ttl = "5m" }

[[route]]
name = "brief"
path = "/brief"
methods = ["POST"]
ticket = { ttl = "5s" }

[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"

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

fn asked(gateway: &Gateway, path: &str, token: &str, origin: Option<&str>) -> Reply {
    let request = gateway.curl(path).method("POST").token(token);
    match origin {
        Some(origin) => request.header(&format!("Origin: {origin}")).send(),
        None => request.send(),
    }
}

fn ticket(gateway: &Gateway, token: &str) -> String {
    let reply = asked(gateway, "/ticket", token, Some(HERE));
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

    // On new connections, so that either core is met.
    for _ in 0..8 {
        refused("used", &upgrade(&gateway, "/ws/echo", &one, &here), 401, "token-invalid");
    }
    // A page that it was not made for has used it up all the same.
    let stolen = ticket(&gateway, &token);
    for page in [origin("https://other.example"), here] {
        refused("stolen", &upgrade(&gateway, "/ws/echo", &stolen, &page), 401, "token-invalid");
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    group: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    about: String,
    source: String,
    expect: String,
    cases: Vec<Case>,
}

/// One case; the file says what its fields mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    source: Option<String>,
    ticket: Option<String>,
    offer: Option<String>,
    origin: Option<String>,
    #[serde(default)]
    send: Vec<String>,
    path: Option<String>,
    #[serde(default)]
    http: bool,
}

impl Case {
    /// The path of its upgrade and the fields.
    fn filled(&self, known: impl Fn(&str) -> Option<String>) -> (String, String) {
        let ticket = filled(self.ticket.as_deref().unwrap_or("<ticket>"), &[], &known);
        let fill = |text: &str| {
            filled(text, &[], |word| if word == "ticket" { Some(ticket.clone()) } else { known(word) })
        };
        let offer = self.offer.as_deref().unwrap_or("im.v1, sealgate.ticket.<ticket>");
        let fields = [("Sec-WebSocket-Protocol", offer), ("Origin", self.origin.as_deref().unwrap_or(HERE))];
        let fields = fields.iter().filter(|(_, value)| !value.is_empty());
        let mut lines: String = fields.map(|(name, value)| format!("{name}: {}\r\n", fill(value))).collect();
        lines.extend(self.send.iter().map(|field| fill(field) + "\r\n"));
        (fill(self.path.as_deref().unwrap_or("/ws/echo")), lines)
    }

    fn send(&self, gateway: &Gateway, path: &str, lines: &str) -> Reply {
        let mut wire = gateway.wire();
        if !self.http {
            return wire.upgrade(path, lines);
        }
        wire.send(format!("GET /mine HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n"));
        wire.response().expect("an answer")
    }
}

#[test]
fn a3_every_attack_on_tickets_gets_its_answer_and_reaches_nobody() {
    let list = include_str!("../attacks/tickets.toml");
    let list: List = toml::from_str(list).unwrap_or_else(|error| panic!("tickets.toml: {error}"));
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let (alice, bob) = (bundle.issuer.token("alice"), bundle.issuer.token("bob"));
    let strangers = Bundle::new(RULES);
    let elsewhere = ticket(&Gateway::run(&strangers), &strangers.issuer.token("alice"));
    let known = |word: &str| {
        Some(match word {
            "ticket" | "another" => ticket(&gateway, &alice),
            "of-bob" => ticket(&gateway, &bob),
            "alice" => alice.clone(),
            "bob" => bob.clone(),
            "elsewhere" => elsewhere.clone(),
            "for-evil" => {
                let reply = asked(&gateway, "/ticket", &alice, Some("https://evil.example"));
                reply.json()["ticket"].as_str().expect("a ticket").to_owned()
            }
            "used" => {
                let used = ticket(&gateway, &alice);
                assert_eq!(upgrade(&gateway, "/ws/echo", &used, &origin(HERE)).status, 101);
                used
            }
            "late" => {
                let reply = asked(&gateway, "/brief", &alice, Some(HERE));
                assert_eq!(reply.json()["expires_in"], 5, "{reply:?}");
                thread::sleep(Duration::from_millis(5_100));
                reply.json()["ticket"].as_str().expect("a ticket").to_owned()
            }
            "revoked" => {
                let held = ticket(&gateway, &bundle.issuer.token("carol"));
                let (fine, said) = gateway.sessions(&["revoke", "--session", "session-of-carol"]);
                assert!(fine, "{said}");
                held
            }
            _ => return None,
        })
    };
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    for group in &list.group {
        for case in &group.cases {
            let name = format!("{}: {}", group.about, case.name);
            assert!(names.insert(name.clone()), "{name} stands twice");
            assert!(!case.source.as_ref().unwrap_or(&group.source).is_empty(), "{name} has no source");
            let (path, lines) = case.filled(known);
            let before = bundle.upstream.seen().len();
            let reply = case.send(&gateway, &path, &lines);
            let reached = bundle.upstream.seen().len() - before;
            let problem: Value = serde_json::from_str(&reply.body).unwrap_or_default();
            let reason = problem["type"].as_str().and_then(|it| it.strip_prefix("urn:sealgate:problem:"));
            let answer = format!("{} {}", reply.status, reason.unwrap_or_default());
            let fine = if group.expect == "101" {
                reply.status == 101 && reached == 1
            } else {
                answer == group.expect && reached == 0
            };
            if !fine {
                faults.push(format!("{name}: {answer}, the backend saw {reached}"));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert!(names.len() >= 39, "{} cases", names.len());
    assert_eq!(upgrade(&gateway, "/ws/echo", &ticket(&gateway, &alice), &origin(HERE)).status, 101);
}

#[test]
fn a3_a_ticket_is_made_for_pages_with_a_good_token_only() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    refused("no page", &asked(&gateway, "/ticket", &token, None), 403, "origin-not-allowed");
    refused(
        "a page that hides",
        &asked(&gateway, "/ticket", &token, Some("null")),
        403,
        "origin-not-allowed",
    );
    refused(
        "no token",
        &gateway.curl("/ticket").method("POST").header("Origin: https://chat.example").send(),
        401,
        "token-missing",
    );
    refused(
        "a token that expired",
        &asked(
            &gateway,
            "/ticket",
            &bundle.issuer.with("alice", json!({ "exp": 1, "iat": 1, "nbf": 1 })),
            Some(HERE),
        ),
        401,
        "token-expired",
    );
    refused("by GET", &gateway.curl("/ticket").token(&token).send(), 405, "method-not-allowed");
    for _ in 0..100 {
        ticket(&gateway, &token);
    }
    let reply = asked(&gateway, "/ticket", &token, Some(HERE));
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
