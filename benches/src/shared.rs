//! Requests whose rate gateways share through Redis: what asking it costs, and what becomes of them when it is late or away.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::crowd::ask;
use crate::load::{Plan, Visit, Work, visit};
use crate::measure::Spread;
use crate::proxies::{Kind, Proxy, Redis, Stage};

/// `shared.deadline`: what a request waits for Redis at most.
const DEADLINE: Duration = Duration::from_millis(50);

/// The rate that every request takes from, as `benches/policy/` has it, and as gateways can share it.
const LOCAL: &str = "name = \"requests-per-subject\"\nper = [\"subject\"]\nquota = 1000000000\n";
const SHARED: &str =
    "name = \"requests-per-subject\"\nper = [\"subject\"]\nquota = 100000\nscope = \"shared\"\n";

#[derive(Args)]
pub(crate) struct Options {
    /// Rounds; in each, Redis is well, slow, late, paused and gone once.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Measured seconds of each.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Requests per second over all connections.
    #[arg(long, default_value_t = 2000.0)]
    rate: f64,
    /// Connections.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// The gateway to measure (default: built in release from this workspace).
    #[arg(long)]
    pub(crate) binary: Option<std::path::PathBuf>,
    /// The backend (default: built in release from this workspace).
    #[arg(long)]
    pub(crate) backend: Option<std::path::PathBuf>,
}

/// How Redis is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    /// Well, and not asked: the rate counts at this gateway.
    Unasked,
    Well,
    /// Every answer takes 10 ms, well within the deadline.
    Slow,
    /// Every answer takes twice the deadline.
    Late,
    /// It stands still (SIGSTOP) from the first measured moment on.
    Paused,
    /// It ends at the first measured moment.
    Gone,
}

impl Health {
    const ALL: [Self; 6] = [Self::Unasked, Self::Well, Self::Slow, Self::Late, Self::Paused, Self::Gone];

    fn name(self) -> &'static str {
        match self {
            Self::Unasked => "not asked",
            Self::Well => "well",
            Self::Slow => "answers in 10 ms",
            Self::Late => "answers in 100 ms",
            Self::Paused => "paused meanwhile",
            Self::Gone => "ended meanwhile",
        }
    }

    fn delay(self) -> Duration {
        match self {
            Self::Slow => DEADLINE / 5,
            Self::Late => DEADLINE * 2,
            _ => Duration::ZERO,
        }
    }
}

/// Prints a line for each way that Redis can be.
#[expect(clippy::print_stdout, reason = "the figures")]
pub(crate) async fn run(options: &Options, mut stage: Stage) -> Result<()> {
    let mut redis = stage.start_redis().await?;
    let delay = Rc::new(Cell::new(Duration::ZERO));
    let address = late(redis.address(), delay.clone()).await?;
    stage.share(&address.to_string())?;
    let mut proxy = stage.start(Kind::Sealgate).await?;
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let mut round = Vec::new();
        for health in Health::ALL {
            delay.set(health.delay());
            let figures = one(options, health, &mut stage, &mut proxy, &mut redis).await;
            round.push(figures.with_context(|| format!("Redis {}", health.name()))?);
            delay.set(Duration::ZERO);
        }
        rounds.push(round);
    }
    println!(
        "HTTPS/1.1 requests under a rate that gateways share, {} per second on {} connections, {} rounds of {} s; \
         a request waits {} ms for Redis at most",
        options.rate,
        options.connections,
        options.rounds,
        options.seconds,
        DEADLINE.as_millis()
    );
    for (place, health) in Health::ALL.into_iter().enumerate() {
        let visits: Vec<&Visit> = rounds.iter().filter_map(|round: &Vec<Visit>| round.get(place)).collect();
        let spread = |figure: &dyn Fn(&Visit) -> f64| -> Result<String> {
            let figures: Vec<f64> = visits.iter().map(|visit| figure(visit)).collect();
            let Spread { median, low, high } = Spread::of(&figures).context("no round")?;
            Ok(format!("{median:.2} ({low:.2}–{high:.2})"))
        };
        println!(
            "  Redis {:18} CPU {} µs, p50 {} ms, p99 {} ms",
            health.name(),
            spread(&|visit| visit.cpu.as_secs_f64() * 1e6 / visit.units as f64)?,
            spread(&|visit| visit.p50.as_secs_f64() * 1e3)?,
            spread(&|visit| visit.p99.as_secs_f64() * 1e3)?,
        );
    }
    let others = rounds.iter().flatten().map(|visit| visit.others).fold(0.0, f64::max);
    println!("  others used {:.0} % of our CPUs at most", others * 100.0);
    stage.check_backend()
}

/// One measurement; afterwards Redis is well again, and asked.
async fn one(
    options: &Options,
    health: Health,
    stage: &mut Stage,
    proxy: &mut Proxy,
    redis: &mut Redis,
) -> Result<Visit> {
    let path = stage.policy().join("policy.toml");
    let text = std::fs::read_to_string(&path)?;
    let (from, to) = if health == Health::Unasked { (SHARED, LOCAL) } else { (LOCAL, SHARED) };
    std::fs::write(&path, text.replace(from, to))?;
    let answer = ask(&proxy.control(), r#"{"command":"reload"}"#).await?;
    ensure!(answer.contains(r#""outcome":"loaded""#), "{answer}");
    let plan = Plan {
        connections: options.connections.into(),
        warm_up: Duration::from_secs(2),
        measured: Duration::from_secs_f64(options.seconds),
        rate: Some(options.rate),
    };
    let target = stage.target(proxy)?;
    let (processes, watch) = (proxy.processes()?, stage.watch(proxy)?);
    let before = scripts(redis).await?;
    let visiting = visit(&target, Work::Request, &plan, &processes, &watch);
    let fault = async {
        // Past the opening of connections and amid the measurement, as near as it need be.
        tokio::time::sleep(plan.warm_up + plan.measured / 4).await;
        match health {
            Health::Paused => redis.signal(Signal::SIGSTOP),
            Health::Gone => {
                redis.end();
                Ok(())
            }
            _ => Ok(()),
        }
    };
    let (visited, faulted) = tokio::join!(visiting, fault);
    faulted?;
    match health {
        Health::Paused => redis.signal(Signal::SIGCONT)?,
        Health::Gone => stage.run_redis(redis).await?,
        // Else it was another thing that was measured. Sessions and revocations ask a little, too.
        Health::Unasked | Health::Well | Health::Slow => {
            let asked = scripts(redis).await? - before;
            let is_asked = asked > visited.as_ref().map_or(0, |visit| visit.units / 50);
            ensure!(is_asked == (health != Health::Unasked), "Redis was asked {asked} times");
        }
        // It is not asked again for a while.
        Health::Late => {}
    }
    // Until the gateway has found it again.
    tokio::time::sleep(Duration::from_secs(3)).await;
    visited
}

/// How many scripts Redis has run.
async fn scripts(redis: &Redis) -> Result<u64> {
    let mut stream = TcpStream::connect(redis.address()).await?;
    stream.write_all(b"INFO commandstats\r\nQUIT\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let calls = answer.lines().find_map(|line| line.strip_prefix("cmdstat_eval:calls="));
    let Some(calls) = calls.and_then(|calls| calls.split(',').next()) else { return Ok(0) };
    Ok(calls.parse()?)
}

/// A way to Redis on which everything that it says takes `delay` longer.
async fn late(redis: SocketAddr, delay: Rc<Cell<Duration>>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::task::spawn_local(async move {
        while let Ok((near, _)) = listener.accept().await {
            // Redis may be gone: then so is this connection.
            let Ok(far) = TcpStream::connect(redis).await else { continue };
            tokio::task::spawn_local(carry(near, far, delay.clone()));
        }
    });
    Ok(address)
}

async fn carry(near: TcpStream, far: TcpStream, delay: Rc<Cell<Duration>>) -> Result<()> {
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (mut near_reads, mut near_writes) = near.into_split();
    let (mut far_reads, mut far_writes) = far.into_split();
    let (said, mut to_say) = mpsc::unbounded_channel();
    tokio::select! {
        asked = tokio::io::copy(&mut near_reads, &mut far_writes) => { asked?; }
        heard = async {
            let mut buffer = [0; 16 * 1024];
            loop {
                let length = far_reads.read(&mut buffer).await?;
                let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                if length == 0 || said.send((tokio::time::Instant::now() + delay.get(), bytes)).is_err() {
                    return anyhow::Ok(());
                }
            }
        } => heard?,
        told = async {
            while let Some((due, bytes)) = to_say.recv().await {
                tokio::time::sleep_until(due).await;
                near_writes.write_all(&bytes).await?;
            }
            anyhow::Ok(())
        } => told?,
    }
    Ok(())
}
