//! Token keys from a URL: fetched with the server verified, kept when it is gone, never fetched in a storm.

use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, DEADLINE, Gateway, TokenIssuer, Upstream, until};
use serde_json::json;

const RULES: &str = r#"
[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"
auth = "required"
"#;

fn start(authority_is_known: bool) -> (Bundle, Upstream, Gateway) {
    let bundle = Bundle::new("");
    let server = Upstream::tls(&bundle.pki, "server");
    server.publish("/keys", &bundle.issuer.jwks().to_string());
    let url = format!("https://localhost:{}/keys", server.address().port());
    let policy = Bundle::BASE.replace("file:${state}/jwks.json", &url);
    bundle.write_file("policy.toml", &format!("{policy}{RULES}"));
    let gateway = Gateway::run_with(&bundle, |command| {
        // Where rustls-native-certs looks for the system's authorities.
        let authority = if authority_is_known { bundle.pki.ca() } else { "/dev/null".into() };
        command.env("SSL_CERT_FILE", authority).env_remove("SSL_CERT_DIR");
    });
    (bundle, server, gateway)
}

#[test]
fn k4_keys_come_from_a_url_rotate_and_outlive_an_outage() {
    let (bundle, server, gateway) = start(true);
    let alice = bundle.issuer.token("alice");
    assert_eq!(gateway.curl("/mine").token(&alice).send().status, 200);

    // A new key beside the old one: its tokens are taken as soon as the set may be read again.
    let fresh = TokenIssuer::new("key-2");
    let mut both = bundle.issuer.jwks();
    both["keys"].as_array_mut().unwrap().push(fresh.jwks()["keys"][0].clone());
    server.publish("/keys", &both.to_string());
    let bob = fresh.token("bob");
    until("the new key is taken", DEADLINE, || {
        (gateway.curl("/mine").token(&bob).send().status == 200).then_some(())
    });
    assert_eq!(gateway.curl("/mine").token(&alice).send().status, 200, "a rotation loses nobody");
    assert!(gateway.metrics().sum("sealgate_jwks_age_seconds", &[]) < 60.0);

    // The issuer is gone: what is known stays good, for tokens never seen before too.
    server.stop();
    assert_eq!(gateway.curl("/mine").token(&fresh.token("carol")).send().status, 200);
    gateway.curl("/mine").token(&TokenIssuer::new("key-1").token("mallory")).send().problem(401);
    let (reloaded, said) = gateway.reload();
    assert!(reloaded, "{said}");
    assert_eq!(gateway.curl("/mine").token(&alice).send().status, 200, "a reload keeps the keys");
}

#[test]
fn unknown_key_ids_cause_no_storm() {
    let (_bundle, server, gateway) = start(true);
    let start = Instant::now();
    let stranger = TokenIssuer::new("x");
    for n in 0..60 {
        let header = json!({ "alg": "ES256", "typ": "at+jwt", "kid": format!("unknown-{n}") });
        let claims = json!({ "iss": "https://issuer.test", "aud": "sealgate", "sub": "mallory", "exp": 4_102_444_800_u64 });
        gateway.curl("/mine").token(&stranger.sign(&header, &claims)).send().problem(401);
    }
    // At the start, and then at most once in five seconds.
    let allowed = 2 + start.elapsed().as_secs() as usize / 5;
    let fetched = server.count("/keys");
    assert!(fetched <= allowed, "{fetched} fetches for 60 unknown keys, {allowed} allowed");
}

#[test]
fn keys_are_not_taken_from_a_server_that_cannot_be_verified() {
    let (bundle, server, gateway) = start(false);
    gateway.curl("/mine").token(&bundle.issuer.token("alice")).send().problem(503);
    assert_eq!(server.seen().len(), 0, "the server was asked before it was verified");
}

#[test]
fn a_token_that_was_taken_before_is_refused_once_it_has_expired() {
    let bundle = Bundle::new("");
    let policy = Bundle::BASE.replace("jwks =", "skew = \"0s\"\njwks =");
    bundle.write_file("policy.toml", &format!("{policy}{RULES}"));
    let gateway = Gateway::run(&bundle);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let short = bundle.issuer.with("alice", json!({ "exp": now + 3 }));
    assert_eq!(gateway.curl("/mine").token(&short).send().status, 200);
    until("the token expires", Duration::from_secs(10), || {
        (gateway.curl("/mine").token(&short).send().status == 401).then_some(())
    });
    let after = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(after >= now + 3, "refused before its time");
}
