//! Judging messages in an open WebSocket: judge, take rates, settle.

use std::hint::black_box;

use anyhow::{Result, anyhow};
use criterion::{Criterion, Throughput};
use sealgate_policy::{
    Direction, Evidence, Message, MessageKind, MessagePermit, TunnelPermit, settle_message,
};

use crate::fixture::Fixture;

pub(crate) fn measure(criterion: &mut Criterion, fixture: &Fixture) -> Result<()> {
    let mut group = criterion.benchmark_group("message");
    for (name, path) in [("bare", "/v1/echo"), ("schema-and-rate", "/v1/echo-checked")] {
        let tunnel = fixture.tunnel(path)?;
        for size in [128, 4096] {
            let payload = payload(size);
            permit(fixture, &tunnel, payload.as_bytes()).map_err(|reason| anyhow!("{name}: {reason}"))?;
            group.throughput(Throughput::Bytes(size as u64));
            group.bench_function(format!("{name}/{size}"), |b| {
                b.iter(|| permit(fixture, &tunnel, black_box(payload.as_bytes())));
            });
        }
    }
    let tunnel = fixture.tunnel("/v1/echo-checked")?;
    group.throughput(Throughput::Elements(1));
    group.bench_function("refused-by-schema", |b| {
        b.iter(|| permit(fixture, &tunnel, black_box(br#"{"type":"echo","text":7}"#)));
    });
    group.finish();
    Ok(())
}

fn permit(fixture: &Fixture, tunnel: &TunnelPermit, payload: &[u8]) -> Result<MessagePermit, &'static str> {
    let message = Message { direction: Direction::ToUpstream, kind: MessageKind::Text, payload };
    let demands = tunnel.judge_message(&message).map_err(|refusal| refusal.denial.reason())?;
    let rates = match demands.rates() {
        [] => Ok(()),
        wanted => fixture.rates.take(wanted, &demands.rate_facts()).map(drop),
    };
    settle_message(demands, Evidence { rates, revoked: false, lost: None })
        .map_err(|refusal| refusal.denial.reason())
}

fn payload(size: usize) -> String {
    let empty = r#"{"type":"echo","text":""}"#;
    format!(r#"{{"type":"echo","text":"{:.<1$}"}}"#, "", size - empty.len())
}
