//! Revocations whose effect outlives the gateway, and those of a key: what is revoked stays so, and nothing else is touched.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use sealgate_tests::{Bundle, DEADLINE, Gateway, Signal, TokenIssuer, binary, until};
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
"#;

/// A token of a session, issued a minute ago.
fn token(issuer: &TokenIssuer, session: &str) -> String {
    let issued = sealgate_tests::now() - 60;
    issuer.with(session, json!({ "sid": session, "jti": session, "iat": issued, "nbf": issued }))
}

fn status(gateway: &Gateway, token: &str) -> u16 {
    gateway.curl("/api").token(token).send().status
}

#[track_caller]
fn revoke(gateway: &Gateway, arguments: &[&str]) {
    let (fine, answer) = gateway.sessions(&[&["revoke"], arguments].concat());
    assert!(fine && answer["entered"] == true && answer["kept"] == true, "{answer}");
}

#[test]
fn what_was_revoked_stays_so_over_a_restart_and_kill_9() {
    let bundle = Bundle::new(RULES);
    let [by_session, by_subject, by_token, short, good] =
        ["s1", "s2", "s3", "s4", "s5"].map(|session| token(&bundle.issuer, session));
    let gone = [&by_session, &by_subject, &by_token];
    let mut gateway = Gateway::run(&bundle);
    let mut sockets = gone.map(|token| gateway.open("/ws/a", token));
    revoke(&gateway, &["--session", "s1"]);
    revoke(&gateway, &["--subject", "s2"]);
    revoke(&gateway, &["--token-id", "s3"]);
    revoke(&gateway, &["--session", "s4", "--ttl", "1s"]);
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.close_code(), 4410));
    let log = bundle.state().join("revocations.log");
    assert_eq!(fs::metadata(&log).expect("the log").permissions().mode() & 0o7777, 0o600);
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL] {
        gateway.signal(signal);
        gateway.wait(DEADLINE);
        drop(gateway);
        gateway = Gateway::run(&bundle);
        for token in gone {
            assert_eq!(status(&gateway, token), 401, "after {signal:?}");
            let reply = gateway.wire().upgrade("/ws/a", &format!("Authorization: Bearer {token}\r\n"));
            assert_eq!(reply.status, 401, "after {signal:?}");
        }
        assert_eq!(status(&gateway, &good), 200);
        gateway.open("/ws/a", &good).assert_echoes();
    }
    until("its second has passed", DEADLINE, || (status(&gateway, &short) == 200).then_some(()));
    gateway.signal(Signal::KILL);
    gateway.wait(DEADLINE);
    drop(gateway);
    gateway = Gateway::run(&bundle);
    // What has expired is not on disk either.
    assert_eq!(fs::read_to_string(&log).expect("the log").lines().count(), 4);
    let fresh =
        bundle.issuer.with("s2", json!({ "sid": "s6", "iat": sealgate_tests::now() + 1, "nbf": null }));
    let later = bundle.issuer.with("s2", json!({ "sid": "s6" }));
    assert!([status(&gateway, &fresh), status(&gateway, &later)].contains(&200), "a new login is let in");
}

#[test]
fn a_damaged_log_keeps_the_gateway_from_starting_and_a_torn_end_does_not() {
    let bundle = Bundle::new(RULES);
    let revoked = token(&bundle.issuer, "s1");
    let mut gateway = Gateway::run(&bundle);
    revoke(&gateway, &["--session", "s1"]);
    revoke(&gateway, &["--session", "s2"]);
    gateway.signal(Signal::KILL);
    gateway.wait(DEADLINE);
    drop(gateway);
    let log = bundle.state().join("revocations.log");
    let whole = fs::read_to_string(&log).expect("the log");

    fs::write(&log, whole.replacen("s1", "s9", 1)).expect("damage");
    let mut command = Command::new(binary("sealgate"));
    command.arg("run").arg("--policy").arg(bundle.policy()).arg("--state").arg(bundle.state());
    let output =
        command.args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("revocations.log:2: damaged"), "{said}");

    fs::write(&log, format!("{whole}0123456789abcdef 3 3 r 18")).expect("a torn end");
    let gateway = Gateway::run(&bundle);
    assert_eq!(status(&gateway, &revoked), 401);
}

#[test]
fn tokens_of_a_leaked_key_count_no_more_and_their_sockets_close() {
    let bundle = Bundle::new(RULES);
    let other = TokenIssuer::new("key-2");
    let keys = json!({ "keys": [bundle.issuer.jwk(), other.jwk()] });
    fs::write(bundle.state().join("jwks.json"), keys.to_string()).expect("a key set");
    let mut gateway = Gateway::run(&bundle);
    let (leaked, good) = (token(&bundle.issuer, "s1"), token(&other, "s2"));
    let unnamed = {
        let now = sealgate_tests::now();
        let claims = json!({ "iss": "https://issuer.test", "aud": "sealgate", "sub": "a", "exp": now + 60 });
        bundle.issuer.sign(&json!({ "alg": "ES256", "typ": "at+jwt" }), &claims)
    };
    // Two keys: which of them signed is not to be guessed.
    assert_eq!(status(&gateway, &unnamed), 401);
    let (mut of_leaked, mut of_good) = (gateway.open("/ws/a", &leaked), gateway.open("/ws/a", &good));
    // Verified, and remembered as that.
    assert_eq!((status(&gateway, &leaked), status(&gateway, &good)), (200, 200));

    revoke(&gateway, &["--issuer", "tests", "--key", "key-1"]);
    assert_eq!(of_leaked.close_code(), 4410);
    of_good.assert_echoes();
    assert_eq!((status(&gateway, &leaked), status(&gateway, &good)), (401, 200));
    // Whoever holds the key signs for later.
    let forged = bundle.issuer.with("a", json!({ "iat": sealgate_tests::now() + 3000, "nbf": null }));
    assert_eq!(status(&gateway, &forged), 401);
    gateway.signal(Signal::KILL);
    gateway.wait(DEADLINE);
    drop(gateway);
    let gateway = Gateway::run(&bundle);
    assert_eq!((status(&gateway, &leaked), status(&gateway, &good)), (401, 200));

    // With one key only, a token need not name it; it is known by which it was verified.
    fs::write(bundle.state().join("jwks.json"), bundle.issuer.jwks().to_string()).expect("a key set");
    assert!(gateway.reload().0);
    let reply = gateway.curl("/api").token(&unnamed).send();
    assert_eq!((reply.status, &reply.json()["type"]), (401, &json!("urn:sealgate:problem:revoked")));
}
