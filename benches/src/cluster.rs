//! Several gateways that agree through Redis: how long a logout takes everywhere, and what happens when Redis is away.

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use tokio::task::JoinSet;

use crate::crowd::{ask, line, micros, talk};
use crate::load::{Idle, Quiet, Target, WebSocket, while_working};
use crate::measure::{Spread, percentile};
use crate::proxies::{Kind, Proxy, Stage};

/// Where all the sockets are: every message is judged there.
const PATH: &str = "/v1/echo-checked";

const GATEWAYS: usize = 3;

/// How long Redis is away: longer than contact may be lost.
const AWAY: Duration = Duration::from_secs(5);

#[derive(Args)]
pub(crate) struct Cluster {
    /// Sockets of the subject that is revoked, on each of the three gateways.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=3000))]
    sockets: u16,
    /// Sockets of somebody else, on each; none of them may close.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=3000))]
    untouched: u16,
    /// How often everybody's sockets are opened, and cut.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Sockets that talk through one gateway while Redis is away.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1000))]
    talking: u16,
    /// Messages per second over all of those.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// How often Redis goes away in each of the three ways.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=1000))]
    losses: u16,
    /// The gateway to measure (default: built in release from this workspace).
    #[arg(long)]
    pub(crate) binary: Option<std::path::PathBuf>,
    /// The backend (default: built in release from this workspace).
    #[arg(long)]
    pub(crate) backend: Option<std::path::PathBuf>,
}

/// What happens to Redis while somebody logs out.
#[derive(Clone, Copy)]
enum Loss {
    /// It ends, and is started, empty, after [`AWAY`].
    Stopped,
    /// It stands still (SIGSTOP) for [`AWAY`].
    Paused,
    /// It ends, and is started, empty, at once.
    Restarted,
}

/// Opens the sockets, and prints how long each logout took.
#[expect(clippy::print_stdout, reason = "the figures")]
pub(crate) async fn run(options: &Cluster, mut stage: Stage) -> Result<()> {
    let mut redis = stage.start_redis().await?;
    stage.share(&redis.address().to_string())?;
    let mut gateways = Vec::new();
    let mut others = JoinSet::new();
    for _ in 0..GATEWAYS {
        let gateway = stage.start(Kind::Sealgate).await?;
        let mut crowd =
            Idle::open(&stage.target(&gateway)?, Quiet::Socket(PATH), options.untouched.into()).await?;
        others.spawn_local(async move {
            crowd.hold(Duration::from_secs(86_400)).await?;
            anyhow::Ok(())
        });
        gateways.push(gateway);
    }
    println!("{GATEWAYS} gateways, {} sockets on each that nobody may touch", options.untouched);

    let (mut each, mut last) = (Vec::new(), Vec::new());
    for round in 0..options.rounds.into() {
        let sockets = open_all(options.sockets.into(), &stage, &gateways).await?;
        let revoking = gateways.get(round % GATEWAYS).context("a gateway")?;
        let closed = while_working(&mut others, async {
            let begin = Instant::now();
            let revoking = tokio::task::spawn_local(revoke(revoking.control(), options.sockets.into()));
            let mut times = Vec::new();
            for closing in sockets {
                times.extend(all_closed(closing, begin).await?);
            }
            revoking.await??;
            anyhow::Ok(times)
        })
        .await??;
        last.extend(closed.iter().copied().max());
        each.extend(closed);
        rest(&mut others).await?;
    }
    println!(
        "logging out everywhere with {} sockets on each, {} times: from the call until a close frame (4410) is read",
        options.sockets, options.rounds
    );
    println!("  each socket  {}", line(&mut each)?);
    println!("  the last one {}", line(&mut last)?);

    for (loss, name) in [
        (Loss::Stopped, "stopped, and started empty after"),
        (Loss::Paused, "paused for"),
        (Loss::Restarted, "restarted empty, with"),
    ] {
        let mut figures = Figures::default();
        for _ in 0..options.losses {
            let lost = lose(loss, options, &stage, &gateways, &mut redis, &mut figures);
            while_working(&mut others, lost).await??;
            rest(&mut others).await?;
        }
        if options.losses > 0 {
            println!("Redis {name} {} s, {} times", figures.away.as_secs_f64(), options.losses);
            println!("  messages, quiet            {}", line(&mut figures.quiet)?);
            println!("  messages, Redis away       {}", line(&mut figures.during)?);
            let Spread { median, low, high } = Spread::of(&figures.ratios).context("no round")?;
            println!("  p99 away / p99 quiet, by round: {median:.2} ({low:.2}–{high:.2})");
            println!("  where it was revoked, from the call until 4410      {}", line(&mut figures.here)?);
            println!("  elsewhere, from the return of Redis until 4410      {}", line(&mut figures.there)?);
        }
    }
    while_working(&mut others, tokio::time::sleep(Duration::from_secs(1))).await?;
    stage.check_backend()?;
    println!("nobody else's socket closed");
    Ok(())
}

#[derive(Default)]
struct Figures {
    away: Duration,
    quiet: Vec<u32>,
    during: Vec<u32>,
    ratios: Vec<f64>,
    here: Vec<u32>,
    there: Vec<u32>,
}

/// Takes Redis away, logs out meanwhile, and brings it back.
async fn lose(
    loss: Loss,
    options: &Cluster,
    stage: &Stage,
    gateways: &[Proxy],
    redis: &mut crate::proxies::Redis,
    figures: &mut Figures,
) -> Result<()> {
    const SOCKETS: usize = 100;
    let talking = stage.target(gateways.last().context("a gateway")?)?;
    let mut quiet = talk(&talking, options.talking, options.rate, Duration::from_secs(1)).await?;
    let mut sockets = open_all(SOCKETS, stage, gateways).await?.into_iter();
    let here = sockets.next().context("a gateway")?;
    let revoking = gateways.first().context("a gateway")?.control();
    let gone = Instant::now();
    match loss {
        Loss::Stopped => redis.end(),
        Loss::Paused => redis.signal(Signal::SIGSTOP)?,
        Loss::Restarted => {
            redis.end();
            stage.run_redis(redis).await?;
        }
    }
    let came_back = Instant::now();
    let (revoked, talked) = tokio::join!(
        async {
            let begin = Instant::now();
            let revoking = tokio::task::spawn_local(revoke(revoking, SOCKETS));
            let closed = all_closed(here, begin).await?;
            revoking.await??;
            anyhow::Ok(closed)
        },
        talk(&talking, options.talking, options.rate, AWAY),
    );
    figures.here.extend(revoked?);
    let mut during = talked?;
    let back = match loss {
        Loss::Stopped => {
            figures.away = gone.elapsed();
            stage.run_redis(redis).await?;
            Instant::now()
        }
        Loss::Paused => {
            figures.away = gone.elapsed();
            redis.signal(Signal::SIGCONT)?;
            Instant::now()
        }
        Loss::Restarted => {
            figures.away = came_back - gone;
            came_back
        }
    };
    for closing in sockets {
        figures.there.extend(all_closed(closing, back).await?);
    }
    let p99 = |times: &mut Vec<u32>| percentile(times, 0.99).context("nothing was said");
    figures.ratios.push(f64::from(p99(&mut during)?) / f64::from(p99(&mut quiet)?));
    figures.quiet.append(&mut quiet);
    figures.during.append(&mut during);
    Ok(())
}

type Closing = JoinSet<Result<(u16, Instant)>>;

/// `count` sockets of one subject on each gateway, each with one message through it and back, that wait for their end.
async fn open_all(count: usize, stage: &Stage, gateways: &[Proxy]) -> Result<Vec<Closing>> {
    let mut all = Vec::new();
    for gateway in gateways {
        let target: Rc<Target> = stage.target_of(gateway, "bob").await?;
        let mut closing = JoinSet::new();
        for index in 0..count {
            let mut socket = WebSocket::open(&target, PATH, index).await?;
            socket.send_message();
            socket.flush().await?;
            socket.receive().await?;
            closing.spawn_local(socket.closed());
        }
        all.push(closing);
    }
    Ok(all)
}

/// The microseconds from `begin` until each was closed as revoked; nothing for one that was before.
async fn all_closed(mut closing: Closing, begin: Instant) -> Result<Vec<u32>> {
    let mut times = Vec::new();
    while let Some(closed) = closing.join_next().await {
        let (code, at) = closed??;
        ensure!(code == 4410, "closed with {code}");
        times.push(micros(at.saturating_duration_since(begin)));
    }
    Ok(times)
}

async fn revoke(control: std::path::PathBuf, count: usize) -> Result<()> {
    let answer = ask(&control, r#"{"command":"revoke","target":{"subject":"bob"}}"#).await?;
    ensure!(answer.contains(&format!(r#""sockets":{count}"#)), "{answer}");
    Ok(())
}

/// The subject may log in anew from the next second on.
async fn rest(others: &mut JoinSet<Result<()>>) -> Result<()> {
    while_working(others, tokio::time::sleep(Duration::from_millis(1100))).await
}
