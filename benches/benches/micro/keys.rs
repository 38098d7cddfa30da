//! Issuers' keys of every algorithm, and tokens by them.

use std::path::Path;

use anyhow::{Result, anyhow};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
    KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair, RsaPublicKeyComponents,
};
use serde_json::{Value, json};

/// All that an issuer may sign by.
pub(crate) const ALGORITHMS: [&str; 5] = ["ES256", "ES384", "EdDSA", "RS256", "PS256"];

/// A key that signs by one algorithm; 2048 bits if it is RSA's.
pub(crate) struct Key {
    pub(crate) algorithm: &'static str,
    pair: Pair,
    random: SystemRandom,
}

enum Pair {
    Ec(EcdsaKeyPair, &'static str),
    Ed(Ed25519KeyPair),
    Rsa(Box<RsaKeyPair>, &'static dyn RsaEncoding),
}

impl Key {
    pub(crate) fn generate(algorithm: &'static str) -> Result<Self> {
        let random = SystemRandom::new();
        let failed = |_| anyhow!("no key for {algorithm}");
        let ec = |kind, curve| {
            let document = EcdsaKeyPair::generate_pkcs8(kind, &random).map_err(failed)?;
            let pair = EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random);
            anyhow::Ok(Pair::Ec(pair.map_err(|error| anyhow!("{error}"))?, curve))
        };
        let rsa = |padding| {
            let made = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)?;
            let pair = RsaKeyPair::from_pkcs8(&made.serialize_der()).map_err(|error| anyhow!("{error}"))?;
            anyhow::Ok(Pair::Rsa(Box::new(pair), padding))
        };
        let pair = match algorithm {
            "ES256" => ec(&ECDSA_P256_SHA256_FIXED_SIGNING, "P-256")?,
            "ES384" => ec(&ECDSA_P384_SHA384_FIXED_SIGNING, "P-384")?,
            "RS256" => rsa(&RSA_PKCS1_SHA256)?,
            "PS256" => rsa(&RSA_PSS_SHA256)?,
            _ => {
                let document = Ed25519KeyPair::generate_pkcs8(&random).map_err(failed)?;
                let pair = Ed25519KeyPair::from_pkcs8(document.as_ref());
                Pair::Ed(pair.map_err(|error| anyhow!("{error}"))?)
            }
        };
        Ok(Self { algorithm, pair, random })
    }

    /// The members that RFC 7638 hashes.
    pub(crate) fn jwk(&self) -> Value {
        match &self.pair {
            Pair::Ec(pair, curve) => {
                let point = pair.public_key().as_ref().get(1..).unwrap_or_default();
                let (x, y) = point.split_at(point.len() / 2);
                json!({ "crv": curve, "kty": "EC", "x": encode(x), "y": encode(y) })
            }
            Pair::Ed(pair) => json!({ "crv": "Ed25519", "kty": "OKP", "x": encode(pair.public_key()) }),
            Pair::Rsa(pair, _) => {
                let parts = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({ "e": encode(&parts.e), "kty": "RSA", "n": encode(&parts.n) })
            }
        }
    }

    pub(crate) fn sign(&self, mut header: Value, claims: &Value) -> Result<String> {
        if let Some(header) = header.as_object_mut() {
            header.insert("alg".to_owned(), self.algorithm.into());
        }
        let signed = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let failed = |_| anyhow!("{} does not sign", self.algorithm);
        let signature = match &self.pair {
            Pair::Ec(pair, _) => {
                pair.sign(&self.random, signed.as_bytes()).map_err(failed)?.as_ref().to_vec()
            }
            Pair::Ed(pair) => pair.sign(signed.as_bytes()).as_ref().to_vec(),
            Pair::Rsa(pair, padding) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(*padding, &self.random, signed.as_bytes(), &mut signature).map_err(failed)?;
                signature
            }
        };
        Ok(format!("{signed}.{}", encode(signature)))
    }
}

pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// Writes the keys as the set that issuers of a policy name, each under its algorithm as its id.
pub(crate) fn write(keys: &[Key], path: &Path) -> Result<()> {
    let with_id = |key: &Key| {
        let mut jwk = key.jwk();
        if let Some(members) = jwk.as_object_mut() {
            members.insert("kid".to_owned(), key.algorithm.into());
            members.insert("alg".to_owned(), key.algorithm.into());
        }
        jwk
    };
    let set: Vec<Value> = keys.iter().map(with_id).collect();
    Ok(std::fs::write(path, json!({ "keys": set }).to_string())?)
}
