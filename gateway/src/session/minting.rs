//! Keys and tokens made in memory, for tests.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
    RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaKeyPair, RsaPublicKeyComponents,
};
use sealgate_policy::{Algorithm, ClaimNames, Issuer, JwksSource, Sender};
use serde_json::{Value, json};

/// The time of all tests, in unix seconds.
pub(super) const NOW: u64 = 1_800_000_000;

pub(super) const ISSUER: &str = "https://id.example";

/// An issuer's key.
pub(super) struct Mint {
    id: String,
    algorithm: &'static str,
    pair: Pair,
}

enum Pair {
    Ec(EcdsaKeyPair, &'static str),
    Ed(Ed25519KeyPair),
    Rsa(Box<RsaKeyPair>),
}

impl Mint {
    pub(super) fn es256(id: &str) -> Self {
        let (kind, rng) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(kind, &rng).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &rng).unwrap();
        Mint { id: id.to_owned(), algorithm: "ES256", pair: Pair::Ec(pair, "P-256") }
    }

    pub(super) fn es384(id: &str) -> Self {
        let (kind, rng) = (&ECDSA_P384_SHA384_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(kind, &rng).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &rng).unwrap();
        Mint { id: id.to_owned(), algorithm: "ES384", pair: Pair::Ec(pair, "P-384") }
    }

    pub(super) fn eddsa(id: &str) -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
        Mint { id: id.to_owned(), algorithm: "EdDSA", pair: Pair::Ed(pair) }
    }

    /// 2048 bits; signs RS256, and PS256 where a header says so.
    pub(super) fn rsa(id: &str) -> Self {
        let made =
            rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        let pair = RsaKeyPair::from_pkcs8(&made.serialize_der()).unwrap();
        Mint { id: id.to_owned(), algorithm: "RS256", pair: Pair::Rsa(Box::new(pair)) }
    }

    pub(super) fn jwk(&self) -> Value {
        let mut jwk = match &self.pair {
            Pair::Ec(pair, curve) => {
                let (x, y) =
                    pair.public_key().as_ref()[1..].split_at((pair.public_key().as_ref().len() - 1) / 2);
                json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)})
            }
            Pair::Ed(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": encode(pair.public_key().as_ref())})
            }
            Pair::Rsa(pair) => {
                let parts = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({"kty": "RSA", "n": encode(&parts.n), "e": encode(&parts.e)})
            }
        };
        jwk["kid"] = self.id.as_str().into();
        jwk["use"] = "sig".into();
        jwk
    }

    pub(super) fn header(&self) -> Value {
        json!({"alg": self.algorithm, "typ": "at+jwt", "kid": self.id})
    }

    /// A token with the usual header.
    pub(super) fn token(&self, claims: &Value) -> String {
        self.token_of(&self.header().to_string(), &claims.to_string())
    }

    /// A token of any two texts, signed over them as they are, by the algorithm that the header names if the key can.
    pub(super) fn token_of(&self, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", encode(header.as_bytes()), encode(claims.as_bytes()));
        let signature = self.sign(signed.as_bytes(), header.contains("PS256"));
        format!("{signed}.{}", encode(&signature))
    }

    pub(super) fn sign(&self, message: &[u8], pss: bool) -> Vec<u8> {
        let rng = SystemRandom::new();
        match &self.pair {
            Pair::Ec(pair, _) => pair.sign(&rng, message).unwrap().as_ref().to_vec(),
            Pair::Ed(pair) => pair.sign(message).as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let padding: &dyn ring::signature::RsaEncoding =
                    if pss { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(padding, &rng, message, &mut signature).unwrap();
                signature
            }
        }
    }
}

pub(super) fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

pub(super) fn jwks(mints: &[&Mint]) -> String {
    json!({"keys": mints.iter().map(|mint| mint.jwk()).collect::<Vec<_>>()}).to_string()
}

/// Claims that verify at [`NOW`], for five minutes.
pub(super) fn claims() -> Value {
    json!({
        "iss": ISSUER, "aud": "sealgate", "sub": "alice", "exp": NOW + 300, "iat": NOW, "nbf": NOW,
        "jti": "t-1", "sid": "s-1", "roles": ["user", "auditor"], "dept": "sales", "device_id": "phone-1",
        "acr": "mfa", "amr": ["pwd", "otp"], "auth_time": NOW - 10,
    })
}

/// The claims with one of them changed, or without it.
pub(super) fn with(name: &str, value: Option<Value>) -> Value {
    let mut claims = claims();
    match value {
        Some(value) => claims[name] = value,
        None => drop(claims.as_object_mut().unwrap().remove(name)),
    }
    claims
}

/// An issuer of ES256 tokens without any tolerance of time, and keys in that file.
pub(super) fn issuer(keys: impl Into<PathBuf>) -> Issuer {
    Issuer {
        name: "example".into(),
        issuer: ISSUER.to_owned(),
        audience: vec!["sealgate".to_owned(), "sealgate-admin".to_owned()],
        algorithms: vec![Algorithm::ES256],
        types: vec!["at+jwt".to_owned()],
        jwks: JwksSource::File(keys.into()),
        refresh: Duration::from_secs(300),
        skew: Duration::ZERO,
        max_token_bytes: 8192,
        sender: Sender::Any,
        claims: ClaimNames {
            subject: "sub".to_owned(),
            session: "sid".to_owned(),
            roles: "roles".to_owned(),
            department: "dept".to_owned(),
            device: "device_id".to_owned(),
        },
    }
}
