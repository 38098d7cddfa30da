//! How much may be under way at the same time, and who is served when it is too much for all.

use sealgate_tests::{Bundle, Curl, DEADLINE, Gateway, Wire, until};

const RULES: &str = r#"
[[concurrency]]
name = "per-subject"
per = ["subject"]
limit = 2

[[concurrency]]
name = "sockets-per-address"
per = ["address"]
limit = 2

[[route]]
name = "held"
path = "/hold/{id}"
methods = ["GET"]
upstream = "backend"
concurrency = ["per-subject"]

[[route]]
name = "api"
path = "/api"
methods = ["GET"]
upstream = "backend"

[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "health"
path = "/health"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[websocket]]
name = "chat"
path = "/ws"
upstream = "backend"
origins = ["*"]
inspect = "none"
concurrency = ["sockets-per-address"]
"#;

fn asks(gateway: &Gateway, token: &str) -> (u16, Wire) {
    let mut wire = gateway.wire();
    let reply = wire.upgrade("/ws", &format!("Authorization: Bearer {token}\r\n"));
    (reply.status, wire)
}

#[test]
fn one_request_or_socket_too_many_is_refused_until_another_ends() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let [alice, bob] = ["alice", "bob"].map(|subject| bundle.issuer.token(subject));
    let held: Vec<_> = (0..2).map(|n| gateway.curl(&format!("/hold/{n}")).token(&alice).start()).collect();
    bundle.upstream.wait_held(2);
    let refused = gateway.curl("/hold/3").token(&alice).send();
    assert_eq!(refused.problem(429), "urn:sealgate:problem:too-many-at-once");
    assert_eq!(refused.header("retry-after"), Some("1"));
    // Another subject, another route.
    let other = gateway.curl("/hold/4").token(&bob).start();
    bundle.upstream.wait_held(3);
    assert_eq!(gateway.curl("/api").token(&alice).send().status, 200);
    bundle.upstream.release();
    for child in held.into_iter().chain([other]) {
        assert_eq!(Curl::finish(child).expect("an answer").status, 200);
    }
    assert_eq!(gateway.curl("/hold/5").token(&alice).send().status, 200);

    let (mut first, mut second) = (gateway.open("/ws", &alice), gateway.open("/ws", &bob));
    assert_eq!(asks(&gateway, &bob).0, 429);
    first.assert_echoes();
    second.assert_echoes();
    drop(first);
    until("the place is free", DEADLINE, || (asks(&gateway, &bob).0 == 101).then_some(()));
    second.assert_echoes();
    let refusals = gateway
        .metrics()
        .sum("sealgate_concurrency_decisions_total", &[("limit", "per-subject"), ("outcome", "refused")]);
    assert_eq!(refusals, 1.0);
}

#[test]
fn under_load_strangers_go_first_then_all_that_is_new_and_open_sockets_stay() {
    let rules = RULES.replace("concurrency = [\"per-subject\"]", "");
    let overload = "[overload]\nmax_in_flight = 4\nshed_at = 50\nexempt = [\"health\"]\n";
    let bundle = Bundle::new(&format!("{rules}\n{overload}"));
    let gateway = Gateway::run(&bundle);
    let alice = bundle.issuer.token("alice");
    let mut socket = gateway.open("/ws", &alice);
    let mut busy = Vec::new();
    let mut hold = |count: usize| {
        while busy.len() < count {
            busy.push(gateway.curl(&format!("/hold/{}", busy.len())).token(&alice).start());
        }
        bundle.upstream.wait_held(count);
    };
    // Connections that are open before it is too much.
    let mut wires: Vec<_> = (0..3).map(|_| gateway.wire()).collect();
    let mut ask = |wire: usize, path: &str, token: Option<&str>| {
        let token = token.map(|it| format!("Authorization: Bearer {it}\r\n")).unwrap_or_default();
        wires[wire].send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{token}\r\n"));
        wires[wire].response().expect("an answer").status
    };
    assert_eq!([ask(0, "/open", None), ask(1, "/api", Some(&alice))], [200, 200]);
    hold(2);
    let level = || gateway.metrics().sum("sealgate_load_level", &[]);
    assert_eq!(
        level(),
        0.0,
        "the scrape is no request of the public side, and two of four are not more than half"
    );
    hold(3);
    assert_eq!(
        [ask(0, "/open", None), ask(1, "/api", Some(&alice)), ask(2, "/health", None)],
        [503, 200, 200]
    );
    let refused = gateway.curl("/open").send();
    assert_eq!(refused.problem(503), "urn:sealgate:problem:overloaded");
    assert!(refused.header("retry-after").is_some());
    hold(4);
    assert_eq!(
        [ask(0, "/open", None), ask(1, "/api", Some(&alice)), ask(2, "/health", None)],
        [503, 503, 200]
    );
    // A connection that is new is closed before TLS; a socket that is open goes on.
    hold(4);
    socket.assert_echoes();
    bundle.upstream.release();
    for child in busy {
        assert_eq!(Curl::finish(child).expect("an answer").status, 200);
    }
    assert_eq!([ask(0, "/open", None), ask(1, "/api", Some(&alice))], [200, 200]);
}

#[test]
fn with_too_little_memory_or_too_many_connections_new_ones_are_closed() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let alice = bundle.issuer.token("alice");
    let mut socket = gateway.open("/ws", &alice);
    // No process of this kind is that small.
    bundle.write(&format!("{RULES}\n[overload]\nmax_memory = \"16MiB\"\n"));
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    until("memory is looked at", DEADLINE, || gateway.curl("/open").try_send().err());
    socket.assert_echoes();
    assert!(gateway.metrics().sum("sealgate_connections_refused_total", &[("reason", "overloaded")]) >= 1.0);
    bundle.write(&format!("{RULES}\n[overload]\nmax_memory = \"900GiB\"\nmax_accept_rate = 1\n"));
    assert!(gateway.reload().0);
    until("there is memory again", DEADLINE, || gateway.curl("/open").try_send().ok());
    let closed = (0..20).filter(|_| gateway.curl("/open").try_send().is_err()).count();
    assert!(closed >= 1, "twenty connections came at one in a second");
    socket.assert_echoes();
}
