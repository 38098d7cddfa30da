//! Tokens, good and bad, signed by a key of the test's own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::{Value, json};

/// An ES256 issuer whose `iss` is `https://issuer.test`.
pub struct TokenIssuer {
    key: EcdsaKeyPair,
    kid: String,
    random: SystemRandom,
}

impl TokenIssuer {
    /// A new key under the id `kid`.
    pub fn new(kid: &str) -> TokenIssuer {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random)
            .expect("its parse");
        TokenIssuer { key, kid: kid.to_owned(), random }
    }

    /// The key set that a gateway reads.
    pub fn jwks(&self) -> Value {
        json!({ "keys": [self.jwk()] })
    }

    /// Its public key (RFC 7517).
    pub fn jwk(&self) -> Value {
        let point = self.key.public_key().as_ref();
        json!({
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid,
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..65]),
        })
    }

    /// A token as it should be: for `subject`, an hour from now.
    pub fn token(&self, subject: &str) -> String {
        self.with(subject, json!({}))
    }

    /// A good token for `subject` but for the claims given; `null` removes one.
    pub fn with(&self, subject: &str, changes: Value) -> String {
        let now = now();
        let mut claims = json!({
            "iss": "https://issuer.test", "aud": "sealgate", "sub": subject, "sid": format!("session-of-{subject}"),
            "jti": format!("{subject}-{now}"), "iat": now, "nbf": now, "exp": now + 3600, "roles": ["user"],
            "client_id": "tests",
        });
        for (name, value) in changes.as_object().expect("claims are an object") {
            match value {
                Value::Null => claims.as_object_mut().expect("an object").remove(name),
                value => claims.as_object_mut().expect("an object").insert(name.clone(), value.clone()),
            };
        }
        self.sign(&json!({ "alg": "ES256", "typ": "at+jwt", "kid": self.kid }), &claims)
    }

    /// Signs whatever it is given, whatever `alg` it claims.
    pub fn sign(&self, header: &Value, claims: &Value) -> String {
        self.sign_bytes(header.to_string().as_bytes(), claims.to_string().as_bytes())
    }

    /// As [`TokenIssuer::sign`], for what is perhaps no JSON.
    pub fn sign_bytes(&self, header: &[u8], claims: &[u8]) -> String {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = self.sign_text(&signed);
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// The bare signature over a text: `R || S` (RFC 7518 §3.4).
    pub fn sign_text(&self, text: &str) -> Vec<u8> {
        self.key.sign(&self.random, text.as_bytes()).expect("a signature").as_ref().to_vec()
    }

    /// The key id in its tokens.
    pub fn kid(&self) -> &str {
        &self.kid
    }
}

/// Who holds a key that tokens are bound to (DPoP, RFC 9449).
pub struct Holder {
    /// The key.
    pub key: TokenIssuer,
}

impl Holder {
    /// With a new key.
    #[expect(clippy::new_without_default, reason = "each is another")]
    pub fn new() -> Holder {
        Holder { key: TokenIssuer::new("of-the-client") }
    }

    /// The public key as proofs show it.
    pub fn jwk(&self) -> Value {
        let mut jwk = self.key.jwk();
        let members = |name: &str| matches!(name, "kty" | "crv" | "x" | "y");
        jwk.as_object_mut().expect("an object").retain(|name, _| members(name));
        jwk
    }

    /// RFC 7638.
    pub fn thumbprint(&self) -> String {
        let jwk = self.jwk();
        let text = format!(r#"{{"crv":"P-256","kty":"EC","x":{},"y":{}}}"#, jwk["x"], jwk["y"]);
        URL_SAFE_NO_PAD.encode(digest(&SHA256, text.as_bytes()))
    }

    /// A token of `alice`, bound to the key.
    pub fn token(&self, issuer: &TokenIssuer) -> String {
        issuer.with("alice", json!({ "cnf": { "jkt": self.thumbprint() } }))
    }

    /// A proof's header, as it should be.
    pub fn header(&self) -> Value {
        json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": self.jwk() })
    }

    /// A proof's claims, as they should be.
    pub fn claims(url: &str, method: &str, token: &str) -> Value {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        json!({
            "jti": format!("proof-{}", NEXT.fetch_add(1, Ordering::Relaxed)), "htm": method, "htu": url, "iat": now(),
            "ath": URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes())),
        })
    }

    /// A proof with these claims.
    pub fn proof(&self, claims: &Value) -> String {
        self.key.sign(&self.header(), claims)
    }
}

/// Unix time in seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}
