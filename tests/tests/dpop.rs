//! Tokens that are bound to a key (DPoP, RFC 9449): they count with a fresh proof for this very request, and only then.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use sealgate_tests::{Bundle, Gateway, Holder, Reply, now};
use serde_json::{Value, json};

const RULES: &str = r#"
[session]
skew = "5s"

[dpop]
max_age = "30s"

[[route]]
name = "mine"
path = "/mine"
methods = ["GET", "POST"]
upstream = "backend"
query = {}

[[route]]
name = "bound"
path = "/bound"
methods = ["GET"]
upstream = "backend"
sender = "dpop"

[[websocket]]
name = "socket"
path = "/ws/echo"
upstream = "backend"
"#;

/// A proof's claims, as they should be.
fn claims(gateway: &Gateway, method: &str, path: &str, token: &str) -> Value {
    Holder::claims(&gateway.url(path), method, token)
}

fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

fn without(mut claims: Value, name: &str) -> Value {
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A GET of `path` over a connection of its own, or an upgrade if it is `/ws/echo`.
fn ask(gateway: &Gateway, path: &str, fields: &[String]) -> Reply {
    let mut lines: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
    let mut wire = gateway.wire();
    let request = if path == "/ws/echo" {
        lines += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n";
        lines += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        lines
    } else {
        lines + "Connection: close\r\n"
    };
    wire.send(format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{request}\r\n", gateway.authority()));
    wire.response().expect("an answer")
}

fn bound(token: &str, proof: &str) -> Vec<String> {
    vec![format!("Authorization: DPoP {token}"), format!("DPoP: {proof}")]
}

/// Asserts a refusal, its reason, and a challenge that says what would help.
fn refused(name: &str, reply: &Reply, reason: &str, error: &str) {
    let problem: Value = serde_json::from_str(&reply.body).unwrap_or_else(|_| panic!("{name}: {reply:?}"));
    let said = (reply.status, problem["type"].as_str().unwrap_or_default());
    assert_eq!(said, (401, &*format!("urn:sealgate:problem:{reason}")), "{name}");
    let challenge = reply.header("www-authenticate").unwrap_or_default();
    assert!(challenge.contains(&format!("error=\"{error}\"")), "{name}: {challenge}");
    if reason.starts_with("proof") {
        assert!(
            challenge.starts_with("DPoP ") && challenge.contains("algs=\"ES256 ES384 EdDSA\""),
            "{challenge}"
        );
    }
}

/// Whether one of its challenges is DPoP's.
fn asks_for_proof(reply: &Reply) -> bool {
    reply.headers.iter().any(|(name, value)| name == "www-authenticate" && value.starts_with("DPoP "))
}

#[test]
fn a3_a_bound_token_counts_with_its_proof_only() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let holder = Holder::new();
    let token = holder.token(&bundle.issuer);
    let proof = |path| holder.proof(&claims(&gateway, "GET", path, &token));

    for path in ["/mine", "/bound"] {
        assert_eq!(ask(&gateway, path, &bound(&token, &proof(path))).status, 200, "{path}");
        let seen = bundle.upstream.last();
        assert_eq!(seen.header("x-sealgate-subject"), Some("alice"));
        assert!(
            seen.header("authorization").is_none() && seen.header("dpop").is_none(),
            "spent here: {seen:?}"
        );
    }
    // The query is no part of what a proof is for (RFC 9449 §4.2).
    assert_eq!(ask(&gateway, "/mine?a=b", &bound(&token, &proof("/mine"))).status, 200);
    assert_eq!(ask(&gateway, "/ws/echo", &bound(&token, &proof("/ws/echo"))).status, 101);
    let as_socket = with(claims(&gateway, "GET", "/", &token), "htu", gateway.ws("/ws/echo").into());
    assert_eq!(ask(&gateway, "/ws/echo", &bound(&token, &holder.proof(&as_socket))).status, 101);
    // Nobody who has no bound token is asked for proof, but where the rule asks.
    let bearer = bundle.issuer.token("bob");
    assert_eq!(gateway.curl("/mine").token(&bearer).send().status, 200);
    let seen = bundle.upstream.seen().len();

    let stolen = ask(&gateway, "/mine", &[format!("Authorization: Bearer {token}")]);
    refused("a bound token as a bearer's", &stolen, "proof-missing", "invalid_token");
    let stolen = ask(&gateway, "/ws/echo", &[format!("Sec-WebSocket-Protocol: sealgate.bearer.{token}")]);
    refused("a bound token as a subprotocol", &stolen, "proof-missing", "invalid_token");
    let fields = [format!("Authorization: Bearer {token}"), format!("DPoP: {}", proof("/mine"))];
    refused(
        "as a bearer's, with a proof (§7.2)",
        &ask(&gateway, "/mine", &fields),
        "proof-missing",
        "invalid_token",
    );
    let fields = [format!("Authorization: DPoP {token}")];
    refused("no proof", &ask(&gateway, "/mine", &fields), "proof-missing", "invalid_token");
    let unbound = bound(&bearer, &holder.proof(&claims(&gateway, "GET", "/mine", &bearer)));
    refused("a token that is not bound", &ask(&gateway, "/mine", &unbound), "token-invalid", "invalid_token");
    let reply = gateway.curl("/bound").token(&bearer).http1().send();
    refused("where the rule wants a bound one", &reply, "token-invalid", "invalid_token");
    assert!(asks_for_proof(&reply), "{reply:?}");
    let reply = gateway.curl("/bound").http1().send();
    assert!(asks_for_proof(&reply), "{reply:?}");
    assert_eq!(bundle.upstream.seen().len(), seen, "the backend sees nothing of that");
}

/// What RFC 9449 §4.3 and §11 name, over HTTP and over an upgrade; the backend sees none of it.
#[test]
fn a3_attacks_on_proofs_reach_nobody() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let (holder, thief) = (Holder::new(), Holder::new());
    let token = holder.token(&bundle.issuer);
    let other_token = bundle.issuer.with("bob", json!({ "cnf": { "jkt": holder.thumbprint() } }));
    for path in ["/mine", "/ws/echo"] {
        let good = || claims(&gateway, "GET", path, &token);
        let header = |name: &str, value: Value| holder.key.sign(&with(holder.header(), name, value), &good());
        let url = |url: String| holder.proof(&with(good(), "htu", url.into()));
        let claim = |name: &str, value: Value| holder.proof(&with(good(), name, value));
        let mut private = holder.jwk();
        private["d"] = encode([1; 32]).into();
        let proof = holder.proof(&good());
        let (signed, signature) = proof.rsplit_once('.').unwrap();
        let cases = [
            ("by a thief's key", thief.proof(&good())),
            ("by a thief's key, with the holder's in it", thief.key.sign(&holder.header(), &good())),
            ("no signature", format!("{signed}.")),
            ("the signature padded", format!("{signed}.{signature}==")),
            (
                "alg none",
                format!("{}.{}.", encode(r#"{"typ":"dpop+jwt","alg":"none"}"#), encode(good().to_string())),
            ),
            ("alg HS256", header("alg", "HS256".into())),
            ("alg RS256", header("alg", "RS256".into())),
            ("typ of an access token", header("typ", "at+jwt".into())),
            ("typ JWT", header("typ", "JWT".into())),
            ("no typ", header("typ", Value::Null)),
            ("no key", header("jwk", Value::Null)),
            ("a private key", header("jwk", private)),
            ("a symmetric key", header("jwk", json!({ "kty": "oct", "k": "AAAA" }))),
            ("a key to be fetched", header("jku", "https://evil.example/jwks.json".into())),
            ("crit", header("crit", json!(["x"]))),
            ("another method", claim("htm", "POST".into())),
            ("the method in small letters", claim("htm", "get".into())),
            ("another path", url(gateway.url("/bound"))),
            ("another host", url(format!("https://evil.example:{}{path}", gateway.port()))),
            ("no port", url(format!("https://localhost{path}"))),
            ("plain http", url(gateway.url(path).replacen("https", "http", 1))),
            ("user information", url(gateway.url(path).replacen("://", "://alice@", 1))),
            ("an encoded slash", url(gateway.url(path).replace(path, "/%2F"))),
            ("too old", claim("iat", (now() - 36).into())),
            ("from the future", claim("iat", (now() + 30).into())),
            ("iat a text", claim("iat", now().to_string().into())),
            ("for another token", claim("ath", encode(digest(&SHA256, other_token.as_bytes())).into())),
            ("ath padded", claim("ath", format!("{}=", encode(digest(&SHA256, token.as_bytes()))).into())),
            ("no ath", holder.proof(&without(good(), "ath"))),
            ("no jti", holder.proof(&without(good(), "jti"))),
            ("no htm", holder.proof(&without(good(), "htm"))),
            ("no htu", holder.proof(&without(good(), "htu"))),
            ("no iat", holder.proof(&without(good(), "iat"))),
            ("jti empty", claim("jti", "".into())),
            ("jti too long", claim("jti", "x".repeat(257).into())),
            ("too long", claim("x", "x".repeat(5000).into())),
            ("the token for a proof", token.clone()),
            ("rubbish", "rubbish".to_owned()),
            ("two proofs in one field", format!("{}, {}", holder.proof(&good()), holder.proof(&good()))),
        ];
        for (name, proof) in &cases {
            let reply = ask(&gateway, path, &bound(&token, proof));
            refused(&format!("{name}, {path}"), &reply, "proof-invalid", "invalid_dpop_proof");
        }
        let mut twice = bound(&token, &holder.proof(&good()));
        twice.push(format!("DPoP: {}", holder.proof(&good())));
        refused("two fields", &ask(&gateway, path, &twice), "proof-invalid", "invalid_dpop_proof");
        // A proof made for one token of one key, sent with another.
        let reply = ask(&gateway, path, &bound(&other_token, &holder.proof(&good())));
        refused("another token of that key", &reply, "proof-invalid", "invalid_dpop_proof");
    }
    assert_eq!(bundle.upstream.seen().len(), 0);
    let good = holder.proof(&claims(&gateway, "GET", "/mine", &token));
    assert_eq!(ask(&gateway, "/mine", &bound(&token, &good)).status, 200);
}

#[test]
fn a3_a_proof_counts_once_over_all_cores_and_reloads() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let holder = Holder::new();
    let token = holder.token(&bundle.issuer);
    let proof = holder.proof(&claims(&gateway, "GET", "/mine", &token));
    assert_eq!(ask(&gateway, "/mine", &bound(&token, &proof)).status, 200);
    // Many connections, so that either core is met.
    for _ in 0..12 {
        let reply = ask(&gateway, "/mine", &bound(&token, &proof));
        refused("a replay", &reply, "proof-invalid", "invalid_dpop_proof");
    }
    bundle.write(&format!("{RULES}\n# another policy\n"));
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    let reply = ask(&gateway, "/mine", &bound(&token, &proof));
    refused("a replay after a reload", &reply, "proof-invalid", "invalid_dpop_proof");
    assert_eq!(bundle.upstream.seen().len(), 1);
    // Of many at once, one.
    let proof = holder.proof(&claims(&gateway, "GET", "/mine", &token));
    let outcomes: Vec<u16> = std::thread::scope(|scope| {
        let asking: Vec<_> =
            (0..8).map(|_| scope.spawn(|| ask(&gateway, "/mine", &bound(&token, &proof)).status)).collect();
        asking.into_iter().map(|it| it.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|status| **status == 200).count(), 1, "{outcomes:?}");
}

#[test]
fn a3_an_issuer_may_demand_bound_tokens_and_a_policy_nonces() {
    let bundle = Bundle::new(&RULES.replace("max_age = \"30s\"", "nonce = true"));
    let strict = std::fs::read_to_string(bundle.policy().join("policy.toml")).unwrap();
    let strict = strict.replacen("[[issuer]]\n", "[[issuer]]\nsender = \"dpop\"\n", 1);
    bundle.write_file("policy.toml", &strict);
    let gateway = Gateway::run(&bundle);
    let holder = Holder::new();
    let reply = gateway.curl("/mine").token(&bundle.issuer.token("alice")).http1().send();
    refused("not bound", &reply, "token-invalid", "invalid_token");

    let token = holder.token(&bundle.issuer);
    let make = |nonce: Option<&str>| {
        let claims = claims(&gateway, "GET", "/mine", &token);
        holder.proof(&nonce.map_or(claims.clone(), |nonce| with(claims, "nonce", nonce.into())))
    };
    let reply = ask(&gateway, "/mine", &bound(&token, &make(None)));
    refused("no nonce", &reply, "proof-nonce", "use_dpop_nonce");
    let nonce = reply.header("dpop-nonce").expect("a nonce").to_owned();
    for bad in ["", "x", &nonce[1..], &format!("{nonce}A"), &nonce.to_ascii_lowercase()] {
        let reply = ask(&gateway, "/mine", &bound(&token, &make(Some(bad))));
        let reason = if bad.is_empty() {
            ("proof-invalid", "invalid_dpop_proof")
        } else {
            ("proof-nonce", "use_dpop_nonce")
        };
        refused(bad, &reply, reason.0, reason.1);
    }
    assert_eq!(bundle.upstream.seen().len(), 0);
    for _ in 0..2 {
        assert_eq!(ask(&gateway, "/mine", &bound(&token, &make(Some(&nonce)))).status, 200);
    }
}
