//! Judging a request by the policies of access: looked up, remembered, evaluated.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use criterion::Criterion;
use http::{HeaderMap, Method};
use sealgate_policy::{
    Binding, Bundle, DecisionCache, Evidence, Identity, IdentityParts, Policy, RequestFacts, TlsFacts, settle,
};

/// Beside the enterprise bundle: a rule that nothing but its token decides on cannot stand there, so a demonstration of
/// what takes an evaluation does.
const OVERLAY: [(&str, &str); 3] = [
    (
        "policy.d/bench.toml",
        "[[route]]\nname = \"evaluated\"\npath = \"/evaluated/{id}\"\nmethods = [\"GET\"]\nupstream = \"backend\"\n\
         action = \"bench.evaluated\"\nresource = { type = \"Thing\", id = \"path:id\" }\n",
    ),
    (
        "policy.d/bench.cedarschema",
        "entity Thing;\naction \"bench.evaluated\" appliesTo { principal: User, resource: Thing, context: Circumstances };\n",
    ),
    (
        "policy.d/bench.cedar",
        "@id(\"bench\") permit (principal in Role::\"user\", action == Action::\"bench.evaluated\", resource)\n\
         when { context.address.isLoopback() && context.now > datetime(\"2020-01-01\") };\n",
    ),
];

pub(crate) fn measure(criterion: &mut Criterion) -> Result<()> {
    let policy = compile(true)?;
    let without = compile(false)?;
    let identity = Arc::new(Identity::new(IdentityParts {
        issuer: "https://identity.sealgate.test".into(),
        subject: "alice".into(),
        session: Some("s-1".into()),
        roles: vec!["user".into()],
        department: Some("engineering".into()),
        amr: vec!["pwd".into()],
        ..IdentityParts::default()
    }));
    let headers = HeaderMap::new();
    let decisions = DecisionCache::new(4096);
    let judge = |policy: &Policy, path: &str, now: u64| -> Result<()> {
        let facts = RequestFacts {
            certificate: None,
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            host: "localhost",
            method: &Method::GET,
            path,
            query: None,
            headers: &headers,
            websocket: false,
            content_length: None,
            has_body: false,
            tls: TlsFacts::default(),
        };
        let refused = |denial: sealgate_policy::Denial| anyhow!("refused: {}", denial.reason());
        let matched = policy.match_request(&facts).map_err(refused)?;
        let demands = matched.judge(&facts, Some(Arc::clone(&identity))).map_err(refused)?;
        let demands = demands.prove(Binding::default(), now, &decisions).map_err(refused)?;
        settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None }).map(drop).map_err(refused)
    };
    let now = 1_800_000_000;
    let (devices, own, evaluated) =
        ("/v1/users/bob/devices", "/v1/users/alice/history", "/evaluated/thing-1");
    judge(&without, devices, now)?;
    judge(&policy, devices, now)?;
    judge(&policy, own, now)?;
    judge(&policy, evaluated, now)?;
    ensure!(judge(&policy, "/v1/users/bob/history", now).is_err());

    let mut group = criterion.benchmark_group("access");
    // The whole judgement of a request but for token and rates; the first is what it costs without asking who may.
    group.bench_function("unasked", |b| b.iter(|| judge(&without, black_box(devices), now)));
    group.bench_function("looked-up", |b| b.iter(|| judge(&policy, black_box(devices), now)));
    group.bench_function("looked-up-with-owner", |b| b.iter(|| judge(&policy, black_box(own), now)));
    group.bench_function("remembered", |b| b.iter(|| judge(&policy, black_box(evaluated), now)));
    let later = Cell::new(now);
    group.bench_function("evaluated", |b| {
        b.iter(|| {
            // Another second is another question.
            later.set(later.get() + 1);
            judge(&policy, black_box(evaluated), later.get())
        });
    });
    group.finish();
    Ok(())
}

fn compile(asks: bool) -> Result<Policy> {
    let mut bundle = Bundle::shipped("enterprise").ok_or_else(|| anyhow!("the enterprise bundle"))?;
    if asks {
        bundle.files.extend(OVERLAY.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())));
    } else {
        bundle.files.retain(|name, _| !name.starts_with("authz."));
        let text = bundle.files.get("policy.toml").cloned().unwrap_or_default();
        // Without policies nothing decides on resources either.
        let text = String::from_utf8(text)?;
        let lines = text.lines().filter(|line| !line.starts_with("resource = "));
        let text: String = lines.flat_map(|line| [line, "\n"]).collect();
        bundle.files.insert("policy.toml".to_owned(), text.into_bytes());
    }
    let variables = BTreeMap::from([("state".to_owned(), "/state".to_owned())]);
    Policy::compile(&bundle, &variables).map_err(|errors| anyhow!("{errors}"))
}
