//! Metrics: what a scraper reads, and what must never stand there.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;

use sealgate_tests::{Bundle, Client, DEADLINE, Driver, Gateway, Metrics, Open, until};

const RULES: &str = r#"
[[route]]
name = "mine"
path = "/mine/**"
methods = ["GET"]
upstream = "backend"
auth = "required"
query = {}

[[route]]
name = "misbehaving"
path = "/drop"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[websocket]]
name = "socket"
path = "/ws/{variant}"
upstream = "backend"
auth = "required"
origins = ["*"]
max_message = "1KiB"
inspect = "none"
"#;

/// Label names whose values come from closed sets.
const LABELS: [&str; 17] = [
    "by",
    "code",
    "direction",
    "endpoint",
    "hash",
    "issuer",
    "key",
    "le",
    "mode",
    "name",
    "outcome",
    "rate",
    "reason",
    "result",
    "route",
    "upstream",
    "version",
];

fn series(metrics: &Metrics) -> BTreeSet<String> {
    metrics.samples.iter().map(|sample| format!("{}{:?}", sample.name, sample.labels)).collect()
}

#[test]
fn metrics_are_named_by_the_rules_and_count_what_happened() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice-the-subject");
    for _ in 0..3 {
        assert_eq!(gateway.curl("/mine/secret-path?q=secret-query").token(&token).send().status, 200);
    }
    gateway.curl("/mine/x").send().problem(401);
    gateway.curl("/nowhere").send().problem(404);
    gateway.curl("/drop").send().problem(502);
    let mut driver = Driver::start(Client::Python, gateway.ca());
    driver.open("a", &gateway.ws("/ws/a"), &Open::token(&token));
    driver.echo("a", "secret-message");
    driver.text("a", &"x".repeat(2000));
    driver.expect_close("a", 1009);

    let reply = gateway.admin("/metrics");
    assert_eq!(reply.status, 200);
    assert!(
        reply.header("content-type").is_some_and(|kind| kind.starts_with("text/plain; version=0.0.4")),
        "{reply:?}"
    );
    let metrics = until("everything is counted", DEADLINE, || {
        let metrics = gateway.metrics();
        (metrics.sum("sealgate_websocket_open", &[]) == 0.0).then_some(metrics)
    });
    let count = |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels);
    assert_eq!(count("sealgate_http_requests_total", &[("route", "mine"), ("code", "2xx")]), 3.0);
    assert_eq!(count("sealgate_http_requests_total", &[("route", "mine"), ("code", "4xx")]), 1.0);
    assert_eq!(count("sealgate_http_request_duration_seconds_count", &[("route", "mine")]), 4.0);
    assert_eq!(count("sealgate_denials_total", &[("reason", "token-missing")]), 1.0);
    assert_eq!(count("sealgate_denials_total", &[("reason", "no-route")]), 1.0);
    assert_eq!(count("sealgate_upstream_errors_total", &[("upstream", "backend")]), 1.0);
    let one = |direction: &str| {
        count("sealgate_websocket_messages_total", &[("route", "socket"), ("direction", direction)])
    };
    assert_eq!((one("to-upstream"), one("to-client")), (1.0, 1.0));
    assert_eq!(count("sealgate_websocket_refused_messages_total", &[("reason", "message-too-big")]), 1.0);
    assert_eq!(count("sealgate_websocket_closes_total", &[("code", "1009")]), 1.0);
    assert!(count("sealgate_tls_handshakes_total", &[]) >= 7.0);
    assert_eq!(count("sealgate_policy_last_reload_successful", &[]), 1.0);
    for name in [
        "sealgate_build_info",
        "sealgate_policy_info",
        "sealgate_policy_generation",
        "sealgate_policy_last_reload_success_timestamp_seconds",
        "sealgate_certificate_expiry_timestamp_seconds",
        "sealgate_jwks_age_seconds",
        "sealgate_connections_open",
        "process_resident_memory_bytes",
    ] {
        assert!(metrics.has(name), "{name} is missing");
    }

    for (name, kind) in &metrics.types {
        assert!(name.starts_with("sealgate_") || name.starts_with("process_"), "{name}");
        assert!(metrics.help.contains(name), "{name} has no help");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        assert!(
            !["_ms", "_millis", "_kib", "_percent"].iter().any(|unit| name.contains(unit)),
            "{name}: base units"
        );
    }
    let labels: BTreeSet<&str> =
        metrics.samples.iter().flat_map(|sample| sample.labels.keys().map(String::as_str)).collect();
    assert!(labels.iter().all(|label| LABELS.contains(label)), "{labels:?}");
    let text = gateway.admin("/metrics").body;
    for secret in [token.as_str(), "alice-the-subject", "session-of", "secret-", "127.0.0.1", "key-1"] {
        assert!(!text.contains(secret), "{secret} stands in the metrics");
    }
}

#[test]
fn what_strangers_send_makes_no_new_series() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    // Each kind once, so that its series is there.
    let strange = |n: u32| {
        let _ = gateway.curl(&format!("/strange-{n}")).send();
        let _ = gateway.curl(&format!("/mine/{n}")).token(&token).method(&format!("M{n}")).send();
        let _ = gateway.curl("/mine/x").http1().header(&format!("Host: h{n}.test")).token(&token).send();
        let mut driver = Driver::start(Client::Python, gateway.ca());
        let subject = bundle.issuer.token(&format!("subject-{n}"));
        driver.open("a", &gateway.ws(&format!("/ws/{n}")), &Open::token(&subject));
        driver.close("a", 4000 + n as u16, "mine alone");
        driver.next("a");
    };
    strange(100);
    let before = series(&gateway.metrics());
    for n in 101..111 {
        strange(n);
    }
    let after = series(&gateway.metrics());
    let fresh: Vec<_> = after.difference(&before).collect();
    assert!(fresh.is_empty(), "{fresh:?}");
}

#[test]
fn the_private_listener_answers_three_paths_and_the_public_one_none_of_them() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for path in ["/metrics", "/healthz", "/readyz"] {
        assert_eq!(gateway.admin(path).status, 200, "{path}");
        gateway.curl(path).send().problem(404);
    }
    for path in ["/", "/metrics/", "/reload", "/debug/pprof", "/..", "/metrics/../x"] {
        assert_eq!(gateway.admin(path).status, 404, "{path}");
    }
    let mut stream = TcpStream::connect(gateway.admin_address()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    // An upstream that is gone makes neither of the two fail: the gateway lives, and other routes work.
    bundle.upstream.stop();
    assert_eq!(gateway.admin("/healthz").status, 200);
}
