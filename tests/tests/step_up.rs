//! Step-up (RFC 9470): what wants a stronger or fresher login gets a challenge that says which, or 4412 on a socket.

use sealgate_tests::{Bundle, Gateway, Reply, frame, now};
use serde_json::{Value, json};

const RULES: &str = r#"
[[role]]
name = "administrator"
require_amr = ["otp", "hwk"]

[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"

[[route]]
name = "strong"
path = "/strong"
methods = ["GET"]
upstream = "backend"
step_up = { acr = ["phr", "mfa"] }

[[route]]
name = "fresh"
path = "/fresh"
methods = ["GET"]
upstream = "backend"
step_up = { amr = ["otp"], max_age = "5m" }

[[route]]
name = "trial"
path = "/trial"
methods = ["GET"]
upstream = "backend"
step_up = { acr = ["mfa"] }
mode = "shadow"

[[websocket]]
name = "strong-socket"
path = "/ws/strong"
upstream = "backend"
step_up = { acr = ["mfa"] }

[[websocket]]
name = "socket"
path = "/ws/echo"
upstream = "backend"

[[websocket.message]]
type = "say"
direction = "to-upstream"

[[websocket.message]]
type = "erase"
direction = "to-upstream"
step_up = { max_age = "5m" }

[[websocket.message]]
type = "rename"
direction = "to-upstream"
step_up = { amr = ["otp"] }
on_refusal = "answer"
"#;

#[track_caller]
fn challenged(reply: &Reply, wanted: &str) {
    assert_eq!(reply.problem(401), "urn:sealgate:problem:step-up-needed");
    let challenge = reply.header("www-authenticate").expect("a challenge");
    assert!(
        challenge.starts_with("Bearer ") && challenge.contains("error=\"insufficient_user_authentication\"")
    );
    assert!(challenge.ends_with(wanted), "{challenge}");
}

#[test]
fn s3_a_weak_or_old_login_is_sent_to_log_in_again() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token = |claims: Value| bundle.issuer.with("alice", claims);
    let get = |path: &str, claims: Value| gateway.curl(path).http1().token(&token(claims)).send();
    let fresh = now() - 10;

    for acr in ["mfa", "phr"] {
        assert_eq!(get("/strong", json!({ "acr": acr })).status, 200);
    }
    assert_eq!(get("/fresh", json!({ "amr": ["pwd", "otp"], "auth_time": fresh })).status, 200);
    assert_eq!(get("/mine", json!({})).status, 200);
    assert_eq!(get("/trial", json!({})).status, 200, "in shadow mode it only counts");
    let passed = bundle.upstream.seen().len();

    for claims in [json!({}), json!({ "acr": "pwd" }), json!({ "acr": "MFA" }), json!({ "acr": "phr mfa" })] {
        challenged(&get("/strong", claims), ", acr_values=\"phr mfa\"");
    }
    for claims in [
        json!({ "amr": ["otp"] }),
        json!({ "amr": ["pwd"], "auth_time": fresh }),
        json!({ "amr": ["pwd", "otp"], "auth_time": now() - 302 }),
    ] {
        challenged(&get("/fresh", claims), ", max_age=\"300\"");
    }
    let weak =
        gateway.wire().upgrade("/ws/strong", &format!("Authorization: Bearer {}\r\n", token(json!({}))));
    challenged(&weak, ", acr_values=\"mfa\"");
    assert_eq!(bundle.upstream.seen().len(), passed, "the backend sees none of that");
    let strong = token(json!({ "acr": "mfa" }));
    let reply = gateway.wire().upgrade("/ws/strong", &format!("Authorization: Bearer {strong}\r\n"));
    assert_eq!(reply.status, 101);
}

#[test]
fn s3_a_role_that_wants_a_second_factor_wants_it_everywhere() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let token =
        |amr: &[&str]| bundle.issuer.with("root", json!({ "roles": ["user", "administrator"], "amr": amr }));
    for amr in [&["pwd", "otp"][..], &["hwk"]] {
        assert_eq!(gateway.curl("/mine").token(&token(amr)).send().status, 200, "{amr:?}");
    }
    for amr in [&["pwd"][..], &[], &["OTP"]] {
        challenged(&gateway.curl("/mine").http1().token(&token(amr)).send(), "is needed\"");
        let reply = gateway.wire().upgrade("/ws/echo", &format!("Authorization: Bearer {}\r\n", token(amr)));
        challenged(&reply, "is needed\"");
    }
    assert_eq!(bundle.upstream.seen().len(), 2);
}

#[test]
fn s3_a_message_that_wants_more_closes_with_4412_or_is_answered() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let open = |claims: Value| {
        let token = bundle.issuer.with("alice", claims);
        let mut wire = gateway.wire();
        assert_eq!(wire.upgrade("/ws/echo", &format!("Authorization: Bearer {token}\r\n")).status, 101);
        wire
    };
    let say = |text: &str| frame(0x81, format!("{{\"type\":\"{text}\"}}").as_bytes());

    let mut good = open(json!({ "auth_time": now() - 10, "amr": ["otp"] }));
    for kind in ["erase", "rename", "say"] {
        good.send(say(kind));
        let echo = good.message().expect("an echo");
        assert_eq!(echo.payload, format!("{{\"type\":\"{kind}\"}}").as_bytes());
    }
    let mut weak = open(json!({ "auth_time": now() - 400 }));
    weak.send(say("rename"));
    let answer = weak.message().expect("an answer");
    assert!(String::from_utf8_lossy(&answer.payload).contains("step-up-needed"), "{answer:?}");
    weak.send(say("say"));
    assert_eq!(weak.message().expect("an echo").payload, b"{\"type\":\"say\"}", "the socket stays open");
    weak.send(say("erase"));
    let close = weak.message().expect("a close");
    assert!(close.close().0 == 4412 && close.close().1.starts_with("step-up-needed"), "{close:?}");
    let sent: Vec<_> =
        bundle.upstream.frames().iter().map(|it| String::from_utf8_lossy(&it.payload).into_owned()).collect();
    let count = |kind: &str| sent.iter().filter(|text| text.contains(kind)).count();
    assert_eq!((count("erase"), count("rename")), (1, 1), "{sent:?}");
}
