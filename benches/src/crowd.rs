//! What an operator does while thousands of sockets are open: revoking a subject, loading another policy.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use crate::load::{Idle, Quiet, Target, WebSocket, while_working};
use crate::measure::{Spread, percentile};
use crate::proxies::{Kind, Proxy, Stage};

/// Where all the sockets are: every message is judged there.
const PATH: &str = "/v1/echo-checked";

#[derive(Args)]
pub(crate) struct Crowd {
    /// Sockets that are open all the time.
    #[arg(long, default_value_t = 7900, value_parser = clap::value_parser!(u16).range(1..=9000))]
    sockets: u16,
    /// Sockets of the subject that is revoked.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    revoked: u16,
    /// Sockets that talk while policies are loaded.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1000))]
    talking: u16,
    /// Messages per second over all of those.
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// How often each is done.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// The gateway to measure (default: built in release from this workspace).
    #[arg(long)]
    pub(crate) binary: Option<std::path::PathBuf>,
    /// The backend (default: built in release from this workspace).
    #[arg(long)]
    pub(crate) backend: Option<std::path::PathBuf>,
}

/// Opens the crowd, and prints what revoking and reloading cost.
#[expect(clippy::print_stdout, reason = "the figures")]
pub(crate) async fn run(options: &Crowd, mut stage: Stage) -> Result<()> {
    let proxy = stage.start(Kind::Sealgate).await?;
    let mut crowd = Idle::open(&stage.target(&proxy)?, Quiet::Socket(PATH), options.sockets.into()).await?;
    println!("{} sockets open", options.sockets);

    let mut each = Vec::new();
    let mut last = Vec::new();
    for _ in 0..options.rounds {
        let target = stage.target_of(&proxy, "bob").await?;
        let closed = revoke(&target, &proxy, options.revoked.into()).await?;
        last.extend(closed.iter().copied().max());
        each.extend(closed);
        // bob may log in anew from the next second on.
        crowd.hold(Duration::from_millis(1100)).await?;
    }
    println!(
        "revoking one subject with {} sockets, {} times: until a close frame (4410) is read",
        options.revoked, options.rounds
    );
    println!("  each socket  {}", line(&mut each)?);
    println!("  the last one {}", line(&mut last)?);

    let mut quiet = Vec::new();
    let mut reloading = Vec::new();
    let mut ratios = Vec::new();
    let target = stage.target(&proxy)?;
    for round in 0..options.rounds {
        let mut before = while_held(&mut crowd, options.talk(&target)).await?;
        let reload = async {
            change(&stage.policy(), round)?;
            let answer = ask(&proxy.control(), r#"{"command":"reload"}"#).await?;
            ensure!(answer.contains(r#""outcome":"loaded""#), "{answer}");
            anyhow::Ok(())
        };
        let (talked, reloaded) =
            while_held(&mut crowd, async { Ok(tokio::join!(options.talk(&target), reload)) }).await?;
        reloaded?;
        let mut during = talked?;
        let p99 = |times: &mut Vec<u32>| percentile(times, 0.99).context("nothing was said");
        ratios.push(f64::from(p99(&mut during)?) / f64::from(p99(&mut before)?));
        quiet.append(&mut before);
        reloading.append(&mut during);
    }
    println!("messages at {} per second over {} sockets, for a second each", options.rate, options.talking);
    println!("  quiet                  {}", line(&mut quiet)?);
    println!("  while a policy loads   {}", line(&mut reloading)?);
    let Spread { median, low, high } = Spread::of(&ratios).context("no round")?;
    println!("  p99 while loading / p99 quiet, by round: {median:.2} ({low:.2}–{high:.2})");
    crowd.hold(Duration::from_secs(1)).await?;
    stage.check_backend()?;
    println!("all {} sockets are still open", options.sockets);
    Ok(())
}

/// Opens `count` sockets of one subject, revokes it, and gives the microseconds until each was closed.
async fn revoke(target: &Rc<Target>, proxy: &Proxy, count: usize) -> Result<Vec<u32>> {
    let mut closing = JoinSet::new();
    for index in 0..count {
        let mut socket = WebSocket::open(target, PATH, index).await?;
        socket.send_message();
        socket.flush().await?;
        socket.receive().await?;
        closing.spawn_local(socket.closed());
    }
    let started = Instant::now();
    let command = r#"{"command":"revoke","target":{"subject":"bob"}}"#;
    let answer = tokio::spawn({
        let control = proxy.control();
        async move { ask(&control, command).await }
    });
    let mut times = Vec::new();
    while let Some(closed) = closing.join_next().await {
        let (code, at) = closed??;
        ensure!(code == 4410, "closed with {code}");
        times.push(micros(at.duration_since(started)));
    }
    let answer = answer.await??;
    ensure!(answer.contains(&format!(r#""sockets":{count}"#)), "{answer}");
    Ok(times)
}

impl Crowd {
    async fn talk(&self, target: &Rc<Target>) -> Result<Vec<u32>> {
        talk(target, self.talking, self.rate, Duration::from_secs(1)).await
    }
}

/// Sends `rate` messages per second over `sockets`, on a beat, for a time; gives the microseconds that each echo took.
pub(crate) async fn talk(target: &Rc<Target>, sockets: u16, rate: f64, time: Duration) -> Result<Vec<u32>> {
    let mut talking = JoinSet::new();
    let beat = Duration::from_secs_f64(f64::from(sockets) / rate);
    let start = tokio::time::Instant::now() + Duration::from_millis(500);
    for index in 0..sockets.into() {
        let mut socket = WebSocket::open(target, PATH, index).await?;
        let first = start + beat.mul_f64(index as f64 / f64::from(sockets));
        talking.spawn_local(async move {
            let mut times = Vec::new();
            let mut due = first;
            while due < start + time {
                tokio::time::sleep_until(due).await;
                let sent = Instant::now();
                socket.send_message();
                socket.flush().await?;
                while socket.receive().await? == 0 {}
                times.push(micros(sent.elapsed()));
                due += beat;
            }
            anyhow::Ok(times)
        });
    }
    let mut all = Vec::new();
    while let Some(times) = talking.join_next().await {
        all.append(&mut times??);
    }
    Ok(all)
}

/// Does something while the crowd stays; fails if a socket of it closes.
async fn while_held<T>(crowd: &mut Idle, work: impl Future<Output = Result<T>>) -> Result<T> {
    while_working(&mut crowd.tasks, work).await?
}

/// A policy with other numbers and the same meaning to the sockets.
fn change(policy: &Path, round: u16) -> Result<()> {
    let path = policy.join("policy.toml");
    let text = std::fs::read_to_string(&path)?;
    let text = text.replace("quota = 1000000000", "quota = 999999999");
    std::fs::write(path, format!("{text}\n# round {round}\n"))?;
    Ok(())
}

pub(crate) async fn ask(control: &Path, command: &str) -> Result<String> {
    let mut stream = UnixStream::connect(control).await?;
    stream.write_all(format!("{command}\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

pub(crate) fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

pub(crate) fn line(times: &mut [u32]) -> Result<String> {
    let mut at =
        |share| percentile(times, share).map(|us| f64::from(us) / 1000.0).context("nothing was timed");
    Ok(format!("p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms", at(0.5)?, at(0.99)?, at(1.0)?))
}
