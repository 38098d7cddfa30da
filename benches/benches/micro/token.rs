//! Verifying tokens, by signature and by the core's cache.

use std::hint::black_box;

use anyhow::{Result, anyhow, ensure};
use criterion::{BatchSize, Criterion};
use sealgate::session::bearer;

use crate::fixture::{Fixture, cache};

pub(crate) fn measure(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    let Fixture { verifier, token, now, .. } = fixture;
    let mut group = criterion.benchmark_group("token");

    ensure!(bearer(&fixture.headers, false).is_ok_and(|found| found.is_some()));
    group.bench_function("bearer", |b| b.iter(|| bearer(black_box(&fixture.headers), false).is_ok()));

    group.bench_function("cold", |b| {
        let empty = || cache(8);
        b.iter_batched(
            empty,
            |empty| empty.map(|empty| verifier.verify(black_box(token), *now, &empty)),
            BatchSize::SmallInput,
        );
    });

    // As many as a busy core knows, so that the cache's memory is not all in the processor's.
    let cache = cache(20_000)?;
    let tokens = (0..10_000).map(|number| fixture.token_for(&format!("user-{number}")));
    let tokens = tokens.collect::<Result<Vec<_>>>()?;
    for token in &tokens {
        verifier.verify(token, *now, &cache).map_err(|failure| anyhow!("{failure:?}"))?;
    }
    group.bench_function("cached", |b| b.iter(|| verifier.verify(black_box(token), *now, &cache)));
    let mut turn = tokens.iter().cycle();
    group.bench_function("cached-of-10000", |b| {
        b.iter(|| turn.next().map(|token| verifier.verify(black_box(token), *now, &cache)));
    });
    group.finish();
    Ok(())
}
