//! Requests: what policy allows reaches the upstream, what it refuses gets the field's answer and reaches nobody.

use std::collections::BTreeSet;
use std::time::Duration;

use sealgate_tests::{Bundle, DEADLINE, Gateway, TokenIssuer, Wire, until};
use serde_json::json;

const RULES: &str = r#"
[tls]
hsts = { max_age = "730d", include_subdomains = true, preload = true }

[[route]]
name = "open"
path = "/open/**"
methods = ["GET"]
upstream = "backend"
auth = "none"
query = {}

[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"
auth = "required"
query = {}

[[route]]
name = "administrators"
path = "/admin"
methods = ["GET"]
upstream = "backend"
auth = "required"
roles = ["administrator"]

[[route]]
name = "read-item"
path = "/items/{id}"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "write-item"
path = "/items/{id}"
methods = ["PUT"]
upstream = "backend"
auth = "none"
body = { max_bytes = "1KiB" }

[[route]]
name = "checked"
path = "/checked"
methods = ["POST"]
upstream = "backend"
auth = "none"
body = { max_bytes = "1KiB", content_types = ["application/json"], schema = "schemas/message.json" }

[[route]]
name = "limited"
path = "/limited"
methods = ["GET"]
upstream = "backend"
auth = "required"
rates = ["per-subject"]

[[route]]
name = "misbehaving"
path = "/{what}/upstream"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "searched"
path = "/search"
methods = ["GET"]
upstream = "backend"
auth = "none"
query = { max_bytes = "64B", schema = "schemas/search.json" }

[[route]]
name = "trial"
path = "/trial"
methods = ["GET"]
upstream = "backend"
auth = "required"
roles = ["administrator"]
mode = "shadow"

[[route]]
name = "slow-for-all"
path = "/slow/{what}"
methods = ["GET"]
upstream = "backend"
auth = "none"
rates = ["per-address"]

[[rate]]
name = "per-address"
per = ["address", "route"]
quota = 2
period = "1h"

[[rate]]
name = "per-subject"
per = ["subject"]
quota = 3
period = "1h"
burst = 3
"#;

const SCHEMA: &str = r#"{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object", "required": ["text"], "additionalProperties": false,
  "properties": { "text": { "type": "string", "maxLength": 20 }, "to": { "type": "array", "items": { "type": "string" } } }
}"#;

const SEARCH: &str = r#"{
  "type": "object", "additionalProperties": false,
  "properties": { "q": { "type": "string", "maxLength": 10 }, "page": { "type": "string", "pattern": "^[0-9]{1,3}$" } }
}"#;

fn bundle() -> Bundle {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/message.json", SCHEMA);
    bundle.write_file("schemas/search.json", SEARCH);
    bundle.write(RULES);
    bundle
}

#[test]
fn legitimate_requests_pass_over_http_1_and_2_and_tls_1_2_and_1_3() {
    let gateway = Gateway::dev();
    let token = gateway.token();
    for tls in ["1.2", "1.3"] {
        for (http, version) in [("--http1.1", "HTTP/1.1"), ("--http2", "HTTP/2")] {
            let lowest = format!("--tlsv{tls}");
            let arguments = [lowest.as_str(), "--tls-max", tls, http];
            let health = gateway.curl("/healthz").args(arguments).send();
            assert_eq!((health.status, health.version.as_str()), (200, version), "TLS {tls}: {health:?}");
            let echo =
                gateway.curl("/v1/echo").args(arguments).token(&token).json(r#"{"text":"hello"}"#).send();
            assert_eq!((echo.status, echo.version.as_str()), (200, version), "TLS {tls}: {echo:?}");
            assert!(echo.body.contains("hello"), "{echo:?}");
            let refused = gateway.curl("/v1/echo").args(arguments).send();
            assert_eq!((refused.problem(401).is_empty(), refused.version.as_str()), (false, version));
        }
    }
    // A fresh login works as the token that was printed does, and is somebody else.
    let bob = gateway.login("bob", 300);
    let whoami = gateway.curl("/v1/whoami").token(&bob).send();
    assert_eq!(whoami.status, 200, "{whoami:?}");
    assert!(whoami.body.contains("bob") && !whoami.body.contains("alice"), "{whoami:?}");
}

#[test]
fn t1_plain_http_is_not_served() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let plain =
        sealgate_tests::curl(&format!("http://{}/open/x", gateway.authority()), gateway.ca()).try_send();
    assert!(
        plain.as_ref().is_err() || plain.as_ref().is_ok_and(|reply| matches!(reply.status, 308 | 400)),
        "{plain:?}"
    );
    assert_eq!(bundle.upstream.seen().len(), 0);
    assert_eq!(gateway.curl("/open/x").send().status, 200);
}

#[test]
fn a3_a_request_without_a_good_token_gets_401_and_a_challenge() {
    let bundle = bundle();
    let mut gateway = Gateway::run(&bundle);
    let issuer = &bundle.issuer;
    let header = json!({ "alg": "ES256", "typ": "at+jwt", "kid": issuer.kid() });
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();

    for good in [issuer.token("alice"), issuer.with("alice", json!({ "aud": ["other", "sealgate"] }))] {
        assert_eq!(gateway.curl("/mine").token(&good).send().status, 200);
    }
    let passed = bundle.upstream.count("/mine");
    assert_eq!(passed, 2);

    let none = gateway.curl("/mine").send();
    none.problem(401);
    let challenge = none.header("www-authenticate").expect("a challenge");
    // RFC 6750 §3.1: no error code for a request that brought no token.
    assert!(challenge.starts_with("Bearer") && !challenge.contains("error="), "{challenge}");

    let stranger = TokenIssuer::new(issuer.kid());
    let good = issuer.token("alice");
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let claims = json!({ "iss": "https://issuer.test", "aud": "sealgate", "sub": "alice", "exp": now + 600, "iat": now });
    let cases = [
        ("garbage", "garbage".to_owned()),
        ("two parts", signed.to_owned()),
        ("no signature", format!("{signed}.")),
        ("a bit of the signature", format!("{signed}.{}", flip(signature))),
        ("padded", format!("{good}=")),
        ("another key", stranger.token("alice")),
        ("alg none", issuer.sign(&json!({ "alg": "none", "typ": "at+jwt" }), &claims)),
        ("alg HS256", issuer.sign(&json!({ "alg": "HS256", "typ": "at+jwt", "kid": issuer.kid() }), &claims)),
        ("alg ES384", issuer.sign(&json!({ "alg": "ES384", "typ": "at+jwt", "kid": issuer.kid() }), &claims)),
        (
            "unknown kid",
            issuer.sign(&json!({ "alg": "ES256", "typ": "at+jwt", "kid": "../../etc/passwd" }), &claims),
        ),
        (
            "typ of an ID token",
            issuer.sign(&json!({ "alg": "ES256", "typ": "JWT", "kid": issuer.kid() }), &claims),
        ),
        (
            "crit",
            issuer.sign(
                &json!({ "alg": "ES256", "typ": "at+jwt", "kid": issuer.kid(), "crit": ["x"] }),
                &claims,
            ),
        ),
        ("expired", issuer.with("alice", json!({ "exp": now - 3600 }))),
        ("no exp", issuer.with("alice", json!({ "exp": null }))),
        ("exp as text", issuer.with("alice", json!({ "exp": "9999999999" }))),
        ("not yet valid", issuer.with("alice", json!({ "nbf": now + 3600 }))),
        ("another issuer", issuer.with("alice", json!({ "iss": "https://evil.test" }))),
        ("no issuer", issuer.with("alice", json!({ "iss": null }))),
        ("another audience", issuer.with("alice", json!({ "aud": "other" }))),
        ("no audience", issuer.with("alice", json!({ "aud": null }))),
        ("no subject", issuer.with("alice", json!({ "sub": null }))),
        ("not an object", issuer.sign(&header, &json!(["alice"]))),
        ("too large", issuer.with("alice", json!({ "filler": "x".repeat(64 * 1024) }))),
    ];
    for (name, token) in &cases {
        // A token of 64 KiB may be refused as a header that is too large.
        let reply = gateway.curl("/mine").token(token).try_send();
        if *name == "too large" {
            assert!(!reply.is_ok_and(|reply| reply.status < 400), "{name}");
            continue;
        }
        let reply = reply.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(reply.status, 401, "{name}: {reply:?}");
        reply.problem(401);
        let challenge = reply.header("www-authenticate").expect("a challenge");
        assert!(challenge.contains(r#"error="invalid_token""#), "{name}: {challenge}");
        assert!(!reply.body.contains(token.as_str()), "{name}: the answer repeats the token");
    }
    // One place only: not the URL, not two headers.
    assert_eq!(gateway.curl(&format!("/mine?access_token={good}")).send().status, 401);
    let twice = gateway.curl("/mine").token(&good).token(&good).http1().send();
    assert!(matches!(twice.status, 400 | 401), "{twice:?}");
    assert_eq!(gateway.curl("/mine").header("Authorization: Basic YTpi").send().status, 401);
    let log = gateway.process().stderr();
    assert!(!log.contains(signature) && !log.contains(signed), "a token stands in the log");
    assert_eq!(bundle.upstream.count("/mine"), passed, "a refused request reached the upstream");
}

fn flip(signature: &str) -> String {
    let replacement = if signature.starts_with('A') { "B" } else { "A" };
    format!("{replacement}{}", &signature[1..])
}

#[test]
fn p1_a_role_that_is_missing_gets_403() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let user = gateway.curl("/admin").token(&bundle.issuer.token("alice")).send();
    user.problem(403);
    assert!(
        user.header("www-authenticate").is_some_and(|text| text.contains("insufficient_scope")),
        "{user:?}"
    );
    assert_eq!(bundle.upstream.seen().len(), 0);
    let root = bundle.issuer.with("root", json!({ "roles": ["user", "administrator"] }));
    assert_eq!(gateway.curl("/admin").token(&root).send().status, 200);
}

#[test]
fn routes_that_are_not_there_get_404_and_methods_405() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    for path in
        ["/", "/nowhere", "/mine/", "/mine/more", "/Mine", "/open", "/items/", "/items/1/2", "/checked/"]
    {
        let reply = gateway.curl(path).token(&bundle.issuer.token("alice")).send();
        reply.problem(404);
    }
    for (path, method) in
        [("/open/x", "DELETE"), ("/mine", "PUT"), ("/checked", "GET"), ("/items/7", "TRACE")]
    {
        let reply = gateway.curl(path).method(method).send();
        reply.problem(405);
        let allow: BTreeSet<&str> = reply.header("allow").expect("Allow").split(',').map(str::trim).collect();
        assert!(!allow.is_empty() && !allow.contains(method), "{reply:?}");
        for method in allow.iter().filter(|method| **method != "HEAD" && **method != "OPTIONS") {
            assert!(["GET", "POST", "PUT"].contains(method), "{reply:?}");
        }
    }
    assert_eq!(bundle.upstream.seen().len(), 0);
    assert_eq!(gateway.curl("/items/7").send().status, 200);
    assert_eq!(bundle.upstream.last().target, "/items/7");
    assert_eq!(gateway.curl("/open/a/b/c?x=1&y=%20").send().status, 200);
    assert_eq!(bundle.upstream.last().target, "/open/a/b/c?x=1&y=%20");
    let head = gateway.curl("/open/x").args(["--head"]).send();
    assert_eq!((head.status, head.body.as_str()), (200, ""), "{head:?}");
}

#[test]
fn a2_bodies_are_bounded_typed_and_checked() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let large = "x".repeat(1025);

    // 413, declared and counted, over both protocols; the limit itself passes.
    for http in ["--http1.1", "--http2"] {
        let fits =
            gateway.curl("/items/1").method("PUT").args([http]).body("text/plain", &large[..1024]).send();
        assert_eq!(fits.status, 200, "{http}: {fits:?}");
        assert_eq!(bundle.upstream.last().body, large.as_bytes()[..1024]);
        gateway.curl("/items/1").method("PUT").args([http]).body("text/plain", &large).send().problem(413);
        gateway.curl("/checked").args([http]).json(&json!({ "text": large }).to_string()).send().problem(413);
    }
    let before = bundle.upstream.count("/");
    let undeclared =
        gateway.curl("/checked").http1().header("Transfer-Encoding: chunked").json(&format!("\"{large}\""));
    undeclared.send().problem(413);
    // Without a schema a body flows while it is counted: the upstream may see its beginning, never a whole request.
    let flowing = gateway.curl("/items/1").method("PUT").http1().header("Transfer-Encoding: chunked");
    flowing.body("text/plain", &large).send().problem(413);
    assert_eq!(bundle.upstream.count("/"), before, "an oversize body arrived whole");

    // 415.
    gateway.curl("/checked").body("text/plain", r#"{"text":"hi"}"#).send().problem(415);
    gateway.curl("/checked").header("Content-Type;").args(["--data-binary", "{}"]).send().problem(415);
    gateway.curl("/checked").body("application/json5", r#"{"text":"hi"}"#).send().problem(415);

    // 422 points at the field; what is no JSON is malformed or unprocessable.
    for (body, pointer) in [
        (r#"{"text": 1}"#, "/text"),
        (r#"{"text": "ok", "to": ["bob", 7]}"#, "/to/1"),
        (r#"{"text": "this text is longer than allowed"}"#, "/text"),
    ] {
        let reply = gateway.curl("/checked").json(body).send();
        reply.problem(422);
        assert!(
            reply.body.contains(&format!("\"{pointer}\"")) || reply.body.contains(pointer),
            "{pointer}: {reply:?}"
        );
        assert!(!reply.body.contains("longer than allowed"), "the answer repeats the body: {reply:?}");
    }
    gateway.curl("/checked").json("{}").send().problem(422);
    gateway.curl("/checked").json(r#"{"text":"hi","more":1}"#).send().problem(422);
    for broken in ["{", "", "nul", "{\"text\":\"hi\"} x", "[1,]", "\u{feff}{\"text\":\"hi\"}"] {
        let reply = gateway.curl("/checked").json(broken).send();
        assert!(matches!(reply.status, 400 | 422), "{broken:?}: {reply:?}");
        reply.problem(reply.status);
    }
    assert_eq!(bundle.upstream.count("/checked"), 0, "a refused body reached the upstream");

    for content_type in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
        let sent = r#"{ "text":  "hi" , "to": ["bob"] }"#;
        let reply = gateway.curl("/checked").body(content_type, sent).send();
        assert_eq!(reply.status, 200, "{content_type}: {reply:?}");
        assert_eq!(bundle.upstream.last().body, sent.as_bytes(), "the body is forwarded as it was judged");
    }
}

#[test]
fn a1_a_rate_that_is_exceeded_gets_429_with_the_time_to_wait() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let alice = bundle.issuer.token("alice");
    for left in [2, 1, 0] {
        let reply = gateway.curl("/limited").token(&alice).send();
        assert_eq!(reply.status, 200, "{reply:?}");
        let standing = reply.header("ratelimit").expect("RateLimit").to_owned();
        assert!(standing.contains(&format!("r={left}")), "{standing}");
        assert!(reply.header("ratelimit-policy").is_some_and(|policy| policy.contains("q=3")), "{reply:?}");
    }
    let reply = gateway.curl("/limited").token(&alice).send();
    reply.problem(429);
    let wait: u64 =
        reply.header("retry-after").and_then(|text| text.parse().ok()).expect("Retry-After in seconds");
    assert!((1..=1200).contains(&wait), "3 an hour is one in 20 minutes: {wait}");
    assert!(reply.header("ratelimit").is_some() && reply.header("ratelimit-policy").is_some(), "{reply:?}");
    assert_eq!(bundle.upstream.count("/limited"), 3);
    // Another token of the same subject shares the limit; another subject has his own.
    let again = bundle.issuer.with("alice", json!({ "jti": "another", "sid": "another" }));
    gateway.curl("/limited").token(&again).send().problem(429);
    assert_eq!(gateway.curl("/limited").token(&bundle.issuer.token("bob")).send().status, 200);
    // A reload forgives nobody.
    bundle.write(&format!("{RULES}\n# the same, but for this line\n"));
    let (reloaded, said) = gateway.reload();
    assert!(reloaded, "{said}");
    gateway.curl("/limited").token(&alice).send().problem(429);
}

#[test]
fn a1_a_rate_per_address_needs_no_identity_and_counts_a_route_not_a_path() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    assert_eq!(gateway.curl("/slow/1").send().status, 200);
    assert_eq!(gateway.curl("/slow/2").header("X-Forwarded-For: 6.6.6.6").send().status, 200);
    for (path, header) in
        [("/slow/3", "X: y"), ("/slow/4", "X-Forwarded-For: 7.7.7.7"), ("/slow/5", "Forwarded: for=8.8.8.8")]
    {
        gateway.curl(path).header(header).send().problem(429);
    }
    assert_eq!(gateway.curl("/open/x").send().status, 200);
}

#[test]
fn a2_queries_are_judged_by_their_schema() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    for query in ["", "?q=hello", "?q=h%20llo&page=12", "?page=7"] {
        let reply = gateway.curl(&format!("/search{query}")).send();
        assert_eq!(reply.status, 200, "{query}: {reply:?}");
    }
    let before = bundle.upstream.seen().len();
    let long = format!("?q={}", "x".repeat(80));
    for (query, status) in [
        ("?page=1%27%20OR%201=1", 422),
        ("?page=1000", 422),
        ("?q=longer-than-ten", 422),
        ("?debug=1", 422),
        ("?q=a&q=b", 422),
        ("?page=%3Cscript%3E", 422),
        (long.as_str(), 414),
        ("?q=%zz", 400),
        ("?q=a b", 400),
    ] {
        let mut wire = gateway.wire();
        wire.send(format!("GET /search{query} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        let reply = wire.response().unwrap_or_else(|| panic!("{query}: no answer"));
        assert_eq!(reply.status, status, "{query}: {reply:?}");
    }
    // A route that names no query takes none.
    gateway.curl("/checked?x=1").json(r#"{"text":"hi"}"#).send().problem(400);
    assert_eq!(bundle.upstream.seen().len(), before);
}

#[test]
fn a_rule_in_shadow_mode_counts_what_it_would_refuse_and_lets_it_pass() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let shadowed = |gateway: &Gateway| {
        gateway.metrics().sum("sealgate_shadow_denials_total", &[("reason", "role-missing")])
    };
    let root = bundle.issuer.with("root", json!({ "roles": ["administrator"] }));
    assert_eq!(gateway.curl("/trial").token(&root).send().status, 200);
    assert_eq!(shadowed(&gateway), 0.0);
    assert_eq!(gateway.curl("/trial").token(&bundle.issuer.token("alice")).send().status, 200);
    assert_eq!(shadowed(&gateway), 1.0);
    // It tries a rule out; it does not open a door: who comes without a token stays outside.
    let nobody = gateway.curl("/trial").send();
    let seen = bundle.upstream.last();
    assert!(nobody.status == 401 || seen.header("x-sealgate-subject").is_none(), "{nobody:?}");
}

#[test]
fn an_upstream_that_fails_gets_502_503_or_504() {
    let bundle = bundle();
    // The same upstream with a short temper.
    let policy = format!("{}response_timeout = \"300ms\"\n{RULES}", Bundle::BASE);
    bundle.write_file("policy.toml", &policy);
    let gateway = Gateway::run(&bundle);
    gateway.curl("/drop/upstream").send().problem(502);
    gateway.curl("/garbage/upstream").send().problem(502);
    gateway.curl("/hold/upstream").send().problem(504);
    bundle.upstream.release();
    assert_eq!(gateway.curl("/fine/upstream").send().status, 200);
    bundle.upstream.stop();
    let gone = gateway.curl("/fine/upstream").send();
    assert!(matches!(gone.status, 502 | 503), "{gone:?}");
    let text = gone.body.clone();
    gone.problem(gone.status);
    assert!(
        !text.contains("backend.sock") && !text.contains("os error"),
        "the answer tells of the inside: {text}"
    );
}

#[test]
fn keys_that_cannot_be_had_are_503_and_not_401() {
    let bundle = bundle();
    let policy = Bundle::BASE.replace(
        r#""file:${state}/jwks.json""#,
        &format!(r#""https://127.0.0.1:{}/jwks.json""#, sealgate_tests::free_port()),
    );
    bundle.write_file("policy.toml", &format!("{policy}{RULES}"));
    let gateway = Gateway::run(&bundle);
    let reply = gateway.curl("/mine").token(&bundle.issuer.token("alice")).send();
    reply.problem(503);
    assert!(reply.header("www-authenticate").is_none(), "a challenge would log clients out: {reply:?}");
    // A request without any token is the client's fault, keys or no keys; a route without authentication works.
    gateway.curl("/mine").send().problem(401);
    assert_eq!(gateway.curl("/open/x").send().status, 200);
    assert_eq!(bundle.upstream.count("/mine"), 0);
}

#[test]
fn a2_malformed_paths_and_queries_get_400() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let long = format!("/open/{}", "a".repeat(20_000));
    for path in [
        "/open/../mine",
        "/open/./x",
        "/open/%2e%2e/mine",
        "/open/%2E%2e%2fmine",
        "/open//x",
        "//open/x",
        "/open/a%2fb",
        "/open/a%5cb",
        "/open/a\\b",
        "/open/%00",
        "/open/%0d%0aX:1",
        "/open/%252e%252e/mine",
        "/open/%zz",
        "/open/%2",
        "/open/caf%c3%a9/..",
        "/open/x;/../mine",
        "/open/%c0%ae%c0%ae/mine",
        "/open/x?a=%zz",
        "/open/x?a=%0",
    ] {
        let mut wire = gateway.wire();
        wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        let reply = wire.response().unwrap_or_else(|| panic!("{path}: no answer"));
        assert_eq!(reply.status, 400, "{path}: {reply:?}");
        let http2 = gateway.curl(path).args(["--http2"]).try_send();
        assert!(http2.as_ref().map_or(true, |reply| reply.status == 400), "{path}: {http2:?}");
    }
    let mut wire = gateway.wire();
    wire.send(format!("GET {long} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    let reply = wire.response().expect("an answer");
    assert!(matches!(reply.status, 400 | 414 | 431), "{reply:?}");
    assert_eq!(bundle.upstream.seen().len(), 0, "{:?}", bundle.upstream.seen());
    for path in ["/open/a%20b", "/open/~tilde-._!$&'()*+,;=:@", "/open/x?q=a%2fb&r=../x"] {
        let reply = gateway.curl(path).send();
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
    }
}

#[test]
fn a2_malformed_heads_are_refused_before_the_upstream_sees_them() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let many: String = (0..300).map(|n| format!("X-{n}: y\r\n")).collect();
    let fat = format!("X-Fat: {}\r\n", "y".repeat(200_000));
    let mut passed = Vec::new();
    for (name, request) in [
        ("Content-Length twice, different", "POST /checked HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x".to_owned()),
        ("Content-Length twice, equal", "POST /checked HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}".to_owned()),
        ("Content-Length and Transfer-Encoding", "PUT /items/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG".to_owned()),
        ("Content-Length with a sign", "PUT /items/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\nhi".to_owned()),
        ("chunked is not last", "PUT /items/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n".to_owned()),
        ("transfer coding of another name", "PUT /items/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".to_owned()),
        ("chunk size with a sign", "PUT /items/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n+2\r\nhi\r\n0\r\n\r\n".to_owned()),
        ("chunk size overflow", "PUT /items/1 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nhi\r\n0\r\n\r\n".to_owned()),
        ("bare LF", "GET /open/x HTTP/1.1\nHost: localhost\n\n".to_owned()),
        ("bare LF in a header", "GET /open/x HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n".to_owned()),
        ("bare CR in a header", "GET /open/x HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n".to_owned()),
        ("folded header", "GET /open/x HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n".to_owned()),
        ("space before the colon", "GET /open/x HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n".to_owned()),
        ("NUL in a header", "GET /open/x HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n".to_owned()),
        ("no Host", "GET /open/x HTTP/1.1\r\n\r\n".to_owned()),
        ("Host twice", "GET /open/x HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n".to_owned()),
        ("Host with a path", "GET /open/x HTTP/1.1\r\nHost: localhost/x\r\n\r\n".to_owned()),
        ("another host in the target", "GET http://other.test/open/x HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned()),
        ("HTTP/0.9", "GET /open/x\r\n\r\n".to_owned()),
        ("HTTP/3.0", "GET /open/x HTTP/3.0\r\nHost: localhost\r\n\r\n".to_owned()),
        ("CONNECT", "CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned()),
        ("method with a slash", "GE/T /open/x HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned()),
        ("too many headers", format!("GET /open/x HTTP/1.1\r\nHost: localhost\r\n{many}\r\n")),
        ("too long a header", format!("GET /open/x HTTP/1.1\r\nHost: localhost\r\n{fat}\r\n")),
    ] {
        let before = bundle.upstream.seen().len();
        let mut wire = gateway.wire();
        wire.send(&request);
        // A refusal, or the connection closed without one.
        if let Some(reply) = wire.response()
            && !(400..600).contains(&reply.status)
        {
            passed.push(format!("{name}: answered {}", reply.status));
        }
        let seen = bundle.upstream.seen();
        if seen.len() > before {
            passed.push(format!("{name}: reached the upstream as {:?}", seen[before..].iter().map(|seen| &seen.target).collect::<Vec<_>>()));
        }
    }
    assert!(passed.is_empty(), "{passed:#?}");
    // The wire itself is not at fault: the same by the book passes, twice on one connection.
    let mut wire = gateway.wire();
    for _ in 0..2 {
        wire.send("GET /open/x HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.response().expect("an answer").status, 200);
    }
}

#[test]
fn a_head_that_never_ends_is_cut_at_its_deadline() {
    let bundle = bundle();
    let rules = format!(
        "{RULES}\n[connections]\nheader_timeout = \"1s\"\nhandshake_timeout = \"1s\"\nbody_timeout = \"1s\"\n"
    );
    bundle.write(&rules);
    let gateway = Gateway::run(&bundle);
    let mut head = gateway.wire();
    head.send("GET /open/x HTTP/1.1\r\nHost: loc");
    let mut body = gateway.wire();
    body.send("POST /checked HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{");
    let mut handshake = std::net::TcpStream::connect(gateway.address()).unwrap();
    handshake.set_read_timeout(Some(DEADLINE)).unwrap();
    if let Some(reply) = head.response() {
        assert_eq!(reply.status, 408, "{reply:?}");
    }
    if let Some(reply) = body.response() {
        assert_eq!(reply.status, 408, "{reply:?}");
    }
    assert!(head.ended() && body.ended());
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut handshake, &mut rest);
    assert_eq!(bundle.upstream.seen().len(), 0);
}

#[test]
fn floods_of_http_2_control_frames_end_the_connection() {
    let bundle = bundle();
    // No deadline helps: what ends the connection is the flood.
    let patient = "[connections]\nheader_timeout = \"5m\"\nidle_timeout = \"1h\"\nbody_timeout = \"1h\"\n";
    bundle.write(&format!("{RULES}\n{patient}"));
    let gateway = Gateway::run(&bundle);
    let mut survived = Vec::new();
    let h2_frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    let preface = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &h2_frame(4, 0, 0, &[])].concat();
    // GET /open/x by static table and literals, with END_STREAM and END_HEADERS.
    let head = [&[0x82, 0x87, 0x44, 7][..], b"/open/x", &[0x41, 9], b"localhost"].concat();
    for (name, flood) in [
        ("SETTINGS", (0..20_000).flat_map(|_| h2_frame(4, 0, 0, &[])).collect::<Vec<u8>>()),
        ("PING", (0..20_000).flat_map(|_| h2_frame(6, 0, 0, &[0; 8])).collect()),
        (
            "PRIORITY",
            (0..20_000_u32).flat_map(|n| h2_frame(2, 0, 1 + 2 * (n % 50), &[0, 0, 0, 0, 1])).collect(),
        ),
        ("empty DATA", {
            let post = [&[0x83, 0x87, 0x44, 8][..], b"/checked", &[0x41, 9], b"localhost"].concat();
            let open = h2_frame(1, 4, 1, &post);
            [open, (0..20_000).flat_map(|_| h2_frame(0, 0, 1, &[])).collect()].concat()
        }),
        ("reset", {
            (0..5_000_u32)
                .flat_map(|n| {
                    [h2_frame(1, 5, 1 + 2 * n, &head), h2_frame(3, 0, 1 + 2 * n, &[0, 0, 0, 8])].concat()
                })
                .collect()
        }),
    ] {
        let mut wire = Wire::connect(gateway.address(), gateway.ca(), &["h2"]);
        assert_eq!(wire.alpn().as_deref(), Some("h2"));
        wire.send(&preface);
        wire.send(&flood);
        if !wire.ends_within(Duration::from_secs(4)) {
            survived.push(name);
        }
    }
    assert!(survived.is_empty(), "connections go on after a flood of {survived:?}");
    assert!(
        bundle.upstream.seen().len() < 1_000,
        "resets reached the upstream: {}",
        bundle.upstream.seen().len()
    );
    assert_eq!(gateway.curl("/open/x").send().status, 200);
}

#[test]
fn one_address_holds_only_so_many_connections() {
    let bundle = bundle();
    bundle.write(&format!("{RULES}\n[connections]\nmax_per_address = 4\n"));
    let gateway = Gateway::run(&bundle);
    let mut held: Vec<Wire> = (0..4).map(|_| gateway.wire()).collect();
    for wire in &mut held {
        wire.send("GET /open/x HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.response().expect("an answer").status, 200);
    }
    let refused = gateway.curl("/open/x").try_send();
    assert!(!refused.as_ref().is_ok_and(|reply| reply.status == 200), "{refused:?}");
    held.pop();
    until("a place is free again", DEADLINE, || {
        gateway.curl("/open/x").try_send().is_ok_and(|reply| reply.status == 200).then_some(())
    });
}

#[test]
fn identity_cannot_be_forged_and_where_a_request_came_from_is_told_truly() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let alice =
        bundle.issuer.with("alice", json!({ "sid": "s-1", "roles": ["user", "auditor"], "dept": "sales" }));
    let forged = [
        "X-Sealgate-Subject: root",
        "X-SEALGATE-ROLES: administrator",
        "x-sealgate-session: s-0",
        "X-Sealgate-Department: board",
        "X-Sealgate-Anything: x",
        "X_Sealgate_Subject: root",
        "X-Forwarded-For: 6.6.6.6",
        "X-Forwarded-Proto: gopher",
        "X-Forwarded-Host: evil.test",
        "X-Real-IP: 6.6.6.6",
        "Forwarded: for=6.6.6.6;proto=http",
        "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "Connection: X-Own, keep-alive",
        "Proxy-Authorization: Basic x",
        "TE: trailers",
        "Keep-Alive: timeout=1",
    ];
    for http in ["--http1.1", "--http2"] {
        let mut request = gateway.curl("/mine").args([http]).token(&alice);
        for line in forged {
            // HTTP/2 has no Connection header (RFC 9113 §8.2.2).
            if http == "--http2" && (line.starts_with("Connection") || line.starts_with("Keep-Alive")) {
                continue;
            }
            request = request.header(line);
        }
        let reply = request.send();
        assert_eq!(reply.status, 200, "{http}: {reply:?}");
        let seen = bundle.upstream.last();
        assert_eq!(seen.header("x-sealgate-subject"), Some("alice"), "{http}: {seen:?}");
        assert_eq!(seen.header("x-sealgate-session"), Some("s-1"), "{http}: {seen:?}");
        assert_eq!(seen.header("x-sealgate-department"), Some("sales"), "{http}: {seen:?}");
        let roles = seen.header("x-sealgate-roles").expect("roles");
        assert!(
            roles.contains("user") && roles.contains("auditor") && !roles.contains("administrator"),
            "{roles}"
        );
        assert_eq!(seen.header("x-sealgate-anything"), None, "{http}: {seen:?}");
        assert_eq!(seen.header("x_sealgate_subject"), None, "{http}: {seen:?}");
        assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1"), "{http}: {seen:?}");
        assert_eq!(seen.header("x-forwarded-proto"), Some("https"), "{http}: {seen:?}");
        assert!(
            seen.header("x-forwarded-host").is_none_or(|host| host.starts_with("localhost")),
            "{http}: {seen:?}"
        );
        let forwarded = seen.header("forwarded").expect("Forwarded");
        assert!(forwarded.contains("127.0.0.1") && forwarded.contains("proto=https"), "{forwarded}");
        let everything = format!("{:?}", seen.headers);
        for lie in [
            "6.6.6.6",
            "gopher",
            "evil.test",
            "root",
            "administrator",
            "board",
            "4bf92f3577b34da6a3ce929d0e0e4736",
        ] {
            assert!(!everything.contains(lie), "{http}: {lie} in {everything}");
        }
        let trace = seen.header("traceparent").expect("traceparent");
        let fields: Vec<usize> = trace.split('-').map(str::len).collect();
        assert_eq!(fields, [2, 32, 16, 2], "{trace}");
        for hop in ["keep-alive", "te", "proxy-authorization", "upgrade"] {
            assert_eq!(seen.header(hop), None, "{http}: {seen:?}");
        }
        assert_eq!(seen.header("x-request-id"), reply.header("x-request-id"), "{http}: {seen:?}");
    }
    // Without authentication there is no identity at all, not the forged one.
    gateway.curl("/open/x").header("X-Sealgate-Subject: root").send();
    let seen = bundle.upstream.last();
    assert!(seen.headers.iter().all(|(name, _)| !name.starts_with("x-sealgate-")), "{seen:?}");
    // The included backend sees the same.
    let dev = Gateway::dev();
    let whoami = dev.curl("/v1/whoami").token(&dev.token()).header("X-Sealgate-Subject: mallory").send();
    assert_eq!(whoami.status, 200, "{whoami:?}");
    assert!(whoami.body.contains("alice") && !whoami.body.contains("mallory"), "{whoami:?}");
}

#[test]
fn every_response_has_a_request_id_and_hsts_and_no_server_name() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    let replies = [
        gateway.curl("/leak/upstream").send(),
        gateway.curl("/leak/upstream").http1().send(),
        gateway.curl("/mine").token(&token).header("X-Request-Id: chosen-by-the-client").send(),
        gateway.curl("/mine").send(),
        gateway.curl("/nowhere").send(),
        gateway.curl("/open/x").method("DELETE").send(),
        gateway.curl("/open/../x").send(),
        gateway.curl("/checked").json("{}").send(),
        gateway.curl("/drop/upstream").send(),
    ];
    let mut ids = BTreeSet::new();
    for reply in &replies {
        let id = reply.header("x-request-id").unwrap_or_else(|| panic!("no request id: {reply:?}"));
        assert!(ids.insert(id.to_owned()), "an id came twice: {id}");
        assert_ne!(id, "chosen-by-the-client");
        let hsts = reply.header("strict-transport-security").unwrap_or_else(|| panic!("no HSTS: {reply:?}"));
        let age: u64 = hsts
            .split(';')
            .next()
            .and_then(|part| part.trim().strip_prefix("max-age="))
            .and_then(|age| age.parse().ok())
            .unwrap_or_else(|| panic!("{hsts}"));
        assert!(age >= 31_536_000, "{hsts}");
        for inside in ["server", "x-powered-by", "x-sealgate-subject", "keep-alive", "via"] {
            assert_eq!(reply.header(inside), None, "{inside}: {reply:?}");
        }
    }
}
