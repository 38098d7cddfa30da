//! A policy, an issuer with a real key, and a user: what every benchmark starts from.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::{HeaderMap, HeaderValue, Method, header};
use sealgate::limits::{RateClock, RateStore, Rates};
use sealgate::session::{KeyFetcher, TokenCache, Verifier};
use sealgate_keys::SigningKey;
use sealgate_policy::{
    Bundle, Evidence, Identity, Policy, RequestFacts, RequestPermit, TunnelPermit, settle,
};
use serde_json::json;
use tempfile::TempDir;

pub(crate) struct Fixture {
    pub(crate) policy: Policy,
    pub(crate) rates: Rates,
    pub(crate) verifier: Verifier,
    pub(crate) identity: Arc<Identity>,
    pub(crate) token: String,
    /// Unix seconds at which the token holds.
    pub(crate) now: u64,
    pub(crate) headers: HeaderMap,
    key: SigningKey,
    /// The verifier reads its keys anew on it, from the folder.
    _runtime: tokio::runtime::Runtime,
    _folder: TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let key = SigningKey::generate().map_err(|error| anyhow!("{error}"))?;
        std::fs::write(folder.path().join("jwks.json"), json!({ "keys": [key.public_jwk()] }).to_string())?;

        let bundle = Bundle::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("policy"))?;
        let state = folder.path().display().to_string();
        let variables = BTreeMap::from([("state".to_owned(), state)]);
        let policy = Policy::compile(&bundle, &variables).map_err(|errors| anyhow!("{errors}"))?;
        let rates = Rates::build(policy.rates(), &RateStore::new(1 << 16), RateClock::default());

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let verifier = runtime.block_on(Verifier::build(policy.issuers(), None, &KeyFetcher::system()));
        let verifier = verifier.map_err(|errors| anyhow!("{errors:?}"))?;

        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let token = sign(&key, "alice", now)?;
        let identity = verifier.verify(&token, now, &cache(8)?).map_err(|failure| anyhow!("{failure:?}"))?;
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("localhost"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static("sealgate-benches"));
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT_LANGUAGE, HeaderValue::from_static("en"));
        headers.insert(header::AUTHORIZATION, HeaderValue::try_from(format!("Bearer {token}"))?);
        Ok(Self {
            policy,
            rates,
            verifier,
            identity,
            token,
            now,
            headers,
            key,
            _runtime: runtime,
            _folder: folder,
        })
    }

    /// A token of its own for each subject.
    pub(crate) fn token_for(&self, subject: &str) -> Result<String> {
        sign(&self.key, subject, self.now)
    }

    pub(crate) fn facts<'a>(&'a self, path: &'a str, websocket: bool) -> RequestFacts<'a> {
        RequestFacts {
            certificate: None,
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            host: "localhost",
            method: &Method::GET,
            path,
            query: None,
            headers: &self.headers,
            websocket,
            content_length: None,
            has_body: false,
            tls: sealgate_policy::TlsFacts::default(),
        }
    }

    /// The whole judgement of a request whose token was verified.
    pub(crate) fn permit(&self, facts: &RequestFacts<'_>) -> Result<RequestPermit> {
        let refused = |denial: sealgate_policy::Denial| anyhow!("refused: {}", denial.reason());
        let matched = self.policy.match_request(facts).map_err(refused)?;
        let demands = matched.judge(facts, Some(Arc::clone(&self.identity))).map_err(refused)?;
        let rates = self.rates.take(demands.rates(), &demands.rate_facts(facts.headers)).map(drop);
        settle(demands, Evidence { rates, revoked: false, lost: None }).map_err(refused)
    }

    pub(crate) fn tunnel(&self, path: &str) -> Result<TunnelPermit> {
        self.permit(&self.facts(path, true))?.into_tunnel().context("not a websocket")
    }
}

/// An empty cache of verified tokens.
pub(crate) fn cache(capacity: usize) -> Result<TokenCache> {
    TokenCache::new(capacity).map_err(|_| anyhow!("no random numbers"))
}

fn sign(key: &SigningKey, subject: &str, now: u64) -> Result<String> {
    let header = json!({ "alg": "ES256", "typ": "at+jwt", "kid": key.kid() });
    let claims = json!({
        "iss": "https://identity.sealgate.test", "aud": "sealgate", "sub": subject, "sid": format!("session-of-{subject}"),
        "jti": format!("token-of-{subject}"), "roles": ["user"], "dept": "engineering", "iat": now, "nbf": now,
        "exp": now + 86_400, "auth_time": now, "acr": "aal1", "amr": ["pwd"],
    });
    let text = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", text(header), text(claims));
    let signature = key.sign(signed.as_bytes()).map_err(|error| anyhow!("{error}"))?;
    Ok(format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
}
