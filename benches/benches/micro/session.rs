//! What a session costs: its token verified by each algorithm, its proofs of possession, and looking for it among what was revoked.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use criterion::{BatchSize, Criterion};
use http::{HeaderMap, HeaderValue, Method};
use ring::digest::{SHA256, digest};
use sealgate::session::{
    Asked, DPOP, KeyFetcher, Proofs, Revocation, Revocations, Target, Verifier, bearer, proof,
};
use sealgate_policy::{Binding, Bundle, Identity, IdentityParts, Policy};
use serde_json::json;

use crate::fixture::{Fixture, cache};
use crate::keys::{self, ALGORITHMS, Key, encode};

/// Revocations that hold while others are looked for.
const REVOKED: usize = 1_000_000;

pub(crate) fn measure(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    cold(criterion, fixture.now)?;
    proofs(criterion, fixture)?;
    revoked(criterion, fixture)
}

/// A token that nobody has seen yet, by algorithm.
fn cold(criterion: &mut Criterion, now: u64) -> Result<()> {
    let keys = ALGORITHMS.into_iter().map(Key::generate).collect::<Result<Vec<_>>>()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("jwks.json");
    keys::write(&keys, &path)?;
    let mut text = "version = 1\n".to_owned();
    for algorithm in ALGORITHMS {
        text += &format!(
            "[[issuer]]\nname = \"{}\"\nissuer = \"https://{algorithm}.test\"\naudience = [\"sealgate\"]\n\
             algorithms = [\"{algorithm}\"]\njwks = \"file:{}\"\n",
            algorithm.to_ascii_lowercase(),
            path.display()
        );
    }
    let files = BTreeMap::from([("policy.toml".to_owned(), text.into_bytes())]);
    let policy = Policy::compile(&Bundle { root: PathBuf::from("/"), files }, &BTreeMap::new());
    let policy = policy.map_err(|errors| anyhow!("{errors}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let verifier = runtime.block_on(Verifier::build(policy.issuers(), None, &KeyFetcher::system()));
    let verifier = verifier.map_err(|errors| anyhow!("{errors:?}"))?;

    let mut group = criterion.benchmark_group("token-cold");
    for key in &keys {
        let claims = json!({
            "iss": format!("https://{}.test", key.algorithm), "aud": "sealgate", "sub": "alice", "sid": "session-of-alice",
            "jti": "token-of-alice", "roles": ["user"], "iat": now, "nbf": now, "exp": now + 3600, "client_id": "bench",
        });
        let token = key.sign(json!({ "typ": "at+jwt", "kid": key.algorithm }), &claims)?;
        verifier
            .verify(&token, now, &cache(8)?)
            .map_err(|failure| anyhow!("{}: {failure:?}", key.algorithm))?;
        group.bench_function(key.algorithm, |b| {
            b.iter_batched(
                || cache(8),
                |empty| empty.map(|empty| verifier.verify(black_box(&token), now, &empty)),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
    Ok(())
}

/// A proof of possession (RFC 9449) that came for the first time.
fn proofs(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    const TOKEN: &str = "a.b.c";
    let mut group = criterion.benchmark_group("proof");
    for algorithm in ["ES256", "ES384", "EdDSA"] {
        let key = Key::generate(algorithm)?;
        let jwk = key.jwk();
        // Members are in order of their names: as RFC 7638 wants them.
        let thumbprint = digest(&SHA256, jwk.to_string().as_bytes()).as_ref().try_into()?;
        let binding = Binding { key: Some(thumbprint), certificate: None };
        let identity = Identity::new(IdentityParts {
            issuer: "https://identity.sealgate.test".into(),
            subject: "alice".to_owned(),
            binding,
            ..IdentityParts::default()
        });
        let claims = json!({
            "jti": "proof-1", "htm": "GET", "htu": "https://localhost/v1/echo", "iat": fixture.now,
            "ath": encode(digest(&SHA256, TOKEN.as_bytes())),
        });
        let text = key.sign(json!({ "typ": "dpop+jwt", "jwk": jwk }), &claims)?;
        let headers = HeaderMap::from_iter([(DPOP, HeaderValue::try_from(text)?)]);
        let asked = Asked {
            method: &Method::GET,
            authority: "localhost",
            path: "/v1/echo",
            websocket: false,
            token: TOKEN,
        };
        let check = |proofs: &Proofs| {
            let found = proof(black_box(&headers)).ok().flatten().unwrap_or_default();
            proofs.check(found, &asked, &identity, fixture.policy.dpop(), fixture.now)
        };
        drop(check(&none()?).map_err(|denial| anyhow!("{algorithm}: {}", denial.reason()))?);
        group.bench_function(algorithm, |b| {
            b.iter_batched(none, |proofs| proofs.map(|proofs| check(&proofs).is_ok()), BatchSize::SmallInput);
        });
    }
    group.finish();
    Ok(())
}

fn none() -> Result<Proofs> {
    Proofs::new().map_err(|_| anyhow!("no random numbers"))
}

/// Looking among a million revocations, and all that is done about a token that its core has seen.
fn revoked(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    let Fixture { verifier, token, now, .. } = fixture;
    let issuer = &*fixture.identity.issuer;
    let revocations = Revocations::new(2 * REVOKED);
    for number in 0..REVOKED {
        let session = format!("revoked-{number}");
        let target = Target::Session { issuer, session: &session };
        revocations.revoke(&Revocation { target, issued_before: u64::MAX, until: now + 86_400 }, *now)?;
    }
    ensure!(revocations.len() == REVOKED);
    let identity = |number: usize, session: String| {
        Identity::new(IdentityParts {
            issuer: issuer.into(),
            subject: format!("user-{number}"),
            session: Some(session),
            token_id: Some(format!("token-{number}")),
            issued_at: Some(*now),
            ..IdentityParts::default()
        })
    };
    // Many, so that the entries are not all in the processor's memory.
    let good: Vec<_> = (0..100_000).map(|number| identity(number, format!("session-{number}"))).collect();
    let bad: Vec<_> =
        (0..100_000).map(|number| identity(number, format!("revoked-{}", number * 7))).collect();
    ensure!(good.iter().all(|it| !revocations.is_revoked(it, *now)));
    ensure!(bad.iter().all(|it| revocations.is_revoked(it, *now)));

    let mut group = criterion.benchmark_group("revocations-of-1000000");
    for (name, identities) in [("good", &good), ("revoked", &bad)] {
        let mut turn = identities.iter().cycle();
        group.bench_function(name, |b| {
            b.iter(|| turn.next().map(|identity| revocations.is_revoked(black_box(identity), *now)));
        });
    }
    group.finish();

    // As `http/walk.rs` does it: found, looked up in the core's cache, looked for among what was revoked.
    let mut group = criterion.benchmark_group("warm-token");
    let warm = cache(20_000)?;
    let tokens = (0..10_000).map(|number| fixture.token_for(&format!("user-{number}")));
    let tokens = tokens.collect::<Result<Vec<_>>>()?;
    let headers = |token: &String| {
        let value = HeaderValue::try_from(format!("Bearer {token}"))?;
        anyhow::Ok(HeaderMap::from_iter([(http::header::AUTHORIZATION, value)]))
    };
    let judge = |headers: &HeaderMap| {
        let found = bearer(headers, false).ok().flatten()?;
        let identity = verifier.verify(found.as_str(), *now, &warm).ok()?;
        Some(revocations.is_revoked(&identity, *now))
    };
    let one = headers(token)?;
    let many = tokens.iter().map(headers).collect::<Result<Vec<_>>>()?;
    ensure!(many.iter().chain([&one]).all(|headers| judge(headers) == Some(false)));
    group.bench_function("one", |b| b.iter(|| judge(black_box(&one))));
    let mut turn = many.iter().cycle();
    group.bench_function("of-10000", |b| b.iter(|| turn.next().map(|headers| judge(black_box(headers)))));
    group.finish();
    Ok(())
}
