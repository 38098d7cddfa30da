//! Judging connections and requests: match, judge, take rates, settle.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, ensure};
use criterion::Criterion;
use sealgate_policy::ConnectionFacts;

use crate::fixture::Fixture;

pub(crate) fn measure(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    let mut group = criterion.benchmark_group("permit");

    let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let facts = ConnectionFacts { peer, open_total: 10, open_from_address: 1, refused: false };
    ensure!(fixture.policy.permit_connection(&facts).is_ok());
    group.bench_function("connection", |b| b.iter(|| fixture.policy.permit_connection(black_box(&facts))));

    let facts = fixture.facts("/v1/echo", false);
    fixture.permit(&facts)?;
    group.bench_function("request", |b| b.iter(|| fixture.permit(black_box(&facts))));

    let strange = fixture.facts("/v1/nothing", false);
    ensure!(fixture.policy.match_request(&strange).is_err());
    group.bench_function("no-route", |b| b.iter(|| fixture.policy.match_request(black_box(&strange))));
    group.finish();
    Ok(())
}
