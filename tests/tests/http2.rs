//! WebSockets over HTTP/2 (RFC 8441): judged as those over HTTP/1.1, and good neighbours on their connection.
//!
//! The tests that run every client (`Client::ALL`) run over HTTP/2 too; here is what only HTTP/2 can do.

use std::fs;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, Client, DEADLINE, Driver, Gateway, Open, Signal, until};

const RULES: &str = r#"
[connections]
idle_timeout = "1s"

[[websocket]]
name = "plain"
path = "/ws/{variant}"
upstream = "backend"
origins = ["https://chat.example.test"]
inspect = "none"
max_frame = "64KiB"
write_timeout = "2s"

[[websocket]]
name = "old"
path = "/ws-old"
upstream = "backend"
origins = ["*"]
inspect = "none"
http2 = false

[[route]]
name = "page"
path = "/page"
methods = ["GET"]
upstream = "backend"
"#;

fn start() -> (Bundle, Gateway, Driver) {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let driver = Driver::start(Client::Http2, gateway.ca());
    (bundle, gateway, driver)
}

fn problem(event: &serde_json::Value, kind: &str) {
    let body = event["body"].as_str().unwrap_or_default();
    assert!(body.contains(&format!("urn:sealgate:problem:{kind}")), "{event}");
}

#[test]
fn sockets_and_requests_share_a_connection_under_the_rules_of_each() {
    let (bundle, gateway, mut driver) = start();
    let token = bundle.issuer.token("alice");
    let open = || Open::token(&token).origin("https://chat.example.test");
    let told = driver.open("a", &gateway.ws("/ws/a"), &open());
    let headers = told["headers"].to_string();
    assert!(headers.contains("x-request-id") && !headers.contains("sec-websocket-accept"), "{told}");
    driver.open("b", &gateway.ws("/ws/b"), &open());
    driver.echo("a", "one");
    driver.echo("b", "two");
    assert_eq!(driver.request("page", &gateway.url("/page"), &token)["status"], 200);
    assert_eq!(driver.request("nowhere", &gateway.url("/nowhere"), &token)["status"], 404);

    problem(&driver.refused("anonymous", &gateway.ws("/ws/a"), &Open::bare(), 401), "token-missing");
    let evil = Open::token(&token).origin("https://evil.test");
    problem(&driver.refused("evil", &gateway.ws("/ws/a"), &evil, 403), "origin-not-allowed");
    problem(&driver.refused("page-ws", &gateway.ws("/page"), &open(), 404), "no-websocket");
    problem(&driver.refused("old", &gateway.ws("/ws-old"), &open(), 501), "protocol-not-offered");
    let other = open().protocol("connect-udp");
    problem(&driver.refused("other", &gateway.ws("/ws/a"), &other, 501), "protocol-not-offered");
    let version = open().header("sec-websocket-version", "8");
    assert_eq!(driver.attempt("version", &gateway.ws("/ws/a"), &version)["status"], 400);

    // What the upstream gets is an upgrade of our own, whatever the client's looked like.
    let seen = bundle.upstream.seen();
    let upgrade = seen.iter().find(|seen| seen.target == "/ws/a").expect("the upgrade");
    assert_eq!(upgrade.method, "GET");
    assert_eq!(upgrade.header("upgrade"), Some("websocket"));
    assert_eq!(upgrade.header("host"), Some(gateway.authority()));
    assert_eq!(upgrade.header("x-sealgate-subject"), Some("alice"));
    assert_eq!(upgrade.header("authorization"), None);
    assert_eq!(seen.iter().filter(|seen| seen.target.starts_with("/ws")).count(), 2, "{seen:?}");
    let metrics = gateway.metrics();
    assert_eq!(metrics.sum("sealgate_connections_total", &[]), 1.0, "all on one connection");
    assert_eq!(metrics.sum("sealgate_websocket_open", &[("route", "plain")]), 2.0);
    assert!(metrics.sum("sealgate_denials_total", &[("reason", "protocol-not-offered")]) >= 2.0);

    // An open socket keeps its connection from being idle, and both go on.
    std::thread::sleep(Duration::from_millis(2500));
    driver.echo("a", "still here");
    driver.close("a", 1000, "done");
    driver.expect_close("a", 1000);
    driver.echo("b", "I stay");
    driver.close("b", 1000, "done");
    driver.expect_close("b", 1000);
    until("the gauge falls", DEADLINE, || {
        (gateway.metrics().sum("sealgate_websocket_open", &[]) == 0.0).then_some(())
    });
    // Without one the connection is idle, and ends.
    until("the connection ends", DEADLINE, || {
        (gateway.metrics().sum("sealgate_connections_open", &[]) == 0.0).then_some(())
    });
}

#[test]
fn a_stream_that_breaks_off_is_told_upstream_and_harms_no_other() {
    let (bundle, gateway, mut driver) = start();
    let token = bundle.issuer.token("alice");
    driver.open("stays", &gateway.ws("/ws/a"), &Open::token(&token));
    for (id, text) in [("reset", "before the reset"), ("half", "before the end")] {
        driver.open(id, &gateway.ws("/ws/a"), &Open::token(&token));
        driver.echo(id, text);
        if id == "reset" {
            driver.reset(id)
        } else {
            driver.half_close(id)
        }
        until("the upstream is told", DEADLINE, || {
            let frames = bundle.upstream.frames();
            let close = frames.iter().rfind(|frame| frame.opcode == 8)?.close();
            (frames.iter().filter(|frame| frame.opcode == 8).count() == if id == "reset" { 1 } else { 2 })
                .then(|| assert_eq!(close, (1001, "client-gone".to_owned())))
        });
        driver.echo("stays", "unharmed");
    }
    until("the gauge falls", DEADLINE, || {
        (gateway.metrics().sum("sealgate_websocket_open", &[]) == 1.0).then_some(())
    });
}

#[test]
fn a_stream_that_reads_nothing_stalls_itself_only_and_pins_little() {
    let (bundle, mut gateway, mut driver) = start();
    let token = bundle.issuer.token("alice");
    driver.open("stays", &gateway.ws("/ws/a"), &Open::token(&token));
    driver.echo("stays", "hello");
    let idle = gateway.process().memory();
    let text = "x".repeat(30_000);
    for n in 0..8 {
        let id = format!("stalled-{n}");
        driver.open(&id, &gateway.ws("/ws/a"), &Open::token(&token));
        driver.stall(&id);
        for _ in 0..40 {
            driver.text(&id, &text);
        }
        driver.echo("stays", "unharmed");
    }
    let start = Instant::now();
    until("slow readers are closed", DEADLINE, || {
        driver.echo("stays", "unharmed");
        (gateway.metrics().sum("sealgate_websocket_open", &[]) == 1.0).then_some(())
    });
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let grown = gateway.process().memory().saturating_sub(idle);
    assert!(grown < 32 << 20, "{} KiB more than before", grown >> 10);
}

#[test]
fn a_drain_tells_every_stream_and_the_connection() {
    let (bundle, mut gateway, mut driver) = start();
    let token = bundle.issuer.token("alice");
    for id in ["a", "b", "c"] {
        driver.open(id, &gateway.ws("/ws/a"), &Open::token(&token));
        driver.echo(id, "hello");
    }
    gateway.signal(Signal::TERM);
    for id in ["a", "b", "c"] {
        let reason = driver.expect_close(id, 1012);
        assert!(reason.starts_with("restarting"), "{reason}");
    }
    assert_eq!(driver.next("")["event"], "goaway");
    assert_eq!(gateway.wait(DEADLINE).code(), Some(0));
}

#[test]
fn a_policy_may_take_http_2_from_open_sockets_and_from_new_connections() {
    let (bundle, gateway, mut driver) = start();
    let token = bundle.issuer.token("alice");
    driver.open("a", &gateway.ws("/ws/a"), &Open::token(&token));
    let mut old = Driver::start(Client::Python, gateway.ca());
    old.open("old", &gateway.ws("/ws/a"), &Open::token(&token));
    let policy = fs::read_to_string(bundle.policy().join("policy.toml")).expect("the policy");
    let without = policy.replace("name = \"plain\"", "name = \"plain\"\nhttp2 = false");
    bundle.write_file("policy.toml", &without);
    assert!(gateway.reload().0);
    let reason = driver.expect_close("a", 1008);
    assert!(reason.starts_with("policy-changed"), "{reason}");
    old.echo("old", "over HTTP/1.1 nothing changed");
    // Where no WebSocket is offered over HTTP/2, that is told from the beginning (RFC 8441 §3).
    let mut fresh = Driver::start(Client::Http2, gateway.ca());
    let told = fresh.attempt("a", &gateway.ws("/ws/a"), &Open::token(&token));
    assert!(told["error"].as_str().is_some_and(|error| error.contains("not offered")), "{told}");
}
