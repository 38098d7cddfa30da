//! The session clock: idle over HTTP and WebSocket together, sessions at the same time by role, over one gateway and several.

use std::thread;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Redis, Reply, Signal, Wire, frame, now, until};
use serde_json::{Value, json};

const RULES: &str = r#"
[[websocket]]
name = "chat"
path = "/ws/chat"
upstream = "backend"
origins = ["*"]
inspect = "none"
ping_interval = "1s"

[[websocket]]
name = "typed"
path = "/ws/typed"
upstream = "backend"
origins = ["*"]
inspect = "json"
unknown = "answer"
renew = { type = "renew", min_interval = "100ms" }

[[websocket.message]]
type = "say"
direction = "to-upstream"
activity = true

[[websocket.message]]
type = "ack"
direction = "to-upstream"

[[route]]
name = "api"
path = "/api"
methods = ["GET"]
upstream = "backend"

[[route]]
name = "poll"
path = "/poll"
methods = ["GET"]
upstream = "backend"
activity = false

[[route]]
name = "admin"
path = "/admin"
methods = ["GET"]
upstream = "backend"
roles = ["administrator"]

[[route]]
name = "ticket"
path = "/ticket"
methods = ["POST"]
ticket = { ttl = "1m" }
"#;

/// Long enough for a busy machine to do something meanwhile.
const IDLE: Duration = Duration::from_secs(4);

const ORIGIN: &str = "Origin: https://chat.example\r\n";

fn bundle(session: &str, more: &str) -> Bundle {
    Bundle::new(&format!("{RULES}\n[session]\n{session}\n{more}\n"))
}

fn together(redis: &Redis, session: &str, more: &str) -> Bundle {
    bundle(session, &format!("[shared]\nredis = [\"{}\"]\ncontact_timeout = \"2s\"\n{more}", redis.url()))
}

fn two(bundle: &Bundle) -> [Gateway; 2] {
    ["a", "b"].map(|name| {
        let gateway = Gateway::run_beside(bundle, name, true, |_| {});
        until("it is connected", DEADLINE, || {
            (gateway.metrics().sum("sealgate_shared_connected", &[]) == 1.0).then_some(())
        });
        gateway
    })
}

fn token(bundle: &Bundle, session: &str) -> String {
    token_with(bundle, session, json!({}))
}

fn token_with(bundle: &Bundle, session: &str, mut claims: Value) -> String {
    claims["sid"] = session.into();
    bundle.issuer.with("alice", claims)
}

fn get(gateway: &Gateway, path: &str, token: &str) -> Reply {
    gateway.curl(path).token(token).send()
}

/// Status, and the reason of a refusal.
fn said(reply: &Reply) -> (u16, String) {
    let problem: Value = serde_json::from_str(&reply.body).unwrap_or_default();
    let kind = problem["type"].as_str().unwrap_or_default().trim_start_matches("urn:sealgate:problem:");
    (reply.status, kind.to_owned())
}

#[track_caller]
fn assert_said(reply: &Reply, status: u16, reason: &str) {
    assert_eq!(said(reply), (status, reason.to_owned()), "{reply:?}");
}

fn open(gateway: &Gateway, path: &str, token: &str) -> Wire {
    let mut wire = gateway.wire();
    let reply = wire.upgrade(path, &format!("{ORIGIN}Authorization: Bearer {token}\r\n"));
    assert_eq!(reply.status, 101, "{reply:?}");
    wire
}

fn for_a_while(time: Duration, mut each: impl FnMut()) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        each();
        thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn s1_a_session_without_activity_ends_and_no_new_token_revives_it() {
    let bundle = bundle("idle = \"4s\"", "");
    let gateway = Gateway::run(&bundle);
    let (mine, other) = (token(&bundle, "s1"), token(&bundle, "s2"));
    let mut chat = open(&gateway, "/ws/chat", &mine);
    let mut typed = open(&gateway, "/ws/typed", &mine);
    let mut others = open(&gateway, "/ws/chat", &other);
    let begin = Instant::now();
    assert_eq!(get(&gateway, "/api", &mine).status, 200);
    assert_eq!(gateway.metrics().sum("sealgate_sessions_live", &[]), 2.0);

    // None of this is activity: polling, acknowledging, pings and pongs, renewing, tokens with newer dates.
    let mut refused = None;
    while refused.is_none() {
        assert!(begin.elapsed() < DEADLINE);
        let fresh = token_with(&bundle, "s1", json!({ "jti": format!("{:?}", begin.elapsed()) }));
        typed.send(frame(0x81, br#"{"type":"ack"}"#));
        let renew = json!({ "type": "renew", "token": fresh }).to_string();
        typed.send(frame(0x81, renew.as_bytes()));
        chat.send(frame(0x89, b"ping"));
        others.assert_echoes();
        let reply = get(&gateway, "/poll", &fresh);
        refused = (reply.status != 200).then_some(reply);
        thread::sleep(Duration::from_millis(200));
    }
    assert!(begin.elapsed() >= IDLE - Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_said(&refused.unwrap(), 401, "session-idle");
    assert_eq!(chat.close_code(), 4408);
    // What it sent was answered before that.
    let close = std::iter::from_fn(|| typed.message()).find(|message| message.opcode == 8);
    assert_eq!(close.expect("a close frame").close().0, 4408);

    // It stays ended: for old and new tokens, requests, sockets and tickets.
    let fresh = token(&bundle, "s1");
    for token in [&mine, &fresh] {
        assert_said(&get(&gateway, "/api", token), 401, "session-idle");
        let reply = gateway.wire().upgrade("/ws/chat", &format!("{ORIGIN}Authorization: Bearer {token}\r\n"));
        assert_said(&reply, 401, "session-idle");
        let ask = gateway.curl("/ticket").method("POST").token(token).header("Origin: https://chat.example");
        assert_said(&ask.send(), 401, "session-idle");
    }
    // Others are not concerned, and neither is a new session of the same subject.
    others.assert_echoes();
    assert_eq!(get(&gateway, "/api", &other).status, 200);
    assert_eq!(get(&gateway, "/api", &token(&bundle, "s3")).status, 200);
    let metrics = gateway.metrics();
    let ended = metrics.sum("sealgate_sessions_ended_total", &[("reason", "session-idle")]);
    assert_eq!(ended, 1.0);
    assert_eq!(metrics.sum("sealgate_sessions_live", &[]), 2.0);
    assert_eq!(metrics.sum("sealgate_sessions_remembered", &[]), 3.0);
}

#[test]
fn s1_activity_over_http_keeps_a_socket_and_the_other_way_round() {
    let bundle = bundle("idle = \"4s\"", "");
    let gateway = Gateway::run(&bundle);
    let [by_http, by_socket, none] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    let mut kept = open(&gateway, "/ws/typed", &by_http);
    let mut busy = open(&gateway, "/ws/typed", &by_socket);
    let mut left = open(&gateway, "/ws/typed", &none);
    for_a_while(IDLE * 2, || {
        assert_eq!(get(&gateway, "/api", &by_http).status, 200);
        busy.send(frame(0x81, br#"{"type":"say"}"#));
    });
    assert_eq!(get(&gateway, "/poll", &by_socket).status, 200);
    assert_eq!(get(&gateway, "/poll", &by_http).status, 200);
    kept.send(frame(0x81, br#"{"type":"nothing of ours"}"#));
    assert_eq!(kept.message().expect("an answer").opcode, 1, "it is open");
    assert_eq!(left.close_code(), 4408);
    assert_said(&get(&gateway, "/poll", &none), 401, "session-idle");
}

#[test]
fn s1_a_token_that_was_left_alone_begins_nothing() {
    let bundle = bundle("idle = \"1m\"\nskew = \"0s\"", "");
    let mut gateway = Gateway::run(&bundle);
    let issued =
        |ago: u64, login: u64| json!({ "iat": now() - ago, "nbf": now() - ago, "auth_time": now() - login });
    let old = token_with(&bundle, "s1", issued(120, 120));
    assert_said(&get(&gateway, "/api", &old), 401, "session-idle");
    // It is not known to have ended: the issuer may say that it goes on.
    assert_eq!(get(&gateway, "/api", &token_with(&bundle, "s1", issued(1, 120))).status, 200);
    assert_eq!(get(&gateway, "/api", &old).status, 200, "by the same session");
    // A restart makes nothing younger.
    let other = token_with(&bundle, "s2", issued(59, 59));
    gateway.signal(Signal::TERM);
    gateway.wait(DEADLINE);
    let gateway = Gateway::run(&bundle);
    until("a minute has passed since it was issued", DEADLINE, || {
        (said(&get(&gateway, "/poll", &other)) == (401, "session-idle".to_owned())).then_some(())
    });
}

#[test]
fn s1_a_reload_that_shortens_idle_counts_at_once() {
    let bundle = bundle("idle = \"1h\"", "");
    let gateway = Gateway::run(&bundle);
    let mine = token(&bundle, "s1");
    let mut socket = open(&gateway, "/ws/typed", &mine);
    assert_eq!(get(&gateway, "/poll", &mine).status, 200);
    bundle.write(&format!("{RULES}\n[session]\nidle = \"1s\"\n"));
    let (fine, text) = gateway.reload();
    assert!(fine, "{text}");
    assert_eq!(socket.close_code(), 4408);
    assert_said(&get(&gateway, "/poll", &mine), 401, "session-idle");
}

const LIMITS: &str = r#"
[[session.limit]]
max = 2
at_limit = "replace-oldest"

[[session.limit]]
role = "administrator"
max = 1
at_limit = "reject"
"#;

#[test]
fn the_oldest_session_makes_room_and_is_told_so() {
    let bundle = bundle("", LIMITS);
    let gateway = Gateway::run(&bundle);
    let [first, second, third] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    let mut oldest = open(&gateway, "/ws/chat", &first);
    let mut kept = open(&gateway, "/ws/chat", &second);
    let bob = bundle.issuer.token("bob");
    assert_eq!(get(&gateway, "/api", &bob).status, 200);
    // What is refused for another reason replaces nobody.
    assert_said(&get(&gateway, "/admin", &third), 403, "role-missing");
    oldest.assert_echoes();

    let mut newest = open(&gateway, "/ws/chat", &third);
    assert_eq!(oldest.close_code(), 4409);
    assert_said(&get(&gateway, "/api", &first), 401, "session-replaced");
    assert_said(&get(&gateway, "/api", &token(&bundle, "s1")), 401, "session-replaced");
    for wire in [&mut kept, &mut newest] {
        wire.assert_echoes();
    }
    for token in [&second, &third, &bob] {
        assert_eq!(get(&gateway, "/api", token).status, 200);
    }
    let ended = gateway.metrics().sum("sealgate_sessions_ended_total", &[("reason", "session-replaced")]);
    assert_eq!(ended, 1.0);
}

#[test]
fn a_role_that_rejects_lets_one_in_until_it_is_idle() {
    let bundle = bundle("idle = \"4s\"", LIMITS);
    let gateway = Gateway::run(&bundle);
    let admin = |session| token_with(&bundle, session, json!({ "roles": ["user", "administrator"] }));
    let (first, second) = (admin("s1"), admin("s2"));
    assert_eq!(get(&gateway, "/admin", &first).status, 200);
    let reply = get(&gateway, "/admin", &second);
    assert_said(&reply, 429, "too-many-sessions");
    assert!(reply.header("retry-after").is_some(), "{reply:?}");
    let upgrade = gateway.wire().upgrade("/ws/chat", &format!("{ORIGIN}Authorization: Bearer {second}\r\n"));
    assert_said(&upgrade, 429, "too-many-sessions");
    assert_eq!(get(&gateway, "/admin", &first).status, 200);
    until("the first is idle", DEADLINE, || (get(&gateway, "/admin", &second).status == 200).then_some(()));
    assert_said(&get(&gateway, "/admin", &first), 401, "session-idle");
}

#[test]
fn s1_two_gateways_count_activity_together() {
    let redis = Redis::start();
    let bundle = together(&redis, "idle = \"4s\"", "");
    let [a, b] = two(&bundle);
    let [active, left] = ["s1", "s2"].map(|session| token(&bundle, session));
    let mut kept = open(&b, "/ws/typed", &active);
    let mut closed = [open(&a, "/ws/typed", &left), open(&b, "/ws/typed", &left)];
    // Nothing of it is heard on the second for more than twice the time.
    for_a_while(IDLE * 2 + Duration::from_secs(2), || assert_eq!(get(&a, "/api", &active).status, 200));
    kept.send(frame(0x81, br#"{"type":"nothing of ours"}"#));
    assert_eq!(kept.message().expect("an answer").opcode, 1, "it is open");
    assert_eq!(get(&b, "/poll", &active).status, 200);
    for wire in &mut closed {
        assert_eq!(wire.close_code(), 4408);
    }
    for gateway in [&a, &b] {
        assert_said(&get(gateway, "/api", &token(&bundle, "s2")), 401, "session-idle");
    }
    // One that comes later knows what ended, and what goes on although its token is old.
    let late = Gateway::run_beside(&bundle, "late", true, |_| {});
    assert_said(&get(&late, "/api", &token(&bundle, "s2")), 401, "session-idle");
    assert_eq!(get(&late, "/poll", &active).status, 200);
    // An empty Redis is told again.
    assert_eq!(redis.ask(&["FLUSHALL"]).trim(), "OK");
    redis.ask(&["CLIENT", "KILL", "TYPE", "normal"]);
    until("it knows the session again", DEADLINE, || {
        // However long it takes to connect: nobody forgets it meanwhile.
        assert_eq!(get(&a, "/api", &active).status, 200);
        let known = redis.ask(&["ZCARD", "{sealgate}:sessions:active"]);
        let ended = redis.ask(&["ZCARD", "{sealgate}:sessions:idle"]);
        (known.trim() == "1" && ended.trim() == "1").then_some(())
    });
}

#[test]
fn a_session_is_replaced_on_whichever_gateway_it_is() {
    let redis = Redis::start();
    let bundle = together(&redis, "", LIMITS);
    let [a, b] = two(&bundle);
    let [first, second, third] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    let mut oldest = open(&a, "/ws/chat", &first);
    assert_eq!(get(&a, "/api", &second).status, 200);
    assert_eq!(get(&b, "/api", &third).status, 200);
    assert_eq!(oldest.close_code(), 4409);
    assert_said(&get(&a, "/api", &first), 401, "session-replaced");
    assert_said(&get(&b, "/api", &first), 401, "session-replaced");
    for gateway in [&a, &b] {
        for token in [&second, &third] {
            assert_eq!(get(gateway, "/api", token).status, 200);
        }
    }
    // Of many that come at once on both, as many get in as may.
    let admins: Vec<_> = (0..6)
        .map(|number| {
            bundle.issuer.with("carol", json!({ "sid": format!("c{number}"), "roles": ["administrator"] }))
        })
        .collect();
    let statuses: Vec<_> = thread::scope(|scope| {
        let ask = |(number, token): (usize, &String)| {
            let gateway = if number % 2 == 0 { &a } else { &b };
            let token = token.clone();
            scope.spawn(move || get(gateway, "/admin", &token).status)
        };
        let asking: Vec<_> = admins.iter().enumerate().map(ask).collect();
        asking.into_iter().map(|it| it.join().unwrap()).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 5, "{statuses:?}");
}

#[test]
fn s1_without_redis_each_gateway_counts_what_it_saw_and_nobody_waits() {
    let redis = Redis::start();
    let bundle = together(&redis, "idle = \"4s\"", "");
    let [a, b] = two(&bundle);
    let [here, elsewhere, left] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    for gateway in [&a, &b] {
        for token in [&here, &elsewhere, &left] {
            assert_eq!(get(gateway, "/api", token).status, 200);
        }
    }
    let mut socket = open(&b, "/ws/typed", &elsewhere);
    redis.signal(Signal::STOP);
    let timed = |gateway, path, token: &str| {
        let begin = Instant::now();
        let reply = get(gateway, path, token);
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        reply
    };
    let mut refusals = Vec::new();
    for_a_while(IDLE * 2 + Duration::from_secs(3), || {
        assert_eq!(timed(&a, "/api", &elsewhere).status, 200, "it is active here");
        assert_eq!(timed(&b, "/api", &here).status, 200, "and it is here");
        refusals.push(said(&timed(&b, "/poll", &elsewhere)));
    });
    // First nobody is logged out for a Redis that is late; once contact is lost, the gateway goes by its own clock.
    refusals.dedup();
    assert_eq!(refusals.last(), Some(&(401, "session-idle".to_owned())), "{refusals:?}");
    assert_eq!(socket.close_code(), 4408);
    // A session that is new there begins, and one that nobody knows anything of does so by its token.
    assert_eq!(timed(&a, "/api", &token(&bundle, "s4")).status, 200);
    redis.signal(Signal::CONT);
    let new = token(&bundle, "s4");
    let active = || [&elsewhere, &new].map(|token| assert_eq!(get(&a, "/api", token).status, 200));
    until("the other's activity is known again", DEADLINE, || {
        active();
        (get(&b, "/poll", &elsewhere).status == 200).then_some(())
    });
    until("and the end of the one that nobody used", DEADLINE, || {
        active();
        (said(&get(&a, "/poll", &left)) == (401, "session-idle".to_owned())).then_some(())
    });
    assert_eq!(get(&b, "/poll", &new).status, 200);
}

fn ticket(gateway: &Gateway, token: &str) -> Reply {
    gateway.curl("/ticket").method("POST").token(token).header("Origin: https://chat.example").send()
}

fn redeemed(gateway: &Gateway, ticket: &str, origin: &str) -> Reply {
    gateway
        .wire()
        .upgrade("/ws/chat", &format!("{origin}Sec-WebSocket-Protocol: sealgate.ticket.{ticket}\r\n"))
}

#[test]
fn a_ticket_of_one_gateway_opens_one_socket_on_any() {
    let redis = Redis::start();
    let bundle = together(&redis, "", "");
    let [a, b] = two(&bundle);
    let mine = token(&bundle, "s1");
    let made = |gateway: &Gateway| {
        let reply = ticket(gateway, &mine);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["ticket"].as_str().expect("a ticket").to_owned()
    };
    let elsewhere = made(&a);
    // What stands in Redis is neither the ticket nor the token.
    let names = redis.ask(&["KEYS", "sealgate:ticket:*"]);
    let stands = redis.ask(&["GET", names.trim()]);
    assert!(
        !names.contains(&elsewhere) && !stands.contains(&elsewhere) && !stands.contains(&mine),
        "{names}"
    );
    assert_eq!(redeemed(&b, &elsewhere, ORIGIN).status, 101);
    assert_eq!(bundle.upstream.last().header("x-sealgate-session"), Some("s1"));
    for gateway in [&a, &b] {
        assert_said(&redeemed(gateway, &elsewhere, ORIGIN), 401, "token-invalid");
    }
    let here = made(&a);
    assert_eq!(redeemed(&a, &here, ORIGIN).status, 101);
    assert_said(&redeemed(&b, &here, ORIGIN), 401, "token-invalid");
    let stolen = made(&a);
    assert_said(&redeemed(&b, &stolen, "Origin: https://evil.example\r\n"), 401, "token-invalid");
    assert_said(&redeemed(&a, &stolen, ORIGIN), 401, "token-invalid");
    assert_said(&redeemed(&b, &"A".repeat(43), ORIGIN), 401, "token-invalid");
    // Of many that ask both at once, one gets in.
    for _ in 0..3 {
        let ticket = made(&a);
        let opened: Vec<_> = thread::scope(|scope| {
            let ask = |number: usize| {
                let (gateway, ticket) = (if number.is_multiple_of(2) { &a } else { &b }, ticket.clone());
                scope.spawn(move || redeemed(gateway, &ticket, ORIGIN).status)
            };
            let asking: Vec<_> = (0..6).map(ask).collect();
            asking.into_iter().map(|it| it.join().unwrap()).collect()
        });
        assert_eq!(opened.iter().filter(|status| **status == 101).count(), 1, "{opened:?}");
    }
    // Without Redis: the gateway that made one takes it, another cannot know it, and neither is the client's fault.
    let (held, other) = (made(&a), made(&a));
    redis.signal(Signal::STOP);
    assert_eq!(redeemed(&a, &held, ORIGIN).status, 101);
    assert_said(&redeemed(&b, &other, ORIGIN), 503, "contact-lost");
    let alone = made(&a);
    assert_eq!(redeemed(&a, &alone, ORIGIN).status, 101);
}

#[test]
fn tickets_are_refused_without_redis_where_the_policy_wants_that() {
    let redis = Redis::start();
    let bundle = together(&redis, "", "tickets_on_loss = \"deny\"");
    let [a, _b] = two(&bundle);
    let mine = token(&bundle, "s1");
    let reply = ticket(&a, &mine);
    let held = reply.json()["ticket"].as_str().expect("a ticket").to_owned();
    redis.signal(Signal::STOP);
    assert_said(&ticket(&a, &mine), 503, "contact-lost");
    assert_said(&redeemed(&a, &held, ORIGIN), 503, "contact-lost");
}
