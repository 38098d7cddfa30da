//! A JSON Web Token, read strictly (RFC 7515, 7519, 8725, 9068).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER;
use sealgate_policy::{Algorithm, Identity, IdentityParts, Issuer, TokenFault};
use serde_json::{Map, Value};

use super::json;
use super::jwks::KeySet;

/// Longest subject, session, token id, role and the like, in bytes.
const MAX_ID_BYTES: usize = 256;

/// Most roles, audiences or authentication methods in one token.
const MAX_LIST: usize = 64;

/// The last second of the year 9999: no date of a token lies beyond.
const LAST_SECOND: u64 = 253_402_300_799;

/// Header fields that would have the token choose its own key or rules (RFC 7515 §4.1). Refused, never followed.
const REFUSED_HEADERS: [&str; 5] = ["jwk", "jku", "x5u", "x5c", "crit"];

/// A token taken apart. Nothing of it is verified.
pub(super) struct Unverified<'a> {
    /// Header and claims as they were signed: `header.claims`.
    signed: &'a str,
    signature: Vec<u8>,
    header: Map<String, Value>,
    claims: Map<String, Value>,
}

impl<'a> Unverified<'a> {
    /// Takes a compact JWS apart: exactly three parts of unpadded, canonical base64url, the first two of them JSON
    /// objects without duplicate keys. The caller has bounded the length.
    ///
    /// # Errors
    /// [`TokenFault::Malformed`].
    pub(super) fn parse(token: &'a str) -> Result<Self, TokenFault> {
        let malformed = TokenFault::Malformed;
        let (signed, signature) = token.rsplit_once('.').ok_or(malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(malformed)?;
        // A fourth part would leave a dot in the claims, which is not base64url.
        Ok(Unverified {
            signed,
            signature: decode(signature).ok_or(malformed)?,
            header: decode(header).and_then(|bytes| json::object(&bytes)).ok_or(malformed)?,
            claims: decode(claims).and_then(|bytes| json::object(&bytes)).ok_or(malformed)?,
        })
    }

    /// Who claims to have issued it; decides only whose rules and keys it is judged by.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims.get("iss")?.as_str()
    }

    /// Verifies header, signature and claims at `now` (unix seconds), in this order, so that nothing that a forger
    /// wrote decides which fault is reported.
    ///
    /// # Errors
    /// The first fault found.
    pub(super) fn verify(self, issuer: &Issuer, keys: &KeySet, now: u64) -> Result<Identity, TokenFault> {
        let algorithm = self.verify_header(issuer)?;
        self.verify_signature(algorithm, keys)?;
        self.verify_claims(issuer, now)
    }

    fn verify_header(&self, issuer: &Issuer) -> Result<Algorithm, TokenFault> {
        if REFUSED_HEADERS.iter().any(|name| self.header.contains_key(*name)) {
            return Err(TokenFault::Key);
        }
        let algorithm = self.header.get("alg").and_then(Value::as_str).and_then(algorithm_named);
        let algorithm = algorithm.filter(|it| issuer.algorithms.contains(it)).ok_or(TokenFault::Algorithm)?;
        let kind = self.header.get("typ").and_then(Value::as_str).ok_or(TokenFault::Type)?;
        if !issuer.types.iter().any(|accepted| media_type(accepted).eq_ignore_ascii_case(media_type(kind))) {
            return Err(TokenFault::Type);
        }
        Ok(algorithm)
    }

    fn verify_signature(&self, algorithm: Algorithm, keys: &KeySet) -> Result<(), TokenFault> {
        let key_id = match self.header.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.as_str()),
            Some(_) => return Err(TokenFault::Malformed),
        };
        let key = keys.find(algorithm, key_id).ok_or(TokenFault::Key)?;
        // The algorithm comes from the pinned list and the key was read for that algorithm, so there is no pair of
        // them to confuse.
        (DEFAULT_PROVIDER.verifier_factory)(&jsonwebtoken_name(algorithm), key)
            .map_err(|_| TokenFault::Key)?
            .verify(self.signed.as_bytes(), &self.signature)
            .map_err(|_| TokenFault::Signature)
    }

    fn verify_claims(&self, issuer: &Issuer, now: u64) -> Result<Identity, TokenFault> {
        if self.issuer() != Some(&issuer.issuer) {
            return Err(TokenFault::Issuer);
        }
        let audience = self.strings("aud")?.ok_or(TokenFault::Audience)?;
        if !audience.iter().any(|it| issuer.audience.contains(it)) {
            return Err(TokenFault::Audience);
        }

        let expires_at = self.date("exp")?.ok_or(TokenFault::Claims)?;
        let issued_at = self.date("iat")?;
        let auth_time = self.date("auth_time")?;
        let not_before = self.date("nbf")?;
        let latest = now.saturating_add(issuer.skew.as_secs());
        if now >= expires_at.saturating_add(issuer.skew.as_secs()) {
            return Err(TokenFault::Expired);
        }
        if [not_before, issued_at, auth_time].into_iter().flatten().any(|date| date > latest) {
            return Err(TokenFault::NotYetValid);
        }
        if [not_before, issued_at].into_iter().flatten().any(|date| date > expires_at) {
            return Err(TokenFault::Claims);
        }

        let names = &issuer.claims;
        Ok(Identity::new(IdentityParts {
            issuer: issuer.issuer.as_str().into(),
            subject: self.id(&names.subject)?.ok_or(TokenFault::Claims)?,
            session: self.id(&names.session)?,
            token_id: self.id("jti")?,
            roles: self.roles(&names.roles)?,
            department: self.id(&names.department)?,
            acr: self.id("acr")?,
            amr: self.array("amr")?.unwrap_or_default(),
            auth_time,
            issued_at,
            expires_at,
        }))
    }

    /// A NumericDate (RFC 7519 §2), in whole seconds; fractions are dropped.
    fn date(&self, name: &str) -> Result<Option<u64>, TokenFault> {
        let Some(value) = self.claims.get(name) else { return Ok(None) };
        let whole = value.as_u64();
        let fraction = || value.as_f64().filter(|it| (0.0..=LAST_SECOND as f64).contains(it)).map(|it| it as u64);
        whole.or_else(fraction).filter(|it| *it <= LAST_SECOND).ok_or(TokenFault::Claims).map(Some)
    }

    /// One string, bounded, not empty, without control characters.
    fn id(&self, name: &str) -> Result<Option<String>, TokenFault> {
        self.claims.get(name).map(id).transpose()
    }

    /// An array of such strings.
    fn array(&self, name: &str) -> Result<Option<Vec<String>>, TokenFault> {
        let Some(value) = self.claims.get(name) else { return Ok(None) };
        let items = value.as_array().filter(|items| items.len() <= MAX_LIST).ok_or(TokenFault::Claims)?;
        items.iter().map(id).collect::<Result<_, _>>().map(Some)
    }

    /// One such string, or an array of them (`aud`, RFC 7519 §4.1.3).
    fn strings(&self, name: &str) -> Result<Option<Vec<String>>, TokenFault> {
        match self.claims.get(name) {
            Some(value @ Value::String(_)) => Ok(Some(vec![id(value)?])),
            _ => self.array(name),
        }
    }

    /// An array of strings, or one string split at blanks (as `scope` is, RFC 8693 §4.2).
    fn roles(&self, name: &str) -> Result<Vec<String>, TokenFault> {
        let Some(Value::String(joined)) = self.claims.get(name) else {
            return Ok(self.array(name)?.unwrap_or_default());
        };
        let roles: Vec<&str> = joined.split(' ').filter(|role| !role.is_empty()).take(MAX_LIST + 1).collect();
        if roles.len() > MAX_LIST {
            return Err(TokenFault::Claims);
        }
        roles.into_iter().map(|role| id(&Value::from(role))).collect()
    }
}

fn id(value: &Value) -> Result<String, TokenFault> {
    let text = value.as_str().ok_or(TokenFault::Claims)?;
    if text.is_empty() || text.len() > MAX_ID_BYTES || text.chars().any(char::is_control) {
        return Err(TokenFault::Claims);
    }
    Ok(text.to_owned())
}

/// The engine refuses padding, foreign characters and trailing bits that are not zero: one spelling for each value.
pub(super) fn decode(part: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(part).ok().filter(|bytes| !bytes.is_empty())
}

fn algorithm_named(name: &str) -> Option<Algorithm> {
    match name {
        "ES256" => Some(Algorithm::ES256),
        "ES384" => Some(Algorithm::ES384),
        "EdDSA" => Some(Algorithm::EdDSA),
        "RS256" => Some(Algorithm::RS256),
        "PS256" => Some(Algorithm::PS256),
        _ => None,
    }
}

fn jsonwebtoken_name(algorithm: Algorithm) -> jsonwebtoken::Algorithm {
    match algorithm {
        Algorithm::ES256 => jsonwebtoken::Algorithm::ES256,
        Algorithm::ES384 => jsonwebtoken::Algorithm::ES384,
        Algorithm::EdDSA => jsonwebtoken::Algorithm::EdDSA,
        Algorithm::RS256 => jsonwebtoken::Algorithm::RS256,
        Algorithm::PS256 => jsonwebtoken::Algorithm::PS256,
    }
}

/// RFC 7515 §4.1.9: `application/` may be left out, and usually is.
fn media_type(name: &str) -> &str {
    const PREFIX: &str = "application/";
    match name.get(..PREFIX.len()) {
        Some(prefix) if prefix.eq_ignore_ascii_case(PREFIX) => name.get(PREFIX.len()..).unwrap_or(name),
        _ => name,
    }
}
