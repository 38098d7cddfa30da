//! OpenID Connect Back-Channel Logout 1.0 over the wire: what ends a session, and the attacks that must not.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sealgate_tests::{Bundle, DEADLINE, Gateway, Reply, Signal, TokenIssuer, filled, now};
use serde::Deserialize;
use serde_json::{Value, json};

const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";

const RULES: &str = r#"
[[issuer]]
name = "second"
issuer = "https://second.test"
audience = ["sealgate"]
algorithms = ["ES256"]
jwks = "file:${state}/jwks.json"

[session]
skew = "0s"

[[rate]]
name = "logouts"
per = ["address"]
quota = 1000000
period = "1m"

[[rate]]
name = "few"
per = ["address"]
quota = 3
period = "1h"

[[route]]
name = "logout"
path = "/logout"
methods = ["POST"]
auth = "none"
rates = ["logouts"]
logout = { issuer = "tests", audience = ["client", "client-2"], max_age = "60s" }

[[route]]
name = "strict"
path = "/strict"
methods = ["POST"]
auth = "none"
rates = ["logouts"]
logout = { issuer = "tests", audience = ["client"], max_age = "60s", strict_type = true }

[[route]]
name = "flooded"
path = "/flooded"
methods = ["POST"]
auth = "none"
rates = ["few"]
logout = { issuer = "tests", audience = ["client"] }

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

const FORM: &str = "application/x-www-form-urlencoded";

fn access(issuer: &TokenIssuer, subject: &str, session: &str) -> String {
    let issued = now() - 60;
    issuer.with(subject, json!({ "sid": session, "jti": session, "iat": issued, "nbf": issued }))
}

/// A number that no other call gives: no token here is another's replay.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

fn claims(changes: Value) -> Value {
    let mut claims = json!({
        "iss": "https://issuer.test", "aud": "client", "iat": now(), "exp": now() + 120,
        "jti": format!("logout-{}", unique()), "events": { EVENT: {} },
    });
    merge(&mut claims, &changes);
    claims
}

fn merge(into: &mut Value, changes: &Value) {
    for (name, value) in changes.as_object().expect("an object") {
        into[name] = value.clone();
    }
}

fn logout(issuer: &TokenIssuer, changes: Value) -> String {
    issuer.sign(&json!({ "alg": "ES256", "typ": "logout+jwt", "kid": issuer.kid() }), &claims(changes))
}

fn post(gateway: &Gateway, path: &str, token: &str) -> Reply {
    gateway.curl(path).body(FORM, &format!("logout_token={token}")).send()
}

#[track_caller]
fn assert_done(reply: &Reply) {
    assert_eq!((reply.status, &*reply.body), (200, ""), "{reply:?}");
    assert_eq!(reply.header("cache-control"), Some("no-store"), "{reply:?}");
}

/// §2.8.
#[track_caller]
fn assert_refused(reply: &Reply, error: &str) {
    assert_eq!(reply.status, 400, "{reply:?}");
    assert_eq!(reply.header("cache-control"), Some("no-store"), "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"), "{reply:?}");
    assert_eq!(reply.json()["error"], error, "{reply:?}");
}

fn status(gateway: &Gateway, token: &str) -> u16 {
    gateway.curl("/api").token(token).send().status
}

#[test]
fn a_logout_ends_the_session_or_all_of_the_subject_here_and_after_a_restart() {
    let bundle = Bundle::new(RULES);
    let issuer = &bundle.issuer;
    let mut gateway = Gateway::run(&bundle);
    let tokens = [("alice", "a1"), ("alice", "a2"), ("bob", "b1"), ("bob", "b2"), ("carol", "c1")]
        .map(|(subject, session)| access(issuer, subject, session));
    let [mut a1, mut a2, mut b1, mut b2, mut c1] =
        tokens.each_ref().map(|token| gateway.open("/ws/a", token));

    assert_done(&post(&gateway, "/logout", &logout(issuer, json!({ "sid": "a1", "sub": "alice" }))));
    assert_eq!(a1.close_code(), 4410);
    a2.assert_echoes();
    let of_subject = logout(issuer, json!({ "sub": "bob" }));
    assert_done(&post(&gateway, "/logout", &of_subject));
    assert_eq!(b1.close_code(), 4410);
    assert_eq!(b2.close_code(), 4410);
    c1.assert_echoes();
    // Once only.
    assert_refused(&post(&gateway, "/logout", &of_subject), "invalid_request");
    // By the issuer's clock: who logged in after it is not meant, however late it comes.
    let late = logout(issuer, json!({ "sub": "carol", "iat": now() - 61 + 5 }));
    let anew = issuer.with("carol", json!({ "sid": "c2", "iat": now() - 40, "nbf": null }));
    let mut c2 = gateway.open("/ws/a", &anew);
    assert_done(&post(&gateway, "/logout", &late));
    assert_eq!(c1.close_code(), 4410);
    c2.assert_echoes();

    for restarted in [false, true] {
        if restarted {
            gateway.signal(Signal::KILL);
            gateway.wait(DEADLINE);
            drop(gateway);
            gateway = Gateway::run(&bundle);
        }
        let statuses = tokens.each_ref().map(|token| status(&gateway, token));
        assert_eq!(statuses, [401, 200, 401, 401, 401], "restarted: {restarted}");
        assert_eq!(status(&gateway, &anew), 200);
    }
}

#[test]
fn a_flood_is_bounded_by_address() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for _ in 0..3 {
        assert_refused(&post(&gateway, "/flooded", "a.b.c"), "invalid_request");
    }
    let reply = post(&gateway, "/flooded", &logout(&bundle.issuer, json!({ "sid": "s" })));
    assert_eq!(reply.problem(429), "urn:sealgate:problem:rate-exceeded");
    // Elsewhere nothing of it is felt.
    assert_done(&post(&gateway, "/logout", &logout(&bundle.issuer, json!({ "sid": "s" }))));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    group: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    about: String,
    source: String,
    expect: u16,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default)]
    #[allow(dead_code, reason = "for the reader of the list")]
    source: Option<String>,
    header: Option<String>,
    #[serde(default)]
    header_without: Vec<String>,
    claims: Option<String>,
    claims_text: Option<String>,
    #[serde(default)]
    claims_without: Vec<String>,
    key: Option<String>,
    token: Option<String>,
    form: Option<String>,
    content_type: Option<String>,
    method: Option<String>,
    route: Option<String>,
}

struct Keys<'a> {
    issuer: &'a TokenIssuer,
    stranger: TokenIssuer,
    leaked: TokenIssuer,
}

impl Keys<'_> {
    fn sign(&self, key: &str, signed: &str) -> Vec<u8> {
        let hmac = |key: &[u8]| {
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
            ring::hmac::sign(&key, signed.as_bytes()).as_ref().to_vec()
        };
        let jwk = self.issuer.jwk();
        match key {
            "key-1" => self.issuer.sign_text(signed),
            "stranger" => self.stranger.sign_text(signed),
            "leaked" => self.leaked.sign_text(signed),
            "hmac-jwk" => hmac(jwk.to_string().as_bytes()),
            "hmac-x" => hmac(&URL_SAFE_NO_PAD.decode(jwk["x"].as_str().expect("x")).expect("base64")),
            other => panic!("key {other}?"),
        }
    }

    /// Puts in what stands between `<` and `>`.
    fn filled(&self, text: &str) -> String {
        let later = ["header", "claims", "signature", "other-signature", "token"];
        filled(text, &later, |word| match word {
            "access" => Some(access(self.issuer, "alice", "attacked")),
            "stranger" => Some(self.stranger.jwk().to_string()),
            _ => None,
        })
    }
}

impl Case {
    fn token(&self, keys: &Keys<'_>, session: &str) -> String {
        let read = |text: &Option<String>| -> Value {
            let text = keys.filled(text.as_deref().unwrap_or("{}"));
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {text}: {error}", self.name))
        };
        let key = self.key.as_deref().unwrap_or("key-1");
        let kid = if key == "leaked" { "key-2" } else { "key-1" };
        let mut header = json!({ "alg": "ES256", "typ": "logout+jwt", "kid": kid });
        merge(&mut header, &read(&self.header));
        self.header_without
            .iter()
            .for_each(|name| drop(header.as_object_mut().expect("an object").remove(name)));
        let mut claims = claims(json!({ "sub": "alice", "sid": session }));
        self.claims_without
            .iter()
            .for_each(|name| drop(claims.as_object_mut().expect("an object").remove(name)));
        merge(&mut claims, &read(&self.claims));
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let claims = self.claims_text.as_ref().map_or_else(|| claims.to_string(), |text| keys.filled(text));
        let (header, claims) = (encode(&header.to_string()), encode(&claims));
        let signature = URL_SAFE_NO_PAD.encode(keys.sign(key, &format!("{header}.{claims}")));
        let token = self.token.as_deref().unwrap_or("<header>.<claims>.<signature>");
        let other = URL_SAFE_NO_PAD.encode(keys.sign("key-1", "another"));
        let parts =
            [("header", header), ("claims", claims), ("signature", signature), ("other-signature", other)];
        parts.iter().fold(keys.filled(token), |token, (name, part)| token.replace(&format!("<{name}>"), part))
    }

    fn send(&self, gateway: &Gateway, keys: &Keys<'_>, session: &str) -> Reply {
        let form = keys.filled(self.form.as_deref().unwrap_or("logout_token=<token>"));
        let form = form.replace("<token>", &self.token(keys, session));
        let curl = gateway.curl(self.route.as_deref().unwrap_or("/logout"));
        match self.method.as_deref() {
            Some("GET") => curl.send(),
            method => curl
                .method(method.unwrap_or("POST"))
                .body(self.content_type.as_deref().unwrap_or(FORM), &form)
                .send(),
        }
    }
}

#[test]
fn every_attack_on_logout_tokens_gets_its_answer_and_ends_nothing() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("attacks/logout_tokens.toml");
    let list: List = toml::from_str(&fs::read_to_string(path).expect("the list")).expect("its parse");
    let bundle = Bundle::new(RULES);
    let keys = Keys {
        issuer: &bundle.issuer,
        stranger: TokenIssuer::new("key-1"),
        leaked: TokenIssuer::new("key-2"),
    };
    let jwks = json!({ "keys": [bundle.issuer.jwk(), keys.leaked.jwk()] });
    fs::write(bundle.state().join("jwks.json"), jwks.to_string()).expect("a key set");
    let gateway = Gateway::run(&bundle);
    let (fine, answer) = gateway.sessions(&["revoke", "--issuer", "tests", "--key", "key-2"]);
    assert!(fine, "{answer}");
    let attacked = access(&bundle.issuer, "alice", "attacked");
    let mut socket = gateway.open("/ws/a", &attacked);
    let (mut wrong, mut count) = (Vec::new(), 0);
    for group in &list.group {
        assert!(!group.source.is_empty() && !group.about.is_empty());
        for case in &group.cases {
            count += 1;
            // What passes ends a session that it is for; what is refused is about the one that must go on.
            let good = group.expect == 200;
            let session = if good { format!("s-{count}") } else { "attacked".to_owned() };
            let before = access(&bundle.issuer, "dave", &session);
            let mut its = good.then(|| gateway.open("/ws/a", &before));
            let reply = case.send(&gateway, &keys, &session);
            let shaped = group.expect != 400 || reply.body.contains(r#""error":"invalid_request""#);
            let no_store = group.expect == 413 || reply.header("cache-control") == Some("no-store");
            if reply.status != group.expect || !shaped || !no_store {
                wrong.push(format!("{}: {}: {reply:?}", group.about, case.name));
                continue;
            }
            if let Some(socket) = &mut its {
                assert_eq!(socket.close_code(), 4410);
                assert_eq!(status(&gateway, &before), 401, "{}", case.name);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count >= 100, "{count} cases");
    socket.assert_echoes();
    assert_eq!(status(&gateway, &attacked), 200);
}
