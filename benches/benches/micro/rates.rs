//! Taking rates: one key again and again, and many in turn; and from a real Redis, if there is one (`redis-server`).

use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use criterion::{Criterion, Throughput};
use sealgate::shared::{AskKind, RateAsk, rate_command};
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
    shared(criterion)
}

/// What one request asks for, or several whose questions go together: the command made, a round trip over loopback to Debian's Redis
/// with the script that runs there, and the answer read. A request through the gateway waits for this, and costs it less: it waits
/// without a thread.
fn shared(criterion: &mut Criterion) -> Result<()> {
    let mut redis = Redis::start()?;
    let mut group = criterion.benchmark_group("shared-rates");
    for together in [1, 16, 128] {
        let groups: Vec<Vec<RateAsk>> = (0..together)
            .map(|number| {
                let key = format!("requests-per-subject:{number:032x}");
                let (interval, reach) = (0.01, 1_000_000.0);
                vec![RateAsk { key, interval, reach, cost: 1, kind: AskKind::Enforced }]
            })
            .collect();
        let command = rate_command("bench", &groups, None);
        ensure!(redis.ask(&command, together)? == 2 * together, "another answer");
        group.throughput(Throughput::Elements(u64::try_from(together)?));
        group.bench_function(format!("asked-of-redis-{together}"), |b| {
            b.iter(|| redis.ask(&rate_command("bench", black_box(&groups), None), together));
        });
    }
    group.finish();
    Ok(())
}

/// Debian's Redis, on a free port; ended with this value.
struct Redis {
    child: Child,
    connection: BufReader<TcpStream>,
}

impl Redis {
    fn start() -> Result<Self> {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
        let child = command.arg(port.to_string()).stdout(Stdio::null()).stdin(Stdio::null()).spawn();
        let mut child = child.context("redis-server (Debian: redis-server)")?;
        let deadline = Instant::now() + Duration::from_secs(15);
        let stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    let _ = (child.kill(), child.wait());
                    return Err(error).context("redis-server does not listen");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_nodelay(true)?;
        Ok(Self { child, connection: BufReader::new(stream) })
    }

    /// How many numbers it answers to as many as `together`.
    fn ask(&mut self, command: &[u8], together: usize) -> Result<usize> {
        self.connection.get_mut().write_all(command)?;
        let mut line = String::new();
        let mut numbers = 0;
        for _ in 0..=2 * together {
            line.clear();
            self.connection.read_line(&mut line)?;
            numbers += usize::from(line.starts_with(':'));
            ensure!(line.starts_with([':', '*']), "Redis said {line}");
        }
        Ok(numbers)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}
