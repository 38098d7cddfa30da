//! Several gateways and one Redis: what one revokes ends on all, whatever happens to Redis meanwhile, and nothing waits for it.

use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Redis, Reply, Signal, Wire, frame, until};
use serde_json::json;

const RULES: &str = r#"
[[websocket]]
name = "chat"
path = "/ws/{room}"
upstream = "backend"
origins = ["*"]
inspect = "none"

[[route]]
name = "api"
path = "/api"
methods = ["GET"]
upstream = "backend"

[[route]]
name = "admin"
path = "/admin"
methods = ["GET"]
upstream = "backend"
roles = ["user"]

[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"

[shared]
"#;

/// Longer than a request may ever wait for Redis here, with room for a busy machine; far below what would be a stall.
const AT_ONCE: Duration = Duration::from_secs(2);

fn bundle(redis: &Redis, more: &str) -> Bundle {
    Bundle::new(&format!("{RULES}redis = [\"{}\"]\ncontact_timeout = \"2s\"\n{more}\n", redis.url()))
}

fn run(bundle: &Bundle, name: &str) -> Gateway {
    Gateway::run_beside(bundle, name, true, |_| {})
}

fn three(bundle: &Bundle) -> [Gateway; 3] {
    ["a", "b", "c"].map(|name| run(bundle, name))
}

/// A token of a session, issued a minute ago.
fn token(bundle: &Bundle, session: &str) -> String {
    let issued = sealgate_tests::now() - 60;
    bundle.issuer.with("alice", json!({ "sid": session, "jti": session, "iat": issued, "nbf": issued }))
}

fn open(gateway: &Gateway, token: &str) -> Wire {
    let mut wire = gateway.wire();
    let reply = wire.upgrade("/ws/a", &format!("Authorization: Bearer {token}\r\n"));
    assert_eq!(reply.status, 101, "{reply:?}");
    wire
}

#[track_caller]
fn assert_open(wire: &mut Wire) {
    wire.send(frame(0x81, b"still here"));
    assert_eq!(wire.message().expect("the echo").payload, b"still here");
}

#[track_caller]
fn assert_closed(wire: &mut Wire, code: u16) {
    let close = wire.message().expect("a close frame").close();
    assert_eq!(close.0, code, "{close:?}");
}

fn ask(gateway: &Gateway, path: &str, token: &str) -> Reply {
    let begin = Instant::now();
    let reply = gateway.curl(path).token(token).send();
    assert!(begin.elapsed() < AT_ONCE, "{path} took {:?}", begin.elapsed());
    reply
}

#[track_caller]
fn until_refused(gateway: &Gateway, token: &str) {
    until("the revocation arrives", DEADLINE, || (ask(gateway, "/api", token).status == 401).then_some(()));
}

#[track_caller]
fn revoke(gateway: &Gateway, session: &str) {
    let begin = Instant::now();
    let (fine, answer) = gateway.sessions(&["revoke", "--session", session]);
    assert!(fine && answer["entered"] == true, "{answer}");
    assert!(begin.elapsed() < AT_ONCE, "revoking took {:?}", begin.elapsed());
}

fn metric(gateway: &Gateway, name: &str) -> f64 {
    gateway.metrics().sum(name, &[])
}

fn until_connected(gateway: &Gateway, connected: bool) {
    until("the connection to Redis is noticed", DEADLINE, || {
        (metric(gateway, "sealgate_shared_connected") == f64::from(u8::from(connected))).then_some(())
    });
}

#[test]
fn a_revocation_on_one_gateway_ends_the_session_on_all_and_touches_no_other() {
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let gateways = three(&bundle);
    let (alice, other) = (token(&bundle, "s1"), token(&bundle, "s2"));
    let mut revoked: Vec<_> = gateways.iter().map(|gateway| open(gateway, &alice)).collect();
    let mut others: Vec<_> = gateways.iter().map(|gateway| open(gateway, &other)).collect();

    let begin = Instant::now();
    revoke(&gateways[0], "s1");
    revoked.iter_mut().for_each(|wire| assert_closed(wire, 4410));
    eprintln!("closed on three gateways after {:?}", begin.elapsed());
    others.iter_mut().for_each(assert_open);
    for gateway in &gateways {
        assert_eq!(ask(gateway, "/api", &alice).status, 401);
        assert_eq!(ask(gateway, "/api", &other).status, 200);
        assert_eq!(metric(gateway, "sealgate_shared_connected"), 1.0);
        assert_eq!(metric(gateway, "sealgate_shared_refused_records_total"), 0.0);
    }
    assert_eq!(metric(&gateways[1], "sealgate_shared_lag_seconds_count"), 1.0);
    assert_eq!(metric(&gateways[0], "sealgate_shared_lag_seconds_count"), 0.0, "its own is no news");
    // One that comes later knows it before it is ready.
    let late = run(&bundle, "late");
    assert_eq!(ask(&late, "/api", &alice).status, 401);
    assert_eq!(ask(&late, "/api", &other).status, 200);
}

#[test]
fn a_redis_that_is_gone_stalls_nothing_and_an_empty_one_is_told_all() {
    let mut redis = Redis::start();
    let bundle = bundle(&redis, "");
    let [a, b, c] = three(&bundle);
    let [before, during, other] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    revoke(&a, "s1");
    until_refused(&b, &before);
    until_refused(&c, &before);
    let mut sockets = [open(&a, &during), open(&b, &during), open(&c, &during)];
    let mut untouched = open(&b, &other);

    redis.end();
    until_connected(&b, false);
    revoke(&a, "s2");
    assert_closed(&mut sockets[0], 4410);
    assert_eq!(ask(&a, "/api", &during).status, 401);
    // The others cannot know, and go on, as the policy says.
    assert_eq!(ask(&b, "/api", &during).status, 200);
    assert_eq!(ask(&b, "/api", &before).status, 401);
    assert_open(&mut sockets[1]);

    redis.run();
    for socket in &mut sockets[1..] {
        assert_closed(socket, 4410);
    }
    assert_open(&mut untouched);
    for gateway in [&a, &b, &c] {
        until_refused(gateway, &during);
        assert_eq!(ask(gateway, "/api", &before).status, 401);
        assert_eq!(ask(gateway, "/api", &other).status, 200);
    }
    // What was revoked before Redis lost everything is there again.
    let late = run(&bundle, "late");
    assert_eq!(ask(&late, "/api", &before).status, 401);
    assert_eq!(ask(&late, "/api", &during).status, 401);
    assert_eq!(ask(&late, "/api", &other).status, 200);
}

#[test]
fn a_redis_that_stands_still_stalls_nothing_and_is_caught_up_with() {
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let [a, b, _c] = three(&bundle);
    let [during, other] = ["s1", "s2"].map(|session| token(&bundle, session));
    let mut socket = open(&b, &during);
    redis.signal(Signal::STOP);
    revoke(&a, "s1");
    assert_eq!(ask(&a, "/api", &during).status, 401);
    until_connected(&b, false);
    until("contact counts as lost", DEADLINE, || {
        (metric(&b, "sealgate_shared_contact_lost") == 1.0).then_some(())
    });
    for path in ["/api", "/admin", "/open"] {
        assert_eq!(ask(&b, path, &other).status, 200, "on_loss is warn");
    }
    assert_open(&mut socket);
    redis.signal(Signal::CONT);
    assert_closed(&mut socket, 4410);
    until_refused(&b, &during);
    assert_eq!(ask(&b, "/api", &other).status, 200);
    until_connected(&b, true);
    until("contact is back", DEADLINE, || (metric(&b, "sealgate_shared_contact_lost") == 0.0).then_some(()));
}

#[test]
fn a_redis_that_comes_back_with_its_data_goes_on() {
    let mut redis = Redis::with(&["--save", "", "--appendonly", "yes", "--appendfsync", "always"], &[]);
    let bundle = bundle(&redis, "");
    let [a, b, c] = three(&bundle);
    let [one, two, three] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    revoke(&a, "s1");
    until_refused(&b, &one);
    redis.end();
    redis.run();
    revoke(&c, "s2");
    for gateway in [&a, &b, &c] {
        until_refused(gateway, &two);
        assert_eq!(ask(gateway, "/api", &one).status, 401);
        assert_eq!(ask(gateway, "/api", &three).status, 200);
    }
    // Nobody wrote again what was there.
    assert_eq!(redis.ask(&["XLEN", "{sealgate}:revocations"]).trim(), "2");
    assert_eq!(redis.ask(&["ZCARD", "{sealgate}:revoked"]).trim(), "2");
}

#[test]
fn lost_and_rewritten_news_are_noticed_while_connected() {
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let [a, b, c] = three(&bundle);
    let tokens: Vec<_> = (0..5).map(|number| token(&bundle, &format!("s{number}"))).collect();
    // While one stands still, news pass that it will never read.
    b.signal(Signal::STOP);
    for number in 0..4 {
        revoke(&a, &format!("s{number}"));
    }
    until_refused(&c, &tokens[3]);
    redis.ask(&["XDEL", "{sealgate}:revocations", "2-0", "3-0"]);
    b.signal(Signal::CONT);
    for token in &tokens[..4] {
        until_refused(&b, token);
    }
    let gaps = |gateway: &Gateway, cause| {
        gateway.metrics().sum("sealgate_shared_comparisons_total", &[("cause", cause)])
    };
    assert!(gaps(&b, "gap") >= 1.0);
    assert_eq!(gaps(&c, "gap"), 0.0);

    // All is erased under their feet: the log counts from 1 again, and the live set is written anew.
    redis.ask(&["FLUSHALL"]);
    for gateway in [&a, &b, &c] {
        until("the erasure is noticed", DEADLINE, || (gaps(gateway, "rewritten") >= 1.0).then_some(()));
    }
    revoke(&b, "s4");
    for gateway in [&a, &c] {
        until_refused(gateway, &tokens[4]);
    }
    let late = run(&bundle, "late");
    for token in &tokens {
        assert_eq!(ask(&late, "/api", token).status, 401);
    }
    // Somebody else's writing ends nobody's session, and is told.
    redis.ask(&["ZADD", "{sealgate}:revoked", "9999999999", "{\"kind\":\"everybody\"}"]);
    let later = run(&bundle, "later");
    assert_eq!(metric(&later, "sealgate_shared_refused_records_total"), 1.0);
    assert_eq!(ask(&later, "/api", &token(&bundle, "another")).status, 200);
}

#[test]
fn without_contact_the_policy_says_what_goes_on() {
    for (on_loss, api, admin) in [("fail-closed", 503, 503), ("no-new-privileged", 200, 503)] {
        let mut redis = Redis::start();
        let bundle = bundle(&redis, &format!("on_loss = \"{on_loss}\""));
        let gateway = run(&bundle, "a");
        let token = token(&bundle, "s1");
        let mut socket = open(&gateway, &token);
        assert_eq!(
            (ask(&gateway, "/api", &token).status, ask(&gateway, "/admin", &token).status),
            (200, 200)
        );
        redis.end();
        until("contact is lost", DEADLINE, || (ask(&gateway, "/admin", &token).status == 503).then_some(()));
        assert_eq!(ask(&gateway, "/api", &token).status, api, "{on_loss}");
        let refused = ask(&gateway, "/admin", &token);
        assert_eq!(refused.status, admin, "{on_loss}");
        assert!(refused.problem(503).ends_with(":contact-lost"), "{refused:?}");
        assert!(refused.header("retry-after").is_some(), "{refused:?}");
        // What wants no token is nobody's session.
        assert_eq!(gateway.curl("/open").send().status, 200, "{on_loss}");
        if on_loss == "fail-closed" {
            assert_closed(&mut socket, 1013);
            let mut refused = gateway.wire();
            assert_eq!(refused.upgrade("/ws/a", &format!("Authorization: Bearer {token}\r\n")).status, 503);
        } else {
            assert_open(&mut socket);
        }
        assert_eq!(gateway.admin("/readyz").status, if on_loss == "fail-closed" { 503 } else { 200 });
        redis.run();
        until("contact is back", DEADLINE, || (ask(&gateway, "/admin", &token).status == 200).then_some(()));
        assert_eq!(gateway.admin("/readyz").status, 200);
        drop(open(&gateway, &token));
    }
}

#[test]
fn a_gateway_that_never_heard_the_others_is_not_ready() {
    let mut redis = Redis::start();
    let bundle = bundle(&redis, "on_loss = \"fail-closed\"");
    let token = token(&bundle, "s1");
    redis.end();
    let gateway = Gateway::run_beside(&bundle, "a", false, |_| {});
    assert_eq!(gateway.admin("/readyz").status, 503);
    assert_eq!(ask(&gateway, "/api", &token).status, 503);
    redis.run();
    until("it is ready", DEADLINE, || (gateway.admin("/readyz").status == 200).then_some(()));
    assert_eq!(ask(&gateway, "/api", &token).status, 200);
}

#[test]
fn redis_is_trusted_by_its_certificate_and_trusts_by_password() {
    // Its key pair is the gateways' own: the names fit.
    let pki_of = Bundle::new("");
    let certs = pki_of.state().join("certs");
    let path = |name: &str| certs.join(name).to_str().expect("UTF-8").to_owned();
    let (ca, chain, key) = (path("ca.pem"), path("server.pem"), path("server.key"));
    let redis = Redis::with(
        &[
            "--save",
            "",
            "--port",
            "0",
            "--tls-port",
            "PORT",
            "--tls-cert-file",
            &chain,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
            "--tls-auth-clients",
            "no",
            "--requirepass",
            "s3cret-of-redis",
        ],
        &["--tls", "--cacert", &ca, "-a", "s3cret-of-redis"],
    );
    let cases = [
        ("right", ca.as_str(), "s3cret-of-redis", true),
        ("wrong-password", ca.as_str(), "wr0ng-secret", false),
        // Signed by an authority that this policy does not name.
        ("wrong-ca", "other", "s3cret-of-redis", false),
    ];
    for (name, trusted, password, fine) in cases {
        let bundle = Bundle::new(RULES);
        let trusted = if trusted == "other" {
            bundle.state().join("certs/ca.pem").to_str().expect("UTF-8").to_owned()
        } else {
            trusted.to_owned()
        };
        bundle.write(&format!(
            "{RULES}redis = [\"rediss://127.0.0.1:{}\"]\nca = \"file:{trusted}\"\npassword = \"env:REDIS_PASSWORD\"\n\
             contact_timeout = \"2s\"\n",
            redis.port()
        ));
        let mut gateway = Gateway::run_beside(&bundle, name, true, |command| {
            command.env("REDIS_PASSWORD", password);
        });
        assert_eq!(metric(&gateway, "sealgate_shared_connected") == 1.0, fine, "{name}");
        let said = gateway.process().stderr() + &gateway.process().stdout();
        assert!(fine || said.contains("no connection to other gateways"), "{name}: {said}");
        assert!(!said.contains(password), "{name}");
    }
}
