//! Attacks on tokens (tests/attacks/tokens.toml), each over HTTP and over WebSocket upgrades, each with the answer it
//! must get; the backend sees none of them.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256,
    RsaEncoding, RsaKeyPair, RsaPublicKeyComponents,
};
use sealgate_tests::{Bundle, Gateway, Reply, TokenIssuer, changed_object, filled, now};
use serde::Deserialize;
use serde_json::{Value, json};

const RULES: &str = r#"
[session]
skew = "0s"

[[issuer]]
name = "rsa"
issuer = "https://rsa.test"
audience = ["sealgate"]
algorithms = ["RS256"]
jwks = "file:${state}/jwks.json"

[[issuer]]
name = "ed"
issuer = "https://ed.test"
audience = ["sealgate"]
algorithms = ["EdDSA"]
jwks = "file:${state}/jwks.json"

[[issuer]]
name = "p384"
issuer = "https://p384.test"
audience = ["sealgate"]
algorithms = ["ES384"]
jwks = "file:${state}/jwks.json"

[[issuer]]
name = "pss"
issuer = "https://pss.test"
audience = ["sealgate"]
algorithms = ["PS256"]
jwks = "file:${state}/jwks.json"

[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"
query = {}

[[websocket]]
name = "socket"
path = "/ws/echo"
upstream = "backend"
query = {}
"#;

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
    token: Option<String>,
    send: Option<Vec<String>>,
    query: Option<String>,
    only: Option<String>,
}

/// Where a case's fields go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Http,
    Upgrade,
    /// An upgrade with the token in the list of subprotocols.
    Subprotocol,
}

#[test]
fn a3_every_attack_on_tokens_gets_its_answer_and_reaches_nobody() {
    let list = include_str!("../attacks/tokens.toml");
    let list: List = toml::from_str(list).unwrap_or_else(|error| panic!("tokens.toml: {error}"));
    let bundle = Bundle::new(RULES);
    let keys = Keys::new(&bundle.issuer);
    std::fs::write(bundle.state().join("jwks.json"), keys.jwks().to_string()).unwrap();
    let gateway = Gateway::run(&bundle);

    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    let mut refusals: BTreeMap<String, Value> = BTreeMap::new();
    let (mut attacks, mut passing) = (0, 0);
    for group in &list.group {
        let passes = group.expect == "200";
        for case in &group.cases {
            let name = format!("{}: {}", group.about, case.name);
            assert!(names.insert(name.clone()), "{name} stands twice");
            assert!(!case.source.as_ref().unwrap_or(&group.source).is_empty(), "{name} has no source");
            *(if passes { &mut passing } else { &mut attacks }) += 1;
            for way in case.ways() {
                // Made anew, so that `<now>` is now.
                let fields = case.fields(&keys, way);
                let before = bundle.upstream.seen().len();
                let reply = ask(&gateway, way, case.query.as_deref().map(|it| keys.filled(it)), &fields);
                let reached = bundle.upstream.seen().len() - before;
                let answer = if passes {
                    let status = if way == Way::Http { 200 } else { 101 };
                    (reply.status != status || reached != 1).then(|| format!("status {}", reply.status))
                } else {
                    refused_otherwise(&group.expect, &reply, &mut refusals)
                        .or_else(|| (reached > 0).then(|| "the backend saw it".to_owned()))
                };
                faults.extend(answer.map(|answer| format!("{name}, {way:?}: {answer}")));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert!(attacks >= 150 && passing >= 10, "{attacks} attacks, {passing} that pass");
    // And the door still opens.
    assert_eq!(gateway.curl("/mine").token(&bundle.issuer.token("alice")).send().status, 200);
}

/// What is wrong with a refusal: another status or reason, a challenge that is none, or one that tells more than others.
fn refused_otherwise(expect: &str, reply: &Reply, seen: &mut BTreeMap<String, Value>) -> Option<String> {
    let (status, reason) = expect.split_once(' ').expect("`expect` is status and reason");
    let Ok(mut problem) = serde_json::from_str::<Value>(&reply.body) else {
        return Some(format!("no problem document: {reply:?}"));
    };
    let said = problem["type"].as_str().and_then(|it| it.strip_prefix("urn:sealgate:problem:"));
    if reply.status.to_string() != status || said != Some(reason) {
        return Some(format!("answered {} {said:?}", reply.status));
    }
    let challenge = reply.header("www-authenticate");
    let fits = match reason {
        // RFC 6750 §3.1: no error code for a request that brought no token.
        "token-missing" => challenge.is_some_and(|it| it.starts_with("Bearer ") && !it.contains("error=")),
        "token-twice" => challenge.is_some_and(|it| it.contains("error=\"invalid_request\"")),
        _ => challenge.is_some_and(|it| it.starts_with("Bearer ") && it.contains("error=\"invalid_token\"")),
    };
    if !fits {
        return Some(format!("challenge {challenge:?}"));
    }
    problem["instance"] = Value::Null;
    let first = seen.entry(expect.to_owned()).or_insert_with(|| problem.clone());
    (*first != problem).then(|| format!("told apart from the others: {problem}"))
}

fn ask(gateway: &Gateway, way: Way, query: Option<String>, fields: &[String]) -> Reply {
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    let lines: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
    let mut wire = gateway.wire();
    if way == Way::Http {
        wire.send(format!(
            "GET /mine{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n"
        ));
        return wire.response().expect("an answer");
    }
    wire.upgrade(&format!("/ws/echo{query}"), &lines)
}

impl Case {
    fn ways(&self) -> Vec<Way> {
        let all = [Way::Http, Way::Upgrade, Way::Subprotocol];
        let wanted = |way: &Way| match self.only.as_deref() {
            None => self.send.is_none() || *way != Way::Subprotocol,
            Some("http") => *way == Way::Http,
            Some("websocket") => *way == Way::Upgrade,
            Some(other) => panic!("{}: only {other}?", self.name),
        };
        all.into_iter().filter(wanted).collect()
    }

    fn fields(&self, keys: &Keys, way: Way) -> Vec<String> {
        let token = self.token(keys);
        match &self.send {
            Some(fields) => {
                fields.iter().map(|field| keys.filled(field).replace("<token>", &token)).collect()
            }
            None if way == Way::Subprotocol => {
                vec![format!("Sec-WebSocket-Protocol: sealgate.bearer.{token}")]
            }
            None => vec![format!("Authorization: Bearer {token}")],
        }
    }

    fn token(&self, keys: &Keys) -> String {
        let key = self.key.as_deref().unwrap_or("key-1");
        let text = |whole: &Option<String>, changes: &Option<String>, without: &[String], good: &Value| {
            changed_object(good, changes.as_deref(), without, whole.as_deref(), |text| keys.filled(text))
        };
        let header = text(&self.header_text, &self.header, &self.header_without, &keys.header(key));
        let claims = text(&self.claims_text, &self.claims, &self.claims_without, &good_claims("alice"));
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = keys.sign(key, &signed);
        let signature = match self.signature.as_deref() {
            None => encode(signature),
            Some(change) => changed(&signature, change, keys, &self.name),
        };
        let parts = self.token.as_deref().unwrap_or("<header>.<claims>.<signature>");
        parts
            .replace("<header>", &encode(&header))
            .replace("<claims>", &encode(&claims))
            .replace("<signature>", &signature)
    }
}

fn good_claims(subject: &str) -> Value {
    let now = now();
    json!({
        "iss": "https://issuer.test", "aud": "sealgate", "sub": subject, "sid": "s-1", "jti": "t-1",
        "iat": now, "nbf": now, "exp": now + 300, "roles": ["user"], "client_id": "tests",
    })
}

/// What becomes of a signature; as base64url, since two of the changes are of that.
fn changed(signature: &[u8], change: &str, keys: &Keys, name: &str) -> String {
    let (r, s) = signature.split_at(signature.len() / 2);
    let both = |r: &[u8], s: &[u8]| [r, s].concat();
    let order = hex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551");
    let prime = hex("ffffffff00000001000000000000000000000000ffffffffffffffffffffffff");
    let zero = [0; 32];
    let one = hex("0000000000000000000000000000000000000000000000000000000000000001");
    let last_of = |token: String| token.rsplit('.').next().expect("a part").to_owned();
    let bytes = match change {
        "zero" => vec![0; 64],
        "r-zero" => both(&zero, s),
        "s-zero" => both(r, &zero),
        "order" => both(&order, &order),
        "r-order" => both(&order, s),
        "s-order" => both(r, &order),
        "s-order-plus-one" => both(r, &sum(&order, &one)),
        "one" => both(&one, &one),
        "one-zero" => both(&one, &zero),
        "prime" => both(&prime, &prime),
        "ones" => vec![0xff; 64],
        "exchanged" => both(s, r),
        "s-negated" => both(r, &difference(&order, s)),
        "r-negated" => both(&difference(&order, r), s),
        "short" => signature[..signature.len() - 1].to_vec(),
        "long" => both(signature, &[0]),
        "zero-in-front" => both(&[0], signature),
        "one-byte" => vec![1],
        "doubled" => both(signature, signature),
        "flip-first" => [&[signature[0] ^ 1], &signature[1..]].concat(),
        "flip-last" => {
            let (last, rest) = signature.split_last().expect("a byte");
            [rest, &[last ^ 1]].concat()
        }
        "der" => {
            let integer = |half: &[u8]| {
                let value: Vec<u8> = half.iter().copied().skip_while(|byte| *byte == 0).collect();
                let sign = if value[0] & 0x80 == 0 { &[][..] } else { &[0] };
                [&[2, (value.len() + sign.len()) as u8][..], sign, &value].concat()
            };
            let inner = both(&integer(r), &integer(s));
            both(&[0x30, inner.len() as u8], &inner)
        }
        "rsa-zero" => vec![0; 256],
        "rsa-one" => both(&[0; 255], &[1]),
        "ed-s-plus-order" => {
            // RFC 8032 §5.1: the group's order; numbers are little-endian there.
            let order = hex("1000000000000000000000000000000014def9dea2f79cd65812631a5cf5d3ed");
            let mut scalar = s.to_vec();
            scalar.reverse();
            let mut scalar = sum(&scalar, &order);
            scalar.reverse();
            both(r, &scalar)
        }
        "of-good" => return last_of(keys.good("alice")),
        "of-bob" => return last_of(keys.good("bob")),
        "unused-bits" => {
            // 64 bytes leave four unused bits in the last character; only zeros are canonical (RFC 4648 §3.5).
            let text = encode(signature);
            let (rest, last) = text.split_at(text.len() - 1);
            return format!("{rest}{}", char::from(last.as_bytes()[0] + 1));
        }
        other => panic!("{name}: signature {other}?"),
    };
    encode(bytes)
}

/// `a - b` of big-endian numbers of one length, `a` the greater.
fn difference(a: &[u8], b: &[u8]) -> Vec<u8> {
    let mut result = vec![0; a.len()];
    let mut borrow = 0;
    for at in (0..a.len()).rev() {
        let value = i16::from(a[at]) - i16::from(b[at]) - borrow;
        borrow = i16::from(value < 0);
        result[at] = value.rem_euclid(256) as u8;
    }
    assert_eq!(borrow, 0, "b is greater");
    result
}

/// `a + b` of big-endian numbers of one length, which must hold it.
fn sum(a: &[u8], b: &[u8]) -> Vec<u8> {
    let mut result = vec![0; a.len()];
    let mut carry = 0;
    for at in (0..a.len()).rev() {
        let value = u16::from(a[at]) + u16::from(b[at]) + carry;
        carry = value >> 8;
        result[at] = value as u8;
    }
    assert_eq!(carry, 0, "too long");
    result
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Everybody's keys.
struct Keys<'a> {
    /// `key-1`: its tokens are good.
    issuer: &'a TokenIssuer,
    /// Another key under that name, unknown to the gateway.
    stranger: TokenIssuer,
    /// A second key for ES256, so that a token without `kid` means neither.
    second: TokenIssuer,
    rsa: RsaKeyPair,
    rsa_pem: String,
    p384: EcdsaKeyPair,
    ed: Ed25519KeyPair,
    random: SystemRandom,
}

impl Keys<'_> {
    fn new(issuer: &TokenIssuer) -> Keys<'_> {
        let random = SystemRandom::new();
        let rsa =
            rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        let kind = &ECDSA_P384_SHA384_FIXED_SIGNING;
        let p384 = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        let ed = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        Keys {
            issuer,
            stranger: TokenIssuer::new(issuer.kid()),
            second: TokenIssuer::new("key-3"),
            rsa_pem: rsa.public_key_pem(),
            rsa: RsaKeyPair::from_pkcs8(&rsa.serialize_der()).unwrap(),
            p384: EcdsaKeyPair::from_pkcs8(kind, p384.as_ref(), &random).unwrap(),
            ed: Ed25519KeyPair::from_pkcs8(ed.as_ref()).unwrap(),
            random,
        }
    }

    /// What the gateway reads. The right key stands there once more for encryption, which must not verify.
    fn jwks(&self) -> Value {
        let rsa = RsaPublicKeyComponents::<Vec<u8>>::from(self.rsa.public());
        let (x, y) = self.p384.public_key().as_ref()[1..].split_at(48);
        let mut encryption = self.issuer.jwk();
        encryption["kid"] = "enc-1".into();
        encryption["use"] = "enc".into();
        json!({ "keys": [
            self.issuer.jwk(),
            self.second.jwk(),
            { "kty": "RSA", "kid": "rsa-1", "use": "sig", "n": encode(&rsa.n), "e": encode(&rsa.e) },
            { "kty": "EC", "kid": "p384-1", "crv": "P-384", "use": "sig", "x": encode(x), "y": encode(y) },
            { "kty": "OKP", "kid": "ed-1", "crv": "Ed25519", "use": "sig", "x": encode(self.ed.public_key()) },
            encryption,
        ]})
    }

    fn header(&self, key: &str) -> Value {
        let (algorithm, kid) = match key {
            "rsa-1" => ("RS256", "rsa-1"),
            "rsa-1-pss" => ("PS256", "rsa-1"),
            "p384-1" => ("ES384", "p384-1"),
            "ed-1" => ("EdDSA", "ed-1"),
            _ => ("ES256", "key-1"),
        };
        json!({ "alg": algorithm, "typ": "at+jwt", "kid": kid })
    }

    fn sign(&self, key: &str, signed: &str) -> Vec<u8> {
        let message = signed.as_bytes();
        let rsa = |encoding: &'static dyn RsaEncoding| {
            let mut signature = vec![0; self.rsa.public().modulus_len()];
            self.rsa.sign(encoding, &self.random, message, &mut signature).unwrap();
            signature
        };
        let hmac = |key: &[u8]| {
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
            ring::hmac::sign(&key, message).as_ref().to_vec()
        };
        match key {
            "key-1" => self.issuer.sign_text(signed),
            "stranger" => self.stranger.sign_text(signed),
            "rsa-1" => rsa(&RSA_PKCS1_SHA256),
            "rsa-1-pss" => rsa(&RSA_PSS_SHA256),
            "p384-1" => self.p384.sign(&self.random, message).unwrap().as_ref().to_vec(),
            "ed-1" => self.ed.sign(message).as_ref().to_vec(),
            "hmac-jwk" => hmac(self.issuer.jwk().to_string().as_bytes()),
            "hmac-x" => hmac(&URL_SAFE_NO_PAD.decode(self.issuer.jwk()["x"].as_str().unwrap()).unwrap()),
            "hmac-pem" => hmac(self.pem().as_bytes()),
            "hmac-rsa-pem" => hmac(self.rsa_pem.as_bytes()),
            "hmac-kid" => hmac(b"key-1"),
            "hmac-empty" => hmac(b""),
            other => panic!("key {other}?"),
        }
    }

    /// The public key as SubjectPublicKeyInfo (RFC 5480 §2).
    fn pem(&self) -> String {
        let jwk = self.issuer.jwk();
        let part = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
        let head = hex("3059301306072a8648ce3d020106082a8648ce3d03010703420004");
        let der = [head, part("x"), part("y")].concat();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der))
    }

    fn good(&self, subject: &str) -> String {
        self.issuer.sign(&self.header("key-1"), &good_claims(subject))
    }

    /// Puts in what stands between `<` and `>`: times, repetitions, keys, good tokens.
    fn filled(&self, text: &str) -> String {
        filled(text, &["header", "claims", "token"], |word| match word {
            "good" => Some(self.good("alice")),
            "bob" => Some(self.good("bob")),
            "stranger" => Some(self.stranger.jwk().to_string()),
            "key-1" => Some(self.issuer.jwk().to_string()),
            _ => None,
        })
    }
}
