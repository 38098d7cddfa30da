//! Tokens that are bound to a key (DPoP, RFC 9449): they count with a fresh proof for this very request, and only then.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use sealgate_tests::{Bundle, Gateway, Holder, Reply, changed_object, filled};
use serde::Deserialize;
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

/// What is wrong with a refusal: another status or reason, or a challenge that does not say what would help.
fn refused_otherwise(reply: &Reply, reason: &str, error: &str) -> Option<String> {
    let problem: Value = serde_json::from_str(&reply.body).unwrap_or_default();
    if reply.status != 401 || problem["type"] != format!("urn:sealgate:problem:{reason}") {
        return Some(format!("{reply:?}"));
    }
    let challenge = reply.header("www-authenticate").unwrap_or_default();
    let of_proofs = challenge.starts_with("DPoP ") && challenge.contains("algs=\"ES256 ES384 EdDSA\"");
    let fits =
        challenge.contains(&format!("error=\"{error}\"")) && (of_proofs || !reason.starts_with("proof"));
    (!fits).then(|| format!("challenge {challenge}"))
}

#[track_caller]
fn refused(name: &str, reply: &Reply, reason: &str, error: &str) {
    assert_eq!(refused_otherwise(reply, reason, error), None, "{name}");
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
    #[serde(default)]
    nonces: bool,
    expect: String,
    cases: Vec<Case>,
}

/// One case; the file says what its fields mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    source: Option<String>,
    key: Option<String>,
    header: Option<String>,
    #[serde(default)]
    header_without: Vec<String>,
    header_text: Option<String>,
    claims: Option<String>,
    #[serde(default)]
    claims_without: Vec<String>,
    claims_text: Option<String>,
    signature: Option<String>,
    send: Option<Vec<String>>,
    #[serde(default)]
    again: bool,
}

/// What cases are about: a request, and those who ask.
struct Scene<'a> {
    gateway: &'a Gateway,
    path: &'a str,
    holder: Holder,
    thief: Holder,
    token: String,
    of_bob: String,
    nonce: Option<String>,
    nonce_elsewhere: Option<String>,
}

impl Scene<'_> {
    fn good(&self) -> String {
        self.holder.proof(&claims(self.gateway, "GET", self.path, &self.token))
    }

    /// Puts in what stands between `<` and `>`.
    fn filled(&self, text: &str) -> String {
        filled(text, &["header", "claims", "signature", "proof"], |word| {
            Some(match word {
                "url" => self.gateway.url(self.path),
                "authority" => self.gateway.authority().to_owned(),
                "path" => self.path.to_owned(),
                "holder" => self.holder.jwk().to_string(),
                "thief" => self.thief.jwk().to_string(),
                "token" => self.token.clone(),
                "of-bob" => self.of_bob.clone(),
                "ath" => encode(digest(&SHA256, self.token.as_bytes())),
                "ath-of-bob" => encode(digest(&SHA256, self.of_bob.as_bytes())),
                "another" => self.good(),
                "another-signature" => self.good().rsplit('.').next().unwrap().to_owned(),
                "nonce" => self.nonce.clone().unwrap(),
                "nonce-elsewhere" => self.nonce_elsewhere.clone().unwrap(),
                _ => return None,
            })
        })
    }

    fn proof(&self, case: &Case) -> String {
        let text = |whole: &Option<String>, changes: &Option<String>, without: &[String], good: &Value| {
            changed_object(good, changes.as_deref(), without, whole.as_deref(), |text| self.filled(text))
        };
        let good = claims(self.gateway, "GET", self.path, &self.token);
        let header = text(&case.header_text, &case.header, &case.header_without, &self.holder.header());
        let claims = text(&case.claims_text, &case.claims, &case.claims_without, &good);
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = encode(match case.key.as_deref().unwrap_or("holder") {
            "holder" => self.holder.key.sign_text(&signed),
            "thief" => self.thief.key.sign_text(&signed),
            other => panic!("key {other}?"),
        });
        let wanted = self.filled(case.signature.as_deref().unwrap_or("<signature>"));
        format!("{signed}.{}", wanted.replace("<signature>", &signature))
    }

    fn fields(&self, case: &Case) -> Vec<String> {
        let proof = self.proof(case);
        match &case.send {
            Some(fields) => fields.iter().map(|it| self.filled(it).replace("<proof>", &proof)).collect(),
            None => bound(&self.token, &proof),
        }
    }
}

/// What the policy's first nonce is.
fn nonce(gateway: &Gateway, holder: &Holder, token: &str) -> String {
    let proof = holder.proof(&claims(gateway, "GET", "/mine", token));
    let reply = ask(gateway, "/mine", &bound(token, &proof));
    reply.header("dpop-nonce").expect("a nonce").to_owned()
}

#[test]
fn a3_every_attack_on_proofs_gets_its_answer_and_reaches_nobody() {
    let list = include_str!("../attacks/proofs.toml");
    let list: List = toml::from_str(list).unwrap_or_else(|error| panic!("proofs.toml: {error}"));
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    let (mut attacks, mut passing) = (0, 0);
    for nonces in [false, true] {
        let bundle = Bundle::new(&if nonces {
            RULES.replace("max_age = \"30s\"", "max_age = \"30s\"\nnonce = true")
        } else {
            RULES.to_owned()
        });
        let gateway = Gateway::run(&bundle);
        let elsewhere = nonces.then(|| {
            let bundle = Bundle::new(&RULES.replace("max_age = \"30s\"", "nonce = true"));
            let holder = Holder::new();
            nonce(&Gateway::run(&bundle), &holder, &holder.token(&bundle.issuer))
        });
        for path in ["/mine", "/ws/echo"] {
            let holder = Holder::new();
            let token = holder.token(&bundle.issuer);
            let scene = Scene {
                gateway: &gateway,
                path,
                nonce: nonces.then(|| nonce(&gateway, &holder, &token)),
                nonce_elsewhere: elsewhere.clone(),
                thief: Holder::new(),
                of_bob: bundle.issuer.with("bob", json!({ "cnf": { "jkt": holder.thumbprint() } })),
                token,
                holder,
            };
            let opened = if path == "/mine" { 200 } else { 101 };
            for group in list.group.iter().filter(|group| group.nonces == nonces) {
                for case in &group.cases {
                    let name = format!("{}: {}, {path}", group.about, case.name);
                    assert!(names.insert(name.clone()), "{name} stands twice");
                    assert!(
                        !case.source.as_ref().unwrap_or(&group.source).is_empty(),
                        "{name} has no source"
                    );
                    let fields = scene.fields(case);
                    if case.again {
                        assert_eq!(ask(&gateway, path, &fields).status, opened, "{name}, the first time");
                    }
                    let before = bundle.upstream.seen().len();
                    let reply = ask(&gateway, path, &fields);
                    let reached = bundle.upstream.seen().len() - before;
                    let fault = if group.expect == "200" {
                        passing += 1;
                        (reply.status != opened || reached != 1).then(|| format!("{reply:?}"))
                    } else {
                        attacks += 1;
                        let reason = group.expect.strip_prefix("401 ").expect("status and reason");
                        let error = match reason {
                            "proof-invalid" => "invalid_dpop_proof",
                            "proof-nonce" => "use_dpop_nonce",
                            _ => "invalid_token",
                        };
                        refused_otherwise(&reply, reason, error)
                            .or_else(|| (reached > 0).then(|| "the backend saw it".to_owned()))
                    };
                    faults.extend(fault.map(|fault| format!("{name}: {fault}")));
                }
            }
            let good = scene.nonce.as_ref().map_or_else(
                || scene.good(),
                |nonce| {
                    let good = claims(&gateway, "GET", path, &scene.token);
                    scene.holder.proof(&with(good, "nonce", nonce.as_str().into()))
                },
            );
            assert_eq!(ask(&gateway, path, &bound(&scene.token, &good)).status, opened);
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert!(attacks >= 150 && passing >= 16, "{attacks} attacks, {passing} that pass");
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
