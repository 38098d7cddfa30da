//! The session clock with 100,000 sessions, and what a ticket costs.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use criterion::{BatchSize, Criterion};
use http::{HeaderMap, HeaderValue, header};
use sealgate::session::{Look, Sessions, Tickets, open_sealed, seal};
use sealgate_policy::{Identity, IdentityParts};

use crate::fixture::Fixture;

const SESSIONS: usize = 100_000;

fn identity(number: usize, now: u64) -> Arc<Identity> {
    Arc::new(Identity::new(IdentityParts {
        issuer: "https://identity.sealgate.test".into(),
        subject: format!("user-{number}"),
        session: Some(format!("session-{number}")),
        auth_time: Some(now),
        expires_at: now + 3_600,
        ..IdentityParts::default()
    }))
}

pub(crate) fn measure(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    let Fixture { policy, now, token, .. } = fixture;
    let (rules, idle) = (policy.session(), policy.session().idle.as_secs());
    let mut group = criterion.benchmark_group("clock");

    let sessions = Sessions::new();
    let identities: Vec<_> = (0..SESSIONS).map(|number| identity(number, *now)).collect();
    for who in &identities {
        let begun = sessions.begin(who, rules, idle, *now, None, *now);
        ensure!(begun.is_ok());
    }
    // In an order that no cache of the processor guesses.
    let shuffled = || identities.iter().cycle().step_by(7_919);
    let mut turn = shuffled();
    group.bench_function("look-up-of-100000", |b| {
        b.iter(|| turn.next().map(|who| sessions.look(black_box(who), idle, *now)));
    });
    let (mut turn, mut second) = (shuffled(), *now);
    group.bench_function("activity-of-100000", |b| {
        b.iter(|| {
            second += 1;
            if let Some(Look::Live(session)) = turn.next().map(|who| sessions.look(who, u64::MAX, *now)) {
                session.touch(second);
            }
        });
    });
    // What a socket does for each message.
    let session = identities.first().and_then(|who| sessions.find(who.session_id));
    let session = session.ok_or_else(|| anyhow!("no session"))?;
    group.bench_function("activity-again-in-a-second", |b| b.iter(|| session.touch(black_box(*now))));

    let mut headers = HeaderMap::new();
    headers.insert(header::ORIGIN, HeaderValue::from_static("https://chat.example"));
    let tickets = Tickets::default();
    let who = identities.first().ok_or_else(|| anyhow!("no identity"))?;
    let ttl = std::time::Duration::from_secs(30);
    group.bench_function("ticket-made-and-redeemed", |b| {
        b.iter(|| {
            let ticket = tickets.issue(who, &headers, ttl, *now);
            ticket.and_then(|ticket| tickets.redeem(ticket.as_str(), &headers, *now))
        });
    });
    let text = "A".repeat(43);
    let sealed = seal(&text, token, b"https://chat.example", *now).ok_or_else(|| anyhow!("not sealed"))?;
    ensure!(open_sealed(&text, sealed.clone()).is_some());
    group.bench_function("ticket-of-another-gateway-opened", |b| {
        b.iter_batched(
            || sealed.clone(),
            |sealed| open_sealed(black_box(&text), sealed),
            BatchSize::SmallInput,
        );
    });
    group.finish();
    Ok(())
}
