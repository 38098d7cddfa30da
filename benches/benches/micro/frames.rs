//! Reading WebSocket frames where they lie, and taking masks off.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use criterion::{Criterion, Throughput};
use sealgate::websocket::frame::{Opcode, Sender, unmask, write_frame};
use sealgate::websocket::message::{Assembler, Scratch, Step};
use sealgate_policy::TunnelLimits;

const LIMITS: TunnelLimits = TunnelLimits {
    max_frame: 65536,
    max_message: 65536,
    max_fragments: 64,
    max_inflate_ratio: 100,
    control_per_second: 10,
    idle: None,
    ping_interval: Duration::from_secs(30),
    pong_timeout: Duration::from_secs(20),
    write_timeout: Duration::from_secs(20),
    buffer: 262_144,
};

/// Frames in one read: what sixteen messages in flight look like.
const FRAMES: usize = 16;

pub(crate) fn measure(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group("frames");
    for (sender, mask, who) in
        [(Sender::Client, Some([1, 2, 3, 4]), "client"), (Sender::Server, None, "server")]
    {
        let mut wire = Vec::new();
        for _ in 0..FRAMES {
            write_frame(&mut wire, Opcode::Text, mask, &[b'x'; 128]);
        }
        let now = Instant::now();
        for (judged, how) in [(false, "passed-on"), (true, "judged")] {
            let mut scratch = Scratch::default();
            ensure!(read(sender, &wire, judged, now, &mut scratch)? == FRAMES);
            group.throughput(Throughput::Elements(FRAMES as u64));
            group.bench_function(format!("{who}/{how}"), |b| {
                b.iter(|| read(sender, black_box(&wire), judged, now, &mut scratch));
            });
        }
    }
    for size in [128, 4096, 65536] {
        let mut payload = vec![0; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("unmask/{size}"), |b| {
            b.iter(|| unmask(black_box(&mut payload), black_box([1, 2, 3, 4]), 1));
        });
    }
    group.finish();
    Ok(())
}

/// Takes all frames from `wire`; returns how many messages ended.
fn read(sender: Sender, wire: &[u8], judged: bool, now: Instant, scratch: &mut Scratch) -> Result<usize> {
    let mut assembler = Assembler::new(sender, false);
    let (mut rest, mut messages) = (wire, 0);
    loop {
        let length = match assembler.next(rest, judged, &LIMITS, now, scratch)? {
            Step::Partial => return Ok(messages),
            Step::Message { len, .. } | Step::Frame { len, last: true, .. } => len,
            _ => bail!("a frame that was not sent"),
        };
        messages += 1;
        rest = rest.get(length..).unwrap_or_default();
    }
}
