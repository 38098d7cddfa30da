//! Taking rates: one key again and again, and many in turn.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;

use anyhow::{Result, ensure};
use criterion::Criterion;
use sealgate_policy::{RateFacts, RateIndex};

use crate::fixture::Fixture;

pub(crate) fn measure(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    let mut group = criterion.benchmark_group("rates");
    let rates = &fixture.rates;
    let one = [RateIndex(0)];
    let two = [RateIndex(0), RateIndex(1)];
    let subjects: Vec<String> = (0..10_000).map(|number| format!("user-{number}")).collect();
    let facts = |subject| RateFacts {
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        issuer: Some("https://identity.sealgate.test"),
        subject: Some(subject),
        session: Some(subject),
        device: None,
        headers: None,
        cost: NonZeroU32::MIN,
        route: "echo",
        message_type: None,
        socket: None,
    };
    ensure!(rates.take(&two, &facts("alice")).is_ok());
    group.bench_function("one", |b| b.iter(|| rates.take(black_box(&one), &facts("alice"))));
    group.bench_function("two", |b| b.iter(|| rates.take(black_box(&two), &facts("alice"))));
    let mut turn = subjects.iter().cycle();
    group.bench_function("one-of-10000", |b| {
        b.iter(|| turn.next().map(|subject| rates.take(black_box(&one), &facts(subject))));
    });
    group.finish();
    Ok(())
}
