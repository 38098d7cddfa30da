//! Access tokens: signed JWTs of type `at+jwt` (RFC 9068), ES256.

use std::path::Path;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use sealgate_keys::SigningKey;
use serde::Serialize;
use serde_json::json;

use crate::options::Options;
use crate::wire::Name;

/// Signs tokens, with the one key that the JWKS tells.
pub(crate) struct Tokens {
    key: SigningKey,
    issuer: String,
    audience: String,
    lifetime: u64,
    jwks: Vec<u8>,
}

/// What a token says about its bearer.
pub(crate) struct Grant<'a> {
    pub(crate) user: &'a Name,
    pub(crate) session: &'a str,
    pub(crate) roles: &'a [&'static str],
    pub(crate) department: &'static str,
    /// How the user was authenticated (RFC 8176), and how strongly.
    pub(crate) methods: &'a [&'static str],
    pub(crate) strength: &'static str,
    /// In seconds; at most [`Tokens::lifetime`].
    pub(crate) lifetime: u64,
}

/// The system's random generator failed, or the signing did.
#[derive(Debug, thiserror::Error)]
#[error("the cryptographic library failed")]
pub(crate) struct SigningFailed;

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: &'a str,
    client_id: &'a str,
    sid: &'a str,
    jti: String,
    iat: u64,
    nbf: u64,
    exp: u64,
    auth_time: u64,
    acr: &'a str,
    amr: &'a [&'static str],
    roles: &'a [&'static str],
    dept: &'a str,
}

impl Tokens {
    /// Loads the signing key, or makes one on first start.
    pub(crate) fn open(path: &Path, options: &Options) -> anyhow::Result<Self> {
        let key = SigningKey::load_or_generate(path).context("cannot use the token signing key")?;
        let jwks = json!({ "keys": [key.public_jwk()] }).to_string().into_bytes();
        Ok(Self {
            key,
            issuer: options.issuer.clone(),
            audience: options.audience.clone(),
            lifetime: options.token_lifetime.into(),
            jwks,
        })
    }

    /// The public keys, as a JWK set (RFC 7517 §5).
    pub(crate) fn jwks(&self) -> &[u8] {
        &self.jwks
    }

    /// The longest and default life of a token, in seconds.
    pub(crate) fn lifetime(&self) -> u64 {
        self.lifetime
    }

    /// A signed token, valid from `now` (Unix seconds).
    pub(crate) fn sign(&self, grant: &Grant<'_>, now: u64) -> Result<String, SigningFailed> {
        let header = json!({ "alg": "ES256", "typ": "at+jwt", "kid": self.key.kid() });
        let claims = Claims {
            iss: &self.issuer,
            aud: &self.audience,
            sub: grant.user.as_str(),
            client_id: "im",
            sid: grant.session,
            jti: random_id()?,
            iat: now,
            nbf: now,
            exp: now.saturating_add(grant.lifetime.min(self.lifetime)),
            auth_time: now,
            acr: grant.strength,
            amr: grant.methods,
            roles: grant.roles,
            dept: grant.department,
        };
        let claims = serde_json::to_vec(&claims).map_err(|_| SigningFailed)?;
        let mut token = URL_SAFE_NO_PAD.encode(header.to_string());
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(claims, &mut token);
        let signature = self.key.sign(token.as_bytes()).map_err(|_| SigningFailed)?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }
}

/// 128 random bits in base64url: an id that cannot be guessed.
pub(crate) fn random_id() -> Result<String, SigningFailed> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| SigningFailed)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
    use serde_json::Value;

    use super::*;

    fn tokens() -> (Tokens, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let options = Options::development(folder.path());
        (Tokens::open(&folder.path().join("key"), &options).unwrap(), folder)
    }

    fn part(token: &str, index: usize) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(token.split('.').nth(index).unwrap()).unwrap()
    }

    fn grant<'a>(user: &'a Name, lifetime: u64) -> Grant<'a> {
        Grant {
            user,
            session: "s1",
            roles: &["user"],
            department: "engineering",
            methods: &["dev"],
            strength: "aal1",
            lifetime,
        }
    }

    #[test]
    fn a_token_verifies_with_the_published_key() {
        let (tokens, _folder) = tokens();
        let user = "alice".parse().unwrap();
        let token = tokens.sign(&grant(&user, 60), 1_000).unwrap();

        let jwks: Value = serde_json::from_slice(tokens.jwks()).unwrap();
        let key = &jwks["keys"][0];
        let header: Value = serde_json::from_slice(&part(&token, 0)).unwrap();
        assert_eq!(header, json!({ "alg": "ES256", "typ": "at+jwt", "kid": key["kid"] }));
        let mut point = vec![4];
        for coordinate in ["x", "y"] {
            point.extend(URL_SAFE_NO_PAD.decode(key[coordinate].as_str().unwrap()).unwrap());
        }
        let signed = token.rsplit_once('.').unwrap().0;
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point);
        assert!(key.verify(signed.as_bytes(), &part(&token, 2)).is_ok());
        assert!(key.verify(format!("{signed}x").as_bytes(), &part(&token, 2)).is_err());

        let claims: Value = serde_json::from_slice(&part(&token, 1)).unwrap();
        assert_eq!(claims["sub"], "alice");
        assert_eq!(claims["aud"], "sealgate");
        assert_eq!((&claims["nbf"], &claims["exp"]), (&json!(1_000), &json!(1_060)));
    }

    #[test]
    fn no_token_lives_longer_than_the_limit() {
        let (tokens, _folder) = tokens();
        let user = "alice".parse().unwrap();
        let token = tokens.sign(&grant(&user, u64::MAX), 1_000).unwrap();
        let claims: Value = serde_json::from_slice(&part(&token, 1)).unwrap();
        assert_eq!(claims["exp"], 1_000 + 3_600);
    }

    #[test]
    fn a_second_start_keeps_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options::development(folder.path());
        let open = || Tokens::open(&folder.path().join("key"), &options).unwrap().jwks().to_vec();
        assert_eq!(open(), open());
    }
}
