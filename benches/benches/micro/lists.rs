//! Looking addresses up in a million prefixes.

use std::fmt::Write as _;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, anyhow, ensure};
use criterion::Criterion;
use sealgate::limits::{Listed, ListsBuilder};

const PREFIXES: u32 = 1_000_000;

pub(crate) fn measure(criterion: &mut Criterion) -> Result<()> {
    let mut text = String::new();
    for number in 0..PREFIXES / 2 {
        writeln!(text, "{}/24", Ipv4Addr::from(number << 9))?;
        writeln!(text, "{}/64", Ipv6Addr::from(0x2001_0db8 << 96 | u128::from(number) << 65))?;
    }
    let mut builder = ListsBuilder::default();
    builder.add(text.as_bytes(), Listed::Denied).map_err(|faults| anyhow!("{faults:?}"))?;
    let lists = builder.build();
    ensure!(lists.of(Ipv4Addr::from(512).into()) == Listed::Denied);

    let mut group = criterion.benchmark_group("lists");
    // Addresses all over, so that each look-up finds the caches cold for its place.
    let scattered = |bits: u32| (0..65_536u32).map(move |it| it.wrapping_mul(0x9e37_79b1) >> (32 - bits));
    let v4: Vec<IpAddr> = scattered(28).map(|it| Ipv4Addr::from(it).into()).collect();
    let v6: Vec<IpAddr> =
        scattered(20).map(|it| Ipv6Addr::from(0x2001_0db8 << 96 | u128::from(it) << 64).into()).collect();
    for (name, addresses) in [("v4", &v4), ("v6", &v6)] {
        let mut turn = addresses.iter().cycle();
        group.bench_function(name, |b| b.iter(|| turn.next().map(|address| lists.of(*black_box(address)))));
    }
    group.finish();
    Ok(())
}
