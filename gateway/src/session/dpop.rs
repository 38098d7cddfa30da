//! Proofs of possession (DPoP, RFC 9449): who sends a bound token shows, for each request, that he holds its key.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, HeaderName, Method, Uri};
use ring::digest::{Context, SHA256, digest};
use ring::error::Unspecified;
use ring::hmac;
use ring::rand::SystemRandom;
use sealgate_policy::{Denial, DpopPolicy, Identity, ProofFault};
use serde_json::{Map, Value};

use super::jwks;
use super::revocation::Low;
use super::token::{Unverified, algorithm_named, decode, id, media_type};
use crate::lock::lock;

/// Carries the proof. Spent at this door: never forwarded.
pub const DPOP: HeaderName = HeaderName::from_static("dpop");

/// Longest proof: room for an RSA key of 8192 bits and its signature.
const MAX_PROOF_BYTES: usize = 4096;

const SHARDS: usize = 16;

/// Bytes of the time in a nonce, and of the MAC over it.
const NONCE_TIME: usize = 8;
const NONCE_MAC: usize = 16;

/// What a proof must be made for.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// The request's method.
    pub method: &'a Method,
    /// Host and port as the client wrote them.
    pub authority: &'a str,
    /// Path as the client wrote it.
    pub path: &'a str,
    /// Whether it asks for a WebSocket: its URL may be written with `wss:`.
    pub websocket: bool,
    /// The access token beside the proof.
    pub token: &'a str,
}

/// The request's proof.
///
/// # Errors
/// [`ProofFault::Malformed`] for two fields, or bytes that no proof has.
pub fn proof(headers: &HeaderMap) -> Result<Option<&str>, ProofFault> {
    let mut fields = headers.get_all(&DPOP).iter();
    match (fields.next(), fields.next()) {
        (None, _) => Ok(None),
        (Some(field), None) => field.to_str().map(Some).map_err(|_| ProofFault::Malformed),
        (Some(_), Some(_)) => Err(ProofFault::Malformed),
    }
}

/// Checks proofs, and remembers them so that none counts twice. Shared by all cores, older than any snapshot.
pub struct Proofs {
    nonces: hmac::Key,
    seen: Seen,
}

impl Proofs {
    /// Remembers nothing yet; has a fresh key for nonces.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn new() -> Result<Self, Unspecified> {
        Ok(Proofs {
            nonces: hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?,
            seen: Seen::default(),
        })
    }

    /// Checks, at `now` (unix seconds), that `proof` was made for this request by the key that the token of `identity`
    /// is bound to, and never came to this gateway before (RFC 9449 §4.3).
    ///
    /// # Errors
    /// [`Denial::ProofInvalid`]; [`Denial::ProofNonce`] where the policy wants a nonce and the proof has none that is
    /// good; [`Denial::TooManyProofs`] rather than to forget one that could still be replayed.
    pub fn check(
        &self,
        proof: &str,
        asked: &Asked<'_>,
        identity: &Identity,
        policy: &DpopPolicy,
        now: u64,
    ) -> Result<Accepted, Denial> {
        let key = identity.binding.key.ok_or(Denial::ProofInvalid(ProofFault::Key))?;
        let proof = verify(proof, asked, &key, policy, now).map_err(Denial::ProofInvalid)?;
        if policy.nonce && !proof.nonce.is_some_and(|nonce| self.is_nonce(&nonce, policy, now)) {
            return Err(Denial::ProofNonce { nonce: self.nonce(policy, now) });
        }
        // Every proof that is accepted at any time is remembered for as long as it could be: its `iat` is `skew` ahead
        // of our clock at most, and `max_age + skew` behind it.
        let until = now + policy.max_age.as_secs() + 2 * policy.skew.as_secs() + 1;
        let owner = (&*identity.issuer, identity.subject.as_str());
        self.seen.remember(owner, &key, &proof.id, policy, until, now)?;
        Ok(Accepted { key, id: proof.id, ttl: Duration::from_secs(until - now) })
    }

    /// A nonce for the next proof.
    pub fn nonce(&self, policy: &DpopPolicy, now: u64) -> Arc<str> {
        let step = (now / policy.nonce_lifetime.as_secs().max(1)).to_be_bytes();
        let mac = hmac::sign(&self.nonces, &step);
        let mac = mac.as_ref().get(..NONCE_MAC).unwrap_or_default();
        URL_SAFE_NO_PAD.encode([&step, mac].concat()).into()
    }

    /// Whether we gave this nonce in this step of time or in the one before.
    fn is_nonce(&self, nonce: &str, policy: &DpopPolicy, now: u64) -> bool {
        let current = now / policy.nonce_lifetime.as_secs().max(1);
        let bytes = decode(nonce).unwrap_or_default();
        let Some((step, mac)) = bytes.split_at_checked(NONCE_TIME) else { return false };
        let Ok(step) = step.try_into().map(u64::from_be_bytes) else { return false };
        let expected = hmac::sign(&self.nonces, &step.to_be_bytes());
        let expected = expected.as_ref().get(..NONCE_MAC).unwrap_or_default();
        let ours: bool = subtle::ConstantTimeEq::ct_eq(expected, mac).into();
        ours && (step == current || step.checked_add(1) == Some(current))
    }

    /// Clears away what no longer could be replayed. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        self.seen.forget_expired(now);
    }

    /// Proofs remembered.
    pub fn len(&self) -> usize {
        self.seen.total.load(Ordering::Acquire)
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for Proofs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proofs").field("seen", &self.len()).finish_non_exhaustive()
    }
}

/// A proof that came to this gateway for the first time. Others may have seen it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "other gateways may have seen the proof"]
pub struct Accepted {
    key: [u8; 32],
    id: String,
    /// For how long it could be replayed.
    pub ttl: Duration,
}

impl Accepted {
    /// Its name among gateways: a hash over key and `jti`, so that no two have one and nothing of either is shown.
    pub fn name(&self) -> String {
        let mut name = Context::new(&SHA256);
        name.update(&self.key);
        name.update(self.id.as_bytes());
        URL_SAFE_NO_PAD.encode(name.finish())
    }
}

/// What is left to look at once a proof has been verified.
struct Verified {
    id: String,
    nonce: Option<String>,
}

/// RFC 9449 §4.3, but for nonce and replay. The key is compared first: only its holder can make us verify a signature.
fn verify(
    proof: &str,
    asked: &Asked<'_>,
    bound_to: &[u8; 32],
    policy: &DpopPolicy,
    now: u64,
) -> Result<Verified, ProofFault> {
    if proof.len() > MAX_PROOF_BYTES {
        return Err(ProofFault::Malformed);
    }
    let jws = Unverified::parse(proof).map_err(|_| ProofFault::Malformed)?;
    let header = jws.header();
    if !header
        .get("typ")
        .and_then(Value::as_str)
        .is_some_and(|it| media_type(it).eq_ignore_ascii_case("dpop+jwt"))
    {
        return Err(ProofFault::Type);
    }
    if ["jku", "x5u", "x5c", "crit"].iter().any(|name| header.contains_key(*name)) {
        return Err(ProofFault::Key);
    }
    let algorithm = header.get("alg").and_then(Value::as_str).and_then(algorithm_named);
    let algorithm = algorithm.filter(|it| policy.algorithms.contains(it)).ok_or(ProofFault::Algorithm)?;
    let jwk = header.get("jwk").and_then(Value::as_object).ok_or(ProofFault::Key)?;
    if thumbprint(jwk).as_ref() != Some(bound_to) {
        return Err(ProofFault::Key);
    }
    let key = jwks::key_of(jwk, algorithm).ok_or(ProofFault::Key)?;
    jws.signed_by(algorithm, &key).map_err(|_| ProofFault::Signature)?;

    let claims = jws.claims();
    let text = |name: &str| claims.get(name).map(id).transpose().map_err(|_| ProofFault::Claims);
    let id = text("jti")?.ok_or(ProofFault::Claims)?;
    let nonce = text("nonce")?;
    let issued_at = jws.date("iat").ok().flatten().ok_or(ProofFault::Claims)?;
    let (max_age, skew) = (policy.max_age.as_secs(), policy.skew.as_secs());
    if issued_at > now.saturating_add(skew) || now >= issued_at.saturating_add(max_age).saturating_add(skew) {
        return Err(ProofFault::Time);
    }
    // Not in the specification, but who sets them means them.
    let expired =
        jws.date("exp").map_err(|_| ProofFault::Claims)?.is_some_and(|exp| now >= exp.saturating_add(skew));
    let early =
        jws.date("nbf").map_err(|_| ProofFault::Claims)?.is_some_and(|nbf| nbf > now.saturating_add(skew));
    if expired || early {
        return Err(ProofFault::Time);
    }
    let method = claims.get("htm").and_then(Value::as_str).ok_or(ProofFault::Claims)?;
    // A WebSocket over HTTP/2 is asked for by CONNECT (RFC 8441 §4), which no client author thinks of.
    if method != asked.method.as_str() && !(asked.websocket && method == "GET") {
        return Err(ProofFault::Method);
    }
    let url = claims.get("htu").and_then(Value::as_str).ok_or(ProofFault::Claims)?;
    if !is_target(url, asked) {
        return Err(ProofFault::Url);
    }
    let token = claims.get("ath").and_then(Value::as_str).ok_or(ProofFault::Claims)?;
    if token != URL_SAFE_NO_PAD.encode(digest(&SHA256, asked.token.as_bytes())) {
        return Err(ProofFault::Token);
    }
    Ok(Verified { id, nonce })
}

/// The key's name: a hash of its required members in the order of their names (RFC 7638 §3). Their values are base64url or
/// one of our names, so nothing in them wants escaping.
fn thumbprint(jwk: &Map<String, Value>) -> Option<[u8; 32]> {
    let plain = |text: &&str| decode(text).is_some();
    let member = |name: &str| jwk.get(name).and_then(Value::as_str).filter(plain);
    let text = match (jwk.get("kty")?.as_str()?, jwk.get("crv").and_then(Value::as_str)) {
        ("EC", Some(curve @ ("P-256" | "P-384"))) => {
            format!(r#"{{"crv":"{curve}","kty":"EC","x":"{}","y":"{}"}}"#, member("x")?, member("y")?)
        }
        ("OKP", Some("Ed25519")) => format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, member("x")?),
        ("RSA", _) => format!(r#"{{"e":"{}","kty":"RSA","n":"{}"}}"#, member("e")?, member("n")?),
        _ => return None,
    };
    digest(&SHA256, text.as_bytes()).as_ref().try_into().ok()
}

/// Whether a proof's URL is the request's, without query and fragment, normalised (RFC 9449 §4.3, RFC 3986 §6.2.2, §6.2.3).
fn is_target(url: &str, asked: &Asked<'_>) -> bool {
    let Ok(uri) = url.parse::<Uri>() else { return false };
    let scheme = uri.scheme_str().unwrap_or_default();
    let secure = scheme == "https" || asked.websocket && scheme == "wss";
    let authority = uri.authority().map_or("", |it| it.as_str());
    secure && same_authority(authority, asked.authority) && normalised(uri.path()).eq(normalised(asked.path))
}

fn same_authority(one: &str, other: &str) -> bool {
    // Without a port, or without its number, it is the scheme's.
    let bare = |text: &'_ str| -> String {
        let text = text.strip_suffix(":443").or_else(|| text.strip_suffix(':')).unwrap_or(text);
        text.to_ascii_lowercase()
    };
    !one.is_empty() && !one.contains('@') && bare(one) == bare(other)
}

/// A path's bytes, each with whether it is percent-encoded. Unreserved characters never are, whoever wrote them so.
fn normalised(path: &str) -> impl Iterator<Item = (bool, u8)> {
    let mut rest = path.as_bytes();
    std::iter::from_fn(move || {
        let (&first, after) = rest.split_first()?;
        let hex = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        if let (b'%', [high, low, after @ ..]) = (first, after)
            && let (Some(high), Some(low)) = (hex(high), hex(low))
        {
            rest = after;
            let byte = high << 4 | low;
            let unreserved = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
            return Some((!unreserved, byte));
        }
        rest = after;
        Some((false, first))
    })
}

/// Proofs that were accepted and could still be replayed. Bounded in all and for each subject; what does not fit is
/// refused, so that nobody can have another one's proof forgotten.
#[derive(Default)]
struct Seen {
    hashers: [RandomState; 2],
    total: AtomicUsize,
    shards: [Mutex<Shard>; SHARDS],
}

/// The proofs of those subjects whose hash leads here, each under a keyed hash of key and `jti`.
#[derive(Default)]
struct Shard {
    proofs: HashSet<u128, BuildHasherDefault<Low>>,
    of_owner: HashMap<u64, u32>,
    /// In the order of coming, which is that of expiring but for a change of policy.
    expiring: VecDeque<Expiring>,
}

struct Expiring {
    until: u64,
    proof: u128,
    owner: u64,
}

impl Seen {
    fn remember(
        &self,
        owner: (&str, &str),
        key: &[u8; 32],
        id: &str,
        policy: &DpopPolicy,
        until: u64,
        now: u64,
    ) -> Result<(), Denial> {
        let [low, high] = &self.hashers;
        let proof = u128::from(high.hash_one((key, id))) << 64 | u128::from(low.hash_one((key, id)));
        let owner = low.hash_one(owner);
        let max = policy.max_proofs as usize;
        if self.total.load(Ordering::Acquire) >= max {
            self.forget_expired(now);
        }
        let mut shard = lock(self.shard(owner));
        self.forget(&mut shard, now);
        if shard.proofs.contains(&proof) {
            return Err(Denial::ProofInvalid(ProofFault::Replayed));
        }
        if shard.of_owner.get(&owner).is_some_and(|count| *count >= policy.max_proofs_per_subject) {
            return Err(Denial::TooManyProofs);
        }
        if self.total.fetch_add(1, Ordering::AcqRel) >= max {
            self.total.fetch_sub(1, Ordering::AcqRel);
            return Err(Denial::TooManyProofs);
        }
        shard.proofs.insert(proof);
        *shard.of_owner.entry(owner).or_insert(0) += 1;
        shard.expiring.push_back(Expiring { until, proof, owner });
        Ok(())
    }

    fn forget_expired(&self, now: u64) {
        for shard in &self.shards {
            self.forget(&mut lock(shard), now);
        }
    }

    fn forget(&self, shard: &mut Shard, now: u64) {
        while let Some(first) = shard.expiring.pop_front_if(|first| now >= first.until) {
            shard.proofs.remove(&first.proof);
            if let Some(count) = shard.of_owner.get_mut(&first.owner) {
                *count -= 1;
                if *count == 0 {
                    shard.of_owner.remove(&first.owner);
                }
            }
            self.total.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn shard(&self, owner: u64) -> &Mutex<Shard> {
        let [first, ..] = &self.shards;
        self.shards.get((owner >> 60) as usize).unwrap_or(first)
    }
}

#[cfg(test)]
mod tests {
    use super::super::minting::{Mint, NOW, encode};
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::{Algorithm, Binding, IdentityParts};
    use serde_json::json;

    const TOKEN: &str = "a.b.c";

    fn policy() -> DpopPolicy {
        DpopPolicy {
            algorithms: vec![Algorithm::ES256, Algorithm::EdDSA],
            max_age: Duration::from_secs(60),
            skew: Duration::from_secs(5),
            nonce: false,
            nonce_lifetime: Duration::from_secs(300),
            max_proofs: 100,
            max_proofs_per_subject: 50,
            demanded: true,
            algorithm_names: "ES256 EdDSA".to_owned(),
        }
    }

    fn bare(mint: &Mint) -> Value {
        let mut jwk = mint.jwk();
        jwk.as_object_mut().unwrap().retain(|name, _| !matches!(name.as_str(), "kid" | "use"));
        jwk
    }

    fn holder(mint: &Mint, subject: &str) -> Identity {
        let key = thumbprint(mint.jwk().as_object().unwrap());
        Identity::new(IdentityParts {
            subject: subject.to_owned(),
            binding: Binding { key, certificate: None },
            ..IdentityParts::default()
        })
    }

    fn asked(method: &Method) -> Asked<'_> {
        Asked { method, authority: "chat.example:8443", path: "/v1/messages", websocket: false, token: TOKEN }
    }

    fn claims(id: &str) -> Value {
        json!({
            "jti": id, "htm": "POST", "htu": "https://chat.example:8443/v1/messages", "iat": NOW,
            "ath": encode(digest(&SHA256, TOKEN.as_bytes()).as_ref()),
        })
    }

    fn proof_of(mint: &Mint, claims: &Value) -> String {
        let header = json!({"typ": "dpop+jwt", "alg": mint.header()["alg"], "jwk": bare(mint)});
        mint.token_of(&header.to_string(), &claims.to_string())
    }

    #[test]
    fn the_thumbprint_is_that_of_the_standard() {
        // RFC 7638 §3.1.
        let jwk = json!({
            "kty": "RSA", "alg": "RS256", "kid": "2011-04-29", "e": "AQAB",
            "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
        });
        let print = thumbprint(jwk.as_object().unwrap()).unwrap();
        assert_eq!(encode(&print), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    }

    #[test]
    fn a_proof_counts_once() {
        let mint = Mint::es256("k");
        let (proofs, identity, policy) = (Proofs::new().unwrap(), holder(&mint, "alice"), policy());
        let asked = asked(&Method::POST);
        let check = |proof: &str, now| proofs.check(proof, &asked, &identity, &policy, now).map(drop);
        let one = proof_of(&mint, &claims("1"));
        assert_eq!(check(&one, NOW), Ok(()));
        let replayed = Err(Denial::ProofInvalid(ProofFault::Replayed));
        assert_eq!(check(&one, NOW), replayed);
        assert_eq!(check(&one, NOW + 64), replayed, "to its last second");
        assert_eq!(check(&proof_of(&mint, &claims("1")), NOW), replayed, "signed anew, and the same");
        assert_eq!(check(&proof_of(&mint, &claims("2")), NOW), Ok(()));
        assert_eq!(check(&one, NOW + 65), Err(Denial::ProofInvalid(ProofFault::Time)));
        proofs.forget_expired(NOW + 71);
        assert!(proofs.is_empty());
    }

    #[test]
    fn a_proof_from_ahead_of_our_clock_is_remembered_to_its_end() {
        let mint = Mint::eddsa("k");
        let (proofs, identity, policy) = (Proofs::new().unwrap(), holder(&mint, "alice"), policy());
        let mut ahead = claims("1");
        ahead["iat"] = (NOW + 5).into();
        let proof = proof_of(&mint, &ahead);
        let outcomes: Vec<_> = [NOW, NOW + 30, NOW + 69, NOW + 70]
            .map(|now| proofs.check(&proof, &asked(&Method::POST), &identity, &policy, now).map(drop))
            .into_iter()
            .collect();
        let invalid = |fault| Err(Denial::ProofInvalid(fault));
        let (replayed, time) = (invalid(ProofFault::Replayed), invalid(ProofFault::Time));
        assert_eq!(outcomes, [Ok(()), replayed.clone(), replayed, time]);
    }

    /// Each with the fault it must get. Source: RFC 9449 §4.3, §11; RFC 8725.
    #[test]
    fn attacks_get_their_fault() {
        use ProofFault::*;
        let (mint, other) = (Mint::es256("k"), Mint::es256("k"));
        let identity = holder(&mint, "alice");
        let header = json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": bare(&mint)});
        let with = |name: &str, value: Value| {
            let mut header = header.clone();
            header[name] = value;
            mint.token_of(&header.to_string(), &claims("x").to_string())
        };
        let claim = |name: &str, value: Value| {
            let mut claims = claims("x");
            claims[name] = value;
            mint.token_of(&header.to_string(), &claims.to_string())
        };
        let without = |name: &str| {
            let mut claims = claims("x");
            claims.as_object_mut().unwrap().remove(name);
            mint.token_of(&header.to_string(), &claims.to_string())
        };
        let mut private = bare(&mint);
        private["d"] = encode(&[1; 32]).into();
        let mut encrypting = bare(&mint);
        encrypting["use"] = "enc".into();
        let good = proof_of(&mint, &claims("x"));
        let cases = [
            ("nothing", String::new(), Malformed),
            ("no JWS", "proof".to_owned(), Malformed),
            ("two in one", format!("{good},{good}"), Malformed),
            ("too long", claim("x", "x".repeat(4096).into()), Malformed),
            ("an access token", with("typ", "at+jwt".into()), Type),
            ("no type", with("typ", Value::Null), Type),
            ("alg none", with("alg", "none".into()), Algorithm),
            ("alg symmetric", with("alg", "HS256".into()), Algorithm),
            ("alg not of the policy", with("alg", "ES384".into()), Algorithm),
            ("alg of another key", with("alg", "EdDSA".into()), Key),
            ("no key", with("jwk", Value::Null), Key),
            ("another key", proof_of(&other, &claims("x")), Key),
            ("a private key", with("jwk", private), Key),
            ("a key for encryption", with("jwk", encrypting), Key),
            ("a symmetric key", with("jwk", json!({"kty": "oct", "k": "AAAA"})), Key),
            ("a key by reference", with("jku", "https://evil.example/".into()), Key),
            ("crit", with("crit", json!(["jti"])), Key),
            ("signed by another", other.token_of(&header.to_string(), &claims("x").to_string()), Signature),
            ("not signed", good.rsplit_once('.').map(|(rest, _)| format!("{rest}.")).unwrap(), Malformed),
            ("no jti", without("jti"), Claims),
            ("jti empty", claim("jti", "".into()), Claims),
            ("jti a number", claim("jti", 1.into()), Claims),
            ("jti too long", claim("jti", "x".repeat(257).into()), Claims),
            ("no htm", without("htm"), Claims),
            ("another method", claim("htm", "GET".into()), Method),
            ("the method in small letters", claim("htm", "post".into()), Method),
            ("no htu", without("htu"), Claims),
            ("another path", claim("htu", "https://chat.example:8443/v1/other".into()), Url),
            ("another host", claim("htu", "https://evil.example:8443/v1/messages".into()), Url),
            ("another port", claim("htu", "https://chat.example/v1/messages".into()), Url),
            ("plain http", claim("htu", "http://chat.example:8443/v1/messages".into()), Url),
            ("wss without an upgrade", claim("htu", "wss://chat.example:8443/v1/messages".into()), Url),
            ("user information", claim("htu", "https://a@chat.example:8443/v1/messages".into()), Url),
            ("the path only", claim("htu", "/v1/messages".into()), Url),
            ("no URL", claim("htu", "x y".into()), Url),
            ("no iat", without("iat"), Claims),
            ("iat a text", claim("iat", NOW.to_string().into()), Claims),
            ("too old", claim("iat", (NOW - 65).into()), Time),
            ("from the future", claim("iat", (NOW + 6).into()), Time),
            ("expired", claim("exp", (NOW - 5).into()), Time),
            ("not yet", claim("nbf", (NOW + 6).into()), Time),
            ("no ath", without("ath"), Claims),
            ("for another token", claim("ath", encode(digest(&SHA256, b"d.e.f").as_ref()).into()), Token),
            ("ath in hex", claim("ath", "00".repeat(32).into()), Token),
            ("nonce a number", claim("nonce", 1.into()), Claims),
        ];
        let proofs = Proofs::new().unwrap();
        for (name, proof, fault) in cases {
            let outcome =
                proofs.check(&proof, &asked(&http::Method::POST), &identity, &policy(), NOW).map(drop);
            assert_eq!(outcome, Err(Denial::ProofInvalid(fault)), "{name}");
        }
        assert!(proofs.is_empty(), "what is refused takes no room");
        assert_eq!(
            proofs.check(&good, &asked(&http::Method::POST), &identity, &policy(), NOW).map(drop),
            Ok(())
        );
    }

    #[test]
    fn urls_are_compared_as_urls() {
        let method = Method::GET;
        let asked =
            |authority, path, websocket| Asked { method: &method, authority, path, websocket, token: TOKEN };
        for (url, authority, path) in [
            ("https://Chat.Example/a", "chat.example", "/a"),
            ("https://chat.example:443/a", "chat.example", "/a"),
            ("https://chat.example/a", "chat.example:443", "/a"),
            ("HTTPS://chat.example/a", "chat.example", "/a"),
            ("https://chat.example/a?b=c", "chat.example", "/a"),
            ("https://chat.example", "chat.example", "/"),
            ("https://chat.example/%7ea/%c3%a9", "chat.example", "/~a/%C3%A9"),
            ("https://[::1]:8443/a", "[::1]:8443", "/a"),
        ] {
            assert!(is_target(url, &asked(authority, path, false)), "{url} {authority} {path}");
        }
        assert!(is_target("wss://chat.example/ws", &asked("chat.example", "/ws", true)));
        for (url, path) in [
            ("https://chat.example/a%2Fb", "/a/b"),
            ("https://chat.example/a/", "/a"),
            ("https://chat.example/A", "/a"),
            ("https://chat.example/a%", "/a%25"),
            ("https://chat.example//a", "/a"),
        ] {
            assert!(!is_target(url, &asked("chat.example", path, false)), "{url} {path}");
        }
    }

    #[test]
    fn nonces_are_ours_and_of_this_time() {
        let mint = Mint::es256("k");
        let (proofs, identity) = (Proofs::new().unwrap(), holder(&mint, "alice"));
        let policy = DpopPolicy { nonce: true, ..policy() };
        let check = |id: &str, nonce: Option<&str>, now: u64| {
            let mut claims = claims(id);
            claims["iat"] = now.into();
            if let Some(nonce) = nonce {
                claims["nonce"] = nonce.into();
            }
            proofs.check(&proof_of(&mint, &claims), &asked(&Method::POST), &identity, &policy, now).map(drop)
        };
        let nonce = proofs.nonce(&policy, NOW);
        let wanted = |now| Err(Denial::ProofNonce { nonce: proofs.nonce(&policy, now) });
        assert_eq!(check("1", None, NOW), wanted(NOW));
        assert_eq!(check("1", Some(&nonce), NOW), Ok(()));
        assert_eq!(check("2", Some(&nonce), NOW + 300), Ok(()), "in the next step of time");
        assert_eq!(check("3", Some(&nonce), NOW + 600), wanted(NOW + 600));
        let foreign = Proofs::new().unwrap().nonce(&policy, NOW);
        for bad in [&*foreign, "x", "AAAA", &nonce[1..], &format!("{nonce}AAAA")] {
            assert_eq!(check("4", Some(bad), NOW), wanted(NOW), "{bad}");
        }
    }

    #[test]
    fn room_is_bounded_and_nobody_is_pushed_out() {
        let mint = Mint::eddsa("k");
        let policy = DpopPolicy { max_proofs: 12, max_proofs_per_subject: 10, ..policy() };
        let proofs = Proofs::new().unwrap();
        let check = |who: &str, id: u32, now: u64| {
            let mut claims = claims(&format!("{who} {id}"));
            claims["iat"] = now.into();
            proofs
                .check(&proof_of(&mint, &claims), &asked(&Method::POST), &holder(&mint, who), &policy, now)
                .map(drop)
        };
        for id in 0..10 {
            assert_eq!(check("mallory", id, NOW), Ok(()));
        }
        assert_eq!(check("mallory", 10, NOW), Err(Denial::TooManyProofs));
        assert_eq!(check("alice", 0, NOW), Ok(()));
        assert_eq!(check("alice", 1, NOW), Ok(()));
        assert_eq!(check("bob", 0, NOW), Err(Denial::TooManyProofs), "full: refused, not forgotten");
        assert_eq!(check("alice", 0, NOW), Err(Denial::ProofInvalid(ProofFault::Replayed)));
        assert_eq!(check("bob", 0, NOW + 71), Ok(()));
        assert_eq!(proofs.len(), 1);
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC*", authority in "\\PC*", path in "\\PC*") {
            let identity = holder(&Mint::eddsa("k"), "alice");
            let method = Method::GET;
            let asked = Asked { method: &method, authority: &authority, path: &path, websocket: true, token: TOKEN };
            prop_assert!(Proofs::new().unwrap().check(&text, &asked, &identity, &policy(), NOW).is_err());
            let _ = is_target(&text, &asked);
        }

        /// Against a list: what was accepted within its time is never accepted again.
        #[test]
        fn no_proof_counts_twice(steps in prop::collection::vec((0u8..2, 0u32..6, 0u64..40), 0..60)) {
            let policy = DpopPolicy { max_proofs: 10, max_proofs_per_subject: 6, ..policy() };
            let seen = Seen::default();
            let mut accepted: HashMap<(u8, u32), u64> = HashMap::new();
            let mut now = NOW;
            for (who, id, wait) in steps {
                now += wait;
                let outcome = seen.remember(("iss", &who.to_string()), &[who; 32], &id.to_string(), &policy, now + 71, now);
                let known = accepted.get(&(who, id)).is_some_and(|until| now < *until);
                let live = accepted.values().filter(|until| now < **until).count();
                match outcome {
                    Ok(()) => {
                        prop_assert!(!known);
                        accepted.insert((who, id), now + 71);
                    }
                    Err(Denial::ProofInvalid(ProofFault::Replayed)) => prop_assert!(known),
                    Err(_) => prop_assert!(!known && live >= 6),
                }
            }
        }
    }
}
