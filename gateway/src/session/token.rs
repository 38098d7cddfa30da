//! A JSON Web Token, read strictly (RFC 7515, 7519, 8725, 9068).

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER;
use sealgate_policy::{Algorithm, Binding, Identity, IdentityParts, Issuer, Sender, TokenFault};
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

    pub(super) fn header(&self) -> &Map<String, Value> {
        &self.header
    }

    pub(super) fn claims(&self) -> &Map<String, Value> {
        &self.claims
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
        let algorithm = self.verify_header(issuer, |kind| {
            let kinds = &issuer.types;
            kind.is_some_and(|kind| {
                kinds.iter().any(|accepted| media_type(accepted).eq_ignore_ascii_case(media_type(kind)))
            })
        })?;
        let key_id = self.verify_signature(algorithm, keys)?;
        self.verify_claims(issuer, key_id, now)
    }

    /// The algorithm, if it is one of the issuer's and nothing in the header would have the token choose its own rules;
    /// `kinds` judges the type.
    pub(super) fn verify_header(
        &self,
        issuer: &Issuer,
        kinds: impl FnOnce(Option<&str>) -> bool,
    ) -> Result<Algorithm, TokenFault> {
        if REFUSED_HEADERS.iter().any(|name| self.header.contains_key(*name)) {
            return Err(TokenFault::Key);
        }
        let algorithm = self.header.get("alg").and_then(Value::as_str).and_then(algorithm_named);
        let algorithm = algorithm.filter(|it| issuer.algorithms.contains(it)).ok_or(TokenFault::Algorithm)?;
        let kind = self.header.get("typ");
        let kind = kind.map(|kind| kind.as_str().ok_or(TokenFault::Type)).transpose()?;
        if !kinds(kind) {
            return Err(TokenFault::Type);
        }
        Ok(algorithm)
    }

    /// Gives the `kid` of the key that verified it, if the key has one.
    pub(super) fn verify_signature(
        &self,
        algorithm: Algorithm,
        keys: &KeySet,
    ) -> Result<Option<Arc<str>>, TokenFault> {
        let key_id = match self.header.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.as_str()),
            Some(_) => return Err(TokenFault::Malformed),
        };
        let (key, id) = keys.find(algorithm, key_id).ok_or(TokenFault::Key)?;
        self.signed_by(algorithm, key)?;
        Ok(id.cloned())
    }

    /// Verifies the signature. The algorithm comes from a pinned list and the key was read for that algorithm, so there is
    /// no pair of them to confuse.
    pub(super) fn signed_by(&self, algorithm: Algorithm, key: &DecodingKey) -> Result<(), TokenFault> {
        (DEFAULT_PROVIDER.verifier_factory)(&jsonwebtoken_name(algorithm), key)
            .map_err(|_| TokenFault::Key)?
            .verify(self.signed.as_bytes(), &self.signature)
            .map_err(|_| TokenFault::Signature)
    }

    fn verify_claims(
        &self,
        issuer: &Issuer,
        key_id: Option<Arc<str>>,
        now: u64,
    ) -> Result<Identity, TokenFault> {
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
            key_id,
            roles: self.roles(&names.roles)?,
            department: self.id(&names.department)?,
            device: self.id(&names.device)?,
            acr: self.id("acr")?,
            amr: self.array("amr")?.unwrap_or_default(),
            auth_time,
            issued_at,
            expires_at,
            binding: self.binding(issuer)?,
        }))
    }

    /// What the token is bound to (`cnf`, RFC 7800). A token that is bound in no way that we can check is no bearer token
    /// for that.
    fn binding(&self, issuer: &Issuer) -> Result<Binding, TokenFault> {
        let mut binding = Binding::default();
        if let Some(confirmation) = self.claims.get("cnf") {
            let members = confirmation.as_object().ok_or(TokenFault::Claims)?;
            let print = |name: &str| {
                let print = |value: &Value| decode(value.as_str()?)?.try_into().ok();
                members.get(name).map(|value| print(value).ok_or(TokenFault::Claims)).transpose()
            };
            binding = Binding { key: print("jkt")?, certificate: print("x5t#S256")? };
            if binding == Binding::default() {
                return Err(TokenFault::Claims);
            }
        }
        match issuer.sender {
            Sender::Dpop if binding.key.is_none() => Err(TokenFault::Unbound),
            Sender::Mtls if binding.certificate.is_none() => Err(TokenFault::Unbound),
            Sender::Any | Sender::Dpop | Sender::Mtls => Ok(binding),
        }
    }

    /// A NumericDate (RFC 7519 §2), in whole seconds; fractions are dropped.
    pub(super) fn date(&self, name: &str) -> Result<Option<u64>, TokenFault> {
        let Some(value) = self.claims.get(name) else {
            return Ok(None);
        };
        let whole = value.as_u64();
        let fraction =
            || value.as_f64().filter(|it| (0.0..=LAST_SECOND as f64).contains(it)).map(|it| it as u64);
        whole.or_else(fraction).filter(|it| *it <= LAST_SECOND).ok_or(TokenFault::Claims).map(Some)
    }

    pub(super) fn id(&self, name: &str) -> Result<Option<String>, TokenFault> {
        self.claims.get(name).map(id).transpose()
    }

    /// An array of such strings.
    fn array(&self, name: &str) -> Result<Option<Vec<String>>, TokenFault> {
        let Some(value) = self.claims.get(name) else {
            return Ok(None);
        };
        let items = value.as_array().filter(|items| items.len() <= MAX_LIST).ok_or(TokenFault::Claims)?;
        items.iter().map(id).collect::<Result<_, _>>().map(Some)
    }

    /// One such string, or an array of them (`aud`, RFC 7519 §4.1.3).
    pub(super) fn strings(&self, name: &str) -> Result<Option<Vec<String>>, TokenFault> {
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

/// One string, bounded, not empty, without control characters.
pub(super) fn id(value: &Value) -> Result<String, TokenFault> {
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

pub(super) fn algorithm_named(name: &str) -> Option<Algorithm> {
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
pub(super) fn media_type(name: &str) -> &str {
    const PREFIX: &str = "application/";
    match name.get(..PREFIX.len()) {
        Some(prefix) if prefix.eq_ignore_ascii_case(PREFIX) => name.get(PREFIX.len()..).unwrap_or(name),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::super::minting::{ISSUER, Mint, NOW, claims, encode, issuer, jwks, with};
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::Duration;

    fn judged(token: &str, issuer: &Issuer, mints: &[&Mint], now: u64) -> Result<Identity, TokenFault> {
        let keys = KeySet::parse(jwks(mints).as_bytes()).unwrap();
        Unverified::parse(token)?.verify(issuer, &keys, now)
    }

    #[test]
    fn a_good_token_becomes_an_identity() {
        let mint = Mint::es256("k1");
        let identity = judged(&mint.token(&claims()), &issuer(""), &[&mint], NOW).unwrap();
        let expected = Identity::new(IdentityParts {
            issuer: ISSUER.into(),
            subject: "alice".into(),
            session: Some("s-1".into()),
            token_id: Some("t-1".into()),
            key_id: Some("k1".into()),
            roles: vec!["user".into(), "auditor".into()],
            department: Some("sales".into()),
            device: Some("phone-1".into()),
            acr: Some("mfa".into()),
            amr: vec!["pwd".into(), "otp".into()],
            auth_time: Some(NOW - 10),
            issued_at: Some(NOW),
            expires_at: NOW + 300,
            binding: Binding::default(),
        });
        assert_eq!(identity, expected);
    }

    #[test]
    fn every_pinned_algorithm_verifies_and_only_that_one() {
        let (es256, es384, eddsa, rsa) =
            (Mint::es256("k"), Mint::es384("k"), Mint::eddsa("k"), Mint::rsa("k"));
        let all = [&es256, &es384, &eddsa, &rsa];
        let ps256 = json!({"alg": "PS256", "typ": "at+jwt", "kid": "k"}).to_string();
        let tokens = [
            (Algorithm::ES256, es256.token(&claims())),
            (Algorithm::ES384, es384.token(&claims())),
            (Algorithm::EdDSA, eddsa.token(&claims())),
            (Algorithm::RS256, rsa.token(&claims())),
            (Algorithm::PS256, rsa.token_of(&ps256, &claims().to_string())),
        ];
        for (algorithm, _) in &tokens {
            let pinned = Issuer { algorithms: vec![*algorithm], ..issuer("") };
            for (of, token) in &tokens {
                let outcome = judged(token, &pinned, &all, NOW).map(|identity| identity.subject);
                let expected =
                    if of == algorithm { Ok("alice".to_owned()) } else { Err(TokenFault::Algorithm) };
                assert_eq!(outcome, expected, "{of:?} where {algorithm:?} is pinned");
            }
        }
        // A signature of one kind under the name of another.
        let any =
            Issuer { algorithms: tokens.iter().map(|(algorithm, _)| *algorithm).collect(), ..issuer("") };
        let pkcs1_as_pss =
            tokens[3].1.replacen(&encode(rsa.header().to_string().as_bytes()), &encode(ps256.as_bytes()), 1);
        assert_eq!(judged(&pkcs1_as_pss, &any, &all, NOW), Err(TokenFault::Signature));
        let es256_as_es384 = es256.token_of(&es384.header().to_string(), &claims().to_string());
        assert_eq!(judged(&es256_as_es384, &any, &all, NOW), Err(TokenFault::Signature));
    }

    #[test]
    fn what_the_standards_allow_is_accepted() {
        let mint = Mint::es256("k1");
        let header = |name: &str, value: Option<Value>| {
            let mut header = mint.header();
            match value {
                Some(value) => header[name] = value,
                None => drop(header.as_object_mut().unwrap().remove(name)),
            }
            mint.token_of(&header.to_string(), &claims().to_string())
        };
        let claim = |name: &str, value: Option<Value>| mint.token(&with(name, value));
        let good = [
            ("typ in capitals, RFC 2045 5.1", header("typ", Some("AT+JWT".into()))),
            ("typ in full, RFC 7515 4.1.9", header("typ", Some("application/at+jwt".into()))),
            ("no kid, and one key, RFC 7515 4.1.4", header("kid", None)),
            ("a header that nobody knows, RFC 7515 4", header("x-other", Some(json!({"a": [1]})))),
            ("aud as a list, RFC 7519 4.1.3", claim("aud", Some(json!(["other", "sealgate-admin"])))),
            ("exp with a fraction, RFC 7519 2", claim("exp", Some(json!(NOW as f64 + 1.5)))),
            (
                "exp as 1.8e9",
                mint.token_of(
                    &mint.header().to_string(),
                    &claims().to_string().replace(&(NOW + 300).to_string(), "1.8000003e9"),
                ),
            ),
            (
                "no optional claim",
                mint.token(&json!({"iss": ISSUER, "aud": "sealgate", "sub": "a", "exp": NOW + 1})),
            ),
            ("roles in one string", claim("roles", Some("user auditor".into()))),
            ("a claim that nobody knows", claim("x", Some(json!({"a": {"b": [null]}})))),
            ("one second left", claim("exp", Some((NOW + 1).into()))),
            (
                "blanks around the JSON",
                mint.token_of(&format!(" {} ", mint.header()), &format!("\n{}\n", claims())),
            ),
            ("a subject of 256 bytes", claim("sub", Some("a".repeat(256).into()))),
        ];
        for (name, token) in good {
            assert_eq!(judged(&token, &issuer(""), &[&mint], NOW).map(drop), Ok(()), "{name}");
        }
    }

    /// Attacks and mistakes, each with the fault it must get. Sources: RFC 8725 (best practices), RFC 7515, 7519, 9068,
    /// CVE-2015-9235 (confusion), CVE-2018-0114 (embedded key), CVE-2022-21449 (zero signature).
    #[test]
    fn attacks_get_their_fault() {
        use TokenFault::*;
        let (mint, foreign) = (Mint::es256("k1"), Mint::es256("k1"));
        let good = mint.token(&claims());
        let [head, body, signature] = *good.split('.').collect::<Vec<_>>() else { panic!() };
        let header_text = mint.header().to_string();
        let claims_text = claims().to_string();

        let header = |name: &str, value: Option<Value>| {
            let mut header = mint.header();
            match value {
                Some(value) => header[name] = value,
                None => drop(header.as_object_mut().unwrap().remove(name)),
            }
            mint.token_of(&header.to_string(), &claims_text)
        };
        let claim = |name: &str, value: Option<Value>| mint.token(&with(name, value));
        let claims_of = |text: &str| mint.token_of(&header_text, text);
        let edited = |from: &str, to: &str| claims_of(&claims_text.replacen(from, to, 1));
        let hmac = |algorithm, key: &[u8]| {
            let header = json!({"alg": algorithm, "typ": "at+jwt", "kid": "k1"}).to_string();
            let signed = format!("{}.{body}", encode(header.as_bytes()));
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
            format!("{signed}.{}", encode(ring::hmac::sign(&key, signed.as_bytes()).as_ref()))
        };
        let signed_by = |bytes: &[u8]| format!("{head}.{body}.{}", encode(bytes));
        let raw = super::decode(signature).unwrap();
        let order = {
            const N: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
            (0..32).map(|at| u8::from_str_radix(&N[at * 2..at * 2 + 2], 16).unwrap()).collect::<Vec<u8>>()
        };
        let flipped = |at: usize| {
            let mut bytes = raw.clone();
            bytes[at] ^= 1;
            bytes
        };
        let point = super::super::minting::jwks(&[&mint]);

        let attacks: Vec<(&str, String, TokenFault)> = vec![
            // The algorithm.
            (
                "alg none, no signature",
                format!("{}.{body}.", encode(br#"{"alg":"none","typ":"at+jwt"}"#)),
                Malformed,
            ),
            ("alg none", header("alg", Some("none".into())), Algorithm),
            ("alg None", header("alg", Some("None".into())), Algorithm),
            ("alg NONE", header("alg", Some("NONE".into())), Algorithm),
            ("alg nOnE", header("alg", Some("nOnE".into())), Algorithm),
            ("alg empty", header("alg", Some("".into())), Algorithm),
            ("alg missing", header("alg", None), Algorithm),
            ("alg null", header("alg", Some(Value::Null)), Algorithm),
            ("alg a number", header("alg", Some(256.into())), Algorithm),
            ("alg a list", header("alg", Some(json!(["ES256"]))), Algorithm),
            ("alg in small letters", header("alg", Some("es256".into())), Algorithm),
            ("alg with a blank", header("alg", Some("ES256 ".into())), Algorithm),
            ("alg HS256 keyed with the public key", hmac("HS256", point.as_bytes()), Algorithm),
            ("alg HS256 keyed with nothing", hmac("HS256", b""), Algorithm),
            ("alg HS512", hmac("HS512", b""), Algorithm),
            ("alg not pinned: ES384", header("alg", Some("ES384".into())), Algorithm),
            ("alg not pinned: RS256", header("alg", Some("RS256".into())), Algorithm),
            ("alg not pinned: EdDSA", header("alg", Some("EdDSA".into())), Algorithm),
            ("alg not known: ES256K", header("alg", Some("ES256K".into())), Algorithm),
            (
                "alg twice",
                mint.token_of(r#"{"alg":"none","alg":"ES256","typ":"at+jwt","kid":"k1"}"#, &claims_text),
                Malformed,
            ),
            (
                "alg twice, once escaped",
                mint.token_of(r#"{"\u0061lg":"none","alg":"ES256","typ":"at+jwt"}"#, &claims_text),
                Malformed,
            ),
            // Keys that the token brings.
            (
                "own key in jwk",
                {
                    let mut header = foreign.header();
                    header["jwk"] = foreign.jwk();
                    foreign.token_of(&header.to_string(), &claims_text)
                },
                Key,
            ),
            ("jku", header("jku", Some("https://evil.example/jwks.json".into())), Key),
            ("x5u", header("x5u", Some("https://evil.example/cert.pem".into())), Key),
            ("x5c", header("x5c", Some(json!(["MIIB"]))), Key),
            ("jwk null", header("jwk", Some(Value::Null)), Key),
            ("crit", header("crit", Some(json!(["exp"]))), Key),
            ("crit empty", header("crit", Some(json!([]))), Key),
            (
                "crit with b64, RFC 7797",
                mint.token_of(r#"{"alg":"ES256","typ":"at+jwt","b64":false,"crit":["b64"]}"#, &claims_text),
                Key,
            ),
            // The key's name.
            ("kid unknown", header("kid", Some("k2".into())), Key),
            ("kid empty", header("kid", Some("".into())), Key),
            ("kid a path", header("kid", Some("../../../../dev/null".into())), Key),
            ("kid a URL", header("kid", Some("https://evil.example/k1".into())), Key),
            ("kid SQL", header("kid", Some("k1' UNION SELECT 'x".into())), Key),
            ("kid shell", header("kid", Some("k1|id".into())), Key),
            ("kid with NUL", header("kid", Some("k1\0".into())), Key),
            ("kid in capitals", header("kid", Some("K1".into())), Key),
            ("kid very long", header("kid", Some("k".repeat(5000).into())), Key),
            ("kid a number", header("kid", Some(1.into())), Malformed),
            ("kid null", header("kid", Some(Value::Null)), Malformed),
            ("kid a list", header("kid", Some(json!(["k1"]))), Malformed),
            // The kind of token.
            ("typ missing", header("typ", None), Type),
            ("typ JWT", header("typ", Some("JWT".into())), Type),
            ("typ of an id token", header("typ", Some("id+jwt".into())), Type),
            ("typ of a logout token", header("typ", Some("logout+jwt".into())), Type),
            ("typ of a DPoP proof", header("typ", Some("dpop+jwt".into())), Type),
            ("typ with a blank", header("typ", Some("at+jwt ".into())), Type),
            ("typ text/at+jwt", header("typ", Some("text/at+jwt".into())), Type),
            ("typ empty", header("typ", Some("".into())), Type),
            ("typ a list", header("typ", Some(json!(["at+jwt"]))), Type),
            // The form.
            ("nothing", String::new(), Malformed),
            ("dots only", "..".to_owned(), Malformed),
            ("one part", head.to_owned(), Malformed),
            ("two parts", format!("{head}.{body}"), Malformed),
            ("four parts", format!("{good}.{signature}"), Malformed),
            ("five parts, as a JWE has", format!("{head}.{body}.{body}.{body}.{signature}"), Malformed),
            ("dot in front", format!(".{good}"), Malformed),
            ("dot at the end", format!("{good}."), Malformed),
            ("header empty", format!(".{body}.{signature}"), Malformed),
            ("claims empty", format!("{head}..{signature}"), Malformed),
            ("signature empty", format!("{head}.{body}."), Malformed),
            ("header padded", format!("{head}=.{body}.{signature}"), Malformed),
            ("claims padded", format!("{head}.{body}=.{signature}"), Malformed),
            ("signature padded", format!("{good}=="), Malformed),
            ("blank in front", format!(" {good}"), Malformed),
            ("line end at the end", format!("{good}\n"), Malformed),
            ("line end within", format!("{head}.{}\n{}.{signature}", &body[..20], &body[20..]), Malformed),
            (
                "standard alphabet",
                format!(
                    "{head}.{body}.{}",
                    base64::engine::general_purpose::STANDARD_NO_PAD.encode([0xfb; 64])
                ),
                Malformed,
            ),
            ("not ASCII", format!("{head}.{body}é.{signature}"), Malformed),
            ("percent-encoded", good.replace('.', "%2E"), Malformed),
            ("header not JSON", mint.token_of("alg=ES256", &claims_text), Malformed),
            ("header a list", mint.token_of("[]", &claims_text), Malformed),
            (
                "header with more behind",
                mint.token_of(&format!("{header_text}{header_text}"), &claims_text),
                Malformed,
            ),
            (
                "header with a byte order mark",
                mint.token_of(&format!("\u{feff}{header_text}"), &claims_text),
                Malformed,
            ),
            ("claims not JSON", claims_of("sub=alice"), Malformed),
            ("claims a string", claims_of("\"alice\""), Malformed),
            ("claims null", claims_of("null"), Malformed),
            ("claims with more behind", claims_of(&format!("{claims_text}x")), Malformed),
            (
                "claims nested too deep",
                claims_of(&format!("{{\"a\":{}{}}}", "[".repeat(500), "]".repeat(500))),
                Malformed,
            ),
            ("claims with a comma too many", edited("}", ",}"), Malformed),
            (
                "claims not UTF-8",
                {
                    let signed = format!("{head}.{}", encode(b"{\"sub\":\"\xff\"}"));
                    format!("{signed}.{}", encode(&mint.sign(signed.as_bytes(), false)))
                },
                Malformed,
            ),
            ("sub twice", edited("{", r#"{"sub":"admin","#), Malformed),
            ("sub twice, once escaped", edited("{", r#"{"\u0073ub":"admin","#), Malformed),
            ("a key twice, deep inside", edited("{", r#"{"x":[{"a":1,"a":2}],"#), Malformed),
            // The signature.
            ("signed by another key of the same name", foreign.token(&claims()), Signature),
            (
                "signature of another token",
                format!(
                    "{head}.{body}.{}",
                    mint.token(&with("sub", Some("bob".into()))).rsplit('.').next().unwrap()
                ),
                Signature,
            ),
            (
                "claims exchanged",
                format!(
                    "{head}.{}.{signature}",
                    encode(with("sub", Some("admin".into())).to_string().as_bytes())
                ),
                Signature,
            ),
            ("first bit flipped", signed_by(&flipped(0)), Signature),
            ("last bit flipped", signed_by(&flipped(63)), Signature),
            ("cut short", signed_by(&raw[..63]), Signature),
            ("one byte more", signed_by(&[&raw[..], &[0]].concat()), Signature),
            ("r and s zero", signed_by(&[0; 64]), Signature),
            ("r zero", signed_by(&[&[0; 32], &raw[32..]].concat()), Signature),
            ("s zero", signed_by(&[&raw[..32], &[0; 32]].concat()), Signature),
            ("r and s the order of the curve", signed_by(&[&order[..], &order[..]].concat()), Signature),
            ("r and s all ones", signed_by(&[0xff; 64]), Signature),
            (
                "signature in DER",
                signed_by(&[&[0x30, 68, 2, 32][..], &raw[..32], &[2, 32], &raw[32..]].concat()),
                Signature,
            ),
            (
                "unused bits of the last character",
                {
                    // 64 bytes leave four unused bits in the last character; only zeros are canonical.
                    let (rest, last) = good.split_at(good.len() - 1);
                    format!("{rest}{}", char::from(last.as_bytes()[0] + 1))
                },
                Malformed,
            ),
            // Whose it is.
            ("iss missing", claim("iss", None), Issuer),
            ("iss another", claim("iss", Some("https://evil.example".into())), Issuer),
            ("iss with a slash", claim("iss", Some(format!("{ISSUER}/").into())), Issuer),
            ("iss in capitals", claim("iss", Some(ISSUER.to_uppercase().into())), Issuer),
            ("iss a list", claim("iss", Some(json!([ISSUER]))), Issuer),
            ("iss null", claim("iss", Some(Value::Null)), Issuer),
            // Whom it is for.
            ("aud missing", claim("aud", None), Audience),
            ("aud another", claim("aud", Some("other".into())), Audience),
            ("aud longer", claim("aud", Some("sealgate2".into())), Audience),
            ("aud in capitals", claim("aud", Some("Sealgate".into())), Audience),
            ("aud an empty list", claim("aud", Some(json!([]))), Audience),
            ("aud a number", claim("aud", Some(1.into())), Claims),
            ("aud with a number in it", claim("aud", Some(json!(["sealgate", 1]))), Claims),
            ("aud an object", claim("aud", Some(json!({"sealgate": true}))), Claims),
            // From when until when.
            ("exp missing", claim("exp", None), Claims),
            ("exp a string", claim("exp", Some((NOW + 300).to_string().into())), Claims),
            ("exp null", claim("exp", Some(Value::Null)), Claims),
            ("exp true", claim("exp", Some(true.into())), Claims),
            ("exp a list", claim("exp", Some(json!([NOW + 300]))), Claims),
            ("exp negative", claim("exp", Some((-1).into())), Claims),
            ("exp beyond all dates", claim("exp", Some(u64::MAX.into())), Claims),
            ("exp in milliseconds", claim("exp", Some((NOW * 1000).into())), Claims),
            ("exp 1e300", edited(&(NOW + 300).to_string(), "1e300"), Claims),
            ("exp 1e400", edited(&(NOW + 300).to_string(), "1e400"), Malformed),
            ("exp NaN", edited(&(NOW + 300).to_string(), "NaN"), Malformed),
            ("exp hexadecimal", edited(&(NOW + 300).to_string(), "0x7fffffff"), Malformed),
            ("expired by one second", claim("exp", Some((NOW - 1).into())), Expired),
            ("expired just now", claim("exp", Some(NOW.into())), Expired),
            ("expired for ever", claim("exp", Some(0.into())), Expired),
            ("nbf in one second", claim("nbf", Some((NOW + 1).into())), NotYetValid),
            ("nbf a string", claim("nbf", Some("0".into())), Claims),
            ("iat in one second", claim("iat", Some((NOW + 1).into())), NotYetValid),
            ("iat a string", claim("iat", Some("0".into())), Claims),
            ("iat null", claim("iat", Some(Value::Null)), Claims),
            ("auth_time in one second", claim("auth_time", Some((NOW + 1).into())), NotYetValid),
            ("auth_time a string", claim("auth_time", Some("now".into())), Claims),
            // Who it is.
            ("sub missing", claim("sub", None), Claims),
            ("sub empty", claim("sub", Some("".into())), Claims),
            ("sub a number", claim("sub", Some(0.into())), Claims),
            ("sub null", claim("sub", Some(Value::Null)), Claims),
            ("sub a list", claim("sub", Some(json!(["alice"]))), Claims),
            ("sub too long", claim("sub", Some("a".repeat(257).into())), Claims),
            ("sub with a line end", claim("sub", Some("alice\r\nX-Evil: 1".into())), Claims),
            ("sub with NUL", claim("sub", Some("alice\0".into())), Claims),
            ("sid a number", claim("sid", Some(1.into())), Claims),
            ("sid empty", claim("sid", Some("".into())), Claims),
            ("jti a number", claim("jti", Some(1.into())), Claims),
            ("device_id a number", claim("device_id", Some(1.into())), Claims),
            ("dept a list", claim("dept", Some(json!(["sales"]))), Claims),
            ("roles a number", claim("roles", Some(1.into())), Claims),
            ("roles an object", claim("roles", Some(json!({"admin": true}))), Claims),
            ("roles null", claim("roles", Some(Value::Null)), Claims),
            ("roles with a number in it", claim("roles", Some(json!(["user", 1]))), Claims),
            ("roles with a list in it", claim("roles", Some(json!([["admin"]]))), Claims),
            ("roles too many", claim("roles", Some(json!(vec!["user"; 65]))), Claims),
            ("roles too many in one string", claim("roles", Some("user ".repeat(65).into())), Claims),
            ("acr a number", claim("acr", Some(2.into())), Claims),
            ("amr a string", claim("amr", Some("pwd".into())), Claims),
        ];
        for (name, token, fault) in &attacks {
            assert_eq!(judged(token, &issuer(""), &[&mint], NOW).map(drop), Err(*fault), "{name}: {token}");
        }
        assert_eq!(judged(&good, &issuer(""), &[&mint], NOW).map(drop), Ok(()));
    }

    #[test]
    fn a_bound_token_says_what_it_is_bound_to() {
        let mint = Mint::es256("k1");
        let print = encode(&[7; 32]);
        let bound = |value: Value| mint.token(&with("cnf", Some(value)));
        let binding =
            |token: &str, issuer: &Issuer| judged(token, issuer, &[&mint], NOW).map(|it| it.binding);
        let (key, certificate) = (Some([7; 32]), Some([7; 32]));
        let by_key = bound(json!({"jkt": print}));
        assert_eq!(binding(&by_key, &issuer("")), Ok(Binding { key, certificate: None }));
        let both = bound(json!({"jkt": print, "x5t#S256": print, "other": 1}));
        assert_eq!(binding(&both, &issuer("")), Ok(Binding { key, certificate }));
        let by_certificate = bound(json!({"x5t#S256": print}));
        assert_eq!(binding(&by_certificate, &issuer("")), Ok(Binding { key: None, certificate }));

        let strict = Issuer { sender: Sender::Dpop, ..issuer("") };
        assert!(binding(&by_key, &strict).is_ok());
        assert_eq!(binding(&by_certificate, &strict), Err(TokenFault::Unbound));
        assert_eq!(binding(&mint.token(&claims()), &strict), Err(TokenFault::Unbound));

        let short = encode(&[7; 31]);
        for value in [
            json!({}),
            json!(null),
            json!([]),
            json!("x"),
            json!({"kid": "k"}),
            json!({"jwk": {}}),
            json!({"jkt": null}),
            json!({"jkt": 1}),
            json!({"jkt": ""}),
            json!({"jkt": short}),
            json!({"jkt": format!("{print}=")}),
            json!({"jkt": print, "x5t#S256": short}),
        ] {
            assert_eq!(binding(&bound(value.clone()), &issuer("")), Err(TokenFault::Claims), "{value}");
        }
    }

    #[test]
    fn skew_is_tolerated_and_no_more() {
        let mint = Mint::es256("k1");
        let skewed = Issuer { skew: Duration::from_secs(30), ..issuer("") };
        let outcome = |name: &str, date: u64| {
            judged(&mint.token(&with(name, Some(date.into()))), &skewed, &[&mint], NOW).map(drop)
        };
        // `iat` and `nbf` would otherwise be later than `exp`.
        let expiring = |exp: u64| {
            let claims = json!({"iss": ISSUER, "aud": "sealgate", "sub": "a", "exp": exp});
            judged(&mint.token(&claims), &skewed, &[&mint], NOW).map(drop)
        };
        assert_eq!(expiring(NOW - 29), Ok(()));
        assert_eq!(expiring(NOW - 30), Err(TokenFault::Expired));
        assert_eq!(outcome("nbf", NOW + 30), Ok(()));
        assert_eq!(outcome("nbf", NOW + 31), Err(TokenFault::NotYetValid));
        assert_eq!(outcome("iat", NOW + 30), Ok(()));
        assert_eq!(outcome("iat", NOW + 31), Err(TokenFault::NotYetValid));
        let late = with("iat", Some((NOW + 20).into()));
        let mut never = late.clone();
        never["exp"] = (NOW + 10).into();
        assert_eq!(judged(&mint.token(&never), &skewed, &[&mint], NOW), Err(TokenFault::Claims));
    }

    #[test]
    fn claims_are_taken_by_the_issuers_names() {
        let mint = Mint::es256("k1");
        let mut issuer = issuer("");
        issuer.claims.subject = "uid".into();
        issuer.claims.roles = "groups".into();
        let mut claims = with("groups", Some(json!(["staff"])));
        assert_eq!(judged(&mint.token(&claims), &issuer, &[&mint], NOW), Err(TokenFault::Claims));
        claims["uid"] = "u-1".into();
        let identity = judged(&mint.token(&claims), &issuer, &[&mint], NOW).unwrap();
        assert_eq!((identity.subject.as_str(), &identity.roles[..]), ("u-1", &["staff".to_owned()][..]));
    }

    #[test]
    fn a_token_without_a_key_id_needs_one_key_to_be_meant() {
        let (one, two) = (Mint::es256("k1"), Mint::es256("k2"));
        let token = one.token_of(r#"{"alg":"ES256","typ":"at+jwt"}"#, &claims().to_string());
        assert_eq!(judged(&token, &issuer(""), &[&one], NOW).map(drop), Ok(()));
        assert_eq!(judged(&token, &issuer(""), &[&one, &two], NOW), Err(TokenFault::Key));
        assert_eq!(judged(&token, &issuer(""), &[], NOW), Err(TokenFault::Key));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC*") {
            let _ = Unverified::parse(&text);
        }

        #[test]
        fn any_parts_are_answered(header in any::<Vec<u8>>(), claims in any::<Vec<u8>>(), signature in any::<Vec<u8>>()) {
            let _ = Unverified::parse(&format!("{}.{}.{}", encode(&header), encode(&claims), encode(&signature)));
        }

        #[test]
        fn any_values_of_claims_and_header_are_answered(
            name in prop::sample::select(vec!["iss", "aud", "exp", "iat", "nbf", "sub", "sid", "jti", "roles", "dept", "device_id",
                "acr", "amr", "auth_time"]),
            header in prop::sample::select(vec!["alg", "typ", "kid", "cty"]),
            value in any_json(),
        ) {
            let mint = Mint::eddsa("k1");
            let eddsa = Issuer { algorithms: vec![Algorithm::EdDSA], ..issuer("") };
            let _ = judged(&mint.token(&with(name, Some(value.clone()))), &eddsa, &[&mint], NOW);
            let mut changed = mint.header();
            changed[header] = value;
            let _ = judged(&mint.token_of(&changed.to_string(), &claims().to_string()), &eddsa, &[&mint], NOW);
        }

        #[test]
        fn no_character_can_be_exchanged(at in any::<prop::sample::Index>(), by in "[-_.A-Za-z0-9=+/ ]") {
            let mint = Mint::eddsa("k1");
            let eddsa = Issuer { algorithms: vec![Algorithm::EdDSA], ..issuer("") };
            let good = mint.token(&claims());
            let at = at.index(good.len());
            let mut changed = good.clone();
            changed.replace_range(at..=at, &by);
            let outcome = judged(&changed, &eddsa, &[&mint], NOW);
            prop_assert_eq!(outcome.is_ok(), changed == good);
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,300}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 100, 70, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..70).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{0,3}", inner, 0..5)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }
}
