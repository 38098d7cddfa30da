//! How much may be under way at the same time, and who is served when it is too much for all.

use sealgate_tests::{Bundle, Curl, DEADLINE, Gateway, Wire, until};
use serde_json::json;

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

const ENVELOPE: &str = r#"{ "id": "01890a5d-ac96-774b-bcce-b302099a8057", "conversation": "e2e:team", "recipients": [
  { "user": "bob", "device": "phone", "type": 0, "ciphertext": "AwogQUJDREVGR0hJSktMTU5PUFFSU1RV" }] }"#;

/// A message whose second half is still to come.
fn half(wire: &mut Wire, token: &str) {
    let (head, length) = (&ENVELOPE[..40], ENVELOPE.len());
    wire.send(format!(
        "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{head}"
    ));
}

/// Row N-1. Bodies are held while they are judged: nobody may have the gateway hold as many as he likes.
#[test]
fn each_bundle_holds_so_many_bodies_of_one_person_and_no_more() {
    for (name, limit) in [("enterprise", 4), ("regulated", 4), ("consumer", 2)] {
        let bundle = Bundle::shipped(name);
        let gateway = Gateway::run(&bundle);
        let [alice, bob] = ["alice", "bob"].map(|subject| bundle.issuer.token(subject));
        let mut wires: Vec<_> = (0..limit).map(|_| gateway.wire()).collect();
        wires.iter_mut().for_each(|wire| half(wire, &alice));
        let decided = |outcome: &str| {
            let labels = [("limit", "bodies-per-subject"), ("outcome", outcome)];
            gateway.metrics().sum("sealgate_concurrency_decisions_total", &labels)
        };
        until("all are under way", DEADLINE, || (decided("allowed") == f64::from(limit)).then_some(()));
        let send = |token: &str| gateway.curl("/v1/messages").token(token).json(ENVELOPE).send();
        let refused = send(&alice);
        assert_eq!(refused.problem(429), "urn:sealgate:problem:too-many-at-once", "{name}");
        // Another session of the same person is the same person; another person is not.
        let desk = bundle.issuer.with("alice", json!({ "sid": "another", "jti": "another" }));
        assert_eq!(send(&desk).status, 429, "{name}");
        assert_eq!(send(&bob).status, 200, "{name}");
        // What is no body of hers is not concerned.
        assert_eq!(gateway.curl("/v1/users/alice/history").token(&alice).send().status, 200, "{name}");
        let first = &mut wires[0];
        first.send(&ENVELOPE[40..]);
        assert_eq!(first.response().expect("an answer").status, 200, "{name}");
        assert_eq!(send(&alice).status, 200, "{name}");
        // Whoever breaks off gives the place back, too.
        half(&mut wires[0], &alice);
        until("it is under way", DEADLINE, || (send(&alice).status == 429).then_some(()));
        wires.swap_remove(0).reset();
        until("the place is free", DEADLINE, || (send(&alice).status == 200).then_some(()));
    }
}

/// The bundles' own numbers take a machine to reach; this is their rule with smaller ones.
#[test]
fn under_load_each_bundle_answers_its_health_check_and_keeps_open_sockets() {
    for name in ["enterprise", "regulated", "consumer"] {
        let bundle = Bundle::shipped(name);
        let policy = std::fs::read_to_string(bundle.policy().join("policy.toml")).expect("the policy");
        let line = policy.lines().find(|line| line.starts_with("max_in_flight = ")).expect("it is there");
        bundle.write_file("policy.toml", &policy.replace(line, "max_in_flight = 4"));
        bundle.write_file(
            "policy.d/echo.toml",
            "[[websocket]]\nname = \"echo\"\npath = \"/ws/echo\"\nupstream = \"backend\"\naction = \"message.receive\"\n\
             inspect = \"none\"\n",
        );
        let gateway = Gateway::run(&bundle);
        let people: Vec<_> = (0..4).map(|number| bundle.issuer.token(&format!("user-{number}"))).collect();
        let mut socket = gateway.open("/ws/echo", &people[0]);
        let (mut beside, mut health) = (gateway.wire(), gateway.wire());
        let mut ask = |path: &str, token: Option<&str>| {
            let wire = if token.is_some() { &mut beside } else { &mut health };
            let token = token.map(|it| format!("Authorization: Bearer {it}\r\n")).unwrap_or_default();
            wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{token}\r\n"));
            wire.response().expect("an answer").status
        };
        assert_eq!(ask("/v1/users/bob/devices", Some(&people[0])), 200, "{name}");
        assert_eq!(ask("/healthz", None), 200, "{name}");
        let mut wires: Vec<_> = people.iter().map(|_| gateway.wire()).collect();
        for (wire, token) in wires.iter_mut().zip(&people) {
            half(wire, token);
        }
        // Or a question would take the place of one that is not read yet.
        until("they are under way", DEADLINE, || {
            (gateway.metrics().sum("sealgate_http_requests_in_flight", &[]) == 4.0).then_some(())
        });
        until("it is too much", DEADLINE, || {
            (ask("/v1/users/bob/devices", Some(&people[0])) == 503).then_some(())
        });
        assert_eq!(ask("/healthz", None), 200, "{name}");
        assert!(gateway.curl("/healthz").try_send().is_err(), "{name}: a new connection");
        socket.assert_echoes();
        for wire in &mut wires {
            wire.send(&ENVELOPE[40..]);
            assert_eq!(
                wire.response().expect("an answer").status,
                200,
                "{name}: what was under way ends well"
            );
        }
        until("it is no more too much", DEADLINE, || {
            (ask("/v1/users/bob/devices", Some(&people[0])) == 200).then_some(())
        });
        assert_eq!(gateway.curl("/healthz").send().status, 200, "{name}");
        socket.assert_echoes();
    }
}
