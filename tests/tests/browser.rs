//! Chromium, through HTTP/1.1 and HTTP/2: what a page sees of it all.

use sealgate_tests::{Bundle, Client, DEADLINE, Driver, Gateway, Open, Signal, until};
use serde_json::{Value, json};

const RULES: &str = r#"
[connections]
http2 = HTTP2

[[route]]
name = "page"
path = "/page"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "icon"
path = "/favicon.ico"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[ciphertext]]
name = "sealed"
pointer = "/conversation"
prefix = "e2e:"
payload = ["/sealed"]

[[websocket]]
name = "stream"
path = "/ws/{variant}"
upstream = "backend"
origins = ["https://localhost:PORT"]
require_origin = true
subprotocols = ["im.v1.json"]
renew = { type = "auth.renew", token_pointer = "/token" }
[[websocket.message]]
type = "say"
direction = "both"
ciphertext = "sealed"
[[websocket.message]]
type = "note"
direction = "both"
"#;

const NOTE: &str = r#"{"type":"note"}"#;

/// A gateway whose policy knows the port that pages come from.
fn start(http2: bool) -> (Bundle, Gateway, String) {
    let rules = RULES.replace("HTTP2", &http2.to_string());
    let bundle = Bundle::new(&rules.replace("PORT", "1"));
    bundle.upstream.publish("/page", "<!doctype html><title>A page</title>");
    let gateway = Gateway::run(&bundle);
    let rules = rules.replace("PORT", &gateway.port().to_string());
    bundle.write(&rules);
    let (reloaded, said) = gateway.reload();
    assert!(reloaded, "{said}");
    (bundle, gateway, rules)
}

fn with(token: &str) -> Open {
    Open::bare().subprotocol("im.v1.json").subprotocol(&format!("sealgate.bearer.{token}"))
}

fn denied(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metrics().sum("sealgate_denials_total", &[("reason", reason)])
}

#[test]
fn a_page_opens_sockets_and_learns_why_they_close() {
    for http2 in [false, true] {
        let (bundle, mut gateway, rules) = start(http2);
        let url = gateway.ws("/ws/a");
        let token = bundle.issuer.token("alice");
        let mut browser = Driver::start(Client::Chromium, &bundle.pki.path("server.pem"));
        assert_eq!(browser.goto(&gateway.url("/page")), 200);

        let open = browser.open("a", &url, &with(&token));
        assert_eq!((&open["subprotocol"], &open["extensions"]), (&json!("im.v1.json"), &json!(null)));
        browser.echo("a", NOTE);
        let answers = |code| {
            gateway.metrics().sum("sealgate_http_requests_total", &[("route", "stream"), ("code", code)])
        };
        // 200 to an extended CONNECT, 101 to an upgrade: which way the browser went.
        let went = if http2 { [0.0, 1.0] } else { [1.0, 0.0] };
        until("the upgrade is accounted for", DEADLINE, || {
            (["1xx", "2xx"].map(answers) == went).then_some(())
        });
        let seen = bundle.upstream.last();
        assert_eq!(seen.header("x-sealgate-subject"), Some("alice"), "{seen:?}");
        assert!(!format!("{seen:?}").contains(&token), "the upstream got the token: {seen:?}");

        // A closed door looks the same to a page, whatever the reason.
        for (id, open, reason) in [
            ("none", Open::bare().subprotocol("im.v1.json"), "token-missing"),
            ("bad", with("bad"), "token-invalid"),
        ] {
            assert_eq!(browser.attempt(id, &url, &open)["code"], 1006, "{id}");
            assert_eq!(denied(&gateway, reason), 1.0, "{id}");
        }

        // Plaintext in an encrypted conversation, over a browser that always offers compression.
        let sealed = r#"{"type":"say","conversation":"e2e:a","sealed":"AwogQUJDREVGR0hJSktMTU5PUFFSU1RV"}"#;
        browser.open("plain", &url, &with(&token));
        browser.echo("plain", sealed);
        browser.text("plain", r#"{"type":"say","conversation":"e2e:a","sealed":"hello, Bob"}"#);
        let reason = browser.expect_close("plain", 4422);
        assert!(reason.starts_with("plaintext-refused"), "{reason}");

        // The token runs out.
        let short = bundle.issuer.with("alice", json!({ "exp": now() + 2 }));
        browser.open("short", &url, &with(&short));
        let reason = browser.expect_close("short", 4401);
        assert!(reason.starts_with("token-expired"), "{reason}");

        // It is renewed in time, and then revoked, from outside.
        let first = bundle.issuer.with("alice", json!({ "jti": "first", "exp": now() + 60 }));
        let later = now() + 600;
        let second = bundle.issuer.with("alice", json!({ "jti": "second", "exp": later }));
        browser.open("renewed", &url, &with(&first));
        browser.text("renewed", &json!({ "type": "auth.renew", "token": second }).to_string());
        let told = browser.next("renewed");
        let answer: Value = serde_json::from_str(told["data"].as_str().unwrap_or_default()).expect("JSON");
        assert_eq!(answer, json!({ "type": "auth.renew.ok", "expires_at": later }));
        browser.echo("renewed", NOTE);
        let (fine, answer) = gateway.sessions(&["revoke", "--token-id", "second"]);
        assert!(fine && answer["sockets"] == 1, "{answer}");
        assert!(browser.expect_close("renewed", 4410).starts_with("revoked: "));
        browser.echo("a", NOTE);

        // A reload drops nothing that the new rules allow, and tells what they do not.
        browser.open("b", &url, &with(&token));
        bundle.write(&format!("{rules}\n# the same\n"));
        assert!(gateway.reload().0);
        browser.echo("b", NOTE);
        browser.echo("a", NOTE);
        bundle.write(&rules.replace("https://localhost", "https://elsewhere"));
        assert!(gateway.reload().0);
        for id in ["a", "b"] {
            let reason = browser.expect_close(id, 1008);
            assert!(reason.starts_with("policy-changed"), "{reason}");
        }
        bundle.write(&rules);
        assert!(gateway.reload().0);

        // The page closes, and the page goes away.
        browser.open("c", &url, &with(&token));
        browser.close("c", 4000, "done");
        assert_eq!(browser.expect_close("c", 4000), "done");
        browser.open("d", &url, &with(&token));
        assert_eq!(browser.goto(&gateway.url("/page")), 200);
        until("the upstream is told", DEADLINE, || {
            let frames = bundle.upstream.frames();
            let last = frames.iter().rfind(|frame| frame.opcode == 8)?.close();
            (last.0 == 1001).then_some(())
        });

        // A page from elsewhere: the same server, another origin.
        let elsewhere = format!("https://127.0.0.1:{}/page", gateway.port());
        assert_eq!(browser.goto(&elsewhere), 200);
        let before = bundle.upstream.count("/ws");
        assert_eq!(browser.attempt("evil", &url, &with(&token))["code"], 1006);
        assert_eq!(denied(&gateway, "origin-not-allowed"), 1.0);
        assert_eq!(bundle.upstream.count("/ws"), before);

        // The gateway restarts.
        assert_eq!(browser.goto(&gateway.url("/page")), 200);
        browser.open("e", &url, &with(&token));
        browser.echo("e", NOTE);
        gateway.signal(Signal::TERM);
        let reason = browser.expect_close("e", 1012);
        assert!(reason.starts_with("restarting"), "{reason}");
        assert_eq!(gateway.wait(DEADLINE).code(), Some(0));
    }
}

fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.expect("after 1970").as_secs()
}
