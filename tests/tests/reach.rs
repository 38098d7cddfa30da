//! Every open socket can be reached: by its session, subject, token or issuer, and no other is touched.

use std::time::{SystemTime, UNIX_EPOCH};

use sealgate_tests::{Bundle, Client, Driver, Gateway, Open};
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

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// A token that was issued a minute ago.
fn token(bundle: &Bundle, subject: &str, session: &str, id: &str) -> String {
    let issued = now() - 60;
    bundle.issuer.with(subject, json!({ "sid": session, "jti": id, "iat": issued, "nbf": issued }))
}

/// Revokes, and says how many sockets were closed.
#[track_caller]
fn revoke(gateway: &Gateway, arguments: &[&str]) -> u64 {
    let (fine, answer) = gateway.sessions(&[&["revoke"], arguments].concat());
    assert!(fine && answer["entered"] == true && answer["complete"] == true, "{answer}");
    answer["sockets"].as_u64().expect("a count")
}

#[test]
fn a_revocation_closes_the_sockets_that_are_meant_and_no_others() {
    for client in Client::ALL {
        let bundle = Bundle::new(RULES);
        let gateway = Gateway::run(&bundle);
        let url = gateway.ws("/ws/a");
        let mut driver = Driver::start(client, gateway.ca());
        let tokens = [
            ("a1", token(&bundle, "alice", "s1", "t1")),
            ("a1 too", token(&bundle, "alice", "s1", "t2")),
            ("a2", token(&bundle, "alice", "s2", "t3")),
            ("b", token(&bundle, "bob", "s3", "t4")),
            ("b too", token(&bundle, "bob", "s3", "t5")),
        ];
        for (id, token) in &tokens {
            driver.open(id, &url, &Open::token(token));
        }
        let still_open = |driver: &mut Driver, ids: &[&str]| {
            for id in ids {
                driver.echo(id, "still here");
            }
        };

        assert_eq!(revoke(&gateway, &["--token-id", "t1"]), 1, "{client:?}");
        let reason = driver.expect_close("a1", 4410);
        assert!(reason.starts_with("revoked: "), "{client:?}: {reason}");
        still_open(&mut driver, &["a1 too", "a2", "b", "b too"]);
        // The token counts for nothing else either; the session's other one does.
        driver.refused("again", &url, &Open::token(&tokens[0].1), 401);
        gateway.curl("/api").token(&tokens[0].1).send().problem(401);
        assert_eq!(gateway.curl("/api").token(&tokens[1].1).send().status, 200, "{client:?}");

        assert_eq!(revoke(&gateway, &["--session", "s1", "--issuer", "tests"]), 1, "{client:?}");
        driver.expect_close("a1 too", 4410);
        still_open(&mut driver, &["a2", "b", "b too"]);
        let later = bundle.issuer.with("alice", json!({ "sid": "s1" }));
        driver.refused("later", &url, &Open::token(&later), 401);

        let subject = ["--subject", "alice", "--issuer", "https://issuer.test", "--ttl", "1h"];
        assert_eq!(revoke(&gateway, &subject), 1, "{client:?}");
        driver.expect_close("a2", 4410);
        still_open(&mut driver, &["b", "b too"]);
        assert_eq!(revoke(&gateway, &["--subject", "nobody"]), 0, "{client:?}");

        assert_eq!(revoke(&gateway, &["--all-of-issuer"]), 2, "{client:?}");
        driver.expect_close("b", 4410);
        driver.expect_close("b too", 4410);
    }
}

#[test]
fn a_subject_that_was_revoked_may_log_in_anew() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let old = token(&bundle, "alice", "s1", "t1");
    assert_eq!(revoke(&gateway, &["--subject", "alice"]), 0);
    gateway.curl("/api").token(&old).send().problem(401);
    // Issued after the second in which the revocation came; the gateway allows for such a difference of clocks.
    let issued = now() + 2;
    let new = bundle.issuer.with("alice", json!({ "sid": "s2", "iat": issued, "nbf": issued }));
    assert_eq!(gateway.curl("/api").token(&new).send().status, 200);
}

#[test]
fn a_revocation_that_names_nothing_we_know_is_refused() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for (arguments, why) in [
        (vec!["--subject", "alice", "--issuer", "other"], "no such issuer; the policy has: tests"),
        (vec!["--subject", ""], "expected an id of 1 to 256 bytes"),
        (vec!["--session", "s1", "--ttl", "401d"], "ttl: expected 1 to 34560000 seconds"),
    ] {
        let (fine, answer) = gateway.sessions(&[&["revoke"], &arguments[..]].concat());
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(!fine && message.contains(why), "{arguments:?}: {answer}");
    }
    for usage in [&["revoke"][..], &["revoke", "--subject", "a", "--session", "b"]] {
        let (fine, answer) = gateway.sessions(usage);
        assert!(!fine && answer.to_string().contains("Usage"), "{answer}");
    }
}
